"""Popularity and text neighbours against ranks by hand, and their command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from baselines.__main__ import main
from baselines.leaderboard import main as leaderboard
from baselines.models import build
from baselines.settings import (
    CooccurrenceSettings,
    SknnSettings,
    TextNeighboursSettings,
    settings_of,
)
from baselines.untrained import base, text_neighbours
from baselines.untrained.base import Untrained, UntrainedUsers
from baselines.untrained.cooccurrence import Cooccurrence
from baselines.untrained.popularity import Popularity
from baselines.untrained.session_neighbours import SessionNeighbours
from baselines.untrained.text_neighbours import TextNeighbours, word_vectors
from recformer.commands.compare import main as compare
from recformer.data.collators import EvalExample
from recformer.data.processed import ProcessedFolder, Sequences, write_processed
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import TargetRanks, count_ranks, count_ranks_among
from recformer.evaluation.top_items import top_items
from recformer.files import UserError, read_json
from tests.tiny import tiny_bert


def write_folder(
    path: Path, texts: list[str | None], train: list, val: list, test: list
) -> ProcessedFolder:
    """A processed folder whose items have `texts` as their titles."""
    asins = [f"A{item}" for item in range(len(texts))]
    write_processed(
        path,
        train=Sequences.from_lists(train),
        val=Sequences.from_lists(val),
        test=Sequences.from_lists(test),
        user_names=[f"U{user}" for user in range(len(train))],
        asins=asins,
        meta={asin: {"title": t} for asin, t in zip(asins, texts, strict=True) if t is not None},
        dataset={},
    )
    return ProcessedFolder.load(path)


@pytest.fixture
def folder(tmp_path: Path) -> ProcessedFolder:
    # Each word is one direction: TF-IDF vectors of one word are equal or orthogonal.
    texts = ["alpha", "beta", "alpha", "beta", "gamma", None]
    train = [[0, 1], [0, 2], [4, 0, 0, 0]]
    return write_folder(tmp_path / "folder", texts, train, [[4], [3], [1]], [[2], [1], [5]])


def neighbours_of(folder: ProcessedFolder, **options: Any) -> TextNeighbours:
    return TextNeighbours(folder, TextNeighboursSettings(**options))


def ranks_of(
    model: Untrained, split: Literal["val", "test"] = "test", filter_seen: bool = False
) -> TargetRanks:
    examples = model.folder.eval_examples(split)
    seen = base.seen_pairs(examples.histories, slice(0, len(examples)))
    users = UntrainedUsers(examples.histories, seen)
    return model.rank(users, torch.from_numpy(examples.targets), filter_seen)


def figures_of(
    model: Untrained, metric_ks: tuple[int, ...] = (10, 50), ties: str = "expected"
) -> dict[str, float]:
    evaluator, examples = Evaluator(metric_ks, ties), model.folder.eval_examples("test")
    evaluator.update(examples.user_ids, examples.targets, ranks_of(model))
    return evaluator.compute()


def counts(ranks: TargetRanks) -> tuple[list[int], list[int], list[int]]:
    return ranks.above.tolist(), ranks.tied.tolist(), ranks.num_candidates.tolist()


def test_popularity_by_hand(folder: ProcessedFolder) -> None:
    popularity = Popularity(folder)
    assert popularity.counts.tolist() == [5, 1, 1, 0, 1, 0]
    ranks = ranks_of(popularity)
    # Targets 2, 1 and 5: below item 0 and among 1, 2, 4; the same; below these four and beside 3.
    assert counts(ranks) == ([1, 1, 4], [2, 2, 1], [6, 6, 6])
    figures = figures_of(popularity, (2, 5))
    assert figures["Recall@2"] == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert figures["Recall@5"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert figures["MRR"] == pytest.approx(
        (2 * (1 / 2 + 1 / 3 + 1 / 4) / 3 + (1 / 5 + 1 / 6) / 2) / 3
    )
    assert figures["NDCG@2"] == pytest.approx(2 * (1 / np.log2(3)) / 3 / 3)
    assert figures["tie_rate"] == 1
    assert figures["num_users"] == 3


def test_popularity_without_seen_items(folder: ProcessedFolder) -> None:
    ranks = ranks_of(Popularity(folder), filter_seen=True)
    # Histories {0, 1, 4}, {0, 2, 3} and {4, 0, 1} leave {2, 3, 5}, {1, 4, 5} and {2, 3, 5}.
    assert counts(ranks) == ([0, 0, 1], [0, 1, 1], [3, 3, 3])


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("model", [Popularity, TextNeighbours, Cooccurrence, SessionNeighbours])
def test_one_call_gives_what_a_full_matrix_of_scores_gives(
    folder: ProcessedFolder, model, filter_seen: bool
) -> None:
    examples, untrained = folder.eval_examples("test"), model(folder)
    everyone = slice(0, len(examples))
    seen = base.seen_pairs(examples.histories, everyone)
    scores = untrained.scores(examples.histories)(everyone)
    scores = torch.as_tensor(scores.toarray() if hasattr(scores, "toarray") else scores)
    targets = torch.from_numpy(examples.targets)
    users = UntrainedUsers(examples.histories, seen)
    for k in (2, 9):
        ranks, items = untrained.rank_and_recommend(users, targets, k, filter_seen)
        left_out = seen if filter_seen else None
        assert counts(ranks) == counts(count_ranks(scores, targets, left_out))
        assert items.tolist() == top_items(scores, k, left_out)[0].tolist()
        assert untrained.recommend(users, k, filter_seen).tolist() == items.tolist()
    candidates = np.array([[0, 1], [4, 5], [2, 2]])
    among = untrained.rank_among(users, targets, candidates)
    assert counts(among) == counts(count_ranks_among(scores, targets, candidates))


def test_popularity_counts_training_alone(folder: ProcessedFolder) -> None:
    ranks = ranks_of(Popularity(folder), "val")
    # Targets 4, 3 and 1; that 3 and 4 are validation items does not count.
    assert counts(ranks) == ([1, 4, 1], [2, 1, 2], [6, 6, 6])


def test_neighbours_by_hand(folder: ProcessedFolder) -> None:
    ranks = ranks_of(neighbours_of(folder, decay=0.6))
    # Histories [0, 1, 4]: alpha .36, beta .6, gamma 1; [0, 2, 3]: alpha .96, beta 1;
    # [4, 0, 0, 0, 1]: alpha 1.176, beta 1, gamma .1296. Item 5 has no text: 0.
    assert counts(ranks) == ([3, 0, 5], [1, 1, 0], [6, 6, 6])


def test_weights_of_repeated_items_add_up(folder: ProcessedFolder) -> None:
    examples = folder.eval_examples("test")
    neighbours = neighbours_of(folder, decay=0.6)
    weights = text_neighbours.history_weights(examples.histories, 6, 0.6).toarray()
    expected = [
        [0.36, 0.6, 0, 0, 1, 0],
        [0.36, 0, 0.6, 1, 0, 0],
        [0.6 + 0.36 + 0.216, 1, 0, 0, 0.1296, 0],
    ]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert neighbours.decay == 0.6


def test_decay_zero_is_the_last_item_and_one_the_whole_history(folder: ProcessedFolder) -> None:
    last = ranks_of(neighbours_of(folder, decay=0))
    # gamma; beta; beta: everything else has nothing in common with them and ties.
    assert counts(last) == ([1, 0, 2], [4, 1, 3], [6, 6, 6])
    alike = ranks_of(neighbours_of(folder, decay=1))
    # alpha beta gamma 1; alpha 2, beta 1; alpha 3, beta and gamma 1, no text 0.
    assert counts(alike) == ([0, 2, 5], [4, 1, 0], [6, 6, 6])


@pytest.mark.parametrize("filter_seen", [False, True])
def test_chunks_change_nothing(
    folder: ProcessedFolder, monkeypatch: pytest.MonkeyPatch, filter_seen: bool
) -> None:
    models = [Popularity(folder), TextNeighbours(folder)]
    whole = [counts(ranks_of(model, filter_seen=filter_seen)) for model in models]
    for size in (1, 12):
        monkeypatch.setattr(base, "SCORES_AT_A_TIME", size)
        assert [counts(ranks_of(model, filter_seen=filter_seen)) for model in models] == whole


def test_histories_longer_than_all_training_are_read_whole(tmp_path: Path) -> None:
    """A temporal split may leave most of a user behind the cut."""
    folder = write_folder(
        tmp_path, ["alpha", "beta", "gamma"], [[0, 1]], [[0] * 5 + [1] * 3], [[0]]
    )
    built = build("text_neighbours", settings_of("text_neighbours", {"decay": 1}), folder)
    history = folder.eval_examples("test").histories[0]
    batch = built.eval_collator([EvalExample(0, history, 0)])
    users = built.model.read(batch.history, batch.seen)
    # alpha 6, beta 4; of the newest 5 alone beta would come first
    assert counts(built.model.rank(users, batch.labels, False)) == ([0], [0], [3])


def test_neighbours_without_seen_items(folder: ProcessedFolder) -> None:
    ranks = ranks_of(TextNeighbours(folder), filter_seen=True)
    # {2, 3, 5}: beta above alpha; {1, 4, 5}: beta first; {2, 3, 5}: no text last.
    assert counts(ranks) == ([1, 0, 2], [0, 0, 0], [3, 3, 3])


def test_values_of_all_attributes_are_the_text(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["one", "two"], [[0]], [[1]], [[1]])
    folder.items[0]["brand"] = "two"
    neighbours = TextNeighbours(folder)
    # "one two" and "two": idf(one) = ln(3/2) + 1, idf(two) = 1.
    idf = np.log(3 / 2) + 1
    expected = 1 / np.sqrt(1 + idf**2)
    assert (neighbours.vectors[[0]] @ neighbours.vectors[[1]].T).toarray()[0, 0] == pytest.approx(
        expected
    )


def test_scripts_without_spaces_are_cut_into_pairs(tmp_path: Path) -> None:
    texts: list[str | None] = ["無線イヤホン", "無線充電", "保温杯 red", "red cup"]
    folder = write_folder(tmp_path, texts, [[0]], [[1]], [[1]])
    vectors = TextNeighbours(folder).vectors
    # Pairs: 無線 線イ イヤ ヤホ ホン, 無線 線充 充電, 保温 温杯; words: red cup.
    assert vectors.shape == (4, 11)
    alike = (vectors @ vectors.T).toarray()
    assert alike[0, 1] > 0
    assert alike[2, 3] > 0
    assert alike[0, 2] == alike[1, 3] == 0


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, ["one", None], [[0]], [[1]], [[1]])
    with pytest.raises(UserError, match="--decay 1.5: expected from 0 to 1"):
        neighbours_of(folder, decay=1.5)
    with pytest.raises(ValueError, match="'train'"):
        folder.eval_examples("train")  # type: ignore[arg-type]
    folder.items[0]["title"] = " "
    with pytest.raises(UserError, match="no item of .* has any text"):
        TextNeighbours(folder)
    folder.items[0]["title"] = "& -"
    with pytest.raises(UserError, match="no words"):
        TextNeighbours(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder"), ["alpha", "beta", "gamma"])


def test_neighbours_by_a_text_encoder(folder: ProcessedFolder, encoder: Path) -> None:
    neighbours = neighbours_of(folder, decay=0, text_encoder=str(encoder))
    a, b, _, _, g, none = neighbours.vectors.astype(float)
    assert np.linalg.norm(none) == 0
    ranks = ranks_of(neighbours)
    # The last items are gamma, beta and beta; texts of one word have the same vector.
    assert ranks.above.tolist() == [1 + 2 * int(b @ g > a @ g) + int(a @ g < 0), 0, (
        2 + 2 * int(a @ b > 0) + int(g @ b > 0)
    )]  # fmt: skip
    assert ranks.tied.tolist() == [1, 1, 0]
    seen = ranks_of(neighbours, filter_seen=True)
    assert seen.num_candidates.tolist() == [3, 3, 3]
    assert seen.above[1] == 0
    assert seen.tied[1] == 0


def test_a_missing_encoder_is_a_clear_error(folder: ProcessedFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gives no text encoder"):
        neighbours_of(folder, text_encoder=str(tmp_path / "nothing"))


def test_the_command_writes_figures_and_ranks(
    folder: ProcessedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    main(
        [
            *("--model", "text_neighbours", "--data_path", str(folder.path), "--decay", "0"),
            *("--output_dir", str(output), "--metric_ks", "1", "3", "--ties", "pessimistic"),
        ]
    )
    printed = capsys.readouterr().out
    assert "test, 3 users, full ranking, ties pessimistic, seen items kept" in printed
    result = read_json(output / "metrics.json")
    figures = figures_of(neighbours_of(folder, decay=0), (1, 3), "pessimistic")
    assert result["test"].items() > figures.items()
    assert figures["MRR"] == pytest.approx((1 / 6 + 1 / 2 + 1 / 6) / 3)  # by hand, above
    assert {k: result[k] for k in ("model", "settings", "ties", "filter_seen", "split_hash")} == {
        "model": "text_neighbours",
        "settings": {"decay": 0, "text_encoder": None, "weighting": "tfidf", "history_factor": 1.0},
        "ties": "pessimistic",
        "filter_seen": False,
        "split_hash": folder.split_hash,
    }
    ranks = pq.read_table(output / "ranks" / "untrained_test.parquet").to_pydict()
    assert ranks["user_id"] == [0, 1, 2]
    assert ranks["target"] == [2, 1, 5]
    assert ranks["above"] == [1, 0, 2]
    assert ranks["tied"] == [4, 1, 3]
    assert ranks["num_candidates"] == [6, 6, 6]


def test_a_sample_of_test_users_is_named_wherever_figures_stand(
    folder: ProcessedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "popularity", "--data_path", str(folder.path), "--test_users", "2"]
    run = tmp_path / "runs" / "one"
    main([*command, "--output_dir", str(run)])
    printed = capsys.readouterr().out
    assert "test, 2 users drawn from 3, full ranking" in printed
    assert "95 % (2 of 3 users) from" in printed
    result = read_json(run / "metrics.json")
    assert (result["test_users"], result["test"]["drawn_from"]) == (2, 3)
    assert "drawn_from" not in result["validation"]
    ranks = pq.read_table(run / "ranks" / "untrained_test.parquet").to_pydict()
    assert len(ranks["user_id"]) == 2
    leaderboard([str(run.parent)])
    assert "2 of 3 test users, full ranking" in capsys.readouterr().out
    compare([f"a={run}", f"b={run}"])
    assert "2 of 3 test users, full ranking" in capsys.readouterr().out
    with pytest.raises(UserError, match="--test_users 0: must be at least 1"):
        main([*command[:-1], "0"])


def test_a_flag_of_another_model_is_refused(folder: ProcessedFolder) -> None:
    with pytest.raises(UserError, match="--decay is no flag of --model popularity"):
        main(["--model", "popularity", "--data_path", str(folder.path), "--decay", "0.5"])


def test_errors_of_the_command(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "baselines", "--data_path", str(tmp_path / "nothing")]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "nothing") in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.real_data
def test_lines_on_scientific(real_data: Path, tmp_path: Path) -> None:
    """Measured with the published processing of the 8,442-user version."""
    from recformer.preparation.finetuning import prepare_finetuning

    raw = real_data / "scientific"
    prepare_finetuning(
        raw / "Industrial_and_Scientific_5.json.gz",
        raw / "meta_Industrial_and_Scientific.json.gz",
        tmp_path,
    )
    folder = ProcessedFolder.load(tmp_path)
    popularity = figures_of(Popularity(folder))
    assert popularity["num_users"] == 8442
    assert popularity["NDCG@10"] == pytest.approx(0.0171, abs=1e-4)
    neighbours = figures_of(TextNeighbours(folder))
    assert neighbours["NDCG@10"] == pytest.approx(0.0541, abs=1e-3)
    assert neighbours["Recall@10"] == pytest.approx(0.1118, abs=2e-3)


@pytest.mark.parametrize(
    ("model", "settings"),
    [(TextNeighbours, TextNeighboursSettings), (Cooccurrence, CooccurrenceSettings)],
)
def test_items_of_the_history_have_their_scores_multiplied(
    folder: ProcessedFolder, model, settings
) -> None:
    histories = folder.eval_examples("test").histories
    plain = model(folder).scores(histories)(slice(0, 3)).toarray()
    scaled = model(folder, settings(history_factor=0.25)).scores(histories)(slice(0, 3)).toarray()
    for row, history in enumerate(histories[row] for row in range(3)):
        expected = np.array(plain[row])
        expected[np.unique(history)] *= 0.25  # once, however often it was bought
        assert scaled[row] == pytest.approx(expected)
    assert (scaled != plain).any()
    with pytest.raises(UserError, match="--history_factor 1.5"):
        settings(history_factor=1.5)


def test_bm25_by_hand() -> None:
    rows = word_vectors(["red red lamp", "red tent"], "bm25").toarray()  # lamp, red, tent
    once, both = np.log1p(1.5 / 1.5), np.log1p(0.5 / 2.5)
    long = 1.2 * (1 - 0.75 + 0.75 * 3 / 2.5)
    expected = np.array([once * 2.2 / (1 + long), both * 2.2 * 2 / (2 + long), 0])
    assert rows[0] == pytest.approx(expected / np.linalg.norm(expected))
    with pytest.raises(UserError, match="--weighting idf"):
        TextNeighboursSettings(weighting="idf")


@pytest.fixture
def sessions(tmp_path: Path) -> ProcessedFolder:
    train = [[0, 1, 2], [1, 3, 1], [2, 3, 4], []]
    return write_folder(tmp_path, [None] * 6, train, [[], [], [], [1]], [[], [], [], [2, 0]])


def test_session_neighbours_by_hand(sessions: ProcessedFolder) -> None:
    histories = sessions.eval_examples("test").histories
    assert histories[0].tolist() == [1, 2]
    a, b, c = 2 / np.sqrt(2 * 3), 1 / np.sqrt(2 * 2), 1 / np.sqrt(2 * 3)
    scores = SessionNeighbours(sessions).scores(histories)(slice(0, 1)).toarray()
    assert scores[0] == pytest.approx([a, a + b, a + c, b + c, c, 0])
    nearest = SessionNeighbours(sessions, SknnSettings(1)).scores(histories)(slice(0, 1)).toarray()
    assert nearest[0] == pytest.approx([a, a, a, 0, 0, 0])
    # Items 1 and 2 weigh 1/2 and 1: the sequences 3/2, 1/2 and 1.
    model = SessionNeighbours(sessions, SknnSettings(2), weighted=True)
    assert model.scores(histories)(slice(0, 1)).toarray()[0] == pytest.approx(
        [1.5, 1.5, 2.5, 1, 1, 0]
    )
    ranks = ranks_of(model)  # item 0 is below 2 and beside 1
    assert counts(ranks) == ([1], [1], [6])
    with pytest.raises(UserError, match="--neighbours 0"):
        SknnSettings(0)


def test_session_neighbours_are_those_of_loops_over_sets(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lists = [generator.integers(30, size=n).tolist() for n in generator.integers(1, 9, size=40)]
    folder = write_folder(tmp_path, [None] * 30, lists, [[1]] * 40, [[2]] * 40)
    histories = folder.eval_examples("test").histories
    for weighted in (False, True):
        model = SessionNeighbours(folder, SknnSettings(7), weighted=weighted)
        found = model.scores(histories)(slice(0, 40)).toarray()
        for user, row in enumerate(found):
            history = histories[user].tolist()
            weight = {item: (place + 1) / len(history) for place, item in enumerate(history)}
            alike = []
            for other in map(set, lists):
                both = set(history) & other
                cosine = len(both) / np.sqrt(len(set(history)) * len(other))
                alike.append(sum(weight[i] for i in both) if weighted else cosine)
            expected = np.zeros(30)
            for other in sorted(range(40), key=lambda n: (-round(alike[n], 12), n))[:7]:
                expected[list(set(lists[other]))] += alike[other]
            assert row == pytest.approx(expected)


def test_session_neighbours_keep_the_contract(sessions: ProcessedFolder) -> None:
    built = build("vsknn", settings_of("vsknn", {"neighbours": 2}), sessions)
    batch = built.eval_collator([EvalExample(0, np.array([1, 2]), 0)])
    users = built.model.read(batch.history, batch.seen)
    assert built.model.recommend(users, 4, False).tolist() == [[2, 0, 1, 3]]
    assert built.model.recommend(users, 4, True).tolist() == [[0, 3, 4, 5]]
    assert counts(built.model.rank(users, batch.labels, True)) == ([0], [0], [4])
    among = built.model.rank_among(users, batch.labels, np.array([[2, 3]]))
    assert counts(among) == ([1], [0], [3])
