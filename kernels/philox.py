"""Random bits from a seed and a position (Philox 4x32, 7 rounds), and dropout masks of them.

A mask is cheap because 32 neighbouring elements share random words. Word i holds bit i of 32
uniform 8-bit numbers, and one logical operation a word compares all 32 with the drop threshold. The
32 elements are those that one thread of a Hopper or Ampere tensor-core tile holds: rows r and
r + 8; columns c, c + 1, and those + 8 j. Every word of a tile is computed once; where another
thread needs it too, it goes through shared memory. An element's word and bit follow from its row
and column, so no layout can change the result.

Every kernel function has its torch twin here, equal bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedbert_kernels.interpreter import jit, tl

ROUNDS = 7
"""The fewest that pass the statistical tests of Salmon et al. 2011; as in FlashAttention."""
LEVELS = 256
"""Drop probabilities are multiples of 1 / LEVELS."""


def drop_threshold(dropout: float) -> int:
    """`dropout` in units of 1 / LEVELS, rounded; the drop probability is this over LEVELS.

    ValueError outside [0, 1), and for what rounds to 1 or, if positive, to 0.
    """
    threshold = round(dropout * LEVELS) if 0.0 <= dropout < 1.0 else LEVELS
    if threshold == LEVELS or (threshold == 0 and dropout > 0.0):
        raise ValueError(f"dropout must be 0, or from 1/{LEVELS} to {LEVELS - 1}/{LEVELS}, got {dropout}")
    return threshold


def keep_rate(dropout: float) -> float:
    """The share that dropout keeps: 1 - `dropout`, rounded to a multiple of 1 / LEVELS."""
    return 1.0 - drop_threshold(dropout) / LEVELS


# ---- in kernels ----


@jit
def philox(c0, c1, c2, c3, key_low, key_high):
    """Four uint32 words for a counter of four uint32 words and a key of two; shapes broadcast."""
    for _ in tl.static_range(7):
        # One widening multiplication in place of `tl.umulhi` and `*`.
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_2 = c2.to(tl.uint64) * 0xCD9E8D57
        # The key first: otherwise the loop's invariants become 64 bits wide outside it.
        c0 = (product_2 >> 32).to(tl.uint32) ^ key_low ^ c1
        c1 = product_2.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ key_high ^ c3
        c3 = product_0.to(tl.uint32)
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@jit
def load_seed(seed_ptr):
    """Key (low, high) and offset, uint32 each, of a seed tensor: [2] int64."""
    seed = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), offset.to(tl.uint32)


@jit
def _compare_bit(below, random, threshold, BIT: tl.constexpr):
    """One step, from the lowest bit up, of "number < threshold" for 32 numbers.

    `random` holds their bit BIT. Where the threshold's bit is 1, a number with bit 0 is below, and
    one with bit 1 stays as the lower bits have it: `below | ~random`. Where it is 0: `below &
    ~random`. Both are the majority of three, one instruction; the complement is left out, as it is
    just as random. The threshold is not a constant: the compiler would then regroup the operations
    for each element.
    """
    mask = (0 - ((threshold >> BIT) & 1)).to(tl.uint32)
    return (below & random) | (mask & (below | random))


@jit
def _drop_words(row_group, column_group, stream, offset, key_low, key_high, threshold):
    """uint32 words whose every bit is 1 with probability threshold / 256.

    Row and column are counter words that meet only after two rounds. Before, the work is for each
    row or each column, not for each pair, and the part that belongs to the fixed side of a kernel's
    loop is done outside it.
    """
    r0, r1, r2, r3 = philox(offset, column_group + 1, stream, row_group, key_low, key_high)
    mask = (0 - (threshold & 1)).to(tl.uint32)
    words = mask & r0
    words = _compare_bit(words, r1, threshold, 1)
    words = _compare_bit(words, r2, threshold, 2)
    words = _compare_bit(words, r3, threshold, 3)
    r0, r1, r2, r3 = philox(offset, column_group, stream, row_group, key_low, key_high)
    words = _compare_bit(words, r0, threshold, 4)
    words = _compare_bit(words, r1, threshold, 5)
    words = _compare_bit(words, r2, threshold, 6)
    return _compare_bit(words, r3, threshold, 7)


@jit
def keep_mask(
    first_row,  # of the tile, in its sequence; a multiple of 16
    first_column,  # of the tile, in its sequence; a multiple of COLUMNS
    stream,  # what tells one score matrix from another
    offset,
    key_low,
    key_high,
    threshold,  # the drop probability in units of 1 / 256
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[ROWS, COLUMNS] bool of a tile: True where an element is kept."""
    SPAN: tl.constexpr = 64 if COLUMNS > 64 else COLUMNS
    words_down = tl.arange(0, ROWS // 2)[:, None]
    words_across = tl.arange(0, COLUMNS // SPAN * 4)[None, :]
    row_group = (first_row + ((words_down >> 3) << 4) + (words_down & 7)).to(tl.uint32)
    column_group = ((first_column & ~57) + ((words_across >> 2) << 6) + ((words_across & 3) << 1)).to(tl.uint32)
    words = _drop_words(row_group, column_group, stream.to(tl.uint32), offset, key_low, key_high, threshold)
    # A sum of one element, through which the compiler cannot trace a word. It would otherwise
    # compute the word again in every thread that needs it, which costs most of what sharing saves;
    # this way words go from thread to thread.
    words = tl.sum(words[:, :, None], 2)
    words = words.reshape(ROWS // 16, 1, 8, COLUMNS // SPAN, 1, 4, 1)
    words = words.broadcast_to(ROWS // 16, 2, 8, COLUMNS // SPAN, SPAN // 8, 4, 2).reshape(ROWS, COLUMNS)
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    bit = ((columns >> 3) & 7) | ((columns & 1) << 3) | (((rows >> 3) & 1) << 4)
    # A tile narrower than 64 begins inside a group of columns.
    if COLUMNS < 64:
        bit |= (first_column >> 3) & 7
    return (words & (1 << bit).to(tl.uint32)) == 0


# ---- in torch ----


def philox_reference(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """The words of `philox` as int64 tensors of values below 2**32.

    Counters are such tensors too; `seed` is a scalar.
    """
    low_bits = 0xFFFFFFFF
    key_low, key_high = seed & low_bits, (seed >> 32) & low_bits
    for _ in range(ROUNDS):
        # The product wraps into the sign bit. Its 64 bits are right; the mask removes sign copies.
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product_2 >> 32) & low_bits) ^ c1 ^ key_low,
            product_2 & low_bits,
            ((product_0 >> 32) & low_bits) ^ c3 ^ key_high,
            product_0 & low_bits,
        )
        key_low, key_high = (key_low + 0x9E3779B9) & low_bits, (key_high + 0xBB67AE85) & low_bits
    return c0, c1, c2, c3


def keep_mask_reference(streams: Tensor, length: int, seed: Tensor, threshold: int) -> Tensor:
    """[*streams.shape, length, length] bool: `keep_mask` of whole score matrices.

    `seed` is [2] int64.
    """
    return keep_factor(dropped_bytes(streams, length, seed, threshold), length, threshold) > 0.0


def keep_factor(dropped: Tensor, length: int, threshold: int) -> Tensor:
    """[..., length, length] fp32: dropout's factor, 1 / keep rate or 0.

    `dropped` is from `dropped_bytes`, for this length or a longer one.
    """
    # A byte is eight neighbours of a row: a lookup costs less than eight shifts.
    byte = torch.arange(256, device=dropped.device)[:, None]
    kept = ((byte >> torch.arange(8, device=dropped.device)) & 1) == 0
    factors = kept.to(torch.float32).mul_(LEVELS / (LEVELS - threshold))
    needed = dropped[..., :length, : (length + 7) // 8].int()
    return torch.nn.functional.embedding(needed, factors).flatten(-2)[..., :length]


def dropped_bytes(streams: Tensor, length: int, seed: Tensor, threshold: int) -> Tensor:
    """[*streams.shape, rows, columns / 8] uint8: bit c of a byte is its column c.

    Rows and columns are `length` rounded up to whole groups.
    """
    device = streams.device
    row_groups = torch.arange(0, length, 16, device=device)[:, None] + torch.arange(8, device=device)
    column_groups = torch.arange(0, length, 64, device=device)[:, None] + torch.arange(0, 8, 2, device=device)
    # Words: [..., groups of 16 rows, 8, groups of 64 columns, 4].
    rows, columns = row_groups[:, :, None, None], column_groups[None, None]
    stream = streams[..., None, None, None, None] & 0xFFFFFFFF
    offset = seed[1] & 0xFFFFFFFF
    random: list[Tensor] = []
    for call in (1, 0):
        random += philox_reference(offset, columns + call, stream, rows, seed[0])
    words = torch.zeros_like(random[-1])
    for bit, word in enumerate(random):
        words = words | word if (threshold >> bit) & 1 else words & word
    # Bits 0 to 15 of a word are of row r, the others of row r + 8. Of 16, the lower eight are
    # columns c + 8 j, the upper eight c + 1 + 8 j. A row's part of four words is thus a matrix of
    # bits, [8 values of c][j]; the bytes j are its transpose.
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=-4)
    matrix = halves[..., 0] | halves[..., 1] << 16 | halves[..., 2] << 32 | halves[..., 3] << 48
    return _transpose_bits(matrix).view(torch.uint8).flatten(-4, -2)


def _transpose_bits(matrix: Tensor) -> Tensor:
    """Bit i of byte j of each int64 becomes bit j of byte i (Hacker's Delight, 7-3)."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = (matrix ^ (matrix >> shift)) & mask
        matrix = matrix ^ swapped ^ (swapped << shift)
    return matrix
