"""PyTorch's own generators, which dropout and distributions draw from: replayed, or left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["random_state", "replayed_randomness", "separate_randomness"]


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Of the generators that a forward pass on ``device`` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replayed_randomness(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw the same random numbers (dropout masks) as the forward pass that began at ``state``; leave no trace."""
    after = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(after, device)


@contextmanager
def separate_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the generators of the processor and of ``device`` as they were; inside, they begin at ``seed``.

    `torch.manual_seed` would seed those of all other devices too, which nothing puts back.
    """
    before = random_state(device)
    if seed is not None:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(seed)
    try:
        yield
    finally:
        _set_random_state(before, device)
