"""A season of sessions in the REES46 form (`2019-Oct.csv`), made from a seed by the code below.

`recformer sample --kind season --output_dir DIR` writes `season.csv` with the columns of the
eCommerce behaviour data: event_time, event_type, product_id, category_id, category_code, brand,
price, user_id, user_session. All names are invented.

What there is to learn. A visitor looks for products of one category at one price level, dear or
cheap for that category, and now and then for those of a category that goes with it; there are so
many products and so few events of each that who knows categories and prices knows most.

- **Price and category matter.** The next product is of the same category with probability `SAME`,
  of the one that goes with it with `GOES_WITH`, else of any; and its price level is near the
  visitor's, within `WIDTH` standard deviations.
- **New products every day**, and old ones fade: what is `FADES` days old draws 1 / e of the
  visitors that it drew at first.
- **Drift.** Which categories are in demand changes from day to day.
- **Brands do not matter**: they are drawn by themselves.

`shuffled_season` has the same visits, and category, brand and price of each product exchanged for
another product's, one draw for all three: the columns are there and say nothing.

As in the real file a product in the cart or bought is an event more of the same product, some
category codes and brands are empty, prices change a little, and sessions run past midnight.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import numpy as np

from recformer.files import atomic_write

SAMPLES = ("shop", "season", "shuffled_season")  # their kinds; the shop is in `sample`
FILE = "season.csv"
HEADER = (
    "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session"
)
FIRST_DAY = datetime(2019, 10, 1, tzinfo=timezone.utc)
DAYS, SESSIONS_A_DAY = 7, 250
PRODUCTS, NEW_A_DAY = 500, 40
ROOMS = ("kitchen", "garden", "office", "sports")
KINDS = ("lamp", "chair", "box", "tool", "bag", "rack")
NUM_CATEGORIES = len(ROOMS) * len(KINDS)
BRANDS = ("arvo", "belmo", "corda", "dento", "elvar", "fenno", "gildo", "hasso", "ivero", "junta")

# The law of a step.
SAME, GOES_WITH = 0.75, 0.2
WIDTH = 0.35  # of price levels around the visitor's
FADES = 4.0  # days
AGAIN = 0.08  # a product of the session once more
MORE = 0.78  # another event follows
DRIFT = 0.45  # of a category's log demand, a day


@dataclass(frozen=True, eq=False)
class Season:
    """Products and visits.

    Attributes:
        categories: int64 (P,) of every product, from 0.
        levels: float64 (P,) price level of every product within its category, about N(0, 1).
        born: int64 (P,) day on which it appears.
        goes_with: int64 (C,) the category that goes with each.
        users: int64 (V,) visitor of every session.
        starts: float64 (V,) beginning of every session, seconds from the first day, ascending.
        visits: products of every session.
    """

    categories: np.ndarray
    levels: np.ndarray
    born: np.ndarray
    goes_with: np.ndarray
    users: np.ndarray
    starts: np.ndarray
    visits: list[list[int]]


def make_season(seed: int = 0, days: int = DAYS, sessions_a_day: int = SESSIONS_A_DAY) -> Season:
    """Draw products and visits."""
    draw = np.random.default_rng(seed)
    number = PRODUCTS + NEW_A_DAY * days
    categories = draw.integers(NUM_CATEGORIES, size=number)
    levels = draw.normal(size=number)
    born = np.maximum(0, (np.arange(number) - PRODUCTS) // NEW_A_DAY)
    appeal = draw.gamma(2.0, size=number)
    # Those of the beginning are not all new on the first day.
    age_at_first = np.where(np.arange(number) < PRODUCTS, draw.uniform(0, 2 * FADES, number), 0.0)
    goes_with = draw.permutation(NUM_CATEGORIES)
    demand = draw.normal(size=NUM_CATEGORIES) * 0.5
    users, starts, visits = [], [], []
    for day in range(days):
        there = born <= day
        weight = np.where(there, appeal * np.exp(-(day - born + age_at_first) / FADES), 0.0)
        shares = np.exp(demand) / np.exp(demand).sum()
        # Afternoons are busier than nights.
        hours = np.sort(24 * draw.beta(2.5, 2.0, size=sessions_a_day))
        for hour in hours:
            level = draw.normal()
            fit = weight * np.exp(-(((levels - level) / WIDTH) ** 2) / 2)
            visits.append(_visit(draw, fit, categories, goes_with, shares))
            users.append(int(draw.integers(3 * sessions_a_day)))
            starts.append(86_400 * day + 3600 * hour)
        demand = demand + draw.normal(size=NUM_CATEGORIES) * DRIFT
    return Season(categories, levels, born, goes_with, np.array(users), np.array(starts), visits)


def _visit(
    draw: np.random.Generator,
    fit: np.ndarray,
    categories: np.ndarray,
    goes_with: np.ndarray,
    shares: np.ndarray,
) -> list[int]:
    """Products of one session."""
    category = int(draw.choice(NUM_CATEGORIES, p=shares))
    visit: list[int] = []
    while not visit or draw.random() < MORE:
        if len(visit) > 1 and draw.random() < AGAIN:
            visit.append(int(draw.choice(visit[:-1])))
            continue
        if visit:
            step = draw.random()
            if step >= SAME + GOES_WITH:
                category = int(draw.integers(NUM_CATEGORIES))
            elif step >= SAME:
                category = int(goes_with[category])
        chances = np.where(categories == category, fit, 0.0)
        if visit:
            chances[visit[-1]] = 0.0
        if chances.sum() == 0:
            break
        visit.append(int(draw.choice(len(chances), p=chances / chances.sum())))
    return visit


def write_season(
    output_dir: str | Path,
    seed: int = 0,
    *,
    shuffled: bool = False,
    days: int = DAYS,
    sessions_a_day: int = SESSIONS_A_DAY,
) -> dict[str, int]:
    """Write `season.csv`.

    Args:
        output_dir: created where missing.
        seed: of all draws.
        shuffled: exchange the products' category, brand and price.
        days, sessions_a_day: size of the season.

    Returns:
        Numbers of events, sessions, visitors and products.
    """
    season = make_season(seed, days, sessions_a_day)
    draw = np.random.default_rng([seed, 1])
    number = len(season.categories)
    brands = draw.integers(len(BRANDS), size=number)
    no_brand, no_code = draw.random(number) < 0.1, draw.random(number) < 0.1
    base = np.exp(draw.normal(3.5, 0.6, size=NUM_CATEGORIES))
    like = draw.permutation(number)
    if not shuffled:
        like = np.arange(number)
    prices = base[season.categories] * np.exp(0.5 * season.levels)
    rows: list[tuple[float, int, str]] = []
    for session, (user, start, visit) in enumerate(
        zip(season.users.tolist(), season.starts.tolist(), season.visits, strict=True)
    ):
        name = UUID(bytes=draw.bytes(16), version=4)
        time = start
        for product in visit:
            as_if = like[product]
            category = int(season.categories[as_if])
            room, kind = divmod(category, len(KINDS))
            code = "" if no_code[as_if] else f"{ROOMS[room]}.{KINDS[kind]}"
            brand = "" if no_brand[as_if] else BRANDS[brands[as_if]]
            price = prices[as_if] * (1 + 0.02 * draw.normal())
            types = ["view"]
            if draw.random() < 0.06:
                types += ["cart", "purchase"][: 1 + int(draw.random() < 0.4)]
            for type_ in types:
                moment = (FIRST_DAY + timedelta(seconds=int(time))).strftime("%Y-%m-%d %H:%M:%S")
                rows.append(
                    (
                        time,
                        session,
                        f"{moment} UTC,{type_},{100_000 + product},{2_000 + category},{code},"
                        f"{brand},{price:.2f},{500_000 + user},{name}",
                    )
                )
                time += float(draw.exponential(40.0)) + 1
    # As a server logs them, until the end of the last day.
    rows = sorted((row for row in rows if row[0] < 86_400 * days), key=lambda row: row[:2])
    with atomic_write(Path(output_dir) / FILE) as handle:
        handle.write("\n".join([HEADER, *(row[2] for row in rows)]) + "\n")
    return {
        "events": len(rows),
        "sessions": len(season.visits),
        "visitors": len(np.unique(season.users)),
        "products": len({product for visit in season.visits for product in visit}),
    }
