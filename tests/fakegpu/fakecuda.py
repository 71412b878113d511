"""A CPU build of torch that believes in one GPU: device="cuda" works, in little memory.

    import fakecuda                              # before torch; needs g++
    card = fakecuda.Card(80)
    model = Model.random("name", torch.device("cuda", 0))
    ...
    card.peak, card.peak_table(), card.synchronisations, card.flops

CUDA tensors have shapes, types and devices as on a GPU, but no numbers (see device.cpp); so a
training step at a released size shows errors of devices and types, the peak of memory and who holds
it, FLOPs, and where the host waits for the GPU. It does not show numbers, speed, the kernels' own
workspaces, or fragmentation.
"""
import collections
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent
LISTENER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)


# ==== 1. The device ===============================================================================

def build():
    """device.cpp -> the path of the library, compiled once for this torch (about 20 s).
    RuntimeError where there is no g++ or it fails."""
    torch_home = Path(importlib.util.find_spec("torch").origin).parent
    source = HERE / "device.cpp"
    contents = (torch_home / "version.py").read_bytes() + source.read_bytes()
    key = hashlib.sha256(contents).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fakegpu-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    if shutil.which("g++") is None:
        raise RuntimeError("the fake GPU needs g++")

    # Compiled beside its place, then renamed: of two processes at once neither loads half a file.
    unfinished = library.with_suffix(f".{os.getpid()}")
    headers = [f"-I{torch_home}/include", f"-I{torch_home}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch_home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_home}/lib"]
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", *headers, str(source), *libraries]
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ cannot compile {source.name}: {done.stderr[-2000:]}")
    unfinished.replace(library)
    return library


assert "torch" not in sys.modules or __name__ == "__main__", "import fakecuda before torch"
DEVICE = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
for name in ("used_bytes", "peak_bytes", "bytes_at_peak"):
    getattr(DEVICE, name).restype = ctypes.c_int64
DEVICE.set_total.argtypes = [ctypes.c_int64]
DEVICE.flops_done.restype = ctypes.c_double
DEVICE.bytes_at_peak.argtypes = [ctypes.c_int64]
DEVICE.install()

import torch  # noqa: E402
import torch._meta_registrations  # noqa: E402, F401  (its import registers shapes of operators)
import torch.nn.functional as F  # noqa: E402

aten = torch.ops.aten

# What torch reports of real cards: less than is printed on the box.
GIB = 2 ** 30
CARDS = {24: int(23.6 * GIB), 48: int(47.4 * GIB), 80: int(79.1 * GIB)}


# ==== 2. What is counted ==========================================================================

@functools.cache
def project_file(path):
    """The name of one of the project's files, None for others."""
    return Path(path).name if Path(path).parent == PROJECT else None


def line_of_project():
    """The innermost line of the project that is running, and in a backward the autograd node."""
    frame = sys._getframe(1)
    while frame is not None and project_file(frame.f_code.co_filename) is None:
        frame = frame.f_back
    where = "elsewhere"
    if frame is not None:
        where = f"{project_file(frame.f_code.co_filename)}:{frame.f_lineno}"
    node = torch._C._current_autograd_node()
    return where if node is None else f"{where} [{node.name()}]"


LINES = {}       # {line of the project: its number in device.cpp}


class Card:
    """The fake GPU's memory and counters. One at a time.

    used, peak         bytes now, and at most since the last reset()
    flops              since then, of matrix products, convolutions and attention
    synchronisations   {(what, line): how often} the host waited for the GPU
    """

    def __init__(self, gigabytes=80):
        self.total = CARDS[gigabytes]
        self.listener = LISTENER(self._listen)
        DEVICE.set_total(self.total)
        DEVICE.listen(self.listener)
        self.reset()
        pretend(self)

    def reset(self):
        """Counters to 0, the peak to what is in use."""
        self.synchronisations = collections.Counter()
        self.flops_before = DEVICE.flops_done()
        DEVICE.reset_peak()

    @property
    def used(self):
        return DEVICE.used_bytes()

    @property
    def peak(self):
        return DEVICE.peak_bytes()

    @property
    def flops(self):
        return DEVICE.flops_done() - self.flops_before

    def _listen(self, kind):
        """Called by device.cpp when a large block is allocated and when the host waits. -> the
        number of the line that is running"""
        line = line_of_project()
        if kind != b"allocate":
            self.synchronisations[kind.decode(), line] += 1
        return LINES.setdefault(line, len(LINES))

    def peak_table(self, rows=12):
        """Who held memory at the peak, in blocks of 1 MB or more: [(bytes, line), ...], the largest
        first."""
        held = [(DEVICE.bytes_at_peak(number), line) for line, number in LINES.items()]
        held = [entry for entry in held if entry[0]]
        return sorted(held, reverse=True)[:rows]


# ==== 3. What torch says of the GPU ===============================================================

def pretend(card):
    """The functions of torch.cuda that ask a driver ask `card`."""
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=card.total,
                                       major=9, minor=0, multi_processor_count=132)
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "is_bf16_supported": True,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "set_rng_state": None,
        "manual_seed_all": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False

    torch.cuda.memory_allocated = lambda device=None: card.used
    torch.cuda.memory_reserved = lambda device=None: card.used
    torch.cuda.max_memory_allocated = lambda device=None: card.peak
    torch.cuda.max_memory_reserved = lambda device=None: card.peak
    torch.cuda.reset_peak_memory_stats = lambda device=None: DEVICE.reset_peak()
    torch.cuda.mem_get_info = lambda device=None: (card.total - card.used, card.total)

    # One thread runs the backward too, so that its lines are those of the caller.
    torch.autograd.set_multithreading_enabled(False)
    F.scaled_dot_product_attention = attention


dense_attention = F.scaled_dot_product_attention


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """scaled_dot_product_attention with the kernel that torch chooses on an H100: what its source
    says in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.

    q [B, H, n, d], k [B, K, S, d] and v [B, K, S, e] -> [B, H, n, e]
    """
    if q.device.type != "cuda":
        return dense_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                               enable_gqa=enable_gqa)

    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(low) for x in (q, k, v))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    if not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(f"query, key and value have the dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
        raise RuntimeError(f"attn_mask has dtype {attn_mask.dtype}, the query {q.dtype}")
    devices = {x.device for x in (q, k, v, attn_mask) if x is not None}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, got {devices}")

    grouped = q.shape[1] != k.shape[1]
    kind = attention_kernel(q, k, v, attn_mask, dropout_p, is_causal, grouped)
    wants_gradient = any(x.requires_grad for x in (q, k, v))
    if kind == "math":
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale)[0]

    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(q.dtype)
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if kind == "flash":
        return aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    if kind == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            q, k, v, attn_mask, wants_gradient, dropout_p, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale)[0]


def attention_kernel(q, k, v, attn_mask, dropout_p, is_causal, grouped):
    """-> cudnn, flash, efficient or math, in the order in which torch tries them on an H100."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    width = q.shape[-1]
    dense = all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k, v))
    if not dense:
        return "math"

    narrow = width % 8 == 0 and width <= 128 and v.shape[-1] <= 128
    if torch.backends.cuda.cudnn_sdp_enabled() and half and narrow and k.shape[2] != 1:
        return "cudnn"
    unequal = is_causal and q.shape[2] != k.shape[2]
    if half and attn_mask is None and width <= 256 and not unequal:
        return "flash"
    if width % (8 if half else 4) == 0 and not grouped:
        return "efficient"
    return "math"
