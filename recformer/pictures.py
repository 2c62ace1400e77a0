"""Texts of any script in pictures, as they are.

matplotlib's own font has no Chinese, Japanese or Korean; where a font on the machine has them it is
used beside it, else a sign that no font has is drawn as a question mark.
"""

from __future__ import annotations

from collections.abc import Sequence


def drawable(texts: Sequence[str]) -> list[str]:
    """The texts with `?` for what no font has; fonts that have the rest are put to use.

    Between two dollar signs matplotlib would read a formula: they are escaped.

    Changes matplotlib's setting `font.family` where its own font lacks a sign.
    """
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    texts = [text.replace("$", "\\$") for text in texts]
    families = list(rcParams["font.family"])
    own = FT2Font(font_manager.findfont(font_manager.FontProperties(family=families)))
    lacking = {sign for text in texts for sign in text if sign > "~" and sign != "\n"}
    lacking -= {sign for sign in lacking if own.get_char_index(ord(sign))}
    if not lacking:
        return list(texts)
    for entry in font_manager.fontManager.ttflist:
        # The last resort has every sign, as a box.
        if not lacking or entry.name in families or entry.name.startswith("Last Resort"):
            continue
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # a broken file, or a font of pictures
            continue
        found = {sign for sign in lacking if font.get_char_index(ord(sign))}
        if found:
            families.append(entry.name)
            lacking -= found
    rcParams["font.family"] = families
    return ["".join("?" if sign in lacking else sign for sign in text) for text in texts]
