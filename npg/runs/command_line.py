"""What the scripts share: a parser that names the nearest options, and errors of one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from npg.runs.presets import check_names

__all__ = ["MISTAKES", "Parser", "command", "restarted"]

MISTAKES = (ValueError, OSError)
"""What bad input raises before any work: shown as a message, without a traceback."""


def command() -> str:
    """The command line that runs, as a shell takes it."""
    return shlex.join([sys.executable, *sys.argv])


def restarted(run_dir: Path | None) -> bool:
    """Whether ``torchrun --max-restarts`` has started this command again, whose run had begun in `run_dir`."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return again and run_dir is not None and (run_dir / "config.yaml").is_file()


class Parser(argparse.ArgumentParser):
    """argparse within 80 columns, with whole option names only; under ``torchrun`` the first process speaks for all.

    Args:
        usage: without the word "usage".
        description: what the script does.
        epilog: examples.
        others: of `argparse.ArgumentParser`.
    """

    def __init__(self, usage: str, description: str | None, epilog: str | None = None, **others: Any) -> None:
        def layout(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=80)

        super().__init__(
            usage=usage, description=description, epilog=epilog, formatter_class=layout, allow_abbrev=False, **others
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

    def options_of(self, namespace: argparse.Namespace, without: Iterable[str] = ()) -> list[str]:
        """The options of a namespace that are not at their defaults, as a command line takes them.

        Args:
            namespace: what `parse` returned.
            without: names that are left out.
        """
        options = []
        for action in self._actions:
            value = getattr(namespace, action.dest, action.default)
            if not action.option_strings or action.dest in without or value == action.default:
                continue
            name = action.option_strings[-1]
            if action.nargs == 0:
                options.append(name)
            else:
                options += [f"{name}={one}" for one in (value if isinstance(value, list) else [value])]
        return options

    def _print_message(self, message: str, file: Any = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one message."""
        message = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def preparing(self, *mistakes: type[Exception]) -> Iterator[None]:
        """What bad input raises in this block, `mistakes`, ends the script with one message and status 2.

        Ctrl-C has status 130.
        """
        try:
            yield
        except mistakes as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, "ended before it began.\n")

    @contextmanager
    def training(self, go_on: str, *stops: type[Exception]) -> Iterator[None]:
        """What ends a training in this block ends the script with one message, and `go_on`, which says how to continue.

        Errors of the system, such as a disk that is full, and `stops` have status 1; a second Ctrl-C has 130. Any
        other error, such as one of the environment, keeps its traceback, with `go_on` before it.
        """
        ends: tuple[type[Exception], ...] = (OSError, *stops)
        try:
            yield
        except ends as error:
            if isinstance(error, OSError) and error.errno is None:  # not of the system
                self._print_message(f"{go_on}\n", sys.stderr)
                raise
            self.exit(1, f"{self.prog}: error: {error}. {go_on}\n")
        except KeyboardInterrupt:
            self.exit(130, f"ended at once. {go_on}\n")
        except Exception:
            self._print_message(f"{go_on}\n", sys.stderr)
            raise
