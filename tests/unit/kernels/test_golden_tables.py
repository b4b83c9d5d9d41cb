"""The digest of the kernels' sources changes with code that decides a count, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedbert_kernels.golden_tables import (
    SOURCES,
    golden_path,
    read_table,
    record_digest,
    recorded_digest,
    sources_digest,
    write_table,
)
from fedbert_kernels.interpreter import HAVE_TRITON

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")


@pytest.fixture(scope="module")
def digest() -> str:
    return sources_digest()


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of the kernels to be edited."""
    for path in SOURCES.glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gelu", "num_warps=4", "num_warps=8"),
        ("layer_norm", "FORWARD_VALUES, BACKWARD_VALUES = 2048, 1024", "FORWARD_VALUES, BACKWARD_VALUES = 2048, 2048"),
        # Imported by kernel files, or by what they import.
        ("attention_kernels", "tl.exp2(scores - lse[:, None])", "tl.exp2(scores - lse[:, None] + 1)"),
        ("attention_launches", "Launch(128, 64, 8, 2)", "Launch(128, 64, 4, 2)"),
        ("philox", "tl.static_range(7)", "tl.static_range(10)"),
        ("interpreter", "return x.to(DTYPE)", "return x.to(DTYPE) + 0"),
        ("disassembly", "INSTRUCTION_BYTES = 16", "INSTRUCTION_BYTES = 8"),
        ("compile_case", "ARCHITECTURES = (80, 90, 100)", "ARCHITECTURES = (80, 90)"),
    ],
)
def test_other_code_is_another_digest(name: str, old: str, new: str, sources, digest) -> None:
    edit(sources / f"{name}.py", old, new)
    assert sources_digest(sources) != digest


def test_comments_docstrings_and_line_breaks_do_not_count(sources, digest) -> None:
    edit(sources / "gelu.py", "# ---- kernels ----", "# Other words.\n\n\n")
    edit(sources / "gelu.py", '"""', '"""Other words. ')
    edit(sources / "gelu.py", "def _fast(x: Tensor) -> bool:", "def _fast(\n    x: Tensor,\n) -> bool:\n    'New.'")
    assert sources_digest(sources) == digest


def test_files_that_no_kernel_imports_do_not_count(sources, digest) -> None:
    edit(sources / "patch_modules.py", 'PROJECTION = "projection"', 'PROJECTION = "other"')
    edit(sources / "compile_check.py", "TOGETHER = 12", "TOGETHER = 6")
    assert sources_digest(sources) == digest


def test_tables_and_digest_come_back(tmp_path) -> None:
    table = {"k sm_90": {"registers": 128, "loop": {"float": 100}}, "l sm_80": {"error": "none"}}
    assert recorded_digest(tmp_path) is None
    write_table(golden_path("gelu", tmp_path), table)
    assert read_table(golden_path("gelu", tmp_path)) == table
    assert recorded_digest(tmp_path) is None
    record_digest(tmp_path)
    assert recorded_digest(tmp_path) == sources_digest()
