"""Routes beyond Gorse's API: histories of texts, filters, search, reasons, reload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from recformer.recommendation import HistoryItem, Recommended
from recformer.serving.gorse import checked, service_of
from recformer.serving.schemas import ATTRIBUTES, Name, Text, Word, check_labels
from recformer.serving.served import Filters, Question, Served
from recformer.serving.service import MAIN, ModelName

router = APIRouter(prefix="/v1")

MOST_EXPLAINED = 100  # items of a history; each is left out once

Value = Annotated[Text | float | list[Text], AfterValidator(check_labels)]
Attributes = Annotated[
    dict[Annotated[Word, StringConstraints(min_length=1)], Value],
    Field(min_length=1, max_length=ATTRIBUTES, examples=[{"title": "Tent for two"}]),
]
Entry = Name | Attributes
History = Annotated[list[Entry], Field(description="oldest first: names, or attributes")]
Where = Annotated[dict[Word, list[Word]], Field(max_length=ATTRIBUTES)]


class RecommendRequest(BaseModel):
    """A history and what may be offered."""

    history: History
    k: Annotated[int, Field(ge=1)] = 10
    filter_seen: bool = True
    allowed: list[Word] | None = None
    blocked: list[Word] = []
    where: Where = {}
    diversity: Annotated[float, Field(ge=0, le=1)] = 0.0
    model: ModelName = MAIN


class SimilarRequest(BaseModel):
    """An item of the catalogue, or one that no catalogue knows."""

    item: Entry
    k: Annotated[int, Field(ge=1)] = 10
    where: Where = {}
    model: ModelName = MAIN


class ExplainRequest(BaseModel):
    """A history and an item, of the catalogue or not."""

    history: History
    item: Entry
    model: ModelName = MAIN


class ReasonsRequest(BaseModel):
    """A history and items of the catalogue."""

    history: History
    items: Annotated[list[Word], Field(max_length=100)]
    model: ModelName = MAIN


class ReloadRequest(BaseModel):
    """A model by name; its folder is the one that the service was started with."""

    model: ModelName = MAIN


class ShownItem(BaseModel):
    """An item with its attributes."""

    item: str
    title: str
    attributes: dict[str, Any]


class ScoredItem(ShownItem):
    """An item that is offered."""

    score: float


class Answer(BaseModel):
    """Items, best first.

    `fallback` says what stands in where nothing of a history is known, `num_unknown` how many
    items of it are not in the catalogue.
    """

    items: list[ScoredItem]
    num_unknown: int = 0
    fallback: str | None = None
    model: str
    version: int


class HistoryPart(BaseModel):
    """An item of the history with its share of a score."""

    item: str | dict[str, Any]
    title: str
    carries: float


class AttributePart(BaseModel):
    """An attribute of the item with its share of the score."""

    attribute: str
    carries: float


class ExplainAnswer(BaseModel):
    """The parts of a score; each list with its remainder adds up to it."""

    score: float
    sentence: str
    history: list[HistoryPart]
    history_remainder: float
    attributes: list[AttributePart]
    attributes_remainder: float
    num_unknown: int
    model: str


class Reason(BaseModel):
    """The title of what carries most of an item's score, and how much."""

    item: str
    because: str
    carries: float


class Reasons(BaseModel):
    """One an item of the catalogue."""

    reasons: list[Reason]


class Found(BaseModel):
    """Items that a search found."""

    items: list[ShownItem]


class ModelFacts(BaseModel):
    """A model that is served."""

    name: str
    folder: str
    method: str
    items: int
    version: int


class Facts(BaseModel):
    """Models, attributes and test users of the service."""

    models: list[ModelFacts]
    attributes: list[str]
    title: str
    test_users: int
    most: int


class Reloaded(BaseModel):
    """A model that was loaded anew."""

    model: str
    items: int
    version: int


class ExampleAnswer(BaseModel):
    """A test user: what was bought, and what came next."""

    number: int
    history: list[ShownItem]
    target: ShownItem


def _title(served: Served, attributes: Mapping[str, Any], otherwise: str = "") -> str:
    title = attributes.get(served.shape.title)
    return " ".join(map(str, title)) if isinstance(title, list) else str(title or otherwise)


def _shown(served: Served, name: str) -> dict[str, Any]:
    attributes = served.attributes(name) or {}
    return {"item": name, "title": _title(served, attributes, name), "attributes": attributes}


def _answer(served: Served, answer: Recommended) -> Answer:
    return Answer(
        items=[
            ScoredItem(**_shown(served, name), score=score)
            for name, score in zip(answer.items, answer.scores, strict=True)
        ],
        num_unknown=answer.num_unknown,
        fallback=answer.fallback,
        model=served.name,
        version=served.version,
    )


def _where(where: Mapping[str, list[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name, tuple(values)) for name, values in where.items())


@router.post("/recommend")
def recommend(asked: RecommendRequest, request: Request) -> Answer:
    """Recommendations for a history of names and texts."""
    service = service_of(request)
    served = service.model(asked.model)
    checked(asked.k, service.limits.k, "k")
    for what, rows in (
        ("history", asked.history),
        ("allowed", asked.allowed or []),
        ("blocked", asked.blocked),
    ):
        checked(len(rows), service.limits.rows, f"the length of {what}")
    filters = Filters(
        filter_seen=asked.filter_seen,
        allowed=None if asked.allowed is None else tuple(asked.allowed),
        where=_where(asked.where),
        diversity=asked.diversity,
    )
    history: list[HistoryItem] = list(asked.history[-service.limits.history :])
    question = Question(history, asked.k, frozenset(asked.blocked))
    return _answer(served, served.recommend(question, filters))


@router.post("/similar")
def similar(asked: SimilarRequest, request: Request) -> Answer:
    """Items that are like one, given by name or by attributes."""
    service = service_of(request)
    served = service.model(asked.model)
    checked(asked.k, service.limits.k, "k")
    if isinstance(asked.item, str) and served.attributes(asked.item) is None:
        raise HTTPException(404, f"there is no item {asked.item!r}")
    return _answer(served, served.similar(asked.item, asked.k, Filters(where=_where(asked.where))))


@router.post("/explain")
def explain(asked: ExplainRequest, request: Request) -> ExplainAnswer:
    """Share of an item's score that each item of a history and each attribute carries."""
    service = service_of(request)
    served = service.model(asked.model)
    checked(len(asked.history), MOST_EXPLAINED, "the length of history")
    if isinstance(asked.item, str) and served.attributes(asked.item) is None:
        raise HTTPException(404, f"there is no item {asked.item!r}")
    found = served.explain(asked.history, asked.item)
    return ExplainAnswer(
        score=found.score,
        sentence=found.sentence(),
        history=[
            HistoryPart(
                item=dict(entry) if isinstance(entry, Mapping) else str(entry),
                title=title,
                carries=carries,
            )
            for (entry, carries), title in zip(found.history, found.titles, strict=True)
        ],
        history_remainder=found.history_remainder,
        attributes=[
            AttributePart(attribute=name, carries=carries) for name, carries in found.attributes
        ],
        attributes_remainder=found.attributes_remainder,
        num_unknown=found.num_unknown,
        model=served.name,
    )


@router.post("/reasons")
def reasons(asked: ReasonsRequest, request: Request) -> Reasons:
    """The strongest reason for each of some items, in one batch; `explain` says more of one."""
    service = service_of(request)
    served = service.model(asked.model)
    history = asked.history[-service.limits.history :]
    titles = [
        _shown(served, entry)["title"] if isinstance(entry, str) else _title(served, entry)
        for entry in history
    ]
    found = served.reasons(history, asked.items)
    return Reasons(
        reasons=[
            Reason(item=name, because=titles[place], carries=carries)
            for name, (place, carries) in found.items()
        ]
    )


@router.get("/search")
def search(
    request: Request,
    q: Word,
    k: Annotated[int, Query(ge=1)] = 10,
    model: ModelName = MAIN,
) -> Found:
    """Items whose title or brand holds all words of q; the last may be the beginning of one."""
    service = service_of(request)
    served = service.model(model)
    checked(k, service.limits.k, "k")
    names = served.search.find(q, k)
    return Found(items=[ShownItem(**_shown(served, name)) for name in names])


@router.post("/reload")
def reload(asked: ReloadRequest, request: Request) -> Reloaded:
    """Load a model's folder again and put it in the place of the one that answers meanwhile."""
    served = service_of(request).reload(asked.model)
    return Reloaded(model=served.name, items=len(served.recommender), version=served.version)


@router.get("/facts")
def facts(request: Request) -> Facts:
    """Models, attributes and test users of the service."""
    service = service_of(request)
    models = [service.model(name) for name in service.names]
    test_users = request.app.state.test_users
    return Facts(
        models=[
            ModelFacts(
                name=served.name,
                folder=served.label,
                method=served.method,
                items=len(served.recommender),
                version=served.version,
            )
            for served in models
        ],
        attributes=list(service.main.shape.names),
        title=service.main.shape.title,
        test_users=0 if test_users is None else len(test_users),
        most=service.limits.k,
    )


@router.get("/test_users/{number}")
def test_user(number: Annotated[int, Field(ge=0)], request: Request) -> ExampleAnswer:
    """A user of the test split, where the service was given the processed folder."""
    test_users = request.app.state.test_users
    count = 0 if test_users is None else len(test_users)
    if number >= count:
        raise HTTPException(404, f"there is no test user {number}, there are {count}")
    user, served = test_users[number], service_of(request).main
    return ExampleAnswer(
        number=number,
        history=[ShownItem(**_shown(served, name)) for name in user.history],
        target=ShownItem(**_shown(served, user.target)),
    )
