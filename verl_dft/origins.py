"""Who wrote a response: the values of a row's ``origin``. Apart, so that reading records needs no torch."""

ORIGINS = ("expert", "teacher", "self", "guided")
"""``TokenBatch.origin`` holds indices into this."""
