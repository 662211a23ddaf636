"""Errors as a person should meet them: one line, not too long, that says what helps."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises this error, in one line of moderate length that has every word in it."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message
