"""Times of requests: read from many forms, kept as microseconds, written as Gorse writes them.

Kept: whole microseconds since 1970 in UTC, negative before; the year 1 stands for "no time".
"""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta, timezone

from recformer.files import UserError

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
NO_TIME = (datetime(1, 1, 1, tzinfo=timezone.utc) - EPOCH) // MICROSECOND
MOST = (datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc) - EPOCH) // MICROSECOND

# Units of whole numbers, by what a time of this century then looks like.
NUMBER = re.compile(r"-?\d{1,19}(\.\d{1,9})?")
SECONDS_BELOW, MILLISECONDS_BELOW, MICROSECONDS_BELOW = 10**11, 10**14, 10**17
# Go writes nanoseconds, Python 3.10 reads three or six digits.
FRACTION = re.compile(r"(?<=:\d\d)[.,](\d+)")


def now() -> int:
    """This moment."""
    return time.time_ns() // 1000


def read_time(text: str, absent: int) -> int:
    """A time out of a request.

    Args:
        text: ISO 8601 or RFC 3339 (UTC where it names no zone), the same with slashes in the date,
            a day alone, or Unix time in seconds, milli-, micro- or nanoseconds.
        absent: returned for an empty text.

    Raises:
        UserError: none of these, or a year beyond 1 to 9999.
    """
    text = text.strip()
    if not text:
        return absent
    try:
        micros = _from_number(text) if NUMBER.fullmatch(text) else _from_iso(text)
    except (ValueError, OverflowError):
        micros = MOST + 1
    if not NO_TIME <= micros <= MOST:
        raise UserError(
            f"the time {text[:40]!r} is none, expected ISO 8601 such as 2026-11-26T08:00:00Z, or "
            "Unix time in seconds"
        )
    return micros


def _from_number(text: str) -> int:
    size = abs(float(text))
    if size < SECONDS_BELOW:
        return round(float(text) * 1e6)
    whole = int(text.partition(".")[0])
    if size < MILLISECONDS_BELOW:
        return whole * 1000
    return whole if size < MICROSECONDS_BELOW else whole // 1000


def _from_iso(text: str) -> int:
    text = text.replace("/", "-").replace(" UTC", "Z")
    text = FRACTION.sub(lambda found: "." + found[1][:6].ljust(6, "0"), text)
    if text[-1] in "zZ":
        text = text[:-1] + "+00:00"
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        value = value.replace(tzinfo=timezone.utc)
    return (value - EPOCH) // MICROSECOND


def write_time(micros: int) -> str:
    """RFC 3339 in UTC, no digits behind the second where there is no part of one."""
    value = EPOCH + micros * MICROSECOND
    text = value.replace(tzinfo=None).isoformat(timespec="microseconds")
    whole, _, part = text.partition(".")
    part = part.rstrip("0")
    return f"{whole}.{part}Z" if part else f"{whole}Z"
