"""eval.py: the paper's benchmarks, scored from files. No training code is needed: pictures or answers in, a table out.

    python eval.py geneval   OUT [OUT ...] --prompts evaluation_metadata.jsonl        detector + CLIP, on this machine
    python eval.py dpg       OUT --questions dpg_bench.csv [--grid 512]               judge (yes / no questions)
    python eval.py wise      OUT --prompts WISE/data --judge-prompt gpt_eval.py       judge
    python eval.py compbench OUT --prompts val_comp.json --judge-prompt qwen_eval.py  judge
    python eval.py imgedit   OUT --prompts singleturn.json --judge-prompt judge_prompt.json --sources DIR
    python eval.py gedit     OUT --prompts edits.jsonl --judge-prompt vie_prompts.py  judge, two calls per edit
    python eval.py pope|mme|gqa|mmmu|seed ANSWERS.jsonl --questions FILE|DIR          compares strings, no model
    python eval.py recon     OUT --sources DIR                                        PSNR, SSIM, CLIP similarity
    python eval.py shapes    OUT --prompts captions.txt | --sources DIR               the toy world, read back exactly
    python eval.py contact-sheet OUT --out sheet.png                                  one picture to look at

OUT is a folder of pictures in the benchmark's own layout (each section below says which; the scripts' --generate writes
it). Several OUTs give one table with differences to the first: the baseline, then RecA. `LABEL=DIR` names a row;
`DIR,DIR,DIR` (or a folder that holds seed0, seed1 ...) are seeds of one row: mean and standard deviation.

Judges. Without --judge-url the judge is a vision-language model run here with transformers (--judge, by default
Qwen2.5-VL). With --judge-url URL it is any OpenAI-compatible endpoint; its key is read from the environment variable
OPENAI_API_KEY, from nowhere else, and is written nowhere. A judge other than the benchmark's own gives numbers that
must not be put beside the paper's; the table names the judge.

Files. OUT/eval/BENCHMARK/items.jsonl gets one line per judged item at once, with the raw reply, so that an interrupted
run goes on where it stopped and tables can be redone without asking again. scores.json and scores.md go there too, or
into --out. What is missing, unreadable, too much or not understood is named and counted, never scored; --strict makes
it an error (exit code 2).

Question and answer files (understanding). `--prepare FILE` turns a benchmark's released questions into one form,

    {"question_id": ..., "image": path, "text": the question as it is asked, ...}           one JSON object a line

which every script's --describe FILE reads; it writes answers.jsonl, one object a line with at least

    {"question_id": ..., "answer": the model's reply, untouched}                            "id" is accepted as well

Lines may come in any order; labels and options are always taken from --questions, never from the answer file.

Four layers, each of plain functions: list the work -> judge one item -> parse the reply -> add up. Parsing and adding
up follow the official scorers rule by rule (tests/fixtures/eval holds values that those computed) and load no torch.
"""
import argparse
import ast
import base64
import collections
import concurrent.futures
import contextlib
import csv
import hashlib
import http.client
import io
import json
import math
import os
import re
import statistics
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ======================================================================================================
# 1. Errors, files, pictures
# ======================================================================================================
# common.py is imported by the toy world's section alone: it needs torch, and comparing strings should start at once.


class InputError(Exception):
    """Something the user gave cannot work: one line on stderr, exit code 2."""


class Problems(dict):
    """What could not be scored: {kind: [names]}. Printed as counts with the first five names, kept whole in
    scores.json.
    """

    def add(self, kind, name):
        self.setdefault(kind, []).append(str(name))

    def lines(self):
        return [f"{len(names)} x {kind}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
                for kind, names in self.items()]

    def stop(self, strict):
        """With --strict, everything that would be left out of the score is an error."""
        if strict and self:
            raise InputError(f"{'; '.join(self.lines())} (--strict; without it these are left out and named)")


def read_json(path, lines=False, kind=(dict, list)):
    """A JSON file that holds a `kind`; lines=True: the objects of a .jsonl file. The error names the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if not lines:
            if isinstance(data := json.loads(text), kind):
                return data
            raise InputError(f"{path} does not hold a JSON {'list' if kind is list else 'object'}")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):        # not splitlines(): U+2028 may stand inside a JSON string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}: line {number} is not JSON ({error.msg})") from None
            if not isinstance(rows[-1], dict):
                raise InputError(f"{path}: line {number} is not a JSON object")
    return rows


def need(row, names, where):
    """The values of `names` in a row of a benchmark's file; a missing one is an error that says where."""
    for name in names:
        if not isinstance(row, dict) or name not in row:
            raise InputError(f"{where}: no field \"{name}\"; is this the benchmark's own file?")
    return [row[name] for name in names]


def write(path, text):
    """Whole or not at all: a temporary neighbour, then a rename."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


class Journal:
    """items.jsonl: a line per judged item, appended at once. A kill can tear only the last line; that line is cut off.
    """

    def __init__(self, path):
        self.path, self.records = Path(path), {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b")
            with contextlib.suppress(ImportError):  # two runs on one journal would tear each other's lines
                import fcntl
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another eval.py is writing {self.path}") from None
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        self.file.seek(0)
        data = self.file.read()
        if data and not data.endswith(b"\n"):
            whole = data.rfind(b"\n") + 1
            print(f"{self.path}: the last line was half-written and is repaired: its item is judged again",
                  file=sys.stderr)
            self.file.truncate(whole)
            data = data[:whole]
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                    self.records[record["id"]] = record                                       # the last one counts
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{self.path}: line {number} is damaged; delete that line and run again") from None

    def add(self, record):
        self.records[record["id"]] = record
        try:
            self.file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self.file.flush()  # in the kernel's hands: survives a kill of this process
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self):
        self.file.close()


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Image.MAX_IMAGE_PIXELS = 64_000_000  # PIL refuses twice this before it decodes: a small file cannot fill the memory


def find_image(folder, stem):
    """folder/stem with whichever suffix exists; if none does, the .png that should be there (and will be named as
    missing).
    """
    for suffix in SUFFIXES:
        if (path := Path(folder) / f"{stem}{suffix}").is_file():
            return path
    return Path(folder) / f"{stem}.png"


def open_image(data):
    """bytes -> PIL RGB, upright. Raises OSError, ValueError or SyntaxError where the file is damaged (PIL's habit)."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


BROKEN = (OSError, ValueError, SyntaxError, IndexError, EOFError)


@dataclass
class Picture:
    """A picture as the judge shall see it: a file, perhaps cropped, resized or sent as JPEG (official protocols do all
    three).
    """
    path: Path
    crop: tuple = None                    # left, top, right, bottom
    size: tuple = None                    # width, height
    jpeg: bool = False

    def load(self):
        image = open_image(self.path.read_bytes())
        if self.crop:
            image = image.crop(self.crop)
        return image.resize(self.size) if self.size else image                        # bicubic, PIL's default

    def data_url(self):
        """Untouched files go as they are, under their true type (the originals say image/png whatever they send)."""
        if not (self.crop or self.size or self.jpeg):
            data = self.path.read_bytes()
            kind = Image.open(io.BytesIO(data)).get_format_mimetype() or "image/png"
        else:
            buffer, kind = io.BytesIO(), "image/jpeg" if self.jpeg else "image/png"
            self.load().save(buffer, kind[6:])
            data = buffer.getvalue()
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ======================================================================================================
# 2. Judges
# ======================================================================================================


@dataclass
class Item:
    """One question to a judge. parse(reply) -> the value, or None where the reply cannot be used."""
    id: str
    pictures: list
    text: str
    parse: callable
    system: str = None
    max_tokens: int = 512
    temperature: float = 0.0              # None: the endpoint's default, where the official protocol uses that
    image_first: bool = False
    prompt: str = ""                      # for the contact sheet
    mark: callable = None                 # value -> 0 .. 1, for the contact sheet


class Endpoint:
    """Any OpenAI-compatible endpoint, through the standard library.

    Retried with growing pauses, `retries` times: 408, 409, 429, 5xx, time-outs, broken connections, bodies that are not
    what the protocol says. 400 and its like (a picture that the endpoint refuses) fail that item. A wrong key or
    address, a redirect, an empty account would fail every item and stop the run. At most `rate` requests a minute,
    `workers` at a time. The key comes from OPENAI_API_KEY; redirects are not followed, as they would carry it
    elsewhere.
    """
    local = False

    def __init__(self, url, model, workers=8, retries=5, rate=0, timeout=120, reask=2):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InputError("--judge-url must look like https://host/v1, without a key (it goes into OPENAI_API_KEY)")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        # http.client would quote the whole header, key included, in its error
        if not re.fullmatch(r"[\x21-\x7e]*", self.key):
            raise InputError("OPENAI_API_KEY holds a character that no key has (a blank or a line end?)")
        if self.key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            print(f"warning: the key goes to {parts.hostname} unencrypted (http)", file=sys.stderr)
        self.url, self.host, self.name = url.rstrip("/") + "/chat/completions", parts.hostname, model
        self.workers, self.retries, self.timeout, self.reask = workers, max(0, retries), timeout, max(0, reask)
        self.pause, self.next_turn = 60 / rate if rate else 0, 0.0
        self.lock, self.stopped = threading.Lock(), threading.Event()

        class Stay(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *args):
                return None                                                           # surfaces as HTTPError 3xx
        self.opener = urllib.request.build_opener(Stay)

    def clean(self, text):
        """A server may quote the key back ("incorrect key sk-..."): it never reaches the screen or a file."""
        return text.replace(self.key, "[key]") if len(self.key) > 3 else text

    def wait_turn(self):
        with self.lock:
            turn = max(time.monotonic(), self.next_turn)
            self.next_turn = turn + self.pause
        self.stopped.wait(max(0, turn - time.monotonic()))

    def post(self, payload):
        """-> the reply's text. Raises OSError after the last attempt, InputError where asking again cannot help."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.url, json.dumps(payload).encode(), headers)
        for attempt in range(self.retries + 1):
            self.wait_turn()
            if self.stopped.is_set():
                raise OSError("stopped")
            wait = min(60, 2 ** attempt)
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    content = json.loads(self.read(response))["choices"][0]["message"]["content"]
                return self.clean("" if content is None else content)                 # null: the judge refused
            except urllib.error.HTTPError as error:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    error.detail = self.clean(" ".join(error.read(100_000).decode(errors="replace").split()))[:200]
                detail = f"{self.host} answers {error.code}: {getattr(error, 'detail', '')}"
                if error.code in (401, 402, 403, 404, 405) or error.code < 400 or "insufficient_quota" in detail:
                    raise InputError(detail) from None
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise OSError(detail) from None
                with contextlib.suppress(TypeError, ValueError):
                    wait = min(60, max(0, float(error.headers.get("Retry-After"))))
            except (OSError, http.client.HTTPException) as error:                     # includes URLError and time-outs
                detail = self.clean(f"{self.host}: {type(error).__name__}: {getattr(error, 'reason', error)}")
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                detail = f"{self.host}: the body is not a chat completion; does the URL end in /v1?"
            if attempt < self.retries:
                self.stopped.wait(wait)
        raise OSError(f"{detail} (after {self.retries + 1} attempts)")

    def read(self, response):
        """A socket's time-out counts from byte to byte; a server that drips would hold a worker for ever. This one
        counts from the start.
        """
        deadline, data = time.monotonic() + self.timeout, b""
        while chunk := response.read1(65536):
            data += chunk
            if time.monotonic() > deadline or len(data) > 10_000_000:
                raise TimeoutError("the reply took too long")
        return data

    def ask(self, item):
        """-> (reply, value, error). A reply that does not parse is asked for again, `reask` times: endpoints are not
        deterministic.
        """
        try:
            pictures = [{"type": "image_url", "image_url": {"url": p.data_url()}} for p in item.pictures]
            text = [{"type": "text", "text": item.text}]
            messages = [{"role": "user", "content": pictures + text if item.image_first else text + pictures}]
            if item.system:
                messages.insert(0, {"role": "system", "content": item.system})
            payload = {"model": self.name, "messages": messages, "max_tokens": item.max_tokens}
            if item.temperature is not None:
                payload["temperature"] = item.temperature
            for _ in range(self.reask + 1):
                reply = self.post(payload)
                if (value := item.parse(reply)) is not None:
                    return reply, value, None
            return reply, None, "malformed reply"
        except OSError as error:
            return None, None, f"no reply ({error})"

    def answers(self, items):
        """Yields (item, reply, value, error) as they come. Ten failures in a row: the judge is down, stop instead of
        waiting for each item.
        """
        pool = concurrent.futures.ThreadPoolExecutor(self.workers)
        try:
            futures = {pool.submit(self.ask, item): item for item in items}
            in_a_row = 0
            for future in concurrent.futures.as_completed(futures):
                reply, value, error = future.result()
                yield futures[future], reply, value, error
                in_a_row = in_a_row + 1 if reply is None else 0
                if in_a_row >= 10:
                    raise InputError(f"ten items in a row without a reply, last: {error}; run again to go on from here")
        finally:
            self.stopped.set()                                                        # wakes sleeping workers
            pool.shutdown(wait=True, cancel_futures=True)
            self.stopped = threading.Event()


class LocalJudge:
    """A vision-language model in this process, greedy, in batches.

    Qwen2(.5)-VL prompts are put together here: the library's AutoProcessor for them wants a video processor and with it
    torchvision, which is not one of the six packages. Other models (LLaVA ...) go through AutoProcessor and their own
    chat template.
    """
    local = True

    def __init__(self, name, device, batch):
        torch, transformers = import_torch()
        self.name, self.device, self.batch = name, device, batch
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            self.qwen = config.model_type in ("qwen2_vl", "qwen2_5_vl")
            if self.qwen:
                from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
                self.processor = Qwen2VLImageProcessorPil.from_pretrained(name)
            else:
                self.processor = transformers.AutoProcessor.from_pretrained(name)
                self.tokenizer = self.processor.tokenizer
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise InputError(f"cannot load the judge {name}: {str(error).strip().splitlines()[0][:150]} "
                             "(give --judge DIR, or --judge-url)") from None
        self.tokenizer.padding_side = "left"  # generation starts at the right edge
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = load_model(transformers.AutoModelForImageTextToText, name, device,
                                dtype=torch.float32 if device == "cpu" else torch.bfloat16)

    def qwen_inputs(self, items):
        """Text with <|image_pad|> once per visual token, left-padded; pixel patches of all images of the batch in one
        row of patches.
        """
        import torch
        images = self.processor([p.load() for item in items for p in item.pictures], return_tensors="pt")
        # grid (t, h, w) in patches; the model merges 2 x 2 patches into one token
        counts, texts = iter((images["image_grid_thw"].prod(1) // self.processor.merge_size ** 2).tolist()), []
        for item in items:
            pictures = "".join(f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>" for _ in item.pictures)
            user = pictures + item.text if item.image_first else item.text + pictures
            texts.append(f"<|im_start|>system\n{item.system or 'You are a helpful assistant.'}<|im_end|>\n"
                         f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = inputs["input_ids"]                                                     # [B, T]
        image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        # Without the token types the model runs, but image tokens get the positions of text: worse answers, no error.
        return {"input_ids": ids, "attention_mask": inputs["attention_mask"], "pixel_values": images["pixel_values"],
                "image_grid_thw": images["image_grid_thw"], "mm_token_type_ids": (ids == image_token).to(torch.int32)}

    def other_inputs(self, items):
        chats, pictures = [], []
        for item in items:
            images, text = [{"type": "image"} for _ in item.pictures], [{"type": "text", "text": item.text}]
            chat = [{"role": "user", "content": images + text if item.image_first else text + images}]
            if item.system:
                chat.insert(0, {"role": "system", "content": [{"type": "text", "text": item.system}]})
            chats.append(self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
            pictures.append([p.load() for p in item.pictures])
        return dict(self.processor(text=chats, images=pictures, padding=True, return_tensors="pt"))

    def answers(self, items):
        """Greedy: asking twice gives the same reply twice, so a malformed one is final."""
        import torch
        items = sorted(items, key=lambda item: item.max_tokens)  # stable: pictures asked often stay together
        for start in range(0, len(items), self.batch):
            batch = items[start:start + self.batch]
            inputs = self.qwen_inputs(batch) if self.qwen else self.other_inputs(batch)
            inputs = {k: v.to(self.device, self.model.dtype if v.is_floating_point() else v.dtype)
                      for k, v in inputs.items()}
            with torch.inference_mode(), timed("judge"):
                out = self.model.generate(**inputs, max_new_tokens=max(item.max_tokens for item in batch),
                                          do_sample=False, pad_token_id=self.tokenizer.pad_token_id)
            replies = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
            for item, reply in zip(batch, replies):
                value = item.parse(reply.strip())
                yield item, reply.strip(), value, None if value is not None else "malformed reply"


CLOCK = collections.Counter()  # seconds by part, printed at the end


@contextlib.contextmanager
def timed(part):
    start = time.perf_counter()
    try:
        yield
    finally:
        CLOCK[part] += time.perf_counter() - start


def import_torch():
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return torch, transformers


def load_model(cls, name, device, **options):
    """from_pretrained, but strict: the library fills a missing weight with random numbers and goes on."""
    try:
        model, info = cls.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:150]
        raise InputError(f"cannot load {name}: {first} (check the name and the network, or give a folder)") from None
    missing = sorted(info["missing_keys"]) + [str(key) for key in info.get("mismatched_keys", [])]
    if missing:
        raise InputError(f"{name} lacks {len(missing)} weights, first {missing[0]}: not a checkpoint of this model")
    return model.eval().to(device)


def judge_prompt(path, fields):
    """The benchmark's own judge text, from where the user downloaded it -> (text with {field} marks, system text or
    None).

    A text file holds {prompt}, {instruction} ... where the values go. The official scripts keep the text inside their
    source as an f-string: given such a .py, the longest f-string that uses all `fields` is taken, by reading the syntax
    tree. Nothing is run.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    system = None
    if Path(path).suffix == ".py":
        found = []
        tree = parse_source(path, text)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = []
                for part in node.values:
                    if isinstance(part, ast.Constant):
                        parts.append(part.value)
                    else:  # {prompt_data['Prompt']} or {prompt_name} -> {prompt}
                        value = part.value.slice if isinstance(part.value, ast.Subscript) else part.value
                        name = str(getattr(value, "value", None) or getattr(value, "id", "")).lower()
                        parts.append("{" + next((f for f in fields if f in name), name) + "}")
                found.append("".join(parts))
            if isinstance(node, ast.Dict):                           # {"role": "system", "content": ... "text": "..."}
                pairs = {getattr(k, "value", None): v for k, v in zip(node.keys, node.values)}
                if getattr(pairs.get("role"), "value", None) == "system" and "content" in pairs:
                    content = [n.value for n in ast.walk(pairs["content"]) if isinstance(n, ast.Constant)
                               and isinstance(n.value, str)]
                    system = max(content, key=len, default=None)
        found = [f for f in found if all("{" + name + "}" in f for name in fields)]
        text = max(found, key=len, default="")
    if any("{" + name + "}" not in text for name in fields):
        raise InputError(f"{path}: no judge text with {' and '.join('{' + f + '}' for f in fields)} in it")
    return text, system


def parse_source(path, text):
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not Python source: {error}") from None


def fill(text, **values):
    """Not str.format: judge texts are full of braces."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda m: str(values[m.group(1)]), text)


# ======================================================================================================
# 3. The loop: what is done is skipped, what is judged is written down at once
# ======================================================================================================


class Tools:
    """What the benchmarks share: the arguments, and the models, each loaded when first needed and kept for all folders.
    """

    def __init__(self, args):
        self.args, self.loaded = args, {}

    def get(self, name, make):
        if name not in self.loaded:
            self.loaded[name] = make()
        return self.loaded[name]

    @property
    def device(self):
        if self.args.device:
            return self.args.device
        torch, _ = import_torch()
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def judge_name(self):
        args, benchmark = self.args, BENCHMARKS[self.args.benchmark]
        if args.benchmark == "geneval":
            return f"{args.detector} + {args.clip}, 800/1333"
        if args.judge_url and not (args.judge or benchmark.judge):
            raise InputError("--judge-url needs --judge NAME: the model's name at that endpoint")
        return args.judge or (benchmark.judge if args.judge_url else "Qwen/Qwen2.5-VL-7B-Instruct")

    @property
    def judge(self):
        args = self.args
        if args.benchmark == "geneval":
            return self.get("judge", lambda: GenevalJudge(self))
        if args.judge_url:
            return self.get("judge", lambda: Endpoint(args.judge_url, self.judge_name, args.workers, args.retries,
                                                      args.rate, args.timeout, args.reask))
        return self.get("judge", lambda: LocalJudge(self.judge_name, self.device, self.batch(8)))

    @property
    def clip(self):
        return self.get("clip", lambda: Clip(self.args.clip, self.device))

    def batch(self, on_gpu):
        return self.args.batch or (on_gpu if self.device != "cpu" else 1)


def check_pictures(items, problems):
    """-> [(item, fingerprint of its pictures)] of those whose files are all there and decode. Others are named."""
    good, seen = [], {}
    for item in tqdm(items, desc="check", unit="item", dynamic_ncols=True, disable=len(items) < 50):
        digest = hashlib.sha1()
        for picture in item.pictures:
            path = picture.path
            if path not in seen:
                try:
                    data = path.read_bytes()
                    open_image(data)
                    seen[path] = hashlib.sha1(data).hexdigest()
                except FileNotFoundError:
                    problems.add("missing image", path)
                    seen[path] = None
                except BROKEN:
                    problems.add("unreadable image", path)
                    seen[path] = None
            if seen[path] is None:
                break
            digest.update(f"{seen[path]} {picture.crop} {picture.size} {picture.jpeg}".encode())
        else:
            good.append((item, digest.hexdigest()))
    return good


def judge_all(out, items, problems, tools):
    """Ask the judge about every item that has no valid line in OUT's journal. -> {item id: value}.

    A line counts while picture, text and judge are the same and its reply still parses: changed pictures are judged
    anew, and a better parser needs no new replies. Failures are written down too, and tried again in the next run.
    """
    if twice := [name for name, n in collections.Counter(item.id for item in items).items() if n > 1]:
        raise InputError(f"the prompt file has {twice[0]} twice")
    good = check_pictures(items, problems)
    problems.stop(tools.args.strict)
    if not good:
        raise InputError(f"{out}: nothing to score; {'; '.join(problems.lines()) or 'no image of a known prompt'}")
    values, keys, failed = {}, {}, {}
    with contextlib.closing(Journal(result_folder(out, tools.args) / "items.jsonl")) as journal:
        todo = []
        for item, fingerprint in good:
            settings = (fingerprint, item.text, item.system, item.max_tokens, item.temperature, item.image_first,
                        tools.judge_name)
            keys[item.id] = hashlib.sha1(repr(settings).encode()).hexdigest()
            record = journal.records.get(item.id, {})
            known = record.get("key") == keys[item.id] and record.get("reply") is not None
            value = item.parse(record["reply"]) if known else None
            if value is None:
                todo.append(item)
            else:
                values[item.id] = value
        with tqdm(total=len(good), initial=len(values), desc=f"{tools.args.benchmark} {out.name}", unit="item",
                  dynamic_ncols=True) as progress:
            for item, reply, value, error in tools.judge.answers(todo) if todo else ():
                record = {"id": item.id, "key": keys[item.id], "file": os.path.relpath(item.pictures[-1].path, out),
                          "prompt": item.prompt, "reply": reply}
                if error:
                    record["error"] = error
                    failed[item.id] = error.split(" (")[0]
                else:
                    values[item.id] = value
                    record["mark"] = item.mark(value) if item.mark else None
                journal.add(record)
                progress.update()
    for item in items:                                       # in the order of the work, whichever thread was first
        if item.id in failed:
            problems.add(failed[item.id], item.id)
    problems.stop(tools.args.strict)
    return {item.id: values[item.id] for item in items if item.id in values}


def result_folder(out, args):
    """OUT/eval/BENCHMARK; beside an answer file."""
    return (out if out.is_dir() else out.parent) / "eval" / args.benchmark


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def over(parts, whole):
    """Mean of `whole`'s parts; None if one is missing: an overall over fewer categories is another number."""
    values = [parts.get(name) for name in whole]
    return None if any(v is None for v in values) else sum(values) / len(values)


def limited(rows, args):
    return rows[:args.limit] if args.limit else rows


def scores(values, n, expected, problems, **extra):
    """What a benchmark returns for one folder. values: {column: number or None}, in the units of the table."""
    return {"values": values, "n": n, "expected": expected, "problems": problems, "extra": extra}


# ======================================================================================================
# 4. Text to image
# ======================================================================================================

# ---- GenEval -----------------------------------------------------------------------------------------

# the 80 classes in COCO's order; GenEval renames 64, 65 and 66
COCO = ("person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
        "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
        "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
        "surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
        "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,"
        "computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,"
        "clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_TASKS = {"single_object": "Single", "two_object": "Two", "counting": "Count", "colors": "Color",
                 "position": "Position",
                 "color_attr": "Attri."}


def box_overlap(a, b):
    """Intersection over union of two boxes, with the +1 per side that the official code has."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - both
    return both / union if union else 0


def keep_detections(detections, tag, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0, **_):
    """Indices of the detections of one class that count, best first. detections: dicts with box, score.

    Strictly above the threshold (0.9 for counting), then the 16 best, then suppression by overlap, which is off by
    default.
    """
    scores_ = np.array([d["score"] for d in detections])
    order = np.argsort(scores_, kind="stable")[::-1]
    limit = counting_threshold if tag == "counting" else threshold
    order = [int(i) for i in order if scores_[i] > limit][:max_objects]
    kept = []
    for i in order:
        if max_overlap == 1 or all(box_overlap(detections[i]["box"], detections[k]["box"]) < max_overlap for k in kept):
            kept.append(i)
    return kept


def relations(a, b, threshold=0.1):
    """How box a lies to box b, a subset of {left of, right of, above, below}.

    The distance of the centres is shrunk by a tenth of the summed sizes, per axis, then divided by the length of the
    *unshrunk* distance; a component beyond 0.5 is a relation. A far diagonal object has two, a near one none.
    """
    a, b = np.asarray(a, float)[:4].reshape(2, 2), np.asarray(b, float)[:4].reshape(2, 2)  # rows: corner, columns: x, y
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}


def geneval_decide(metadata, objects, colors_of, position_threshold=0.1, **_):
    """-> (correct, reasons). objects: class -> kept detections, best first; colors_of(detections, class) -> a color
    each.

    Only the best `count` objects of a class are looked at: a second, less sure object of the right color does not help.
    All clauses are tested even after one failed; a failed one is "no target" for the positions that refer to it.
    """
    reasons, groups = [], []
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        failed = None
        if len(found) < count:
            failed = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause:
            colors, wanted = colors_of(found, name), clause["color"]
            if colors.count(wanted) < count:
                failed = (f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and "
                          + ", ".join(f"{colors.count(c)} {c}" for c in GENEVAL_COLORS if c in colors))
        if not failed and "position" in clause:
            wanted, target = clause["position"]
            if groups[target] is None:
                failed = f"no target for {name} to be {wanted}"
            else:  # every pair must satisfy the relation; the first miss is reported
                seen = (relations(a["box"], b["box"], position_threshold) for a in found for b in groups[target])
                miss = next((r for r in seen if wanted not in r), None)
                if miss is not None:
                    failed = f"expected {name} {wanted} target, found {' and '.join(sorted(miss))} target"
        groups.append(None if failed else found)
        reasons += [failed] if failed else []
    for clause in metadata.get("exclude", []):  # so counting means exactly n; all kept detections count here
        if (n := len(objects.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not reasons, "\n".join(reasons)


def object_crop(image, mask, box):
    """What CLIP sees of an object: everything outside its mask grey, cut to its box (PIL rounds halves to even)."""
    if mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "#999999"), Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(box[:4]))


def color_logits(texts, images):
    """texts [colors, templates, D], images [N, D] -> 100 x cosine [N, colors]; a color is the mean of its normalised
    templates.
    """
    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    return 100 * unit(np.asarray(images, float)) @ unit(unit(np.asarray(texts, float)).mean(1)).T


def geneval_summary(results):
    """results: (tag, prompt, correct) per image. Task = share of correct images; Overall = plain mean of the six tasks.
    """
    tasks = {tag: mean(r[2] for r in results if r[0] == tag) for tag in dict.fromkeys(r[0] for r in results)}
    by_prompt = collections.defaultdict(bool)
    for tag, prompt, correct in results:
        by_prompt[tag, prompt] |= bool(correct)
    return {"tasks": tasks, "overall": over(tasks, GENEVAL_TASKS), "images": len(results), "prompts": len(by_prompt),
            "image_accuracy": mean(bool(r[2]) for r in results), "prompt_accuracy_any": mean(by_prompt.values())}


class Detector:
    """Mask2Former with mmdet's instance post-processing, which GenEval's thresholds were chosen for.

    Not the library's: that resizes all masks to 384 x 384 first, returns no boxes and starts at 0.5.
    """

    def __init__(self, name, device):
        torch, transformers = import_torch()
        from transformers.models.mask2former.modeling_mask2former import Mask2FormerModel, Mask2FormerPreTrainedModel

        class Instances(Mask2FormerPreTrainedModel):
            """Mask2FormerForUniversalSegmentation without its training loss, whose constructor wants scipy. Same
            weights, same outputs.
            """
            _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

            def __init__(self, config):
                super().__init__(config)
                self.model = Mask2FormerModel(config)
                self.class_predictor = torch.nn.Linear(config.hidden_dim, config.num_labels + 1)
                self.post_init()

            def forward(self, pixels):
                out = self.model(pixel_values=pixels, output_hidden_states=True)
                last = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)           # [B, Q, D]
                return self.class_predictor(last), out.masks_queries_logits[-1]  # [B, Q, 80 + 1], [B, Q, h/4, w/4]

        self.name, self.device = name, device
        self.model = load_model(Instances, name, device)
        if self.model.config.num_labels != 80:
            raise InputError(f"{name} knows {self.model.config.num_labels} classes; GenEval needs COCO's 80")

    def __call__(self, images, threshold=0.3):
        """PIL images of one size -> per image {class: [{box, score, mask}]}, scores above the threshold."""
        import torch
        import torch.nn.functional as F
        width, height = images[0].size
        scale = min(800 / min(width, height), 1333 / max(width, height))  # never 384: small objects would vanish
        h, w = int(height * scale + 0.5), int(width * scale + 0.5)
        # [B, 3, H, W]
        pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).to(self.device).permute(0, 3, 1, 2).float()
        # bilinear without antialiasing, rounded to grey levels, as OpenCV does it; padded, not stretched, to 32 k
        pixels = F.interpolate(pixels, (h, w), mode="bilinear", align_corners=False).round()
        mean_, std = (torch.tensor(v, device=self.device).view(3, 1, 1)
                      for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
        pixels = F.pad((pixels - mean_) / std, (0, -w % 32, 0, -h % 32))
        with torch.inference_mode():
            with timed("detector"):
                logits, masks = self.model(pixels)
                logits = logits.float().softmax(-1)[..., :-1].cpu()  # [B, Q, 80], "no object" dropped
            with timed("masks"):
                return [self.instances(p, m, pixels.shape[-2:], (h, w), (height, width), threshold)
                        for p, m in zip(logits, masks)]

    def instances(self, probabilities, masks, padded, inner, original, threshold):
        """The 100 best (query, class) pairs over all; score = class probability x mean sigmoid inside the mask; masks
        may overlap.
        """
        import torch.nn.functional as F
        best, index = probabilities.flatten().topk(min(100, probabilities.numel()))
        keep = best > threshold  # the factor is below 1: what is not above the threshold now never will be
        best, index = best[keep], index[keep]
        found = collections.defaultdict(list)
        if not len(best):
            return found
        query, label = index // probabilities.shape[1], index % probabilities.shape[1]
        masks = masks[query.to(masks.device)].float()[None]                                       # [1, K, h/4, w/4]
        masks = F.interpolate(masks, tuple(padded), mode="bilinear", align_corners=False)[..., :inner[0], :inner[1]]
        masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)[0]           # [K, H, W]
        inside = masks > 0
        score = best * ((masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)).cpu()
        for s, c, m in zip(score.tolist(), label.tolist(), inside.cpu().numpy()):
            ys, xs = np.flatnonzero(m.any(1)), np.flatnonzero(m.any(0))
            if s > threshold and len(ys):  # right and bottom edges are exclusive
                box = [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]
                found[COCO[c]].append({"box": box, "score": s, "mask": m})
        return found


class Clip:
    """CLIP ViT-L/14: names the color of an object (GenEval), and how alike two pictures are (recon)."""

    def __init__(self, name, device):
        torch, transformers = import_torch()
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        self.name, self.device, self.classifiers = name, device, {}
        self.model = load_model(transformers.CLIPModel, name, device)
        try:
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load {name}: {str(error).splitlines()[0][:150]}") from None

    def images(self, images):
        """PIL -> [N, D]. The shorter side becomes 224 and the centre is cut out: long objects lose their ends, as
        officially.
        """
        import torch
        pixels = self.processor(images, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode(), timed("CLIP"):
            return self.model.get_image_features(pixel_values=pixels).pooler_output.float().cpu().numpy()

    def texts(self, texts):
        import torch
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        with torch.inference_mode(), timed("CLIP"):
            return self.model.get_text_features(**tokens).pooler_output.float().cpu().numpy()

    def colors(self, image, objects, name):
        if name not in self.classifiers:
            templates = ("a photo of a {} {name}", "a photo of a {}-colored {name}", "a photo of a {} object")
            texts = [t.format(c, name=name) for c in GENEVAL_COLORS for t in templates]
            self.classifiers[name] = self.texts(texts).reshape(len(GENEVAL_COLORS), 3, -1)
        features = self.images([object_crop(image, o["mask"], o["box"]) for o in objects])
        return [GENEVAL_COLORS[i] for i in color_logits(self.classifiers[name], features).argmax(1)]


class GenevalJudge:
    """Detector and CLIP in the role of a judge: the "reply" about an image is what was found in it, as JSON."""

    def __init__(self, tools):
        self.tools, self.detector = tools, Detector(tools.args.detector, tools.device)

    def answers(self, items):
        batch = []
        for item in [*items, None]:                     # images of one size share a batch; None flushes the last one
            image = item.pictures[0].load() if item else None
            if batch and (item is None or image.size != batch[0][1].size or len(batch) == self.tools.batch(8)):
                for (one, picture), found in zip(batch, self.detector([picture for _, picture in batch])):
                    reply = json.dumps(self.look(json.loads(one.text), picture, found))
                    yield one, reply, one.parse(reply), None
                batch = []
            if item:
                batch.append((item, image))

    def look(self, metadata, picture, found):
        kept = {c: [found[c][i] for i in keep_detections(found[c], metadata["tag"])] for c in found}
        correct, reason = geneval_decide(metadata, kept, lambda objects, c: self.tools.clip.colors(picture, objects, c))
        boxes = {c: [[*o["box"], round(o["score"], 4)] for o in objects] for c, objects in kept.items() if objects}
        return {"correct": correct, "reason": reason, "details": boxes}


def geneval(out, args, tools):
    """GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): 553 prompts about objects, counts, colors and places,
    4 images each.

    OUT/<index, 5 digits>/metadata.jsonl and OUT/<index>/samples/<digits>.png, as the official generator leaves them.
    Official stack: mmdet 2 Mask2Former Swin-S (COCO instances) and open_clip ViT-L/14. Here: the same architectures
    from the hub in float32; the detector's weights are Meta's release instead of mmdet's retraining. Rules:
    keep_detections, relations, geneval_decide, geneval_summary.
    """
    problems, work = Problems(), []                                  # work: (prompt, tag, item)
    folders = {int(p.name): p for p in sorted(out.iterdir()) if p.is_dir() and p.name.isdigit()}
    prompts = dict(enumerate(read_json(args.prompts, lines=True))) if args.prompts else {}
    if not args.prompts:
        print("no --prompts: folders that are missing cannot be noticed", file=sys.stderr)
        prompts = {i: None for i in folders}
    if not folders:
        raise InputError(f"{out}: no GenEval folder (00000/samples/*.png) in it")
    for index in sorted(folders.keys() - prompts.keys()):
        problems.add("folder beyond the prompt file", folders[index].name)
    for index, metadata in limited(sorted(prompts.items()), args):
        folder = folders.get(index, out / f"{index:05d}")
        own = folder / "metadata.jsonl"
        if own.is_file():
            text = read_json(own, kind=dict)
            if metadata is not None and metadata != text:
                problems.add("metadata that is not the prompt file's", folder.name)
                continue
            metadata = text
        elif metadata is None:
            problems.add("folder without metadata.jsonl", folder.name)
            continue
        tag, clauses, _ = need(metadata, ("tag", "include", "prompt"), own)
        for clause in [*clauses, *metadata.get("exclude", [])]:
            if need(clause, ("class", "count"), own)[0] not in COCO:
                raise InputError(f"{folder.name}: unknown class {clause['class']!r}")
        found = sorted((folder / "samples").glob("*")) if (folder / "samples").is_dir() else []
        images = [f for f in found if re.match(r"\d+\.png", f.name)]
        if others := [f.name for f in found if f not in images and f.suffix.lower() in SUFFIXES]:
            problems.add("image that is not <digits>.png (the official scorer ignores it too)",
                         f"{folder.name}/{others[0]}")
        if len(images) != args.samples:
            problems.add(f"prompt without its {args.samples} images", f"{folder.name} ({len(images)})")
        for path in images:
            item = Item(f"{folder.name}/{path.name}", [Picture(path)], json.dumps(metadata, sort_keys=True), json.loads,
                        prompt=metadata["prompt"], mark=lambda value: float(value["correct"]))
            work.append((index, tag, item))
    seen = judge_all(out, [item for _, _, item in work], problems, tools)
    summary = geneval_summary([(tag, index, seen[item.id]["correct"]) for index, tag, item in work if item.id in seen])
    values = {column: percent(summary["tasks"].get(tag)) for tag, column in GENEVAL_TASKS.items()}
    return scores({**values, "Overall": percent(summary["overall"])}, len(seen),
                  len(limited(sorted(prompts), args)) * args.samples, problems, stack=tools.judge_name,
                  image_accuracy=percent(summary["image_accuracy"]),
                  prompt_accuracy_any=percent(summary["prompt_accuracy_any"]))


def percent(value):
    return None if value is None else 100 * value


# ---- DPG-Bench ---------------------------------------------------------------------------------------


def dpg_questions(rows, drop_first=False):
    """Rows of dpg_bench.csv -> {item: {question id: (parents, category, question)}} in file order.

    drop_first: the official reader loses the first data row, and with it one prompt whose questions depend on it. We
    keep all rows.
    """
    items = {}
    for row in rows[1:] if drop_first else rows:
        parents = [int(p) for p in str(row["dependency"]).split(",")]
        items.setdefault(row["item_id"], {})[int(row["proposition_id"])] = (
            [p for p in parents if p], row["tuple"].split("(")[0].strip(), row["question_natural_language"])
    return items


def dpg_pass(questions, answers):
    """One image (or crop): -> (score, {id: 1.0 where the answer was yes}). Raises KeyError for a parent that does not
    exist.

    A question whose parent failed fails too. The walk is in file order: a zero passes down a chain, but a parent that
    stands after its child has not been zeroed yet when the child looks at it. Zeroed questions stay in the denominator.
    """
    raw = {q: float(answers[q] == "yes") for q in questions}
    final = dict(raw)
    for q, (parents, _, _) in questions.items():
        if any(final[p] == 0 for p in parents):
            final[q] = 0.0
    return sum(final.values()) / len(final), raw


def dpg_summary(items, answers, last_pass_only=False):
    """answers: file -> one {question id: reply} per pass. Score = 100 x mean over files of the mean over passes.

    Category means use the answers before zeroing (so they do not average to the score); the official tables use the
    last pass only.
    """
    files, failed, fine = {}, [], collections.defaultdict(list)
    for name, passes in answers.items():
        questions = items.get(name.split(".")[0].split("_")[0])
        try:
            results = [dpg_pass(questions, p) for p in passes]
        except (KeyError, TypeError):
            failed.append(name)
            continue
        files[name] = {"passes": [r[0] for r in results], "score": mean(r[0] for r in results)}
        for _, raw in results[-1:] if last_pass_only else results:
            for q, value in raw.items():
                fine[questions[q][1]].append(value)
    broad = collections.defaultdict(list)
    for category, values in fine.items():
        broad[category.split("-")[0].strip()] += values
    return {"files": files, "failed": failed, "score": percent(mean(f["score"] for f in files.values())),
            "category_l1": {c: percent(mean(v)) for c, v in sorted(broad.items())},
            "category_l2": {c: percent(mean(v)) for c, v in sorted(fine.items())}}


def parse_yes_no(reply):
    """"Yes." -> yes, "No, it is not" -> no, anything else None. The official VQA model answers in one word and only
    `yes` counts.
    """
    word = re.match(r"\W*(yes|no)\b", reply.strip().lower())
    return word[1] if word else None


def dpg(out, args, tools):
    """DPG-Bench (Hu et al. 2024, github.com/TencentQQGYLab/ELLA): 1065 long prompts, 4 images each, yes/no questions
    about each.

    Layouts: OUT/<name>.png, a 2 x 2 grid of four samples of side --grid (ELLA's, and what --generate writes), or four
    files OUT/<name>_<k>.png (RecA's), each asked once: their scorer asks four times the same, which changes nothing.
    Official judge: mPLUG-large VQA (ModelScope only). A Qwen2.5-VL stand-in is told to answer in one word and is
    stricter on relations and counts.
    """
    problems, work, count = Problems(), [], collections.Counter()
    try:
        with open(args.questions, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {args.questions}: {error}") from None
    for row in rows or [{}]:
        need(row, ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language"), args.questions)
    try:
        items = dict(limited(list(dpg_questions(rows).items()), args))
    except ValueError as error:
        raise InputError(f"{args.questions}: {error}") from None
    for path in sorted(p for p in out.iterdir() if p.suffix.lower() in SUFFIXES):
        name, _, part = path.stem.partition("_")
        if name not in items:
            if not args.limit:
                problems.add("image of no known prompt", path.name)
        elif not part and not args.grid and not args.whole:
            raise InputError(f"{path.name}: a grid of four samples? Give --grid SIDE; or --whole if it is one sample")
        elif not part and args.grid:
            with contextlib.suppress(*BROKEN):                       # unreadable ones are named below
                if Image.open(path).size != (2 * args.grid, 2 * args.grid):
                    problems.add(f"image that is not a {2 * args.grid} x {2 * args.grid} grid", path.name)
                    continue
            s = args.grid
            work += [(path, k, (x, y, x + s, y + s)) for k, (x, y) in enumerate(((0, 0), (s, 0), (0, s), (s, s)))]
            count[name] += 4
        else:
            work.append((path, 0, None))
            count[name] += 1
    expected = 1 if args.whole else args.samples
    for name in items:
        if count[name] != expected:
            problems.add(f"prompt without its {expected} images", f"{name} ({count[name]})")
    asks = [Item(f"{path.name}|{k}|{q}", [Picture(path, crop)], f"{question} Answer with one word, yes or no.",
                 parse_yes_no, max_tokens=8,
                 image_first=True, prompt=question, mark=lambda v: float(v == "yes"))
            for path, k, crop in work for q, (_, _, question) in items[path.stem.partition("_")[0]].items()]
    replies = judge_all(out, asks, problems, tools)
    answers = collections.defaultdict(list)
    for path, k, _ in work:  # a sample counts when all its questions were answered
        questions = items[path.stem.partition("_")[0]]
        one = {q: replies.get(f"{path.name}|{k}|{q}") for q in questions}
        if all(one.values()):
            answers[path.name].append(one)
    summary = dpg_summary(items, answers)
    for name in summary["failed"]:
        problems.add("prompt with a dependency that does not exist", name)
    problems.stop(args.strict)
    n = sum(len(f["passes"]) for f in summary["files"].values())
    return scores({"Score": summary["score"]}, n, len(items) * expected, problems, categories=summary["category_l1"],
                  fine=summary["category_l2"])


# ---- WISE --------------------------------------------------------------------------------------------

WISE_GROUPS = ("Cultural", "Time", "Space", "Biology", "Physics", "Chemistry")


def parse_wise(reply):
    """-> {consistency, realism, aesthetic_quality}, 9.9 where not found (the official marker).

    One digit after the name, up to two asterisks on each side of the name; a name that comes twice counts the second
    time. `**Realism:** 2`, bold around the colon, is not found.
    """
    found = {"consistency": 9.9, "realism": 9.9, "aesthetic_quality": 9.9}
    for name, digit in re.findall(r"\*{0,2}(consistency|realism|aesthetic quality)\*{0,2}\s*[:：]?\s*(\d)", reply,
                                  re.IGNORECASE):
        found[name.lower().replace(" ", "_")] = float(digit)
    return found


def strict_wise(reply):
    """As parse_wise, but all three or None: officially a 9.9 can enter the mean as if it were a score."""
    found = parse_wise(reply)
    return found if all(v <= 2 for v in found.values()) else None


def wise_group(prompt_id, subcategory):
    if prompt_id <= 400:
        return "Cultural"
    if prompt_id <= 700:
        return "Time" if subcategory in ("Longitudinal time", "Horizontal time") else "Space"
    return WISE_GROUPS[3 + min((prompt_id - 701) // 100, 2)]


def wise_summary(rows):
    """rows: (prompt id, subcategory, consistency, realism, aesthetic quality). Scores in 0..1.

    Two overalls are in use: the plain mean of the six (RecA, BAGEL; fits the paper's table) and the authors' weights
    (by number of prompts).
    """
    groups = collections.defaultdict(list)
    for prompt_id, subcategory, consistency, realism, aesthetic in rows:
        groups[wise_group(prompt_id, subcategory)].append((0.7 * consistency + 0.2 * realism + 0.1 * aesthetic) / 2)
    categories = {name: mean(groups[name]) for name in WISE_GROUPS}
    whole = all(v is not None for v in categories.values())
    weights = (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)
    weighted = sum(w * categories[c] for c, w in zip(WISE_GROUPS, weights)) if whole else None
    return {"categories": categories, "overall": over(categories, WISE_GROUPS), "overall_weighted": weighted}


def wise(out, args, tools):
    """WISE (Niu et al. 2025, github.com/PKU-YuanGroup/WISE): 1000 prompts that need knowledge, 1 image each,
    OUT/<prompt_id>.png.

    --prompts: the folder with the three JSON lists (or one list). --judge-prompt: the official gpt_eval script, or a
    text file with {prompt} and {explanation}. Official judge: gpt-4o-2024-05-13, temperature 0, up to 2000 tokens.
    """
    source = Path(args.prompts)
    files = [f for f in sorted(source.glob("*.json"))
             if not f.stem.endswith("_rewrite")] if source.is_dir() else [source]
    rows = {}
    for file in files:
        for row in read_json(file, kind=list):
            need(row, ("Prompt", "Explanation", "Subcategory", "prompt_id"), file)
            rows[row["prompt_id"]] = row
    rows = limited([rows[i] for i in sorted(rows)], args)
    if not rows:
        raise InputError(f"{source}: no prompts in it")
    text, system = judge_prompt(args.judge_prompt, ("explanation", "prompt"))
    problems = Problems()
    items = [Item(str(r["prompt_id"]), [Picture(find_image(out, r["prompt_id"]))],
                  fill(text, prompt=r["Prompt"], explanation=r["Explanation"]),
                  strict_wise, system, 2000, prompt=r["Prompt"],
                  mark=lambda v: (0.7 * v["consistency"] + 0.2 * v["realism"] + 0.1 * v["aesthetic_quality"]) / 2)
                  for r in rows]
    values = judge_all(out, items, problems, tools)
    summary = wise_summary([(r["prompt_id"], r["Subcategory"], *values[str(r["prompt_id"])].values()) for r in rows
                            if str(r["prompt_id"]) in values])
    return scores({**summary["categories"], "Overall": summary["overall"]}, len(values), len(rows), problems,
                  overall_weighted=summary["overall_weighted"])


# ---- T2I-CompBench -----------------------------------------------------------------------------------

COMPBENCH = {"color": "Color", "shape": "Shape", "texture": "Texture", "spatial": "Spatial",
             "non_spatial": "Non-Spatial", "numeracy": "Numeracy",
             "3d_spatial": "3D Spatial", "complex": "Complex", "complex_action": None, "complex_spatial": None}


def parse_compbench(reply):
    """-> the integer after "score": in a JSON object, else the first such digits anywhere (12.5 -> 12), else -1."""
    text = reply.strip().replace("```json", "").replace("```", "").strip()
    if block := re.search(r'\{.*"score":\s*\d.*?\}', text, re.DOTALL):
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(block[0]).get("score"), int):
                return value
    found = re.search(r'"score":\s*"?(\d+)', reply)
    return int(found[1]) if found else -1


def strict_compbench(reply):
    """Officially the -1 of a reply that cannot be read enters one of the two means. Here it is asked again, then left
    out.
    """
    value = parse_compbench(reply)
    return value if 0 <= value <= 100 else None


def compbench_summary(results):
    """results: (category, score). Complex = mean of the three complex categories; Overall = mean of all ten (fits the
    paper's Table 12).
    """
    groups = collections.defaultdict(list)
    for category, value in results:
        groups[category].append(value)
    ten = {c: mean(groups[c]) for c in COMPBENCH}
    columns = {name: ten[c] for c, name in COMPBENCH.items() if name}
    return {**columns, "Complex": over(ten, [c for c in COMPBENCH if c.startswith("complex")]),
            "Overall": over(ten, COMPBENCH)}


def compbench(out, args, tools):
    """T2I-CompBench as the paper scores it (appendix F.4, after SRUM, github.com/WayneJin0918/SRUM): 2670 prompts, 1
    image each.

    OUT/<category>/<Question_id>.png, or in <category>/samples/; one category alone may lie in OUT itself. Ids repeat
    between categories. The judge rates 0-100 how well the image fits the prompt. Paper's judge:
    Qwen2.5-VL-32B-Instruct, greedy, 512 tokens. Not the classical metrics.
    """
    problems = Problems()
    rows = [need(row, ("Question", "Category", "Question_id"), args.prompts)
            for row in read_json(args.prompts, kind=list)]
    text, _ = judge_prompt(args.judge_prompt, ("prompt",))
    items, categories, alone = [], {}, len({category for _, category, _ in rows}) == 1
    for question, category, number in limited(rows, args):
        categories[key := f"{category}/{number}"] = re.sub(r"[\s-]+", "_", category.strip().lower())
        if categories[key] not in COMPBENCH:
            raise InputError(f"{args.prompts}: unknown category {category!r}")
        places = [out / category / "samples", out / category] + ([out] if alone else [])
        path = next((p for place in places if (p := find_image(place, number)).is_file()),
                    find_image(out / category, number))
        items.append(Item(key, [Picture(path)], fill(text, prompt=question), strict_compbench, max_tokens=512,
                          image_first=True, prompt=question,
                          mark=lambda v: v / 100))
    values = judge_all(out, items, problems, tools)
    return scores(compbench_summary([(categories[k], v) for k, v in values.items()]), len(values), len(items), problems,
                  complex={c: mean(v for k, v in values.items() if categories[k] == c) for c in COMPBENCH
                           if c.startswith("complex")})


# ======================================================================================================
# 5. Editing
# ======================================================================================================

IMGEDIT = {"background": "Bg.", "style": "Style", "adjust": "Adj.", "extract": "Ext.", "remove": "Rem.",
           "replace": "Rep.", "add": "Add",
           "compose": "Comp.", "action": "Act."}


def imgedit_ratings(reply):
    """Numbers on lines of the form "words: 4"; nothing else counts ("4.", "4/5", "**Name:** 4", "Name:4" do not)."""
    parts = [line.strip().split(": ") for line in reply.splitlines()]
    return [int(p[1]) for p in parts if len(p) == 2 and p[1].isdigit()]


def parse_imgedit(reply):
    """The official rule: mean of whatever ratings were found, two decimals; None if there is none. 0, 100 or a fourth
    number pass.
    """
    ratings = imgedit_ratings(reply)
    return round(sum(ratings) / len(ratings), 2) if ratings else None


def strict_imgedit(reply):
    """The same value, but only where exactly three ratings in 1..5 were given."""
    ratings = imgedit_ratings(reply)
    return parse_imgedit(reply) if len(ratings) == 3 and all(1 <= r <= 5 for r in ratings) else None


def imgedit_summary(types, values):
    """types: key -> edit type; values: key -> rating or None. A type is the mean of its keys; overall is the mean over
    *keys*, not types.
    """
    values = {k: v for k, v in values.items() if v is not None}
    groups = collections.defaultdict(list)
    for key, value in values.items():
        groups[types.get(key)].append(value)
    table = {t: round(sum(v) / len(v), 2) for t, v in groups.items() if t is not None}
    return {**table, **({"overall": round(sum(values.values()) / len(values), 2)} if values else {})}


def imgedit(out, args, tools):
    """ImgEdit, single turn (Ye et al. 2025, github.com/PKU-YuanGroup/ImgEdit): 737 edits, OUT/<key>.png; sources in
    --sources.

    The judge sees the instruction's text, the source and the result and gives three ratings 1..5. Official judge:
    gpt-4.1-2025-04-14 with the API's default temperature. Two overalls, by key (official) and by type; the paper's rows
    fit neither exactly.
    """
    problems = Problems()
    edits = dict(limited(list(read_json(args.prompts, kind=dict).items()), args))
    texts = read_json(args.judge_prompt, kind=dict)
    items, types = [], {}
    for key, edit in edits.items():
        source, prompt, types[key] = need(edit, ("id", "prompt", "edit_type"), args.prompts)
        if types[key] not in IMGEDIT:
            raise InputError(f"{args.prompts}: unknown edit_type {types[key]!r}")
        text, = need(texts, (types[key],), args.judge_prompt)
        items.append(Item(key, [Picture(Path(args.sources) / source), Picture(find_image(out, key))],
                          text.replace("<edit_prompt>", prompt),
                          strict_imgedit, max_tokens=1024, temperature=None, prompt=prompt, mark=lambda v: (v - 1) / 4))
    values = judge_all(out, items, problems, tools)
    table = imgedit_summary(types, values)
    return scores({**{name: table.get(t) for t, name in IMGEDIT.items()}, "Ovr.": table.get("overall")}, len(values),
                  len(edits), problems,
                  overall_by_type=over(table, IMGEDIT))


GEDIT_GROUPS = ("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
                "subject-add", "subject-remove",
                "subject-replace", "text_change", "tone_transfer")


def repair_json(text):
    """VIEScore's repair: quote bare keys, quote bare values, numbers become lists of one."""
    def value(match):
        key, content, end = match[1], match[2].strip(), match[3]
        if re.fullmatch(r"-?\d+(\.\d+)?", content):
            content = f"[{content}]"
        elif content.lower() not in ("true", "false", "null"):
            content = f'"{content}"'
        return f"{key}: {content}{end}"
    return re.sub(r'(".*?"):(.*?)([,}])', value, re.sub(r"(\w+):", r'"\1":', text))


def parse_gedit(reply):
    """-> (score list, its minimum, error). VIEScore's rules for a first try.

    Between two delimiters, else from the first { to the last }; without a pair of braces a bare [a, b], or a bare
    integer 0..10. Values are not checked: 11 and 6.5 pass. (On its second try the official code replaces a braceless
    reply by a random number; we never guess.)
    """
    if reply == "rate_limit_exceeded":
        return None, None, reply
    mark = "||V^=^V||"
    if reply.count(mark) == 2:
        text = reply.split(mark)[1]
    else:
        start, end = reply.find("{"), reply.rfind("}") + 1
        if start < 0 or end == 0:
            bare = reply[reply.find("["):reply.rfind("]") + 1]
            if re.fullmatch(r"\[\d+, ?\d+\]\n?", bare):
                text = json.dumps({"score": json.loads(bare)})
            else:
                with contextlib.suppress(ValueError):
                    if 0 <= int(reply) <= 10:
                        return [int(reply)], int(reply), None
                return None, None, "unparsed"
        else:
            text = reply[start:end]
    text = text.strip().replace("\n", "")
    try:
        data = json.loads(text)
        found = data["score"] if isinstance(data["score"], list) else [data["score"]]
    except (ValueError, KeyError, TypeError):
        try:
            data = json.loads(repair_json(text))
        except ValueError:
            return None, None, "unparsed"
        if not isinstance(data, dict) or "score" not in data:
            return None, None, "KeyError" if isinstance(data, dict) else "TypeError"
        found = data["score"]
    try:
        lowest = min(found)
    except (TypeError, ValueError) as error:
        return found, None, type(error).__name__
    return (found, lowest, None) if isinstance(lowest, (int, float)) else (found, None, "not a number")


def strict_gedit(reply):
    """The minimum, but only of two numbers in 0..10."""
    found, lowest, error = parse_gedit(reply)
    good = not error and isinstance(found, list) and len(found) == 2
    good = good and all(type(v) in (int, float) and 0 <= v <= 10 for v in found)
    return lowest if good else None


def gedit_summary(rows, language="en"):
    """rows: (group, language, intersection, SC, PQ). O = sqrt(SC x PQ) per edit; group = mean; the table = plain mean
    of the 11 groups.
    """
    def table(rows_):
        def column(value, name):
            groups = {g: mean(value(r) for r in rows_ if r[0] == g) for g in GEDIT_GROUPS}
            return {**groups, name: over(groups, GEDIT_GROUPS)}
        return (column(lambda r: r[3], "avg_semantics"), column(lambda r: r[4], "avg_quality"),
                column(lambda r: math.sqrt(r[3] * r[4]), "avg_overall"))
    rows = [r for r in rows if r[1] == language]
    names = ("SC", "PQ", "overall")
    return {**dict(zip(names, table(rows))), **dict(zip((n + "_intersection" for n in names),
                                                        table([r for r in rows if r[2]])))}


def gedit_texts(path):
    """VIEScore's two judge texts: from vie_prompts.py (string constants, read and not run), or a JSON file {"SC": ...,
    "PQ": ...}.

    The text of each task is put together as the official class does: context, rule of the task, rule of the score.
    """
    if Path(path).suffix != ".py":
        return need(read_json(path), ("SC", "PQ"), path)
    try:
        tree = parse_source(path, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    texts = {t.id: node.value.value for node in tree.body if isinstance(node, ast.Assign)
             and isinstance(node.value, ast.Constant)
             for t in node.targets if isinstance(t, ast.Name)}
    context, rule, sc, pq = need(texts, ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule",
                                         "_prompts_0shot_tie_rule_SC",
                                         "_prompts_0shot_rule_PQ"), path)
    return ["\n".join((context, rule, sc)), "\n".join((context, pq))]


def gedit(out, args, tools):
    """GEdit-Bench-EN (Liu et al. 2025, data set stepfun-ai/GEdit-Bench): 11 groups of edits, the English rows.

    OUT[/gen_image]/fullset/<task_type>/en/<key>.png with the source beside it as <key>_SRCIMG.png. --prompts: the data
    set's fields as JSON lines (key, task_type, instruction, instruction_language, Intersection_exist). VIEScore: SC
    sees source and result (resized to the source), PQ the result alone; pictures as JPEG; the lower of two ratings
    0..10 counts. Official judge: gpt-4.1-2025-04-14, 1400 tokens.
    """
    problems, root = Problems(), out / "gen_image" if (out / "gen_image").is_dir() else out
    rows = read_json(args.prompts, lines=True)
    for row in rows:
        _, group, _, _ = need(row, ("key", "task_type", "instruction", "instruction_language"), args.prompts)
        if group not in GEDIT_GROUPS:
            raise InputError(f"{args.prompts}: unknown task_type {group!r}")
    rows = [r for r in rows if r["instruction_language"] == "en"]
    rows, (sc, pq) = limited(rows, args), gedit_texts(args.judge_prompt)
    items = []
    for row in rows:
        folder = root / "fullset" / row["task_type"] / "en"
        source, result = find_image(folder, f"{row['key']}_SRCIMG"), find_image(folder, row["key"])
        size = None
        with contextlib.suppress(*BROKEN):
            size = ImageOps.exif_transpose(Image.open(source)).size
        common = dict(parse=strict_gedit, temperature=None, max_tokens=1400 if args.judge_url else 512,
                      image_first=not args.judge_url,
                      prompt=row["instruction"], mark=lambda v: v / 10)
        items.append(Item(f"{row['key']}|SC", [Picture(source, jpeg=True), Picture(result, size=size, jpeg=True)],
                          sc.replace("<instruction>", row["instruction"]), **common))
        items.append(Item(f"{row['key']}|PQ", [Picture(result, size=size, jpeg=True)], pq, **common))
    values = judge_all(out, items, problems, tools)
    both = [(r["task_type"], "en", bool(r.get("Intersection_exist")), values[f"{r['key']}|SC"],
             values[f"{r['key']}|PQ"])
            for r in rows if f"{r['key']}|SC" in values and f"{r['key']}|PQ" in values]
    table = gedit_summary(both)
    return scores({"SC": table["SC"]["avg_semantics"], "PQ": table["PQ"]["avg_quality"],
                   "Overall": table["overall"]["avg_overall"]},
                  len(both), len(rows), problems, groups=table)


# ======================================================================================================
# 6. Understanding: strings against strings
# ======================================================================================================
# Each benchmark: a reader of its released questions -> rows {question_id, image, text, answer or label ...}, a rule for
# one reply, a sum.

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def pope_prediction(reply):
    """First sentence, commas out, split at single blanks: "no" if the words No, no or not are among them, else yes (so
    NO and None are yes).
    """
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_metrics(labels, predictions):
    """Positive is yes. Where a quotient has no denominator the official script stops; here it is 0."""
    pairs = collections.Counter(zip(predictions, labels))
    tp, fp, fn, tn = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"], pairs["no", "no"]
    n = max(1, len(labels))
    precision, recall = tp / max(1, tp + fp), tp / max(1, tp + fn)
    return {"accuracy": (tp + tn) / n, "precision": precision, "recall": recall, "yes_ratio": (tp + fp) / n,
            "f1": 2 * precision * recall / (precision + recall) if tp else 0.0}


def pope_questions(args):
    """llava_pope_test.jsonl, and in --labels the three coco_pope_<category>.json, which belong to it by position within
    a category.
    """
    rows = read_json(args.questions, lines=True)
    for row in rows:
        need(row, ("question_id", "image", "text", "category"), args.questions)
    for category in dict.fromkeys(r["category"] for r in rows) if args.labels else ():
        path = Path(args.labels) / f"coco_pope_{category}.json"
        mine, labels = [r for r in rows if r["category"] == category], read_json(path, lines=True)
        if len(mine) != len(labels) or any(a["image"] != b.get("image", a["image"]) for a, b in zip(mine, labels)):
            raise InputError(f"{path}: its rows are not those of {args.questions} (number or images differ)")
        for row, label in zip(mine, labels):
            row["label"] = need(label, ("label",), path)[0]
    if not args.prepare and any("label" not in r for r in rows):
        raise InputError("pope needs --labels DIR with coco_pope_random.json, _popular.json, _adversarial.json")
    return rows


def pope_grade(rows, answers):
    """POPE (Li et al. 2023, github.com/RUCAIBox/POPE): is the object there? Accuracy and F1 are means over the three
    categories.
    """
    parts = {}
    for category in dict.fromkeys(r["category"] for r in rows):
        mine = [r for r in rows if r["category"] == category and r["question_id"] in answers]
        parts[category] = pope_metrics([r["label"] for r in mine],
                                       [pope_prediction(answers[r["question_id"]]) for r in mine])
    return {"POPE (Acc)": percent(mean(p["accuracy"] for p in parts.values())),
            "POPE (F1)": percent(mean(p["f1"] for p in parts.values()))}, parts


MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                  "OCR")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_prediction(reply):
    """Clean, then exact yes/no, else yes, then no, within the first four characters; else "other", which is wrong."""
    reply = reply.replace("\n", "").replace("不是", "no").replace("是", "yes").replace("否", "no").lower()
    reply = re.sub(r"[\u4e00-\u9fa5]", "", reply.replace("true", "yes").replace("false", "no"))
    return next((word for word in ("yes", "no") if word in reply[:4]), "other")


def mme_task(rows):
    """rows: (label, prediction), two per image in turn. -> 100 x accuracy + 100 x share of images with both right."""
    right = [label.lower() == prediction for label, prediction in rows]
    return 100 * mean(right) + 100 * mean(a and b for a, b in zip(right[::2], right[1::2]))


def mme_questions(args):
    """A folder of 14 <task>.txt: image, question, Yes/No, separated by tabs."""
    rows, folder = [], Path(args.questions)
    for task in MME_PERCEPTION + MME_COGNITION:
        try:
            lines = (folder / f"{task}.txt").read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"cannot read {folder / task}.txt: {error.strerror}") from None
        for number, line in enumerate(lines):
            if len(parts := line.strip().split("\t")) != 3 or parts[2] not in ("Yes", "No"):
                raise InputError(f"{folder / task}.txt: line {number + 1} is not image, question, Yes/No")
            image = next((p for p in (f"{task}/images/{parts[0]}", f"{task}/{parts[0]}")
                          if (Path(args.images or "") / p).exists()),
                         f"{task}/{parts[0]}")
            rows.append({"question_id": f"{task}/{number}", "image": image, "text": f"{parts[1]} {SHORT}", "task": task,
                         "label": parts[2]})
    return rows


def mme_grade(rows, answers):
    """MME (Fu et al. 2023): two questions an image. The paper's column is the perception sum (max 2000); cognition has
    max 800.
    """
    tasks = {}
    for task in MME_PERCEPTION + MME_COGNITION:
        mine = [r for r in rows if r["task"] == task]
        pairs = [pair for pair in zip(mine[::2], mine[1::2]) if all(r["question_id"] in answers for r in pair)]
        tasks[task] = mme_task([(r["label"], mme_prediction(answers[r["question_id"]])) for p in pairs
                                for r in p]) if pairs else None
    sums = {name: None if any(tasks[t] is None for t in group) else sum(tasks[t] for t in group)
            for name, group in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION))}
    return {"MME": sums["perception"]}, {**sums, "tasks": tasks}


def gqa_correct(reply, gold):
    """Equal after lower-casing and stripping; "white." is wrong. gold: a string or several."""
    return reply.strip().lower() in [g.strip().lower() for g in ([gold] if isinstance(gold, str) else gold)]


def gqa_questions(args):
    """testdev_balanced_questions.json (id -> question, imageId, answer), or the LLaVA form (rows with question_id,
    image, text, answer).
    """
    source = read_json(args.questions, lines=str(args.questions).endswith(".jsonl"))
    if isinstance(source, dict):
        source = [{"question_id": k, "image": f"{v.get('imageId')}.jpg", **v} for k, v in source.items()]
    return [{**row, "text": row.get("text") or f"{need(row, ('question',), args.questions)[0]} {SHORT}"}
            for row in source]


def gqa_grade(rows, answers):
    """GQA, testdev balanced (Hudson & Manning 2019): exact match."""
    return {"GQA": percent(mean(gqa_correct(answers[r["question_id"]], r["answer"]) for r in rows
                                if r["question_id"] in answers))}, {}


def mmmu_choice(reply, options):
    """MMMU's own rule: letters in brackets, else letters between blanks, else an option's text where the reply has more
    than five words; of several the last. None where the official code draws at random: we count that as wrong.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    for find in (lambda k: reply.rfind(f"({k})"), lambda k: reply.rfind(f" {k} "),
                 lambda k: reply.lower().rfind(options[k].lower()) if len(reply.split()) > 5 else -1):
        places = {k: find(k) for k in options if find(k) >= 0}
        if places:
            return max(places, key=places.get)
    return None


def mmmu_short(reply, options):
    """BAGEL's rule for models that answer with a letter: one character as it is; nothing is C; a leading option letter;
    an option's text.
    """
    reply = reply.strip()
    if len(reply) <= 1:
        return reply or "C"
    return reply[0] if reply[0] in options else next((k for k, text in options.items() if text in reply), reply)


def normal_answers(text):
    """A number as a float with two decimals; a single character with a blank on either side, so that it does not match
    inside a word.
    """
    text = str(text).strip()
    with contextlib.suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_open(reply, gold):
    """Open questions: what stands behind the last cue word, and every number in it; a gold string must be contained, a
    gold number equal.
    """
    sentences = re.split(r"\.\s(?=[A-Z])|\n", reply.strip().strip(".").lower())
    cues, tails = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "], []
    for number, sentence in enumerate(sentences):
        cues += ["="] if number == len(sentences) - 1 else []
        tail = ""
        for said in (sentence.split(cue)[-1].strip() for cue in cues if cue in sentence):
            # the shortest; an empty one is replaced by any
            tail = said if not tail or len(said) < len(tail) else tail
        tails += [tail] if tail and tail not in set(":,.!?;'") else []
    tails = tails or [reply.strip().strip(".").lower()]
    patterns = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",          # 1,200; 2e-3; plain
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
    numbers = [n for tail in tails for pattern in patterns for n in re.findall(pattern, tail)]
    said = [a for text in tails + numbers for a in normal_answers(text)]
    gold = [a for g in (gold if isinstance(gold, list) else [gold]) for a in normal_answers(g)]
    return any(g in s if isinstance(s, str) and isinstance(g, str) else g == s for s in said for g in gold)


def mmmu_questions(args):
    """The data set's rows as JSON (lines): id, question, options (a list, or its text as released), answer,
    question_type, image or image_1.
    """
    rows = read_json(args.questions, lines=str(args.questions).endswith(".jsonl"))
    for row in rows:
        row["question_id"], options, _ = need(row, ("id", "options", "answer"), args.questions)
        options = ast.literal_eval(options) if isinstance(options, str) else options
        row["options"] = {chr(65 + i): str(o).strip() for i, o in enumerate(options)}
        row["image"] = row.get("image") or row.get("image_1")
        listed = "".join(f"\n{k}. {o}" for k, o in row["options"].items())
        row["text"] = f"{need(row, ('question',), args.questions)[0].strip()}{listed}\n{LETTER if options else SHORT}"
    return rows


def mmmu_grade(rows, answers):
    """MMMU validation (Yue et al. 2024): accuracy over questions, by MMMU's own parser; `short` gives it by BAGEL's."""
    rows = [(r, answers[r["question_id"]]) for r in rows if r["question_id"] in answers]

    def accuracy(choose):
        return percent(mean(choose(a, r["options"]) == r["answer"] if r["options"] else mmmu_open(a, r["answer"])
                            for r, a in rows))
    return {"MMMU": accuracy(mmmu_choice)}, {"short": accuracy(mmmu_short)}


def seed_questions(args):
    """SEED-Bench.json, its image part: choice_a .. choice_d, answer, data_id, question_id, question_type_id, data_type.
    """
    rows = [r for r in need(read_json(args.questions, kind=dict), ("questions",), args.questions)[0]
            if r.get("data_type", "image") == "image"]
    for row in rows:
        row["options"] = dict(zip("ABCD", need(row, ("choice_a", "choice_b", "choice_c", "choice_d"), args.questions)))
        listed = "".join(f"\n{k}. {o}" for k, o in row["options"].items())
        row["image"], row["text"] = need(row, ("data_id",), args.questions)[0], f"{row['question']}{listed}\n{LETTER}"
    return rows


def seed_grade(rows, answers):
    """SEED-Bench, images (Li et al. 2023): accuracy over all questions. No official code for free answers: MMMU's rule,
    no letter is wrong.
    """
    rows = [(mmmu_choice(answers[r["question_id"]], r["options"]) == r["answer"], r.get("question_type_id"))
            for r in rows if r["question_id"] in answers]
    types = {str(t): percent(mean(right for right, kind in rows if kind == t))
             for t in sorted({k for _, k in rows}, key=str)}
    return {"SEED": percent(mean(right for right, _ in rows))}, types


def understanding(out, args, tools):
    """--prepare writes the question file for --describe; otherwise an answer file is compared with the benchmark's
    answers.
    """
    read, grade = {"pope": (pope_questions, pope_grade), "mme": (mme_questions, mme_grade),
                   "gqa": (gqa_questions, gqa_grade),
                   "mmmu": (mmmu_questions, mmmu_grade), "seed": (seed_questions, seed_grade)}[args.benchmark]
    rows, problems, answers = limited(read(args), args), Problems(), {}
    for row in rows:
        row["question_id"] = str(need(row, ("question_id", "image", "text"), args.questions)[0])
    if args.prepare:
        keep = ("question_id", "image", "text", "category", "task", "options")
        write(args.prepare, "".join(json.dumps({k: r[k] for k in keep if k in r}, ensure_ascii=False) + "\n"
                                    for r in rows))
        return print(f"{len(rows)} questions in {args.prepare}, for a script's --describe")
    known = {r["question_id"] for r in rows}
    if len(known) < len(rows) or any("answer" not in r and "label" not in r for r in rows):
        raise InputError(f"{args.questions}: question ids that repeat, or questions without their answer")
    for number, row in enumerate(read_json(out, lines=True), 1):
        key = str(row.get("question_id", row.get("id")))
        if not isinstance(row.get("answer"), str):
            raise InputError(f"{out}: line {number} has no \"answer\" text")
        if key not in known:
            problems.add("answer to no known question", key)
        elif key in answers:
            problems.add("question answered twice (the first answer counts)", key)
        else:
            answers[key] = row["answer"]
    for row in rows:
        if row["question_id"] not in answers:
            problems.add("question without an answer", row["question_id"])
    problems.stop(args.strict)
    values, extra = grade(rows, answers)
    return scores(values, len(answers), len(rows), problems, **extra)


# ======================================================================================================
# 7. Reconstruction, the toy world
# ======================================================================================================


def psnr(a, b):
    """uint8 [H, W, 3] twice -> dB; equal pictures: 100 (infinity is not JSON)."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * math.log10(255 ** 2 / error) if error > 255 ** 2 * 1e-10 else 100.0


def ssim(a, b):
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of width 1.5, no border, mean over the
    channels. uint8 [H, W, 3] twice.
    """
    kernel = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    kernel /= kernel.sum()

    def blur(x):
        for axis in (0, 1):  # the window is a product, so two passes of 11 do for one of 121
            x = np.tensordot(np.lib.stride_tricks.sliding_window_view(x, 11, axis), kernel, (-1, 0))
        return x
    a, b = a.astype(float), b.astype(float)
    c1, c2, ma, mb = (0.01 * 255) ** 2, (0.03 * 255) ** 2, blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))))


def pairs(out, sources, problems, args):
    """[(name, source path, output path)] by relative name without suffix; both must decode. Outputs may have another
    suffix.
    """
    if not (sources := Path(sources)).is_dir():
        raise InputError(f"no such folder: {sources}")
    files = limited(sorted(p for p in sources.rglob("*") if p.suffix.lower() in SUFFIXES), args)
    names = [p.relative_to(sources) for p in files]
    items = [Item(str(name), [Picture(sources / name), Picture(find_image(out, name.with_suffix("")))], "", None)
             for name in names]
    if not items:
        raise InputError(f"{sources}: no image in it")
    checked = check_pictures(items, problems)
    problems.stop(args.strict)
    return [(item.id, *(p.path for p in item.pictures)) for item, _ in checked], len(items)


def recon(out, args, tools):
    """Reconstructions against their sources: OUT/<name>.png beside --sources/<name>.*. The paper shows pictures only
    (figures 16, 17).

    The source's centre is cut to the output's aspect ratio and resized to its size. PSNR and SSIM are *expected* to be
    low: RecA reconstructs what the understanding encoder says, not pixels; CLIP similarity is nearer to the point.
    --clip none leaves it out.
    """
    problems = Problems()
    work, expected = pairs(out, args.sources, problems, args)
    rows = {}
    for name, source, result in tqdm(work, desc=f"recon {out.name}", unit="image", dynamic_ncols=True):
        b = open_image(result.read_bytes())
        a = ImageOps.fit(open_image(source.read_bytes()), b.size, Image.BICUBIC)
        if min(b.size) < 11:
            problems.add("image smaller than SSIM's window", name)
            continue
        pa, pb = np.asarray(a), np.asarray(b)
        rows[name] = {"PSNR": psnr(pa, pb), "SSIM": ssim(pa, pb)}
        if args.clip != "none":
            fa, fb = tools.clip.images([a, b])
            rows[name]["CLIP"] = float(fa @ fb / np.linalg.norm(fa) / np.linalg.norm(fb))
    problems.stop(args.strict)
    return scores({c: mean(r[c] for r in rows.values() if c in r) for c in ("PSNR", "SSIM", "CLIP")}, len(rows),
                  expected, problems, images=rows)


def shapes(out, args, tools):
    """The toy world (common.py, section 7): pictures are read back exactly, so there is no detector and no error.

    --prompts: the caption file that --generate had, OUT/<line, 5 digits>[_k].png. All: everything said is there. The
    GenEval-like columns need captions of one or two objects that say everything. --sources: reconstructions; every
    shape, color and place must come back.
    """
    import common
    if not (args.prompts or args.sources):
        raise InputError("shapes needs --prompts captions.txt or --sources DIR")
    problems, n, expected, values = Problems(), 0, 0, {}
    with contextlib.closing(Journal(result_folder(out, args) / "items.jsonl")) as journal:
        def note(path, prompt, right):
            record = {"id": path.name, "file": os.path.relpath(path, out), "prompt": prompt, "mark": float(right)}
            if journal.records.get(path.name) != record:
                journal.add(record)
            return right

        if args.prompts:
            try:
                lines = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines()
                         if line.strip()]
            except OSError as error:
                raise InputError(f"cannot read {args.prompts}: {error.strerror}") from None
            items = []
            for i, line in enumerate(limited(lines, args)):
                said = [[next((k for k, word in enumerate(words) if word in part.split()), None) for words in
                         (common.PLACES, common.SHAPES, tuple(common.COLORS))] for part in line.split(" and ")]
                if any(shape is None for _, shape, _ in said):
                    raise InputError(f"{args.prompts}: {line!r} is not a caption of the toy world")
                found = sorted(out.glob(f"{i:05d}_*.png")) or [find_image(out, f"{i:05d}")]
                items += [(Item(path.name, [Picture(path)], line, None), [tuple(s) for s in said]) for path in found]
            good = {id(item) for item, _ in check_pictures([i for i, _ in items], problems)}
            problems.stop(args.strict)
            cases = [(item, said, Image.open(item.pictures[0].path)) for item, said in items if id(item) in good]
            right = []
            for item, said, image in cases:
                seen = common.read_scene(image)
                there = all(any(all(want is None or want == have for want, have in zip(s, o)) for o in seen)
                            for s in said)
                right.append(note(item.pictures[0].path, item.text, there))
            whole = [(said, image) for _, said, image in cases if all(v is not None for s in said for v in s)]
            tasks = common.score_generations([s for s, _ in whole], [i for _, i in whole])
            ones, twos = (any(len(s) == k for s, _ in whole) for k in (1, 2))
            values = {SHAPE_COLUMNS[t]: percent(v) for t, v in tasks.items() if t in SHAPE_COLUMNS
                      and (ones if t in ("single_object", "colors") else twos)}
            values |= {"Overall": over(values, SHAPE_COLUMNS.values()), "All": percent(mean(right))}
            n, expected = n + len(cases), expected + len(items)
        if args.sources:
            work, count = pairs(out, args.sources, problems, args)
            same = [note(result, name, common.read_scene(Image.open(source)) == common.read_scene(Image.open(result)))
                    for name, source, result in work]
            values["Recon."], n, expected = percent(mean(same)), n + len(same), expected + count
    return scores(values, n, expected, problems)


SHAPE_COLUMNS = {"single_object": "Single", "two_object": "Two", "colors": "Color", "position": "Position",
                 "color_attribution": "Attri."}


# ======================================================================================================
# 8. Tables
# ======================================================================================================


@dataclass
class Benchmark:
    """score(out, args, tools) -> scores(...); columns as in the paper; judge: the official one's name at an endpoint.
    """
    score: callable
    columns: tuple
    decimals: object = 1                  # or {column: decimals}
    # Table 2: "98.2 (+1.0)"; "row": Table 3's last line; "columns": Table 12, models as columns
    style: str = "brackets"
    judge: str = None
    judged: bool = False


BENCHMARKS = {
    "geneval": Benchmark(geneval, (*GENEVAL_TASKS.values(), "Overall")),
    "dpg": Benchmark(dpg, ("Score",), 2, judged=True),
    "wise": Benchmark(wise, (*WISE_GROUPS, "Overall"), 2, judge="gpt-4o-2024-05-13", judged=True),
    "compbench": Benchmark(compbench, (*filter(None, COMPBENCH.values()), "Overall"), 2, "columns",
                           "Qwen/Qwen2.5-VL-32B-Instruct", True),
    "imgedit": Benchmark(imgedit, (*IMGEDIT.values(), "Ovr."), 2, "row", "gpt-4.1-2025-04-14", True),
    "gedit": Benchmark(gedit, ("SC", "PQ", "Overall"), 2, "row", "gpt-4.1-2025-04-14", True),
    "pope": Benchmark(understanding, ("POPE (Acc)", "POPE (F1)")), "mme": Benchmark(understanding, ("MME",), 0),
    "gqa": Benchmark(understanding, ("GQA",)), "mmmu": Benchmark(understanding, ("MMMU",)),
    "seed": Benchmark(understanding, ("SEED",)),
    "recon": Benchmark(recon, ("PSNR", "SSIM", "CLIP"), {"PSNR": 2, "SSIM": 4, "CLIP": 4}),
    "shapes": Benchmark(shapes, (*SHAPE_COLUMNS.values(), "Overall", "All", "Recon.")),
}


def summarize(label, folders, results, columns):
    """Seeds of one row -> its mean, and the sample standard deviation where there is more than one. A value that a seed
    lacks is None.
    """
    values = {c: [r["values"].get(c) for r in results] for c in columns}
    whole = {c: all(v is not None for v in vs) for c, vs in values.items()}
    row = {"label": label, "mean": {c: mean(vs) if whole[c] else None for c, vs in values.items()},
           "n": sum(r["n"] for r in results), "expected": sum(r["expected"] for r in results),
           "seeds": [{"folder": str(f), **r} for f, r in zip(folders, results)]}
    if len(results) > 1:
        row["std"] = {c: statistics.stdev(vs) if whole[c] else None for c, vs in values.items()}
    row["partial"] = row["n"] < row["expected"] or any(r["problems"] for r in results)
    return row


def markdown(benchmark, rows):
    """The table as the paper prints it; the first row is the baseline. Differences are those of the printed numbers."""
    decimals = benchmark.decimals
    decimals = decimals if isinstance(decimals, dict) else dict.fromkeys(benchmark.columns, decimals)
    columns = list(benchmark.columns)

    def delta(row, c):
        a, b = row["mean"][c], rows[0]["mean"][c]
        if a is None or b is None:
            return None
        text = f"{round(a, decimals[c]) - round(b, decimals[c]):+.{decimals[c]}f}"
        return text[1:] if float(text) == 0 else text

    def cell(row, c):
        if row["mean"][c] is None:
            return "–"
        text = f"{row['mean'][c]:.{decimals[c]}f}" + (f" ± {row['std'][c]:.{decimals[c]}f}" if row.get("std") else "")
        change = None if row is rows[0] or benchmark.style == "row" else delta(row, c)
        return f"{text} ({change})" if change else text

    names = [r["label"] + (" (partial)" if r["partial"] else "") for r in rows]
    if benchmark.style == "columns":
        table = [["Category", *names]] + [[c, *(cell(r, c) for r in rows)] for c in columns]
    else:
        table = [["Model", *columns]]
        for name, row in zip(names, rows):
            table.append([name, *(cell(row, c) for c in columns)])
            if benchmark.style == "row" and row is not rows[0]:
                table.append([f"vs. {rows[0]['label']}", *(delta(row, c) or "–" for c in columns)])
    lines = ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def parse_outputs(arguments):
    """[LABEL=]PATH[,PATH ...] -> [(label, [paths])]. A folder with seed<n> folders in it stands for these."""
    rows = []
    for argument in arguments:
        label, _, rest = argument.rpartition("=") if not Path(argument).exists() else ("", "", argument)
        paths = [Path(p) for p in ([rest] if Path(rest).exists() else rest.split(","))]
        for path in paths:
            if not path.exists():
                raise InputError(f"no such folder or file: {path}")
        if len(paths) == 1 and paths[0].is_dir():
            paths = sorted((p for p in paths[0].glob("seed*") if p.is_dir()),
                           key=lambda p: (len(p.name), p.name)) or paths
        rows.append((label or rest.rstrip("/"), paths))
    if len({label for label, _ in rows}) < len(rows):
        raise InputError("two rows have the same name; give LABEL=PATH")
    return rows


def run(args):
    """Score every folder, print the table, write scores.json and scores.md."""
    benchmark, tools, rows = BENCHMARKS[args.benchmark], Tools(args), []
    if getattr(args, "prepare", None):
        return understanding(None, args, tools)
    if not args.outputs:
        raise InputError("nothing to score: give OUTPUTS")
    outputs, start = parse_outputs(args.outputs), time.perf_counter()
    for label, paths in outputs:
        for path in paths:
            if path.is_dir() == (benchmark.score is understanding):
                raise InputError(f"{path} is {'a folder' if path.is_dir() else 'not a folder'}; {args.benchmark} wants "
                                 f"{'an answer file' if path.is_dir() else 'a folder of pictures'}")
        rows.append(summarize(label, paths, [benchmark.score(path, args, tools) for path in paths], benchmark.columns))
    judge = (f"{tools.judge_name} ({'endpoint' if args.judge_url else 'local'})") if benchmark.judged else None
    text = [f"# {args.benchmark}", "", markdown(benchmark, rows), ""]
    if judge:
        official = benchmark.judge or "mPLUG-large VQA"
        text += [f"Judge: {judge}." + ("" if tools.judge_name == official
                                       else f" The paper's is {official}: do not compare with its numbers."), ""]
    for row in rows:
        if row["partial"] or args.limit:
            limit = f" (--limit {args.limit})" if args.limit else ""
            text.append(f"{row['label']}: {row['n']} of {row['expected']} scored{limit}")
        text += [f"- {seed['folder']}: {line}" for seed in row["seeds"] for line in seed["problems"].lines()]
    print("\n".join(text).strip())
    versions = {m: sys.modules[m].__version__ for m in ("numpy", "PIL", "torch", "transformers") if m in sys.modules}
    record = {"benchmark": args.benchmark, "judge": judge, "columns": benchmark.columns, "rows": rows,
              "limit": args.limit or None, "versions": versions}
    folder = Path(args.out) if args.out else result_folder(outputs[-1][1][-1], args)
    write(folder / "scores.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write(folder / "scores.md", "\n".join(text).strip() + "\n")
    if CLOCK:
        total = time.perf_counter() - start
        print(f"{total:.1f} s: " + ", ".join(f"{part} {100 * s / total:.0f}%" for part, s in CLOCK.most_common()),
              file=sys.stderr)
    print(f"{folder / 'scores.json'}, {folder / 'scores.md'}", file=sys.stderr)


# ======================================================================================================
# 9. The contact sheet
# ======================================================================================================


def contact_sheet(args):
    """One picture of all pictures in OUTPUTS with their prompts: a green frame where scored right, red where failed or
    missing, grey unscored.

    Marks and prompts come from OUT/eval/*/items.jsonl (mean mark of an image below 0.5: failed), prompts else from
    GenEval's metadata.jsonl.
    """
    tiles = []  # (label, path, prompt, mark or None)
    for label, paths in parse_outputs(args.outputs):
        for out in paths:
            marks, prompts = collections.defaultdict(list), {}
            for journal in sorted(out.glob("eval/*/items.jsonl")):
                for line in journal.read_text(encoding="utf-8").splitlines():
                    # a torn last line is the scorer's to repair
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        record = json.loads(line)
                        marks[record["file"]] += [record["mark"]] if record.get("mark") is not None else []
                        prompts.setdefault(record["file"], record.get("prompt", ""))
            files = {os.path.relpath(p, out) for p in out.rglob("*") if p.suffix.lower() in SUFFIXES
                     and "eval" not in p.relative_to(out).parts}
            for file in sorted(files | {f for f in prompts if not f.startswith("..")}):
                meta = (out / file).parent.parent / "metadata.jsonl"
                if file not in prompts and meta.is_file():
                    with contextlib.suppress(InputError):
                        prompts[file] = read_json(meta).get("prompt", "")
                tiles.append((label, out / file, prompts.get(file) or file, mean(marks[file])))
    if not tiles:
        raise InputError("no image in " + ", ".join(args.outputs))
    tiles = [t for t in tiles if t[3] is not None and t[3] < 0.5] if args.failed else tiles
    shown = tiles[:args.limit or 60]
    cell, text_height, columns = args.cell, 44, max(1, min(args.columns, len(shown)))
    sheet = Image.new("RGB", (columns * (cell + 12), max(1, -(-len(shown) // columns)) * (cell + text_height + 12)),
                      "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, (label, path, prompt, mark) in enumerate(shown):
        x, y = k % columns * (cell + 12) + 6, k // columns * (cell + text_height + 12) + 6
        try:
            image = ImageOps.pad(open_image(path.read_bytes()), (cell, cell), color="white")
        except BROKEN:
            image, mark = Image.new("RGB", (cell, cell), "#eeeeee"), 0.0
            ImageDraw.Draw(image).text((8, cell // 2), "missing or unreadable", "#aa0000", font=font)
        sheet.paste(image, (x, y))
        frame = "#999999" if mark is None else "#c62828" if mark < 0.5 else "#2e7d32"
        draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), outline=frame, width=3)
        failed = mark is not None and mark < 0.5
        words = ("FAILED  " if failed else "") + (f"[{label}] " if len(args.outputs) > 1 else "") + prompt
        lines, line = [], ""
        for word in words.split():  # wrapped to the cell, three lines at most
            if line and draw.textlength(f"{line} {word}", font) > cell:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        for i, line in enumerate([*lines, line][:3]):
            draw.text((x, y + cell + 4 + 14 * i), line, frame if failed else "black",
                      font=font)
    path = Path(args.out or Path(parse_outputs(args.outputs)[-1][1][-1]) / "eval" / "contact_sheet.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
    failed = sum(t[3] is not None and t[3] < 0.5 for t in tiles)
    print(f"{path}: {len(shown)} of {len(tiles)} images, {failed} marked as failed")


# ======================================================================================================
# 10. The command line
# ======================================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see python {self.prog} --help)")


def parser():
    def positive(kind):
        def read(text):
            value = kind(text)
            if value <= 0:
                raise argparse.ArgumentTypeError(f"{text} is not above 0")
            return value
        return read

    top = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="benchmark", required=True, parser_class=Parser, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        sub = commands.add_parser(name, description=benchmark.score.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("outputs", nargs="*", help="[LABEL=]PATH[,PATH ...]: rows of the table, seeds of a row")
        sub.add_argument("--out", help="where scores.json and scores.md go (default: eval/ in the last OUTPUTS)")
        sub.add_argument("--strict", action="store_true", help="whatever would be left out is an error")
        sub.add_argument("--limit", type=positive(int), help="only the first N prompts")
        sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
        sub.add_argument("--batch", type=positive(int), help="batch of a local model (default: 8 on a GPU, 1 on a CPU)")
        if name in ("geneval", "wise", "compbench", "imgedit", "gedit", "shapes"):
            sub.add_argument("--prompts", required=name not in ("geneval", "shapes"),
                             help="the benchmark's prompts or metadata, as released")
        if name in ("wise", "compbench", "imgedit", "gedit"):
            sub.add_argument("--judge-prompt", required=True,
                             help="the benchmark's judge text: a text or JSON file, or the official .py")
        if name in ("imgedit", "recon", "shapes"):
            sub.add_argument("--sources", required=name != "shapes", help="folder of the source images")
        if name in ("geneval", "dpg"):
            sub.add_argument("--samples", type=positive(int), default=4,
                             help="images per prompt (4; the paper's starred rows: 12)")
        if name == "geneval":
            sub.add_argument("--detector", default="facebook/mask2former-swin-small-coco-instance")
        if name in ("geneval", "recon"):
            sub.add_argument("--clip", default="openai/clip-vit-large-patch14")
        if name == "dpg" or benchmark.score is understanding:
            sub.add_argument("--questions", required=True, help="the benchmark's questions, as released")
        if name == "dpg":
            sub.add_argument("--grid", type=positive(int), metavar="SIDE",
                             help="<name>.png is a 2 x 2 grid of samples of this side")
            sub.add_argument("--whole", action="store_true", help="<name>.png is one sample, the only one")
        if benchmark.score is understanding:
            sub.add_argument("--prepare", metavar="FILE",
                             help="write the question file for --describe instead of scoring")
            sub.add_argument("--labels", help="pope: folder of the coco_pope_*.json")
            sub.add_argument("--images", help="mme: folder of the images, to write their paths")
        if benchmark.judged:
            sub.add_argument("--judge", help="model: hub id or folder; with --judge-url its name there")
            sub.add_argument("--judge-url", help="OpenAI-compatible endpoint, https://host/v1; key in OPENAI_API_KEY")
            sub.add_argument("--workers", type=positive(int), default=8, help="requests at a time")
            sub.add_argument("--rate", type=positive(float), help="requests a minute, at most")
            sub.add_argument("--retries", type=int, default=5, help="after 429, 5xx, time-outs")
            sub.add_argument("--timeout", type=positive(float), default=120, help="seconds for one reply")
            sub.add_argument("--reask", type=int, default=2, help="more tries where a reply cannot be read")
    sub = commands.add_parser("contact-sheet", description=contact_sheet.__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    sub.add_argument("outputs", nargs="+")
    sub.add_argument("--out", help="the picture (default: eval/contact_sheet.png in the last OUTPUTS)")
    sub.add_argument("--columns", type=positive(int), default=6)
    sub.add_argument("--cell", type=positive(int), default=192)
    sub.add_argument("--limit", type=positive(int), help="at most N images (60)")
    sub.add_argument("--failed", action="store_true", help="only the failed ones")
    return top


def main(argv=None):
    try:
        args = parser().parse_args(argv)
        contact_sheet(args) if args.benchmark == "contact-sheet" else run(args)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":               # torch's; torch itself may not be loaded
            raise
        print("error: the batch does not fit into the GPU's memory: lower --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was judged is kept: the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
