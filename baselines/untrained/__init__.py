"""Lines that every model must beat: nothing in them is trained."""
