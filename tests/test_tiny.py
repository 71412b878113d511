"""The tiny models: what lies in tiny/ loads strictly, is small, and scores what tiny/README.md
says, and tiny/pretrain.py makes such folders."""
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
from test_comments import Watch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tiny"))

import pretrain

NAMES = list(pretrain.MODELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What was written down was computed with one thread: with more, sums are split otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flat(values, prefix=""):
    """A state dict, or dicts of them -> {name: tensor}."""
    tensors = {}
    for key, value in values.items():
        if torch.is_tensor(value):
            tensors[prefix + key] = value
        else:
            tensors |= flat(value, f"{prefix}{key}/")
    return tensors


def stored(folder):
    """Every tensor of a model's folder, as it is stored: {file/name: tensor}."""
    tensors = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            tensors |= flat(load_file(path), f"{path.name}/")
        elif path.suffix in (".pth", ".ckpt"):
            tensors |= flat(torch.load(path, weights_only=True), f"{path.name}/")
    return tensors


def documented_scores():
    """{name: {score: fraction}} of the table in tiny/README.md."""
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "tiny" / "README.md").read_text(), re.MULTILINE)
    header, *body = [row.split("|") for row in rows]
    scores = {}
    for name, *cells in body:
        names = [cell.strip() for cell in header[1:]]
        scores[name.strip(" `")] = dict(zip(names, map(float, cells)))
    return scores


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_small_and_stored_in_16_bits(name):
    folder = ROOT / "tiny" / name
    files = [path for path in folder.rglob("*") if path.is_file() and "expected" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    tensors = stored(folder)
    assert len(tensors) > 100
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    assert kinds == {torch.float16}
    assert all(value.isfinite().all() for value in tensors.values())


def slow_but(*fast):
    """Parameters: the names in `fast` always, the others with --slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", slow_but("openuni", "showo"))
def test_a_shipped_model_scores_what_is_written(name):
    """Loading is strict in every script; the scores are those of a toy run before its training."""
    model_class, size, _ = pretrain.MODELS[name]
    model = model_class.from_pretrained(size)
    with torch.no_grad():
        scores = common.score_toy(model, model.config.image_size, 128, 7, options={})
    written = documented_scores()[name]
    # Another machine's sums differ in the last bits, which may turn one picture of a few.
    assert scores == pytest.approx(written, abs=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_runs_and_makes_the_layout_that_is_shipped(name, tmp_path):
    """A few steps of every stage. The folder holds the files, names and shapes of the shipped one,
    loads strictly, and the weights that were trained are not those that were drawn."""
    made = tmp_path / name
    pretrain.pretrain(name, made, seed=0, fraction=0.004)
    ours = stored(made)
    shipped = stored(ROOT / "tiny" / name)
    assert {key: value.shape for key, value in ours.items()} == \
        {key: value.shape for key, value in shipped.items()}
    model_class, size, _ = pretrain.MODELS[name]
    loaded = model_class.from_pretrained(str(made))
    torch.manual_seed(0)
    drawn = model_class.random(size).state_dict()
    moved = [key for key, value in loaded.state_dict().items()
             if value.is_floating_point() and not torch.equal(value, drawn[key].half().float())]
    assert len(moved) > 0.5 * len(drawn)


@pytest.mark.slow
def test_shape_comments_of_the_pretraining_hold(tmp_path):
    """A few steps of every stage of every model, under a trace."""
    watch = Watch(Path(pretrain.__file__))
    sys.settrace(watch)
    try:
        for name in NAMES:
            pretrain.pretrain(name, tmp_path / name, seed=0, fraction=0.004)
    finally:
        sys.settrace(None)
    assert not watch.wrong, "\n".join(sorted(watch.wrong))
    assert len(watch.seen) > 70


def test_a_missing_tiny_model_is_one_line_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    with pytest.raises(common.InputError, match="python tiny/pretrain.py showo-vq") as error:
        pretrain.MODELS["showo-vq"][0].from_pretrained("tiny-vq")
    assert "\n" not in str(error.value)


def test_the_effect_at_a_glance():
    """Every scene in its place: what is pasted can be read back from the picture."""
    scenes = common.effect_scenes()
    assert {color for scene in scenes for _, _, color in scene} == set(range(8))
    pictures = [common.draw_scene(scene, 32) for scene in scenes]
    told = [(common.caption(scene), image, image) for scene, image in zip(scenes, pictures)]
    shown = [(image, image, image) for image in pictures]
    sheet = common.effect_picture(told, shown, cell=98, gap=6)
    halves = [2 * 98, 2 * 98 + 2 * 104 + 24]
    for row, scene in enumerate(scenes):
        for column in range(5):
            left = halves[0] + column * 104 if column < 2 else halves[1] + (column - 2) * 104
            top = 24 + row * 104
            cell = sheet.crop((left + 1, top + 1, left + 97, top + 97))
            assert common.read_scene(cell.resize((32, 32), Image.BOX)) == scene


def test_what_is_said_about_text_to_image():
    assert "+20 points, and no caption" in common.effect_sentence({"overall": 0.5}, {"overall": 0.7})
    assert "not better" in common.effect_sentence({"overall": 0.5}, {"overall": 0.52})
    assert "-10 points" in common.effect_sentence({"overall": 0.5}, {"overall": 0.4})


@pytest.mark.parametrize("name", slow_but("openuni", "showo"))
def test_the_first_fifth_of_a_run_is_as_expected(name, tmp_path, monkeypatch):
    """The losses of the first steps beside those that were written down, and the scores before them
    beside the README's. (The whole run takes minutes.)"""
    expected = ROOT / "tiny" / name / "expected"
    model_class, size, _ = pretrain.MODELS[name]
    script = sys.modules[model_class.__module__]
    losses = common.read_json(expected / "losses.json")
    assert len(losses) >= script.RECIPES[size].steps // 5
    assert common.read_json(expected / "scores.json")["before"] == \
        pytest.approx(documented_scores()[name], abs=0.006)

    # The pictures that a run is scored with take longer than its first steps.
    monkeypatch.setattr(common, "score_toy", lambda *_: {"overall": 0.0})
    flags = ["--model", size, "--steps", len(losses), "--precision", "fp32", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    script.main()
    ours = [row["recon"] for row in common.read_json(tmp_path / "log.jsonl", lines=True)]
    assert ours[0] == pytest.approx(losses[0], rel=1e-3)
    assert sum(ours) == pytest.approx(sum(losses), rel=0.05)
