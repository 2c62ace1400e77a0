"""Columns that the user names, and names that are recognised."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

# Names that public data sets use, without case and signs; the most telling first: of `parent_asin`
# and `asin` the former.
USERS = (
    *("userid", "reviewerid", "user", "uid", "customerid", "customer", "visitorid", "visitor"),
    *("username", "memberid", "member", "accountid", "account", "buyerid", "buyer"),
    *("clientid", "client"),
)
ITEMS = (
    *("parentasin", "asin", "itemid", "item", "movieid", "productid", "product", "sku", "skuid"),
    *("articleid", "bookid", "songid", "trackid", "videoid", "newsid", "gameid", "appid"),
    *("businessid", "gmapid", "isbn", "stockcode", "goodsid"),
)
LISTS_OF_ITEMS = ("items", "itemids")
TIMES = (
    *("unixreviewtime", "timestamp", "time", "unixtime", "ts", "eventtime", "eventtimestamp"),
    *("datetime", "date", "createdat", "tdat", "invoicedate", "orderdate", "purchasedate"),
)
RATINGS = ("overall", "rating", "ratings", "score", "stars")
EVENTS = ("eventtype", "event", "behavior", "behaviortype", "behaviour", "actiontype", "action")
# Text of the items among the interactions: name in an item's sentence -> columns.
TEXTS = {
    "title": ("title", "name", "productname", "producttitle", "itemname"),
    "brand": ("brand", "brandname"),
    "category": ("categorycode", "categoryname", "category", "categories"),
}
SESSIONS = ("sessionid", "session", "usersession")


@dataclass(frozen=True)
class Columns:
    """Columns and form of raw files as the user gave them; None: recognised.

    Attributes:
        user, item, time, rating, event: columns of the interactions.
        session: their column of sessions, each of which is taken as a user.
        owner: their column of the users whose sessions these are.
        item_key: of the items, what `item` holds.
        separator: between the fields of a line, in the files whose first line has it.
        encoding: of the files that are not UTF-8 and do not begin with a byte order mark.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    item_key: str | None = None
    event: str | None = None
    session: str | None = None
    owner: str | None = None
    separator: str | None = None
    encoding: str | None = None

    def named(self) -> dict[str, str]:
        """Those that were named, for dataset.json."""
        values = ((column.name, getattr(self, column.name)) for column in fields(self))
        return {name: value for name, value in values if value is not None}


def plain(name: str) -> str:
    """A column's name without case and signs."""
    return re.sub(r"[^0-9a-z]", "", name.lower())
