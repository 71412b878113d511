"""What users bring: their own files, names, numbers and resumes. On reca_harmon.py --model tiny, and on common.py."""
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import reca_harmon
import reca_showo
from test_run import run

ROOT = Path(__file__).parent.parent
TINY = ("--model tiny --batch 2 --self-captions 4 --max-new-tokens 4 --sampling-steps 2 "
        "--precision fp32 --workers 0").split()
INFER = [*TINY, "--steps", "0"]


@pytest.fixture
def images(tmp_path):
    """Nine plain pictures, in a folder that a test may change."""
    folder = tmp_path / "d"
    folder.mkdir()
    for k in range(9):
        Image.new("RGB", (48, 40), (k * 28, 90, k)).save(folder / f"{k:02d}.png")
    return folder


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
    rows = common.image_examples(tmp_path)
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


# ---- self-captions, previews, damaged state ----------------------------------------------------------------------------


def described_run(images, out, *arguments):
    run(*TINY, "--data", images, "--accum", 1, "--self-captions", 9, "--sample-every", 1000, "--out", out, *arguments)


def test_descriptions_are_found_by_name_when_files_come_and_go(tmp_path, images, capsys):
    out = tmp_path / "o"
    described_run(images, out, "--steps", 1)
    kept = [{"name": f"{k:02d}.png", "question": "What?", "answer": f"number {k}"} for k in (0, 5, 8)]
    common.write(out / "i2t_self.jsonl", kept)
    for name in ("0000.png", "04b.png"):
        Image.new("RGB", (40, 40), "red").save(images / name)
    rows = common.described_examples(common.image_examples(images), out / "i2t_self.jsonl")
    assert [(name, Path(source).name, talk) for name, source, talk in rows] == [
        (f"{k:02d}.png", f"{k:02d}.png", [("What?", f"number {k}")]) for k in (0, 5, 8)]
    for k in range(6):
        (images / f"{k:02d}.png").unlink()
    capsys.readouterr()
    described_run(images, out, "--steps", 2, "--resume")
    assert "2 of 3 descriptions are of images that are not there now" in capsys.readouterr().out
    (images / "08.png").unlink()
    with pytest.raises(common.InputError, match="describes none of the images"):
        described_run(images, out, "--steps", 3, "--resume")


def test_descriptions_of_the_toy_world_are_found_again(tmp_path):
    common.write(tmp_path / "said.jsonl", [{"name": "shapes 7", "question": "What?", "answer": "red circle"}])
    rows = common.described_examples(common.Shapes(size=32, count=10), tmp_path / "said.jsonl")
    assert rows[0][0] == "shapes 7" and rows[0][1].size == (32, 32)


@pytest.mark.parametrize("missing", ["previews", "previews/input_1.png"])
def test_a_run_resumes_without_its_previews(tmp_path, images, missing):
    out = tmp_path / "o"
    training(images, out, "--steps", 1)
    common.remove(out / missing)
    training(images, out, "--steps", 2, "--resume")
    assert checkpoints(out)[-1] == "checkpoint-000002"
    assert Image.open(out / "previews" / "step_000002.png").width == 2 * (128 + 4)            # no column before RecA


def test_a_run_resumes_in_a_folder_with_more_images_than_before(tmp_path, images):
    out = tmp_path / "o"
    for k in range(2, 9):
        (images / f"{k:02d}.png").unlink()
    training(images, out, "--steps", 1)
    for k in range(2, 9):
        Image.new("RGB", (48, 40), (k * 28, 90, k)).save(images / f"{k:02d}.png")
    training(images, out, "--steps", 2, "--resume")
    sheet = Image.open(out / "previews" / "step_000002.png")
    assert sheet.size == (3 * (128 + 4), 18 + 2 * (128 + 4))                  # the two that have been shown from the start


def test_the_toy_world_resumes_without_its_scores(tmp_path):
    flags = [*TINY, "--lambda-i2t", 0, "--sample-every", 1000, "--out", tmp_path / "o"]
    run(*flags, "--steps", 1)
    (tmp_path / "o" / "scores.json").unlink()
    run(*flags, "--steps", 2, "--resume")
    assert set(json.loads((tmp_path / "o" / "scores.json").read_text())) == {"after"}


def test_a_damaged_checkpoint_offers_the_one_before(tmp_path, images):
    out = tmp_path / "o"
    training(images, out, "--steps", 2, "--save-every", 1)
    flags = [*TINY, "--data", images, "--lambda-i2t", 0, "--accum", 1, "--steps", 3, "--resume", "--out", out]
    newest = out / "checkpoint-000002"
    for file, content in (("trainer.pt", None), ("trainer.pt", [1, 2]), ("harmon_tiny.pth", None)):
        whole = (newest / file).read_bytes()
        if content is None:
            (newest / file).write_bytes(whole[:2000])
        else:
            torch.save(content, newest / file)
        line = refused(*flags)
        assert f"{newest / file} is not a readable checkpoint" in line and "checkpoint-000001" in line
        (newest / file).write_bytes(whole)
    (newest / "trainer.pt").write_bytes(b"")
    common.remove(out / "checkpoint-000001")
    assert "no checkpoint before it" in refused(*flags)


def test_empty_and_broken_lines_of_a_log(tmp_path, images):
    out = tmp_path / "o"
    training(images, out, "--steps", 2)
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'\n\n[1, 2]\n{"no": "step"}\n\xff\xfe\x00\n{"step": 3, "lo')
    training(images, out, "--steps", 3, "--resume")
    assert [row["step"] for row in common.read_json(out / "log.jsonl", lines=True)] == [1, 2, 3]


# ---- foreign files -----------------------------------------------------------------------------------------------------


def bad_exif(path):
    """A photo whose EXIF says an orientation, and a resolution of the wrong type, which Pillow cannot write again."""
    def entry(tag, kind, count, value):
        return struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entry(0x112, 3, 1, b"\0\6") + entry(0x11a, 2, 3, b"72\0") + b"\0" * 4
    Image.new("RGB", (48, 40), "red").save(path, exif=exif)


def test_whatever_a_decoder_raises_skips_the_image(tmp_path, images, monkeypatch):
    bad_exif(images / "x.jpg")
    with pytest.raises(common.UnreadableImage):
        common.load_image(images / "x.jpg")
    training(images, tmp_path / "o", "--steps", 6)
    rows = common.read_json(tmp_path / "o" / "log.jsonl", lines=True)
    skipped = [name.split(" (")[0] for row in rows for name in row["skipped"]]
    assert len(rows) == 6 and skipped == ["x.jpg"]
    for raised in (struct.error("x"), AttributeError("x"), MemoryError(), TypeError("x"), AssertionError(), KeyError(1)):
        def decode(data, raised=raised):
            raise raised
        monkeypatch.setattr(common, "decode", decode)
        with pytest.raises(common.UnreadableImage):
            common.load_image(images / "00.png")
    with pytest.raises(common.UnreadableImage, match="No such file"):
        common.read_source(images / "gone.png")


def test_floats_without_a_range_and_endless_files_are_no_images(tmp_path, monkeypatch):
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(common.UnreadableImage, match="floating point"):
        common.load_image(tmp_path / "f.tif")
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(common.MAX_BYTES + 1)
    with pytest.raises(common.UnreadableImage, match="refused"):
        common.load_image(tmp_path / "big.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_prompts_in_encodings_that_say_what_they_are(tmp_path, encoding):
    path = tmp_path / "p.txt"
    path.write_bytes("a café\r\n一只猫\u2028on a mat\rlast".encode(encoding))
    assert [job[0] for job in common.prompt_jobs(path, tmp_path / "o", 1)] == ["a café", "一只猫\u2028on a mat", "last"]
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a café"}\n'.encode(encoding))
    assert common.prompt_jobs(tmp_path / "p.jsonl", tmp_path / "o", 1)[0][0] == "a café"
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "1.txt").write_bytes("a café".encode(encoding))
    (tmp_path / "dpg" / "._1.txt").write_bytes(b"\0\5\x16\7")                       # macOS's notes on it are no prompt
    assert [job[0] for job in common.prompt_jobs(tmp_path / "dpg", tmp_path / "o", 1)] == ["a café"]


@pytest.mark.parametrize("data", ["eins\nein Café\n".encode("latin-1"), "eins\ncafé".encode("utf-16-le")])
def test_prompts_in_encodings_that_do_not(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    line = refused(*INFER, "--generate", tmp_path / "p.txt", "--out", tmp_path / "o")
    assert "is not utf-8 text; save the file as UTF-8" in line and ("line 2" in line or b"\0" in data)


def test_a_checkpoint_that_holds_something_else(tmp_path):
    for name, content in (("list", [torch.ones(2)]), ("tensor", torch.ones(2)), ("empty", {}), ("words", {"a": "b"})):
        torch.save(content, tmp_path / f"{name}.pth")
        assert "is not a readable checkpoint" in refused("--model", tmp_path / f"{name}.pth", "--steps", 0,
                                                         "--out", tmp_path / "o")
    common.write(tmp_path / "config.json", [1])
    with pytest.raises(common.InputError, match="holds no JSON object"):
        common.read_object(tmp_path / "config.json")


def test_names_that_a_terminal_cannot_print(tmp_path, images):
    os.rename(os.fsencode(images / "03.png"), os.fsencode(images) + b"/caf\xe9.png")
    (images / "猫.jpg").write_text("not an image")
    (images / "04.png").rename(images / "café.png")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "reca_harmon.py", *INFER, "--reconstruct", images, "--out", tmp_path / "o"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-500:]
    assert r"skipped: \u732b.jpg" in result.stdout and "9 images reconstructed" in result.stdout
    assert b"caf\xe9.png" in os.listdir(os.fsencode(tmp_path / "o"))


def test_names_of_250_bytes(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a" * 246 + ".png", "b" * 251 + ".jpg"[:4], "猫" * 83 + ".png", "c" * 250 + ".gif", "c" * 250 + ".png"):
        Image.new("RGB", (40, 40), "red").save(folder / name)
    run(*INFER, "--reconstruct", folder, "--out", tmp_path / "o")
    made = [path.name for path in (tmp_path / "o").glob("*.png")]
    assert len(made) == 6 and {"a" * 246 + ".png", "b" * 251 + ".png", "猫" * 83 + ".png"} <= set(made)
    pack(tmp_path / "long.tar", [("x" * 300 + ".png", png("red"))])
    run(*INFER, "--reconstruct", tmp_path / "long.tar", "--out", tmp_path / "p")
    assert len(list((tmp_path / "p").glob("xxx*.png"))) == 1


def test_an_out_or_a_cache_that_is_a_file(tmp_path, images):
    (tmp_path / "o").write_text("mine")
    for out in ("o", "o/deeper"):
        assert f"{tmp_path / 'o'} is a file" in refused(*TINY, "--steps", 1, "--out", tmp_path / out)
    line = refused(*TINY, "--data", images, "--steps", 1, "--cache", tmp_path / "o", "--out", tmp_path / "x")
    assert "is a file" in line and (tmp_path / "o").read_text() == "mine"


# ---- bounds on what is made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 50000), (50000, 4), (800, 20000), (9000, 9000)])
def test_no_step_makes_more_than_a_large_image(size):
    """In a process of its own, whose peak of memory is what these three needed."""
    code = (f"import resource, common, reca_harmon, reca_showo\nfrom PIL import Image\nimage = Image.new('RGB', {size}, 'red')\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\nbefore = peak()\n"
            "for make in (reca_harmon.pad_square, reca_harmon.stretch_square, reca_showo.short_side_square, common.random_square):\n"
            "    assert make(image, 512).size == (512, 512)\nprint(peak() - before)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and int(result.stdout) < 500, result                      # megabytes


def test_ordinary_images_are_prepared_as_ever():
    """Also a screenshot of 400 x 4000: what the bounds are for is longer. (Right: the original's own steps.)"""
    for width, height in ((60, 20), (97, 333), (400, 4000)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
        side, scale = max(image.size), 64 / min(image.size)
        square = Image.new("RGB", (side, side), (127,) * 3)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        small = image.resize((int(width * scale), int(height * scale)))
        left, top = (small.width - 64) // 2, (small.height - 64) // 2
        for made, right in ((reca_harmon.pad_square(image, 64), square.resize((64, 64))),
                            (reca_harmon.stretch_square(image, 64), image.resize((side, side)).resize((64, 64))),
                            (reca_showo.short_side_square(image, 64), small.crop((left, top, left + 64, top + 64)))):
            assert np.array_equal(np.asarray(made), np.asarray(right))


@pytest.mark.parametrize("script", ["harmon", "showo", "openuni", "bagel"])
def test_every_model_prepares_a_strip_within_bounds(script):
    code = (f"import resource, reca_{script} as script\nfrom PIL import Image\n"
            f"model = script.{dict(harmon='Harmon', showo='Showo', openuni='OpenUni', bagel='Bagel')[script]}"
            ".from_pretrained('tiny')\n"
            "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\nbefore = peak()\n"
            "for size in ((4, 50000), (50000, 4), (1, 60000)):\n    for task in ('recon', 'i2t', 't2i', 'edit'):\n"
            "        sample = model.preprocess(Image.new('RGB', size), task)\n"
            "        assert all(max(x.shape[1:]) <= 64 for x in sample.values()), (size, task)\nprint(peak() - before)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and int(result.stdout) < 400, result


# ---- what is found in a folder -----------------------------------------------------------------------------------------


def test_a_run_says_what_it_found_and_left_out(tmp_path, images, capsys):
    (images / "__MACOSX").mkdir()
    for k in range(110):
        (images / "__MACOSX" / f"._{k:03d}.png").write_bytes(b"\0\5\x16\7")
    (images / "._00.png").write_bytes(b"\0\5\x16\7")
    for k in range(5):
        Image.new("RGB", (40, 40), (k, 0, 0)).save(images / f"{k}.gif")
        Image.new("RGB", (40, 40), (k, 0, 0)).save(images / f"{k}.tif")
    (images / "a.heic").write_text("x")
    (images / "README").write_text("x")
    pack(images / "s.tar", [("t.png", png("red")), ("t.txt", b"x")])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (40, 40)).save(elsewhere / "linked.PNG")
    (images / "link").symlink_to(elsewhere)
    (images / "loop").symlink_to(images)
    rows = common.image_examples(images, tmp_path / "o")
    assert len(rows) == 9 + 5 + 5 + 1 + 1 and any(name == "link/linked.PNG" for name, *_ in rows)
    found, left = capsys.readouterr().out.strip().split("; left out: ")
    assert found == f"{images}: 21 images (11 .png, 5 .gif, 5 .tif), 1 of them in 1 .tar"
    assert set(left.split(", ")) == {"111 macOS notes (._*)", "1 .heic", "1 without a suffix", "1 .txt"}
    common.remove(images)
    images.mkdir()
    (images / "a.heic").write_text("x")
    with pytest.raises(common.InputError, match="no image .* left out: 1 .heic"):
        common.image_examples(images)


def test_a_run_is_not_trained_on_its_own_pictures(tmp_path, images, monkeypatch):
    monkeypatch.chdir(images)
    training(".", "out/x", "--steps", 1)
    training(".", ".", "--steps", 1)
    assert Path("previews/step_000001.png").exists() and Path("out/x/previews/step_000001.png").exists()
    nine = [f"{k:02d}.png" for k in range(9)]
    assert [name for name, *_ in common.image_examples(".", ".")] == nine
    for name in ("kept.png", *common.RUN_PICTURES):
        Image.new("RGB", (40, 40)).save(f"out/x/{name}")
    assert [name for name, *_ in common.image_examples(".", "out/x")] == nine
    assert [name for name, *_ in common.image_examples(".", "elsewhere")] == [*nine, "out/x/kept.png"]
    monkeypatch.chdir("out")
    assert [name for name, *_ in common.image_examples("x", "x")] == ["kept.png"]        # asked for by name: not left out


def test_the_first_readable_image_is_found_wherever_it_is(tmp_path, capsys):
    for k in range(1100):
        (tmp_path / f"{k:04d}.png").write_text("not an image")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "z.png")
    rows = common.image_examples(tmp_path)
    assert [image.size for image in common.preview_images(rows, 32)] == [(40, 40)]
    stream = common.Stream("recon", rows, lambda *_: {}, 0, common.templates())
    assert stream[0]["name"] == stream[700]["name"] == "z.png"
    (tmp_path / "z.png").unlink()
    with pytest.raises(common.InputError, match="none of the 1100 images could be read; the first: 0000.png"):
        common.preview_images(common.image_examples(tmp_path), 32)


# ---- roles -------------------------------------------------------------------------------------------------------------


def test_roles_are_read_and_what_cannot_be_paired_is_counted(tmp_path, capsys):
    def turn(who, text):
        return {"from": who, "value": text}
    q, a = turn("human", "<image>\nWhat?"), turn("gpt", "Noise.")
    talks = [[turn("gpt", "Hello."), q, a], [turn("system", "Be brief."), q, a], [q, q, a], [q, a, q],
             [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Noise."}],
             [q, turn("function", "f()"), a]]
    common.write(tmp_path / "l.json", [{"image": "a.png", "conversations": talk} for talk in talks])
    rows = common.conversation_examples(tmp_path / "l.json", None)
    assert [row[2] for row in rows] == [[("What?", "Noise.")]] * 6
    assert capsys.readouterr().out.strip().endswith("6 conversations; left out: 5 turns without a counterpart")
    common.write(tmp_path / "m.json", [{"conversations": [a, q]}, {"image": ["a.png", "b.png"], "conversations": [q, a]},
                                       {"image": ["a.png"], "conversations": [q, a]}])
    rows = common.conversation_examples(tmp_path / "m.json", tmp_path)
    assert [(name, source) for name, source, _ in rows] == [("a.png", tmp_path / "a.png")]
    assert "1 rows without a question and its answer, 1 rows with several images" in capsys.readouterr().out
    common.write(tmp_path / "n.json", [{"conversations": [a, q]}])
    with pytest.raises(common.InputError, match="no conversation of a human and gpt"):
        common.conversation_examples(tmp_path / "n.json", None)
    common.write(tmp_path / "o.json", [{"conversations": [{"value": "no role"}]}])
    with pytest.raises(common.InputError, match="row 1 is not a LLaVA conversation"):
        common.conversation_examples(tmp_path / "o.json", None)


# ---- the user's surroundings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment, count", [
    ({}, 1), ({"WORLD_SIZE": ""}, 1), ({"WORLD_SIZE": "1"}, 1), ({"WORLD_SIZE": "4"}, "RANK, LOCAL_RANK"),
    ({"WORLD_SIZE": "four"}, "unset WORLD_SIZE"), ({"WORLD_SIZE": "0"}, "unset WORLD_SIZE"),
    ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 4)])
def test_a_world_size_without_torchrun(monkeypatch, images, environment, count):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(count, int):
        assert common.launched_ranks() == count
    else:
        assert count in refused("--model", "tiny", "--data", images)


@pytest.mark.parametrize("script", ["harmon", "showo", "openuni", "bagel"])
def test_help_on_a_windows_code_page(script):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, str(ROOT / f"reca_{script}.py"), "--help"], capture_output=True,
                            env=environment)
    assert result.returncode == 0 and b"--lambda-recon" in result.stdout, result.stderr[-300:]


def test_an_impossible_blur_is_found_at_once():
    import reca_bagel
    import reca_openuni
    import reca_showo
    for model_class, most in ((reca_harmon.Harmon, 16), (reca_openuni.OpenUni, 16), (reca_showo.Showo, 32),
                              (reca_bagel.Bagel, 16)):
        model = model_class.from_pretrained("tiny")
        model.set_und(blur=most)
        with pytest.raises(common.InputError, match=f"--blur {most + 1}: at most {most}"):
            model.set_und(blur=most + 1)
    model.set_und(blur=16)
    assert model.preprocess(Image.new("RGB", (400, 50)), "recon")["vit"].shape == (3, 8, 32)         # 8 // 2 < 16


def test_markers_in_the_users_words_are_words():
    import reca_bagel
    import reca_openuni
    import reca_showo
    images = [Image.new("RGB", (40, 40), "red")]
    for model_class, markers in ((reca_harmon.Harmon, reca_harmon.MARKERS), (reca_openuni.OpenUni, reca_openuni.MARKERS),
                                 (reca_showo.Showo, reca_showo.MARKERS), (reca_bagel.Bagel, reca_bagel.MARKERS)):
        model = model_class.from_pretrained("tiny")
        ids = [model.tokenizer.convert_tokens_to_ids(marker) for marker in markers]
        question = f"red {' '.join(markers)} ?"
        assert len(model.describe(images, question=question, max_new_tokens=1)) == 1
        if hasattr(model, "i2t_prompt"):
            once, twice = (model.i2t_prompt(text) for text in ("red ?", question))
            assert all(once.count(i) == twice.count(i) for i in ids)
        model.generate([question], num_steps=2)


# ---- going on with a run -----------------------------------------------------------------------------------------------


def log_of(out):
    return common.read_json(out / "log.jsonl", lines=True)


def test_resume_and_out_alone_go_on_to_the_same_numbers(tmp_path, images):
    flags = ["--steps", 6, "--accum", 2, "--save-every", 2, "--weight-decay", 0.1, "--lr", 1e-3]
    training(images, tmp_path / "whole", *flags)
    training(images, tmp_path / "o", *flags)
    for step in (4, 6):
        common.remove(tmp_path / "o" / f"checkpoint-{step:06d}")
    assert checkpoints(tmp_path / "o") == []
    training(images, tmp_path / "p", *flags[:1], 2, *flags[2:])
    record = tmp_path / "p" / "run.json"
    record.write_text(record.read_text().replace('"steps": 2', '"steps": 6'))     # as if a signal had stopped it at step 2
    run("--resume", "--out", tmp_path / "p")
    whole, parts = ((tmp_path / out / "checkpoint-000006/harmon_tiny.pth").read_bytes() for out in ("whole", "p"))
    assert whole == parts
    history = json.loads(record.read_text())["history"]
    assert len(history) == 1 and history[0]["arguments"]["resume"] is False


def test_what_a_resume_changes_counts_and_is_said(tmp_path, images, capsys):
    out = tmp_path / "o"
    training(images, out, "--steps", 4, "--accum", 2, "--warmup", 4, "--lr", 1e-3)
    assert [row["lr"] for row in log_of(out) if "lr" in row] == pytest.approx([0.25e-3, 0.5e-3])
    (tmp_path / "e").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "e" / "other.png")
    capsys.readouterr()
    flags = ["--lr", 2e-3, "--weight-decay", 0.25, "--accum", 1, "--steps", 6, "--data", tmp_path / "e", "--micro-batch", 1]
    run("--resume", "--out", out, *flags)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from here on: "))
    for change in ("--lr 0.002 instead of 0.001", "--accum 1 instead of 2", "--steps 6 instead of 4",
                   "--weight-decay 0.25 instead of", f"--data {tmp_path / 'e'} instead of {images}", "--micro-batch 1"):
        assert change in line
    # Two updates were made before: the warm-up goes on with the third, at the new peak.
    assert [row["lr"] for row in log_of(out)[4:]] == pytest.approx([1.5e-3, 2e-3])
    state = torch.load(out / "checkpoint-000006" / "trainer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["optimizer"]["param_groups"]} == {0.25, 0.0}
    run("--resume", "--out", out, "--steps", 7)
    arguments = json.loads((out / "run.json").read_text())["arguments"]
    assert (arguments["lr"], arguments["accum"], arguments["steps"]) == (2e-3, 1, 7)


def test_what_a_resume_cannot_change_is_refused(tmp_path, images):
    out = tmp_path / "o"
    training(images, out, "--steps", 2)
    again = ["--resume", "--out", out, "--steps", 3]
    assert "--model harmon-0.5b: the run in" in refused(*again, "--model", "harmon-0.5b")
    assert "--seed 5: the run in" in refused(*again, "--seed", 5)
    assert "leave it out" in refused(*again, "--self-captions", 5)
    record = json.loads((out / "run.json").read_text())
    common.write(out / "run.json", {**record, "script": "reca_showo"})
    assert "is a run of reca_showo.py" in refused(*again)
    common.write(out / "run.json", record)
    run(*INFER, "--reconstruct", images, "--out", out)                    # inference into the run's folder is no new run
    run(*again)
    assert checkpoints(out)[-1] == "checkpoint-000003"
    history = json.loads((out / "run.json").read_text())["history"]
    assert [entry["arguments"]["steps"] for entry in history] == [2, 0]


# ---- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--clip -1", "-1 is no number from 0 on"), ("--clip inf", "inf is no number"), ("--lr=-1e-3", "no number"),
    ("--lr nan", "no number"), ("--weight-decay -0.1", "no number"), ("--lambda-recon -1", "no number"),
    ("--lambda-i2t inf", "no number"), ("--lambda-t2i -0.5", "no number"), ("--seed -1", "-1 is less than 0"),
    ("--seed 99999999999999999999", "is more than"),
    ("--guidance-scale nan", "no number"), ("--workers 100000", "is more than 256"),
    ("--images 1000000000", "is more than"), ("--sampling-steps 0", "is less than 1"),
    ("--lambda-recon 0 --lambda-i2t 0", "all three λ are 0"), ("--lr one", "invalid"),
    ("--bench --lambda-recon 0 --lambda-i2t 0", "all three λ are 0")])
def test_numbers_out_of_their_range(tmp_path, images, flags, message):
    line = refused("--model", "tiny", "--data", images, "--out", tmp_path / "o", *flags.split())
    assert message in line and not (tmp_path / "o").exists()


def test_the_ends_of_the_ranges_are_in_them(tmp_path, images):
    training(images, tmp_path / "o", "--steps", 1, "--clip", 0, "--weight-decay", 0, "--warmup", 0, "--lr", 0,
             "--seed", 2 ** 63 - 1)
    assert checkpoints(tmp_path / "o") == ["checkpoint-000001"]


def test_no_checkpoint_is_promised_where_there_is_none(tmp_path, images):
    flags = [*TINY, "--data", images, "--lambda-i2t", 0, "--accum", 1, "--steps", 9, "--lr", 1e30, "--warmup", 0]
    line = refused(*flags, "--out", tmp_path / "o")
    assert "no checkpoint had been written yet" in line and "is kept" not in line


# ---- paths -------------------------------------------------------------------------------------------------------------


def test_the_home_folder_is_found_in_every_flag(tmp_path, images, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("red circle\n")
    common.write(tmp_path / "l.json", [{"image": "00.png", "conversations": [{"from": "human", "value": "What?"},
                                                                             {"from": "gpt", "value": "Red."}]}])
    common.write(images / "c.jsonl", [{"image": "00.png", "caption": "red"}])
    run(*TINY, "--steps", 1, "--accum", 1, "--data=~/d", "--out=~/o", "--i2t-data=~/l.json", "--i2t-images=~/d",
        "--captions=~/d/c.jsonl", "--cache=~/cache", "--generate=~/p.txt", "--reconstruct=~/d")
    assert checkpoints(tmp_path / "o") == ["checkpoint-000001"] and (tmp_path / "cache").is_dir()
    assert (tmp_path / "o" / "00000.png").exists() and (tmp_path / "o" / "00.png").exists()
    run("--steps", 0, "--model=~/o", "--describe=~/d", "--out=~/said", "--max-new-tokens", 2, "--precision", "fp32")
    assert len(common.read_json(tmp_path / "said" / "answers.jsonl", lines=True)) == 9
