"""Everything that can be wrong with a run before it starts, found before torch is imported where that can be."""

from __future__ import annotations

import os

from fedbert_ds.config import RunConfig
from fedbert_ds.server.body.settings import deepspeed_settings
from fedbert_ds.server.run_folder import RunFolder, check_folder


def check_before_start(config: RunConfig, resume: bool) -> None:
    """Raise a UserError for a DeepSpeed file, a run's folder or a device that does not fit; writes nothing."""
    deepspeed_settings(config.body, config.optimizer)
    check_folder(RunFolder(config.run.directory), config, resume, int(os.environ.get("WORLD_SIZE", 1)))
    if config.kernels == "triton":
        # Imported here: any other mistake need not wait for torch.
        import torch

        from fedbert_ds.model.kernels import check_kernels

        check_kernels(config.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
