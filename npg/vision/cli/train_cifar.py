"""Train an image classifier on CIFAR-10, alone or under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from npg.checks import number
from npg.parallel import World, open_world
from npg.runs.command_line import MISTAKES, Parser, again, restarted
from npg.runs.folder import begun_only, run_of
from npg.runs.presets import parse_settings, read_yaml
from npg.vision import data
from npg.vision.checkpoint import config_of, find_checkpoint, load_checkpoint
from npg.vision.config import PRESETS, Config, load_config
from npg.vision.models import KNOWN_MODELS, model_from_name
from npg.vision.optimizers import OPTIMIZERS, make_optimizer
from npg.vision.training import Trainer, TrainingStopped

DEFAULT_PRESET = "tuned"
EXAMPLES = f"""\
models:      {", ".join(KNOWN_MODELS[:4])},
             {", ".join(KNOWN_MODELS[4:])},
             and any legal densenet[-basic]-DEPTH[-GROWTH] or wrn-DEPTH-WIDTH
optimizers:  {", ".join(list(OPTIMIZERS)[:7])},
             {", ".join(list(OPTIMIZERS)[7:])}

examples:
  %(prog)s densenet-19 online-ngd --preset report
  %(prog)s wrn-16-4 sgd --lr 0.05 --epochs 20
  %(prog)s wrn-16-1 online-ngd --set rank=40 alpha=2
  %(prog)s --resume runs/RUN
  torchrun --nproc_per_node=4 -m npg.vision.cli.train_cifar wrn-16-10 online-ngd
"""

#: What may differ from the checkpoint when a run goes on.
CHANGEABLE = {"data", "device", "epochs", "keep_checkpoints", "stop_above", "threads"}


def make_parser() -> Parser:
    parser = Parser("%(prog)s MODEL OPTIMIZER [options]", __doc__, EXAMPLES, argument_default=argparse.SUPPRESS)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="such as densenet-19 or wrn-16-4; see below")
    parser.add_argument("optimizer", metavar="OPTIMIZER", nargs="?", help="such as sgd or online-ngd; see below")
    switch: dict[str, Any] = {"action": argparse.BooleanOptionalAction}

    add = parser.add_argument_group("run").add_argument
    presets = f"{' or '.join(PRESETS)}, or a YAML file of your own [{DEFAULT_PRESET}]"
    add("--preset", metavar="NAME", help=presets)
    add("--run-dir", type=Path, metavar="DIR", help="a new folder for all results [runs/…]")
    resume = "go on from a run folder, or from one checkpoint file; with --run-dir in a folder of its own"
    add("--resume", type=Path, metavar="PATH", help=resume)
    add("--epochs", type=int, metavar="N", help="passes over the training images")
    add("--stop-above", type=float, metavar="PERCENT", help="end after the first epoch above this accuracy")
    add("--seed", type=int, metavar="N", help="seed of initial weights, order and augmentation [0]")
    add("--keep-checkpoints", type=int, metavar="N", help="keep the newest N checkpoints; 0 keeps all [3]")

    add = parser.add_argument_group("data").add_argument
    layouts = "CIFAR-10's archive, or images in train/<class>/ and test/<class>/, in a folder or an archive [download]"
    add("--data", metavar="PATH", help=layouts)
    add("--limit-train", type=int, metavar="N", help="train on N images only")
    add("--validation-size", type=int, metavar="N", help="training images held out [5000]")
    test = "test: hold nothing out, and look at the test set after each epoch, as the report did [validation]"
    add("--eval-on", choices=("validation", "test"), help=test)
    add("--augment", **switch, help="random crops and mirror images")

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, metavar="F", help="learning rate, at its highest")
    add("--momentum", type=float, metavar="F", help="momentum, if the optimizer has it")
    add("--weight-decay", type=float, metavar="F", help="weight decay, as the optimizer defines it")
    add("--set", nargs="+", action="extend", metavar="KEY=VALUE", help="any option of the optimizer")
    add("--batch-size", type=int, metavar="N", help="images in a batch, of all processes together")
    add("--schedule", choices=("constant", "step", "cosine"), help="how the learning rate changes")
    milestones = "when --schedule step lowers the learning rate, as fractions of the run"
    add("--milestones", type=float, nargs="*", metavar="F", help=milestones)
    add("--gamma", type=float, metavar="F", help="factor of the learning rate at a milestone of --schedule step")
    add("--warmup", type=float, metavar="F", help="fraction of the run with a growing learning rate")
    add("--label-smoothing", type=float, metavar="F", help="share of the target spread over all classes")
    add("--ema", type=float, metavar="DECAY", help="evaluate an average of the weights, such as 0.999")
    add("--dropout", type=float, metavar="P", help="dropout inside the models' blocks")

    add = parser.add_argument_group("speed").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    add("--threads", type=int, metavar="N", help="threads of PyTorch on the CPU [its own choice]")
    add("--amp", **switch, help="bfloat16 autocast")
    add("--channels-last", **switch, help="NHWC layout")
    add("--compile", **switch, help="torch.compile")
    add("--deterministic", **switch, help="deterministic algorithms only")

    add = parser.add_argument_group("several processes (torchrun)").add_argument
    add("--sync-bn", **switch, help="BatchNorm over all processes (CUDA)")
    add("--average-every", type=int, metavar="K", help="average parameters every K steps, not gradients at each")
    return parser


def configure(options: dict[str, Any]) -> tuple[Config, Path | None]:
    """The run's configuration, and the checkpoint that it goes on from."""
    model, optimizer = options.pop("model", None), options.pop("optimizer", None)
    preset, resume = options.pop("preset", None), options.pop("resume", None)
    if "data" in options and Path(options["data"]).exists():
        options["data"] = str(Path(options["data"]).resolve())  # a run may go on from another folder
    optimizer_options = parse_settings(options.pop("set", []))
    for key in ("lr", "momentum", "weight_decay"):
        if key in options:
            value = options.pop(key)
            number(f"--{key.replace('_', '-')}", value, 0)
            if optimizer_options.setdefault(key, value) != value:
                raise ValueError(
                    f"--{key.replace('_', '-')} is {value}, and --set says {key}={optimizer_options[key]}: keep one of "
                    "the two"
                )
    if resume is None:
        if model is None or optimizer is None:
            raise ValueError("say which MODEL and OPTIMIZER to train, such as densenet-19 sgd; --help lists them")
        return load_config(model, optimizer, preset or DEFAULT_PRESET, options, optimizer_options), None
    if preset is not None:
        raise ValueError("--preset cannot go with --resume: a run keeps what it began with")
    if begun_only(resume):  # it was ended in its first epoch: begin anew
        checkpoint, source = None, resume / "config.yaml"
        saved = Config(**read_yaml(source))
    else:
        checkpoint = source = find_checkpoint(resume)
        saved = config_of(source, load_checkpoint(source))
        if (resume / "config.yaml").is_file():  # what may change was asked for last when the run last began
            asked = read_yaml(resume / "config.yaml")
            saved = dataclasses.replace(saved, **{key: asked[key] for key in CHANGEABLE if key in asked})
    for name, given in (("model", model), ("optimizer", optimizer)):
        if given not in (None, own := getattr(saved, name)):
            raise ValueError(
                f"{source} is of {name} {own}, not of {given}: resume with {saved.model} {saved.optimizer}, or start a "
                "new run"
            )
    config = dataclasses.replace(saved, **options, optimizer_options=saved.optimizer_options | optimizer_options)
    fixed = saved.to_dict()
    for key, new in config.to_dict().items():
        if new != fixed[key] and key not in CHANGEABLE:
            raise ValueError(f"{key} is {fixed[key]} in {source} and cannot become {new} there: start a new run")
    return config, checkpoint


def prepare(config: Config, run_dir: Path | None, checkpoint: Path | None, world: World) -> Trainer:
    if run_dir is None and checkpoint is not None:
        run_dir = run_of(checkpoint)
        if run_dir is None:
            raise ValueError(f"{checkpoint} is not in a run folder: give --run-dir NEW to continue in a new one")
    elif run_dir is None:
        name = f"{config.model}_{config.optimizer}_seed{config.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = Path("runs") / name
    with torch.device("meta"):  # what does not exist or fit is named before anything is downloaded
        unborn = model_from_name(config.model, 10, dropout=config.dropout)
    make_optimizer(config.optimizer, unborn, config.optimizer_options, decay_all=config.decay_all)
    images = world.main_first(lambda: data.load(config.data, progress=sys.stderr.isatty() and world.is_main))
    return Trainer(config, images, run_dir, world, checkpoint=checkpoint)


def train(trainer: Trainer, parser: Parser) -> int:
    folder = trainer.folder
    go_on = folder and f"Whole epochs are kept, and go on with:\n  {again('--resume', folder.path)}"
    with parser.training(go_on or ""):
        try:
            summary = trainer.run()
        except TrainingStopped as error:
            parser.exit(1, f"{parser.prog}: error: {error}\n")
        except ValueError as error:  # an optimizer met what it cannot do
            parser.error(str(error))
    if folder is not None:
        print(
            f"{summary['evaluated_on']} top-1: best {summary['best_top1']:.2f}, final {summary['final_top1']:.2f}; "
            f"test top-1 {summary['test_top1']:.2f}; {summary['train_seconds']:.0f} s of training; see {folder.path}"
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = vars(parser.parse(arguments))
    if restarted(options.get("run_dir")):  # the same command goes on from the last checkpoint
        options = {"resume": options["run_dir"]}
    run_dir, resumed = options.pop("run_dir", None), options.get("resume")
    if run_dir is None and resumed is not None and begun_only(resumed):
        run_dir = resumed
    with ExitStack() as stack:
        with parser.preparing(*MISTAKES):
            config, checkpoint = configure(options)
            world = stack.enter_context(open_world(config.device))
            trainer = prepare(config, run_dir, checkpoint, world)
        return train(trainer, parser)


if __name__ == "__main__":
    sys.exit(main())
