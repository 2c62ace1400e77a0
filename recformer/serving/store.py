"""The database: items, users and feedback that came over HTTP. SQLite, or PostgreSQL by URL.

Items stand here only where they were added, changed or deleted; the others are those of the
model's folder. Rows that a method was asked to write are on disk when it returns. Vectors of items
lie beside them, so that no text is encoded twice by one model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from recformer.files import UserError
from recformer.serving.times import NO_TIME

# Names compare by code points everywhere: pages of a list follow one another by them.
Name = String().with_variant(String(collation="C"), "postgresql")
Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts INTEGER keys up by itself
Anything = JSON(none_as_null=True)

SECONDS_TO_WAIT = 30  # for a lock of the database
NAMES_AT_ONCE = 5000  # in one statement: SQLite takes 32,766 values, PostgreSQL 65,535


class Base(DeclarativeBase):
    """Of the tables."""


class ItemRow(Base):
    """An item that was added, changed or deleted.

    `deleted` rows hide an item of the model's folder.
    """

    __tablename__ = "items"

    item_id: Mapped[str] = mapped_column(Name, primary_key=True)
    is_hidden: Mapped[bool] = mapped_column(Boolean, default=False)
    categories: Mapped[list[str]] = mapped_column(JSON, default=list)
    timestamp: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[Any] = mapped_column(Anything, nullable=True, default=None)
    comment: Mapped[str] = mapped_column(Text, default="")
    deleted: Mapped[bool] = mapped_column(Boolean, default=False)


def bare_item(name: str, deleted: bool = False) -> ItemRow:
    """The row of an item of which nothing is said."""
    return ItemRow(
        item_id=name,
        is_hidden=False,
        categories=[],
        timestamp=NO_TIME,
        labels=None,
        comment="",
        deleted=deleted,
    )


class UserRow(Base):
    """A user that was named."""

    __tablename__ = "users"

    user_id: Mapped[str] = mapped_column(Name, primary_key=True)
    labels: Mapped[Any] = mapped_column(Anything, nullable=True, default=None)
    comment: Mapped[str] = mapped_column(Text, default="")


class FeedbackRow(Base):
    """A user did something with an item; one row a kind of feedback."""

    __tablename__ = "feedback"
    __table_args__ = (
        UniqueConstraint("feedback_type", "user_id", "item_id"),
        Index("feedback_of_user", "user_id", "timestamp", "number"),
        Index("feedback_of_item", "item_id"),
    )

    number: Mapped[int] = mapped_column(Number, primary_key=True)  # in order of arrival
    feedback_type: Mapped[str] = mapped_column(Name)
    user_id: Mapped[str] = mapped_column(Name)
    item_id: Mapped[str] = mapped_column(Name)
    value: Mapped[float] = mapped_column(Float, default=0.0)
    timestamp: Mapped[int] = mapped_column(BigInteger)
    comment: Mapped[str] = mapped_column(Text, default="")


class VectorRow(Base):
    """The vector (H,) of a text by a model, float32 little-endian; it can be made again."""

    __tablename__ = "vectors"

    model: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[str] = mapped_column(String(32), primary_key=True)  # hash of the text, hex
    vector: Mapped[bytes] = mapped_column(LargeBinary)


def values_of(row: Base) -> dict[str, Any]:
    """Columns of a row by name, without a number that the database gives."""
    names = row.__table__.columns.keys()
    return {name: getattr(row, name) for name in names if name != "number"}


class Store:
    """The database; methods may be called from any thread.

    Args:
        url: as SQLAlchemy has it, "postgresql+psycopg://user@host/name", or the path of a SQLite
            file; tables are made where there are none.

    Raises:
        UserError: no such database, or one that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._lock = threading.Lock()
        try:
            if "://" in url:
                parsed = make_url(url)
            else:  # a path, in which `?` begins no options
                Path(url).absolute().parent.mkdir(parents=True, exist_ok=True)
                parsed = URL.create("sqlite", database=str(Path(url).absolute()))
            self.name = parsed.render_as_string(hide_password=True)
            if parsed.drivername in ("postgresql", "postgres"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            if parsed.get_backend_name() not in ("sqlite", "postgresql"):
                raise UserError(f"{self.name} is no database of SQLite or PostgreSQL")
            self._engine = _engine(parsed)
            Base.metadata.create_all(self._engine)
            self.check()
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise UserError(f"the database {url.split('@')[-1]} cannot be used: {error}") from error
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            reason = str(cause).strip().splitlines()[0]
            raise UserError(f"the database {self.name} cannot be used: {reason}") from error

    def check(self) -> None:
        """Ask the database whether it is there; raises what its driver raises."""
        with self._engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Give its connections back."""
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """A transaction; one at a time, for SQLite has one writer and lets others poll."""
        with self._lock, Session(self._engine) as session, session.begin():
            yield session

    def _all(self, query: Any) -> list[Any]:
        """The rows of a query; types of queries differ between releases of SQLAlchemy."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(query))

    def _upsert(self, session: Session, rows: Sequence[Base], replace: bool = True) -> None:
        """Insert rows; those whose key is there replace what there was, or are left out."""
        if not rows:
            return
        table = type(rows[0]).__table__
        keys = ["feedback_type", "user_id", "item_id"]
        if not isinstance(rows[0], FeedbackRow):
            keys = [column.name for column in table.primary_key]
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        statement = dialect.insert(table)
        others = {name: statement.excluded[name] for name in values_of(rows[0]) if name not in keys}
        if replace:
            statement = statement.on_conflict_do_update(index_elements=keys, set_=others)
        else:
            statement = statement.on_conflict_do_nothing(index_elements=keys)
        session.execute(statement, [values_of(row) for row in rows])

    # --- items --------------------------------------------------------------------------------

    def put_items(self, rows: Sequence[ItemRow]) -> None:
        """Write items as they are from now on; of several with one name the last counts."""
        rows = list({row.item_id: row for row in rows}.values())
        with self._writing() as session:
            self._upsert(session, rows)

    def delete_item(self, item_id: str) -> None:
        """Hide an item of the folder or forget one that was added; its feedback goes."""
        with self._writing() as session:
            self._upsert(session, [bare_item(item_id, deleted=True)])
            session.execute(delete(FeedbackRow).where(FeedbackRow.item_id == item_id))

    def items(self, names: Iterable[str] | None = None) -> list[ItemRow]:
        """Rows of some items, or of all."""
        query = select(ItemRow).order_by(ItemRow.item_id)
        if names is not None:
            query = query.where(ItemRow.item_id.in_(list(names)))
        return self._all(query)

    def item(self, item_id: str) -> ItemRow | None:
        """The row of an item."""
        return next(iter(self.items([item_id])), None)

    def items_after(self, cursor: str, n: int) -> list[ItemRow]:
        """The next n rows by name."""
        query = select(ItemRow).where(ItemRow.item_id > cursor).order_by(ItemRow.item_id)
        return self._all(query.limit(n))

    # --- vectors ------------------------------------------------------------------------------

    def put_vectors(self, model: str, vectors: Mapping[bytes, NDArray[np.float32]]) -> None:
        """Keep vectors (H,) of texts, by content hash."""
        rows = [
            VectorRow(model=model, content=content.hex(), vector=vector.astype("<f4").tobytes())
            for content, vector in vectors.items()
        ]
        with self._writing() as session:
            self._upsert(session, rows)

    def vectors(self, model: str, contents: Iterable[bytes]) -> dict[bytes, NDArray[np.float32]]:
        """Those of some contents that are kept."""
        found = {}
        for part in _parts(contents):
            named = [content.hex() for content in part]
            query = select(VectorRow).where(VectorRow.model == model)
            for row in self._all(query.where(VectorRow.content.in_(named))):
                vector = np.frombuffer(row.vector, "<f4").astype(np.float32)  # may be written to
                found[bytes.fromhex(row.content)] = vector
        return found

    def keep_vectors_of(self, used: Mapping[str, set[bytes]]) -> None:
        """Forget all vectors but those of some models and contents."""
        with self._writing() as session:
            session.execute(delete(VectorRow).where(VectorRow.model.not_in(list(used))))
            for model, contents in used.items():
                mine = VectorRow.model == model
                kept = session.scalars(select(VectorRow.content).where(mine))
                left = {content.hex() for content in contents}
                for part in _parts([content for content in kept if content not in left]):
                    session.execute(delete(VectorRow).where(mine, VectorRow.content.in_(part)))

    # --- users --------------------------------------------------------------------------------

    def put_users(self, rows: Sequence[UserRow]) -> None:
        """As `put_items`."""
        rows = list({row.user_id: row for row in rows}.values())
        with self._writing() as session:
            self._upsert(session, rows)

    def delete_user(self, user_id: str) -> None:
        """Forget a user with all feedback."""
        with self._writing() as session:
            session.execute(delete(UserRow).where(UserRow.user_id == user_id))
            session.execute(delete(FeedbackRow).where(FeedbackRow.user_id == user_id))

    def user(self, user_id: str) -> UserRow | None:
        """The row of a user."""
        return next(iter(self._all(select(UserRow).where(UserRow.user_id == user_id))), None)

    def users_after(self, cursor: str, n: int) -> list[UserRow]:
        """As `items_after`."""
        query = select(UserRow).where(UserRow.user_id > cursor).order_by(UserRow.user_id)
        return self._all(query.limit(n))

    # --- feedback -----------------------------------------------------------------------------

    def put_feedback(
        self, rows: Sequence[FeedbackRow], overwrite: bool, new_items: Sequence[ItemRow] = ()
    ) -> None:
        """Write feedback; users that are not there yet are made.

        Args:
            rows: of several for one pair and kind the first counts, or with `overwrite` the last.
            overwrite: replace what is there, which otherwise stays.
            new_items: to be made with it where they are not there.
        """
        ordered = rows if overwrite else rows[::-1]
        kept = {(row.feedback_type, row.user_id, row.item_id): row for row in ordered}
        written = list(kept.values())[:: 1 if overwrite else -1]  # in order of arrival
        names = {row.user_id for row in written}
        # Sorted: two writers that take the same locks in the same order never wait in a ring.
        users = [UserRow(user_id=name, labels=None, comment="") for name in sorted(names)]
        items = {row.item_id: row for row in new_items}
        with self._writing() as session:
            self._upsert(session, users, replace=False)
            self._upsert(session, [items[name] for name in sorted(items)], replace=False)
            self._upsert(session, written, replace=overwrite)

    def feedback(
        self,
        user_id: str | None = None,
        item_id: str | None = None,
        feedback_type: str | None = None,
        until: int | None = None,
        newest: int | None = None,
    ) -> list[FeedbackRow]:
        """Feedback of a user, an item or a kind, oldest first.

        Args:
            until: none later than this time.
            newest: that many alone.
        """
        query = select(FeedbackRow)
        given = {"user_id": user_id, "item_id": item_id, "feedback_type": feedback_type}
        for name, value in given.items():
            if value is not None:
                query = query.where(getattr(FeedbackRow, name) == value)
        if until is not None:
            query = query.where(FeedbackRow.timestamp <= until)
        query = query.order_by(FeedbackRow.timestamp.desc(), FeedbackRow.number.desc())
        return self._all(query if newest is None else query.limit(newest))[::-1]

    def feedback_after(
        self, cursor: int, n: int, feedback_type: str | None = None
    ) -> list[FeedbackRow]:
        """The next n rows in order of arrival."""
        query = select(FeedbackRow).where(FeedbackRow.number > cursor)
        if feedback_type is not None:
            query = query.where(FeedbackRow.feedback_type == feedback_type)
        return self._all(query.order_by(FeedbackRow.number).limit(n))

    def delete_feedback(self, user_id: str, item_id: str, feedback_type: str | None = None) -> int:
        """Forget feedback of a user on an item; returns how much."""
        pair = (FeedbackRow.user_id == user_id, FeedbackRow.item_id == item_id)
        statement = delete(FeedbackRow).where(*pair)
        if feedback_type is not None:
            statement = statement.where(FeedbackRow.feedback_type == feedback_type)
        with self._writing() as session:
            return session.execute(statement).rowcount  # type: ignore[attr-defined]


def _engine(url: Any) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_size=8, max_overflow=32, pool_pre_ping=True)
    engine = create_engine(
        url, connect_args={"timeout": SECONDS_TO_WAIT}, pool_size=8, max_overflow=64
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode = WAL")  # readers never wait for a writer
        connection.execute("PRAGMA synchronous = FULL")  # what is committed outlives the power

    return engine


def _parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(values)
    while part := list(islice(iterator, NAMES_AT_ONCE)):
        yield part
