"""LayerNorm, GELU, the client's loss and the wire's codecs: ours and its baselines.

Work is the bytes that the task must read and write once; of the loss, its operations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_ds.bench.kernels.problem import (
    BOTH,
    FORWARD,
    OURS,
    Build,
    Prepared,
    Problem,
    needs_compiler,
    plain,
)
from fedbert_kernels.gelu import bias_gelu, bias_gelu_reference
from fedbert_kernels.layer_norm import residual_layer_norm, residual_layer_norm_reference
from fedbert_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from fedbert_kernels.quantize import CODECS, dequantize, dequantize_reference, quantize, quantize_reference

EAGER, COMPILED = "torch", "torch.compile"
EPSILON = 1e-12
CODE_ERRORS = {
    "int8": 0.01,
    "int8_group": 0.01,
    "fp8_e4m3": 0.07,
    "fp8_e5m2": 0.13,
    "int4_hadamard": 0.15,
    "int2_hadamard": 0.7,
}
"""Of each codec, over the largest value: one code, the cost of rounding in another order."""


def layer_norm_problem(
    num_rows: int, width: int, dtype: torch.dtype, dropout: float, device: torch.device, compiled: bool = True
) -> Problem:
    """LayerNorm(residual + dropout(x + bias)) * weight + shift of [num_rows, width]."""
    x, residual, dy = (_draw(device, dtype, num_rows, width, seed=seed) for seed in range(3))
    bias, weight, shift = (_draw(device, dtype, width, seed=seed) for seed in range(3, 6))
    leaves = (x, residual, bias, weight + 1.0, shift)
    seed = torch.tensor([1, 2], device=device)

    def ours(p: float) -> Prepared:
        return plain(partial(residual_layer_norm, dropout=p, epsilon=EPSILON, seed=seed), leaves, dy)

    def in_torch(p: float) -> Callable[..., Tensor]:
        def compute(x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
            h = residual + functional.dropout(x + bias, p)
            return functional.layer_norm(h, (width,), weight, shift, EPSILON)

        return compute

    # Forward reads x and the residual and writes y; backward reads dy and both again, and writes a
    # gradient for each, which are the same one without dropout.
    forward, backward = 3, 5 if dropout else 4
    return Problem(
        kernel="layer norm",
        case=f"width {width:,}",
        dtype=dtype,
        dropout=dropout,
        ways={OURS: ours, **_torchs(in_torch, leaves, dy, compiled)},
        exact=_exact(partial(residual_layer_norm_reference, epsilon=EPSILON), leaves, dy),
        work={what: times * _bytes(x) for what, times in ((FORWARD, forward), (BOTH, forward + backward))},
        unit="GB/s",
        facts={"rows": num_rows, "width": width},
        inputs={"leaves": leaves, "dy": dy},
    )


def gelu_problem(num_rows: int, width: int, dtype: torch.dtype, device: torch.device, compiled: bool = True) -> Problem:
    """GELU(x + bias) of [num_rows, width]."""
    x, dy = (_draw(device, dtype, num_rows, width, seed=seed) for seed in range(2))
    leaves = (x, _draw(device, dtype, width, seed=2))

    def in_torch(_: float) -> Callable[..., Tensor]:
        return lambda x, bias: functional.gelu(x + bias)

    # Forward reads x and writes y; backward reads dy and x, and writes dx.
    return Problem(
        kernel="GELU",
        case=f"width {width:,}",
        dtype=dtype,
        dropout=0.0,
        ways={OURS: lambda _: plain(bias_gelu, leaves, dy), **_torchs(in_torch, leaves, dy, compiled)},
        exact=_exact(bias_gelu_reference, leaves, dy),
        work={FORWARD: 2 * _bytes(x), BOTH: 5 * _bytes(x)},
        unit="GB/s",
        facts={"rows": num_rows, "width": width},
    )


def loss_problem(
    num_rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, compiled: bool = True
) -> Problem:
    """Summed cross-entropy of hidden [num_rows, width] @ weight [vocabulary, width]^T + bias."""
    leaves = (
        _draw(device, dtype, num_rows, width, seed=0),
        _draw(device, dtype, vocabulary, width, seed=1) * width**-0.5,
        _draw(device, dtype, vocabulary, seed=2) * 0.1,
    )
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, (num_rows,), generator=generator).to(device)
    one = torch.ones((), device=device)

    def in_torch(_: float) -> Callable[..., Tensor]:
        def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            scores = functional.linear(hidden, weight, bias)
            return functional.cross_entropy(scores.float(), targets, reduction="sum")

        return compute

    operations = 2.0 * num_rows * width * vocabulary
    return Problem(
        kernel="linear + cross-entropy",
        case=f"{num_rows:,} rows",
        dtype=dtype,
        dropout=0.0,
        ways={
            OURS: lambda _: plain(partial(linear_cross_entropy, targets=targets), leaves, one),
            **_torchs(in_torch, leaves, one, compiled),
        },
        exact=_exact(partial(linear_cross_entropy_reference, targets=targets, upcast=True), leaves, one),
        work={FORWARD: operations, BOTH: 3 * operations},
        unit="TFLOP/s",
        facts={"rows": num_rows, "width": width, "vocabulary": vocabulary},
        inputs={"leaves": leaves, "targets": targets},
    )


def codec_problems(
    codec: str, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, compiled: bool = True
) -> list[Problem]:
    """Quantize a random half of the rows of x [2 * num_rows, width]; dequantize them again."""
    form = CODECS[codec]
    x = _draw(device, dtype, 2 * num_rows, width, seed=0)
    rows = torch.randperm(2 * num_rows, generator=torch.Generator().manual_seed(1))[:num_rows].to(device)
    payload, scales = quantize_reference(x, form, rows, None)
    moved = float(num_rows * width * x.element_size() + _bytes(payload) + _bytes(scales))

    def exact() -> tuple[Tensor, ...]:
        return (dequantize_reference(payload, scales, form, width, torch.float32, None).double(),)

    def unpack(outputs: tuple[Tensor, ...]) -> Tensor:
        return dequantize_reference(outputs[0], outputs[1], form, width, torch.float32, None)

    def to_codes(function: Callable[[], tuple[Tensor, ...]]) -> Build:
        return lambda _: Prepared(function, unpack=unpack)

    def to_values(function: Callable[[], Tensor]) -> Build:
        return lambda _: Prepared(lambda: (function(),))

    def compiled_codes(_: float) -> Prepared:
        needs_compiler(compiled)
        function = torch.compile(quantize_reference, dynamic=False)
        return Prepared(lambda: function(x, form, rows, None), unpack=unpack)

    def compiled_values(_: float) -> Prepared:
        needs_compiler(compiled)
        function = torch.compile(dequantize_reference, dynamic=False)
        return Prepared(lambda: (function(payload, scales, form, width, dtype, None),))

    sides: dict[str, dict[str, Build]] = {
        "quantize": {
            OURS: to_codes(lambda: quantize(x, codec, rows)),
            EAGER: to_codes(lambda: quantize_reference(x, form, rows, None)),
            COMPILED: compiled_codes,
        },
        "dequantize": {
            OURS: to_values(lambda: dequantize(payload, scales, codec, width, dtype)),
            EAGER: to_values(lambda: dequantize_reference(payload, scales, form, width, dtype, None)),
            COMPILED: compiled_values,
        },
    }
    return [
        Problem(
            kernel=kernel,
            case=codec,
            dtype=dtype,
            dropout=0.0,
            ways=ways,
            exact=exact,
            work={FORWARD: moved},
            unit="GB/s",
            facts={"rows": num_rows, "width": width},
            tolerance=CODE_ERRORS[codec],
        )
        for kernel, ways in sides.items()
    ]


def _torchs(
    function: Callable[[float], Callable[..., Tensor]], leaves: tuple[Tensor, ...], dy: Tensor, compiled: bool
) -> dict[str, Build]:
    """The function, for a dropout probability, as a model writes it, and the same compiled."""

    def with_compiler(dropout: float) -> Prepared:
        needs_compiler(compiled)
        return plain(torch.compile(function(dropout), dynamic=False), leaves, dy)

    return {EAGER: lambda dropout: plain(function(dropout), leaves, dy), COMPILED: with_compiler}


def _exact(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    def compute() -> tuple[Tensor, ...]:
        doubles = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
        value = function(*doubles)
        return value.detach(), *torch.autograd.grad(value, doubles, dy.double())

    return compute


def _draw(device: torch.device, dtype: torch.dtype, *shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())
