"""Memory between batches: kept by the process, not handed back and fetched again.

glibc takes every large block from the kernel and gives it back when it is freed. Each batch then
pays for its memory anew, page by page, which on CPU can take longer than what is computed in it.
With this setting a freed block serves the next batch; nothing is given back before the process
ends. The peak of a training step was the same.
"""

from __future__ import annotations

import ctypes
import sys

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
