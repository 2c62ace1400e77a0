"""The generated season: its law, its variant, and public logs of sessions as they are."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recformer.commands import download as command
from recformer.commands.process import main
from recformer.commands.sample import main as sample
from recformer.data.features import features_of
from recformer.data.processed import ProcessedFolder
from recformer.data.windows import Windows
from recformer.preparation.download import SESSION_LOGS, RemoteFile
from recformer.preparation.sample_season import (
    AGAIN,
    FILE,
    HEADER,
    NUM_CATEGORIES,
    SAME,
    make_season,
    write_season,
)

SIZE = {"days": 4, "sessions_a_day": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("season")
    write_season(path / "season", 3, **SIZE)
    write_season(path / "shuffled", 3, shuffled=True, **SIZE)
    return path


def test_the_law_of_a_step() -> None:
    season = make_season(1, days=4, sessions_a_day=300)
    pairs = np.array([p for visit in season.visits for p in pairwise(visit)])
    first, second = season.categories[pairs].T
    same = (first == second).mean()
    assert abs(same - SAME * (1 - AGAIN)) < 0.06  # repeats may be of another category
    goes = (season.goes_with[first] == second)[first != second].mean()
    assert goes > 0.5 > 10 / NUM_CATEGORIES
    apart = np.abs(np.diff(season.levels[pairs], axis=1)).mean()
    assert apart < 0.6 < np.sqrt(4 / np.pi)  # two of N(0, 1) are 1.13 apart
    for day in range(4):  # nothing is met before it is there
        start = np.searchsorted(season.starts, [86_400 * day, 86_400 * (day + 1)])
        met = {p for visit in season.visits[slice(*start)] for p in visit}
        assert max(season.born[list(met)]) == day


def test_the_shuffled_season_has_the_same_sessions(folder: Path) -> None:
    one, two = (pl.read_csv(folder / name / FILE) for name in ("season", "shuffled"))
    assert one.columns == HEADER.split(",")
    same = ["event_time", "event_type", "product_id", "user_id", "user_session"]
    assert one.select(same).equals(two.select(same))
    for frame, most in ((one, 1.0), (two, 0.35)):
        steps = frame.with_columns(
            before=pl.col("category_id").shift().over("user_session"),
            product_before=pl.col("product_id").shift().over("user_session"),
        ).filter(
            pl.col("before").is_not_null() & (pl.col("product_before") != pl.col("product_id"))
        )
        share = (steps["before"] == steps["category_id"]).mean()
        assert isinstance(share, float)
        assert share < most
        assert (share > 0.6) == (most == 1.0)
    assert write_season(folder / "again", 3, **SIZE)["events"] == len(one)
    assert (folder / "again" / FILE).read_bytes() == (folder / "season" / FILE).read_bytes()


def test_the_season_becomes_windows_with_features(folder: Path, tmp_path: Path) -> None:
    main(
        ["--file_path", str(folder / "season" / FILE), "--output_path", str(tmp_path)]
        + ["--protocol", "t4rec_rees46", "--session_column", "user_session"]
        + ["--features", "price:float:item", "category_code", "brand", "hour", "item_age"]
    )
    data = ProcessedFolder.load(tmp_path)
    windows = Windows.of(data)
    assert windows is not None
    assert len(windows) == 4
    assert {f.name: (f.kind, f.of) for f in features_of(data)} == {
        "price": ("float", "item"),
        "category_code": ("cat", "item"),
        "brand": ("cat", "item"),
        "hour": ("cat", "interaction"),
        "item_age": ("float", "interaction"),
    }
    assert data.dataset is not None
    assert data.dataset["protocol"]["changed"] == {}
    assert all(own["targets_new_in_it"] > 0 for own in windows.about[1:4])
    joined = windows.joined
    again = (joined.items[1:] == joined.items[:-1]) & (joined.rows[1:] == joined.rows[:-1])
    assert not again.any()  # what lay in the cart is not met once more


def test_the_command_says_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = partial(write_season, days=1, sessions_a_day=9)
    monkeypatch.setattr("recformer.commands.sample.write_season", small)
    sample(["--output_dir", str(tmp_path), "--kind", "shuffled_season"])
    assert "9 sessions" in capsys.readouterr().out
    assert (tmp_path / FILE).is_file()


@pytest.mark.parametrize("name", ["rees46", "yoochoose"])
def test_session_logs_are_known(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []

    def download(file: RemoteFile, folder: Path, page: str) -> Path:
        fetched.append(file.url)
        return folder / file.name

    monkeypatch.setattr(command, "download", download)
    command.main([name, "--output_path", str(tmp_path)])
    assert fetched == [SESSION_LOGS[name].url]
    said = capsys.readouterr().out
    assert SESSION_LOGS[name].terms in said
    assert f"recformer process --file_path {tmp_path / SESSION_LOGS[name].log} --protocol" in said


def test_yoochoose_clicks_as_they_are(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lines = []
    for session in range(90):
        day = 7 + session % 3
        for click in range(3):
            moment = f"2014-04-{day:02d}T1{click}:{draw.integers(10, 60)}:09.{100 + session}Z"
            lines.append(
                f"{session},{moment},2145{draw.integers(30):02d},{'0' if day < 9 else 'S'}"
            )
    (tmp_path / "yoochoose-clicks.dat").write_text("\n".join(lines) + "\n")
    main(
        ["--file_path", str(tmp_path / "yoochoose-clicks.dat"), "--output_path"]
        + [str(tmp_path / "out"), *SESSION_LOGS["yoochoose"].flags.split()]
    )
    windows = Windows.of(ProcessedFolder.load(tmp_path / "out"))
    assert windows is not None
    assert [own["starts"] for own in windows.about] == [
        f"2014-04-{day:02d}T00:00:00Z" for day in (7, 8, 9)
    ]
    assert [own["val_sequences"] for own in windows.about] == [0, 15, 15]
