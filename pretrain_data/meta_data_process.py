"""Metadata of the published categories become meta_data.json.

The first of the two steps of the published code.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout works, from any folder

from recformer.cli import exit_with_message  # noqa: E402
from recformer.commands.process_pretraining import items  # noqa: E402

if __name__ == "__main__":
    exit_with_message(partial(items, beside=HERE))
