"""Show-o: equality with the reference implementation (fixture), released key lists, prompt layouts, files, sampler, resume."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention

import common
import reca_showo
from reca_showo import IGNORED, UND, Showo, ShowoConfig

FIXTURE = Path(os.environ.get("RECA_FIXTURES", Path(__file__).parent / "fixtures")) / "showo"
MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"


def fixture_config(c, w_clip_vit):
    return ShowoConfig(
        w_clip_vit=w_clip_vit,
        image_size=c["image_size"],
        llm_vocab_size=c["llm_vocab_size"],
        eot=c["eot"],
        codebook_bits=c["codebook_bits"],
        hidden=c["hidden"],
        layers=c["layers"],
        heads=c["heads"],
        intermediate=c["intermediate"],
        max_positions=c["phi"]["max_position_embeddings"],
        clip_hidden=c["clip"]["hidden_size"],
        clip_intermediate=c["clip"]["intermediate_size"],
        clip_layers=c["clip"]["num_hidden_layers"],
        clip_heads=c["clip"]["num_attention_heads"],
        clip_image_size=c["clip"]["image_size"],
        clip_patch=c["clip"]["patch_size"],
        vq_ch=c["vq"]["ch"],
        vq_enc_mult=c["vq"]["enc_mult"],
        vq_enc_res=c["vq"]["enc_res"],
        vq_dec_mult=c["vq"]["dec_mult"],
        vq_dec_res=c["vq"]["dec_res"],
        recon_text=c["recon_text"],
        max_text=c["max_seq_length"] if w_clip_vit else c["vq_max_seq"],
        max_prompt=c["max_seq_length"],
        system_len=c["system_len"],
    )


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURE / "golden.safetensors")


@pytest.fixture(scope="module")
def config():
    return json.loads((FIXTURE / "config.json").read_text())


@pytest.fixture(scope="module")
def norms():
    return json.loads((FIXTURE / "grad_norms.json").read_text())


def load_model(config, w_clip_vit):
    model = Showo(fixture_config(config, w_clip_vit))
    state = load_file(FIXTURE / "weights.safetensors")
    state = {k: v for k, v in state.items() if w_clip_vit or k.startswith("showo.")}
    common.load_strictly(model.trained(), state, "fixture")
    vq = common.autoencoder_from_original(model.magvit, load_file(FIXTURE / "vq_weights.safetensors"))
    common.load_strictly(model.magvit, vq, "MAGVIT-v2")
    if w_clip_vit:
        common.load_strictly(model.clip, Showo._clip_keys(load_file(FIXTURE / "clip_weights.safetensors")), "CLIP")
    else:
        model.und_size = config["image_size"] // config["down_scale"]
    # The fixture holds ids, no tokenizer: in this file the losses are given lists of ids where a text is expected.
    system = load_file(FIXTURE / "golden.safetensors")["in.mmu_system_ids"].tolist()
    model.tokenize = model._template_ids = model._pad_conversations = lambda ids: ids
    model._system_ids = lambda: system if w_clip_vit else []
    return model.eval()


@pytest.fixture(scope="module")
def clip_model(config):
    return load_model(config, True)


@pytest.fixture(scope="module")
def vq_model(config):
    return load_model(config, False)


def pixels(u8, mean=(0.5,) * 3, std=(0.5,) * 3):
    return (u8.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def close(ours, golden):
    """1e-4 of the largest entry."""
    assert ours.shape == golden.shape
    torch.testing.assert_close(ours.detach(), golden, rtol=0, atol=1e-4 * golden.abs().max().item())


def same_loss(ours, value):
    assert ours.item() == pytest.approx(float(value), rel=1e-5)


def same_norms(model, expected):
    """Every gradient norm; null = no gradient at all. Parameters that the variant lacks must not be expected to have one."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("showo.", "mm_projector.")):
            assert parameter.grad is None
        elif expected[name] is None:
            assert parameter.grad is None, name
        elif expected[name] < 1e-5:  # zero: the reference computes t2i and i2t in one graph, here each has its own
            assert parameter.grad is None or parameter.grad.norm() < 1e-4, name
        else:
            assert parameter.grad.norm().item() == pytest.approx(expected[name], rel=1e-3), name
    have = {n for n, _ in model.named_parameters()}
    assert all(v is None for n, v in expected.items() if n not in have)


def loss_and_grad(model, *losses):
    model.zero_grad(set_to_none=True)
    values = []
    for loss in losses:
        value = loss()
        value.backward()
        values.append(value.detach())
    return values


def recon_features(model, golden):
    return model.encode([{"pixels": p} for p in pixels(golden["in.recon_pixels_u8"])], "recon")


def i2t_features(model, golden):
    if model.config.w_clip_vit:
        return model.encode([{"clip_pixels": p} for p in golden["in.mmu_pixels_u8"]], "i2t")
    return model.encode([{"pixels": pixels(golden["in.recon_pixels_u8"])[0]}] * len(golden["mmu_vq.labels"]), "i2t")


def first_of_clip(prompts):
    """Column of the first place for an understanding embedding."""
    return prompts.ids[0].tolist().index(UND)


def draws(golden, prefix):
    """The fixture holds the uniform number that decides whether a caption is dropped; we hold the decision."""
    names = ("timesteps", "scores")
    made = {n: golden[f"{prefix}.draw_{n}"] for n in names if f"{prefix}.draw_{n}" in golden}
    if f"{prefix}.draw_text_drop" in golden:
        made["text_dropped"] = golden[f"{prefix}.draw_text_drop"] < reca_showo.TEXT_DROP
    return made


# ---- tokenizer and CLIP ---------------------------------------------------------------------------------------------


def test_parity_showo_tokenizer(clip_model, golden):
    shown = pixels(golden["in.recon_pixels_u8"])
    with torch.no_grad():
        z = clip_model.magvit.encoder(shown)
        close(z, golden["vq.z"])
        assert torch.equal(torch.where(z > 0, 1.0, -1.0), golden["vq.quantized"])
        assert torch.equal(clip_model.magvit.codes(shown), golden["vq.codes"])
        assert torch.equal(clip_model.magvit.codes(pixels(golden["in.t2i_pixels_u8"])), golden["vq.t2i_codes"])
        close(clip_model.magvit.decode(golden["vq.codes"][:1]), golden["vq.decoded_first"])
        quantizer = clip_model.magvit.quantize  # the table spells out the codes that the sum computes
        bits = quantizer.embedding[golden["vq.codes"]].transpose(1, 2).reshape(golden["vq.quantized"].shape)
        assert torch.equal(bits, golden["vq.quantized"])


def test_parity_showo_clip_features(clip_model, golden):
    view = clip_model.und_view(pixels(golden["in.recon_pixels_u8"]))
    close(view[:1], golden["recon.clip_pixels_first"])
    features = recon_features(clip_model, golden)
    close(torch.stack([f["und"] for f in features]), golden["recon.clip_features"])
    close(clip_model.understand(features), golden["recon.projected"])
    close(torch.stack([f["und"] for f in i2t_features(clip_model, golden)]), golden["mmu.clip_features"])


# ---- losses ----------------------------------------------------------------------------------------------------------


def recon_inputs(model, config, golden, prefix):
    prompts = config["recon_prompts"] if prefix == "recon" else [config["vq_prompt"]] * config["batch_recon"]
    return recon_features(model, golden), prompts, draws(golden, prefix)


def recon_batch(model, features, templates, draws):
    """What recon_loss makes of its arguments."""
    tokens, labels = model._mask_tokens(features, draws)
    return model._recon_batch(templates, features, tokens, labels)


def logits_of(model, prompts, und=None):
    hidden = model.hidden_states(model.embed(prompts, und), prompts.dense_mask(), prompts.positions)
    return model.showo.lm_head(hidden)


def test_parity_showo_recon_prompt(clip_model, config, golden):
    """Ids, mask (bit for bit), inputs and logits of the CLIP variant."""
    features, templates, given = recon_inputs(clip_model, config, golden, "recon")
    prompts = recon_batch(clip_model, features, templates, given)
    n = clip_model.config.num_tokens
    assert torch.equal(prompts.ids, golden["recon.token_ids"])
    assert torch.equal(prompts.labels[:, -n - 1 : -1], golden["recon.labels"][:, -n - 1 : -1])
    assert torch.equal(prompts.labels[:, -n - 1 : -1] != IGNORED, golden["recon.mask"])
    assert torch.equal(prompts.dense_mask(), golden["recon.attention"])
    with torch.no_grad():
        und = clip_model.understand(features)
        close(clip_model.embed(prompts, und), golden["recon.input_embeds"])
        logits = logits_of(clip_model, prompts, und)
    c = clip_model.config
    close(logits[:, -n - 1 : -1, c.first_code : c.mask_token], golden["recon.logits_image_slice"])
    close(logits[:, -3:], golden["recon.logits_last_rows"])


def test_parity_showo_recon_loss(clip_model, config, golden, norms):
    inputs = recon_inputs(clip_model, config, golden, "recon")
    (loss,) = loss_and_grad(clip_model, lambda: clip_model.recon_loss(*inputs))
    same_loss(loss, golden["recon.loss"])
    same_norms(clip_model, norms["recon"])


def test_showo_recon_loss_trains_embeddings_on_request(clip_model, config, golden, monkeypatch):
    """The switch gives projector and table a gradient and leaves every other number as it is."""
    inputs = recon_inputs(clip_model, config, golden, "recon")
    monkeypatch.setattr(clip_model, "train_embeddings_in_recon", True)
    (loss,) = loss_and_grad(clip_model, lambda: clip_model.recon_loss(*inputs))
    same_loss(loss, golden["recon.loss"])
    assert clip_model.mm_projector[0].weight.grad.norm() > 0
    assert clip_model.showo.model.embed_tokens.weight.grad.norm() > 0


def test_parity_showo_recon_vq_loss(vq_model, config, golden, norms):
    features, templates, given = recon_inputs(vq_model, config, golden, "recon_vq")
    close(vq_model.und_view(pixels(golden["in.recon_pixels_u8"]))[:1], golden["recon_vq.small_pixels_first"])
    assert torch.equal(torch.stack([f["und"] for f in features]), golden["recon_vq.given_codes"])
    prompts = recon_batch(vq_model, features, templates, given)
    n = vq_model.config.num_tokens
    assert torch.equal(prompts.ids, golden["recon_vq.token_ids"])
    assert torch.equal(prompts.labels, golden["recon_vq.labels"])
    assert torch.equal(prompts.labels[:, -n - 1 : -1] != IGNORED, golden["recon_vq.mask"])
    assert torch.equal(prompts.dense_mask(), golden["recon_vq.attention"])
    (loss,) = loss_and_grad(vq_model, lambda: vq_model.recon_loss(features, templates, given))
    same_loss(loss, golden["recon_vq.loss"])
    same_norms(vq_model, norms["recon_vq"])


def test_parity_showo_t2i_loss(clip_model, config, golden, norms):
    features = clip_model.encode([{"pixels": p} for p in pixels(golden["in.t2i_pixels_u8"])], "t2i")
    given = draws(golden, "t2i")
    tokens, labels = clip_model._mask_tokens(features, given)
    texts = [[] if u < 0.1 else t for t, u in zip(config["t2i_prompts"], golden["t2i.draw_text_drop"])]
    prompts = clip_model._t2i_batch(texts, tokens, labels)
    assert torch.equal(prompts.ids, golden["t2i.token_ids"])
    slots = clip_model.config.max_text + 1
    assert torch.equal(prompts.labels[:, slots:], golden["t2i.labels"][:, slots:])
    assert torch.equal(prompts.dense_mask(), golden["t2i.attention"])
    (loss,) = loss_and_grad(clip_model, lambda: clip_model.t2i_loss(features, config["t2i_prompts"], given))
    same_loss(loss, golden["t2i.loss"])
    same_norms(clip_model, norms["t2i"])


def i2t_inputs(model, golden):
    return i2t_features(model, golden), (golden["in.mmu_text_ids"], golden["in.mmu_text_labels"])


def test_parity_showo_i2t_loss(clip_model, golden, norms):
    features, (ids, labels) = i2t_inputs(clip_model, golden)
    prompts = clip_model._i2t_batch(ids, labels, features)
    at, c = first_of_clip(prompts), clip_model.config
    assert torch.equal(
        torch.cat([prompts.ids[:, :at], prompts.ids[:, at + c.num_clip :]], 1), golden["mmu.token_ids_without_image"]
    )
    assert torch.equal(prompts.labels, golden["mmu.labels"])
    assert torch.equal(prompts.dense_mask(), golden["mmu.attention"])
    with torch.no_grad():
        und = clip_model.understand(features)
        close(clip_model.embed(prompts, und), golden["mmu.input_embeds"])
        logits = logits_of(clip_model, prompts, und)
    close(logits[:, -ids.shape[1] :, : c.first_code], golden["mmu.logits_text_rows"])
    (loss,) = loss_and_grad(clip_model, lambda: clip_model.i2t_loss(features, (ids, labels)))
    same_loss(loss, golden["mmu.loss"])
    same_norms(clip_model, norms["mmu"])


def test_parity_showo_i2t_vq_loss(vq_model, golden):
    features, (ids, labels) = i2t_inputs(vq_model, golden)
    prompts = vq_model._i2t_batch(ids, labels, features)
    assert torch.equal(prompts.ids, golden["mmu_vq.token_ids"])
    assert torch.equal(prompts.labels, golden["mmu_vq.labels"])
    assert torch.equal(prompts.dense_mask(), golden["mmu_vq.attention"])
    same_loss(vq_model.i2t_loss(features, (ids, labels)), golden["mmu_vq.loss"])


def test_parity_showo_total_loss(clip_model, config, golden, norms):
    """L = 1 · recon + 1 · i2t + 0 · t2i, through the objective of common.py."""
    clip_model.zero_grad(set_to_none=True)
    recon, i2t = recon_inputs(clip_model, config, golden, "recon"), i2t_inputs(clip_model, golden)
    losses = {
        "recon": lambda: [clip_model.recon_loss(*recon)],
        "i2t": lambda: [clip_model.i2t_loss(*i2t)],
        "t2i": lambda: pytest.fail("a loss with weight 0 was computed"),
    }
    total, _ = common.objective(losses, {"recon": 1.0, "i2t": 1.0, "t2i": 0.0}, torch.Tensor.backward)
    same_loss(total, config["results"]["total_loss"])
    same_norms(clip_model, norms["total"])


# ---- sampler and captions --------------------------------------------------------------------------------------------


def test_parity_showo_sampler(clip_model, config, golden):
    c, steps = clip_model.config, config["sample_steps"]
    prompts = config["gen_prompts"]
    cond = clip_model._t2i_batch(prompts, slots=c.max_prompt)
    uncond = clip_model._t2i_batch([[]] * len(prompts), slots=c.max_prompt)
    assert torch.equal(cond.ids, golden["sample.cond_ids"])
    assert torch.equal(uncond.ids, golden["sample.uncond_ids"])
    assert torch.equal(cond.stack(uncond).dense_mask(), golden["sample.attention"])
    given = {
        k: torch.stack([golden[f"sample.step{i}.{k}"] for i in range(steps)]) for k in ("drawn_ids", "gumbel_uniform")
    }
    seen = []

    def watch(step, tokens, probs):
        seen.append(step)
        assert torch.equal(tokens + c.first_code, golden[f"sample.step{step}.input_ids"][:, -c.num_tokens - 1 : -1])
        if f"sample.step{step}.probs" in golden:
            close(probs, golden[f"sample.step{step}.probs"])

    scale = config["guidance"] + 1  # the original counts from 0
    codes = clip_model._sample(cond, num_steps=steps, guidance_scale=scale, draws=given, watch=watch)
    assert seen == list(range(steps))
    assert torch.equal(codes, golden["sample.codes"])


def test_parity_showo_caption(clip_model, config, golden):
    features = i2t_features(clip_model, golden)[:1]
    prompts = clip_model._i2t_batch(torch.tensor([config["caption"]]), None, features)
    at = first_of_clip(prompts)
    assert torch.equal(
        torch.cat([prompts.ids[:, :at], prompts.ids[:, at + clip_model.config.num_clip :]], 1),
        golden["caption.token_ids_without_image"],
    )
    with torch.no_grad():
        und = clip_model.understand(features)
        logits = logits_of(clip_model, prompts, und)
    close(logits[0, -1], golden["caption.first_logits"])
    assert torch.equal(clip_model._continue(prompts, und, config["caption_new"], stop=False)[0], golden["caption.new_ids"])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, manifest",
    [
        ("showlab/show-o-w-clip-vit-512x512", "showo_clip"),
        ("showlab/show-o-w-clip-vit", "showo_clip"),
        ("showlab/show-o-512x512", "showo_vq"),
        ("showlab/show-o", "showo_vq"),
    ],
)
def test_released_keys_showo(name, manifest):
    """Names and shapes of every weight at the released sizes, strictly: language model, tokenizer, CLIP (4.x names)."""

    def listed(file):
        return {k: list(v) for k, v in json.loads((MANIFESTS / f"{file}.json").read_text()).items()}

    with torch.device("meta"):
        model = Showo(reca_showo.CONFIGS[name])
    assert {k: list(v.shape) for k, v in model.trained().state_dict().items()} == listed(manifest)
    assert {k: list(v.shape) for k, v in common.autoencoder_to_original(model.magvit).items()} == listed("magvitv2")
    assert model.config.vocab_size == 58498 and model.config.mask_token == 58497 and model.config.first_code == 50305
    if model.config.w_clip_vit:
        names = {f"vision_model.{k}": list(v.shape) for k, v in model.clip.state_dict().items()}
        assert names == listed("clip_vit_l14_336_vision")
        on_hub = dict.fromkeys([*names, "vision_model.embeddings.position_ids", "text_model.x", "logit_scale"])
        assert Showo._clip_keys(on_hub).keys() == model.clip.state_dict().keys()


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module", params=["tiny", "tiny-vq"])
def tiny(request):
    torch.manual_seed(0)
    return Showo.random(request.param).eval()


def test_showo_save_load_save(tiny, tmp_path):
    """The folder holds everything, loads without a network, and is written again byte for byte."""
    tiny.save_pretrained(tmp_path / "a")
    again = Showo.from_pretrained(str(tmp_path / "a"))
    again.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert again.config == reca_showo.Showo._read_config(tmp_path / "b")
    with torch.no_grad():
        ids = torch.arange(24)[None]
        assert torch.equal(again.showo(input_ids=ids).logits, tiny.showo(input_ids=ids).logits)  # rotary buffers, too
    image = common.draw_scene([(0, 1, 2)], 64)
    for task in ("recon", "i2t"):
        ours, theirs = (m.encode([m.preprocess(image, task)], task)[0] for m in (tiny, again))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_showo_bfloat16(tiny, tmp_path):
    """Half the memory for inference; the tokenizer and the rotary frequencies stay float32."""
    tiny.save_pretrained(tmp_path)
    model = Showo.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    assert (
        model.showo.lm_head.weight.dtype == torch.bfloat16
        and model.magvit.encoder.conv_in.weight.dtype == torch.float32
    )
    assert torch.equal(model.showo.model.rotary_emb.inv_freq, tiny.showo.model.rotary_emb.inv_freq)
    image = common.draw_scene([(0, 1, 2)], 64)
    assert torch.equal(
        model.encode([model.preprocess(image, "t2i")], "t2i")[0]["codes"],
        tiny.encode([tiny.preprocess(image, "t2i")], "t2i")[0]["codes"],
    )
    assert len(model.generate(["red circle"], num_steps=2)) == len(model.reconstruct([image], num_steps=2)) == 1
    assert isinstance(model.describe([image], max_new_tokens=2)[0], str)


def test_showo_loads_bin(tiny, tmp_path):
    """The hub's files are .bin; CLIP there comes with its text half; a half-precision file is read into float32."""
    tiny.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.safetensors").unlink()
    torch.save({k: v.half() for k, v in tiny.trained().state_dict().items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "magvitv2" / "pytorch_model.safetensors").unlink()
    torch.save(common.autoencoder_to_original(tiny.magvit), tmp_path / "magvitv2" / "pytorch_model.bin")
    if tiny.config.w_clip_vit:
        (tmp_path / "clip" / "model.safetensors").unlink()
        state = {f"vision_model.{k}": v for k, v in tiny.clip.state_dict().items()}
        state |= {
            "vision_model.embeddings.position_ids": torch.arange(3),
            "text_model.encoder.weight": torch.ones(2),
            "logit_scale": torch.ones(()),
        }
        torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    # the released config.json knows none of our sizes; those of a tiny model cannot be guessed, so they stay
    again = Showo.from_pretrained(str(tmp_path))
    for (name, a), b in zip(tiny.state_dict().items(), again.state_dict().values()):
        assert a.dtype == b.dtype
        assert torch.equal(a.half().float() if name.startswith(("showo.", "mm_projector.")) else a, b), name


def test_showo_released_config_needs_nothing_of_ours(tmp_path):
    released = {
        "w_clip_vit": True,
        "vocab_size": 58498,
        "llm_vocab_size": 50295,
        "llm_model_path": "microsoft/phi-1_5",
        "codebook_size": 8192,
        "num_vq_tokens": 256,
        "load_from_showo": True,
        "mask_token_id": 58497,
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    assert Showo._read_config(tmp_path) == reca_showo.CONFIGS["showlab/show-o-w-clip-vit"]
    (tmp_path / "config.json").write_text(json.dumps(released | {"w_clip_vit": False, "num_vq_tokens": 1024}))
    assert Showo._read_config(tmp_path) == reca_showo.CONFIGS["showlab/show-o-512x512"]
    for bad in (released | {"vocab_size": 50000}, {"model_type": "phi"}):
        (tmp_path / "config.json").write_text(json.dumps(bad))
        with pytest.raises(common.InputError):
            Showo._read_config(tmp_path)


def test_showo_sampler_defaults_come_with_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Ours are saved with it; a file without them, as the released ones, gets the published ones."""
    monkeypatch.setattr(tiny.config, "guidance_scale", 4.5)
    monkeypatch.setattr(tiny.config, "num_steps", 3)
    tiny.save_pretrained(tmp_path)
    config = Showo._read_config(tmp_path)
    assert (config.num_steps, config.guidance_scale) == (3, 4.5)

    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_steps", "guidance_scale", "temperature"):
        del written["sizes"][name]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = Showo._read_config(tmp_path)
    assert (config.num_steps, config.guidance_scale, config.temperature) == (50, 6.0, 1.0)
    released = reca_showo.CONFIGS[reca_showo.DEFAULT]
    assert (released.num_steps, released.guidance_scale, released.temperature) == (50, 6.0, 1.0)


def test_showo_strict_keys(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / "pytorch_model.safetensors")
    state["showo.model.surprise"] = state.pop("showo.lm_head.bias")
    Showo._write_weights(tmp_path, state, json.loads((tmp_path / "config.json").read_text()))
    with pytest.raises(common.InputError, match="showo.lm_head.bias"):
        Showo.from_pretrained(str(tmp_path))


# ---- prompt layouts --------------------------------------------------------------------------------------------------


def words(model, ids):
    """Ids -> readable list; runs of image tokens, CLIP rows and padding are counted."""
    c, names = model.config, {}
    names |= {
        c.pad: "[PAD]",
        c.soi: "<soi>",
        c.eoi: "<eoi>",
        c.t2i: "<t2i>",
        c.mmu: "<mmu>",
        c.eot: "<eot>",
        UND: "clip",
        c.mask_token: "mask",
    }
    out = []
    for i in ids.tolist():
        word = names.get(i) or ("code" if i >= c.first_code else model.tokenizer.convert_ids_to_tokens(i))
        if out and out[-1][0] == word:
            out[-1][1] += 1
        else:
            out.append([word, 1])
    return [w if n == 1 else f"{n} {w}" for w, n in out]


def test_showo_prompt_layouts(tiny, monkeypatch):
    c, n = tiny.config, tiny.config.num_tokens
    image = common.draw_scene([(0, 1, 2)], 64)
    (feature,) = tiny.encode([tiny.preprocess(image, "recon")], "recon")
    draws = {"timesteps": torch.zeros(1), "scores": torch.arange(n)[None] / n}  # u = 0: everything masked
    prompts = recon_batch(tiny, [feature], ["Describe the image in detail."], draws)
    text = ["<eot>", "user", ":", "\n", "describe", "the", "image", "in", "detail", ".", "assistant", ":", "<eot>"]
    if c.w_clip_vit:
        assert words(tiny, prompts.ids[0]) == [
            "<mmu>",
            "<soi>",
            f"{c.num_clip} clip",
            "<eoi>",
            *text,
            f"{c.recon_text - 3 - len(text)} [PAD]",
            "<soi>",
            f"{n} mask",
            "<eoi>",
        ]
        assert prompts.ids.shape[1] == c.recon_text + c.num_clip + n + 2
    else:
        given = (tiny.und_size // 16) ** 2
        assert words(tiny, prompts.ids[0]) == [
            f"{c.max_text - len(text)} [PAD]",
            "<mmu>",
            "<soi>",
            f"{given} code",
            "<eoi>",
            *text,
            "<soi>",
            f"{n} mask",
            "<eoi>",
        ]
        assert prompts.ids.shape[1] == c.max_text + 1 + given + 2 + n + 2
    prompts = tiny._t2i_batch(["red circle", ""], slots=5)
    assert words(tiny, prompts.ids[0]) == [
        "[PAD]",
        "<t2i>",
        "<eot>",
        "red",
        "circle",
        "<eot>",
        "<soi>",
        f"{n} mask",
        "<eoi>",
    ]
    assert words(tiny, prompts.ids[1]) == ["3 [PAD]", "<t2i>", "2 <eot>", "<soi>", f"{n} mask", "<eoi>"]
    prompts = tiny._t2i_batch(["red circle and blue cross"], slots=4)  # too long: cut and closed
    assert words(tiny, prompts.ids[0])[:6] == ["<t2i>", "<eot>", "red", "circle", "<eot>", "<soi>"]
    turns = [("What is it?", "a red circle"), ("Where?", "top-left")]
    ids, labels = tiny.conversation(turns)
    assert words(tiny, torch.tensor(ids)) == [
        "user",
        ":",
        *tiny.tokenizer.convert_ids_to_tokens(tiny.tokenize("What is it?")),
        "assistant",
        ":",
        "a",
        "red",
        "circle",
        "<eot>",
        "user",
        ":",
        *tiny.tokenizer.convert_ids_to_tokens(tiny.tokenize("Where?")),
        "assistant",
        ":",
        "top-left",
        "<eot>",
    ]
    answers = [tiny.tokenizer.convert_ids_to_tokens(i) for i in labels if i != IGNORED]
    assert answers == ["a", "red", "circle", "<|endoftext|>", "top-left", "<|endoftext|>"]
    (feature,) = tiny.encode([tiny.preprocess(image, "i2t")], "i2t")
    monkeypatch.setattr(tiny.config, "system_len", 28)  # the tiny model has no system prompt, the released ones have
    prompts = tiny._i2t_batch(torch.tensor([ids]), torch.tensor([labels]), [feature])
    conversation = words(tiny, torch.tensor(ids))
    if c.w_clip_vit:
        system = tiny.tokenizer.convert_ids_to_tokens(tiny.tokenize(reca_showo.SYSTEM_PROMPT))
        assert system[:3] == ["a", "chat", "between"] and len(system) > 20
        assert words(tiny, prompts.ids[0]) == ["<mmu>", *system, "<soi>", f"{c.num_clip} clip", "<eoi>", *conversation]
    else:
        assert words(tiny, prompts.ids[0]) == ["<mmu>", "<soi>", f"{n} code", "<eoi>", *conversation]


def test_showo_template_too_long(tiny):
    image = common.draw_scene([(0, 1, 2)], 64)
    features = tiny.encode([tiny.preprocess(image, "recon")], "recon")
    with pytest.raises(common.InputError, match="shorten"):
        tiny.recon_loss(features, ["red " * 200])


def test_showo_padding_may_be_left_out(tiny):
    """A row in a batch with longer rows (so with padding columns) gives the loss that it gives alone."""
    scenes = [[(0, 1, 2)], [(1, 2, 3), (3, 0, 1)]]
    images = [common.draw_scene(s, 64) for s in scenes]
    templates = [
        "Describe the image in detail.",
        "Please write a description of the scene shown here as precisely as you can.",
    ]
    features = tiny.encode([tiny.preprocess(i, "recon") for i in images], "recon")
    n = tiny.config.num_tokens
    draws = {"timesteps": torch.zeros(2), "scores": torch.rand(2, n)}  # as many tokens in both
    with torch.no_grad():
        both = tiny.recon_loss(features, templates, draws)
        single = [
            tiny.recon_loss([features[i]], [templates[i]], {k: v[i : i + 1] for k, v in draws.items()})
            for i in range(2)
        ]
    assert both.item() == pytest.approx(sum(s.item() for s in single) / 2, rel=1e-5)


# ---- the rest of the public surface -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_showo_flex_attention_equals_dense(tiny, monkeypatch):
    """The same rows as a flex block mask, and the same loss through flex_attention."""
    image = common.draw_scene([(0, 1, 2), (2, 3, 4)], 64)
    features = tiny.encode([tiny.preprocess(image, "recon")] * 2, "recon")
    draws = {"timesteps": torch.tensor([0.3, 0.8]), "scores": torch.rand(2, tiny.config.num_tokens)}
    prompts = recon_batch(tiny, features, ["Describe the image in detail.", "Describe this picture."], draws)
    prompts = prompts.without_padding(tiny.config.pad)
    block, dense = prompts.block_mask(), prompts.dense_mask()
    length = dense.shape[1]
    b, q, k = (torch.arange(m).view(s) for m, s in ((2, (-1, 1, 1)), (length, (1, -1, 1)), (length, (1, 1, -1))))
    assert torch.equal(block.mask_mod(b, torch.tensor(0), q, k), dense)
    # Compiling the kernel for a CPU is slow and fragile, so it runs uncompiled here; on a CPU it has no backward.
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.compile_friendly_flex_attention",
        lambda q, k, v, training=False, **more: flex_attention(q, k, v, **more),
    )
    templates = ["Describe the image in detail.", "Describe this picture."]
    with torch.no_grad():
        expected = tiny.recon_loss(features, templates, draws)
        shape = common.draw_scene([(0, 1, 2)], 64)
        pictures, tokens = tiny.generate(["red circle", "a"], num_steps=2), tiny.describe([shape], max_new_tokens=4)
        tiny.flex = True
        ours = tiny.recon_loss(features, templates, draws)
        # Sampling has dense masks, whatever the losses have: previews during such a run must not change.
        again, words = tiny.generate(["red circle", "a"], num_steps=2), tiny.describe([shape], max_new_tokens=4)
        tiny.flex = False
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in again] and tokens == words


def test_showo_sampling_is_per_image(tiny):
    """An image depends on its prompt and its seed, not on the batch; guidance and its absence both run."""
    prompts = ["red circle", "blue cross top-left", "green square"]
    together = tiny.generate(prompts, num_steps=3, guidance_scale=3.0, seed=5)
    alone = tiny.generate(prompts[1:2], num_steps=3, guidance_scale=3.0, seed=[6])
    near = np.abs(np.asarray(together[1], int) - np.asarray(alone[0], int)).max()  # convolutions round by batch size
    assert near <= 2 and together[0].size == (64, 64)
    assert np.abs(np.asarray(together[0], int) - np.asarray(together[1], int)).max() > 2
    image = common.draw_scene([(0, 1, 2)], 64)
    assert len(tiny.reconstruct([image, image], num_steps=2, guidance_scale=1.0)) == 2
    a, b = (tiny.reconstruct([image], num_steps=3, seed=s)[0].tobytes() for s in (1, 1))
    assert a == b


def test_showo_describe_equals_uncached(tiny):
    """The KV cache changes nothing: greedy decoding with a full forward for each token gives the same ids."""
    images = [common.draw_scene(s, 64) for s in ([(0, 1, 2)], [(1, 2, 3), (3, 0, 1)])]
    features = tiny.encode([tiny.preprocess(i, "i2t") for i in images], "i2t")
    asked = torch.tensor([tiny.tokenize("USER: Describe the image in detail. ASSISTANT:")]).expand(2, -1)
    with torch.no_grad():
        und = tiny.understand(features)
        new = tiny._continue(tiny._i2t_batch(asked, None, features), und, 5, stop=False)
        ids = asked
        for step in range(5):
            logits = logits_of(tiny, tiny._i2t_batch(ids, None, features), und)[:, -1]
            assert torch.equal(logits.argmax(-1), new[:, step])
            ids = torch.cat([ids, logits.argmax(-1)[:, None]], 1)
    texts = tiny.describe(images, max_new_tokens=4)
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)


def test_showo_parameter_groups(tiny):
    decayed, free = tiny.parameter_groups(0.01)
    names = {id(p): n for n, p in tiny.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and free["weight_decay"] == 0.0
    assert all("bias" in names[id(p)] for p in free["params"]) and not any(
        "bias" in names[id(p)] for p in decayed["params"]
    )
    trained = {names[id(p)] for g in (decayed, free) for p in g["params"]}
    assert trained == tiny.trained().state_dict().keys()  # not CLIP, not the tokenizer


def test_showo_und_size_and_blur():
    model = Showo(reca_showo.CONFIGS["tiny-vq"])
    shown = torch.rand(1, 3, 64, 64) * 2 - 1
    for settings, side in (
        ({}, 32),
        ({"size": 64}, 64),
        ({"size": 16}, 16),
        ({"blur": 8}, 64),
        ({"size": 32, "blur": 4}, 32),
    ):
        model.set_und(**settings)
        (feature,) = model.encode([{"pixels": shown[0]}], "recon")
        assert model.und_view(shown).shape[-1] == side and len(feature["und"]) == (side // 16) ** 2
    model.set_und(size=64)
    (feature,) = model.encode([{"pixels": shown[0]}], "recon")
    assert torch.equal(feature["und"], feature["codes"])  # full size: the answer stands in the prompt (F.2)
    for bad in ({"size": 24}, {"size": 128}, {"blur": 64}):
        with pytest.raises(common.InputError):
            model.set_und(**bad)
    with pytest.raises(common.InputError, match="32 pixels only"):
        Showo(reca_showo.CONFIGS["tiny"]).set_und(size=64)


def test_showo_text_only_conversations_are_left_out(tiny):
    with pytest.raises(ValueError):
        tiny.preprocess(None, "i2t")


# ---- the command line ------------------------------------------------------------------------------------------------

SHORT = [
    "--batch",
    "2",
    "--self-captions",
    "4",
    "--max-new-tokens",
    "4",
    "--sampling-steps",
    "2",
    "--precision",
    "fp32",
]


def run(*arguments):
    """main() in this process, as `python reca_showo.py ...` would."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["reca_showo.py", *map(str, arguments)])
        try:
            reca_showo.main()
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-vq", marks=pytest.mark.slow)])
def test_showo_end_to_end(name, tmp_path):
    """RecA, scores; an interrupted run resumes to the same numbers and weights; inference on the checkpoint."""
    tiny = ["--model", name, *SHORT]
    run(*tiny, "--steps", 4, "--out", tmp_path / "whole")
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert scores.keys() == {"before", "after"} and scores["after"].keys() == {
        "reconstruction",
        "understanding",
        "single_object",
        "two_object",
        "colors",
        "position",
        "color_attribution",
        "overall",
    }
    log = common.read_json(tmp_path / "whole" / "log.jsonl", lines=True)
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(
        {"recon", "i2t", "grad_norm"} <= row.keys() for row in log
    )
    assert list((tmp_path / "whole" / "previews").glob("step_*.png"))

    run(*tiny, "--steps", 2, "--out", tmp_path / "parts")
    run(*tiny, "--steps", 4, "--out", tmp_path / "parts", "--resume")
    again = common.read_json(tmp_path / "parts" / "log.jsonl", lines=True)
    assert [(r["recon"], r["i2t"], r["grad_norm"]) for r in log] == [
        (r["recon"], r["i2t"], r["grad_norm"]) for r in again
    ]
    one, two = (contents(tmp_path / kind / "checkpoint-000004") for kind in ("whole", "parts"))
    assert one.keys() == two.keys() and all(one[f] == two[f] for f in one if f != "trainer.pt")

    made = tmp_path / "made"
    (tmp_path / "prompts.txt").write_text("red circle\nblue cross top-left\n")
    run(
        "--model",
        tmp_path / "whole" / "checkpoint-000004",
        "--steps",
        0,
        "--generate",
        tmp_path / "prompts.txt",
        "--sampling-steps",
        2,
        "--out",
        made,
        "--precision",
        "fp32",
    )
    assert len(list(made.glob("*.png"))) == 2


def test_showo_switches_of_the_command_line(tmp_path, capsys):
    """--und-size, --blur, --recon-trains-embeddings and the cache reach the model; what cannot work is refused in one line."""
    seen = {}

    def watch(model, args):
        seen["model"] = model
        return prepare(model, args)

    prepare = reca_showo.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reca_showo, "prepare", watch)
        run(
            "--model",
            "tiny-vq",
            *SHORT,
            "--steps",
            1,
            "--blur",
            4,
            "--lambda-i2t",
            0,
            "--cache",
            tmp_path / "cache",
            "--out",
            tmp_path / "a",
        )
        assert (seen["model"].und_size, seen["model"].und_blur) == (64, 4)
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
        run("--model", "tiny-vq", *SHORT, "--steps", 1, "--und-size", 16, "--lambda-i2t", 0, "--out", tmp_path / "b")
        assert (seen["model"].und_size, seen["model"].und_blur) == (16, None)
        run("--model", "tiny", *SHORT, "--steps", 1, "--recon-trains-embeddings", "--out", tmp_path / "c")
        assert seen["model"].train_embeddings_in_recon
    for wrong, message in (
        (["--und-size", "24"], "multiple of 16"),
        (["--flex"], "needs a GPU"),
        (["--data", "/nowhere"], "no such folder"),
    ):
        with pytest.raises(common.InputError, match=message):
            run("--model", "tiny-vq", *SHORT, "--steps", 1, "--lambda-i2t", 0, *wrong, "--out", tmp_path / "d")


def test_showo_bench(capsys):
    """--bench runs the step of the command line; here at the tiny size."""
    run("--model", "tiny", "--bench", "--precision", "fp32", "--batch", 2)
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["losses"] == ["recon", "i2t"] and figures["step_s"] > 0
