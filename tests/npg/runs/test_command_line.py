import errno
import shlex
import sys
import traceback
import warnings
from pathlib import Path

import pytest

from npg.runs.command_line import Parser, again, command, restarted


@pytest.fixture
def parser() -> Parser:
    parser = Parser("train MODEL [options]", "Train.", "examples:\n  train it --timesteps 3 " + "x" * 30)
    parser.add_argument("model")
    parser.add_argument("--timesteps", type=int, help="how many steps of a kind that needs a long explanation " * 3)
    parser.add_argument_group("more").add_argument("--rate", type=float)
    return parser


def test_options_are_parsed_in_any_order(parser: Parser) -> None:
    args = parser.parse(["--timesteps", "3", "a"])
    assert (args.model, args.timesteps) == ("a", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--timestep", "3"], "unknown option '--timestep': did you mean --timesteps"),
        (["a", "--timestep=3"], "unknown option '--timestep': did you mean --timesteps"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--timesteps", "x"], "argument --timesteps: must be a whole number, such as 1000 or 1e3; got 'x'"),
        (["a", "--timesteps", "1.5"], "must be a whole number, such as 1000 or 1e3; got '1.5'"),
        (["a", "--timesteps", "nan"], "must be a whole number, such as 1000 or 1e3; got 'nan'"),
        (["a", "--rate", "x"], "argument --rate: must be a number, such as 0.1 or 1e-3; got 'x'"),
        ([], "the following arguments are required: model"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parser.parse(arguments)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{parser.prog}: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_numbers_are_read_as_people_write_them(parser: Parser) -> None:
    args = parser.parse(["a", "--timesteps", "1e3", "--rate", "1e-3"])
    assert (args.timesteps, type(args.timesteps), args.rate) == (1000, int, 0.001)
    assert parser.parse(["a", "--timesteps", "9007199254740993"]).timesteps == 2**53 + 1


def test_warnings_of_a_command_are_one_line_each(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["npg-train-agent", "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        parser.parse(["a"])  # a caller's own arguments: nothing of its process changes
        before = warnings.showwarning
        assert parser.parse(None).model == "a"
        assert warnings.showwarning is not before
        warnings.warn("one\n  two", stacklevel=1)
        warnings.warn("\033[33mWARN: three\033[0m", RuntimeWarning, stacklevel=1)
    assert warnings.showwarning is before
    assert capsys.readouterr().err == "warning: one two\nwarning: WARN: three\n"


def test_options_are_written_as_they_were_read() -> None:
    parser = Parser("x", "X.")
    add = parser.add_argument
    add("what", nargs="?")
    add("--set", action="append", default=[])
    add("--steps", type=int)
    add("--quiet", action="store_true")
    add("--run-dir", type=Path)
    given = ["it", "--set", "a=-1", "--steps", "0", "--set=b=[1, 2]", "--quiet", "--run-dir", "a b"]
    args = parser.parse(given)
    options = parser.options_of(args)
    assert options == ["--set=a=-1", "--set=b=[1, 2]", "--steps=0", "--quiet", "--run-dir=a b"]
    assert parser.parse(["it", *options]) == args
    assert parser.options_of(args, ("set", "quiet")) == ["--steps=0", "--run-dir=a b"]
    assert parser.options_of(parser.parse([])) == []


def test_one_process_speaks_for_all(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        parser.error("no")
    assert end.value.code == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        parser.error("several\n  lines")
    assert capsys.readouterr().err == f"{parser.prog}: error: several lines\n"


def test_help_fits_80_columns(
    parser: Parser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        parser.parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "examples:\n  train it" in text


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device. Go on."),
        (FloatingPointError("loss is nan"), 1, "loss is nan. Go on."),
        (KeyboardInterrupt(), 130, "ended at once. Go on."),
    ],
)
def test_what_ends_a_training_says_how_to_go_on(
    error: BaseException, status: int, message: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, parser.training("Go on.", FloatingPointError):
        raise error
    assert end.value.code == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("of an environment"), FloatingPointError(), RuntimeError()])
def test_other_errors_keep_their_traceback(error: Exception, parser: Parser) -> None:
    with pytest.raises(type(error)), parser.training("Go on."):
        raise error


def test_the_command_is_what_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--set", "a=[1, 2]"])
    assert shlex.split(command()) == [sys.executable, "train.py", "--set", "a=[1, 2]"]


@pytest.mark.parametrize(
    ("here", "all_", "started"),
    [
        ("1", "1", "python"),
        ("2", "2", "torchrun --standalone --nproc_per_node=2"),
        ("2", "6", "torchrun --nnodes=3 --nproc_per_node=2"),
    ],
)
def test_a_run_goes_on_in_as_many_processes(
    here: str, all_: str, started: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", all_)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "trpo"])
    assert again("--resume", "my run") == f"{started} scripts/train.py --resume 'my run'"
    assert again("run", command="evaluate_agent") == "python scripts/evaluate_agent.py run"


def test_only_a_run_of_the_same_arguments_is_taken_for_a_restarted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, others = "python /there/train.py trpo 'My Env'\n", "python /there/train.py mdpo 'My Env'\n"
    yes: list[bool] = [True]
    monkeypatch.setattr("npg.parallel.restarted", lambda: yes[0])
    monkeypatch.setattr(sys, "argv", ["/here/train.py", "trpo", "My Env"])
    assert not restarted(None)
    assert not restarted(tmp_path)
    (tmp_path / "config.yaml").touch()
    assert not restarted(tmp_path)  # killed before it wrote its command
    (tmp_path / "command.txt").write_text(others + ours)
    assert restarted(tmp_path)
    yes[0] = False
    assert not restarted(tmp_path)
    yes[0] = True
    (tmp_path / "command.txt").write_text(ours + others)
    assert not restarted(tmp_path)
    (tmp_path / "command.txt").write_text("")
    assert not restarted(tmp_path)


def test_bad_input_and_ctrl_c_before_the_work(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    for error, status, message in ((ValueError("no"), 2, "error: no"), (KeyboardInterrupt(), 130, "ended before it")):
        with pytest.raises(SystemExit) as end, parser.preparing(ValueError):
            raise error
        assert end.value.code == status
        assert message in capsys.readouterr().err
    with pytest.raises(KeyError), parser.preparing(ValueError):
        raise KeyError("a fault of ours")


def test_an_error_of_another_kind_keeps_its_traceback_and_says_how_to_go_on(
    parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError), parser.training("Go on so."):
        raise ZeroDivisionError
    assert capsys.readouterr().err == "Go on so.\n"


@pytest.mark.parametrize("error", [LookupError("it broke"), FileNotFoundError(2, "it broke"), FloatingPointError()])
def test_notes_come_before_the_traceback_whose_last_line_is_the_error(
    error: Exception, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    error.add_note("in step 3 of My-v0")
    with pytest.raises(type(error)) as caught, parser.training("Go on so.", FloatingPointError):
        raise error
    assert capsys.readouterr().err == "in step 3 of My-v0\nGo on so.\n"
    assert traceback.format_exception(caught.value)[-1].startswith(type(error).__name__)
