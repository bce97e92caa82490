"""Write the policy of a run to one file: ``npg-export-agent runs/trpo-CartPole-v1-s0-1``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agents.cli.folders import opened
from agents.evaluation import make_env
from agents.export import FORMATS, description, export_agent
from agents.runs import load_agent
from agents.training import MISTAKES, check_named, find_agent
from npg.checks import require
from npg.runs.command_line import Parser

DESCRIPTION = """\
Write the policy of a run to one file that needs none of this package: raw
observations go in, and what the environment takes as actions comes out. The
run's observation statistics and the clipping of actions are inside."""


def make_parser() -> Parser:
    parser = Parser("%(prog)s RUN_DIR [options]", DESCRIPTION)
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, or one of its checkpoints/*.zip")
    add("--env", metavar="ENV_ID", help="the run's environment; needed if it is MODULE:ID, which is then imported")
    add("--format", choices=tuple(FORMATS), default="onnx", help="the kind of file (default: onnx)")
    add("--model", choices=("best", "last"), default="best", help="which agent of the run (default: best)")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--deterministic", action="store_true", default=True, help="act with the mode of the policy (default)")
    mode("--stochastic", dest="deterministic", action="store_false", help="act with samples from the policy")
    add("--out", type=Path, metavar="FILE", help="the file (default: beside the model, with its name)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(arguments)
    with parser.preparing(*MISTAKES):
        path = export_run(args)
    about = description(path)
    actions = "deterministic" if args.deterministic else "sampled"
    print(f"{about['algorithm']} after {about['timesteps']:,} steps, {actions} actions: {path}")
    for name, part in about["inputs"].items():
        print(f"  {name}: {part['dtype']} ({', '.join(['N', *map(str, part['shape'])])})")
    print(f"  → action: {about['action_space']}")
    return 0


def export_run(args: argparse.Namespace) -> Path:
    if args.out is not None:
        end = FORMATS[args.format]
        require(
            args.out.suffix == end, "--out", str(args.out), f"a file that ends in {end}, for --format {args.format}"
        )
        require(args.out.parent.is_dir(), "--out", str(args.out), "in a folder that exists: make it first")
        require(not args.out.is_dir(), "--out", str(args.out), "a file")
    folder = opened(args.run_dir, checkpoints=True)
    if folder.path == args.run_dir:
        files = folder.best if args.model == "best" else folder.last
    else:
        _, files = find_agent(args.run_dir)
    check_named(folder.path, (folder.config.algo, folder.config.env), env=args.env, option="--env")
    name = f"{files.model.stem}{'' if args.deterministic else '_stochastic'}{FORMATS[args.format]}"
    path: Path = args.out or files.model.with_name(name)
    config = replace(folder.config, device="cpu")
    bare = make_env(config, 1, config.seed, evaluation=True)
    try:
        agent, *_ = load_agent(files, config, lambda: bare, training=False)
        return export_agent(agent, path, args.format, env=bare, deterministic=args.deterministic)
    finally:
        bare.close()


if __name__ == "__main__":
    sys.exit(main())
