"""Which signals the loader's processes hear: Ctrl-C, and the SIGTERM of some schedulers, reach all processes at once.

Workers leave both to the training process, which still finishes the step it is in with what they load.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

LEFT_TO_TRAINING = {signal.SIGINT}
if hasattr(signal, "sigwaitinfo"):  # elsewhere no one can tell who has sent a signal
    LEFT_TO_TRAINING |= {signal.SIGTERM}


def begun_deaf(begin: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What `begin` returns; the workers that it starts hear nothing before `hear_the_training_alone`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return begin()
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINING)
    try:
        return begin()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def hear_the_training_alone(worker: int) -> None:
    """For the beginning of a worker: it obeys a SIGTERM of the training process, and no other one.

    That process sends it, and waits for the worker's end, when it ends itself with an open loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if signal.SIGTERM in LEFT_TO_TRAINING:
        signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_TRAINING)  # a worker of a fork server inherits no mask
        threading.Thread(target=_end_with_the_training, daemon=True).start()


def _end_with_the_training() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
