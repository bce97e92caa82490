"""What the scripts share: a parser that names the nearest options, and errors of one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from gymnasium.error import Error as GymnasiumError

from agents.config import check_names

__all__ = ["MISTAKES", "Parser"]

MISTAKES = (ValueError, TypeError, NotImplementedError, AssertionError, ImportError, OSError, GymnasiumError)
"""What bad input raises before any work: shown as a message, without a traceback."""


class Parser(argparse.ArgumentParser):
    """argparse within 80 columns, with whole option names only; under ``torchrun`` the first process speaks for all."""

    def __init__(self, usage: str, description: str, epilog: str | None = None) -> None:
        def layout(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=80)

        super().__init__(
            usage=usage, description=description, epilog=epilog, formatter_class=layout, allow_abbrev=False
        )

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """`parse_args`, but an unknown option's error names the nearest known ones."""
        namespace, unknown = self.parse_known_args(arguments)
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        try:
            check_names("option", options, [o for o in self._option_string_actions if o.startswith("--")])
        except ValueError as error:
            self.error(str(error))
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return namespace

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one message."""
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message}\n")
