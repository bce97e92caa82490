import csv
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from npg.parallel import World
from npg.runs.checkpoints import CheckpointError
from npg.vision import training
from npg.vision.checkpoint import state_of
from npg.vision.config import Config
from npg.vision.data import ImageData
from npg.vision.loader import split_validation
from npg.vision.optimizers import takes_batches
from npg.vision.training import Trainer, TrainingStopped, learning_rate_factor

ALONE = World(torch.device("cpu"))
MakeImages = Callable[..., ImageData]


def config(optimizer: str = "sgd", **changes: Any) -> Config:
    options = {"lr": 0.05} | ({"damping": 0.1} if takes_batches(optimizer) else {})
    values = {
        "optimizer_options": options,
        "epochs": 3,
        "batch_size": 8,
        "validation_size": 16,
        "schedule": "cosine",
        "keep_checkpoints": 0,
    }
    return Config("wrn-10-1", optimizer, **(values | changes))


def metrics(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_equal(a: Any, b: Any) -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "online-ngd", "diagonal-ngd", "kfac", "ngd"])
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    optimizer: str, epoch: int, make_images: MakeImages, tmp_path: Path
) -> None:
    what = config(optimizer, dropout=0.2, ema=0.9)
    whole = Trainer(what, make_images(), tmp_path / "whole", ALONE)
    whole.run()
    checkpoint = tmp_path / "whole" / "checkpoints" / f"epoch_{epoch:04d}.pt"
    torch.manual_seed(12345)  # nothing may depend on what went on before
    resumed = Trainer(what, make_images(), tmp_path / "resumed", ALONE, checkpoint=checkpoint)
    resumed.run()
    states = [state_of(t) | {"seconds": None} for t in (whole, resumed)]
    assert_equal(*states)
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))} for row in metrics(tmp_path / name)]
        for name in ("whole", "resumed")
    ]
    assert timeless[0] == timeless[1]


def test_the_loop_learns_and_leaves_what_it_says(make_images: MakeImages, run_dir: Path) -> None:
    trainer = Trainer(config(epochs=12, augment=False, seed=1), make_images(96), run_dir, ALONE)
    summary = trainer.run()
    rows = metrics(run_dir)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert [int(row["step"]) for row in rows] == [10 * e for e in range(1, 13)]
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert summary["final_top1"] > 90.0
    curve = [float(row["validation_top1"]) for row in rows]
    assert summary["best_top1"] == max(curve)
    assert summary["last_five_top1"] == pytest.approx(sum(curve[-5:]) / 5)
    first = next(i for i, accuracy in enumerate(curve) if accuracy > 60)
    assert summary["first_above"]["60"] == {"epoch": first + 1, "seconds": float(rows[first]["seconds"])}
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    parts = ("seconds_forward_backward", "seconds_optimizer", "seconds_communication")
    assert all(0 < sum(float(row[part]) for part in parts) <= float(row["seconds_step"]) for row in rows)
    assert all(int(row["memory_peak_bytes"]) > 0 for row in rows)


def test_a_run_ends_once_it_is_above_what_it_shall_reach(make_images: MakeImages, tmp_path: Path) -> None:
    what = {"epochs": 12, "augment": False, "seed": 1}
    whole = Trainer(config(**what), make_images(96), tmp_path / "whole", ALONE).run()
    first = whole["first_above"]["60"]["epoch"]
    assert first < 12
    summary = Trainer(config(**what, stop_above=60.0), make_images(96), tmp_path / "short", ALONE).run()
    curves = [[row["validation_top1"] for row in metrics(tmp_path / name)] for name in ("whole", "short")]
    assert curves[1] == curves[0][:first]
    assert summary["final_top1"] > 60.0
    assert summary["first_above"]["60"]["epoch"] == first


def test_without_a_terminal_a_line_tells_from_time_to_time_how_far_it_is(
    make_images: MakeImages, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "SAY", 0.0)
    trainer = Trainer(config(epochs=2), make_images(96), run_dir, ALONE)
    trainer.run()
    lines = capsys.readouterr().err.splitlines()
    steps = trainer.total_steps // 2
    assert len(lines) == 2 * steps
    assert re.fullmatch(rf"epoch 2, loss \d\.\d{{3}}, step {steps} of {steps}", lines[-1])


def test_evaluation_is_the_plain_mean(make_images: MakeImages, run_dir: Path) -> None:
    images = make_images(test=13, classes=7)
    trainer = Trainer(config(), images, run_dir, ALONE)
    assert trainer.test is not None
    loss, top1, top5 = trainer.evaluate(*trainer.test)
    logits = trainer.model(trainer.normalize(torch.from_numpy(images.test_images))).detach().double()
    labels = torch.from_numpy(images.test_labels)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert top1 == pytest.approx(100 * float((ranks < 1).double().mean()))
    assert top5 == pytest.approx(100 * float((ranks < 5).double().mean()))
    assert 0 < top1 < top5 < 100


def test_the_test_set_is_kept_apart(make_images: MakeImages, tmp_path: Path) -> None:
    held_out = Trainer(config(), make_images(), tmp_path / "a", ALONE)
    assert len(held_out.loader.labels) == 48 - 16
    assert len(held_out.evaluation[1]) == 16
    everything = Trainer(config(eval_on="test"), make_images(), tmp_path / "b", ALONE)
    assert len(everything.loader.labels) == 48
    assert torch.equal(everything.evaluation[1], torch.from_numpy(make_images().test_labels))
    assert everything.test is None
    few = Trainer(config(limit_train=9), make_images(), tmp_path / "c", ALONE)
    assert torch.equal(few.loader.labels, held_out.loader.labels[:9])


@pytest.mark.parametrize("limit", [9, 47, 48])
def test_a_limit_of_all_images_is_none(limit: int, make_images: MakeImages, run_dir: Path) -> None:
    images = make_images(classes=48)  # a label for each image
    few = Trainer(config(eval_on="test", limit_train=limit), images, run_dir, ALONE)
    chosen = split_validation(48, 1)[0][:limit] if limit < 48 else slice(None)
    assert torch.equal(few.loader.labels, torch.from_numpy(images.train_labels[chosen]))


def test_a_step_is_that_of_the_textbook(make_images: MakeImages, run_dir: Path) -> None:
    """Label smoothing, cosine schedule and momentum against a loop written out, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    weight, bias = (p.detach().clone() for p in model[1].parameters())
    what = config(
        epochs=2,
        augment=False,
        label_smoothing=0.3,
        optimizer_options={"lr": 0.1, "momentum": 0.9},
        warmup=0.25,
    )
    trainer = Trainer(what, make_images(), run_dir, ALONE, model=model)
    twin = Trainer(what, make_images(), run_dir.with_name("twin"), ALONE, model=model)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(2):
        for i, (inputs, targets) in enumerate(twin.loader):
            step, x = 4 * epoch + i, inputs.flatten(1)
            lr = 0.1 * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / 8))
            soft = 0.7 * nn.functional.one_hot(targets, 3).double() + 0.1
            slope = (torch.softmax(x @ weight.T + bias, 1) - soft) / 8
            velocity = [0.9 * v + g for v, g in zip(velocity, (slope.T @ x, slope.sum(0)))]
            weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
    trainer.run()
    torch.testing.assert_close(model[1].weight, weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model[1].bias, bias, rtol=1e-10, atol=1e-10)


def test_ema_is_the_average_of_the_weights_and_is_what_is_evaluated(make_images: MakeImages, run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    trainer = Trainer(config(epochs=1, ema=0.5), make_images(), run_dir, ALONE, model=model)
    history = []
    trainer.model.register_forward_pre_hook(lambda m, _: history.append(m[1].weight.detach().clone()))
    trainer.run()
    weights = [*history, model[1].weight.detach()][1:]  # after each of the four steps
    average = weights[0]
    for weight in weights[1:]:
        average = 0.5 * average + 0.5 * weight
    assert trainer.ema is not None
    torch.testing.assert_close(trainer.ema.module[1].weight, average, rtol=1e-12, atol=1e-12)
    loss = float(metrics(run_dir)[0]["validation_loss"])
    images, labels = trainer.evaluation
    logits = trainer.ema(trainer.normalize(images)).detach()
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-10)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 4),
        ("step", [1.0, 0.1, 0.1, 0.01]),
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.1464466094]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    what = config(schedule=schedule, milestones=(0.25, 0.75))
    assert [learning_rate_factor(what, t, 4) for t in range(4)] == pytest.approx(expected)


def test_the_report_drops_its_rate_after_epoch_37() -> None:
    what = config(schedule="step", milestones=(0.74,))
    for per_epoch in (351, 390, 391):
        factors = [learning_rate_factor(what, t, 50 * per_epoch) for t in range(50 * per_epoch)]
        assert factors.index(0.1) == 37 * per_epoch


@pytest.mark.parametrize("changes", [{"amp": True}, {"channels_last": True}, {"deterministic": True}])
@pytest.mark.parametrize("optimizer", ["sgd", "ngd"])
def test_options_of_speed_train_too(optimizer: str, changes: dict, make_images: MakeImages, run_dir: Path) -> None:
    try:
        trainer = Trainer(config(optimizer, epochs=1, **changes), make_images(), run_dir, ALONE)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.run()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before))
    finally:
        torch.use_deterministic_algorithms(False)


def test_natural_steps_report_what_they_did(make_images: MakeImages, run_dir: Path) -> None:
    Trainer(config("ngd", epochs=2), make_images(), run_dir, ALONE).run()
    for row in metrics(run_dir):
        assert float(row["natural_accepted"]) == 1.0
        assert float(row["natural_predicted_kl"]) > 0.0
        assert 1 <= float(row["natural_iterations"]) <= 10
        assert float(row["natural_damping"]) == 0.1
        assert "train_top1" not in row


class Poisoned(nn.Module):
    """Returns NaN from its n-th call in training on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(192, 3), calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= self.training
        return self.linear(x.flatten(1)) * (math.nan if self.calls < 0 else 1.0)


def test_a_nan_stops_at_its_step_and_the_last_checkpoint_stays(make_images: MakeImages, run_dir: Path) -> None:
    trainer = Trainer(config(), make_images(), run_dir, ALONE, model=Poisoned(6))
    with pytest.raises(
        TrainingStopped, match=r"loss of step 7 \(number 3 of 4 in epoch 2\) is not finite. .* epoch 1 is"
    ):
        trainer.run()
    (kept,) = (run_dir / "checkpoints").iterdir()
    assert all(torch.isfinite(v).all() for v in torch.load(kept)["model"].values())
    assert len(metrics(run_dir)) == 1


def test_a_nan_in_the_first_epoch(make_images: MakeImages, run_dir: Path) -> None:
    trainer = Trainer(config(), make_images(), run_dir, ALONE, model=Poisoned(0))
    with pytest.raises(TrainingStopped, match=r"loss of step 1 .* there is no checkpoint"):
        trainer.run()


def test_weights_that_blew_up_in_the_last_step_are_not_kept(make_images: MakeImages, run_dir: Path) -> None:
    trainer = Trainer(config(), make_images(), run_dir, ALONE, model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    optimizer_step, steps = trainer.optimizer.step, iter(range(100))

    def step() -> None:
        optimizer_step()
        if next(steps) == 7:
            trainer.model[1].weight.data.fill_(math.inf)

    trainer.optimizer.step = step
    with pytest.raises(TrainingStopped, match="the validation loss after step 8, at the end of epoch 2, is not finite"):
        trainer.run()
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["epoch_0001.pt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(number: int, make_images: MakeImages, run_dir: Path) -> None:
    handler, calls = signal.getsignal(number), iter(range(100))
    trainer = Trainer(config(), make_images(), run_dir, ALONE)
    trainer.model.register_forward_hook(lambda *_: os.kill(os.getpid(), number) if next(calls) == 5 else None)
    with pytest.raises(TrainingStopped, match=f"stopped by {signal.Signals(number).name} after step 5, in epoch 2"):
        trainer.run()
    assert signal.getsignal(number) is handler
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["epoch_0001.pt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 33}, "batch_size must be between 1 and the 32 training images; got 33"),
        ({"limit_train": 33}, "limit_train must be at most 32 here; got 33"),
        ({"limit_train": 49, "eval_on": "test"}, "limit_train must be at most 48 here; got 49"),
        ({"validation_size": 48}, "validation_size must be between 1 and 47"),
        ({"sync_bn": True}, "sync_bn must be off on a CPU"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    changes: dict, message: str, make_images: MakeImages, run_dir: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(config(**changes), make_images(), run_dir, ALONE)
    assert not run_dir.exists()


def test_processes_that_do_not_divide_the_batch(make_images: MakeImages, run_dir: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of processes, 3; got 8"):
        Trainer(config(), make_images(), run_dir, World(torch.device("cpu"), rank=0, size=3))
    assert not run_dir.exists()


def test_checkpoints_of_another_run_are_refused(make_images: MakeImages, run_dir: Path) -> None:
    Trainer(config(), make_images(), run_dir, ALONE).run()
    newest = run_dir / "checkpoints" / "epoch_0003.pt"

    def resume(what: Config, world: World = ALONE, checkpoint: Path = newest) -> None:
        Trainer(what, make_images(), run_dir, world, checkpoint=checkpoint)

    with pytest.raises(CheckpointError, match="is of optimizer sgd, not of adam; resume with wrn-10-1 sgd"):
        resume(config("adam"))
    with pytest.raises(CheckpointError, match="is of model wrn-10-1, not of wrn-16-1"):
        resume(Config(**(config().to_dict() | {"model": "wrn-16-1"})))
    with pytest.raises(
        CheckpointError, match="is of 1 processes, and 2 run here; resume with torchrun --nproc_per_node=1"
    ):
        resume(config(), World(torch.device("cpu"), size=2))
    with pytest.raises(CheckpointError, match="is of epoch 3, beyond the 2 epochs"):
        resume(config(epochs=2))
    state = torch.load(newest)
    other = run_dir / "checkpoints" / "epoch_0009.pt"
    torch.save(state | {"model": {"features.0.weight": torch.ones(1)}}, other)
    with pytest.raises(CheckpointError, match="does not fit wrn-10-1"):
        resume(config(), checkpoint=other)
    other.unlink()
    fewer, shuffled = make_images(train=42), make_images()
    shuffled.train_labels[:2] = shuffled.train_labels[[1, 0]]
    for images, match in (
        (fewer, "with 48 images in the part 'train', and the data have 42"),
        (shuffled, "other labels"),
    ):
        with pytest.raises(CheckpointError, match=match):
            Trainer(config(epochs=4), images, run_dir, ALONE, checkpoint=newest)
    assert len(metrics(run_dir)) == 3


def test_a_run_whose_epochs_are_done_can_be_extended(make_images: MakeImages, run_dir: Path) -> None:
    Trainer(config(epochs=1, schedule="constant"), make_images(), run_dir, ALONE).run()
    longer, newest = config(epochs=2, schedule="constant"), run_dir / "checkpoints" / "epoch_0001.pt"
    shutil.copytree(run_dir, run_dir.with_name("copy"))
    Trainer(longer, make_images(), run_dir, ALONE, checkpoint=newest).run()
    whole = Trainer(longer, make_images(), run_dir.with_name("whole"), ALONE)
    whole.run()
    states = [torch.load(p / "checkpoints" / "epoch_0002.pt")["model"] for p in (run_dir, whole.folder.path)]
    assert_equal(*states)
