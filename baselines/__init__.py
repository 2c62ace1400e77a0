"""Baselines on the same processed folder, trainer and evaluator as Recformer.

`python -m baselines --model NAME --data_path FOLDER`, or in Python

>>> Popularity(ProcessedFolder.load(path)).evaluate("test")["NDCG@10"]

Every trained model is a `recformer.evaluation.recommender.Recommender`; the untrained ones rank
evaluation examples (`baselines.untrained.base.Baseline`).
"""
