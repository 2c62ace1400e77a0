"""Write a baseline of one's own, keep its run, and test it against popularity, user by user.

python examples/new_baseline.py FOLDER [--attribute category] [--runs own_runs]

The baseline: what is bought most among the items that share an attribute with the last one bought,
then everything else by popularity. A model takes part as soon as it gives a score to every item.
Both leave a folder in RUNS, which `recformer compare` and `recformer leaderboard` read beside those
of the models of this package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from recformer.data.processed import ProcessedFolder
from recformer.evaluation.compare import compare
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.outside import write_run
from recformer.evaluation.ranks import count_ranks
from recformer.evaluation.runs import RankedRun


class PopularInGroup:
    """Popularity within the group of the last item.

    Args:
        folder: the data; only its training sequences are counted.
        attribute: whose values make the groups.
    """

    def __init__(self, folder: ProcessedFolder, attribute: str) -> None:
        self.counts = np.bincount(folder.train.items, minlength=folder.num_items).astype(float)
        values = [item.get(attribute, "") for item in folder.items]
        self.groups = np.unique(values, return_inverse=True)[1]

    def scores(self, history: np.ndarray) -> np.ndarray:
        """Scores (N,) of all items behind a history of item ids, oldest first."""
        same = self.groups == self.groups[history[-1]]
        return self.counts + same * (self.counts.max() + 1)


def main(argv: list[str] | None = None) -> None:
    """Rank every test user's next item by both, write both runs, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--attribute", default="category")
    parser.add_argument("--runs", type=Path, default=Path("own_runs"), help="where both go")
    args = parser.parse_args(argv)

    folder = ProcessedFolder.load(args.folder)
    if not any(args.attribute in item for item in folder.items):
        raise SystemExit(f"error: no item of {args.folder} has the attribute {args.attribute}")
    model, examples = PopularInGroup(folder, args.attribute), folder.eval_examples("test")
    ours = np.stack([model.scores(examples.histories[row]) for row in range(len(examples))])
    popularity = np.broadcast_to(model.counts, ours.shape)

    runs = []
    for name, scores in ((f"popular_by_{args.attribute}", ours), ("popularity", popularity)):
        evaluator = Evaluator()
        ranks = count_ranks(scores.copy(), examples.targets)
        evaluator.update(examples.user_ids, examples.targets, ranks)
        write_run(args.runs / name, folder, evaluator, model=name, parameters=0)
        runs.append(RankedRun.load(str(args.runs / name)))
    rows, (pair,) = compare(runs)
    for row in rows:
        figure = row["NDCG@10"]
        print(f"{row['name']:<24} NDCG@10 {figure['value']:.4f} "
              f"[{figure['low']:.4f}, {figure['high']:.4f}]")  # fmt: skip
    print(f"difference {pair['difference']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}], "
          f"p {pair['p']:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
