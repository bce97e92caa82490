"""Where a step's seconds and bytes go, measured without stopping the device."""

import sys
import time
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from npg.parallel import mean_

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Mark", "Stopwatch", "peak_memory"]

Mark = float | torch.cuda.Event


class Stopwatch:
    """Intervals by name, read once per epoch; on CUDA they are pairs of events, so that no step waits to be timed.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._intervals: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    def mark(self) -> Mark:
        """Now; on CUDA, the moment at which the work queued until now is done."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str, start: Mark) -> Mark:
        """Add the interval from `start` to now under `name`, and return now."""
        now = self.mark()
        self._intervals[name].append((start, now))
        return now

    def all_reduce_hook(
        self,
        group: dist.ProcessGroup,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """DistributedDataParallel's own all-reduce of a bucket of gradients, timed as ``communication``."""
        start = self.mark()
        if self.device.type == "cpu":
            # Gloo would run what follows the all-reduce in threads of its own. One that still waits for the interpreter
            # when that exits takes the process down, so nothing follows: the all-reduce is over when the hook returns.
            gradients = mean_(bucket.buffer(), group)
            self.lap("communication", start)
            finished: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            finished.set_result(gradients)
            return finished

        def done(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            self.lap("communication", start)
            return future.value()

        return default_hooks.allreduce_hook(group, bucket).then(done)

    def read(self) -> dict[str, float]:
        """Seconds covered by the intervals of each name, those that overlap counted once; then start again at zero."""
        intervals, self._intervals = self._intervals, defaultdict(list)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for name, pairs in intervals.items():
            origin = pairs[0][0]
            spans = sorted((_seconds(origin, start), _seconds(origin, end)) for start, end in pairs)
            covered, until = 0.0, float("-inf")
            for start, end in spans:
                covered += max(0.0, end - max(start, until))
                until = max(until, end)
            seconds[name] = covered
        return seconds


def _seconds(origin: Mark, mark: Mark) -> float:
    if isinstance(mark, float):
        return mark - float(origin)  # type: ignore[arg-type]
    return 1e-3 * float(origin.elapsed_time(mark))  # type: ignore[union-attr]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the CUDA device in the epoch, or the largest resident set on the CPU.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
