"""Ways to compute: who is right, who is wrong and why, and what a row then says; times are made
up."""

import pytest
import torch
from torch import Tensor

from fedbert_ds.bench.device import Timing
from fedbert_ds.bench.kernels import problem as module
from fedbert_ds.bench.kernels.problem import (
    BOTH,
    FORWARD,
    OURS,
    Prepared,
    Problem,
    Unavailable,
    measure,
    plain,
)

CPU = torch.device("cpu")
X = torch.linspace(-1.0, 2.0, 60).view(6, 10)
DY = torch.linspace(0.5, 1.5, 60).view(6, 10)


def problem(candidates, dropout: float = 0.0) -> Problem:
    """Squares, with dropout."""
    x = X.double()
    return Problem(
        kernel="square",
        case="small",
        dtype=torch.float32,
        dropout=dropout,
        ways=candidates,
        exact=lambda: (x**2, 2 * x * DY),
        work={FORWARD: 2e9, BOTH: 6e9},
        unit="GB/s",
        facts={"rows": 6},
    )


def square(x: Tensor) -> Tensor:
    return x**2


def square_and_drop(dropout: float) -> Prepared:
    mask = (torch.arange(60).view(6, 10) % 10 != 3) / 0.9 if dropout else 1.0
    return plain(lambda x: x**2 * mask, (X,), DY)


@pytest.fixture(autouse=True)
def timings(monkeypatch):
    """Half a second for ours, one second for everyone else; remembers who was timed."""
    timed = []

    def time_side_by_side(candidates, device, rounds, seconds, launch_ahead):
        for call in candidates.values():
            call()
        timed.append(list(candidates))
        return {name: Timing(0.5 if name == OURS else 1.0, 0.4, 2.0) for name in candidates}

    monkeypatch.setattr(module, "time_side_by_side", time_side_by_side)
    return timed


def reasons(candidates, dropout: float = 0.0) -> dict[tuple[str, str], str | None]:
    rows = measure(problem(candidates, dropout), CPU, peak=8e9, rounds=1, seconds=0.0)
    return {(row["way"], row["pass"]): row.get("reason") for row in rows}


def test_a_row_holds_time_rate_share_and_error() -> None:
    candidates = {OURS: lambda _: plain(square, (X,), DY), "other": lambda _: plain(square, (X,), DY)}
    rows = measure(problem(candidates), CPU, peak=8e9, rounds=1, seconds=0.0)
    assert [(row["way"], row["pass"]) for row in rows] == [
        (OURS, FORWARD), ("other", FORWARD), (OURS, BOTH), ("other", BOTH),
    ]  # fmt: skip
    assert rows[2]["milliseconds"] == 500 and rows[2]["GB/s"] == 12 and rows[2]["share_of_peak"] == 1.5
    assert rows[1]["milliseconds"] == 1000 and rows[1]["GB/s"] == 2 and rows[1]["fastest"] == 400
    assert all(row["error"] < 1e-6 and row["rows"] == 6 and row["dtype"] == "float32" for row in rows)


def test_who_cannot_run_is_a_row_with_the_reason_and_is_not_timed(timings) -> None:
    def broken(_: float) -> Prepared:
        raise RuntimeError("CUDA error: no kernel image\nand a page of more")

    def on_gpu(_: float) -> Prepared:
        raise Unavailable("needs a GPU")

    found = reasons({OURS: lambda _: plain(square, (X,), DY), "broken": broken, "on a GPU": on_gpu})
    assert found["broken", FORWARD] == found["broken", BOTH] == "RuntimeError: CUDA error: no kernel image"
    assert found["on a GPU", BOTH] == "needs a GPU"
    assert found[OURS, BOTH] is None and timings == [[OURS], [OURS]]


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (lambda x: x**2 + 0.01 * (x > 1.9), (FORWARD, BOTH)),
        (lambda x: x.abs() ** 2.001, (FORWARD, BOTH)),
        (lambda x: x**2 * float("nan"), (FORWARD, BOTH)),
        (lambda x: (x**2)[:5], (FORWARD, BOTH)),
        (lambda x: x * x.detach(), (BOTH,)),
    ],
)
def test_who_is_wrong_is_not_timed(function, passes) -> None:
    found = reasons({OURS: lambda _: plain(function, (X,), DY)})
    for what in (FORWARD, BOTH):
        assert (found[OURS, what] is not None) == (what in passes)
    assert all("wrong" in (found[OURS, what] or "") for what in passes)


def test_without_a_backward_the_forward_still_counts() -> None:
    class OnlyForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**2

        @staticmethod
        def backward(ctx, dy):
            raise NotImplementedError("no backward here")

    found = reasons({OURS: lambda _: plain(OnlyForward.apply, (X,), DY)})
    assert found[OURS, FORWARD] is None
    assert "no backward here" in (found[OURS, BOTH] or "")


def test_a_mask_of_its_own_is_right_if_it_is_so_on_average() -> None:
    assert set(reasons({OURS: square_and_drop}, dropout=0.1).values()) == {None}


def test_masks_of_few_rows_may_be_off_by_chance() -> None:
    """Whole rows dropped or doubled: 1.54 of the exact result, of which one row is most."""
    mask = torch.tensor([0.0, 2.0] * 3)[:, None]
    candidates = {OURS: lambda dropout: plain(lambda x: x**2 * (mask if dropout else 1.0), (X,), DY)}
    assert set(reasons(candidates, dropout=0.1).values()) == {None}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda dropout: lambda x: x**2, "drops nothing"),
        (lambda dropout: lambda x: x**2 * (1.0 - 0.8 * dropout), "0.92 of the exact result"),
        (lambda dropout: lambda x: x**2 / (0.0 if dropout else 1.0), "not finite"),
        (lambda dropout: lambda x: x**2 * (1.0 if dropout else 1.1), "off by"),
    ],
)
def test_wrong_dropout_is_found(function, message: str) -> None:
    found = reasons({OURS: lambda dropout: plain(function(dropout), (X,), DY)}, dropout=0.1)
    assert message in (found[OURS, FORWARD] or "")


def test_one_without_dropout_says_so_before_anything_runs() -> None:
    def build(dropout: float) -> Prepared:
        if dropout:
            raise Unavailable("has no dropout")
        raise AssertionError("built without dropout first")

    assert reasons({OURS: build}, dropout=0.1)[OURS, FORWARD] == "has no dropout"
