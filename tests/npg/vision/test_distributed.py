"""Two Gloo processes against one: every case in one pair of processes, started as a user starts them."""

import math
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npg.parallel import World, open_world
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.training import Trainer, TrainingStopped

pytestmark = pytest.mark.slow  # one start of two processes serves them all

#: Optimizer, its options, and after how many steps parameters are averaged (0: gradients are, at every step).
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "sgd": ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, 0),
    "online-ngd": ("online-ngd", {"lr": 0.1, "weight_decay": 0.01}, 0),
    "ngd": ("ngd", {"lr": 0.5, "damping": 1.0, "momentum": 0.5}, 0),
    "diagonal-ngd": ("diagonal-ngd", {"lr": 0.01, "damping": 0.1, "probes": None}, 0),
    "kfac": ("kfac", {"lr": 0.5, "damping": 1.0, "momentum": 0.5, "probes": None}, 0),
    "averaged sgd": ("sgd", {"lr": 0.1, "momentum": 0.9}, 2),
    "averaged ngd": ("ngd", {"lr": 0.5, "damping": 1.0}, 2),
}


def images() -> ImageData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    labels = rng.integers(0, 3, 60)
    return ImageData(pixels[:48], labels[:48], pixels[48:], labels[48:], ("a", "b", "c"))


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(5)
    middle = nn.BatchNorm2d(4) if norm else nn.Identity()
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), middle, nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()


def trainer(
    world: World,
    run_dir: Path,
    optimizer: str = "sgd",
    options: dict[str, Any] | None = None,
    average_every: int = 0,
    *,
    epochs: int = 1,
    norm: bool = False,
    ema: float = 0.0,
    checkpoint: Path | None = None,
) -> Trainer:
    """Five steps an epoch of eight images, in float64."""
    config = Config(
        "tiny",
        optimizer,
        options or {"lr": 0.1, "momentum": 0.9},
        epochs=epochs,
        batch_size=8,
        validation_size=8,
        average_every=average_every,
        ema=ema,
    )
    return Trainer(config, images(), run_dir, world, model=network(norm), checkpoint=checkpoint)


def parameters(of: Trainer) -> list[Tensor]:
    return [p.detach() for p in of.model.parameters()]


# --- what each of the two processes does


@dataclass(frozen=True)
class Spy(World):
    """Remembers what is averaged."""

    def average_(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        SEEN.append([tensor.clone() for tensor in tensors])
        super().average_(tensors)


SEEN: list[list[Tensor]] = []


def work(out: Path) -> None:
    results: dict[str, Any] = {}
    with open_world("cpu") as world:
        for name, case in CASES.items():
            trained = trainer(world, out / name, *case)
            trained.run()
            results[name] = parameters(trained)
            results["seed"] = torch.initial_seed()
            results[f"{name} row"] = trained.folder and trained.folder.rows[0]

        norm = trainer(Spy(**vars(world)), out / "norm", norm=True)
        norm.run()
        results["statistics"] = SEEN[0], [buffer.clone() for buffer in norm.model.buffers()]

        averaged = trainer(world, out / "ema", norm=True, ema=0.5, epochs=2)
        averaged.run()
        first = out / "ema" / "checkpoints" / "epoch_0001.pt"
        again = trainer(world, out / "ema again", norm=True, ema=0.5, epochs=2, checkpoint=first)
        again.run()
        results["ema"] = [[t.clone() for t in one.ema.state_dict().values()] for one in (averaged, again)]

        whole = trainer(world, out / "whole", average_every=3, epochs=2)
        whole.run()
        first = out / "whole" / "checkpoints" / "epoch_0001.pt"
        resumed = trainer(world, out / "resumed", average_every=3, epochs=2, checkpoint=first)
        resumed.run()
        results["resumption"] = [(parameters(t), t.optimizer.state_dict()["state"]) for t in (whole, resumed)]

        poisoned = trainer(world, out / "poisoned", average_every=100)
        signalled = trainer(world, out / "signalled")
        if world.rank == 1:
            calls = iter(range(100))
            poisoned.model[0].weight.data.fill_(math.nan)
            signalled.model.register_forward_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGTERM) if next(calls) == 2 else None
            )
        for name, stopped in (("poisoned", poisoned), ("signalled", signalled)):
            try:
                stopped.run()
            except TrainingStopped as error:
                results[name] = str(error)

        tried: list[int] = []

        def fail() -> None:
            tried.append(world.rank)
            raise ValueError("no data here")

        try:
            world.main_first(fail)
        except ValueError as error:
            results["error"] = str(error), tried

        def fail_elsewhere() -> None:
            if not world.is_main:
                raise ValueError("no data there")

        try:
            world.main_first(fail_elsewhere)
        except RuntimeError as error:
            results["elsewhere"] = str(error)
        results["first"] = world.main_first(lambda: world.rank)
        results["gathered"] = world.gather(world.rank)
        torch.save(results, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))


# --- what is asked of them


@pytest.fixture(scope="module")
def ranks(two_processes: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes came to."""
    out = tmp_path_factory.mktemp("two")
    return two_processes(__file__, out)


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if "averaged" not in name])
def test_two_processes_are_one(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = trainer(World(torch.device("cpu")), tmp_path / "alone", *CASES[name])
    alone.run()
    assert alone.total_steps == 5
    assert_close(ranks[0][name], parameters(alone))
    assert all(torch.equal(x, y) for x, y in zip(ranks[0][name], ranks[1][name], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(parameters(alone), network().parameters(), strict=True))
    mine, theirs = alone.folder.rows[0], ranks[0][name + " row"]
    for key, value in mine.items():
        if not key.startswith(("seconds", "memory")) and value == value:
            assert theirs[key] == pytest.approx(value, rel=1e-8), key
    assert theirs["seconds_communication"] > 0 or "sgd" not in name


def test_the_main_process_draws_by_the_seed_and_others_what_no_run_does(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["seed"] for rank in ranks)
    assert first == Config("tiny", "sgd").seed
    assert second > 1000


@pytest.mark.parametrize("name", [name for name in CASES if "averaged" in name])
def test_parameter_averaging(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two runs side by side in one process, averaged by hand after steps 2 and 4, and at the end."""
    optimizer, options, every = CASES[name]
    pair = [trainer(World(torch.device("cpu")), tmp_path / str(r), optimizer, options, 0) for r in (0, 1)]
    for rank, one in enumerate(pair):
        one.loader.rows = slice(4 * rank, 4 * rank + 4)
    for step, batches in enumerate(zip(*(one.loader for one in pair), strict=True), start=1):
        for one, (inputs, targets) in zip(pair, batches):
            one.take_step(inputs, targets, {})
        if step % every == 0 or step == 5:
            with torch.no_grad():
                for a, b in zip(*(t.model.parameters() for t in pair), strict=True):
                    a.copy_((a + b) / 2)
                    b.copy_(a)
    for r in (0, 1):
        assert_close(ranks[r][name], parameters(pair[0]))


def test_running_statistics_are_averaged(ranks: list[dict[str, Any]]) -> None:
    (a, mean_a, variance_a), (b, mean_b, variance_b) = ((r["statistics"][0], *r["statistics"][1][:2]) for r in ranks)
    assert not torch.equal(a[0], b[0])
    assert_close([mean_a, variance_a], [(x + y) / 2 for x, y in zip(a[:2], b[:2], strict=True)])
    assert_close([mean_b, variance_b], [mean_a, variance_a])
    assert a[2] == b[2] == 5


def test_averaged_weights_and_their_statistics_are_the_same_everywhere(ranks: list[dict[str, Any]]) -> None:
    (mine, mine_again), (theirs, theirs_again) = (rank["ema"] for rank in ranks)
    for other in (theirs, mine_again, theirs_again):
        assert all(torch.equal(x, y) for x, y in zip(mine, other, strict=True))
    assert any(x.ndim == 1 and x.std() > 0 for x in mine)


def test_processes_that_train_alone_resume_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    momenta = []
    for rank in ranks:
        (weights, state), (resumed_weights, resumed_state) = rank["resumption"]
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed_weights, strict=True))
        assert all(torch.equal(state[i]["momentum_buffer"], resumed_state[i]["momentum_buffer"]) for i in state)
        momenta.append(state[0]["momentum_buffer"])
    assert not torch.equal(*momenta)


def test_one_stops_all_with_one_message(ranks: list[dict[str, Any]]) -> None:
    for key, start in (
        ("poisoned", "the loss of step 1 (number 1 of 5 in epoch 1) is not finite"),
        ("signalled", "stopped by SIGTERM after step 3"),
    ):
        assert ranks[0][key].startswith(start)
        assert ranks[0][key] == ranks[1][key]


def test_main_first(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["error"] == ("no data here", [0])
    assert ranks[1]["error"] == ("no data here", [])
    assert "elsewhere" not in ranks[0]
    assert ranks[1]["elsewhere"] == "process 1 could not do what process 0 did: no data there"
    assert [rank["first"] for rank in ranks] == [0, 1]
    assert [rank["gathered"] for rank in ranks] == [[0, 1], []]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.group, world.is_main) == (0, 1, None, True)
        x = torch.ones(3)
        assert world.sum_(x) is x
        assert world.min_(x) is x
        assert world.main_first(lambda: 7) == 7
        assert world.gather(7) == [7]


def test_a_device_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(
            ValueError,
            match=r"device cuda is not available for 2 processes: this machine has 1 CUDA device; start fewer",
        ),
        open_world("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match=r"device cuda:0 is only one device, for 2 processes"), open_world("cuda:0"):
        pass
