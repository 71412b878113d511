"""What the four RecA scripts share. A script hands over a model with the losses `recon_loss`, `i2t_loss`, `t2i_loss`;
this file, which knows no architecture, does the rest. *What is trained* stands there, *how a step is taken* here:

  1. errors and files      2. random numbers      3. templates and images      4. data (rows, streams, the cache)
  5. training (equation (3), the loop)      6. inference on files      7. the toy world      8. the command line

What a script provides (to write one for another architecture, start from the nearest of the four):

  Model.from_pretrained(source, device=, dtype=)     source: hub id, folder, or a key of RECIPES
  Model.random(name, device)                         full size without a download, for --bench
  .save_pretrained(folder)   .parameter_groups(weight_decay) for AdamW   .blocks() to compile and checkpoint
  .config.image_size         .device     .set_und(size=, blur=)  --und-size, --blur
  .preprocess(image, task, rng)      PIL RGB (None: a text without image; ValueError skips the row) -> CPU tensors of
                                     one image. task: recon, i2t, t2i. rng: numpy Generator for crops, None: central
  .encode(samples, task)             what FROZEN parts say of each image, a dict each: runs without a graph, and is all
                                     that --cache stores; whatever is trained belongs into the loss
  .recon_loss(features, templates, draws=None, rng=None), .i2t_loss(features, conversations, ...), .t2i_loss(features,
        captions, ...)               -> scalar, global_mean(sum, count). rng: an Rng of section 2; draws: replay these
  .generate(prompts, seed=, guidance_scale=, num_steps=)   .reconstruct(images, seed=, ...)   .describe(images,
        question=, max_new_tokens=)  seed: an int, or one per image. What the command line does not give is not passed
  Recipe       the dataclass whose fields are the defaults of the flags with the same names

Legend of the shape comments: B images in a batch, H W pixels.
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ==== 1. Errors and files =============================================================================

class InputError(Exception):
    """Something the user gave cannot work. The message is one line: what is wrong, and what to do."""

def cli(main):
    """Run `main()`; an InputError, or a batch that does not fit, becomes one line on stderr and exit code 2."""
    try:
        main()
        if dist.is_initialized():
            # The ranks end together, and past Python's own exit: there gloo's threads, which still hold tensors, abort
            # a rank now and then ("terminate called without an active exception", torch 2.13); torchrun stops all then.
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except (InputError, torch.OutOfMemoryError) as error:
        full = ("the batch does not fit into the GPU's memory: lower --batch (and raise --accum) or add "
                "--checkpointing; for inference lower --batch-images")
        print(f"error: {error if isinstance(error, InputError) else full}", file=sys.stderr)
        sys.exit(2)

def brief(error):
    """The first line of an exception, without the addresses of objects (<... at 0x7f...>)."""
    return (str(error).split(" <")[0].splitlines() or [type(error).__name__])[0][:120]

def remove(path):
    """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

@contextlib.contextmanager
def atomic(path):
    """with atomic("a/b.png") as temporary: image.save(temporary)

    Write to a temporary neighbour, then rename: `path` is either absent, old, or complete, also after a kill. Works for
    files and for folders (make the folder `temporary` yourself); the suffix is kept.
    """
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:         # a full disk, a read-only folder; torch and safetensors have errors of their own
        own = "inline_container" in str(error) or type(error).__name__ == "SafetensorError"
        if own or isinstance(error, OSError):
            raise InputError(f"cannot write {path}: {brief(error)}") from error
        raise
    finally:
        remove(temporary)

def write(path, content):
    """A PIL image, a text, the rows of a .jsonl, or what a .json shall hold -> the file, atomically."""
    with atomic(path) as temporary:
        if isinstance(content, Image.Image):
            content.save(temporary)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        elif temporary.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            temporary.write_text(json.dumps(content, indent=1, default=str, allow_nan=False))

def inside(folder, name):
    """folder / name, for a name that comes from a file or an archive. InputError where it leads out of the folder."""
    path = Path(folder) / name
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{name} leads out of {folder}: not written")
    return path

def read_json(path, lines=False):
    """A JSON file, or (lines=True) a .jsonl file as a list of its objects. InputError names the malformed line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    rows, parts = [], text.split("\n") if lines else [text]  # not splitlines: it also cuts at U+2028, which JSON allows
    for number, part in enumerate(parts):
        try:
            rows += [json.loads(part)] if part.strip() or not lines else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number + error.lineno} is not JSON ({error.msg})") from error
    return rows if lines else rows[0]

def mend_lines(path, keep=lambda row: True):
    """The rows of a .jsonl that runs append to, [] if there is none. Removes what a kill cut off or `keep` refuses."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [row for row in map(json.loads, lines) if keep(row)]
    write(path, rows)
    return rows

def hub_folder(source, patterns):
    """A local folder with `source` (a path, or a hub id "owner/name"): itself, or a download of the files that match
    the glob patterns. Weights are fetched, code is never executed. InputError where neither is to be had."""
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InputError(f"no such model: {source} (give a hub id like owner/name, a folder, or tiny)")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:        # the hub raises dozens of types: offline, not found, gated, time-out, proxy ...
        raise InputError(f"cannot get {source} from the Hugging Face hub ({type(error).__name__}): check the name "
                         "and the network, or give --model DIR with the files, or try --model tiny") from error

def tiny_folder(name):
    """The shipped tiny model `name`: a folder beside this file, in the released layout. InputError if
    it is not there."""
    folder = Path(__file__).resolve().parent / "tiny" / name
    if not any(folder.glob("*.json")):
        raise InputError(f"no tiny model in {folder}: copy the folder tiny/ of the repository to where "
                         f"the script lies, or make the model: python tiny/pretrain.py {name}")
    return folder


def load_state(path):
    """A checkpoint file -> a flat dict of CPU tensors: .safetensors, an .index.json of shards, or a torch file, which
    is read with weights_only=True (a downloaded file cannot run code); wrappers like {"state_dict": ...} are opened."""
    path = Path(path)
    try:
        if path.name.endswith(".index.json"):
            shards = sorted({Path(shard).name for shard in json.loads(path.read_text())["weight_map"].values()})
            return {key: value for shard in shards for key, value in load_state(path.with_name(shard)).items()}
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:      # truncated, not a checkpoint, or a pickle with code in it: one line for all of them
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: {brief(error)})") from error
    for wrapper in ("state_dict", "model", "module"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return {key: value for key, value in state.items() if torch.is_tensor(value)}

def find_checkpoint(source, released, kinds, beside):
    """The file with the weights. source: a key of released ({name: "owner/name:FILE"}), a file, or a folder or hub id,
    with ":FILE" where it holds several. kinds: lists of glob patterns, the first list that matches anything counts;
    beside: patterns of what else a download needs. InputError where there is not exactly one."""
    source, file = released.get(source, source), ""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        source, _, file = source.partition(":")
    if not file and source in [place.partition(":")[0] for place in released.values()]:
        raise InputError(f"{source} holds several models: give one of {', '.join(released)}, or {source}:FILE")
    kinds = [[file]] if file else kinds
    folder = hub_folder(source, [*itertools.chain(*kinds), *beside])
    for patterns in kinds:
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{folder} holds {len(found)} checkpoints ({found[0].name} ...): give {source}:FILE")
        if found:
            return found[0]
    raise InputError(f"{folder} holds 0 files like {', '.join(itertools.chain(*kinds))}: no checkpoint")

def find_weights(folder, *names):
    """The state dict of the first of `names` in the folder: one file, or shards with an index. InputError if none."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.index.json"):
            if path.exists():
                return load_state(path)
    raise InputError(f"{folder} holds no {' and no '.join(names)}")

def load_strictly(module, state, name):
    """load_state_dict whose InputError names the missing, unexpected or wrongly shaped keys."""
    own = module.state_dict()
    wrong = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    for what, keys in (("lacks", own.keys() - state.keys()), ("has unexpected", state.keys() - own.keys()),
                       ("has other shapes for", wrong)):
        if keys:
            raise InputError(f"{name} {what} {len(keys)} keys: {', '.join(sorted(keys)[:4])}{' ...' * (len(keys) > 4)}")
    module.load_state_dict(state)

def load_tokenizer(folder):
    """The tokenizer in a folder. Where it was read from is forgotten, so that saving it again gives equal files."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {folder}: {brief(error)}") from error
    for origin in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(origin, None)
    return tokenizer

def autoencoder_names(module):
    """{name in diffusers' autoencoder blocks: name in the released file} (KL-16 of Harmon, MAGVIT-v2 of Show-o, FLUX's
    of BAGEL). The released files number the decoder's levels from the finest, diffusers as they run."""
    keys = list(module.state_dict())
    last = max(int(level) for level in re.findall(r"up_blocks\.(\d+)", " ".join(keys)))
    words = {"mid_block.attentions.0": "mid.attn_1", "down_blocks": "down", "resnets": "block", "attentions": "attn",
             "downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut", "to_q": "q",
             "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out", "group_norm": "norm"}
    names = {}
    for key in keys:
        name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{last - int(level[1])}", key)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda block: f"mid.block_{int(block[1]) + 1}", name)
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        names[key] = name
    return names

def autoencoder_from_original(module, state):
    """A released autoencoder's state dict -> diffusers' names; unknown keys stay. Its attention has 1 x 1 convolutions,
    [out, in, 1, 1], diffusers' has matrices."""
    own = {theirs: ours for ours, theirs in autoencoder_names(module).items()}
    return {own.get(key, key): value.flatten(1) if "attn" in key and value.dim() == 4 else value
            for key, value in state.items()}

def autoencoder_to_original(module):
    """The inverse: the state dict of diffusers' blocks as it is released."""
    state, names = module.state_dict(), autoencoder_names(module)
    return {names[key]: (value[..., None, None] if "attn" in names[key] and value.dim() == 2 else value).contiguous()
            for key, value in state.items()}

# ==== 2. Random numbers ===============================================================================
# Every draw of a step (mask, order, timestep, noise, template, crop) is a function of the seed and of the image's
# position in the endless stream, drawn on the CPU. Hence a run is resumed without storing any generator, two processes
# with half the batch each draw what one process draws, and a GPU draws what a CPU draws. The one exception is dropout,
# whose generator is seeded at every step from (seed, step, rank).

def stable_seed(*keys):
    """A 63-bit seed from any printable keys, the same on every machine and in every Python (unlike hash())."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:8], "little") >> 1

class Rng:
    """The random numbers of one batch, Rng(seed, "recon", step, positions=[...]): the methods draw row i of their
    result, a CPU tensor [B, *shape], from image i's own generator. `batch` is one torch.Generator for what is drawn
    once per batch, the same on all ranks."""

    def __init__(self, seed, *keys, positions):
        self.batch = torch.Generator().manual_seed(stable_seed(seed, *keys))
        self.images = [torch.Generator().manual_seed(stable_seed(seed, *keys[:1], "image", p)) for p in positions]

    @classmethod
    def fresh(cls, batch_size):
        """For callers that do not care: seeded from torch's global generator (so torch.manual_seed fixes it)."""
        return cls(int(torch.randint(2 ** 62, ())), positions=range(batch_size))

    @classmethod
    def sampling(cls, seed, batch_size):
        """For samplers: an image's numbers depend on its seed alone. seed: one per image, or an int for seed + i."""
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
    """total / count, with `count` averaged over the ranks: the mean of the ranks' losses, and so of their gradients, is
    then the mean over all ranks' tokens, however many of them each rank has."""
    count = torch.as_tensor(count, dtype=torch.float32, device=total.device)
    if dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return total / count.clamp(min=1e-8)

# ==== 3. Templates and images =========================================================================

SEED_TEMPLATE = "Describe the image in detail."

def templates(which="all"):
    """The instructions behind the image embeddings (paper, section 3): 10 x 6 x 6 = 360 ways to ask for a detailed
    description. "one": the seed template alone (the paper's ablation)."""
    if which == "one":
        return [SEED_TEMPLATE]
    verbs = ("Describe", "Please describe", "Carefully describe", "Write a description of",
             "Please write a description of", "Give a description of", "Provide a description of",
             "Compose a description of", "Give a full account of", "Explain what you see in")
    nouns = ("the image", "this image", "the picture", "this picture", "the given image", "the scene shown here")
    manners = ("in detail", "in great detail", "as precisely as you can", "without leaving anything out",
               "so that someone could draw it from your words", "with every object, its color and its place")
    return [f"{verb} {noun} {manner}." for verb in verbs for noun in nouns for manner in manners]

MAX_PIXELS = 120_000_000     # a larger image is refused before it is decoded: its header alone could ask for all memory
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNREADABLE = (OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError)  # of damaged files

def read_source(source):
    """The bytes of a path or of (tar file, offset, size); bytes, a PIL image and None are given back."""
    if isinstance(source, tuple):
        path, offset, size = source
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    return Path(source).read_bytes() if isinstance(source, (str, Path)) else source

def load_image(source):
    """A source -> PIL RGB. EXIF rotation applied, transparency on white, 16 bits scaled to 8; a PIL image is given
    back. Raises one of UNREADABLE where it cannot be read (the data streams catch them and go on)."""
    data = read_source(source)
    if isinstance(data, Image.Image):
        return data
    Image.MAX_IMAGE_PIXELS = None                                               # our own bound, below, is checked first
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS or min(image.size) < 1:
        raise ValueError(f"image of {image.width}x{image.height} pixels refused")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                         # 16-bit greyscale: PIL would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def to_tensor(image):
    """PIL RGB -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1

def to_pil(pixels):
    """[3, H, W] in [-1, 1] -> PIL RGB. clamp(127.5 x + 128), truncated: the rounding of the original repositories."""
    pixels = (127.5 * pixels.detach().float().cpu() + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())

def random_square(image, size, rng=None):
    """Square crop along the long side (rng: a numpy Generator for its place; None: the centre), bicubic to size."""
    side = min(image.size)
    left, top = ((length - side) // 2 if rng is None else int(rng.integers(length - side + 1)) for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((size, size))

def short_side_square(image, size):
    """Short side to `size` (bicubic), then the central square: the order of CLIP's own preprocessing."""
    width, height = (int(size * side / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height)).crop((left, top, left + size, top + size))

def pad_square(image, size):
    """Centred on a grey square of the longer side, then size x size (LLaVA's padding)."""
    square = Image.new("RGB", (max(image.size),) * 2, (127,) * 3)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return square.resize((size, size))

def blur(pixels, factor):
    """The paper's blur (F.2): [B, 3, H, W] shrunk by `factor` and enlarged again: fewer details, as many tokens.
    InputError where nothing would be left."""
    size = pixels.shape[-2:]
    if factor > min(size) // 2:
        raise InputError(f"--blur {factor}: at most {min(size) // 2}, half of the image's side")
    small = F.interpolate(pixels, size=[side // factor for side in size], mode="bilinear")
    return F.interpolate(small, size=size, mode="bilinear")

# ==== 4. Data =========================================================================================
# Rows are (name, source, text). source: a path, (tar file, offset, size), a PIL image (toy world), or None (a text
# without image). text: None (RecA needs none), a caption, or a conversation [(question, answer), ...].

def image_rows(source):
    """Rows of unlabelled images: a folder (recursive), or WebDataset tar shards (one .tar, or a folder with some). Only
    names are listed: 240,000 files take seconds. Tar members are read by offset and never extracted, so a path inside
    an archive has no effect on the disk. InputError where there is no image."""
    source, rows = Path(source).expanduser(), []
    if not source.exists():
        raise InputError(f"no such folder or .tar file: {source}")
    paths = [str(source)] if source.is_file() else sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    for path in filter(lambda path: path.lower().endswith(".tar"), paths):
        try:
            with tarfile.open(path, "r:") as archive:          # "r:" = uncompressed: a member can be read by its offset
                rows += [(m.name, (path, m.offset_data, m.size), None) for m in archive
                         if m.isfile() and m.name.lower().endswith(IMAGE_SUFFIXES)]
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{path} is not a readable, uncompressed tar file ({error})") from error
    if not rows:
        root = source.parent if source.is_file() else source
        rows = [(os.path.relpath(p, root), p, None) for p in paths if p.lower().endswith(IMAGE_SUFFIXES)]
    if not rows:
        raise InputError(f"no image ({', '.join(s[1:] for s in IMAGE_SUFFIXES)}, or a .tar of them) in {source}")
    return rows

def read_rows(path, what, read):
    """[read(i, row) for the rows of a .json list or a .jsonl file]. InputError names the first that is not `what`."""
    table, rows = read_json(path, lines=Path(path).suffix == ".jsonl"), []
    if not isinstance(table, list) or not table:
        raise InputError(f"{path} is not a list: every row must be {what}")
    for i, row in enumerate(table):
        try:
            rows.append(read(i, row))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: row {i + 1} is not {what}") from error
    return rows

def text_in(row, *keys):
    """The text under the first of the keys that the row has; KeyError where there is none."""
    text = next((row[key] for key in keys if key in row), None)
    if not isinstance(text, str) or not text.strip():
        raise KeyError(keys)
    return text

def conversation_rows(path, folder):
    """Rows for L_i2t, LLaVA-style: a .json list or a .jsonl file of {"image": name (optional), "conversations":
    [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}. folder: of the images (None: the file's)."""
    def read(i, row):
        values = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
        turns, image = list(zip(values[::2], values[1::2])), row.get("image")
        if not turns:
            raise KeyError("conversations")
        return image or f"text {i}", Path(folder or Path(path).parent) / image if image else None, turns
    return read_rows(path, "a LLaVA conversation (image, conversations)", read)

def caption_rows(path):
    """Rows for L_t2i: a .jsonl file of {"image": name, "caption": text}, images relative to the file's folder."""
    return read_rows(path, "an image with its caption (image, caption)", lambda i, row: (
        row["image"], Path(path).parent / row["image"], text_in(row, "caption")))

class Cache:
    """What the frozen parts compute for an image, a safetensors file each: folder/<hash of settings>/<hash of image>.
    Nothing stale can be read, and what is interrupted or shared between runs and ranks is never half a file."""

    def __init__(self, folder, settings):
        self.folder = Path(folder) / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        write(self.folder / "settings.json", settings)

    def path(self, image):
        name = hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path):
        try:
            return load_file(path) if path.exists() else None
        except Exception:                                                      # damaged on disk: computed again
            return None

    def write(self, path, features):
        with atomic(path) as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in features.items()}, temporary)

class Stream(torch.utils.data.Dataset):
    """An endless, shuffled stream over rows: stream[position] for any position >= 0, so it can be entered anywhere.

    Each epoch, position // len(rows), has its own permutation. A row that cannot be read is replaced by the next one
    and named in the item: {"name", "sample" (model.preprocess) or "features" (cached), "text", "skipped", "position"}.
    texts: the templates, one of which is drawn for a row without a text.
    """

    def __init__(self, name, rows, preprocess, seed, texts=None, cache=None):
        self.name, self.rows, self.preprocess, self.seed = name, rows, preprocess, seed
        self.texts, self.cache = texts, cache
        self.order = functools.lru_cache(2)(lambda epoch: np.random.default_rng(
            stable_seed(seed, name, "order", epoch)).permutation(len(rows)))

    def __getitem__(self, position):
        epoch, k = divmod(position, len(self.rows))
        rng = np.random.default_rng(stable_seed(self.seed, self.name, "item", position))
        skipped = []
        for attempt in range(min(len(self.rows), 1000)):
            name, source, text = self.rows[int(self.order(epoch)[(k + attempt) % len(self.rows)])]
            text = self.texts[int(rng.integers(len(self.texts)))] if text is None else text
            item = {"name": name, "text": text, "skipped": skipped, "position": position}
            try:
                image = read_source(source)
                if self.cache is not None and image is not None:
                    item["path"] = self.cache.path(image)
                    item["features"] = self.cache.read(item["path"])
                if item.get("features") is None:
                    image = None if image is None else load_image(image)
                    # With a cache every epoch must see the same crop: no generator, the central one.
                    item["sample"] = self.preprocess(image, self.name, rng if self.cache is None else None)
                return item
            except UNREADABLE as error:
                if source is not None:                              # else a text without an image: nothing is wrong
                    skipped.append(f"{name} ({brief(error)})")
        raise InputError(f"no row of {self.name} could be used" + (f", the first was {skipped[0]}" if skipped else ""))

    def batches(self, start, batch, workers=0):
        """Lists of `batch` items from position `start` on: rank r of W has the r-th `batch` of each W * batch."""
        rank, ranks = world()
        starts = itertools.count(start + rank * batch, ranks * batch)

        def set_up_worker(_):
            torch.set_num_threads(1)
            for number in (signal.SIGINT, signal.SIGTERM):      # they go to all processes: the main one saves, and then
                signal.signal(number, signal.SIG_IGN)           # ends its workers
        return iter(torch.utils.data.DataLoader(
            self, batch_sampler=(range(first, first + batch) for first in starts), collate_fn=list,
            num_workers=workers, worker_init_fn=set_up_worker, prefetch_factor=2 if workers else None,
            multiprocessing_context="fork" if workers else None))

def encode_batch(model, items, task, cache=None):
    """Items of a stream -> features on the model's device, a dict an image. Adds to the cache what it lacks."""
    todo = [item for item in items if item.get("features") is None]
    if todo:
        with torch.no_grad():
            for item, features in zip(todo, model.encode([item["sample"] for item in todo], task)):
                item["features"] = features
                if cache is not None and "path" in item:
                    cache.write(item["path"], features)
    return [{k: v.to(model.device, non_blocking=True) for k, v in item["features"].items()} for item in items]

# ==== 5. Training =====================================================================================

LOSSES = ("recon", "i2t", "t2i")

def objective(losses, weights, backward):
    """One evaluation of the paper's equation (3):

        L = λ_recon · L_recon  +  λ_i2t · L_i2t  +  λ_t2i · L_t2i

    losses: {"recon": function without arguments -> scalar, ...}; weights: {"recon": λ_recon, ...}. A loss whose λ is 0
    is never computed. Each loss goes backward as soon as it is there, so that the peak of memory is that of the largest
    loss and not of their sum. Returns (L, {name: value}) as detached tensors.
    """
    values = {}
    for name, loss in losses.items():
        if weights[name] != 0:
            value = loss()
            backward(weights[name] * value)
            values[name] = value.detach()
    return sum(weights[name] * value for name, value in values.items()), values

def learning_rate(update, peak, warmup, horizon):
    """Linear warm-up over `warmup` weight updates (counted from 0), then a cosine to 0 at `horizon` (0: constant)."""
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = min(1, (update - warmup) / max(1, horizon - warmup)) if horizon else 0
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

def average_gradients(parameters):
    """Data parallelism: every rank gets the mean gradient, once per weight update. DistributedDataParallel expects one
    forward and one backward per step, while a step here has a backward per loss and each loss leaves other parameters
    without a gradient (the public Show-o code cannot run on two GPUs for this reason)."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:                              # all ranks must take part in every all_reduce
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

class Trainer:
    """The post-training loop, once for all architectures.

    model    has encode, parameter_groups, <name>_loss, save_pretrained, device (see a script)
    streams  {"recon": Stream, "i2t": Stream, ...}, one for each loss whose λ is not 0
    args     the command line (section 8)
    show     function(step) that draws a preview, or None
    optimizer, average: in place of AdamW and average_gradients, for sharded or low-precision weights

    A step is one evaluation of equation (3): `batch` images for each loss. The weights move every `accum` steps.
    """

    def __init__(self, model, streams, args, show=None, optimizer=None, average=average_gradients):
        self.model, self.streams, self.args, self.show, self.average = model, streams, args, show, average
        self.weights = {name: getattr(args, f"lambda_{name}") for name in LOSSES}
        groups = model.parameter_groups(args.weight_decay)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = optimizer or torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps,
                                                        fused=model.device.type == "cuda")
        self.out, self.step, self.seen, self.stop, self.skipped = Path(args.out), 0, 0, None, set()

    def save(self):
        """out/checkpoint-<step>: the released layout, and beside it what a resume needs. The two newest are kept."""
        if world()[0] == 0:
            with atomic(self.out / f"checkpoint-{self.step:06d}") as folder:
                folder.mkdir(parents=True)
                self.model.save_pretrained(folder)
                state = {"step": self.step, "seen": self.seen, "optimizer": self.optimizer.state_dict()}
                torch.save(state, folder / "trainer.pt")
            for old in sorted(self.out.glob("checkpoint-*"))[:-2]:
                shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        """Reads all but the weights (see from_pretrained). Random numbers need no state (section 2)."""
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        self.step, self.seen = state["step"], state["seen"]
        self.optimizer.load_state_dict(state["optimizer"])

    def evaluate(self, name, items):
        """One loss on one batch: the frozen features (or the cache), then the model's own loss, in --precision."""
        rng = Rng(self.args.seed, name, self.step, positions=[item["position"] for item in items])
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            features = encode_batch(self.model, items, name, self.streams[name].cache)
            return getattr(self.model, f"{name}_loss")(features, [item["text"] for item in items], rng=rng)

    def take_step(self, loaders):
        """Equation (3), its gradients, every `accum` steps a move of the weights -> row of the log, whether to stop."""
        args, (rank, ranks) = self.args, world()
        torch.manual_seed(stable_seed(args.seed, "dropout", self.step, rank))
        items = {name: next(loader) for name, loader in loaders.items()}
        losses = {name: functools.partial(self.evaluate, name, batch) for name, batch in items.items()}
        _, values = objective(losses, self.weights, backward=lambda loss: (loss / args.accum).backward())
        # One transfer per step: the losses of all ranks, and whether any rank was asked to stop.
        asked = torch.tensor(float(self.stop is not None), device=self.model.device)
        numbers = torch.stack([*values.values(), asked]).float()
        if ranks > 1:
            dist.all_reduce(numbers)
        *numbers, stop = (numbers / ranks).tolist()
        values = dict(zip(values, numbers))
        self.step += 1
        self.seen += args.batch * ranks
        row = {"step": self.step, "loss": sum(self.weights[name] * value for name, value in values.items()), **values}
        if self.step % args.accum == 0:
            self.average(self.parameters)
            row["lr"] = learning_rate(self.step // args.accum - 1, args.lr, args.warmup, args.horizon)
            row["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, args.clip or float("inf")).item()
        items = [item for batch in items.values() for item in batch]
        names = ", ".join(item["name"] for item in items[:8])
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0)):
                raise InputError(f"{name} is {row[name]} at step {self.step} on {names}: stopped; the last good "
                                 f"checkpoint is kept in {self.out} (try a lower --lr or --precision fp32)")
        if "lr" in row:
            for group in self.optimizer.param_groups:
                group["lr"] = row["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        row["skipped"] = sorted({name for item in items for name in item["skipped"]} - self.skipped)
        self.skipped.update(row["skipped"])
        return row, stop > 0

    def train(self):
        """From self.step to --steps, or to a signal; the last checkpoint is written in both cases."""
        args, first, (rank, ranks) = self.args, self.step, world()
        boundary, began, stop = (self.step, self.seen), time.time(), False      # boundary: where the weights moved last
        handlers = {number: signal.signal(number, lambda number, _: setattr(self, "stop", signal.Signals(number).name))
                    for number in (signal.SIGINT, signal.SIGTERM)}
        loaders = {name: stream.batches(self.seen, args.batch, args.workers)
                   for name, stream in self.streams.items() if self.weights[name] != 0}
        if rank == 0:                                              # after a kill the log may be ahead of the checkpoint
            mend_lines(self.out / "log.jsonl", lambda row: row["step"] <= self.step)
        log = open(os.devnull if rank else self.out / "log.jsonl", "a", buffering=1)
        bar = tqdm(total=args.steps, initial=first, unit="step", dynamic_ncols=True, disable=rank > 0, desc="RecA")
        try:
            while self.step < args.steps and not stop:
                row, stop = self.take_step(loaders)
                row["images_per_s"] = round((self.step - first) * args.batch * ranks / (time.time() - began), 3)
                log.write(json.dumps(row) + "\n")
                bar.set_postfix({n: f"{row[n]:.4f}" for n in LOSSES if n in row} | {"img/s": row["images_per_s"]})
                bar.update()
                for name in row["skipped"]:
                    bar.write(f"skipped: {name}")
                going, updated = not stop and self.step < args.steps, self.step % args.accum == 0
                boundary = (self.step, self.seen) if updated else boundary
                if going and self.show and self.step % args.sample_every == 0:
                    self.show(self.step)
                if going and updated and self.step % args.save_every < args.accum:
                    self.save()
        finally:
            for loader in loaders.values():                        # its workers ignore signals, so they are told to end
                getattr(loader, "_shutdown_workers", lambda: None)()
            for number, handler in handlers.items():                # scoring and inference may be interrupted as usual
                signal.signal(number, handler)
            log.close()
            bar.close()
        # In the middle of an accumulation the weights are those of their last move: a resumed run goes on from there.
        finished, (self.step, self.seen) = self.step >= args.steps, boundary
        self.save()
        if rank == 0:
            draw_losses(self.out)
            if self.skipped:
                print(f"{len(self.skipped)} unreadable images were skipped (named in {self.out / 'log.jsonl'})")
        if not finished:
            by = self.stop or "another rank"
            print(f"stopped by {by} at step {self.step}, saved; go on with --resume --out {self.out}")
            sys.exit(0)

def draw_losses(out):
    """out/log.jsonl -> out/loss.png: the losses over the steps, smoothed, each between its own low and high."""
    rows, picture = read_json(out / "log.jsonl", lines=True), Image.new("RGB", (900, 420), "white")
    draw, width = ImageDraw.Draw(picture), 1 + len(rows) // 20
    for name, color, x in zip(LOSSES, ("#c0392b", "#2471a3", "#1e8449"), (20, 310, 600)):
        values = [row[name] for row in rows if name in row]
        if values:
            curve = np.convolve(values, np.ones(width) / width, "valid")
            low, high = curve.min(), curve.max()
            ys = 390 - 350 * (curve - low) / max(high - low, 1e-9)
            draw.line([*zip(np.linspace(20, 880, len(ys)), ys), (880, ys[-1])], fill=color, width=2)
            draw.text((x, 10), f"{name}: {curve[0]:.4g} to {curve[-1]:.4g} ({low:.4g} to {high:.4g})", fill=color)
    draw.text((20, 400), f"steps 1 to {len(rows)}, means of {width}", fill="black")
    write(out / "loss.png", picture)

def grid(rows, titles=(), cell=192, gap=4):
    """Rows of PIL images (equal lengths) -> one picture of square cells, a title above each column."""
    header, pitch = 18 if titles else 0, cell + gap
    sheet = Image.new("RGB", (len(rows[0]) * pitch, header + len(rows) * pitch), "lightgray")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((column * pitch + 4, 3), title, fill="black")
    for r, row in enumerate(rows):
        for column, image in enumerate(row):
            image = image.resize((cell, cell), Image.NEAREST if image.width < cell else Image.BICUBIC)
            sheet.paste(image, (column * pitch, header + r * pitch))
    return sheet

# ==== 6. Inference on files ===========================================================================

def prompt_jobs(source, out, images):
    """A prompt source -> [(prompt, [paths of its images], GenEval's metadata or None)], for the benchmark's scorer:

    FILE.txt    a prompt a line                                 -> out/00000.png, with several images out/00000_0.png ..
    FILE.jsonl  GenEval's evaluation_metadata.jsonl             -> out/00000/metadata.jsonl and samples/00000.png ..
    FILE.json   WISE (Prompt, prompt_id)                        -> out/<prompt_id>.png
                T2I-CompBench (Question, Category, Question_id) -> out/<Category>/<Question_id>.png
    FOLDER      DPG-Bench, a prompt a <name>.txt                -> out/<name>.png four times: a 2x2 grid
    """
    source, out = Path(source), Path(out)

    def geneval(i, row):
        return text_in(row, "prompt"), [out / f"{i:05d}" / "samples" / f"{k:05d}.png" for k in range(images)], row

    def wise_or_compbench(_, row):
        name = f"{row.get('Category', '')}/{row['Question_id']}" if "Question_id" in row else row["prompt_id"]
        return text_in(row, "Prompt", "Question"), [inside(out, f"{name}.png".lstrip("/"))], None

    if not source.exists():
        raise InputError(f"no such prompt file or folder: {source}")
    if source.is_dir():
        texts = {file.stem: file.read_text(encoding="utf-8").strip() for file in sorted(source.glob("*.txt"))}
        jobs = [(text, [out / f"{name}.png"] * 4, None) for name, text in texts.items()]
    elif source.suffix == ".jsonl":
        jobs = read_rows(source, "a prompt of GenEval (prompt)", geneval)
    elif source.suffix == ".json":
        jobs = read_rows(source, "a prompt (Prompt and prompt_id, or Question and Question_id)", wise_or_compbench)
    else:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        jobs = [(line, [out / (f"{i:05d}.png" if images == 1 else f"{i:05d}_{k}.png") for k in range(images)], None)
                for i, line in enumerate(lines)]
    if not jobs or not all(prompt for prompt, _, _ in jobs):
        raise InputError(f"{source}: no prompt, or an empty one")
    return jobs

def sampler_options(args):
    """The sampler's settings that the command line gives; the others keep the script's (the paper's) defaults."""
    options = {"guidance_scale": args.guidance_scale, "num_steps": args.sampling_steps}
    return {name: value for name, value in options.items() if value is not None}

def in_batches(title, rows, size, same=lambda row: None):
    """Lists of at most `size` rows, behind a progress bar; the rows of one list agree in same(row)."""
    groups = {}
    for row in rows:
        groups.setdefault(same(row), []).append(row)
    chunks = [group[k:k + size] for group in groups.values() for k in range(0, len(group), size)]
    return tqdm(chunks, desc=title, unit="batch", dynamic_ncols=True)

def readable(rows):
    """Yields (name, image, ...) for rows (name, source, ...); a line names each whose image cannot be read."""
    for name, source, *more in rows:
        try:
            yield name, load_image(source), *more
        except UNREADABLE as error:
            tqdm.write(f"skipped: {name} ({brief(error)})")

def generate_files(model, args, jobs):
    """--generate: image k of a prompt has seed --seed + k, whatever its batch, so a rerun may skip what is there."""
    todo = []
    for prompt, paths, metadata in jobs:
        if metadata:
            write(paths[0].parent.parent / "metadata.jsonl", [metadata])
        todo += [(prompt, args.seed + k, path) for k, path in enumerate(paths) if not path.exists()]
    for chunk in in_batches("generate", todo, -(-args.batch_images // 4) * 4):        # the four of a grid stay together
        prompts, seeds, paths = zip(*chunk)
        made = {}
        for path, image in zip(paths, model.generate(list(prompts), seed=list(seeds), **sampler_options(args))):
            made.setdefault(path, []).append(image)
        for path, images in made.items():
            write(path, images[0] if len(images) == 1 else grid([images[:2], images[2:]], cell=images[0].width, gap=0))
    print(f"{len(todo)} images generated for {len(jobs)} prompts in {args.out}")

def reconstruct_files(model, args, images):
    """--reconstruct: out/<name>.png for each image, painted from nothing but the model's understanding of it."""
    out, count, shown = Path(args.out), 0, []
    todo = [(name, source, inside(out, Path(name).with_suffix(".png"))) for name, source, _ in images]
    for chunk in in_batches("reconstruct", [row for row in todo if not row[2].exists()], args.batch_images):
        if chunk := list(readable(chunk)):
            images, seeds = [row[1] for row in chunk], [args.seed] * len(chunk)
            painted = model.reconstruct(images, seed=seeds, **sampler_options(args))
            for (_, image, path), again in zip(chunk, painted):
                write(path, again)
                shown += [(image.resize((256, 256)), again)] if len(shown) < 16 else []
            count += len(chunk)
    if shown:
        write(out / "reconstructions.png", grid(shown, titles=("input", "reconstruction")))
    print(f"{count} images reconstructed in {out}")

def questions(args):
    """--describe -> rows (question_id, source, question, image's name): --question for each image of a folder, or a
    question file (.json, .jsonl: question_id, image, text; the images beside it or in --i2t-images)."""
    source = Path(args.describe)
    if source.is_dir():
        return [(name, image, args.question, Path(name).name) for name, image, _ in image_rows(source)]
    if not source.exists():
        raise InputError(f"no such folder or question file: {source}")
    folder = Path(args.i2t_images or source.parent)

    def read(i, row):
        key, image = row.get("question_id", row.get("id", i)), row["image"]
        return key, folder / image, text_in(row, "text", "question"), Path(image).name
    return read_rows(source, "a question (image, text)", read)

def answers(model, args, rows, title):
    """Yields (row, the model's answer) for rows (name, source, question, ...), in batches of one question each."""
    for chunk in in_batches(title, rows, args.batch_images, same=lambda row: row[2]):
        if chunk := list(readable(chunk)):
            images, question = [row[1] for row in chunk], chunk[0][2]
            yield from zip(chunk, model.describe(images, question=question, max_new_tokens=args.max_new_tokens))

def describe_files(model, args, rows):
    """--describe: out/answers.jsonl, {"question_id", "image", "question", "answer"} a line; a rerun goes on."""
    path, count = Path(args.out) / "answers.jsonl", 0
    done = {json.dumps(row["question_id"]) for row in mend_lines(path)}
    todo = [row for row in rows if json.dumps(row[0]) not in done]
    with open(path, "a", buffering=1) as file:
        for (key, _, question, image), answer in answers(model, args, todo, "describe"):
            file.write(json.dumps({"question_id": key, "image": image, "question": question, "answer": answer}) + "\n")
            count += 1
    print(f"{count} answers in {path}")

def describe_first(model, args, rows, path):
    """L_i2t without I2T data: before any update the model describes --self-captions training images, its targets. Our
    addition, not the paper's (which has LLaVA-1.5's 665K conversations): it holds the model to what it said before
    RecA, a distillation from itself, so understanding cannot drift away while generation learns. Kept in --out."""
    if not path.exists() and world()[0] == 0:               # a resumed run must not ask the model that RecA has changed
        order = np.random.default_rng(stable_seed("describe", len(rows))).permutation(len(rows))[:args.self_captions]
        print(f"L_i2t has no data (--i2t-data): the model describes {len(order)} of its training images first, and is "
              f"held to that ({path}). This is our addition; real data or --lambda-i2t 0 are the alternatives.")
        asked = [(*rows[i][:2], args.question, i) for i in order.tolist()]
        said = [{"index": i, "question": question, "answer": answer}
                for (_, _, question, i), answer in answers(model, args, asked, "targets of L_i2t") if answer.strip()]
        if not said:
            raise InputError("the model describes none of the images: give --i2t-data, or --lambda-i2t 0")
        write(path, said)
    if dist.is_initialized():
        dist.barrier()
    return [(*rows[said["index"]][:2], [(said["question"], said["answer"])]) for said in read_json(path, lines=True)]

# ==== 7. The toy world ================================================================================
# 2 x 2 cells; 1 to 3 of them hold a shape (4 kinds, no kind twice) in one of 8 colors. Everything in a picture can be
# said in words, and every picture can be read back exactly, by comparing each cell with the 32 things it could hold:
# what a benchmark's detector estimates at full size is known here without error.

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
    things = [np.where(mask[..., None], color, 255.0) for mask in masks for color in COLORS.values()]
    return np.stack([np.full((size, size, 3), 255.0), *things]).astype(np.float32)

def random_scene(rng, objects=None):
    """A list of (place, shape, color), indices, in the order of the places. objects: how many (default 1 to 3)."""
    objects = objects or int(rng.integers(1, 4))
    places = sorted(rng.choice(4, objects, replace=False).tolist())
    return list(zip(places, rng.choice(4, objects, replace=False).tolist(), rng.integers(8, size=objects).tolist()))

def draw_scene(scene, size=64):
    """-> PIL RGB size x size (size is even)."""
    half = size // 2
    canvas = np.full((2, half, 2, half, 3), 255, np.uint8)                        # [row, y in it, column, x in it, RGB]
    for place, shape, color in scene:
        canvas[place // 2, :, place % 2] = _cell(half)[1 + shape * 8 + color]
    return Image.fromarray(canvas.reshape(size, size, 3))

def read_scene(image):
    """PIL -> the scene that it shows; (place, None, None) for a cell near nothing (root mean square distance > 0.2)."""
    half, scene = image.width // 2, []
    pixels = np.asarray(image.convert("RGB").resize((2 * half, 2 * half)), np.float32).reshape(2, half, 2, half, 3)
    for place in range(4):
        distance = np.sqrt(((_cell(half) - pixels[place // 2, :, place % 2]) ** 2).mean((1, 2, 3))) / 255
        best = int(distance.argmin())
        if distance[best] > 0.2:
            scene.append((place, None, None))
        elif best:
            scene.append((place, *divmod(best - 1, 8)))
    return scene

def caption(scene, p=1.0, rng=None):
    """The scene in words: "red circle top-left and ...". p < 1: color and place are named with probability p each (rng
    needed), the sparse captions that the paper says generation is brought up on."""
    def say(word):
        return [word] if p >= 1 or rng.random() < p else []
    return " and ".join(" ".join([*say(list(COLORS)[color]), SHAPES[shape], *say(PLACES[place])])
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
    """GenEval's questions, asked of the pictures that full captions of `scenes` made, a fraction of pictures each: is
    the one object, or are both of two, there (its shape), in its place, with its own color?"""
    pairs, scores = [(scene, read_scene(image)) for scene, image in zip(scenes, images)], {}

    def told(scene, fields):
        return {tuple(thing[field] for field in fields) for thing in scene}

    for name, objects, fields in (("single_object", 1, [1]), ("two_object", 2, [1]), ("colors", 1, [1, 2]),
                                  ("position", 2, [0, 1]), ("color_attribution", 2, [1, 2])):
        hits = [told(scene, fields) <= told(seen, fields) for scene, seen in pairs if len(scene) == objects]
        scores[name] = sum(hits) / max(1, len(hits))
    return {**scores, "overall": sum(scores.values()) / len(scores)}

def score_toy(model, size, count, seed, options):
    """The scores of score_generations on held-out scenes, and "reconstruction": the fraction of images whose every
    shape, color and place comes back from the model's own understanding embeddings."""
    rng = np.random.default_rng((seed, 999_999))                                  # no training scene has this generator
    scenes = [random_scene(rng) for _ in range(count)]
    seeds = list(range(seed * 1000, seed * 1000 + count))
    pictures = model.reconstruct([draw_scene(s, size) for s in scenes], seed=seeds, **options)
    reconstruction = sum(read_scene(p) == s for s, p in zip(scenes, pictures)) / count
    prompts = [random_scene(rng, 1 + k % 2) for k in range(count)]
    images = model.generate([caption(s) for s in prompts], seed=seeds, **options)
    return {"reconstruction": reconstruction, **score_generations(prompts, images)}

def told_scenes(count=6):
    """Held-out scenes whose captions effect.png paints: half with one object, half with two. (This
    seed's six scenes show all colors.)"""
    rng = np.random.default_rng(264)
    return [random_scene(rng, 1 if k < count // 2 else 2) for k in range(count)]


def effect_picture(told, shown, cell=96, gap=6):
    """What a run on the toy world changed, at a glance -> PIL. told: rows of (caption, what it gave
    before, after), on the left; shown: rows of (image, its reconstruction before, after)."""
    font = ImageFont.load_default(size=15)
    header = 24
    pitch = cell + gap
    # The captions take the width of two cells, and a wider gap divides the halves.
    columns = [gap, 2 * cell, 2 * cell + pitch]
    columns += [2 * cell + 2 * pitch + 4 * gap + k * pitch for k in range(3)]
    height = header + max(len(told), len(shown)) * pitch
    sheet = Image.new("RGB", (columns[-1] + pitch, height), "white")
    pen = ImageDraw.Draw(sheet)
    titles = ("asked for", "before", "after", "shown", "before", "after")
    for left, title in zip(columns, titles):
        pen.text((left, 3), title, fill="black", font=font)

    for row, (said, *pictures) in enumerate(told):
        place = (gap, header + row * pitch + cell // 3)
        pen.text(place, said.replace(" and ", " and\n"), fill="black", font=font)
        pictures += shown[row] if row < len(shown) else []
        for left, picture in zip(columns[1:], pictures):
            enlarged = picture.resize((cell - 2, cell - 2), Image.BICUBIC)
            sheet.paste(ImageOps.expand(enlarged, 1, "lightgray"), (left, header + row * pitch))
    return sheet


def effect_words(before, after):
    """A sentence on what RecA did to text to image in a toy run, from its scores."""
    points = round(100 * (after["overall"] - before["overall"]))
    if points >= 5:
        return f"text to image {points:+d} points, and no caption was read"
    return (f"text to image {points:+d} points: it is not better, because a generator this small\n"
            "forgets how to follow words while only images speak to it. It is in reca_openuni.py,\n"
            "whose language model is frozen and reads words and images alike.")


def tiny_tokenizer(special_tokens=()):
    """A word-level tokenizer for the tiny models: the words of the toy world, the templates and the prompts; others are
    [UNK], newlines are tokens. special_tokens: the architecture's markers, their ids follow the words'."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    pattern = r"\n|[\w-]+|[^\s\w]"
    text = " ".join([*templates(), *SHAPES, *COLORS, *PLACES, "and user assistant system generate an image : , . ? ! \n"
                     " a chat between curious artificial intelligence gives helpful detailed polite answers to",
                     "questions s '"])
    words = list(dict.fromkeys(re.findall(pattern, text.lower())))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")

# ==== 8. The command line =============================================================================

def at_least(least):
    """The type of a flag: a whole number from `least` on."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)
    return whole_number

# Titles, and the flags below each: name, type (bool: a switch; a tuple: choices), default (None: the recipe's), help.
FLAGS = (
    "what",
    ("--data", str, None, "folder of images, .tar (WebDataset), or shapes (toy world). Paper: 120K of Midjourney v6"),
    ("--out", str, None, "folder of the run (default out/<script>-<model>)"),
    ("--resume", bool, None, "go on from the newest checkpoint in --out, to the same numbers"),
    ("--bench", bool, None, "time full-size steps with random weights: images/s, MFU, peak memory; downloads nothing"),
    "training (defaults: the paper's Table 8, in our steps)",
    ("--steps", at_least(0), None, "evaluations of equation (3); 0: inference only"),
    ("--batch", at_least(1), None, "images of one loss in a step, per GPU"),
    ("--accum", at_least(1), None, "steps per weight update"),
    ("--lr", float, None, "peak learning rate"),
    ("--warmup", at_least(0), None, "weight updates of linear warm-up"),
    ("--horizon", at_least(0), None, "weight update at which the cosine reaches 0; 0: constant"),
    ("--weight-decay", float, None, "of AdamW"),
    ("--clip", float, None, "limit of the gradient's norm; 0: none"),
    ("--seed", int, 0, "of every random number"),
    ("--precision", ("bf16", "fp32"), None, "bf16 (autocast, float32 master weights; default on a GPU) or fp32"),
    ("--compile", bool, None, "torch.compile the repeated blocks"),
    ("--checkpointing", bool, None, "recompute activations in the backward: less memory, about a third more time"),
    ("--lambda-recon", float, None, "weight of L_recon in equation (3)"),
    ("--lambda-i2t", float, None, "weight of L_i2t; the paper: 1 where understanding and generation share parameters"),
    ("--lambda-t2i", float, None, "weight of L_t2i; 1 where --captions is given"),
    ("--i2t-data", str, None, "LLaVA-style .json/.jsonl for L_i2t (paper: LLaVA-1.5's 665K); shapes: the toy world's"),
    ("--i2t-images", str, None, "folder of its images (default: the folder of the file)"),
    ("--self-captions", at_least(1), 1024, "without --i2t-data: images that the model describes first for it (ours)"),
    ("--captions", str, None, ".jsonl of {image, caption} for L_t2i (SFT: --lambda-recon 0); shapes: full, sparse"),
    ("--cache", str, None, "folder where what the frozen parts say of an image is kept (crops get deterministic)"),
    ("--workers", at_least(0), None, "processes that decode images (default: by the number of cores)"),
    ("--save-every", at_least(1), 500, "steps between checkpoints"),
    ("--sample-every", at_least(1), 250, "steps between preview pictures"),
    "the paper's ablations",
    ("--und-size", at_least(1), None, "side of the understanding input (paper, section 3: the smallest it accepts)"),
    ("--blur", at_least(1), None, "shrink that image by this factor and enlarge it again (app. F.2)"),
    ("--templates", ("all", "one"), "all", "all 360, or the one seed template"),
    "inference (after training; alone with --steps 0)",
    ("--generate", str, None, "prompts: .txt, GenEval .jsonl, WISE/T2I-CompBench .json, or a folder of DPG-Bench .txt"),
    ("--images", at_least(1), 1, "images per prompt; GenEval 4, the paper's starred rows 12"),
    ("--reconstruct", str, None, "folder of images to reconstruct from their understanding embeddings"),
    ("--describe", str, None, "folder of images, or a question file (.jsonl)"),
    ("--question", str, SEED_TEMPLATE, "for a --describe folder"),
    ("--max-new-tokens", at_least(1), 256, "of a description"),
    ("--batch-images", at_least(1), 8, "images of one inference batch"),
    ("--guidance-scale", float, None, "of the sampler; 1: none (Show-o: 0). Not given: the paper's"),
    ("--sampling-steps", at_least(1), None, "of the sampler. Not given: the paper's"),
)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see python {self.prog} --help)")

def parse_args(description, recipes, default, argv=None, extend=None):
    """The flags of all scripts. recipes: {model name: the script's Recipe dataclass}; what is not given on the command
    line is taken from the recipe of the chosen model. extend(parser): adds the flags that only one architecture has."""
    paper, group = vars(recipes[default]), None
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    models = f"a released model ({', '.join(recipes)}), a hub id, a folder, or tiny (default {default})"
    parser.add_argument("--model", default=default, help=models)
    for flag in FLAGS:
        if isinstance(flag, str):
            group = parser.add_argument_group(flag)
            continue
        name, kind, value, text = flag
        shown = paper.get(name[2:].replace("-", "_"), value)
        text += "" if shown is None else f" (default {shown})"
        if kind is bool:
            group.add_argument(name, action="store_true", help=text)
        else:
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            group.add_argument(name, default=value, help=text, **how)
    if extend:
        extend(parser)
    args = parser.parse_args(argv)
    if args.captions and args.lambda_t2i is None:
        args.lambda_t2i = 1.0
    for name, value in vars(recipes.get(args.model, recipes[default])).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    args.data = args.data or ("shapes" if args.model.startswith("tiny") else None)
    args.out = args.out or f"out/{Path(sys.argv[0]).stem}-{Path(args.model).name}"
    if args.workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1))
        args.workers = 0 if args.data == "shapes" else min(8, max(1, cores - 1))
    if args.lambda_t2i and not args.captions:
        raise InputError("--lambda-t2i needs --captions FILE")
    if 0 < args.steps < args.accum and not args.bench:
        raise InputError(f"--steps {args.steps} is less than --accum {args.accum}: the weights would never move")
    if args.steps and not args.data and not args.bench:
        raise InputError("--data is missing: a folder of images (--model tiny draws its own, --steps 0 needs none)")
    return args

def build_rows(args):
    """The rows of each loss whose λ is not 0, but for L_i2t without data (describe_first). InputError for bad files."""
    rows, toy = {}, args.data == "shapes"
    if args.lambda_recon or (args.lambda_i2t and not args.i2t_data):
        rows["recon"] = Shapes(seed=args.seed) if toy else image_rows(args.data)
    if args.lambda_i2t and args.i2t_data:
        rows["i2t"] = (Shapes(seed=args.seed, captions=1.0, dialogue=True) if args.i2t_data == "shapes"
                       else conversation_rows(args.i2t_data, args.i2t_images))
    if args.lambda_t2i:
        p = {"full": 1.0, "sparse": 0.1}.get(args.captions) if toy else None
        rows["t2i"] = Shapes(seed=args.seed, captions=p) if p else caption_rows(args.captions)
    return rows

def start_process(args):
    """-> the device; under torchrun also the process group (NCCL on GPUs, gloo on CPUs)."""
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # The others wait while rank 0 describes images, paints previews and writes checkpoints: not only 10 minutes.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

@contextlib.contextmanager
def inference(model, args):
    """with inference(model, args): no dropout, no gradients, in --precision. Afterwards training mode again."""
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        yield
    model.train()

def speed_up(model, args):
    """--checkpointing and --compile, block by block."""
    from torch.utils.checkpoint import checkpoint
    for block in model.blocks():
        if args.checkpointing:                 # keep only the block's input, compute the block again in the backward
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if args.compile:
            block.compile()

def run(model_class, args, prepare=lambda model, args: {}, trainer=Trainer, inference_jobs=()):
    """main() of every script. prepare(model, args) -> more arguments for the trainer (optimizer, average); trainer: a
    subclass of Trainer, for a script that needs one; inference_jobs: {function(model, args, jobs): jobs}, to be called
    after training like those of section 6."""
    device = start_process(args)
    if args.bench:
        return bench(model_class, args, device, prepare, trainer)
    out, toy = Path(args.out), args.model.startswith("tiny")
    checkpoints = sorted(path.parent for path in out.glob("checkpoint-*/trainer.pt"))
    if args.resume and not checkpoints:
        raise InputError(f"nothing to resume: no checkpoint in {out}")
    if args.steps and not args.resume and checkpoints and not toy:
        raise InputError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
    # Bad files fail before anything is downloaded, and not after days of training.
    rows, todo = build_rows(args) if args.steps else {}, dict(inference_jobs)
    if args.generate:
        todo[generate_files] = prompt_jobs(args.generate, out, args.images)
    if args.reconstruct:
        todo[reconstruct_files] = image_rows(args.reconstruct)
    if args.describe:
        todo[describe_files] = questions(args)
    resume = checkpoints[-1] if args.resume else None
    source = resume or args.model
    dtype = torch.float32 if args.steps or args.precision == "fp32" else torch.bfloat16
    model = model_class.from_pretrained(str(source), device=device, dtype=dtype)
    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if world()[0] == 0:
        import diffusers
        import transformers
        versions = {module.__name__: module.__version__ for module in (torch, transformers, diffusers, np)}
        write(out / "run.json", {"arguments": vars(args), "versions": {**versions, "python": sys.version.split()[0]},
                                 "device": str(device)})
    if args.steps:
        post_train(model, args, rows, prepare, trainer, resume)
    if world()[0] == 0:
        with inference(model, args):
            for make_files, jobs in todo.items():
                make_files(model, args, jobs)

def post_train(model, args, rows, prepare, trainer, resume):
    """RecA: streams, previews, the trainer; the toy world's scores before and after. resume: a checkpoint or None."""
    out, main_process, size = Path(args.out), world()[0] == 0, model.config.image_size
    toy, previews, texts = args.data == "shapes", out / "previews", templates(args.templates)
    if main_process:                                     # what a kill left half-written; a new run begins with nothing
        old = () if resume else ("checkpoint-*", "log.jsonl", "previews", "scores.json", "effect.png", "i2t_self.jsonl")
        for path in [path for pattern in (".tmp-*", *old) for path in out.glob(pattern)]:
            remove(path)
    for shapes in rows.values():
        if isinstance(shapes, Shapes):
            shapes.size = size
    if args.lambda_i2t and not args.i2t_data:
        with inference(model, args):
            rows["i2t"] = describe_first(model, args, rows["recon"], out / "i2t_self.jsonl")
    if not args.lambda_recon:
        rows.pop("recon", None)
    # What is cached depends on these; the frozen weights are told apart by their first numbers.
    frozen = [p.detach().flatten()[:4].float().tolist() for p in model.parameters() if not p.requires_grad]
    settings = {"model": args.model, "frozen": stable_seed(frozen), "image_size": size, "und_size": args.und_size,
                "blur": args.blur, "precision": args.precision}
    streams = {}
    for name, data in rows.items():
        cache = Cache(args.cache, {**settings, "task": name}) if args.cache else None
        streams[name] = Stream(name, data, model.preprocess, args.seed, texts if name == "recon" else None, cache)
    samples = preview_images(next(iter(rows.values())), size)
    told = [caption(scene) for scene in told_scenes()] if toy else []

    def paint():
        """The preview images, reconstructed by the model as it is now."""
        with inference(model, args):
            return model.reconstruct(samples, seed=list(range(len(samples))), **sampler_options(args))

    def paint_told():
        """The captions of effect.png, painted by the model as it is now."""
        with inference(model, args):
            return model.generate(told, seed=list(range(len(told))), **sampler_options(args))

    def show(step):
        now = paint()                           # on all ranks: sharded weights are gathered by all together
        if main_process:
            before = [load_image(previews / f"before_{k}.png") for k in range(len(samples))]
            titles = ("input", "before RecA", f"step {step}")
            picture = grid(list(zip(samples, before, now)), titles, cell=max(128, min(256, size)))
            write(previews / f"step_{step:06d}.png", picture)

    def score(known):
        """out/scores.json: `known` and the toy world's scores now."""
        with inference(model, args):
            scores = {**known, "after" if known else "before": score_toy(model, size, 128, 7, sampler_options(args))}
        write(out / "scores.json", scores)
        return scores

    if main_process and not resume:
        for k, image in enumerate(paint()):
            write(previews / f"before_{k}.png", image)
        if toy:
            for k, image in enumerate(paint_told()):
                write(previews / f"told_before_{k}.png", image)
            score({})
    trainer = trainer(model, streams, args, show, **prepare(model, args))
    if resume:
        trainer.resume(resume)
    speed_up(model, args)
    model.train()
    trainer.train()
    show(trainer.step)
    if main_process and toy:
        scores = score(read_json(out / "scores.json"))
        print(f"\n{'on held-out scenes':<22}{'before':>8}{'after':>8}")
        for name, after in scores["after"].items():
            print(f"{name:<22}{scores['before'][name]:>8.2f}{after:>8.2f}")
        if args.lambda_recon and not args.lambda_t2i:
            print(effect_words(**scores))

        told_before = [load_image(previews / f"told_before_{k}.png") for k in range(len(told))]
        shown_before = [load_image(previews / f"before_{k}.png") for k in range(len(samples))]
        left = list(zip(told, told_before, paint_told()))
        right = list(zip(samples, shown_before, paint()))
        write(out / "effect.png", effect_picture(left, right))
    if main_process:
        print(f"done: checkpoint-{trainer.step:06d}, loss.png, previews/, log.jsonl are in {out}/")

def preview_images(rows, size, count=6):
    """The first readable images (of the toy world: scenes that are not trained on), as PIL."""
    if isinstance(rows, Shapes):
        rng = np.random.default_rng(12345)
        return [draw_scene(random_scene(rng), size) for _ in range(count)]
    found = readable(row for row in rows[:100] if row[1] is not None)
    images = [image for _, image, _ in itertools.islice(found, count)]
    if not images:
        raise InputError("none of the first images could be read")
    return images

# Dense bf16 peak of common GPUs, in FLOP/s, for the MFU (their makers' data sheets).
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}

def bench(model_class, args, device, prepare, trainer, warmup=2, timed=8):
    """--bench: full-size steps with random weights on a random image; prints and returns {figure: value}.

    MFU = the FLOPs that the step needs (counted by torch on a step with one image, without recomputation, times the
    batch) per second, over the GPU's dense bf16 peak.
    """
    import resource
    from torch.utils.flop_counter import FlopCounterMode
    model = model_class.random(args.model, device)
    model.train()
    rng, cuda, seconds = np.random.default_rng(0), device.type == "cuda", []
    picture = Image.fromarray(rng.integers(0, 255, (640, 512, 3), dtype=np.uint8))
    words = " ".join(rng.choice([*SHAPES, *COLORS, *PLACES], 80).tolist())   # an answer of the length that LLaVA's have
    texts = {"recon": SEED_TEMPLATE, "i2t": [(SEED_TEMPLATE, words)], "t2i": words}
    streams = {name: Stream(name, [("random", picture, texts[name])], model.preprocess, args.seed)
               for name in LOSSES if getattr(args, f"lambda_{name}")}
    trainer = trainer(model, streams, args, **prepare(model, args))

    def step(items):
        """One step on the items of each loss (their copies: a step keeps its features in them)."""
        began = time.perf_counter()
        trainer.take_step({name: iter([[{**item} for item in batch]]) for name, batch in items.items()})
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    args.accum = 10 ** 9                                                              # the counted step moves no weight
    with FlopCounterMode(display=False) as counter:
        step({name: [stream[0]] for name, stream in streams.items()})
    args.accum = 1                                                                    # the others do: the slowest case
    model.zero_grad(set_to_none=True)
    speed_up(model, args)
    items = {name: [stream[k] for k in range(args.batch)] for name, stream in streams.items()}
    for k in tqdm(range(warmup + timed), desc="bench", unit="step", dynamic_ncols=True):
        if k == warmup and cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(step(items))
    duration, flops = float(np.median(seconds[warmup:])), counter.get_total_flops() * args.batch
    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    card = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((value for name, value in PEAK.items() if name in card), None)
    figures = {"model": args.model, "device": card, "batch": args.batch, "losses": list(streams),
               "compile": args.compile, "checkpointing": args.checkpointing, "step_s": round(duration, 4),
               "images_per_s": round(args.batch / duration, 3), "tflops_per_step": round(flops / 1e12, 3),
               "mfu": round(flops / duration / peak, 4) if peak else None, "peak_memory_gb": round(used / 2 ** 30, 3),
               "trainable_parameters": sum(p.numel() for p in trainer.parameters),
               "parameters": sum(p.numel() for p in model.parameters())}
    print(json.dumps(figures))
    return figures
