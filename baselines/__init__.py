"""The lines every model must beat, on the same processed folder and evaluator as every model.

`python -m baselines --model NAME --data_path FOLDER`, or in Python

>>> Popularity(ProcessedFolder.load(path)).evaluate("test")["NDCG@10"]

A baseline has `rank(examples, seen)`, which places the target of every example among all items;
`evaluate` turns that into figures.

Shapes: E evaluation examples, C examples of a chunk, N items.
"""
