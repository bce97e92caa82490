"""What mkdocs does beside rendering: links to files of the repository, pages from its root, tables from the code.

- A link that leaves docs/ leads to a page that shows the file, or lists the folder.
- CHANGELOG.md and CONTRIBUTING.md are pages.
- ``<!-- parameters of agents.TRPO -->`` becomes the table of the constructor's arguments.
- ``<!-- names of npg -->`` becomes the reference of all public names of the module.

What stands behind such a comment on its line is for readers of the repository, and is not on the site.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))  # the pages are of this code, installed or not
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".csv": "text", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    for name, page in ROOT_PAGES.items():
        if name != "README.md":
            files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    pages = [ROOT / name for name in ROOT_PAGES if name != "README.md"] + sorted(DOCS.rglob("*.md"))
    for path in sorted({target for page in pages for target in _outside(page)}):
        files.append(File.generated(config, _shown(path), content=_page_of(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    origin = next((ROOT / n for n, p in ROOT_PAGES.items() if p == uri and n != "README.md"), DOCS / uri)
    here = posixpath.dirname(uri)

    def moved(link: re.Match[str]) -> str:
        before, target, anchor = link.groups()
        path = _target(origin, target)
        if path is None or not path.exists():
            return link[0]
        return f"{before}{posixpath.relpath(_place(path), here or '.')}{anchor or ''})"

    markdown = _LINK.sub(moved, markdown)
    markdown = re.sub(r"<!-- parameters of (\S+) -->.*", lambda m: _parameters(m[1]), markdown)
    return re.sub(r"<!-- names of (\S+) -->.*", lambda m: _names(m[1]), markdown)


# Links ----------------------------------------------------------------------------------------------------------------


def _target(origin: Path, target: str) -> Path | None:
    if re.match(r"[a-z]+:", target):
        return None
    path = (origin.parent / target).resolve()
    return path if path.is_relative_to(ROOT) else None


def _outside(page: Path) -> list[Path]:
    """What a page links to that is no file of docs/."""
    paths = [_target(page, link[2]) for link in _LINK.finditer(page.read_text())]
    return [p for p in paths if p is not None and p.exists() and _place(p).startswith("source/")]


def _place(path: Path) -> str:
    """Where a file of the repository is on the site."""
    name = path.relative_to(ROOT).as_posix()
    if name in ROOT_PAGES:
        return ROOT_PAGES[name]
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) and path.is_file() else _shown(path)


def _shown(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def _page_of(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    if path.is_file():
        return f"# {name}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
    inside = [p for p in sorted(path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    up = "../" * name.count("/")
    if path.is_relative_to(DOCS):
        return f"# {name}\n\n" + "".join(
            f"- [{p.relative_to(path)}]({up}../{p.relative_to(DOCS).as_posix()})\n" for p in inside
        )
    return f"# {name}\n\n" + "".join(f"- {p.relative_to(path)}\n" for p in inside)


# From the code --------------------------------------------------------------------------------------------------------


def _parameters(name: str) -> str:
    """A table of an algorithm's options: each with its default and its sentence."""
    module, _, attribute = name.rpartition(".")
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for option, given in getattr(import_module(module), attribute).options.items():
        if given.doc:
            default = "required" if given.default is inspect.Parameter.empty else f"`{given.default!r}`"
            meaning = given.doc.replace("``", "`").replace("|", r"\|")
            rows.append(f"| `{option}` | {default} | {meaning} |")
    return "\n".join(rows)


def public_names(module: str) -> list[str]:
    """``__all__`` of a module, as it is written."""
    path = ROOT.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError(f"{module} has no __all__")


def _names(module: str) -> str:
    folder = ROOT.joinpath(*module.split("."))  # whose modules and packages have pages of their own
    names = [n for n in public_names(module) if not ((folder / f"{n}.py").exists() or (folder / n).is_dir())]
    return "\n\n".join(f"::: {module}.{name}" for name in sorted(names))
