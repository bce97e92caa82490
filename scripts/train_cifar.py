"""Train an image classifier on CIFAR-10, alone or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from npg.parallel import World, open_world
from npg.vision import data
from npg.vision.config import PRESETS, Config, load_config
from npg.vision.models import KNOWN_MODELS
from npg.vision.optimizers import OPTIMIZERS
from npg.vision.run_folder import find_checkpoint, load_checkpoint, run_of
from npg.vision.training import Trainer, TrainingStopped

DEFAULT_PRESET = "tuned"
EXAMPLES = f"""\
models:      {", ".join(KNOWN_MODELS[:4])},
             {", ".join(KNOWN_MODELS[4:])},
             and any legal densenet[-basic]-DEPTH[-GROWTH] or wrn-DEPTH-WIDTH
optimizers:  {", ".join(list(OPTIMIZERS)[:6])},
             {", ".join(list(OPTIMIZERS)[6:])}

examples:
  python scripts/train_cifar.py densenet-19 online-ngd --preset report
  python scripts/train_cifar.py wrn-16-4 sgd --lr 0.05 --epochs 20
  python scripts/train_cifar.py wrn-16-1 online-ngd --set rank=40 alpha=2
  python scripts/train_cifar.py --resume runs/RUN
  torchrun --nproc_per_node=4 scripts/train_cifar.py wrn-16-10 online-ngd
"""

#: What may differ from the checkpoint when a run goes on.
CHANGEABLE = {"data", "device", "epochs", "keep_checkpoints", "stop_above", "threads"}


def value(text: str) -> Any:
    """A number, boolean, null, list or word, as YAML reads it; and 1e-3 is a number too."""
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set has a value that is not YAML: {text!r}") from error
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL OPTIMIZER [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="such as densenet-19 or wrn-16-4; see below")
    parser.add_argument("optimizer", metavar="OPTIMIZER", nargs="?", help="such as sgd or online-ngd; see below")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--preset",
        metavar="NAME",
        help=f"{' or '.join(PRESETS)}, or a YAML file of your own [{DEFAULT_PRESET}]",
    )
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="a new folder for all results [runs/…]")
    run.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="go on from a run folder, or from one checkpoint file; with --run-dir in a folder of its own",
    )
    run.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    run.add_argument(
        "--stop-above", type=float, metavar="PERCENT", help="end after the first epoch above this accuracy"
    )
    run.add_argument("--seed", type=int, metavar="N", help="of initial weights, order and augmentation [0]")
    run.add_argument("--keep-checkpoints", type=int, metavar="N", help="keep the newest N; 0 keeps all")

    images = parser.add_argument_group("data")
    images.add_argument(
        "--data",
        metavar="PATH",
        help="CIFAR-10's archive, or images in train/<class>/ and test/<class>/, in a folder or an archive [download]",
    )
    images.add_argument("--limit-train", type=int, metavar="N", help="train on N images only")
    images.add_argument("--validation-size", type=int, metavar="N", help="training images held out [5000]")
    images.add_argument(
        "--eval-on",
        choices=("validation", "test"),
        help="test: hold nothing out, and look at the test set after each epoch, as the report did [validation]",
    )
    images.add_argument("--augment", action=argparse.BooleanOptionalAction, help="random crops and mirror images")

    step = parser.add_argument_group("optimisation")
    step.add_argument("--lr", type=float, metavar="F", help="learning rate, at its highest")
    step.add_argument("--momentum", type=float, metavar="F", help="where the optimizer has one")
    step.add_argument("--weight-decay", type=float, metavar="F", help="in the optimizer's own sense")
    step.add_argument(
        "--set", type=str, nargs="+", action="extend", metavar="KEY=VALUE", help="any option of the optimizer"
    )
    step.add_argument("--batch-size", type=int, metavar="N", help="of all processes together")
    step.add_argument("--schedule", choices=("constant", "step", "cosine"), help="of the learning rate")
    step.add_argument(
        "--milestones", type=float, nargs="*", metavar="F", help="of the step schedule, as fractions of the run"
    )
    step.add_argument("--gamma", type=float, metavar="F", help="factor of the learning rate at a milestone")
    step.add_argument("--warmup", type=float, metavar="F", help="fraction of the run with a growing learning rate")
    step.add_argument("--label-smoothing", type=float, metavar="F", help="share of the target spread over all classes")
    step.add_argument("--ema", type=float, metavar="DECAY", help="evaluate an average of the weights, such as 0.999")
    step.add_argument("--dropout", type=float, metavar="P", help="inside the models' blocks")

    speed = parser.add_argument_group("speed")
    speed.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    speed.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU [its own choice]")
    for name, text in (
        ("amp", "bfloat16 autocast"),
        ("channels-last", "NHWC layout"),
        ("compile", "torch.compile"),
        ("deterministic", "deterministic algorithms only"),
    ):
        speed.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)

    many = parser.add_argument_group("several processes (torchrun)")
    many.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, help="BatchNorm over all processes (CUDA)")
    many.add_argument(
        "--average-every", type=int, metavar="K", help="average parameters every K steps, not gradients at each"
    )
    return parser.parse_args(arguments)


def configure(options: dict[str, Any]) -> tuple[Config, Path | None]:
    """The run's configuration, and the checkpoint that it goes on from."""
    model, optimizer = options.pop("model", None), options.pop("optimizer", None)
    preset, resume = options.pop("preset", None), options.pop("resume", None)
    if "data" in options and Path(options["data"]).exists():
        options["data"] = str(Path(options["data"]).resolve())  # a run may go on from another folder
    optimizer_options: dict[str, Any] = {}
    for pair in options.pop("set", []):
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, such as rank=40; got {pair!r}")
        optimizer_options[key] = value(text)
    optimizer_options |= {key: options.pop(key) for key in ("lr", "momentum", "weight_decay") if key in options}
    if resume is None:
        if model is None or optimizer is None:
            raise ValueError("say which MODEL and OPTIMIZER to train, such as densenet-19 sgd; --help lists them")
        return load_config(model, optimizer, preset or DEFAULT_PRESET, options, optimizer_options), None
    if preset is not None:
        raise ValueError("--preset cannot go with --resume: a run keeps what it began with")
    checkpoint = find_checkpoint(resume)
    saved = load_checkpoint(checkpoint)["config"]
    asked = options | {"optimizer_options": saved["optimizer_options"] | optimizer_options}
    fixed = Config(**saved).to_dict()
    for key, new in dataclasses.replace(Config(**saved), **asked).to_dict().items():
        if new != fixed[key] and key not in CHANGEABLE:
            raise ValueError(f"{key} is {fixed[key]} in {checkpoint} and cannot become {new} there: start a new run")
    # Another model or optimizer is refused by the trainer, by name.
    asked |= {"model": model or saved["model"], "optimizer": optimizer or saved["optimizer"]}
    if asked["optimizer"] != saved["optimizer"]:
        asked["optimizer_options"] = {}
    return dataclasses.replace(Config(**saved), **asked), checkpoint


def train(config: Config, run_dir: Path, checkpoint: Path | None, world: World) -> int:
    """Train and tell; what goes wrong in all processes alike is told by the main one."""
    try:
        images = world.main_first(lambda: data.load(config.data, progress=sys.stderr.isatty() and world.is_main))
        summary = Trainer(config, images, run_dir, world, checkpoint=checkpoint).run()
    except (ValueError, TrainingStopped) as error:
        if world.is_main:
            print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingStopped) else 2
    if world.is_main:
        print(
            f"{summary['evaluated_on']} top-1: best {summary['best_top1']:.2f}, final {summary['final_top1']:.2f}; "
            f"test top-1 {summary['test_top1']:.2f}; {summary['train_seconds']:.0f} s of training; see {run_dir}"
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(arguments))
    run_dir = options.pop("run_dir", None)
    try:
        config, checkpoint = configure(options)
        if run_dir is None and checkpoint is not None:
            run_dir = run_of(checkpoint)
            if run_dir is None:
                raise ValueError(f"{checkpoint} lies in no run folder: say with --run-dir NEW where to go on")
        elif run_dir is None:
            run_dir = (
                Path("runs") / f"{config.model}_{config.optimizer}_seed{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
            )
        with open_world(config.device) as world:
            return train(config, run_dir, checkpoint, world)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
