"""The wish to stop: who may have it, what is still read, and what the person is told."""

from __future__ import annotations

import signal
import threading

import pytest

from udas.training.stop import StopWish


def test_after_a_wish_no_batch_is_read() -> None:
    wish, read = StopWish(active=False), []
    for batch in wish.until(read.append(number) or number for number in range(3)):
        wish.wanted = True
        assert batch == 0
    assert read == [0]


def test_the_first_wish_is_answered(capfd: pytest.CaptureFixture[str]) -> None:
    with StopWish() as wish:
        signal.raise_signal(signal.SIGTERM)
    assert wish.wanted
    assert "stopping after this step" in capfd.readouterr().err


def test_where_it_is_not_active_signals_act_as_before() -> None:
    """With several processes none may leave the others alone at a barrier."""
    before = signal.getsignal(signal.SIGTERM)
    with StopWish(active=False):
        assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_cannot_hear_signals_and_need_not() -> None:
    def training() -> None:
        with StopWish() as wish:
            heard.append(wish.active)

    heard: list[bool] = []
    thread = threading.Thread(target=training)
    thread.start()
    thread.join()
    assert heard == [False]
