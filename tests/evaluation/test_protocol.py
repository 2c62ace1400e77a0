"""Protocol files: what they may hold, what wins, what is recorded, what is refused."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from baselines.__main__ import main
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.protocol import FOLDER, Protocol, with_protocol
from recformer.files import UserError, read_json
from recformer.finetune import FinetuneArguments

NAMES = [
    "gsasrec_ml1m", "recformer", "s3rec_tiger", "t4rec_rees46", "t4rec_yoochoose", "temporal",
    "text4rec", "unisrec",
]  # fmt: skip


def test_the_published_protocols_are_there():
    assert sorted(file.stem for file in FOLDER.iterdir()) == NAMES
    gsasrec = Protocol.load("gsasrec_ml1m")
    assert gsasrec.parts["data"]["val_users"] == 512
    assert gsasrec.parts["evaluation"]["filter_seen"] is True
    assert Protocol.load("text4rec").parts["evaluation"]["sampled_negatives"] == 100
    assert Protocol.load("recformer").parts["data"]["min_interactions"] == 4
    assert Protocol.load(str(FOLDER / "temporal.yaml")) == Protocol.load("temporal")


@pytest.mark.parametrize("name", NAMES)
def test_entry_points_take_every_protocol(name):
    parser = HfArgumentParser(FinetuneArguments)
    argv = with_protocol(["--protocol", name], "evaluation")
    (args,) = parser.parse_args_into_dataclasses(argv)
    assert args.protocol_record() == {
        "name": name,
        "hash": Protocol.load(name).hash,
        "changed": {},
    }
    args.check()


def test_flags_of_the_command_line_win():
    given = ["--metric_ks", "7", "--protocol", "gsasrec_ml1m", "--filter_seen", "False"]
    argv = with_protocol(given, "evaluation")
    assert argv == ["--metric_ks", "1", "10", "--filter_seen", "--ties", "expected", *given]
    (args,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses(argv)
    assert (args.metric_ks, args.filter_seen) == ([7], False)
    assert args.protocol_record()["changed"] == {"metric_ks": [7], "filter_seen": False}
    assert with_protocol(["--metric_ks", "7"], "evaluation") == ["--metric_ks", "7"]


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_hash_is_that_of_what_is_prescribed(tmp_path):
    one = Protocol.load(written(tmp_path, "data: {k_core: 5, seed: 1}  # why\n"))
    two = Protocol.load(written(tmp_path, "# else\nevaluation: {}\ndata:\n seed: 1\n k_core: 5\n"))
    other = Protocol.load(written(tmp_path, "data: {k_core: 5, seed: 2}\n"))
    assert one.name == "mine"
    assert one.hash == two.hash != other.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "mine.yaml: model is not known, expected data, evaluation"),
        ("data: {kcore: 5}", "mine.yaml, data: kcore is not known, expected split"),
        ("evaluation: {k_core: 5}", "mine.yaml, evaluation: k_core is not known"),
        ("data: 5", "mine.yaml, data: expected a mapping of split.* got 5"),
        ("data: {k_core: }", "k_core is None, expected a value"),
        ("data: {k_core: {a: 1}}", "k_core is .*, expected a value"),
        ("data: [", "mine.yaml is no YAML"),
        ("[" * 20_000, "mine.yaml is no YAML: nested too deep"),
        ("data: 2014-02-99", "mine.yaml is no YAML: day is out of range"),
        ("", "mine.yaml: expected a mapping of data, evaluation, got None"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        Protocol.load(written(tmp_path, text))


def test_an_unknown_protocol_names_those_there_are():
    with pytest.raises(FileNotFoundError, match=f"--protocol none: .* {', '.join(NAMES)}"):
        Protocol.load("none")
    with pytest.raises(FileNotFoundError, match="--protocol none"):
        FinetuneArguments(protocol="none").check()


@pytest.fixture
def process(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch):
    """Run finetune_data/process.py on users a to f, who each met items 0 to 5 and 0 again."""
    with open(tmp_path / "log.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["user_id", "item_id", "timestamp"])
        for user in "abcdef":
            rows.writerows([user, f"i{item}", time] for time, item in enumerate([0, 1, 2, 3, 4, 5]))
            rows.writerow([user, "i5", 5])  # the same again, at the same time
    with open(tmp_path / "items.csv", "w", newline="") as handle:
        csv.writer(handle).writerows(
            [["item_id", "title"], *([f"i{n}", f"T{n}"] for n in range(6))]
        )

    def run(*flags: str) -> Path:
        out = tmp_path / "out"
        files = ["--file_path", tmp_path / "log.csv", "--meta_file_path", tmp_path / "items.csv"]
        argv = ["process.py", *files, "--output_path", out, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(repository / "finetune_data/process.py"), run_name="__main__")
        return out

    return run


def test_data_follow_a_protocol_and_say_so(process, capsys):
    folder = process("--protocol", "unisrec")
    printed = capsys.readouterr().out
    assert "duplicates removed: 6\n" in printed
    assert "6 duplicate reviews; split" in printed
    about = read_json(folder / "dataset.json")
    assert about["protocol"] == {
        "name": "unisrec",
        "hash": Protocol.load("unisrec").hash,
        "changed": {},
    }
    assert about["parameters"]["k_core"] == 5
    assert about["counts"]["filters"]["duplicates_removed"] == 6
    assert ProcessedFolder.load(folder).train[0].tolist() == [0, 1, 2, 3]
    about = read_json(process("--protocol", "unisrec", "--no-deduplicate") / "dataset.json")
    assert about["protocol"]["changed"] == {"deduplicate": False}
    assert "duplicates_removed" not in about["counts"].get("filters", {})


def test_evaluation_under_another_protocol_than_the_data(process, tmp_path):
    folder = process("--protocol", "s3rec_tiger")
    flags = ["--model", "popularity", "--data_path", str(folder), "--output_dir"]
    with pytest.raises(
        UserError, match=r"processed under protocol s3rec_tiger .* not under unisrec"
    ):
        main([*flags, str(tmp_path / "wrong"), "--protocol", "unisrec"])
    assert not (tmp_path / "wrong" / "metrics.json").exists()
    main([*flags, str(tmp_path / "right"), "--protocol", "s3rec_tiger", "--metric_ks", "2"])
    metrics = read_json(tmp_path / "right" / "metrics.json")
    assert metrics["protocol"]["name"] == metrics["data_protocol"]["name"] == "s3rec_tiger"
    assert metrics["protocol"]["changed"] == {"metric_ks": [2]}
    assert metrics["filter_seen"] is True
    # A user has met all six items: with seen ones filtered nothing stands above the target.
    assert metrics["test"]["NDCG@2"] == 1
