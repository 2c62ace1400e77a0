"""The benchmarks do equal work on both sides and say what they measured; speed is not asserted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    ceilings,
    encoder,
    measure,
    ranking,
    sentences,
    sequence_models,
    stages,
    tricks,
)
from benchmarks.measure import Work, in_turns, line, measure_case, row, run_alone
from recformer import RecformerConfig
from recformer.files import UserError
from recformer.models import attention, kernel
from recformer.models.attention import AttentionLayout, RecformerSelfAttention
from recformer.models.band import fused_band_attention
from recformer.models.dropout import dropout
from recformer.models.encoder import RecformerLayer

BENCHMARKS_WITH_MEMORY = (
    "encoder",
    "item_encoding",
    "ranking",
    "tokenization",
    "data_preparation",
    "generation",
    "gradient_caching",
    "sentences",
)
FIELDS = {
    "what",
    "ours_seconds",
    "peer",
    "peer_seconds",
    "ratio",
    "amount",
    "unit",
    "share_of_ceiling",
    "peak_memory_mb",
    "peer_peak_memory_mb",
    "note",
}


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in measure.THREAD_VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # put back at the end
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are measured in this process: a new one takes seconds to import torch."""

    def here(case: Callable[..., Work], *args: Any, repeats: int = 0) -> dict[str, Any]:
        arguments = json.loads(json.dumps(args))
        return measure_case(f"{case.__module__}:{case.__name__}", arguments, repeats)

    for name in BENCHMARKS_WITH_MEMORY:
        module = __import__(f"benchmarks.{name}", fromlist=["run_alone"])
        monkeypatch.setattr(module, "run_alone", here)


def memory_case(megabytes: int) -> Work:
    return Work(lambda: b"x" * (megabytes * 10**6), len)


def test_a_row_holds_what_was_measured() -> None:
    values = row("x", 2.0, "y", 5.0, amount=100, unit="tokens", peak_memory_mb=1234.6, note="n")
    assert set(values) == FIELDS
    assert values["ratio"] == 2.5
    assert row("x", 2.0)["ratio"] is None
    words = line(values).split()
    assert words == ["x", "2", "50", "tokens", "5", "2.50", "1,235", "y", "n"]
    assert line(values).splitlines()[1] == "    n"


def test_functions_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []
    times = in_turns(2, lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert len(times) == 2


def test_seconds_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 100, 100, 101, 101, 106, 106, 108])  # a warm-up of 100, then 1, 5 and 2
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert in_turns(3, lambda: None) == [2]


def test_memory_is_that_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    held = b"x" * 10**8  # what the parent held does not count
    measured = run_alone(memory_case, 50)
    assert measured["summary"] == 50 * 10**6
    assert measured["seconds"] is None
    assert 45 < measured["peak_memory_mb"] < 60
    del held


def test_a_case_of_the_command_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `python -m` its module is called __main__, in the process of the case it is not."""
    monkeypatch.setattr(memory_case, "__module__", "__main__")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    assert run_alone(memory_case, 1)["summary"] == 10**6


def test_a_peak_that_cannot_start_anew_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert measure._peak_mb(reset=True) > 100  # torch alone is more
    monkeypatch.setattr(Path, "read_text", lambda _: "Name:\tpython\nVmRSS:\t1 kB\n")  # gVisor's
    assert measure._peak_mb(reset=True) > 100


def test_a_failed_case_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_case, "__module__", "nowhere")  # it cannot be imported there
    monkeypatch.setitem(sys.modules, "nowhere", SimpleNamespace(__spec__=None))
    with pytest.raises(SystemExit, match="memory_case"):
        run_alone(memory_case, 50)


def test_pairs_that_see_each_other() -> None:
    # each of 3 tokens sees itself, 1 on either side, and the last one <s>: 2 + 3 + 3
    assert encoder.visible_pairs([3], 1) == 8
    # of 5 tokens: 2, 3, 3 + <s>, 3 + <s>, 2 + <s>
    assert encoder.visible_pairs([5, 1], 1) == 16 + 1
    assert encoder.visible_pairs([5], 32) == 25


def test_operations_are_those_of_the_layers() -> None:
    config = RecformerConfig(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_window=2,
    )
    # a token: 2 * (4 * 16 + 2 * 32) = 256 in linear layers; pairs: 8 of 4 * 4 operations;
    # <s>: 6 * 16 for its own projections and 4 * 4 * 2 for each of 3 tokens
    layer = 3 * 256 + 8 * 16 + 96 + 96
    assert encoder.operations(config, [3], pooled=False) == 2 * layer
    # the last layer has output and feed-forward of <s> alone: 256 - 6 * 16
    assert encoder.operations(config, [3], pooled=True) == layer + 160 + 96 + 96
    _, counted = encoder.products(config, 3, torch.float32)
    assert counted == 2 * 3 * 256


@pytest.mark.parametrize(
    ("owner", "name", "plain"),
    [
        (RecformerSelfAttention, "_attend_from_first", tricks._project_every_token),
        (AttentionLayout, "gather_chunks", tricks._gather_chunks),
        (attention, "band_attention", fused_band_attention),
        (RecformerLayer, "forward", tricks._whole_layer),
    ],
)
def test_without_a_trick_the_encoder_computes_the_same(
    owner: Any, name: str, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder.build_ours("tiny").double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    packed = encoder.pack([5, 1, 40, 90], 1000)
    weight = torch.randn(packed.num_tokens, model.config.hidden_size, device=encoder.DEVICE)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        hidden = model.encode_tokens(packed)[0]
        (hidden * weight).sum().backward()
        with torch.no_grad():
            inferred = model.encode_tokens(packed)[0]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [hidden.detach(), inferred, *grads]

    expected = run()
    monkeypatch.setattr(owner, name, plain)
    for got, before in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, before, rtol=1e-8, atol=1e-8)


def test_plain_dropout_drops_the_share_it_says() -> None:
    x = torch.ones(400, 500)
    with tricks._bernoulli():
        y = dropout(x, 0.1, training=True)
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=0.005)  # 7 sigma
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.9), rtol=1e-4, atol=0)


def test_long_work_of_the_peer_is_cut_to_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "available_gb", lambda: 5.0)  # 2 spared, 2 for the table
    assert ranking._fitting(10**9, 1000) == 10**6
    assert ranking._fitting(10, 1000) == 10


# Those of 15 seconds and more, which CI runs beside the default suite.
LONG = ("search", "sentences", "serving", "training", "tricks")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
        for name in command.BENCHMARKS
    ],
)
def test_every_benchmark_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.json"
    command.main([name, "--quick", "--threads", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["machine"]["threads"] == 1
    assert written["machine"]["torch"] == version("torch")
    printed = capsys.readouterr().out
    assert written["rows"]
    assert f"`python -m benchmarks {name} --quick" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".tex").read_text().startswith("% python -m benchmarks ")
    assert path.with_suffix(".csv").read_text().count("\n") == 1 + len(written["rows"])
    for values in written["rows"]:
        assert set(values) == FIELDS | {"benchmark"}
        assert values["benchmark"] == name
        assert values["ours_seconds"] > 0
        assert values["what"] in printed
        assert len(values["what"]) < measure.WHAT_WIDTH
    if name in ("encoder", "training"):
        for values in written["rows"]:
            kind, _, error = values["note"].rpartition(" ")
            limit = 1e-4 if "float32" in values["what"] else 0.1
            if "cosine" in kind:
                assert float(error) > 0.999
            else:
                assert float(error) < limit
    if name == "generation":
        assert written["rows"][0]["note"].startswith("100.00% of the places")
    if name == "ranking":
        assert written["rows"][0]["note"] == "100.00% of users with the same rank"


@pytest.mark.parametrize("threads", ["0", "-1"])
def test_too_few_threads_are_refused(threads: str) -> None:
    with pytest.raises(UserError, match=f"--threads {threads}: must be at least 1"):
        command.main(["lengths", "--quick", "--threads", threads])


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["encodre"])
    assert "encodre" in capsys.readouterr().err


def test_the_onnx_peer_answers_each_call_or_ends_the_benchmark(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho noise\necho ready\nread go\necho "$go" "$3"\necho done\nexit 3\n'
    )
    python.chmod(0o755)
    item = {"title": "a", "brand": "b", "category": "c"}
    peer = sentences.OnnxPeer(str(python), tmp_path, [[item], [item, item]])
    texts = json.loads((tmp_path / "texts2.json").read_text())
    assert texts[1] == " ".join([texts[0]] * 2)
    peer()
    with pytest.raises((SystemExit, BrokenPipeError)):
        peer()


def test_a_peer_prints_its_seconds_or_is_named(tmp_path: Path) -> None:
    train = tmp_path / "train.json"
    train.write_text("3.5")
    program = (
        "import sys; print('noise'); print(float(open(sys.argv[1]).read()) * int(sys.argv[2]))"
    )
    seconds = sequence_models.peer_epoch("Peer 1", sys.executable, program, train)
    assert seconds == 3.5 * torch.get_num_threads()
    for python, said in ((sys.executable, "no replay"), (str(tmp_path / "nowhere"), "nowhere")):
        with pytest.raises(UserError, match=rf"could not run Peer 1.*{said}"):
            sequence_models.peer_epoch("Peer 1", python, "raise SystemExit('no replay')", train)
    for program in (sequence_models.RECTOOLS, sequence_models.REPLAY):
        compile(program, "peer", "exec")


def test_operators_of_a_step_are_sorted_by_what_they_do() -> None:
    kinds = [stages._kind(name) for name in ("aten::add_", "aten::gelu_backward")]
    assert kinds == ["sums and other arithmetic", "GELU"]
    products = {stages._kind(name) for name in ("aten::addmm", "_Linear", "_LinearBackward")}
    assert products == {"products of the linear layers"}


def test_products_that_are_measured_are_products() -> None:
    if kernel.library() is None:
        pytest.skip("no AVX-512, or no C++ compiler")
    library = ceilings.compiled()
    amx = bool(library.use_amx())
    kinds = [kernel.FLOAT]
    if amx or "avx512_bf16" in kernel.cpu_flags():
        kinds.append(kernel.BFLOAT16)
    for kind in kinds:
        library.registers(kind, 10)
    if amx:
        kinds.append(kernel.THREE_BFLOAT16)
    generator = torch.Generator().manual_seed(0)
    for rows, kind in product((10, 50), kinds):
        a, b = (torch.randn(count, 96, generator=generator) for count in (rows, 64))
        if kind == kernel.BFLOAT16:
            a, b = a.bfloat16(), b.bfloat16()
        sums = ceilings.Multiplication(library, kind, a, b)()
        torch.testing.assert_close(sums.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # compiles the kernel with counters
def test_stages_of_the_kernel_have_names() -> None:
    if kernel.library() is None:
        pytest.skip("no AVX-512, or no C++ compiler")
    whole, *parts = stages.kernel_rows("MiniLM", "float32")
    assert whole["ours_seconds"] > 0
    assert parts[0]["what"].endswith("products of the linear layers")
    assert {part["what"].split(": ")[1] for part in parts} >= {"GELU", "softmax", "embeddings"}
