"""Gorse's REST API: items, users, feedback and recommendations under /api.

Paths, field names and status codes are those of Gorse 0.5 (https://gorse.io, server/rest.go), so
that its clients work. Of what Gorse does, the neighbours of users, measurements and the deprecated
intermediate results are not here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, HTTPException, Query, Request

from recformer.files import UserError
from recformer.recommendation import Recommended
from recformer.serving.schemas import (
    Feedback,
    FeedbackIterator,
    Item,
    ItemIterator,
    ItemPatch,
    Name,
    Score,
    SessionFeedback,
    Success,
    User,
    UserIterator,
    UserPatch,
    Word,
    check_name,
)
from recformer.serving.service import Service
from recformer.serving.store import FeedbackRow
from recformer.serving.times import NO_TIME, now, read_time

router = APIRouter(prefix="/api")

Count = Annotated[int, Query(ge=0, le=10**9)]
Offset = Annotated[int, Query(ge=0, le=10**9)]
DEFAULT = 10

# Go's durations: 1h30m, 250ms; parts in any order.
DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ns|us|µs|ms|s|m|h)")
UNITS = {"ns": 1e-3, "us": 1, "µs": 1, "ms": 1e3, "s": 1e6, "m": 6e7, "h": 3.6e9}


def service_of(request: Request) -> Service:
    """The service behind the application."""
    return request.app.state.service


def checked(n: int, most: int, what: str = "n") -> int:
    """A number of a request, within its limit."""
    if n > most:
        raise UserError(f"{what} is {n}, at most {most} are answered at once")
    return n


def _rows(request: Request, rows: Sequence[object]) -> None:
    checked(len(rows), service_of(request).limits.rows, "the number of rows")


def _duration(text: str) -> int:
    """Microseconds of a duration in Go's form."""
    parts = DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        raise UserError(f"{text[:40]!a} is no duration, expected such as 1h30m")
    return min(round(sum(float(number) * UNITS[unit] for number, unit in parts)), 10**15)


def _found(kind: str, name: str) -> HTTPException:
    return HTTPException(404, f"there is no {kind} {name!r}")


# --- items ------------------------------------------------------------------------------------


@router.post("/item", tags=["items"])
def insert_item(item: Item, request: Request) -> Success:
    """Add an item, or replace it: it is recommended and read in histories at once."""
    service_of(request).put_items([item.row()])
    return Success(row_affected=1)


@router.post("/items", tags=["items"])
def insert_items(items: list[Item], request: Request) -> Success:
    """Add items, or replace them."""
    _rows(request, items)
    service_of(request).put_items([item.row() for item in items])
    return Success(row_affected=len(items))


@router.get("/items", tags=["items"])
def get_items(
    request: Request, n: Count = DEFAULT, cursor: Word = "", q: Word = ""
) -> ItemIterator:
    """Items by name, a page at a time; or, with q, those whose title holds its words."""
    service = service_of(request)
    checked(n, service.limits.rows)
    if q:
        rows = [service.item(name) for name in service.main.search.find(q, n)]
        return ItemIterator(cursor="", items=[Item.of(row) for row in rows if row is not None])
    found = service.items_after(cursor, n)
    last = found[-1].item_id if n and len(found) == n else ""
    return ItemIterator(cursor=last, items=[Item.of(row) for row in found])


@router.get("/item/{item_id}", tags=["items"])
def get_item(item_id: Name, request: Request) -> Item:
    """An item."""
    row = service_of(request).item(item_id)
    if row is None:
        raise _found("item", item_id)
    return Item.of(row)


@router.patch("/item/{item_id}", tags=["items"])
def modify_item(item_id: Name, patch: ItemPatch, request: Request) -> Success:
    """Change an item; it is encoded anew only where its text changed."""
    if not service_of(request).change_item(item_id, **patch.values()):
        raise _found("item", item_id)
    return Success(row_affected=1)


@router.delete("/item/{item_id}", tags=["items"])
def delete_item(item_id: Name, request: Request) -> Success:
    """Remove an item and its feedback."""
    service_of(request).delete_item(item_id)
    return Success(row_affected=1)


@router.put("/item/{item_id}/category/{category}", tags=["items"])
def insert_category(item_id: Name, category: Name, request: Request) -> Success:
    """Put an item into a category."""
    return _categories(request, item_id, category, present=True)


@router.delete("/item/{item_id}/category/{category}", tags=["items"])
def delete_category(item_id: Name, category: Name, request: Request) -> Success:
    """Take an item out of a category."""
    return _categories(request, item_id, category, present=False)


def _categories(request: Request, item_id: str, category: str, present: bool) -> Success:
    service = service_of(request)
    row = service.item(item_id)
    if row is None:
        raise _found("item", item_id)
    others = [each for each in row.categories if each != category]
    service.change_item(item_id, categories=[*others, category] if present else others)
    return Success(row_affected=1)


# --- users ------------------------------------------------------------------------------------


@router.post("/user", tags=["users"])
def insert_user(user: User, request: Request) -> Success:
    """Add a user, or replace what is known of it."""
    service_of(request).store.put_users([user.row()])
    return Success(row_affected=1)


@router.post("/users", tags=["users"])
def insert_users(users: list[User], request: Request) -> Success:
    """Add users."""
    _rows(request, users)
    service_of(request).store.put_users([user.row() for user in users])
    return Success(row_affected=len(users))


@router.get("/users", tags=["users"])
def get_users(request: Request, n: Count = DEFAULT, cursor: Word = "") -> UserIterator:
    """Users by name, a page at a time."""
    service = service_of(request)
    rows = service.store.users_after(cursor, checked(n, service.limits.rows))
    last = rows[-1].user_id if n and len(rows) == n else ""
    return UserIterator(cursor=last, users=[User.of(row) for row in rows])


@router.get("/user/{user_id}", tags=["users"])
def get_user(user_id: Name, request: Request) -> User:
    """A user."""
    row = service_of(request).store.user(user_id)
    if row is None:
        raise _found("user", user_id)
    return User.of(row)


@router.patch("/user/{user_id}", tags=["users"])
def modify_user(user_id: Name, patch: UserPatch, request: Request) -> Success:
    """Change what is known of a user."""
    store = service_of(request).store
    row = store.user(user_id)
    if row is None:
        raise _found("user", user_id)
    for column, value in patch.model_dump(exclude_none=True).items():
        setattr(row, column, value)
    store.put_users([row])
    return Success(row_affected=1)


@router.delete("/user/{user_id}", tags=["users"])
def delete_user(user_id: Name, request: Request) -> Success:
    """Forget a user with all feedback."""
    service_of(request).store.delete_user(user_id)
    return Success(row_affected=1)


# --- feedback ---------------------------------------------------------------------------------


@router.post("/feedback", tags=["feedback"])
def insert_feedback(feedback: list[Feedback], request: Request) -> Success:
    """Take feedback in; what is there already stays as it is."""
    return _insert(request, feedback, overwrite=False)


@router.put("/feedback", tags=["feedback"])
def overwrite_feedback(feedback: list[Feedback], request: Request) -> Success:
    """Take feedback in; it replaces what is there."""
    return _insert(request, feedback, overwrite=True)


def _insert(request: Request, feedback: list[Feedback], overwrite: bool) -> Success:
    _rows(request, feedback)
    service_of(request).put_feedback([each.row() for each in feedback], overwrite)
    return Success(row_affected=len(feedback))


def _page(request: Request, n: int, cursor: str, kind: str | None) -> FeedbackIterator:
    if cursor and not (cursor.isdecimal() and cursor.isascii() and len(cursor) < 19):
        raise UserError(f"{cursor[:40]!a} is no cursor of this list")
    service = service_of(request)
    n = checked(n, service.limits.rows)
    rows = service.store.feedback_after(int(cursor or 0), n, kind)
    last = str(rows[-1].number) if n and len(rows) == n else ""
    return FeedbackIterator(cursor=last, feedback=[Feedback.of(row) for row in rows])


@router.get("/feedback", tags=["feedback"])
def get_feedback(request: Request, n: Count = DEFAULT, cursor: Word = "") -> FeedbackIterator:
    """Feedback in order of arrival, a page at a time."""
    return _page(request, n, cursor, None)


@router.get("/feedback/{feedback_type}", tags=["feedback"])
def get_typed_feedback(
    feedback_type: Name, request: Request, n: Count = DEFAULT, cursor: Word = ""
) -> FeedbackIterator:
    """Feedback of one kind."""
    return _page(request, n, cursor, feedback_type)


@router.get("/feedback/{user_id}/{item_id}", tags=["feedback"])
def get_user_item_feedback(user_id: Name, item_id: Name, request: Request) -> list[Feedback]:
    """Feedback of a user on an item."""
    rows = service_of(request).store.feedback(user_id=user_id, item_id=item_id)
    return [Feedback.of(row) for row in rows]


@router.delete("/feedback/{user_id}/{item_id}", tags=["feedback"])
def delete_user_item_feedback(user_id: Name, item_id: Name, request: Request) -> Success:
    """Forget feedback of a user on an item."""
    count = service_of(request).store.delete_feedback(user_id, item_id)
    return Success(row_affected=count)


@router.get("/feedback/{feedback_type}/{user_id}/{item_id}", tags=["feedback"])
def get_typed_user_item_feedback(
    feedback_type: Name, user_id: Name, item_id: Name, request: Request
) -> Feedback:
    """One piece of feedback."""
    rows = service_of(request).store.feedback(user_id, item_id, feedback_type)
    if not rows:
        raise HTTPException(404, "there is no such feedback")
    return Feedback.of(rows[0])


@router.delete("/feedback/{feedback_type}/{user_id}/{item_id}", tags=["feedback"])
def delete_typed_user_item_feedback(
    feedback_type: Name, user_id: Name, item_id: Name, request: Request
) -> Success:
    """Forget one piece of feedback."""
    count = service_of(request).store.delete_feedback(user_id, item_id, feedback_type)
    return Success(row_affected=count)


@router.get("/user/{user_id}/feedback", tags=["feedback"])
def get_feedback_of_user(user_id: Name, request: Request) -> list[Feedback]:
    """All feedback of a user, oldest first."""
    rows = service_of(request).store.feedback(user_id=user_id)
    return [Feedback.of(row) for row in rows]


@router.get("/user/{user_id}/feedback/{feedback_type}", tags=["feedback"])
def get_typed_feedback_of_user(
    user_id: Name, feedback_type: Name, request: Request
) -> list[Feedback]:
    """Feedback of one kind of a user, oldest first."""
    rows = service_of(request).store.feedback(user_id=user_id, feedback_type=feedback_type)
    return [Feedback.of(row) for row in rows]


@router.get("/item/{item_id}/feedback", tags=["feedback"])
def get_feedback_of_item(item_id: Name, request: Request) -> list[Feedback]:
    """All feedback on an item, oldest first."""
    rows = service_of(request).store.feedback(item_id=item_id)
    return [Feedback.of(row) for row in rows]


@router.get("/item/{item_id}/feedback/{feedback_type}", tags=["feedback"])
def get_typed_feedback_of_item(
    item_id: Name, feedback_type: Name, request: Request
) -> list[Feedback]:
    """Feedback of one kind on an item, oldest first."""
    rows = service_of(request).store.feedback(item_id=item_id, feedback_type=feedback_type)
    return [Feedback.of(row) for row in rows]


# --- recommendations --------------------------------------------------------------------------


def _scores(answer: Recommended, offset: int) -> list[Score]:
    pairs = list(zip(answer.items, answer.scores, strict=True))[offset:]
    return [Score(id=name, score=score) for name, score in pairs]


@router.get("/recommend/{user_id}", tags=["recommendation"])
@router.get("/recommend/{user_id}/", include_in_schema=False)
def recommend(
    user_id: Name,
    request: Request,
    n: Count = DEFAULT,
    offset: Offset = 0,
    category: Annotated[list[Word] | None, Query()] = None,
    write_back_type: Annotated[Word, Query(alias="write-back-type")] = "",
    write_back_delay: Annotated[Word, Query(alias="write-back-delay")] = "",
    x_api_version: Annotated[str, Header()] = "1",
) -> list[str] | list[Score]:
    """Recommendations for a user, by the feedback so far; items with feedback are not offered.

    With the header `X-API-Version: 2` items come with their scores.
    """
    service = service_of(request)
    delay = _duration(write_back_delay)
    if write_back_type:
        check_name(write_back_type)
    k = checked(n + offset, service.limits.k, "n + offset")
    answer = Recommended([], [])
    if n:
        answer, _ = service.recommend_to(user_id, k, category or [])
    scores = _scores(answer, offset)
    if write_back_type and scores:
        rows = [
            FeedbackRow(
                feedback_type=write_back_type,
                user_id=user_id,
                item_id=score.id,
                value=0.0,
                timestamp=now() + delay,
                comment="",
            )
            for score in scores
        ]
        service.put_feedback(rows, overwrite=False)
    return scores if x_api_version == "2" else [score.id for score in scores]


@router.get("/recommend/{user_id}/{category}", tags=["recommendation"])
def recommend_in_category(
    user_id: Name,
    category: Word,
    request: Request,
    n: Count = DEFAULT,
    offset: Offset = 0,
    write_back_type: Annotated[Word, Query(alias="write-back-type")] = "",
    write_back_delay: Annotated[Word, Query(alias="write-back-delay")] = "",
    x_api_version: Annotated[str, Header()] = "1",
) -> list[str] | list[Score]:
    """The same among the items of a category."""
    return recommend(
        user_id,
        request,
        n,
        offset,
        [category],
        write_back_type,
        write_back_delay,
        x_api_version,
    )


def _session(
    request: Request, steps: list[SessionFeedback], n: int, offset: int, category: str
) -> list[Score]:
    service = service_of(request)
    _rows(request, steps)
    k = checked(n + offset, service.limits.k, "n + offset")
    steps = sorted(steps, key=lambda step: read_time(step.timestamp, NO_TIME))
    history = [step.item_id for step in steps if step.feedback_type not in service.shown_types]
    left_out = frozenset(step.item_id for step in steps)
    if not n:
        return []
    return _scores(service.recommend(history, k, left_out, [category]), offset)


@router.post("/session/recommend", tags=["recommendation"])
def session_recommend(
    steps: list[SessionFeedback], request: Request, n: Count = DEFAULT, offset: Offset = 0
) -> list[Score]:
    """Recommendations for a session of which nothing is kept; ordered by its times."""
    return _session(request, steps, n, offset, "")


@router.post("/session/recommend/{category}", tags=["recommendation"])
def session_recommend_in_category(
    category: Word,
    steps: list[SessionFeedback],
    request: Request,
    n: Count = DEFAULT,
    offset: Offset = 0,
) -> list[Score]:
    """The same among the items of a category."""
    return _session(request, steps, n, offset, category)


def _neighbors(request: Request, item_id: str, n: int, offset: int, category: str) -> list[Score]:
    service = service_of(request)
    k = checked(n + offset, service.limits.k, "n + offset")
    if service.item(item_id) is None:
        raise _found("item", item_id)
    if not n or service.main.attributes(item_id) is None:  # an item without text has none
        return []
    filters = service.main.in_categories([category])
    if filters is None:
        return []
    return _scores(service.main.similar(item_id, k, filters), offset)


@router.get("/item/{item_id}/neighbors", tags=["recommendation"])
@router.get("/item/{item_id}/neighbors/", include_in_schema=False)
def get_neighbors(
    item_id: Name, request: Request, n: Count = DEFAULT, offset: Offset = 0
) -> list[Score]:
    """Items that are like an item."""
    return _neighbors(request, item_id, n, offset, "")


@router.get("/item/{item_id}/neighbors/{category}", tags=["recommendation"])
def get_neighbors_in_category(
    item_id: Name, category: Word, request: Request, n: Count = DEFAULT, offset: Offset = 0
) -> list[Score]:
    """The same among the items of a category."""
    return _neighbors(request, item_id, n, offset, category)


@router.get("/popular", tags=["recommendation"])
def get_popular(
    request: Request,
    n: Count = DEFAULT,
    offset: Offset = 0,
    user_id: Annotated[Word, Query(alias="user-id")] = "",
) -> list[Score]:
    """Items bought most often in training, or the newest where nothing was counted."""
    return _popular(request, n, offset, user_id, "")


@router.get("/popular/{category}", tags=["recommendation"])
def get_popular_in_category(
    category: Word,
    request: Request,
    n: Count = DEFAULT,
    offset: Offset = 0,
    user_id: Annotated[Word, Query(alias="user-id")] = "",
) -> list[Score]:
    """The same among the items of a category."""
    return _popular(request, n, offset, user_id, category)


def _popular(request: Request, n: int, offset: int, user_id: str, category: str) -> list[Score]:
    service = service_of(request)
    k = checked(n + offset, service.limits.k, "n + offset")
    left_out = service.history(user_id)[1] if user_id else frozenset()
    return _scores(service.recommend([], k, left_out, [category]), offset) if n else []
