"""Train an agent: `python scripts/train_agent.py trpo CartPole-v1`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from agents.command_line import MISTAKES, Parser
from agents.config import ALGORITHMS, parse_settings, resolve
from agents.evaluation import check_video, table
from agents.training import FINAL_EPISODES, Outcome, Run, resume, start

USAGE = """train_agent.py ALGO ENV_ID [options]
       train_agent.py --resume RUN_DIR [options]"""
EXAMPLES = """\
examples:
  train_agent.py trpo CartPole-v1
  train_agent.py npg HalfCheetah-v5 --timesteps 1000000 --set target_kl=0.02
  train_agent.py trpo Hopper-v5 --set policy_kwargs.net_arch=[256,256]
  train_agent.py --resume runs/trpo-CartPole-v1-s0-1 --timesteps 400000
"""


def make_parser() -> Parser:
    parser = Parser(USAGE, "Train an agent, evaluate it, and leave everything in a run folder.", EXAMPLES)
    add = parser.add_argument
    add("algo", nargs="?", metavar="ALGO", help=f"the algorithm: {', '.join(ALGORITHMS)}")
    add("env", nargs="?", metavar="ENV_ID", help="the environment, such as CartPole-v1")

    add = parser.add_argument_group("training").add_argument
    add("--timesteps", type=int, metavar="N", help="environment steps in all (default: the preset's)")
    add("--seed", type=int, metavar="S", help="of everything random (default: 0)")
    add("--n-envs", type=int, metavar="N", help="environments stepped together (default: the preset's)")
    add("--preset", metavar="NAME", help="a preset by its name, or a YAML file of presets (default: the environment's)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the preset or the algorithm, such as target_kl=0.02. The value is YAML, a dot reaches into "
        "a mapping. Repeatable",
    )

    add = parser.add_argument_group("machine").add_argument
    add("--device", metavar="NAME", help="cpu, cuda, or auto: CUDA if there is one (default: auto)")
    add(
        "--backend",
        metavar="NAME",
        choices=("auto", "envpool", "gymnasium"),
        help="of the environments: envpool, gymnasium, or auto: the fastest that means the same (default: auto)",
    )
    add("--threads", type=int, metavar="N", help="of PyTorch and of EnvPool (default: their own)")

    add = parser.add_argument_group("run folder").add_argument
    add("--run-dir", type=Path, metavar="DIR", help="a folder that does not exist yet (default: runs/ALGO-ENV_ID-sS-n)")
    add("--resume", type=Path, metavar="RUN_DIR", help="continue a run, or one of its checkpoints/*.zip")
    add("--save-freq", type=int, metavar="N", help="steps between checkpoints (default: a fifth of all)")

    add = parser.add_argument_group("evaluation and display").add_argument
    add("--eval-freq", type=int, metavar="N", help="steps between evaluations (default: a twentieth of all)")
    add("--eval-episodes", type=int, metavar="N", help=f"of each evaluation; {FINAL_EPISODES} at the end (default: 10)")
    add("--n-eval-envs", type=int, metavar="N", help="environments evaluated together (default: one per episode)")
    add("--video", action="store_true", help="record an episode of the best agent at the end")
    add("--no-progress", action="store_true", help="show no progress bar")
    return parser


def prepare(args: argparse.Namespace) -> Run:
    command = shlex.join([sys.executable, *sys.argv])
    may_change = ("timesteps", "device", "threads", "eval_freq", "eval_episodes", "n_eval_envs", "save_freq")
    options = {name: getattr(args, name) for name in may_change}
    if args.resume is None:
        if args.algo is None or args.env is None:
            raise ValueError("ALGO and ENV_ID are needed, as in: train_agent.py trpo CartPole-v1")
        options |= {name: getattr(args, name) for name in ("seed", "n_envs", "backend")}
        config = resolve(args.algo, args.env, preset=args.preset, settings=parse_settings(args.set), **options)
        if args.video:
            check_video(config)
        return start(config, args.run_dir, command)

    for name in ("seed", "n_envs", "backend", "preset", "set", "run_dir"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} cannot go with --resume: a run keeps what it began with")
    run = resume(args.resume, command, algo=args.algo, env=args.env, **options)
    if args.video:
        check_video(run.config)
    return run


def report(run: Run, outcome: Outcome) -> None:
    speed = outcome.new_timesteps / outcome.seconds
    print(
        f"{outcome.new_timesteps:,} steps in {outcome.seconds:.1f} s ({speed:,.0f} steps/s), "
        f"evaluations {outcome.evaluation_seconds:.1f} s"
    )
    if outcome.interrupted:
        print(f"stopped and saved at step {outcome.timesteps:,} of {run.config.timesteps:,}. To continue:")
        print(f"  python {sys.argv[0]} --resume {run.folder.path}")
    else:
        print(f"\n{table(outcome.evaluations)}\n\nrun folder: {run.folder.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(arguments)
    try:
        run = prepare(args)
    except MISTAKES as error:
        parser.error(str(error))
    print(f"{run.config.algo} on {run.config.env}, seed {run.config.seed}: {run.folder.path}", flush=True)
    try:
        outcome = run.train(progress=not args.no_progress, video=args.video)
    except KeyboardInterrupt:
        print(f"ended at once. What was last saved continues with:\n  python {sys.argv[0]} --resume {run.folder.path}")
        return 130
    report(run, outcome)
    return 130 if outcome.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
