"""A window's gradient is the sum of its micro-batches' in fp32, and DeepSpeed sees one backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbert_ds.server.body.window_gradient import WindowGradient


class Engine:
    """DeepSpeed's, as far as it is used."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimizer = SimpleNamespace()
        self.log: list[str] = []

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.log.append(f"boundary {is_boundary}")

    def backward(self, loss: Tensor) -> None:
        assert loss.dim() == 0
        self.log.append("backward")
        loss.backward()

    def _backward_prologue(self) -> None:
        self.log.append("prologue")


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8).to(dtype)


def micro_batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(number)
    inputs, gradient = (torch.randn(16, 8, generator=generator) for _ in range(2))
    return inputs.to(dtype).requires_grad_(True), gradient


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_gets_what_plain_backwards_would_have_added_up(world_size: int) -> None:
    module, plain = layer(), layer()
    engine = Engine(module)
    gradient = WindowGradient(engine, world_size)
    for number in range(3):
        inputs, of_outputs = micro_batch(number)
        again, _ = micro_batch(number)
        of_inputs = gradient.backward(module(inputs), of_outputs, inputs)
        (plain(again) * of_outputs).sum().backward()
        assert torch.equal(of_inputs, again.grad)  # type: ignore[arg-type]
        assert inputs.grad is None and module.weight.grad is None and engine.log == []
    gradient.give()
    assert engine.log == ["boundary True", "backward", "prologue"]
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, world_size * theirs.grad)  # type: ignore[arg-type, operator]


def test_a_window_begins_with_nothing() -> None:
    module = layer()
    gradient = WindowGradient(Engine(module), 1)
    inputs, of_outputs = micro_batch(0)
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.drop()
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    once = module.weight.grad.clone()  # type: ignore[union-attr]
    module.zero_grad()
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    assert torch.equal(module.weight.grad, once)  # type: ignore[arg-type]


def test_two_parameters_may_get_one_tensor() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.unused = (nn.Parameter(torch.ones(8)) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.left + self.right

    module = Sum()
    gradient = WindowGradient(Engine(module), 1)
    for number in range(2):
        inputs, of_outputs = micro_batch(number)
        gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    expected = sum(micro_batch(number)[1].sum(0) for number in range(2))
    assert torch.equal(module.left.grad, expected) and torch.equal(module.right.grad, expected)  # type: ignore[arg-type]
    assert module.unused.grad is None


def test_in_bf16_the_sum_of_many_is_rounded_once() -> None:
    """Added up in bf16, 512 micro-batches lose several per cent."""
    module, plain = layer(torch.bfloat16), layer(torch.bfloat16)
    gradient = WindowGradient(Engine(module), 1)
    exact = torch.zeros(8, 8, dtype=torch.float64)
    for number in range(512):
        inputs, of_outputs = micro_batch(number, torch.bfloat16)
        of_outputs = of_outputs + 0.5  # as far from zero as gradients of one direction are
        inputs.data += 0.5
        (one,) = torch.autograd.grad(plain(inputs), [plain.weight], of_outputs.bfloat16())
        exact += one.double()
        (plain(inputs) * of_outputs.bfloat16()).sum().backward()
        gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()

    def error(weight: Any) -> float:
        return float((weight.grad.double() - exact).norm() / exact.norm())

    assert error(module.weight) < 2**-8
    assert error(plain.weight) > 4 * 2**-8, "there is nothing to mend"
