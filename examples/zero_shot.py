"""Rank with a pretrained encoder: how good is it at the next item before anything is trained?

python examples/zero_shot.py FOLDER [--encoder sentence-transformers/all-MiniLM-L6-v2]

FOLDER is what `recformer process` writes. Any BERT, RoBERTa or Longformer does as the encoder.
"""

from __future__ import annotations

import argparse

import torch

from recformer import RecformerForSeqRec, RecformerTokenizer
from recformer.checkpoints.backbones import from_backbone
from recformer.checkpoints.loading import load_checkpoint
from recformer.data.processed import ProcessedFolder
from recformer.evaluation.evaluator import Evaluator
from recformer.evaluation.ranking import rank_by_vectors
from recformer.recommendation import CatalogueRecommender


def main(argv: list[str] | None = None) -> None:
    """Encode the catalogue, read every test user's history, rank what came next."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    args = parser.parse_args(argv)

    config, weights, _ = from_backbone(
        args.encoder, lm_head=False, pooler_type="avg", max_token_num=96, max_attr_length=16
    )
    model = RecformerForSeqRec(config)
    model.item_embedding = None  # no table of items that it was finetuned on
    load_checkpoint(model, weights, item_table=False)
    tokenizer = RecformerTokenizer.from_pretrained(args.encoder, config)

    folder = ProcessedFolder.load(args.folder)
    texts = dict(zip(folder.asins, folder.items, strict=True))
    recommender = CatalogueRecommender(model, tokenizer, texts)
    items = torch.zeros(folder.num_items, recommender.dimension)
    row_of = {name: row for row, name in enumerate(folder.asins)}
    for names, vectors, _ in recommender.rows():  # items without any text have none
        items[[row_of[name] for name in names]] = vectors

    examples, evaluator = folder.eval_examples("test"), Evaluator(ks=(10,))
    for start in range(0, len(examples), 64):
        rows = range(start, min(start + 64, len(examples)))
        histories = [[folder.asins[i] for i in examples.histories[row]] for row in rows]
        users, targets = recommender.user_vectors(histories), examples.targets[rows]
        evaluator.update(examples.user_ids[rows], targets, rank_by_vectors(users, items, targets))
    figures = evaluator.compute()
    print(f"{len(examples)} test users, {folder.num_items} items, nothing trained:")
    print(f"NDCG@10 {figures['NDCG@10']:.4f}, Recall@10 {figures['Recall@10']:.4f}")


if __name__ == "__main__":
    main()
