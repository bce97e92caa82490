"""Image classification: DenseNet and Wide ResNet, CIFAR-10, and the supervised training loop."""

from npg.vision.models import densenet, model_from_name, wide_resnet

__all__ = ["densenet", "model_from_name", "wide_resnet"]
