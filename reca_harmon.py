r"""RecA for Harmon, in one file: the model learns to paint images from its own view of them.

Why. A model that paints from text has learned from pairs of an image and a caption, and captions
are sparse: even hundreds of words leave out where things are, which shape and which color they
have. Hardly any caption mentions that a broccoli is green. So the model learns the rule "broccoli
is green", and paints a green one when it is asked for a yellow one. Embeddings are dense. When the
model looks at an image, its understanding side turns it into vectors that hold the color, the shape
and the place of everything in it, in the form in which its language model reads words: it answers
questions from them. RecA (Reconstruction Alignment, arXiv 2509.07295) gives the model these vectors
instead of a caption, and trains it to paint that same image. It needs images, and no captions.

The method (paper, section 2.2). Equation (2) is the loss of RecA, equation (3) the whole objective:

    (2)   L_recon = loss( f( concat(t_template, h_v) ), I_gt )
    (3)   L       = λ_recon · L_recon + λ_i2t · L_i2t + λ_t2i · L_t2i

    h_v         the understanding embeddings of the image, 1088 vectors: `understand`
    t_template  the text around them, one of 360 like "Describe the image in detail.":
                `recon_prompt`
    I_gt        the same image as `latents`, 1024 tokens of 16 numbers; most of them are masked
    f           the whole model but for the VAE. It gets the visible tokens of I_gt as well, which
                equation (2) leaves out, and predicts the masked ones
    loss        Harmon's own generation loss, a diffusion loss on the masked tokens:
                `diffusion_terms`
    L_i2t       image to text, cross-entropy of the answers to questions about images: `i2t_loss`
    L_t2i       text to image, as L_recon with a caption in place of the embeddings: `t2i_loss`
    λ           the flags --lambda-recon 1, --lambda-i2t 1, --lambda-t2i 0: `Recipe`

What is special here. Harmon (arXiv 2503.21979) understands (the "und" side) and generates (the
"gen" side) with the same encoder, that of MAR, a masked autoencoder (arXiv 2406.11838). Its tokens
are the latents of a VAE: vectors of 16 real numbers, not indices. When nothing is *masked*, the
encoder's output becomes the understanding embeddings. When most tokens are masked (left out of the
input), its output for the *visible* ones is the *context*, from which MAR's decoder predicts the
rest. Two *connectors* of two layers each, proj_in and proj_out, lead into the language model
Qwen2.5 and back. What belongs to no place of the image goes through the *buffer*: 64 further
tokens, always visible. All 64 are the same learned vector, plus a position vector each. In a
prompt, a *marker* (an id that no word has) holds the place of the embeddings. As a token is a
vector of real numbers, no softmax can predict it: the last part, the diffusion head, is a small
diffusion model of single tokens.

The data flow of L_recon for B images of 512 px, N = 32 x 32 tokens, E = 64 of the buffer, V
visible:

    image [B, 3, 512, 512] --VAE--> latents [B, N, C] --+
      understanding: nothing is masked                  |      generation: 70 to 100% are masked
        MAR encoder  [B, E+N, De]  <--------------------+-->  MAR encoder  [B, E+V, De] --+ context
        proj_in      [B, N+E, D]                              proj_in      [B, V+E, D]    |
               |    (gradient x 0.1)                                 |                    |
    "user" [ understanding embeddings ] "Describe ... assistant" [ visible, buffer ]      |
                                      |                                                   |
                               Qwen2.5, causal                                            |
                                      | its output at the visible and buffer tokens       |
                                  proj_out  [B, E+V, De] ------------ + ------------------+
                                                                      |
                                 MAR decoder: a condition for every place  [B, N, Dd]
                                                                      | those of masked places
                                 diffusion head: which noise is in the token?  ->  L_recon

What is frozen, and why. The VAE (66 of 2561 million weights; Harmon-1.5B), and class_emb, 1.3
million weights that nothing reads. The VAE translates pixels into tokens, which are the targets: if
it were trained, the loss would fall by making targets that are easy to predict. All else is
trained. The paper freezes the understanding encoder where it serves only understanding. Here the
same encoder and the same language model serve both sides: freezing them would freeze most of what
generates.

At which size the model sees the image. The understanding side gets 512 px, the size at which the
released Harmon has learned to understand and to paint (section 3.5: its resolution is fixed). The
paper resizes to the smallest size that the understanding side accepts, and not to a larger one:
embeddings of larger images hold more details of the pixels, and the model then relies on these
instead of on the meaning (BAGEL, paper's Table 7). In the extreme it copies tokens and learns
nothing (appendix F.2: Show-o with 512 px in its tokenizer). --und-size (other sizes) and --blur (an
image without its details) try this here; the paper does so with BAGEL and Show-o only.

Why does Harmon not copy? Its embeddings are made from the very latents that are the target, too.
The paper reports no collapse: GenEval rises from 72.9 to 85.7 (Table 2). What differs from Show-o:
there the prompt holds the target's own indices, which can be copied as they are. Here it holds what
MAR's encoder and proj_in have made of the latents, vectors from which Harmon answers questions, and
the gradient that could turn them into copies is multiplied by 0.1 (below). Whether these are the
reasons, the paper does not say.

What keeps understanding alive. Both sides share their weights, so RecA alone could overwrite what
the model knows of describing. Hence λ_i2t = 1: each step also trains on conversations about images
(the paper's are LLaVA-1.5's 665,000, flag --i2t-data). And the gradient into the understanding
embeddings is multiplied by 0.1 (`grad_scale`), in L_recon and in L_i2t. That is the way back to
proj_in and MAR's encoder; what these get from the generation side, and all that the language model
gets, is not scaled. Without conversations, the model first describes 1024 of its own training
images (--self-captions), and these descriptions are the answers of L_i2t. That is ours, not the
paper's.

Inference does not change. After RecA the model paints from a text with the prompt and the sampler
that it had before; nobody has to give it an image. (`reconstruct`, which paints from an image's
embeddings, is there to show what the model understands and can paint.) RecA's prompt is that of
captioning ("Describe ...", appendix C.1), the painting prompt is "Generate an image: ...". That the
one helps the other is a finding of the paper. Its explanation: in the deeper layers of the language
model, words and images of the same thing have similar features (appendix D). The sampler:

    prompts = "Generate an image: a dog.", and for guidance "Generate an image."
    for k in 1 .. 64:                              # the places in a random order, all masked
        left = 1024 * cos(pi/2 * k/64)             # rounded down; 0 after the last
        z = conditions of the places that are painted now, for both prompts, as in training
        x = random numbers
        for t in 100 of the 1000 timesteps, the noisiest first:
            noise = the head's for no caption + 3 * (its for the caption - its for no caption)
            x = denoising_step(x, noise), plus fresh noise of the variance for the caption
        latents at these places = x                # the next k sees them as visible tokens
    image = the VAE's decoder of the latents

A step, from images to moved weights (section 5, and Trainer.take_step in common.py):

    for step in range(5000):                             # a step: equation (3), once
        latents = encode(24 images)                      # the VAE, frozen
        understood = proj_in(mar.encode(latents))        # h_v: nothing is masked
        masked, visible = a random split of the tokens   # 717 to 1024 of 1024 are masked
        context = mar.encode(latents at visible)
        context += proj_out(qwen(prompt(template, understood), proj_in(context)))
        conditions = mar.decode(context)                 # for all 1024 places
        L_recon = diffusion_loss(conditions at masked, latents at masked)
        L_i2t = cross_entropy(answers, given 24 images and questions)
        (L_recon + L_i2t).backward()
        if step % 4 == 3: clip the gradient, AdamW       # an update: the weights move

An example with numbers. One image, "Describe the image in detail.", 888 of 1024 tokens masked (the
mean). The language model gets 1302 tokens, at the positions 0 to 1301:

    positions    number
       0 ..    2      3   <|im_start|> user \n\n
       3 .. 1026   1024   understanding embeddings of the image's tokens, row by row
    1027 .. 1090     64   understanding embeddings of the buffer
    1091 .. 1096      6   Describe the image in detail .
    1097 .. 1101      5   <|im_end|> \n <|im_start|> assistant \n
    1102 .. 1237    136   the visible tokens, row by row; the masked ones are absent
    1238 .. 1301     64   the buffer

Each token sees itself and those before it. So the words see the image, the visible tokens see words
and image, and the buffer, at the end, sees everything; the understanding embeddings do not see the
words. Only the last 136 + 64 outputs are used. Positions count tokens, not places in the image:
these are in MAR's position tables. In MAR's encoder (64 + 1024 tokens for understanding, 64 + 136
for generation) and in its decoder (64 + 1024) every token sees every token. The diffusion head gets
the 888 masked tokens. Over all templates and masks the language model gets about 1308 tokens.

What is drawn (`draw`). The masked part, one for all images of a step: normal with mean 1 and
deviation 0.25, cut off to [0.7, 1]. For each image: which places are masked, and whether the
instruction is left out (one in ten). For each token: 4 timesteps, uniform from 0 to 999, and noise
for each. The loss is the mean over all masked tokens and their 4 noise levels.

Where the numbers come from. Table 8 of the paper: learning rate, weight decay, warm-up, number of
steps, batch, accumulation and λ (`Recipe` says how its micro-batches became our steps). The public
code and configuration of the original: all sizes, betas and eps, the schedule's length, the
clipping of the gradient (1 there, 2 here: `Recipe`), the mean of the VAE as latents, how masks and
noise are drawn, how often a text is dropped, dropout, `grad_scale`, the prompts and the number of
ids at which they are cut, and the sampler. Ours: everything of "tiny", --self-captions, and the
wording of the 360 templates, which the paper shows only in part.

The original's accidents that this file follows, since the released models were trained so: two
newlines before the image in RecA's prompt, and one elsewhere; a prompt "without a condition" that
keeps its embeddings; likelihood in bins that are made for 8-bit pixels. Where it differs on
purpose: a step has both losses, not one; padding stands at the end of a sequence; only masked
tokens go through the diffusion head, in float32. docs/originals.md has all of it in a table.

What the loss looks like.

L_recon falls slowly: most of it is noise that nobody can predict. The tiny run (seed 0), means of
steps 1-25, 26-50, 51-75, 76-100 and 126-150: 0.073, 0.068, 0.063, 0.061, 0.056. Meanwhile the
colors of text to image go from 30 to 80 percent. L_i2t, on the model's own descriptions, stays
below 0.001.

Commands. The weights of Harmon are under the S-Lab License 1.0: for non-commercial use only.

    python reca_harmon.py --model tiny                    in minutes on a CPU, no downloads
    python reca_harmon.py --data ./images                 Harmon-1.5B (or --model harmon-0.5b)
    python reca_harmon.py --data ./images --i2t-data llava.json --i2t-images ./llava
                                                          with conversations, as in the paper
    python reca_harmon.py --model out/RUN/checkpoint-005000 --steps 0 --generate prompts.txt

How to read this file. First section 4, the prompt, and `recon_loss` in section 5: that is RecA.
Then, in section 2, `understand` and `MAR`, and `diffusion_terms` for the loss itself. Section 6 is
the sampler, which RecA leaves alone. Sections 1, 3 and 7 hold sizes, files and the command line.
The loop that takes the steps is `Trainer` in common.py. `encode` of the model is the VAE, `encode`
of `mar` is MAR's encoder. A *place* is one of the image's N, a *position* one of a sequence's T.

Letters in the shape comments: B images, S pixels a side, h x w = N tokens of an image, C = 16
numbers of a token, E tokens of the buffer, V visible and M masked tokens (V + M = N), K = N + E
understanding embeddings, D width of the language model, De and Dd widths of MAR's encoder and
decoder, W width of the diffusion head, P tokens that it gets at once, Q tokens of each image that a
step of the sampler paints (P = B*Q), T tokens of a sequence, R of them read, G = V + E of them made
from the context.
"""
import functools
import itertools
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

# ==== 1. Sizes and hyper-parameters ===============================================================


@dataclass
class HarmonConfig:
    """The sizes of one variant, and its sampler's defaults. The default values are Harmon-1.5B.
    They are those of the original's public configuration and code."""
    name: str = "harmon_1.5b"  # of the file with the weights, without .pth
    image_size: int = 512

    # The language model, Qwen2.5-1.5B-Instruct.
    vocab_size: int = 151936
    llm_width: int = 1536
    llm_layers: int = 28
    llm_heads: int = 12
    llm_kv_heads: int = 2
    llm_mlp: int = 8960

    # MAR, in its size Huge. Its position tables are for 16 x 16 tokens, since it was first trained
    # on images of 256 px; for other sizes they are interpolated.
    encoder_width: int = 1280
    encoder_layers: int = 20
    encoder_heads: int = 16
    decoder_width: int = 1280
    decoder_layers: int = 20
    decoder_heads: int = 16
    buffer_size: int = 64
    table_size: int = 16
    class_num: int = 1000
    dropout: float = 0.1  # in MAR's blocks while training, in the understanding pass as well

    # The diffusion head. A step trains every masked token at `diffusion_repeats` noise levels.
    diffusion_width: int = 1536
    diffusion_layers: int = 12
    diffusion_repeats: int = 4

    # The VAE, KL-16: five levels, each half as large as the one before, so a token is 16 x 16
    # pixels. vae_scale makes the variance of the latents about 1.
    latent_channels: int = 16
    vae_width: int = 128
    vae_mult: tuple = (1, 1, 2, 2, 4)
    vae_blocks: int = 2
    vae_groups: int = 32
    vae_scale: float = 0.2325

    # RecA: factor on the gradient that reaches the understanding embeddings, in both losses.
    grad_scale: float = 0.1

    # The sampler's defaults. guidance_scale 1 means no guidance; guidance_schedule "linear" raises
    # the guidance from 1 to guidance_scale while the image is painted. clip_latents bounds the
    # predicted tokens, 0: no bound. (Only tiny has one: at the noisiest of the 1000 timesteps an
    # error of the predicted noise is an error of the token 20,000 times as large.)
    num_steps: int = 64
    guidance_scale: float = 3.0
    guidance_schedule: str = "constant"
    temperature: float = 1.0
    diffusion_steps: int = 100
    clip_latents: float = 0.0


CONFIGS = {
    "harmon-1.5b": HarmonConfig(),
    "harmon-0.5b": HarmonConfig(
        name="harmon_0.5b",
        llm_width=896, llm_layers=24, llm_heads=14, llm_mlp=4864,
        encoder_width=768, encoder_layers=12, encoder_heads=12,
        decoder_width=768, decoder_layers=12, decoder_heads=12,
        diffusion_width=1024, diffusion_layers=6,
    ),
    # An image of 32 px is 4 x 4 tokens of 8 x 8 pixels.
    "tiny": HarmonConfig(
        name="harmon_tiny", image_size=32, vocab_size=512,
        llm_width=96, llm_layers=3, llm_heads=4, llm_mlp=256,
        encoder_width=96, encoder_layers=2, encoder_heads=4,
        decoder_width=96, decoder_layers=2, decoder_heads=4,
        buffer_size=8, table_size=4, class_num=10, dropout=0.0,
        diffusion_width=96, diffusion_layers=2,
        vae_width=32, vae_mult=(1, 1, 1, 1), vae_blocks=1, vae_groups=4,
        grad_scale=1.0,
        num_steps=16, guidance_scale=1.5, diffusion_steps=25, clip_latents=4.0,
    ),
}


@dataclass
class Recipe:
    """The paper's run (Table 8): 5000 steps, batch 48, learning rate 1e-5.

    The original counts micro-batches of 48 images in the order recon, recon, i2t, i2t, and moves
    the weights after these four. We count evaluations of equation (3). So a step of ours has 24
    images for each of the two losses, and four steps are one update of 96 + 96 images, as in the
    original; 5000 steps are 1250 updates in both. (Table 8 says accumulation 2, probably since it
    counts recon + i2t as one.) The warm-up of 500 micro-batches becomes 125 updates. The original's
    cosine ends after 50,000 micro-batches, which is update 12,500. The run ends after a tenth of
    it, where the learning rate is still 0.98 of its peak.
    """
    # From Table 8, converted as above.
    steps: int = 5000
    batch: int = 24
    accum: int = 4
    lr: float = 1e-5
    weight_decay: float = 0.02
    warmup: int = 125
    lambda_recon: float = 1.0
    lambda_i2t: float = 1.0
    lambda_t2i: float = 0.0

    # From the public configuration, where the gradient is clipped at 1. Our gradient is that of
    # recon + i2t, theirs that of the average of both, so ours is twice as large, and so is clip.
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    horizon: int = 12500
    clip: float = 2.0


DEFAULT = "harmon-1.5b"
RECIPES = {
    "harmon-1.5b": Recipe(),
    "harmon-0.5b": Recipe(steps=3000, batch=48),
    # Ours. With this large eps Adam hardly moves a weight whose gradient is small: what the tiny
    # model can do already, reading words, stays as it is.
    "tiny": Recipe(steps=150, batch=32, accum=1, lr=5e-4, eps=5e-4, warmup=20, horizon=0, clip=1.0),
}

# What --model accepts beside hub ids and folders. harmon-1.5b-o is older than RecA: a decoder that
# was tuned on images of GPT-4o. All weights of Harmon are under the S-Lab License 1.0
# (non-commercial).
RELEASED = {
    "harmon-1.5b": "wusize/harmon:harmon_1.5b.pth",
    "harmon-0.5b": "wusize/harmon:harmon_0.5b.pth",
    "harmon-1.5b-o": "wusize/harmon:harmon_1.5b-o.pth",
}
# What the authors' RecA has made of them ("plus": fine-tuned on BLIP3o-60k before RecA). They are
# derived from Harmon's weights.
RECA = {
    "harmon-1.5b-reca": "sanaka87/Harmon-1.5B-RecA",
    "harmon-1.5b-reca-plus": "sanaka87/Harmon-1.5B-RecA-plus",
    "harmon-0.5b-reca": "sanaka87/Harmon-0.5B-RecA",
}
SAME_SIZE = {
    "harmon-1.5b-o": "harmon-1.5b",
    "harmon-1.5b-reca": "harmon-1.5b",
    "harmon-1.5b-reca-plus": "harmon-1.5b",
    "harmon-0.5b-reca": "harmon-0.5b",
}
for _name, _size in SAME_SIZE.items():
    CONFIGS[_name] = CONFIGS[_size]
    RECIPES[_name] = RECIPES[_size]

# Files of a checkpoint: patterns for the weights, in this order; names that only Harmon's weights
# have; what else is fetched with a download.
WEIGHT_FILES = [["*.index.json"], ["*.pth"], ["*.safetensors"], ["*.bin"]]
NEEDED = ("proj_in.0.weight", "mar.fake_latent")
SMALL_FILES = [
    "config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]
# Where the tokenizer is, by the width of the language model: the released weights come without one.
TOKENIZERS = {1536: "Qwen/Qwen2.5-1.5B-Instruct", 896: "Qwen/Qwen2.5-0.5B-Instruct"}

# Qwen2.5's chat template, without a system turn.
USER = "<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"
# Words of the template, which a user's text may not contain.
MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

IMAGE_MARKER = -200  # in a list of ids, the place of all embeddings of an image
IGNORED = -100  # the label of a token that is not predicted

# Which part of an image's tokens is masked in training: normal with this mean and deviation, cut
# off to [LEAST_MASKED, 1]. From the original's code, as all numbers down to MAX_I2T_IDS.
MASKED_MEAN = 1.0
MASKED_STD = 0.25
LEAST_MASKED = 0.7
TEXT_DROP = 0.1  # the probability that an instruction or a caption is left out
# How many ids a prompt has at most, by task; the rest is cut off. For i2t it is a conversation.
MAX_RECON_IDS = 128
MAX_T2I_IDS = 1024
MAX_I2T_IDS = 1472  # written 2048 - 576 there
# So many labels meet the language model's head at a time: their float32 logits are 78 MB.
LABELS_AT_ONCE = 128
# So many tokens go through the diffusion head at a time. With checkpointing, the backward pass
# computes all activations of one such piece again: 2 GB in Harmon-1.5B.
TOKENS_AT_ONCE = 4096


# ==== 2. The model ================================================================================
# The VAE is diffusers' and the language model transformers'. MAR is in neither, so it stands here.
# Its blocks have the names of timm's ViT blocks, since the released weights have them.


def take(x, index):
    """x [B, T, D], index [B, R] -> [B, R, D]: of every example the vectors with these numbers."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def two_layers(width_in, width, width_out):
    """Linear, SiLU, Linear. The two connectors are made of it, and parts of the diffusion head."""
    return nn.Sequential(nn.Linear(width_in, width), nn.SiLU(), nn.Linear(width, width_out))


class Block(nn.Module):
    """A pre-norm ViT block, in which every token sees every token."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(width, 3 * width),
            "proj": nn.Linear(width, width),
        })
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(width, 4 * width),
            "fc2": nn.Linear(4 * width, width),
        })

    def forward(self, x):
        """x [B, T, width] -> [B, T, width]"""
        # Inference never drops, whichever mode the model is in: it computes no gradients.
        dropping = self.training and torch.is_grad_enabled()
        dropout = self.dropout if dropping else 0.0

        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, width/heads]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # as q
        y = y.transpose(1, 2).flatten(2)  # [B, T, width]
        x = x + F.dropout(self.attn["proj"](y), dropout)

        y = F.gelu(self.mlp["fc1"](self.norm2(x)))  # [B, T, 4*width]
        y = self.mlp["fc2"](F.dropout(y, dropout))  # [B, T, width]
        return x + F.dropout(y, dropout)


class DiffusionBlock(nn.Module):
    """A residual block of the diffusion head. y, which stands for timestep and condition, sets
    shift and scale of its input, and the gate of its output."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = two_layers(width, width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        """x [P, W], y [P, W] -> [P, W]"""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)  # [P, W]
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class DiffusionMLP(nn.Module):
    """The network of the diffusion head. It treats every token by itself: which noise is in it?"""

    def __init__(self, channels, z_width, width, layers):
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": two_layers(256, width, width)})
        self.cond_embed = nn.Linear(z_width, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(layers))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, 2 * channels),
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        })

    def forward(self, x, t, z):
        """x [P, C] noised tokens, t [P or 1] timesteps from 0 to 999, z [P, Dd] the conditions from
        MAR's decoder -> [P, 2C]: the noise in x, and v, which is meant to be in [-1, 1] and says
        where the log-variance of the denoising step lies between its two bounds."""
        dtype = self.input_proj.weight.dtype
        time = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        y = self.time_embed["mlp"](time.to(dtype)) + self.cond_embed(z.to(dtype))  # [P, W]

        x = self.input_proj(x.to(dtype))  # [P, W]
        for block in self.res_blocks:
            x = block(x, y)

        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, dim=-1)  # [P, W]
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.final_layer["linear"](x)


class MAR(nn.Module):
    """The masked autoencoder: an encoder of the visible tokens and the buffer, a decoder that fills
    the masked places, and the diffusion head."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        table_tokens = c.table_size ** 2  # so many places the position tables are made for
        De = c.encoder_width
        Dd = c.decoder_width

        # class_emb is in every checkpoint, and nothing reads it.
        self.class_emb = nn.Embedding(c.class_num, De).requires_grad_(False)

        # The encoder. fake_latent is the one vector that all tokens of the buffer are.
        self.fake_latent = nn.Parameter(0.02 * torch.randn(1, De))
        self.z_proj = nn.Linear(c.latent_channels, De)
        self.z_proj_ln = nn.LayerNorm(De, eps=1e-6)
        table = 0.02 * torch.randn(1, c.buffer_size + table_tokens, De)  # [1, E + table_tokens, De]
        self.encoder_pos_embed_learned = nn.Parameter(table)
        self.encoder_blocks = nn.ModuleList(
            Block(De, c.encoder_heads, c.dropout) for _ in range(c.encoder_layers))
        self.encoder_norm = nn.LayerNorm(De, eps=1e-6)

        # The decoder. mask_token is the vector in all masked places.
        self.decoder_embed = nn.Linear(De, Dd)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, Dd))
        table = 0.02 * torch.randn(1, c.buffer_size + table_tokens, Dd)  # [1, E + table_tokens, Dd]
        self.decoder_pos_embed_learned = nn.Parameter(table)
        self.decoder_blocks = nn.ModuleList(
            Block(Dd, c.decoder_heads, c.dropout) for _ in range(c.decoder_layers))
        self.decoder_norm = nn.LayerNorm(Dd, eps=1e-6)

        # The diffusion head. It treats tokens one by one, so its condition says where they are.
        table = 0.02 * torch.randn(1, table_tokens, Dd)  # [1, table_tokens, Dd]
        self.diffusion_pos_embed_learned = nn.Parameter(table)
        net = DiffusionMLP(c.latent_channels, Dd, c.diffusion_width, c.diffusion_layers)
        self.diffloss = nn.ModuleDict({"net": net})
        self.initialize()

    def initialize(self):
        """MAR's own initialisation. In the diffusion head, modulation and output start at zero."""
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
                nn.init.zeros_(p)
            elif "time_embed" in name:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 2 and name.endswith("weight"):
                nn.init.xavier_uniform_(p)

    def position_table(self, table, grid):
        """table [1, E + table_tokens, width] -> [1, E + h*w, width]: a position table for another
        grid = (h, w). The image's part is interpolated (16 x 16 to 32 x 32 in the released
        models), the buffer's part, if there is one, stays."""
        side = self.config.table_size
        E = table.shape[1] - side ** 2
        h, w = grid

        buffer, image = table.tensor_split([E], dim=1)
        image = image.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, width, side, side]
        image = F.interpolate(image, size=grid, mode="bilinear")  # [1, width, h, w]
        image = image.flatten(2).transpose(1, 2)  # [1, h*w, width]
        return torch.cat([buffer, image], dim=1)

    def encode(self, latents, grid, visible=None):
        """latents [B, N, C], visible [B, V] -> [B, E+V, De], the buffer first. Masked tokens are
        absent. grid: (h, w); visible: the places of the visible tokens, None: all are visible."""
        B = len(latents)
        E = self.config.buffer_size
        table = self.position_table(self.encoder_pos_embed_learned, grid).expand(B, -1, -1)
        of_buffer, of_image = table.tensor_split([E], dim=1)
        if visible is not None:
            latents = take(latents, visible)  # [B, V, C]
            of_image = take(of_image, visible)  # [B, V, De]

        x = self.z_proj(latents.to(self.z_proj.weight.dtype))  # [B, V, De]
        precision = x.dtype
        x = torch.cat([self.fake_latent + of_buffer, x + of_image], dim=1)  # [B, E+V, De]
        # Under autocast the float32 tables and the norm would keep x in float32 through all blocks.
        x = self.z_proj_ln(x).to(precision)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, grid, visible):
        """x [B, E+V, De], visible [B, V] -> [B, N, Dd]: the context, for the buffer and the visible
        tokens, becomes a condition for every place of the image."""
        E = self.config.buffer_size
        buffer, tokens = self.decoder_embed(x).tensor_split([E], dim=1)  # [B, E or V, Dd]

        # Every place gets the mask token, then the visible ones what the context has for them.
        image = self.mask_token.to(tokens.dtype).expand(len(x), grid[0] * grid[1], -1)  # [B, N, Dd]
        index = visible[..., None].expand(-1, -1, tokens.shape[-1])  # [B, V, Dd]
        image = image.scatter(1, index, tokens)

        x = torch.cat([buffer, image], dim=1)  # [B, E+N, Dd]
        x = x + self.position_table(self.decoder_pos_embed_learned, grid).to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        image = self.decoder_norm(x)[:, E:]  # [B, N, Dd]
        return image + self.position_table(self.diffusion_pos_embed_learned, grid)


@functools.lru_cache(maxsize=8)
def diffusion_schedule(steps, device):
    """The cosine diffusion with `steps` of its 1000 timesteps -> {name: float32 table of `steps`}.

    At the time u, from 0 to 1, abar(u) = cos^2(pi/2 (u + 0.008) / 1.008) of a token's variance is
    left: x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise. Training takes all 1000 timesteps. With
    fewer, for sampling, the betas follow from the abars of those that are kept. The table
    "original" has their numbers among the 1000, which is what the network is told.
    """
    # All arithmetic is in float64.
    abar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    # Added up as floats, as the original does: where the sum ends in one half, rounding depends on
    # it.
    distances = [0.0] + [999 / max(1, steps - 1)] * (steps - 1)
    kept = np.cumsum(distances).round().astype(int)

    abar = np.cumprod(1 - betas)[kept]
    abar_before = np.append(1.0, abar[:-1])
    betas = 1 - abar / abar_before

    # The variance of q(x_{t-1} | x_t, x_0). At t = 0 it is 0, whose logarithm would be infinite:
    # the variance of t = 1 stands in.
    posterior = betas * (1 - abar_before) / (1 - abar)
    posterior = np.append(posterior[1:2], posterior[1:])

    tables = {
        "original": kept,
        "alphas_cumprod": abar,
        "betas": betas,
        # x_0 and noise -> x_t
        "signal_scale": np.sqrt(abar),
        "noise_scale": np.sqrt(1 - abar),
        # x_t and noise -> x_0
        "x0_from_xt": np.sqrt(1 / abar),
        "x0_from_noise": np.sqrt(1 / abar - 1),
        # x_0 and x_t -> the mean of q(x_{t-1} | x_t, x_0)
        "mean_x0": betas * np.sqrt(abar_before) / (1 - abar),
        "mean_xt": (1 - abar_before) * np.sqrt(1 - betas) / (1 - abar),
        # the bounds of the log-variance
        "log_beta": np.log(betas),
        "log_posterior": np.log(posterior),
    }
    made = {}
    for name, table in tables.items():
        dtype = torch.int64 if name == "original" else torch.float32
        made[name] = torch.tensor(table, dtype=dtype, device=device)
    return made


def denoising_step(at, x_t, noise, v, limit=math.inf):
    """One step back, p(x_{t-1} | x_t), as the network has it -> its mean and its log-variance.

    at: the tables of diffusion_schedule at the time t; x_t [P, C]; noise [P, C] and v [P, C] from
    the network; limit: bound of the predicted x_0, none in the released models.
    """
    x_0 = (at["x0_from_xt"] * x_t - at["x0_from_noise"] * noise).clamp(-limit, limit)
    mean = at["mean_x0"] * x_0 + at["mean_xt"] * x_t  # [P, C]
    # v = -1 is the posterior's variance, v = 1 is beta.
    fraction = (v + 1) / 2
    log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_posterior"]  # [P, C]
    return mean, log_variance


def normal_cdf(x):
    """The distribution function of the standard normal, in the usual approximation by tanh."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def diffusion_terms(net, x_0, z, t, noise):
    """MAR's diffusion loss: x_0 [P, C] true tokens, z [P, Dd] conditions, t [P] timesteps from 0 to
    999, noise [P, C] -> its two terms for every token, mse and vb, each of shape P.

    mse  the mean squared error of the predicted noise. It trains the prediction.
    vb   the variational bound in bits. It trains the variance alone, as the noise is detached. For
         t > 0 it is the KL divergence between the true and the predicted step back. At t = 0 it is
         the likelihood of x_0 under a Gaussian in bins that reach 1/255 to both sides. Such bins
         fit 8-bit pixels in [-1, 1] and mean little for latents; we follow the original, since the
         released models are trained so.

    For a first reading mse is enough: the lines below it are vb.
    """
    # Float32 throughout. (The original has noise and mse in bf16.)
    x_0 = x_0.float()
    noise = noise.float()
    at = {}
    for name, table in diffusion_schedule(1000, x_0.device).items():
        at[name] = table[t][:, None]

    x_t = at["signal_scale"] * x_0 + at["noise_scale"] * noise  # [P, C]
    predicted, v = net(x_t, t, z).float().chunk(2, dim=-1)  # [P, C]
    mse = (noise - predicted).square().mean(-1)  # [P]

    # t > 0: the KL divergence of two Gaussians.
    mean, log_variance = denoising_step(at, x_t, predicted.detach(), v)
    true_mean = at["mean_x0"] * x_0 + at["mean_xt"] * x_t
    log_ratio = at["log_posterior"] - log_variance
    distance = (true_mean - mean).square() * (-log_variance).exp()
    kl = 0.5 * (log_ratio.exp() - log_ratio - 1 + distance)  # [P, C]

    # t = 0: the probability of the bin in which x_0 is; the first and the last bin have no end.
    inverse_std = (-0.5 * log_variance).exp()
    upper = normal_cdf(inverse_std * (x_0 - mean + 1 / 255))
    lower = normal_cdf(inverse_std * (x_0 - mean - 1 / 255))
    probability = torch.where(x_0 > 0.999, 1 - lower, upper - lower)
    probability = torch.where(x_0 < -0.999, upper, probability)
    log_likelihood = probability.clamp(min=1e-12).log()  # [P, C]

    vb = torch.where(t == 0, -log_likelihood.mean(-1), kl.mean(-1)) / math.log(2)  # [P]
    return mse, vb


def masked_after(N, num_steps):
    """How many of N tokens are masked after each of the sampler's steps: a quarter of a cosine, but
    each step paints at least one token, and at least one is left."""
    left = [N]
    for k in range(1, num_steps + 1):
        cosine = math.floor(N * math.cos(math.pi / 2 * k / num_steps))
        left.append(max(1, min(left[-1] - 1, cosine)))
    return left[1:]


def stretch_square(image, size):
    """Stretched to a square, and not cropped, then size x size. As in the original there are two
    steps: to a square of the longer side, and from there."""
    side = min(max(image.size), common.MAX_SIDE)
    return image.resize((side, side)).resize((size, size))


def pad_square(image, size):
    """Centred on a grey square of the longer side, then size x size, as LLaVA does."""
    image = common.shrunk(image, common.MAX_SIDE)
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size))


class Harmon(nn.Module):
    """VAE, MAR and Qwen2.5, connected as in the picture at the top of this file. The constructor
    makes random weights and no tokenizer; see from_pretrained."""

    # Layers that --quantize leaves alone: ids and latents enter and leave through them. They have
    # few weights, and all else depends on what they say.
    unquantized = (
        "vae.",
        "llm.lm_head",
        "mar.z_proj",
        "mar.diffloss.net.input_proj",
        "mar.diffloss.net.final_layer.linear",
    )

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c

        # diffusers' class expresses KL-16 exactly: attention is only in the encoder's last level
        # and in the middle of encoder and decoder.
        levels = len(c.vae_mult)
        self.stride = 2 ** (levels - 1)  # a token is stride x stride pixels
        self.vae = AutoencoderKL(
            block_out_channels=[c.vae_width * factor for factor in c.vae_mult],
            down_block_types=["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=c.latent_channels,
            layers_per_block=c.vae_blocks,
            norm_num_groups=c.vae_groups,
        )
        self.vae.requires_grad_(False)

        self.llm = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.llm_width,
            intermediate_size=c.llm_mlp,
            num_hidden_layers=c.llm_layers,
            num_attention_heads=c.llm_heads,
            num_key_value_heads=c.llm_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        ))
        self.mar = MAR(c)
        self.proj_in = two_layers(c.encoder_width, c.llm_width, c.llm_width)
        self.proj_out = two_layers(c.llm_width, c.llm_width, c.encoder_width)

        # from_pretrained sets it. Methods that get ids instead of texts do without.
        self.tokenizer = None
        self.set_und()

    def set_und(self, size=None, blur=None):
        """Two ablations: RecA's understanding side gets an image of another size (in pixels; in the
        paper with BAGEL, section 3.5, and Show-o, appendix F.2) or a blurred one (blur, a factor;
        Show-o, appendix F.2). With Harmon they are ours. A size above image_size enlarges the
        image, which adds no details. InputError: not possible."""
        if size and size % self.stride:
            raise InputError(
                f"--und-size {size}: Harmon's understanding encoder takes multiples of"
                f" {self.stride}")
        common.check_blur(blur, self.config.image_size)
        self.und_size = size
        self.und_blur = blur

    @property
    def device(self):
        return self.proj_in[0].weight.device

    def _apply(self, function, recurse=True):
        """Called by .to(...), .cuda() and the like. Two things need care. The table of the language
        model's rotary positions is in no checkpoint and must stay float32, so it is made anew. And
        the VAE's convolutions are a quarter faster if their weights have the channels last."""
        super()._apply(function, recurse)
        self.vae.to(memory_format=torch.channels_last)
        with torch.device(self.device):
            self.llm.model.rotary_emb = Qwen2RotaryEmbedding(self.llm.config)
        return self

    def blocks(self):
        """What is repeated, for torch.compile and activation checkpointing: all layers, and the
        diffusion head as a whole, which is called once for each noise level of a token."""
        return [
            *self.llm.model.layers,
            *self.mar.encoder_blocks,
            *self.mar.decoder_blocks,
            self.mar.diffloss["net"],
        ]

    def parameter_groups(self, weight_decay):
        """AdamW's groups of all that is trained. As in the original, one-dimensional tensors and
        the whole diffusion head do not decay; embeddings, position tables and the mask token do."""
        decaying = []
        others = []
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            if p.ndim == 1 or "diffloss" in name:
                others.append(p)
            else:
                decaying.append(p)
        return [
            {"params": decaying, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    def preprocess(self, image, task, rng=None):
        """A PIL RGB image -> {"pixels": uint8 [3, S, S]}, as the original's data sets make it:
        recon stretches, i2t pads, t2i crops. rng: a numpy Generator for the place of the crop,
        None: the centre. image None, for a conversation without an image: mid grey, as float
        zeros."""
        size = self.config.image_size
        if image is None:
            return {"pixels": torch.zeros(3, size, size)}

        if task == "recon":
            image = stretch_square(image, size)
        elif task == "i2t":
            image = pad_square(image, size)
        else:
            image = common.random_square(image, size, rng)
        return {"pixels": common.to_uint8(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """All that is frozen, which --cache therefore stores: B dicts of preprocess -> B dicts with
        float32 tensors of shape h, w, C. "latents" are the tokens of the image. Where set_und asks
        for another image on the understanding side, "und_latents" are the tokens of that one."""
        pixels = [common.normalize(sample["pixels"].to(self.device)) for sample in samples]
        pixels = torch.stack(pixels)  # [B, 3, S, S]
        features = {"latents": self._latents(pixels)}

        if task == "recon" and (self.und_size or self.und_blur):
            if self.und_blur:
                pixels = common.blur(pixels, self.und_blur)
            if self.und_size:
                pixels = F.interpolate(pixels, self.und_size, mode="bilinear", antialias=True)
            features["und_latents"] = self._latents(pixels)

        examples = []
        for i in range(len(samples)):
            examples.append({name: value[i] for name, value in features.items()})
        return examples

    def _latents(self, pixels):
        """pixels [B, 3, S, S] in [-1, 1] -> [B, h, w, C] float32: the scaled mean of the VAE's
        posterior, which is never sampled (as in the original)."""
        pixels = pixels.to(self.vae.dtype, memory_format=torch.channels_last)
        # Four images of 512 px at a time: the VAE's first level has 128 channels for each pixel,
        # which for a whole batch would set the peak of memory.
        at_once = max(1, 2 ** 20 // pixels[0, 0].numel())
        means = [self.vae.encode(part).latent_dist.mean for part in pixels.split(at_once)]
        mean = torch.cat(means)  # [B, C, h, w]
        return (mean * self.config.vae_scale).permute(0, 2, 3, 1).float().contiguous()

    def _pixels(self, latents):
        """latents [B, h, w, C] -> [B, 3, S, S], about in [-1, 1]: the inverse."""
        latents = (latents / self.config.vae_scale).permute(0, 3, 1, 2)  # [B, C, h, w]
        latents = latents.to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample for part in latents.split(4)])

    def understand(self, features):
        """The understanding embeddings h_v: B dicts of encode -> [B, K, D], K = N + E, as the
        language model gets them.

        MAR's encoder sees the whole image; the same encoder, with most of the image masked, makes
        the context of generation (recon_loss). In L_recon and in L_i2t the gradient that comes back
        to h_v is multiplied by grad_scale, so that this pass has a small share in what moves
        proj_in and MAR's encoder. The gradient through the context is not scaled.
        """
        whole = [example.get("und_latents", example["latents"]) for example in features]
        latents = torch.stack(whole)  # [B, h, w, C]
        grid = tuple(latents.shape[1:3])
        encoded = self.mar.encode(latents.flatten(1, 2), grid)  # [B, E+N, De]
        understood = self._into_llm(encoded)  # [B, K, D]
        if understood.requires_grad:
            understood.register_hook(lambda gradient: gradient * self.config.grad_scale)
        return understood

    def _into_llm(self, encoded):
        """encoded [B, E+V, De] from MAR's encoder -> [B, V+E, D] for the language model. The buffer
        moves to the end, where causal attention lets it see the image."""
        return self.proj_in(encoded).roll(-self.config.buffer_size, dims=1)

    def _out_of_llm(self, hidden):
        """hidden [B, V+E, D] from the language model -> [B, E+V, De] for MAR, the buffer first."""
        return self.proj_out(hidden.roll(self.config.buffer_size, dims=1))

    def _hidden_states(self, embeddings, positions):
        """The language model where it is read: embeddings [B, T, D], positions [B, R] -> [B, R, D],
        its last hidden states there, after the final norm. For a first reading this is enough: the
        body is a saving, and no part of the method.

        Attention is causal, and padding stands at the end (_assemble), where nothing sees it: there
        is no mask. All layers but the last are called as transformers has them. The last is written
        out, since it is needed at R positions only, some 200 of 1300 in recon_loss: there it
        computes queries, attention output and MLP, and keys and values everywhere. For Harmon-1.5B
        that saves 25 of the 1582 TFLOP of a step (1.6%; counted, on the longest inputs), and the
        result is the same. To do without it, call self.llm.model and `take` the positions from its
        result.
        """
        llm = self.llm.model
        T = embeddings.shape[1]
        everywhere = torch.arange(T, device=embeddings.device)  # [T]
        cos, sin = llm.rotary_emb(embeddings, everywhere[None])  # [1, T, D/heads]
        x = embeddings
        for layer in llm.layers[:-1]:
            x = layer(x, attention_mask=None, position_embeddings=(cos, sin))

        # The last layer: queries for the R positions, keys and values for all T.
        last = llm.layers[-1]
        attention = last.self_attn
        normed = last.input_layernorm(x)  # [B, T, D]
        q = attention.q_proj(take(normed, positions))  # [B, R, D]
        k = attention.k_proj(normed)  # [B, T, kv_heads*D/heads]
        v = attention.v_proj(normed)  # [B, T, kv_heads*D/heads]
        q = q.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, heads, R, D/heads]
        k = k.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, kv_heads, T, D/heads]
        v = v.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, kv_heads, T, D/heads]

        # The rotary embedding: a query has that of its own position.
        q = q * cos[0][positions][:, None] + rotate_half(q) * sin[0][positions][:, None]
        k = k * cos + rotate_half(k) * sin

        # A position sees itself and what is before it.
        mask = everywhere <= positions[..., None]  # [B, R, T], True: may be seen
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)  # [B, R, D]
        x = take(x, positions) + attention.o_proj(y)  # [B, R, D]
        return llm.norm(x + last.mlp(last.post_attention_layernorm(x)))

    # ==== 3. Loading and saving ===================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """A model in eval mode, with its tokenizer.

        source    a name in RELEASED or RECA; a hub repository or a folder, with :FILE where it
                  holds several models; a file; or "tiny"
        quantize  None or "int8": done before anything is on the device

        The weights are .pth, .bin or .safetensors, whole or in shards. What does not lie beside
        them is fetched: kl16.ckpt, unless the weights hold `vae.*`, and Qwen2.5's tokenizer.
        InputError: there is no such model, or its files do not fit.
        """
        if source == "tiny":
            source = common.tiny_folder("harmon")
        known = RELEASED | RECA
        beside = ["kl16.ckpt", *SMALL_FILES]
        path = common.find_checkpoint(str(source), known, WEIGHT_FILES, beside, NEEDED)
        folder = path.parent

        # The weights, and among them perhaps those of the VAE.
        state = {}
        vae = {}
        for key, value in common.load_state(path).items():
            if key.startswith("vae."):
                vae[key.removeprefix("vae.")] = value
            else:
                state[key] = value
        if not vae:
            home = folder
            if not (folder / "kl16.ckpt").is_file():
                home = common.hub_folder("wusize/harmon", ["kl16.ckpt"])
            vae = common.load_state(home / "kl16.ckpt")
        model = cls.from_states(cls._read_config(folder, state), state, vae, str(path))

        # A model of another size whose folder has no tokenizer goes without: it takes ids only.
        if (folder / "tokenizer_config.json").is_file():
            model.tokenizer = common.load_tokenizer(folder)
        elif model.config.llm_width in TOKENIZERS:
            home = common.hub_folder(TOKENIZERS[model.config.llm_width], SMALL_FILES)
            model.tokenizer = common.load_tokenizer(home)
        return common.quantize(model, quantize).to(device, dtype).eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """A model of a size in CONFIGS with random weights, made on the device, and with a
        tokenizer of a few words: for tests and --bench."""
        if name not in CONFIGS:
            raise InputError(f"no such size: {name} (there are {', '.join(CONFIGS)})")
        tokenizer = common.tiny_tokenizer(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
        config = replace(CONFIGS[name])
        if name == "tiny":
            config.vocab_size = len(tokenizer)

        with torch.device(device):
            model = cls(config).to(device)
        model.tokenizer = tokenizer
        return model.eval()

    def save_pretrained(self, folder):
        """Writes harmon_*.pth and kl16.ckpt, which the original's loaders read, a config.json and
        the tokenizer."""
        folder = Path(folder)
        files = {
            f"{self.config.name}.pth": self.released_state(),
            "kl16.ckpt": {"model": common.autoencoder_to_original(self.vae)},
        }
        for name, state in files.items():
            # Torch gets an open file: given a path, it would write the path into the file.
            with common.atomic(folder / name) as path, open(path, "wb") as stream:
                torch.save(state, stream)

        common.write(folder / "config.json", {"reca_harmon": asdict(self.config)})
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def from_states(cls, config, state, vae, name="checkpoint"):
        """A model from the two dicts of tensors in harmon_*.pth and kl16.ckpt. It is strict: an
        InputError names the keys that are missing, unknown or of another shape."""
        # On the meta device no random weights are drawn, which all would be overwritten.
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu").llm.tie_weights()

        # The head is tied to the embedding, so a checkpoint may list it or not.
        embedding = state.get("llm.model.embed_tokens.weight")
        if embedding is not None:
            head = state.get("llm.lm_head.weight", embedding)
            if not torch.equal(head, embedding):
                raise InputError(
                    f"{name}: llm.lm_head.weight is tied to llm.model.embed_tokens.weight,"
                    " but differs")
            state = {**state, "llm.lm_head.weight": embedding}

        # kl16.ckpt may hold more than the VAE.
        parts = ("encoder.", "decoder.", "quant_", "post_quant_")
        vae = {key: value for key, value in vae.items() if key.startswith(parts)}
        vae = common.autoencoder_from_original(model.vae, vae)
        common.load_strictly(model.vae, vae, f"the VAE of {name}")

        others = {key: module for key, module in model.named_children() if key != "vae"}
        common.load_strictly(nn.ModuleDict(others), state, name)
        return model

    def released_state(self):
        """The tensors of a released harmon_*.pth: everything but the VAE, the tied head listed."""
        state = self.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("vae.")}

    @staticmethod
    def _read_config(folder, state):
        """The sizes: from a config.json that save_pretrained wrote, else those of the released
        model with the same widths. (All sizes cannot be read off the weights: the numbers of heads
        leave no trace in the shapes.)"""
        path = folder / "config.json"
        settings = None
        if path.is_file():
            settings = common.read_object(path).get("reca_harmon")
        if settings:
            try:
                return HarmonConfig(**settings)
            except TypeError as error:
                raise InputError(f"{path}: {error}") from error

        widths = []
        for key in ("proj_in.2.weight", "mar.fake_latent"):
            widths.append(state[key].shape[1] if key in state else None)
        for name in ("harmon-1.5b", "harmon-0.5b"):
            config = CONFIGS[name]
            if widths == [config.llm_width, config.encoder_width]:
                return config
        raise InputError(
            f"{folder} is no released Harmon (widths {widths}) and has no config.json with its"
            " sizes")

    # ==== 4. The embedding-conditioned prompt =====================================================
    # The model's own embeddings of an image are the prompt, in the chat template in which it has
    # learned to describe images. The image to be painted follows.
    #
    #   <|im_start|>user \n\n [image, buffer] Describe the image in detail.<|im_end|> \n
    #   <|im_start|>assistant \n [visible tokens, buffer]

    def tokenize(self, text):
        """A text, in which <|im_start|> and <|im_end|> are single tokens -> a list of ids."""
        if self.tokenizer is None:
            raise InputError(
                "this model has no tokenizer: put the files of Qwen2.5's tokenizer into its folder")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def recon_prompt(self, template=None):
        """RecA's prompt: a list of ids, MAX_RECON_IDS at most, with IMAGE_MARKER where h_v will
        stand. template: the instruction, or None where the text is left out.

        Two things follow the original, since the released models were trained so. There are two
        newlines before the image where its other prompts have one, which is probably an accident.
        And where the text is left out ("unconditional" in the original) the embeddings stay. This
        last prompt is used nowhere at inference: guidance compares with the prompt of t2i_prompt()
        without a caption and without embeddings, and that is in no loss but t2i_loss (λ_t2i = 0).
        """
        if template is None:
            text = "Generate an image."
            return self.tokenize(USER) + [IMAGE_MARKER] + self.tokenize(text + END)
        text = common.plain(template, MARKERS)
        ids = self.tokenize(USER + "\n") + [IMAGE_MARKER] + self.tokenize(text + END)
        return ids[:MAX_RECON_IDS]

    def t2i_prompt(self, caption=None):
        """Text to image: a list of ids, MAX_T2I_IDS at most. None: without a caption, which is what
        guidance moves away from."""
        if caption is None:
            text = "Generate an image."
        else:
            text = f"Generate an image: {common.plain(caption, MARKERS).strip()}"
        return self.tokenize(USER + text + END)[:MAX_T2I_IDS]

    def i2t_prompt(self, question):
        """Image to text: the first turn of a conversation, which is the image, a newline and the
        question. A list of ids, with IMAGE_MARKER for the image."""
        text = common.plain(question, MARKERS)
        return self.tokenize(USER) + [IMAGE_MARKER] + self.tokenize("\n" + text + END)

    def conversation(self, turns):
        """[(question, answer), ...] -> ids and labels, two lists of the same length, MAX_I2T_IDS
        at most. The labels are the ids of the answers, each with the <|im_end|> behind it, else
        IGNORED."""
        ids = []
        labels = []
        for number, (question, answer) in enumerate(turns):
            if number == 0:
                asked = self.i2t_prompt(question)
            else:
                asked = self.tokenize(USER + common.plain(question, MARKERS) + END)
            answered = self.tokenize(common.plain(answer, MARKERS) + "<|im_end|>")
            newline = self.tokenize("\n")

            ids += asked + answered + newline
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(newline)
        return ids[:MAX_I2T_IDS], labels[:MAX_I2T_IDS]

    def _assemble(self, prompts, understood=None, generated=None):
        """The language model's input, a sequence for each prompt: their embeddings, padded at the
        end, and their lengths without the padding (on the CPU).

        prompts     lists of ids, those with an image first
        understood  [B, K, D] or None: they stand where a prompt has its IMAGE_MARKER
        generated   [B, G, D] or None: visible tokens and buffer, which follow the prompts

        The original pads between prompt and generated tokens, masks the padding, and lets positions
        skip it. With the padding at the end the same tokens have the same positions, plainly 0, 1,
        2, and causal attention needs no mask.
        """
        # One lookup for the words of all prompts. (The marker is no word: what is looked up for it
        # is not used.)
        ids = torch.tensor(list(itertools.chain(*prompts))).clamp(min=0)
        words = self.llm.model.embed_tokens(common.to_device(ids, self.device))
        # Under autocast the table gives float32, and torch.cat would make everything float32.
        for other in (understood, generated):
            if other is not None:
                words = words.to(other.dtype)

        sequences = []
        for i, embedded in enumerate(words.split([len(prompt) for prompt in prompts])):
            parts = [embedded]
            if IMAGE_MARKER in prompts[i]:
                marker = prompts[i].index(IMAGE_MARKER)
                parts = [embedded[:marker], understood[i], embedded[marker + 1:]]
            if generated is not None:
                parts.append(generated[i])
            sequences.append(torch.cat(parts))
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return pad_sequence(sequences, batch_first=True), lengths

    # ==== 5. The losses ===========================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA: an image, painted from the model's own understanding of it (paper, equation 2).

        features   B dicts of encode
        templates  B instructions
        draws      what `draw` gives; None: drawn here, from rng
        -> a scalar, the mean over all masked tokens
        """
        if draws is None:
            draws = self.draw("recon", features, rng)

        # The prompt, t_template in the equation. A tenth of the images goes without the text.
        prompts = []
        for template, dropped in zip(templates, draws["text_dropped"].tolist()):
            prompts.append(self.recon_prompt(None if dropped else template))

        # The condition: what the model understands of the image, all of which it sees.
        understood = self.understand(features)  # [B, K, D]

        # The target is the same image, whose masked tokens are to be predicted.
        latents, grid = self._stack_latents(features)  # [B, N, C]
        masked, visible = self._masked_and_visible(draws)

        # The context: MAR's encoder sees the visible tokens. The language model, which has read the
        # prompt with the embeddings before them, adds what it makes of both.
        context = self.mar.encode(latents, grid, visible)  # [B, E+V, De]
        context = context + self._llm_residual(prompts, understood, context)  # [B, E+V, De]

        # The loss: MAR's decoder makes a condition for every place, and given those of the masked
        # ones the diffusion head has to say which noise was added to their tokens.
        conditions = self.mar.decode(context, grid, visible)  # [B, N, Dd]
        return self._diffusion_loss(conditions, latents, masked, draws)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image, for supervised fine-tuning; in RecA itself λ_t2i = 0. B dicts of encode
        and B captions -> a scalar, as recon_loss. A tenth of the captions is left out, which trains
        what guidance moves away from."""
        if draws is None:
            draws = self.draw("t2i", features, rng)

        prompts = []
        for caption, dropped in zip(captions, draws["text_dropped"].tolist()):
            prompts.append(self.t2i_prompt(None if dropped else caption))

        # From here on as in recon_loss, but nothing is understood: the caption is the only
        # condition.
        latents, grid = self._stack_latents(features)
        masked, visible = self._masked_and_visible(draws)
        context = self.mar.encode(latents, grid, visible)
        context = context + self._llm_residual(prompts, None, context)
        conditions = self.mar.decode(context, grid, visible)
        return self._diffusion_loss(conditions, latents, masked, draws)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text, which keeps understanding alive: B dicts of encode, and B conversations
        about these images, lists of (question, answer) -> a scalar, the cross-entropy of the
        answers, the mean over all their tokens. Nothing is drawn."""
        understood = self.understand(features)  # [B, K, D]
        K = understood.shape[1]

        prompts = []
        label_positions = []  # of every example, where its labels are predicted
        answers = []  # the labels of all examples, in one list
        for turns in conversations:
            ids, labels = self.conversation(turns)
            # The embeddings take K positions in the sequence, where the prompt has one marker.
            marker = ids.index(IMAGE_MARKER)
            labels = labels[:marker] + [IGNORED] * K + labels[marker + 1:]
            # A label is predicted by the output one position before its own.
            wanted = [i for i, label in enumerate(labels) if label != IGNORED]
            prompts.append(ids)
            label_positions.append(torch.tensor(wanted, dtype=torch.long) - 1)
            answers += [labels[i] for i in wanted]

        # Every example gets as many positions as the one with most labels; `real` are those that
        # are not padding. All this is found on the CPU: the host never waits for the device.
        positions = pad_sequence(label_positions, batch_first=True, padding_value=-1)  # [B, R]
        real = (positions >= 0).flatten().nonzero()[:, 0]
        on_cpu = [positions.clamp(min=0), real, torch.tensor(answers, dtype=torch.long)]
        positions, real, labels = common.to_device(on_cpu, self.device)

        embeddings, _ = self._assemble(prompts, understood)
        hidden = self._hidden_states(embeddings, positions)  # [B, R, D]
        hidden = hidden.flatten(0, 1)[real]  # [labels, D]
        total = common.cross_entropy_sum(self.llm.lm_head, hidden, labels, LABELS_AT_ONCE)
        return common.mean(total, len(answers))

    def _stack_latents(self, features):
        """B dicts of encode -> latents of shape B, N, C, row by row, and their grid (h, w)."""
        latents = torch.stack([example["latents"] for example in features])  # [B, h, w, C]
        return latents.flatten(1, 2), tuple(latents.shape[1:3])

    def _masked_and_visible(self, draws):
        """The places of an image's masked and of its visible tokens, row by row. Where the noise
        waits for them, on the CPU, and where MAR needs them, on the model's device."""
        M = int(draws["num_masked"])
        masked = draws["orders"][:, :M].sort(dim=1).values  # [B, M]
        visible = draws["orders"][:, M:].sort(dim=1).values  # [B, V]
        return masked, common.to_device(visible, self.device)

    def _llm_residual(self, prompts, understood, context):
        """What the language model adds to the context, having read an example's prompt before it.
        prompts, understood: as in _assemble; context [B, E+V, De] -> [B, E+V, De]"""
        generated = self._into_llm(context)  # [B, G = V+E, D]
        embeddings, lengths = self._assemble(prompts, understood, generated)

        # They stand at the end of each sequence, before its padding.
        last = torch.arange(-generated.shape[1], 0)
        positions = common.to_device(lengths[:, None] + last, self.device)  # [B, G]
        return self._out_of_llm(self._hidden_states(embeddings, positions))

    def _diffusion_loss(self, conditions, latents, masked, draws):
        """conditions [B, N, Dd], latents [B, N, C], masked [B, M] on the CPU -> a scalar, the mean
        of both diffusion terms over all masked tokens, each at diffusion_repeats noise levels. (The
        original computes them for all tokens, and multiplies the others' by 0.)"""
        B, M = masked.shape
        C = latents.shape[-1]
        repeats = self.config.diffusion_repeats

        # Noise and timesteps are drawn for all tokens. Those of the masked ones are picked out.
        index = masked.expand(repeats, B, M)
        t = draws["t"].gather(2, index)  # [repeats, B, M]
        noise_index = index[..., None].expand(-1, -1, -1, C)
        noise = draws["noise"].gather(2, noise_index)  # [repeats, B, M, C]
        t, noise, masked = common.to_device([t, noise, masked], self.device)

        x_0 = take(latents, masked).flatten(0, 1)  # [P = B*M, C]
        z = take(conditions, masked).flatten(0, 1)  # [P, Dd]
        net = self.mar.diffloss["net"]
        total = 0
        for k in range(repeats):
            pieces = zip(
                x_0.split(TOKENS_AT_ONCE),
                z.split(TOKENS_AT_ONCE),
                t[k].flatten().split(TOKENS_AT_ONCE),
                noise[k].flatten(0, 1).split(TOKENS_AT_ONCE),
            )
            for x_0_piece, z_piece, t_piece, noise_piece in pieces:
                mse, vb = diffusion_terms(net, x_0_piece, z_piece, t_piece, noise_piece)
                total = total + (mse + vb).sum()
        return common.mean(total, repeats * B * M)

    def draw(self, task, features, rng=None):
        """All random numbers of recon_loss or t2i_loss, on the CPU; {} for i2t_loss. An image's do
        not depend on its batch, but for num_masked, which the images of a step share.

        num_masked    a scalar, M: how many tokens are masked
        text_dropped  bool of shape B: is the text left out?
        orders        int64 of shape B, N: all places in random order, the masked ones first
        t             int64 of shape repeats, B, N: timesteps, uniform from 0 to 999
        noise         float32 of shape repeats, B, N, C: standard normal
        """
        if task == "i2t":
            return {}
        if rng is None:
            rng = Rng.fresh(len(features))
        h, w, C = features[0]["latents"].shape
        N = h * w
        repeats = self.config.diffusion_repeats

        # The masked part is one number for the batch, since the visible tokens of all images stand
        # in one tensor.
        ratio = torch.empty((), dtype=torch.float64)
        nn.init.trunc_normal_(
            ratio, MASKED_MEAN, MASKED_STD, LEAST_MASKED, 1.0, generator=rng.batch)

        text_dropped = rng.uniform() < TEXT_DROP  # [B]
        orders = rng.permutation(N)  # [B, N]
        t = rng.integers(1000, repeats, N).transpose(0, 1)  # [repeats, B, N]
        noise = rng.normal(repeats, N, C).transpose(0, 1)  # [repeats, B, N, C]
        return {
            "num_masked": (N * ratio).ceil().long(),
            "text_dropped": text_dropped,
            "orders": orders,
            "t": t,
            "noise": noise,
        }

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: masked tokens, or tokens of answers."""
        if task != "i2t":
            return len(features) * int(draws["num_masked"])
        count = 0
        for turns in texts:
            _, labels = self.conversation(turns)
            count += sum(label != IGNORED for label in labels)
        return count

    def worst_case(self, task, count):
        """The micro-batch of `count` images that needs most memory: samples, texts, and draws to
        replace. The language model sees most tokens where fewest are masked; a conversation is cut
        at MAX_I2T_IDS. For t2i the captions have 200 words: longer ones, which t2i_prompt takes (up
        to MAX_T2I_IDS), need more memory than this."""
        size = self.config.image_size
        samples = [{"pixels": torch.zeros(3, size, size, dtype=torch.uint8)}] * count
        if task == "i2t":
            return samples, [[("Describe the image.", "word " * 1500)]] * count, {}

        if task == "recon":
            longest = max(common.templates(), key=len)
        else:
            longest = "word " * 200
        tokens = (size // self.stride) ** 2
        fewest = torch.tensor(math.ceil(LEAST_MASKED * tokens))
        return samples, [longest] * count, {"num_masked": fewest}

    # ==== 6. Inference ============================================================================

    @torch.no_grad()
    def generate(self, prompts, *, num_steps=None, guidance_scale=None, seed=0, **settings):
        """Text to image: B texts -> B PIL images, painted in one batch.

        num_steps       None: the config's
        guidance_scale  1: no guidance; None: the config's
        seed            one for each image, or a number s: image i has the seed s + i. What is
                        painted for a seed does not depend on the rest of the batch
        settings        guidance_schedule, temperature; draws, for a replay; progress: see _sample
        """
        prompt_ids = [self.t2i_prompt(prompt) for prompt in prompts]
        settings.update(num_steps=num_steps, guidance_scale=guidance_scale, seed=seed)
        return self._paint_images(prompt_ids, None, **settings)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, num_steps=None, guidance_scale=None, seed=0,
                    **settings):
        """Image to image: B PIL images -> B PIL images, painted from nothing but the model's
        understanding of them. templates: B instructions, None: the seed template. Else as
        generate."""
        samples = [self.preprocess(image, "recon") for image in images]
        understood = self.understand(self.encode(samples, "recon"))  # [B, K, D]
        if templates is None:
            templates = [common.SEED_TEMPLATE] * len(images)
        prompts = [self.recon_prompt(template) for template in templates]
        settings.update(num_steps=num_steps, guidance_scale=guidance_scale, seed=seed)
        return self._paint_images(prompts, understood, **settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text: B PIL images, and one question about each -> B answers. Greedy: each token
        is the likeliest one."""
        samples = [self.preprocess(image, "i2t") for image in images]
        understood = self.understand(self.encode(samples, "i2t"))  # [B, K, D]
        prompts = [self.i2t_prompt(question)] * len(images)
        embeddings, _ = self._assemble(prompts, understood)

        # All sequences have the same length, so nothing is padded.
        end = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        answers = self.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device),
            use_cache=True,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end[0],
        )
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _paint_images(self, prompts, understood, **settings):
        """B prompts and their understood [B, K, D] or None -> B PIL images. The other branch of
        guidance is "Generate an image.", without a caption and without embeddings."""
        unconditional = [self.t2i_prompt()] * len(prompts)
        embeddings, lengths = self._assemble(prompts + unconditional, understood)
        latents = self._sample(embeddings, lengths, **settings)
        return [common.to_pil(pixels) for pixels in self._pixels(latents)]

    def _sample(self, embeddings, lengths, num_steps=None, guidance_scale=None,
                guidance_schedule=None, temperature=None, seed=0, draws=None, progress=False):
        """MAR's sampler: embeddings [2B, T, D] and lengths [2B], of B prompts and then of B
        unconditional ones, from _assemble -> [B, h, w, C], the latents of B images.

        It begins with all tokens masked. Each step makes conditions for all places from the prompt
        and the tokens that are there, and the diffusion head paints the next ones of a random
        order: few at first, many at the end.

        draws     None, or "orders" [B, N], and for each step k, which paints Q tokens an image,
                  "iter{k}.init_noise" of shape B*Q, C and "iter{k}.step_noise" of shape
                  diffusion steps, B*Q, C, the noisiest first; rows behind B*Q are not used
        progress  show a bar
        """
        c = self.config
        if num_steps is None:
            num_steps = c.num_steps
        if guidance_scale is None:
            guidance_scale = c.guidance_scale
        if guidance_schedule is None:
            guidance_schedule = c.guidance_schedule
        if temperature is None:
            temperature = c.temperature

        # Without guidance the unconditional branch is left out.
        branches = 1 if guidance_scale == 1 else 2
        B = len(lengths) // 2
        embeddings = embeddings[:branches * B]
        lengths = lengths[:branches * B, None].to(self.device)  # [branches*B, 1]
        h = w = c.image_size // self.stride
        N = h * w
        C = c.latent_channels

        # Each image has an order of its own. The first `masked` places of it are still masked.
        rng = Rng.sampling(seed, B)
        orders = rng.permutation(N) if draws is None else draws["orders"][:B]
        orders = orders.to(self.device)  # [B, N]

        # The language model reads the prompts once: their keys and values stay in the cache.
        cache = DynamicCache(config=self.llm.config)
        self.llm.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        positions = torch.arange(embeddings.shape[1], device=self.device)
        in_prompt = positions < lengths  # [branches*B, T]

        latents = torch.zeros(B, N, C, device=self.device)
        masked = N
        bar = tqdm(masked_after(N, num_steps), disable=not progress, leave=False)
        for k, planned in enumerate(bar):
            # The last step paints all that is left. Where there are more steps than tokens, those
            # at the end have nothing to do.
            still_masked = 0 if k == num_steps - 1 else planned
            if still_masked == masked:
                continue
            visible = orders[:, masked:].sort(dim=1).values  # [B, V]
            painted = orders[:, still_masked:masked]  # [B, Q = masked - still_masked]
            painted = painted.sort(dim=1).values
            masked = still_masked
            Q = painted.shape[1]

            # The conditions of the tokens to paint, in both branches.
            conditions = self._conditions(latents, (h, w), visible, cache, in_prompt)
            z = take(conditions, painted.repeat(branches, 1)).flatten(0, 1)  # [branches*B*Q, Dd]

            # All noise of these tokens: to start from, and one for each denoising step.
            if draws is None:
                noises = rng.normal(1 + c.diffusion_steps, Q, C)  # [B, 1 + diffusion steps, Q, C]
                noises = noises.transpose(0, 1).flatten(1, 2)
            else:
                first = draws[f"iter{k}.init_noise"][None, :B * Q]
                noises = torch.cat([first, draws[f"iter{k}.step_noise"][:, :B * Q]])
            noises = common.to_device(noises, self.device)  # [1 + diffusion steps, B*Q, C]

            scale = guidance_scale
            if guidance_schedule == "linear":
                scale = 1 + (guidance_scale - 1) * (N - planned) / N
            tokens = self._denoise(z, scale, temperature, noises)  # [B*Q, C]
            latents.scatter_(1, painted[..., None].expand(-1, -1, C), tokens.view(B, Q, C))
        return latents.unflatten(1, (h, w))

    def _conditions(self, latents, grid, visible, cache, in_prompt):
        """A step of the sampler up to MAR's decoder: latents [B, N, C], visible [B, V], the cache
        of the prompts, in_prompt [branches*B, T], which of its positions are no padding ->
        [branches*B, N, Dd].

        Here the padding stays between a prompt and its image tokens, since a cache has one length
        for all. It is masked, and the tokens' positions continue those of their own prompt.
        """
        branches = len(in_prompt) // len(latents)
        encoded = self.mar.encode(latents, grid, visible)  # [B, E+V, De]
        generated = self._into_llm(encoded).repeat(branches, 1, 1)  # [branches*B, G = V+E, D]
        G = generated.shape[1]

        lengths = in_prompt.sum(1, keepdim=True)  # [branches*B, 1]
        hidden = self.llm.model(
            inputs_embeds=generated,
            past_key_values=cache,
            use_cache=True,
            attention_mask=F.pad(in_prompt, (0, G), value=True),
            position_ids=lengths + torch.arange(G, device=self.device),
        ).last_hidden_state  # [branches*B, G, D]
        # The cache is to hold the prompts alone: the next step has other image tokens.
        cache.crop(-G)

        context = encoded.repeat(branches, 1, 1) + self._out_of_llm(hidden)  # [branches*B, E+V, De]
        return self.mar.decode(context, grid, visible.repeat(branches, 1))

    def _denoise(self, z, guidance_scale, temperature, noises):
        """The diffusion head's sampler: z [branches*P, Dd], with guidance the conditions of P
        tokens and then the unconditional ones, noises [1 + diffusion steps, P, C] -> [P, C].
        Guidance moves the predicted noise; the variance is that of the conditional branch."""
        P, C = noises.shape[1:]
        branches = len(z) // P
        net = self.mar.diffloss["net"]
        steps = len(noises) - 1
        tables = diffusion_schedule(steps, noises.device)

        x = noises[0].float()  # [P, C]
        for j in reversed(range(steps)):
            out = net(x.repeat(branches, 1), tables["original"][j:j + 1], z).float()
            noise, v = out[:P].chunk(2, dim=-1)  # [P, C]
            if branches == 2:
                unconditional = out[P:, :C]  # [P, C]
                noise = unconditional + guidance_scale * (noise - unconditional)  # [P, C]

            at = {name: table[j] for name, table in tables.items()}
            limit = math.inf
            if self.config.clip_latents > 0:
                limit = self.config.clip_latents
            x, log_variance = denoising_step(at, x, noise, v, limit)
            # The last step adds no noise.
            if j > 0:
                x = x + temperature * (0.5 * log_variance).exp() * noises[steps - j]
        return x


# ==== 7. main() ===================================================================================


def prepare(model, args):
    """Called before training. The frozen VAE takes the working precision once: autocast would cast
    its float32 weights anew in every step, since it remembers casts of trained weights only."""
    if args.precision == "bf16" and model.device.type == "cuda":
        model.vae.to(torch.bfloat16)
    return {}


def main():
    common.run(Harmon, common.parse_args(__doc__, RECIPES, DEFAULT), prepare)


if __name__ == "__main__":
    common.cli(main)
