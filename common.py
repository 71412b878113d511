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
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
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
    except Exception as error:                      # a full disk, a read-only folder: torch and safetensors have errors of their own
        if isinstance(error, OSError) or "inline_container" in str(error) or type(error).__name__ == "SafetensorError":
            raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}") from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def inside(folder, name):
    """folder / name, for a name that comes from a file or an archive. InputError where it leads out of the folder."""
    path = Path(folder) / name
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{name} leads out of {folder}: not written")
    return path


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
    for number, line in enumerate(text.split("\n"), 1):              # not splitlines: it also cuts at U+2028, which JSON allows
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


def find_weights(folder, *names):
    """The state dict of the first of `names` that is in the folder, as one file or as shards with an index. InputError if none."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.index.json"):
            if path.exists():
                return load_state(path)
    raise InputError(f"{folder} holds no {' and no '.join(names)}")


def load_tokenizer(folder):
    """The tokenizer in a folder. Where it was read from is forgotten, so that saving it again gives equal files."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {folder}: {str(error).splitlines()[0]}") from error
    for origin in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(origin, None)
    return tokenizer


def original_autoencoder_names(vae):
    """{name in diffusers' AutoencoderKL: name in the file that it was released in} (KL-16 of Harmon, FLUX's of BAGEL). Only names
    differ; the released files number the decoder's levels from the finest, diffusers in the order in which they run."""
    names, last = {}, len(vae.config.block_out_channels) - 1
    words = {"mid_block.attentions.0": "mid.attn_1", "down_blocks": "down", "resnets": "block", "attentions": "attn", "downsamplers.0": "downsample",
             "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm",
             "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for key in vae.state_dict():
        name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{last - int(level[1])}", key)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda block: f"mid.block_{int(block[1]) + 1}", name)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        names[key] = name
    return names


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

    @classmethod
    def sampling(cls, seed, batch_size):
        """For samplers. seed: one int (image i has seed + i), or one per image. An image's numbers depend on its own seed alone."""
        seeds = list(range(seed, seed + batch_size)) if isinstance(seed, int) else list(seed)
        if len(seeds) != batch_size:
            raise InputError(f"{len(seeds)} seeds for {batch_size} images")
        return cls("sampling", positions=seeds)

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


UNREADABLE = (OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError)    # what Pillow raises for damaged files


def try_image(name, source):
    """load_image for a folder of many: None, and a line that names the file, where it cannot be read. A PIL image is handed through."""
    try:
        return source if isinstance(source, Image.Image) else load_image(source)
    except UNREADABLE as error:
        tqdm.write(f"skipped: {name} ({str(error).split(' <')[0] or type(error).__name__})")
        return None


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


# ======================================================================================================
# 4. Data
# ======================================================================================================
# A set of rows has a length, and rows[i] -> (name, image, text): the image as undecoded bytes, as a PIL image (toy world) or
# None (a text-only conversation); the text is None (RecA needs none), a caption, or a conversation [(question, answer), ...].


class Images:
    """Unlabelled images: a folder (recursive) or WebDataset tar shards (one .tar, or a folder that holds .tar files).

    Only names are listed at the start: 240,000 files take seconds. Tar members are read by offset and never extracted, so a
    path inside an archive has no effect on the disk. InputError where there is no folder or no image in it.
    """

    def __init__(self, source):
        source = Path(source).expanduser()
        if not source.exists():
            raise InputError(f"no such folder or .tar file: {source}")
        self.files = [str(source)] if source.is_file() else sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names
            if name.lower().endswith(IMAGE_SUFFIXES + (".tar",)))
        self.root = source.parent if source.is_file() else source
        tars = [f for f in self.files if f.lower().endswith(".tar")]
        self.members = []                                           # (tar, member's name, offset, size); empty for plain files
        for path in tars:
            try:
                with tarfile.open(path, "r:") as archive:           # "r:" = uncompressed: a member can be read by its offset
                    self.members += [(path, m.name, m.offset_data, m.size) for m in archive
                                     if m.isfile() and m.name.lower().endswith(IMAGE_SUFFIXES)]
            except (tarfile.TarError, OSError) as error:
                raise InputError(f"{path} is not a readable, uncompressed tar file ({error})") from error
        self.files = [] if self.members else [f for f in self.files if f.lower().endswith(IMAGE_SUFFIXES)]
        if not len(self):
            raise InputError(f"no image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)}, or a .tar of them) in {source}")

    def __len__(self):
        return len(self.members) or len(self.files)

    def name(self, i):
        return self.members[i][1] if self.members else os.path.relpath(self.files[i], self.root)

    def __getitem__(self, i):
        if not self.members:
            return self.name(i), Path(self.files[i]).read_bytes(), None
        path, name, offset, size = self.members[i]
        with open(path, "rb") as file:
            file.seek(offset)
            return name, file.read(size), None


class Conversations:
    """LLaVA-style conversations for L_i2t: a .json list or a .jsonl file of {"image": name (optional), "conversations":
    [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}. InputError names the first malformed row."""

    def __init__(self, path, folder):
        self.folder, self.rows = Path(folder or Path(path).parent), []
        for number, row in enumerate(read_json(path, lines=str(path).endswith(".jsonl")), 1):
            try:
                values = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
                assert len(values) >= 2
                self.rows.append((row.get("image"), list(zip(values[::2], values[1::2]))))
            except (KeyError, TypeError, AttributeError, AssertionError) as error:
                raise InputError(f"{path}: row {number} is not a LLaVA conversation (image, conversations)") from error
        if not self.rows:
            raise InputError(f"{path} holds no conversation")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        image, turns = self.rows[i]
        return image or f"text {i}", (self.folder / image).read_bytes() if image else None, turns


class Captions:
    """Captioned images for L_t2i: a .jsonl file of {"image": name, "caption": text}, images relative to the file's folder."""

    def __init__(self, path):
        self.folder, self.rows = Path(path).parent, read_json(path, lines=True)
        for number, row in enumerate(self.rows, 1):
            if not (isinstance(row, dict) and isinstance(row.get("image"), str) and isinstance(row.get("caption"), str)):
                raise InputError(f"{path}: row {number} lacks \"image\" or \"caption\"")
        if not self.rows:
            raise InputError(f"{path} holds no caption")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return row["image"], (self.folder / row["image"]).read_bytes(), row["caption"]


class SelfDescriptions:
    """The model's own descriptions of some training images, as conversations (our addition, see describe_first)."""

    def __init__(self, images, path):
        self.images, self.rows = images, read_json(path, lines=True)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        name, image, _ = self.images[row["index"]]
        return name, image, [(row["question"], row["answer"])]


class Cache:
    """What the frozen parts compute for an image, one safetensors file each, in `folder`/<hash of the settings>.

    The file's name is the hash of the image's bytes: another image, or other settings, is another file, so nothing stale can be
    read. Files are renamed into place when complete: safe to interrupt, and to share between runs and ranks.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder) / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        with atomic(self.folder / "settings.json") as path:
            path.write_text(json.dumps(settings, indent=1, default=str))

    def path(self, image):
        name = hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path):
        from safetensors.torch import load_file
        try:
            return load_file(path) if path.exists() else None
        except Exception:                                                      # damaged on disk: computed again
            return None

    def write(self, path, features):
        from safetensors.torch import save_file
        with atomic(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in features.items()}, temporary)


class Stream(torch.utils.data.Dataset):
    """An endless, shuffled stream over rows: stream[position] for any position >= 0, so it can be entered anywhere.

    Epoch e = position // len(rows) has its own permutation. A row that cannot be read is replaced by the next readable one and
    named in the item. Items: {"name", "sample" (model.preprocess) or "features" (cached), "text", "skipped"}.
    """

    def __init__(self, name, rows, preprocess, seed, texts=None, cache=None):
        self.name, self.rows, self.preprocess, self.seed, self.texts, self.cache = name, rows, preprocess, seed, texts, cache
        self.order = functools.lru_cache(2)(lambda epoch: np.random.default_rng(
            stable_seed(seed, name, "order", epoch)).permutation(len(rows)))

    def __getitem__(self, position):
        epoch, k = divmod(position, len(self.rows))
        rng = np.random.default_rng(stable_seed(self.seed, self.name, "item", position))
        skipped = []
        for attempt in range(min(len(self.rows), 1000)):
            index = int(self.order(epoch)[(k + attempt) % len(self.rows)])
            name = f"row {index}"
            try:
                name, image, text = self.rows[index]
                text = self.texts[int(rng.integers(len(self.texts)))] if text is None else text
                item = {"name": name, "text": text, "skipped": skipped, "position": position}
                if self.cache is not None and image is not None:
                    item["path"] = self.cache.path(image)
                    item["features"] = self.cache.read(item["path"])
                if item.get("features") is None:
                    image = load_image(image) if isinstance(image, bytes) else image
                    # With a cache every epoch must see the same crop: no generator, the deterministic (central) one.
                    item["sample"] = self.preprocess(image, self.name, None if self.cache is not None else rng)
                return item
            except UNREADABLE as error:
                skipped.append(f"{name} ({str(error).split(' <')[0][:80] or type(error).__name__})")    # no object addresses
        raise InputError(f"none of {len(skipped)} images could be read, the first was {skipped[0]}")

    def batches(self, start, batch, workers=0):
        """Batches (lists of items) of this rank from global position `start` on: rank r of W takes rows r*batch.. of each W*batch."""
        rank, ranks = world()

        def positions():
            base = start
            while True:
                yield list(range(base + rank * batch, base + (rank + 1) * batch))
                base += ranks * batch

        loader = torch.utils.data.DataLoader(
            self, batch_sampler=positions(), collate_fn=list, num_workers=workers, worker_init_fn=_ignore_signals,
            multiprocessing_context="fork" if workers else None, prefetch_factor=2 if workers else None)
        return iter(loader)


def _ignore_signals(_):
    """Ctrl-C and SIGTERM go to the whole process group: the main process ends the workers once it has saved."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def encode_batch(model, items, task, cache=None):
    """Items of a stream -> features on the model's device, one dict an image; what the cache lacks is computed and stored."""
    todo = [item for item in items if item.get("features") is None]
    if todo:
        with torch.no_grad():
            for item, features in zip(todo, model.encode([item["sample"] for item in todo], task)):
                item["features"] = features
                if cache is not None and "path" in item:
                    cache.write(item["path"], features)
    return [{k: v.to(model.device, non_blocking=True) for k, v in item["features"].items()} for item in items]


# ======================================================================================================
# 5. Training
# ======================================================================================================


def objective(losses, weights, backward):
    """One evaluation of the paper's equation (3):

        L = λ_recon · L_recon  +  λ_i2t · L_i2t  +  λ_t2i · L_t2i

    losses: {"recon": function without arguments -> scalar, ...}; weights: {"recon": λ_recon, ...}. A loss whose λ is 0 is never
    computed. Each loss goes backward as soon as it is there, so that the peak of memory is that of the largest loss and not of
    their sum. Returns (L, {name: value}) as detached tensors.
    """
    values = {}
    for name, loss in losses.items():
        if weights[name] != 0:
            value = loss()
            backward(weights[name] * value)
            values[name] = value.detach()
    return sum(weights[name] * value for name, value in values.items()), values


def learning_rate(update, peak, warmup, horizon):
    """Linear warm-up over `warmup` weight updates, then a cosine to 0 at update `horizon` (0: constant). update counts from 0."""
    if update < warmup:
        return peak * (update + 1) / warmup
    if not horizon:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1, (update - warmup) / max(1, horizon - warmup))))


def average_gradients(parameters):
    """Data parallelism in four lines: every rank gets the mean gradient, once per weight update.

    DistributedDataParallel is not used: it expects one forward and one backward per step, while a step here has a backward per
    loss and each loss leaves other parameters without a gradient (the public Show-o code cannot run on two GPUs for this reason).
    """
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:                              # all ranks must take part in every all_reduce
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def checkpoint_blocks(blocks):
    """Activation checkpointing: keep only each block's input, compute the block again in the backward."""
    from torch.utils.checkpoint import checkpoint
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Trainer:
    """The post-training loop, once for all architectures.

    model    has encode, parameter_groups, <name>_loss, save_pretrained, device (see a script)
    streams  {"recon": Stream, "i2t": Stream, ...}, one for each loss whose λ is not 0
    args     the command line (section 8)
    show     function(step) that draws a preview, or None
    optimizer, average: what a script with sharded or low-precision weights puts in place of AdamW and of average_gradients

    A step is one evaluation of equation (3): `batch` images for each loss. The weights move every `accum` steps.
    """

    def __init__(self, model, streams, args, show=None, optimizer=None, average=average_gradients):
        self.model, self.streams, self.args, self.show, self.average = model, streams, args, show, average
        self.weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
        groups = model.parameter_groups(args.weight_decay)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = optimizer or torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps,
                                                        fused=model.device.type == "cuda")
        self.out, self.step, self.seen, self.stop = Path(args.out), 0, 0, None
        self.skipped = set()

    # ---- checkpoints: weights in the released layout, and beside them what a resume needs -----------------------------

    def save(self):
        """out/checkpoint-<step>, written under another name and renamed; the two newest are kept."""
        if world()[0] == 0:
            with atomic(self.out / f"checkpoint-{self.step:06d}") as folder:
                folder.mkdir(parents=True)
                self.model.save_pretrained(folder)
                torch.save({"step": self.step, "seen": self.seen, "optimizer": self.optimizer.state_dict()}, folder / "trainer.pt")
            for old in sorted(self.out.glob("checkpoint-*"))[:-2]:
                shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        """Everything but the weights, which from_pretrained(folder) has read. Random numbers need no state (section 2)."""
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.step, self.seen = state["step"], state["seen"]
        self.optimizer.load_state_dict(state["optimizer"])

    # ---- one step ------------------------------------------------------------------------------------------------------

    def evaluate(self, name, items):
        """One loss on one batch: frozen features (or the cache), then the model's own loss, in bf16 autocast or float32."""
        rng = Rng(self.args.seed, name, self.step, positions=[item["position"] for item in items])
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            features = encode_batch(self.model, items, name, self.streams[name].cache)
            return getattr(self.model, f"{name}_loss")(features, [item["text"] for item in items], rng=rng)

    def take_step(self, loaders):
        """Equation (3), its gradients, and every `accum` steps a move of the weights. Returns the numbers for the log."""
        args, (rank, ranks) = self.args, world()
        torch.manual_seed(stable_seed(args.seed, "dropout", self.step, rank))
        items = {name: next(loader) for name, loader in loaders.items()}
        losses = {name: functools.partial(self.evaluate, name, batch) for name, batch in items.items()}
        _, values = objective(losses, self.weights, backward=lambda loss: (loss / args.accum).backward())
        # One transfer per step: the losses of all ranks, and whether any rank was asked to stop.
        numbers = torch.stack([*values.values(), torch.tensor(float(self.stop is not None), device=self.model.device)]).float()
        if ranks > 1:
            dist.all_reduce(numbers)
            numbers /= ranks
        *numbers, stop = numbers.tolist()
        row = {"step": self.step + 1, "loss": sum(self.weights[n] * v for n, v in zip(values, numbers)), **dict(zip(values, numbers))}
        if not math.isfinite(row["loss"]):
            names = [item["name"] for batch in items.values() for item in batch]
            raise InputError(f"the loss is {row['loss']} at step {self.step + 1} on {', '.join(names[:8])}: stopped; "
                             f"the last good checkpoint is kept in {self.out} (try a lower --lr or --precision fp32)")
        row["skipped"] = sorted({s for batch in items.values() for item in batch for s in item["skipped"]} - self.skipped)
        self.skipped.update(row["skipped"])
        if (self.step + 1) % args.accum == 0:
            self.average(self.parameters)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.clip or float("inf"))
            row["lr"] = learning_rate((self.step + 1) // args.accum - 1, args.lr, args.warmup, args.horizon)
            row["grad_norm"] = norm.item()
            if not math.isfinite(row["grad_norm"]):
                raise InputError(f"the gradient is not finite at step {self.step + 1}: stopped; the last good checkpoint is kept in {self.out}")
            for group in self.optimizer.param_groups:
                group["lr"] = row["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seen += args.batch * ranks
        return row, stop > 0

    # ---- the loop ------------------------------------------------------------------------------------------------------

    def train(self):
        args, first = self.args, self.step
        main_process = world()[0] == 0
        self._trim_log()
        handlers = {number: signal.signal(number, lambda number, _: setattr(self, "stop", signal.Signals(number).name))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        loaders = {n: s.batches(self.seen, args.batch, args.workers) for n, s in self.streams.items() if self.weights[n] != 0}
        boundary = (self.step, self.seen)                                # where the weights moved last
        began, log = time.time(), open(self.out / "log.jsonl", "a") if main_process else None
        bar = tqdm(total=args.steps, initial=first, unit="step", dynamic_ncols=True, disable=not main_process, desc="RecA")
        try:
            while self.step < args.steps:
                row, stop = self.take_step(loaders)
                updated = self.step % args.accum == 0
                boundary = (self.step, self.seen) if updated else boundary
                row["images_per_s"] = round((self.step - first) * args.batch * world()[1] / (time.time() - began), 3)
                if main_process:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    bar.set_postfix({n: f"{row[n]:.4f}" for n in ("recon", "i2t", "t2i") if n in row} | {"img/s": row["images_per_s"]})
                    bar.update()
                    for name in row["skipped"]:
                        bar.write(f"skipped: {name}")
                if self.show and self.step % args.sample_every == 0 and self.step < args.steps:
                    self.show(self.step)
                if stop:
                    break
                if updated and self.step % args.save_every < args.accum and self.step < args.steps:
                    self.save()
        finally:
            for loader in loaders.values():                         # its workers ignore signals, so they are told to end
                getattr(loader, "_shutdown_workers", lambda: None)()
            for number, handler in handlers.items():                # scoring and inference may be interrupted as usual
                signal.signal(number, handler)
        bar.close()
        # In the middle of an accumulation the weights are still those of their last move: a resumed run goes on from there.
        finished, (self.step, self.seen) = self.step >= args.steps, boundary
        self.save()
        if main_process:
            log.close()
            draw_losses(self.out)
            if self.skipped:
                print(f"{len(self.skipped)} unreadable images were skipped (named in {self.out / 'log.jsonl'})")
        if not finished:
            print(f"stopped by {self.stop or 'another rank'} at step {self.step}, saved; go on with --resume --out {self.out}")
            sys.exit(0)

    def _trim_log(self):
        """After a kill the log may be ahead of the checkpoint, or end in half a line: keep what the checkpoint knows."""
        path = self.out / "log.jsonl"
        if world()[0] == 0 and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= self.step]
            with atomic(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))


def draw_losses(out):
    """out/log.jsonl -> out/loss.png: every loss over the steps, smoothed, in a plain PIL drawing."""
    rows = read_json(out / "log.jsonl", lines=True)
    if not rows:
        return
    image = Image.new("RGB", (900, 420), "white")
    draw, names = ImageDraw.Draw(image), [n for n in ("recon", "i2t", "t2i") if n in rows[-1]]
    left, top, right, bottom = 70, 30, 880, 380
    curves = {n: np.convolve([r[n] for r in rows], np.ones(w := min(len(rows), 1 + len(rows) // 20)) / w, "valid") for n in names}
    low, high = min(c.min() for c in curves.values()), max(c.max() for c in curves.values())
    draw.rectangle((left, top, right, bottom), outline="gray")
    for value, y in ((high, top), ((low + high) / 2, (top + bottom) / 2), (low, bottom)):
        draw.text((8, y - 6), f"{value:.3g}", fill="black")
    draw.text((left, bottom + 10), f"step {rows[0]['step']}", fill="black")
    draw.text((right - 70, bottom + 10), f"step {rows[-1]['step']}", fill="black")
    for k, (name, curve) in enumerate(curves.items()):
        color = ("#c0392b", "#2471a3", "#1e8449")[k]
        xs, ys = np.linspace(left, right, len(curve)), bottom - (curve - low) / max(high - low, 1e-9) * (bottom - top)
        draw.line(list(zip(xs, ys)) if len(curve) > 1 else [(left, ys[0]), (right, ys[0])], fill=color, width=2)
        draw.text((left + 10 + 90 * k, 10), name, fill=color)
    with atomic(out / "loss.png") as path:
        image.save(path)


def grid(rows, titles=(), cell=192):
    """Rows of PIL images (equal lengths) -> one picture, a title above each column."""
    columns, header = max(map(len, rows)), 18 if titles else 0
    sheet = Image.new("RGB", (columns * (cell + 4), header + len(rows) * (cell + 4)), "lightgray")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(titles):
        draw.text((c * (cell + 4) + 4, 3), title, fill="black")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            image = image.resize((cell, cell), Image.NEAREST if image.width < cell else Image.BICUBIC)
            sheet.paste(image, (c * (cell + 4), header + r * (cell + 4)))
    return sheet


# ======================================================================================================
# 6. Inference on files
# ======================================================================================================


def prompt_jobs(source, out, images):
    """A prompt source -> [(prompt, [paths of its images], metadata or None)] in the layout that the benchmark's scorer expects.

    FILE.txt    a prompt a line                                     -> out/00000.png, or out/00000_0.png .. with several images
    FILE.jsonl  GenEval's evaluation_metadata.jsonl                 -> out/00000/metadata.jsonl, out/00000/samples/00000.png ..
    FILE.json   WISE (Prompt, prompt_id)                            -> out/<prompt_id>.png
                T2I-CompBench (Question, Category, Question_id)     -> out/<Category>/<Question_id>.png
    FOLDER      DPG-Bench, a prompt a <name>.txt                    -> out/<name>.png, a 2x2 grid of four images
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise InputError(f"no such prompt file or folder: {source}")
    if source.is_dir():
        files = sorted(source.glob("*.txt"))
        jobs = [(f.read_text(encoding="utf-8").strip(), [out / f"{f.stem}.png"], "grid") for f in files]
    elif source.suffix in (".jsonl", ".json"):
        rows = read_json(source, lines=source.suffix == ".jsonl")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{source} is not a list of prompts (GenEval's .jsonl; WISE's or T2I-CompBench's .json)")
        if source.suffix == ".jsonl":
            jobs = [(row.get("prompt"), [out / f"{i:05d}" / "samples" / f"{k:05d}.png" for k in range(images)], row)
                    for i, row in enumerate(rows)]
        else:
            names = [f"{row.get('Category', '')}/{row['Question_id']}" if "Question_id" in row else row.get("prompt_id") for row in rows]
            jobs = [(row.get("Prompt", row.get("Question")), [inside(out, f"{name}.png".lstrip("/"))], None) for row, name in zip(rows, names)]
    else:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        jobs = [(line, [out / (f"{i:05d}.png" if images == 1 else f"{i:05d}_{k}.png") for k in range(images)], None)
                for i, line in enumerate(lines)]
    if not jobs or any(not isinstance(prompt, str) or not prompt for prompt, _, _ in jobs):
        raise InputError(f"{source}: " + ("row " + str([not p for p, _, _ in jobs].index(True) + 1) + " has no prompt" if jobs else "no prompt"))
    return jobs


def generate_files(model, args):
    """--generate: image k of a prompt has seed `--seed` + k, whatever it shares a batch with, so a rerun may skip what is there."""
    todo = []                                                                     # (prompt, seed, path, position in its job)
    jobs = prompt_jobs(args.generate, args.out, args.images)
    for prompt, paths, metadata in jobs:
        if isinstance(metadata, dict) and not (folder := paths[0].parent.parent).joinpath("metadata.jsonl").exists():
            with atomic(folder / "metadata.jsonl") as path:
                path.write_text(json.dumps(metadata))
        count = 4 if metadata == "grid" else len(paths)
        missing = [k for k in range(count) if not paths[min(k, len(paths) - 1)].exists()]
        todo += [(prompt, args.seed + k, paths[min(k, len(paths) - 1)], k if metadata == "grid" else None) for k in missing]
    quarters = {}
    batch = -(-args.batch_images // 4) * 4                                        # a grid is never split over two batches
    for start in tqdm(range(0, len(todo), batch), desc="generate", unit="batch", dynamic_ncols=True):
        chunk = todo[start:start + batch]
        for image, (_, _, path, quarter) in zip(model.generate([c[0] for c in chunk], seed=[c[1] for c in chunk],
                                                               **sampler_options(args)), chunk):
            if quarter is not None:                                               # DPG-Bench: four samples, row by row
                quarters.setdefault(path, []).append(image)
                if len(quarters[path]) < 4:
                    continue
                side, parts = image.width, quarters.pop(path)
                image = Image.new("RGB", (2 * side, 2 * side))
                for k, part in enumerate(parts):
                    image.paste(part, (side * (k % 2), side * (k // 2)))
            with atomic(path) as temporary:
                image.save(temporary)
    print(f"{len(todo)} images generated for {len(jobs)} prompts in {args.out}")


def sampler_options(args):
    """The sampler's settings that were given on the command line; the others keep the script's (the paper's) defaults."""
    return {k: v for k, v in {"guidance_scale": args.guidance_scale, "num_steps": args.sampling_steps}.items() if v is not None}


def reconstruct_files(model, args):
    """--reconstruct DIR: out/<name>.png for each image: what the model paints when it is given only its own understanding of it."""
    images, out = Images(args.reconstruct), Path(args.out)
    paths = [inside(out, Path(images.name(i)).with_suffix(".png")) for i in range(len(images))]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    pairs = []
    for start in tqdm(range(0, len(todo), args.batch_images), desc="reconstruct", unit="batch", dynamic_ncols=True):
        chunk = [(try_image(images.name(i), images[i][1]), paths[i]) for i in todo[start:start + args.batch_images]]
        chunk = [(image, path) for image, path in chunk if image is not None]
        if chunk:
            for (source, path), image in zip(chunk, model.reconstruct([c[0] for c in chunk], seed=[args.seed] * len(chunk),
                                                                      **sampler_options(args))):
                with atomic(path) as temporary:
                    image.save(temporary)
                pairs.append((source.resize((256, 256)), image))
    if pairs:
        with atomic(out / "reconstructions.png") as path:
            grid(pairs[:16], titles=("input", "reconstruction")).save(path)
    print(f"{len(pairs)} images reconstructed in {out}")


def describe_files(model, args):
    """--describe: a folder of images, or a question file (.jsonl: question_id, image, text; images beside it or in --i2t-images).

    Writes out/answers.jsonl, one {"question_id", "image", "question", "answer"} a line; a rerun goes on where it stopped.
    """
    source, out = Path(args.describe), Path(args.out)
    if source.is_dir():
        images = Images(source)
        rows = [(images.name(i), Path(images.name(i)).name, args.question, lambda i=i: images[i][1]) for i in range(len(images))]
    else:
        folder = Path(args.i2t_images or source.parent)
        table = read_json(source, lines=source.suffix == ".jsonl")
        if any(not isinstance(row, dict) or "image" not in row or not ("text" in row or "question" in row) for row in table):
            raise InputError(f"{source}: every row needs \"image\" and \"text\" (the question)")
        rows = [(row.get("question_id", row.get("id", k)), Path(row["image"]).name, row.get("text", row.get("question")),
                 lambda row=row: folder / row["image"]) for k, row in enumerate(table)]
    path = out / "answers.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    done = {json.dumps(json.loads(line)["question_id"]) for line in lines}
    with atomic(path) as temporary:                                                 # a half-written last line is dropped
        temporary.write_text("".join(line + "\n" for line in lines))
    rows, answered = [row for row in rows if json.dumps(row[0]) not in done], 0
    with open(path, "a", encoding="utf-8") as file:
        rows.sort(key=lambda row: row[2])                                           # one batch has one question
        start, bar = 0, tqdm(total=len(rows), desc="describe", unit="image", dynamic_ncols=True)
        while start < len(rows):
            chunk = [row for row in rows[start:start + args.batch_images] if row[2] == rows[start][2]]
            start += len(chunk)
            readable = [(name, image, picture) for name, image, _, read in chunk if (picture := try_image(image, read())) is not None]
            if readable:
                question = chunk[0][2]
                answers = model.describe([r[2] for r in readable], question=question, max_new_tokens=args.max_new_tokens)
                for (name, image, _), answer in zip(readable, answers):
                    file.write(json.dumps({"question_id": name, "image": image, "question": question, "answer": answer}) + "\n")
                    answered += 1
                file.flush()
            bar.update(len(chunk))
    print(f"{answered} answers in {path}")


def describe_first(model, images, path, count, question, batch, max_new_tokens):
    """L_i2t without I2T data: before any update the model describes `count` training images; these descriptions are its targets.

    This is our addition, not the paper's (which uses LLaVA-1.5's 665K conversations): it holds the model to what it said before
    RecA, as a distillation from itself, so understanding cannot drift away while generation learns. Kept in --out.
    """
    if not path.exists() and world()[0] == 0:                       # a resumed run must not ask the model that RecA has changed
        order = np.random.default_rng(stable_seed("describe", len(images))).permutation(len(images))[:count].tolist()
        bar = tqdm(total=len(order), desc="the model describes its images (targets of L_i2t)", unit="image", dynamic_ncols=True)
        rows = []
        for start in range(0, len(order), batch):
            chunk = [(i, try_image(*images[i][:2])) for i in order[start:start + batch]]
            chunk = [(i, image) for i, image in chunk if image is not None]
            answers = model.describe([c[1] for c in chunk], question=question, max_new_tokens=max_new_tokens) if chunk else []
            rows += [{"index": i, "question": question, "answer": a} for (i, _), a in zip(chunk, answers) if a.strip()]
            bar.update(len(order[start:start + batch]))
        bar.close()
        if not rows:
            raise InputError("the model describes none of the images: give --i2t-data, or --lambda-i2t 0")
        with atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if dist.is_initialized():
        dist.barrier()
    return SelfDescriptions(images, path)


# ======================================================================================================
# 7. The toy world
# ======================================================================================================
# 2 x 2 cells; 1 to 3 of them hold a shape (4 kinds, no kind twice) in one of 8 colors. Everything in a picture can be said in
# words, and every picture can be read back exactly: by comparing each cell with the 32 things it could hold. So what
# a benchmark's detector estimates at full size is known here without error.

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40),
          "purple": (140, 50, 170), "cyan": (60, 200, 220), "orange": (245, 140, 30), "black": (20, 20, 20)}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")


@functools.lru_cache(None)
def _cell(size):
    """All things a cell can hold, drawn: float32 [1 + 32, size, size, 3] in [0, 255]; index 0 is the empty cell."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    masks = (x * x + y * y < 0.56, np.maximum(abs(x), abs(y)) < 0.68, (y < 0.7) & (y > 2 * abs(x) - 0.75),
             (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.75))
    cells = [np.full((size, size, 3), 255.0)]
    for mask in masks:
        for color in COLORS.values():
            cells.append(np.where(mask[..., None], np.array(color, float), 255.0))
    return np.stack(cells).astype(np.float32)


def random_scene(rng, objects=None):
    """A list of (place, shape, color), indices, in the order of the places. objects: how many (default 1 to 3)."""
    objects = objects or int(rng.integers(1, 4))
    places = sorted(rng.choice(4, objects, replace=False).tolist())
    return list(zip(places, rng.choice(4, objects, replace=False).tolist(), rng.integers(8, size=objects).tolist()))


def draw_scene(scene, size=64):
    """-> PIL RGB size x size."""
    half = size // 2
    canvas = np.full((size, size, 3), 255.0, np.float32)
    for place, shape, color in scene:
        row, column = divmod(place, 2)
        canvas[row * half:(row + 1) * half, column * half:(column + 1) * half] = _cell(half)[1 + shape * 8 + color]
    return Image.fromarray(canvas.astype(np.uint8))


def read_scene(image):
    """PIL -> the scene that it shows. A cell that is near nothing (root mean square distance over 0.2) holds (place, None, None)."""
    size = image.width - image.width % 2
    pixels, half, scene = np.asarray(image.convert("RGB").resize((size, size)), np.float32), size // 2, []
    for place in range(4):
        row, column = divmod(place, 2)
        cell = pixels[row * half:(row + 1) * half, column * half:(column + 1) * half]
        distance = np.sqrt(((_cell(half) - cell) ** 2).mean((1, 2, 3))) / 255
        best = int(distance.argmin())
        if distance[best] > 0.2:
            scene.append((place, None, None))
        elif best:
            scene.append((place, *divmod(best - 1, 8)))
    return scene


def caption(scene, p=1.0, rng=None):
    """The scene in words. p = 1: everything ("red circle top-left and ..."); else color and place are named with probability p each
    (rng needed): the sparse captions that the paper says generation is brought up on."""
    def say(chance):
        return chance >= 1 or rng.random() < chance
    return " and ".join(" ".join(([list(COLORS)[color]] if say(p) else []) + [SHAPES[shape]] + ([PLACES[place]] if say(p) else []))
                        for place, shape, color in scene)


class Shapes:
    """Rows of the toy world, drawn when asked for: `count` scenes from `seed`. captions: None, or a p for caption()."""

    def __init__(self, size=64, count=20000, seed=0, captions=None, dialogue=False):
        self.size, self.count, self.seed, self.captions, self.dialogue = size, count, seed, captions, dialogue

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        scene = random_scene(rng)
        text = None if self.captions is None else caption(scene, self.captions, rng)
        return f"shapes {i}", draw_scene(scene, self.size), [(SEED_TEMPLATE, text)] if self.dialogue else text


def score_generations(scenes, images):
    """GenEval's questions, asked of pictures that prompts with full captions made: a fraction of pictures each.

    single_object, colors: prompts about one object (its shape is there; with its color). two_object, position, color_attribution: prompts
    about two (both shapes are there; at their places; each with its own color).
    """
    tests = {"single_object": (1, 0, 0), "two_object": (2, 0, 0), "colors": (1, 0, 1), "position": (2, 1, 0), "color_attribution": (2, 0, 1)}
    scores = {}
    for name, (objects, place, color) in tests.items():
        def seen(scene):
            return {(o[1], o[0] if place else 0, o[2] if color else 0) for o in scene if o[1] is not None}
        cases = [(scene, image) for scene, image in zip(scenes, images) if len(scene) == objects]
        scores[name] = sum(seen(scene) <= seen(read_scene(image)) for scene, image in cases) / max(1, len(cases))
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def score_toy(model, size, count, seed, options):
    """{"reconstruction": ..., "single_object": ..., ..., "overall": ...} on held-out scenes. reconstruction: the fraction of images whose every
    shape, color and place comes back from the model's own understanding embeddings."""
    rng = np.random.default_rng((seed, 999_999))                                    # no training scene has this generator
    scenes = [random_scene(rng) for _ in range(count)]
    seeds = list(range(seed * 1000, seed * 1000 + count))
    pictures = model.reconstruct([draw_scene(s, size) for s in scenes], seed=seeds, **options)
    reconstruction = sum(read_scene(p) == s for s, p in zip(scenes, pictures)) / count
    prompts = [random_scene(rng, 1 + k % 2) for k in range(count)]
    images = model.generate([caption(s) for s in prompts], seed=seeds, **options)
    return {"reconstruction": reconstruction, **score_generations(prompts, images)}


def tiny_tokenizer(special_tokens=()):
    """A word-level tokenizer for the tiny models: the toy world's words, the templates' words, the prompts' words; other words are [UNK].

    special_tokens: the architecture's own markers, in the order of their ids behind the words. Newlines are tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pattern = r"\n|[\w-]+|[^\s\w]"
    text = " ".join([*templates(), *SHAPES, *COLORS, *PLACES, "and user assistant system generate an image : , . ? ! \n",
                     "a chat between curious artificial intelligence gives helpful detailed polite answers to questions s '"])
    words = list(dict.fromkeys(re.findall(pattern, text.lower())))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def toy_stage(title, parameters, loss, steps, lr=1e-3, batch=32, warmup=20):
    """One stage of a tiny model's pretraining: `steps` of AdamW on loss(positions) with a warm-up and a cosine to a tenth. Used by the scripts."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    bar = tqdm(range(steps), desc=f"toy pretraining: {title}", unit="step", dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, min(warmup, steps // 4), 0) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        value = loss(range(step * batch, (step + 1) * batch))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{value.item():.4f}")


# ======================================================================================================
# 8. The command line
# ======================================================================================================


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def parse_args(description, recipes, default, argv=None, extend=None):
    """The flags of DESIGN.md. recipes: {model name: the script's Recipe dataclass}; whatever is not given on the command line is taken
    from the recipe of the chosen model. extend(parser): adds the flags that only one architecture has."""
    paper = recipes[default]
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def flag(group, name, kind, text, default=None, **more):
        group.add_argument(name, type=kind, default=default, help=text, **more)

    def count(text):
        value = int(text)
        if value < 0:
            raise ValueError
        return value

    def positive(text):
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    g = parser.add_argument_group("what")
    flag(g, "--model", str, f"a released model ({', '.join(recipes)}), a hub id, a folder, or tiny (default {default})", default)
    flag(g, "--data", str, "folder of images, .tar (WebDataset), or shapes (the toy world). Paper: 120K Midjourney-v6 images, app. E")
    flag(g, "--out", str, "folder of the run (default out/<script>-<model>)")
    g.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, to the same numbers")
    g = parser.add_argument_group("training (defaults: the paper's Table 8, in our steps)")
    flag(g, "--steps", count, f"evaluations of equation (3); 0: inference only (default {paper.steps})")
    flag(g, "--batch", positive, f"images of one loss in a step, per GPU (default {paper.batch})")
    flag(g, "--accum", positive, f"steps per weight update (default {paper.accum})")
    flag(g, "--lr", float, f"peak learning rate (default {paper.lr})")
    flag(g, "--warmup", count, f"weight updates of linear warm-up (default {paper.warmup})")
    flag(g, "--horizon", count, f"weight update at which the cosine reaches 0; 0: constant (default {paper.horizon})")
    flag(g, "--weight-decay", float, f"of AdamW (default {paper.weight_decay})")
    flag(g, "--clip", float, f"limit of the gradient's norm; 0: none (default {paper.clip})")
    flag(g, "--seed", int, "of every random number (default 0)", 0)
    flag(g, "--precision", str, "bf16 (autocast, float32 master weights; default on a GPU) or fp32 (default on a CPU)", choices=("bf16", "fp32"))
    g.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks")
    g.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward: less memory, about a third more time")
    flag(g, "--lambda-recon", float, f"weight of L_recon in equation (3) (default {paper.lambda_recon})")
    flag(g, "--lambda-i2t", float, f"weight of L_i2t (default {paper.lambda_i2t}: 1 where understanding and generation share parameters)")
    flag(g, "--lambda-t2i", float, f"weight of L_t2i (default {paper.lambda_t2i}; 1 where --captions is given)")
    flag(g, "--i2t-data", str, "LLaVA-style .json/.jsonl for L_i2t (paper: LLaVA-1.5 mix 665K); shapes: full captions of the toy world")
    flag(g, "--i2t-images", str, "folder of its images (default: the folder of the file)")
    flag(g, "--self-captions", positive, "without --i2t-data: how many training images the model describes for L_i2t, before any update. Our addition (default 1024)", 1024)
    flag(g, "--captions", str, ".jsonl of {image, caption} for L_t2i: SFT (with --lambda-recon 0) or RecA beside SFT; shapes: full or sparse")
    flag(g, "--cache", str, "folder: what the frozen parts compute for an image is kept there (crops become deterministic)")
    flag(g, "--workers", count, "processes that decode images (default: by the number of cores)")
    flag(g, "--save-every", positive, "steps between checkpoints (default 500)", 500)
    flag(g, "--sample-every", positive, "steps between preview pictures (default 250)", 250)
    flag(g, "--pretrain", float, "tiny only: length of the toy pretraining, as a fraction (default 1.0; 0.01 to try the mechanics)", 1.0)
    g = parser.add_argument_group("the paper's ablations")
    flag(g, "--und-size", positive, "side of the image given to the understanding encoder (paper section 3: the smallest it accepts)")
    flag(g, "--blur", positive, "shrink that image by this factor and enlarge it again (app. F.2)")
    flag(g, "--templates", str, "all 360, or the one seed template", "all", choices=("all", "one"))
    g = parser.add_argument_group("inference (after training; alone with --steps 0)")
    flag(g, "--generate", str, "prompts: .txt, GenEval .jsonl, WISE/T2I-CompBench .json, or a folder of DPG-Bench .txt")
    flag(g, "--images", positive, "images per prompt (default 1; GenEval 4, the paper's starred rows 12)", 1)
    flag(g, "--reconstruct", str, "folder of images to reconstruct from their understanding embeddings")
    flag(g, "--describe", str, "folder of images, or a question file (.jsonl)")
    flag(g, "--question", str, "for a --describe folder", SEED_TEMPLATE)
    flag(g, "--max-new-tokens", positive, "of a description (default 256)", 256)
    flag(g, "--batch-images", positive, "images of one inference batch (default 8)", 8)
    flag(g, "--guidance-scale", float, "of the sampler (default: the paper's)")
    flag(g, "--sampling-steps", positive, "of the sampler (default: the paper's)")
    parser.add_argument("--bench", action="store_true", help="time full-size steps with random weights: images/s, MFU, peak memory; downloads nothing")
    if extend:
        extend(parser)
    args = parser.parse_args(argv)
    recipe = recipes.get(args.model, paper)
    if args.captions and args.lambda_t2i is None:
        args.lambda_t2i = 1.0
    for name, value in vars(recipe).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    cuda, tiny = torch.cuda.is_available(), args.model.startswith("tiny")
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    args.data = args.data or ("shapes" if tiny else None)
    args.out = args.out or f"out/{Path(sys.argv[0]).stem}-{Path(args.model).name}"
    if args.workers is None:
        args.workers = 0 if args.data == "shapes" else min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1)) - 1))
    if args.lambda_t2i and not args.captions:
        raise InputError("--lambda-t2i needs --captions FILE")
    if 0 < args.steps < args.accum and not args.bench:
        raise InputError(f"--steps {args.steps} is less than --accum {args.accum}: the weights would never move")
    if args.steps and not args.data and not args.bench:
        raise InputError("--data is missing: give a folder of images (or --model tiny, which draws its own; or --steps 0 for inference only)")
    return args


def build_rows(args):
    """The rows of each loss whose λ is not 0; those of L_i2t without data come later (they need the model). InputError for bad files."""
    toy = args.data == "shapes"
    rows = {}
    if args.lambda_recon or (args.lambda_i2t and not args.i2t_data):
        rows["recon"] = Shapes(seed=args.seed) if toy else Images(args.data)
    if args.lambda_i2t and args.i2t_data:
        rows["i2t"] = Shapes(seed=args.seed, captions=1.0, dialogue=True) if args.i2t_data == "shapes" else Conversations(args.i2t_data, args.i2t_images)
    if args.lambda_t2i:
        p = {"full": 1.0, "sparse": 0.1}.get(args.captions) if toy else None
        rows["t2i"] = Captions(args.captions) if p is None else Shapes(seed=args.seed, captions=p)
    return rows


def start_process(args):
    """-> the device; under torchrun also the process group (NCCL on GPUs, gloo on CPUs)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # Rank 0 describes images, paints previews and writes checkpoints while the others wait: longer than the usual 10 minutes.
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=4))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def toy_folder(model_class, args, pretrain):
    """The pretrained tiny model, in the released layout: made once, kept in ~/.cache/reca (XDG_CACHE_HOME) under a hash of the code."""
    code = Path(sys.modules[model_class.__module__].__file__).read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(code + repr((args.model, args.pretrain, args.seed)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reca" / f"{args.model}-{model_class.__name__.lower()}-{key}"
    if not folder.exists() and world()[0] == 0:
        model = model_class.from_pretrained(args.model)
        model.train()
        pretrain(model, args.pretrain, args.seed)
        with atomic(folder) as temporary:
            temporary.mkdir(parents=True)
            model.save_pretrained(temporary)
    if dist.is_initialized():
        dist.barrier()
    return folder


def run(model_class, args, pretrain_toy, prepare=None, trainer=Trainer):
    """main() of every script. prepare(model, args) -> more arguments for the trainer (optimizer, average), and `trainer` a subclass of Trainer,
    for a script that needs them."""
    device = start_process(args)
    if args.bench:
        return bench(model_class, args, device, prepare, trainer)
    out, main_process = Path(args.out), world()[0] == 0
    toy = args.model.startswith("tiny")
    checkpoints = sorted(out.glob("checkpoint-*/trainer.pt"))
    if args.resume and not checkpoints:
        raise InputError(f"nothing to resume: no checkpoint in {out}")
    if args.steps and not args.resume and checkpoints and not toy:
        raise InputError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
    # Bad files fail before anything is downloaded, and not after days of training.
    rows = build_rows(args) if args.steps else {}
    if args.generate:
        prompt_jobs(args.generate, out, args.images)
    if args.reconstruct:
        Images(args.reconstruct)
    if args.describe and not Path(args.describe).exists():
        raise InputError(f"no such folder or question file: {args.describe}")
    source = str(checkpoints[-1].parent) if args.resume else str(toy_folder(model_class, args, pretrain_toy)) if toy else args.model
    training = args.steps > 0
    model = model_class.from_pretrained(source, device=device, dtype=torch.float32 if training or args.precision == "fp32" else torch.bfloat16)
    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "run.json") as path:
            import diffusers
            import transformers
            versions = {m.__name__: m.__version__ for m in (torch, transformers, diffusers, np)}
            path.write_text(json.dumps({"arguments": vars(args), "versions": versions, "python": sys.version.split()[0], "device": str(device)}, indent=1))
    if training:
        post_train(model, args, rows, prepare, trainer, resume=checkpoints[-1].parent if args.resume else None)
    if not main_process:
        return
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        for files, given in ((generate_files, args.generate), (reconstruct_files, args.reconstruct), (describe_files, args.describe)):
            if given:
                files(model, args)


def post_train(model, args, rows, prepare, trainer, resume):
    """RecA: streams, previews, the trainer, and for the toy world the scores before and after."""
    out, toy, main_process, fresh = Path(args.out), args.data == "shapes", world()[0] == 0, resume is None
    size = model.config.image_size
    if fresh and main_process:
        for old in (*out.glob("checkpoint-*"), out / "log.jsonl", out / "previews", out / "scores.json", out / "i2t_self.jsonl"):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if main_process:
        for path in out.glob(".tmp-*"):                                               # what a kill left half-written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for r in rows.values():
        if toy and isinstance(r, Shapes):
            r.size = size
    if args.lambda_i2t and not args.i2t_data:
        if main_process:
            print(f"L_i2t has no data (--i2t-data): the model describes {min(args.self_captions, len(rows['recon']))} of its training images first, and is held to "
                  f"these descriptions, kept in {out / 'i2t_self.jsonl'}. This is our addition; real data or --lambda-i2t 0 are the alternatives.")
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            rows["i2t"] = describe_first(model, rows["recon"], out / "i2t_self.jsonl", args.self_captions, args.question, args.batch_images, args.max_new_tokens)
    if not args.lambda_recon:
        rows.pop("recon", None)
    frozen = [p.detach().flatten()[:4].float().tolist() for p in model.parameters() if not p.requires_grad]     # a fingerprint of what is cached
    settings = {"model": args.model, "frozen": hashlib.sha256(repr(frozen).encode()).hexdigest()[:16], "image_size": size,
                "und_size": args.und_size, "blur": args.blur, "precision": args.precision}
    texts = templates(args.templates)
    streams = {name: Stream(name, r, model.preprocess, args.seed, texts if name == "recon" else None,
                            Cache(args.cache, {**settings, "task": name}) if args.cache else None) for name, r in rows.items()}
    samples = preview_images(rows.get("recon") or next(iter(rows.values())), size, toy)
    options = {"seed": list(range(len(samples))), **sampler_options(args)}
    folder, scores = out / "previews", out / "scores.json"

    def picture():
        """The preview images, reconstructed by the model as it is now."""
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            images = model.reconstruct(samples, **options)
        model.train()
        return images

    def show(step):
        if main_process:
            before = [load_image(str(folder / f"before_{k}.png")) for k in range(len(samples))]
            with atomic(folder / f"step_{step:06d}.png") as path:
                grid(list(zip(samples, before, picture())), ("input", "before RecA", f"step {step}"), cell=max(128, min(256, size))).save(path)

    def score():
        model.eval()
        scores = score_toy(model, size, 128, 7, sampler_options(args))
        model.train()
        return scores

    if main_process and fresh:
        for k, image in enumerate(picture()):
            with atomic(folder / f"before_{k}.png") as path:
                image.save(path)
        if toy:
            with atomic(scores) as path:
                path.write_text(json.dumps({"before": score()}, indent=1))
    trainer = trainer(model, streams, args, show, **(prepare(model, args) if prepare else {}))
    if resume:
        trainer.resume(resume)
    if args.checkpointing:
        checkpoint_blocks(model.blocks())
    if args.compile:
        for block in model.blocks():
            block.compile()
    model.train()
    trainer.train()
    show(trainer.step)
    if toy and main_process:
        table = {**read_json(scores), "after": score()}
        with atomic(scores) as path:
            path.write_text(json.dumps(table, indent=1))
        print(f"\n{'on held-out scenes':<22}{'before':>8}{'after':>8}")
        for name in table["after"]:
            print(f"{name:<22}{table['before'][name]:>8.2f}{table['after'][name]:>8.2f}")
    if main_process:
        print(f"done: {out}/ holds checkpoint-{trainer.step:06d}, loss.png, previews/, log.jsonl" + (", scores.json" if toy else ""))


def preview_images(rows, size, toy, count=6):
    """The first readable images (of the toy world: scenes that are not trained on), as PIL."""
    if toy:
        rng = np.random.default_rng(12345)
        return [draw_scene(random_scene(rng), size) for _ in range(count)]
    images = []
    for index in range(min(len(rows), 100)):
        name, image, _ = rows[index]
        image = image and try_image(name, image)                                    # None: a conversation without an image
        images += [image] if image else []
        if len(images) == count:
            break
    if not images:
        raise InputError("none of the first images could be read")
    return images


# Dense bf16 peak of common GPUs, in FLOP/s, for the MFU (their makers' data sheets).
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}


def bench(model_class, args, device, prepare, trainer, warmup=2, timed=8):
    """--bench: full-size steps with random weights and random images; prints one line of figures and returns them as a dict.

    MFU = the FLOPs that the step needs (counted by torch on a step with one image, without recomputation, times the batch) per
    second, over the GPU's dense bf16 peak.
    """
    from torch.utils.flop_counter import FlopCounterMode
    model = model_class.random(args.model, device)
    model.train()
    names = [n for n in ("recon", "i2t", "t2i") if getattr(args, f"lambda_{n}")]
    rng = np.random.default_rng(0)
    words = " ".join(rng.choice([*SHAPES, *COLORS, *PLACES], 80).tolist())           # an answer of the length that LLaVA's have
    texts = {"recon": SEED_TEMPLATE, "i2t": [(SEED_TEMPLATE, words)], "t2i": words}

    def items(name, batch):
        picture = Image.fromarray(rng.integers(0, 255, (640, 512, 3), dtype=np.uint8))
        return [{"name": "random", "text": texts[name], "skipped": [], "position": k, "sample": model.preprocess(picture, name)} for k in range(batch)]

    class Fixed:
        cache = None

    trainer = trainer(model, dict.fromkeys(names, Fixed), args, **(prepare(model, args) if prepare else {}))
    accum, args.accum = args.accum, 10 ** 9
    with FlopCounterMode(display=False) as counter:
        trainer.take_step({name: iter([items(name, 1)]) for name in names})
    flops = counter.get_total_flops() * args.batch
    args.accum = 1                                                                 # timed steps each move the weights: the slowest case
    if args.checkpointing:
        checkpoint_blocks(model.blocks())
    if args.compile:
        for block in model.blocks():
            block.compile()
    model.zero_grad(set_to_none=True)
    data = {name: items(name, args.batch) for name in names}
    cuda, seconds = device.type == "cuda", []
    for k in tqdm(range(warmup + timed), desc="bench", unit="step", dynamic_ncols=True):
        if k == warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        trainer.take_step({name: iter([[{**item} for item in batch]]) for name, batch in data.items()})
        if cuda:
            torch.cuda.synchronize()
        seconds += [time.perf_counter() - began] if k >= warmup else []
    args.accum, step = accum, float(np.median(seconds))
    import resource
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    card = torch.cuda.get_device_name() if cuda else "CPU"
    known = next((value for name, value in PEAK.items() if name in card), None)
    figures = {"model": args.model, "device": card, "batch": args.batch, "losses": names, "compile": args.compile, "checkpointing": args.checkpointing,
               "step_s": round(step, 4), "images_per_s": round(args.batch / step, 3), "tflops_per_step": round(flops / 1e12, 3),
               "mfu": round(flops / step / known, 4) if known else None, "peak_memory_gb": round(peak / 2 ** 30, 3),
               "trainable_parameters": sum(p.numel() for p in trainer.parameters), "parameters": sum(p.numel() for p in model.parameters())}
    print(json.dumps(figures))
    return figures
