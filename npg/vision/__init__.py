"""Image classification: DenseNet and Wide ResNet, CIFAR-10, and the supervised training loop."""

from npg.vision.checkpoint import load_model
from npg.vision.models import densenet, model_from_name, wide_resnet

__all__ = ["densenet", "load_model", "model_from_name", "wide_resnet"]
