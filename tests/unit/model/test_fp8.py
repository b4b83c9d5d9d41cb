"""Encoder layers in fp8: which of them, what is refused, and how near they are where torchao is."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.cut import split
from fedbert_ds.model.fp8 import check_fp8, install_fp8

CPU = torch.device("cpu")


@pytest.fixture
def body(small_model) -> Any:
    return split(small_model("bert").train(), "embeddings")[1].bfloat16()


@pytest.fixture
def converted(monkeypatch) -> list[Any]:
    """(layer, settings) of each call of a torchao that is not there."""
    calls: list[Any] = []
    package = ModuleType("torchao.float8")
    package.Float8LinearConfig = SimpleNamespace
    package.convert_to_float8_training = lambda layer, config: calls.append((layer, vars(config)))
    parent = ModuleType("torchao")
    parent.float8 = package
    monkeypatch.setitem(sys.modules, "torchao", parent)
    monkeypatch.setitem(sys.modules, "torchao.float8", package)
    return calls


def test_all_layers_but_the_last_are_converted(body, converted, monkeypatch) -> None:
    install_fp8(body, CPU)
    assert [layer for layer, _ in converted] == list(body.layers[:-1])
    assert all(settings == {"pad_inner_dim": True, "emulate": True} for _, settings in converted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    install_fp8(body, torch.device("cuda"))
    assert not converted[-1][1]["emulate"]


def test_without_the_package_it_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"body\.fp8: true needs the torchao package; pip install torchao"):
        check_fp8(CPU)


@pytest.mark.parametrize(("capability", "is_enough"), [((8, 0), False), ((8, 9), True), ((10, 0), True)])
def test_a_card_without_fp8_is_one_line(converted, monkeypatch, capability, is_enough: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    if is_enough:
        return check_fp8(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"body\.fp8: A Card has no fp8 matrix products .*; set false"):
        check_fp8(torch.device("cuda"))


def test_emulated_products_are_near_and_keep_names_and_weights(body) -> None:
    pytest.importorskip("torchao.float8")
    plain = copy.deepcopy(body)
    install_fp8(body, CPU)
    assert body.state_dict().keys() == plain.state_dict().keys()

    def run(one: Any, num_masked: int = 9) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        values = torch.randn(27, 16, generator=random, requires_grad=True)
        hidden = one(values, torch.arange(num_masked), torch.tensor([0, 20, 27]).int())
        weights = torch.randn(hidden.shape, generator=random)
        return [hidden.detach(), *torch.autograd.grad(hidden, [values, *one.parameters()], weights.to(hidden.dtype))]

    hidden, of_values, *_ = (found.double() for found in run(body))
    exact, exact_of_values, *_ = (found.double() for found in run(plain))
    assert 0.0 < (hidden - exact).norm() / exact.norm() < 0.2
    assert 0.0 < (of_values - exact_of_values).norm() / exact_of_values.norm() < 0.5
    assert all(bool(found.isfinite().all()) for found in run(body, num_masked=0))
