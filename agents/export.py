"""A policy as one file that needs none of this package: raw observations in, actions for the environment out.

What an agent does around its network goes into the file (`agents.deployed`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecTransposeImage

from agents.average import acting_policy
from agents.deployed import DeployedPolicy, ExportError, generators_kept, steps_between
from envs import ActionMasks
from npg.checks import one_of
from npg.runs.files import replacing

__all__ = ["FORMATS", "DeployedPolicy", "ExportError", "description", "export_agent", "load_exported"]

Format = Literal["onnx", "torchscript", "torch-export"]
Act = Callable[..., NDArray[Any]]

FORMATS: dict[str, str] = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}
"""The formats, and the ends of their files' names."""

_ABOUT = "npg.json"


# Files ---------------------------------------------------------------------------------------------------------------


def export_agent(
    agent: BaseAlgorithm,
    path: Path | str,
    format: Format = "onnx",
    *,
    env: VecEnv | None = None,
    deterministic: bool = True,
) -> Path:
    """Write an agent's policy to a file, and compare what the file does with `predict`.

    Args:
        agent: TRPO, NPG, MDPO, CPO, or another one with an actor-critic policy; not changed.
        path: of the file. It is replaced whole, after the comparison.
        format: ``"onnx"``, ``"torchscript"`` or ``"torch-export"``.
        env: as of `DeployedPolicy`.
        deterministic: act by the mode of the policy, or by samples.

    Returns:
        The path.

    Raises:
        ExportError: (a ValueError) for what cannot be exported, or whose file does not act as the agent does.
        ImportError: if a package is missing.
    """
    one_of("format", format, list(FORMATS))
    if format == "onnx" and (missing := [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]):
        raise ImportError(f'format="onnx" needs {" and ".join(missing)}: pip install {" ".join(missing)}')
    policy = DeployedPolicy(agent, env, deterministic).eval()
    if agent.get_env() is None:
        warnings.warn(
            f"this {type(agent).__name__} has no environments, so {path} will take observations as its policy does: if "
            "it learned under VecNormalize, whose statistics they would have, give them with set_env first",
            stacklevel=2,
        )
    path, about = Path(path), json.dumps(_about(agent, policy))
    with replacing(path) as partial:
        try:
            with torch.no_grad(), generators_kept(), _quietly():
                _WRITERS[format](policy, partial, about)
        except OSError:  # the disk is full, or the folder cannot be written to
            raise
        except Exception as error:  # exporters raise anything
            reason = " ".join(str(error).split())[:300]
            raise ExportError(
                f"{type(policy.policy).__name__} cannot be exported as {format}: {reason}. Its forward pass must be "
                "PyTorch operations that do not branch on the values of tensors"
            ) from error
        with generators_kept():
            _compare(agent, policy, load_exported(partial, format), steps_between(agent.get_env(), env)[1])
    return path


def load_exported(path: Path | str, format: Format | None = None) -> Act:
    """An exported policy as a function of arrays, one (N, …) for each part of the observation, that gives actions.

    The parts are given one after the other, in the order of `description`, or as one dict.

    Args:
        path: of the file.
        format: by default what the end of its name says.

    Raises:
        ValueError: for another end of the name.
    """
    path = Path(path)
    if format is None:
        ends = {end: name for name, end in FORMATS.items()}
        one_of("the end of path", path.suffix, list(ends))
        format = cast(Format, ends[path.suffix])
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]

        def run(*observations: Any) -> NDArray[Any]:
            return cast(NDArray[Any], session.run(None, dict(zip(names, _in_order(path, observations))))[0])

        return run
    with _quietly(), path.open("rb") as file:
        module: Any = torch.jit.load(file) if format == "torchscript" else torch.export.load(file).module()

    def act(*observations: Any) -> NDArray[Any]:
        with torch.no_grad():
            return module(*(torch.as_tensor(x) for x in _in_order(path, observations))).numpy()

    return act


def _in_order(path: Path, observations: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parts of an observation as the file takes them, out of a dict too."""
    if len(observations) == 1 and isinstance(observations[0], Mapping):
        names = list(description(path)["inputs"])
        if (given := observations[0]).keys() != set(names):
            raise ValueError(f"the observation must have the parts {names}, got {list(given)}")
        return tuple(given[name] for name in names)
    return observations


def description(path: Path | str) -> dict[str, Any]:
    """What an exported file says of itself: algorithm, steps trained, inputs and actions.

    Raises:
        ValueError: for another end of the file's name.
    """
    path = Path(path)
    one_of("the end of path", path.suffix, list(FORMATS.values()))
    files = {_ABOUT: ""}
    if path.suffix == FORMATS["onnx"]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        files = session.get_modelmeta().custom_metadata_map
    elif path.suffix == FORMATS["torchscript"]:
        with _quietly():
            torch.jit.load(path, _extra_files=files)
    else:
        with path.open("rb") as file:
            torch.export.load(file, extra_files=files)
    return cast(dict[str, Any], json.loads(files[_ABOUT]))


def _about(agent: BaseAlgorithm, policy: DeployedPolicy) -> dict[str, Any]:
    arrays = policy.example(1)
    return {
        "algorithm": type(agent).__name__,
        "timesteps": agent.num_timesteps,
        "deterministic": policy.deterministic,
        "inputs": {n: {"shape": x.shape[1:], "dtype": str(x.dtype)} for n, x in zip(policy.inputs, arrays)},
        "observation_space": str(policy.observation_space),
        "action_space": str(policy.policy.action_space),
    }


def _program(policy: DeployedPolicy) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    examples = tuple(torch.as_tensor(x) for x in policy.example(2))
    return torch.export.export(policy, examples, dynamic_shapes={"observations": tuple({0: batch} for _ in examples)})


def _onnx(policy: DeployedPolicy, path: Path, about: str) -> None:
    program = torch.onnx.export(
        _program(policy), input_names=policy.inputs, output_names=["action"], dynamo=True, verbose=False
    )
    assert program is not None
    program.model.metadata_props[_ABOUT] = about
    program.save(str(path), external_data=False)


def _torchscript(policy: DeployedPolicy, path: Path, about: str) -> None:
    _program(policy)  # which refuses branches on values, where a trace would keep the branch of the example
    traced = torch.jit.trace(policy, tuple(torch.as_tensor(x) for x in policy.example(2)), check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={_ABOUT: about})


def _torch_export(policy: DeployedPolicy, path: Path, about: str) -> None:
    with path.open("wb") as file:  # by its path it would insist on the end of the name
        torch.export.save(_program(policy), file, extra_files={_ABOUT: about})


_WRITERS: dict[str, Callable[[DeployedPolicy, Path, str], None]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "torch-export": _torch_export,
}


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of exporters, and the checks of values in distributions, which cannot be traced."""
    validate = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    exporter = logging.getLogger("torch.onnx")  # says that torchvision is missing, which nothing here needs
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
        torch.distributions.Distribution.set_default_validate_args(validate)


def _compare(agent: BaseAlgorithm, policy: DeployedPolicy, act: Act, steps: list[VecEnvWrapper]) -> None:
    """Refuse a file that does not act as the agent in its environments, on one observation and on several."""
    live, mode = acting_policy(agent), acting_policy(agent).training
    for n in (1, 7):
        arrays = policy.example(n, seed=n)
        actions = act(*arrays)
        seen: Any = arrays[0] if policy.keys is None else dict(zip(policy.keys, arrays))
        for step in steps:
            if isinstance(step, ActionMasks):
                continue
            change: Any = step.transpose_observations if isinstance(step, VecTransposeImage) else step.normalize_obs
            inside = isinstance(seen, dict) and not isinstance(step.observation_space, spaces.Dict)  # of ActionMasks
            seen = {**seen, "observation": change(seen["observation"])} if inside else change(seen)
        expected, _ = live.predict(seen, deterministic=True)
        wrong = actions.shape != expected.shape or not np.isfinite(actions).all()
        if not wrong and policy.deterministic:
            wrong = not _alike(live, seen, actions, expected)
        live.set_training_mode(mode)
        if wrong:
            raise ExportError(
                f"the exported {type(live).__name__} does not act as the agent: its forward pass depends on more than "
                "its observations, parameters, buffers and constructor's arguments, which is all that a saved model has"
            )


def _alike(policy: ActorCriticPolicy, observation: Any, actions: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Whether actions are equal up to rounding; discrete ones also if the policy finds them equally likely."""
    if isinstance(policy.action_space, spaces.Box):
        scale = np.maximum(1.0, np.abs(expected))
        return bool((np.abs(actions - expected) <= 1e-4 * scale).all())
    if (actions == expected).all():
        return True
    with torch.no_grad():
        distribution = policy.get_distribution(policy.obs_to_tensor(observation)[0])
        pair = (torch.as_tensor(a, device=policy.device) for a in (actions, expected))
        ours, theirs = map(distribution.log_prob, pair)
    return bool((ours >= theirs - 1e-4).all())
