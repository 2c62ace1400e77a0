"""Memory between batches: kept by the process, not handed back and fetched again.

glibc takes every large block from the kernel and gives it back when it is freed. Each batch then
pays for its memory anew, page by page, which on CPU can take longer than what is computed in it.
With this setting a freed block serves the next batch; nothing is given back before the process
ends. The peak of a training step was the same.
"""

from __future__ import annotations
