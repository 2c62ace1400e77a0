"""Run what README, site and examples say, on a machine that has only Python and pip.

    python scripts/fresh_machine.py [--keep FOLDER] [--show]

HEAD is cloned into an empty folder; a new virtual environment with pip alone stands for the
machine's Python; the home folder is empty; of the environment's variables only those remain that
say how to reach package registries. There every block of commands runs, in one session: those of
the README, of quickstart, concepts and guides in the order of `mkdocs.yml`, and of the READMEs in
`examples/`; then `--help` of all commands of docs/reference/commands.md. Then the wheel is built,
installed into a second such environment, and does the main job in a folder without the checkout.
Nothing but packages is downloaded: models of the hub are replaced by tiny random ones of the same
names in the hub's cache. The first step that fails ends all with exit status 1, its name and its
last lines.

A comment before a block says how it is run, and none of it shows on the page:

    <!-- fresh machine: shop, minilm; prints NDCG@10 -->     made beforehand (fresh_fixtures.py);
                                                             a word that the block must print
    <!-- fresh machine: not run, needs four GPUs -->         not run, and why

Blocks of bash and Python need such a comment; any other block is no command. The Python blocks of a
section are one program.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run by name, only this folder is looked in

from scripts.fresh_fixtures import FIXTURES, shop  # noqa: E402

MINUTES = 15  # what all of it may take on two cores that do nothing else
# Seconds of a core that a step takes, by a part of its name; the table marks one that takes half as
# much again. Other work on the machine hardly changes them. Steps of a few seconds are not listed.
EXPECTED = {
    "quickstart.sh": 640,
    "python3 -m venv": 40,
    "lightning_run.sh": 170,
    "MODEL=sentence-transformers": 45,
    "--help of": 80,
    "wheel: install": 50,
}
STEP_SECONDS = 1800  # a step that hangs is ended
LAST_LINES = 40

# What a stranger's machine may say too: where packages come from, how to get through a proxy, whose
# certificates hold, and how many threads this process may have.
KEPT = re.compile(
    r"PIP_.*|(http|https|no|all)_proxy|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
    r"|OMP_NUM_THREADS|TERM|TMPDIR|LANG",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Block:
    """A block of a page: commands, a program, or something to read.

    Attributes:
        line: where its fence stands, from 1.
        section: the heading above it.
        language: `bash`, `python`, or another word for what is no command.
        text: what stands between the fences.
        fixtures: names of what must be there beforehand.
        prints: a word of its output; None for any output.
        not_run: why it does not run here; None if it does.
    """

    line: int
    section: str
    language: str
    text: str
    fixtures: tuple[str, ...] = ()
    prints: str | None = None
    not_run: str | None = None

    @property
    def name(self) -> str:
        """The line and the first command that is neither a comment nor an import."""
        lines = [line.strip() for line in self.text.splitlines()]
        telling = [x for x in lines if x and not x.startswith(("#", "import ", "from "))]
        return f"line {self.line}: {(telling or lines)[0].split('  #')[0].strip()[:60]}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a block of bash or Python without a comment that says how it runs, a comment
            without a block, an unknown fixture, or a block without a language.
    """
    found: list[Block] = []
    section = ""
    comment: str | None = None
    fence: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.splitlines(), 1):
        if fence is not None:
            if line.strip() == "```":
                start, language, lines = fence
                found.append(_block(start, section, language, "\n".join(lines) + "\n", comment))
                fence = comment = None
            else:
                fence[2].append(line)
        elif opened := re.fullmatch(r"```(\w*)", line):
            fence = (number, opened[1], [])
        elif said := re.fullmatch(r"<!-- fresh machine: (.+) -->", line):
            comment = said[1]
        elif comment is not None and line.strip():
            raise ValueError(f"line {number}: a comment for a block, and no block behind it")
        elif line.startswith("#"):
            section = line.lstrip("# ")
    if fence is not None or comment is not None:
        raise ValueError("the page ends within a block")
    return found


def _block(line: int, section: str, language: str, text: str, comment: str | None) -> Block:
    if language not in ("bash", "python"):
        if not language or comment:
            raise ValueError(f"line {line}: a block that is no command says so: ```text")
        return Block(line, section, language, text, not_run="no command")
    if comment is None:
        raise ValueError(f"line {line}: nothing says whether this block runs on a fresh machine")
    if skipped := re.fullmatch(r"not run, (.+)", comment):
        return Block(line, section, language, text, not_run=skipped[1])
    names, _, prints = comment.partition("; prints ")
    fixtures = tuple(name.strip() for name in names.split(",") if name.strip() != "as it is")
    if unknown := sorted(set(fixtures) - set(FIXTURES)):
        raise ValueError(f"line {line}: no fixture is called {', '.join(unknown)}")
    return Block(line, section, language, text, fixtures, prints or None)


def programs(found: Sequence[Block]) -> list[tuple[Block, str]]:
    """The blocks that run, and what runs: Python behind the Python of its section before it."""
    before: dict[str, str] = {}
    ready = []
    for block in found:
        if block.not_run:
            continue
        text = block.text
        if block.language == "python":
            text = before[block.section] = before.get(block.section, "") + text
        ready.append((block, text))
    return ready


def scripts(page: str) -> list[str]:
    """Commands in the first column of the page's tables, without their arguments."""
    found = []
    for command in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE):
        words = [word for word in command.split() if not word.isupper()]
        if words[0].endswith(".sh"):
            words.insert(0, "bash")
        elif words[0].endswith(".py"):
            words.insert(0, "python")
        found.append(" ".join(words))
    return found


# The machine. ------------------------------------------------------------------------------------


class StepFailed(Exception):
    """A step ended with another exit status than 0, or did not print what it should."""


@dataclass
class Machine:
    """An empty folder with an interpreter, a home and a session of a shell.

    Attributes:
        folder: holds `home`, `python` (the bare environment), logs of the steps, and the session.
        show: print what the steps print.
        seconds: how long each step took, by name, and how much of a core's time.
    """

    folder: Path
    show: bool = False
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the first step sees."""
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        own_pip = next((path for path in _pip_configurations() if path.is_file()), None)
        if own_pip and "PIP_CONFIG_FILE" not in kept:
            kept["PIP_CONFIG_FILE"] = str(own_pip)
        # What was downloaded once is kept for the next time, not what was installed.
        kept.setdefault("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
        path = os.pathsep.join([str(self.folder / "python" / "bin"), *_system_folders()])
        return kept | {
            "HOME": str(self.folder / "home"),
            "PATH": path,
            "HF_HUB_OFFLINE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # Python compiles what it imports; pip would compile 14,000 files in each environment.
            "PIP_COMPILE": "0",
        }

    def bare_python(self, name: str) -> Path:
        """A new virtual environment with pip alone, as the machine's Python."""
        place = self.folder / name
        base = getattr(sys, "_base_executable", None) or sys.executable
        subprocess.run([base, "-m", "venv", str(place)], check=True)
        return place / "bin" / "python"

    def new_session(self, cwd: Path) -> None:
        """Forget the variables and start in a folder, as a new terminal does."""
        self._session.write_text(f"cd {shlex.quote(str(cwd))}\n")

    @property
    def _session(self) -> Path:
        return self.folder / "session.sh"

    def step(self, name: str, command: str, *, prints: str | None = None) -> None:
        """Run lines of bash in the session and note the seconds.

        Args:
            command: stops at its first failure. Exported variables and the folder are carried on.
            prints: what its output must contain.

        Raises:
            StepFailed: the message ends with the last lines of its output.
        """
        script = self.folder / "step.sh"
        session = shlex.quote(str(self._session))
        script.write_text(
            f"set -eo pipefail\nsource {session}\n{command}\n"
            f"{{ export -p; echo 'cd -- \"$PWD\"'; }} >{session}\n"
        )
        log = self.folder / f"{len(self.seconds) + 1:02d}.log"
        begun, used = time.monotonic(), _core_seconds()
        print(f"{time.strftime('%H:%M:%S')}  {name} …", flush=True)
        with open(log, "wb") as output:
            process = subprocess.Popen(
                ["bash", str(script)], cwd=self.folder, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status: int | str = process.wait(STEP_SECONDS)
            except subprocess.TimeoutExpired:
                status = f"none after {STEP_SECONDS} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self.seconds[name] = (time.monotonic() - begun, _core_seconds() - used)
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line.split("\r")[-1] for line in text.splitlines()]
        if self.show:
            print("\n".join(f"    | {line}" for line in lines), flush=True)
        if status != 0:
            reason = f"exit status {status}"
        elif prints is not None and prints not in text:
            reason = f"it did not print {prints!r}"
        else:
            print(f"{'':8}  {self.seconds[name][0]:.1f} s", flush=True)
            return
        tail = "\n".join(f"    | {line}" for line in lines[-LAST_LINES:])
        raise StepFailed(f"{name}: {reason}; its last lines:\n{tail}")


def _core_seconds() -> float:
    """Time of cores that ended children have used."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _pip_configurations() -> list[Path]:
    return [Path.home() / ".config" / "pip" / "pip.conf", Path.home() / ".pip" / "pip.conf"]


def _system_folders() -> list[str]:
    """Folders of programs that come with the system: git, bash and the like, not our own."""
    return [
        f for f in ("/usr/local/bin", "/usr/bin", "/bin", "/opt/homebrew/bin") if Path(f).is_dir()
    ]


# What is run. ------------------------------------------------------------------------------------


COMMANDS_PAGE = Path("docs", "reference", "commands.md")


def pages(root: Path) -> list[Path]:
    """Pages whose blocks run, in the order of their run, which is that of reading."""
    site = (
        (root / "mkdocs.yml").read_text(encoding="utf-8") if (root / "mkdocs.yml").exists() else ""
    )
    listed = re.findall(
        r": ((?:quickstart|concepts/[\w-]+|guides/[\w-]+)\.md)$", site, re.MULTILINE
    )
    docs = [root / "docs" / name for name in dict.fromkeys(listed)]
    return [root / "README.md", *docs, *sorted((root / "examples").glob("*/README.md"))]


def documentation(machine: Machine, clone: Path) -> None:
    """Every block of the clone's pages, in one session, and `--help` of every command in them."""
    machine.new_session(clone)
    made: set[str] = set()

    def with_packages(program: str, *arguments: str) -> None:
        python = clone / ".venv" / "bin" / "python"
        environment = machine.environment | {"PYTHONPATH": str(clone)}
        subprocess.run([python, "-c", program, *arguments], cwd=clone, env=environment, check=True)

    for path in pages(clone):
        page, title = path.read_text(encoding="utf-8"), str(path.relative_to(clone))
        for block, text in programs(blocks(page)):
            for name in block.fixtures:
                if name not in made:
                    FIXTURES[name](clone, with_packages)
                    made.add(name)
            command = text
            if block.language == "python":
                # Not beside the checkout: its folder is called recformer, as the package is.
                program = machine.folder / "snippets" / f"{path.stem}_line_{block.line}.py"
                program.parent.mkdir(exist_ok=True)
                program.write_text(text)
                command = f"python {shlex.quote(str(program))}"
            machine.step(f"{title}, {block.name}", command, prints=block.prints)
    if (path := clone / COMMANDS_PAGE).exists():
        commands = scripts(path.read_text(encoding="utf-8"))
        machine.step(f"--help of {len(commands)} commands", _help_of(commands))


def _help_of(commands: Sequence[str]) -> str:
    """Ask every command for its help, two at a time; the output of one that fails is printed."""
    words = " ".join(shlex.quote(f"{command} --help") for command in commands)
    each = 'said=$(bash -c "$1" 2>&1 </dev/null) || { echo "$said"; exit 1; }'
    return f"printf '%s\\0' {words} | xargs -0 -n 1 -P 2 bash -c {shlex.quote(each)} _"


WHEEL = """
python3 -m pip wheel --quiet --no-deps --wheel-dir {dist} {clone}
"""

INSTALL = """
PATH={python}:$PATH
python -m pip install --quiet -c {clone}/constraints.txt {dist}/recformer-*.whl
"""

MAIN_JOB = {
    "recformer --help": ("recformer --help", "finetune"),
    "version": ("python -c 'import recformer; print(recformer.__version__)'", "."),
    "recformer process": (
        "recformer process --file_path purchases.csv --meta_file_path products.csv "
        "--output_path shop",
        "80 users, 48 items",
    ),
    "recformer audit": ("recformer audit shop", None),
    "recformer tokenizer": (
        "recformer tokenizer --meta_file shop/meta_data.json --vocab_size 400 --output_dir words",
        None,
    ),
    "recformer finetune": (
        "recformer finetune --data_path shop --tokenizer_name words --from_scratch "
        "--config_overrides hidden_size=32,num_hidden_layers=2,num_attention_heads=2,"
        "intermediate_size=64,initializer_range=0.05 --pooler_type avg --max_token_num 96 "
        "--num_train_epochs 2 --batch_size 32 --gradient_accumulation_steps 1 "
        "--finetune_negative_sample_size -1 --output_dir runs/recformer",
        "NDCG@10",
    ),
    "recformer baseline": (
        "recformer baseline --model popularity --data_path shop --output_dir runs/popularity",
        "NDCG@10",
    ),
    "recformer leaderboard": ("recformer leaderboard runs", "popularity"),
    "recformer benchmark": (
        "recformer benchmark 2>said || cat said",
        "error: the benchmarks are not",
    ),
    "recformer recommend": (
        """echo '{"user": "ann", "items": ["tent-4", "tent-5"]}' >histories.jsonl\n"""
        "recformer recommend --model runs/recformer/best_model --histories histories.jsonl "
        "--filter_seen",
        "ann",
    ),
}


def installed(machine: Machine, clone: Path) -> None:
    """Build the wheel, install it elsewhere, and do the main job with the installed command."""
    dist, place = machine.folder / "dist", machine.folder / "elsewhere"
    place.mkdir()
    shop(place, lambda *_: None)
    words = {"dist": shlex.quote(str(dist)), "clone": shlex.quote(str(clone))}
    machine.new_session(place)
    machine.step("wheel: build", WHEEL.format(**words))
    python = machine.bare_python("second_python")
    words["python"] = shlex.quote(str(python.parent))
    machine.step("wheel: install", INSTALL.format(**words))
    shutil.move(clone, clone.with_name("out_of_reach"))
    for name, (command, prints) in MAIN_JOB.items():
        machine.step(f"wheel: {name}", command, prints=prints)


def run(folder: Path, *, show: bool) -> int:
    """All steps in an empty folder; the exit status."""
    machine = Machine(folder, show)
    (folder / "home").mkdir()
    machine.bare_python("python")
    clone = folder / "recformer"
    begun = time.monotonic()
    failure = None
    try:
        source = shlex.quote(str(ROOT))
        machine.new_session(folder)
        machine.step("clone", f"git clone --quiet {source} {shlex.quote(str(clone))}")
        documentation(machine, clone)
        installed(machine, clone)
    except StepFailed as failed:
        failure = failed
    minutes = (time.monotonic() - begun) / 60
    print(
        f"\nseconds   of cores  expected  step ({os.cpu_count()} cores, {sys.version.split()[0]})"
    )
    for name, (seconds, cores) in machine.seconds.items():
        usual = next((value for part, value in EXPECTED.items() if part in name), None)
        said = f"{'' if usual is None else usual:>8}"
        slow = "  <- slower than it was" if usual is not None and cores > 1.5 * usual else ""
        print(f"{seconds:7.1f}  {cores:9.1f}  {said}  {name}{slow}")
    used = sum(cores for _, cores in machine.seconds.values())
    print(f"{60 * minutes:7.1f}  {used:9.1f}  {'':8}  all: {minutes:.1f} minutes")
    if minutes > MINUTES:
        print(f"warning: more than the {MINUTES} minutes that two idle cores should need")
    if failure is not None:
        print(f"\nFAILED: {failure}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    parser.add_argument("--show", action="store_true", help="print what the commands print")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True)
        return run(args.keep.resolve(), show=args.show)
    with tempfile.TemporaryDirectory(prefix="fresh machine ") as folder:
        return run(Path(folder).resolve(), show=args.show)


if __name__ == "__main__":
    raise SystemExit(main())
