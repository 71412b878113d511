"""RecA for Harmon: one masked autoencoder that both understands and generates, tied together by a language model.

Harmon (arXiv 2503.21979) looks at an image and paints it with the same encoder, the one of MAR (masked autoregression,
arXiv 2406.11838). Latents of a KL VAE are the tokens. Seen without a mask they are the understanding embeddings; with most of
them hidden they are the context from which the language model and the MAR decoder predict the rest. A token is a
vector of 16 real numbers and not an index, so the last part is a small diffusion model that paints one token at a time.

RecA's reconstruction step (paper, equation 2). B images of 512 px, N = 32 x 32 tokens, E = 64 buffer tokens, V visible tokens:

    image [B,3,512,512] --VAE--> latents x [B,N,16] --+
                                                      |
      understanding: nothing hidden                   |      generation: 70 to 100% hidden
        MAR encoder          [B,E+N,De]  <------------+--------->  MAR encoder    u [B,E+V,De]
        proj_in              [B,N+E,D]                             proj_in          [B,V+E,D]
              |    gradient x 0.1                                        |              |
              v                                                          v              |
    "<user>" [ understanding embeddings ] "Describe the image ... <assistant>" [ visible tokens, buffer ]
                                          |                                             |
                                     Qwen2.5, causal                                    |
                                          | rows of the visible and buffer tokens       |
                                       proj_out   [B,E+V,De]  ----------- + ------------+
                                          |
                             MAR decoder, fills the hidden places    [B,N,Dd]
                                          | rows of the hidden tokens
                             diffusion MLP: "which noise is in x_t?"   ->   L_recon

Text to image (L_t2i) is the same without the understanding embeddings; image to text (L_i2t) is the understanding half
followed by the language model's head. All parameters but the VAE's are trained, and because both halves share them the
paper keeps lambda_i2t = 1 here.

    python reca_harmon.py --model tiny                       everything in minutes on a CPU, no downloads
    python reca_harmon.py --data ./images --steps 5000       RecA on Harmon-1.5B
    python reca_harmon.py --model harmon-0.5b --data ./images
    python reca_harmon.py --model out/checkpoint-005000 --steps 0 --generate prompts.txt --out pictures

How to read it: sections 4 and 5 are RecA. Section 2 is Harmon as it was, section 6 its sampler.

Legend of the shape comments:
    B images        N = h*w tokens of an image      C = 16 numbers of a token
    E buffer tokens     V visible tokens    M masked tokens, M + V = N
    De, Dd widths of MAR's encoder and decoder      W width of the diffusion MLP        D width of the language model
    L ids of a prompt   T places of a whole sequence        R rows of it that somebody reads
"""
import functools
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, rotate_half

import common
from common import InputError, Rng, global_mean

# ======================================================================================================
# 1. Sizes and hyper-parameters
# ======================================================================================================


@dataclass
class HarmonConfig:
    """Sizes of one variant; the defaults are Harmon-1.5B."""

    name: str = "harmon_1.5b"           # stem of the weights' file
    image_size: int = 512
    # Language model: Qwen2.5-1.5B-Instruct.
    vocab_size: int = 151936
    llm_width: int = 1536
    llm_layers: int = 28
    llm_heads: int = 12
    llm_kv_heads: int = 2
    llm_mlp: int = 8960
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tied_head: bool = True              # output head = input embedding
    # MAR, size Huge.
    encoder_width: int = 1280
    encoder_layers: int = 20
    encoder_heads: int = 16
    decoder_width: int = 1280
    decoder_layers: int = 20
    decoder_heads: int = 16
    buffer_size: int = 64
    table_size: int = 16                # the position tables are 16 x 16 (trained at 256 px); other sizes are interpolated
    class_num: int = 1000
    dropout: float = 0.1                # in all MAR blocks while training, in the understanding pass as well
    # Diffusion head.
    diffusion_width: int = 1536
    diffusion_layers: int = 12
    diffusion_repeats: int = 4          # every token is trained at 4 timesteps in one step
    diffusion_steps: int = 100          # of the 1000, when sampling
    # VAE: KL-16. Its mean times vae_scale has unit variance.
    latent_channels: int = 16
    vae_width: int = 128
    vae_mult: tuple = (1, 1, 2, 2, 4)   # one factor a level; five levels halve the image four times: stride 16
    vae_blocks: int = 2
    vae_scale: float = 0.2325
    # RecA.
    grad_scale: float = 0.1             # of the gradient into the understanding embeddings

    @property
    def stride(self):
        return 2 ** (len(self.vae_mult) - 1)


CONFIGS = {
    "harmon-1.5b": HarmonConfig(),
    "harmon-0.5b": HarmonConfig(
        name="harmon_0.5b", llm_width=896, llm_layers=24, llm_heads=14, llm_mlp=4864,
        encoder_width=768, encoder_layers=12, encoder_heads=12, decoder_width=768, decoder_layers=12, decoder_heads=12,
        diffusion_width=1024, diffusion_layers=6),
    # 4 x 4 tokens an image. GroupNorm of the VAE has 32 groups, so its width is a multiple of 32.
    "tiny": HarmonConfig(
        name="harmon_tiny", image_size=64, vocab_size=512, llm_width=128, llm_layers=3, llm_heads=4, llm_kv_heads=2, llm_mlp=384,
        encoder_width=96, encoder_layers=2, encoder_heads=4, decoder_width=96, decoder_layers=2, decoder_heads=4,
        buffer_size=8, table_size=4, class_num=10, dropout=0.0, diffusion_width=128, diffusion_layers=3, diffusion_steps=25,
        vae_width=32, vae_mult=(1, 1, 1, 1, 1), vae_blocks=1),
}


@dataclass
class Recipe:
    """The paper's run (Table 8), translated into our steps.

    The original counts micro-batches, in the order recon, recon, i2t, i2t, with a weight update after four. One of our steps
    is one batch of each loss, so two of our steps are one update (accum = 2, as Table 8 says) and the paper's "5K" micro-batches are
    2500 of our steps or 1250 updates. Its warm-up of 500 micro-batches is 125 updates. Its cosine ends at micro-batch
    50000 = update 12500, of which the run sees the first tenth: the learning rate is still at 0.98 of its peak at the end.
    """

    steps: int = 2500
    batch: int = 48
    accum: int = 2
    lr: float = 1e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.02
    warmup: int = 125
    horizon: int = 12500
    clip: float = 1.0
    lambda_recon: float = 1.0
    lambda_i2t: float = 1.0
    lambda_t2i: float = 0.0


RECIPES = {"harmon-1.5b": Recipe(), "harmon-0.5b": Recipe(steps=1500, batch=96)}      # 0.5B: "3K" steps


# ======================================================================================================
# 2. The model
# ======================================================================================================
# From the libraries: the VAE (diffusers) and the language model (transformers). MAR is in neither, and its blocks are timm's,
# whose names the checkpoints have and which is not among our six packages; a ViT block is short enough to be read here.


def take(x, index):
    """x [B, K, D], index [B, R] -> the rows x[b, index[b]], [B, R, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Plain self-attention, every token sees every token. [B, K, D] -> [B, K, D]"""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, K, D = x.shape
        q, k, v = self.qkv(x).view(B, K, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # 3 x [B, heads, K, D/heads]
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        x = self.proj(x.transpose(1, 2).reshape(B, K, D))
        return F.dropout(x, self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm ViT block."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, dropout)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DiffusionBlock(nn.Module):
    """One residual block of the diffusion MLP; timestep and condition y set shift, scale and gate (adaLN). x, y [rows, W]"""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class DiffusionMLP(nn.Module):
    """Predicts the noise in a noised token, and how uncertain the next denoising step is.

    x [rows, C] noised tokens, t [rows] original timesteps 0..999, z [rows, Dd] the MAR decoder's outputs
    -> [rows, 2C]: noise, and the place v in [-1, 1] of the log-variance between its two bounds.
    """

    def __init__(self, channels, condition_width, width, layers):
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.cond_embed = nn.Linear(condition_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(layers))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, 2 * channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})

    def forward(self, x, t, z):
        dtype = self.input_proj.weight.dtype
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=x.device) / 128)
        angles = t[:, None].float() * frequencies                                                          # [rows, 128]
        time = self.time_embed["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))                # [rows, W]
        y = time + self.cond_embed(z.to(dtype))
        x = self.input_proj(x.to(dtype))
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x)


class MAR(nn.Module):
    """The masked autoencoder: an encoder that sees only what is visible, a decoder that fills the rest, the diffusion head.

    The buffer tokens are extra places that are always visible: with a fully masked image they are all that the encoder has.
    """

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        places, De, Dd = c.table_size ** 2, c.encoder_width, c.decoder_width
        # A leftover of class-conditional MAR, in every checkpoint and never read. The original's optimizer lets weight decay
        # shrink it; here it is kept as it is.
        self.class_emb = nn.Embedding(c.class_num, De)
        self.class_emb.weight.requires_grad_(False)
        self.fake_latent = nn.Parameter(torch.empty(1, De))      # one vector in all buffer places; positions tell them apart
        self.z_proj = nn.Linear(c.latent_channels, De)
        self.z_proj_ln = nn.LayerNorm(De, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, c.buffer_size + places, De))
        self.encoder_blocks = nn.ModuleList(Block(De, c.encoder_heads, c.dropout) for _ in range(c.encoder_layers))
        self.encoder_norm = nn.LayerNorm(De, eps=1e-6)
        self.decoder_embed = nn.Linear(De, Dd)
        self.mask_token = nn.Parameter(torch.empty(1, 1, Dd))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, c.buffer_size + places, Dd))
        self.decoder_blocks = nn.ModuleList(Block(Dd, c.decoder_heads, c.dropout) for _ in range(c.decoder_layers))
        self.decoder_norm = nn.LayerNorm(Dd, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, places, Dd))
        self.diffloss = nn.ModuleDict({"net": DiffusionMLP(c.latent_channels, Dd, c.diffusion_width, c.diffusion_layers)})
        self.reset_parameters()

    def reset_parameters(self):
        """MAR's initialisation. Everything that modulates, and the diffusion MLP's output, starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        net = self.diffloss["net"]
        small = [self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
                 self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned,
                 net.time_embed["mlp"][0].weight, net.time_embed["mlp"][2].weight]
        zero = [net.final_layer["linear"], net.final_layer["adaLN_modulation"][1],
                *(block.adaLN_modulation[1] for block in net.res_blocks)]
        for weight in small:
            nn.init.normal_(weight, std=0.02)
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def positions(self, table, grid):
        """A table [1, S*S, D], stretched bilinearly to grid = (h, w) -> [1, h*w, D]. 512 px need 32 x 32, the table has 16 x 16."""
        S = self.config.table_size
        if grid == (S, S):
            return table
        table = table.unflatten(1, (S, S)).permute(0, 3, 1, 2)                                                 # [1, D, S, S]
        return F.interpolate(table, size=grid, mode="bilinear").flatten(2).transpose(1, 2)

    def encode(self, latents, grid, visible=None):
        """latents [B, N, C], visible [B, V] places that are seen (None: all) -> [B, E+V, De], buffer first.

        Hidden tokens are absent. They are dropped before the first layer: what is computed token by token need not be computed for them.
        """
        B, E = latents.shape[0], self.config.buffer_size
        buffer_positions, image_positions = self.encoder_pos_embed_learned.split([E, self.config.table_size ** 2], dim=1)
        places = self.positions(image_positions, grid).expand(B, -1, -1)
        if visible is not None:
            latents, places = take(latents, visible), take(places, visible)
        x = self.z_proj(latents.to(self.z_proj.weight.dtype)) + places
        buffer = (self.fake_latent + buffer_positions).expand(B, -1, -1)
        x = self.z_proj_ln(torch.cat([buffer, x], dim=1))                  # the norm comes after the positions, not before
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, grid, visible):
        """x [B, E+V, De] of the buffer and of the visible places [B, V] -> z [B, N, Dd], a condition for every place."""
        B, E = x.shape[0], self.config.buffer_size
        N = grid[0] * grid[1]
        buffer, seen = self.decoder_embed(x).split([E, x.shape[1] - E], dim=1)
        image = self.mask_token.to(seen.dtype).expand(B, N, -1).scatter(
            1, visible[..., None].expand(-1, -1, seen.shape[-1]), seen)
        buffer_positions, image_positions = self.decoder_pos_embed_learned.split([E, self.config.table_size ** 2], dim=1)
        x = torch.cat([buffer + buffer_positions, image + self.positions(image_positions, grid)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, E:] + self.positions(self.diffusion_pos_embed_learned, grid)


@functools.lru_cache(maxsize=8)
def diffusion_schedule(steps, device):
    """Tables of the cosine diffusion with `steps` of its 1000 timesteps kept: float32 tensors [steps] by name.

    abar(u) = cos^2(pi/2 (u + 0.008)/1.008) is how much of the signal is left at time u; x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise.
    With fewer steps the betas are recomputed from the abars that are kept, and `original` says which they are, since
    the network was trained on the original numbers. Everything is computed in float64 and rounded once.
    """
    def abar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = np.array([min(1 - abar((i + 1) / 1000) / abar(i / 1000), 0.999) for i in range(1000)])
    kept, place = [], 0.0
    for _ in range(steps):                                   # added up step by step, so that ties round as in the original
        kept.append(round(place))
        place += 999 / max(1, steps - 1)
    alphas = np.cumprod(1 - betas)[kept]
    before = np.append(1.0, alphas[:-1])                     # abar of the step before
    betas = 1 - alphas / before
    posterior = betas * (1 - before) / (1 - alphas)          # variance of q(x_{t-1} | x_t, x_0); 0 at t = 0, where step 1's stands in
    tables = {
        "alphas_cumprod": alphas, "betas": betas, "original": np.array(kept),
        "signal": np.sqrt(alphas), "noise": np.sqrt(1 - alphas),
        "x0_from_xt": np.sqrt(1 / alphas), "x0_from_noise": np.sqrt(1 / alphas - 1),
        "mean_x0": betas * np.sqrt(before) / (1 - alphas), "mean_xt": (1 - before) * np.sqrt(1 - betas) / (1 - alphas),
        "log_beta": np.log(betas), "log_posterior": np.log(np.append(posterior[1:2], posterior[1:])),
    }
    return {name: torch.tensor(table, dtype=torch.int64 if name == "original" else torch.float32, device=device)
            for name, table in tables.items()}


def denoising_step(tables, t, x_t, noise, v):
    """p(x_{t-1} | x_t) as the network says it: mean and log-variance, [rows, C] each. noise, v: the two halves of its output."""
    at = {name: table[t][:, None] for name, table in tables.items()}                                          # [rows, 1] each
    x_0 = at["x0_from_xt"] * x_t - at["x0_from_noise"] * noise                # not clipped: these are latents and not pixels
    part = (v + 1) / 2                                                      # between the posterior's variance (0) and beta (1)
    return (at["mean_x0"] * x_0 + at["mean_xt"] * x_t,
            part * at["log_beta"] + (1 - part) * at["log_posterior"])


def diffusion_terms(net, x_0, z, t, noise):
    """The two terms of MAR's diffusion loss for each row: x_0, noise [rows, C], z [rows, Dd], t [rows] -> mse, vb [rows].

    mse  the simple loss: mean squared error of the predicted noise.
    vb   the variational bound in bits, which trains the variance only (the predicted noise is detached): KL between the true and the
         modelled step, and at t = 0 the likelihood of x_0 under a Gaussian discretised in bins of 1/255. Those bins belong to 8-bit
         pixels and mean nothing for latents, but they are part of the loss that the released models were trained with.

    The arithmetic is float32 under autocast as well (the original's mse is bf16 there; only its vb is not); the MLP itself may be bf16.
    """
    tables = diffusion_schedule(1000, x_0.device)
    with torch.autocast(x_0.device.type, enabled=False):
        x_0, noise = x_0.float(), noise.float()
        x_t = tables["signal"][t][:, None] * x_0 + tables["noise"][t][:, None] * noise
    predicted, v = net(x_t, t, z).float().chunk(2, dim=-1)
    with torch.autocast(x_0.device.type, enabled=False):
        mse = (noise - predicted).square().mean(-1)
        mean, log_variance = denoising_step(tables, t, x_t, predicted.detach(), v)
        true_mean = tables["mean_x0"][t][:, None] * x_0 + tables["mean_xt"][t][:, None] * x_t
        true_log_variance = tables["log_posterior"][t][:, None]
        kl = 0.5 * (log_variance - true_log_variance - 1 + (true_log_variance - log_variance).exp()
                    + (true_mean - mean).square() * (-log_variance).exp())

        def cdf(x):                                                                         # of the standard normal, nearly
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

        inverse_std = (-0.5 * log_variance).exp()
        upper, lower = cdf(inverse_std * (x_0 - mean + 1 / 255)), cdf(inverse_std * (x_0 - mean - 1 / 255))
        inside = torch.where(x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower))
        likelihood = inside.clamp(min=1e-12).log()
        vb = torch.where(t == 0, -likelihood.mean(-1), kl.mean(-1)) / math.log(2)
    return mse, vb


RELEASED = {
    "harmon-1.5b": "wusize/harmon:harmon_1.5b.pth",
    "harmon-0.5b": "wusize/harmon:harmon_0.5b.pth",
    "harmon-1.5b-o": "wusize/harmon:harmon_1.5b-o.pth",      # the decoder was tuned on GPT-4o images; from before RecA
}
SMALL_FILES = ["config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]


def read_weights(folder, file):
    """The state dict in `folder`: the named file, or the only checkpoint there is (shards are read through their index)."""
    if not file:
        for pattern in ("*.index.json", "*.pth", "*.safetensors", "*.bin"):
            found = sorted(path.name for path in folder.glob(pattern))
            if len(found) > 1:
                raise InputError(f"{folder} holds several checkpoints ({', '.join(found[:4])}): name one as {folder}:FILE")
            if found:
                file = found[0]
                break
        else:
            raise InputError(f"{folder} holds no checkpoint (harmon_*.pth, *.safetensors or *.bin)")
    if not (folder / file).is_file():
        raise InputError(f"{folder} holds no {file}")
    return common.load_state(folder / file)


def read_config(settings, state, vae, name):
    """The sizes: from a config.json of ours, or else from the shapes. Head counts leave no trace in shapes, but follow from the widths
    of the released variants. (The config.json of other repositories is not read: its keys are not known.)"""
    if "reca_harmon" in settings:
        try:
            return HarmonConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings["reca_harmon"].items()})
        except (TypeError, AttributeError) as error:
            raise InputError(f"{name}/config.json: {error}") from error
    try:
        widths = tuple(state[key].shape[1] for key in ("proj_in.2.weight", "mar.fake_latent"))
    except KeyError as error:
        raise InputError(f"{name} is not a Harmon checkpoint: it has no {error.args[0]}") from error
    for config in CONFIGS.values():
        if widths == (config.llm_width, config.encoder_width):
            return config
    raise InputError(f"{name} has widths (language model, MAR) {widths} of no released Harmon, and no config.json of ours")


def find_tokenizer(folder, config):
    """The tokenizer in `folder`, or that of the language model. Other sizes without one get None: they take ids only."""
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    source = {1536: "Qwen/Qwen2.5-1.5B-Instruct", 896: "Qwen/Qwen2.5-0.5B-Instruct"}.get(config.llm_width)
    return source and AutoTokenizer.from_pretrained(common.hub_folder(source, SMALL_FILES))


def kl16_names(vae):
    """{name in diffusers' AutoencoderKL: name in kl16.ckpt}. The two differ in names only, and in that the decoder's
    levels are counted from the finest here and from the coarsest there."""
    levels = len(vae.config.block_out_channels)
    names = {}
    for key in vae.state_dict():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for theirs, ours in (("mid_block.attentions.0", "mid.attn_1"), ("down_blocks", "down"), ("resnets", "block"),
                             ("attentions", "attn"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                             ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"), ("group_norm", "norm"),
                             ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(theirs, ours)
        names[key] = name
    return names


# Qwen2.5's chat template, without its system turn (nowhere in Harmon is there one).
USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
IMAGE_MARKER = -200         # stands for all embeddings of an image in a list of ids
IGNORED = -100              # label of what is not to be predicted


def inference(method):
    """Runs a method in eval mode without gradients, and puts the mode back."""
    @functools.wraps(method)
    def run(self, *args, **kwargs):
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            self.train(training)
    return run


class Harmon(nn.Module):
    """VAE, MAR and Qwen2.5. See the picture on top of the file."""

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        levels = len(c.vae_mult)
        # diffusers' class expresses MAR's KL-16 exactly: attention in the encoder's last level and in the middle, nowhere else.
        self.vae = AutoencoderKL(
            block_out_channels=[c.vae_width * m for m in c.vae_mult], layers_per_block=c.vae_blocks,
            latent_channels=c.latent_channels, norm_num_groups=32,
            down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"] * levels).requires_grad_(False)
        self.llm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.llm_width, intermediate_size=c.llm_mlp, num_hidden_layers=c.llm_layers,
            num_attention_heads=c.llm_heads, num_key_value_heads=c.llm_kv_heads, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied_head,
            bos_token_id=None, eos_token_id=None, use_cache=False))
        self.mar = MAR(c)
        self.proj_in = nn.Sequential(nn.Linear(c.encoder_width, c.llm_width), nn.SiLU(), nn.Linear(c.llm_width, c.llm_width))
        self.proj_out = nn.Sequential(nn.Linear(c.llm_width, c.llm_width), nn.SiLU(), nn.Linear(c.llm_width, c.encoder_width))
        self.tokenizer = None                               # from_pretrained sets it; the losses on ids do without
        self.und_size = self.blur = None                    # ablations of the paper: what the understanding input loses

    @property
    def device(self):
        return self.proj_in[0].weight.device

    @property
    def dtype(self):
        return self.proj_in[0].weight.dtype

    def train(self, mode=True):
        super().train(mode)
        self.vae.eval()
        return self

    def blocks(self):
        """What repeats, for torch.compile and activation checkpointing."""
        return [*self.llm.model.layers, *self.mar.encoder_blocks, *self.mar.decoder_blocks, *self.mar.diffloss["net"].res_blocks]

    def parameter_groups(self, weight_decay):
        """AdamW groups of all that is trained (everything but the VAE). The original's rule: no decay for one-dimensional tensors,
        for biases, and for the whole diffusion MLP; so embeddings, position tables and the mask token do decay."""
        decay, no_decay = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                exempt = parameter.ndim == 1 or name.endswith(".bias") or "diffloss" in name
                (no_decay if exempt else decay).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]

    def hidden_states(self, embeddings, rows):
        """The language model's last hidden states (after its final norm) at some places only.

        embeddings [B, T, D], rows [B, R] places that are read -> [B, R, D]

        Attention is causal and padding stands at the end of each row (section 4), where nothing before it can see it. So no mask is
        needed, and the fast causal kernels apply. All layers but the last run whole. In the last one keys and values are needed of
        every place but queries and the MLP only of the places that are read: about 200 of 1320 in a reconstruction.
        """
        llm = self.llm.model
        rope = llm.rotary_emb(embeddings, torch.arange(embeddings.shape[1], device=embeddings.device)[None])      # 2 x [1, T, D/heads]
        x = embeddings
        for layer in llm.layers[:-1]:
            x = layer(x, attention_mask=None, position_embeddings=rope)
        last, attention = llm.layers[-1], llm.layers[-1].self_attn

        def heads(y):
            return y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)                                  # [B, heads, places, D/heads]

        normed = last.input_layernorm(x)
        q = heads(attention.q_proj(take(normed, rows)))
        k, v = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
        cos, sin = (table[0] for table in rope)                                                                  # [T, D/heads]
        q = q * cos[rows][:, None] + rotate_half(q) * sin[rows][:, None]
        k = k * cos + rotate_half(k) * sin
        k, v = (y.repeat_interleave(attention.num_key_value_groups, dim=1) for y in (k, v))      # heads share keys and values
        earlier = torch.arange(x.shape[1], device=x.device) <= rows[..., None]                                  # [B, R, T]
        x = take(x, rows) + attention.o_proj(F.scaled_dot_product_attention(
            q, k, v, attn_mask=earlier[:, None]).transpose(1, 2).flatten(2))
        return llm.norm(x + last.mlp(last.post_attention_layernorm(x)))

    # ==================================================================================================
    # 3. Loading and saving
    # ==================================================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32):
        """A model ready to use, with its tokenizer, in eval mode.

        source  "harmon-1.5b", "harmon-0.5b"   the released pair of files: harmon_*.pth and kl16.ckpt of wusize/harmon
                "owner/name"                   another hub repository, e.g. wusize/Harmon-1_5B or sanaka87/Harmon-1.5B-RecA
                "owner/name:FILE"              one weights file of a repository that holds several
                a folder (or a weights file)   what save_pretrained wrote, or the files above
                "tiny"                         random weights, no files
        Weights may be .pth, .bin or .safetensors, whole or in shards, with or without the VAE (`vae.*`). A folder without a VAE gets
        the released kl16.ckpt, one without a tokenizer that of Qwen2.5. InputError where something is missing or does not fit.
        """
        source = str(source)
        if source == "tiny":
            tokenizer = common.tiny_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
            model = cls(HarmonConfig(**{**asdict(CONFIGS["tiny"]), "vocab_size": len(tokenizer)}))
            model.tokenizer = tokenizer
            return model.to(device, dtype).eval()

        source, _, file = RELEASED.get(source, source).partition(":")
        if Path(source).is_file():
            source, file = str(Path(source).parent), Path(source).name
        weights = [file] if file else ["*.pth", "*.bin", "*.safetensors", "*.index.json"]
        folder = common.hub_folder(source, [*weights, "kl16.ckpt", *SMALL_FILES])
        state = read_weights(folder, file)
        vae = {key.removeprefix("vae."): state.pop(key) for key in [k for k in state if k.startswith("vae.")]}
        if not vae:
            vae_folder = folder if (folder / "kl16.ckpt").is_file() else common.hub_folder("wusize/harmon", ["kl16.ckpt"])
            vae = common.load_state(vae_folder / "kl16.ckpt")
        settings = folder / "config.json"
        config = read_config(common.read_json(settings) if settings.is_file() else {}, state, vae, str(folder))
        model = cls.from_states(config, state, vae, str(folder))
        model.tokenizer = find_tokenizer(folder, config)
        return model.to(device, dtype).eval()

    @classmethod
    def from_states(cls, config, state, vae, name="checkpoint"):
        """A model from the dict of a harmon_*.pth and that of kl16.ckpt. Strict: InputError names what is missing or unexpected."""
        with torch.device("meta"):                          # shapes only: no time and memory for random weights
            model = cls(config)
        state = dict(state)
        head, embedding = state.get("llm.lm_head.weight"), state.get("llm.model.embed_tokens.weight")
        if config.tied_head and embedding is not None:      # the tied head may be listed or not
            if head is not None and not torch.equal(head, embedding):
                raise InputError(f"{name}: llm.lm_head.weight and llm.model.embed_tokens.weight are tied and must be equal")
            state["llm.lm_head.weight"] = embedding
        # kl16.ckpt may hold more than the VAE (the original loads it non-strictly); what is part of the VAE must be complete.
        vae = {k: v for k, v in vae.items() if k.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv")}
        for what, own, given in ((name, model.released_state(), state), (f"the VAE of {name}", model.vae_state(), vae)):
            missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            wrong = sorted(k for k in own.keys() & given.keys() if own[k].shape != given[k].shape)
            for problem, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", wrong)):
                if keys:
                    raise InputError(f"{what} {problem} {len(keys)} keys: {', '.join(keys[:4])}{' ...' * (len(keys) > 4)}")
        for key, original in kl16_names(model.vae).items():
            state["vae." + key] = vae[original].reshape(model.vae.state_dict()[key].shape)
        # clone: the tensors of a torch file are a map of the file, which may be replaced while the model lives.
        model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
        model.llm.tie_weights()
        model.llm.model.rotary_emb = Qwen2RotaryEmbedding(model.llm.config)             # its table is in no checkpoint
        return model

    def released_state(self):
        """The flat dict of a released harmon_*.pth: everything but the VAE, the tied head listed."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("vae.")}

    def vae_state(self):
        """The dict under "model" in kl16.ckpt: the VAE under MAR's names, attention as 1x1 convolutions."""
        own = self.vae.state_dict()
        return {name: own[key][..., None, None] if "attn" in name and own[key].ndim == 2 else own[key]
                for key, name in kl16_names(self.vae).items()}

    def save_pretrained(self, folder):
        """Writes harmon_*.pth and kl16.ckpt, which the original's loaders accept, and a config.json and the tokenizer beside them,
        so that from_pretrained(folder) needs nothing else."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file, state in ((f"{self.config.name}.pth", self.released_state()), ("kl16.ckpt", {"model": self.vae_state()})):
            with common.atomic(folder / file) as path, open(path, "wb") as stream:     # a stream: the bytes do not depend on the name
                torch.save(state, stream)
        with common.atomic(folder / "config.json") as path:
            path.write_text(json.dumps({"reca_harmon": asdict(self.config)}, indent=1) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    # ==================================================================================================
    # 4. The embedding-conditioned prompt
    # ==================================================================================================
    # The heart of RecA: the model's own embeddings of an image stand where a caption would, inside the chat template in which the
    # model was taught to describe images, and what is to be generated follows.
    #
    #     <|im_start|>user \n\n  [N image | E buffer]  Describe the image in detail.<|im_end|>\n<|im_start|>assistant\n  [V visible | E buffer]

    def preprocess(self, image, task, rng=None):
        """A PIL RGB image -> {"pixels": float32 [3, S, S] in [-1, 1]}, as the original's data sets do it.

        recon  stretched to a square of its longer side, then resized to S: nothing is cropped, so that the whole image is understood
        i2t    padded to a square with grey, then resized. None (a conversation without an image) gives zeros, mid grey
        t2i    square crop, at random along the long side with rng (a numpy Generator), central without
        """
        size = self.config.image_size
        if image is None:
            return {"pixels": torch.zeros(3, size, size)}
        if task == "i2t":
            image = common.pad_square(image, size, 127)
        elif task == "t2i":
            image = common.random_square(image, size, rng)
        else:
            image = common.stretch_square(common.stretch_square(image, max(image.size)), size)
        return {"pixels": common.to_tensor(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen VAE makes of preprocessed images: [{"latents": float32 [h, w, C]}, ...], h = w = S/16.

        With the ablations (und_size, blur) "und_latents" [h', w', C] of the degraded image are what is understood; what is to be
        reconstructed stays sharp.
        """
        pixels = torch.stack([sample["pixels"] for sample in samples]).to(self.device)                           # [B, 3, S, S]
        features = {"latents": self.encode_pixels(pixels)}
        if task == "recon" and (self.und_size or self.blur):
            pixels = common.blur(pixels, self.blur) if self.blur else pixels
            pixels = common.resize(pixels, self.und_size, antialias=True) if self.und_size else pixels
            features["und_latents"] = self.encode_pixels(pixels)
        return [{key: value[i] for key, value in features.items()} for i in range(len(samples))]

    @torch.no_grad()
    def encode_pixels(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> latents [B, h, w, C]: the posterior's mean (never a sample), scaled."""
        mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mean                                       # [B, C, h, w]
        return (mean * self.config.vae_scale).permute(0, 2, 3, 1).float()

    @torch.no_grad()
    def decode_latents(self, latents):
        """Latents [B, h, w, C] -> pixels [B, 3, S, S], nominally in [-1, 1]."""
        return self.vae.decode((latents / self.config.vae_scale).permute(0, 3, 1, 2).to(self.vae.dtype)).sample

    def understand(self, latents):
        """Understanding embeddings: latents [B, h, w, C] -> [B, N+E, D].

        The MAR encoder on the whole image. It puts the buffer first; the language model is given it last, where a causal model's buffer
        tokens have seen the image. The gradient that comes back from either loss is multiplied by grad_scale, so that
        the encoder changes slowly; the forward pass and the generation pass are not scaled.
        """
        B, h, w, C = latents.shape
        x = self.proj_in(self.mar.encode(latents.view(B, h * w, C), (h, w)))                                    # [B, E+N, D]
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.config.grad_scale)
        return x.roll(-self.config.buffer_size, dims=1)

    def assemble(self, ids, mask, image=None, generated=None):
        """One sequence out of text, image embeddings and generated tokens.

        ids, mask [B, L]: prompts, padded on the right; IMAGE_MARKER in ids (one a row, with `image`) becomes the image.
        image [B, K, D], generated [B, G, D] or None -> embeddings [B, T, D], places [B, L] of the ids, last [B] places in use.

        The original keeps the padding where it was, between prompt and generated tokens, masks it, and lets positions skip it.
        Here the padding moves to the end of the row. Positions are then simply 0, 1, 2 ..., and no mask is needed: causal attention never
        looks there. What is computed for the tokens is the same.
        """
        B, L = ids.shape
        K = 0 if image is None else image.shape[1]
        G = 0 if generated is None else generated.shape[1]
        # An id stands at its own index, later by K - 1 if the marker is before it. The index is also worked out for the marker itself
        # (where the image begins) and for padding (which is moved behind everything else).
        is_marker = (ids == IMAGE_MARKER) & mask
        places = torch.arange(L, device=ids.device).expand(B, L) + (is_marker.cumsum(1) - is_marker.long()) * (K - 1)
        length = mask.sum(1) + (K - 1 if K else 0)                                                        # [B] places of the prompt
        places = places + (~mask) * G                                             # right padding begins at `length`; now behind the G
        T = L + (K - 1 if K else 0) + G
        text = self.llm.model.embed_tokens(ids.clamp(min=0))                                                        # [B, L, D]
        parts, targets = [text], [torch.where(is_marker, T, places)]                   # the marker's own embedding goes to a spare place
        if K:
            start = (places * is_marker).sum(1, keepdim=True)
            parts, targets = [*parts, image], [*targets, start + torch.arange(K, device=ids.device)]
        if G:
            parts, targets = [*parts, generated], [*targets, length[:, None] + torch.arange(G, device=ids.device)]
        target = torch.cat(targets, dim=1)                                                                        # [B, L+K+G]
        source = target.argsort(dim=1)[:, :T]                    # `target` is a permutation of 0..T (..T-1 without marker): invert it
        return take(torch.cat(parts, dim=1), source), places, length + G

    def tokens(self, text):
        if self.tokenizer is None:
            raise InputError("this model came without a tokenizer: put the files of Qwen2.5's tokenizer into its folder")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def recon_prompt(self, template):
        """The ids of RecA's prompt, a marker where the image goes.

        Two newlines stand before the image, here as in the original's training data; Qwen has one id for both. Its other prompts have
        one newline there. It looks like an accident, but the released RecA models were trained so, and it is followed.
        """
        return (self.tokens(USER + "\n") + [IMAGE_MARKER] + self.tokens(template + END))[:128]

    def recon_prompt_without_text(self):
        """The same without an instruction, for a tenth of the images. The original calls it unconditional and leaves the image in it."""
        return self.tokens(USER) + [IMAGE_MARKER] + self.tokens("Generate an image." + END)

    def t2i_prompt(self, caption=None):
        """Text to image; without a caption the branch that guidance moves away from."""
        return self.tokens(USER + ("Generate an image." if caption is None else f"Generate an image: {caption.strip()}") + END)[:1024]

    def conversation(self, turns):
        """[(question, answer), ...] -> ids and labels, the image before the first question. Each answer and the end of its turn are
        labels; the newline between two turns is not. At most 1472 ids, the marker counting as one."""
        ids, labels = [], []
        for i, (question, answer) in enumerate(turns):
            asked = self.tokens(USER) + [IMAGE_MARKER] + self.tokens("\n" + question + END) if i == 0 else \
                self.tokens(USER + question + END)
            answered, between = self.tokens(answer + "<|im_end|>"), self.tokens("\n")
            ids += asked + answered + between
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(between)
        return ids[:1472], labels[:1472]

    def pad(self, rows, value=0):
        """Lists of ids -> ids and mask [B, L] on the model's device, padded on the right. (What pads is never looked at.)"""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.device), mask.to(self.device)

    # ==================================================================================================
    # 5. The losses
    # ==================================================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA: reconstruct the image from its own understanding embeddings (paper, equation 2).

        features   B dicts of encode(..., "recon")          templates   B instructions
        draws      every random draw, for a replay: "drop" [B] uniform, and those of `generation_draws`
        -> scalar, the mean over all masked tokens and their timesteps
        """
        draws = draws or self.generation_draws(features, rng)
        rows = [self.recon_prompt_without_text() if drop < 0.1 else self.recon_prompt(template)
                for drop, template in zip(draws["drop"].tolist(), templates)]
        return self._recon_loss_from_ids(features, *self.pad(rows), draws)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image with captions: supervised fine-tuning, and RecA mixed with it. RecA itself has lambda_t2i = 0.

        A tenth of the captions is dropped, which trains the branch without a condition. Arguments and result as in recon_loss.
        """
        draws = draws or self.generation_draws(features, rng)
        rows = [self.t2i_prompt(None if drop < 0.1 else caption) for drop, caption in zip(draws["drop"].tolist(), captions)]
        return self._t2i_loss_from_ids(features, *self.pad(rows), draws)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text: cross-entropy of the answers in conversations about an image, which keeps understanding alive.

        features   B dicts of encode(..., "i2t")            conversations   B lists of (question, answer)
        -> scalar, the mean over all answer tokens. Nothing is drawn; draws and rng are there for the uniform signature.
        """
        rows = [self.conversation(turns) for turns in conversations]
        ids, mask = self.pad([ids for ids, _ in rows])
        labels, _ = self.pad([labels for _, labels in rows], IGNORED)
        return self._i2t_loss_from_ids(features, ids, mask, labels)

    def generation_draws(self, features, rng=None):
        """Every random draw of a generation loss on B images.

        drop [B]          uniform; below 0.1 the text is dropped
        orders [B, N]     a permutation of the tokens; the first ones of it are masked
        num_masked        how many: one ratio for the batch, so that the visible tokens of all images fit into one tensor. It is
                          normal(1, 0.25) truncated to [0.7, 1], by the inverse of the normal distribution function.
        t [4*B*N], noise [4*B*N, C]     for all tokens, also those whose loss is not computed: row r belongs to repeat r // (B*N), and to
                          image and token divmod(r % (B*N), N). An image's draws do not depend on the batch it is in.
        """
        rng = rng or Rng.fresh(len(features))
        h, w, C = features[0]["latents"].shape
        N, repeats = h * w, self.config.diffusion_repeats
        below = torch.special.ndtr(torch.tensor(-1.2, dtype=torch.float64))                             # (0.7 - 1) / 0.25
        uniform = torch.rand((), generator=rng.batch, dtype=torch.float64)
        ratio = 1 + 0.25 * torch.special.ndtri(below + uniform * (0.5 - below))
        return {
            "drop": rng.uniform(),
            "orders": rng.permutation(N),
            "num_masked": (N * ratio).ceil().long(),
            "t": rng.integers(1000, repeats, N).transpose(0, 1).flatten(),                          # [B, 4, N] -> [4*B*N]
            "noise": rng.normal(repeats, N, C).transpose(0, 1).flatten(0, 2),
        }

    def _recon_loss_from_ids(self, features, ids, mask, draws):
        seen = torch.stack([f.get("und_latents", f["latents"]) for f in features])
        return self._generation_loss(features, ids, mask, draws, self.understand(seen))

    def _t2i_loss_from_ids(self, features, ids, mask, draws):
        return self._generation_loss(features, ids, mask, draws, None)

    def _generation_loss(self, features, ids, mask, draws, image):
        """The masked part of the image from its visible part and a prompt. image: [B, N+E, D] for the marker in ids, or None."""
        latents = torch.stack([f["latents"] for f in features])
        B, h, w, C = latents.shape
        N, repeats = h * w, self.config.diffusion_repeats
        latents = latents.view(B, N, C)
        M = int(draws["num_masked"].flatten()[0])
        hidden = draws["orders"][:, :M].sort(dim=1).values                                              # [B, M], in raster order
        visible = draws["orders"][:, M:].sort(dim=1).values.to(self.device)                                 # [B, V]
        z = self.predict(latents, (h, w), visible, ids, mask, image)                                        # [B, N, Dd]

        # The diffusion loss of the masked tokens. The original evaluates it for all and multiplies the others by zero; the values are
        # the same. Each token is noised `repeats` times.
        t = draws["t"].view(repeats, B, N).gather(2, hidden.expand(repeats, B, M)).flatten().to(self.device)         # [4*B*M]
        noise = draws["noise"].view(repeats * B, N, C)
        noise = take(noise, hidden.repeat(repeats, 1)).flatten(0, 1).to(self.device)                                 # [4*B*M, C]
        hidden = hidden.to(self.device)
        x_0 = take(latents, hidden).repeat(repeats, 1, 1).flatten(0, 1)                                         # [4*B*M, C]
        z = take(z, hidden).repeat(repeats, 1, 1).flatten(0, 1)                                                  # [4*B*M, Dd]
        mse, vb = diffusion_terms(self.mar.diffloss["net"], x_0, z, t, noise)
        return global_mean((mse + vb).sum(), mse.numel())

    def predict(self, latents, grid, visible, ids, mask, image):
        """Conditions for every place of an image: latents [B, N, C] of which `visible` [B, V] are seen, and a prompt -> [B, N, Dd]."""
        E = self.config.buffer_size
        u = self.mar.encode(latents, grid, visible)                                                         # [B, E+V, De]
        generated = self.proj_in(u).roll(-E, dims=1)                                        # [B, V+E, D], buffer last
        embeddings, _, length = self.assemble(ids, mask, image, generated)
        G = generated.shape[1]
        rows = (length - G)[:, None] + torch.arange(G, device=length.device)                                    # [B, V+E]
        out = self.hidden_states(embeddings, rows).roll(E, dims=1)                                      # buffer first again
        return self.mar.decode(u + self.proj_out(out), grid, visible)

    def _i2t_loss_from_ids(self, features, ids, mask, labels):
        image = self.understand(torch.stack([f["latents"] for f in features]))
        embeddings, places, _ = self.assemble(ids, mask, image)
        # A label is predicted one place earlier. Rows are padded to the longest with place 0, whose output is dropped again.
        wanted = (labels != IGNORED) & mask
        R = max(1, int(wanted.sum(1).max()))
        first = (~wanted).long().argsort(dim=1, stable=True)[:, :R]                         # indices of the labels, then of others
        valid, rows = wanted.gather(1, first), (places.gather(1, first) - 1).clamp(min=0)                               # [B, R]
        hidden = self.hidden_states(embeddings, rows)[valid]                                                    # [labels, D]
        logits = self.llm.lm_head(hidden).float()                                                           # [labels, vocabulary]
        return global_mean(F.cross_entropy(logits, labels.gather(1, first)[valid], reduction="sum"), valid.sum())

    # ==================================================================================================
    # 6. Inference
    # ==================================================================================================

    @inference
    def generate(self, prompts, *, steps=64, guidance_scale=3.0, guidance_schedule="constant", temperature=1.0,
                 seed=0, draws=None, progress=False):
        """Text to image: a list of prompts -> a list of PIL images, in one batch.

        steps              iterations; the tokens are filled in as many groups, few at first
        guidance_scale     1 switches guidance off. guidance_schedule "linear": from 1 to guidance_scale as the image fills
        temperature        of the noise in the diffusion head
        seed               image i is drawn from (seed, i), whatever the batch it is in
        draws              all random numbers, for a replay (see `sample`)
        """
        branches = [self.assemble(*self.pad([self.t2i_prompt(prompt) for prompt in prompts]))[::2]]
        if guidance_scale != 1:
            branches.append(self.assemble(*self.pad([self.t2i_prompt()] * len(prompts)))[::2])
        latents = self.sample(branches, steps, guidance_scale, guidance_schedule, temperature, seed, draws, progress)
        return [common.to_pil(pixels) for pixels in self.decode_latents(latents)]

    @inference
    def reconstruct(self, images, *, templates=None, steps=64, guidance_scale=3.0, guidance_schedule="constant", temperature=1.0,
                    seed=0, draws=None, progress=False):
        """Image to image through the understanding embeddings: PIL images -> PIL images. All tokens start masked.

        The prompt is the training's. Guidance moves away from "Generate an image." without the image, as in the original's demo.
        """
        templates = templates or [common.SEED_TEMPLATE] * len(images)
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        seen = self.understand(torch.stack([f.get("und_latents", f["latents"]) for f in features]))
        branches = [self.assemble(*self.pad([self.recon_prompt(template) for template in templates]), seen)[::2]]
        if guidance_scale != 1:
            branches.append(self.assemble(*self.pad([self.t2i_prompt()] * len(images)))[::2])
        latents = self.sample(branches, steps, guidance_scale, guidance_schedule, temperature, seed, draws, progress)
        return [common.to_pil(pixels) for pixels in self.decode_latents(latents)]

    @inference
    def describe(self, images, question="Describe the image in detail.", max_new_tokens=1024):
        """Image to text: PIL images and a question (or one for each) -> answers, greedy."""
        questions = [question] * len(images) if isinstance(question, str) else question
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        rows = [self.tokens(USER) + [IMAGE_MARKER] + self.tokens("\n" + q + END) for q in questions]
        embeddings, _, length = self.assemble(*self.pad(rows), self.understand(torch.stack([f["latents"] for f in features])))
        # transformers' generate wants the padding on the left: shift each row to the right end.
        T = embeddings.shape[1]
        place = torch.arange(T, device=self.device) - (T - length)[:, None]                                     # [B, T]
        end = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        answers = self.llm.generate(inputs_embeds=take(embeddings, place.clamp(min=0)), attention_mask=(place >= 0).long(),
                                    max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=end[0])
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    @torch.no_grad()
    def sample(self, branches, steps=64, guidance_scale=3.0, guidance_schedule="constant", temperature=1.0, seed=0, draws=None,
               progress=False):
        """MAR's sampler. branches: [(embeddings [n, T, D], length [n])] of the prompts, and of the prompts without a condition if there is
        guidance -> latents [n, h, w, C].

        Every iteration predicts a condition for all places from what is there, and has the diffusion head paint the next few tokens of
        a random order: N cos(pi/2 k/steps) are still masked after iteration k.
        draws: "orders" [n, N], "iter{k}.init_noise" [n*P, C], "iter{k}.step_noise" [diffusion steps, n*P, C], noisiest step first;
        rows beyond the first n are ignored (the original draws for both branches and keeps the first).
        """
        c = self.config
        grid = (c.image_size // c.stride,) * 2
        n, N, E = len(branches[0][1]), grid[0] * grid[1], c.buffer_size
        rng = Rng(seed, "sample", positions=range(n)) if draws is None else None
        orders = (rng.permutation(N) if draws is None else draws["orders"][:n]).to(self.device)

        # Keys and values of the prompts, once. Prompts are padded on the right here: what comes later is masked from the padding and
        # counts its positions from the prompt's own end.
        T = max(embeddings.shape[1] for embeddings, _ in branches)
        prompts = torch.cat([F.pad(embeddings, (0, 0, 0, T - embeddings.shape[1])) for embeddings, _ in branches])       # [2n, T, D]
        length = torch.cat([length for _, length in branches])[:, None]                                     # [2n, 1]
        in_prompt = torch.arange(T, device=self.device) < length
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(inputs_embeds=prompts, past_key_values=cache, use_cache=True)

        latents = torch.zeros(n, N, c.latent_channels, device=self.device)
        masked = N
        for k in tqdm(range(steps), disable=not progress, leave=False):
            planned = max(1, min(masked - 1, math.floor(N * math.cos(math.pi / 2 * (k + 1) / steps))))
            following = 0 if k == steps - 1 else planned
            if following == masked:                                             # more iterations than tokens: nothing to do in this one
                continue
            visible = orders[:, masked:].sort(dim=1).values                                                     # [n, V]
            now = orders[:, following:masked].sort(dim=1).values                                                # [n, P]
            masked = following

            # Both branches see the same tokens, so the encoder runs once for both.
            u = self.mar.encode(latents, grid, visible)                                                         # [n, E+V, De]
            generated = self.proj_in(u).roll(-E, dims=1).repeat(len(branches), 1, 1)                            # [2n, V+E, D]
            G = generated.shape[1]
            out = self.llm.model(
                inputs_embeds=generated, past_key_values=cache, use_cache=True,
                attention_mask=F.pad(in_prompt, (0, G), value=True),
                position_ids=length + torch.arange(G, device=self.device)).last_hidden_state.roll(E, dims=1)
            cache.crop(-G)                                                                      # forget the tokens, keep the prompt
            z = self.mar.decode(u.repeat(len(branches), 1, 1) + self.proj_out(out), grid, visible.repeat(len(branches), 1))
            z = take(z, now.repeat(len(branches), 1))                                                           # [2n, P, Dd]

            P = now.shape[1]
            if draws is None:
                first = rng.normal(P, c.latent_channels).flatten(0, 1)                                              # [n*P, C]
                later = rng.normal(c.diffusion_steps, P, c.latent_channels).transpose(0, 1).flatten(1, 2)           # [steps, n*P, C]
            else:
                first, later = draws[f"iter{k}.init_noise"], draws[f"iter{k}.step_noise"][:, :n * P]
            scale = 1 + (guidance_scale - 1) * (N - planned) / N if guidance_schedule == "linear" else guidance_scale
            painted = self.paint(z.flatten(0, 1), scale, temperature, first.to(self.device), later.to(self.device))
            latents.scatter_(1, now[..., None].expand(-1, -1, c.latent_channels), painted.view(n, P, -1))
        return latents.unflatten(1, grid)

    def paint(self, z, guidance_scale, temperature, first, later):
        """The diffusion head's ancestral sampler: z [rows or 2 rows, Dd] (the second half for guidance), noise -> tokens [rows, C].

        Guidance acts on the predicted noise only; the variance is that of the conditioned branch.
        """
        steps, rows = len(later), len(first)
        tables = diffusion_schedule(steps, first.device)
        x = first.float()
        for j in reversed(range(steps)):
            t = torch.full((rows,), j, device=x.device)
            branches = len(z) // rows
            out = self.mar.diffloss["net"](x.repeat(branches, 1), tables["original"][t].repeat(branches), z).float()
            noise, v = out[:rows].chunk(2, dim=-1)
            if branches == 2:
                without = out[rows:, :noise.shape[1]]
                noise = without + guidance_scale * (noise - without)
            with torch.autocast(x.device.type, enabled=False):
                x, log_variance = denoising_step(tables, t, x, noise, v)
                if j > 0:
                    x = x + temperature * (0.5 * log_variance).exp() * later[steps - 1 - j]
        return x


# ======================================================================================================
# 7. main()
# ======================================================================================================
