"""A window's gradient is its micro-batches' sum in fp32, and lies where DeepSpeed takes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedbert_ds.server.body.window_gradient import WindowGradient


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8).to(dtype)


def micro_batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(number)
    inputs, gradient = (torch.randn(16, 8, generator=generator) for _ in range(2))
    return inputs.to(dtype).requires_grad_(True), gradient


def at_stage_0(module: nn.Module, masters: dict[Tensor, Tensor] | None = None) -> WindowGradient:
    engine = SimpleNamespace(module=module, optimizer=SimpleNamespace())
    return WindowGradient(engine, 0, masters or {parameter: parameter for parameter in module.parameters()})


@pytest.fixture(autouse=True)
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each sum over ranks, of which there is one here; the first part comes back."""
    crossed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: crossed.append(len(flat)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size)

    def reduce_scatter_tensor(part: Tensor, flat: Tensor, group: Any) -> None:
        crossed.append(len(flat))
        part.copy_(flat[group.rank * len(part) : (group.rank + 1) * len(part)])

    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", reduce_scatter_tensor)
    return crossed


def test_deepspeed_gets_what_plain_backwards_would_have_added_up(sums: list[int]) -> None:
    module, plain = layer(), layer()
    gradient = at_stage_0(module)
    for number in range(3):
        inputs, of_outputs = micro_batch(number)
        again, _ = micro_batch(number)
        of_inputs = gradient.backward(module(inputs), of_outputs, inputs)
        (plain(again) * of_outputs).sum().backward()
        assert torch.equal(of_inputs, again.grad)  # type: ignore[arg-type]
        assert inputs.grad is None and module.weight.grad is None and sums == []
    gradient.give()
    assert sums == [72], "all crosses at once"
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("offloads", [False, True])
def test_above_stage_0_a_rank_gets_its_part_of_each_group(rank: int, offloads: bool, sums: list[int]) -> None:
    """As DeepSpeed lays two parameters in one flat tensor: a gap, and padding for two ranks."""
    module = layer()
    flat = torch.zeros(76)
    for parameter, offset in ((module.weight, 0), (module.bias, 66)):
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
    on_host = nn.Parameter(torch.zeros(38))
    on_host.grad = torch.zeros(38)
    optimizer = SimpleNamespace(
        round_robin_bit16_groups=[[module.weight, module.bias]],
        bit16_groups_flat=[flat],
        dp_process_group=SimpleNamespace(size=2, rank=rank),
        cpu_offload=offloads,
        averaged_gradients={},
        single_partition_of_fp32_groups=[on_host],
        norm_for_param_grads={},
        params_in_partition=[[module.weight, module.bias]],
        get_param_id=lambda parameter: 0 if parameter is module.weight else 1,
    )
    gradient = WindowGradient(SimpleNamespace(module=module, optimizer=optimizer), 2, {})
    inputs, of_outputs = micro_batch(0)
    (weight, bias) = torch.autograd.grad(module(inputs), [module.weight, module.bias], of_outputs)
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    whole = torch.cat([weight.flatten(), torch.zeros(2), bias, torch.zeros(2)])
    expected = whole[38 * rank : 38 * rank + 38]
    assert sums == [76]
    if offloads:
        assert torch.equal(on_host.grad, expected)
        assert [float(optimizer.norm_for_param_grads[n]) for n in range(2)] == [float(expected.norm()), 0.0]
    else:
        assert torch.equal(optimizer.averaged_gradients[0][0], expected)


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("offloads", [False, True])
def test_at_stage_3_a_rank_gets_its_cut_of_each_parameter(rank: int, offloads: bool, sums: list[int]) -> None:
    """Of three: 64 weights make two cuts of 22 and one of 20, 8 biases two of 3 and one of 2; what
    is missing is padding.
    """
    module = layer()
    for parameter, cut in ((module.weight, 22), (module.bias, 3)):
        parameter.partition_numel = lambda cut=cut: cut  # type: ignore[attr-defined]
    given: list[Tensor] = []
    optimizer = SimpleNamespace(
        fp16_groups=[[module.weight, module.bias]],
        dp_process_group=SimpleNamespace(size=3, rank=rank),
        offload_optimizer=offloads,
        averaged_gradients={},
        _offload_grad_partition_at_boundary=lambda parameter, cut, gradients, offsets: given.append(cut),
        _swap_out_offload_fp32_gradients=lambda gradients, offsets: given.append(torch.empty(0)),
    )
    gradient = WindowGradient(SimpleNamespace(module=module, optimizer=optimizer), 3, {})
    expected = torch.zeros(2, 66 + 9)
    for number in range(2):
        inputs, of_outputs = micro_batch(number)
        weight, bias = torch.autograd.grad(module(inputs), [module.weight, module.bias], of_outputs)
        expected[number, :64], expected[number, 66:74] = weight.flatten(), bias
        gradient.backward(module(inputs), of_outputs, inputs)
    assert sums == []
    gradient.give()
    assert sums == [75]
    whole = expected.sum(0)
    cuts = whole[:66].view(3, 22)[rank], whole[66:].view(3, 3)[rank]
    if offloads:
        assert all(map(torch.equal, given[:2], cuts)) and len(given) == 3
    else:
        assert torch.equal(optimizer.averaged_gradients[0][0], torch.cat(cuts))


def test_a_window_begins_with_nothing() -> None:
    module = layer()
    gradient = at_stage_0(module)
    inputs, of_outputs = micro_batch(0)
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.drop()
    gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    (once,) = torch.autograd.grad(module(inputs), [module.weight], of_outputs)
    assert torch.equal(module.weight.grad, once)  # type: ignore[arg-type]


def test_two_parameters_may_get_one_tensor_and_one_may_get_none() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.unused = (nn.Parameter(torch.ones(8)) for _ in range(3))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs + self.left + self.right

    module = Sum()
    gradient = at_stage_0(module)
    for number in range(2):
        inputs, of_outputs = micro_batch(number)
        gradient.backward(module(inputs), of_outputs, inputs)
    gradient.give()
    expected = sum(micro_batch(number)[1].sum(0) for number in range(2))
    assert torch.equal(module.left.grad, expected) and torch.equal(module.right.grad, expected)  # type: ignore[arg-type]
    assert module.unused.grad is not None and not module.unused.grad.any()


def test_in_bf16_the_sum_of_many_is_not_rounded() -> None:
    """Added up in bf16, 512 micro-batches lose several per cent."""
    module, plain = layer(torch.bfloat16), layer(torch.bfloat16)
    masters = {parameter: parameter.detach().float().requires_grad_() for parameter in module.parameters()}
    gradient = at_stage_0(module, masters)  # type: ignore[arg-type]
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

    def error(found: Any) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    assert error(masters[module.weight].grad) < 1e-6
    assert error(plain.weight.grad) > 4 * 2**-8, "there is nothing to mend"
