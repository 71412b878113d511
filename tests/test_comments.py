"""Every shape comment is checked by running: the tiny models train and answer under a trace. Wherever a
statement with a comment like `# [B, N, 4*D]` was executed, the tensors that it made have that shape; so have the
arguments and the result of a function whose docstring says "x [B, N, D]" or "-> [B, D]". A name is an integer variable
of the function, or gets its value where it first stands in a call, and keeps it until that line runs again."""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch

import common

ROOT = Path(__file__).parent.parent
SHAPE = r"\[([^\[\]]+)\]"


def shape_comments(path):
    """-> {(first line, last line) of a statement: [(key of a dict's entry or None, dimensions, line)]}, and under the
    same span the names that it assigns (None: a return)."""
    source, comments, targets = path.read_text(), {}, {}
    made = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return))]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        shape = token.type == tokenize.COMMENT and re.search(SHAPE, token.string.split("->")[-1])
        line = token.start[0]
        around = [node for node in made if node.lineno <= line <= node.end_lineno]
        text = ast.unparse(around[-1]) if shape and around else "self."
        if text.startswith("self.") or text.endswith("= []"):              # a module; a list that is filled afterwards
            continue
        statement, key = around[-1], None
        if isinstance(statement.value, ast.Dict):                                      # a comment beside one entry
            key = [k.value for k, v in zip(statement.value.keys, statement.value.values) if v.lineno <= line][-1]
        span = statement.lineno, statement.end_lineno
        comments.setdefault(span, []).append((key, shape[1].split(", "), line))
        places = getattr(statement, "targets", None) or [getattr(statement, "target", statement)]
        names = [node.id for place in places for node in ast.walk(place) if isinstance(node, ast.Name)]
        targets[span] = None if isinstance(statement, ast.Return) else names
    return comments, targets


def shape_docstrings(path):
    """-> {first line of a function: ({argument: dimensions}, dimensions of the result or None)}."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        text = isinstance(node, ast.FunctionDef) and " ".join((ast.get_docstring(node) or "").split())
        if text:
            arguments = {arg.arg for arg in node.args.args + node.args.kwonlyargs}
            told = {m[1]: m[2].split(", ") for m in re.finditer(rf"(\w+):? {SHAPE}", text) if m[1] in arguments}
            result = re.search(rf"-> {SHAPE}", text)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[first] = told, result and result[1].split(", ")
    return found


def tensors(value):
    """The tensors and arrays in a value, a list, a tuple or a dict."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value]
    value = list(value.values()) if isinstance(value, dict) else value
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def fits(dimension, size, names):
    """Is `size` what `dimension` says ("B", "4*D", "2B", "G = V+E", "C or Dd", "32")? New single names are noted."""
    *defined, text = dimension.split(" = ")
    names.update(dict.fromkeys(defined, size))
    options = []
    for option in text.split(" or "):
        formula = re.sub(r"(\d)\s*([A-Za-z])", r"\1*\2", option).replace("/", "//")
        if formula.isidentifier() and option == text:
            names.setdefault(formula, size)
        try:
            options.append(eval(formula, {}, names))                                         # text of this repository
        except (NameError, SyntaxError):
            options.append(size)                                              # words, or a name without a value yet
    return size in options


class Watch:
    """sys.settrace, for the functions of one file: after each statement with a shape comment, its tensors."""

    def __init__(self, path):
        self.path, self.docstrings = path, shape_docstrings(path)
        self.comments, self.targets = shape_comments(path)
        self.seen, self.wrong = set(), set()

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if code.co_filename != str(self.path) or code.co_name.startswith("<"):
            return None
        names, running = {}, None
        told, result = self.docstrings.get(code.co_firstlineno, ({}, None))
        for name, dimensions in told.items():
            self.check(code.co_firstlineno, dimensions, frame.f_locals[name], names, frame)

        def local(frame, event, returned):
            nonlocal running
            if event == "exception":
                running = None
            if running and (event == "return" or not running[0] <= frame.f_lineno <= running[1]):
                made = self.targets[running]
                value = returned if made is None else [frame.f_locals.get(name) for name in made]
                for key, dimensions, line in self.comments[running]:
                    self.check(line, dimensions, value if key is None else value[key], names, frame)
                running = None
            if event == "return" and result:
                self.check(code.co_firstlineno, result, returned, names, frame)
            if event == "line" and running is None:
                running = next((s for s in self.comments if s[0] <= frame.f_lineno <= s[1]), None)
            return local
        return local

    def check(self, line, dimensions, value, names, frame):
        for name in [name for name, (_, where) in names.items() if where == line]:       # the next turn of a loop
            del names[name]
        integers = {name: v for name, v in frame.f_locals.items() if type(v) is int}
        for tensor in tensors(value):
            self.seen.add(line)
            known = {**{name: size for name, (size, _) in names.items()}, **integers}
            if "..." not in dimensions and not (len(dimensions) == tensor.ndim and all(
                    [fits(d, size, known) for d, size in zip(dimensions, tensor.shape)])):
                self.wrong.add(f"{self.path.name}:{line}: [{', '.join(dimensions)}] is {list(tensor.shape)}, {known}")
            new = known.keys() - names.keys() - integers.keys()
            names.update({name: (known[name], line) for name in new})


def test_the_watch_sees_wrong_shapes(tmp_path, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "import torch\n\n\ndef f(B, z):\n    '''z [D, B] -> [B]'''\n    x = torch.zeros(B, 4)   # [B, D]\n"
        "    y = torch.cat([x,\n                   x])   # [2B, 2D]\n    return y.T   # [D, 2*B]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import wrong
    watch = Watch(tmp_path / "wrong.py")
    sys.settrace(watch)
    wrong.f(3, torch.zeros(4, 3))
    sys.settrace(None)
    assert sorted(line.split(", {")[0] for line in watch.wrong) == [
        "wrong.py:4: [B] is [4, 6]", "wrong.py:8: [2B, 2D] is [6, 4]"] and watch.seen == {4, 6, 8, 9}


@pytest.mark.parametrize("name", ("harmon", "showo", "openuni", "bagel"))
def test_shape_comments_hold(name, tmp_path, monkeypatch):
    """Steps of every loss, previews, scores, and all ways of inference."""
    watch, script = Watch(ROOT / f"reca_{name}.py"), __import__(f"reca_{name}")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross at the top left\n")
    images = tmp_path / "images"
    images.mkdir()
    for i in range(2):
        common.Shapes(64)[i][1].save(images / f"{i}.png")
    flags = ["--model", "tiny", "--steps", 2, "--batch", 3, "--captions", "sparse", "--workers", 0,
             "--self-captions", 4, "--max-new-tokens", 4, "--sampling-steps", 2, "--out", tmp_path / "out",
             "--generate", tmp_path / "prompts.txt", "--reconstruct", images, "--describe", images]
    if name == "showo":                                                    # the tiny one paints without guidance
        flags += ["--guidance-scale", 2]
    monkeypatch.setattr(sys, "argv", [f"reca_{name}.py", *map(str, flags)])
    sys.settrace(watch)
    try:
        script.main()
        if name == "openuni":              # its understanding is frozen: main() trains no L_i2t, which only measures
            model = script.OpenUni.from_pretrained("tiny")
            samples = [model.preprocess(common.Shapes(64)[0][1], "i2t"), {}]
            talks = [[(common.SEED_TEMPLATE, "red circle")], [("what is red ?", "a circle"), ("where ?", "top-left")]]
            model.i2t_loss(model.encode(samples, "i2t"), talks)
    finally:
        sys.settrace(None)
    assert not watch.wrong, "\n".join(sorted(watch.wrong))
    lines = {line for rows in watch.comments.values() for _, _, line in rows}
    assert lines <= watch.seen, f"not executed: {sorted(lines - watch.seen)}"
