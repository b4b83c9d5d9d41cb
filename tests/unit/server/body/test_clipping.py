"""Body and client model clipped by one norm, in both places where DeepSpeed clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.server.body.clipping import WholeNormClipping


class Optimizer:
    """Clips as DeepSpeed's optimizers do: whatever comes first, the norm is the last positional."""

    def __init__(self) -> None:
        self.norms: list[Any] = []

    def unscale_and_clip_grads(self, *arguments: Any, apply_scale: bool = True) -> None:
        self.norms.append(arguments[-1])


@pytest.mark.parametrize("others", [(), ([torch.zeros(2)],), (3,)], ids=["bf16", "ZeRO 1 and 2", "ZeRO 3"])
def test_deepspeeds_optimizers_get_the_larger_norm(others: tuple[Any, ...]) -> None:
    optimizer = Optimizer()
    clipping = WholeNormClipping(SimpleNamespace(optimizer=optimizer), max_norm=1.0)
    clipping.begin(4.0)
    optimizer.unscale_and_clip_grads(*others, torch.tensor(3.0))
    optimizer.unscale_and_clip_grads(*others, 3.0, apply_scale=False)
    assert [float(norm) for norm in optimizer.norms] == [5.0, 5.0]
    assert torch.is_tensor(optimizer.norms[0])
    assert clipping.scale == pytest.approx(1.0 / 5.0, rel=1e-5)


@given(
    body=st.lists(st.floats(-100.0, 100.0, width=32), min_size=1, max_size=5),
    client=st.lists(st.floats(-100.0, 100.0, width=32), min_size=1, max_size=5),
    max_norm=st.floats(0.01, 1000.0),
)
def test_fp32_without_zero_equals_torchs_clipping_of_one_model(
    body: list[float], client: list[float], max_norm: float
) -> None:
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(len(body)))])
    together = [torch.nn.Parameter(torch.zeros(len(part))) for part in (body, client)]
    for parameter, values in zip([*module, *together], (body, body, client), strict=True):
        parameter.grad = torch.tensor(values)
    engine: Any = SimpleNamespace(optimizer=object(), module=module)
    clipping = WholeNormClipping(engine, max_norm)
    clipping.begin(float(together[1].grad.double().norm()))
    engine.clip_fp32_gradients()
    torch.nn.utils.clip_grad_norm_(together, max_norm)
    torch.testing.assert_close(module[0].grad, together[0].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(client) * clipping.scale, together[1].grad, rtol=1e-5, atol=1e-6)


def test_a_small_gradient_is_left_alone() -> None:
    optimizer = Optimizer()
    clipping = WholeNormClipping(SimpleNamespace(optimizer=optimizer), max_norm=10.0)
    clipping.begin(4.0)
    optimizer.unscale_and_clip_grads(3.0)
    assert clipping.scale == 1.0
