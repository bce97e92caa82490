"""Evaluate the agent of a run: ``npg-evaluate-agent runs/trpo-CartPole-v1-s0-1``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agents.cli.folders import opened
from agents.evaluation import check_video, evaluate_saved, record_video, table
from agents.training import MISTAKES, check_named
from envs.seeding import Purpose, purpose_seed
from npg.checks import whole
from npg.runs.command_line import Parser

DESCRIPTION = """\
Let the agent of a run play whole episodes, with the run's own frozen statistics
of observations, and write every return and length to a JSON file in its folder."""


def make_parser() -> Parser:
    parser = Parser("%(prog)s RUN_DIR [options]", DESCRIPTION)
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run")
    add("--env", metavar="ENV_ID", help="the run's environment; needed if it is MODULE:ID, which is then imported")
    add("--model", choices=("best", "last"), default="best", help="which agent of the run (default: best)")
    add("--episodes", type=int, default=20, metavar="N", help="whole episodes to play (default: 20)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the environments and sampled actions (default: 0)")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--deterministic", action="store_true", default=True, help="act with the mode of the policy (default)")
    mode("--stochastic", dest="deterministic", action="store_false", help="act with samples from the policy")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda or auto (default: cpu)")
    add("--video", action="store_true", help="also record one episode")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(arguments)
    with parser.training("The run itself is as it was.", FloatingPointError):
        evaluate_run(args, parser)
    return 0


def evaluate_run(args: argparse.Namespace, parser: Parser) -> None:
    with parser.preparing(*MISTAKES):
        whole("--episodes", args.episodes, 1)
        folder = opened(args.run_dir)
        check_named(folder.path, (folder.config.algo, folder.config.env), env=args.env, option="--env")
        config = replace(folder.config, device=args.device, eval_episodes=args.episodes)
        files = folder.best if args.model == "best" else folder.last
        mode = "deterministic" if args.deterministic else "stochastic"
        if args.video:
            check_video(config)
        seed = purpose_seed(args.seed, Purpose.EVALUATION_BY_HAND)  # apart from what the agent was trained on
        evaluation = evaluate_saved(files, config, args.episodes, seed, args.deterministic)
    name = f"{args.model}_{mode}_seed{args.seed}"
    content = {"model": args.model, "algo": config.algo, "env": config.env} | evaluation.to_dict()
    path = folder.write_json(f"evaluation_{name}_{args.episodes}episodes.json", content)
    print(f"{config.algo} on {config.env}, {mode} actions, seed {args.seed}\n")
    print(table([(f"{args.model} model", evaluation)]))
    print(f"\nwritten: {path}")
    if args.video:
        video = folder.path / "video" / f"{name}.mp4"
        episode = record_video(files, config, video, seed, args.deterministic)
        print(f"written: {video} (return {episode.mean_return:.1f})")


if __name__ == "__main__":
    sys.exit(main())
