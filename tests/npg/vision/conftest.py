from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from npg.vision.data import ImageData


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_images() -> Callable[..., ImageData]:
    """Random images whose brightness tells their class."""

    def make(train: int = 48, test: int = 12, size: int = 8, classes: int = 3) -> ImageData:
        rng = np.random.default_rng(0)
        labels = [np.arange(n) % classes for n in (train, test)]
        images = [
            (rng.integers(0, 100, (len(y), 3, size, size)) + 50 * y[:, None, None, None]).astype(np.uint8)
            for y in labels
        ]
        names = tuple(f"class{i}" for i in range(classes))
        return ImageData(images[0], labels[0], images[1], labels[1], names)

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"
