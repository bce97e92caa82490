from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from npg.checks import require
from npg.runs.presets import check_kinds, check_names, mapping, parse_settings, preset_file, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        (".5E+2", 50.0),
        ("1.5", 1.5),
        ("inf", math.inf),
        ("-inf", -math.inf),
        (".inf", math.inf),
        ("3", 3),
        ("1_000", 1000),
        ("0", 0),
        ("-7", -7),
        ("0x1F", 31),
        ("0b11", 3),
        ("0100", "0100"),
        ("-010", "-010"),
        ("08", "08"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("00.5", 0.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("1_0.5", 10.5),
        ("1.5e3", 1500.0),
        ("1.5e+3", 1500.0),
        ("-.INF", -math.inf),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("true", True),
        ("[64, 64]", [64, 64]),
        ("[1, 2e1]", [1, 20.0]),
        ("null", None),
        ("", None),
        ("dense", "dense"),
        ("infinite", "infinite"),
        ("e3", "e3"),
        ("a=b", "a=b"),
    ],
)
def test_settings_are_typed_as_yaml(text: str, value: object) -> None:
    (parsed,) = parse_settings([f"key={text}"]).values()
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_settings(["x=nan"])["x"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gamma", "setting 'gamma' must have the form key=value"),
        ("=1", "setting '=1' must have the form key=value"),
        ("lr={", "setting 'lr={': the value is not YAML"),
        ("x=!!python/object/apply:os.getcwd []", "the value is not YAML"),
    ],
)
def test_settings_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings([setting])


def test_a_file_is_read_with_the_same_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-3\nname: Ångström\n", encoding="utf-8")
    assert read_yaml(path) == {"lr": 1e-3, "name": "Ångström"}
    path.write_text("")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not YAML"),
        (b"- 1", r"mine.yaml must be a mapping; got \[1\]"),
        (b"text", "must be a mapping; got 'text'"),
        (b"a: \xff", "is not YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_a_file_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_yaml(path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)


def test_the_file_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert preset_file("tuned") is None
    Path("mine.yaml").touch()
    Path("plain").touch()
    assert preset_file("mine.yaml") == Path("mine.yaml")
    assert preset_file("plain") == Path("plain")
    with pytest.raises(ValueError, match=r"preset 'other\.yml': there is no such file"):
        preset_file("other.yml")


@dataclass
class Settings:
    steps: int = 3
    rate: float = 0.5
    quick: bool = False
    name: str = "a"
    places: tuple[float, ...] = (0.1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None


def test_what_is_of_its_kind_passes() -> None:
    check_kinds(Settings())
    check_kinds(Settings(rate=1, places=[], threads=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 1.0, "steps must be a whole number; got 1.0"),
        ("steps", True, "steps must be a whole number; got True"),
        ("steps", None, "steps must be a whole number; got None"),
        ("rate", "1e-3", "rate must be a number; got '1e-3'"),
        ("quick", 1, "quick must be true or false; got 1"),
        ("name", 3, "name must be a word; got 3"),
        ("places", 0.5, "places must be a list of numbers; got 0.5"),
        ("places", [0.5, True], r"places must be a list of numbers; got \[0.5, True\]"),
        ("options", [1], r"options must be a mapping; got \[1\]"),
        ("threads", "two", "threads must be a whole number; got 'two'"),
    ],
)
def test_another_kind_is_named(name: str, value: object, message: str) -> None:
    settings = Settings(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_kinds(settings)
    check_kinds(settings, *({"steps", "rate", "quick"} - {name}))  # the others alone


def test_names_are_told_with_the_nearest_or_all() -> None:
    check_names("fruit", ["pear"], ["apple", "pear"])
    with pytest.raises(ValueError, match=r"^unknown fruit 'Appel' in the bowl: did you mean apple\? Or cook\.$"):
        check_names("fruit", ["pear", "Appel"], ["apple", "pear"], "in the bowl", "Or cook.")
    with pytest.raises(ValueError, match=r"^unknown fruit '7': known are: apple, pear\.$"):
        check_names("fruit", [7], iter(["apple", "pear"]))  # type: ignore[list-item]


def test_a_mapping_is_copied_and_none_is_an_empty_one() -> None:
    given = {"a": 1}
    assert mapping("x", given) == given
    assert mapping("x", given) is not given
    assert mapping("x", None) == {}
    for wrong in (0, "", [], [1]):
        with pytest.raises(ValueError, match="x must be a mapping"):
            mapping("x", wrong)


def test_require() -> None:
    require(True, "x", 1, "odd")
    with pytest.raises(ValueError, match=r"^x must be odd; got 'two'$"):
        require(False, "x", "two", "odd")


@pytest.mark.parametrize("text", ["lr: 0.1\nepochs: 3\nlr: 0.5\n", "a: {lr: 0.1, lr: 0.1}", "a:\n- lr: 1\n  lr: 2\n"])
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"preset.yaml is not YAML: the key 'lr' stands twice: keep one .* line"):
        read_yaml(path)


def test_a_key_may_stand_in_two_mappings_and_be_merged(tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text("a: &a {lr: 1, x: 2}\nb: &b {<<: *a, lr: 3}\nc: {<<: *b, lr: 4}\n")
    assert read_yaml(path) == {"a": {"lr": 1, "x": 2}, "b": {"lr": 3, "x": 2}, "c": {"lr": 4, "x": 2}}


def test_a_setting_has_one_value() -> None:
    assert parse_settings(["lr=0.1", "x=1", "lr=1e-1"]) == {"lr": 0.1, "x": 1}
    with pytest.raises(ValueError, match=r"setting lr is given twice, as 0\.1 and 0\.5: keep one of the two"):
        parse_settings(["lr=0.1", "x=1", "lr=0.5"])
