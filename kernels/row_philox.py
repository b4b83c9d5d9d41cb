"""Random 16-bit numbers for kernels that go row by row: eight columns share one call of Philox.

A thread of such a kernel holds eight neighbouring columns of 16-bit values, so the compiler makes
each call once. As in `philox`, the result depends only on seed, offset, row and column, and the
torch twin gives the same bits.
"""

import torch
from torch import Tensor

from fedbert_kernels.interpreter import jit, tl
from fedbert_kernels.philox import load_seed, philox, philox_reference

LEVELS = 65536
"""Numbers are below this; drop probabilities are multiples of 1 / LEVELS."""

# In this word of the counter, attention numbers its score matrices upwards from 0.
_STREAM = 0xFFFFFFFF


def row_drop_threshold(dropout: float) -> int:
    """`dropout` in units of 1 / LEVELS; ValueError outside [0, 1)."""
    threshold = round(dropout * LEVELS) if 0.0 <= dropout < 1.0 else LEVELS
    if threshold == LEVELS:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return threshold


@jit
def random_16(
    seed_ptr,  # [2] int64: seed and offset
    rows,
    columns,  # broadcasts against rows
):
    """int32 numbers from 0 to 65535, one for each row and column."""
    key_low, key_high, offset = load_seed(seed_ptr)
    # A column's place in its group of eight picks a word and a half of it; the rest is counter.
    row_counter = rows.to(tl.uint32)
    stream = tl.full(row_counter.shape, 0xFFFFFFFF, tl.uint32)
    r0, r1, r2, r3 = philox(row_counter, (columns >> 3).to(tl.uint32), stream, offset, key_low, key_high)
    pair = (columns >> 1) & 3
    word = tl.where(pair < 2, tl.where(pair == 0, r0, r1), tl.where(pair == 2, r2, r3))
    return ((word >> ((columns & 1) << 4).to(tl.uint32)) & 0xFFFF).to(tl.int32)


def random_16_reference(seed: Tensor, num_rows: int, width: int) -> Tensor:
    """`random_16` of rows 0 to num_rows - 1 and columns 0 to width - 1, [num_rows, width] int64."""
    rows = torch.arange(num_rows, device=seed.device)[:, None] & 0xFFFFFFFF
    calls = torch.arange(-(-width // 8), device=seed.device)[None, :]
    stream, offset = torch.full_like(rows, _STREAM), seed[1] & 0xFFFFFFFF
    words = torch.stack(philox_reference(rows, calls, stream, offset, seed[0]), 2)
    return torch.stack((words & 0xFFFF, words >> 16), 3).view(num_rows, 8 * calls.shape[1])[:, :width]
