"""Train an agent: the command npg-train-agent."""

import sys

from agents.cli.train_agent import main

if __name__ == "__main__":
    sys.exit(main())
