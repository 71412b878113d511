"""RecA on Show-o: a language model that writes images as words is trained to draw what it sees.

Why. A text-to-image model learns from captions, and a caption is sparse: hundreds of words still
leave out where things stand, their shapes, their textures, and whatever seems obvious. Hardly any
caption says that broccoli is green, so a model learns that broccoli is green by itself, and paints
a green one when it is asked for "a yellow broccoli". The embeddings of an image-understanding
encoder are dense: they hold layout, colors and attributes, and the model can already read them,
since it answers questions about images from them. RecA (Reconstruction Alignment, arXiv 2509.07295)
takes an image's own understanding embeddings for a prompt, and the image itself for the answer.
No caption is needed.

The method. Equation (2) of the paper, the reconstruction loss, and (3), the whole objective:

    (2)   L_recon = L( f_theta( concat(t_template, h_v) ), I_gt )
    (3)   L_total = lambda_recon * L_recon + lambda_i2t * L_i2t + lambda_t2i * L_t2i

    I_gt        the image, as N codes of the image tokenizer: MagVit2.codes, features["codes"]
    h_v         its understanding embeddings [C, D]: `understand`, from the frozen CLIP; in the VQ
                variant from the embedding table
    t_template  one of 360 ways to say "Describe the image in detail."
    concat      `recon_prompt` lays out the prompt: C places for h_v (VQ variant: the codes), then
                the template; `embed` puts the vectors there
    f_theta     Phi-1.5, a language model with further words for images: `hidden_states` and, in
                `_cross_entropy`, its output layer. It also gets those tokens of I_gt that are not
                masked, which (2) does not show
    L           cross-entropy at the masked image tokens: `_cross_entropy`
    L_i2t       cross-entropy of answers about images: `i2t_loss`; lambda_i2t = 1 here
    L_t2i       captions to images, as in ordinary training: `t2i_loss`; lambda_t2i = 0 in RecA
    lambda_*    --lambda-recon 1, --lambda-i2t 1, --lambda-t2i 0

What is special about Show-o. An image is 256 tokens (256 px) or 1024 (512 px) out of a codebook of
8192, and these codes are further words of the language model's vocabulary. The same weights predict
text from left to right and fill in masked image tokens (MaskGIT); only the attention mask and the
markers <mmu> and <t2i> tell the tasks apart. So L_recon is a cross-entropy over the vocabulary.

RecA, CLIP variant, at 512 px (N = 1024 image tokens, C = 576 embeddings of CLIP's width 1024, which
mm_projector brings to Phi's D = 2048):

    image [3,512,512] -+- to 336 px -> CLIP (frozen) [C,width] -> mm_projector -> h_v [C,D]
                       |                                                           |
                       |                                              <mmu> <soi> h_v <eoi> template
                       |                                                           |
                       +- MAGVIT-v2 (frozen) -> codes [N] -> mask some -> <soi> image tokens <eoi>
        text is causal and sees h_v; image tokens                                  |
        see what is in front of them and each other                                v
                                      Phi-1.5: trained, but its embedding table not by L_recon [L,D]
                                                                                   |
                                    L_recon = cross-entropy over the vocabulary at the masked tokens

RecA, VQ variant (--model showlab/show-o-512x512): there is no CLIP. The model understands an image
through the same 8192 codes that it writes, so the codes of a smaller image stand in the prompt.

What is frozen, what is trained. CLIP and the image tokenizer are frozen. Phi-1.5 with its embedding
table and output layer, and the connector mm_projector (two layers between CLIP and Phi), are
trained. Why the line is there: RecA brings generation in line with what a fixed encoder says of an
image. CLIP decides what the prompt says and the tokenizer what the target is; if either could move,
the loss could fall because the task gets easier. Phi is not divided any further, because
understanding and generation share each of its weights. In the CLIP variant mm_projector and the
embedding table learn from L_i2t alone: see recon_loss. In the VQ variant only the codes are fixed:
h_v are vectors of the embedding table, which L_recon trains.

At which size the image is seen. In RecA CLIP gets 336 x 336 pixels, the only size that it accepts,
and so the smallest; a 512 px image is shrunk to it, a 256 px image enlarged. The VQ variant gets
half the side: 256 for 512. (For L_i2t it sees the whole size.) Why not larger: larger inputs hold
pixel detail (paper, section 2.2), and the model then leans on that instead of on meaning, which is
all that a text prompt will give it later. The VQ variant shows it at the extreme (appendix F.2): at
full size the answer stands in the prompt, the model copies it, the loss collapses to nearly zero
and generation gets worse. The other remedy is --blur 8: as many codes as at full size, but of an
image without detail.

What keeps understanding alive. CLIP stays, but generation shares all of Phi with understanding, and
training the one alone would damage the other: hence lambda_i2t = 1, on conversations about images
(the paper: LLaVA's 665K). Without --i2t-data the model describes --self-captions (1024) of its own
training images before the first step, and L_i2t holds it to these answers. That is ours, not the
paper's.

Inference is unchanged by RecA. generate() takes a text and no image, with the same prompt and the
same sampler as before; only the weights are others. reconstruct() merely shows what was learned.
The sampler (_sample), for one image; g is guidance_scale (6), 1 is none; temperature starts at 1:

    codes = all N masked
    for ratio in 1/50, 2/50, ... 1:                   # num_steps is 50
        logits = g * Phi(caption, codes) - (g - 1) * Phi(empty caption, codes)      # [N, K]
        drawn = for each masked token a code from softmax(logits); the others keep theirs
        temperature = temperature * (1 - ratio)
        certainty = log p(drawn) + temperature * Gumbel noise; the others: the largest float
        codes = drawn, but the N cos(ratio pi/2) least certain are masked again
    image = MAGVIT-v2's decoder(drawn)

A step, from images to moved weights (common.Trainer.take_step):

    for each loss whose lambda is not 0:              # recon and i2t
        take the next --batch images and their texts  # recon: a random template for each image
        for each micro-batch of them:                 # as many as fit into memory at once
            features = model.encode(images)           # frozen: codes, and what CLIP sees
            draws = model.draw("recon", features)     # how much is masked, and where
            targets = model.count_targets(...)        # masked tokens, or ids of answers
    for each micro-batch, now that the targets of the whole step are known:
        value = model.recon_loss(features, templates, draws)          # or i2t_loss
        weight = lambda * targets / targets of this loss in the step
        (weight * value / accum).backward()           # gradients add up
    every --accum steps (here 1): AdamW moves the weights at the learning rate of the schedule

A *step* is one evaluation of equation (3); an *update* is one move of the weights. Warm-up and
schedule count updates.

One example. An image at 512 px, seen by CLIP, and a template that with "USER:" before it and
"ASSISTANT:" behind it has t <= 123 ids:

    position      what                                  attends to
    0, 1          <mmu> <soi>                           itself and before, and 2..577
    2..577        576 understanding embeddings          the same
    578           <eoi>                                 the same
    579..580+t    <eot> template <eot>                  the same: text is causal
    581+t..703    padding                               nobody looks at it; positions count it
    704           <soi>                                 itself and before
    705..1728     1024 image tokens, some masked        all before, and each other; not 1729
    1729          <eoi>                                 itself and before

128 slots for the template, <mmu>, <soi> and <eoi>, 576 embeddings, 1024 image tokens and their two
markers make 1730 positions; 962 at 256 px. (VQ variant: 382 slots for padding, <mmu> and template,
256 codes and 1024 image tokens with two markers each make 1666.) Columns that are padding in all
prompts of a micro-batch are left out. How much is masked is drawn: u is uniform in [0, 1), and
round(1024 cos(u pi/2)) tokens at random places are replaced by the mask token, 724 for u = 0.5. The
loss is then the mean of 724 cross-entropies, each at the masked token's own position (no shift).

The other prompts at this size (section 4):

    generate    0..128 padding <t2i> <eot> caption <eot>    129 <soi>    130..1153 image    <eoi>
    t2i_loss    0..576 padding <t2i> <eot> caption <eot>    577 <soi>    578..1601 image    <eoi>
    i2t_loss    0 <mmu>   1..28 system prompt   29 <soi>    30..605 h_v    <eoi>    conversation

Why RecA's prompt teaches something for that of generate, though it starts with <mmu> and its image
stands elsewhere: Phi's weights are the same for both. Rotary positions tell distances only, which
among the image tokens are the same everywhere. And embeddings and words are alike to such a model:
in its deeper layers those of the same thing agree (paper, appendix D).

Where the numbers come from. Paper, Table 8: learning rate 5e-7, weight decay 0.01, 1000 updates of
warm-up, 5000 steps (updates, see Recipe), 5 micro-batches of 2 (256 px: 4) images, the lambdas.
Public config of the original: AdamW's betas and eps, the end of the cosine, no clipping, all sizes
and prompt slots, the sampler's 50 steps and guidance. Ours: the 5 x 2 images are one step of 10,
all targets of a step weigh the same, 1024 self-captions, everything about "tiny". Each is marked in
section 1.

Accidents of the original that we follow, as the published weights and numbers were made with them:
with CLIP, L_recon does not train mm_projector and the embedding table (recon_loss), and RecA does
not normalize CLIP's pixels as CLIP's (und_view); weight decay takes norms and embeddings, too
(parameter_groups); padding between template and image (_recon_batch); argsort in the place of ranks
(_mask_tokens); the sampler's temperature falls as a product (_sample). Where we differ on purpose:
a loss is one mean over all its targets in a step; the VQ variant has a template for each image;
guidance_scale is the original's plus 1. docs/originals.md has the rest.

What the loss looks like while it goes well:

L_recon falls fast: the prompt tells which codes the masked tokens have, and there is no noise in
them. The tiny run with CLIP (seed 0), means of steps 1-25, 26-50, 51-75, 76-100 and 126-150: 0.99,
0.20, 0.08, 0.06, 0.04. Without CLIP (tiny-vq): 0.51, 0.27, 0.22, 0.20, 0.16. L_i2t, on the model's
own descriptions, stays near 0.001 (0.01 without CLIP). A loss that falls to nearly 0 at once copies
codes (F.2).

Commands:

    python reca_showo.py --model tiny          toy world on a CPU, no download; also tiny-vq
    python reca_showo.py --data ./images --i2t-data llava.json --i2t-images ./llava   512 px, paper
    python reca_showo.py --model showlab/show-o-w-clip-vit --data ./images ...        256 px
    python reca_showo.py --model showlab/show-o-512x512 --und-size 256 --data ...     VQ variant:
                                        --und-size 512 | 256 | 128, or --blur 8, are the rows of F.2
    python reca_showo.py --model DIR --steps 0 --generate prompts.txt --out samples

In which order to read. recon_loss in section 5 is RecA. From there go to recon_prompt and
_recon_batch (section 4) and PromptBatch (section 2: what a prompt and its mask are), then to encode
and understand (section 2: what is frozen, what becomes an embedding), then to _sample (section 6).
Sections 1 and 3 are for looking things up. How a step is taken stands in common.py.

Words: und, understanding; gen, generation; t2i, text to image; i2t, image to text; marker, an id
that is no word but tells the model what comes (<mmu>: a question about an image; <t2i>: an image
for a text; <soi>, <eoi>: start and end of an image; <eot>: begin and end of a text, Phi's only such
id); connector, the layers that bring CLIP's features to the language model's width; features, what
the frozen parts make of an image; embeddings, what `understand` makes of features["und"]; context,
the prompt as vectors [B, L, D], with the image that is to be written, masked in part, at its end;
mask, an attention mask; masked, replaced by the mask token; buffer, a tensor of a module that is no
weight.

Shapes: B images or prompts, N image tokens, C CLIP embeddings, L positions of a prompt, D width of
the language model, K codes, V vocabulary (text, markers, K codes, mask token), S pixels per side of
an image, s of what the understanding side sees, h w grid of tokens, width of CLIP, bits of a code,
T ids of a text, n targets of a loss.
"""
import dataclasses
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import (
    DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D)
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig, CLIPVisionModel, DynamicCache, PhiConfig, PhiForCausalLM)

import common
from common import InputError, Rng


# ==== 1. Sizes and hyper-parameters ===============================================================


@dataclass
class ShowoConfig:
    """Sizes and the sampler's defaults. The values here are the released 512 px model with CLIP."""

    w_clip_vit: bool = True  # CLIP variant; False: VQ variant
    image_size: int = 512  # pixels per side of the images that are written
    llm_vocab_size: int = 50295  # ids of Phi's text tokenizer, filled up to this number
    eot: int = 50256  # <|endoftext|>: begin and end of every text
    codebook_bits: int = 13  # 2^13 = 8192 codes

    # Phi-1.5. Show-o adds the LayerNorm on queries and keys, and the words for images.
    hidden: int = 2048
    layers: int = 24
    heads: int = 32
    intermediate: int = 8192
    max_positions: int = 2048

    # CLIP ViT-L/14 at 336 px; without use in the VQ variant.
    clip_hidden: int = 1024
    clip_intermediate: int = 4096
    clip_layers: int = 24
    clip_heads: int = 16
    clip_image_size: int = 336
    clip_patch: int = 14

    # MAGVIT-v2. A level's width is vq_ch times its multiplier; *_res counts its residual blocks.
    vq_ch: int = 128
    vq_enc_mult: tuple = (1, 2, 2, 4, 4)
    vq_enc_res: tuple = (4, 3, 4, 3, 4)
    vq_dec_mult: tuple = (1, 1, 2, 2, 4)
    vq_dec_res: tuple = (4, 4, 3, 4, 3)

    # Slots for text in the prompts of section 4 (public config).
    recon_text: int = 128  # RecA, CLIP variant: template, <mmu>, <soi> and <eoi>
    max_text: int = 576  # training; the VQ variant has 381
    max_prompt: int = 128  # generation
    system_len: int = 28  # ids of SYSTEM_PROMPT; 0: the model has no system prompt

    # The sampler's defaults. The original counts guidance from 0, so its 5 is 6 here.
    num_steps: int = 50  # public config of GenEval and DPG-Bench, like the next
    guidance_scale: float = 6.0  # 1: no guidance
    temperature: float = 1.0  # of the noise in the choice of what stays masked

    @property
    def num_tokens(self):
        """N, the tokens of an image: MAGVIT-v2 makes one of 16 x 16 pixels."""
        return (self.image_size // 16) ** 2

    @property
    def num_clip(self):
        """C, the embeddings of CLIP: one for each patch."""
        return (self.clip_image_size // self.clip_patch) ** 2

    @property
    def codebook_size(self):
        """K, the number of codes."""
        return 2 ** self.codebook_bits

    # The vocabulary of 58,498 ids, in this order: text, [PAD], <soi>, <eoi>, <sov>, <eov>, <t2i>,
    # <mmu>, <t2v>, <v2v>, <lvg>, the K codes, the mask token. (Markers of video are never used.)

    @property
    def pad(self):
        """[PAD], which fills up short texts."""
        return self.llm_vocab_size

    @property
    def soi(self):
        """<soi>: start of an image."""
        return self.llm_vocab_size + 1

    @property
    def eoi(self):
        """<eoi>: end of an image."""
        return self.llm_vocab_size + 2

    @property
    def t2i(self):
        """<t2i>: the task is text to image."""
        return self.llm_vocab_size + 5

    @property
    def mmu(self):
        """<mmu>: the task is (multimodal) understanding."""
        return self.llm_vocab_size + 6

    @property
    def first_code(self):
        """The id of code 0; code k has the id first_code + k."""
        return self.llm_vocab_size + 10

    @property
    def mask_token(self):
        """What stands in the place of an image token that is to be predicted."""
        return self.first_code + self.codebook_size

    @property
    def vocab_size(self):
        """V, the number of ids: 58,498 in the released models."""
        return self.mask_token + 1


TINY = ShowoConfig(
    image_size=64,
    codebook_bits=8,
    hidden=112,
    layers=4,
    heads=4,
    intermediate=288,
    max_positions=512,
    clip_hidden=96,
    clip_intermediate=64,
    clip_layers=3,
    clip_heads=4,
    clip_image_size=32,
    clip_patch=8,
    # GroupNorm has 32 groups, so widths are multiples of 32, and of 64 where an image of 16 pixels
    # is one number a channel: a group of one number has no variance.
    vq_ch=32,
    vq_enc_mult=(1, 1, 1, 2, 2),
    vq_enc_res=(0, 0, 0, 1, 1),
    vq_dec_mult=(1, 1, 1, 1, 2),
    vq_dec_res=(0, 0, 1, 1, 1),
    recon_text=32,
    max_text=96,
    max_prompt=48,
    system_len=0,
    # No guidance: it leads away from what the empty prompt gives, which RecA does not train, and a
    # model of this size loses by that.
    num_steps=16,
    guidance_scale=1.0,
)

CONFIGS = {
    "showlab/show-o-w-clip-vit-512x512": ShowoConfig(),
    "showlab/show-o-w-clip-vit": ShowoConfig(image_size=256),
    "showlab/show-o-512x512": ShowoConfig(w_clip_vit=False, max_text=381),
    "showlab/show-o": ShowoConfig(w_clip_vit=False, image_size=256, max_text=381),
    # What the authors' own RecA has made of the first two.
    "showo-512-reca": ShowoConfig(),
    "showo-256-reca": ShowoConfig(image_size=256),
    "tiny": TINY,
    "tiny-vq": dataclasses.replace(TINY, w_clip_vit=False),
}


@dataclass
class Recipe:
    """The paper's run at 512 px; the fields are the defaults of the flags with the same names.

    Table 8 has micro-batches of 2 images (256 px: 4) for each loss and accumulates 5. The original
    counts updates, so each of its 5000 steps, and of the 1000 of warm-up, has 5 micro-batches. Our
    step has the same 10 images (256 px: 20) for each loss and is one update: 5000 steps are 5000
    updates in both. The original averages the means of its micro-batches; ours is the mean over all
    targets of the step.
    """

    # Paper, Table 8.
    steps: int = 5000
    batch: int = 10  # 5 micro-batches of 2
    lr: float = 5e-7
    weight_decay: float = 0.01
    warmup: int = 1000  # updates
    lambda_recon: float = 1.0
    lambda_i2t: float = 1.0
    lambda_t2i: float = 0.0

    # Public config of the original. Its cosine reaches 0 at update 1,000,000, so over 5000 steps it
    # is a constant; at 256 px at update 10,000, so the run ends at 0.59 of the learning rate.
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    horizon: int = 1_000_000
    clip: float = 0.0  # limit of the gradients' norm (not the encoder); 0: not clipped

    # Ours: the accumulated micro-batches are one step.
    accum: int = 1


# Ours, for the toy world. With this large eps Adam hardly moves a weight whose gradient is small:
# what the tiny model can do already, reading words, stays as it is.
RECIPE_TINY = Recipe(steps=150, batch=32, lr=2e-4, eps=5e-4, warmup=20, horizon=0, clip=1.0)

RECIPE_OF_SIZE = {512: Recipe(), 256: Recipe(batch=20, horizon=10_000), 64: RECIPE_TINY}
RECIPES = {name: RECIPE_OF_SIZE[config.image_size] for name, config in CONFIGS.items()}
DEFAULT = "showlab/show-o-w-clip-vit-512x512"

# Where the files are: names of ours -> hub ids, and what a Show-o checkpoint does not hold.
RECA = {"showo-512-reca": "sanaka87/Show-o-512x512-RecA", "showo-256-reca": "sanaka87/Show-o-RecA"}
TOKENIZER_SOURCE = "microsoft/phi-1_5"
CLIP_SOURCE = "openai/clip-vit-large-patch14-336"
VQ_SOURCE = "showlab/magvitv2"

# Names of weight files, in the order in which the original tries them, and how to find them.
WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = [
    *([name, f"{name}.index.json"] for name in WEIGHTS),
    ["*.safetensors", "*.bin", "*.pth"],
]
NEEDED = ("showo.model.embed_tokens.weight",)  # a file without this tensor is no Show-o

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The original has the same number for both. They never meet: one is a label, the other an id.
IGNORED = -100  # among labels: nothing is predicted here
UND = -100  # among ids: the place of an understanding embedding (CLIP variant)

MARKERS = ("<|endoftext|>",)  # kept out of the user's words: it would end the text
TEXT_DROP = 0.1  # probability that t2i training leaves a caption out (public config)
LABELS_AT_ONCE = 2048  # targets that meet the output layer at once, to bound its memory


# ==== 2. The model ================================================================================
# Phi and CLIP are transformers' own classes: PhiForCausalLM with qk_layernorm=True is Show-o's
# language model exactly. The image tokenizer is made of diffusers' blocks. It is not diffusers'
# VQModel, in which encoder and decoder share one list of widths and one number of residual blocks.


def short_side_square(image, size):
    """PIL -> the central square of size x size pixels, as CLIP's own preprocessing makes it: first
    the short side becomes `size` (bicubic), then the square is cut out."""
    # Of a very long image only the middle is enlarged: the rest would be cut off anyway, and
    # enlarging it could need any amount of memory.
    if max(image.size) > 16 * min(image.size):
        middle = 3 * min(image.size)
        left = max(0, (image.width - middle) // 2)
        top = max(0, (image.height - middle) // 2)
        right = min(image.width, left + middle)
        bottom = min(image.height, top + middle)
        image = image.crop((left, top, right, bottom))

    width = int(size * image.width / min(image.size))
    height = int(size * image.height / min(image.size))
    left = (width - size) // 2
    top = (height - size) // 2
    return image.resize((width, height)).crop((left, top, left + size, top + size))


def clip_normalize(pixels):
    """pixels [B, 3, S, S] in [-1, 1] -> [B, 3, S, S] with CLIP's own mean and deviation."""
    # Plane by plane with Python numbers: a tensor of means would have to be copied to the device,
    # and the host would wait for it.
    planes = []
    for plane, mean, std in zip(pixels.unbind(1), CLIP_MEAN, CLIP_STD):
        planes.append(((plane + 1) / 2 - mean) / std)
    return torch.stack(planes, dim=1)  # [B, 3, S, S]


class MagVit2(nn.Module):
    """The image tokenizer MAGVIT-v2: 16 x 16 pixels become one of K codes, and back.

    There is no learned codebook. The encoder gives `bits` numbers for a token, and their signs,
    read as a binary number, are the code; channel 0 is the most significant bit. Images of any
    multiple of 16 pixels work.
    """

    def __init__(self, config):
        super().__init__()
        bits = config.codebook_bits
        encoder_widths = [config.vq_ch * factor for factor in config.vq_enc_mult]
        decoder_widths = [config.vq_ch * factor for factor in config.vq_dec_mult]
        levels = len(encoder_widths)  # level 0 has the full resolution, each next one half of it

        # The encoder goes down the levels ...
        down = nn.Sequential()
        width = config.vq_ch
        for level in range(levels):
            down.append(DownEncoderBlock2D(
                in_channels=width,
                out_channels=encoder_widths[level],
                num_layers=config.vq_enc_res[level],
                add_downsample=level < levels - 1,
                downsample_padding=0,
            ))
            width = encoder_widths[level]

        # ... and the decoder up again.
        up = nn.Sequential()
        width = decoder_widths[-1]
        for level in reversed(range(levels)):
            up.append(UpDecoderBlock2D(
                in_channels=width,
                out_channels=decoder_widths[level],
                num_layers=config.vq_dec_res[level],
                add_upsample=level > 0,
            ))
            width = decoder_widths[level]

        # pixels [B, 3, S, S] -> [B, bits, S/16, S/16], whose signs are the code.
        deepest = encoder_widths[-1]
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(3, config.vq_ch, kernel_size=3, padding=1),
            down_blocks=down,
            mid_block=UNetMidBlock2D(deepest, None, attention_head_dim=deepest),
            conv_norm_out=nn.GroupNorm(32, deepest, eps=1e-6),
            swish=nn.SiLU(),
            conv_out=nn.Conv2d(deepest, bits, kernel_size=3, padding=1),
            quant_conv=nn.Conv2d(bits, bits, kernel_size=1),
        ))

        # signs [B, bits, h, w] -> pixels [B, 3, 16h, 16w].
        deepest = decoder_widths[-1]
        finest = decoder_widths[0]
        self.decoder = nn.Sequential(OrderedDict(
            post_quant_conv=nn.Conv2d(bits, bits, kernel_size=1),
            conv_in=nn.Conv2d(bits, deepest, kernel_size=3, padding=1),
            mid_block=UNetMidBlock2D(deepest, None, attention_head_dim=deepest),
            up_blocks=up,
            conv_norm_out=nn.GroupNorm(32, finest, eps=1e-6),
            swish=nn.SiLU(),
            conv_out=nn.Conv2d(finest, 3, kernel_size=3, padding=1),
        ))

        # The released file holds two tables that spell out the binary numbers: the value of each
        # bit [bits], and the signs of each code [K, bits].
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        signs = (torch.arange(2 ** bits)[:, None] & powers).bool().float() * 2 - 1
        self.quantize = nn.Module()
        self.quantize.register_buffer("power_vals", powers)
        self.quantize.register_buffer("embedding", signs)

    def codes(self, pixels):
        """pixels [B, 3, S, S] in [-1, 1] -> [B, N], int64, one line of the grid after the other."""
        # At most two images of 512 px at a time: the activations of the first layers at full
        # resolution would otherwise need more memory than anything else in a training step.
        at_once = max(1, 2 ** 19 // pixels[0, 0].numel())
        signs = []
        for part in pixels.split(at_once):
            signs.append(self.encoder(part) > 0)  # a zero counts as negative, as in the original
        bits = torch.cat(signs).flatten(2)  # [B, bits, N]
        return (bits * self.quantize.power_vals[:, None]).sum(1)  # [B, N]

    def decode(self, codes):
        """codes [B, N] of a square grid -> [B, 3, S, S], pixels about [-1, 1], not clamped."""
        side = math.isqrt(codes.shape[1])
        signs = self.quantize.embedding[codes]  # [B, N, bits]
        signs = signs.transpose(1, 2).unflatten(2, (side, side))  # [B, bits, h, w]
        return self.decoder(signs)  # [B, 3, 16h, 16w]


@dataclass
class PromptBatch:
    """B prompts of equal length, and who sees whom in them.

    Every attention mask of Show-o is the same statement with other numbers: the token at position q
    sees the positions sees_from[q] .. sees_to[q] (text: up to itself; image tokens: up to the end
    of their image), besides the columns `seen_by_all` (an image that is to be understood), and
    never the columns `seen_by_none` (padding). With --flex these 4 B L numbers are enough;
    otherwise dense_mask makes B L L of them. sees_from and sees_to hold positions, not columns:
    they stay right when columns are left out.

    An image that is to be written stands in the prompt, too, masked in part or in whole.
    """

    ids: torch.Tensor  # [B, L] int64; UND where an understanding embedding is put in
    labels: torch.Tensor  # [B, L] int64; IGNORED where nothing is predicted
    sees_from: torch.Tensor  # [B, L] int64
    sees_to: torch.Tensor  # [B, L] int64
    seen_by_all: torch.Tensor  # [B, L] bool
    seen_by_none: torch.Tensor  # [B, L] bool
    positions: torch.Tensor  # [L] int64: what the rotary embeddings get

    @classmethod
    def causal(cls, ids, pad):
        """B equally long lists of ids -> prompts in which a token sees itself and all before it,
        but not the padding in front. (Padding sees padding, which nobody reads.)"""
        ids = torch.tensor(ids)  # [B, L]
        positions = torch.arange(ids.shape[1])  # [L]
        padding = (ids == pad).cumprod(1).sum(1, keepdim=True)  # [B, 1]
        no_column = torch.zeros_like(ids, dtype=torch.bool)  # [B, L]
        return cls(
            ids=ids,
            labels=torch.full_like(ids, IGNORED),
            sees_from=torch.where(positions >= padding, padding, 0),
            sees_to=positions.expand_as(ids).clone(),
            seen_by_all=no_column,
            seen_by_none=no_column.clone(),
            positions=positions,
        )

    def map(self, function):
        """The same prompts with function(tensor) in the place of each tensor."""
        return PromptBatch(**{name: function(value) for name, value in vars(self).items()})

    def to(self, device):
        return self.map(lambda tensor: tensor.to(device))

    def stack(self, other):
        """These prompts, then those of `other`, which have the same length -> 2B prompts."""
        fields = {}
        for name, value in vars(self).items():
            fields[name] = torch.cat([value, getattr(other, name)])
        fields["positions"] = self.positions
        return PromptBatch(**fields)

    def without_padding(self, pad):
        """The prompts without the columns that are padding in all of them.

        This is exact: no token of a text or an image sees padding, and the other columns keep the
        positions that they have in the full layout, which count the padding.
        """
        keep = (self.ids != pad).any(0)  # [L]
        return self.map(lambda tensor: tensor[..., keep])

    def sees(self, b, q, k):
        """Does column q of prompt b attend to column k? For index tensors that broadcast."""
        after_first = self.sees_from[b, q] <= self.positions[k]
        before_last = self.positions[k] <= self.sees_to[b, q]
        in_range = after_first & before_last
        return (in_range | self.seen_by_all[b, k]) & ~self.seen_by_none[b, k]

    def dense_mask(self):
        """-> [B, L, L], bool, True where column q (the second index) attends to column k."""
        B, L = self.ids.shape
        prompt = torch.arange(B, device=self.ids.device)
        column = torch.arange(L, device=self.ids.device)
        return self.sees(prompt[:, None, None], column[:, None], column)  # [B, L, L]

    def block_mask(self):
        """The same for flex_attention, which skips the blocks of 128 x 128 that are all False."""
        B, L = self.ids.shape

        def sees(b, head, q, k):
            return self.sees(b, q, k)

        return create_block_mask(sees, B, None, L, L, device=self.ids.device)


class Showo(nn.Module):
    """The whole model. Its parts, by the names in the released checkpoints:

    showo           Phi-1.5 with image tokens in its vocabulary; trained
    mm_projector    connector from CLIP's width to Phi's (CLIP variant); trained
    clip            the understanding encoder (CLIP variant); frozen
    magvit          the image tokenizer; frozen
    """

    # What --quantize leaves as it is: the output layer, and the image tokenizer, whose codes are
    # signs, some of which rounding would flip.
    unquantized = ("showo.lm_head", "magvit.")

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer

        # Named as in the checkpoints: it is Phi alone. Rotary embedding and LayerNorm: PhiConfig's.
        self.showo = PhiForCausalLM(PhiConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            max_position_embeddings=config.max_positions,
            qk_layernorm=True,
            # The same function as Phi's "gelu_new", which is made of a dozen operations, each of
            # which keeps a tensor for the backward pass.
            hidden_act="gelu_pytorch_tanh",
            bos_token_id=config.eot,
            eos_token_id=config.eot,
            pad_token_id=None,
        ))

        if config.w_clip_vit:
            self.mm_projector = nn.Sequential(
                nn.Linear(config.clip_hidden, config.hidden),
                nn.GELU(),
                nn.Linear(config.hidden, config.hidden),
            )
            # The encoder. Recipe.clip is something else, the limit of the gradients.
            self.clip = CLIPVisionModel(CLIPVisionConfig(
                hidden_size=config.clip_hidden,
                intermediate_size=config.clip_intermediate,
                num_hidden_layers=config.clip_layers,
                num_attention_heads=config.clip_heads,
                image_size=config.clip_image_size,
                patch_size=config.clip_patch,
            ))

        self.magvit = MagVit2(config)
        self.parts("magvit", "clip").requires_grad_(False)
        self.train_embeddings_in_recon = False  # --recon-trains-embeddings, see recon_loss
        self.flex = False  # --flex: the losses use flex_attention
        self.set_und()

    def set_und(self, size=None, blur=None):
        """What the understanding side of RecA sees of an image (paper, appendix F.2; see und_view).

        size: pixels per side. Without it CLIP sees its 336 pixels; the VQ variant half of the
        image's side, or all of it where `blur` already takes the detail away. blur: the factor by
        which the image is shrunk and enlarged again. InputError for what does not fit the model.
        """
        config = self.config
        if size is None:
            if config.w_clip_vit:
                size = config.clip_image_size
            elif blur:
                size = config.image_size
            else:
                size = config.image_size // 2

        if config.w_clip_vit:
            if size != config.clip_image_size:
                raise InputError(
                    f"--und-size {size}: CLIP takes {config.clip_image_size} pixels only "
                    "(the VQ variant: multiples of 16)")
        elif size % 16 != 0 or size > config.image_size:
            raise InputError(
                f"--und-size {size}: a multiple of 16, at most {config.image_size}, is needed")
        common.check_blur(blur, config.image_size)  # before training, not at the first image

        self.und_size = size
        self.und_blur = blur

    def parts(self, *names):
        """Those of the named modules that this variant has."""
        return nn.ModuleDict({name: getattr(self, name) for name in names if hasattr(self, name)})

    def trained(self):
        """The modules that are trained, which are those that a Show-o checkpoint holds."""
        return self.parts("showo", "mm_projector")

    def train(self, mode=True):
        """Training mode for what is trained; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.parts("magvit", "clip").eval()
        return self

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    def blocks(self):
        """The repeated layers, for torch.compile and activation checkpointing."""
        return list(self.showo.model.layers)

    def parameter_groups(self, weight_decay):
        """AdamW's groups of all that is trained; biases are exempt from weight decay.

        The original means to exempt norms and embeddings, too, but lists names that Phi does not
        have. We follow what it does; at a learning rate of 5e-7 it hardly matters.
        """
        decayed = []
        biases = []
        for name, parameter in self.trained().named_parameters():
            if "bias" in name:
                biases.append(parameter)
            else:
                decayed.append(parameter)
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]

    def preprocess(self, image, task, rng=None):
        """PIL RGB -> {"pixels": uint8 [3, S, S]}, or for CLIP's captioning {"clip_pixels": ...}.

        recon, t2i: the image stretched to a square, without a crop, as in the original. i2t: its
        central square (CLIP variant: 336 px). Nothing is random. ValueError for image=None: text
        without an image is left out, as in the original.
        """
        if image is None:
            raise ValueError("a conversation without an image")

        size = self.config.image_size
        if task != "i2t":
            return {"pixels": common.to_uint8(image.resize((size, size)))}
        if not self.config.w_clip_vit:
            return {"pixels": common.to_uint8(short_side_square(image, size))}
        square = short_side_square(image, self.config.clip_image_size)
        return {"clip_pixels": common.to_uint8(square)}

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen parts make of images: samples of preprocess -> a dict for each.

        "codes" (recon, t2i): int64 [N], the image itself. "und" (recon, i2t): what `understand`
        makes embeddings of: CLIP's features [C, width], or in the VQ variant int64 codes, in recon
        of the smaller image, in i2t of all N tokens.
        """
        with_clip = self.config.w_clip_vit
        name = "clip_pixels" if "clip_pixels" in samples[0] else "pixels"
        images = [common.normalize(sample[name].to(self.device)) for sample in samples]
        pixels = torch.stack(images)  # [B, 3, S, S]

        # Without autocast: rounding would flip some of the signs that make a code.
        features = {}
        with torch.autocast(self.device.type, enabled=False):
            if task != "i2t":
                features["codes"] = self.magvit.codes(pixels)  # [B, N]

            if task != "t2i":
                view = pixels
                if task == "recon":
                    view = self.und_view(pixels)
                elif with_clip:
                    view = clip_normalize(pixels)
                if with_clip:
                    features["und"] = self.clip_features(view.to(self.clip.dtype))
                else:
                    features["und"] = self.magvit.codes(view)

        examples = []
        for i in range(len(samples)):
            examples.append({key: value[i] for key, value in features.items()})
        return examples

    def und_view(self, pixels):
        """pixels [B, 3, S, S] -> what the understanding side of RecA sees of it, [B, 3, s, s].

        CLIP variant: 336 px (512 px are shrunk, 256 px enlarged), bilinear without antialiasing, in
        the tokenizer's range [-1, 1]. The original does not apply CLIP's own mean and deviation
        here, though it does in captioning. It looks like an oversight, but the released weights
        were trained with it, so we follow it.

        VQ variant: und_size pixels. Table of F.2: at 512 the model copies, 256 is the best trade,
        128 is outside of what it knows, and a blur leaves as many codes but no detail.
        """
        if self.und_blur:
            pixels = common.blur(pixels, self.und_blur)
        return F.interpolate(pixels, self.und_size, mode="bilinear")

    def clip_features(self, pixels):
        """pixels [B, 3, s, s] of CLIP's size -> [B, C, width]: what comes out of its last layer but
        one, without the class token and the final norm. The last layer is loaded and never run."""
        x = self.clip.pre_layrnorm(self.clip.embeddings(pixels))  # [B, C+1, width]
        for layer in self.clip.encoder.layers[:-1]:
            x = layer(x, None)
        return x[:, 1:]  # [B, C, width]

    def understand(self, features):
        """h_v: features of encode -> [B, C, D], the understanding embeddings as Phi gets them.

        CLIP variant: CLIP's features through the connector. VQ variant: the codes' own vectors in
        the embedding table.
        """
        inputs = torch.stack([feature["und"] for feature in features])
        if not self.config.w_clip_vit:
            return self.showo.model.embed_tokens(inputs + self.config.first_code)
        dtype = self.mm_projector[0].bias.dtype  # the weight's may be int8
        return self.mm_projector(inputs.to(dtype))  # [B, C, D]

    def embed(self, prompts, embeddings=None):
        """The context: the vector of each id, and in the places that wait for them the embeddings
        of understand -> [B, L, D]. In the VQ variant no place waits: the codes stand in the prompt
        as ids, and their vectors are the embeddings."""
        context = self.showo.model.embed_tokens(prompts.ids.clamp(min=0))  # [B, L, D]
        if embeddings is None or not self.config.w_clip_vit:
            return context
        waiting = (prompts.ids == UND)[..., None]  # [B, L, 1]
        return context.masked_scatter(waiting, embeddings.to(context.dtype))  # [B, L, D]

    def hidden_states(self, context, mask, positions, cache=None):
        """f_theta without its output layer: context [B, L, D] -> [B, L, D], after all of Phi's
        layers and the final norm. mask: of PromptBatch. cache: keys and values of what is in front
        of the context, which a dense mask then covers, too."""
        if torch.is_tensor(mask):
            attention = "sdpa"
            mask = mask[:, None]  # [B, 1, L, L or cached]
        else:
            attention = "flex_attention"
        self.showo.set_attn_implementation(attention)

        output = self.showo.model(
            inputs_embeds=context,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state  # [B, L, D]

    # ==== 3. Loading and saving ===================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """A model in evaluation mode, with its tokenizer.

        source    a name in CONFIGS, a hub id, or a folder in the released layout: config.json and
                  pytorch_model.safetensors or .bin. Tokenizer, CLIP and MAGVIT-v2 come from the
                  sub-folders that save_pretrained writes, else from their own places on the hub
        dtype     of all but MAGVIT-v2, which stays float32
        quantize  None or "int8", done before anything is on the device
        InputError for a checkpoint whose keys or shapes do not fit.
        """
        if source in common.TOYS:
            source = common.tiny_folder(source.replace("tiny", "showo"))
        source = str(source)
        configs = ["config.json", "*unwrapped_model/config.json"]
        path = common.find_checkpoint(source, RECA, WEIGHT_FILES, configs, NEEDED)
        folder = path.parent

        # A repository with nothing but weights has the sizes that its name stands for.
        config = CONFIGS.get(source)
        if config is None or (folder / "config.json").is_file():
            config = cls._read_config(folder)

        patterns = ["*.json", "*.txt"]
        tokenizer_folder = cls._part_folder(folder, "tokenizer", TOKENIZER_SOURCE, patterns)
        tokenizer = common.load_tokenizer(tokenizer_folder)

        # "meta": without memory, since each weight is read from a file anyway.
        with torch.device("meta"):
            model = cls(config, tokenizer)
        model.to_empty(device="cpu")
        common.load_strictly(model.trained(), common.load_state(path), source)

        patterns = ["*.safetensors", "*.bin"]
        vq_folder = cls._part_folder(folder, "magvitv2", VQ_SOURCE, patterns)
        state = common.find_weights(vq_folder, *WEIGHTS)
        state = common.autoencoder_from_original(model.magvit, state)
        common.load_strictly(model.magvit, state, "MAGVIT-v2")

        if config.w_clip_vit:
            clip_folder = cls._part_folder(folder, "clip", CLIP_SOURCE, patterns)
            state = cls._clip_keys(common.find_weights(clip_folder, *WEIGHTS))
            common.load_strictly(model.clip, state, "CLIP")
            # A buffer that no checkpoint holds.
            model.clip.embeddings.position_ids.copy_(torch.arange(config.num_clip + 1))

        common.quantize(model, quantize).to(device)
        model.parts("showo", "mm_projector", "clip").to(dtype)

        # Another buffer that no checkpoint holds: the frequencies of the rotary embedding. It is
        # made after the cast to `dtype`, because rounded frequencies would be other positions.
        rotary = type(model.showo.model.rotary_emb)
        model.showo.model.rotary_emb = rotary(model.showo.config).to(device)
        return model.eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """A model of the sizes CONFIGS[name] with random weights and a word-level tokenizer.
        Downloads nothing."""
        if name not in CONFIGS:
            known = ", ".join(CONFIGS)
            raise InputError(f"no sizes known for {name}: choose one of {known}")

        config = CONFIGS[name]
        tokenizer = common.tiny_tokenizer(("<|endoftext|>",))
        if name in common.TOYS:
            eot = tokenizer.convert_tokens_to_ids("<|endoftext|>")
            config = dataclasses.replace(config, llm_vocab_size=len(tokenizer), eot=eot)
        with torch.device(device):
            return cls(config, tokenizer)

    def save_pretrained(self, folder):
        """Writes the released layout, which the original repository reads; tokenizer, CLIP and
        MAGVIT-v2 in sub-folders; sizes and sampler's settings that it does not know as "sizes"."""
        folder = Path(folder)
        config = self.config
        released = {
            "_class_name": "Showo",
            "w_clip_vit": config.w_clip_vit,
            "load_from_showo": True,
            "vocab_size": config.vocab_size,
            "llm_vocab_size": config.llm_vocab_size,
            "mask_token_id": config.mask_token,
            "codebook_size": config.codebook_size,
            "num_vq_tokens": config.num_tokens,
            "llm_model_path": TOKENIZER_SOURCE,
        }
        sizes = {}
        for name, value in dataclasses.asdict(config).items():
            if name not in released and name != "image_size":
                sizes[name] = value

        self._write_weights(folder, self.trained().state_dict(), {**released, "sizes": sizes})
        state = common.autoencoder_to_original(self.magvit)
        self._write_weights(folder / "magvitv2", state, {"_class_name": "MAGVITv2"})
        if config.w_clip_vit:
            state = {f"vision_model.{name}": v for name, v in self.clip.state_dict().items()}
            clip_config = self.clip.config.to_dict()
            self._write_weights(folder / "clip", state, clip_config, "model.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")

    @staticmethod
    def _read_config(folder):
        """config.json -> ShowoConfig. "sizes" is ours; a released file has none, since all released
        models have the same. InputError for a file that is not Show-o's."""
        path = folder / "config.json"
        given = common.read_object(path)
        try:
            config = ShowoConfig(
                w_clip_vit=bool(given["w_clip_vit"]),
                image_size=16 * math.isqrt(given["num_vq_tokens"]),
                llm_vocab_size=given["llm_vocab_size"],
                max_text=576 if given["w_clip_vit"] else 381,
            )
            config = dataclasses.replace(config, **given.get("sizes", {}))
            found = given["vocab_size"]
            expected = config.vocab_size
        except (KeyError, TypeError) as error:
            message = f"{path} is not the config of a Show-o checkpoint ({error})"
            raise InputError(message) from error
        if found != expected:
            raise InputError(f"{path}: vocab_size is {found}, expected {expected}")
        return config

    @staticmethod
    def _part_folder(folder, name, hub_id, patterns):
        """Where a part's files are: the checkpoint's own sub-folder, or a download."""
        if (folder / name).is_dir():
            return folder / name
        return common.hub_folder(hub_id, patterns)

    @staticmethod
    def _clip_keys(state):
        """A CLIP checkpoint -> the names of transformers 5, which have no prefix vision_model. The
        hub's file also holds the text half and position numbers, which are left out."""
        if any(name.startswith("vision_model.") for name in state):
            vision = {}
            for name, value in state.items():
                if name.startswith("vision_model."):
                    vision[name.removeprefix("vision_model.")] = value
            state = vision
        return {name: v for name, v in state.items() if not name.endswith("position_ids")}

    @staticmethod
    def _write_weights(folder, state, config, name=WEIGHTS[0]):
        """A state dict and the config beside it."""
        common.write(folder / "config.json", config)
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})

    # ==== 4. The embedding-conditioned prompt =====================================================
    # Five layouts. C and N count, everything else is one id or a text:
    #
    #   RecA, CLIP   <mmu> <soi> C places <eoi> <eot> template <eot> padding   <soi> N tokens <eoi>
    #   RecA, VQ     padding <mmu> <soi> C codes <eoi> <eot> template <eot>    <soi> N tokens <eoi>
    #   t2i          padding <t2i> <eot> caption <eot>                         <soi> N tokens <eoi>
    #   i2t, CLIP    <mmu> system prompt <soi> C places <eoi> conversation   padding
    #   i2t, VQ      <mmu> <soi> N codes <eoi> conversation                  padding
    #
    # The places wait for understanding embeddings (see embed). The C codes of the VQ variant are
    # those of the smaller image. RecA has its padding between template and image in the CLIP
    # variant and in front in the VQ variant, as in the original: the positions of the image tokens
    # follow from it.
    #
    # tokens, labels: [B, N] as _mask_tokens makes them. Without them, for sampling, every image
    # token is masked and nothing is labelled.

    def tokenize(self, text):
        """A text -> its list of ids, without any marker."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def recon_prompt(self, template, image):
        """concat(t_template, h_v) of equation (2), h_v in front: the ids of one prompt. image: what
        stands for the image in it, places or codes, as _und_ids makes them."""
        c = self.config
        text = self._between_eot(self._template_ids(template))
        return [c.mmu, c.soi, *image, c.eoi, *text]

    def t2i_prompt(self, caption):
        """Text to image: the ids of one prompt; "" is the prompt without a caption."""
        return [self.config.t2i, *self._between_eot(self.tokenize(caption))]

    def i2t_prompt(self, question):
        """A question about an image: its ids, behind which the answer follows."""
        return self.tokenize(f"USER: {common.plain(question, MARKERS)} ASSISTANT:")

    def conversation(self, turns):
        """[(question, answer), ...] -> ids and labels of "USER: q ASSISTANT: a<eot>USER: ...", two
        lists. Answers and their <eot> are labels. What is longer than the recipe's room is cut."""
        ids = []
        labels = []
        for question, answer in turns:
            answer = common.plain(answer, MARKERS).strip()
            question_ids = self.i2t_prompt(question.strip())
            answer_ids = self.tokenize(f" {answer}") + [self.config.eot]
            ids += question_ids + answer_ids
            labels += [IGNORED] * len(question_ids) + answer_ids

        config = self.config
        room = config.max_text
        if config.w_clip_vit:
            # The original makes this prompt as long as that of t2i, so that both share a batch:
            # 996 slots at 512 px, 228 at 256 px.
            room = config.max_text + config.num_tokens - config.num_clip - config.system_len
        return ids[:room], labels[:room]

    def _recon_batch(self, templates, features, tokens=None, labels=None):
        """B templates about the images with these features, and the image to write behind each ->
        PromptBatch. InputError for a template that is too long.

        CLIP variant: the embeddings are seen by every token, also by the two before them. Text is
        causal. The N image tokens see everything in front of them and each other, but not the
        closing <eoi>. The padding is seen by none. VQ variant: either image sees itself and
        everything in front of it.
        """
        config = self.config
        images = self._und_ids(features)
        fronts = []
        for template, image in zip(templates, images):
            fronts.append(self.recon_prompt(template, image))

        # All fronts get the same length: their image, three markers, and room for the text.
        room = config.max_text
        if config.w_clip_vit:
            room = config.recon_text - 3  # <mmu>, <soi> and <eoi> are counted in these slots
        length = len(images[0]) + 3 + room
        longest = max(len(front) for front in fronts)
        if longest > length:
            raise InputError(f"a template takes {longest - length + room} tokens, the RecA prompt "
                             f"has room for {room}: shorten it")

        padded = []
        padding_lengths = []
        for front in fronts:
            padding = [config.pad] * (length - len(front))
            padding_lengths.append(len(padding))
            if config.w_clip_vit:
                padded.append(front + padding)
            else:
                padded.append(padding + front)
        prompts = self._append_image(padded, tokens, labels)

        # Who sees whom, where it is not causal. `last` is the closing <eoi>.
        last = prompts.ids.shape[1] - 1
        if config.w_clip_vit:
            prompts.seen_by_all = prompts.ids == UND
            prompts.seen_by_none = prompts.ids == config.pad
            prompts.sees_to[:, last - config.num_tokens:last] = last - 1
        else:
            # Behind the padding stand <mmu>, <soi>, the codes and <eoi>. <soi> to <eoi> see each
            # other: all of them see up to this <eoi>. One number for each prompt:
            mmu = torch.tensor(padding_lengths)[:, None]
            und_eoi = mmu + 1 + len(images[0]) + 1
            is_und = (prompts.positions > mmu) & (prompts.positions <= und_eoi)
            prompts.sees_to = torch.where(is_und, und_eoi, prompts.sees_to)
            prompts.sees_to[:, last - config.num_tokens - 1:] = last
        return prompts

    def _t2i_batch(self, captions, tokens=None, labels=None, slots=None):
        """B captions and the image to write behind each -> PromptBatch. slots: ids that a text may
        have, with its two <eot>; a longer one is cut and closed with <eot>.

        Text is causal; <soi>, the image tokens and <eoi> see all of the text and each other. In
        training these two markers are labelled with themselves, as in the original: two easy
        targets for each image.
        """
        config = self.config
        if slots is None:
            slots = config.max_text
        length = slots + 1  # <t2i> and the text

        fronts = []
        for caption in captions:
            front = self.t2i_prompt(caption)
            if len(front) > length:
                front = front[:length - 1] + [config.eot]
            padding = [config.pad] * (length - len(front))
            fronts.append(padding + front)

        prompts = self._append_image(fronts, tokens, labels)
        prompts.sees_to[:, length:] = prompts.ids.shape[1] - 1
        if labels is not None:
            prompts.labels[:, length] = prompts.ids[:, length]
            prompts.labels[:, -1] = prompts.ids[:, -1]
        return prompts

    def _i2t_batch(self, ids, labels, features):
        """ids [B, T] of B conversations, padded on the right, about the images with these features
        -> PromptBatch. labels [B, T], or None where nothing is trained.

        Everything is causal, but the image is seen by all (in the VQ variant also <mmu> and the
        markers around it). Padding on the right is never seen, since all others come before it.
        """
        config = self.config
        system = self._system_ids()
        sequences = []
        for image, text in zip(self._und_ids(features), ids.tolist()):
            sequences.append([config.mmu, *system, config.soi, *image, config.eoi, *text])

        prompts = PromptBatch.causal(sequences, config.pad)
        if labels is not None:
            prompts.labels[:, -ids.shape[1]:] = labels
        if config.w_clip_vit:
            prompts.seen_by_all = prompts.ids == UND
        else:
            prompts.seen_by_all[:, :-ids.shape[1]] = True
        return prompts

    def _pad_conversations(self, conversations):
        """B conversations -> ids [B, T] and labels [B, T], padded on the right to the longest one.
        (The original pads to all of the room: slots that no other sees.)"""
        all_ids = []
        all_labels = []
        for turns in conversations:
            ids, labels = self.conversation(turns)
            all_ids.append(torch.tensor(ids))
            all_labels.append(torch.tensor(labels))
        ids = pad_sequence(all_ids, batch_first=True, padding_value=self.config.pad)  # [B, T]
        labels = pad_sequence(all_labels, batch_first=True, padding_value=IGNORED)  # [B, T]
        return ids, labels

    def _template_ids(self, template):
        """A template as a question, which in RecA has the original's line break."""
        return self.tokenize(f"USER: \n {template} ASSISTANT:")

    def _system_ids(self):
        """What stands in front of a conversation: the CLIP variant's system prompt."""
        if self.config.w_clip_vit and self.config.system_len > 0:
            return self.tokenize(SYSTEM_PROMPT)
        return []

    def _between_eot(self, ids):
        """<eot> in front of a text (unless it is there) and behind it."""
        eot = self.config.eot
        if ids[:1] == [eot]:
            return [*ids, eot]
        return [eot, *ids, eot]

    def _und_ids(self, features):
        """What stands for B images that are to be understood: places, or codes; B lists of ids."""
        if self.config.w_clip_vit:
            return [[UND] * self.config.num_clip for _ in features]
        codes = torch.stack([feature["und"] for feature in features])
        return (codes + self.config.first_code).tolist()

    def _append_image(self, fronts, tokens, labels):
        """<soi> N tokens <eoi> behind B equally long lists of ids -> causal prompts."""
        config = self.config
        if tokens is None:
            images = [[config.mask_token] * config.num_tokens for _ in fronts]
        else:
            images = tokens.tolist()

        sequences = []
        for front, image in zip(fronts, images):
            sequences.append([*front, config.soi, *image, config.eoi])
        prompts = PromptBatch.causal(sequences, config.pad)
        if labels is not None:
            prompts.labels[:, -config.num_tokens - 1:-1] = labels
        return prompts

    # ==== 5. The losses ===========================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """L_recon of RecA, equation (2): an image's masked tokens from its own embeddings.

        features: B dicts of encode; templates: B instructions (the original's VQ variant has one
        for the whole batch); draws: of `draw`, or None: drawn from rng. -> scalar, the mean over
        all masked tokens of the batch, so that an image with more of them weighs more.

        In the CLIP variant the original computes the context without autograd, so that mm_projector
        and the embedding table learn from L_i2t alone. Intended or not, the released weights were
        made so, and we follow it unless `train_embeddings_in_recon` is set. In the VQ variant the
        table does learn.
        """
        if draws is None:
            draws = self.draw("recon", features, rng)

        # The target is the image itself: its codes, some of them replaced by the mask token.
        tokens, labels = self._mask_tokens(features, draws)

        # The prompt is one that asks for a description, because in such prompts Phi has learned to
        # read embeddings. In the place of the answer stands the image.
        prompts = self._recon_batch(templates, features, tokens, labels)
        prompts, targets = self._find_targets(prompts)

        # The context: the prompt with the understanding embeddings in it.
        train_context = not self.config.w_clip_vit or self.train_embeddings_in_recon
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_context):
            embeddings = self.understand(features)  # [B, C, D]
            context = self.embed(prompts, embeddings)  # [B, L, D]

        # Phi fills in the image; at a masked token its prediction is compared with the code there.
        mask = self._loss_mask(prompts)
        hidden = self.hidden_states(context, mask, prompts.positions)  # [B, L, D]
        return self._cross_entropy(hidden, targets)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """L_t2i: the masked tokens of an image behind its caption -> scalar, the mean over all
        targets. For supervised fine-tuning; in RecA itself lambda_t2i = 0."""
        if draws is None:
            draws = self.draw("t2i", features, rng)
        tokens, labels = self._mask_tokens(features, draws)

        texts = []
        for caption, dropped in zip(captions, draws["text_dropped"]):
            texts.append("" if dropped else caption)
        prompts = self._t2i_batch(texts, tokens, labels)
        prompts, targets = self._find_targets(prompts)

        context = self.embed(prompts)  # [B, L, D]
        mask = self._loss_mask(prompts)
        hidden = self.hidden_states(context, mask, prompts.positions)  # [B, L, D]
        return self._cross_entropy(hidden, targets)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """L_i2t, which keeps understanding alive: the answers in B conversations, each a list of
        (question, answer) turns about an image -> scalar, the mean over all ids of answers. Nothing
        is drawn."""
        ids, labels = self._pad_conversations(conversations)
        prompts = self._i2t_batch(ids, labels, features)
        prompts, targets = self._find_targets(prompts, shift=True)

        context = self.embed(prompts, self.understand(features))  # [B, L, D]
        mask = self._loss_mask(prompts)
        hidden = self.hidden_states(context, mask, prompts.positions)  # [B, L, D]
        return self._cross_entropy(hidden, targets)

    def draw(self, task, features, rng=None):
        """The random numbers of a loss, CPU tensors: "timesteps" [B] and "scores" [B, N], uniform
        in [0, 1), and for t2i "text_dropped" [B], True where the caption is left out."""
        if task == "i2t":
            return {}
        if rng is None:
            rng = Rng.fresh(len(features))

        draws = {
            "timesteps": rng.uniform(),
            "scores": rng.uniform(self.config.num_tokens),
        }
        if task == "t2i":
            draws["text_dropped"] = rng.uniform() < TEXT_DROP
        return draws

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: masked tokens (t2i: and two markers for each
        image), or ids of answers."""
        if task == "i2t":
            _, labels = self._pad_conversations(texts)
            return int((labels != IGNORED).sum())
        count = int(self._number_masked(draws["timesteps"]).sum())
        if task == "t2i":
            count += 2 * len(features)
        return count

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: every token
        is masked, and texts are as long as they may be."""
        name = "pixels"
        size = self.config.image_size
        if task == "i2t" and self.config.w_clip_vit:
            name = "clip_pixels"
            size = self.config.clip_image_size
        sample = {name: torch.zeros(3, size, size, dtype=torch.uint8)}

        words = "word " * 1200
        texts = {
            "recon": max(common.templates(), key=len),
            "t2i": words,
            "i2t": [("Describe the image.", words)],
        }
        draws = {} if task == "i2t" else {"timesteps": torch.zeros(count)}
        return [sample] * count, [texts[task]] * count, draws

    def _number_masked(self, timesteps):
        """MaskGIT's schedule: at timesteps [B] u, cos(u pi/2) of an image's tokens are masked, at
        least one -> [B], whole numbers as floats."""
        fraction = torch.cos(timesteps * math.pi * 0.5)  # [B]
        return (self.config.num_tokens * fraction).round().clamp(min=1)  # [B]

    def _mask_tokens(self, features, draws):
        """MaskGIT's corruption -> ids of image tokens, some of them the mask token, and labels,
        IGNORED where not masked: -> [B, N] for both.

        argsort(scores) is a random order of the numbers 0 .. N-1, and token i is masked where the
        i-th of them is less than the number to mask. So just that many tokens are masked, at random
        places. (The tokens with the lowest scores would be others, equally random ones; we follow
        the original, to mask what it masks.)
        """
        codes = torch.stack([feature["codes"] for feature in features]).cpu()
        tokens = codes + self.config.first_code  # [B, N]
        number = self._number_masked(draws["timesteps"])  # [B]
        masked = draws["scores"].argsort(-1) < number[:, None]  # [B, N]
        corrupted = tokens.masked_fill(masked, self.config.mask_token)  # [B, N]
        labels = tokens.masked_fill(~masked, IGNORED)  # [B, N]
        return corrupted, labels

    def _find_targets(self, prompts, shift=False):
        """Prompts on the CPU -> the prompts on the model's device without their padding, and the
        targets: [prompt, column, label] of each, three tensors of n numbers.

        shift: a label is predicted one column before its own (text), else in it (image tokens).
        The targets are found on the CPU, and everything goes to the device in one transfer, so that
        the host does not wait for the device here.
        """
        prompts = prompts.without_padding(self.config.pad)
        labels = prompts.labels
        if shift:
            labels = labels[:, 1:]
        prompt, column = (labels != IGNORED).nonzero(as_tuple=True)  # [n]
        label = labels[prompt, column]  # [n]

        fields = vars(prompts)
        fields, *targets = common.to_device([fields, prompt, column, label], self.device)
        return PromptBatch(**fields), targets

    def _loss_mask(self, prompts):
        """The attention mask of a loss: dense, or with --flex sparse, for a compiled kernel."""
        if self.flex:
            return prompts.block_mask()
        return prompts.dense_mask()

    def _cross_entropy(self, hidden, targets):
        """hidden [B, L, D] and targets of _find_targets -> the mean cross-entropy over all targets.

        Only columns with a target meet the output layer: its 58,498 columns at every position of a
        512 px prompt would be 0.4 GB in float32, of which about a third is used.
        """
        prompt, column, label = targets
        predicting = hidden[prompt, column]  # [n, D]
        head = self.showo.lm_head
        total = common.cross_entropy_sum(head, predicting, label, LABELS_AT_ONCE)
        return common.mean(total, len(label))

    # ==== 6. Inference ============================================================================

    def generate(self, prompts, num_steps=None, guidance_scale=None, seed=0, **settings):
        """Text to image: B texts -> PIL images, in one batch. num_steps, guidance_scale (1: none)
        and all other settings: see _sample; None: the config's."""
        texts = [common.plain(text, MARKERS) for text in prompts]
        batch = self._t2i_batch(texts, slots=self.config.max_prompt)
        return self._paint_images(
            batch, num_steps=num_steps, guidance_scale=guidance_scale, seed=seed, **settings)

    def reconstruct(self, images, *, templates=None, num_steps=None, guidance_scale=None, seed=0,
                    **settings):
        """Image to image, with the settings of generate: the RecA prompt with every token masked.
        (The original leaves this half finished.) templates: an instruction for each image, by
        default the seed template."""
        samples = [self.preprocess(image, "recon") for image in images]
        features = self.encode(samples, "recon")
        if templates is None:
            templates = [common.SEED_TEMPLATE] * len(images)
        batch = self._recon_batch(templates, features)
        return self._paint_images(
            batch, features, num_steps=num_steps, guidance_scale=guidance_scale, seed=seed,
            **settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, always the likeliest id: PIL images and one question -> answers. The
        prompt is that of i2t_loss. (The demo of the original's VQ variant has one more <eot> and a
        line break in it, which no training had.)"""
        samples = [self.preprocess(image, "i2t") for image in images]
        features = self.encode(samples, "i2t")
        ids = torch.tensor([self.i2t_prompt(question)] * len(images))  # [B, T]
        prompts = self._i2t_batch(ids, None, features)
        embeddings = self.understand(features)

        answers = []
        for answer in self._continue(prompts, embeddings, max_new_tokens).tolist():
            if self.config.eot in answer:
                answer = answer[:answer.index(self.config.eot)]
            words = [i for i in answer if i < self.config.llm_vocab_size]  # no markers, no codes
            answers.append(words)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def _continue(self, prompts, embeddings, max_new_tokens, stop=True):
        """Greedy continuation of prompts without padding -> int64 ids, at most max_new_tokens for
        each prompt, out of the whole vocabulary, as in the original. stop: end when every prompt
        has its <eot>. Keys and values of what was read are kept: only the new id is computed."""
        prompts = prompts.to(self.device)
        context = self.embed(prompts, embeddings)
        mask = prompts.dense_mask()
        positions = prompts.positions
        cache = DynamicCache()

        new_ids = []
        done = torch.zeros(len(prompts.ids), dtype=torch.bool, device=self.device)  # [B]
        while len(new_ids) < max_new_tokens and not (stop and done.all()):
            hidden = self.hidden_states(context, mask, positions, cache)
            chosen = self.showo.lm_head(hidden[:, -1]).argmax(-1)  # [B]
            new_ids.append(chosen)
            done |= chosen == self.config.eot

            # Next comes the chosen id alone, which sees what the last one saw, and itself.
            context = self.showo.model.embed_tokens(chosen[:, None])
            mask = F.pad(mask[:, -1:], (0, 1), value=True)
            positions = positions[-1:] + 1
        return torch.stack(new_ids, dim=1)

    @torch.no_grad()
    def _paint_images(self, prompts, features=None, **settings):
        """Prompts with all image tokens masked -> PIL images. features: of the images that are
        reconstructed."""
        embeddings = None
        if features is not None:
            embeddings = self.understand(features)
        codes = self._sample(prompts, embeddings, **settings)  # [B, N]
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.magvit.decode(codes).clamp(-1, 1)  # [B, 3, S, S]
        pixels = ((pixels + 1) / 2 * 255).to(torch.uint8)  # truncated, as in the original
        arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()  # [B, S, S, 3]
        return [Image.fromarray(array) for array in arrays]

    @torch.no_grad()
    def _sample(self, prompts, embeddings=None, num_steps=None, guidance_scale=None,
                temperature=None, seed=0, draws=None, progress=False, watch=None):
        """MaskGIT's sampler: prompts that end with <soi> N masked tokens <eoi> -> [B, N] codes.

        Each step draws all masked tokens at once, each from its own distribution, and masks those
        draws again of which the model is least certain, fewer from step to step.

        num_steps, guidance_scale, temperature: None: the config's
        seed        one for each image, or a number s: image i has seed s + i. An image depends on
                    its prompt and seed, not on its batch
        draws       instead of seed: "drawn_ids" (codes) and "gumbel_uniform", [num_steps, B, N]
        watch       called with (step, codes, probabilities), for tests

        Nothing in front of the last <soi> sees the tokens that are painted (in reconstruct text
        does see the embeddings). So it is computed once, and its keys and values are kept; each
        step computes the N + 2 columns of the painted image only.
        """
        config = self.config
        num_steps = config.num_steps if num_steps is None else num_steps
        temperature = config.temperature if temperature is None else temperature
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        # Guided logits are (1 + g) times those with the prompt minus g times those without it. The
        # original's scale is this g, which counts from 0.
        guidance = guidance_scale - 1
        batch = len(prompts.ids)
        rng = Rng.sampling(seed, batch)

        # What guidance moves away from: the prompt with an empty caption. It is padded to the same
        # length, so that its image tokens have the same positions. Both go through Phi together.
        if guidance != 0:
            slots = prompts.ids.shape[1] - config.num_tokens - 3  # without <t2i>, <soi> and <eoi>
            prompts = prompts.stack(self._t2i_batch([""] * batch, slots=slots))

        # Everything before the last <soi>, once.
        prompts = prompts.without_padding(config.pad).to(self.device)
        context = self.embed(prompts, embeddings)  # [B or 2B, L, D]
        mask = prompts.dense_mask()  # [B or 2B, L, L]
        soi = context.shape[1] - config.num_tokens - 2
        cache = DynamicCache()
        self.hidden_states(
            context[:, :soi], mask[:, :soi, :soi], prompts.positions[:soi], cache)

        masked_code = config.codebook_size  # one more than the last code: first_code + it is masked
        codes = torch.full((batch, config.num_tokens), masked_code, device=self.device)  # [B, N]
        for step in tqdm(range(num_steps), disable=not progress, leave=False):
            image = self.showo.model.embed_tokens(codes + config.first_code)  # [B, N, D]
            image = image.repeat(len(context) // batch, 1, 1)  # [B or 2B, N, D]
            image = torch.cat([context[:, soi:soi + 1], image, context[:, -1:]], dim=1)
            hidden = self.hidden_states(image, mask[:, soi:], prompts.positions[soi:], cache)
            cache.crop(-image.shape[1])  # forget the image, keep the text
            logits = self._code_logits(hidden[:, 1:-1])  # [B or 2B, N, K]
            if guidance != 0:
                logits = (1 + guidance) * logits[:batch] - guidance * logits[batch:]  # [B, N, K]
            probabilities = logits.softmax(-1)  # [B, N, K]
            if watch is not None:
                watch(step, codes, probabilities)

            if draws is None:
                drawn, noise = self._draw_codes(probabilities, rng)
            else:
                given = [draws["drawn_ids"][step], draws["gumbel_uniform"][step]]
                drawn, noise = common.to_device(given, self.device)
            masked = codes == masked_code  # [B, N]
            drawn = torch.where(masked, drawn, codes)  # [B, N]

            # The temperature falls as a *product* over the steps: of 50 steps, to 0.3 in the first
            # 10 and below 0.01 in 20. It looks unintended, but it is the sampler of the published
            # numbers.
            ratio = (step + 1) / num_steps
            temperature = temperature * (1 - ratio)
            certainty = self._certainty(probabilities, drawn, masked, noise, temperature)
            codes = self._mask_least_certain(drawn, certainty, masked, ratio)

        # The draws of the last step, which also has a code for the one token masked again.
        return drawn  # [B, N]

    def _code_logits(self, hidden):
        """hidden [B, N, D] -> [B, N, K], float32: the output layer's part for image codes."""
        head = self.showo.lm_head
        first = self.config.first_code
        last = self.config.mask_token
        return F.linear(hidden, head.weight[first:last], head.bias[first:last]).float()

    def _draw_codes(self, probabilities, rng):
        """A code for each token from probabilities [B, N, K], and a uniform number for each, the
        noise of its certainty: -> [B, N] for both."""
        uniform = rng.uniform(self.config.num_tokens, 1)  # [B, N, 1]
        noise = rng.uniform(self.config.num_tokens)  # [B, N]
        uniform, noise = common.to_device([uniform, noise], self.device)

        # A uniform number falls into one of the intervals that the cumulated probabilities make.
        # Scaled with their sum, which rounding may leave a little beside 1.
        cumulated = probabilities.cumsum(-1)  # [B, N, K]
        point = uniform * cumulated[..., -1:]  # [B, N, 1]
        drawn = torch.searchsorted(cumulated, point, right=True)[..., 0]  # [B, N]
        drawn = drawn.clamp(max=self.config.codebook_size - 1)  # [B, N]
        return drawn, noise

    def _certainty(self, probabilities, drawn, masked, noise, temperature):
        """log p(drawn code) + temperature * Gumbel noise; tokens that were known before count as
        certain -> [B, N]."""
        chosen = probabilities.gather(-1, drawn[..., None])[..., 0]  # [B, N]
        certainty = chosen.clamp(min=1e-20).log()  # [B, N]
        highest = math.log(torch.finfo(torch.float32).max)
        certainty = certainty.masked_fill(~masked, highest)  # [B, N]
        negative_gumbel = (-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()  # [B, N]
        return certainty - temperature * negative_gumbel  # [B, N]

    def _mask_least_certain(self, drawn, certainty, masked, ratio):
        """The draws with as many of them masked again as the schedule leaves after this part of the
        steps, ratio: N cos(ratio pi/2), at least one, fewer than before -> [B, N]."""
        config = self.config
        fraction = torch.cos(torch.tensor(ratio) * math.pi * 0.5)
        number = int((config.num_tokens * fraction).floor())
        fewer = masked.sum(-1, keepdim=True) - 1  # [B, 1]
        number = fewer.clamp(max=number).clamp(min=1)  # [B, 1]
        threshold = certainty.sort(-1).values.gather(1, number)  # [B, 1]
        return torch.where(certainty < threshold, config.codebook_size, drawn)  # [B, N]


# ==== 7. main() ===================================================================================


def flags(parser):
    """What only this architecture has."""
    group = parser.add_argument_group("Show-o only")
    group.add_argument(
        "--recon-trains-embeddings", action="store_true",
        help="CLIP variant: L_recon also trains mm_projector and the embedding table (recon_loss)")
    group.add_argument(
        "--flex", action="store_true", help="flex_attention instead of dense masks (GPU)")


def prepare(model, args):
    """Before training: what the flags set. Returns nothing more for the trainer."""
    if args.flex and model.device.type != "cuda":
        raise InputError("--flex needs a GPU: on a CPU flex_attention has no backward pass")

    # CLIP is frozen and may be rounded. MAGVIT-v2 may not: rounding would change its codes.
    if args.precision == "bf16" and model.device.type == "cuda" and model.config.w_clip_vit:
        model.clip.to(torch.bfloat16)
    model.train_embeddings_in_recon = args.recon_trains_embeddings
    model.flex = args.flex
    return {}


def main():
    common.run(Showo, common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags), prepare)


if __name__ == "__main__":
    common.cli(main)
