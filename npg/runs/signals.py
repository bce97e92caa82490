"""Ctrl-C and SIGTERM during a training."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import torch

from npg.parallel import World

__all__ = ["StopRequest"]


class StopRequest:
    """Ctrl-C and SIGTERM ask the training to stop where its state is whole; a second one ends it at once.

    Inside its ``with`` block a first signal is noted, and a second one raises KeyboardInterrupt. Outside of the main
    thread, where Python delivers no signals, nothing is noted.

    Args:
        world: this process among its peers.

    Attributes:
        number: of the signal that came to this process, 0 before.
        requested: whether this process, or one of its peers, was told to stop.
    """

    def __init__(self, world: World) -> None:
        self.world, self.number, self.requested = world, 0, False
        self._former: dict[int, Any] = {}

    def agree(self, seconds: float) -> tuple[bool, float]:
        """Whether one of the processes was told to stop, and the most of their ``seconds``.

        All ask at the same step, and all hear the same.
        """
        least = self.world.min_(torch.tensor([float(not self.number), -seconds], device=self.world.device))
        return not least[0], -float(least[1])

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number, self.requested = number, True
