"""Runs that are damaged or not finished: what `recformer leaderboard` says of them."""

from __future__ import annotations

import csv
import shutil

import pytest

from baselines import leaderboard
from baselines.command_lines import checked
from baselines.leaderboard import main
from baselines.rows import find_runs, rows_of
from recformer.files import UserError, read_json, write_json
from tests.baselines.test_leaderboard import write_run


def test_what_is_no_run_does_not_take_the_table_away(tmp_path, capsys):
    write_run(tmp_path / "good", [0] * 8)
    for name, text in (
        ("list", "[]"), ("foreign", '{"loss": 1}'), ("cut", '{"a'), ("other", '{"evaluations": 3}')
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    write_run(tmp_path / "unranked", [0] * 8)
    (tmp_path / "unranked" / "ranks" / "trained_test.parquet").unlink()
    write_run(tmp_path / "broken", [0] * 8)
    (tmp_path / "broken" / "ranks" / "trained_test.parquet").write_bytes(b"PAR1")
    # What may have been a run is missed; what another program wrote is not.
    with pytest.raises(UserError, match=r"^the tables lack broken, cut, unranked, see above: "):
        main([str(tmp_path)])
    ((row,),) = read_json(tmp_path / "leaderboard.json")
    assert (row["name"], row["figures"]["NDCG@10"]) == ("good", [1, 1, 1])
    said = capsys.readouterr().err
    for name in ("list", "foreign", "cut", "other", "unranked", "broken"):
        assert f"{tmp_path / name} is left out: " in said
    (tmp_path / "good" / "metrics.json").unlink()
    with pytest.raises(UserError, match="no run in .* could be read"):
        main([str(tmp_path)])


@pytest.mark.parametrize("settings", [True, False])
@pytest.mark.parametrize("spoil", ["ranks", "metrics.json", "unfinished"])
def test_a_row_of_seeds_says_which_of_them_it_lacks(tmp_path, capsys, settings, spoil):
    """Also where a run's settings are gone: its place says whose seed it is."""
    write_run(tmp_path / "popularity", [90] * 8, parameters=0)
    for seed in (1, 2, 3):
        folder = tmp_path / "sasrec" / f"seed_{seed}"
        write_run(folder, [0] * (8 - seed) + [5] * seed, seed=seed)
        write_json(folder / "run.json", {"model": "sasrec", "seed": seed})
    # Begun with another setting, which no row holds.
    (tmp_path / "wider" / "seed_1").mkdir(parents=True)
    write_json(tmp_path / "wider" / "seed_1" / "run.json", {"model": "sasrec", "hidden_size": 9})
    main([str(tmp_path)])
    assert "not finished, so in no table: wider/seed_1\n" in capsys.readouterr().err
    folder = tmp_path / "sasrec" / "seed_2"
    if spoil == "ranks":
        path = folder / "ranks" / "trained_test.parquet"
        content = path.read_bytes()
        path.write_bytes(content[:100] + b"XXXX" + content[104:])
    elif spoil == "metrics.json":
        (folder / spoil).write_text('{"evaluations": {"trai')
    else:
        (folder / "metrics.json").unlink()
    if not settings:
        (folder / "run.json").unlink()
    said = {
        "ranks": "remove metrics.json, evaluation and ranks there",
        "metrics.json": "remove metrics.json, evaluation and ranks there",
        "unfinished": "not finished: the command that began it goes on there",
    }
    with pytest.raises(UserError, match="^the tables lack sasrec/seed_2, .*") as error:
        main([str(tmp_path)])
    assert said[spoil] in str(error.value)
    out, err = capsys.readouterr()
    assert f"{folder} is left out: " in err
    text, latex = ((tmp_path / f"leaderboard.{ending}").read_text() for ending in ("md", "tex"))
    assert text in out
    for content in (text, latex):
        assert "corrected by Holm. sasrec (2 of 3 seeds) lacks sasrec/seed_2.\n" in content
        assert "Left out: sasrec/seed_2, " in content
    (rows,) = read_json(tmp_path / "leaderboard.json")
    assert {row["name"]: row.get("missing") for row in rows} == {
        "sasrec (2 of 3 seeds)": ["sasrec/seed_2"], "popularity": None,
    }  # fmt: skip
    with (tmp_path / "leaderboard.csv").open() as handle:
        assert [line["missing"] for line in csv.DictReader(handle)] == ["sasrec/seed_2", ""]
    # One seed that is left of two says so as well; without the folder nothing is missed.
    shutil.rmtree(tmp_path / "sasrec" / "seed_3")
    with pytest.raises(UserError, match="^the tables lack sasrec/seed_2, "):
        main([str(tmp_path)])
    assert "|sasrec/seed_1 (1 of 2 seeds)|" in capsys.readouterr().out
    shutil.rmtree(folder)
    main([str(tmp_path)])
    assert "|sasrec/seed_1|" in capsys.readouterr().out


def test_evaluations_of_a_damaged_seed_are_lacking_each_in_its_row(tmp_path):
    for seed in (1, 2, 3):
        folder = tmp_path / "head" / f"seed_{seed}"
        write_run(folder, [0, seed], ("zero_shot", "stage1"), seed=seed)
        write_json(folder / "run.json", {"pretrain_ckpt": "x", "seed": seed})
    ranks = tmp_path / "head" / "seed_3" / "ranks"
    for name, zero_shot in (("stage1", "3 seeds"), ("zero_shot", "2 of 3 seeds")):
        (ranks / f"{name}_test.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match="^the tables lack head/seed_3, see above"):
            main([str(tmp_path)])
        (rows,) = read_json(tmp_path / "leaderboard.json")
        assert {row["name"] for row in rows} == {
            "head (2 of 3 seeds)", f"head, zero-shot ({zero_shot})",
        }  # fmt: skip


def test_rows_without_a_list_of_what_is_left_out_are_all_rows(tmp_path):
    """So no caller has a mean over fewer seeds than it asked for."""
    for seed in (1, 2):
        write_run(tmp_path / f"seed_{seed}", [0, 1], seed=seed)
    (tmp_path / "seed_2" / "ranks" / "trained_test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="seed_2 has not the figures of a row: .* is damaged"):
        rows_of(find_runs(tmp_path), None)


def test_flags_that_cannot_be_read_are_no_reason_to_remove_figures(tmp_path):
    write_run(tmp_path / "sasrec", [0] * 8)
    write_run(tmp_path / "popularity", [90] * 8, parameters=0)
    (tmp_path / "sasrec" / "run.json").write_text('{"mo')
    with pytest.raises(UserError, match="^the tables lack sasrec, see above: put run.json back"):
        main([str(tmp_path)])


def test_a_damaged_run_is_no_reason_to_make_no_table(tmp_path):
    """Where models are named, it is looked at before the tables are made."""
    args = checked("baseline", ["--model", "popularity"])[0]
    for content in ('{"eval', "[]", '{"evaluations": 3}'):
        (tmp_path / "metrics.json").write_text(content)
        leaderboard._refuse_another(tmp_path, args, None, frozenset())


def test_a_seed_that_lies_there_twice_is_lacking_once(tmp_path):
    write_run(tmp_path / "a_1", [0] * 8, seed=1)
    write_json(tmp_path / "a_1" / "run.json", {"model": "sasrec", "seed": 1})
    for name in ("a_2", "b_2"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", {"model": "sasrec", "seed": 2})
    with pytest.raises(UserError, match="^the tables lack a_2, b_2, not finished"):
        main([str(tmp_path)])
    ((row,),) = read_json(tmp_path / "leaderboard.json")
    assert (row["name"], row["missing"]) == ("a_1 (1 of 2 seeds)", ["a_2", "b_2"])
