"""What the four RecA scripts share: templates, images, data, the λ-weighted objective, the post-training loop, the command line.

Nothing in here knows an architecture. A script hands over a model with the losses `recon_loss`, `i2t_loss`, `t2i_loss`
and this file does the rest; who wants to learn *what is trained* reads a script, who wants to learn *how a step is
taken* reads section 5 here.

  1. errors and files     one line for the user, nothing half-written
  2. random numbers       every draw is a function of (seed, image), so that any run can be replayed, resumed and spread
  3. templates and images the 360 instructions; loading, cropping, resizing
  4. data                 endless, shuffled, resumable streams over folders, tar shards, conversations and captions; the cache
  5. training             equation (3), and the loop around it
  6. inference            prompt files in, the benchmarks' folder layouts out
  7. the toy world        coloured shapes: drawn, described and read back exactly
  8. the command line     the same flags for every script

Legend of the shape comments: B images in a batch, H W pixels.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# ======================================================================================================
# 1. Errors and files
# ======================================================================================================


class InputError(Exception):
    """Something the user gave cannot work. The message is one line: what is wrong, and what to do."""


def cli(main):
    """Run `main()`; an InputError becomes one line on stderr and exit code 2 (no traceback)."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the batch does not fit into the GPU's memory: lower --batch (and raise --accum by as much), "
              "or add --checkpointing", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def atomic(path):
    """Write to a temporary neighbour, then rename: `path` is either absent, old, or complete, also after a kill.

    with atomic("a/b.png") as temporary: image.save(temporary)
    Works for files and for folders (make the folder `temporary` yourself). The suffix is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:                                                      # a full disk, a read-only folder
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def read_json(path, lines=False):
    """A JSON file, or (lines=True) a list of the objects of a .jsonl file. InputError names the malformed line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not lines:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error.msg})") from error
    return rows


def hub_folder(source, patterns):
    """A local folder that holds `source`: the folder itself, or a download of the matching files from the Hugging Face hub.

    source: a path, or a hub id "owner/name". patterns: glob patterns of the files that are needed. Weights are the only
    thing that is fetched; code in a repository is never executed. InputError where neither is to be had.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InputError(f"no such model: {source} (give a hub id like owner/name, a folder, or tiny)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:        # the hub raises dozens of types: offline, not found, gated, time-out, proxy ...
        raise InputError(f"cannot get {source} from the Hugging Face hub ({type(error).__name__}): check the name and the "
                         "network, or give --model DIR with the files, or try --model tiny") from error


def load_state(path):
    """A checkpoint file as a flat dict of CPU tensors. `.safetensors`, an index `.json` of shards, or a torch file (`.pth`,
    `.bin`, `.ckpt`), which is read with weights_only=True: a downloaded file cannot run code. Common wrappers
    ({"state_dict": ...}, {"model": ...}) are opened."""
    path = Path(path)
    from safetensors.torch import load_file
    try:
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in load_state(path.with_name(Path(shard).name)).items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:       # truncated, not a checkpoint, or a pickle with code in it: one line for all of them
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:120]})") from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return {key: value for key, value in state.items() if torch.is_tensor(value)}


def load_strictly(module, state, name):
    """load_state_dict that names what does not fit. Raises InputError with the missing, unexpected or wrongly shaped keys."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has other shapes for", wrong)):
        if keys:
            raise InputError(f"{name} {what} {len(keys)} keys: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}")
    module.load_state_dict(state)


# ======================================================================================================
# 2. Random numbers
# ======================================================================================================
# Every draw of a step (mask, order, timestep, noise, template, crop) is a function of the seed and of the image's position
# in the endless stream, drawn on the CPU. Hence a run can be resumed without storing any generator, two processes with
# half the batch each draw what one process draws, and a GPU draws what a CPU draws. The one exception is dropout, whose
# generator is reseeded at every step from (seed, step, rank).


def stable_seed(*keys):
    """A 63-bit seed from any printable keys, the same on every machine and in every Python (unlike hash())."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little") >> 1


class Rng:
    """The random numbers of one batch. `Rng(seed, "recon", step, positions=[...])`

    `batch` is one torch.Generator for what is drawn once per batch, the same on all ranks; the methods draw row i of their
    result from image i's own generator. All results are CPU tensors [B, *shape].
    """

    def __init__(self, seed, *keys, positions):
        self.batch = torch.Generator().manual_seed(stable_seed(seed, *keys))
        self.images = [torch.Generator().manual_seed(stable_seed(seed, *keys[:1], "image", p)) for p in positions]

    @classmethod
    def fresh(cls, batch_size):
        """For callers that do not care: seeded from torch's global generator (so torch.manual_seed fixes it)."""
        return cls(int(torch.randint(2 ** 62, ())), positions=range(batch_size))

    def normal(self, *shape):
        return torch.stack([torch.randn(shape, generator=g) for g in self.images])

    def uniform(self, *shape):
        return torch.stack([torch.rand(shape, generator=g) for g in self.images])

    def integers(self, high, *shape):
        return torch.stack([torch.randint(high, shape, generator=g) for g in self.images])

    def permutation(self, n):
        return torch.stack([torch.randperm(n, generator=g) for g in self.images])


def world():
    """(rank, number of ranks): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def global_mean(total, count):
    """total / count, where `count` is averaged over the ranks.

    A loss that is a mean over a varying number of tokens would otherwise weigh the ranks' tokens differently: with this, the
    mean of the ranks' losses (and so of their gradients) is the mean over all ranks' tokens.
    """
    count = torch.as_tensor(count, dtype=torch.float32, device=total.device)
    if dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return total / count.clamp(min=1e-8)


# ======================================================================================================
# 3. Templates and images
# ======================================================================================================

SEED_TEMPLATE = "Describe the image in detail."


def templates(which="all"):
    """The instructions that stand behind the image embeddings (paper, section 3): 10 x 6 x 6 = 360 ways to ask for a detailed
    description. "one" gives the seed template alone (the paper's ablation)."""
    if which == "one":
        return [SEED_TEMPLATE]
    verbs = ("Describe", "Please describe", "Carefully describe", "Write a description of", "Please write a description of",
             "Give a description of", "Provide a description of", "Compose a description of", "Give a full account of",
             "Explain what you see in")
    nouns = ("the image", "this image", "the picture", "this picture", "the given image", "the scene shown here")
    manners = ("in detail", "in great detail", "as precisely as you can", "without leaving anything out",
               "so that someone could draw it from your words", "with every object, its color and its place")
    return [f"{verb} {noun} {manner}." for verb in verbs for noun in nouns for manner in manners]


MAX_PIXELS = 120_000_000          # a larger image is refused before it is decoded: its header alone could ask for all memory
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def load_image(source):
    """A path or the bytes of an image file -> PIL RGB. EXIF rotation applied, transparency on white, 16 bits scaled to 8.

    Raises ValueError or OSError where it cannot be read (the data streams catch them and go on).
    """
    Image.MAX_IMAGE_PIXELS = None                                                # our own bound, below, is checked first
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > MAX_PIXELS or min(image.size) < 1:
        raise ValueError(f"image of {image.width}x{image.height} pixels refused")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                               # 16-bit greyscale: PIL would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def to_tensor(image):
    """PIL RGB -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def to_pil(pixels):
    """[3, H, W] in [-1, 1] -> PIL RGB. clamp(127.5 x + 128), truncated: the rounding of the original repositories."""
    pixels = (127.5 * pixels.detach().float().cpu() + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def center_square(image, size):
    """Central square crop along the long side, then size x size (bicubic, Pillow's antialiased resize)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size))


def random_square(image, size, rng=None):
    """Square crop at a random place along the long side, then size x size. rng: numpy Generator; None: the centre."""
    if rng is None:
        return center_square(image, size)
    side = min(image.size)
    left, top = int(rng.integers(image.width - side + 1)), int(rng.integers(image.height - side + 1))
    return image.crop((left, top, left + side, top + side)).resize((size, size))


def stretch_square(image, size):
    """The whole image, stretched (not cropped) to size x size."""
    return image.resize((size, size))


def pad_square(image, size, fill=127):
    """Centred on a grey square of the longer side, then size x size (LLaVA's padding)."""
    square = Image.new("RGB", (max(image.size),) * 2, (fill,) * 3)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((size, size))


def resize(pixels, size, antialias=False):
    """[B, 3, H, W] -> [B, 3, size, size], bilinear, corners not aligned: how the originals shrink the understanding input."""
    return F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


def blur(pixels, factor):
    """The paper's blur (F.2): [B, 3, H, W] shrunk by `factor` and enlarged again. Details are gone, the number of tokens is kept."""
    return resize(resize(pixels, pixels.shape[-1] // factor), pixels.shape[-1])
