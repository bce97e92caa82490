"""Batches made where they are used: the images stay on the device as uint8, and are augmented there.

All that is random in an epoch (order, crops, flips) is drawn at its beginning from one generator, which every
rank holds alike. So N ranks that take 1/N of each batch see what one rank sees that takes the whole batch,
and the generator's state is all that an exact resume needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Normalization", "TrainLoader", "split_validation"]

#: Pixels of black border around a training image, out of which the crop is taken.
PADDING = 4


class Normalization:
    """uint8 pixels to (x / 255 − mean) / std, per channel.

    Args:
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        device: where the batches are.
        dtype: what the model computes in.
        memory_format: the layout of the result.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        shape = (1, len(std), 1, 1)
        means, deviations = torch.tensor([mean, std], dtype=torch.float64, device="cpu")
        scale, shift = 1.0 / (255.0 * deviations), -means / deviations
        self.scale = scale.reshape(shape).to(device, dtype)
        self.shift = shift.reshape(shape).to(device, dtype)
        self.memory_format = memory_format

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to the model's input of the same shape.

        Raises:
            ValueError: the pixels are not uint8.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8, from 0 to 255; got {pixels.dtype}. Scale and round them first")
        values = pixels.to(self.scale.dtype, memory_format=self.memory_format)
        return values.mul_(self.scale).add_(self.shift)


class TrainLoader:
    """Shuffled, randomly cropped and flipped batches of this rank's shard.

    An epoch has ⌊N / batch_size⌋ steps; the few images left over are back in the next. Rank r takes the
    r-th part of each batch.

    Args:
        images: uint8, (N, 3, H, W).
        labels: int64, (N,).
        batch_size: of all ranks together.
        normalize: from pixels to the model's input; its device is where the images are kept.
        seed: of the loader's own generator; the same on all ranks.
        augment: crop at random out of the image in a black border of 4 pixels, and mirror half of the images.
        rank: this process's number.
        world_size: the number of processes.

    Attributes:
        generator: all randomness; its state before an epoch determines that epoch and all that follow.

    Raises:
        ValueError: the images are not uint8, or the batch is larger than the set or not a multiple of the number of
            ranks.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        batch_size: int,
        normalize: Normalization,
        *,
        seed: int,
        augment: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if images.dtype != np.uint8:
            raise ValueError(f"images must be uint8, from 0 to 255; got {images.dtype}. Scale and round them first")
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size must be between 1 and the {len(images)} training images; got {batch_size}")
        if batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {world_size}; got {batch_size}"
            )
        device = normalize.scale.device
        self.normalize = normalize
        self.augment = augment
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.labels = torch.from_numpy(labels).to(device)
        shard = batch_size // world_size
        self.rows = slice(rank * shard, (rank + 1) * shard)
        height, width = images.shape[2:]
        pad = PADDING if augment else 0
        padded = torch.zeros(*images.shape[:2], height + 2 * pad, width + 2 * pad, dtype=torch.uint8, device=device)
        padded[:, :, pad : pad + height, pad : pad + width] = torch.from_numpy(images).to(device)
        self.padded = padded.flatten(2)
        self.width = width + 2 * pad
        self.choices = 2 * pad + 1
        self.crop_rows = torch.arange(height, device=device)
        self.crop_columns = torch.arange(width, device=device)

    def __len__(self) -> int:
        """The number of steps in an epoch."""
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of (inputs, labels) of this rank."""
        n = len(self) * self.batch_size
        order = torch.randperm(len(self.labels), generator=self.generator, device="cpu")[:n]
        offsets = torch.randint(self.choices, (2, n), generator=self.generator, device="cpu")
        mirror = torch.randint(2, (n,), generator=self.generator, device="cpu")
        drawn = torch.stack((order, *offsets, mirror)).reshape(4, len(self), self.batch_size)
        for index, top, left, mirrored in drawn[:, :, self.rows].to(self.labels.device).unbind(1):
            pixels = self._crop(index, top, left, mirrored.bool() if self.augment else None)
            yield self.normalize(pixels), self.labels[index]

    def _crop(self, index: Tensor, top: Tensor, left: Tensor, mirrored: Tensor | None) -> Tensor:
        """The crops at (top, left), (B, 3, H, W): one gather, in which a mirrored row is read backwards."""
        columns = self.crop_columns.expand(len(index), -1)
        if mirrored is not None:
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        rows = top[:, None] + self.crop_rows
        places = rows[:, :, None] * self.width + (left[:, None] + columns)[:, None, :]
        places = places.flatten(1)[:, None].expand(-1, self.padded.shape[1], -1)
        return self.padded[index].gather(2, places).reshape(*places.shape[:2], len(self.crop_rows), -1)


def split_validation(n: int, validation_size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Indices (training, validation): a random split of n images, the same in every run.

    The training indices are in random order too, so that their first k are a fair sample of k images.

    Raises:
        ValueError: the validation part would be empty or leave nothing to train on.
    """
    if not 0 < validation_size < n:
        raise ValueError(
            f"validation_size must be between 1 and {n - 1}, for {n} training images; got {validation_size}"
        )
    order = np.random.default_rng(0).permutation(n)
    return order[validation_size:], np.sort(order[:validation_size])
