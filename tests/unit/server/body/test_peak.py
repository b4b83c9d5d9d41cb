"""The rates that a body is compared with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedbert_ds.server.body import peak
from fedbert_ds.server.body.peak import Peak, matmul, nominal_rate, peak_of, together

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("T4", None)],
)
def test_a_card_is_known_by_the_longest_name_it_bears(
    monkeypatch: pytest.MonkeyPatch, name: str, rate: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name))
    assert nominal_rate(torch.device("cuda"), torch.bfloat16) == rate
    assert nominal_rate(torch.device("cuda"), torch.float32) is None
    assert nominal_rate(CPU, torch.bfloat16) is None


def test_a_product_is_counted_by_its_size() -> None:
    product, flops = matmul(CPU, torch.bfloat16, size=10)
    assert (product().shape, product().dtype, flops) == ((10, 10), torch.bfloat16, 2 * 10**3)


def test_a_rate_is_operations_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def product() -> None:
        calls.append(2.0)

    monkeypatch.setattr(peak, "matmul", lambda *_: (product, 300.0))
    # The first call, which may compile or tune, is not timed.
    monkeypatch.setattr(peak, "time", SimpleNamespace(monotonic=lambda: sum(calls)))
    assert peak_of(CPU, torch.float32) == Peak(150.0, None)
    assert len(calls) == 1 + peak.CALLS


def test_measuring_draws_none_of_the_runs_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert peak_of(CPU, torch.float32).measured > 0.0
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_add_up_and_one_unknown_card_makes_the_whole_unknown() -> None:
    assert together([Peak(1.0, 2.0), Peak(3.0, 4.0)]) == Peak(4.0, 6.0)
    assert together([Peak(1.0, 2.0), Peak(3.0, None)]) == Peak(4.0, None)
