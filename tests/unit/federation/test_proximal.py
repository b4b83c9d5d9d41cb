"""The proximal term's gradient is autograd's, of the parameters in the reference alone."""

from __future__ import annotations

import pytest
import torch

from fedbert_ds.federation.proximal import add_proximal_gradient


@pytest.mark.parametrize("mu", [0.0, 0.01, 3.0])
def test_it_is_the_gradient_of_the_term(mu: float) -> None:
    random = torch.Generator().manual_seed(1)
    ours, theirs = (
        {name: torch.nn.Parameter(tensor.clone()) for name, tensor in values.items()}
        for values in [{"a": torch.randn(3, 2, generator=random), "b": torch.randn(2, generator=random)}] * 2
    )
    reference = {"a": torch.randn(3, 2, generator=random)}
    for parameters in (ours, theirs):
        (parameters["a"].sum() * parameters["b"].square().sum()).backward()
    (mu / 2 * (theirs["a"] - reference["a"]).square().sum()).backward()
    add_proximal_gradient(ours, reference, mu)
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)


def test_a_parameter_without_a_gradient_gets_one() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    add_proximal_gradient({"it": parameter}, {"it": torch.tensor([1.0])}, mu=0.5)
    assert parameter.grad is not None and parameter.grad.item() == 1.0


def test_without_mu_no_gradient_appears() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    add_proximal_gradient({"it": parameter}, {"it": torch.tensor([1.0])}, mu=0.0)
    assert parameter.grad is None
