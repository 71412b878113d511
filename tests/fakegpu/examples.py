"""Small cases whose figures can be counted by hand, and faults that must be found:
tests/test_fakegpu.py runs this file, and compares the JSON that it prints."""
import json
import sys

import fakecuda

sys.path.insert(0, str(fakecuda.PROJECT))

import torch  # noqa: E402

import common  # noqa: E402
import driver  # noqa: E402

card = fakecuda.Card(24)
figures = {}


def message(function, *arguments, **options):
    """What the function raises, "" for nothing."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- Memory: 1000 x 1000 float32 are 4,000,000 bytes, which torch rounds up to blocks of 512.
a = torch.zeros(1000, 1000, device="cuda")
figures["one tensor"] = card.used
view = a[10:20].t()
figures["and a view"] = card.used
b = a.to(torch.bfloat16)
figures["and its bf16 copy"] = card.used
del b
figures["without the copy"] = card.used
figures["peak"] = card.peak
figures["torch's figures"] = [torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(),
                              *torch.cuda.mem_get_info()]
figures["too much"] = message(torch.empty, card.total, device="cuda")
fits = torch.empty(card.total - card.used - 1024, dtype=torch.uint8, device="cuda")
figures["full"] = card.total - card.used
figures["one more"] = message(torch.empty, 512, device="cuda")
del fits, a, view
figures["after all"] = card.used

# ---- FLOPs: a product of [8, 16] and [16, 4]; a convolution of 6 channels in 3 groups.
x = torch.randn(8, 16, device="cuda")
w = torch.randn(16, 4, device="cuda")
card.reset()
x @ w
figures["flops of a product"] = card.flops

image = torch.randn(2, 6, 10, 10, device="cuda", requires_grad=True)
convolution = torch.nn.Conv2d(6, 12, 3, padding=1, groups=3, device="cuda")
card.reset()
result = convolution(image)
figures["flops of a convolution"] = card.flops
card.reset()
result.sum().backward()
figures["flops of its backward"] = card.flops

# Two heads of 32 numbers, 5 queries, 7 keys.
q = torch.randn(1, 2, 5, 32, device="cuda", dtype=torch.bfloat16)
k = torch.randn(1, 2, 7, 32, device="cuda", dtype=torch.bfloat16)
card.reset()
torch.nn.functional.scaled_dot_product_attention(q, k, k)
figures["flops of attention"] = card.flops

# ---- Numbers of small integers are known, and asking for them makes the host wait.
card.reset()
ids = torch.tensor([3, 0, 5], device="cuda")
figures["computed"] = [(ids * 2).tolist(), ids[ids > 2].tolist(), ids.sum().item()]
figures["waits"] = sorted({kind for kind, _ in card.synchronisations})
card.reset()
pinned = torch.ones(1000).pin_memory().to("cuda", non_blocking=True)
figures["waits for pinned memory"] = sum(card.synchronisations.values())
torch.ones(1000).to("cuda", non_blocking=True)
figures["waits for ordinary memory"] = sum(card.synchronisations.values())

# ---- Faults.
on_cpu = torch.ones(16, 4)
figures["product of two devices"] = message(torch.matmul, x, on_cpu)
figures["sum of two devices"] = message(torch.add, x, torch.ones(16))
figures["mixed types"] = message(torch.matmul, x, w.bfloat16())
figures["unknown numbers"] = message(torch.nonzero, x)

# ---- A training step of each tiny model: as it is, and with one of its weights left on the CPU.
for script, name in driver.CLASSES.items():
    module = driver.importlib.import_module(f"reca_{script}")
    steps = []
    for fault in (False, True):
        model = getattr(module, name).random("tiny", driver.DEVICE).train()
        samples, texts, _ = model.worst_case("recon", 2)
        if fault:
            weight = [p for p in model.parameters() if p.requires_grad and p.dim() == 2][-1]
            weight.data = weight.data.cpu()

        def step():
            features = model.encode(common.to_device(samples, driver.DEVICE), "recon")
            model.recon_loss(features, texts, rng=common.Rng(0, positions=[0, 1])).backward()

        steps.append(message(step))
    figures[f"step of {script}"] = steps

# ---- The sampler of each tiny model: how often the host waits in 3 steps, and in 7. Not the first
# time, when tables come to the GPU that stay there.
for script, name in driver.CLASSES.items():
    module = driver.importlib.import_module(f"reca_{script}")
    model = getattr(module, name).random("tiny", driver.DEVICE).eval()
    waits = []
    for steps in (3, 3, 7):
        card.reset()
        with torch.no_grad():
            model.generate(["red circle", "blue square"], seed=[0, 1], num_steps=steps)
        waits.append(sum(card.synchronisations.values()))
    figures[f"waits of {script}'s sampler"] = waits[1:]

print(json.dumps(figures))
