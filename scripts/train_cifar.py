"""Train an image classifier on CIFAR-10: the command npg-train-cifar."""

import sys

from npg.vision.cli.train_cifar import main

if __name__ == "__main__":
    sys.exit(main())
