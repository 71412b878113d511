"""The command line end to end, on reca_harmon.py --model tiny and on images that the tests write: training, resume,
ranks, errors."""
import argparse
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import reca_harmon

ROOT = Path(__file__).parent.parent
TINY = ("--model tiny --batch 2 --self-captions 4 --max-new-tokens 4 --sampling-steps 2 "
        "--precision fp32").split()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Bit for bit holds for one number of threads: sums are split by it. The variable is for subprocesses."""
    os.environ["OMP_NUM_THREADS"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for k in range(9):
        picture = common.draw_scene(common.random_scene(np.random.default_rng(k)), 48)
        picture.resize((48 + 8 * (k % 3), 48)).save(folder / f"{k}.png")
    (folder / "broken.jpg").write_text("not an image")
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


def wait_for_steps(process, out, count):
    """Until the run in `out` has logged `count` steps."""
    path = out / "log.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= count):
        time.sleep(0.002)


def command(*arguments):
    return [sys.executable, str(ROOT / "reca_harmon.py"), *map(str, arguments)]


def log(out):
    return common.read_json(out / "log.jsonl", lines=True)


def weights(out, step):
    return (out / f"checkpoint-{step:06d}" / "harmon_tiny.pth").read_bytes()


def test_the_embedded_default_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    run(*TINY, "--steps", 3, "--sample-every", 2, "--out", out)
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"before", "after"}
    assert set(scores["after"]) == {"reconstruction", "understanding", "single_object", "two_object", "colors",
                                    "position", "color_attribution", "overall"}
    rows = log(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all({"loss", "recon", "i2t", "lr", "grad_norm", "images_per_s"} <= row.keys() for row in rows)
    assert all(row["loss"] == pytest.approx(row["recon"] + row["i2t"]) for row in rows)
    assert Image.open(out / "loss.png").size == (900, 420)
    assert {p.name for p in (out / "previews").glob("step_*.png")} == {"step_000002.png", "step_000003.png"}
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["steps"] == 3 and record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "This is our addition" in printed and "color_attribution" in printed
    said = common.read_json(out / "i2t_self.jsonl", lines=True)
    assert len(said) <= 4
    assert not list(out.rglob(".tmp*"))


def test_real_images_then_inference_on_the_checkpoint(tmp_path, images, capsys):
    out = tmp_path / "out"
    run(*TINY, "--data", images, "--steps", 6, "--lambda-i2t", 0, "--out", out, "--workers", 1,
        "--cache", tmp_path / "cache")
    rows = log(out)
    assert len(rows) == 6 and not any("i2t" in row for row in rows)
    assert [s.split(" (")[0] for row in rows for s in row["skipped"]] == ["broken.jpg"]
    assert "1 unreadable images were skipped" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 9
    assert not (out / "scores.json").exists()

    checkpoint, prompts = out / "checkpoint-000006", tmp_path / "prompts.jsonl"
    prompts.write_text('{"tag": "colors", "prompt": "red circle"}\n{"tag": "colors", "prompt": "blue square"}\n')
    made = tmp_path / "made"
    infer = ["--model", checkpoint, "--steps", 0, "--sampling-steps", 2, "--precision", "fp32"]
    run(*infer, "--generate", prompts, "--images", 2, "--out", made)
    files = sorted(made.rglob("*.png"))
    assert files == [made / f"0000{prompt}/samples/0000{k}.png" for prompt in range(2) for k in range(2)]
    assert json.loads((made / "00001" / "metadata.jsonl").read_text())["prompt"] == "blue square"
    kept = [f.read_bytes() for f in files]
    files[2].unlink()
    run(*infer, "--generate", prompts, "--images", 2, "--out", made)
    assert "1 images generated" in capsys.readouterr().out
    assert [f.read_bytes() for f in files] == kept                            # alone in its batch: the same image again

    grids = tmp_path / "dpg"
    grids.mkdir()
    (grids / "COCOval1.txt").write_text("a red circle and a blue square")
    run(*infer, "--generate", grids, "--out", tmp_path / "grids")
    assert Image.open(tmp_path / "grids" / "COCOval1.png").size == (64, 64)

    run(*infer, "--reconstruct", images, "--out", tmp_path / "again")
    assert len(list((tmp_path / "again").glob("[0-9].png"))) == 9
    assert (tmp_path / "again" / "reconstructions.png").exists()

    run(*infer, "--describe", images, "--out", tmp_path / "said", "--max-new-tokens", 3)
    answers = common.read_json(tmp_path / "said" / "answers.jsonl", lines=True)
    assert len(answers) == 9 and all({"question_id", "image", "question", "answer"} <= row.keys() for row in answers)
    with open(tmp_path / "said" / "answers.jsonl", "a") as file:
        file.write('{"question_id": "half')
    run(*infer, "--describe", images, "--out", tmp_path / "said", "--max-new-tokens", 3)
    assert common.read_json(tmp_path / "said" / "answers.jsonl", lines=True) == answers


def test_i2t_data_and_captions(tmp_path, images):
    def turns(question, answer):
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    llava = [{"image": f"{k}.png", **turns("<image>\nDescribe the image.", "red circle")} for k in range(4)]
    common.write(tmp_path / "llava.json", [*llava, turns("red ?", "blue")])
    captions = images / "captions.jsonl"
    common.write(captions, [{"image": f"{k}.png", "caption": "red circle"} for k in range(4)])
    run(*TINY, "--data", images, "--steps", 3, "--i2t-data", tmp_path / "llava.json", "--i2t-images", images,
        "--captions", captions, "--out", tmp_path / "mixed")
    assert all({"recon", "i2t", "t2i"} <= row.keys() for row in log(tmp_path / "mixed"))
    run(*TINY, "--data", images, "--steps", 2, "--lambda-recon", 0, "--lambda-i2t", 0, "--captions", captions,
        "--out", tmp_path / "sft")
    assert all("t2i" in row and "recon" not in row for row in log(tmp_path / "sft"))


def test_resume_after_sigkill_equals_the_uninterrupted_run(tmp_path, images):
    flags = [*TINY, "--data", images, "--steps", 8, "--accum", 2, "--save-every", 2, "--sample-every", 100,
             "--workers", 0]
    run(*flags, "--out", tmp_path / "whole")
    broken = tmp_path / "broken"
    process = subprocess.Popen(command(*flags, "--out", broken), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps(process, broken, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(broken.glob("checkpoint-*"))
    assert kept and not (broken / "checkpoint-000008").exists()                       # it was killed on the way
    with open(broken / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')                                                # what a kill can leave
    run(*flags, "--out", broken, "--resume")
    assert weights(broken, 8) == weights(tmp_path / "whole", 8)                        # bit for bit
    again, whole = ([(row["step"], row["loss"]) for row in log(out)] for out in (broken, tmp_path / "whole"))
    assert again == whole and [step for step, _ in again] == list(range(1, 9))
    assert len(list(broken.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_cleanly(tmp_path, images, number):
    flags = [*TINY, "--data", images, "--accum", 2, "--lambda-i2t", 0, "--sample-every", 10000, "--workers", 0]
    process = subprocess.Popen(command(*flags, "--steps", 100000, "--out", tmp_path / "o"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(process, tmp_path / "o", 3)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and f"stopped by {number.name}" in output, error
    checkpoint = next((tmp_path / "o").glob("checkpoint-*"))
    step = int(checkpoint.name.split("-")[1])
    assert step >= 2 and step % 2 == 0                                               # where the weights moved last
    run(*flags, "--steps", step + 2, "--out", tmp_path / "o", "--resume")
    run(*flags, "--steps", step + 2, "--out", tmp_path / "whole")
    assert weights(tmp_path / "o", step + 2) == weights(tmp_path / "whole", step + 2)


def test_two_gloo_processes_equal_one(tmp_path, images, batch=5, micro_batch=1):
    """The same steps, where neither the processes nor the micro-batches divide their images."""
    flags = [*TINY, "--data", images, "--steps", 3, "--accum", 1, "--sample-every", 100, "--workers", 0, "--batch", batch]
    run(*flags, "--out", tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", str(29500 + os.getpid() % 400)]
    flags += ["--micro-batch", micro_batch]
    result = subprocess.run([*launcher, *command(*flags, "--out", tmp_path / "two")[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for a, b in zip(one, two):
        assert a["recon"] == pytest.approx(b["recon"], rel=1e-5) and a["i2t"] == pytest.approx(b["i2t"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    states = [common.load_state(tmp_path / o / "checkpoint-000003" / "harmon_tiny.pth") for o in ("one", "two")]
    start = common.load_state(ROOT / "tiny" / "harmon" / "harmon_tiny.pth")
    moved = sum((states[0][k] - start[k]).square().sum() for k in start).sqrt()
    apart = sum((states[0][k] - states[1][k]).square().sum() for k in start).sqrt()
    assert moved > 0 and apart < 0.02 * moved


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, images):
    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))        # every larger file fails, like a full disk
    run(*TINY, "--data", images, "--steps", 1, "--lambda-i2t", 0, "--out", tmp_path / "first")
    result = subprocess.run(command(*TINY, "--data", images, "--steps", 2, "--lambda-i2t", 0, "--out", tmp_path / "o"),
                            capture_output=True, text=True, preexec_fn=small_files, timeout=100)
    assert result.returncode == 2, result.stderr[-500:]
    assert result.stderr.splitlines()[-1].startswith("error: cannot write")
    assert not list((tmp_path / "o").glob("checkpoint-*")) and not list((tmp_path / "o").rglob(".tmp*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, images):
    with pytest.raises(common.InputError, match=r"at step \d+.*(\d\.png|not finite).*last good checkpoint") as error:
        run(*TINY, "--data", images, "--steps", 30, "--lambda-i2t", 0, "--save-every", 1, "--lr", 1e30, "--warmup", 0,
            "--out", tmp_path / "o")
    assert "\n" not in str(error.value)
    for path in (tmp_path / "o").glob("checkpoint-*/harmon_tiny.pth"):
        assert all(torch.isfinite(v).all() for v in common.load_state(path).values())


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nothing"], "no such folder or .tar file: nothing"),
    (["--data", "empty"], "no image"),
    ([], "--data is missing"),
    (["--data", "images", "--model", "nobody/nothing"], "cannot get nobody/nothing from the Hugging Face hub"),
    (["--data", "images", "--model", "./nothing"], "no such model: ./nothing"),
    (["--data", "images", "--model", "huge"], "no such model: huge"),
    (["--data", "images", "--i2t-data", "bad.json"], "line 1 is not JSON"),
    (["--data", "images", "--captions", "bad.jsonl"], "line 2 is not JSON"),
    (["--data", "images", "--lambda-t2i", "1"], "--lambda-t2i needs --captions"),
    (["--data", "images", "--batch", "0"], "argument --batch: 0 is less than 1"),
    (["--data", "images", "--nonsense"], "unrecognized arguments: --nonsense"),
    (["--data", "images", "--resume"], "nothing to resume"),
    (["--model", "tiny", "--steps", "0", "--generate", "nothing.txt"], "no such prompt file"),
    (["--model", "cut", "--data", "images"], "is not a readable checkpoint"),
    (["--data", "images", "--steps", "1"], "--steps 1 is less than --accum 4"),
    (["--data", "images", "--micro-batch", "0"], "argument --micro-batch: 0 is less than 1"),
    (["--data", "images", "--optimizer", "bf16", "--precision", "fp32"], "--optimizer bf16 needs --precision bf16"),
    # What is asked for after the training is looked at before it, and before anything is downloaded.
    (["--model", "nobody/nothing", "--data", "images", "--generate", "nothing.txt"], "no such prompt file"),
    (["--model", "nobody/nothing", "--data", "images", "--reconstruct", "empty"], "no image"),
    (["--model", "nobody/nothing", "--data", "images", "--describe", "nothing"], "no such folder or question file"),
])
def test_bad_input_gets_one_line(tmp_path, monkeypatch, images, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "harmon_1.5b.pth").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "images").symlink_to(images)
    (tmp_path / "bad.json").write_text("[{]")
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png", "caption": "x"}\n{')
    with pytest.raises(common.InputError) as error:
        run(*arguments, "--out", tmp_path / "o")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").glob("checkpoint-*"))


def test_exit_code_2_and_one_line_from_the_shell():
    result = subprocess.run(command("--data", "/nothing"), capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr == "error: no such folder or .tar file: /nothing\n"


def test_descriptions_belong_to_their_run(tmp_path, images):
    """Kept for --resume even where fewer could be made than asked for (RecA has changed the model since); made anew by
    a new run."""
    flags = [*TINY, "--data", images, "--sample-every", 100, "--workers", 0, "--accum", 1, "--self-captions", 9,
             "--out", tmp_path / "o"]
    run(*flags, "--steps", 1)
    said = tmp_path / "o" / "i2t_self.jsonl"
    said.write_text(json.dumps({"name": "0.png", "question": "What?", "answer": "red circle"}) + "\n")
    run(*flags, "--steps", 2, "--resume")
    assert len(common.read_json(said, lines=True)) == 1
    run(*flags, "--steps", 1)
    assert not any(row["question"] == "What?" for row in common.read_json(said, lines=True))


def test_the_end_in_the_middle_of_an_accumulation_loses_nothing(tmp_path, images):
    flags = [*TINY, "--data", images, "--lambda-i2t", 0, "--sample-every", 100, "--workers", 0, "--accum", 2]
    run(*flags, "--steps", 3, "--out", tmp_path / "o")                                # the third step moved nothing yet
    assert [p.name for p in (tmp_path / "o").glob("checkpoint-*")] == ["checkpoint-000002"]
    run(*flags, "--steps", 4, "--out", tmp_path / "o", "--resume")
    run(*flags, "--steps", 4, "--out", tmp_path / "whole")
    assert weights(tmp_path / "o", 4) == weights(tmp_path / "whole", 4)


def test_ctrl_c_works_again_after_training(tmp_path, images):
    before = signal.getsignal(signal.SIGINT)
    flags = [*TINY, "--data", images, "--steps", 2, "--accum", 1, "--lambda-i2t", 0, "--out", tmp_path / "o"]
    sys.argv, argv = ["reca_harmon.py", *map(str, flags)], sys.argv
    try:
        reca_harmon.main()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, before)


def test_what_a_kill_left_is_removed(tmp_path, images):
    (tmp_path / "o" / ".tmp-1-checkpoint-000001").mkdir(parents=True)
    run(*TINY, "--data", images, "--steps", 2, "--lambda-i2t", 0, "--out", tmp_path / "o")
    assert not list((tmp_path / "o").glob(".tmp-*"))


def test_outputs_are_what_eval_reads(tmp_path, images, capsys):
    """--generate, --reconstruct and --describe write what eval.py's sub-commands expect; one of them is started from
    the shell."""
    import eval as scorer
    common.draw_scene([(0, 0, 0)], 32).save(tmp_path / "a.png")
    infer = [*TINY, "--steps", 0]
    questions = [{"question_id": k, "image": "a.png", "text": f"red {word} ?", "category": "random"}
                 for k, word in enumerate(("circle", "square"))]
    common.write(tmp_path / "llava_pope_test.jsonl", questions)
    (tmp_path / "coco_pope_random.json").write_text(
        "".join(json.dumps({"image": row["image"], "text": row["text"], "label": "yes"}) + "\n" for row in questions))
    (tmp_path / "shapes.txt").write_text("red circle top-left\nblue square top-right\n")

    def score(*arguments):
        sys.argv, argv = ["eval.py", *map(str, arguments)], sys.argv
        try:
            scorer.main()
        finally:
            sys.argv = argv

    run(*infer, "--generate", tmp_path / "shapes.txt", "--out", tmp_path / "made")
    score("shapes", tmp_path / "made", "--prompts", tmp_path / "shapes.txt", "--strict")
    run(*infer, "--reconstruct", images, "--out", tmp_path / "again")
    (tmp_path / "again" / "reconstructions.png").unlink()
    recon = [sys.executable, ROOT / "eval.py", "recon", tmp_path / "again", "--sources", images, "--clip", "none"]
    result = subprocess.run(recon, capture_output=True, text=True)
    assert result.returncode == 0 and "PSNR" in result.stdout, result.stderr
    score("pope", "--questions", tmp_path / "llava_pope_test.jsonl", "--prepare", tmp_path / "pope.jsonl")
    run(*infer, "--describe", tmp_path / "pope.jsonl", "--i2t-images", tmp_path, "--out", tmp_path / "said")
    score("pope", tmp_path / "said" / "answers.jsonl", "--questions", tmp_path / "llava_pope_test.jsonl",
          "--labels", tmp_path, "--strict")
    assert "POPE" in capsys.readouterr().out.upper()


def test_painting_halves_its_batch_where_memory_is_short(tmp_path, images, monkeypatch, capsys):
    """A GPU that holds three images at once, for each way of inference: the batch is halved once, the rest goes on with
    the smaller one, and everything is made. A GPU that holds none is an error."""
    room = 3
    sizes = []

    def short_of_memory(method):
        def call(self, rows, *arguments, **options):
            sizes.append(len(rows))
            if len(rows) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return method(self, rows, *arguments, **options)
        return call

    for name in ("generate", "reconstruct", "describe"):
        monkeypatch.setattr(reca_harmon.Harmon, name, short_of_memory(getattr(reca_harmon.Harmon, name)))
    (tmp_path / "prompts.txt").write_text("red circle\n" * 5)
    inference = [*TINY, "--steps", 0, "--out", tmp_path / "out", "--batch-images", 5]
    run(*inference, "--generate", tmp_path / "prompts.txt", "--reconstruct", images, "--describe", images)
    # Five prompts do not fit, then come twos. The images come in twos at once.
    assert sizes[:4] == [5, 2, 2, 1]
    assert max(sizes[1:]) == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == 5 + 9 + 1                 # and the overview
    assert len(common.read_json(tmp_path / "out" / "answers.jsonl", lines=True)) == 9
    assert "out of memory with 5 at once: from now on 2" in capsys.readouterr().out

    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        run(*TINY, "--steps", 0, "--out", tmp_path / "none", "--generate", tmp_path / "prompts.txt")


def test_a_tar_is_described_and_reconstructed_within_out(tmp_path):
    picture = io.BytesIO()
    common.draw_scene([(0, 0, 0)], 32).save(picture, "PNG")

    def pack(folder, name):
        folder.mkdir()
        with tarfile.open(folder / "x.tar", "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(picture.getvalue())
            archive.addfile(info, io.BytesIO(picture.getvalue()))
        return folder
    run(*TINY, "--steps", 0, "--describe", pack(tmp_path / "good", "a/0.png"), "--out", tmp_path / "said")
    assert common.read_json(tmp_path / "said" / "answers.jsonl", lines=True)[0]["question_id"] == "a/0.png"
    with pytest.raises(common.InputError, match="leads out of"):
        run(*TINY, "--steps", 0, "--reconstruct", pack(tmp_path / "evil", "../../evil.png"),
            "--out", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.png"))


def test_a_run_is_not_overwritten_by_accident(tmp_path, images):
    (tmp_path / "o" / "checkpoint-000001").mkdir(parents=True)
    (tmp_path / "o" / "checkpoint-000001" / "trainer.pt").touch()
    with pytest.raises(common.InputError, match="holds a run already"):
        run("--model", "nobody/nothing", "--data", images, "--out", tmp_path / "o")


def test_bench_checkpointing_and_compile_flags(capsys):
    run("--model", "tiny", "--bench", "--batch", 2, "--checkpointing", "--precision", "fp32")
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert figures["images_per_s"] > 0 and figures["tflops_per_step"] > 0 and figures["peak_memory_gb"] > 0
    assert figures["losses"] == ["recon", "i2t"] and figures["parameters"] > figures["trainable_parameters"] > 5e5


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    for flag in ("--model --data --out --resume --steps --batch --accum --lr --warmup --weight-decay --seed "
                 "--precision --compile --checkpointing --micro-batch --optimizer --lambda-recon --lambda-i2t --lambda-t2i --i2t-data "
                 "--i2t-images --captions --und-size --blur --templates --generate --reconstruct --describe --bench "
                 "--cache").split():
        assert flag in text
    assert "Table 8" in text


@pytest.mark.parametrize("name", ("harmon", "showo", "openuni", "bagel"))
def test_every_flag_of_help_is_used(name, capsys, monkeypatch):
    """What --help lists is what parse_args returns, and the script or common.py reads each of it."""
    script = __import__(f"reca_{name}")
    monkeypatch.setattr(sys, "argv", [f"reca_{name}.py", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    flags = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE)) - {"--help"}
    text = (ROOT / "common.py").read_text() + Path(script.__file__).read_text()
    assert len(flags) > 40
    unused = [flag for flag in flags if not re.search(rf"\bargs\.{flag[2:].replace('-', '_')}\b", text)]
    assert not unused


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = reca_harmon.Harmon.random("tiny").train()
    features = model.encode([model.preprocess(common.draw_scene([(0, 1, 2)], 32), "recon")] * 2, "recon")
    draws = model.draw("recon", features, common.Rng(0, "recon", 0, positions=[0, 1]))

    def gradients():
        model.zero_grad()
        loss = model.recon_loss(features, [common.SEED_TEMPLATE] * 2, draws=draws)
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    plain = gradients()
    common.checkpoint_blocks(model, argparse.Namespace(checkpointing=True))
    again = gradients()
    assert plain[0] == again[0] and all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])
