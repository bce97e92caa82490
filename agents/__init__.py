"""Natural policy gradient algorithms with the life cycle of Stable-Baselines3."""

from agents.npg import NPG
from agents.trpo import TRPO

__all__ = ["NPG", "TRPO"]
