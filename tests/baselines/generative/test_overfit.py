"""Models over codes learn a few users by heart: what they were trained on comes out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.__main__ import run
from baselines.arguments import BaselineArguments
from baselines.semantic_ids.ids import SemanticIds
from recformer.data.overfit import OverfitView
from recformer.data.processed import ProcessedFolder, write_processed
from recformer.data.sequences import Sequences
from recformer.files import UserError, read_json

N = 300
ENTROPY = 4.338  # of the items that twenty users are trained on, in nats


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 users of 3 to 8 random items, of which nothing can be guessed."""
    path = tmp_path_factory.mktemp("overfit") / "folder"
    draw = np.random.default_rng(0)
    rows = [draw.choice(N, 5 + user % 6, replace=False).tolist() for user in range(60)]
    write_processed(
        path,
        train=Sequences.from_lists([row[:-2] for row in rows]),
        val=Sequences.from_lists([row[-2:-1] for row in rows]),
        test=Sequences.from_lists([row[-1:] for row in rows]),
        user_names=[f"u{user}" for user in range(60)],
        asins=[f"i{item}" for item in range(N)],
        meta={f"i{item}": {"title": f"thing {item}"} for item in range(N)},
        dataset={},
    )
    return path


@pytest.fixture(scope="module")
def semantic_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three levels of codes in no order."""
    path = tmp_path_factory.mktemp("codes") / "semantic_ids.json"
    every = np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), axis=1)
    codes = np.random.default_rng(1).permutation(every)[:N]
    asins = [f"i{item}" for item in range(N)]
    SemanticIds(asins, codes, 3, [8, 8, 8], "test", "none").save(path)
    return path


@pytest.mark.parametrize(
    "own",
    [
        {"model": "tiger", "num_train_epochs": 120, "head_size": 32, "feed_forward_size": 128},
        {"model": "gpt2_codes", "num_train_epochs": 60, "learning_rate": 3e-3},
    ],
    ids=["tiger", "gpt2_codes"],
)
def test_twenty_users_are_learned_by_heart(
    own: dict[str, Any], data: Path, semantic_ids: Path, tmp_path: Path
) -> None:
    args = BaselineArguments(
        data_path=str(data),
        output_dir=str(tmp_path),
        semantic_ids=str(semantic_ids),
        overfit_users=20,
        hidden_size=64,
        num_layers=1,
        num_heads=2,
        dropout=0.0,
        num_beams=10,
        metric_ks=[1, 10],
        batch_size=20,
        verbose=1000,
        device=[-1],
        **own,
    )
    result = run(args)
    test = result["test"]
    assert test["num_users"] == 20
    assert test["Recall@10"] == 1
    # Far below what can be known of the codes without knowing them by heart.
    assert sum(test["code_loss"].values()) < 0.4 * ENTROPY
    assert sum(test["code_entropy"]["given_before"]) == pytest.approx(ENTROPY, abs=0.01)
    rows = result["stages"]["training"]["rows"]
    assert rows[-1]["train/code_loss@1"] < 1.5 < rows[0]["train/code_loss@1"]
    assert rows[-1]["val/code_loss@3"] == pytest.approx(test["code_loss"]["3"], rel=1e-4)


def test_a_run_from_before_there_were_tokens_of_users_goes_on(
    data: Path, semantic_ids: Path, tmp_path: Path
) -> None:
    args = BaselineArguments(
        model="tiger", data_path=str(data), output_dir=str(tmp_path), device=[-1], hidden_size=16,
        semantic_ids=str(semantic_ids), num_layers=1, num_heads=1, head_size=8, num_beams=10,
        feed_forward_size=16, num_train_epochs=1, metric_ks=[10], optimizer="adamw",
    )  # fmt: skip
    before = run(replace(args))
    settings = read_json(tmp_path / "run.json")
    assert not {"user_tokens", "schedule", "optimizer"} & settings.keys()
    assert run(replace(args))["test"] == before["test"]
    with pytest.raises(UserError, match="holds another run .different: user_tokens"):
        run(replace(args, user_tokens=4))


def test_examples_of_the_view_by_hand(data: Path) -> None:
    folder = ProcessedFolder.load(data)
    view = OverfitView.of(folder, 7, seed=3)
    assert len(view.train_users) == 7
    for split in ("val", "test"):
        examples = view.eval_examples(split)
        assert examples.user_ids.tolist() == view.train_users.tolist()
        for row, user in enumerate(view.train_users):
            *before, last = folder.train[user].tolist()
            assert examples.histories[row].tolist() == before
            assert examples.targets[row] == last
            assert examples.starts[row] == folder.interaction_offsets()[user]
    assert OverfitView.of(folder, 7, seed=3).split_hash == view.split_hash
    assert len({view.split_hash, OverfitView.of(folder, 7, 4).split_hash, folder.split_hash}) == 3


def test_more_users_than_there_are_are_refused(data: Path) -> None:
    with pytest.raises(UserError, match="--overfit_users 61: .* has 60 users to train on"):
        OverfitView.of(ProcessedFolder.load(data), 61, seed=0)
    with pytest.raises(UserError, match="--overfit_users 0: must be at least 1"):
        BaselineArguments(overfit_users=0).check()
