"""Recommendations by name: the ranking of the evaluation, whatever a history holds."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.commands.recommend import main
from recformer.data.processed import Sequences, write_processed
from recformer.files import UserError
from recformer.recommendation import CatalogueRecommender, batch
from tests.tiny import tiny_recformer

WORDS = ("tent", "lamp", "stove", "rope", "boots", "map", "torch", "knife")
NAMES = [f"B{number}" for number in range(len(WORDS))]
TEXTS = {name: {"title": word} for name, word in zip(NAMES, WORDS, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_recformer(tmp_path_factory.mktemp("model"), ["title", *WORDS])
    model = RecformerForSeqRec.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    model.init_item_embedding(torch.randn(len(WORDS), 16, generator=generator))
    model.save_pretrained(path)
    (path / "smap.json").write_text(json.dumps({name: i for i, name in enumerate(NAMES)}))
    (path / "meta_data.json").write_text(json.dumps(TEXTS))
    return path


def expected_scores(folder: Path, history: list[str]) -> dict[str, float]:
    """Cosines by the model's own forward."""
    model = RecformerForSeqRec.from_pretrained(folder).eval()
    tokenizer = RecformerTokenizer.from_pretrained(folder)
    batch = tokenizer([[TEXTS[name] for name in history]], return_tensor=True)
    with torch.no_grad():
        scores = model(**batch)[0] * model.config.temp
    return dict(zip(NAMES, scores.tolist(), strict=True))


def test_recommendations_are_the_best_by_the_models_scores(folder):
    history = ["B3", "B1"]
    recommender = CatalogueRecommender.load(folder)
    answer = recommender.recommend([history], k=3)[0]
    scores = expected_scores(folder, history)
    best = sorted(scores, key=lambda name: -scores[name])
    assert answer.items == best[:3]
    assert answer.scores == pytest.approx([scores[name] for name in best[:3]], abs=1e-5)
    assert answer.num_unknown == 0
    unseen = [name for name in best if name not in history]
    answer = recommender.recommend([history], k=100, filter_seen=True)[0]
    assert answer.items == unseen  # six of eight: the catalogue ends
    assert recommender.recommend([history], k=10**12)[0].items == best  # and takes no memory


def test_a_history_does_not_depend_on_its_company(folder):
    recommender = CatalogueRecommender.load(folder)
    histories = [["B3", "B1"], ["nothing"], ["B0", "gone", "B7", "B2"], []]
    together = recommender.recommend(histories, k=4)
    assert [answer.num_unknown for answer in together] == [0, 1, 1, 0]
    assert [answer.fallback for answer in together] == [None, "newest", None, "newest"]
    assert [len(answer.items) for answer in together] == [4, 4, 4, 4]
    assert recommender.recommend([["B0", "B7", "B2"]], k=4)[0].items == together[2].items
    assert recommender.recommend([["nothing"], []], k=4) == [together[1], together[3]]


def test_the_command(folder, tmp_path, capsys):
    lines = [
        {"user": "ann", "items": ["B3", "B1"]},
        {"user": 7, "items": ["B0", "gone"]},
        {"user": "bob", "items": ["gone"]},
    ]
    path = tmp_path / "histories.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    flags = ["--model", str(folder), "--histories", str(path), "--k", "2", "--filter_seen"]
    main([*flags, "--output", str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().err
    assert "3 users; skipped 2 items that the catalogue lacks" in said
    assert "1 user had no other and got the newest items: bob" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["user"] for row in rows] == ["ann", 7, "bob"]
    scores = expected_scores(folder, ["B3", "B1"])
    best = sorted(set(NAMES) - {"B3", "B1"}, key=lambda name: -scores[name])
    assert rows[0]["items"] == best[:2]
    newest = {"items": ["B7", "B6"], "scores": [0, 0], "fallback": "newest"}
    assert rows[2] == {"user": "bob", **newest}
    main(flags)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


def answers(folder: Path, path: Path, output: Path, *more: str) -> list[dict]:
    flags = ["--model", str(folder), "--histories", str(path), "--output", str(output)]
    main([*flags, *more])
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def test_histories_of_every_encoding(folder, tmp_path):
    text = '{"user": "José", "items": ["B3", {"title": "knife"}]}\n'
    out = tmp_path / "out.jsonl"
    (tmp_path / "plain").write_text(text, encoding="utf-8")
    (right,) = answers(folder, tmp_path / "plain", out)
    assert right["user"] == "José"
    assert len(right["items"]) == 8
    (tmp_path / "mark").write_text(text, encoding="utf-8-sig")
    (tmp_path / "zipped").write_bytes(gzip.compress(text.encode()))
    for name in ("mark", "zipped"):
        assert answers(folder, tmp_path / name, out) == [right]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text, "utf-8"))
    writer.start()
    assert answers(folder, pipe, out) == [right]
    writer.join(timeout=20)
    (tmp_path / "half").write_text('{"user": "\\ud83d", "items": ["B3"]}\n')
    assert [row["user"] for row in answers(folder, tmp_path / "half", out)] == ["\ud83d"]
    for name, data, message in (
        ("latin", b"\n" + text.encode("latin-1"), r"latin:2 is not UTF-8 \(byte 0xe9\).*LATIN1"),
        ("wide", text.encode("utf-16"), "wide is UTF-16, expected UTF-8"),
        ("cut", gzip.compress(text.encode())[:-9], "cut is a gzip file that is cut off"),
        ("deep", b"[" * 200_000, "deep:1 is not JSON"),
        ("digits", b'{"user": ' + b"1" * 5000, "digits:1 is not JSON"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            answers(folder, tmp_path / name, out)


def test_new_products_and_those_in_stock(folder, tmp_path):
    (tmp_path / "h").write_text('{"user": 1, "items": ["B3", "N1"]}\n')
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({**TEXTS, "N1": {"title": "tent lamp"}}))
    flags = ("--meta_file", str(meta), "--k", "1000000000000")
    (row,) = answers(folder, tmp_path / "h", tmp_path / "o", *flags)
    assert sorted(row["items"]) == [*NAMES, "N1"]
    (tmp_path / "stock").write_text("B5\n\nN1\nsold elsewhere\n")
    (few,) = answers(folder, tmp_path / "h", tmp_path / "o", *flags, "--allow", f"{tmp_path}/stock")
    assert few["items"] == [name for name in row["items"] if name in ("B5", "N1")]


def test_nothing_stays_behind_of_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({**TEXTS, "N1": {"title": "tent lamp"}}))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    CatalogueRecommender.load(folder, meta)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": 1, "items": ["B1"]', r"histories.jsonl:2 is not JSON"),
        (
            '{"user": ' + "9" * 5000 + ', "items": ["B1"]}',
            r"histories.jsonl:2 is not JSON: Exceeds",
        ),
        (
            '{"user": 1, "items": ["B1"], "items": []}',
            r":2 is not JSON: the key 'items' stands twice",
        ),
        ('{"user": ' + "[" * 100_000, r"histories.jsonl:2 is not JSON: nested too deep"),
        ('{"items": ["B1"]}', r'histories.jsonl:2: expected {"user": …, "items": \[name, …\]}'),
        ('{"user": 1, "items": "B1"}', "histories.jsonl:2: expected"),
        ('{"user": 1, "items": [["B1"]]}', "histories.jsonl:2: expected"),
    ],
)
def test_a_wrong_line_is_named(folder, tmp_path, line, message):
    path = tmp_path / "histories.jsonl"
    path.write_text('{"user": 1, "items": ["B1"]}\n' + line + "\n")
    flags = ["--model", str(folder), "--histories", str(path)]
    with pytest.raises(UserError, match=message):
        main([*flags, "--output", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_folder_that_cannot_recommend_is_refused(folder, tmp_path):
    bare = tiny_recformer(tmp_path / "bare", ["title", *WORDS])
    (bare / "smap.json").write_text('{"B0": 0}')
    with pytest.raises(FileNotFoundError, match="meta_data.json does not exist: the texts"):
        CatalogueRecommender.load(bare)
    with pytest.raises(UserError, match=r"holds no item vectors and 1 items in smap.json"):
        CatalogueRecommender.load(bare, folder / "meta_data.json")
    (tmp_path / "other.json").write_text('{"X": {}}')
    with pytest.raises(UserError, match="has texts for none of the 8 items"):
        CatalogueRecommender.load(folder, tmp_path / "other.json")
    with pytest.raises(UserError, match="--k 0"):
        main(["--model", str(folder), "--histories", "none", "--k", "0"])
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        main(["--model", str(folder), "--histories", "none"])


# --- many users at once ---------------------------------------------------------------------------


def table(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_all_users_of_a_processed_folder(folder, tmp_path, capsys):
    write_processed(
        tmp_path / "data",
        train=Sequences.from_lists([[0, 1], [2]]),
        val=Sequences.from_lists([[2], []]),
        test=Sequences.from_lists([[1], [3]]),
        user_names=["ann", "bob"],
        asins=NAMES[:4],
        meta={name: TEXTS[name] for name in NAMES[:4]},
        dataset={},
    )
    out = tmp_path / "all.parquet"
    flags = ["--model", str(folder), "--all_users", str(tmp_path / "data"), "--k", "3"]
    main([*flags, "--output", str(out), "--filter_seen"])
    expected = CatalogueRecommender.load(folder).recommend(
        [["B0", "B1", "B2", "B1"], ["B2", "B3"]], 3, True
    )
    assert table(out) == [
        {"user": u, "items": a.items, "scores": a.scores, "num_unknown": 0, "fallback": None}
        for u, a in zip(("ann", "bob"), expected, strict=True)
    ]
    assert "2 users; skipped 0 items" in capsys.readouterr().err
    assert list(tmp_path.glob(".*")) == []  # no parts stay
    with pytest.raises(SystemExit):
        main([*flags, "--histories", "x"])


def test_histories_as_tables(folder, tmp_path):
    lines = ["user_id,item_id,time", "ann,B1,20", "bob,gone,1", "ann,B3,10", "bob,B0,2"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    histories = [["B3", "B1"], ["gone", "B0"]]
    pq.write_table(pa.table({"user": ["ann", "bob"], "items": histories}), tmp_path / "h.parquet")
    jsonl = [
        json.dumps({"user": u, "items": h}) for u, h in zip(("ann", "bob"), histories, strict=True)
    ]
    (tmp_path / "h.jsonl").write_text("\n".join(jsonl))
    rows = []
    for name in ("log.csv", "h.parquet", "h.jsonl"):
        out = tmp_path / "out.parquet"
        main(["--model", str(folder), "--histories", str(tmp_path / name), "--output", str(out)])
        rows.append(table(out))
    assert rows[0] == rows[1] == rows[2]
    assert [row["num_unknown"] for row in rows[0]] == [0, 1]
    scores = expected_scores(folder, ["B3", "B1"])
    assert rows[0][0]["items"] == sorted(scores, key=lambda name: -scores[name])


def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "USERS_AT_ONCE", 2)
    lines = [{"user": u, "items": [f"B{u}", "gone"] if u != 3 else []} for u in range(7)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", str(folder), "--histories", str(tmp_path / "h.jsonl"), "--output"]
    main([*flags, str(tmp_path / "whole.parquet")])
    capsys.readouterr()
    whole = (tmp_path / "whole.parquet").read_bytes()
    calls = []
    recommend = CatalogueRecommender.recommend

    def dying(self, histories, *args, **kwargs):
        calls.append(len(histories))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return recommend(self, histories, *args, **kwargs)

    monkeypatch.setattr(CatalogueRecommender, "recommend", dying)
    out = tmp_path / "out.parquet"
    with pytest.raises(KeyboardInterrupt):
        main([*flags, str(out)])
    assert not out.exists()
    (parts,) = tmp_path.glob(".out.parquet.parts-*")
    _, second = sorted(parts.iterdir())
    second.write_bytes(second.read_bytes()[:-9])  # cut off on the disk, too
    main([*flags, str(out)])
    assert out.read_bytes() == whole
    assert calls == [2, 2, 2, 2, 2, 1]  # the first part was there
    said = capsys.readouterr().err
    assert "7 users; skipped 6 items" in said
    assert "1 user had no other and got the newest items: 3" in said
    assert "the answers of 2 users were there from an earlier run" in said
    assert not parts.exists()
    # With other options nothing of an earlier run is used, and nothing of it stays.
    calls[:] = []
    with pytest.raises(KeyboardInterrupt):
        main([*flags, str(out)])
    calls[:] = [9] * 9
    main([*flags, str(out), "--k", "2"])
    assert [len(row["items"]) for row in table(out)] == [2] * 7
    assert list(tmp_path.glob(".*")) == []


def test_a_catalogue_of_ones_own(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "h").write_text('{"user": 1, "items": ["B3", "N1"]}\n')
    (tmp_path / "items.csv").write_text(
        "item_id,title\nN1,tent lamp\nB2,knife rope\nB1,lamp\n", encoding="utf-8"
    )
    flags = ("--catalogue", str(tmp_path / "items.csv"))
    home = Path(shutil.copytree(folder, tmp_path / "home"))
    (row,) = answers(home, tmp_path / "h", tmp_path / "o", *flags)
    assert "1 items added, 2 were there; 2 texts encoded" in capsys.readouterr().err
    recommender = CatalogueRecommender.load(folder)
    recommender.add_items({"N1": {"title": "tent lamp"}})
    recommender.update_items({"B2": {"title": "knife rope"}})
    (expected,) = recommender.recommend([["B3", "N1"]], 10)
    assert row["items"] == expected.items
    assert row["scores"] == pytest.approx(expected.scores, abs=1e-6)
    encoded = []
    encode = RecformerForSeqRec.encode
    monkeypatch.setattr(
        RecformerForSeqRec, "encode", lambda self, packed: encoded.append(1) or encode(self, packed)
    )
    assert answers(home, tmp_path / "h", tmp_path / "o", *flags) == [row]
    assert encoded == [1]  # the history; the texts are kept beside the model
    (tmp_path / "items.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="none of the columns"):
        answers(home, tmp_path / "h", tmp_path / "o", *flags)


def test_no_bit_of_a_part_is_believed(folder, tmp_path):
    (tmp_path / "h.jsonl").write_text('{"user": 1, "items": ["B1"]}\n{"user": 2, "items": ["B2"]}')
    flags = ["--model", str(folder), "--histories", str(tmp_path / "h.jsonl"), "--output"]
    out = tmp_path / "out[1].parquet"  # a name, no pattern
    kept = []
    remove = shutil.rmtree
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.shutil, "rmtree", lambda path, **_: kept.append(path))
        main([*flags, str(out)])
    whole, (parts,) = out.read_bytes(), kept
    (part,) = parts.iterdir()
    sound = part.read_bytes()
    assert batch._read(part).num_rows == 2
    for place in range(0, len(sound), 7):
        raw = bytearray(sound)
        raw[place] ^= 1 << place % 8
        part.write_bytes(raw)
        assert batch._read(part) is None, place
    (tmp_path / ".out1.parquet.parts-of_another").mkdir()
    main([*flags, str(out)])
    assert out.read_bytes() == whole
    assert [path.name for path in tmp_path.glob(".*")] == [".out1.parquet.parts-of_another"]
    main([*flags, str(out)])
    remove(tmp_path / ".out1.parquet.parts-of_another")


def test_histories_in_a_folder_of_parquet_files(folder, tmp_path):
    for day, rows in ((1, [("ann", "B3", 10), ("bob", "B0", 11)]), (2, [("ann", "B1", 20)])):
        place = tmp_path / "log" / f"day={day}"
        place.mkdir(parents=True)
        columns = dict(zip(("user", "item", "time"), map(list, zip(*rows, strict=True))))
        pq.write_table(pa.table(columns), place / "part.parquet")
    (tmp_path / "h.jsonl").write_text(
        '{"user": "ann", "items": ["B3", "B1"]}\n{"user": "bob", "items": ["B0"]}'
    )
    expected = answers(folder, tmp_path / "h.jsonl", tmp_path / "o")
    assert answers(folder, tmp_path / "log", tmp_path / "o") == expected


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_bad_lines_are_left_out_and_counted_where_one_asks_for_it(folder, tmp_path, capsys, form):
    path = tmp_path / f"h.{form}"
    text = "user,item\nann,B3\nann\nbob,B0\n"
    if form == "jsonl":
        text = '{"user": "ann", "items": ["B3"]}\n{"user": 1}\n{"user": "bob", "items": ["B0"]}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r":2: expected|line 3"):
        answers(folder, path, tmp_path / "o")
    rows = answers(folder, path, tmp_path / "o", "--skip_bad_lines")
    assert [row["user"] for row in rows] == ["ann", "bob"]
    assert "left out 1 bad lines" in capsys.readouterr().err
