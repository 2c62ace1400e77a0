"""Models window after window: weights go on, nothing leaks, a run goes on where it stopped."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import baselines.__main__ as entry
from baselines.__main__ import main
from baselines.leaderboard import main as leaderboard
from baselines.models import build
from baselines.semantic_ids.ids import SemanticIds
from baselines.settings import settings_of
from baselines.windows import go_on_from
from recformer.commands.compare import main as compare
from recformer.data.windows import Windows
from recformer.evaluation.metrics import per_user_metrics
from recformer.evaluation.runs import RankedRun, RunResult, read_ranks
from recformer.files import UserError, read_json
from tests.preparation.test_windows import folder

SMALL = ["--hidden_size", "8", "--num_layers", "1", "--num_heads", "1", "--max_length", "6"]
TRAIN = [*SMALL, "--num_train_epochs", "2", "--batch_size", "32", "--metric_ks", "5", "10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("windows")).path


def run(data: Path, out: Path, *flags: str) -> RunResult:
    main(["--data_path", str(data), "--output_dir", str(out), *flags])
    return RunResult.load(out)


def test_untrained_lines_know_all_that_came_before(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path, "--model", "popularity", "--metric_ks", "5", "10")
    windows = Windows.of(entry.ProcessedFolder.load(data))
    assert windows is not None
    assert [row["number"] for row in result.test["windows"]] == [1, 2, 3, 4]
    columns = read_ranks(tmp_path / "ranks" / "untrained_test.parquet")
    for number in (1, 3):  # by hand: how often every item was met before
        view = windows.view(number)
        counts = np.bincount(
            windows.joined.items[windows.windows < number], minlength=view.num_items
        )
        chosen = windows.windows[columns["user_id"]] == number
        for target, above, among in zip(
            *(columns[n][chosen] for n in ("target", "above", "num_candidates"))
        ):
            assert above == (counts[: view.num_items] > counts[target]).sum()
            assert among == view.num_items
    assert result.test["num_users"] == len(columns["user_id"])
    compared = RankedRun.read(tmp_path)
    assert compared.sequences is not None
    np.testing.assert_array_equal(compared.sequences, windows.joined.rows[columns["user_id"]])
    assert (tmp_path / "windows.png").stat().st_size > 5000
    table = (tmp_path / "windows.md").read_text()
    assert table.count("\n") == 8
    # The same as LaTeX, and as CSV with all digits; a finished run of before gets them, too.
    for _ in range(2):
        latex = (tmp_path / "windows.tex").read_text()
        for line in table.splitlines()[2:]:
            assert " & ".join(line.strip("|").split("|")) in latex
        with (tmp_path / "windows.csv").open() as handle:
            lines = list(csv.DictReader(handle))
        expected = [row["NDCG@10"] for row in result.test["windows"]]
        expected += [result.test["NDCG@10"]] * 2
        assert [float(line["NDCG@10"]) for line in lines] == expected
        low, high = result.test["intervals_by_window"]["Recall@5"]
        assert [float(lines[-1][f"Recall@5 {end}"]) for end in ("low", "high")] == [low, high]
        for ending in ("tex", "csv"):
            (tmp_path / f"windows.{ending}").unlink()
        run(data, tmp_path, "--model", "popularity", "--metric_ks", "5", "10")


@pytest.mark.parametrize("mode", ["incremental", "scratch"])
def test_a_run_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    flags = ["--model", "sasrec", "--windows", mode, *TRAIN]
    whole = run(data, tmp_path / "whole", *flags)
    inner = entry.run_one
    seen: list[Any] = []

    def stops(args: Any, settings: Any, view: Any, before: Any = None, **rest: Any) -> Any:
        seen.append((view.window, None if before is None else before.parent.name))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return inner(args, settings, view, before, **rest)

    monkeypatch.setattr(entry, "run_one", stops)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "cut", *flags)
    kept = (tmp_path / "cut/windows/002/metrics.json").stat().st_mtime_ns
    again = run(data, tmp_path / "cut", *flags)
    assert (tmp_path / "cut/windows/002/metrics.json").stat().st_mtime_ns == kept
    earlier = [None, "001", "002"] if mode == "incremental" else [None] * 3
    assert seen[:3] == list(zip([1, 2, 3], earlier))
    for name in ("NDCG@10", "MRR", "intervals", "windows"):
        assert again.test[name] == whole.test[name]
    assert again.train_seconds is not None
    assert list(again.stages) == [f"training {n}" for n in (1, 2, 3, 4)]
    count = len(seen)
    run(data, tmp_path / "cut", *flags)  # finished: nothing is done again
    assert len(seen) == count


def test_weights_go_on_and_tables_grow(data: Path, tmp_path: Path) -> None:
    windows = Windows.of(entry.ProcessedFolder.load(data))
    assert windows is not None
    settings = settings_of("sasrec", {"hidden_size": 8, "num_heads": 1})
    first, second = windows.view(1), windows.view(2)
    assert first.num_items < second.num_items
    args = ["--model", "sasrec", *TRAIN]
    run(data, tmp_path, *args)
    before = load_file(tmp_path / "windows/001/best_model/model.safetensors")
    small = settings_of(
        "sasrec", read_json(tmp_path / "windows/001/best_model/config.json")["settings"]
    )
    model = build("sasrec", small, second).model
    torch.manual_seed(0)
    new = model.state_dict()["inputs.item_embedding.weight"][first.num_items :].clone()
    go_on_from(model, tmp_path / "windows/001/best_model")
    table = model.state_dict()["inputs.item_embedding.weight"]
    assert torch.equal(table[: first.num_items], before["inputs.item_embedding.weight"])
    assert torch.equal(table[first.num_items :], new)
    assert torch.equal(
        model.state_dict()["network.seq_norm.weight"], before["network.seq_norm.weight"]
    )
    with pytest.raises(UserError, match="has shape|another model"):
        go_on_from(build("sasrec", settings, second).model, tmp_path / "windows/001/best_model")


def test_windows_have_no_users_for_tokens(data: Path, tmp_path: Path) -> None:
    folder = entry.ProcessedFolder.load(data)
    windows = Windows.of(folder)
    assert windows is not None
    codes = np.stack(np.unravel_index(np.arange(folder.num_items), (64, 64)), axis=1)
    path = tmp_path / "semantic_ids.json"
    SemanticIds(folder.asins, codes, 2, [64, 64], "test", "none").save(path)
    settings = settings_of("tiger", {"semantic_ids": str(path), "user_tokens": 8})
    with pytest.raises(UserError, match="--user_tokens: the sequences of windows are no users"):
        build("tiger", settings, windows.view(1))


def test_runs_of_other_cut_offs_stand_in_the_leaderboard(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of the published protocols, which have @20 alone."""
    for model in ("popularity", "cooccurrence"):
        run(data, tmp_path / model, "--model", model, "--metric_ks", "20")
    capsys.readouterr()
    leaderboard([str(tmp_path), "--data_path", str(data)])
    shown = capsys.readouterr()
    assert "is left out" not in shown.err
    targets = RunResult.load(tmp_path / "popularity").test["windows"]
    number = int(sum(window["num_users"] for window in targets))
    assert f"{number} targets, full ranking" in shown.out
    assert "intervals over sessions" in shown.out
    for model in ("popularity", "cooccurrence"):
        values = per_user_metrics(RankedRun.read(tmp_path / model).ranks, (10,), "expected")
        assert f"|{model}|{values['NDCG@10'].mean():.4f}" in shown.out
    compare([str(tmp_path / "popularity"), str(tmp_path / "cooccurrence")])
    assert f"{number} targets, full ranking" in capsys.readouterr().out


def test_items_nobody_met_are_no_negatives(data: Path) -> None:
    windows = Windows.of(entry.ProcessedFolder.load(data))
    assert windows is not None
    view = windows.view(2)
    assert view.num_trained_items < view.num_items
    for loss in ("softmax", "bce", "sampled_softmax"):
        settings = settings_of(
            "sasrec", {"hidden_size": 8, "num_heads": 1, "loss": loss, "num_negatives": 300}
        )
        built = build("sasrec", settings, view)
        examples = [entry.SeqRecDataModule(
            view, built.train_collator, built.eval_collator, 8
        ).train_set[[(0, 1)]][0]]  # fmt: skip
        built.model.training_loss(built.train_collator(examples)).backward()
        grad = built.model.inputs.item_embedding.weight.grad
        assert (grad[: view.num_trained_items] != 0).any(dim=1).all()
        assert (grad[view.num_trained_items :] == 0).all()


def test_run_folder_of_another_mode_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, "--model", "popularity")
    with pytest.raises(UserError, match="holds another run .different: windows"):
        run(data, tmp_path, "--model", "popularity", "--windows", "scratch")
    assert "windows" in json.loads((tmp_path / "run.json").read_text())


def test_other_targets_over_the_same_split_are_another_run(tmp_path: Path) -> None:
    found = {}
    for name in ("every", "last"):
        (tmp_path / name).mkdir()
        found[name] = folder(tmp_path / name, "--targets", name, seed=1)
    every, last = found["every"], found["last"]
    assert every.split_hash == last.split_hash  # who validates and who tests does not change
    out, flags = tmp_path / "out", ("--model", "popularity", "--metric_ks", "5", "10")
    first = run(every.path, out, *flags)
    with pytest.raises(UserError, match=r"holds another run .different: windows_hash"):
        run(last.path, out, *flags)
    second = run(last.path, tmp_path / "other", *flags)
    assert second.test["num_users"] < first.test["num_users"]


def test_a_flipped_bit_of_the_window_before_goes_into_no_other(data: Path, tmp_path: Path) -> None:
    flags = ["--model", "sasrec", *TRAIN]
    run(data, tmp_path, *flags)
    weights = tmp_path / "windows/003/best_model/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    shutil.rmtree(tmp_path / "windows/004")
    (tmp_path / "metrics.json").unlink()
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        run(data, tmp_path, *flags)


def test_windows_that_the_interactions_do_not_have_are_refused(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    about = read_json(copy / "dataset.json")
    about["split"]["windows"][2]["items_known"] -= 1
    (copy / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="has other windows than interactions.parquet"):
        Windows.of(entry.ProcessedFolder.load(copy))
