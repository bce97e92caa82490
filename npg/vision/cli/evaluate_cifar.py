"""Evaluate the model of a run on the test set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from npg.parallel import open_world
from npg.runs.command_line import MISTAKES, Parser
from npg.vision import data
from npg.vision.checkpoint import check_classes, find_checkpoint, load_checkpoint, model_in
from npg.vision.evaluation import evaluate
from npg.vision.loader import Normalization


def make_parser() -> Parser:
    parser = Parser("%(prog)s RUN [options]", __doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, whose newest checkpoint is evaluated, or a checkpoint")
    add("--data", metavar="PATH", help="the data, as for training [the run's]")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse(arguments)
    with parser.preparing(*MISTAKES):
        found = find_checkpoint(options.run)
        state = load_checkpoint(found)
        model, config = model_in(found, state)
        images = data.load(options.data or config.data, progress=sys.stderr.isatty())
        classes: int = model.classifier.out_features  # type: ignore[union-attr, assignment]
        if classes != len(images.classes):
            raise ValueError(f"the model has {classes} classes, and the images have {len(images.classes)}")
        check_classes(state, images.classes)
        with open_world(options.device) as world:
            layout = torch.channels_last if config.channels_last else torch.contiguous_format  # as in the run
            normalize = Normalization(config.mean, config.std, world.device, memory_format=layout)
            test, labels = (torch.from_numpy(p).to(world.device) for p in (images.test_images, images.test_labels))
            model = model.to(world.device).to(memory_format=layout)  # type: ignore[call-overload]
            loss, top1, top5 = evaluate(model, normalize, test, labels, world, amp=config.amp)
    if world.is_main:
        print(
            f"{config.model} trained by {config.optimizer}, seed {config.seed}: {options.run}\n"
            f"test images {len(images.test_labels):,}  loss {loss:.4f}  top-1 {top1:.2f}  top-5 {top5:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
