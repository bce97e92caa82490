"""Evaluate the model of a run of train_cifar.py on the test set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from npg.parallel import open_world
from npg.vision import data, load_model
from npg.vision.loader import Normalization
from npg.vision.training import EVALUATION_BATCH, hits


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, whose newest checkpoint is evaluated, or a checkpoint")
    add("--data", metavar="PATH", help="as of train_cifar.py [the run's]")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, … [cuda where there is one]")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        model, config = load_model(options.run)
        images = data.load(options.data or config.data, progress=sys.stderr.isatty())
        classes = model.classifier.out_features
        if classes != len(images.classes):
            raise ValueError(f"the model has {classes} classes, and the images have {len(images.classes)}")
        with open_world(options.device) as world:
            device = world.device
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model.to(device)
    normalize = Normalization(config.mean, config.std, device, torch.float32, torch.contiguous_format)
    logits = torch.cat(
        [model(normalize(x.to(device))) for x in torch.from_numpy(images.test_images).split(EVALUATION_BATCH)]
    )
    labels = torch.from_numpy(images.test_labels).to(device)
    loss = F.cross_entropy(logits.double(), labels)
    top1, top5 = (100 * hits(logits, labels) / len(labels)).tolist()
    print(
        f"{config.model} trained by {config.optimizer}, seed {config.seed}: {options.run}\n"
        f"test images {len(labels):,}  loss {float(loss):.4f}  top-1 {top1:.2f}  top-5 {top5:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
