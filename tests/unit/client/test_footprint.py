"""A client's process imports none of what it does not need, and returns large blocks it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedbert_ds.client.footprint import peak_memory_bytes

IMPORTS = """
import sys
from fedbert_ds.client.footprint import UNUSED, leave_out_unused
leave_out_unused()
import fedbert_ds.client.session
from transformers import BertConfig, PreTrainedTokenizerFast
from fedbert_ds.model.cut import client_skeleton
client_skeleton(BertConfig(num_hidden_layers=1, vocab_size=99, hidden_size=8, num_attention_heads=1), "embeddings")
print(*(name for name in (*UNUSED, "triton", "datasets", "pyarrow", "deepspeed") if sys.modules.get(name)))
"""
BLOCKS = """
from fedbert_ds.client.footprint import return_free_memory, return_large_blocks
from benchmarks.memory.client import resident_bytes
return_large_blocks()
def resident():
    return resident_bytes("VmRSS")
kept, before = [], resident()
for _ in range(20):
    large = bytearray(8 << 20)
    large[::4096] = bytes(len(large[::4096])).replace(b"\\0", b"x")
    kept.append(bytearray(1000))
    del large
grown = resident() - before
return_free_memory()
print(grown < 2 << 20)
"""


def printed(program: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_nothing_is_imported_that_a_client_does_not_need() -> None:
    import torch

    assert printed(IMPORTS) in ([], ["triton"] if torch.cuda.is_available() else [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_large_blocks_go_back() -> None:
    assert printed(BLOCKS) == ["True"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is another count")
def test_peak_memory_is_this_process_own() -> None:
    """Not that of the process that started it, which Linux counts into ru_maxrss."""
    mine = bytearray(b"x") * (256 << 20)
    program = "from fedbert_ds.client.footprint import peak_memory_bytes\nprint(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert peak_memory_bytes() > len(mine) > 2 * int(child.stdout)
