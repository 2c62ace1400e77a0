"""Requests and answers over HTTP: Gorse's with its field names, ours beside them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_pascal

from recformer.files import UserError
from recformer.serving.items import DEEPEST
from recformer.serving.store import FeedbackRow, ItemRow, UserRow
from recformer.serving.times import NO_TIME, now, read_time, write_time

NAME_LENGTH = 256
TEXT_LENGTH = 100_000
ATTRIBUTES = 64
# Control characters, which databases refuse or pages misread, and halves of surrogate pairs.
UNCLEAN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
NOT_IN_TEXT = re.compile("[\x00\ud800-\udfff]")


def check_name(name: str) -> str:
    """A name of an item, a user or a kind of feedback; never used as a path."""
    if not name or len(name) > NAME_LENGTH or "/" in name or UNCLEAN.search(name):
        raise UserError(
            f"{name[:40]!a} is no name, expected 1 to {NAME_LENGTH} characters without slashes and "
            "control characters"
        )
    return name


def check_text(text: str) -> str:
    """A text that any database takes."""
    if NOT_IN_TEXT.search(text):
        raise UserError("a text holds a zero byte or half a surrogate pair")
    return text


def check_labels(value: Any, depth: int = 0) -> Any:
    """Labels: JSON, of which a list holds texts alone or numbers alone, as Gorse asks for."""
    if depth > DEEPEST:
        raise UserError(f"labels are nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError("labels hold a number that is not finite")
    elif isinstance(value, dict):
        for key, each in value.items():
            check_text(key)
            check_labels(each, depth + 1)
    elif isinstance(value, list):
        texts = sum(isinstance(each, str) for each in value)
        numbers = sum(isinstance(each, int | float) for each in value)
        if len(value) not in (texts, numbers):
            raise UserError("a list of labels holds texts alone or numbers alone")
        for each in value:
            check_labels(each, depth + 1)
    return value


def check_time(text: str) -> str:
    """A time that `read_time` reads."""
    read_time(text, NO_TIME)
    return text


Name = Annotated[str, AfterValidator(check_name)]
Text = Annotated[str, Field(max_length=TEXT_LENGTH), AfterValidator(check_text)]
Word = Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(check_text)]
Labels = Annotated[Any, AfterValidator(check_labels)]
Time = Annotated[
    str,
    Field(max_length=64, description="RFC 3339", examples=["2026-11-26T08:00:00Z"]),
    AfterValidator(check_time),
]
Categories = Annotated[list[Word], Field(max_length=ATTRIBUTES)]


class Gorse(BaseModel):
    """Fields in Gorse's spelling: `item_id` is `ItemId`."""

    model_config = ConfigDict(alias_generator=to_pascal, validate_by_name=True)


class Item(Gorse):
    """An item. The comment is its title, labels that are an object its further attributes."""

    item_id: Name
    is_hidden: bool = False
    categories: Categories | None = None
    timestamp: Time = ""
    labels: Labels = None
    comment: Text = ""

    def row(self) -> ItemRow:
        """For the database."""
        return ItemRow(
            item_id=self.item_id,
            is_hidden=self.is_hidden,
            categories=list(dict.fromkeys(self.categories or [])),
            timestamp=read_time(self.timestamp, NO_TIME),
            labels=self.labels,
            comment=self.comment,
            deleted=False,
        )

    @classmethod
    def of(cls, row: ItemRow) -> Item:
        """From the database."""
        return cls.model_construct(
            item_id=row.item_id,
            is_hidden=row.is_hidden,
            categories=row.categories,
            timestamp=write_time(row.timestamp),
            labels=row.labels,
            comment=row.comment,
        )


class ItemPatch(Gorse):
    """New values of an item; what is absent or null stays."""

    is_hidden: bool | None = None
    categories: Categories | None = None
    timestamp: Time | None = None
    labels: Labels = None
    comment: Text | None = None

    def values(self) -> dict[str, Any]:
        """Columns that change."""
        values = self.model_dump(exclude_none=True)
        if "timestamp" in values:
            values["timestamp"] = read_time(values["timestamp"], NO_TIME)
        return values


class User(Gorse):
    """A user."""

    user_id: Name
    labels: Labels = None
    comment: Text = ""

    def row(self) -> UserRow:
        """For the database."""
        return UserRow(user_id=self.user_id, labels=self.labels, comment=self.comment)

    @classmethod
    def of(cls, row: UserRow) -> User:
        """From the database."""
        return cls.model_construct(user_id=row.user_id, labels=row.labels, comment=row.comment)


class UserPatch(Gorse):
    """New values of a user; what is absent or null stays."""

    labels: Labels = None
    comment: Text | None = None


class Feedback(Gorse):
    """A user did something with an item; without a time, just now."""

    feedback_type: Name
    user_id: Name
    item_id: Name
    value: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    timestamp: Time = ""
    comment: Text = ""

    def row(self) -> FeedbackRow:
        """For the database."""
        values = self.model_dump(exclude={"timestamp"})
        return FeedbackRow(**values, timestamp=read_time(self.timestamp, now()))

    @classmethod
    def of(cls, row: FeedbackRow) -> Feedback:
        """From the database."""
        return cls.model_construct(
            feedback_type=row.feedback_type,
            user_id=row.user_id,
            item_id=row.item_id,
            value=row.value,
            timestamp=write_time(row.timestamp),
            comment=row.comment,
        )


class SessionFeedback(Gorse):
    """A step of a session: only item, kind and time of it are read."""

    item_id: Name
    feedback_type: Word = ""
    user_id: Word = ""
    timestamp: Time = ""


class Success(Gorse):
    """The number of rows that a change was about."""

    row_affected: int


class Score(Gorse):
    """An item with its score."""

    id: str
    score: float


class ItemIterator(Gorse):
    """A page of items; an empty cursor ends the list."""

    cursor: str
    items: list[Item]


class UserIterator(Gorse):
    """A page of users."""

    cursor: str
    users: list[User]


class FeedbackIterator(Gorse):
    """A page of feedback."""

    cursor: str
    feedback: list[Feedback]


class Problem(BaseModel):
    """The fault of a request, in one line."""

    detail: str
