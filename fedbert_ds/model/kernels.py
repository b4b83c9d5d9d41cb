"""Whether the body runs Triton kernels or torch: the run file's `kernels` applied to a device."""

from __future__ import annotations

import torch

from fedbert_ds.config import Kernels
from fedbert_ds.errors import ConfigError
from fedbert_ds.model.architecture import attention_dropout, longest_sequence
from fedbert_ds.model.body import Body


def check_kernels(kernels: Kernels, device: torch.device) -> None:
    """ConfigError if Triton is asked for where it cannot run."""
    if kernels == "triton":
        _runs_triton(kernels, device)


def install_kernels(
    body: Body,
    kernels: Kernels,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    longest: int | None = None,
) -> None:
    """Let a body on `device` run the kernels that the run file chooses.

    `dtype` is that in which it will run (None: its parameters'), `longest` the tokens of the
    longest sequence that will come (None: as its position table has). On a GPU, `auto` times
    attention, LayerNorm and GELU beside their rivals at the first call and keeps the outcome for
    later ones; `triton` is ours throughout.

    ConfigError if Triton is asked for where it cannot run, or for a head size that its attention
    does not take.
    """
    if not _runs_triton(kernels, device):
        return
    # Imported here: Triton takes a second, which torch's users need not wait.
    from fedbert_kernels.attention import HEAD_SIZES
    from fedbert_kernels.attention_choice import AttentionCase, attend_by
    from fedbert_kernels.choice import OURS, kept
    from fedbert_kernels.patch_modules import patch_modules

    case = AttentionCase(
        next(body.parameters()).dtype if dtype is None else dtype,
        body.config.num_attention_heads,
        body.config.hidden_size // body.config.num_attention_heads,
        attention_dropout(body.config),
        longest_sequence(body.config) if longest is None else longest,
    )
    fits = case.head_size in HEAD_SIZES
    if kernels == "triton" and not fits:
        raise ConfigError(
            f"kernels: triton takes heads of {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}, but this model's hidden_size / "
            f"num_attention_heads is {case.head_size}; set kernels: auto, or change the model"
        )
    if fits:
        body.attend = attend_by(OURS if kernels == "triton" else kept([case], device)[case.name])
    patch_modules(body, kernels, dtype, recompute=body.recomputes_elementwise)


def _runs_triton(kernels: Kernels, device: torch.device) -> bool:
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return False
    from fedbert_kernels.interpreter import HAVE_TRITON, INTERPRETED

    if kernels == "auto":
        return HAVE_TRITON
    if not HAVE_TRITON:
        raise ConfigError("kernels: triton needs the triton package; pip install triton, or set kernels: auto")
    # Triton's interpreter runs kernels on a CPU, far more slowly than torch; tests ask for it.
    if device.type != "cuda" and not INTERPRETED:
        raise ConfigError("kernels: triton needs a GPU, and there is none here; set kernels: auto")
    return True
