"""A FAISS index of a catalogue's vectors, for catalogues too large to be compared as a whole.

It finds candidates, which the recommender scores exactly; products added after it was built are
compared beside it. How many of the true best it finds is measured when it is built and stands in
its manifest. It belongs to the vectors it was built from: with others it is refused.

    index/index.faiss     FAISS's own format
    index/manifest.json   key of the vectors, number of rows, kind, depth, recall
    index/checksums.json  of both

Shapes: B users, N rows, H hidden.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recformer.evaluation.top_items import top_items_by_vectors
from recformer.files import (
    UserError,
    atomic_folder,
    check_folder,
    read_checked_json,
    write_checked_json,
    write_checksums,
)
from recformer.recommendation.view import Rows, View

FOLDER = "index"
MANIFEST = "manifest.json"
FILE = "index.faiss"
ROWS_AT_ONCE = 65_536
LEAST_IN_LIST = 39  # vectors a cluster, as FAISS wants them for training
TRAINED_ON = 64  # vectors a cluster at most
NEIGHBOURS = 32  # of a node in the graph
DEPTHS = {"ivf": (1, 2, 4, 8, 16, 32, 64, 128, 256), "hnsw": (16, 32, 64, 128, 256, 512)}


@dataclass(frozen=True)
class Measured:
    """Search of an index at one depth, measured.

    Attributes:
        depth: clusters (ivf) or nodes (hnsw) that are looked at.
        recall: share of the true k best that it finds, mean over the queries.
        seconds: a query, one at a time.
    """

    depth: int
    recall: float
    seconds: float


@dataclass(frozen=True)
class Manifest:
    """Facts about an index.

    Attributes:
        key: hash of the vectors.
        kind: "ivf" or "hnsw".
        rows: N.
        k: of the recall.
        queries: that it was measured with.
        depth: the chosen one.
        recall: its recall.
        exact_seconds: an exact query.
        measured: all depths that were tried.
    """

    key: str
    kind: str
    rows: int
    k: int
    queries: int
    depth: int
    recall: float
    exact_seconds: float
    measured: tuple[Measured, ...]


class ApproximateIndex:
    """An index in memory; see `build` and `load`."""

    def __init__(self, index: Any, manifest: Manifest) -> None:
        self.manifest = manifest
        self._index = index
        self.rows = manifest.rows

    @classmethod
    def build(
        cls, view: View, queries: Tensor, kind: str = "ivf", k: int = 10, least_recall: float = 0.95
    ) -> ApproximateIndex:
        """Index all rows, and choose the least depth that finds enough.

        Args:
            view: the catalogue.
            queries: (Q, H) user vectors, with which recall is measured.
            kind: "ivf", clusters, or "hnsw", a graph.
            k: of the recall.
            least_recall: that the chosen depth is to have; where none has, the deepest is chosen.

        Raises:
            UserError: FAISS is not there, or there is nothing to index.
        """
        faiss = require_faiss()
        if kind not in DEPTHS:
            raise UserError(f"kind is {kind!r}, expected one of {', '.join(DEPTHS)}")
        if not len(view) or not len(queries):
            raise UserError("there is nothing to index, or nothing to measure it with")
        table = Rows(view.tables)
        hidden = table.shape[1]
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(hidden, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        else:
            lists = max(1, min(int(4 * len(view) ** 0.5), len(view) // LEAST_IN_LIST))
            coarse = faiss.IndexFlatIP(hidden)
            index = faiss.IndexIVFFlat(coarse, hidden, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid = 1  # of fewer it warns, and there are no more
            sample = np.random.default_rng(0).permutation(len(view))[: TRAINED_ON * lists]
            index.train(_units(view.at(np.sort(sample))))
        for start in range(0, len(view), ROWS_AT_ONCE):
            index.add(_units(table[start : start + ROWS_AT_ONCE]))

        k = min(k, len(view))
        started = time.perf_counter()
        norms: Any = Rows(view.norms)
        vectors: Any = table
        true = np.concatenate(
            [top_items_by_vectors(query[None], vectors, k, norms=norms)[0] for query in queries]
        )
        exact_seconds = (time.perf_counter() - started) / len(queries)
        units = _units(queries)
        measured: list[Measured] = []
        for depth in DEPTHS[kind]:
            started = time.perf_counter()
            found = np.concatenate(
                [index.search(unit[None], k, params=_params(kind, depth))[1] for unit in units]
            )
            seconds = (time.perf_counter() - started) / len(queries)
            hits = sum(len(np.intersect1d(a, b)) for a, b in zip(true, found, strict=True))
            measured.append(Measured(depth, hits / true.size, seconds))
            if measured[-1].recall >= least_recall:
                break
        best = measured[-1]
        key = vectors_key(view, len(view))
        manifest = Manifest(
            *(key, kind, len(view), k, len(queries), best.depth, best.recall, exact_seconds),
            tuple(measured),
        )
        return cls(index, manifest)

    def save(self, folder: Path) -> None:
        """Write it below the folder of a model, whole or not at all."""
        with atomic_folder(folder / FOLDER) as new:
            require_faiss().write_index(self._index, str(new / FILE))
            write_checked_json(new / MANIFEST, asdict(self.manifest))
            write_checksums(new)

    @classmethod
    def load(cls, folder: Path, view: View) -> ApproximateIndex:
        """Read the index of the rows that a view begins with.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is of other vectors, or damaged.
        """
        faiss = require_faiss()
        path = folder / FOLDER
        if not (path / MANIFEST).exists():
            raise FileNotFoundError(f"{path} does not exist: recformer index --model {folder}")
        values = read_checked_json(path / MANIFEST)
        values["measured"] = tuple(Measured(**each) for each in values["measured"])
        manifest = Manifest(**values)
        if manifest.rows > len(view) or vectors_key(view, manifest.rows) != manifest.key:
            raise UserError(
                f"{path} is of other vectors than the catalogue's, which has changed since: build "
                f"it anew, recformer index --model {folder}"
            )
        check_folder(path)
        try:
            index = faiss.read_index(str(path / FILE))
        except RuntimeError as error:
            raise UserError(f"{path / FILE} is missing or damaged: {error}") from error
        if index.ntotal != manifest.rows:
            raise UserError(f"{path / FILE} is damaged: it has {index.ntotal} rows")
        return cls(index, manifest)

    def candidates(
        self, users: Tensor, k: int, mask: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """Rows (B, k) for users (B, H), -1 where there are fewer; `mask` says which count."""
        faiss = require_faiss()
        selector = None
        if mask is not None:
            bits = np.packbits(mask[: self.rows], bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        params = _params(self.manifest.kind, max(self.manifest.depth, 1), selector, k)
        return self._index.search(_units(users), min(k, self.rows), params=params)[1]


def vectors_key(view: View, rows: int) -> str:
    """SHA-256 (hex) of the first rows of a view."""
    digest = hashlib.sha256()
    table = Rows(view.tables)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = table[start : min(start + ROWS_AT_ONCE, rows)]
        digest.update(part.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _params(kind: str, depth: int, selector: Any = None, k: int = 0) -> Any:
    faiss = require_faiss()
    if kind == "ivf":
        return faiss.SearchParametersIVF(nprobe=depth, sel=selector)
    return faiss.SearchParametersHNSW(efSearch=max(depth, k), sel=selector)


def _units(vectors: Tensor) -> NDArray[np.float32]:
    return F.normalize(vectors.float()).cpu().numpy()


def require_faiss() -> Any:
    """The module of FAISS.

    Raises:
        UserError: it is not there; says what brings it.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("approximate indexes need FAISS: pip install 'recformer[faiss]'") from error
    return faiss
