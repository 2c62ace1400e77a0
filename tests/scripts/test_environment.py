"""The shell scripts that find or make an environment and run the checks, with stand-in Pythons."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """What the scripts need of a checkout, without an environment of its own."""
    root = tmp_path / "work" / "checkout"
    root.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "run_tests.sh"):
        shutil.copy(repository / name, root / name)
    for name in ("scripts", ".ci"):
        shutil.copytree(repository / name, root / name)
    return root


def stand_in(folder: Path, body: str) -> Path:
    """A program in place of Python; `$*` are its arguments."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def bash(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RECFORMER_REAL_DATA", "PYTHONPATH")}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


USE = '. scripts/environment.sh && use_environment && echo "$PYTHON|$PYTHONPATH"'


def test_an_environment_that_has_everything_is_used(checkout: Path) -> None:
    python = stand_in(checkout, "exit 0")
    result = bash(USE, checkout, PYTHON=str(python), PYTHONPATH="/elsewhere")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{python}|{checkout}:/elsewhere"
    assert not (checkout / ".venv").exists()


def test_a_complete_venv_is_used_and_not_installed_again(checkout: Path) -> None:
    """The second run: the stamp fits, so pip is not called; a changed list of packages calls it."""
    venv = checkout / ".venv"
    (venv / "bin").mkdir(parents=True)
    calls = checkout / "calls"
    stand_in(
        venv / "bin",
        f'echo "$*" >>{calls}\ncase "$1 $2" in -c*hashlib*) cat "$3" "$4" | cksum ;; esac',
    )
    lacking = stand_in(checkout, "exit 1")
    first = bash(USE, checkout, PYTHON=str(lacking))
    assert first.returncode == 0, first.stderr
    assert "installing recformer into" in first.stdout
    assert "-m pip install" in calls.read_text()
    assert first.stdout.splitlines()[-1] == f"{venv}/bin/python|{checkout}"

    calls.unlink()
    assert f"using {venv}" in bash(USE, checkout, PYTHON=str(lacking)).stdout
    assert "-m pip install" not in calls.read_text()

    with open(checkout / "constraints.txt", "a") as handle:
        handle.write("another==1\n")
    bash(USE, checkout, PYTHON=str(lacking))
    assert "-m pip install" in calls.read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('[ "$1" = --version ] && echo Python 3.8.1 && exit 0; exit 1', "Python 3.8.1 is not supp"),
        (
            'case "$*" in *version_info*) exit 0 ;; --version) echo Python 3.11.2; exit 0 ;; esac\n'
            "exit 1",
            "Python 3.11.2 cannot make virtual environments",
        ),
    ],
)
def test_an_unfit_python_is_named(checkout: Path, body: str, message: str) -> None:
    result = bash(USE, checkout, PYTHON=str(stand_in(checkout, body)))
    assert result.returncode != 0
    assert message in result.stderr
    assert not (checkout / ".venv").exists()


def test_an_absent_python_is_named(checkout: Path) -> None:
    result = bash(USE, checkout, PYTHON="python9")
    assert result.returncode != 0
    assert "'python9' was not found; install Python 3.10 to 3.13" in result.stderr


# What every step does: it makes the folder that it is told to write to, and calls it $out.
MAKES_OUT = """for last; do
    case "$before" in --output_*) out=$last; mkdir -p "$out" ;; esac
    before=$last
done
"""


def flags_passed(checkout: Path, script: str, **environment: str) -> list[str]:
    """Arguments of the last command of a shell script, one a line, with a stand-in Python."""
    body = 'case "$*" in -m\\ recformer.*tune*|*recformer.pretrain*) printf "%s\\n" "$@" ;; esac'
    python = stand_in(checkout, MAKES_OUT + body)
    result = bash(f"bash {script} --max_token_num 64", checkout, PYTHON=str(python), **environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2:] == ["--max_token_num", "64"]
    return lines[lines.index("-m") :]


def last_value(flags: list[str], name: str) -> str:
    """What argparse takes: the last one given."""
    return flags[len(flags) - 1 - flags[::-1].index(name) + 1]


@pytest.mark.parametrize(
    ("script", "variables", "default"),
    [
        ("finetune.sh", {"NUM_TRAIN_EPOCHS": "2", "BATCH_SIZE": "3", "SEED": "5"}, "finetune_run"),
        (
            "lightning_run.sh",
            {"NUM_TRAIN_EPOCHS": "2", "BATCH_SIZE": "3", "SEED": "5", "VALID_STEP": "7",
             "LEARNING_RATE": "1e-4", "GRADIENT_ACCUMULATION_STEPS": "9"},
            "lightning_run",
        ),
    ],
)  # fmt: skip
def test_variables_reach_the_command(
    checkout: Path, repository: Path, script: str, variables: dict[str, str], default: str
) -> None:
    shutil.copy(repository / script, checkout / script)
    sample = flags_passed(checkout, script, **variables)
    mine = {"DATA_PATH": "my data", "MODEL": "minilm", "PRETRAIN_CKPT": "minilm"}
    published = flags_passed(checkout, script, **variables, **mine)
    for name, value in variables.items():
        assert last_value(sample, f"--{name.lower()}") == value
        assert last_value(published, f"--{name.lower()}") == value
    # Not the folder of quickstart.sh, whose run is another one.
    assert last_value(sample, "--output_dir") == f"{checkout}/quickstart_run/{default}"
    assert any(flag.startswith("my data") for flag in published)
    assert last_value(published, "--batch_size") == "3"
    plain = flags_passed(checkout, script, **mine)
    assert last_value(plain, "--batch_size") == "16"
    assert "--seed" not in plain


def test_another_model_starts_from_its_own_weights(checkout: Path, repository: Path) -> None:
    shutil.copy(repository / "lightning_run.sh", checkout / "lightning_run.sh")
    weights = checkout / "longformer_ckpt" / "longformer-base-4096.bin"
    for path in (weights, checkout / "pretrain_data" / "train.json"):
        path.parent.mkdir()
        path.touch()
    flags = flags_passed(checkout, "lightning_run.sh")
    assert last_value(flags, "--longformer_ckpt") == str(weights)
    assert "--longformer_ckpt" not in flags_passed(checkout, "lightning_run.sh", MODEL="minilm")
    flags = flags_passed(checkout, "lightning_run.sh", MODEL="minilm", LONGFORMER_CKPT="mine.bin")
    assert last_value(flags, "--longformer_ckpt") == "mine.bin"


@pytest.mark.parametrize(
    ("script", "variables", "flags", "words"),
    [
        # A folder of one's own that nobody names is not passed over in silence.
        ("finetune.sh", {"PRETRAIN_CKPT": "x"}, "", ["DATA_PATH is not", "finetune_data/MyShop"]),
        ("finetune.sh", {"DATA_PATH": "finetune_data/MyShop"}, "", ["PRETRAIN_CKPT is not set"]),
        ("finetune.sh", {}, "--data_path finetune_data/MyShop", ["PRETRAIN_CKPT is not set"]),
        ("finetune.sh", {}, "--pretrain_ckpt=x", ["DATA_PATH is not set", "finetune_data/MyShop"]),
        ("lightning_run.sh", {"MODEL": "x"}, "", ["DATA_PATH is not set"]),
        ("lightning_run.sh", {"DATA_PATH": "mine"}, "", ["MODEL is not set"]),
        ("lightning_run.sh", {}, "--train_file mine/train.json", ["MODEL is not set"]),
    ],
)
def test_a_half_named_job_says_what_to_name(
    checkout: Path,
    repository: Path,
    script: str,
    variables: dict[str, str],
    flags: str,
    words: list[str],
) -> None:
    shutil.copy(repository / script, checkout / script)
    (checkout / "finetune_data" / "MyShop").mkdir(parents=True)
    (checkout / "finetune_data" / "MyShop" / "train.json").touch()
    python = stand_in(checkout, "touch started")
    result = bash(f"bash {script} {flags}", checkout, PYTHON=str(python), **variables)
    assert result.returncode == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not (checkout / "started").exists()


@pytest.mark.parametrize("script", ["quickstart.sh", "run_tests.sh"])
def test_help_does_no_work(checkout: Path, repository: Path, script: str) -> None:
    shutil.copy(repository / script, checkout / script)
    python = stand_in(checkout, "touch started")
    result = bash(f"bash {script} --help", checkout, PYTHON=str(python))
    assert result.returncode == 0
    assert f"bash {script}" in result.stdout
    assert "set -euo" not in result.stdout
    assert not (checkout / "started").exists()


def test_cdpath_leads_nowhere_else(checkout: Path, tmp_path: Path) -> None:
    """With CDPATH `cd` prints where it goes, and may go to a folder of the same name elsewhere."""
    (tmp_path / "elsewhere" / "checkout").mkdir(parents=True)
    for place in (".", str(tmp_path / "elsewhere")):
        for folder, source in ((checkout, "scripts"), (checkout.parent, "checkout/scripts")):
            command = f'source {source}/environment.sh && printf %s "$RECFORMER_ROOT"'
            assert bash(command, folder, CDPATH=place).stdout == str(checkout)
        command = "PYTHON=true bash checkout/run_tests.sh"
        result = bash(command, checkout.parent, CDPATH=place)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "all passed")


def prepared(checkout: Path, python: Path, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """`prepare_sample` as the scripts call it."""
    command = "set -e; . scripts/environment.sh; . scripts/sample.sh; "
    return bash(f"{command}prepare_sample run {seed}", checkout, PYTHON=str(python))


STEPS = ["recformer sample", "meta_data_process", "interaction_data_process",
         "finetune_data/process", "recformer tokenizer"]  # fmt: skip


@pytest.mark.parametrize("killed", STEPS)
def test_a_step_that_was_killed_is_repeated(checkout: Path, killed: str) -> None:
    """A killed step may have left every file that a later one looks for, and still be half done."""
    log = checkout / "calls"
    names = "train.json dev.json dataset.json meta_data.json tokenizer_config.json"
    writes = f'echo "$*" >>{log}\n{MAKES_OUT}for name in {names}; do touch "$out/$name"; done\n'
    kill = f'case "$*" in *"{killed}"*) [ -e {checkout}/again ] || kill -9 $PPID ;; esac'
    python = stand_in(checkout, writes + kill)
    assert prepared(checkout, python).returncode != 0
    assert killed in log.read_text().splitlines()[-1]

    (checkout / "again").touch()
    log.unlink()
    assert prepared(checkout, python).returncode == 0
    expected = STEPS[STEPS.index(killed) :]
    if killed == "interaction_data_process":  # both write into one folder
        expected = STEPS[1:]
    calls = log.read_text().splitlines()
    assert len(calls) == len(expected)
    assert all(name in call for name, call in zip(expected, calls, strict=True))

    log.unlink()
    assert prepared(checkout, python).returncode == 0
    assert not log.exists()  # all of it is there: nothing is done again
    other = prepared(checkout, python, seed=1)
    assert (other.returncode, other.stderr) == (
        1, "error: run holds a sample of seed 0; choose another folder\n"
    )  # fmt: skip


def test_the_quickstart_converts_again_what_was_trained_on(
    checkout: Path, repository: Path
) -> None:
    """The checkpoint went on after it was converted: the model to start from must follow."""
    shutil.copy(repository / "quickstart.sh", checkout / "quickstart.sh")
    log = checkout / "calls"
    python = stand_in(
        checkout,
        f'echo "$*" >>{log}\n{MAKES_OUT}'
        f'case "$*" in *recformer.pretrain\\ *) mkdir -p "$out/checkpoints"\n'
        f'  cat {checkout}/state >"$out/checkpoints/last.ckpt" ;;\n'
        '*convert_pretrain_ckpt*) mkdir -p "$out/recformer_pretrain_ckpt"\n'
        '  touch "$out/recformer_pretrain_ckpt/config.json" ;; esac',
    )

    def conversions(state: str) -> int:
        (checkout / "state").write_text(state)
        log.unlink(missing_ok=True)
        result = bash("bash quickstart.sh", checkout, PYTHON=str(python), OUTPUT_DIR="run")
        assert result.returncode == 0, result.stderr
        return log.read_text().count("convert_pretrain_ckpt.py")

    assert [conversions(state) for state in ("step 6", "step 6", "step 24")] == [1, 0, 1]


def test_check_environment_names_what_is_missing(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text(
        "[project]\n"
        'name = "recformer"\n'
        'dependencies = ["numpy>=1", "no-such-package>=2", "old; python_version < \'3\'"]\n'
        "[project.optional-dependencies]\n"
        'tests = ["packaging<1", "pytest"]\n'
        'dev = ["recformer[tests]"]\n'
    )
    script = [sys.executable, str(checkout / "scripts" / "check_environment.py")]
    result = subprocess.run([*script, "dev"], capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert lines[0] == "no-such-package>=2: not installed"
    assert lines[1].startswith("packaging<1: ")
    assert lines[1].endswith(" is installed")
    assert len(lines) == 2
    (checkout / "pyproject.toml").write_text(
        '[project]\nname = "recformer"\ndependencies = ["numpy>=1"]\n'
        "[project.optional-dependencies]\n"
    )
    result = subprocess.run(script, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_run_tests_runs_every_step_and_fails_if_one_did(checkout: Path) -> None:
    body = 'case "$*" in *ruff\\ check*) exit 1 ;; -m\\ pytest*) echo "got $*" ;; esac'
    result = bash("bash run_tests.sh -k 'a b'", checkout, PYTHON=str(stand_in(checkout, body)))
    assert result.returncode == 1
    assert "got -m pytest -k a b" in result.stdout
    assert "FAILED: ruff check (exit 1)" in result.stdout
    stand_in(checkout, "exit 0")
    result = bash("bash run_tests.sh", checkout, PYTHON=str(checkout / "python"))
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "all passed"


def test_continuous_integration_gives_the_data_and_refuses_an_empty_run(checkout: Path) -> None:
    body = """case "$*" in
    -m\\ pytest*) echo "data: $RECFORMER_REAL_DATA."; exit $TESTS ;;
    scripts/fresh_machine.py) echo "a fresh machine"; exit $FRESH ;;
esac"""
    python = str(stand_in(checkout, body))

    def run(tests: int, fresh: int) -> subprocess.CompletedProcess[str]:
        codes = {"TESTS": str(tests), "FRESH": str(fresh)}
        return bash("bash .ci/run", checkout, PYTHON=python, **codes)

    result = run(5, 0)
    assert result.returncode == 5
    assert "data: .\n" in result.stdout
    assert "pytest collected no test" in result.stderr
    data = checkout.parent / "shared" / "data"
    data.mkdir(parents=True)
    result = run(0, 0)
    assert result.returncode == 0
    assert f"data: {data}.\n" in result.stdout
    # The second check runs whatever the first one said, and either fails all.
    for tests, fresh, status in ((1, 0, 1), (0, 1, 1), (4, 1, 4)):
        result = run(tests, fresh)
        assert (result.returncode, "a fresh machine" in result.stdout) == (status, True)


@pytest.mark.parametrize("given", [None, "backend:native"])
@pytest.mark.parametrize("script", ["finetune", "pretrain"])
def test_memory_of_gpus_in_segments_that_grow(checkout: Path, script: str, given: str | None):
    """Jobs of SLURM say it too, and keep what their user said."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "activate").touch()
    (checkout / "srun").write_text('#!/bin/sh\necho "$PYTORCH_ALLOC_CONF|$2 $3"\n')
    (checkout / "srun").chmod(0o755)
    variables = {"PATH": f"{checkout}:{os.environ['PATH']}"}
    variables |= {"PYTORCH_ALLOC_CONF": given} if given else {}
    result = bash(
        f"{'' if given else 'unset PYTORCH_ALLOC_CONF;'} bash scripts/slurm/{script}.sbatch",
        checkout,
        **variables,
    )
    expected = given or "expandable_segments:True"
    assert result.stdout == f"{expected}|recformer {script}\n", result.stderr


def test_memory_of_gpus_in_the_pods_of_kubernetes(repository: Path) -> None:
    text = (repository / "scripts" / "kubernetes" / "finetune.yaml").read_text()
    (job,) = (each for each in yaml.safe_load_all(text) if each["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    said = {each["name"]: each["value"] for each in container["env"]}
    assert said["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
