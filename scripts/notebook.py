"""Run the notebooks of the examples, cell after cell, and keep what they print.

    python scripts/notebook.py examples/from_csv.ipynb --write

Code cells are plain Python: they run in one namespace, without a kernel, so that neither tests nor
readers without Jupyter need its forty packages. What a cell prints becomes its output.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of this run.

    Raises:
        RuntimeError: a cell failed; names it, from its exception.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            source, printed = "".join(cell["source"]), io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    exec(compile(source, f"cell {number}", "exec"), namespace)
            except Exception as error:
                raise RuntimeError(f"cell {number} failed: {source}") from error
            lines = printed.getvalue().splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            cell = cell | {"outputs": outputs}
        cells.append(cell)
    return notebook | {"cells": cells}


def main(words: list[str]) -> None:
    """Run one notebook; with `--write` its file gets the outputs."""
    path = Path(words[0]).resolve()  # cells may go to another folder
    made = run(json.loads(path.read_text(encoding="utf-8")))
    text = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    if words[1:] == ["--write"]:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
