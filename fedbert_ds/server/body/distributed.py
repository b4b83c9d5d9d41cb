"""torch.distributed and DeepSpeed set up for this machine: nccl with GPUs, gloo without."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

from fedbert_ds.server.body.cores import threads_asked_for
from fedbert_ds.server.body.links import check_links
from fedbert_ds.server.body.meeting import restart_store, stay_on_this_machine

PATIENCE = timedelta(days=1)
"""Of every collective: one rank may wait for its clients, and the others for it."""

_store: Any = None
"""Where ranks meet, if this process has it."""


def initialize() -> None:
    """Join the other ranks by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Unset variables mean a run of one rank. Ranks of one machine meet at its loopback address and
    listen nowhere else. Raises ConfigError if nodes cannot meet.
    """
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500" if os.environ["WORLD_SIZE"] != "1" else _free_port())
    check_links(os.environ)
    global _store
    _store = stay_on_this_machine(os.environ)
    import torch

    use_cuda = torch.cuda.is_available()
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ranks and clients share few cores: more threads than one each only compete for them.
        torch.set_num_threads(threads_asked_for(os.environ) or 1)
    # DeepSpeed calls collectives by names that torch has deprecated. A user cannot mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not use_cuda:
        # DeepSpeed would compile this shared-memory collective at start, and fail without a
        # compiler. gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if use_cuda else "gloo"
    if (store := restart_store(os.environ)) is not None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE
        )  # which DeepSpeed then takes
    deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)


def be_patient() -> None:
    """Give groups that DeepSpeed has made the world's PATIENCE; by default a collective ends the
    run after 10 minutes on GPUs, 30 on CPUs.
    """
    import torch.distributed.distributed_c10d as c10d

    for group in c10d._world.pg_map:
        c10d._set_pg_timeout(PATIENCE, group)


def shut_down() -> None:
    """Leave the process group, so that torch reports no leak."""
    import torch

    torch.distributed.destroy_process_group()


def _free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
