"""Times of a log as whole numbers in which nothing of their order is lost.

A time is a number, in whatever unit the source has, or a date as ISO 8601 writes it, which becomes
seconds since 1970. Both may have fractions: where a log has them, all of its times are counted in
thousandths, millionths or billionths of the unit.

Shapes: M interactions.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from decimal import ROUND_FLOOR, Decimal
from math import isfinite
from typing import Any

import numpy as np

from recformer.files import UserError

NO_TIME = "is no number and no ISO 8601 date"

_LARGEST = 2**63 - 1
_BILLION = 10**9
_EXPONENTS = (0, 3, 6, 9)
_NUMBER = re.compile(r"[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,2})?", re.ASCII)
_DATE = re.compile(
    r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[T ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,12}))?)?)?"
    r"\s*(?:(Z|UTC|GMT)|([+-])(\d{2}):?(\d{2})?)?",
    re.ASCII | re.IGNORECASE,
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def parse_time(value: Any) -> tuple[int, int] | None:
    """A time as a whole number and billionths, both of the source's unit; None: it is no time.

    Args:
        value: a number or text: `1400086897`, ` 1400086897.25`, `2014-05-14T17:01:37.5+02:00`,
            `2014-05-14 17:01:37 UTC`, `2014-05-14`. A date without a zone is taken as UTC.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return (value, 0) if -_LARGEST - 1 <= value <= _LARGEST else None
    if isinstance(value, float):
        return _number(repr(value)) if isfinite(value) else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    return _number(text) if _NUMBER.fullmatch(text) else _date(text)


def _number(text: str) -> tuple[int, int] | None:
    number = Decimal(text)
    if number.adjusted() > 18:
        return None
    whole = int(number.to_integral_value(ROUND_FLOOR))
    if not -_LARGEST - 1 <= whole <= _LARGEST:
        return None
    return whole, int((number - whole) * _BILLION)


def _date(text: str) -> tuple[int, int] | None:
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, _, sign, ahead, ahead_minutes = match.groups()
    try:
        moment = datetime(
            int(year), int(month), int(day), int(hour or 0), int(minute or 0), tzinfo=timezone.utc
        )
    except ValueError:
        return None
    seconds = int(second or 0)
    if seconds > 60 or (ahead and int(ahead_minutes or 0) > 59):  # 60: a leap second
        return None
    whole = (moment - _EPOCH) // timedelta(seconds=1) + seconds
    if ahead:
        offset = 3600 * int(ahead) + 60 * int(ahead_minutes or 0)
        whole += -offset if sign == "+" else offset
    return whole, int((fraction or "0").ljust(9, "0")[:9])


class Fractions:
    """Unit in which times with fractions become whole numbers, found batch after batch.

    Attributes:
        total: times so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._finest = 0  # exponent in which all of them are whole
        self._too_large = dict.fromkeys(_EXPONENTS, 0)

    def add(self, wholes: np.ndarray, billionths: np.ndarray) -> None:
        """Look at times, int64 (M,) each, as `parse_time` gives them."""
        self.total += len(wholes)
        for exponent in _EXPONENTS[self._finest // 3 :]:
            self._finest = exponent
            if not (billionths % 10 ** (9 - exponent)).any():
                break
        for exponent in _EXPONENTS[1:]:
            self._too_large[exponent] += int(_too_large(wholes, exponent).sum())

    def merge(self, other: Fractions) -> None:
        """Take over what another has seen."""
        self.total += other.total
        self._finest = max(self._finest, other._finest)
        for exponent, number in other._too_large.items():
            self._too_large[exponent] += number

    def exponent(self) -> int:
        """Of the unit: the largest of 1, 10⁻³, 10⁻⁶, 10⁻⁹ that is exact."""
        exponent = self._finest
        # Milliseconds with nine places do not fit: what is cut then is below a billionth of a
        # second.
        while exponent and 2 * self._too_large[exponent] > self.total:
            exponent -= 3
        return exponent

    def all_fit(self) -> bool:
        """Whether no time is too large for a number of 64 bits in that unit."""
        return not self._too_large[self.exponent()]


def in_unit(
    wholes: np.ndarray, billionths: np.ndarray, exponent: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times with fractions as whole numbers of 10^-exponent.

    Args:
        wholes, billionths: int64 (M,) each, as `parse_time` gives them.
        exponent: of the unit, see `Fractions`.

    Returns:
        int64 (M,) times, and bool (M,) where one is too large for a number of 64 bits in that unit.
    """
    too_large = _too_large(wholes, exponent)
    times = np.where(too_large, 0, wholes) * 10**exponent + billionths // 10 ** (9 - exponent)
    return np.where(too_large, wholes, times), too_large


def in_one_unit(wholes: np.ndarray, billionths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`in_unit` of all times there are."""
    fractions = Fractions()
    fractions.add(wholes, billionths)
    return in_unit(wholes, billionths, fractions.exponent())


def _too_large(wholes: np.ndarray, exponent: int) -> np.ndarray:
    most = _LARGEST // 10**exponent - 1
    if exponent == 0:
        return np.zeros(len(wholes), dtype=bool)
    return (wholes > most) | (wholes < -most)


_DURATION = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}

# Seconds of 1973 and of 2286: what tells seconds from milliseconds and so on.
_OLDEST, _NEWEST = 10**8, 10**10
# Oldest and newest moment of seconds, of milliseconds, and so on; the last is beyond 64 bits.
_BORDERS = np.array([edge * 1000**k for k in range(4) for edge in (_OLDEST, _NEWEST)][:-1])


def parse_duration(text: str) -> int:
    """Seconds of `45s`, `30m`, `12h`, `1d` or `2w`.

    Raises:
        ValueError: it is none of these, or 0.
    """
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"got {text!r}, expected a number and s, m, h, d or w, such as 30m or 1d")
    return int(match[1]) * _SECONDS[match[2]]


class Moments:
    """Size of the times of a source, looked at batch after batch: it tells their unit."""

    def __init__(self) -> None:
        self._below = np.zeros(len(_BORDERS), dtype=np.int64)  # times below each border
        self._total = 0
        self._first = 2**63 - 1

    def add(self, times: np.ndarray) -> None:
        """Look at times, int64 (M,)."""
        if not len(times):
            return
        self._total += len(times)
        self._first = min(self._first, int(times.min()))
        places = np.searchsorted(_BORDERS, times, side="right")
        self._below += np.cumsum(np.bincount(places, minlength=len(_BORDERS)))[: len(_BORDERS)]

    def units_a_second(self, flag: str) -> int:
        """See the function of this name."""
        middle = (self._total - 1) // 2  # place of the lower median
        reached = int((self._below <= middle).sum()) - 1  # the last border that it is not below
        if self._total and reached >= 0 and reached % 2 == 0:
            return 1000 ** (reached // 2)
        raise UserError(
            f"{flag} needs moments since 1970 in seconds, milli-, micro- or nanoseconds, the times "
            f"begin at {self._first}: name their column with --time_column"
        )


def units_a_second(times: np.ndarray, flag: str) -> int:
    """Units of a source in a second, by the size of its times: 1, 10³, 10⁶ or 10⁹.

    Args:
        times: int64 (M,), moments since 1970 in one unit.
        flag: that wants to know, for the message.

    Raises:
        UserError: most are no moments of 1973 to 2286 in any of these units.
    """
    moments = Moments()
    moments.add(times)
    return moments.units_a_second(flag)
