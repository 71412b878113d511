"""Runs the project's own code at a released size on the fake GPU, and prints what a GPU would have shown.

    python tests/fakegpu/driver.py harmon-1.5b                                  a training step by default
    python tests/fakegpu/driver.py openuni-l-512 --card 24 --flops
    python tests/fakegpu/driver.py showlab/show-o --jobs generate describe      inference
    python tests/fakegpu/driver.py harmon-0.5b --flags="--micro-batch 4 --lambda-i2t 0"

The last line is JSON: for each job its figures, or {"error": ...}. Bytes are bytes, not GB.
"""
import argparse
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


# ==== 1. A training step ==============================================================================

def worst_items(model, name, count):
    """Items of a stream that hold the largest inputs which the model can meet."""
    samples, texts, draws = model.worst_case(name, count)
    items = []
    for k, (sample, text) in enumerate(zip(samples, texts)):
        items.append({"name": "worst case", "sample": sample, "text": text, "position": k, "skipped": []})
    return items, draws


def train(name, card, flags, count_flops):
    """A step of the recipe's batch on worst-case inputs, in the middle of an accumulation: moments and
    gradients are there. -> figures"""
    module, model_class = find_script(name)
    argv = ["--bench", "--model", name, *flags]
    args = common.parse_args("", module.RECIPES, module.DEFAULT, argv=argv,
                             extend=getattr(module, "flags", None))
    model = model_class.random(name, DEVICE)
    model.train()

    weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
    picture = Image.new("RGB", (64, 64))
    streams = {}
    for loss, weight in weights.items():
        if weight:
            streams[loss] = common.Stream(loss, [("none", picture, "")], model.preprocess, args.seed)
    trainer = common.set_up_training(model, streams, args, getattr(module, "prepare", no_preparation),
                                     getattr(module, "BagelTrainer", common.Trainer))
    fitted = card.peak

    worst_draws = {}
    draw = model.draw
    model.draw = lambda task, features, rng: draw(task, features, rng) | worst_draws[task]

    def step(batch, accum):
        args.batch = batch
        args.accum = accum
        loaders = {}
        for loss in streams:
            items, worst_draws[loss] = worst_items(model, loss, batch)
            loaders[loss] = iter([items])
        trainer.take_step(loaders)

    # The first update makes the moments, the next step leaves its gradients.
    batch = args.batch
    step(batch=1, accum=1)
    step(batch=1, accum=10 ** 9)
    resident = card.used
    card.reset()

    trainer.pending = 0
    began = time.time()
    if count_flops:
        with card.counting_flops():
            step(batch, accum=1)
    else:
        step(batch, accum=1)
    return {"batch": batch, "micro_batch": trainer.micro_batch, "optimizer": args.optimizer,
            "losses": list(streams), "resident": resident, "peak_while_fitting": fitted,
            **measured(card, began)}


def no_preparation(model, args):
    return {}


def measured(card, began):
    """What the card has counted since its last reset."""
    waits = [[kind, line, count] for (kind, line), count in card.synchronisations.most_common()]
    return {"peak": card.peak, "peak_lines": card.peak_table(),
            "synchronisations": sum(card.synchronisations.values()), "waits": waits,
            "flops": sum(card.flops.values()), "seconds": round(time.time() - began, 1)}


# ==== 2. Inference ====================================================================================

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
    """generate, reconstruct, describe or edit. steps: of the sampler, and words of a description."""
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


# ==== 3. The command line =============================================================================

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--card", type=int, choices=fakecuda.CARDS, default=80, help="GB")
    parser.add_argument("--jobs", nargs="+", default=["train"],
                        choices=("train", "generate", "reconstruct", "describe", "edit"))
    parser.add_argument("--flags", default="", help="of the training script")
    parser.add_argument("--flops", action="store_true", help="count FLOPs, too")
    parser.add_argument("--images", type=int, default=1, help="of an inference batch")
    parser.add_argument("--steps", type=int, default=2, help="of the sampler")
    options = parser.parse_args()

    card = fakecuda.Card(options.card)
    figures = {}
    loaded = None
    # Inference first: training makes the weights float32, and leaves the largest peak.
    for job in sorted(options.jobs, key=lambda job: job == "train"):
        try:
            if job == "train":
                loaded = None
                figures[job] = train(options.model, card, options.flags.split(), options.flops)
            else:
                loaded = loaded or load_for_inference(options.model)
                figures[job] = infer(loaded, job, card, options.images, options.steps)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            figures[job] = {"error": f"{type(error).__name__}: {error}", "peak_lines": card.peak_table()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
