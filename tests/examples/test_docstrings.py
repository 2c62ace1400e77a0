"""Examples in docstrings of what users call run as they stand."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

NAMED = (
    "recformer",
    "recformer.recommendation",
    "recformer.config.RecformerConfig",
    "recformer.data.processed.ProcessedFolder.load",
    "recformer.evaluation.compare.compare",
    "recformer.evaluation.evaluator.Evaluator",
    "recformer.evaluation.metrics.per_user_metrics",
    "recformer.evaluation.outside.write_run",
    "recformer.evaluation.ranking.rank_by_vectors",
    "recformer.evaluation.ranks.count_ranks",
    "recformer.evaluation.statistics.bootstrap_interval",
    "recformer.evaluation.statistics.holm",
    "recformer.evaluation.statistics.permutation_p",
    "recformer.evaluation.top_items.top_items_by_vectors",
    "recformer.packing.PackedTokens",
    "recformer.recommendation.recommender.CatalogueRecommender",
    "recformer.tokenization.files.train_tokenizer",
    "recformer.tokenization.tokenizer.RecformerTokenizer",
)


def found(name: str) -> doctest.DocTest:
    """The doctest of an object, which sees its module's names."""
    words = name.split(".")
    for count in range(len(words), 0, -1):  # the longest name of a module, then what is in it
        try:
            module = import_module(".".join(words[:count]))
            break
        except ModuleNotFoundError:
            continue
    thing = module
    for word in words[count:]:
        thing = getattr(thing, word)
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(thing, name, module=module, globs=dict(vars(module)))
    return test


@pytest.mark.parametrize("name", NAMED)
def test_examples_say_what_comes_out(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    test = found(name)
    assert test.examples
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.failed == 0, "".join(said)


def test_every_example_of_the_package_is_run() -> None:
    """Whoever writes one adds it to the list."""
    root = Path(__file__).parents[2]
    written = [
        path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        for path in sorted((root / "recformer").rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ]
    written = [module.removesuffix(".__init__") for module in written]
    named = [module for module in written if any(f"{n}.".startswith(f"{module}.") for n in NAMED)]
    assert named == written
