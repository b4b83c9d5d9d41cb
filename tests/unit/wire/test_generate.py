"""The committed protobuf code is what fedbert.proto makes."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fedbert_ds.wire.generate import ROOT, generate

FILES = ("fedbert_ds/wire/fedbert_pb2.py", "fedbert_ds/wire/fedbert_pb2_grpc.py")


def committed_version() -> str:
    found = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (ROOT / FILES[1]).read_text(encoding="utf-8"))
    assert found
    return found[1]


@pytest.fixture
def tools() -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is missing (dev extra): freshness is not checked")
    installed = metadata.version("grpcio-tools")
    if installed != committed_version():
        pytest.skip(f"grpcio-tools {installed} writes other code than {committed_version()}: freshness is not checked")


@pytest.mark.usefixtures("tools")
def test_generated_code_is_fresh(tmp_path: Path) -> None:
    generate(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), (
            f"{name} is not what fedbert.proto makes; run: python -m fedbert_ds.wire.generate"
        )
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")} == set(FILES)


@pytest.mark.usefixtures("tools")
def test_the_command_writes_where_it_is_told(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "fedbert_ds.wire.generate", str(tmp_path)], check=True, timeout=60)
    assert all((tmp_path / name).is_file() for name in FILES)
