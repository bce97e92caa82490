"""Search for better settings of an algorithm: the command npg-tune-agent."""

import sys

from agents.cli.tune_agent import main

if __name__ == "__main__":
    sys.exit(main())
