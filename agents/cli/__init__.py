"""The commands of the installed package for agents; `scripts/` has the same for a clone."""
