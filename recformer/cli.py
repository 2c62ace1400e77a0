"""From flags to a command: one line for a user's error, memory kept between batches."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from recformer.files import UserError

# <malloc.h>
M_TRIM_THRESHOLD = -1

M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell the C library of this process, for good; programs call it before their work.

    Returns:
        False where there is no such setting (other libraries than glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No mapping for a single block, and the top of the heap is never given back.
    return mallopt is not None and all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)])


def exit_with_message(main: Callable[[], Any]) -> None:
    """Run an entry point; a user's error becomes one line on stderr and exit status 1."""
    try:
        main()
    except (UserError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:  # full disk, unreadable device: the system's own words name the file
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
