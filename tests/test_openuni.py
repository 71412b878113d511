"""OpenUni: equality with the original implementation, released layouts, prompts, the cut between prompt and queries."""
import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import reca_openuni
from reca_openuni import OpenUni, OpenUniConfig

FIXTURES = Path(os.environ.get("RECA_FIXTURES", Path(__file__).parent / "fixtures"))
HERE = FIXTURES / "openuni"
MANIFESTS = Path(__file__).parent / "fixtures" / "manifests"


def fixture_config(c):
    """The sizes in a fixture's config.json -> OpenUniConfig."""
    lmm = reca_openuni.internvl3(c["llm_hidden_size"], c["llm_layers"], c["llm_heads"], c["llm_kv_heads"],
                                 c["llm_intermediate_size"])
    lmm["image_token_id"] = c["image_context_token_id"]
    lmm["text_config"]["vocab_size"] = c["vocab_size"]
    lmm["text_config"]["rope_parameters"]["rope_theta"] = c["rope_theta"]
    lmm["vision_config"].update(
        hidden_size=c["vit_hidden_size"], num_hidden_layers=c["vit_layers"], num_attention_heads=c["vit_heads"],
        intermediate_size=c["vit_intermediate_size"], image_size=[c["vit_image_size"]] * 2,
        patch_size=[c["vit_patch_size"]] * 2)
    sana = reca_openuni.sana(c["sana_heads"], c["sana_layers"], c["sana_cross_heads"], c["sana_cross_head_dim"],
                             c["sana_head_dim"], c["latent_channels"], c["sana_caption_channels"],
                             mlp_ratio=c["sana_mlp_ratio"])
    vae = reca_openuni.dc_ae(c["dcae_channels"], c["dcae_head_dim"], c["dcae_encoder_layers"], c["dcae_decoder_layers"],
                             c["latent_channels"], c["vae_scaling_factor"])
    return OpenUniConfig(lmm, sana, vae, dict(reca_openuni.SCHEDULER, flow_shift=c.get("test_flow_shift", 3.0)),
                         c["connector_layers"], c["connector_heads"], c["connector_intermediate_size"],
                         c["num_queries"], c["image_size"])


def fixture_model():
    config = json.loads((HERE / "config.json").read_text())
    model = OpenUni(fixture_config(config))
    state, frozen = load_file(HERE / "weights.safetensors"), load_file(HERE / "frozen_weights.safetensors")
    lmm = OpenUni.internvl_to_transformers({k[4:]: v for k, v in frozen.items() if k.startswith("lmm.")})
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
        watch = {"connector_out": model.connector["layers"], "prompt_embeds": model.projector,
                 "caption_norm_out": model.transformer.caption_norm,
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


def embeddings(features):
    return torch.stack([row["und"] for row in features])


def padded_loss(model, features, ids, mask, draws, task):
    """recon_loss ("image2image") or t2i_loss on prompts that are ids already, with their padding, in place of those
    that the tokenizer would give."""
    texts = [""] * len(features)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("recon_prompt", "t2i_prompt"):
            patch.setattr(OpenUni, name, lambda self, text=None: [])
        patch.setattr(OpenUni, "_pad", lambda self, prompts: (ids, mask))
        if task == "image2image":
            return model.recon_loss(features, texts, draws=draws)
        kept = torch.zeros(len(features), dtype=torch.bool)
        return model.t2i_loss(features, texts, draws={"text_dropped": kept, **draws})


def fixture_loss(model, features, golden, task):
    ids, mask = golden[f"in.{task}.input_ids"], golden[f"in.{task}.attention_mask"]
    draws = {name: golden[f"{task}.{name}"] for name in ("noise", "u")}
    return padded_loss(model, features, ids, mask, draws, task)


@pytest.mark.parametrize("task", ["image2image", "text2image"])
def test_parity_openuni_loss(model, features, golden, config, task):
    model.zero_grad()
    with Taps(model) as out:
        loss = fixture_loss(model, features, golden, task)
    assert loss.item() == pytest.approx(config["losses"][task], rel=1e-5)
    assert loss.item() == pytest.approx(golden[f"{task}.loss"].item(), rel=1e-5)
    for name in ("llm_queries_out", "connector_out", "prompt_embeds", "caption_norm_out", "sana_block0_out",
                 "model_pred"):
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
    calls = []
    llm = model.lmm.model.language_model
    hook = llm.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    und = embeddings(features) if task == "image2image" else None
    model._condition(model._embed(ids, und), mask)
    hook.remove()
    close(torch.cat([call["inputs_embeds"] for call in calls], 1), golden[f"{task}.llm_inputs_embeds"])
    # Who sees whom is written out here; the last query sees all that the original's mask of padding leaves.
    seen = calls[1]["attention_mask"][:, 0]
    assert torch.equal(seen[:, -1].long(), golden[f"{task}.llm_attention_mask"].long())
    assert torch.equal(seen[:, 0, :ids.shape[1]].long(), mask.long()) and not seen[:, 0, ids.shape[1] + 1:].any()
    assert torch.equal(torch.cat([call["position_ids"] for call in calls], 1), golden[f"{task}.llm_position_ids"])


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
        condition = model._condition(model._embed(ids, und), mask)
        latents = model._sample(condition, golden[f"{case}.init_latents"], config["sample_steps"], config["sample_cfg"])
    close(latents, golden[f"{case}.final_latents"])
    close(model._pixels(latents)[:, :, :64, :64], golden[f"{case}.pixels_first64"])


@pytest.mark.parametrize("case", ["sample", "schedule20"])
def test_parity_openuni_schedule(model, golden, config, case):
    solver = reca_openuni.DPMSolverMultistepScheduler.from_config(model.config.scheduler)
    solver.set_timesteps(config["sample_steps"] if case == "sample" else 20)
    assert torch.equal(solver.timesteps, golden[f"{case}.timesteps"])
    close(solver.sigmas, golden[f"{case}.sigmas"], 1e-6)


# ---- key lists at the released sizes ---------------------------------------------------------------------------------


def holds(kind, key):
    """Whether a released file of this kind has the key."""
    missing = {"pretrained": ("lmm.", "vae.", "transformer."), "finetuned": ("lmm.", "vae."), "full": ()}[kind]
    return not key.startswith(missing)


def transformers_shapes(manifest):
    """A released key list, with InternVL's keys under the names under which it is loaded."""
    state = {k: torch.empty(shape, device="meta") for k, shape in manifest.items()}
    lmm = OpenUni.internvl_to_transformers({k[4:]: v for k, v in state.items() if k.startswith("lmm.")})
    state = {k: v for k, v in state.items() if not k.startswith("lmm.")} | {"lmm." + k: v for k, v in lmm.items()}
    return {k: list(v.shape) for k, v in state.items()}


def checkpoint(model, kind):
    """The state dict of a released file of this kind."""
    state = {k: v for k, v in model.released_state().items() if holds(kind, k)}
    return state | load_file(HERE / "frozen_weights.safetensors") if kind == "full" else state


@pytest.mark.parametrize("size", ["b", "l"])
def test_key_lists_at_released_sizes(size):
    with torch.device("meta"):
        model = OpenUni(reca_openuni.CONFIGS[f"openuni-{size}-512"])
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    for kind in ("pretrained", "finetuned", "full"):
        manifest = json.loads((MANIFESTS / f"openuni_{size}_512.{kind}.json").read_text())
        assert transformers_shapes(manifest) == {k: v for k, v in shapes.items() if holds(kind, k)}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == model.released_state().keys()
    grouped = [p for group in model.parameter_groups(0.05) for p in group["params"]]
    assert len(grouped) == len(trained)
    assert sum(p.numel() for p in grouped) == pytest.approx({"b": 646.4e6, "l": 1830.3e6}[size], rel=1e-3)


def test_l_1024_normalises_q_and_k():
    with torch.device("meta"):
        model = OpenUni(reca_openuni.CONFIGS["openuni-l-1024"])
    keys = model.released_state().keys()
    for attention in ("attn1", "attn2"):
        assert {f"transformer.transformer_blocks.0.{attention}.norm_{x}.weight" for x in "qk"} <= keys


# ---- released layouts: what is on the hub, in small ------------------------------------------------------------------


def tokenizer_for(config):
    """The toy tokenizer, with the image markers at the fixture's ids."""
    markers = ["<|im_start|>", "<|im_end|>"]
    room = config["img_start_token_id"] - len(common.tiny_tokenizer(markers))
    tokenizer = common.tiny_tokenizer([*markers, *(f"<{i}>" for i in range(room)), "<img>", "<IMG_CONTEXT>", "</img>"])
    assert tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>") == config["image_context_token_id"]
    return tokenizer


@pytest.fixture(scope="module")
def hub(tmp_path_factory, config):
    """Folders in the hub's layouts: InternVL original, -hf, -hf with older names; SANA; DC-AE; three checkpoints."""
    root, model = tmp_path_factory.mktemp("hub"), fixture_model()
    frozen = load_file(HERE / "frozen_weights.safetensors")
    original = {k[4:]: v for k, v in frozen.items() if k.startswith("lmm.")}
    text, vision = model.config.lmm["text_config"], model.config.lmm["vision_config"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    configs = {
        "original": {
            "model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
            "downsample_ratio": 0.5, "force_image_size": vision["image_size"][0], "select_layer": -1,
            "llm_config": {k: v for k, v in text.items() if k != "rope_parameters"} | {
                "rope_theta": config["rope_theta"], "rope_scaling": {"factor": 2.0, "type": "dynamic"}},
            "vision_config": {k: vision[k] for k in sizes} | {
                "patch_size": vision["patch_size"][0], "image_size": 448, "qkv_bias": True, "qk_normalization": False,
                "norm_type": "layer_norm"}},
        "hf": model.lmm.config.to_dict()}
    configs["hf-older"] = configs["hf"]
    states = {"original": original, "hf": model.lmm.state_dict()}
    states["hf-older"] = {
        "language_model." + k if k.startswith("lm_head")
        else k.replace("model.language_model.", "language_model.model.").removeprefix("model."): v
        for k, v in states["hf"].items()}
    for name, state in states.items():
        (root / name).mkdir()
        save_file({k: v.float().contiguous() for k, v in state.items()}, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(configs[name]))
        tokenizer_for(config).save_pretrained(root / name)
    model.transformer.save_pretrained(root / "sana" / "transformer")
    solver = reca_openuni.DPMSolverMultistepScheduler.from_config(model.config.scheduler)
    solver.save_pretrained(root / "sana" / "scheduler")
    model.vae.save_pretrained(root / "vae")
    settings = {k: v for k, v in model.config.own_settings().items() if k != "bases"}
    for kind in ("pretrained", "finetuned", "full"):
        (root / kind).mkdir()
        torch.save(checkpoint(model, kind), root / kind / "model.pth")
        (root / kind / "config.json").write_text(json.dumps({"model_type": "openuni", "bases": {}, **settings}))
    return root


def bases_in(hub, lmm="original"):
    return {"lmm": str(hub / lmm), "sana": str(hub / "sana"), "vae": str(hub / "vae")}


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("lmm", ["original", "hf", "hf-older"])
@pytest.mark.parametrize("kind", ["pretrained", "finetuned", "full"])
def test_released_layouts_load(hub, model, kind, lmm):
    loaded = OpenUni.from_pretrained(hub / kind, bases=bases_in(hub, lmm))
    assert equal_states(loaded, model)
    assert loaded.config.bases == bases_in(hub, lmm) and not loaded.training
    ours, theirs = (m.lmm.model.language_model.rotary_emb.inv_freq for m in (loaded, model))
    assert torch.equal(ours, theirs)


def test_a_tied_head_is_copied(hub, model, tmp_path):
    """A converted InternVL whose config ties the head and whose file leaves it out."""
    state = load_file(hub / "hf" / "model.safetensors")
    embedding = state["model.language_model.embed_tokens.weight"]
    del state["lm_head.weight"]
    config = json.loads((hub / "hf" / "config.json").read_text())
    config.update(tie_word_embeddings=True, text_config=config["text_config"] | {"tie_word_embeddings": True})
    shutil.copytree(hub / "hf", tmp_path / "tied")
    save_file(state, tmp_path / "tied" / "model.safetensors")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    loaded = OpenUni.from_pretrained(hub / "finetuned", bases=bases_in(hub) | {"lmm": str(tmp_path / "tied")})
    assert torch.equal(loaded.lmm.lm_head.weight, embedding)
    assert torch.equal(loaded.lmm.get_input_embeddings().weight, embedding)


def test_sampling_shift_comes_from_the_sana_folder(hub, model, tmp_path):
    """The scheduler's file decides about sampling (4.0 in some SANA repositories), never about training: shift 1."""
    shutil.copytree(hub / "sana", tmp_path / "sana")
    file = tmp_path / "sana" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 4.0}))
    loaded = OpenUni.from_pretrained(hub / "pretrained", bases=bases_in(hub) | {"sana": str(tmp_path / "sana")})
    solver = reca_openuni.DPMSolverMultistepScheduler.from_config(loaded.config.scheduler)
    solver.set_timesteps(20)
    s = torch.linspace(0.999, 0, 21)[:-1]
    close(solver.sigmas[:-1], 4 * s / (1 + 3 * s), 1e-5)
    u = torch.rand(8)
    assert torch.equal(loaded._sigmas(u), model._sigmas(u))


def test_loaded_model_gives_the_fixture_loss(hub, golden, config, pixels):
    loaded = OpenUni.from_pretrained(hub / "finetuned", bases=bases_in(hub))
    features = loaded.encode([{"pixels": p} for p in pixels], "recon")
    loss = fixture_loss(loaded, features, golden, "image2image").item()
    assert loss == pytest.approx(config["losses"]["image2image"], rel=1e-5)


def test_bf16_keeps_rotary_frequencies(hub):
    loaded = OpenUni.from_pretrained(hub / "finetuned", dtype=torch.bfloat16, bases=bases_in(hub))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lmm.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(loaded.generate(["red circle"], num_steps=2)) == 1


def files_in(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("own_bases", [True, False])
def test_save_load_save_is_byte_equal(hub, tmp_path, own_bases):
    """With bases on the hub only the trained weights are written; without, everything that is needed to load again."""
    first = OpenUni.from_pretrained(hub / "pretrained", bases=bases_in(hub))
    if own_bases:
        first.config.bases = {}
    first.save_pretrained(tmp_path / "a")
    second = OpenUni.from_pretrained(tmp_path / "a")
    assert equal_states(first, second)
    second.save_pretrained(tmp_path / "b")
    a, b = files_in(tmp_path / "a"), files_in(tmp_path / "b")
    assert a == b
    assert ("lmm/model.safetensors" in a) == own_bases
    assert own_bases or a.keys() == {"openuni.pth", "config.json"}
    # what the original loads: torch.load gives a flat dict with the fine-tuned key list
    flat = torch.load(tmp_path / "a" / "openuni.pth", weights_only=True)
    assert flat.keys() == load_file(HERE / "weights.safetensors").keys()


def test_checkpoints_that_do_not_fit(hub, tmp_path):
    def refused(state, words):
        folder = tmp_path / words.replace(" ", "-")
        folder.mkdir()
        torch.save(state, folder / "model.pth")
        (folder / "config.json").write_bytes((hub / "finetuned" / "config.json").read_bytes())
        with pytest.raises(common.InputError, match=words):
            OpenUni.from_pretrained(folder, bases=bases_in(hub))

    state = torch.load(hub / "finetuned" / "model.pth", weights_only=True)
    for lost in ("projector.bias", "transformer.proj_out.bias"):
        refused({k: v for k, v in state.items() if k != lost}, f"lacks 1 keys: {lost}")
    refused(state | {"ema.weight": torch.zeros(1)}, "unexpected 1 keys: ema.weight")
    refused(state | {"projector.bias": torch.zeros(1)}, "other shapes for 1 keys: projector.bias")
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(common.InputError, match="queries of width"):
        OpenUni.from_pretrained(tmp_path / "bare.pth", bases=bases_in(hub))
    (tmp_path / "bare.pth").write_bytes(b"nothing")
    for source, words in ((tmp_path / "bare.pth", "not a readable checkpoint"), (tmp_path / "absent", "no such model"),
                          ("wusize/openuni", "several models"), (hub, "holds 0"),
                          (hub / "original", "no meta_queries")):
        with pytest.raises(common.InputError, match=words):
            OpenUni.from_pretrained(source)


def test_bare_files_are_recognised(tmp_path):
    """A released file's size from its shapes; L-1024 from its SANA's norms or, without SANA in it, from its name."""
    def guess(name, kind, file):
        with torch.device("meta"):
            state = OpenUni(reca_openuni.CONFIGS[name]).released_state()
        state = {k: v for k, v in state.items() if holds(kind, k)}
        return OpenUni._read_settings(tmp_path / file, state)["bases"]["sana"]

    for name, source in reca_openuni.RELEASED.items():
        expected = reca_openuni.CONFIGS[name].bases["sana"]
        assert guess(name, "pretrained", source.partition(":")[2]) == expected
        assert guess(name, "finetuned", "model.pth") == expected


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(hub):
    """The fixture's model with the toy tokenizer."""
    return OpenUni.from_pretrained(hub / "finetuned", bases=bases_in(hub))


def test_prompt_layout(spoken, config):
    n = config["image_tokens"]
    for ids, text in (
            (spoken.recon_prompt("Describe it."), "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * n +
             "</img>\nDescribe it.<|im_end|>\n<|im_start|>assistant\n<img>"),
            (spoken.t2i_prompt(" a red circle "),
             "<|im_start|>user\nGenerate an image: a red circle<|im_end|>\n<|im_start|>assistant\n<img>"),
            (spoken.t2i_prompt(), "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n<img>"),
            (spoken.i2t_prompt("circle ?", image=False),
             "<|im_start|>user\ncircle ?<|im_end|>\n<|im_start|>assistant\n")):
        assert ids == spoken.tokenize(text)
    ids, mask = spoken._pad([spoken.recon_prompt(t) for t in ("Describe the image.", "Describe it.")])
    special = {name: spoken.tokenizer.convert_tokens_to_ids(name) for name in reca_openuni.MARKERS}
    row = ids[0].tolist()
    assert row[0] == special["<|im_start|>"] and row[3] == special["<img>"] and row[-1] == special["<img>"]
    assert row[4:4 + n] == [special["<IMG_CONTEXT>"]] * n and row[4 + n] == special["</img>"]
    assert mask[0].all() and mask[1].sum() < len(row) and not mask[1, -1]      # the shorter one is padded on the right


def test_image_embeddings_stand_at_the_image_tokens(spoken, features):
    und = embeddings(features)
    ids, _ = spoken._pad([spoken.recon_prompt(t) for t in ("Describe it.", "Describe the image.")])
    embeds = spoken._embed(ids, und)
    places = ids == spoken.lmm.config.image_token_id
    assert torch.equal(embeds[places].view_as(und), und)
    assert torch.equal(embeds[~places], spoken.lmm.get_input_embeddings()(ids)[~places])
    with pytest.raises(ValueError, match="image tokens"):
        spoken._embed(ids[:1], und)


def test_long_captions_keep_the_frame(spoken):
    long, short = spoken.t2i_prompt("red " * 500), spoken.t2i_prompt("red")
    tail = spoken.tokenize("<|im_end|>\n<|im_start|>assistant\n<img>")
    assert len(long) == spoken.config.max_caption_tokens and long[-len(tail):] == tail == short[-len(tail):]


def test_padding_changes_nothing(spoken, features):
    """Left or right, more or less: the loss of one image depends on its own prompt alone."""
    rows = [spoken.recon_prompt(t) for t in ("Describe the image in detail.", "Describe it.")]
    draws = {"noise": torch.randn(2, *features[0]["latents"].shape), "u": torch.rand(2)}
    ids, mask = spoken._pad(rows)
    left = torch.stack([row.roll(int(real.logical_not().sum())) for row, real in zip(ids, mask)]), mask.flip(1)
    losses = [padded_loss(spoken, features, *padded, draws, "image2image").item() for padded in ((ids, mask), left)]
    one = []
    for i in range(2):
        own = {k: v[i:i + 1] for k, v in draws.items()}
        alone = spoken._pad(rows[i:i + 1])
        one.append(padded_loss(spoken, features[i:i + 1], *alone, own, "image2image").item())
    assert losses == pytest.approx([sum(one) / 2] * 2, rel=1e-5)


# ---- the cut between prompt and queries, the cache, checkpointing ----------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm() + 1e-6, name     # key biases: 0 up to rounding


def test_two_passes_equal_one_pass_with_a_graph(model, features, golden):
    """Against a plain forward over prompt and queries together, as the original runs it."""
    def whole(prompt, mask):
        mask = torch.nn.functional.pad(mask.bool(), (0, model.config.num_queries), value=True)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        queries = model.meta_queries.expand(len(prompt), -1, -1)
        out = model.lmm.model.language_model(inputs_embeds=torch.cat([prompt, queries], 1), attention_mask=mask,
                                             position_ids=positions)
        return out.last_hidden_state[:, -model.config.num_queries:]

    ours = fixture_loss(model, features, golden, "image2image")
    ours, ours_grad = ours.item(), gradients(model, ours)
    model._query_states = whole
    try:
        theirs = fixture_loss(model, features, golden, "image2image")
        theirs, theirs_grad = theirs.item(), gradients(model, theirs)
    finally:
        del model._query_states
    assert ours == pytest.approx(theirs, rel=1e-6)
    same_gradients(ours_grad, theirs_grad, 1e-4)


def test_prompt_leaves_no_graph(model):
    """The prompt runs without a graph, and what the graph of the queries keeps of it is keys, values and the mask."""
    llm, text, shapes = model.lmm.model.language_model, model.config.lmm["text_config"], []
    hook = llm.layers[0].mlp.register_forward_hook(lambda _, x, out: shapes.append((x[0].shape[1], out.requires_grad)))
    ids = torch.randint(5, 300, (1, 12))
    model._query_states(model._embed(ids), torch.ones_like(ids, dtype=torch.bool))
    hook.remove()
    assert shapes == [(12, False), (model.config.num_queries, True)]

    def kept(length):
        """Numbers that the graph keeps for the backward."""
        ids, total = torch.randint(5, 300, (1, length)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            model._query_states(model._embed(ids), torch.ones_like(ids, dtype=torch.bool))
        return sum(total)

    grown = (kept(60) - kept(12)) / 48                                            # for each further token of the prompt
    mask = 2 * model.config.num_queries * text["num_attention_heads"]
    assert grown <= text["num_hidden_layers"] * (4 * text["hidden_size"] + mask)


def test_cached_and_uncached_steps_are_equal(spoken, tmp_path):
    """Through common.Cache: loss and gradients are equal to the last bit, and the frozen encoders run once."""
    images = [common.draw_scene(common.random_scene(np.random.default_rng(i)), 200) for i in range(2)]
    cache = common.Cache(tmp_path, {"task": "recon"})
    rows = [(f"{i}", image, None) for i, image in enumerate(images)]
    results, calls = [], []
    encode = spoken.encode
    spoken.encode = lambda samples, task: calls.append(len(samples)) or encode(samples, task)
    try:
        for use in (None, cache, cache):
            stream = common.Stream("recon", rows, lambda image, task, rng: spoken.preprocess(image, task), 0,
                                   ["Describe it."], use)
            items = next(stream.batches(0, 2))
            features = common.encode_batch(spoken, items, "recon", use)
            loss = spoken.recon_loss(features, [item["text"] for item in items],
                                     rng=common.Rng(0, "recon", positions=[0, 1]))
            results.append((loss.item(), gradients(spoken, loss)))
    finally:
        del spoken.encode
    assert calls == [2, 2]                                                    # not at the third step
    for value, grad in results[1:]:
        assert value == results[0][0]
        assert all(torch.equal(grad[k], results[0][1][k]) for k in grad)
    bytes_an_image = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) / 2
    wanted = 4 * (features[0]["und"].numel() + features[0]["latents"].numel())
    assert wanted <= bytes_an_image <= wanted + 300


def test_activation_checkpointing_gives_the_same_gradients(hub, spoken, features, golden):
    other = OpenUni.from_pretrained(hub / "finetuned", bases=bases_in(hub)).train()
    common.checkpoint_blocks(other, argparse.Namespace(checkpointing=True))
    a = fixture_loss(spoken, features, golden, "image2image")
    b = fixture_loss(other, features, golden, "image2image")
    assert a.item() == b.item()
    same_gradients(gradients(spoken, a), gradients(other, b), 1e-6)


def test_draws_replay_the_loss(spoken, features):
    latents = torch.stack([row["latents"] for row in features])
    loss = spoken.recon_loss(features, ["Describe it."] * 2, rng=common.Rng(3, "recon", positions=[5, 6]))
    rng = common.Rng(3, "recon", positions=[5, 6])
    draws = {"noise": rng.normal(*latents.shape[1:]), "u": rng.uniform()}
    assert loss.item() == spoken.recon_loss(features, ["Describe it."] * 2, draws=draws).item()
    assert loss.item() != spoken.recon_loss(features, ["Describe it."] * 2).item()
    captions = ["red circle", "blue square"]
    prompts = spoken._pad([spoken.t2i_prompt(), spoken.t2i_prompt(captions[1])])
    unconditional = padded_loss(spoken, features, *prompts, draws, "text2image")
    dropped = spoken.t2i_loss(features, captions, draws=draws | {"text_dropped": torch.tensor([True, False])})
    kept = spoken.t2i_loss(features, captions, draws=draws | {"text_dropped": torch.tensor([False, False])})
    assert dropped.item() == unconditional.item() != kept.item()


# ---- understanding, inference ----------------------------------------------------------------------------------------


def test_i2t_loss_counts_the_answers_only(spoken, features):
    talks = [[("what is it ?", "red circle"), ("where ?", "top-left")], [("what ?", "blue square")]]
    loss = spoken.i2t_loss(features, talks).item()
    total = count = 0
    for row, turns in zip(features, talks):                       # written out: each turn after all that came before it
        text = ""
        for i, (question, answer) in enumerate(turns):
            image = "<img>" + "<IMG_CONTEXT>" * spoken.image_tokens + "</img>\n" if i == 0 else ""
            text += ("\n" if i else "") + f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
            before = spoken.tokenize(text)
            after = spoken.tokenize(answer + "<|im_end|>")
            ids = torch.tensor([before + after])
            logits = spoken.lmm(inputs_embeds=spoken._embed(ids, row["und"][None])).logits[0].log_softmax(-1)
            total -= sum(logits[len(before) + k - 1, token].item() for k, token in enumerate(after))
            count += len(after)
            text += answer + "<|im_end|>"
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_describe_is_greedy_decoding(spoken):
    images = [common.draw_scene(common.random_scene(np.random.default_rng(i)), 100) for i in range(2)]
    answers = spoken.describe(images, "what is it ?", max_new_tokens=5)
    end = spoken.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for image, answer in zip(images, answers):
        und = embeddings(spoken.encode([spoken.preprocess(image, "i2t")], "i2t"))
        ids, said = spoken.recon_prompt("what is it ?")[:-1], []                           # without its last <img>
        for _ in range(5):
            logits = spoken.lmm(inputs_embeds=spoken._embed(torch.tensor([ids + said]), und)).logits[0, -1]
            said.append(logits.argmax().item())
            if said[-1] == end:
                break
        assert answer == spoken.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_generate_and_reconstruct(spoken):
    size = spoken.config.image_size
    a = spoken.generate(["red circle", "blue square"], seed=[7, 8], num_steps=3)
    b = spoken.generate(["blue square"], seed=8, num_steps=3)
    assert [image.size for image in a] == [(size, size)] * 2
    difference = np.abs(np.asarray(a[1], int) - np.asarray(b[0], int)).max()
    assert difference <= 1                                       # alone or in a batch: rounding apart, the same picture
    unguided = spoken.generate(["blue square"], seed=8, num_steps=3, guidance_scale=1)
    assert np.abs(np.asarray(unguided[0], int) - np.asarray(b[0], int)).max() > 1
    shape = (1, spoken.vae.config.latent_channels, *[size // spoken.vae.spatial_compression_ratio] * 2)
    latents = common.Rng.sampling(8, 1).normal(*shape[1:])
    replayed = spoken.generate(["blue square"], draws={"latents": latents}, num_steps=3)
    assert np.array_equal(np.asarray(replayed[0]), np.asarray(b[0]))
    image = common.draw_scene(common.random_scene(np.random.default_rng(0)), 150)
    one = spoken.reconstruct([image], num_steps=3)
    other = spoken.reconstruct([image], templates=["Describe it."], num_steps=3, guidance_scale=3.0)
    assert one[0].size == (size, size) and not np.array_equal(np.asarray(one[0]), np.asarray(other[0]))


def test_ablations_of_the_understanding_input(spoken, hub):
    model = OpenUni.from_pretrained(hub / "finetuned", bases=bases_in(hub))
    image = common.draw_scene(common.random_scene(np.random.default_rng(3)), 200)
    sample = model.preprocess(image, "recon")
    plain = model.encode([sample], "recon")[0]
    model.set_und(blur=8)
    blurred = model.encode([sample], "recon")[0]
    assert torch.equal(plain["latents"], blurred["latents"]) and not torch.allclose(plain["und"], blurred["und"])
    model.set_und(size=28)
    small = model.encode([sample], "recon")[0]
    assert small["und"].shape[0] == 1 and model.recon_prompt("").count(model.lmm.config.image_token_id) == 1
    model.recon_loss([small], ["Describe it."]).backward()
    with pytest.raises(common.InputError, match="multiples of 28"):
        model.set_und(size=30)


def test_preprocess_crops_at_random_and_centrally(spoken):
    image = common.draw_scene(common.random_scene(np.random.default_rng(1)), 64).resize((300, 100))
    centre = spoken.preprocess(image, "recon")["pixels"]
    size = spoken.config.image_size
    assert centre.shape == (3, size, size) and centre.dtype == torch.uint8
    assert torch.equal(centre, spoken.preprocess(image.crop((100, 0, 200, 100)), "recon")["pixels"])
    crops = [spoken.preprocess(image, "recon", np.random.default_rng(k))["pixels"] for k in range(4)]
    assert any(not torch.equal(crop, centre) for crop in crops)
    assert torch.equal(spoken.preprocess(image, "i2t")["pixels"], common.to_uint8(image.resize((size, size))))


# ---- the command line: tiny, from the shipped files to pictures -------------------------------------------------------


@pytest.fixture
def reca(monkeypatch, tmp_path):
    """reca("--steps", 2, ...) runs the script's main() with few sampling steps in the test's own folder."""
    def run(*arguments, out="run"):
        settings = {"--model": "tiny", "--batch": "2", "--sampling-steps": "2", "--out": str(tmp_path / out)}
        words = [word for setting in settings.items() for word in setting]
        monkeypatch.setattr("sys.argv", ["reca_openuni.py", *words, *map(str, arguments)])
        reca_openuni.main()
        return tmp_path / out
    yield run
    OpenUni.base_overrides = {}


@pytest.fixture
def unscored(monkeypatch):
    """Without the 512 pictures that a run on the toy world is scored with: tests that look at the losses only."""
    monkeypatch.setattr(common, "score_toy", lambda *_: {"overall": 0.0})


def test_tiny_from_end_to_end(reca, tmp_path):
    out = reca("--steps", 3, "--accum", 2, "--sample-every", 2)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(np.isfinite(row["recon"]) for row in rows)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["before"].keys() == scores["after"].keys() >= {"reconstruction", "single_object", "overall"}
    assert {"run.json", "loss.png", "previews"} <= {path.name for path in out.iterdir()}
    assert OpenUni.from_pretrained(out / "checkpoint-000002").config.image_size == reca_openuni.TINY.image_size

    checkpoint = str(out / "checkpoint-000002")                    # where the weights moved last
    (tmp_path / "prompts.txt").write_text("red circle top-left\nblue square\n")
    images = tmp_path / "images"
    images.mkdir()
    for k in range(2):
        common.draw_scene(common.random_scene(np.random.default_rng(k)), 64).save(images / f"{k}.png")
    used = reca("--model", checkpoint, "--steps", 0, "--generate", tmp_path / "prompts.txt", "--reconstruct", images,
                "--describe", images, "--max-new-tokens", 4, out="used")
    assert {"00000.png", "00001.png", "0.png", "1.png", "answers.jsonl"} <= {path.name for path in used.iterdir()}
    answers = [json.loads(line) for line in (used / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in answers] == ["0.png", "1.png"]
    assert all(isinstance(row["answer"], str) for row in answers)


def test_training_leaves_the_frozen_parts_alone(reca):
    out = reca("--steps", 2)
    start = OpenUni.from_pretrained("tiny")
    end = OpenUni.from_pretrained(out / "checkpoint-000002")
    trained = start.released_state().keys()
    end = end.state_dict()
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, end[name])}
    assert moved <= trained and len(moved) > 0.9 * len(trained)


@pytest.mark.parametrize("cached", [False, True])
def test_resume_gives_the_same_numbers(reca, tmp_path, cached, unscored):
    more = ["--cache", tmp_path / "cache"] if cached else []
    whole = reca("--steps", 4, *more, out="whole")
    reca("--steps", 2, *more, out="parts")
    parts = reca("--steps", 4, "--resume", *more, out="parts")

    def numbers(folder):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]

    def weights(folder):
        return (folder / "checkpoint-000004" / "openuni.pth").read_bytes()

    assert numbers(whole) == numbers(parts) and len(numbers(whole)) == 4
    assert weights(whole) == weights(parts)


def test_captions_train_beside_reconstruction(reca, unscored):
    """--captions: SFT, or RecA beside it; both losses are in the log."""
    out = reca("--steps", 1, "--captions", "full", out="both")
    row = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert row["loss"] == pytest.approx(row["recon"] + row["t2i"])
    out = reca("--steps", 1, "--captions", "full", "--lambda-recon", 0, out="sft")
    assert "recon" not in json.loads((out / "log.jsonl").read_text().splitlines()[0])


def test_bench_runs_on_tiny(reca, capsys):
    reca("--bench")
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["model"] == "tiny" and figures["images_per_s"] > 0


def test_what_bad_input_gets(reca, tmp_path):
    for arguments, words in ((["--lambda-i2t", 1], "L_i2t trains nothing"),
                             (["--i2t-data", "shapes"], "L_i2t trains nothing"),
                             (["--model", tmp_path, "--data", tmp_path], "no image"),
                             (["--und-size", 30, "--steps", 1], "multiples of 8")):
        with pytest.raises(common.InputError, match=words):
            reca(*arguments)
