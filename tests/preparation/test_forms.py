"""Raw files of every public form: what is written is what is read, or a refusal that names it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recformer.commands.process import main
from recformer.data.processed import ProcessedFolder, read_times
from recformer.files import UserError
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.delimited import Layout, read_rows, regular_pieces
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.histories import Example, rebuild, split_list
from recformer.preparation.tables import Columns, open_sources
from recformer.preparation.times import in_one_unit, parse_time

ITEMS = "item_id,title\n" + "".join(f"i{n},Item {n}\n" for n in range(1, 10))


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.csv"
    path.write_text(ITEMS)
    return path


def read(
    log: Path, items: Path, columns: Columns | None = None, skip: bool = False, **options: Any
) -> list[tuple[str, str, int]]:
    """`(user, item, time)` of every interaction as it is read."""
    source, _ = open_sources(log, items, columns or Columns(), None)
    found, _ = source.read(None, BadLines(skip=skip), **options)
    users, names = found.user_names, found.item_names
    return [
        (users[user], names[item], time)
        for user, item, time in zip(found.users, found.items, found.times.tolist())
    ]


def texts(path: Path, columns: Columns | None = None, **options: Any) -> dict[str, dict[str, str]]:
    """Every item of a catalogue as it is read."""
    log = path.with_name("log.csv")
    if not log.exists():
        log.write_text("user_id,item_id\nu,i1\n")
    _, source = open_sources(log, path, columns or Columns(), None)
    return source.read(clean=False, bad_lines=options.pop("bad_lines", BadLines()), **options)[0]


def histories(found: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for user, item, _ in found:
        rows.setdefault(user, []).append(item)
    return rows


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "time"),
    [
        (1400086897, (1400086897, 0)),
        (" 1400086897 ", (1400086897, 0)),
        ("1400086897.25", (1400086897, 250_000_000)),
        (1400086897.25, (1400086897, 250_000_000)),
        ("-1.5", (-2, 500_000_000)),
        ("1.4e9", (1_400_000_000, 0)),
        ("2014-05-14T17:01:37Z", (1400086897, 0)),
        ("2014-05-14T19:01:37.5+02:00", (1400086897, 500_000_000)),
        ("2014-05-14 13:01:37-0400", (1400086897, 0)),
        ("2014-05-14 17:01:37 UTC", (1400086897, 0)),
        ("2014-05-14 17:01", (1400086860, 0)),
        ("2014-05-14", (1400025600, 0)),
        ("2014/5/14", (1400025600, 0)),
        ("2014-04-07T10:51:09.277Z", (1396867869, 277_000_000)),
        ("1970-01-01", (0, 0)),
        ("1969-12-31 23:59:59", (-1, 0)),
        ("9999-12-31T23:59:59Z", (253402300799, 0)),
        (2**63 - 1, (2**63 - 1, 0)),
        ("9223372036854775807", (2**63 - 1, 0)),
        (2**63, None),
        ("9" * 5000, None),
        ("1e99", None),
        (float("nan"), None),
        (True, None),
        (None, None),
        ("2014-13-01", None),
        ("2014-05-14 25:00:00", None),
        ("05/14/2014", None),  # or is it the fifth of some month?
        ("some day", None),
        ("", None),
        ("١٢٣", None),
    ],
)
def test_a_time(value: Any, time: tuple[int, int] | None) -> None:
    assert parse_time(value) == time


@given(st.datetimes(), st.sampled_from(["T", " "]), st.sampled_from(["", "Z", "+00:00", " UTC"]))
def test_a_date_is_the_moment_that_datetime_says(moment: Any, between: str, zone: str) -> None:
    import datetime

    text = moment.isoformat(between) + zone
    since = moment - datetime.datetime(1970, 1, 1)
    seconds, rest = divmod(since, datetime.timedelta(seconds=1))
    assert parse_time(text) == (seconds, 1000 * rest.microseconds)


def test_fractions_choose_one_unit_for_all() -> None:
    wholes = np.array([5, 6, -7])

    def unit(*billionths: int) -> list[int]:
        return in_one_unit(wholes, np.array(billionths))[0].tolist()

    assert unit(0, 0, 0) == [5, 6, -7]
    assert unit(250_000_000, 0, 0) == [5250, 6000, -7000]
    assert unit(0, 1000, 0) == [5_000_000, 6_000_001, -7_000_000]
    assert unit(1, 0, 999) == [5_000_000_001, 6_000_000_000, -6_999_999_001]
    times, too_large = in_one_unit(np.array([5, 2**63 - 1, 6]), np.array([0, 0, 10**6]))
    assert times.tolist() == [5000, 2**63 - 1, 6001]
    assert too_large.tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tsv"])
def test_order_below_a_second_decides_the_target(tmp_path: Path, items: Path, form: str) -> None:
    """Cut to seconds, i3 would be last: it stands last in the file."""
    rows = [("u", "i1", 10.5), ("u", "i4", 11.75), ("u", "i2", 10.25), ("u", "i3", 11.25)]
    log = tmp_path / f"log.{form}"
    frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    if form == "parquet":
        frame.write_parquet(log)
    elif form == "jsonl":
        frame.write_ndjson(log)
    else:
        frame.write_csv(log, separator="," if form == "csv" else "\t")
    prepare_finetuning(log, items, tmp_path / "out")
    data = ProcessedFolder.load(tmp_path / "out")
    assert [data.asins[item] for item in data.train[0]] == ["i2", "i1"]
    assert (data.asins[data.val.items[0]], data.asins[data.test.items[0]]) == ("i3", "i4")
    times = read_times(data)
    assert times is not None
    assert times.tolist() == [10250, 10500, 11250, 11750]


@pytest.mark.parametrize(
    "form", ["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S+00:00", "%Y-%m-%d %H:%M:%S", " {}", "{} "]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_dates_are_the_moments_of_numbers(
    tmp_path: Path, items: Path, form: str, kind: str
) -> None:
    import datetime

    times = [1400086897, 1400086890, 1400173297]
    shown = [
        datetime.datetime.fromtimestamp(time, datetime.timezone.utc).strftime(form)
        if "%" in form
        else form.format(time)
        for time in times
    ]
    log = tmp_path / f"log.{kind}"
    if kind == "csv":
        log.write_text("user_id,item_id,timestamp\n" + "".join(f"u,i1,{t}\n" for t in shown))
    else:
        rows = [{"user_id": "u", "item_id": "i1", "timestamp": time} for time in shown]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(log, items) == [("u", "i1", time) for time in times]


def test_nanoseconds_of_parquet_keep_their_order(tmp_path: Path, items: Path) -> None:
    moments = pl.Series("timestamp", [1_000_000_002, 1_000_000_001]).cast(pl.Datetime("ns"))
    log = tmp_path / "log.parquet"
    pl.DataFrame(
        {"user_id": ["u", "u"], "item_id": ["i1", "i2"], "timestamp": moments}
    ).write_parquet(log)
    assert read(log, items) == [("u", "i1", 1_000_000_002), ("u", "i2", 1_000_000_001)]


# --- histories ------------------------------------------------------------------------------------


def examples(whole: str, longest: int) -> list[Example]:
    """What is cut from a history, one item a letter."""
    return [
        Example(place, list(whole[max(0, place - longest) : place]), whole[place])
        for place in range(1, len(whole))
    ]


def test_histories_are_rebuilt_from_examples() -> None:
    assert rebuild(examples("abcde", 9), 9) == list("abcde")
    assert rebuild(examples("abcde", 9)[::-1], 9) == list("abcde")
    assert rebuild(examples("abcde", 9)[-1:], 9) == list("abcde")  # the last says it all
    assert rebuild(examples("abcde", 2), 2) == list("abcde")  # cut to the two newest
    assert rebuild(examples("abcde", 2)[::-1], 2) == list("abcde")
    assert rebuild(examples("abab", 3), 3) == list("abab")
    assert rebuild(examples("abcde", 2)[2:], 2) == list("bcde")  # cut at both ends
    assert rebuild([*examples("abc", 9), *examples("abc", 9)], 9) == list("abc")


def test_histories_that_contradict_each_other_are_no_history() -> None:
    assert rebuild([Example(1, ["a"], "b"), Example(2, ["a"], "c")], 5) is None
    assert rebuild([Example(1, ["a"], "b"), Example(2, ["x", "b"], "c")], 5) is None
    assert rebuild([Example(1, ["a", "b"], "c"), Example(2, ["x", "y"], "z")], 2) is None
    assert rebuild(examples("aaa", 1), 1) is None  # or was it `aa`, and a line twice?
    # After `ab` came `c` once and `d` once: which first, windows of two do not say.
    assert rebuild(examples("abcabd", 2), 2) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=12),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_a_rebuilt_history_is_the_true_one(whole: list[str], longest: int, random: Any) -> None:
    cut = examples("".join(whole), longest)
    random.shuffle(cut)
    assert rebuild(cut, longest) in (whole, None)
    if longest >= len(whole):
        assert rebuild(cut, longest) == whole


def test_lists_in_every_writing() -> None:
    assert split_list("a  b c") == ["a", "b", "c"]
    assert split_list("['a', \"b\"]") == ["a", "b"]
    assert split_list("[1, 2]") == [1, 2]
    assert split_list("[1 2\n 3]") == ["1", "2", "3"]
    assert split_list("") == []
    assert split_list("[]") == []
    assert split_list("['a', ") is None
    assert split_list("[" * 100_000) is None
    assert split_list(7) is None


HISTORIES = {"7": ["i1", "i2", "i3", "i4"], "8": ["i3", "i1", "i2"], "9": ["i4", "i4", "i1"]}


def as_token_seq(folder: Path, newest_first: bool = False) -> Path:
    """RecBole's and UniSRec's: a line is a history and the item after it."""
    lines = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
    for user, own in HISTORIES.items():
        rows = [f"{user}\t{' '.join(own[:place])}\t{own[place]}" for place in range(1, len(own))]
        lines += rows[::-1] if newest_first else rows
    return write(folder / "shop.inter", lines)


def as_newest_first(folder: Path) -> Path:
    return as_token_seq(folder, newest_first=True)


def as_minionerec(folder: Path) -> Path:
    path = folder / "train.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        names = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid"
        writer.writerow([*names.split(","), "item_sid"])
        for user, own in HISTORIES.items():
            for place in range(1, len(own)):
                before = own[:place]
                titles = [f'A, "{item}"' for item in before]
                codes = ["<a_1><b_2>" for _ in before]
                writer.writerow([user, titles, "T", before, own[place], codes, "<a_1><b_2>"])
    return path


def as_inter_json(folder: Path) -> Path:
    path = folder / "Shop.inter.json"
    path.write_text(json.dumps(HISTORIES))
    return path


def as_indented_json(folder: Path) -> Path:
    path = folder / "Shop.inter.json"
    path.write_text(json.dumps(HISTORIES, indent=2))
    return path


def as_lines_of_items(folder: Path) -> Path:
    """S3-Rec's."""
    return write(folder / "Shop.txt", [" ".join([user, *own]) for user, own in HISTORIES.items()])


def as_pairs(folder: Path) -> Path:
    """SASRec's."""
    return write(
        folder / "Shop.txt", [f"{user} {item}" for user, own in HISTORIES.items() for item in own]
    )


def as_pairs_with_header(folder: Path) -> Path:
    path = as_pairs(folder)
    path.write_text("user item\n" + path.read_text())
    return path


def as_lists_of_parquet(folder: Path, ending: str = "-list") -> Path:
    """Transformers4Rec's."""
    path = folder / "part.parquet"
    pl.DataFrame(
        {
            "session_id": [int(user) for user in HISTORIES],
            f"item_id{ending}": list(HISTORIES.values()),
            "category-list": [["c"] * len(own) for own in HISTORIES.values()],
        }
    ).write_parquet(path)
    return path


def as_older_lists(folder: Path) -> Path:
    return as_lists_of_parquet(folder, "-list_seq")


def as_examples_of_parquet(folder: Path) -> Path:
    path = folder / "train.parquet"
    rows = [
        (user, own[:place], own[place])
        for user, own in HISTORIES.items()
        for place in range(1, len(own))
    ]
    pl.DataFrame(rows, ["user_id", "item_id_list", "item_id"], orient="row").write_parquet(path)
    return path


def as_lists_of_json(folder: Path) -> Path:
    rows = [{"user": user, "items": own} for user, own in HISTORIES.items()]
    return write(folder / "log.jsonl", [json.dumps(row) for row in rows])


def as_lists_of_csv(folder: Path) -> Path:
    path = folder / "log.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["session_id", "item_id_list"])
        writer.writerows(HISTORIES.items())
    return path


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


@pytest.mark.parametrize(
    "form",
    [
        as_token_seq, as_newest_first, as_minionerec, as_inter_json, as_indented_json,
        as_lines_of_items, as_pairs, as_pairs_with_header, as_lists_of_parquet, as_older_lists,
        as_examples_of_parquet, as_lists_of_json, as_lists_of_csv,
    ],
)  # fmt: skip
def test_every_form_of_histories(tmp_path: Path, items: Path, form: Callable[[Path], Path]) -> None:
    """The very histories, oldest first, and no times that nobody gave."""
    log = form(tmp_path)
    assert histories(read(log, items)) == HISTORIES
    prepare_finetuning(log, items, tmp_path / "out", min_interactions=3)
    data = ProcessedFolder.load(tmp_path / "out")
    users = json.loads((tmp_path / "out" / "umap.json").read_text())
    found = {
        user: [data.asins[item] for part in (data.train, data.val, data.test) for item in part[row]]
        for user, row in users.items()
    }
    assert found == HISTORIES
    assert read_times(data) is None


def test_a_contradictory_example_names_its_line(tmp_path: Path, items: Path) -> None:
    log = as_token_seq(tmp_path)
    log.write_text(log.read_text() + "9\ti1\ti9\n")
    with pytest.raises(UserError, match=r"shop.inter, line 7: the histories of its user do not"):
        read(log, items)
    assert set(histories(read(log, items, skip=True))) == {"7", "8"}


def test_a_flag_that_could_do_nothing_is_refused(tmp_path: Path, items: Path) -> None:
    with pytest.raises(UserError, match="--rating_column would say it of .item_id. alone"):
        read(as_token_seq(tmp_path), items, Columns(rating="item_id_list"))
    with pytest.raises(UserError, match="has no columns, got --user_column"):
        read(as_inter_json(tmp_path), items, Columns(user="user"))


def test_a_list_of_an_unknown_name_is_refused_by_it(tmp_path: Path, items: Path) -> None:
    head = "user_id:token\thist:token_seq\titem_id:token"
    log = write(tmp_path / "shop.inter", [head, "7\ti1\ti2"])
    with pytest.raises(UserError, match="column of lists, 'hist', beside 'item_id'"):
        read(log, items)
    # Text is a list of words too.
    head = "user_id:token\treview:token_seq\titem_id:token"
    assert read(write(log, [head, "7\tso nice\ti2"]), items) == [("7", "i2", 0)]


def test_lists_with_times(tmp_path: Path, items: Path) -> None:
    log = tmp_path / "s.parquet"
    rows = {"session_id": [1, 2], "item_id-list": [["i1", "i2"], ["i3"]]}
    pl.DataFrame(rows | {"timestamp-list": [[20, 10], [5]]}).write_parquet(log)
    assert read(log, items) == [("1", "i1", 20), ("1", "i2", 10), ("2", "i3", 5)]
    pl.DataFrame(rows | {"timestamp": [20, 5]}).write_parquet(log)  # of the session
    assert read(log, items) == [("1", "i1", 20), ("1", "i2", 20), ("2", "i3", 5)]
    pl.DataFrame(rows | {"timestamp-list": [[20], [5]]}).write_parquet(log)
    with pytest.raises(UserError, match="s.parquet, row 1: its lists of items and of times"):
        read(log, items)
    assert read(log, items, skip=True) == [("2", "i3", 5)]
    pl.DataFrame({"user_id": [1], "item_id": ["i1"], "time": [[20]]}).write_parquet(log)
    with pytest.raises(UserError, match="the column of times holds lists"):
        read(log, items)


def test_two_histories_of_a_user_are_not_one(tmp_path: Path, items: Path) -> None:
    log = write(tmp_path / "Shop.txt", ["7 i1 i2 i3", "8 i1 i2", "7 i3 i4"])
    with pytest.raises(UserError, match="Shop.txt, line 3: a second history of its user, got '7'"):
        read(log, items)


def test_words_of_one_width_are_no_histories(tmp_path: Path, items: Path) -> None:
    """`user item rating time` would pass for a history of three items."""
    log = write(tmp_path / "u.data", ["u i1 5 30", "v i2  4 10", " w i3 3 20"])
    items.write_text(ITEMS.replace("title", "its title"))  # no separator of a CSV
    with pytest.raises(UserError, match="cannot tell what it is.*--separator"):
        read(log, items)
    with pytest.raises(UserError, match=r"no header.*from 1 to 4 \('u i1 5 30'\).*--user_column 1"):
        read(log, items, Columns(separator=" "))
    columns = Columns(separator=" ", user="1", item="2", time="4")
    assert read(log, items, columns) == [("u", "i1", 30), ("v", "i2", 10), ("w", "i3", 20)]


# --- catalogues -----------------------------------------------------------------------------------


def test_item_json(tmp_path: Path) -> None:
    rows = {
        "0": {"title": "One", "description": "Nice", "brand": None, "categories": "A,B"},
        "1": {"title": "Two", "price": 3},
    }
    path = tmp_path / "Shop.item.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent))
        assert texts(path) == {
            "0": {"title": "One", "description": "Nice", "categories": "A,B"},
            "1": {"title": "Two", "price": "3"},
        }


def test_item2attributes_json(tmp_path: Path) -> None:
    path = tmp_path / "Shop_item2attributes.json"
    path.write_text(json.dumps({"1": [12, 7], "2": [7]}))
    assert texts(path) == {"1": {"attributes": "12 7"}, "2": {"attributes": "7"}}


def test_index_json_is_refused_by_its_form(tmp_path: Path) -> None:
    path = tmp_path / "Shop.index.json"
    path.write_text(json.dumps({"1": ["<a_12>", "<b_3>"], "2": ["<a_1>", "<b_3>"]}))
    with pytest.raises(UserError, match=r'semantic ids \(\["<a_12>", "<b_3>"\]\).*NAME.item.json'):
        texts(path)


def test_half_a_surrogate_pair_is_a_question_mark(tmp_path: Path, items: Path) -> None:
    """JSON can say it and no file can hold it."""
    log = write(tmp_path / "Shop.inter.json", ['{"\\ud83d": ["i1", "\\udc00"]}'])
    assert read(log, items) == [("?", "i1", 0), ("?", "?", 0)]
    log = write(tmp_path / "log.jsonl", ['{"user": "\\ud83d", "items": ["i1", "\\udc00"]}'])
    assert read(log, items) == [("?", "i1", 0), ("?", "?", 0)]
    path = write(tmp_path / "Shop.item.json", ['{"\\ud83d": {"title": "a\\ud83d"}}'])
    assert texts(path) == {"?": {"title": "a?"}}
    log.write_bytes(b'{"user": "\xff", "item": "i1"}\n{"user": "v", "item": "i2"}\n')
    with pytest.raises(UserError, match="log.jsonl, line 1: not UTF-8"):
        read(log, items)
    assert read(log, items, skip=True) == [("v", "i2", 0)]
    log = tmp_path / "Shop.txt"
    log.write_bytes(b"u i1 i2 i3\nv i1 \xff\n")
    with pytest.raises(UserError, match="Shop.txt, line 2: bytes that are not in the file's enc"):
        read(log, items)
    assert histories(read(log, items, skip=True)) == {"u": ["i1", "i2", "i3"]}


def test_lists_of_json_with_times(tmp_path: Path, items: Path) -> None:
    rows = [
        {"user": 1, "items": ["i1", 2], "timestamp": [0, "2014-05-14"]},
        {"user": 2, "items": ["i3", "i4"], "timestamp": 0},
        {"user": 3, "items": ["i3"], "timestamp": None},
    ]
    log = write(tmp_path / "log.jsonl", [json.dumps(row) for row in rows])
    assert read(log, items, skip=True) == [
        ("1", "i1", 0), ("1", "2", 1400025600), ("2", "i3", 0), ("2", "i4", 0)
    ]  # fmt: skip
    with pytest.raises(UserError, match="log.jsonl, line 3: no timestamp"):
        read(log, items)


def test_flags_of_the_command(tmp_path: Path, items: Path) -> None:
    events = enumerate(["buy", "look", "buy", "buy", "ask"])
    rows = [f"s;{what};i{n % 4 + 1};{n}" for n, what in events]
    log = tmp_path / "log.txt"
    log.write_text("\n".join(["séance;geste;item;time", *rows]), encoding="latin-1")
    out = str(tmp_path / "out")
    main(
        ["--file_path", str(log), "--meta_file_path", str(items), "--output_path", out]
        + ["--separator", ";", "--encoding", "latin-1", "--session_column", "séance"]
        + ["--event_column", "geste", "--events", "buy", "ask", "--min_interactions", "3"]
    )
    data = ProcessedFolder.load(out)
    assert [data.asins[item] for item in data.train[0]] == ["i1", "i3"]
    assert data.dataset is not None
    assert data.dataset["counts"]["reviews"]["reviews_of_other_events"] == 1
    assert data.dataset["parameters"]["events"] == ["buy", "ask"]
    assert data.dataset["parameters"]["columns"] == {
        "event": "geste", "session": "séance", "separator": ";", "encoding": "latin-1"
    }  # fmt: skip


def test_steam_literals(tmp_path: Path) -> None:
    log = tmp_path / "steam.json"
    log.write_text(
        "{u'username': u'Ann', u'product_id': u'10', u'date': u'2017-12-17', u'text': u'It\\'s'}\n"
        "{u'username': u\"O'Hara\", u'product_id': u'20', u'date': u'2017-12-18'}\n"
    )
    games = tmp_path / "games.json"
    games.write_text("{u'id': u'10', u'title': u'Ten', u'genres': [u'Action', u'Indie']}\n")
    assert read(log, games) == [("Ann", "10", 1513468800), ("O'Hara", "20", 1513555200)]
    assert texts(games) == {"10": {"title": "Ten", "genres": "Action Indie"}}


def test_rees46(tmp_path: Path, items: Path) -> None:
    names = "event_time,event_type,product_id,category_id,category_code,brand,price,user_id"
    log = write(
        tmp_path / "2019-Oct.csv",
        [
            f"{names},user_session",
            "2019-10-01 00:00:00 UTC,view,i1,2,,acme,1.5,u,s1",
            "2019-10-01 00:00:09 UTC,cart,i2,2,,acme,1.5,u,s1",
            "2019-10-01 00:00:10 UTC,purchase,i2,2,,acme,1.5,u,s2",
        ],
    )
    start = 1569888000
    assert read(log, items) == [("u", "i1", start), ("u", "i2", start + 9), ("u", "i2", start + 10)]
    bought = [("u", "i2", start + 9), ("u", "i2", start + 10)]
    assert read(log, items, events=["cart", "purchase"]) == bought
    assert read(log, items, Columns(session="user_session"))[2] == ("s2", "i2", start + 10)
    with pytest.raises(UserError, match="no event_type is buy .--events., found: 'view', 'cart'"):
        read(log, items, events=["buy"])


def test_yoochoose(tmp_path: Path, items: Path) -> None:
    log = write(
        tmp_path / "yoochoose-clicks.dat",
        ["1,2014-04-07T10:51:09.277Z,i1,0", "1,2014-04-07T10:51:09.1Z,i2,S"],
    )
    with pytest.raises(UserError, match="has no header, its columns go by their numbers"):
        read(log, items)
    columns = Columns(session="1", time="2", item="3")
    assert read(log, items, columns) == [("1", "i1", 1396867869277), ("1", "i2", 1396867869100)]


def test_movielens_and_other_separators(tmp_path: Path, items: Path) -> None:
    log = write(tmp_path / "ratings.dat", ["u::i1::5::978300760", "u::i2::3::978302109"])
    columns = Columns(separator="::", user="1", item="2", rating="3", time="4")
    assert read(log, items, columns) == [("u", "i1", 978300760), ("u", "i2", 978302109)]
    assert read(log, items, columns, min_rating=4) == [("u", "i1", 978300760)]
    log = write(tmp_path / "log.csv", ["User ID;Item", 'u;"i1"'])
    with pytest.raises(UserError, match="one column 'User ID;Item': .*--separator ';'"):
        read(log, items)
    assert read(log, items, Columns(separator=";")) == [("u", "i1", 0)]


def test_events_of_json_lines(tmp_path: Path, items: Path) -> None:
    rows = [
        {"visitorid": 1, "event": "view", "itemid": "i1", "timestamp": 5, "rating": 2},
        {"visitorid": 1, "event": "buy", "itemid": "i2", "timestamp": "6", "rating": 4},
        {"visitorid": 1, "event": "buy", "itemid": "i3", "timestamp": 7, "rating": "3"},
    ]
    log = write(tmp_path / "events.jsonl", [json.dumps(row) for row in rows])
    assert read(log, items, events=["buy"]) == [("1", "i2", 6), ("1", "i3", 7)]
    assert read(log, items, events=["buy"], min_rating=4) == [("1", "i2", 6)]
    with pytest.raises(UserError, match="--events needs types of events.*--event_column"):
        read(as_csv(tmp_path), items, events=["buy"])


def test_rows_without_a_user(tmp_path: Path, items: Path) -> None:
    log = write(tmp_path / "log.csv", ["session_id,item_id", "a,i1", "b,i2", "a,i3"])
    with pytest.raises(UserError, match="--session_column session_id"):
        read(log, items)
    found = read(log, items, Columns(session="session_id"))
    assert histories(found) == {"a": ["i1", "i3"], "b": ["i2"]}
    with pytest.raises(UserError, match="name one of them"):
        read(log, items, Columns(session="session_id", user="item_id"))


@pytest.mark.parametrize(
    "names",
    ["customer,sku,date", "Visitor,Product,time", "userId,movieId,ts", "User ID,Item ID,TimeStamp"],
)
def test_names_that_need_no_saying(tmp_path: Path, items: Path, names: str) -> None:
    log = write(tmp_path / "log.csv", [names, "u,i1,5"])
    assert read(log, items) == [("u", "i1", 5)]


# --- lines ----------------------------------------------------------------------------------------


def as_csv(folder: Path, *more: str) -> Path:
    return write(folder / "log.csv", ["user_id,item_id,timestamp", "u,i1,1", "u,i2,2", *more])


FOUND = [("u", "i1", 1), ("u", "i2", 2)]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_are_no_rows(tmp_path: Path, items: Path, separator: str, end: str) -> None:
    lines = ["", "user_id,item_id,timestamp", "", "u,i1,1", "  ", "u,i2,2", ",,", "", ""]
    name = "log.csv" if separator == "," else "log.tsv"
    log = write(tmp_path / name, [line.replace(",", separator) for line in lines], end)
    assert read(log, items) == FOUND


def test_blank_lines_of_pairs_and_catalogues(tmp_path: Path) -> None:
    catalogue = write(tmp_path / "items.csv", ["item_id,title", "", "i1,One", "", ",", ""])
    log = write(tmp_path / "log.txt", ["", "u i1", "", "u i2", "", ""])
    assert read(log, catalogue) == [("u", "i1", 0), ("u", "i2", 0)]
    assert texts(catalogue) == {"i1": {"title": "One"}}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "txt"])
def test_a_byte_order_mark_says_the_encoding(
    tmp_path: Path, items: Path, encoding: str, form: str
) -> None:
    log = tmp_path / f"log.{form}"
    rows = [("ü", "i1"), ("ü", "i2")]
    lines = {
        "csv": ["user_id,item_id", *(f"{user},{item}" for user, item in rows)],
        "txt": [f"{user} {item}" for user, item in rows],
        "jsonl": [
            json.dumps({"user_id": user, "item_id": item}, ensure_ascii=False)
            for user, item in rows
        ],
    }[form]
    log.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    assert read(log, items) == [("ü", "i1", 0), ("ü", "i2", 0)]


def test_encodings(tmp_path: Path, items: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes("user_id,item_id\nJosé,i1\nAnn,i2\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"log.csv, line 2: bytes that are not in the file's enc"):
        read(log, items)
    assert read(log, items, skip=True) == [("Ann", "i2", 0)]
    assert read(log, items, Columns(encoding="latin-1"))[0] == ("José", "i1", 0)
    header = tmp_path / "header.csv"
    header.write_bytes("user_id,item_id,größe\nAnn,i2,3\n".encode("latin-1"))
    with pytest.raises(UserError, match="header.csv, line 1: bytes .* expected the names of the"):
        read(header, items, skip=True)
    with pytest.raises(UserError, match="got --encoding klingon, expected a text encoding"):
        read(log, items, Columns(encoding="klingon"))
    with pytest.raises(UserError, match="expected a text encoding"):
        read(log, items, Columns(encoding="rot13"))
    log.write_bytes("user_id,item_id\nu,i1\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"zero bytes.*--encoding \(utf-16-le"):
        read(log, items)
    assert read(log, items, Columns(encoding="utf-16-le")) == [("u", "i1", 0)]
    log.with_suffix(".jsonl").write_bytes('{"user": "é", "item": "i1"}\n'.encode("latin-1"))
    assert read(log.with_suffix(".jsonl"), items, Columns(encoding="latin-1")) == [("é", "i1", 0)]


def test_files_that_are_no_text_are_named(tmp_path: Path, items: Path) -> None:
    data = as_csv(tmp_path).read_bytes()
    with zipfile.ZipFile(tmp_path / "zip.csv", "w") as archive:
        archive.writestr("log.csv", data)
    (tmp_path / "bz2.csv").write_bytes(bz2.compress(data))
    (tmp_path / "pickle.csv").write_bytes(b"\x80\x04\x95abc")
    (tmp_path / "page.csv").write_bytes(b"<!DOCTYPE html>\n<html>")
    (tmp_path / "lfs.csv").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 1\n")
    (tmp_path / "zip.csv.gz").write_bytes(gzip.compress((tmp_path / "zip.csv").read_bytes()))
    for name, what in (
        ("zip.csv", "a zip archive"), ("bz2.csv", "bzip2"), ("pickle.csv", "pickle"),
        ("page.csv", "a web page"), ("lfs.csv", "a Git LFS pointer"), ("zip.csv.gz", "a zip"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"{re.escape(name)} is .*{what}"):
            read(tmp_path / name, items)


def test_json_that_begins_otherwise(tmp_path: Path, items: Path) -> None:
    rows = [
        {"user_id": "u", "item_id": "i1", "time": 1},
        {"user_id": "u", "item_id": "i2", "time": 2},
    ]
    lines = [json.dumps(row) for row in rows]
    for name, text in (
        ("blank", "\n \n" + "\n".join(lines)),
        ("space", "  " + "\n  ".join(lines)),
        ("array", json.dumps(rows)),
        ("indented", "\n" + json.dumps(rows, indent=1)),
        ("cr", "\r".join(lines)),
    ):
        log = tmp_path / f"{name}.json"
        log.write_text(text, newline="")
        assert read(log, items) == FOUND
    log.write_text(json.dumps([*rows, {"user_id": "u"}]))
    with pytest.raises(UserError, match="cr.json, entry 3: no item_id"):
        read(log, items)
    log.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"begins with \[ and is no JSON array"):
        read(log, items)
    log.write_text(json.dumps({f"key {n}": n for n in range(3231)}))
    with pytest.raises(UserError, match="key 0, .*key 11 and 3,219 more is known as"):
        read(log, items)


def test_broken_rows_name_their_line(tmp_path: Path, items: Path) -> None:
    log = as_csv(tmp_path, "u,i3,3,extra", "u,i4,4")
    with pytest.raises(UserError, match=r"log.csv, line 4: 4 fields, expected 3"):
        read(log, items)
    assert read(log, items, skip=True) == [*FOUND, ("u", "i4", 4)]
    # The field of three lines counts as three.
    log = write(
        tmp_path / "log.csv",
        ["user_id,item_id,note,timestamp", 'u,i1,"a', "b", 'c",1', "u,i2,d,soon", "u,i2,x,2"],
    )
    with pytest.raises(UserError, match="log.csv, line 5: timestamp is no number.*got 'soon'"):
        read(log, items)
    assert read(log, items, skip=True) == FOUND


@pytest.mark.parametrize("title", ['TV 55" LED', '"TV" 55', '"TV 55'])
def test_an_inch_mark(tmp_path: Path, title: str) -> None:
    path = write(tmp_path / "items.csv", ["item_id,title,n", "i1,One,1", f"i2,{title},2", "i3,T,3"])
    if title.startswith('"'):
        with pytest.raises(UserError, match="items.csv, line 3: a quote that"):
            texts(path)
        found = texts(path, bad_lines=BadLines(skip=True))
        assert list(found) == ["i1", "i3"]
    else:
        assert texts(path)["i2"]["title"] == title
    tsv = write(tmp_path / "items.tsv", path.read_text().replace(",", "\t").splitlines())
    assert [item["title"] for item in texts(tsv).values()] == ["One", title, "T"]


def test_a_quote_of_text_swallows_no_lines(tmp_path: Path) -> None:
    """Between the quotes of two titles lie two whole lines: read as one field, they were lost."""
    rows = ["item_id\ttitle\tn", 'i1\t"One\t1', "i2\tTwo\t2", 'i3\tThree"\t3', "i4\tFour\t4"]
    found = texts(write(tmp_path / "items.tsv", rows))
    assert [item["title"] for item in found.values()] == ['"One', "Two", 'Three"', "Four"]


def test_tsv_as_pandas_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "items.tsv"
    rows = [["item_id", "title"], ["i1", 'The "best"'], ["i2", "one\ntwo"], ["i3", "a\tb"]]
    with open(path, "w", newline="") as handle:
        csv.writer(handle, delimiter="\t", lineterminator="\n").writerows(rows)
    assert texts(path) == {key: {"title": title} for key, title in rows[1:]}


REGULAR = ["user_id,item_id,timestamp", *(f"u{n % 7},i{n % 5},{n}" for n in range(3000))]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (0, None), (2000, "u1,i1,5,6"), (2000, "u1,i1"), (1, ""), (3001, ""), (9, ",,"),
        (2500, "é,i1,7"), (2500, "\udcff,i1,7"), (2500, 'u1,"i1",7'), (2500, "u1,i1\r,7"),
        (2500, "u1,i1,7\r"), (2500, '"u\n\n,1","i""1",7'), (2500, '"u1","i1" ,7'),
        (2500, 'u1,i"1",7'), (2500, '"u1,i1,7'), (2500, '"u1","",7'), (2500, "u1,i\0,7"),
        (3001, '"u1","i\n1",7'), (0, "\ufeffuser_id,item_id,timestamp"), (9, '"u\r\n1",i1,7'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_the_fast_reader_finds_what_the_careful_one_finds(
    tmp_path: Path,
    items: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    line: str | None,
    packed: bool,
) -> None:
    lines = list(REGULAR)
    if line is not None:
        lines.insert(place, line)
        # A line of a field more makes up for one of a field less.
        lines.append({"u1,i1,5,6": "u2,i2", "u1,i1": "u2,i2,3,4"}.get(line, "u2,i2,9"))
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
    log = tmp_path / ("log.csv.gz" if packed else "log.csv")
    log.write_bytes(gzip.compress(data) if packed else data)
    source, _ = open_sources(log, items, Columns(), None)

    def found() -> tuple[list[Any], dict[str, Any], dict[str, int]]:
        bad = BadLines(skip=True)
        log, counts = source.read(None, bad)
        columns = [column.tolist() for column in (log.users, log.items, log.times)]
        return [columns, log.user_names, log.item_names], bad.summary(), counts

    fast = found()
    monkeypatch.setattr("recformer.preparation.log_frames.AT_ONCE", 700)
    assert found() == fast  # in several frames
    monkeypatch.setattr("recformer.preparation.delimited._PIECE", 1000)
    monkeypatch.setattr("recformer.preparation.delimited._HELD", 2000)
    assert found() == fast  # and several pieces, which are read twice
    monkeypatch.setattr("recformer.preparation.log_frames.regular_pieces", lambda *args: None)
    assert found() == fast
    assert len(fast[0][0][0]) >= 2999


def row_starts(path: Path, layout: Layout, width: int) -> np.ndarray | None:
    """Lines on which the rows of all pieces begin."""
    pieces = regular_pieces(path, layout, width)
    return None if pieces is None else np.concatenate([starts for _, starts in pieces])


FIELDS = st.text(st.sampled_from('ab,\t" \n\r\u00e9'), max_size=5)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from([",", "\t"]),
    st.integers(1, 40),
)
def test_rows_begin_where_python_finds_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[str, str, str]],
    end: str,
    quoting: Any,
    separator: str,
    block: int,
) -> None:
    """Whatever `csv` writes, and however it is cut into blocks."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end).writerows(rows)
    data = text.getvalue().encode()
    blocks = [data[place : place + block] for place in range(0, len(data), block)]
    monkeypatch.setattr("recformer.preparation.delimited.byte_blocks", lambda path: iter(blocks))
    monkeypatch.setattr("recformer.preparation.delimited._PIECE", 2 * block)
    layout = Layout(separator, "always")
    starts = row_starts(tmp_path, layout, 3)
    lines = text.getvalue().split("\n")
    again = [line + "\n" for line in lines[:-1]]
    wanted = [
        number for numbers, _ in read_rows(iter(again), layout, lambda *args: None, 3)
        for number in numbers
    ]  # fmt: skip
    if any("\r" in field for row in rows for field in row):
        assert starts is None or starts.tolist() == wanted
    else:
        assert starts is not None
        assert starts.tolist() == wanted


def test_quotes_alone_do_not_make_the_careful_reader_necessary(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    with open(log, "w", newline="") as handle:
        csv.writer(handle, quoting=csv.QUOTE_ALL).writerows(
            [["user_id", "item_id"], ["u", "i\n1"], ['u "2"', "i2"], ["u3", "i,3"]]
        )
    starts = row_starts(log, Layout(","), 2)
    assert starts is not None
    assert starts.tolist() == [1, 2, 4, 5]
    assert row_starts(log, Layout(",", "maybe"), 2) is None  # a line break is for judging
    assert row_starts(log, Layout(","), 3) is None


def test_columns_named_twice_are_refused(tmp_path: Path, items: Path) -> None:
    log = write(tmp_path / "log.csv", ["user_id,item_id, item_id", "u,i1,i2"])
    with pytest.raises(UserError, match="names of columns twice .'item_id'"):
        read(log, items)
    log = write(tmp_path / "log.jsonl", ['{"user": "u", "item": "a", "item": "b"}'])
    with pytest.raises(UserError, match="log.jsonl, line 1: the key 'item' stands twice"):
        read(log, items)
    log = write(tmp_path / "x.inter.json", ['{"u": ["i1", "i2"], "u": ["i3"]}'])
    with pytest.raises(UserError, match="has the key 'u' twice"):
        read(log, items)


@pytest.mark.parametrize(
    "wrong",
    [
        '{"user": "u", "item": "i1", "t\u00e9": 1, "item": "i2"}',
        '{"user": "u", "item": "i1", "user": 7}',  # the second one is mended
        "{'user': 'u', 'item': 'i1', 'item': 'i2'}",
    ],
)
def test_a_key_that_stands_twice_in_any_line_is_refused(
    tmp_path: Path, items: Path, wrong: str
) -> None:
    """Keys inside of another object, and words of a text, are no second key."""
    more = '"more": {"item": "x", "item": 1}, "text": "the \\"item\\" is red"'
    sound = [f'{{"user": "u", "item": "i1", {more}}}'] * 30
    if wrong.startswith("{'"):
        sound = ["{'user': 'u', 'item': 'i1'}"] * 30
    log = write(tmp_path / "log.jsonl", [*sound, wrong])
    key = "user" if "7" in wrong else "item"
    with pytest.raises(UserError, match=f"log.jsonl, line 31: the key '{key}' stands twice"):
        read(log, items)
    assert read(log, items, skip=True) == [("u", "i1", 0)] * 30


def test_an_item_that_has_its_key_twice_is_refused(tmp_path: Path) -> None:
    line = '{"asin": "i1", "title": "One"}'
    twice = '{"asin": "i2", "title": "Two", "asin": "i3"}'
    path = write(tmp_path / "items.jsonl", [*[line] * 30, twice])
    with pytest.raises(UserError, match="items.jsonl, line 31: the key 'asin' stands twice"):
        texts(path)


def test_a_column_of_row_numbers_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", [",item_id,title,Unnamed: 0", "0,i1,One,0"])
    assert texts(path) == {"i1": {"title": "One"}}


# --- paths ----------------------------------------------------------------------------------------


def test_no_path_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [v2] *"
    folder.mkdir()
    catalogue = folder / "items?.csv"
    catalogue.write_text(ITEMS)
    for form in ("csv", "jsonl", "parquet", "txt"):
        log, other = folder / f"log[1].{form}", folder / f"log1.{form}"
        for path, item in ((log, "i1"), (other, "i2")):
            if form == "parquet":
                pl.DataFrame({"user": ["u"], "item": [item]}).write_parquet(path)
            else:
                path.write_text(
                    {
                        "csv": f"user,item\nu,{item}\n",
                        "jsonl": json.dumps({"user": "u", "item": item}),
                        "txt": f"u {item}\n",
                    }[form]
                )
        assert read(log, catalogue) == [("u", "i1", 0)]
    catalogue = folder / "items[1].parquet"
    pl.DataFrame({"item_id": ["i1"], "title": ["One"]}).write_parquet(catalogue)
    assert texts(catalogue) == {"i1": {"title": "One"}}


def test_a_folder_of_parquet_is_one_table(tmp_path: Path, items: Path) -> None:
    folder = tmp_path / "log [parts]"
    for day, rows in (("day=1", ["i1", "i2"]), ("day=2", ["i3"])):
        (folder / day).mkdir(parents=True)
        frame = pl.DataFrame({"user_id": ["u"] * len(rows), "item_id": rows})
        frame.write_parquet(folder / day / "part-0.parquet")
    (folder / "_SUCCESS").write_text("")
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log" / "x.parquet").write_text("no table")
    assert read(folder, items) == [("u", "i1", 0), ("u", "i2", 0), ("u", "i3", 0)]
    (folder / "day=1" / "part-0.parquet").unlink()
    with pytest.raises(UserError, match="day=1 is a folder without .parquet files"):
        read(folder / "day=1", items)


def test_a_pipe_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = ["item_id,title", "a,One", "b,Two", "c,Three", "d,Four"]
    log = ["user_id,item_id", *(f"{user},{item}" for user in "xyz" for item in "abcd")]
    pipes = {name: tmp_path / f"{name}.csv" for name in ("log", "items")}
    flags = ["--file_path", str(pipes["log"]), "--meta_file_path", str(pipes["items"])]
    flags += ["--output_path", str(tmp_path / "out")]

    def run() -> None:
        writers = []
        for name, lines in (("log", log), ("items", catalogue)):
            pipes[name].unlink(missing_ok=True)
            os.mkfifo(pipes[name])
            text = "\n".join(lines)
            writers.append(threading.Thread(target=pipes[name].write_text, args=(text,)))
            writers[-1].start()
        try:
            main(flags)
        finally:
            for writer in writers:
                writer.join(timeout=20)

    before = set(Path(tempfile.gettempdir()).glob("recformer_*"))
    run()
    folder = ProcessedFolder.load(tmp_path / "out")
    assert (folder.num_users, folder.num_items) == (3, 4)
    log[5] = "x,a,a,a"
    with pytest.raises(UserError, match=f"^{pipes['log']}, line 6: 4 fields, expected 2"):
        run()
    assert set(Path(tempfile.gettempdir()).glob("recformer_*")) == before


def test_a_device_is_no_file(items: Path) -> None:
    with pytest.raises(UserError, match="/dev/null is a pipe or a device, expected a file"):
        read(Path("/dev/null"), items)


# --- ids ------------------------------------------------------------------------------------------


def test_whole_numbers_that_pandas_made_floats(tmp_path: Path) -> None:
    catalogue = write(tmp_path / "items.csv", ["item_id,title", "6,Six", "7,Seven"])
    log = write(tmp_path / "log.csv", ["user_id,item_id", "1.0,6.0", "2.0,7.0"])
    assert read(log, catalogue) == [("1", "6", 0), ("2", "7", 0)]
    log = write(tmp_path / "log.jsonl", ['{"user_id": 1.0, "item_id": 6.0}'])
    assert read(log, catalogue) == [("1", "6", 0)]
    pl.DataFrame({"user_id": [1, 2], "item_id": [6.0, 7.0]}).write_parquet(tmp_path / "l.parquet")
    assert read(tmp_path / "l.parquet", catalogue) == [("1", "6", 0), ("2", "7", 0)]
    catalogue = write(tmp_path / "items.csv", ["item_id,title", "6.0,Six", "7.0,Seven"])
    assert texts(catalogue) == {"6": {"title": "Six"}, "7": {"title": "Seven"}}
    # Versions are no numbers: one that is none makes all of them names.
    catalogue = write(tmp_path / "items.csv", ["item_id,title", "6.0,Six", "6.1,Seven"])
    assert list(texts(catalogue)) == ["6.0", "6.1"]


# --- what is written is what is read --------------------------------------------------------------

NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=6
)
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=20
)
LOGS = st.lists(st.tuples(NAMES, NAMES, st.integers(-(2**40), 2**40)), min_size=1, max_size=8)
TITLES = st.dictionaries(NAMES, TEXTS, min_size=1, max_size=6)
HYPOTHESIS = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole_floats(names: list[str]) -> bool:
    return all(re.fullmatch(r"-?[0-9]+\.0+", name) for name in names)


@pytest.mark.parametrize(
    "form", ["csv", "tsv", "semicolons", "jsonl", "json", "parquet", "pairs", "recbole"]
)
@HYPOTHESIS
@given(log=LOGS)
def test_any_log_is_read_as_it_was_written(
    tmp_path: Path, items: Path, form: str, log: list[tuple[str, str, int]]
) -> None:
    users, names, _ = map(list, zip(*log))
    if whole_floats(users) or whole_floats(names):
        return
    if form == "recbole" and any('"' in name for name in (*users, *names)):
        return  # written without quotes: one around a name would be taken for one
    header = ["user_id", "item_id", "timestamp"]
    path = tmp_path / f"log.{'csv' if form == 'semicolons' else form}"
    columns = Columns()
    if form in ("csv", "tsv", "semicolons"):
        separator = {"csv": ",", "tsv": "\t", "semicolons": ";"}[form]
        columns = Columns(separator=";") if form == "semicolons" else columns
        with open(path, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, delimiter=separator).writerows([header, *log])
    elif form == "parquet":
        pl.DataFrame(log, header, orient="row").write_parquet(path)
    elif form == "recbole":
        path = path.with_suffix(".inter")
        rows = ["user_id:token\titem_id:token\ttimestamp:float"]
        rows += [f"{user}\t{item}\t{time}.0" for user, item, time in log]
        path.write_text("\n".join(rows), encoding="utf-8")
    elif form == "pairs":
        path = path.with_suffix(".txt")
        path.write_text("".join(f"{user} {item}\n" for user, item, _ in log), encoding="utf-8")
        log = [(user, item, 0) for user, item, _ in log]
    else:
        entries = [dict(zip(header, row)) for row in log]
        text = json.dumps(entries) if form == "json" else "\n".join(map(json.dumps, entries))
        path.write_text(text)
    try:
        found = read(path, items, columns)
    except UserError as error:
        # Words in which everything is possible: `{` begins JSON, a comma a CSV.
        named = form == "pairs" and str(path) in str(error)
        if not named:
            raise
    else:
        assert found == log


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "object", "parquet", "recbole"])
@HYPOTHESIS
@given(titles=TITLES)
def test_any_catalogue_is_read_as_it_was_written(
    tmp_path: Path, form: str, titles: dict[str, str]
) -> None:
    if whole_floats(list(titles)):
        return
    rows = [(key, title, "b") for key, title in titles.items()]
    header = ["item_id", "title", "brand"]
    suffix = {"object": "json", "recbole": "item"}.get(form, form)
    path = tmp_path / f"items.{suffix}"
    if form in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, delimiter="," if form == "csv" else "\t")
            writer.writerows([header, *rows])
    elif form == "parquet":
        pl.DataFrame(rows, header, orient="row").write_parquet(path)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(header, row))) for row in rows))
    elif form == "object":
        path.write_text(json.dumps({row[0]: dict(zip(header[1:], row[1:])) for row in rows}))
    else:  # RecBole writes no quotes, and no title of it has tabs or ends of lines
        titles = {key: " ".join(title.split()) or "x" for key, title in titles.items()}
        lines = ["item_id:token\ttitle:token_seq\tbrand:token"]
        path.write_text(
            "\n".join(lines + [f"{key}\t{title}\tb" for key, title in titles.items()]),
            encoding="utf-8",
        )
        if any('"' in text for text in (*titles, *titles.values())):
            found = texts(path)  # quotes around a whole field say nothing: they may go
            assert {key.strip('"') for key in found} == {key.strip('"') for key in titles}
            return
    assert texts(path) == {key: {"title": title, "brand": "b"} for key, title in titles.items()}


ROWS = st.lists(
    st.lists(st.text(st.sampled_from('ab",\n \t;é'), max_size=5), min_size=3, max_size=3),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["a,b", 'x"y', "", ",,,,"]))))
def test_broken_lines_cost_no_whole_row(
    rows: list[list[str]], broken: list[tuple[int, str]]
) -> None:
    """Rows that need no quotes come back, with their lines, whatever lies between them."""
    plain = [
        row for row in rows if any(row) and not any(set('"\n') & set("".join(row)) for _ in "x")
    ]
    lines: list[tuple[str, list[str] | None]] = [
        (",".join(row), row) for row in plain if not any("," in field for field in row)
    ]
    for place, text in broken:
        lines.insert(place, (text, None))
    notes: dict[int, str] = {}
    found = [
        (number, row)
        for numbers, some in read_rows(
            (text + "\n" for text, _ in lines), Layout(","), notes.__setitem__, 3
        )
        for number, row in zip(numbers, some)
    ]
    wanted = [(number, row) for number, (_, row) in enumerate(lines, 1) if row is not None]
    assert found == wanted
    assert set(notes) <= {number for number, (_, row) in enumerate(lines, 1) if row is None}


def test_ids_that_match_nothing_are_shown(tmp_path: Path, items: Path) -> None:
    log = write(tmp_path / "log.csv", ["user_id,item_id", "u,I1", "u,I2"])
    with pytest.raises(UserError, match="an id of the former is 'I1', of the latter 'i1'"):
        prepare_finetuning(log, items, tmp_path / "out")


def test_where_nothing_is_usable_the_error_says_why(tmp_path: Path, items: Path) -> None:
    for name, lines in (
        ("log.csv", ["user_id,item_id,time", "u,i1,some day", "u,i2,other day"]),
        ("log.jsonl", [f'{{"user": "u", "item": "i1", "time": "{d} day"}}' for d in ("some", "x")]),
    ):
        log = write(tmp_path / name, lines)
        reason = r"2 time is no number and no ISO 8601 date; the first: .*, line \d: .*'some day'"
        with pytest.raises(UserError, match=reason):
            read(log, items, skip=True)
    table = write(tmp_path / "table.csv", ["item_id,title", ",One", ",Two"])
    with pytest.raises(UserError, match="no usable .*2 no item_id; the first: table.csv, line"):
        texts(table, bad_lines=BadLines(skip=True))
