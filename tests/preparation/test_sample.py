"""The synthetic sample: same bytes from a seed, the law it follows, the faults of real files."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recformer.cli import exit_with_message
from recformer.commands.sample import main
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.ranks import count_ranks
from recformer.files import UserError
from recformer.preparation import sample_catalogue
from recformer.preparation.sample import CATEGORIES, TARGET_CATEGORY, Shop, cell_probabilities


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample")
    main(["--output_dir", str(path)])
    return path


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop(TARGET_CATEGORY)


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def reviews(folder: Path, category: str) -> list[dict[str, Any]]:
    return read(folder / f"{category}_5.json.gz")


def test_another_process_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recformer", "sample", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_another_seed_is_another_shop(shop: Shop) -> None:
    other = Shop(TARGET_CATEGORY, seed=1)
    assert other.rows[0]["title"] != shop.rows[0]["title"]
    assert other.reviewers[0].purchases != shop.reviewers[0].purchases
    assert other.reviewers[0].reviewer_id != shop.reviewers[0].reviewer_id


def test_a_folder_that_is_a_file_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        exit_with_message(lambda: main(["--output_dir", str(tmp_path / "file")]))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_seed_that_is_none_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--seed -1: must be from 0 to 4294967295"):
        main(["--output_dir", str(tmp_path / "out"), "--kind", "season", "--seed", "-1"])
    assert not (tmp_path / "out").exists()


def test_cells_by_hand() -> None:
    tastes = np.array([1.0] + 9 * [0.0])  # interested in the first family alone
    starter, accessory, replacement, upgrade = range(4)

    nothing_yet = cell_probabilities(None, tastes)
    assert nothing_yet[starter] == pytest.approx(0.8)
    assert nothing_yet[upgrade] == pytest.approx(0.2 / 3)

    after = cell_probabilities(4 * 2 + accessory, tastes)  # third family
    assert after[4 * 2 + replacement] == pytest.approx(0.76 * 0.62)
    assert after[4 * 2 + accessory] == pytest.approx(0.76 * 0.30)
    assert after[4 * 2 + starter] == pytest.approx(0.76 * 0.04)
    assert after[4 * 3 + starter] == pytest.approx(0.10 * 0.8)
    assert after[starter] == pytest.approx(0.14 * 0.8)

    # After the last family's upgrade comes the first family, by itself and by taste.
    after = cell_probabilities(4 * 9 + upgrade, tastes)
    assert after[starter] == pytest.approx((0.64 + 0.28) * 0.8)
    assert after[4 * 9 + starter] == pytest.approx(0.08 * 0.62)


def test_cells_sum_to_one() -> None:
    tastes = np.full(10, 0.1)
    for last in [None, *range(40)]:
        assert cell_probabilities(last, tastes).sum() == pytest.approx(1)


def test_the_favourite_is_preferred_within_a_cell(shop: Shop) -> None:
    reviewer = shop.reviewers[0]
    chances = shop.step_probabilities(reviewer, []) / shop.appeal
    expected = np.exp(
        2.2 * (shop.styles == reviewer.styles[0])
        + 1.8 * (shop.colours == reviewer.colour)
        + 1.8 * (shop.makers == reviewer.brand)
    )
    for cell in range(40):
        ratio = (chances / expected)[shop.cells == cell]
        assert ratio == pytest.approx(ratio[0])


def test_what_was_bought_is_hardly_bought_again(shop: Shop) -> None:
    one, other, third = (int(number) for number in np.flatnonzero(shop.cells == 5)[:3])
    before = shop.step_probabilities(shop.reviewers[0], [other])
    after = shop.step_probabilities(shop.reviewers[0], [one, other])  # still early: the same style
    assert after[one] / after[third] == pytest.approx(0.02 * before[one] / before[third])


def test_steps_sum_to_one_and_were_taken(shop: Shop) -> None:
    for reviewer in shop.reviewers[:50]:
        for step, bought in enumerate(reviewer.purchases):
            chances = shop.step_probabilities(reviewer, reviewer.purchases[:step])
            assert chances.sum() == pytest.approx(1)
            assert chances[bought] > 0


def test_purchases_follow_the_law(shop: Shop) -> None:
    """Steps within a family, starter to accessory, are as frequent as the law says."""
    taken, expected, variance = 0, 0.0, 0.0
    for reviewer in shop.reviewers:
        for step in range(1, len(reviewer.purchases)):
            last = shop.cells[reviewer.purchases[step - 1]]
            if last % 4 == 0:
                chances = shop.step_probabilities(reviewer, reviewer.purchases[:step])
                chance = chances[shop.cells == last + 1].sum()
                taken += shop.cells[reviewer.purchases[step]] == last + 1
                expected += chance
                variance += chance * (1 - chance)
    assert expected > 300
    assert abs(taken - expected) < 3 * math.sqrt(variance)


def test_reviews_are_dated_in_whole_days_and_in_order(folder: Path, shop: Shop) -> None:
    times: dict[str, dict[str, int]] = defaultdict(dict)
    known = {row["asin"] for row in shop.rows}
    for row in reviews(folder, TARGET_CATEGORY):
        assert row["unixReviewTime"] % 86_400 == 0
        assert 1_262_304_000 <= row["unixReviewTime"] < 1_700_000_000
        if row["asin"] in known:
            times[row["reviewerID"]][row["unixReviewTime"]] = row["asin"]
    assert len(times) == 800
    for reviewer in shop.reviewers:
        bought = [shop.rows[number]["asin"] for number in reviewer.purchases]
        assert [asin for _, asin in sorted(times[reviewer.reviewer_id].items())] == bought
        assert 5 <= len(bought) <= 9


def test_the_target_shares_nothing_with_the_other_categories(folder: Path) -> None:
    asins, reviewers = {}, {}
    for category in CATEGORIES:
        asins[category] = {row["asin"] for row in read(folder / f"meta_{category}.json.gz")}
        reviewers[category] = {row["reviewerID"] for row in reviews(folder, category)}
    assert sum(map(len, asins.values())) == len(set.union(*asins.values()))
    others = [reviewers[category] for category in CATEGORIES if category != TARGET_CATEGORY]
    assert not reviewers[TARGET_CATEGORY] & set.union(*others)
    assert len(others[0] & others[1]) == 200


def test_metadata_has_the_faults_of_real_files(folder: Path) -> None:
    for category in CATEGORIES:
        rows = read(folder / f"meta_{category}.json.gz")
        assert 280 < len(rows) < 340
        assert max(Counter(row["asin"] for row in rows).values()) == 2
        assert any("brand" not in row for row in rows)
        assert any(row.get("brand", "") is None for row in rows)
        assert any(row.get("brand") == "" for row in rows)
        assert any("&ndash;" in (row["title"] or "") for row in rows)
        assert sum("title" in row and row["title"] is None for row in rows) >= 1
        assert len({len(row["category"]) for row in rows}) >= 3
    everything = [
        row for category in CATEGORIES for row in read(folder / f"meta_{category}.json.gz")
    ]
    assert any("var aPageStart" in (row["title"] or "") for row in everything)


def test_reviews_have_the_faults_of_real_files(folder: Path) -> None:
    for category in CATEGORIES:
        rows = reviews(folder, category)
        products = {row["asin"] for row in read(folder / f"meta_{category}.json.gz")}
        reviewed = {row["asin"] for row in rows}
        assert reviewed - products
        assert products - reviewed
        exact = Counter(json.dumps(row, sort_keys=True) for row in rows)
        assert 1 <= sum(count - 1 for count in exact.values()) <= 40
        assert any("reviewerName" not in row for row in rows)
        assert any(row["reviewText"] is None for row in rows)


def test_titles_are_varied_and_tell_what_the_product_is(shop: Shop) -> None:
    assert len({row["title"] for row in shop.rows}) > 0.97 * len(shop.rows)
    stages = (
        ("Starter",),
        ("for", "Mount", "Cover", "Holder", "Case"),
        ("Replacement",),
        ("Upgrade",),
    )
    for row, cell, style in zip(shop.rows, shop.cells, shop.styles, strict=True):
        if row["title"] is not None:
            assert any(word in row["title"] for word in stages[cell % 4])
            assert f"{sample_catalogue.STYLES[style][0]} Series" in row["title"]


def test_there_is_much_to_learn_beyond_popularity(shop: Shop) -> None:
    """NDCG@10 of the last step: the law itself, and the counts of the steps before."""
    targets = np.array([reviewer.purchases[-1] for reviewer in shop.reviewers])
    law = np.stack([shop.step_probabilities(r, r.purchases[:-1]) for r in shop.reviewers])
    bought = np.concatenate([reviewer.purchases[:-2] for reviewer in shop.reviewers])
    counts = np.tile(np.bincount(bought, minlength=len(shop.rows)), (len(targets), 1))

    def ndcg(scores: np.ndarray) -> float:
        return per_user_metrics(count_ranks(scores, targets))["NDCG@10"].mean()

    assert ndcg(law) > 0.4
    assert ndcg(counts) < 0.05
