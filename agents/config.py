"""What a training run is made of, and the presets that fill it in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any

import torch
import yaml
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

import agents
from agents.base import NaturalPolicyAlgorithm
from agents.checks import device_of
from agents.schedules import is_named, schedule
from envs import VecNormalize
from envs.atari import Game
from envs.normalize import check_ranges
from envs.seeding import RUN_SEEDS
from npg.checks import require
from npg.runs.files import replacing
from npg.runs.presets import check_kinds, check_names, mapping, preset_file, read_yaml

__all__ = [
    "ALGORITHMS",
    "EXACT_RESUME",
    "PRESET_KEYS",
    "RunConfig",
    "agent_of",
    "given_settings",
    "hyperparameters_of",
    "load_preset",
    "policy_for",
    "preset_of",
    "resolve",
    "write_preset",
]

ALGORITHMS: dict[str, type[NaturalPolicyAlgorithm]] = {
    name.lower(): algorithm
    for name in agents.__all__
    if isinstance(algorithm := getattr(agents, name), type) and issubclass(algorithm, NaturalPolicyAlgorithm)
}
"""The name on the command line → the class: all that `agents` exports."""

PRESET_KEYS = ("timesteps", "n_envs", "normalize", "policy", "env_kwargs")
"""What a preset may hold beside the arguments of the algorithm's constructor."""

EXACT_RESUME = {
    "auto": "",
    "state": "a killed run resumes exactly: its checkpoints hold the state of the environments",
    "restart": "a killed run resumes exactly: each checkpoint begins new episodes",
    "off": "a killed run resumes with new episodes, and not exactly",
}
"""The values of `RunConfig.exact_resume`, and what each means."""

# Arguments of a constructor that the run itself fills in, and classes, which no text can name.
_NOT_SET = {
    *("policy", "env", "seed", "device", "verbose", "tensorboard_log"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "_init_setup_model"),
}


@dataclass(frozen=True)
class RunConfig:
    """A training run: everything that decides its result, and how it is watched.

    Attributes:
        algo: a name out of `ALGORITHMS`.
        env: an environment that `envs.make_vec_env` knows.
        seed: of the initialisation, the actions and the environments.
        timesteps: environment steps in all; the run ends with the first update at or after it.
        n_envs: environments that are stepped together.
        backend: of the environments: ``auto``, ``envpool`` or ``gymnasium``.
        device: ``cpu``, ``cuda``, …; ``auto`` is CUDA where there is one.
        threads: of PyTorch and of EnvPool; None leaves both at their default.
        policy: None takes MultiInputPolicy, CnnPolicy or MlpPolicy, by the observation.
        normalize: the arguments of VecNormalize; None does not normalise.
        env_kwargs: arguments of the environment.
        eval_freq: environment steps between two evaluations.
        eval_episodes: episodes of an evaluation during training.
        n_eval_envs: environments that are evaluated together.
        save_freq: environment steps between two checkpoints.
        exact_resume: how a run that was killed goes on as if it had not been. ``state``: its checkpoints hold the
            environments. ``restart``: at each checkpoint all environments begin new episodes, so that there is nothing
            to hold. ``off``: not at all; it begins new episodes, which the undisturbed run would not have. ``auto``
            takes ``state`` where that can be, and else ``restart``.
        env_timeout: seconds that one step or reset of all environments together may take, after which the run ends with
            an error that names it; 0 is no limit.
        hyperparameters: the arguments of the algorithm's constructor.

    Raises:
        ValueError: a value is out of its range.
    """

    algo: str
    env: str
    seed: int = 0
    timesteps: int = 100_000
    n_envs: int = 8
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    policy: str | None = None
    normalize: dict[str, Any] | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    eval_freq: int = None  # type: ignore[assignment]  # a twentieth of the timesteps
    eval_episodes: int = 10
    n_eval_envs: int = None  # type: ignore[assignment]  # one per episode
    save_freq: int = None  # type: ignore[assignment]  # a fifth of the timesteps
    exact_resume: str = "auto"
    env_timeout: float = 600.0
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self, "timesteps", "eval_episodes")
        filled_in = {
            "eval_freq": max(1, self.timesteps // 20),
            "save_freq": max(1, self.timesteps // 5),
            "n_eval_envs": self.eval_episodes,
        }
        for name, value in filled_in.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_kinds(self)
        for name in ("timesteps", "n_envs", "eval_episodes", *filled_in, "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(0 <= self.seed < RUN_SEEDS, "seed", self.seed, "at least 0 and less than 2**28")
        require(
            self.exact_resume in EXACT_RESUME, "exact_resume", self.exact_resume, f"one of {', '.join(EXACT_RESUME)}"
        )
        require(0 <= self.env_timeout < inf, "env_timeout", self.env_timeout, "a number of seconds, or 0 for no limit")
        device_of("device", self.device)

    def check_device(self) -> None:
        """Raise ValueError where this machine, which need not be the one of the run's beginning, lacks the device."""
        device = device_of("device", self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={self.device!r}: there are {torch.cuda.device_count()} CUDA devices; use cpu or auto"
            )

    def to_dict(self) -> dict[str, Any]:
        """The run as plain values, in the order of the fields."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """The run that `to_dict` wrote to a YAML file.

        Raises:
            ValueError: if the file is damaged, or its values are out of their ranges.
        """
        content = read_yaml(path)
        check_names("key", content, [f.name for f in fields(cls)], f"in {path}")
        if missing := {"algo", "env"} - content.keys():
            raise ValueError(f"{path} lacks {' and '.join(sorted(missing))}: it is not the config.yaml of a run")
        check_names("algorithm", [content["algo"]], ALGORITHMS, f"in {path}")
        return cls(**content)


def resolve(
    algo: str, env: str, *, preset: str | None = None, settings: Mapping[str, Any] | None = None, **options: Any
) -> RunConfig:
    """The run of `algo` on `env`: its preset, changed by `settings`, then by the fields of `RunConfig` in `options`.

    Args:
        algo: a name out of `ALGORITHMS`.
        env: the environment's id.
        preset: the name of a preset of the algorithm, or a YAML file of presets; by default the environment's own.
        settings: `PRESET_KEYS` and arguments of the constructor; a dot reaches into a mapping (``normalize.clip_obs``).
        options: fields of `RunConfig`; None is as if left out.

    Raises:
        ValueError: for a name that is not known (the nearest known ones are told) or a value out of its range.
    """
    check_names("algorithm", [algo], ALGORITHMS)
    defaults = hyperparameters_of(algo)
    known = [*PRESET_KEYS, *defaults]
    values = given_settings(algo, env, preset, settings)
    check_names("setting", values, known, f"for {algo}")

    given = {key: values.pop(key) for key in list(values) if key not in PRESET_KEYS}
    options_of = ALGORITHMS[algo].options
    named = {key for key, value in given.items() if is_named(value) and options_of[key].scheduled}
    for key in named:
        schedule(key, given[key])  # refused here; written as it is
    hyperparameters = defaults | {k: v if k in named else _like(defaults[k], k, v) for k, v in given.items()}
    if given.get("policy_kwargs") is not None:
        hyperparameters["policy_kwargs"] = mapping("policy_kwargs", given["policy_kwargs"])
    values |= {key: _like(1, key, values[key]) for key in ("timesteps", "n_envs") if key in values}
    values["env_kwargs"] = mapping("env_kwargs", values.get("env_kwargs"))
    values["normalize"] = _normalize(values.get("normalize"), hyperparameters)
    values |= {key: value for key, value in options.items() if value is not None}
    return RunConfig(algo=algo, env=env, hyperparameters=hyperparameters, **values)


def given_settings(
    algo: str, env: str, preset: str | None = None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a preset and the settings over it name, defaults left out; arguments as of `resolve`.

    Raises:
        ValueError: for a preset that is not known, or a setting that writes over a part of it that was given before.
    """
    values = load_preset(algo, env, preset)
    before: list[str] = []
    for key, value in (settings or {}).items():
        if over := [name for name in before if name.startswith(f"{key}.")]:
            raise ValueError(
                f"{key}={value!r} would write over {', '.join(over)}, which was given before it: give {key} first"
            )
        _set(values, key, value)
        before.append(key)
    return values


def hyperparameters_of(algo: str) -> dict[str, Any]:
    """The arguments of the algorithm's constructor that a run can set, and their defaults."""
    return {name: option.default for name, option in ALGORITHMS[algo].options.items() if name not in _NOT_SET}


# Presets --------------------------------------------------------------------------------------------------------------


def load_preset(algo: str, env: str, preset: str | None = None) -> dict[str, Any]:
    """The preset of `algo` called `preset`, over the entry ``default`` of its file.

    Without a name it is the environment's: its id, else ``Atari`` for an Atari game, else the default alone.

    Raises:
        ValueError: if there is no such file or preset, or the file is damaged.
    """
    path = None if preset is None else preset_file(preset)
    if path is not None:
        presets, name, preset = read_yaml(path), str(path), None
    else:
        builtin = resources.files("agents") / "presets" / f"{algo}.yaml"
        if not builtin.is_file() and preset is None:
            return {}
        presets, name = read_yaml(builtin), builtin.name
    for key, entry in presets.items():
        mapping(f"{name}: {key}", entry)
    if preset is not None:
        check_names("preset", [preset], presets, f"for {algo}", "Or give a .yaml file.")
    elif env in presets:
        preset = env
    elif "Atari" in presets and Game.parse(env, False, {}) is not None:
        preset = "Atari"
    else:
        preset = "default"
    return {**(presets.get("default") or {}), **(presets.get(preset) or {})}


def preset_of(config: RunConfig) -> dict[str, Any]:
    """A run, but for its seed and how it is watched, as the entry of a preset file: `resolve` makes the same of it."""
    defaults = hyperparameters_of(config.algo)
    preset: dict[str, Any] = {"timesteps": config.timesteps, "n_envs": config.n_envs}
    if config.normalize is not None:
        # The discount of the rewards is the algorithm's, whatever that is tuned to.
        own = config.normalize["gamma"] == config.hyperparameters.get("gamma")
        preset["normalize"] = {k: v for k, v in config.normalize.items() if not (own and k == "gamma")}
    if config.policy is not None:
        preset["policy"] = config.policy
    if config.env_kwargs:
        preset["env_kwargs"] = config.env_kwargs
    return preset | {k: v for k, v in config.hyperparameters.items() if v != defaults[k]}


def write_preset(path: Path, env: str, preset: Mapping[str, Any], comment: str = "") -> None:
    """Write a preset file of one environment, with a comment above it."""
    text = yaml.safe_dump({env: dict(preset)}, sort_keys=False)
    with replacing(path) as partial:
        partial.write_text((f"# {comment}\n" if comment else "") + text, encoding="utf-8")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        inner = values.get(name)
        values[name] = values = dict(inner) if isinstance(inner, Mapping) else {}
    values[last] = value


def _normalize(value: Any, hyperparameters: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of VecNormalize; rewards are scaled with the algorithm's own discount unless told otherwise."""
    if not value and value != {}:
        return None
    given = {} if value is True else mapping("normalize", value)
    parameters = list(inspect.signature(VecNormalize.__init__).parameters.values())
    defaults = {p.name: p.default for p in parameters if p.name not in ("self", "venv", "training")}
    if "gamma" in hyperparameters:
        defaults["gamma"] = hyperparameters["gamma"]
    check_names("argument", given, defaults, "of VecNormalize, in 'normalize'")
    arguments = defaults | {key: _like(defaults[key], f"normalize.{key}", value) for key, value in given.items()}
    check_ranges(arguments, "normalize.")
    return arguments


# Checks ---------------------------------------------------------------------------------------------------------------


def _like(default: Any, name: str, value: Any) -> Any:
    """`value`, if it is of the kind of a `default` that is a truth value or a number."""
    if isinstance(default, bool):
        require(isinstance(value, bool), name, value, "true or false")
    elif isinstance(default, int | float):
        require(isinstance(value, int | float) and not isinstance(value, bool), name, value, "a number")
        if isinstance(default, int):
            require(value == value // 1, name, value, "a whole number")
            return int(value)
    return value


def agent_of(config: RunConfig, policy: str, env: VecEnv) -> NaturalPolicyAlgorithm:
    """The agent that a configuration describes, not yet trained.

    Raises:
        ValueError: for a policy, an argument of it or an activation that is not known or does not fit.
        TypeError: for an option of the algorithm that is not of its kind.
    """
    algorithm = ALGORITHMS[config.algo]
    check_names("policy", [policy], algorithm.policy_aliases, f"for {config.algo}")
    hyperparameters = dict(config.hyperparameters)
    policy_kwargs = dict(hyperparameters.get("policy_kwargs") or {})
    if isinstance(name := policy_kwargs.get("activation_fn"), str):
        activation = getattr(torch.nn, name, None)
        if not (isinstance(activation, type) and issubclass(activation, torch.nn.Module)):
            raise ValueError(f"activation_fn={name!r} is not a class of torch.nn, such as Tanh or ReLU")
        policy_kwargs["activation_fn"] = activation
        hyperparameters["policy_kwargs"] = policy_kwargs
    parameters = inspect.signature(algorithm.policy_aliases[policy]).parameters
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        check_names("argument", policy_kwargs, parameters, f"of {policy}, in 'policy_kwargs'")
    for key in policy_kwargs.keys() & parameters.keys():
        default, name, value = parameters[key].default, f"policy_kwargs.{key}", policy_kwargs[key]
        require(not (isinstance(default, type) and isinstance(value, str)), name, value, "a class: give it in Python")
        _like(default, name, value)
    if isinstance(sizes := policy_kwargs.get("net_arch"), Mapping):
        check_names("network", sizes, ("pi", "vf"), "in policy_kwargs.net_arch")
    options = {"seed": config.seed, "device": config.device, "verbose": 0, **hyperparameters}
    agent = algorithm(policy, env, _init_setup_model=False, **options)
    try:
        agent._setup_model()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        chosen = {name: v for name, v in (("policy", config.policy), ("policy_kwargs", policy_kwargs)) if v}
        if not chosen:
            raise
        if policy == "CnnPolicy" and (config.normalize or {}).get("norm_obs"):
            chosen["normalize"] = "true, which makes floats of images (with norm_obs: false it does not)"
        given, why = ", ".join(f"{name}={value}" for name, value in chosen.items()), " ".join(str(error).split())
        raise ValueError(f"{given}: no {policy} can be made of them for these observations ({why})") from error
    return agent


def policy_for(space: spaces.Space[Any]) -> str:
    """The name of the usual policy for observations of this space."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"
