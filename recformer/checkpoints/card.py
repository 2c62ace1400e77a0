"""The model card of a saved folder: data, rules, figures, and the code that loads it.

transformers alone does not know the architecture, so the card says what to install.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from recformer.evaluation.table import cell_text

CARD_FILE = "README.md"

RECOMMENDING = """\
from recformer.recommendation import CatalogueRecommender

recommender = CatalogueRecommender.load("this folder")
recommender.recommend([["name of an item", "name of a newer one"]], k=10)
recommender.recommend([[{"title": "an item that the catalogue does not hold"}]], k=10)"""

ENCODING = """\
import torch
from recformer import RecformerModel, RecformerTokenizer

model = RecformerModel.from_pretrained("this folder").eval()
tokenizer = RecformerTokenizer.from_pretrained("this folder")
with torch.no_grad():
    vector = model(**tokenizer([[{"title": "an item"}]], return_tensor=True)).pooler_output"""

LOADING = """\
## Loading

    pip install recformer

```python
{code}
```

`import recformer` makes `AutoConfig` and `AutoModel` of transformers know the folder too;
transformers alone does not have this architecture (`model_type: recformer`) and refuses it.
"""


def write_card(
    folder: str | os.PathLike,
    title: str,
    sentence: str,
    facts: Mapping[str, object],
    figures: Mapping[str, float],
    code: str,
) -> None:
    """Write `README.md`, with the front matter that model hubs read.

    Args:
        folder: of the model.
        title, sentence: name and purpose of the model.
        facts: data and protocol in words.
        figures: metric -> value.
        code: Python that loads it.
    """
    lines = [
        "---",
        "library_name: recformer",
        "tags: [sequential-recommendation, recformer]",
        "---",
        "",
        f"# {title}",
        "",
        sentence,
        "",
    ]
    if facts:
        lines += ["| | |", "|---|---|"]
        lines += [f"|{name}|{cell_text(str(value))}|" for name, value in facts.items()] + [""]
    if figures:
        lines += ["## Figures", "", "| metric | test |", "|---|---|"]
        lines += [f"|{name}|{value:.4f}|" for name, value in figures.items()] + [""]
    text = "\n".join(lines) + "\n" + LOADING.format(code=code)
    # Written plainly: it lies in a folder that is put in place as a whole.
    (Path(folder) / CARD_FILE).write_text(text, encoding="utf-8")
