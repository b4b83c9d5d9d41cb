"""Two ranks gather the layers of a body at ZeRO stage 3; each writes what it has seen.

    python gather_worker.py FOLDER      (MASTER_ADDR and MASTER_PORT in the environment)

`seen-RANK.json` has for each of `CASES`: the bytes of a layer's matrices, which layers were whole
while each computed, forward and backward, which afterwards, and the collectives of a forward and of
a backward.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from forked_ranks import run_two

WIDTH, LAYERS = 16, 3
LINEAR = functional.linear
CASES = {
    "apart": (0, "none"),
    "two together": (2 * 12 * WIDTH**2, "none"),
    "all together": (10**6, "none"),
    "layers computed again": (0, "layers"),
    "results computed again": (0, "elementwise"),
}
"""Name -> the bucket in parameters, and what backward computes again."""


def run_rank(rank: int, folder: Path) -> None:
    from fedbert_ds.server.body.distributed import initialize, shut_down

    initialize()
    torch.manual_seed(0)
    seen = {name: case(folder / f"zero-{rank}.json", *given) for name, given in CASES.items()}
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    shut_down()


def case(path: Path, bucket: int, what: str) -> dict[str, Any]:
    """What is seen of one micro-batch, with dropout and a gradient."""
    from fedbert_ds.server.body.packed_input import BodyInput
    from fedbert_kernels.encoded import Encoded

    engine, body = engine_of(path, bucket, what)
    layers = [[one for one in layer.parameters() if one.dim() > 1] for layer in body.layers]
    forwards: list[list[int]] = []
    backwards: list[list[int]] = []

    def whole() -> list[int]:
        numbers = [n for n, of in enumerate(layers) if any(one.untyped_storage().nbytes() for one in of)]
        assert all(bool(one.untyped_storage().nbytes()) == (n in numbers) for n, of in enumerate(layers) for one in of)
        return numbers

    def computes(module: Any, inputs: Any, output: Any) -> None:
        if len(forwards) < LAYERS:  # not what is computed again
            forwards.append(whole())
            output[0].register_hook(lambda gradient: backwards.append(whole()))

    for layer in body.layers:
        layer.attention.self.register_forward_hook(computes)
    before = whole()
    # DeepSpeed would put a slower one in its place, for the whole process.
    assert functional.linear is LINEAR
    rows, index = Encoded.of(torch.randn(4, WIDTH), "fp32"), torch.tensor([0, 1, 2, 3, 0])
    place = BodyInput([rows], torch.arange(2), torch.tensor([0, 5], dtype=torch.int32), index, 0)
    collectives = []
    with count(collectives):
        engine.forward(0, place).result()
    between = whole()
    with count(collectives):
        engine.backward(0, [Encoded.of(torch.randn(2, WIDTH), "fp32")]).result()
    return {
        "layers": {"forward": forwards, "backward": backwards[::-1]},
        "otherwise": [before, between, whole()],
        "collectives": collectives,
    }


def count(found: list[int]) -> Any:
    """Append the number of gatherings inside."""
    from contextlib import contextmanager
    from unittest import mock

    @contextmanager
    def counting() -> Any:
        gather = torch.distributed.all_gather_into_tensor
        with mock.patch.object(torch.distributed, "all_gather_into_tensor", side_effect=gather) as calls:
            yield
        found.append(calls.call_count)

    return counting()


def engine_of(path: Path, bucket: int, what: str) -> tuple[Any, Any]:
    """Around a small body whose position table is the server's; both."""
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.run_file import parse_config
    from fedbert_ds.server.body.engine import BodyEngine

    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": bucket}}))
    config = parse_config(
        {
            "model": {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": LAYERS},
            "body": {"deepspeed": str(path), "activation_checkpointing": what},
        },
        "gather",
    )
    _, body = split(build_model(config.model, 50, 0, 1), "rows")
    return BodyEngine.build(body, config.body, config.optimizer, "torch", torch.device("cpu")), body


if __name__ == "__main__":
    run_two(run_rank, Path(sys.argv[1]))
