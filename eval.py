"""eval.py: the paper's benchmarks, scored from files: pictures or answers in, a table out.

    Mask2Former and CLIP, here
    python eval.py geneval   OUT --prompts evaluation_metadata.jsonl

    a judge looks at each picture
    python eval.py dpg       OUT --questions dpg_bench.csv --grid 512
    python eval.py wise      OUT --prompts WISE_legacy/data --judge-prompt gpt_eval.py
    python eval.py compbench OUT --prompts val_comp.json --judge-prompt qwen_eval.py
    python eval.py imgedit   OUT --prompts singleturn.json --judge-prompt judge_prompt.json ...
    python eval.py gedit     OUT --prompts edits.jsonl --judge-prompt vie_prompts.py

    strings only, no model
    python eval.py pope|mme|gqa|mmmu|seed ANSWERS.jsonl --questions FILE|DIR

    PSNR, SSIM, CLIP similarity; the toy world, read back exactly; its runs, compared
    python eval.py recon     OUT --sources DIR
    python eval.py shapes    OUT --prompts captions.txt | --sources DIR
    python eval.py shapes    before=RUN RecA=RUN

    one picture to look at
    python eval.py contact-sheet OUT

OUT is a folder of pictures in the benchmark's layout, as the scripts' --generate writes it. Several
OUTs: a table with differences to the first. LABEL=DIR names a row; DIR,DIR (or a folder with seed0,
seed1 ... in it) are seeds of one row. A judge is a vision-language model run here (--judge) or an
OpenAI-compatible endpoint (--judge-url, OPENAI_API_KEY). `--prepare FILE` turns a benchmark's
questions into lines for --describe, which writes {"question_id", "answer"} lines.

Every judged item is a line of OUT/eval/BENCHMARK/items.jsonl, written at once with the raw reply:
an interrupted run goes on. scores.json and scores.md go beside it, or into --out. What is missing,
unreadable or malformed is named and counted, never scored; --strict makes it an error. Rules follow
the official scorers (values in tests/fixtures/eval). Exit code 2: bad input, or a judge that is of
no use; 1: nothing was scored.
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
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import common
from common import IMAGE_SUFFIXES, UNREADABLE, InputError, load_image

# ==== 1. Files ====================================================================================


def require(condition, message):
    if not condition:
        raise InputError(message)


class Problems(dict):
    """What cannot be scored, {kind: [names]}: printed as counts with the first five names, whole in
    scores.json.

    notes: the same for what changes no score but should be known; --strict lets it pass.
    """

    def __init__(self):
        super().__init__()
        self.notes = {}

    def add(self, kind, name):
        self.setdefault(kind, []).append(str(name))

    def note(self, kind, name):
        self.notes.setdefault(kind, []).append(str(name))

    def stop(self, strict):
        if strict and self:
            raise InputError(f"{'; '.join(named(self))} (--strict; without it these are left out "
                             "and named)")


def named(problems):
    """{kind: [names]} -> a line for each kind, with the first five names."""
    lines = []
    for kind, names in problems.items():
        more = " ..." if len(names) > 5 else ""
        lines.append(f"{len(names)} x {kind}: {', '.join(names[:5])}{more}")
    return lines


def need(row, names, where):
    """The values of `names` in a row of a benchmark's file."""
    for name in names:
        require(isinstance(row, dict) and row.get(name) is not None,
                f"{where}: no field \"{name}\"; is this the benchmark's own file?")
    return [row[name] for name in names]


def read_examples(path, *fields, kind=list):
    """A released file: a JSON list or object (kind), or for .jsonl an object a line; each row has
    `fields`."""
    data = common.read_json(path, lines=str(path).endswith(".jsonl"))
    form = "list" if kind is list else "object"
    require(isinstance(data, kind), f"{path} does not hold a JSON {form}")
    for row in data.values() if isinstance(data, dict) else data:
        need(row, fields, path)
    return data


def read_text(path, parse=str):
    """A text file; with parse=ast.parse the syntax tree of an official script, which is never
    run."""
    try:
        # "-sig": spreadsheets put a byte order mark before the first column's name.
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from None


def first_rows(rows, limit):
    """The first `limit` entries of a dict."""
    return dict(list(rows.items())[:limit])


def journal_records(data):
    """The bytes of a journal -> ({id: record}, numbers of the lines that hold none). Of an id the
    last line counts."""
    records = {}
    bad = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, TypeError, LookupError, RecursionError):
            bad.append(number)
    return records, bad


@contextlib.contextmanager
def open_journal(path):
    """items.jsonl, a line per judged item -> ({id: record}, add(record), which appends at once).

    A line that a kill or a full disk left half-written at the end is cut off; one in the middle
    that cannot be read is named, and its item judged again. A second run on the same file is
    refused.
    """
    def add(record):
        line = json.dumps(record).encode() + b"\n"
        end = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            # A full disk took a part of the line: without the cut, the next would be fused with it.
            file.truncate(end)
            raise

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            # There are no locks on Windows.
            with contextlib.suppress(ImportError):
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

            file.seek(0)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                print(f"{path}: the last line was half-written: its item is judged again",
                      file=sys.stderr)
                file.truncate(whole)

            records, bad = journal_records(data[:whole])
            for number in bad:
                print(f"{path}: line {number} cannot be read: its item is judged again",
                      file=sys.stderr)
            yield records, add
    except BlockingIOError:
        raise InputError(f"another eval.py is writing {path}") from None
    except OSError as error:
        raise InputError(f"cannot go on with {path}: {error}") from None


def find_image(stem, *folders):
    """The file stem.* that exists; else the .png that should be there, and will be named as
    missing."""
    paths = []
    for folder in folders:
        paths += [folder / f"{stem}{suffix}" for suffix in (".png", *IMAGE_SUFFIXES)]
    return next((path for path in paths if path.is_file()), paths[0])


def images_in(folder, pattern="*"):
    paths = folder.glob(pattern)
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


def name_others(out, items, problems, args):
    """Name the pictures of OUT that no item shows: a second file of a name that is scored, or one
    that nobody asks for."""
    shown = set()
    for item in items:
        shown.update(picture.path for picture in item.pictures)
    taken = {path.with_suffix(""): path.name for path in shown}

    for path in images_in(out, "**/*"):
        name = path.relative_to(out)
        # OUT may be a run's own folder, with pictures about the run beside what it painted.
        about_the_run = name.parts[0] == "previews" or str(name) in common.RUN_PICTURES
        if path in shown or name.parts[0] == "eval" or about_the_run:
            continue
        first = taken.get(path.with_suffix(""))
        if first:
            problems.add("second picture of a name", f"{name} beside {first}, which counts")
        elif not args.limit:
            problems.note("picture that no row asks for", name)


def size_of(path):
    """(width, height) as shown, from the file's head; None where it cannot be read, which is named
    later."""
    with contextlib.suppress(*UNREADABLE), Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


# What endpoints take, by PIL's names. MPO is a JPEG with more pictures behind the first: of phones.
SENT_AS_THEY_ARE = {"PNG": "png", "JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp", "GIF": "gif"}


@dataclass
class Picture:
    """A file as the judge shall see it: perhaps cropped (left, top, right, bottom), resized (width,
    height), sent as JPEG (official protocols do all three)."""
    path: Path
    crop: tuple = None
    size: tuple = None
    jpeg: bool = False

    def load(self):
        image = load_image(self.path)
        if self.crop:
            image = image.crop(self.crop)
        if self.size:
            image = image.resize(self.size)
        return image

    def data_url(self):
        """Untouched files go as they are, under their true type (the originals say image/png
        whatever they send); what endpoints do not take (BMP, TIFF) goes as PNG."""
        data = self.path.read_bytes()
        kind = SENT_AS_THEY_ARE.get(Image.open(io.BytesIO(data)).format)
        if self.crop or self.size or self.jpeg or not kind:
            kind = "jpeg" if self.jpeg else "png"
            buffer = io.BytesIO()
            self.load().save(buffer, kind)
            data = buffer.getvalue()
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass
class Item:
    """One question to a judge. parse(reply) -> a value, or None where the reply cannot be used."""
    id: str
    pictures: list
    text: str
    parse: callable
    system: str = None
    max_tokens: int = 512
    # None: the endpoint's default, as officially.
    temperature: float = 0.0
    image_first: bool = False
    # For the contact sheet; mark(value) -> 0 .. 1.
    prompt: str = ""
    mark: callable = None
    # What None of parse means.
    failure: str = "malformed reply"

    def chat(self, picture):
        """The messages of a chat; picture(p) is the part that stands for a picture."""
        pictures = [picture(p) for p in self.pictures]
        text = [{"type": "text", "text": self.text}]
        content = pictures + text if self.image_first else text + pictures

        messages = [{"role": "user", "content": content}]
        if self.system:
            system = [{"type": "text", "text": self.system}]
            messages.insert(0, {"role": "system", "content": system})
        return messages


def strict(parse, valid):
    """An official parser made strict: None, so that the judge is asked again, for what must not
    enter a mean."""
    def strictly(reply):
        # Official parsers stop at some replies: brackets nested too deep, numbers of 5000 digits.
        try:
            value = parse(reply)
            return value if valid(value) else None
        except Exception:
            return None
    return strictly


# ==== 2. Judges: a function from items to (item, Reply) of each ===================================


@dataclass
class Reply:
    """What a judge said, or why it said nothing."""
    text: str = None
    error: str = None
    # The endpoint's finish_reason.
    finish: str = None
    # The model that the response names.
    model: str = None
    # Another run would be refused in the same way.
    permanent: bool = False
    # How the request had to be changed so that the endpoint takes it.
    notes: list = field(default_factory=list)


# A draft ends with the last of these; where its opening mark stands alone, the answer never came.
THINKING_ENDS = re.compile(r"</think(?:ing)?>|</reasoning>|\[/THINK\]|◁/think▷", re.IGNORECASE)
THINKING_BEGINS = re.compile(r"<think(?:ing)?>|<reasoning>|\[THINK\]|◁think▷", re.IGNORECASE)


def without_thinking(text):
    """The answer that follows a reasoning model's draft; None where the draft does not end.

    Chat templates may put the opening mark into the prompt, so that the reply holds the closing one
    only.
    """
    answer = THINKING_ENDS.split(text)[-1]
    return None if THINKING_BEGINS.search(answer) else answer


def read_reply(item, reply):
    """-> (value, None), or (None, why the reply cannot be used)."""
    if reply.error:
        return None, reply.error
    # The token limit; some gateways hand out the names of the model's own maker.
    if str(reply.finish).lower() in ("length", "max_tokens"):
        return None, f"malformed reply, cut off (finish_reason: {reply.finish})"

    answer = without_thinking(reply.text)
    if answer is None:
        return None, "malformed reply, unclosed <think>"

    # Whatever a parser raises means that the reply is not what it reads.
    try:
        value = item.parse(answer)
    except Exception:
        value = None
    if value is None:
        return None, item.failure
    return value, None


def message_text(content):
    """The content of a chat message as one text: some servers send a list of parts, reasoning among
    them. Raises TypeError or LookupError for what is no content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content

    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif part["type"] in ("text", "output_text"):
            texts.append(part["text"])
    return "".join(texts)


# What an endpoint may refuse of a request, and what it gets instead; None: nothing.
ADAPTABLE = {"max_tokens": "max_completion_tokens", "temperature": None}

# Words in a 403 or 400 that mean this picture or prompt, not the key: a moderator's, a filter's.
MODERATED = re.compile(
    r"moderation|flagged|content.?(policy|filter|management)|guardrail|data_inspection|safety",
    re.IGNORECASE)

# A number that is too large names its parameter too; another name for it would not help.
TOO_LARGE = re.compile(
    r"too (large|long)|exceed|maximum|at most|context length", re.IGNORECASE)


class Endpoint:
    """Any OpenAI-compatible endpoint, through the standard library. The key comes from
    OPENAI_API_KEY only.

    Time-outs, broken connections, 408, 409, 425, 429, 5xx and odd bodies are asked again with
    growing pauses. Another 4xx, and a 403 that speaks of moderation, fails its item. A wrong key or
    address, an empty account or a redirect stops the run.

    Not through huggingface_hub.InferenceClient, which comes with transformers. It lacks these
    guarantees (tried with 2.4.0 on a local server): its time limit counts from byte to byte, so
    that a server that drips held a request of 0.5 s for 3 s, and nothing bounds a body's size; it
    follows redirects, and so carries the pictures wherever they lead; without a key it sends the
    Hub's token (HF_TOKEN) to whatever host --judge-url names; it does not ask again after a 503.
    What would be left of it is one call.
    """

    def __init__(self, args):
        self.args = args
        self.extra = args.judge_extra or {}
        self.address = judge_address(args)
        url = urllib.parse.urlsplit(args.judge_url)
        self.host = url.hostname
        self.url = f"{url.scheme}://{self.address}/chat/completions"

        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        # http.client would quote the key in its error.
        require(re.fullmatch(r"[\x21-\x7e]*", self.key),
                "OPENAI_API_KEY holds a character that no key has (a blank or a line end?)")

        self.lock = threading.Lock()
        self.next_turn = 0.0
        self.stopped = False
        self.adapted = {}

        # An opener that follows no redirect.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(urllib.request.ProxyHandler())
        self.opener.add_handler(urllib.request.HTTPHandler())
        self.opener.add_handler(urllib.request.HTTPSHandler())

    def clean(self, text):
        """A server may quote the key back ("incorrect key sk-..."): it never reaches the screen or
        a file."""
        return text.replace(self.key, "[key]") if len(self.key) > 3 else text

    def payload(self, item):
        """What is asked about an item, in the shape that this endpoint takes."""
        messages = item.chat(lambda p: {"type": "image_url", "image_url": {"url": p.data_url()}})
        payload = {"model": judge_name(self.args), "messages": messages}

        limits = {"max_tokens": item.max_tokens, "temperature": item.temperature}
        for name, value in limits.items():
            name = self.adapted.get(name, name)
            if name and value is not None:
                payload[name] = value

        # An endpoint takes one of the two.
        if "max_completion_tokens" in self.extra:
            payload.pop("max_tokens", None)
        return payload | self.extra

    def adapt(self, payload, status, text):
        """Does the endpoint refuse one of the parameters by name? Then, once, it will be asked in
        another shape."""
        if status not in (400, 422) or TOO_LARGE.search(text):
            return False
        for name, other in ADAPTABLE.items():
            ours = name in payload and name not in self.extra
            if ours and re.search(rf"\b{name}\b", text):
                self.adapted[name] = other
                return True
        return False

    def adaptations(self):
        """In words, for the journal and the table."""
        words = []
        for name, other in sorted(self.adapted.items()):
            words.append(f"{other} for {name}" if other else f"no {name}")
        return words

    def wait_for_turn(self):
        """Each request takes the next free turn: at most --rate a minute."""
        pause = 60 / self.args.rate if self.args.rate else 0
        with self.lock:
            turn = max(time.monotonic(), self.next_turn)
            self.next_turn = turn + pause
        time.sleep(max(0, turn - time.monotonic()))

    def send(self, payload):
        """-> the answer's status, its text, its Retry-After. All of it must be there within
        --timeout: a socket's own time-out counts from byte to byte, and a server may drip."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(payload).encode(), headers)

        with self.opener.open(request, timeout=self.args.timeout) as response:
            deadline = time.monotonic() + self.args.timeout
            data = bytearray()
            chunk = response.read1(65536)
            while chunk:
                data += chunk
                if time.monotonic() > deadline or len(data) > 10_000_000:
                    raise TimeoutError("the reply took too long")
                chunk = response.read1(65536)
            after = response.headers.get("Retry-After", "")
            return response.status, data.decode(errors="replace"), after

    def read(self, status, text):
        """The answer to a request -> (Reply, None, status), or (None, the server's reason, status).

        An error may come inside a 200; its own code counts then.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        choices = data.get("choices") if isinstance(data, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else {}

        error = None
        for part in (data, choice):
            if isinstance(part, dict) and part.get("error"):
                error = part["error"]
        if status < 300 and error:
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            text = json.dumps(error, ensure_ascii=False)

        if status >= 300:
            reason = self.clean(f"{self.host} answers {status}: {' '.join(text.split())}")[:300]
            if status == 404 and not re.search(r"/v\d", self.address):
                reason += " (does the URL end in /v1?)"
            return None, reason, status

        try:
            message = choice["message"]
            said = self.clean(message_text(message.get("content")))
            refusal = message.get("refusal")
            finish = choice.get("finish_reason")
            model = data.get("model")
        except (LookupError, TypeError, AttributeError):
            start = self.clean(" ".join(text.split()))[:100]
            reason = "the body is not a chat completion; does the URL end in /v1?"
            return None, f"{self.host}: {reason} {start}", 500

        if finish == "content_filter" and not refusal:
            refusal = finish
        if refusal and not said:
            reason = self.clean(str(refusal))[:300]
            return Reply(error=f"no reply (refused: {reason})", permanent=True), None, status
        model = self.clean(str(model)) if model else None
        return Reply(said, finish=finish, model=model), None, status

    def ask_once(self, item):
        """-> a Reply; after the last attempt one with an error. InputError where asking again
        cannot help."""
        payload = self.payload(item)
        attempt = 0
        while True:
            self.wait_for_turn()
            if self.stopped:
                return Reply(error="no reply (stopped)")

            wait = min(60, 2 ** attempt)
            try:
                status, text, after = self.send(payload)
            except (OSError, http.client.HTTPException) as error:
                reason = self.clean(f"{self.host}: {type(error).__name__}: {error}")
            else:
                reply, reason, status = self.read(status, text)
                if reply:
                    return reply
                if self.adapt(payload, status, text):
                    payload = self.payload(item)
                    continue
                if self.is_final(status, text, reason):
                    return Reply(error=f"no reply ({reason})", permanent=True)
                if re.fullmatch(r"[\d.]+", after):
                    wait = min(60, float(after))

            attempt += 1
            if attempt > self.args.retries:
                return Reply(error=f"no reply ({reason} (after {attempt} attempts))")
            time.sleep(wait)

    def is_final(self, status, text, reason):
        """Would the same request be refused again? InputError where every other one would be
        too."""
        moderated = status in (400, 403) and MODERATED.search(text)
        of_account = status in (401, 402, 403, 404, 405) or "insufficient_quota" in text
        if (status < 400 or of_account) and not moderated:
            # No other worker asks any more.
            self.stopped = True
            raise InputError(reason)
        return status < 500 and status not in (408, 409, 425, 429)

    def ask(self, item):
        """A reply that does not parse is asked for again, `reask` times: endpoints are not
        deterministic."""
        for _ in range(self.args.reask + 1):
            reply = self.ask_once(item)
            _, error = read_reply(item, reply)
            if reply.error or not error:
                break
        reply.notes = self.adaptations()
        return item, reply

    def __call__(self, items):
        """As they come."""
        # The pool's threads are daemons: an error or Ctrl-C does not wait for them.
        with ThreadPool(self.args.workers) as pool:
            try:
                yield from pool.imap_unordered(self.ask, items)
            except GeneratorExit:
                self.stopped = True
                raise


def when_needed(make):
    """A judge that is made, its models loaded, when the first item is to be judged."""
    made = functools.cache(make)

    def judge(items):
        if items:
            yield from made()(items)
    return judge


def local(replies, batch):
    """A judge in this process: replies(items of one batch) -> Replies. Asked twice it says the
    same: no second try."""
    def judge(items):
        for start in range(0, len(items), batch):
            part = items[start:start + batch]
            yield from zip(part, replies(part))
    return judge


@contextlib.contextmanager
def loading(name):
    """Whatever the libraries raise while they load `name` becomes one line."""
    # Not at the top of the file: comparing strings starts at once.
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot load {name}: {lines[0][:150]} (check the name and the network, "
                         "or give a folder)") from None


def load_model(cls, name, device, **options):
    """from_pretrained, but strict: the library fills a missing weight with random numbers and goes
    on."""
    model, info = cls.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    missing += [str(key) for key in info.get("mismatched_keys", [])]
    require(not missing, f"{name} lacks {len(missing)} weights ({', '.join(missing[:1])}): not its "
                         "checkpoint")
    return model.eval().to(device)


class LocalJudge:
    """A vision-language model, greedy, through its own processor and chat template."""

    def __init__(self, name, device):
        with loading(name) as transformers:
            # The library's own processor wants torchvision for videos.
            class WithoutVideo(transformers.Qwen2_5_VLProcessor):
                def __init__(self, image_processor, tokenizer, chat_template=None):
                    super().__init__(image_processor, tokenizer, None, chat_template)

            kind = transformers.AutoConfig.from_pretrained(name).model_type
            qwen = kind in ("qwen2_vl", "qwen2_5_vl")
            processor_class = WithoutVideo if qwen else transformers.AutoProcessor
            self.processor = processor_class.from_pretrained(name, backend="pil")
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            self.model = load_model(
                transformers.AutoModelForImageTextToText, name, device, dtype=dtype)

        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def inputs(self, items):
        chats = [item.chat(lambda p: {"type": "image", "image": p.load()}) for item in items]
        return self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs={"padding": True})

    @torch.inference_mode()
    def replies(self, items):
        # Whole numbers keep their type.
        inputs = self.inputs(items).to(self.model.device, self.model.dtype)
        out = self.model.generate(
            **inputs, max_new_tokens=max(item.max_tokens for item in items), do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id)

        # The prompts are padded on the left: replies start where the inputs end.
        out = out[:, inputs["input_ids"].shape[1]:]
        texts = self.processor.batch_decode(out, skip_special_tokens=True)

        # A reply that came to its end has an end token; shorter ones are padded behind it.
        ends = self.model.generation_config.eos_token_id
        if not isinstance(ends, list):
            ends = [-1 if ends is None else ends]
        ended = torch.isin(out, torch.tensor(ends, device=out.device)).any(1).tolist()

        replies = []
        for text, end in zip(texts, ended):
            replies.append(Reply(text.strip(), finish="stop" if end else "length"))
        return replies


def judge_address(args):
    """host[:port]/path of --judge-url, without the /chat/completions that some copy along; None: a
    local judge."""
    if not getattr(args, "judge_url", None):
        return None
    url = urllib.parse.urlsplit(args.judge_url)
    require(url.scheme in ("http", "https") and url.hostname and not url.username and not url.query,
            "--judge-url must look like https://host/v1, without a key (it goes into "
            "OPENAI_API_KEY)")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.netloc + path.rstrip("/")


def judge_name(args):
    """Stands in the table, and in the journal: a reply counts for the judge that gave it."""
    if args.benchmark in OWN.split():
        names = [getattr(args, name) for name in ("detector", "clip") if hasattr(args, name)]
        return " + ".join(names)
    if args.judge:
        return args.judge
    if not args.judge_url:
        return "Qwen/Qwen2.5-VL-7B-Instruct"
    require(args.benchmark != "dpg", "--judge-url needs --judge, the model's name")
    return BENCHMARKS[args.benchmark].judge


def make_judge(args):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (1 if device == "cpu" else 8)

    if args.benchmark == "geneval":
        detector = Detector(args.detector, device)
        clip = Clip(args.clip, device)
        return local(functools.partial(geneval_replies, detector=detector, clip=clip), batch)
    if args.benchmark == "recon":
        clip = None if args.clip == "none" else Clip(args.clip, device)
        return local(functools.partial(recon_replies, clip=clip), batch)
    if args.benchmark == "shapes":
        return local(shape_replies, 1)
    if args.judge_url:
        return Endpoint(args)
    require(not args.judge_extra, "--judge-extra is for an endpoint: it needs --judge-url")
    return local(LocalJudge(judge_name(args), device).replies, batch)


def f_string_text(node, fields):
    """An f-string of an official script -> its text with {field} where an expression names a field:
    {prompt_data['Prompt']} or {prompt_name} -> {prompt}."""
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant):
            text += part.value
            continue
        code = ast.unparse(part.value).lower()
        inside = [name for name in fields if name in code]
        text += "{" + (inside[0] if inside else code) + "}"
    return text


def judge_prompt(path, *fields):
    """The benchmark's judge text, as downloaded -> (text with {field} marks, system text or None):
    a text file, or of an official script the longest f-string with all `fields` (looked for in that
    order in an expression)."""
    texts = []
    system = None
    if Path(path).suffix == ".py":
        for node in ast.walk(read_text(path, ast.parse)):
            if isinstance(node, ast.JoinedStr):
                texts.append(f_string_text(node, fields))
            # Of nested ones the innermost comes last.
            if isinstance(node, ast.Dict) and "'role': 'system'" in ast.unparse(node):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                system = max((word for word in constants if isinstance(word, str)), key=len)
    else:
        texts.append(read_text(path))

    marks = ["{" + name + "}" for name in fields]
    for mark in marks:
        texts = [text for text in texts if mark in text]
    require(texts, f"{path}: no judge text with {' and '.join(marks)} in it")
    return max(texts, key=len), system


# ==== 3. The loop: what is done is skipped, what is judged is written down at once ================


def mean(values):
    """None without values, and where one is None: an overall of fewer categories is another
    number."""
    values = list(values)
    if not values or None in values:
        return None
    return sum(values) / len(values)


def grouped(pairs):
    groups = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return groups


def means(pairs, names=None):
    """(name, value) pairs -> {name: mean of its values}; a name of `names` that has none: None."""
    groups = grouped(pairs)
    return {name: mean(groups[name]) for name in names or list(groups)}


def percent(value):
    if isinstance(value, dict):
        return {name: percent(part) for name, part in value.items()}
    return None if value is None else 100 * value


class Streak:
    """Stops a run in which ten items in a row have no usable reply: a judge that is down, that
    refuses everything or whose format never fits would cost as much as one that works.

    Items that failed in an earlier run do not count while others are scored: they are few, and
    asked together.
    """

    def __init__(self, args, values, failed):
        self.judged = bool(BENCHMARKS[args.benchmark].judge)
        self.scored = any(value is not None for value in values.values())
        self.failed = set(failed)
        self.length = 0

    def note(self, item, reply, error):
        if not error:
            self.scored = True
            self.length = 0
        elif self.judged and not (self.scored and item.id in self.failed):
            self.length += 1
        if self.length < 10:
            return

        message = f"ten items in a row without a usable reply, the last: {error}"
        if reply.text is not None:
            said = " ".join(reply.text.split())[:200]
            raise InputError(f"{message}: {said!r}; does this judge keep to the format that it is "
                             "asked for?")
        if reply.permanent:
            raise InputError(f"{message}; another run would be refused in the same way")
        raise InputError(f"{message}; run again to go on")


class Files:
    """The pictures' digests. A picture that could be decoded in an earlier run, and has the size
    and the time that the journal remembers, is not decoded again: a thousand of them take 20 s."""

    def __init__(self, out, journal, problems):
        self.out = out
        self.problems = problems
        self.stamps = {}
        self.known = {}
        if journal.is_file():
            records, _ = journal_records(journal.read_bytes())
            for record in records.values():
                for name, *stamp in record.get("pictures", []):
                    self.known[name] = stamp

    def stamp(self, path):
        """-> [name, bytes, time, digest]; None, and a problem, where the picture is missing or
        cannot be read."""
        if path not in self.stamps:
            self.stamps[path] = self.look_at(path)
        return self.stamps[path]

    def look_at(self, path):
        name = os.path.relpath(path, self.out)
        try:
            state = path.stat()
            known = self.known.get(name)
            if known and known[:2] == [state.st_size, state.st_mtime_ns]:
                return [name, *known]
            data = path.read_bytes()
            load_image(data)
        except UNREADABLE as error:
            missing = isinstance(error, FileNotFoundError)
            self.problems.add("missing image" if missing else "unreadable image", path)
            return None
        return [name, state.st_size, state.st_mtime_ns, hashlib.sha1(data).hexdigest()]


def item_key(item, stamps, judge):
    """Tells whether a line of the journal answers the same question about the same pictures by the
    same judge."""
    marks = []
    for picture, stamp in zip(item.pictures, stamps):
        digest = stamp[-1]
        marks.append((digest, picture.crop, picture.size, picture.jpeg))
    question = (item.text, item.system, item.max_tokens, item.temperature, item.image_first, judge)
    return hashlib.sha1(repr((marks, question)).encode()).hexdigest()


class Judged:
    """What is known of each item: its value, its error, who judged it, in the order of the work
    whichever thread was first: sums do not depend on chance."""

    def __init__(self, items, place, name):
        self.place = place
        self.name = name
        self.values = dict.fromkeys(item.id for item in items)
        self.errors = {}
        self.judges = {}
        self.notes = set()

    def take(self, item, record):
        """A line of the journal, new or old."""
        silent = record["reply"] is None
        reply = Reply(record["reply"], record["error"] if silent else None, record["finish"])
        value, error = read_reply(item, reply)
        self.values[item.id] = value
        self.errors[item.id] = error
        if value is not None:
            asked = self.name if self.place == "local" else f"{self.name} (unconfirmed)"
            self.judges[item.id] = record["judge"]["answered"] or asked
            self.notes.update(record["request"])

    def report(self, problems):
        """Name what failed, the first reason given, and how the requests were changed."""
        reason = None
        for item in self.values:
            error = self.errors.get(item)
            if not error:
                continue
            kind, _, why = error.partition(" (")
            problems.add(kind, item)
            if kind == "no reply" and not reason:
                reason = f"{item}: {why.removesuffix(')')}"

        if reason:
            problems.note("reason, of the first without a reply", reason)
        for note in sorted(self.notes):
            problems.note("request adapted to what the endpoint takes", f"asked with {note}")


def judge_all(out, items, problems, args, judge):
    """Ask about every item that has no valid line in OUT's journal -> {item id: value}, [names of
    the judges].

    Bad files are named first. A line counts while pictures, text and judge are the same and its
    reply still parses: changed pictures are judged anew, a better parser needs no new replies.
    Failures are written down too, and tried again in the next run.
    """
    for item_id, n in Counter(item.id for item in items).items():
        require(n == 1, f"the prompt file has {item_id} twice")
    journal = out / "eval" / args.benchmark / "items.jsonl"
    place = judge_address(args) or "local"
    name = judge_name(args)
    asked = (place, name, getattr(args, "judge_extra", None))

    files = Files(out, journal, problems)
    stamps = {}
    keys = {}
    few = len(items) < 50
    for item in tqdm(items, desc="check", unit="item", dynamic_ncols=True, disable=few):
        found = [files.stamp(picture.path) for picture in item.pictures]
        if all(found):
            stamps[item.id] = found
            keys[item.id] = item_key(item, found, asked)
    problems.stop(args.strict)
    what = "; ".join(named(problems)) or "no image of a known prompt"
    require(keys, f"{out}: nothing to score; {what}")
    items = [item for item in items if item.id in keys]

    judged = Judged(items, place, name)
    with open_journal(journal) as (records, add):
        todo = []
        failed = []
        for item in items:
            old = records.get(item.id, {})
            same = old.get("key") == keys[item.id]
            if same:
                judged.take(item, old)
            if judged.values[item.id] is None:
                todo.append(item)
                if same:
                    failed.append(item.id)

        streak = Streak(args, judged.values, failed)
        bar = tqdm(total=len(items), initial=len(items) - len(todo), unit="item",
                   desc=f"{args.benchmark} {out.name}", dynamic_ncols=True)
        with bar, contextlib.closing(judge(todo)) as replies:
            for item, reply in replies:
                value, error = read_reply(item, reply)
                record = {
                    "id": item.id,
                    "key": keys[item.id],
                    "file": os.path.relpath(item.pictures[-1].path, out),
                    "pictures": stamps[item.id],
                    "prompt": item.prompt,
                    "judge": {"place": place, "asked": name, "answered": reply.model},
                    "request": reply.notes,
                    "reply": reply.text,
                    "finish": reply.finish,
                    "error": error,
                    "mark": item.mark(value) if item.mark and not error else None,
                }
                add(record)
                judged.take(item, record)
                bar.update()
                streak.note(item, reply, error)

    judged.report(problems)
    values = {item: value for item, value in judged.values.items() if value is not None}
    return values, sorted(set(judged.judges.values()))


# A judged benchmark is a function (out, args, problems) -> its items, how many things should be
# scored, and add_up({item id: value}) -> {column: value in the table's unit, or None}, with
# whatever else scores.json shall hold.

# ==== 4. GenEval ==================================================================================

# The 80 classes in COCO's order, of which GenEval renames 64, 65 and 66.
COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
                  "white")
GENEVAL_TASKS = {
    "single_object": "Single",
    "two_object": "Two",
    "counting": "Count",
    "colors": "Color",
    "position": "Position",
    "color_attr": "Attri.",
}


def box_area(x1, y1, x2, y2):
    """With the official +1 per side."""
    return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)


def box_overlap(a, b):
    """Intersection over union."""
    both = box_area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = box_area(*a[:4]) + box_area(*b[:4]) - both
    return both / (union or 1)


def keep_detections(detections, tag, max_overlap=1.0):
    """Indices of the detections (of one class; dicts with box, score) that count, best first:
    strictly above the threshold, then the 16 best, then suppression by overlap, which is off by
    default."""
    threshold = 0.9 if tag == "counting" else 0.3
    scores = np.array([detection["score"] for detection in detections])
    order = np.argsort(scores, kind="stable")[::-1]
    best = [int(i) for i in order if scores[i] > threshold]

    kept = []
    for i in best[:16]:
        box = detections[i]["box"]
        overlaps = [box_overlap(box, detections[k]["box"]) for k in kept]
        if max_overlap == 1 or all(overlap < max_overlap for overlap in overlaps):
            kept.append(i)
    return kept


def relations(a, b):
    """How box a lies to box b, a subset of {left of, right of, above, below}. Per axis: the
    distance of the centres, less a tenth of the summed sizes, over the length of the *unshrunk*
    distance; beyond 0.5 it is a relation."""
    # Rows: the two corners; columns: x, y.
    a = np.asarray(a, float)[:4].reshape(2, 2)
    b = np.asarray(b, float)[:4].reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < 1e-3):
        return set()

    x, y = shrunk / np.linalg.norm(offset)
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}


def color_failure(clause, found, colors_of):
    """Why the found objects of a clause do not have its color; None where they do."""
    name = clause["class"]
    count = clause["count"]
    wanted = clause["color"]
    colors = colors_of(found, name)
    right = colors.count(wanted)
    if right >= count:
        return None
    others = ", ".join(f"{colors.count(c)} {c}" for c in GENEVAL_COLORS if c in colors)
    return f"expected {wanted} {name}>={count}, found {right} {wanted}; and {others}"


def position_failure(clause, found, groups):
    """Why the found objects of a clause do not lie where it says; None where they do. groups: the
    objects of the clauses before it, None where such a clause failed."""
    wanted, target = clause["position"]
    seen = []
    for a in found:
        for b in groups[target] or ():
            seen.append(relations(a["box"], b["box"]))
    if not seen:
        return f"no target for {clause['class']} to be {wanted}"

    # Every pair must satisfy it.
    for relation in seen:
        if wanted not in relation:
            words = " and ".join(sorted(relation))
            return f"expected {clause['class']} {wanted} target, found {words} target"
    return None


def geneval_decide(metadata, objects, colors_of):
    """objects {class: kept detections, best first}, colors_of(detections, class) -> a color each.
    -> correct, reasons. Only the best `count` of a class are looked at. A failed clause is "no
    target" for positions that refer to it."""
    reasons = []
    groups = []
    for clause in metadata.get("include", []):
        name = clause["class"]
        count = clause["count"]
        found = objects.get(name, [])[:count]

        failed = None
        if len(found) < count:
            failed = f"expected {name}>={count}, found {len(found)}"
        elif "color" in clause:
            failed = color_failure(clause, found, colors_of)
        if not failed and "position" in clause:
            failed = position_failure(clause, found, groups)

        groups.append(None if failed else found)
        if failed:
            reasons.append(failed)

    # All kept ones count here: counting means exactly n.
    for clause in metadata.get("exclude", []):
        n = len(objects.get(clause["class"], []))
        if n >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not reasons, "\n".join(reasons)


def object_crop(image, mask, box):
    """What CLIP sees of an object: all outside its mask grey, cut to its box (PIL rounds halves to
    even)."""
    if mask is not None:
        grey = Image.new("RGB", image.size, "#999999")
        image = Image.composite(image, grey, Image.fromarray(np.asarray(mask, bool)))
    return image.crop(tuple(box[:4]))


def color_logits(texts, images):
    """texts [colors, templates, D], images [N, D] -> 100 x cosine [N, colors]; templates are
    normalised, averaged."""
    templates = F.normalize(torch.as_tensor(texts), dim=-1)
    colors = F.normalize(templates.mean(1), dim=-1)
    return 100 * F.normalize(torch.as_tensor(images), dim=-1) @ colors.T


def geneval_summary(results):
    """(tag, prompt, correct) per image. Task: the share of correct images; Overall: the plain mean
    of the six tasks."""
    tasks = means((tag, correct) for tag, _, correct in results)
    prompts = means(((tag, prompt), correct) for tag, prompt, correct in results)
    return {
        "tasks": tasks,
        "overall": mean(tasks.get(tag) for tag in GENEVAL_TASKS),
        "images": len(results),
        "prompts": len(prompts),
        "image_accuracy": mean(correct for _, _, correct in results),
        "prompt_accuracy_any": mean(share > 0 for share in prompts.values()),
    }


class Detector:
    """Mask2Former with mmdet's instance post-processing, for which GenEval's thresholds were
    chosen: the library's own resizes all masks to 384 x 384 first, returns no boxes and starts at
    0.5."""

    def __init__(self, name, device):
        with loading(name):
            from transformers.models.mask2former import modeling_mask2former as library
            # Its training loss wants scipy; nothing is trained here.
            library.requires_backends = lambda *_: None
            model_class = library.Mask2FormerForUniversalSegmentation
            self.model = load_model(model_class, name, device)
        classes = self.model.config.num_labels
        require(classes == 80, f"{name} knows {classes} classes; GenEval needs COCO's 80")

    @torch.inference_mode()
    def __call__(self, images, threshold=0.3):
        """PIL images of one size -> per image {class: [{box, score, mask}]}, scores above the
        threshold."""
        stacked = np.stack([np.asarray(image) for image in images])
        pixels = torch.from_numpy(stacked).to(self.model.device)

        # Never 384: small objects would vanish.
        original = tuple(pixels.shape[1:3])
        scale = min(800 / min(original), 1333 / max(original))
        inner = tuple(int(side * scale + 0.5) for side in original)

        # Bilinear, not antialiased, rounded to grey levels, as OpenCV does it; padded to 32 k, not
        # stretched.
        pixels = pixels.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, inner, mode="bilinear").round()
        center = pixels.new_tensor([123.675, 116.28, 103.53])[:, None, None]
        std = pixels.new_tensor([58.395, 57.12, 57.375])[:, None, None]
        pixels = (pixels - center) / std
        pixels = F.pad(pixels, (0, -inner[1] % 32, 0, -inner[0] % 32))
        padded = tuple(pixels.shape[-2:])

        # Logits [B, Q, 80 + 1], of which the last class is "no object", and [B, Q, H / 4, W / 4].
        out = self.model(pixel_values=pixels)
        chances = out.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = out.masks_queries_logits.float()
        found = []
        for one, mask in zip(chances, masks):
            found.append(self.instances(one, mask, padded, inner, original, threshold))
        return found

    def instances(self, chances, masks, padded, inner, original, threshold):
        """The 100 best (query, class) pairs over all; score = class probability x mean sigmoid
        inside the mask; masks may overlap. chances [Q, 80], masks [Q, h, w] -> {class: [{box,
        score, mask}]}"""
        best, index = chances.flatten().topk(min(100, chances.numel()))
        # The factor is below 1: no other can pass.
        passing = best > threshold
        best = best[passing]
        index = index[passing]
        found = defaultdict(list)
        if not len(best):
            return found

        queries = index // chances.shape[1]
        classes = index % chances.shape[1]
        masks = F.interpolate(masks[None, queries], padded, mode="bilinear")
        masks = masks[..., :inner[0], :inner[1]]
        masks = F.interpolate(masks, original, mode="bilinear")[0]
        inside = masks > 0
        scores = best * (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)

        for score, kind, mask in zip(scores.tolist(), classes.tolist(), inside.cpu().numpy()):
            # Right and bottom edges are exclusive; None: an empty mask.
            box = Image.fromarray(mask).getbbox()
            if score > threshold and box:
                found[COCO[kind]].append({"box": list(box), "score": score, "mask": mask})
        return found


class Clip:
    """CLIP ViT-L/14: names the color of an object (GenEval), and how alike two pictures are
    (recon)."""

    def __init__(self, name, device):
        with loading(name) as transformers:
            self.model = load_model(transformers.CLIPModel, name, device)
            # torchvision's processor differs.
            self.processor = transformers.CLIPProcessor.from_pretrained(name, backend="pil")

    @torch.inference_mode()
    def images(self, images):
        """PIL -> [N, D]. Shorter side to 224, centre cut out: long objects lose their ends, as
        officially."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        return self.model.get_image_features(**inputs).pooler_output.float().cpu()

    @functools.cache
    @torch.inference_mode()
    def texts(self, name):
        """A class's name -> [colors, templates, D]"""
        texts = []
        for color in GENEVAL_COLORS:
            texts.append(f"a photo of a {color} {name}")
            texts.append(f"a photo of a {color}-colored {name}")
            texts.append(f"a photo of a {color} object")
        tokens = self.processor(text=texts, padding=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        features = self.model.get_text_features(**tokens).pooler_output.float().cpu()
        return features.reshape(len(GENEVAL_COLORS), 3, -1)

    def colors(self, image, objects, name):
        crops = [object_crop(image, found["mask"], found["box"]) for found in objects]
        logits = color_logits(self.texts(name), self.images(crops))
        return [GENEVAL_COLORS[i] for i in logits.argmax(1)]


def geneval_replies(items, detector, clip):
    """Detector and CLIP in the role of a judge: the "reply" about an image is what was found in it,
    as JSON."""
    images = [item.pictures[0].load() for item in items]

    # Pictures of one size go through the detector together.
    found = {}
    for size in {image.size for image in images}:
        same = [k for k, image in enumerate(images) if image.size == size]
        found.update(zip(same, detector([images[k] for k in same])))

    replies = []
    for k, item in enumerate(items):
        metadata = json.loads(item.text)
        kept = {}
        boxes = {}
        for name, detections in found[k].items():
            indices = keep_detections(detections, metadata["tag"])
            kept[name] = [detections[i] for i in indices]
            if indices:
                boxes[name] = [[*one["box"], round(one["score"], 4)] for one in kept[name]]
        colors_of = functools.partial(clip.colors, images[k])
        correct, reason = geneval_decide(metadata, kept, colors_of)
        said = {"correct": correct, "reason": reason, "details": boxes}
        replies.append(Reply(json.dumps(said)))
    return replies


def geneval(out, args, problems):
    """GenEval (Ghosh et al. 2023, github.com/djghosh13/geneval): 553 prompts about objects, counts,
    colors, places. OUT/<index, 5 digits>/metadata.jsonl, OUT/<index>/samples/<digits>.png, 4 each.
    Official: mmdet 2's Mask2Former Swin-S, open_clip's ViT-L/14. Here: the same architectures in
    transformers, float32; Meta's detector weights."""
    rows = read_examples(args.prompts, "tag", "include", "prompt")
    items = []
    work = {}
    for path in sorted(out.iterdir()):
        if path.name.isdigit() and int(path.name) >= len(rows):
            problems.add("folder beyond the prompt file", path.name)

    for index, metadata in enumerate(rows[:args.limit]):
        for clause in metadata["include"] + metadata.get("exclude", []):
            name, _ = need(clause, ("class", "count"), args.prompts)
            require(name in COCO, f"{args.prompts}: unknown class {name!r}")

        folder = out / f"{index:05d}"
        own = folder / "metadata.jsonl"
        if own.is_file() and common.read_json(own) != metadata:
            problems.add("metadata that is not the prompt file's", folder.name)
            continue

        found = 0
        for path in images_in(folder / "samples"):
            name = f"{folder.name}/{path.name}"
            if not re.match(r"\d+\.png", path.name):
                problems.add("image that is not <digits>.png (ignored officially too)", name)
                continue
            question = json.dumps(metadata, sort_keys=True)
            items.append(Item(name, [Picture(path)], question, json.loads,
                              prompt=metadata["prompt"],
                              mark=lambda found: float(found["correct"])))
            work[name] = metadata["tag"], index
            found += 1
        if found != args.samples:
            kind = f"prompt without its {args.samples} images"
            problems.add(kind, f"{folder.name} ({found})")

    def add_up(values):
        results = []
        for name, found in values.items():
            tag, index = work[name]
            results.append((tag, index, found["correct"]))
        summary = geneval_summary(results)
        columns = {c: summary["tasks"].get(tag) for tag, c in GENEVAL_TASKS.items()}
        columns["Overall"] = summary["overall"]
        for name in ("image_accuracy", "prompt_accuracy_any"):
            columns[name] = summary[name]
        return percent(columns)
    return items, len(rows[:args.limit]) * args.samples, add_up


# ==== 5. Text to image, judged ====================================================================


def dpg_questions(rows):
    """Rows of dpg_bench.csv -> {item: {question id: (parents, category, question)}}. All of them:
    the official reader loses the first, and with it a prompt that depends on it."""
    items = {}
    for row in rows:
        parents = [int(part) for part in str(row["dependency"]).split(",")]
        parents = [parent for parent in parents if parent]
        category = row["tuple"].split("(")[0].strip()
        questions = items.setdefault(row["item_id"], {})
        number = int(row["proposition_id"])
        questions[number] = parents, category, row["question_natural_language"]
    return items


def dpg_pass(questions, replies):
    """One pass over the questions of a file -> its score, [(category, value before zeroing)].
    KeyError for a dependency that does not exist.

    A question whose parent failed fails too. The walk is in file order: a zero passes down a chain,
    but a parent that stands after its child is not zeroed yet.
    """
    final = {}
    raw = []
    for number, (_, category, _) in questions.items():
        final[number] = float(replies[number] == "yes")
        raw.append((category, final[number]))
    for number, (parents, _, _) in questions.items():
        final[number] *= all(final[parent] for parent in parents)
    return mean(final.values()), raw


def dpg_summary(items, answers):
    """answers: file -> one {question id: reply} per pass. Score = 100 x mean over files of the mean
    over passes. A file with a dependency that does not exist has failed. Categories use the answers
    before zeroing, so they do not average to the score; officially those of the last pass only."""
    files = {}
    failed = []
    fine = []
    for name, passes in answers.items():
        scores = []
        raw = []
        try:
            questions = items[name.split(".")[0].split("_")[0]]
            for replies in passes:
                score, values = dpg_pass(questions, replies)
                scores.append(score)
                raw += values
        except KeyError:
            failed.append(name)
        else:
            files[name] = {"passes": scores, "score": mean(scores)}
            fine += raw

    broad = [(category.split("-")[0].strip(), value) for category, value in fine]
    return {
        "files": files,
        "failed": failed,
        "score": percent(mean(file["score"] for file in files.values())),
        "category_l1": percent(means(sorted(broad))),
        "category_l2": percent(means(sorted(fine))),
    }


def parse_dpg(reply):
    """A reply that begins with yes or no -> that word, else None."""
    found = re.match(r"\W*(yes|no)\b", reply.strip().lower())
    return found[1] if found else None


def dpg_samples(out, questions, args, problems):
    """-> [(path, prompt's name, number of the crop, crop or None)] of the pictures in OUT."""
    side = args.grid or 0
    samples = []
    for path in images_in(out):
        name, _, part = path.stem.partition("_")
        single = part or args.samples == 1 or name not in questions
        require(side or single, f"{path.name}: a grid of four samples? Give --grid SIDE; or "
                                "--samples 1 if it is one sample")
        if name not in questions:
            if not args.limit:
                problems.add("image of no known prompt", path.name)
            continue

        if part or not side:
            samples.append((path, name, 0, None))
            continue
        if size_of(path) not in (None, (2 * side, 2 * side)):
            problems.add(f"image that is not a {2 * side} x {2 * side} grid", path.name)
            continue
        for k in range(4):
            x = k % 2 * side
            y = k // 2 * side
            samples.append((path, name, k, (x, y, x + side, y + side)))
    return samples


def dpg(out, args, problems):
    """DPG-Bench (Hu et al. 2024, github.com/TencentQQGYLab/ELLA): 1065 long prompts, 4 images each,
    yes/no questions. OUT/<name>.png, a 2 x 2 grid of samples of side --grid (what --generate
    writes), or OUT/<name>_<k>.png (RecA's; its scorer asks four times the same). Official judge:
    mPLUG-large VQA (ModelScope); a stand-in is stricter."""
    def read(text):
        rows = list(csv.DictReader(io.StringIO(text)))
        names = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
        for row in rows or [{}]:
            need(row, names, args.questions)
        return dpg_questions(rows)

    questions = first_rows(read_text(args.questions, read), args.limit)
    samples = dpg_samples(out, questions, args, problems)
    count = Counter(name for _, name, _, _ in samples)
    for name in questions:
        if count[name] != args.samples:
            kind = f"prompt without its {args.samples} images"
            problems.add(kind, f"{name} ({count[name]})")

    items = []
    for path, name, k, crop in samples:
        for number, (_, _, question) in questions[name].items():
            text = f"{question} Answer with one word, yes or no."
            items.append(Item(f"{path.name}|{k}|{number}", [Picture(path, crop)], text, parse_dpg,
                              max_tokens=64, image_first=True, prompt=question,
                              mark=lambda word: float(word == "yes")))

    def add_up(values):
        # A sample counts when all its questions were answered.
        answers = defaultdict(list)
        for path, name, k, _ in samples:
            replies = {q: values.get(f"{path.name}|{k}|{q}") for q in questions[name]}
            if all(replies.values()):
                answers[path.name].append(replies)
        summary = dpg_summary(questions, answers)
        for name in summary["failed"]:
            problems.add("prompt with a dependency that does not exist", name)
        return {
            "Score": summary["score"],
            "category_l1": summary["category_l1"],
            "category_l2": summary["category_l2"],
        }
    return items, args.samples * sum(map(len, questions.values())), add_up


# The files' own categories -> the paper's columns; the rewritten list calls a row of it Ecology.
WISE_CATEGORIES = {
    "cultural knowledge": "Cultural",
    "time": "Time",
    "space": "Space",
    "biology": "Biology",
    "ecology": "Biology",
    "physical knowledge": "Physics",
    "chemistry": "Chemistry",
}
WISE_TIME = ("Longitudinal time", "Horizontal time")

# The columns, with their weights in the authors' overall.
WISE_WEIGHTS = {
    "Cultural": 0.4,
    "Time": 0.167,
    "Space": 0.133,
    "Biology": 0.1,
    "Physics": 0.1,
    "Chemistry": 0.1,
}


def parse_wise(reply):
    """-> {consistency, realism, aesthetic_quality}, 9.9 where not found (the official marker): one
    digit after the name, up to two asterisks on either side of it; of two the last. `**Realism:**
    2` is not found."""
    found = {"consistency": 9.9, "realism": 9.9, "aesthetic_quality": 9.9}
    pattern = r"\*{0,2}(consistency|realism|aesthetic quality)\*{0,2}\s*[:：]?\s*(\d)"
    for name, digit in re.findall(pattern, reply, re.IGNORECASE):
        found[name.lower().replace(" ", "_")] = float(digit)
    return found


# Officially a 9.9 enters some means.
strict_wise = strict(parse_wise, lambda found: max(found.values()) <= 2)


def wise_score(consistency, realism, aesthetic_quality):
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic_quality) / 2


def wise_official_group(number, subcategory):
    """The column of a prompt in the release that the paper used: by its id, Time and Space by the
    subcategory."""
    if number <= 400:
        return "Cultural"
    if number <= 700:
        return "Time" if subcategory in WISE_TIME else "Space"
    return ("Biology", "Physics", "Chemistry")[min((number - 701) // 100, 2)]


def wise_summary(rows, groups=None, weights=WISE_WEIGHTS):
    """(prompt id, subcategory, consistency, realism, aesthetic quality) per image -> 0..1.

    groups: {prompt id: column}; without it, those of the paper's release. Two overalls are in use:
    the plain mean of the six (RecA, BAGEL; it fits the paper's table) and the authors', weighted by
    each category's number of prompts.
    """
    scores = []
    for number, subcategory, *ratings in rows:
        group = groups[number] if groups else wise_official_group(number, subcategory)
        scores.append((group, wise_score(*ratings)))

    parts = means(scores, WISE_WEIGHTS)
    overall = mean(parts.values())
    weighted = None
    if overall is not None:
        weighted = sum(weight * parts[name] for name, weight in weights.items())
    return {"categories": parts, "overall": overall, "overall_weighted": weighted}


def wise_prompts(source):
    """The JSON lists in a folder, or one -> ({prompt id: row}, {prompt id: column}), in the order
    of the ids.

    A release may hold its rows twice (merge.json). InputError where files, or a row's own fields,
    contradict each other: two releases in one folder have other prompts, and other ranges of ids,
    under the same names.
    """
    files = [source]
    if source.is_dir():
        files = sorted(source.glob("*.json"))
        files = [file for file in files if not file.stem.endswith("_rewrite")]

    rows = {}
    groups = {}
    for file in files:
        fields = ("Prompt", "Explanation", "Category", "Subcategory", "prompt_id")
        for row in read_examples(file, *fields):
            number = row["prompt_id"]
            kind = row["Category"]
            part = row["Subcategory"]
            require(type(number) is int, f"{file}: prompt_id {number!r} is not a number")
            group = WISE_CATEGORIES.get(str(kind).strip().lower())
            require(group, f"{file}: unknown Category {kind!r} (prompt_id {number})")
            require((group == "Time") == (part in WISE_TIME),
                    f"{file}: prompt_id {number}: Category {kind!r} contradicts Subcategory "
                    f"{part!r}")

            known = rows.setdefault(number, row)
            same = known["Prompt"] == row["Prompt"] and groups.get(number, group) == group
            require(same, f"{file}: prompt_id {number} is another prompt than in the files before "
                          "it: --prompts must hold one release (the paper's: WISE_legacy/data)")
            groups[number] = group
    return dict(sorted(rows.items())), groups


def wise(out, args, problems):
    """WISE (Niu et al. 2025, github.com/PKU-YuanGroup/WISE): 1000 prompts that need knowledge,
    OUT/<prompt_id>.png. --prompts: the folder with the three JSON lists, or one; the paper's
    release is WISE_legacy/data. --judge-prompt: WISE_legacy/gpt_eval.py, or a text with {prompt}
    and {explanation}. Official judge: gpt-4o-2024-05-13, temperature 0, up to 2000 tokens."""
    rows, groups = wise_prompts(Path(args.prompts))
    weights = WISE_WEIGHTS
    other = "prompt of another release than the paper's (WISE_legacy/data): do not compare"
    for number, row in rows.items():
        if wise_official_group(number, row["Subcategory"]) != groups[number]:
            problems.note(other, number)
            # The authors' weights are the categories' shares of a release's prompts.
            sizes = Counter(groups.values())
            weights = {name: sizes[name] / len(rows) for name in WISE_WEIGHTS}
    rows = first_rows(rows, args.limit)

    text, system = judge_prompt(args.judge_prompt, "explanation", "prompt")
    items = []
    for number, row in rows.items():
        question = text.replace("{prompt}", row["Prompt"])
        question = question.replace("{explanation}", row["Explanation"])
        pictures = [Picture(find_image(number, out))]
        items.append(Item(str(number), pictures, question, strict_wise, system, max_tokens=2000,
                          prompt=row["Prompt"], mark=lambda found: wise_score(**found)))

    def add_up(values):
        found = []
        for key, ratings in values.items():
            number = int(key)
            found.append((number, rows[number]["Subcategory"], *ratings.values()))
        summary = wise_summary(found, groups, weights)
        return {
            **summary["categories"],
            "Overall": summary["overall"],
            "weighted": summary["overall_weighted"],
        }
    return items, len(rows), add_up


COMPBENCH = {
    "color": "Color",
    "shape": "Shape",
    "texture": "Texture",
    "spatial": "Spatial",
    "non_spatial": "Non-Spatial",
    "numeracy": "Numeracy",
    "3d_spatial": "3D Spatial",
}
# Together the column Complex.
COMPLEX = ("complex", "complex_action", "complex_spatial")


def parse_compbench(reply):
    """-> the integer after "score": in a JSON object, else the first such digits anywhere (12.5 ->
    12), else -1."""
    text = reply.strip().replace("```json", "").replace("```", "").strip()
    block = re.search(r'\{.*"score":\s*\d.*?\}', text, re.DOTALL)
    if block:
        with contextlib.suppress(ValueError):
            value = json.loads(block[0]).get("score")
            if isinstance(value, int):
                return value
    found = re.search(r'"score":\s*"?(\d+)', reply)
    return int(found[1]) if found else -1


# Officially -1 enters one of two means.
strict_compbench = strict(parse_compbench, lambda value: 0 <= value <= 100)


def compbench(out, args, problems):
    """T2I-CompBench as the paper scores it (appendix F.4, after SRUM,
    github.com/WayneJin0918/SRUM): 2670 prompts. OUT/<category>/<Question_id>.png, or in
    <category>/samples/. The judge rates 0-100 how well the image fits; paper:
    Qwen2.5-VL-32B-Instruct, greedy, 512 tokens. Complex: the mean of three; Overall: of all ten
    (fits Table 12)."""
    text, _ = judge_prompt(args.judge_prompt, "prompt")
    rows = read_examples(args.prompts, "Question", "Category", "Question_id")[:args.limit]
    items = []
    category = {}
    for row in rows:
        # Ids repeat between categories.
        key = f"{row['Category']}/{row['Question_id']}"
        category[key] = re.sub(r"[\s-]+", "_", row["Category"].strip().lower())
        require(category[key] in (*COMPBENCH, *COMPLEX),
                f"{args.prompts}: unknown category {row['Category']!r}")

        folder = out / row["Category"]
        picture = Picture(find_image(row["Question_id"], folder, folder / "samples"))
        question = text.replace("{prompt}", row["Question"])
        items.append(Item(key, [picture], question, strict_compbench, image_first=True,
                          prompt=row["Question"], mark=lambda value: value / 100))

    def add_up(values):
        pairs = [(category[key], value) for key, value in values.items()]
        ten = means(pairs, (*COMPBENCH, *COMPLEX))
        columns = {COMPBENCH.get(name, name): value for name, value in ten.items()}
        columns["Complex"] = mean(ten[name] for name in COMPLEX)
        columns["Overall"] = mean(ten.values())
        return columns
    return items, len(rows), add_up


# ==== 6. Editing, judged ==========================================================================

IMGEDIT = {
    "background": "Bg.",
    "style": "Style",
    "adjust": "Adj.",
    "extract": "Ext.",
    "remove": "Rem.",
    "replace": "Rep.",
    "add": "Add",
    "compose": "Comp.",
    "action": "Act.",
}


def imgedit_ratings(reply):
    """Numbers on lines of the form "words: 4"; nothing else counts ("4.", "4/5", "**Name:** 4",
    "Name:4" do not)."""
    ratings = []
    for line in reply.splitlines():
        parts = line.strip().split(": ")
        # Not isdigit: int("④") is an error.
        if len(parts) == 2 and parts[1].isdecimal():
            ratings.append(int(parts[1]))
    return ratings


def three_ratings(ratings):
    """Officially 0, 100 or another number of ratings pass."""
    return len(ratings) == 3 and all(1 <= rating <= 5 for rating in ratings)


strict_imgedit = strict(imgedit_ratings, three_ratings)


def imgedit_summary(types, ratings):
    """types: key -> edit type; ratings: key -> list. A type: the mean of its keys; overall: over
    *keys*, not types."""
    values = {}
    for key, found in ratings.items():
        if found:
            values[key] = round(mean(found), 2)
    table = means((types[key], value) for key, value in values.items() if key in types)
    if values:
        table["overall"] = mean(values.values())
    return values, {name: round(value, 2) for name, value in table.items()}


def imgedit(out, args, problems):
    """ImgEdit, single turn (Ye et al. 2025, github.com/PKU-YuanGroup/ImgEdit): 737 edits,
    OUT/<key>.png. The judge sees the text for the edit's type, source and result, and gives three
    ratings 1..5. Official judge: gpt-4.1-2025-04-14, default temperature. The paper's rows fit
    neither overall, by key or by type, exactly."""
    edits = read_examples(args.prompts, "id", "prompt", "edit_type", kind=dict)
    edits = first_rows(edits, args.limit)
    types = {key: edit["edit_type"] for key, edit in edits.items()}
    unknown = set(types.values()) - set(IMGEDIT)
    require(not unknown, f"{args.prompts}: unknown edit_type {unknown}")
    texts = read_examples(args.judge_prompt, kind=dict)
    need(texts, set(types.values()), args.judge_prompt)

    items = []
    for key, edit in edits.items():
        source = Picture(Path(args.sources) / edit["id"])
        result = Picture(find_image(key, out))
        question = texts[types[key]].replace("<edit_prompt>", edit["prompt"])
        items.append(Item(key, [source, result], question, strict_imgedit, max_tokens=1024,
                          temperature=None, prompt=edit["prompt"],
                          mark=lambda ratings: (mean(ratings) - 1) / 4))

    def add_up(values):
        _, table = imgedit_summary(types, values)
        columns = {column: table.get(kind) for kind, column in IMGEDIT.items()}
        columns["Ovr."] = table.get("overall")
        columns["by_type"] = mean(table.get(kind) for kind in IMGEDIT)
        return columns
    return items, len(edits), add_up


GEDIT_GROUPS = (
    "background_change", "color_alter", "material_alter", "motion_change", "ps_human",
    "style_change", "subject-add", "subject-remove", "subject-replace", "text_change",
    "tone_transfer")


def repair_json(text):
    """VIEScore's repair: quote bare keys, quote bare values, numbers become lists of one."""
    def value(match):
        content = match[2].strip()
        if re.fullmatch(r"-?\d+(\.\d+)?", content):
            content = f"[{content}]"
        elif content.lower() not in ("true", "false", "null"):
            content = f'"{content}"'
        return f"{match[1]}: {content}{match[3]}"

    quoted = re.sub(r"(\w+):", r'"\1":', text)
    return re.sub(r'(".*?"):(.*?)([,}])', value, quoted)


def gedit_json(reply):
    """The part of a reply that should be JSON: between two delimiters, else from the first { to the
    last }; without braces a bare [a, b] or an integer 0..10."""
    parts = reply.split("||V^=^V||")
    start = reply.find("{")
    end = reply.rfind("}") + 1
    if len(parts) == 3:
        return parts[1]
    if start >= 0 and end:
        return reply[start:end]

    inside = reply[reply.find("["):reply.rfind("]") + 1]
    bare = re.fullmatch(r"(\[\d+, ?\d+\])\n?", inside)
    if bare:
        return '{"score": ' + bare[1] + "}"
    with contextlib.suppress(ValueError):
        if 0 <= int(reply) <= 10:
            return '{"score": %d}' % int(reply)
    return ""


def parse_gedit(reply):
    """-> score list, its minimum, error: VIEScore's rules for a first try. Values are not checked:
    11 and 6.5 pass. (On its second try the official code replaces a reply without braces by a
    random number; we never guess.)"""
    if reply == "rate_limit_exceeded":
        return None, None, reply

    text = gedit_json(reply).strip().replace("\n", "")
    found = None
    try:
        try:
            found = json.loads(text)["score"]
            found = found if isinstance(found, list) else [found]
        except (ValueError, KeyError, TypeError):
            found = json.loads(repair_json(text))["score"]
        lowest = min(found)
    except (ValueError, KeyError, TypeError) as error:
        unparsed = isinstance(error, json.JSONDecodeError)
        return found, None, "unparsed" if unparsed else type(error).__name__
    if not isinstance(lowest, (int, float)):
        return found, None, "not a number"
    return found, lowest, None


def two_scores(parsed):
    found, _, error = parsed
    if error or len(found) != 2:
        return False
    return all(type(value) in (int, float) and 0 <= value <= 10 for value in found)


strict_gedit = strict(parse_gedit, two_scores)


def gedit_summary(rows, language="en"):
    """rows: (group, language, intersection, SC, PQ). O = sqrt(SC x PQ) per edit; table = mean of
    the 11 groups."""
    tables = {}
    for suffix in ("", "_intersection"):
        semantics = []
        quality = []
        overall = []
        for group, spoken, intersection, sc, pq in rows:
            if spoken == language and (intersection or not suffix):
                semantics.append((group, sc))
                quality.append((group, pq))
                overall.append((group, (sc * pq) ** 0.5))

        columns = (("SC", "avg_semantics", semantics), ("PQ", "avg_quality", quality),
                   ("overall", "avg_overall", overall))
        for name, average, pairs in columns:
            groups = means(pairs, GEDIT_GROUPS)
            tables[name + suffix] = {**groups, average: mean(groups.values())}
    return tables


def gedit_texts(path):
    """VIEScore's texts from its script -> (of SC with <instruction> in it, of PQ)."""
    texts = {}
    for node in read_text(path, ast.parse).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            texts[ast.unparse(node.targets[0])] = node.value.value
    names = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule",
             "_prompts_0shot_tie_rule_SC", "_prompts_0shot_rule_PQ")
    context, rule, sc, pq = need(texts, names, path)
    return f"{context}\n{rule}\n{sc}", f"{context}\n{pq}"


def gedit(out, args, problems):
    """GEdit-Bench-EN (Liu et al. 2025, data set stepfun-ai/GEdit-Bench): 11 groups of edits, the
    English rows. OUT[/gen_image]/fullset/<task_type>/en/<key>.png, the source as <key>_SRCIMG.png.
    --prompts: the data set as JSON lines. VIEScore, the lower of two ratings 0..10: SC sees source
    and result (resized to the source), PQ the result alone; as JPEG. Official judge:
    gpt-4.1-2025-04-14, 1400 tokens."""
    rows = read_examples(args.prompts, "key", "task_type", "instruction", "instruction_language")
    rows = [row for row in rows if row["instruction_language"] == "en"][:args.limit]
    sc_text, pq_text = gedit_texts(args.judge_prompt)
    # The official local judge gets the images first, and fewer tokens.
    max_tokens = 1400 if args.judge_url else 512

    items = []
    for row in rows:
        key = row["key"]
        task = row["task_type"]
        edit = row["instruction"]
        require(task in GEDIT_GROUPS, f"{args.prompts}: unknown task_type {task!r}")

        folders = [root / "fullset" / task / "en" for root in (out, out / "gen_image")]
        source = find_image(f"{key}_SRCIMG", *folders)
        result = find_image(key, *folders)
        before = Picture(source, jpeg=True)
        after = Picture(result, size=size_of(source), jpeg=True)
        questions = {
            "SC": ([before, after], sc_text.replace("<instruction>", edit)),
            "PQ": ([after], pq_text),
        }
        for side, (pictures, text) in questions.items():
            items.append(Item(f"{key}|{side}", pictures, text, strict_gedit, temperature=None,
                              max_tokens=max_tokens, image_first=not args.judge_url, prompt=edit,
                              mark=lambda parsed: parsed[1] / 10))

    def add_up(values):
        both = []
        for row in rows:
            sc = values.get(f"{row['key']}|SC")
            pq = values.get(f"{row['key']}|PQ")
            if sc and pq:
                intersection = bool(row.get("Intersection_exist"))
                both.append((row["task_type"], "en", intersection, sc[1], pq[1]))
        table = gedit_summary(both)
        return {
            "SC": table["SC"]["avg_semantics"],
            "PQ": table["PQ"]["avg_quality"],
            "Overall": table["overall"]["avg_overall"],
            "groups": table,
        }
    return items, len(items), add_up


# ==== 7. Understanding: strings against strings ===================================================
# A benchmark of strings is a function of the arguments -> its questions {question_id, image, text,
# answer or label ...} and add_up([(question, reply)]) -> {column: value}, with whatever else
# scores.json shall hold.

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def pope_prediction(reply):
    """First sentence, commas out, split at single blanks: "no" if No, no or not is a word, else yes
    (NO, None too)."""
    words = reply.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_metrics(labels, predictions):
    """Positive is yes. Where a quotient has no denominator the official script stops; here it is
    0."""
    pairs = Counter(zip(predictions, labels))
    n = max(1, len(labels))
    tp = pairs["yes", "yes"]
    fp = pairs["yes", "no"]
    fn = pairs["no", "yes"]
    tn = pairs["no", "no"]
    return {
        "accuracy": (tp + tn) / n,
        "precision": tp / max(1, tp + fp),
        "recall": tp / max(1, tp + fn),
        "yes_ratio": (tp + fp) / n,
        "f1": 2 * tp / max(1, 2 * tp + fp + fn),
    }


def normal_question(text):
    """A question's words: LLaVA's file says on a second line how to answer, early label files
    misspell "image"."""
    question = re.split(r"[?\n]", text.lower())[0].replace("imange", "image")
    return " ".join(re.findall(r"\w+", question))


def pope_labels(path, questions):
    """Give each of the category's questions the label of the same image and question. InputError
    unless all fit."""
    labels = {}
    for row in common.read_json(path, lines=True):
        image, text, label = need(row, ("image", "text", "label"), path)
        key = Path(image).name, normal_question(text)
        labels.setdefault(key, []).append(label)

    without = 0
    for row in questions:
        given = labels.get((Path(row["image"]).name, normal_question(row["text"])))
        if given:
            row["label"] = given.pop()
            require(not given or set(given) == {row["label"]},
                    f"{path}: two labels for {row['image']}, {row['text']!r}")
        else:
            without += 1
    left = sum(len(given) for given in labels.values())
    require(not without and not left,
            f"{path}: {without} questions of this category have no label there, {left} labels have "
            "no question. LLaVA's questions (2910, 3000, 3000) fit the labels of "
            "github.com/RUCAIBox/POPE at commit e3e3926; later ones have 3000 random rows")


def pope(args):
    """POPE (Li et al. 2023, github.com/RUCAIBox/POPE): accuracy and F1 are means over the three
    categories. --questions: llava_pope_test.jsonl; --labels: folder of coco_pope_<category>.json of
    commit e3e3926, joined with it by image and question."""
    rows = read_examples(args.questions, "question_id", "image", "text", "category")
    require(args.prepare or args.labels,
            "pope needs --labels DIR with coco_pope_random.json, _popular, _adversarial")
    if args.labels:
        for category, questions in grouped((row["category"], row) for row in rows).items():
            pope_labels(Path(args.labels) / f"coco_pope_{category}.json", questions)

    def add_up(pairs):
        labels = defaultdict(list)
        predictions = defaultdict(list)
        for row, reply in pairs:
            labels[row["category"]].append(row["label"])
            predictions[row["category"]].append(pope_prediction(reply))
        parts = {name: pope_metrics(labels[name], predictions[name]) for name in labels}
        return {
            "POPE (Acc)": percent(mean(part["accuracy"] for part in parts.values())),
            "POPE (F1)": percent(mean(part["f1"] for part in parts.values())),
            **parts,
        }
    return rows, add_up


MME_GROUPS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"),
}
MME_TASKS = (*MME_GROUPS["perception"], *MME_GROUPS["cognition"])


def mme_prediction(reply):
    """Clean, then yes, else no, within the first four characters; else "other", which is wrong."""
    reply = reply.replace("\n", "")
    reply = reply.replace("不是", "no").replace("是", "yes").replace("否", "no").lower()
    reply = reply.replace("true", "yes").replace("false", "no")
    start = re.sub(r"[\u4e00-\u9fa5]", "", reply)[:4]
    for word in ("yes", "no"):
        if word in start:
            return word
    return "other"


def mme_task(rows):
    """(label, prediction), two per image in turn -> 100 x accuracy + 100 x share of images with
    both right."""
    if not rows:
        return None
    right = [label.lower() == prediction for label, prediction in rows]
    both = [first and second for first, second in zip(right[::2], right[1::2])]
    return 100 * mean(right) + 100 * mean(both)


def mme(args):
    """MME (Fu et al. 2023): two questions an image. The paper's column is the perception sum (max
    2000). --questions: folder of 14 <task>.txt: image, question, Yes/No, by tabs. --images: where
    the images' folders are."""
    rows = []
    for task in MME_TASKS:
        file = Path(args.questions) / f"{task}.txt"
        for number, line in enumerate(read_text(file).splitlines()):
            parts = line.strip().split("\t")
            require(len(parts) >= 3 and parts[2] in ("Yes", "No"),
                    f"{file}: line {number + 1} is not image, question, Yes/No")
            image, question, label = parts[:3]
            inner = (Path(args.images or "") / task / "images" / image).exists()
            rows.append({
                "question_id": f"{task}/{number}",
                "image": f"{task}/images/{image}" if inner else f"{task}/{image}",
                "text": f"{question} {SHORT}",
                "pair": (task, image),
                "label": label,
            })

    # By name, not by their places in the file, which may have been sorted.
    for (task, image), n in Counter(row["pair"] for row in rows).items():
        file = Path(args.questions) / f"{task}.txt"
        require(n == 2, f"{file}: {image} has {n} questions, not two")

    def add_up(pairs):
        images = defaultdict(list)
        for row, reply in pairs:
            images[row["pair"]].append((row["label"], mme_prediction(reply)))
        answers = defaultdict(list)
        for (task, _), both in images.items():
            if len(both) == 2:
                answers[task] += both
        tasks = {task: mme_task(answers[task]) for task in MME_TASKS}

        sums = {}
        for name, group in MME_GROUPS.items():
            values = [tasks[task] for task in group]
            sums[name] = None if None in values else sum(values)
        return {"MME": sums["perception"], **sums, "tasks": tasks}
    return rows, add_up


def gqa_correct(reply, gold):
    """Equal after lower-casing and stripping; "white." is wrong. gold: a string or several."""
    golds = [gold] if isinstance(gold, str) else gold
    return reply.strip().lower() in [gold.strip().lower() for gold in golds]


def gqa(args):
    """GQA, testdev balanced (Hudson & Manning 2019): exact match. --questions:
    testdev_balanced_questions.json, or rows of question_id, image, text, answer."""
    rows = read_examples(args.questions, kind=(dict, list))
    if isinstance(rows, dict):
        released = rows
        rows = []
        for key, row in released.items():
            need(row, ("question",), args.questions)
            image = f"{row.get('imageId')}.jpg"
            text = f"{row['question']} {SHORT}"
            rows.append({"question_id": key, "image": image, "text": text, **row})

    def add_up(pairs):
        return {"GQA": percent(mean(gqa_correct(reply, row["answer"]) for row, reply in pairs))}
    return rows, add_up


def mmmu_choice(reply, options):
    """MMMU's own rule: letters in brackets, else between blanks, else an option's text where the
    reply has more than five words; of several the last. None where the official code draws at
    random: we count that as wrong."""
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "

    in_brackets = {k: reply.rfind(f"({k})") for k in options}
    in_blanks = {k: reply.rfind(f" {k} ") for k in options}
    in_words = {}
    if len(reply.split()) > 5:
        in_words = {k: reply.lower().rfind(text.lower()) for k, text in options.items()}
    for places in (in_brackets, in_blanks, in_words):
        found = {k: place for k, place in places.items() if place >= 0}
        if found:
            return max(found, key=found.get)
    return None


def mmmu_short(reply, options):
    """BAGEL's rule: one character as it is; nothing is C; a leading option letter; an option's
    text."""
    reply = reply.strip()
    if not reply:
        return "C"
    if len(reply) == 1 or reply[0] in options:
        return reply[0]
    return next((k for k, text in options.items() if text in reply), reply)


def normal_answers(text):
    """A number with two decimals; a character with a blank on either side, so that it does not
    match inside a word."""
    text = str(text).strip()
    with contextlib.suppress(ValueError):
        return [round(float(text.replace(",", "")), 2)]
    text = text.lower()
    return [" " + text, text + " "] if len(text) == 1 else [text]


def all_normal_answers(texts):
    answers = []
    for text in texts:
        answers += normal_answers(text)
    return answers


MMMU_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# 1,200; 2e-3; plain.
MMMU_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_tails(reply):
    """What stands behind the cue words of each sentence, the shortest such part; all of the reply
    where there is none. The last sentence may also have an equals sign."""
    reply = reply.strip().strip(".").lower()
    sentences = re.split(r"\.\s(?=[A-Z])|\n", reply)
    tails = []
    for sentence in sentences:
        cues = [*MMMU_CUES, "="] if sentence is sentences[-1] else MMMU_CUES
        tail = ""
        for cue in cues:
            if cue in sentence:
                said = sentence.split(cue)[-1].strip()
                # Any replaces an empty one.
                if not tail or len(said) < len(tail):
                    tail = said
        if tail and tail not in set(":,.!?;'"):
            tails.append(tail)
    return tails or [reply]


def mmmu_open(reply, gold):
    """Open questions: what stands behind the last cue word, and every number in it; a gold string
    must be contained, a gold number equal."""
    tails = mmmu_tails(reply)
    numbers = []
    for tail in tails:
        for pattern in MMMU_NUMBERS:
            numbers += re.findall(pattern, tail)

    said = all_normal_answers(tails + numbers)
    golds = all_normal_answers(gold if isinstance(gold, list) else [gold])
    for right in golds:
        for answer in said:
            if answer == right:
                return True
            if isinstance(answer, str) and isinstance(right, str) and right in answer:
                return True
    return False


def with_options(question, options):
    lines = [question.strip()]
    lines += [f"{letter}. {option}" for letter, option in options.items()]
    lines.append(LETTER if options else SHORT)
    return "\n".join(lines)


def as_list(value):
    """A list that a released file may hold as text: "['red', 'blue']". None where the text is
    none."""
    if not isinstance(value, str):
        return value
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, list) else None


def mmmu(args):
    """MMMU validation (Yue et al. 2024): accuracy over questions, by MMMU's own parser; `short` by
    BAGEL's. --questions: the rows: id, question, options (a list, or its text as released), answer,
    image or image_1. An open question may have several answers, any of which is right: a list, or
    its text."""
    rows = read_examples(args.questions, "id", "question", "options", "answer")
    for row in rows:
        options = as_list(row["options"])
        require(isinstance(options, list),
                f"{args.questions}: {row['id']}: options {row['options']!r} is no list")
        row["options"] = {chr(65 + i): str(option).strip() for i, option in enumerate(options)}
        if not options:
            row["answer"] = as_list(row["answer"]) or row["answer"]
        row["question_id"] = row["id"]
        row["image"] = row.get("image") or row.get("image_1")
        row["text"] = with_options(row["question"], row["options"])

    def right(row, reply, choose):
        if row["options"]:
            return choose(reply, row["options"]) == row["answer"]
        return mmmu_open(reply, row["answer"])

    def add_up(pairs):
        return {
            "MMMU": percent(mean(right(row, reply, mmmu_choice) for row, reply in pairs)),
            "short": percent(mean(right(row, reply, mmmu_short) for row, reply in pairs)),
        }
    return rows, add_up


def seed(args):
    """SEED-Bench, images (Li et al. 2023). No official code for free answers: MMMU's rule, no
    letter is wrong. --questions: SEED-Bench.json, of which the image part counts."""
    rows, = need(read_examples(args.questions, kind=dict), ("questions",), args.questions)
    rows = [row for row in rows if row.get("data_type", "image") == "image"]
    for row in rows:
        names = ("data_id", "question", "choice_a", "choice_b", "choice_c", "choice_d")
        image, question, *choices = need(row, names, args.questions)
        row["image"] = image
        row["options"] = dict(zip("ABCD", choices))
        row["text"] = with_options(question, row["options"])

    def add_up(pairs):
        right = []
        for row, reply in pairs:
            chosen = mmmu_choice(reply, row["options"])
            right.append((str(row.get("question_type_id")), chosen == row["answer"]))
        return percent({"SEED": mean(value for _, value in right), **means(sorted(right))})
    return rows, add_up


def understanding(out, args, problems):
    """--prepare writes the questions for --describe; otherwise the answer file `out` is compared
    with the answers -> {column: value}, number scored, number of questions."""
    questions, add_up = BENCHMARKS[args.benchmark].work(args)
    questions = questions[:args.limit]
    rows = {}
    for row in questions:
        key = str(need(row, ("question_id", "image", "text"), args.questions)[0])
        require(key not in rows, f"{args.questions}: question_id {key} stands there twice; an "
                                 "answer could be to either")
        rows[key] = row

    if args.prepare:
        asked = []
        for key, row in rows.items():
            asked.append({"question_id": key, "image": row["image"], "text": row["text"]})
        common.write(args.prepare, asked)
        return print(f"{len(rows)} questions in {args.prepare}, for a script's --describe")
    require(all("answer" in row or "label" in row for row in questions),
            f"{args.questions}: questions without their answer")

    replies = {}
    for number, row in enumerate(common.read_json(out, lines=True), 1):
        answered = isinstance(row, dict) and isinstance(row.get("answer"), str)
        require(answered, f"{out}: line {number} has no \"answer\"")
        key = str(row.get("question_id", row.get("id")))
        if key not in rows:
            problems.add("answer to no known question", key)
        elif key in replies:
            problems.add("question answered twice", key)
        # The first counts. A model that thinks aloud has answered where its draft ends.
        replies.setdefault(key, without_thinking(row["answer"]))

    pairs = []
    for key, row in rows.items():
        if key not in replies:
            problems.add("question without an answer", key)
        elif replies[key] is None:
            problems.add("answer that ends in its draft, unclosed <think>", key)
        else:
            pairs.append((row, replies[key]))
    return add_up(pairs), len(pairs), len(rows)


# ==== 8. Reconstruction, the toy world ============================================================


def psnr(a, b):
    """uint8 [H, W, 3] twice -> dB; equal pictures: 100 (infinity is not JSON)."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    if error <= 255 ** 2 * 1e-10:
        return 100.0
    return float(10 * np.log10(255 ** 2 / error))


def ssim(a, b):
    """Structural similarity (Wang et al. 2004), uint8 [H, W, 3] twice: 11 x 11 Gaussian of width
    1.5, no border."""
    kernel = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    kernel = kernel / kernel.sum()

    def blur(x):
        # The window is a product: two passes, 11 each.
        for axis in (0, 1):
            x = np.lib.stride_tricks.sliding_window_view(x, 11, axis) @ kernel
        return x

    a = a.astype(float)
    b = b.astype(float)
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a * mean_a
    var_b = blur(b * b) - mean_b * mean_b
    cov = blur(a * b) - mean_a * mean_b

    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return float(np.mean(luminance * structure))


def likeness(source, result, clip):
    """The source's centre is cut to the result's aspect ratio and resized to its size, then the two
    are compared. None for a picture smaller than SSIM's window."""
    if min(result.size) < 11:
        return None
    source = ImageOps.fit(source, result.size, Image.BICUBIC)
    a = np.asarray(source)
    b = np.asarray(result)
    measures = {"PSNR": psnr(a, b), "SSIM": ssim(a, b)}
    if clip:
        one, other = clip.images([source, result])
        measures["CLIP"] = float(F.cosine_similarity(one, other, dim=0))
    return measures


def recon_replies(items, clip):
    """The "replies" about pairs of pictures: their likeness, as JSON."""
    replies = []
    for item in items:
        source, result = [picture.load() for picture in item.pictures]
        replies.append(Reply(json.dumps(likeness(source, result, clip))))
    return replies


def with_sources(out, args, prefix="", **options):
    """An item per image of --sources and its namesake in OUT (of whatever suffix)."""
    paths = images_in(args.sources, "**/*")[:args.limit]
    require(paths, f"{args.sources}: no image in it")
    items = []
    for path in paths:
        name = path.relative_to(args.sources)
        # cat.jpg.png where there was a cat.png as well, else cat.png.
        reconstruction = out / f"{name}.png"
        if not reconstruction.is_file():
            reconstruction = find_image(name.with_suffix(""), out)
        pictures = [Picture(path), Picture(reconstruction)]
        items.append(Item(f"{prefix}{name}", pictures, "", json.loads, prompt=str(name), **options))
    return items



def recon(out, args, problems):
    """Reconstructions OUT/<name>.png against --sources/<name>.*: PSNR, SSIM, CLIP similarity
    (unless --clip none). The paper shows pictures only (figures 16, 17). Pixel measures are
    *expected* to be low: RecA reconstructs what the understanding encoder says, not pixels."""
    items = with_sources(out, args, failure="picture smaller than SSIM's window")

    def add_up(values):
        pairs = []
        for row in values.values():
            pairs += row.items()
        return {**means(pairs), "images": values}
    return items, len(items), add_up


SHAPE_COLUMNS = {
    "single_object": "Single",
    "two_object": "Two",
    "colors": "Color",
    "position": "Position",
    "color_attribution": "Attri.",
    "overall": "Overall",
    "reconstruction": "Recon.",
    "understanding": "Underst.",
}


def said_scene(line):
    """A toy world's caption -> (place, shape, color) per object; None: not said."""
    scene = []
    for part in line.split(" and "):
        words = part.split()
        said = []
        for kind in (common.PLACES, common.SHAPES, tuple(common.COLORS)):
            said.append(next((k for k, word in enumerate(kind) if word in words), None))
        scene.append(tuple(said))
    return scene


def fits(said, seen):
    """Is what was said of an object true of one that is seen?"""
    return all(want in (None, have) for want, have in zip(said, seen))


def shows(seen, scene):
    """Each object of the scene, as far as it was said, is there."""
    for said in scene:
        if not any(fits(said, there) for there in seen):
            return False
    return True


def shape_replies(items):
    """The "replies" about toy pictures: what is drawn on each, as JSON."""
    replies = []
    for item in items:
        scenes = [common.read_scene(picture.load()) for picture in item.pictures]
        replies.append(Reply(json.dumps(scenes)))
    return replies


def shapes(out, args, problems):
    """The toy world (common.py, section 11): pictures are read back exactly, so there is no detector
    and no error. --prompts: the caption file of --generate, OUT/<line, 5 digits>[_k].png. All:
    everything said is there; GenEval-like columns need captions of one and of two objects that say
    everything. --sources: all must come back as it was. Neither: OUT is a finished run of --model
    tiny, whose own scores.json is read: what training led to or, in a row that is labelled `before`
    (or `GROUP: before`, see in_groups), what it began with."""
    require(args.prompts or args.sources,
            "shapes needs --prompts captions.txt, --sources DIR, or runs of --model tiny")
    lines = []
    if args.prompts:
        lines = [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()]

    items = []
    scenes = {}
    for i, line in enumerate(lines[:args.limit]):
        scene = said_scene(line)
        require(all(shape is not None for _, shape, _ in scene),
                f"{args.prompts}: {line!r} is not a toy world's caption")
        for path in sorted(out.glob(f"{i:05d}_*.png")) or [find_image(f"{i:05d}", out)]:
            scenes[path.name] = scene, path
            items.append(Item(path.name, [Picture(path)], line, json.loads, prompt=line,
                              mark=lambda seen, scene=scene: float(shows(seen[0], scene))))
    sources = []
    if args.sources:
        sources = with_sources(out, args, "source ", mark=lambda seen: float(seen[0] == seen[1]))

    def add_up(values):
        shown = []
        restored = []
        whole = []
        for key, seen in values.items():
            if key not in scenes:
                restored.append(seen[0] == seen[1])
                continue
            scene, path = scenes[key]
            shown.append(shows(seen[0], scene))
            if not any(None in said for said in scene):
                whole.append((scene, path))

        tasks = {}
        if {1, 2} <= {len(scene) for scene, _ in whole}:
            images = [load_image(path) for _, path in whole]
            tasks = common.score_generations([scene for scene, _ in whole], images)
        columns = {column: tasks.get(task) for task, column in SHAPE_COLUMNS.items()}
        columns["All"] = mean(shown)
        columns["Recon."] = mean(restored)
        return percent(columns)
    return items + sources, len(items) + len(sources), add_up


# ==== 9. Tables, and a picture to look at =========================================================

# The function, the columns as in the paper, their decimals, the official judge.
Benchmark = namedtuple("Benchmark", "work columns decimals judge", defaults=(1, None))
BENCHMARKS = {
    "geneval": Benchmark(geneval, (*GENEVAL_TASKS.values(), "Overall")),
    "dpg": Benchmark(dpg, ("Score",), decimals=2, judge="mPLUG-large VQA"),
    "wise": Benchmark(
        wise, (*WISE_WEIGHTS, "Overall"), decimals=2, judge="gpt-4o-2024-05-13"),
    "compbench": Benchmark(
        compbench, (*COMPBENCH.values(), "Complex", "Overall"), decimals=2,
        judge="Qwen/Qwen2.5-VL-32B-Instruct"),
    "imgedit": Benchmark(
        imgedit, (*IMGEDIT.values(), "Ovr."), decimals=2, judge="gpt-4.1-2025-04-14"),
    "gedit": Benchmark(
        gedit, ("SC", "PQ", "Overall"), decimals=2, judge="gpt-4.1-2025-04-14"),
    "pope": Benchmark(pope, ("POPE (Acc)", "POPE (F1)")),
    "mme": Benchmark(mme, ("MME",), decimals=0),
    "gqa": Benchmark(gqa, ("GQA",)),
    "mmmu": Benchmark(mmmu, ("MMMU",)),
    "seed": Benchmark(seed, ("SEED",)),
    "recon": Benchmark(recon, ("PSNR", "SSIM", "CLIP"), decimals=4),
    "shapes": Benchmark(shapes, (*SHAPE_COLUMNS.values(), "All"), decimals=0),
}


def summarize(label, seeds, columns):
    """Seeds of one row -> mean and sample standard deviation of each column; None if a seed lacks
    it."""
    values = {}
    for column in columns:
        values[column] = [one["values"].get(column) for one in seeds]
    row = {
        "label": label,
        "seeds": seeds,
        "mean": {column: mean(of) for column, of in values.items()},
    }
    if len(seeds) > 1:
        row["std"] = {}
        for column, of in values.items():
            row["std"][column] = None if None in of else statistics.stdev(of)

    judges = set()
    for one in seeds:
        judges.update(one["judges"])
    row["judges"] = sorted(judges)
    row["n"] = sum(one["n"] for one in seeds)
    row["expected"] = sum(one["expected"] for one in seeds)
    row["partial"] = row["n"] < row["expected"] or any(one["problems"] for one in seeds)
    return row


def other_judge(row, first):
    """Were the two rows judged by different models? Then no difference of theirs means anything."""
    mine = row.get("judges")
    base = first.get("judges")
    return bool(mine and base and mine != base)


def in_groups(rows):
    """{"Harmon": [rows labelled "Harmon: before", "Harmon: RecA", ...]}; the group of a label
    without ": " is ""."""
    return grouped((row["label"].rpartition(": ")[0], row) for row in rows)


def table_cell(row, first, column, decimals):
    """A mean, its deviation over seeds, and in brackets the difference of the printed numbers to
    the group's first row."""
    value = row["mean"][column]
    base = first["mean"][column]
    if value is None:
        return "–"
    text = f"{value:.{decimals}f}"
    if "std" in row:
        text += f" ± {row['std'][column]:.{decimals}f}"
    if row is first or base is None or other_judge(row, first):
        return text
    difference = round(value, decimals) - round(base, decimals)
    return f"{text} ({difference:+.{decimals}f})"


def markdown(rows, columns, decimals):
    """The table; a group's first row is its baseline."""
    table = [["Model", *columns], ["---"] * (len(columns) + 1)]
    for group in in_groups(rows).values():
        for row in group:
            label = row["label"]
            if row["partial"]:
                label += " (partial)"
            if other_judge(row, group[0]):
                label += " (other judge, not comparable)"
            cells = [table_cell(row, group[0], column, decimals) for column in columns]
            table.append([label, *cells])

    lines = []
    for cells in table:
        cells = [str(cell).replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


BAR_COLORS = ("#9e9e9e", "#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a", "#c62828", "#00838f",
              "#5d4037")


def chart(rows, columns, height=200, bar=12):
    """Rows as a picture: a cluster of bars per column, a bar per row, on it a line of one deviation
    up and down."""
    def value(row, column):
        return row["mean"][column] or 0

    def deviation(row, column):
        return row.get("std", {}).get(column) or 0

    top = 1e-9
    for row in rows:
        for column in columns:
            top = max(top, value(row, column) + deviation(row, column))
    cluster = max(64, bar * len(rows) + 24)
    size = (cluster * len(columns) + 40, height + 66 + 16 * len(rows))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    base = height + 10

    for k, column in enumerate(columns):
        left = 20 + k * cluster
        best = max(value(row, column) for row in rows)
        draw.text((left, height + 16), f"{column}\nto {best:.3g}", "black", font)
        for r, row in enumerate(rows):
            color = BAR_COLORS[r % len(BAR_COLORS)]
            tall = height * value(row, column) / top
            spread = height * deviation(row, column) / top
            x = left + r * bar
            draw.rectangle((x, base - tall, x + bar - 2, base), color)
            middle = x + bar // 2 - 1
            low = base - max(0, tall - spread)
            draw.line((middle, base - tall - spread, middle, low), "black")

    for r, row in enumerate(rows):
        color = BAR_COLORS[r % len(BAR_COLORS)]
        draw.text((20, height + 54 + 16 * r), row["label"], color, font)
    return image


def charts(rows, columns):
    """A chart per group of rows, two beside each other."""
    panels = [chart(group, columns) for group in in_groups(rows).values()]
    width = max(panel.width for panel in panels)
    height = max(panel.height for panel in panels)
    lines = (len(panels) + 1) // 2
    picture = Image.new("RGB", (width * min(2, len(panels)), height * lines), "white")
    for k, panel in enumerate(panels):
        picture.paste(panel, (k % 2 * width, k // 2 * height))
    return picture


def parse_outputs(arguments):
    """[LABEL=]PATH[,PATH ...] -> [(label, [paths])]. A folder with seed<n> folders in it stands for
    these."""
    rows = {}
    for argument in arguments:
        # A path may have = or a comma in its name.
        label = ""
        rest = argument
        if not Path(argument).exists():
            label, _, rest = argument.rpartition("=")
        parts = [rest] if Path(rest).exists() else rest.split(",")
        paths = [Path(part) for part in parts]
        for path in paths:
            require(path.exists(), f"no such folder or file: {path}")

        if len(paths) == 1:
            seeds = [path for path in paths[0].glob("seed*") if path.is_dir()]
            paths = sorted(seeds) or paths
        label = label or rest
        require(label not in rows, "two rows have the same name; give LABEL=PATH")
        rows[label] = paths
    return list(rows.items())


def toy_run(path, label):
    """scores.json of a run of --model tiny (see shapes)."""
    moment = "before" if label.rpartition(": ")[2] == "before" else "after"
    scores = common.read_json(path / "scores.json").get(moment)
    require(isinstance(scores, dict), f"{path} is not a finished run of --model tiny")
    values = {column: scores.get(name) for name, column in SHAPE_COLUMNS.items()}
    return {
        "folder": str(path),
        "values": percent(values),
        "n": 1,
        "expected": 1,
        "judges": [],
        "problems": {},
        "notes": {},
    }


def score(path, label, args, judge):
    """One folder, or one answer file, of the row `label`."""
    asked = getattr(args, "prompts", None) or getattr(args, "sources", None)
    if args.benchmark == "shapes" and not asked and (path / "scores.json").is_file():
        return toy_run(path, label)

    problems = Problems()
    strings = args.benchmark in STRINGS.split()
    wanted = "an answer file" if strings else "a folder of pictures"
    require(path.is_dir() != strings, f"{path}: {args.benchmark} wants {wanted}")

    judges = []
    if strings:
        values, n, expected = understanding(path, args, problems)
    else:
        items, expected, add_up = BENCHMARKS[args.benchmark].work(path, args, problems)
        # GenEval and DPG-Bench name theirs by their own rules.
        if args.benchmark not in ("geneval", "dpg"):
            name_others(path, items, problems, args)
        judged, judges = judge_all(path, items, problems, args, judge)
        values = add_up(judged)
        n = len(judged)
    problems.stop(args.strict)
    return {
        "folder": str(path),
        "values": values,
        "n": n,
        "expected": expected,
        "judges": judges,
        "problems": problems,
        "notes": problems.notes,
    }


def who_judged(args, name, rows):
    """The table's line about the judge: the model that was asked for, where, and the one that the
    replies name."""
    official = BENCHMARKS[args.benchmark].judge
    judges = set()
    for row in rows:
        judges.update(row["judges"])
    told = sorted(judge for judge in judges if not judge.endswith(" (unconfirmed)"))

    text = f"Judge: {name} ({'endpoint' if args.judge_url else 'local'})."
    if args.judge_url and told:
        text += f" Its replies name {', '.join(told)}."
    if (judges or {name}) - {official, f"{official} (unconfirmed)"}:
        text += f" The paper's is {official}: do not compare."
    if args.judge_url:
        text += f" Host: {judge_address(args)}."
    if args.judge_url and not told:
        text += " The replies do not name their model."
    if len(judges) > 1:
        each = [f"{row['label']}: {' and '.join(row['judges']) or 'none'}" for row in rows]
        text += f" Replies of different judges are not comparable ({'; '.join(each)})."
    return text


def report(args, rows, columns, name):
    """The table, who judged, and what is missing in it, as text."""
    benchmark = BENCHMARKS[args.benchmark]
    text = [f"# {args.benchmark}", "", markdown(rows, columns, benchmark.decimals), ""]
    if benchmark.judge:
        text += [who_judged(args, name, rows), ""]
    limit = f" (--limit {args.limit})" if args.limit else ""
    for row in rows:
        if row["partial"] or args.limit:
            text.append(f"{row['label']}: {row['n']} of {row['expected']} scored{limit}")
        for one in row["seeds"]:
            lines = named(one["problems"]) + named(one["notes"])
            text += [f"- {one['folder']}: {line}" for line in lines]
    return "\n".join(text).strip()


def run(args):
    """Score every folder, print the table, write scores.json and scores.md."""
    strings = args.benchmark in STRINGS.split()
    if strings and args.prepare:
        return understanding(None, args, Problems())

    judge = when_needed(lambda: make_judge(args))
    outputs = parse_outputs(args.outputs)
    columns = BENCHMARKS[args.benchmark].columns
    rows = []
    for label, paths in outputs:
        seeds = [score(path, label, args, judge) for path in paths]
        rows.append(summarize(label, seeds, columns))

    # Runs, captions and sources of the toy world have different columns.
    shown = columns
    if args.benchmark == "shapes":
        filled = set()
        for row in rows:
            filled.update(c for c in columns if row["mean"][c] is not None)
        shown = [c for c in columns if c in filled]
    name = None if strings else judge_name(args)
    text = report(args, rows, shown, name)
    print(text)

    folder = args.out
    if not folder:
        last = outputs[-1][1][-1]
        folder = (last if last.is_dir() else last.parent) / "eval" / args.benchmark
    folder = Path(folder)
    record = {
        "benchmark": args.benchmark,
        "judge": name,
        "endpoint": judge_address(args),
        "columns": columns,
        "rows": rows,
    }
    common.write(folder / "scores.json", record)
    common.write(folder / "scores.md", text + "\n")
    common.write(folder / "scores.png", charts(rows, shown))
    print(folder / "scores.json", folder / "scores.md", folder / "scores.png", file=sys.stderr)

    empty = [row["label"] for row in rows if not row["n"]]
    if empty:
        print(f"error: nothing was scored of {', '.join(empty)}", file=sys.stderr)
        sys.exit(1)


def sheet_tiles(out, label):
    """The pictures of a folder -> [(path, its words, mark or None)]. Marks and prompts come from
    OUT/eval/*/items.jsonl, else GenEval's metadata.jsonl."""
    marks = defaultdict(list)
    prompts = {}
    for journal in sorted(out.glob("eval/*/items.jsonl")):
        records, _ = journal_records(journal.read_bytes())
        for record in records.values():
            file = record.get("file")
            if file:
                prompts[file] = record.get("prompt")
                if record.get("mark") is not None:
                    marks[file].append(record["mark"])

    files = {os.path.relpath(path, out) for path in images_in(out, "**/*")} | prompts.keys()
    tiles = []
    for file in sorted(files):
        if Path(file).parts[0] in ("eval", ".."):
            continue
        metadata = (out / file).parent.parent / "metadata.jsonl"
        if file not in prompts and metadata.is_file():
            prompts[file] = common.read_json(metadata).get("prompt")
        tiles.append((out / file, label + (prompts.get(file) or file), mean(marks[file])))
    return tiles


def contact_sheet(args):
    """One picture of the pictures in OUTPUTS with their prompts, framed green (right), red (failed,
    missing) or grey. Mean mark below 0.5: failed."""
    tiles = []
    for label, paths in parse_outputs(args.outputs):
        for out in paths:
            tiles += sheet_tiles(out, f"[{label}] " if len(args.outputs) > 1 else "")
    require(tiles, "no image in " + ", ".join(args.outputs))
    failures = [tile for tile in tiles if tile[2] is not None and tile[2] < 0.5]
    if args.failed:
        tiles = failures

    shown = tiles[:args.limit or 60]
    side = args.cell
    count = max(1, len(shown))
    rows = (count + args.columns - 1) // args.columns
    size = (min(args.columns, count) * (side + 12), rows * (side + 56))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)

    for k, (path, prompt, mark) in enumerate(shown):
        x = k % args.columns * (side + 12) + 3
        y = k // args.columns * (side + 56) + 3
        try:
            image = ImageOps.pad(load_image(path), (side, side), color="white")
        except UNREADABLE:
            image = Image.new("RGB", (side, side), "white")
            mark = 0.0
            prompt = f"missing or unreadable: {prompt}"

        color = "#999999"
        if mark is not None:
            color = "#c62828" if mark < 0.5 else "#2e7d32"
        sheet.paste(ImageOps.expand(image, 3, color), (x, y))
        words = textwrap.wrap(prompt, max(1, side // 6), max_lines=3)
        draw.text((x + 3, y + side + 7), "\n".join(words), "black", font, spacing=2)

    target = Path(args.out or out / "eval" / "contact_sheet.png")
    common.write(target, sheet)
    print(f"{target}: {len(shown)} of {len(tiles)} images, {len(failures)} marked as failed")


# ==== 10. The command line ========================================================================


def json_object(text):
    """The type of --judge-extra."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or {"model", "messages"} & value.keys():
        raise argparse.ArgumentTypeError(
            f"{text} is not a JSON object of fields other than model and messages")
    return value


JUDGED = "dpg wise compbench imgedit gedit"
STRINGS = "pope mme gqa mmmu seed"
OWN = "geneval recon shapes"
PICTURES = f"{JUDGED} {OWN}"
SCORED = f"{PICTURES} {STRINGS}"

# Flag, sub-commands (!: required), what argparse is told.
OPTIONS = (
    ("--prompts", "geneval! wise! compbench! imgedit! gedit! shapes",
     dict(help="prompts or metadata, as released")),
    ("--judge-prompt", "wise! compbench! imgedit! gedit!",
     dict(help="the judge's text: a file, or the official .py")),
    ("--sources", "imgedit! recon! shapes", dict(type=Path, help="folder of the source images")),
    ("--samples", "geneval dpg",
     dict(type=int, default=4, help="images per prompt (4; starred rows: 12)")),
    ("--detector", "geneval", dict(default="facebook/mask2former-swin-small-coco-instance")),
    ("--clip", "geneval recon", dict(default="openai/clip-vit-large-patch14")),
    ("--questions", "dpg! pope! mme! gqa! mmmu! seed!",
     dict(help="the benchmark's questions, as released")),
    ("--grid", "dpg",
     dict(type=int, metavar="SIDE", help="<name>.png is a 2 x 2 grid of such samples")),
    ("--prepare", STRINGS,
     dict(metavar="FILE", help="write the question file for --describe instead of scoring")),
    ("--labels", "pope", dict(help="folder of the coco_pope_*.json")),
    ("--images", "mme", dict(help="folder of the images, to write their paths")),
    ("--judge", JUDGED, dict(help="model: hub id or folder; with --judge-url its name there")),
    ("--judge-url", JUDGED,
     dict(help="OpenAI-compatible endpoint, https://host/v1; the key from OPENAI_API_KEY")),
    ("--judge-extra", JUDGED,
     dict(type=json_object, metavar="JSON", help="more fields of each request to the endpoint, as "
          "{\"reasoning_effort\": \"low\"}; they replace ours")),
    ("--workers", JUDGED, dict(type=int, default=8, help="requests at a time (8)")),
    ("--rate", JUDGED, dict(type=float, help="requests a minute, at most")),
    ("--retries", JUDGED, dict(type=int, default=5, help="after 429, 5xx, time-outs (5)")),
    ("--timeout", JUDGED, dict(type=float, default=120, help="seconds for one reply (120)")),
    ("--reask", JUDGED,
     dict(type=int, default=2, help="more tries where a reply cannot be read (2)")),
    ("--device", PICTURES, dict(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")),
    ("--batch", PICTURES,
     dict(type=int, help="of a local model (default: 8 on a GPU, 1 on a CPU)")),
    ("--strict", SCORED, dict(action="store_true", help="what would be left out is an error")),
    ("--columns", "contact-sheet", dict(type=int, default=6)),
    ("--cell", "contact-sheet", dict(type=int, default=192, help="width of a picture")),
    ("--failed", "contact-sheet", dict(action="store_true", help="only the failed ones")),
    ("--limit", f"{SCORED} contact-sheet", dict(type=int, help="only the first N")),
    ("--out", f"{SCORED} contact-sheet",
     dict(help="where results go (default: eval/ in OUTPUTS)")),
)


def parse_args(argv):
    form = argparse.RawDescriptionHelpFormatter
    top = common.Parser(description=__doc__, formatter_class=form)
    commands = top.add_subparsers(
        dest="benchmark", required=True, parser_class=common.Parser, metavar="BENCHMARK")
    for name in [*BENCHMARKS, "contact-sheet"]:
        work = BENCHMARKS[name].work if name in BENCHMARKS else contact_sheet
        sub = commands.add_parser(name, description=work.__doc__, formatter_class=form)
        sub.add_argument("outputs", nargs="*",
                         help="[LABEL=]PATH[,PATH ...]: rows of the table, seeds of a row")
        for flag, where, words in OPTIONS:
            if name in where.replace("!", "").split():
                sub.add_argument(flag, required=f"{name}!" in where.split(), **words)

    args = top.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = name in ("retries", "reask") and value == 0
            require(value > 0 or least, f"--{name} {value} is not above 0")
    require(args.outputs or getattr(args, "prepare", None), "nothing to score: give OUTPUTS")
    return args


def main(argv=None):
    def command():
        args = parse_args(argv)
        try:
            if args.benchmark == "contact-sheet":
                contact_sheet(args)
            else:
                run(args)
        except KeyboardInterrupt:
            print("interrupted; what was judged is kept: the same command goes on from there",
                  file=sys.stderr)
            sys.exit(130)
    common.cli(command)


if __name__ == "__main__":
    main()
