"""What the four RecA scripts share: files, data, equation (3), training, inference on files.

A script, reca_*.py, holds one architecture and its losses: *what* is trained. This file knows no
architecture. It takes the model of a script and does the rest: *how* a step is taken. The way from
images to moved weights is in section 6, and begins with `run`, which main() of every script calls:

    run                  loads the model, trains it (post_train), makes what inference is asked for
    post_train           opens the streams of images, makes the trainer, and lets it train
    Trainer.train        the loop over steps: log, previews, checkpoints
    Trainer.take_step    a step: images -> micro-batches -> losses -> gradients -> moved weights
    objective            equation (3): L = λ_recon · L_recon + λ_i2t · L_i2t + λ_t2i · L_t2i

Sections:

    1. Errors and files                 6. Equation (3) and training
    2. Checkpoints                      7. The command line
    3. Processes and random numbers     -- what follows is not needed to understand RecA --
    4. Templates and images             8. Memory and speed
    5. Data                             9. Inference on files
                                       10. How fast is this card?
                                       11. The toy world

What a script provides
======================
To write a script for another architecture, start from the nearest of the four. This file uses the
following, and nothing else.

A model class, a torch.nn.Module. `task` is the name of a loss: "recon", "i2t" or "t2i". What is
frozen has requires_grad=False from the beginning (by this, and not by parameter_groups, the two are
told apart), and stays in eval mode when the model's train() is called.

  Loading and saving
    Model.from_pretrained(source, device=, dtype=, quantize=)
        source: a hub id, a folder, or a name in RECIPES ("tiny": see tiny_folder). quantize: None
        or "int8"; the method itself calls `quantize`. The model comes back in eval mode. Buffers
        that no checkpoint holds (rotary tables, position ids) must be computed again if the model
        was made on the meta device.
    Model.random(name, device)
        A model of full size with random weights, without a download, for --bench.
    model.save_pretrained(folder)
        Writes the layout of the released files.

  What training asks for
    model.device, model.config.image_size
    model.set_und(size=, blur=)
        --und-size and --blur: what the understanding side is shown of an image. None: the default.
        It is called only where a flag is given, so __init__ calls it as well.
    model.parameter_groups(weight_decay)
        The trained parameters as groups for AdamW.
    model.blocks()
        The repeated layers, a list: each is compiled, and recomputed in the backward pass.
    model.unquantized
        A tuple of beginnings of names: layers with such a name stay as they are under --quantize.

  From an image to a loss
    model.preprocess(image, task, rng)
        A PIL image (None: a text without an image) -> CPU tensors by name, a dict. rng: a numpy
        Generator that places the crop, or None: the central crop. A ValueError skips the image.
    model.encode(samples, task)
        A list of such dicts -> what the FROZEN parts compute for each image, a list of dicts of
        tensors: the `features` below. It runs without a graph, and it is all that --cache keeps;
        whatever is trained belongs into the losses. In training the samples are on the device
        already; generate and describe bring them from the CPU. It runs under autocast in bf16,
        which a tokenizer that must not round switches off for itself.
    model.draw(task, features, rng)
        All random numbers of a loss by name, on the CPU, a dict ({} where nothing is drawn). rng:
        an Rng; None: Rng.fresh.
    model.count_targets(task, features, texts, draws)
        The number of terms of which the loss is the mean, an int that the host knows.
    model.recon_loss(features, templates, draws=None, rng=None)
    model.i2t_loss(features, conversations, draws=None, rng=None)
    model.t2i_loss(features, captions, draws=None, rng=None)
        -> scalar, the mean over the targets. draws: what `draw` returned; None: drawn from rng.
        A template and a caption are strings; a conversation is a list of (question, answer).
    model.worst_case(task, count)
        (samples, texts, draws that replace drawn ones) of the `count` largest inputs that training
        can meet: what must fit into memory.

  Inference. seed: an int, or one for each image. What the command line does not give is not passed.
    model.generate(prompts, seed=, guidance_scale=, num_steps=)      -> list of PIL images
    model.reconstruct(images, seed=, guidance_scale=, num_steps=)    -> list of PIL images
    model.describe(images, question=, max_new_tokens=)               -> list of strings

RECIPES, {name of a model: Recipe}, and DEFAULT, the name that --model has if it is not given.
Recipe is a dataclass whose fields are the defaults of the flags of the same names: steps, batch,
accum, lr, warmup, horizon, weight_decay, clip, lambda_recon, lambda_i2t, lambda_t2i; and betas and
eps of AdamW. (BAGEL's has batch_images, too.)

main(), which hands this over: common.run(Model, common.parse_args(__doc__, RECIPES, DEFAULT)). Two
more things may be handed over: flags of the script's own (parse_args' `extend`; what they set in
args.sampler goes to generate and reconstruct), and `prepare`, see `run`.

What a script may use
=====================
  files, models     tiny_folder, find_checkpoint, load_state, load_strictly, load_tokenizer,
                    tiny_tokenizer, atomic, write, autoencoder_from_original
  images            normalize, to_uint8, to_pil, random_square, blur, check_blur
  words             templates, SEED_TEMPLATE, plain (no markers in what a user writes)
  random numbers    Rng.fresh for losses, Rng.sampling for samplers
  losses            to_device (one transfer, and no wait), cross_entropy_sum, mean

What a new architecture must decide
===================================
  What is frozen. What sets the task is frozen, so that the loss cannot fall by an easier task: the
      encoder that understands and the tokenizer that makes the targets. Connectors between the two
      sides are trained where the original trains them.
  At which size the understanding side sees the image: the smallest at which it was trained. Both
      sides see the same crop.
  λ_i2t: 1 where the sides share weights, else 0.
  The prompt: the one in which the model was trained to describe, system turn included or not.
  Guidance in `reconstruct`: none, unless the model knows a prompt without the embeddings.
  That decode(encode(image)) looks like the image: see it before training.

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
import importlib.metadata
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


# The exact names that a run gives: to its checkpoints, to its previews, to the pictures about it,
# and to the temporary files that a kill leaves behind.
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{6,})")
PREVIEW_NAME = re.compile(r"(step_\d{6,}|(before|input|told_before)_\d+)\.png")
OVERVIEW = "reconstructions.png"
RUN_PICTURES = {"loss.png", "effect.png", OVERVIEW}
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


def read_intact_lines(path):
    """The objects in a .jsonl that runs append to; [] where there is no such file. Skipped are
    lines that are no object: empty ones, and those that a kill has left half-written."""
    if not path.exists():
        return []

    objects = []
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):
            objects.append(json.loads(line))
    return [content for content in objects if isinstance(content, dict)]


def mend_jsonl(path, keep=lambda row: True):
    """Rewrites a .jsonl that runs append to, with its whole lines alone, and returns their objects.

    Left out are also those that `keep` refuses, or that lack what `keep` looks at.
    """
    kept = []
    for row in read_intact_lines(path):
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
        raise InputError(f"{path} is not a readable checkpoint: it does not tell its step")
    return state


@contextlib.contextmanager
def offer_earlier_checkpoint(folder):
    """with offer_earlier_checkpoint(checkpoint): read it.

    Where that fails, the InputError offers the checkpoint before it: two are kept, so that a
    damaged one does not cost the run.
    """
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
# image comes from generators that belong to this image alone: one of numpy for its crop and its
# template (`Stream`), one of torch for its mask, the order of its tokens, timestep and noise
# (`Rng`). Their seeds are hashes of
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
    model does not learn the wording of a single one. The paper has 360, too, and shows a few of
    them; this wording is ours. "one": the seed template alone (the paper's
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
            pictures = RUN_PICTURES.intersection(names)
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


def image_examples(source, out=None):
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


def read_examples(path, what, read):
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
    as read_examples expects it."""
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


def conversation_examples(path, folder):
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

    examples = read_examples(path, "a LLaVA conversation (image, conversations)", read)
    examples = [example for example in examples if example is not None]
    if not examples:
        raise InputError(f"{path}: no conversation of a human and gpt{left_out(left)}")
    say(f"{path}: {len(examples)} conversations{left_out(left)}")
    return examples


def caption_examples(path):
    """Examples for L_t2i, from a .jsonl of {"image": name, "caption": text}, where the images are
    relative to the folder of the file. Raises InputError for a malformed row."""
    def read(i, row):
        image = row["image"]
        return image, Path(path).parent / image, text_in(row, "caption")

    return read_examples(path, "an image with its caption (image, caption)", read)


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
# RecA from images to moved weights, each part after what it uses: `objective`, Trainer.take_step,
# Trainer.train, `post_train`, `run`. To follow a run from its beginning, read them the other way
# round, from `run` on.


LOSSES = ("recon", "i2t", "t2i")


def objective(losses, weights, backward):
    """One evaluation of the paper's equation (3):

        L = λ_recon · L_recon  +  λ_i2t · L_i2t  +  λ_t2i · L_t2i

    L_recon is RecA: paint an image from the model's own understanding embeddings of it. L_i2t,
    image to text, keeps understanding alive. L_t2i, text to image, is ordinary fine-tuning. In the
    paper λ_recon = 1, λ_t2i = 0, and λ_i2t = 1 where understanding and generation share parameters
    (Show-o, Harmon), else 0.

    losses    {"recon": function() that yields the shares of L_recon, ...}: scalars, one for each
              micro-batch, whose sum is the loss
    weights   {"recon": λ_recon, "i2t": λ_i2t, "t2i": λ_t2i}. A loss whose λ is 0 is not computed.
    backward  function(share of L) that adds to the gradients. It is called as soon as a share is
              there: the activations of only one micro-batch of one loss are in memory at a time.

    Returns (L, {"recon": L_recon, ...}) as tensors without a graph.
    """
    total = 0
    values = {}
    for name, shares in losses.items():
        if weights[name] == 0:
            continue

        values[name] = 0
        for share in shares():
            backward(weights[name] * share)
            values[name] += share.detach()
        total += weights[name] * values[name]
    return total, values


def mean(total, count):
    """total / count, for a count that the host knows; 0 where a micro-batch holds no target."""
    return total / max(1, count)


def learning_rate(update, peak, warmup, horizon):
    """The learning rate of a weight update, counted from 0: a linear warm-up over `warmup` updates
    to `peak`, then a cosine that reaches 0 at the update `horizon`. horizon 0: constant instead."""
    if update < warmup:
        return peak * (update + 1) / warmup
    if horizon == 0:
        return peak
    progress = min(1, (update - warmup) / max(1, horizon - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass
class MicroBatch:
    """Images that go through the model at once, and what one of its losses needs of them."""
    features: list      # what the frozen parts have computed, a dict of tensors for each image
    texts: list         # templates, conversations or captions
    draws: dict         # the random numbers of the loss
    targets: int        # of how many terms the loss is the mean: masked tokens, answer tokens ...


class Trainer:
    """The post-training loop, once for all architectures.

    model      see "What a script provides" at the top of this file
    streams    {"recon": Stream, "i2t": Stream, ...}, one for each loss whose λ is not 0
    args       the command line (section 7)
    show       function(step) that paints a preview, or None
    optimizer  None: AdamW
    average    function(parameters) that makes the gradients of all processes equal to their mean

    A *step* is one evaluation of equation (3), on `batch` images for each loss, over all processes.
    An *update* moves the weights; it comes after every `accum` steps. A *micro-batch* is what one
    process puts through the model at once. It changes memory and speed and, up to rounding, no
    number: a loss is the mean over all targets of the step, and every random number follows from
    the seed and an image's position in its stream. (Dropout alone depends on it.)
    """
    sharded = False     # Do several processes divide the weights among them?

    def __init__(self, model, streams, args, show=None, optimizer=None, average=average_gradients):
        self.model = model
        self.streams = streams
        self.args = args
        self.show = show
        self.average = average
        self.weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
        if optimizer is None:
            optimizer = make_optimizer(model, args, low_precision=False)
        self.optimizer = optimizer
        self.parameters = []
        for group in optimizer.param_groups:
            self.parameters += group["params"]

        # --micro-batch is a number for all losses. In run.json there is one for each; a loss that a
        # resumed run did not begin with gets what fits for all others.
        size = args.micro_batch or CPU_MICRO_BATCH
        if not isinstance(size, dict):
            size = dict.fromkeys(streams, size)
        least = min(size.values(), default=1)
        self.micro_batch = {name: size.get(name, least) for name in streams}
        self.halved = False

        self.out = Path(args.out)
        self.step = 0           # steps that were taken
        self.updates = 0        # updates that were made
        self.seen = 0           # images that were taken from each stream
        self.pending = 0        # steps whose gradients wait for the next update
        self.last_update = self.progress()
        self.stop = None        # the name of the signal that asked for the end
        self.skipped = set()    # names of images that could not be read

    def train(self):
        """Takes steps until --steps or a signal, and writes the log, previews and checkpoints.

        The last checkpoint is written in both cases. After a signal the process ends.
        """
        args = self.args
        first_step = self.step
        began = time.time()
        stop = False

        handlers = self.notice_signals()
        loaders = self.loaders()
        log = self.open_log()
        bar = tqdm(
            desc="RecA", unit="step", initial=first_step, total=args.steps,
            dynamic_ncols=True, disable=world()[0] > 0)
        try:
            while self.step < args.steps and not stop:
                row = None
                try:
                    row, stop = self.take_step(loaders)
                except torch.OutOfMemoryError:
                    if not self.can_halve_micro_batches():
                        raise
                # This is not done in the except clause: there the exception, which knows where it
                # was raised, still holds the activations.
                if row is None:
                    self.halve_micro_batches()
                    close_all(loaders)
                    log.close()
                    loaders = self.loaders()
                    log = self.open_log()
                    continue

                seconds = time.time() - began
                row["images_per_s"] = round((self.step - first_step) * args.batch / seconds, 3)
                log.write(json.dumps(row) + "\n")
                for name in row["skipped"]:
                    bar.write(f"skipped: {name}")
                losses = {name: f"{row[name]:.4f}" for name in LOSSES if name in row}
                bar.set_postfix(losses | {"img/s": row["images_per_s"]})
                bar.update(self.step - bar.n)

                # The last preview and the last checkpoint are made after the loop.
                if stop or self.step == args.steps:
                    break
                if self.show is not None and self.step % args.sample_every == 0:
                    self.show(self.step)
                # The first update at or after each multiple of save_every.
                if self.pending == 0 and self.step % args.save_every < args.accum:
                    self.save()
        finally:
            close_all(loaders)
            log.close()
            bar.close()
            # From here on signals interrupt as usual: also scores and inference.
            for number, handler in handlers.items():
                signal.signal(number, handler)

        self.finish()

    def take_step(self, loaders):
        """One step: equation (3), its gradients, and after every `accum` steps an update.

        loaders: {"recon": iterator, ...}; each gives a list of items a step, this process's part of
        the images. Returns the step's row of the log, and whether a signal asks for the end.
        InputError where a number is not finite; OutOfMemoryError, on all processes, where a
        micro-batch does not fit on one of them.
        """
        args = self.args
        model = self.model
        rank, ranks = world()
        torch.manual_seed(stable_seed(args.seed, "dropout", self.step, rank))

        # 1. Images -> micro-batches: what the frozen parts compute of the images, their texts and
        # their random numbers.
        items = {name: next(loader) for name, loader in loaders.items()}
        micro_batches = {name: self.micro_batches(name, items[name]) for name in items}
        targets = self.targets_of_step(micro_batches)

        # 2. The losses. One is the mean over all its targets of the step, so that the mean of a
        # micro-batch counts in proportion to the targets that it holds.
        losses = {"recon": model.recon_loss, "i2t": model.i2t_loss, "t2i": model.t2i_loss}

        def shares(name):
            for micro_batch in micro_batches[name]:
                features = micro_batch.features
                with self.precision():
                    loss = losses[name](features, micro_batch.texts, draws=micro_batch.draws)
                yield loss * (micro_batch.targets / max(1, targets[name]))

        # 3. Equation (3) and its gradients. An update takes the mean of `accum` steps. The shares
        # of the processes must be added, but `average` divides their sum by the number of
        # processes: they are multiplied by it first.
        def backward(share):
            (share * ranks / args.accum).backward()

        terms = {name: functools.partial(shares, name) for name in micro_batches}
        out_of_memory = False
        try:
            total, values = objective(terms, self.weights, backward)
        except torch.OutOfMemoryError:
            # Processes that divide the weights wait for each other in the middle of the model.
            # Others meet in sum_over_processes, where all of them learn of it.
            if self.average is not average_gradients:
                raise
            out_of_memory = True
            total = torch.zeros((), device=model.device)
            values = {name: total for name in terms if self.weights[name] != 0}
        total, values, stop = self.sum_over_processes(total, values, out_of_memory)

        self.step += 1
        self.seen += args.batch
        self.pending += 1
        row = {"step": self.step, "loss": total, **values}
        images = list(itertools.chain(*items.values()))
        self.stop_unless_finite("loss", total, images)

        # 4. The update: gradients -> moved weights.
        if self.pending == args.accum:
            self.average(self.parameters)
            row["lr"] = learning_rate(self.updates, args.lr, args.warmup, self.horizon())
            limit = args.clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
            row["grad_norm"] = norm
            self.stop_unless_finite("grad_norm", norm, images)

            for group in self.optimizer.param_groups:
                group["lr"] = row["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.updates += 1
            self.pending = 0
            self.last_update = self.progress()

        # An image that cannot be read is named once, in the row of its first step.
        unreadable = set(itertools.chain(*[item["skipped"] for item in images]))
        row["skipped"] = sorted(unreadable - self.skipped)
        self.skipped |= unreadable
        return row, stop

    # ---- the parts of a step ---------------------------------------------------------------------

    def loaders(self):
        """{name of a loss: generator of lists of items} from the position that has been reached."""
        loaders = {}
        for name, stream in self.streams.items():
            if self.weights[name] != 0:
                loaders[name] = stream.batches(self.seen, self.args.batch, self.args.workers)
        return loaders

    def micro_batches(self, name, items):
        """This process's images of one loss, encoded, with their random numbers -> [MicroBatch].

        Every process makes equally many, and none is larger than micro_batch[name]: processes that
        divide the weights gather them for each pass together. A process that has fewer images than
        passes repeats its first image with 0 targets.
        """
        passes = math.ceil(self.largest_share() / self.micro_batch[name])
        bounds = [len(items) * k // passes for k in range(passes + 1)]

        batches = []
        for begin, end in zip(bounds[:-1], bounds[1:]):
            chunk = items[begin:end] or items[:1]
            texts = [item["text"] for item in chunk]
            positions = [item["position"] for item in chunk]
            rng = Rng(self.args.seed, name, self.step, positions=positions)
            with self.precision():
                features = encode_batch(self.model, chunk, name, self.streams[name].cache)

            draws = self.model.draw(name, features, rng)
            targets = 0
            if begin < end:
                targets = self.model.count_targets(name, features, texts, draws)
            batches.append(MicroBatch(features, texts, draws, targets))
        return batches

    def largest_share(self):
        """The most images of a step that any process gets of each loss."""
        return math.ceil(self.args.batch / world()[1])

    def precision(self):
        """The context in which the model computes: autocast to bf16, or nothing.

        Autocast keeps the bf16 copy of every float32 weight until the end of the forward pass. With
        checkpointing they are made anew instead: a block that is recomputed needs only its own.
        """
        return torch.autocast(
            self.model.device.type, torch.bfloat16,
            enabled=self.args.precision == "bf16",
            cache_enabled=not self.args.checkpointing)

    def targets_of_step(self, micro_batches):
        """{name of a loss: its number of targets} over all micro-batches and all processes."""
        targets = {}
        for name, batches in micro_batches.items():
            targets[name] = sum(batch.targets for batch in batches)
        if world()[1] == 1:
            return targets

        counts = torch.tensor(
            list(targets.values()), dtype=torch.float64, device=self.model.device)
        dist.all_reduce(counts)
        return dict(zip(targets, counts.tolist()))

    def sum_over_processes(self, total, values, out_of_memory):
        """This process's parts of L and of the losses -> (L, {name: loss}, stop), as numbers.

        All processes stop together: `stop` is True where one of them got a signal, and all raise
        OutOfMemoryError where one of them had to. Everything comes from the GPU in one transfer,
        for which the host waits.
        """
        flags = torch.tensor([self.stop is not None, out_of_memory], dtype=torch.float32)
        numbers = torch.stack([value.float() for value in (total, *values.values())])
        numbers = torch.cat([numbers, to_device(flags, self.model.device)])
        if world()[1] > 1:
            dist.all_reduce(numbers)

        total, *sums, stop, out_of_memory = numbers.tolist()
        if out_of_memory:
            raise torch.OutOfMemoryError("a micro-batch does not fit")
        return total, dict(zip(values, sums)), stop > 0

    def stop_unless_finite(self, name, value, images):
        """InputError where the loss or the gradient's norm is not finite, with the images named."""
        if math.isfinite(value):
            return
        saved = own_checkpoints(self.out)
        kept = "no checkpoint had been written yet"
        if saved:
            kept = f"the last good checkpoint, {saved[-1].name}, is kept in {self.out}"
        names = ", ".join(item["name"] for item in images[:8])
        raise InputError(
            f"{name} is {value} at step {self.step} on {names}: stopped; {kept} (try a lower --lr "
            "or --precision fp32)")

    def horizon(self):
        """The update at which the cosine reaches 0. Where no flag and no recipe gives one, it is
        the last of the run, whatever --steps is, also in a resumed run that goes on for longer."""
        if self.args.horizon is not None:
            return self.args.horizon
        steps_left = self.args.steps - (self.step - self.pending)
        return self.updates + steps_left // self.args.accum

    # ---- what surrounds the steps ----------------------------------------------------------------

    def notice_signals(self):
        """From now on SIGINT and SIGTERM end the training after the step, with a checkpoint.
        Returns {signal: its handler until now}."""
        def notice(number, _):
            self.stop = signal.Signals(number).name

        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, notice)
        return handlers

    def open_log(self):
        """out/log.jsonl, without the rows of steps that are taken again: a run that was killed may
        have logged steps that no checkpoint holds."""
        if world()[0] != 0:
            return open(os.devnull, "w")
        mend_jsonl(self.out / "log.jsonl", lambda row: row["step"] <= self.step)
        return open(self.out / "log.jsonl", "a", buffering=1)

    def can_halve_micro_batches(self):
        """Whether a micro-batch that does not fit may be halved: once, and not where processes
        divide the weights."""
        larger = max(self.micro_batch.values()) > 1
        return larger and not self.halved and self.average is average_gradients

    def halve_micro_batches(self):
        """After a micro-batch that did not fit: half of it, and on from the last update, since
        nobody knows to which gradients the interrupted backward pass has been added."""
        self.halved = True
        self.micro_batch = {name: max(1, size // 2) for name, size in self.micro_batch.items()}
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        tqdm.write(
            f"out of memory in step {self.step + 1}: from now on micro-batches of "
            f"{self.micro_batch}, again from step {self.last_update['step'] + 1}")

        # A run that resumes this one begins with the smaller micro-batches.
        self.go_on_from(self.last_update)
        self.args.micro_batch = self.micro_batch
        record_run(self.args, self.model.device, again=True)

    def finish(self):
        """The last checkpoint and loss.png. After a signal the process ends here, without an error.
        """
        # In the middle of an accumulation the weights are still those of the last update: this is
        # where a resumed run goes on. So 5000 steps with accum 16 end with checkpoint-004992.
        finished = self.step >= self.args.steps
        self.go_on_from(self.last_update)
        self.save()

        # Previews, scores and inference get the memory of gradients and moments.
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

        if world()[0] == 0:
            draw_losses(self.out)
            if self.skipped:
                print(f"{len(self.skipped)} unreadable images were skipped (named in "
                      f"{self.out / 'log.jsonl'})")
        if not finished:
            by = self.stop or "another rank"
            print(f"stopped by {by} at step {self.step}, saved; go on with --resume --out "
                  f"{self.out}")
            sys.exit(0)

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self):
        """out/checkpoint-<step>: the model in the released layout, and beside it trainer.pt, which
        only a resume needs. The two newest are kept."""
        if world()[0] == 0:
            with atomic(self.out / f"checkpoint-{self.step:06d}") as folder:
                folder.mkdir(parents=True)
                self.model.save_pretrained(folder)
                state = {**self.progress(), "optimizer": self.optimizer.state_dict()}
                torch.save(state, folder / "trainer.pt")
            for old in own_checkpoints(self.out)[:-2]:
                shutil.rmtree(old)
        if dist.is_initialized():
            dist.barrier()

    def resume(self, folder):
        """Reads what `save` wrote, but for the model's weights, which from_pretrained has read.
        Random numbers need no state: they follow from the seed (section 3)."""
        state = load_training(folder)
        self.go_on_from(state)
        with own_options(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])

    def progress(self):
        """How far the training is, as trainer.pt keeps it."""
        return {"step": self.step, "updates": self.updates, "seen": self.seen}

    def go_on_from(self, progress):
        """Sets the counters to those of an update: `progress` is what progress() returned then."""
        self.step = progress["step"]
        self.updates = progress["updates"]
        self.seen = progress["seen"]
        self.pending = 0
        self.last_update = self.progress()


def close_all(loaders):
    """Ends the generators of a {name: generator}, and with them their worker processes."""
    for loader in loaders.values():
        loader.close()


@contextlib.contextmanager
def own_options(optimizer):
    """with own_options(optimizer): load its state. Weight decay, betas and eps stay those of this
    run, as the command line says: loading would replace them by those of the earlier run."""
    kept = []
    for group in optimizer.param_groups:
        kept.append({name: group[name] for name in ("weight_decay", "betas", "eps")})
    yield
    for group, options in zip(optimizer.param_groups, kept):
        group.update(options)


def run(model_class, args, prepare=lambda model, args: {}, trainer_class=Trainer,
        inference_jobs=()):
    """What main() of every script calls: load the model, train it, and use it.

    model_class     the script's model
    args            from parse_args
    prepare         function(model, args), called before the training. It returns further arguments
                    of the trainer: {} or {"average": function}.
    trainer_class   Trainer, or a subclass where a script needs one
    inference_jobs  {function(model, args, jobs): jobs}: inference that only this script has, called
                    after the training like those of section 9
    """
    device = start_process(args)
    if args.bench:
        return bench(model_class, args, device, prepare, trainer_class)

    # Bad files end the run here, before anything is downloaded, and not after days of training.
    check_out(args)
    examples = build_examples(args) if args.steps else {}
    inference_jobs = dict(inference_jobs) | asked_inference(args)

    checkpoint = own_checkpoints(args.out)[-1] if args.resume else None
    model = load_model(model_class, args, device, checkpoint)
    record_run(args, device)

    if args.steps:
        post_train(model, args, examples, prepare, trainer_class, checkpoint)

    if world()[0] == 0:
        with inference(model, args):
            for make_files, jobs in inference_jobs.items():
                make_files(model, args, jobs)


def load_model(model_class, args, device, checkpoint):
    """The model on the device: --model, or that of the checkpoint where a run is resumed."""
    # Training keeps float32 weights, which autocast or lower_precision may round. Inference alone
    # reads them in bf16.
    dtype = torch.bfloat16
    if args.steps or args.precision == "fp32":
        dtype = torch.float32

    options = {"device": device, "dtype": dtype, "quantize": args.quantize}
    if checkpoint is None:
        model = model_class.from_pretrained(args.model, **options)
    else:
        # A look at trainer.pt comes first: the error offers the checkpoint before a damaged one.
        with offer_earlier_checkpoint(checkpoint):
            load_training(checkpoint, mmap=True)
            model = model_class.from_pretrained(str(checkpoint), **options)

    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if args.compile:
        compile_blocks(model)
    return model


def post_train(model, args, examples, prepare, trainer_class, checkpoint):
    """The training of a run, from the images to the last checkpoint.

    examples: {"recon": examples, ...} from build_examples. checkpoint: where a resumed run goes on,
    or None. The other arguments are those of `run`.
    """
    out = Path(args.out)
    main_process = world()[0] == 0
    resumed = checkpoint is not None
    if main_process:
        remove_old_files(out, resumed)

    # The data: an endless stream of images with a text for each loss whose λ is not 0.
    examples = complete_examples(model, args, examples)
    streams = open_streams(model, args, examples)

    # The model as it is before RecA, for comparison.
    previews = Previews(model, args, examples, resumed)
    effect = ToyEffect(model, args) if args.data == "shapes" else None
    if main_process and not resumed:
        previews.paint_before()
        if effect is not None:
            effect.measure_before()

    # The training. run.json is written again, with what --optimizer auto and --micro-batch auto
    # have found.
    trainer = set_up_training(model, streams, args, prepare, trainer_class, previews.show)
    record_run(args, model.device, again=True)
    if resumed:
        with offer_earlier_checkpoint(checkpoint):
            trainer.resume(checkpoint)
    model.train()
    trainer.train()

    # The model after RecA.
    previews.show(trainer.step)
    if main_process:
        if effect is not None:
            effect.measure_after(previews)
        print(f"done: checkpoint-{trainer.step:06d}, loss.png, previews/, log.jsonl are in {out}/")


def remove_old_files(out, resumed):
    """Removes what a killed run left half-written and, unless a run is resumed, what an earlier run
    wrote. All other files stay."""
    for path in leftovers(out):
        remove(path)
    if not resumed:
        for path in written_by_run(out):
            remove(path)


def complete_examples(model, args, examples):
    """{"recon": examples, ...} from build_examples -> the examples of each loss whose λ is not 0.

    The toy world is drawn in the model's size. For L_i2t without data the model describes images.
    """
    examples = dict(examples)
    for data in examples.values():
        if isinstance(data, Shapes):
            data.size = model.config.image_size

    if args.lambda_i2t and not args.i2t_data:
        with inference(model, args):
            path = Path(args.out) / "i2t_self.jsonl"
            examples["i2t"] = describe_first(model, args, examples["recon"], path)
    if not args.lambda_recon:
        examples.pop("recon", None)     # they were there to be described only
    return examples


def open_streams(model, args, examples):
    """{"recon": examples, ...} -> {"recon": Stream, ...}; with a cache each where --cache is given."""
    # What is cached depends on these. The frozen weights are told apart by their first numbers.
    first_numbers = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            first_numbers.append(parameter.detach().flatten()[:4].float().tolist())
    settings = {
        "model": args.model,
        "frozen": stable_seed(first_numbers),
        "image_size": model.config.image_size,
        "und_size": args.und_size,
        "blur": args.blur,
        "precision": args.precision,
    }

    streams = {}
    for name, data in examples.items():
        cache = Cache(args.cache, {**settings, "task": name}) if args.cache else None
        texts = templates(args.templates) if name == "recon" else None
        streams[name] = Stream(name, data, model.preprocess, args.seed, texts, cache)
    return streams


@contextlib.contextmanager
def inference(model, args):
    """with inference(model, args): no dropout, no gradients, in --precision. After it the model is
    in training mode again."""
    bf16 = args.precision == "bf16"
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        yield
    model.train()


# ---- pictures of a run ---------------------------------------------------------------------------


class Previews:
    """A few images, and their reconstructions before RecA and at a step. In out/previews:

    input_0.png ...      the images
    before_0.png ...     their reconstructions before RecA
    step_<step>.png      both of them, and the reconstructions at that step, side by side
    """

    def __init__(self, model, args, examples, resumed):
        self.model = model
        self.args = args
        self.folder = Path(args.out) / "previews"
        self.images = []
        self.before = []        # empty where the model before RecA is gone, and its pictures, too
        if resumed:
            self.images, self.before = kept_previews(self.folder)
        if not self.images:
            first_examples = next(iter(examples.values()))
            self.images = preview_images(first_examples, model.config.image_size)

    def paint(self):
        """The images, reconstructed by the model as it is now. One at a time: in the middle of an
        accumulation gradients and moments fill the memory."""
        painted = []
        with inference(self.model, self.args):
            for k, image in enumerate(self.images):
                options = sampler_options(self.args)
                painted += self.model.reconstruct([image], seed=[k], **options)
        return painted

    def paint_before(self):
        """Keeps the images and their reconstructions before RecA, as files for a resumed run."""
        self.before = self.paint()
        for k, (image, painted) in enumerate(zip(self.images, self.before)):
            write(self.folder / f"input_{k}.png", image)
            write(self.folder / f"before_{k}.png", painted)

    def show(self, step):
        """Writes step_<step>.png. All processes paint: they gather sharded weights together."""
        columns = {"input": self.images, "before RecA": self.before, f"step {step}": self.paint()}
        if not self.before:
            del columns["before RecA"]
        if world()[0] != 0:
            return
        cell = max(128, min(256, self.model.config.image_size))
        picture = grid(list(zip(*columns.values())), titles=list(columns), cell=cell)
        write(self.folder / f"step_{step:06d}.png", picture)


def preview_images(examples, size, count=6):
    """The first `count` readable images, as PIL. Of the toy world: scenes that are held out."""
    if isinstance(examples, Shapes):
        rng = np.random.default_rng(12345)
        return [draw_scene(random_scene(rng), size) for _ in range(count)]

    images = []
    first_error = None
    for name, source, _ in examples:
        if source is None:
            continue
        try:
            images.append(shrunk(load_image(source), 1024))
        except UnreadableImage as error:
            # The training names every image that it has to skip.
            first_error = first_error or f"{name} ({error})"
        if len(images) == count:
            break
    if not images:
        raise InputError(
            f"none of the {len(examples)} images could be read; the first: {first_error}")
    return images


def kept_previews(folder):
    """What a run that is resumed showed first: (images, their reconstructions before RecA). Two
    empty lists where one of the files is missing or unreadable: the run then shows other images,
    and nothing before RecA, since the model that could paint it is gone."""
    images = []
    before = []
    try:
        while (folder / f"before_{len(before)}.png").exists():
            k = len(before)
            images.append(load_image(folder / f"input_{k}.png"))
            before.append(load_image(folder / f"before_{k}.png"))
    except UnreadableImage:
        return [], []
    return images, before


LOSS_COLORS = {"recon": "#c0392b", "i2t": "#2471a3", "t2i": "#1e8449"}


def draw_losses(out):
    """out/log.jsonl -> out/loss.png: the losses over the steps, smoothed, each between its own
    lowest and highest value."""
    rows = read_json(out / "log.jsonl", lines=True)
    width = 1 + len(rows) // 20         # of the window over which the mean is taken
    picture = Image.new("RGB", (900, 420), "white")
    pen = ImageDraw.Draw(picture)

    for place, name in enumerate(LOSSES):
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        curve = np.convolve(values, np.ones(width) / width, "valid")
        low = curve.min()
        high = curve.max()

        xs = np.linspace(20, 880, len(curve))
        ys = 390 - 350 * (curve - low) / max(high - low, 1e-9)
        pen.line([*zip(xs, ys), (880, ys[-1])], fill=LOSS_COLORS[name], width=2)
        title = f"{name}: {curve[0]:.4g} to {curve[-1]:.4g} ({low:.4g} to {high:.4g})"
        pen.text((20 + 290 * place, 10), title, fill=LOSS_COLORS[name])

    pen.text((20, 400), f"steps 1 to {len(rows)}, means of {width}", fill="black")
    write(out / "loss.png", picture)


def grid(rows, titles=(), cell=192, gap=4):
    """Rows of PIL images, equally many in each -> one picture of square cells, with a title above
    each column."""
    header = 18 if titles else 0
    pitch = cell + gap
    sheet = Image.new("RGB", (len(rows[0]) * pitch, header + len(rows) * pitch), "lightgray")

    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * pitch + 4, 3), title, fill="black")

    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            # Small pictures are enlarged without smoothing: their pixels are to be seen.
            how = Image.NEAREST if image.width < cell else Image.BICUBIC
            place = (column * pitch, header + number * pitch)
            sheet.paste(image.resize((cell, cell), how), place)
    return sheet


# ==== 7. The command line =========================================================================


# ---- types of flags ------------------------------------------------------------------------------


# A file or a folder: ~ is the home folder also where no shell expands it (--data=~/x).
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
    if text == "auto":
        return None
    return at_least(1)(text)


# ---- the flags -----------------------------------------------------------------------------------
# The help of a flag says what the paper does; make_parser adds the default. A flag that is not
# given takes its value from the Recipe of the model, or, if that has none, from `fill_in`.


def add_flags_of_a_run(parser):
    group = parser.add_argument_group("what to run")
    group.add_argument("--data", type=expanded, help=(
        "folder of images, a .tar of them (WebDataset), or shapes (the toy world). Paper: images "
        "of Midjourney v6; BAGEL: 10,000 of FLUX"))
    group.add_argument("--out", type=expanded, help=(
        "folder of the run (default out/<script>-<model>)"))
    group.add_argument("--resume", action="store_true", help=(
        "go on from the newest checkpoint in --out, to the same numbers as without interruption; "
        "flags that are not given stay as they were"))
    group.add_argument("--bench", action="store_true", help=(
        "time steps at full size with random weights: images/s, share of the GPU's peak (MFU), "
        "peak of memory; downloads nothing"))


def add_training_flags(parser):
    group = parser.add_argument_group("training", (
        "The defaults are the paper's (Table 8), counted in steps and updates as this project has "
        "them: see Recipe in the script."))
    group.add_argument("--steps", type=at_least(0), help=(
        "evaluations of equation (3); 0: inference only. What is left over --accum moves nothing. "
        "Paper: 5000, Harmon-0.5B 3000, BAGEL 1000"))
    group.add_argument("--batch", type=at_least(1), help=(
        "images of each loss in a step, over all GPUs. Paper, at once on a GPU: Show-o 2 (256 px: "
        "4), Harmon 48 (0.5B: 96), OpenUni 42 (L: 20), BAGEL 8 on each of 6"))
    group.add_argument("--accum", type=at_least(1), help=(
        "steps to an update of the weights. Paper: Show-o 5, Harmon 2, OpenUni 16, BAGEL 1"))

    group.add_argument("--lambda-recon", type=number(0), help=(
        "weight of L_recon in equation (3). Paper: 1"))
    group.add_argument("--lambda-i2t", type=number(0), help=(
        "weight of L_i2t. Paper: 1 where understanding and generation share parameters (Show-o, "
        "Harmon), else 0"))
    group.add_argument("--lambda-t2i", type=number(0), help=(
        "weight of L_t2i; 1 where --captions is given. Paper: 0; 1 in its SFT baseline"))

    group.add_argument("--lr", type=number(0), help=(
        "peak of the learning rate. Paper: Show-o 5e-7, Harmon and OpenUni 1e-5, BAGEL 4e-5"))
    group.add_argument("--warmup", type=at_least(0), help=(
        "updates of linear warm-up. Paper: Show-o and BAGEL 1000; Harmon 500 and OpenUni 50 "
        "micro-batches, which are 125 and 3 updates"))
    group.add_argument("--horizon", type=at_least(0), help=(
        "update at which the cosine reaches 0; 0: constant. Not in the paper: the original's; "
        "where that gives none, the end of the run"))
    group.add_argument("--weight-decay", type=number(0), help=(
        "of AdamW. Paper: Show-o 0.01, Harmon 0.02, OpenUni 0.05, BAGEL 0"))
    group.add_argument("--clip", type=number(0), help=(
        "limit of the gradient's norm; 0: none. Not in the paper: the original's"))

    group.add_argument("--seed", type=at_least(0, 2 ** 63 - 1), default=0, help=(
        "of every random number. Not in the paper"))
    group.add_argument("--save-every", type=at_least(1), default=500, help=(
        "steps between checkpoints"))
    group.add_argument("--sample-every", type=at_least(1), default=250, help=(
        "steps between previews"))


def add_data_flags(parser):
    group = parser.add_argument_group("data of the losses")
    group.add_argument("--i2t-data", type=expanded, help=(
        "conversations for L_i2t, LLaVA's .json or .jsonl; shapes: the toy world's. Paper: "
        "LLaVA-1.5's 665K"))
    group.add_argument("--i2t-images", type=expanded, help=(
        "folder of their images (default: the folder of the file)"))
    group.add_argument("--self-captions", type=at_least(1), help=(
        "without --i2t-data: how many images the model describes before the training, as the "
        "targets of L_i2t. Ours, not in the paper (default 1024; tiny models 128)"))
    group.add_argument("--captions", type=expanded, help=(
        "captions for L_t2i, a .jsonl of {image, caption}; of the toy world: full, sparse. Paper: "
        "none; its SFT baseline is this with --lambda-recon 0"))
    group.add_argument("--cache", type=expanded, help=(
        "folder in which the frozen parts' results for an image are kept. The crop of an image is "
        "then the same in every epoch"))
    group.add_argument("--workers", type=at_least(0, 256), help=(
        "processes that decode images (default: by the number of cores)"))


def add_hardware_flags(parser):
    group = parser.add_argument_group(
        "memory and speed", "The paper: one A100 of 80 GB; BAGEL six.")
    group.add_argument("--micro-batch", type=micro_batch, help=(
        "images that go through the model at once on one GPU; auto (default): what fits, found "
        "before the training. Changes memory and speed, not the result (but for dropout's draws)"))
    group.add_argument("--optimizer", choices=("auto", "fp32", "bf16"), default="auto", help=(
        "fp32: float32 weights and AdamW, 16 bytes a weight; bf16: weights and moments in bf16, "
        "rounded stochastically, 8 bytes a weight; auto: fp32 where it fits. Paper: AdamW"))
    group.add_argument("--precision", choices=("bf16", "fp32"), help=(
        "bf16: autocast (default on a GPU); fp32 (default on a CPU)"))
    group.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help=(
        "compute activations again in the backward pass: a tenth of the memory, about a third more "
        "time (default: on a GPU)"))
    group.add_argument("--compile", action="store_true", help=(
        "torch.compile the repeated blocks"))


def add_ablation_flags(parser):
    group = parser.add_argument_group("the paper's ablations")
    group.add_argument("--und-size", type=at_least(1, 4096), help=(
        "side of the image that the understanding side is shown. Paper, section 2.2: the smallest "
        "that the encoder accepts; default: see the docstring of the script"))
    group.add_argument("--blur", type=at_least(1), help=(
        "shrink that image by this factor and enlarge it again. Paper, appendix F.2; default: not"))
    group.add_argument("--templates", choices=("all", "one"), default="all", help=(
        "the instructions behind the embeddings: all 360 (paper, appendix C.2), or the one from "
        "which they derive"))


def add_inference_flags(parser):
    group = parser.add_argument_group(
        "inference", "After the training; without training where --steps is 0.")
    group.add_argument("--generate", type=expanded, help=(
        "prompts: a .txt, GenEval's .jsonl, the .json of WISE or T2I-CompBench, or DPG-Bench's "
        "folder of .txt"))
    group.add_argument("--images", type=at_least(1, 10_000), default=1, help=(
        "images of a prompt. Paper: 12 in the rows with a star; GenEval itself: 4"))
    group.add_argument("--reconstruct", type=expanded, help=(
        "folder of images, painted again from the model's understanding embeddings of them"))
    group.add_argument("--describe", type=expanded, help=(
        "folder of images, or a file of questions (.json, .jsonl)"))
    group.add_argument("--question", default=SEED_TEMPLATE, help=(
        "asked of each image of a --describe folder"))
    group.add_argument("--max-new-tokens", type=at_least(1, 100_000), default=256, help=(
        "of a description"))

    group.add_argument("--guidance-scale", type=number(0), help=(
        "of the sampler; 1: none. Not given: the original's"))
    group.add_argument("--sampling-steps", type=at_least(1, 1000), help=(
        "of the sampler. Not given: the original's"))
    group.add_argument("--batch-images", type=at_least(1), help=(
        "images that are made at once (default: 32 on a GPU, BAGEL 8; 8 on a CPU)"))
    group.add_argument("--quantize", choices=("int8",), help=(
        "keep the weights of linear layers (not heads) in int8: half the memory of bf16, slower; "
        "only with --steps 0"))


# ---- parsing -------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see python {self.prog} --help)")


def parse_args(description, recipes, default, argv=None, extend=None):
    """The command line of a script -> a Namespace in which every flag has its value.

    description  the script's docstring, see help_text
    recipes      {name of a model: Recipe}. What the command line does not give comes from the run
                 that is resumed, or, in a new run, from the recipe of the chosen model.
    default      the model where --model is not given
    argv         the flags as a list of strings, or None: those of this process
    extend       function(parser) that adds the flags that only one architecture has

    InputError for a flag that is unknown or malformed, and for flags that contradict each other.
    """
    print_anything()
    parser = make_parser(description, recipes, default, extend)
    args = parser.parse_args(argv)

    # Without --steps the recipe's steps count: that is training.
    if args.quantize and (args.steps != 0 or args.resume or args.bench):
        raise InputError(
            "--quantize is for inference: give --steps 0, and neither --resume nor --bench "
            "(a run's checkpoint is --model OUT/checkpoint-NUMBER)")
    if not args.out:
        args.out = f"out/{Path(sys.argv[0]).stem}-{Path(args.model).name}"
    if args.resume and not args.bench:
        check_out(args)
        reconcile(args, given_flags(parser, argv, args))
    if args.captions and args.lambda_t2i is None:
        args.lambda_t2i = 1.0

    check_model(args.model, list(recipes))
    fill_in(args, recipes.get(args.model, recipes[default]))
    check_args(args)
    return args


def make_parser(description, recipes, default, extend):
    """The parser of a script. The defaults of the default model's recipe are added to the help."""
    parser = Parser(
        description=help_text(description),
        usage="python %(prog)s [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--model", type=expanded, default=default, help=(
        f"{', '.join(recipes)}; or a hub id, a file, a folder (of a run: its newest checkpoint). "
        "-reca: what the authors have trained"))
    add_flags_of_a_run(parser)
    add_training_flags(parser)
    add_data_flags(parser)
    add_hardware_flags(parser)
    add_ablation_flags(parser)
    add_inference_flags(parser)

    recipe = vars(recipes[default])
    for action in parser._actions:
        value = recipe.get(action.dest, action.default)
        unknown = value is None or value is False or value == argparse.SUPPRESS
        if not unknown and "(default" not in action.help:
            action.help += f" (default {value})"
    if extend is not None:
        extend(parser)
    return parser


def help_text(docstring):
    """What --help shows of a script's docstring: its first paragraph and its command lines."""
    first_paragraph, _, rest = docstring.strip().partition("\n\n")
    commands = []
    for line in rest.splitlines():
        if line.startswith(" ") and line.strip().startswith(("python ", "torchrun ")):
            commands.append(line)
    return "\n".join([first_paragraph, "", *commands]).strip()


def given_flags(parser, argv, args):
    """{flag: value} of the flags that the command line gives, without those that have defaults."""
    unset = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    values = vars(parser.parse_args(argv, namespace))
    return {name: value for name, value in values.items() if value is not unset}


def fill_in(args, recipe):
    """Values for the flags that nobody has given: the recipe's, and those that fit this machine."""
    for name, value in vars(recipe).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)

    on_gpu = torch.cuda.is_available()
    if args.precision is None:
        args.precision = "bf16" if on_gpu else "fp32"
    if args.checkpointing is None:
        args.checkpointing = on_gpu
    if args.batch_images is None:
        args.batch_images = 32 if on_gpu else 8

    # A tiny model has seen all that there is to say in its world after a few images.
    if args.self_captions is None:
        args.self_captions = 128 if args.model in TOYS else 1024

    # A toy draws its own data, in this process.
    if not args.data and args.model in TOYS:
        args.data = "shapes"
    if args.workers is None:
        cores = (os.cpu_count() or 1) // launched_ranks()
        args.workers = 0 if args.data == "shapes" else min(8, max(1, cores - 1))


def check_args(args):
    """InputError where flags contradict each other, or one is missing."""
    trains = args.steps > 0 and not args.bench
    ranks = launched_ranks()
    nothing_weighs = not (args.lambda_recon or args.lambda_i2t or args.lambda_t2i)

    if nothing_weighs and (trains or args.bench):
        raise InputError(
            "all three λ are 0: nothing would be trained; --steps 0 for inference alone")
    if args.lambda_t2i and not args.captions:
        raise InputError("--lambda-t2i needs --captions FILE")
    if trains and args.steps < args.accum:
        raise InputError(
            f"--steps {args.steps} is less than --accum {args.accum}: the weights would never move")
    if args.steps and args.batch < ranks:
        raise InputError(
            f"--batch {args.batch} is less than the {ranks} processes: one would have no image")
    if args.optimizer == "bf16" and args.precision != "bf16":
        raise InputError("--optimizer bf16 needs --precision bf16")
    if trains and not args.data:
        raise InputError(
            "--data is missing: a folder of images (--model tiny draws its own, --steps 0 needs "
            "none)")


# The scripts' own small models, trained on the toy world. Only these exact names mean them: a
# folder called tiny-b is a folder, and so is ./tiny.
TOYS = ("tiny", "tiny-vq")


def build_examples(args):
    """The data of the losses whose λ is not 0 -> {"recon": rows, ...} (section 5).

    Where L_i2t has no data, "recon" is there for complete_examples, which has its images described.
    InputError for files that are missing or malformed.
    """
    toy = args.data == "shapes"
    rows = {}
    if args.lambda_recon or (args.lambda_i2t and not args.i2t_data):
        rows["recon"] = Shapes(seed=args.seed) if toy else image_examples(args.data, args.out)

    if args.lambda_i2t and args.i2t_data == "shapes":
        rows["i2t"] = Shapes(seed=args.seed, captions=1.0, dialogue=True)
    elif args.lambda_i2t and args.i2t_data:
        rows["i2t"] = conversation_examples(args.i2t_data, args.i2t_images)

    if args.lambda_t2i:
        if toy and args.captions in TOY_CAPTIONS:
            rows["t2i"] = Shapes(seed=args.seed, captions=TOY_CAPTIONS[args.captions])
        else:
            rows["t2i"] = caption_examples(args.captions)
    return rows


# ---- run.json, and going on with a run -----------------------------------------------------------


def past_runs(out):
    """What out/run.json says of the runs in this folder, oldest first; [] where there were none.
    InputError where it cannot be read."""
    path = Path(out) / "run.json"
    if not path.is_file():
        return []
    latest = read_object(path)
    return [*latest.pop("history", []), latest]


def last_training(out):
    """What run.json says of the last run in `out` that trained, or {}. (Runs that only used the
    model may have followed.)"""
    trained = [run for run in past_runs(out) if run.get("arguments", {}).get("steps")]
    return trained[-1] if trained else {}


def record_run(args, device, again=False):
    """Writes out/run.json: arguments, versions and device of this run, and as its history those of
    the runs before it. again: replaces this run's own record, once --optimizer auto and
    --micro-batch auto are decided."""
    if world()[0] != 0:
        return

    history = past_runs(args.out)
    if again:
        history.pop()
    versions = {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "diffusers": importlib.metadata.version("diffusers"),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    write(Path(args.out) / "run.json", {
        "script": Path(sys.argv[0]).stem,
        "arguments": vars(args),
        "versions": versions,
        "device": str(device),
        "history": history,
    })


# What a run that is resumed keeps as it began, and why another value would be another run.
FIXED = {
    "model": "the checkpoint is its model",
    "seed": "the order of the images and all draws follow from it",
    "optimizer": "the checkpoint holds its state",
    "self_captions": "the model has described its images before RecA changed it",
}
# What belongs to a single start of a run, and is never taken over.
OF_A_START = ("out", "resume", "bench", "workers")


def reconcile(args, given):
    """--resume: sets in `args` what the command line does not give to what the run in --out had.

    given: {flag: value} of what it does give. Where that differs from what the run had, it counts
    from here on and a line says so; InputError where it cannot be changed.
    """
    run = last_training(args.out)
    if not run:
        say(f"--resume: {args.out}/run.json does not say how the run was started; the command line "
            "alone counts")
        return

    script = Path(sys.argv[0]).stem
    begun = run.get("script", script)
    if begun != script and begun.startswith("reca_") and script.startswith("reca_"):
        raise InputError(f"{args.out} is a run of {begun}.py: go on with that")

    changed = []
    for name, before in run["arguments"].items():
        if name in OF_A_START or not hasattr(args, name):
            continue
        if name not in given:
            # --captions that the run did not have switch L_t2i on, as they do at a start.
            if name != "lambda_t2i" or "captions" not in given:
                setattr(args, name, before)
            continue
        if given[name] == before:
            continue

        flag = f"--{name.replace('_', '-')} {given[name]}"
        if name in FIXED and before not in (None, "auto"):
            raise InputError(
                f"{flag}: the run in {args.out} has {before}, and {FIXED[name]}; leave it out, or "
                "choose another --out")
        changed.append(f"{flag} instead of {before}")
    if changed:
        say(f"from here on: {', '.join(changed)}")


def check_out(args):
    """InputError where --out or --cache cannot take what is asked for, before anything is made."""
    folders = {"--out": Path(args.out)}
    if args.cache:
        folders["--cache"] = Path(args.cache)
    for flag, folder in folders.items():
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise InputError(f"{flag} {folder}: {path} is a file; give a folder")

    out = Path(args.out)
    checkpoints = own_checkpoints(out)
    if args.resume and not checkpoints:
        raise InputError(f"nothing to resume: no checkpoint in {out}")
    if not args.steps:
        return

    # A toy's run may be made again, but only that: not a run of another model in the same folder.
    before = last_training(out).get("arguments", {})
    again = args.model in TOYS and before.get("model") == args.model
    if checkpoints and not args.resume and not again:
        raise InputError(
            f"{out} holds a run already: add --resume to go on with it, or choose another --out")

    # Checkpoints that this run will write would replace these.
    named = named_checkpoints(out)
    if args.resume:
        named = named[named.index(checkpoints[-1]):]
    for path in named:
        if path not in checkpoints:
            raise InputError(
                f"{path} is in the way: it has a checkpoint's name, but no trainer.pt of this run; "
                "move it, or choose another --out")


# --------------------------------------------------------------------------------------------------
# What follows is not needed to understand RecA: memory, inference on files, timing, a toy world.
# --------------------------------------------------------------------------------------------------


# ==== 8. Memory and speed =========================================================================


CPU_MICRO_BATCH = 32    # of --micro-batch auto without a GPU: fits for any tiny model
SPARE_BYTES = 4e9       # what auto leaves free: fragmentation, workspaces of kernels, previews


def set_up_training(model, streams, args, prepare, trainer_class, show=None):
    """The trainer, with an optimizer and micro-batches that fit into memory.

    What --optimizer auto and --micro-batch auto take stands in `args` from then on, for run.json
    and a resume, and is printed. InputError where not even one image fits.
    """
    on_gpu = model.device.type == "cuda"
    sharded = trainer_class.sharded and world()[1] > 1
    automatic = args.optimizer == "auto"
    if automatic:
        args.optimizer = "fp32" if not on_gpu or float32_fits(model, sharded) else "bf16"

    # In this order: prepare may shard the weights, and what is sharded cannot change its type.
    if args.optimizer == "bf16":
        lower_precision(model)
    options = prepare(model, args)
    checkpoint_blocks(model, args)
    optimizer = make_optimizer(model, args, low_precision=args.optimizer == "bf16")
    trainer = trainer_class(model, streams, args, show, optimizer, **options)

    reason = "no GPU: a constant"
    if args.micro_batch is not None:
        reason = "given"
    elif on_gpu:
        model.train()
        trainer.micro_batch, reason = fit_micro_batches(trainer)

        # float32 weights fit, but no image beside them.
        fits = all(trainer.micro_batch.values())
        if not fits and automatic and args.optimizer == "fp32" and not sharded:
            args.optimizer = "bf16"
            lower_precision(model)
            optimizer = make_optimizer(model, args, low_precision=True)
            trainer = trainer_class(model, streams, args, show, optimizer, **options)
            trainer.micro_batch, reason = fit_micro_batches(trainer)
            fits = all(trainer.micro_batch.values())
        if not fits:
            raise InputError(f"one image at a time does not fit into this GPU's memory: {reason}")
    args.micro_batch = trainer.micro_batch

    weights = "float32 weights and AdamW (16 bytes a weight)"
    if args.optimizer == "bf16":
        weights = "bf16 weights and moments, stochastic rounding (8 bytes a weight)"
    if sharded:
        weights += f", FSDP2 over {world()[1]} ranks"
    if args.checkpointing:
        weights += ", checkpointing"
    count = sum(parameter.numel() for parameter in trainer.parameters)
    say(f"{count / 1e6:,.1f}M trained weights on {world()[1]} x {model.device.type}: {weights}")
    say(f"micro-batches of {trainer.micro_batch} of {args.batch} images a step ({reason})")
    return trainer


# ---- the size of a micro-batch -------------------------------------------------------------------


def fit_micro_batches(trainer):
    """--micro-batch auto on a GPU -> {name of a loss: how many images fit}, and why, in words.

    Two small micro-batches are measured on the largest inputs that the model can meet. Memory grows
    linearly with their size, so what fits into the memory that is left follows. The size is 0 where
    not even one image fits.
    """
    # All but the first micro-batch of an update find gradients there, which take memory, too. So do
    # the optimizer's moments, which come with the first update and are counted in.
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    room = free_bytes() - bytes_of_missing_moments(trainer) - SPARE_BYTES

    sizes = {}
    reasons = []
    for name in trainer.streams:
        one = worst_case_bytes(trainer, name, 1)
        two = worst_case_bytes(trainer, name, 2)
        sizes[name] = images_that_fit(one, two, room, most=trainer.largest_share())
        reasons.append(f"{sizes[name]} images for {name} (1 takes {one / 1e9:.2f} GB, 2 take "
                       f"{two / 1e9:.2f})")

    trainer.optimizer.zero_grad(set_to_none=True)
    reasons.append(f"{room / 1e9:.1f} GB are left beside weights, gradients, moments and "
                   f"{SPARE_BYTES / 1e9:.0f} GB to spare")
    return agreed(sizes, trainer.model.device), "; ".join(reasons)


def images_that_fit(one, two, room, most):
    """The size of a micro-batch for `room` bytes, if one image takes `one` bytes and two take
    `two`: at most `most`, and 0 where one image does not fit."""
    if one > room:
        return 0
    fits = 1
    if two <= room:
        an_image = max(1, two - one)
        fits = min(most, 1 + int((room - one) // an_image))

    # As even as possible: 24 images of which 20 fit are two times 12.
    passes = math.ceil(most / fits)
    return math.ceil(most / passes)


def worst_case_bytes(trainer, name, count):
    """The peak of memory, above what is held before, of one micro-batch of the `count` largest
    inputs: encoding, loss and backward pass. Infinite where it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    try:
        train_on_worst_case(trainer, name, count)
    except torch.OutOfMemoryError:
        return math.inf
    return torch.cuda.max_memory_allocated() - held


def train_on_worst_case(trainer, name, count):
    """What Trainer.take_step does with one micro-batch, here of the `count` largest inputs."""
    model = trainer.model
    losses = {"recon": model.recon_loss, "i2t": model.i2t_loss, "t2i": model.t2i_loss}
    samples, texts, worst_draws = model.worst_case(name, count)
    with trainer.precision(), torch.no_grad():
        features = model.encode(to_device(samples, model.device), name)
    draws = model.draw(name, features, Rng(0, positions=range(count))) | worst_draws
    with trainer.precision():
        loss = losses[name](features, texts, draws=draws)
    loss.backward()


def bytes_of_missing_moments(trainer):
    """The memory that AdamW's two moments will take, but for those that are there already."""
    present = 0
    for state in trainer.optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value):
                present += value.nbytes
    gradients = sum(parameter.grad.nbytes for parameter in trainer.parameters)
    return max(0, 2 * gradients - present)


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


# ---- the optimizer -------------------------------------------------------------------------------


def float32_fits(model, sharded):
    """Whether float32 AdamW can fit at all. It takes 16 bytes for a trained weight (itself, its
    gradient, two moments) and 2 for a frozen one. sharded: trained weights and blocks are divided
    over all processes."""
    trained = 0
    frozen = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()

    frozen_in_blocks = 0
    for block in model.blocks():
        for parameter in block.parameters():
            if not parameter.requires_grad:
                frozen_in_blocks += parameter.numel()

    shards = world()[1] if sharded else 1
    need = (16 * trained + 2 * frozen_in_blocks) / shards + 2 * (frozen - frozen_in_blocks)
    total = torch.cuda.get_device_properties(model.device).total_memory
    return need + SPARE_BYTES <= total


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
    """AdamW for bf16 weights without float32 masters. It computes in float32 and stores weights and
    moments in bf16, rounded stochastically: 8 bytes for a weight with its gradient and moments,
    where float32 needs 16.

    bf16 keeps 8 bits. Rounding to the nearest loses an update below 1/256 of a weight, at every
    step, and 4e-5 against weights of 0.02 is such an update. Rounding up or down at random, with
    the chance given by what is cut off, is right in the mean. The random numbers follow from (seed,
    update, rank), so that a resumed run draws the same.

    What it costs is noise. After n updates by u of weights whose last bit is worth b, they have
    moved by n u, give or take sqrt(n u b). For BAGEL (u up to 4e-5, 1000 updates) and weights of
    0.02 (b = 1.2e-4) that is a twentieth of the way. For Show-o (5e-7, 5000 updates), which moves a
    weight by a two-hundredth of its last bit, it is a fifth of the way of a weight that always
    moves in one direction, and more than the way of one that moves to and fro: take float32 there
    if it fits.
    """

    AT_ONCE = 2 ** 24       # numbers that are in float32 at a time: their copies stay below 1 GB

    def __init__(self, groups, lr, betas, eps, weight_decay=0.0, seed=0):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "updates": 0}
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

                # Sharded weights are DTensors. Everything here is elementwise, so each rank works
                # on its own part, and on one piece of a large tensor after another.
                pieces = []
                for tensor in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]):
                    if hasattr(tensor, "to_local"):
                        tensor = tensor.to_local()
                    pieces.append(tensor.view(-1).split(self.AT_ONCE))

                if generator is None:
                    key = stable_seed(self.seed, "rounding", group["updates"], world()[0])
                    generator = torch.Generator(pieces[0][0].device).manual_seed(key)
                for weight, grad, m, v in zip(*pieces):
                    self._update(group, generator, weight, grad, m, v)

    def _update(self, group, generator, weight, grad, m, v):
        """One piece of a tensor, all [n]: AdamW's equations in float32."""
        beta1, beta2 = group["betas"]
        n = group["updates"]

        grad = grad.float()
        first = m.float().lerp_(grad, 1 - beta1)
        second = v.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = first / (1 - beta1 ** n) / (second / (1 - beta2 ** n)).sqrt_().add_(group["eps"])
        decay = 1 - group["lr"] * group["weight_decay"]
        new = weight.float().mul_(decay).sub_(step, alpha=group["lr"])

        self._store(weight, new, generator)
        self._store(m, first, generator)
        self._store(v, second, generator)

    @staticmethod
    def _store(target, value, generator):
        """float32 value into target, rounded stochastically where target is bf16. bf16 is the upper
        half of a float32: adding a uniform 16-bit number to the lower half carries into the upper
        one exactly as often as it should."""
        if target.dtype == torch.bfloat16:
            noise = torch.randint(
                1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
            bits = value.contiguous().view(torch.int32) + noise
            value = bits.bitwise_and_(-65536).view(torch.float32)
        target.copy_(value)


# ---- less memory for activations -----------------------------------------------------------------


class HeadCrossEntropy(torch.autograd.Function):
    """See cross_entropy_sum. The gradients are computed as soon as the logits are there, in the
    forward pass, so that no logits are kept for the backward pass or made in it a second time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, at_once):
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight) if wanted[1] else None
        grad_bias = torch.zeros_like(bias) if wanted[2] else None
        total = torch.zeros((), device=hidden.device)

        for begin in range(0, len(labels), at_once):
            part = hidden[begin:begin + at_once]  # [n, D]
            targets = labels[begin:begin + at_once]  # [n]
            logits = F.linear(part, weight, bias)  # [n, V]
            precision = logits.dtype
            logits = logits.float()
            total += F.cross_entropy(logits, targets, reduction="sum")
            if not any(wanted):
                continue

            # d loss / d logits = probabilities - 1 at the target, in the precision of the product.
            slope = logits.softmax(-1)  # [n, V]
            del logits
            slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -1.0))
            slope = slope.to(precision)
            if wanted[0]:
                grad_hidden[begin:begin + at_once] = slope @ weight
            if wanted[1]:
                grad_weight.addmm_(slope.T.to(weight.dtype), part.to(weight.dtype))
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
    """The sum of the cross-entropies of labels [n] under the linear layer head(hidden [n, D]) ->
    scalar, float32.

    The logits, a column for each of up to 150,000 words, would be the largest tensors of a step:
    they are made for `at_once` labels at a time.
    """
    return HeadCrossEntropy.apply(hidden, head.weight, head.bias, labels, at_once)


def checkpoint_blocks(model, args):
    """--checkpointing: in training only the input of each block is kept, and the block is computed
    again in the backward pass."""
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
    """--compile, block by block. What the block computes is compiled, and what wraps it later (see
    checkpoint_blocks) is not: a graph cannot hold a checkpoint that another wrapper calls."""
    # All layers have the same code, and torch compiles it anew for each kind of input: with and
    # without a graph, for one length and for any. Its limit of 8 versions is too few.
    limit = 8 * len(model.blocks())
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = limit
    for block in model.blocks():
        block.forward = torch.compile(block.forward)


# ---- less memory for weights: --quantize ---------------------------------------------------------


def int8_rows(weight):
    """A matrix [out, in] -> int8 [out, in] and a scale for each row, bf16 [out]. Their product is
    nearly the matrix: no number is off by more than half of its row's scale."""
    # bf16 may round a scale down, by less than 1/256. So the largest number of a row becomes less
    # than 127 * 256 / 255, which is below 127.5, and is rounded to 127. Zeros have a scale, too.
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """An nn.Linear for inference in half of bf16's memory: int8, and a scale for each row.

    The weights become floating-point numbers again in every call, and are forgotten after it.
    Integers up to 127 are exact in bf16, and so are the scales: no error is added to int8_rows'
    own. `weight` is int8, so who wants to know in which precision the layer computes asks its bias.
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
    whose names begin with one of model.unquantized; None: nothing happens. It goes layer by layer,
    so that there are never two models in memory."""
    if kind is None:
        return model

    # A subclass of nn.Linear does more than multiply, so it stays.
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        if not name.startswith(model.unquantized):
            model.set_submodule(name, Int8Linear(model.get_submodule(name)))
    return model


# ==== 9. Inference on files =======================================================================


def asked_inference(args):
    """What --generate, --reconstruct and --describe ask for -> {function(model, args, jobs): jobs}.
    InputError for files that are missing or malformed, or in the way."""
    asked = {}
    if args.generate:
        asked[generate_files] = prompt_jobs(args.generate, args.out, args.images)
    if args.reconstruct:
        asked[reconstruct_files] = reconstruct_jobs(args.reconstruct, args.out)
    if args.describe:
        check_answers(args.out)
        asked[describe_files] = questions(args)
    return asked


def sampler_options(args):
    """The sampler's settings that the command line gives. The others are not passed: their defaults
    stand in the model's config. args.sampler: those that only one architecture has."""
    options = {
        "guidance_scale": args.guidance_scale,
        "num_steps": args.sampling_steps,
        **getattr(args, "sampler", {}),
    }
    return {name: value for name, value in options.items() if value is not None}


def in_batches(title, rows, size, same=lambda row: None):
    """Lists of at most `size` rows, with a progress bar. The rows of a list agree in same(row)."""
    groups = {}
    for row in rows:
        groups.setdefault(same(row), []).append(row)

    batches = []
    for group in groups.values():
        for begin in range(0, len(group), size):
            batches.append(group[begin:begin + size])
    return tqdm(batches, desc=title, unit="batch", dynamic_ncols=True)


def what_fits(args, work, *columns):
    """work(*columns) -> its results, one for each row of the columns, which are lists of one length.

    Where so many at once are too much for the GPU's memory, args.batch_images is halved, here and
    for what follows. No result depends on it. OutOfMemoryError where a single row is too much.
    """
    results = []
    while len(results) < len(columns[0]):
        begin = len(results)
        piece = [column[begin:begin + args.batch_images] for column in columns]
        count = len(piece[0])
        try:
            results += work(*piece)
            continue
        except torch.OutOfMemoryError:
            if count == 1:
                raise

        # Here, and not in the except clause: the error would keep alive what was in memory.
        args.batch_images = count // 2
        tqdm.write(f"out of memory with {count} at once: from now on {args.batch_images} "
                   "(--batch-images)")
        torch.cuda.empty_cache()
    return results


def readable(rows):
    """Yields (name, image, ...) for rows (name, source, ...). A row whose image cannot be read is
    left out, and a line names it."""
    for name, source, *more in rows:
        try:
            yield name, load_image(source), *more
        except UNREADABLE as error:
            tqdm.write(f"skipped: {name} ({brief(error)})")


# ---- what an output is made from -----------------------------------------------------------------
# Every picture and every answer says what it was made from: prompt, image, weights, sampler, seed.
# A rerun keeps what was made from the same, makes the rest again, and leaves other files alone.


def origin(model, args, task, **what):
    """What an output of `task` is made from, as JSON holds it. what: prompt, source, seed ..."""
    digest = hashlib.sha256()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        # 64 numbers of each tensor: training moves all of them.
        numbers = weight.detach().flatten()
        numbers = numbers[::max(1, len(numbers) // 64)][:64].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype}".encode() + numbers.tobytes())

    made_from = {
        "task": task,
        "weights": digest.hexdigest()[:16],
        "precision": args.precision,
        "quantize": args.quantize,
        "und_size": args.und_size,
        "blur": args.blur,
        "condition": getattr(args, "condition", None),      # BAGEL's
        **sampler_options(args),
        **what,
    }
    return json.loads(json.dumps(made_from))


def origin_of(path):
    """What a picture says that it was made from, see `write`; None where it says nothing, since the
    user has made it."""
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
                "different names")
        known[path] = name
        if path.exists() and origin_of(path) is None:
            raise InputError(
                f"{path} is in the way, and does not say that it was made here: move it, or choose "
                "another --out")


class Outputs:
    """Pictures that are asked for: some are there, the others are to be made.

    jobs: tuples (path, what it is to be made from, ...), see origin. `todo` are the jobs of which
    the picture is missing or was made from something else; `write` makes one; `report` says how
    many were kept, made, and made again.
    """

    def __init__(self, jobs):
        self.jobs = jobs
        self.todo = []
        self.there = set()
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
        """": 3 kept, 1 made, 2 made again", and how many pictures of other requests lie there."""
        text = ", ".join(f"{self.counts[what]} {what}" for what in ("kept", "made", "made again"))

        paths = {job[0] for job in self.jobs}
        beside = set()
        for folder in {path.parent for path in paths}:
            beside.update(folder.glob("*.png"))
        earlier = 0
        for path in beside - paths:
            made_from = origin_of(path)
            earlier += made_from is not None and "overview" not in made_from
        if earlier:
            text += f"; {earlier} pictures of other requests are there as well"
        return f": {text}"


# ---- --generate ----------------------------------------------------------------------------------


def prompt_jobs(source, out, images):
    """A prompt source -> [(prompt, [paths of its images], GenEval's metadata or None)], in the
    folders that the benchmark's scorer reads:

    FILE.txt    a prompt a line                                 -> out/00000.png, or, with several
                                                                   images, out/00000_0.png ...
    FILE.jsonl  GenEval's evaluation_metadata.jsonl             -> out/00000/metadata.jsonl and
                                                                   out/00000/samples/00000.png ...
    FILE.json   WISE (Prompt, prompt_id)                        -> out/<prompt_id>.png
                T2I-CompBench (Question, Category, Question_id) -> out/<Category>/<Question_id>.png
    FOLDER      DPG-Bench, a prompt a <name>.txt                -> out/<name>.png, a grid of 2 x 2:
                                                                   its path is there four times

    InputError for files that are missing or malformed, or in the way.
    """
    source = Path(source)
    out = Path(out)
    kind = source.suffix.lower()
    if not source.exists():
        raise InputError(f"no such prompt file or folder: {source}")
    if source.is_dir():
        jobs = dpg_jobs(source, out)
    elif kind == ".jsonl":
        jobs = geneval_jobs(source, out, images)
    elif kind == ".json":
        jobs = wise_or_compbench_jobs(source, out)
    else:
        jobs = text_jobs(source, out, images)

    if not jobs or not all(prompt for prompt, _, _ in jobs):
        raise InputError(f"{source}: no prompt, or an empty one")
    outputs = []
    for number, (_, paths, _) in enumerate(jobs, start=1):
        outputs += [(f"prompt {number}", path) for path in dict.fromkeys(paths)]
    check_outputs(outputs, source)
    return jobs


def dpg_jobs(folder, out):
    jobs = []
    for file in sorted(folder.glob("*.txt")):
        if not file.name.startswith("._"):      # a note of macOS's on the file
            jobs.append((read_text(file).strip(), [out / f"{file.stem}.png"] * 4, None))
    return jobs


def geneval_jobs(file, out, images):
    def job(i, row):
        samples = out / f"{i:05d}" / "samples"
        return text_in(row, "prompt"), [samples / f"{k:05d}.png" for k in range(images)], row

    return read_examples(file, "a prompt of GenEval (prompt)", job)


def wise_or_compbench_jobs(file, out):
    def job(_, row):
        if "Question_id" in row:
            name = f"{row.get('Category', '')}/{row['Question_id']}".lstrip("/")
        else:
            name = str(row["prompt_id"]).lstrip("/")
        return text_in(row, "Prompt", "Question"), [inside(out, f"{name}.png")], None

    what = "a prompt (Prompt and prompt_id, or Question and Question_id)"
    return read_examples(file, what, job)


def text_jobs(file, out, images):
    # Not splitlines, which also cuts at U+2028 and its like.
    prompts = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    jobs = []
    for i, prompt in enumerate(prompts):
        names = [f"{i:05d}.png"]
        if images > 1:
            names = [f"{i:05d}_{k}.png" for k in range(images)]
        jobs.append((prompt, [out / name for name in names], None))
    return jobs


def generate_files(model, args, jobs):
    """--generate. Image k of a prompt has the seed --seed + k, whatever its batch."""
    common_origin = origin(model, args, "generate")
    wanted = []
    for prompt, paths, metadata in jobs:
        if metadata:
            write(paths[0].parent.parent / "metadata.jsonl", [metadata])
        for path in dict.fromkeys(paths):
            seeds = [args.seed + k for k, other in enumerate(paths) if other == path]
            wanted.append((path, {**common_origin, "prompt": prompt, "seeds": seeds}))

    outputs = Outputs(wanted)
    rows = []
    for path, made_from in outputs.todo:
        rows += [(path, made_from, seed) for seed in made_from["seeds"]]

    def generate(prompts, seeds):
        return model.generate(prompts, seed=seeds, **sampler_options(args))

    made = {}       # {path: the images of its picture that are there already}
    for batch in in_batches("generate", rows, args.batch_images):
        prompts = [made_from["prompt"] for _, made_from, _ in batch]
        seeds = [seed for _, _, seed in batch]
        painted = what_fits(args, generate, prompts, seeds)

        for (path, made_from, _), image in zip(batch, painted):
            images = made.setdefault(path, [])
            images.append(image)
            if len(images) < len(made_from["seeds"]):
                continue
            picture = images[0]
            if len(images) > 1:     # DPG-Bench wants four in one file, as a square
                picture = grid([images[:2], images[2:]], cell=image.width, gap=0)
            outputs.write(path, picture, made_from)
            del made[path]
    print(f"{outputs.made} images generated for {len(jobs)} prompts in {args.out}"
          f"{outputs.report()}")


# ---- --reconstruct -------------------------------------------------------------------------------


def output_paths(names, out):
    """Names of images -> {name: where in `out` the picture made from it belongs}.

    That is <name without its suffix>.png, or <name>.png where this alone tells two names apart
    (cat.jpg and cat.png) or where a run has a file of its own. InputError where a name leads out of
    the folder.
    """
    short = {name: str(Path(name).with_suffix(".png")) for name in names}
    counts = collections.Counter(short.values())
    paths = {}
    for name in names:
        taken = counts[short[name]] > 1 or short[name] in RUN_PICTURES
        path = inside(out, f"{name}.png" if taken else short[name])
        if len(os.fsencode(path.name)) > 255:       # which is the longest name of most file systems
            start = os.fsencode(path.name)[:200].decode(errors="ignore")
            path = path.with_name(f"{start}-{stable_seed(name):x}.png")
        paths[name] = path
    return paths


def reconstruct_jobs(source, out):
    """--reconstruct -> [(name, source, where its reconstruction belongs)]. InputError where there
    is no image, or a file is in the way."""
    rows = image_examples(source, out)
    paths = output_paths([name for name, *_ in rows], out)
    outputs = [(name, paths[name]) for name, *_ in rows]
    outputs.append(("the overview", Path(out) / OVERVIEW))
    check_outputs(outputs, source)
    return [(name, image, paths[name]) for name, image, _ in rows]


def reconstruct_files(model, args, jobs):
    """--reconstruct: out/<name>.png for each image, painted from nothing but the model's
    understanding of it, and an overview of the first."""
    common_origin = origin(model, args, "reconstruct", seed=args.seed)
    wanted = []
    for name, source, path in jobs:
        made_from = {**common_origin, "source": fingerprint(source)}
        wanted.append((path, made_from, name, source))

    outputs = Outputs(wanted)
    rows = [(name, source, path, made_from) for path, made_from, name, source in outputs.todo]

    def reconstruct(images):
        seeds = [args.seed] * len(images)
        return model.reconstruct(images, seed=seeds, **sampler_options(args))

    for batch in in_batches("reconstruct", rows, args.batch_images):
        batch = list(readable(batch))
        if not batch:
            continue
        images = [row[1] for row in batch]
        painted = what_fits(args, reconstruct, images)
        for (_, _, path, made_from), picture in zip(batch, painted):
            outputs.write(path, picture, made_from)

    if outputs.made:
        shown = [job for job in jobs[:16] if job[2].exists()]
        pairs = []
        for _, image, path in readable(shown):
            pairs.append((image.resize((256, 256)), load_image(path)))
        if pairs:
            sheet = grid(pairs, titles=("input", "reconstruction"))
            write(Path(args.out) / OVERVIEW, sheet, {"overview": True})
    print(f"{outputs.made} images reconstructed in {args.out}{outputs.report()}")


# ---- --describe ----------------------------------------------------------------------------------


def questions(args):
    """--describe -> rows (question_id, source, question, name of the image).

    Of a folder: --question for each image. Of a question file (.json, .jsonl: question_id, image,
    text): its rows; the images lie beside it or in --i2t-images. InputError for files that are
    missing or malformed.
    """
    source = Path(args.describe)
    if source.is_dir():
        rows = image_examples(source, args.out)
        return [(name, image, args.question, Path(name).name) for name, image, _ in rows]
    if not source.exists():
        raise InputError(f"no such folder or question file: {source}")

    folder = Path(args.i2t_images or source.parent)

    def read(i, row):
        key = row.get("question_id", row.get("id", i))
        image = row["image"]
        return key, folder / image, text_in(row, "text", "question"), Path(image).name

    return read_examples(source, "a question (image, text)", read)


def answers(model, args, rows, title):
    """Yields (row, the model's answer) for rows (name, source, question, ...)."""
    for batch in in_batches(title, rows, args.batch_images, same=lambda row: row[2]):
        batch = list(readable(batch))
        if not batch:
            continue
        images = [row[1] for row in batch]
        options = {"question": batch[0][2], "max_new_tokens": args.max_new_tokens}
        texts = what_fits(args, functools.partial(model.describe, **options), images)
        yield from zip(batch, texts)


def check_answers(out):
    """InputError where out/answers.jsonl is not ours to go on with."""
    path = Path(out) / "answers.jsonl"
    keys = {"question_id", "image", "question", "answer", "made_from"}
    if path.exists() and not all(keys <= row.keys() for row in read_intact_lines(path)):
        raise InputError(
            f"{path} is in the way, and does not say what it was made from: move it, or choose "
            "another --out")


def describe_files(model, args, rows):
    """--describe: out/answers.jsonl, a line {"question_id", "image", "question", "answer",
    "made_from"} for each question. Answers that were made from the same are kept."""
    # Benchmarks have several questions of one id, so question and image belong to a row's key.
    common_origin = origin(model, args, "describe", max_new_tokens=args.max_new_tokens)
    wanted = {}
    for question_id, source, question, image in rows:
        made_from = json.dumps({**common_origin, "source": fingerprint(source)}, sort_keys=True)
        digest = hashlib.sha256(made_from.encode()).hexdigest()[:16]
        wanted[answer_key(question_id, image, question)] = digest

    def key_of(row):
        return answer_key(row["question_id"], row["image"], row["question"])

    def is_kept(row):
        # Of this request what was made from the same, and all of other requests.
        return wanted.get(key_of(row)) in (None, row["made_from"])

    path = Path(args.out) / "answers.jsonl"
    before = {key_of(row) for row in read_intact_lines(path)}
    done = {key_of(row) for row in mend_jsonl(path, is_kept)}
    todo = [row for row in rows if answer_key(row[0], row[3], row[2]) not in done]

    count = 0
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        for (question_id, _, question, image), answer in answers(model, args, todo, "describe"):
            row = {"question_id": question_id, "image": image, "question": question,
                   "answer": answer}
            file.write(json.dumps({**row, "made_from": wanted[key_of(row)]}) + "\n")
            count += 1

    kept = len(done & wanted.keys())
    again = min(count, len((before - done) & wanted.keys()))
    others = len(done - wanted.keys())
    aside = f"; {others} of other requests are there as well" if others else ""
    print(f"{count} answers in {path}: {kept} kept, {count - again} made, {again} made again"
          f"{aside}")


def answer_key(question_id, image, question):
    """What identifies an answer, as one string."""
    return json.dumps([question_id, image, question])


# ---- descriptions as data of L_i2t ---------------------------------------------------------------


def describe_first(model, args, rows, path):
    """The rows of L_i2t where there is no data for it (--i2t-data): before the training the model
    describes --self-captions of its own images, and is held to these descriptions.

    Our addition, not the paper's, which has the 665K conversations of LLaVA-1.5. It is a
    distillation of the model into itself: understanding cannot drift away while generation learns.
    The descriptions are kept in `path`: a run that is resumed must not ask the model that RecA has
    changed.
    """
    if not path.exists() and world()[0] == 0:
        rng = np.random.default_rng(stable_seed("describe", len(rows)))
        order = rng.permutation(len(rows))[:args.self_captions].tolist()
        print(f"L_i2t has no data (--i2t-data): the model describes {len(order)} of its training "
              f"images first, and is held to that ({path}). This is our addition; real data or "
              "--lambda-i2t 0 are the alternatives.")

        asked = []
        for i in order:
            name, source, _ = rows[i]
            asked.append((name, source, args.question))
        descriptions = []
        for (name, _, question), answer in answers(model, args, asked, "targets of L_i2t"):
            if answer.strip():
                descriptions.append({"name": name, "question": question, "answer": answer})
        if not descriptions:
            raise InputError(
                "the model describes none of the images: give --i2t-data, or --lambda-i2t 0")
        write(path, descriptions)
    if dist.is_initialized():
        dist.barrier()
    return described_examples(rows, path)


def described_examples(rows, path):
    """The rows of L_i2t from the descriptions in `path`, which describe_first has written.

    Images are found by their names, since files may have come or gone. Descriptions of images that
    are not there are left out, and a line says so; InputError where none is left.
    """
    conversations = {}
    for row in read_json(path, lines=True):
        try:
            conversations[row["name"]] = [(row["question"], row["answer"])]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} does not hold this model's descriptions (name, question, answer)"
            ) from error

    found = []
    if isinstance(rows, Shapes):
        # Not by a search: each of its images would be drawn for it.
        for name in conversations:
            if name.startswith("shapes "):
                number = int(name.removeprefix("shapes "))
                found.append((name, rows[number][1]))
    else:
        for name, source, _ in rows:
            if name in conversations:
                found.append((name, source))

    if not found:
        raise InputError(
            f"{path} describes none of the images of --data: give back the folder of this run, or "
            "--i2t-data")
    missing = len(conversations) - len(found)
    if missing > 0:
        say(f"{path}: {missing} of {len(conversations)} descriptions are of images that are not "
            "there now: left out")
    return [(name, source, conversations[name]) for name, source in found]


# ==== 10. How fast is this card? ==================================================================


# The dense bf16 peak of common GPUs in FLOP/s, from their makers' data sheets.
PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
    "3090": 71e12,
}


def bench(model_class, args, device, prepare, trainer_class):
    """--bench: steps at full size, with random weights on random images. Prints and returns
    {figure: value}. The arguments are those of `run`, and the device.

    Time and peak of memory are those of whole updates after the first one: moments and gradients
    are there, as in training. MFU (model FLOPs utilisation) is what the arithmetic of a step needs
    per second, without recomputation, over the GPU's dense bf16 peak.
    """
    model = model_class.random(args.model, device)
    if args.und_size or args.blur:
        model.set_und(size=args.und_size, blur=args.blur)
    if args.compile:
        compile_blocks(model)
    model.train()

    streams = random_streams(model, args)
    trainer = set_up_training(model, streams, args, prepare, trainer_class)
    batch = args.batch
    accum = args.accum
    flops = flops_of_an_image(trainer) * batch
    seconds, peak_memory = measure_steps(trainer, batch, accum)

    card = "CPU"
    if device.type == "cuda":
        card = torch.cuda.get_device_name()
    mfu = None
    for name, peak in PEAK.items():
        if name in card:
            mfu = round(flops / seconds / peak / world()[1], 4)
            break

    figures = {
        "model": args.model,
        "device": card,
        "batch": batch,
        "accum": accum,
        "micro_batch": args.micro_batch,
        "optimizer": args.optimizer,
        "losses": list(streams),
        "compile": args.compile,
        "checkpointing": args.checkpointing,
        "step_s": round(seconds, 4),
        "images_per_s": round(batch / seconds, 3),
        "tflops_per_step": round(flops / 1e12, 3),
        "mfu": mfu,
        "peak_memory_gb": round(peak_memory / 1e9, 3),
        "trainable_parameters": sum(p.numel() for p in trainer.parameters),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    say(json.dumps(figures))
    return figures


def random_streams(model, args):
    """{name: Stream} for each loss whose λ is not 0: a picture as large as training can meet, and
    an answer of the length that LLaVA's have."""
    rng = np.random.default_rng(0)
    size = model.config.image_size
    picture = Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8))
    words = " ".join(rng.choice([*SHAPES, *COLORS, *PLACES], 80).tolist())

    texts = {"recon": SEED_TEMPLATE, "i2t": [(SEED_TEMPLATE, words)], "t2i": words}
    weights = {"recon": args.lambda_recon, "i2t": args.lambda_i2t, "t2i": args.lambda_t2i}
    streams = {}
    for name in LOSSES:
        if weights[name]:
            rows = [("random", picture, texts[name])]
            streams[name] = Stream(name, rows, model.preprocess, args.seed)
    return streams


def bench_step(trainer, batch, accum):
    """One step of `batch` images of each loss, `accum` steps to an update."""
    trainer.args.batch = batch
    trainer.args.accum = accum
    loaders = {}
    for name, stream in trainer.streams.items():
        items = [stream[position] for position in range(*own_share(batch))]
        loaders[name] = iter([items])
    trainer.take_step(loaders)


def flops_of_an_image(trainer):
    """What the arithmetic needs: the FLOPs that torch counts in a step with one image of each loss,
    without recomputation and without an update."""
    from torch.utils.flop_counter import FlopCounterMode

    checkpointing = trainer.args.checkpointing
    trainer.args.checkpointing = False
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        bench_step(trainer, batch=world()[1], accum=10 ** 9)
    trainer.args.checkpointing = checkpointing
    trainer.pending = 0
    return counter.get_total_flops()


def convolution_backward_flops(
        grad_shape, x_shape, weight_shape, bias, stride, padding, dilation, transposed,
        output_padding, groups, wanted, out_shape=None, **_):
    """torch's own formula forgets the groups in the weights' gradient: SANA's depthwise
    convolutions would count a thousandfold. The weights are [out, in / groups, ...]: each meets
    every output place once."""
    places = x_shape if transposed else grad_shape
    once = 2 * math.prod(weight_shape) * places[0] * math.prod(places[2:])
    return once * (bool(wanted[0]) + bool(wanted[1]))


def measure_steps(trainer, batch, accum):
    """(seconds of a step, bytes at the peak of memory), over whole updates, four steps at least."""
    on_gpu = trainer.model.device.type == "cuda"

    # The first update makes the optimizer's moments.
    bench_step(trainer, batch, accum=1)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    steps = accum * math.ceil(4 / accum)
    began = time.perf_counter()
    for _ in tqdm(range(steps), desc="bench", unit="step", dynamic_ncols=True):
        bench_step(trainer, batch, accum)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps

    if on_gpu:
        return seconds, torch.cuda.max_memory_allocated()
    import resource
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ==== 11. The toy world ===========================================================================
# A picture has 2 x 2 cells. 1 to 3 of them hold a shape, no shape twice, in one of 8 colors.
# Everything in a picture can be said in words. Every picture can be read back exactly, by comparing
# each cell with the 32 things that it could hold: what a benchmark's detector estimates at full
# size is known here without error.


SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "cyan": (60, 200, 220),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
}
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")

# --captions: how often a caption names color and place. The sparse ones are those that, as the
# paper says, generation has learned from.
TOY_CAPTIONS = {"full": 1.0, "sparse": 0.1}


# ---- scenes, pictures, captions ------------------------------------------------------------------


@functools.lru_cache(None)
def _cell(size):
    """All things that a cell can hold, drawn -> float32 [1 + 32, size, size, 3] in [0, 255]. Number
    0 is the empty cell, number 1 + 8 * shape + color the others."""
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    masks = (
        x * x + y * y < 0.56,
        np.maximum(abs(x), abs(y)) < 0.68,
        (y < 0.7) & (y > 2 * abs(x) - 0.75),
        (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 0.75),
    )
    things = [np.full((size, size, 3), 255.0)]
    for mask in masks:
        for color in COLORS.values():
            things.append(np.where(mask[..., None], color, 255.0))
    return np.stack(things).astype(np.float32)


def random_scene(rng, objects=None):
    """A list of (place, shape, color), indices, in the order of the places. objects: how many
    (default 1 to 3)."""
    objects = objects or int(rng.integers(1, 4))
    places = sorted(rng.choice(4, objects, replace=False).tolist())
    shapes = rng.choice(4, objects, replace=False).tolist()
    colors = rng.integers(8, size=objects).tolist()
    return list(zip(places, shapes, colors))


def draw_scene(scene, size=64):
    """-> PIL RGB size x size (size is even)."""
    half = size // 2
    # [row of cells, y in the cell, column of cells, x in the cell, RGB]
    canvas = np.full((2, half, 2, half, 3), 255, np.uint8)
    for place, shape, color in scene:
        canvas[place // 2, :, place % 2] = _cell(half)[1 + 8 * shape + color]
    return Image.fromarray(canvas.reshape(size, size, 3))


def read_scene(image):
    """PIL -> the scene that it shows. (place, None, None) stands for a cell that resembles nothing:
    its root mean square distance from everything is above 0.2."""
    half = image.width // 2
    pixels = np.asarray(image.convert("RGB").resize((2 * half, 2 * half)), np.float32)
    pixels = pixels.reshape(2, half, 2, half, 3)

    scene = []
    for place in range(4):
        difference = _cell(half) - pixels[place // 2, :, place % 2]
        distance = np.sqrt((difference ** 2).mean((1, 2, 3))) / 255
        best = int(distance.argmin())
        if distance[best] > 0.2:
            scene.append((place, None, None))
        elif best > 0:
            shape, color = divmod(best - 1, 8)
            scene.append((place, shape, color))
    return scene


def caption(scene, p=1.0, rng=None):
    """The scene in words: "red circle top-left and ...". p < 1: color and place are named with
    probability p each (rng needed); such captions are sparse, as the paper says of real ones."""
    def is_named():
        return p >= 1 or rng.random() < p

    objects = []
    for place, shape, color in scene:
        words = [SHAPES[shape]]
        if is_named():
            words.insert(0, list(COLORS)[color])
        if is_named():
            words.append(PLACES[place])
        objects.append(" ".join(words))
    return " and ".join(objects)


class Shapes:
    """Rows of the toy world, drawn when asked for: `count` scenes that follow from `seed`.
    captions: None, or the p of caption(); dialogue: the caption is the answer of a conversation."""

    def __init__(self, size=64, count=20000, seed=0, captions=None, dialogue=False):
        self.size = size
        self.count = count
        self.seed = seed
        self.captions = captions
        self.dialogue = dialogue

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        scene = random_scene(rng)
        text = None
        if self.captions is not None:
            text = caption(scene, self.captions, rng)
        if self.dialogue:
            text = [(SEED_TEMPLATE, text)]
        return f"shapes {i}", draw_scene(scene, self.size), text


# ---- scores --------------------------------------------------------------------------------------


# GenEval's tasks: how many objects a prompt has, and what of them must be in the picture. The
# fields of a scene's object are 0 place, 1 shape, 2 color.
TOY_TASKS = {
    "single_object": (1, [1]),
    "two_object": (2, [1]),
    "colors": (1, [1, 2]),
    "position": (2, [0, 1]),
    "color_attribution": (2, [1, 2]),
}


def score_generations(scenes, images):
    """GenEval's questions, asked of pictures that were made from full captions of `scenes` ->
    {task: fraction of the pictures that are right}, and their mean as "overall"."""
    pairs = [(scene, read_scene(image)) for scene, image in zip(scenes, images)]

    def details(scene, fields):
        objects = set()
        for thing in scene:
            objects.add(tuple(thing[field] for field in fields))
        return objects

    scores = {}
    for task, (objects, fields) in TOY_TASKS.items():
        hits = []
        for scene, seen in pairs:
            if len(scene) == objects:
                hits.append(details(scene, fields) <= details(seen, fields))
        scores[task] = sum(hits) / max(1, len(hits))
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def objects_in_words(description):
    """A description -> the set of the objects that it names, "red circle top-left" each."""
    parts = description.lower().strip(" .").split(" and ")
    return {" ".join(part.split()) for part in parts}


def score_toy(model, size, count, seed, options):
    """The scores of score_generations on `count` held-out scenes, and two more, fractions of
    images:

    reconstruction   every shape, color and place comes back, from the model's own understanding
                     embeddings of the image
    understanding    the model describes the image rightly and wholly

    size: side of the pictures; options: of the sampler.
    """
    rng = np.random.default_rng((seed, 999_999))    # no training scene has this generator
    scenes = [random_scene(rng) for _ in range(count)]
    images = [draw_scene(scene, size) for scene in scenes]
    seeds = list(range(seed * 1000, seed * 1000 + count))

    painted = model.reconstruct(images, seed=seeds, **options)
    same = [read_scene(picture) == scene for scene, picture in zip(scenes, painted)]

    descriptions = model.describe(images, question=SEED_TEMPLATE, max_new_tokens=24)
    right = []
    for scene, description in zip(scenes, descriptions):
        right.append(objects_in_words(description) == objects_in_words(caption(scene)))

    prompts = [random_scene(rng, 1 + k % 2) for k in range(count)]
    captions = [caption(scene) for scene in prompts]
    generated = model.generate(captions, seed=seeds, **options)
    return {
        "reconstruction": sum(same) / count,
        "understanding": sum(right) / count,
        **score_generations(prompts, generated),
    }


# ---- what a run has changed ----------------------------------------------------------------------


class ToyEffect:
    """What a run on the toy world changes: out/scores.json and out/effect.png, made from pictures
    of the model before and after it."""

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.out = Path(args.out)
        self.captions = [caption(scene) for scene in effect_scenes()]
        self.files = []         # what the captions gave before RecA, for a resumed run
        for k in range(len(self.captions)):
            self.files.append(self.out / "previews" / f"told_before_{k}.png")

    def paint(self):
        """The captions, painted by the model as it is now."""
        seeds = list(range(len(self.captions)))
        with inference(self.model, self.args):
            return self.model.generate(self.captions, seed=seeds, **sampler_options(self.args))

    def score(self, when):
        """Scores the model as it is now, and adds that to out/scores.json under `when`. Returns
        what the file holds, {"before": {name: score}, "after": ...}."""
        path = self.out / "scores.json"
        scores = read_object(path) if path.exists() else {}
        count = 128
        say(f"scores {when}: {count} held-out scenes are painted from their images, {count} from "
            "words")
        with inference(self.model, self.args):
            size = self.model.config.image_size
            scores[when] = score_toy(self.model, size, count, 7, sampler_options(self.args))
        write(path, scores)
        return scores

    def measure_before(self):
        for path, picture in zip(self.files, self.paint()):
            write(path, picture)
        self.score("before")

    def measure_after(self, previews):
        """Prints the scores before and after, and writes effect.png. previews: a Previews."""
        scores = self.score("after")
        before = scores.get("before", {})
        print(f"\n{'on held-out scenes':<22}{'before':>8}{'after':>8}")
        for name, after in scores["after"].items():
            print(f"{name:<22}{before.get(name, math.nan):>8.2f}{after:>8.2f}")
        if before and self.args.lambda_recon and not self.args.lambda_t2i:
            print(effect_sentence(before, scores["after"]))

        if previews.before and all(path.is_file() for path in self.files):
            pictures = [load_image(path) for path in self.files]
            asked = list(zip(self.captions, pictures, self.paint()))
            shown = list(zip(previews.images, previews.before, previews.paint()))
            write(self.out / "effect.png", effect_picture(asked, shown))


def effect_scenes(count=6):
    """Held-out scenes whose captions effect.png paints: half with one object, half with two. (This
    seed's six scenes show all colors.)"""
    rng = np.random.default_rng(264)
    return [random_scene(rng, 1 if k < count // 2 else 2) for k in range(count)]


def effect_sentence(before, after):
    """A sentence on what RecA did to text to image in a toy run, from its scores."""
    points = round(100 * (after["overall"] - before["overall"]))
    if points >= 5:
        return f"text to image {points:+d} points, and no caption was read"
    return (
        f"text to image {points:+d} points: not better in this run. A model this small soon forgets\n"
        "how to follow words while it is trained to paint from embeddings alone. The defaults of\n"
        "--model tiny go around that; tiny/README.md says how.")


def effect_picture(asked, shown, cell=96, gap=6):
    """What a run on the toy world changed, at a glance -> PIL. asked: (caption, what it gave
    before, after) of each line, on the left; shown: (image, its reconstruction before, after), on
    the right."""
    font = ImageFont.load_default(size=15)
    header = 24
    pitch = cell + gap
    # The captions take the width of two cells, and a wider gap divides the halves.
    columns = [gap, 2 * cell, 2 * cell + pitch]
    for k in range(3):
        columns.append(2 * cell + 2 * pitch + 4 * gap + k * pitch)
    height = header + max(len(asked), len(shown)) * pitch
    sheet = Image.new("RGB", (columns[-1] + pitch, height), "white")

    pen = ImageDraw.Draw(sheet)
    titles = ("asked for", "before", "after", "shown", "before", "after")
    for left, title in zip(columns, titles):
        pen.text((left, 3), title, fill="black", font=font)

    for line, (text, *pictures) in enumerate(asked):
        top = header + line * pitch
        text = text.replace(" and ", " and\n")
        pen.text((gap, top + cell // 3), text, fill="black", font=font)
        if line < len(shown):
            pictures += shown[line]
        for left, picture in zip(columns[1:], pictures):
            enlarged = picture.resize((cell - 2, cell - 2), Image.BICUBIC)
            sheet.paste(ImageOps.expand(enlarged, 1, "lightgray"), (left, top))
    return sheet


# ---- words ---------------------------------------------------------------------------------------


def tiny_tokenizer(special_tokens=()):
    """A word-level tokenizer for the tiny models. It has the words of the toy world, the templates
    and the prompts; others are [UNK], and newlines are tokens. special_tokens: the architecture's
    markers, whose ids follow those of the words."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The order of the words gives their ids, which the shipped tiny models depend on.
    pattern = r"\n|[\w-]+|[^\s\w]"
    prompts = (
        "and user assistant system generate an image : , . ? ! \n"
        " a chat between curious artificial intelligence gives helpful detailed polite answers to"
        " questions s '")
    text = " ".join([*templates(), *SHAPES, *COLORS, *PLACES, prompts])
    words = list(dict.fromkeys(re.findall(pattern, text.lower())))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    markers = []
    for token in special_tokens:
        markers.append(AddedToken(token, special=True, normalized=False))
    tokenizer.add_special_tokens(markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
