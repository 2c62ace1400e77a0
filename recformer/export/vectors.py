"""Item vectors for other search engines: Parquet, Qdrant, pgvector.

Vectors are divided by their length, so that an inner product is the cosine that
`CatalogueRecommender` ranks by. What a user's vector is made of stands in the manifest:

* a model finetuned as published reads a history as one sequence of texts: `"user": {"made_of":
  "texts"}`; its vector is the encoder's (`recformer export --forms onnx`, or
  `CatalogueRecommender.user_vectors`), divided by its length.
* a model with a head (`--method head`) reads item vectors: `"made_of": "item vectors"`. The newest
  `max_history` items' vectors, each times its weight (`weights`, newest first), are added up and
  divided by the length. The score of an item of the history is no inner product:
  `factor * cosine + bias[age]`, age being 0 for the newest, the last bias for all older ones. So
  the search takes as many items more as the history has and gives these their own score; the
  others keep theirs, and the order is exact (docs/guides/serving-elsewhere.md).
* a head with `--next_offsets` reads of each item of the history another vector than the one that is
  recommended: `"made_of": "model"`, no weights, and `CatalogueRecommender.user_vectors` alone knows
  the user. Scores of items of the history are as above.

Shapes: N items, B users, D dimension of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recformer.export.folders import exported_folder
from recformer.files import UserError
from recformer.models import RecformerForCatalogue
from recformer.recommendation import CatalogueRecommender
from recformer.training.start import weights_hash

ROWS_AT_ONCE = 8192
POINTS_A_FILE = 1000  # Qdrant takes requests of up to 32 MB
TABLE = "items"  # of the database, and the collection


@dataclass(frozen=True)
class Chunk:
    """Some items of the catalogue, in its order.

    Attributes:
        start: place of the first among all that are exported.
        names: of the items.
        vectors: (n, D) float32 of length 1 (0 where a model gives no direction).
        attributes: of each item, as in `meta_data.json`.
    """

    start: int
    names: list[str]
    vectors: NDArray[np.float32]
    attributes: list[dict[str, Any]]


Sink = Callable[[Chunk], None]


def unit(vectors: NDArray) -> NDArray[np.float32]:
    """(n, D) vectors divided by their lengths, computed in float64."""
    exact = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def chunks(recommender: CatalogueRecommender) -> Iterator[Chunk]:
    """All items that are offered, some at a time."""
    start = 0
    for names, vectors, attributes in recommender.rows(ROWS_AT_ONCE):
        wrong = [name for name in names if storable(name) != name]
        if wrong:
            raise UserError(f"the item name {wrong[0]!r} cannot be stored: it is no plain Unicode")
        array = unit(vectors.float().cpu().numpy())
        yield Chunk(start, names, array, [storable(item) for item in attributes])
        start += len(names)


def user_side(recommender: CatalogueRecommender) -> dict[str, Any]:
    """Parts of a user's vector, for the manifest; see the module."""
    model = recommender.model
    if not isinstance(model, RecformerForCatalogue):
        config = model.config
        return {
            "made_of": "texts",
            "max_items": config.max_item_embeddings - 1,
            "max_tokens": config.max_token_num,
        }
    head = model.head
    known: dict[str, Any] = {
        "made_of": "item vectors",
        "max_history": head.options.max_history,
        "weights": head.log_recency.detach().double().exp().tolist(),
        "factor": 1.0,
        "bias": [0.0],
    }
    if head.options.next_offsets:  # of which the exported vectors know nothing
        known["made_of"] = "model"
        del known["weights"]
    if head.options.history_term:
        known["factor"] = head.history_factor.item()
        known["bias"] = head.history_bias.detach().tolist()
    return known


# The forms. --------------------------------------------------------------------------------------


@contextmanager
def parquet(folder: Path, dimension: int) -> Iterator[Sink]:
    """`items.parquet`: item, vector (D float32) and attributes (JSON) of each row."""
    schema = pa.schema(
        [
            ("item", pa.string()),
            ("vector", pa.list_(pa.float32(), dimension)),
            ("attributes", pa.string()),
        ]
    )
    with pq.ParquetWriter(folder / "items.parquet", schema, compression="zstd") as writer:

        def write(chunk: Chunk) -> None:
            flat = pa.array(chunk.vectors.reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, dimension)
            attributes = [_json(item) for item in chunk.attributes]
            columns = [pa.array(chunk.names), vectors, pa.array(attributes, pa.string())]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        yield write


@contextmanager
def qdrant(folder: Path, dimension: int) -> Iterator[Sink]:
    """Bodies of Qdrant's REST requests, as its Python client takes them too.

    `collection.json` for `PUT /collections/items`, then `points-00000.json`, … for
    `PUT /collections/items/points`. The id of a point is the item's place in the catalogue, its
    payload {"item": name, "attributes": {…}}.
    """
    settings = {"vectors": {"size": dimension, "distance": "Dot"}}
    (folder / "collection.json").write_text(_json(settings) + "\n", encoding="utf-8")
    number = 0

    def write(chunk: Chunk) -> None:
        nonlocal number
        for start in range(0, len(chunk.names), POINTS_A_FILE):
            with open(folder / f"points-{number:05}.json", "w", encoding="utf-8") as handle:
                handle.write('{"points": [\n')
                rows = range(start, min(start + POINTS_A_FILE, len(chunk.names)))
                for row in rows:
                    payload = {"item": chunk.names[row], "attributes": chunk.attributes[row]}
                    handle.write(
                        f'{{"id": {chunk.start + row}, "vector": {_numbers(chunk.vectors[row])}, '
                        f'"payload": {_json(payload)}}}{"," if row < rows[-1] else ""}\n'
                    )
                handle.write("]}\n")
            number += 1

    yield write


SQL = f"""\
-- psql -d DATABASE -f {TABLE}.sql, in this folder
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE {TABLE} (
    item text PRIMARY KEY,
    vector vector(%d) NOT NULL,
    attributes jsonb NOT NULL
);
\\copy {TABLE} FROM '{TABLE}.copy'
-- Search is exact until there is an approximate index, such as
-- CREATE INDEX ON {TABLE} USING hnsw (vector vector_ip_ops);
"""


@contextmanager
def pgvector(folder: Path, dimension: int) -> Iterator[Sink]:
    """`items.copy`, in the text form of PostgreSQL's COPY, and `items.sql` that loads it."""
    (folder / f"{TABLE}.sql").write_text(SQL % dimension, encoding="utf-8")
    with open(folder / f"{TABLE}.copy", "w", encoding="utf-8", newline="\n") as handle:

        def write(chunk: Chunk) -> None:
            for name, vector, item in zip(chunk.names, chunk.vectors, chunk.attributes):
                row = (_copied(name), _numbers(vector), _copied(_json(item)))
                handle.write("\t".join(row) + "\n")

        yield write


#: By the word that `--forms` takes.
FORMS = {"parquet": parquet, "qdrant": qdrant, "pgvector": pgvector}
PGVECTOR_MOST = 16_000  # dimensions of its type `vector`


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def storable(value: Any) -> Any:
    """A value that all three can store: Unicode without NUL, finite numbers or None."""
    if isinstance(value, str):
        # Half a surrogate pair, as a broken JSON escape leaves it, is no Unicode.
        whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return whole.replace("\0", "")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {storable(key): storable(each) for key, each in value.items()}
    return [storable(each) for each in value] if isinstance(value, list | tuple) else value


def _numbers(vector: NDArray[np.float32]) -> str:
    """The shortest text that gives the same float32 again."""
    return "[" + ",".join(map(str, vector)) + "]"


def _copied(text: str) -> str:
    """A value of COPY's text form."""
    for plain, written in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(plain, written)
    return text


# Writing. ----------------------------------------------------------------------------------------


def export_vectors(
    recommender: CatalogueRecommender, output_dir: Path, forms: Sequence[str], model: str
) -> dict[str, Any]:
    """Write the catalogue in each of `forms`, to the folder of that name in `output_dir`.

    Args:
        forms: of `FORMS`.
        model: what the manifest calls the model.

    Returns:
        The manifest, without the files.

    Raises:
        UserError: an empty catalogue, a form that cannot hold it, or a folder with other files.
    """
    if not len(recommender):
        raise UserError("the catalogue is empty: there is nothing to export")
    dimension = recommender.dimension
    if "pgvector" in forms and dimension > PGVECTOR_MOST:
        raise UserError(f"pgvector holds vectors of up to {PGVECTOR_MOST} numbers, got {dimension}")
    manifest: dict[str, Any] = {
        "model": model,
        "weights": weights_hash(recommender.model),
        "count": len(recommender),
        "dimension": dimension,
        "normalised": True,
        "score": "inner product with the user's vector of length 1",
        "user": user_side(recommender),
    }
    digest = hashlib.sha256()
    with ExitStack() as stack:
        sinks = []
        for form in forms:
            folder = stack.enter_context(exported_folder(output_dir / form, manifest))
            sinks.append(stack.enter_context(FORMS[form](folder, dimension)))
        for chunk in chunks(recommender):
            digest.update(_json(chunk.names).encode())
            digest.update(chunk.vectors.astype("<f4").tobytes())
            for sink in sinks:
                sink(chunk)
        manifest["content_sha256"] = digest.hexdigest()
    return manifest
