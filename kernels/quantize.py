"""Wire codecs on the device: int8, fp8, int4, int2 with scales, each fused with a gather of rows.

Kernels and their torch references agree bit for bit. Every codec is symmetric: scale = largest
magnitude / largest code, payload = value / scale rounded to nearest even, or stochastically from a
seed. Two bits have no code for zero, and take the step with the smallest mean square error on
normal values instead of the largest magnitude, which would set it too wide. fp8 codes are built
from integers rather than by the card's conversion, so any card can make and read them. Framing is
the wire's business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_kernels.compile_case import CompileCase
from fedbert_kernels.differentiable import is_eager
from fedbert_kernels.interpreter import jit, jit_for_any, narrow, on_its_device, runs_triton, tl
from fedbert_kernels.row_philox import random_16, random_16_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

GROUP = 64
"""Columns that share a scale and a rotation in grouped codecs; zeros fill the last group."""
LARGEST_WIDTH = 8192
STEP_OF_MEAN = 1.25
"""Step of two-bit codes in mean magnitudes. For normal values 0.996 standard deviations, 1.248 mean
magnitudes, is best (Max 1960, "Quantizing for Minimum Distortion", table II, N = 4). With any step
below 4 the square error of a group is smaller than the square of its values, whatever these are, as
error feedback needs: the best code of x saves at least step * |x| - step**2 / 4.
"""


@dataclass(frozen=True)
class Codec:
    """How values become codes; its name is the key in CODECS."""

    payload: torch.dtype
    largest: float
    """Magnitude that a scale's largest value is mapped to."""
    grouped: bool
    """One bf16 scale for every GROUP columns; otherwise one fp32 scale a row."""
    mantissa_bits: int = 0
    """Of an fp8 code; 0 for integer codes."""
    exponent_bias: int = 0
    rotated: bool = False
    """Hadamard rotation of each group."""
    per_byte: int = 1
    """Codes in a byte of the payload, the first column's in the lowest bits."""
    halves: bool = False
    """Codes stand for -3/2, -1/2, 1/2 and 3/2 scales, numbered from 0."""

    def num_scales(self, width: int) -> int:
        """Scales of a row of `width` columns."""
        return -(-width // GROUP) if self.grouped else 1

    def payload_width(self, width: int) -> int:
        """Payload entries of a row of `width` columns."""
        return self.num_scales(width) * GROUP // self.per_byte if self.per_byte > 1 else width

    @property
    def scale_dtype(self) -> torch.dtype:
        """bf16, rounded upwards, in groups: fp32 would cost half a bit a value."""
        return torch.bfloat16 if self.grouped else torch.float32


CODECS = {
    "int8": Codec(torch.int8, 127.0, grouped=False),
    "int8_group": Codec(torch.int8, 127.0, grouped=True),
    "fp8_e4m3": Codec(torch.float8_e4m3fn, 448.0, grouped=False, mantissa_bits=3, exponent_bias=7),
    "fp8_e5m2": Codec(torch.float8_e5m2, 57344.0, grouped=False, mantissa_bits=2, exponent_bias=15),
    "int4_hadamard": Codec(torch.uint8, 7.0, grouped=True, rotated=True, per_byte=2),
    "int2_hadamard": Codec(torch.uint8, 1.5, grouped=True, rotated=True, per_byte=4, halves=True),
}

STEP_OF_SUM = tl.constexpr(STEP_OF_MEAN / GROUP)

# ---- kernels ----


@jit
def _rotate(x, GROUPS: tl.constexpr):
    """x [GROUPS, 64] times the Hadamard matrix of order 64, not scaled.

    Six rounds of sums and differences.
    """
    for stage in tl.static_range(6):
        pairs = tl.reshape(x, [GROUPS, 32 >> stage, 2, 1 << stage])
        low, high = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
        x = tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 1, 3, 2]), [GROUPS, 64])
    return x


@jit
def _sum_of_group(x, GROUPS: tl.constexpr):
    """Sums [GROUPS] of x [GROUPS, 64], neighbours first: an order that the reference has, too."""
    for stage in tl.static_range(6):
        low, high = tl.split(tl.reshape(x, [GROUPS, 32 >> stage, 2]))
        x = low + high
    return tl.reshape(x, [GROUPS])


@jit
def _round(x, random, STOCHASTIC: tl.constexpr):
    """x, of magnitude below 2**22, rounded to a whole number.

    To nearest even; if STOCHASTIC, up with the probability of its fraction.
    """
    if STOCHASTIC:
        whole = tl.floor(x)
        return whole + tl.where(random < x - whole, 1.0, 0.0)
    else:
        # 1.5 * 2**23 leaves no bits for a fraction, so the addition rounds to nearest even.
        return (x + 12582912.0) - 12582912.0


@jit
def _fp8_code(x, random, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The fp8 code of x, as int32; x is within the format's range."""
    bits = x.to(tl.int32, bitcast=True)
    # Exponent of the code; 1 is also that of the subnormal numbers.
    exponent = tl.maximum(((bits >> 23) & 0xFF) - (127 - BIAS), 1)
    steps_per_unit = ((127 + BIAS + MANTISSA_BITS - exponent) << 23).to(tl.float32, bitcast=True)
    steps = _round(tl.abs(x) * steps_per_unit, random, STOCHASTIC).to(tl.int32)
    # Steps include the hidden one, 2**MANTISSA_BITS: a carry goes into the exponent by itself.
    return (((exponent - 1) << MANTISSA_BITS) + steps) | ((bits >> 24) & 0x80)


@jit
def _fp8_value(code, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr):
    """The fp32 value of fp8 codes given as int32; codes of infinity and NaN do not occur."""
    magnitude = code & 0x7F
    exponent = tl.maximum(magnitude >> MANTISSA_BITS, 1)
    steps = (magnitude - ((exponent - 1) << MANTISSA_BITS)).to(tl.float32)
    value = steps * ((exponent + (127 - BIAS - MANTISSA_BITS)) << 23).to(tl.float32, bitcast=True)
    return tl.where(code >= 0x80, -value, value)


@jit_for_any("num_rows")
def _quantize_kernel(
    x_ptr,  # [num_rows, width]
    rows_ptr,  # [num_selected] int64 into num_rows; unused without HAS_ROWS
    seed_ptr,  # [2] int64: seed and offset; unused without STOCHASTIC
    payload_ptr,  # [num_selected, payload_width] int8 or uint8
    scales_ptr,  # [num_selected, num_scales] fp32 or bf16
    num_rows,
    width,
    payload_width,
    num_scales,
    LARGEST: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    ROTATED: tl.constexpr,
    PER_BYTE: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    selected = tl.program_id(0).to(tl.int64)
    row = selected
    if HAS_ROWS:
        row = tl.load(rows_ptr + selected)
    known = (row >= 0) & (row < num_rows)
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * width + columns, mask=columns < tl.where(known, width, 0), other=0.0).to(tl.float32)
    if ROTATED:
        x = _rotate(x, GROUPS) * 0.125
    # A comparison loses a NaN. As infinity it reaches the scale, where the receiver sees it.
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))
    if HALVES and not STOCHASTIC:
        scale = _sum_of_group(magnitude, GROUPS) * STEP_OF_SUM
    else:
        scale = tl.div_rn(tl.max(magnitude, axis=1), tl.full([GROUPS], LARGEST, tl.float32))
    if scales_ptr.dtype.element_ty == tl.bfloat16:
        # Upwards: a smaller scale would push the largest value beyond the largest code.
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    scale = tl.where(known, scale, float("nan"))
    scales_ptr += selected * num_scales
    tl.store(scales_ptr + groups, narrow(scale, scales_ptr.dtype.element_ty), mask=groups < num_scales)

    divisor = tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], [GROUPS, COLUMNS])
    scaled = tl.div_rn(x, divisor)
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), 0.0)
    random = scaled
    if STOCHASTIC:
        random = random_16(seed_ptr, selected, columns).to(tl.float32) * (1.0 / 65536)
    if MANTISSA_BITS > 0:
        code = _fp8_code(scaled, random, MANTISSA_BITS, BIAS, STOCHASTIC)
    elif HALVES:
        code = _round(scaled + LARGEST, random, STOCHASTIC).to(tl.int32)
    else:
        code = _round(scaled, random, STOCHASTIC).to(tl.int32)
    if PER_BYTE > 1:
        if PER_BYTE == 4:
            first, second = tl.split(tl.reshape(code, [GROUPS, COLUMNS // 2, 2]))
            code = first | (second << 2)
        even, odd = tl.split(tl.reshape(code, [GROUPS, COLUMNS // PER_BYTE, 2]))
        code = (even & 15) | ((odd & 15) << 4)
        columns = groups[:, None] * (COLUMNS // PER_BYTE) + tl.arange(0, COLUMNS // PER_BYTE)[None, :]
    places = payload_ptr + selected * payload_width + columns
    tl.store(places, code.to(payload_ptr.dtype.element_ty), mask=columns < payload_width)


@jit_for_any("num_rows")
def _dequantize_kernel(
    payload_ptr,  # [num_rows, payload_width] int8 or uint8
    scales_ptr,  # [num_rows, num_scales] fp32 or bf16
    rows_ptr,  # [num_selected] int64 into num_rows; unused without HAS_ROWS
    y_ptr,  # [num_selected, width]
    num_rows,
    width,
    payload_width,
    num_scales,
    MANTISSA_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    ROTATED: tl.constexpr,
    PER_BYTE: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    selected = tl.program_id(0).to(tl.int64)
    row = selected
    if HAS_ROWS:
        row = tl.load(rows_ptr + selected)
    known = (row >= 0) & (row < num_rows)
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    scale_inside = groups < tl.where(known, num_scales, 0)
    payload_inside = tl.where(known, payload_width, 0)
    scale = tl.load(scales_ptr + row * num_scales + groups, mask=scale_inside, other=float("nan")).to(tl.float32)
    payload_ptr += row * payload_width
    if ROTATED:
        places = groups[:, None] * (COLUMNS // PER_BYTE) + tl.arange(0, COLUMNS // PER_BYTE)[None, :]
        codes = tl.load(payload_ptr + places, mask=places < payload_inside, other=0).to(tl.int32)
        # Whole numbers and halves rotate exactly; only the scale's product rounds.
        if HALVES:
            pairs = tl.reshape(tl.join(codes & 15, codes >> 4), [GROUPS, COLUMNS // 2])
            codes = tl.join(pairs & 3, pairs >> 2)
            value = tl.reshape(codes, [GROUPS, COLUMNS]).to(tl.float32) - 1.5
        else:
            codes = tl.join(((codes & 15) ^ 8) - 8, ((codes >> 4) ^ 8) - 8)  # four bits' sign extended
            value = tl.reshape(codes, [GROUPS, COLUMNS]).to(tl.float32)
        value = _rotate(value, GROUPS) * 0.125
    else:
        codes = tl.load(payload_ptr + columns, mask=columns < payload_inside, other=0).to(tl.int32)
        if MANTISSA_BITS > 0:
            value = _fp8_value(codes, MANTISSA_BITS, BIAS)
        else:
            value = codes.to(tl.float32)
    value *= scale[:, None]
    tl.store(y_ptr + selected * width + columns, narrow(value, y_ptr.dtype.element_ty), mask=columns < width)


# ---- launch functions ----


def _tile(codec: Codec, width: int) -> dict[str, int]:
    """A row as [GROUPS, COLUMNS], each group with one scale."""
    if codec.grouped:
        return {"GROUPS": _power_of_2(codec.num_scales(width)), "COLUMNS": GROUP, "num_warps": _num_warps(width)}
    return {"GROUPS": 1, "COLUMNS": _power_of_2(width), "num_warps": _num_warps(width)}


def _power_of_2(number: int) -> int:
    return 1 << (max(1, number) - 1).bit_length()


def _num_warps(width: int) -> int:
    # 8 values a thread: one 128-bit load of 16-bit values.
    return max(1, min(16, _power_of_2(width) // 256))


def _format(codec: Codec) -> dict[str, int | bool]:
    return {
        "MANTISSA_BITS": codec.mantissa_bits, "BIAS": codec.exponent_bias, "ROTATED": codec.rotated,
        "PER_BYTE": codec.per_byte, "HALVES": codec.halves,
    }  # fmt: skip


@on_its_device
def launch_quantize(x: Tensor, codec: Codec, rows: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """Payload and scales of x [R, N], or of its rows listed in `rows`, by the kernel."""
    payload, scales = _empty_payload(x, codec, rows)
    if payload.numel():
        _quantize_kernel[(len(payload),)](
            x, x if rows is None else rows, x if seed is None else seed, _as_integers(payload), scales,
            *x.shape, payload.shape[1], scales.shape[1], LARGEST=codec.largest, **_format(codec),
            HAS_ROWS=rows is not None, STOCHASTIC=seed is not None, **_tile(codec, x.shape[1]),
        )  # fmt: skip
    return payload, scales


@on_its_device
def launch_dequantize(
    payload: Tensor, scales: Tensor, codec: Codec, width: int, dtype: torch.dtype, rows: Tensor | None
) -> Tensor:
    """Values [R, width] of payload and scales, or of their rows listed in `rows`, by the kernel."""
    y = payload.new_empty(len(payload if rows is None else rows), width, dtype=dtype)
    if y.numel():
        _dequantize_kernel[(len(y),)](
            _as_integers(payload), scales, scales if rows is None else rows, y, len(payload), width,
            payload.shape[1], scales.shape[1], **_format(codec), HAS_ROWS=rows is not None, **_tile(codec, width),
        )  # fmt: skip
    return y


def _empty_payload(x: Tensor, codec: Codec, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    num_selected, width = len(x if rows is None else rows), x.shape[1]
    payload = x.new_empty(num_selected, codec.payload_width(width), dtype=codec.payload)
    return payload, x.new_empty(num_selected, codec.num_scales(width), dtype=codec.scale_dtype)


def _as_integers(payload: Tensor) -> Tensor:
    return payload.view(torch.uint8) if payload.dtype.is_floating_point else payload


# ---- reference: the CPU's body and the tests' oracle ----


def rotate_reference(x: Tensor) -> Tensor:
    """x [..., 64] times the Hadamard matrix of order 64, not scaled.

    Additions are in the kernel's order.
    """
    shape = x.shape
    for stage in range(6):
        low, high = x.reshape(-1, 32 >> stage, 2, 1 << stage).unbind(2)
        x = torch.stack((low + high, low - high), 2)
    return x.reshape(shape)


def _sum_of_group_reference(x: Tensor) -> Tensor:
    """Sums [..., 1] of x [..., 64], in the kernel's order."""
    for _ in range(6):
        x = x[..., ::2] + x[..., 1::2]
    return x


def _round_reference(x: Tensor, random: Tensor | None) -> Tensor:
    if random is None:
        return x.round()
    return x.floor() + (random < x - x.floor())


def _round_to_fp8(x: Tensor, codec: Codec, random: Tensor | None) -> Tensor:
    """x rounded to values of the fp8 format, in fp32."""
    if random is None:
        return x.to(codec.payload).float()
    exponent = (torch.frexp(x).exponent - 1).clamp(min=1 - codec.exponent_bias)
    return torch.ldexp(
        _round_reference(torch.ldexp(x.abs(), codec.mantissa_bits - exponent), random), exponent - codec.mantissa_bits
    ).copysign(x)


def quantize_reference(x: Tensor, codec: Codec, rows: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same as `launch_quantize`, in torch.

    In place where possible: new memory costs more than arithmetic.
    """
    num_scales, columns = codec.num_scales(x.shape[1]), GROUP if codec.grouped else x.shape[1]
    selected = (x if rows is None else x[rows]).float()
    padding = num_scales * columns - x.shape[1]
    values = (functional.pad(selected, (0, padding)) if padding else selected).view(-1, num_scales, columns)
    if codec.rotated:
        values = rotate_reference(values) * 0.125
    if codec.halves and seed is None:
        magnitudes = values.abs().nan_to_num_(torch.inf, torch.inf)
        scales = _sum_of_group_reference(magnitudes).squeeze(2) * (STEP_OF_MEAN / GROUP)
    else:
        scales = values.abs().amax(2).nan_to_num_(torch.inf, torch.inf).div_(codec.largest)
    if codec.grouped:
        scales = ((scales.view(torch.int32) + 0xFFFF) & -65536).view(torch.float32).to(torch.bfloat16)
    divisors = torch.where(scales > 0, scales.float(), 1.0)
    scaled = values / divisors[:, :, None]
    if not bool(torch.isfinite(scales).all()):
        scaled.nan_to_num_(0.0)
    scaled.clamp_(-codec.largest, codec.largest)
    random = None if seed is None else random_16_reference(seed, len(selected), num_scales * columns) / 65536
    random = None if random is None else random.view_as(scaled)
    if codec.mantissa_bits:
        return _round_to_fp8(scaled, codec, random).flatten(1).to(codec.payload)[:, : x.shape[1]].contiguous(), scales
    if codec.halves:
        scaled += codec.largest
    codes = (scaled.round_() if random is None else _round_reference(scaled, random)).flatten(1).to(torch.int8)
    if codec.per_byte > 1:
        codes = codes.view(torch.uint8) & 15
        if codec.per_byte == 4:
            codes = codes[:, ::2] | (codes[:, 1::2] << 2)
        return codes[:, ::2] | (codes[:, 1::2] << 4), scales
    return codes[:, : x.shape[1]].contiguous(), scales


def dequantize_reference(
    payload: Tensor, scales: Tensor, codec: Codec, width: int, dtype: torch.dtype, rows: Tensor | None
) -> Tensor:
    """The same as `launch_dequantize`, in torch."""
    if rows is not None:
        payload, scales = payload[rows], scales[rows]
    if codec.rotated:
        codes = torch.stack((payload & 15, payload >> 4), 2).to(torch.int8).flatten(1)
        if codec.halves:
            values = torch.stack((codes & 3, codes >> 2), 2).flatten(1).float() - codec.largest
        else:
            values = ((codes ^ 8) - 8).float()
        values = (rotate_reference(values.view(-1, GROUP)) * 0.125).view(values.shape)
    else:
        values = payload.float()
    columns = GROUP if codec.grouped else width
    if values.shape[1] % columns == 0:
        values.view(len(values), scales.shape[1], columns).mul_(scales.float()[:, :, None])
    else:  # the last group is not whole
        values *= scales.float().repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]
    return values[:, :width].to(dtype)


# ---- operators ----


def _eager_quantize(x: Tensor, codec: str, rows: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        return launch_quantize(x, CODECS[codec], rows, seed)
    _check_rows("quantize", rows, len(x))
    return quantize_reference(x, CODECS[codec], rows, seed)


def _eager_dequantize(
    payload: Tensor, scales: Tensor, codec: str, width: int, dtype: torch.dtype, rows: Tensor | None
) -> Tensor:
    if runs_triton(payload):
        return launch_dequantize(payload, scales, CODECS[codec], width, dtype, rows)
    _check_rows("dequantize", rows, len(payload))
    return dequantize_reference(payload, scales, CODECS[codec], width, dtype, rows)


_quantize = torch.library.custom_op("fedbert_kernels::quantize", _eager_quantize, mutates_args=())
_dequantize = torch.library.custom_op("fedbert_kernels::dequantize", _eager_dequantize, mutates_args=())


@_quantize.register_fake
def _(x, codec, rows, seed):
    return _empty_payload(x, CODECS[codec], rows)


@_dequantize.register_fake
def _(payload, scales, codec, width, dtype, rows):
    return payload.new_empty((payload if rows is None else rows).shape[0], width, dtype=dtype)


def quantize(x: Tensor, codec: str, rows: Tensor | None = None, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Payload and scales of x [R, N], or of its rows listed in `rows` [M] int64.

    `codec` is a key of CODECS. With `seed` ([2] int64: seed and offset) rounding is stochastic and
    unbiased. A value that is not finite makes its scale infinite. ValueError if shapes, dtypes or
    devices do not fit. A row number outside x is a ValueError on a CPU. Elsewhere, where a check
    would wait for the device, it gives a scale of NaN.
    """
    _check_codec("quantize", codec)
    if x.dim() != 2 or x.dtype not in FLOATS or not 0 < x.shape[1] <= LARGEST_WIDTH:
        raise ValueError(
            f"quantize: x must be [R, N] in fp32, fp16 or bf16 with N from 1 to {LARGEST_WIDTH}, "
            f"not {list(x.shape)} in {x.dtype}"
        )
    _check_index("quantize", "rows", rows, x.device)
    _check_index("quantize", "seed", seed, x.device)
    if seed is not None and seed.shape != (2,):
        raise ValueError(f"quantize: seed must be [2], not {list(seed.shape)}")
    # An operator's way through torch's dispatcher costs the host more than its launch.
    run = _eager_quantize if is_eager(x) else _quantize
    return run(x.detach().contiguous(), codec, None if rows is None else rows.contiguous(), seed)


def dequantize(
    payload: Tensor,
    scales: Tensor,
    codec: str,
    width: int,
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Tensor:
    """Values [R, width] of what `quantize` returned, or of its rows listed in `rows` [M] int64.

    `dtype` is fp32, fp16 or bf16. ValueError if shapes, dtypes or devices do not fit. A row number
    outside the payload is a ValueError on a CPU; elsewhere it gives NaN.
    """
    _check_codec("dequantize", codec)
    form = CODECS[codec]
    if not 0 < width <= LARGEST_WIDTH or dtype not in FLOATS:
        raise ValueError(f"dequantize: {width} columns in {dtype}; from 1 to {LARGEST_WIDTH} in fp32, fp16 or bf16 go")
    for name, part, columns, part_dtype in (
        ("payload", payload, form.payload_width(width), form.payload),
        ("scales", scales, form.num_scales(width), form.scale_dtype),
    ):
        if part.dim() != 2 or part.shape != (len(payload), columns) or part.dtype != part_dtype:
            raise ValueError(
                f"dequantize: {name} must be [R, {columns}] in {part_dtype} for {width} columns of {codec}, "
                f"payload and scales with the same R, not {list(part.shape)} in {part.dtype}"
            )
    if scales.device != payload.device:
        raise ValueError(f"dequantize: scales on {scales.device}, payload on {payload.device}")
    _check_index("dequantize", "rows", rows, payload.device)
    rows = None if rows is None else rows.contiguous()
    run = _eager_dequantize if is_eager(payload) else _dequantize
    return run(payload.contiguous(), scales.contiguous(), codec, width, dtype, rows)


def _check_codec(name: str, codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"{name}: codec {codec!r} is unknown; choose one of {', '.join(CODECS)}")


def _check_index(name: str, argument: str, index: Tensor | None, device: torch.device) -> None:
    if index is None:
        return
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{name}: {argument} must be one-dimensional int64, not {list(index.shape)} {index.dtype}")
    if index.device != device:
        raise ValueError(f"{name}: {argument} on {index.device}, values on {device}")


def _check_rows(name: str, rows: Tensor | None, num_rows: int) -> None:
    if rows is not None and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
        raise ValueError(f"{name}: a row number is not between 0 and {num_rows - 1}")


# ---- what compiles without a GPU ----


def compile_cases() -> list[CompileCase]:
    """Both kernels of each codec at width 768; int8 in each dtype; two with stochastic rounding."""
    drawn = [(name, "bf16", False) for name in CODECS]
    drawn += [("int8", "fp16", False), ("int8", "fp32", False), ("int8", "bf16", True), ("fp8_e4m3", "bf16", True)]
    return [case for name, dtype, stochastic in drawn for case in _compile_cases_of(name, dtype, stochastic)]


def _compile_cases_of(name: str, dtype: str, stochastic: bool) -> list[CompileCase]:
    codec, tile = CODECS[name], _tile(CODECS[name], 768)
    options = {"num_warps": tile.pop("num_warps")}
    payload = {"payload_ptr": "*i8" if codec.payload == torch.int8 else "*u8"}
    scales = {"scales_ptr": "*bf16" if codec.grouped else "*fp32"}
    rows = {"rows_ptr": "*i64"}
    sizes = dict.fromkeys(("num_rows", "width", "payload_width", "num_scales"), "i32")
    constants = {**_format(codec), "HAS_ROWS": True, **tile}
    label = f"{name} {dtype}{' stochastic' if stochastic else ''}"
    quantize_case = CompileCase(
        f"quantize {label}",
        _quantize_kernel,
        {"x_ptr": f"*{dtype}", **rows, "seed_ptr": "*i64", **payload, **scales, **sizes},
        {**constants, "LARGEST": codec.largest, "STOCHASTIC": stochastic},
        options,
        ("width", "payload_width"),
    )
    dequantize_case = CompileCase(
        f"dequantize {label}",
        _dequantize_kernel,
        {**payload, **scales, **rows, "y_ptr": f"*{dtype}", **sizes},
        constants,
        options,
        ("width", "payload_width"),
    )
    return [quantize_case] if stochastic else [quantize_case, dequantize_case]
