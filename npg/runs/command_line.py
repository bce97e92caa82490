"""What the commands share: a parser that names the nearest options, errors of one line, a console that cannot fail."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import io
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from npg import parallel
from npg.runs.presets import check_names

__all__ = ["MISTAKES", "Parser", "again", "command", "restarted", "short_warnings", "steady_console"]

MISTAKES = (ValueError, OSError)
"""What bad input raises before any work: shown as a message, without a traceback."""


def command() -> str:
    """The command line that runs, as a shell takes it."""
    return shlex.join([sys.executable, *sys.argv] if _is_script() else sys.argv)


def again(*arguments: object, command: str | None = None) -> str:
    """A command line that starts this command again, or another one, such as ``"train_agent"``, in the same way.

    This one starts again in as many processes.
    """
    path = Path(sys.argv[0])
    if command is None and (here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        machines = int(os.environ.get("WORLD_SIZE", here)) // here
        where = "--standalone" if machines == 1 else f"--nnodes={machines}"
        words = ["torchrun", where, f"--nproc_per_node={here}", path]
    elif _is_script():
        words = ["python", path.with_name(f"{command}.py") if command else path]
    else:
        words = [f"npg-{command.replace('_', '-')}" if command else path.name.removesuffix(".exe")]
    return shlex.join(map(str, [*words, *arguments]))


def _is_script() -> bool:
    return sys.argv[0].endswith(".py")


def version() -> str:
    """The version of the package, and of what decides most how it runs."""
    try:
        ours = importlib.metadata.version("npg-toolkit")
    except importlib.metadata.PackageNotFoundError:
        ours = "(not installed)"
    return f"npg-toolkit {ours}, PyTorch {torch.__version__}, Python {platform.python_version()}"


def restarted(run_dir: Path | None) -> bool:
    """Whether ``torchrun --max-restarts`` has started this command again, whose run had begun in `run_dir`.

    A run there of other arguments is not it: it was refused at the first start, and is again.
    """
    if run_dir is None or not (run_dir / "config.yaml").is_file() or not parallel.restarted():
        return False
    commands = run_dir / "command.txt"  # a run that was killed before it wrote this begins anew
    text = commands.read_text(encoding="utf-8") if commands.is_file() else ""
    return text.rstrip("\n").endswith(
        " " + shlex.join(sys.argv[1:])
    )  # Python and script may lie elsewhere on another machine


# The console ----------------------------------------------------------------------------------------------------------

#: A reader that is gone: a pipe, on Windows too, and a terminal.
_GONE = (errno.EPIPE, errno.EINVAL, errno.EIO)


class _Console(io.RawIOBase):
    """A stream's bytes, which are dropped from the moment that nobody is there to read them."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw, self._gone = raw, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int | None:
        try:
            return len(data) if self._gone else self._raw.write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._gone = True
            return len(data)


def steady_console() -> None:
    """Let nothing that this process prints end it.

    What the console's encoding lacks is shown as ``?``. When the reader is gone (``| head``, or a terminal that was
    closed), the process goes on and prints to nobody: a training of hours is worth more than its lines. Other errors,
    such as a disk that is full, are raised as ever.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:
            raw: Any = getattr(stream.buffer, "raw", stream.buffer)  # itself where Python does not buffer (-u)
            errors = "replace" if name == "stdout" else stream.errors
            buffer = io.BufferedWriter(_Console(raw))
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, line_buffering=True))


def short_warnings() -> None:
    """Let each warning of this process be one line, "warning: …", on stderr: where it was raised helps no user."""

    def show(message: Warning | str, *others: Any, file: Any = None, **more: Any) -> None:
        text = re.sub(r"\033\[[0-9;]*m", "", str(message))  # Gymnasium colours its own
        print(f"warning: {' '.join(text.split())}", file=file or sys.stderr)

    warnings.showwarning = show


# The parser -----------------------------------------------------------------------------------------------------------


def _whole_number(text: str) -> int:
    for read in (int, float):
        with suppress(ValueError, OverflowError):
            if (value := read(text)) == int(value):
                return int(value)
    raise argparse.ArgumentTypeError(f"must be a whole number, such as 1000 or 1e3; got {text!r}")


def _number(text: str) -> float:
    with suppress(ValueError):
        return float(text)
    raise argparse.ArgumentTypeError(f"must be a number, such as 0.1 or 1e-3; got {text!r}")


class Parser(argparse.ArgumentParser):
    """argparse within 80 columns, with whole option names only; under ``torchrun`` the first process speaks for all.

    Options of ``type=int`` take 1e6 too, and say what they may be, as those of ``type=float`` do.

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
        self.register("type", int, _whole_number)
        self.register("type", float, _number)
        self.add_argument("--version", action="version", version=version(), help="show the versions, and exit")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """`parse_args`, but an unknown option's error names the nearest known ones.

        Args:
            arguments: None for those of this process, whose console is then a `steady_console` with `short_warnings`.
        """
        if arguments is None:
            steady_console()
            short_warnings()
        namespace, unknown = self.parse_known_args(arguments)
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        try:
            check_names("option", options, [o for o in self._option_string_actions if o.startswith("--")])
        except ValueError as error:
            self.error(str(error))
        if unknown:
            hint = ": settings are written --set KEY=VALUE" if "--set" in self._option_string_actions else ""
            self.error(f"unexpected argument {unknown[0]!r}{hint}")
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
        other error, and one with notes, which tell where it came from, keeps its traceback: the notes and `go_on` come
        before it, so that the error itself is the last line.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.exit(130, f"ended at once. {go_on}\n")
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            of_the_system = isinstance(error, OSError) and error.errno is not None
            if not notes and (of_the_system or isinstance(error, stops)):
                self.exit(1, f"{self.prog}: error: {error}. {go_on}\n")
            if os.environ.get("RANK", "0") == "0":  # the others keep them, since they print nothing else
                vars(error).pop("__notes__", None)
            self._print_message("\n".join([*notes, go_on, ""]), sys.stderr)
            raise
