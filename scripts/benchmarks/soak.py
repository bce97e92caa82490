r"""Kill runs at every kind of moment, resume them, and compare with the undisturbed run: `soak.py kills cartpole`.

    python scripts/benchmarks/soak.py kills --moments 5 --csv docs/results/kills.csv

CSV, a row for each case: ``events`` in the run's folder before each of which it was killed, drawn ``moments`` at which
it was, and ``exact``, the resumed runs whose models and records are those of the undisturbed one but for times.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401 - here and below what the forks need, once for all
import numpy as np
import torch._dynamo
import torch.utils.tensorboard
from interleaved import machine, update_csv
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import agents.training
from npg.runs.plain import from_text, to_text

SCRIPTS = Path(__file__).parents[1]
_TINY = "--n-envs 4 --eval-episodes 2 --no-progress --device cpu --set n_steps=16"
_NETS = f"{_TINY} --set n_critic_updates=2 --set policy_kwargs.net_arch=[8]"
_CARTPOLE = f"trpo CartPole-v1 --timesteps 600 --save-freq 200 --eval-freq 150 {_NETS}"
_CHEETAH = f"trpo HalfCheetah-v5 --timesteps 400 --save-freq 128 --eval-freq 400 {_NETS}"
_IMAGES = "--data IMAGES --epochs 3 --batch-size 16 --validation-size 16 --device cpu"
CASES = {
    "cartpole": f"{_CARTPOLE} --backend gymnasium",
    "cartpole-envpool": f"{_CARTPOLE} --backend envpool",
    "pendulum": f"trpo Pendulum-v1 --timesteps 1000 --save-freq 300 --eval-freq 300 {_NETS} --set normalize=true",
    "halfcheetah": _CHEETAH,
    "halfcheetah-gymnasium": f"{_CHEETAH} --backend gymnasium",
    "tetris": f"npg npg/Tetris-v0 --timesteps 512 --save-freq 128 --eval-freq 256 {_TINY} "
    "--set policy=AfterstatePolicy --set env_kwargs.height=8",
    "cifar-sgd": f"wrn-10-1 sgd {_IMAGES} --lr 0.1 --ema 0.9",
    "cifar-ngd": f"wrn-10-1 ngd {_IMAGES} --set max_kl=0.1 momentum=0 weight_decay=0 damping_control={{}} "
    "damping_metric=identity warm_start=0.5",
    "cifar-online-ngd": f"wrn-10-1 online-ngd {_IMAGES}",
    "cifar-kfac": f"wrn-10-1 kfac {_IMAGES} --dropout 0.1",
}
"""Small runs, each with updates, evaluations and checkpoints at different steps; and with everything that has state."""


def in_a_child(work: Callable[[], Any]) -> int:
    """Do `work` in a fork, silently; how it ended, as `os.waitstatus_to_exitcode` says it."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        work()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def command_of(case: str, folder: Path) -> list[str]:
    """The script of a case and its arguments; images are drawn into `folder`."""
    words = CASES[case].split()
    if "IMAGES" not in words:
        return ["train_agent.py", *words]
    images, draw = folder / "images", np.random.default_rng(0)
    for split, n in (("train", 32), ("test", 8)):
        for label in ("cat", "dog"):
            (images / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / label / f"{i}.png")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return ["train_cifar.py", *(str(images) if word == "IMAGES" else word for word in words)]


def train(command: list[str]) -> None:
    agents.training.FINAL_EPISODES = 2
    script, *arguments = command
    sys.argv = [str(SCRIPTS / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def watched(run: Path, at: Callable[[int], None]) -> Callable[..., None]:
    """An audit hook that calls `at` before each event in the folder `run`, with the event's number."""
    number = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal number
        opened = event == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wax+")
        if opened or event in ("os.rename", "os.remove", "os.mkdir"):
            path = arguments[0]
            if isinstance(path, str | Path) and str(path).startswith(str(run)):
                number += 1
                at(number)

    return hook


def killed_before(event: int, arguments: list[str], run: Path) -> int:
    """Train, and be killed before that event in the run's folder; returns how it ended."""

    def at(number: int) -> None:
        if number == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        sys.addaudithook(watched(run, at))
        train([*arguments, "--run-dir", str(run)])

    return in_a_child(work)


def killed_after(seconds: float, arguments: list[str], run: Path) -> int:
    """Train, and be killed after a time; returns how it ended."""

    def work() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process at once
        signal.setitimer(signal.ITIMER_REAL, seconds)
        train([*arguments, "--run-dir", str(run)])

    return in_a_child(work)


def events(run: Path, arguments: list[str]) -> int:
    """Train to the end in `run`; how many events there were."""
    read, write = os.pipe()

    def counted() -> None:
        seen = 0

        def at(number: int) -> None:
            nonlocal seen
            seen = number

        sys.addaudithook(watched(run, at))
        try:
            train([*arguments, "--run-dir", str(run)])
        finally:
            os.write(write, str(seen).encode())

    if in_a_child(counted):
        raise RuntimeError("the undisturbed run failed")
    return int(os.read(read, 20))


def resume(run: Path, arguments: list[str]) -> int:
    """Resume the run in `run`, or start it where there is nothing yet; how that ended."""
    there = (run / "config.yaml").exists()
    silent = ["--no-progress"] if arguments[0] == "train_agent.py" else []
    return in_a_child(
        lambda: train([arguments[0], "--resume", str(run), *silent] if there else [*arguments, "--run-dir", str(run)])
    )


def is_over(run: Path) -> bool:
    """Whether a run came to its end: a resume then says that nothing is left to do."""
    return any((run / name).exists() for name in ("final_evaluation.json", "summary.json"))


def outcome(run: Path) -> dict[str, Any]:
    """All that a run came to but times: models and records."""
    found: dict[str, Any] = _agents(run) if (run / "last_model.zip").exists() else _classifier(run)
    for name, skip in _TABLES.items():
        if (run / name).exists():
            with (run / name).open(newline="") as file:
                for _ in range(skip):
                    file.readline()
                found[name] = [_timeless(row) for row in csv.DictReader(file)]
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith(("time/", "seconds", "memory"))]
    found["TensorBoard"] = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}
    found["left over"] = [path.name for path in run.rglob("*.partial")]
    return found


_TABLES = {"progress.csv": 0, "evaluations.csv": 0, "monitor.csv": 1, "metrics.csv": 0}
_TIMES = ("t", "time/fps", "time/time_elapsed")


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _timeless(value) if isinstance(value, dict) else value for key, value in row.items()}
    return {key: value for key, value in inner.items() if not ("second" in key or "memory" in key or key in _TIMES)}


def _classifier(run: Path) -> dict[str, Any]:
    """Each checkpoint that is kept, with weights, average, optimizer and generators; and the summary."""
    found: dict[str, Any] = {"summary": _timeless(json.loads((run / "summary.json").read_text()))}
    for path in sorted((run / "checkpoints").iterdir()):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}: {key}": to_text(_arrays(value)) for key, value in state.items() if key != "seconds"}
    return found


def _agents(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("last_model", "best_model"):
        with zipfile.ZipFile(run / f"{name}.zip") as archive:
            for part in sorted(part for part in archive.namelist() if part.endswith(".pth")):  # an average's too
                tensors = torch.load(io.BytesIO(archive.read(part)), weights_only=True)
                found[f"{name}: {part}"] = to_text(_arrays(tensors))
            state = from_text(archive.read("state.json"))
            found |= {f"{name}: {key}": to_text(state[key]) for key in ("statistics", "environments", "observations")}
            found[f"{name}: generators"] = to_text(state["generators"])
            attributes = json.loads(archive.read("data"))
            names = ("num_timesteps", "_n_updates", "_episode_num", "critic_damping", "advantage_variance")
            names += ("refused_steps",)
            found |= {f"{name}: {key}": attributes.get(key) for key in names}
    found["final"] = _timeless(json.loads((run / "final_evaluation.json").read_text()))
    return found


def _arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {str(key): _arrays(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(inner) for inner in value]
    return value


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if repr(a[name]) != repr(b.get(name))]


def kills(case: str, n_events: int, n_moments: int, seed: int, keep: bool) -> dict[str, Any]:
    """Kill and resume a case; returns its row of the CSV."""
    folder, bad = Path(tempfile.mkdtemp(prefix=f"soak-{case}-")), 0
    arguments = command_of(case, folder)
    started = time.perf_counter()
    count = events(folder / "undisturbed", arguments)
    seconds = time.perf_counter() - started
    expected = outcome(folder / "undisturbed")
    draw = random.Random(seed)
    chosen = sorted(draw.sample(range(1, count + 1), min(n_events or count, count)))
    times = [draw.uniform(0, seconds) for _ in range(n_moments)]
    moments: list[tuple[str, Callable[[Path], int]]] = [
        *((f"event {n} of {count}", partial(killed_before, n, arguments)) for n in chosen),
        *((f"{time:.3f} s", partial(killed_after, time, arguments)) for time in times),
    ]
    for i, (name, kill) in enumerate(moments):
        run = folder / str(i)
        ended = kill(run)
        resumed = resume(run, arguments) if ended else 0
        differing = differences(expected, outcome(run)) if is_over(run) else ["its end"]
        if differing:
            bad += 1
            print(
                f"{case}, killed at {name} ({ended}), resumed with {resumed}: differs in {', '.join(differing)}: {run}"
            )
        elif not keep:
            shutil.rmtree(run)
    print(f"{case}: {len(moments) - bad} of {len(moments)} resumed runs are the undisturbed one ({count} events)")
    if not (bad or keep):
        shutil.rmtree(folder)
    done = {"events": len(chosen), "moments": n_moments, "exact": len(moments) - bad, "seed": seed}
    return {"case": case, **done, "torch": torch.__version__, "machine": machine()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("kills",))
    add("case", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} (default: all)")
    add("--events", type=int, default=0, metavar="N", help="kill before N events in the folder, drawn (default: all)")
    add("--moments", type=int, default=10, metavar="N", help="kill at N random moments (default: 10)")
    add("--seed", type=int, default=0)
    add("--keep", action="store_true", help="keep the folders")
    add("--csv", type=Path, help="write the rows here")
    args = parser.parse_args()
    if unknown := [case for case in args.case if case not in CASES]:
        parser.error(f"case {unknown[0]!r} is unknown: there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    rows = []
    for case in args.case:
        rows.append(kills(case, args.events, args.moments, args.seed, args.keep))
        update_csv(args.csv, rows, "case")
    return int(any(row["exact"] < row["events"] + row["moments"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
