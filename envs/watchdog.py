"""Environments that fail: what they raise is told with its place, and what never ends is ended."""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from time import monotonic, sleep
from types import FrameType
from typing import Any

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

__all__ = ["Watchdog", "raising_exits"]

#: The looks that a call has to outlast. They count, and not a clock: a process that was stopped for a night looks once.
_LOOKS = 10
#: Seconds until a call that did not let itself be interrupted ends the process.
GRACE = 10.0
# A signal that nothing else uses; Windows has none, and there the process ends.
_SIGNAL: int | None = getattr(signal, "SIGVTALRM", None)
_watching: weakref.WeakSet[Watchdog] = weakref.WeakSet()


class Watchdog(VecEnvWrapper):
    """Environments of which a step or a reset ends within a time, or is ended by an error that names it.

    The error is raised where the call hangs, in Python code or in the wait for another process, so that the traceback
    shows the place; where a process has ended, long before the limit. A call that then goes on for `GRACE` seconds, in
    compiled code, ends the process with status 1 and the same message. What hangs in compiled code that holds Python's
    lock is not noticed; nor is anything in environments that are stepped outside of the main thread.

    Whatever else the environments raise goes on with a note of the step, ``SystemExit`` as a RuntimeError; and of an
    environment in a process of its own that has ended, it is told which.

    Args:
        venv: the environments.
        seconds: that a call may take; 0 or inf for no limit.
        name: what messages call them.

    Attributes:
        failed: whether an error came out of them. `close` then ends their processes in the place of asking them.

    Raises:
        TypeError: if ``seconds`` is no number.
        ValueError: if it is negative or NaN.
        TimeoutError: from `step` and `reset`, if they take longer.
    """

    def __init__(self, venv: VecEnv, seconds: float, name: str) -> None:
        given: Any = seconds  # which no type checker may have seen
        if isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"seconds must be a number, got {seconds!r} ({type(seconds).__name__}): 0 sets no limit")
        if not seconds >= 0:
            raise ValueError(f"seconds must lie in [0, inf], got {seconds}: 0 sets no limit")
        super().__init__(venv)
        self.seconds, self.name, self.failed = seconds, name, False
        self._calls, self._steps, self._what = 0, 0, ""  # nothing is under way where this is empty
        self._late = 0  # the call that was found to take too long
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def reset(self) -> VecEnvObs:
        """Begin episodes."""
        return self._watched("reset", self.venv.reset)

    def step_async(self, actions: Any) -> None:
        """Begin a step."""
        self._steps += 1
        self._watched("step", self.venv.step_async, actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Finish the step."""
        return self._watched("step", self.venv.step_wait)

    def _watched(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._thread is None and self.seconds:
            self._watch()
        self._calls += 1
        self._what = what
        try:
            return call(*arguments)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.failed, place = True, self._place()
            if isinstance(error, SystemExit):
                raise RuntimeError(f"{place} called sys.exit({error.code!r})") from error
            cut_off = isinstance(error, EOFError | ConnectionError)
            if ended := self._ended(5.0 if cut_off else 0.2) if cut_off or isinstance(error, TimeoutError) else "":
                raise RuntimeError(f"{place}: {ended}") from error
            if place not in str(error):
                error.add_note(place)
            raise
        finally:
            self._what = ""

    def close(self) -> None:
        """Close the environments; after an error, what has processes of its own is ended."""
        self._closed.set()
        if self.failed and (processes := self._processes()):
            for process in processes:
                process.kill()
                process.join()
            self.unwrapped.closed = True  # type: ignore[attr-defined]  # it would wait for what they answer
        elif not (self.failed and self._late):
            super().close()

    def _place(self) -> str:
        number = "" if self._what == "reset" else f" {self._steps}"
        return f"{self.name}, in {self._what or 'step'}{number} of its {self.num_envs} environments together"

    def _processes(self) -> list[Any]:
        """Of Stable-Baselines3's SubprocVecEnv."""
        return getattr(self.unwrapped, "processes", [])

    def _ended(self, patience: float) -> str:
        """Which environments' processes are over, and how they ended; empty if none is within so many seconds."""
        until = monotonic() + patience  # a pipe is closed some moments before its process ends
        while self._processes() and all(p.exitcode is None for p in self._processes()) and monotonic() < until:
            sleep(0.02)
        ends = [
            f"of environment {i} with {p.exitcode}" for i, p in enumerate(self._processes()) if p.exitcode is not None
        ]
        return f"the process {', '.join(ends)} ended. Its traceback, if it has one, stands above" if ends else ""

    # What takes too long ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if _SIGNAL is not None and signal.getsignal(_SIGNAL) is not _interrupt:
            signal.signal(_SIGNAL, _interrupt)
        _watching.add(self)
        self._thread = threading.Thread(target=_look, args=(weakref.ref(self), self._closed, self.seconds), daemon=True)
        self._thread.start()

    def _message(self) -> str:
        return (
            f"{self._place()}: took longer than {self.seconds:g} s, and was ended. Correct the environment; or if it "
            "needs more, raise the limit, which is --env-timeout of a run (0 for none)"
        )


def _look(watchdog: weakref.ref[Watchdog], closed: threading.Event, seconds: float) -> None:
    """Find the call that takes too long, and interrupt it."""
    seen, looks = 0, 0
    while not closed.wait(min(float(seconds) / _LOOKS, threading.TIMEOUT_MAX)):
        if (watched := watchdog()) is None:
            return
        looks = looks + 1 if watched._what and watched._calls == seen else 0
        seen = watched._calls
        # The pipe of a process that has ended stays open where others of it were forked: nothing would come.
        if looks == _LOOKS or (looks and any(p.exitcode is not None for p in watched._processes())):
            watched._late, message = seen, watched._message()
            if _SIGNAL is not None:
                signal.pthread_kill(threading.main_thread().ident, _SIGNAL)  # type: ignore[arg-type]
                for _ in range(20):
                    if closed.wait(GRACE / 20) or not (watched._what and watched._calls == seen):
                        break
            if watched._what and watched._calls == seen:
                for process in watched._processes():
                    process.kill()
                print(f"error: {message}. What was last saved goes on with --resume", file=sys.stderr, flush=True)
                os._exit(1)
        del watched


def _interrupt(number: int, frame: FrameType | None) -> None:
    for watched in list(_watching):
        if watched._late and watched._what and watched._calls == watched._late:
            raise TimeoutError(watched._message())


@contextmanager
def raising_exits(name: str) -> Iterator[None]:
    """``sys.exit`` in this block, which would end the caller with the status of its choice, is a RuntimeError."""
    try:
        yield
    except SystemExit as end:
        raise RuntimeError(f"{name} called sys.exit({end.code!r}) while it was made") from end
