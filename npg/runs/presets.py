"""YAML files of presets, settings of the command line, and what is refused by name in either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from npg.checks import require

__all__ = ["check_kinds", "check_names", "mapping", "parse_settings", "preset_file", "read_yaml", "unknown"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, where PyYAML by itself reads a string; and Python's, inf and nan.

    0100 and 1:30, which YAML 1.1 takes to base 8 and 60, stay strings. A key that stands twice in a mapping is an
    error, as the standard says.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} stands twice: keep one of the two", key.start_mark
                    )
                seen.add(key.value)
        return node


_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$", re.ASCII),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.?(inf|nan)|\.(Inf|INF|NaN|NAN))$",
        re.ASCII,
    ),
    list("-+.0123456789in"),
)


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """A YAML file that holds a mapping; nothing is run from it.

    Raises:
        ValueError: if it cannot be read, or is anything else.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return mapping(str(path), content)


def preset_file(preset: str) -> Path | None:
    """The YAML file that a preset's name means; None for a name that is no path.

    Raises:
        ValueError: if it is a path, and there is no such file.
    """
    path = Path(preset)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(f"preset {preset!r}: there is no such file")
    return None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["target_kl=0.02", …]`` → ``{"target_kl": 0.02, …}``; values are YAML.

    Raises:
        ValueError: for a setting that is not ``key=value``, whose value is not YAML, or which has two values.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ValueError(f"setting {setting!r} must have the form key=value, such as gamma=0.99")
        try:
            new = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"setting {setting!r}: the value is not YAML") from error
        if key in parsed and repr(parsed[key]) != repr(new):  # of NaN, too
            raise ValueError(f"setting {key} is given twice, as {parsed[key]!r} and {new!r}: keep one of the two")
        parsed[key] = new
    return parsed


# Checks ---------------------------------------------------------------------------------------------------------------


def check_names(what: str, names: Iterable[str], known: Iterable[str], where: str = "", remedy: str = "") -> None:
    """Raise ValueError for the first of `names` that is not `known`, and tell the nearest known ones, or all."""
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown(what, name, known, where, remedy)


def unknown(what: str, name: object, known: Iterable[str], where: str = "", remedy: str = "") -> ValueError:
    """The error for a name that is not known, with the nearest known ones, or all."""
    lower = {str(k).lower(): str(k) for k in known}
    nearest = [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower)]
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are: {', '.join(lower.values())}."
    message = f"unknown {what} {str(name)!r} {where}".rstrip()
    return ValueError(f"{message}: {hint} {remedy}".rstrip())


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A copy of `value`, a mapping or None, which is an empty one; else ValueError."""
    require(value is None or isinstance(value, Mapping), name, value, "a mapping")
    return dict(value or {})


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a word"),
    "tuple[float, ...]": ((list, tuple), "a list of numbers"),
    "dict[str, Any]": (Mapping, "a mapping"),
}


def check_kinds(configuration: Any, *names: str) -> None:
    """Raise ValueError for a field of a dataclass whose value, from YAML or a caller, is not what it is annotated with.

    Args:
        configuration: an instance; its module must have ``from __future__ import annotations``.
        names: of the fields that are looked at; by default all.
    """
    for field in fields(configuration):
        if names and field.name not in names:
            continue
        value = getattr(configuration, field.name)
        kind, optional, _ = str(field.type).partition(" | ")
        types, words = _KINDS[kind]
        ok = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
        if ok and kind.startswith("tuple"):
            ok = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        require(ok or (bool(optional) and value is None), field.name, value, words)
