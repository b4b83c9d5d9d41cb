"""Matrix products of encoder layers in fp8 (Micikevicius et al. 2022), by torchao.

Inputs and weights become e4m3 and gradients e5m2, each by one scale for a whole tensor, taken from
its largest value; sums, weights and everything else stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.body import Body


def check_fp8(device: torch.device) -> None:
    """ConfigError if torchao is not installed, or the GPU has no fp8 products.

    On a CPU torchao emulates them, which is slow and has the same rounding.
    """
    _torchao()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"body.fp8: {name} has no fp8 matrix products (compute capability 8.9 or more); set false")


def install_fp8(body: Body, device: torch.device) -> None:
    """Let the body's encoder layers multiply in fp8: all but the last, which computes for masked
    positions alone, of which there may be none.

    Comes before `install_kernels`, which leaves these layers' small operations to torch.
    ConfigError as `check_fp8`.
    """
    check_fp8(device)
    torchao = _torchao()
    # Products over tokens need a multiple of 16 of them.
    config = torchao.Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda")
    for layer in body.layers[:-1]:
        torchao.convert_to_float8_training(layer, config=config)


def _torchao() -> Any:
    try:
        import torchao.float8
    except ImportError as error:
        raise ConfigError("body.fp8: true needs the torchao package; pip install torchao, or set false") from error
    return torchao.float8
