"""docs/reproduce.md: its shell session, command by command, with tiny models and small files in place of the real ones;
docs/toy-study.md: its command lines; and the paper's Table 8 against the defaults of the scripts."""
import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny"))

import common
import eval as ev
import study
from test_eval import Judge, tiny                                                  # noqa: F401 (a fixture)

DOCS = Path(__file__).parent.parent / "docs"
REPRODUCE = (DOCS / "reproduce.md").read_text(encoding="utf-8")
STUDY = (DOCS / "toy-study.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- paper: (.*?) -->\n```bash\n(.*?)```", REPRODUCE, re.DOTALL))
SETUP = BLOCKS.pop("setup")


def commands(block):
    """What bash makes of a block, its loops and variables expanded: here `python` is a function that prints."""
    script = 'python() { echo "$*"; }\n' + SETUP + block
    return subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.splitlines()


def test_every_table_has_its_row_and_its_commands():
    """1 to 14 and F.2 in the first table; all but 8, which is the defaults, in the title of a block."""
    tables = {*map(str, range(1, 15)), "F.2"}
    section = REPRODUCE.split("## The tables")[1].split("\nTables ")[0]
    rows = re.findall(r"^\| ([\dF., ]+) \|", section, re.MULTILINE)
    titles = re.findall(r"^<!-- paper: tables? (.*) -->", REPRODUCE, re.MULTILINE)
    assert {name for row in rows for name in row.split(", ")} == tables
    assert {name for title in titles for name in title.split(", ")} == tables - {"8"}


# ---- running them ----------------------------------------------------------------------------------------------------


class Asked(Exception):
    """Carries the parsed command line of a script that was not run."""


def main(module, arguments):
    """module.main() in this process, as `python module.py arguments` would; an exit code other than 0 raises."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *arguments]
    try:
        module.main()
    finally:
        sys.argv = argv


def asked(module, arguments):
    """The command line as the script itself understands it, with the defaults of the model it names."""
    def stop(*given, **options):
        raise Asked(parse(*given, **options))
    parse, common.parse_args = common.parse_args, stop
    try:
        main(module, arguments)
    except Asked as parsed:
        return parsed.args[0]
    finally:
        common.parse_args = parse


def run_script(module, arguments, sides):
    """A training or a generation, its sizes replaced: a released model by the tiny one, the understanding input in
    proportion, few steps of few images. A checkpoint gets the number that the real run would give it, so that the
    page's next commands must name that one. sides: {folder: side of the real model's images}, extended."""
    args, small = asked(module, arguments), ["--batch", 1, "--images", 1, "--sampling-steps", 2, "--max-new-tokens", 1]
    small += ["--precision", "fp32", "--workers", 0, "--sample-every", 100]
    small += ["--steps", 2, "--accum", 1] if args.steps else []
    if Path(args.model).is_dir():
        sides[args.out] = sides[str(Path(args.model).parent)]
    else:
        model = "tiny" if getattr(module.CONFIGS[args.model], "w_clip_vit", True) else "tiny-vq"
        sides[args.out], side = module.CONFIGS[args.model].image_size, module.CONFIGS[model].image_size
        small += ["--model", model]
        small += ["--und-size", args.und_size * side // sides[args.out]] if "--und-size" in arguments else []
    assert args.images in (1, 12)                                                  # 12: see run_eval
    main(module, [*arguments, *map(str, small)])
    if args.steps and not args.bench:
        out = Path(args.out)
        rows = common.read_json(out / "log.jsonl", lines=True)
        losses = {name for name in common.LOSSES if getattr(args, f"lambda_{name}")}
        assert len(rows) == 2 and all(row.keys() & set(common.LOSSES) == losses for row in rows)
        last_update = args.steps - args.steps % args.accum
        (out / "checkpoint-000002").rename(out / f"checkpoint-{last_update:06d}")


def run_eval(arguments, models, url, sides):
    """A scorer, with tiny models and a judge on loopback: its table has a number in every cell, nothing is left out."""
    benchmark, given = arguments[0], dict(zip(arguments, arguments[1:]))
    folders = [argument for argument in arguments if argument.startswith(("gen/", "und/"))]
    small = []
    if benchmark == "geneval":
        assert given["--samples"] == "12"                                          # as many as --generate was asked for
        small = ["--samples", 1, "--detector", models / "mask2former", "--clip", models / "clip", "--device", "cpu"]
    elif benchmark in ("dpg", "wise", "compbench", "imgedit", "gedit"):
        small = ["--judge-url", url, "--judge", "stand-in"]
    if benchmark == "dpg":
        assert {sides[folder] for folder in folders} == {int(given["--grid"])}
        small += ["--grid", Image.open(next(Path(folders[0]).glob("*.png"))).width // 2]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        ev.main([*arguments, *map(str, small)])
    rows = [line for line in text.getvalue().splitlines() if line.startswith("| ")][2:]
    cells = [cell for row in rows for cell in row.split("|")[2:-1]]
    assert len(rows) == len(folders) and all(re.match(r" -?\d", cell) for cell in cells), text.getvalue()
    assert "(partial)" not in text.getvalue()


def reply(number, payload):
    """What each benchmark's parser can read; the judge texts below name theirs."""
    text = next(part["text"] for part in payload["messages"][-1]["content"] if part["type"] == "text")
    return next(answer for mark, answer in {
        "yes or no": "yes", "WISE": "Consistency: 1\nRealism: 1\nAesthetic Quality: 1", "COMPBENCH": '{"score": 50}',
        "IMGEDIT": "A: 3\nB: 3\nC: 3", "GEDIT": '{"score": [5, 5]}'}.items() if mark in text)


def write(path, content):
    """A text, the rows of a .jsonl, or what a .json shall hold."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        content = "\n".join(map(json.dumps, content))
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def pictures(folder, *names):
    for k, name in enumerate(names):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        common.draw_scene(common.random_scene(np.random.default_rng(k)), 32).save(path)


def make_data():
    """data/ and bench/ as the page describes them, in the current folder: two or three of everything."""
    for name in "midjourney midjourney-10k midjourney-50k blip3o blip3o-clean coco journeydb llava".split():
        pictures(f"data/{name}", "0.png", "1.png", "2.jpg")
    captions = [{"image": "0.png", "caption": "red circle"}, {"image": "2.jpg", "caption": "blue square top-left"}]
    for path in ("midjourney/captions", "midjourney/dense", "blip3o/captions", "blip3o-clean/captions"):
        write(f"data/{path}.jsonl", captions)
    turns = [{"from": "human", "value": "<image>\nred ?"}, {"from": "gpt", "value": "red circle"}]
    write("data/llava/llava_v1_5_mix665k.json", [{"image": "0.png", "conversations": turns}, {"conversations": turns}])
    Path("data/flux").mkdir()
    with tarfile.open("data/flux/data_000000.tar", "w") as archive:
        archive.add("data/coco/0.png", "0.png")
        archive.add("data/coco/1.png", "1.png")


def make_generation_benchmarks():
    dog, cat = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
    write("bench/geneval.jsonl", [{"tag": tag, "include": [dog, cat | {"color": "red"}], "prompt": f"{tag} circle"}
                                  for tag in ev.GENEVAL_TASKS])
    write("bench/dpg/7.txt", "red circle and blue square")
    write("bench/dpg_bench.csv", "item_id,proposition_id,dependency,tuple,question_natural_language\n"
                                 "7,1,0,entity - whole (x),Is it red?\n")
    kinds = {1: ("Cultural knowledge", "Festival"), 401: ("time", "Longitudinal time"), 501: ("Space", "Layout"),
             701: ("Biology", "State"), 801: ("Physical Knowledge", "Optics"), 901: ("Chemistry", "Salt")}
    write("bench/wise.json", [{"Prompt": "circle", "Explanation": "round", "Category": category, "Subcategory": kind,
                               "prompt_id": k} for k, (category, kind) in kinds.items()])
    write("bench/gpt_eval.py", "def f(row, prompt):\n    return f'WISE {row[\"Explanation\"]} {prompt}'\n")
    write("bench/compbench.json", [{"Question": "circle", "Category": kind, "Question_id": 1}
                                   for kind in (*ev.COMPBENCH, *ev.COMPLEX)])
    write("bench/qwen_eval.py", "def f(prompt_name):\n    return f'COMPBENCH {prompt_name}'\n")


def make_editing_benchmarks():
    write("bench/imgedit/singleturn.json", {f"{kind} 1": {"id": "0.png", "prompt": "red", "edit_type": kind}
                                            for kind in ev.IMGEDIT})
    write("bench/imgedit/judge_prompt.json", {kind: "IMGEDIT <edit_prompt>" for kind in ev.IMGEDIT})
    pictures("bench/imgedit/images", "0.png")
    edit = {"instruction": "red", "instruction_language": "en"}
    write("bench/gedit/edits.jsonl", [{"key": kind, "task_type": kind, **edit} for kind in ev.GEDIT_GROUPS])
    names = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC",
             "_prompts_0shot_rule_PQ")
    write("bench/gedit/vie_prompts.py", "".join(f'{name} = "GEDIT <instruction>"\n' for name in names))
    pictures("bench/gedit/images", *(f"{kind}.png" for kind in ev.GEDIT_GROUPS))


def make_understanding_benchmarks():
    kinds = ("random", "popular", "adversarial")
    write("bench/pope/llava_pope_test.jsonl", [{"question_id": k, "image": "a.jpg", "text": "red ?", "category": kind}
                                               for k, kind in enumerate(kinds)])
    for kind in kinds:
        write(f"bench/pope/coco_pope_{kind}.json", [{"image": "a.jpg", "text": "red ?", "label": "yes"}])
    for task in ev.MME_TASKS:
        write(f"bench/mme/{task}.txt", "a.jpg\tred ?\tYes\na.jpg\tblue ?\tNo\n")
        pictures(f"bench/mme/images/{task}", "a.jpg")
    write("bench/gqa/testdev_balanced_questions.json", {"1": {"question": "What?", "imageId": "a", "answer": "circle"}})
    question = {"question": "Which?", "answer": "A"}
    write("bench/mmmu/validation.jsonl", [{"id": "1", "options": "['red', 'blue']", "image_1": "a.jpg", **question}])
    choices = {f"choice_{letter}": letter for letter in "abcd"}
    write("bench/seed/SEED-Bench.json", {"questions": [{"question_id": 1, "data_id": "a.jpg", **choices, **question}]})
    for name in ("pope", "gqa", "mmmu", "seed"):
        pictures(f"bench/{name}/images", "a.jpg")


@pytest.fixture(scope="module")
def session(tmp_path_factory, tiny):                                               # noqa: F811
    """session(title) runs the page's blocks up to that one, in one folder, each once, as a reader would."""
    with pytest.MonkeyPatch.context() as patch, Judge(reply) as judge:
        patch.chdir(tmp_path_factory.mktemp("paper"))
        patch.setenv("no_proxy", "127.0.0.1")
        patch.delenv("OPENAI_API_KEY", raising=False)
        make_data()
        make_generation_benchmarks()
        make_editing_benchmarks()
        make_understanding_benchmarks()
        todo, sides = list(BLOCKS), {}

        def run(title):
            while title in todo:
                for command in commands(BLOCKS[todo.pop(0)]):
                    script, *arguments = command.split()
                    if script == "eval.py":
                        run_eval(arguments, tiny, judge.url, sides)
                    else:
                        run_script(importlib.import_module(script.removesuffix(".py")), arguments, sides)
        yield run


@pytest.mark.parametrize("title", BLOCKS)
def test_the_commands_run(session, title):
    session(title)


# ---- the effect, on a laptop -----------------------------------------------------------------------------------------


def test_the_study_of_the_tiny_models(tmp_path, monkeypatch):
    """The study's runs of the tiny models, five seeds of each, are command lines that the scripts understand; from
    what such runs leave, its last command makes the table, with a number in every cell, and the picture."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"<!-- study -->\n```bash\n(.*?)```", STUDY, re.DOTALL)[1]
    script = "python() { printf '%s\\t' \"$@\"; echo; }\n" + block
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    *runs, (last, *arguments) = [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]
    for k, (script, *flags) in enumerate(runs):
        args = asked(importlib.import_module(script.removesuffix(".py")), flags)
        assert args.model in ("tiny", "tiny-vq") and args.steps > 0 and f"seed{args.seed}" == Path(args.out).name
        scores = {name: k / len(runs) for name in ev.SHAPE_COLUMNS}
        write(Path(args.out) / "scores.json", {"before": scores, "after": scores})
    assert last == "eval.py"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        ev.main(arguments)
    table = [line for line in text.getvalue().splitlines() if line.startswith("| ")]
    assert all("±" in cell for row in table[2:] for cell in row.split("|")[2:-1])
    assert len(runs) == 5 * len({Path(flags[flags.index("--out") + 1]).parent for _, *flags in runs})
    names = [row.split("|")[1] for row in table[2:]]
    assert names == re.findall(r"^\|( \w[\w-]+: [^|]*)\|", STUDY, re.MULTILINE)                 # the study's own table
    assert Image.open("out/toy/scores.png").width > 1000

    # The page's own picture is drawn from the same folders, a panel for each claim.
    monkeypatch.setattr(sys, "argv", ["study.py", "out/toy", "study.png"])
    study.main()
    panels = [study.draw_panel(panel, Path("out/toy")) for panel in study.PANELS]
    assert Image.open("study.png").width == 2 * panels[0].width
    assert len(panels) == 6


# ---- Table 8 ---------------------------------------------------------------------------------------------------------

# learning rate, weight decay, warm-up, steps, accumulation, images per GPU, λ_i2t; everywhere λ_recon = 1, λ_t2i = 0
TABLE_8 = {
    ("reca_showo", "showlab/show-o-w-clip-vit"): (5e-7, 0.01, 1000, 5000, 5, 4, 1),
    ("reca_showo", "showlab/show-o-w-clip-vit-512x512"): (5e-7, 0.01, 1000, 5000, 5, 2, 1),
    ("reca_harmon", "harmon-0.5b"): (1e-5, 0.02, 500, 3000, 2, 96, 1),
    ("reca_harmon", "harmon-1.5b"): (1e-5, 0.02, 500, 5000, 2, 48, 1),
    ("reca_openuni", "openuni-b-512"): (1e-5, 0.05, 50, 5000, 16, 42, 0),
    ("reca_openuni", "openuni-l-512"): (1e-5, 0.05, 50, 5000, 16, 20, 0),
    ("reca_bagel", "ByteDance-Seed/BAGEL-7B-MoT"): (4e-5, 0, 1000, 1000, 1, 8, 0),
}

# What the original counts -> ours: (warm-up in weight updates, steps, steps of an update, images of each loss in a step).
OUR_STEPS = {
    # weight updates of `accum` micro-batches, which are one step of ours
    "reca_showo": lambda warmup, steps, accum, batch: (warmup, steps, 1, accum * batch),
    # micro-batches of one loss, reconstruction or understanding; 2 * accum are an update. Half of one for each loss is a step
    "reca_harmon": lambda warmup, steps, accum, batch: (warmup // (2 * accum), steps, 2 * accum, batch // 2),
    # micro-batches, which are our steps; `accum` are an update
    "reca_openuni": lambda warmup, steps, accum, batch: (warmup // accum, steps, accum, batch),
    # weight updates of 8 images on each of 6 GPUs
    "reca_bagel": lambda warmup, steps, accum, batch: (warmup, steps, accum, 6 * batch),
}


@pytest.mark.parametrize("script, model", TABLE_8, ids=lambda name: name.split("/")[-1])
def test_table_8_is_the_defaults(script, model):
    lr, weight_decay, *counts, lambda_i2t = TABLE_8[script, model]
    args = asked(importlib.import_module(script), ["--model", model, "--data", "images"])
    assert (args.lr, args.weight_decay) == (lr, weight_decay)
    assert (args.warmup, args.steps, args.accum, args.batch) == OUR_STEPS[script](*counts)
    assert (args.lambda_recon, args.lambda_i2t, args.lambda_t2i) == (1, lambda_i2t, 0)
