"""Interactions and items become a processed folder.

The same as `recformer process`, with the published files beside this script as defaults.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a plain checkout works, from any folder

from recformer.cli import exit_with_message  # noqa: E402
from recformer.commands.process import main  # noqa: E402

if __name__ == "__main__":
    exit_with_message(partial(main, beside=HERE))
