"""Models over semantic ids, which write the next item code by code."""
