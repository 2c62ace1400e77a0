"""Meaning of first-level codes: the most typical words of their items, as a table and a picture.

Shapes: N items, G first-level codes in use, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.feature_extraction.text import CountVectorizer

from recformer.evaluation.table import latex_table, markdown_table
from recformer.files import atomic_write
from recformer.pictures import drawable
from recformer.preparation.text import cut_words

WORDS = 3  # shown of a code
CAPTION = "Share of the code's items that have the word in brackets."
ROWS_OF_A_COLUMN = 64


@dataclass(frozen=True)
class CodeWords:
    """A first-level code.

    Attributes:
        code: its number.
        size: items that have it.
        children: second-level codes among them.
        category, title: typical words, each with the share of the code's items that have it.
    """

    code: int
    size: int
    children: int
    category: list[tuple[str, float]]
    title: list[tuple[str, float]]


def describe(codes: np.ndarray, items: Sequence[dict[str, str]]) -> list[CodeWords]:
    """Every first-level code in use, the largest first.

    Args:
        codes: int64 (N, L).
        items: their attributes; where no item has a `category`, all attributes but the title stand
            in for it.
    """
    first, groups, sizes = np.unique(codes[:, 0], return_inverse=True, return_counts=True)
    pairs = np.unique(codes[:, :2], axis=0)
    children = np.unique(pairs[:, 0], return_counts=True)[1]
    rest = [{name: text for name, text in item.items() if name != "title"} for item in items]
    if any("category" in item for item in items):
        rest = [{"category": item.get("category", "")} for item in items]
    category = typical_words([" ".join(item.values()) for item in rest], groups)
    title = typical_words([item.get("title", "") for item in items], groups)
    rows = [
        CodeWords(int(first[g]), int(sizes[g]), int(children[g]), category[g], title[g])
        for g in range(len(first))
    ]
    return sorted(rows, key=lambda row: (-row.size, row.code))


def typical_words(texts: list[str], groups: np.ndarray) -> list[list[tuple[str, float]]]:
    """The words that tell each group of texts from all texts, with the share of it that has them.

    A word weighs p log(p / q), where p of the group's texts and q of all texts have it: frequent
    here and rare elsewhere.

    Args:
        texts: N of them.
        groups: (N,) group of each, 0 to G - 1, none empty.
    """
    count = int(groups.max()) + 1
    words_of = partial(cut_words, words=CountVectorizer().build_analyzer())
    vectorizer = CountVectorizer(binary=True, analyzer=words_of)
    try:
        has_word = vectorizer.fit_transform(texts)  # (N, V)
    except ValueError:  # scikit-learn's word for texts without any word
        return [[] for _ in range(count)]
    words = vectorizer.get_feature_names_out()
    member = sparse.csr_array((np.ones(len(texts)), (groups, np.arange(len(texts)))))
    inside = (member @ has_word).toarray() / np.bincount(groups)[:, None]  # (G, V)
    overall = np.asarray(has_word.mean(axis=0)).ravel()  # (V,)
    weight = inside * np.log(np.maximum(inside, 1e-12) / overall)
    order = np.argsort(-weight, axis=1, kind="stable")[:, :WORDS]  # ties by the alphabet
    return [
        [(str(words[v]), float(inside[g, v])) for v in order[g] if weight[g, v] > 0]
        for g in range(count)
    ]


def cells(rows: list[CodeWords]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table, a row a code."""

    def shown(words: list[tuple[str, float]]) -> str:
        return ", ".join(f"{word} ({share:.0%})" for word, share in words)

    lines = [
        [str(r.code), str(r.size), str(r.children), shown(r.category), shown(r.title)] for r in rows
    ]
    return ["code", "items", "second-level codes", "category", "title"], lines


def markdown(rows: list[CodeWords]) -> str:
    """The table, and what stands in brackets."""
    return f"{CAPTION}\n\n{markdown_table(*cells(rows))}"


def latex(rows: list[CodeWords]) -> str:
    """The same in LaTeX."""
    return f"% {CAPTION}\n{latex_table(*cells(rows))}"


def records(rows: list[CodeWords]) -> list[dict[str, Any]]:
    """Rows for CSV: a column a word and one its share, in full."""
    found = []
    for row in rows:
        record: dict[str, Any] = {"code": row.code, "items": row.size}
        record["second-level codes"] = row.children
        for part, words in (("category", row.category), ("title", row.title)):
            padded = [*words, *[("", None)] * (WORDS - len(words))]
            for number, (word, share) in enumerate(padded, 1):
                record |= {f"{part} {number}": word, f"{part} {number} share": share}
        found.append(record)
    return found


def plot(rows: list[CodeWords], path: Path) -> None:
    """PNG: a bar a code, its length the number of items, its words beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = math.ceil(len(rows) / ROWS_OF_A_COLUMN)
    height = 0.7 + 0.17 * min(len(rows), ROWS_OF_A_COLUMN)
    figure, axes = pyplot.subplots(
        1, columns, figsize=(4.8 * columns, height), squeeze=False, constrained_layout=True
    )
    largest = rows[0].size
    for column, axis in enumerate(axes[0]):
        shown = rows[column * ROWS_OF_A_COLUMN : (column + 1) * ROWS_OF_A_COLUMN]
        axis.barh(range(len(shown)), [row.size for row in shown], color="C0", alpha=0.35)
        for place, row in enumerate(shown):
            words = drawable(
                [" ".join(word for word, _ in part) for part in (row.category, row.title)]
            )
            axis.text(0, place, f" {row.size}  {words[0]} | {words[1]}", fontsize=7, va="center")
        axis.set_yticks(range(len(shown)), [row.code for row in shown], fontsize=7)
        axis.set_ylim(min(len(rows), ROWS_OF_A_COLUMN) - 0.5, -0.5)
        axis.set_xlim(0, largest)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle("First-level code: items, category words | title words", fontsize=9)
    with atomic_write(path, "wb") as handle:
        figure.savefig(handle, format="png", dpi=110)
    pyplot.close(figure)
