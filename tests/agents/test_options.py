"""Options are said once: in the signature, in the docstring, checked, and kept as attributes."""

from __future__ import annotations

import inspect
from functools import partial

import pytest

from agents.options import HasOptions, option
from npg.checks import number, one_of, whole


class Base(HasOptions):
    """A base.

    Args:
        {options}
    """

    first: int = option(check=partial(whole, low=1), doc="needed.")
    rate: float = option(default=0.5, check=partial(number, low=0, high=1), doc="a rate in [0, 1].")
    _setup: bool = option(default=True, attribute=False)
    kind: str = option(default="a", check=partial(one_of, known=("a", "b")), doc="which.", keyword=True)

    def __init__(self, *args: object, **kwargs: object) -> None:
        vars(self).update(self.bind(*args, **kwargs))


class Derived(Base):
    """One more.

    Args:
        {options}

    Raises:
        ValueError: sometimes.
    """

    steps: int = option(default=3, check=partial(whole, low=1), doc="of something, " * 12, after="first")


def test_the_signature_has_all_options_in_their_order_with_defaults():
    assert str(inspect.signature(Derived)) == (
        "(first: 'int', steps: 'int' = 3, rate: 'float' = 0.5, _setup: 'bool' = True, *, kind: 'str' = 'a')"
    )
    assert [*Base.options] == ["first", "rate", "_setup", "kind"]


def test_the_docstring_has_every_option_that_has_a_meaning_and_fits_the_line():
    doc = inspect.getdoc(Derived)
    assert "    first: needed.\n    steps: of something" in doc
    assert "_setup" not in doc
    assert doc.endswith("ValueError: sometimes.")
    assert max(map(len, Derived.__doc__.splitlines())) <= 120


def test_values_are_bound_by_place_and_by_name_and_kept_as_attributes():
    made = Derived(1, 5, kind="b")
    assert (made.first, made.steps, made.rate, made.kind) == (1, 5, 0.5, "b")
    assert Derived(1).steps == 3  # the value is the object's
    assert not hasattr(Derived, "_setup")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("first", 0, ValueError), ("steps", 1.0, TypeError), ("rate", 1.5, ValueError), ("kind", "c", ValueError)],
)
def test_what_is_written_later_is_checked_as_the_argument_is(name, value, error):
    made = Derived(1, 5)
    before = dict(vars(made))
    with pytest.raises(error, match=f"^{name} must"):
        setattr(made, name, value)
    assert vars(made) == before
    made.rate, made.other = 0.25, "anything"
    assert (made.rate, made.other) == (0.25, "anything")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TypeError, "missing a required argument: 'first'"),
        ((1,), {"rates": 1}, TypeError, r"unexpected keyword argument 'rates': did you mean rate or steps\?"),
        ((1,), {"xyz": 1}, TypeError, "unexpected keyword argument 'xyz': known are: first, steps, rate"),
        ((1, 2, 3.0), {}, ValueError, "rate must lie in"),
        ((1.5,), {}, TypeError, "first must be a whole number"),
        ((1,), {"kind": "c"}, ValueError, "kind must be 'a' or 'b', got 'c'"),
        ((1,), {"kind": []}, ValueError, "kind must be 'a' or 'b'"),
    ],
)
def test_mistakes_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Derived(*arguments, **options)


def test_a_class_with_a_constructor_of_its_own_is_shown_as_it_is():
    class Own(Derived):
        def __init__(self, size: int, **options: object) -> None:
            super().__init__(first=size, **options)

    assert [*inspect.signature(Own).parameters] == ["size", "options"]
    assert Own(4, steps=2).steps == 2
