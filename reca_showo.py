"""RecA on Show-o: one language model that reads text and writes images as discrete tokens (MaskGIT).

What is special: an image is 256 (256 px) or 1024 (512 px) tokens out of a codebook of 8192, and these are further words
of Phi-1.5's vocabulary. The same weights predict text from left to right and fill in masked image tokens; only the
attention mask tells the two apart ("omni-attention"). So L_recon is a cross-entropy over the masked tokens, and
lambda_i2t = 1 keeps understanding alive, which shares every weight with generation (paper, section 2.2).

RecA, CLIP variant (512 px: N = 1024 image tokens, C = 576 CLIP rows, D = 2048):

    image [3,512,512] --+-- shrink to 336 -> CLIP (frozen) [C,1024] -> mm_projector [C,D] --+
                        |                                                                   v
                        |                                                    <mmu> <soi> CLIP rows <eoi> template
                        |                                                                   |
                        +-- MAGVIT-v2 (frozen) -> codes [N] -> some are masked -> <soi> image tokens <eoi>
                                                                                            |
              text is causal and sees the CLIP rows; image tokens see everything            v
              in front of them and each other                          Phi-1.5, all weights are trained [L,D]
                                                                                            |
                                          L_recon = cross-entropy over the vocabulary at the masked tokens only

RecA, VQ variant: without CLIP, an image is understood through the same 8192 codes that are written. Its own codes in
the prompt need only be copied: at full size the loss collapses to nearly zero and generation gets worse (paper, F.2).
The remedy is to show less: the codes of a smaller image (--und-size 256) or of a blurred one (--blur 8).

    python reca_showo.py --model tiny                                     toy world on a CPU, no download; also tiny-vq
    python reca_showo.py --data ./images --i2t-data llava.json --i2t-images ./llava        512 px, the paper's run
    python reca_showo.py --model showlab/show-o-w-clip-vit --data ./images ...             256 px
    python reca_showo.py --model showlab/show-o-512x512 --und-size 256 --data ./images ... the rows of the table in F.2:
                                                        --und-size 512 | 256 | 128, or --blur 8
    python reca_showo.py --model DIR --steps 0 --generate prompts.txt --out samples

Legend of the shape comments:
    B images     N image tokens     C CLIP rows     L positions of a prompt     D width of the language model
    V vocabulary: text, specials, K codes, mask token     S pixels per side     h w token grid     T ids of a text
"""
import dataclasses
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, PhiConfig, PhiForCausalLM

import common
from common import InputError, Rng

# ==== 1. Sizes and hyper-parameters ===================================================================

@dataclass
class ShowoConfig:
    """Sizes. The defaults are the released 512 px model with CLIP."""
    w_clip_vit: bool = True
    image_size: int = 512
    llm_vocab_size: int = 50295             # Phi's text tokenizer, padding to 50295 ids included
    eot: int = 50256                        # <|endoftext|>: begin and end of every text (Phi has only this one)
    codebook_bits: int = 13                 # 2^13 = 8192 codes
    # Phi-1.5. Show-o differs from the stock model by the LayerNorm on queries and keys, and by its vocabulary.
    hidden: int = 2048
    layers: int = 24
    heads: int = 32
    intermediate: int = 8192
    max_positions: int = 2048
    # CLIP ViT-L/14 at 336 px (unused in the VQ variant)
    clip_hidden: int = 1024
    clip_intermediate: int = 4096
    clip_layers: int = 24
    clip_heads: int = 16
    clip_image_size: int = 336
    clip_patch: int = 14
    # MAGVIT-v2: widths are vq_ch times a multiplier, one multiplier and one number of residual blocks per level
    vq_ch: int = 128
    vq_enc_mult: tuple = (1, 2, 2, 4, 4)
    vq_enc_res: tuple = (4, 3, 4, 3, 4)
    vq_dec_mult: tuple = (1, 1, 2, 2, 4)
    vq_dec_res: tuple = (4, 4, 3, 4, 3)
    # Slots of the prompts (section 4)
    recon_text: int = 128                   # CLIP variant: markers and template
    max_text: int = 576                     # text slots in training (381 in the VQ variant)
    max_prompt: int = 128                   # text slots in generation
    system_len: int = 28                    # ids of SYSTEM_PROMPT

    num_tokens = property(lambda self: (self.image_size // 16) ** 2)                        # N: MAGVIT-v2 has stride 16
    num_clip = property(lambda self: (self.clip_image_size // self.clip_patch) ** 2)        # C
    codebook_size = property(lambda self: 2 ** self.codebook_bits)                          # K
    # The vocabulary: text | [PAD] <soi> <eoi> <sov> <eov> <t2i> <mmu> <t2v> <v2v> <lvg> | K codes | mask token
    pad = property(lambda self: self.llm_vocab_size)
    soi = property(lambda self: self.llm_vocab_size + 1)                                    # start of image
    eoi = property(lambda self: self.llm_vocab_size + 2)                                    # end of image
    t2i = property(lambda self: self.llm_vocab_size + 5)                                    # task: text to image
    mmu = property(lambda self: self.llm_vocab_size + 6)                                    # task: understanding
    first_code = property(lambda self: self.llm_vocab_size + 10)
    mask_token = property(lambda self: self.first_code + self.codebook_size)
    vocab_size = property(lambda self: self.mask_token + 1)                                 # 58,498

TINY = ShowoConfig(
    image_size=64, codebook_bits=8, hidden=128, layers=3, heads=4, intermediate=288, max_positions=512,
    clip_hidden=96, clip_intermediate=128, clip_layers=3, clip_heads=4, clip_image_size=32, clip_patch=8,
    # GroupNorm has 32 groups, so widths are multiples of 32, and of 64 where an image of 16 pixels is
    # one number a channel: a group of one number has no variance.
    vq_ch=32, vq_enc_mult=(1, 1, 1, 2, 2), vq_enc_res=(0, 0, 0, 1, 1),
    vq_dec_mult=(1, 1, 1, 1, 2), vq_dec_res=(0, 0, 1, 1, 1),
    recon_text=32, max_text=96, max_prompt=48, system_len=0)
CONFIGS = {
    "showlab/show-o-w-clip-vit-512x512": ShowoConfig(),
    "showlab/show-o-w-clip-vit": ShowoConfig(image_size=256),
    "showlab/show-o-512x512": ShowoConfig(w_clip_vit=False, max_text=381),
    "showlab/show-o": ShowoConfig(w_clip_vit=False, image_size=256, max_text=381),
    "showo-512-reca": ShowoConfig(),  # what the authors' RecA has made of the first two
    "showo-256-reca": ShowoConfig(image_size=256),
    "tiny": TINY,
    "tiny-vq": dataclasses.replace(TINY, w_clip_vit=False),
}

@dataclass
class Recipe:
    """The paper's run (Table 8), the defaults at 512 px: 5000 steps of 10 images for each loss. The original makes an
    update of 5 micro-batches of 2 (256 px: 4) and counts updates, as we do. (It averages the means of its micro-batches; ours
    is the mean over all targets of the step.) Warm-up: 1000 updates. Its cosine ends at update 1,000,000 at 512 px (so
    it is constant), at 10,000 at 256 px (0.59 of the peak at the end). Nothing is clipped."""
    steps: int = 5000
    batch: int = 10
    accum: int = 1
    lr: float = 5e-7
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 1000
    horizon: int = 1_000_000
    clip: float = 0.0
    lambda_recon: float = 1.0
    lambda_i2t: float = 1.0
    lambda_t2i: float = 0.0
    guidance_scale: float = 5.0             # of GenEval and DPG-Bench
    sampling_steps: int = 50

RECIPE_TINY = Recipe(steps=200, batch=32, accum=1, lr=2e-4, warmup=20, horizon=0, clip=1.0, guidance_scale=1.0,
                     sampling_steps=8)
RECIPE_OF_SIZE = {512: Recipe(), 256: Recipe(batch=20, horizon=10_000), 64: RECIPE_TINY}
RECIPES = {name: RECIPE_OF_SIZE[c.image_size] for name, c in CONFIGS.items()}
DEFAULT = "showlab/show-o-w-clip-vit-512x512"

RECA = {"showo-512-reca": "sanaka87/Show-o-512x512-RecA", "showo-256-reca": "sanaka87/Show-o-RecA"}

SYSTEM_PROMPT = ("A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions.")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100                              # a label that is not predicted; among ids: the place of a CLIP row
MARKERS = ("<|endoftext|>",)                # what the user's words must not say: it ends a text
LABELS_AT_ONCE = 2048                       # that meet the output layer
TEXT_DROP = 0.1                             # training drops a caption with this probability: the unconditional prompt
TOKENIZER_SOURCE, CLIP_SOURCE, VQ_SOURCE = "microsoft/phi-1_5", "openai/clip-vit-large-patch14-336", "showlab/magvitv2"
WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin")       # in the original's order
WEIGHT_FILES = [
    *([name, f"{name}.index.json"] for name in WEIGHTS),
    ["*.safetensors", "*.bin", "*.pth"],
]
NEEDED = ("showo.model.embed_tokens.weight",)  # what only Show-o's has

# ==== 2. The model ====================================================================================
# Phi and CLIP are transformers' own classes: PhiForCausalLM with qk_layernorm=True is Show-o's language model exactly.
# The image tokenizer is made of diffusers' blocks, but is not its VQModel: there encoder and decoder share their widths
# and numbers of residual blocks, here each has its own lists of both, and the codebook is not learned.

def short_side_square(image, size):
    """Short side to `size` (bicubic), then the central square: the order of CLIP's own preprocessing."""
    # The long side grows with the short one: of a strip, no more than the middle is needed.
    middle = 3 * min(image.size)
    if max(image.size) > 16 * min(image.size):
        left = max(0, (image.width - middle) // 2)
        top = max(0, (image.height - middle) // 2)
        image = image.crop(
            (left, top, min(image.width, left + middle), min(image.height, top + middle))
        )
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height)).crop((left, top, left + size, top + size))


def clip_normalize(pixels):
    """[B, 3, S, S] in [-1, 1] -> with CLIP's own mean and deviation. (Filled, not copied to the device: nothing waits.)"""
    planes = []
    for plane, mean, std in zip(pixels.unbind(1), CLIP_MEAN, CLIP_STD):
        planes.append(((plane + 1) / 2 - mean) / std)
    return torch.stack(planes, dim=1)

class MagVit2(nn.Module):
    """The image tokenizer: 16 x 16 pixels become one of K codes; any multiple of 16 pixels works. No look-up: a code is
    the signs of `bits` numbers read as a binary number, the first channel being the most significant bit. The tables
    in `quantize` spell that out; checkpoints hold them."""

    def __init__(self, c):
        super().__init__()
        bits, last = c.codebook_bits, len(c.vq_enc_mult) - 1
        enc, dec = ([c.vq_ch * m for m in mult] for mult in (c.vq_enc_mult, c.vq_dec_mult))     # level 0: full size
        down = [DownEncoderBlock2D([c.vq_ch, *enc][i], enc[i], num_layers=c.vq_enc_res[i], add_downsample=i < last,
                                   downsample_padding=0) for i in range(last + 1)]
        up = [UpDecoderBlock2D([*dec, dec[-1]][i + 1], dec[i], num_layers=c.vq_dec_res[i], add_upsample=i > 0)
              for i in reversed(range(last + 1))]
        self.encoder = nn.Sequential(OrderedDict(                   # [B, 3, S, S] in [-1, 1] -> [B, bits, S/16, S/16]
            conv_in=nn.Conv2d(3, c.vq_ch, 3, padding=1), down_blocks=nn.Sequential(*down),
            mid_block=UNetMidBlock2D(enc[-1], None, attention_head_dim=enc[-1]),
            conv_norm_out=nn.GroupNorm(32, enc[-1], eps=1e-6), swish=nn.SiLU(),
            conv_out=nn.Conv2d(enc[-1], bits, 3, padding=1), quant_conv=nn.Conv2d(bits, bits, 1)))
        self.decoder = nn.Sequential(OrderedDict(                   # signs [B, bits, h, w] -> [B, 3, 16h, 16w]
            post_quant_conv=nn.Conv2d(bits, bits, 1), conv_in=nn.Conv2d(bits, dec[-1], 3, padding=1),
            mid_block=UNetMidBlock2D(dec[-1], None, attention_head_dim=dec[-1]), up_blocks=nn.Sequential(*up),
            conv_norm_out=nn.GroupNorm(32, dec[0], eps=1e-6), swish=nn.SiLU(),
            conv_out=nn.Conv2d(dec[0], 3, 3, padding=1)))
        self.quantize = nn.Module()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        signs = (torch.arange(2 ** bits)[:, None] & powers).bool().float() * 2 - 1
        self.quantize.register_buffer("power_vals", powers)                                             # [bits]
        self.quantize.register_buffer("embedding", signs)                                               # [K, bits]

    def codes(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> int64 [B, N], rows of the grid one after the other. A zero counts as negative."""
        few = max(1, 2 ** 19 // pixels[0, 0].numel())       # 2 of 512 px: the first layers of more would be the peak
        signs = torch.cat([self.encoder(some) > 0 for some in pixels.split(few)])
        bits = signs.flatten(2)                                                                         # [B, bits, N]
        return (bits * self.quantize.power_vals[:, None]).sum(1)

    def decode(self, codes):
        """int64 [B, N] (a square grid) -> pixels [B, 3, S, S], about [-1, 1], not clamped."""
        side = math.isqrt(codes.shape[1])
        return self.decoder(self.quantize.embedding[codes].transpose(1, 2).unflatten(2, (side, side)))

@dataclass
class Rows:
    """A batch of prompts and its mask. Every mask of Show-o is one statement: position q attends to the span first[q]
    .. last[q] (text: up to itself; image tokens: up to the end of their image) and to the `open` columns (the image
    that is understood), but never to the `hidden` ones (padding): 4 B L numbers instead of B L²."""
    ids: torch.Tensor           # [B, L] int64; IGNORED where a CLIP row is put in
    labels: torch.Tensor        # [B, L] int64; IGNORED where nothing is predicted
    first: torch.Tensor         # [B, L]
    last: torch.Tensor          # [B, L]
    open: torch.Tensor          # [B, L] bool
    hidden: torch.Tensor        # [B, L] bool
    positions: torch.Tensor     # [L], those of the full layout: rotary embeddings count padding, so it may be left out

    @classmethod
    def causal(cls, ids, pad):
        """B equally long lists of ids: each position sees itself and those before, but no text the padding in front."""
        ids = torch.tensor(ids)
        positions, front = torch.arange(ids.shape[1]), (ids == pad).cumprod(1).sum(1, keepdim=True)
        first, last = torch.where(positions >= front, front, 0), positions.expand_as(ids).clone()
        none = torch.zeros_like(ids, dtype=torch.bool)
        return cls(ids, torch.full_like(ids, IGNORED), first, last, none, none.clone(), positions)

    def map(self, function):
        return Rows(**{name: function(value) for name, value in vars(self).items()})

    def stack(self, other):
        """These rows, then those of `other` (same columns)."""
        both = {name: torch.cat([value, getattr(other, name)]) for name, value in vars(self).items()}
        return Rows(**both | {"positions": self.positions})

    def without_padding(self, pad):
        """Leave out the columns that are padding in every row. Exact: nothing looks at them, and `positions` stay."""
        keep = (self.ids != pad).any(0)
        return self.map(lambda value: value[..., keep])

    def allowed(self, b, q, k):
        """Does position q of row b attend to position k? Index tensors that broadcast."""
        span = (self.first[b, q] <= self.positions[k]) & (self.positions[k] <= self.last[b, q])
        return (span | self.open[b, k]) & ~self.hidden[b, k]

    def attention(self):
        """bool [B, L, L], True where row (query) q attends to column (key) k."""
        b, k = (torch.arange(n, device=self.ids.device) for n in self.ids.shape)
        return self.allowed(b[:, None, None], k[:, None], k)

    def block_mask(self):
        """The same for flex_attention, which skips the blocks of 128 x 128 in which nothing is allowed."""
        B, L = self.ids.shape
        return create_block_mask(lambda b, head, q, k: self.allowed(b, q, k), B, None, L, L, device=self.ids.device)

class Showo(nn.Module):
    """`showo` (Phi with image tokens in its vocabulary), `mm_projector` and `clip` (CLIP variant), `magvit`."""
    unquantized = ("showo.lm_head", "magvit.")

    def __init__(self, config, tokenizer=None):
        super().__init__()
        c = self.config = config
        self.tokenizer = tokenizer
        self.showo = PhiForCausalLM(PhiConfig(              # rotary embedding and LayerNorm: PhiConfig's own defaults
            vocab_size=c.vocab_size, hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=c.intermediate, max_position_embeddings=c.max_positions, qk_layernorm=True,
            # Phi's "gelu_new" is the same function in a dozen unfused operations, which keep their arrays for backward.
            hidden_act="gelu_pytorch_tanh", bos_token_id=c.eot, eos_token_id=c.eot, pad_token_id=None))
        if c.w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(c.clip_hidden, c.hidden), nn.GELU(),
                                              nn.Linear(c.hidden, c.hidden))
            self.clip = CLIPVisionModel(CLIPVisionConfig(
                hidden_size=c.clip_hidden, intermediate_size=c.clip_intermediate, num_hidden_layers=c.clip_layers,
                num_attention_heads=c.clip_heads, image_size=c.clip_image_size, patch_size=c.clip_patch))
        self.magvit = MagVit2(c)
        self.parts("magvit", "clip").requires_grad_(False)
        self.train_embeddings_in_recon = False       # see recon_loss
        self.flex = False                            # flex_attention in the losses: a sparse mask, compiled for GPUs
        self.set_und()

    def set_und(self, size=None, blur=None):
        """What the understanding side of RecA sees of an image (paper, F.2; see `shown`): size, pixels per side, and
        blur, a factor. VQ variant: half of the image unless given, or all of it if blurred. InputError: no fit."""
        c = self.config
        size = size or (c.clip_image_size if c.w_clip_vit else c.image_size if blur else c.image_size // 2)
        if c.w_clip_vit and size != c.clip_image_size:
            raise InputError(f"--und-size {size}: CLIP takes {c.clip_image_size} pixels only (VQ: multiples of 16)")
        if not c.w_clip_vit and (size % 16 or size > c.image_size):
            raise InputError(f"--und-size {size}: a multiple of 16, at most {c.image_size}, is needed")
        common.check_blur(blur, c.image_size)  # before training, not at the first image
        self.und_size, self.und_blur = size, blur

    def parts(self, *names):
        return nn.ModuleDict({name: getattr(self, name) for name in names if hasattr(self, name)})

    def trained(self):
        """The modules that are trained, which are those that a Show-o checkpoint holds."""
        return self.parts("showo", "mm_projector")

    def train(self, mode=True):
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
        """AdamW groups of all that is trained. The original means to exempt norms and embeddings from the decay, but
        misspells Phi's names: only biases are exempt. Followed; at a learning rate of 5e-7 it hardly matters."""
        trained = list(self.trained().named_parameters())
        return [{"params": [p for name, p in trained if "bias" not in name], "weight_decay": weight_decay},
                {"params": [p for name, p in trained if "bias" in name], "weight_decay": 0.0}]

    def preprocess(self, image, task, rng=None):
        """PIL RGB -> {"pixels": uint8 [3, S, S]}: the image stretched to a square (recon, t2i), or its central one (i2t;
        in the CLIP variant {"clip_pixels": uint8 [3, 336, 336]}). Nothing is random.
        ValueError for image=None: no text-only samples (the original leaves such LLaVA rows out, too)."""
        if image is None:
            raise ValueError("a conversation without an image")
        size = self.config.image_size
        if task != "i2t":
            return {"pixels": common.to_uint8(image.resize((size, size)))}
        if not self.config.w_clip_vit:
            return {"pixels": common.to_uint8(short_side_square(image, size))}
        return {"clip_pixels": common.to_uint8(short_side_square(image, self.config.clip_image_size))}

    @torch.no_grad()
    def encode(self, samples, task):
        """What the frozen parts say: samples of preprocess -> dicts of "codes", int64 [N] (recon, t2i), and "und", CLIP
        rows [C, width] or int64 codes (recon, i2t). Without autocast: rounding would change the signs of a code."""
        name, features = "clip_pixels" if "clip_pixels" in samples[0] else "pixels", {}
        pixels = torch.stack([common.normalize(sample[name].to(self.device)) for sample in samples])        # [B, 3, S, S]
        with torch.autocast(self.device.type, enabled=False):
            if task != "i2t":
                features["codes"] = self.magvit.codes(pixels)
            if task != "t2i":
                clip = self.config.w_clip_vit
                view = self.shown(pixels) if task == "recon" else clip_normalize(pixels) if clip else pixels
                features["und"] = self.clip_rows(view.to(self.clip.dtype)) if clip else self.magvit.codes(view)
        return [{k: v[i] for k, v in features.items()} for i in range(len(samples))]

    def shown(self, pixels):
        """[B, 3, S, S] -> what the understanding side of RecA sees of it, [B, 3, s, s].
        CLIP variant: 336 px, bilinear without antialiasing, in [-1, 1] as for the tokenizer; CLIP's own mean and
        deviation, which captioning applies, are forgotten. It looks like an oversight of the original, but the released
        weights were trained with it, so it is followed. VQ variant: `und_size` pixels (F.2: 512 collapses into copying,
        256 is the best trade, 128 is outside of what the model knows), or a blur: as many tokens, but no detail."""
        pixels = common.blur(pixels, self.und_blur) if self.und_blur else pixels
        return F.interpolate(pixels, self.und_size, mode="bilinear")

    def clip_rows(self, pixels):
        """[B, 3, 336, 336] -> [B, C, width]: the last layer but one, without the class token and the final norm."""
        x = self.clip.pre_layrnorm(self.clip.embeddings(pixels))
        for layer in self.clip.encoder.layers[:-1]:             # the last of the 24 layers is loaded but never needed
            x = layer(x, None)
        return x[:, 1:]

    def embed(self, rows, und=None):
        """Rows -> [B, L, D]; und (CLIP variant): CLIP rows [B, C, width], projected and put in place of IGNORED ids."""
        embeds = self.showo.model.embed_tokens(rows.ids.clamp(min=0))
        if und is None or not self.config.w_clip_vit:
            return embeds
        image = self.mm_projector(und.to(self.mm_projector[0].bias.dtype)).to(embeds.dtype)
        return embeds.masked_scatter((rows.ids == IGNORED)[..., None], image)

    def hidden(self, embeds, mask, positions, cache=None):
        """Through all layers and the final norm: [B, l, D] -> [B, l, D]. mask: [B, l, cached + l] or flex's."""
        self.showo.set_attn_implementation("sdpa" if torch.is_tensor(mask) else "flex_attention")
        mask = mask[:, None] if torch.is_tensor(mask) else mask
        return self.showo.model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions[None],
                                past_key_values=cache, use_cache=cache is not None).last_hidden_state

    # ==== 3. Loading and saving =======================================================================

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, quantize=None):
        """A model in eval mode with its tokenizer. source: a hub id (those in CONFIGS, sanaka87/Show-o-RecA,
        sanaka87/Show-o-512x512-RecA), a folder in that layout (config.json and pytorch_model.safetensors or .bin), or
        "tiny", "tiny-vq". Tokenizer, CLIP and MAGVIT-v2 come from the sub-folders that save_pretrained writes, else
        from the hub. dtype: of all but MAGVIT-v2, which stays float32. quantize: None or "int8", before anything is on
        the device. InputError for keys that do not fit."""
        if source in ("tiny", "tiny-vq"):
            source = common.tiny_folder(source.replace("tiny", "showo"))
        path = common.find_checkpoint(str(source), RECA, WEIGHT_FILES, ["config.json", "*unwrapped_model/config.json"],
                                      NEEDED)
        # A repository with nothing but the weights has the sizes of the name it goes by.
        folder, config = path.parent, CONFIGS.get(source)
        if config is None or (folder / "config.json").is_file():
            config = cls._read_config(folder)

        def part(name, hub, *patterns):
            return folder / name if (folder / name).is_dir() else common.hub_folder(hub, patterns)

        tokenizer = common.load_tokenizer(part("tokenizer", TOKENIZER_SOURCE, "*.json", "*.txt"))
        with torch.device("meta"):                          # no time for random weights
            model = cls(config, tokenizer)
        model.to_empty(device="cpu")
        common.load_strictly(model.trained(), common.load_state(path), str(source))
        state = common.find_weights(part("magvitv2", VQ_SOURCE, "*.safetensors", "*.bin"), *WEIGHTS)
        common.load_strictly(model.magvit, common.autoencoder_from_original(model.magvit, state), "MAGVIT-v2")
        if config.w_clip_vit:
            state = common.find_weights(part("clip", CLIP_SOURCE, "*.safetensors", "*.bin"), *WEIGHTS)
            common.load_strictly(model.clip, clip_keys(state), "CLIP")
            # Buffers that no checkpoint holds, here and below.
            model.clip.embeddings.position_ids.copy_(torch.arange(config.num_clip + 1))
        common.quantize(model, quantize).to(device).parts("showo", "mm_projector", "clip").to(dtype)
        # After the cast: rounded rotary frequencies would turn tokens wrongly.
        model.showo.model.rotary_emb = type(model.showo.model.rotary_emb)(model.showo.config).to(device)
        return model.eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """A key of CONFIGS -> a model of these sizes: random weights, a word-level tokenizer. Downloads nothing."""
        if name not in CONFIGS:
            raise InputError(f"no sizes known for {name}: choose one of {', '.join(CONFIGS)}")
        tokenizer, config = common.tiny_tokenizer(("<|endoftext|>",)), CONFIGS[name]
        if name in common.TOYS:
            eot = tokenizer.convert_tokens_to_ids("<|endoftext|>")
            config = dataclasses.replace(config, llm_vocab_size=len(tokenizer), eot=eot)
        with torch.device(device):
            return cls(config, tokenizer)

    @staticmethod
    def _read_config(folder):
        """config.json as released; "sizes" is ours and missing in released files, whose sizes are all the same."""
        given = common.read_object(folder / "config.json")
        try:
            clip, side = bool(given["w_clip_vit"]), math.isqrt(given["num_vq_tokens"])
            config = ShowoConfig(w_clip_vit=clip, image_size=16 * side, llm_vocab_size=given["llm_vocab_size"],
                                 max_text=576 if clip else 381)
            config = dataclasses.replace(config, **given.get("sizes", {}))
            expected, found = config.vocab_size, given["vocab_size"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} is not the config of a Show-o checkpoint ({error})") from error
        if found != expected:
            raise InputError(f"{folder / 'config.json'}: vocab_size is {found}, expected {expected}")
        return config

    def save_pretrained(self, folder):
        """The released layout (the original repository reads it); tokenizer, CLIP and MAGVIT-v2 in sub-folders."""
        folder, c = Path(folder), self.config
        theirs = {"_class_name": "Showo", "w_clip_vit": c.w_clip_vit, "load_from_showo": True,
                  "vocab_size": c.vocab_size, "llm_vocab_size": c.llm_vocab_size, "mask_token_id": c.mask_token,
                  "codebook_size": c.codebook_size, "num_vq_tokens": c.num_tokens, "llm_model_path": TOKENIZER_SOURCE}
        sizes = {k: v for k, v in dataclasses.asdict(c).items() if k not in (*theirs, "image_size")}
        write_weights(folder, self.trained().state_dict(), {**theirs, "sizes": sizes})
        write_weights(folder / "magvitv2", common.autoencoder_to_original(self.magvit), {"_class_name": "MAGVITv2"})
        if c.w_clip_vit:
            state = {f"vision_model.{k}": v for k, v in self.clip.state_dict().items()}
            write_weights(folder / "clip", state, self.clip.config.to_dict(), "model.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")

    # ==== 4. The embedding-conditioned prompt =========================================================
    # Five layouts, each from lists of ids:
    #   RecA, CLIP     <mmu> <soi> C CLIP rows <eoi> <eot> template <eot> pads   <soi> N tokens <eoi>
    #   RecA, VQ       pads <mmu> <soi> codes of the small image <eoi> <eot> template <eot>   <soi> N tokens <eoi>
    #   t2i            pads <t2i> <eot> caption <eot>   <soi> N tokens <eoi>
    #   i2t, CLIP      <mmu> system prompt <soi> C CLIP rows <eoi> USER: ... ASSISTANT: ... <eot>   pads
    #   i2t, VQ        <mmu> <soi> N codes <eoi> USER: ... ASSISTANT: ... <eot>   pads
    # tokens, labels: [B, N] as _mask_tokens gives them, or nothing for sampling: every token masked, no label.

    def _recon_rows(self, texts, und, tokens=None, labels=None):
        """The RecA prompt of B texts. und: as in encode; of CLIP rows only the number matters here (see embed).
        CLIP variant: the CLIP rows are open to every position, also to those before them. Text is causal; the N image
        tokens see everything in front of them and each other, but not the closing <eoi>. Nobody sees the padding, but
        the positions of the image tokens count it. VQ variant: each image sees itself and everything before it."""
        c, texts = self.config, [self._bracket(text) for text in texts]
        room = c.recon_text - 3 if c.w_clip_vit else c.max_text             # CLIP variant: markers share the slots
        longest = max(map(len, texts))
        if longest > room:
            raise InputError(f"a template takes {longest} tokens, the RecA prompt has room for {room}: shorten it")
        heads = [[c.mmu, c.soi, *image, c.eoi, *text] for image, text in zip(self._image_ids(und), texts)]
        pads = [[c.pad] * (room - len(text)) for text in texts]
        rows = self._with_image([h + p if c.w_clip_vit else p + h for h, p in zip(heads, pads)], tokens, labels)
        end = rows.ids.shape[1] - 1                                         # the closing <eoi>
        if c.w_clip_vit:
            rows.open, rows.hidden = rows.ids == IGNORED, rows.ids == c.pad
            rows.last[:, end - c.num_tokens:end] = end - 1
        else:
            front = rows.first[:, -1:]                                      # <mmu> stands here, then <soi> codes <eoi>
            given_end = front + 2 + und.shape[1]
            given = (rows.positions > front) & (rows.positions <= given_end)
            rows.last = torch.where(given, given_end, rows.last)
            rows.last[:, end - c.num_tokens - 1:] = end
        return rows

    def _t2i_rows(self, texts, tokens=None, labels=None, slots=None):
        """The text-to-image prompt of B texts, cut to `slots` ids and closed with <eot> if longer. Text is causal;
        <soi>, image tokens and <eoi> see all of the text and each other. In training the two markers are labelled with
        themselves, as in the original: two easy targets for each image."""
        c, slots = self.config, (slots or self.config.max_text) + 1
        heads = [[c.t2i, *self._bracket(text)] for text in texts]
        heads = [head if len(head) <= slots else head[:slots - 1] + [c.eot] for head in heads]
        rows = self._with_image([[c.pad] * (slots - len(head)) + head for head in heads], tokens, labels)
        rows.last[:, slots:] = rows.ids.shape[1] - 1
        if labels is not None:
            rows.labels[:, [slots, -1]] = rows.ids[:, [slots, -1]]
        return rows

    def _i2t_rows(self, ids, labels, und, system=()):
        """The captioning prompt: ids and labels [B, T], padded on the right; und as in encode; ids of a system prompt.
        Causal, only the image is open to every position (in the VQ variant with all that stands before it)."""
        c = self.config
        rows = Rows.causal([[c.mmu, *system, c.soi, *image, c.eoi, *text]
                            for image, text in zip(self._image_ids(und), ids.tolist())], c.pad)
        rows.labels[:, -ids.shape[1]:] = labels
        if c.w_clip_vit:
            rows.open = rows.ids == IGNORED
        else:
            rows.open[:, :-ids.shape[1]] = True
        return rows

    def _bracket(self, ids):
        """<eot> in front of a text (unless it is there) and behind it."""
        eot = self.config.eot
        return [*ids, eot] if ids[:1] == [eot] else [eot, *ids, eot]

    def _image_ids(self, und):
        """What stands for the given images: places for CLIP rows, or their codes."""
        c = self.config
        return [[IGNORED] * c.num_clip] * len(und) if c.w_clip_vit else (und + c.first_code).tolist()

    def _with_image(self, heads, tokens, labels):
        """B equally long lists of ids, the image behind them."""
        c = self.config
        tokens = [[c.mask_token] * c.num_tokens] * len(heads) if tokens is None else tokens.tolist()
        rows = Rows.causal([[*head, c.soi, *image, c.eoi] for head, image in zip(heads, tokens)], c.pad)
        if labels is not None:
            rows.labels[:, -c.num_tokens - 1:-1] = labels
        return rows

    def _text_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _recon_text(self, template):
        return self._text_ids(f"USER: \n {template} ASSISTANT:")

    def _system_ids(self):
        return self._text_ids(SYSTEM_PROMPT) if self.config.w_clip_vit and self.config.system_len else []

    def _conversations(self, conversations):
        """B lists [(question, answer), ...] -> ids, labels [B, T]: "USER: q ASSISTANT: a<|endoftext|>USER: ...". The
        answers and their ends are labels. Cut to the recipe's room, padded on the right to the longest (the original:
        to all of the room, 996 slots at 512 px, which no position looks at)."""
        c, all_ids, all_labels = self.config, [], []
        # CLIP variant: the original makes a captioning row as long as a t2i row, so that both share a batch.
        room = c.max_text - (c.num_clip - c.num_tokens) - c.system_len if c.w_clip_vit else c.max_text
        for turns in conversations:
            ids, labels = [], []
            for question, answer in turns:
                asked = self._text_ids(
                    f"USER: {common.plain(question, MARKERS).strip()} ASSISTANT:"
                )
                said = self._text_ids(f" {common.plain(answer, MARKERS).strip()}") + [c.eot]
                ids, labels = ids + asked + said, labels + [IGNORED] * len(asked) + said
            all_ids.append(torch.tensor(ids[:room]))
            all_labels.append(torch.tensor(labels[:room]))
        return pad_sequence(all_ids, True, c.pad), pad_sequence(all_labels, True, IGNORED)

    # ==== 5. The losses ===============================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA: the masked tokens of an image from its own understanding embeddings (paper, equation 2).

        features: B dicts of encode, templates: B instructions (in the original's VQ variant one per
        batch) -> scalar, the mean over all masked tokens, so that an image with more of them weighs
        more. draws: see draw.

        CLIP variant: the original builds the inputs of this pass without autograd, so that
        mm_projector and embedding table learn from L_i2t alone. Meant or not, the released weights
        were made so, and it is followed unless `train_embeddings_in_recon` is set. In the VQ variant
        the table does learn.
        """
        draws = draws or self.draw("recon", features, rng)
        texts = [self._recon_text(template) for template in templates]
        und = torch.stack([f["und"] for f in features])
        rows = self._recon_rows(texts, und, *self._mask_tokens(features, draws))
        return self._cross_entropy(rows, und, detach=self.config.w_clip_vit and not self.train_embeddings_in_recon)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image: the masked tokens of an image behind its caption -> the mean over all targets. For supervised
        fine-tuning; in RecA itself lambda_t2i = 0."""
        draws = draws or self.draw("t2i", features, rng)
        drop = draws["text_drop"] < TEXT_DROP
        texts = [[] if dropped else self._text_ids(caption) for caption, dropped in zip(captions, drop)]
        return self._cross_entropy(self._t2i_rows(texts, *self._mask_tokens(features, draws)))

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text, which keeps understanding alive: cross-entropy of the answers in B conversations, lists of
        (question, answer), about an image each -> scalar, the mean over all answer tokens. Nothing is drawn."""
        und = torch.stack([f["und"] for f in features])
        rows = self._i2t_rows(*self._conversations(conversations), und, self._system_ids())
        return self._cross_entropy(rows, und, shift=True)

    def draw(self, task, features, rng=None):
        """The random numbers of a loss, all uniform: "timesteps" [B], "scores" [B, N], "text_drop" [B] (t2i only)."""
        if task == "i2t":
            return {}
        rng = rng or Rng.fresh(len(features))
        return {"timesteps": rng.uniform(), "scores": rng.uniform(self.config.num_tokens), "text_drop": rng.uniform()}

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: masked tokens (t2i: and two markers an image), or tokens of answers."""
        if task == "i2t":
            return int((self._conversations(texts)[1] != IGNORED).sum())
        masked = int(self._number_masked(draws["timesteps"]).sum())
        return masked + 2 * len(features) * (task == "t2i")

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: every token is masked, and
        texts are as long as they may be."""
        size, words = self.config.image_size, "word " * 1200
        name = "clip_pixels" if task == "i2t" and self.config.w_clip_vit else "pixels"
        size = self.config.clip_image_size if name == "clip_pixels" else size
        samples = [{name: torch.zeros(3, size, size, dtype=torch.uint8)}] * count
        texts = {"recon": max(common.templates(), key=len), "t2i": words, "i2t": [("Describe the image.", words)]}
        return samples, [texts[task]] * count, {} if task == "i2t" else {"timesteps": torch.zeros(count)}

    def _number_masked(self, timesteps):
        """MaskGIT: at timestep u [B] a share cos(u pi/2) of an image is masked, at least one token -> [B], floats."""
        return (self.config.num_tokens * torch.cos(timesteps * math.pi * 0.5)).round().clamp(min=1)

    def _mask_tokens(self, features, draws):
        """MaskGIT's corruption -> ids [B, N], some of them the mask token, and labels [B, N], IGNORED where not masked.
        The masked are the first ones in the order of argsort(scores)."""
        tokens = torch.stack([f["codes"] for f in features]).cpu() + self.config.first_code
        number = self._number_masked(draws["timesteps"])
        masked = draws["scores"].argsort(-1) < number[:, None]
        return tokens.masked_fill(masked, self.config.mask_token), tokens.masked_fill(~masked, IGNORED)

    def _cross_entropy(self, rows, und=None, shift=False, detach=False):
        """Mean cross-entropy over the labels. shift: a label is predicted one position before its own. detach: no
        gradient into the inputs. Only positions with a label meet the output layer: its 58,498 columns at every
        position of a 512 px prompt would be 0.4 GB in float32, of which about a third is used."""
        rows = rows.without_padding(self.config.pad)
        labels = rows.labels[:, 1:] if shift else rows.labels
        row, column = (labels != IGNORED).nonzero(as_tuple=True)                         # [n] each, found on the CPU
        target = labels[row, column]
        count = len(target)
        fields, row, column, target = common.to_device([vars(rows), row, column, target], self.device)
        rows = Rows(**fields)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
            embeds = self.embed(rows, und)
        hidden = self.hidden(embeds, rows.block_mask() if self.flex else rows.attention(), rows.positions)
        read = hidden[row, column]                                                       # [n, D]
        return common.mean(common.cross_entropy_sum(self.showo.lm_head, read, target, LABELS_AT_ONCE), count)

    # ==== 6. Inference ================================================================================

    def generate(self, prompts, **settings):
        """Text to image: prompts -> PIL images, in one batch. settings: see _sample."""
        prompts = [common.plain(prompt, MARKERS) for prompt in prompts]
        rows = self._t2i_rows([self._text_ids(prompt) for prompt in prompts], slots=self.config.max_prompt)
        return self._paint_images(rows, **settings)

    def reconstruct(self, images, *, templates=None, **settings):
        """Image to image, as generate: the RecA prompt with every token masked (the original leaves this half
        finished). templates: one instruction an image, by default the seed template."""
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        und = torch.stack([f["und"] for f in features])
        texts = [self._recon_text(template) for template in templates or [common.SEED_TEMPLATE] * len(images)]
        return self._paint_images(self._recon_rows(texts, und), und, **settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, greedy: PIL images and one question -> answers. The prompt is that of i2t_loss. (The demo of
        the original's VQ variant has one more <eot> and a line break, which no training had.)"""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        und = torch.stack([f["und"] for f in features])
        ids = torch.tensor(
            [self._text_ids(f"USER: {common.plain(question, MARKERS)} ASSISTANT:")] * len(images)
        )
        rows = self._i2t_rows(ids, torch.full_like(ids, IGNORED), und, self._system_ids())
        eot, answers = self.config.eot, self._continue(rows, und, max_new_tokens).tolist()
        answers = [answer[:answer.index(eot)] if eot in answer else answer for answer in answers]
        answers = [[i for i in answer if i < self.config.llm_vocab_size] for answer in answers]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    @torch.no_grad()
    def _continue(self, rows, und, max_new_tokens, stop=True):
        """Greedy continuation of prompts without padding, with a KV cache -> ids int64 [B, <= max_new_tokens], out of
        the whole vocabulary, as in the original. stop: end when every row has said <eot>."""
        rows = rows.map(lambda value: value.to(self.device))
        embeds, mask, positions, cache = self.embed(rows, und), rows.attention(), rows.positions, DynamicCache()
        new, done = [], torch.zeros(len(rows.ids), dtype=torch.bool, device=self.device)
        while len(new) < max_new_tokens and not (stop and done.all()):
            hidden = self.hidden(embeds, mask, positions, cache)
            new.append(self.showo.lm_head(hidden[:, -1]).argmax(-1))
            done |= new[-1] == self.config.eot
            embeds = self.showo.model.embed_tokens(new[-1][:, None])
            mask, positions = F.pad(mask[:, -1:], (0, 1), value=True), positions[-1:] + 1       # the last row sees all
        return torch.stack(new, 1)

    @torch.no_grad()
    def _paint_images(self, rows, und=None, **settings):
        """Prompts with all image tokens masked -> PIL images. [-1, 1] is truncated to 0..255, as in the original."""
        codes = self._sample(rows, und, **settings)
        with torch.autocast(self.device.type, enabled=False):
            pixels = (self.magvit.decode(codes).clamp(-1, 1) + 1) / 2 * 255                        # [B, 3, S, S]
        return [Image.fromarray(p) for p in pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def _sample(self, rows, und=None, num_steps=50, guidance_scale=5.0, temperature=1.0, seed=0, draws=None,
                progress=False, watch=None):
        """MaskGIT sampling: Rows that end with <soi> N masked tokens <eoi> -> codes int64 [B, N]. Every step draws the
        masked tokens from their guided distributions, then masks the least certain draws again.
        guidance_scale  g: logits (1 + g) with prompt - g without; 0: none. The defaults are the published benchmarks'
        seed            one for each image, or a number s: image i has seed s + i. An image does not depend on its batch
        draws           instead of seed: "drawn_ids" (codes) and "gumbel_uniform", both [num_steps, B, N]
        watch           called with (step, tokens, probabilities), for tests
        Unguided rows are the empty text-to-image prompt, moved so that its image tokens have the same positions (rotary
        embeddings are relative). Text never sees the image, so what stands in front of <soi> is computed once and its
        keys and values are kept; each step runs only the N + 2 positions of the image, all rows in one batch."""
        c, batch, rng = self.config, len(rows.ids), Rng.sampling(seed, len(rows.ids))
        if guidance_scale > 0:
            rows = rows.stack(self._t2i_rows([[]] * batch, slots=rows.ids.shape[1] - c.num_tokens - 3))
        rows = rows.without_padding(c.pad).map(lambda value: value.to(self.device))
        embeds = self.embed(rows, und)                                                              # [B or 2B, L, D]
        mask, cache = rows.attention(), DynamicCache()                                              # [B or 2B, L, L]
        front = rows.ids.shape[1] - c.num_tokens - 2
        self.hidden(embeds[:, :front], mask[:, :front, :front], rows.positions[:front], cache)
        weight, bias = (p[c.first_code:c.mask_token] for p in (self.showo.lm_head.weight, self.showo.lm_head.bias))

        tokens = torch.full((batch, c.num_tokens), c.codebook_size, device=self.device)         # codes; K = masked
        for step in tqdm(range(num_steps), disable=not progress, leave=False):
            image = self.showo.model.embed_tokens(tokens + c.first_code).repeat(len(embeds) // batch, 1, 1)
            image = torch.cat([embeds[:, front:front + 1], image, embeds[:, -1:]], 1)           # [B or 2B, N + 2, D]
            hidden = self.hidden(image, mask[:, front:], rows.positions[front:], cache)[:, 1:-1]
            cache.crop(-image.shape[1])                                                         # forget the image again
            logits = F.linear(hidden, weight, bias).float()                                     # [B or 2B, N, K]
            if guidance_scale > 0:
                logits = (1 + guidance_scale) * logits[:batch] - guidance_scale * logits[batch:]
            probs = logits.softmax(-1)
            if draws:
                drawn, noise = draws["drawn_ids"][step].to(self.device), draws["gumbel_uniform"][step].to(self.device)
            else:                                   # one uniform number per token picks from the cumulated distribution
                total = probs.cumsum(-1)
                pick = rng.uniform(c.num_tokens, 1).to(self.device) * total[..., -1:]
                drawn = torch.searchsorted(total, pick, right=True)[..., 0].clamp(max=c.codebook_size - 1)
                noise = rng.uniform(c.num_tokens).to(self.device)
            if watch:
                watch(step, tokens, probs)
            masked = tokens == c.codebook_size
            drawn = torch.where(masked, drawn, tokens)
            ratio = (step + 1) / num_steps      # how many stay masked: a cosine of N, at least one, fewer than now
            keep = (c.num_tokens * torch.cos(torch.tensor(ratio) * math.pi * 0.5)).floor().long().to(self.device)
            keep = torch.minimum(masked.sum(-1, keepdim=True) - 1, keep).clamp(min=1)
            # Certainty: log probability plus Gumbel noise, whose temperature falls as a *product* over the steps (to
            # nearly nothing in a few): it looks unintended, but it is the sampler of the published numbers.
            temperature *= 1 - ratio
            sure = probs.gather(-1, drawn[..., None])[..., 0].clamp(min=1e-20).log()
            sure = sure.masked_fill(~masked, math.log(torch.finfo(torch.float32).max))      # known tokens stay known
            sure = sure - temperature * (-noise.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            threshold = sure.sort(-1).values.gather(1, keep)
            tokens = torch.where(sure < threshold, c.codebook_size, drawn)
        return drawn                        # the draws of the last step: also the one token that would be masked again

# ==== 3, continued: files, sizes, names ===============================================================

def write_weights(folder, state, config, name=WEIGHTS[0]):
    common.write(folder / "config.json", config)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / name, metadata={"format": "pt"})

def clip_keys(state):
    """A CLIP checkpoint -> the names of transformers 5, without the prefix `vision_model.`; without the text half and
    the position numbers that the hub's file holds as well."""
    if any(k.startswith("vision_model.") for k in state):
        state = {k.removeprefix("vision_model."): v for k, v in state.items() if k.startswith("vision_model.")}
    return {k: v for k, v in state.items() if not k.endswith("position_ids")}

# ==== 7. main() =======================================================================================

def flags(parser):
    """What only this architecture has."""
    group = parser.add_argument_group("Show-o only")
    group.add_argument("--recon-trains-embeddings", action="store_true",
                       help="CLIP variant: L_recon also trains mm_projector and the embedding table (see recon_loss)")
    group.add_argument("--flex", action="store_true", help="flex_attention instead of dense masks (GPU)")

def prepare(model, args):
    """Before training: what the flags set."""
    if args.flex and model.device.type != "cuda":
        raise InputError("--flex needs a GPU: on a CPU flex_attention has no backward pass")
    if args.precision == "bf16" and model.device.type == "cuda" and model.config.w_clip_vit:
        model.clip.to(torch.bfloat16)           # frozen; MAGVIT-v2 stays float32: rounding would change its codes
    model.train_embeddings_in_recon = args.recon_trains_embeddings
    model.flex = args.flex
    return {}

def main():
    common.run(Showo, common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags), prepare)

if __name__ == "__main__":
    common.cli(main)
