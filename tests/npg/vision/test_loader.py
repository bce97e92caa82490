import numpy as np
import pytest
import torch

from npg.vision.loader import PADDING, Normalization, TrainLoader, split_validation

CPU = torch.device("cpu")
AS_IT_IS = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255), CPU, torch.float64)


def sample(n: int = 21, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(1, 256, (n, 3, size, size), dtype=np.uint8), np.arange(n)


def test_normalization_is_the_textbook_s() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = torch.from_numpy(sample()[0])
    m, s = (torch.tensor(x, dtype=torch.float64).reshape(1, 3, 1, 1) for x in (mean, std))
    got = Normalization(mean, std, CPU, torch.float64, torch.channels_last)(pixels)
    torch.testing.assert_close(got, (pixels.double() / 255 - m) / s, rtol=1e-12, atol=1e-12)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_every_batch_is_a_crop_of_the_padded_image_or_its_mirror() -> None:
    images, labels = sample(8, size=6)
    loader = TrainLoader(images, labels, 8, AS_IT_IS, seed=0)
    padded = np.pad(images, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    seen = set()
    for _ in range(60):
        for inputs, targets in loader:
            for pixels, target in zip(inputs.numpy(), targets.tolist()):
                found = [
                    (top, left, flip)
                    for top in range(2 * PADDING + 1)
                    for left in range(2 * PADDING + 1)
                    for flip in (1, -1)
                    if np.allclose(pixels, padded[target, :, top : top + 6, left : left + 6][:, :, ::flip])
                ]
                assert len(found) == 1
                seen.add(found[0])
    assert len(seen) > 140  # out of 9 · 9 · 2 = 162 in 480 draws
    assert {top for top, _, _ in seen} == set(range(9))
    assert {left for _, left, _ in seen} == set(range(9))


def test_without_augmentation_an_epoch_is_a_permutation() -> None:
    images, labels = sample(24)
    loader = TrainLoader(images, labels, 6, AS_IT_IS, seed=0, augment=False)
    inputs, targets = (torch.cat(parts) for parts in zip(*loader))
    assert sorted(targets.tolist()) == list(range(24))
    assert targets.tolist() != list(range(24))
    np.testing.assert_allclose(inputs.numpy(), images[targets.numpy()], atol=1e-12)


def test_an_epoch_drops_what_does_not_fill_a_batch() -> None:
    images, labels = sample(21)
    loader = TrainLoader(images, labels, 6, AS_IT_IS, seed=0)
    assert [len(targets) for _, targets in loader] == [6, 6, 6]
    assert len(loader) == 3
    assert len({int(t) for _ in range(5) for _, targets in loader for t in targets}) == 21


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_rank_sees(world_size: int) -> None:
    images, labels = sample(20)
    alone = TrainLoader(images, labels, 6, AS_IT_IS, seed=3)
    ranks = [TrainLoader(images, labels, 6, AS_IT_IS, seed=3, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(2):
        for whole, *parts in zip(alone, *ranks, strict=True):
            assert torch.equal(whole[0], torch.cat([inputs for inputs, _ in parts]))
            assert torch.equal(whole[1], torch.cat([targets for _, targets in parts]))


def test_the_generator_s_state_is_all_that_a_resume_needs() -> None:
    images, labels = sample()
    first = TrainLoader(images, labels, 5, AS_IT_IS, seed=0)
    list(first)
    second = TrainLoader(images, labels, 5, AS_IT_IS, seed=99)
    second.generator.set_state(first.generator.get_state())
    for (a, b), (c, d) in zip(first, second, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("batch_size", [0, 22])
def test_a_batch_that_cannot_be_filled(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be between 1 and the 21 training images; got {batch_size}"):
        TrainLoader(*sample(), batch_size, AS_IT_IS, seed=0)


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the number of processes, 4; got 6"):
        TrainLoader(*sample(), 6, AS_IT_IS, seed=0, rank=0, world_size=4)


def test_split_is_fixed_and_complete() -> None:
    train, held_out = split_validation(1000, 100)
    assert sorted([*train, *held_out]) == list(range(1000))
    assert len(held_out) == 100
    assert np.array_equal(held_out, split_validation(1000, 100)[1])
    assert not np.array_equal(train, np.sort(train))


@pytest.mark.parametrize("size", [0, 10])
def test_a_split_that_leaves_nothing(size: int) -> None:
    with pytest.raises(ValueError, match=f"validation_size must be between 1 and 9, .* got {size}"):
        split_validation(10, size)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int64])
def test_pixels_of_another_type_are_refused(dtype: type) -> None:
    images = np.ones((4, 3, 2, 2), dtype)  # floats in [0, 1] would be rounded to 0 and 1
    with pytest.raises(ValueError, match=f"images must be uint8, from 0 to 255; got {np.dtype(dtype)}"):
        TrainLoader(images, np.zeros(4, np.int64), 2, AS_IT_IS, seed=0)
    with pytest.raises(ValueError, match=r"pixels must be uint8, from 0 to 255; got torch\.float32"):
        AS_IT_IS(torch.rand(1, 3, 2, 2))
