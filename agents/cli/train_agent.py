"""Train an agent: ``npg-train-agent trpo CartPole-v1``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from agents.config import ALGORITHMS, EXACT_RESUME, RunConfig, resolve
from agents.cpo import CostError
from agents.evaluation import check_video, table
from agents.runs import RunFolder
from agents.seeds import SeedsFolder, is_finished, parse_seeds, summary_table
from agents.trackers import TRACKERS, TrackerError, check_trackers
from agents.training import FINAL_EPISODES, MISTAKES, Outcome, Run, check, check_named, continuation, resume, start
from npg.parallel import World, open_world
from npg.runs.command_line import Parser, command, restarted
from npg.runs.presets import parse_settings

USAGE = """%(prog)s ALGO ENV_ID [options]
       %(prog)s ALGO ENV_ID --seeds 0-9 [--jobs N] [options]
       %(prog)s --resume RUN_DIR [options]"""
EXAMPLES = """\
examples:
  %(prog)s trpo CartPole-v1
  %(prog)s npg HalfCheetah-v5 --timesteps 1000000 --set target_kl=0.02
  %(prog)s trpo Hopper-v5 --set "policy_kwargs.net_arch=[256,256]"
  %(prog)s --resume runs/trpo-CartPole-v1-s0-1 --timesteps 400000
  %(prog)s trpo Hopper-v5 --seeds 0-9 --jobs 2
  torchrun --nproc_per_node=4 -m agents.cli.train_agent trpo HalfCheetah-v5
"""

#: What may differ from before when a run is resumed.
MAY_CHANGE = ("timesteps", "device", "threads", "eval_freq", "eval_episodes", "n_eval_envs", "save_freq", "env_timeout")


def make_parser() -> Parser:
    parser = Parser(USAGE, "Train an agent, evaluate it, and leave everything in a run folder.", EXAMPLES)
    add = parser.add_argument
    add("algo", nargs="?", metavar="ALGO", help=f"the algorithm: {', '.join(ALGORITHMS)}")
    add("env", nargs="?", metavar="ENV_ID", help="the environment, such as CartPole-v1")

    add = parser.add_argument_group("training").add_argument
    add("--timesteps", type=int, metavar="N", help="environment steps in all (default: the preset's)")
    add("--seed", type=int, metavar="S", help="seed of all random numbers (default: 0)")
    add("--seeds", metavar="LIST", help="several, such as 0-9 or 0,3,7: a process and a run folder each")
    add(
        "--n-envs",
        type=int,
        metavar="N",
        help="environments, of all processes together (default: the preset's)",
    )
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
        help="what runs the environments: envpool, gymnasium, or auto: the fastest that means the same (default: auto)",
    )
    add("--threads", type=int, metavar="N", help="threads of PyTorch and of EnvPool (default: their own)")
    add(
        "--env-timeout",
        type=float,
        metavar="SECONDS",
        help="end a run whose environments take longer for one step or reset, together; 0 for no limit (default: 600)",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="how many of several seeds run at a time, and share the cores (default: 1)",
    )

    add = parser.add_argument_group("run folder").add_argument
    add("--run-dir", type=Path, metavar="DIR", help="a folder that does not exist yet (default: runs/ALGO-ENV_ID-sS-n)")
    add(
        "--resume",
        type=Path,
        metavar="RUN_DIR",
        help="continue a run, or one of its checkpoints/*.zip; with --run-dir in a folder of its own; or the folder of "
        "several seeds",
    )
    add("--save-freq", type=int, metavar="N", help="steps between checkpoints (default: a fifth of all)")
    add(
        "--exact-resume",
        choices=list(EXACT_RESUME),
        metavar="HOW",
        help="how a killed run resumes as if undisturbed: state saves the environments, restart begins new episodes at "
        "each checkpoint, off does neither (default: auto, state where that can be)",
    )

    add = parser.add_argument_group("evaluation and display").add_argument
    add("--eval-freq", type=int, metavar="N", help="steps between evaluations (default: a twentieth of all)")
    add(
        "--eval-episodes",
        type=int,
        metavar="N",
        help=f"episodes of an evaluation; {FINAL_EPISODES} at the end (default: 10)",
    )
    add("--n-eval-envs", type=int, metavar="N", help="environments evaluated together (default: one per episode)")
    add("--video", action="store_true", help="record an episode of the best agent at the end")
    add("--no-progress", action="store_true", help="show no progress bar")
    add("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    add("--mlflow", metavar="EXPERIMENT", help="log to MLflow too")
    return parser


def refuse_changes(args: argparse.Namespace) -> None:
    for name in ("seed", "n_envs", "backend", "exact_resume", "preset", "set"):
        if getattr(args, name) not in (None, []):
            raise ValueError(f"--{name.replace('_', '-')} cannot go with --resume: a run keeps what it began with")


def configure(args: argparse.Namespace) -> RunConfig:
    """The run that is asked for, or the one that is resumed as it was."""
    if args.resume is not None:
        refuse_changes(args)
        config = RunFolder.of(args.resume).config
        return config if args.device is None else replace(config, device=args.device)
    if args.algo is None or args.env is None:
        raise ValueError("ALGO and ENV_ID are needed, such as: trpo CartPole-v1")
    options = {name: getattr(args, name) for name in (*MAY_CHANGE, "seed", "n_envs", "backend", "exact_resume")}
    return resolve(args.algo, args.env, preset=args.preset, settings=parse_settings(args.set), **options)


def trackers(args: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(args, name) for name in TRACKERS if getattr(args, name) is not None}


def prepare(args: argparse.Namespace, config: RunConfig, world: World) -> Run:
    check_trackers(trackers(args))
    if args.video:
        check_video(config)
    if args.resume is None:
        return start(config, args.run_dir, command(), world)
    changes = {name: getattr(args, name) for name in MAY_CHANGE}
    return resume(args.resume, command(), args.run_dir, algo=args.algo, env=args.env, world=world, **changes)


def report(run: Run, folder: RunFolder, outcome: Outcome) -> None:
    if outcome.new_timesteps:
        speed = outcome.new_timesteps / outcome.seconds
        print(
            f"{outcome.new_timesteps:,} steps in {outcome.seconds:.1f} s ({speed:,.0f} steps/s), "
            f"evaluations {outcome.evaluation_seconds:.1f} s"
        )
    if outcome.interrupted:
        print(f"stopped and saved at step {outcome.timesteps:,} of {run.config.timesteps:,}. To continue:")
        print(f"  {continuation(run.config.algo, run.config.env, folder.path)}")
    else:
        print(f"\n{table(outcome.evaluations)}\n\nrun folder: {folder.path}")


def train(args: argparse.Namespace, run: Run, parser: Parser) -> int:
    config, go_on = run.config, ""
    if run.folder is not None:
        go_on = f"What was last saved continues with:\n  {continuation(config.algo, config.env, run.folder.path)}"
        processes = f", {run.world.size} processes" if run.world.group is not None else ""
        print(f"{config.algo} on {config.env}, seed {config.seed}{processes}: {run.folder.path}", flush=True)
        print(EXACT_RESUME[config.exact_resume], flush=True)
    with parser.training(go_on, FloatingPointError, TrackerError, CostError):
        try:
            outcome = run.train(progress=not args.no_progress, video=args.video, trackers=trackers(args))
        except CostError as error:
            if not run.model.n_updates:  # to go on would end here again
                parser.exit(1, f"{parser.prog}: error: {error}. Nothing was trained yet: begin anew\n")
            raise
    if run.folder is not None:
        report(run, run.folder, outcome)
    return 130 if outcome.interrupted else 0


def prepare_seeds(args: argparse.Namespace, parser: Parser) -> SeedsFolder:
    """The folder of several seeds: a new one, or one that is resumed, with what changes."""
    if "RANK" in os.environ:
        raise ValueError("--seeds cannot go with torchrun: give --jobs, or start each seed by itself")
    if args.seed is not None:
        raise ValueError("--seed cannot go with --seeds: give one of the two")
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {args.jobs}")
    check_trackers(trackers(args))
    seeds = () if args.seeds is None else parse_seeds(args.seeds)
    kept = () if args.resume is not None else ("preset", "set", "timesteps", "n_envs", "eval_freq", "save_freq")
    options = parser.options_of(args, ("seeds", "jobs", "threads", "run_dir", "resume", "no_progress", *kept))
    if args.resume is None:
        config = configure(args)
        for seed in seeds:
            replace(config, seed=seed)
        check(config)
        if args.video:
            check_video(config)
        return SeedsFolder.create(args.run_dir, config, seeds, options)
    if args.run_dir is not None:
        raise ValueError("--run-dir cannot go with several seeds that are resumed: they go on in their folder")
    if not SeedsFolder.is_one(args.resume):
        raise ValueError(
            f"--seeds cannot go with --resume {args.resume}, which is not the folder of several seeds: leave --seeds "
            "out to continue one run, or begin several with ALGO ENV_ID --seeds, in another folder"
        )
    refuse_changes(args)
    folder = SeedsFolder.open(args.resume)
    check_named(folder.path, (folder.algo, folder.env), args.algo, args.env)
    folder = folder.going_on(seeds, options, args.timesteps)
    folder.write()
    return folder


def train_seeds(args: argparse.Namespace, folder: SeedsFolder, parser: Parser) -> int:
    at_once, seeds = args.jobs or 1, ", ".join(map(str, folder.seeds))
    print(f"{folder.algo} on {folder.env}, seeds {seeds}, {at_once} at a time: {folder.path}", flush=True)
    go_on = f"To continue:\n  {continuation(folder.algo, folder.env, folder.path)}"
    with parser.training(go_on):
        results = folder.run(Path(__file__).resolve(), at_once, args.threads, show=not args.no_progress)
        folder.summarize(results)
    print(f"\n{summary_table(results, {seed: folder.log(seed) for seed in folder.seeds})}\n\nfolder: {folder.path}")
    states = {result.status for result in results}
    if states <= {"done", "done before"}:
        return 0
    print(go_on)
    return 1 if states & {"failed", "killed", "running elsewhere"} else 130


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse(arguments)
    if args.seeds is not None or (args.resume is not None and SeedsFolder.is_one(args.resume)):
        with parser.preparing(*MISTAKES):
            folder = prepare_seeds(args, parser)
        return train_seeds(args, folder, parser)
    if args.jobs is not None:
        parser.error("--jobs is for several seeds: give --seeds, such as --seeds 0-9")
    if restarted(args.run_dir):  # the same command goes on from the last checkpoint
        with parser.preparing(*MISTAKES):
            over = is_finished(args.run_dir)
        if over:  # a process was lost when the others were done
            with open_world("cpu") as world:
                if world.is_main:
                    print(f"{args.run_dir} was over before the restart: nothing is left to do")
            return 0
        args.resume, args.run_dir = args.run_dir, None
        args.seed = args.n_envs = args.backend = args.exact_resume = args.preset = None
        args.set = []
    with ExitStack() as stack:
        with parser.preparing(*MISTAKES):
            config = configure(args)
            world = stack.enter_context(open_world(None if config.device == "auto" else config.device))
            run = prepare(args, config, world)
        return train(args, run, parser)


if __name__ == "__main__":
    sys.exit(main())
