"""Attention by other libraries, called as `attention.attention` is, for packed sequences.

They are FlashAttention-2 as torch has it, and the packages flash-attn 2, 3 and 4. All draw dropout
from torch's generator: a mask follows from the seed of the micro-batch, and a forward that is
repeated draws it again; a backward reads it from what its forward kept. All are asked for a
backward whose bits repeat. That costs some of them speed, and is what our kernels give.

Not here, though `python -m benchmarks.kernels` times them: FlexAttention has no dropout and
compiles a mask for every packing; cuDNN makes plans for a number of sequences and their longest, so
it would compile in mid-run. `torch.nn.attention.varlen` is torch's FlashAttention-2 without
dropout, and without a switch for bits that repeat.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from fedbert_kernels.sequences import longest_sequence

Attend = Callable[..., Tensor]
"""As `attention.attention`, without its seed."""
Inputs = Tensor | tuple[Tensor, Tensor, Tensor]
"""qkv [T, 3, heads, d], or q, k and v, each [T, heads, d]."""


@dataclass(frozen=True)
class Rival:
    """Another library's attention."""

    attend: Attend
    has_dropout: bool
    module: str = ""
    """Of its package; empty for torch's own."""
    package: str = ""
    """By which its release is known."""

    def release(self) -> str:
        """Release of its package, empty for torch's own. ImportError if it cannot be imported."""
        if not self.module:
            return ""
        importlib.import_module(self.module)
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


# ---- FlashAttention-2 in torch ----

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float dropout, int sliding_window, float scale"


@torch.library.custom_op(
    "fedbert_kernels::flash_attention",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _flash_attention(q, k, v, cu_seqlens, dropout, sliding_window, scale):
    """out [T, heads, d], lse [heads, T] fp32, and two tensors by which backward finds the mask."""
    forward = torch.ops.aten._flash_attention_forward
    out, lse, state, unused, _ = forward(
        q, k, v, *_bounds(cu_seqlens), dropout, False, False, **_options(sliding_window, scale)
    )
    return out, lse, state, unused


@torch.library.custom_op(
    "fedbert_kernels::flash_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, Tensor state, Tensor unused) -> (Tensor, Tensor, Tensor)",
)
def _flash_attention_backward(dout, q, k, v, cu_seqlens, dropout, sliding_window, scale, out, lse, state, unused):
    backward = torch.ops.aten._flash_attention_backward
    kept = (*_bounds(cu_seqlens), dropout, False, state, unused)
    with _repeatable():
        dq, dk, dv = backward(dout, q, k, v, out, lse, *kept, **_options(sliding_window, scale))
    return dq, dk, dv


def _bounds(cu_seqlens: Tensor) -> tuple[Tensor, Tensor, int, int]:
    longest = longest_sequence(cu_seqlens)
    return cu_seqlens, cu_seqlens, longest, longest


def _options(sliding_window: int, scale: float) -> dict[str, Any]:
    each_side = None if sliding_window < 0 else sliding_window
    return {"scale": scale, "window_size_left": each_side, "window_size_right": each_side}


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Ask torch for kernels whose bits repeat; FlashAttention's backward has no other switch."""
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    # Else it would also fill every new tensor.
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)
        settings.fill_uninitialized_memory = fills


@_flash_attention.register_fake
def _(q, k, v, cu_seqlens, dropout, sliding_window, scale):
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)


@_flash_attention_backward.register_fake
def _(dout, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dropout, sliding_window, scale = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (dropout, sliding_window, scale)


def _differentiate(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, *output = ctx.saved_tensors
    return *_flash_attention_backward(dout, q, k, v, cu_seqlens, *ctx.options, *output), None, None, None, None


_flash_attention.register_autograd(_differentiate, setup_context=_save)


def torch_flash(
    inputs: Inputs,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention-2 as torch has it; fp16 and bf16 on a GPU.

    It keeps a probability in (floor(255 (1 - dropout)) + 1) / 256 of all cases and scales by 1 / (1
    - dropout): at 0.1 the mean is 0.2 % low.
    """
    q, k, v = _parts(inputs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    each_side = -1 if sliding_window is None else sliding_window
    out: Tensor = _flash_attention(q, k, v, cu_seqlens, float(dropout), each_side, float(scale))[0]
    return out


# ---- packages ----


@torch.compiler.disable
def flash_attn(
    inputs: Inputs,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """flash-attn 2, which writes the gradient of a packed qkv in place."""
    package: Any = importlib.import_module("flash_attn")
    longest = longest_sequence(cu_seqlens)
    options = {
        "dropout_p": dropout, "softmax_scale": scale, "window_size": _window(sliding_window, -1), "deterministic": True
    }  # fmt: skip
    if isinstance(inputs, Tensor):
        return _first(package.flash_attn_varlen_qkvpacked_func(inputs, cu_seqlens, longest, **options))
    return _first(package.flash_attn_varlen_func(*inputs, cu_seqlens, cu_seqlens, longest, longest, **options))


@torch.compiler.disable
def flash_attn_3(
    inputs: Inputs,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention-3, without dropout."""
    package: Any = importlib.import_module("flash_attn_interface")
    options = {"softmax_scale": scale, "window_size": _window(sliding_window, -1), "deterministic": True}
    return _first(package.flash_attn_varlen_func(*_parts(inputs), *_bounds(cu_seqlens), **_without(dropout, options)))


@torch.compiler.disable
def flash_attn_4(
    inputs: Inputs,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention-4, without dropout."""
    package: Any = importlib.import_module("flash_attn.cute")
    longest = longest_sequence(cu_seqlens)
    options = {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest,
        "softmax_scale": scale, "window_size": _window(sliding_window, None), "deterministic": True,
    }  # fmt: skip
    return _first(package.flash_attn_varlen_func(*_parts(inputs), **_without(dropout, options)))


def _parts(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.unbind(1) if isinstance(inputs, Tensor) else inputs


def _window(sliding_window: int | None, nothing: int | None) -> tuple[int | None, int | None]:
    return (nothing, nothing) if sliding_window is None else (sliding_window, sliding_window)


def _without(dropout: float, options: dict[str, Any]) -> dict[str, Any]:
    if dropout:
        raise ValueError("has no dropout")
    return options


def _first(result: Any) -> Tensor:
    """The output alone, where a release also returns what it keeps."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


RIVALS = {
    "FlashAttention-2 in torch": Rival(torch_flash, has_dropout=True),
    "flash-attn 2": Rival(flash_attn, has_dropout=True, module="flash_attn", package="flash-attn"),
    "flash-attn 3": Rival(flash_attn_3, has_dropout=False, module="flash_attn_interface", package="flash-attn-3"),
    "flash-attn 4": Rival(flash_attn_4, has_dropout=False, module="flash_attn.cute", package="flash-attn-4"),
}
"""By the names under which a card's file keeps them."""
