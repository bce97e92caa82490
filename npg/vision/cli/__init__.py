"""The commands of the installed package for CIFAR-10; `scripts/` has the same for a clone."""
