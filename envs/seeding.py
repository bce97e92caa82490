"""Seeds from which no two environments, runs or purposes draw the same random numbers.

To seed environment i with seed + i, as Gymnasium and Stable-Baselines3 do, gives runs with the seeds 0 and 1 the same
environments but one each. Here the seed of an environment is a hash of the run's seed and of i.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, cast

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

__all__ = [
    "RUN_SEEDS",
    "IndependentSeeds",
    "Purpose",
    "environment_seeds",
    "independently_seeded",
    "purpose_seed",
    "stream_seed",
]

RUN_SEEDS = 2**28
"""The seeds of runs lie below it, those of a run's other purposes above."""


class Purpose(IntEnum):
    """What a run uses environments for, beside the beginning of its training."""

    EVALUATION = 1
    FINAL_EVALUATION = 2
    EVALUATION_BY_HAND = 3
    RESUMED_TRAINING = 4
    """The last, because the number of steps is added to it."""


def purpose_seed(seed: int, purpose: Purpose, timesteps: int = 0) -> int:
    """The seed of a purpose of the run with `seed`: seed + 2²⁸ (purpose + timesteps), of which no two are equal.

    Args:
        seed: of the run.
        purpose: what the environments are for.
        timesteps: for RESUMED_TRAINING, the steps trained before.

    Raises:
        ValueError: if the seed is negative, or 2²⁸ or larger.
    """
    if not 0 <= seed < RUN_SEEDS:
        raise ValueError(f"seed={seed} must be at least 0 and less than 2**28")
    return seed + RUN_SEEDS * (purpose + timesteps)


def environment_seeds(seed: int, n: int, first: int = 0) -> list[int]:
    """The seeds of the environments first, …, first + n − 1 of a run: of each a hash of the run's seed and its index.

    They have 31 bits, which is what EnvPool takes. Among N of them two are equal with a probability of about N² / 2³²:
    then two environments begin alike, not two runs. With run seeds below 128 and 64 environments all are distinct,
    over all purposes.
    """
    return [
        int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1)[0] >> 1)
        for index in range(first, first + n)
    ]


def stream_seed(seed: int, index: int) -> int:
    """The seed, of 63 bits, of a part of what a run draws beside its own stream: of each a hash of both, as above.

    With seed + index, the run with the next seed would draw in one part what this one draws in the next.
    """
    key = (0, index)  # that of an environment is a single number
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)


class IndependentSeeds(VecEnv):
    """A VecEnv whose `seed` gives the environments `environment_seeds`, in the place of seed, seed + 1, …."""

    def seed(self, seed: int | None = None, first: int = 0) -> list[Any]:
        """Seed every environment, from the next reset on.

        Args:
            seed: of the run; None takes one from NumPy's global generator, as Stable-Baselines3 does.
            first: the index of the first environment here, among those of several processes.

        Returns:
            One seed per environment.
        """
        if seed is None:
            (seed, *_) = super().seed()
        seeds: list[Any] = environment_seeds(cast(int, seed), self.num_envs, first)
        self._seeds = seeds
        return seeds


@cache
def independently_seeded(cls: type[VecEnv]) -> type[VecEnv]:
    """A class of VecEnvs with the seeds of `IndependentSeeds`."""
    if issubclass(cls, IndependentSeeds):
        return cls
    return type(cls.__name__, (IndependentSeeds, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
