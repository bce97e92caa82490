"""The processes of one training run: alone, or started by ``torchrun`` on NCCL or Gloo."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from npg.parallel import mean_

__all__ = ["World", "open_world"]

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """A process among its peers; alone by default.

    Attributes:
        device: where this process computes.
        rank: its number, from 0.
        size: the number of processes.
        group: the process group, or None alone.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` in every process, in the main one before the others; what it raises there is raised in all."""
        if self.group is None:
            return work()
        result: list[T] = []
        outcome: list[Exception | None] = [None]
        if self.is_main:
            try:
                result.append(work())
            except Exception as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[0] is not None:
            raise outcome[0]
        return result[0] if result else work()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the processes."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def min_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its elementwise minimum over the processes."""
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group)
        return tensor

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over the processes, in one all-reduce."""
        means = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.group is None or not means:
            return
        flat = mean_(torch.cat([tensor.reshape(-1) for tensor in means]), self.group)
        for tensor, part in zip(means, torch.split(flat, [tensor.numel() for tensor in means])):
            tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; in the main process only, elsewhere an empty list."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.group)
        return values


@contextmanager
def open_world(device: str | None = None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, on NCCL for CUDA and on Gloo for CPU; or be alone.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default CUDA where there is a device for this process.

    Raises:
        ValueError: the device cannot be had.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device {chosen} cannot be had for process {local_rank} of this machine: it has "
                f"{torch.cuda.device_count()} CUDA devices; start fewer processes or choose device cpu"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if not launched:
        yield World(chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(chosen, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    finally:
        dist.destroy_process_group()
