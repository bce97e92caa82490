"""What tests of several packages share."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The processes of `pytest -n` share the cores, and so do the processes that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from npg import acceleration

# The same cases every time; NPG_CASES=20000 draws as many new ones for the properties of test_robustness.py.
settings.register_profile("npg", derandomize="NPG_CASES" not in os.environ, deadline=None)
settings.load_profile("npg")


@pytest.fixture
def accelerated() -> Iterator[None]:
    """Traced programs are on, for tests that ask whether one is used; the others run with and without."""
    with acceleration.mode("auto"):
        yield


@pytest.fixture
def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def two_processes() -> Callable[[str, Path], list[dict[str, Any]]]:
    """``two_processes(script, folder)``: run the script on the folder by a real torchrun; what each rank left there."""

    def run(script: str, folder: Path) -> list[dict[str, Any]]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*launch, script, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in (0, 1)]

    return run
