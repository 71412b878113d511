"""What users bring: their own files, names, numbers and resumes. On reca_harmon.py --model tiny, and on common.py."""
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import reca_harmon

ROOT = Path(__file__).parent.parent
TINY = ("--model tiny --pretrain 0.005 --batch 2 --self-captions 4 --max-new-tokens 4 --sampling-steps 2 "
        "--precision fp32 --workers 0").split()
INFER = [*TINY, "--steps", "0"]


@pytest.fixture(scope="module", autouse=True)
def toy_cache(tmp_path_factory):
    """One (very short) toy pretraining for all tests of this file, nothing in the user's own cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        os.environ.pop("XDG_CACHE_HOME")
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def images(tmp_path):
    """Nine plain pictures, in a folder that a test may change."""
    folder = tmp_path / "d"
    folder.mkdir()
    for k in range(9):
        Image.new("RGB", (48, 40), (k * 28, 90, k)).save(folder / f"{k:02d}.png")
    return folder


def run(*arguments):
    """main() in this process, as `python reca_harmon.py ...` would."""
    argv, handlers = sys.argv, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    sys.argv = ["reca_harmon.py", *map(str, arguments)]
    try:
        reca_harmon.main()
    finally:
        sys.argv = argv
        for number, handler in handlers:
            signal.signal(number, handler)


def training(images, out, *arguments):
    """A short RecA run on the images, into `out`."""
    run(*TINY, "--data", images, "--lambda-i2t", 0, "--accum", 1, "--sample-every", 1000, "--out", out, *arguments)


def refused(*arguments):
    """The one line that such a command line gets."""
    with pytest.raises(common.InputError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def checkpoints(out):
    return [path.name for path in common.own_checkpoints(out)]


# ---- the user's own files beside those of a run ------------------------------------------------------------------------


def test_only_the_runs_own_checkpoints_rotate_and_resume(tmp_path, images):
    out = tmp_path / "o"
    training(images, out, "--steps", 2, "--save-every", 1)
    assert checkpoints(out) == ["checkpoint-000001", "checkpoint-000002"]
    for name in ("checkpoint-000001-keep", "checkpoint-best", "checkpoint-zz", "checkpoint-12"):
        (out / name).mkdir()
        (out / name / "trainer.pt").write_bytes(b"the user's own")
    (out / "checkpoint-notes.txt").write_text("mine")
    (out / ".tmp-notes").write_text("mine")
    (out / ".tmp-77-1f2e3d.pth").write_text("what a kill left")
    training(images, out, "--steps", 4, "--save-every", 1, "--resume")
    assert checkpoints(out) == ["checkpoint-000003", "checkpoint-000004"]          # it went on from 2, not from "best"
    assert [row["step"] for row in common.read_json(out / "log.jsonl", lines=True)] == [1, 2, 3, 4]
    for name in ("checkpoint-000001-keep", "checkpoint-best", "checkpoint-zz", "checkpoint-12"):
        assert (out / name / "trainer.pt").read_bytes() == b"the user's own"
    assert (out / "checkpoint-notes.txt").read_text() == (out / ".tmp-notes").read_text() == "mine"
    assert not (out / ".tmp-77-1f2e3d.pth").exists()


def test_a_new_run_of_a_toy_begins_without_its_own_files_only(tmp_path, images):
    out = tmp_path / "o"
    training(images, out, "--steps", 2)
    (out / "previews" / "mine.png").write_bytes(b"mine")
    (out / "checkpoint-000002-keep").mkdir()
    training(images, out, "--steps", 1)
    assert checkpoints(out) == ["checkpoint-000001"]
    assert (out / "previews" / "mine.png").read_bytes() == b"mine" and (out / "checkpoint-000002-keep").is_dir()


def test_checkpoints_beyond_a_million_steps_are_ordered_by_number(tmp_path):
    for step in (999_999, 1_000_000, 12):
        folder = tmp_path / f"checkpoint-{step:06d}"
        folder.mkdir()
        (folder / "trainer.pt").touch()
    assert checkpoints(tmp_path) == ["checkpoint-000012", "checkpoint-999999", "checkpoint-1000000"]


def test_a_folder_that_has_a_checkpoints_name_is_not_replaced(tmp_path, images):
    own = tmp_path / "o" / "checkpoint-000002"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("mine")
    line = refused(*TINY, "--data", images, "--lambda-i2t", 0, "--steps", 2, "--out", tmp_path / "o")
    assert "checkpoint-000002 is in the way" in line and (own / "thesis.txt").read_text() == "mine"


# ---- names -------------------------------------------------------------------------------------------------------------


def test_a_folder_called_like_a_toy_is_a_folder(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training(images, "first", "--steps", 2)
    model = Path("first/checkpoint-000002").rename("tiny-b")
    before = (model / "harmon_tiny.pth").read_bytes()
    flags = ["--model", "tiny-b", "--batch", 2, "--lambda-i2t", 0, "--workers", 0, "--accum", 1, "--precision", "fp32"]
    assert "--data is missing" in refused(*flags, "--steps", 1)                   # it is no toy: no data of its own
    run(*flags, "--steps", 1, "--data", images, "--out", "second")
    start = common.load_state(model / "harmon_tiny.pth")
    end = common.load_state("second/checkpoint-000001/harmon_tiny.pth")
    name = "llm.model.embed_tokens.weight"
    assert (start[name] - end[name]).abs().max() < 1e-3 < start[name].std()            # trained on, not begun anew
    assert "holds a run already" in refused(*flags, "--steps", 1, "--data", images, "--out", "second")
    assert (model / "harmon_tiny.pth").read_bytes() == before


def test_a_toy_does_not_delete_the_run_of_another_model(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training(images, "first", "--steps", 2)
    Path("first/checkpoint-000002").rename("mine")
    run("--model", "mine", "--data", images, "--batch", 2, "--lambda-i2t", 0, "--workers", 0, "--accum", 1,
        "--precision", "fp32", "--steps", 1, "--out", "o")
    assert "holds a run already" in refused(*TINY, "--data", images, "--steps", 1, "--out", "o")
    assert checkpoints("o") == ["checkpoint-000001"]


# ---- what exists, and what was asked -----------------------------------------------------------------------------------


def test_a_picture_is_kept_only_for_the_same_prompt_weights_sampler_and_seed(tmp_path, capsys):
    out, prompts = tmp_path / "a", tmp_path / "p.txt"

    def generate(text, *more):
        prompts.write_text(text)
        run(*INFER, "--generate", prompts, "--out", out, *more)
        return capsys.readouterr().out.splitlines()[-1].partition(": ")[2]

    assert generate("red circle\nblue square\n") == "0 kept, 2 made, 0 made again"
    first = [(out / f"0000{k}.png").read_bytes() for k in range(2)]
    assert generate("red circle\nblue square\n") == "2 kept, 0 made, 0 made again"
    assert generate("green circle\nblue square\n") == "1 kept, 0 made, 1 made again"
    assert (out / "00000.png").read_bytes() != first[0] and (out / "00001.png").read_bytes() == first[1]
    assert generate("red circle\nblue square\n", "--seed", 9).endswith("2 made again")              # another toy, too
    assert generate("red circle\nblue square\n", "--guidance-scale", 2).endswith("2 made again")
    assert generate("red circle\nblue square\n") == "0 kept, 0 made, 2 made again"
    assert [(out / f"0000{k}.png").read_bytes() for k in range(2)] == first
    said = common.origin_of(out / "00000.png")
    assert said["prompt"] == "red circle" and said["seeds"] == [0] and len(said["weights"]) == 16
    assert generate("red circle\n") == "1 kept, 0 made, 0 made again; 1 pictures of other requests are there as well"


def test_more_training_makes_the_pictures_again(tmp_path, images, capsys):
    out, prompts = tmp_path / "o", tmp_path / "p.txt"
    prompts.write_text("red circle\n")
    training(images, out, "--steps", 2, "--generate", prompts)
    assert "0 kept, 1 made, 0 made again" in capsys.readouterr().out
    training(images, out, "--steps", 2, "--generate", prompts, "--resume")
    assert "1 kept, 0 made, 0 made again" in capsys.readouterr().out
    training(images, out, "--steps", 4, "--generate", prompts, "--resume")
    assert "0 kept, 0 made, 1 made again" in capsys.readouterr().out


def test_a_reconstruction_belongs_to_its_source_and_an_answer_to_its_question(tmp_path, images, capsys):
    def last(*arguments):
        run(*INFER, *arguments)
        return capsys.readouterr().out.splitlines()[-1].partition(": ")[2]

    recon = ["--reconstruct", images, "--out", tmp_path / "r"]
    assert last(*recon) == "0 kept, 9 made, 0 made again"
    Image.new("RGB", (40, 40), "red").save(images / "03.png")
    assert last(*recon) == "8 kept, 0 made, 1 made again"
    said = ["--describe", images, "--out", tmp_path / "s"]
    assert last(*said) == "0 kept, 9 made, 0 made again"
    Image.new("RGB", (40, 40), "blue").save(images / "03.png")
    assert last(*said) == "8 kept, 0 made, 1 made again"
    assert last(*said, "--max-new-tokens", 2) == "0 kept, 0 made, 9 made again"
    asked = last(*said, "--question", "red ?")
    assert asked == "0 kept, 9 made, 0 made again; 9 of other requests are there as well"
    answers = common.read_json(tmp_path / "s" / "answers.jsonl", lines=True)
    assert len(answers) == 18 and sum(row["question"] == "red ?" for row in answers) == 9


def test_a_picture_of_the_users_is_never_overwritten(tmp_path, images):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    assert "is in the way" in refused(*INFER, "--reconstruct", images, "--out", images)
    (tmp_path / "p.txt").write_text("red circle\n")
    (images / "00.png").rename(images / "00000.png")
    assert "00000.png is in the way" in refused(*INFER, "--generate", tmp_path / "p.txt", "--out", images)
    (images / "00000.png").rename(images / "00.png")
    assert {path.name: path.read_bytes() for path in images.iterdir() if path.suffix == ".png"} == before
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "answers.jsonl").write_text('{"question_id": 1, "answer": "mine"}\n')
    assert "answers.jsonl is in the way" in refused(*INFER, "--describe", images, "--out", tmp_path / "said")


def test_batches_are_as_large_as_asked_also_for_a_grid(tmp_path, monkeypatch):
    sizes, generate = [], reca_harmon.Harmon.generate

    def counted(self, prompts, **options):
        sizes.append(len(prompts))
        return generate(self, prompts, **options)
    monkeypatch.setattr(reca_harmon.Harmon, "generate", counted)
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "a.txt").write_text("red circle")
    run(*INFER, "--generate", tmp_path / "dpg", "--batch-images", 1, "--out", tmp_path / "one")
    assert sizes == [1, 1, 1, 1]
    run(*INFER, "--generate", tmp_path / "dpg", "--batch-images", 3, "--out", tmp_path / "three")
    assert sizes[4:] == [3, 1]
    grids = [np.asarray(Image.open(tmp_path / name / "a.png")).astype(int) for name in ("one", "three")]
    assert grids[0].shape == (64, 64, 3) and abs(grids[0] - grids[1]).max() <= 1


# ---- two inputs, one output --------------------------------------------------------------------------------------------


def test_every_input_has_an_output_of_its_own(tmp_path, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, color in (("cat.jpg", "red"), ("cat.png", "blue"), ("dog.png", "red"), ("reconstructions.png", "red")):
        Image.new("RGB", (40, 40), color).save(folder / name)
    run(*INFER, "--reconstruct", folder, "--out", tmp_path / "r")
    made = {path.name for path in (tmp_path / "r").glob("*.png")}
    assert made == {"cat.jpg.png", "cat.png.png", "dog.png", "reconstructions.png.png", "reconstructions.png"}
    assert "4 images reconstructed" in capsys.readouterr().out
    assert Image.open(tmp_path / "r" / "reconstructions.png").width > 300                           # the overview
    sys.argv, argv = ["eval.py", "recon", str(tmp_path / "r"), "--sources", str(folder), "--clip", "none"], sys.argv
    try:
        import eval as scorer
        scorer.main()
    finally:
        sys.argv = argv
    assert "(partial)" not in capsys.readouterr().out


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_shards_with_equal_member_names(tmp_path):
    pack(tmp_path / "a.tar", [("0.png", png("red")), ("1.png", png("red"))])
    pack(tmp_path / "b.tar", [("0.png", png("blue")), ("2.png", png("black")), ("2.png", png("blue"))])
    rows = common.image_rows(tmp_path)
    assert sorted(name for name, *_ in rows) == ["1.png", "2.png", "a/0.png", "b/0.png"]
    colors = {name: common.load_image(source).getpixel((0, 0)) for name, source, _ in rows}
    assert colors["a/0.png"] == (255, 0, 0) and colors["b/0.png"] == colors["2.png"] == (0, 0, 255)


def test_equal_ids_of_prompts_and_edits_are_named(tmp_path):
    (tmp_path / "wise.json").write_text(json.dumps([{"Prompt": text, "prompt_id": 7} for text in ("x", "y")]))
    with pytest.raises(common.InputError, match="prompt 1 and prompt 2 would both be written to .*7.png"):
        common.prompt_jobs(tmp_path / "wise.json", tmp_path / "o", 1)
    import reca_bagel
    row = {"key": "a", "task_type": "t", "instruction": "x", "instruction_language": "en"}
    (tmp_path / "gedit.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(common.InputError, match="row 1 and row 2 would both be written"):
        reca_bagel.edit_jobs(tmp_path / "gedit.jsonl", None, tmp_path / "o")


def test_several_questions_may_share_an_id(tmp_path, images):
    rows = [{"question_id": 5, "image": "00.png", "text": text} for text in ("red ?", "blue ?")]
    common.write(tmp_path / "q.jsonl", rows)
    for _ in range(2):
        run(*INFER, "--describe", tmp_path / "q.jsonl", "--i2t-images", images, "--out", tmp_path / "s")
    said = common.read_json(tmp_path / "s" / "answers.jsonl", lines=True)
    assert [row["question"] for row in said] == ["red ?", "blue ?"]
