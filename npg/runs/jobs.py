"""Commands as processes of their own: so many at a time, each with its log, stopped together, shown in one place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import torch

from npg.parallel import World
from npg.runs.signals import StopRequest

try:
    import fcntl
except ImportError:  # not a system with such locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["End", "Job", "Status", "run_jobs", "threads_for"]

Status = Literal["done", "done before", "failed", "killed", "stopped", "waiting", "running elsewhere"]

#: Seconds between two looks at the processes; between two lines of progress where there is no terminal; and that a
#: process has to end after a second Ctrl-C.
LOOK, SAY, END = 0.1, 60.0, 10.0


@dataclass(frozen=True, eq=False)
class Job:
    """A command to run.

    Attributes:
        name: for the display.
        command: gives what `subprocess.Popen` takes, or None where nothing is left to do; called when its turn comes.
        log: the file to which its output is appended. While a process holds it, no second one is started, nor is
            `command` called.
        progress: how far it is, in a few words; "?" is shown where it raises.
    """

    name: str
    command: Callable[[], Sequence[str] | None]
    log: Path
    progress: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        status: ``done``; ``done before``, for nothing was left to do; ``failed`` by its own exit status, or
            as it could not be started; ``killed`` by a signal; ``stopped``, as it was told to; ``waiting``, for it was
            not started any more; or ``running elsewhere``, for another process has its log.
        reason: the last line of its output, or the name of the signal; empty where there is nothing to say.
        seconds: that it ran.
    """

    status: Status
    reason: str = ""
    seconds: float = 0.0


def threads_for(at_once: int) -> int:
    """The threads of each of so many processes: an equal share of the processors that this one may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // at_once)


def run_jobs(
    jobs: Iterable[Job],
    at_once: int,
    *,
    environment: dict[str, str] | None = None,
    ended: Callable[[Job, End], str] = lambda job, end: "",
    show: bool = True,
) -> dict[Job, End]:
    """Run all jobs, at most `at_once` at a time. What happens to one changes nothing for the others.

    Ctrl-C and SIGTERM tell those that run to stop, with SIGTERM, and start no more; a second one ends them at once.

    Args:
        jobs: in the order in which they are started.
        at_once: how many processes run at a time.
        environment: variables beside this process's own.
        ended: called after each job; what it returns is shown behind its status.
        show: show how far those that run are, on standard error.

    Returns:
        The end of each job, in the order in which they were given.
    """
    jobs = list(jobs)
    ends: dict[Job, End] = {}
    waiting, running = deque(jobs), dict[Job, _Process]()
    display = _Display(show)

    def finish(job: Job, end: End) -> None:
        ends[job] = end
        words = [f"{job.name} {end.status}", end.reason, ended(job, end)]
        display.say(", ".join(filter(None, words)) + f" ({len(ends)} of {len(jobs)})")

    told = 0
    with StopRequest(World(torch.device("cpu"))) as stop:
        try:
            while running or (waiting and not stop.requested):
                try:
                    while waiting and len(running) < at_once and not stop.requested:
                        job = waiting.popleft()
                        started = _start(job, os.environ | (environment or {}))
                        if isinstance(started, End):
                            finish(job, started)
                        else:
                            running[job] = started
                    if stop.requested and not told:
                        told = 1
                        display.say("stopping: they finish their step and save; Ctrl-C again ends them at once")
                        _tell(running.values())
                    for job, process in list(running.items()):
                        if (end := process.end(bool(told))) is not None:
                            del running[job]
                            if told:
                                process.end_those_left(at_once=False)
                            finish(job, end)
                    display.draw([f"{job.name} {_progress(job)}" for job in running], len(ends), len(jobs))
                    time.sleep(LOOK)
                except KeyboardInterrupt:  # the second
                    told = 2
                    _tell(running.values())
                    break
        finally:
            display.draw([], 0, 0)
            _end(running.values(), told)
    for job, process in running.items():
        ends[job] = process.end(bool(told)) or End("killed")
    return {job: ends.get(job, End("waiting")) for job in jobs}


def _start(job: Job, environment: dict[str, str]) -> _Process | End:
    """The process of a job, or why there is none; an error is the job's own, of its command or its log.

    The lock of its log belongs to the open file, which the process inherits: it holds as long as the process does, also
    beyond the end of this one.
    """
    try:
        with job.log.open("ab") as log:
            try:
                if fcntl is not None:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return End("running elsewhere")
            if (command := job.command()) is None:
                return End("done before")
            begin = log.tell()
            # A session of its own: the terminal's Ctrl-C comes to this process alone, which passes it on once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except Exception as error:
        return End("failed", f"{type(error).__name__}: {error}")
    return _Process(job, process, begin)


def _progress(job: Job) -> str:
    try:
        return job.progress()
    except Exception:  # of a file that is half written, perhaps
        return "?"


@dataclass(frozen=True)
class _Process:
    """A job that runs, and where its output begins in the log."""

    job: Job
    process: subprocess.Popen[bytes]
    begin: int
    started: float = field(default_factory=time.perf_counter)

    def end(self, told: bool) -> End | None:
        """How it ended; None while it runs. A process that was told to stop is not to blame for how it did."""
        code = self.process.poll()
        if code is None:
            return None
        seconds = time.perf_counter() - self.started
        if code == 0:
            return End("done", seconds=seconds)
        if code == 130 or (told and code < 0):
            return End("stopped", seconds=seconds)
        if code < 0:
            return End("killed", f"by {_signal_name(-code)}", seconds)
        return End("failed", self._last_line() or f"exit status {code}", seconds)

    def end_those_left(self, *, at_once: bool) -> None:
        """End what its process started and left behind: a shell does not pass on that it was told to stop."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(self.process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def _last_line(self) -> str:
        with self.job.log.open("rb") as log:
            log.seek(max(self.begin, log.seek(0, os.SEEK_END) - 8192))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _tell(processes: Iterable[_Process]) -> None:
    for running in processes:
        running.process.send_signal(signal.SIGTERM)


def _end(processes: Iterable[_Process], told: int) -> None:
    """Leave no process behind: those of an error here are told to stop, and after a while they are killed."""
    processes = list(processes)
    if told < 2:
        _tell(processes)
    deadline = time.perf_counter() + END
    for running in processes:
        try:
            running.process.wait(max(0.0, deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
        running.end_those_left(at_once=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class _Display:
    """A line for each job that runs, at the foot of a terminal; elsewhere such lines from time to time."""

    def __init__(self, show: bool, stream: IO[str] | None = None) -> None:
        self.stream = stream or sys.stderr
        self.show, self.terminal = show, (stream or sys.stderr).isatty()
        self.drawn, self.last, self.said = 0, list[str](), time.perf_counter()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._erase()
        print(line, file=self.stream, flush=True)
        self.last = []

    def draw(self, lines: list[str], done: int, total: int) -> None:
        """The lines of now in place of those before."""
        if not self.show:
            return
        if not self.terminal:
            if lines and time.perf_counter() - self.said > SAY:
                self.said = time.perf_counter()
                print("\n".join(lines), file=self.stream, flush=True)
            return
        if total:
            lines = [*lines, f"{done} of {total} ended"]
        if lines == self.last:
            return
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("".join(line[:width] + "\n" for line in lines))
        self.stream.flush()
        self.drawn, self.last = len(lines), lines

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}F\x1b[J")
            self.drawn = 0
