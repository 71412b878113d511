"""RecA for BAGEL: a mixture of transformers with rectified flow (Qwen2.5-7B x 2 experts + SigLIP NaViT + FLUX VAE).

One decoder carries two complete sets of weights: text and ViT tokens go through the *understanding* expert, image
latents through the *generation* expert; only attention is joint. RecA gives the generation expert what understanding
says about a picture, and asks for the picture back. It trains 6.5 of 14.6 billion parameters: ViT, VAE and the
understanding expert are frozen. Paper: section 4, Table 8 (column BAGEL).

    photo -- resize to 224 --> SigLIP ViT -> [B, M, 1152] -> connector -> [B, M, D] --.
                                                                                      +-> understanding expert, no graph
    "Describe the image in detail." -> ids --------------------------> [B, L, D] ------'      |
                                                                                              | keys and values
    photo -- 512 to 1024 px --> FLUX VAE -> z [B, h, w, 64]                                   v of the context
                                            x_t = (1 - t) z + t noise -> [B, N, D] -> generation expert, trained
                                                                                              |
                                            squared error against noise - z  <-- velocity [B, h, w, 64]

A step gives the original's numbers with less work:
  * The context never sees the noise: it runs once, without a graph, and is kept as keys and values, as for sampling.
    The two markers around the latents do see them; they run beside them, in every layer, without a graph.
  * Rows are sorted once into [understanding | generation], so an expert is a call on a slice (the original scatters and
    gathers ten times a layer); images are sorted into groups of equal shape, so attention is one dense call a group.
  * The noisy block has one rotary position, and attention knows only differences of positions. Counted from there, its
    rows need no rotation: only the (few) keys of the context are turned, once.

    python reca_bagel.py --data ./images                         RecA on BAGEL-7B-MoT, one 80 GB GPU
    torchrun --nproc-per-node 8 reca_bagel.py --data ./images    sharded over 8 GPUs (FSDP2)
    python reca_bagel.py --model tiny                            a toy BAGEL on coloured shapes, CPU, minutes
    python reca_bagel.py --model sanaka87/BAGEL-RecA --steps 0 --edit singleturn.json --edit-images DIR --out edits

Legend: B images (of a group of equal shapes), D width of the decoder, H query heads, K key/value heads, d size of one,
M ViT patches, L text ids, h w sides and N = h w number of an image's latent tokens, C = 64 channels of one, R rows of a
packed pass, S keys that are seen.
"""
import shutil
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Qwen2Config, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import common
from common import InputError, Rng

# ==== 1. Sizes and hyper-parameters ===================================================================

LLM = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
           num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6)                                       # Qwen2.5-7B
VIT = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=980,
           patch_size=14)      # SigLIP so400m/14 at 980 px; of the 27 layers the original builds and stores one less

@dataclass
class BagelConfig:
    """Sizes of BAGEL-7B-MoT (the defaults). Names follow the released json files where those have a name."""
    llm: dict = field(default_factory=LLM.copy)             # what counts in llm_config.json
    vit: dict = field(default_factory=VIT.copy)             # and in vit_config.json
    vit_max_num_patch_per_side: int = 70
    latent_patch_size: int = 2
    max_latent_size: int = 64           # the original's flag defaults to 32, which does not fit the release
    vae_ch: int = 128                   # the FLUX.1 autoencoder: no file of the release holds these
    vae_ch_mult: tuple = (1, 2, 4, 4)
    vae_num_res_blocks: int = 2
    vae_z_channels: int = 16
    vae_scale_factor: float = 0.3611
    vae_shift_factor: float = 0.1159
    vae_limits: tuple = (1024, 512)     # how images are resized: (longest side, shortest side)
    vit_limits: tuple = (980, 224)      # when somebody asks about an image; RecA uses und_size for both
    edit_limits: tuple = (980, 378)     # when an image is edited, as in the original's ImgEdit script
    image_size: int = 1024              # side of what is painted from a prompt
    bos_token_id: int = 151644          # before and after every text block; ids are taken from the tokenizer (MARKERS)
    eos_token_id: int = 151645
    start_of_image: int = 151652        # before and after every image block
    end_of_image: int = 151653

    head_dim = property(lambda self: self.llm["hidden_size"] // self.llm["num_attention_heads"])
    # Pixels per latent token and side (16 in the release), and C, values of a latent token (2 * 2 * 16).
    stride = property(lambda self: 2 ** (len(self.vae_ch_mult) - 1) * self.latent_patch_size)
    latent_dim = property(lambda self: self.latent_patch_size ** 2 * self.vae_z_channels)

TINY = BagelConfig(
    LLM | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
               num_key_value_heads=2),
    VIT | dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, image_size=32,
               patch_size=8),
    vit_max_num_patch_per_side=4, max_latent_size=4,
    vae_ch=32, vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1, vae_z_channels=8,
    vae_limits=(64, 64), vit_limits=(32, 32), edit_limits=(32, 32), image_size=64)
DEFAULT = "ByteDance-Seed/BAGEL-7B-MoT"
RECA = {"bagel-reca": "sanaka87/BAGEL-RecA"}              # what the authors' RecA has made of it
CONFIGS = {DEFAULT: BagelConfig(), "bagel-reca": BagelConfig(), "tiny": TINY}

@dataclass
class Recipe:
    """Table 8 of the paper: 1000 updates of 48 images. The public run has 6 GPUs with packs of about 8 images of 1024 px,
    and *all of its updates are warm-up*: the learning rate reaches 4e-5 at the last one (the very first has 0 there,
    4e-8 here). The original's average of the weights (EMA 0.9999), which it advises against using (90% of it is still
    the old model), does not exist here."""
    lr: float = 4e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 1000
    horizon: int = 0                    # constant after the warm-up
    steps: int = 1000
    batch: int = 48
    accum: int = 1
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0             # the understanding expert is frozen: there is nothing to hold on to
    lambda_t2i: float = 0.0
    batch_images: int = 8               # of inference, at 1024 px and with guidance

RECIPES = {DEFAULT: Recipe(), "tiny": Recipe(lr=2e-3, eps=1e-8, warmup=20, steps=300, batch=32, accum=1)}
RECIPES |= {name: RECIPES[DEFAULT] for name in RECA}
IGNORED = -100                          # a label that is not predicted
UND_SIZE = 224                          # the smallest side that the paper's recipe gives the ViT
TEXT_DROP = 0.1                         # the template is left out for one image in ten; the picture never is

# How the original samples. num_steps 50 makes 49 evaluations; guidance (see guide) acts where t is in the interval.
GENERATE = {"num_steps": 50, "timestep_shift": 3.0, "guidance_scale": 4.0, "image_guidance_scale": 1.0,
            "interval": (0.4, 1.0), "renorm": "global", "renorm_min": 0.0}         # notebook; GenEval: interval (0, 1)
EDIT = GENERATE | {"image_guidance_scale": 2.0, "interval": (0.0, 1.0), "renorm": "text_channel"}     # ImgEdit script
RECONSTRUCT = EDIT | {"renorm_min": 1.0}                                           # notebook: no renormalisation

# ==== 2. The model ====================================================================================

class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the rows' precision: bf16 rows stay bf16 beside float32 master weights."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

def rotary(positions, config):
    """positions [R] (integers, also negative) -> cos, sin [R, 1, d] in float32 (the original's frequencies are bf16
    under FSDP, which blurs far positions; nothing depends on that)."""
    frequencies = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim       # [d / 2]
    angles = positions[:, None, None].float() * (config.llm["rope_theta"] ** -frequencies).repeat(2)
    return angles.cos(), angles.sin()

def turn(x, cos, sin):
    """Rotary embedding, halves rotated: x [..., heads, d], cos and sin broadcast to it."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

def attend(q, k, v, causal):
    """Dense attention of one group: q [B, n, H, d], k and v [B, S, K, d] -> [B * n, H * d]. causal: query i of n sees
    all keys but the last n - 1 - i. Otherwise everybody sees everything, and no mask exists."""
    mask, n, s = None, q.shape[1], k.shape[1]
    if causal and n > 1:
        mask = torch.ones(n, s, dtype=torch.bool, device=q.device).tril(s - n)
    q, k, v = (x.transpose(1, 2).to(q.dtype) for x in (q, k, v))           # the experts may be of different precisions
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2).flatten(0, 1)

def split(rows, shapes, kind):
    """The rows of all images [R, ...] -> per group [B, n, ...] (kind 1: und rows) or [B, N, ...] (kind 2: gen rows)."""
    parts = rows.split([shape[0] * shape[kind] for shape in shapes])
    return [part.unflatten(0, (shape[0], shape[kind])) for part, shape in zip(parts, shapes)]

class MoTLayer(nn.Module):
    """A Qwen2 decoder layer with two experts. Suffix "": understanding, "_moe_gen": generation, as in the checkpoint.
    (transformers has no layer with a second set of weights, nor one with q/k norms together with q, k, v biases.)"""

    def __init__(self, c):
        super().__init__()
        width, d, eps, attention = c.llm["hidden_size"], c.head_dim, c.llm["rms_norm_eps"], {}
        heads, kv_heads = c.llm["num_attention_heads"], c.llm["num_key_value_heads"]
        mlp = Qwen2Config(hidden_size=width, intermediate_size=c.llm["intermediate_size"])
        self.head_dim = d
        for e in ("", "_moe_gen"):
            for name, count in zip("qkv", (heads, kv_heads, kv_heads)):
                attention[f"{name}_proj{e}"] = nn.Linear(width, count * d)
            attention |= {f"{name}_norm{e}": RMSNorm(d, eps) for name in "qk"}
            attention[f"o_proj{e}"] = nn.Linear(heads * d, width, bias=False)
            self.add_module(f"input_layernorm{e}", RMSNorm(width, eps))
            self.add_module(f"post_attention_layernorm{e}", RMSNorm(width, eps))
            self.add_module(f"mlp{e}", Qwen2MLP(mlp))
        self.self_attn = nn.ModuleDict(attention)

    def project(self, rows, e, rope):
        """rows [R, D] -> q [R, H, d], k and v [R, K, d]. The norm comes before the rotation."""
        x = getattr(self, f"input_layernorm{e}")(rows)
        q, k, v = (self.self_attn[f"{name}_proj{e}"](x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        q, k = self.self_attn[f"q_norm{e}"](q), self.self_attn[f"k_norm{e}"](k)
        return (turn(q, *rope), turn(k, *rope), v) if rope else (q, k, v)

    def finish(self, rows, heard, e):
        """What an expert does with what its rows heard: rows [R, D], heard [R, H * d] -> [R, D]. The backward computes
        silu(gate) and silu(gate) * up again: two cheap passes for two fifths of all activations."""
        rows, mlp = rows + self.self_attn[f"o_proj{e}"](heard), getattr(self, f"mlp{e}")
        x = getattr(self, f"post_attention_layernorm{e}")(rows)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)

        def down(gate, up):
            return mlp.down_proj(F.silu(gate) * up)
        return rows + (checkpoint(down, gate, up, use_reentrant=False) if gate.requires_grad else down(gate, up))

    def forward(self, und, gen, past, shapes, ropes=(None, None), causal=False, read=("und", "gen")):
        """One block of every image through this layer -> und, gen, and per group the keys and values that were seen.
        und [R, D], gen [R', D] or None: rows of the experts, image after image; past: per group (keys, values) [B, S,
        K, d] of what its images said before, or None; shapes: (B, n, N) of each group, n und rows and N gen rows an
        image; ropes: (cos, sin) for und and gen, None at position 0; read: the rows that the next layer or the caller
        needs. A frozen understanding expert has no graph (the original detaches its q, k, v, attention and MLP output
        in every layer): the markers' residual stream is a constant that follows the latents' values."""
        und_graph = torch.is_grad_enabled() and self.input_layernorm.weight.requires_grad
        with torch.set_grad_enabled(und_graph):
            q_und, k_und, v_und = (split(x, shapes, 1) for x in self.project(und, "", ropes[0]))
        if gen is not None:
            q_gen, k_gen, v_gen = (split(x, shapes, 2) for x in self.project(gen, "_moe_gen", ropes[1]))
        seen = []                                                           # per group: keys and values [B, S, K, d]
        for i, before in enumerate(past):
            # In an image block the order (start, end, latents) does not matter: no mask, one position for all.
            parts = [before, (k_und[i], v_und[i]), (k_gen[i], v_gen[i]) if gen is not None else None]
            keys, values = zip(*(part for part in parts if part is not None))
            seen.append((torch.cat(keys, dim=1), torch.cat(values, dim=1)))
        if "und" in read:
            with torch.set_grad_enabled(und_graph):
                heard = [attend(q, keys, values, causal) for q, (keys, values) in zip(q_und, seen)]
                und = self.finish(und, torch.cat(heard), "")
        if gen is not None and "gen" in read:
            heard = [attend(q, keys, values, False) for q, (keys, values) in zip(q_gen, seen)]
            gen = self.finish(gen, torch.cat(heard), "_moe_gen")
        return und, gen, seen

class PositionTable(nn.Module):
    """The fixed sine-cosine table [side * side, D]: half of the channels say the column, half the row; sines, then
    cosines. Computed in double precision, as in the original: both drop the table that the files hold."""

    def __init__(self, side, width):
        super().__init__()
        self.side = side
        table = get_2d_sincos_pos_embed(width, side, base_size=side, device=torch.device("cpu"))  # base_size: unscaled
        self.register_buffer("pos_embed", table.float(), persistent=False)

    def forward(self, height, width):
        """-> [height * width, D], row-major. No interpolation: a small image uses the top left corner of the table."""
        if max(height, width) > self.side:
            raise InputError(f"{height} x {width} tokens exceed the table of side {self.side}: use smaller images")
        return self.pos_embed.view(self.side, self.side, -1)[:height, :width].flatten(0, 1)

@dataclass
class Context:
    """What a group of images of equal shape has said so far."""
    images: list                        # their places in the batch
    kept: list                          # keys and values [B, S, K, d] of each layer; None before the first block
    position: int = 0                   # the next free rotary position: an image takes one, a text one a token

    def stack(self, values):
        """The group's entries of a list with one tensor an image -> [B, ...]."""
        return torch.stack([values[i] for i in self.images])

    def seen_from_the_latents(self, config, shift=0):
        """A copy for the noisy block: keys turned back by `position`, so that it stands at 0. shift: of the places."""
        kept = self.kept
        if self.position:
            rope = rotary(torch.full((1,), -self.position, device=kept[0][0].device), config)
            kept = [(turn(keys, *rope), values) for keys, values in kept]
        return Context([i + shift for i in self.images], kept)

def alike(keys):
    """Places of equal keys, in lists: what has one shape is computed as one dense tensor."""
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]

class Bagel(nn.Module):
    """BAGEL, named as in ema.safetensors, whose 1223 keys are state_dict() without `vae.`, and the two tables."""

    condition = "vit"   # what RecA conditions on; "vae" is the paper's Table 7 (set for the whole class by --condition)
    # Where ids, patches or latents enter and leave: few numbers, on which all others depend.
    unquantized = ("vae.", "vae2llm", "llm2vae", "language_model.lm_head", "vit_model.vision_model.embeddings.")

    def __init__(self, config=BagelConfig()):
        super().__init__()
        c, width, eps = config, config.llm["hidden_size"], config.llm["rms_norm_eps"]
        self.config, self.tokenizer, self.und_blur, self.und_size = c, None, 0, min(UND_SIZE, c.vit_limits[0])
        self.language_model = nn.ModuleDict({
            "model": nn.ModuleDict({
                "embed_tokens": nn.Embedding(c.llm["vocab_size"], width),
                "layers": nn.ModuleList(MoTLayer(c) for _ in range(c.llm["num_hidden_layers"])),
                "norm": RMSNorm(width, eps), "norm_moe_gen": RMSNorm(width, eps)}),
            "lm_head": nn.Linear(width, c.llm["vocab_size"], bias=False)})
        # SigLIP 2 has the modules of this ViT: the patch embedding is a Linear, a patch flattened as (row, column,
        # channel). Only its forward differs, which stretches the positions to an image: see _vit.
        self.vit_model = nn.ModuleDict({"vision_model": Siglip2VisionModel(Siglip2VisionConfig(**c.vit | {
            "num_hidden_layers": c.vit["num_hidden_layers"] - 1, "num_patches": c.vit_max_num_patch_per_side ** 2,
            "vision_use_head": False}))})
        self.connector = nn.ModuleDict({"fc1": nn.Linear(c.vit["hidden_size"], width), "fc2": nn.Linear(width, width)})
        self.vit_pos_embed = PositionTable(c.vit_max_num_patch_per_side, width)
        self.time_embedder = nn.ModuleDict({
            "mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.vae2llm, self.llm2vae = nn.Linear(c.latent_dim, width), nn.Linear(width, c.latent_dim)
        self.latent_pos_embed = PositionTable(c.max_latent_size, width)
        stages = len(c.vae_ch_mult)
        self.vae = AutoencoderKL(
            block_out_channels=[c.vae_ch * m for m in c.vae_ch_mult], layers_per_block=c.vae_num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages,
            latent_channels=c.vae_z_channels, use_quant_conv=False, use_post_quant_conv=False)
        self.freeze()

    def set_und(self, size=None, blur=None):
        """The paper's ablations: the side of what the ViT sees, and blurring it. Raises InputError."""
        p, most = self.config.vit["patch_size"], self.config.vit_max_num_patch_per_side * self.config.vit["patch_size"]
        size, blur = size or self.und_size, blur or self.und_blur
        if not p <= size <= most:
            raise InputError(f"--und-size {size}: this ViT sees {p} to {most} pixels")
        common.check_blur(blur, size)  # here, as preprocess runs in a worker
        self.und_size, self.und_blur = size, blur

    def freeze(self, train_und=False):
        """Freezes all but what RecA trains: the generation expert, the time MLP and the two projections of the latents.
        train_und=True opens the language model (`tiny`, a fixture)."""
        for name, parameter in self.named_parameters():
            generates = "_moe_gen" in name or name.startswith(("time_embedder.", "vae2llm.", "llm2vae."))
            parameter.requires_grad_(generates or train_und and name.startswith("language_model."))

    @property
    def device(self):
        return self.latent_pos_embed.pos_embed.device

    def blocks(self):
        """The repeated layers, for activation checkpointing, compilation and sharding."""
        return list(self.language_model["model"]["layers"])

    def parameter_groups(self, weight_decay):
        """What is trained. The original decays all weights alike, by 0."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    def preprocess(self, image, task, rng=None):
        """PIL RGB (None: a text without image) -> {"vit": [3, height, width], "vae": [3, height, width]}, uint8;
        t2i has no "vit", i2t no "vae". Nothing is cropped, so rng is not used. edit: the ViT sees the photo as resized
        for the VAE, as in the original inferencer."""
        c, pixels = self.config, {}
        limits = {"recon": (self.und_size, self.und_size), "i2t": c.vit_limits, "edit": c.edit_limits}
        if image is not None and task != "i2t":
            resized = image.resize(fit(*image.size, *c.vae_limits, c.stride), Image.BICUBIC)
            pixels["vae"] = common.to_uint8(resized)
            image = resized if task == "edit" else image
        if image is not None and task in limits:
            image = image.resize(fit(*image.size, *limits[task], c.vit["patch_size"]), Image.BICUBIC)
            pixels["vit"] = common.to_uint8(image)
            if self.und_blur > 1 and task == "recon":
                # A narrow image has a shorter side than the one that --blur was checked with.
                factor = min(self.und_blur, max(1, min(image.size) // 2))
                pixels["vit"] = common.blur(common.normalize(pixels["vit"])[None], factor)[0]
        return pixels

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen encoders say: list of preprocess() -> list of {"vit": [rows, columns, width of the ViT],
        "mean" and "logvar": [channels, 2 h, 2 w]}, as far as the pixels are there: 2.7 MB for a photo of 1024 px.
        Images of one size are encoded together. (The original zero-pads a pack *before* the VAE: grey borders leak into
        the latents through GroupNorm and attention. We do not; the test `mixed` shows that the rest is the same.)"""
        out = [{} for _ in samples]
        for kind in ("vit", "vae"):
            for places in alike([sample[kind].shape if kind in sample else None for sample in samples]):
                if kind in samples[places[0]]:
                    pixels = torch.stack([common.normalize(samples[i][kind].to(self.device)) for i in places])
                    said = {"vit": self._vit(pixels)} if kind == "vit" else self._moments(pixels)
                    for k, i in enumerate(places):
                        out[i] |= {name: values[k] for name, values in said.items()}
        return out

    def _vit(self, pixels):
        """[B, 3, height, width], sides divisible by the patch -> [B, rows, columns, width of the ViT]."""
        p, vit = self.config.vit["patch_size"], self.vit_model["vision_model"]
        # [B, 3, rows, p, columns, p] -> [B, rows, columns, p * p * 3]
        x = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3)
        (rows, columns), side = x.shape[1:3], self.config.vit_max_num_patch_per_side
        ids = torch.arange(side ** 2, device=x.device).view(side, side)[:rows, :columns]
        patch, position = vit.embeddings.patch_embedding, vit.embeddings.position_embedding
        x = (patch(x.to(patch.weight.dtype)) + position(ids)).flatten(1, 2)
        return vit.post_layernorm(vit.encoder(x).last_hidden_state).unflatten(1, (rows, columns))

    def _moments(self, pixels):
        """pixels [B, 3, height, width] -> "mean" and "logvar" [B, 16, height / 8, width / 8], float32. (On a CPU
        channels_last is faster, but GroupNorm is inexact there: 1e-4 of the latents where a picture is flat.)"""
        at_once = max(1, 2 ** 18 // pixels[0, 0].numel())      # 512 x 512: the first layers of more would be the peak
        posteriors = [self.vae.encode(x.to(self.vae.dtype)).latent_dist for x in pixels.split(at_once)]
        return {name: torch.cat([getattr(p, name) for p in posteriors]).float() for name in ("mean", "logvar")}

    def _latents(self, features, noises):
        """A sample of each posterior, normalised: list of [h, w, C]. RecA draws it anew at every step."""
        c = self.config
        samples = [f["mean"] + (0.5 * f["logvar"]).exp() * n.to(self.device) for f, n in zip(features, noises)]
        return [self._tokens(c.vae_scale_factor * (sample - c.vae_shift_factor)) for sample in samples]

    def _tokens(self, latent):
        """latent [channels, 2 h, 2 w] -> [h, w, C], a token holding (row, column, channel) of its patch."""
        p = self.config.latent_patch_size
        return latent.unflatten(2, (-1, p)).unflatten(1, (-1, p)).permute(1, 3, 2, 4, 0).flatten(2)

    def _untokens(self, tokens):
        """[h, w, C] -> latent [channels, 2 h, 2 w], the inverse of _tokens."""
        p = self.config.latent_patch_size
        return tokens.unflatten(2, (p, p, -1)).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def _decode(self, latents):
        """List of [h, w, C] -> list of pixels [3, 16 h, 16 w] in about [-1, 1]."""
        c = self.config
        latents = [self._untokens(z)[None] / c.vae_scale_factor + c.vae_shift_factor for z in latents]
        return [self.vae.decode(z.to(self.vae.dtype)).sample[0].float() for z in latents]

    def _block(self, contexts, und, gen=None, causal=False, read=None):
        """Run one block of every image. und: per context [B, n, D]; gen: per context [B, N, D], or None. causal: text.
        read: "und" or "gen" to get these rows after the final norm, per context. The block extends the contexts, unless
        "gen" is read: that is the noisy block, which stands at 0 (seen_from_the_latents) and which nobody sees."""
        model, layers, noisy, ropes = self.language_model["model"], self.blocks(), read == "gen", [None, None]
        shapes = [(u.shape[0], u.shape[1], gen[i].shape[1] if gen else 0) for i, u in enumerate(und)]
        if not noisy:
            for k in (1, 2):                                                             # und rows, gen rows
                inside = [torch.arange(s[k]) if causal else torch.zeros(s[k]) for s in shapes]
                rows = [(c.position + x).repeat(s[0]) for c, x, s in zip(contexts, inside, shapes)]
                ropes[k - 1] = rotary(common.to_device(torch.cat(rows), self.device), self.config)
        und = torch.cat([u.flatten(0, 1) for u in und])                                                       # [R, D]
        gen = torch.cat([g.flatten(0, 1) for g in gen]) if gen else None
        for i, layer in enumerate(layers):
            needed = ("und", "gen") if i < len(layers) - 1 else (read,)              # nobody reads the others
            und, gen, seen = layer(und, gen, [c.kept[i] for c in contexts], shapes, ropes, causal, needed)
            for context, pair in zip(contexts, [] if noisy else seen):
                context.kept[i] = pair
        if noisy:
            return split(model["norm_moe_gen"](gen), shapes, 2)
        for context, shape in zip(contexts, shapes):
            context.position += shape[1] if causal else 1
        return split(model["norm"](und), shapes, 1) if read else None

    def _words(self, ids):
        """Token ids (nested list) -> embeddings [..., D]."""
        ids = common.to_device(torch.as_tensor(ids, device="cpu"), self.device) if isinstance(ids, list) else ids
        return self.language_model["model"]["embed_tokens"](ids)

    def _markers(self, count):
        """-> [count, 2, D]: the start and the end marker of an image block."""
        return self._words([[self.config.start_of_image, self.config.end_of_image]] * count)

    def _embed_vit(self, vit):
        """vit [B, rows, columns, width of the ViT] -> [B, M, D]: the understanding embeddings."""
        x = self.connector["fc1"](vit.flatten(1, 2).to(self.connector["fc1"].bias.dtype))
        x = self.connector["fc2"](F.gelu(x, approximate="tanh"))
        return x + self.vit_pos_embed(*vit.shape[1:3]).to(x.dtype)

    def _embed_time(self, t):
        """t [B] in [0, 1] -> [B, D], once per image. The sinusoid takes t itself (not 1000 t), cosines first."""
        waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)                  # [B, 256]
        return self.time_embedder["mlp"](waves.to(self.vae2llm.weight.dtype))

    def _embed_latents(self, x, t):
        """x [B, h, w, C], t [B] -> [B, N, D]."""
        rows = self.vae2llm(x.flatten(1, 2).to(self.vae2llm.weight.dtype))
        return rows + self._embed_time(t)[:, None].to(rows.dtype) + self.latent_pos_embed(*x.shape[1:3]).to(rows.dtype)

    def _latent_block(self, contexts, x, t, read=None):
        """The block of the images' latents: x list of [h, w, C], t [images]. read="gen": the noisy block, contexts as
        seen_from_the_latents -> list of velocities [h, w, C]."""
        und = [self._markers(len(c.images)) for c in contexts]
        gen = [self._embed_latents(c.stack(x), c.stack(t)) for c in contexts]
        rows = self._block(contexts, und, gen, read=read)
        said = {i: v for c, each in zip(contexts, rows or ()) for i, v in zip(c.images, self.llm2vae(each))}
        return [said[i].view(xi.shape) for i, xi in enumerate(x)] if rows else None

    # ==== 3. Loading and saving =======================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """source: ByteDance-Seed/BAGEL-7B-MoT, sanaka87/BAGEL-RecA, a folder in that layout, or tiny.
        dtype: of the weights that RecA trains, quantize: None or "int8", see _fill. Every tensor goes from the file to
        its device by itself: nobody ever holds a second copy of the model (the original builds two float32 copies per
        process, 117 GB each). Strict, except that the two position tables may be missing. Raises InputError."""
        if source == "tiny":
            source = common.tiny_folder("bagel")
        small = ["*.json", "*.txt", "ae.safetensors"]
        weights = common.find_checkpoint(str(source), RECA, WEIGHT_FILES, small, NEEDED)
        folder = base = weights.parent
        if not (folder / "llm_config.json").exists():      # BAGEL-RecA has only weights; the rest is the base model's
            base = common.hub_folder(DEFAULT, small)
        with torch.device("meta"):
            model = cls(read_config(base))
        try:
            vae = common.autoencoder_from_original(model.vae, common.load_state(base / "ae.safetensors"))
            vae = {f"vae.{key}": tensor for key, tensor in vae.items()}
            with safe_open(weights, "pt", str(device)) as file:
                # {our name: name in the file}: what a wrapper put in front of all names is dropped.
                names = common.unwrapped({key: key for key in file.keys()})
                names = {key: name for key, name in names.items() if key not in TABLES}
                shapes = {key: torch.empty(file.get_slice(name).get_shape(), device="meta")
                          for key, name in names.items()}
                shapes |= {key: tensor.to("meta") for key, tensor in vae.items()}
                common.load_strictly(model, shapes, folder)                         # before 29 GB are read
                tensors = ((key, vae[key] if key in vae else file.get_tensor(names[key])) for key in shapes)
                model._fill(tensors, device, dtype, quantize)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot read {folder}: {common.brief(error)}") from error
        if any(base.glob("tokenizer*.json")):
            model._set_tokenizer(common.load_tokenizer(base))
        return model

    @classmethod
    def random(cls, name, device="cpu", dtype=torch.float32, quantize=None):
        """Random weights, made on the device: for tiny, and (any other name: the released sizes) for --bench."""
        tokenizer = common.tiny_tokenizer(MARKERS)
        with torch.device("meta"):
            tiny = replace(TINY, llm=TINY.llm | {"vocab_size": len(tokenizer)})
            model = cls(tiny if name == "tiny" else CONFIGS[DEFAULT])
        parameters = list(model.named_parameters())                 # before _fill, which may turn some into buffers

        def initial():
            for name, p in parameters:
                if name.endswith("bias") or name == "llm2vae.weight":                 # the latter as in the original
                    yield name, torch.zeros(p.shape, device=device)
                elif p.dim() == 1:                                                                # norms
                    yield name, torch.ones(p.shape, device=device)
                else:
                    yield name, torch.randn(p.shape, device=device) * p[0].numel() ** -0.5
        model._fill(initial(), device, dtype, quantize)
        model._set_tokenizer(tokenizer)
        return model

    def _fill(self, tensors, device, dtype, quantize=None):
        """Gives every weight, until now without memory, its tensor. tensors: (name, tensor), made one at a time. The
        precision is float32 in the VAE, as it is released (0.3 GB), bf16 where frozen on a GPU, dtype elsewhere.
        quantize="int8": what common.quantize turns into int8 becomes int8 here, one matrix at a time: 16 GB, not 30."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        common.quantize(self, quantize)
        in_int8 = {name for name, buffer in self.named_buffers() if buffer.dtype == torch.int8}
        state = {}
        for name, tensor in tensors:
            precision = torch.bfloat16 if tensor.is_cuda and name in frozen else dtype
            precision = torch.float32 if name.startswith("vae.") else precision
            if name in in_int8:
                state[name], scale = common.int8_rows(tensor.to(device))
                state[name.removesuffix("weight") + "scale"] = scale.to(precision)
            else:
                state[name] = tensor.to(device, precision)
        self.load_state_dict(state, assign=True)
        self.to(device).eval()

    def _set_tokenizer(self, tokenizer):
        self.tokenizer = tokenizer
        for name, token in zip(("bos_token_id", "eos_token_id", "start_of_image", "end_of_image"), MARKERS):
            setattr(self.config, name, tokenizer.convert_tokens_to_ids(token))
            if getattr(self.config, name) in (None, tokenizer.unk_token_id):
                raise InputError(f"the tokenizer does not know {token}: not BAGEL's")

    def save_pretrained(self, folder, dtype=None):
        """Writes the released layout: ema.safetensors (with the tables), ae.safetensors (FLUX's names), configs,
        tokenizer. dtype: of ema.safetensors; None keeps the precision, bf16 gives the 29 GB file of ComfyUI-BAGEL
        (models/bagel/BAGEL-7B-MoT) and the original inferencer. Shards are gathered one by one: all ranks must call."""
        folder, state = Path(folder), {}
        for name, tensor in [*self.state_dict().items(), *self.named_buffers()]:
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if common.world()[0] == 0 and not name.startswith("vae."):
                state[name] = tensor.detach().to("cpu", dtype).contiguous()
        if common.world()[0] != 0:
            return
        vae = {name: tensor.cpu() for name, tensor in common.autoencoder_to_original(self.vae).items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "ema.safetensors", {"format": "pt"})
        save_file(vae, folder / "ae.safetensors", {"format": "pt"})
        write_config(self.config, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    # ==== 4. The embedding-conditioned prompt =========================================================
    #   (start) ViT patches (end)  (begin) template (end)  (start) noisy latents (end)
    # No system text, no roles, no question mark: the template stands where a question about the image would stand, and
    # the picture where a caption would be answered.

    def _text_ids(self, text):
        """A text block: begin, ids, end. What is a list of ids already is handed through."""
        if not isinstance(text, str):
            return text
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: put tokenizer.json into its folder")
        ids = self.tokenizer(common.plain(text, MARKERS), add_special_tokens=False)["input_ids"]
        return [self.config.bos_token_id, *ids, self.config.eos_token_id]

    def _contexts(self, ids, vits=None, latents=None, target=None):
        """Reads what comes before a text: clean latents, ViT patches, each where given. One entry an image: ids of the
        text (their number counts); vits [rows, columns, width of the ViT]; latents [h, w, C]; target: what will be
        painted (its shape counts). Images with equal shapes form one Context."""
        vits, latents, target = (each or [None] * len(ids) for each in (vits, latents, target))
        shapes = [tuple(x if x is None else x.shape for x in each) for each in zip(vits, latents, target)]
        contexts = [Context(places, [None] * len(self.blocks()))
                    for places in alike([(len(i), *shape) for i, shape in zip(ids, shapes)])]
        clean = [c for c in contexts if latents[c.images[0]] is not None]
        if clean:                                           # t = 0, generation expert, everybody sees everybody
            self._latent_block(clean, latents, torch.zeros(len(ids), device=self.device))
        seeing = [c for c in contexts if vits[c.images[0]] is not None]
        if seeing:                                          # one rotary position, everybody sees everybody
            marks = [self._markers(len(c.images)) for c in seeing]
            patches = [self._embed_vit(c.stack(vits)) for c in seeing]
            self._block(seeing, [torch.cat([m[:, :1], x.to(m.dtype), m[:, 1:]], dim=1) for m, x in zip(marks, patches)])
        return contexts

    def _read_text(self, contexts, ids, read=None):
        """Extends the contexts by the images' texts (ids; []: none) -> those with one, and what _block returns."""
        told = [c for c in contexts if ids[c.images[0]]]
        if not told and dist.is_initialized():
            # Every text of this rank was dropped. Under FSDP the others gather the layers' weights for theirs: join in.
            self._block([Context([0], [None] * len(self.blocks()))], [self._markers(1)])
        words = [self._words([ids[i] for i in c.images]) for c in told]
        return told, self._block(told, words, causal=True, read=read) if told else None

    # ==== 5. The losses ===============================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA (paper, equation 2): paint the image that these understanding embeddings describe.

        features: encode(.., "recon"), one dict an image; templates: one text each; draws: see draw.
        -> scalar, the velocity's squared error, the mean over channels and all latent tokens: large
        images weigh more, as in the original.
        """
        draws = draws or self.draw("recon", features, rng)
        return self._flow_loss(features, templates, draws, self.condition)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image: caption, noisy latents. RecA does not use it (lambda_t2i = 0): supervised fine-tuning."""
        draws = draws or self.draw("t2i", features, rng)
        return self._flow_loss(features, captions, draws, None)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Cross-entropy of the answers' tokens, the mean over all of them (end markers included): ViT block, then a
        text block per question and per answer. Conversations are lists of (question, answer); features without "vit"
        are texts without an image. A measure without gradient, unless freeze(train_und=True) opens the expert."""
        ids, labels = zip(*(self._conversation(turns) for turns in conversations))
        contexts = self._contexts(ids, [f.get("vit") for f in features])
        total, count = 0.0, 0
        for context, hidden in zip(*self._read_text(contexts, ids, read="und")):                    # hidden [B, L, D]
            target = torch.tensor([labels[i] for i in context.images])
            row, column = (target != IGNORED).nonzero(as_tuple=True)               # only the rows that are asked
            count += len(row)
            row, column, target = common.to_device([row, column, target[row, column]], self.device)
            total = total + common.cross_entropy_sum(self.language_model["lm_head"], hidden[row, column], target)
        return common.mean(total, count)

    def _conversation(self, turns):
        """[(question, answer), ...] -> ids and labels, a text block each. Row j predicts id j + 1 of its block, the
        last row none."""
        ids, labels = [], []
        for turn in turns:
            for text, learn in zip(turn, (False, True)):
                block = self._text_ids(text) if text else []
                ids += block
                labels += [token if learn else IGNORED for token in block[1:]] + [IGNORED] * bool(block)
        return ids, labels

    def draw(self, task, features, rng=None):
        """Every random number of a generation loss, one entry per image, on the CPU: text_kept (bool), timestep_normal,
        vae_noise and condition_noise [channels, 2 h, 2 w], flow_noise [h, w, C]."""
        if task == "i2t":
            return {}
        rows = [{"text_kept": bool(torch.rand((), generator=g) >= TEXT_DROP),
                 "timestep_normal": torch.randn((), generator=g),
                 "vae_noise": torch.randn(f["mean"].shape, generator=g),
                 "flow_noise": torch.randn(self._tokens_shape(f["mean"]), generator=g),
                 "condition_noise": torch.randn(f["mean"].shape, generator=g)}
                for f, g in zip(features, (rng or Rng.fresh(len(features))).images)]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _tokens_shape(self, mean):
        """mean [channels, 2 h, 2 w] -> (h, w, C)."""
        p = self.config.latent_patch_size
        return mean.shape[1] // p, mean.shape[2] // p, self.config.latent_dim

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: latent tokens, or tokens of answers."""
        if task == "i2t":
            labels = [label for turns in texts for label in self._conversation(turns)[1]]
            return sum(label != IGNORED for label in labels)
        shapes = [self._tokens_shape(f["mean"]) for f in features]
        return sum(h * w for h, w, _ in shapes)

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: square images of the largest
        size, with the longest text."""
        sides = {"vae": self.config.vae_limits[0], "vit": self.config.vit_limits[0] if task == "i2t" else self.und_size}
        kinds = {"recon": ("vae", "vit"), "t2i": ("vae",), "i2t": ("vit",)}[task]
        sample = {kind: torch.zeros(3, sides[kind], sides[kind], dtype=torch.uint8) for kind in kinds}
        words = "word " * 300
        texts = {"recon": max(common.templates(), key=len), "t2i": words, "i2t": [(words, words)]}
        return [sample] * count, [texts[task]] * count, {} if task == "i2t" else {"text_kept": [True] * count}

    def _flow_loss(self, features, texts, draws, condition):
        """Rectified flow: x_t = (1 - t) z + t noise, target noise - z, t = sigmoid of a normal (the original's shift is
        1 in training). condition: "vit" (RecA), "vae" (Table 7: the clean latents instead), None (text to image)."""
        ids = [self._text_ids(text) if kept else [] for text, kept in zip(texts, draws["text_kept"])]
        wanted = ["vae_noise", "flow_noise", "timestep_normal"] + ["condition_noise"] * (condition == "vae")
        draws = common.to_device({name: list(draws[name]) for name in wanted}, self.device)
        z = self._latents(features, draws["vae_noise"])                                            # list of [h, w, C]
        noises = draws["flow_noise"]
        t = torch.stack(draws["timestep_normal"]).sigmoid()                                        # [B]

        vits = [f["vit"] for f in features] if condition == "vit" else None
        clean = self._latents(features, draws["condition_noise"]) if condition == "vae" else None
        contexts = self._contexts(ids, vits, clean, z)
        self._read_text(contexts, ids)
        contexts = [c.seen_from_the_latents(self.config) for c in contexts]

        x = [(1 - ti) * zi + ti * noise for ti, zi, noise in zip(t, z, noises)]
        velocities = self._latent_block(contexts, x, t, read="gen")
        errors = [(v.float() - (noise - zi)).square().mean(-1).flatten()                           # one a latent token
                  for v, zi, noise in zip(velocities, z, noises)]
        errors = torch.cat(errors)
        return common.mean(errors.sum(), len(errors))

    # ==== 6. Inference ================================================================================

    @torch.no_grad()
    def generate(self, prompts, *, seed=0, draws=None, size=None, **sampler):
        """Text to image: texts -> PIL images of `size` (one side, or (height, width); default 1024). seed: see
        Rng.sampling. draws: {"noise": [h, w, C] per image}. sampler: what differs from GENERATE; progress=True: bar."""
        size = self.config.image_size if size is None else size
        return self._paint_images([{} for _ in prompts], (), prompts, size, seed, draws, **GENERATE | sampler)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, seed=0, draws=None, size=None, **sampler):
        """Image to image through the understanding embeddings alone (ViT at und_size, then a template), by default at
        the VAE's size for the photo. sampler: what differs from RECONSTRUCT. (In the notebook the ViT sees 518 px.)"""
        samples = [self.preprocess(image, "recon") for image in images]
        templates = templates or [common.SEED_TEMPLATE] * len(images)
        return self._paint_images(samples, (self.condition,), templates, size, seed, draws, **RECONSTRUCT | sampler)

    @torch.no_grad()
    def edit(self, images, instructions, *, seed=0, draws=None, size=None, **sampler):
        """Edit images by instruction: VAE block, ViT block, text; by default at the VAE's size for the photo. sampler:
        what differs from EDIT. draws: "noise" [h, w, C] and "vae_noise" [channels, 2 h, 2 w] per image."""
        samples = [self.preprocess(image, "edit") for image in images]
        return self._paint_images(samples, ("vae", "vit"), instructions, size, seed, draws, **EDIT | sampler)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, greedy: ViT block (224 to 980 px), question, answer. List of PIL -> list of str."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        answers = self._describe([f["vit"] for f in features], [self._text_ids(question)] * len(images), max_new_tokens)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def _describe(self, vits, ids, max_new_tokens):
        """-> lists of new ids, without begin and end. All images decode together until the last one has ended."""
        contexts, end = self._contexts(ids, vits), self.config.eos_token_id
        self._read_text(contexts, ids)
        said = torch.full((len(ids), 1), self.config.bos_token_id, device=self.device)            # [images, ids so far]
        order = [i for context in contexts for i in context.images]
        while said.shape[1] <= max_new_tokens and not (said == end).any(1).all():
            rows = self._block(contexts, [self._words(said[c.images, -1:]) for c in contexts], causal=True, read="und")
            logits = self.language_model["lm_head"](torch.cat(rows)[:, 0])                             # [B, vocabulary]
            said = torch.cat([said, logits.argmax(-1, keepdim=True)[np.argsort(order)]], dim=1)
        return [row[1:row.index(end)] if end in row else row[1:] for row in said.tolist()]

    def _paint_images(self, samples, kinds, texts, size, seed, draws, **sampler):
        """kinds: the blocks before the text; size: a side, (height, width), or None: as the sample's VAE pixels."""
        noise, rng, s = [], Rng.sampling(seed, len(texts)), self.config.stride
        for sample, g in zip(samples, rng.images):
            height, width = (size, size) if isinstance(size, int) else size or sample["vae"].shape[1:]
            if height % s or width % s or min(height, width) < s:
                raise InputError(f"an image of {height} x {width} cannot be painted: sides must be multiples of {s}")
            noise.append(torch.randn(height // s, width // s, self.config.latent_dim, generator=g))
        features = self.encode([{kind: sample[kind] for kind in kinds} for sample in samples], "edit")
        draws, clean = {"noise": noise} | (draws or {}), None
        if "vae" in kinds:
            posterior = [torch.randn(f["mean"].shape, generator=g) for f, g in zip(features, rng.images)]
            clean = self._latents(features, draws.get("vae_noise", posterior))
        vits = [f["vit"] for f in features] if "vit" in kinds else None
        ids = [self._text_ids(text) for text in texts]
        contexts = self._contexts(ids, vits, clean, noise)
        text_free = [Context(c.images, list(c.kept), c.position) for c in contexts]
        self._read_text(contexts, ids)
        image_free = self._contexts(ids, target=noise) if sampler["image_guidance_scale"] > 1 else []
        self._read_text(image_free, ids)
        latents = self._sample((contexts, text_free, image_free), draws["noise"], **sampler)
        # (x / 2 + 1 / 2) clamped, times 255, truncated: BAGEL's rounding
        pictures = [((x / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu() for x in self._decode(latents)]
        return [Image.fromarray(picture.numpy()) for picture in pictures]

    def _sample(self, sets, noise, *, num_steps, timestep_shift, guidance_scale, image_guidance_scale, interval, renorm,
                renorm_min, progress=False, trace=None):
        """Euler steps of the flow from noise (t = 1) to latents (t = 0): list of [h, w, C] in and out. sets: three
        lists of contexts: with everything, without the last text, without images. At a guided step their passes run as
        one batch, each at the position of its own context. trace: a list that gets (t, x, velocity, both scales)."""
        if renorm not in ("global", "channel", "text_channel"):
            raise InputError(f"unknown renormalisation {renorm}: global, channel or text_channel")
        if num_steps < 2:
            raise InputError(
                f"num_steps {num_steps}: the sampler goes from step to step, give 2 or more"
            )
        count, x = len(noise), [n.to(self.device) for n in noise]
        sets = [[c.seen_from_the_latents(self.config, k * count) for c in each] for k, each in enumerate(sets)]
        times = torch.linspace(1, 0, num_steps)
        times = (timestep_shift * times / (1 + (timestep_shift - 1) * times)).tolist()
        for t, after in tqdm(list(zip(times[:-1], times[1:])), disable=not progress, desc="sample", leave=False):
            # A text scale of 1 or less switches all guidance off, the image one too, as in the original.
            guided = interval[0] < t <= interval[1] and guidance_scale > 1
            passes = 1 + guided + (guided and image_guidance_scale > 1)
            now = torch.full((count * passes,), t, device=self.device)
            v = [vi.float() for vi in self._latent_block(sum(sets[:passes], []), x * passes, now, read="gen")]
            scales = (guidance_scale, image_guidance_scale) if guided else (1.0, 1.0)
            if guided:
                v = [guide(v[i::count], *scales, renorm, renorm_min) for i in range(count)]
            if trace is not None:
                trace.append((t, x, v, scales))
            x = [xi - vi * (t - after) for xi, vi in zip(x, v)]
        return x

def guide(velocities, text_scale, image_scale, renorm, renorm_min):
    """Guidance of one image. velocities [h, w, C]: with everything, without the last text, and perhaps without images.
    A guided velocity is too long; `renorm` shrinks it back: "global" by one factor an image (the original: one a batch,
    so that a batch changes its images), "channel" one a token, "text_channel" one a token between text and image
    guidance. The factor stays in [renorm_min, 1]: renorm_min = 1 switches it off."""
    def shrink(w):
        axes = (0, 1, 2) if renorm == "global" else -1
        length, guided = (torch.linalg.vector_norm(y, dim=axes, keepdim=True) for y in (v, w))
        return w * (length / (guided + 1e-8)).clamp(renorm_min, 1.0)

    v, v_text, *v_image = velocities
    w = v_text + text_scale * (v - v_text)
    w = shrink(w) if renorm == "text_channel" else w
    if v_image:
        w = v_image[0] + image_scale * (w - v_image[0])
    return w if renorm == "text_channel" else shrink(w)

# ==== 3, continued: files, sizes, names ===============================================================

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
# In this order. The official trainer writes model and ema, an average with 0.9999 of which its
# authors advise against: after 1000 steps it is 90% the old model. (The release has one file,
# called ema, as what save_pretrained writes.)
WEIGHT_FILES = [
    ["model_bf16.safetensors"],
    ["model.safetensors"],
    ["ema.safetensors"],
    ["*.safetensors"],
]
NEEDED = ("language_model.model.embed_tokens.weight", "llm2vae.weight")  # what only BAGEL's has
OTHER_FIELDS = ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side")             # in config.json

def read_config(folder):
    """The sizes in the release's llm_config.json, vit_config.json and config.json; in the latter, under "reca", stand
    those of ours that no file of the release holds. Raises InputError."""
    llm, vit = (
        common.read_object(folder / name) for name in ("llm_config.json", "vit_config.json")
    )
    config = common.read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    known = {"llm": LLM | {name: llm[name] for name in LLM if name in llm},
             "vit": VIT | {name: vit[name] for name in VIT if name in vit}}
    known |= {name: config[name] for name in OTHER_FIELDS if name in config}
    try:
        known |= config.get("reca", {})
        return BagelConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})
    except TypeError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error

def write_config(c, folder):
    """config.json for us; llm_config.json and vit_config.json for us and the original."""
    llm = c.llm | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    vit = c.vit | {"model_type": "siglip_vision_model"}
    ours = {name: value for name, value in asdict(c).items() if name not in ("llm", "vit")}
    config = {"architectures": ["BagelForConditionalGeneration"], "reca": ours}
    for name, content in (("llm_config.json", llm), ("vit_config.json", vit), ("config.json", config)):
        common.write(folder / name, content)

def fit(width, height, longest, shortest, stride, max_pixels=14 * 14 * 9 * 1024):
    """The size that both encoders want: sides multiples of `stride`, the long one at most `longest`, the short one at
    least `shortest`. Where both cannot be had the long side wins: 1024 x 768 at 224 / 224 gives 224 x 168. Above
    max_pixels (never at our limits) the original multiplies the sides by the ratio of the *areas*, not its root; so do
    we."""
    def scaled(w, h, scale):
        return tuple(max(stride, round(round(side * scale) / stride) * stride) for side in (w, h))

    w, h = scaled(width, height, max(min(longest / max(width, height), 1.0), shortest / min(width, height)))
    if w * h > max_pixels:
        w, h = scaled(w, h, max_pixels / (w * h))
    return scaled(w, h, longest / max(w, h)) if max(w, h) > longest else (w, h)

# ==== 7. main() =======================================================================================
# Where the bytes go when one 80 GB card (79.6 GiB = 85.5 GB) trains 6.54 billion weights beside 8.07 frozen billions:
#
#                                        float32 AdamW     bf16, stochastic rounding
#     frozen weights, bf16                   16.5 GB            16.5 GB      (with the VAE in float32)
#     trained weights                        26.2 GB            13.1 GB      (float32 masters / bf16, no masters)
#     gradients                              26.2 GB            13.1 GB
#     first and second moments               52.3 GB            26.2 GB
#     sum                                   121.2 GB            68.9 GB
#     an image of 1024 px, checkpointing     + 0.9 GB           + 0.9 GB      (28 layers x 4100 rows x 3584 x 2 bytes)
#     the layer that is being recomputed    + ~1.5 GB an image of the batch   (the MLP: 7 x 4100 x 18944 x 2 bytes)
#
# Sharded over n GPUs (FSDP2) all but the frozen 3 GB outside the layers is divided by n: float32 AdamW then needs 2
# cards of 80 GB, or 8 of 48 GB (each first holds the whole model, 43 GB). The original also trains 7.1 billion
# parameters that cannot move, in float32: 283 GB.

def shard(model):
    """FSDP2: every decoder layer (both experts) and the trained weights outside are divided over all ranks. What is
    frozen outside (ViT, VAE, embedding, head: 3.2 GB) stays whole, so that encoding images needs no communication.
    Gradients arrive as the mean over ranks, in float32; on a GPU the layers compute in bf16."""
    inside = {p for layer in model.blocks() for p in layer.parameters()}
    frozen_outside = {p for p in model.parameters() if not p.requires_grad} - inside
    device, policy = model.device.type, MixedPrecisionPolicy()
    if device == "cuda":       # cast_forward_inputs would turn the rotary tables into bf16, as it does in the original
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device, (common.world()[1],)), "mp_policy": policy}
    for layer in model.blocks():
        fully_shard(layer, **options)
    fully_shard(model, **options, ignored_params=frozen_outside)
    for method in ("recon_loss", "i2t_loss", "t2i_loss", "reconstruct"):     # the last: previews, by all ranks together
        register_fsdp_forward_method(model, method)

class BagelTrainer(common.Trainer):
    """The loop of common.py, with checkpoints that any number of ranks write and read: the files of the release (bf16
    after training on GPUs), and in shards/ the exact trained weights and the optimizer, written by each rank for itself
    with torch.distributed.checkpoint."""
    sharded = True

    def _shards(self):
        warnings.filterwarnings("ignore", "torch.distributed is disabled")          # one process, as it should be
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"weights": trained, "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def save(self):
        """As in common.py, but all ranks take part."""
        folder, temporary = self.out / f"checkpoint-{self.step:06d}", self.out / f".tmp-checkpoint-{self.step:06d}"
        bf16 = self.model.device.type == "cuda" and self.args.precision == "bf16"
        try:
            self.model.save_pretrained(temporary, dtype=torch.bfloat16 if bf16 else None)
            dcp.save(self._shards(), checkpoint_id=temporary / "shards")
            if common.world()[0] == 0:
                torch.save(self.progress(), temporary / "trainer.pt")
                common.remove(folder)
                temporary.rename(folder)
                for old in common.own_checkpoints(self.out)[:-2]:
                    shutil.rmtree(old)
        except (InputError, OSError, dcp.api.CheckpointException, RuntimeError, SafetensorError) as error:
            common.remove(temporary)
            reason = f"cannot write {folder}: {common.brief(error)}; the checkpoints before it are kept"
            raise InputError(reason) from error
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        self.go_on_from(common.load_training(folder))
        shards = self._shards()
        try:
            dcp.load(shards, checkpoint_id=folder / "shards")    # weights in place
        except (dcp.api.CheckpointException, OSError, EOFError) as error:
            raise InputError(f"cannot read {folder / 'shards'}: {common.brief(error)}") from error
        with common.own_options(self.optimizer):
            set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])

    def train(self):
        super().train()
        for module in self.model.modules():                   # rank 0 goes on alone, for scores and inference
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()

def flags(parser):
    """What only this architecture has."""
    add = parser.add_argument_group("BAGEL only").add_argument
    add("--condition", choices=("vit", "vae"), default="vit",
        help="what RecA conditions on: ViT (semantic) or VAE embeddings (the paper's Table 7)")
    add(
        "--edit",
        type=common.expanded,
        help=(
            "editing prompts: ImgEdit's singleturn.json, or GEdit's rows as .jsonl; results in that"
            " layout"
        ),
    )
    add(
        "--edit-images",
        type=common.expanded,
        help="folder of the source images of --edit (default: the folder of the file)",
    )
    add("--image-guidance-scale", type=common.number(0), default=2.0,
        help="of --edit (the original's command line: 1.5)")
    add(
        "--cfg-interval",
        type=common.number(0, 1),
        nargs=2,
        metavar=("FROM", "TO"),
        help=(
            "guide where FROM < t <= TO; t falls from 1, noise, to 0 (default 0.4 1; edits and"
            " reconstructions 0 1)"
        ),
    )
    add(
        "--cfg-renorm",
        choices=("global", "channel", "text_channel"),
        help=(
            "how a guided velocity is shrunk back (default global; edits and reconstructions"
            " text_channel)"
        ),
    )
    add("--timestep-shift", type=common.number(0.01, 100),
        help="above 1: more of the sampler's steps at high noise (default 3)")

def prepare(model, args):
    """Called before training. Several processes divide the weights; FSDP2 then averages the gradients itself."""
    if common.world()[1] == 1:
        return {}
    shard(model)
    return {"average": lambda parameters: None}

def edit_jobs(path, sources, out):
    """--edit FILE -> [(name, source image, instruction, [output, GEdit's copy of the source])], as scorers read them.

    ImgEdit's singleturn.json: {key: {"id": image, "prompt": ...}} -> out/<key>.png
    GEdit's rows as .jsonl: {"key", "task_type", "instruction", "instruction_language", "image" (default <key>.png)} ->
        out/gen_image/fullset/<task_type>/<language>/<key>.png and <key>_SRCIMG.png
    Images are relative to `sources` (default: the file's folder). Raises InputError.
    """
    sources = Path(sources or Path(path).parent)
    gedit = Path(path).suffix.lower() == ".jsonl"
    jobs = []
    table = common.read_json(path, lines=gedit)
    try:
        for key, row in enumerate(table) if gedit else table.items():
            if gedit:
                image, text = row.get("image", f"{row['key']}.png"), common.text_in(row, "instruction")
                key = "/".join(("gen_image/fullset", row["task_type"], row["instruction_language"], row["key"]))
            else:
                image, text = row["id"], common.text_in(row, "prompt")
            paths = [common.inside(out, f"{key}{end}.png") for end in ("", "_SRCIMG")[:1 + gedit]]
            jobs.append((image, sources / image, text, paths))
    except (KeyError, TypeError, AttributeError) as error:
        what = "is neither ImgEdit's (singleturn.json: id, prompt) nor GEdit's (.jsonl: key, task_type, instruction, "
        raise InputError(f"{path}: row {len(jobs) + 1} {what}instruction_language)") from error
    common.check_outputs(
        [(f"row {i + 1}", file) for i, (*_, paths) in enumerate(jobs) for file in paths], path
    )
    return jobs

def edit_files(model, args, jobs):
    """Makes what is missing or was made from something else. (The original crops black borders off
    its results; we do not.)"""
    options = {"image_guidance_scale": args.image_guidance_scale, **common.sampler_options(args)}
    edit_origin = common.origin(
        model, args, "edit", seed=args.seed, image_guidance_scale=args.image_guidance_scale
    )
    wanted = []
    for name, source, text, paths in jobs:
        made_from = {**edit_origin, "instruction": text, "source": common.fingerprint(source)}
        wanted.append((paths[0], made_from, name, source, text, paths[1:]))

    outputs = common.Outputs(wanted)
    todo = [(name, source, text, path, made_from, copies)
            for path, made_from, name, source, text, copies in outputs.todo]
    for chunk in common.in_batches("edit", todo, args.batch_images):
        read = list(common.readable(chunk))
        if not read:
            continue
        images, texts = [row[1] for row in read], [row[2] for row in read]
        edited = model.edit(images, texts, seed=[args.seed] * len(read), **options)
        for (_, source, _, path, made_from, copies), picture in zip(read, edited):
            for copy in copies:  # first, as the edit says that both are there
                common.write(copy, source, {**made_from, "copy": True})
            outputs.write(path, picture, made_from)
    print(f"{outputs.made} images edited in {args.out}{outputs.report()}")

def main():
    args = common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags)
    args.sampler = {
        "timestep_shift": args.timestep_shift,
        "interval": args.cfg_interval,
        "renorm": args.cfg_renorm,
    }
    if args.cfg_interval and not args.cfg_interval[0] < args.cfg_interval[1]:
        raise InputError("--cfg-interval FROM TO: FROM is less than TO")
    if args.sampling_steps == 1:
        raise InputError(
            "--sampling-steps 1: BAGEL's sampler goes from step to step, 1 paints nothing; give 2"
            " or more"
        )
    Bagel.condition = args.condition
    if args.lambda_i2t or args.i2t_data:
        raise InputError("--lambda-i2t: BAGEL's understanding expert is frozen, L_i2t would train nothing")
    editing = {edit_files: edit_jobs(args.edit, args.edit_images, args.out)} if args.edit else {}
    common.run(Bagel, args, prepare, BagelTrainer, editing)

if __name__ == "__main__":
    common.cli(main)
