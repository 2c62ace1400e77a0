"""Texts of any script can be drawn, with a font that has them or with question marks."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace

import pytest
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure

from recformer.pictures import drawable


@pytest.fixture(autouse=True)
def only_own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine has besides must not matter."""
    monkeypatch.setitem(rcParams, "font.family", ["DejaVu Sans"])
    own = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


def test_texts_that_can_be_drawn_stay() -> None:
    assert drawable(["Café – 5 µm", "Ωmega", ""]) == ["Café – 5 µm", "Ωmega", ""]
    assert rcParams["font.family"] == ["DejaVu Sans"]


def test_what_no_font_has_is_a_question_mark() -> None:
    texts = drawable(["無線 headset", "傘", "plain"])
    assert texts == ["?? headset", "?", "plain"]
    canvas = Figure()
    canvas.text(0, 0, "\n".join(texts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every sign that it lacks
        canvas.savefig(io.BytesIO(), format="png")


def test_a_font_that_has_them_is_put_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Font:
        def __init__(self, path: str) -> None:
            self.signs = {"own": "abc", "broken": "", "kanji": "無線", "more": "傘線"}.get(path, "")
            if path == "broken":
                raise RuntimeError("no outlines")

        def get_char_index(self, code: int) -> int:
            return chr(code) in self.signs

    names = ["Last Resort", "broken", "kanji", "more"]
    fonts = [SimpleNamespace(name=name, fname=name) for name in names]
    monkeypatch.setattr("matplotlib.ft2font.FT2Font", Font)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findfont", lambda properties: "own")
    assert drawable(["無線傘 é"]) == ["無線傘 ?"]
    assert rcParams["font.family"] == ["DejaVu Sans", "kanji", "more"]
