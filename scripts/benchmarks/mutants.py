"""Change the core in one place at a time, and see whether a test notices: `mutants.py --csv docs/results/mutants.csv`.

A mutant is a module with one small change: another comparison, operator, number, branch or reduction, or a statement
left out. Messages of errors, annotations and docstrings are left alone. No file is changed: each mutant runs in a fork
that imports the changed module in the place of the one on disk.

1. Every test runs once, unchanged, while the lines that it reaches are recorded; one that fails is not used.
2. Each mutant meets the tests that reach its statement, the quickest first, until one fails (killed) or all pass
   (survived). One that takes several times as long as they do is one that was noticed (timeout). ``--seconds``
   bounds how many tests it meets.

The table is written row by row; the same command goes on where it was stopped. The column ``why`` is for you: the
reason for which a survivor is no fault. ``--again`` gives the survivors that have none to the tests once more, and
no other.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from hashlib import sha256
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import spec_from_file_location
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis  # noqa: F401 - here and below what the forks need, once for all
import numpy as np  # noqa: F401
import pytest
import scipy.sparse.linalg  # noqa: F401
import torch.distributions
import torch.func

ROOT = Path(__file__).parents[2]
TESTS = {
    "npg/solvers": "solvers mistakes",
    "npg/trust_region.py": "trust_region step",
    "npg/step.py": "step mistakes constraint",
    "npg/constraint.py": "constraint",
    "npg/fisher.py": "fisher families mistakes geometry",
    "npg/families": "families mistakes geometry",
    "npg/geometry.py": "geometry mistakes",
    "npg/linearize.py": "linearize fisher",
}
"""By the beginning of a module's path, the files tests/npg/test_*.py that are for it."""
UNUSED = ("test_at_extreme_outputs",)
"""Tests that take a minute."""
COLUMNS = ["module", "function", "line", "mutation", "result", "test", "commit", "why"]

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_PAIRS = [("max", "min"), ("amax", "amin"), ("argmax", "argmin"), ("maximum", "minimum"), ("all", "any")]
_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS}
_DROPPED = ("abs", "clone", "detach", "double", "sqrt", "square", "exp", "neg")


def changes(node: ast.AST, returns: str, stored: Counter[str]) -> Iterator[ast.AST]:
    """What may stand in the place of a node; `returns` and `stored`: the annotation and the names of its function."""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops[:i], _OPERATORS[type(op)](), *node.ops[i + 1 :]]
                yield ast.Compare(node.left, ops, node.comparators)
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in _OPERATORS:
            yield type(node)(**dict(ast.iter_fields(node)) | {"op": _OPERATORS[type(node.op)]()})
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield ast.Constant(value + 1 if isinstance(value, int) or value == 0 else 2 * value)
        case ast.Name(id=name, ctx=ast.Load()) if name in _NAMES:
            yield ast.Name(_NAMES[name], node.ctx)
        case ast.Attribute(attr=name) if name in _NAMES:
            yield ast.Attribute(node.value, _NAMES[name], node.ctx)
        case ast.Call(func=ast.Attribute(value=inner, attr=name), args=[], keywords=[]) if name in _DROPPED:
            yield inner
        case ast.Call(func=ast.Name(id="abs"), args=[inner]):
            yield inner
        case ast.Return(value=ast.expr() as value) if returns == "bool":
            yield ast.Return(ast.UnaryOp(ast.Not(), value))
        case ast.Return(value=ast.expr() as value) if returns in ("Tensor", "float", "int"):
            yield ast.Return(ast.UnaryOp(ast.USub(), value))
    if isinstance(node, ast.If | ast.IfExp):
        for value in (True, False):
            yield type(node)(**dict(ast.iter_fields(node)) | {"test": ast.Constant(value)})
    again = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and stored[node.targets[0].id] > 1
    if again or isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()


class Mutant:
    """One change of a module: the node at `path` becomes `new`; tests that reach `lines` are for it."""

    def __init__(self, module: str, function: str, path: list[Any], old: Any, new: ast.AST, lines: range) -> None:
        self.module, self.function, self.path, self.new, self.lines = module, function, path, new, lines
        self.line = old.lineno
        head = (ast.unparse(ast.fix_missing_locations(deepcopy(node))).split("\n")[0] for node in (old, new))
        self.mutation = " → ".join(text if len(text) < 100 else text[:97] + "…" for text in head)

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is called in the table, however the lines move."""
        return self.module, self.function, self.mutation

    def code(self) -> Any:
        """The changed module."""
        tree: Any = ast.parse((ROOT / self.module).read_text())
        *path, last = self.path
        node = tree
        for key in path:
            node = node[key] if isinstance(key, int) else getattr(node, key)
        if isinstance(last, int):
            ast.copy_location(self.new, node[last])
            node[last] = self.new
        else:
            ast.copy_location(self.new, getattr(node, last))
            setattr(node, last, self.new)
        return compile(ast.fix_missing_locations(tree), str(ROOT / self.module), "exec")


def mutants_of(module: str) -> list[Mutant]:
    tree, found = ast.parse((ROOT / module).read_text()), []
    seen: Counter[tuple[str, str]] = Counter()

    def visit(
        node: Any, path: list[Any], function: list[str], returns: str, stored: Counter[str], lines: range
    ) -> None:
        if isinstance(node, ast.FunctionDef):
            function, returns = [*function, node.name], ast.unparse(node.returns) if node.returns else ""
            stored = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            stored.update(a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg))
            lines = range(node.body[0].lineno, node.end_lineno + 1)  # of its defaults: whoever enters
        elif isinstance(node, ast.ClassDef):
            function = [*function, node.name]
        elif isinstance(node, ast.If | ast.For | ast.With | ast.While):
            lines = range(node.lineno, node.body[0].lineno) or range(node.lineno, node.lineno + 1)
        elif isinstance(node, ast.stmt) and returns is not None:
            lines = range(node.lineno, node.end_lineno + 1)
        for new in changes(node, returns or "", stored):
            mutant = Mutant(module, ".".join(function), path, node, new, lines)
            seen[mutant.function, mutant.mutation] += 1
            nth = seen[mutant.function, mutant.mutation]
            mutant.mutation += f" ({nth})" if nth > 1 else ""
            found.append(mutant)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not _left_alone(child):
                    visit(child, [*path, field] + ([] if i is None else [i]), function, returns, stored, lines)

    visit(tree, [], [], None, Counter(), range(1, 10**6))  # outside of functions: whoever is in the module
    return found


def _left_alone(node: ast.AST) -> bool:
    """Messages, representations and declarations."""
    return isinstance(node, ast.Raise | ast.JoinedStr) or getattr(node, "name", "") in ("__repr__", "Protocol")


class Changed(InspectLoader, MetaPathFinder):
    """Gives one module other code."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.file, self.code = str(ROOT / mutant.module), mutant.code()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Of this module alone."""
        return spec_from_file_location(name, self.file, loader=self) if name == self.name else None

    def get_source(self, name: str) -> None:
        """None: what stands in the file is another."""

    def get_code(self, name: str) -> Any:
        """The changed code."""
        return self.code


class Reached:
    """A plugin that writes down which lines of `modules` each test reaches, its seconds, and whether it passes."""

    def __init__(self, modules: list[str]) -> None:
        self.files, self.lines, self.tests = {str(ROOT / m): m for m in modules}, set(), {}

    def _enter(self, frame: FrameType, event: str, value: Any) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: FrameType, event: str, value: Any) -> Any:
        self.lines.add((self.files[frame.f_code.co_filename], frame.f_lineno))
        return self._line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Around each test."""
        self.lines, started = set(), time.process_time()
        self.passed = True
        sys.settrace(self._enter)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            if self.passed and self.lines:
                self.tests[item.nodeid] = [time.process_time() - started, sorted(self.lines)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of its start, the test itself and its end."""
        self.passed = self.passed and not report.failed


class Killer:
    """A plugin that runs these tests alone, in this order, and knows the first that failed."""

    def __init__(self, tests: list[str]) -> None:
        self.order, self.killer = {test: i for i, test in enumerate(tests)}, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Choose and order."""
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of its start, the test itself and its end."""
        if report.failed:
            self.killer = self.killer or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """A module that cannot be imported, too, is a mutant that was noticed."""
        if report.failed:
            self.killer = self.killer or "import"


def in_a_child(work: Callable[[], Any], limit: float) -> Any:
    """What `work` returns in a silent fork, or None where it took more than `limit` seconds of CPU or died."""
    with tempfile.NamedTemporaryFile("r") as file:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_PROF, limit)  # which ends the process
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            try:
                Path(file.name).write_text(json.dumps(work()))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return json.loads(file.read() or "null")


def pytest_main(files: set[str], plugin: Any, *options: str) -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    return pytest.main([*sorted(files), "-q", "-p", "no:cacheprovider", *options], plugins=[plugin])


def reached(file: str, modules: list[str], folder: Path) -> dict[str, Any]:
    """Of each test of the file, its seconds and the lines; kept in `folder` until one of the files changes."""
    key = sha256("".join((ROOT / path).read_text() for path in [file, *modules]).encode()).hexdigest()
    kept = folder / f"{key}.json"
    if not kept.exists():

        def work() -> dict[str, Any]:
            plugin = Reached(modules)
            pytest_main({file}, plugin, "-k", "not " + " and not ".join(UNUSED))
            return plugin.tests

        kept.write_text(json.dumps(in_a_child(work, 3600)))
    return json.loads(kept.read_text())


def outcome(mutant: Mutant, tests: dict[str, Any], budget: float) -> tuple[str, str]:
    """Killed, survived, or timeout; and the test that killed it."""
    chosen = [test for test, (_, lines) in tests.items() if not lines.isdisjoint(mutant.lines)]
    chosen.sort(key=lambda test: tests[test][0])
    until = list(accumulate(tests[test][0] for test in chosen))
    chosen = [test for test, seconds in zip(chosen, until) if seconds <= budget]

    def work() -> str:
        sys.meta_path.insert(0, Changed(mutant))
        killer = Killer(chosen)
        status = pytest_main({test.split("::")[0] for test in chosen}, killer, "-x")
        return killer.killer or ("import" if status else "")

    if not chosen:
        return "survived", "no test reaches it"
    killed_by = in_a_child(work, 10 + 4 * until[len(chosen) - 1])
    return ("timeout", "") if killed_by is None else ("killed" if killed_by else "survived", killed_by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--modules", nargs="+", default=list(TESTS)[:6], help="beginnings of paths (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="N mutants, drawn from all (default: all)")
    add("--seconds", type=float, default=10, help="of CPU, for the tests of one mutant (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--csv", type=Path, required=True, help="the table to write, or to go on with")
    add("--again", action="store_true", help="run the survivors without a reason once more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()  # the forks need not look at what is here
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "npg").rglob("*.py"))
    modules = [m for m in every if any(m.startswith(start) for start in args.modules)]
    drawn = [mutant for m in modules for mutant in mutants_of(m)]
    print(f"{len(drawn)} mutants of {len(modules)} modules", flush=True)
    random.Random(args.seed).shuffle(drawn)
    rows = {}
    if args.csv.exists():
        with args.csv.open(newline="") as file:
            rows = {(row["module"], row["function"], row["mutation"]): row for row in csv.DictReader(file)}
    open_ = {key for key, row in rows.items() if row["result"] == "survived" and not row["why"]}
    if args.again:  # whichever are drawn today
        drawn = [mutant for mutant in drawn if mutant.key in open_]
        for key in open_ - {mutant.key for mutant in drawn}:
            print(f"no longer in the code: {' '.join(key)}", flush=True)
    folder = Path(tempfile.gettempdir()) / "npg-mutants"
    folder.mkdir(exist_ok=True)
    tests: dict[str, dict[str, Any]] = {}
    commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], text=True).strip()
    for mutant in drawn[: args.limit]:
        if mutant.key in rows and not args.again:
            continue
        if mutant.module not in tests:
            core = [m for m in every if any(m.startswith(start) for start in TESTS)]
            tests[mutant.module] = {}
            for name in next(names for start, names in TESTS.items() if mutant.module.startswith(start)).split():
                for test, (seconds, lines) in reached(f"tests/npg/test_{name}.py", core, folder).items():
                    here = {line for module, line in lines if module == mutant.module}
                    tests[mutant.module][test] = (seconds, here)
        result, test = outcome(mutant, tests[mutant.module], args.seconds)
        found = [mutant.module, mutant.function, mutant.line, mutant.mutation, result, test, commit, ""]
        print(f"{result:<9}{mutant.module}:{mutant.line} {mutant.mutation}   {test}", flush=True)
        rows[mutant.key] = dict(zip(COLUMNS, map(str, found)))
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(rows.values(), key=lambda row: (row["module"], int(row["line"]), row["mutation"])))
    results = Counter(row["result"] + (", explained" if row["why"] else "") for row in rows.values())
    print(", ".join(f"{count} {result}" for result, count in sorted(results.items())))


if __name__ == "__main__":
    main()
