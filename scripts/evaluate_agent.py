"""Evaluate the agent of a run: the command npg-evaluate-agent."""

import sys

from agents.cli.evaluate_agent import main

if __name__ == "__main__":
    sys.exit(main())
