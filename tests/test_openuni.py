"""OpenUni: equality with the original implementation, released layouts, prompts, the cut between prompt and queries."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import common
import reca_openuni
from reca_openuni import OpenUni, OpenUniConfig

FIXTURES = Path(os.environ.get("RECA_FIXTURES", Path(__file__).parent / "fixtures"))
HERE = FIXTURES / "openuni"
MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"


def fixture_config(c):
    """The sizes in a fixture's config.json -> OpenUniConfig."""
    lmm = reca_openuni.internvl3(c["llm_hidden_size"], c["llm_layers"], c["llm_heads"], c["llm_kv_heads"], c["llm_intermediate_size"])
    lmm["image_token_id"] = c["image_context_token_id"]
    lmm["text_config"]["vocab_size"] = c["vocab_size"]
    lmm["text_config"]["rope_parameters"]["rope_theta"] = c["rope_theta"]
    lmm["vision_config"].update(
        hidden_size=c["vit_hidden_size"], num_hidden_layers=c["vit_layers"], num_attention_heads=c["vit_heads"],
        intermediate_size=c["vit_intermediate_size"], image_size=[c["vit_image_size"]] * 2, patch_size=[c["vit_patch_size"]] * 2)
    sana = reca_openuni.sana(c["sana_heads"], c["sana_layers"], c["sana_cross_heads"], c["sana_cross_head_dim"], c["sana_head_dim"],
                             c["latent_channels"], c["sana_caption_channels"], mlp_ratio=c["sana_mlp_ratio"])
    vae = reca_openuni.dc_ae(c["dcae_channels"], c["dcae_head_dim"], c["dcae_encoder_layers"], c["dcae_decoder_layers"],
                             c["latent_channels"], c["vae_scaling_factor"])
    return OpenUniConfig(lmm, sana, vae, dict(reca_openuni.SCHEDULER, flow_shift=c.get("test_flow_shift", 3.0)),
                         c["connector_layers"], c["connector_heads"], c["connector_intermediate_size"], c["num_queries"], c["image_size"])


def fixture_model():
    config = json.loads((HERE / "config.json").read_text())
    model = OpenUni(fixture_config(config))
    state, frozen = load_file(HERE / "weights.safetensors"), load_file(HERE / "frozen_weights.safetensors")
    lmm = reca_openuni.internvl_to_transformers({k[4:]: v for k, v in frozen.items() if k.startswith("lmm.")})
    state |= {k: v for k, v in frozen.items() if k.startswith("vae.")} | {"lmm." + k: v for k, v in lmm.items()}
    common.load_strictly(model, {k: v.float() for k, v in state.items()}, "fixture")
    return model.train()


@pytest.fixture(scope="module")
def golden():
    return load_file(HERE / "golden.safetensors")


@pytest.fixture(scope="module")
def config():
    return json.loads((HERE / "config.json").read_text())


@pytest.fixture(scope="module")
def model():
    return fixture_model()


@pytest.fixture(scope="module")
def pixels(golden):
    return 2 * (golden["in.pixels_u8"].float() / 255) - 1


@pytest.fixture(scope="module")
def features(model, pixels):
    return model.encode([{"pixels": p} for p in pixels], "recon")


def close(ours, theirs, tolerance=1e-4):
    """Within `tolerance` of the largest entry."""
    assert ours.shape == theirs.shape
    error = (ours.detach().float() - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


# ---- parity: the frozen parts ----------------------------------------------------------------------------------------


def test_parity_openuni_understanding(model, pixels, golden, features):
    vit = model.lmm.model.vision_tower(model._vit_input(pixels)).last_hidden_state
    close(vit, golden["und.vit_last_hidden"])
    close(torch.stack([row["und"] for row in features]), golden["und.vit_embeds"])


def test_parity_openuni_latents(model, golden, features):
    latents = torch.stack([row["latents"] for row in features])
    close(latents, golden["latents"])
    close(model._pixels(latents[:1])[:, :, :64, :64], golden["vae.decode_first"])


# ---- parity: losses, intermediates, gradients ------------------------------------------------------------------------


class Taps:
    """Keeps what the modules in the middle of a loss return."""

    def __init__(self, model):
        self.out = {}
        watch = {"connector_out": model.connector, "prompt_embeds": model.projector, "caption_norm_out": model.transformer.caption_norm,
                 "sana_block0_out": model.transformer.transformer_blocks[0], "model_pred": model.transformer}
        self.hooks = [module.register_forward_hook(lambda _, inputs, out, name=name: self.keep(name, inputs, out))
                      for name, module in watch.items()]

    def keep(self, name, inputs, out):
        self.out[name] = out[0] if isinstance(out, tuple) else out
        if name == "connector_out":
            self.out["llm_queries_out"] = inputs[0]

    def __enter__(self):
        return self.out

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def fixture_loss(model, features, golden, task):
    ids, mask = golden[f"in.{task}.input_ids"], golden[f"in.{task}.attention_mask"]
    draws = {name: golden[f"{task}.{name}"] for name in ("noise", "u")}
    loss = model._recon_loss_from_ids if task == "image2image" else model._t2i_loss_from_ids
    return loss(features, ids, mask, draws)


@pytest.mark.parametrize("task", ["image2image", "text2image"])
def test_parity_openuni_loss(model, features, golden, config, task):
    model.zero_grad()
    with Taps(model) as out:
        loss = fixture_loss(model, features, golden, task)
    assert loss.item() == pytest.approx(config["losses"][task], rel=1e-5)
    assert loss.item() == pytest.approx(golden[f"{task}.loss"].item(), rel=1e-5)
    for name in ("llm_queries_out", "connector_out", "prompt_embeds", "caption_norm_out", "sana_block0_out", "model_pred"):
        close(out[name], golden[f"{task}.{name}"])
    error = out["model_pred"] - (golden[f"{task}.noise"] - golden["latents"])
    close(error.square().flatten(1).mean(1), golden[f"{task}.per_sample_loss"])

    loss.backward()
    norms = json.loads((HERE / "grad_norms.json").read_text())[task]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == norms.keys()
    for name, norm in norms.items():
        if norm > 1e-5:
            assert trained[name].grad.norm().item() == pytest.approx(norm, rel=1e-3), name
    assert not any(p.grad is not None for name, p in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("task", ["image2image", "text2image"])
def test_parity_openuni_llm_inputs(model, features, golden, task):
    ids, mask = golden[f"in.{task}.input_ids"], golden[f"in.{task}.attention_mask"]
    und = torch.stack([row["und"] for row in features]) if task == "image2image" else None
    prompt = model._prompt_embeds(ids, und)
    queries = model.meta_queries.expand(len(ids), -1, -1)
    close(torch.cat([prompt, queries], 1), golden[f"{task}.llm_inputs_embeds"])
    ours, positions = model._positions(mask)
    assert torch.equal(ours, golden[f"{task}.llm_attention_mask"])
    assert torch.equal(positions, golden[f"{task}.llm_position_ids"])


@pytest.mark.parametrize("task", ["image2image", "text2image"])
def test_parity_openuni_noising(model, features, golden, task, monkeypatch):
    seen = {}
    monkeypatch.setattr(model, "_velocity", lambda noisy, condition, t: seen.update(noisy=noisy, t=t) or noisy)
    fixture_loss(model, features, golden, task)
    assert torch.equal(seen["t"], golden[f"{task}.timesteps"])
    assert torch.equal(model._sigmas(golden[f"{task}.u"]), golden[f"{task}.sigmas"])
    close(seen["noisy"], golden[f"{task}.noisy_latents"])


def test_parity_openuni_noise_levels(model, golden):
    """All 1000 levels, from the middle of their intervals of u: shift 1."""
    sigmas = model._sigmas((torch.arange(1000) + 0.5) / 1000)
    assert torch.equal(sigmas, golden["train_scheduler.sigmas"][:1000])
    assert torch.equal(1000 * sigmas, golden["train_scheduler.timesteps"])


# ---- parity: the sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["sample_text", "sample_image"])
def test_parity_openuni_sampler(model, features, golden, config, case):
    ids, mask = golden[f"{case}.input_ids"], golden[f"{case}.attention_mask"]
    und = features[0]["und"].expand(2, -1, -1) if case == "sample_image" else None
    with torch.no_grad():
        condition = model._condition(model._prompt_embeds(ids, und), mask)
        latents = model._denoise(condition, golden[f"{case}.init_latents"], config["sample_cfg"], config["sample_steps"])
    close(latents, golden[f"{case}.final_latents"])
    close(model._pixels(latents)[:, :, :64, :64], golden[f"{case}.pixels_first64"])


@pytest.mark.parametrize("case", ["sample", "schedule20"])
def test_parity_openuni_schedule(model, golden, config, case):
    solver = reca_openuni.DPMSolverMultistepScheduler.from_config(model.config.scheduler)
    solver.set_timesteps(config["sample_steps"] if case == "sample" else 20)
    assert torch.equal(solver.timesteps, golden[f"{case}.timesteps"])
    close(solver.sigmas, golden[f"{case}.sigmas"], 1e-6)
