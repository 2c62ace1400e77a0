"""Features by hand: told by their values, kept as they are, encoded from training alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recformer.commands.process import main
from recformer.data.features import MISSING, UNKNOWN, encode_features, features_of
from recformer.data.processed import ProcessedFolder, join_splits
from recformer.data.windows import Windows
from recformer.files import UserError
from recformer.preparation import features as made
from recformer.preparation.features import Asked, make_features
from recformer.preparation.splits import build_histories
from tests.preparation.test_splits import interactions

DAY = 86_400
START = 18_000 * DAY  # a Sunday
HEADER = "event_time,user_id,product_id,user_session,brand,price,tags,views"
# One day a session: u1 and u2 on the first two, u3 on the third.
ROWS = [
    f"{START + 100},u1,i1,s1,acme,1.5,a|b,7",
    f"{START + 160},u1,i2,s1,,2.5,,8",
    f"{START + DAY + 3600},u2,i1,s2,acme,1.0,a|b,9",
    f"{START + DAY + 3700},u2,i3,s2,new,3.0,b|c,7",
    f"{START + DAY + 3800},u2,i1,s2,acme,,a|b,7",
    f"{START + DAY + 50},u4,i2,s4,,2.5,,7",
    f"{START + DAY + 60},u4,i1,s4,acme,1.5,a|b,7",
    f"{START + 2 * DAY + 10},u3,i3,s3,new,9.0,b|c,1",
    f"{START + 2 * DAY + 20},u3,i4,s3,late,9.5,d|a,2",
    f"{START + 2 * DAY + 30},u5,i3,s5,new,9.0,b|c,1",
    f"{START + 2 * DAY + 40},u5,i1,s5,acme,,a|b,2",
]
WINDOWS = ["--split", "windows", "--window", "1d", "--min_window_sequences", "2"]


def process(folder: Path, *flags: str, rows: list[str] = ROWS) -> ProcessedFolder:
    (folder / "log.csv").write_text("\n".join([HEADER, *rows]))
    main(
        ["--file_path", str(folder / "log.csv"), "--output_path", str(folder / "out")]
        + ["--session_column", "user_session", *flags]
    )
    return ProcessedFolder.load(folder / "out")


def test_what_features_are_is_told_by_their_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["brand", "price", "tags", "views", "hour", "weekday", "since_last", "item_age"]
    data = process(tmp_path, *WINDOWS, "--features", *names)
    found = {one.name: (one.kind, one.of, one.distinct, one.missing) for one in features_of(data)}
    assert found == {
        "brand": ("cat", "item", 3, 1),  # i2 has none
        "price": ("float", "interaction", 6, 2),
        "tags": ("list", "item", 4, 1),
        "views": ("cat", "interaction", 5, 0),
        "hour": ("cat", "interaction", 2, 0),
        "weekday": ("cat", "interaction", 3, 0),
        "since_last": ("float", "interaction", 3, 5),  # the first of five sessions
        "item_age": ("float", "interaction", 8, 0),
    }
    assert "feature brand: cat of each item, 3 different values, 1 missing" in (
        capsys.readouterr().out
    )
    # text of the items out of the log, where there is no file of items
    texts = {"i1": {"brand": "acme"}, "i2": {}, "i3": {"brand": "new"}, "i4": {"brand": "late"}}
    assert dict(zip(data.asins, data.items)) == texts
    table = pl.read_parquet(data.path / "interactions.parquet").sort("timestamp")
    assert table["feature hour"].to_list() == ["0"] * 4 + ["1"] * 3 + ["0"] * 4
    assert table["feature weekday"].unique(maintain_order=True).to_list() == ["6", "0", "1"]
    own = table.filter(pl.col("timestamp") >= START + DAY + 3600).head(3)
    np.testing.assert_allclose(own["feature since_last"].to_list()[1:], np.log1p([100, 100]))
    # i1 was first met at 100
    np.testing.assert_allclose(own["feature item_age"][0], np.log1p(DAY + 3500))


def test_types_and_whose_a_column_is_may_be_said(tmp_path: Path) -> None:
    data = process(
        tmp_path, *WINDOWS, "--features", "price:float:item", "views:float", "brand:list"
    )
    found = {one.name: (one.kind, one.of) for one in features_of(data)}
    assert found == {
        "price": ("float", "item"), "views": ("float", "interaction"), "brand": ("list", "item")
    }  # fmt: skip
    prices = pl.read_parquet(data.path / "item_features.parquet")["feature price"].to_list()
    assert dict(zip(data.asins, prices)) == {
        "i1": 1.5,
        "i2": 2.5,
        "i3": 3.0,
        "i4": 9.5,
    }  # the first
    for wrong in ("price:number", ":cat", "a:cat:b", "a:cat:item:x"):
        with pytest.raises(ValueError, match="expected a column"):
            Asked.parse(wrong)


def test_encoded_features_know_what_training_knows(tmp_path: Path) -> None:
    data = process(tmp_path, *WINDOWS, "--features", "brand", "price", "tags", "views")
    windows = Windows.of(data)
    assert windows is not None
    joined = join_splits(data.train, data.val, data.test)
    place = {(data.asins[i], u): p for p, (i, u) in enumerate(zip(joined.items, joined.rows))}
    for number, mean, _brands in ((1, 2.0, ["acme"]), (2, (1.5 + 4 * 2.5 / 4 * 0 + 2.5) / 2, None)):
        found = encode_features(windows.view(number))
        brand, tags = found["item"]
        price, views = found["interaction"]
        if number == 1:  # the first day alone: prices 1.5 and 2.5
            assert price.values[place["i1", 0]] == pytest.approx(-1)
            assert price.values[place["i2", 0]] == pytest.approx(1)
            # the values of later days are there, in the first day's units
            assert price.values[place["i3", 3]] == pytest.approx((9.0 - mean) / 0.5)
            assert brand.values.tolist() == [2, MISSING, UNKNOWN]  # i1, i2, i3: acme is known
            assert brand.num_rows == 3
            assert views.num_rows == 4  # 7 and 8
            assert tags.values.tolist() == [2, 3, 3, UNKNOWN]  # a b; -; b c
            assert tags.offsets is not None
            assert tags.offsets.tolist() == [0, 2, 2, 4]
        else:
            assert brand.values.tolist() == [2, MISSING, 3, UNKNOWN]  # i4 is of the third day
            assert tags.values.tolist() == [2, 3, 3, 4, UNKNOWN, 2]
            known = np.array([1.5, 2.5, 1.0, 3.0, 2.5, 1.5])
            scaled = (9.0 - known.mean()) / known.std()
            assert price.values[place["i3", 3]] == pytest.approx(scaled, rel=1e-6)
        assert price.present is not None
        assert int((~price.present).sum()) == 2


def test_a_later_value_changes_nothing_before_it(tmp_path: Path) -> None:
    """The leak test: whatever the third day holds, the second view is the same."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    features = ["--features", "brand:cat:item", "price", "tags:list:item", "views", "item_age"]
    other = [
        row if f"{START + 2 * DAY}"[:5] != row[:5] or int(row.split(",")[0]) < START + 2 * DAY
        else row.replace("9.0", "77.0").replace("new", "odd").replace(",1", ",5")
        for row in ROWS
    ]  # fmt: skip
    assert other != ROWS
    one = Windows.of(process(tmp_path / "a", *WINDOWS, *features))
    two = Windows.of(process(tmp_path / "b", *WINDOWS, *features, rows=other))
    assert one is not None
    assert two is not None
    first, second = one.view(1), two.view(1)
    assert first.asins == second.asins
    assert first.items == second.items
    for of, before in encode_features(first).items():
        for left, right in zip(before, encode_features(second)[of], strict=True):
            kept = one.windows < 2 if of == "interaction" else slice(None)
            if left.offsets is None:
                np.testing.assert_array_equal(left.values[kept], right.values[kept])
            else:
                np.testing.assert_array_equal(left.values, right.values)
            assert left.num_rows == right.num_rows


def test_what_is_told_later_of_an_item_changes_nothing_before_it(tmp_path: Path) -> None:
    """The leak test of values that were missing: the third day tells what i2 is."""
    features = ["--features", "brand:cat:item", "price:float:item", "tags:list:item"]
    rows = [row.replace("i2,s1,,2.5", "i2,s1,,").replace("i2,s4,,2.5", "i2,s4,,") for row in ROWS]
    later = [*rows, f"{START + 2 * DAY + 50},u5,i2,s5,acme,99.0,a|c,1"]
    views = []
    for name, own in (("a", rows), ("b", later)):
        (tmp_path / name).mkdir()
        windows = Windows.of(process(tmp_path / name, *WINDOWS, *features, rows=own))
        assert windows is not None
        views.append(windows)
    for number in (1, 2):  # also on the third day itself: i2 was met before
        before, after = (encode_features(one.view(number))["item"] for one in views)
        for left, right in zip(before, after, strict=True):
            np.testing.assert_array_equal(left.values, right.values)
            assert left.num_rows == right.num_rows
            if left.offsets is not None:
                np.testing.assert_array_equal(left.offsets, right.offsets)
    i2 = views[1].folder.asins.index("i2")
    assert (before[0].values[i2], before[1].present[i2]) == (MISSING, False)
    table = pl.read_parquet(tmp_path / "b/out/item_features.parquet")
    row = table[i2]
    assert [row[f"feature {n}"][0] for n in ("brand", "price")] == ["acme", 99.0]
    assert {row[f"told {n}"][0] for n in ("brand", "price", "tags")} == {2}
    # i4, new on the third day, is known by what that day says of it
    assert after[2].offsets[-1] - after[2].offsets[-2] == 2


def test_what_is_told_after_a_new_item_was_met_is_not_known_then(tmp_path: Path) -> None:
    """i3 is new on the second day, and the third day says first what it is."""
    rows = [row.replace("i3,s2,new,3.0,b|c", "i3,s2,,,") for row in ROWS]
    data = process(
        tmp_path, *WINDOWS, "--features", "brand:cat:item", "price:float:item", rows=rows
    )
    windows = Windows.of(data)
    assert windows is not None
    brand, price = encode_features(windows.view(1))["item"]
    row = data.asins.index("i3")
    assert brand.values[row] == MISSING
    assert price.present is not None
    assert not price.present[row]
    whole = encode_features(data)["item"][0]  # its files are those of the last window
    last = encode_features(windows.view(2))["item"][0]
    np.testing.assert_array_equal(whole.values, last.values)


def test_what_the_test_alone_tells_of_an_item_is_not_known(tmp_path: Path) -> None:
    rows = [f"{START + t},u{n},i{t},s{n},b{t},{t}.5,x,1" for n in range(3) for t in range(4)]
    rows = [row.replace(",b1,1.5,", ",,,") for row in rows]
    rows.append(f"{START + 9},u0,i1,s0,b1,77.0,x,1")  # the test target of u0
    data = process(tmp_path, "--features", "brand:cat:item", "price:float:item", rows=rows)
    assert data.asins[data.test[0][-1]] == "i1"
    brand, price = encode_features(data)["item"]
    row = data.asins.index("i1")
    assert brand.values[row] == MISSING
    assert price.present is not None
    assert not price.present[row]
    seen = np.array([0.5, 2.5])  # of i0 and i2, which are trained on, i1 beside them
    assert price.values[0] == pytest.approx((0.5 - seen.mean()) / seen.std())


def test_numbers_that_no_model_can_read(tmp_path: Path) -> None:
    rows = [row.replace(",9.0,", ",1e300,") for row in ROWS]
    with pytest.raises(UserError, match=r"price:float: '1e300' is no number up to 1e\+100"):
        process(tmp_path, *WINDOWS, "--features", "price:float", rows=rows)
    rows = [row.replace(",9.0,", ",1e14,") for row in ROWS]
    windows = Windows.of(process(tmp_path, *WINDOWS, "--features", "price:float", rows=rows))
    assert windows is not None
    (price,) = encode_features(windows.view(1))["interaction"]
    assert price.values.max() == 1e4  # deviations


def test_tables_of_categories_grow_at_their_end(tmp_path: Path) -> None:
    """Weights that go on find the categories that they know in the same rows."""
    rows = [  # of one user a row: the first row has the last category
        f"{START + day * DAY + n + late},u{n},i{day}{n},s{n},b{day}{n},1.5,t{day}|t{n},{day}{n % 4}"
        for n in range(6)
        for day, late in ((0, 0), (0, 50), (1, 0), (2, 0), (3, 0))
    ]
    names = ["brand:cat:interaction", "tags:list:interaction", "views:cat"]
    data = process(tmp_path, *WINDOWS, "--features", *names, rows=rows)
    windows = Windows.of(data)
    assert windows is not None
    sizes = []
    for number in (1, 2, 3):
        before = encode_features(windows.view(number))["interaction"]
        sizes.append([one.num_rows for one in before])
        if number == 3:
            break
        after = encode_features(windows.view(number + 1))["interaction"]
        for one, other in zip(before, after, strict=True):
            known = one.values > UNKNOWN
            assert known.any()
            np.testing.assert_array_equal(one.values[known], other.values[known])
    assert sizes[0] < sizes[1] < sizes[2]


def test_leave_one_out_knows_its_training_sequences(tmp_path: Path) -> None:
    rows = [f"{START + t},u,i{t},s,b{t},{t}.5,x,1" for t in range(4)]
    data = process(tmp_path, "--features", "brand", "price", rows=rows)
    found = encode_features(data)
    assert [data.asins[i] for i in data.train[0]] == ["i0", "i1"]
    brand, price = found["item"]
    assert brand.values.tolist() == [2, 3, UNKNOWN, UNKNOWN]
    np.testing.assert_allclose(price.values, (np.array([0.5, 1.5, 2.5, 3.5]) - 1) / 0.5)


def test_features_of_a_file_of_items(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(
        "id,title,genre,size\ni1,One,x|y,1.5\ni3,Three,y,2.5\ni2,T,,\n"
    )
    data = process(
        tmp_path,
        "--meta_file_path",
        str(tmp_path / "items.csv"),
        "--features",
        "genre:list",
        "size",
    )
    assert {one.name: one.of for one in features_of(data)} == {"genre": "item", "size": "item"}
    table = pl.read_parquet(data.path / "item_features.parquet")
    assert dict(zip(data.asins, table["feature genre"].to_list())) == {
        "i1": ["x", "y"], "i3": ["y"], "i2": None
    }  # fmt: skip
    assert data.items[data.asins.index("i3")] == {
        "title": "Three", "genre": "y", "size": "2.5"
    }  # fmt: skip


def test_what_cannot_be_a_feature_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--features colour: no such column.*item_age.*columns of"):
        process(tmp_path, "--features", "colour")
    with pytest.raises(UserError, match="--features names price twice"):
        process(tmp_path, "--features", "price", "price:cat")
    with pytest.raises(UserError, match="--features brand:float: 'acme' is no number"):
        process(tmp_path, "--features", "brand:float")
    skipped = process(tmp_path, "--features", "price:float", "--skip_bad_lines")
    assert features_of(skipped)[0].missing == 2
    # without a price on the last day
    rows = [row.replace(",9.0,", ",,").replace(",9.5,", ",,") for row in ROWS]
    with pytest.raises(UserError, match="--features price: none of the 4 interactions of window 2"):
        process(tmp_path, *WINDOWS, "--features", "price:float:interaction", rows=rows)
    # of an item's column those that are new matter: here eight a day, none with a price on the last
    rows = [
        f"{START + day * DAY + n},u{n},i{day}{n},s{n}{day},b,{'' if day == 2 else 1.5},x,1"
        for day in range(3)
        for n in range(8)
        for _ in range(2)
    ]
    flags = [*WINDOWS, "--features", "price:float:item"]
    with pytest.raises(UserError, match="price: none of the 8 new items of window 2"):
        process(tmp_path, *flags, rows=rows)
    old = [row.replace(",i2", ",i1") for row in rows]  # the items of the day before: known
    process(tmp_path, *flags, rows=old)
    one = [row.replace(",i2", ",i1").replace(",i17,", ",new,") for row in rows[-6:]]
    process(tmp_path, *flags, rows=[*old[:-6], *one])  # of a single new item nothing can be said
    log = interactions(("u", "a", START), ("u", "b", START + 1))
    histories = build_histories(replace(log, extra=pl.DataFrame({"empty": ["", ""]})))
    with pytest.raises(UserError, match="--features empty"):
        make_features([Asked("empty")], histories, {})
    monkeypatch.setattr(made, "MOST_CATEGORIES", 2)
    with pytest.raises(UserError, match="--features brand: 3 different values, expected at most 2"):
        process(tmp_path, "--features", "brand")


def test_a_million_categories(tmp_path: Path) -> None:
    count = 1_000_000
    log = interactions(("u", "a", START), ("u", "b", START + 1))
    users = np.zeros(count, dtype=np.int32)
    big = replace(
        log, users=users, items=users, times=np.arange(count) + START,
        extra=pl.DataFrame({"agent": np.arange(count).astype(str)}),
    )  # fmt: skip
    with pytest.raises(
        UserError, match="agent: 1,000,000 different values, expected at most 100,000"
    ):
        make_features([Asked("agent")], build_histories(big), {})


def test_lists_a_session_as_transformers4rec_writes_them(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "session_id": [1, 2],
            "item_id-list": [[11, 12, 13], [12, 14, 11]],
            "category-list": [[1, 2, 1], [2, 3, 1]],
            "price-list": [[0.5, 1.5, 2.5], [1.5, None, 0.5]],
            "timestamp-list": [[START, START + 1, START + 2], [START + 5, START + 6, START + 9]],
        }
    ).write_parquet(tmp_path / "train.parquet")
    main(
        ["--file_path", str(tmp_path / "train.parquet"), "--output_path", str(tmp_path / "out")]
        + ["--session_column", "session_id", "--features", "category-list", "price-list", "hour"]
    )
    data = ProcessedFolder.load(tmp_path / "out")
    assert data.asins == ["11", "12", "13", "14"]
    found = {one.name: (one.kind, one.of, one.missing) for one in features_of(data)}
    assert found == {
        "category-list": ("cat", "item", 0),
        "price-list": ("float", "item", 1),
        "hour": ("cat", "interaction", 0),
    }
