"""An operator is a plain autograd function until a compiler looks, and gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.layer_norm import residual_layer_norm


class Operators(TorchDispatchMode):
    """Notes our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fedbert_kernels":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def gradients(function: Any) -> list[Tensor]:
    torch.manual_seed(0)
    x, bias, weight = torch.randn(5, 32), torch.randn(32), torch.randn(32)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, weight)]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]


def both(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return residual_layer_norm(bias_gelu(x, bias), x, None, weight, None, 0.3, seed=torch.tensor([3, 4]))


def test_without_a_compiler_no_operator_is_called() -> None:
    with Operators() as noted:
        gradients(both)
    assert noted.names == []


def test_a_compiler_sees_operators_and_gets_the_same() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = gradients(torch.compile(both, backend=backend, fullgraph=True))
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"fedbert_kernels.bias_gelu.default", "fedbert_kernels.residual_layer_norm.default"} <= called
    assert all(map(torch.equal, found, gradients(both)))


def test_tensors_without_values_go_to_the_operator() -> None:
    with Operators() as noted:
        assert bias_gelu(torch.empty(5, 32, device="meta"), None).shape == (5, 32)
    assert noted.names == ["fedbert_kernels::bias_gelu"]
    with FakeTensorMode():
        assert bias_gelu(torch.empty(5, 32), None).shape == (5, 32)


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(5, 32, requires_grad=True)
    (first,) = torch.autograd.grad(bias_gelu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(first.sum(), x)
