"""Interactions and items out of raw files: their columns, named or recognised.

Columns are named by flags or recognised by the names that public data sets give them; where neither
tells, the file is refused and its columns are listed. `forms` has the forms of files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from recformer.files import UserError
from recformer.preparation import amazon
from recformer.preparation.amazon import ReviewColumns
from recformer.preparation.catalogues import LISTED, ItemSource
from recformer.preparation.columns import (
    EVENTS,
    ITEMS,
    LISTS_OF_ITEMS,
    RATINGS,
    SESSIONS,
    TEXTS,
    TIMES,
    USERS,
    Columns,
    plain,
)
from recformer.preparation.forms import LOOK_AT, RawFile, open_file, read_object, short
from recformer.preparation.lines import check_encoding, first_lines
from recformer.preparation.logs import InteractionSource

__all__ = [
    "Columns",
    "InteractionSource",
    "ItemSource",
    "interaction_source",
    "open_interactions",
    "open_items",
    "open_sources",
]

# Of a column of lists beside the item that came next, given the item's name.
_LISTS_BEFORE_ITEM = ("{}list", "history{}", "{}history", "{}seq")
_LIST_ENDING = re.compile(r"[-_]list(?:_seq)?$")  # Transformers4Rec's item_id-list
_LOOKS_LIKE_LISTS = re.compile(r"hist|list|seq|prev|past|session", re.IGNORECASE)
_CODE = re.compile(r"<[a-z]+_\d+>")  # LC-Rec's and MiniOneRec's semantic ids

# Attributes where --attributes is not given: {name in the item's sentence: column}. The names are
# those of the pretrained model, so that other years' items read alike.
_AMAZON_2018 = {"title": "title", "brand": "brand", "category": "category"}
_AMAZON_2014 = {"title": "title", "brand": "brand", "category": "categories"}
_AMAZON_2023 = {"title": "title", "brand": "store", "category": "categories"}


def open_log(
    interactions: str | os.PathLike, columns: Columns, attributes: Sequence[str] | None
) -> tuple[InteractionSource, dict[str, str]]:
    """As `open_sources`, where there is no file of items.

    Returns:
        The interactions, and which of their columns make up an item: those that `attributes` names,
        or else whose names are known to hold a title, a brand or a category; there may be none.
    """
    path = Path(interactions)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, expected a file: it is read twice")
    if columns.encoding is not None:
        check_encoding(columns.encoding)
    if columns.item_key is not None:
        raise UserError(
            f"--item_key_column {columns.item_key} is of a file of items, and there is none: give "
            f"it with --meta_file_path"
        )
    file = open_file(path, columns)
    source = interaction_source(file, columns)
    if attributes is not None:
        chosen = _chosen(attributes)
        _check_attributes(file, chosen)
        return source, chosen
    if source.before is not None or file.kind not in ("csv", "tsv", "atomic", "parquet"):
        return source, {}
    taken = {name for name in vars(source.columns).values() if name is not None}
    by_name = {plain(name): name for name in file.names if name not in taken}
    return source, {
        known: by_name[name]
        for known, names in TEXTS.items()
        if (name := next((one for one in names if one in by_name), None)) is not None
    }


def open_sources(
    interactions: str | os.PathLike,
    items: str | os.PathLike,
    columns: Columns,
    attributes: Sequence[str] | None,
) -> tuple[InteractionSource, ItemSource]:
    """Recognise the forms and columns of two files from their first lines.

    Args:
        interactions, items: the files; of Parquet, also a folder of files.
        columns: what the user said of them.
        attributes: `column` or `name=column` each; None: those of Amazon's files where it is one,
            otherwise every column but the item's id.

    Raises:
        FileNotFoundError: a file is missing; both are named where both are.
        UserError: a file is empty, damaged, swapped for the other or lacks a column; the columns
            found are listed.
    """
    paths = [Path(interactions), Path(items)]
    _check_paths(paths, columns)
    log, catalogue = (open_file(path, columns) for path in paths)
    # Where the user says what is what, there is nothing to guess: a catalogue may name its users.
    if columns.encoding is None:
        amazon.check_raw_files(
            paths[:1] if log.kind == "json" and columns.user is None else [],
            paths[1:] if catalogue.kind == "json" and columns.item_key is None else [],
        )
    return interaction_source(log, columns), _item_source(catalogue, columns.item_key, attributes)


def open_interactions(path: str | os.PathLike, columns: Columns) -> InteractionSource:
    """As `open_sources`, of a file of interactions alone."""
    _check_paths([Path(path)], columns)
    return interaction_source(open_file(Path(path), columns), columns)


def open_items(
    path: str | os.PathLike, columns: Columns, attributes: Sequence[str] | None
) -> ItemSource:
    """As `open_sources`, of a file of items alone."""
    _check_paths([Path(path)], columns)
    return _item_source(open_file(Path(path), columns), columns.item_key, attributes)


def _check_paths(paths: Sequence[Path], columns: Columns) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    for path in paths:
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a pipe or a device, expected a file: it is read twice")
    if columns.encoding is not None:
        check_encoding(columns.encoding)


def interaction_source(file: RawFile, columns: Columns) -> InteractionSource:
    """What stands where in a file of interactions.

    Raises:
        UserError: a column is missing, or one is to be two things.
    """
    if file.kind in ("object", "histories"):
        unused = ("user", "item", "time", "rating", "event", "session", "owner")
        wrong = [f"--{name}_column" for name in columns.named() if name in unused]
        if wrong:
            raise UserError(f"{file.path} has no columns, got {', '.join(sorted(wrong))}")
        return InteractionSource(file, ReviewColumns("user", "item", None, None))
    item = _named(file, "--item_column", columns.item)
    item = item or _known(file, [*ITEMS, *LISTS_OF_ITEMS])
    user = _user_column(file, columns, item)
    if item is None:
        raise _unknown(file, "--item_column", "'item_id', 'asin'")
    time = _named(file, "--time_column", columns.time) or _known(file, TIMES)
    rating = _named(file, "--rating_column", columns.rating) or _known(file, RATINGS)
    event = _named(file, "--event_column", columns.event) or _known(file, EVENTS)
    chosen = [name for name in (user, item, time, rating, event) if name is not None]
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{file.path}: one column is to be two things, got {', '.join(chosen)}")
    before = None if item in file.lists else _list_before(file, item, [user, item])
    if before is not None:
        wrong = [
            f"--{name}_column" for name in ("time", "rating", "event") if name in columns.named()
        ]
        if wrong:
            raise UserError(
                f"{file.path}: {', '.join(wrong)} would say it of {item!r} alone and not of the "
                f"items in {before!r}, from which histories are joined: leave the flag out"
            )
        time = rating = event = None
    owner = None
    if columns.session is not None:
        owner = _named(file, "--user_column", columns.owner) or _known(file, USERS)
    return InteractionSource(
        file,
        ReviewColumns(user, item, time, rating, event),
        before,
        None if owner == user else owner,
    )


def _user_column(file: RawFile, columns: Columns, item: str | None) -> str:
    if columns.session is not None and columns.user is not None:
        raise UserError(
            f"--session_column {columns.session} takes every session as a user, got --user_column "
            f"{columns.user} beside it: name one of them"
        )
    named = _named(file, "--user_column", columns.user)
    named = named or _named(file, "--session_column", columns.session)
    if named is not None:
        return named
    user, session = _known(file, USERS), _known(file, SESSIONS)
    if user is not None:
        return user
    if session is None:
        raise _unknown(file, "--user_column", "'user_id', 'reviewerID'")
    if item in file.lists or (item and _list_before(file, item, [session, item])):
        return session  # a row is of a session: there is nothing else that it could be of
    raise UserError(
        f"{file.path} has no column that is known to hold users: name it with --user_column, or "
        f"take each session as a user with --session_column {session}"
    )


def _list_before(file: RawFile, item: str, chosen: Sequence[str]) -> str | None:
    """The column of what came before the item, where a line is an example to train on.

    Raises:
        UserError: a column looks like one and its name is not known.
    """
    known = [form.format(plain(item)) for form in _LISTS_BEFORE_ITEM]
    others = [name for name in file.names if name not in chosen]
    for name in others:
        if plain(name) in known:
            return name
    if file.kind == "json":
        return None  # what else a line of JSON holds is stepped over, lists too
    lists = [name for name in others if name in file.lists and _LOOKS_LIKE_LISTS.search(name)]
    if lists and item not in file.lists:
        raise UserError(
            f"{file.path} has a column of lists, {lists[0]!r}, beside {item!r}: is a line a whole "
            f"history, name that column with --item_column; is it a history and the item after it, "
            f"call it {item}_list in the header"
        )
    return None


def _item_source(file: RawFile, key: str | None, attributes: Sequence[str] | None) -> ItemSource:
    if file.kind in ("sasrec", "histories"):
        raise UserError(
            f"{file.path} has no columns with names, expected items as CSV, TSV, Parquet, JSON "
            f"Lines or a RecBole .item file"
        )
    if file.kind == "object":
        return _object_items(file, key, attributes)
    key_column = _named(file, "--item_key_column", key) or _known(file, [*ITEMS, "id"])
    if key_column is None:
        raise _unknown(file, "--item_key_column", "'item_id', 'asin'")
    # pandas names a column of row numbers so.
    others = [
        name
        for name in file.names
        if name != key_column and name and not name.startswith("Unnamed: ")
    ]
    if attributes is not None:
        chosen = _chosen(attributes)
        # A line of JSON need not have every field: what no line has among the first is no mistake.
        if file.kind != "json":
            _check_attributes(file, chosen)
    elif file.kind == "json":
        if key_column == "parent_asin":
            chosen = _AMAZON_2023
        elif key_column == "asin":
            old = "categories" in file.names and "category" not in file.names
            chosen = _AMAZON_2014 if old else _AMAZON_2018
        else:
            chosen = {name: name for name in others}
    else:
        chosen = {name: name for name in others}
    if not chosen:
        raise UserError(
            f"{file.path} has no column beside {key_column!r}, expected text of the items"
        )
    return ItemSource(file, key_column, dict(chosen))


def _object_items(file: RawFile, key: str | None, attributes: Sequence[str] | None) -> ItemSource:
    """Items as {id: {attribute: value}}, or as {id: [attribute, …]}."""
    if key is not None:
        raise UserError(f"{file.path} has its ids as keys, got --item_key_column {key}")
    values = list(islice(read_object(file).values(), LOOK_AT))
    texts = [text for value in values if isinstance(value, list) for text in value]
    if texts and all(isinstance(text, str) and _CODE.fullmatch(text) for text in texts):
        raise UserError(
            f"{file.path} holds semantic ids ({short(values[0])}), expected the items' text as "
            f"{{id: {{attribute: text}}}}, as in NAME.item.json"
        )
    if all(isinstance(value, list) for value in values):
        names = [LISTED]
    elif all(isinstance(value, dict) for value in values):
        names = list(dict.fromkeys(name for value in values for name in value))
    else:
        wrong = next(value for value in values if not isinstance(value, dict))
        raise UserError(
            f"{file.path} has {short(wrong)} of an item, expected {{id: {{attribute: text}}}}"
        )
    file = replace(file, names=names)
    chosen = {name: name for name in names} if attributes is None else _chosen(attributes)
    if not chosen:
        raise UserError(f"{file.path}: its items have no attribute, expected {{attribute: text}}")
    if names == [LISTED]:
        _check_attributes(file, chosen)
    return ItemSource(file, "the keys", chosen)


def _chosen(attributes: Sequence[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in attributes]
    return {name: column or name for name, _, column in pairs}


def _check_attributes(file: RawFile, chosen: dict[str, str]) -> None:
    wrong = [column for column in chosen.values() if column not in file.names]
    if wrong:
        raise UserError(
            f"{file.path} has no column {', '.join(map(repr, wrong))} (--attributes), found: "
            f"{file.few_names()}"
        )


def _known(file: RawFile, known: Sequence[str]) -> str | None:
    """The column with the most telling of the known names."""
    names: dict[str, str] = {}
    # A list of items is called item_id-list; where there is an item_id too, that is the item.
    for name in (*file.names, *(_LIST_ENDING.sub("", name) for name in file.names)):
        names.setdefault(plain(name), name)
    found = next((names[name] for name in known if name in names), None)
    if found is None or found in file.names:
        return found
    return next(name for name in file.names if _LIST_ENDING.sub("", name) == found)


def _named(file: RawFile, flag: str, name: str | None) -> str | None:
    """The column that a flag names."""
    if name is None or name in file.names:
        return name
    raise UserError(f"{file.path} has no column {name!r} ({flag}), found: {file.few_names()}")


def _unknown(file: RawFile, flag: str, known: str) -> UserError:
    if not file.has_header and file.kind != "sasrec":
        first = first_lines(file.path, 1, file.encoding)[0][:60]
        return UserError(
            f"{file.path} has no header, its columns go by their numbers, from 1 to "
            f"{len(file.names)} ({first!r}): say which is which ({flag} 1)"
        )
    return UserError(
        f"{file.path}: none of the columns {file.few_names()} is known as {known}, …: name the "
        f"right one with {flag}"
    )
