"""Ctrl-C and SIGTERM as a wish: training ends its step, saves a checkpoint and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # schedulers send the second one before they end a job
MESSAGE = b"\nstopping after this step, from which the same command goes on; once more stops at once\n"


class StopWish:
    """Holds back the first Ctrl-C or SIGTERM inside a `with` block; a second one acts at once.

    wanted: whether one has come. Signals that the process ignores, and other threads than the main one, are left alone.
    """

    def __init__(self, active: bool = True) -> None:
        self.wanted = False
        self.active = active and threading.current_thread() is threading.main_thread()
        self.earlier: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopWish:
        if self.active:
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.earlier = {number: signal.signal(number, self._note) or signal.SIG_DFL for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        self.earlier = {}

    def until(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches until a stop is wanted."""
        for batch in batches:
            yield batch
            if self.wanted:
                return

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self.__exit__()
        os.write(2, MESSAGE)  # print is not safe in a signal handler
