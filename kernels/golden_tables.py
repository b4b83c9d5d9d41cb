"""The golden tables of a Triton release: counts of every kernel, and a digest of their sources.

A release has a folder: a table for each kernel file, {"kernel name sm_90": counts}, and a digest of
the sources. While the sources have that digest, the tables are the measurement.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = ("attention", "layer_norm", "gelu", "linear_cross_entropy", "quantize")
"""Kernel files, in the order of the tables."""
SOURCES = Path(__file__).resolve().parent
GOLDEN = SOURCES.parent / "tests" / "unit" / "kernels" / "golden"

Row = dict[str, Any]
Table = dict[str, Row]


def golden_path(module: str, folder: Path = GOLDEN) -> Path:
    """The table of one kernel file for the installed Triton release; it need not exist."""
    return _release(folder) / f"{module}.json"


def read_table(path: Path) -> Table:
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


def write_table(path: Path, table: Table) -> None:
    """One row a line, so that a changed kernel is a changed line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in table.items())
    path.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")


def recorded_digest(folder: Path = GOLDEN) -> str | None:
    """Digest of the sources that the installed release's tables are of; None if not recorded."""
    path = _release(folder) / "sources.sha256"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def record_digest(folder: Path = GOLDEN) -> None:
    """Record that the installed release's tables are of the sources as they are now."""
    (_release(folder) / "sources.sha256").write_text(f"{sources_digest()}\n", encoding="utf-8")


def sources_digest(folder: Path = SOURCES) -> str:
    """SHA-256 of the code of `compiled_sources` and of Triton's release; the same in every Python.

    Comments, docstrings and line breaks do not count.
    """
    code = {name: _structure(tree) for name, tree in compiled_sources(folder).items()}
    text = json.dumps({"triton": _triton_version(), "code": code}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def compiled_sources(folder: Path = SOURCES) -> dict[str, ast.Module]:
    """Files that decide the counts: kernels, the disassembly, and their imports from here."""
    trees: dict[str, ast.Module] = {}
    unread = [*MODULES, "disassembly"]
    while unread:
        name = unread.pop()
        path = folder / f"{name}.py"
        # A name without a file is a function or constant of one.
        if name not in trees and path.exists():
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
            unread.extend(_imports(trees[name]))
    return trees


def _imports(tree: ast.Module) -> Iterator[str]:
    """Modules of this package that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == __package__:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{__package__}."):
            yield str(node.module).removeprefix(f"{__package__}.")


def _structure(node: Any) -> Any:
    """A syntax tree as lists and dictionaries.

    Empty fields count as absent, because Python's releases differ in them.
    """
    if isinstance(node, ast.AST):
        fields = {name: _structure(value) for name, value in ast.iter_fields(node)}
        return [type(node).__name__, {name: value for name, value in fields.items() if value not in (None, [])}]
    if isinstance(node, list):
        return [_structure(item) for item in node if not _is_docstring(item)]
    return node


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _release(folder: Path) -> Path:
    return folder / f"triton-{_triton_version()}"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)
