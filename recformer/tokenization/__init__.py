"""Items become sentences, sentences become token ids (paper section 2.1, figure 2).

An item is a dict of attributes in the order of its keys, `{"title": …, "brand": …, "category": …}`.
Its sentence is name, value, name, value, …, every name and every value tokenised by itself, without
a leading space and without special tokens. A user's items, newest first, behind one `<s>` are the
input of the model.

The work is done by a fast (Rust) tokenizer held inside; nothing of it or of the configuration is
changed from here. `RecformerTokenizer.encode_items` is the quick way through for a catalogue, the
other methods have the published signatures.

`recformer tokenizer --meta_file meta_data.json --vocab_size 4096 --output_dir DIR`
trains a small byte-level BPE on a catalogue.

Shapes: N items, T tokens of all of them laid end to end.
"""

from recformer.tokenization.files import train_tokenizer
from recformer.tokenization.texts import Item, item_texts
from recformer.tokenization.tokenizer import (
    CLS_TYPE,
    NAME_TYPE,
    PAD_TYPE,
    VALUE_TYPE,
    RecformerTokenizer,
    ragged_indices,
)

__all__ = [
    "CLS_TYPE",
    "NAME_TYPE",
    "PAD_TYPE",
    "VALUE_TYPE",
    "Item",
    "RecformerTokenizer",
    "item_texts",
    "ragged_indices",
    "train_tokenizer",
]
