from pathlib import Path

import pytest
import yaml

from npg.vision.config import PRESETS, Config, load_config
from npg.vision.optimizers import OPTIMIZERS
from npg.vision.training import learning_rate_factor


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_preset_knows_every_optimizer(preset: str, optimizer: str) -> None:
    if optimizer in ("soap", "shampoo"):
        pytest.importorskip("pytorch_optimizer")
    config = load_config("densenet-19", optimizer, preset)
    assert (config.model, config.optimizer) == ("densenet-19", optimizer)
    assert (config.epochs, config.batch_size) == ((10, 512) if preset == "small" else (50, 128))
    assert isinstance(config.optimizer_options["lr"], float)
    assert isinstance(config.optimizer_options["weight_decay"], float)


def test_the_report_s_preset_is_the_report_s() -> None:
    config = load_config("densenet-19", "sgd", "report")
    assert config.optimizer_options == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert config.std == (0.2023, 0.1994, 0.2010)
    assert config.decay_all
    assert (config.schedule, [m * config.epochs for m in config.milestones], config.gamma) == ("step", [37.0], 0.1)


def test_what_the_caller_says_goes_over_the_preset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 3\noptimizers: {sgd: {lr: 0.5, momentum: 0.8}}\n")
    config = load_config("wrn-16-1", "sgd", str(mine), {"seed": 7}, {"lr": 0.25})
    assert (config.epochs, config.seed) == (3, 7)
    assert config.optimizer_options == {"lr": 0.25, "momentum": 0.8}


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("tuned", {"milestones": [0.5]}, r"milestones must be left out with schedule cosine, .* step; got \[0.5\]"),
        ("tuned", {"gamma": 0.5}, "gamma must be left out with schedule cosine, or given with schedule step; got 0.5"),
        ("report", {"schedule": "constant", "gamma": 0.5}, "gamma must be left out with schedule constant"),
        ("tuned", {"schedule": "step"}, r"milestones must be given with schedule step, .* constant; got \[\]"),
        ("report", {"milestones": []}, "milestones must be given with schedule step"),
        ("milestones: [0.5]", {}, "milestones must be left out with schedule constant"),
        ("schedule: step", {}, "milestones must be given with schedule step"),
    ],
)
def test_what_would_change_nothing_of_the_schedule_is_refused(
    preset: str, overrides: dict, message: str, tmp_path: Path
) -> None:
    if ":" in preset:
        (tmp_path / "mine.yaml").write_text(preset)
        preset = str(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match=message):
        load_config("wrn-16-1", "sgd", preset, overrides)


def test_another_schedule_passes_over_the_milestones_of_a_preset(tmp_path: Path) -> None:
    step = load_config("wrn-16-1", "sgd", "tuned", {"schedule": "step", "milestones": [0.5], "gamma": 0.2})
    assert [learning_rate_factor(step, t, 100) for t in (49, 50)] == [1.0, 0.2]
    cosine = load_config("wrn-16-1", "sgd", "report", {"schedule": "cosine"})
    assert learning_rate_factor(cosine, 75, 100) == pytest.approx(0.5 - 0.125**0.5)
    path = tmp_path / "mine.yaml"
    path.write_text("milestones: [0.5]")
    assert load_config("wrn-16-1", "sgd", str(path), {"schedule": "step"}).milestones == (0.5,)


@pytest.mark.parametrize("fields", [{"schedule": "cosine", "milestones": [0.74]}, {"schedule": "step"}])
def test_a_run_that_had_such_a_schedule_is_still_read(fields: dict, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    run = Config("wrn-16-1", "sgd", {"lr": 0.1}, **fields)
    path.write_text(yaml.safe_dump(run.to_dict()))
    assert load_config("wrn-16-1", "sgd", str(path)) == Config(**yaml.safe_load(path.read_text())) == run
    with pytest.raises(ValueError, match="milestones must be "):
        load_config("wrn-16-1", "sgd", str(path), {"milestones": [0.5] if run.schedule == "cosine" else []})


def test_a_config_survives_yaml() -> None:
    config = load_config("wrn-16-1", "online-ngd", "report", {"limit_train": 10})
    assert Config(**yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be at least 1; got 0"),
        ("batch_size", -1, "batch_size must be at least 1; got -1"),
        ("average_every", -2, "average_every must be at least 0; got -2"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ("ema", -0.1, r"ema must be in \[0, 1\); got -0.1"),
        ("milestones", [37], "milestones must be fractions of the run"),
        ("gamma", 0.0, "gamma must be a finite number above 0"),
        ("std", [0.0, 1.0, 1.0], "mean and std must be three finite numbers each"),
        ("limit_train", 0, "limit_train must be at least 1"),
        ("stop_above", 100.0, r"stop_above must be a percentage in \[0, 100\); got 100.0"),
        ("schedule", "stairs", "schedule must be constant, step or cosine; got 'stairs'"),
        ("eval_on", "train", "eval_on must be validation or test; got 'train'"),
        ("optimizer_options", {"lr": 0.1, "beta": 1}, "unknown option 'beta' of sgd: known are: lr, momentum"),
    ],
)
def test_a_value_out_of_range_names_itself(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**({"model": "wrn-16-1", "optimizer": "sgd", "optimizer_options": {"lr": 0.1}} | {field: value}))


@pytest.mark.parametrize("field", [{"label_smoothing": 0.1}, {"compile": True}])
def test_what_a_natural_step_cannot_do_is_refused(field: dict) -> None:
    with pytest.raises(ValueError, match="with ngd, which differentiates"):
        Config("wrn-16-1", "ngd", **field)


def test_bad_presets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'best': known are: report, tuned, small\. Or give"):
        load_config("wrn-16-1", "sgd", "best")
    path = tmp_path / "bad.yaml"
    path.write_text("epoch: 3\noptimizers: {sgd: {lr: 0.1}}")
    with pytest.raises(ValueError, match=r"unknown key 'epoch' of preset .*bad\.yaml: did you mean epochs"):
        load_config("wrn-16-1", "sgd", str(path))
    path.write_text("[1, 2")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config("wrn-16-1", "sgd", str(path))
    path.write_text("just text")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_config("wrn-16-1", "sgd", str(path))


def test_a_run_s_own_configuration_is_a_preset_of_its_optimizer(tmp_path: Path) -> None:
    run = load_config("wrn-16-1", "sgd", "small", {"epochs": 3}, {"lr": 0.5, "momentum": 0.8})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run.to_dict()))
    assert load_config("wrn-16-1", "sgd", str(path)) == run
    again = load_config("wrn-16-1", "sgd", str(path), {}, {"lr": 0.1})
    assert again.optimizer_options == {**run.optimizer_options, "lr": 0.1}
    with pytest.raises(
        ValueError, match=r"optimizer_options of preset .* are of sgd, and the optimizer is adam: take sgd"
    ):
        load_config("wrn-16-1", "adam", str(path))
    path.write_text("optimizers: {kl-shampo: {lr: 0.5}}")
    with pytest.raises(ValueError, match=r"unknown optimizer 'kl-shampo' under optimizers .*did you mean kl-shampoo"):
        load_config("wrn-16-1", "kl-shampoo", str(path))
