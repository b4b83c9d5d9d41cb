"""Two ranks train small bodies at every ZeRO stage and precision, with windows that are undone.

    python drop_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

Writes `STAGE-PRECISION-KIND-RANK.pt` into the folder: the weights after three windows. KIND is
`plain`, or `dropped`: one window was undone after the first and two after the second. With fp32
also `spoilt`: a client's sequence in each micro-batch makes results that are not finite, and is
left out before the backward; `some`: only in rank 0's first micro-batch, the others' are zeros; or
`zeros`: it was zeros from the start.

In each of them it then trains windows whose gradient, or its norm, is not finite, and one more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from pytest import approx

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from forked_ranks import LENGTHS, run_two

WIDTH, RATE = 16, 0.01


def run_rank(rank: int, folder: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down

    initialize()
    for stage in range(4):
        path = folder / f"zero-{rank}.json"
        # At stage 3 each layer is gathered by itself.
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": 0}}))
        for precision in ("fp32", "bf16"):
            for kind in ("plain", "dropped", *(("zeros", "some", "spoilt") if precision == "fp32" else ())):
                other = "" if kind in ("plain", "dropped") else kind
                weights = train(path, precision, is_disturbed=kind == "dropped", other=other)
                torch.save(weights, folder / f"{stage}-{precision}-{kind}-{rank}.pt")
    shut_down()


def train(deepspeed: Path, precision: str, is_disturbed: bool, other: str = "") -> dict[str, torch.Tensor]:
    """Weights by name after three windows."""
    engine = engine_of(deepspeed, precision)
    for window, num_undone in enumerate((0, 1, 2)):
        for attempt in range(num_undone if is_disturbed else 0):
            accumulate(engine, 100 + 10 * window + attempt)
            engine.drop_gradients()
        accumulate(engine, window, other)
        engine.step(RATE, client_norm=0.5)
    assert not engine.lost_gradient
    weights = engine.full_state()
    go_on_after_spoilt_windows(engine, RATE)
    return weights


def engine_of(deepspeed: Path, precision: str):
    """Around a small body."""
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.body.engine import BodyEngine

    config = parse_config(
        {
            "model": {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2},
            "optimizer": {"lr": RATE},
            "body": {"deepspeed": str(deepspeed), "precision": precision},
        },
        "drop",
    )
    _, body = split(build_model(config.model, 50, 0, 1), "embeddings")
    return BodyEngine.build(body, config.body, config.optimizer, config.kernels, torch.device("cpu"))


def go_on_after_spoilt_windows(engine, lr: float) -> None:
    """What is not finite is left out, the client model is clipped by a number, and all goes on."""
    # A step after a window that is lost still moves by what the optimizer remembers.
    accumulate(engine, 7, "spoilt", left_out=False)
    assert engine.step(lr, client_norm=2.0) == approx(0.5) and engine.lost_gradient
    accumulate(engine, 8, scale=1e30)
    assert 0.0 <= engine.step(lr, client_norm=2.0) <= 0.5
    before = engine.full_state()
    accumulate(engine, 9)
    engine.step(lr)
    assert not engine.lost_gradient
    after = engine.full_state()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    # One rank's alone is left out, and the other's moves the weights.
    rank = torch.distributed.get_rank()
    accumulate(engine, 10, "spoilt" if rank == 0 else "", left_out=False)
    engine.step(lr)
    assert engine.lost_gradient == (rank == 0)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in engine.full_state().items())


def accumulate(engine, window: int, other: str = "", left_out: bool = True, scale: float = 1.0) -> None:
    """Forwards and backwards of a window; its numbers follow from `window` and the rank alone.

    With `other` each micro-batch has one more sequence, with values of that kind. The gradient is
    `scale` times as large.
    """
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    random = torch.Generator().manual_seed(1000 * window + torch.distributed.get_rank())
    for number, lengths in enumerate(LENGTHS):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tensor, masked = torch.randn(sum(lengths), WIDTH, generator=random), torch.arange(0, sum(lengths), 2)
        is_spoilt = other == "spoilt" or (other == "some" and number == torch.distributed.get_rank() == 0)
        if other:
            tensor = torch.cat([tensor, torch.full((3, WIDTH), torch.inf if is_spoilt else 0.0)])
            masked = torch.cat([masked, torch.tensor([len(tensor) - 1])])
            bounds = torch.tensor([*bounds, len(tensor)]).int()
        place = BodyInput([Encoded.of(tensor, "fp32")], masked, bounds, None, 10 * window + number)
        hidden = engine.forward(number, place)
        assert not other or hidden.result()[0].is_finite != is_spoilt
    for number, lengths in enumerate(LENGTHS):
        gradient = scale * torch.randn(len(range(0, sum(lengths), 2)), WIDTH, generator=random)
        parts = [Encoded.of(gradient, "fp32")]
        if other:
            parts.append(Encoded.zeros(1, WIDTH, "fp32"))
        is_spoilt = other == "spoilt" or (other == "some" and number == torch.distributed.get_rank() == 0)
        if is_spoilt and left_out:
            engine.blank(number, [slice(sum(lengths), sum(lengths) + 3)])
        of_inputs, _ = engine.backward(number, parts).result()
        assert not other or of_inputs.is_finite == (left_out or not is_spoilt)


if __name__ == "__main__":
    run_two(run_rank, Path(sys.argv[1]))
