"""Which weights a name, a file or a folder means, in all four scripts, on tiny models with random weights."""
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import common
import reca_bagel
import reca_harmon
import reca_openuni
import reca_showo

MODELS = {
    "harmon": (reca_harmon, reca_harmon.Harmon, "harmon_tiny.pth", "proj_in.0.bias"),
    "openuni": (reca_openuni, reca_openuni.OpenUni, "openuni.pth", "projector.bias"),
    "showo": (reca_showo, reca_showo.Showo, "pytorch_model.safetensors", "mm_projector.0.bias"),
    "bagel": (reca_bagel, reca_bagel.Bagel, "ema.safetensors", "llm2vae.bias")}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A script, its model class, a saved model's folder, its file, and the name of one tensor, whose value tells files
    apart."""
    module, model_class, file, name = MODELS[request.param]
    torch.manual_seed(0)
    model_class.from_pretrained("tiny").save_pretrained(tmp_path / "m")
    return module, model_class, tmp_path / "m", file, name


def write_state(path, state):
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)


def marked(folder, file, name, value):
    """The folder's weights with one tensor filled with `value`."""
    state = {key: tensor.clone() for key, tensor in common.load_state(folder / file).items()}   # not mapped to the file
    return {**state, name: torch.full_like(state[name], value)}


def loaded(model_class, source, name):
    return model_class.from_pretrained(str(source)).state_dict()[name].flatten()[0].item()


def test_a_runs_folder_means_its_newest_checkpoint(saved, tmp_path, capsys):
    module, model_class, folder, file, name = saved
    for step in (8, 12):
        shutil.copytree(folder, tmp_path / "run" / f"checkpoint-{step:06d}")
        write_state(tmp_path / "run" / f"checkpoint-{step:06d}" / file, marked(folder, file, name, step / 8))
    (tmp_path / "run" / "checkpoint-best").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert loaded(model_class, tmp_path / "run", name) == 1.5
    assert "its newest checkpoint, checkpoint-000012, is taken" in capsys.readouterr().out
    assert loaded(model_class, tmp_path / "run" / "checkpoint-000008", name) == 1.0


def test_the_file_is_chosen_by_what_it_holds(saved, capsys):
    """Under a name that nobody has guessed, beside weights of something else; a DDP wrapper's prefix is dropped."""
    module, model_class, folder, file, name = saved
    suffix = Path(file).suffix
    state = {f"module.{key}": value for key, value in marked(folder, file, name, 2.0).items()}
    (folder / file).unlink()
    write_state(folder / f"final_v2{suffix}", state)
    write_state(folder / f"another{suffix}", {"encoder.weight": torch.ones(3)})
    assert loaded(model_class, folder, name) == 2.0
    (folder / f"final_v2{suffix}").unlink()
    write_state(folder / f"third{suffix}", {"encoder.weight": torch.ones(3)})
    with pytest.raises(common.InputError, match="none of which has"):
        model_class.from_pretrained(str(folder))


@pytest.mark.parametrize("order", [["model_bf16", "model", "ema"], ["model", "ema"], ["ema"]])
def test_bagel_takes_the_weights_before_their_average(tmp_path, capsys, order):
    module, model_class, file, name = MODELS["bagel"]
    model_class.from_pretrained("tiny").save_pretrained(tmp_path)
    states = {stem: marked(tmp_path, file, name, value) for value, stem in enumerate(order, 1)}
    for stem, state in states.items():
        write_state(tmp_path / f"{stem}.safetensors", state)
    assert loaded(model_class, tmp_path, name) == 1
    line = capsys.readouterr().out
    assert f"{order[0]}.safetensors is taken" in line if len(order) > 1 else not line
    assert "ema.safetensors (an average)" in line or len(order) == 1


@pytest.mark.parametrize("script", ["harmon", "openuni"])
def test_the_others_leave_an_average_too(tmp_path, capsys, script):
    module, model_class, file, name = MODELS[script]
    model_class.from_pretrained("tiny").save_pretrained(tmp_path)
    write_state(tmp_path / "model_ema.pth", marked(tmp_path, file, name, 3.0))
    write_state(tmp_path / file, marked(tmp_path, file, name, 1.0))
    assert loaded(model_class, tmp_path, name) == 1.0
    assert "left are model_ema.pth (an average)" in capsys.readouterr().out
    assert loaded(model_class, f"{tmp_path}:model_ema.pth", name) == 3.0
    write_state(tmp_path / "second.pth", marked(tmp_path, file, name, 4.0))
    with pytest.raises(common.InputError, match="holds 2 checkpoints"):
        model_class.from_pretrained(str(tmp_path))


def hub(tmp_path, monkeypatch, files):
    """A hub of local folders, {"owner/name": folder}, that fetches what matches the patterns, as the real one does."""
    import fnmatch

    import huggingface_hub
    asked = []

    def snapshot_download(source, allow_patterns):
        kept = tmp_path / "cache" / source
        kept.mkdir(parents=True, exist_ok=True)
        for path in files[source].rglob("*"):
            name = path.relative_to(files[source])
            if path.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                asked.append(name.name)
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, kept / name)
        return str(kept)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("script, known, file", [
    ("harmon", "harmon-1.5b-reca", "pytorch_model.bin"), ("harmon", "harmon-1.5b-reca-plus", "model.safetensors"),
    ("harmon", "harmon-0.5b-reca", "iter_3000.pth"), ("openuni", "openuni-reca", "iter_5000.pth"),
    ("openuni", "openuni-b-reca", "model.safetensors"), ("showo", "showo-512-reca", "model.safetensors"),
    ("showo", "showo-256-reca", "unwrapped_model/pytorch_model.bin"), ("bagel", "bagel-reca", "model_bf16.safetensors")])
def test_the_authors_reca_weights_have_names(tmp_path, monkeypatch, script, known, file):
    module, model_class, own, name = MODELS[script]
    assert known in module.RECIPES and known in module.CONFIGS and module.RECA[known].startswith("sanaka87/")
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    model_class.from_pretrained("tiny").save_pretrained(folder)
    state = marked(folder, own, name, 5.0)
    (folder / own).unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    write_state(folder / file, state)
    if script == "showo":                               # its own parts lie in folders beside the weights
        for part in [path for path in folder.iterdir() if path.name != Path(file).parts[0]]:
            shutil.move(part, (folder / file).parent / part.name)
    parts = (folder / file).parent
    asked = hub(tmp_path, monkeypatch, {
        "microsoft/phi-1_5": parts / "tokenizer", "openai/clip-vit-large-patch14-336": parts / "clip",
        "showlab/magvitv2": parts / "magvitv2", module.RECA[known]: folder})
    if script in ("harmon", "bagel", "showo"):
        assert loaded(model_class, known, name) == 5.0
    else:
        assert common.find_checkpoint(known, module.RECA, module.WEIGHT_FILES, ["*.json"], ["meta_queries"]).name == file
    assert Path(file).name in asked


def test_a_download_stops_at_the_first_kind_that_has_the_weights(tmp_path, monkeypatch):
    module, model_class, own, name = MODELS["bagel"]
    model_class.from_pretrained("tiny").save_pretrained(tmp_path / "hub")
    shutil.copy(tmp_path / "hub" / own, tmp_path / "hub" / "model_bf16.safetensors")
    shutil.copy(tmp_path / "hub" / own, tmp_path / "hub" / "model_int8.safetensors")
    asked = hub(tmp_path, monkeypatch, {"sanaka87/BAGEL-RecA": tmp_path / "hub"})
    model_class.from_pretrained("bagel-reca")
    assert "model_bf16.safetensors" in asked and not {"ema.safetensors", "model_int8.safetensors"} & set(asked)


@pytest.mark.parametrize("model, hint", [
    ("harmon-1.5b-recа", "did you mean harmon-1.5b-reca"), ("harmon-1.5B", "did you mean harmon-1.5b?"),
    ("tinny", "did you mean tiny?"), ("qqqqqq", "no such model: qqqqqq (give a folder")])
def test_an_unknown_name_suggests_the_nearest(model, hint):
    with pytest.raises(common.InputError) as error:
        common.parse_args("", reca_harmon.RECIPES, reca_harmon.DEFAULT, ["--model", model, "--data", "shapes"])
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("script", MODELS)
def test_help_lists_every_name(script, capsys, monkeypatch):
    module = MODELS[script][0]
    monkeypatch.setattr(sys, "argv", [f"reca_{script}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert all(name in text for name in [*module.RECIPES, *module.RECA])


# ---- BAGEL's sampler ---------------------------------------------------------------------------------------------------


def test_bagels_guidance_flags_reach_its_sampler(tmp_path, monkeypatch):
    seen = []

    def sample(self, sets, noise, **options):
        seen.append(options)
        return noise
    monkeypatch.setattr(reca_bagel.Bagel, "_sample", sample)
    (tmp_path / "p.txt").write_text("red circle\n")

    def generate(*flags):
        argv = ["--model", "tiny", "--steps", "0", "--generate", tmp_path / "p.txt", "--out", tmp_path / "o", *flags]
        monkeypatch.setattr(sys, "argv", ["reca_bagel.py", *map(str, argv)])
        reca_bagel.main()
        return seen[-1]
    options = generate()
    assert (options["interval"], options["renorm"], options["timestep_shift"]) == ((0.4, 1.0), "global", 3.0)
    options = generate("--cfg-interval", 0, 0.7, "--cfg-renorm", "channel", "--timestep-shift", 1.5)
    assert (list(options["interval"]), options["renorm"], options["timestep_shift"]) == ([0, 0.7], "channel", 1.5)
    assert common.origin_of(tmp_path / "o" / "00000.png")["interval"] == [0, 0.7]
    for flags, message in ((["--cfg-interval", 0, 2], "2 is no number from 0 to 1"), (["--cfg-renorm", "all"], "choice"),
                           (["--timestep-shift", 0], "no number"), (["--sampling-steps", 1], "give 2 or more"),
                           (["--cfg-interval", 0.8, 0.2], "FROM is less than TO")):
        with pytest.raises(common.InputError, match=message):
            generate(*flags)


def test_one_step_of_each_sampler():
    """BAGEL's 50 "steps" are 49 moves: 1 would be noise. The others' one step is one call of the network."""
    for module, model_class, *_ in MODELS.values():
        model = model_class.from_pretrained("tiny")
        if model_class is reca_bagel.Bagel:
            with pytest.raises(common.InputError, match="give 2 or more"):
                model.generate(["red circle"], num_steps=1)
            model.generate(["red circle"], num_steps=2)
        else:
            assert isinstance(model.generate(["red circle"], num_steps=1)[0], Image.Image)
