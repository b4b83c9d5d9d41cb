"""The digest of the kernels' sources changes with code that decides a count, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_kernels.golden_tables import (
    MODULES,
    compiled_sources,
    golden_path,
    read_table,
    record_digest,
    recorded_digest,
    sources_digest,
    write_table,
)
from fedbert_kernels.interpreter import HAVE_TRITON

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")


KERNEL = '''"""A kernel."""

from fedbert_kernels import launches
from fedbert_kernels.philox import keep_mask

WARPS = 4
"""Of a block."""


def kernel(x):
    """Doubles what is kept."""
    return 2 * keep_mask(x)  # both halves
'''


@pytest.fixture
def folder(tmp_path) -> Path:
    """A kernel, two files that it imports, and one that nobody imports."""
    sources = {
        "gelu": KERNEL,
        "launches": "from fedbert_kernels.launch import Launch\n\nDEFAULT = Launch(64)\n",
        "launch": "def Launch(rows):\n    return rows\n",
        "philox": "ROUNDS = 7\n",
        "compile_check": "TOGETHER = 12\n",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def digest_after(folder: Path, name: str, old: str, new: str) -> str:
    path = folder / f"{name}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return sources_digest(folder)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gelu", "WARPS = 4", "WARPS = 8"),
        ("gelu", "return 2 * keep_mask(x)", "return keep_mask(x) * 2"),
        ("gelu", "def kernel(x)", "def kernel(y)"),
        ("philox", "7", "10"),
        ("launches", "64", "128"),
        ("launch", "return rows", "return rows + 0"),
    ],
)
def test_other_code_is_another_digest(name: str, old: str, new: str, folder) -> None:
    before = sources_digest(folder)
    assert digest_after(folder, name, old, new) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gelu", "# both halves", "# left and right"),
        ("gelu", '"""A kernel."""', '"""Another title.\n\nAnd more."""'),
        ("gelu", "Of a block.", "Of each block."),
        ("gelu", '    """Doubles what is kept."""\n', ""),
        ("gelu", "def kernel(x)", "def kernel(\n    x,\n)"),
        ("compile_check", "12", "6"),
    ],
)
def test_comments_docstrings_line_breaks_and_other_files_do_not_count(name: str, old: str, new: str, folder) -> None:
    before = sources_digest(folder)
    assert digest_after(folder, name, old, new) == before


def test_another_release_of_triton_is_another_digest(folder, monkeypatch) -> None:
    import triton

    before = sources_digest(folder)
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    assert sources_digest(folder) != before


def test_files_of_this_package_that_count() -> None:
    counting = set(compiled_sources())
    assert counting >= {*MODULES, "attention_kernels", "attention_launches", "compile_case", "disassembly"}
    assert counting >= {"interpreter", "launch", "philox", "row_philox"}
    assert not counting & {"attention_tuning", "compile_check", "compiled_rows", "patch_modules"}
    assert not counting & {"attention_choice", "attention_rivals", "choice", "row_choice"}


def test_tables_and_digest_come_back(tmp_path) -> None:
    table = {"k sm_90": {"registers": 128, "loop": {"float": 100}}, "l sm_80": {"error": "none"}}
    assert recorded_digest(tmp_path) is None
    write_table(golden_path("gelu", tmp_path), table)
    assert read_table(golden_path("gelu", tmp_path)) == table
    assert recorded_digest(tmp_path) is None
    record_digest(tmp_path)
    assert recorded_digest(tmp_path) == sources_digest()
