"""Draws the picture of docs/toy-study.md: a panel for each claim of the paper, with what the tiny
models say of it.

    python tiny/study.py out/toy assets/study.png

The first folder holds the finished runs of that page, out/toy/MODEL/RUN/seed0, seed1, ...
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

GREY = "#9e9e9e"        # before
BLUE = "#1565c0"        # RecA
ORANGE = "#ef6c00"      # fine-tuning on captions
PALE_BLUE = "#90caf9"   # RecA, changed

# A picture's layout, in pixels.
LABEL = 210     # left of the bars
SCALE = 3       # of one percent
NUMBER = 90     # right of them
LINE = 24       # from bar to bar
GAP = 10        # before each group of bars
HEAD = 70       # above them
FOOT = 46       # below them


@dataclass
class Panel:
    """A claim and what is to show it."""

    claim: str
    paper: str  # what the paper has about it
    score: str  # the name of a score in the runs' scores.json
    unit: str
    bars: list  # (label, folder of the runs, "before" or "after" their training, color)


NAMES = {"openuni": "OpenUni", "harmon": "Harmon", "showo": "Show-o",
         "showo-vq": "Show-o, no CLIP", "bagel": "BAGEL"}


def compare(models, runs):
    """Bars for each model: what its runs began with, and what each of `runs` led to, which are
    (label, folder within the model's, color)."""
    bars = []
    for model in models:
        bars.append((f"{NAMES[model]}, before", f"{model}/reca", "before", GREY))
        for label, run, color in runs:
            bars.append((label, f"{model}/{run}", "after", color))
    return bars


BEFORE_AND_AFTER = compare(NAMES, [("RecA", "reca", BLUE)])

# Beside fine-tuning on captions (SFT), on the same images for as many steps: where RecA comes
# nearest to captions that say everything, and where it stays farthest behind them.
BESIDE_CAPTIONS = compare(("openuni", "bagel"), [
    ("SFT, sparse captions", "sparse", ORANGE),
    ("RecA, no caption", "reca", BLUE),
    ("SFT, full captions", "full", ORANGE),
])

# What is read of an image. BAGEL: its ViT, as RecA has it, or the VAE of its generation side. Show-o
# without CLIP: the tokens of a smaller image, or the very tokens that it paints.
CONDITIONS = [
    *compare(["bagel"], [
        ("RecA from the ViT", "reca", BLUE),
        ("RecA from the VAE", "vae", PALE_BLUE),
    ]),
    *compare(["showo-vq"], [
        ("RecA from 32 px", "reca", BLUE),
        ("RecA from all 64 px", "64", PALE_BLUE),
    ]),
]

# Where understanding shares weights with generation.
UNDERSTANDING = compare(("harmon", "showo"), [
    ("RecA", "reca", BLUE),
    ("RecA, lambda_i2t 0", "i2t0", PALE_BLUE),
])

TEXT = "text to image, percent of what was asked"
WHOLE = "percent of images that come back whole"
RIGHT = "percent of images described rightly"
PANELS = [
    Panel(
        "Words are followed better after RecA, which reads none",
        "table 1: Harmon-1.5B from 73 to 86 on GenEval",
        "overall", TEXT, BEFORE_AND_AFTER),
    Panel(
        "Most so what captions had left out: here, colors",
        "figure 3: captions rarely say that broccoli is green",
        "colors", TEXT, BEFORE_AND_AFTER),
    Panel(
        "What a model understands, it learns to paint",
        "figures 16 and 17: reconstructions before and after",
        "reconstruction", WHOLE, BEFORE_AND_AFTER),
    Panel(
        "RecA goes beyond fine-tuning on captions (SFT) that say little",
        "table 5: 86 on GenEval instead of 75",
        "overall", TEXT, BESIDE_CAPTIONS),
    Panel(
        "It needs the embeddings of understanding, not of generation",
        "tables 7 and F.2: from the VAE, or from all tokens, there is no gain",
        "overall", TEXT, CONDITIONS),
    Panel(
        "L_i2t preserves understanding, where weights are shared",
        "section 2.2: lambda_i2t 1 for Show-o and Harmon",
        "understanding", RIGHT, UNDERSTANDING),
]


def read_scores(folder, moment, score):
    """Percent, one number for each seed's run."""
    runs = sorted(folder.glob("seed*"))
    if not runs:
        raise common.InputError(f"no runs in {folder}: docs/toy-study.md has their commands")
    return [100 * common.read_json(run / "scores.json")[moment][score] for run in runs]


def draw_panel(panel, runs):
    """-> an image"""
    # Where each bar begins. A grey one, "before", begins a group.
    tops = []
    bottom = HEAD - GAP
    for *_, color in panel.bars:
        bottom += GAP if color == GREY else 0
        tops.append(bottom)
        bottom += LINE

    width = LABEL + 100 * SCALE + NUMBER
    image = Image.new("RGB", (width, bottom + FOOT), "white")
    draw = ImageDraw.Draw(image)
    small = ImageFont.load_default(13)
    draw.text((12, 12), panel.claim, "black", ImageFont.load_default(16))
    draw.text((12, 36), f"The paper, {panel.paper}", "#555555", small)

    # The axis.
    for percent in (0, 25, 50, 75, 100):
        x = LABEL + percent * SCALE
        draw.line((x, HEAD - 4, x, bottom), "#dddddd")
        draw.text((x, bottom + 2), str(percent), "#555555", small, anchor="ma")
    middle = LABEL + 50 * SCALE
    draw.text((middle, bottom + 20), panel.unit, "#555555", small, anchor="ma")

    for top, (label, folder, moment, color) in zip(tops, panel.bars):
        draw_bar(draw, top, label, read_scores(runs / folder, moment, panel.score), color)
    return image


def draw_bar(draw, top, label, values, color):
    """A bar for the mean of the seeds, with their whole range: of five seeds it says more than a
    deviation."""
    small = ImageFont.load_default(13)
    mean = sum(values) / len(values)
    end = LABEL + mean * SCALE
    y = top + (LINE - 6) // 2
    draw.text((LABEL - 8, y), label, "black", small, anchor="rm")
    draw.rectangle((LABEL, top, end, top + LINE - 6), color)

    low = LABEL + min(values) * SCALE
    high = LABEL + max(values) * SCALE
    if max(values) - min(values) > 0.5:
        draw.line((low, y, high, y), "black")
        draw.line((low, y - 4, low, y + 4), "black")
        draw.line((high, y - 4, high, y + 4), "black")
    draw.text((max(end, high) + 8, y), f"{mean:.0f}", "black", small, anchor="lm")


def draw_study(panels, runs):
    """All panels, two beside each other."""
    drawn = [draw_panel(panel, runs) for panel in panels]
    rows = [drawn[k:k + 2] for k in range(0, len(drawn), 2)]
    heights = [max(panel.height for panel in row) for row in rows]
    sheet = Image.new("RGB", (2 * drawn[0].width, sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights):
        for column, panel in enumerate(row):
            sheet.paste(panel, (column * panel.width, top))
        top += height
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    common.write(args.picture, draw_study(PANELS, args.runs))
    print(args.picture)


if __name__ == "__main__":
    common.cli(main)
