"""The drawings of the documentation, as SVG.

python scripts/drawings.py [FOLDER]        default: docs/drawings
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("#4063d8", "#389826", "#cb3c33", "#9558b2")
GREY, PALE = "#8a8a8a", "#dddddd"
# Plain shapes and the reader's own font; the same drawing gives the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "recformer", "font.size": 10}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many units, a unit being half an inch, without axes."""
    figure, axes = plt.subplots(figsize=(width / 2, height / 2))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    text: str = "",
    colour: str = GREY,
    height: float = 0.8,
) -> None:
    """A filled box with a word in it."""
    axes.add_patch(Rectangle((x, y), width - 0.06, height, color=colour, linewidth=0))
    dark = colour in (PALE, "white")
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center",
        color="black" if dark else "white", fontsize=9,
    )  # fmt: skip


def sentence() -> Figure:
    """A history of two items as tokens, with token types and item positions."""
    figure, axes = canvas(18, 4.2)
    words = [("<s>", 0, 0)]
    for position, item in enumerate(
        [("title", "red tent", "brand", "Acme"), ("title", "gas stove", "brand", "Borex")], 1
    ):
        for number, part in enumerate(item):
            words += [(word, 1 + number % 2, position) for word in part.split()]
    x = 3.0
    for label, y in (("tokens", 2.6), ("token type", 1.6), ("item position", 0.6)):
        axes.text(2.8, y + 0.4, label, ha="right", va="center")
    for word, kind, position in words:
        width = 1.25
        box(axes, x, 2.6, width, word, COLOURS[position - 1] if position else "#444444")
        box(axes, x, 1.6, width, str(kind), PALE)
        box(axes, x, 0.6, width, str(position), PALE)
        x += width
    axes.text(4.25 + 2.5 * 1.25, 3.7, "newest item", ha="center", color=COLOURS[0])
    axes.text(4.25 + 7.5 * 1.25, 3.7, "the one before", ha="center", color=COLOURS[1])
    return figure


def packed() -> Figure:
    """Four sequences of different lengths, padded and packed."""
    figure, axes = canvas(18, 4.8)
    lengths, size, unit = (4, 9, 2, 5), 9, 0.8
    axes.text(0.2, 4.4, f"padded: {len(lengths) * size} places", va="center")
    for row, length in enumerate(lengths):
        for place in range(size):
            colour = COLOURS[row] if place < length else PALE
            box(axes, 0.2 + place * unit, 3.1 - row * 0.9, unit, "", colour)
    axes.text(8.6, 4.4, f"packed: {sum(lengths)} tokens", va="center")
    x = 8.6
    for row, length in enumerate(lengths):
        for _ in range(length):
            box(axes, x, 3.1, 0.46, "", COLOURS[row])
            x += 0.46
    starts = [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    axes.text(8.6, 2.5, f"borders {starts}", va="center", color=GREY)
    return figure


def band() -> Figure:
    """Pairs of tokens that see each other: two sequences in one run, a window of 4."""
    lengths, half = (9, 6), 2
    total = sum(lengths)
    figure, axes = canvas(total * 0.7 + 5.5, total * 0.7 + 1.2)
    first = {row: start for start, stop in ((0, 9), (9, 15)) for row in range(start, stop)}
    for query in range(total):
        for key in range(total):
            colour = PALE
            if first[query] == first[key]:
                if query == first[query]:
                    colour = COLOURS[2]  # <s> sees all of its sequence
                elif key == first[key]:
                    colour = COLOURS[1]
                elif abs(query - key) <= half:
                    colour = COLOURS[0]
            y = (total - 1 - query) * 0.7 + 0.2
            box(axes, 0.2 + key * 0.7, y, 0.7, "", colour, height=0.64)
    texts = ("window", "to <s>", "<s> to all", "unseen")
    for number, (colour, text) in enumerate(zip((*COLOURS[:3], PALE), texts)):
        y = total * 0.7 - 1 - number * 1.1
        box(axes, total * 0.7 + 0.8, y, 0.8, "", colour)
        axes.text(total * 0.7 + 1.9, y + 0.4, text, va="center")
    axes.text(0.2, total * 0.7 + 0.6, "keys, left to right; queries, top to bottom", color=GREY)
    return figure


def ties() -> Figure:
    """A target that is tied with two others behind two items above it."""
    figure, axes = canvas(16, 5.2)
    scores = (0.91, 0.84, 0.70, 0.70, 0.70, 0.55, 0.31, 0.12)
    tied = [rank for rank, score in enumerate(scores, 1) if score == 0.70]
    for rank, score in enumerate(scores, 1):
        box(axes, 0.4 + 1.1 * rank, 3, 1.1, f"{score:.2f}", COLOURS[0] if rank in tied else GREY)
        axes.text(0.95 + 1.1 * rank, 2.6, str(rank), ha="center", va="center", color=GREY)
    axes.text(1.3, 3.4, "score", ha="right", va="center")
    axes.text(1.3, 2.6, "rank", ha="right", va="center", color=GREY)
    axes.text(0.95 + 4.4, 4.3, "the target is one of these three", ha="center", color=COLOURS[0])
    gains = [1 / math.log2(1 + rank) for rank in tied]
    terms, mean = " + ".join(f"{gain:.3f}" for gain in gains), sum(gains) / len(gains)
    axes.text(0.4, 1.5, f"NDCG at the ranks 3, 4 and 5: {terms.replace(' +', ',')}")
    axes.text(0.4, 0.6, f"expected NDCG = ({terms}) / 3 = {mean:.3f}")
    return figure


def splits() -> Figure:
    """Three users' items by leave-one-out, and by two points in time."""
    figure, axes = canvas(18, 6.4)
    times = ([1, 2.4, 3.2, 5.0, 6.4], [2, 3, 4.4, 7.2], [0.6, 4.6, 5.5, 6.6, 7.6])
    parts = (COLOURS[0], COLOURS[1], COLOURS[2])
    for column, title in ((0.4, "leave-one-out"), (9.6, "cut in time")):
        axes.text(column, 5.9, title, va="center")
        for row, moments in enumerate(times):
            y = 4.4 - row * 1.3
            axes.plot([column, column + 8], [y + 0.4] * 2, color=PALE, zorder=0)
            if column < 9:
                kinds = [0] * (len(moments) - 2) + [1, 2]
            else:  # the last item between the cuts, and the last behind the second
                between = [time for time in moments if 4 <= time < 6]
                behind = [time for time in moments if time >= 6]
                targets = {**dict.fromkeys(between[-1:], 1), **dict.fromkeys(behind[-1:], 2)}
                kinds = [targets.get(time, 0 if time < 4 else 3) for time in moments]
            for time, kind in zip(moments, kinds, strict=True):
                colour = parts[kind] if kind < 3 else GREY
                box(axes, column + time - 0.3, y, 0.66, "", colour)
    for cut in (4, 6):
        axes.plot([9.6 + cut] * 2, [1.2, 5.5], color="black", linewidth=1, linestyle="--")
    texts = ("training", "validation", "test", "history alone")
    for number, (text, colour) in enumerate(zip(texts, (*parts, GREY))):
        box(axes, 0.4 + number * 4.2, 0.2, 0.6, "", colour, height=0.5)
        axes.text(1.2 + number * 4.2, 0.45, text, va="center")
    return figure


DRAWINGS: dict[str, Callable[[], Figure]] = {
    "sentence": sentence,
    "packed": packed,
    "band": band,
    "ties": ties,
    "splits": splits,
}


def main(folder: Path) -> None:
    """Draw all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "drawings")
