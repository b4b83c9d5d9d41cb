"""Python's documentation as articles: what becomes one, in which order, and what is passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.data import python_docs
from fedbert_ds.data.python_docs import SHORTEST_ARTICLE, python_documentation

LONG = "words " * (SHORTEST_ARTICLE // 6 + 1)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def titles() -> list[str]:
    return [title for title, _ in python_documentation()]


def test_topics_then_modules_by_name_then_their_classes(library: Path) -> None:
    write(library / "pydoc_data" / "topics.py", f"topics = {{'with': {LONG!r}, 'assert': {LONG!r}}}\n")
    write(library / "b.py", f'"""{LONG}"""\nclass Outer:\n    """{LONG}"""\n    class Inner:\n        """{LONG}"""\n')
    write(library / "a" / "__init__.py", f'"""{LONG}"""\n')
    assert titles() == ["assert", "with", "a", "b", "b.Outer", "b.Inner"]


def test_a_modules_article_holds_its_functions_docstrings(library: Path) -> None:
    write(library / "m.py", f'"""{LONG}"""\ndef f():\n    """What f does."""\nasync def g():\n    """What g does."""\n')
    ((title, text),) = python_documentation()
    assert title == "m" and text.endswith("What f does.\n\nWhat g does.")


def test_remarks_tests_and_damaged_files_are_passed_over(library: Path) -> None:
    write(library / "short.py", '"""A remark."""\n')
    write(library / "test" / "long.py", f'"""{LONG}"""\n')
    write(library / "site-packages" / "other.py", f'"""{LONG}"""\n')
    write(library / "damaged.py", f'"""{LONG}"""\ndef (:\n')
    write(library / "null.py", f'"""{LONG}"""\n\0\n')
    write(library / "good.py", f'"""{LONG}"""\n')
    assert titles() == ["good"]


def test_nothing_is_imported(library: Path) -> None:
    write(library / "loud.py", f'"""{LONG}"""\nraise SystemExit("imported")\n')
    assert titles() == ["loud"]
