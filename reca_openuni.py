r"""RecA for OpenUni: a frozen language model that sees, learnable queries, a generator that paints.

WHY. Models that generate images learn from captions, and captions are sparse: even hundreds of
words leave out most of the layout, the shapes and the attributes. Hardly any caption says that the
broccoli is green. So a model learns that broccoli is always green, and whoever asks for a yellow
broccoli gets a green one. The embeddings that a model's own understanding encoder computes from an
image are dense: they hold its colors and its layout, in the space in which the language model reads
words. RecA (Reconstruction Alignment, arXiv 2509.07295) therefore puts these embeddings into the
prompt, in the place of a caption, and trains the model to generate that very image. No caption is
read.

THE METHOD. Equations (2) and (3) of the paper, with what each symbol is in this file:

    (2)    L_recon = ℓ( f_θ(concat(t_template, h_v)), I_gt )
    (3)    L = λ_recon L_recon + λ_i2t L_i2t + λ_t2i L_t2i

    I_gt        the image, as the generator sees it: its latents x [C, h, w], made by the
                autoencoder DC-AE; `latents` in the code
    h_v         the same image, as the language model sees it: its understanding embeddings [N, D];
                `und` in the code
    t_template  the template, an instruction such as "Describe the image in detail.": one of 360
    concat      `recon_prompt` and `_embed`: one prompt, in which h_v stands in front of t_template
    f_θ         from this prompt to a velocity: `_condition`, `_velocity`
    θ           the trained weights: queries, connector, projector, SANA
    ℓ           flow matching. With noise ε and a noise level σ, uniform on {0.001, 0.002, ..., 1},
                SANA gets x_σ = (1 - σ) x + σ ε and σ, and predicts a velocity v:
                    ℓ = mean over all numbers of the latents of (v - (ε - x))²
    L_recon     `recon_loss`            λ_recon = 1
    L_i2t       `i2t_loss`, image to text, on answers about images. λ_i2t = 0 (see below)
    L_t2i       `t2i_loss`, text to image, from captions. λ_t2i = 0 in RecA; for comparison only

THIS ARCHITECTURE. OpenUni (arXiv 2505.23661) joins two finished models. InternVL3 understands; SANA
generates. Between them stand 256 learnable vectors, the *queries*. They are appended to any prompt
and run through the language model with it. What comes out in their places goes through a small
transformer, the *connector*, and one linear layer, the *projector*. The result is the *condition*:
SANA's cross-attention reads it in the place of the text for which SANA was made.

    image [3, 512, 512]
      │
      ├── resize to 448 ──> InternViT ──> 2x2 joined, mlp1 ──> und [256, D]        frozen
      │                                                         │
      │          <|im_start|>user\n<img> und </img>\n{template}<|im_end|>\n        prompt [L, D]
      │          <|im_start|>assistant\n<img>                   │
      │                                                         │
      │          Qwen2.5, no graph ──> keys and values of all layers               frozen
      │                                                         │
      │          queries [256, D] ──> Qwen2.5, with graph ──> states [256, D]      queries trained
      │                                                         │
      │          connector, 6 layers ──> projector ──> condition [256, 2304]       trained
      │                                                         │
      └── DC-AE, stride 32 ──> x [32, 16, 16] ──> x_σ ──> SANA ──> v [32, 16, 16]   SANA trained

Words like <img> are *markers*: single tokens of the vocabulary that say where an image or a turn
begins and ends. Qwen2.5 is frozen and its attention is causal, so nothing in front of the queries
depends on anything trained. The prompt therefore runs without a graph and leaves only keys and
values; the backward pass touches the 256 queries and none of the prompt's tokens.

WHAT IS TRAINED, AND WHY. Frozen are InternVL3 as a whole (InternViT, mlp1, Qwen2.5) and DC-AE.
Trained are the queries, the connector, the projector and SANA. In B-512 these are 646M parameters,
beside InternVL3's 938M: 1.6B in all, which is the paper's name for it. In L-512 they are 1830M
beside 2089M: 3.9B, which the paper calls 3.6B. DC-AE, in neither sum, has 312M. The paper draws the
line between understanding and generation wherever a model allows it (section 2.2): what understands
stays as it is, and what generates learns to read it. In OpenUni all of InternVL3 understands, and
the generator behind it has weights of its own, so nothing stands on both sides of the line.
Gradients flow through Qwen2.5 to the queries and leave its weights alone. DC-AE is frozen because
it makes the targets.

HOW LARGE UNDERSTANDING SEES THE IMAGE, AND WHY NOT LARGER. 448 x 448 pixels, in one view: 1024
patches, joined to 256 embeddings. That is InternViT's native size, and the paper's choice for
OpenUni (other sizes need interpolated positions: --und-size). More pixels would leave more
pixel-level detail in the embeddings, and the model would learn to copy that in place of reading
their meaning. (Paper, section 2.2. Its Table 7 measures it on BAGEL, where a larger input gains
less.) --und-size and --blur are for such ablations.

WHAT KEEPS UNDERSTANDING ALIVE. That it is frozen: after RecA, InternVL3 gives the same answers as
before. Hence λ_i2t = 0, no image-to-text data is needed, and a --lambda-i2t above 0 is refused.
A run never calls `i2t_loss`; it is there for whoever imports this file. (Show-o and Harmon share
weights between the two tasks and need L_i2t. Without data for it, their scripts first let the model
describe as many of its own training images as --self-captions says. That is ours and not the
paper's.)

INFERENCE IS UNCHANGED by RecA: the same prompt, "Generate an image: {caption}", no image in it, the
same queries, the same sampler with the same settings. Only the weights differ. Why does it help to
learn behind "Describe the image ..."? Both prompts end with <img> and the same queries, and the
frozen language model reads words and embeddings in one space: what a caption names and what an
image shows lead to the same kind of states at the queries. (Paper, appendix D: in the deeper layers
the features of words and of images align.) What connector, projector and SANA learn to make of such
states, and the queries to gather, therefore holds for captions as well.

A STEP is one evaluation of equation (3), an UPDATE moves the weights, a MICRO-BATCH is as many
images of a step as fit on the GPU at once (`Trainer.take_step` in common.py):

    crops = a square crop of each of `batch` images, 512 x 512, each with one of 360 templates
    for micro_batch in crops:
        pixels = its crops, on the GPU, in [-1, 1]
        und = mlp1(InternViT(resize(pixels, 448)))                                     # frozen
        latents = DC-AE(pixels)                                                        # frozen
        σ, ε = a noise level and noise for each image
    for micro_batch in crops:
        keys_values = Qwen2.5(prompt(und, template))                                   # frozen
        condition = projector(connector(Qwen2.5(queries, keys_values)))
        v = SANA((1 - σ) latents + σ ε, condition, 1000 σ)
        loss = mean((v - (ε - latents))²)
        (λ_recon loss share / accum).backward()       # share: its part of the step's images
    in every accum-th step, an update: clip the gradients, AdamW, gradients to zero

A WORKED EXAMPLE. B-512 (D = 896), the template "Describe the image in detail.":

    tokens                                        number    positions    in the language model
    <|im_start|> user \n                               3        0-2      word embeddings
    <img>                                              1          3      word embedding
    the image                                        256      4-259      und, from mlp1
    </img> \n                                          2    260-261      word embeddings
    Describe the image in detail .                     6    262-267      word embeddings
    <|im_end|> \n <|im_start|> assistant \n            5    268-272      word embeddings
    <img>                                              1        273      word embedding
    queries                                          256    274-529      trained vectors
                                                     530

A token sees itself and what stands before it: the image sees no template, the prompt sees no query,
a query sees the whole prompt and the queries before it. In a batch, shorter prompts are padded on
the right, so padding stands between prompt and queries; no other token sees it, and positions skip
it. In the connector all 256 queries see each other. In SANA the 16 x 16 = 256 places of the latents
see each other and all 256 vectors of the condition.

THE ORIGINAL, here and in comments, is RecA's public repository, which contains OpenUni's code; its
config files are "the public config". Followed, though they surprise, because the released weights
were trained and are sampled so: noise levels have shift 1 in training, by accident, and 3 in
sampling (`SCHEDULER`); the image for InternViT is normalised before it is resized, and not
antialiased (`_vit_input`); in sampling, SANA is told 1000 σ cut to an integer (`_sample`). Not
followed: it runs the prompt with a graph (`_query_states`) and pads RecA's prompts on the left
(`_pad`), for the same numbers; it rounds σ (`_add_noise`) and the rotary table (`_apply`) to bf16;
it cuts long text-to-image prompts at the end (`t2i_prompt`). docs/originals.md has the rest.

WHERE THE NUMBERS COME FROM. The paper's Table 8: learning rate, weight decay, warm-up, steps,
accumulation (the public config has two other numbers for B: see `Recipe`), batch and λ. The public
config and code: AdamW's betas and eps, clipping, the cosine, the image size, the sizes of connector
and queries, how σ is drawn, the limit of a text-to-image prompt, the tenth of captions that
`t2i_loss` leaves out, and the sampler's 20 steps with guidance 4.5. The models' own files on the
hub: all sizes of InternVL3, SANA and DC-AE. Ours: `tiny` and its recipe, the wording of the
templates, no guidance in `reconstruct`, and the recipe of L-1024, which has no column in Table 8.
The paper reports GenEval 56.0 -> 70.4 for B-512 and 61.9 -> 74.1 for L-512 (its tables 2 and 10).

What L_recon looks like while it goes well: it falls slowly and is noisy, since most of it is noise
that nobody can predict and since it depends on the drawn noise levels. The tiny run (seed 0), means
of steps 1-25, 26-50, 51-75, 76-100 and 126-150: 0.203, 0.228, 0.204, 0.180, 0.126. Meanwhile the
colors of text to image go from 14 to 100 percent.

COMMANDS. OpenUni's weights are under the S-Lab License 1.0: for non-commercial use only.

    python reca_openuni.py --model tiny                                 no downloads, CPU, minutes
    python reca_openuni.py --data ./images                              B-512, the paper's 1.6B
    python reca_openuni.py --data ./images --model openuni-l-512        L-512, the paper's 3.6B
    python reca_openuni.py --model RUN --steps 0 --generate prompts.txt

RUN is the folder of a run, and stands for its newest checkpoint.

READ IT IN THIS ORDER: `recon_loss` in section 5, which is RecA from features to loss; section 4,
its prompt; in section 2, `_query_states`, the cut between prompt and queries; `_sample` in section
6. Sections 1 and 3, sizes and files, can wait.

Legend of the shape comments: B images, S pixels a side, D width of the language model, L prompt
tokens (in L_recon, L_i2t and L_t2i a loss), N image tokens among them, Q queries, T channels of
SANA's condition, C latent channels, h x w latent grid (S / 32), A tokens of answers.
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


# ==== 1. Sizes and hyper-parameters ===============================================================


@dataclass
class OpenUniConfig:
    """The sizes of all parts. The four dicts are keyword arguments of library classes, in the form
    of their config.json."""
    lmm: dict  # transformers.InternVLConfig: InternVL3, the "large multimodal model"
    sana: dict  # diffusers.SanaTransformer2DModel
    vae: dict  # diffusers.AutoencoderDC
    scheduler: dict  # diffusers.DPMSolverMultistepScheduler, for sampling
    connector_layers: int = 6
    connector_heads: int = 14
    connector_intermediate: int = 3072
    num_queries: int = 256
    # S: the side of what is encoded by DC-AE, generated and shown. It is that of SANA's checkpoint.
    image_size: int = 512
    # The limit of a text-to-image prompt as a whole, caption and markers, as in the original's data
    # sets.
    max_caption_tokens: int = 128
    # Where the frozen parts come from: {"lmm": hub id, "sana": hub id, "vae": hub id}.
    bases: dict = field(default_factory=dict)

    # The sampler's defaults.
    num_steps: int = 20
    guidance_scale: float = 4.5
    # Ours: reconstructions need no guidance, see reconstruct.
    reconstruct_guidance_scale: float = 1.0

    def own_settings(self):
        """What a checkpoint's config.json holds: all but the four dicts, which stand in the files
        of the parts themselves."""
        settings = asdict(self)
        for part in ("lmm", "sana", "vae", "scheduler"):
            del settings[part]
        return settings


def internvl3(width, layers, heads, kv_heads, intermediate):
    """InternVL3: InternViT-300M at 448 px and a Qwen2.5 language model whose output head is a
    matrix of its own. (The published config also scales the rotary positions, but only beyond 32768
    of them; no prompt here has 1000.)"""
    return dict(
        image_token_id=151667,
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        vision_config=dict(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            image_size=[448, 448],
            patch_size=[14, 14],
            attention_bias=True,
            use_qk_norm=False,
        ),
        text_config=dict(
            model_type="qwen2",
            vocab_size=151674,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
    )


def dc_ae(
    channels=(128, 256, 512, 512, 1024, 1024),
    head_dim=32,
    encoder_layers=(2, 2, 2, 3, 3, 3),
    decoder_layers=(3, 3, 3, 3, 3, 3),
    latent_channels=32,
    scaling_factor=0.41407,
    residual_levels=3,
):
    """DC-AE, by default the one of SANA: residual blocks in the finer levels, linear attention in
    the coarser ones. Each level halves the side of the one before: six of them make 1/32."""
    attention_levels = len(channels) - residual_levels
    block_types = ["ResBlock"] * residual_levels + ["EfficientViTBlock"] * attention_levels
    scales = [[]] * residual_levels + [[5]] * attention_levels
    return dict(
        latent_channels=latent_channels,
        attention_head_dim=head_dim,
        scaling_factor=scaling_factor,
        encoder_block_types=block_types,
        encoder_block_out_channels=list(channels),
        encoder_layers_per_block=list(encoder_layers),
        encoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        decoder_block_types=block_types,
        decoder_block_out_channels=list(channels),
        decoder_layers_per_block=list(decoder_layers),
        decoder_qkv_multiscales=scales,
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        upsample_block_type="interpolate",
    )


def sana(
    heads,
    layers,
    cross_heads,
    cross_head_dim,
    head_dim=32,
    channels=32,
    caption_channels=2304,
    sample_size=16,
    mlp_ratio=2.5,
    qk_norm=None,
):
    """SANA. It has no position embedding: its 3x3 convolutions tell places apart. sample_size, in
    diffusers' words, is the side of the latents."""
    return dict(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=cross_head_dim,
        cross_attention_dim=cross_heads * cross_head_dim,
        caption_channels=caption_channels,
        mlp_ratio=mlp_ratio,
        sample_size=sample_size,
        patch_size=1,
        qk_norm=qk_norm,
    )


# The sampler in the released SANA folders: DPM-Solver++(2M) on the noise levels of flow matching,
# shifted towards noise by a factor of 3.
#
# Training uses shift 1, by an accident of the original that this file must follow: it builds its
# training scheduler, which is of another class, from this same file. That class calls the shift
# "shift" and not "flow_shift", does not find it, and takes its default of 1. All released weights
# were trained so. Hence `_sigmas` in section 5 draws noise levels without a shift.
SCHEDULER = dict(
    algorithm_type="dpmsolver++",
    solver_order=2,
    solver_type="midpoint",
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=3.0,
    final_sigmas_type="zero",
    lower_order_final=True,
    num_train_timesteps=1000,
)


def hub_bases(lmm, sana):
    """The hub repositories of the frozen parts, and of the SANA from which OpenUni starts."""
    return {
        "lmm": f"OpenGVLab/{lmm}-hf",
        "sana": f"Efficient-Large-Model/{sana}_diffusers",
        "vae": "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    }


B_512 = OpenUniConfig(
    lmm=internvl3(width=896, layers=24, heads=14, kv_heads=2, intermediate=4864),
    sana=sana(heads=36, layers=28, cross_heads=16, cross_head_dim=72),
    vae=dc_ae(),
    scheduler=SCHEDULER,
    bases=hub_bases("InternVL3-1B", "Sana_600M_512px"),
)
L_512 = OpenUniConfig(
    lmm=internvl3(width=1536, layers=28, heads=12, kv_heads=2, intermediate=8960),
    sana=sana(heads=70, layers=20, cross_heads=20, cross_head_dim=112),
    vae=dc_ae(),
    scheduler=SCHEDULER,
    connector_heads=24,
    connector_intermediate=8960,
    bases=hub_bases("InternVL3-2B", "Sana_1600M_512px"),
)
# SANA 1.5 normalises queries and keys across the heads, in both of its attentions.
L_1024 = replace(
    L_512,
    sana=sana(
        heads=70,
        layers=20,
        cross_heads=20,
        cross_head_dim=112,
        sample_size=32,
        qk_norm="rms_norm_across_heads",
    ),
    image_size=1024,
    bases=hub_bases("InternVL3-2B", "SANA1.5_1.6B_1024px"),
)

# A 32 px image is 4 x 4 image tokens for a two-layer ViT, and 4 x 4 latents of a DC-AE of stride 8.
# Its size is our choice, as is its guidance of 2, in reconstructions as well: see reconstruct.
TINY = OpenUniConfig(
    lmm=dict(
        internvl3(width=96, layers=3, heads=4, kv_heads=2, intermediate=256),
        image_seq_length=16,
        vision_config=dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=[32, 32],
            patch_size=[4, 4],
            attention_bias=True,
            use_qk_norm=False,
        ),
    ),
    sana=sana(
        heads=3,
        layers=4,
        cross_heads=4,
        cross_head_dim=24,
        channels=16,
        caption_channels=96,
        sample_size=4,
        mlp_ratio=2.0,
    ),
    vae=dc_ae(
        channels=(12, 24, 48, 48),
        head_dim=16,
        encoder_layers=(0, 1, 1, 1),
        decoder_layers=(0, 1, 1, 1),
        latent_channels=16,
        scaling_factor=1.0,
        residual_levels=4,
    ),
    scheduler=SCHEDULER,
    connector_layers=1,
    connector_heads=4,
    connector_intermediate=192,
    num_queries=16,
    image_size=32,
    guidance_scale=2.0,
    reconstruct_guidance_scale=2.0,
)

CONFIGS = {
    "openuni-b-512": B_512,
    "openuni-l-512": L_512,
    "openuni-l-1024": L_1024,
    "openuni-b-reca": B_512,
    "openuni-reca": L_512,
    "tiny": TINY,
}

# The checkpoints from which RecA starts, for --model. S-Lab License 1.0: non-commercial use only.
RELEASED = {
    "openuni-b-512": "wusize/openuni:openuni_b_internvl3_1b_sana_0_6b_512_hf_text2image23m.pth",
    "openuni-l-512": "wusize/openuni:openuni_l_internvl3_2b_sana_1_6b_512_hf_text2image23m.pth",
    "openuni-l-1024": "wusize/openuni:openuni_l_internvl3_2b_sana_1_6b_1024_hf_text2image23m.pth",
}

# What the authors of RecA have made of them, also for --model. The same licence holds: they are
# derived from OpenUni's weights.
RECA = {
    "openuni-b-reca": "sanaka87/OpenUni-1-0.6B-RecA",
    "openuni-reca": "sanaka87/OpenUni-RecA",
}

# What may hold the trained weights, and what a part's own weights may be called: in this order.
WEIGHT_FILES = [["*.index.json"], ["*.pth", "*.safetensors"], ["*.bin"]]
PART_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)

# Pieces of InternVL's original names -> the same in transformers.
INTERNVL_NAMES = {
    "vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding":
        "model.vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding.":
        "model.vision_tower.embeddings.patch_embeddings.projection.",
    "vision_model.encoder.layers.": "model.vision_tower.encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
}

# The markers of InternVL's vocabulary. <IMG_CONTEXT> keeps a place for one understanding embedding.
MARKERS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")

IGNORED = -100  # the label of a token that is not predicted
TEXT_DROP = 0.1  # the fraction of captions that t2i_loss leaves out, as in the original's data sets


@dataclass
class Recipe:
    """The paper's run (Table 8).

    Its 5000 steps are micro-batches of 42 images (L: 20), which are our steps, too. 16 of them make
    one update, so there are 312; the last 8 steps move nothing, and the last checkpoint is that of
    step 4992. (Table 8's steps could also be updates, 80000 micro-batches in all, but the 2 hours
    on one A100 that it gives are too short for that.) Warm-up and cosine of the original count
    micro-batches, too: a warm-up of 50 is 3 updates, and the cosine ends with the run, whatever
    --steps is.
    """
    # From the paper.
    steps: int = 5000  # the public config: 5000 for L, 10000 for B
    batch: int = 42
    accum: int = 16  # the public config: 16 for L, 4 for B
    lr: float = 1e-5
    weight_decay: float = 0.05
    warmup: int = 3  # in updates: 50 micro-batches / 16
    lambda_recon: float = 1.0
    lambda_i2t: float = 0.0  # understanding is frozen
    lambda_t2i: float = 0.0

    # From the public config.
    horizon: int = None  # the update at which the cosine reaches 0; None: the run's last
    betas: tuple = (0.9, 0.95)
    eps: float = 1e-8
    clip: float = 1.0


DEFAULT = "openuni-b-512"
RECIPES = {
    "openuni-b-512": Recipe(),
    "openuni-l-512": Recipe(batch=20),
    "openuni-l-1024": Recipe(batch=20),  # ours, after L-512: no published run of RecA has it
    "tiny": Recipe(
        steps=150,
        batch=32,
        accum=1,
        lr=1e-3,
        weight_decay=0.0,
        warmup=20,
        horizon=0,  # no cosine: the learning rate stays
    ),
    "openuni-b-reca": Recipe(),
    "openuni-reca": Recipe(batch=20),
}


# ==== 2. The model ================================================================================
# InternVL3, SANA and DC-AE come from transformers and diffusers, which compute what the released
# code computes. Ours are the queries, the connector, the projector, and the cut between prompt and
# queries.
#
# Methods with an underscore work on tensors within the model. The others are what common.py, or
# whoever imports this file, calls.


class ConnectorLayer(nn.Module):
    """A pre-norm transformer layer in which all queries see each other: no mask, no positions.
    [B, Q, D] -> [B, Q, D]"""

    def __init__(self, width, heads, intermediate):
        super().__init__()
        self.heads = heads
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = nn.ModuleDict({
            "k_proj": nn.Linear(width, width),
            "v_proj": nn.Linear(width, width),
            "q_proj": nn.Linear(width, width),
            "out_proj": nn.Linear(width, width),
        })
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(width, intermediate),
            "fc2": nn.Linear(intermediate, width),
        })

    def forward(self, x):
        y = self.layer_norm1(x)  # [B, Q, D]
        q = self._split_heads(self.self_attn["q_proj"](y))
        k = self._split_heads(self.self_attn["k_proj"](y))
        v = self._split_heads(self.self_attn["v_proj"](y))
        y = F.scaled_dot_product_attention(q, k, v)  # [B, heads, Q, D/heads]
        y = y.transpose(1, 2).flatten(2)  # [B, Q, D]
        x = x + self.self_attn["out_proj"](y)

        y = self.mlp["fc1"](self.layer_norm2(x))
        y = F.gelu(y, approximate="tanh")
        return x + self.mlp["fc2"](y)

    def _split_heads(self, x):
        """x [B, Q, D] -> [B, heads, Q, D/heads]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PrefixCache(DynamicCache):
    """Keys and values of the prompt, for the queries behind it.

    While `read_only` is False, it keeps what the layers give it: the prompt's. Then it returns the
    prompt's and the queries' together and keeps nothing more, so that activation checkpointing can
    run a layer a second time on the same cache.

    It is a DynamicCache because transformers looks at more of a cache than `update`. The inherited
    list of layers stays empty, since only `update` would fill it. That has no effect: masks and
    positions come from _query_states and not from the cache's length.
    """

    def __init__(self):
        super().__init__()
        self.read_only = False
        self.prompt = {}  # number of the layer -> (keys, values), [B, kv heads, L, head width] each

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if not self.read_only:
            self.prompt[layer_idx] = (keys, values)
            return keys, values

        prompt_keys, prompt_values = self.prompt[layer_idx]
        all_keys = torch.cat([prompt_keys, keys], dim=2)  # [B, kv heads, L+Q, head width]
        all_values = torch.cat([prompt_values, values], dim=2)  # [B, kv heads, L+Q, head width]
        return all_keys, all_values


class OpenUni(nn.Module):
    """The parts of the picture at the top of this file, under their released names:

        lmm           InternVL3, a "large multimodal model": InternViT, mlp1 and Qwen2.5. Qwen2.5
                      alone is `llm` in this class's methods
        vae           DC-AE
        meta_queries  the queries
        connector     the small transformer behind the queries' states
        projector     the linear layer behind that (not mlp1, which lies in lmm)
        transformer   SANA

    Made with random weights and without a tokenizer: see from_pretrained and random.
    """

    # What --lmm, --sana and --vae give: see from_pretrained.
    base_overrides = {}

    # What --quantize leaves in floating point: DC-AE, and the last layers of Qwen2.5 and SANA.
    unquantized = ("vae.", "lmm.lm_head", "transformer.proj_out")

    def __init__(self, config):
        super().__init__()
        self.config = config

        # Frozen: what understands, and what makes the targets.
        self.lmm = InternVLForConditionalGeneration(InternVLConfig(**config.lmm))
        self.lmm.requires_grad_(False)
        self.vae = AutoencoderDC.from_config(config.vae)
        self.vae.requires_grad_(False)

        # Trained. No norm follows the connector's last layer: SANA normalises its condition.
        width = self.lmm.config.text_config.hidden_size
        queries = torch.randn(config.num_queries, width) / math.sqrt(width)
        self.meta_queries = nn.Parameter(queries)
        layers = []
        for _ in range(config.connector_layers):
            layers.append(
                ConnectorLayer(width, config.connector_heads, config.connector_intermediate))
        self.connector = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.projector = nn.Linear(width, config.sana["caption_channels"])
        self.transformer = SanaTransformer2DModel.from_config(config.sana)

        self.tokenizer = None  # see set_tokenizer
        self.set_und()

    # ---- from an image to what the frozen parts compute from it ----------------------------------

    def preprocess(self, image, task, rng=None):
        """A PIL RGB image -> {"pixels": uint8 [3, S, S]}, as in the original's data sets. task
        "recon" and "t2i": a square crop along the long side, its place from rng (a numpy Generator)
        or central; "i2t": stretched to a square. None, where a conversation has no image: {}."""
        if image is None:
            return {}
        size = self.config.image_size
        if task == "i2t":
            image = image.resize((size, size))
        else:
            image = common.random_square(image, size, rng)
        return {"pixels": common.to_uint8(image)}

    @torch.no_grad()
    def encode(self, samples, task):
        """All that is frozen and does not depend on the prompt. A list of dicts of preprocess, the
        *samples* -> a dict for each, its *features*, which --cache stores:

            und      [N, D]     understanding embeddings     "recon", "i2t"   459 kB (L: 786 kB)
            latents  [C, h, w]  DC-AE's latents, float32     "recon", "t2i"   33 kB

        One could also store the keys and values of the image's tokens: they are the same for all
        templates, which stand behind them. But these 3.2 MB an image (L: 7.5) are more than six
        times the rest (L: nine), and would save an eighth of the arithmetic that is left.
        """
        features = [{} for _ in samples]
        with_image = [i for i, sample in enumerate(samples) if sample]
        if not with_image:
            return features
        pixels = [common.normalize(samples[i]["pixels"].to(self.device)) for i in with_image]
        pixels = torch.stack(pixels)  # [B, 3, S, S]

        if task in ("recon", "i2t"):
            for i, und in zip(with_image, self._und(pixels)):
                features[i]["und"] = und
        if task in ("recon", "t2i"):
            for i, latents in zip(with_image, self._latents(pixels)):
                features[i]["latents"] = latents
        return features

    def _und(self, pixels):
        """pixels [B, 3, S, S] in [-1, 1] -> [B, N, D]: InternViT's last layer without its class
        token, 2x2 neighbours joined (1024 -> 256 tokens), and mlp1, which is two linear layers. In
        the encoder's own precision, not in autocast's."""
        with torch.autocast(self.device.type, enabled=False):
            inputs = self._vit_input(pixels).to(self.lmm.dtype)
            return self.lmm.model.get_image_features(inputs, return_dict=True).pooler_output

    def _vit_input(self, pixels):
        """pixels [B, 3, S, S] in [-1, 1] -> InternViT's input, `und_size` pixels a side.

        As in the original, the image is normalised with ImageNet's mean and deviation first and
        resized then, without antialiasing. From 512 to 448 px this loses a little, but all of
        OpenUni's training was done so.
        """
        if self.und_blur:
            pixels = common.blur(pixels, self.und_blur)

        # Channel by channel, with Python's numbers. A tensor of three means would have to be copied
        # to the GPU, and the host would wait for that.
        planes = []
        for plane, mean, std in zip(pixels.unbind(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)):
            planes.append(((plane + 1) / 2 - mean) / std)
        normalized = torch.stack(planes, dim=1)  # [B, 3, S, S]
        return F.interpolate(normalized, self.und_size, mode="bilinear")

    def _latents(self, pixels):
        """pixels [B, 3, S, S] in [-1, 1] -> [B, C, h, w], float32. Nothing is drawn: DC-AE has no
        posterior. It runs in its own precision and not in autocast's, because it sums its linear
        attention in float32. Four images at a time fill a GPU; all at once would need more memory
        than any other part of a step."""
        with torch.autocast(self.device.type, enabled=False):
            latents = [self.vae.encode(x.to(self.vae.dtype)).latent for x in pixels.split(4)]
            return torch.cat(latents).float() * self.vae.config.scaling_factor

    def _pixels(self, latents):
        """latents [B, C, h, w] -> [B, 3, S, S], about in [-1, 1]: DC-AE's decoder."""
        with torch.autocast(self.device.type, enabled=False):
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            return torch.cat([self.vae.decode(z).sample.float() for z in latents.split(4)])

    # ---- from a prompt to the velocity -----------------------------------------------------------

    def _condition(self, prompt, mask):
        """prompt [B, L, D], its tokens' embeddings; mask [B, L], True at tokens and False at
        padding -> [B, Q, T], what SANA's cross-attention reads."""
        mask = common.to_device(mask, self.device)
        states = self._query_states(prompt, mask)  # [B, Q, D]
        states = self.connector["layers"](states.to(self.projector.bias.dtype))  # [B, Q, D]
        return self.projector(states)

    def _query_states(self, prompt, mask):
        """prompt [B, L, D], mask [B, L] -> [B, Q, D]: the language model's output at the queries
        behind the prompt, after its final norm.

        In two passes. The prompt cannot see the queries (attention is causal) and the language
        model is frozen, so nothing in the prompt's pass needs a gradient. It runs without a graph
        and leaves its keys and values; then the queries run with a graph. (The original runs all
        L + Q tokens with a graph. The numbers are the same, for less than half of its activations
        and of its backward pass.)
        """
        llm = self.lmm.model.language_model
        L = prompt.shape[1]
        Q = self.config.num_queries
        mask = F.pad(mask.bool(), (0, Q), value=True)  # [B, L+Q]

        # Positions count tokens and skip padding, on whichever side of a prompt it is.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, L+Q]

        # Who sees whom: a token sees those before it that are not padding, and itself. Padding,
        # too, sees itself, because a softmax over nothing is NaN. (It is written out because
        # transformers would ask the device whether a mask of padding is all True, and the host
        # would wait.)
        places = torch.arange(L + Q, device=mask.device)
        before = places <= places[:, None]  # [L+Q, L+Q]
        itself = places == places[:, None]  # [L+Q, L+Q]
        visible = (before & mask[:, None]) | itself  # [B, L+Q, L+Q]

        # First pass: the prompt leaves its keys and values. Each layer gives them to cache.update
        # and attends to what that returns. use_cache=False does not prevent this; it says that the
        # model need make no cache of its own and return none.
        cache = PrefixCache()
        with torch.no_grad():
            llm(
                inputs_embeds=prompt,
                attention_mask=visible[:, None, :L, :L],
                position_ids=positions[:, :L],
                past_key_values=cache,
                use_cache=False,
            )

        # Second pass: the queries.
        cache.read_only = True
        queries = self.meta_queries.to(prompt.dtype).expand(len(prompt), -1, -1)  # [B, Q, D]
        output = llm(
            inputs_embeds=queries,
            attention_mask=visible[:, None, L:],
            position_ids=positions[:, L:],
            past_key_values=cache,
            use_cache=False,
        )
        return output.last_hidden_state

    def _velocity(self, latents, condition, t):
        """SANA: noisy latents [B, C, h, w], condition [B, Q, T] and t [B], which is 1000 σ ->
        [B, C, h, w], the velocity, float32."""
        dtype = self.transformer.proj_out.weight.dtype
        velocity = self.transformer(
            latents.to(dtype),
            encoder_hidden_states=condition.to(dtype),
            timestep=t,
            return_dict=False,
        )[0]
        return velocity.float()

    # ---- what training asks of a model -----------------------------------------------------------

    def set_und(self, size=None, blur=None):
        """The paper's ablations of what the understanding side sees; the target stays as it is.
        size: pixels a side for InternViT (other than 448: its positions are interpolated, and there
        are more or fewer image tokens); blur: shrink by this factor and enlarge again. InputError
        for what cannot be."""
        vision = self.lmm.config.vision_config
        step = 2 * vision.patch_size[0]  # the side of 2x2 patches, which make one image token
        if size and size % step:
            raise InputError(f"--und-size {size}: OpenUni's understanding encoder takes multiples "
                             f"of {step}")
        common.check_blur(blur, self.config.image_size)
        self.und_size = size or vision.image_size[0]
        self.und_blur = blur
        self.image_tokens = (self.und_size // step) ** 2  # N

    def train(self, mode=True):
        """Frozen parts stay in eval mode: no dropout there, whatever their configs say."""
        super().train(mode)
        self.lmm.eval()
        self.vae.eval()
        return self

    @property
    def device(self):
        return self.meta_queries.device

    def _apply(self, function, recurse=True):
        """What .to(...) calls. Two things do not simply move with the rest."""
        super()._apply(function, recurse)

        # DC-AE normalises over channels; with the channels last in memory it needs no transposes.
        self.vae.to(memory_format=torch.channels_last)

        # The table of rotary frequencies is in no checkpoint, and stays float32. The original casts
        # it to bf16, which turns distant positions by some tenths of a radian; it is not followed,
        # because InternVL was trained with an exact table.
        with torch.device(self.device):
            llm = self.lmm.model.language_model
            llm.rotary_emb = Qwen2RotaryEmbedding(llm.config)
        return self

    def blocks(self):
        """The repeated layers that have a graph, for torch.compile and activation checkpointing."""
        return [
            *self.lmm.model.language_model.layers,
            *self.connector["layers"],
            *self.transformer.transformer_blocks,
        ]

    def parameter_groups(self, weight_decay):
        """What is trained, for AdamW. The original's rule: tensors with two or more dimensions
        decay, the queries and SANA's modulation tables among them."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]

    # ==== 3. Loading and saving ===================================================================
    # Released files hold what was trained, under the names of this class's own attributes:
    #
    #   text2image23m    meta_queries, connector.*, projector.*               (SANA was frozen)
    #   blip3o60k, RecA  the same and transformer.*
    #   whole models     all parts, lmm.* under the names of InternVL's original code
    #
    # What they lack comes from its own hub repository, a *base*. InternVL is there twice, original
    # (OpenGVLab/InternVL3-1B) and converted for transformers (-hf): the same numbers under other
    # names. Both load.

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=torch.float32, bases=None, quantize=None):
        """A model in eval mode with its tokenizer.

        source    a name in RELEASED or RECA, a hub repository or a folder (with :FILE where it
                  holds several checkpoints), a file, or "tiny"
        bases     {"lmm": ..., "sana": ..., "vae": ...}, hub ids or folders to use instead of those
                  that the checkpoint names
        quantize  None or "int8", done before anything is on the device

        Every key must fit, or an InputError names those that do not.
        """
        # What was trained, and the settings, which name the bases.
        if source == "tiny":
            source = common.tiny_folder("openuni")
        path = common.find_checkpoint(
            str(source), RELEASED | RECA, WEIGHT_FILES, beside=["*.json"], needs=["meta_queries"])
        state = dict(common.load_state(path))
        settings = cls._read_settings(path, state)
        for part, base in (bases or cls.base_overrides).items():
            folder = Path(base).expanduser()
            settings["bases"][part] = str(folder.resolve()) if folder.is_dir() else str(base)

        # The parts that the file lacks, from their bases.
        present = {key.split(".")[0] for key in state}
        config, folders = cls._read_bases(
            settings, path.parent, need_sana="transformer" not in present)
        homes = {
            "transformer": folders["sana"] / "transformer",
            "vae": folders["vae"],
            "lmm": folders["lmm"],
        }
        for part, home in homes.items():
            if part not in present:
                for key, value in common.find_weights(home, *PART_FILES).items():
                    state[f"{part}.{key}"] = value

        # InternVL's weights, under the names of transformers.
        lmm = {}
        for key in list(state):
            if key.startswith("lmm."):
                lmm[key.removeprefix("lmm.")] = state.pop(key)
        for key, value in cls.internvl_to_transformers(lmm).items():
            state[f"lmm.{key}"] = value

        # Built on "meta", without memory: random weights, to be overwritten at once, would take a
        # minute to draw.
        with torch.device("meta"):
            model = cls(config)
        model.to(dtype).to_empty(device="cpu" if quantize else device)
        common.load_strictly(model, state, str(path))
        model.set_tokenizer(common.load_tokenizer(folders["lmm"]))
        return common.quantize(model, quantize).to(device).eval()

    @classmethod
    def random(cls, name, device="cpu"):
        """Random weights at a size in CONFIGS, made on the device, and a stand-in tokenizer: for
        tiny and --bench."""
        if name not in CONFIGS:
            raise InputError(f"no such size: {name} (there are {', '.join(CONFIGS)})")
        config = CONFIGS[name]
        tokenizer = common.tiny_tokenizer(MARKERS)
        if name == "tiny":
            text_config = config.lmm["text_config"] | {"vocab_size": len(tokenizer)}
            config = replace(config, lmm=config.lmm | {"text_config": text_config})

        with torch.device(device):
            model = cls(config).to(device)
        model.set_tokenizer(tokenizer)
        return model.eval()

    def save_pretrained(self, folder):
        """Writes openuni.pth, a flat dict with the released key list, which the original loads,
        too; and config.json, which names the bases: 2 GB that everybody has are not copied.

        Parts without a base (those of `tiny`) are saved beside them, in their libraries' layouts:
        lmm/, sana/, vae/.
        """
        folder = Path(folder)
        with common.atomic(folder / "openuni.pth") as path:
            with open(path, "wb") as stream:
                torch.save(self.released_state(), stream)  # given a path, it would store that, too

        if "lmm" not in self.config.bases:
            self.lmm.config.save_pretrained(folder / "lmm")
            state = {key: value.contiguous() for key, value in self.lmm.state_dict().items()}
            with common.atomic(folder / "lmm" / "model.safetensors") as path:
                save_file(state, path)
            self.tokenizer.save_pretrained(folder / "lmm")
        if "vae" not in self.config.bases:
            self.vae.save_pretrained(folder / "vae")
        if "sana" not in self.config.bases:
            # Its weights are in openuni.pth.
            self.transformer.save_config(folder / "sana" / "transformer")
            scheduler = DPMSolverMultistepScheduler.from_config(self.config.scheduler)
            scheduler.save_config(folder / "sana" / "scheduler")

        settings = {"model_type": "openuni", **self.config.own_settings()}
        common.write(folder / "config.json", settings)

    def released_state(self):
        """The flat dict of a released file in which SANA was trained: queries, connector,
        projector, transformer."""
        state = {}
        for key, value in self.state_dict().items():
            if not key.startswith(("lmm.", "vae.")):
                state[key] = value.contiguous()
        return state

    def set_tokenizer(self, tokenizer):
        """From now on prompts are made with `tokenizer`, and its id of <IMG_CONTEXT> keeps places
        for an image's embeddings. InputError if it does not know InternVL's markers."""
        unknown = []
        for marker in MARKERS:
            if tokenizer.convert_tokens_to_ids(marker) in (None, tokenizer.unk_token_id):
                unknown.append(marker)
        if unknown:
            raise InputError(f"this tokenizer is not InternVL's: it lacks {' '.join(unknown)}")
        self.tokenizer = tokenizer
        self.lmm.config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")

    @staticmethod
    def _read_settings(path, state):
        """The settings (OpenUniConfig.own_settings) that belong to a checkpoint file: from our
        config.json beside it, or else those of the released model that it must be.

        The width of the queries tells B from L. SANA 1.5, in L-1024, has norms of queries and keys.
        Where SANA is not in the file, the keys of L-512 and L-1024 are the same, and the file's
        name decides.
        """
        file = path.with_name("config.json")
        settings = common.read_object(file) if file.is_file() else {}
        if settings.pop("model_type", None) == "openuni":
            return settings

        if "meta_queries" not in state:
            raise InputError(f"{path} is not an OpenUni checkpoint: it has no meta_queries")
        width = state["meta_queries"].shape[-1]
        if "transformer.proj_out.weight" in state:
            is_1024 = any(".norm_q." in key for key in state)
        else:
            is_1024 = "1024" in path.name
        for name in RELEASED:
            config = CONFIGS[name]
            same_width = config.lmm["text_config"]["hidden_size"] == width
            if same_width and (config.image_size == 1024) == is_1024:
                return config.own_settings()
        raise InputError(f"{path}: no released OpenUni has queries of width {width}; use a folder "
                         "with a config.json")

    @staticmethod
    def _read_bases(settings, folder, need_sana):
        """A checkpoint's settings -> (OpenUniConfig with the sizes that the bases' own files state,
        {part: local folder}). Parts without a base lie in `folder`, beside the checkpoint.
        need_sana: SANA's weights are needed, and not only its sizes."""
        patterns = {
            "lmm": ["*.json", "*.txt", "*.safetensors"],
            "vae": ["config.json", "*.safetensors"],
            "sana": ["transformer/config.json", "scheduler/*.json"],
        }
        if need_sana:
            patterns["sana"] += [
                "transformer/diffusion_pytorch_model.safetensors*",
                "transformer/diffusion_pytorch_model-*.safetensors",
            ]

        bases = settings["bases"]
        folders = {}
        for part, wanted in patterns.items():
            if part in bases:
                folders[part] = common.hub_folder(bases[part], wanted)
            else:
                folders[part] = folder / part

        # Names with an underscore are notes of diffusers: its version, where a file came from.
        files = {
            "vae": folders["vae"] / "config.json",
            "sana": folders["sana"] / "transformer" / "config.json",
            "scheduler": folders["sana"] / "scheduler" / "scheduler_config.json",
        }
        sizes = {}
        for part, file in files.items():
            stored = common.read_object(file)
            sizes[part] = {key: value for key, value in stored.items() if not key.startswith("_")}

        try:
            sizes["lmm"] = OpenUni._internvl_sizes(folders["lmm"])
            return OpenUniConfig(**sizes, **settings), folders
        except TypeError as error:
            raise InputError(f"config.json does not describe an OpenUni: {error}") from error

    @staticmethod
    def _internvl_sizes(folder):
        """The keyword arguments of InternVLConfig, from the config.json of a converted repository
        or an original one. The output head is never tied here: it is a matrix of its own, and a
        copy of the embeddings where the checkpoint has none."""
        config = common.read_object(folder / "config.json")
        untied = {"tie_word_embeddings": False}

        # A converted repository has the names of transformers already.
        if "llm_config" not in config:
            notes = ("architectures", "transformers_version", "dtype", "torch_dtype")
            sizes = {key: value for key, value in config.items() if key not in notes}
            return sizes | untied | {"text_config": config["text_config"] | untied}

        vision = config["vision_config"]
        llm = config["llm_config"]
        qk_norm = bool(vision.get("qk_normalization"))
        norm = vision.get("norm_type", "layer_norm")
        layer = config.get("select_layer", -1)
        if (qk_norm, norm, layer) != (False, "layer_norm", -1):
            raise InputError(f"{folder}: an InternVL with a vision tower of another kind than "
                             "InternVL3's")

        sizes = internvl3(
            width=llm["hidden_size"],
            layers=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            kv_heads=llm["num_key_value_heads"],
            intermediate=llm["intermediate_size"],
        )
        rope_theta = llm.get("rope_theta", 1000000.0)
        sizes["text_config"].update(
            vocab_size=llm["vocab_size"],
            rms_norm_eps=llm.get("rms_norm_eps", 1e-6),
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        )
        side = config.get("force_image_size") or vision["image_size"]
        sizes["vision_config"].update(
            hidden_size=vision["hidden_size"],
            num_hidden_layers=vision["num_hidden_layers"],
            num_attention_heads=vision["num_attention_heads"],
            intermediate_size=vision["intermediate_size"],
            image_size=[side, side],
            patch_size=[vision["patch_size"]] * 2,
            attention_bias=vision.get("qkv_bias", True),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
        )
        return sizes

    @staticmethod
    def internvl_to_transformers(state):
        """InternVL's weights under the names of InternVLForConditionalGeneration. Takes the
        original names, whose queries, keys and values are one matrix; and both namings of converted
        repositories, of which the older does not begin with "model."."""
        converted = {}
        for key, value in state.items():
            for original, ours in INTERNVL_NAMES.items():
                key = key.replace(original, ours)
            if key.startswith(("vision_tower.", "multi_modal_projector.")):
                key = "model." + key

            if ".attn.qkv." in key:
                for name, part in zip("qkv", value.chunk(3)):
                    converted[key.replace(".attn.qkv.", f".attention.{name}_proj.")] = part
            else:
                converted[key] = value

        # A file whose head is tied to the embeddings may leave it out.
        embeddings = converted.get("model.language_model.embed_tokens.weight")
        if embeddings is not None:
            converted.setdefault("lm_head.weight", embeddings)
        return converted

    # ==== 4. The embedding-conditioned prompt =====================================================
    # RecA asks for a reconstruction with the words that ask for a description, and opens the answer
    # with <img>, the marker behind which OpenUni has learned to generate. There is no system turn.
    # The queries follow.

    def recon_prompt(self, template):
        """RecA's prompt, its ids: the image, the template, and an answer that begins with <img>."""
        return self.tokenize(self._user_turn(template) + "<img>")

    def t2i_prompt(self, caption=None):
        """The prompt for text to image, its ids; without a caption, the one that guidance moves
        away from.

        Of a long caption the end is cut, and the markers behind it stay. (The original cuts off the
        end of the prompt, so that the turn does not end and no <img> asks for an image. It is not
        followed.)
        """
        if caption is None:
            text = "Generate an image."
        else:
            text = f"Generate an image: {caption.strip()}"
        ids = self.tokenize(self._user_turn(text, image=False) + "<img>")

        limit = self.config.max_caption_tokens
        if len(ids) <= limit:
            return ids
        ending = self.tokenize("<|im_end|>\n<|im_start|>assistant\n<img>")
        return ids[:limit - len(ending)] + ending

    def i2t_prompt(self, question, image=True):
        """The first turn of a conversation, its ids, with or without an image."""
        return self.tokenize(self._user_turn(question, image))

    def conversation(self, turns, image=True):
        """[(question, answer), ...] -> ids and labels. Predicted are the answers, each with the
        <|im_end|> behind it; all other labels are IGNORED."""
        ids = []
        labels = []
        for i, (question, answer) in enumerate(turns):
            question_ids = self.i2t_prompt(question, image=image and i == 0)
            answer_ids = self.tokenize(common.plain(answer, MARKERS) + "<|im_end|>")
            newline = self.tokenize("\n")
            ids += question_ids + answer_ids + newline
            labels += [IGNORED] * len(question_ids) + answer_ids + [IGNORED] * len(newline)
        return ids, labels

    def _user_turn(self, text, image=True):
        """What a user says, and the opening of the answer, as text. What looks like a marker in the
        user's own text is taken apart, so that it stays text."""
        image_text = ""
        if image:
            image_text = "<img>" + "<IMG_CONTEXT>" * self.image_tokens + "</img>\n"
        text = common.plain(text, MARKERS)
        return f"<|im_start|>user\n{image_text}{text}<|im_end|>\n<|im_start|>assistant\n"

    def tokenize(self, text):
        """Text with markers -> list of ids. Nothing is added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def understand(self, features):
        """Features of encode -> the understanding embeddings, as the language model gets them,
        [B, N, D] for the B of them that have an image; None if none has. mlp1 has already brought
        them to the language model's width, so nothing is left to compute."""
        und = [item["und"] for item in features if item]
        return torch.stack(und) if und else None

    def _pad(self, prompts, value=0):
        """Lists of ids -> ids and mask, [B, L] both, on the CPU: padded on the right with `value`,
        the mask True at tokens. (The original pads RecA's prompts on the left. The numbers are the
        same, since positions follow the mask; on the right, no padding comes before all tokens and
        has nothing to attend to.)"""
        ids = pad_sequence(
            [torch.tensor(prompt) for prompt in prompts], batch_first=True, padding_value=value)
        lengths = torch.tensor([len(prompt) for prompt in prompts])  # [B]
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, L]
        return ids, mask

    def _embed(self, ids, und=None):
        """ids [B, L] and understanding embeddings [B, N, D] or None -> [B, L, D]: the word
        embeddings of the ids, and at each <IMG_CONTEXT>, in order, one of `und`. ValueError if
        there are not as many of them as places."""
        is_image = ids == self.lmm.config.image_token_id  # [B, L]
        if und is not None:
            # The ids are on the CPU, so the host counts and does not wait for the device.
            count = int(is_image.sum())
            images, N = und.shape[:2]
            if count != images * N:
                raise ValueError(f"{count} image tokens in the prompts, {images} x {N} embeddings")

        ids, is_image = common.to_device([ids, is_image], self.device)
        embeddings = self.lmm.get_input_embeddings()(ids)  # [B, L, D]
        if und is not None:
            und = und.to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image[..., None], und)  # [B, L, D]
        return embeddings

    # ==== 5. The losses ===========================================================================

    def recon_loss(self, features, templates, draws=None, rng=None):
        """RecA (paper, equation 2): generate each image from its own understanding embeddings.

        features: B dicts of encode, templates: B instructions -> scalar, the mean over images,
        channels and places. draws: see draw. As in the original, neither the image nor the template
        is ever left out.
        """
        draws = draws or self.draw("recon", features, rng)

        # concat(t_template, h_v): the template, and in front of it the image's understanding
        # embeddings.
        ids, mask = self._pad([self.recon_prompt(template) for template in templates])
        und = self.understand(features)  # [B, N, D]
        prompt = self._embed(ids, und)  # [B, L, D]

        # What the queries read from this prompt is all that SANA is told about the image.
        condition = self._condition(prompt, mask)  # [B, Q, T]

        # x: the same image as latents, mixed with noise; and the velocity that SANA shall predict.
        noisy, sigma, target = self._add_noise(features, draws)

        # ℓ: mean squared error of the velocity, all noise levels alike.
        velocity = self._velocity(noisy, condition, t=1000 * sigma)  # [B, C, h, w]
        return (velocity - target).square().mean()

    def t2i_loss(self, features, captions, draws=None, rng=None):
        """Text to image: recon_loss with a caption in place of the image's embeddings, for
        supervised fine-tuning; in RecA itself λ_t2i = 0. A tenth of the captions is left out, to
        train the unconditional prompt, which guidance moves away from."""
        draws = draws or self.draw("t2i", features, rng)

        prompts = []
        for caption, dropped in zip(captions, draws["text_dropped"].tolist()):
            prompts.append(self.t2i_prompt(None if dropped else caption))
        ids, mask = self._pad(prompts)
        condition = self._condition(self._embed(ids), mask)  # [B, Q, T]

        noisy, sigma, target = self._add_noise(features, draws)
        velocity = self._velocity(noisy, condition, t=1000 * sigma)  # [B, C, h, w]
        return (velocity - target).square().mean()

    def _add_noise(self, features, draws):
        """-> the noisy latents x_σ = (1 - σ) x + σ ε, the noise levels σ, and the targets: the
        velocity dx_σ / dσ = ε - x. (The original mixes in bf16, which rounds σ by up to 0.4%, but
        not the time that SANA is told. It is not followed: SANA would be told a σ that its input
        does not have.)"""
        latents = torch.stack([item["latents"] for item in features])  # [B, C, h, w]
        noise, u = common.to_device([draws["noise"], draws["u"]], self.device)
        noise = noise.to(latents.dtype)  # [B, C, h, w]

        sigma = self._sigmas(u.to(latents.dtype))  # [B]
        level = sigma.view(-1, 1, 1, 1)  # [B, 1, 1, 1]
        noisy = (1 - level) * latents + level * noise  # [B, C, h, w]
        target = noise - latents  # [B, C, h, w]
        return noisy, sigma, target

    @staticmethod
    def _sigmas(u):
        """u [B], uniform on [0, 1) -> [B], noise levels, uniform on {1, 0.999, ..., 0.001}: shift
        1, see SCHEDULER."""
        return (1000 - (1000 * u).floor()) / 1000

    def i2t_loss(self, features, conversations, draws=None, rng=None):
        """Image to text: the cross-entropy of the answers in B conversations, lists of (question,
        answer), about an image each, or about none where features has {} -> scalar, the mean over
        all tokens of answers. Nothing is drawn. In RecA a measure and no training signal: nothing
        that RecA trains takes part in it."""
        ids = []
        labels = []
        for item, turns in zip(features, conversations):
            turns_ids, turns_labels = self.conversation(turns, image=bool(item))
            ids.append(turns_ids)
            labels.append(turns_labels)
        ids, mask = self._pad(ids)
        labels, _ = self._pad(labels, value=IGNORED)
        prompt = self._embed(ids, self.understand(features))  # [B, L, D]

        # The state at a token predicts the token behind it. Logits over the whole vocabulary are
        # computed for answers only; where these stand, is found on the CPU.
        example, place = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # [A]
        targets = labels[example, place + 1]  # [A]
        count = len(targets)
        mask, example, place, targets = common.to_device(
            [mask, example, place, targets], self.device)

        llm = self.lmm.model.language_model
        output = llm(inputs_embeds=prompt, attention_mask=mask, use_cache=False)
        states = output.last_hidden_state[example, place]  # [A, D]
        logits = self.lmm.lm_head(states).float()  # [A, vocabulary]
        return common.mean(F.cross_entropy(logits, targets, reduction="sum"), count)

    def draw(self, task, features, rng=None):
        """All random numbers of a loss. recon and t2i: "noise" [B, C, h, w], standard normal, and
        "u" [B], uniform on [0, 1), for the noise level. t2i also "text_dropped", bool [B]: where
        the caption is left out. i2t: none."""
        if task == "i2t":
            return {}
        rng = rng or Rng.fresh(len(features))
        draws = {}
        if task == "t2i":
            draws["text_dropped"] = rng.uniform() < TEXT_DROP
        draws["noise"] = rng.normal(*features[0]["latents"].shape)
        draws["u"] = rng.uniform()
        return draws

    def count_targets(self, task, features, texts, draws):
        """Of how many terms a loss is the mean: images, whose latents are all of one size, or
        tokens of answers."""
        if task != "i2t":
            return len(features)
        count = 0
        for turns in texts:
            _, labels = self.conversation(turns, image=False)
            count += sum(label != IGNORED for label in labels)
        return count

    def worst_case(self, task, count):
        """(samples, texts, draws to replace) of the micro-batch that needs most memory: the longest
        template, or a long text."""
        size = self.config.image_size
        sample = {"pixels": torch.zeros(3, size, size, dtype=torch.uint8)}
        words = "word " * 200
        texts = {
            "recon": max(common.templates(), key=len),
            "t2i": words,
            "i2t": [(words, words)],
        }
        return [sample] * count, [texts[task]] * count, {}

    # ==== 6. Inference ============================================================================

    @torch.no_grad()
    def generate(
        self,
        prompts,
        *,
        num_steps=None,
        guidance_scale=None,
        negative_prompt=None,
        seed=0,
        draws=None,
        progress=False,
    ):
        """Text to image: B prompts -> B PIL images, in one batch.

        num_steps, guidance_scale   of the sampler; None: the config's. A scale of 1 is no guidance
        negative_prompt             what guidance moves away from; None: "Generate an image."
        seed                        one for each image, or a number s: image i has seed s + i. An
                                    image does not depend on its batch
        draws                       {"latents": noise [B, C, h, w], standard normal}, for a replay
        """
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        ids, mask = self._pad([self.t2i_prompt(prompt) for prompt in prompts])
        condition = self._condition(self._embed(ids), mask)  # [B, Q, T]
        return self._paint_images(
            condition, num_steps, guidance_scale, negative_prompt, seed, draws, progress)

    @torch.no_grad()
    def reconstruct(
        self,
        images,
        *,
        templates=None,
        num_steps=None,
        guidance_scale=None,
        negative_prompt=None,
        seed=0,
        draws=None,
        progress=False,
    ):
        """Image to image: B PIL images -> B PIL images, generated from nothing but the
        understanding embeddings. The rest is as in generate.

        Without guidance by default. It would move away from "Generate an image.", a prompt that
        RecA never trains, because it leaves out neither image nor template. And the original's
        demonstration gives both branches the same image and words, which is no guidance either.
        (`tiny` is guided nevertheless, away from that prompt: a toy of ours, with one scale, 2, for
        both tasks.)
        """
        if guidance_scale is None:
            guidance_scale = self.config.reconstruct_guidance_scale
        if templates is None:
            templates = [common.SEED_TEMPLATE] * len(images)
        features = self.encode([self.preprocess(image, "recon") for image in images], "recon")
        ids, mask = self._pad([self.recon_prompt(template) for template in templates])
        prompt = self._embed(ids, self.understand(features))  # [B, L, D]
        condition = self._condition(prompt, mask)  # [B, Q, T]
        return self._paint_images(
            condition, num_steps, guidance_scale, negative_prompt, seed, draws, progress)

    @torch.no_grad()
    def describe(self, images, question=common.SEED_TEMPLATE, max_new_tokens=256):
        """Image to text, by the frozen InternVL3, greedy: PIL images and one question -> answers.
        One view of the whole image; InternVL's tiles for large images are not used."""
        features = self.encode([self.preprocess(image, "i2t") for image in images], "i2t")
        ids, mask = self._pad([self.i2t_prompt(question)] * len(images))
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        answers = self.lmm.generate(
            inputs_embeds=self._embed(ids, self.understand(features)),
            attention_mask=mask.long().to(self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _paint_images(
        self, condition, num_steps, guidance_scale, negative_prompt, seed, draws, progress
    ):
        """condition [B, Q, T] -> B PIL images."""
        # Guidance needs a second, unconditional branch for each image. Its prompt is the same for
        # all, so the language model runs once on it.
        count = len(condition)
        if guidance_scale > 1:
            ids, mask = self._pad([self.t2i_prompt(negative_prompt)])
            unconditional = self._condition(self._embed(ids), mask)  # [1, Q, T]
            unconditional = unconditional.expand(count, -1, -1)  # [B, Q, T]
            condition = torch.cat([condition, unconditional])  # [2B, Q, T]

        if draws:
            noise = draws["latents"]
        else:
            side = self.config.image_size // self.vae.spatial_compression_ratio
            channels = self.vae.config.latent_channels
            noise = Rng.sampling(seed, count).normal(channels, side, side)
        if num_steps is None:
            num_steps = self.config.num_steps
        latents = self._sample(
            condition, noise.to(self.device), num_steps, guidance_scale, progress)
        return [common.to_pil(pixels) for pixels in self._pixels(latents)]

    def _sample(self, condition, noise, num_steps, guidance_scale=1.0, progress=False):
        """DPM-Solver++(2M): standard normal noise [B, C, h, w] -> [B, C, h, w], latents, float32.
        condition [B or 2B, Q, T]: where there are twice as many, the last B are unconditional.

        σ falls from 0.9997 to 0 in num_steps, more slowly where it is high (shift 3). In each step
        SANA predicts the velocity v at x_σ, and x_σ - σ v is what the clean image would be. The
        solver extrapolates from the previous step's clean image through this one (second order; the
        first and the final step take this one as it is), and moves x_σ towards the result, to the
        next σ. The final step lands on the clean image itself.
        """
        solver = DPMSolverMultistepScheduler.from_config(self.config.scheduler)
        solver.set_timesteps(num_steps, device=noise.device)
        latents = noise.float()
        branches = len(condition) // len(noise)

        # As in the original, SANA is told 1000 σ cut to an integer (the first is 999), while the
        # solver computes with the exact σ.
        for t in tqdm(solver.timesteps, desc="sampling", disable=not progress, leave=False):
            inputs = latents.repeat(branches, 1, 1, 1)  # [B or 2B, C, h, w]
            velocity = self._velocity(inputs, condition, t.expand(len(condition)))
            if branches == 2:
                # Guidance: from the unconditional velocity to the conditional one, and beyond.
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance_scale * (conditional - unconditional)
            latents = solver.step(velocity, t, latents, return_dict=False)[0]
        return latents


# ==== 7. main() ===================================================================================


def flags(parser):
    """The flags that only this architecture has."""
    group = parser.add_argument_group("OpenUni only")
    texts = {
        "lmm": "InternVL3, original or converted (-hf)",
        "sana": "SANA",
        "vae": "DC-AE",
    }
    for part, text in texts.items():
        group.add_argument(
            f"--{part}",
            type=common.expanded,
            help=f"hub id or folder of {text} (default: what the checkpoint names)",
        )


def prepare(model, args):
    """Called before training. The frozen parts are brought to the working precision once: autocast
    would cast their float32 weights in every pass, because it caches casts only of leaves that
    require a gradient."""
    if args.precision == "bf16":
        model.lmm.to(torch.bfloat16)
        model.vae.to(torch.bfloat16)
        model.to(model.device)  # brings the rotary frequencies back to float32: see _apply
    return {}


def main():
    args = common.parse_args(__doc__, RECIPES, DEFAULT, extend=flags)
    if args.lambda_i2t or args.i2t_data:
        raise InputError("OpenUni's understanding model is frozen, L_i2t trains nothing here: "
                         "leave --lambda-i2t at 0")
    bases = {"lmm": args.lmm, "sana": args.sana, "vae": args.vae}
    OpenUni.base_overrides = {part: base for part, base in bases.items() if base}
    common.run(OpenUni, args, prepare)


if __name__ == "__main__":
    common.cli(main)
