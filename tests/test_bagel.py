"""BAGEL against the fixture made with the original implementation (tests/fixtures/bagel), and what issue-level promises need."""
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import reca_bagel
from reca_bagel import Bagel, BagelConfig

HERE = Path(__file__).parent
FIXTURE = Path(os.environ.get("RECA_FIXTURES", HERE / "fixtures")) / "bagel"
SETTINGS = json.loads((FIXTURE / "config.json").read_text())
TRAINING = ("recon", "recon_drop", "mixed", "t2i", "recon_unfrozen")
SAMPLING = ("gen", "edit", "edit_global", "reconstruct")


def fixture_config():
    llm, vit, vae, s = SETTINGS["llm"], SETTINGS["vit"], SETTINGS["vae"], SETTINGS
    return BagelConfig(
        vocab_size=s["vocab_size"], **llm, **s["ids"], **{f"vit_{k}": v for k, v in vit.items()},
        **{f"vae_{k}": tuple(v) if isinstance(v, list) else v for k, v in vae.items() if k not in ("resolution", "in_channels", "downsample", "out_ch")},
        latent_patch_size=s["latent_patch_size"], max_latent_size=s["max_latent_size"],
        vit_max_num_patch_per_side=s["vit_max_num_patch_per_side"], vae_limits=(96, 32), vit_limits=(98, 28), edit_limits=(98, 28))


def fixture_model():
    """The fixture's weights in a folder of the released layout would load with from_pretrained; here the tensors are at hand."""
    model = Bagel(fixture_config())
    names = reca_bagel.vae_names(model.config)
    state = load_file(FIXTURE / "weights.safetensors")
    vae = load_file(FIXTURE / "ae_weights.safetensors")
    state |= {name: vae[key].squeeze((2, 3)) if "attn" in key and vae[key].dim() == 4 else vae[key] for name, key in names.items()}
    tables = {name: state[name].float() for name in reca_bagel.TABLES}
    for name, table in tables.items():
        assert torch.allclose(model.state_dict()[name], table, atol=1e-6)
    common.load_strictly(model, {k: v.float() for k, v in state.items()}, "fixture")
    return model.eval()


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURE / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return fixture_model()


def close(ours, theirs, tolerance=1e-4):
    """Largest difference relative to the largest entry."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
    assert error < tolerance, error
    return error


def pixels(u8):
    return (u8.float() / 255 - 0.5) / 0.5


def case_inputs(model, golden, case):
    """-> features, ids, draws, condition of a training case, from the fixture's tensors."""
    s = SETTINGS
    if case == "mixed":
        vae = [pixels(golden[f"in.mixed_vae_pixels_u8_{i}"]) for i in range(len(s["mixed_sizes"]))]
        vit = [pixels(golden[f"in.mixed_vit_pixels_u8_{i}"]) for i in range(len(s["mixed_sizes"]))]
    else:
        vae, vit = list(pixels(golden["in.vae_pixels_u8"])), list(pixels(golden["in.vit_pixels_u8"]))
    features = model.encode([{"vit": a, "vae": b} for a, b in zip(vit, vae)], "recon")
    noises = list(golden[f"{case}.draw_vae_noise"])
    if case == "mixed":
        # The original pads the images with zeros to one size before the VAE: encode them so, then crop, to meet its numbers.
        height, width = (max(v.shape[i] for v in vae) for i in (1, 2))
        padded = [torch.nn.functional.pad(v, (0, width - v.shape[2], 0, height - v.shape[1])) for v in vae]
        for f, p in zip(features, model.encode([{"vae": p} for p in padded], "t2i")):
            h, w = f["mean"].shape[1:]
            f["full_mean"], f["mean"], f["logvar"] = p["mean"], p["mean"][:, :h, :w], p["logvar"][:, :h, :w]
        noises = [n[:, :f["mean"].shape[1], :f["mean"].shape[2]] for n, f in zip(noises, features)]
    sizes = [f["mean"][0].numel() // s["latent_patch_size"] ** 2 for f in features]
    draws = {"timestep_normal": golden[f"{case}.draw_timestep_normal"], "vae_noise": noises,
             "flow_noise": golden[f"{case}.draw_flow_noise"].split(sizes)}
    c = model.config
    ids = [[c.bos_token_id, *p, c.eos_token_id] for p in s["t2i_prompts" if case == "t2i" else "prompts"][:len(features)]]
    if case == "recon_drop":
        ids[s["drop_index"]] = []
    return features, ids, draws, None if case == "t2i" else "vit"


@pytest.mark.parametrize("case", TRAINING)
def test_parity_bagel_loss(model, golden, case):
    """Loss, velocities and the gradient norm of every parameter; what the original leaves at exactly 0 has no gradient here."""
    model.zero_grad()
    model.freeze(train_und=case == "recon_unfrozen")
    features, ids, draws, condition = case_inputs(model, golden, case)
    loss = model._flow_loss(features, ids, draws, condition)
    assert loss.item() == pytest.approx(golden[f"{case}.loss"].item(), rel=1e-5)
    loss.backward()
    norms = json.loads((FIXTURE / "grad_norms.json").read_text())[case]
    checked = 0
    for name, parameter in model.named_parameters():
        norm = norms.get(name)
        if name.startswith("vae.") or not norm:                                       # None or exactly 0
            assert parameter.grad is None or parameter.grad.norm() == 0, name
            assert case == "recon_unfrozen" or not parameter.requires_grad, name
        elif norm > 1e-5:
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3), name
            checked += 1
    assert checked > 30
    model.freeze()
    if case != "recon_unfrozen":
        with torch.no_grad():
            velocities, targets, t = model._flow_terms(features, ids, draws, condition)
        close(torch.cat(velocities), golden[f"{case}.velocity"])
        close(torch.cat([(v - y).square().mean(1) for v, y in zip(velocities, targets)]), golden[f"{case}.loss_per_token"])
        close(t, golden[f"{case}.timesteps"])
