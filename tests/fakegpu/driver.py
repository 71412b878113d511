"""Runs the project's own code at a released size on the fake GPU, and prints what a GPU would show.

    python tests/fakegpu/driver.py harmon-1.5b                              the default step
    python tests/fakegpu/driver.py openuni-b-512 openuni-l-512 --cards 24 80
    python tests/fakegpu/driver.py showlab/show-o --jobs generate describe  inference
    python tests/fakegpu/driver.py harmon-0.5b --flags="--micro-batch 4 --lambda-i2t 0"

Prints a line of JSON for each model, card and job: figures in bytes, or an error. Random weights,
worst-case inputs.
"""
import argparse
import gc
import importlib
import json
import sys
import time
import traceback

import fakecuda

sys.path.insert(0, str(fakecuda.PROJECT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402

CLASSES = {"harmon": "Harmon", "showo": "Showo", "openuni": "OpenUni", "bagel": "Bagel"}
DEVICE = torch.device("cuda", 0)


def find_script(model):
    """The module and the model class of a released model."""
    for script, name in CLASSES.items():
        module = importlib.import_module(f"reca_{script}")
        if model in module.CONFIGS:
            return module, getattr(module, name)
    raise SystemExit(f"no such model: {model}")


# ==== 1. A training step ==========================================================================

def worst_items(model, loss, count):
    """Items of a stream that hold the largest inputs which the model can meet."""
    samples, texts, _ = model.worst_case(loss, count)
    items = []
    for k, (sample, text) in enumerate(zip(samples, texts)):
        items.append({"name": "worst case", "position": k, "sample": sample, "text": text,
                      "skipped": []})
    return items


def train(name, card, flags, passes):
    """A step on worst-case inputs in the middle of an accumulation: moments and gradients are
    there. -> figures

    Of the recipe's batch `passes` micro-batches are taken (0: all): they are equal, and each frees
    its memory before the next. FLOPs and synchronisations are scaled to the whole batch.
    """
    module, model_class = find_script(name)
    args = arguments(module, name, flags)
    model = model_class.random(name, DEVICE)
    model.train()

    weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
    picture = Image.new("RGB", (64, 64))
    streams = {}
    for loss, weight in weights.items():
        if weight:
            rows = [("none", picture, "")]
            streams[loss] = common.Stream(loss, rows, model.preprocess, args.seed)
    trainer = common.set_up_training(model, streams, args, *ways_of(module))
    fitted = card.peak

    draw = model.draw

    def draw_the_worst(task, features, rng):
        return draw(task, features, rng) | model.worst_case(task, len(features))[2]

    model.draw = draw_the_worst

    def step(batch, accum):
        args.batch = batch
        args.accum = accum
        trainer.take_step({loss: iter([worst_items(model, loss, batch)]) for loss in streams})

    # The first update makes the moments, the next step leaves its gradients.
    batch = args.batch
    card.reset()
    step(batch=1, accum=1)
    waits_of_one = sum(card.synchronisations.values())
    step(batch=1, accum=10 ** 9)
    resident = card.used
    card.reset()

    trainer.pending = 0
    micro_batch = max(trainer.micro_batch.values())
    taken = min(batch, passes * micro_batch) if passes else batch
    began = time.time()
    step(taken, accum=1)
    figures = measured(card, began)

    # What the micro-batches that were left out would add.
    figures["flops"] *= batch / taken
    more = -(-taken // micro_batch) - 1
    if more:
        a_pass = (figures["synchronisations"] - waits_of_one) / more
        figures["synchronisations"] = waits_of_one + a_pass * (-(-batch // micro_batch) - 1)
    return {"batch": batch, "taken": taken, "micro_batch": trainer.micro_batch,
            "optimizer": args.optimizer, "losses": list(streams), "resident": resident,
            "peak_while_fitting": fitted, **figures}


def arguments(module, name, flags):
    """What the script makes of `--bench --model name`, and of the flags."""
    argv = ["--bench", "--model", name, *flags]
    extend = getattr(module, "flags", None)
    return common.parse_args("", module.RECIPES, module.DEFAULT, argv=argv, extend=extend)


def ways_of(module):
    """How a script prepares a model for training, and its trainer."""
    prepare = getattr(module, "prepare", lambda model, args: {})
    return prepare, getattr(module, "BagelTrainer", common.Trainer)


def bench(name, card, flags):
    """What --bench itself says -> its figures, and the peak in bytes that it is based on."""
    module, model_class = find_script(name)
    args = arguments(module, name, flags)
    # torch's own counter of FLOPs does not work on this device, which counts them itself.
    common.flops_of_an_image = lambda trainer: 0
    figures = common.bench(model_class, args, DEVICE, *ways_of(module))
    return {**figures, "peak": card.peak, "peak_lines": card.peak_table()}


def measured(card, began):
    """What the card has counted since its last reset."""
    waits = [[kind, line, count] for (kind, line), count in card.synchronisations.most_common()]
    return {"peak": card.peak, "peak_lines": card.peak_table(),
            "synchronisations": sum(card.synchronisations.values()), "waits": waits,
            "flops": card.flops, "seconds": round(time.time() - began, 1)}


# ==== 2. Inference ================================================================================

def load_for_inference(name):
    """A released size with random weights, in bf16 as the command line has it with --steps 0."""
    module, model_class = find_script(name)
    if module.__name__ == "reca_bagel":
        model = model_class.random(name, DEVICE, torch.bfloat16)
    else:
        model = model_class.random(name, DEVICE)
        if module.__name__ == "reca_showo":
            model.parts("showo", "mm_projector", "clip").to(torch.bfloat16)
        else:
            model.to(torch.bfloat16)
    return model.eval()


def infer(model, job, card, images, steps):
    """generate, reconstruct, describe or edit -> figures. steps: of the sampler, and tokens of a
    description."""
    size = model.config.image_size
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise)] * images
    prompts = ["a red circle beside a blue square"] * images
    seeds = list(range(images))
    jobs = {
        "generate": lambda: model.generate(prompts, seed=seeds, num_steps=steps),
        "reconstruct": lambda: model.reconstruct(pictures, seed=seeds, num_steps=steps),
        "describe": lambda: model.describe(pictures, max_new_tokens=steps),
        "edit": lambda: model.edit(pictures, prompts, seed=seeds, num_steps=steps),
    }

    card.reset()
    began = time.time()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        results = jobs[job]()
    assert len(results) == images
    return {"images": images, **measured(card, began)}


# ==== 3. The command line =========================================================================

def attempt(what, card, function, *arguments):
    """Prints a line of JSON: `what` was done, and its figures, or the error and who held memory."""
    card.reset()
    try:
        figures = function(*arguments)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}", "peak_lines": card.peak_table()}
    print(json.dumps(what | figures), flush=True)
    # What the error's frames and the model's cycles hold would count as used in the next attempt.
    gc.collect()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--jobs", nargs="+", default=["train"],
                        choices=("train", "bench", "generate", "reconstruct", "describe", "edit"))
    parser.add_argument("--cards", nargs="+", type=int, choices=fakecuda.CARDS, default=[80],
                        help="GB, to train on each; inference is on the first")
    parser.add_argument("--flags", default="", help="of the training script")
    parser.add_argument("--passes", type=int, default=0, help="micro-batches of a step (0: all)")
    parser.add_argument("--images", type=int, default=1, help="of an inference batch")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    options = parser.parse_args()

    for name in options.models:
        # Only BAGEL edits.
        model_class = find_script(name)[1]
        inference = []
        for job in options.jobs:
            if job not in ("train", "bench") and hasattr(model_class, job):
                inference.append(job)
        if inference:
            card = fakecuda.Card(options.cards[0])
            model = load_for_inference(name)
            for job in inference:
                what = {"model": name, "card": options.cards[0], "job": job}
                attempt(what, card, infer, model, job, card, options.images, options.steps)
            del model

        flags = options.flags.split()
        for gigabytes in options.cards:
            card = fakecuda.Card(gigabytes)
            what = {"model": name, "card": gigabytes}
            if "train" in options.jobs:
                attempt(what | {"job": "train"}, card, train, name, card, flags, options.passes)
            if "bench" in options.jobs:
                attempt(what | {"job": "bench"}, card, bench, name, card, flags)


if __name__ == "__main__":
    main()
