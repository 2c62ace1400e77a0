"""Write the weights that pretraining starts from: a language model in Recformer's form.

The same as `recformer start-weights`.
"""

from recformer.cli import exit_with_message
from recformer.commands.start_weights import main

if __name__ == "__main__":
    exit_with_message(main)
