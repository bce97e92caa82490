r"""Kill or stop one of two processes that train together: `ranks.py --times 10 --csv docs/results/ranks.csv`.

A real torchrun starts two processes, which share an epoch of images, a rollout or the time of an evaluation (the first
process evaluates, the second waits). At a moment that is drawn, one of them, drawn too, is ended by SIGKILL or halted
by SIGSTOP. Then, in turn:

- ``resume``: nothing restarts them. All have to end, and the same command goes on with ``--resume``.
- ``restart``: ``torchrun --max-restarts=1`` starts both again.
- ``two agents``: the same, with a torchrun for each process, which meet on the loopback device.

The other process shall end within a minute, with one message and no traceback, and the run shall go on to the models
and records of the undisturbed one.

CSV, a row for each: ``seconds`` from the signal to the end of the process that was left; ``messages`` and
``tracebacks`` that the processes printed; ``differs``: what is not as in the undisturbed run, but for columns of time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from interleaved import machine, write_csv
from soak import command_of, differences, is_over, outcome, train
from stable_baselines3.common.vec_env import VecEnv
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import agents.callbacks
import agents.evaluation

PLACES = {"an epoch": "cifar-online-ngd", "a rollout": "cartpole", "an evaluation": "cartpole"}
"""Where the signal falls, and the case of soak.py that is trained."""
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
WAYS = ("resume", "restart", "two agents")
LIMIT = 60.0
"""Seconds in which the process that is left has to end."""
MESSAGES = {"killed": "the connection to another process broke", "stopped": "has given no sign of life"}
"""torchrun may be quicker than a broken connection, and end the other process before it has said this."""


def watched_train(plan: dict[str, Any]) -> None:
    """What torchrun starts: train, and in the first attempt's process 0, at its moment, send the signal."""
    folder, rank = Path(plan["folder"]), os.environ["RANK"]
    (folder / f"pid {rank}").write_text(str(os.getpid()))
    first = not (folder / "signal").exists()
    counts = dict.fromkeys(PLACES, 0)
    evaluating = False

    def reached(place: str) -> None:
        counts[place] += 1
        if first and rank == "0" and place == plan["place"] and counts[place] == plan["moment"]:
            (folder / "signal").write_text(str(time.time()))
            os.kill(int((folder / f"pid {plan['rank']}").read_text()), SIGNALS[plan["how"]])

    def step(env: VecEnv, actions: Any) -> Any:
        reached("an evaluation" if evaluating else "a rollout")
        return stepped(env, actions)

    def evaluate(*arguments: Any, **named: Any) -> Any:
        nonlocal evaluating
        evaluating = True
        try:
            return evaluated(*arguments, **named)
        finally:
            evaluating = False

    def optimizer_step(optimizer: Optimizer, arguments: Any, named: Any) -> None:
        reached("an epoch")

    stepped, evaluated = VecEnv.step, agents.evaluation.evaluate
    VecEnv.step = step  # type: ignore[method-assign]
    agents.evaluation.evaluate = agents.callbacks.evaluate = evaluate
    register_optimizer_step_pre_hook(optimizer_step)
    torch.set_num_threads(1)
    try:
        train(plan["command"])
    finally:
        if rank == "0":
            (folder / "counts").write_text(json.dumps(counts))


def launch(plan: dict[str, Any], way: str) -> list[subprocess.Popen[str]]:
    """Start torchrun, or one for each process; what they print goes to files in the plan's folder."""
    run = [sys.executable, "-m", "torch.distributed.run", f"--max-restarts={int(way in WAYS[1:])}"]
    if way == "two agents":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        starts = [[*run, *meet, "--local-addr=127.0.0.1", f"--node-rank={rank}"] for rank in (0, 1)]
    else:
        starts = [[*run, "--standalone", "--nproc-per-node=2"]]
    started = []
    for number, start in enumerate(starts):
        with (Path(plan["folder"]) / f"printed {number}").open("a") as file:
            started.append(
                subprocess.Popen(
                    [*start, __file__, "--plan", json.dumps(plan)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )
            )
    return started


def runs(process: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def strike(plan: dict[str, Any], way: str, expected: dict[str, Any]) -> dict[str, Any]:
    """Train, send the signal, go on, and compare."""
    folder = Path(plan["folder"])
    started, seconds, left = launch(plan, way), None, None
    while any(process.poll() is None for process in started):
        time.sleep(0.05)
        if left is None and (folder / "signal").exists():
            left = int((folder / f"pid {1 - plan['rank']}").read_text())
        if left is not None and seconds is None and not runs(left):
            seconds = time.time() - float((folder / "signal").read_text())
    status = max(abs(process.returncode) for process in started)
    printed = "".join(path.read_text() for path in sorted(folder.glob("printed *")))
    run = folder / "run"
    if way == "resume":
        assert status, "torchrun said that all is well"
        script, *_ = plan["command"]
        again = plan | {"command": [script, "--resume", str(run)], "moment": 0}
        resumed = [] if is_over(run) else launch(again, "resume")  # process 0 may have come to its end
        status = max((abs(process.wait()) for process in resumed), default=0)
    differing = differences(expected, outcome(run)) if is_over(run) else ["its end"]
    return {
        "place": plan["place"],
        "signal": plan["how"],
        "rank": plan["rank"],
        "moment": plan["moment"],
        "then": way,
        "seconds": None if seconds is None else round(seconds, 1),
        "messages": sum(map(printed.count, MESSAGES.values())),
        "tracebacks": len(re.findall(rf'Traceback .*\n.*File "{re.escape(__file__)}', printed)),
        "status": status,
        "differs": " ".join(differing),
        "torch": torch.__version__,
        "machine": machine(),
    }


def is_good(row: dict[str, Any]) -> bool:
    """Whether all ended in time, with one message where a peer was silent, and the run went on exactly."""
    in_time = row["seconds"] is not None and row["seconds"] <= LIMIT
    quiet = not row["tracebacks"] and (row["messages"] == 1 or (row["signal"] == "killed" and not row["messages"]))
    return in_time and quiet and not row["status"] and not row["differs"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--places", nargs="+", choices=list(PLACES), default=list(PLACES), help="default: all")
    add("--times", type=int, default=10, metavar="N", help="of each place and signal [%(default)s]")
    add("--jobs", type=int, default=2, metavar="N", help="pairs of processes at once [%(default)s]")
    add("--seed", type=int, default=0, help="of what is drawn [%(default)s]")
    add("--csv", type=Path, help="write the rows here")
    add("--plan", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.plan is not None:
        watched_train(options.plan)
        return 0
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="ranks-"))
    plans: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
    for place in options.places:
        case, home = PLACES[place], folder / place
        command = command_of(case, home)
        whole = {
            "folder": str(home),
            "command": [*command, "--run-dir", str(home / "run")],
            "place": place,
            "moment": 0,
        }
        home.mkdir(exist_ok=True)
        if any(process.wait() for process in launch(whole, "resume")):
            raise RuntimeError("the undisturbed run failed:\n" + (home / "printed 0").read_text()[-2000:])
        count = json.loads((home / "counts").read_text())[place]
        expected = outcome(home / "run")
        for how in SIGNALS:
            for i in range(options.times):
                of = home / f"{how} {i}"
                of.mkdir()
                moment, rank = draw.randint(2, count), draw.randrange(2)
                plan = {"folder": str(of), "command": [*command, "--run-dir", str(of / "run")], "place": place}
                plans.append((plan | {"how": how, "rank": rank, "moment": moment}, WAYS[i % 3], expected))
    rows: list[dict[str, Any]] = []
    print(f"{'in':<15}{'signal':<9}{'rank':>4}{'at':>5}  {'then':<11}{'ended after':>12}{'messages':>9}  {'differs'}")
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda plan: strike(*plan), plans):
            rows.append(row)
            after = "never" if row["seconds"] is None else f"{row['seconds']:.1f} s"
            shown = "nothing" if is_good(row) else f"{row['differs'] or '-'} ({row['status']}, {row['tracebacks']})"
            start = f"{row['place']:<15}{row['signal']:<9}{row['rank']:>4}{row['moment']:>5}  {row['then']:<11}"
            print(f"{start}{after:>12}{row['messages']:>9}  {shown}", flush=True)
            write_csv(options.csv, rows)
    good = sum(map(is_good, rows))
    print(f"{good} of {len(rows)} ended within {LIMIT:.0f} s, with one message at most, and went on exactly")
    if good == len(rows):
        shutil.rmtree(folder)
    else:
        print(f"their folders: {folder}")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main())
