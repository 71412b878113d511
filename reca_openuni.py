"""RecA for OpenUni: a frozen multimodal LLM, learnable queries, a flow-matching image generator.

OpenUni (arXiv 2505.23661) joins two finished models. InternVL3 understands; SANA generates. Between them stand 256
learnable vectors, the *queries*: they are appended to any prompt, run through the frozen language model, and what comes
out in their places is, after a small transformer (the connector) and one linear layer (the projector), the "text" that
SANA is conditioned on. RecA (arXiv 2509.07295) puts the image's own understanding embeddings into the prompt and trains
everything to the right of the language model to draw that image again:

    image 512px ──resize 448──> InternViT ──2x2 shuffle, mlp1──> und [256, D]                             (frozen)
      │                                                           │
      │      <|im_start|>user\\n<img> und </img>\\n{template}<|im_end|>\\n<|im_start|>assistant\\n<img>   prompt [L, D]
      │                                        │
      │                    Qwen2.5, no graph:  keys and values of the prompt                             (frozen)
      │                                        │
      │      queries [256, D] ──────> Qwen2.5, with graph, queries only ──> [256, D]                   (queries trained)
      │                                        │
      │                    connector (6 layers) ──> projector ──> condition [256, 2304]                  (trained)
      │                                                              │
      └──DC-AE, stride 32──> latents x [32,16,16] ──> (1-σ) x + σ ε ──> SANA ──> velocity v              (trained)

    L_recon = mean (v - (ε - x))²,    σ uniform on {0.001, ..., 1}

What is special here: the whole understanding model is frozen (λ_i2t = 0) and attention is causal, so nothing in front
of the queries can depend on anything trained. The prompt runs once without a graph and leaves only its keys and values;
the backward pass touches the 256 queries and never the ~290 prompt tokens or any weight of the language model.

    python reca_openuni.py --data ./images                              RecA as published on B-512 (1.6B parameters)
    python reca_openuni.py --data ./images --model openuni-l-512        L-512 (3.6B parameters)
    python reca_openuni.py --model tiny                                 no downloads, CPU, minutes

Legend of the shape comments: B images, S pixels a side, D width of the language model, L prompt tokens, Q queries,
N image tokens, C latent channels, h x w latent grid (S / 32), T condition channels of SANA.
"""
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import common
from common import InputError, Rng

# ======================================================================================================
# 1. Sizes and hyper-parameters
# ======================================================================================================


@dataclass
class OpenUniConfig:
    """Sizes of all parts. The four dicts are keyword arguments of the library classes, in the form of their
    config.json."""
    lmm: dict                                  # transformers.InternVLConfig
    sana: dict                                 # diffusers.SanaTransformer2DModel
    vae: dict                                  # diffusers.AutoencoderDC
    scheduler: dict                            # diffusers.DPMSolverMultistepScheduler, for sampling
    connector_layers: int = 6
    connector_heads: int = 14
    connector_intermediate: int = 3072
    num_queries: int = 256
    image_size: int = 512                      # S: what is encoded, generated and shown
    max_caption_tokens: int = 128              # t2i prompts as a whole, as in the original datasets
    bases: dict = field(default_factory=dict)  # where frozen parts come from: {"lmm": hub id, "sana": ..., "vae": ...}


def internvl3(width, layers, heads, kv_heads, intermediate):
    """Keyword arguments of InternVLConfig for InternVL3: InternViT-300M at 448 px and a Qwen2.5 language model.

    The vocabulary is 151674 and the output head a matrix of its own (not tied). The published configuration asks for
    "dynamic" rotary scaling by 2: it acts only beyond 32768 positions, and no prompt here reaches 1000, so it is left
    out.
    """
    return dict(
        image_token_id=151667, image_seq_length=256, downsample_ratio=0.5, tie_word_embeddings=False,
        vision_config=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                           image_size=[448, 448], patch_size=[14, 14], attention_bias=True, use_qk_norm=False),
        text_config=dict(model_type="qwen2", vocab_size=151674, hidden_size=width, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=intermediate,
                         rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32768,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}))


def dc_ae(channels=(128, 256, 512, 512, 1024, 1024), head_dim=32, encoder_layers=(2, 2, 2, 3, 3, 3),
          decoder_layers=(3, 3, 3, 3, 3, 3), latent_channels=32, scaling_factor=0.41407, residual_levels=3):
    """Keyword arguments of AutoencoderDC, by default those of DC-AE f32c32 for SANA: residual blocks in the finer
    levels, linear attention in the coarser ones, a stride of 2 between neighbours (so 2**5 = 32 for six widths)."""
    coarse = len(channels) - residual_levels
    kinds = ["ResBlock"] * residual_levels + ["EfficientViTBlock"] * coarse
    scales = [[]] * residual_levels + [[5]] * coarse
    return dict(
        latent_channels=latent_channels, attention_head_dim=head_dim, scaling_factor=scaling_factor,
        encoder_block_types=kinds, encoder_qkv_multiscales=scales, downsample_block_type="Conv",
        encoder_block_out_channels=list(channels), encoder_layers_per_block=list(encoder_layers),
        decoder_block_types=kinds, decoder_qkv_multiscales=scales, upsample_block_type="interpolate",
        decoder_block_out_channels=list(channels), decoder_layers_per_block=list(decoder_layers),
        decoder_norm_types="rms_norm", decoder_act_fns="silu")


def sana(heads, layers, cross_heads, cross_head_dim, head_dim=32, channels=32, caption_channels=2304, sample_size=16,
         mlp_ratio=2.5, qk_norm=None):
    """Keyword arguments of SanaTransformer2DModel. SANA has no position embedding: its 3x3 convolutions tell places
    apart."""
    return dict(in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=head_dim,
                num_layers=layers, num_cross_attention_heads=cross_heads, cross_attention_head_dim=cross_head_dim,
                cross_attention_dim=cross_heads * cross_head_dim, caption_channels=caption_channels,
                mlp_ratio=mlp_ratio, sample_size=sample_size, patch_size=1, qk_norm=qk_norm)


# The sampler of the released SANA folders: DPM-Solver++(2M) on flow-matching noise levels, shifted towards noise by 3.
#
# Training uses shift 1, and that is an accident that everybody must keep. The original builds its *training*
# scheduler, of another class, from this same file; that class calls the shift "shift" and not "flow_shift", finds
# nothing, and takes its default of 1. All released weights were trained so. Section 5 therefore draws σ without a
# shift.
SCHEDULER = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
                 prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero",
                 lower_order_final=True, num_train_timesteps=1000)

_B = dict(connector_layers=6, connector_heads=14, connector_intermediate=3072)
_L = dict(connector_layers=6, connector_heads=24, connector_intermediate=8960)
_1B, _2B = internvl3(896, 24, 14, 2, 4864), internvl3(1536, 28, 12, 2, 8960)


def _bases(lmm, sana):
    return {"lmm": f"OpenGVLab/{lmm}-hf", "sana": f"Efficient-Large-Model/{sana}_diffusers",
            "vae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}


# name: (sizes, file in the hub repository wusize/openuni from which RecA starts)
RELEASED = {
    "openuni-b-512": (
        OpenUniConfig(_1B, sana(36, 28, 16, 72), dc_ae(), SCHEDULER, **_B,
                      bases=_bases("InternVL3-1B", "Sana_600M_512px")),
        "openuni_b_internvl3_1b_sana_0_6b_512_hf_text2image23m.pth"),
    "openuni-l-512": (
        OpenUniConfig(_2B, sana(70, 20, 20, 112), dc_ae(), SCHEDULER, **_L,
                      bases=_bases("InternVL3-2B", "Sana_1600M_512px")),
        "openuni_l_internvl3_2b_sana_1_6b_512_hf_text2image23m.pth"),
    "openuni-l-1024": (    # SANA 1.5 normalises queries and keys across the heads, in both attentions
        OpenUniConfig(_2B, sana(70, 20, 20, 112, sample_size=32, qk_norm="rms_norm_across_heads"), dc_ae(), SCHEDULER,
                      image_size=1024, **_L, bases=_bases("InternVL3-2B", "SANA1.5_1.6B_1024px")),
        "openuni_l_internvl3_2b_sana_1_6b_1024_hf_text2image23m.pth"),
}

# The tokens of InternVL's vocabulary that prompts need.
MARKERS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

# A 32 px image is 4 x 4 tokens to a two-layer ViT and 4 x 4 latents to a DC-AE of stride 8.
_TINY_LMM = dict(
    internvl3(96, 3, 4, 2, 256), image_seq_length=16,
    vision_config=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                       image_size=[32, 32], patch_size=[4, 4], attention_bias=True, use_qk_norm=False))
TINY = OpenUniConfig(
    _TINY_LMM, sana(4, 4, 4, 32, channels=16, caption_channels=96, sample_size=4),
    dc_ae((32, 64, 128, 128), 16, (0, 1, 1, 1), (0, 1, 1, 1), 16, 1.0, residual_levels=4), SCHEDULER,
    connector_layers=2, connector_heads=4, connector_intermediate=192, num_queries=16, image_size=32)


@dataclass
class Recipe:
    """The paper's Table 8 for OpenUni, in our steps, which are its micro-batches: 5000 steps of which 16 make one
    weight update are 312 updates (the published 2 hours on one A100 fit 5000 micro-batches of 42 images, not 80000).
    Warm-up and cosine are counted in micro-batches there as well: 50 are 3 updates, and the cosine ends with the
    run."""
    steps: int = 5000
    batch: int = 42
    accum: int = 16                            # the public configs: 4 for B (with 10000 steps), 16 for L
    lr: float = 1e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup: int = 3
    horizon: int = 312
    clip: float = 1.0
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0                    # the understanding model is frozen
    lambda_t2i: float = 0.0


@dataclass
class TinyRecipe(Recipe):
    """The toy world on a CPU: about three minutes of pretraining and three of RecA on an idle core. One run, seed 0, on
    held-out scenes: reconstruction 0.00 -> 0.32, colors 0.19 -> 0.77, position 0.11 -> 0.19, overall 0.40 -> 0.51 (two
    objects at once 0.80 -> 0.50: at this size RecA costs some of what it does not train)."""
    steps: int = 800
    batch: int = 32
    accum: int = 1
    lr: float = 1.5e-3
    weight_decay: float = 0.0
    warmup: int = 20
    horizon: int = 0
    guidance_scale: float = 2.0


RECIPES = {"openuni-b-512": Recipe(), "openuni-l-512": Recipe(batch=20), "openuni-l-1024": Recipe(batch=20),
           "tiny": TinyRecipe()}


# ======================================================================================================
# 2. The model
# ======================================================================================================
# InternVL3, SANA and DC-AE come from transformers and diffusers, which compute exactly what the released code computes
# (tests/test_openuni.py). Ours: the connector, the projector, the queries, and the cut between prompt and queries.


class ConnectorLayer(nn.Module):
    """Pre-norm transformer layer with attention among the queries, all to all: no mask and no positions.

    Attribute names are the released keys. x [B, Q, D] -> [B, Q, D].
    """

    def __init__(self, width, heads, intermediate):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        names = ("k_proj", "v_proj", "q_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, intermediate), "fc2": nn.Linear(intermediate, width)})

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)    # [B, heads, Q, D/heads]
                   for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)                # [B, Q, D]
        x = x + self.self_attn["out_proj"](y)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](F.gelu(y, approximate="tanh"))


class Connector(nn.Module):
    """A stack of ConnectorLayers. There is no norm after the last one: SANA normalises its condition itself."""

    def __init__(self, width, heads, intermediate, layers):
        super().__init__()
        self.layers = nn.ModuleList(ConnectorLayer(width, heads, intermediate) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class PrefixCache(DynamicCache):
    """Keys and values of the prompt, written once and then only read.

    A DynamicCache grows at every call. Once `read_only` is set, this one returns [prompt's, queries'] without keeping
    the queries': so the layers can run a second time on the same cache, as activation checkpointing does in the
    backward pass.
    """
    read_only = False

    def update(self, keys, values, layer_idx, *args, **kwargs):                   # [B, kv heads, tokens, head dim]
        if not self.read_only:
            return super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, keys], dim=2), torch.cat([layer.values, values], dim=2)


class OpenUni(nn.Module):
    """OpenUni: `lmm` (InternVL3, frozen), `vae` (DC-AE, frozen), `meta_queries`, `connector`, `projector`,
    `transformer` (SANA).

    OpenUni(config) has random weights, no tokenizer, and can be built under torch.device("meta").
    """
    base_overrides = {}                                      # --lmm, --sana, --vae: see from_pretrained

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lmm = InternVLForConditionalGeneration(InternVLConfig(**config.lmm))
        self.vae = AutoencoderDC.from_config(config.vae)
        width = self.lmm.config.text_config.hidden_size                                                           # D
        self.meta_queries = nn.Parameter(torch.randn(config.num_queries, width) / math.sqrt(width))
        self.connector = Connector(width, config.connector_heads, config.connector_intermediate,
                                   config.connector_layers)
        self.projector = nn.Linear(width, config.sana["caption_channels"])
        self.transformer = SanaTransformer2DModel.from_config(config.sana)
        self.lmm.requires_grad_(False).eval()
        self.vae.requires_grad_(False).eval()
        self.vae.to(memory_format=torch.channels_last)       # DC-AE norms over channels: no transposes so
        self.tokenizer = None                                # set_tokenizer
        self.und_size, self.und_blur = self.lmm.config.vision_config.image_size[0], 1

    @property
    def device(self):
        return self.meta_queries.device

    @property
    def image_tokens(self):
        """N: the ViT's patches are merged 2x2."""
        return (self.und_size // self.lmm.config.vision_config.patch_size[0] // 2) ** 2

    def set_tokenizer(self, tokenizer):
        """The tokenizer says which id stands for an image's embeddings. InputError if it does not know InternVL's
        markers."""
        unknown = [t for t in MARKERS if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
        if unknown:
            raise InputError(f"this tokenizer is not InternVL's: it lacks {' '.join(unknown)}")
        self.tokenizer, self.lmm.config.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")

    def set_und(self, size=None, blur=None):
        """The paper's ablations of what is understood. size: pixels a side for the ViT, a multiple of 28 (fewer image
        tokens; its positions are interpolated); blur: shrink by this factor and enlarge again. What is reconstructed
        stays as it is."""
        step = 2 * self.lmm.config.vision_config.patch_size[0]
        if size and size % step:
            raise InputError(f"--und-size {size}: OpenUni's understanding encoder takes multiples of {step}")
        self.und_size, self.und_blur = size or self.und_size, blur or 1

    def train(self, mode=True):
        super().train(mode)
        self.lmm.eval()                                    # frozen parts: no dropout, whatever their configs say
        self.vae.eval()
        return self

    def blocks(self):
        """The repeated layers with trained parameters or with a graph, for torch.compile and activation
        checkpointing."""
        return [*self.lmm.model.language_model.layers, *self.connector.layers, *self.transformer.transformer_blocks]

    def parameter_groups(self, weight_decay):
        """AdamW groups of what is trained. As in the original, tensors with two or more dimensions decay: also the
        queries and SANA's modulation tables, which one might have left out."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
                {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]

    # ---- frozen: pixels -> features --------------------------------------------------------------------------------

    def preprocess(self, image, task, rng=None):
        """PIL RGB -> {"pixels": float32 [3, S, S] in [-1, 1]}, on the CPU.

        None, a conversation without an image, gives {}. "recon" and "t2i": square crop along the long side (random
        with rng, else the centre), resized to S, as the original trains. "i2t": the whole image, stretched to S, as
        the original's demonstration does it.
        """
        if image is None:
            return {}
        size = self.config.image_size
        image = common.stretch_square(image, size) if task == "i2t" else common.random_square(image, size, rng)
        return {"pixels": common.to_tensor(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """Everything frozen that does not depend on the prompt: samples of `preprocess` -> one dict an image, and all
        that --cache stores.

            und      [N, D]      InternViT features after mlp1      "recon", "i2t"    256 x 896 in bf16: 459 kB (L: 786)
            latents  [C, h, w]   DC-AE latents x scaling, float32   "recon", "t2i"    32 x 16 x 16: 33 kB

        About 0.5 MB an image (L: 0.8 MB), and the frozen 304M ViT and 153M encoder need not run again. The prompt's
        keys and values are not stored. They would be next: the image stands before the template, so those of its ~260
        tokens are the same for all 360 templates. But they are 24 layers x 2 x 128 values a token, 3.2 MB an image
        (L: 7.5 MB), seven times the rest, and save an eighth of the step's arithmetic that is left (one forward of
        260 tokens through the language model, against forward and backward of 256 queries there and in SANA). Per
        template it would be 1.2 GB an image.
        """
        features = [{} for _ in samples]
        seen = [row for row, sample in zip(features, samples) if sample]
        if seen:
            pixels = torch.stack([sample["pixels"] for sample in samples if sample]).to(self.device)   # [B, 3, S, S]
            if task in ("recon", "i2t"):
                for row, und in zip(seen, self._und(pixels)):
                    row["und"] = und
            if task in ("recon", "t2i"):
                for row, latents in zip(seen, self._latents(pixels)):
                    row["latents"] = latents
        return features

    @torch.no_grad()
    def _vit_input(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> [B, 3, und_size, und_size] with ImageNet's mean and deviation.

        The original normalises first and then resizes, bilinear and without antialiasing. The order makes no
        difference (both are linear, the weights sum to 1) but antialiasing would: 512 -> 448 px loses a little, and
        so it was trained.
        """
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        if self.und_blur > 1:
            pixels = common.blur(pixels, self.und_blur)
        return common.resize(((pixels + 1) / 2 - mean) / std, self.und_size)

    def _exact(self):
        """The frozen parts run in their own precision, not in autocast's: DC-AE sums its linear attention in
        float32."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def _und(self, pixels):
        """Understanding embeddings [B, N, D] of pixels [B, 3, S, S] in [-1, 1]: last ViT layer, class token dropped,
        2x2 neighbours joined (1024 -> 256 tokens), two-layer MLP."""
        with self._exact():
            seen = self._vit_input(pixels).to(self.lmm.dtype)
            return self.lmm.model.get_image_features(seen, return_dict=True).pooler_output

    @torch.no_grad()
    def _latents(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> [B, C, h, w], float32. DC-AE's encoder is deterministic: there is no posterior
        to draw from."""
        with self._exact():                                        # a few at a time: see _pixels
            latents = torch.cat([self.vae.encode(x.to(self.vae.dtype)).latent for x in pixels.split(4)])
            return latents.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def _pixels(self, latents):
        """[B, C, h, w] -> [B, 3, S, S], about [-1, 1]. Four images fill a GPU; the 128 channels at 512 px of a whole
        batch would be the peak of memory."""
        with self._exact():
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            return torch.cat([self.vae.decode(z).sample.float() for z in latents.split(4)])

    # ---- prompt -> condition ---------------------------------------------------------------------------------------

    def _prompt_embeds(self, input_ids, und=None):
        """Token ids [B, L] and understanding embeddings [B, N, D] -> [B, L, D]: `und` fills the <IMG_CONTEXT> places
        in order.

        Raises ValueError if their number differs.
        """
        embeds = self.lmm.get_input_embeddings()(input_ids)
        if und is None:
            return embeds
        places = input_ids == self.lmm.config.image_token_id                                                   # [B, L]
        if places.sum() != und.shape[0] * und.shape[1]:
            raise ValueError(f"{int(places.sum())} image tokens in the prompts, "
                             f"{und.shape[0]} x {und.shape[1]} embeddings")
        return embeds.masked_scatter(places[..., None], und.to(embeds.dtype))

    def _positions(self, attention_mask):
        """[B, L] -> mask [B, L+Q] and positions [B, L+Q]: a query's position counts the real tokens before it, so
        padding may stand on either side of the prompt."""
        mask = F.pad(attention_mask.bool(), (0, self.config.num_queries), value=True)
        return mask, (mask.long().cumsum(1) - 1).clamp(min=0)

    def _query_states(self, prompt, attention_mask):
        """Prompt [B, L, D] with mask [B, L] -> the language model's output at the queries [B, Q, D], after its final
        norm.

        Two passes. The prompt cannot see the queries behind it (causal attention) and all weights are frozen, so it
        runs without a graph and leaves its keys and values; then the queries run with one. Same numbers as one pass
        over L+Q tokens with a graph, which is what the original does, for less than half of the activations and of
        the backward pass.
        """
        length = prompt.shape[1]
        mask, positions = self._positions(attention_mask)
        llm, cache = self.lmm.model.language_model, PrefixCache()
        with torch.no_grad():
            llm(inputs_embeds=prompt, attention_mask=mask[:, :length], position_ids=positions[:, :length],
                past_key_values=cache, use_cache=False)
        cache.read_only = True
        queries = self.meta_queries.to(prompt.dtype).expand(prompt.shape[0], -1, -1)                         # [B, Q, D]
        return llm(inputs_embeds=queries, attention_mask=mask, position_ids=positions[:, length:],
                   past_key_values=cache, use_cache=False).last_hidden_state

    def _condition(self, prompt, attention_mask):
        """Prompt [B, L, D], mask [B, L] -> what SANA is conditioned on, [B, Q, T]."""
        states = self._query_states(prompt, attention_mask).to(self.projector.weight.dtype)
        return self.projector(self.connector(states))

    # ==================================================================================================
    # 3. Loading and saving (what reads names, files and sizes stands below the class)
    # ==================================================================================================
    # Released files hold what was trained, under the names of this class's own attributes:
    #   text2image23m    meta_queries, connector.*, projector.*               (SANA was frozen)
    #   blip3o60k, RecA  the same and transformer.*
    # Everything else comes from its own hub repository. InternVL exists there twice, as the original checkpoint
    # (OpenGVLab/InternVL3-1B) and converted for transformers (-hf): the same numbers under other names, and both load.

    @classmethod
    def random(cls, name, device="cpu"):
        """Random weights at a size in RELEASED or of "tiny", and a stand-in tokenizer: for the toy world and for
        --bench."""
        if name != "tiny" and name not in RELEASED:
            raise InputError(f"no such size: {name} (there are {', '.join(RELEASED)}, tiny)")
        tokenizer, config = common.tiny_tokenizer(MARKERS), RELEASED[name][0] if name in RELEASED else TINY
        if name == "tiny":
            lmm = dict(config.lmm, text_config=dict(config.lmm["text_config"], vocab_size=len(tokenizer)))
            config = replace(config, lmm=lmm)
        with torch.device(device):
            model = cls(config)
        model.set_tokenizer(tokenizer)
        return model.eval()

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, bases=None):
        """A model with weights, in eval mode.

        source: "tiny" | a name in RELEASED (the checkpoint RecA starts from) | a .pth or .safetensors file in the
        released layout | a hub id "owner/name" or a folder that holds one such file | "owner/name:FILE" where it
        holds several | a folder that save_pretrained wrote. bases: {"lmm": ..., "sana": ..., "vae": ...}, hub ids or
        folders to use for those parts. Every key must fit, or InputError names what does not.
        """
        if source == "tiny":
            model = cls.random("tiny").to(device, dtype)
            exact_rotary(model)
            return model
        path, described = find_checkpoint(str(source))
        state = dict(common.load_state(path))
        if described is None:
            described = guess_variant(state, path)
        for part, base in (bases or cls.base_overrides).items():
            local = Path(base).expanduser()
            described["bases"][part] = str(local.resolve()) if local.is_dir() else str(base)
        parts = {k.split(".")[0] for k in state}
        config, folders = read_bases(described, path.parent, need_sana="transformer" not in parts)
        model = empty_model(config, device, dtype)
        if "transformer" not in parts:                                               # text2image23m: SANA as published
            state |= {"transformer." + k: v for k, v in find_weights(folders["sana"] / "transformer").items()}
        if "vae" not in parts:
            state |= {"vae." + k: v for k, v in find_weights(folders["vae"]).items()}
        if "lmm" in parts:                                                        # a complete state dict, in one file
            lmm = internvl_to_transformers({k[4:]: v for k, v in state.items() if k.startswith("lmm.")})
        else:
            lmm = internvl_to_transformers(find_weights(folders["lmm"]))
        state = {k: v for k, v in state.items() if not k.startswith("lmm.")} | {"lmm." + k: v for k, v in lmm.items()}
        common.load_strictly(model, state, str(path))
        model.set_tokenizer(AutoTokenizer.from_pretrained(folders["lmm"], trust_remote_code=False))
        return model.eval()

    def save_pretrained(self, folder):
        """Write `folder`/openuni.pth, a flat dict with the released key list that the original repository loads, and
        config.json, which names the frozen parts' hub repositories (2 GB that everybody has are not copied).

        Parts without a repository (`tiny`) are saved beside them, in their libraries' layouts: lmm/, sana/, vae/.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with common.atomic(folder / "openuni.pth") as path, open(path, "wb") as stream:
            # into a stream: given a path, torch would write its name into the file, equal weights were unequal bytes
            torch.save(self.released_state("finetuned"), stream)
        if "lmm" not in self.config.bases:
            self.lmm.config.save_pretrained(folder / "lmm")
            with common.atomic(folder / "lmm" / "model.safetensors") as path:
                save_file({k: v.contiguous() for k, v in self.lmm.state_dict().items()}, path)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / "lmm")
        if "vae" not in self.config.bases:
            self.vae.save_pretrained(folder / "vae")
        if "sana" not in self.config.bases:                   # its weights are in openuni.pth
            self.transformer.save_config(folder / "sana" / "transformer")
            DPMSolverMultistepScheduler.from_config(self.config.scheduler).save_config(folder / "sana" / "scheduler")
        described = {"model_type": "openuni", **own_settings(self.config)}
        with common.atomic(folder / "config.json") as path:
            path.write_text(json.dumps(described, indent=1) + "\n")

    def released_state(self, kind):
        """State dict under the released names. kind: "pretrained" (queries, connector, projector), "finetuned" (and
        SANA) or "full" (and the frozen parts, InternVL under its original names)."""
        own = self.state_dict()
        wanted = {"pretrained": ("meta_queries", "connector.", "projector."),
                  "finetuned": ("meta_queries", "connector.", "projector.", "transformer."),
                  "full": ("meta_queries", "connector.", "projector.", "transformer.", "vae.")}[kind]
        state = {k: v.contiguous() for k, v in own.items() if k.startswith(wanted)}
        if kind == "full":
            lmm = {k[4:]: v for k, v in own.items() if k.startswith("lmm.")}
            state |= {"lmm." + k: v for k, v in internvl_from_transformers(lmm).items()}
        return state

    # ==================================================================================================
    # 4. The embedding-conditioned prompt
    # ==================================================================================================
    # RecA asks for a reconstruction in the words in which the model is asked for a description, and opens the answer
    # with <img>, the token behind which it has learned to generate. There is no system turn. The queries follow.

    def recon_prompt(self, template):
        """The text of RecA's prompt: image tokens, template, and an answer that begins with <img>."""
        return self._turn("<img>" + "<IMG_CONTEXT>" * self.image_tokens + "</img>\n" + template) + "<img>"

    def text_prompt(self, caption=None):
        """The text of a text-to-image prompt. None: the unconditional one, for guidance."""
        asked = "Generate an image." if caption is None else f"Generate an image: {caption.strip()}"
        return self._turn(asked) + "<img>"

    @staticmethod
    def _turn(text):
        return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

    def _pad(self, rows, left=False, value=0):
        """Lists of ids -> [B, L] with `value` in the padding, and the mask [B, L] of what is real; on the model's
        device.

        The original pads reconstruction prompts on the left and text prompts on the right; with positions counted
        from the mask both give the same numbers. We pad on the right: on the left, the first padded places would have
        nothing to attend to.
        """
        length = max(map(len, rows))
        pad = [[value] * (length - len(row)) for row in rows]
        ids = torch.tensor([p + row if left else row + p for row, p in zip(rows, pad)], device=self.device)
        real = torch.tensor([[False] * len(p) + [True] * len(row) if left else [True] * len(row) + [False] * len(p)
                             for row, p in zip(rows, pad)], device=self.device)
        return ids, real

    def _tokenize(self, texts):
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _text_ids(self, captions):
        """Token ids of text-to-image prompts, cut to `max_caption_tokens`: the caption is shortened and the frame
        around it stays. (The original cuts the end off, and with it the turn's end and the <img> that asks for an
        image. Not followed.)"""
        rows = self._tokenize([self.text_prompt(c) for c in captions])
        tail = len(self._tokenize(["<|im_end|>\n<|im_start|>assistant\n<img>"])[0])
        limit = self.config.max_caption_tokens
        return [row if len(row) <= limit else row[:limit - tail] + row[-tail:] for row in rows]

    # ==================================================================================================
    # 5. The losses
    # ==================================================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA's loss (paper, equation 2), with the flow-matching loss as the model's generation loss.

        features: list of {"und" [N, D], "latents" [C, h, w]} from encode; templates: as many strings. draws: {"noise"
        [B, C, h, w] standard normal, "u" [B] uniform on [0, 1)}, or None: from rng. Returns the mean over images,
        channels and places.
        """
        ids, mask = self._pad(self._tokenize([self.recon_prompt(t) for t in templates]))
        return self._recon_loss_from_ids(features, ids, mask, draws, rng)

    def _recon_loss_from_ids(self, features, input_ids, attention_mask, draws=None, rng=None):
        """recon_loss with the prompts as token ids [B, L] and mask [B, L], padded on either side."""
        und = torch.stack([row["und"] for row in features])
        condition = self._condition(self._prompt_embeds(input_ids, und), attention_mask)
        return self._flow_loss(torch.stack([row["latents"] for row in features]), condition, draws, rng)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text-to-image loss, for supervised fine-tuning (RecA has λ_t2i = 0).

        features: list of {"latents"}; captions: as many strings. draws: as in recon_loss, and "drop" [B] uniform on
        [0, 1): below 0.1 the caption gives way to the unconditional prompt, from which guidance at sampling starts.
        """
        rng = rng or Rng.fresh(len(captions))
        drop = draws["drop"] if draws and "drop" in draws else rng.uniform()
        ids, mask = self._pad(self._text_ids([None if d < 0.1 else c for c, d in zip(captions, drop.tolist())]))
        return self._t2i_loss_from_ids(features, ids, mask, draws, rng)

    def _t2i_loss_from_ids(self, features, input_ids, attention_mask, draws=None, rng=None):
        condition = self._condition(self._prompt_embeds(input_ids), attention_mask)
        return self._flow_loss(torch.stack([row["latents"] for row in features]), condition, draws, rng)

    def _flow_loss(self, latents, condition, draws=None, rng=None):
        """Flow matching: latents x [B, C, h, w] float32, condition [B, Q, T] -> scalar.

        x_σ = (1-σ) x + σ ε; SANA predicts the velocity dx_σ/dσ = ε - x; mean squared error, all noise levels alike.

        Time is discrete: σ in {0.001, ..., 1}, and the network is told 1000 σ. The mixture is made in float32; the
        original makes it in bf16, which rounds σ by up to 0.4% while the network is told the exact t. Not followed:
        it is noise in the target.
        """
        rng = rng or Rng.fresh(len(latents))
        noise = (draws["noise"] if draws else rng.normal(*latents.shape[1:])).to(latents)               # ε [B, C, h, w]
        u = (draws["u"] if draws else rng.uniform()).to(latents)                                                   # [B]
        sigma = self._sigmas(u)
        noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
        velocity = self._velocity(noisy, condition, 1000 * sigma)
        return (velocity - (noise - latents)).square().mean()

    @staticmethod
    def _sigmas(u):
        """u [B], uniform on [0, 1) -> noise levels [B], uniform on {1, 0.999, ..., 0.001}."""
        return (1000 - (1000 * u).floor()) / 1000

    def _velocity(self, latents, condition, t):
        """SANA: noisy latents [B, C, h, w], condition [B, Q, T], t [B] on the scale of 1000 -> velocity [B, C, h, w],
        float32."""
        dtype = self.transformer.proj_out.weight.dtype
        return self.transformer(latents.to(dtype), encoder_hidden_states=condition.to(dtype), timestep=t,
                                return_dict=False)[0].float()

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Cross-entropy of the answers, given image and questions; the mean over all answer tokens.

        A measure, not a training signal: the understanding model is frozen and the queries stand behind everything
        that is read here, so no trained parameter has a part in it (λ_i2t = 0 in the paper for this model). features:
        list of {"und"}, or {} for a conversation without an image; conversations: list of [(question, answer), ...].
        draws and rng are not used: nothing is drawn.
        """
        rows, targets = [], []
        for feature, turns in zip(features, conversations):
            row, target = [], []
            for i, (question, answer) in enumerate(turns):
                image = "<img>" + "<IMG_CONTEXT>" * self.image_tokens + "</img>\n" if i == 0 and feature else ""
                asked = ("\n" if i else "") + self._turn(image + question)
                asked, answered = self._tokenize([asked, answer + "<|im_end|>"])
                row += asked + answered
                target += [-100] * len(asked) + answered
            rows.append(row)
            targets.append(target)
        ids, mask = self._pad(rows)
        targets, _ = self._pad(targets, value=-100)
        unds = [row["und"] for row in features if row]
        embeds = self._prompt_embeds(ids, torch.stack(unds) if unds else None)
        llm = self.lmm.model.language_model
        states = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state           # [B, L, D]
        said = targets[:, 1:] != -100                    # the state before a token predicts it; logits only for answers
        logits = self.lmm.lm_head(states[:, :-1][said]).float()                               # [answers' tokens, V]
        return common.global_mean(F.cross_entropy(logits, targets[:, 1:][said], reduction="sum"), said.sum())

    # ==================================================================================================
    # 6. Inference
    # ==================================================================================================

    @torch.no_grad()
    def generate(self, prompts, *, seed=0, draws=None, progress=False, num_steps=20, guidance_scale=4.5,
                 negative_prompt=None):
        """Text -> image: list of strings -> list of PIL images, S x S.

        seed: image i has seed + i; or a list with one seed an image, on which alone its noise depends. draws:
        {"latents" [B, C, h, w]} standard normal, or None. guidance_scale 1 (or less): no guidance, half the time.
        negative_prompt: a text to be guided away from, or None: the unconditional prompt.
        """
        guided = guidance_scale > 1
        ids, mask = self._pad(self._text_ids([*prompts, negative_prompt] if guided else list(prompts)))
        condition = self._condition(self._prompt_embeds(ids), mask)                                   # [B (+1), Q, T]
        if guided:                                      # one unconditional row serves all: computed once, repeated here
            condition = torch.cat([condition[:-1], condition[-1:].expand(len(prompts), -1, -1)])
        return self._draw(condition, guidance_scale if guided else None, num_steps, len(prompts), seed, draws, progress)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, seed=0, draws=None, progress=False, num_steps=20,
                    guidance_scale=1.0):
        """Image -> und embeddings -> image: list of PIL -> list of PIL, S x S, what RecA trains.

        templates: one string an image; None: the seed template. The default is no guidance: RecA never drops the
        image, and the original's demonstration gives the negative branch the same image and, by default, the same
        words, which comes to the same. guidance_scale > 1 guides away from the unconditional text prompt.
        """
        guided = guidance_scale > 1
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        templates = templates or [common.SEED_TEMPLATE] * len(images)
        ids, mask = self._pad(self._tokenize([self.recon_prompt(t) for t in templates]))
        condition = self._condition(self._prompt_embeds(ids, torch.stack([row["und"] for row in features])), mask)
        if guided:
            ids, mask = self._pad(self._text_ids([None]))
            empty = self._condition(self._prompt_embeds(ids), mask)
            condition = torch.cat([condition, empty.expand(len(images), -1, -1)])
        return self._draw(condition, guidance_scale if guided else None, num_steps, len(images), seed, draws, progress)

    def _draw(self, condition, guidance_scale, num_steps, count, seed, draws, progress):
        side = self.config.image_size // self.vae.spatial_compression_ratio
        shape = (self.vae.config.latent_channels, side, side)
        latents = draws["latents"] if draws else Rng.sampling(seed, count).normal(*shape)
        latents = self._denoise(condition, latents.to(self.device), guidance_scale, num_steps, progress)
        return [common.to_pil(image) for image in self._pixels(latents)]

    def _denoise(self, condition, latents, guidance_scale=None, num_steps=20, progress=False):
        """DPM-Solver++ from noise [B, C, h, w] to latents, float32. condition [B, Q, T], or with guidance_scale [2B,
        Q, T]: the conditional rows, then the unconditional ones.

        Guidance acts on the velocity, v = v_uncond + scale (v_cond - v_uncond), before the solver turns it into a
        clean image. The noise levels are shifted towards noise (SCHEDULER). The library truncates 1000 σ to an
        integer for the network (the first is 999) and computes with the exact σ; the original does so too.
        """
        solver = DPMSolverMultistepScheduler.from_config(self.config.scheduler)
        solver.set_timesteps(num_steps, device=latents.device)
        latents = latents.float()
        for t in tqdm(solver.timesteps, desc="sampling", disable=not progress, leave=False):
            inputs = latents if guidance_scale is None else torch.cat([latents, latents])
            velocity = self._velocity(inputs, condition, t.expand(len(inputs)))
            if guidance_scale is not None:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = solver.step(velocity, t, latents, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def describe(self, images, question="Describe the image in detail.", max_new_tokens=512):
        """Image -> text, by the frozen InternVL3: list of PIL -> list of strings. Greedy, with the library's
        key-value cache. One 448 px view of the whole image (InternVL's tiling of large images is not used here)."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        asked = self._turn("<img>" + "<IMG_CONTEXT>" * self.image_tokens + "</img>\n" + question)
        ids, mask = self._pad(self._tokenize([asked] * len(images)), left=True)
        embeds = self._prompt_embeds(ids, torch.stack([row["und"] for row in features]))
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        answers = self.lmm.generate(inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=max_new_tokens,
                                    do_sample=False, eos_token_id=end, pad_token_id=end)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


# ======================================================================================================
# 3, continued: names, files, sizes
# ======================================================================================================

# InternVL's original names on the left, those of transformers on the right.
_INTERNVL_NAMES = (
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    ("vision_model.encoder.layers.", "model.vision_tower.encoder.layer."),
    (".attn.proj.", ".attention.projection_layer."),
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), (".ls1", ".lambda_1"), (".ls2", ".lambda_2"),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."), ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."))


def internvl_to_transformers(state):
    """InternVL's weights under the names of InternVLForConditionalGeneration. Takes the original names (whose q, k, v
    are one matrix), and both namings that converted repositories have: theirs begin with "model." or, if older, do
    not."""
    out = {}
    for key, value in state.items():
        for original, ours in _INTERNVL_NAMES:
            key = key.replace(original, ours) if not key.startswith("model.language_model.") else key
        if key.startswith(("vision_tower.", "multi_modal_projector.")):
            key = "model." + key
        if ".attn.qkv." in key:                                                            # [3 Dv, Dv] or [3 Dv]
            out |= {key.replace(".attn.qkv.", f".attention.{n}_proj."): part for n, part in zip("qkv", value.chunk(3))}
        else:
            out[key] = value
    out.setdefault("lm_head.weight", out.get("model.language_model.embed_tokens.weight"))  # a tied head may be left out
    return out


def internvl_from_transformers(state):
    """The inverse: names of transformers -> InternVL's original names, q, k, v in one matrix."""
    out = {}
    for key, value in state.items():
        if ".attention.k_proj." in key or ".attention.v_proj." in key:
            continue
        if ".attention.q_proj." in key:
            value = torch.cat([state[key.replace("q_proj", f"{n}_proj")] for n in "qkv"])
            key = key.replace(".attention.q_proj.", ".attn.qkv.")
        for original, theirs in _INTERNVL_NAMES:
            key = re.sub("^" + re.escape(theirs) if not theirs.startswith(".") else re.escape(theirs), original, key)
        out[key] = value
    return out


def own_settings(config):
    """What a checkpoint's config.json says: everything but the sizes of the library's classes, which their own files
    state."""
    return {k: v for k, v in asdict(config).items() if k not in ("lmm", "sana", "vae", "scheduler")}


def find_weights(folder):
    """The state dict in a folder of transformers or diffusers layout: one file, or an index of shards."""
    for stem in ("model", "diffusion_pytorch_model"):
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors", f"{stem}.bin", f"pytorch_{stem}.bin"):
            if (folder / name).exists():
                return common.load_state(folder / name)
    raise InputError(f"no weights in {folder}: no model.safetensors or diffusion_pytorch_model.safetensors, nor shards")


def find_checkpoint(source):
    """`source` of from_pretrained -> (file with the trained weights, its config.json as a dict or None)."""
    if source in RELEASED:
        config, file = RELEASED[source]
        return common.hub_folder("wusize/openuni", [file]) / file, own_settings(config)
    if Path(source).expanduser().is_file():
        return Path(source).expanduser(), None
    source, _, file = source.partition(":") if not Path(source).expanduser().is_dir() else (source, "", "")
    if source == "wusize/openuni" and not file:                           # several sizes and stages, some 20 GB
        raise InputError(f"wusize/openuni holds several models: give one of {', '.join(RELEASED)}, or name a file: "
                         "wusize/openuni:FILE.pth")
    folder = common.hub_folder(source, [file] if file else ["*.json", "*.pth", "*.safetensors"])
    if file:
        return folder / file, None
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".pth", ".safetensors")]            # not trainer.pt
    if len(files) != 1:
        raise InputError(f"{source} holds {len(files)} .pth or .safetensors files: name one as {source}:FILE")
    described = common.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if described.get("model_type") != "openuni":
        return files[0], None
    return files[0], {k: v for k, v in described.items() if k != "model_type"}


def guess_variant(state, path):
    """Which of RELEASED a bare checkpoint file belongs to: the width tells B from L, and SANA 1.5 (in L-1024) has q
    and k norms.

    L-512 and L-1024 have equal key lists where SANA is not in the file; then the file's name decides (1024 in it, or
    not).
    """
    queries = state.get("meta_queries")
    if queries is None:
        raise InputError(f"{path} is not an OpenUni checkpoint: it has no meta_queries")
    width = queries.shape[-1]
    if "transformer.proj_out.weight" in state:
        large = any(".norm_q." in key for key in state)
    else:
        large = "1024" in Path(path).name
    for name, (config, _) in RELEASED.items():
        if config.lmm["text_config"]["hidden_size"] == width and (config.image_size == 1024) == large:
            return own_settings(config)
    raise InputError(f"{path}: no released OpenUni has queries of width {width}; use a folder with a config.json")


def read_bases(described, folder, need_sana):
    """A checkpoint's settings -> (OpenUniConfig with the sizes that the bases' own files state, {part: local folder}).

    Parts that settings["bases"] does not name lie in `folder`, beside the checkpoint. need_sana: SANA's weights are
    needed too.
    """
    sana_weights = [f"transformer/diffusion_pytorch_model{name}" for name in (".safetensors*", "-*.safetensors")]
    patterns = {"lmm": ["*.json", "*.txt", "*.safetensors"], "vae": ["config.json", "*.safetensors"],
                "sana": ["transformer/config.json", "scheduler/*.json"] + sana_weights * need_sana}
    bases = described["bases"]
    folders = {part: common.hub_folder(bases[part], wanted) if part in bases else folder / part
               for part, wanted in patterns.items()}
    sizes = {"lmm": internvl_sizes(folders["lmm"]), "vae": common.read_json(folders["vae"] / "config.json"),
             "sana": common.read_json(folders["sana"] / "transformer" / "config.json"),
             "scheduler": common.read_json(folders["sana"] / "scheduler" / "scheduler_config.json")}
    for part in ("sana", "vae", "scheduler"):
        sizes[part] = {k: v for k, v in sizes[part].items() if not k.startswith("_")}
    try:
        return OpenUniConfig(**sizes, **described), folders
    except TypeError as error:
        raise InputError(f"config.json does not describe an OpenUni: {error}") from error


def internvl_sizes(folder):
    """Keyword arguments of InternVLConfig from a folder's config.json, converted (-hf) or original."""
    config = common.read_json(folder / "config.json")
    if "llm_config" not in config:                                                                       # converted
        ignored = ("architectures", "transformers_version", "dtype", "torch_dtype")
        sizes = {k: v for k, v in config.items() if k not in ignored}
        # Never tied here: whatever the file says, the head is a matrix of its own, a copy where the checkpoint has
        # none.
        untied = {"tie_word_embeddings": False}
        return sizes | untied | {"text_config": config["text_config"] | untied}
    vision, llm = config["vision_config"], config["llm_config"]
    side = config.get("force_image_size") or vision["image_size"]
    other_kind = (vision.get("qk_normalization"), vision.get("norm_type", "layer_norm") != "layer_norm",
                  config.get("select_layer", -1) != -1)
    if any(other_kind):
        raise InputError(f"{folder}: an InternVL with a vision tower of another kind than InternVL3's")
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(
        image_token_id=config.get("img_context_token_id", 151667), downsample_ratio=config.get("downsample_ratio", 0.5),
        tie_word_embeddings=False,
        vision_config=dict({k: vision[k] for k in sizes}, image_size=[side] * 2, patch_size=[vision["patch_size"]] * 2,
                           attention_bias=vision.get("qkv_bias", True),
                           layer_norm_eps=vision.get("layer_norm_eps", 1e-6)),
        text_config=dict({k: llm[k] for k in (*sizes, "vocab_size", "num_key_value_heads", "max_position_embeddings")},
                         model_type="qwen2", rms_norm_eps=llm.get("rms_norm_eps", 1e-6), tie_word_embeddings=False,
                         rope_parameters={"rope_type": "default", "rope_theta": llm.get("rope_theta", 1000000.0)}))


def empty_model(config, device="cpu", dtype=torch.float32):
    """An OpenUni of uninitialised memory, to be filled: drawing 4 billion random numbers first would take a minute."""
    with torch.device("meta"):
        model = OpenUni(config)
    model.to(dtype).to_empty(device=device)
    exact_rotary(model)
    return model


def exact_rotary(model):
    """The rotary frequencies, which no checkpoint holds, in float32 whatever the model's dtype.

    The original casts the whole model to bf16 and these frequencies with it, which turns distant positions by some
    tenths of a radian. Not followed: InternVL itself was trained with exact ones, and so are the queries from here
    on.
    """
    llm = model.lmm.model.language_model
    llm.rotary_emb = Qwen2RotaryEmbedding(llm.config).to(model.device)


# ======================================================================================================
# 7. main()
# ======================================================================================================


def toy_words(scene, side):
    """What each image token of a scene should say: [side * side, 16], 1 at the words (shape, color, place) of the
    object in whose cell the token lies; all 0 where the cell is empty."""
    said = torch.zeros(side, side, len(TOY_WORDS))
    half = side // 2
    for place, shape, color in scene:
        row, column = divmod(place, 2)
        for word in (shape, 4 + color, 12 + place):
            said[row * half:(row + 1) * half, column * half:(column + 1) * half, word] = 1
    return said.flatten(0, 1)


TOY_WORDS = [*common.SHAPES, *common.COLORS, *common.PLACES]


def pretrain_toy(model, fraction, seed):
    """The history of the published model in small, for `--model tiny`: an autoencoder; a language model; a vision
    encoder whose embeddings say words; then, with all of that frozen, generation from sparse captions. What RecA
    finds is a model that draws the right shapes, was seldom told colors and places, and has never been shown an image
    while it draws.
    """
    size, words = model.config.image_size, model.tokenizer.convert_tokens_to_ids(TOY_WORDS)
    side = math.isqrt(model.image_tokens)
    table = model.lmm.get_input_embeddings().weight

    def steps(count):
        return max(2, int(count * fraction))

    def scenes(stage, positions):
        """(generator, scene) of each position, the same for the same seed."""
        for rng in (np.random.default_rng((seed, stage, position)) for position in positions):
            yield rng, common.random_scene(rng)

    def pixels(drawn):
        return torch.stack([common.to_tensor(common.draw_scene(scene, size)) for _, scene in drawn]).to(model.device)

    # 1. DC-AE: reconstruct, also from slightly disturbed latents, as the generator will leave some disturbance.
    def crowded(positions):                                     # most cells full: there is little to learn from white
        for rng in (np.random.default_rng((seed, 1, position)) for position in positions):
            yield rng, [(p, int(rng.integers(4)), int(rng.integers(8))) for p in range(4) if rng.random() < 0.7]

    def autoencoder_loss(positions):
        x = pixels(crowded(positions))
        z = model.vae.encode(x).latent
        error = model.vae.decode(z + 0.1 * torch.randn_like(z)).sample - x
        return error.square().mean() + error.abs().mean() + 1e-3 * z.square().mean()

    parameters = model.vae.requires_grad_(True).parameters()
    common.toy_stage("autoencoder", parameters, autoencoder_loss, steps(1000), lr=2e-3, batch=8)
    with torch.no_grad():                                       # latents of unit variance, as flow matching wants them
        scale = 1 / model.vae.encode(pixels(crowded(range(256)))).latent.std().item()
    model.vae.requires_grad_(False).register_to_config(scaling_factor=scale)

    # 2. Qwen2: descriptions and answers, from captions in any order and from image tokens that are mixtures of words.
    def language_loss(positions):
        features, talks = [], []
        for k, (rng, scene) in enumerate(scenes(2, positions)):
            full = common.caption(scene)
            place = int(rng.integers(4))
            there = [f"{list(common.COLORS)[c]} {common.SHAPES[s]}" for p, s, c in scene if p == place] or ["."]
            ask = common.templates()[rng.integers(360)]
            if k % 2:
                shuffled = common.caption([scene[i] for i in rng.permutation(len(scene))])
                features.append({})
                talks.append([(f"Generate an image: {shuffled}", full), (f"{common.PLACES[place]} ?", there[0])])
            else:
                loudness = torch.from_numpy(rng.uniform(0.3, 1.2, (side * side, len(words))))
                features.append({"und": (toy_words(scene, side) * loudness).to(table) @ table[words]})
                talks.append([(ask, full), (f"{common.PLACES[place]} ?", there[0])])
        return model.i2t_loss(features, talks)

    llm = nn.ModuleList([model.lmm.model.language_model, model.lmm.lm_head]).requires_grad_(True)
    common.toy_stage("language", llm.parameters(), language_loss, steps(600), lr=2e-3)
    model.lmm.requires_grad_(False)

    # 3. InternViT and the first half of mlp1. The second half is set to the words' embeddings, one word a hidden
    # number: an image token is then a mixture of words. This is the premise of RecA (its embeddings live where words
    # live), which billions of captions have made true of the published model.
    projector = model.lmm.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_2.weight.zero_()[:, :len(words)] = table[words].T
        projector.linear_2.bias.zero_()
    gates = {}
    hook = projector.act.register_forward_hook(lambda _, inputs, out: gates.update(said=out[..., :len(words)]))

    def vision_loss(positions):
        drawn = list(scenes(3, positions))
        model.lmm.model.get_image_features(model._vit_input(pixels(drawn)))
        return F.mse_loss(gates["said"], torch.stack([toy_words(scene, side) for _, scene in drawn]).to(gates["said"]))

    eyes = nn.ModuleList([model.lmm.model.vision_tower, projector.layer_norm, projector.linear_1]).requires_grad_(True)
    common.toy_stage("vision", eyes.parameters(), vision_loss, steps(300), lr=1e-3)
    model.lmm.requires_grad_(False)
    hook.remove()

    # 4. Queries, connector, projector and SANA: text to image, from captions that seldom say color and place.
    def generation_loss(positions):
        drawn = list(scenes(4, positions))
        features = [{"latents": latents} for latents in model._latents(pixels(drawn))]
        return model.t2i_loss(features, [common.caption(scene, 0.1, rng) for rng, scene in drawn])

    trained = [p for group in model.parameter_groups(0.0) for p in group["params"]]
    common.toy_stage("generation", trained, generation_loss, steps(1200), lr=1e-3)


def flags(parser):
    """What only this architecture has."""
    group = parser.add_argument_group("OpenUni only")
    for part, text in (("lmm", "InternVL3, original or converted (-hf)"), ("sana", "SANA"), ("vae", "DC-AE")):
        group.add_argument(f"--{part}", help=f"hub id or folder of {text} (default: what the checkpoint names)")


def prepare(model, args):
    """Called before training. The frozen parts take the working precision once: autocast would cast their float32
    weights anew in every step (it remembers only those that are trained). Trained weights stay float32."""
    if args.precision == "bf16":
        model.lmm.to(torch.bfloat16)
        model.vae.to(torch.bfloat16)
        exact_rotary(model)
    if args.compile:
        # A layer of the language model is compiled for its place in the stack (it asks the cache by number), with and
        # without a graph, for one length of prompt and for any: torch's limit of 8 versions would send most layers
        # back to eager.
        torch._dynamo.config.recompile_limit = 8 * len(model.blocks())
        torch._dynamo.config.accumulated_recompile_limit = 8 * len(model.blocks())
    return {}


def main():
    args = common.parse_args(__doc__, RECIPES, "openuni-b-512", extend=flags)
    if args.lambda_i2t:
        raise InputError("OpenUni's understanding model is frozen, L_i2t trains nothing here: leave --lambda-i2t at 0")
    OpenUni.base_overrides = {part: getattr(args, part) for part in ("lmm", "sana", "vae") if getattr(args, part)}
    common.run(OpenUni, args, pretrain_toy, prepare)


if __name__ == "__main__":
    common.cli(main)
