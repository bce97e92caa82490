"""Jobs with real processes: how each ends is told, and what happens to one changes nothing for the others."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from npg.runs import jobs as module
from npg.runs.jobs import End, Job, run_jobs, threads_for


def job(name: str, code: str, folder: Path) -> Job:
    return Job(name, lambda: [sys.executable, "-c", textwrap.dedent(code)], folder / f"{name}.log")


def outcome(end: End) -> tuple[str, str]:
    return end.status, end.reason


def test_each_job_ends_in_its_own_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    jobs = [
        job("good", "print('fine')", tmp_path),
        job("bad", "print('first'); raise ValueError('the pole broke')", tmp_path),
        job("silent", "raise SystemExit(3)", tmp_path),
        job("lost", "import os; os.kill(os.getpid(), 9)", tmp_path),
        job("last", "print('fine too')", tmp_path),
    ]
    seen: list[str] = []
    ends = run_jobs(jobs, 2, ended=lambda job, end: seen.append(job.name) or "noted")
    assert list(ends) == jobs
    assert [outcome(end) for end in ends.values()] == [
        ("done", ""),
        ("failed", "ValueError: the pole broke"),
        ("failed", "exit status 3"),
        ("killed", "by SIGKILL"),
        ("done", ""),
    ]
    assert sorted(seen) == sorted(j.name for j in jobs)
    assert (tmp_path / "last.log").read_text() == "fine too\n"
    lines = capfd.readouterr().err.splitlines()
    assert "bad failed, ValueError: the pole broke, noted (" in "\n".join(lines)
    assert lines[-1].endswith("(5 of 5)")


def test_a_reason_is_of_the_present_process(tmp_path: Path) -> None:
    silent = job("x", "raise SystemExit(1)", tmp_path)
    silent.log.write_text("an older error\n")
    assert outcome(run_jobs([silent], 1)[silent]) == ("failed", "exit status 1")
    assert silent.log.read_text() == "an older error\n"


def test_no_more_than_so_many_run_at_a_time(tmp_path: Path) -> None:
    code = """
        import os, sys, time
        mark = os.environ["MARKS"] + "/" + str(os.getpid())
        open(mark, "w").close()
        print(len(os.listdir(os.environ["MARKS"])))
        time.sleep(0.3)
        os.remove(mark)
    """
    (tmp_path / "marks").mkdir()
    jobs = [job(str(i), code, tmp_path) for i in range(5)]
    ends = run_jobs(jobs, 2, environment={"MARKS": str(tmp_path / "marks")})
    assert {end.status for end in ends.values()} == {"done"}
    assert max(int(j.log.read_text()) for j in jobs) == 2


def test_a_job_whose_log_a_process_holds_is_not_started(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    second, called = job("second", "", tmp_path), []
    first = Job("first", lambda: called.append(1), tmp_path / "first.log")
    with first.log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ends = run_jobs([first, second], 1)
    assert [end.status for end in ends.values()] == ["running elsewhere", "done"]
    assert called == []
    assert run_jobs([first], 1)[first].status == "done before"
    assert called == [1]


PARENT = """
import sys
from pathlib import Path
from npg.runs.jobs import Job, run_jobs

folder = Path(sys.argv[1])
child = '''
import os, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
Path(sys.argv[1]).touch()
while len(told) < int(sys.argv[2]):
    time.sleep(0.02)
Path(sys.argv[1]).write_text(str(len(told)))
sys.exit(130)
'''
def command(i):
    return lambda: [sys.executable, "-c", child, str(folder / f"j{i}.mark"), sys.argv[2]]

jobs = [Job(f"j{i}", command(i), folder / f"j{i}.log") for i in range(3)]
ends = run_jobs(jobs, 2)
print([end.status for end in ends.values()])
"""


def appear(*paths: Path) -> None:
    for _ in range(1500):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.02)
    raise AssertionError(f"{paths} did not appear")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_stops_all_that_run_and_starts_no_more(number: signal.Signals, times: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(times)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    appear(tmp_path / "j0.mark", tmp_path / "j1.mark")
    parent.send_signal(number)
    for line in iter(parent.stderr.readline, ""):  # type: ignore[union-attr]
        if line.startswith("stopping"):
            break
    if times == 2:
        time.sleep(0.3)
        parent.send_signal(number)
    out, err = parent.communicate(timeout=60)
    assert out.strip() == "['stopped', 'stopped', 'waiting']", err
    assert [(tmp_path / f"j{i}.mark").read_text() for i in range(2)] == [str(times)] * 2
    assert not (tmp_path / "j2.mark").exists()


def test_an_error_here_leaves_no_process_behind(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    jobs = [job("quick", "import time; time.sleep(1)", tmp_path), job("slow", code, tmp_path)]

    def ended(job: Job, end: End) -> str:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        run_jobs(jobs, 2, ended=ended)
    with pytest.raises(ProcessLookupError):
        os.kill(int(jobs[1].log.read_text()), 0)


def test_a_job_that_cannot_start_or_be_looked_at_changes_nothing_for_the_others(tmp_path: Path) -> None:
    def wrong() -> list[str]:
        raise ValueError("config.yaml is no YAML")

    def half_written() -> str:
        raise KeyError("timesteps")

    slow = "import time; time.sleep(1); print('fin')"
    jobs = [
        job("good", slow, tmp_path),
        Job("missing", lambda: ["/no/such/command"], tmp_path / "missing.log"),
        Job("wrong", wrong, tmp_path / "wrong.log"),
        Job("nowhere", lambda: ["true"], tmp_path / "nowhere" / "x.log"),
        Job("unseen", lambda: [sys.executable, "-c", slow], tmp_path / "unseen.log", half_written),
    ]
    ends = [outcome(end) for end in run_jobs(jobs, 2).values()]
    assert ends[0] == ends[4] == ("done", "")
    assert {status for status, _ in ends[1:4]} == {"failed"}
    assert "/no/such/command" in ends[1][1]
    assert ends[2][1] == "ValueError: config.yaml is no YAML"
    assert ends[3][1].startswith("FileNotFoundError: ")
    assert jobs[0].log.read_text() == jobs[4].log.read_text() == "fin\n"


SHELL = """
import sys
from pathlib import Path
from npg.runs.jobs import Job, run_jobs

folder = Path(sys.argv[1])
command = ["bash", "-c", f"sleep 60 & echo $! > {folder}/pid; mv {folder}/pid {folder}/mark; wait; true"]
print([end.status for end in run_jobs([Job("shell", lambda: command, folder / "log")], 1).values()])
"""


@pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.slow
def test_what_a_shell_leaves_behind_is_stopped_too(times: int, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SHELL, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    appear(tmp_path / "mark")
    for _ in range(times):
        parent.send_signal(signal.SIGTERM)
    out, _ = parent.communicate(timeout=60)
    assert out.strip() == "['stopped']"
    child = int((tmp_path / "mark").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break  # it has ended, and nobody has asked how
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        raise AssertionError("sleep lives on")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_lines_of_a_terminal_are_drawn_over_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "get_terminal_size", lambda: os.terminal_size((20, 10)))
    stream = Terminal()
    display = module._Display(True, stream)
    display.draw(["a" * 30, "b"], 0, 3)
    display.draw(["a" * 30, "b"], 0, 3)  # the same is not drawn twice
    display.say("c done")
    display.draw(["b"], 1, 3)
    erase = "\x1b[3F\x1b[J"
    assert stream.getvalue() == f"{'a' * 19}\nb\n0 of 3 ended\n{erase}c done\nb\n1 of 3 ended\n"


def test_without_a_terminal_there_are_plain_lines_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    display = module._Display(True, stream)
    display.draw(["a 10%"], 0, 2)
    monkeypatch.setattr(module, "SAY", -1.0)
    display.draw(["a 20%"], 0, 2)
    display.say("a done")
    assert stream.getvalue() == "a 20%\na done\n"
    quiet = io.StringIO()
    module._Display(False, quiet).draw(["a 30%"], 0, 2)
    assert quiet.getvalue() == ""


def test_threads_share_the_processors() -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert threads_for(1) == usable
    assert threads_for(usable) == 1
    assert threads_for(10 * usable) == 1
