"""Every file that a page names exists, prose wraps at 100 columns, and the page of errors is made
of the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md",
         ROOT / "kernels" / "README.md"]  # fmt: skip
PROSE_COLUMNS = 100


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_path_in_the_architecture_is_there() -> None:
    """Also paths that are no links: `folder/file.py`, and the rooms of the drawing."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"[a-z_]+(?:/[a-z_]+)*(?:\.py|\.proto|/)(?![a-z_])", text))
    places = (ROOT, ROOT / "fedbert_ds", ROOT / "fedbert_ds" / "server", ROOT / "docs")
    assert len(paths) > 40
    assert sorted(path for path in paths if not any((place / path).exists() for place in places)) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_prose_wraps(page: Path) -> None:
    long, in_code = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        # Tables, code, pictures and lines of one link cannot be wrapped.
        elif not in_code and len(line) > PROSE_COLUMNS and not re.match(r"\s*(\||!\[|<|- \[|\d+\. \[)", line):
            long.append(number)
    assert long == []


def errors_page() -> ModuleType:
    """.ci/errors_page.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / ".ci" / "errors_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_is_made_of_this_code() -> None:
    """Whoever changes a message writes the page anew, and names in it what to change."""
    made = errors_page()
    assert made.without_remedy() == []
    is_same = (ROOT / made.PAGE).read_text(encoding="utf-8") == made.page()
    assert is_same, f"{made.PAGE} is not made of this code; run: {made.COMMAND}"
