"""What pretraining wrote becomes released files: two state dicts and a from_pretrained folder.

The same as `recformer convert`.
"""

from recformer.cli import exit_with_message
from recformer.commands.convert import main

if __name__ == "__main__":
    exit_with_message(main)
