"""Evaluate the model of a run on CIFAR-10's test set: the command npg-evaluate-cifar."""

import sys

from npg.vision.cli.evaluate_cifar import main

if __name__ == "__main__":
    sys.exit(main())
