"""The shell scripts that find or make an environment and run the checks, with stand-in Pythons."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


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


def flags_passed(checkout: Path, script: str, **environment: str) -> list[str]:
    """Arguments of the last command of a shell script, one a line, with a stand-in Python."""
    body = 'case "$*" in -m\\ recformer.*tune*|*recformer.pretrain*) printf "%s\\n" "$@" ;; esac'
    python = stand_in(checkout, body)
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
    published = flags_passed(checkout, script, **variables, DATA_PATH="my data")
    for name, value in variables.items():
        assert last_value(sample, f"--{name.lower()}") == value
        assert last_value(published, f"--{name.lower()}") == value
    # Not the folder of quickstart.sh, whose run is another one.
    assert last_value(sample, "--output_dir") == f"{checkout}/quickstart_run/{default}"
    assert any(flag.startswith("my data") for flag in published)
    assert last_value(published, "--batch_size") == "3"
    plain = flags_passed(checkout, script, DATA_PATH="my data")
    assert last_value(plain, "--batch_size") == "16"
    assert "--seed" not in plain


def test_another_model_starts_from_its_own_weights(checkout: Path, repository: Path) -> None:
    shutil.copy(repository / "lightning_run.sh", checkout / "lightning_run.sh")
    weights = checkout / "longformer_ckpt" / "longformer-base-4096.bin"
    weights.parent.mkdir()
    weights.touch()
    flags = flags_passed(checkout, "lightning_run.sh")
    assert last_value(flags, "--longformer_ckpt") == str(weights)
    assert "--longformer_ckpt" not in flags_passed(checkout, "lightning_run.sh", MODEL="minilm")
    flags = flags_passed(checkout, "lightning_run.sh", MODEL="minilm", LONGFORMER_CKPT="mine.bin")
    assert last_value(flags, "--longformer_ckpt") == "mine.bin"


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
    body = 'case "$*" in -m\\ pytest*) echo "data: $RECFORMER_REAL_DATA."; exit 5 ;; esac'
    python = str(stand_in(checkout, body))
    result = bash("bash .ci/run", checkout, PYTHON=python)
    assert result.returncode == 5
    assert "data: .\n" in result.stdout
    assert "pytest collected no test" in result.stderr
    data = checkout.parent / "shared" / "data"
    data.mkdir(parents=True)
    assert f"data: {data}.\n" in bash("bash .ci/run", checkout, PYTHON=python).stdout
