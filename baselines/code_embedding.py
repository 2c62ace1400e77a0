"""Dense use of semantic ids: the vector of an item is the sum of the vectors of its codes.

Shapes: N items, L codes of an item, D hidden.
"""

from __future__ import annotations
