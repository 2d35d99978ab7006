"""What records a row, imported once: the process that a study forks its rows from loads this, and a row starts in a second."""

from contextlib import suppress

from deepscale import tracking

with suppress(ImportError):  # a row that needs it says so
    tracking._preload()
