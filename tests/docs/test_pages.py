"""The pages of docs/ and of the root: their links, their messages, and the public names that the reference shows."""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from agents.statistics import interquartile_mean
from npg import acceleration
from npg.optim import NGD, DiagonalNGD, KLShampoo, OnlineNGD

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = [
    "npg",
    "npg.families",
    "npg.solvers",
    "npg.optim",
    "npg.curvature.kronecker",
    "npg.curvature.preconditioners",
]
MODULES += ["npg.mirror", "npg.transport", "npg.acceleration", "npg.vision", "agents", "agents.afterstate"]
MODULES += ["agents.export", "agents.hybrid", "agents.masks", "agents.recurrent", "agents.tuning"]
MODULES += ["envs", "envs.hybrid", "envs.partial"]

once = pytest.mark.skipif(acceleration.mode.now == "off", reason="long, and the same without acceleration")

LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """Without code, in which brackets mean something else."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"`[^`\n]+`\)", ")", text)


def anchors(page: Path) -> set[str]:
    """As GitHub, and the site, name the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if i == 0 else f"{slug}-{i}" for slug, n in found.items() for i in range(n + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: there is no {path}"
        if anchor:
            assert anchor in anchors(path), f"{link}: {path.name} has no such heading"


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Tags are mkdocs' business."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    listed = re.findall(r"[\w/]+\.md", yaml.dump(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))
    hooks = (ROOT / "scripts" / "docs" / "hooks.py").read_text()
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert pages <= {*listed, *re.findall(r'"([\w/]+\.md)"', hooks)}


@once
@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "target_kl" in (site / "trpo" / "index.html").read_text()
    assert "{options}" not in (site / "api" / "agents" / "index.html").read_text()
    for module in MODULES:
        if module in ("npg.acceleration", "npg.vision"):
            continue  # not in the reference
        first, *inner = module.split(".")
        page = (site / "api" / (inner[0] if inner and first == "npg" else first) / "index.html").read_text()
        imported = importlib.import_module(module)
        for name in imported.__all__:
            if not inspect.ismodule(getattr(imported, name)):
                assert f'id="{module}.{name}"' in page, f"{module}.{name} is not in the reference"


# The README -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    assert all(len(block.splitlines()) <= 10 for block in blocks)


def rows_of(name: str, **wanted: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "results" / f"{name}.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def median_of(name: str, column: str, **wanted: str) -> float:
    return statistics.median(float(row[column]) for row in rows_of(name, **wanted))


def final(algo: str, task: str, timesteps: str) -> tuple[float, float]:
    """The interquartile mean of a preset's ten seeds, and the worst."""
    rows = rows_of("returns", config="preset", algo=algo, task=task, timesteps=timesteps)
    returns = [float(row["return_mean"]) for row in rows if int(row["seed"]) < 10]
    assert len(returns) == 10
    return interquartile_mean(np.array(returns)), min(returns)


def test_the_results_of_the_classifiers_are_those_of_their_files():
    text = (ROOT / "docs" / "quickstart_supervised.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([\w-]+)(?:, exact)? \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, re.M)
    assert len(table) == 9
    names = {"KLShampoo": "kl-shampoo", "OnlineNGD": "online-ngd", "DiagonalNGD": "diagonal-ngd", "K-FAC": "kfac"}
    for title, *shown in table:
        name = names.get(title, title.lower())
        expected = []
        for file in ("cifar_small", "cifar_small_rivals"):
            there = bool(rows_of(file, optimizer=name))
            for column, digits in (("epochs_to_70", 1), ("seconds_to_70", 0)):
                expected.append(f"{median_of(file, column, optimizer=name):.{digits}f}" if there else "–")
        assert shown == expected, title


def test_the_results_of_npg_are_those_of_their_file():
    text = (ROOT / "docs" / "npg.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+-v\d), ([\d,]+) steps \| (.*?) \|", text, re.M)
    assert len(rows) == 4
    for task, timesteps, shown in rows:
        mean, worst = final("npg", task, timesteps.replace(",", ""))
        numbers = [float(x.replace("−", "-")) for x in re.findall(r"−?\d+\.\d", shown)]
        assert numbers == ([500.0] if mean == worst else [round(mean, 1), round(worst, 1)]), task


def test_the_results_of_the_readme_are_those_of_their_files():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown: dict[str, list[str]] = {}
    for line in lines:
        for name in re.findall(r"\(docs/results/(\w+)\.csv\)", line):
            shown.setdefault(name, []).append(re.sub(r"\([^)]*\)", "", line).split("|", 2)[2])
    products = [
        median_of("fvp", "gradients_median", problem="mlp-64@2048", product=product)
        for product in ("ours", "double backward", "curvlinops")
    ]
    speeds = [
        median_of("end_to_end", "steps_per_second", env="HalfCheetah-v5", way=way) for way in ("ours", "sb3-contrib")
    ]
    rivals = "cifar_small_rivals"
    seconds = [median_of(rivals, "seconds_to_75", optimizer=name) for name in ("kl-shampoo", "muon", "soap")]
    for name in ("sgd", "online-ngd"):  # not in the median
        assert sum(row["seconds_to_75"] != "" for row in rows_of(rivals, optimizer=name)) < 2
    zoo = median_of("update", "times_faster_median", env="HalfCheetah-v5", update="ours, Zoo's critic")

    targets = yaml.safe_load((ROOT / "scripts" / "benchmarks" / "returns.yaml").read_text(encoding="utf-8"))
    published = [
        number for best in targets["mujoco"]["HalfCheetah-v5"]["published"] for number in (best["mean"], best["std"])
    ]
    expected = {
        "returns": [
            *(f"{x:,.0f}" for x in (*final("trpo", "HalfCheetah-v5", "1000000"), *published)),
            *(f"{x:.1f}" for x in final("trpo", "CartPole-v1", "200000")),
        ],
        "fvp": [f"{x:.2f}" for x in products],
        "end_to_end": [f"{x:,.0f}" for x in speeds],
        rivals: [f"{x:.0f}" for x in seconds],
        "update": [f"{zoo:.1f}"],
    }
    assert shown.keys() == expected.keys()
    for name, numbers in expected.items():
        cells = " ".join(shown[name])
        assert re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", cells) == numbers, name


# Docstrings -----------------------------------------------------------------------------------------------------------


def public_parts(thing: object) -> list[tuple[str, object]]:
    """The methods and properties that a class of ours has of its own."""
    if not inspect.isclass(thing):
        return []
    parts = []
    for name, part in vars(thing).items():
        if isinstance(part, classmethod | staticmethod):
            part = part.__func__
        if not name.startswith("_") and (inspect.isfunction(part) or isinstance(part, property)):
            parts.append((name, part))
    return parts


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    imported = importlib.import_module(module)
    assert imported.__doc__
    for name in imported.__all__:
        thing = getattr(imported, name)
        if inspect.ismodule(thing) or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        # a dataclass without a docstring gets its signature as one
        assert inspect.getdoc(thing), f"{module}.{name}"
        assert not thing.__doc__.startswith(f"{name}("), f"{module}.{name}"
        for part, function in public_parts(thing):
            inherited = any(getattr(getattr(base, part, None), "__doc__", None) for base in thing.__mro__[1:])
            assert inspect.getdoc(function) or inherited, f"{module}.{name}.{part}"


@pytest.mark.parametrize("module", MODULES)
def test_every_argument_of_a_public_function_is_explained(module):
    imported = importlib.import_module(module)
    for name in imported.__all__:
        function = getattr(imported, name)
        if not inspect.isfunction(function) or "Args:" not in (inspect.getdoc(function) or ""):
            continue
        for argument in inspect.signature(function).parameters:
            assert re.search(rf"^\s+{argument}\b.*:", function.__doc__, re.M), f"{module}.{name}: {argument}"


# Options --------------------------------------------------------------------------------------------------------------


OPTIONS = {"ngd": NGD, "kfac": NGD, "kl_shampoo": KLShampoo, "online_ngd": OnlineNGD, "diagonal_ngd": DiagonalNGD}


@pytest.mark.parametrize("page", OPTIONS)
def test_the_defaults_of_a_page_are_those_of_the_code(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    table = re.search(r"^\| Option.* \| Default \| Meaning \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", text, re.M)
    arguments = inspect.signature(OPTIONS[page]).parameters
    shown = {}
    for row in table[1].splitlines():
        names, defaults = re.match(r"\| (.*?) \| (.*?) \| ", row).groups()
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True):
            value = arguments[name.strip("`")].default
            assert (
                value is inspect.Parameter.empty
                if default == "required"
                else value == ast.literal_eval(default.strip("`"))
            ), row
            shown[name.strip("`")] = value
    if page != "kfac":
        assert shown.keys() == arguments.keys() - {"model", "family", "params"}


# The errors of the FAQ ------------------------------------------------------------------------------------------------


def messages() -> list[str]:
    """Every string of the code, with … where a value stands in it."""
    found = []
    for path in [p for folder in ("npg", "agents", "envs") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return [" ".join(m.split()) for m in found]


def test_the_errors_of_the_faq_are_those_of_the_code():
    known = messages()
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    assert len(headings) >= 10
    for heading in headings:
        pattern = ".*".join(re.escape(part.strip()) for part in heading.split("…"))
        assert any(re.search(pattern, message) for message in known), heading


def test_no_page_or_message_installs_from_an_index_what_is_not_there():
    for text in [*messages(), *(page.read_text(encoding="utf-8") for page in PAGES), *map(Path.read_text, NOTEBOOKS)]:
        assert "npg-toolkit[" not in text


# A release ------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_release_have_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] in ("Unreleased", project["version"])
    supported = {c.rsplit(" ", 1)[1] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert all(version in (ROOT / "docs" / "install.md").read_text() for version in supported)
    dev = project["optional-dependencies"]["dev"]
    assert any({"export", "tune", "docs", "notebooks"} <= set(re.findall(r"\w+", d)) for d in dev)


def test_the_forms_of_issues_are_whole():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) >= 3
    for form in forms:
        content = yaml.safe_load(form.read_text())
        if form.name != "config.yml":
            assert content["name"]
            assert content["description"]
            assert any(part["validations"]["required"] for part in content["body"] if "validations" in part)
