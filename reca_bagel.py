"""RecA for BAGEL: a mixture of transformers with rectified flow (Qwen2.5-7B x 2 experts + SigLIP NaViT + FLUX VAE).

What is special about this architecture. One decoder carries two complete sets of weights. Text and ViT tokens go
through the *understanding* expert, image latents through the *generation* expert; only attention is joint, so a latent
reads the keys and values of the picture and the text before it. RecA gives the generation expert nothing but what the
understanding side says about a picture, and asks for the picture back. ViT, VAE and the understanding expert stay
frozen: 6.5 of 14.6 billion parameters are trained.

    photo -- resize to 224 --> SigLIP ViT -> [B, M, 1152] -> connector -> [B, M, D] --.
                                                                                      +-> understanding expert, no graph
    "Describe the image in detail." -> ids --------------------------> [B, L, D] ------'      |
                                                                                              | keys and values
    photo -- 512 to 1024 px --> FLUX VAE -> z [B, 16, h, w]                                    v of the context
                                             x_t = (1 - t) z + t noise -> [B, N, 64] -> generation expert, trained
                                                                                              |
                                             squared error against noise - z  <-- velocity [B, N, 64]

The sequence of one sample: (start, ViT patches, end) (begin, template, end) (start, noisy latents, end). In an image
everybody sees everybody, text is causal, nobody outside sees the noisy block. Paper: section 4, Table 8 (column BAGEL).

How a step is computed here, and why it gives the original's numbers with less work:
  * The context never sees the noise: it runs once, without a graph, and is kept as keys and values, as for sampling.
  * Its rows would get no gradient in the original either, which detaches them in every layer. The two markers around
    the latents do see the latents; they run beside them, in every layer, without a graph.
  * Rows are sorted once into [understanding | generation], so an expert is a call on a slice; the original scatters and
    gathers ten times a layer. Images are sorted into groups of equal shape: attention is one dense call a group.
  * All rows of the noisy block have one rotary position, and rotary attention knows only differences of positions. So
    positions are counted from there: these rows need no rotation, only the (few) keys of the context are turned, once.
  * The last layer computes no row that nobody reads.

    python reca_bagel.py --data ./images                         RecA on BAGEL-7B-MoT, one 80 GB GPU
    torchrun --nproc-per-node 8 reca_bagel.py --data ./images    sharded over 8 GPUs (FSDP2)
    python reca_bagel.py --model tiny                            a toy BAGEL on coloured shapes, CPU, minutes
    python reca_bagel.py --model sanaka87/BAGEL-RecA --steps 0 --edit singleturn.json --edit-images DIR --out edits

Legend: B images of a batch (or of a group of equal shapes), D width of the decoder, H query heads, K key/value heads,
d size of a head, M ViT patches, L text ids, N latent tokens of an image, C channels of a latent token (4 * 16), R rows
of a packed pass, S keys that are seen.
"""
import copy
import json
import math
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from diffusers import AutoencoderKL
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
from transformers import AutoTokenizer, Qwen2Config, SiglipVisionConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

import common

# ======================================================================================================
# 1. Sizes and hyper-parameters
# ======================================================================================================


@dataclass
class BagelConfig:
    """Sizes of BAGEL-7B-MoT (the defaults). Names follow the released json files where those have a name."""
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    # SigLIP so400m/14 at 980 px. vit_config.json says 27 layers, the original builds and stores one less.
    vit_hidden_size: int = 1152
    vit_intermediate_size: int = 4304
    vit_num_hidden_layers: int = 26
    vit_num_attention_heads: int = 16
    vit_image_size: int = 980
    vit_patch_size: int = 14
    vit_max_num_patch_per_side: int = 70
    # latents. The original's flag defaults to max_latent_size 32, which does not fit the release.
    latent_patch_size: int = 2
    max_latent_size: int = 64
    # the FLUX.1 autoencoder: no file of the release holds these
    vae_ch: int = 128
    vae_ch_mult: tuple = (1, 2, 4, 4)
    vae_num_res_blocks: int = 2
    vae_z_channels: int = 16
    vae_scale_factor: float = 0.3611
    vae_shift_factor: float = 0.1159
    # token ids; from_pretrained takes them from the tokenizer
    bos_token_id: int = 151644          # <|im_start|>, before every text block
    eos_token_id: int = 151645          # <|im_end|>, after it
    start_of_image: int = 151652        # <|vision_start|>
    end_of_image: int = 151653          # <|vision_end|>
    # how images are resized: (longest side, shortest side); the strides follow from the patches
    vae_limits: tuple = (1024, 512)
    vit_limits: tuple = (980, 224)      # when somebody asks about an image; RecA uses und_size for both
    edit_limits: tuple = (980, 378)     # when an image is edited, as in the original's ImgEdit script
    image_size: int = 1024              # side of what is painted from a prompt

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def stride(self):
        """Pixels per latent token and side: 16 in the release."""
        return 2 ** (len(self.vae_ch_mult) - 1) * self.latent_patch_size

    @property
    def latent_dim(self):
        """C: values of a latent token, 2 * 2 * 16 = 64 in the release."""
        return self.latent_patch_size ** 2 * self.vae_z_channels


TINY = BagelConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vit_hidden_size=64, vit_intermediate_size=160, vit_num_hidden_layers=2, vit_num_attention_heads=4,
    vit_image_size=32, vit_patch_size=8, vit_max_num_patch_per_side=4, max_latent_size=4,
    vae_ch=32, vae_ch_mult=(1, 1, 1, 1), vae_num_res_blocks=1, vae_z_channels=8,
    vae_limits=(64, 64), vit_limits=(32, 32), edit_limits=(32, 32), image_size=64)


@dataclass
class Recipe:
    """Table 8 of the paper. The public run: 6 GPUs, packs of about 8 images of 1024 px each, 1000 updates, *all of them
    warm-up*: the learning rate reaches 4e-5 at the last one (the very first has 0 there, 4e-8 here). It is what was
    published, so it is the default.

    A step here is a batch of 2 images a GPU, which is what fits beside the weights on one card of 80 GB; 4 steps make
    one update. On 6 GPUs (torchrun --nproc-per-node 6) that is the public run; on one it is --accum 24 --steps 24000.
    The original also keeps an average of the weights (EMA 0.9999) and advises against using it: after 1000 updates 90%
    of it is still the old model. There is none here.
    """
    lr: float = 4e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 1000
    horizon: int = 0                    # constant after the warm-up
    steps: int = 4000
    batch: int = 2
    accum: int = 4
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0             # the understanding expert is frozen: there is nothing to hold on to
    lambda_t2i: float = 0.0
    und_size: int = None                # the model's own: 224 (or what its ViT can see, where that is less)


DEFAULT = "ByteDance-Seed/BAGEL-7B-MoT"
RECIPES = {DEFAULT: Recipe(), "tiny": Recipe(lr=1e-3, eps=1e-8, warmup=20, steps=300, batch=32, accum=1)}
UND_SIZE = 224                          # the smallest side that the paper's recipe gives the ViT
TEXT_DROPOUT = 0.1                      # the template is left out for one image in ten; the picture never is
TIMESTEP_SHIFT = 1.0                    # in training

# How the original samples. num_steps 50 makes 49 evaluations; guidance (Bagel._guide) acts where t is in the interval.
GENERATE = {"num_steps": 50, "timestep_shift": 3.0, "guidance_scale": 4.0, "image_guidance_scale": 1.0,
            "interval": (0.4, 1.0), "renorm": "global", "renorm_min": 0.0}         # notebook; GenEval: interval (0, 1)
EDIT = GENERATE | {"image_guidance_scale": 2.0, "interval": (0.0, 1.0), "renorm": "text_channel"}     # ImgEdit script
RECONSTRUCT = EDIT | {"renorm_min": 1.0}                                           # notebook: no renormalisation


# ======================================================================================================
# 2. The model
# ======================================================================================================


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the rows' precision, so that bf16 rows stay bf16 beside float32 master weights."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary(positions, config):
    """positions [R] (integers, also negative) -> cos, sin [R, d], float32. The original casts the frequencies to bf16
    under FSDP, which blurs far positions; nothing depends on that."""
    d = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device).float() / d)           # [d / 2]
    angles = (positions[:, None].float() * frequencies).repeat(1, 2)                                            # [R, d]
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """Rotary embedding, halves rotated: x [..., d], cos and sin broadcast to it."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q, k, v, causal):
    """Dense attention of one group. q [B, H, n, d], k and v [B, K, S, d] -> [B * n, H * d].

    causal: query i of n sees all keys but the last n - 1 - i. Otherwise everybody sees everything, and no mask exists.
    """
    mask, n, s = None, q.shape[2], k.shape[2]
    if causal and 1 < n:
        mask = torch.ones(n, s, dtype=torch.bool, device=q.device).tril(s - n)
    k, v = k.to(q.dtype), v.to(q.dtype)                      # the experts may be kept in different precisions
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(q.shape[0] * n, -1)


class MoTLayer(nn.Module):
    """A Qwen2 decoder layer with two experts. Suffix "": understanding, "_moe_gen": generation, as in the checkpoint.

    Written here because transformers' Qwen2DecoderLayer can hold neither a second set of weights that meets the first
    in one attention, nor norms on queries and keys (Qwen3 has those, but no biases on q, k, v and again one expert).
    """

    def __init__(self, c):
        super().__init__()
        width, d = c.hidden_size, c.head_dim
        self.head_dim, self.train_und = d, False
        mlp = Qwen2Config(hidden_size=width, intermediate_size=c.intermediate_size)
        attention = {}
        for e in ("", "_moe_gen"):
            for name in "qkv":
                heads = c.num_attention_heads if name == "q" else c.num_key_value_heads
                attention[f"{name}_proj{e}"] = nn.Linear(width, heads * d)
            attention |= {f"{name}_norm{e}": RMSNorm(d, c.rms_norm_eps) for name in "qk"}
            attention[f"o_proj{e}"] = nn.Linear(c.num_attention_heads * d, width, bias=False)
            self.add_module(f"input_layernorm{e}", RMSNorm(width, c.rms_norm_eps))
            self.add_module(f"post_attention_layernorm{e}", RMSNorm(width, c.rms_norm_eps))
            self.add_module(f"mlp{e}", Qwen2MLP(mlp))
        self.self_attn = nn.ModuleDict(attention)

    def project(self, rows, e, rope):
        """rows [R, D] -> q [R, H, d], k and v [R, K, d]. The norm comes before the rotation."""
        x = getattr(self, f"input_layernorm{e}")(rows)
        q, k, v = (self.self_attn[f"{name}_proj{e}"](x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        q, k = self.self_attn[f"q_norm{e}"](q), self.self_attn[f"k_norm{e}"](k)
        if rope is not None:
            q, k = (turn(x, *(table[:, None] for table in rope)) for x in (q, k))                     # tables [R, 1, d]
        return q, k, v

    def finish(self, rows, heard, e):
        """What an expert does with what its rows heard: rows [R, D], heard [R, H * d] -> [R, D].

        The MLP (SwiGLU) keeps gate and up for the backward and computes silu(gate) and silu(gate) * up again: two cheap
        passes for two fifths of all activations.
        """
        rows, mlp = rows + self.self_attn[f"o_proj{e}"](heard), getattr(self, f"mlp{e}")
        x = getattr(self, f"post_attention_layernorm{e}")(rows)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)

        def down(gate, up):
            return mlp.down_proj(F.silu(gate) * up)
        return rows + (checkpoint(down, gate, up, use_reentrant=False) if gate.requires_grad else down(gate, up))

    def forward(self, und, gen, past, shapes, ropes=(None, None), causal=False, keep=False, out_und=True, out_gen=True):
        """One block of every image through this layer.

        und [R, D]: rows of the understanding expert, all images one after another; gen [R', D] or None: rows of the
        generation expert. shapes: one (B, n, N) per group of equal images: each has n und rows and N gen rows, so R =
        sum of B * n. past: one (keys, values) [B, K, S, d] per group: what its images said before; (None, None) at the
        beginning. ropes: (cos, sin) for und and for gen, or None where the position is 0. causal: text. keep: return
        keys and values with this block's appended. out_und / out_gen: whether anybody reads these rows after this
        layer. Returns (und or None, gen or None, keys and values or None).

        With the understanding expert frozen its rows have no graph at all. That is what the original computes, by
        detaching q, k, v, attention output and MLP output of these rows in every layer: no gradient flows from the
        latents through the keys and values of the context, and the residual stream of the markers is a constant that
        follows the latents' values.
        """
        und_graph = torch.is_grad_enabled() and self.train_und
        with torch.set_grad_enabled(und_graph):
            q_und, k_und, v_und = self.project(und, "", ropes[0])
        if gen is not None:
            q_gen, k_gen, v_gen = self.project(gen, "_moe_gen", ropes[1])

        heard_und, heard_gen, kept = [], [], []
        u = g = 0                                                                              # first rows of the group
        for (count, n, N), (past_k, past_v) in zip(shapes, past):
            def images(rows, start, length):                                    # [R, heads, d] -> [B, heads, length, d]
                return rows[start:start + count * length].unflatten(0, (count, length)).transpose(1, 2)

            keys, values = [images(k_und, u, n)], [images(v_und, u, n)]
            if past_k is not None:
                keys, values = [past_k] + keys, [past_v] + values
            if N:
                keys, values = keys + [images(k_gen, g, N)], values + [images(v_gen, g, N)]
            keys = torch.cat(keys, dim=2) if len(keys) > 1 else keys[0]                           # [B, K, S + n + N, d]
            values = torch.cat(values, dim=2) if len(values) > 1 else values[0]
            if keep:
                kept.append((keys, values))
            # The order of the keys inside an image block (start, end, latents instead of start, latents, end) does not
            # matter: there is no mask and the position is the same for all of them.
            if out_und:
                with torch.set_grad_enabled(und_graph):
                    heard_und.append(attend(images(q_und, u, n), keys, values, causal))
            if N and out_gen:
                heard_gen.append(attend(images(q_gen, g, N), keys, values, False))
            u, g = u + count * n, g + count * N

        with torch.set_grad_enabled(und_graph):
            und = self.finish(und, torch.cat(heard_und), "") if out_und else None
        gen = self.finish(gen, torch.cat(heard_gen), "_moe_gen") if gen is not None and out_gen else None
        return und, gen, kept if keep else None


class PositionTable(nn.Module):
    """The fixed sine-cosine table [side * side, D]: half of the channels say the column, half the row; sines, then
    cosines. The files hold it; the original drops what they hold and computes it anew, in double precision, as we do.
    """

    def __init__(self, side, width):
        super().__init__()
        self.side, self.width = side, width
        self.register_buffer("pos_embed", torch.empty(side * side, width))
        self.fill()

    def fill(self, device=None):
        """Computes the table (again): on `device`, or where it is. A table on the meta device stays there."""
        device = device or self.pos_embed.device
        if torch.device(device).type != "meta":
            quarter = self.width // 4
            angles = np.arange(self.side)[:, None] * 10000.0 ** (-np.arange(quarter) / quarter)          # [side, D / 4]
            axis = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()    # [side, D / 2]
            self.pos_embed = torch.cat([axis.repeat(self.side, 1), axis.repeat_interleave(self.side, 0)], 1).to(device)

    def forward(self, height, width):
        """-> [height * width, D], row-major. No interpolation: a small image uses the top left corner of the table."""
        if max(height, width) > self.side:
            raise common.InputError(f"an image of {height} x {width} tokens exceeds the position table of "
                                    f"{self.side} x {self.side}: use smaller images")
        return self.pos_embed.view(self.side, self.side, -1)[:height, :width].flatten(0, 1)


class Context:
    """What a group of images of equal shape has said so far: their places in the batch; keys and values [B, K, S, d] of
    each layer; `position` is the next free rotary position (an image takes one, a text one a token)."""

    def __init__(self, images, layers):
        self.images, self.position = list(images), 0
        self.kept = [(None, None)] * layers

    def fork(self, shift=0):
        """A copy that can be continued separately (tensors are shared, never written). shift: added to the places."""
        other = copy.copy(self)
        other.kept, other.images = list(self.kept), [i + shift for i in self.images]
        return other

    def seen_from_the_latents(self, config):
        """The copy that the noisy block reads: keys turned back by `position`, so that the block itself stands at 0."""
        other = self.fork()
        if self.position and self.kept[0][0] is not None:
            cos, sin = rotary(torch.tensor([-self.position], device=self.kept[0][0].device), config)
            other.kept = [(turn(keys, cos, sin), values) for keys, values in self.kept]
        other.position = 0
        return other


def generates(name):
    """Whether a weight belongs to generation: what RecA trains."""
    return "_moe_gen" in name or name.startswith(("time_embedder.", "vae2llm.", "llm2vae."))


def groups(shapes, layers):
    """One empty Context per different shape. shapes: one sortable key an image; equal keys share every dense call."""
    return [Context([i for i, s in enumerate(shapes) if s == shape], layers) for shape in sorted(set(shapes))]


# ---- files of the release ----------------------------------------------------------------------------

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
LLM_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "rms_norm_eps", "rope_theta")
VIT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
              "patch_size")
OWN_FIELDS = ("vae_limits", "vit_limits", "edit_limits", "image_size", "bos_token_id", "eos_token_id", "start_of_image",
              "end_of_image")


def read_config(folder):
    """llm_config.json, vit_config.json and, where it says something, config.json -> BagelConfig."""
    llm, vit = (common.read_json(folder / name) for name in ("llm_config.json", "vit_config.json"))
    rest = common.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    values = {k: llm[k] for k in LLM_FIELDS if k in llm} | {f"vit_{k}": vit[k] for k in VIT_FIELDS if k in vit}
    if "num_hidden_layers" in vit:
        values["vit_num_hidden_layers"] -= 1                    # the last layer is never built, see BagelConfig
    values |= {k: rest[k] for k in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side") if k in rest}
    values |= {f"vae_{k}": v for k, v in rest.get("vae_config", {}).items()}
    values |= rest.get("reca", {})
    known = {f.name for f in fields(BagelConfig)}
    return BagelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def write_config(c, folder):
    """The inverse, such that the original reads its files too. What it keeps in code stands under "reca"."""
    llm = {k: getattr(c, k) for k in LLM_FIELDS}
    llm |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "tie_word_embeddings": False, "bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id}
    vit = {k: getattr(c, f"vit_{k}") for k in VIT_FIELDS}
    vit |= {"num_hidden_layers": c.vit_num_hidden_layers + 1, "model_type": "siglip_vision_model"}
    rest = {"architectures": ["BagelForConditionalGeneration"], "latent_patch_size": c.latent_patch_size,
            "max_latent_size": c.max_latent_size, "vit_max_num_patch_per_side": c.vit_max_num_patch_per_side,
            "vae_config": {k[4:]: v for k, v in asdict(c).items() if k.startswith("vae_") and k != "vae_limits"},
            "reca": {k: getattr(c, k) for k in OWN_FIELDS}}
    for name, values in (("llm_config.json", llm), ("vit_config.json", vit), ("config.json", rest)):
        (Path(folder) / name).write_text(json.dumps(values, indent=2))


def vae_names(vae):
    """{our name of a VAE weight (diffusers'): its name in ae.safetensors (FLUX's)}. Only names differ, and FLUX numbers
    the decoder's levels from the finest, diffusers in the order in which they run."""
    names, last = {}, len(vae.config.block_out_channels) - 1
    words = {"down_blocks": "down", "resnets": "block", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
             "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1",
             "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for key in vae.state_dict():
        name = re.sub(r"up_blocks\.(\d)", lambda level: f"up.{last - int(level[1])}", key)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda block: f"mid.block_{int(block[1]) + 1}", name)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        names[f"vae.{key}"] = name
    return names


def fit(width, height, longest, shortest, stride, max_pixels=14 * 14 * 9 * 1024):
    """The size that both encoders want: sides multiples of `stride`, the long one at most `longest`, the short one at
    least `shortest`. Where both cannot be had the long side wins: 1024 x 768 at 224 / 224 gives 224 x 168.

    Above max_pixels the original multiplies the sides by the ratio of the *areas*, not its root. At 1024 / 512 and 980
    / 224 the bound is never reached; we follow it so that other limits give the same sizes as there.
    """
    def scaled(w, h, scale):
        return tuple(max(stride, round(round(side * scale) / stride) * stride) for side in (w, h))

    w, h = scaled(width, height, max(min(longest / max(width, height), 1.0), shortest / min(width, height)))
    if w * h > max_pixels:
        w, h = scaled(w, h, max_pixels / (w * h))
    if max(w, h) > longest:
        w, h = scaled(w, h, longest / max(w, h))
    return w, h


class Bagel(nn.Module):
    """BAGEL, named as in the release: state_dict() without `vae.` has the 1223 keys of ema.safetensors."""

    condition = "vit"   # what RecA conditions on; "vae" is the paper's Table 7 (set for the whole class by --condition)

    def __init__(self, config=BagelConfig()):
        super().__init__()
        c = self.config = config
        width = c.hidden_size
        self.language_model = nn.ModuleDict({
            "model": nn.ModuleDict({
                "embed_tokens": nn.Embedding(c.vocab_size, width),
                "layers": nn.ModuleList(MoTLayer(c) for _ in range(c.num_hidden_layers)),
                "norm": RMSNorm(width, c.rms_norm_eps), "norm_moe_gen": RMSNorm(width, c.rms_norm_eps)}),
            "lm_head": nn.Linear(width, c.vocab_size, bias=False)})
        vit = SiglipVisionConfig(hidden_size=c.vit_hidden_size, intermediate_size=c.vit_intermediate_size,
                                 num_attention_heads=c.vit_num_attention_heads, hidden_act="gelu_pytorch_tanh",
                                 layer_norm_eps=1e-6, attn_implementation="sdpa")
        # transformers' SigLIP tower wants square images of one size and a convolution; its layers serve images of any
        # size. The patch embedding is a Linear in the checkpoint: a patch is flattened as (row, column, channel).
        positions = (c.vit_image_size // c.vit_patch_size) ** 2
        self.vit_model = nn.ModuleDict({"vision_model": nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "patch_embedding": nn.Linear(3 * c.vit_patch_size ** 2, c.vit_hidden_size),
                "position_embedding": nn.Embedding(positions, c.vit_hidden_size)}),
            "encoder": nn.ModuleDict({
                "layers": nn.ModuleList(SiglipEncoderLayer(vit) for _ in range(c.vit_num_hidden_layers))}),
            "post_layernorm": nn.LayerNorm(c.vit_hidden_size, eps=1e-6)})})
        self.connector = nn.ModuleDict({"fc1": nn.Linear(c.vit_hidden_size, width), "fc2": nn.Linear(width, width)})
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
        # what a run may change
        self.tokenizer, self.und_size = None, min(UND_SIZE, c.vit_limits[0])
        self.text_dropout, self.timestep_shift, self.blur = TEXT_DROPOUT, TIMESTEP_SHIFT, 0
        self.freeze()

    def freeze(self, train_und=False):
        """What RecA trains: everything named _moe_gen, the time MLP and the two projections of the latents.
        train_und=True opens the rest of the language model (pretraining of `tiny`; the fixture `recon_unfrozen`)."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(generates(name) or train_und and name.startswith("language_model."))
        for layer in self.blocks():
            layer.train_und = train_und
        return self

    @property
    def device(self):
        return self.latent_pos_embed.pos_embed.device

    def blocks(self):
        """The repeated layers, for activation checkpointing, compilation and sharding."""
        return list(self.language_model["model"]["layers"])

    def parameter_groups(self, weight_decay):
        """AdamW groups of exactly the parameters that are trained. The original decays all of them alike, by 0."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "weight_decay": weight_decay}]

    # ---- one block of a sequence through the decoder -----------------------------------------------------

    def _block(self, contexts, und, gen=None, causal=False, rotate=True, keep=True, read=None):
        """Run one block of every image. und: per context [B, n, D]; gen: per context [B, N, D], or None.

        rotate: the rows stand at the contexts' position (an image block) or from there on (causal); False: at position
        0. keep: the contexts are extended by this block. read: "und" or "gen" to get these rows after the final norm,
        per context.
        """
        model, layers = self.language_model["model"], self.blocks()
        shapes = [(u.shape[0], u.shape[1], gen[i].shape[1] if gen is not None else 0) for i, u in enumerate(und)]
        ropes = [None, None]
        if rotate:
            def tables(k):                                     # k: 1 for the und rows of a shape, 2 for its gen rows
                rows = [(c.position + (torch.arange(s[k]) if causal else torch.zeros(s[k]))).repeat(s[0])
                        for c, s in zip(contexts, shapes)]
                return rotary(torch.cat(rows).to(self.device), self.config)
            ropes = [tables(1), tables(2) if gen is not None else None]
        und = torch.cat([u.flatten(0, 1) for u in und])                                                       # [R, D]
        gen = torch.cat([g.flatten(0, 1) for g in gen]) if gen is not None else None
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            und, gen, kept = layer(und, gen, [c.kept[i] for c in contexts], shapes, ropes, causal, keep,
                                   out_und=not last or read == "und", out_gen=not last or read == "gen")
            if keep:
                for context, pair in zip(contexts, kept):
                    context.kept[i] = pair
        if keep:
            for context, shape in zip(contexts, shapes):
                context.position += shape[1] if causal else 1
        if read is None:
            return None
        rows = model["norm"](und) if read == "und" else model["norm_moe_gen"](gen)
        lengths = [s[0] * s[1 if read == "und" else 2] for s in shapes]
        return [part.unflatten(0, (s[0], -1)) for part, s in zip(rows.split(lengths), shapes)]

    def _words(self, ids):
        """Token ids (nested list) -> embeddings [..., D]."""
        return self.language_model["model"]["embed_tokens"](torch.as_tensor(ids, device=self.device))

    def _markers(self, count):
        """-> [count, 2, D]: the start and the end marker of an image block."""
        return self._words([[self.config.start_of_image, self.config.end_of_image]] * count)

    def _embed_vit(self, vit):
        """vit [B, rows, columns, width of the ViT] -> [B, M, D]: the understanding embeddings."""
        x = vit.flatten(1, 2).to(self.connector["fc1"].weight.dtype)
        x = self.connector["fc2"](F.gelu(self.connector["fc1"](x), approximate="tanh"))
        return x + self.vit_pos_embed(*vit.shape[1:3]).to(x.dtype)

    def _embed_time(self, t):
        """t [B] in [0, 1] -> [B, D], once per image. The sinusoid takes t itself (not 1000 t), cosines first."""
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)  # [B, 128]
        return self.time_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], -1).to(self.vae2llm.weight.dtype))

    def _embed_latents(self, x, grid, t):
        """x [B, N, C], t [B] -> [B, N, D]."""
        x = self.vae2llm(x.to(self.vae2llm.weight.dtype))
        return x + self._embed_time(t)[:, None].to(x.dtype) + self.latent_pos_embed(*grid).to(x.dtype)

    # ---- what extends a context --------------------------------------------------------------------------

    def _read_vit(self, contexts, vits):
        """A ViT block for every image: start, patches, end; one rotary position, everybody sees everybody."""
        rows = []
        for context in contexts:
            patches = self._embed_vit(torch.stack([vits[i] for i in context.images]))
            marks = self._markers(len(context.images))
            rows.append(torch.cat([marks[:, :1], patches.to(marks.dtype), marks[:, 1:]], dim=1))         # [B, M + 2, D]
        self._block(contexts, rows)

    def _read_text(self, contexts, ids, read=None):
        """A text block for every image: begin, ids, end; causal. ids: per image, markers included; empty: no block."""
        contexts = [c for c in contexts if ids[c.images[0]]]
        if contexts:
            words = [self._words([ids[i] for i in c.images]) for c in contexts]
            return self._block(contexts, words, causal=True, read=read)
        if dist.is_initialized():
            # Every text of this rank was dropped. Under FSDP the others gather the layers' weights for theirs: join in.
            self._block([Context([0], len(self.blocks()))], [self._words([[self.config.bos_token_id]])], keep=False)

    def _read_latents(self, contexts, latents, grids):
        """A clean image for every context: t = 0, generation expert, everybody sees everybody."""
        und = [self._markers(len(c.images)) for c in contexts]
        gen = [self._embed_latents(torch.stack([latents[i] for i in c.images]), grids[c.images[0]],
                                   torch.zeros(len(c.images), device=self.device)) for c in contexts]
        self._block(contexts, und, gen)

    def _velocity(self, contexts, x, grids, t):
        """The noisy block: x list of [N, C] (an image each), t [images] -> list of velocities [N, C].

        contexts as seen_from_the_latents. Nothing is kept: the block is computed anew for every x.
        """
        und = [self._markers(len(c.images)) for c in contexts]
        gen = [self._embed_latents(torch.stack([x[i] for i in c.images]), grids[c.images[0]], t[c.images])
               for c in contexts]
        rows = self._block(contexts, und, gen, rotate=False, keep=False, read="gen")
        out = [None] * len(x)
        for context, velocity in zip(contexts, rows):
            for i, v in zip(context.images, self.llm2vae(velocity)):
                out[i] = v
        return out

    # ---- the frozen encoders -----------------------------------------------------------------------------

    def _vit(self, pixels):
        """pixels [B, 3, height, width], sides divisible by the patch -> [B, rows, columns, width of the ViT]."""
        p, vit = self.config.vit_patch_size, self.vit_model["vision_model"]
        rows, columns, side = pixels.shape[2] // p, pixels.shape[3] // p, self.config.vit_max_num_patch_per_side
        # [B, 3, rows, p, columns, p] -> [B, rows * columns, p * p * 3]
        x = pixels.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        ids = torch.arange(rows, device=x.device)[:, None] * side + torch.arange(columns, device=x.device)
        patch, position = vit["embeddings"].values()
        x = patch(x.to(patch.weight.dtype)) + position(ids.flatten())
        for layer in vit["encoder"]["layers"]:
            x = layer(x, None)
        return vit["post_layernorm"](x).unflatten(1, (rows, columns))

    def _moments(self, pixels):
        """pixels [B, 3, height, width] in [-1, 1] -> mean and logvar [B, 16, height / 8, width / 8], float32."""
        # (channels_last would save a quarter of this on a CPU, but GroupNorm is inexact there: 1e-4 of the latents if
        # a picture has flat regions, measured with the fixture `mixed`.)
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    def _latent(self, mean, logvar, noise):
        """A sample of the posterior, normalised. RecA draws it anew at every step."""
        c = self.config
        return c.vae_scale_factor * (mean + (0.5 * logvar).exp() * noise - c.vae_shift_factor)

    def _tokens(self, latent):
        """latent [16, 2 h, 2 w] -> [h * w, C], a token holding (row, column, channel) of its patch."""
        p = self.config.latent_patch_size
        h, w = latent.shape[1] // p, latent.shape[2] // p
        # [16, h p, w p] -> [16, h, p, w, p] -> [h, w, p, p, 16]
        x = latent[:, :h * p, :w * p].unflatten(2, (w, p)).unflatten(1, (h, p)).permute(1, 3, 2, 4, 0)
        return x.flatten(2).flatten(0, 1)

    def _untokens(self, tokens, grid):
        """[h * w, C] -> latent [16, 2 h, 2 w], the inverse of _tokens."""
        p, (h, w) = self.config.latent_patch_size, grid
        return tokens.view(h, w, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, h * p, w * p)

    @torch.no_grad()
    def _decode(self, latents):
        """List of latents [16, h, w] -> list of pixels [3, 8 h, 8 w] in about [-1, 1]."""
        c = self.config
        latents = [(z[None] / c.vae_scale_factor + c.vae_shift_factor).to(self.vae.dtype) for z in latents]
        return [self.vae.decode(z).sample[0].float() for z in latents]

    # ==================================================================================================
    # 3. Loading and saving
    # ==================================================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, frozen_dtype=None):
        """source: ByteDance-Seed/BAGEL-7B-MoT, sanaka87/BAGEL-RecA, a folder in that layout, or tiny (random weights).

        dtype: precision of the weights that RecA trains; frozen_dtype: of all others (default: bf16 on a GPU, else
        dtype), except the VAE, which stays in float32 as it is released (0.3 GB). Every tensor goes from the file to
        its device by itself, in its final precision: the host never holds a copy of the model (the original builds two
        float32 copies per process, 117 GB each). Strict in names and shapes, except that the two position tables may be
        missing. Raises InputError.
        """
        device = torch.device(device)
        if source == "tiny":
            return cls.random(source, device, dtype)
        frozen_dtype = frozen_dtype or (torch.bfloat16 if device.type == "cuda" else dtype)
        small, names = ["*.json", "*.txt", "ae.safetensors"], ["ema.safetensors", "model_bf16.safetensors"]
        folder = base = common.hub_folder(source, small + names)
        weights = next((folder / name for name in names if (folder / name).exists()), None)
        if weights is None:
            raise common.InputError(f"{folder} holds neither {' nor '.join(names)}: not a BAGEL checkpoint")
        if not (folder / "llm_config.json").exists():      # BAGEL-RecA has only weights; the rest is the base model's
            base = common.hub_folder(DEFAULT, small)
        with torch.device("meta"):
            model = cls(read_config(base))
        model.freeze()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        model._read(weights, {name: name for name in model.state_dict() if not name.startswith("vae.")},
                    lambda name: dtype if name in trained else frozen_dtype, device, optional=TABLES)
        model._read(base / "ae.safetensors", vae_names(model.vae), lambda name: torch.float32, device)
        for table in (model.latent_pos_embed, model.vit_pos_embed):
            table.fill(device)
        if (base / "tokenizer_config.json").exists() or (base / "tokenizer.json").exists():
            model.tokenizer = AutoTokenizer.from_pretrained(base)
            model._take_ids()
        return model.eval()

    @classmethod
    def random(cls, name, device="cpu", dtype=None):
        """Random weights, built on the device: for tiny, and for --bench, which downloads nothing. Any name but "tiny"
        means the released sizes. dtype: of the trained weights, default float32; the frozen ones are bf16 on a GPU."""
        device = torch.device(device)
        tokenizer = common.tiny_tokenizer(MARKERS)
        config = replace(TINY, vocab_size=len(tokenizer)) if name == "tiny" else BagelConfig()
        with torch.device("meta"):
            model = cls(config)
        for key, parameter in model.named_parameters():
            exact = parameter.requires_grad or device.type != "cuda" or key.startswith("vae.")
            parameter.data = parameter.data.to((dtype or torch.float32) if exact else torch.bfloat16)
        model.to_empty(device=device)
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or key == "llm2vae.weight":      # the latter as the original starts its pretraining
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:                                             # norms
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for table in (model.latent_pos_embed, model.vit_pos_embed):
            table.fill(device)
        model.tokenizer = tokenizer
        model._take_ids()
        return model.eval()

    def _read(self, path, names, dtype, device, optional=()):
        """File `path` into this model: names maps our names to the file's. dtype: function of our name."""
        own, state = self.state_dict(), {}
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
                # The 1 x 1 convolutions of the VAE's attention are linears in diffusers: [out, in, 1, 1] -> [out, in].
                flat = {key: shape[:2] if shape[2:] == [1, 1] else shape for key, shape in shapes.items()}
                missing = [key for key in names.values() if key not in shapes and key not in optional]
                wrong = [key for name, key in names.items() if key in shapes
                         and list(own[name].shape) not in (shapes[key], flat[key])]
                for what, keys in (("lacks", missing), ("has unexpected", sorted(shapes.keys() - set(names.values()))),
                                   ("has other shapes for", wrong)):
                    if keys:
                        raise common.InputError(f"{path} {what} {len(keys)} keys: {', '.join(keys[:4])}"
                                                + (" ..." if len(keys) > 4 else ""))
                for name, key in names.items():
                    if key not in optional:                                        # those are computed: PositionTable
                        state[name] = file.get_tensor(key).to(dtype(name)).view(own[name].shape)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise common.InputError(f"cannot read {path}: {str(error).splitlines()[0][:200]}") from error
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        self.load_state_dict(state, strict=False, assign=True)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)

    def _take_ids(self):
        for name, token in zip(("bos_token_id", "eos_token_id", "start_of_image", "end_of_image"), MARKERS):
            setattr(self.config, name, self.tokenizer.convert_tokens_to_ids(token))
            if getattr(self.config, name) in (None, self.tokenizer.unk_token_id):
                raise common.InputError(f"the tokenizer does not know {token}: not BAGEL's")

    def save_pretrained(self, folder, dtype=None):
        """Writes the released layout: ema.safetensors (with the tables), ae.safetensors (FLUX's names), configs.

        dtype: of ema.safetensors; None keeps the precision, torch.bfloat16 gives the 29 GB file that ComfyUI-BAGEL
        (models/bagel/BAGEL-7B-MoT/ema.safetensors) and the original inferencer expect. Sharded weights are gathered one
        by one; all ranks must call, rank 0 writes.
        """
        folder, state = Path(folder), {}
        names = vae_names(self.vae)
        for name, tensor in self.state_dict().items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if common.world()[0] == 0:
                target = tensor.dtype if name in names or dtype is None else dtype
                state[name] = tensor.detach().to("cpu", target).contiguous()
        if common.world()[0] != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        vae = {key: state.pop(name) for name, key in names.items()}
        vae = {key: t[:, :, None, None] if t.dim() == 2 else t for key, t in vae.items()}
        save_file(state, folder / "ema.safetensors", {"format": "pt"})
        save_file({key: t.contiguous() for key, t in vae.items()}, folder / "ae.safetensors", {"format": "pt"})
        write_config(self.config, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    # ==================================================================================================
    # 4. The embedding-conditioned prompt
    # ==================================================================================================
    #   (start) ViT patches (end)  (begin) template (end)  (start) noisy latents (end)
    # No system text, no roles, no question mark: the template stands where a question about the image would stand, and
    # the picture where a caption would be answered.

    def set_und(self, size=None, blur=None):
        """The paper's ablations: the side of what the ViT sees, and blurring it. Raises InputError."""
        p, most = self.config.vit_patch_size, self.config.vit_max_num_patch_per_side * self.config.vit_patch_size
        if size and not p <= size <= most:
            raise common.InputError(f"--und-size {size}: this ViT sees {p} to {most} pixels")
        self.und_size, self.blur = size or self.und_size, blur or self.blur

    def _resized(self, image, limits, stride):
        return image.resize(fit(*image.size, *limits, stride), Image.BICUBIC)

    def preprocess(self, image, task, rng=None):
        """PIL RGB (None: a text without image) -> {"vit": [3, h, w], "vae": [3, H, W]} in [-1, 1], as the task needs.

        recon: the ViT sees the photo at und_size, the VAE at 512 to 1024; t2i: VAE only; i2t: ViT only, at 224 to 980.
        Sizes follow the photo, nothing is cropped, so rng is not used. (recon takes both even with condition = "vae":
        the cache serves either.)
        """
        c, pixels = self.config, {}
        if image is None:
            return pixels
        if task != "t2i":
            limits = (self.und_size, self.und_size) if task == "recon" else c.vit_limits
            pixels["vit"] = common.to_tensor(self._resized(image, limits, c.vit_patch_size))
            if self.blur > 1 and task == "recon":
                small = F.interpolate(pixels["vit"][None], scale_factor=1 / self.blur, mode="bilinear")
                pixels["vit"] = F.interpolate(small, size=pixels["vit"].shape[1:], mode="bilinear")[0]
        if task != "i2t":
            pixels["vae"] = common.to_tensor(self._resized(image, c.vae_limits, c.stride))
        return pixels

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen encoders say: list of preprocess() -> list of {"vit": [rows, columns, width of the ViT],
        "mean": [16, h, w], "logvar": [16, h, w]}, as far as the pixels are there: 2.7 MB for a photo of 1024 px.

        Images of one size are encoded together. (The original zero-pads a pack to one size *before* the VAE: grey
        borders leak into the latents through GroupNorm and attention. We do not; the test `mixed` shows that the rest
        of the step is the same.)
        """
        out = [{} for _ in samples]
        for kind, encoder, names in (("vit", self._vit, ("vit",)), ("vae", self._moments, ("mean", "logvar"))):
            by_size = {}
            for i, sample in enumerate(samples):
                if kind in sample:
                    by_size.setdefault(sample[kind].shape, []).append(i)
            # As many at a time as make 512 x 512 pixels: a larger image fills a GPU alone, and the VAE's first layers
            # are wide (0.27 GB each at 1024 px, in bf16).
            chunks = [places[k:k + step] for shape, places in by_size.items()
                      for step in [max(1, 2 ** 18 // (shape[1] * shape[2]))] for k in range(0, len(places), step)]
            for places in chunks:
                result = encoder(torch.stack([samples[i][kind] for i in places]).to(self.device))
                for name, values in zip(names, result if isinstance(result, tuple) else (result,)):
                    for i, value in zip(places, values):
                        out[i][name] = value
        return out

    def _text_ids(self, text):
        """A text block: begin, ids, end."""
        if self.tokenizer is None:
            raise common.InputError("this checkpoint has no tokenizer: put tokenizer.json into its folder")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.config.bos_token_id, *ids, self.config.eos_token_id]

    def _contexts(self, lengths, vits=None, grids=None):
        """Empty contexts, one per different (ViT grid, text length, latent grid). A part: a value an image, or None."""
        parts = [[tuple(v.shape[:2]) if v is not None else () for v in vits] if vits else None, lengths, grids]
        parts = [part if part is not None else [()] * len(lengths) for part in parts]
        return groups(list(zip(*parts)), len(self.blocks()))

    # ==================================================================================================
    # 5. The losses
    # ==================================================================================================

    def draw(self, features, rng=None):
        """Every random number of a generation loss, one entry per image, on the CPU: text_kept (bool), timestep_normal,
        vae_noise and condition_noise [16, h, w], flow_noise [N, C]."""
        rng = rng or common.Rng.fresh(len(features))
        draws = {name: [] for name in ("text_kept", "timestep_normal", "vae_noise", "condition_noise", "flow_noise")}
        for f, g in zip(features, rng.images):
            shape, (h, w) = f["mean"].shape, self._grid(f["mean"])
            draws["text_kept"].append(bool(torch.rand((), generator=g) >= self.text_dropout))
            draws["timestep_normal"].append(torch.randn((), generator=g))
            draws["vae_noise"].append(torch.randn(shape, generator=g))
            draws["flow_noise"].append(torch.randn(h * w, self.config.latent_dim, generator=g))
            draws["condition_noise"].append(torch.randn(shape, generator=g) if self.condition == "vae" else None)
        return draws

    def _grid(self, latent):
        """latent [16, h, w] -> its tokens' (rows, columns)."""
        return tuple(side // self.config.latent_patch_size for side in latent.shape[1:])

    def _sampled(self, features, noises):
        """A sample of each posterior, as tokens [N, C]."""
        return [self._tokens(self._latent(f["mean"], f["logvar"], n.to(self.device))) for f, n in zip(features, noises)]

    def _flow_terms(self, features, ids, draws, condition):
        """The rectified flow of one batch: -> (velocities, targets, timesteps), lists of [N, C] and a tensor [B].

        x_t = (1 - t) z + t noise, target noise - z, t = sigmoid of a normal, shifted. ids: text blocks with markers ([]
        = dropped). condition: "vit" (RecA), "vae" (Table 7: the clean latents instead), None (text to image).
        """
        noises = [noise.to(self.device) for noise in draws["flow_noise"]]
        latents = self._sampled(features, draws["vae_noise"])
        grids = [self._grid(f["mean"]) for f in features]
        vits = [f["vit"] for f in features] if condition == "vit" else None
        contexts = self._contexts([len(i) for i in ids], vits, grids)
        if condition == "vit":
            self._read_vit(contexts, vits)
        elif condition == "vae":
            self._read_latents(contexts, self._sampled(features, draws["condition_noise"]), grids)
        self._read_text(contexts, ids)
        contexts = [c.seen_from_the_latents(self.config) for c in contexts]
        t = torch.stack([torch.as_tensor(u) for u in draws["timestep_normal"]]).to(self.device).sigmoid()
        t = self.timestep_shift * t / (1 + (self.timestep_shift - 1) * t)
        x = [(1 - ti) * z + ti * noise for ti, z, noise in zip(t, latents, noises)]
        return self._velocity(contexts, x, grids, t), [noise - z for z, noise in zip(latents, noises)], t

    def _flow_loss(self, features, ids, draws, condition):
        velocities, targets, _ = self._flow_terms(features, ids, draws, condition)
        total = sum((v.float() - target).square().mean(-1).sum() for v, target in zip(velocities, targets))
        return common.global_mean(total, sum(len(v) for v in velocities))

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA (paper, equation 2): paint the image that these understanding embeddings describe.

        features: encode(.., "recon"), one dict an image; templates: one text each; draws: see draw(). Returns a scalar:
        squared error of the velocity, mean over 64 channels and over all latent tokens of all ranks, so large images
        weigh more (as in the original).
        """
        draws = draws or self.draw(features, rng)
        ids = [self._text_ids(t) if kept else [] for t, kept in zip(templates, draws["text_kept"])]
        return self._flow_loss(features, ids, draws, self.condition)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image: caption, noisy latents. RecA does not use it (lambda_t2i = 0): supervised fine-tuning."""
        draws = draws or self.draw(features, rng)
        ids = [self._text_ids(t) if kept else [] for t, kept in zip(captions, draws["text_kept"])]
        return self._flow_loss(features, ids, draws, None)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Cross-entropy of the answers' tokens: ViT block, then a text block per question and per answer, all causal.

        In RecA the understanding expert is frozen, so this is a measure and has no gradient; freeze(train_und=True)
        gives it one. features without "vit" are texts without an image. The loss is the mean over all answer tokens
        (end marker included) of all ranks.
        """
        ids, labels = [], []
        for turns in conversations:
            ids.append([])
            labels.append([])
            for question, answer in turns:
                for text, learn in ((question, False), (answer, True)):
                    block = self._text_ids(text) if text else []
                    # row j predicts id j + 1 of its block; the end marker predicts nothing
                    labels[-1] += [i if learn else -100 for i in block[1:]] + [-100] * bool(block)
                    ids[-1] += block
        return self._answer_loss([f.get("vit") for f in features], ids, labels)

    def _answer_loss(self, vits, ids, labels):
        contexts = self._contexts([len(i) for i in ids], vits)
        with_image = [c for c in contexts if vits[c.images[0]] is not None]
        if with_image:
            self._read_vit(with_image, vits)
        rows = self._read_text(contexts, ids, read="und")
        total, count = 0.0, 0
        for context, hidden in zip(contexts, rows):                                                   # hidden [B, L, D]
            target = torch.tensor([labels[i] for i in context.images], device=self.device)
            keep = target != -100
            logits = self.language_model["lm_head"](hidden[keep])                      # only the rows that are asked
            total = total + F.cross_entropy(logits.float(), target[keep], reduction="sum")
            count += int(keep.sum())
        return common.global_mean(total, count)

    # ==================================================================================================
    # 6. Inference
    # ==================================================================================================

    @staticmethod
    def _guide(v, v_text, v_image, text_scale, image_scale, renorm, renorm_min):
        """Guidance of one image, [N, C] each. v_text: velocity without the last text; v_image: without images, or None.

        A guided velocity is too long; `renorm` shrinks it back to |v|: "global" one factor an image (the original takes
        one factor a *batch*, so that there a batch changes its images), "channel" one a token, "text_channel" one a
        token after the text guidance and before the image guidance. The factor stays in [renorm_min, 1]: renorm_min = 1
        switches it off.
        """
        def shrink(w):
            axes = (0, 1) if renorm == "global" else -1
            length = [torch.linalg.vector_norm(y, dim=axes, keepdim=True) for y in (v, w)]
            return w * (length[0] / (length[1] + 1e-8)).clamp(renorm_min, 1.0)

        w = v_text + text_scale * (v - v_text)
        if renorm == "text_channel":
            w = shrink(w)
        if v_image is not None:
            w = v_image + image_scale * (w - v_image)
        return w if renorm == "text_channel" else shrink(w)

    @torch.no_grad()
    def _sample(self, contexts, text_free, image_free, grids, noise, *, num_steps, timestep_shift, guidance_scale,
                image_guidance_scale, interval, renorm, renorm_min, progress=False, trace=None):
        """Euler steps of the flow from noise (t = 1) to latents (t = 0): list of [N, C] in and out.

        The three context sets (with everything, without the last text, without images) were read once. At a guided step
        the three passes share their rows and run as one batch; each stands at the position of its own context, which
        seen_from_the_latents takes care of. num_steps 50 gives 49 evaluations, as in the original. trace: a list that
        gets (t, x, velocity, both scales) of every step.
        """
        if renorm not in ("global", "channel", "text_channel"):
            raise common.InputError(f"unknown renormalisation {renorm}: global, channel or text_channel")
        count, x = len(grids), [n.to(self.device) for n in noise]
        sets = [[c.seen_from_the_latents(self.config).fork(k * count) for c in each]
                for k, each in enumerate((contexts, text_free, image_free))]
        times = torch.linspace(1, 0, num_steps)
        times = timestep_shift * times / (1 + (timestep_shift - 1) * times)
        steps = list(zip(times[:-1].tolist(), times[1:].tolist()))
        for t, after in tqdm(steps, disable=not progress, desc="sample", leave=False):
            # A text scale of 1 or less switches all guidance off, the image one too, as in the original.
            guided = interval[0] < t <= interval[1] and guidance_scale > 1
            passes = 1 + guided + (guided and image_guidance_scale > 1)
            now = torch.full((count * passes,), t, device=self.device)
            v = [vi.float() for vi in self._velocity(sum(sets[:passes], []), x * passes, grids * passes, now)]
            if guided:
                v = (v + [None] * count)[:3 * count]                                  # two or three velocities an image
                v = [self._guide(*v[i::count], guidance_scale, image_guidance_scale, renorm, renorm_min)
                     for i in range(count)]
            if trace is not None:
                trace.append((t, x, v, (guidance_scale, image_guidance_scale) if guided else (1.0, 1.0)))
            x = [xi - vi * (t - after) for xi, vi in zip(x, v)]
        return x

    @staticmethod
    def _generators(seed, count, purpose=""):
        """One generator per image: an image's draws depend on its own seed, not on what shares its batch."""
        seeds = seed if isinstance(seed, (list, tuple)) else [common.stable_seed(seed, i) for i in range(count)]
        return [torch.Generator().manual_seed(common.stable_seed(s, purpose)) for s in seeds]

    def _paint(self, contexts, text_free, image_free, grids, seed, draws, **sampler):
        """Contexts -> PIL images. draws: {"noise": [N, C] per image}, or None: from the seed."""
        noise = draws["noise"] if draws and "noise" in draws else [
            torch.randn(h * w, self.config.latent_dim, generator=g)
            for (h, w), g in zip(grids, self._generators(seed, len(grids)))]
        latents = self._sample(contexts, text_free, image_free, grids, noise, **sampler)
        # (x / 2 + 1 / 2) clamped, times 255, truncated: BAGEL's rounding
        return [Image.fromarray(((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())
                for pixels in self._decode([self._untokens(z, g) for z, g in zip(latents, grids)])]

    def _target_grid(self, size):
        """(height, width) in pixels, or one side -> (rows, columns) of latent tokens. Raises InputError."""
        height, width = (size, size) if isinstance(size, int) else size
        s, most = self.config.stride, self.config.stride * self.config.max_latent_size
        if height % s or width % s or not 0 < height <= most or not 0 < width <= most:
            raise common.InputError(f"an image of {height} x {width} cannot be painted: sides must be multiples "
                                    f"of {s}, at most {most}")
        return height // s, width // s

    @torch.no_grad()
    def generate(self, prompts, *, seed=0, draws=None, size=None, **sampler):
        """Text to image: texts -> PIL images of `size` (one side, or (height, width); default 1024 pixels).

        seed: one, or one per image. sampler: what differs from GENERATE; progress=True shows a bar. The guidance's
        text-free context is empty, its latents stand at position 0.
        """
        grid = self._target_grid(self.config.image_size if size is None else size)
        return self._generate([self._text_ids(p) for p in prompts], grid, seed, draws, **GENERATE | sampler)

    def _generate(self, ids, grid, seed, draws, **sampler):
        contexts = self._contexts([len(i) for i in ids])
        self._read_text(contexts, ids)
        empty = [Context(range(len(ids)), len(self.blocks()))]
        return self._paint(contexts, empty, [], [grid] * len(ids), seed, draws, **sampler)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, seed=0, draws=None, size=None, **sampler):
        """Image to image through the understanding embeddings alone (ViT at und_size, then a template): PIL in and out.

        size: of the output, default the VAE's size for the photo. sampler: what differs from RECONSTRUCT, the settings
        of the original's notebook (whose ViT sees more, 518 px, than in training).
        """
        samples = [self.preprocess(image, "recon") for image in images]
        features = self.encode([{self.condition: s[self.condition]} for s in samples], "recon")
        ids = [self._text_ids(t) for t in templates or [common.SEED_TEMPLATE] * len(images)]
        grids = [self._target_grid(tuple(s["vae"].shape[1:]) if size is None else size) for s in samples]
        return self._from_images(features, ids, grids, seed, draws, **RECONSTRUCT | sampler)

    @torch.no_grad()
    def edit(self, images, instructions, *, seed=0, draws=None, size=None, **sampler):
        """Edit images by instruction: VAE block, ViT block, text. PIL in and out; `size` by default that of the input,
        by the VAE's rule. sampler: what differs from EDIT, the original's ImgEdit script (its command line passes an
        image guidance of 1.5, its function and its notebook have 2.0). The photo is resized for the VAE, and the ViT
        sees that resized photo, as in the original inferencer.
        """
        c, samples = self.config, []
        for image in images:
            image = self._resized(image, c.vae_limits, c.stride)
            seen = self._resized(image, c.edit_limits, c.vit_patch_size)
            samples.append({"vae": common.to_tensor(image), "vit": common.to_tensor(seen)})
        ids = [self._text_ids(i) for i in instructions]
        grids = [self._target_grid(tuple(s["vae"].shape[1:]) if size is None else size) for s in samples]
        return self._from_images(self.encode(samples, "edit"), ids, grids, seed, draws, **EDIT | sampler)

    def _from_images(self, features, ids, grids, seed, draws, **sampler):
        """Contexts of edit and reconstruct: (VAE block) (ViT block) text; without the text; without the images.
        What features hold is read, each block once: the text-free context is what the full one was before its text."""
        draws = dict(draws or {})
        vits = [f["vit"] for f in features] if "vit" in features[0] else None
        sources = [self._grid(f["mean"]) if "mean" in f else () for f in features]
        contexts = self._contexts([len(i) for i in ids], vits, list(zip(sources, grids)))
        if "mean" in features[0]:
            draws.setdefault("vae_noise", [torch.randn(f["mean"].shape, generator=g) for f, g in zip(
                features, self._generators(seed, len(grids), "condition"))])
            self._read_latents(contexts, self._sampled(features, draws["vae_noise"]), sources)
        if vits:
            self._read_vit(contexts, vits)
        text_free = [context.fork() for context in contexts]
        self._read_text(contexts, ids)
        image_free = self._contexts([len(i) for i in ids], None, grids)
        self._read_text(image_free, ids)
        return self._paint(contexts, text_free, image_free, grids, seed, draws, **sampler)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=512):
        """Image to text, greedy: ViT block (224 to 980 px), question, answer. List of PIL -> list of str."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        answers = self._describe([f["vit"] for f in features], [self._text_ids(question)] * len(images), max_new_tokens)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def _describe(self, vits, ids, max_new_tokens):
        """-> lists of new ids, without begin and end. All images decode together until the last one has ended."""
        contexts = self._contexts([len(i) for i in ids], vits)
        self._read_vit(contexts, vits)
        self._read_text(contexts, ids)
        order = [i for context in contexts for i in context.images]
        answers, said = [[] for _ in ids], torch.full((len(ids),), self.config.bos_token_id, device=self.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        for _ in range(max_new_tokens):
            words = [self._words(said[c.images][:, None]) for c in contexts]                             # [B, 1, D]
            rows = self._block(contexts, words, causal=True, read="und")
            logits = self.language_model["lm_head"](torch.cat([r[:, 0] for r in rows]))                # [B, vocabulary]
            said[order] = logits.argmax(-1)
            done |= said == self.config.eos_token_id
            if bool(done.all()):
                break
            for answer, token, ended in zip(answers, said.tolist(), done.tolist()):
                if not ended:
                    answer.append(token)
        return answers


# ======================================================================================================
# 7. main()
# ======================================================================================================
# Where the bytes go when one 80 GB card (79.6 GiB = 85.5 GB) trains 6.54 billion weights beside 8.07 frozen billions:
#
#                                        float32 AdamW     bf16, stochastic rounding (StochasticAdamW)
#     frozen weights, bf16                   16.5 GB            16.5 GB      (with the VAE in float32)
#     trained weights                        26.2 GB            13.1 GB      (float32 masters / bf16, no masters)
#     their bf16 copies for autocast         13.1 GB               -
#     gradients                              26.2 GB            13.1 GB
#     first and second moments               52.3 GB            26.2 GB
#     sum                                   134.3 GB            68.9 GB
#     an image of 1024 px, checkpointing     + 0.9 GB           + 0.9 GB      (28 layers x 4100 rows x 3584 x 2 bytes)
#     the layer that is being recomputed    + ~1.5 GB an image of the batch   (the MLP: 7 x 4100 x 18944 x 2 bytes)
#
# The original holds float32 masters, gradients, two moments and an average for the 7.1 billion parameters that cannot
# move, too: 283 GB over its group of GPUs. Sharded over n GPUs (FSDP2) everything but the frozen 3 GB outside the
# decoder layers is divided by n: float32 AdamW then needs 8 cards of 40 GB, or 2 of 80 GB.


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights without float32 masters: computes in float32, stores weights and moments in bf16, rounded
    stochastically.

    bf16 keeps 8 bits: an update below 1/256 of a weight would be lost by rounding to nearest, at every step, and 4e-5
    against weights of 0.02 is such an update. Rounding up or down at random, with the chance given by what is cut off,
    is right in the mean: a weight moves one time in a hundred by a hundred times the update. For the moments it keeps
    small gradients alive beside large ones in the same way. Draws follow from (seed, update, rank), so a resumed run
    draws what the uninterrupted one would have drawn.

    tests/test_bagel.py shows the loss curve within the noise of float32 AdamW.
    """

    def __init__(self, groups, lr, betas, eps, weight_decay=0.0, seed=0):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "updates": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        generators = {}
        for group in self.param_groups:
            group["updates"] += 1
            (beta1, beta2), n = group["betas"], group["updates"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                # Sharded weights are DTensors; everything here is elementwise, so each rank works on its own part.
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                weight, grad, m, v = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
                if weight.device not in generators:
                    generators[weight.device] = torch.Generator(weight.device).manual_seed(
                        common.stable_seed(self.seed, "rounding", n, common.world()[0]))
                grad = grad.float()
                first = m.float().lerp_(grad, 1 - beta1)
                second = v.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                step = first / (1 - beta1 ** n) / ((second / (1 - beta2 ** n)).sqrt_().add_(group["eps"]))
                new = weight.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])
                for target, value in ((weight, new), (m, first), (v, second)):
                    self._store(target, value, generators[weight.device])

    @staticmethod
    def _store(target, value, generator):
        """float32 value into target, rounded stochastically where target is bf16. bf16 is the upper half of a float32:
        adding a uniform 16-bit number to the lower half carries into the upper one exactly as often as it should."""
        if target.dtype == torch.bfloat16:
            noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
            value = (value.contiguous().view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32)
        target.copy_(value)


def shard(model):
    """FSDP2: every decoder layer (both experts) is divided over all ranks, and so are the trained weights outside.

    What is frozen outside of the layers (ViT, VAE, embedding, head: 3.2 GB) stays whole on every rank, so that encoding
    images needs no communication. Gradients arrive as the mean over ranks, in float32; on a GPU the layers compute in
    bf16.
    """
    inside = {p for layer in model.blocks() for p in layer.parameters()}
    frozen_outside = {p for p in model.parameters() if not p.requires_grad} - inside
    device, policy = model.device.type, MixedPrecisionPolicy()
    if device == "cuda":       # cast_forward_inputs would turn the rotary tables into bf16, as it does in the original
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device, (common.world()[1],)), "mp_policy": policy}
    for layer in model.blocks():
        fully_shard(layer, **options)
    fully_shard(model, **options, ignored_params=frozen_outside)
    for loss in ("recon_loss", "i2t_loss", "t2i_loss"):
        register_fsdp_forward_method(model, loss)


def unshard(model, whole=True):
    """Gather all weights on every rank (whole=False: give them back), so that one can sample alone. All must call."""
    if not isinstance(model, FSDPModule):
        return
    model.set_reshard_after_forward(not whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard() if whole else module.reshard()


class BagelTrainer(common.Trainer):
    """The loop of common.py, with checkpoints that any number of ranks can write and read, and previews when sharded.

    A checkpoint holds ema.safetensors and the other files of the release (bf16 after training on GPUs: it can be used
    as it is), and in shards/ the exact trained weights and the optimizer, written by each rank for itself with
    torch.distributed.checkpoint.
    """

    def __init__(self, model, streams, args, show=None, **more):
        def show_together(step):
            unshard(model)
            show(step)                                                                  # only rank 0 paints
            if dist.is_initialized():
                dist.barrier()
            unshard(model, whole=False)
        super().__init__(model, streams, args, show_together if show else None, **more)

    def _shards(self):
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {"weights": trained, "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}

    def save(self):
        folder, temporary = self.out / f"checkpoint-{self.step:06d}", self.out / f".tmp-checkpoint-{self.step:06d}"
        main_process = common.world()[0] == 0
        try:
            if main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            bf16 = self.model.device.type == "cuda" and self.args.precision == "bf16"
            self.model.save_pretrained(temporary, dtype=torch.bfloat16 if bf16 else None)
            with warnings.catch_warnings():                           # "no process group": one process, as it should be
                warnings.simplefilter("ignore")
                dcp.save(self._shards(), checkpoint_id=temporary / "shards")
            if main_process:
                torch.save({"step": self.step, "seen": self.seen}, temporary / "trainer.pt")
                if folder.exists():
                    shutil.rmtree(folder)
                temporary.rename(folder)
                for old in sorted(self.out.glob("checkpoint-*"))[:-2]:
                    shutil.rmtree(old)
        except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
            if main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = str(error).splitlines()[0]
            raise common.InputError(f"cannot write {folder}: {reason}; the checkpoints before it are kept") from error
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.step, self.seen = state["step"], state["seen"]
        shards = self._shards()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(shards, checkpoint_id=folder / "shards")                              # weights in place
        set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])

    def train(self):
        super().train()
        unshard(self.model)                                          # rank 0 goes on alone: previews, scores, inference


def prepare(model, args):
    """Called before training: picks what fits, says so, shards. -> arguments for the Trainer."""
    ranks, device = common.world()[1], model.device
    trained = [p for p in model.parameters() if p.requires_grad]
    count, choice = sum(p.numel() for p in trained), args.optimizer
    if choice == "auto":
        room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
        layers = sum(p.numel() for layer in model.blocks() for p in layer.parameters() if not p.requires_grad)
        whole = sum(p.numel() for p in model.parameters() if not p.requires_grad) - layers
        copies = 2 * count if ranks == 1 else 0               # autocast's bf16 copies; FSDP makes one layer's at a time
        need = (16 * count + 2 * layers) / ranks + 2 * whole + copies + 3e9 * args.batch + 3e9
        choice = "fp32" if need < room else "bf16"
    if choice == "bf16":
        for p in trained:
            p.data = p.data.to(torch.bfloat16)
    if device.type == "cuda" and count > 1e9:
        args.checkpointing = True                     # without it one image of 1024 px keeps about 25 GB of activations
    if ranks > 1:
        shard(model)
    groups = model.parameter_groups(args.weight_decay)
    if choice == "bf16":
        optimizer = StochasticAdamW(groups, args.lr, args.betas, args.eps, args.weight_decay, args.seed)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, fused=device.type == "cuda")
    if common.world()[0] == 0:
        told = {"bf16": "bf16 weights and moments with stochastic rounding (8 bytes a weight, gradient included)",
                "fp32": "float32 masters and AdamW (16 bytes a weight)"}[choice]
        told += f", FSDP2 over {ranks} ranks" if ranks > 1 else ""
        told += ", activation checkpointing" if args.checkpointing else ""
        print(f"{count / 1e6:,.1f}M trained weights on {ranks} x {device.type}: {told} [--optimizer {args.optimizer}]")
    return {"optimizer": optimizer} | ({"average": lambda parameters: None} if ranks > 1 else {})   # FSDP2 has averaged


# ---- editing benchmarks ------------------------------------------------------------------------------


def edit_jobs(path, sources, out):
    """--edit FILE -> [(source image, instruction, output, copy of the source or None)], as the scorers read them.

    ImgEdit's singleturn.json: {key: {"id": image, "prompt": ...}} -> out/<key>.png
    GEdit's rows as .jsonl: {"key", "task_type", "instruction", "instruction_language", "image"} ->
        out/gen_image/fullset/<task_type>/<language>/<key>.png and <key>_SRCIMG.png; "image" (default <key>.png) is
        where the user exported the row's picture
    Images are relative to `sources` (default: the file's folder). Raises InputError.
    """
    path, out = Path(path), Path(out)
    sources, gedit, jobs = Path(sources or path.parent), path.suffix == ".jsonl", []
    table = common.read_json(path, lines=gedit)
    if not isinstance(table, list if gedit else dict):
        raise common.InputError(f"{path}: expected ImgEdit's singleturn.json or GEdit's rows as .jsonl")
    needed = ("key", "task_type", "instruction", "instruction_language") if gedit else ("id", "prompt")
    for name, row in enumerate(table, 1) if gedit else table.items():
        if not isinstance(row, dict) or any(not isinstance(row.get(k), str) for k in needed):
            raise common.InputError(f"{path}: row {name} lacks one of {', '.join(needed)}")
        key, *folders = (row["key"], row["task_type"], row["instruction_language"]) if gedit else (str(name),)
        if any("/" in part or part.startswith(".") for part in (key, *folders)):
            raise common.InputError(f"{path}: row {name} has a key that is not a file name")
        folder = out.joinpath("gen_image", "fullset", *folders) if gedit else out
        image, instruction = row.get("image", f"{key}.png") if gedit else row["id"], row[needed[2 if gedit else 1]]
        jobs.append((sources / image, instruction, folder / f"{key}.png", gedit and folder / f"{key}_SRCIMG.png"))
    return jobs


def edit_files(model, args):
    """Writes what is missing, so a rerun goes on. (The original crops black borders off its results; we do not.)"""
    jobs = edit_jobs(args.edit, args.edit_images, args.out)
    todo, written = [job for job in jobs if not job[2].exists() or job[3] and not job[3].exists()], 0
    options = {"image_guidance_scale": args.image_guidance_scale, **common.sampler_options(args)}
    for start in tqdm(range(0, len(todo), args.batch_images), desc="edit", unit="batch", dynamic_ncols=True):
        chunk = [(common.try_image(job[0], job[0]), *job) for job in todo[start:start + args.batch_images]]
        chunk = [c for c in chunk if c[0] is not None]
        if not chunk:
            continue
        images = model.edit([c[0] for c in chunk], [c[2] for c in chunk], seed=[args.seed] * len(chunk), **options)
        for (source, _, _, path, copy_path), image in zip(chunk, images):
            for target, picture in ((copy_path, source), (path, image)):
                if target:
                    with common.atomic(target) as temporary:
                        picture.save(temporary)
            written += 1
    print(f"{written} images edited in {args.out}")


# ---- the toy -----------------------------------------------------------------------------------------


def pretrain_toy(model, fraction, seed):
    """Brings `tiny` to where BAGEL is before RecA, in small: an autoencoder; an understanding expert that describes
    pictures in full; a generation expert, started as its copy (as BAGEL's was) and brought up on sparse captions.
    fraction: of the usual number of steps."""
    c, size = model.config, model.config.image_size
    rows = common.Shapes(size, count=max(64, int(2048 * fraction)), seed=seed + 1000, captions=0.1)
    scenes = [rows[i] for i in range(len(rows))]
    sparse = [text for _, _, text in scenes]
    full = [common.caption(common.read_scene(picture)) for _, picture, _ in scenes]

    def pick(positions, among):
        return [among[i % len(among)] for i in positions]

    # 1. The autoencoder, first on quarters of pictures (one cell, a quarter of the work), then on whole ones: its norms
    # see the whole picture. Most cells are full, white teaches nothing.
    model.requires_grad_(False)
    model.vae.requires_grad_(True)

    with torch.no_grad():                       # the posterior's spread is set, not learnt: exp(-6 / 2) = 0.05
        spread = model.vae.encoder.conv_out
        spread.weight[c.vae_z_channels:], spread.bias[c.vae_z_channels:] = 0, -6

    def crowded(positions):
        rng = np.random.default_rng((seed, 1, positions[0]))
        drawn = [[(place, rng.integers(4), rng.integers(8)) for place in range(4) if rng.random() < 0.8]
                 for _ in positions]
        return torch.stack([common.to_tensor(common.draw_scene(scene, size)) for scene in drawn])

    def autoencode(pixels):
        mean = model.vae.encode(pixels).latent_dist.mean
        back = model.vae.decode(mean + 0.05 * torch.randn_like(mean)).sample                  # neighbours decode alike
        return F.mse_loss(back, pixels) + F.l1_loss(back, pixels) + 1e-3 * mean.square().mean()

    def quarters(positions):
        half = size // 2
        pixels = crowded(positions).unflatten(2, (2, half)).unflatten(4, (2, half))           # [B, 3, 2, half, 2, half]
        return autoencode(pixels[:, :, positions[0] // 16 % 2, :, positions[0] // 32 % 2])

    common.toy_stage("autoencoder", model.vae.parameters(), quarters, max(2, int(350 * fraction)), lr=2e-3, batch=16)
    common.toy_stage("autoencoder", model.vae.parameters(), lambda positions: autoencode(crowded(positions)),
                     max(2, int(200 * fraction)), lr=1e-3, batch=4)
    model.vae.requires_grad_(False)
    features, seen = [], []
    for start in range(0, len(scenes), 64):
        samples = [model.preprocess(picture, "recon") for _, picture, _ in scenes[start:start + 64]]
        features += model.encode([{"vae": s["vae"]} for s in samples], "t2i")
        seen += [s["vit"] for s in samples]
    means = torch.stack([f["mean"] for f in features[:512]])
    c.vae_scale_factor, c.vae_shift_factor = 1 / means.std().item(), means.mean().item()     # mean 0, deviation 1

    # 2. Understanding: picture -> full caption. The second term makes single patches say words, which pretraining on
    # billions of pairs does for the real model: without it the embeddings are codes that only its own decoder reads.
    model.freeze(train_und=True)
    for module in (model.vit_model, model.connector):
        module.requires_grad_(True)
    words = model.language_model["model"]["embed_tokens"].weight

    def describe(positions):
        vit, texts = model._vit(torch.stack(pick(positions, seen))), pick(positions, full)
        patches = F.layer_norm(model._embed_vit(vit), (c.hidden_size,))
        says = F.log_softmax(patches @ words.T, dim=-1)                                             # [B, M, vocabulary]
        ids = [sorted(set(model._text_ids(text)[1:-1])) for text in texts]
        tags = torch.stack([torch.logsumexp(s[:, own], dim=0).clamp(max=0).mean() for s, own in zip(says, ids)]).mean()
        turns = [[(common.SEED_TEMPLATE, text)] for text in texts]
        return model.i2t_loss([{"vit": v} for v in vit], turns) - 0.1 * tags

    und = [p for n, p in model.named_parameters() if p.requires_grad and not generates(n)]
    common.toy_stage("understanding", und, describe, max(2, int(600 * fraction)), lr=2e-3)

    # 3. Generation from sparse captions.
    model.freeze()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if "_moe_gen" in name:
                parameter.copy_(own[name.replace("_moe_gen", "")])

    def paint(positions):
        rng = common.Rng(seed, "toy t2i", positions=positions)
        return model.t2i_loss(pick(positions, features), pick(positions, sparse), rng=rng)

    trained = [p for p in model.parameters() if p.requires_grad]
    common.toy_stage("generation", trained, paint, max(2, int(1000 * fraction)), lr=2e-3)


def flags(parser):
    """What only this architecture has."""
    add = parser.add_argument_group("BAGEL only").add_argument
    add("--condition", choices=("vit", "vae"), default="vit",
        help="what RecA conditions on: ViT (semantic) or VAE embeddings (the paper's Table 7)")
    add("--optimizer", choices=("auto", "bf16", "fp32"), default="auto",
        help="bf16: weights and moments in bf16, stochastic rounding (8 bytes a weight); fp32: float32 masters and "
             "AdamW (16 bytes); auto: what fits")
    add("--edit", help="editing prompts: ImgEdit's singleturn.json, or GEdit's rows as .jsonl; results in that layout")
    add("--edit-images", help="folder of the source images of --edit (default: the folder of the file)")
    add("--image-guidance-scale", type=float, default=2.0,
        help="of --edit (default 2.0; the original's ImgEdit command line: 1.5)")


def main():
    args = common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags)
    Bagel.condition = args.condition
    if args.lambda_i2t:
        raise common.InputError("--lambda-i2t: BAGEL's understanding expert is frozen, L_i2t would train nothing")
    if args.edit:
        edit_jobs(args.edit, args.edit_images, args.out)         # a malformed file is refused before anything is loaded
    if args.steps or args.bench or args.generate or args.reconstruct or args.describe or not args.edit:
        common.run(Bagel, args, pretrain_toy, prepare, BagelTrainer)
    if args.edit and common.world()[0] == 0:
        trained = sorted(Path(args.out).glob("checkpoint-*/ema.safetensors"))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = str(trained[-1].parent) if args.steps else args.model
        if source == "tiny":
            source = str(common.toy_folder(Bagel, args, pretrain_toy))
        model = Bagel.from_pretrained(source, device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        model.set_und(args.und_size, args.blur)
        edit_files(model, args)


if __name__ == "__main__":
    common.cli(main)
