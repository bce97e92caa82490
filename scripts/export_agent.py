"""Write the policy of a run to one file: the command npg-export-agent."""

import sys

from agents.cli.export_agent import main

if __name__ == "__main__":
    sys.exit(main())
