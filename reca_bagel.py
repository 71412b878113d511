"""RecA for BAGEL: an expert that understands and an expert that paints, joined in one attention.

Why RecA. A model that both understands and generates images usually learns to generate from pairs
of image and caption. Captions are sparse: even a long one leaves out the layout, exact shapes and
shades, and whatever everybody takes for granted. Hardly a caption tells the color of broccoli, so
the model learns the rule "broccoli is green", and paints a green one when it is asked for a yellow
one. The same model has a second, dense description of every image: the embeddings with which its
understanding side sees it. They are hundreds of vectors, hold layout, colors and attributes, and
the language model can already read them as it reads words (paper, sections 1 and 2.1).

The method. RecA puts the understanding embeddings of an image where a prompt stands, and trains the
model, with the loss that it was always trained with, to paint that image again:

    (2)   L_recon = L( f_θ( concat( t_template, h_v ) ), I_gt )
    (3)   L_total = λ_recon L_recon + λ_i2t L_i2t + λ_t2i L_t2i

    h_v         the understanding embeddings of the image: `Bagel.understand`, [B, M, D]
    t_template  one of 360 requests to describe an image, as token ids: `Bagel.recon_prompt`
    f_θ         the decoder, which reads both (in BAGEL the image first) and predicts a velocity:
                `_read_images`, `_read_texts` and `_velocities`
    θ           what is trained: the generation expert, the time MLP and the two projections between
                latents and decoder
    I_gt        the same image, as latents z of the FLUX autoencoder, [h, w, C]
    L           BAGEL's own loss, rectified flow. t, the time, is the sigmoid of a standard normal
                number. The decoder is shown x_t = (1 - t) z + t noise, and predicts the velocity
                noise - z. L is the mean squared error over all latent tokens and their C channels:
                `_generation_loss`
    λ           λ_recon = 1. The other two are 0 for BAGEL (Table 8)

`Bagel.recon_loss` is equation (2), `common.objective` is equation (3). No caption is read.

What is special about BAGEL. One decoder of 28 layers carries two complete sets of weights, the
*experts*. The understanding expert, in this file *und*, computes text and ViT tokens. The
generation expert, *gen*, computes image latents. (Only in the names `und_size`, `und_blur` and
`set_und`, which all four scripts share, "und" means the image that the ViT sees.) A token meets the
other expert only in attention, which is joint: every query may look at keys and values that either
expert has made. A sample is a sequence of *blocks* (an image, a text, an image's latents). Each
block stands between two *markers*, special tokens that say where it begins and ends; they are
words, and so always und. The *context* is what has been read so far: the keys and values of its
blocks, in every layer. (The *connector* is the two-layer perceptron that brings ViT features to the
width of the decoder.)

    photo, longest side 224 px                        photo, 512 to 1024 px
      | SigLIP ViT [B, M, 1152]                         | FLUX VAE
      | connector                                       v
      v                                         z [B, h, w, C]         noise       t [B]
    h_v [B, M, D]   template, ids [B, L]                |                |           |
      |               | word embeddings [B, L, D]       '------> x_t <---'       time MLP
      v               v                                           | vae2llm          |
    image block    text block                                     v                  v
      |               |                                         [B, N, D] + [B, 1, D] + positions
      v               v                                                   v
    +-----------------------------+     keys and values     +-----------------------------+
    | und expert, frozen,         | ----------------------> | gen expert, trained         |
    | computed without a graph    |     in every layer      |                             |
    +-----------------------------+                         +-----------------------------+
               28 layers                                              28 layers
                                                                          | llm2vae
                                                                          v
                 mean squared error against noise - z <------ velocity [B, h, w, C]

What is frozen, what is trained, and why. Trained are the gen expert, the time MLP and the two
projections between latents and decoder: 6.54 of 14.66 billion weights. Frozen are the und expert,
the words' embedding and output head, the ViT with its connector (8.04 billion), and the VAE (0.08).
The line is there because BAGEL's two sides share no weights. The und expert already says what is in
an image; what is missing is that the gen expert follows it, so only the gen expert moves. Freezing
the other side keeps understanding as it is without holding generation back, and it keeps words and
image embeddings in one space: what the gen expert learns from embeddings, it can use when it reads
words. The VAE is frozen because it defines the target.

At which size the understanding side sees the image. Its longest side is 224 pixels (`UND_SIZE`), at
most 16 x 16 patches. That is the least side of an image at which the release describes images
(`vit_limits`), what the paper calls the minimum that the encoder accepts. Not larger, because
larger inputs keep more detail of the pixels in the embeddings, and the gen expert would learn to
copy that instead of reading what the image shows (paper, section 2.2). From the paper's Table 7, in
which the larger size is taken to be the 518 pixels of the authors' notebook (`--und-size 518`):

    before RecA          GenEval 78.8    DPG-Bench 84.03
    RecA, 224 pixels             82.4              85.29
    RecA, larger size            79.2              84.61

What keeps understanding alive. Nothing has to: no weight of it moves, so describing an image gives
the same answer after RecA as before, and λ_i2t = 0. Image-to-text data is not needed and not
accepted: L_i2t would train nothing here. (Harmon and Show-o share weights between both sides and
need it. Where a user has none, their models first describe `--self-captions` of the training images
themselves. That is this project's way, not the paper's.)

Inference is unchanged by RecA: the same prompts, the same sampler; text to image needs no
embeddings, editing takes a photo as before. A checkpoint replaces the released file as it is.

A step, from images to moved weights (`common.Trainer.take_step` and the functions named here):

    samples = next(loader)          # 48, divided over all GPUs. Its workers ran preprocess: 224 px
                                    # for the ViT, 512 to 1024 px for the VAE
    for each micro-batch (as many images as fit at once):
        features = encode(samples)  # frozen ViT and VAE; --cache keeps the result on disk
        draws = draw(features)      # text dropped?, t, noise: on the CPU, by seed
    for each micro-batch:           # `recon_loss`, and its gradients
        h_v = understand(features)
        context = und expert(h_v, t_template)                   # without a graph
        velocity = gen expert(x_t, t, context)
        loss = mean((velocity - (noise - z)) ** 2)
        (λ_recon * loss * share).backward()     # share: its part of the step's latent tokens
    clip_grad_norm(1.0), AdamW      # the update

A *step* is one evaluation of equation (3). An *update* moves the weights; it comes every `--accum`
steps. BAGEL's recipe has accum 1, so every step is an update.

One worked example: a square photo, latents of 1024 px, "Describe the image in detail." (6 ids).

    block    tokens in their order               count   position   expert        sees
    image    start, 16 x 16 patches, end           258   0          und           its own block
    text     begin, 6 ids, end                       8   1 .. 8     und           image, text so far
    latents  start, 64 x 64 noisy latents, end    4098   9          markers und,  everything
                                                                    latents gen
    in all                                        4364

An image block has one rotary position for all of its tokens; where a token is in the image is told
by a sine-cosine table that is added to its embedding. In a text every token has its own position.
Nobody outside sees the block of noisy latents. For one image in ten the text block is left out; its
latents then have position 1. The image block is never left out.

The *original* is the authors' public code: ByteDance's BAGEL with RecA's changes. Its *inferencer*
is the class that samples, its *notebook* shows how, and its GenEval and ImgEdit scripts make the
pictures of those benchmarks.

Where the numbers come from. The paper's Table 8: learning rate, weight decay, warm-up, steps,
batch, frozen parts, λ. The original: betas, eps, clipping, constant rate after the warm-up, text
dropping, distribution of t, image sizes (the ViT's 224 is the paper's, too), sampler. Public
configs of Qwen2.5-7B, SigLIP and FLUX.1: the sizes of the parts. Ours: everything of `tiny`,
`batch_images`, and what fits into memory.

Where this file deliberately differs from the original. What cannot move is frozen; the original
gives it gradients and moments, all zero. The context is read once; there it is in one masked
sequence with the noisy latents. Images of different sizes are not padded to one before the VAE. t,
noise and target stay float32; there FSDP makes them bf16. There is no average of the weights (EMA).
A guided velocity is shrunk by the norm of its own image; there, by the batch's.

Which accidents of the original it follows. All 1000 updates are warm-up. At 224 the *long* side of
a photo becomes 224. Large images weigh more in the loss. 50 sampling steps are 49 moves. A text
scale of 1 also switches off guidance by images. docs/originals.md lists everything.

What L_recon looks like while it goes well: it falls at first, then it is noisy, since most of it is
noise that nobody can predict. The tiny run (seed 0), means of steps 1-25, 26-50, 51-75, 76-100 and
126-150: 0.50, 0.31, 0.25, 0.24, 0.23. Meanwhile the colors of text to image go from
20 to 69 percent.

Commands:

    python reca_bagel.py --data ./images                        RecA on BAGEL-7B-MoT, one 80 GB GPU
    torchrun --nproc-per-node 8 reca_bagel.py --data ./images   sharded over 8 GPUs (FSDP2)
    python reca_bagel.py --model tiny                           a toy BAGEL on colored shapes, CPU
    python reca_bagel.py --model bagel-reca --steps 0 --edit singleturn.json --edit-images DIR

In which order to read: `Bagel.recon_loss` (section 5), which is RecA; the prompt's blocks
(section 4); `MoTLayer` and `Context` (section 2), which are BAGEL; `_sample` (section 6). Loading
and saving (section 3) and sharding (section 7) are needed by nobody who only wants to understand.

Letters in shapes: B images of equal shapes, D width of the decoder, Dv that of the ViT, H query
heads, K key and value heads, d size of a head, M ViT patches, L text ids, h and w sides of an image
in latent tokens and N = h w their number, C = 64 channels of a latent token, n und tokens of a
block, R tokens of an expert in one packed matrix, S keys that a query can see.
"""
import shutil
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

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
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import Qwen2Config, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

import common
from common import InputError, Rng

# ==== 1. Sizes and hyper-parameters ===============================================================

# The decoder is Qwen2.5-7B (its public config), with a second set of weights in every layer.
LLM = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}

# The ViT is SigLIP so400m/14 at 980 pixels (its public config). Of its 27 layers the original
# builds and stores one less.
VIT = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}


@dataclass
class BagelConfig:
    """Sizes of BAGEL-7B-MoT (the defaults) and the sampler's settings. A name is that of the
    released json files where these have one."""

    llm: dict = field(default_factory=LLM.copy)
    vit: dict = field(default_factory=VIT.copy)
    vit_max_num_patch_per_side: int = 70
    latent_patch_size: int = 2  # a latent token is 2 x 2 places of the VAE's latent
    max_latent_size: int = 64  # the release was trained with 64; the original's flag has default 32

    # The FLUX.1 autoencoder. No file of the release holds these.
    vae_ch: int = 128
    vae_ch_mult: tuple = (1, 2, 4, 4)
    vae_num_res_blocks: int = 2
    vae_z_channels: int = 16
    vae_scale_factor: float = 0.3611
    vae_shift_factor: float = 0.1159

    # How images are resized: (longest side, shortest side), see `fit`. RecA itself gives the ViT
    # und_size for both.
    vae_limits: tuple = (1024, 512)
    vit_limits: tuple = (980, 224)  # for questions about an image; UND_SIZE is its least side
    edit_limits: tuple = (980, 378)  # for editing, as in the original's ImgEdit script
    image_size: int = 1024  # side of an image that is painted from a prompt

    # The markers' ids. They are read from the tokenizer (MARKERS). The names are the original's.
    bos_token_id: int = 151644  # begins each text block, wherever it stands
    eos_token_id: int = 151645  # ends it
    start_of_image: int = 151652
    end_of_image: int = 151653

    # The sampler's defaults. These are for text to image, from the original's notebook.
    num_steps: int = 50  # points of time, so 49 moves: the original counts this way
    guidance_scale: float = 4.0  # of the text; 1: no guidance at all, not by images either
    timestep_shift: float = 3.0  # above 1: more of the moves at high noise
    interval: tuple = (0.4, 1.0)  # guidance acts where t is in it (GenEval script: 0 to 1)
    renorm: str = "global"  # how a guided velocity is shrunk, see Bagel.guide
    renorm_min: float = 0.0  # ByteDance's notebook; RecA's has 1, which switches renorm off

    # What replaces them where an image is in the prompt: to edit it or to reconstruct it.
    image_guidance_scale: float = 2.0  # of the image; 1: none (notebook; ImgEdit script: 1.5)
    edit_interval: tuple = (0.0, 1.0)  # ImgEdit script and notebook
    edit_renorm: str = "text_channel"  # ImgEdit script and notebook
    reconstruct_renorm_min: float = 1.0  # to reconstruct only: renorm is off (notebook)

    @property
    def head_dim(self):
        return self.llm["hidden_size"] // self.llm["num_attention_heads"]

    @property
    def stride(self):
        """Pixels per latent token and side: 16 in the release."""
        return 2 ** (len(self.vae_ch_mult) - 1) * self.latent_patch_size

    @property
    def latent_dim(self):
        """C, the numbers of a latent token: 2 * 2 * 16 in the release."""
        return self.latent_patch_size ** 2 * self.vae_z_channels


# The toy of `--model tiny` (ours), of about a million weights. Its sampler has the same defaults.
TINY_LLM = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_VIT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TINY = BagelConfig(
    llm=LLM | TINY_LLM,
    vit=VIT | TINY_VIT,
    vit_max_num_patch_per_side=4,
    max_latent_size=4,
    vae_ch=32,
    vae_ch_mult=(1, 1, 1, 1),
    vae_num_res_blocks=1,
    vae_z_channels=8,
    vae_limits=(64, 64),
    vit_limits=(32, 32),
    edit_limits=(32, 32),
    image_size=64,
)

DEFAULT = "ByteDance-Seed/BAGEL-7B-MoT"
RECA = {"bagel-reca": "sanaka87/BAGEL-RecA"}  # what the authors have trained with RecA
CONFIGS = {DEFAULT: BagelConfig(), "bagel-reca": BagelConfig(), "tiny": TINY}


@dataclass
class Recipe:
    """How RecA trains: Table 8 of the paper where a comment names no other source.

    *All of the published run is warm-up*: the learning rate rises to 4e-5 at the very last update.
    """

    lr: float = 4e-5
    betas: tuple = (0.9, 0.95)  # the original's
    eps: float = 1e-15  # the original's
    weight_decay: float = 0.0
    clip: float = 1.0  # the original's
    warmup: int = 1000
    horizon: int = 0  # no decay, constant after the warm-up: the original's
    steps: int = 1000
    batch: int = 48  # 8 on each of 6 GPUs, says Table 8: about what a pack of the original holds
    accum: int = 1
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0  # understanding is frozen, so nothing has to preserve it
    lambda_t2i: float = 0.0
    batch_images: int = 8  # of inference, at 1024 px and with guidance (ours)


# Ours. With this large eps Adam hardly moves a weight whose gradient is small.
TINY_RECIPE = Recipe(lr=5e-4, eps=1e-4, warmup=20, steps=150, batch=32)
RECIPES = {DEFAULT: Recipe(), "tiny": TINY_RECIPE, "bagel-reca": Recipe()}

IGNORED = -100  # the label of a token that is not to be predicted
UND_SIZE = 224  # longest side of what the ViT sees in RecA (paper, section 2.2 and Table 7)
TEXT_DROP = 0.1  # the text is left out for one image in ten (the original's)

# Begin and end of a text, start and end of an image: in the order of the config's four ids.
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")

# Fixed tables that the files hold and that are computed here, as the original does.
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")

# Names of weight files, the preferred first. The official trainer writes `model` and `ema`, an
# average of the weights with 0.9999, of which 90% is still the old model after 1000 steps; its
# authors advise against it. (The release has one file. It is called ema, and so is ours.)
WEIGHT_FILES = [
    ["model_bf16.safetensors"],
    ["model.safetensors"],
    ["ema.safetensors"],
    ["*.safetensors"],
]

# Tensors by which a file is known to be BAGEL's.
NEEDED = ("language_model.model.embed_tokens.weight", "llm2vae.weight")


# ==== 2. The model ================================================================================
#
# The original lays all tokens of a batch into one packed sequence with one attention mask. The same
# numbers come from less work here:
#
#   * The context does not see the noisy latents. It is computed once, without a graph, and kept as
#     keys and values, as in sampling. (The markers around the latents do see them. They run beside
#     the latents in every layer, without a graph.)
#   * Packing: each expert's linear layers get the tokens of all images as one matrix, laid end to
#     end, so images of different sizes need no padding. Attention, in which images must not see
#     each other, is one dense call for each group of images with equal shapes. (The original
#     sorts every layer's tokens by expert and back about ten times.)
#   * Attention knows only differences of rotary positions. Counted from the noisy block's own
#     position, its 4098 tokens have position 0 and need no rotation; the few keys of the context
#     are rotated back instead, once (`Context.recentred`).


def fit(width, height, longest, shortest, stride, max_pixels=14 * 14 * 9 * 1024):
    """The size, (width, height), to which an image is resized for an encoder.

    Sides are multiples of `stride`, the long one at most `longest`, the short one at least
    `shortest`. Where both cannot be had the long side wins: at 224 / 224, 1024 x 768 becomes
    224 x 168.
    """
    def scaled(width, height, scale):
        sides = []
        for side in (width, height):
            multiples = round(round(side * scale) / stride)
            sides.append(max(stride, multiples * stride))
        return sides

    scale = min(longest / max(width, height), 1.0)
    scale = max(scale, shortest / min(width, height))
    width, height = scaled(width, height, scale)

    # The original multiplies the sides by the ratio of the areas, not by its root. We follow; at
    # the limits of BagelConfig no image is ever that large.
    if width * height > max_pixels:
        width, height = scaled(width, height, max_pixels / (width * height))
    if max(width, height) > longest:
        width, height = scaled(width, height, longest / max(width, height))
    return width, height


def equal_groups(keys):
    """The numbers of the images whose keys are equal: a list for every different key."""
    groups = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def pack(groups):
    """[B, n, ...] of each group -> one matrix of all tokens, group after group: [R, ...]."""
    return torch.cat([group.flatten(0, 1) for group in groups])


def unpack(packed, shapes):
    """The inverse of `pack`. shapes: (B, n) of each group."""
    parts = packed.split([images * tokens for images, tokens in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes)]


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the precision of the input: bf16 stays bf16 beside float32 master
    weights."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary(positions, config):
    """Rotary embedding of positions [R], integers that may be negative -> cos and sin [R, 1, d].

    They are float32. The original's are bf16 under FSDP, which blurs far positions; nothing depends
    on that.
    """
    d = config.head_dim
    exponents = torch.arange(0, d, 2, device=positions.device).float() / d  # [d/2]
    frequencies = (config.llm["rope_theta"] ** -exponents).repeat(2)  # [d]
    angles = positions[:, None, None].float() * frequencies  # [R, 1, d]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Applies a rotary embedding to x [..., heads, d]. Halves are rotated against each other, not
    neighbours."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x.float() * cos + rotated * sin).to(x.dtype)


def attend(q, k, v, causal):
    """Dense attention of one group: q [B, n, H, d], k [B, S, K, d], v [B, S, K, d] -> [B*n, H*d].

    causal (a text): the last n of the S keys are the queries' own, and a query sees none of those
    behind it. Otherwise every query sees every key, whatever their order, and there is no mask.
    """
    mask = None
    queries = q.shape[1]
    keys = k.shape[1]
    if causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(keys - queries)

    # The two experts may be of different precisions.
    q = q.transpose(1, 2)
    k = k.transpose(1, 2).to(q.dtype)
    v = v.transpose(1, 2).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)  # [B, H, n, d]
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


class MoTLayer(nn.Module):
    """A Qwen2 decoder layer with two experts ("mixture of transformers").

    Names end in "" for the understanding expert and in "_moe_gen" for the generation expert, as in
    the released file. transformers has no layer with two sets of weights, nor one with norms of
    queries and keys beside biases of q, k and v.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.llm["hidden_size"]
        eps = config.llm["rms_norm_eps"]
        q_width = config.llm["num_attention_heads"] * config.head_dim
        kv_width = config.llm["num_key_value_heads"] * config.head_dim
        mlp = Qwen2Config(
            hidden_size=width,
            intermediate_size=config.llm["intermediate_size"],
        )

        attention = {}
        for expert in ("", "_moe_gen"):
            attention[f"q_proj{expert}"] = nn.Linear(width, q_width)
            attention[f"k_proj{expert}"] = nn.Linear(width, kv_width)
            attention[f"v_proj{expert}"] = nn.Linear(width, kv_width)
            attention[f"q_norm{expert}"] = RMSNorm(config.head_dim, eps)
            attention[f"k_norm{expert}"] = RMSNorm(config.head_dim, eps)
            attention[f"o_proj{expert}"] = nn.Linear(q_width, width, bias=False)
            self.add_module(f"input_layernorm{expert}", RMSNorm(width, eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(width, eps))
            self.add_module(f"mlp{expert}", Qwen2MLP(mlp))
        self.self_attn = nn.ModuleDict(attention)

    def project(self, hidden, expert, rope):
        """Queries [R, H, d], keys and values [R, K, d] of one expert's tokens, hidden [R, D].

        rope: (cos, sin) of their positions; None stands for position 0, where nothing is rotated.
        """
        x = getattr(self, f"input_layernorm{expert}")(hidden)
        q = self.self_attn[f"q_proj{expert}"](x).unflatten(-1, (-1, self.head_dim))  # [R, H, d]
        k = self.self_attn[f"k_proj{expert}"](x).unflatten(-1, (-1, self.head_dim))  # [R, K, d]
        v = self.self_attn[f"v_proj{expert}"](x).unflatten(-1, (-1, self.head_dim))  # [R, K, d]

        # The norm of a head comes before its rotation.
        q = self.self_attn[f"q_norm{expert}"](q)
        k = self.self_attn[f"k_norm{expert}"](k)
        if rope is not None:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        return q, k, v

    def finish(self, hidden, attended, expert):
        """The layer behind attention, for one expert's tokens: hidden [R, D], attended [R, H*d]
        -> [R, D]."""
        hidden = hidden + self.self_attn[f"o_proj{expert}"](attended)
        x = getattr(self, f"post_attention_layernorm{expert}")(hidden)
        mlp = getattr(self, f"mlp{expert}")
        gate = mlp.gate_proj(x)
        up = mlp.up_proj(x)

        def down(gate, up):
            return mlp.down_proj(F.silu(gate) * up)

        # The backward pass computes silu(gate) and the product again: two cheap operations, for two
        # fifths of all activations.
        if gate.requires_grad:
            return hidden + checkpoint(down, gate, up, use_reentrant=False)
        return hidden + down(gate, up)

    def forward(self, und_hidden, gen_hidden, past, shapes, und_rope=None, gen_rope=None,
                causal=False, needed=("und", "gen")):
        """One block of every image through this layer.

        und_hidden, gen_hidden   hidden states of the two experts' tokens, packed: [R, D] each; the
                  second may be None
        past      per group of images its context in this layer, (keys, values) [B, S, K, d] each,
                  or None where nothing has been read
        shapes    (B, n, N) of each group: its images, and the und and gen tokens of one of them
        und_rope, gen_rope   (cos, sin) of the tokens' positions, None at position 0
        causal    the block is a text
        needed    whose hidden states are read by the next layer, or after the last one

        Returns both hidden states, and per group the keys and values of its context extended by
        this block.
        """
        und_shapes = [(images, und_tokens) for images, und_tokens, _ in shapes]
        gen_shapes = [(images, gen_tokens) for images, _, gen_tokens in shapes]

        # While the und expert is frozen its tokens have no graph. (The original detaches them at
        # six places of every layer, to the same effect.) Around noisy latents two of them are
        # markers. In the forward pass these do see the latents; no gradient flows back through
        # that.
        und_graph = torch.is_grad_enabled() and self.input_layernorm.weight.requires_grad

        # Every token gets query, key and value from its own expert.
        with torch.set_grad_enabled(und_graph):
            q, k, v = self.project(und_hidden, "", und_rope)
            und_q = unpack(q, und_shapes)
            und_k = unpack(k, und_shapes)
            und_v = unpack(v, und_shapes)
        if gen_hidden is not None:
            q, k, v = self.project(gen_hidden, "_moe_gen", gen_rope)
            gen_q = unpack(q, gen_shapes)
            gen_k = unpack(k, gen_shapes)
            gen_v = unpack(v, gen_shapes)

        # What a group's queries can see: its context, then this block. In a block of latents both
        # markers stand before the latents here; all have one position, so their order means
        # nothing.
        extended = []
        for group, context in enumerate(past):
            keys = []
            values = []
            if context is not None:
                keys.append(context[0])
                values.append(context[1])
            keys.append(und_k[group])
            values.append(und_v[group])
            if gen_hidden is not None:
                keys.append(gen_k[group])
                values.append(gen_v[group])
            extended.append((torch.cat(keys, dim=1), torch.cat(values, dim=1)))

        # Attention is joint, what follows is again each expert's own.
        if "und" in needed:
            with torch.set_grad_enabled(und_graph):
                attended = [attend(q, k, v, causal) for q, (k, v) in zip(und_q, extended)]
                und_hidden = self.finish(und_hidden, torch.cat(attended), "")
        if gen_hidden is not None and "gen" in needed:
            attended = [attend(q, k, v, causal=False) for q, (k, v) in zip(gen_q, extended)]
            gen_hidden = self.finish(gen_hidden, torch.cat(attended), "_moe_gen")
        return und_hidden, gen_hidden, extended


class PositionTable(nn.Module):
    """A fixed sine-cosine table [side * side, D] of the places of a grid.

    Half of the channels tell the column, half the row; in each half sines come first, then cosines.
    It is computed in double precision. The original, too, drops the table that its files hold.
    """

    def __init__(self, side, width):
        super().__init__()
        self.side = side
        table = get_2d_sincos_pos_embed(
            width,
            side,
            base_size=side,  # places are counted, not scaled
            device=torch.device("cpu"),
        )
        self.register_buffer("pos_embed", table.float(), persistent=False)

    def forward(self, height, width):
        """The entries of a grid in row-major order -> [height * width, D]. Raises InputError.

        Nothing is interpolated: a small image uses the upper left corner of the table.
        """
        if max(height, width) > self.side:
            raise InputError(f"{height} x {width} tokens exceed the table of side {self.side}: "
                             "use smaller images")
        grid = self.pos_embed.view(self.side, self.side, -1)
        return grid[:height, :width].flatten(0, 1)


@dataclass
class Context:
    """What has been read so far by a group of images with equal shapes."""

    images: list  # their numbers in the batch
    keys_values: list  # of each layer: (keys, values) [B, S, K, d]; None before any block
    position: int = 0  # the next free rotary position; an image takes one, a text as many as tokens

    def pick(self, values):
        """The group's entries of a list that has one per image of the batch."""
        return [values[i] for i in self.images]

    def stack(self, tensors):
        """As pick, for tensors: one tensor [B, ...]."""
        return torch.stack(self.pick(tensors))

    def recentred(self, config):
        """A copy in which the next free position is 0: all keys are rotated back by as much. The
        block of noisy latents, which would have that position, then needs no rotation."""
        if self.position == 0:
            return replace(self)

        device = self.keys_values[0][0].device
        back = rotary(torch.full((1,), -self.position, device=device), config)
        keys_values = [(rotate(keys, *back), values) for keys, values in self.keys_values]
        return Context(self.images, keys_values)


class Bagel(nn.Module):
    """BAGEL. Names are those of ema.safetensors. Its 1223 keys are the 1221 of the state_dict()
    that do not begin with `vae.`, and the two position tables, which are computed here."""

    # What RecA conditions on: "vit", or "vae" for the paper's Table 7. --condition sets it for the
    # class, since common.run makes the model.
    condition = "vit"

    # Beginnings of the names of what --quantize leaves alone. Ids, patches and latents enter and
    # leave there: few weights, on which everything else depends.
    unquantized = (
        "vae.",
        "vae2llm",
        "llm2vae",
        "language_model.lm_head",
        "vit_model.vision_model.embeddings.",
    )

    def __init__(self, config=BagelConfig()):
        super().__init__()
        self.config = config
        self.tokenizer = None
        self.und_size = min(UND_SIZE, config.vit_limits[0])
        self.und_blur = 0
        width = config.llm["hidden_size"]
        eps = config.llm["rms_norm_eps"]
        vocabulary = config.llm["vocab_size"]

        # The decoder with its two experts.
        layers = [MoTLayer(config) for _ in range(config.llm["num_hidden_layers"])]
        decoder = {
            "embed_tokens": nn.Embedding(vocabulary, width),
            "layers": nn.ModuleList(layers),
            "norm": RMSNorm(width, eps),
            "norm_moe_gen": RMSNorm(width, eps),
        }
        self.language_model = nn.ModuleDict({
            "model": nn.ModuleDict(decoder),
            "lm_head": nn.Linear(width, vocabulary, bias=False),
        })

        # The understanding encoder. SigLIP 2 has the modules of BAGEL's ViT, whose patch embedding
        # is a linear layer on (row, column, channel). Only SigLIP 2's own forward is another one,
        # which stretches the position table to an image: see _vit.
        vit = config.vit | {
            "num_hidden_layers": config.vit["num_hidden_layers"] - 1,
            "num_patches": config.vit_max_num_patch_per_side ** 2,
            "vision_use_head": False,
        }
        vision_model = Siglip2VisionModel(Siglip2VisionConfig(**vit))
        self.vit_model = nn.ModuleDict({"vision_model": vision_model})
        self.connector = nn.ModuleDict({
            "fc1": nn.Linear(config.vit["hidden_size"], width),
            "fc2": nn.Linear(width, width),
        })
        self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width)

        # The way of latents into the decoder and out of it.
        time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.time_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.vae2llm = nn.Linear(config.latent_dim, width)
        self.llm2vae = nn.Linear(width, config.latent_dim)
        self.latent_pos_embed = PositionTable(config.max_latent_size, width)

        # The autoencoder: FLUX.1's.
        levels = len(config.vae_ch_mult)
        self.vae = AutoencoderKL(
            block_out_channels=[config.vae_ch * factor for factor in config.vae_ch_mult],
            layers_per_block=config.vae_num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=config.vae_z_channels,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        self.freeze()

    def freeze(self, train_und=False):
        """Freezes all but what RecA trains: the generation expert, the time MLP and the latents'
        two projections. train_und=True opens the language model, too (to pretrain `tiny`)."""
        for name, parameter in self.named_parameters():
            trained = "_moe_gen" in name
            trained |= name.startswith(("time_embedder.", "vae2llm.", "llm2vae."))
            trained |= train_und and name.startswith("language_model.")
            parameter.requires_grad_(trained)

    def parameter_groups(self, weight_decay):
        """What is trained. The original decays all weights alike, by 0."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": trained, "weight_decay": weight_decay}]

    def blocks(self):
        """The repeated layers, for activation checkpointing, compilation and sharding."""
        return list(self.language_model["model"]["layers"])

    @property
    def device(self):
        return self.latent_pos_embed.pos_embed.device

    def set_und(self, size=None, blur=None):
        """The paper's ablations: the longest side of what the ViT sees in RecA, and by which factor
        that is blurred. None keeps what is set. Any size from one patch on is possible; 224 is only
        the least that the original uses (`vit_limits`). Raises InputError."""
        patch = self.config.vit["patch_size"]
        largest = self.config.vit_max_num_patch_per_side * patch
        size = size or self.und_size
        blur = blur or self.und_blur
        if not patch <= size <= largest:
            raise InputError(f"--und-size {size}: this ViT sees {patch} to {largest} pixels")
        common.check_blur(blur, size)  # before training: preprocess runs in another process
        self.und_size = size
        self.und_blur = blur

    # ---- From photos to features: all of this is frozen ------------------------------------------

    def preprocess(self, image, task, rng=None):
        """PIL RGB -> {"vit": [3, height, width], "vae": [3, height, width]}, uint8.

        task: recon, i2t, t2i or edit. i2t has no "vae", t2i no "vit", a text without image (None)
        neither. Nothing is cropped, so rng is not used.
        """
        c = self.config
        pixels = {}
        if image is None:
            return pixels

        if task != "i2t":
            size = fit(*image.size, *c.vae_limits, c.stride)
            resized = image.resize(size, Image.BICUBIC)
            pixels["vae"] = common.to_uint8(resized)
            # In editing the ViT sees the photo as it was resized for the VAE. That is the order of
            # the original inferencer.
            if task == "edit":
                image = resized
        if task == "t2i":
            return pixels

        limits = {
            "recon": (self.und_size, self.und_size),
            "i2t": c.vit_limits,
            "edit": c.edit_limits,
        }
        size = fit(*image.size, *limits[task], c.vit["patch_size"])
        image = image.resize(size, Image.BICUBIC)
        pixels["vit"] = common.to_uint8(image)
        if self.und_blur > 1 and task == "recon":
            # A narrow image has a shorter side than the one that --blur was checked with.
            factor = min(self.und_blur, max(1, min(image.size) // 2))
            blurred = common.blur(common.normalize(pixels["vit"])[None], factor)
            pixels["vit"] = blurred[0]
        return pixels

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen encoders make of images: list of preprocess() -> list of dicts.

        task is not needed here: a sample holds what is to be encoded. (Other scripts need it.)
        "vit" [rows, columns, width of the ViT] where the sample has "vit"; "mean" and "logvar"
        [channels, 2h, 2w] of the VAE's posterior where it has "vae". That is 2.7 MB for a photo of
        1024 px.
        """
        features = [{} for _ in samples]
        for name in ("vit", "vae"):
            shapes = [sample[name].shape if name in sample else None for sample in samples]

            # Images of one size are encoded together. (The original zero-pads the images of a pack
            # to one size before the VAE, and grey borders leak into the latents through GroupNorm
            # and attention. We do not: test `mixed` shows that everything else is equal.)
            for group in equal_groups(shapes):
                if shapes[group[0]] is None:
                    continue
                pixels = [common.normalize(samples[i][name].to(self.device)) for i in group]
                if name == "vit":
                    encoded = {"vit": self._vit(torch.stack(pixels))}
                else:
                    encoded = self._moments(torch.stack(pixels))
                for number, i in enumerate(group):
                    for key, tensor in encoded.items():
                        features[i][key] = tensor[number]
        return features

    def _vit(self, pixels):
        """pixels [B, 3, height, width], sides divisible by the patch size
        -> [B, rows, columns, width of the ViT]."""
        p = self.config.vit["patch_size"]
        side = self.config.vit_max_num_patch_per_side
        vit = self.vit_model["vision_model"]
        patch_embedding = vit.embeddings.patch_embedding
        position_embedding = vit.embeddings.position_embedding

        # A patch is flattened as (row, column, channel).
        x = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, 3, rows, p, columns, p]
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3)  # [B, rows, columns, 3*p*p]
        rows, columns = x.shape[1:3]

        # The upper left corner of the table of learned positions, not interpolated.
        ids = torch.arange(side ** 2, device=x.device).view(side, side)  # [side, side]
        ids = ids[:rows, :columns]  # [rows, columns]
        x = patch_embedding(x.to(patch_embedding.weight.dtype)) + position_embedding(ids)

        x = vit.encoder(x.flatten(1, 2)).last_hidden_state  # [B, rows*columns, Dv]
        return vit.post_layernorm(x).unflatten(1, (rows, columns))

    def _moments(self, pixels):
        """pixels [B, 3, height, width] -> the posterior's "mean" and "logvar", each [B, 16,
        height / 8, width / 8] in float32."""
        # Memory: the encoder's first layers hold 128 channels at full resolution, so only as many
        # images go in at once as make 512 x 512 pixels. (On a CPU channels_last would be faster,
        # but its GroupNorm is inexact where an image is flat: by 1e-4 of the latents.)
        at_once = max(1, 2 ** 18 // pixels[0, 0].numel())
        means = []
        logvars = []
        for part in pixels.split(at_once):
            posterior = self.vae.encode(part.to(self.vae.dtype)).latent_dist
            means.append(posterior.mean)
            logvars.append(posterior.logvar)
        return {"mean": torch.cat(means).float(), "logvar": torch.cat(logvars).float()}

    def _draw_latents(self, features, noises):
        """Each image's latents, drawn from its posterior and normalised: list of [h, w, C]. (RecA
        draws them anew in every step, as the original does.) noises: list of [channels, 2h, 2w]."""
        c = self.config
        latents = []
        for feature, noise in zip(features, noises):
            deviation = (0.5 * feature["logvar"]).exp()
            latent = feature["mean"] + deviation * noise.to(self.device)
            latent = c.vae_scale_factor * (latent - c.vae_shift_factor)
            latents.append(self.patchify(latent))
        return latents

    def patchify(self, latent):
        """latent [channels, 2h, 2w] -> [h, w, C]: a token is the (row, column, channel) of 2 x 2
        places."""
        p = self.config.latent_patch_size
        x = latent.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # [channels, h, p, w, p]
        return x.permute(1, 3, 2, 4, 0).flatten(2)

    def unpatchify(self, tokens):
        """tokens [h, w, C] -> [channels, 2h, 2w], the inverse of patchify."""
        p = self.config.latent_patch_size
        x = tokens.unflatten(2, (p, p, -1))  # [h, w, p, p, channels]
        return x.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)

    def _grid(self, mean):
        """(h, w, C) of the tokens that a posterior's mean [channels, 2h, 2w] becomes."""
        p = self.config.latent_patch_size
        return mean.shape[1] // p, mean.shape[2] // p, self.config.latent_dim

    @torch.no_grad()
    def _decode(self, latents):
        """List of [h, w, C] -> list of pixels [3, 16h, 16w] in about [-1, 1]."""
        images = []
        for tokens in latents:
            latent = self.unpatchify(tokens)[None]  # [1, channels, 2h, 2w]
            latent = latent / self.config.vae_scale_factor + self.config.vae_shift_factor
            images.append(self.vae.decode(latent.to(self.vae.dtype)).sample[0].float())
        return images

    # ---- The decoder on blocks -------------------------------------------------------------------

    def _group_images(self, ids, *tensors):
        """An empty Context for each group of images that can be computed together.

        ids: the text of each image; tensors: lists of each image's tensor, or None. In a group all
        texts are equally long, and tensors have equal shapes.
        """
        keys = []
        for i, text in enumerate(ids):
            shapes = [None if each[i] is None else tuple(each[i].shape) for each in tensors]
            keys.append((len(text), *shapes))
        layers = len(self.blocks())
        return [Context(images, [None] * layers) for images in equal_groups(keys)]

    def _read_block(self, contexts, und_embeddings, gen_embeddings=None, causal=False, final=False):
        """Reads one block of every image: its keys and values join the contexts.

        und_embeddings: of the block's und tokens, per context [B, n, D]; gen_embeddings: of its gen
        tokens, [B, N, D], or None. causal: the block is a text, whose tokens have a position each
        and see only what is before them. Otherwise it is an image, which has one position, and in
        which every token sees every other. final: whether to return the und tokens' hidden states
        after the last norm, per context [B, n, D].
        """
        shapes = self._shapes(und_embeddings, gen_embeddings)
        und_positions = []
        gen_positions = []
        for context, (images, und_tokens, gen_tokens) in zip(contexts, shapes):
            positions = torch.full((und_tokens,), context.position)
            if causal:
                positions = positions + torch.arange(und_tokens)
            und_positions.append(positions.repeat(images))
            gen_positions.append(torch.full((images * gen_tokens,), context.position))

        und = pack(und_embeddings)  # [R, D]
        und_rope = self._rope(und_positions)
        gen = None
        gen_rope = None
        if gen_embeddings is not None:
            gen = pack(gen_embeddings)
            gen_rope = self._rope(gen_positions)

        last = len(self.blocks()) - 1
        for number, layer in enumerate(self.blocks()):
            needed = ("und", "gen")
            if number == last:
                needed = ("und",) if final else ()  # keys and values are already made
            past = [context.keys_values[number] for context in contexts]
            und, gen, extended = layer(und, gen, past, shapes, und_rope, gen_rope, causal, needed)
            for context, keys_values in zip(contexts, extended):
                context.keys_values[number] = keys_values

        for context, (_, und_tokens, _) in zip(contexts, shapes):
            context.position += und_tokens if causal else 1
        if not final:
            return None
        und_shapes = [(images, und_tokens) for images, und_tokens, _ in shapes]
        return unpack(self.language_model["model"]["norm"](und), und_shapes)

    def _noisy_block(self, contexts, und_embeddings, gen_embeddings):
        """The block of noisy latents. It sees its context and itself, and nobody else sees it.

        contexts: recentred, so that the block has position 0; they are not extended.
        und_embeddings: of its two markers, per context [B, 2, D]; gen_embeddings: of its latents,
        [B, N, D]. Returns the latents' hidden states after the last norm, per context [B, N, D].
        """
        shapes = self._shapes(und_embeddings, gen_embeddings)
        und = pack(und_embeddings)
        gen = pack(gen_embeddings)
        last = len(self.blocks()) - 1
        for number, layer in enumerate(self.blocks()):
            needed = ("gen",) if number == last else ("und", "gen")
            past = [context.keys_values[number] for context in contexts]
            und, gen, _ = layer(und, gen, past, shapes, needed=needed)

        gen_shapes = [(images, gen_tokens) for images, _, gen_tokens in shapes]
        return unpack(self.language_model["model"]["norm_moe_gen"](gen), gen_shapes)

    @staticmethod
    def _shapes(und_embeddings, gen_embeddings):
        """(B, n, N) of each group: images, und tokens and gen tokens of an image."""
        shapes = []
        for group, block in enumerate(und_embeddings):
            gen_tokens = gen_embeddings[group].shape[1] if gen_embeddings is not None else 0
            shapes.append((block.shape[0], block.shape[1], gen_tokens))
        return shapes

    def _rope(self, positions):
        """Rotary embedding of packed tokens: positions, a tensor for each group -> cos and sin."""
        return rotary(common.to_device(torch.cat(positions), self.device), self.config)

    def _embed_ids(self, ids):
        """Token ids, a nested list or a tensor on the device -> embeddings [..., D]."""
        if isinstance(ids, list):
            ids = common.to_device(torch.as_tensor(ids, device="cpu"), self.device)
        return self.language_model["model"]["embed_tokens"](ids)

    def _markers(self, count):
        """The start and the end marker of an image block, for `count` images -> [count, 2, D]."""
        return self._embed_ids([[self.config.start_of_image, self.config.end_of_image]] * count)

    def _embed_time(self, t):
        """t [B] in [0, 1] -> [B, D]. The sinusoid takes t itself, not 1000 t, and has its cosines
        first."""
        waves = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embedder["mlp"](waves.to(self.vae2llm.weight.dtype))

    def _embed_latents(self, x, t):
        """x [B, h, w, C], t [B] -> [B, N, D]: projection, time and position are added."""
        tokens = self.vae2llm(x.flatten(1, 2).to(self.vae2llm.weight.dtype))  # [B, N, D]
        time = self._embed_time(t)[:, None]  # [B, 1, D]
        places = self.latent_pos_embed(*x.shape[1:3])  # [N, D]
        return tokens + time.to(tokens.dtype) + places.to(tokens.dtype)

    def _velocities(self, contexts, x, t):
        """What the gen expert predicts: x list of noisy latents [h, w, C], t [images]
        -> list of velocities [h, w, C]. contexts: recentred."""
        markers = [self._markers(len(context.images)) for context in contexts]
        latents = [self._embed_latents(context.stack(x), context.stack(t)) for context in contexts]
        hidden = self._noisy_block(contexts, markers, latents)

        velocities = [None] * len(x)
        for context, states in zip(contexts, hidden):
            predicted = self.llm2vae(states)  # [B, N, C]
            for i, velocity in zip(context.images, predicted):
                velocities[i] = velocity.view(x[i].shape)
        return velocities

    # ==== 3. Loading and saving ===================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """Loads ByteDance-Seed/BAGEL-7B-MoT, bagel-reca, a folder in that layout, or tiny.

        dtype: the precision of the weights that RecA trains; quantize: None or "int8"; see
        _materialize. Strict, but for the two position tables, which may be missing. Raises
        InputError.
        """
        if source == "tiny":
            source = common.tiny_folder("bagel")
        small = ["*.json", "*.txt", "ae.safetensors"]
        weights = common.find_checkpoint(str(source), RECA, WEIGHT_FILES, small, NEEDED)
        folder = weights.parent

        # BAGEL-RecA consists of weights alone. Everything else is the base model's.
        base = folder
        if not (folder / "llm_config.json").exists():
            base = common.hub_folder(DEFAULT, small)

        with torch.device("meta"):
            model = cls(cls._read_config(base))
        try:
            model._read_weights(weights, base / "ae.safetensors", device, dtype, quantize)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot read {folder}: {common.brief(error)}") from error
        if any(base.glob("tokenizer*.json")):
            model._set_tokenizer(common.load_tokenizer(base))
        return model

    def _read_weights(self, weights, vae_weights, device, dtype, quantize):
        """Weights from two files. Every tensor goes to its device by itself, so that nobody holds
        a second copy of the model. (The original builds two in float32 in every process, of 117 GB
        together.)"""
        state = common.autoencoder_from_original(self.vae, common.load_state(vae_weights))
        vae = {f"vae.{key}": tensor for key, tensor in state.items()}

        with safe_open(weights, "pt", str(device)) as file:
            # {our name: name in the file}. Wrappers put a prefix before all names.
            names = common.unwrapped({key: key for key in file.keys()})
            names = {key: name for key, name in names.items() if key not in TABLES}

            # Names and shapes are compared before 29 GB are read.
            shapes = {}
            for key, name in names.items():
                shapes[key] = torch.empty(file.get_slice(name).get_shape(), device="meta")
            for key, tensor in vae.items():
                shapes[key] = tensor.to("meta")
            common.load_strictly(self, shapes, weights.parent)

            def tensors():
                for key in shapes:
                    yield key, vae[key] if key in vae else file.get_tensor(names[key])

            self._materialize(tensors(), device, dtype, quantize)

    def _materialize(self, tensors, device, dtype, quantize=None):
        """Gives every weight its tensor; until now it has a shape alone (torch's device "meta").

        tensors: pairs (name, tensor), made one at a time. Precision: the VAE is float32, as it is
        released (0.3 GB); frozen weights on a GPU are bf16; all others have `dtype`. quantize
        "int8": a matrix that common.quantize would turn into int8 becomes int8 as soon as it is
        here, so that at most 16 GB are held and not 30.
        """
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        common.quantize(self, quantize)
        in_int8 = {name for name, buffer in self.named_buffers() if buffer.dtype == torch.int8}

        state = {}
        for name, tensor in tensors:
            precision = dtype
            if name.startswith("vae."):
                precision = torch.float32
            elif name in frozen and tensor.is_cuda:
                precision = torch.bfloat16

            if name in in_int8:
                state[name], scale = common.int8_rows(tensor.to(device))
                state[name.removesuffix("weight") + "scale"] = scale.to(precision)
            else:
                state[name] = tensor.to(device, precision)
        self.load_state_dict(state, assign=True)
        self.to(device).eval()

    @classmethod
    def random(cls, name, device="cpu", dtype=torch.float32, quantize=None):
        """Random weights, made on the device: `tiny`, or (any other name) the released sizes for
        --bench."""
        tokenizer = common.tiny_tokenizer(MARKERS)
        config = CONFIGS[DEFAULT]
        if name == "tiny":
            config = replace(TINY, llm=TINY.llm | {"vocab_size": len(tokenizer)})
        with torch.device("meta"):
            model = cls(config)

        # Listed now, since int8 turns some parameters into buffers.
        parameters = list(model.named_parameters())

        def initial():
            for name, parameter in parameters:
                shape = parameter.shape
                # The original, too, starts llm2vae at zero. One dimension: the weight of a norm.
                if name.endswith("bias") or name == "llm2vae.weight":
                    yield name, torch.zeros(shape, device=device)
                elif parameter.dim() == 1:
                    yield name, torch.ones(shape, device=device)
                else:
                    scale = parameter[0].numel() ** -0.5
                    yield name, torch.randn(shape, device=device) * scale

        model._materialize(initial(), device, dtype, quantize)
        model._set_tokenizer(tokenizer)
        return model

    def _set_tokenizer(self, tokenizer):
        """Takes the markers' ids from the tokenizer. InputError where it lacks one."""
        self.tokenizer = tokenizer
        fields = ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")
        for name, marker in zip(fields, MARKERS):
            token = tokenizer.convert_tokens_to_ids(marker)
            if token in (None, tokenizer.unk_token_id):
                raise InputError(f"the tokenizer does not know {marker}: not BAGEL's")
            setattr(self.config, name, token)

    def save_pretrained(self, folder, dtype=None):
        """Writes the released layout: ema.safetensors (with the tables), ae.safetensors (under
        FLUX's names), configs, tokenizer.

        dtype: of ema.safetensors. None keeps the precision; bf16 gives the file of 29 GB that
        ComfyUI-BAGEL (models/bagel/BAGEL-7B-MoT) and the original inferencer load. With sharded
        weights all processes must call, and rank 0 writes.
        """
        folder = Path(folder)
        writes = common.world()[0] == 0

        # A sharded tensor is gathered, copied to the CPU on rank 0, and freed, before the next.
        state = {}
        for name, tensor in [*self.state_dict().items(), *self.named_buffers()]:
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if writes and not name.startswith("vae."):
                state[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not writes:
            return

        vae = {}
        for name, tensor in common.autoencoder_to_original(self.vae).items():
            vae[name] = tensor.cpu()

        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "ema.safetensors", {"format": "pt"})
        save_file(vae, folder / "ae.safetensors", {"format": "pt"})
        self._write_config(self.config, folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @staticmethod
    def _read_config(folder):
        """The sizes in llm_config.json, vit_config.json and config.json. Raises InputError.

        In config.json, under "reca", stands what no file of the release holds: it is there in
        checkpoints of ours only. What is missing has the default, the released model's.
        """
        llm = common.read_object(folder / "llm_config.json")
        vit = common.read_object(folder / "vit_config.json")
        config = {}
        if (folder / "config.json").exists():
            config = common.read_object(folder / "config.json")

        fields = {
            "llm": LLM | {name: llm[name] for name in LLM if name in llm},
            "vit": VIT | {name: vit[name] for name in VIT if name in vit},
        }
        for name in ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"):
            if name in config:
                fields[name] = config[name]
        try:
            fields |= config.get("reca", {})
            for name, value in fields.items():
                if isinstance(value, list):
                    fields[name] = tuple(value)
            return BagelConfig(**fields)
        except TypeError as error:
            raise InputError(f"{folder / 'config.json'}: {error}") from error

    @staticmethod
    def _write_config(config, folder):
        """config.json for us; llm_config.json and vit_config.json for us and the original."""
        llm = config.llm | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        vit = config.vit | {"model_type": "siglip_vision_model"}
        ours = asdict(config)
        del ours["llm"]
        del ours["vit"]
        common.write(folder / "llm_config.json", llm)
        common.write(folder / "vit_config.json", vit)
        common.write(folder / "config.json", {
            "architectures": ["BagelForConditionalGeneration"],
            "reca": ours,
        })

    # ==== 4. The embedding-conditioned prompt =====================================================
    #
    #   (start) ViT patches (end)   (begin) template (end)   (start) noisy latents (end)
    #
    # There is no system text and there are no roles. The template stands where a question about
    # the image would stand, and the noisy image where the answer would stand: so RecA asks for an
    # image in the very prompt in which the model is asked to describe one. Text to image is the
    # same without the first block.

    def tokenize(self, text):
        """A text block -> list of ids: begin, the text, end. Raises InputError without a tokenizer.

        A list of ids is returned as it is (tests replay the original's ids). Markers in the user's
        words are words: see common.plain.
        """
        if not isinstance(text, str):
            return text
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer: put tokenizer.json into its folder")
        text = common.plain(text, MARKERS)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.config.bos_token_id, *ids, self.config.eos_token_id]

    def understand(self, features):
        """Features of images with equal grids of patches -> their understanding embeddings
        [B, M, D], as the language model gets them: connector, then positions."""
        vit = torch.stack([feature["vit"] for feature in features])  # [B, rows, columns, Dv]
        rows, columns = vit.shape[1:3]
        fc1 = self.connector["fc1"]
        fc2 = self.connector["fc2"]

        x = fc1(vit.flatten(1, 2).to(fc1.bias.dtype))  # [B, M, D]
        x = fc2(F.gelu(x, approximate="tanh"))  # [B, M, D]
        return x + self.vit_pos_embed(rows, columns).to(x.dtype)

    def recon_prompt(self, templates, text_dropped):
        """The text block of each image in RecA -> list of lists of ids: a template, or nothing
        where text_dropped [B] is True."""
        prompts = []
        for template, dropped in zip(templates, text_dropped.tolist()):
            prompts.append([] if dropped else self.tokenize(template))
        return prompts

    def t2i_prompt(self, captions, text_dropped):
        """The text block of each image in text to image: as recon_prompt, with a caption."""
        return self.recon_prompt(captions, text_dropped)

    def conversation(self, turns):
        """[(question, answer), ...] -> ids and labels: a text block for each question and answer.
        Entry j of the labels is the id that token j is to predict, or IGNORED: only answers, with
        their end markers, are predicted."""
        ids = []
        labels = []
        for question, answer in turns:
            for text, predicted in ((question, False), (answer, True)):
                if not text:
                    continue
                block = self.tokenize(text)
                ids += block
                if predicted:
                    labels += block[1:] + [IGNORED]
                else:
                    labels += [IGNORED] * len(block)
        return ids, labels

    def _read_images(self, contexts, embeddings):
        """Image blocks for the und expert. embeddings: per context [B, M, D], from understand."""
        if not contexts:
            return
        blocks = []
        for context, h_v in zip(contexts, embeddings):
            markers = self._markers(len(context.images))  # [B, 2, D]
            start = markers[:, :1]
            end = markers[:, 1:]
            blocks.append(torch.cat([start, h_v.to(markers.dtype), end], dim=1))
        self._read_block(contexts, blocks)

    def _read_latents(self, contexts, latents):
        """Blocks of clean latents, list of [h, w, C], for the gen expert: an image to be edited. A
        clean image has the time t = 0."""
        t = torch.zeros(len(latents), device=self.device)
        markers = [self._markers(len(context.images)) for context in contexts]
        tokens = [self._embed_latents(c.stack(latents), c.stack(t)) for c in contexts]
        self._read_block(contexts, markers, tokens)

    def _read_texts(self, contexts, ids, final=False):
        """Text blocks for the und expert. ids: each image's list, empty where it has no text.

        Returns the contexts that have a text, and with `final` the hidden states of its tokens
        after the last norm, per context [B, L, D].
        """
        with_text = [context for context in contexts if ids[context.images[0]]]
        if not with_text:
            self._visit_layers()
            return [], []

        embeddings = [self._embed_ids(context.pick(ids)) for context in with_text]
        return with_text, self._read_block(with_text, embeddings, causal=True, final=final)

    def _visit_layers(self):
        """Goes through all layers with two markers, for nothing but other processes. (One process
        does nothing here.)

        With sharded weights all processes gather each layer together. Where every text of this
        process was dropped, the others still read theirs, and would wait for this one forever.
        """
        if dist.is_initialized():
            unused = Context([0], [None] * len(self.blocks()))
            self._read_block([unused], [self._markers(1)])

    # ==== 5. The losses ===========================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA (paper, equation 2): the image that these understanding embeddings describe is to be
        painted.

        features: encode(..., "recon"), each image's dict; templates: each image's text; draws: see
        draw, None draws them from rng.
        -> scalar: squared error of the velocity, the mean over the C channels of all latent tokens
        of the batch. Large images weigh more, as in the original.
        """
        if draws is None:
            draws = self.draw("recon", features, rng)

        # The prompt's text: a template, for one image in ten none.
        ids = self.recon_prompt(templates, draws["text_dropped"])
        draws = common.to_device(draws, self.device)

        # What is to be painted: the image as latents.
        z = self._draw_latents(features, draws["vae_noise"])

        # The context: the image as understanding sees it, then the template. Neither has a graph,
        # since the und expert is frozen. The text may be dropped, the image never is.
        if self.condition == "vit":
            contexts = self._group_images(ids, [feature["vit"] for feature in features], z)
            embeddings = [self.understand(context.pick(features)) for context in contexts]
            self._read_images(contexts, embeddings)
        else:
            # The paper's Table 7: the generation side's own view of the image, clean latents.
            clean = self._draw_latents(features, draws["condition_noise"])
            contexts = self._group_images(ids, z)
            self._read_latents(contexts, clean)
        self._read_texts(contexts, ids)

        # The loss of the model's own pretraining, on the same image.
        return self._generation_loss(contexts, z, draws)

    def _generation_loss(self, contexts, z, draws):
        """Rectified flow: the mean squared error of the velocity. z: list of latents [h, w, C].

        contexts: what the noisy latents see. (A pretraining step of BAGEL has the same loss, behind
        a caption.)
        """
        # The latents on a straight line from the image (t = 0) to noise (t = 1), and the direction
        # of that line. t is the sigmoid of a normal number. (The original's timestep_shift is 1 in
        # training, which changes nothing. It is 3 in sampling.)
        t = draws["timestep_normal"].sigmoid()  # [B]
        x = []
        targets = []
        for time, latents, noise in zip(t, z, draws["flow_noise"]):
            x.append((1 - time) * latents + time * noise)
            targets.append(noise - latents)

        # The gen expert predicts the direction. This is where gradients come from.
        contexts = [context.recentred(self.config) for context in contexts]
        velocities = self._velocities(contexts, x, t)

        # One number for each latent token, and the mean of all of them.
        errors = []
        for velocity, target in zip(velocities, targets):
            errors.append((velocity.float() - target).square().mean(dim=-1).flatten())
        errors = torch.cat(errors)  # [tokens]
        return common.mean(errors.sum(), len(errors))

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image: a caption, then noisy latents. RecA does not use it (lambda_t2i = 0); it
        is supervised fine-tuning."""
        if draws is None:
            draws = self.draw("t2i", features, rng)
        ids = self.t2i_prompt(captions, draws["text_dropped"])
        draws = common.to_device(draws, self.device)

        z = self._draw_latents(features, draws["vae_noise"])
        contexts = self._group_images(ids, z)
        self._read_texts(contexts, ids)
        return self._generation_loss(contexts, z, draws)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Cross-entropy of the answers' tokens, the mean over all of them.

        conversations: lists of (question, answer); features without "vit" are texts without an
        image. It has no gradient unless freeze(train_und=True) opens the expert.
        """
        ids = []
        labels = []
        for turns in conversations:
            text, text_labels = self.conversation(turns)
            ids.append(text)
            labels.append(text_labels)

        # The image block, where there is an image, then all turns of the conversation.
        contexts = self._group_images(ids, [feature.get("vit") for feature in features])
        seeing = [context for context in contexts if "vit" in features[context.images[0]]]
        self._read_images(seeing, [self.understand(context.pick(features)) for context in seeing])
        contexts, hidden = self._read_texts(contexts, ids, final=True)

        # Only tokens with a label go through the head.
        total = 0.0
        count = 0
        for context, states in zip(contexts, hidden):
            target = torch.tensor(context.pick(labels))
            row, token = (target != IGNORED).nonzero(as_tuple=True)
            count += len(row)
            places = [row, token, target[row, token]]
            row, token, target = common.to_device(places, self.device)
            head = self.language_model["lm_head"]
            total = total + common.cross_entropy_sum(head, states[row, token], target)
        return common.mean(total, count)

    def draw(self, task, features, rng=None):
        """Every random number of a loss, on the CPU, from each image's own generator.

        text_dropped [B], bool, True where the text is left out; timestep_normal [B]; lists with an
        entry per image: vae_noise, and condition_noise where --condition vae needs it, [channels,
        2h, 2w]; flow_noise [h, w, C].
        """
        if task == "i2t":
            return {}
        if rng is None:
            rng = Rng.fresh(len(features))

        text_dropped = rng.uniform() < TEXT_DROP  # [B]
        timestep_normal = rng.normal()  # [B]
        draws = {
            "text_dropped": text_dropped,
            "timestep_normal": timestep_normal,
            "vae_noise": [],
            "flow_noise": [],
        }
        for feature, generator in zip(features, rng.images):
            shape = feature["mean"].shape
            draws["vae_noise"].append(torch.randn(shape, generator=generator))
            grid = self._grid(feature["mean"])
            draws["flow_noise"].append(torch.randn(grid, generator=generator))
            if task == "recon" and self.condition == "vae":
                noise = torch.randn(shape, generator=generator)
                draws.setdefault("condition_noise", []).append(noise)
        return draws

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: latent tokens, or tokens of answers."""
        count = 0
        if task == "i2t":
            for turns in texts:
                _, labels = self.conversation(turns)
                count += sum(label != IGNORED for label in labels)
            return count
        for feature in features:
            h, w, _ = self._grid(feature["mean"])
            count += h * w
        return count

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: square
        images of the largest size, with the longest text, which is not dropped."""
        vit_side = self.config.vit_limits[0] if task == "i2t" else self.und_size
        sides = {"vae": self.config.vae_limits[0], "vit": vit_side}
        encoders = {"recon": ("vae", "vit"), "t2i": ("vae",), "i2t": ("vit",)}
        sample = {}
        for name in encoders[task]:
            sample[name] = torch.zeros(3, sides[name], sides[name], dtype=torch.uint8)

        words = "word " * 300
        longest = max(common.templates(), key=len)
        texts = {"recon": longest, "t2i": words, "i2t": [(words, words)]}
        draws = {}
        if task != "i2t":
            draws = {"text_dropped": torch.zeros(count, dtype=torch.bool)}
        return [sample] * count, [texts[task]] * count, draws

    # ==== 6. Inference ============================================================================

    @torch.no_grad()
    def generate(self, prompts, *, num_steps=None, guidance_scale=None, seed=0, draws=None,
                 size=None, **sampler):
        """Text to image: texts -> PIL images.

        size: one side, or (height, width); None is the config's. seed: an int, or one per image
        (see Rng.sampling). draws: {"noise": list of [h, w, C]}. num_steps, guidance_scale and
        sampler: what differs from the config's settings (see _settings). Raises InputError.
        """
        settings = self._settings(
            "generate",
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            **sampler,
        )
        size = self.config.image_size if size is None else size
        samples = [{} for _ in prompts]
        return self._paint(samples, (), prompts, size, seed, draws, settings)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, num_steps=None, guidance_scale=None, seed=0,
                    draws=None, size=None, **sampler):
        """Image to image through the understanding embeddings alone: what RecA trains.

        images: list of PIL; templates: None is the seed template. size None is the size that the
        VAE would have for the photo. Otherwise as generate. (In the original's notebook the ViT
        sees 518 pixels; here und_size, as in training.)
        """
        settings = self._settings(
            "reconstruct",
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            **sampler,
        )
        samples = [self.preprocess(image, "recon") for image in images]
        if templates is None:
            templates = [common.SEED_TEMPLATE] * len(images)
        return self._paint(samples, (self.condition,), templates, size, seed, draws, settings)

    @torch.no_grad()
    def edit(self, images, instructions, *, num_steps=None, guidance_scale=None, seed=0, draws=None,
             size=None, **sampler):
        """Edits images by instruction: the photo's latents, the photo for the ViT, the text.

        draws: lists "noise" of [h, w, C] and "vae_noise" of [channels, 2h, 2w]. Otherwise as
        reconstruct.
        """
        settings = self._settings(
            "edit",
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            **sampler,
        )
        samples = [self.preprocess(image, "edit") for image in images]
        return self._paint(samples, ("vae", "vit"), instructions, size, seed, draws, settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, the likeliest token each time: list of PIL -> list of str. The ViT sees
        224 to 980 pixels here."""
        samples = [self.preprocess(image, "i2t") for image in images]
        features = self.encode(samples, "i2t")
        ids = [self.tokenize(question)] * len(images)
        answers = self._answer(features, ids, max_new_tokens)
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return [text.strip() for text in texts]

    def _answer(self, features, ids, max_new_tokens):
        """Image block, question, answer -> lists of the answers' ids without begin and end. All
        images decode together until the last one has ended."""
        end = self.config.eos_token_id
        contexts = self._group_images(ids, [feature["vit"] for feature in features])
        self._read_images(contexts, [self.understand(c.pick(features)) for c in contexts])
        self._read_texts(contexts, ids)

        # The contexts' images one after another, and how to bring them back into their order.
        images = [i for context in contexts for i in context.images]
        order = torch.tensor(images, device="cpu").argsort()
        answers = torch.full((len(ids), 1), self.config.bos_token_id, device=self.device)
        while answers.shape[1] <= max_new_tokens and not (answers == end).any(dim=1).all():
            newest = [self._embed_ids(answers[context.images, -1:]) for context in contexts]
            hidden = self._read_block(contexts, newest, causal=True, final=True)
            logits = self.language_model["lm_head"](torch.cat(hidden)[:, 0])  # [B, vocabulary]
            choice = logits.argmax(dim=-1, keepdim=True)[order]  # [B, 1]
            answers = torch.cat([answers, choice], dim=1)

        without_markers = []
        for answer in answers.tolist():
            stop = answer.index(end) if end in answer else len(answer)
            without_markers.append(answer[1:stop])
        return without_markers

    def _settings(self, task, **given):
        """The sampler's settings: the config's for generate, reconstruct or edit, replaced by what
        is given (None: not given)."""
        c = self.config
        settings = {
            "num_steps": c.num_steps,
            "timestep_shift": c.timestep_shift,
            "guidance_scale": c.guidance_scale,
            "image_guidance_scale": 1.0,  # none: there is no image in the prompt
            "interval": c.interval,
            "renorm": c.renorm,
            "renorm_min": c.renorm_min,
        }
        if task in ("edit", "reconstruct"):
            settings["image_guidance_scale"] = c.image_guidance_scale
            settings["interval"] = c.edit_interval
            settings["renorm"] = c.edit_renorm
        if task == "reconstruct":
            settings["renorm_min"] = c.reconstruct_renorm_min

        for name, value in given.items():
            if value is not None:
                settings[name] = value
        return settings

    def _paint(self, samples, encoders, texts, size, seed, draws, settings):
        """Paints an image for each text -> list of PIL. encoders: the blocks before the text, of
        "vae" and "vit"; size: a side, (height, width), or None for that of the sample's "vae"."""
        stride = self.config.stride
        rng = Rng.sampling(seed, len(texts))
        noise = []
        for sample, generator in zip(samples, rng.images):
            if size is None:
                height, width = sample["vae"].shape[1:]
            elif isinstance(size, int):
                height, width = size, size
            else:
                height, width = size
            if height % stride or width % stride or min(height, width) < stride:
                raise InputError(f"an image of {height} x {width} cannot be painted: sides must be "
                                 f"multiples of {stride}")
            grid = (height // stride, width // stride, self.config.latent_dim)
            noise.append(torch.randn(grid, generator=generator))

        # The image blocks' content. The images' generators go on where the noise left them.
        pixels = []
        for sample in samples:
            pixels.append({name: sample[name] for name in encoders})
        # What they encode is in the samples: none for generate, whatever the task is called here.
        features = self.encode(pixels, "edit")
        clean = [None] * len(texts)
        vits = [feature.get("vit") for feature in features]
        draws = {"noise": noise} | (draws or {})
        if "vae" in encoders:
            if "vae_noise" not in draws:
                draws["vae_noise"] = [
                    torch.randn(feature["mean"].shape, generator=generator)
                    for feature, generator in zip(features, rng.images)
                ]
            clean = self._draw_latents(features, draws["vae_noise"])

        # Three contexts for guidance: everything; all but the text; all but the images.
        ids = [self.tokenize(text) for text in texts]
        everything = self._group_images(ids, vits, clean, noise)
        if "vae" in encoders:
            self._read_latents(everything, clean)
        if "vit" in encoders:
            embeddings = [self.understand(context.pick(features)) for context in everything]
            self._read_images(everything, embeddings)
        text_free = [replace(c, keys_values=list(c.keys_values)) for c in everything]
        self._read_texts(everything, ids)
        image_free = []
        if settings["image_guidance_scale"] > 1:
            image_free = self._group_images(ids, noise)
            self._read_texts(image_free, ids)

        contexts = (everything, text_free, image_free)
        latents = self._sample(contexts, draws["noise"], **settings)

        # The original's rounding: clamped, times 255, truncated.
        images = []
        for decoded in self._decode(latents):
            rounded = ((decoded / 2 + 0.5).clamp(0, 1) * 255).byte()
            images.append(Image.fromarray(rounded.permute(1, 2, 0).cpu().numpy()))
        return images

    def _sample(self, context_sets, noise, *, num_steps, timestep_shift, guidance_scale,
                image_guidance_scale, interval, renorm, renorm_min, progress=False, trace=None):
        """Follows the velocity from noise (t = 1) to an image (t = 0), with Euler's method: list of
        [h, w, C] in and out.

        context_sets: contexts with everything, without the text, and without images (empty where
        image_guidance_scale is 1). interval: guidance acts where FROM < t <= TO. progress: show a
        bar. trace: a list that gets (t, x, velocity, both scales) of each move. Raises InputError.
        """
        if renorm not in ("global", "channel", "text_channel"):
            raise InputError(
                f"unknown renormalisation {renorm}: global, channel or text_channel")
        if num_steps < 2:
            raise InputError(
                f"num_steps {num_steps}: the sampler goes from step to step, give 2 or more")

        # The network computes the two or three passes of a guided move as one batch, each at its
        # own context's position: image i is there once with each set of contexts, in set k under
        # the number k * count + i. Of 4 images, image 1 is number 1 with everything, 5 without the
        # text, 9 without images, and velocities[1::4] are its three.
        count = len(noise)
        passes = []
        for k, contexts in enumerate(context_sets):
            numbered = []
            for context in contexts:
                images = [k * count + i for i in context.images]
                numbered.append(replace(context.recentred(self.config), images=images))
            passes.append(numbered)

        # timestep_shift above 1 puts more of the times near 1.
        times = torch.linspace(1, 0, num_steps)
        times = (timestep_shift * times / (1 + (timestep_shift - 1) * times)).tolist()
        moves = list(zip(times[:-1], times[1:]))

        x = [start.to(self.device) for start in noise]
        for t, next_t in tqdm(moves, disable=not progress, desc="sample", leave=False):
            # A text scale of 1 or less switches all guidance off, that of the image too, as in the
            # original.
            guided = guidance_scale > 1 and interval[0] < t <= interval[1]
            used = 1
            scales = (1.0, 1.0)
            if guided:
                used = 3 if image_guidance_scale > 1 else 2
                scales = (guidance_scale, image_guidance_scale)

            contexts = sum(passes[:used], [])
            time = torch.full((used * count,), t, device=self.device)
            velocities = self._velocities(contexts, x * used, time)
            velocities = [velocity.float() for velocity in velocities]
            if guided:
                velocities = [self.guide(velocities[i::count], *scales, renorm, renorm_min)
                              for i in range(count)]

            if trace is not None:
                trace.append((t, x, velocities, scales))
            x = [state - velocity * (t - next_t) for state, velocity in zip(x, velocities)]
        return x

    @staticmethod
    def guide(velocities, text_scale, image_scale, renorm, renorm_min):
        """Classifier-free guidance of one image -> its velocity [h, w, C].

        velocities: with everything, without the text, and perhaps without images. The velocity is
        moved away from what it would be without the text, then from what it would be without
        images. This makes it too long. `renorm` says how it is shrunk to the length that it had:
        "global" with one factor for the image (the original has one for the batch, so that an image
        depends on its neighbours there), "channel" with a factor for each token, "text_channel"
        likewise, but between the two guidances. The factor stays between renorm_min and 1, so
        renorm_min = 1 switches it off.
        """
        def shrink(guided):
            axes = (0, 1, 2) if renorm == "global" else -1
            wanted = torch.linalg.vector_norm(velocity, dim=axes, keepdim=True)
            length = torch.linalg.vector_norm(guided, dim=axes, keepdim=True)
            return guided * (wanted / (length + 1e-8)).clamp(renorm_min, 1.0)

        velocity = velocities[0]
        text_free = velocities[1]
        guided = text_free + text_scale * (velocity - text_free)
        if renorm == "text_channel":
            guided = shrink(guided)
        if len(velocities) == 3:
            image_free = velocities[2]
            guided = image_free + image_scale * (guided - image_free)
        if renorm == "text_channel":
            return guided
        return shrink(guided)


# ==== 7. main() ===================================================================================
#
# Before main() stand: the division of the weights over GPUs, the trainer whose checkpoints are
# divided likewise, the flags of this script, and editing from files.
#
# Where the bytes go when one 80 GB card (79.6 GiB = 85.5 GB) trains 6.54 billion weights beside
# 8.12 billion frozen ones:
#
#                                      float32 AdamW    bf16, stochastic rounding
#     frozen weights, bf16                 16.5 GB           16.5 GB     (VAE and tables in float32)
#     trained weights                      26.2 GB           13.1 GB     (float32 masters, or none)
#     gradients                            26.2 GB           13.1 GB
#     first and second moments             52.3 GB           26.2 GB
#     sum                                 121.2 GB           68.9 GB
#
#     an image of 1024 px with checkpointing    0.8 GB    (28 layers x 4098 tokens x 3584 x 2 bytes)
#     MLP of the layer that is recomputed       1.1 GB    an image (7 x 4098 x 18944 x 2 bytes)
#
# With attention and all else it is 2.7 GB an image (docs/memory.md). So one card takes bf16.
# Float32 AdamW needs sharding over 2 cards of 80 GB or 8 of 48 GB, each of which first holds the
# whole model, 43 GB. (The original gives float32 masters, gradients, two moments and an average, 20
# bytes, to each of 14.2 billion parameters, of which only 6.54 billion can move: 283 GB over its
# GPUs together.)


def shard(model):
    """Divides the weights over all processes with FSDP2 (torch's fully sharded data parallelism).

    In plain data parallelism every GPU holds all weights, gradients and moments, which do not fit.
    Here each GPU owns an n-th of every tensor, with its gradient and moments. Just before a layer
    is computed its parts are gathered from all GPUs, and right after it they are freed again;
    gradients arrive as their mean over the GPUs, each GPU keeping its own part.

    Sharded are the decoder layers, one by one, with both experts: most of the bytes, of which only
    one layer needs to be whole at a time. The trained weights outside of them (time MLP,
    projections, last norm) form one more unit. What is frozen outside stays whole on every GPU:
    ViT, VAE, embedding and head, 3.4 GB. So encoding images needs no communication, and each
    process may encode as many as it has.
    """
    inside = {p for layer in model.blocks() for p in layer.parameters()}
    frozen_outside = {p for p in model.parameters() if not p.requires_grad} - inside

    # On GPUs layers compute in bf16, and gradients are added up in float32. cast_forward_inputs
    # would cast the rotary tables to bf16, too (as the original does).
    device = model.device.type
    policy = MixedPrecisionPolicy()
    if device == "cuda":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
    mesh = init_device_mesh(device, (common.world()[1],))
    for layer in model.blocks():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=frozen_outside)

    # FSDP gathers the outer unit when one of these is called, as if it were forward().
    # (`reconstruct` makes the previews, which all processes paint together.)
    for method in ("recon_loss", "i2t_loss", "t2i_loss", "reconstruct"):
        register_fsdp_forward_method(model, method)


def prepare(model, args):
    """Called by common.run before training -> arguments for the trainer. FSDP2 averages gradients
    by itself, so nothing is left to do for `average`."""
    if common.world()[1] == 1:
        return {}
    shard(model)
    return {"average": lambda parameters: None}


class BagelTrainer(common.Trainer):
    """The loop of common.py, with checkpoints that any number of processes write and read.

    A checkpoint holds the files of the release (in bf16 after training on GPUs), and in shards/ the
    exact trained weights and the optimizer's state, of which each process writes its own part
    (torch.distributed.checkpoint).
    """
    sharded = True

    def _shards(self):
        # The warning is about a single process, where there is nothing to distribute.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        weights = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                weights[name] = parameter.detach()
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"weights": weights, "optimizer": optimizer}

    def save(self):
        """As in common.py, but all processes take part; rank 0 alone renames and deletes."""
        folder = self.out / f"checkpoint-{self.step:06d}"
        temporary = self.out / f".tmp-checkpoint-{self.step:06d}"
        dtype = None
        if self.model.device.type == "cuda" and self.args.precision == "bf16":
            dtype = torch.bfloat16

        try:
            self.model.save_pretrained(temporary, dtype=dtype)
            dcp.save(self._shards(), checkpoint_id=temporary / "shards")
            if common.world()[0] == 0:
                torch.save(self.progress(), temporary / "trainer.pt")
                common.remove(folder)
                temporary.rename(folder)
                for old in common.own_checkpoints(self.out)[:-2]:
                    shutil.rmtree(old)
        except (InputError, OSError, dcp.api.CheckpointException, RuntimeError,
                SafetensorError) as error:
            common.remove(temporary)
            raise InputError(f"cannot write {folder}: {common.brief(error)}; the checkpoints "
                             "before it are kept") from error
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        self.go_on_from(common.load_training(folder))
        shards = self._shards()
        try:
            dcp.load(shards, checkpoint_id=folder / "shards")  # weights are read in place
        except (dcp.api.CheckpointException, OSError, EOFError) as error:
            raise InputError(f"cannot read {folder / 'shards'}: {common.brief(error)}") from error
        with common.own_options(self.optimizer):
            set_optimizer_state_dict(self.model, self.optimizer, shards["optimizer"])

    def train(self):
        """After training all weights are gathered once and stay: rank 0 goes on alone, with scores
        and inference."""
        super().train()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()


def flags(parser):
    """The flags that only this architecture has."""
    group = parser.add_argument_group("BAGEL only")

    # Training.
    group.add_argument(
        "--condition",
        choices=("vit", "vae"),
        default="vit",
        help="what RecA conditions on: ViT (semantic) or VAE embeddings (the paper's Table 7)",
    )

    # Editing.
    group.add_argument(
        "--edit",
        type=common.expanded,
        help="editing prompts: ImgEdit's singleturn.json, or GEdit's rows as .jsonl; results in "
        "that layout",
    )
    group.add_argument(
        "--edit-images",
        type=common.expanded,
        help="folder of the source images of --edit (default: the folder of the file)",
    )
    group.add_argument(
        "--image-guidance-scale",
        type=common.number(0),
        help="of --edit (default 2; the original's ImgEdit script: 1.5)",
    )

    # The sampler. What is not given is the config's.
    group.add_argument(
        "--cfg-interval",
        type=common.number(0, 1),
        nargs=2,
        metavar=("FROM", "TO"),
        help="guide where FROM < t <= TO; t falls from 1, noise, to 0 (default 0.4 1; edits and "
        "reconstructions 0 1)",
    )
    group.add_argument(
        "--cfg-renorm",
        choices=("global", "channel", "text_channel"),
        help="how a guided velocity is shrunk back (default global; edits and reconstructions "
        "text_channel)",
    )
    group.add_argument(
        "--timestep-shift",
        type=common.number(0.01, 100),
        help="above 1: more of the sampler's steps at high noise (default 3)",
    )


def imgedit_job(key, row):
    """A row of ImgEdit's singleturn.json -> (image's name, instruction, [names of the outputs])."""
    return row["id"], common.text_in(row, "prompt"), [f"{key}.png"]


def gedit_job(_, row):
    """A row of GEdit -> (image's name, instruction, [name of the output, of the source's copy])."""
    image = row.get("image", f"{row['key']}.png")
    instruction = common.text_in(row, "instruction")
    folders = ("gen_image/fullset", row["task_type"], row["instruction_language"])
    name = "/".join((*folders, row["key"]))
    return image, instruction, [f"{name}.png", f"{name}_SRCIMG.png"]


def edit_jobs(path, sources, out):
    """--edit FILE -> [(name, source image, instruction, [output, GEdit's copy of the source])],
    with outputs where the benchmark's scorer looks for them:

    ImgEdit's singleturn.json: {key: {"id": image, "prompt": ...}} -> out/<key>.png
    GEdit's rows as .jsonl: {"key", "task_type", "instruction", "instruction_language", "image"
        (default <key>.png)} -> out/gen_image/fullset/<task_type>/<language>/<key>.png and
        <key>_SRCIMG.png

    Images are relative to `sources` (default: the file's folder). Raises InputError.
    """
    path = Path(path)
    sources = Path(sources or path.parent)
    is_gedit = path.suffix.lower() == ".jsonl"
    table = common.read_json(path, lines=is_gedit)

    jobs = []
    try:
        rows = enumerate(table) if is_gedit else table.items()
        for key, row in rows:
            image, instruction, names = gedit_job(key, row) if is_gedit else imgedit_job(key, row)
            paths = [common.inside(out, name) for name in names]
            jobs.append((image, sources / image, instruction, paths))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: row {len(jobs) + 1} is neither ImgEdit's (singleturn.json: id, prompt) nor "
            "GEdit's (.jsonl: key, task_type, instruction, instruction_language)") from error

    outputs = []
    for number, (_, _, _, paths) in enumerate(jobs, start=1):
        outputs += [(f"row {number}", file) for file in paths]
    common.check_outputs(outputs, path)
    return jobs


def edit_files(model, args, jobs):
    """--edit: paints what is missing or was made from something else. (The original crops black
    borders off its results; we do not.)"""
    image_scale = args.image_guidance_scale
    if image_scale is None:
        image_scale = model.config.image_guidance_scale
    options = {"image_guidance_scale": image_scale, **common.sampler_options(args)}
    edit_origin = common.origin(
        model,
        args,
        "edit",
        seed=args.seed,
        image_guidance_scale=image_scale,
    )

    wanted = []
    for name, source, instruction, paths in jobs:
        made_from = {**edit_origin, "instruction": instruction}
        made_from["source"] = common.fingerprint(source)
        wanted.append((paths[0], made_from, name, source, instruction, paths[1:]))
    outputs = common.Outputs(wanted)

    todo = [(name, source, instruction, path, made_from, copies)
            for path, made_from, name, source, instruction, copies in outputs.todo]

    def edit(images, instructions):
        return model.edit(images, instructions, seed=[args.seed] * len(images), **options)

    for chunk in common.in_batches("edit", todo, args.batch_images):
        jobs_read = list(common.readable(chunk))
        if not jobs_read:
            continue
        images = [job[1] for job in jobs_read]
        instructions = [job[2] for job in jobs_read]
        edited = common.what_fits(args, edit, images, instructions)
        for (_, image, _, path, made_from, copies), picture in zip(jobs_read, edited):
            # The copies come first, since a written edit says that both are there.
            for copy in copies:
                common.write(copy, image, {**made_from, "copy": True})
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
        raise InputError("--sampling-steps 1: BAGEL's sampler goes from step to step, 1 paints "
                         "nothing; give 2 or more")
    if args.lambda_i2t or args.i2t_data:
        raise InputError("--lambda-i2t: BAGEL's understanding expert is frozen, L_i2t would train "
                         "nothing")
    Bagel.condition = args.condition

    editing = {}
    if args.edit:
        editing[edit_files] = edit_jobs(args.edit, args.edit_images, args.out)
    common.run(Bagel, args, prepare, BagelTrainer, editing)


if __name__ == "__main__":
    common.cli(main)
