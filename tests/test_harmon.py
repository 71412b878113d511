"""Harmon: equality with the original implementation on recorded inputs and draws, key lists, files, and the prompts.

The fixture (tests/fixtures/harmon, or $RECA_FIXTURES/harmon) is a very small Harmon that the original code evaluated; see its README.
"""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import reca_harmon
from reca_harmon import IGNORED, IMAGE_MARKER, Harmon, HarmonConfig

HERE = Path(__file__).parent / "fixtures"
FIXTURE = Path(os.environ.get("RECA_FIXTURES", HERE)) / "harmon"
SPEC = json.loads((FIXTURE / "config.json").read_text())
GOLDEN = load_file(FIXTURE / "golden.safetensors")


def fixture_config():
    s = SPEC
    return HarmonConfig(
        name="harmon_fixture", image_size=s["image_size"], vocab_size=s["vocab_size"], llm_width=s["llm_hidden_size"],
        llm_layers=s["llm_layers"], llm_heads=s["llm_heads"], llm_kv_heads=s["llm_kv_heads"], llm_mlp=s["llm_intermediate_size"],
        rope_theta=s["rope_theta"], rms_norm_eps=s["rms_norm_eps"], tied_head=s["tie_word_embeddings"],
        encoder_width=s["mar_encoder_dim"], encoder_layers=s["mar_encoder_depth"], encoder_heads=s["mar_encoder_heads"],
        decoder_width=s["mar_decoder_dim"], decoder_layers=s["mar_decoder_depth"], decoder_heads=s["mar_decoder_heads"],
        buffer_size=s["buffer_size"], table_size=s["mar_img_size"] // 16, class_num=s["class_num"], dropout=0.0,
        diffusion_width=s["diffloss_width"], diffusion_layers=s["diffloss_depth"], diffusion_repeats=s["diffusion_batch_mul"],
        diffusion_steps=s["num_sampling_steps"], latent_channels=s["vae_embed_dim"], vae_width=s["vae_ch"],
        vae_mult=tuple(s["vae_ch_mult"]), vae_blocks=s["vae_num_res_blocks"], vae_scale=s["vae_scale"], grad_scale=s["grad_scale"])


def fixture_states():
    return tuple({k: v.float() for k, v in load_file(FIXTURE / f"{name}.safetensors").items()} for name in ("weights", "vae_weights"))


@pytest.fixture(scope="module")
def model():
    return Harmon.from_states(fixture_config(), *fixture_states()).float().train()


@pytest.fixture(scope="module")
def features(model):
    pixels = 2 * (GOLDEN["in.pixels_u8"].float() / 255) - 1
    return model.encode([{"pixels": p} for p in pixels], "recon")


def close(mine, theirs, tolerance=1e-4):
    """Relative to the largest entry of what is expected."""
    assert mine.shape == theirs.shape
    error = (mine.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-12)
    assert error < tolerance, f"relative error {error:.2e}"


def watch(monkeypatch, log, owner, name):
    """Note arguments and result of owner.name in log[name] while it is used."""
    method = getattr(owner, name)

    def run(*args, **kwargs):
        log.setdefault(name, []).append((args, result := method(*args, **kwargs)))
        return result
    monkeypatch.setattr(owner, name, run)


def draws_of(task):
    return {name: GOLDEN[f"{task}.{name}"] for name in ("orders", "num_masked", "t", "noise")}


def loss_of(model, features, task):
    ids, mask = GOLDEN[f"in.{task}.input_ids"], GOLDEN[f"in.{task}.attention_mask"]
    if task == "recon":
        return model._recon_loss_from_ids(features, ids, mask, draws_of(task))
    if task == "text2image":
        return model._t2i_loss_from_ids(features, ids, mask, draws_of(task))
    return model._i2t_loss_from_ids(features, ids, mask, GOLDEN["in.image2text.labels"])


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_parity_harmon_vae(model):
    pixels = 2 * (GOLDEN["in.pixels_u8"].float() / 255) - 1
    posterior = model.vae.encode(pixels).latent_dist
    close(posterior.mean, GOLDEN["vae.moments_mean"])
    close(posterior.logvar, GOLDEN["vae.moments_logvar"].clamp(-30, 20))
    close(model.encode_pixels(pixels), GOLDEN["latents"])
    size = GOLDEN["vae.decode_first"].shape[-1]
    close(model.decode_latents(GOLDEN["latents"][:1])[..., :size, :size], GOLDEN["vae.decode_first"])


def test_parity_harmon_understanding(model, features):
    latents = torch.stack([f["latents"] for f in features])
    B, h, w, C = latents.shape
    close(model.mar.encode(latents.view(B, h * w, C), (h, w)), GOLDEN["und.x_enc"])
    close(model.understand(features), GOLDEN["und.z_enc"])


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["recon", "text2image"])
def test_parity_harmon_generation_loss(model, features, task, monkeypatch):
    log = {}
    watch(monkeypatch, log, model.mar, "encode")
    watch(monkeypatch, log, model.mar, "decode")
    watch(monkeypatch, log, model, "assemble")
    watch(monkeypatch, log, model, "hidden_states")
    watch(monkeypatch, log, model.mar.diffloss["net"], "forward")
    watch(monkeypatch, log, reca_harmon, "diffusion_terms")
    loss = loss_of(model, features, task)
    expected = {name: GOLDEN[f"{task}.{name}"] for name in (
        "mask", "x_enc_visible", "llm_inputs_embeds", "llm_attention_mask", "llm_position_ids", "llm_last_hidden",
        "x_enc_after_llm", "z", "net_out", "row_mse", "row_vb", "loss")}
    close(loss, expected["loss"], 1e-5)
    assert abs(loss.item() - SPEC["losses"][task]) < 1e-5 * SPEC["losses"][task]

    close(log["encode"][-1][1], expected["x_enc_visible"])
    # Ours has the padding at the end of each row, theirs in the middle: what is left without it must be the same.
    embeddings, length, _ = log["assemble"][0][1]
    all_hidden = model.hidden_states(embeddings, torch.arange(embeddings.shape[1]).expand(len(embeddings), -1))
    read = log["hidden_states"][0][1]
    for i, valid in enumerate(expected["llm_attention_mask"].bool()):
        assert length[i] == valid.sum()
        assert expected["llm_position_ids"][i][valid].tolist() == list(range(length[i]))
        close(embeddings[i, :length[i]], expected["llm_inputs_embeds"][i][valid])
        close(all_hidden[i, :length[i]], expected["llm_last_hidden"][i][valid])
        close(read[i], expected["llm_last_hidden"][i][valid][-read.shape[1]:])
    close(log["decode"][0][0][0], expected["x_enc_after_llm"])
    close(log["decode"][0][1], expected["z"])
    masked = expected["mask"].bool().flatten().repeat(SPEC["diffusion_batch_mul"])
    close(log["forward"][0][1], expected["net_out"][masked])
    mse, vb = log["diffusion_terms"][0][1]
    close(mse, expected["row_mse"][masked])
    close(vb, expected["row_vb"][masked])


def test_parity_harmon_i2t_loss(model, features, monkeypatch):
    log = {}
    watch(monkeypatch, log, model, "assemble")
    watch(monkeypatch, log, model, "hidden_states")
    loss = loss_of(model, features, "image2text")
    close(loss, GOLDEN["image2text.loss"], 1e-5)
    embeddings, length, _ = log["assemble"][0][1]
    all_hidden = model.hidden_states(embeddings, torch.arange(embeddings.shape[1]).expand(len(embeddings), -1))
    for i in range(len(embeddings)):
        n = length[i]
        assert n == GOLDEN["in.image2text.attention_mask"][i].sum() - 1 + SPEC["visual_tokens"]
        close(embeddings[i, :n], GOLDEN["image2text.llm_inputs_embeds"][i, :n])
        close(all_hidden[i, :n], GOLDEN["image2text.llm_last_hidden"][i, :n])


@pytest.mark.parametrize("case", ["recon", "text2image", "image2text", "recon_without_grad_scale"])
def test_parity_harmon_gradients(model, features, case, monkeypatch):
    if case == "recon_without_grad_scale":
        monkeypatch.setattr(model.config, "grad_scale", 1.0)
    expected = json.loads((FIXTURE / "grad_norms.json").read_text())[case]
    model.zero_grad(set_to_none=True)
    loss_of(model, features, case.removesuffix("_without_grad_scale")).backward()
    mine = {name: p.grad for name, p in model.named_parameters() if not name.startswith("vae.")}
    expected.pop("llm.lm_head.weight", None)                       # tied: the embedding has the sum
    assert mine.keys() == expected.keys()
    for name, norm in expected.items():
        if norm is None:
            assert mine[name] is None or not mine[name].any(), name
        elif norm > 1e-5:
            assert abs(mine[name].norm().item() - norm) < 1e-3 * norm, name
    model.zero_grad(set_to_none=True)


# ---- tables and sampler ----------------------------------------------------------------------------------------------


def test_parity_harmon_tables():
    for name, steps in (("train", 1000), ("gen", SPEC["num_sampling_steps"])):
        tables = reca_harmon.diffusion_schedule(steps, torch.device("cpu"))
        for key in ("betas", "alphas_cumprod"):
            theirs = GOLDEN[f"diffusion.{name}.{key}"]
            assert ((tables[key].double() - theirs).abs() <= 1e-6 * theirs.abs()).all()
    assert tables["original"].tolist() == GOLDEN["diffusion.gen.timestep_map"].tolist()


def sampler_draws():
    draws = {"orders": GOLDEN["sample.orders"]}
    for k in range(SPEC["sample_iters"]):
        for name in ("init_noise", "step_noise"):
            draws[f"iter{k}.{name}"] = GOLDEN[f"sample.iter{k}.{name}"]
    return draws


def test_parity_harmon_sampler(model, monkeypatch):
    model.eval()
    n, log = SPEC["sample_batch"], {}
    ids, mask = GOLDEN["sample.input_ids"], GOLDEN["sample.attention_mask"]
    watch(monkeypatch, log, model, "paint")
    watch(monkeypatch, log, model.mar, "encode")
    with torch.no_grad():
        branches = [model.assemble(ids[half], mask[half])[:2] for half in (slice(0, n), slice(n, 2 * n))]
        latents = model.sample(branches, SPEC["sample_iters"], SPEC["sample_cfg"], temperature=SPEC["sample_temperature"],
                               draws=sampler_draws())
        pixels = model.decode_latents(latents)
    N = SPEC["tokens_per_image"]
    for k, ((arguments, painted), (encoded, _)) in enumerate(zip(log["paint"], log["encode"])):
        close(arguments[0], GOLDEN[f"sample.iter{k}.z"])
        close(painted, GOLDEN[f"sample.iter{k}.sampled"][:len(painted)])
        visible = [set(row.tolist()) for row in encoded[2]]
        theirs = [set((~row.bool()).nonzero().flatten().tolist()) for row in GOLDEN["sample.masks"][k][:n]]
        assert visible == theirs
    assert len(log["paint"]) == SPEC["sample_iters"] and N == latents[0, ..., 0].numel()
    close(latents, GOLDEN["sample.final_tokens"][:n])
    close(pixels, GOLDEN["sample.pixels"])
    model.train()
