"""Which launch each attention kernel gets: a shape written here, or one measured on this card."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from fedbert_kernels import attention_kernels, philox
from fedbert_kernels.interpreter import INTERPRETED, triton
from fedbert_kernels.launch import Launch, digest, read_table, table_path

KERNELS = ("forward", "backward_q", "backward_kv")
"""The order of launches in a triple."""


def padded_head_size(d: int) -> int:
    """Head size d rounded up to the power of two that a tile has."""
    return max(16, 1 << (d - 1).bit_length())


def launches(d: int, dtype: torch.dtype, sliding_window: bool, capability: int) -> tuple[Launch, Launch, Launch]:
    """Launches of the forward, dQ and dK/dV kernels that do not spill.

    A tile has 64 columns where registers allow: up to Hopper, one thread then holds all 32 elements
    that share random words.
    """
    wide = padded_head_size(d) > 64
    if dtype == torch.float32:
        # Three products of tf32 keep three times the operands in registers.
        if wide:
            return Launch(16, 32, 4, 1, 255), Launch(16, 32, 8, 1), Launch(16, 16, 8, 1)
        if capability < 100:
            return Launch(64, 32, 4, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)
        return Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1, 255)
    if capability < 90:
        # Before Hopper, tensor cores take both operands from registers.
        if wide:
            return Launch(128, 32, 8, 2), Launch(32, 32, 4, 2), Launch(64, 32, 4, 1)
        return Launch(128, 64, 8, 2), Launch(64, 32 if sliding_window else 64, 4, 1), Launch(64, 64, 4, 1)
    if capability < 100:
        backward = Launch(128, 64, 8, 1) if wide else Launch(64, 64, 4, 1)
        return Launch(128, 64, 8, 2), backward, Launch(128, 64, 8, 1) if sliding_window and not wide else backward
    # A Blackwell thread holds one row: with as many rows as threads, it holds all columns of the
    # tile and sums alone. Unless told of 255 registers, the compiler stops at 128 and spills.
    forward = Launch(128, 64, 8, 2, 255) if wide else Launch(128, 64, 4, 1, 255, hide_zero=sliding_window)
    backward_kv = Launch(64, 64, 8, 1, 255) if wide else Launch(64, 64, 4, 2 if sliding_window else 1, 255)
    return forward, Launch(128, 64, 4, 1, 255), backward_kv


def launches_for(q: Tensor, cu_seqlens: Tensor, dropout: float, sliding_window: int) -> tuple[Launch, Launch, Launch]:
    """Launches of the three kernels for q [T, heads, d] on its device.

    A negative `sliding_window` means none.
    """
    num_tokens, _, d = q.shape
    if INTERPRETED:
        # The interpreter's time grows with the number of tiles, and a GPU's tiles for fp32 are
        # small.
        return launches(d, torch.bfloat16, sliding_window >= 0, 90)
    device = q.device.index
    written = launches(d, q.dtype, sliding_window >= 0, capability(device))
    return choose(
        tuned(device), written, q.dtype, d, dropout > 0.0, sliding_window >= 0, num_tokens, len(cu_seqlens) - 1
    )


def choose(
    table: dict[str, Launch],
    written: tuple[Launch, Launch, Launch],
    dtype: torch.dtype,
    d: int,
    dropout: bool,
    sliding_window: bool,
    num_tokens: int,
    num_sequences: int,
) -> tuple[Launch, Launch, Launch]:
    """The table's launch for each kernel of this shape, else the written one."""
    if not table:
        return written
    name = shape_class(dtype, d, dropout, sliding_window, num_tokens, num_sequences)
    forward, backward_q, backward_kv = (
        table.get(f"{kernel} {name}", launch) for kernel, launch in zip(KERNELS, written, strict=True)
    )
    return forward, backward_q, backward_kv


def shape_class(
    dtype: torch.dtype, d: int, dropout: bool, sliding_window: bool, num_tokens: int, num_sequences: int
) -> str:
    """Key of a tuned launch: what the kernel is compiled for, and three classes of length.

    The average length counts. The lengths themselves are on the device; to read them would be to
    wait for it.
    """
    length = num_tokens / max(1, num_sequences)
    lengths = "short" if length <= 48 else "medium" if length <= 192 else "long"
    options = f"{' dropout' if dropout else ''}{' sliding_window' if sliding_window else ''}"
    return f"{str(dtype).removeprefix('torch.')} d{padded_head_size(d)}{options} {lengths}"


@functools.cache
def tuned(device: int) -> dict[str, Launch]:
    """{kernel and shape class: launch} measured on this card, read once; empty if never tuned."""
    return read_table(tuned_path(device), kernels_digest())


def tuned_path(device: int) -> Path:
    """Where this card's launches are kept."""
    return table_path(torch.cuda.get_device_name(device), capability(device), triton.__version__)


def kernels_digest() -> str:
    """Digest of the attention kernels' sources."""
    return digest(attention_kernels.__file__, philox.__file__)


def card_index(device: torch.device) -> int:
    """Index of the card that `cuda` or `cuda:1` names; the current one if there is no number."""
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def capability(device: int) -> int:
    """A card's compute capability as one number: 9.0 is 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
