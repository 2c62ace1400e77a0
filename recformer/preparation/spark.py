"""A log laid down in files by user on Apache Spark, for logs that one machine cannot read.

Spark reads the log (partitioned Parquet on any path that it knows), has every row judged by
`recformer.preparation.batches`, numbers the users in the order in which they first appear and sorts
the rows into blocks of consecutive users. From there on all is as in `spool`, and so is the result:
what is kept, how ties are broken and how is split is said in one place.

The output folder lies where all executors see it, as does this package.

Shapes: M interactions, U users, N items.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import polars as pl
import pyarrow as pa

from recformer.data.sequences import offsets_of
from recformer.data.texts import Texts
from recformer.files import UserError
from recformer.preparation.bad_lines import BadLines
from recformer.preparation.batches import Batches
from recformer.preparation.columns import Columns
from recformer.preparation.forms import WHOLE_FLOAT, RawFile
from recformer.preparation.log_arrays import Scratch
from recformer.preparation.log_frames import EXTRA, parquet_columns
from recformer.preparation.logs import InteractionSource
from recformer.preparation.spool import LogInFiles
from recformer.preparation.tables import interaction_source
from recformer.preparation.times import Fractions, in_unit

ROW_BITS = 40  # of a place in the log: the number of the file stands above that of the row

JUDGED = "user string, item int, whole long, billionths long, place long, said string"


def session(url: str | None = None) -> Any:
    """The Spark session of `spark-submit`, or one of this machine.

    Args:
        url: of a cluster (`--master`); None: as configured, else all cores of this machine.

    Raises:
        UserError: PySpark or Java is missing.
    """
    try:
        import pandas  # noqa: F401  # PySpark wants it for functions over Arrow, too
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError(
            f"--engine spark needs PySpark ({error}): pip install 'recformer[spark]'"
        ) from error
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # which has this package
    builder = SparkSession.builder.appName("recformer process")
    builder = builder.config("spark.sql.session.timeZone", "UTC")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    try:
        return (builder.master(url) if url else builder).getOrCreate()
    except (PySparkException, Py4JError, OSError) as error:
        raise UserError(
            f"Spark did not start ({_cause(error)}): it needs Java, such as the package "
            f"default-jre-headless of Debian"
        ) from error


def open_lake(spark: Any, path: str, columns: Columns) -> tuple[Any, InteractionSource]:
    """A table of Parquet files and what stands where in it.

    Args:
        spark: the session.
        path: a folder or a URL that Spark reads, partitioned or not.
        columns: what the user said of them.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        table = spark.read.option("mergeSchema", "false").parquet(path)
    except (PySparkException, Py4JError) as error:
        raise UserError(f"{path} cannot be read by Spark: {_cause(error)}") from error
    lists = frozenset(f.name for f in table.schema.fields if f.dataType.typeName() == "array")
    file = RawFile(Path(path), "parquet", table.columns, lists)
    return table, interaction_source(file, columns)


def spooled_by_spark(
    table: Any,
    source: InteractionSource,
    known: Sequence[str],
    bad_lines: BadLines,
    min_rating: float | None,
    events: Sequence[str],
    scratch: Scratch,
) -> tuple[LogInFiles, dict[str, int]]:
    """As `spool.spooled`, of users.

    Args:
        table, source: see `open_lake`.
        known: items that count.
        bad_lines, min_rating, events: see `Batches`.
        scratch: where to; seen by all executors.

    Raises:
        UserError: as `Batches`; or executors fail, or write what is not seen here.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    spark = table.sparkSession
    folder = scratch.folder.absolute()
    names = spark.sparkContext.broadcast(list(known))

    def place(name: str) -> str:
        # With its scheme, for a cluster's own may be another. Not `as_uri`: Spark decodes nothing.
        return f"file://{folder / name}"

    try:
        judge = _judge(source, names, bad_lines.skip, min_rating, events, _stripped(table, source))
        _with_places(table).mapInArrow(judge, JUDGED).write.parquet(place("judged"))
        judged = spark.read.parquet(place("judged"))
        said = judged.filter("said is not null").sort("place").select("said").collect()
        said = [row.said for row in said]
        _check_seen(sum(json.loads(each)["rows"] for each in said), table.count(), folder)
        counts, fractions, first_unknown = _together(said, source, bad_lines)
        rows = judged.filter("said is null").drop("said")
        users = rows.groupBy("user").agg(F.min("place").alias("first"), F.count("*").alias("rows"))
        # By ranges, each in a file: the files in their order are the users in theirs.
        users = users.repartitionByRange("first").sortWithinPartitions("first")
        users.write.parquet(place("users"))
        user_names, user_rows = _numbered(folder / "users", folder / "codes")
        _check_seen(int(user_rows.sum()), rows.count(), folder)
        blocks = max(1, -(-int(user_rows.sum()) // scratch.rows))
        rows = rows.join(spark.read.parquet(place("codes")), "user").drop("user")
        rows = rows.repartitionByRange(blocks, "code").sortWithinPartitions("place")
        rows.drop("place").write.parquet(place("blocks"))
    except (PySparkException, Py4JError) as error:
        refused = re.search(r"UserError: (.+)", str(error))
        if refused is not None:
            raise UserError(refused[1].strip()) from None
        raise UserError(
            f"Spark failed ({_cause(error)}): every executor needs this package, and must see and "
            f"write to {folder.parent}"
        ) from error
    finally:
        names.unpersist()
    exponent = fractions.exponent()
    log = _log(folder / "blocks", user_names, user_rows, list(known), exponent, scratch)
    log.has_times, log.first_unknown = source.columns.time is not None, first_unknown
    return log, counts


def _cause(error: Exception) -> str:
    """The innermost error that Java or Python speak of, in a line."""
    found = re.findall(r"^(?:Caused by)?[: ]*([\w.]+(?:Error|Exception): .+)$", str(error), re.M)
    return (found[-1] if found else str(error).partition("\n")[0]).strip()[:300]


def _check_seen(number: int, expected: int, folder: Path) -> None:
    """Refuse to go on with a part of the rows.

    Raises:
        UserError: files that executors wrote are not seen here.
    """
    if number != expected:
        raise UserError(
            f"{folder.parent}: {number:,} of {expected:,} rows that Spark's executors wrote are "
            f"seen here; choose an output folder that lies on a file system of all machines"
        )


def _with_places(table: Any) -> Any:
    """With a column `place`: the order of the files by name, and of the rows in each."""
    from pyspark.sql import functions as F

    path = F.col("_metadata.file_path")
    found = [row[0] for row in table.select(path).distinct().collect()]
    files = sorted(found, key=lambda name: PurePosixPath(unquote(urlparse(name).path)).parts)
    numbers = table.sparkSession.createDataFrame(
        [(name, number << ROW_BITS) for number, name in enumerate(files)], "file string, first long"
    )
    placed = table.withColumn("file", path).withColumn("row", F.col("_metadata.row_index"))
    placed = placed.join(F.broadcast(numbers), "file")
    return placed.withColumn("place", F.col("first") + F.col("row")).drop("file", "row", "first")


def _stripped(table: Any, source: InteractionSource) -> dict[str, bool]:
    """Whether all users, and all items, are whole numbers with `.0`, see `Batches`."""
    from pyspark.sql import functions as F

    columns = {"user": source.columns.user, "item": source.columns.item}
    texts = {
        name: column
        for name, column in columns.items()
        if table.schema[column].dataType.typeName() == "string"
    }
    if not texts:
        return {}
    present = F.lit(True)
    for column in columns.values():
        present &= F.col(column).isNotNull() & (F.trim(F.col(column).cast("string")) != "")
    whole = [
        F.min(F.col(column).rlike(f"^{WHOLE_FLOAT.pattern}$")).alias(name)
        for name, column in texts.items()
    ]
    (row,) = table.filter(present).select(*whole).collect()
    return {name: bool(row[name]) for name in texts}


def _judge(
    source: InteractionSource,
    names: Any,
    skip: bool,
    min_rating: float | None,
    events: Sequence[str],
    stripped: dict[str, bool],
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """What Spark does with the rows of a file: those that count, and last what is to be said."""

    def judge(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        bad_lines = BadLines(skip=skip)
        first_place = -1

        def frames(wanted: dict[str, str]) -> Iterator[pl.DataFrame]:
            nonlocal first_place
            for batch in batches:
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                if first_place < 0 and len(frame):
                    first_place = int(frame["place"][0])
                columns = parquet_columns(source.file, frame.schema, wanted)
                line = (pl.col("place") & ((1 << ROW_BITS) - 1)) + 1
                frame = frame.select(line.alias("line"), *columns)
                for name, strip in stripped.items():
                    if strip:
                        frame = frame.with_columns(pl.col(name).str.replace(r"\.0+$", ""))
                yield frame

        known = names.value
        own = Batches(source, known, bad_lines, min_rating, events, extra=["place"], frames=frames)
        for frame in own:
            items = frame["item"].cast(own.known_names).to_physical()
            yield from _batches(
                frame.select(
                    "user",
                    items.cast(pl.Int32),
                    "whole",
                    "billionths",
                    pl.col(f"{EXTRA}place").alias("place"),
                    pl.lit(None, pl.String).alias("said"),
                )
            )
        said = {
            "counts": own.counts,
            "rows": own.num_rows,
            "fractions": b64encode(pickle.dumps(own.fractions)).decode(),
            "bad_lines": bad_lines.summary(),
            "first_unknown": own.first_unknown,
        }
        types = {"user": pl.String, "item": pl.Int32, "whole": pl.Int64, "billionths": pl.Int64}
        last = [(None, None, None, None, first_place, json.dumps(said))]
        schema = types | {"place": pl.Int64, "said": pl.String}
        yield from _batches(pl.DataFrame(last, schema=schema, orient="row"))

    return judge


def _batches(frame: pl.DataFrame) -> Iterator[pa.RecordBatch]:
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    texts = [field.name for field in table.schema if pa.types.is_large_string(field.type)]
    for name in texts:  # Spark's own strings are short
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.string()))
    yield from table.to_batches()


def _together(
    said: Sequence[str], source: InteractionSource, bad_lines: BadLines
) -> tuple[dict[str, int], Fractions, str | None]:
    """What all who judged rows had to say: counts, fractions, and the first unknown item."""
    counts: Counter[str] = Counter()
    fractions, first_unknown, num_rows = Fractions(), None, 0
    for each in map(json.loads, said):
        for name, number in each["counts"].items():
            counts[name] += number  # also of zeros, whose names stay
        num_rows += each["rows"]
        fractions.merge(pickle.loads(b64decode(each["fractions"])))
        bad_lines.reasons.update(each["bad_lines"]["reasons"])
        bad_lines.first += each["bad_lines"]["first"][: 5 - len(bad_lines.first)]
        first_unknown = first_unknown or each["first_unknown"]
    if not num_rows:
        raise UserError(f"{source.path} is empty, expected interactions")
    if not counts["reviews"]:
        raise UserError(f"{source.path}: none of its {num_rows} rows is usable{bad_lines.why()}")
    if not fractions.all_fit():
        raise UserError(
            f"{source.path} has times with fractions and others that are too large for their unit: "
            f"mend or remove these"
        )
    return dict(counts), fractions, first_unknown


def _numbered(users: Path, codes: Path) -> tuple[Texts, np.ndarray]:
    """Names and interactions of the users in the order of their codes, which are written."""
    codes.mkdir()
    names: list[Texts] = []
    rows: list[np.ndarray] = [np.empty(0, np.int64)]
    number = 0
    for place, path in enumerate(sorted(users.glob("*.parquet"))):
        frame = pl.read_parquet(path)
        names.append(Texts.of(frame["user"]))
        rows.append(frame["rows"].to_numpy())
        own = np.arange(number, number + len(frame))
        frame.select("user", code=pl.Series(own)).write_parquet(codes / f"part-{place:05d}.parquet")
        number += len(frame)
    lengths = [np.diff(own.offsets) for own in names]
    data = [own.data for own in names]
    offsets = offsets_of(np.concatenate([np.empty(0, np.int64), *lengths]))
    return Texts(offsets, np.concatenate([np.empty(0, np.uint8), *data])), np.concatenate(rows)


def _log(
    blocks: Path,
    user_names: Texts,
    user_rows: np.ndarray,
    item_names: list[str],
    exponent: int,
    scratch: Scratch,
) -> LogInFiles:
    """The blocks, file after file, as arrays in files."""
    offsets = offsets_of(user_rows)
    number = int(offsets[-1])
    users, items = scratch.array(number, "int32"), scratch.array(number, "int32")
    times = scratch.array(number, "int64")
    borders, done = [0], 0
    for path in sorted(blocks.glob("*.parquet")):
        frame = pl.read_parquet(path)
        if not len(frame):
            continue
        where = slice(done, done + len(frame))
        users[where], items[where] = frame["code"].to_numpy(), frame["item"].to_numpy()
        whole, billionths = frame["whole"].to_numpy(), frame["billionths"].to_numpy()
        times[where] = in_unit(whole, billionths, exponent)[0] if exponent else whole
        done += len(frame)
        borders.append(int(users[where].max()) + 1)
    _check_seen(done, number, blocks.parent)
    return LogInFiles(
        users, items, times, offsets, borders, user_names, item_names, True, None, {}, scratch
    )
