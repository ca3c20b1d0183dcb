from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C is heard, as in a terminal; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
