"""Show-o: equality with the reference implementation (fixture), released key lists, prompt layouts, files, sampler, resume."""
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import reca_showo
from reca_showo import IGNORE, Rows, Showo, ShowoConfig

FIXTURE = Path(os.environ.get("RECA_FIXTURES", Path(__file__).parent / "fixtures")) / "showo"
MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"


def fixture_config(c, w_clip_vit):
    return ShowoConfig(
        w_clip_vit=w_clip_vit, image_size=c["image_size"], llm_vocab_size=c["llm_vocab_size"], eot=c["eot"],
        codebook_bits=c["codebook_bits"], hidden=c["hidden"], layers=c["layers"], heads=c["heads"], intermediate=c["intermediate"],
        max_positions=c["phi"]["max_position_embeddings"], clip_hidden=c["clip"]["hidden_size"],
        clip_intermediate=c["clip"]["intermediate_size"], clip_layers=c["clip"]["num_hidden_layers"],
        clip_heads=c["clip"]["num_attention_heads"], clip_image_size=c["clip"]["image_size"], clip_patch=c["clip"]["patch_size"],
        vq_ch=c["vq"]["ch"], vq_enc_mult=c["vq"]["enc_mult"], vq_enc_res=c["vq"]["enc_res"], vq_dec_mult=c["vq"]["dec_mult"],
        vq_dec_res=c["vq"]["dec_res"], recon_text=c["recon_text"], max_text=c["max_seq_length"] if w_clip_vit else c["vq_max_seq"],
        max_prompt=c["max_seq_length"], system_len=c["system_len"])


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
    model._load_released({k: v for k, v in state.items() if w_clip_vit or k.startswith("showo.")}, "fixture")
    common.load_strictly(model.magvit, load_file(FIXTURE / "vq_weights.safetensors"), "MAGVIT-v2")
    if w_clip_vit:
        common.load_strictly(model.clip, reca_showo.clip_keys(load_file(FIXTURE / "clip_weights.safetensors")), "CLIP")
    else:
        model.und_size = config["image_size"] // config["down_scale"]
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
        elif expected[name] < 1e-5:         # zero: the reference computes t2i and i2t in one graph, here each has its own
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
        shown = pixels(golden["in.mmu_pixels_u8"], reca_showo.CLIP_MEAN, reca_showo.CLIP_STD)
        return model.encode([{"clip_pixels": p} for p in shown], "i2t")
    return model.encode([{"pixels": pixels(golden["in.recon_pixels_u8"])[0]}] * len(golden["mmu_vq.labels"]), "i2t")


def draws(golden, prefix):
    names = ("timesteps", "scores", "text_drop")
    return {n: golden[f"{prefix}.draw_{n}"] for n in names if f"{prefix}.draw_{n}" in golden}


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
        quantizer = clip_model.magvit.quantize                           # the table spells out the codes that the sum computes
        bits = quantizer.embedding[golden["vq.codes"]].transpose(1, 2).reshape(golden["vq.quantized"].shape)
        assert torch.equal(bits, golden["vq.quantized"])


def test_parity_showo_clip_features(clip_model, golden):
    shown = clip_model.shown(pixels(golden["in.recon_pixels_u8"]))
    close(shown[:1], golden["recon.clip_pixels_first"])
    und = torch.stack([f["und"] for f in recon_features(clip_model, golden)])
    close(und, golden["recon.clip_features"])
    close(clip_model.mm_projector(und), golden["recon.projected"])
    close(torch.stack([f["und"] for f in i2t_features(clip_model, golden)]), golden["mmu.clip_features"])


# ---- losses ----------------------------------------------------------------------------------------------------------


def recon_inputs(model, config, golden, prefix):
    prompts = config["recon_prompts"] if prefix == "recon" else [config["vq_prompt"]] * config["batch_recon"]
    return recon_features(model, golden), prompts, draws(golden, prefix)


def test_parity_showo_recon_prompt(clip_model, config, golden):
    """Ids, mask (bit for bit), inputs and logits of the CLIP variant."""
    rows, und = clip_model._recon_inputs(*recon_inputs(clip_model, config, golden, "recon"))
    n = clip_model.config.num_tokens
    assert torch.equal(rows.ids, golden["recon.token_ids"])
    assert torch.equal(rows.labels[:, -n - 1:-1], golden["recon.labels"][:, -n - 1:-1])
    assert torch.equal(rows.labels[:, -n - 1:-1] != IGNORE, golden["recon.mask"])
    assert torch.equal(rows.attention(), golden["recon.attention"])
    with torch.no_grad():
        embeds = clip_model.embed(rows, und)
        close(embeds, golden["recon.input_embeds"])
        logits = clip_model.showo.lm_head(clip_model.hidden(embeds, rows.attention(), rows.positions))
    c = clip_model.config
    close(logits[:, -n - 1:-1, c.first_code:c.mask_token], golden["recon.logits_image_slice"])
    close(logits[:, -3:], golden["recon.logits_last_rows"])


def test_parity_showo_recon_loss(clip_model, config, golden, norms):
    inputs = recon_inputs(clip_model, config, golden, "recon")
    loss, = loss_and_grad(clip_model, lambda: clip_model._recon_loss(*inputs))
    same_loss(loss, golden["recon.loss"])
    same_norms(clip_model, norms["recon"])


def test_showo_recon_loss_trains_embeddings_on_request(clip_model, config, golden, monkeypatch):
    """The switch gives projector and table a gradient and leaves every other number as it is."""
    inputs = recon_inputs(clip_model, config, golden, "recon")
    monkeypatch.setattr(clip_model, "train_embeddings_in_recon", True)
    loss, = loss_and_grad(clip_model, lambda: clip_model._recon_loss(*inputs))
    same_loss(loss, golden["recon.loss"])
    assert clip_model.mm_projector[0].weight.grad.norm() > 0
    assert clip_model.showo.model.embed_tokens.weight.grad.norm() > 0


def test_parity_showo_recon_vq_loss(vq_model, config, golden, norms):
    features, prompts, given = recon_inputs(vq_model, config, golden, "recon_vq")
    close(vq_model.shown(pixels(golden["in.recon_pixels_u8"]))[:1], golden["recon_vq.small_pixels_first"])
    assert torch.equal(torch.stack([f["und"] for f in features]), golden["recon_vq.given_codes"])
    rows, _ = vq_model._recon_inputs(features, prompts, given)
    n = vq_model.config.num_tokens
    assert torch.equal(rows.ids, golden["recon_vq.token_ids"])
    assert torch.equal(rows.labels, golden["recon_vq.labels"])
    assert torch.equal(rows.labels[:, -n - 1:-1] != IGNORE, golden["recon_vq.mask"])
    assert torch.equal(rows.attention(), golden["recon_vq.attention"])
    loss, = loss_and_grad(vq_model, lambda: vq_model._recon_loss(features, prompts, given))
    same_loss(loss, golden["recon_vq.loss"])
    same_norms(vq_model, norms["recon_vq"])


def test_parity_showo_t2i_loss(clip_model, config, golden, norms):
    features = clip_model.encode([{"pixels": p} for p in pixels(golden["in.t2i_pixels_u8"])], "t2i")
    given = draws(golden, "t2i")
    tokens, labels = clip_model._mask_tokens(torch.stack([f["codes"] for f in features]), given)
    texts = [[] if u < 0.1 else t for t, u in zip(config["t2i_prompts"], given["text_drop"])]
    rows = clip_model._t2i_rows(texts, tokens, labels)
    assert torch.equal(rows.ids, golden["t2i.token_ids"])
    slots = clip_model.config.max_text + 1
    assert torch.equal(rows.labels[:, slots:], golden["t2i.labels"][:, slots:])
    assert torch.equal(rows.attention(), golden["t2i.attention"])
    loss, = loss_and_grad(clip_model, lambda: clip_model._t2i_loss(features, config["t2i_prompts"], given))
    same_loss(loss, golden["t2i.loss"])
    same_norms(clip_model, norms["t2i"])


def i2t_inputs(model, golden):
    system = golden["in.mmu_system_ids"].tolist() if model.config.w_clip_vit else ()
    return i2t_features(model, golden), golden["in.mmu_text_ids"], golden["in.mmu_text_labels"], system


def test_parity_showo_i2t_loss(clip_model, golden, norms):
    features, ids, labels, system = i2t_inputs(clip_model, golden)
    und = torch.stack([f["und"] for f in features])
    rows = clip_model._i2t_rows(ids, labels, und, system)
    at, c = rows.clip_at, clip_model.config
    assert torch.equal(torch.cat([rows.ids[:, :at], rows.ids[:, at + c.num_clip:]], 1), golden["mmu.token_ids_without_image"])
    assert torch.equal(rows.labels, golden["mmu.labels"])
    assert torch.equal(rows.attention(), golden["mmu.attention"])
    with torch.no_grad():
        embeds = clip_model.embed(rows, und)
        close(embeds, golden["mmu.input_embeds"])
        logits = clip_model.showo.lm_head(clip_model.hidden(embeds, rows.attention(), rows.positions))
    close(logits[:, -ids.shape[1]:, :c.first_code], golden["mmu.logits_text_rows"])
    loss, = loss_and_grad(clip_model, lambda: clip_model._i2t_loss(features, ids, labels, system))
    same_loss(loss, golden["mmu.loss"])
    same_norms(clip_model, norms["mmu"])


def test_parity_showo_i2t_vq_loss(vq_model, golden):
    features, ids, labels, _ = i2t_inputs(vq_model, golden)
    rows = vq_model._i2t_rows(ids, labels, torch.stack([f["und"] for f in features]))
    assert torch.equal(rows.ids, golden["mmu_vq.token_ids"])
    assert torch.equal(rows.labels, golden["mmu_vq.labels"])
    assert torch.equal(rows.attention(), golden["mmu_vq.attention"])
    same_loss(vq_model._i2t_loss(features, ids, labels), golden["mmu_vq.loss"])


def test_parity_showo_total_loss(clip_model, config, golden, norms):
    """L = 1 · recon + 1 · i2t + 0 · t2i, through the objective of common.py."""
    clip_model.zero_grad(set_to_none=True)
    recon, i2t = recon_inputs(clip_model, config, golden, "recon"), i2t_inputs(clip_model, golden)
    losses = {"recon": lambda: clip_model._recon_loss(*recon), "i2t": lambda: clip_model._i2t_loss(*i2t),
              "t2i": lambda: pytest.fail("a loss with weight 0 was computed")}
    total, _ = common.objective(losses, {"recon": 1.0, "i2t": 1.0, "t2i": 0.0}, torch.Tensor.backward)
    same_loss(total, config["results"]["total_loss"])
    same_norms(clip_model, norms["total"])


# ---- sampler and captions --------------------------------------------------------------------------------------------


def test_parity_showo_sampler(clip_model, config, golden):
    c, steps = clip_model.config, config["sample_steps"]
    prompts = config["gen_prompts"]
    blank = clip_model._blank(len(prompts))
    cond = clip_model._t2i_rows(prompts, blank, slots=c.max_prompt)
    uncond = clip_model._t2i_rows([[]] * len(prompts), blank, slots=c.max_prompt)
    assert torch.equal(cond.ids, golden["sample.cond_ids"])
    assert torch.equal(uncond.ids, golden["sample.uncond_ids"])
    assert torch.equal(cond.stack(uncond).attention(), golden["sample.attention"])
    given = {k: torch.stack([golden[f"sample.step{i}.{k}"] for i in range(steps)]) for k in ("drawn_ids", "gumbel_uniform")}
    seen = []

    def watch(step, tokens, probs):
        seen.append(step)
        assert torch.equal(tokens + c.first_code, golden[f"sample.step{step}.input_ids"][:, -c.num_tokens - 1:-1])
        if f"sample.step{step}.probs" in golden:
            close(probs, golden[f"sample.step{step}.probs"])
    codes = clip_model._sample(cond, uncond, steps=steps, guidance_scale=config["guidance"], draws=given, watch=watch)
    assert seen == list(range(steps))
    assert torch.equal(codes, golden["sample.codes"])


def test_parity_showo_caption(clip_model, config, golden):
    und = torch.stack([f["und"] for f in i2t_features(clip_model, golden)])[:1]
    ids = torch.tensor([config["caption"]])
    rows = clip_model._i2t_rows(ids, torch.full_like(ids, IGNORE), und, golden["in.mmu_system_ids"].tolist())
    at = rows.clip_at
    assert torch.equal(torch.cat([rows.ids[:, :at], rows.ids[:, at + clip_model.config.num_clip:]], 1),
                       golden["caption.token_ids_without_image"])
    new, first = clip_model._continue(rows, und, config["caption_new"], stop=False)
    close(first[0], golden["caption.first_logits"])
    assert torch.equal(new[0], golden["caption.new_ids"])
