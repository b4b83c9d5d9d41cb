"""Python's own documentation as articles, read from source files; nothing is imported."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST_ARTICLE = 150
"""Characters below which a docstring is a remark, not an article."""

# Tests hold little prose, topics are read apart; some releases of Python lack the others.
_SKIPPED = frozenset(
    {"__pycache__", "test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
)


def python_documentation() -> Iterator[tuple[str, str]]:
    """Yield (title, text) of the standard library's documentation, in the same order on every run.

    The language reference's topics come first, then one article for each module (its docstring and
    its functions') and each class (its docstring and its methods'). Articles below SHORTEST_ARTICLE
    characters are left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    for title, text in _topics(library / "pydoc_data" / "topics.py"):
        if len(text) >= SHORTEST_ARTICLE:
            yield title, text
    for path in _sources(library):
        parts = path.relative_to(library).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for title, text in _module_articles(path, module):
            if len(text) >= SHORTEST_ARTICLE:
                yield title, text


def _sources(folder: Path) -> Iterator[Path]:
    """Source files under a folder, by name, without those of skipped names."""
    for path in sorted(folder.iterdir()):
        if path.name.removesuffix(".py") in _SKIPPED:
            continue
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = _parse(path) if path.is_file() else None
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            for name in sorted(topics):
                yield name, topics[name].strip()


def _module_articles(path: Path, module: str) -> Iterator[tuple[str, str]]:
    tree = _parse(path)
    if tree is None:
        return
    yield module, "\n\n".join(_docstrings(tree))
    for node in _classes(tree):
        yield f"{module}.{node.name}", "\n\n".join(_docstrings(node))


def _classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    """Every class, outer ones first.

    The order of `ast.walk`, which also visits expressions: many nodes and no class.
    """
    level: list[ast.AST] = [tree]
    while level:
        children = [child for node in level for child in ast.iter_child_nodes(node)]
        level = [child for child in children if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))]
        yield from (node for node in level if isinstance(node, ast.ClassDef))


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child)


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None  # a damaged or template file in the library costs its own article only
