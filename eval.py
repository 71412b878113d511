"""eval.py: the paper's benchmarks, scored from files: pictures or answers in, a table out.

    python eval.py geneval   OUT --prompts evaluation_metadata.jsonl                    Mask2Former and CLIP, here
    python eval.py dpg       OUT --questions dpg_bench.csv --grid 512                   judge
    python eval.py wise      OUT --prompts WISE/data --judge-prompt gpt_eval.py         judge
    python eval.py compbench OUT --prompts val_comp.json --judge-prompt qwen_eval.py    judge
    python eval.py imgedit   OUT --prompts singleturn.json --judge-prompt judge_prompt.json --sources DIR
    python eval.py gedit     OUT --prompts edits.jsonl --judge-prompt vie_prompts.py    judge, two calls per edit
    python eval.py pope|mme|gqa|mmmu|seed ANSWERS.jsonl --questions FILE|DIR            strings only, no model
    python eval.py recon     OUT --sources DIR                                          PSNR, SSIM, CLIP similarity
    python eval.py shapes    OUT --prompts captions.txt | --sources DIR                 the toy world, read back exactly
    python eval.py shapes    before=RUN RecA=RUN                                        runs of --model tiny, compared
    python eval.py contact-sheet OUT                                                    one picture to look at

OUT is a folder of pictures in the benchmark's layout, as the scripts' --generate writes it. Several OUTs: a table with
differences to the first. LABEL=DIR names a row; DIR,DIR (or a folder with seed0, seed1 ... in it) are seeds of one row.
A judge is a vision-language model run here (--judge) or an OpenAI-compatible endpoint (--judge-url, OPENAI_API_KEY).
`--prepare FILE` turns a benchmark's questions into lines for --describe, which writes {"question_id", "answer"} lines.
Every judged item is a line of OUT/eval/BENCHMARK/items.jsonl, written at once with the raw reply: an interrupted run
goes on. scores.json and scores.md go beside it, or into --out. What is missing, unreadable or malformed is named and
counted, never scored; --strict makes it an error. Rules follow the official scorers (values in tests/fixtures/eval).
"""
import argparse
import ast
import base64
import contextlib
import csv
import functools
import hashlib
import http.client
import io
import json
import os
import re
import statistics
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import common
from common import IMAGE_SUFFIXES, UNREADABLE, InputError, load_image

# ==== 1. Files ========================================================================================

def require(condition, message):
    if not condition:
        raise InputError(message)

class Problems(dict):
    """What cannot be scored, {kind: [names]}: printed as counts with the first five names, whole in scores.json."""
    def add(self, kind, name):
        self.setdefault(kind, []).append(str(name))

    def lines(self):
        return [f"{len(n)} x {kind}: {', '.join(n[:5])}{' ...' if len(n) > 5 else ''}" for kind, n in self.items()]

    def stop(self, strict):
        require(not (strict and self), f"{'; '.join(self.lines())} (--strict; without it these are left out and named)")

def need(row, names, where):
    """The values of `names` in a row of a benchmark's file."""
    for name in names:
        require(isinstance(row, dict) and row.get(name) is not None,
                f"{where}: no field \"{name}\"; is this the benchmark's own file?")
    return [row[name] for name in names]

def read_rows(path, *fields, kind=list):
    """A released file: a JSON list or object (kind), or for .jsonl an object a line; each row has `fields`."""
    data = common.read_json(path, lines=str(path).endswith(".jsonl"))
    require(isinstance(data, kind), f"{path} does not hold a JSON {'list' if kind is list else 'object'}")
    for row in data.values() if isinstance(data, dict) else data:
        need(row, fields, path)
    return data

def read_text(path, parse=str):
    """A text file; with parse=ast.parse the syntax tree of an official script, which is never run."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None

def strict(parse, valid):
    """An official parser made strict: None, so that the judge is asked again, for what must not enter a mean."""
    return lambda reply: value if valid(value := parse(reply)) else None

@contextlib.contextmanager
def open_journal(path):
    """items.jsonl, a line per judged item -> ({id: record}, add(record), which appends at once). A kill can tear only
    the last line; that one is cut off. A second run on the same file is refused."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            with contextlib.suppress(ImportError):             # no locks on Windows
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            whole = (data := file.read()).rfind(b"\n") + 1
            if whole < len(data):
                print(f"{path}: the last line was half-written: its item is judged again", file=sys.stderr)
                file.truncate(whole)
            records = {record["id"]: record for record in common.read_json(path, lines=True)}    # the last line counts
            yield records, lambda record: file.write(json.dumps(record).encode() + b"\n")
    except BlockingIOError:
        raise InputError(f"another eval.py is writing {path}") from None
    except OSError as error:
        raise InputError(f"cannot go on with {path}: {error}") from None

def find_image(stem, *folders):
    """The file stem.* that exists; else the .png that should be there, and will be named as missing."""
    paths = [folder / f"{stem}{suffix}" for folder in folders for suffix in (".png", *IMAGE_SUFFIXES)]
    return next((path for path in paths if path.is_file()), paths[0])

def images_in(folder, pattern="*"):
    return sorted(path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)

def size_of(path):
    """(width, height); None where the file cannot be read, which is named later."""
    with contextlib.suppress(*UNREADABLE):
        return load_image(path).size

@dataclass
class Picture:
    """A file as the judge shall see it: perhaps cropped, resized, sent as JPEG (official protocols do all three)."""
    path: Path
    crop: tuple = None                                         # left, top, right, bottom
    size: tuple = None                                         # width, height
    jpeg: bool = False

    def load(self):
        image = load_image(self.path)
        image = image.crop(self.crop) if self.crop else image
        return image.resize(self.size) if self.size else image                   # bicubic, PIL's default

    def data_url(self):
        """Untouched files go as they are, under their true type (the originals say image/png whatever they send)."""
        buffer = io.BytesIO(self.path.read_bytes())
        if self.crop or self.size or self.jpeg:
            self.load().save(buffer := io.BytesIO(), "jpeg" if self.jpeg else "png")
        kind = Image.open(buffer).get_format_mimetype() or "image/png"
        return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

@dataclass
class Item:
    """One question to a judge. parse(reply) -> a value, or None where the reply cannot be used."""
    id: str
    pictures: list
    text: str
    parse: callable
    system: str = None
    max_tokens: int = 512
    temperature: float = 0.0                                   # None: the endpoint's default, as officially
    image_first: bool = False
    prompt: str = ""                                           # for the contact sheet, as is mark: value -> 0 .. 1
    mark: callable = None
    failure: str = "malformed reply"                           # what None of parse means

    def chat(self, picture):
        """The messages of a chat; picture(p) is the part that stands for a picture."""
        parts, text = [picture(p) for p in self.pictures], [{"type": "text", "text": self.text}]
        user = {"role": "user", "content": parts + text if self.image_first else text + parts}
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}] * bool(self.system) + [user]

# ==== 2. Judges: a function from items to (item, reply or None, error or None) of each ================

class Endpoint:
    """Any OpenAI-compatible endpoint, through the standard library. The key comes from OPENAI_API_KEY only. Time-outs,
    broken connections, 408, 409, 429, 5xx and odd bodies are asked again with growing pauses; another 4xx (a refused
    picture) fails its item. A wrong key or address, an empty account or a redirect stops the run."""
    def __init__(self, args):
        url = urllib.parse.urlsplit(args.judge_url)
        require(url.scheme in ("http", "https") and url.hostname and not url.username and not url.query,
                "--judge-url must look like https://host/v1, without a key (it goes into OPENAI_API_KEY)")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        require(re.fullmatch(r"[\x21-\x7e]*", self.key),       # http.client would quote the key in its error
                "OPENAI_API_KEY holds a character that no key has (a blank or a line end?)")
        self.args, self.host, self.next_turn = args, url.hostname, 0.0
        self.lock, self.stopped = threading.Lock(), False
        self.opener = urllib.request.OpenerDirector()          # follows no redirect: it would carry the key elsewhere
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            self.opener.add_handler(handler())

    def clean(self, text):
        """A server may quote the key back ("incorrect key sk-..."): it never reaches the screen or a file."""
        return text.replace(self.key, "[key]") if len(self.key) > 3 else text

    def read(self, response):
        """A socket's time-out counts from byte to byte, and a server may drip; this one counts from the start."""
        deadline, data = time.monotonic() + self.args.timeout, b""
        while chunk := response.read1(65536):
            data += chunk
            if time.monotonic() > deadline or len(data) > 10_000_000:
                raise TimeoutError("the reply took too long")
        return data.decode(errors="replace")

    def post(self, payload):
        """-> (reply, None) or, after the last attempt, (None, why). InputError where asking again cannot help."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url, body = self.args.judge_url.rstrip("/") + "/chat/completions", json.dumps(payload).encode()
        for attempt in range(self.args.retries + 1):
            with self.lock:                                    # each request takes the next free turn
                turn = max(time.monotonic(), self.next_turn)
                self.next_turn = turn + (60 / self.args.rate if self.args.rate else 0)
            time.sleep(max(0, turn - time.monotonic()))
            if self.stopped:
                return None, "stopped"
            wait, request = min(60, 2 ** attempt), urllib.request.Request(url, body, headers)
            try:
                with self.opener.open(request, timeout=self.args.timeout) as response:
                    text, status, after = self.read(response), response.status, response.headers.get("Retry-After", "")
                if status < 300:                               # content null: the judge refused
                    return self.clean(json.loads(text)["choices"][0]["message"]["content"] or ""), None
                detail = self.clean(f"{self.host} answers {status}: {' '.join(text.split())}")[:240]
                if status < 400 or status in (401, 402, 403, 404, 405) or "insufficient_quota" in text:
                    self.stopped = True                        # no other worker asks any more
                    raise InputError(detail)
                if status < 500 and status not in (408, 409, 429):
                    return None, detail
                wait = min(60, float(after)) if re.fullmatch(r"[\d.]+", after) else wait
            except (OSError, http.client.HTTPException) as error:
                detail = f"{self.host}: {type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError, AttributeError):
                detail = f"{self.host}: the body is not a chat completion; does the URL end in /v1?"
            time.sleep(wait if attempt < self.args.retries else 0)
        return None, f"{detail} (after {self.args.retries + 1} attempts)"

    def ask(self, item):
        """A reply that does not parse is asked for again, `reask` times: endpoints are not deterministic."""
        messages = item.chat(lambda p: {"type": "image_url", "image_url": {"url": p.data_url()}})
        payload = {"model": judge_name(self.args), "messages": messages, "max_tokens": item.max_tokens}
        payload |= {} if item.temperature is None else {"temperature": item.temperature}
        for _ in range(self.args.reask + 1):
            reply, error = self.post(payload)
            if error or item.parse(reply) is not None:
                break
        return item, reply, error and f"no reply ({error})"

    def __call__(self, items):
        """As they come. After ten failures in a row the judge is taken to be down, and the run stops."""
        in_a_row = 0
        with ThreadPool(self.args.workers) as pool:            # of daemons: an error or Ctrl-C does not wait for them
            for item, reply, error in pool.imap_unordered(self.ask, items):
                yield item, reply, error
                in_a_row = in_a_row + 1 if reply is None else 0
                require(in_a_row < 10, f"ten items in a row without a reply, last: {error}; run again to go on")

def local(replies, batch):
    """A judge in this process: replies(items of one batch) -> texts. Asked twice it says the same: no second try."""
    def judge(items):
        for start in range(0, len(items), batch):
            part = items[start:start + batch]
            yield from ((item, reply, None) for item, reply in zip(part, replies(part)))
    return judge

@contextlib.contextmanager
def loading(name):
    """Whatever the libraries raise while they load `name` becomes one line."""
    import transformers                                        # not at the top: comparing strings starts at once
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise InputError(f"cannot load {name}: {first} (check the name and the network, or give a folder)") from None

def load_model(cls, name, device, **options):
    """from_pretrained, but strict: the library fills a missing weight with random numbers and goes on."""
    model, info = cls.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"]) + [str(key) for key in info.get("mismatched_keys", [])]
    require(not missing, f"{name} lacks {len(missing)} weights ({', '.join(missing[:1])}): not its checkpoint")
    return model.eval().to(device)

class LocalJudge:
    """A vision-language model, greedy, through its own processor and chat template."""
    def __init__(self, name, device):
        with loading(name) as transformers:
            class WithoutVideo(transformers.Qwen2_5_VLProcessor):                # its video processor wants torchvision
                def __init__(self, image_processor, tokenizer, chat_template=None):
                    super().__init__(image_processor, tokenizer, None, chat_template)
            qwen = transformers.AutoConfig.from_pretrained(name).model_type in ("qwen2_vl", "qwen2_5_vl")
            self.processor = (WithoutVideo if qwen else transformers.AutoProcessor).from_pretrained(name, backend="pil")
            self.model = load_model(transformers.AutoModelForImageTextToText, name, device,
                                    dtype=torch.float32 if device == "cpu" else torch.bfloat16)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token

    def inputs(self, items):
        chats = [item.chat(lambda p: {"type": "image", "image": p.load()}) for item in items]
        return self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                  return_tensors="pt", processor_kwargs={"padding": True})

    @torch.inference_mode()
    def replies(self, items):
        inputs = self.inputs(items).to(self.model.device, self.model.dtype)      # whole numbers keep their type
        out = self.model.generate(**inputs, max_new_tokens=max(item.max_tokens for item in items), do_sample=False,
                                  pad_token_id=self.processor.tokenizer.pad_token_id)
        out = out[:, inputs["input_ids"].shape[1]:]            # the prompts are padded on the left: replies start here
        return [text.strip() for text in self.processor.batch_decode(out, skip_special_tokens=True)]

def judge_name(args):
    """Stands in the table, and in the journal: a reply counts for the judge that gave it."""
    if args.benchmark in ("geneval", "recon", "shapes"):
        return " + ".join(getattr(args, name) for name in ("detector", "clip") if hasattr(args, name))
    require(not args.judge_url or args.judge or args.benchmark != "dpg", "--judge-url needs --judge, the model's name")
    return args.judge or (BENCHMARKS[args.benchmark].judge if args.judge_url else "Qwen/Qwen2.5-VL-7B-Instruct")

def make_judge(args):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (1 if device == "cpu" else 8)
    if args.benchmark == "geneval":
        models = {"detector": Detector(args.detector, device), "clip": Clip(args.clip, device)}
        return local(functools.partial(geneval_replies, **models), batch)
    if args.benchmark == "recon":
        clip = None if args.clip == "none" else Clip(args.clip, device)
        return local(lambda items: [json.dumps(likeness(*[p.load() for p in i.pictures], clip)) for i in items], batch)
    if args.benchmark == "shapes":
        return local(lambda items: [json.dumps([common.read_scene(p.load()) for p in i.pictures]) for i in items], 1)
    return Endpoint(args) if args.judge_url else local(LocalJudge(judge_name(args), device).replies, batch)

def judge_prompt(path, *fields):
    """The benchmark's judge text, as downloaded -> (text with {field} marks, system text or None): a text file, or of
    an official script the longest f-string with all `fields` (looked for in that order in an expression)."""
    texts, system = [read_text(path)] if Path(path).suffix != ".py" else [], None
    for node in ast.walk(read_text(path, ast.parse)) if not texts else ():
        if isinstance(node, ast.JoinedStr):                    # {prompt_data['Prompt']} or {prompt_name} -> {prompt}
            code = [None if isinstance(part, ast.Constant) else ast.unparse(part.value).lower() for part in node.values]
            names = [next((f for f in fields if f in c), c) if c else None for c in code]
            texts.append("".join("{" + name + "}" if name else part.value for name, part in zip(names, node.values)))
        if isinstance(node, ast.Dict) and "'role': 'system'" in ast.unparse(node):         # the innermost is last
            words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            system = max(words, key=len)
    texts = [text for text in texts if all("{" + field + "}" in text for field in fields)]
    require(texts, f"{path}: no judge text with {' and '.join('{' + f + '}' for f in fields)} in it")
    return max(texts, key=len), system

# ==== 3. The loop: what is done is skipped, what is judged is written down at once ====================

def mean(values):
    """None without values, and where one is None: an overall of fewer categories is another number."""
    values = list(values)
    return None if not values or None in values else sum(values) / len(values)

def grouped(pairs):
    groups = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return groups

def means(pairs, names=None):
    """(name, value) pairs -> {name: mean of its values}; a name of `names` that has none: None."""
    groups = grouped(pairs)
    return {name: mean(groups[name]) for name in (names or list(groups))}

def percent(value):
    if isinstance(value, dict):
        return {name: percent(part) for name, part in value.items()}
    return None if value is None else 100 * value

def judge_all(out, items, problems, args, judge):
    """Ask about every item that has no valid line in OUT's journal -> {item id: value}. Bad files are named first. A
    line counts while pictures, text and judge are the same and its reply still parses: changed pictures are judged
    anew, a better parser needs no new replies. Failures are written down too, and tried again in the next run."""
    twice = [name for name, n in Counter(item.id for item in items).items() if n > 1]
    require(not twice, f"the prompt file has {', '.join(twice[:1])} twice")

    @functools.cache
    def digest(path):
        try:
            load_image(data := path.read_bytes())
            return hashlib.sha1(data).hexdigest()
        except UNREADABLE as error:
            problems.add("missing image" if isinstance(error, FileNotFoundError) else "unreadable image", path)
    keys, values, errors = {}, {}, {}
    for item in tqdm(items, desc="check", unit="item", dynamic_ncols=True, disable=len(items) < 50):
        marks = [(digest(p.path), p.crop, p.size, p.jpeg) for p in item.pictures]
        if all(mark[0] for mark in marks):
            question = (item.text, item.system, item.max_tokens, item.temperature, item.image_first, judge_name(args))
            keys[item.id] = hashlib.sha1(repr((marks, question)).encode()).hexdigest()
    problems.stop(args.strict)
    require(keys, f"{out}: nothing to score; {'; '.join(problems.lines()) or 'no image of a known prompt'}")
    items = [item for item in items if item.id in keys]
    with open_journal(out / "eval" / args.benchmark / "items.jsonl") as (records, add):
        for item in items:
            old = records.get(item.id, {})
            known = old.get("key") == keys[item.id] and old["reply"] is not None
            values[item.id] = item.parse(old["reply"]) if known else None
        todo = [item for item in items if values[item.id] is None]
        with tqdm(total=len(items), initial=len(items) - len(todo), desc=f"{args.benchmark} {out.name}", unit="item",
                  dynamic_ncols=True) as bar:
            for item, reply, error in judge()(todo) if todo else ():
                values[item.id] = value = None if error else item.parse(reply)
                errors[item.id] = error = error or (item.failure if value is None else None)
                add({"id": item.id, "key": keys[item.id], "file": os.path.relpath(item.pictures[-1].path, out),
                     "prompt": item.prompt, "reply": reply, "error": error,
                     "mark": item.mark(value) if item.mark and not error else None})
                bar.update()
    for item in items:                                         # in the order of the work, whichever thread was first
        if errors.get(item.id):
            problems.add(errors[item.id].split(" (")[0], item.id)
    return {name: value for name, value in values.items() if value is not None}

# A judged benchmark is a function (out, args, problems) -> its items, how many things should be scored, and
# add_up({item id: value}) -> {column: value in the table's unit, or None}, with whatever else scores.json shall hold.

# ==== 4. GenEval ======================================================================================

# the 80 classes in COCO's order, of which GenEval renames 64, 65 and 66
COCO = ("person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
        "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,"
        "suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
        "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
        "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,"
        "computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
        "hair drier,toothbrush").split(",")
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_TASKS = {"single_object": "Single", "two_object": "Two", "counting": "Count", "colors": "Color",
                 "position": "Position", "color_attr": "Attri."}

def keep_detections(detections, tag, max_overlap=1.0):
    """Indices of the detections (of one class; dicts with box, score) that count, best first: strictly above the
    threshold, then the 16 best, then suppression by overlap, which is off by default."""
    def area(x1, y1, x2, y2):                                  # the official +1 per side
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    def overlap(a, b):
        both = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
        return both / (area(*a[:4]) + area(*b[:4]) - both or 1)
    scores, kept = np.array([d["score"] for d in detections]), []
    best = [int(i) for i in np.argsort(scores, kind="stable")[::-1] if scores[i] > (0.9 if tag == "counting" else 0.3)]
    for i in best[:16]:
        if max_overlap == 1 or all(overlap(detections[i]["box"], detections[k]["box"]) < max_overlap for k in kept):
            kept.append(i)
    return kept

def relations(a, b):
    """How box a lies to box b, a subset of {left of, right of, above, below}. Per axis: the distance of the centres,
    less a tenth of the summed sizes, over the length of the *unshrunk* distance; beyond 0.5 it is a relation."""
    a, b = np.asarray(a, float)[:4].reshape(2, 2), np.asarray(b, float)[:4].reshape(2, 2)      # rows: corners; x, y
    offset, sizes = a.mean(0) - b.mean(0), np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    x, y = shrunk / np.linalg.norm(offset) if np.any(np.abs(shrunk) >= 1e-3) else (0, 0)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}

def geneval_decide(metadata, objects, colors_of):
    """objects {class: kept detections, best first}, colors_of(detections, class) -> a color each. -> correct, reasons
    Only the best `count` of a class are looked at. A failed clause is "no target" for positions that refer to it."""
    reasons, groups = [], []
    for clause in metadata.get("include", []):
        name, count, failed = clause["class"], clause["count"], None
        found = objects.get(name, [])[:count]
        if len(found) < count:
            failed = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause:
            colors, wanted = colors_of(found, name), clause["color"]
            if (n := colors.count(wanted)) < count:
                others = ", ".join(f"{colors.count(c)} {c}" for c in GENEVAL_COLORS if c in colors)
                failed = f"expected {wanted} {name}>={count}, found {n} {wanted}; and {others}"
        if not failed and "position" in clause:
            wanted, target = clause["position"]
            seen = [relations(a["box"], b["box"]) for a in found for b in groups[target] or ()]
            wrong = [relation for relation in seen if wanted not in relation]    # every pair must satisfy it
            if wrong:
                failed = f"expected {name} {wanted} target, found {' and '.join(sorted(wrong[0]))} target"
            elif not seen:
                failed = f"no target for {name} to be {wanted}"
        groups.append(None if failed else found)
        reasons += [failed] if failed else []
    for clause in metadata.get("exclude", []):                 # all kept ones count here: counting means exactly n
        if (n := len(objects.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not reasons, "\n".join(reasons)

def object_crop(image, mask, box):
    """What CLIP sees of an object: all outside its mask grey, cut to its box (PIL rounds halves to even)."""
    if mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "#999999"), Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(box[:4]))

def color_logits(texts, images):
    """texts [colors, templates, D], images [N, D] -> 100 x cosine [N, colors]; templates are normalised, averaged."""
    colors = F.normalize(F.normalize(torch.as_tensor(texts), dim=-1).mean(1), dim=-1)
    return 100 * F.normalize(torch.as_tensor(images), dim=-1) @ colors.T

def geneval_summary(results):
    """(tag, prompt, correct) per image. Task: the share of correct images; Overall: the plain mean of the six tasks."""
    tasks, prompts = means((r[0], r[2]) for r in results), means(((r[0], r[1]), r[2]) for r in results)
    return {"tasks": tasks, "overall": mean(tasks.get(tag) for tag in GENEVAL_TASKS), "images": len(results),
            "prompts": len(prompts), "image_accuracy": mean(r[2] for r in results),
            "prompt_accuracy_any": mean(v > 0 for v in prompts.values())}

class Detector:
    """Mask2Former with mmdet's instance post-processing, for which GenEval's thresholds were chosen: the library's own
    resizes all masks to 384 x 384 first, returns no boxes and starts at 0.5."""
    def __init__(self, name, device):
        with loading(name):
            from transformers.models.mask2former import modeling_mask2former as library
            library.requires_backends = lambda *_: None        # its training loss wants scipy; nothing is trained here
            self.model = load_model(library.Mask2FormerForUniversalSegmentation, name, device)
        classes = self.model.config.num_labels
        require(classes == 80, f"{name} knows {classes} classes; GenEval needs COCO's 80")

    @torch.inference_mode()
    def __call__(self, images, threshold=0.3):
        """PIL images of one size -> per image {class: [{box, score, mask}]}, scores above the threshold."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).to(self.model.device)
        height, width = original = tuple(pixels.shape[1:3])
        scale = min(800 / min(original), 1333 / max(original))                   # never 384: small objects would vanish
        h, w = int(height * scale + 0.5), int(width * scale + 0.5)
        # bilinear, not antialiased, rounded to grey levels, as OpenCV does it; padded, not stretched, to 32 k
        pixels = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (h, w), mode="bilinear").round()
        center, std = pixels.new_tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
        pixels = F.pad((pixels - center) / std, (0, -w % 32, 0, -h % 32))
        out = self.model(pixel_values=pixels)                  # logits [B, Q, 80 + 1], [B, Q, H / 4, W / 4]
        chances = out.class_queries_logits.float().softmax(-1)[..., :-1]         # the last class is "no object"
        sizes = tuple(pixels.shape[-2:]), (h, w), original
        return [self.instances(c, m, *sizes, threshold) for c, m in zip(chances, out.masks_queries_logits.float())]

    def instances(self, chances, masks, padded, inner, original, threshold):
        """The 100 best (query, class) pairs over all; score = class probability x mean sigmoid inside the mask; masks
        may overlap. chances [Q, 80], masks [Q, h, w] -> {class: [{box, score, mask}]}"""
        best, index = chances.flatten().topk(min(100, chances.numel()))
        best, index = best[best > threshold], index[best > threshold]      # the factor is below 1: no other can pass
        found = defaultdict(list)
        if not len(best):
            return found
        masks = F.interpolate(masks[None, index // chances.shape[1]], padded, mode="bilinear")
        masks = F.interpolate(masks[..., :inner[0], :inner[1]], original, mode="bilinear")[0]  # [K, H, W]
        inside = masks > 0
        best = best * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        for s, c, m in zip(best.tolist(), (index % chances.shape[1]).tolist(), inside.cpu().numpy()):
            box = Image.fromarray(m).getbbox()                 # right and bottom edges are exclusive; None: empty
            if s > threshold and box:
                found[COCO[c]].append({"box": list(box), "score": s, "mask": m})
        return found

class Clip:
    """CLIP ViT-L/14: names the color of an object (GenEval), and how alike two pictures are (recon)."""
    def __init__(self, name, device):
        with loading(name) as transformers:
            self.model = load_model(transformers.CLIPModel, name, device)
            self.processor = transformers.CLIPProcessor.from_pretrained(name, backend="pil")     # torchvision's differs

    @torch.inference_mode()
    def images(self, images):
        """PIL -> [N, D]. Shorter side to 224, centre cut out: long objects lose their ends, as officially."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output.float().cpu()

    @functools.cache
    @torch.inference_mode()
    def texts(self, name):
        """A class's name -> [colors, templates, D]"""
        templates = ("a photo of a {} {name}", "a photo of a {}-colored {name}", "a photo of a {} object")
        texts = [t.format(c, name=name) for c in GENEVAL_COLORS for t in templates]
        tokens = self.processor(text=texts, padding=True, return_tensors="pt").to(self.model.device)
        features = self.model.get_text_features(**tokens).pooler_output.float().cpu()
        return features.reshape(len(GENEVAL_COLORS), 3, -1)

    def colors(self, image, objects, name):
        features = self.images([object_crop(image, o["mask"], o["box"]) for o in objects])
        return [GENEVAL_COLORS[i] for i in color_logits(self.texts(name), features).argmax(1)]

def geneval_replies(items, detector, clip):
    """Detector and CLIP in the role of a judge: the "reply" about an image is what was found in it, as JSON."""
    images, found, replies = [item.pictures[0].load() for item in items], {}, []
    for size in {image.size for image in images}:              # pictures of one size go through the detector together
        same = [k for k, image in enumerate(images) if image.size == size]
        found.update(zip(same, detector([images[k] for k in same])))
    for k, item in enumerate(items):
        metadata = json.loads(item.text)
        kept = {c: [f[i] for i in keep_detections(f, metadata["tag"])] for c, f in found[k].items()}
        correct, reason = geneval_decide(metadata, kept, lambda objects, name: clip.colors(images[k], objects, name))
        boxes = {c: [[*o["box"], round(o["score"], 4)] for o in objects] for c, objects in kept.items() if objects}
        replies.append(json.dumps({"correct": correct, "reason": reason, "details": boxes}))
    return replies

def geneval(out, args, problems):
    """GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): 553 prompts about objects, counts, colors, places.
    OUT/<index, 5 digits>/metadata.jsonl, OUT/<index>/samples/<digits>.png, 4 each. Official: mmdet 2's Mask2Former
    Swin-S, open_clip's ViT-L/14. Here: the same architectures in transformers, float32; Meta's detector weights."""
    rows, items, work = read_rows(args.prompts, "tag", "include", "prompt"), [], {}
    for path in sorted(out.iterdir()):
        if path.name.isdigit() and int(path.name) >= len(rows):
            problems.add("folder beyond the prompt file", path.name)
    for index, metadata in enumerate(rows[:args.limit]):
        folder = out / f"{index:05d}"
        for clause in metadata["include"] + metadata.get("exclude", []):
            name, _ = need(clause, ("class", "count"), args.prompts)
            require(name in COCO, f"{args.prompts}: unknown class {name!r}")
        if (own := folder / "metadata.jsonl").is_file() and common.read_json(own) != metadata:
            problems.add("metadata that is not the prompt file's", folder.name)
            continue
        before = len(items)
        for path in images_in(folder / "samples"):
            name = f"{folder.name}/{path.name}"
            if re.match(r"\d+\.png", path.name):
                items.append(Item(name, [Picture(path)], json.dumps(metadata, sort_keys=True), json.loads,
                                  prompt=metadata["prompt"], mark=lambda found: float(found["correct"])))
                work[name] = metadata["tag"], index
            else:
                problems.add("image that is not <digits>.png (ignored officially too)", name)
        if (n := len(items) - before) != args.samples:
            problems.add(f"prompt without its {args.samples} images", f"{folder.name} ({n})")

    def add_up(values):
        summary = geneval_summary([(*work[name], found["correct"]) for name, found in values.items()])
        columns = {column: summary["tasks"].get(tag) for tag, column in GENEVAL_TASKS.items()}
        more = {name: summary[name] for name in ("image_accuracy", "prompt_accuracy_any")}
        return percent({**columns, "Overall": summary["overall"], **more})
    return items, len(rows[:args.limit]) * args.samples, add_up

# ==== 5. Text to image, judged ========================================================================

def dpg_questions(rows):
    """Rows of dpg_bench.csv -> {item: {question id: (parents, category, question)}}. All of them: the official reader
    loses the first, and with it a prompt that depends on it."""
    items = {}
    for row in rows:
        parents = [int(p) for p in str(row["dependency"]).split(",") if int(p)]
        category, question = row["tuple"].split("(")[0].strip(), row["question_natural_language"]
        items.setdefault(row["item_id"], {})[int(row["proposition_id"])] = parents, category, question
    return items

def dpg_summary(items, answers):
    """answers: file -> one {question id: reply} per pass. Score = 100 x mean over files of the mean over passes. A
    question whose parent failed fails too. The walk is in file order: a zero passes down a chain, but a parent that
    stands after its child is not zeroed yet. A file with a dependency that does not exist has failed. Categories use
    the answers before zeroing, so they do not average to the score; officially those of the last pass only."""
    files, failed, fine = {}, [], []
    for name, passes in answers.items():
        scores, raw = [], []
        try:
            questions = items[name.split(".")[0].split("_")[0]]
            for replies in passes:
                final = {q: float(replies[q] == "yes") for q in questions}
                raw += [(questions[q][1], value) for q, value in final.items()]
                for q, (parents, _, _) in questions.items():
                    final[q] *= all(final[p] for p in parents)
                scores.append(mean(final.values()))
        except KeyError:
            failed.append(name)
        else:
            files[name] = {"passes": scores, "score": mean(scores)}
            fine += raw
    broad = [(category.split("-")[0].strip(), value) for category, value in fine]
    return {"files": files, "failed": failed, "score": percent(mean(f["score"] for f in files.values())),
            "category_l1": percent(means(sorted(broad))), "category_l2": percent(means(sorted(fine)))}

def dpg(out, args, problems):
    """DPG-Bench (Hu et al. 2024, github.com/TencentQQGYLab/ELLA): 1065 long prompts, 4 images each, yes/no questions.
    OUT/<name>.png, a 2 x 2 grid of samples of side --grid (what --generate writes), or OUT/<name>_<k>.png (RecA's; its
    scorer asks four times the same). Official judge: mPLUG-large VQA (ModelScope); a stand-in is stricter."""
    def read(text):
        rows = list(csv.DictReader(io.StringIO(text)))
        for row in rows or [{}]:
            need(row, ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language"), args.questions)
        return dpg_questions(rows)
    questions = dict(list(read_text(args.questions, read).items())[:args.limit])
    side, work = args.grid or 0, []                            # work: (path, prompt's name, number of the crop, crop)
    for path in images_in(out):
        (name, _, part), crops = path.stem.partition("_"), [None]
        require(part or side or args.samples == 1 or name not in questions,
                f"{path.name}: a grid of four samples? Give --grid SIDE; or --samples 1 if it is one sample")
        if name not in questions:
            if not args.limit:
                problems.add("image of no known prompt", path.name)
            continue
        if side and not part:
            crops = [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]
            if size_of(path) not in (None, (2 * side, 2 * side)):
                problems.add(f"image that is not a {2 * side} x {2 * side} grid", path.name)
                continue
        work += [(path, name, k, crop) for k, crop in enumerate(crops)]
    count = Counter(name for _, name, _, _ in work)
    for name in questions:
        if count[name] != args.samples:
            problems.add(f"prompt without its {args.samples} images", f"{name} ({count[name]})")

    def parse(reply):                                          # "Yes." -> yes, "No, it is not" -> no
        return (re.findall(r"^\W*(yes|no)\b", reply.strip().lower()) or [None])[0]
    items = [Item(f"{path.name}|{k}|{q}", [Picture(path, crop)], f"{question} Answer with one word, yes or no.",
                  parse, max_tokens=8, image_first=True, prompt=question, mark=lambda word: float(word == "yes"))
             for path, name, k, crop in work for q, (_, _, question) in questions[name].items()]

    def add_up(values):
        answers = defaultdict(list)
        for path, name, k, _ in work:                          # a sample counts when all its questions were answered
            replies = {q: values.get(f"{path.name}|{k}|{q}") for q in questions[name]}
            if all(replies.values()):
                answers[path.name].append(replies)
        summary = dpg_summary(questions, answers)
        for name in summary["failed"]:
            problems.add("prompt with a dependency that does not exist", name)
        return {"Score": summary["score"], **{k: summary[k] for k in ("category_l1", "category_l2")}}
    return items, args.samples * sum(map(len, questions.values())), add_up

WISE_GROUPS = ("Cultural", "Time", "Space", "Biology", "Physics", "Chemistry")

def parse_wise(reply):
    """-> {consistency, realism, aesthetic_quality}, 9.9 where not found (the official marker): one digit after the
    name, up to two asterisks on either side of it; of two the last. `**Realism:** 2` is not found."""
    found = {"consistency": 9.9, "realism": 9.9, "aesthetic_quality": 9.9}
    pattern = r"\*{0,2}(consistency|realism|aesthetic quality)\*{0,2}\s*[:：]?\s*(\d)"
    for name, digit in re.findall(pattern, reply, re.IGNORECASE):
        found[name.lower().replace(" ", "_")] = float(digit)
    return found

strict_wise = strict(parse_wise, lambda found: max(found.values()) <= 2)         # officially a 9.9 enters some means

def wise_score(consistency, realism, aesthetic_quality):
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2

def wise_summary(rows):
    """(prompt id, subcategory, consistency, realism, aesthetic quality) per image -> 0..1. Two overalls are in use: the
    plain mean of the six (RecA, BAGEL; it fits the paper's table) and the authors' weights."""
    def group(number, subcategory):                            # ids 1-400, 401-700, then hundreds
        if 400 < number <= 700:
            return "Time" if subcategory in ("Longitudinal time", "Horizontal time") else "Space"
        return "Cultural" if number <= 400 else WISE_GROUPS[3 + min((number - 701) // 100, 2)]
    parts = means(((group(*row[:2]), wise_score(*row[2:])) for row in rows), WISE_GROUPS)
    overall, weights = mean(parts.values()), (0.4, 0.167, 0.133, 0.1, 0.1, 0.1)
    weighted = None if overall is None else sum(w * parts[name] for w, name in zip(weights, WISE_GROUPS))
    return {"categories": parts, "overall": overall, "overall_weighted": weighted}

def wise(out, args, problems):
    """WISE (Niu et al. 2025, github.com/PKU-YuanGroup/WISE): 1000 prompts that need knowledge, OUT/<prompt_id>.png.
    --prompts: the folder with the three JSON lists, or one. --judge-prompt: the official gpt_eval.py, or a text with
    {prompt} and {explanation}. Official judge: gpt-4o-2024-05-13, temperature 0, up to 2000 tokens."""
    source = Path(args.prompts)
    files = [f for f in source.glob("*.json") if not f.stem.endswith("_rewrite")] if source.is_dir() else [source]
    rows = [row for f in files for row in read_rows(f, "Prompt", "Explanation", "Subcategory", "prompt_id")]
    rows = {str(row["prompt_id"]): row for row in sorted(rows, key=lambda row: row["prompt_id"])[:args.limit]}
    text, system = judge_prompt(args.judge_prompt, "explanation", "prompt")
    items = []
    for key, row in rows.items():
        question = text.replace("{prompt}", row["Prompt"]).replace("{explanation}", row["Explanation"])
        items.append(Item(key, [Picture(find_image(key, out))], question, strict_wise, system, 2000,
                          prompt=row["Prompt"], mark=lambda found: wise_score(**found)))

    def add_up(values):
        summary = wise_summary([(rows[k]["prompt_id"], rows[k]["Subcategory"], *v.values()) for k, v in values.items()])
        return {**summary["categories"], "Overall": summary["overall"], "weighted": summary["overall_weighted"]}
    return items, len(rows), add_up

COMPBENCH = {"color": "Color", "shape": "Shape", "texture": "Texture", "spatial": "Spatial",
             "non_spatial": "Non-Spatial", "numeracy": "Numeracy", "3d_spatial": "3D Spatial"}
COMPLEX = ("complex", "complex_action", "complex_spatial")     # together the column Complex

def parse_compbench(reply):
    """-> the integer after "score": in a JSON object, else the first such digits anywhere (12.5 -> 12), else -1."""
    text = reply.strip().replace("```json", "").replace("```", "").strip()
    if block := re.search(r'\{.*"score":\s*\d.*?\}', text, re.DOTALL):
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(block[0]).get("score"), int):
                return value
    found = re.search(r'"score":\s*"?(\d+)', reply)
    return int(found[1]) if found else -1

strict_compbench = strict(parse_compbench, lambda value: 0 <= value <= 100)      # officially -1 enters one of two means

def compbench(out, args, problems):
    """T2I-CompBench as the paper scores it (appendix F.4, after SRUM, github.com/WayneJin0918/SRUM): 2670 prompts.
    OUT/<category>/<Question_id>.png, or in <category>/samples/. The judge rates 0-100 how well the image fits; paper:
    Qwen2.5-VL-32B-Instruct, greedy, 512 tokens. Complex: the mean of three; Overall: of all ten (fits Table 12)."""
    text, _ = judge_prompt(args.judge_prompt, "prompt")
    rows, items, category = read_rows(args.prompts, "Question", "Category", "Question_id")[:args.limit], [], {}
    for row in rows:                                           # ids repeat between categories
        folder, key = out / row["Category"], f"{row['Category']}/{row['Question_id']}"
        category[key] = re.sub(r"[\s-]+", "_", row["Category"].strip().lower())
        require(category[key] in (*COMPBENCH, *COMPLEX), f"{args.prompts}: unknown category {row['Category']!r}")
        picture = Picture(find_image(row["Question_id"], folder, folder / "samples"))
        items.append(Item(key, [picture], text.replace("{prompt}", row["Question"]), strict_compbench, image_first=True,
                          prompt=row["Question"], mark=lambda value: value / 100))

    def add_up(values):
        ten = means(((category[k], v) for k, v in values.items()), (*COMPBENCH, *COMPLEX))
        return {**{COMPBENCH.get(name, name): value for name, value in ten.items()},
                "Complex": mean(ten[name] for name in COMPLEX), "Overall": mean(ten.values())}
    return items, len(rows), add_up

# ==== 6. Editing, judged ==============================================================================

IMGEDIT = {"background": "Bg.", "style": "Style", "adjust": "Adj.", "extract": "Ext.", "remove": "Rem.",
           "replace": "Rep.", "add": "Add", "compose": "Comp.", "action": "Act."}

def imgedit_ratings(reply):
    """Numbers on lines of the form "words: 4"; nothing else counts ("4.", "4/5", "**Name:** 4", "Name:4" do not)."""
    parts = [line.strip().split(": ") for line in reply.splitlines()]
    return [int(p[1]) for p in parts if len(p) == 2 and p[1].isdigit()]

# officially 0, 100 or another number of ratings pass
strict_imgedit = strict(imgedit_ratings, lambda ratings: len(ratings) == 3 and all(1 <= r <= 5 for r in ratings))

def imgedit_summary(types, ratings):
    """types: key -> edit type; ratings: key -> list. A type: the mean of its keys; overall: over *keys*, not types."""
    values = {key: round(mean(found), 2) for key, found in ratings.items() if found}
    table = means((types[k], v) for k, v in values.items() if k in types)
    table |= {"overall": mean(values.values())} if values else {}
    return values, {name: round(value, 2) for name, value in table.items()}

def imgedit(out, args, problems):
    """ImgEdit, single turn (Ye et al. 2025, github.com/PKU-YuanGroup/ImgEdit): 737 edits, OUT/<key>.png. The judge sees
    the text for the edit's type, source and result, and gives three ratings 1..5. Official judge: gpt-4.1-2025-04-14,
    default temperature. The paper's rows fit neither overall, by key or by type, exactly."""
    edits = dict(list(read_rows(args.prompts, "id", "prompt", "edit_type", kind=dict).items())[:args.limit])
    types = {key: edit["edit_type"] for key, edit in edits.items()}
    require(not (unknown := set(types.values()) - set(IMGEDIT)), f"{args.prompts}: unknown edit_type {unknown}")
    need(texts := read_rows(args.judge_prompt, kind=dict), set(types.values()), args.judge_prompt)
    items = [Item(key, [Picture(Path(args.sources) / edit["id"]), Picture(find_image(key, out))],
                  texts[types[key]].replace("<edit_prompt>", edit["prompt"]), strict_imgedit, max_tokens=1024,
                  temperature=None, prompt=edit["prompt"], mark=lambda ratings: (mean(ratings) - 1) / 4)
             for key, edit in edits.items()]

    def add_up(values):
        _, table = imgedit_summary(types, values)
        columns = {column: table.get(t) for t, column in IMGEDIT.items()}
        return {**columns, "Ovr.": table.get("overall"), "by_type": mean(table.get(t) for t in IMGEDIT)}
    return items, len(edits), add_up

GEDIT_GROUPS = ("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change",
                "subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer")

def repair_json(text):
    """VIEScore's repair: quote bare keys, quote bare values, numbers become lists of one."""
    def value(match):
        content = match[2].strip()
        if re.fullmatch(r"-?\d+(\.\d+)?", content):
            content = f"[{content}]"
        elif content.lower() not in ("true", "false", "null"):
            content = f'"{content}"'
        return f"{match[1]}: {content}{match[3]}"
    return re.sub(r'(".*?"):(.*?)([,}])', value, re.sub(r"(\w+):", r'"\1":', text))

def parse_gedit(reply):
    """-> score list, its minimum, error: VIEScore's rules for a first try. Between two delimiters, else from the first
    { to the last }; without braces a bare [a, b] or an integer 0..10. Values are not checked: 11 and 6.5 pass. (On its
    second try the official code replaces a reply without braces by a random number; we never guess.)"""
    parts, start, end, text = reply.split("||V^=^V||"), reply.find("{"), reply.rfind("}") + 1, ""
    if reply == "rate_limit_exceeded":
        return None, None, reply
    if len(parts) == 3:
        text = parts[1]
    elif start >= 0 and end:
        text = reply[start:end]
    elif bare := re.fullmatch(r"(\[\d+, ?\d+\])\n?", reply[reply.find("["):reply.rfind("]") + 1]):
        text = '{"score": ' + bare[1] + "}"
    else:
        with contextlib.suppress(ValueError):
            text = '{"score": %d}' % int(reply) if 0 <= int(reply) <= 10 else ""
    text, found = text.strip().replace("\n", ""), None
    try:
        try:
            found = json.loads(text)["score"]
            found = found if isinstance(found, list) else [found]
        except (ValueError, KeyError, TypeError):
            found = json.loads(repair_json(text))["score"]
        lowest = min(found)
    except (ValueError, KeyError, TypeError) as error:
        return found, None, "unparsed" if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return (found, lowest, None) if isinstance(lowest, (int, float)) else (found, None, "not a number")

strict_gedit = strict(parse_gedit, lambda parsed: not parsed[2] and len(parsed[0]) == 2 and all(
    type(value) in (int, float) and 0 <= value <= 10 for value in parsed[0]))

def gedit_summary(rows, language="en"):
    """rows: (group, language, intersection, SC, PQ). O = sqrt(SC x PQ) per edit; table = mean of the 11 groups."""
    rows, tables = [row for row in rows if row[1] == language], {}
    for suffix, part in (("", rows), ("_intersection", [row for row in rows if row[2]])):
        columns = (("SC", "avg_semantics", lambda sc, pq: sc), ("PQ", "avg_quality", lambda sc, pq: pq),
                   ("overall", "avg_overall", lambda sc, pq: (sc * pq) ** 0.5))
        for name, average, value in columns:
            groups = means(((row[0], value(*row[3:])) for row in part), GEDIT_GROUPS)
            tables[name + suffix] = {**groups, average: mean(groups.values())}
    return tables

def gedit(out, args, problems):
    """GEdit-Bench-EN (Liu et al. 2025, data set stepfun-ai/GEdit-Bench): 11 groups of edits, the English rows.
    OUT[/gen_image]/fullset/<task_type>/en/<key>.png, the source as <key>_SRCIMG.png. --prompts: the data set as JSON
    lines. VIEScore, the lower of two ratings 0..10: SC sees source and result (resized to the source), PQ the result
    alone; as JPEG. Official judge: gpt-4.1-2025-04-14, 1400 tokens."""
    rows = read_rows(args.prompts, "key", "task_type", "instruction", "instruction_language")
    rows = [row for row in rows if row["instruction_language"] == "en"][:args.limit]
    texts = {ast.unparse(node.targets[0]): node.value.value for node in read_text(args.judge_prompt, ast.parse).body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)}
    context, rule, sc, pq = need(texts, ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule",
                                         "_prompts_0shot_tie_rule_SC", "_prompts_0shot_rule_PQ"), args.judge_prompt)
    items = []
    for row in rows:
        key, task, edit = row["key"], row["task_type"], row["instruction"]
        require(task in GEDIT_GROUPS, f"{args.prompts}: unknown task_type {task!r}")
        folders = [root / "fullset" / task / "en" for root in (out, out / "gen_image")]
        source, result = find_image(f"{key}_SRCIMG", *folders), find_image(key, *folders)
        pictures = [Picture(source, jpeg=True), Picture(result, size=size_of(source), jpeg=True)]
        shared = dict(parse=strict_gedit, temperature=None, max_tokens=1400 if args.judge_url else 512,
                      image_first=not args.judge_url, prompt=edit, mark=lambda parsed: parsed[1] / 10)
        sc_text, pq_text = f"{context}\n{rule}\n{sc}".replace("<instruction>", edit), f"{context}\n{pq}"
        items += [Item(f"{key}|SC", pictures, sc_text, **shared), Item(f"{key}|PQ", pictures[1:], pq_text, **shared)]

    def add_up(values):
        both = [(row["task_type"], "en", bool(row.get("Intersection_exist")), *(value[1] for value in pair))
                for row in rows if all(pair := [values.get(f"{row['key']}|{side}") for side in ("SC", "PQ")])]
        table = gedit_summary(both)
        return {"SC": table["SC"]["avg_semantics"], "PQ": table["PQ"]["avg_quality"],
                "Overall": table["overall"]["avg_overall"], "groups": table}
    return items, len(items), add_up

# ==== 7. Understanding: strings against strings =======================================================
# A benchmark of strings is a function of the arguments -> its questions {question_id, image, text, answer or label ...}
# and add_up([(question, reply)]) -> {column: value}, with whatever else scores.json shall hold.

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

def pope_prediction(reply):
    """First sentence, commas out, split at single blanks: "no" if No, no or not is a word, else yes (NO, None too)."""
    return "no" if {"No", "no", "not"} & set(reply.split(".")[0].replace(",", "").split(" ")) else "yes"

def pope_metrics(labels, predictions):
    """Positive is yes. Where a quotient has no denominator the official script stops; here it is 0."""
    pairs, n = Counter(zip(predictions, labels)), max(1, len(labels))
    tp, fp, fn, tn = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"], pairs["no", "no"]
    return {"accuracy": (tp + tn) / n, "precision": tp / max(1, tp + fp), "recall": tp / max(1, tp + fn),
            "yes_ratio": (tp + fp) / n, "f1": 2 * tp / max(1, 2 * tp + fp + fn)}

def pope(args):
    """POPE (Li et al. 2023, github.com/RUCAIBox/POPE): accuracy and F1 are means over the three categories.
    --questions: llava_pope_test.jsonl; --labels: folder of coco_pope_<category>.json, paired with it by position."""
    rows = read_rows(args.questions, "question_id", "image", "text", "category")
    require(args.prepare or args.labels, "pope needs --labels DIR with coco_pope_random.json, _popular, _adversarial")
    for category, mine in grouped((row["category"], row) for row in rows).items() if args.labels else ():
        labels = common.read_json(path := Path(args.labels) / f"coco_pope_{category}.json", lines=True)
        fits = len(mine) == len(labels) and all(a["image"] == b.get("image", a["image"]) for a, b in zip(mine, labels))
        require(fits, f"{path}: its rows are not those of {args.questions} (number or images differ)")
        for row, label in zip(mine, labels):
            row["label"], = need(label, ("label",), path)

    def add_up(pairs):
        groups = grouped((row["category"], (row["label"], pope_prediction(reply))) for row, reply in pairs)
        parts = {category: pope_metrics(*zip(*group)) for category, group in groups.items()}
        accuracy, f1 = (percent(mean(part[key] for part in parts.values())) for key in ("accuracy", "f1"))
        return {"POPE (Acc)": accuracy, "POPE (F1)": f1, **parts}
    return rows, add_up

MME_GROUPS = {"perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
                             "artwork", "OCR"),
              "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")}
MME_TASKS = [task for group in MME_GROUPS.values() for task in group]

def mme_prediction(reply):
    """Clean, then yes, else no, within the first four characters; else "other", which is wrong."""
    reply = reply.replace("\n", "").replace("不是", "no").replace("是", "yes").replace("否", "no").lower()
    reply = re.sub(r"[\u4e00-\u9fa5]", "", reply.replace("true", "yes").replace("false", "no"))
    return next((word for word in ("yes", "no") if word in reply[:4]), "other")

def mme_task(rows):
    """(label, prediction), two per image in turn -> 100 x accuracy + 100 x share of images with both right."""
    right = [label.lower() == prediction for label, prediction in rows]
    return 100 * mean(right) + 100 * mean(a and b for a, b in zip(right[::2], right[1::2])) if rows else None

def mme(args):
    """MME (Fu et al. 2023): two questions an image. The paper's column is the perception sum (max 2000). --questions:
    folder of 14 <task>.txt: image, question, Yes/No, by tabs. --images: where the images' folders are."""
    rows = []
    for task in MME_TASKS:
        for number, line in enumerate(read_text(file := Path(args.questions) / f"{task}.txt").splitlines()):
            image, question, label = (*line.strip().split("\t"), None, None)[:3]
            require(label in ("Yes", "No"), f"{file}: line {number + 1} is not image, question, Yes/No")
            inner = (Path(args.images or "") / task / "images" / image).exists()
            rows.append({"question_id": f"{task}/{number}", "image": f"{task}/{'images/' if inner else ''}{image}",
                         "text": f"{question} {SHORT}", "pair": (task, number // 2), "label": label})

    def add_up(pairs):
        images = grouped((row["pair"], (row["label"], mme_prediction(reply))) for row, reply in pairs)
        answers = grouped((task, answer) for (task, _), both in images.items() if len(both) == 2 for answer in both)
        tasks = {task: mme_task(answers[task]) for task in MME_TASKS}
        sums = {name: None if None in (values := [tasks[t] for t in group]) else sum(values)
                for name, group in MME_GROUPS.items()}
        return {"MME": sums["perception"], **sums, "tasks": tasks}
    return rows, add_up

def gqa_correct(reply, gold):
    """Equal after lower-casing and stripping; "white." is wrong. gold: a string or several."""
    return reply.strip().lower() in [g.strip().lower() for g in ([gold] if isinstance(gold, str) else gold)]

def gqa(args):
    """GQA, testdev balanced (Hudson & Manning 2019): exact match. --questions: testdev_balanced_questions.json, or rows
    of question_id, image, text, answer."""
    rows = read_rows(args.questions, kind=(dict, list))
    if isinstance(rows, dict):
        rows = [{"question_id": key, "image": f"{row.get('imageId')}.jpg",
                 "text": f"{need(row, ('question',), args.questions)[0]} {SHORT}", **row} for key, row in rows.items()]
    return rows, lambda pairs: {"GQA": percent(mean(gqa_correct(reply, row["answer"]) for row, reply in pairs))}

def mmmu_choice(reply, options):
    """MMMU's own rule: letters in brackets, else between blanks, else an option's text where the reply has more than
    five words; of several the last. None where the official code draws at random: we count that as wrong."""
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    for find in (lambda k: reply.rfind(f"({k})"), lambda k: reply.rfind(f" {k} "),
                 lambda k: reply.lower().rfind(options[k].lower()) if len(reply.split()) > 5 else -1):
        if places := {k: find(k) for k in options if find(k) >= 0}:
            return max(places, key=places.get)

def mmmu_short(reply, options):
    """BAGEL's rule: one character as it is; nothing is C; a leading option letter; an option's text."""
    reply = reply.strip()
    if len(reply) <= 1:
        return reply or "C"
    return reply[0] if reply[0] in options else next((k for k, text in options.items() if text in reply), reply)

def normal_answers(text):
    """A number with two decimals; a character with a blank on either side, so that it does not match inside a word."""
    text = str(text).strip()
    with contextlib.suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    return [" " + text.lower(), text.lower() + " "] if len(text) == 1 else [text.lower()]

def mmmu_open(reply, gold):
    """Open questions: what stands behind the last cue word, and every number in it; a gold string must be contained, a
    gold number equal."""
    reply, tails = reply.strip().strip("."), []
    sentences = re.split(r"\.\s(?=[A-Z])|\n", reply.lower())
    for number, sentence in enumerate(sentences):
        cues = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
        tail = ""
        for cue in cues + ["="] * (number == len(sentences) - 1):
            said = sentence.split(cue)[-1].strip() if cue in sentence else tail
            tail = said if not tail or len(said) < len(tail) else tail         # the shortest; any replaces an empty one
        tails += [tail] if tail and tail not in set(":,.!?;'") else []
    tails = tails or [reply.lower()]
    patterns = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",     # 1,200; 2e-3; plain
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
    numbers = [n for tail in tails for pattern in patterns for n in re.findall(pattern, tail)]
    said = [a for text in tails + numbers for a in normal_answers(text)]
    gold = [a for g in (gold if isinstance(gold, list) else [gold]) for a in normal_answers(g)]
    return any(g in s if isinstance(s, str) and isinstance(g, str) else g == s for s in said for g in gold)

def with_options(question, options):
    return question.strip() + "".join(f"\n{k}. {o}" for k, o in options.items()) + f"\n{LETTER if options else SHORT}"

def mmmu(args):
    """MMMU validation (Yue et al. 2024): accuracy over questions, by MMMU's own parser; `short` by BAGEL's.
    --questions: the rows: id, question, options (a list, or its text as released), answer, image or image_1."""
    rows = read_rows(args.questions, "id", "question", "options", "answer")
    for row in rows:
        options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
        row["options"] = {chr(65 + i): str(option).strip() for i, option in enumerate(options)}
        row |= {"question_id": row["id"], "image": row.get("image") or row.get("image_1"),
                "text": with_options(row["question"], row["options"])}

    def right(row, reply, choose):
        return choose(reply, row["options"]) == row["answer"] if row["options"] else mmmu_open(reply, row["answer"])
    return rows, lambda pairs: {name: percent(mean(right(*pair, choose) for pair in pairs))
                                for name, choose in (("MMMU", mmmu_choice), ("short", mmmu_short))}

def seed(args):
    """SEED-Bench, images (Li et al. 2023). No official code for free answers: MMMU's rule, no letter is wrong.
    --questions: SEED-Bench.json, of which the image part counts."""
    rows, = need(read_rows(args.questions, kind=dict), ("questions",), args.questions)
    rows = [row for row in rows if row.get("data_type", "image") == "image"]
    for row in rows:
        names = ("data_id", "question", "choice_a", "choice_b", "choice_c", "choice_d")
        row["image"], question, *choices = need(row, names, args.questions)
        row["options"] = dict(zip("ABCD", choices))
        row["text"] = with_options(question, row["options"])

    def add_up(pairs):
        right = [(str(r.get("question_type_id")), mmmu_choice(a, r["options"]) == r["answer"]) for r, a in pairs]
        return percent({"SEED": mean(value for _, value in right), **means(sorted(right))})
    return rows, add_up

def understanding(out, args, problems):
    """--prepare writes the questions for --describe; otherwise the answer file `out` is compared with the answers."""
    (listed, add_up), replies = BENCHMARKS[args.benchmark].work(args), {}
    listed = listed[:args.limit]
    rows = {str(need(row, ("question_id", "image", "text"), args.questions)[0]): row for row in listed}
    if args.prepare:
        asked = [{"question_id": k, "image": row["image"], "text": row["text"]} for k, row in rows.items()]
        common.write(args.prepare, asked)
        return print(f"{len(rows)} questions in {args.prepare}, for a script's --describe")
    require(len(rows) == len(listed) and all("answer" in row or "label" in row for row in listed),
            f"{args.questions}: question ids that repeat, or questions without their answer")
    for number, row in enumerate(common.read_json(out, lines=True), 1):
        require(isinstance(row, dict) and isinstance(row.get("answer"), str), f"{out}: line {number} has no \"answer\"")
        key = str(row.get("question_id", row.get("id")))
        if key not in rows or key in replies:
            problems.add("question answered twice" if key in replies else "answer to no known question", key)
        replies.setdefault(key, row["answer"])                 # the first counts
    for key in rows:
        if key not in replies:
            problems.add("question without an answer", key)
    pairs = [(row, replies[key]) for key, row in rows.items() if key in replies]
    return add_up(pairs), len(pairs), len(rows)

# ==== 8. Reconstruction, the toy world ================================================================

def psnr(a, b):
    """uint8 [H, W, 3] twice -> dB; equal pictures: 100 (infinity is not JSON)."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255 ** 2 / error)) if error > 255 ** 2 * 1e-10 else 100.0

def ssim(a, b):
    """Structural similarity (Wang et al. 2004), uint8 [H, W, 3] twice: 11 x 11 Gaussian of width 1.5, no border."""
    kernel = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))

    def blur(x):
        for axis in (0, 1):                                    # the window is a product: two passes, 11 each
            x = np.lib.stride_tricks.sliding_window_view(x, 11, axis) @ (kernel / kernel.sum())
        return x
    a, b = a.astype(float), b.astype(float)
    c1, c2, ma, mb = (0.01 * 255) ** 2, (0.03 * 255) ** 2, blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return float(np.mean((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))))

def likeness(source, result, clip):
    """The source's centre is cut to the result's aspect ratio and resized to its size, then the two are compared."""
    if min(result.size) < 11:
        return None
    source = ImageOps.fit(source, result.size, Image.BICUBIC)
    a, b = np.asarray(source), np.asarray(result)
    cosine = {"CLIP": float(F.cosine_similarity(*clip.images([source, result]), dim=0))} if clip else {}
    return {"PSNR": psnr(a, b), "SSIM": ssim(a, b), **cosine}

def with_sources(out, args, prefix="", **options):
    """An item per image of --sources and its namesake in OUT (of whatever suffix)."""
    names = [path.relative_to(args.sources) for path in images_in(args.sources, "**/*")][:args.limit]
    require(names, f"{args.sources}: no image in it")

    def namesake(name):
        """cat.jpg.png where there was a cat.png as well, else cat.png."""
        whole = out / f"{name}.png"
        return whole if whole.is_file() else find_image(name.with_suffix(""), out)

    return [Item(f"{prefix}{name}", [Picture(args.sources / name), Picture(namesake(name))], "",
                 json.loads, prompt=str(name), **options) for name in names]

def recon(out, args, problems):
    """Reconstructions OUT/<name>.png against --sources/<name>.*: PSNR, SSIM, CLIP similarity (unless --clip none). The
    paper shows pictures only (figures 16, 17). Pixel measures are *expected* to be low: RecA reconstructs what the
    understanding encoder says, not pixels."""
    items = with_sources(out, args, failure="picture smaller than SSIM's window")

    def add_up(values):
        return {**means(pair for row in values.values() for pair in row.items()), "images": values}
    return items, len(items), add_up

SHAPE_COLUMNS = {"single_object": "Single", "two_object": "Two", "colors": "Color", "position": "Position",
                 "color_attribution": "Attri.", "overall": "Overall", "reconstruction": "Recon."}

def shapes(out, args, problems):
    """The toy world (common.py, section 7): pictures are read back exactly, so there is no detector and no error.
    --prompts: the caption file of --generate, OUT/<line, 5 digits>[_k].png. All: everything said is there; GenEval-like
    columns need captions of one and of two objects that say everything. --sources: all must come back as it was.
    Neither: OUT is a finished run of --model tiny, whose own scores.json is read: what training led to or, in a row
    that is labelled `before` (or `GROUP: before`, see in_groups), what it began with."""
    require(args.prompts or args.sources, "shapes needs --prompts captions.txt, --sources DIR, or runs of --model tiny")
    words = common.PLACES, common.SHAPES, tuple(common.COLORS)
    lines = [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()] if args.prompts else []
    items, scenes = [], {}
    for i, line in enumerate(lines[:args.limit]):              # -> (place, shape, color) per object, None: not said
        scene = [tuple(next((k for k, word in enumerate(kind) if word in part.split()), None) for kind in words)
                 for part in line.split(" and ")]
        require(all(said[1] is not None for said in scene), f"{args.prompts}: {line!r} is not a toy world's caption")
        for path in sorted(out.glob(f"{i:05d}_*.png")) or [find_image(f"{i:05d}", out)]:
            scenes[path.name] = scene, path
            items.append(Item(path.name, [Picture(path)], line, json.loads, prompt=line,
                              mark=lambda seen, scene=scene: float(shows(seen[0], scene))))
    sources = with_sources(out, args, "source ", mark=lambda s: float(s[0] == s[1])) if args.sources else []

    def add_up(values):
        made = [(*scenes[k], seen[0]) for k, seen in values.items() if k in scenes]
        whole = [(scene, load_image(path)) for scene, path, _ in made if not any(None in said for said in scene)]
        both = {1, 2} <= {len(scene) for scene, _ in whole}
        tasks = common.score_generations(*zip(*whole)) if both else {}
        columns = {column: tasks.get(task) for task, column in SHAPE_COLUMNS.items()}
        columns["All"] = mean(shows(seen, scene) for scene, _, seen in made)
        columns["Recon."] = mean(seen[0] == seen[1] for k, seen in values.items() if k not in scenes)
        return percent(columns)
    return items + sources, len(items) + len(sources), add_up

def shows(seen, scene):
    """Each object of the scene, as far as it was said, is there."""
    return all(any(all(want in (None, have) for want, have in zip(a, b)) for b in seen) for a in scene)

# ==== 9. Tables, and a picture to look at =============================================================

# the function, the columns as in the paper, their decimals, the official judge
Benchmark = namedtuple("Benchmark", "work columns decimals judge", defaults=(1, None))
BENCHMARKS = {
    "geneval": Benchmark(geneval, (*GENEVAL_TASKS.values(), "Overall")),
    "dpg": Benchmark(dpg, ("Score",), 2, "mPLUG-large VQA"),
    "wise": Benchmark(wise, (*WISE_GROUPS, "Overall"), 2, "gpt-4o-2024-05-13"),
    "compbench": Benchmark(compbench, (*COMPBENCH.values(), "Complex", "Overall"), 2, "Qwen/Qwen2.5-VL-32B-Instruct"),
    "imgedit": Benchmark(imgedit, (*IMGEDIT.values(), "Ovr."), 2, "gpt-4.1-2025-04-14"),
    "gedit": Benchmark(gedit, ("SC", "PQ", "Overall"), 2, "gpt-4.1-2025-04-14"),
    "pope": Benchmark(pope, ("POPE (Acc)", "POPE (F1)")),
    "mme": Benchmark(mme, ("MME",), 0),
    "gqa": Benchmark(gqa, ("GQA",)),
    "mmmu": Benchmark(mmmu, ("MMMU",)),
    "seed": Benchmark(seed, ("SEED",)),
    "recon": Benchmark(recon, ("PSNR", "SSIM", "CLIP"), 4),
    "shapes": Benchmark(shapes, (*SHAPE_COLUMNS.values(), "All"), 0),
}

def summarize(label, seeds, columns):
    """Seeds of one row -> mean and sample standard deviation of each column; None if a seed lacks it."""
    values = {c: [s["values"].get(c) for s in seeds] for c in columns}
    row = {"label": label, "seeds": seeds, "mean": {c: mean(v) for c, v in values.items()}}
    if len(seeds) > 1:
        row["std"] = {c: None if None in v else statistics.stdev(v) for c, v in values.items()}
    n, expected = (sum(s[key] for s in seeds) for key in ("n", "expected"))
    return {**row, "n": n, "expected": expected, "partial": n < expected or any(s["problems"] for s in seeds)}

def in_groups(rows):
    """{"Harmon": [rows labelled "Harmon: before", "Harmon: RecA", ...]}; the group of a label without ": " is ""."""
    return grouped((row["label"].rpartition(": ")[0], row) for row in rows)

def markdown(rows, columns, d):
    """d decimals; a group's first row is its baseline; in brackets the differences of the printed numbers."""
    def cell(row, first, c):
        value, base = row["mean"][c], first["mean"][c]
        if value is None:
            return "–"
        text = f"{value:.{d}f}" + (f" ± {row['std'][c]:.{d}f}" if "std" in row else "")
        return text if row is first or base is None else f"{text} ({round(value, d) - round(base, d):+.{d}f})"
    table = [["Model", *columns], ["---"] * (len(columns) + 1)]
    table += [[row["label"] + " (partial)" * row["partial"], *(cell(row, group[0], c) for c in columns)]
              for group in in_groups(rows).values() for row in group]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in table)

def chart(rows, columns, height=200, bar=12):
    """Rows as a picture: a cluster of bars per column, a bar per row, on it a line of one deviation up and down."""
    def of(row, column):
        return row["mean"][column] or 0, (row.get("std") or {}).get(column) or 0

    top, group = max([sum(of(row, c)) for row in rows for c in columns] + [1e-9]), max(64, bar * len(rows) + 24)
    image = Image.new("RGB", (group * len(columns) + 40, height + 66 + 16 * len(rows)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for k, column in enumerate(columns):
        best = max(of(row, column)[0] for row in rows)
        draw.text((20 + k * group, height + 16), f"{column}\nto {best:.3g}", "black", font)
        for r, row in enumerate(rows):
            color = ("#9e9e9e", "#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a", "#c62828", "#00838f", "#5d4037")[r % 8]
            value, spread = (height * part / top for part in of(row, column))
            x, base = 20 + k * group + r * bar, height + 10
            draw.rectangle((x, base - value, x + bar - 2, base), color)
            middle = x + bar // 2 - 1
            draw.line((middle, base - value - spread, middle, base - max(0, value - spread)), "black")
            if k == 0:
                draw.text((20, height + 54 + 16 * r), row["label"], color, font)
    return image

def parse_outputs(arguments):
    """[LABEL=]PATH[,PATH ...] -> [(label, [paths])]. A folder with seed<n> folders in it stands for these."""
    rows = {}
    for argument in arguments:
        label, _, rest = argument.rpartition("=") if not Path(argument).exists() else ("", "", argument)
        paths = [Path(p) for p in ([rest] if Path(rest).exists() else rest.split(","))]
        for path in paths:
            require(path.exists(), f"no such folder or file: {path}")
        paths = sorted(p for p in paths[0].glob("seed*") if p.is_dir() and len(paths) == 1) or paths
        require((label or rest) not in rows, "two rows have the same name; give LABEL=PATH")
        rows[label or rest] = paths
    return list(rows.items())

def toy_run(path, label):
    """scores.json of a run of --model tiny (see shapes)."""
    scores = common.read_json(path / "scores.json").get("before" if label.rpartition(": ")[2] == "before" else "after")
    require(isinstance(scores, dict), f"{path} is not a finished run of --model tiny")
    values = percent({column: scores.get(name) for name, column in SHAPE_COLUMNS.items()})
    return {"folder": str(path), "values": values, "n": 1, "expected": 1, "problems": Problems()}

def score(path, label, args, judge):
    """One folder, or one answer file, of the row `label`."""
    if args.benchmark == "shapes" and not (args.prompts or args.sources) and (path / "scores.json").is_file():
        return toy_run(path, label)
    problems, strings = Problems(), args.benchmark in STRINGS.split()
    wanted = "an answer file" if strings else "a folder of pictures"
    require(path.is_dir() != strings, f"{path}: {args.benchmark} wants {wanted}")
    if strings:
        values, n, expected = understanding(path, args, problems)
    else:
        items, expected, add_up = BENCHMARKS[args.benchmark].work(path, args, problems)
        judged = judge_all(path, items, problems, args, judge)
        values, n = add_up(judged), len(judged)
    problems.stop(args.strict)
    return {"folder": str(path), "values": values, "n": n, "expected": expected, "problems": problems}

def run(args):
    """Score every folder, print the table, write scores.json and scores.md."""
    benchmark, judge = BENCHMARKS[args.benchmark], functools.cache(lambda: make_judge(args))     # when first needed
    if args.benchmark in STRINGS.split() and args.prepare:
        return understanding(None, args, Problems())
    outputs = parse_outputs(args.outputs)
    rows = []
    for label, paths in outputs:
        rows.append(summarize(label, [score(path, label, args, judge) for path in paths], benchmark.columns))
    columns = benchmark.columns
    if args.benchmark == "shapes":                             # runs, captions and sources have different columns
        columns = [c for c in columns if any(row["mean"][c] is not None for row in rows)]
    text = [f"# {args.benchmark}", "", markdown(rows, columns, benchmark.decimals), ""]
    name = None if args.benchmark in STRINGS.split() else judge_name(args)
    if benchmark.judge:
        other = "" if name == benchmark.judge else f" The paper's is {benchmark.judge}: do not compare."
        text += [f"Judge: {name} ({'endpoint' if args.judge_url else 'local'}).{other}", ""]
    for row in rows:
        if row["partial"] or args.limit:
            limit = f" (--limit {args.limit})" if args.limit else ""
            text.append(f"{row['label']}: {row['n']} of {row['expected']} scored{limit}")
        text += [f"- {seed['folder']}: {line}" for seed in row["seeds"] for line in seed["problems"].lines()]
    print(text := "\n".join(text).strip())
    record = {"benchmark": args.benchmark, "judge": name, "columns": benchmark.columns, "rows": rows}
    last = outputs[-1][1][-1]
    folder = Path(args.out or (last if last.is_dir() else last.parent) / "eval" / args.benchmark)
    common.write(folder / "scores.json", record)
    common.write(folder / "scores.md", text + "\n")
    panels = [chart(group, columns) for group in in_groups(rows).values()]
    width, height = (max(panel.size[k] for panel in panels) for k in (0, 1))
    picture = Image.new("RGB", (width * min(2, len(panels)), height * -(-len(panels) // 2)), "white")    # two a line
    for k, panel in enumerate(panels):
        picture.paste(panel, (k % 2 * width, k // 2 * height))
    common.write(folder / "scores.png", picture)
    print(folder / "scores.json", folder / "scores.md", folder / "scores.png", file=sys.stderr)

def contact_sheet(args):
    """One picture of the pictures in OUTPUTS with their prompts, framed green (right), red (failed, missing) or grey.
    Marks and prompts come from OUT/eval/*/items.jsonl (mean mark below 0.5: failed), else GenEval's metadata.jsonl."""
    tiles = []                                                 # (path, prompt, mark or None)
    for label, out in [(label, path) for label, paths in parse_outputs(args.outputs) for path in paths]:
        marks, prompts = defaultdict(list), {}
        for line in [line for file in sorted(out.glob("eval/*/items.jsonl")) for line in read_text(file).split("\n")]:
            with contextlib.suppress(ValueError):              # a torn last line
                record = json.loads(line)
                marks[record["file"]] += [record["mark"]] if record["mark"] is not None else []
                prompts[record["file"]] = record["prompt"]
        files = {os.path.relpath(path, out) for path in images_in(out, "**/*")} | prompts.keys()
        for file in sorted(file for file in files if Path(file).parts[0] not in ("eval", "..")):
            meta = (out / file).parent.parent / "metadata.jsonl"
            if file not in prompts and meta.is_file():
                prompts[file] = common.read_json(meta).get("prompt")
            prompt = f"[{label}] " * (len(args.outputs) > 1) + (prompts.get(file) or file)
            tiles.append((out / file, prompt, mean(marks[file])))
    require(tiles, "no image in " + ", ".join(args.outputs))
    failures = [tile for tile in tiles if tile[2] is not None and tile[2] < 0.5]
    tiles = failures if args.failed else tiles
    shown, side, columns = tiles[:args.limit or 60], args.cell, args.columns
    rows = -(-max(1, len(shown)) // columns)
    sheet = Image.new("RGB", (min(columns, len(shown) or 1) * (side + 12), rows * (side + 56)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, (path, prompt, mark) in enumerate(shown):
        x, y = k % columns * (side + 12) + 3, k // columns * (side + 56) + 3
        try:
            image = ImageOps.pad(load_image(path), (side, side), color="white")
        except UNREADABLE:
            image, mark, prompt = Image.new("RGB", (side, side), "white"), 0.0, f"missing or unreadable: {prompt}"
        color = "#999999" if mark is None else "#c62828" if mark < 0.5 else "#2e7d32"
        sheet.paste(ImageOps.expand(image, 3, color), (x, y))
        words = textwrap.wrap(prompt, max(1, side // 6), max_lines=3)
        draw.text((x + 3, y + side + 7), "\n".join(words), "black", font, spacing=2)
    target = Path(args.out or out / "eval" / "contact_sheet.png")
    common.write(target, sheet)
    print(f"{target}: {len(shown)} of {len(tiles)} images, {len(failures)} marked as failed")

# ==== 10. The command line ============================================================================

JUDGED, STRINGS, OWN = "dpg wise compbench imgedit gedit", "pope mme gqa mmmu seed", "geneval recon shapes"
OPTIONS = (                                                    # flag, sub-commands (!: required), words
    ("--prompts", "geneval! wise! compbench! imgedit! gedit! shapes", dict(help="prompts or metadata, as released")),
    ("--judge-prompt", "wise! compbench! imgedit! gedit!", dict(help="the judge's text: a file, or the official .py")),
    ("--sources", "imgedit! recon! shapes", dict(type=Path, help="folder of the source images")),
    ("--samples", "geneval dpg", dict(type=int, default=4, help="images per prompt (4; starred rows: 12)")),
    ("--detector", "geneval", dict(default="facebook/mask2former-swin-small-coco-instance")),
    ("--clip", "geneval recon", dict(default="openai/clip-vit-large-patch14")),
    ("--questions", "dpg! pope! mme! gqa! mmmu! seed!", dict(help="the benchmark's questions, as released")),
    ("--grid", "dpg", dict(type=int, metavar="SIDE", help="<name>.png is a 2 x 2 grid of such samples")),
    ("--prepare", STRINGS, dict(metavar="FILE", help="write the question file for --describe instead of scoring")),
    ("--labels", "pope", dict(help="folder of the coco_pope_*.json")),
    ("--images", "mme", dict(help="folder of the images, to write their paths")),
    ("--judge", JUDGED, dict(help="model: hub id or folder; with --judge-url its name there")),
    ("--judge-url", JUDGED, dict(help="OpenAI-compatible endpoint, https://host/v1; the key from OPENAI_API_KEY")),
    ("--workers", JUDGED, dict(type=int, default=8, help="requests at a time (8)")),
    ("--rate", JUDGED, dict(type=float, help="requests a minute, at most")),
    ("--retries", JUDGED, dict(type=int, default=5, help="after 429, 5xx, time-outs (5)")),
    ("--timeout", JUDGED, dict(type=float, default=120, help="seconds for one reply (120)")),
    ("--reask", JUDGED, dict(type=int, default=2, help="more tries where a reply cannot be read (2)")),
    ("--device", f"{JUDGED} {OWN}", dict(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")),
    ("--batch", f"{JUDGED} {OWN}", dict(type=int, help="of a local model (default: 8 on a GPU, 1 on a CPU)")),
    ("--strict", f"{JUDGED} {OWN} {STRINGS}", dict(action="store_true", help="what would be left out is an error")),
    ("--columns", "contact-sheet", dict(type=int, default=6)),
    ("--cell", "contact-sheet", dict(type=int, default=192, help="width of a picture")),
    ("--failed", "contact-sheet", dict(action="store_true", help="only the failed ones")),
    ("--limit", f"{JUDGED} {OWN} {STRINGS} contact-sheet", dict(type=int, help="only the first N")),
    ("--out", f"{JUDGED} {OWN} {STRINGS} contact-sheet", dict(help="where results go (default: eval/ in OUTPUTS)")),
)

def main(argv=None):
    def command():
        top = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        commands = top.add_subparsers(dest="benchmark", required=True, parser_class=common.Parser, metavar="BENCHMARK")
        for name in [*BENCHMARKS, "contact-sheet"]:
            work = BENCHMARKS[name].work if name in BENCHMARKS else contact_sheet
            sub = commands.add_parser(name, description=work.__doc__, formatter_class=top.formatter_class)
            sub.add_argument("outputs", nargs="*", help="[LABEL=]PATH[,PATH ...]: rows of the table, seeds of a row")
            for flag, where, words in OPTIONS:
                if name in where.replace("!", "").split():
                    sub.add_argument(flag, required=f"{name}!" in where.split(), **words)
        args = top.parse_args(argv)
        for name, value in vars(args).items():
            if type(value) in (int, float):
                require(value > 0 or value == 0 and name in ("retries", "reask"), f"--{name} {value} is not above 0")
        require(args.outputs or getattr(args, "prepare", None), "nothing to score: give OUTPUTS")
        try:
            contact_sheet(args) if args.benchmark == "contact-sheet" else run(args)
        except KeyboardInterrupt:
            print("interrupted; what was judged is kept: the same command goes on from there", file=sys.stderr)
            sys.exit(130)
    common.cli(command)

if __name__ == "__main__":
    main()
