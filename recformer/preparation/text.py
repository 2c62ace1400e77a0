"""Text of product metadata: any JSON value to text, and scraped text to plain text.

The 2018 pages were scraped with their markup: titles carry HTML entities and tags, prices and dates
carry style sheets, and some titles are the page's opening script from the first line to the last.
`clean_text` takes these out and leaves honest text alone: `3 < 5 mm`, `AT&T`, `<3` and
`Set {2 pieces}` come back as they were.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.entities import html5
from typing import Any

_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

_HIDDEN = re.compile(
    r"<!--.*?-->|<!\[CDATA\[|\]\]>|<!doctype\b[^<>]*>"
    r"|<(script|style|noscript)\b[^<>]*>.*?</\1\s*>",
    re.IGNORECASE | re.DOTALL,
)
# How a tag ends. An attribute has a value or is one that never does: `a <b and c> d` is text.
_TAG_END = (
    r"(?:\s+(?:[^<>]*=[^<>]*|async|defer|checked|disabled|hidden|noshade|nowrap|selected))?\s*/?>"
)
# Inside a word (H<sub>2</sub>O) these leave no gap, every other tag does.
_INLINE_TAG = re.compile(
    r"</?(?:b|big|em|font|i|s|small|strong|sub|sup|u)" + _TAG_END, re.IGNORECASE
)
_HTML_NAMES = (
    "a|abbr|address|article|aside|audio|base|bdi|bdo|blockquote|body|br|button|canvas|caption|"
    "center|cite|code|col|colgroup|dd|del|details|dfn|dir|div|dl|dt|embed|fieldset|figure|footer|"
    "form|frame|frameset|h[1-6]|head|header|hr|html|iframe|img|input|ins|kbd|label|legend|li|link|"
    "main|map|mark|meta|nav|noscript|object|ol|optgroup|option|p|param|picture|pre|q|samp|script|"
    "section|select|source|span|strike|style|summary|svg|table|tbody|td|template|textarea|tfoot|th|"
    "thead|time|title|tr|track|tt|ul|var|video|wbr"
)
_TAG = re.compile(
    rf"</?(?:{_HTML_NAMES}){_TAG_END}"
    # Any other name only where nothing but a tag is written so: closing, or with name="value".
    r"|</[a-z][\w:-]*\s*>"
    r"|<[a-z][\w:-]*(?:\s+[\w:-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'))+\s*/?>"
    # A tag that the scrape cut off.
    rf"|<(?:{_HTML_NAMES})\s+[\w:-]+=[^<>]*$",
    re.IGNORECASE,
)

# `.a-box #b, .c:hover { color: red }`: from the first class, id or at-rule to the closing brace.
# The inside holds `name: value` or nothing, which is what is left of a block of blocks.
_STYLED_TAG = r"\b(?:a|body|button|div|h[1-6]|html|img|input|li|p|span|table|td|th|tr|ul)"
_STYLE_RULE = re.compile(
    rf"(?:{_STYLED_TAG})?(?:[.#][A-Za-z_-][\w-]*|@[a-z-]+)[^{{}}<>;]{{0,300}}"
    r"\{\s*(?:[\w-]+\s*:[^{}]*)?\}"
    rf"|{_STYLED_TAG}(?::[a-z-]+)?\s*\{{\s*[\w-]+\s*:[^{{}}]*\}}"
)

_SCRIPT = re.compile(
    r"\bvar\s+[\w$]+\s*=(?!=)"
    r"|\(?\bfunction\s*[\w$]*\s*\([\w$,\s]*\)\s*(?:\{|$)"
    r"|\b(?:window|document)\.[\w$.]+\s*(?:\(|=|\|\||&&)"
    r"|\bnew\s+Date\s*\("
    r"|\.getTime\s*\("
    r"|\bP\.(?:when|register|now)\s*\("
    r"|\$\(\s*(?:document|window)\b"
    r"|\bif\s*\(\s*(?:window|document|typeof|ue)\b"
    r"|\bue_\w+\s*[=.]"
)
# What may follow in the same script without a keyword of its own. Honest text calls nothing
# (`name(`, no space), assigns nothing and has no doubled operators.
_SCRIPT_GOES_ON = re.compile(r"[\w$\])]\(|\w\s*=|\|\||&&|^\s*[)\]},:?]|\{|^\s*(?:else|return)\b")
_BLOCK = re.compile(r"\{[^{}]*\}")
# The opening script of every page of the site. Only a value that is the whole scraped page has it,
# and nothing that follows it is the product's.
_PAGE_SCRIPT = "ue_csm"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_INVISIBLE = re.compile(
    r"[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+"
)
_SIGNS_A_WORD = 2  # of these scripts, about


def count_words(text: str) -> int:
    """Words of a text: between spaces, and two signs each where a script has no spaces."""
    if text.isascii():
        return len(text.split())
    runs = _NO_SPACES.findall(text)
    return len(_NO_SPACES.sub(" ", text).split()) + sum(
        -(-len(run) // _SIGNS_A_WORD) for run in runs
    )


def cut_words(text: str, words: Callable[[str], list[str]]) -> list[str]:
    """Words of a text, for counting which texts share some.

    Args:
        text: any.
        words: cuts text of scripts with spaces; others give every pair of neighbouring signs.
    """
    runs = [] if text.isascii() else _NO_SPACES.findall(text)
    if not runs:
        return words(text)
    pairs = [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
    return words(_NO_SPACES.sub(" ", text)) + pairs


class OddValueError(ValueError):
    """A metadata field holds something that is not text, a number or a list of these."""


def text_parts(value: Any) -> list[str]:
    """The texts in a JSON value, nested lists laid out in order.

    Numbers become their text; null gives nothing, nor does NaN, which tables hold in its place.

    Raises:
        OddValueError: an object or a truth value stands where text was expected.
    """
    if isinstance(value, str):
        return [value]
    if value is None or value != value:
        return []
    if isinstance(value, list):
        return [part for entry in value for part in text_parts(entry)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    raise OddValueError(f"expected text, got {type(value).__name__}")


def clean_text(text: str) -> str:
    """Scraped text as plain text on one line; empty where nothing but markup or script was there.

    Takes out HTML entities (also escaped twice), tags and comments, style rules, script fragments,
    control and invisible characters, and runs of white space.
    """
    if "&" in text and ";" in text:
        text = _unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _INLINE_TAG.sub("", _HIDDEN.sub(" ", text)))
    # Whatever `_drop_code` looks for has one of these; most text has none, and an `in` is cheap.
    if (
        "{" in text
        or "=" in text
        or ("(" in text and ("Date" in text or "Time" in text or "w." in text or "t." in text))
    ):
        text = _drop_code(text)
    if not text.isprintable() or "  " in text or text[:1] == " " or text[-1:] == " ":
        text = " ".join(text.split())
        if not text.isprintable():  # no separator but the single space is left by now
            text = " ".join(_INVISIBLE.sub("", _CONTROL.sub(" ", text)).split())
    return text


def _unescape(text: str) -> str:
    # The three that make up nearly all of them.
    text = text.replace("&amp;", "&").replace("&quot;", '"').replace("&#39;", "'")
    for _ in range(4):  # `&amp;amp;quot;` has been seen; deeper nesting has not
        if ";" not in text or "&" not in text:
            break
        text, found = _ENTITY.subn(_entity, text)
        if not found:
            break
    return text


def _entity(match: re.Match[str]) -> str:
    # Not `unescape` for names: it would read the `not` in `&notebook;`.
    entity = match.group()
    return unescape(entity) if entity[1] == "#" else html5.get(entity[1:], entity)


def _drop_code(text: str) -> str:
    """Take out style rules and script statements; what stands before and after them stays."""
    if _PAGE_SCRIPT in text and (start := _SCRIPT.search(text)):
        text = text[: start.start()]
    if "{" in text:
        text = _until_stable(_STYLE_RULE, " ", text)
    start = _SCRIPT.search(text)
    if start is None:
        return text

    # Blocks first, from the innermost, so that a statement is a piece between two borders.
    head, script = text[: start.start()], text[start.start() :]
    kept = [head]
    for piece in re.split(r"[;\n\r]", _until_stable(_BLOCK, "\n", script)):
        found = _SCRIPT.search(piece)
        if found:
            kept.append(piece[: found.start()])
        elif not _SCRIPT_GOES_ON.search(piece):
            kept.append(piece)
    return " ".join(kept)


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    changed = 1
    while changed:
        text, changed = pattern.subn(replacement, text)
    return text
