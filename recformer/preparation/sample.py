"""A synthetic shop in the raw Amazon-2018 two-file format, made from a seed by the code below.

`recformer sample --output_dir DIR` writes `meta_<Category>.json.gz` and
`<Category>_5.json.gz` for five categories: `PRETRAIN_CATEGORIES`, `VALIDATION_CATEGORY` and
`TARGET_CATEGORY`, whose products and reviewers occur in no other file. All names are invented.

What there is to learn. A product belongs to a cell, one of ten families (lights, locks, helmets …)
at one of four stages, and has a style, a colour and a brand; all of it stands in its text. A
reviewer goes from cell to cell and takes in each the product that suits him:

- **Complementarity.** Within a family stages follow each other: starter kit, accessory,
  replacement, professional upgrade; often, too, another product of the same cell. After the upgrade
  comes the next family's starter kit. The words of the stages are the same in all categories, so
  that what is learned on some helps on another. The order of the families has to be learned in
  each, except for the four that all have in common.
- **Taste clusters and drift.** A reviewer is interested in a few families, and in other ones at the
  end than at the beginning; some change their style on the way.
- **Style, colour and brand loyalty.** Each reviewer has a favourite of each and mostly keeps to it;
  brands have a style that they are known for.
- **Popularity.** Some brands are better known than others, and products of a brand differ.

`Shop.step_probabilities` is the exact law of the next product, hence the ceiling of every model.

The files have what real ones have: HTML entities, script fragments in titles, null, empty and
missing fields, fields nobody reads, products without reviews and reviews of unknown products,
duplicate reviews and duplicate metadata rows. Times are Unix seconds of whole days.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from recformer.files import atomic_write
from recformer.preparation.sample_catalogue import (
    COLOURS,
    COMMON_BRANDS,
    DEPARTMENTS,
    MODEL_BACK,
    MODEL_FRONT,
    OPINIONS,
    SIZES,
    STAGE_CATEGORIES,
    STAGE_TITLES,
    STYLES,
    SURNAMES,
)

PRETRAIN_CATEGORIES = ("Camping", "Kitchen", "Garden")
VALIDATION_CATEGORY = "Music"
TARGET_CATEGORY = "Cycling"
CATEGORIES = (*PRETRAIN_CATEGORIES, VALIDATION_CATEGORY, TARGET_CATEGORY)

NUM_REVIEWERS = 800  # of one category
NEW_REVIEWERS = 600  # the others also stand in the category before (but not in the target's)
REVIEWS_OF_A_REVIEWER = range(5, 10)
PRODUCTS_OF_A_CELL = (6, 7, 8, 9)  # 10 families x 4 stages x 7.5 = 300 products
DAY = 86_400
FIRST_DAY = 14_610  # 2010-01-01

STARTER, ACCESSORY, REPLACEMENT, UPGRADE = range(4)


NUM_FAMILIES = 10
NUM_CELLS = 4 * NUM_FAMILIES

# The law of a step. Weights of a kind add up to one.
BEFORE_UPGRADE = (0.76, 0.10, 0.14)  # same family, the one after it, one to the reviewer's taste
AFTER_UPGRADE = (0.08, 0.64, 0.28)  # the same three
NEXT_STAGE, SAME_STAGE = 0.62, 0.30  # within a family; the other two stages share the rest
FRESH_START = 0.80  # in another family: its starter kit; the other three stages share the rest
STYLE_PULL, COLOUR_PULL, BRAND_PULL = 2.2, 1.8, 1.8  # log odds of the favourite
REPEAT = 0.02  # factor on what the reviewer has bought already
TASTES = (0.50, 0.30)  # of the two families a reviewer likes best, beyond .02 for each
ZIPF_EXPONENT, ZIPF_SHIFT = 0.25, 4.0
FAME_EXPONENT = 0.5
SPECIALISATION = 0.6  # share of a brand's products made in its own style on purpose


@dataclass(frozen=True)
class Reviewer:
    """A reviewer in one category: favourites, tastes, and what was bought when.

    Attributes:
        styles: favourite of `STYLES` in the first and in the second half of the purchases.
        colour, brand: favourite of `COLOURS` and of the category's brands.
        tastes: float64 (2, NUM_FAMILIES) interests at the beginning and at the end, rows sum to 1.
        length: purchases to make.
        purchases: product numbers, oldest first.
        days: day number (since 1970) of each purchase, strictly increasing.
    """

    reviewer_id: str
    name: str
    styles: tuple[int, int]
    colour: int
    brand: int
    tastes: np.ndarray
    length: int
    purchases: list[int] = field(default_factory=list)
    days: list[int] = field(default_factory=list)


class Shop:
    """One category: its products, and the reviewers who went through it.

    Attributes:
        brands: names of the brands.
        rows: metadata rows, one a product, in product number order.
        unsold: metadata rows of products nobody reviewed.
        cells: int64 (P,) cell of every product, family x 4 + stage, ascending.
        styles, colours, makers: int64 (P,) of every product, index into `STYLES`, `COLOURS`,
            `brands`.
        appeal: float64 (P,) popularity within the cell.
        reviewers: with their purchases.
    """

    def __init__(self, category: str, seed: int = 0) -> None:
        number = CATEGORIES.index(category)
        self.category = category
        self.department = DEPARTMENTS[category]
        self.brands = COMMON_BRANDS + self.department.brands
        draw = self._random = Random(f"{category} {seed}")

        cells = [cell for cell in range(NUM_CELLS) for _ in range(draw.choice(PRODUCTS_OF_A_CELL))]
        ranks = np.array(draw.sample(range(len(cells)), len(cells)))
        self.cells = np.array(cells)
        self.makers = np.array([draw.randrange(len(self.brands)) for _ in cells])
        self.styles = np.array([self._style(maker) for maker in self.makers])
        self.colours = np.array([draw.randrange(len(COLOURS)) for _ in cells])
        fame = np.array([draw.random() for _ in self.brands])
        fame = (fame.argsort().argsort() + 1.0) ** -FAME_EXPONENT
        self.appeal = fame[self.makers] * (ranks + ZIPF_SHIFT) ** -ZIPF_EXPONENT
        self._first_of_cell = np.searchsorted(self.cells, np.arange(NUM_CELLS))

        self._models = [
            [draw.choice(MODEL_FRONT) + draw.choice(MODEL_BACK) for _ in range(NUM_FAMILIES)]
            for _ in self.brands
        ]
        asins = (f"B{number}{n:04d}{_letters(n)}" for n in itertools.count(101, 7))
        kinds = zip(self.cells, self.styles, self.colours, self.makers, strict=True)
        self.rows = [self._row(next(asins), *kind) for kind in kinds]
        self.unsold = [
            self._row(next(asins), cell, cell % len(STYLES), cell % len(COLOURS), 0)
            for cell in draw.sample(range(NUM_CELLS), 12)
        ]
        # A product of which nothing is known, not even its name.
        self.unsold.append({"asin": next(asins), "title": None, "category": [], "also_buy": []})

        # Neighbouring categories share reviewers; the target's are its own.
        first = NEW_REVIEWERS * number + (NUM_REVIEWERS if category == TARGET_CATEGORY else 0)
        self.reviewers = [self._visit(index, seed) for index in range(first, first + NUM_REVIEWERS)]

    def _row(self, asin: str, cell: int, style: int, colour: int, maker: int) -> dict[str, Any]:
        """The metadata row of a product, with the faults real rows have."""
        draw = self._random
        family, stage = self.department.families[cell // 4], cell % 4
        brand = self.brands[maker]
        noun = draw.choice(STAGE_TITLES[stage]).format(
            noun=family.noun, accessory=family.accessory, part=family.part
        )
        model = self._models[maker][cell // 4]
        if draw.random() < 0.3:
            model += f" {draw.randrange(1, 10) * 100}"
        words = [brand] if draw.random() < 0.6 else []
        words += [model, draw.choice(STYLES[style][1:]), draw.choice(family.materials), noun]
        title = " ".join(word for word in words if word)
        ends = (draw.choice(COLOURS[colour]), draw.choice(SIZES), f"{STYLES[style][0]} Series")
        title += ", " + ", ".join(end for end in ends if end)
        path = [*self.department.path, family.leaf]
        if draw.random() < 0.85:
            path.append(STAGE_CATEGORIES[stage])
        row: dict[str, Any] = {
            "category": path,
            "tech1": "",
            "description": [f"The {model} is made to last. <br />Ships in a plain box."],
            "title": title,
            "also_buy": [],
            "brand": brand,
            "feature": [f"Colour: {COLOURS[colour][0]}", "One year of warranty"],
            "rank": f"{draw.randrange(1, 900_000):,} in {self.department.path[0]} (",
            "details": {"Shipping Weight:": f"{draw.randrange(2, 90) / 10} pounds"},
            "main_cat": self.department.path[0],
            "price": f"${draw.randrange(300, 9900) / 100:.2f}",
            "asin": asin,
            "imageURL": [],
        }
        fault = draw.random()
        if fault < 0.06:
            del row["brand"]
        elif fault < 0.09:
            row["brand"] = None
        elif fault < 0.12:
            row["brand"] = ""
        elif fault < 0.20:
            row["title"] = title.replace("&", "&amp;").replace('"', "&quot;") + " &ndash; New&#33;"
        elif fault < 0.21:
            row["title"] = (
                "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();\n" + title
            )
        elif fault < 0.22:
            row["title"] = None
        elif fault < 0.24:
            row["category"] = []
        return row

    def _style(self, maker: int) -> int:
        """A style for a product of brand `maker`: mostly the one the brand is known for."""
        known_for, draw = maker % len(STYLES), self._random
        return known_for if draw.random() < SPECIALISATION else draw.randrange(len(STYLES))

    def _visit(self, index: int, seed: int) -> Reviewer:
        """Lead reviewer `index` through the shop, purchase by purchase."""
        person = Random(f"reviewer {index} {seed}")  # the same in every category
        style = person.randrange(len(STYLES))
        later_style = person.randrange(len(STYLES)) if person.random() < 0.25 else style
        colour = person.randrange(len(COLOURS))
        name = f"{person.choice('ABCDEFGHJKLMNPRSTW')}. {person.choice(SURNAMES)}"
        reviewer_id = "A" + "".join(person.choices("0123456789ABCDEFGHJKLMNPQRSTUVWXYZ", k=13))

        draw = self._random
        reviewer = Reviewer(
            reviewer_id=reviewer_id,
            name=name,
            styles=(style, later_style),
            colour=colour,
            brand=style + len(STYLES) * draw.randrange(len(self.brands) // len(STYLES)),
            tastes=np.array([self._taste(), self._taste()]),
            length=draw.choice(REVIEWS_OF_A_REVIEWER),
        )
        day = FIRST_DAY + draw.randrange(2_500)
        for _ in range(reviewer.length):
            chances = np.cumsum(self.step_probabilities(reviewer, reviewer.purchases))
            bought = np.searchsorted(chances, draw.random() * chances[-1], side="right")
            reviewer.purchases.append(int(bought))
            reviewer.days.append(day)
            day += 1 + int(draw.expovariate(1 / 40))
        return reviewer

    def _taste(self) -> list[float]:
        weights = [0.02] * NUM_FAMILIES
        for family, weight in zip(self._random.sample(range(NUM_FAMILIES), 2), TASTES, strict=True):
            weights[family] += weight
        return weights

    def step_probabilities(self, reviewer: Reviewer, history: Sequence[int]) -> np.ndarray:
        """Probability of every product to be bought after `history` (product numbers).

        Returns:
            float64 (P,), sums to 1.
        """
        progress = len(history) / (reviewer.length - 1)
        tastes = (1 - progress) * reviewer.tastes[0] + progress * reviewer.tastes[1]
        last = int(self.cells[history[-1]]) if history else None
        pull = (
            STYLE_PULL * (self.styles == reviewer.styles[progress > 0.5])
            + COLOUR_PULL * (self.colours == reviewer.colour)
            + BRAND_PULL * (self.makers == reviewer.brand)
        )
        suits = self.appeal * np.exp(pull)
        suits[list(history)] *= REPEAT
        within_cell = suits / np.add.reduceat(suits, self._first_of_cell)[self.cells]
        return within_cell * cell_probabilities(last, tastes)[self.cells]

    def metadata_rows(self) -> list[dict[str, Any]]:
        """Rows of `meta_<Category>.json.gz`; of a few products there is an older row before."""
        rows = []
        for number, row in enumerate(self.rows + self.unsold):
            if number % 50 == 7:
                rows.append({**row, "title": "Discontinued", "price": ""})
            rows.append(row)
        return rows

    def review_rows(self) -> list[dict[str, Any]]:
        """Rows of `<Category>_5.json.gz`, product by product as in the real files."""
        draw = Random(f"reviews {self.category} {self.reviewers[0].reviewer_id}")
        rows = []
        for reviewer in self.reviewers:
            for number, day in zip(reviewer.purchases, reviewer.days, strict=True):
                row = _review(draw, reviewer, self.rows[number]["asin"], day)
                rows.append(row)
                if draw.random() < 0.003:
                    rows.append(dict(row))
            if draw.random() < 0.01:
                asin = "B9" + reviewer.reviewer_id[-8:]  # in no metadata file
                rows.append(_review(draw, reviewer, asin, reviewer.days[0]))
        return sorted(rows, key=lambda row: (row["asin"], row["unixReviewTime"], row["reviewerID"]))


def cell_probabilities(last_cell: int | None, tastes: np.ndarray) -> np.ndarray:
    """Probability of each cell to come after `last_cell` (None: nothing was bought yet).

    Args:
        last_cell: family x 4 + stage.
        tastes: (NUM_FAMILIES,) interests, sum to 1.

    Returns:
        float64 (NUM_CELLS,), sums to 1.
    """
    cells = np.zeros((NUM_FAMILIES, 4))
    fresh = np.full(4, (1 - FRESH_START) / 3)
    fresh[STARTER] = FRESH_START
    if last_cell is None:
        return np.outer(tastes, fresh).ravel()
    family, stage = divmod(last_cell, 4)
    stay, follow, roam = AFTER_UPGRADE if stage == UPGRADE else BEFORE_UPGRADE
    ahead = np.full(4, (1 - NEXT_STAGE - SAME_STAGE) / 2)
    ahead[stage] = SAME_STAGE
    ahead[(stage + 1) % 4] = NEXT_STAGE
    cells[family] += stay * ahead
    cells[(family + 1) % NUM_FAMILIES] += follow * fresh
    cells += roam * np.outer(tastes, fresh)
    return cells.ravel()


def _review(draw: Random, reviewer: Reviewer, asin: str, day: int) -> dict[str, Any]:
    summary, text, stars = draw.choice(OPINIONS)
    when = time.gmtime(day * DAY)
    row: dict[str, Any] = {
        "overall": stars,
        "verified": draw.random() < 0.9,
        "reviewTime": f"{when.tm_mon:02d} {when.tm_mday}, {when.tm_year}",
        "reviewerID": reviewer.reviewer_id,
        "asin": asin,
        "reviewerName": reviewer.name,
        "reviewText": text,
        "summary": summary,
        "unixReviewTime": day * DAY,
    }
    fault = draw.random()
    if fault < 0.05:
        row["vote"] = str(draw.randrange(2, 40))
    elif fault < 0.07:
        row["reviewText"] = None
    elif fault < 0.09:
        del row["reviewerName"]
    return row


def _letters(number: int) -> str:
    """Four letters that make a catalogue number look like one."""
    letters = "ACDEFGHKMNPQRTVWXY"
    return "".join(letters[number * factor % len(letters)] for factor in (5, 7, 11, 13))


def write_sample(output_dir: str | Path, seed: int = 0) -> dict[str, dict[str, int]]:
    """Write the two files of every category; the same seed gives the same bytes.

    Returns:
        For each category the number of metadata rows, reviews and reviewers written.
    """
    output_dir = Path(output_dir)
    counts = {}
    for category in CATEGORIES:
        shop = Shop(category, seed)
        metadata, reviews = shop.metadata_rows(), shop.review_rows()
        _write_lines(output_dir / f"meta_{category}.json.gz", metadata)
        _write_lines(output_dir / f"{category}_5.json.gz", reviews)
        counts[category] = {
            "metadata_rows": len(metadata),
            "reviews": len(reviews),
            "reviewers": len(shop.reviewers),
        }
    return counts


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (
        atomic_write(path, "wb") as handle,
        # No name and no time in the header, so that the bytes depend on the rows alone.
        gzip.GzipFile(filename="", mode="wb", fileobj=handle, mtime=0) as packed,
    ):
        packed.write(text.encode())
