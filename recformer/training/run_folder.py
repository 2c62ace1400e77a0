"""The output folder of a run, whatever is trained: claimed, continued, or refused.

`run.json` holds the settings that figures depend on. A folder that holds another run, or files of
which nothing says of which run they are, is refused or, with `--overwrite_output_dir`, cleared:
files of two runs never lie side by side. The first process decides, the others follow.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recformer.evaluation.runs import RUN_FILE
from recformer.files import UserError, check_torch_file, read_json, remove_leftovers, write_json
from recformer.processes import agreed, group, is_first, keeps

# None of these flags changes a figure, wherever a run has them.
IGNORED = frozenset(
    {
        "output_dir",
        "seeds",
        "overwrite_output_dir",
        "wandb",
        "dataloader_num_workers",
        "preprocessing_num_workers",
        "num_nodes",  # of the flag; a launcher may say it instead
    }
)

CLEARING = "clearing"  # in run.json while files of the run before are removed

# What to do about a folder of another run; a variable, so that processes started here say it too.
ADVICE = "RECFORMER_FOLDER_ADVICE"
OWN_ADVICE = "choose another --output_dir, or give --overwrite_output_dir"

# Seconds that a run waits for another one in its folder, which may be dying.
PATIENCE = 10.0


class FolderError(UserError):
    """The folder of a run is at fault, not its flags: another run's, in use, or damaged."""


@contextmanager
def advising(text: str) -> Iterator[None]:
    """Say `text` of folders that hold another run, here and in processes started within.

    For commands that run others, whose user cannot give `--overwrite_output_dir`.
    """
    before = os.environ.get(ADVICE)
    os.environ[ADVICE] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADVICE]
        else:
            os.environ[ADVICE] = before


@dataclass(frozen=True)
class RunFolder:
    """A folder that belongs to this run; made by `claim`.

    No other process gets it until this one ends, or the end of a `with` block of it.

    Attributes:
        path: the folder.
        goes_on: True where this very run was started here before.
    """

    path: Path
    goes_on: bool

    @classmethod
    def claim(
        cls,
        path: str | os.PathLike,
        settings: Mapping[str, Any],
        written: Sequence[str],
        overwrite: bool = False,
    ) -> RunFolder:
        """Take a folder for a run, or continue the run that it holds.

        Args:
            path: made if missing.
            settings: everything that figures depend on, as JSON has it; `IGNORED` is left out, and
                the number of nodes put in, where there are several: the batch grows with them.
            written: names within the folder that a run of this kind leaves.
            overwrite: clear a folder of another run.

        Raises:
            FolderError: it holds another run, or files of an unknown one, and may not be
                overwritten; or another process is at work there.
        """
        path = Path(path)
        settings = {name: value for name, value in settings.items() if name not in IGNORED}
        if group().nodes > 1:
            settings["num_nodes"] = group().nodes
        outcome: bool | Exception = True
        if is_first():
            try:
                outcome = _claim(path, settings, written, overwrite)
            except (UserError, OSError) as error:  # the others must not wait for this one
                outcome = error
        outcome = agreed(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        keeps(f"{path} keeps what is done, and the same command goes on there")
        return cls(path, outcome)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, so that other processes may work here."""
        descriptor = _held.pop(os.path.realpath(self.path), None)
        if descriptor is not None:
            os.close(descriptor)

    def has(self, *names: str) -> bool:
        """Whether this run has written all of these names."""
        return self.goes_on and all((self.path / name).exists() for name in names)


def checked(path: Path) -> Path:
    """The path of a checkpoint of this run, once its content is verified.

    Raises:
        FileNotFoundError: it is gone.
        FolderError: it is damaged.
    """
    try:
        check_torch_file(path)
    except (UserError, FileNotFoundError) as error:
        kind = FolderError if isinstance(error, UserError) else FileNotFoundError
        advice = f"{error}; remove {path.parent}, and the same command trains that part again"
        raise kind(advice) from error
    return path


def _claim(path: Path, settings: dict[str, Any], written: Sequence[str], overwrite: bool) -> bool:
    path.mkdir(parents=True, exist_ok=True)
    _hold(path)
    remove_leftovers(path, deep=True)
    run_file = path / RUN_FILE
    before, other, clearing = None, "", False
    present = [name for name in dict.fromkeys(written) if os.path.lexists(path / name)]
    if run_file.exists():
        before = _read_settings(run_file)
        if before is None:
            other = f"has a damaged {RUN_FILE}"
        else:
            clearing = before.pop(CLEARING, False)
            if before.get("num_nodes") == 1:  # the flag, of older runs
                del before["num_nodes"]
            different = sorted(k for k in settings | before if settings.get(k) != before.get(k))
            other = f"holds another run (different: {', '.join(different)})" if different else ""
    elif present:
        other = f"has {', '.join(present)} and no {RUN_FILE} that says of which run"
    if other and not overwrite:
        raise FolderError(f"{path} {other}; {os.environ.get(ADVICE, OWN_ADVICE)}")
    if (other or clearing) and present:
        write_json(run_file, settings | {CLEARING: True}, indent=1)
        for name in present:
            place = path / name
            shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    if other or clearing or before is None:
        write_json(run_file, settings, indent=1)
        return False
    return True


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


_held: dict[str, int] = {}


def _hold(path: Path) -> None:
    """Lock a folder.

    Raises:
        FolderError: another process has it.
    """
    name = os.path.realpath(path)
    if name in _held:
        return
    descriptor = os.open(path, os.O_RDONLY)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise FolderError(
                    f"another process is at work in {path}: wait for its end, or choose another "
                    "--output_dir"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            break
    _held[name] = descriptor


def _let_go() -> None:
    """Close the locks of a forked child, which may outlive its parent."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
