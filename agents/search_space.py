"""What is searched: the ranges and choices of settings, in YAML, and how Optuna is asked for them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.config import ALGORITHMS, RunConfig
from agents.schedules import first_value, is_named, named
from npg.checks import number, require
from npg.runs.presets import check_names, mapping, read_yaml

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["coded", "load_space", "settings_of", "suggested", "value_of", "value_or", "widened"]


def load_space(algo: str, path: Path | None = None) -> dict[str, Any]:
    """The search space of an algorithm, out of a YAML file; by default ``agents/presets/search.yaml``.

    Raises:
        ValueError: if the file is damaged, has no entry for the algorithm, or an entry is no range and no list.
    """
    check_names("algorithm", [algo], ALGORITHMS)
    file = resources.files("agents") / "presets" / "search.yaml" if path is None else path
    entries = read_yaml(file)
    check_names("search space", [algo], entries, f"in {file}")
    space = mapping(f"{file}: {algo}", entries[algo])
    require(len(space) > 0, f"{file}: {algo}", space, "a mapping of settings")
    for name, given in space.items():
        _check_range(name, mapping(f"{file}: {name}", given))
    return space


def _check_range(name: str, given: Mapping[str, Any]) -> None:
    check_names("word", given, ["low", "high", "log", "step", "choices"], f"in the search space of {name}")
    if "choices" in given:
        ok = isinstance(given["choices"], list) and len(given["choices"]) > 0 and len(given) == 1
        require(ok, f"the search space of {name}", dict(given), "either choices: [a, b, …], or low and high")
        return
    low, high = (given.get(end) for end in ("low", "high"))
    ok = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in (low, high))
    require(ok and low < high, f"the search space of {name}", dict(given), "low < high, or choices")  # type: ignore[operator]
    require(not given.get("log") or low > 0, f"low of {name}", low, "above 0, with log")  # type: ignore[operator]
    if "step" in given:
        require(not given.get("log"), f"step of {name}", given["step"], "left out, with log")
        number(f"step of {name}", given["step"], 0, above=True)
        whole = not (isinstance(low, int) and isinstance(high, int)) or given["step"] == given["step"] // 1
        require(whole, f"step of {name}", given["step"], "a whole number, as low and high")


def widened(name: str, given: Mapping[str, Any], value: Any) -> dict[str, Any]:
    """A range or list that has the preset's value; raises ValueError for a value that no range has.

    Where the preset has a schedule such as ``linear_0.02``, the range is of its first value.
    """
    if "choices" in given:
        known = any(type(value) is type(c) and value == c for c in given["choices"])
        return {"choices": [*given["choices"], *([] if known else [value])]}
    if is_named(value):
        given, value = {**given, "schedule": "linear"}, first_value(name, value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (given.get("log") and value <= 0):
        raise ValueError(
            f"{name} is {value!r} in the preset, which no range has, but the search begins there: give {name} choices "
            "in the search space, or leave it out and set it"
        )
    return {**given, "low": min(given["low"], value), "high": max(given["high"], value)}


def value_of(config: RunConfig, name: str) -> Any:
    """What a run has for a setting; KeyError where it has none."""
    outer, *inner = name.split(".")
    value = config.hyperparameters[outer] if outer in config.hyperparameters else getattr(config, outer)
    for key in inner:
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[key]
    return value


def coded(choices: list[Any]) -> list[Any]:
    """Optuna takes plain values only: others as their JSON."""
    return [c if c is None or isinstance(c, bool | int | float | str) else json.dumps(c) for c in choices]


def suggested(trial: Trial, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that Optuna proposes for a trial."""
    for name, given in space.items():
        if "choices" in given:
            trial.suggest_categorical(name, coded(given["choices"]))
        elif isinstance(given["low"], int) and isinstance(given["high"], int):
            trial.suggest_int(name, given["low"], given["high"], step=given.get("step", 1), log=given.get("log", False))
        else:
            trial.suggest_float(name, given["low"], given["high"], step=given.get("step"), log=given.get("log", False))
    return settings_of(trial.params, space)


def settings_of(params: Mapping[str, Any], space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Optuna's parameters as settings."""
    settings = dict(params)
    for name, value in params.items():
        if "choices" in space[name]:
            settings[name] = space[name]["choices"][coded(space[name]["choices"]).index(value)]
        elif "schedule" in space[name]:
            settings[name] = named(value)
    return settings


def value_or(config: RunConfig, name: str, given: Mapping[str, Any]) -> Any:
    """What a run has for a setting; where it has none, the first that its range or list has."""
    try:
        return value_of(config, name)
    except KeyError:
        return given["choices"][0] if "choices" in given else given["low"]
