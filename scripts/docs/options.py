"""What the reference of griffe, which reads the source, cannot know: the arguments that `agents.options` declares."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe

_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_or_keyword,  # self
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class Options(griffe.Extension):
    """Gives classes whose docstring has ``{options}`` the docstring and the constructor that they have at run time."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for each class, once the package is read."""
        if cls.docstring is None or "{options}" not in cls.docstring.value:
            return
        found = getattr(import_module(cls.module.path), cls.name)
        cls.docstring.value = inspect.cleandoc(found.__doc__)
        parameters = [
            griffe.Parameter(
                p.name,
                annotation=None if p.annotation is p.empty else str(p.annotation),
                kind=_KINDS[p.kind],
                default=None if p.default is p.empty else repr(p.default),
            )
            for p in inspect.signature(found.__init__).parameters.values()
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))
