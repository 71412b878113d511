"""A step is the same whatever goes through the model at once: losses and gradients of all four architectures at
micro-batches of 1, 3 and all; what happens when the memory is full; low-precision weights."""
import functools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import reca_bagel
import reca_harmon
import reca_openuni
import reca_showo

ROOT = Path(__file__).parent.parent
MODELS = {
    "harmon": (reca_harmon, reca_harmon.Harmon, "tiny"),
    "showo": (reca_showo, reca_showo.Showo, "tiny"),
    "showo-vq": (reca_showo, reca_showo.Showo, "tiny-vq"),
    "openuni": (reca_openuni, reca_openuni.OpenUni, "tiny"),
    "bagel": (reca_bagel, reca_bagel.Bagel, "tiny"),
}
TRAINS_I2T = ("harmon", "showo", "showo-vq")
BATCH = 5


def tiny(name):
    """Random weights, the same each time. Zeros, with which some parts begin, would hide what is behind them."""
    module, model_class, variant = MODELS[name]
    torch.manual_seed(0)
    model = model_class.random(variant)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return module, model.train()


def arguments(module, name, losses, **options):
    argv = ["--model", MODELS[name][2], "--data", "shapes", "--precision", "fp32", "--out", "unused",
            "--batch", str(BATCH), "--accum", "1"]
    for loss in common.LOSSES:
        argv += [f"--lambda-{loss}", str(float(loss in losses))]
    if "t2i" in losses:
        argv += ["--captions", "full"]
    args = common.parse_args("", module.RECIPES, module.DEFAULT, argv, getattr(module, "flags", None))
    for key, value in options.items():
        setattr(args, key, value)
    return args


def streams_of(model, losses):
    """The toy world's images; their sizes differ where the architecture takes that (BAGEL)."""
    rows = {"recon": [], "i2t": [], "t2i": []}
    for k in range(7):
        scene = common.random_scene(np.random.default_rng(k), 1 + k % 3)
        image = common.draw_scene(scene, model.config.image_size)
        image = image.resize((image.width, image.height // (1 + k % 2)))
        words = common.caption(scene)
        rows["recon"].append((f"{k}", image, None))
        rows["i2t"].append((f"{k}", image, [(common.SEED_TEMPLATE, words)]))
        rows["t2i"].append((f"{k}", image, words))
    return {loss: common.Stream(loss, rows[loss], model.preprocess, 0, common.templates()) for loss in losses}


def gradients_of_a_step(name, losses, micro_batch):
    """The row of the log, and the gradients of one step that moves nothing."""
    module, model = tiny(name)
    args = arguments(module, name, losses, micro_batch=micro_batch, accum=10 ** 6)
    trainer = common.Trainer(model, streams_of(model, losses), args)
    row, _ = trainer.take_step(trainer.loaders())
    trainer.average(trainer.parameters)                     # of several processes; one leaves them as they are
    return row, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@functools.lru_cache(maxsize=None)
def whole_step(name, loss):
    """One loss of one step, all images at once, in one process: what the others are compared with."""
    return gradients_of_a_step(name, [loss], BATCH)


CASES = [(name, loss) for name in MODELS for loss in common.LOSSES if loss != "i2t" or name in TRAINS_I2T]


def distance(gradients, others):
    """Of two sets of gradients, as a fraction of the first. What has none in the one has zeros in the other."""
    apart, size = 0.0, 0.0
    for name, gradient in gradients.items():
        other = others.get(name, torch.zeros_like(gradient))
        apart += (gradient.double() - other.double()).square().sum().item()
        size += gradient.double().square().sum().item()
    return math.sqrt(apart / size)


@pytest.mark.parametrize("name, loss", CASES)
def test_the_micro_batch_changes_nothing(name, loss):
    """BAGEL's images differ in size, Show-o's in masked tokens, answers in length: a mean of means would differ."""
    row, whole = whole_step(name, loss)
    assert whole and any(gradient.any() for gradient in whole.values())
    for micro_batch in (1, 3):
        other_row, other = gradients_of_a_step(name, [loss], micro_batch)
        assert other_row[loss] == pytest.approx(row[loss], rel=2e-6)
        assert other.keys() == whole.keys() and distance(whole, other) < 1e-5


def test_two_processes_change_nothing(tmp_path):
    """All architectures and losses: five images on two processes, one at a time, against one process with all of them.
    And averaging in buckets is averaging: buckets smaller than some tensors, two types, a parameter without a gradient
    on one of the processes."""
    for name, loss in CASES:
        row, whole = whole_step(name, loss)
        torch.save({"row": row, "gradients": whole}, tmp_path / f"{name}-{loss}.pt")
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import torch, torch.distributed as dist, common, test_step
torch.set_num_threads(1)
dist.init_process_group("gloo")
for name, loss in test_step.CASES:
    expected = torch.load({str(tmp_path)!r} + f"/{{name}}-{{loss}}.pt")
    row, gradients = test_step.gradients_of_a_step(name, [loss], 1)
    assert abs(row[loss] - expected["row"][loss]) < 1e-5 * abs(row[loss]), (name, loss, row)
    assert expected["gradients"].keys() <= gradients.keys()
    apart = test_step.distance(expected["gradients"], gradients)
    assert apart < 1e-5, (name, loss, apart)
    print("equal", name, loss, flush=True)

common.BUCKET = 50
rank = dist.get_rank()
sizes, types = (7, 100, 30, 15, 40), (torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32)
parameters = [torch.zeros(n, dtype=t, requires_grad=True) for n, t in zip(sizes, types)]
for k, p in enumerate(parameters):
    if (k, rank) != (3, 1):
        p.grad = torch.full_like(p, 2.0 * k + 4.0 * rank)
common.average_gradients(parameters)
for k, p in enumerate(parameters):
    expected = 3.0 if k == 3 else 2.0 * k + 2.0
    assert (p.grad == expected).all(), (k, p.grad)
print("equal buckets", flush=True)
dist.barrier()
os._exit(0)             # past Python's own exit, where gloo's threads abort now and then
""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launcher, str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.count("equal") == 2 * (len(CASES) + 1), result.stderr[-1500:]


def test_the_noise_of_stochastic_rounding_is_what_its_docstring_says():
    """Weights of 0.02, of which a bf16's last bit is 1.2e-4, moved by 5e-7 at a time, as Show-o's are."""
    generator = torch.Generator().manual_seed(0)
    bit, move, updates = 2.0 ** -13, 5e-7, 400
    weights = torch.full((20000,), 0.02).to(torch.bfloat16)
    start = weights.float()
    for _ in range(updates):
        common.StochasticAdamW._store(weights, weights.float() + move, generator)
    drift = weights.float() - start
    assert drift.mean().item() == pytest.approx(updates * move, rel=0.05)
    assert drift.std().item() == pytest.approx(math.sqrt(updates * move * bit), rel=0.05)
    # Over the 5000 updates of its run: a fifth of the way of a weight that always moves in one direction.
    assert math.sqrt(5000 * move * bit) / (5000 * move) == pytest.approx(0.22, abs=0.01)


def test_a_step_of_two_losses_is_their_weighted_sum():
    row, both = gradients_of_a_step("showo", ["recon", "i2t"], 2)
    parts = [gradients_of_a_step("showo", [loss], 2)[1] for loss in ("recon", "i2t")]
    assert row["loss"] == pytest.approx(row["recon"] + row["i2t"])
    for name, gradient in both.items():
        expected = sum(part[name] for part in parts if name in part)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-8


def test_out_of_memory_halves_the_micro_batch_once_and_loses_nothing(tmp_path, monkeypatch):
    """A micro-batch of more than 2 images does not fit from the fourth step on, in the middle of a backward pass that has
    added to some gradients already. The run goes on from the last update, to the same weights."""
    def run(out, limit):
        module, model = tiny("showo")
        args = arguments(module, "showo", ["recon"], micro_batch=4, accum=2, steps=6, batch=4, out=str(out),
                         save_every=100, workers=0, warmup=0, horizon=0)
        trainer = common.Trainer(model, streams_of(model, ["recon"]), args)
        common.record_run(args, model.device)
        loss = model.recon_loss

        def recon_loss(features, *arguments, **options):
            value = loss(features, *arguments, **options)
            if trainer.step >= 3 and len(features) > limit:
                (value * 0.5).backward(retain_graph=True)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return value
        monkeypatch.setattr(model, "recon_loss", recon_loss)
        trainer.train()
        return trainer, model, common.read_json(out / "log.jsonl", lines=True)

    _, expected, rows = run(tmp_path / "whole", limit=100)
    trainer, model, again = run(tmp_path / "full", limit=2)
    assert trainer.micro_batch == {"recon": 2} and trainer.halved
    record = common.read_json(tmp_path / "full" / "run.json")
    assert record["arguments"]["micro_batch"] == {"recon": 2}                               # a resume begins with that
    assert [row["step"] for row in again] == [row["step"] for row in rows] == list(range(1, 7))
    for a, b in zip(rows, again):
        assert a["recon"] == pytest.approx(b["recon"], rel=1e-5)
    # AdamW divides by the gradients' size: rounding in a tiny gradient becomes a step. A lost or doubled one would be 1.
    start = dict(tiny("showo")[1].named_parameters())
    moved, apart = 0, 0
    for (name, a), b in zip(expected.named_parameters(), model.parameters()):
        moved += (a - start[name]).square().sum().item()
        apart += (a - b).square().sum().item()
    assert moved > 0 and apart < 0.01 ** 2 * moved
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "hopeless", limit=1)


@pytest.mark.parametrize("name", [pytest.param("harmon", marks=pytest.mark.slow),
                                  pytest.param("showo", marks=pytest.mark.slow), "openuni", "bagel"])
def test_bf16_weights_learn_as_float32_weights_do(name):
    """The same steps with StochasticAdamW and with AdamW: the losses stay within the noise of a batch."""
    def curve(optimizer):
        module, model = tiny(name)
        losses = ["recon", "i2t"] if name in TRAINS_I2T else ["recon"]
        args = arguments(module, name, losses, micro_batch=BATCH, lr=1e-3, warmup=2, horizon=0, precision="bf16",
                         optimizer=optimizer, checkpointing=False)
        streams = streams_of(model, losses)
        items = {loss: next(streams[loss].batches(0, BATCH)) for loss in losses}
        for loss in losses:
            common.encode_batch(model, items[loss], loss)           # once, in float32: it is frozen
        trainer = common.set_up_training(model, streams, args, lambda model, args: {}, common.Trainer)
        kinds = {p.dtype for p in trainer.parameters}
        assert kinds == {torch.bfloat16 if optimizer == "bf16" else torch.float32}
        loaders = {loss: iter([items[loss]] * 10) for loss in losses}
        return [trainer.take_step(loaders)[0]["loss"] for _ in range(10)]

    exact, low = np.array(curve("fp32")), np.array(curve("bf16"))
    assert exact[-4:].mean() < 0.9 * exact[:2].mean()                                        # there is something to learn
    noise = exact[-4:].std() + 0.02 * exact[-4:].mean()
    assert abs(exact[-4:].mean() - low[-4:].mean()) < 2 * noise


@pytest.mark.parametrize("name", ["harmon", "showo", pytest.param("openuni", marks=pytest.mark.slow),
                                  pytest.param("bagel", marks=pytest.mark.slow)])
def test_blocks_are_compiled_under_checkpointing(name, monkeypatch):
    """Compiled first, wrapped then: a compiled graph cannot hold the call of a checkpoint, and none was compiled."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))

    def step(compiled):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module, model = tiny(name)
        args = arguments(module, name, ["recon"], micro_batch=2, batch=2, accum=10 ** 6, checkpointing=True,
                         optimizer="fp32")
        if compiled:
            common.compile_blocks(model)
        trainer = common.set_up_training(model, streams_of(model, ["recon"]), args, lambda model, args: {},
                                         common.Trainer)
        row, _ = trainer.take_step(trainer.loaders())
        norm = sum(p.grad.square().sum().item() for p in trainer.parameters if p.grad is not None)
        return row["recon"], norm, torch._dynamo.utils.counters["frames"]["ok"]

    loss, norm, frames = step(compiled=True)
    plain_loss, plain_norm, none = step(compiled=False)
    assert frames > 0 and none == 0
    assert loss == pytest.approx(plain_loss, rel=1e-5) and norm == pytest.approx(plain_norm, rel=1e-3)


def test_a_loss_that_joins_on_resume_has_a_micro_batch():
    """run.json names the losses that the run began with; --captions may add another."""
    module, model = tiny("showo")
    args = arguments(module, "showo", ["recon", "t2i"], micro_batch={"recon": 4, "i2t": 2})
    trainer = common.Trainer(model, streams_of(model, ["recon", "t2i"]), args)
    assert trainer.micro_batch == {"recon": 4, "t2i": 2}


def test_the_cosine_ends_with_the_run():
    """OpenUni's recipe gives no end: the schedule follows --steps, also where a resumed run goes on for longer."""
    module, model = tiny("openuni")
    rates = {}
    for steps in (5000, 10000):
        args = arguments(module, "openuni", ["recon"], steps=steps, accum=16, lr=1.0, warmup=3, horizon=None)
        trainer = common.Trainer(model, {}, args)
        assert trainer.horizon() == steps // 16
        trainer.go_on_from({"step": 1600, "updates": 100, "seen": 0})
        assert trainer.horizon() == steps // 16
        rates[steps] = common.learning_rate(trainer.updates, args.lr, args.warmup, trainer.horizon())
    assert rates[5000] < rates[10000] < 1
    assert module.RECIPES[module.DEFAULT].horizon is None


def test_the_recipes_are_the_papers():
    """Table 8 and the public configurations: images of each loss per update, and updates."""
    for module, name, images, updates in (
            (reca_showo, "showlab/show-o-w-clip-vit-512x512", 5 * 2, 5000),
            (reca_showo, "showlab/show-o-w-clip-vit", 5 * 4, 5000),
            (reca_harmon, "harmon-1.5b", 2 * 48, 1250), (reca_harmon, "harmon-0.5b", 2 * 96, 750),
            (reca_openuni, "openuni-b-512", 16 * 42, 312), (reca_openuni, "openuni-l-512", 16 * 20, 312),
            (reca_bagel, reca_bagel.DEFAULT, 6 * 8, 1000)):
        recipe = module.RECIPES[name]
        assert recipe.batch * recipe.accum == images and recipe.steps // recipe.accum == updates
