"""What the four RecA scripts share. A script hands over a model with the losses `recon_loss`, `i2t_loss`, `t2i_loss`;
this file, which knows no architecture, does the rest. *What is trained* stands there, *how a step is taken* here:

  1. errors and files      2. random numbers      3. templates and images      4. data (rows, streams, the cache)
  5. training (equation (3), the loop)      6. inference on files      7. the toy world      8. the command line

What a script provides (to write one for another architecture, start from the nearest of the four):

  Model.from_pretrained(source, device=, dtype=, quantize=)     source: hub id, folder, or a key of RECIPES; quantize:
                                     None or "int8", see `quantize` in section 6
  Model.random(name, device)                         full size without a download, for --bench
  .save_pretrained(folder)   .parameter_groups(weight_decay) for AdamW   .blocks() to compile and checkpoint
  .config.image_size         .device     .set_und(size=, blur=)  --und-size, --blur
  .unquantized               tuple of names' beginnings: what stays as it is under --quantize
  .preprocess(image, task, rng)      PIL RGB (None: a text without image; ValueError skips the row) -> CPU tensors of
                                     one image. task: recon, i2t, t2i. rng: numpy Generator for crops, None: central
  .encode(samples, task)             what FROZEN parts say of each image, a dict each: runs without a graph, and is all
                                     that --cache stores; whatever is trained belongs into the loss
  .draw(task, features, rng)         every random number of a loss, {} where nothing is drawn; rng: an Rng of section 2
  .count_targets(task, features, texts, draws)    of how many terms the loss is the mean, counted on the host
  .recon_loss(features, templates, draws=None, rng=None), .i2t_loss(features, conversations, ...), .t2i_loss(features,
        captions, ...)               -> scalar, the mean over its targets. draws: from draw, or None: drawn from rng
  .worst_case(task, count)           (samples, texts, draws to replace) of the largest inputs: what must fit
  .generate(prompts, seed=, guidance_scale=, num_steps=)   .reconstruct(images, seed=, ...)   .describe(images,
        question=, max_new_tokens=)  seed: an int, or one per image. What the command line does not give is not passed
  Recipe       the dataclass whose fields are the defaults of the flags with the same names

Legend of the shape comments: B images in a batch, H W pixels.
"""
import argparse
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
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
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm


# ==== 1. Errors and files =========================================================================
# A run lasts for hours and may end at any moment: it is killed, or the disk is full. And its
# folder, --out, may hold files of the user beside those of the run. Hence three rules:
#
#   - What the user can put right is an InputError: one line that says what to do, no traceback.
#   - A file is written under a temporary name and then renamed (`atomic`), so it is whole or
#     not there.
#   - A file belongs to a run only if its name has exactly the form that runs give. All else in
#     --out is the user's, and is neither deleted, nor replaced, nor resumed from.


class InputError(Exception):
    """Something that the user gave cannot work. The message is one line: what is wrong, and what to
    do about it."""


def print_anything():
    """Lets no character end the program because the terminal cannot show it.

    A Greek letter on a Windows code page, or a file name in another encoding, is printed as its
    code instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def cli(main):
    """Runs `main()` as the program of the command line.

    An InputError, or a batch that does not fit into memory, becomes one line on stderr and exit
    code 2.
    """
    print_anything()
    try:
        main()
        if dist.is_initialized():
            # The ranks end together, and without Python's own exit: in the middle of it gloo's
            # threads, which still hold tensors, abort a rank now and then ("terminate called
            # without an active exception", torch 2.13), and then torchrun stops all of them.
            dist.barrier()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: this does not fit into the GPU's memory: lower --micro-batch, or try "
              "--optimizer bf16; for inference lower --batch-images or add --quantize int8",
              file=sys.stderr)
        sys.exit(2)


def brief(error):
    """The first line of an exception's message, 120 characters at most, without what follows the
    first object in it (<... at 0x7f...>). The name of its type where there is no message."""
    text = str(error).partition(" <")[0]
    lines = text.splitlines()
    first = lines[0] if lines else type(error).__name__
    return first[:120]


def remove(path):
    """Deletes a file, or a folder with all that is in it. Nothing happens where there is none."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


@contextlib.contextmanager
def atomic(path):
    """with atomic("a/b.png") as temporary: image.save(temporary)

    Gives the path of a temporary neighbour to write to, and renames it to `path` at the end. So
    `path` is absent, old or complete at every moment, also after a kill. It works for files and for
    folders (make the folder `temporary` yourself), and the suffix is kept. Raises InputError where
    nothing can be written.
    """
    path = Path(path)
    # The temporary name is short, and does not contain the whole name: that one may already have
    # as many bytes as a file system allows.
    temporary = path.with_name(f".tmp-{os.getpid()}-{stable_seed(path.name):x}{path.suffix[:16]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        # A full disk or a read-only folder: an OSError, but torch and safetensors raise errors of
        # their own for it.
        from_torch = "inline_container" in str(error)
        from_safetensors = type(error).__name__ == "SafetensorError"
        if isinstance(error, OSError) or from_torch or from_safetensors:
            raise InputError(f"cannot write {path}: {brief(error)}") from error
        raise
    finally:
        remove(temporary)


def write(path, content, made_from=None):
    """Writes a file, atomically: a PIL image, a text, the rows of a .jsonl, or the content of a
    .json.

    made_from: what a .png was made from, an object that is kept within the file (see origin_of).
    """
    with atomic(path) as temporary:
        if isinstance(content, Image.Image) and made_from:
            note = PngImagePlugin.PngInfo()
            note.add_text("reca", json.dumps(made_from))
            content.save(temporary, pnginfo=note)
        elif isinstance(content, Image.Image):
            content.save(temporary)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        elif temporary.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            temporary.write_text(json.dumps(content, indent=1, default=str, allow_nan=False))


# The exact names that a run gives: to its checkpoints, to its previews, and to the temporary files
# that a kill leaves behind.
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{6,})")
PREVIEW_NAME = re.compile(r"(step_\d{6,}|(before|input|told_before)_\d+)\.png")
LEFTOVER_NAME = re.compile(r"\.tmp-(\d+-.+|checkpoint-\d{6,})")


def named_checkpoints(folder):
    """The folders in `folder` that have the name of a run's checkpoint, lowest step first.

    Only the exact form counts, and the step is compared as a number. A user who copies a checkpoint
    to checkpoint-000002-keep, or who has a checkpoint-best, finds it untouched; and
    checkpoint-1000000 is newer than checkpoint-999999.
    """
    if not Path(folder).is_dir():
        return []

    steps = {}
    for path in Path(folder).iterdir():
        form = CHECKPOINT_NAME.fullmatch(path.name)
        if form and path.is_dir():
            steps[path] = int(form[1])
    return sorted(steps, key=steps.get)


def own_checkpoints(out):
    """The checkpoints that a run wrote into `out`, oldest first: those of the exact name that hold
    the state of a training (trainer.pt), too. Only these are resumed from, and only these are
    deleted when newer ones are there."""
    return [path for path in named_checkpoints(out) if (path / "trainer.pt").is_file()]


def leftovers(out):
    """The half-written files and folders that a killed run left in `out`."""
    if not Path(out).is_dir():
        return []
    return [path for path in Path(out).iterdir() if LEFTOVER_NAME.fullmatch(path.name)]


def written_by_run(out):
    """What an earlier run wrote into `out`, without which a new run begins. The user's files beside
    them are not in the list."""
    out = Path(out)
    names = ("log.jsonl", "loss.png", "scores.json", "effect.png", "i2t_self.jsonl")
    files = [out / name for name in names]
    if (out / "previews").is_dir():
        for path in (out / "previews").iterdir():
            if PREVIEW_NAME.fullmatch(path.name):
                files.append(path)
    return own_checkpoints(out) + [path for path in files if path.is_file()]


def inside(folder, name):
    """folder / name, for a name that comes from a file or an archive. Raises InputError where it
    leads out of the folder, as "../other" does."""
    path = Path(folder) / name
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{name} leads out of {folder}: not written")
    return path


# A text file may begin with one of these marks, which tells its encoding. UTF-32 stands before
# UTF-16, since its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path):
    """The text of a file, with "\\n" at the end of every line, and without a byte order mark.

    The encoding is the one that a byte order mark names, or else UTF-8. Nothing is guessed: raises
    InputError for another encoding, with the line where it shows.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error

    encoding = "utf-8"
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            encoding = name
            break

    # A zero shows another encoding, too: UTF-16 without a mark is valid UTF-8 with a zero in front
    # of or behind every letter.
    position = None
    try:
        text = data.decode(encoding)
        if "\0" in text:
            position = data.find(b"\0")
    except UnicodeDecodeError as error:
        position = error.start
    if position is not None:
        line = data[:position].count(b"\n") + 1
        raise InputError(f"cannot read {path}: line {line} is not {encoding} text; save the file "
                         "as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path, lines=False):
    """The content of a .json file, or (lines=True) the list of the objects in a .jsonl file.
    Raises InputError with the number of the malformed line."""
    def parse(content, lines_before):
        try:
            return json.loads(content)
        except json.JSONDecodeError as error:
            line = lines_before + error.lineno
            raise InputError(f"{path}: line {line} is not JSON ({error.msg})") from error

    text = read_text(path)
    if not lines:
        return parse(text, lines_before=0)

    # The lines are not those of splitlines(): it also cuts at U+2028, which JSON allows in a text.
    objects = []
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            objects.append(parse(line, lines_before=number))
    return objects


def read_object(path):
    """The content of a .json file that must hold an object, such as a config or the record of a
    run. Raises InputError where it holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object {{...}}, but a {type(content).__name__}")
    return content


def read_whole_lines(path):
    """The objects in a .jsonl that runs append to; [] where there is no such file. Skipped are
    lines that are no object: empty ones, and those that a kill has left half-written."""
    if not path.exists():
        return []

    objects = []
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            objects.append(json.loads(line))
    return [content for content in objects if isinstance(content, dict)]


def mend_lines(path, keep=lambda row: True):
    """Rewrites a .jsonl that runs append to, with its whole lines alone, and returns their objects.

    Left out are also those that `keep` refuses, or that lack what `keep` looks at.
    """
    kept = []
    for row in read_whole_lines(path):
        with contextlib.suppress(KeyError, TypeError):
            if keep(row):
                kept.append(row)
    write(path, kept)
    return kept


# ==== 2. Checkpoints ==============================================================================
# --model is what a user has at hand: a known name, a hub id, a folder, a file, or the folder of a
# run. There may be several files: shards, averages of the weights, the same weights in two formats.
# A wrong choice among them would not fail: it would silently train another model. So a file counts
# if it *holds* the right tensors, whatever it is called; where two would do, the user is asked
# which one, or told which one is taken; and `load_strictly` gives every weight its value, and every
# value its weight. Code that comes with a checkpoint is never executed.


WEIGHT_SUFFIXES = (".safetensors", ".pth", ".bin", ".pt", ".ckpt")


def newest_in(folder):
    """The folder to load from. For the folder of a run, which has checkpoints but no weights of its
    own, it is the newest checkpoint, and a line says so: --model OUT means what the run has
    learned. Any other folder is given back."""
    checkpoints = [path for path in named_checkpoints(folder) if any(path.iterdir())]
    has_weights = any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())
    if has_weights or not checkpoints:
        return folder

    newest = checkpoints[-1]
    say(f"{folder} is a run: its newest checkpoint, {newest.name}, is taken")
    return newest


def check_model(model, names):
    """Raises InputError where --model cannot be a known name, a file, a folder or a hub id. The
    nearest of `names` is offered, before anything is downloaded."""
    place = model.partition(":")[0]  # "folder:FILE" names a file in a folder
    if model in names or Path(model).expanduser().exists() or Path(place).expanduser().exists():
        return

    near = difflib.get_close_matches(model.lower(), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if model.startswith((".", "/", "~")) or place.count("/") != 1:
        raise InputError(f"no such model: {model}{hint} (give a folder, a hub id like owner/name, "
                         f"or one of {', '.join(names)})")
    if near:
        say(f"--model {model} is none of the names that are known here{hint}")


def hub_folder(source, patterns):
    """A folder on this machine for `source`, a path or a hub id "owner/name".

    A folder is given back (of a run's folder its newest checkpoint); from the hub the files that
    match the glob patterns are downloaded. Raises InputError where there is neither.
    """
    if Path(source).expanduser().is_dir():
        return newest_in(Path(source).expanduser())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InputError(f"no such model: {source} (give a hub id like owner/name, a folder, or "
                         "tiny)")

    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except Exception as error:  # the hub has dozens of types: offline, not found, gated, proxy ...
        raise InputError(f"cannot get {source} from the Hugging Face hub ({type(error).__name__}): "
                         "check the name and the network, or give --model DIR with the files, or "
                         "try --model tiny") from error


def tiny_folder(name):
    """The folder of the tiny model `name` that is shipped beside this file, in the released layout.
    Raises InputError where it is not there."""
    folder = Path(__file__).resolve().parent / "tiny" / name
    if not any(folder.glob("*.json")):
        raise InputError(f"no tiny model in {folder}: copy the folder tiny/ of the repository to "
                         "where the script lies, or make the model: "
                         f"python tiny/pretrain.py {name}")
    return folder


def load_state(path):
    """A checkpoint file -> {name: CPU tensor}.

    The file is a .safetensors, an .index.json that lists shards, or a file of torch.save, in which
    the weights may lie under "state_dict", "model" or "module". It is read with weights_only=True,
    so that a downloaded file cannot run code. Raises InputError for what is no checkpoint.
    """
    path = Path(path)
    try:
        if path.name.endswith(".index.json"):
            return load_shards(path)
        if path.suffix == ".safetensors":
            return unwrapped(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # it is cut off, or no checkpoint, or a pickle with code in it
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: "
                         f"{brief(error)})") from error

    if not isinstance(state, dict):
        raise InputError(f"{path} is not a readable checkpoint: it holds a "
                         f"{type(state).__name__}, no dict of tensors")
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = {str(key): value for key, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        raise InputError(f"{path} is not a readable checkpoint: there is no tensor in it")
    return unwrapped(tensors)


def load_shards(index):
    """The tensors of all the files that an .index.json lists."""
    weight_map = json.loads(index.read_text())["weight_map"]
    # Only the name counts, not a path in it: the shards lie beside the index.
    shards = {Path(shard).name for shard in weight_map.values()}
    state = {}
    for shard in sorted(shards):
        state.update(load_state(index.with_name(shard)))
    return state


def shards_of(index):
    """{name of a tensor: name of the file beside the index that holds it}, by an .index.json."""
    weight_map = read_object(index).get("weight_map", {})
    return {name: Path(shard).name for name, shard in weight_map.items()}


def unwrapped(state):
    """{name of a tensor: value} without what wrappers put in front of every name: "module." is
    DistributedDataParallel's, "_orig_mod." is torch.compile's, and either may be the outer one."""
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def load_training(folder, mmap=False):
    """What a checkpoint holds beside the weights (trainer.pt), as Trainer.save has written it.
    Raises InputError where it is damaged. mmap: for a look at it, without reading all of it."""
    path = folder / "trainer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({type(error).__name__}: "
                         f"{brief(error)})") from error

    if not isinstance(state, dict) or not {"step", "updates", "seen"} <= state.keys():
        raise InputError(f"{path} is not a readable checkpoint: no step is told in it")
    return state


@contextlib.contextmanager
def resuming(folder):
    """with resuming(checkpoint): read it. Where that fails, the InputError offers the checkpoint
    before it: two are kept, so that a damaged one does not cost the run."""
    try:
        yield
    except torch.OutOfMemoryError:  # it is a RuntimeError, too, but says nothing about the file
        raise
    except (InputError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            problem = str(error)
        else:
            problem = f"{folder} cannot be gone on with ({brief(error)})"

        checkpoints = own_checkpoints(folder.parent)
        earlier = checkpoints[:checkpoints.index(folder)]
        if earlier:
            offer = f"remove {folder} to go on from {earlier[-1].name}"
        else:
            offer = "there is no checkpoint before it"
        raise InputError(f"{problem}; {offer}") from error


def tensor_names(path):
    """The names of the tensors in a checkpoint file, from its header alone where it has one. The
    set is empty where the file cannot be read."""
    try:
        if path.name.endswith(".index.json"):
            return set(shards_of(path))
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return set(unwrapped(dict.fromkeys(file.keys())))
        return set(load_state(path))
    except (InputError, OSError, SafetensorError):
        return set()


def is_average(path):
    """Does the file's name say that it holds an exponential moving average (EMA) of the weights?"""
    return "ema" in re.split(r"[-_.]", path.name.lower())


def find_checkpoint(source, released, kinds, beside, needs=()):
    """The one file with the weights that `source` means.

    source: a key of `released` ({name: "owner/name:FILE"}), a file, or a folder or hub id, with
    ":FILE" behind it where it holds several. kinds: lists of glob patterns, the preferred kind of
    file first. beside: patterns of what else a download needs.

    Among several files only those count that have the tensors `needs`, whatever they are called. An
    average of the weights (EMA) comes last, unless its very name is asked for: with the usual decay
    of 0.9999 the average after a short post-training is still mostly the old model. Which file is
    taken, and which are left, is printed. Raises InputError where there is no such file, and where
    several could be meant.
    """
    source = released.get(source, source)
    path = Path(source).expanduser()
    if path.is_file():
        return path

    # What is behind a colon names a file, unless the colon is in the name of a folder.
    file = ""
    if not path.is_dir():
        source, _, file = source.partition(":")
    if not file and any(place.startswith(f"{source}:") for place in released.values()):
        raise InputError(f"{source} holds several models: give one of {', '.join(released)}, or "
                         f"{source}:FILE")
    if file:
        kinds = [[file]]

    folder, preference = candidates(source, kinds, beside, set(needs))
    if not preference:
        patterns = ", ".join(itertools.chain(*kinds))
        raise InputError(f"{folder} holds 0 files like {patterns}: no checkpoint")
    chosen = choose_checkpoint(preference, set(needs), folder, source)

    # Of a checkpoint in shards only the index has been downloaded until here.
    if chosen.name.endswith(".index.json") and not Path(source).expanduser().is_dir():
        hub_folder(source, sorted(set(shards_of(chosen).values())))
    return chosen


def candidates(source, kinds, beside, needs):
    """The folder of `source`, and {file: preference} of what in it may be the checkpoint. A
    preference is (is it an average of the weights, the number of its kind); the lowest is taken."""
    local = Path(source).expanduser().is_dir()
    if local:
        folder = hub_folder(source, beside)

    preference = {}
    for number, patterns in enumerate(kinds):
        if not local:
            folder = hub_folder(source, [*patterns, *beside])
        for pattern in patterns:
            paths = sorted(folder.glob(pattern))
            if not paths and not local:
                paths = sorted(folder.rglob(pattern))
            for path in paths:
                # A pattern without a star asks for the file by name: then an average is wanted.
                average = "*" in pattern and is_average(path)
                preference.setdefault(path, (average, number))

        # A download stops at the first kind that has the weights: the others may be 30 GB each.
        if not local:
            wanted = [path for path, (average, _) in preference.items() if not average]
            if any(tensor_names(path) >= needs for path in wanted):
                break
    return folder, preference


def choose_checkpoint(preference, needs, folder, source):
    """Of {file: preference} the lowest one that has the tensors `needs`. Raises InputError where
    none has them, or two of the same preference do: a user with two checkpoints in a folder must
    know which one is trained."""
    paths = list(preference)
    if len(paths) == 1:
        return paths[0]

    # A shard is no checkpoint of its own: its index stands for it.
    shards = set()
    for path in paths:
        if path.name.endswith(".index.json"):
            shards.update(path.with_name(shard) for shard in shards_of(path).values())
    whole = [path for path in paths if path not in shards]

    good = [path for path in whole if tensor_names(path) >= needs]
    good.sort(key=lambda path: (preference[path], path))
    if not good:
        names = []
        for path in whole:
            names.append(path.name if tensor_names(path) else f"{path.name}: unreadable")
        raise InputError(f"{folder} holds {len(whole)} files ({', '.join(names)}), none of which "
                         f"has {', '.join(sorted(needs))}")

    first = good[0]
    equal = [path for path in good if preference[path] == preference[first]]
    if len(equal) > 1:
        raise InputError(f"{folder} holds {len(equal)} checkpoints ({first.name} ...): give "
                         f"{source}:FILE")
    if len(good) > 1:
        left = []
        for path in good[1:]:
            left.append(f"{path.name} (an average)" if is_average(path) else path.name)
        say(f"{folder}: {first.name} is taken, left are {', '.join(left)}")
    return first


def find_weights(folder, *names):
    """The state dict of the first of `names` that the folder holds, as one file or as shards with
    an index. Raises InputError where it holds none."""
    for name in names:
        for path in (Path(folder) / name, Path(folder) / f"{name}.index.json"):
            if path.exists():
                return load_state(path)
    raise InputError(f"{folder} holds no {' and no '.join(names)}")


def load_strictly(module, state, name):
    """load_state_dict that names what does not fit: a weight without a value, a value without a
    weight, or another shape. Raises InputError; `name` is what the message calls the state."""
    own = module.state_dict()
    other_shapes = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    problems = {
        "lacks": own.keys() - state.keys(),
        "has unexpected": state.keys() - own.keys(),
        "has other shapes for": other_shapes,
    }
    for problem, keys in problems.items():
        if keys:
            listed = ", ".join(sorted(keys)[:4])
            more = " ..." if len(keys) > 4 else ""
            raise InputError(f"{name} {problem} {len(keys)} keys: {listed}{more}")
    module.load_state_dict(state)


def load_tokenizer(folder):
    """The tokenizer in a folder. Raises InputError where there is none."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {folder}: {brief(error)}") from error

    # The tokenizer forgets how it was read: saved again, it gives the same files.
    for origin in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(origin, None)
    return tokenizer


# The blocks of an autoencoder, in diffusers and in the released files, which all descend from the
# same code: KL-16 of Harmon, MAGVIT-v2 of Show-o, FLUX's of BAGEL. Replaced from top to bottom.
AUTOENCODER_NAMES = {
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
}


def autoencoder_names(module):
    """{name of a weight in diffusers' autoencoder blocks: its name in the released file}. The
    released files number the decoder's levels from the finest one, diffusers in the order in which
    they run, from the coarsest one."""
    keys = list(module.state_dict())
    levels = re.findall(r"up_blocks\.(\d+)", " ".join(keys))
    last = max(int(level) for level in levels)

    names = {}
    for key in keys:
        name = re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{last - int(level[1])}", key)
        name = re.sub(
            r"mid_block\.resnets\.(\d)", lambda block: f"mid.block_{int(block[1]) + 1}", name)
        for ours, theirs in AUTOENCODER_NAMES.items():
            name = name.replace(ours, theirs)
        names[key] = name
    return names


def autoencoder_from_original(module, state):
    """The state dict of a released autoencoder -> the same with diffusers' names. Unknown names
    stay as they are."""
    ours = {theirs: ours for ours, theirs in autoencoder_names(module).items()}
    renamed = {}
    for key, value in state.items():
        # The released attention is made of 1 x 1 convolutions, diffusers' of matrices.
        if "attn" in key and value.dim() == 4:
            value = value.flatten(1)  # [out, in, 1, 1] -> [out, in]
        renamed[ours.get(key, key)] = value
    return renamed


def autoencoder_to_original(module):
    """The inverse: the state dict of diffusers' blocks, with the release's names and shapes."""
    names = autoencoder_names(module)
    renamed = {}
    for key, value in module.state_dict().items():
        if "attn" in names[key] and value.dim() == 2:
            value = value[..., None, None]  # [out, in] -> [out, in, 1, 1]
        renamed[names[key]] = value.contiguous()
    return renamed


# ==== 3. Processes and random numbers =============================================================
# Under torchrun one process runs for each GPU (a *rank*). Each has the whole model, and they divide
# the images of a step among them. A model that is too large for one GPU has its weights divided as
# well, by its own script (BAGEL).


def world():
    """(rank, number of ranks): (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def say(text):
    """Prints a line, once: on rank 0."""
    if world()[0] == 0:
        print(text)


def launched_ranks():
    """How many processes torchrun has started; 1 without it.

    The queues of some clusters set WORLD_SIZE themselves, and start a single process. Raises
    InputError where torchrun's other variables are missing: the process would wait for the others
    forever.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if count == "1":
        return 1

    others = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in others if not os.environ.get(name)]
    if missing:
        problem = f"{', '.join(missing)} is not set"
    elif not count.isdecimal() or count == "0":
        problem = "that is no number of processes"
    else:
        return int(count)
    raise InputError(f"WORLD_SIZE is {count}, but {problem}: start with torchrun, or unset "
                     "WORLD_SIZE")


def start_process(args):
    """The device of this process. Under torchrun it joins the process group, too: NCCL on GPUs,
    gloo on CPUs. Raises InputError where there are more processes than GPUs."""
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"process {device.index} of this machine has no GPU: there are "
                             f"{torch.cuda.device_count()}; start as many processes with "
                             "--nproc-per-node")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        # On Hopper torch prefers cuDNN's attention, which needs milliseconds to plan each new
        # shape, and prompts, masks and images have new lengths at every step. Flash attention has
        # no plans.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        device = torch.device("cpu")

    if launched_ranks() > 1 and not dist.is_initialized():
        # The other ranks wait while rank 0 describes images, paints previews and writes
        # checkpoints, which may take longer than the usual limit of 10 minutes. NCCL is told its
        # device: otherwise it guesses one at the first barrier, maybe that of another rank.
        dist.init_process_group(
            backend="nccl" if cuda else "gloo",
            timeout=datetime.timedelta(hours=4),
            device_id=device if cuda else None,
        )
    torch.manual_seed(args.seed)
    return device


def own_share(batch):
    """(first, end): this rank's are the images first .. end - 1 of a step's images 0 .. batch - 1.
    The shares of the ranks differ by one image at most."""
    rank, ranks = world()
    first = batch * rank // ranks
    end = batch * (rank + 1) // ranks
    return first, end


# How many numbers go into one all_reduce: enough to fill the network, and little memory beside the
# gradients.
BUCKET = 2 ** 25


def gradient_buckets(parameters):
    """The gradients in lists, each of one dtype and of at most BUCKET numbers in all. A larger
    gradient has a list of its own. The order is that of the parameters, the same on all ranks."""
    buckets = []
    filling = {}  # {dtype: the bucket to which gradients of this dtype are added}
    for parameter in parameters:
        gradient = parameter.grad
        bucket = filling.get(gradient.dtype, [])
        size = sum(other.numel() for other in bucket)
        if not bucket or size + gradient.numel() > BUCKET:
            bucket = []
            buckets.append(bucket)
            filling[gradient.dtype] = bucket
        bucket.append(gradient)
    return buckets


def average_gradients(parameters):
    """Data parallelism: replaces the gradients on every rank by their mean over the ranks. Called
    once for each update of the weights.

    Why not DistributedDataParallel: it expects one forward and one backward per step. A step here
    has a backward for each micro-batch of each loss, and each loss leaves other parameters without
    a gradient. (The public code of Show-o cannot run on two GPUs for this reason.)
    """
    if not dist.is_initialized():
        return

    # All ranks must bring the same tensors, also those that a rank has no gradient for.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)

    # An all_reduce for each of a thousand tensors costs more in latency than in transfer, so many
    # gradients travel as one flat tensor.
    for gradients in gradient_buckets(parameters):
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()

        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean_gradient in zip(gradients, flat.split(sizes)):
            gradient.copy_(mean_gradient.view_as(gradient))


# Random numbers
# --------------
# The images come in an endless stream (section 5), in which each has a position: with a batch of 4,
# step 0 has the positions 0 to 3, step 1 the positions 4 to 7, and so on. Every random number of an
# image (crop, template, mask, order of its tokens, timestep, noise) comes from a generator that
# belongs to this image alone. Its seed is a hash of
#
#     the run's seed,  the name of the loss ("recon", "i2t", "t2i"),  the image's position
#
# and of nothing else: not of the batch or the micro-batch that the image is in, not of the process
# that has it, not of the device (all draws are made on the CPU), and not of what was drawn before.
# Two things follow from it.
#
#   - A run resumes bit for bit, and no state of a generator is stored: after n steps the next
#     position is n * batch, and from there on the draws are those of a run that never stopped.
#   - Two processes equal one: each draws for its half of the positions what a single process would
#     have drawn for them.
#
# What does not belong to one image has a seed of the same kind. The order of the images in an epoch
# follows from the run's seed, the loss and the number of the epoch. The few numbers that are drawn
# once for a whole batch (Harmon's ratio of masked tokens) follow from the run's seed, the loss and
# the step, so that all processes draw the same ones.
#
# The one exception is dropout, inside the model and on its device: its generator is seeded at each
# step from (seed, step, rank). A resumed run repeats it; another number of processes does not.


def stable_seed(*keys):
    """A seed of 63 bits from any printable keys: the first bytes of a hash of their text. Unlike
    Python's own hash() it is the same on every machine and in every process."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Rng:
    """The random numbers of the images at `positions` in one step:

        rng = Rng(seed, "recon", step, positions=[8, 9, 10, 11])
        noise = rng.normal(3, 64, 64)       # [4, 3, 64, 64], on the CPU

    Each method draws one tensor [B, *shape], in which row i comes from the generator of image i. So
    noise[2] belongs to position 10, in whatever batch that image is. `images` are these generators,
    one for each image. `batch` is one more torch.Generator, for what is drawn once for the batch.
    """

    def __init__(self, seed, *keys, positions):
        """keys: the name of the loss, and the step. The step is in the seed of `batch` only: in the
        seed of an image's generator stands its position."""
        loss = keys[:1]
        self.batch = torch.Generator().manual_seed(stable_seed(seed, *keys))
        self.images = []
        for position in positions:
            image_seed = stable_seed(seed, *loss, "image", position)
            self.images.append(torch.Generator().manual_seed(image_seed))

    @classmethod
    def fresh(cls, batch_size):
        """For callers to whom the numbers do not matter: other ones at each call. The seed comes
        from torch's global generator, so torch.manual_seed fixes them."""
        seed = int(torch.randint(2 ** 62, ()))
        return cls(seed, positions=range(batch_size))

    @classmethod
    def sampling(cls, seed, batch_size):
        """For samplers: the numbers of an image depend on its seed alone, so a picture is the same
        in a batch of 1 and of 32. seed: a list of one for each image, or an int for seed, seed + 1,
        ... Raises InputError where the list has another length."""
        if isinstance(seed, int):
            seeds = list(range(seed, seed + batch_size))
        else:
            seeds = list(seed)
        if len(seeds) != batch_size:
            raise InputError(f"{len(seeds)} seeds for {batch_size} images")
        return cls("sampling", positions=seeds)

    def normal(self, *shape):
        """float32 [B, *shape], standard normal."""
        rows = [torch.randn(shape, generator=generator) for generator in self.images]
        return torch.stack(rows)

    def uniform(self, *shape):
        """float32 [B, *shape], uniform in [0, 1)."""
        rows = [torch.rand(shape, generator=generator) for generator in self.images]
        return torch.stack(rows)

    def integers(self, high, *shape):
        """int64 [B, *shape], uniform in 0 .. high - 1."""
        rows = [torch.randint(high, shape, generator=generator) for generator in self.images]
        return torch.stack(rows)

    def permutation(self, n):
        """int64 [B, n]: for each image the numbers 0 .. n - 1 in a random order."""
        rows = [torch.randperm(n, generator=generator) for generator in self.images]
        return torch.stack(rows)


# ==== 4. Templates and images =====================================================================


SEED_TEMPLATE = "Describe the image in detail."


def templates(which="all"):
    """The instructions that stand in the prompt with the image's embeddings (paper, section 3).

    A *template* asks for a detailed description. "all": 10 x 6 x 6 = 360 ways to ask, so that the
    model does not learn the wording of a single one. "one": the seed template alone (the paper's
    ablation).
    """
    if which == "one":
        return [SEED_TEMPLATE]

    verbs = (
        "Describe",
        "Please describe",
        "Carefully describe",
        "Write a description of",
        "Please write a description of",
        "Give a description of",
        "Provide a description of",
        "Compose a description of",
        "Give a full account of",
        "Explain what you see in",
    )

    nouns = (
        "the image",
        "this image",
        "the picture",
        "this picture",
        "the given image",
        "the scene shown here",
    )

    manners = (
        "in detail",
        "in great detail",
        "as precisely as you can",
        "without leaving anything out",
        "so that someone could draw it from your words",
        "with every object, its color and its place",
    )

    combinations = itertools.product(verbs, nouns, manners)
    return [f"{verb} {noun} {manner}." for verb, noun, manner in combinations]


IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif")

# The header of a small file may ask for all memory. A file with more bytes than this is refused
# before it is read, an image with more pixels before it is decoded.
MAX_BYTES = 2 ** 30
MAX_PIXELS = 120_000_000

# The largest side of a square onto which an image is put, or to which it is stretched, on the way
# to a smaller one. A strip of 4 x 50000 pixels would make a square of gigabytes.
MAX_SIDE = 6144

# What is raised for an image that cannot be used, by load_image and by a model's preprocess. Who
# goes through many images catches it, names the image, and goes on with the next one.
UNREADABLE = (
    OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError)


class UnreadableImage(ValueError):
    """What should be an image cannot be used as one; the message says why."""


@contextlib.contextmanager
def decoding():
    """Turns whatever is raised inside into UnreadableImage. Pillow's decoders, and its reader and
    writer of EXIF, raise TypeError, struct.error, MemoryError and many more: a list of them would
    never be complete."""
    try:
        yield
    except Exception as error:
        raise UnreadableImage(brief(error)) from error


def read_source(source):
    """The bytes of an image file, from a path or from (tar file, offset, size). What is in memory
    already (bytes, a PIL image) and None are given back. Raises UnreadableImage."""
    if not isinstance(source, (tuple, str, Path)):
        return source

    with decoding():
        if isinstance(source, tuple):
            path, offset, size = source
        else:
            path = source
            offset = 0
            size = os.path.getsize(source)
        if size > MAX_BYTES:
            raise ValueError(f"file of {size} bytes refused")
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)


def load_image(source):
    """A source as in read_source -> PIL RGB. EXIF rotation is applied, transparency becomes white,
    16 bits are scaled to 8; a PIL image is given back as it is. Raises UnreadableImage."""
    data = read_source(source)
    if isinstance(data, Image.Image):
        return data
    with decoding():
        return decode(data)


def decode(data):
    """The bytes of an image file -> PIL RGB, for load_image."""
    # The size is known before any pixel is decoded. Pillow's own, lower limit is lifted for ours.
    Image.MAX_IMAGE_PIXELS = None
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS or min(image.size) < 1:
        raise ValueError(f"image of {image.width}x{image.height} pixels refused")
    image = ImageOps.exif_transpose(image)

    # Greyscale of 16 bits is scaled by 65535 / 255 = 257; Pillow's convert would clip it at 255.
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels in floating point, whose range no file says")

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def plain(text, markers):
    """A text of the user in which no marker is left: "<IMG_CONTEXT>" becomes "< IMG_CONTEXT>".

    A *marker* is a special token of the prompt: it stands for an image, or for the end of a turn.
    Inside of a user's words it must stand for itself.
    """
    for marker in markers:
        text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def to_uint8(image):
    """PIL RGB -> uint8 [3, H, W]: a quarter of the bytes of a float image on the way to the GPU."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(pixels):
    """uint8 [..., H, W] -> float32 in [-1, 1], on the device where they are. Pixels that are floats
    already are given back."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float() / 127.5 - 1


def to_tensor(image):
    """PIL RGB -> float32 [3, H, W] in [-1, 1]."""
    return normalize(to_uint8(image))


def to_pil(pixels):
    """[3, H, W] in [-1, 1] -> PIL RGB. The rounding is that of the original repositories:
    127.5 x + 128, clamped to 0 .. 255 and truncated."""
    pixels = (127.5 * pixels.detach().float().cpu() + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())  # [H, W, 3]


def random_square(image, size, rng=None):
    """The largest square of the image, at a random place along its longer side (rng: a numpy
    Generator) or in the middle (None), resized to size x size (bicubic)."""
    side = min(image.size)
    spare_width = image.width - side
    spare_height = image.height - side
    if rng is None:
        left = spare_width // 2
        top = spare_height // 2
    else:
        left = int(rng.integers(spare_width + 1))
        top = int(rng.integers(spare_height + 1))
    return image.crop((left, top, left + side, top + side)).resize((size, size))


def shrunk(image, longest):
    """The image with a longer side of at most `longest`, in its proportions."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size])


def check_blur(factor, side):
    """Raises InputError for a blur (None or 0: none) that leaves nothing of `side` pixels. Called
    before training, not at the first image."""
    if factor and not 1 <= factor <= side // 2:
        raise InputError(f"--blur {factor}: at most {side // 2}, half of the image's side")


def blur(pixels, factor):
    """The paper's ablation F.2: [B, 3, H, W], shrunk by `factor` and enlarged again. There are as
    many tokens as before, with fewer details. Raises InputError where nothing would be left."""
    height, width = pixels.shape[-2:]
    check_blur(factor, min(height, width))
    small = (height // factor, width // factor)
    pixels = F.interpolate(pixels, size=small, mode="bilinear")  # [B, 3, H / factor, W / factor]
    return F.interpolate(pixels, size=(height, width), mode="bilinear")  # [B, 3, H, W]


# ==== 5. Data =====================================================================================
# An *example* is one entry of the data. Everywhere in this file it is a tuple (name, source, text):
#
#   name     what the log, the outputs and the self-captions call it: no two examples share one
#   source   where the image is: a path; (tar file, offset, size); a PIL image (the toy world); or
#            None for a text without an image
#   text     None (RecA needs none, a template is drawn instead); a caption (L_t2i); or a
#            conversation [(question, answer), ...] (L_i2t)
#
# Examples are light: a list of 240,000 is made in seconds, and no image has been opened for it. A
# `Stream` shuffles them and makes *items* of them, which hold the image, ready for the model. And
# `encode_batch` runs a batch of items through the frozen parts of the model.


def files_below(root, out, left):
    """The paths of all files below the folder `root`, sorted. Links to folders are followed.

    A folder that can be reached in two ways counts once: its images would otherwise be trained on
    twice as often, and a link to a folder above would never end. What a run has made for itself is
    left out, and counted in `left`: all of the folder `out`, and the previews, checkpoints and
    overviews of other runs. Nobody who starts a run in the folder of the images wants to train on
    the pictures that the last run has drawn.
    """
    def unreadable(error):
        left["folders that cannot be read"] += 1

    own = os.path.realpath(out) if out else None
    seen = set()
    paths = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        # os.walk goes into what is left of `folders`, the list of the folders in this one.
        real = os.path.realpath(folder)
        if real == own and folder != str(root):
            left["folders of this run"] += 1
            folders.clear()
            continue
        if real in seen:
            folders.clear()
            continue
        seen.add(real)

        if "run.json" in names:
            made = {name for name in folders
                    if name == "previews" or CHECKPOINT_NAME.fullmatch(name)}
            pictures = {"loss.png", "reconstructions.png"}.intersection(names)
            left["previews, checkpoints and overviews of runs"] += len(made) + len(pictures)
            folders[:] = [name for name in folders if name not in made]
            names = [name for name in names if name not in pictures]

        folders.sort()
        paths += [os.path.join(folder, name) for name in names]
    return sorted(paths)


def why_left_out(name):
    """Why a file of this name (relative to what the user gave) is no image to train on; "" for an
    image."""
    *folders, file = name.split("/")
    if file.startswith("._") or "__MACOSX" in folders:
        return "macOS notes (._*)"  # beside each real image, under its name and suffix

    suffix = os.path.splitext(file)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        return suffix or "without a suffix"
    return "half-written" if LEFTOVER_NAME.fullmatch(file) else ""


def tar_images(path, left):
    """The images in an uncompressed .tar, [(name, (path, offset, size)), ...]; counts what is left
    out. Of members with equal names the last one is taken, as when the archive is unpacked. Raises
    InputError for another kind of file."""
    members = {}
    try:
        # "r:" means uncompressed: only then a member has an offset at which it can be read.
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                reason = why_left_out(member.name)
                if reason:
                    left[reason] += 1
                else:
                    members[member.name] = (path, member.offset_data, member.size)

    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is not a readable, uncompressed tar file ({error})") from error
    return list(members.items())


def counted(counts):
    """A Counter in words, the most frequent first: "7 .png, 2 .jpg"."""
    return ", ".join(f"{count} {what}" for what, count in counts.most_common() if count)


def left_out(left):
    """The end of a line that says what was found: what was left out, or nothing."""
    return f"; left out: {counted(left)}" if counted(left) else ""


def image_rows(source, out=None):
    """Examples of unlabelled images, from a folder (with those below it, and the uncompressed .tar
    files in them: WebDataset), from one .tar, or from one image.

    Each name is given once: a name is all by which a log line, a reconstruction or a description
    can be traced back to its image. out: the folder of a run, which does not count; with it, a line
    says what was found, and what was left out and why. Raises InputError where there is no image.

    Only names are listed: 240,000 files take seconds. Tar members are read by their offset and
    never extracted, so a path inside an archive has no effect on the disk.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise InputError(f"no such folder or .tar file: {source}")

    left = collections.Counter()  # {why: how many files are left out}
    if source.is_file():
        root = source.parent
        paths = [str(source)]
    else:
        root = source
        paths = files_below(source, out, left)

    loose = []   # (name, path)
    packed = []  # (name in the archive, (tar file, offset, size), name of the archive)
    for path in paths:
        name = os.path.relpath(path, root)
        reason = why_left_out(name)
        if reason == ".tar":
            archive = os.path.splitext(name)[0]
            for member, place in tar_images(path, left):
                packed.append((member, place, archive))
        elif reason:
            left[reason] += 1
        else:
            loose.append((name, path))

    # The shards of a data set number their images alike: each may have its own 00001.jpg. Such a
    # name gets its archive's in front; a name that is there once stays as it is.
    frequency = collections.Counter()
    frequency.update(name for name, _, _ in packed)
    frequency.update(name for name, _ in loose)
    examples = []
    for name, place, archive in packed:
        if frequency[name] > 1:
            name = f"{archive}/{name}"
        examples.append((name, place, None))
    for name, path in loose:
        examples.append((name, path, None))

    if not examples:
        suffixes = ", ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
        raise InputError(f"no image ({suffixes}, or a .tar of them) in {source}{left_out(left)}")
    if out is not None:
        kinds = collections.Counter()
        kinds.update(os.path.splitext(name)[1].lower() for name, _, _ in examples)
        archives = {archive for _, _, archive in packed}
        in_tar = f", {len(packed)} of them in {len(archives)} .tar" if packed else ""
        say(f"{source}: {len(examples)} images ({counted(kinds)}){in_tar}{left_out(left)}")
    return examples


def read_rows(path, what, read):
    """[read(i, row), ...] for the rows of a file: a .json that holds a list, or a .jsonl.

    what: what a row must be, in words. Raises InputError for the first one that is something else:
    read shows it by a KeyError, TypeError, AttributeError or IndexError.
    """
    rows = read_json(path, lines=Path(path).suffix.lower() == ".jsonl")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} is not a list: every row must be {what}")

    results = []
    for i, row in enumerate(rows):
        try:
            results.append(read(i, row))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: row {i + 1} is not {what}") from error
    return results


def text_in(row, *keys):
    """The text under the first of the keys that the row has. Raises KeyError where there is none,
    as read_rows expects it."""
    text = None
    for key in keys:
        if key in row:
            text = row[key]
            break
    if not isinstance(text, str) or not text.strip():
        raise KeyError(keys)
    return text


# Who asks and who answers in a conversation: LLaVA's names, and those of other files.
ASKING_ROLES = ("human", "user")
ANSWERING_ROLES = ("gpt", "assistant", "model")


def paired_turns(turns):
    """The turns of a conversation -> ([(question, answer), ...], how many turns are in no pair).

    A turn is {"from": role, "value": text}; some files say {"role": ..., "content": ...}. Roles
    decide, not the order. In no pair are turns of a system, answers to no question, and questions
    without an answer: trained on as a pair, two that do not belong together would teach nonsense.
    """
    pairs = []
    unpaired = 0
    question = None
    for turn in turns:
        role = turn["from"] if "from" in turn else turn["role"]
        text = turn["value"] if "value" in turn else turn["content"]
        text = text.replace("<image>", "").strip()  # the prompt puts the image in its own place
        if role in ASKING_ROLES:
            if question is not None:
                unpaired += 1
            question = text
        elif role in ANSWERING_ROLES and question is not None and text:
            pairs.append((question, text))
            question = None
        else:
            unpaired += 1

    if question is not None:
        unpaired += 1
    return pairs, unpaired


def conversation_rows(path, folder):
    """Examples for L_i2t, from a file as LLaVA's: a .json list, or a .jsonl, of

        {"image": name (optional), "conversations": [{"from": "human", "value": ...},
                                                     {"from": "gpt", "value": ...}, ...]}

    folder: that of the images (None: the file's own). Left out, and counted in a printed line, are
    turns that cannot be paired, and rows without a pair or with several images. Raises InputError
    for a malformed row, and where nothing is left.
    """
    left = collections.Counter()
    folder = Path(folder or Path(path).parent)

    def read(i, row):
        turns, unpaired = paired_turns(row["conversations"])
        left["turns without a counterpart"] += unpaired
        if not turns:
            left["rows without a question and its answer"] += 1
            return None

        image = row.get("image")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if isinstance(image, list):
            left["rows with several images"] += 1
            return None
        if not image:
            return f"text {i}", None, turns
        return image, folder / image, turns

    examples = read_rows(path, "a LLaVA conversation (image, conversations)", read)
    examples = [example for example in examples if example is not None]
    if not examples:
        raise InputError(f"{path}: no conversation of a human and gpt{left_out(left)}")
    say(f"{path}: {len(examples)} conversations{left_out(left)}")
    return examples


def caption_rows(path):
    """Examples for L_t2i, from a .jsonl of {"image": name, "caption": text}, where the images are
    relative to the folder of the file. Raises InputError for a malformed row."""
    def read(i, row):
        image = row["image"]
        return image, Path(path).parent / image, text_in(row, "caption")

    return read_rows(path, "an image with its caption (image, caption)", read)


class Cache:
    """What the frozen parts of the model compute for an image, kept on disk (--cache).

    Each image has a safetensors file, folder/<hash of the settings>/<hash of the image>. Settings
    are all that the result depends on (the frozen weights, sizes, ...), so nothing outdated can be
    read. Files are written atomically, so a run may be interrupted, and several runs and ranks may
    share the folder.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder) / hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        write(self.folder / "settings.json", settings)

    def path(self, image):
        """The file for an image: its bytes, or a PIL image."""
        data = image if isinstance(image, bytes) else image.tobytes()
        name = hashlib.sha256(data).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path):
        """The features in a file; None where there is none, or it is damaged: they are computed
        again."""
        try:
            return load_file(path) if path.exists() else None
        except Exception:
            return None

    def write(self, path, features):
        on_cpu = {key: value.detach().cpu().contiguous() for key, value in features.items()}
        with atomic(path) as temporary:
            save_file(on_cpu, temporary)


class Stream(torch.utils.data.Dataset):
    """The examples as an endless, shuffled stream: stream[position] for any position >= 0.

    With N examples, the positions 0 .. N - 1 are the first epoch, N .. 2N - 1 the second, and each
    epoch has another order. What stands at a position follows from the seed, the name of the loss
    and the position alone: which example, and its random crop and template. So the stream can be
    entered anywhere. A run resumes at the position that it had reached; and ranks and workers
    divide the positions among themselves, and see together what a single process would have seen.

    stream[position] is an item, a dict:

        name       of the example
        text       of the example, or a template where it has none
        sample     {name: CPU tensor}, what model.preprocess makes of the image
        features   instead of a sample: what the cache has for this image already
        path       of the image's file in the cache, where there is a cache
        skipped    the examples before it that could not be read, "name (why)" each
        position   of the item in the stream, from which its random numbers follow (Rng)

    name: of the loss, "recon", "i2t" or "t2i". texts: the templates, for examples without a text.
    """

    def __init__(self, name, examples, preprocess, seed, texts=None, cache=None):
        self.name = name
        self.examples = examples
        self.preprocess = preprocess
        self.seed = seed
        self.texts = texts
        self.cache = cache
        # Two epochs are remembered: a batch may lie across the border between two.
        self.order = functools.lru_cache(maxsize=2)(self.shuffled)

    def shuffled(self, epoch):
        """The order of the examples in an epoch: int64 [N]."""
        rng = np.random.default_rng(stable_seed(self.seed, self.name, "order", epoch))
        return rng.permutation(len(self.examples))

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.examples))
        order = self.order(epoch)
        rng = np.random.default_rng(stable_seed(self.seed, self.name, "item", position))

        # An example that cannot be read is replaced by the next one in the order. The item names
        # it, and from there it gets into the log: this code may run in a worker.
        skipped = []
        for attempt in range(len(order)):
            index = int(order[(place + attempt) % len(order)])
            name, source, text = self.examples[index]
            if text is None:
                text = self.texts[int(rng.integers(len(self.texts)))]
            try:
                loaded = self.load(source, rng)
            except UNREADABLE as error:
                # Some models cannot use a text without an image: that is no unreadable image.
                if source is not None:
                    skipped.append(f"{name} ({brief(error)})")
                continue
            return {"name": name, "text": text, "skipped": skipped, "position": position, **loaded}

        first = f", the first was {skipped[0]}" if skipped else ""
        raise InputError(f"no row of {self.name} could be used{first}")

    def load(self, source, rng):
        """The entries of an item that come from the image: its features where the cache has them,
        else the sample. Raises one of UNREADABLE."""
        entries = {}
        image = read_source(source)
        if self.cache is not None and image is not None:
            entries["path"] = self.cache.path(image)
            entries["features"] = self.cache.read(entries["path"])
            if entries["features"] is not None:
                return entries

        if image is not None:
            image = load_image(image)
        # What is in the cache serves every epoch: so the crop is not random, but the central one.
        crop_rng = rng if self.cache is None else None
        entries["sample"] = self.preprocess(image, self.name, crop_rng)
        return entries

    def batches(self, start, batch, workers=0):
        """An endless generator of this rank's items, a list for each step.

        The first step has the images at the positions start .. start + batch - 1, divided among the
        ranks, the next step the `batch` images that follow. Its close() ends the workers.
        """
        first, end = own_share(batch)

        def positions():
            for step_start in itertools.count(start, batch):
                yield from range(step_start + first, step_start + end)

        def set_up_worker(_):
            torch.set_num_threads(1)
            # Ctrl-C and a queue's signals reach all processes. The main one saves a checkpoint, and
            # then ends its workers; until then they go on.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

        # Each tensor on its way from a worker is an open file of this process, and Linux allows
        # 1024 by default. So a worker hands over one image at a time, packed into one tensor
        # (pack_item), which is copied as soon as it arrives (unpack_item).
        loader = torch.utils.data.DataLoader(
            self,
            batch_size=None,
            sampler=positions(),
            collate_fn=pack_item,
            num_workers=workers,
            worker_init_fn=set_up_worker,
            prefetch_factor=8 if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        packed = iter(loader)
        try:
            while True:
                yield [unpack_item(next(packed)) for _ in range(first, end)]
        finally:
            if workers:
                packed._shutdown_workers()


# Tensors of every type may begin at a multiple of so many bytes.
ALIGNMENT = 16


def pack(tensors):
    """A list of CPU tensors -> (one uint8 tensor that holds all of them, their places in it). A
    place is (the byte where the tensor begins, its shape, its dtype)."""
    places = []
    end = 0
    for tensor in tensors:
        places.append((end, tuple(tensor.shape), tensor.dtype))
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT

    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, (begin, _, _) in zip(tensors, places):
        buffer[begin:begin + tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    return buffer, places


def unpack(buffer, places):
    """The inverse of pack: views into the buffer, on the device where it is."""
    tensors = []
    for begin, shape, dtype in places:
        nbytes = math.prod(shape) * dtype.itemsize
        tensors.append(buffer[begin:begin + nbytes].view(dtype).view(shape))
    return tensors


def pack_item(item):
    """An item of a Stream, in the worker -> (the item without its tensors, buffer, places)."""
    names = []
    tensors = []
    for part in ("sample", "features"):
        entries = item.pop(part, None)
        if entries is None:
            continue
        for key, tensor in entries.items():
            names.append((part, key))
            tensors.append(tensor)
    item["tensors"] = names

    buffer, places = pack(tensors)
    return item, buffer, places


def unpack_item(packed):
    """The item again, in the main process. The copy of the buffer lets go of the worker's shared
    memory, and of the open file that it is."""
    item, buffer, places = packed
    names = item.pop("tensors")
    item["sample"] = {}
    for (part, key), tensor in zip(names, unpack(buffer.clone(), places)):
        item.setdefault(part, {})[key] = tensor
    return item


def map_tensors(function, tree):
    """A tree of nested dicts, lists and tuples, with function(tensor) in the place of each of its
    tensors. Tuples become lists."""
    if torch.is_tensor(tree):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [map_tensors(function, value) for value in tree]
    return tree


def to_device(tree, device):
    """A tree of tensors (see map_tensors) -> the same tree on the device.

    What is on the CPU goes to a GPU in one transfer from pinned memory, for which the host does not
    wait. With an ordinary copy the host waits until the GPU has finished everything before it, and
    then the GPU waits for the host's next command.
    """
    if device.type == "cpu":
        return tree

    on_cpu = []

    def collect(tensor):
        if tensor.device.type == "cpu":
            on_cpu.append(tensor)
        return tensor

    map_tensors(collect, tree)
    if not on_cpu:
        return tree
    buffer, places = pack(on_cpu)
    buffer = buffer.pin_memory().to(device, non_blocking=True)
    moved = iter(unpack(buffer, places))

    def replace(tensor):
        return next(moved) if tensor.device.type == "cpu" else tensor

    return map_tensors(replace, tree)


def encode_batch(model, items, task, cache=None):
    """Items of a stream -> their features, a list of {name: tensor on the model's device}.

    The features of an image are what the frozen parts of the model make of it (model.encode),
    without a graph. What the cache lacks is added to it; and an item keeps its features, so they
    are computed once.
    """
    todo = [item for item in items if item.get("features") is None]
    if todo:
        with torch.no_grad():
            samples = to_device([item["sample"] for item in todo], model.device)
            for item, features in zip(todo, model.encode(samples, task)):
                item["features"] = features
                if cache is not None and "path" in item:
                    cache.write(item["path"], features)
    return to_device([item["features"] for item in items], model.device)


# ==== 6. Equation (3) and training ================================================================


LOSSES = ("recon", "i2t", "t2i")


def objective(losses, weights, backward):
    """One evaluation of the paper's equation (3):

        L = λ_recon · L_recon  +  λ_i2t · L_i2t  +  λ_t2i · L_t2i

    losses: {"recon": function that yields the shares of its micro-batches, scalars that add up to
    L_recon, ...}; weights: {"recon": λ_recon, ...}. A loss whose λ is 0 is never computed. Each
    share goes backward as soon as it is there, so that the peak of memory is that of one
    micro-batch of one loss. Returns (L, {name: L_name}) as detached tensors.
    """
    values = {}
    for name, loss in losses.items():
        if weights[name] == 0:
            continue
        values[name] = 0
        for share in loss():
            backward(weights[name] * share)
            values[name] += share.detach()
    return sum(weights[name] * value for name, value in values.items()), values


def mean(total, count):
    """total / count for a count known on the host; 0 where a micro-batch holds no target at all."""
    return total / max(1, count)


def learning_rate(update, peak, warmup, horizon):
    """Linear warm-up over `warmup` weight updates (counted from 0), then a cosine to 0 at `horizon` (0: constant)."""
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = min(1, (update - warmup) / max(1, horizon - warmup)) if horizon else 0
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass
class MicroBatch:
    """Images that go through the model at once. `targets`: of how many terms their loss is the mean
    (masked tokens, answer tokens, ...)."""
    features: list
    texts: list
    draws: dict
    targets: int


class Trainer:
    """The post-training loop, once for all architectures.

    model    has encode, draw, count_targets, <name>_loss, parameter_groups, save_pretrained, device
    streams  {"recon": Stream, "i2t": Stream, ...}, one for each loss whose λ is not 0
    args     the command line (section 8)
    show     function(step) that draws a preview, or None
    optimizer, average: in place of AdamW and average_gradients, for sharded or low-precision weights

    A *step* is one evaluation of equation (3) on `batch` images for each loss, over all processes.
    An *update* moves the weights, every `accum` steps. A *micro-batch* is what one process puts
    through the model at once; it changes memory and speed and, but for rounding, no number: a loss
    is the mean over all targets of the step, and every draw belongs to the seed and an image's
    position (the one exception is dropout).
    """
    sharded = False         # do several processes divide the weights among them?

    def __init__(self, model, streams, args, show=None, optimizer=None, average=average_gradients):
        self.model = model
        self.streams = streams
        self.args = args
        self.show = show
        self.average = average
        self.weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
        self.optimizer = optimizer or make_optimizer(model, args, low_precision=False)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        size = args.micro_batch or CPU_MICRO_BATCH      # a number, or as run.json has it: one for each loss
        if not isinstance(size, dict):
            size = dict.fromkeys(streams, size)
        # A resumed run may have a loss that it did not begin with: what fitted for all others.
        self.micro_batch = {name: size.get(name, min(size.values(), default=1)) for name in streams}
        self.halved = False

        self.out = Path(args.out)
        self.step = 0           # evaluations of equation (3)
        self.updates = 0        # moves of the weights
        self.seen = 0           # images of each stream
        self.pending = 0        # steps whose gradients wait for the next update
        self.stop = None        # the name of the signal that asked for the end
        self.skipped = set()

    def save(self):
        """out/checkpoint-<step>: the released layout, and beside it what a resume needs. The two newest are kept."""
        if world()[0] == 0:
            with atomic(self.out / f"checkpoint-{self.step:06d}") as folder:
                folder.mkdir(parents=True)
                self.model.save_pretrained(folder)
                torch.save({**self.progress(), "optimizer": self.optimizer.state_dict()}, folder / "trainer.pt")
            for old in own_checkpoints(self.out)[:-2]:
                shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def progress(self):
        return {"step": self.step, "updates": self.updates, "seen": self.seen}

    def resume(self, folder):
        """Reads all but the weights (see from_pretrained). Random numbers need no state (section 2)."""
        state = load_training(folder)
        self.go_on_from(state)
        with own_options(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])

    def go_on_from(self, progress):
        self.step = progress["step"]
        self.updates = progress["updates"]
        self.seen = progress["seen"]
        self.pending = 0

    def precision(self):
        """The context in which the model computes. Autocast would keep the bf16 copy of every float32
        weight until the end of the forward pass; a block that is recomputed needs its own for a
        moment only, so with checkpointing they are made anew."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.args.precision == "bf16",
                              cache_enabled=not self.args.checkpointing)

    def micro_batches(self, name, items):
        """This process's images of one loss, encoded, with their random numbers -> [MicroBatch].

        Every process makes as many, and none is larger than micro_batch: sharded weights are
        gathered by all together. One that has no image left repeats its first with 0 targets.
        """
        passes = -(-self.largest_share() // self.micro_batch[name])
        bounds = [len(items) * k // passes for k in range(passes + 1)]

        made = []
        for begin, end in zip(bounds[:-1], bounds[1:]):
            chunk = items[begin:end] or items[:1]
            texts = [item["text"] for item in chunk]
            rng = Rng(self.args.seed, name, self.step, positions=[item["position"] for item in chunk])
            with self.precision():
                features = encode_batch(self.model, chunk, name, self.streams[name].cache)
            draws = self.model.draw(name, features, rng)
            targets = self.model.count_targets(name, features, texts, draws) if begin < end else 0
            made.append(MicroBatch(features, texts, draws, targets))
        return made

    def largest_share(self):
        return -(-self.args.batch // world()[1])

    def loss(self, name, batch):
        """One loss of one micro-batch, the mean over its targets: the model's own function."""
        losses = {"recon": self.model.recon_loss, "i2t": self.model.i2t_loss, "t2i": self.model.t2i_loss}
        with self.precision():
            return losses[name](batch.features, batch.texts, draws=batch.draws)

    def shares(self, name, batches, total):
        """Yields each micro-batch's share of L_name: its mean, weighted with its part of all targets."""
        for batch in batches:
            yield self.loss(name, batch) * (batch.targets / max(1, total))

    def take_step(self, loaders):
        """Equation (3), its gradients, every `accum` steps a move of the weights -> row of the log, whether to stop."""
        args = self.args
        rank, ranks = world()
        device = self.model.device
        torch.manual_seed(stable_seed(args.seed, "dropout", self.step, rank))

        items = {name: next(loader) for name, loader in loaders.items()}
        batches = {name: self.micro_batches(name, images) for name, images in items.items()}
        totals = {name: sum(batch.targets for batch in chunks) for name, chunks in batches.items()}
        if ranks > 1:
            counts = torch.tensor(list(totals.values()), dtype=torch.float64, device=device)
            dist.all_reduce(counts)
            totals = dict(zip(totals, counts.tolist()))
        losses = {name: functools.partial(self.shares, name, chunks, totals[name])
                  for name, chunks in batches.items()}

        # The gradients of the processes are averaged below, while their shares add up: hence `ranks`.
        out_of_memory = False
        try:
            _, values = objective(losses, self.weights, lambda share: (share * ranks / args.accum).backward())
        except torch.OutOfMemoryError:
            if self.average is not average_gradients:
                raise                   # in the middle of what sharded processes do together
            out_of_memory = True
            values = {name: torch.zeros((), device=device) for name in losses if self.weights[name]}

        # One transfer: the losses, and whether any process ran out of memory or was told to stop.
        flags = torch.tensor([self.stop is not None, out_of_memory], dtype=torch.float32)
        numbers = torch.stack([value.float() for value in values.values()])
        numbers = torch.cat([numbers, to_device(flags, device)])
        if ranks > 1:
            dist.all_reduce(numbers)
        *numbers, stop, out_of_memory = numbers.tolist()
        if out_of_memory:
            raise torch.OutOfMemoryError("a micro-batch does not fit")

        values = dict(zip(values, numbers))
        self.step += 1
        self.seen += args.batch
        self.pending += 1
        loss = sum(self.weights[name] * value for name, value in values.items())
        row = {"step": self.step, "loss": loss, **values}
        if self.pending == args.accum:
            self.average(self.parameters)
            row["lr"] = learning_rate(self.updates, args.lr, args.warmup, self.horizon())
            limit = args.clip or float("inf")
            row["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()

        items = [item for images in items.values() for item in images]
        self.stop_unless_finite(row, items)
        if "lr" in row:
            for group in self.optimizer.param_groups:
                group["lr"] = row["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.updates += 1
            self.pending = 0

        unreadable = {name for item in items for name in item["skipped"]}
        row["skipped"] = sorted(unreadable - self.skipped)
        self.skipped |= unreadable
        return row, stop > 0

    def horizon(self):
        """The update at which the cosine reaches 0. None given: the run's last, whatever --steps says,
        also in a resumed run that goes on for longer."""
        if self.args.horizon is not None:
            return self.args.horizon
        left = self.args.steps - (self.step - self.pending)
        return self.updates + left // self.args.accum

    def stop_unless_finite(self, row, items):
        names = ", ".join(item["name"] for item in items[:8])
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0)):
                saved = own_checkpoints(self.out)
                kept = (
                    f"the last good checkpoint, {saved[-1].name}, is kept in {self.out}"
                    if saved
                    else "no checkpoint had been written yet"
                )
                raise InputError(
                    f"{name} is {row[name]} at step {self.step} on {names}: stopped; {kept} (try a"
                    " lower --lr or --precision fp32)"
                )

    def loaders(self):
        """{name: generator of lists of items} from the position that has been reached."""
        return {name: stream.batches(self.seen, self.args.batch, self.args.workers)
                for name, stream in self.streams.items() if self.weights[name] != 0}

    def halve_micro_batches(self, boundary):
        """After a micro-batch that did not fit: half of it, once, and on from the last update, since
        nobody knows which gradients the broken backward pass has added to."""
        self.halved = True
        self.micro_batch = {name: max(1, size // 2) for name, size in self.micro_batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory in step {self.step + 1}: from now on micro-batches of {self.micro_batch}, "
                   f"again from step {boundary['step'] + 1}")
        self.go_on_from(boundary)
        self.args.micro_batch = self.micro_batch        # also for a run that resumes this one
        record_run(self.args, self.model.device, again=True)

    def open_log(self):
        """out/log.jsonl, without the rows of steps that are taken again: after a kill it may be ahead
        of the checkpoint."""
        if world()[0] != 0:
            return open(os.devnull, "w")
        mend_lines(self.out / "log.jsonl", lambda row: row["step"] <= self.step)
        return open(self.out / "log.jsonl", "a", buffering=1)

    def train(self):
        """From self.step to --steps, or to a signal; the last checkpoint is written in both cases."""
        args = self.args
        first = self.step
        began = time.time()
        boundary = self.progress()      # where the weights moved last
        stop = False

        def ask_to_stop(number, _):
            self.stop = signal.Signals(number).name

        handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        loaders = self.loaders()
        log = self.open_log()
        bar = tqdm(total=args.steps, initial=first, unit="step", dynamic_ncols=True, disable=world()[0] > 0,
                   desc="RecA")
        try:
            while self.step < args.steps and not stop:
                try:
                    row, stop = self.take_step(loaders)
                except torch.OutOfMemoryError:
                    if self.halved or max(self.micro_batch.values()) == 1 or self.average is not average_gradients:
                        raise
                    row = None
                if row is None:         # outside the except: there the exception holds on to the activations
                    self.halve_micro_batches(boundary)
                    for loader in loaders.values():
                        loader.close()
                    loaders = self.loaders()
                    log.close()
                    log = self.open_log()
                    continue

                seconds = time.time() - began
                row["images_per_s"] = round((self.step - first) * args.batch / seconds, 3)
                log.write(json.dumps(row) + "\n")
                losses = {name: f"{row[name]:.4f}" for name in LOSSES if name in row}
                bar.set_postfix(losses | {"img/s": row["images_per_s"]})
                bar.update(self.step - bar.n)
                for name in row["skipped"]:
                    bar.write(f"skipped: {name}")

                updated = self.pending == 0
                if updated:
                    boundary = self.progress()
                going = not stop and self.step < args.steps
                if going and self.show and self.step % args.sample_every == 0:
                    self.show(self.step)
                if going and updated and self.step % args.save_every < args.accum:
                    self.save()
        finally:
            for loader in loaders.values():
                loader.close()
            for number, handler in handlers.items():    # scoring and inference may be interrupted as usual
                signal.signal(number, handler)
            log.close()
            bar.close()

        # In the middle of an accumulation the weights are those of their last move: a resumed run goes on from there.
        finished = self.step >= args.steps
        self.go_on_from(boundary)
        self.save()
        self.free()
        if world()[0] == 0:
            draw_losses(self.out)
            if self.skipped:
                print(f"{len(self.skipped)} unreadable images were skipped (named in {self.out / 'log.jsonl'})")
        if not finished:
            by = self.stop or "another rank"
            print(f"stopped by {by} at step {self.step}, saved; go on with --resume --out {self.out}")
            sys.exit(0)

    def free(self):
        """Training is over: previews, scores and inference get the memory of gradients and moments."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


@contextlib.contextmanager
def own_options(optimizer):
    """with own_options(optimizer): load its state. Weight decay, betas and eps stay those of this
    run: a state has its own, which would count instead of what the command line says."""
    kept = [
        {name: group[name] for name in ("weight_decay", "betas", "eps")}
        for group in optimizer.param_groups
    ]
    yield
    for group, options in zip(optimizer.param_groups, kept):
        group.update(options)


def run(model_class, args, prepare=lambda model, args: {}, trainer=Trainer, inference_jobs=()):
    """main() of every script. prepare(model, args) -> more arguments for the trainer (optimizer, average); trainer: a
    subclass of Trainer, for a script that needs one; inference_jobs: {function(model, args, jobs): jobs}, to be called
    after training like those of section 6."""
    device = start_process(args)
    if args.bench:
        return bench(model_class, args, device, prepare, trainer)
    out = Path(args.out)
    check_out(args)
    # Bad files fail before anything is downloaded, and not after days of training.
    rows, todo = build_rows(args) if args.steps else {}, dict(inference_jobs)
    if args.generate:
        todo[generate_files] = prompt_jobs(args.generate, out, args.images)
    if args.reconstruct:
        todo[reconstruct_files] = reconstruct_jobs(args.reconstruct, out)
    if args.describe:
        check_answers(out)
        todo[describe_files] = questions(args)
    resume = own_checkpoints(out)[-1] if args.resume else None
    source = resume or args.model
    dtype = torch.float32 if args.steps or args.precision == "fp32" else torch.bfloat16
    with resuming(resume) if resume else contextlib.nullcontext():
        if resume:
            load_training(resume, mmap=True)
        model = model_class.from_pretrained(str(source), device=device, dtype=dtype, quantize=args.quantize)
    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if args.compile:
        compile_blocks(model)
    record_run(args, device)
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
    if main_process:
        for path in [*leftovers(out), *([] if resume else written_by_run(out))]:
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
    samples, before = kept_previews(previews) if resume else ([], [])
    samples = samples or preview_images(next(iter(rows.values())), size)
    told = [caption(scene) for scene in told_scenes()] if toy else []

    def paint():
        """The preview images, reconstructed by the model as it is now: one at a time, since in the
        middle of an accumulation gradients and moments fill the memory."""
        with inference(model, args):
            return [model.reconstruct([sample], seed=[k], **sampler_options(args))[0]
                    for k, sample in enumerate(samples)]

    def paint_told():
        """The captions of effect.png, painted by the model as it is now."""
        with inference(model, args):
            return model.generate(told, seed=list(range(len(told))), **sampler_options(args))

    def show(step):
        now = paint()                           # on all ranks: sharded weights are gathered by all together
        if main_process:
            columns = {"input": samples, "before RecA": before, f"step {step}": now}
            if not before:
                del columns["before RecA"]
            picture = grid(list(zip(*columns.values())), list(columns), cell=max(128, min(256, size)))
            write(previews / f"step_{step:06d}.png", picture)

    def score(when):
        """out/scores.json: the toy world's scores now, under `when`, beside those that are
        there."""
        known = read_object(out / "scores.json") if (out / "scores.json").exists() else {}
        say(f"scores {when}: 128 held-out scenes are painted from their images, 128 from words")
        with inference(model, args):
            known[when] = score_toy(model, size, 128, 7, sampler_options(args))
        write(out / "scores.json", known)
        return known

    if main_process and not resume:
        before = paint()
        for k, (image, painted) in enumerate(zip(samples, before)):
            write(previews / f"input_{k}.png", image)
            write(previews / f"before_{k}.png", painted)
        if toy:
            for k, image in enumerate(paint_told()):
                write(previews / f"told_before_{k}.png", image)
            score("before")
    trainer = set_up_training(model, streams, args, prepare, trainer, show)
    record_run(args, model.device, again=True)
    if resume:
        with resuming(resume):
            trainer.resume(resume)
    model.train()
    trainer.train()
    show(trainer.step)
    if main_process and toy:
        scores = score("after")
        print(f"\n{'on held-out scenes':<22}{'before':>8}{'after':>8}")
        for name, after in scores["after"].items():
            print(f"{name:<22}{scores.get('before', {}).get(name, math.nan):>8.2f}{after:>8.2f}")
        if args.lambda_recon and not args.lambda_t2i and "before" in scores:
            print(effect_words(scores["before"], scores["after"]))
        told_before = [previews / f"told_before_{k}.png" for k in range(len(told))]
        if before and all(path.is_file() for path in told_before):
            left = list(zip(told, map(load_image, told_before), paint_told()))
            right = list(zip(samples, before, paint()))
            write(out / "effect.png", effect_picture(left, right))
    if main_process:
        print(f"done: checkpoint-{trainer.step:06d}, loss.png, previews/, log.jsonl are in {out}/")


@contextlib.contextmanager
def inference(model, args):
    """with inference(model, args): no dropout, no gradients, in --precision. Afterwards training mode again."""
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        yield
    model.train()


def preview_images(rows, size, count=6):
    """The first readable images (of the toy world: scenes that are not trained on), as PIL."""
    if isinstance(rows, Shapes):
        rng = np.random.default_rng(12345)
        return [draw_scene(random_scene(rng), size) for _ in range(count)]
    images, first = [], None
    for name, source, _ in (row for row in rows if row[1] is not None):
        try:
            images.append(load_image(source))
        except UnreadableImage as error:       # the run names it, when it comes to it
            first = first or f"{name} ({error})"
        if len(images) == count:
            break
    if not images:
        raise InputError(f"none of the {len(rows)} images could be read; the first: {first}")
    return [shrunk(image, 1024) for image in images]


def kept_previews(folder):
    """What a run that is resumed showed first: (images, the same before RecA). Two empty lists
    where that is not whole: then other images are shown, and none before RecA, as the model that
    could paint it is gone."""
    images, before = [], []
    with contextlib.suppress(UnreadableImage):
        while (folder / f"before_{len(images)}.png").exists():
            k = len(images)
            pair = [load_image(folder / f"{when}_{k}.png") for when in ("input", "before")]
            images.append(pair[0])
            before.append(pair[1])
        return images, before
    return [], []


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


# ==== 7. The command line =========================================================================


# The type of a flag that names a file or a folder: ~ is the home folder also where no shell says so
# (--data=~/x).
expanded = os.path.expanduser


def at_least(least, most=10 ** 9):
    """The type of a flag: a whole number from `least` to `most`."""
    def whole_number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most}")
        return value
    return whole_number


def number(least, most=math.inf):
    """The type of a flag: a finite number from `least` to `most`."""
    def real_number(text):
        value = float(text)
        if not (math.isfinite(value) and least <= value <= most):
            limit = f"from {least} on" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is no number {limit}")
        return value
    return real_number


def micro_batch(text):
    """The type of --micro-batch."""
    return None if text == "auto" else at_least(1)(text)


# Titles, and the flags below each: name, type (bool: a switch; a tuple: choices), default (None: the recipe's), help.
FLAGS = (
    "what",
    ("--data", expanded, None, "folder of images, .tar (WebDataset), or shapes (toy world). Paper: 120K of Midjourney v6"),
    ("--out", expanded, None, "folder of the run (default out/<script>-<model>)"),
    ("--resume", bool, None, "go on from the newest checkpoint in --out, to the same numbers"),
    ("--bench", bool, None, "time full-size steps with random weights: images/s, MFU, peak memory; downloads nothing"),
    "training (defaults: the paper's Table 8, in our steps)",
    ("--steps", at_least(0), None, "evaluations of equation (3); 0: inference only"),
    ("--batch", at_least(1), None, "images of each loss in a step, over all GPUs"),
    ("--accum", at_least(1), None, "steps per weight update"),
    ("--micro-batch", micro_batch, None, "images that go through the model at once on one GPU; auto (default): what "
     "fits, found before training. Changes memory and speed, not the result"),
    ("--optimizer", ("auto", "fp32", "bf16"), "auto", "fp32: float32 weights and AdamW, 16 bytes a weight; bf16: "
     "weights and moments in bf16, stochastic rounding, 8 bytes; auto: fp32 where it fits"),
    ("--lr", number(0), None, "peak learning rate"),
    ("--warmup", at_least(0), None, "weight updates of linear warm-up"),
    ("--horizon", at_least(0), None, "weight update at which the cosine reaches 0; 0: constant. Not given: the "
     "recipe's, which may be the end of the run"),
    ("--weight-decay", number(0), None, "of AdamW"),
    ("--clip", number(0), None, "limit of the gradient's norm; 0: none"),
    ("--seed", at_least(0, 2 ** 63 - 1), 0, "of every random number"),
    ("--precision", ("bf16", "fp32"), None, "bf16 (autocast, float32 master weights; default on a GPU) or fp32"),
    ("--compile", bool, None, "torch.compile the repeated blocks"),
    ("--checkpointing", argparse.BooleanOptionalAction, None, "recompute activations in the backward: a tenth of the "
     "memory, about a third more time (default: on a GPU)"),
    ("--lambda-recon", number(0), None, "weight of L_recon in equation (3)"),
    ("--lambda-i2t", number(0), None, "weight of L_i2t; the paper: 1 where understanding and generation share parameters"),
    ("--lambda-t2i", number(0), None, "weight of L_t2i; 1 where --captions is given"),
    ("--i2t-data", expanded, None, "LLaVA-style .json/.jsonl for L_i2t (paper: LLaVA-1.5's 665K); shapes: the toy world's"),
    ("--i2t-images", expanded, None, "folder of its images (default: the folder of the file)"),
    ("--self-captions", at_least(1), 1024, "without --i2t-data: images that the model describes first for it (ours)"),
    ("--captions", expanded, None, ".jsonl of {image, caption} for L_t2i (SFT: --lambda-recon 0); shapes: full, sparse"),
    ("--cache", expanded, None, "folder where what the frozen parts say of an image is kept (crops get deterministic)"),
    ("--workers", at_least(0, 256), None, "processes that decode images (default: by the number of cores)"),
    ("--save-every", at_least(1), 500, "steps between checkpoints"),
    ("--sample-every", at_least(1), 250, "steps between preview pictures"),
    "the paper's ablations",
    ("--und-size", at_least(1, 4096), None, "side of the understanding input (paper, section 3: the smallest it accepts)"),
    ("--blur", at_least(1), None, "shrink that image by this factor and enlarge it again (app. F.2)"),
    ("--templates", ("all", "one"), "all", "all 360, or the one seed template"),
    "inference (after training; alone with --steps 0)",
    ("--generate", expanded, None, "prompts: .txt, GenEval .jsonl, WISE/T2I-CompBench .json, or a folder of DPG-Bench .txt"),
    ("--images", at_least(1, 10_000), 1, "images per prompt; GenEval 4, the paper's starred rows 12"),
    ("--reconstruct", expanded, None, "folder of images to reconstruct from their understanding embeddings"),
    ("--describe", expanded, None, "folder of images, or a question file (.jsonl)"),
    ("--question", str, SEED_TEMPLATE, "for a --describe folder"),
    ("--max-new-tokens", at_least(1, 100_000), 256, "of a description"),
    ("--batch-images", at_least(1), None, "images of one inference batch (default 8; 32 on a GPU, BAGEL 8)"),
    ("--guidance-scale", number(0), None, "of the sampler; 1: none (Show-o: 0). Not given: the paper's"),
    ("--sampling-steps", at_least(1, 1000), None, "of the sampler. Not given: the paper's"),
    ("--quantize", ("int8",), None, "keep the weights of all linear layers but the heads in int8: half the memory of "
     "bf16, slower; only with --steps 0"),
)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see python {self.prog} --help)")


def parse_args(description, recipes, default, argv=None, extend=None):
    """The flags of all scripts. recipes: {model name: the script's Recipe dataclass}; what is not given on the command
    line is taken from the recipe of the chosen model. extend(parser): adds the flags that only one architecture has."""
    print_anything()
    paper, group = vars(recipes[default]), None
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    models = (
        f"{', '.join(recipes)}; or a hub id, a file, a folder (of a run: its newest checkpoint)."
        f" -reca: what the authors have trained (default {default})"
    )
    parser.add_argument("--model", type=expanded, default=default, help=models)
    for flag in FLAGS:
        if isinstance(flag, str):
            group = parser.add_argument_group(flag)
            continue
        name, kind, value, text = flag
        shown = paper.get(name[2:].replace("-", "_"), value)
        text += "" if shown is None else f" (default {shown})"
        if kind is bool:
            group.add_argument(name, action="store_true", help=text)
        elif kind is argparse.BooleanOptionalAction:
            group.add_argument(name, action=kind, default=value, help=text)
        else:
            how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
            group.add_argument(name, default=value, help=text, **how)
    if extend:
        extend(parser)
    args = parser.parse_args(argv)
    if args.quantize and (args.steps != 0 or args.resume or args.bench):        # not given: the recipe's steps
        raise InputError("--quantize is for inference: give --steps 0, and neither --resume nor --bench "
                         "(a run's checkpoint is --model OUT/checkpoint-NUMBER)")
    args.out = args.out or f"out/{Path(sys.argv[0]).stem}-{Path(args.model).name}"
    if args.resume and not args.bench:
        unset = object()
        namespace = argparse.Namespace(**dict.fromkeys(vars(args), unset))
        given = vars(parser.parse_args(argv, namespace)).items()
        check_out(args)
        reconcile(args, {name: value for name, value in given if value is not unset})
    if args.captions and args.lambda_t2i is None:
        args.lambda_t2i = 1.0
    check_model(args.model, list(recipes))
    for name, value in vars(recipes.get(args.model, recipes[default])).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    cuda = torch.cuda.is_available()
    args.precision = args.precision or ("bf16" if cuda else "fp32")
    if args.checkpointing is None:
        args.checkpointing = cuda
    if args.batch_images is None:
        args.batch_images = 32 if cuda else 8
    args.data = args.data or ("shapes" if args.model in TOYS else None)
    if args.workers is None:
        cores = (os.cpu_count() or 1) // launched_ranks()
        args.workers = 0 if args.data == "shapes" else min(8, max(1, cores - 1))
    if (args.steps or args.bench) and not (args.lambda_recon or args.lambda_i2t or args.lambda_t2i):
        raise InputError(
            "all three λ are 0: nothing would be trained; --steps 0 for inference alone"
        )
    if args.lambda_t2i and not args.captions:
        raise InputError("--lambda-t2i needs --captions FILE")
    if 0 < args.steps < args.accum and not args.bench:
        raise InputError(f"--steps {args.steps} is less than --accum {args.accum}: the weights would never move")
    ranks = launched_ranks()
    if args.steps and args.batch < ranks:
        raise InputError(f"--batch {args.batch} is less than the {ranks} processes: one would have no image")
    if args.optimizer == "bf16" and args.precision != "bf16":
        raise InputError("--optimizer bf16 needs --precision bf16")
    if args.steps and not args.data and not args.bench:
        raise InputError("--data is missing: a folder of images (--model tiny draws its own, --steps 0 needs none)")
    return args


def build_rows(args):
    """The rows of each loss whose λ is not 0, but for L_i2t without data (describe_first). InputError for bad files."""
    rows, toy = {}, args.data == "shapes"
    if args.lambda_recon or (args.lambda_i2t and not args.i2t_data):
        rows["recon"] = Shapes(seed=args.seed) if toy else image_rows(args.data, args.out)
    if args.lambda_i2t and args.i2t_data:
        rows["i2t"] = (Shapes(seed=args.seed, captions=1.0, dialogue=True) if args.i2t_data == "shapes"
                       else conversation_rows(args.i2t_data, args.i2t_images))
    if args.lambda_t2i:
        p = {"full": 1.0, "sparse": 0.1}.get(args.captions) if toy else None
        rows["t2i"] = Shapes(seed=args.seed, captions=p) if p else caption_rows(args.captions)
    return rows


# The scripts' own small models, pretrained on the spot. Only these exact names mean them: a folder
# called tiny-b is a folder, and so is ./tiny.
TOYS = ("tiny", "tiny-vq")


def past_runs(out):
    """What out/run.json says of the runs in this folder, oldest first; [] where there were none.
    InputError where it cannot be read."""
    path = Path(out) / "run.json"
    if not path.is_file():
        return []
    latest = read_object(path)
    return [*latest.pop("history", []), latest]


def last_training(out):
    """What run.json says of the last run in `out` that trained (inference may have followed), or
    {}."""
    trained = [run for run in past_runs(out) if run.get("arguments", {}).get("steps")]
    return trained[-1] if trained else {}


# What a run that goes on keeps as it began, and why another value would be another run.
FIXED = {
    "model": "the checkpoint is its model",
    "seed": "the order of the images and all draws follow from it",
    "optimizer": "the checkpoint holds its state",
    "self_captions": "the model has described its images before RecA changed it"}


def reconcile(args, given):
    """--resume: what the command line does not give comes from run.json, as the run in --out was
    started or last gone on with. given: {flag: value} of what it does give. What differs counts
    from here on, and is said in a line, or cannot be changed: InputError."""
    run = last_training(args.out)
    if not run:
        say(
            f"--resume: {args.out}/run.json does not say how the run was started; the command line"
            " alone counts"
        )
        return

    script = Path(sys.argv[0]).stem
    begun = run.get("script", script)
    if begun != script and begun.startswith("reca_") and script.startswith("reca_"):
        raise InputError(f"{args.out} is a run of {begun}.py: go on with that")

    changed = []
    for name, before in run["arguments"].items():
        if name in ("out", "resume", "bench", "workers") or not hasattr(args, name):
            continue
        if name not in given:
            # --captions that are new in this run switch L_t2i on, as at a start.
            if name != "lambda_t2i" or "captions" not in given:
                setattr(args, name, before)
            continue
        flag, now = f"--{name.replace('_', '-')}", given[name]
        if now == before:
            continue
        if name in FIXED and before not in (None, "auto"):
            raise InputError(
                f"{flag} {now}: the run in {args.out} has {before}, and {FIXED[name]}; leave it"
                " out, or choose another --out"
            )
        changed.append(f"{flag} {now} instead of {before}")
    if changed:
        say(f"from here on: {', '.join(changed)}")


def record_run(args, device, again=False):
    """out/run.json: arguments, versions and device of this run, those before it as its history. again: with what auto
    took, once it is known."""
    if world()[0] != 0:
        return
    import diffusers
    import transformers

    history = past_runs(args.out)
    if again:
        history.pop()
    modules = (torch, transformers, diffusers, np)
    versions = {module.__name__: module.__version__ for module in modules}
    versions["python"] = sys.version.split()[0]
    write(Path(args.out) / "run.json", {
        "script": Path(sys.argv[0]).stem, "arguments": vars(args), "versions": versions,
        "device": str(device), "history": history})


def check_out(args):
    """InputError where --out cannot take what is asked for, before anything is made."""
    out, checkpoints = Path(args.out), own_checkpoints(args.out)
    for flag, folder in (("--out", out), ("--cache", args.cache and Path(args.cache))):
        for path in [folder, *folder.parents] if folder else ():
            if path.exists() and not path.is_dir():
                raise InputError(f"{flag} {folder}: {path} is a file; give a folder")
    if args.resume and not checkpoints:
        raise InputError(f"nothing to resume: no checkpoint in {out}")
    if not args.steps:
        return

    # A toy's run may be made again: but that run only, not another one that lies in the same place.
    before = last_training(out).get("arguments", {})
    again = args.model in TOYS and before.get("model") == args.model
    if checkpoints and not args.resume and not again:
        raise InputError(f"{out} holds a run already: add --resume to go on with it, or choose "
                         "another --out")
    named = named_checkpoints(out)
    newer = named if not args.resume else named[named.index(checkpoints[-1]):]
    for path in newer:
        if path not in checkpoints:
            raise InputError(f"{path} is in the way: it has a checkpoint's name, but no trainer.pt "
                             "of this run; move it, or choose another --out")


# --------------------------------------------------------------------------------------------------
# What follows is not needed to understand RecA: how it fits into memory, files, timing, a toy world.
# --------------------------------------------------------------------------------------------------


# ==== 8. Memory and speed =========================================================================


CPU_MICRO_BATCH = 32        # --micro-batch auto without a GPU: main memory holds that many of any tiny model
SPARE_BYTES = 4e9           # what auto leaves free: fragmentation, kernels' workspaces, previews


def set_up_training(model, streams, args, prepare, trainer_class, show=None):
    """The trainer, with an optimizer and micro-batches that fit. What auto took is said in a line and
    stands in `args` from then on, for run.json and a resume."""
    cuda = model.device.type == "cuda"
    sharded = trainer_class.sharded and world()[1] > 1
    automatic = args.optimizer == "auto"
    if automatic:
        args.optimizer = "fp32" if not cuda or float32_fits(model, sharded) else "bf16"

    def set_up(low_precision):
        optimizer = make_optimizer(model, args, low_precision)
        return trainer_class(model, streams, args, show, optimizer, **prepared)

    if args.optimizer == "bf16":
        lower_precision(model)
    prepared = prepare(model, args)
    speed_up(model, args)
    trainer = set_up(args.optimizer == "bf16")
    reason = "no GPU: a constant"

    if args.micro_batch is None and cuda:
        model.train()
        trainer.micro_batch, reason = fit_micro_batches(trainer)
        if automatic and args.optimizer == "fp32" and not sharded and not all(trainer.micro_batch.values()):
            args.optimizer = "bf16"
            lower_precision(model)
            trainer = set_up(low_precision=True)
            trainer.micro_batch, reason = fit_micro_batches(trainer)
        if not all(trainer.micro_batch.values()):
            raise InputError(f"one image at a time does not fit into this GPU's memory: {reason}")
    elif args.micro_batch is not None:
        reason = "given"
    args.micro_batch = trainer.micro_batch

    if world()[0] == 0:
        kinds = {"fp32": "float32 weights and AdamW (16 bytes a weight)",
                 "bf16": "bf16 weights and moments, stochastic rounding (8 bytes a weight)"}
        count = sum(p.numel() for p in trainer.parameters)
        print(f"{count / 1e6:,.1f}M trained weights on {world()[1]} x {model.device.type}: {kinds[args.optimizer]}"
              + (f", FSDP2 over {world()[1]} ranks" if sharded else "")
              + (", checkpointing" if args.checkpointing else ""))
        print(f"micro-batches of {trainer.micro_batch} of {args.batch} images a step ({reason})")
    return trainer


def fit_micro_batches(trainer):
    """--micro-batch auto on a GPU -> {name: images}, the most that fit, and a line that says why.

    Two small micro-batches are measured on the largest inputs that the model can meet, with the
    gradients there, as in all but the first micro-batch of an update. Memory grows linearly with
    their size, so what fits into what is left follows; the optimizer's moments, which come with
    the first update, are counted in. 0 where not even one image fits.
    """
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    present = sum(t.nbytes for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    moments = max(0, 2 * sum(parameter.grad.nbytes for parameter in trainer.parameters) - present)
    room = free_bytes() - moments - SPARE_BYTES

    most = trainer.largest_share()
    sizes = {}
    told = []
    for name in trainer.streams:
        peaks = []
        for count in (1, 2):
            try:
                peaks.append(worst_case_bytes(trainer, name, count))
            except torch.OutOfMemoryError:
                peaks.append(math.inf)
        one, two = peaks

        fits = 0
        if one <= room:
            fits = 1
        if two <= room:
            fits = min(most, 1 + int((room - one) // max(1, two - one)))
        # As even as possible: 24 images of which 20 fit are two times 12.
        sizes[name] = -(-most // -(-most // fits)) if fits else 0
        told.append(f"{sizes[name]} images for {name} (1 takes {one / 1e9:.2f} GB, 2 take {two / 1e9:.2f})")
    trainer.optimizer.zero_grad(set_to_none=True)
    reason = (f"{'; '.join(told)}; {room / 1e9:.1f} GB are left beside weights, gradients, moments and "
              f"{SPARE_BYTES / 1e9:.0f} GB to spare")
    return agreed(sizes, trainer.model.device), reason


def worst_case_bytes(trainer, name, count):
    """The peak, above what is resident, of one worst-case micro-batch of `count` images: encoding,
    loss and backward."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()

    model = trainer.model
    samples, texts, worst_draws = model.worst_case(name, count)
    with trainer.precision(), torch.no_grad():
        features = model.encode(to_device(samples, model.device), name)
    draws = model.draw(name, features, Rng(0, positions=range(count))) | worst_draws
    batch = MicroBatch(features, texts, draws, targets=1)
    trainer.loss(name, batch).backward()
    return torch.cuda.max_memory_allocated() - resident


def free_bytes():
    """What this process may still allocate on its GPU."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def agreed(sizes, device):
    """The least that any process has found: sharded weights need equally many passes everywhere."""
    if not dist.is_initialized():
        return sizes
    least = torch.tensor(list(sizes.values()), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return dict(zip(sizes, least.tolist()))


def float32_fits(model, sharded):
    """Whether float32 AdamW can fit at all: 16 bytes a trained weight (itself, its gradient, two
    moments), 2 a frozen one. sharded: trained weights and blocks are divided over all processes."""
    shards = world()[1] if sharded else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inside = sum(p.numel() for block in model.blocks() for p in block.parameters() if not p.requires_grad)
    outside = sum(p.numel() for p in model.parameters() if not p.requires_grad) - inside
    need = (16 * trained + 2 * inside) / shards + 2 * outside + SPARE_BYTES
    return need <= torch.cuda.get_device_properties(model.device).total_memory


def make_optimizer(model, args, low_precision):
    """AdamW for float32 weights, StochasticAdamW for those of lower_precision."""
    groups = model.parameter_groups(args.weight_decay)
    options = {"lr": args.lr, "betas": args.betas, "eps": args.eps}
    if low_precision:
        return StochasticAdamW(groups, **options, seed=args.seed)
    return torch.optim.AdamW(groups, **options, fused=model.device.type == "cuda")


def lower_precision(model):
    """The trained weights to bf16, one after the other, for StochasticAdamW."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = None
            parameter.data = parameter.data.to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights without float32 masters: computes in float32, stores weights and
    moments in bf16, rounded stochastically: 8 bytes a weight with its gradient, where float32
    needs 16.

    bf16 keeps 8 bits: rounding to nearest loses an update below 1/256 of a weight, at every step,
    and 4e-5 against weights of 0.02 is such an update. Rounding up or down at random, with the
    chance given by what is cut off, is right in the mean. Draws follow from (seed, update, rank),
    so that a resumed run draws the same.

    What it costs is noise. After n updates by u of weights whose last bit is worth b, they have moved
    by n u, give or take sqrt(n u b). For BAGEL (u up to 4e-5, 1000 updates) and weights of 0.02
    (b = 1.2e-4) that is a twentieth of the way; for Show-o (5e-7, 5000 updates), which moves a weight
    by a two-hundredth of its last bit, a fifth of the way of a weight that always moves in one
    direction, and more than the way of one that moves to and fro: take float32 there if it fits.
    """

    AT_ONCE = 2 ** 24       # numbers that are in float32 at a time: their copies stay below 1 GB

    def __init__(self, groups, lr, betas, eps, weight_decay=0.0, seed=0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "updates": 0}
        super().__init__(groups, defaults)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["updates"] += 1
            generator = None

            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)

                # Sharded weights are DTensors; everything here is elementwise, so each rank works
                # on its own part, and on one piece of a large tensor after another.
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
                if generator is None:
                    key = stable_seed(self.seed, "rounding", group["updates"], world()[0])
                    generator = torch.Generator(tensors[0].device).manual_seed(key)
                for pieces in zip(*(t.view(-1).split(self.AT_ONCE) for t in tensors)):
                    self._update(group, generator, *pieces)

    def _update(self, group, generator, weight, grad, m, v):
        """One piece of a tensor, all [n]: AdamW's equations in float32."""
        beta1, beta2 = group["betas"]
        n = group["updates"]

        grad = grad.float()
        first = m.float().lerp_(grad, 1 - beta1)
        second = v.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = first / (1 - beta1 ** n) / ((second / (1 - beta2 ** n)).sqrt_().add_(group["eps"]))
        new = weight.float().mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])

        self._store(weight, new, generator)
        self._store(m, first, generator)
        self._store(v, second, generator)

    @staticmethod
    def _store(target, value, generator):
        """float32 value into target, rounded stochastically where target is bf16. bf16 is the upper
        half of a float32: adding a uniform 16-bit number to the lower half carries into the upper
        one exactly as often as it should."""
        if target.dtype == torch.bfloat16:
            noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device,
                                  generator=generator)
            bits = value.contiguous().view(torch.int32) + noise
            value = bits.bitwise_and_(-65536).view(torch.float32)
        target.copy_(value)


class HeadCrossEntropy(torch.autograd.Function):
    """See cross_entropy_sum. The gradients are known as soon as the logits are there: they are computed
    with them, so that no logits are kept for the backward, or made in it a second time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, at_once):
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight) if wanted[1] else None
        grad_bias = torch.zeros_like(bias) if wanted[2] else None
        total = torch.zeros((), device=hidden.device)

        for begin in range(0, len(labels), at_once):
            rows = hidden[begin:begin + at_once]                                    # [n, D]
            targets = labels[begin:begin + at_once]                                 # [n]
            logits = F.linear(rows, weight, bias)                                   # [n, V]
            precision = logits.dtype
            logits = logits.float()
            total += F.cross_entropy(logits, targets, reduction="sum")
            if not any(wanted):
                continue

            # d loss / d logits = probabilities - 1 at the target, in the precision of the product.
            slope = logits.softmax(-1)
            del logits
            slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
            slope = slope.to(precision)
            if wanted[0]:
                grad_hidden[begin:begin + at_once] = slope @ weight
            if wanted[1]:
                grad_weight.addmm_(slope.T.to(weight.dtype), rows.to(weight.dtype))
            if wanted[2]:
                grad_bias += slope.sum(0)

        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return total

    @staticmethod
    def backward(ctx, upstream):
        gradients = [None if grad is None else grad.mul_(upstream) for grad in ctx.gradients]
        ctx.gradients = None        # the last reference: autograd may add to these tensors in place
        return *gradients, None, None


def cross_entropy_sum(head, hidden, labels, at_once=1024):
    """Sum of the cross-entropies of labels [n] under the linear layer head(hidden [n, D]) -> scalar, float32.

    The logits, a column for each of up to 150,000 words, would be the largest tensors of a step:
    they are made for `at_once` labels at a time.
    """
    return HeadCrossEntropy.apply(hidden, head.weight, head.bias, labels, at_once)


def speed_up(model, args):
    """--checkpointing: in training keep only each block's input, and compute the block again in the backward."""
    from torch.utils.checkpoint import checkpoint

    def wrap(forward):
        @functools.wraps(forward)
        def run_block(*inputs, **options):
            if args.checkpointing and torch.is_grad_enabled():
                return checkpoint(forward, *inputs, use_reentrant=False, **options)
            return forward(*inputs, **options)
        return run_block

    for block in model.blocks():
        block.forward = wrap(block.forward)


def compile_blocks(model):
    """--compile, block by block. Compiled is what the block computes, and what wraps it later (see
    speed_up) stays outside: a graph cannot hold a checkpoint that another wrapper calls."""
    # The same code serves all layers, and torch compiles it anew for each kind of input (with and
    # without a graph, for one length and for any): its limit of 8 versions is too few.
    limit = 8 * len(model.blocks())
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = limit
    for block in model.blocks():
        block.forward = torch.compile(block.forward)


def int8_rows(weight):
    """A matrix [out, in] -> int8 [out, in] and a scale for each row, bf16 [out]. Their product is
    nearly the matrix: no number is off by more than half of its row's scale."""
    # bf16 may round a scale down, by less than 1/256. So the largest number of a row becomes less
    # than 127 * 256 / 255, which is below 127.5, and is rounded to 127. Zeros have a scale, too.
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """An nn.Linear for inference in half of bf16's memory: int8, and a scale for each output channel.

    The weights become floating-point numbers again in every call, and are forgotten after it.
    Integers up to 127 are exact in bf16, and so are the scales: no error is added to int8_rows' own.
    `weight` is int8, so who wants to know in which precision the layer computes asks its bias.
    """

    def __init__(self, linear):
        super().__init__()
        weight, scale = int8_rows(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x):
        """[..., in] -> [..., out], with autocast or without, as nn.Linear."""
        y = F.linear(x, self.weight.to(self.scale.dtype))
        scale = self.scale.to(y.dtype)
        if self.bias is None:
            return y * scale
        return torch.addcmul(self.bias.to(y.dtype), y, scale)


def quantize(model, kind):
    """-> the model itself. kind "int8": every nn.Linear in it becomes an Int8Linear, but for those
    whose names begin with one of model.unquantized; None: nothing happens. It goes layer by layer, so
    that there are never two models in memory."""
    if kind is None:
        return model

    # A subclass of nn.Linear does more than multiply, so it stays.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        if not name.startswith(model.unquantized):
            model.set_submodule(name, Int8Linear(model.get_submodule(name)))
    return model


# ==== 9. Inference on files =======================================================================


def prompt_jobs(source, out, images):
    """A prompt source -> [(prompt, [paths of its images], GenEval's metadata or None)], for the benchmark's scorer:

    FILE.txt    a prompt a line                                 -> out/00000.png, with several images out/00000_0.png ..
    FILE.jsonl  GenEval's evaluation_metadata.jsonl             -> out/00000/metadata.jsonl and samples/00000.png ..
    FILE.json   WISE (Prompt, prompt_id)                        -> out/<prompt_id>.png
                T2I-CompBench (Question, Category, Question_id) -> out/<Category>/<Question_id>.png
    FOLDER      DPG-Bench, a prompt a <name>.txt                -> out/<name>.png four times: a 2x2 grid
    """
    source, out, kind = Path(source), Path(out), Path(source).suffix.lower()

    def geneval(i, row):
        return text_in(row, "prompt"), [out / f"{i:05d}" / "samples" / f"{k:05d}.png" for k in range(images)], row

    def wise_or_compbench(_, row):
        name = f"{row.get('Category', '')}/{row['Question_id']}" if "Question_id" in row else row["prompt_id"]
        return text_in(row, "Prompt", "Question"), [inside(out, f"{name}.png".lstrip("/"))], None

    if not source.exists():
        raise InputError(f"no such prompt file or folder: {source}")
    if source.is_dir():
        files = [file for file in sorted(source.glob("*.txt")) if not file.name.startswith("._")]
        texts = {file.stem: read_text(file).strip() for file in files}
        jobs = [(text, [out / f"{name}.png"] * 4, None) for name, text in texts.items()]
    elif kind == ".jsonl":
        jobs = read_rows(source, "a prompt of GenEval (prompt)", geneval)
    elif kind == ".json":
        jobs = read_rows(source, "a prompt (Prompt and prompt_id, or Question and Question_id)", wise_or_compbench)
    else:
        # Not splitlines, which also cuts at U+2028 and its like.
        lines = [line.strip() for line in read_text(source).split("\n") if line.strip()]
        jobs = [(line, [out / (f"{i:05d}.png" if images == 1 else f"{i:05d}_{k}.png") for k in range(images)], None)
                for i, line in enumerate(lines)]
    if not jobs or not all(prompt for prompt, _, _ in jobs):
        raise InputError(f"{source}: no prompt, or an empty one")
    check_outputs([(f"prompt {i + 1}", path) for i, (_, paths, _) in enumerate(jobs)
                   for path in dict.fromkeys(paths)], source)
    return jobs


def sampler_options(args):
    """The sampler's settings that the command line gives; the others keep the script's (the
    paper's) defaults. args.sampler: those that only one architecture has."""
    options = {
        "guidance_scale": args.guidance_scale,
        "num_steps": args.sampling_steps,
        **getattr(args, "sampler", {}),
    }
    return {name: value for name, value in options.items() if value is not None}


# Every output knows what it was made from: prompt or source, weights, sampler, seed. A rerun keeps
# what was made from the same, makes the rest again, and does not touch what it has not made.
def origin(model, args, task, **what):
    """What an output of `task` is made from, as JSON holds it. what: prompt, source, seed ..."""
    digest = hashlib.sha256()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        numbers = weight.detach().flatten()
        some = numbers[::max(1, len(numbers) // 64)][:64]          # training moves them all
        digest.update(f"{name} {weight.dtype}".encode() + some.float().cpu().numpy().tobytes())

    settings = {
        name: getattr(args, name, None)
        for name in ("precision", "quantize", "und_size", "blur", "condition")
    }
    made_from = {
        "task": task,
        "weights": digest.hexdigest()[:16],
        **settings,
        **sampler_options(args),
        **what,
    }
    return json.loads(json.dumps(made_from))


def origin_of(path):
    """What a picture says that it was made from; None where it says nothing: it is the user's."""
    try:
        with Image.open(path) as picture:
            return json.loads(picture.info["reca"])
    except Exception:
        return None


def fingerprint(source):
    """A short name of an image file's content; "" where it cannot be read."""
    try:
        return hashlib.sha256(read_source(source)).hexdigest()[:16]
    except UnreadableImage:
        return ""


def check_outputs(outputs, source):
    """outputs: (what it is made for, path) of each file. InputError where two inputs of `source`
    would write one file, or where a file is in the way that these scripts have not made."""
    known = {}
    for name, path in outputs:
        if path in known:
            raise InputError(
                f"{source}: {known[path]} and {name} would both be written to {path}: give them "
                "different names"
            )
        known[path] = name
        if path.exists() and origin_of(path) is None:
            raise InputError(
                f"{path} is in the way, and does not say that it was made here: move it, or choose "
                "another --out"
            )


def output_paths(names, out):
    """Names of images -> {name: where in `out` the picture made from it belongs}.

    That is <name without its suffix>.png; with its suffix where this alone tells two names apart
    (cat.jpg and cat.png), or where a run has a file of its own there. InputError where a name leads
    out of the folder.
    """
    short = {name: str(Path(name).with_suffix(".png")) for name in names}
    often = collections.Counter(short.values())
    paths = {}
    for name in names:
        taken = often[short[name]] > 1 or short[name] in ("reconstructions.png", "loss.png")
        path = inside(out, f"{name}.png" if taken else short[name])
        if len(os.fsencode(path.name)) > 255:
            start = os.fsencode(path.name)[:200].decode(errors="ignore")
            path = path.with_name(f"{start}-{stable_seed(name):x}.png")
        paths[name] = path
    return paths


class Outputs:
    """Pictures that are asked for, sorted into those that are there and those to be made.

    jobs: (path, what it is to be made from, ...); `todo` are those to be made, `write` makes one,
    `report` says how many were kept, made, made again."""

    def __init__(self, jobs):
        self.jobs, self.todo, self.there = jobs, [], set()
        self.counts = collections.Counter()
        for job in jobs:
            path, made_from = job[:2]
            if path.exists():
                self.there.add(path)
            if path.exists() and origin_of(path) == made_from:
                self.counts["kept"] += 1
            else:
                self.todo.append(job)

    def write(self, path, picture, made_from):
        write(path, picture, made_from)
        self.counts["made again" if path in self.there else "made"] += 1

    @property
    def made(self):
        return self.counts["made"] + self.counts["made again"]

    def report(self):
        """": 3 kept, 1 made, 2 made again", and of how many earlier pictures nobody has asked
        now."""
        paths = {job[0] for job in self.jobs}
        folders = {path.parent for path in paths}
        beside = {path for folder in folders for path in folder.glob("*.png")}
        others = [origin_of(path) for path in beside - paths]
        old = sum(made_from is not None and "overview" not in made_from for made_from in others)

        text = ", ".join(f"{self.counts[what]} {what}" for what in ("kept", "made", "made again"))
        if old:
            text += f"; {old} pictures of other requests are there as well"
        return f": {text}"


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
    """--generate: image k of a prompt has seed --seed + k, whatever its batch."""
    common_origin, wanted = origin(model, args, "generate"), []
    for prompt, paths, metadata in jobs:
        if metadata:
            write(paths[0].parent.parent / "metadata.jsonl", [metadata])
        for path in dict.fromkeys(paths):
            seeds = [args.seed + k for k, other in enumerate(paths) if other == path]
            wanted.append((path, {**common_origin, "prompt": prompt, "seeds": seeds}))

    outputs, waiting = Outputs(wanted), {}
    rows = [
        (path, made_from, seed) for path, made_from in outputs.todo for seed in made_from["seeds"]
    ]
    for chunk in in_batches("generate", rows, args.batch_images):
        prompts = [made_from["prompt"] for _, made_from, _ in chunk]
        seeds = [seed for _, _, seed in chunk]
        for (path, made_from, _), image in zip(
            chunk, model.generate(prompts, seed=seeds, **sampler_options(args))
        ):
            # DPG-Bench wants four in one file, as a square: it is written when all of them are
            # there.
            made = waiting.setdefault(path, [])
            made.append(image)
            if len(made) == len(made_from["seeds"]):
                picture = (
                    made[0]
                    if len(made) == 1
                    else grid([made[:2], made[2:]], cell=image.width, gap=0)
                )
                outputs.write(path, picture, made_from)
                del waiting[path]
    print(
        f"{outputs.made} images generated for {len(jobs)} prompts in {args.out}{outputs.report()}"
    )


def reconstruct_jobs(source, out):
    """--reconstruct -> [(name, source, where its reconstruction belongs)]. InputError for what
    cannot be."""
    rows = image_rows(source, out)
    paths = output_paths([name for name, *_ in rows], out)
    overview = Path(out) / "reconstructions.png"
    check_outputs([*((name, paths[name]) for name, *_ in rows), ("the overview", overview)], source)
    return [(name, image, paths[name]) for name, image, _ in rows]


def reconstruct_files(model, args, jobs):
    """--reconstruct: out/<name>.png for each image, painted from nothing but the model's understanding of it."""
    common_origin = origin(model, args, "reconstruct", seed=args.seed)
    outputs = Outputs([(path, {**common_origin, "source": fingerprint(source)}, name, source)
                       for name, source, path in jobs])
    todo = [(name, source, path, made_from) for path, made_from, name, source in outputs.todo]
    for chunk in in_batches("reconstruct", todo, args.batch_images):
        read = list(readable(chunk))
        if read:
            images, seeds = [row[1] for row in read], [args.seed] * len(read)
            painted = model.reconstruct(images, seed=seeds, **sampler_options(args))
            for (_, _, path, made_from), again in zip(read, painted):
                outputs.write(path, again, made_from)

    if outputs.made:
        first = list(
            readable((name, source, path) for name, source, path in jobs[:16] if path.exists())
        )
        pairs = [(image.resize((256, 256)), load_image(path)) for _, image, path in first]
        sheet = grid(pairs, titles=("input", "reconstruction")) if pairs else None
        if sheet:
            write(Path(args.out) / "reconstructions.png", sheet, {"overview": True})
    print(f"{outputs.made} images reconstructed in {args.out}{outputs.report()}")


def questions(args):
    """--describe -> rows (question_id, source, question, image's name): --question for each image of a folder, or a
    question file (.json, .jsonl: question_id, image, text; the images beside it or in --i2t-images)."""
    source = Path(args.describe)
    if source.is_dir():
        rows = image_rows(source, args.out)
        return [(name, image, args.question, Path(name).name) for name, image, _ in rows]
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


def check_answers(out):
    """InputError where out/answers.jsonl is not ours to go on with."""
    path = Path(out) / "answers.jsonl"
    keys = {"question_id", "image", "question", "answer", "made_from"}
    if path.exists() and not all(keys <= row.keys() for row in read_whole_lines(path)):
        raise InputError(
            f"{path} is in the way, and does not say what it was made from: move it, or choose"
            " another --out"
        )


def describe_files(model, args, rows):
    """--describe: out/answers.jsonl, {"question_id", "image", "question", "answer"} a line, and
    from what it was made; a rerun goes on. Benchmarks have several questions of one id: question
    and image belong to what identifies a row."""
    common_origin = origin(model, args, "describe", max_new_tokens=args.max_new_tokens)
    wanted = {}
    for key, source, question, image in rows:
        made_from = json.dumps({**common_origin, "source": fingerprint(source)}, sort_keys=True)
        digest = hashlib.sha256(made_from.encode()).hexdigest()
        wanted[json.dumps([key, image, question])] = digest[:16]

    def name(row):
        return json.dumps([row["question_id"], row["image"], row["question"]])

    path, count = Path(args.out) / "answers.jsonl", 0
    old = {name(row) for row in read_whole_lines(path)}
    done = {
        name(row)
        for row in mend_lines(path, lambda row: wanted.get(name(row)) in (None, row["made_from"]))
    }
    again = len((old - done) & wanted.keys())
    todo = [row for row in rows if json.dumps([row[0], row[3], row[2]]) not in done]
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        for (key, _, question, image), answer in answers(model, args, todo, "describe"):
            row = {"question_id": key, "image": image, "question": question, "answer": answer}
            file.write(json.dumps({**row, "made_from": wanted[name(row)]}) + "\n")
            count += 1
    kept, others = len(done & wanted.keys()), len(done - wanted.keys())
    aside = f"; {others} of other requests are there as well" if others else ""
    print(
        f"{count} answers in {path}: {kept} kept, {count - min(again, count)} made,"
        f" {min(again, count)} made again{aside}"
    )


def describe_first(model, args, rows, path):
    """L_i2t without I2T data: before any update the model describes --self-captions training images, its targets. Our
    addition, not the paper's (which has LLaVA-1.5's 665K conversations): it holds the model to what it said before
    RecA, a distillation from itself, so understanding cannot drift away while generation learns. Kept in --out."""
    if not path.exists() and world()[0] == 0:               # a resumed run must not ask the model that RecA has changed
        order = np.random.default_rng(stable_seed("describe", len(rows))).permutation(len(rows))[:args.self_captions]
        print(f"L_i2t has no data (--i2t-data): the model describes {len(order)} of its training images first, and is "
              f"held to that ({path}). This is our addition; real data or --lambda-i2t 0 are the alternatives.")
        asked = [(*rows[i][:2], args.question) for i in order.tolist()]
        said = [
            {"name": name, "question": question, "answer": answer}
            for (name, _, question), answer in answers(model, args, asked, "targets of L_i2t")
            if answer.strip()
        ]
        if not said:
            raise InputError("the model describes none of the images: give --i2t-data, or --lambda-i2t 0")
        write(path, said)
    if dist.is_initialized():
        dist.barrier()
    return described(rows, path)


def described(rows, path):
    """The rows of L_i2t from what describe_first has kept. By the images' names: files may have
    come or gone since. Descriptions of images that are not there are left out; InputError where
    none is left."""
    wanted = {}
    for said in read_json(path, lines=True):
        try:
            wanted[said["name"]] = [(said["question"], said["answer"])]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} does not hold this model's descriptions (name, question, answer)"
            ) from error

    if isinstance(rows, Shapes):
        numbers = {
            name: int(name.removeprefix("shapes ")) for name in wanted if name.startswith("shapes ")
        }
        found = [(name, rows[number][1]) for name, number in numbers.items()]
    else:
        found = [(name, source) for name, source, _ in rows if name in wanted]
    if not found:
        raise InputError(
            f"{path} describes none of the images of --data: give back the folder of this run, or "
            "--i2t-data"
        )
    if len(found) < len(wanted):
        say(
            f"{path}: {len(wanted) - len(found)} of {len(wanted)} descriptions are of images that"
            " are not there now: left out"
        )
    return [(name, source, wanted[name]) for name, source in found]


# ==== 10. How fast is this card? ==================================================================


# Dense bf16 peak of common GPUs, in FLOP/s, for the MFU (their makers' data sheets).
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}


def convolution_backward_flops(grad_shape, x_shape, weight_shape, bias, stride, padding, dilation, transposed,
                               output_padding, groups, wanted, out_shape=None, **_):
    """torch's own formula forgets the groups in the weights' gradient: SANA's depthwise convolutions
    would count a thousandfold. The weights are [out, in / groups, ...]: each meets every output place once."""
    places = x_shape if transposed else grad_shape
    once = 2 * math.prod(weight_shape) * places[0] * math.prod(places[2:])
    return once * (bool(wanted[0]) + bool(wanted[1]))


def bench(model_class, args, device, prepare, trainer):
    """--bench: full-size steps with random weights on random images; prints and returns {figure: value}.

    Time and peak memory are those of whole updates after the first one: moments and gradients are
    there, as in training. MFU = the FLOPs that the step needs (counted by torch on a step with one
    image, without recomputation, times the batch) per second, over the GPU's dense bf16 peak.
    """
    import resource
    from torch.utils.flop_counter import FlopCounterMode
    cuda = device.type == "cuda"
    model = model_class.random(args.model, device)
    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if args.compile:
        compile_blocks(model)
    model.train()

    # A picture as large as training can meet, and an answer of the length that LLaVA's have.
    rng = np.random.default_rng(0)
    size = model.config.image_size
    picture = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
    words = " ".join(rng.choice([*SHAPES, *COLORS, *PLACES], 80).tolist())
    texts = {"recon": SEED_TEMPLATE, "i2t": [(SEED_TEMPLATE, words)], "t2i": words}
    weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
    streams = {name: Stream(name, [("random", picture, texts[name])], model.preprocess, args.seed)
               for name in LOSSES if weights[name]}

    def step(batch, accum):
        args.batch = batch
        args.accum = accum
        items = {name: iter([[stream[k] for k in range(*own_share(batch))]]) for name, stream in streams.items()}
        trainer.take_step(items)

    trainer = set_up_training(model, streams, args, prepare, trainer)
    batch = args.batch
    accum = args.accum
    checkpointing = args.checkpointing

    # What the arithmetic needs: one image without recomputation, and no move of the weights.
    args.checkpointing = False
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(batch=world()[1], accum=10 ** 9)
    flops = counter.get_total_flops() * batch
    args.checkpointing = checkpointing

    # The first update makes the moments; then come whole updates, at least four steps.
    trainer.pending = 0
    step(batch, accum=1)
    count = accum * -(-4 // accum)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in tqdm(range(count), desc="bench", unit="step", dynamic_ncols=True):
        step(batch, accum)
    if cuda:
        torch.cuda.synchronize()
    duration = (time.perf_counter() - began) / count

    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    card = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((value for name, value in PEAK.items() if name in card), None)
    figures = {
        "model": args.model, "device": card, "batch": batch, "accum": accum, "micro_batch": args.micro_batch,
        "optimizer": args.optimizer, "losses": list(streams), "compile": args.compile,
        "checkpointing": args.checkpointing, "step_s": round(duration, 4),
        "images_per_s": round(batch / duration, 3), "tflops_per_step": round(flops / 1e12, 3),
        "mfu": round(flops / duration / peak / world()[1], 4) if peak else None,
        "peak_memory_gb": round(used / 1e9, 3),
        "trainable_parameters": sum(p.numel() for p in trainer.parameters),
        "parameters": sum(p.numel() for p in model.parameters())}
    if world()[0] == 0:
        print(json.dumps(figures))
    return figures


# ==== 11. The toy world ===========================================================================
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


def objects_in_words(description):
    """A description -> the set of the objects that it names, "red circle top-left" each."""
    parts = description.lower().strip(" .").split(" and ")
    return {" ".join(part.split()) for part in parts}


def score_toy(model, size, count, seed, options):
    """The scores of score_generations on held-out scenes, and two more, fractions of images:
    "reconstruction", whose every shape, color and place comes back from the model's own
    understanding embeddings; "understanding", which the model describes rightly and wholly."""
    rng = np.random.default_rng((seed, 999_999))    # no training scene has this generator
    scenes = [random_scene(rng) for _ in range(count)]
    images = [draw_scene(scene, size) for scene in scenes]
    seeds = list(range(seed * 1000, seed * 1000 + count))

    painted = model.reconstruct(images, seed=seeds, **options)
    same = [read_scene(picture) == scene for scene, picture in zip(scenes, painted)]
    descriptions = model.describe(images, question=SEED_TEMPLATE, max_new_tokens=24)
    right = [objects_in_words(description) == objects_in_words(caption(scene))
             for scene, description in zip(scenes, descriptions)]

    prompts = [random_scene(rng, 1 + k % 2) for k in range(count)]
    generated = model.generate([caption(scene) for scene in prompts], seed=seeds, **options)
    return {
        "reconstruction": sum(same) / count,
        "understanding": sum(right) / count,
        **score_generations(prompts, generated),
    }


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
