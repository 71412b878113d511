"""RecA for Harmon: one masked autoencoder that both understands and generates, tied together by a language model.

Harmon (arXiv 2503.21979) looks at an image and paints it with the same encoder, that of MAR (masked autoregression,
arXiv 2406.11838). Its tokens are the latents of a KL VAE. Seen without a mask they are the understanding embeddings;
with most of them hidden they are the context from which the language model and MAR's decoder predict the rest. A token
is a vector of 16 real numbers, not an index, so the last part is a small diffusion model that paints single tokens.

RecA's step (paper, equation 2) on B images of 512 px: N = 32 x 32 tokens, E = 64 buffer tokens, V of the N visible.

    image [B,3,512,512] --VAE--> latents x [B,N,16] --+
      understanding: nothing hidden                   |     generation: 70 to 100% hidden
        MAR encoder   [B,E+N,De]  <-------------------+-------->  MAR encoder u [B,E+V,De]
        proj_in       [B,N+E,D]                                   proj_in       [B,V+E,D]
              v   (gradient x 0.1)                                       v          |
    "<user>" [ understanding embeddings ] "Describe the image ... <assistant>" [ visible tokens, buffer ]
                                          |                                         |
                                   Qwen2.5, causal                                  |
                                          |  rows of the visible and buffer tokens  |
                                       proj_out  [B,E+V,De] ---------- + -----------+
                                          |
                              MAR decoder fills the hidden places  z [B,N,Dd]
                                          |  rows of the hidden tokens
                              diffusion MLP: which noise is in x_t?  ->  L_recon

Text to image (L_t2i) is the same without the understanding embeddings; image to text (L_i2t) is the understanding half
and the language model's head. All but the VAE is trained, and as both halves share it the paper keeps lambda_i2t = 1.

    python reca_harmon.py --model tiny                       everything in minutes on a CPU, no downloads
    python reca_harmon.py --data ./images --steps 5000       RecA on Harmon-1.5B (or --model harmon-0.5b)
    python reca_harmon.py --model out/RUN/checkpoint-005000 --steps 0 --generate prompts.txt --out pictures

Legend of the shape comments: B images, S pixels a side, N = h*w tokens of an image, C = 16 numbers of a token, E buffer
tokens, V visible and M masked tokens (V + M = N), D width of the language model, De and Dd widths of MAR's encoder and
decoder, W width of the diffusion MLP, L ids of a prompt, K embeddings of an image, G generated tokens, T places of a
sequence, R of them read.
"""
import functools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, rotate_half

import common
from common import InputError, Rng

# ==== 1. Sizes and hyper-parameters ===================================================================

@dataclass
class HarmonConfig:
    """Sizes of one variant. The defaults are Harmon-1.5B."""
    name: str = "harmon_1.5b"           # stem of the weights' file
    image_size: int = 512
    vocab_size: int = 151936            # the language model: Qwen2.5-1.5B-Instruct
    llm_width: int = 1536
    llm_layers: int = 28
    llm_heads: int = 12
    llm_kv_heads: int = 2
    llm_mlp: int = 8960
    encoder_width: int = 1280           # MAR, size Huge
    encoder_layers: int = 20
    encoder_heads: int = 16
    decoder_width: int = 1280
    decoder_layers: int = 20
    decoder_heads: int = 16
    buffer_size: int = 64
    table_size: int = 16                # the position tables are 16 x 16 (trained at 256 px), stretched for other sizes
    class_num: int = 1000
    dropout: float = 0.1                # in MAR's blocks while training, in the understanding pass as well
    diffusion_width: int = 1536         # the diffusion head
    diffusion_layers: int = 12
    diffusion_repeats: int = 4          # timesteps at which every token is trained in one step
    diffusion_steps: int = 100          # of the 1000, when sampling
    latent_channels: int = 16           # the VAE, KL-16: five levels, halved in between, so the stride is 16
    vae_width: int = 128
    vae_mult: tuple = (1, 1, 2, 2, 4)
    vae_blocks: int = 2
    vae_groups: int = 32                # of its GroupNorm
    vae_scale: float = 0.2325           # makes the variance of the latents about 1
    num_steps: int = 64                 # the sampler's defaults
    guidance_scale: float = 3.0
    clip_latents: float = 0.0           # bound of x_0, 0: none. Tiny: at t = 999 errors are 20000 times as large
    grad_scale: float = 0.1             # RecA: factor on the gradient that reaches the understanding embeddings

CONFIGS = {
    "harmon-1.5b": HarmonConfig(),
    "harmon-0.5b": HarmonConfig(
        name="harmon_0.5b", llm_width=896, llm_layers=24, llm_heads=14, llm_mlp=4864,
        encoder_width=768, encoder_layers=12, encoder_heads=12, decoder_width=768, decoder_layers=12, decoder_heads=12,
        diffusion_width=1024, diffusion_layers=6),
    # 4 x 4 tokens of 8 x 8 pixels an image.
    "tiny": HarmonConfig(
        name="harmon_tiny", image_size=32, vocab_size=512, llm_width=96, llm_layers=2, llm_heads=4, llm_mlp=256,
        encoder_width=96, encoder_layers=2, encoder_heads=4, decoder_width=96, decoder_layers=2, decoder_heads=4,
        buffer_size=8, table_size=4, class_num=10, dropout=0.0, diffusion_width=96, diffusion_layers=2,
        diffusion_steps=25, grad_scale=1.0, vae_width=32, vae_mult=(1, 1, 1, 1), vae_blocks=1, vae_groups=4,
        num_steps=16, guidance_scale=1.5, clip_latents=4.0),
}

# What --model accepts beside hub ids and folders. (-o: decoder tuned on GPT-4o images, before there was RecA.)
RELEASED = {"harmon-1.5b": "wusize/harmon:harmon_1.5b.pth", "harmon-0.5b": "wusize/harmon:harmon_0.5b.pth",
            "harmon-1.5b-o": "wusize/harmon:harmon_1.5b-o.pth"}
# And what the authors' RecA has made of them (plus: fine-tuned on BLIP3o-60k first), with the size
# of each.
RECA = {
    "harmon-1.5b-reca": "sanaka87/Harmon-1.5B-RecA",
    "harmon-1.5b-reca-plus": "sanaka87/Harmon-1.5B-RecA-plus",
    "harmon-0.5b-reca": "sanaka87/Harmon-0.5B-RecA",
}
CONFIGS |= {name: CONFIGS[name[:11]] for name in ("harmon-1.5b-o", *RECA)}

@dataclass
class Recipe:
    """The paper's run (Table 8): 5000 steps, 48 images, accumulation. The original counts micro-batches
    of 48, in the order recon, recon, i2t, i2t, and moves the weights after four. So a step of ours, one
    evaluation of equation (3), is 24 images for each of the two losses, and four are one update: 1250
    updates of 96 + 96 images, as there. (The table says accumulation 2, which are pairs of its
    micro-batches.) Its warm-up of 500 micro-batches is 125 updates. Its cosine ends at update 12500, of
    which the run sees the first tenth: the learning rate stops at 0.98 of its peak."""
    steps: int = 5000
    batch: int = 24
    accum: int = 4
    lr: float = 1e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.02
    warmup: int = 125
    horizon: int = 12500
    clip: float = 2.0           # the original clips the mean of its four micro-batches at 1; our gradient is twice that
    lambda_recon: float = 1.0
    lambda_i2t: float = 1.0
    lambda_t2i: float = 0.0

DEFAULT = "harmon-1.5b"
RECIPES = {
    DEFAULT: Recipe(),
    "harmon-0.5b": Recipe(steps=3000, batch=48),
    "tiny": Recipe(steps=1200, batch=32, accum=1, lr=2e-3, warmup=20, horizon=1300, clip=1.0),
}
RECIPES |= {name: RECIPES[name[:11]] for name in ("harmon-1.5b-o", *RECA)}

# ==== 2. The model ====================================================================================
# The VAE is diffusers', the language model transformers'. MAR is in neither; its blocks have timm's names.

def take(x, index):
    """x [B, K, D], index [B, R] -> the rows x[b, index[b]], [B, R, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

class Block(nn.Module):
    """Pre-norm ViT block, in which every token sees every token. [B, K, D] -> [B, K, D]"""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        dropout = self.dropout if self.training and torch.is_grad_enabled() else 0.0  # generate never drops
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)                      # all [B, heads, K, D/heads]
        x = x + F.dropout(self.attn["proj"](y.transpose(1, 2).flatten(2)), dropout)
        y = F.dropout(F.gelu(self.mlp["fc1"](self.norm2(x))), dropout)                      # [B, K, 4D]
        return x + F.dropout(self.mlp["fc2"](y), dropout)


def stretch_square(image, size):
    """Stretched to a square of the longer side, then size x size: the two steps of Harmon's
    original."""
    side = min(max(image.size), common.MAX_SIDE)
    return image.resize((side, side)).resize((size, size))


def pad_square(image, size):
    """Centred on a grey square of the longer side, then size x size (LLaVA's padding)."""
    image = common.shrunk(image, common.MAX_SIDE)
    square = Image.new("RGB", (max(image.size),) * 2, (127,) * 3)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((size, size))


def projector(width_in, width, width_out):
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width_out))

class DiffusionBlock(nn.Module):
    """Residual block of the diffusion MLP: y (timestep and condition) sets shift, scale and gate. x, y [rows, W]"""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = projector(width, width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)

class DiffusionMLP(nn.Module):
    """x [rows, C] noised tokens, t [rows] or [1] timesteps 0..999, z [rows, Dd] what MAR's decoder says of them
    -> [rows, 2C]: the noise in x, and v in [-1, 1], the place of the step's log-variance between its two bounds."""

    def __init__(self, channels, z_width, width, layers):
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": projector(256, width, width)})
        self.cond_embed = nn.Linear(z_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(layers))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, 2 * channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})

    def forward(self, x, t, z):
        dtype = self.input_proj.weight.dtype
        time = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)          # [rows or 1, 256]
        y = self.time_embed["mlp"](time.to(dtype)) + self.cond_embed(z.to(dtype))                         # [rows, W]
        x = self.input_proj(x.to(dtype))
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, dim=-1)
        return self.final_layer["linear"](F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

class MAR(nn.Module):
    """The masked autoencoder: an encoder of what is visible (the buffer always is), a decoder that fills the rest, and
    the diffusion head."""

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        places, De, Dd = c.table_size ** 2, c.encoder_width, c.decoder_width
        self.class_emb = nn.Embedding(c.class_num, De).requires_grad_(False)  # in every checkpoint, never read
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, De))   # in all buffer places; positions tell them apart
        self.z_proj = nn.Linear(c.latent_channels, De)
        self.z_proj_ln = nn.LayerNorm(De, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, c.buffer_size + places, De))
        self.encoder_blocks = nn.ModuleList(Block(De, c.encoder_heads, c.dropout) for _ in range(c.encoder_layers))
        self.encoder_norm = nn.LayerNorm(De, eps=1e-6)
        self.decoder_embed = nn.Linear(De, Dd)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, Dd))
        self.decoder_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, c.buffer_size + places, Dd))
        self.decoder_blocks = nn.ModuleList(Block(Dd, c.decoder_heads, c.dropout) for _ in range(c.decoder_layers))
        self.decoder_norm = nn.LayerNorm(Dd, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(0.02 * torch.randn(1, places, Dd))
        net = DiffusionMLP(c.latent_channels, Dd, c.diffusion_width, c.diffusion_layers)
        self.diffloss = nn.ModuleDict({"net": net})
        # MAR's initialisation. What modulates, and the diffusion MLP's output, start at zero.
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
                nn.init.zeros_(p)
            elif "time_embed" in name:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 2 and name.endswith("weight"):
                nn.init.xavier_uniform_(p)

    def positions(self, table, grid):
        """A table [1, E + side * side, D] -> [1, E + h*w, D], stretched to grid = (h, w): 16 x 16 to 32 x 32."""
        side = self.config.table_size
        buffer, image = table.tensor_split([table.shape[1] - side ** 2], dim=1)
        image = image.unflatten(1, (side, side)).permute(0, 3, 1, 2)                                # [1, D, side, side]
        image = F.interpolate(image, size=grid, mode="bilinear").flatten(2).transpose(1, 2)         # [1, h*w, D]
        return torch.cat([buffer, image], dim=1)

    def encode(self, latents, grid, visible=None):
        """latents [B, N, C], visible [B, V] places (None: all) -> [B, E+V, De], buffer first. The hidden are absent."""
        B, E = latents.shape[0], self.config.buffer_size
        buffer, places = self.positions(self.encoder_pos_embed_learned, grid).expand(B, -1, -1).tensor_split([E], dim=1)
        if visible is not None:
            latents, places = take(latents, visible), take(places, visible)
        x = self.z_proj(latents.to(self.z_proj.weight.dtype))
        precision = x.dtype
        x = self.z_proj_ln(torch.cat([self.fake_latent + buffer, x + places], dim=1))
        # Under autocast position tables and norms give float32, in which all blocks would then keep their rows.
        x = x.to(precision)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, grid, visible):
        """x [B, E+V, De] for the buffer and the visible places [B, V] -> z [B, N, Dd], a condition for every place."""
        E = self.config.buffer_size
        buffer, seen = self.decoder_embed(x).tensor_split([E], dim=1)
        image = self.mask_token.to(seen.dtype).expand(len(x), grid[0] * grid[1], -1)
        image = image.scatter(1, visible[..., None].expand(-1, -1, seen.shape[-1]), seen)                   # [B, N, Dd]
        x = torch.cat([buffer, image], dim=1)
        x = x + self.positions(self.decoder_pos_embed_learned, grid).to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, E:] + self.positions(self.diffusion_pos_embed_learned, grid)

@functools.lru_cache(maxsize=8)
def diffusion_schedule(steps, device):
    """Tables of the cosine diffusion with `steps` of its 1000 timesteps kept: {name: float32 [steps]}. Of the signal's
    variance abar(u) = cos^2(pi/2 (u + 0.008) / 1.008) is left at time u: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise.
    With fewer steps the betas follow from the abars that are kept; `original` holds their numbers among the 1000."""
    abar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    kept = np.cumsum([0.0] + [999 / max(1, steps - 1)] * (steps - 1)).round().astype(int)     # ties as in the original
    now = np.cumprod(1 - betas)[kept]                           # abar of each step that is kept
    before = np.append(1.0, now[:-1])                           # and of the one before it
    betas = 1 - now / before
    posterior = betas * (1 - before) / (1 - now)                # variance of q(x_{t-1} | x_t, x_0)
    posterior = np.append(posterior[1:2], posterior[1:])        # it is 0 at t = 0, where that of t = 1 stands in
    tables = {
        "alphas_cumprod": now, "betas": betas, "original": kept,
        "signal": np.sqrt(now), "noise": np.sqrt(1 - now),                                      # x_0, noise -> x_t
        "x0_from_xt": np.sqrt(1 / now), "x0_from_noise": np.sqrt(1 / now - 1),                  # and back
        "mean_x0": betas * np.sqrt(before) / (1 - now),                                  # mean of q(x_{t-1} | x_t, x_0)
        "mean_xt": (1 - before) * np.sqrt(1 - betas) / (1 - now),
        "log_beta": np.log(betas), "log_posterior": np.log(posterior)}
    return {name: torch.tensor(table, dtype=torch.int64 if name == "original" else torch.float32, device=device)
            for name, table in tables.items()}

def denoising_step(at, x_t, noise, v, limit=math.inf):
    """p(x_{t-1} | x_t) as the network sees it -> its mean and log-variance, [rows, C] each. at: the tables at time t;
    x_t, noise, v [rows, C], the latter two from the network. limit: bound of the predicted x_0, none in Harmon."""
    x_0 = (at["x0_from_xt"] * x_t - at["x0_from_noise"] * noise).clamp(-limit, limit)
    part = (v + 1) / 2                                                       # 0: the posterior's variance, 1: beta
    return at["mean_x0"] * x_0 + at["mean_xt"] * x_t, part * at["log_beta"] + (1 - part) * at["log_posterior"]

def diffusion_terms(net, x_0, z, t, noise):
    """MAR's diffusion loss, its two terms for each row: x_0, noise [rows, C], z [rows, Dd], t [rows] -> mse, vb [rows].
    mse  mean squared error of the predicted noise, in float32 (the original: bf16, under autocast).
    vb   the variational bound in bits, to train the variance only (the noise is detached): the KL between the true and
         the predicted step; at t = 0 the likelihood of x_0 under a Gaussian in bins of 1/255, which fit 8-bit pixels
         and mean little for latents, but the released models were trained so."""
    def cdf(x):                                                             # of the standard normal, very nearly
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    x_0, noise = x_0.float(), noise.float()
    at = {name: table[t][:, None] for name, table in diffusion_schedule(1000, x_0.device).items()}          # [rows, 1]
    x_t = at["signal"] * x_0 + at["noise"] * noise
    predicted, v = net(x_t, t, z).float().chunk(2, dim=-1)
    mse = (noise - predicted).square().mean(-1)
    mean, log_var = denoising_step(at, x_t, predicted.detach(), v)
    true_mean, true_log_var = at["mean_x0"] * x_0 + at["mean_xt"] * x_t, at["log_posterior"]
    kl = log_var - true_log_var - 1 + (true_log_var - log_var).exp() + (true_mean - mean).square() * (-log_var).exp()
    inverse_std = (-0.5 * log_var).exp()
    upper, lower = cdf(inverse_std * (x_0 - mean + 1 / 255)), cdf(inverse_std * (x_0 - mean - 1 / 255))
    bin_mass = torch.where(x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower))
    likelihood = bin_mass.clamp(min=1e-12).log()
    return mse, torch.where(t == 0, -likelihood.mean(-1), 0.5 * kl.mean(-1)) / math.log(2)

def masked_after(N, num_steps):
    """How many of N tokens are masked after each of the sampler's steps: a cosine, always fewer, at least one."""
    left = [N]
    for k in range(1, num_steps + 1):
        left.append(max(1, min(left[-1] - 1, math.floor(N * math.cos(math.pi / 2 * k / num_steps)))))
    return left[1:]

USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"    # Qwen2.5's template, without a system turn
MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # what the user's words must not say
LEAST_MASKED = 0.7      # of the tokens, in training
LABELS_AT_ONCE = 128    # that meet the language model's head: float32 logits of 78 MB
IMAGE_MARKER, IGNORED = -200, -100      # all embeddings of an image, in a list of ids; label of what is not predicted

class Harmon(nn.Module):
    """VAE, MAR and Qwen2.5 as in the picture on top of the file, with random weights and no tokenizer."""
    # Where ids or latents enter and leave: few numbers, on which all others depend.
    unquantized = ("vae.", "llm.lm_head", "mar.z_proj", "mar.diffloss.net.input_proj",
                   "mar.diffloss.net.final_layer.linear")

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        levels = len(c.vae_mult)
        self.stride = 2 ** (levels - 1)                     # pixels of one token's side
        # diffusers' class expresses KL-16 exactly: attention is in the encoder's last level and the middles only.
        self.vae = AutoencoderKL(
            block_out_channels=[c.vae_width * m for m in c.vae_mult], up_block_types=["UpDecoderBlock2D"] * levels,
            down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
            latent_channels=c.latent_channels, layers_per_block=c.vae_blocks, norm_num_groups=c.vae_groups,
        ).requires_grad_(False)
        self.llm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=c.vocab_size, hidden_size=c.llm_width, intermediate_size=c.llm_mlp,
            num_hidden_layers=c.llm_layers, num_attention_heads=c.llm_heads, num_key_value_heads=c.llm_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, use_cache=False))
        self.mar = MAR(c)
        self.proj_in = projector(c.encoder_width, c.llm_width, c.llm_width)
        self.proj_out = projector(c.llm_width, c.llm_width, c.encoder_width)
        self.tokenizer = None                               # from_pretrained sets it; what takes ids does without
        self.set_und()

    def set_und(self, size=None, blur=None):
        """The paper's ablations: the understanding pass gets a smaller (section 3) or a blurred (F.2) image."""
        if size and size % self.stride:
            raise InputError(f"--und-size {size}: Harmon's understanding encoder takes multiples of {self.stride}")
        common.check_blur(blur, self.config.image_size)
        self.und_size, self.und_blur = size, blur

    @property
    def device(self):
        return self.proj_in[0].weight.device

    def _apply(self, function, recurse=True):
        """What is behind .to(...). The table of the rotary positions is in no checkpoint and stays float32; the VAE's
        convolutions are a quarter faster with the channels last."""
        super()._apply(function, recurse)
        self.vae.to(memory_format=torch.channels_last)
        with torch.device(self.device):
            self.llm.model.rotary_emb = Qwen2RotaryEmbedding(self.llm.config)
        return self

    def blocks(self):
        """What repeats, for torch.compile and activation checkpointing: the layers, and the diffusion head as a whole,
        which is called once for each of its four timesteps."""
        return [*self.llm.model.layers, *self.mar.encoder_blocks, *self.mar.decoder_blocks, self.mar.diffloss["net"]]

    def parameter_groups(self, weight_decay):
        """AdamW groups of all that is trained. The original's rule: no decay for one-dimensional tensors and the whole
        diffusion MLP; so embeddings, position tables and the mask token do decay."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        exempt = {name for name, p in trained if p.ndim == 1 or "diffloss" in name}
        return [{"params": [p for name, p in trained if name not in exempt], "weight_decay": weight_decay},
                {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0}]

    def preprocess(self, image, task, rng=None):
        """A PIL RGB image -> {"pixels": uint8 [3, S, S]}, as the original's data sets do it. rng: a numpy Generator, for
        t2i's crop along the long side; None: the central one."""
        size = self.config.image_size
        if image is None:                                   # a conversation without an image: mid grey
            return {"pixels": torch.zeros(3, size, size)}
        if task == "recon":                                 # squeezed to a square, from its longer side
            image = stretch_square(image, size)
        else:
            image = pad_square(image, size) if task == "i2t" else common.random_square(image, size, rng)
        return {"pixels": common.to_uint8(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """All that is frozen: samples of preprocess -> dicts of float32 [h, w, C], which --cache stores: "latents", for
        set_und's ablations also "und_latents"."""
        pixels = [common.normalize(sample["pixels"].to(self.device)) for sample in samples]
        pixels = torch.stack(pixels)                                                                      # [B, 3, S, S]
        features = {"latents": self._latents(pixels)}
        if task == "recon" and (self.und_size or self.und_blur):
            pixels = common.blur(pixels, self.und_blur) if self.und_blur else pixels
            pixels = F.interpolate(pixels, self.und_size, mode="bilinear", antialias=True) if self.und_size else pixels
            features["und_latents"] = self._latents(pixels)
        return [{key: value[i] for key, value in features.items()} for i in range(len(samples))]

    def _latents(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> [B, h, w, C] float32: the mean of the posterior, never a sample, scaled."""
        pixels = pixels.to(self.vae.dtype, memory_format=torch.channels_last)
        few = max(1, 2 ** 20 // pixels[0, 0].numel())       # 4 of 512 px: the first layers of more would be the peak
        mean = torch.cat([self.vae.encode(x).latent_dist.mean for x in pixels.split(few)])                # [B, C, h, w]
        return (mean * self.config.vae_scale).permute(0, 2, 3, 1).float().contiguous()

    def _pixels(self, latents):
        """[B, h, w, C] -> [B, 3, S, S], about in [-1, 1]."""
        latents = (latents / self.config.vae_scale).permute(0, 3, 1, 2).to(self.vae.dtype)
        return torch.cat([self.vae.decode(z).sample for z in latents.split(4)])

    def understand(self, features):
        """Understanding embeddings: B dicts of encode -> [B, K, D], K = N + E. MAR's encoder on the whole image, the
        buffer moved to the end, where causal attention lets it see the image. Gradients are multiplied by grad_scale on
        their way back, so that the understanding pass changes slowly; the generation pass's are not."""
        latents = torch.stack([f.get("und_latents", f["latents"]) for f in features])                     # [B, h, w, C]
        x = self.proj_in(self.mar.encode(latents.flatten(1, 2), tuple(latents.shape[1:3])))               # [B, E+N, D]
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * self.config.grad_scale)
        return x.roll(-self.config.buffer_size, dims=1)

    def _hidden_states(self, embeddings, rows):
        """The language model's last hidden states where they are read: embeddings [B, T, D], rows [B, R] -> [B, R, D].
        Attention is causal and padding stands at the end (section 4), where nothing sees it: no mask. The last layer
        needs keys and values of all places, but queries and its MLP only where it is read: some 200 of 1320."""
        llm, last, x = self.llm.model, self.llm.model.layers[-1], embeddings
        rope = llm.rotary_emb(x, torch.arange(x.shape[1], device=x.device)[None])
        for layer in llm.layers[:-1]:
            x = layer(x, attention_mask=None, position_embeddings=rope)
        attention, normed = last.self_attn, last.input_layernorm(x)                                         # [B, T, D]
        cos, sin = rope                                                                                # [1, T, D/heads]
        q, k, v = (y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in (    # [B, (kv) heads, ., D/heads]
            attention.q_proj(take(normed, rows)), attention.k_proj(normed), attention.v_proj(normed)))
        q = q * cos[0][rows][:, None] + rotate_half(q) * sin[0][rows][:, None]
        k = k * cos + rotate_half(k) * sin
        earlier = torch.arange(x.shape[1], device=x.device) <= rows[..., None]                              # [B, R, T]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=earlier[:, None], enable_gqa=True)
        x = take(x, rows) + attention.o_proj(seen.transpose(1, 2).flatten(2))
        return llm.norm(x + last.mlp(last.post_attention_layernorm(x)))

    # ==== 3. Loading and saving (what reads files, sizes and names stands below the class) ============

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """A model in eval mode with its tokenizer. source: a name in RELEASED, a hub repository or folder (:FILE where
        there are several), a file, or "tiny". quantize: None or "int8", before anything is on the device. Weights are
        .pth, .bin or .safetensors, whole or in shards. What is not there is fetched: kl16.ckpt, unless the weights hold
        `vae.*`; Qwen2.5's tokenizer. InputError: no fit."""
        if source == "tiny":
            source = common.tiny_folder("harmon")
        path = common.find_checkpoint(
            str(source), RELEASED | RECA, WEIGHT_FILES, ["kl16.ckpt", *SMALL_FILES], NEEDED
        )
        folder, state = path.parent, dict(common.load_state(path))
        vae = {key[4:]: state.pop(key) for key in list(state) if key.startswith("vae.")}
        if not vae:
            home = folder if (folder / "kl16.ckpt").is_file() else common.hub_folder("wusize/harmon", ["kl16.ckpt"])
            vae = common.load_state(home / "kl16.ckpt")
        model = cls.from_states(read_config(folder, state), state, vae, str(path))
        if (folder / "tokenizer_config.json").is_file():
            model.tokenizer = common.load_tokenizer(folder)
        elif model.config.llm_width in TOKENIZERS:          # other sizes do without: they take ids only
            model.tokenizer = common.load_tokenizer(common.hub_folder(TOKENIZERS[model.config.llm_width], SMALL_FILES))
        return common.quantize(model, quantize).to(device, dtype).eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """Random weights at a size in CONFIGS, made on the device, and a stand-in tokenizer: for tiny and --bench."""
        if name not in CONFIGS:
            raise InputError(f"no such size: {name} (there are {', '.join(CONFIGS)})")
        tokenizer, config = common.tiny_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]), CONFIGS[name]
        with torch.device(device):
            model = cls(replace(config, vocab_size=len(tokenizer)) if name == "tiny" else replace(config)).to(device)
        model.tokenizer = tokenizer
        return model.eval()

    def save_pretrained(self, folder):
        """Writes harmon_*.pth and kl16.ckpt, which the original's loaders accept, a config.json and the tokenizer."""
        folder, name = Path(folder), f"{self.config.name}.pth"
        vae = {"model": common.autoencoder_to_original(self.vae)}
        for file, state in ((name, self.released_state()), ("kl16.ckpt", vae)):
            with common.atomic(folder / file) as path, open(path, "wb") as stream:
                torch.save(state, stream)                   # to a path, torch would store that path, too
        common.write(folder / "config.json", {"reca_harmon": asdict(self.config)})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_states(cls, config, state, vae, name="checkpoint"):
        """A model from the dicts of harmon_*.pth and kl16.ckpt. Strict: InputError names the keys that do not fit."""
        with torch.device("meta"):                          # no time for random weights
            model = cls(config)
        model.to_empty(device="cpu").llm.tie_weights()
        embedding = state.get("llm.model.embed_tokens.weight")
        if embedding is not None:                           # the tied head may be listed or not
            if not torch.equal(state.get("llm.lm_head.weight", embedding), embedding):
                raise InputError(f"{name}: llm.lm_head.weight is tied to llm.model.embed_tokens.weight, but differs")
            state = {**state, "llm.lm_head.weight": embedding}
        vae = {key: value for key, value in vae.items()     # kl16.ckpt may hold more than the VAE
               if key.startswith(("encoder.", "decoder.", "quant_", "post_quant_"))}
        common.load_strictly(model.vae, common.autoencoder_from_original(model.vae, vae), f"the VAE of {name}")
        common.load_strictly(nn.ModuleDict({k: m for k, m in model.named_children() if k != "vae"}), state, name)
        return model

    def released_state(self):
        """The flat dict of a released harmon_*.pth: everything but the VAE, the tied head listed."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("vae.")}

    # ==== 4. The embedding-conditioned prompt =========================================================
    # The heart of RecA: the model's own embeddings of an image stand where a caption would, in the chat template in
    # which it learned to describe images, and the image that is to come follows.
    #   <|im_start|>user \n\n [image, buffer] Describe the image in detail.<|im_end|> \n
    #   <|im_start|>assistant \n [visible tokens, buffer]

    def recon_prompt(self, template=None):
        """The ids of RecA's prompt, with the marker. Two newlines before the image (one id for Qwen) are an accident of
        the original, it seems (its other prompts have one), but the released models were trained so. None, for a tenth
        of the images: "unconditional" for the original, which yet leaves the image in."""
        if template is None:
            return self._tokens(USER) + [IMAGE_MARKER] + self._tokens("Generate an image." + END)
        return (
            self._tokens(USER + "\n")
            + [IMAGE_MARKER]
            + self._tokens(common.plain(template, MARKERS) + END)
        )[:128]

    def t2i_prompt(self, caption=None):
        """Text to image; without a caption, what guidance moves away from."""
        caption = caption and common.plain(caption, MARKERS).strip()
        text = "Generate an image." if caption is None else f"Generate an image: {caption}"
        return self._tokens(USER + text + END)[:1024]

    def i2t_prompt(self, question):
        """The first turn of a conversation: the image, a newline, the question."""
        return (
            self._tokens(USER)
            + [IMAGE_MARKER]
            + self._tokens("\n" + common.plain(question, MARKERS) + END)
        )

    def conversation(self, turns):
        """[(question, answer), ...] -> ids and labels, 1472 at most. Labels: the answers, each with its turn's end."""
        ids, labels = [], []
        for i, (question, answer) in enumerate(turns):
            asked = (
                self._tokens(USER + common.plain(question, MARKERS) + END)
                if i
                else self.i2t_prompt(question)
            )
            answered = self._tokens(common.plain(answer, MARKERS) + "<|im_end|>")
            between = self._tokens("\n")
            ids += asked + answered + between
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(between)
        return ids[:1472], labels[:1472]

    def _tokens(self, text):
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: put the files of Qwen2.5's tokenizer into its folder")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _pad(self, rows, value=0):
        """Lists of ids -> ids and mask [B, L], padded on the right, on the CPU: _assemble reads them there."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
        return ids, torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

    def _assemble(self, ids, mask, image=None, generated=None):
        """Prompts ids, mask [B, L], image embeddings [B, K, D] in place of their IMAGE_MARKERs, and generated tokens
        [B, G, D] -> embeddings [B, T, D], length [B] without the padding, places [B, L] of the ids in the sequence
        (these two on the CPU).
        The original has the padding between prompt and generated tokens, masks it, and lets positions skip it. Here it
        is at the end of the row, to the same effect: positions are plainly 0, 1, 2 ..., and there is no mask."""
        text = self.llm.model.embed_tokens(common.to_device(ids.clamp(min=0), self.device))               # [B, L, D]
        for other in (image, generated):
            if other is not None:       # joined as float32, words would keep the language model's rows in float32
                text = text.to(other.dtype)
        marker, rows, K = ids == IMAGE_MARKER, [], 1 if image is None else image.shape[1]
        for i, (end, k) in enumerate(zip(mask.sum(1).tolist(), marker.int().argmax(1).tolist())):
            row = [text[i, :end]] if image is None else [text[i, :k], image[i], text[i, k + 1:end]]
            rows.append(torch.cat(row if generated is None else [*row, generated[i]]))
        places = torch.arange(ids.shape[1], device=ids.device) + (marker.cumsum(1) - marker.long()) * (K - 1)
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]), places

    # ==== 5. The losses ===============================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA: the image from its own understanding embeddings (paper, equation 2).

        features: B dicts of encode, templates: B instructions -> scalar, the mean over the masked
        tokens. draws: see draw.
        """
        draws = draws or self.draw("recon", features, rng)
        rows = [self.recon_prompt(None if drop else text)
                for drop, text in zip(draws["drop"].tolist(), templates)]
        return self._generation_loss(features, *self._pad(rows), draws, self.understand(features))

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image, otherwise as recon_loss: for supervised fine-tuning; in RecA itself
        lambda_t2i = 0. A tenth of the captions is dropped, to train what guidance moves away from."""
        draws = draws or self.draw("t2i", features, rng)
        rows = [self.t2i_prompt(None if drop else text)
                for drop, text in zip(draws["drop"].tolist(), captions)]
        return self._generation_loss(features, *self._pad(rows), draws)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text, which keeps understanding alive: cross-entropy of the answers in B
        conversations, lists of (question, answer), about an image each -> scalar, the mean over all
        answer tokens. Nothing is drawn."""
        ids, labels = zip(*(self.conversation(turns) for turns in conversations))
        return self._answer_loss(features, *self._pad(ids), self._pad(labels, IGNORED)[0])

    def draw(self, task, features, rng=None):
        """All random draws of recon_loss or t2i_loss. But for num_masked, which all images of a step
        share, an image's do not depend on its batch."""
        if task == "i2t":
            return {}
        rng = rng or Rng.fresh(len(features))
        h, w, C = features[0]["latents"].shape
        repeats = self.config.diffusion_repeats
        # The ratio of masked tokens: normal(1, 0.25) in [0.7, 1], one for the batch, so that all images have equal V.
        ratio = torch.empty((), dtype=torch.float64)
        nn.init.trunc_normal_(ratio, 1.0, 0.25, LEAST_MASKED, 1.0, generator=rng.batch)
        drop = rng.uniform() < 0.1                              # [B] leave the text out?
        orders = rng.permutation(h * w)                         # [B, N] places in random order, the masked ones first
        # Of every token and repeat, in the order repeat, image, token:
        t = rng.integers(1000, repeats, h * w).transpose(0, 1).flatten()                    # [4*B*N] timesteps
        noise = rng.normal(repeats, h * w, C).transpose(0, 1).flatten(0, 2)                 # [4*B*N, C]
        number = (h * w * ratio).ceil().long()
        return {"drop": drop, "orders": orders, "num_masked": number, "t": t, "noise": noise}

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: masked tokens, or tokens of answers."""
        if task == "i2t":
            labels = [label for turns in texts for label in self.conversation(turns)[1]]
            return sum(label != IGNORED for label in labels)
        return len(features) * int(draws["num_masked"].flatten()[0])

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: most tokens are
        visible to the language model where fewest are masked, and a conversation is cut at 1472."""
        size = self.config.image_size
        samples = [{"pixels": torch.zeros(3, size, size, dtype=torch.uint8)}] * count
        tokens = (size // self.stride) ** 2
        if task == "i2t":
            return samples, [[("Describe the image.", "word " * 1500)]] * count, {}
        longest = max(common.templates(), key=len) if task == "recon" else "word " * 200
        return samples, [longest] * count, {"num_masked": torch.tensor(math.ceil(LEAST_MASKED * tokens))}

    def _generation_loss(self, features, ids, mask, draws, image=None):
        """The masked part of the images, given the visible part and prompts. image [B, K, D] or None: see _assemble."""
        latents = torch.stack([f["latents"] for f in features])
        B, h, w, C = latents.shape
        N, E, repeats = h * w, self.config.buffer_size, self.config.diffusion_repeats
        M = int(draws["num_masked"].flatten()[0])
        latents = latents.view(B, N, C)

        # Which tokens are hidden; only these are noised. (The original multiplies the others' loss by zero.)
        masked = draws["orders"][:, :M].sort(dim=1).values                                  # [B, M] in raster order
        visible = draws["orders"][:, M:].sort(dim=1).values                                 # [B, V]
        t = draws["t"].view(repeats, B, N).gather(2, masked.expand(repeats, B, M))          # [4, B, M]
        noise = take(draws["noise"].view(repeats * B, N, C), masked.repeat(repeats, 1))     # [4*B, M, C]
        masked, visible, t, noise = common.to_device([masked, visible, t, noise], self.device)

        # The visible tokens behind the prompt, through the language model.
        u = self.mar.encode(latents, (h, w), visible)                                       # [B, E+V, De]
        generated = self.proj_in(u).roll(-E, dims=1)                                        # [B, G = V+E, D], buffer last
        embeddings, length, _ = self._assemble(ids, mask, image, generated)
        rows = length[:, None] + torch.arange(-generated.shape[1], 0)                       # [B, G] the last ones
        hidden = self._hidden_states(embeddings, common.to_device(rows, self.device))
        hidden = hidden.roll(E, dims=1)                                                     # buffer first again

        # MAR's decoder fills the hidden places, and the diffusion head is asked which noise is in them.
        z = self.mar.decode(u + self.proj_out(hidden), (h, w), visible)                     # [B, N, Dd]
        x_0 = take(latents, masked).flatten(0, 1)                                           # [B*M, C]
        z = take(z, masked).flatten(0, 1)                                                   # [B*M, Dd]
        total = 0
        for t, noise in zip(t.flatten(1), noise.view(repeats, B * M, C)):
            mse, vb = diffusion_terms(self.mar.diffloss["net"], x_0, z, t, noise)           # [B*M] each
            total = total + (mse + vb).sum()
        return common.mean(total, repeats * B * M)

    def _answer_loss(self, features, ids, mask, labels):
        embeddings, _, places = self._assemble(ids, mask, self.understand(features))
        # A label is predicted one place before its own. Images with fewer labels than R are filled up with -1.
        wanted = (labels != IGNORED) & mask
        rows = pad_sequence([place[w] - 1 for place, w in zip(places, wanted)], True, -1)   # [B, R]
        # Found on the CPU: the device would have to stop and say how many there are.
        read = (rows >= 0).flatten().nonzero()[:, 0]                                        # [labels] of B*R
        labels = labels[wanted]
        count = len(labels)
        rows, read, labels = common.to_device([rows.clamp(min=0), read, labels], self.device)
        hidden = self._hidden_states(embeddings, rows).flatten(0, 1)[read]                  # [labels, D]

        return common.mean(common.cross_entropy_sum(self.llm.lm_head, hidden, labels, LABELS_AT_ONCE), count)

    # ==== 6. Inference ================================================================================

    @torch.no_grad()
    def generate(self, prompts, **settings):
        """Text to image: prompts -> PIL images, in one batch.
        seed      one for each image, or a number s: image i has seed s + i. An image does not depend on its batch
        draws     all random draws, for a replay: see _sample
        settings  num_steps=64, guidance_scale=3 (1: none), guidance_schedule ("linear"), temperature, progress"""
        prompts = self._assemble(*self._pad([self.t2i_prompt(prompt) for prompt in prompts]))
        return self._paint_images(prompts, **settings)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, **settings):
        """Image to image, as generate: PIL images -> PIL images painted from nothing but their understanding."""
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        rows = [self.recon_prompt(template) for template in templates or [common.SEED_TEMPLATE] * len(images)]
        return self._paint_images(self._assemble(*self._pad(rows), self.understand(features)), **settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, greedy: PIL images and one question -> answers."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        ids, mask = self._pad([self.i2t_prompt(question)] * len(images))
        embeddings = self._assemble(ids, mask, self.understand(features))[0]                               # [B, T, D]
        end = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        answers = self.llm.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(embeddings[..., 0], dtype=torch.long),
            use_cache=True, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end[0])
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _paint_images(self, prompts, **settings):
        """What _assemble gave for B prompts -> B PIL images. Guidance moves away from "Generate an image." alone."""
        unconditional = self._assemble(*self._pad([self.t2i_prompt()] * len(prompts[0])))
        latents = self._sample([prompts[:2], unconditional[:2]], **settings)
        return [common.to_pil(pixels) for pixels in self._pixels(latents)]

    def _sample(self, branches, num_steps=None, guidance_scale=None, guidance_schedule="constant", temperature=1.0,
               seed=0, draws=None, progress=False):
        """MAR's sampler: branches [(embeddings [n, T, D], length [n])] of n prompts and of n unconditional ones ->
        latents [n, h, w, C]. Every step predicts a condition for all places from what is there, and the diffusion head
        paints the next tokens of a random order, few at first. draws: "orders" [n, N], "iter{k}.init_noise" [n*P, C],
        "iter{k}.step_noise" [diffusion steps, n*P, C], noisiest first. Further rows are ignored."""
        c, num_steps = self.config, num_steps or self.config.num_steps
        guidance_scale = c.guidance_scale if guidance_scale is None else guidance_scale
        branches = branches[:1] if guidance_scale == 1 else branches
        B, grid = len(branches), (c.image_size // self.stride,) * 2
        n, N, E = len(branches[0][1]), grid[0] * grid[1], c.buffer_size
        rng = Rng.sampling(seed, n)
        orders = (rng.permutation(N) if draws is None else draws["orders"][:n]).to(self.device)
        # Keys and values of the prompts, once. Here padding stays between a prompt and its tokens, since a cache has
        # one length: the tokens are masked from it, and count their positions from their prompt's own end.
        prompts = pad_sequence([row for rows, _ in branches for row in rows], batch_first=True)
        length = torch.cat([length for _, length in branches])[:, None].to(self.device)                     # [B*n, 1]
        in_prompt = torch.arange(prompts.shape[1], device=self.device) < length                             # [B*n, T]
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(inputs_embeds=prompts, past_key_values=cache, use_cache=True)
        latents, left = torch.zeros(n, N, c.latent_channels, device=self.device), N
        for k, planned in enumerate(tqdm(masked_after(N, num_steps), disable=not progress, leave=False)):
            following = 0 if k == num_steps - 1 else planned                                # the last paints the rest
            if following == left:                                   # more steps than tokens: this one has nothing to do
                continue
            visible = orders[:, left:].sort(dim=1).values                                                   # [n, V]
            now = orders[:, following:left].sort(dim=1).values                               # [n, P = left - following]
            left, P = following, now.shape[1]
            u = self.mar.encode(latents, grid, visible)                           # [n, E+V, De], once for both branches
            generated = self.proj_in(u).roll(-E, dims=1).repeat(B, 1, 1)                                 # [B*n, E+V, D]
            G = generated.shape[1]
            hidden = self.llm.model(
                inputs_embeds=generated, past_key_values=cache, use_cache=True,
                attention_mask=F.pad(in_prompt, (0, G), value=True),
                position_ids=length + torch.arange(G, device=self.device)).last_hidden_state.roll(E, dims=1)
            cache.crop(-G)                                              # forget the tokens, keep the prompt
            z = self.mar.decode(u.repeat(B, 1, 1) + self.proj_out(hidden), grid, visible.repeat(B, 1))
            z = take(z, now.repeat(B, 1)).flatten(0, 1)                                                    # [B*n*P, Dd]
            if draws is None:
                noise = rng.normal(1 + c.diffusion_steps, P, c.latent_channels).transpose(0, 1).flatten(1, 2)
            else:
                noise = torch.cat([draws[f"iter{k}.init_noise"][None, :n * P], draws[f"iter{k}.step_noise"][:, :n * P]])
            scale = 1 + (guidance_scale - 1) * (N - planned) / N if guidance_schedule == "linear" else guidance_scale
            painted = self._denoise(z, scale, temperature, noise.to(self.device))
            latents.scatter_(1, now[..., None].expand(-1, -1, c.latent_channels), painted.view(n, P, -1))
        return latents.unflatten(1, grid)

    def _denoise(self, z, guidance_scale, temperature, noises):
        """The diffusion head's sampler: z [rows or 2 rows, Dd], with guidance the unguided rows last, and noises
        [1 + steps, rows, C] -> [rows, C]. Guidance acts on the predicted noise; the variance is the guided branch's."""
        (rows, C), x = noises.shape[1:], noises[0].float()
        tables = diffusion_schedule(len(noises) - 1, x.device)
        for j in reversed(range(len(noises) - 1)):
            out = self.mar.diffloss["net"](x.repeat(len(z) // rows, 1), tables["original"][j:j + 1], z).float()
            noise, v = out[:rows].chunk(2, dim=-1)
            if len(z) > rows:
                noise = out[rows:, :C] + guidance_scale * (noise - out[rows:, :C])
            at = {name: table[j] for name, table in tables.items()}
            x, log_var = denoising_step(at, x, noise, v, self.config.clip_latents or math.inf)
            if j > 0:
                x = x + temperature * (0.5 * log_var).exp() * noises[-1 - j]
        return x

# ==== 3, continued: files, sizes, names ===============================================================

WEIGHT_FILES = [["*.index.json"], ["*.pth"], ["*.safetensors"], ["*.bin"]]                     # in this order
NEEDED = ("proj_in.0.weight", "mar.fake_latent")  # what only Harmon's has
SMALL_FILES = ["config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
TOKENIZERS = {1536: "Qwen/Qwen2.5-1.5B-Instruct", 896: "Qwen/Qwen2.5-0.5B-Instruct"}        # by width

def read_config(folder, state):
    """The sizes: from a config.json of ours, else from two widths. (Numbers of heads leave no trace in shapes.)"""
    path = folder / "config.json"
    settings = common.read_object(path).get("reca_harmon") if path.is_file() else None
    if settings:
        try:
            return HarmonConfig(**settings)
        except TypeError as error:
            raise InputError(f"{path}: {error}") from error
    widths = [state[key].shape[1] if key in state else None for key in ("proj_in.2.weight", "mar.fake_latent")]
    for config in CONFIGS.values():
        if widths == [config.llm_width, config.encoder_width] and config.name != "harmon_tiny":
            return config
    raise InputError(f"{folder} is no released Harmon (widths {widths}) and has no config.json with its sizes")

# ==== 7. main() =======================================================================================

def prepare(model, args):
    """Called before training. The frozen VAE takes the working precision once: autocast would cast its float32 weights
    anew in every step (it remembers only those that are trained)."""
    if args.precision == "bf16" and model.device.type == "cuda":
        model.vae.to(torch.bfloat16)
    return {}

def main():
    common.run(Harmon, common.parse_args(__doc__, RECIPES, DEFAULT), prepare)

if __name__ == "__main__":
    common.cli(main)
