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
