import pytest
import torch

from npg.vision import timing
from npg.vision.timing import Stopwatch


def test_seconds_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    watch = Stopwatch(torch.device("cpu"))
    begun = watch.mark()
    now = 101.0
    assert watch.lap("a", begun) == 101.0
    now = 103.0
    watch.lap("a", 102.0)
    watch.lap("b", 100.5)
    now = 104.0
    watch.lap("b", 102.5)  # overlaps the one before by half a second
    assert watch.read() == {"a": 2.0, "b": 3.5}
    assert watch.read() == {}
