"""Natural policy gradient algorithms with the life cycle of Stable-Baselines3."""

from agents.cpo import CPO
from agents.mdpo import MDPO
from agents.npg import NPG
from agents.trpo import TRPO

__all__ = ["CPO", "MDPO", "NPG", "TRPO"]
