"""Train Stable-Baselines3's PPO or sb3-contrib's TRPO with RL Zoo's settings, in a run folder as ours.

    python scripts/benchmarks/peers.py sb3-ppo HalfCheetah-v5 --seed 0 --timesteps 1000000 --run-dir runs/x

The environments are `envs.make_vec_env`, as many as RL Zoo takes, under VecNormalize; what evaluates is what evaluates
ours. The settings are those of hyperparams/ppo.yml and hyperparams/trpo.yml of RL Zoo for the tasks of MuJoCo, whose
older versions it tuned them on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.callbacks import EpisodeRecorder, Evaluator, evaluation_seed
from agents.config import RunConfig
from agents.evaluation import Evaluation, evaluate, make_env
from agents.runs import RunFolder, SavedAgent, normalized, read_state, save_agent
from agents.state import set_statistics
from agents.training import FINAL_EPISODES
from envs import VecNormalize
from npg.parallel import World
from npg.runs.command_line import command
from npg.runs.signals import StopRequest

#: n_envs, and the arguments of the constructor where they are not its defaults.
WIDE: dict[str, Any] = {"log_std_init": -2, "ortho_init": False, "activation_fn": "ReLU", "net_arch": [256, 256]}
TRPO: dict[str, Any] = {
    **{"n_envs": 2, "n_steps": 1024, "batch_size": 128, "gamma": 0.99, "gae_lambda": 0.95, "learning_rate": 1e-3},
    **{"cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20},
}
ZOO: dict[str, dict[str, dict[str, Any]]] = {
    "sb3-ppo": {
        "HalfCheetah-v5": {
            **{"n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-5, "ent_coef": 0.000401762},
            **{"clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096},
            "policy_kwargs": WIDE,
        },
        "Hopper-v5": {
            **{"n_steps": 512, "batch_size": 32, "gamma": 0.999, "learning_rate": 9.80828e-5, "ent_coef": 0.00229519},
            **{"clip_range": 0.2, "n_epochs": 5, "gae_lambda": 0.99, "max_grad_norm": 0.7, "vf_coef": 0.835671},
            "policy_kwargs": WIDE,
        },
        "Walker2d-v5": {
            **{"n_steps": 512, "batch_size": 32, "gamma": 0.99, "learning_rate": 5.05041e-5, "ent_coef": 0.000585045},
            **{"clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.95, "max_grad_norm": 1, "vf_coef": 0.871923},
        },
        "Ant-v5": {},
        "Swimmer-v5": {"gamma": 0.9999},
        "Humanoid-v5": {
            **{"n_steps": 512, "batch_size": 256, "gamma": 0.95, "learning_rate": 3.56987e-5, "ent_coef": 0.00238306},
            **{"clip_range": 0.3, "n_epochs": 5, "gae_lambda": 0.9, "max_grad_norm": 2, "vf_coef": 0.431892},
            "policy_kwargs": WIDE,
        },
        "Reacher-v5": {
            **{"n_steps": 512, "batch_size": 32, "gamma": 0.9, "learning_rate": 0.000104019, "ent_coef": 7.52585e-8},
            **{"clip_range": 0.3, "n_epochs": 5, "gae_lambda": 1.0, "max_grad_norm": 0.9, "vf_coef": 0.950368},
        },
        "InvertedPendulum-v5": {
            **{"n_steps": 32, "batch_size": 64, "gamma": 0.999, "learning_rate": 0.000222425, "ent_coef": 1.37976e-7},
            **{"clip_range": 0.4, "n_epochs": 5, "gae_lambda": 0.9, "max_grad_norm": 0.3, "vf_coef": 0.19816},
        },
        "InvertedDoublePendulum-v5": {
            **{"n_steps": 128, "batch_size": 512, "gamma": 0.98, "learning_rate": 0.000155454, "ent_coef": 1.05057e-6},
            **{"clip_range": 0.4, "n_epochs": 10, "gae_lambda": 0.8, "max_grad_norm": 0.5, "vf_coef": 0.695929},
        },
    },
    "contrib-trpo": {
        "HalfCheetah-v5": TRPO | {"target_kl": 0.04},
        "Hopper-v5": TRPO,
        "Walker2d-v5": TRPO,
        "Ant-v5": TRPO,
        "Humanoid-v5": TRPO,
        "Swimmer-v5": TRPO | {"gamma": 0.9999},
    },
}


def trpo_settings(task: str) -> dict[str, Any]:
    """The arguments of sb3-contrib's TRPO for a task of MuJoCo, on the two environments that RL Zoo gives it."""
    return {name: value for name, value in ZOO["contrib-trpo"].get(task, TRPO).items() if name != "n_envs"}


def config_of(algo: str, task: str, seed: int, timesteps: int, threads: int | None) -> RunConfig:
    """The run: all of them are normalised, with the algorithm's discount."""
    given = {"n_envs": 1, **ZOO[algo][task]}
    normalize = {"norm_obs": True, "norm_reward": True, "gamma": given.get("gamma", 0.99)}
    fixed = {"seed": seed, "timesteps": timesteps, "threads": threads, "device": "cpu", "policy": "MlpPolicy"}
    return RunConfig(algo, task, n_envs=given.pop("n_envs"), normalize=normalize, hyperparameters=given, **fixed)


def algorithm(algo: str) -> type[BaseAlgorithm]:
    if algo == "sb3-ppo":
        return PPO
    from sb3_contrib import TRPO

    return TRPO


def train(config: RunConfig, run_dir: Path) -> None:
    """Train, evaluate on the way and at the end, and leave what a run of train_agent.py leaves."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    options = dict(config.hyperparameters)
    if "activation_fn" in options.get("policy_kwargs", {}):
        options["policy_kwargs"] = options["policy_kwargs"] | {"activation_fn": torch.nn.ReLU}
    env = normalized(make_env(config, config.n_envs, config.seed, evaluation=False), config, training=True)
    model = algorithm(config.algo)(config.policy, env, seed=config.seed, device="cpu", **options)
    folder = RunFolder.create(run_dir, config, command())
    model.set_logger(folder.logger())
    bare = make_env(config, config.n_eval_envs, evaluation_seed(config), evaluation=True)
    alone = World(torch.device("cpu"))
    evaluator = Evaluator(config, folder, normalized(bare, config, training=False), StopRequest(alone))
    recorder = EpisodeRecorder(folder.episodes(config.env), alone)
    model.learn(config.timesteps, callback=[recorder, evaluator])
    save_agent(model, folder.last)
    if not evaluator.is_done:
        evaluator.evaluate()
    recorder.close()
    finals = {name: final(config, files).to_dict() for name, files in (("last", folder.last), ("best", folder.best))}
    folder.write_json("final_evaluation.json", finals)


def final(config: RunConfig, files: SavedAgent) -> Evaluation:
    seed = evaluation_seed(config, final=True)
    bare = make_env(config, min(FINAL_EPISODES, config.n_eval_envs), seed, evaluation=True)
    env, state = normalized(bare, config, training=False), read_state(files)
    if isinstance(env, VecNormalize) and state is not None:
        set_statistics(env, state["statistics"])
    return evaluate(algorithm(config.algo).load(files.model, device="cpu"), env, FINAL_EPISODES, seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algo", choices=list(ZOO))
    parser.add_argument("task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--run-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.task not in ZOO[options.algo]:
        parser.error(f"RL Zoo has no settings of {options.algo} for {options.task}: {', '.join(ZOO[options.algo])}")
    train(config_of(options.algo, options.task, options.seed, options.timesteps, options.threads), options.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
