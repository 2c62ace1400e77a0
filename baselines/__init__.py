"""Baselines on the same processed folder, trainer and evaluator as Recformer.

`recformer baseline --model NAME --data_path FOLDER` trains and evaluates one; `baselines.models`
builds them in Python. Every model is a `recformer.evaluation.recommender.Recommender`.
"""
