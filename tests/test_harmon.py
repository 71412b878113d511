"""Harmon: equality with the original implementation on recorded inputs and draws, key lists, files, and the prompts.

The fixture (tests/fixtures/harmon, or $RECA_FIXTURES/harmon) is a very small Harmon that the original code evaluated;
see its README.
"""
import argparse
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
        llm_layers=s["llm_layers"], llm_heads=s["llm_heads"], llm_kv_heads=s["llm_kv_heads"],
        llm_mlp=s["llm_intermediate_size"],
        encoder_width=s["mar_encoder_dim"], encoder_layers=s["mar_encoder_depth"], encoder_heads=s["mar_encoder_heads"],
        decoder_width=s["mar_decoder_dim"], decoder_layers=s["mar_decoder_depth"], decoder_heads=s["mar_decoder_heads"],
        buffer_size=s["buffer_size"], table_size=s["mar_img_size"] // 16, class_num=s["class_num"], dropout=0.0,
        diffusion_width=s["diffloss_width"], diffusion_layers=s["diffloss_depth"],
        diffusion_repeats=s["diffusion_batch_mul"],
        diffusion_steps=s["num_sampling_steps"], latent_channels=s["vae_embed_dim"], vae_width=s["vae_ch"],
        vae_mult=tuple(s["vae_ch_mult"]), vae_blocks=s["vae_num_res_blocks"], vae_scale=s["vae_scale"],
        grad_scale=s["grad_scale"])


def fixture_states():
    states = (load_file(FIXTURE / f"{name}.safetensors") for name in ("weights", "vae_weights"))
    return tuple({k: v.float() for k, v in state.items()} for state in states)


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


def lists(ids, mask):
    """Padded rows -> lists without the padding."""
    return [row[valid.bool()].tolist() for row, valid in zip(ids, mask)]


def draws_of(task):
    """The draws of the fixture, under our names and in our shapes."""
    orders = GOLDEN[f"{task}.orders"]
    shape = (SPEC["diffusion_batch_mul"], *orders.shape)
    return {"num_masked": GOLDEN[f"{task}.num_masked"][0],
            "text_dropped": torch.zeros(len(orders), dtype=torch.bool), "orders": orders,
            "t": GOLDEN[f"{task}.t"].view(shape), "noise": GOLDEN[f"{task}.noise"].view(*shape, -1)}


def loss_of(model, features, task):
    """A loss of the ids of the fixture: they stand for texts, and what makes ids of texts gives them back."""
    ids = lists(GOLDEN[f"in.{task}.input_ids"], GOLDEN[f"in.{task}.attention_mask"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("recon_prompt", "t2i_prompt", "conversation"):
            patch.setattr(model, name, lambda given: given)
        if task == "recon":
            return model.recon_loss(features, ids, draws_of(task))
        if task == "text2image":
            return model.t2i_loss(features, ids, draws_of(task))
        labels = lists(GOLDEN["in.image2text.labels"], GOLDEN["in.image2text.attention_mask"])
        return model.i2t_loss(features, list(zip(ids, labels)))


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_parity_harmon_vae(model):
    pixels = 2 * (GOLDEN["in.pixels_u8"].float() / 255) - 1
    posterior = model.vae.encode(pixels).latent_dist
    close(posterior.mean, GOLDEN["vae.moments_mean"])
    close(posterior.logvar, GOLDEN["vae.moments_logvar"].clamp(-30, 20))
    close(model._latents(pixels), GOLDEN["latents"])
    size = GOLDEN["vae.decode_first"].shape[-1]
    close(model._pixels(GOLDEN["latents"][:1])[..., :size, :size], GOLDEN["vae.decode_first"])


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
    watch(monkeypatch, log, model, "_assemble")
    watch(monkeypatch, log, model, "_hidden_states")
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
    embeddings, length = log["_assemble"][0][1]
    all_hidden = model._hidden_states(embeddings, torch.arange(embeddings.shape[1]).expand(len(embeddings), -1))
    read = log["_hidden_states"][0][1]
    for i, valid in enumerate(expected["llm_attention_mask"].bool()):
        assert length[i] == valid.sum()
        assert expected["llm_position_ids"][i][valid].tolist() == list(range(length[i]))
        close(embeddings[i, :length[i]], expected["llm_inputs_embeds"][i][valid])
        close(all_hidden[i, :length[i]], expected["llm_last_hidden"][i][valid])
        close(read[i], expected["llm_last_hidden"][i][valid][-read.shape[1]:])
    close(log["decode"][0][0][0], expected["x_enc_after_llm"])
    close(log["decode"][0][1], expected["z"])
    masked = expected["mask"].bool().flatten().repeat(SPEC["diffusion_batch_mul"])
    # The head is called once for each of its timesteps; the original's rows are in the same order.
    close(torch.cat([out for _, out in log["forward"]]), expected["net_out"][masked])
    mse, vb = (torch.cat(parts) for parts in zip(*(terms for _, terms in log["diffusion_terms"])))
    close(mse, expected["row_mse"][masked])
    close(vb, expected["row_vb"][masked])


def test_parity_harmon_i2t_loss(model, features, monkeypatch):
    log = {}
    watch(monkeypatch, log, model, "_assemble")
    watch(monkeypatch, log, model, "_hidden_states")
    loss = loss_of(model, features, "image2text")
    close(loss, GOLDEN["image2text.loss"], 1e-5)
    embeddings, length = log["_assemble"][0][1]
    all_hidden = model._hidden_states(embeddings, torch.arange(embeddings.shape[1]).expand(len(embeddings), -1))
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


def test_parity_harmon_sampling_schedule():
    theirs = GOLDEN["schedule64_1024.masked_after_step"].tolist()
    mine = reca_harmon.masked_after(1024, 64)
    assert mine == theirs
    painted = [a - b for a, b in zip([1024, *mine], [*mine[:-1], 0])]
    assert painted == GOLDEN["schedule64_1024.predicted_in_step"].tolist()
    mine = reca_harmon.masked_after(SPEC["tokens_per_image"], SPEC["sample_iters"])
    assert mine == GOLDEN["schedule_fixture.masked_after_step"].tolist()


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
    watch(monkeypatch, log, model, "_denoise")
    watch(monkeypatch, log, model.mar, "encode")
    with torch.no_grad():
        prompts = model._assemble(lists(ids, mask))                 # conditional, then unconditional
        latents = model._sample(*prompts, SPEC["sample_iters"], SPEC["sample_cfg"],
                                temperature=SPEC["sample_temperature"], draws=sampler_draws())
        pixels = model._pixels(latents)
    N = SPEC["tokens_per_image"]
    for k, ((arguments, painted), (encoded, _)) in enumerate(zip(log["_denoise"], log["encode"])):
        close(arguments[0], GOLDEN[f"sample.iter{k}.z"])
        close(painted, GOLDEN[f"sample.iter{k}.sampled"][:len(painted)])
        visible = [set(row.tolist()) for row in encoded[2]]
        theirs = [set((~row.bool()).nonzero().flatten().tolist()) for row in GOLDEN["sample.masks"][k][:n]]
        assert visible == theirs
    assert len(log["_denoise"]) == SPEC["sample_iters"] and N == latents[0, ..., 0].numel()
    close(latents, GOLDEN["sample.final_tokens"][:n])
    close(pixels, GOLDEN["sample.pixels"])
    model.train()


# ---- key lists and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, manifest", [("harmon-0.5b", "harmon_0_5b"), ("harmon-1.5b", "harmon_1_5b")])
def test_keys_harmon(name, manifest):
    """Every key and shape of the released files, at full size (meta device: no memory)."""
    with torch.device("meta"):
        model = Harmon(reca_harmon.CONFIGS[name])
    for mine, file in ((model.released_state(), manifest), (common.autoencoder_to_original(model.vae), "kl16")):
        theirs = json.loads((HERE / "manifests" / f"{file}.json").read_text())
        assert {key: list(value.shape) for key, value in mine.items()} == theirs
    trained = sum(p.numel() for group in model.parameter_groups(0.02) for p in group["params"])
    assert trained == sum(p.numel() for n, p in model.named_parameters()
                          if not n.startswith("vae.") and "class_emb" not in n)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def same_bytes(a, b):
    assert sorted(f.name for f in a.iterdir()) == sorted(f.name for f in b.iterdir())
    return all((a / f.name).read_bytes() == f.read_bytes() for f in b.iterdir())


def test_harmon_save_load_save(saved, tmp_path):
    """Twice the same bytes; and the files are what the original's loaders take: flat dicts under the released keys."""
    again = Harmon.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    assert same_bytes(saved, tmp_path / "again")
    weights, vae = fixture_states()
    state = torch.load(saved / "harmon_fixture.pth", weights_only=True)
    assert state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in weights)
    state = torch.load(saved / "kl16.ckpt", weights_only=True)["model"]
    assert state.keys() == vae.keys() and all(torch.equal(state[k], vae[k]) for k in vae)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    assert not any(p.requires_grad for p in again.vae.parameters())


def test_harmon_tiny_with_tokenizer(tmp_path):
    tiny = Harmon.random("tiny")
    tiny.save_pretrained(tmp_path / "a")
    again = Harmon.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert again.t2i_prompt("a red circle") == tiny.t2i_prompt("a red circle")


def test_harmon_other_layouts(saved, tmp_path):
    """Shards with an index and `vae.*` inside, bfloat16, a nested state_dict, a head that is not listed, extra keys
    beside the VAE."""
    from safetensors.torch import save_file
    weights, vae = fixture_states()
    config = (saved / "config.json").read_text()

    hub = tmp_path / "hub"
    hub.mkdir()
    everything = {**weights, **{"vae." + k: v for k, v in vae.items()}}
    names = list(everything)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: everything[k].bfloat16() for k in keys}, hub / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub / "config.json").write_text(config)
    model = Harmon.from_pretrained(hub)
    assert torch.equal(model.proj_in[0].weight, weights["proj_in.0.weight"].bfloat16().float())

    nested = tmp_path / "nested"
    nested.mkdir()
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != "llm.lm_head.weight"}}, nested / "x.pth")
    torch.save({"model": {**vae, "loss.logvar": torch.zeros(1)}, "epoch": 3}, nested / "kl16.ckpt")
    (nested / "config.json").write_text(config)
    for source in (nested, nested / "x.pth", f"{nested}:x.pth"):
        model = Harmon.from_pretrained(source)
        assert torch.equal(model.proj_in[0].weight, weights["proj_in.0.weight"])
        assert torch.equal(model.llm.lm_head.weight, weights["llm.lm_head.weight"])


def test_harmon_bad_files(saved, tmp_path, monkeypatch):
    weights, vae = fixture_states()

    def load(state, vae=vae, config=(saved / "config.json").read_text(), file="harmon.pth"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        torch.save(state, folder / file)
        torch.save({"model": vae}, folder / "kl16.ckpt")
        if config:
            (folder / "config.json").write_text(config)
        return Harmon.from_pretrained(folder)

    def without(state, key):
        return {k: v for k, v in state.items() if k != key}

    cases = {
        "lacks 1 keys: mar.z_proj.weight": lambda: load(without(weights, "mar.z_proj.weight")),
        "unexpected 1 keys: proj_in.9": lambda: load({**weights, "proj_in.9": torch.zeros(1)}),
        "other shapes for 1 keys: proj_in.0.bias": lambda: load({**weights, "proj_in.0.bias": torch.zeros(1)}),
        "VAE of .* lacks 1 keys: quant_conv.bias": lambda: load(weights, without(vae, "quant_conv.bias")),
        "tied": lambda: load({**weights, "llm.lm_head.weight": weights["llm.lm_head.weight"] + 1}),
        "no released Harmon": lambda: load(weights, config=None),
        "no checkpoint": lambda: load(weights, file="weights.txt"),
        "no such model": lambda: Harmon.from_pretrained("./nowhere"),
        "Hugging Face hub": lambda: Harmon.from_pretrained("harmon-0.5b"),
        "no such size": lambda: Harmon.random("harmon-7b"),
    }
    for message, call in cases.items():
        with pytest.raises(common.InputError, match=message):
            call()


def test_harmon_sizes_from_shapes(tmp_path):
    for name in ("harmon-0.5b", "harmon-1.5b"):
        with torch.device("meta"):
            state = Harmon(reca_harmon.CONFIGS[name]).released_state()
        assert Harmon._read_config(tmp_path, state) == reca_harmon.CONFIGS[name]


# ---- what the fixture does not hold: prompts, draws, settings --------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Harmon.random("tiny")
    for p in model.parameters():                                    # zero-initialised outputs would hide everything
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


def pictures(count, width=80, height=64):
    import numpy as np
    from PIL import Image
    return [Image.fromarray(np.random.default_rng(i).integers(0, 255, (height, width, 3), dtype=np.uint8))
            for i in range(count)]


def test_harmon_prompts(tiny):
    """The strings of the recipe, with the marker at index 3 (index 4 here: Qwen has one id for two newlines, the tiny
    tokenizer none)."""
    text = tiny.tokenizer.decode

    def shown(ids):
        return "".join("<IMAGE>" if i == IMAGE_MARKER else text([i]).replace("Ġ", " ") for i in ids)

    assert shown(tiny.recon_prompt("describe the image.")) == \
        "<|im_start|>user\n\n<IMAGE>describetheimage.<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tiny.recon_prompt()) == \
        "<|im_start|>user\n<IMAGE>generateanimage.<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tiny.t2i_prompt(" a red circle ")) == \
        "<|im_start|>user\ngenerateanimage:aredcircle<|im_end|>\n<|im_start|>assistant\n"
    assert shown(tiny.t2i_prompt()) == "<|im_start|>user\ngenerateanimage.<|im_end|>\n<|im_start|>assistant\n"
    ids, labels = tiny.conversation([("describe the image.", "a red circle"), ("image?", "a cross")])
    assert shown(ids) == ("<|im_start|>user\n<IMAGE>\ndescribetheimage.<|im_end|>\n"
                          "<|im_start|>assistant\naredcircle<|im_end|>\n<|im_start|>user\nimage?<|im_end|>\n"
                          "<|im_start|>assistant\nacross<|im_end|>\n")
    assert shown([i for i in labels if i != IGNORED]) == "aredcircle<|im_end|>across<|im_end|>"
    assert all(label in (IGNORED, i) for i, label in zip(ids, labels)) and len(ids) == len(labels)
    assert len(tiny.recon_prompt("image " * 500)) == 128 and len(tiny.conversation([("image", "a " * 3000)])[0]) == 1472


def test_harmon_draws(tiny):
    """Masking ratios of the truncated normal, a tenth of the texts dropped; an image's draws need no batch."""
    features = tiny.encode([tiny.preprocess(p, "recon") for p in pictures(2)], "recon")
    empty = [{"latents": torch.zeros(32, 32, 1)}]
    many = [tiny.draw("recon", empty, common.Rng(0, "recon", k, positions=[k])) for k in range(2000)]
    ratios = torch.stack([d["num_masked"] for d in many]) / 1024
    assert ratios.min() >= 0.7 and ratios.max() <= 1
    assert abs(ratios.mean() - 0.867) < 0.01 and abs(ratios.median() - 0.874) < 0.01
    assert 0.07 < torch.cat([d["text_dropped"] for d in many]).float().mean() < 0.13
    both = tiny.draw("recon", features, common.Rng(0, "recon", 5, positions=[10, 11]))
    one = tiny.draw("recon", features[1:], common.Rng(0, "recon", 5, positions=[11]))
    (h, w, C), repeats = features[0]["latents"].shape, tiny.config.diffusion_repeats
    N = h * w
    assert both["num_masked"] == one["num_masked"]
    assert torch.equal(both["orders"][1:], one["orders"]) and torch.equal(both["text_dropped"][1:], one["text_dropped"])
    assert torch.equal(both["t"].view(repeats, 2, N)[:, 1], one["t"].view(repeats, N))
    assert torch.equal(both["noise"].view(repeats, 2, N, C)[:, 1], one["noise"].view(repeats, N, C))


@pytest.mark.parametrize("everything", [False, True])
def test_harmon_extreme_masks(tiny, everything):
    """One token masked, or all of them."""
    features = tiny.encode([tiny.preprocess(p, "recon") for p in pictures(2)], "recon")
    draws = tiny.draw("recon", features, common.Rng(0, "recon", positions=[0, 1]))
    draws["num_masked"] = torch.tensor(draws["orders"].shape[1] if everything else 1)
    loss = tiny.recon_loss(features, ["describe the image."] * 2, draws)
    assert loss.isfinite() and loss == tiny.recon_loss(features, ["describe the image."] * 2, draws)


def test_harmon_i2t_loss_by_hand(tiny):
    """Against transformers' own forward on the same embeddings, with conversations of different lengths."""
    features = tiny.encode([tiny.preprocess(p, "i2t") for p in (*pictures(1), None)], "i2t")
    talks = [[("describe the image.", "a red circle"), ("image?", "a cross")], [("image?", "blue")]]
    with torch.no_grad():
        loss, total, count = tiny.i2t_loss(features, talks), 0.0, 0
        seen = tiny.understand(features)
        for image, talk in zip(seen, talks):
            ids, labels = (torch.tensor(row) for row in tiny.conversation(talk))
            k = ids.tolist().index(IMAGE_MARKER)
            embed = tiny.llm.model.embed_tokens
            row = torch.cat([embed(ids[:k]), image, embed(ids[k + 1:])])[None]
            labels = torch.cat([labels[:k], torch.full((len(image),), IGNORED), labels[k + 1:]])
            logits = tiny.llm(inputs_embeds=row, use_cache=False).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
            count += (labels != IGNORED).sum()
    assert torch.allclose(loss, total / count, rtol=1e-5)
    assert tiny.i2t_loss(features, [[("a", "")] for _ in talks]).isfinite()


def test_harmon_padding_changes_nothing(tiny):
    """The loss of a batch with prompts of different lengths is the mean of the single losses (equally many masked)."""
    features = tiny.encode([tiny.preprocess(p, "recon") for p in pictures(2)], "recon")
    texts = ["describe the image.", "please describe this picture in great detail."]
    with torch.no_grad():
        both = tiny.recon_loss(features, texts, rng=common.Rng(0, "recon", 1, positions=[0, 1]))
        single = [tiny.recon_loss(features[i:i + 1], texts[i:i + 1], rng=common.Rng(0, "recon", 1, positions=[i]))
                  for i in range(2)]
    assert torch.allclose(both, (single[0] + single[1]) / 2, rtol=1e-5)


def test_harmon_inference(tiny, monkeypatch):
    """A batch equals single images; guidance, schedule, seed, prompt and image count; the training mode is put back."""
    log, settings, images, size = {}, {"num_steps": 6, "temperature": 0.9}, pictures(2), tiny.config.image_size
    watch(monkeypatch, log, tiny, "_pixels")

    def latents(method, inputs, seed, **more):
        made = getattr(tiny, method)(inputs, seed=seed, **{**settings, **more})
        assert [picture.size for picture in made] == [(size, size)] * len(inputs)
        return log["_pixels"][-1][0][0]

    def same(a, b):
        return (a - b).abs().max() < 1e-5 * b.abs().max()       # untrained, the painted is mostly amplified noise

    tiny.train()
    a, b = latents("generate", ["a red circle", "a blue square at the top left"], [7, 8])
    assert tiny.training and not same(a, b)
    assert same(latents("generate", ["a blue square at the top left"], 8)[0], b)
    assert same(latents("generate", ["a red circle"] * 2, 6)[1], a)                         # seed s: image i has s + i
    for seed, more in ((8, {}), (7, {"guidance_scale": 1.0}), (7, {"guidance_schedule": "linear"}),
                       (7, {"temperature": 0.5})):
        assert not same(latents("generate", ["a red circle"], seed, **more)[0], a)
    assert not same(latents("generate", ["a blue circle"], 7)[0], a)
    assert latents("generate", ["a red circle"], 7, num_steps=40).isfinite().all()          # more steps than tokens
    a, b = latents("reconstruct", images, [1, 2])
    assert same(latents("reconstruct", images[1:], 2)[0], b)
    assert not same(latents("reconstruct", images[:1], 2)[0], b)                            # it depends on the image
    assert not same(latents("reconstruct", images[1:], 2, templates=["write a description of the scene."])[0], b)
    tiny.eval()


def test_harmon_describe(tiny):
    """Greedy with a cache = the argmax of whole forward passes, one by one."""
    import copy
    torch.manual_seed(0)
    tiny, images, question = copy.deepcopy(tiny), pictures(2), "a red circle and a blue square?"
    for weight in tiny.llm.model.layers.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)                 # else it repeats the newline that the prompt ends in
    answers = tiny.describe(images, question, max_new_tokens=6)
    assert all(answers) and answers[0] != answers[1]
    features = tiny.encode([tiny.preprocess(p, "i2t") for p in images], "i2t")
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        for i, answer in enumerate(answers):
            row = tiny._assemble([tiny.i2t_prompt(question)], tiny.understand(features[i:i + 1]))[0]
            ids = []
            for _ in range(6):
                ids.append(int(tiny.llm(inputs_embeds=row, use_cache=False).logits[0, -1].argmax()))
                row = torch.cat([row, tiny.llm.model.embed_tokens(torch.tensor([[ids[-1]]]))], dim=1)
                if ids[-1] == end:
                    break
            assert tiny.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


def test_harmon_preprocess_and_ablations(tiny, monkeypatch):
    import numpy as np
    image, size = pictures(1)[0], tiny.config.image_size
    assert tiny.preprocess(None, "i2t")["pixels"].abs().max() == 0
    for task in ("recon", "i2t", "t2i"):
        pixels = tiny.preprocess(image, task, np.random.default_rng(0))["pixels"]
        assert pixels.shape == (3, size, size) and pixels.dtype == torch.uint8
    assert (tiny.preprocess(image, "i2t")["pixels"][:, 0] == 127).all()                               # grey bars
    samples = [tiny.preprocess(image, "recon")]
    plain = tiny.encode(samples, "recon")[0]
    tiny.set_und(size=size // 2)
    small = tiny.encode(samples, "recon")[0]
    assert 2 * small["und_latents"].shape[0] == plain["latents"].shape[0]
    assert torch.equal(small["latents"], plain["latents"])
    assert tiny.recon_loss([small], ["describe the image."]).isfinite()
    tiny.set_und(blur=2)
    blurred = tiny.encode(samples, "recon")[0]
    assert blurred["und_latents"].shape == plain["latents"].shape
    assert not torch.equal(blurred["und_latents"], plain["latents"])
    with pytest.raises(common.InputError):
        tiny.set_und(size=size + 1)
    tiny.set_und()


def test_harmon_parameter_groups(tiny):
    decay, no_decay = tiny.parameter_groups(0.02)
    names = {id(p): n for n, p in tiny.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    kept = {names[id(p)] for p in no_decay["params"]}
    assert decay["weight_decay"] == 0.02 and no_decay["weight_decay"] == 0
    assert {"llm.model.embed_tokens.weight", "mar.mask_token", "mar.fake_latent",
            "mar.encoder_pos_embed_learned"} <= decayed
    assert all("diffloss" in n or n.endswith(".bias") or "norm" in n or n == "mar.z_proj_ln.weight" for n in kept)
    assert not decayed & kept and not any("vae" in n or "class_emb" in n for n in decayed | kept)


def test_harmon_dropout(tiny, monkeypatch):
    """Active in MAR while training only, never where there are no gradients: generate and describe need no eval()."""
    features = tiny.encode([tiny.preprocess(p, "recon") for p in pictures(1)], "recon")
    for module in tiny.mar.modules():
        if hasattr(module, "dropout"):
            monkeypatch.setattr(module, "dropout", 0.1)
    tiny.eval()
    a, b = tiny.understand(features), tiny.understand(features)
    tiny.train()
    c, d = tiny.understand(features), tiny.understand(features)
    with torch.no_grad():
        e, f = tiny.understand(features), tiny.understand(features)
    tiny.eval()
    assert torch.equal(a, b) and not torch.equal(c, d) and torch.equal(e, f)


def test_harmon_bfloat16(tiny):
    """Autocast, checkpointing, and weights in bfloat16: the rotary table stays float32."""
    import copy
    features = tiny.encode([tiny.preprocess(p, "recon") for p in pictures(2)], "recon")
    rng = lambda: common.Rng(0, "recon", 1, positions=[0, 1])                                             # noqa: E731
    reference = tiny.recon_loss(features, ["describe the image."] * 2, rng=rng())
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny.recon_loss(features, ["describe the image."] * 2, rng=rng())
        tiny.i2t_loss(features, [[("image?", "a red circle")]] * 2).backward()
    assert loss.dtype == torch.float32 and abs(loss - reference) < 0.02 * reference
    other = copy.deepcopy(tiny)
    common.checkpoint_blocks(other, argparse.Namespace(checkpointing=True))
    assert torch.allclose(other.recon_loss(features, ["describe the image."] * 2, rng=rng()), reference)
    low = copy.deepcopy(tiny).to(torch.bfloat16)
    assert low.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(low.generate(["a red circle"], num_steps=3)) == 1
    tiny.zero_grad(set_to_none=True)
