"""What several processes must add up, and nothing else.

Each process holds the same parameters and an equal share of the batch. Then every mean over the batch (a gradient, a
Fisher-vector product, an objective, a KL) is the mean over processes of the local means, and one all-reduce of it makes
all processes go on with the same numbers.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["mean_"]


def mean_(tensor: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Replace ``tensor`` by its mean over the processes of the group; without a group, return it as it is.

    One all-reduce of ``tensor.numel()`` elements; the result is bitwise equal on all ranks.
    """
    if process_group is not None:
        dist.all_reduce(tensor, group=process_group)
        tensor.div_(dist.get_world_size(process_group))
    return tensor
