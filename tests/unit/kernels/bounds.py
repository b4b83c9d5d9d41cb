"""What kernel tests share: their device, both bodies of an operator, and "as good as torch".

A kernel is as good as torch if its error against fp64 is at most twice torch's in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fedbert_kernels.interpreter import HAVE_TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True, scope="module")
def on_device() -> Iterator[None]:
    """Tensors are made on the GPU if there is one; a test module imports this to have it."""
    with torch.device(DEVICE):
        yield


def bodies_of(module: ModuleType):
    """A fixture that runs a test with either body of a file's operators: kernel, and torch's."""

    @pytest.fixture(params=[pytest.param("kernel", marks=needs_triton), "torch"])
    def body(request, monkeypatch) -> None:
        monkeypatch.setattr(module, "runs_triton", lambda _: request.param == "kernel")

    return body


def values_and_gradients(
    compute: Callable[..., Tensor], parts: Sequence[Tensor | None], dy: Tensor, fp64: bool = False
) -> list[Tensor]:
    """[y, gradient of each part that is not None] for an incoming gradient dy; in fp64 if asked."""
    leaves = [None if part is None else part.detach() for part in parts]
    if fp64:
        leaves = [None if leaf is None else leaf.double() for leaf in leaves]
    wanted = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    y = compute(*leaves)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def assert_as_good_as_torch(
    ours: Callable[..., Tensor],
    torchs: Callable[..., Tensor],
    parts: Sequence[Tensor | None],
    dy: Tensor,
    terms: float = 0.0,
) -> None:
    """Compare `ours` and `torchs`, functions of `parts`, with fp64: values and gradients.

    Half a unit in the last place of the largest value is always allowed: rounding the exact result
    costs as much, and over few values torch may be lucky. For sums that may cancel, `terms` is the
    size of their terms.
    """
    results = (
        values_and_gradients(ours, parts, dy),
        values_and_gradients(torchs, parts, dy),
        values_and_gradients(torchs, parts, dy, fp64=True),
    )
    for number, (our, their, exact) in enumerate(zip(*results, strict=True)):
        name = f"gradient {number}" if number else "value"
        assert our.shape == exact.shape, f"{name}: {list(our.shape)} instead of {list(exact.shape)}"
        assert our.dtype == their.dtype, f"{name}: {our.dtype} instead of {their.dtype}"
        if exact.numel():
            rounding = torch.finfo(our.dtype).eps / 2 * max(terms, float(exact.abs().max()))
            our_error, their_error = _error(our, exact), _error(their, exact)
            assert our_error <= 2 * their_error + rounding, f"{name}: error {our_error}, torch's {their_error}"


def _error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).abs().max())
