"""Search for better settings of an algorithm: ``npg-tune-agent trpo Pendulum-v1 --trials 20 --jobs 2``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from agents.config import ALGORITHMS
from agents.search_space import load_space
from agents.training import MISTAKES, continuation
from agents.tuning import FIRST_SEED, Tuning, TuningConfig, result_of
from npg.checks import require
from npg.runs.command_line import Parser, again, command
from npg.runs.presets import parse_settings

USAGE = """%(prog)s ALGO ENV_ID [options]
       %(prog)s --resume DIR [options]"""
EXAMPLES = """\
examples:
  %(prog)s trpo Pendulum-v1 --trials 20 --jobs 2
  %(prog)s npg Hopper-v5 --timesteps 300000 --set normalize=true
  %(prog)s --resume runs/tune-trpo-Pendulum-v1-1 --trials 40
"""


def make_parser() -> Parser:
    parser = Parser(USAGE, "Search for better settings than the preset's, and write the best as a preset.", EXAMPLES)
    add = parser.add_argument
    add("algo", nargs="?", metavar="ALGO", help=f"the algorithm: {', '.join(ALGORITHMS)}")
    add("env", nargs="?", metavar="ENV_ID", help="the environment, such as Pendulum-v1")

    add = parser.add_argument_group("search").add_argument
    add("--trials", type=int, metavar="N", help="trials in all, the preset's included (default: 20)")
    add("--jobs", type=int, default=1, metavar="N", help="processes that train at a time (default: 1)")
    add(
        "--seeds",
        type=int,
        metavar="N",
        help=f"training runs per trial, with the seeds {FIRST_SEED}, {FIRST_SEED + 1}, … (default: 1)",
    )
    add("--evaluations", type=int, metavar="N", help="of each run; after each it may end early (default: 10)")
    add(
        "--search", type=Path, metavar="FILE", help="a YAML file of search spaces (default: agents/presets/search.yaml)"
    )
    add("--preset", metavar="NAME", help="where to begin (default: the environment's preset)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that all trials have. Repeatable")

    add = parser.add_argument_group("training").add_argument
    add("--timesteps", type=int, metavar="N", help="environment steps of each run (default: the preset's)")
    add("--n-envs", type=int, metavar="N", help="environments of each run (default: the preset's)")
    add("--eval-episodes", type=int, metavar="N", help="episodes of an evaluation (default: 10)")
    add("--backend", choices=("auto", "envpool", "gymnasium"), help="what runs the environments (default: auto)")
    add("--device", metavar="NAME", help="cpu, cuda or auto (default: auto)")
    add("--threads", type=int, metavar="N", help="of each run (default: 1 with --jobs above 1, else their own)")

    add = parser.add_argument_group("folder").add_argument
    add(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="a folder that does not exist yet (default: runs/tune-ALGO-ENV_ID-n)",
    )
    add("--resume", type=Path, metavar="DIR", help="continue a search")
    return parser


def prepare(args: argparse.Namespace) -> Tuning:
    options = ("timesteps", "n_envs", "eval_episodes", "backend", "device", "threads")
    if args.resume is not None:
        for name in ("seeds", "evaluations", "search", "preset", "set", "run_dir", *options):
            if getattr(args, name) not in (None, []):
                raise ValueError(
                    f"--{name.replace('_', '-')} cannot go with --resume: a search keeps what it began with"
                )
        return Tuning.open(args.resume, command(), args.trials, algo=args.algo, env=args.env)
    if args.algo is None or args.env is None:
        raise ValueError("ALGO and ENV_ID are needed, such as: trpo Pendulum-v1")
    numbers = {n: getattr(args, n) for n in ("trials", "seeds", "evaluations") if getattr(args, n) is not None}
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    space = load_space(args.algo, args.search)
    config = TuningConfig(args.algo, args.env, options=given, space=space, **numbers)
    return Tuning.create(args.run_dir, config, command(), preset=args.preset, settings=parse_settings(args.set))


def report(tuning: Tuning) -> None:
    config, best = tuning.config, tuning.best
    if best is None:
        print(f"no trial came to its end: see {tuning.path / 'trials.csv'}")
        return
    preset = next((t for t in tuning.finished if "preset" in t.user_attrs and t.state.name == "COMPLETE"), None)
    print(f"\nbest: trial {best.number}, {result_of(best)}")
    if preset is not None:
        print(f"preset: trial {preset.number}, {result_of(preset)}")
    for name, value in best.params.items():
        print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    print("\nOn other seeds, which tell how good it is:")
    print(
        f"  {again(config.algo, config.env, '--preset', tuning.path / 'best.yaml', '--seed', 0, command='train_agent')}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(arguments)
    with parser.preparing(*MISTAKES):
        require(args.jobs >= 1, "--jobs", args.jobs, "at least 1")
        tuning = prepare(args)
    try:
        print(f"{tuning.config.algo} on {tuning.config.env}, {tuning.config.trials} trials: {tuning.path}", flush=True)
        tuning.run(args.jobs)
    except KeyboardInterrupt:
        print(f"\nstopped after {len(tuning.finished)} of {tuning.config.trials} trials. To continue:")
        print(f"  {continuation(tuning.config.algo, tuning.config.env, tuning.path)}")
        return 130
    except (*MISTAKES, RuntimeError) as error:
        parser.error(str(error))
    report(tuning)
    return 1 if tuning.best is None else 0


if __name__ == "__main__":
    sys.exit(main())
