"""Runs that are killed, moved, stopped, damaged, short of disk, started twice: docs/reliability.md.

Runs are forked from the test's process, which has imported everything: a try costs the run alone.
The default suite makes one deterministic try of each kind, `-m slow` many at random moments.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.__main__ import BaselineArguments
from baselines.__main__ import run as run_baseline
from recformer import processes
from recformer.checkpoints.conversion import convert_pretraining
from recformer.cli import exit_with_message
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranks import TargetRanks
from recformer.evaluation.runs import read_ranks
from recformer.files import UserError, read_json, sha256_of
from recformer.finetune import run as run_finetuning
from recformer.pretrain import Run as Pretraining
from recformer.processes import Group
from recformer.recommendation import CatalogueRecommender
from recformer.training import run_folder
from tests.test_finetune import arguments, data  # noqa: F401
from tests.test_finetune_head import head_arguments
from tests.test_pretrain import arguments as pretraining_arguments
from tests.test_pretrain import inputs  # noqa: F401

# As `sbatch` sets them for a job of one task.
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_NNODES": "1",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip

Work = Callable[[Path, int], Any]  # a run in a folder, with so many loader workers


def forked(work: Callable[[], Any], log: Path) -> int:
    """Exit status of a command in a process of its own, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status: Any = 99
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
            sys.stdout = sys.stderr = open(log, "a")  # noqa: SIM115
            exit_with_message(work)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_placement(number: int, act: Callable[[], object], part: str = "") -> None:
    """Do something right before this process puts its `number`-th file or folder in place."""
    seen = [0]

    def hook(real: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any) -> None:
            seen[0] += part in str(target)
            if part in str(target) and seen[0] == number:
                act()
            real(source, target)

        return moved

    os.replace, os.rename = hook(os.replace), hook(os.rename)  # a forked process: never undone


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def works(data, inputs) -> dict[str, Work]:  # noqa: F811
    def finetune(out: Path, workers: int) -> Any:
        flags = {"num_train_epochs": 2, "verbose": 1, "dataloader_num_workers": workers}
        return run_finetuning(arguments(data, out, **flags))

    def head(out: Path, workers: int) -> Any:
        flags = {"num_train_epochs": 3, "dataloader_num_workers": workers}
        return run_finetuning(head_arguments(data, out, **flags))

    def pretrain(out: Path, workers: int) -> Any:
        flags = {"save_top_k": 1, "dataloader_num_workers": workers}
        return Pretraining(pretraining_arguments(inputs, out, **flags)).train()

    def baseline(out: Path, workers: int) -> Any:
        return run_baseline(
            BaselineArguments(
                model="sasrec", data_path=str(data / "folder"), output_dir=str(out),
                num_train_epochs=3, hidden_size=8, num_layers=1, num_heads=1, batch_size=8,
                metric_ks=[5, 10], device=[-1], dataloader_num_workers=workers,
            )
        )  # fmt: skip

    return {"finetuning": finetune, "head": head, "pretraining": pretrain, "baseline": baseline}


@pytest.fixture(scope="module")
def whole(works, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind that nothing disturbed, without workers."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, work in works.items():
        log = folder / "log"
        assert forked(lambda work=work, out=folder / kind: work(out, 0), log) == 0, log.read_text()
    return {kind: folder / kind for kind in works}


def outcome(out: Path) -> dict[str, Any]:
    """What a run ends with, but for times."""
    metrics = read_json(out / "metrics.json")
    if "evaluations" not in metrics:
        last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        assert last["global_step"] == metrics["last"]["step"]
        assert (out / "checkpoints" / metrics["best_checkpoint"]).exists()
        weights = {name: tensor.tolist() for name, tensor in last["state_dict"].items()}
        return {"best": metrics["best"], "last": metrics["last"], "weights": weights}
    rows = {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in stage["rows"]]
        for name, stage in metrics["stages"].items()
    }
    weights = sha256_of((out / "best_model" / "model.safetensors").read_bytes())
    return {"evaluations": metrics["evaluations"], "rows": rows, "weights": weights}


def half_written(*folders: Path) -> list[str]:
    return [str(p) for folder in folders for p in folder.rglob(".*") if "partial" in p.name]


def grow_old(*folders: Path) -> None:
    """Make what is half-written older than any rule of age."""
    for path in half_written(*folders):
        os.utime(path, (0, 0))
        for inner in Path(path).rglob("*"):
            os.utime(inner, (0, 0))


def survives(
    work: Work,
    whole: Path,
    tmp_path: Path,
    moments: list[int],
    workers: list[int],
    environment: dict[str, str],
) -> list[int]:
    """Killed at each moment in turn, its folder moved each time, a run ends as one in one piece.

    Returns the exit statuses: 0 where the run had ended before its moment came.
    """
    out, log = tmp_path / "out", tmp_path / "killed.log"
    statuses = []
    for number, moment in enumerate(moments):

        def killed(out: Path = out, moment: int = moment, number: int = number) -> None:
            os.environ.update(environment)
            at_placement(moment, kill_self)
            work(out, workers[number % len(workers)])

        statuses.append(forked(killed, log))
        assert statuses[-1] in (-signal.SIGKILL, 0), log.read_text()[-2000:]
        out = out.rename(tmp_path / f"moved{number}")
    grow_old(out)

    def last() -> None:
        os.environ.update(environment)
        work(out, workers[-1])

    assert forked(last, log) == 0, log.read_text()[-2000:]
    assert outcome(out) == outcome(whole)
    assert half_written(out) == []
    assert not list(out.rglob("hpc_ckpt*"))
    for path in out.rglob("*.json"):
        assert str(tmp_path / "out") not in path.read_text(), path
    return statuses


# Two kills: while the first checkpoints of all are put in place, and late in the run.
MOMENTS = {"finetuning": [12, 9], "head": [8, 6], "pretraining": [10, 6], "baseline": [5, 6]}


@pytest.mark.parametrize("kind", MOMENTS)
def test_killed_moved_with_workers_under_slurm(works, whole, tmp_path, kind):
    statuses = survives(works[kind], whole[kind], tmp_path, MOMENTS[kind], [2, 1], SLURM)
    assert statuses == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("kind", ["finetuning", "head", "baseline"])
def test_killed_when_only_the_best_model_is_missing(works, whole, tmp_path, kind):
    """All figures are there, so nothing is trained or evaluated before the model is saved."""
    out, log = tmp_path / "out", tmp_path / "log"

    def killed() -> None:
        at_placement(1, kill_self, "best_model")
        works[kind](out, 0)

    assert forked(killed, log) == -signal.SIGKILL
    assert not (out / "best_model").exists()
    assert forked(lambda: works[kind](out, 0), log) == 0, log.read_text()[-2000:]
    assert outcome(out) == outcome(whole[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_moments(works, whole, tmp_path, kind, seed):
    draw = random.Random(f"{kind} {seed}")
    moments = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 5))]
    survives(
        works[kind],
        whole[kind],
        tmp_path,
        moments,
        draw.sample([0, 1, 4], 3),
        SLURM if seed % 2 else {},
    )


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_said_and_nothing_lost(works, tmp_path, number, status):
    out, log = tmp_path / "out", tmp_path / "log"

    def stopped() -> None:
        os.environ.update(SLURM)
        at_placement(2, lambda: os.kill(os.getpid(), number), "last.ckpt")
        works["baseline"](out, 0)

    assert forked(stopped, log) == status
    name = signal.Signals(number).name
    assert log.read_text().splitlines()[-1] == (
        f"stopped by {name}; {out} keeps what is done, and the same command goes on there"
    )
    assert not (out / "metrics.json").exists()
    assert not half_written(out)
    assert torch.load(out / "training" / "last.ckpt", weights_only=True)["epoch"] == 0


# --- damaged files


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    return shutil.copytree(whole["finetuning"], tmp_path / "out")


@pytest.fixture
def finished_head(whole, tmp_path) -> Path:
    return shutil.copytree(whole["head"], tmp_path / "head")


def flip(path: Path, place: float, bit: int = 4) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    path.write_bytes(raw)


# A file of a run, and what else must be gone so that it is read back.
READ_BACK = {
    "run.json": [],
    "metrics.json": [],
    "evaluation/stage1.json": ["metrics.json"],
    "stage1/done.json": ["metrics.json"],
    "stage2/best.ckpt": ["metrics.json"],
    "stage2/last.ckpt": ["metrics.json", "evaluation", "stage2/done.json"],
}


def check_damage(work: Work, out: Path, name: str, place: float, bit: int) -> None:
    """A flipped bit is refused in a line that names the file, or changes nothing."""
    wanted = outcome(out)
    for gone in (READ_BACK | READ_BACK_OF_HEAD)[name]:
        shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    flip(out / name, place, bit)
    log = out.parent / "damaged.log"
    log.unlink(missing_ok=True)
    status = forked(lambda: work(out, 0), log)
    said = log.read_text().splitlines()[-1]
    if status:
        assert status == 1, log.read_text()[-2000:]
        assert said.startswith("error: ")
        other_run = name == "run.json" and "different: " in said
        assert other_run or Path(name).name in said
    else:
        assert outcome(out) == wanted


# The same of `--method head`.
READ_BACK_OF_HEAD = {
    "evaluation/head.json": ["metrics.json"],
    "head/done.json": ["metrics.json"],
    "head/best.ckpt": ["metrics.json", "evaluation"],
    "head/last.ckpt": ["metrics.json", "evaluation", "head/done.json"],
}


@pytest.mark.parametrize("name", READ_BACK)
def test_a_flipped_bit_of_a_run_is_noticed(works, finished, name):
    check_damage(works["finetuning"], finished, name, 0.5, 4)


@pytest.mark.parametrize("name", READ_BACK_OF_HEAD)
def test_a_flipped_bit_of_a_head_is_noticed(works, finished_head, name):
    check_damage(works["head"], finished_head, name, 0.5, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BACK)
def test_flipped_bits_anywhere_are_noticed(works, finished, name, tmp_path):
    draw = random.Random(name)
    for number in range(20):
        copy = shutil.copytree(finished, tmp_path / str(number) / "out")
        check_damage(works["finetuning"], copy, name, draw.random(), draw.randrange(8))


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BACK_OF_HEAD)
def test_flipped_bits_anywhere_of_a_head_are_noticed(works, finished_head, name, tmp_path):
    draw = random.Random(name)
    for number in range(20):
        copy = shutil.copytree(finished_head, tmp_path / str(number) / "out")
        check_damage(works["head"], copy, name, draw.random(), draw.randrange(8))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_flipped_bits_of_ranks_are_noticed(tmp_path, step):
    draw = np.random.default_rng(0)
    above, tied = draw.integers(0, 900, 60), draw.integers(0, 3, 60)
    evaluator = Evaluator()
    ranks = TargetRanks(above, tied, np.full(60, 1000))
    evaluator.update(np.arange(60), draw.integers(0, 1000, 60), ranks)
    path = tmp_path / "ranks.parquet"
    evaluator.write_parquet(path)
    sound, wanted = path.read_bytes(), read_ranks(path)
    noticed = 0
    for place in range(0, len(sound), step):
        for bit in (place % 8,) if step > 1 else range(8):
            raw = bytearray(sound)
            raw[place] ^= 1 << bit
            path.write_bytes(raw)
            try:
                found = read_ranks(path)
            except UserError:
                noticed += 1
                continue
            for name, column in wanted.items():
                assert np.array_equal(found[name], column), (place, bit, name)
    assert noticed > len(sound) / step / 4  # most of the file is pages


@pytest.mark.parametrize("kind", ["finetuning", "head"])
@pytest.mark.parametrize("store", ["vectors", "tokenized"])
def test_a_damaged_store_is_made_anew(works, whole, data, tmp_path, kind, store):  # noqa: F811
    flipped = 0
    for path in (data / "folder" / store).rglob("*.bin"):
        if path.stat().st_size:
            flip(path, 0.5)
            flipped += 1
    assert flipped
    assert forked(lambda: works[kind](tmp_path / "again", 0), tmp_path / "log") == 0
    assert outcome(tmp_path / "again") == outcome(whole[kind])


@pytest.mark.parametrize("kind", ["finetuning", "head"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "smap.json", "meta_data.json", "tokenizer.json", "config.json"],
)
def test_a_damaged_best_model_recommends_nothing(whole, tmp_path, kind, name):
    folder = shutil.copytree(whole[kind] / "best_model", tmp_path / "best_model")
    flip(folder / name, 0.9, 0)
    with pytest.raises(UserError, match=f"{name} is damaged, or was replaced"):
        CatalogueRecommender.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_damaged_start_weights_are_not_converted(whole, tmp_path, name):
    run = shutil.copytree(whole["pretraining"], tmp_path / "run")
    flip(run / "start" / name, 0.9, 0)
    with pytest.raises(UserError, match=f"{name} is damaged, or was replaced"):
        convert_pretraining(run / "checkpoints" / "last.ckpt", tmp_path / "released")
    assert not (tmp_path / "released").exists()


# --- full disk, two writers, files of two runs


def test_a_full_disk_names_the_file_and_nothing_is_lost(works, whole, tmp_path):
    work, out, log = works["baseline"], tmp_path / "out", tmp_path / "log"

    def limited() -> None:
        size = (whole["baseline"] / "training" / "last.ckpt").stat().st_size
        at_placement(  # behind the first checkpoint
            2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, -1)), "last.ckpt"
        )
        work(out, 0)

    assert forked(limited, log) == 1
    assert "best.ckpt" in log.read_text().splitlines()[-1] or "last.ckpt" in log.read_text()
    assert not half_written(out)
    assert forked(lambda: work(out, 0), log) == 0
    assert outcome(out) == outcome(whole["baseline"])


def test_a_second_process_is_refused(works, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    out, log = tmp_path / "out", tmp_path / "log"
    statuses = []

    def first() -> None:
        def second() -> None:
            statuses.append(forked(lambda: works["baseline"](out, 0), log))
            assert statuses == [1]

        at_placement(1, second, "last.ckpt")
        works["baseline"](out, 0)

    assert forked(first, tmp_path / "first.log") == 0, (tmp_path / "first.log").read_text()
    assert f"another process is at work in {out}" in log.read_text()
    assert (out / "metrics.json").exists()


def test_files_of_two_runs_never_lie_side_by_side(works, finished, data, tmp_path):  # noqa: F811
    def other(overwrite: bool) -> Any:
        flags = {"num_train_epochs": 2, "verbose": 1, "seed": 7}
        return run_finetuning(arguments(data, finished, overwrite_output_dir=overwrite, **flags))

    old = {p.name: p.read_bytes() for p in (finished / "best_model").iterdir()}
    (finished / "run.json").rename(tmp_path / "run.json")
    log = tmp_path / "log"
    assert forked(lambda: other(False), log) == 1
    assert "no run.json that says of which run" in log.read_text()
    (tmp_path / "run.json").rename(finished / "run.json")

    def killed() -> None:
        at_placement(1, kill_self, "smap.json")
        other(True)

    assert forked(killed, log) == -signal.SIGKILL
    assert not (finished / "best_model").exists()
    assert not (finished / "metrics.json").exists()
    assert forked(lambda: other(False), log) == 0  # by now it is the other run's folder
    new = {p.name: p.read_bytes() for p in (finished / "best_model").iterdir()}
    assert new.keys() == old.keys()
    assert new["model.safetensors"] != old["model.safetensors"]
    assert json.loads((finished / "metrics.json").read_text())["seed"] == 7


def test_a_run_goes_on_on_as_many_nodes(tmp_path, monkeypatch):
    """However they were asked for; folders of one node are as they always were."""

    def claim(name, nodes, flag):
        monkeypatch.setattr(processes, "_group", Group(0, nodes, nodes > 1, 0, nodes, 0))
        with run_folder.RunFolder.claim(
            tmp_path / name, {"seed": 1, "num_nodes": flag}, ()
        ) as folder:
            return folder.goes_on

    assert not claim("two", 2, None)
    assert read_json(tmp_path / "two" / "run.json") == {"seed": 1, "num_nodes": 2}
    assert claim("two", 2, 2)
    for nodes, flag in ((4, None), (4, 4), (1, None)):
        with pytest.raises(UserError, match=r"holds another run \(different: num_nodes\)"):
            claim("two", nodes, flag)
    assert not claim("one", 1, None)
    assert read_json(tmp_path / "one" / "run.json") == {"seed": 1}
    for before in (None, 1):
        (tmp_path / "one" / "run.json").write_text(json.dumps({"seed": 1, "num_nodes": before}))
        assert claim("one", 1, None)
        assert claim("one", 1, 1)


def test_who_runs_others_words_the_advice_about_their_folders(tmp_path):
    claim = run_folder.RunFolder.claim
    with claim(tmp_path, {"seed": 1}, ()):
        pass

    def refused() -> str:
        with pytest.raises(run_folder.FolderError) as error:
            claim(tmp_path, {"seed": 2}, ())
        return str(error.value).partition("; ")[2]

    own = "choose another --output_dir, or give --overwrite_output_dir"
    assert refused() == own
    with run_folder.advising("remove all"):
        assert refused() == "remove all"
        with run_folder.advising("remove one"):
            assert refused() == "remove one"
        assert refused() == "remove all"
        code = "import os; print(os.environ['RECFORMER_FOLDER_ADVICE'])"
        started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert started.stdout == "remove all\n"
    assert refused() == own


def test_clearing_that_is_cut_off_goes_on(tmp_path):
    for name in ("ranks", "best_model"):
        (tmp_path / name).mkdir()
    claim = run_folder.RunFolder.claim
    with claim(tmp_path, {"seed": 1}, ()):
        pass
    log = tmp_path.parent / f"{tmp_path.name}.log"

    def killed() -> None:
        shutil.rmtree = lambda path: kill_self()
        claim(tmp_path, {"seed": 2}, ("ranks", "best_model"), overwrite=True)

    assert forked(killed, log) == -signal.SIGKILL
    with pytest.raises(UserError, match="holds another run"):
        claim(tmp_path, {"seed": 1}, ("ranks", "best_model"))
    with claim(tmp_path, {"seed": 2}, ("ranks", "best_model")) as folder:
        assert not folder.goes_on
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert read_json(tmp_path / "run.json") == {"seed": 2}
