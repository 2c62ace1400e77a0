"""Times out of requests."""

from __future__ import annotations

import pytest

from recformer.files import UserError
from recformer.serving.times import NO_TIME, now, read_time, write_time

DAY = 1_645_660_800_000_000  # 2022-02-24 in UTC


@pytest.mark.parametrize(
    ("text", "micros"),
    [
        ("2022-02-24", DAY),
        ("2022/02/24 00:00:01", DAY + 10**6),
        ("2022-02-24T00:00:00Z", DAY),
        ("2022-02-24T02:00:00+02:00", DAY),
        ("2022-02-24 00:00:00.5 UTC", DAY + 500_000),
        ("2022-02-24T00:00:00.123456789Z", DAY + 123_456),
        ("1645660800", DAY),
        ("1645660800.25", DAY + 250_000),
        ("1645660800123", DAY + 123_000),
        ("1645660800123456", DAY + 123_456),
        ("1645660800123456789", DAY + 123_456),
        ("0001-01-01T00:00:00Z", NO_TIME),
        ("", 17),
        (" ", 17),
    ],
)
def test_forms_of_time(text: str, micros: int) -> None:
    assert read_time(text, absent=17) == micros


@pytest.mark.parametrize(
    "text", ["soon", "2022-13-01", "0001-01-01T00:00:00+05:00", "9" * 30, "-99999999999", "1e5"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UserError, match="expected ISO 8601"):
        read_time(text, 0)


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (DAY, "2022-02-24T00:00:00Z"),
        (DAY + 500_000, "2022-02-24T00:00:00.5Z"),
        (NO_TIME, "0001-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
    ],
)
def test_times_are_written_as_gorse_does(micros: int, text: str) -> None:
    assert write_time(micros) == text
    assert read_time(text, 0) == micros


def test_now_is_later_than_when_this_was_written() -> None:
    assert now() > DAY
