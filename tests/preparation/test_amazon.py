"""Raw files: typed reading, bad lines, text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data_preparation
from recformer.files import UserError
from recformer.preparation.amazon import (
    check_raw_files,
    read_interactions,
    read_metadata,
    read_products,
    read_reviews,
)
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.text import OddValueError, clean_text, text_parts


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    """Gzip `lines`: bytes as they are, anything else as JSON."""
    with gzip.open(path, "wb") as handle:
        for line in lines:
            handle.write(line if isinstance(line, bytes) else json.dumps(line).encode())
            handle.write(b"\n")
    return path


def review(user: Any = "U", asin: Any = "B", time: Any = 1, **more: Any) -> dict[str, Any]:
    return {"overall": 5.0, "reviewerID": user, "asin": asin, "unixReviewTime": time, **more}


def metadata(path: Path, *rows: Any, **options: Any) -> tuple[dict[str, dict[str, str]], dict]:
    return read_metadata([write_lines(path / "meta.json.gz", rows)], **options)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "3 < 5 mm",
        "5 > 3",
        "AT&T",
        "R&D",
        "<3",
        "I <3 You",
        "x<y and z>w",
        "a <b and c> d",
        "Size <M>",
        "pen&notebook; ink",
        "H&M; black",
        "Set {2 pieces}",
        "#8 Screw {zinc}",
        "100 {pcs: red}",
        "50% off; red; blue",
        "if (you) can",
        "The Function (Remix)",
        "multifunction var lamp",
        "window. cleaner",
        "A=B",
        "@home",
        "naïve café 日本語",
        "👨‍👩‍👧 family",
        "",
    ],
)
def test_honest_text_comes_back_as_it_was(text: str) -> None:
    assert clean_text(text) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        # entities, also escaped twice and three times
        ("Kid&#39;s Salt &amp; Pepper", "Kid's Salt & Pepper"),
        ("12&quot; x 7&#x22;", '12" x 7"'),
        ("a &amp;amp; b &amp;amp;quot;c&amp;amp;quot;", 'a & b "c"'),
        ("Tom&nbsp;&AMP;&ensp;Jerry", "Tom & Jerry"),
        ("&copy; X&trade; &#128512;", "© X™ 😀"),
        ("3 &lt; 5 mm", "3 < 5 mm"),
        ("&unknown; thing", "&unknown; thing"),
        # tags, also escaped ones
        ("<b>Bold</b><br/>text", "Bold text"),
        ("&lt;i&gt;Lamp&lt;/i&gt;", "Lamp"),
        ("H<sub>2</sub>O", "H2O"),
        ("<p>One</p><P>Two</P>", "One Two"),
        ('<span class="a-size-base">by</span> Sony', "by Sony"),
        ("</span></span></span>", ""),
        ("Lamp <!-- Begin A+ --> shade", "Lamp shade"),
        ('<IMG SRC="x.jpg" alt="a">Pic', "Pic"),
        ('Lamp <span class="a-te', "Lamp"),
        ("<script type='text/javascript'>var x = '<b>';</script>Lamp", "Lamp"),
        ("<style>.a { b: c }</style>Lamp", "Lamp"),
        # style rules
        (".a-box-inner{background-color:#fff}#x .y{color:red;border:0} $12.99", "$12.99"),
        ("@media (max-width: 5px) { .a { b: c } p{d:e} } Lamp", "Lamp"),
        ("Lamp .a-x { color: red } red", "Lamp red"),
        # script
        ("var aPageStart = (new Date()).getTime();", ""),
        (
            "var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();\n"
            "Garden Hose, 50 ft (Green)",
            "Garden Hose, 50 ft (Green)",
        ),
        ("Nice Lamp var aPageStart = (new Date()).getTime();", "Nice Lamp"),
        (
            "Lamp (function(d){var e=d.ue=d.ue||{},f=Date.now||function(){return+new Date};"
            "e.d=function(b){return f()-(b?0:d.t0)};})(ue_x); with shade",
            "Lamp with shade",
        ),
        (
            "window.ue_ihb = (window.ue_ihb || 0) + 1;\nif (window.ue_ihb === 1) {\n"
            "var ue_hob = +new Date();\n}\nDesk",
            "Desk",
        ),
        ('P.when("A").execute(function(A){ A.on("x", function(){ go(); }); }); Chair', "Chair"),
        # the whole page in place of the title
        (
            "var aPageStart = (new Date()).getTime();\n\nvar ue_t0=ue_t0||+new Date();\n\n"
            "window.ue_ihb = (window.ue_ihb || window.ueinit || 0) + 1;\n"
            "if (window.ue_ihb === 1) {\nvar ue_csm = window,\n    ue_hob = +new Date();\n"
            "(function(d){var e=d.ue=d.ue||{}})(ue_csm);\n var ue_err_chan = 'jserr-rw';\n"
            "a copy of P has been loaded",
            "",
        ),
        # control and invisible characters, white space
        ("  a \t\r\n b\u00a0c\u2003d  ", "a b c d"),
        ("\ufeffzero\u200bwidth soft\u00adhyphen", "zerowidth softhyphen"),
        ("bell\x07 nul\x00l \x7f\x85end", "bell nul l end"),
        ("lone \ud83d surrogate", "lone surrogate"),
        (" \t\n", ""),
    ],
)
def test_markup_and_script_are_taken_out(text: str, clean: str) -> None:
    assert clean_text(text) == clean
    assert clean_text(clean) == clean


def test_text_of_other_values() -> None:
    assert text_parts("a") == ["a"]
    assert text_parts(None) == []
    assert text_parts(float("nan")) == []
    assert text_parts(7) == ["7"]
    assert text_parts(2.5) == ["2.5"]
    assert text_parts([["a", ["b"]], None, "", 3]) == ["a", "b", "", "3"]
    for odd in ({"a": 1}, True, ["a", {}]):
        with pytest.raises(OddValueError):
            text_parts(odd)


# --- metadata -------------------------------------------------------------------------------------


def test_products_are_cleaned_in_the_order_of_the_attributes(tmp_path: Path) -> None:
    products, counts = metadata(
        tmp_path,
        {"category": ["A &amp; B", "</span>", "C"], "also_buy": ["x"], "title": " T ", "asin": "1"},
        {"asin": "2", "title": "t", "brand": "", "category": [["p", "q"], ["r"]]},
        {"asin": "3", "title": None, "brand": "b", "category": []},
        {"asin": "4", "brand": "&nbsp;", "title": "<b></b>", "category": [None, ""]},
        {"asin": "5", "title": 42, "brand": {"name": "x"}, "category": "plain"},
    )
    assert products == {
        "1": {"title": "T", "category": "A & B C"},
        "2": {"title": "t", "category": "p q r"},
        "3": {"brand": "b"},
        "5": {"title": "42", "category": "plain"},
    }
    assert list(products["1"]) == ["title", "category"]
    assert counts == {
        "rows": 5,
        "products": 4,
        "duplicate_rows": 0,
        "products_without_text": 1,
        "values_that_are_no_text": 1,
    }


def test_no_clean_keeps_text_as_published(tmp_path: Path) -> None:
    products, counts = metadata(
        tmp_path,
        {"asin": "1", "title": " A &amp; <b>B</b>", "brand": "", "category": ["C", "", "D "]},
        {"asin": "2", "title": "t", "brand": None, "category": []},
        {"asin": "3", "title": None},
        clean=False,
    )
    assert products == {
        "1": {"title": " A &amp; <b>B</b>", "brand": "", "category": "C  D "},
        "2": {"title": "t", "category": ""},
    }
    assert counts["products_without_text"] == 1


def test_any_attributes(tmp_path: Path) -> None:
    row = {"asin": "1", "price": 9.5, "sales rank": "7", "title": "t", "class": "x"}
    products, _ = metadata(tmp_path, row, attributes=["class", "sales rank", "asin", "price", "no"])
    assert products == {"1": {"class": "x", "sales rank": "7", "asin": "1", "price": "9.5"}}
    assert list(products["1"]) == ["class", "sales rank", "asin", "price"]


def test_a_duplicate_row_replaces_the_earlier_one_in_its_place(tmp_path: Path) -> None:
    products, counts = metadata(
        tmp_path,
        {"asin": "1", "title": "old", "brand": "only here"},
        {"asin": "2", "title": "two"},
        {"asin": "3", "title": ""},
        {"asin": "1", "title": "new"},
        {"asin": "2", "title": None},  # nothing is left of this one
        {"asin": "3", "title": "three at last"},
    )
    assert products == {
        "1": {"title": "new"},
        "2": {"title": "two"},
        "3": {"title": "three at last"},
    }
    assert list(products) == ["1", "2", "3"]
    assert (counts["duplicate_rows"], counts["products_without_text"]) == (3, 0)


def test_only_reviewed_products_with_a_title(tmp_path: Path) -> None:
    products, counts = metadata(
        tmp_path,
        {"asin": "1", "title": "a"},
        {"asin": "2", "title": "b"},
        {"asin": "3", "title": None, "brand": "c"},
        {"asin": "4", "title": "", "brand": "d"},
        {"asin": "5", "title": None, "brand": None},
        only={"1", "3", "4", "5"},
        required="title",
    )
    assert products == {"1": {"title": "a"}, "4": {"brand": "d"}}
    assert counts["rows_of_products_without_reviews"] == 1
    assert counts["products_without_title"] == 1
    assert counts["products_without_text"] == 1


def test_repeated_and_unique_texts_come_out_alike(tmp_path: Path) -> None:
    """Texts are remembered while they repeat; here titles are given up and brands are not."""
    rows = [
        {"asin": f"B{n}", "title": f"&quot;{n}&quot;", "brand": f" brand  {n % 7} "}
        for n in range(12_000)
    ]
    products, counts = metadata(tmp_path, *rows)
    assert counts["products"] == 12_000
    for n in (0, 1, 4_999, 5_000, 5_001, 11_999):
        assert products[f"B{n}"] == {"title": f'"{n}"', "brand": f"brand {n % 7}"}
    assert products["B3"]["brand"] is products["B11994"]["brand"]  # one copy


def test_ignored_fields_change_nothing(tmp_path: Path) -> None:
    rows = [{"asin": f"B{n}", "title": f"title {n}", "category": ["x", f"y{n}"]} for n in range(9)]
    fat = {"also_buy": [f"B{n}" for n in range(99)], "details": {"a": {"b": [1, 2.5, None]}}}
    assert metadata(tmp_path, *rows) == metadata(tmp_path, *({**fat, **row} for row in rows))


# --- lines ----------------------------------------------------------------------------------------


def test_reviews_in_file_order(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "r.json.gz",
        [review("u", "a", 3, reviewText="é"), b"", review("v", "b", -1), b"  ", review("u", "c")],
    )
    bad = BadLines()
    found = [(r.reviewerID, r.asin, r.unixReviewTime) for r in read_reviews(path, bad)]
    assert found == [("u", "a", 3), ("v", "b", -1), ("u", "c", 1)]
    assert bad.summary() == {"total": 0, "reasons": {}, "first": []}


def test_lines_that_can_be_mended_are_used(tmp_path: Path) -> None:
    lines = [
        review(7, 1234567890, 5),
        review("u", "a", "1529193600"),
        review("u", "b", 1529193600.0),
        b'{"reviewerID": "u", "asin": "c", "unixReviewTime": 1, "overall": NaN}',
        b'{"reviewerID": "u", "asin": "d", "unixReviewTime": 1, "reviewText": "\\ud83d \x01"}',
        b'{"reviewerID": "u\\ud83d", "asin": "e", "unixReviewTime": 1}',
        b'\xef\xbb\xbf{"reviewerID": "bom", "asin": "f", "unixReviewTime": 1}',
    ]
    path = write_lines(tmp_path / "r.json.gz", lines)
    found = [(r.reviewerID, r.asin, r.unixReviewTime) for r in read_reviews(path, BadLines())]
    assert found == [
        ("7", "1234567890", 5),
        ("u", "a", 1529193600),
        ("u", "b", 1529193600),
        ("u", "c", 1),
        ("u", "d", 1),
        ("u?", "e", 1),
        ("bom", "f", 1),
    ]


def test_lone_surrogates_in_metadata_do_not_stop_the_writing(tmp_path: Path) -> None:
    row = b'{"asin": "1", "title": "a\\ud83d", "category": ["b\\ud83d"]}'
    raw, _ = metadata(tmp_path, row, clean=False)
    assert raw == {"1": {"title": "a?", "category": "b?"}}
    assert metadata(tmp_path, row)[0] == {"1": {"title": "a?", "category": "b?"}}


BAD_REVIEWS = [
    (b'{"reviewerID": "u", "asin": "a", "unixRev', "not valid JSON"),
    (b'{"reviewerID": "u"} {"asin": "b"}', "not valid JSON"),
    (b"plain text", "not valid JSON"),
    (b'{"reviewerID": "\xff", "asin": "a", "unixReviewTime": 1}', "not UTF-8"),
    (b"[1, 2]", "a JSON list, expected an object"),
    (b'{"reviewerID": "u", "unixReviewTime": 1}', "no asin"),
    (b'{"reviewerID": "u", "asin": "", "unixReviewTime": 1}', "no asin"),
    (b'{"reviewerID": "u", "asin": ["a"], "unixReviewTime": 1}', "asin is no text"),
    (b'{"reviewerID": null, "asin": "a", "unixReviewTime": 1}', "no reviewerID"),
    (b'{"reviewerID": "u", "asin": "a"}', "no unixReviewTime"),
    (b'{"reviewerID": "u", "asin": "a", "unixReviewTime": "June"}', "unixReviewTime is no number"),
    (b'{"reviewerID": "u", "asin": "a", "unixReviewTime": true}', "unixReviewTime is no number"),
    (b'{"reviewerID": "u", "asin": "a", "unixReviewTime": 1e99}', "unixReviewTime is no number"),
    (b'{"reviewerID": "u", "asin": "a", "unixReviewTime": NaN}', "unixReviewTime is no number"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_REVIEWS)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write_lines(tmp_path / "r.json.gz", [review(), b"", line, review()])
    with pytest.raises(UserError) as caught:
        list(read_reviews(path, BadLines()))
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert ". Mend the file" in str(caught.value)
    assert "--skip_bad_lines" in str(caught.value)


def test_bad_lines_are_left_out_and_counted_on_request(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_REVIEWS]
    path = write_lines(tmp_path / "r.json.gz", [review("first"), *lines, review("last")])
    bad = BadLines(skip=True)
    assert [row.reviewerID for row in read_reviews(path, bad)] == ["first", "last"]
    summary = bad.summary()
    assert summary["total"] == len(BAD_REVIEWS)
    assert summary["reasons"] == {
        "not valid JSON": 3,
        "not UTF-8": 1,
        "a JSON list, expected an object": 1,
        "no asin": 2,
        "asin is no text": 1,
        "no reviewerID": 1,
        "no unixReviewTime": 1,
        "unixReviewTime is no number and no ISO 8601 date": 4,
    }
    assert summary["first"][0] == "r.json.gz, line 2: not valid JSON"
    assert len(summary["first"]) == 5


def test_bad_lines_of_metadata(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.json.gz", [{"asin": "1", "title": "a"}, {"title": "b"}, b"{"])
    with pytest.raises(UserError, match=r"m\.json\.gz, line 2: no asin"):
        list(read_products(path, ["title"], BadLines()))
    bad = BadLines(skip=True)
    assert list(read_products(path, ["title"], bad)) == [("1", "a")]
    assert bad.reasons == {"no asin": 1, "not valid JSON": 1}


def test_a_file_without_a_usable_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.json.gz", [b"x", b"y"])
    with pytest.raises(UserError, match="2 lines, none of them usable"):
        list(read_reviews(path, BadLines(skip=True)))


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, skip: bool) -> None:
    path = write_lines(tmp_path / "r.json.gz", [review(str(n), str(n)) for n in range(3000)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"r\.json\.gz is cut off"):
        list(read_reviews(path, BadLines(skip=skip)))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.json.gz", [review(str(n)) for n in range(50)])
    data = bytearray(path.read_bytes())
    data[-6] ^= 255  # in the checksum
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"r\.json\.gz is cut off or damaged \(CRC"):
        list(read_reviews(path, BadLines()))


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    parts = [write_lines(tmp_path / f"{n}.gz", [review(str(n))]).read_bytes() for n in range(3)]
    (tmp_path / "r.json.gz").write_bytes(b"".join(parts))
    rows = read_reviews(tmp_path / "r.json.gz", BadLines())
    assert [row.reviewerID for row in rows] == ["0", "1", "2"]


# --- the look before the work ---------------------------------------------------------------------


def test_files_are_looked_at_before_any_work(tmp_path: Path) -> None:
    reviews = write_lines(tmp_path / "r.json.gz", [b"{", review()])
    meta = write_lines(tmp_path / "m.json.gz", [{"asin": "1", "title": "a"}])
    check_raw_files([reviews], [meta])  # a bad line is the reader's concern

    with pytest.raises(UserError, match=r"m\.json\.gz holds product metadata.*swapped"):
        check_raw_files([meta], [reviews])
    with pytest.raises(UserError, match=r"r\.json\.gz holds reviews.*swapped"):
        check_raw_files([], [reviews])
    with pytest.raises(FileNotFoundError, match=r"no such file: .*/a\.gz, .*/b\.gz"):
        check_raw_files([reviews, tmp_path / "a.gz"], [tmp_path / "b.gz", meta])
    with pytest.raises(FileNotFoundError):
        check_raw_files([tmp_path])

    for name, content in (("none.gz", b""), ("blank.gz", gzip.compress(b"\n \n"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} is empty"):
            check_raw_files([tmp_path / name])
    (tmp_path / "text.gz").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"text\.gz is a web page"):
        check_raw_files([], [tmp_path / "text.gz"])


# --- interactions ---------------------------------------------------------------------------------


def test_interactions_of_known_products(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "r.json.gz",
        [
            review("first", "unknown", 1),
            review("u", "b", 2**40),
            review("first", "a", 5),
            review("u", "a", 4),
        ],
    )
    found, counts = read_interactions(path, {"a": 0, "b": 0})
    # `first` comes second: its first review of a known product stands below u's.
    assert found.user_names == ["u", "first"]
    assert found.item_names == ["b", "a"]
    assert found.users.tolist() == [0, 1, 0]
    assert found.items.tolist() == [0, 1, 1]
    assert found.times.tolist() == [2**40, 5, 4]
    assert counts == {"reviews": 4, "reviews_of_unknown_products": 1}

    nothing, counts = read_interactions(path, set())
    assert len(nothing) == 0
    assert counts == {"reviews": 4, "reviews_of_unknown_products": 4}


def test_the_benchmark_compares_equal_work(tmp_path: Path) -> None:
    data_preparation.write_files(tmp_path, 60)
    fat, lean = tmp_path / "meta_fat.json.gz", tmp_path / "meta_lean.json.gz"
    expected = data_preparation.plain_metadata(lean)
    assert len(expected) == 60
    for run in (data_preparation.plain_metadata, data_preparation.our_metadata):
        assert run(fat) == run(lean) == expected
    reviews = tmp_path / "reviews.json.gz"
    plain = data_preparation.plain_reviews(reviews)
    assert len(plain) == 240
    assert data_preparation.events_of(data_preparation.our_reviews(reviews)) == plain
