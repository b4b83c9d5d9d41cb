"""Two ranks of a worker program: a process, and a fork of it after its imports."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

LENGTHS = ([5, 9], [1, 3])
"""Sequence lengths of each micro-batch that the ranks train."""


def run_two(run_rank: Callable[[int, Path], None], folder: Path) -> None:
    """Run `run_rank(rank, folder)` for ranks 0 and 1, then exit with rank 1's code.

    MASTER_ADDR and MASTER_PORT are in the environment.
    """
    import deepspeed
    import transformers.models.bert.modeling_bert  # noqa: F401

    import fedbert_ds.model.checkpoint
    import fedbert_ds.model.cut
    import fedbert_ds.server.body.engine  # noqa: F401

    with contextlib.suppress(ImportError):
        # DeepSpeed imports it for its first engine above stage 0, and with it torch's compiler.
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    # For each engine of stage 3, DeepSpeed collects garbage: let it pass over what is there now.
    gc.freeze()
    other = multiprocessing.get_context("fork").Process(target=_as_rank, args=(run_rank, 1, folder), daemon=True)
    other.start()
    _as_rank(run_rank, 0, folder)
    other.join()
    sys.exit(other.exitcode)


def _as_rank(run_rank: Callable[[int, Path], None], rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    run_rank(rank, folder)
