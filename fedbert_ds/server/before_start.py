"""Checks of a run before it starts, made without importing torch where possible."""

from __future__ import annotations

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.server.addresses import check_advertised, check_certificate, check_plaintext
from fedbert_ds.server.body.settings import deepspeed_settings
from fedbert_ds.server.run_folder import RunFolder, check_folder
from fedbert_ds.telemetry.trackers import check_trackers


def check_before_start(config: RunConfig, resume: bool) -> None:
    """Check the DeepSpeed file, if there is a body, the run's folder and the device; write nothing.

    Raises a UserError for the first that does not fit.
    """
    if config.cut != "whole":
        deepspeed_settings(config.body, config.optimizer)
    check_plaintext(config)
    check_certificate(config)
    check_advertised(config)
    check_folder(RunFolder(config.run.directory), config, resume)
    check_trackers(config.run.trackers)
    # torch is imported there: other mistakes need not wait for it.
    check_device(config)


def check_device(config: RunConfig) -> None:
    """ConfigError for a key that this machine's device does not fit."""
    if config.clients.local_device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("clients.local_device: cuda, and this machine has no GPU that torch can use; set cpu")
    if config.kernels == "triton" or config.body.compile is True or config.body.fp8:
        import torch

        from fedbert_ds.model.compiled_layers import check_compile
        from fedbert_ds.model.fp8 import check_fp8
        from fedbert_ds.model.kernels import check_kernels

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_kernels(config.kernels, device)
        check_compile(config.body.compile, config.kernels, device)
        if config.body.fp8:
            check_fp8(device)
