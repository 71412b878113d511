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


# ---- what the sequence looks like ------------------------------------------------------------------------------------------


class Recorder:
    """Watches a forward: the rows of every block, their rotary positions, and who was allowed to see whom in the first layer."""

    def __init__(self, model, monkeypatch):
        self.blocks, self.seen, self.model = [], [], model
        block, attend = Bagel._block, reca_bagel.attend

        def record_block(this, contexts, und, gen=None, causal=False, rotate=True, keep=True, read=None):
            before = [c.position for c in contexts]
            self.seen.append([])
            rows = block(this, contexts, und, gen, causal, rotate, keep, read)
            self.blocks.append({"images": [c.images for c in contexts], "und": und, "gen": gen, "causal": causal, "before": before,
                                "after": [c.position for c in contexts], "rows": rows, "seen": self.seen[-1], "rotate": rotate})
            return rows

        def record_attend(q, k, v, causal):
            n, s = q.shape[2], k.shape[2]
            probe = torch.eye(s).expand(1, k.shape[1], s, s)                 # with values = identity the output shows the weights
            weights = attend(torch.zeros_like(q[:1, ..., :1]).expand(1, -1, -1, s), torch.zeros(1, k.shape[1], s, s), probe, causal)
            self.seen[-1].append(weights.view(n, q.shape[1], s)[:, 0] > 0)                           # [n, S] who is seen
            return attend(q, k, v, causal)

        monkeypatch.setattr(Bagel, "_block", record_block)
        monkeypatch.setattr(reca_bagel, "attend", record_attend)


def places(golden, case):
    """Packed index of every row of a sample, in our order: ViT block, text, start and end marker, latents."""
    result, start, text = [], 0, set(golden[f"{case}.packed_text_indexes"].tolist())
    latents = golden[f"{case}.packed_vae_token_indexes"].tolist()
    for length in golden[f"{case}.sample_lens"].tolist():
        own = [i for i in range(start, start + length)]
        noisy = [i for i in latents if i in own]
        assert noisy == list(range(noisy[0], noisy[-1] + 1)) and {noisy[0] - 1, noisy[-1] + 1} <= text
        result.append({"context": own[:own.index(noisy[0]) - 1], "markers": [noisy[0] - 1, noisy[-1] + 1], "latents": noisy})
        start += length
    return result


@pytest.mark.parametrize("case", ("recon", "recon_drop", "mixed", "t2i"))
def test_parity_bagel_sequence(model, golden, case, monkeypatch):
    """Attention pattern, rotary positions, rows of both position tables, input embeddings and last hidden states, row by row."""
    features, ids, draws, condition = case_inputs(model, golden, case)
    record = Recorder(model, monkeypatch)
    with torch.no_grad():
        model._flow_loss(features, ids, draws, condition)
    rows = places(golden, case)
    total, width = sum(golden[f"{case}.sample_lens"].tolist()), model.config.hidden_size
    embeds, positions = torch.full((total, width), float("nan")), torch.full((total,), -1)
    pattern, hidden = torch.zeros(total, total, dtype=torch.bool), torch.full((total, width), float("nan"))
    used = [0] * len(rows)                                                          # context rows that were written so far
    for b in record.blocks:
        calls = iter(b["seen"])
        for g, images in enumerate(b["images"]):
            length = b["und"][g].shape[1]
            visible = [next(calls) for _ in range(1 + (b["gen"] is not None))]
            for j, i in enumerate(images):
                if b["gen"] is None:
                    own = rows[i]["context"][used[i]:used[i] + length]
                    embeds[own], keys = b["und"][g][j], rows[i]["context"][:used[i] + length]
                    positions[own] = b["before"][g] + (torch.arange(length) if b["causal"] else 0)
                    pattern[torch.tensor(own)[:, None], torch.tensor(keys)] = visible[0]
                    used[i] += length
                else:
                    own, keys = rows[i]["markers"] + rows[i]["latents"], rows[i]["context"] + rows[i]["markers"] + rows[i]["latents"]
                    embeds[own] = torch.cat([b["und"][g][j], b["gen"][g][j]])
                    positions[own] = max([a["after"][k] for a in record.blocks[:-1] for k, im in enumerate(a["images"]) if i in im], default=0)
                    assert not b["rotate"] and b["before"][g] == 0
                    pattern[torch.tensor(own)[:, None], torch.tensor(keys)] = torch.cat(visible)
                    hidden[rows[i]["latents"]] = b["rows"][g][j]
    assert torch.equal(positions, golden[f"{case}.packed_position_ids"])
    assert torch.equal(pattern, golden[f"{case}.attention"])
    latents = golden[f"{case}.mse_loss_indexes"]
    if f"{case}.input_embeds" in golden:
        close(embeds, golden[f"{case}.input_embeds"])
    if f"{case}.last_hidden" in golden:
        close(hidden[latents], golden[f"{case}.last_hidden"][latents])              # the other rows are never computed here
    side = model.config.max_latent_size
    table = torch.cat([model.latent_pos_embed(*model._grid(f["mean"])) for f in features])
    assert torch.equal(table, model.latent_pos_embed.pos_embed[golden[f"{case}.packed_latent_position_ids"]]) and side ** 2 == len(model.latent_pos_embed.pos_embed)
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
            latent = model._latent(f["mean"], f["logvar"], noise)
            close(latent, full[:, :latent.shape[1], :latent.shape[2]])
            assert torch.equal(model._untokens(model._tokens(latent), model._grid(latent)), latent)
        if condition:
            embeds = [model._embed_vit(f["vit"][None])[0] - model.vit_pos_embed(*f["vit"].shape[:2]) for f in features]
            close(torch.cat(embeds), golden[f"{case}.vit_embeds"])
        if f"{case}.timestep_embeds" in golden:
            ours = model._embed_time(golden[f"{case}.timesteps"])
            close(torch.cat([e.expand(len(n), -1) for e, n in zip(ours, draws["flow_noise"])]), golden[f"{case}.timestep_embeds"])


def test_parity_bagel_resize_rule(golden):
    for longest, shortest, stride, w, h, width, height in golden["resize_rule"].tolist():
        assert reca_bagel.fit(w, h, longest, shortest, stride) == (width, height)
    assert reca_bagel.fit(1024, 768, 224, 224, 14) == (224, 168) and reca_bagel.fit(640, 480, 1024, 512, 16) == (688, 512)


# ---- sampling --------------------------------------------------------------------------------------------------------------


def sampler(case):
    s = SETTINGS["results"][case]
    return {"num_steps": s["num_timesteps"], "timestep_shift": s["timestep_shift"], "guidance_scale": s["cfg_text_scale"],
            "image_guidance_scale": s["cfg_img_scale"], "interval": s["cfg_interval"], "renorm": s["cfg_renorm_type"], "renorm_min": s["cfg_renorm_min"]}


def source(golden):
    return Image.fromarray(golden["in.source_pixels_u8"].permute(1, 2, 0).numpy())


def sample_case(model, golden, case, monkeypatch, copies=1):
    """Run a sampling case with the fixture's draws -> (images, trace, latents, contexts); copies: the same request several times."""
    s, c, caught = SETTINGS["results"][case], model.config, {}
    grid = model._target_grid(tuple(s["image_shapes"]))
    draws = {"noise": [golden[f"{case}.init_noise"]] * copies}
    decode, paint = Bagel._decode, Bagel._paint
    monkeypatch.setattr(Bagel, "_decode", lambda self, latents: caught.setdefault("pixels", decode(self, caught.setdefault("latents", latents))))
    monkeypatch.setattr(Bagel, "_paint", lambda self, contexts, *rest, **more: paint(self, caught.setdefault("contexts", contexts), *rest, **more))
    options = {**sampler(case), "trace": []}
    prompt = SETTINGS[{"gen": "gen_prompt", "reconstruct": "recon_prompt"}.get(case, "edit_prompt")]
    ids = [[c.bos_token_id, *prompt, c.eos_token_id]] * copies
    with torch.no_grad():
        if case == "gen":
            images = model._generate(ids, grid, 0, draws, **options)
        else:
            image = model._resized(source(golden), c.vae_limits, c.stride)
            samples = {"vae": common.to_tensor(image), "vit": common.to_tensor(model._resized(image, c.edit_limits, c.vit_patch_size))}
            if case == "edit":
                assert torch.equal(samples["vae"], pixels(golden["edit.source_resized_u8"])) or close(samples["vae"], pixels(golden["edit.source_resized_u8"]), 1e-6) < 1e-6
                close(samples["vit"], golden["edit.source_vit"], 1e-6)
            with_vae = case != "reconstruct"
            if with_vae:
                draws["vae_noise"] = [golden[f"{case}.draw_vae_noise_0"][0]] * copies
            features = model.encode([samples] * copies, "edit")
            images = model._from_images(features, ids, [grid] * copies, with_vae, True, 0, draws, **options)
    return images, options["trace"], caught


@pytest.mark.parametrize("case", SAMPLING)
def test_parity_bagel_sampling(model, golden, case, monkeypatch):
    images, trace, caught = sample_case(model, golden, case, monkeypatch)
    s = SETTINGS["results"][case]
    close(torch.tensor([t for t, _, _ in trace]), golden[f"{case}.timesteps"], 1e-6)
    close(torch.stack([x[0] for _, x, _ in trace]), golden[f"{case}.x"])
    close(torch.stack([v[0] for _, _, v in trace]), golden[f"{case}.velocity"])
    close(caught["latents"][0][None], golden[f"{case}.latent"])
    close(caught["pixels"][0][None], golden[f"{case}.image_float"])
    expected = ((golden[f"{case}.image_float"][0] * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    assert images[0].size == (s["image_shapes"][1], s["image_shapes"][0])
    ours = torch.from_numpy(__import__("numpy").array(images[0])).permute(2, 0, 1)
    assert (ours.int() - expected.int()).abs().max() <= 1
    context = caught["contexts"][0]
    assert context.position == golden[f"{case}.position_id"].item()
    assert context.kept[0][0].shape[2] == golden[f"{case}.context_len"].item()


@pytest.mark.parametrize("case", ("gen", "edit_global"))
def test_bagel_batch_does_not_change_an_image(model, golden, case, monkeypatch):
    """Also with "global" renormalisation, which in the original mixes the images of a batch."""
    _, _, caught = sample_case(model, golden, case, monkeypatch, copies=3)
    for latent in caught["latents"]:
        close(latent[None], golden[f"{case}.latent"])


def test_parity_bagel_describe(model, golden):
    c = model.config
    image = model._resized(source(golden), c.vae_limits, c.stride)
    vit = model.encode([{"vit": common.to_tensor(model._resized(image, c.vit_limits, c.vit_patch_size))}], "i2t")[0]["vit"]
    start, *answer = golden["describe.ids"].tolist()
    assert start == c.bos_token_id
    ids = [c.bos_token_id, *SETTINGS["describe_prompt"], c.eos_token_id]
    answer = answer[:answer.index(c.eos_token_id)] if c.eos_token_id in answer else answer
    with torch.no_grad():
        ours = model._describe([vit, vit], [ids, ids[:2] + ids[-1:]], len(golden["describe.ids"]) - 1)
    assert ours[0] == answer


# ---- loading and saving ------------------------------------------------------------------------------------------------------


def test_bagel_key_lists():
    """Names and shapes at the released size, built on the meta device, against the reference's lists."""
    with torch.device("meta"):
        model = Bagel()
    shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
    names = reca_bagel.vae_names(model.config)
    manifest = json.loads((HERE / "fixtures/manifests/bagel.json").read_text())
    assert {n: s for n, s in shapes.items() if not n.startswith("vae.")} == manifest
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 6_539_861_056
    manifest = json.loads((HERE / "fixtures/manifests/flux_ae.json").read_text())
    assert set(names) == {n for n in shapes if n.startswith("vae.")} and set(names.values()) == set(manifest)
    for ours, theirs in names.items():
        assert shapes[ours] + [1, 1] * (len(manifest[theirs]) - len(shapes[ours]) == 2) == manifest[theirs], ours


def test_parity_bagel_files(model, golden, tmp_path):
    """save -> load -> save is equal byte for byte; the saved file has the fixture's names, values and tables; strict but for the tables."""
    model.save_pretrained(tmp_path / "a")
    again = Bagel.from_pretrained(str(tmp_path / "a"))
    again.save_pretrained(tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir()) and {"ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert again.config == model.config
    for name, file in (("ema", "weights"), ("ae", "ae_weights")):
        saved, theirs = load_file(tmp_path / "a" / f"{name}.safetensors"), load_file(FIXTURE / f"{file}.safetensors")
        assert saved.keys() == theirs.keys()
        for key in saved:
            assert torch.allclose(saved[key], theirs[key].float(), atol=1e-6), key
    # bf16: what ComfyUI-BAGEL loads; half the bytes, still with the tables
    model.save_pretrained(tmp_path / "c", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "c/ema.safetensors").values()} == {torch.bfloat16}
    # BAGEL-RecA's name, without tables, frozen parts in another precision
    state = load_file(tmp_path / "a/ema.safetensors")
    for table in reca_bagel.TABLES:
        del state[table]
    (tmp_path / "a/ema.safetensors").unlink()
    reca_bagel.save_file(state, tmp_path / "a/model_bf16.safetensors")
    mixed = Bagel.from_pretrained(str(tmp_path / "a"), frozen_dtype=torch.bfloat16)
    for name, p in mixed.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    assert torch.equal(mixed.latent_pos_embed.pos_embed, model.latent_pos_embed.pos_embed)
    # what does not fit is named
    for change, word in (({"extra": torch.zeros(1)}, "unexpected"), ({"llm2vae.bias": None}, "lacks"), ({"vae2llm.bias": torch.zeros(3)}, "other shapes")):
        broken = {k: v for k, v in {**state, **change}.items() if v is not None}
        reca_bagel.save_file(broken, tmp_path / "a/model_bf16.safetensors")
        with pytest.raises(common.InputError, match=f"{word}.*{next(iter(change))}"):
            Bagel.from_pretrained(str(tmp_path / "a"))
    (tmp_path / "a/model_bf16.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(common.InputError):
        Bagel.from_pretrained(str(tmp_path / "a"))
