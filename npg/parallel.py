"""What several processes must add up and agree on, and nothing else.

Each process holds the same parameters and an equal share of the batch. Then every mean over the batch (a gradient, a
Fisher-vector product, an objective, a KL) is the mean over processes of the local means, and one all-reduce of it makes
all processes go on with the same numbers.

The mathematics takes a process group, or None for a process that is alone; a training run takes a `World`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from math import inf
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist

# Its default arguments hold whatever group there is when it is imported, for ever: imported by PyTorch at the first
# trace, it would keep the group, and with it Gloo's threads, alive beyond the end that a caller sees.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

__all__ = ["World", "average_", "equal", "mean_", "mean_of_shares", "moments", "open_world", "restarted", "size"]

T = TypeVar("T")


def size(process_group: dist.ProcessGroup | None) -> int:
    """The number of processes: 1 without a group."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def mean_(tensor: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Replace ``tensor`` by its mean over the processes of the group; without a group, return it as it is.

    One all-reduce of ``tensor.numel()`` elements; the result is bitwise equal on all ranks.
    """
    if process_group is not None:
        dist.all_reduce(tensor, group=process_group)
        tensor.div_(dist.get_world_size(process_group))
    return tensor


def mean_of_shares(mean: Tensor, events: int, process_group: dist.ProcessGroup | None) -> Tensor:
    """The mean over all processes of what is a mean over ``events`` in each, (); without a group, ``mean`` itself.

    Raises:
        ValueError: in all processes alike, if they have different numbers of events: means of means are then none.
    """
    if process_group is None:
        return mean
    number = torch.tensor(float(events), dtype=torch.float64, device=mean.device)
    value, number, square = mean_(torch.stack([mean.double(), number, number**2]), process_group)
    if bool(number**2 != square):
        raise ValueError(
            f"the processes have mini-batches of different sizes, {events} here and {float(number):g} in the mean: "
            "give each of them the same number (DistributedSampler, drop_last=True)"
        )
    return value.to(mean.dtype)


def average_(tensors: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Replace each floating-point tensor by its mean over the processes of the group, in one all-reduce."""
    if process_group is None or not (means := [tensor for tensor in tensors if tensor.is_floating_point()]):
        return
    flat = mean_(torch.cat([tensor.reshape(-1) for tensor in means]), process_group)
    for tensor, part in zip(means, torch.split(flat, [tensor.numel() for tensor in means])):
        tensor.copy_(part.view_as(tensor))


def moments(x: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Mean and variance E[(x − E x)²] over the equal shares of all processes, in float64.

    Two all-reduces of one element: with the mean known, the variance loses no digits where the mean is large.
    """
    x = x.double()
    mean = mean_(x.mean(), process_group)
    return mean, mean_((x - mean).square().mean(), process_group)


def equal(tensors: Iterable[Tensor], process_group: dist.ProcessGroup | None) -> bool:
    """Whether the tensors are finite and the same in all processes of the group, judged by their sum in float64.

    Without a group nothing is looked at.
    """
    if process_group is None:
        return True
    total = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors]).sum()
    # Gloo's minimum may lose a NaN: −∞ in its place it cannot.
    extremes = torch.where(total.isfinite(), torch.stack([total, -total]), -inf)
    dist.all_reduce(extremes, dist.ReduceOp.MIN, group=process_group)
    return bool(extremes.isfinite().all()) and bool(extremes[0] == -extremes[1])


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

    def own_seed(self, seed: int) -> int:
        """The seed of what this process draws by itself: in the main one that of the run, in others a hash of 32 bits.

        With seed + rank, a process of one run would draw what another does in the run with the next seed.
        """
        return seed if self.is_main else int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0])

    def main_first(self, work: Callable[[], T]) -> T:
        """Do `work` in every process, in the main one before the others; what it raises there is raised in all.

        Raises:
            RuntimeError: in a process that could not do what the main one did.
        """
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
        if result:
            return result[0]
        try:
            return work()
        except Exception as error:
            raise RuntimeError(f"process {self.rank} could not do what process 0 did: {error}") from error

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
        average_(tensors, self.group)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; in the main process only, elsewhere an empty list."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, dst=0, group=self.group)
        return values


SILENT = 45.0
"""Seconds after which a process that gave no sign of life is taken for lost; each gives one every two seconds."""


_BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
"""What Gloo and NCCL say of a peer that is gone."""


def _say(what: str) -> None:
    print(f"{what}, and the others end. What was last saved goes on with --resume", file=sys.stderr, flush=True)


def _watch(store: Any, rank: int, world_size: int, ended: Event) -> None:
    """Give signs of life until the end, and end this process at once if a peer gives none: it would wait for ever."""
    peers = {r: ("", monotonic()) for r in range(world_size) if r != rank}
    beats, last = 0, monotonic()
    with suppress(RuntimeError):  # the store is gone, and torchrun with it
        while not ended.wait(2.0):
            beats, now = beats + 1, monotonic()
            store.set(f"alive {rank}", str(beats))
            asleep, last = now - last > 10.0, now  # this process itself was stopped: the others have to be heard again
            for r, (sign, since) in peers.items():
                new = store.get(f"alive {r}").decode() if store.check([f"alive {r}"]) else ""
                peers[r] = (new, now) if new != sign or new == "ended" or asleep else (sign, since)
            if lost := [r for r, (_, since) in peers.items() if now - since > SILENT]:
                if rank == min({*range(world_size)} - {*lost}):
                    who = ", ".join(map(str, lost))
                    _say(f"process {who} has given no sign of life for {SILENT:.0f} s: it was lost or stopped")
                os._exit(1)
        store.set(f"alive {rank}", "ended")


@cache
def _meet() -> tuple[Any, int, int, bool]:
    """Meet the processes that were started with this one: their store, rank, world size, and whether it is a restart.

    ``torchrun`` keeps one store over its restarts, where the keys of processes that have ended would be taken for those
    of their successors, and ``TORCHELASTIC_RESTART_COUNT`` counts on each machine what ended there alone. So process 0
    gives all the name of their part of the store: to each that asks, until all have said that they heard it. One that
    has ended may have asked too, and does not say so.
    """
    store, rank, world_size = next(rendezvous("env://"))
    own = uuid4().hex
    if rank:
        store.set(f"asks {rank}", own)
        name, again = store.get(f"answer to {own}").decode().split()
        store.set(f"{name} heard {rank}", "")
    else:
        name, again = own, str(store.check(["met"]) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")
        for other in range(1, world_size):
            while not store.check([f"{name} heard {other}"]):
                asks = store.get(f"asks {other}").decode()
                store.set(f"answer to {asks}", f"{name} {again}")
                sleep(0.02)
        store.set("met", "")
    return dist.PrefixStore(name, store), rank, world_size, again == "True"  # type: ignore[attr-defined]


#: Numbers the worlds of this process. Each has a part of the store for itself, without what the last one left there.
_worlds = count()


def restarted() -> bool:
    """Whether ``torchrun`` has started these processes again, on this or another machine; it waits for all of them."""
    return _launched() and _meet()[3]


def _launched() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def open_world(device: str | None = None) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, on NCCL for CUDA and on Gloo for CPU; or be alone.

    An error in one process ends them all, and is shown once: what the others raise, when they find their peer gone,
    becomes a silent ``SystemExit`` with status 1.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default CUDA where there is a device for this process.

    Raises:
        ValueError: the device is not available.
    """
    launched = _launched()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched else 1
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; known are cpu, cuda, cuda:0, cuda:1, …") from error
    if chosen.type == "cuda":
        # Judged alike by all processes of a machine, so that none waits for one that has given up.
        index = int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index
        needed = here if chosen.index is None else index + 1
        if needed > torch.cuda.device_count():
            there = torch.cuda.device_count()
            where = f" for {here} processes" if here > 1 else ""
            remedy = "start fewer processes, or choose" if here > 1 and there else "choose"
            raise ValueError(
                f"device {chosen} is not available{where}: this machine has {there or 'no'} CUDA "
                f"device{'' if there == 1 else 's'}; {remedy} device cpu"
            )
        if chosen.index is not None and here > 1:
            raise ValueError(f"device {chosen} is only one device, for {here} processes: choose device cuda, or cpu")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if not launched:
        yield World(chosen)
        return
    store, rank, world_size, _ = _meet()
    store = dist.PrefixStore(f"world {next(_worlds)}", store)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    ended = Event()
    watch = Thread(target=_watch, args=(store, rank, world_size, ended), daemon=True)
    watch.start()
    try:
        yield World(chosen, rank, world_size, dist.group.WORLD)
    except BaseException as error:
        store.set(f"done {rank}", "")
        first = store.add("failed", 1) == 1
        broken = isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
        if first and broken:
            _say("the connection to another process broke: it was killed or lost")
        if isinstance(error, Exception) and (broken or not first):
            raise SystemExit(1) from None
        raise
    else:
        # If it left, and another were then stopped, torchrun would wait for that one for ever: nobody watched it.
        with suppress(RuntimeError):
            store.set(f"done {rank}", "")
            while not store.check([f"done {r}" for r in range(world_size)]):
                sleep(0.05)
    finally:
        ended.set()
        watch.join()
        dist.destroy_process_group()
        # A thread of Gloo's drops the tensors of the last reduction, for which it needs the GIL; if the interpreter has
        # begun to end by then, the process aborts. The group's end would wait for it, but callers still hold the group.
        # Asleep, this thread leaves the GIL to it.
        sleep(0.5)
