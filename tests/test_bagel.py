"""BAGEL against the fixture made with the original implementation (tests/fixtures/bagel), and what issue-level
promises need."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

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
        reca_bagel.LLM | llm | {"vocab_size": s["vocab_size"]},
        reca_bagel.VIT | vit | {"num_hidden_layers": vit["num_hidden_layers"] + 1},
        **s["ids"],
        **{
            f"vae_{k}": tuple(v) if isinstance(v, list) else v
            for k, v in vae.items()
            if k not in ("resolution", "in_channels", "downsample", "out_ch")
        },
        latent_patch_size=s["latent_patch_size"],
        max_latent_size=s["max_latent_size"],
        vit_max_num_patch_per_side=s["vit_max_num_patch_per_side"],
        vae_limits=(96, 32),
        vit_limits=(98, 28),
        edit_limits=(98, 28),
    )


def fixture_model():
    """The fixture's weights in a folder of the released layout would load with from_pretrained; here the tensors are at
    hand."""
    model = Bagel(fixture_config())
    assert SETTINGS["timestep_shift"] == 1.0
    state = load_file(FIXTURE / "weights.safetensors")
    vae = common.autoencoder_from_original(model.vae, load_file(FIXTURE / "ae_weights.safetensors"))
    state |= {f"vae.{name}": tensor for name, tensor in vae.items()}
    for name, table in model.named_buffers():
        assert torch.allclose(state.pop(name).float(), table, atol=1e-6)
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
        # The original pads the images with zeros to one size before the VAE: encode them so, then crop, to meet its
        # numbers.
        height, width = (max(v.shape[i] for v in vae) for i in (1, 2))
        padded = [torch.nn.functional.pad(v, (0, width - v.shape[2], 0, height - v.shape[1])) for v in vae]
        for f, p in zip(features, model.encode([{"vae": p} for p in padded], "t2i")):
            h, w = f["mean"].shape[1:]
            f["full_mean"], f["mean"], f["logvar"] = p["mean"], p["mean"][:, :h, :w], p["logvar"][:, :h, :w]
        noises = [n[:, : f["mean"].shape[1], : f["mean"].shape[2]] for n, f in zip(noises, features)]
    grids = [model.patchify(f["mean"]).shape for f in features]                                              # (h, w, C)
    flow = golden[f"{case}.draw_flow_noise"].split([h * w for h, w, _ in grids])
    draws = {"timestep_normal": golden[f"{case}.draw_timestep_normal"], "vae_noise": noises,
             "flow_noise": [noise.view(grid) for noise, grid in zip(flow, grids)],
             "text_dropped": torch.zeros(len(flow), dtype=torch.bool)}
    c = model.config
    ids = [
        [c.bos_token_id, *p, c.eos_token_id] for p in s["t2i_prompts" if case == "t2i" else "prompts"][: len(features)]
    ]
    if case == "recon_drop":
        ids[s["drop_index"]] = []
    return features, ids, draws, None if case == "t2i" else "vit"


def generation_loss(model, features, ids, draws, condition):
    """recon_loss from ids with one condition, or t2i_loss where there is none."""
    if condition is None:
        return model.t2i_loss(features, ids, draws)
    model.condition = condition
    try:
        return model.recon_loss(features, ids, draws)
    finally:
        del model.condition


@pytest.mark.parametrize("case", TRAINING)
def test_parity_bagel_loss(model, golden, case, monkeypatch):
    """Loss, velocities and the gradient norm of every parameter; what the original leaves at exactly 0 has no gradient
    here."""
    model.zero_grad()
    model.freeze(train_und=case == "recon_unfrozen")
    features, ids, draws, condition = case_inputs(model, golden, case)
    loss = generation_loss(model, features, ids, draws, condition)
    assert loss.item() == pytest.approx(golden[f"{case}.loss"].item(), rel=1e-5)
    loss.backward()
    norms = json.loads((FIXTURE / "grad_norms.json").read_text())[case]
    checked = 0
    for name, parameter in model.named_parameters():
        norm = norms.get(name)
        if name.startswith("vae.") or not norm:  # None or exactly 0
            assert parameter.grad is None or parameter.grad.norm() == 0, name
            assert case == "recon_unfrozen" or not parameter.requires_grad, name
        elif norm > 1e-5:
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3), name
            checked += 1
    assert checked > 10
    model.freeze()
    if case != "recon_unfrozen":
        caught, predict = {}, Bagel._velocities

        def record_velocities(self, contexts, x, t):
            caught["t"], caught["v"] = t, predict(self, contexts, x, t)
            return caught["v"]

        monkeypatch.setattr(Bagel, "_velocities", record_velocities)
        with torch.no_grad():
            total = generation_loss(model, features, ids, draws, condition)
        close(torch.cat([v.flatten(0, 1) for v in caught["v"]]), golden[f"{case}.velocity"])
        z = model._draw_latents(features, draws["vae_noise"])
        errors = [(v - (n - zi)).square().mean(-1).flatten() for v, n, zi in zip(caught["v"], draws["flow_noise"], z)]
        close(torch.cat(errors), golden[f"{case}.loss_per_token"])
        assert total.item() == pytest.approx(torch.cat(errors).mean().item(), rel=1e-6)
        close(caught["t"], golden[f"{case}.timesteps"])


# ---- what the sequence looks like --------------------------------------------------------------------


class Recorder:
    """Watches a forward: the rows of every block, their rotary positions, and who was allowed to see whom in the first
    layer."""

    def __init__(self, model, monkeypatch):
        self.blocks, self.seen, self.model = [], [], model
        read, noisy, attend = Bagel._read_block, Bagel._noisy_block, reca_bagel.attend

        def record(contexts, und, gen, causal, compute):
            before = [c.position for c in contexts]
            self.seen.append([])
            rows = compute()
            self.blocks.append({"images": [c.images for c in contexts], "und": und, "gen": gen, "causal": causal,
                                "before": before, "after": [c.position for c in contexts], "rows": rows,
                                "seen": self.seen[-1]})
            return rows

        def record_read(this, contexts, und, gen=None, causal=False, final=False):
            return record(contexts, und, gen, causal, lambda: read(this, contexts, und, gen, causal, final))

        def record_noisy(this, contexts, und, gen):
            return record(contexts, und, gen, False, lambda: noisy(this, contexts, und, gen))

        def record_attend(q, k, v, causal):
            n, s = q.shape[1], k.shape[1]
            probe = torch.eye(s)[:, None].expand(1, s, k.shape[2], s)       # values = identity: it shows the weights
            weights = attend(torch.zeros(1, n, q.shape[2], s), torch.zeros(1, s, k.shape[2], s), probe, causal)
            self.seen[-1].append(weights.view(n, q.shape[2], s)[:, 0] > 0)  # [n, S] who is seen
            return attend(q, k, v, causal)

        monkeypatch.setattr(Bagel, "_read_block", record_read)
        monkeypatch.setattr(Bagel, "_noisy_block", record_noisy)
        monkeypatch.setattr(reca_bagel, "attend", record_attend)


def places(golden, case):
    """Packed index of every row of a sample, in our order: ViT block, text, start and end marker, latents."""
    result, start, text = [], 0, set(golden[f"{case}.packed_text_indexes"].tolist())
    latents = golden[f"{case}.packed_vae_token_indexes"].tolist()
    for length in golden[f"{case}.sample_lens"].tolist():
        own = [i for i in range(start, start + length)]
        noisy = [i for i in latents if i in own]
        assert noisy == list(range(noisy[0], noisy[-1] + 1)) and {noisy[0] - 1, noisy[-1] + 1} <= text
        result.append(
            {"context": own[: own.index(noisy[0]) - 1], "markers": [noisy[0] - 1, noisy[-1] + 1], "latents": noisy}
        )
        start += length
    return result


@pytest.mark.parametrize("case", ("recon", "recon_drop", "mixed", "t2i"))
def test_parity_bagel_sequence(model, golden, case, monkeypatch):
    """Attention pattern, rotary positions, rows of both position tables, input embeddings and last hidden states, row
    by row."""
    features, ids, draws, condition = case_inputs(model, golden, case)
    record = Recorder(model, monkeypatch)
    with torch.no_grad():
        generation_loss(model, features, ids, draws, condition)
    rows = places(golden, case)
    total, width = sum(golden[f"{case}.sample_lens"].tolist()), model.config.llm["hidden_size"]
    embeds, positions = torch.full((total, width), float("nan")), torch.full((total,), -1)
    pattern, hidden = torch.zeros(total, total, dtype=torch.bool), torch.full((total, width), float("nan"))
    used = [0] * len(rows)  # context rows that were written so far
    for b in record.blocks:
        for g, images in enumerate(b["images"]):
            length = b["und"][g].shape[1]
            visible = b["seen"][g :: len(b["images"])][: 1 + (b["gen"] is not None)]      # of the first layer: und, gen
            for j, i in enumerate(images):
                if b["gen"] is None:
                    own = rows[i]["context"][used[i] : used[i] + length]
                    embeds[own], keys = b["und"][g][j], rows[i]["context"][: used[i] + length]
                    positions[own] = b["before"][g] + (torch.arange(length) if b["causal"] else 0)
                    pattern[torch.tensor(own)[:, None], torch.tensor(keys)] = visible[0]
                    used[i] += length
                else:
                    own, keys = (
                        rows[i]["markers"] + rows[i]["latents"],
                        rows[i]["context"] + rows[i]["markers"] + rows[i]["latents"],
                    )
                    embeds[own] = torch.cat([b["und"][g][j], b["gen"][g][j]])
                    positions[own] = max(
                        [a["after"][k] for a in record.blocks[:-1] for k, im in enumerate(a["images"]) if i in im],
                        default=0,
                    )
                    assert b["before"][g] == b["after"][g] == 0
                    pattern[torch.tensor(own)[:, None], torch.tensor(keys)] = torch.cat(visible)
                    hidden[rows[i]["latents"]] = b["rows"][g][j]
    assert torch.equal(positions, golden[f"{case}.packed_position_ids"])
    assert torch.equal(pattern, golden[f"{case}.attention"])
    latents = golden[f"{case}.mse_loss_indexes"]
    if f"{case}.input_embeds" in golden:
        close(embeds, golden[f"{case}.input_embeds"])
    if f"{case}.last_hidden" in golden:
        close(hidden[latents], golden[f"{case}.last_hidden"][latents])  # the other rows are never computed here
    side = model.config.max_latent_size
    table = torch.cat([model.latent_pos_embed(*model.patchify(f["mean"]).shape[:2]) for f in features])
    assert torch.equal(
        table, model.latent_pos_embed.pos_embed[golden[f"{case}.packed_latent_position_ids"]]
    ) and side**2 == len(model.latent_pos_embed.pos_embed)
    if condition:
        table = torch.cat([model.vit_pos_embed(*f["vit"].shape[:2]) for f in features])
        assert torch.equal(table, model.vit_pos_embed.pos_embed[golden[f"{case}.packed_vit_position_ids"]])
        assert [f["vit"].shape[0] * f["vit"].shape[1] for f in features] == golden[f"{case}.vit_token_seqlens"].tolist()


@pytest.mark.parametrize("case", ("recon", "mixed", "t2i"))
def test_parity_bagel_encoders(model, golden, case):
    """Posterior moments, latents, connector output (before its position table) and time embeddings."""
    features, ids, draws, condition = case_inputs(model, golden, case)
    with torch.no_grad():
        if case == "mixed":
            close(torch.stack([f["full_mean"] for f in features]), golden["mixed.vae_mean"])
        else:
            close(torch.stack([f["mean"] for f in features]), golden[f"{case}.vae_mean"])
            close(torch.stack([f["logvar"] for f in features]), golden[f"{case}.vae_logvar"])
        for f, noise, full in zip(features, draws["vae_noise"], golden[f"{case}.latents"]):
            latent = model.unpatchify(model._draw_latents([f], [noise])[0])
            close(latent, full[:, : latent.shape[1], : latent.shape[2]])
            assert torch.equal(model.unpatchify(model.patchify(latent)), latent)
        if condition:
            embeds = [model.understand([f])[0] - model.vit_pos_embed(*f["vit"].shape[:2]) for f in features]
            close(torch.cat(embeds), golden[f"{case}.vit_embeds"])
        if f"{case}.timestep_embeds" in golden:
            ours = model._embed_time(golden[f"{case}.timesteps"])
            close(
                torch.cat([e.expand(n[..., 0].numel(), -1) for e, n in zip(ours, draws["flow_noise"])]),
                golden[f"{case}.timestep_embeds"],
            )


def test_parity_bagel_resize_rule(golden):
    for longest, shortest, stride, w, h, width, height in golden["resize_rule"].tolist():
        assert reca_bagel.fit(w, h, longest, shortest, stride) == (width, height)
    assert reca_bagel.fit(1024, 768, 224, 224, 14) == (224, 168) and reca_bagel.fit(640, 480, 1024, 512, 16) == (
        688,
        512,
    )


# ---- sampling ----------------------------------------------------------------------------------------


def sampler(case):
    names = {"num_steps": "num_timesteps", "timestep_shift": "timestep_shift", "guidance_scale": "cfg_text_scale",
             "image_guidance_scale": "cfg_img_scale", "interval": "cfg_interval", "renorm": "cfg_renorm_type",
             "renorm_min": "cfg_renorm_min"}
    return {ours: SETTINGS["results"][case][theirs] for ours, theirs in names.items()}


def source(golden):
    return Image.fromarray(golden["in.source_pixels_u8"].permute(1, 2, 0).numpy())


def sample_case(model, golden, case, monkeypatch, copies=1):
    """Run a sampling case with the fixture's draws -> (images, trace, latents, contexts); copies: the same request
    several times."""
    size, c, caught = SETTINGS["results"][case]["image_shapes"], model.config, {}
    draws = {"noise": [golden[f"{case}.init_noise"].view(size[0] // c.stride, size[1] // c.stride, -1)] * copies}
    decode, sample = Bagel._decode, Bagel._sample

    def record_decode(self, latents):
        caught["latents"], caught["pixels"] = [self.unpatchify(z) for z in latents], decode(self, latents)
        return caught["pixels"]

    def record_sample(self, sets, noise, **more):
        caught["contexts"] = sets[0]
        return sample(self, sets, noise, **more)

    monkeypatch.setattr(Bagel, "_decode", record_decode)
    monkeypatch.setattr(Bagel, "_sample", record_sample)
    prompt = SETTINGS[{"gen": "gen_prompt", "reconstruct": "recon_prompt"}.get(case, "edit_prompt")]
    ids = [[c.bos_token_id, *prompt, c.eos_token_id]] * copies
    seen = {"vae": pixels(golden["edit.source_resized_u8"]), "vit": golden["edit.source_vit"]}
    kinds = {"gen": (), "reconstruct": ("vit",)}.get(case, ("vae", "vit"))
    if "vae" in kinds:
        draws["vae_noise"] = [golden[f"{case}.draw_vae_noise_0"][0]] * copies
    options = {**sampler(case), "trace": []}
    with torch.no_grad():
        images = model._paint([seen] * copies, kinds, ids, size, 0, draws, options)
    return images, options["trace"], caught


def test_parity_bagel_source_image(model, golden):
    """The photo as the VAE gets it, and what the ViT gets of that, with the limits that the fixture was made with."""
    ours = model.preprocess(source(golden), "edit")
    close(common.normalize(ours["vae"]), pixels(golden["edit.source_resized_u8"]), 1e-6)
    close(common.normalize(ours["vit"]), golden["edit.source_vit"], 1e-6)


@pytest.mark.parametrize("case", SAMPLING)
def test_parity_bagel_sampling(model, golden, case, monkeypatch):
    images, trace, caught = sample_case(model, golden, case, monkeypatch)
    s = SETTINGS["results"][case]
    close(torch.tensor([t for t, *_ in trace]), golden[f"{case}.timesteps"], 1e-6)
    close(torch.tensor([scales for *_, scales in trace]), golden[f"{case}.scales"], 1e-6)
    close(torch.stack([x[0].flatten(0, 1) for _, x, _, _ in trace]), golden[f"{case}.x"])
    close(torch.stack([v[0].flatten(0, 1) for _, _, v, _ in trace]), golden[f"{case}.velocity"])
    close(caught["latents"][0][None], golden[f"{case}.latent"])
    close(caught["pixels"][0][None], golden[f"{case}.image_float"])
    expected = ((golden[f"{case}.image_float"][0] * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    assert images[0].size == (s["image_shapes"][1], s["image_shapes"][0])
    ours = torch.from_numpy(np.array(images[0])).permute(2, 0, 1)
    assert (ours.int() - expected.int()).abs().max() <= 1
    context = caught["contexts"][0]
    assert context.position == golden[f"{case}.position_id"].item()
    assert context.keys_values[0][0].shape[1] == golden[f"{case}.context_len"].item()


@pytest.mark.parametrize("case", ("gen", "edit_global"))
def test_bagel_batch_does_not_change_an_image(model, golden, case, monkeypatch):
    """Also with "global" renormalisation, which in the original mixes the images of a batch."""
    _, _, caught = sample_case(model, golden, case, monkeypatch, copies=3)
    for latent in caught["latents"]:
        close(latent[None], golden[f"{case}.latent"])


def test_parity_bagel_describe(model, golden):
    c = model.config
    vit = model.encode([{"vit": golden["edit.source_vit"]}], "i2t")[0]["vit"]
    start, *answer = golden["describe.ids"].tolist()
    assert start == c.bos_token_id
    ids = [c.bos_token_id, *SETTINGS["describe_prompt"], c.eos_token_id]
    answer = answer[: answer.index(c.eos_token_id)] if c.eos_token_id in answer else answer
    with torch.no_grad():
        ours = model._answer([{"vit": vit}] * 2, [ids, ids[:2] + ids[-1:]], len(golden["describe.ids"]) - 1)
    assert ours[0] == answer


# ---- loading and saving ------------------------------------------------------------------------------


def test_bagel_key_lists():
    """Names and shapes at the released size, built on the meta device, against the reference's lists."""
    with torch.device("meta"):
        model = Bagel()
    shapes = {name: list(t.shape) for name, t in [*model.state_dict().items(), *model.named_buffers()]}
    manifest = json.loads((HERE / "fixtures/manifests/bagel.json").read_text())
    assert {n: s for n, s in shapes.items() if not n.startswith("vae.")} == manifest
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_539_861_056
    manifest = json.loads((HERE / "fixtures/manifests/flux_ae.json").read_text())
    assert {n: list(t.shape) for n, t in common.autoencoder_to_original(model.vae).items()} == manifest


def test_parity_bagel_files(model, golden, tmp_path, monkeypatch):
    """save -> load -> save is equal byte for byte; the saved file has the fixture's names, values and tables; strict
    but for the tables."""
    model.save_pretrained(tmp_path / "a")
    again = Bagel.from_pretrained(str(tmp_path / "a"))
    again.save_pretrained(tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir()) and {
        "ema.safetensors",
        "ae.safetensors",
        "llm_config.json",
        "vit_config.json",
    } <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert again.config == model.config
    for name, file in (("ema", "weights"), ("ae", "ae_weights")):
        saved, theirs = load_file(tmp_path / "a" / f"{name}.safetensors"), load_file(FIXTURE / f"{file}.safetensors")
        assert saved.keys() == theirs.keys()
        for key in saved:
            assert saved[key].shape == theirs[key].shape, key
            assert torch.allclose(saved[key], theirs[key].float(), atol=1e-6), key
    # bf16: what ComfyUI-BAGEL loads; half the bytes, still with the tables
    model.save_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "c/ema.safetensors").values()} == {torch.bfloat16}
    # BAGEL-RecA's name, without tables, frozen parts in another precision
    state = load_file(tmp_path / "a/ema.safetensors")
    for table in reca_bagel.TABLES:
        del state[table]
    (tmp_path / "a/ema.safetensors").unlink()
    save_file(state, tmp_path / "a/model_bf16.safetensors")
    mixed = Bagel.from_pretrained(str(tmp_path / "a"), dtype=torch.bfloat16)
    for name, p in mixed.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("vae.") else torch.bfloat16), name
        p.data = p.data.float() if p.requires_grad else p.data
    assert torch.equal(mixed.latent_pos_embed.pos_embed, model.latent_pos_embed.pos_embed)
    features, ids, draws, condition = case_inputs(model, golden, "recon")
    with torch.no_grad():                                     # experts of different precision meet in one attention
        loss = generation_loss(mixed, features, ids, draws, condition)
    assert loss.item() == pytest.approx(golden["recon.loss"].item(), rel=0.02)
    # what does not fit is named, before any weight is read (29 GB)
    monkeypatch.setattr(Bagel, "_materialize", lambda *_: pytest.fail("read"))
    for change, word in (
        ({"extra": torch.zeros(1)}, "unexpected"),
        ({"llm2vae.bias": None}, "lacks"),
        ({"vae2llm.bias": torch.zeros(3)}, "other shapes"),
    ):
        broken = {k: v for k, v in {**state, **change}.items() if v is not None}
        save_file(broken, tmp_path / "a/model_bf16.safetensors")
        with pytest.raises(common.InputError, match=f"{word}.*{next(iter(change))}"):
            Bagel.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model_bf16.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(common.InputError):
        Bagel.from_pretrained(str(tmp_path / "a"))


def test_bagel_sampler_settings_are_saved(tmp_path, monkeypatch):
    """The config's settings come back with a checkpoint of ours; a folder without them has the defaults; what is given
    counts before both."""
    model = Bagel.random("tiny")
    model.config.num_steps = 7
    model.config.guidance_scale = 1.5
    model.save_pretrained(tmp_path)
    seen = []

    def sample(self, sets, noise, **options):
        seen.append((options["num_steps"], options["guidance_scale"], options["image_guidance_scale"]))
        return noise
    monkeypatch.setattr(Bagel, "_sample", sample)
    Bagel.from_pretrained(str(tmp_path)).generate(["red circle"])
    Bagel.from_pretrained(str(tmp_path)).reconstruct(pictures(1), num_steps=3)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["reca"]["num_steps"], config["reca"]["guidance_scale"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    Bagel.from_pretrained(str(tmp_path)).generate(["red circle"], guidance_scale=1.0)
    assert seen == [(7, 1.5, 1.0), (3, 1.5, 2.0), (50, 1.0, 1.0)]


# ---- an independent, plain forward -------------------------------------------------------------------


def plain_sequence(model, blocks):
    """One sample, all rows at once, a dense mask, absolute positions -> final states [L, D], and which rows are gen.

    blocks: (kind, und rows or None, gen rows or None). Kinds: "full", "causal", "noise". Rows of a block with gen rows:
    start marker, gen rows, end marker.
    """
    c, layers = model.config, model.blocks()
    rows, gen, positions, block_of, kinds, position = [], [], [], [], [], 0
    for b, (kind, und, latents) in enumerate(blocks):
        part = und if latents is None else torch.cat([und[:1], latents, und[1:]])
        rows.append(part)
        gen += [latents is not None and 0 < i < len(part) - 1 for i in range(len(part))]
        positions += [position + i if kind == "causal" else position for i in range(len(part))]
        position += len(part) if kind == "causal" else 1
        block_of += [b] * len(part)
        kinds.append(kind)
    x, gen, order = torch.cat(rows), torch.tensor(gen)[:, None], torch.arange(len(block_of))
    block_of = torch.tensor(block_of)
    past, own = block_of[:, None] > block_of[None], block_of[:, None] == block_of[None]
    causal = torch.tensor([k == "causal" for k in kinds])[block_of][:, None]
    mask = past | own & (~causal | (order[:, None] >= order[None]))
    frequencies = c.llm["rope_theta"] ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
    angles = (torch.tensor(positions)[:, None] * frequencies).repeat(1, 2)[:, None]  # [L, 1, d]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.llm["rms_norm_eps"]) * weight

    def both(function):  # each row by its own expert
        return torch.where(gen if function("").dim() == 2 else gen[..., None], function("_moe_gen"), function(""))

    def rope(x):
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    for layer in layers:
        w = dict(layer.named_parameters())
        y = both(lambda e: norm(x, w[f"input_layernorm{e}.weight"]))

        def heads(name, e):
            return (y @ w[f"self_attn.{name}_proj{e}.weight"].T + w[f"self_attn.{name}_proj{e}.bias"]).unflatten(
                -1, (-1, c.head_dim)
            )

        q, k = (rope(both(lambda e: norm(heads(name, e), w[f"self_attn.{name}_norm{e}.weight"]))) for name in "qk")
        v = both(lambda e: heads("v", e))
        share = c.llm["num_attention_heads"] // c.llm["num_key_value_heads"]
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(share, 1)) / c.head_dim**0.5
        heard = torch.einsum(
            "hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v.repeat_interleave(share, 1)
        ).flatten(1)
        x = x + both(lambda e: heard @ w[f"self_attn.o_proj{e}.weight"].T)
        y = both(lambda e: norm(x, w[f"post_attention_layernorm{e}.weight"]))

        def mlp(e):
            up, gate, down = (w[f"mlp{e}.{name}_proj.weight"] for name in ("up", "gate", "down"))
            return (F.silu(y @ gate.T) * (y @ up.T)) @ down.T

        x = x + both(mlp)
    final = model.language_model["model"]
    return both(lambda e: norm(x, final[f"norm{e}"].weight)), gen[:, 0]


def test_bagel_condition_on_the_vae(model, golden):
    """Table 7's row: clean latents of the same image instead of the ViT, at t = 0 through the generation expert, with
    their gradient. Against the plain forward: the loss, and every gradient except those that freezing the
    understanding rows removes on purpose."""
    features, ids, draws, _ = case_inputs(model, golden, "recon")
    draws["condition_noise"] = [n.flip(-1) for n in draws["vae_noise"]]
    for freeze in (True, False):
        model.freeze(train_und=not freeze)
        model.zero_grad()
        loss = generation_loss(model, features, ids, draws, "vae")
        loss.backward()
        ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        total, count = 0, 0
        for i, (f, text) in enumerate(zip(features, ids)):
            t = draws["timestep_normal"][i].sigmoid()
            z, clean = (model._draw_latents([f], [draws[name][i]])[0] for name in ("vae_noise", "condition_noise"))
            noise = draws["flow_noise"][i]
            embed = lambda x, t: model._embed_latents(x[None], t[None])[0]  # noqa: E731
            hidden, gen = plain_sequence(
                model,
                [
                    ("full", model._markers(1)[0], embed(clean, t * 0)),
                    ("causal", model._embed_ids([text])[0], None),
                    ("noise", model._markers(1)[0], embed((1 - t) * z + t * noise, t)),
                ],
            )
            velocity = model.llm2vae(hidden[gen])[z[..., 0].numel() :]
            error = (velocity - (noise - z).flatten(0, 1)).square().mean(-1)
            total, count = total + error.sum(), count + len(error)
        assert (total / count).item() == pytest.approx(loss.item(), rel=1e-5)
        (total / count).backward()
        if not freeze:
            assert len(ours) > 50
            for name, grad in ours.items():
                close(grad, dict(model.named_parameters())[name].grad, 1e-3)
    model.freeze()


def test_bagel_i2t_loss(model, golden):
    """The answers' cross-entropy, two turns, two images and a text without image, against the plain forward; only
    answers count."""
    features, _, _, _ = case_inputs(model, golden, "recon")
    c, head = model.config, model.language_model["lm_head"]
    block = lambda ids: [c.bos_token_id, *ids, c.eos_token_id]  # noqa: E731
    turns = [[([3, 4], [5, 6, 7]), ([8], [9])], [([10], [11, 12])], [([13, 14], [15])]]
    vits = [features[0]["vit"], features[1]["vit"], None]
    ids = [sum((block(q) + block(a) for q, a in t), []) for t in turns]
    labels = [sum(([-100] * (len(q) + 2) + a + [c.eos_token_id, -100] for q, a in t), []) for t in turns]
    class Words:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(w) for w in text.split()]}

    model.tokenizer = Words()
    texts = [[(" ".join(map(str, q)), " ".join(map(str, a))) for q, a in t] for t in turns]
    with torch.no_grad():
        ours = model.i2t_loss([{} if v is None else {"vit": v} for v in vits], texts)
        model.tokenizer = None
        total, count = 0, 0
        for vit, i, label in zip(vits, ids, labels):
            image = (
                []
                if vit is None
                else [
                    (
                        "full",
                        torch.cat([model._markers(1)[0][:1], model.understand([{"vit": vit}])[0], model._markers(1)[0][1:]]),
                        None,
                    )
                ]
            )
            hidden, _ = plain_sequence(model, image + [("causal", model._embed_ids([i])[0], None)])
            label = torch.tensor(label)
            total = total + F.cross_entropy(
                head(hidden[-len(i) :])[label != -100], label[label != -100], reduction="sum"
            )
            count += int((label != -100).sum())
    assert ours.item() == pytest.approx((total / count).item(), rel=1e-5)


# ---- training ----------------------------------------------------------------------------------------


def random_tiny():
    torch.manual_seed(0)
    model = Bagel.random("tiny")
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    model.set_und(size=32)
    return model


def pictures(count, sizes=((64, 64),)):
    rng = np.random.default_rng(0)
    return [common.draw_scene(common.random_scene(rng), 64).resize(sizes[i % len(sizes)]) for i in range(count)]


def test_bagel_draws_follow_the_image():
    """An image draws the same numbers in any batch, so a batch's loss is the token-weighted mean of its images' losses;
    images of different sizes are encoded as they are (no padding); checkpointing the layers changes nothing."""
    model = random_tiny()
    samples = [model.preprocess(p, "recon") for p in pictures(5, ((64, 64), (64, 32), (48, 64)))]
    features, texts = model.encode(samples, "recon"), common.templates()[:5]
    assert len({f["mean"].shape for f in features}) == 3
    alone = [model.encode([s], "recon")[0] for s in samples]
    for a, b in zip(features, alone):
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in ("vit", "mean", "logvar"))
    rng = lambda positions: common.Rng(3, "recon", 0, positions=positions)  # noqa: E731
    loss = model.recon_loss(features, texts, rng=rng(range(5)))
    tokens = [f["mean"][0].numel() // 4 for f in features]
    parts = [model.recon_loss([f], [t], rng=rng([i])).item() for i, (f, t) in enumerate(zip(features, texts))]
    assert loss.item() == pytest.approx(sum(p * n for p, n in zip(parts, tokens)) / sum(tokens), rel=1e-5)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for g in model.parameter_groups(0.0) for p in g["params"]} == {
        id(p) for n, p in model.named_parameters() if n in grads
    }
    common.checkpoint_blocks(model, argparse.Namespace(checkpointing=True))
    model.zero_grad()
    again = model.recon_loss(features, texts, rng=rng(range(5)))
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, grad in grads.items():
        close(dict(model.named_parameters())[name].grad, grad, 1e-4)


def test_bagel_stochastic_rounding():
    x, generator = torch.randn(20000, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    target, total = torch.zeros(20000, dtype=torch.bfloat16), 0
    for _ in range(64):
        common.StochasticAdamW._store(target, x, generator)
        assert ((target.float() - x).abs() <= x.abs() / 128).all()  # one of the two neighbours
        total = total + target.float()
    nearest = (x.bfloat16().float() - x).abs().mean()
    assert (total / 64 - x).abs().mean() < 0.3 * nearest  # right in the mean
    exact = x.bfloat16()
    common.StochasticAdamW._store(target, exact.float(), generator)
    assert torch.equal(target, exact)  # what bf16 can hold stays


def optimize(model, make, steps, draws, stored):
    """Train the fixture's model for some steps -> the curve of losses. Weights are stored, and gradients given to the
    optimizer, in `stored`; the forward runs in float32 on their exact values (bf16 products are slow on a CPU, and
    are not what is tested)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [torch.nn.Parameter(p.detach().to(stored)) for p in trained]
    optimizer, curve = make(weights), []
    for step in range(steps):
        with torch.no_grad():
            for p, w in zip(trained, weights):
                p.copy_(w)
        loss = generation_loss(model, *draws(step), "vit")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for p, w in zip(trained, weights):
            w.grad, p.grad = p.grad.to(stored), None
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


@pytest.mark.skipif("RECA_FIXTURES" in os.environ, reason="the bounds were set for the fixture in tests/")
def test_bagel_bf16_optimizer_follows_float32(golden):
    """bf16 weights and moments with stochastic rounding against float32 AdamW over 160 steps: the loss curves differ by
    less than two float32 runs with other noise do. Rounding to nearest, for comparison, stays behind: its updates
    are lost."""

    def draws(seed):
        def at(step):
            g = torch.Generator().manual_seed(1000 * seed + step)
            features, ids, given, _ = inputs
            given = {
                "timestep_normal": torch.randn(2, generator=g),
                "vae_noise": [torch.randn(n.shape, generator=g) for n in given["vae_noise"]],
                "flow_noise": [torch.randn(n.shape, generator=g) for n in given["flow_noise"]],
                "text_dropped": given["text_dropped"],
            }
            return features, ids, given

        return at

    def run(kind, seed):
        model = fixture_model()
        options = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-15}
        make = {"fp32": torch.optim.AdamW, "bf16": common.StochasticAdamW, "nearest": torch.optim.AdamW}[kind]
        return optimize(
            model,
            lambda weights: make(weights, weight_decay=0.0, **options),
            160,
            draws(seed),
            torch.float32 if kind == "fp32" else torch.bfloat16,
        )

    inputs = case_inputs(fixture_model(), golden, "recon")
    ours, float32, other, nearest = run("bf16", 1), run("fp32", 1), run("fp32", 2), run("nearest", 1)
    end = slice(110, None)
    fall = float32[:30].mean() - float32[end].mean()
    assert fall > 0.05
    assert (ours - float32)[end].mean().abs() < 0.05 * fall
    assert (ours - float32).abs().mean() < 0.2 * (other - float32).abs().mean()
    assert (nearest - float32)[end].mean() > 5 * (ours - float32)[end].mean().abs()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model of random weights in the released layout, and images of two sizes."""
    root = tmp_path_factory.mktemp("bagel")
    random_tiny().save_pretrained(root / "model")
    (root / "images").mkdir()
    for i, picture in enumerate(pictures(7, ((64, 64), (64, 48)))):
        picture.save(root / "images" / f"{i}.png")
    return root


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(Bagel, "condition", "vit")
    monkeypatch.setattr(sys, "argv", ["reca_bagel.py", *map(str, arguments)])
    reca_bagel.main()


def rows(out):
    return [
        {k: v for k, v in r.items() if k != "images_per_s"} for r in common.read_json(out / "log.jsonl", lines=True)
    ]


def agree(a, b, tolerance):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for key in ("step", "loss", "grad_norm", "lr"):
            assert x[key] == pytest.approx(y[key], rel=tolerance), (key, x, y)


def training(workplace):
    """The command line of a short run in the workplace."""
    flags = ["--accum", 1, "--warmup", 2, "--lr", 1e-3, "--und-size", 32, "--workers", 0, "--sampling-steps", 3]
    return ["--model", workplace / "model", "--data", workplace / "images", *flags]


def test_bagel_two_ranks_equal_one_and_resume_on_one(workplace, monkeypatch):
    """FSDP2 over two gloo processes: the losses, gradient norms and weights of one process with the same global batch;
    its sharded checkpoint goes on in one process as if nothing had happened, and its ema.safetensors is the whole
    model."""
    base = [*training(workplace), "--save-every", 2, "--sample-every", 1]
    run_main(monkeypatch, *base, "--batch", 4, "--steps", 4, "--out", workplace / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [HERE.parent / "reca_bagel.py", *base, "--batch", 4, "--steps", 2, "--out", workplace / "two"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "FSDP2 over 2 ranks" in done.stdout
    agree(rows(workplace / "two"), rows(workplace / "one")[:2], 1e-5)
    one, two = (load_file(workplace / out / "checkpoint-000002/ema.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() == load_file(workplace / "model/ema.safetensors").keys()
    for key in one:
        assert torch.allclose(one[key], two[key], atol=2e-5), key
    for picture in ("step_000001.png", "step_000002.png"):  # of sharded weights, and of those that rank 0 gathered
        one, two = (np.asarray(Image.open(workplace / out / "previews" / picture), float) for out in ("one", "two"))
        assert np.abs(one - two).max() <= 2, picture
    run_main(monkeypatch, *base, "--batch", 4, "--steps", 4, "--out", workplace / "two", "--resume")
    agree(rows(workplace / "two"), rows(workplace / "one"), 1e-5)


def test_bagel_resume_is_exact_with_stochastic_rounding(workplace, monkeypatch):
    """An interrupted run ends in the same bytes as an uninterrupted one, random rounding, cache and all."""
    base = [*training(workplace), "--batch", 2, "--optimizer", "bf16", "--precision", "bf16"]
    base += ["--cache", workplace / "cache"]
    run_main(monkeypatch, *base, "--steps", 4, "--out", workplace / "whole")
    run_main(monkeypatch, *base, "--steps", 2, "--out", workplace / "parts")
    run_main(monkeypatch, *base, "--steps", 4, "--out", workplace / "parts", "--resume")
    assert rows(workplace / "whole") == rows(workplace / "parts")
    whole, parts = ((workplace / out / "checkpoint-000004/ema.safetensors").read_bytes() for out in ("whole", "parts"))
    assert whole == parts
    trained = load_file(workplace / "whole/checkpoint-000004/ema.safetensors")
    start = load_file(workplace / "model/ema.safetensors")
    moved = {k for k in trained if not torch.equal(trained[k], start[k].to(trained[k].dtype))}
    expected = {n for n, p in random_tiny().named_parameters() if p.requires_grad}
    assert moved <= expected and len(moved) > 0.8 * len(expected)  # and nothing that is frozen


def test_bagel_tiny_end_to_end(workplace, monkeypatch, capsys):
    """The toy from the shipped files to scores, previews, loss.png, then inference from its checkpoint: generate, reconstruct,
    describe."""
    out = workplace / "tiny"
    tiny = ["--model", "tiny", "--steps", 3, "--batch", 4]
    run_main(monkeypatch, *tiny, "--sampling-steps", 3, "--out", out)
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"before", "after"} and "reconstruction" in scores["after"]
    assert (out / "loss.png").exists() and (out / "previews/step_000003.png").exists() and (out / "run.json").exists()
    (workplace / "prompts.txt").write_text("red circle top-left\nblue cross\n")
    jobs = ["--generate", workplace / "prompts.txt", "--reconstruct", workplace / "images"]
    jobs += ["--describe", workplace / "images", "--max-new-tokens", 4, "--sampling-steps", 3]
    run_main(monkeypatch, "--model", out / "checkpoint-000003", "--steps", 0, *jobs, "--out", workplace / "results")
    assert Image.open(workplace / "results/00001.png").size == (64, 64) and (workplace / "results/6.png").exists()
    assert len(common.read_json(workplace / "results/answers.jsonl", lines=True)) == 7
    capsys.readouterr()


def test_bagel_edit_writes_both_layouts(workplace, monkeypatch):
    """ImgEdit's and GEdit's folders, one unreadable source skipped; a rerun writes only what is missing; a malformed
    file is refused."""
    (workplace / "images/bad.png").write_bytes(b"not an image")
    single = {"a1": {"id": "0.png", "prompt": "remove the circle"}, "a2": {"id": "1.png", "prompt": "add a cross"},
              "a3": {"id": "bad.png", "prompt": "red"}}
    (workplace / "singleturn.json").write_text(json.dumps(single))
    base = ["--model", workplace / "model", "--steps", 0, "--edit-images", workplace / "images", "--sampling-steps", 3]
    out = workplace / "imgedit"
    run_main(monkeypatch, *base, "--edit", workplace / "singleturn.json", "--out", out)
    assert sorted(p.name for p in out.iterdir()) == ["a1.png", "a2.png", "run.json"]
    assert Image.open(out / "a1.png").size == (64, 64)
    first = (out / "a1.png").stat().st_mtime_ns
    (out / "a2.png").unlink()
    run_main(monkeypatch, *base, "--edit", workplace / "singleturn.json", "--out", out)
    assert (out / "a2.png").exists() and (out / "a1.png").stat().st_mtime_ns == first
    row = {"key": "k", "task_type": "color_alter", "instruction": "blue", "instruction_language": "en"}
    row["image"] = "2.png"
    (workplace / "gedit.jsonl").write_text(json.dumps(row))
    run_main(monkeypatch, *base, "--edit", workplace / "gedit.jsonl", "--out", workplace / "gedit")
    folder = workplace / "gedit/gen_image/fullset/color_alter/en"
    assert sorted(p.name for p in folder.iterdir()) == ["k.png", "k_SRCIMG.png"]
    (workplace / "images/bad.png").unlink()
    for content in ({"a": {"id": "0.png"}}, {"../a": {"id": "0.png", "prompt": "x"}}, [1]):
        (workplace / "broken.json").write_text(json.dumps(content))
        with pytest.raises(common.InputError):
            run_main(monkeypatch, *base, "--edit", workplace / "broken.json", "--out", workplace / "no")
    assert not (workplace / "no").exists()


def test_bagel_refuses_what_would_do_nothing(monkeypatch):
    for flags in (["--lambda-i2t", 1], ["--i2t-data", "shapes"]):
        with pytest.raises(common.InputError, match="would train nothing"):
            run_main(monkeypatch, "--model", "tiny", *flags)
    with pytest.raises(common.InputError, match="--blur 17: at most 16"):
        random_tiny().set_und(blur=17)


def test_bagel_failed_checkpoint_leaves_nothing(workplace, monkeypatch):
    """A disk that is full when the configs are written: one line, no half folder, the checkpoints before it kept."""
    flags = [*training(workplace), "--batch", 2, "--save-every", 1, "--out", workplace / "full"]
    run_main(monkeypatch, *flags, "--steps", 1)

    def full(c, folder):
        raise common.InputError(f"cannot write {folder}: No space left on device")
    monkeypatch.setattr(Bagel, "_write_config", staticmethod(full))
    with pytest.raises(common.InputError, match="No space left.*the checkpoints before it are kept"):
        run_main(monkeypatch, *flags, "--steps", 2, "--resume")
    left = {path.name for path in (workplace / "full").iterdir()}
    assert "checkpoint-000001" in left and not any(".tmp" in name for name in left)


def test_bagel_refuses_what_cannot_be_painted():
    model = random_tiny()
    for size in (60, (64, 72), 128, 0):
        with pytest.raises(common.InputError):
            model.generate(["red circle"], size=size, num_steps=2)
    with pytest.raises(common.InputError, match="renormalisation"):
        model.generate(["red circle"], num_steps=2, renorm="none")
    with pytest.raises(common.InputError, match="table"):
        model.vit_pos_embed(5, 2)
