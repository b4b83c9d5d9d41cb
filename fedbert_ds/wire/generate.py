"""Regenerate the protobuf code from fedbert.proto (needs grpcio-tools, in the dev extra)."""

from __future__ import annotations

import sys
from pathlib import Path

PROTO = "fedbert_ds/wire/fedbert.proto"
ROOT = Path(__file__).resolve().parents[2]


def generate(target: Path) -> None:
    """Write fedbert_pb2.py and fedbert_pb2_grpc.py under `target`, in the package's folders."""
    from grpc_tools import protoc

    arguments = ["protoc", f"-I{ROOT}", f"--python_out={target}", f"--grpc_python_out={target}", PROTO]
    if protoc.main(arguments) != 0:
        raise SystemExit(f"protoc failed on {PROTO}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
