"""Planted faults are found with their exact size; a clean folder has none; the page is safe."""

from __future__ import annotations

import base64
import csv
import json
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recformer.cli import exit_with_message
from recformer.commands.audit import main
from recformer.config import PAPER
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.preparation.audit.figures import audit, audit_folder
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.options import SplitOptions
from recformer.preparation.tables import Columns
from recformer.preparation.text import count_words
from recformer.tokenization import train_tokenizer

START = 1_300_000_000
LEAVE_ONE_OUT = {"name": "leave_one_out"}
TEMPORAL = {"name": "temporal", "val_cut": START + 30_000, "test_cut": START + 40_000}


def moment(user: int, place: int) -> int:
    """No two users and no two gaps alike; the places of all users lie apart."""
    return START + 10_000 * place + 37 * user + 13 * user * place + 11 * place * place


@dataclass
class Shop:
    """Eight users, eight items: user u meets u, u+1, u+2 | u+3 | u+4 (modulo 8)."""

    parts: list[list[list[int]]] = field(
        default_factory=lambda: [
            [[(u + k) % 8 for k in places] for places in ((0, 1, 2), (3,), (4,))] for u in range(8)
        ]
    )
    times: list[list[int]] | None = field(
        default_factory=lambda: [[moment(u, k) for k in range(5)] for u in range(8)]
    )
    items: list[dict[str, str]] = field(
        default_factory=lambda: [
            {"title": f"Card of colour {name}", "brand": "Acme"} for name in "ABCDEFGH"
        ]
    )
    split: dict[str, Any] = field(default_factory=lambda: dict(LEAVE_ONE_OUT))

    def write(self, folder: Path) -> ProcessedFolder:
        train, val, test = (
            Sequences.from_lists([user[part] for user in self.parts]) for part in range(3)
        )
        asins = [f"i{number}" for number in range(len(self.items))]
        write_processed(
            folder,
            train=train,
            val=val,
            test=test,
            user_names=[f"u{number}" for number in range(len(self.parts))],
            asins=asins,
            meta=dict(zip(asins, self.items)),
            times=None if self.times is None else np.concatenate(self.times),
            dataset={"split": self.split, "parameters": {"attributes": ["title", "brand"]}},
        )
        return ProcessedFolder.load(folder)


def no_metadata(shop: Shop) -> None:
    shop.items[3] = {}


def empty_text(shop: Shop) -> None:
    shop.items[3] = {"title": " ", "brand": ""}


def near_empty_text(shop: Shop) -> None:
    shop.items[3] = {"title": "Gift card"}


def identical_text(shop: Shop) -> None:
    shop.items[3] = dict(shop.items[5])


def consecutive_repeat(shop: Shop) -> None:
    shop.parts[0][0] = [0, 1, 1]


def bought_again(shop: Shop) -> None:
    shop.parts[0][0] = [0, 1, 0]


def seen_target(shop: Shop) -> None:
    shop.parts[0][2] = [0]


def tied_times(shop: Shop) -> None:
    shop.times[0][1] = shop.times[0][0]


def tied_target(shop: Shop) -> None:
    shop.times[0][4] = shop.times[0][3]


def target_tied_twice(shop: Shop) -> None:
    # 3, 4, 4 at one time: the first 4 could as well be the last.
    shop.parts[0] = [[0, 1, 3], [4], [4]]
    shop.times[0][2:] = [shop.times[0][2]] * 3


def duplicate(shop: Shop) -> None:
    shop.parts[0][0] = [0, 1, 1]
    shop.times[0][2] = shop.times[0][1]


def duplicate_apart(shop: Shop) -> None:
    shop.parts[0][0] = [1, 0, 1]
    shop.times[0][:3] = [START] * 3


def later_than_own_target(shop: Shop) -> None:
    shop.times[0][2] = shop.times[0][4] + 1


def user_without_targets(shop: Shop) -> None:
    shop.parts[7] = [[7, 0, 1], [], []]
    shop.times[7] = [START, START + 10_007, START + 45_000]
    shop.split = dict(TEMPORAL)


def same_without_recorded_cuts(shop: Shop) -> None:
    user_without_targets(shop)
    shop.split = {"name": "temporal"}


def at_the_cut(shop: Shop) -> None:
    shop.split = {"name": "temporal", "val_cut": moment(7, 2), "test_cut": moment(7, 3)}


def same_start(shop: Shop) -> None:
    # Half of the users; the gaps differ.
    for user in range(4):
        shop.times[user][0] = START
    shop.split = dict(TEMPORAL)


def constant_gaps(shop: Shop) -> None:
    # 26 of 32 gaps: 81 %; the users start at different times.
    for user in range(8):
        shop.times[user] = [START + user + 10_000 * place for place in range(5)]
    for user in range(6):
        shop.times[user][4] += 3 + user
    shop.split = dict(TEMPORAL)


def cold_target(shop: Shop) -> None:
    shop.items.append({"title": "Never seen before", "brand": "Acme"})
    shop.parts[0][2] = [8]


def user_without_history(shop: Shop) -> None:
    shop.parts.append([[], [], [2]])
    shop.times.append([moment(9, 4)])


def one_item_everywhere(shop: Shop) -> None:
    shop.items.append({"title": "The best seller", "brand": "Acme"})
    for user in shop.parts:
        user[0][0] = 8


def one_in_milliseconds(shop: Shop) -> None:
    assert shop.times is not None
    shop.times[3][4] *= 1000  # the last of its user: nothing comes out of order


def attributes_behind_the_third(shop: Shop) -> None:
    shop.items[0] |= {"category": "Cards", "price": "3", "size": "S"}
    shop.items[1] |= {"price": "4", "size": "M"}


# Fault: what figures it must leave behind (share as a fraction), and which warnings.
FAULTS: list[tuple[Callable[[Shop], None], dict[str, tuple[int, int]], set[str]]] = [
    (
        no_metadata,
        {"texts.without_metadata.items": (1, 8), "texts.without_metadata.test_targets": (1, 8)},
        {"without_metadata"},
    ),
    (
        empty_text,
        {"texts.empty.items": (1, 8), "texts.empty.test_targets": (1, 8)},
        {"empty_texts"},
    ),
    (
        near_empty_text,
        {"texts.near_empty.items": (1, 8), "texts.near_empty.test_targets": (1, 8)},
        {"near_empty_texts"},
    ),
    (
        identical_text,
        {"texts.identical.items": (2, 8), "texts.identical.test_targets": (2, 8)},
        {"identical_texts"},
    ),
    (
        consecutive_repeat,
        {"repeats.consecutive": (1, 40), "repeats.again": (1, 40)},
        {"consecutive_repeats", "repeats"},
    ),
    (bought_again, {"repeats.consecutive": (0, 40), "repeats.again": (1, 40)}, {"repeats"}),
    (
        seen_target,
        {
            "targets.test.in_history": (1, 8),
            "targets.val.in_history": (0, 8),
            "targets.test.same_as_newest": (0, 8),
        },
        {"seen_targets", "repeats"},
    ),
    (
        tied_times,
        {"times.tied": (2, 40), "times.users_ordered_by_ties": (1, 8)},
        {"tied_times"},
    ),
    (
        tied_target,
        {
            "times.tied": (2, 40),
            "targets.val.decided_by_ties": (1, 8),
            "targets.test.decided_by_ties": (1, 8),
        },
        {"tied_times", "targets_decided_by_ties"},
    ),
    (
        target_tied_twice,
        {
            "times.tied": (3, 40),
            "times.duplicates": (1, 40),
            "targets.test.decided_by_ties": (1, 8),
            "targets.test.same_as_newest": (1, 8),
        },
        {
            "tied_times",
            "targets_decided_by_ties",
            "consecutive_repeats",
            "repeats",
            "seen_targets",
        },
    ),
    (
        duplicate,
        {
            "times.duplicates": (1, 40),
            "times.tied": (2, 40),
            "times.users_ordered_by_ties": (0, 8),
            "repeats.consecutive": (1, 40),
        },
        {"consecutive_repeats", "repeats", "tied_times"},
    ),
    (
        duplicate_apart,
        {"times.duplicates": (1, 40), "times.tied": (3, 40), "repeats.consecutive": (0, 40)},
        {"repeats", "tied_times"},
    ),
    (
        later_than_own_target,
        {"times.users_out_of_order": (1, 8), "times.train_after_own_target": (1, 24)},
        {"out_of_order", "train_after_the_cut"},
    ),
    (
        user_without_targets,
        {"times.after_the_cut.val": (1, 24), "times.after_the_cut.test": (1, 31)},
        {"train_after_the_cut"},
    ),
    (
        same_without_recorded_cuts,
        {"times.after_the_cut.val": (1, 24), "times.after_the_cut.test": (1, 31)},
        {"train_after_the_cut"},
    ),
    (
        # The cut is the first time after it, so what lies on it is late.
        at_the_cut,
        {"times.after_the_cut.val": (1, 24), "times.after_the_cut.test": (1, 32)},
        {"train_after_the_cut"},
    ),
    (
        same_start,
        {"times.commonest_start": (4, 8), "times.after_the_cut.val": (0, 24)},
        {"synthetic_times"},
    ),
    (constant_gaps, {"times.commonest_gap": (26, 32)}, {"synthetic_times"}),
    (one_in_milliseconds, {"times.odd": (1, 40)}, {"odd_times"}),
    (
        attributes_behind_the_third,
        {"texts.not_read.attributes.price": (1, 8), "texts.not_read.attributes.size": (2, 8)},
        {"attributes_not_read"},
    ),
    (
        cold_target,
        {"targets.test.cold": (1, 8), "targets.val.cold": (0, 8)},
        {"cold_targets"},
    ),
    (
        user_without_history,
        {"targets.test.without_history": (1, 9), "targets.val.without_history": (0, 8)},
        {"without_history"},
    ),
    (
        one_item_everywhere,
        {
            "popularity.top_1_percent.train": (8, 24),
            "popularity.top_1_percent.test_targets": (0, 8),
            "popularity.items_never_in_train": (0, 9),
        },
        {"concentrated_popularity"},
    ),
]


def at(found: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        found = found[key]
    return found


@pytest.mark.parametrize(
    ("plant", "figures", "kinds"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS]
)
def test_a_planted_fault_is_found(
    tmp_path: Path,
    plant: Callable[[Shop], None],
    figures: dict[str, tuple[int, int]],
    kinds: set[str],
) -> None:
    shop = Shop()
    plant(shop)
    found = audit(shop.write(tmp_path))
    for path, (count, total) in figures.items():
        figure = at(found, path)
        assert (figure["count"], figure["share"]) == (count, count / total), path
    assert {warning["kind"] for warning in found["warnings"]} == kinds


@pytest.mark.parametrize("split", [LEAVE_ONE_OUT, TEMPORAL])
def test_a_clean_folder(tmp_path: Path, split: dict[str, Any]) -> None:
    found = audit(Shop(split=dict(split)).write(tmp_path))
    assert found["warnings"] == []
    assert found["sizes"] == {
        "users": 8,
        "items": 8,
        "interactions": 40,
        "train": 24,
        "val": 8,
        "test": 8,
    }
    assert found["lengths"]["train_sequence"]["percentiles"] == dict.fromkeys(
        ("0", "5", "25", "50", "75", "95", "100"), 3.0
    )
    assert found["texts"]["words"]["histogram"] == {"edges": [5, 6], "counts": [8]}
    assert found["texts"]["attributes"]["brand"] == {"count": 8, "share": 1.0}
    assert found["popularity"]["gini"] == pytest.approx(0)
    assert found["targets"]["test"]["new_items"] == 0
    # All that is trained on lies before all targets.
    note = "leave-one-out looks into the future: 0.0 % of the training interactions"
    assert [n.startswith(note) for n in found["notes"]] == [True] * (split == LEAVE_ONE_OUT)


def test_the_message_says_how_much(tmp_path: Path) -> None:
    shop = Shop()
    identical_text(shop)
    warning = audit(shop.write(tmp_path))["warnings"][0]
    assert warning == {
        "kind": "identical_texts",
        "share": 0.25,
        "message": "2 (25.0 %) items have the very text of another, so they tie; 2 (25.0 %) test "
        "targets are among them",
    }


@pytest.mark.parametrize(
    "odd",
    [
        (START + 41_000) * 1000,  # milliseconds
        253_402_300_799,  # the year 9999
        -62_135_596_800,  # the year 1
        2**63 - 1,
        -(2**63),
        0,
    ],
)
@pytest.mark.parametrize("unit", ["s", "none"])
def test_an_odd_time_is_said_and_drawn_around(tmp_path: Path, odd: int, unit: str) -> None:
    shop = Shop()
    if unit == "none":  # numbers of rows, as good as any clock
        shop.times = [[10 * place + user for place in range(5)] for user in range(8)]
    assert shop.times is not None
    usual = sorted(time for user in shop.times for time in user if time != shop.times[3][4])
    shop.times[3][4] = odd
    shop.write(tmp_path)
    found = audit_folder(tmp_path)
    far = unit == "s" or abs(odd) > 2**61
    assert found["times"]["odd"] == {
        "count": int(far), "share": far / 40, "first": odd if far else None
    }  # fmt: skip
    assert ("odd_times" in {warning["kind"] for warning in found["warnings"]}) == far
    assert (found["times"]["first"], found["times"]["last"]) == (
        min(odd, usual[0]), max(odd, usual[-1])
    )  # fmt: skip
    if far:
        edges = found["times"]["histogram"]["edges"]
        assert (edges[0], edges[-1]) == (usual[0], usual[-1])
        assert found["times"]["resolution"] == int(np.gcd.reduce(np.array(usual) - usual[0]))
    assert "<img" in (tmp_path / "audit.html").read_text()


def test_seconds_and_milliseconds_in_one_log_are_said(tmp_path: Path) -> None:
    shop = Shop()
    assert shop.times is not None
    for user in (5, 6, 7):
        shop.times[user] = [1000 * time for time in shop.times[user]]
    found = audit(shop.write(tmp_path))
    assert found["times"]["odd"] == {"count": 15, "share": 15 / 40, "first": 1000 * moment(5, 0)}
    messages = {warning["kind"]: warning["message"] for warning in found["warnings"]}
    assert messages["odd_times"] == (
        f"15 (37.5 %) times are not between 1973 and 2100 in seconds, as most are, the first is "
        f"{1000 * moment(5, 0)}: another unit, or a number that stands for none"
    )


def test_what_the_model_does_not_read_is_said(tmp_path: Path) -> None:
    shop = Shop()
    attributes_behind_the_third(shop)
    (warning,) = audit(shop.write(tmp_path))["warnings"]
    assert warning["message"].startswith(
        "price of 1 (12.5 %), size of 2 (25.0 %) items are stored and not read: the model reads "
        "the first 3 attributes of an item"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Gift card", 2),
        ("無線イヤホン 防水", 4),  # 無線 イヤ ホン, 防水
        ("ソニー WH-1000XM5 無線", 4),
        ("傘", 1),
        ("蓝牙耳机", 2),
        ("หูฟังไร้สาย", 6),
        ("무선 이어폰", 2),  # Korean has spaces
        ("Écouteurs sans fil", 3),
        ("", 0),
    ],
)
def test_words_of_scripts_without_spaces(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.mark.parametrize(("number", "warned"), [(201, False), (199, True)])
def test_small_faults_are_not_warned_of(tmp_path: Path, number: int, warned: bool) -> None:
    """One item and no target: just below half a percent of the items, and just above."""
    shop = Shop()
    shop.items += [{"title": f"Not yet sold {n}"} for n in range(number - 9)]
    shop.items.append({"title": "Card"})
    found = audit(shop.write(tmp_path))
    assert found["texts"]["near_empty"]["items"] == {"count": 1, "share": 1 / number}
    assert ("near_empty_texts" in {warning["kind"] for warning in found["warnings"]}) == warned


def test_the_future_in_leave_one_out(tmp_path: Path) -> None:
    shop = Shop()
    # User 0 ends before the others begin.
    shop.times[0] = [start - 45_000 for start in shop.times[0]]
    found = audit(shop.write(tmp_path))
    # Its target is earlier than 21 of the 24 training interactions, no other target is than any.
    assert found["times"]["mean_share_of_train_after_a_target"] == pytest.approx(21 / 24 / 8)
    assert found["warnings"] == []
    assert "10.9 % of the training interactions are later" in found["notes"][0]


def test_synthetic_times_are_a_note_of_leave_one_out(tmp_path: Path) -> None:
    shop = Shop(times=[[START + 86_400 * place for place in range(5)] for _ in range(8)])
    shop.split["cold_items"] = 0.1
    found = audit(shop.write(tmp_path))
    assert found["warnings"] == []
    assert found["times"]["resolution"] == 86_400
    assert found["notes"] == [
        "times look synthetic (100.0 % of users start at 1300000000, 100.0 % of the gaps between "
        "interactions are 86400): nothing can be said about time",
        "items were held out: 0 (0.0 %) val and 0 (0.0 %) test targets were never trained on",
    ]


def test_two_users_do_not_make_times_synthetic(tmp_path: Path) -> None:
    shop = Shop()
    shop.parts, shop.times = shop.parts[:2], shop.times[:2]
    assert not audit(shop.write(tmp_path))["times"]["synthetic"]


def test_days_in_microseconds(tmp_path: Path) -> None:
    # As the date and time columns of Parquet are read.
    shop = Shop()
    days = [[moment(user, place) // 10 for place in range(5)] for user in range(8)]
    shop.times = [[(START // 86_400 + day - days[0][0]) * 86_400_000_000 for day in user]
                  for user in days]  # fmt: skip
    found = audit(shop.write(tmp_path))
    assert found["times"]["unit"] == "us"
    assert "times are known to the day" in found["notes"]


def test_held_out_items_are_no_fault(tmp_path: Path) -> None:
    shop = Shop(split={**LEAVE_ONE_OUT, "cold_items": 0.1})
    cold_target(shop)
    found = audit(shop.write(tmp_path))
    assert found["warnings"] == []
    assert found["targets"]["test"]["new_items"] == 1
    assert found["notes"][-1] == (
        "items were held out: 0 (0.0 %) val and 1 (12.5 %) test targets were never trained on"
    )


def test_notes_of_a_folder_with_little(tmp_path: Path) -> None:
    shop = Shop(times=None)
    for item in shop.items:
        del item["brand"]
    found = audit(shop.write(tmp_path))
    assert found["notes"] == [
        "the source has no times: ties, order and what lies after a cut in time were not audited",
        "no item has a value of 'brand'",
    ]
    for name in ("dataset.json", "interactions.parquet", "umap.json"):
        (tmp_path / name).unlink()
    published = audit(ProcessedFolder.load(tmp_path))
    assert published["warnings"] == []
    assert published["times"] is None
    assert "decided_by_ties" not in published["targets"]["test"]
    assert published["notes"] == [
        "no dataset.json: whether the files belong together was not audited",
        "how the folder was split is not recorded, its shape is that of leave-one-out",
        "no interactions.parquet: ties, order and what lies after a cut in time were not audited",
    ]
    (tmp_path / "test.json").write_text(json.dumps({"0": [3, 4], "1": [5]}))
    assert audit(ProcessedFolder.load(tmp_path))["split"]["name"] == "temporal"
    (tmp_path / "test.json").write_text("{}")
    nobody = audit_folder(tmp_path)
    assert nobody["targets"]["test"]["evaluated"] == 0
    assert nobody["lengths"]["test_history"] is None


def test_history_of_the_held_out_part_alone(tmp_path: Path) -> None:
    shop = Shop(split=dict(TEMPORAL))
    shop.parts.append([[], [], [2, 3]])
    shop.times.append([moment(9, 4), moment(9, 5)])
    found = audit(shop.write(tmp_path))
    assert found["targets"]["test"]["nothing_before_the_part"] == {"count": 1, "share": 1 / 9}
    assert found["warnings"] == []
    assert found["notes"] == [
        "0 (0.0 %) val and 1 (11.1 %) test users have no history but earlier items of that part"
    ]


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop = Shop()
    # Alike in their first tokens, as the model reads them.
    shop.items[3] = {"title": "Card of colour, and then green"}
    shop.items[5] = {"title": "Card of colour, and then blue"}
    shop.write(tmp_path / "data")
    # Bytes and nothing more: a token is a character.
    train_tokenizer(["title"], 261, tmp_path / "bytes")
    command = [str(tmp_path / "data"), "--tokenizer_name", str(tmp_path / "bytes")]
    main([*command, "--max_attr_length", "20", "--max_attr_num", "1", "--max_token_num", "81"])
    found = json.loads((tmp_path / "data" / "audit.json").read_text())
    tokens = found["tokens"]
    assert tokens["limits"] == {
        "max_token_num": 81,
        "max_item_embeddings": PAPER["max_item_embeddings"],
        "max_attr_num": 1,
        "max_attr_length": 20,
    }
    # "title" and "Card of colour X" are 21 bytes, of which 20 stay.
    assert tokens["item"]["percentiles"]["0"] == tokens["item"]["percentiles"]["100"] == 20
    assert tokens["identical"]["items"]["count"] == 8
    # Histories of four items: <s> and 80 tokens.
    assert tokens["test_history"]["mean"] == 81
    assert tokens["cut_by_max_token_num"]["count"] == 0
    assert {w["kind"] for w in found["warnings"]} == {"attributes_not_read", "identical_tokens"}
    assert found["texts"]["not_read"]["attributes"] == {"brand": {"count": 6, "share": 0.75}}

    main([*command, "--max_attr_length", "25", "--max_token_num", "81"])
    tokens = json.loads((tmp_path / "data" / "audit.json").read_text())["tokens"]
    assert tokens["identical"]["items"] == {"count": 2, "share": 0.25}
    assert tokens["cut_by_max_token_num"] == {"count": 8, "share": 1.0}
    out = capsys.readouterr().out
    assert "warning: 8 (100.0 %) test histories are cut to 81 tokens" in out

    (tmp_path / "bytes" / "config.json").write_text(json.dumps({"max_item_embeddings": 4}))
    main(command)
    tokens = json.loads((tmp_path / "data" / "audit.json").read_text())["tokens"]
    assert tokens["limits"] == {**{k: PAPER[k] for k in tokens["limits"]}, "max_item_embeddings": 4}
    assert tokens["cut_by_max_item_embeddings"] == {"count": 8, "share": 1.0}


class Elements(HTMLParser):
    """Start and end tags, and what is linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_escapes_and_needs_no_other_file(tmp_path: Path) -> None:
    shop = Shop()
    seen_target(shop)
    shop.items[0]["<script>x</script>"] = "$name"
    folder = tmp_path / "a<b>&c"
    shop.write(folder)
    audit_folder(folder)
    text = (folder / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "<h1>Audit of a&lt;b&gt;&amp;c</h1>" in text
    assert "<li>0 (0.0 %) val and 1 (12.5 %) test targets stand in the user&#x27;s history" in text
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert len(elements.sources) == 6
    for source in elements.sources:
        header, _, code = source.partition(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(code).startswith(b"\x89PNG")


def test_a_clean_page_says_so(tmp_path: Path) -> None:
    Shop(times=None).write(tmp_path)
    audit_folder(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "Nothing was found that can spoil an evaluation." in text
    assert len(re.findall("<img", text)) == 5  # none of times
    assert not (tmp_path / "audit.html").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: folder / "none", "none is not a folder"),
        (lambda folder: folder / "train.json", "train.json is not a folder"),
        (lambda folder: (folder / "val.json").unlink(), "lacks val.json"),
        (lambda folder: (folder / "smap.json").write_text("{") and None, "is not valid JSON"),
        (
            lambda folder: (folder / "interactions.parquet").write_text("x") and None,
            "interactions.parquet is damaged or of another preparation",
        ),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    break_it: Callable[[Path], Path | None],
    message: str,
) -> None:
    Shop().write(tmp_path)
    folder = break_it(tmp_path) or tmp_path
    with pytest.raises(SystemExit) as stopped:
        exit_with_message(lambda: main([str(folder)]))
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (1, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "audit.json").exists()


def test_limits_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--max_token_num", "96"])
    assert stopped.value.code == 2
    assert "--max_token_num: mean nothing without --tokenizer_name" in capsys.readouterr().err


# --- at the end of processing ---------------------------------------------------------------------


@pytest.fixture
def process(
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[[], tuple[str, str]]:
    """Process a small log in which user 0 meets item 0 first and last."""
    with open(tmp_path / "log.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["user_id", "item_id", "timestamp"])
        for user in range(8):
            for place in range(5):
                item = 0 if (user, place) == (0, 4) else (user + place) % 8
                rows.writerow([user, item, moment(user, place)])
    with open(tmp_path / "items.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["item_id", "title"])
        rows.writerows([number, f"Card of colour {number}"] for number in range(8))

    def run() -> tuple[str, str]:
        files = ["--file_path", tmp_path / "log.csv", "--meta_file_path", tmp_path / "items.csv"]
        argv = ["process.py", *map(str, files), "--output_path", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(repository / "finetune_data" / "process.py"), run_name="__main__")
        return capfd.readouterr()

    return run


def test_processing_ends_with_an_audit(
    tmp_path: Path, process: Callable[[], tuple[str, str]]
) -> None:
    out, err = process()
    assert err == ""
    lines = out.splitlines()
    assert lines[1:] == [
        "warning: 1 (2.5 %) interactions are with an item that the user met before",
        "warning: 0 (0.0 %) val and 1 (12.5 %) test targets stand in the user's history already",
        f"audited: 2 warnings, see {tmp_path / 'out' / 'audit.html'}",
    ]
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["split_hash"] == ProcessedFolder.load(tmp_path / "out").split_hash


def test_a_failed_audit_leaves_the_folder(
    tmp_path: Path, process: Callable[[], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(found: dict[str, Any]) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("recformer.preparation.audit.figures.page", full)
    out, err = process()
    assert "8 users, 8 items, 40 interactions" in out
    assert err == f"{tmp_path / 'out'} was not audited: no space left\n"
    assert ProcessedFolder.load(tmp_path / "out").num_users == 8


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_known_traps_of_real_data(tmp_path: Path, real_data: Path) -> None:
    """What the notes on the data say of them by hand."""

    def processed(name: str, log: str, items: str, **options: Any) -> dict[str, Any]:
        folder = tmp_path / name
        prepare_finetuning(real_data / name / log, real_data / name / items, folder, **options)
        return audit(ProcessedFolder.load(folder))

    cards = processed("gift_cards", "Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz")
    assert cards["times"]["duplicates"]["count"] == 3
    assert cards["times"]["resolution"] == 86_400
    assert "targets_decided_by_ties" in {warning["kind"] for warning in cards["warnings"]}
    assert not cards["times"]["synthetic"]

    name = "Industrial_and_Scientific"
    scientific = processed("scientific", f"{name}_5.json.gz", f"meta_{name}.json.gz")
    assert scientific["repeats"]["again"]["count"] == 291
    assert scientific["times"]["synthetic"]

    films = processed(
        "ml100k",
        "ml-100k.inter.gz",
        "ml-100k.item",
        columns=Columns(),
        options=SplitOptions(split="temporal"),
    )
    test = films["targets"]["test"]
    assert test["users"] == 166
    assert test["evaluated"] - test["nothing_before_the_part"]["count"] == 90
    assert test["new_items"] == 45
    assert not films["times"]["synthetic"]


def test_large_folder_is_audited_by_a_sample_of_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users and interactions are the sample's; what was trained on is everybody's."""
    users = 40
    train = Sequences.from_lists([[user, (user + 1) % users] for user in range(users)])
    held = Sequences.from_lists([[(user + 20) % users] for user in range(users)])
    times = np.arange(4 * users) * 60 + 1_600_000_000
    write_processed(
        tmp_path,
        train=train,
        val=held,
        test=held,
        user_names=[f"u{user}" for user in range(users)],
        asins=[f"i{item}" for item in range(users)],
        meta={f"i{item}": {"title": f"Item {item}"} for item in range(users)},
        dataset={},
        times=times,
    )
    data = ProcessedFolder.load(tmp_path)
    whole = audit(data)
    assert "sample" not in whole
    monkeypatch.setattr("recformer.preparation.audit.figures.MOST_AUDITED", 80)
    found = audit(data)
    chosen = np.random.default_rng(0).random(users) < 0.5
    number = int(chosen.sum())
    assert 10 < number < 30
    assert found["sample"] == {"users": number, "of": users, "interactions_of": 160}
    assert found["notes"][0].startswith(
        f"figures of users and interactions are of a seeded sample of {number} of 40"
    )
    assert found["sizes"] == {
        "users": number,
        "items": users,
        "interactions": 4 * number,
        "train": 2 * number,
        "val": number,
        "test": number,
    }
    assert found["targets"]["test"]["cold"] == {"count": 0, "share": 0.0}
    assert found["targets"]["test"]["evaluated"] == number
    assert found["popularity"]["gini"] == whole["popularity"]["gini"]
    own = times[np.repeat(chosen, 4)]
    assert (found["times"]["first"], found["times"]["last"]) == (own.min(), own.max())
