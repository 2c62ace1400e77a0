"""Preparation on Apache Spark: the folder that one machine writes, byte for byte."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recformer.commands import process
from recformer.files import UserError
from recformer.preparation import options
from recformer.preparation import spark as spark_module
from recformer.preparation.finetuning import prepare_finetuning
from recformer.preparation.options import Filters, SessionOptions, SplitOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
]


@pytest.fixture(scope="module", autouse=True)
def spark() -> Iterator[Any]:
    sql = pytest.importorskip("pyspark.sql", reason="the extra [spark]")
    pytest.importorskip("pandas", reason="the extra [spark]")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    session = builder.config("spark.sql.shuffle.partitions", "3").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def write(folder: Path, seed: int, times: str) -> Path:
    """A partitioned table: duplicates, ties in time, items that nobody knows, files whose names are
    in no order of size."""
    draw = np.random.default_rng(seed)
    columns = {
        "user_id": draw.integers(0, 9, 150).astype(str),
        "item_id": draw.integers(0, 12, 150),
        "timestamp": 1_600_000_000 + 60 * draw.integers(0, 20, 150),
        "rating": draw.integers(1, 6, 150).astype(np.float64),
    }
    frame = pl.DataFrame(columns)
    if times == "text":  # with fractions in some
        ends = pl.Series([["", ".5", ".000001"][n % 3] for n in range(150)])
        frame = frame.with_columns(pl.col("timestamp").cast(pl.String) + ends)
    elif times == "moments":
        start = datetime(2020, 9, 13, tzinfo=timezone.utc)
        passed = [start + timedelta(microseconds=int(m)) for m in draw.integers(0, 9, 150)]
        frame = frame.with_columns(timestamp=pl.Series(passed).cast(pl.Datetime("us", "UTC")))
    elif times == "floats":
        frame = frame.with_columns(pl.col("user_id") + ".0", pl.col("timestamp").cast(pl.Float64))
    log = folder / "log"
    borders = [0, 70, 80, 81, 150]
    for place, (begin, end) in enumerate(pairwise(borders)):
        file = log / f"day={place // 2}" / f"part-{place}{'-b' * (place % 2)}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        frame[begin:end].write_parquet(file)
    items = pl.DataFrame({"item_id": range(10), "title": [f"Item {n}" for n in range(10)]})
    items.write_parquet(folder / "items.parquet")
    return log


@pytest.mark.parametrize(
    ("times", "arguments"),
    [
        ("numbers", {"filters": Filters(deduplicate=True, k_core=4)}),
        (
            "text",
            {
                "filters": Filters(drop_consecutive_repeats=True, min_rating=2.0),
                "options": SplitOptions(cold_items=0.2),
                "user_sample_rate": 0.8,
            },
        ),
        ("moments", {"options": SplitOptions(split="temporal", test_quantile=0.7)}),
        ("floats", {"options": SplitOptions(val_users=3), "min_interactions": 9}),
    ],
)
def test_same_folder_as_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(options, "_BYTES_A_ROW", int(2e9 * options._SHARE / 40))
    log = write(tmp_path, 0, times)
    for engine in ("local", "spark"):
        prepare_finetuning(
            log, tmp_path / "items.parquet", tmp_path / engine, engine=engine, memory=2 * 10**9,
            **arguments,
        )  # fmt: skip
    local, spark = (
        {path.name: path.read_bytes() for path in (tmp_path / engine).iterdir()}
        for engine in ("local", "spark")
    )
    assert spark == local
    assert len(local) == 8


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    log = write(tmp_path, 0, "numbers")
    file = log / "day=0" / "part-0.parquet"
    frame = pl.read_parquet(file)
    broken = frame.with_columns(user_id=pl.Series([None, *frame["user_id"][1:]]))
    broken.write_parquet(file)
    items = tmp_path / "items.parquet"
    with pytest.raises(UserError, match=r"log, row 1: no user_id. Mend the file, or pass --skip"):
        prepare_finetuning(log, items, tmp_path / "out", engine="spark")
    found = [
        prepare_finetuning(log, items, tmp_path / engine, engine=engine, skip_bad_lines=True)  # type: ignore[arg-type]
        for engine in ("local", "spark")
    ]
    assert found[0]["counts"]["bad_lines"]["reasons"] == {"no user_id": 1}
    assert found[1] == found[0]


def test_files_lie_here_whatever_is_the_file_system_of_the_cluster(
    tmp_path: Path, spark: Any
) -> None:
    log = write(tmp_path, 0, "numbers")
    items, out = tmp_path / "items.parquet", tmp_path / "out%20 of it"
    settings = spark.sparkContext._jsc.hadoopConfiguration()
    before = settings.get("fs.defaultFS")
    settings.set("fs.defaultFS", "hdfs://nowhere.invalid:9")
    try:
        by_spark = prepare_finetuning(f"file://{log}", items, out, engine="spark")
    finally:
        settings.set("fs.defaultFS", before)
    local = prepare_finetuning(log, items, tmp_path / "local")
    assert by_spark["counts"] == local["counts"]
    assert (out / "train.json").read_bytes() == (tmp_path / "local" / "train.json").read_bytes()


def test_executors_that_fail_or_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(tmp_path, 0, "numbers")
    items, out = tmp_path / "items.parquet", tmp_path / "out"

    def without_package(*_: Any) -> Any:
        def judge(batches: Any) -> Any:
            raise ModuleNotFoundError("No module named 'recformer'")

        return judge

    with monkeypatch.context() as patch:
        patch.setattr(spark_module, "_judge", without_package)
        with pytest.raises(UserError) as raised:
            prepare_finetuning(log, items, out, engine="spark")
    said = str(raised.value)
    assert said.startswith("Spark failed (ModuleNotFoundError: No module named 'recformer'): every")
    assert "\n" not in said
    assert raised.value.__cause__ is not None

    numbered = spark_module._numbered

    def one_is_missing(users: Path, codes: Path) -> Any:
        next(path for path in users.glob("*.parquet") if len(pl.read_parquet(path))).unlink()
        return numbered(users, codes)

    monkeypatch.setattr(spark_module, "_numbered", one_is_missing)
    with pytest.raises(UserError, match=r"of 1\d\d rows that Spark's executors wrote are"):
        prepare_finetuning(log, items, out, engine="spark")


def test_what_spark_is_not_asked_for(tmp_path: Path) -> None:
    log = write(tmp_path, 0, "numbers")
    items, out = tmp_path / "items.parquet", tmp_path / "out"
    with pytest.raises(UserError, match="--session_gap: needs all interactions .*--engine spark"):
        prepare_finetuning(log, items, out, engine="spark", sessions=SessionOptions(gap=60))
    with pytest.raises(UserError, match="--engine spark needs the items"):
        prepare_finetuning(log, None, out, engine="spark")
    with pytest.raises(UserError, match="nowhere cannot be read by Spark"):
        prepare_finetuning(tmp_path / "nowhere", items, out, engine="spark")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path, 1, "numbers")
    process.main(
        ["--engine", "spark", "--file_path", str(log), "--output_path", str(tmp_path / "out")]
        + ["--meta_file_path", str(tmp_path / "items.parquet")]
    )
    assert "9 users, 10 items" in capsys.readouterr().out
