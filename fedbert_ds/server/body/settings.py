"""DeepSpeed's settings: the user's JSON file, and the keys that the run file owns."""

from __future__ import annotations

import json
from typing import Any

from fedbert_ds.config import BodySection, OptimizerSection
from fedbert_ds.errors import ConfigError

OURS = {
    "gradient_clipping": "optimizer.gradient_clipping",
    "gradient_accumulation_steps": "window.tokens",
    "train_batch_size": "window.tokens",
    "train_micro_batch_size_per_gpu": "window.tokens_per_micro_batch",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "bf16": "body.precision",
    "fp16": "body.precision",
    "torch_autocast": "body.precision",
    "data_types": "body.precision",
}
"""DeepSpeed keys that the run file owns, and the run-file key that sets each."""
WITHOUT_EFFECT = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}
"""Keys of DeepSpeed's stage 3 for a gathering that is not its own here (`layer_weights`), and the
values that they may have.
"""


def deepspeed_settings(body: BodySection, optimizer: OptimizerSection) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    Raises ConfigError if the file is not JSON, has no usable ZeRO stage, or sets a key that the run
    file owns; or if layers are to be compiled, or in fp8, at stage 3, or weights are to be gathered
    there in another way than they are.
    """
    settings = _read(body)
    if settings["zero_optimization"].get("stage", 0) == 3:
        for key, instead in (("compile", "auto"), ("fp8", "false")):
            if getattr(body, key) is True:
                raise ConfigError(
                    f"body.{key}: true needs weights that ZeRO stage 3 divides; set {instead}, or body.zero_stage: 2"
                )
        _check_gathering(settings["zero_optimization"], body)
        # `layer_weights` gathers, and says what stays whole.
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 by default.
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": body.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    # By default it waits for the device in every forward.
    settings.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    return settings


def _check_gathering(zero: dict[str, Any], body: BodySection) -> None:
    for key, value in WITHOUT_EFFECT.items():
        if zero.get(key, value) != value:
            raise ConfigError(
                f"{body.deepspeed}: zero_optimization.{key} has no effect, as a layer is gathered whole from all "
                "ranks; remove it"
            )
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ConfigError(
            f"{body.deepspeed}: zero_optimization.offload_param keeps weights on the CPU, not on a disk; set device: "
            "cpu"
        )


def zero_stage(body: BodySection) -> int:
    """The run's ZeRO stage. Raises ConfigError as `deepspeed_settings`."""
    return int(_read(body)["zero_optimization"].get("stage", 0))


def _read(body: BodySection) -> dict[str, Any]:
    """The user's file, if any, checked, with the run file's ZeRO stage where it sets one."""
    path = body.deepspeed
    try:
        settings = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"body.deepspeed: {path} is not a readable JSON file ({error}); mend it, or name another"
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"body.deepspeed: {path} is not a JSON object of DeepSpeed settings; see configs/deepspeed/")
    for key, ours in OURS.items():
        if key in settings:
            raise ConfigError(f"{path}: {key} belongs to the run file; remove it and set {ours} there")
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3; set one")
    if body.zero_stage is not None:
        zero["stage"] = body.zero_stage
    return settings
