import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from npg.parallel import World
from npg.runs.signals import StopRequest

ALONE = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("former", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_the_first_is_noted_and_the_second_ends_at_once(number: int, former: object) -> None:
    signal.signal(number, former)  # type: ignore[arg-type]
    stop = StopRequest(ALONE)
    with stop:
        assert not stop.requested
        assert stop.agree(1.5) == (False, 1.5)
        signal.raise_signal(number)
        assert (stop.number, stop.requested) == (number, True)
        assert stop.agree(0.0) == (True, 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(number) is former


def test_the_former_handlers_are_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def train() -> None:
        with StopRequest(ALONE):
            assert signal.getsignal(signal.SIGTERM) is not before
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_trains_without_signals() -> None:
    before, requested = signal.getsignal(signal.SIGINT), []

    def train() -> None:
        with StopRequest(ALONE) as stop:
            assert signal.getsignal(signal.SIGINT) is before
            requested.append(stop.agree(0.0)[0])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert requested == [False]
