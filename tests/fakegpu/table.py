"""Writes docs/memory.md: which optimizer and micro-batch each released size takes on cards of 24,
48 and 80 GB, the peak of memory and the FLOPs of a step, and the peaks of inference; all computed
on the fake GPU, in some minutes.

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

INTRODUCTION = """# Memory, computed and not measured

Nobody has run these steps on a GPU yet. They ran at their full size on a GPU that is not there
(`tests/fakegpu`): CUDA tensors of the right shapes and types without numbers, whose memory is
counted as torch's allocator would. It cannot show the kernels' own workspaces nor fragmentation
(4 GB are left free for them), nor how fast anything is. `python tests/fakegpu/table.py` writes this
file again; `python tests/fakegpu/driver.py MODEL` shows one step, and which lines hold the memory.

## A training step

The scripts' defaults on one card: `--optimizer auto`, `--micro-batch auto`, checkpointing, each
loss of the recipe. Largest inputs, gradients and moments there. GB are 10^9 bytes; cards of 24, 48
and 80 GB offer 25.3, 50.9 and 84.9. "before": what is held when the step begins. TFLOP are those of
a whole step, with what checkpointing computes twice. "waits": how often in a step the host waits
for the GPU.

| model | card | optimizer | images a step | micro-batch | before, GB | peak, GB | TFLOP | waits |
|---|---|---|---|---|---|---|---|---|
"""

NOISE = """
## What bf16 weights cost

`--optimizer auto` takes bf16 weights and moments with stochastic rounding (8 bytes a weight) where
float32 AdamW (16 bytes) does not fit. Rounding at random is right in the mean, and noisy: after n
updates by u of weights whose last bit is worth b, they have moved by n u, give or take
sqrt(n u b) (tests/test_step.py counts it). For weights of 0.02, b is 1.2e-4:

| run | u | n | way, n u | noise | noise / way |
|---|---|---|---|---|---|
| BAGEL | 2e-5 on average | 1000 | 2.0e-2 | 1.6e-3 | 0.08 |
| Harmon-1.5B | 1e-5 | 1250 | 1.3e-2 | 1.2e-3 | 0.10 |
| OpenUni | 5e-6 on average | 312 | 1.6e-3 | 4.4e-4 | 0.28 |
| Show-o | 5e-7 | 5000 | 2.5e-3 | 5.5e-4 | 0.22 |

The way is that of a weight which moves in one direction all the time; most move to and fro, and end
nearer to where they began. For Show-o, whose steps are a two-hundredth of the last bit, the noise is
then as large as what was learnt: take a card on which float32 fits, if you can.
"""

INFERENCE = """
## Inference

One image, bf16 weights, GB at the peak.

| model | generate | reconstruct | describe | edit |
|---|---|---|---|---|
"""


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


def main():
    models = released_models()
    # The first compiles the device for the others.
    subprocess.run([sys.executable, "-c", "import fakecuda"], cwd=HERE, check=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(models, pool.map(run, models)))

    text = INTRODUCTION
    for rows in results.values():
        text += "".join(training_row(row) + "\n" for row in rows if row["job"] == "train")
    text += NOISE + INFERENCE
    text += "".join(inference_row(model, rows) + "\n" for model, rows in results.items())
    (PROJECT / "docs").mkdir(exist_ok=True)
    (PROJECT / "docs" / "memory.md").write_text(text)


if __name__ == "__main__":
    main()
