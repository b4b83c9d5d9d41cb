"""The Triton kernels of packed attention: forward, dQ, and dK with dV; launched by `attention.py`.

A program takes one tile of rows of one sequence and head, and walks over the tiles of the other
side. Scores are in log2 units, because the hardware has exp2. Factors common to all terms are
applied at the end. The dropout mask is drawn where it is needed.
"""

from fedbert_kernels.interpreter import dot, jit, jit_for_any, narrow, tl
from fedbert_kernels.philox import keep_mask, load_seed


@jit
def _load_rows(
    base, stride, first, end, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr
):
    """Rows first to first + ROWS; 0 from row `end` (unless WHOLE) and from column D."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    pointers = base + rows * stride + columns
    if WHOLE and D == COLUMNS:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=columns < D, other=0.0)
    elif D == COLUMNS:
        return tl.load(pointers, mask=rows < end, other=0.0)
    else:
        return tl.load(pointers, mask=(rows < end) & (columns < D), other=0.0)


@jit
def _store_rows(base, stride, first, end, tile, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    tile = narrow(tile, base.dtype.element_ty)
    tl.store(base + rows * stride + columns, tile, mask=(rows < end) & (columns < D))


@jit
def _scores(
    q,
    k,
    scale_log2,
    first_row,
    first_column,
    length,
    sliding_window,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[ROWS, COLUMNS] scores in log2 units, -inf where a row does not see a column."""
    scores = dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION) * scale_log2
    if SLIDING_WINDOW or not WHOLE:
        columns = first_column + tl.arange(0, COLUMNS)[None, :]
        seen = columns < length
        if SLIDING_WINDOW:
            distance = first_row + tl.arange(0, ROWS)[:, None] - columns
            seen = seen & (distance <= sliding_window) & (distance >= -sliding_window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@jit
def _forward_step(
    total,
    denominator,
    largest,
    q,
    k_base,
    v_base,
    k_stride,
    v_stride,
    scale_log2,
    first_row,
    first_column,
    length,
    sliding_window,
    stream,
    offset,
    key_low,
    key_high,
    threshold,
    zero,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = _load_rows(k_base, k_stride, first_column, length, D, COLUMNS, PADDED_D, WHOLE)
    scores = _scores(
        q,
        k,
        scale_log2,
        first_row,
        first_column,
        length,
        sliding_window,
        ROWS,
        COLUMNS,
        SLIDING_WINDOW,
        WHOLE,
        PRECISION,
    )
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    reference = new_largest
    if SLIDING_WINDOW:
        # At the window's edge a row may see nothing of a tile; -inf minus -inf would be NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    p = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(largest - reference)
    denominator = denominator * shrink + tl.sum(p, 1)
    if DROPOUT:
        kept = keep_mask(first_row, first_column, stream, offset, key_low, key_high, threshold, ROWS, COLUMNS)
        p = tl.where(kept, p, zero)
    v = _load_rows(v_base, v_stride, first_column, length, D, COLUMNS, PADDED_D, WHOLE)
    total = dot(narrow(p, v.dtype), v, total * shrink[:, None], PRECISION)
    return total, denominator, new_largest


@jit_for_any("num_tokens")
def attention_forward_kernel(
    q_ptr,  # [T, heads, D]; last stride 1, as for k and v
    k_ptr,  # [T, heads, D]
    v_ptr,  # [T, heads, D]
    out_ptr,  # [T, heads, D]
    lse_ptr,  # [heads, T] fp32: log2 of each row's sum of exponentials
    items_ptr,  # [items, 4] int32: tiles of ROWS rows, see work_items
    seed_ptr,  # [2] int64: seed and offset; unused without DROPOUT
    q_stride,
    k_stride,
    v_stride,
    out_stride,  # of a token; heads are D apart in `out`
    q_head_stride,
    k_head_stride,
    v_head_stride,
    heads,
    num_tokens,
    sliding_window,
    scale_log2,  # of scores, times log2(e)
    keep,  # the share of elements that dropout keeps
    threshold,  # the drop probability in units of 1 / 256
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HIDE_ZERO: tl.constexpr,  # see Launch
    PEEL: tl.constexpr,  # run the last, partial tile after the loop; not with SLIDING_WINDOW
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(items_ptr + item * 4)
    length = tl.load(items_ptr + item * 4 + 1)
    first_row = tl.load(items_ptr + item * 4 + 2)
    if length == 0:
        return
    unused = tl.full([], 0, tl.uint32)
    offset, key_low, key_high = unused, unused, unused
    if DROPOUT:
        key_low, key_high, offset = load_seed(seed_ptr)
    zero = keep * 0.0 if HIDE_ZERO else 0.0
    stream = start * heads + head
    token = start.to(tl.int64)
    k_base = k_ptr + token * k_stride + head * k_head_stride
    v_base = v_ptr + token * v_stride + head * v_head_stride
    q = _load_rows(
        q_ptr + token * q_stride + head * q_head_stride, q_stride, first_row, length, D, ROWS, PADDED_D, False
    )
    total = tl.zeros([ROWS, PADDED_D], tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    if SLIDING_WINDOW:
        low = tl.maximum(first_row - sliding_window, 0) // COLUMNS * COLUMNS
        high = tl.minimum(first_row + ROWS + sliding_window, length)
    else:
        low = 0
        high = length // COLUMNS * COLUMNS if PEEL else length
    for first_column in range(low, high, COLUMNS):
        total, denominator, largest = _forward_step(
            total,
            denominator,
            largest,
            q,
            k_base,
            v_base,
            k_stride,
            v_stride,
            scale_log2,
            first_row,
            first_column,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            D,
            ROWS,
            COLUMNS,
            PADDED_D,
            DROPOUT,
            SLIDING_WINDOW,
            PEEL,
            PRECISION,
        )
    if PEEL and high < length:
        total, denominator, largest = _forward_step(
            total,
            denominator,
            largest,
            q,
            k_base,
            v_base,
            k_stride,
            v_stride,
            scale_log2,
            first_row,
            high,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            D,
            ROWS,
            COLUMNS,
            PADDED_D,
            DROPOUT,
            SLIDING_WINDOW,
            False,
            PRECISION,
        )
    out = total / (denominator * keep)[:, None]
    _store_rows(out_ptr + token * out_stride + head * D, out_stride, first_row, length, out, D, ROWS, PADDED_D)
    rows = first_row + tl.arange(0, ROWS)
    lse_base = lse_ptr + head.to(tl.int64) * num_tokens + token
    tl.store(lse_base + rows, largest + tl.log2(denominator), mask=rows < length)


@jit
def _score_gradient(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    scale_log2,
    first_row,
    first_column,
    length,
    sliding_window,
    stream,
    offset,
    key_low,
    key_high,
    threshold,
    zero,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    NEED_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scores' gradient, and with NEED_P the probabilities after dropout; both times keep.

    [ROWS, COLUMNS] each.
    """
    scores = _scores(
        q,
        k,
        scale_log2,
        first_row,
        first_column,
        length,
        sliding_window,
        ROWS,
        COLUMNS,
        SLIDING_WINDOW,
        WHOLE,
        PRECISION,
    )
    p = tl.exp2(scores - lse[:, None])
    dp = dot(dout, tl.trans(v), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    if DROPOUT:
        kept = keep_mask(first_row, first_column, stream, offset, key_low, key_high, threshold, ROWS, COLUMNS)
        if NEED_P:
            # The same gradient as below, with the one selection that the probabilities need anyway.
            kept_p = tl.where(kept, p, zero)
            return kept_p, kept_p * dp - p * delta[:, None]
        else:
            return p, p * (tl.where(kept, dp, 0.0) - delta[:, None])
    else:
        return p, p * (dp - delta[:, None])


@jit_for_any("num_tokens")
def attention_backward_q_kernel(
    dout_ptr,  # [T, heads, D]; last stride 1, as for q, k, v
    q_ptr,  # [T, heads, D]
    k_ptr,  # [T, heads, D]
    v_ptr,  # [T, heads, D]
    out_ptr,  # [T, heads, D]
    lse_ptr,  # [heads, T] fp32
    delta_ptr,  # [heads, T] fp32, written: sum of dout * out over D, times keep
    dq_ptr,  # [T, heads, D], written
    items_ptr,  # [items, 4] int32: tiles of ROWS rows, see work_items
    seed_ptr,  # [2] int64: seed and offset; unused without DROPOUT
    dout_stride,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    dq_stride,  # of a token; heads are D apart in `out` and `dq`
    dout_head_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    heads,
    num_tokens,
    sliding_window,
    scale_log2,  # of scores, times log2(e)
    gradient_scale,  # of scores, over keep
    keep,  # the share of elements that dropout keeps
    threshold,  # the drop probability in units of 1 / 256
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HIDE_ZERO: tl.constexpr,  # see Launch
    PEEL: tl.constexpr,  # run the last, partial tile after the loop; not with SLIDING_WINDOW
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(items_ptr + item * 4)
    length = tl.load(items_ptr + item * 4 + 1)
    first_row = tl.load(items_ptr + item * 4 + 2)
    if length == 0:
        return
    unused = tl.full([], 0, tl.uint32)
    offset, key_low, key_high = unused, unused, unused
    if DROPOUT:
        key_low, key_high, offset = load_seed(seed_ptr)
    zero = keep * 0.0 if HIDE_ZERO else 0.0
    stream = start * heads + head
    token = start.to(tl.int64)
    k_base = k_ptr + token * k_stride + head * k_head_stride
    v_base = v_ptr + token * v_stride + head * v_head_stride
    q = _load_rows(
        q_ptr + token * q_stride + head * q_head_stride, q_stride, first_row, length, D, ROWS, PADDED_D, False
    )
    dout = _load_rows(
        dout_ptr + token * dout_stride + head * dout_head_stride,
        dout_stride,
        first_row,
        length,
        D,
        ROWS,
        PADDED_D,
        False,
    )
    out = _load_rows(out_ptr + token * out_stride + head * D, out_stride, first_row, length, D, ROWS, PADDED_D, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) * keep
    rows = first_row + tl.arange(0, ROWS)
    row_base = head.to(tl.int64) * num_tokens + token
    tl.store(delta_ptr + row_base + rows, delta, mask=rows < length)
    lse = tl.load(lse_ptr + row_base + rows, mask=rows < length, other=0.0)
    dq = tl.zeros([ROWS, PADDED_D], tl.float32)
    if SLIDING_WINDOW:
        low = tl.maximum(first_row - sliding_window, 0) // COLUMNS * COLUMNS
        high = tl.minimum(first_row + ROWS + sliding_window, length)
    else:
        low = 0
        high = length // COLUMNS * COLUMNS if PEEL else length
    for first_column in range(low, high, COLUMNS):
        k = _load_rows(k_base, k_stride, first_column, length, D, COLUMNS, PADDED_D, PEEL)
        v = _load_rows(v_base, v_stride, first_column, length, D, COLUMNS, PADDED_D, PEEL)
        _, ds = _score_gradient(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            scale_log2,
            first_row,
            first_column,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            ROWS,
            COLUMNS,
            DROPOUT,
            SLIDING_WINDOW,
            PEEL,
            False,
            PRECISION,
        )
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    if PEEL and high < length:
        k = _load_rows(k_base, k_stride, high, length, D, COLUMNS, PADDED_D, False)
        v = _load_rows(v_base, v_stride, high, length, D, COLUMNS, PADDED_D, False)
        _, ds = _score_gradient(
            q,
            k,
            v,
            dout,
            lse,
            delta,
            scale_log2,
            first_row,
            high,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            ROWS,
            COLUMNS,
            DROPOUT,
            SLIDING_WINDOW,
            False,
            False,
            PRECISION,
        )
        dq = dot(narrow(ds, k.dtype), k, dq, PRECISION)
    _store_rows(
        dq_ptr + token * dq_stride + head * D, dq_stride, first_row, length, dq * gradient_scale, D, ROWS, PADDED_D
    )


@jit
def _backward_kv_step(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse_base,
    delta_base,
    q_stride,
    dout_stride,
    scale_log2,
    first_row,
    first_column,
    length,
    sliding_window,
    stream,
    offset,
    key_low,
    key_high,
    threshold,
    zero,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows past the end read as 0 and add 0, so they need no mask; columns past it are never stored.
    q = _load_rows(q_base, q_stride, first_row, length, D, ROWS, PADDED_D, WHOLE)
    dout = _load_rows(dout_base, dout_stride, first_row, length, D, ROWS, PADDED_D, WHOLE)
    rows = first_row + tl.arange(0, ROWS)
    if WHOLE:
        lse = tl.load(lse_base + rows)
        delta = tl.load(delta_base + rows)
    else:
        lse = tl.load(lse_base + rows, mask=rows < length, other=0.0)
        delta = tl.load(delta_base + rows, mask=rows < length, other=0.0)
    # Scores are [rows, columns], not transposed: the dropout mask's groups have that orientation.
    p, ds = _score_gradient(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        scale_log2,
        first_row,
        first_column,
        length,
        sliding_window,
        stream,
        offset,
        key_low,
        key_high,
        threshold,
        zero,
        ROWS,
        COLUMNS,
        DROPOUT,
        SLIDING_WINDOW,
        True,
        True,
        PRECISION,
    )
    dv = dot(tl.trans(narrow(p, dout.dtype)), dout, dv, PRECISION)
    dk = dot(tl.trans(narrow(ds, q.dtype)), q, dk, PRECISION)
    return dk, dv


@jit_for_any("num_tokens")
def attention_backward_kv_kernel(
    dout_ptr,  # [T, heads, D]; last stride 1, as for q, k, v
    q_ptr,  # [T, heads, D]
    k_ptr,  # [T, heads, D]
    v_ptr,  # [T, heads, D]
    lse_ptr,  # [heads, T] fp32
    delta_ptr,  # [heads, T] fp32, as attention_backward_q_kernel wrote it
    dk_ptr,  # [T, heads, D], written
    dv_ptr,  # [T, heads, D], written
    items_ptr,  # [items, 4] int32: tiles of COLUMNS rows of k and v, see work_items
    seed_ptr,  # [2] int64: seed and offset; unused without DROPOUT
    dout_stride,
    q_stride,
    k_stride,
    v_stride,
    dk_stride,
    dv_stride,  # of a token; heads are D apart in `dk` and `dv`
    dout_head_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    heads,
    num_tokens,
    sliding_window,
    scale_log2,  # of scores, times log2(e)
    gradient_scale,  # of scores, over keep
    keep,  # the share of elements that dropout keeps
    threshold,  # the drop probability in units of 1 / 256
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HIDE_ZERO: tl.constexpr,  # see Launch
    PEEL: tl.constexpr,  # run the last, partial tile after the loop; not with SLIDING_WINDOW
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start = tl.load(items_ptr + item * 4)
    length = tl.load(items_ptr + item * 4 + 1)
    first_column = tl.load(items_ptr + item * 4 + 2)
    if length == 0:
        return
    unused = tl.full([], 0, tl.uint32)
    offset, key_low, key_high = unused, unused, unused
    if DROPOUT:
        key_low, key_high, offset = load_seed(seed_ptr)
    zero = keep * 0.0 if HIDE_ZERO else 0.0
    stream = start * heads + head
    token = start.to(tl.int64)
    q_base = q_ptr + token * q_stride + head * q_head_stride
    dout_base = dout_ptr + token * dout_stride + head * dout_head_stride
    row_base = head.to(tl.int64) * num_tokens + token
    k = _load_rows(
        k_ptr + token * k_stride + head * k_head_stride, k_stride, first_column, length, D, COLUMNS, PADDED_D, False
    )
    v = _load_rows(
        v_ptr + token * v_stride + head * v_head_stride, v_stride, first_column, length, D, COLUMNS, PADDED_D, False
    )
    dk = tl.zeros([COLUMNS, PADDED_D], tl.float32)
    dv = tl.zeros([COLUMNS, PADDED_D], tl.float32)
    if SLIDING_WINDOW:
        low = tl.maximum(first_column - sliding_window, 0) // ROWS * ROWS
        high = tl.minimum(first_column + COLUMNS + sliding_window, length)
    else:
        low = 0
        high = length // ROWS * ROWS if PEEL else length
    for first_row in range(low, high, ROWS):
        dk, dv = _backward_kv_step(
            dk,
            dv,
            k,
            v,
            q_base,
            dout_base,
            lse_ptr + row_base,
            delta_ptr + row_base,
            q_stride,
            dout_stride,
            scale_log2,
            first_row,
            first_column,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            D,
            ROWS,
            COLUMNS,
            PADDED_D,
            DROPOUT,
            SLIDING_WINDOW,
            PEEL,
            PRECISION,
        )
    if PEEL and high < length:
        dk, dv = _backward_kv_step(
            dk,
            dv,
            k,
            v,
            q_base,
            dout_base,
            lse_ptr + row_base,
            delta_ptr + row_base,
            q_stride,
            dout_stride,
            scale_log2,
            high,
            first_column,
            length,
            sliding_window,
            stream,
            offset,
            key_low,
            key_high,
            threshold,
            zero,
            D,
            ROWS,
            COLUMNS,
            PADDED_D,
            DROPOUT,
            SLIDING_WINDOW,
            False,
            PRECISION,
        )
    _store_rows(
        dk_ptr + token * dk_stride + head * D,
        dk_stride,
        first_column,
        length,
        dk * gradient_scale,
        D,
        COLUMNS,
        PADDED_D,
    )
    _store_rows(
        dv_ptr + token * dv_stride + head * D, dv_stride, first_column, length, dv * (1.0 / keep), D, COLUMNS, PADDED_D
    )
