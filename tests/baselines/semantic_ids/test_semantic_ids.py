"""Unique codes of items: the file, telling apart equal content, new items, the command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib import pyplot

from baselines.semantic_ids import __main__ as command
from baselines.semantic_ids import words as code_words
from baselines.semantic_ids.__main__ import main
from baselines.semantic_ids.ids import SemanticIds
from baselines.semantic_ids.quantisers import (
    Quantiser,
    code_statistics,
    load_quantiser,
    reconstruction_error,
    save_quantiser,
)
from baselines.semantic_ids.rkmeans import ResidualKMeans, quantise
from baselines.semantic_ids.rqvae import RQVAE
from baselines.semantic_ids.unique import (
    add_level,
    content_codes,
    extended_ids,
    nearest_first,
    reassign,
    unique_ids,
)
from baselines.semantic_ids.words import typical_words
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.files import UserError, read_json, sha256_of


def toy_ids() -> SemanticIds:
    codes = np.array([[1, 0, 0], [0, 3, 0], [1, 0, 1]])
    return SemanticIds(["B", "C", "A"], codes, 2, [2, 4, 2], "rkmeans", "key")


def test_the_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    in_order = np.array([[1, 0, 1], [1, 0, 0], [0, 3, 0]], dtype="<i8")
    assert read_json(path) == {
        "levels": 2,
        "codebook_size": [2, 4, 2],
        "codes": {"B": [1, 0, 0], "C": [0, 3, 0], "A": [1, 0, 1]},
        "method": "rkmeans",
        "vectors": "key",
        "hash": sha256_of('["A", "B", "C"]', in_order.tobytes()),
    }


def test_codes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    ids = SemanticIds.load(path, ["A", "C"])
    assert ids.codes.dtype == np.int64
    assert ids.codes.tolist() == [[1, 0, 1], [0, 3, 0]]
    assert (ids.levels, ids.codebook_size, ids.method) == (2, [2, 4, 2], "rkmeans")
    assert SemanticIds.load(path).hash == toy_ids().hash
    with pytest.raises(UserError, match="no code for 2 of 3 items, 'X' the first"):
        SemanticIds.load(path, ["X", "A", "Y"])


def test_two_items_never_share_an_id() -> None:
    with pytest.raises(ValueError, match=r"'A' and 'C' have the same id \[1, 0\]"):
        SemanticIds(["A", "B", "C"], np.array([[1, 0], [0, 0], [1, 0]]), 2, [2, 1], "m", "v")


def set_code(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [0, 2, 0]


def rename(value: dict[str, Any]) -> None:
    value["codes"]["D"] = value["codes"].pop("C")


def double(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0, 0]


def huge(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [0, 10**30, 0]


def ragged(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0]


def outside(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [2, 0, 0]


def no_number(value: dict[str, Any]) -> None:
    value["codes"]["C"] = [1, 0, True]


def another_level(value: dict[str, Any]) -> None:
    value["levels"] = 1


def no_hash(value: dict[str, Any]) -> None:
    del value["hash"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_code, "other codes than its hash"),
        (rename, "other codes than its hash"),
        (double, "'B' and 'C' have the same id"),
        (ragged, "inhomogeneous"),
        (huge, "too large"),
        (outside, "outside their codebooks"),
        (no_number, r"'C' has \[1, 0, true\]"),
        (another_level, "3 codebook sizes for 1 levels"),
        (no_hash, "null as its 'hash'"),
    ],
)
def test_a_changed_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "semantic_ids.json"
    toy_ids().save(path)
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        SemanticIds.load(path)


CODEBOOKS = np.array([[[0], [10], [20]], [[0], [1], [2]]], dtype=np.float32)  # L 2, K 3, D 1


def test_numbers_tell_items_apart_in_the_order_of_asins() -> None:
    codes = np.array([[1, 2], [0, 0], [1, 2], [1, 2]])
    ids = add_level(codes, ["C", "X", "A", "B"])
    assert ids.tolist() == [[1, 2, 2], [0, 0, 0], [1, 2, 0], [1, 2, 1]]


def test_numbers_of_other_items_stay_theirs() -> None:
    taken = np.array([[1, 2, 0], [1, 2, 4], [0, 1, 0]])
    ids = add_level(np.array([[1, 2], [0, 0], [1, 2]]), ["B", "C", "A"], taken)
    assert ids.tolist() == [[1, 2, 6], [0, 0, 0], [1, 2, 5]]


def test_codes_from_nearest_to_farthest() -> None:
    order = list(nearest_first(np.array([11.2], dtype=np.float32), CODEBOOKS))
    # Level 1: 10, then 20, then 0. After 10 is left 1.2, after 20 -8.8, after 0 11.2.
    assert order == [
        *[(1, 1), (1, 2), (1, 0)],
        *[(2, 0), (2, 1), (2, 2)],
        *[(0, 2), (0, 1), (0, 0)],
    ]


def test_reassignment_by_hand() -> None:
    latents = np.array([[11], [12.1], [11], [11], [11]], dtype=np.float32)
    codes = quantise(latents, CODEBOOKS)
    assert codes.tolist() == [[1, 1], [1, 2], [1, 1], [1, 1], [1, 1]]
    ids = reassign(codes, latents, CODEBOOKS, ["E", "D", "C", "B", "A"])
    # A keeps its codes and D its own, though B comes before it; B takes (1, 0), as near as (1, 2).
    # The rest of 1 is full: 20 and 0 are nearer to 11 in this order, -9 and 11 are left over.
    assert ids.tolist() == [[2, 1], [1, 2], [2, 0], [1, 0], [1, 1]]
    taken = np.array([[1, 1], [1, 0]])
    new = reassign(codes[:1], latents[:1], CODEBOOKS, ["F"], taken)
    assert new.tolist() == [[1, 2]]


def test_more_items_than_codes_cannot_be_reassigned() -> None:
    latents = np.zeros((5, 1), dtype=np.float32)
    codes = np.zeros((5, 2), dtype=np.int64)
    reassign(codes[:4], latents[:4], CODEBOOKS, list("ABCD"), codes[:1] + 2)
    with pytest.raises(UserError, match="10 items and 3 codes at 2 levels"):
        reassign(codes, latents, CODEBOOKS, list("ABCDE"), np.arange(10).reshape(5, 2))


def toy_vectors(equal: int = 1000, others: int = 60) -> tuple[np.ndarray, list[str]]:
    """Vectors of length 1, many of them the same, and asins in another order than the rows."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(others + 1, 8)).astype(np.float32)
    vectors = np.concatenate([vectors[:-1], vectors[-1:].repeat(equal, axis=0)])
    asins = [f"B{number:05}" for number in generator.permutation(len(vectors))]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), asins


def toy_quantiser(vectors: np.ndarray, method: str, codebook_size: int = 16) -> Quantiser:
    torch.manual_seed(0)
    if method == "rkmeans":
        quantiser: Quantiser = ResidualKMeans(8, levels=3, codebook_size=codebook_size)
        quantiser.fit(vectors, seed=0)
    else:
        quantiser = RQVAE(8, 3, codebook_size, hidden_sizes=(8,), latent_size=4)
        quantiser.fit(vectors, seed=0, max_epochs=2)
    return quantiser


@pytest.mark.parametrize("method", ["rkmeans", "rqvae"])
@pytest.mark.parametrize("collisions", ["level", "reassign"])
def test_a_thousand_items_of_the_same_text(method: str, collisions: str) -> None:
    vectors, asins = toy_vectors()
    quantiser = toy_quantiser(vectors, method)
    ids = unique_ids(quantiser, vectors, asins, collisions)
    assert len(np.unique(ids.codes, axis=0)) == 1060
    content = content_codes(quantiser, vectors)[1]
    if collisions == "level":
        assert (ids.codes[:, :3] == content).all()
        same = (content == content[-1]).all(1)
        assert sorted(ids.codes[same, 3].tolist()) == list(range(same.sum()))
        assert ids.codebook_size == [16, 16, 16, same.sum()]
    else:
        assert ids.codebook_size == [16, 16, 16]
        kept = (ids.codes == content).all(1)
        assert kept.sum() == len(np.unique(content, axis=0))  # one of each stays


@pytest.mark.parametrize("collisions", ["level", "reassign"])
def test_ids_belong_to_items_not_to_their_place(collisions: str) -> None:
    vectors, asins = toy_vectors(equal=20)
    quantiser = toy_quantiser(vectors, "rqvae")
    ids = unique_ids(quantiser, vectors, asins, collisions)
    order = np.random.default_rng(1).permutation(len(asins))
    again = unique_ids(quantiser, vectors[order], [asins[row] for row in order], collisions)
    assert again.hash == ids.hash
    assert again.vectors == ids.vectors
    np.testing.assert_array_equal(again.codes, ids.codes[order])


@pytest.mark.parametrize("collisions", ["level", "reassign"])
def test_new_items_move_no_other(collisions: str) -> None:
    vectors, asins = toy_vectors(equal=30)
    old = np.arange(len(asins)) % 3 > 0
    old_asins = [asin for asin, is_old in zip(asins, old, strict=True) if is_old]
    quantiser = toy_quantiser(vectors[old], "rkmeans")
    before = unique_ids(quantiser, vectors[old], old_asins, collisions)
    ids = extended_ids(before, quantiser, vectors, asins)
    assert ids.asins == old_asins + [a for a, is_old in zip(asins, old, strict=True) if not is_old]
    assert ids.codes[: old.sum()].tolist() == before.codes.tolist()
    assert len(np.unique(ids.codes, axis=0)) == len(asins)
    if collisions == "level":
        content = content_codes(quantiser, vectors[~old])[1]
        assert ids.codes[old.sum() :, :3].tolist() == content.tolist()
        assert ids.codebook_size[3] == ids.codes[:, 3].max() + 1 > before.codebook_size[3]
    # Items that a later folder lacks keep their ids, too.
    assert extended_ids(ids, quantiser, vectors[:5], asins[:5]) is ids


def test_vectors_of_another_encoder_are_refused() -> None:
    vectors, asins = toy_vectors(equal=1)
    quantiser = toy_quantiser(vectors, "rkmeans")
    before = unique_ids(quantiser, vectors, asins)
    with pytest.raises(UserError, match=r"of 61 known items would now get another first code"):
        extended_ids(before, quantiser, -vectors, asins)


def test_statistics_by_hand() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 1], [3, 1]])
    assert code_statistics(codes, codebook_size=4) == {
        "usage": [3 / 4, 1 / 4],
        "entropy": [1.5, 0.0],
        "colliding_items": 2,
        "largest_collision": 2,
    }


def test_reconstruction_error_by_hand() -> None:
    quantiser = ResidualKMeans(1, levels=2, codebook_size=3)
    quantiser.codebooks.copy_(torch.from_numpy(CODEBOOKS))
    vectors = np.array([[11.5], [0.5], [21], [3]], dtype=np.float32)  # mean 9
    codes = quantise(vectors, CODEBOOKS)
    assert codes.tolist() == [[1, 1], [0, 0], [2, 1], [0, 2]]  # 1.5 and .5: the lower of two codes
    variance = 2.5**2 + 8.5**2 + 12**2 + 6**2
    expected = [(1.5**2 + 0.5**2 + 1 + 9) / variance, (0.5**2 + 0.5**2 + 0 + 1) / variance]
    assert reconstruction_error(quantiser, vectors, codes) == pytest.approx(expected)


def test_nothing_is_lost_of_vectors_that_are_all_the_same() -> None:
    quantiser = ResidualKMeans(1, levels=2, codebook_size=3)
    vectors = np.full((1000, 1), 0.5, dtype=np.float32)
    quantiser.fit(vectors)
    codes = quantise(vectors, quantiser.codebooks.numpy())
    assert reconstruction_error(quantiser, vectors, codes) == [0.0, 0.0]
    assert str(code_statistics(codes, 3)["entropy"]) == "[0.0, 0.0]"  # not -0.0


OTHER_PROCESS = """
import json, sys, numpy
from baselines.semantic_ids.quantisers import load_quantiser
from baselines.semantic_ids.unique import unique_ids
for folder in sys.argv[1:]:
    vectors = numpy.load(folder + "/vectors.npy")
    asins = json.load(open(folder + "/asins.json"))
    print(unique_ids(load_quantiser(folder + "/quantiser")[0], vectors, asins).hash)
"""


def test_a_saved_quantiser_gives_the_same_ids_in_another_process(
    tmp_path: Path, repository: Path
) -> None:
    vectors, asins = toy_vectors(equal=20)
    hashes = []
    for method in ("rkmeans", "rqvae"):
        quantiser = toy_quantiser(vectors, method)
        path = tmp_path / method / "quantiser"
        save_quantiser(path, quantiser, "some encoder")
        loaded, text_encoder = load_quantiser(path)
        assert text_encoder == "some encoder"
        assert type(loaded) is type(quantiser)
        assert loaded.settings == quantiser.settings
        hashes.append(unique_ids(quantiser, vectors, asins).hash)
        assert unique_ids(loaded, vectors, asins).hash == hashes[-1]
        # Another order of the items, and two threads.
        order = np.random.default_rng(2).permutation(len(asins))
        np.save(path.with_name("vectors.npy"), vectors[order])
        path.with_name("asins.json").write_text(json.dumps([asins[row] for row in order]))
    result = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "rkmeans"), str(tmp_path / "rqvae")],
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == hashes


def test_no_bit_of_a_quantiser_is_believed(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    path = tmp_path / "quantiser.safetensors"
    save_quantiser(path, toy_quantiser(vectors, "rkmeans"), "some encoder")
    sound = path.read_bytes()
    for place in range(8, len(sound), 11):
        raw = bytearray(sound)
        raw[place] ^= 1 << place % 7
        path.write_bytes(raw)
        with pytest.raises(UserError, match="is damaged|holds no quantiser"):
            load_quantiser(path)


def test_a_file_that_is_no_quantiser(tmp_path: Path) -> None:
    path = tmp_path / "quantiser.safetensors"
    with pytest.raises(FileNotFoundError, match="quantiser.safetensors does not exist"):
        load_quantiser(path)
    path.write_bytes(b"nothing of ours")
    with pytest.raises(UserError, match="holds no quantiser"):
        load_quantiser(path)
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(2)}))
    with pytest.raises(UserError, match="holds no quantiser"):
        load_quantiser(path)


def test_typical_words_by_hand() -> None:
    texts = ["nail red", "nail blue", "hair red", "hair brush", "hair", ""]
    words = typical_words(texts, np.array([0, 0, 1, 1, 1, 2]))
    # nail: all of 2 against 2 of 6. blue: 1 of 2 against 1 of 6. red: 1 of 2 against 2 of 6.
    assert words[0] == [("nail", 1.0), ("blue", 0.5), ("red", 0.5)]
    # brush: 1 of 3 against 1 of 6; red is no more frequent here than anywhere.
    assert words[1] == [("hair", 1.0), ("brush", pytest.approx(1 / 3))]
    assert words[2] == []
    assert typical_words(["", "-"], np.array([0, 1])) == [[], []]


def test_hierarchy_by_hand() -> None:
    codes = np.array([[5, 0, 1], [2, 0, 0], [2, 1, 0], [2, 1, 1]])
    items = [
        {"title": "brush", "brand": "acme", "category": "hair"},
        {"title": "polish", "category": "nail"},
        {"title": "polish"},
        {},
    ]
    rows = code_words.describe(codes, items)
    assert (rows[0].code, rows[0].size) == (2, 3)
    assert rows[0].children == 2
    assert rows[0].category == [("nail", pytest.approx(1 / 3))]
    assert rows[0].title == [("polish", pytest.approx(2 / 3))]
    table = code_words.markdown(rows).splitlines()
    assert table[4:] == ["|2|3|2|nail (33%)|polish (67%)|", "|5|1|1|hair (100%)|brush (100%)|"]
    assert r"2 & 3 & 2 & nail (33\%) & polish (67\%) \\" in code_words.latex(rows)
    first = code_words.records(rows)[0]
    assert (first["items"], first["second-level codes"]) == (3, 2)
    assert (first["title 1"], first["title 1 share"]) == ("polish", pytest.approx(2 / 3))
    assert (first["title 3"], first["title 3 share"]) == ("", None)
    # Without categories: all but the title.
    films = [{"title": "Heat", "genres": "Crime"}, {"title": "Bambi", "genres": "Animation"}]
    rows = code_words.describe(codes[:2], films)
    assert [row.category for row in rows] == [[("animation", 1.0)], [("crime", 1.0)]]


NAMES = ["nail polish red", "nail polish blue", "hair brush", "hair dryer", "lip balm"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shop(tmp_path / "folder", 40)


def write_shop(path: Path, num_items: int) -> Path:
    """A processed folder; item A<n> is called NAMES[n % 5]: many are of the same text."""
    asins = [f"A{(item * 7) % num_items:03}" for item in range(num_items)]
    parts = [Sequences.from_lists([[item]]) for item in (0, 1, 2)]
    write_processed(
        path,
        **dict(zip(("train", "val", "test"), parts, strict=True)),
        user_names=["U"],
        asins=asins,
        meta={a: {"title": NAMES[int(a[1:]) % 5], "category": "beauty"} for a in asins},
        dataset={},
    )
    return path


def fake_vectors(folder: ProcessedFolder, encoder: str) -> np.ndarray:
    """A vector a title; encoders whose names differ in length give other ones."""
    generator = np.random.default_rng(len(encoder))
    table = dict(zip(NAMES, generator.normal(size=(5, 6)).astype(np.float32), strict=True))
    return np.stack([table[item["title"]] for item in folder.items])


@pytest.fixture
def _fake_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "text_vectors", fake_vectors)


@pytest.mark.usefixtures("_fake_encoder")
@pytest.mark.parametrize("method", ["rkmeans", "rqvae"])
def test_the_command(
    folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    flags = ["--method", method, "--levels", "2", "--codebook_size", "4", "--text_encoder", "tiny"]
    main(["--data_path", str(folder), "--output_dir", str(output), *flags])
    assert "40 items, 5 different vectors" in capsys.readouterr().out
    asins = ProcessedFolder.load(folder).asins
    ids = SemanticIds.load(output / "semantic_ids.json", asins)
    report = read_json(output / "report.json")
    assert ids.method == method
    assert ids.codes.shape == (40, 3)
    assert report["ids"]["hash"] == ids.hash
    assert report["colliding_items"] == 40
    assert (
        len(report["usage"]) == len(report["entropy"]) == len(report["reconstruction_error"]) == 2
    )
    assert bool(report["history"]) == (method == "rqvae")
    table = (output / "hierarchy.md").read_text()
    assert sum(int(line.split("|")[2]) for line in table.splitlines()[4:]) == 40
    assert pyplot.imread(output / "hierarchy.png").shape[1] > 300
    assert r"\begin{tabular}{lrrrr}" in (output / "hierarchy.tex").read_text()
    with (output / "hierarchy.csv").open() as handle:
        assert sum(int(row["items"]) for row in csv.DictReader(handle)) == 40

    # The same command gives the same file; twenty new items move none of the old ones.
    again = tmp_path / "again"
    main(["--data_path", str(folder), "--output_dir", str(again), *flags])
    assert (again / "semantic_ids.json").read_bytes() == (output / "semantic_ids.json").read_bytes()
    larger = write_shop(tmp_path / "larger", 60)
    extended = tmp_path / "extended"
    main(["--data_path", str(larger), "--output_dir", str(extended), "--extend", str(output)])
    assert "20 new items; no other item has moved" in capsys.readouterr().out
    all_ids = SemanticIds.load(extended / "semantic_ids.json", ProcessedFolder.load(larger).asins)
    assert len(all_ids.codes) == 60
    kept = SemanticIds.load(extended / "semantic_ids.json", asins)
    assert kept.codes.tolist() == ids.codes.tolist()
    report = read_json(extended / "report.json")
    assert (report["new_items"], report["text_encoder"]) == (20, "tiny")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--levels", "0"], "--levels 0: must be at least 1"),
        (["--codebook_size", "1"], "--codebook_size 1: must be at least 2"),
        (["--method", "rkmeans", "--commitment", "1"], "--commitment is no flag of"),
        (["--extend", "old", "--levels", "2"], "--levels is that of old"),
        (["--commitment", "-1"], "--commitment -1.0: must be at least 0"),
        (["--commitment", "nan"], "--commitment nan: must be at least 0"),
        (["--seed", "-1"], "--seed -1: must be from 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296: must be from 0 to 4294967295"),
    ],
)
def test_flags_that_make_no_sense(folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--data_path", str(folder), *flags])


def test_too_few_codes_are_told_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", "rkmeans", "--codebook_size", "6", "--levels", "2", "--text_encoder", "t"]
    flags += ["--collisions", "reassign", "--output_dir", str(tmp_path / "out")]
    encoded = []

    def encode(folder: ProcessedFolder, encoder: str) -> np.ndarray:
        encoded.append(folder.num_items)
        return fake_vectors(folder, encoder)

    monkeypatch.setattr(command, "text_vectors", encode)
    with pytest.raises(UserError, match="40 items and 6 codes at 2 levels"):
        main(["--data_path", str(folder), *flags])
    small = write_shop(tmp_path / "small", 30)
    main(["--data_path", str(small), *flags])
    # 30 known items and 10 new ones.
    with pytest.raises(UserError, match="40 items and 6 codes at 2 levels"):
        main(["--data_path", str(folder), "--extend", str(tmp_path / "out")])
    assert encoded == [30]


@pytest.mark.usefixtures("_fake_encoder")
def test_another_encoder_at_extension(folder: Path, tmp_path: Path) -> None:
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "out")]
    main([*flags, "--method", "rkmeans", "--codebook_size", "5", "--text_encoder", "tiny"])
    with pytest.raises(UserError, match="another first code"):
        main([*flags, "--extend", str(tmp_path / "out"), "--text_encoder", "another"])


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        main(["--data_path", str(tmp_path / "nothing")])


def test_a_missing_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing gives no text encoder"):
        main(["--data_path", str(folder), "--text_encoder", str(tmp_path / "nothing")])


def test_index_json_of_other_projects(tmp_path: Path) -> None:
    path = tmp_path / "Shop.index.json"
    path.write_text(json.dumps({"7": ["<a_12>", "<b_3>"], "8": ["<a_0>", "<b_3>"]}))
    ids = SemanticIds.load(path, ["8", "7"])
    assert (ids.asins, ids.codes.tolist()) == (["8", "7"], [[0, 3], [12, 3]])
    assert (ids.levels, ids.codebook_size) == (2, [13, 4])
    for wrong, message in (
        (
            {"7": ["<a_12>", "<b_3>"], "8": ["<a_0>"]},
            "'8' has .*a_0.*expected as many codes",
        ),
        ({"7": ["twelve"]}, "'7' has .*twelve.*expected as many codes"),
        ({"7": []}, "'7' has"),
        ({"7": ["<a_1>"], "8": ["<a_1>"]}, "'7' and '8' have the same id"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            SemanticIds.load(path)
