"""RecA for OpenUni: a frozen multimodal LLM, learnable queries, a flow-matching image generator.

OpenUni (arXiv 2505.23661) joins two finished models. InternVL3 understands; SANA generates. Between them stand 256
learnable vectors, the *queries*: they are appended to any prompt and run through the frozen language model. What comes
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
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, InternVLConfig, InternVLForConditionalGeneration
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import common
from common import InputError, Rng

# ==== 1. Sizes and hyper-parameters ===================================================================

@dataclass
class OpenUniConfig:
    """Sizes of all parts. The four dicts are keyword arguments of library classes, in the form of their config.json."""
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
    """InternVL3: InternViT-300M at 448 px and a Qwen2.5 language model whose output head is a matrix of its own. (The
    published config scales the rotary positions, but only beyond 32768 of them; no prompt here has 1000.)"""
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
    """DC-AE, by default f32c32 for SANA: residual blocks in the finer levels, linear attention in the coarser ones, a
    stride of 2 between neighbours (so 2**5 = 32 for six widths)."""
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
    """SANA. It has no position embedding: its 3x3 convolutions tell places apart."""
    return dict(in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=head_dim,
                num_layers=layers, num_cross_attention_heads=cross_heads, cross_attention_head_dim=cross_head_dim,
                cross_attention_dim=cross_heads * cross_head_dim, caption_channels=caption_channels,
                mlp_ratio=mlp_ratio, sample_size=sample_size, patch_size=1, qk_norm=qk_norm)

# The sampler of the released SANA folders: DPM-Solver++(2M) on flow-matching noise levels, shifted towards noise by 3.
# Training uses shift 1, and that is an accident that everybody must keep: the original builds its training scheduler,
# of another class, from this same file; that class calls the shift "shift" and not "flow_shift", finds nothing, and
# takes its default of 1. All released weights were trained so, and section 5 draws σ without a shift.
SCHEDULER = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
                 prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero",
                 lower_order_final=True, num_train_timesteps=1000)

# A 32 px image is 4 x 4 tokens to a two-layer ViT and 4 x 4 latents to a DC-AE of stride 8.
_TINY_LMM = dict(
    internvl3(96, 3, 4, 2, 256), image_seq_length=16,
    vision_config=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                       image_size=[32, 32], patch_size=[4, 4], attention_bias=True, use_qk_norm=False))
TINY = OpenUniConfig(
    _TINY_LMM, sana(3, 4, 4, 24, channels=16, caption_channels=96, sample_size=4, mlp_ratio=2.0),
    dc_ae((12, 24, 48, 48), 16, (0, 1, 1, 1), (0, 1, 1, 1), 16, 1.0, residual_levels=4), SCHEDULER,
    connector_layers=1, connector_heads=4, connector_intermediate=192, num_queries=16, image_size=32)

def hub_bases(lmm, sana):
    return {"lmm": f"OpenGVLab/{lmm}-hf", "sana": f"Efficient-Large-Model/{sana}_diffusers",
            "vae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"}

L_512 = OpenUniConfig(internvl3(1536, 28, 12, 2, 8960), sana(70, 20, 20, 112), dc_ae(), SCHEDULER, connector_heads=24,
                      connector_intermediate=8960, bases=hub_bases("InternVL3-2B", "Sana_1600M_512px"))
CONFIGS = {
    "openuni-b-512": OpenUniConfig(internvl3(896, 24, 14, 2, 4864), sana(36, 28, 16, 72), dc_ae(), SCHEDULER,
                                   bases=hub_bases("InternVL3-1B", "Sana_600M_512px")),
    "openuni-l-512": L_512,
    "openuni-l-1024": replace(      # SANA 1.5 normalises queries and keys across the heads, in both attentions
        L_512, sana=sana(70, 20, 20, 112, sample_size=32, qk_norm="rms_norm_across_heads"), image_size=1024,
        bases=hub_bases("InternVL3-2B", "SANA1.5_1.6B_1024px")),
    "tiny": TINY,
}

# The checkpoints from which RecA starts, for --model beside hub ids and folders.
RELEASED = {"openuni-b-512": "wusize/openuni:openuni_b_internvl3_1b_sana_0_6b_512_hf_text2image23m.pth",
            "openuni-l-512": "wusize/openuni:openuni_l_internvl3_2b_sana_1_6b_512_hf_text2image23m.pth",
            "openuni-l-1024": "wusize/openuni:openuni_l_internvl3_2b_sana_1_6b_1024_hf_text2image23m.pth"}

# And what the authors' RecA has made of them.
RECA = {"openuni-b-reca": "sanaka87/OpenUni-1-0.6B-RecA", "openuni-reca": "sanaka87/OpenUni-RecA"}
CONFIGS |= {"openuni-b-reca": CONFIGS["openuni-b-512"], "openuni-reca": L_512}

WEIGHT_FILES = [["*.index.json"], ["*.pth", "*.safetensors"], ["*.bin"]]            # in this order
MARKERS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")        # of InternVL's vocabulary
IGNORED = -100                                                                      # label of what is not predicted
TEXT_DROP = 0.1                                                                     # of captions, in text to image

@dataclass
class Recipe:
    """The paper's run (Table 8): 5000 steps of 42 images (L: 20), of which 16 make one weight update, are 312 updates (the
    published 2 hours on one A100 fit 5000 micro-batches of 42 images, not 80000). Warm-up and cosine are counted in
    micro-batches there as well: 50 are 3 updates, and the cosine ends with the run, whatever --steps is."""
    steps: int = 5000
    batch: int = 42
    accum: int = 16                            # the public configs: 4 for B (with 10000 steps), 16 for L
    lr: float = 1e-5
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup: int = 3
    horizon: int = None                        # the end of the run
    clip: float = 1.0
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0                    # the understanding model is frozen
    lambda_t2i: float = 0.0
    guidance_scale: float = None               # of the sampler; None: its own default

DEFAULT = "openuni-b-512"
RECIPES = {DEFAULT: Recipe(), "openuni-l-512": Recipe(batch=20), "openuni-l-1024": Recipe(batch=20),
           "tiny": Recipe(steps=150, batch=32, accum=1, lr=1e-3, weight_decay=0.0, warmup=20, horizon=0,
                          guidance_scale=2.0)}
RECIPES |= {"openuni-b-reca": RECIPES["openuni-b-512"], "openuni-reca": RECIPES["openuni-l-512"]}

# ==== 2. The model ====================================================================================
# InternVL3, SANA and DC-AE come from transformers and diffusers, which compute exactly what the released code computes
# (tests/test_openuni.py). Ours: the connector, the projector, the queries, and the cut between prompt and queries.

class ConnectorLayer(nn.Module):
    """Pre-norm transformer layer in which all queries see all queries: no mask, no positions. [B, Q, D] -> [B, Q, D]"""

    def __init__(self, width, heads, intermediate):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(width, width) for x in ("k", "v", "q", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, intermediate), "fc2": nn.Linear(intermediate, width)})

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{x}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)       # [B, Q, D]
        x = x + self.self_attn["out_proj"](y)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](F.gelu(y, approximate="tanh"))

class PrefixCache(DynamicCache):
    """Keys and values of the prompt, written once. With `read_only` set, it returns [prompt's, queries'] and does not
    keep the queries', so that activation checkpointing can run the layers again on the same cache."""

    def __init__(self):
        super().__init__()
        self.read_only = False
        self.prompt = {}        # {number of the layer: (keys, values)}

    def update(self, keys, values, layer_idx, *args, **kwargs):                   # [B, kv heads, tokens, head dim]
        if not self.read_only:
            self.prompt[layer_idx] = keys, values
            return keys, values
        prompt_keys, prompt_values = self.prompt[layer_idx]
        return torch.cat([prompt_keys, keys], dim=2), torch.cat([prompt_values, values], dim=2)

class OpenUni(nn.Module):
    """The parts in the picture on top of the file, under the released names, with random weights and no tokenizer:
    `lmm` (InternVL3) and `vae` (DC-AE), frozen; `meta_queries`, `connector`, `projector` and `transformer` (SANA)."""
    base_overrides = {}                                      # --lmm, --sana, --vae: see from_pretrained
    # The heads. SANA's patches enter through a convolution.
    unquantized = ("vae.", "lmm.lm_head", "transformer.proj_out")

    def __init__(self, config):
        super().__init__()
        c, self.config = config, config
        self.lmm = InternVLForConditionalGeneration(InternVLConfig(**c.lmm)).requires_grad_(False)
        self.vae = AutoencoderDC.from_config(c.vae).requires_grad_(False)
        width = self.lmm.config.text_config.hidden_size                                                           # D
        self.meta_queries = nn.Parameter(torch.randn(c.num_queries, width) / math.sqrt(width))
        # No norm after the last layer: SANA normalises its condition itself.
        layers = [ConnectorLayer(width, c.connector_heads, c.connector_intermediate) for _ in range(c.connector_layers)]
        self.connector = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.projector = nn.Linear(width, c.sana["caption_channels"])
        self.transformer = SanaTransformer2DModel.from_config(c.sana)
        self.tokenizer = None                                # set_tokenizer; what takes ids does without
        self.set_und()

    def set_und(self, size=None, blur=None):
        """The paper's ablations of what is understood. size: pixels a side for the ViT (fewer image tokens; its
        positions are interpolated); blur: shrink by this factor and enlarge again. The target stays as it is."""
        vision = self.lmm.config.vision_config
        step = 2 * vision.patch_size[0]
        if size and size % step:
            raise InputError(f"--und-size {size}: OpenUni's understanding encoder takes multiples of {step}")
        common.check_blur(blur, self.config.image_size)
        self.und_size, self.und_blur = size or vision.image_size[0], blur
        self.image_tokens = (self.und_size // step) ** 2     # N: the ViT's patches are merged 2x2

    def train(self, mode=True):
        super().train(mode)
        self.lmm.eval()                                      # frozen parts: no dropout, whatever their configs say
        self.vae.eval()
        return self

    @property
    def device(self):
        return self.meta_queries.device

    def _apply(self, function, recurse=True):
        """What is behind .to(...). The table of the rotary positions is in no checkpoint and stays float32 (the
        original's bf16 turns distant positions by some tenths of a radian; InternVL itself was trained with an exact
        one). DC-AE norms over channels: with the channels last it needs no transposes."""
        super()._apply(function, recurse)
        self.vae.to(memory_format=torch.channels_last)
        with torch.device(self.device):
            llm = self.lmm.model.language_model
            llm.rotary_emb = Qwen2RotaryEmbedding(llm.config)
        return self

    def blocks(self):
        """The repeated layers that are trained or have a graph, for torch.compile and activation checkpointing."""
        return [*self.lmm.model.language_model.layers, *self.connector["layers"], *self.transformer.transformer_blocks]

    def parameter_groups(self, weight_decay):
        """AdamW groups of what is trained. The original's rule: tensors with two or more dimensions decay, so the
        queries and SANA's modulation tables as well."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]

    def preprocess(self, image, task, rng=None):
        """A PIL RGB image -> {"pixels": uint8 [3, S, S]}, as the original's data sets do it. "recon" and
        "t2i": square crop along the long side, from rng (a numpy Generator) or central; "i2t": stretched to a square.
        None, a conversation without an image, gives {}."""
        if image is None:
            return {}
        size = self.config.image_size
        image = image.resize((size, size)) if task == "i2t" else common.random_square(image, size, rng)
        return {"pixels": common.to_uint8(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """All that is frozen and does not depend on the prompt: samples of preprocess -> dicts, which --cache stores.
            und      [N, D]      InternViT features after mlp1      "recon", "i2t"    256 x 896 in bf16: 459 kB (L: 786)
            latents  [C, h, w]   DC-AE latents x scaling, float32   "recon", "t2i"    32 x 16 x 16: 33 kB
        In the encoders' own precision, not in autocast's: DC-AE sums its linear attention in float32. Keys and values
        of the image's tokens (the same for all templates, which stand behind it) would be next, but are not stored:
        3.2 MB an image (L: 7.5), seven times the rest, save an eighth of the arithmetic that is left."""
        features = [{} for _ in samples]
        seen = [row for row, sample in zip(features, samples) if sample]
        if seen:
            pixels = [common.normalize(sample["pixels"].to(self.device)) for sample in samples if sample]
            pixels = torch.stack(pixels)                                                                 # [B, 3, S, S]
            for name, other, encoder in (("und", "i2t", self._und), ("latents", "t2i", self._latents)):
                if task in ("recon", other):
                    for row, value in zip(seen, encoder(pixels)):
                        row[name] = value
        return features

    def _vit_input(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> [B, 3, und_size, und_size] with ImageNet's mean and deviation. Resized without
        antialiasing: 512 -> 448 px loses a little by that, but so it was trained."""
        pixels = common.blur(pixels, self.und_blur) if self.und_blur else pixels
        # Channel by channel, with Python's numbers: a tensor of three would be a copy for which the host waits.
        planes = []
        for plane, mean, std in zip(pixels.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
            planes.append(((plane + 1) / 2 - mean) / std)
        return F.interpolate(torch.stack(planes, dim=1), self.und_size, mode="bilinear")

    def _und(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> understanding embeddings [B, N, D]: last ViT layer without the class token, 2x2
        neighbours joined (1024 -> 256 tokens), two-layer MLP."""
        with torch.autocast(self.device.type, enabled=False):
            seen = self._vit_input(pixels).to(self.lmm.dtype)
            return self.lmm.model.get_image_features(seen, return_dict=True).pooler_output

    def _latents(self, pixels):
        """[B, 3, S, S] in [-1, 1] -> [B, C, h, w] float32. Deterministic: DC-AE has no posterior to draw from. Four
        images fill a GPU; the 128 channels at 512 px of a whole batch would be the peak of memory, here and below."""
        with torch.autocast(self.device.type, enabled=False):
            latents = torch.cat([self.vae.encode(x.to(self.vae.dtype)).latent for x in pixels.split(4)])
            return latents.float() * self.vae.config.scaling_factor

    def _pixels(self, latents):
        """[B, C, h, w] -> [B, 3, S, S], about in [-1, 1]."""
        with torch.autocast(self.device.type, enabled=False):
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            return torch.cat([self.vae.decode(z).sample.float() for z in latents.split(4)])

    def _query_states(self, prompt, mask):
        """Prompt [B, L, D], mask [B, L] -> the language model's output at the queries [B, Q, D], after its final norm.

        Two passes. The prompt cannot see the queries behind it (causal attention) and all weights
        are frozen, so it runs without a graph and leaves its keys and values; then the queries run
        with one. Same numbers as the original's one pass over L+Q tokens, for less than half of its
        activations and of its backward pass.
        """
        llm = self.lmm.model.language_model
        cache = PrefixCache()
        L = prompt.shape[1]
        mask = F.pad(mask.bool(), (0, self.config.num_queries), value=True)                                  # [B, L+Q]
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)             # they skip padding, on either side of a prompt
        # Who sees whom, written out: of a mask of padding, transformers asks the device whether it is all true, and waits.
        places = torch.arange(mask.shape[1], device=mask.device)
        seen = (places <= places[:, None]) & mask[:, None]                                             # [B, L+Q, L+Q]
        seen = seen | (places == places[:, None])                        # padding sees itself, or it would be NaN
        with torch.no_grad():
            llm(inputs_embeds=prompt, attention_mask=seen[:, None, :L, :L], position_ids=positions[:, :L],
                past_key_values=cache, use_cache=False)
        cache.read_only = True
        queries = self.meta_queries.to(prompt.dtype).expand(len(prompt), -1, -1)                            # [B, Q, D]
        return llm(inputs_embeds=queries, attention_mask=seen[:, None, L:], position_ids=positions[:, L:],
                   past_key_values=cache, use_cache=False).last_hidden_state

    def _condition(self, ids, mask, und=None):
        """Prompts [B, L] and understanding embeddings [B, N, D] or None -> what SANA is conditioned on, [B, Q, T]."""
        mask = common.to_device(mask, self.device)
        states = self._query_states(self._embed(ids, und), mask).to(self.projector.bias.dtype)
        return self.projector(self.connector["layers"](states))

    def _velocity(self, latents, condition, t):
        """SANA: noisy latents [B, C, h, w], condition [B, Q, T], t [B] in 0..1000 -> velocity [B, C, h, w], float32."""
        dtype = self.transformer.proj_out.weight.dtype
        return self.transformer(latents.to(dtype), encoder_hidden_states=condition.to(dtype), timestep=t,
                                return_dict=False)[0].float()

    # ==== 3. Loading and saving (what reads files, sizes and names stands below the class) ============
    # Released files hold what was trained, under the names of this class's own attributes:
    #   text2image23m    meta_queries, connector.*, projector.*               (SANA was frozen)
    #   blip3o60k, RecA  the same and transformer.*
    #   whole models     all parts, lmm.* under the names of InternVL's original code
    # What they lack comes from its own hub repository. InternVL is there twice, original (OpenGVLab/InternVL3-1B) and
    # converted for transformers (-hf): the same numbers under other names, and both load.

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, bases=None, quantize=None):
        """A model in eval mode with its tokenizer. source: a name in RELEASED, a hub repository or folder (:FILE where
        there are several), a file, or "tiny". bases: {"lmm": ..., "sana": ..., "vae": ...}, hub ids or folders to use
        instead of those that the checkpoint names. quantize: None or "int8", before anything is on the device. Every
        key must fit, or InputError names what does not."""
        if source == "tiny":
            source = common.tiny_folder("openuni")
        path = common.find_checkpoint(
            str(source), RELEASED | RECA, WEIGHT_FILES, ["*.json"], ["meta_queries"]
        )
        state = dict(common.load_state(path))
        settings = read_settings(path, state)
        for part, base in (bases or cls.base_overrides).items():
            local = Path(base).expanduser()
            settings["bases"][part] = str(local.resolve()) if local.is_dir() else str(base)
        parts = {key.split(".")[0] for key in state}
        config, folders = read_bases(settings, path.parent, need_sana="transformer" not in parts)
        homes = {"transformer": folders["sana"] / "transformer", "vae": folders["vae"], "lmm": folders["lmm"]}
        for part in homes.keys() - parts:
            weights = common.find_weights(homes[part], "model.safetensors", "diffusion_pytorch_model.safetensors",
                                          "pytorch_model.bin", "diffusion_pytorch_model.bin")
            state |= {f"{part}.{key}": value for key, value in weights.items()}
        lmm = internvl_to_transformers({key[4:]: state.pop(key) for key in list(state) if key.startswith("lmm.")})
        with torch.device("meta"):                           # drawing 4 billion random numbers would take a minute
            model = cls(config)
        model.to(dtype).to_empty(device="cpu" if quantize else device)
        common.load_strictly(model, state | {f"lmm.{key}": value for key, value in lmm.items()}, str(path))
        model.set_tokenizer(common.load_tokenizer(folders["lmm"]))
        return common.quantize(model, quantize).to(device).eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """Random weights at a size in CONFIGS, made on the device, and a stand-in tokenizer: for tiny and --bench."""
        if name not in CONFIGS:
            raise InputError(f"no such size: {name} (there are {', '.join(CONFIGS)})")
        tokenizer, config = common.tiny_tokenizer(MARKERS), CONFIGS[name]
        if name == "tiny":
            text = config.lmm["text_config"] | {"vocab_size": len(tokenizer)}
            config = replace(config, lmm=config.lmm | {"text_config": text})
        with torch.device(device):
            model = cls(config).to(device)
        model.set_tokenizer(tokenizer)
        return model.eval()

    def save_pretrained(self, folder):
        """Writes openuni.pth, a flat dict with the released key list that the original loads, and config.json, which
        names the frozen parts' hub repositories (2 GB that everybody has are not copied). Parts without a repository
        (`tiny`) are saved beside them, in their libraries' layouts: lmm/, sana/, vae/."""
        folder, bases = Path(folder), self.config.bases
        with common.atomic(folder / "openuni.pth") as path, open(path, "wb") as stream:
            torch.save(self.released_state(), stream)        # to a path, torch would store that path, too
        if "lmm" not in bases:
            self.lmm.config.save_pretrained(folder / "lmm")
            with common.atomic(folder / "lmm" / "model.safetensors") as path:
                save_file({key: value.contiguous() for key, value in self.lmm.state_dict().items()}, path)
            self.tokenizer.save_pretrained(folder / "lmm")
        if "vae" not in bases:
            self.vae.save_pretrained(folder / "vae")
        if "sana" not in bases:                              # its weights are in openuni.pth
            self.transformer.save_config(folder / "sana" / "transformer")
            DPMSolverMultistepScheduler.from_config(self.config.scheduler).save_config(folder / "sana" / "scheduler")
        common.write(folder / "config.json", {"model_type": "openuni", **own_settings(self.config)})

    def released_state(self):
        """The flat dict of a released file that was trained with SANA: queries, connector, projector, transformer."""
        return {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith(("lmm.", "vae."))}

    def set_tokenizer(self, tokenizer):
        """It says which id stands for an image's embeddings. InputError if it does not know InternVL's markers."""
        unknown = [t for t in MARKERS if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)]
        if unknown:
            raise InputError(f"this tokenizer is not InternVL's: it lacks {' '.join(unknown)}")
        self.tokenizer, self.lmm.config.image_token_id = tokenizer, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")

    # ==== 4. The embedding-conditioned prompt =========================================================
    # RecA asks for a reconstruction in the words in which the model is asked for a description, and opens the answer
    # with <img>, the token behind which it has learned to generate. There is no system turn. The queries follow.

    def recon_prompt(self, template):
        """The ids of RecA's prompt: image tokens, template, and an answer that begins with <img>."""
        return self._tokens(self._turn(template) + "<img>")

    def t2i_prompt(self, caption=None):
        """Text to image; without a caption, what guidance moves away from. Too long a caption is cut and the frame
        around it stays. (The original cuts off the turn's end and the <img> that asks for an image. Not followed.)"""
        text = "Generate an image." if caption is None else f"Generate an image: {caption.strip()}"
        ids, limit = self._tokens(self._turn(text, image=False) + "<img>"), self.config.max_caption_tokens
        tail = len(self._tokens("<|im_end|>\n<|im_start|>assistant\n<img>"))
        return ids if len(ids) <= limit else ids[:limit - tail] + ids[-tail:]

    def i2t_prompt(self, question, image=True):
        """The first turn of a conversation, with or without an image."""
        return self._tokens(self._turn(question, image))

    def conversation(self, turns, image=True):
        """[(question, answer), ...] -> ids and labels. Labels: the answers, each with its turn's end."""
        ids, labels = [], []
        for i, (question, answer) in enumerate(turns):
            asked = self.i2t_prompt(question, image and i == 0)
            answered = self._tokens(common.plain(answer, MARKERS) + "<|im_end|>")
            between = self._tokens("\n")
            ids += asked + answered + between
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(between)
        return ids, labels

    def _turn(self, text, image=True):
        image = "<img>" + "<IMG_CONTEXT>" * self.image_tokens + "</img>\n" if image else ""
        return (
            f"<|im_start|>user\n{image}{common.plain(text, MARKERS)}<|im_end|>\n<|im_start|>assistant\n"
        )

    def _tokens(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _pad(self, rows, value=0):
        """Lists of ids -> ids and mask [B, L], padded on the right, on the CPU. (The original pads RecA's prompts on the left: the
        same numbers, as positions follow the mask, but its first places have nothing to attend to.)"""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids, mask

    def _embed(self, ids, und=None):
        """Ids [B, L] and understanding embeddings [B, N, D] -> [B, L, D]: `und` fills the <IMG_CONTEXT> places in
        order. ValueError if their number differs."""
        places = ids == self.lmm.config.image_token_id                                                      # [B, L]
        if und is not None and places.sum() != und.shape[0] * und.shape[1]:     # counted on the CPU
            raise ValueError(f"{int(places.sum())} image tokens in the prompts, {len(und)} x {und.shape[1]} embeddings")
        ids, places = common.to_device([ids, places], self.device)
        embeds = self.lmm.get_input_embeddings()(ids)
        if und is None:
            return embeds
        return embeds.masked_scatter(places[..., None], und.to(embeds.dtype))

    # ==== 5. The losses ===============================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA: the image from its own understanding embeddings (paper, equation 2).

        features: B dicts of encode, templates: B instructions -> scalar, the mean over images,
        channels and places. draws: see draw.
        """
        draws = draws or self.draw("recon", features, rng)
        ids, mask = self._pad([self.recon_prompt(template) for template in templates])
        und = torch.stack([row["und"] for row in features])
        return self._generation_loss(features, ids, mask, draws, und)

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image, otherwise as recon_loss: for supervised fine-tuning; in RecA itself
        lambda_t2i = 0. A tenth of the captions is dropped, to train what guidance moves away from."""
        draws = draws or self.draw("t2i", features, rng)
        rows = [self.t2i_prompt(None if dropped < TEXT_DROP else caption)
                for dropped, caption in zip(draws["drop"].tolist(), captions)]
        return self._generation_loss(features, *self._pad(rows), draws)

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text: cross-entropy of the answers in B conversations, lists of (question, answer), about an image
        each, or none where features has {} -> scalar, the mean over all answer tokens. Nothing is drawn. A measure and
        no training signal: no trained parameter has a part in it."""
        ids, labels = zip(*(self.conversation(turns, bool(row)) for row, turns in zip(features, conversations)))
        (ids, mask), (labels, _) = self._pad(ids), self._pad(labels, IGNORED)
        und = [row["und"] for row in features if row]
        embeds = self._embed(ids, torch.stack(und) if und else None)

        # The state before a token predicts it; logits only for answers, whose places are found on the CPU.
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)                        # [answers' tokens] each
        targets = labels[row, column + 1]
        count = len(targets)
        mask, row, column, targets = common.to_device([mask, row, column, targets], self.device)
        llm = self.lmm.model.language_model
        states = llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state          # [B, L, D]
        logits = self.lmm.lm_head(states[row, column]).float()                                 # [answers' tokens, ids]
        return common.mean(F.cross_entropy(logits, targets, reduction="sum"), count)

    def draw(self, task, features, rng=None):
        """The random numbers of recon_loss and t2i_loss: "noise" [B, C, h, w], standard normal; "u" [B], uniform on
        [0, 1), for the noise level; t2i also "drop" [B], uniform, for leaving the caption out."""
        if task == "i2t":
            return {}
        rng = rng or Rng.fresh(len(features))
        drop = {"drop": rng.uniform()} if task == "t2i" else {}
        return drop | {"noise": rng.normal(*features[0]["latents"].shape), "u": rng.uniform()}

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: images (their latents are of one size), or tokens of answers."""
        if task != "i2t":
            return len(features)
        labels = [label for turns in texts for label in self.conversation(turns, image=False)[1]]
        return sum(label != IGNORED for label in labels)

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: the longest template."""
        size = self.config.image_size
        samples = [{"pixels": torch.zeros(3, size, size, dtype=torch.uint8)}] * count
        words = "word " * 200
        texts = {"recon": max(common.templates(), key=len), "t2i": words, "i2t": [(words, words)]}
        return samples, [texts[task]] * count, {}

    def _generation_loss(self, features, ids, mask, draws, und=None):
        """Flow matching, given prompts [B, L] and und [B, N, D] or None. x_σ = (1-σ) x + σ ε; SANA is told 1000 σ and
        predicts the velocity dx_σ/dσ = ε - x; mean squared error, all noise levels alike. (The original mixes in bf16,
        which rounds σ by up to 0.4% but not the time that SANA is told. Not followed: it is noise in the target.)"""
        x = torch.stack([row["latents"] for row in features])                                       # [B, C, h, w]
        noise, u = common.to_device([draws["noise"], draws["u"]], self.device)                      # ε, like x
        noise = noise.to(x.dtype)
        sigma = self._sigmas(u.to(x.dtype)).view(-1, 1, 1, 1)
        condition = self._condition(ids, mask, und)                                                 # [B, Q, T]
        velocity = self._velocity((1 - sigma) * x + sigma * noise, condition, 1000 * sigma.flatten())
        return (velocity - (noise - x)).square().mean()

    @staticmethod
    def _sigmas(u):
        """u [B], uniform on [0, 1) -> noise levels [B], uniform on {1, 0.999, ..., 0.001}."""
        return (1000 - (1000 * u).floor()) / 1000

    # ==== 6. Inference ================================================================================

    @torch.no_grad()
    def generate(self, prompts, *, guidance_scale=4.5, **settings):
        """Text to image: prompts -> PIL images, in one batch.
        seed      one for each image, or a number s: image i has seed s + i. An image does not depend on its batch
        draws     all random draws, for a replay: {"latents" [B, C, h, w]} standard normal
        settings  num_steps=20, guidance_scale=4.5 (1: none), negative_prompt=None (what to move away from), progress"""
        condition = self._condition(*self._pad([self.t2i_prompt(prompt) for prompt in prompts]))
        return self._paint_images(condition, guidance_scale, **settings)

    @torch.no_grad()
    def reconstruct(self, images, *, templates=None, guidance_scale=1.0, **settings):
        """Image to image, as generate: PIL images -> PIL images painted from nothing but their understanding. No
        guidance by default: RecA never drops the image, and the original's demonstration gives both branches the same
        image and words, which comes to the same."""
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        rows = [self.recon_prompt(template) for template in templates or [common.SEED_TEMPLATE] * len(images)]
        condition = self._condition(*self._pad(rows), torch.stack([row["und"] for row in features]))
        return self._paint_images(condition, guidance_scale, **settings)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, greedy, by the frozen InternVL3: PIL images and one question -> answers. One view of the whole
        image (InternVL's tiling of large images is not used here)."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        ids, mask = self._pad([self.i2t_prompt(question)] * len(images))
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        answers = self.lmm.generate(
            inputs_embeds=self._embed(ids, torch.stack([row["und"] for row in features])),
            attention_mask=mask.long().to(self.device),
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _paint_images(self, condition, guidance_scale, negative_prompt=None, num_steps=20, seed=0, draws=None,
                      progress=False):
        """Condition [B, Q, T] -> B PIL images. Guidance moves away from "Generate an image." or the negative prompt."""
        c, count = self.config, len(condition)
        if guidance_scale > 1:                               # one unconditional row serves all
            unconditional = self._condition(*self._pad([self.t2i_prompt(negative_prompt)]))
            condition = torch.cat([condition, unconditional.expand(count, -1, -1)])                       # [2B, Q, T]
        side = c.image_size // self.vae.spatial_compression_ratio
        shape = (self.vae.config.latent_channels, side, side)
        noise = draws["latents"] if draws else Rng.sampling(seed, count).normal(*shape)
        latents = self._sample(condition, noise.to(self.device), guidance_scale, num_steps, progress)
        return [common.to_pil(pixels) for pixels in self._pixels(latents)]

    def _sample(self, condition, noise, guidance_scale=1.0, num_steps=20, progress=False):
        """DPM-Solver++: noise [B, C, h, w] -> latents, float32. condition [B or 2B, Q, T], the last B unconditional
        rows where there is guidance, which acts on the velocity, before the solver makes a clean image of it. As in the
        original the network is told 1000 σ cut to an integer (first 999); the solver computes with the exact σ."""
        solver = DPMSolverMultistepScheduler.from_config(self.config.scheduler)
        solver.set_timesteps(num_steps, device=noise.device)
        latents, copies = noise.float(), len(condition) // len(noise)
        for t in tqdm(solver.timesteps, desc="sampling", disable=not progress, leave=False):
            velocity = self._velocity(latents.repeat(copies, 1, 1, 1), condition, t.expand(len(condition)))
            if copies == 2:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = solver.step(velocity, t, latents, return_dict=False)[0]
        return latents

# ==== 3, continued: files, sizes, names ===============================================================

def own_settings(config):
    """What a checkpoint's config.json says: all but the sizes of library classes, which their own files state."""
    return {k: v for k, v in asdict(config).items() if k not in ("lmm", "sana", "vae", "scheduler")}

def read_settings(path, state):
    """The settings (own_settings) of a checkpoint: from our config.json beside it, else those of the released model it
    must be. The width tells B from L; SANA 1.5 (in L-1024) has norms of q and k. Where SANA is not in the file, the
    key lists of L-512 and L-1024 are equal, and the file's name decides."""
    file = path.with_name("config.json")
    settings = common.read_object(file) if file.is_file() else {}
    if settings.pop("model_type", None) == "openuni":
        return settings
    if "meta_queries" not in state:
        raise InputError(f"{path} is not an OpenUni checkpoint: it has no meta_queries")
    width, has_sana = state["meta_queries"].shape[-1], "transformer.proj_out.weight" in state
    large = any(".norm_q." in key for key in state) if has_sana else "1024" in path.name
    for name in RELEASED:
        config = CONFIGS[name]
        if config.lmm["text_config"]["hidden_size"] == width and (config.image_size == 1024) == large:
            return own_settings(config)
    raise InputError(f"{path}: no released OpenUni has queries of width {width}; use a folder with a config.json")

def read_bases(settings, folder, need_sana):
    """A checkpoint's settings -> (OpenUniConfig with the sizes that the bases' own files state, {part: local folder}).
    Parts that settings["bases"] does not name lie in `folder`, beside the checkpoint. need_sana: its weights, too."""
    weights = [f"transformer/diffusion_pytorch_model{end}" for end in (".safetensors*", "-*.safetensors")] * need_sana
    patterns = {"lmm": ["*.json", "*.txt", "*.safetensors"], "vae": ["config.json", "*.safetensors"],
                "sana": ["transformer/config.json", "scheduler/*.json", *weights]}
    bases = settings["bases"]
    folders = {part: common.hub_folder(bases[part], wanted) if part in bases else folder / part
               for part, wanted in patterns.items()}
    files = {"vae": folders["vae"] / "config.json", "sana": folders["sana"] / "transformer" / "config.json",
             "scheduler": folders["sana"] / "scheduler" / "scheduler_config.json"}
    sizes = {
        part: {
            key: value for key, value in common.read_object(file).items() if not key.startswith("_")
        }
        for part, file in files.items()
    }
    try:
        return OpenUniConfig(lmm=internvl_sizes(folders["lmm"]), **sizes, **settings), folders
    except TypeError as error:
        raise InputError(f"config.json does not describe an OpenUni: {error}") from error

def internvl_sizes(folder):
    """Keyword arguments of InternVLConfig from a folder's config.json, converted (-hf) or original. The head is never
    tied here: whatever the file says, it is a matrix of its own, a copy where the checkpoint has none."""
    config, untied = common.read_object(folder / "config.json"), {"tie_word_embeddings": False}
    if "llm_config" not in config:                                                                       # converted
        ignored = ("architectures", "transformers_version", "dtype", "torch_dtype")
        sizes = {key: value for key, value in config.items() if key not in ignored}
        return sizes | untied | {"text_config": config["text_config"] | untied}
    vision, llm = config["vision_config"], config["llm_config"]
    kind = (bool(vision.get("qk_normalization")), vision.get("norm_type", "layer_norm"), config.get("select_layer", -1))
    if kind != (False, "layer_norm", -1):
        raise InputError(f"{folder}: an InternVL with a vision tower of another kind than InternVL3's")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes, side = internvl3(*(llm[name] for name in names)), config.get("force_image_size") or vision["image_size"]
    sizes["text_config"] |= {
        "vocab_size": llm["vocab_size"], "rms_norm_eps": llm.get("rms_norm_eps", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.get("rope_theta", 1000000.0)}}
    sizes["vision_config"] |= {name: vision[name] for name in names if name != "num_key_value_heads"} | {
        "image_size": [side] * 2, "patch_size": [vision["patch_size"]] * 2,
        "attention_bias": vision.get("qkv_bias", True), "layer_norm_eps": vision.get("layer_norm_eps", 1e-6)}
    return sizes

# InternVL's original names, and those of transformers.
INTERNVL_NAMES = {
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.": "model.vision_tower.embeddings.patch_embeddings.projection.",
    "vision_model.encoder.layers.": "model.vision_tower.encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.", ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1", ".ls2": ".lambda_2", "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.", "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model."}

def internvl_to_transformers(state):
    """InternVL's weights under the names of InternVLForConditionalGeneration. Takes the original names (whose q, k, v
    are one matrix), and both namings of converted repositories: theirs begin with "model." or, if older, do not."""
    out = {}
    for key, value in state.items():
        for original, ours in INTERNVL_NAMES.items():
            key = key.replace(original, ours)
        if key.startswith(("vision_tower.", "multi_modal_projector.")):
            key = "model." + key
        if ".attn.qkv." in key:                                                            # [3 Dv, Dv] or [3 Dv]
            out |= {key.replace(".attn.qkv.", f".attention.{n}_proj."): part for n, part in zip("qkv", value.chunk(3))}
        else:
            out[key] = value
    if "model.language_model.embed_tokens.weight" in out:                                  # a tied head may be left out
        out.setdefault("lm_head.weight", out["model.language_model.embed_tokens.weight"])
    return out

# ==== 7. main() =======================================================================================

def flags(parser):
    """What only this architecture has."""
    group = parser.add_argument_group("OpenUni only")
    for part, text in (("lmm", "InternVL3, original or converted (-hf)"), ("sana", "SANA"), ("vae", "DC-AE")):
        group.add_argument(
            f"--{part}",
            type=common.expanded,
            help=f"hub id or folder of {text} (default: what the checkpoint names)",
        )

def prepare(model, args):
    """Called before training. The frozen parts take the working precision once: autocast would cast their float32
    weights anew in every step (it remembers only those that are trained)."""
    if args.precision == "bf16":
        model.lmm.to(torch.bfloat16)
        model.vae.to(torch.bfloat16)
        model.to(model.device)                               # the rotary positions back to float32: see _apply
    return {}

def main():
    args = common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags)
    if args.lambda_i2t or args.i2t_data:
        raise InputError("OpenUni's understanding model is frozen, L_i2t trains nothing here: leave --lambda-i2t at 0")
    bases = {"lmm": args.lmm, "sana": args.sana, "vae": args.vae}
    OpenUni.base_overrides = {part: source for part, source in bases.items() if source}
    common.run(OpenUni, args, prepare)

if __name__ == "__main__":
    common.cli(main)
