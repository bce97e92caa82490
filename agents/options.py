"""The arguments of an algorithm's constructor, each said once: its name, type, default, range and meaning.

    class TRPO(NaturalPolicyAlgorithm):
        target_kl: float = option(default=0.01, check=positive, doc="δ, in nats.")

An option is an argument of the constructor, a line of the docstring and an attribute of the object, which may be
written later and is then checked alike. A class has the options of its base classes and its own. ``help(TRPO)``,
``inspect.signature(TRPO)`` and type checkers see all of them.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from agents.schedules import schedule, value_at

__all__ = ["HasOptions", "Option", "option"]

Check = Callable[[str, Any], object]
_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One argument of a constructor; see `option`."""

    default: Any
    doc: str
    check: Check | None
    after: str | None
    keyword: bool
    annotation: str = ""
    scheduled: bool = False
    attribute: bool = True


def option(
    *,
    default: Any = _REQUIRED,
    doc: str = "",
    check: Check | None = None,
    after: str | None = None,
    keyword: bool = False,
    annotation: str = "",
    scheduled: bool = False,
    attribute: bool = True,
) -> Any:
    """Declare an option in the body of a class that `HasOptions`.

    Args:
        default: its default; without one it has to be given.
        doc: what it means, for the docstring; without it the docstring leaves it out.
        check: raises an error that names both for an ill-fitting (name, value): see `npg.checks`.
        after: the option behind which it stands in the signature; by default it stands last.
        keyword: whether it can be given by name only.
        annotation: its type for the signature, where the attribute has another one.
        scheduled: whether it may be a function of the remaining progress, or the name of one (`agents.schedules`);
            its first value is checked, and the attribute is the function.
        attribute: whether it is an attribute too; else that of this name, if any, is something else.
    """
    return Option(default, doc, check, after, keyword, annotation, scheduled, attribute)


class _Attribute:
    """An option as an attribute: what is written is checked as the constructor's argument is.

    Without ``__get__``, reading it is the plain look-up in the object's own attributes.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __set__(self, owner: HasOptions, value: Any) -> None:
        value = owner.checked(self.name, value)
        owner.option_written(self.name, value)
        vars(owner)[self.name] = value


@typing.dataclass_transform(field_specifiers=(option,))
class HasOptions:
    """A class whose constructor takes the options that it and its base classes declare."""

    options: ClassVar[Mapping[str, Option]] = {}
    """All options by name, in the order of the signature."""

    signature: ClassVar[inspect.Signature] = inspect.Signature()
    """Of the options."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [name for name, value in vars(cls).items() if isinstance(value, Option)]
        if not own:
            return
        every, names = dict(cls.options), list(cls.options)
        for name in own:
            declared = vars(cls)[name]
            every[name] = replace(declared, annotation=declared.annotation or cls.__annotations__[name])
            delattr(cls, name)  # the value is the object's
            if declared.attribute:
                setattr(cls, name, _Attribute(name))
            names.insert(len(names) if declared.after is None else names.index(declared.after) + 1, name)
        names.sort(key=lambda name: every[name].keyword)
        cls.options = {name: every[name] for name in names}
        cls.signature = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY if o.keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=o.default,
                    annotation=o.annotation,
                )
                for name, o in cls.options.items()
            ]
        )
        cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
        lines = [
            textwrap.fill(f"{name}: {o.doc}", 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
            for name, o in cls.options.items()
            if o.doc
        ]
        cls.__doc__ = (cls.__doc__ or "").rstrip().replace("{options}", "\n".join(lines).strip())

    @classmethod
    def bind(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The constructor's arguments by name, with defaults, all of them checked.

        Raises:
            TypeError: if an argument is unknown, missing, or of the wrong kind.
            ValueError: if a value is out of its range.
        """
        cls.refuse_unknown(kwargs)
        bound = cls.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {name: cls.checked(name, value) for name, value in bound.arguments.items()}

    @classmethod
    def refuse_unknown(cls, names: Iterable[str], others: Collection[str] = (), where: str = "") -> None:
        """Refuse arguments, or the names in ``where``, that are neither options nor one of the ``others``.

        Raises:
            TypeError: it says what is alike.
        """
        for name in (name for name in names if name not in cls.options and name not in others):
            nearest = difflib.get_close_matches(str(name), {*cls.options, *others})
            hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are: {', '.join(cls.options)}"
            got = f"{where} has the unknown name" if where else f"{cls.__name__} got an unexpected keyword argument"
            raise TypeError(f"{got} {name!r}: {hint}")

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """The value of an option as the attribute has it.

        Raises:
            TypeError: if it is of the wrong kind.
            ValueError: if it is out of its range.
        """
        option, first = cls.options[name], value
        if option.scheduled:
            value = schedule(name, value)
            first = value_at(value, 1.0)
        if option.check is not None:
            option.check(name, first)
        return value

    def option_written(self, name: str, value: Any) -> None:
        """Called before an option's attribute takes a new value: pass it on to what was made with the old one."""


def _constructor(cls: type[HasOptions]) -> Callable[..., None]:
    """The constructor of the class, or of its base, with the signature of all options, for `inspect` and `help`."""
    inner = vars(cls).get("__init__")

    def __init__(self: HasOptions, *args: Any, **kwargs: Any) -> None:
        (inner or super(cls, type(self)).__init__)(self, *args, **kwargs)

    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = inspect.Signature([owner, *cls.signature.parameters.values()])  # type: ignore[attr-defined]
    return __init__
