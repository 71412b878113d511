"""Writes the tables of docs/memory.md between their marks: which optimizer and micro-batch each
released size takes on cards of 24, 48 and 80 GB, the peak of memory and the FLOPs of a step, and
the peaks of inference. All of it is computed on the fake GPU, in some minutes.

    python tests/fakegpu/table.py
"""
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
CARDS = (24, 48, 80)
JOBS = ("generate", "reconstruct", "describe", "edit")

HEADERS = {
    "training": ("model", "card", "optimizer", "images a step", "micro-batch", "before, GB",
                 "peak, GB", "TFLOP", "waits"),
    "inference": ("model", *JOBS),
}


def released_models():
    """The names of all released sizes, from the scripts. (What the authors trained from them
    is of the same sizes.)"""
    code = ("import reca_bagel, reca_harmon, reca_openuni, reca_showo\n"
            "for script in (reca_showo, reca_openuni, reca_harmon, reca_bagel):\n"
            "    print(*(name for name in script.CONFIGS if not name.startswith('tiny')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True,
                          capture_output=True, text=True)
    return [name for name in done.stdout.split() if "-reca" not in name]


def run(model):
    """Each card and job of a model -> rows of figures. A card that cannot even hold the weights while
    they are loaded ends the driver, so each card has its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = []
    for card in CARDS:
        jobs = ["train", *JOBS] if card == CARDS[-1] else ["train"]
        command = [sys.executable, str(HERE / "driver.py"), model, "--jobs", *jobs, "--passes", "2",
                   "--cards", str(card)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        full = {"model": model, "card": card, "job": "train", "error": "OutOfMemoryError: out of memory"}
        if done.returncode != 0 and "OutOfMemoryError" not in done.stderr:
            raise RuntimeError(f"{model} on {card} GB: {done.stderr[-2000:]}")
        rows += found if found else [full]
    print(model, file=sys.stderr)
    return rows


def training_row(row):
    name = f"| `{row['model']}` | {row['card']} |"
    if "error" in row:
        return f"{name} {row['error'].split(':')[1].strip()} | | | | | | |"
    micro = ", ".join(f"{loss} {size}" for loss, size in row["micro_batch"].items())
    return (f"{name} {row['optimizer']} | {row['batch']} | {micro} | {row['resident'] / 1e9:.1f} |"
            f" {row['peak'] / 1e9:.1f} | {row['flops'] / 1e12:.0f} |"
            f" {row['synchronisations']:.0f} |")


def inference_row(model, rows):
    peaks = {row["job"]: row for row in rows if row["job"] != "train"}
    cells = []
    for job in JOBS:
        if job not in peaks:
            cells.append("–")
        elif "error" in peaks[job]:
            cells.append(peaks[job]["error"].split(":")[0])
        else:
            cells.append(f"{peaks[job]['peak'] / 1e9:.1f}")
    return f"| `{model}` | " + " | ".join(cells) + " |"


def with_table(text, name, rows):
    """The page with the rows as its table of that name, which stands between two marks."""
    header = "| " + " | ".join(HEADERS[name]) + " |"
    ruler = "|" + "---|" * len(HEADERS[name])
    begin = f"<!-- table: {name} -->\n"
    end = "<!-- end -->"
    before, after = text.split(begin)
    return before + begin + "\n".join([header, ruler, *rows]) + "\n" + end + after.split(end, 1)[1]


def main():
    models = released_models()
    # The first compiles the device for the others.
    subprocess.run([sys.executable, "-c", "import fakecuda"], cwd=HERE, check=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(models, pool.map(run, models)))

    training = []
    for rows in results.values():
        training += [training_row(row) for row in rows if row["job"] == "train"]
    inference = [inference_row(model, rows) for model, rows in results.items()]

    path = PROJECT / "docs" / "memory.md"
    text = path.read_text(encoding="utf-8")
    text = with_table(text, "training", training)
    text = with_table(text, "inference", inference)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
