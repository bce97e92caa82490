"""How good a classifier is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npg.parallel import World
from npg.vision.loader import Normalization

__all__ = ["evaluate", "hits"]

#: Images that are evaluated at once.
BATCH = 500


@torch.no_grad()
def evaluate(
    model: nn.Module, normalize: Normalization, images: Tensor, labels: Tensor, world: World, *, amp: bool = False
) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent; each process takes every N-th batch and none is padded.

    Args:
        model: a classifier that returns logits, which is left in evaluation mode.
        normalize: of pixels to the model's input.
        images: uint8, (N, 3, H, W).
        labels: int64, (N,).
        world: this process among its peers, all of which evaluate together.
        amp: evaluate in bfloat16 where it is safe.
    """
    model.eval()
    totals = torch.zeros(3, device=images.device, dtype=torch.float64)
    batches = zip(torch.split(images, BATCH), torch.split(labels, BATCH))
    for number, (pixels, targets) in enumerate(batches):
        if number % world.size == world.rank:
            with torch.autocast(world.device.type, torch.bfloat16, enabled=amp):
                logits = model(normalize(pixels))
            totals[0] += F.cross_entropy(logits.double(), targets, reduction="sum")
            totals[1:] += hits(logits, targets)
    loss, top1, top5 = (world.sum_(totals) / len(labels)).tolist()
    return loss, 100.0 * top1, 100.0 * top5


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets are the largest, and among the five largest, of their logits, (2,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack((ranked[:, 0].sum(), ranked.sum())).double()
