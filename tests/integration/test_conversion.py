"""Bodies saved by one or two ranks at any ZeRO stage, loaded by one or two at any other.

Real DeepSpeed and gloo. What is loaded is compared as DeepSpeed itself tells it, by parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import run_ranks
from integration.conversion_worker import CASES, RANKS, STAGES, WINDOW, Results, load, loads, save

pytestmark = pytest.mark.timeout(1800)


def run(call: Callable[..., None], folder: Path, ranks: int, *arguments: Any, result: str) -> Results:
    """What rank 0 found out."""
    run_ranks(folder, ranks, call, [folder, *arguments], 900.0)
    found: Results = torch.load(folder / f"{result}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Results]]:
    """The checkpoints, and what they hold, by number of ranks."""
    folder = tmp_path_factory.mktemp("conversion")
    return folder, {ranks: run(save, folder, ranks, result=f"save by {ranks}") for ranks in (1, 2)}


def test_every_case_is_loaded_at_every_stage() -> None:
    for ranks in RANKS:
        pairs = {(case.stage, after, case.precision) for case, after in loads(*ranks)}
        assert pairs == set(itertools.product(STAGES, STAGES, ("fp32", "bf16")))
        optimizers = {(case.optimizer, case.precision, case.stage) for case, _ in loads(*ranks)}
        assert optimizers == {tuple(case) for case in CASES}
    together = [load for ranks in RANKS for load in loads(*ranks)]
    assert set(together) == set(itertools.product(CASES, STAGES))


@pytest.mark.parametrize(("before", "after"), RANKS)
def test_every_stage_to_every_stage(saved: tuple[Path, dict[int, Results]], before: int, after: int) -> None:
    """Weights, rounded weights, moments and steps are equal bit by bit, and so is what the body
    answers; a second load, after a step, brings them back.
    """
    folder, contents = saved
    loaded = run(load, folder, after, before, result=f"load by {after} of {before}")
    assert len(loaded) == 3 * len(loads(before, after))
    for key, (content, answer) in loaded.items():
        if key.endswith("later"):
            later, _ = contents[before][key.split(" to ")[0] + ", a window later"]
            # Rounding differs between stages, and in bf16 gradients are rounded. Muon enlarges that
            # where a singular value is small.
            bound = (1e-5 if "fp32" in key else 2e-3) * (10 if "muon" in key else 1)
            for name, values in later.items():
                assert values.get("step") == content[name].get("step"), (key, name)
                if not name.endswith("key.bias"):  # its true gradient is 0: AdamW divides rounding by rounding
                    assert (content[name]["weights"] - values["weights"]).abs().max() < bound, (key, name)
            continue
        expected, expected_answer = contents[before][key.split(" to ")[0]]
        assert content.keys() == expected.keys()
        for name, values in expected.items():
            assert content[name].keys() == values.keys(), (key, name)
            assert all(torch.equal(content[name][what], value) for what, value in values.items()), (key, name)
        if answer is not None:
            assert torch.equal(answer, expected_answer), key


def test_what_is_compared_is_there_and_moves(saved: tuple[Path, dict[int, Results]]) -> None:
    """Two empty states would be equal too."""
    _, contents = saved
    adam = {"exp_avg", "exp_avg_sq", "step"}
    moments = {"adamw": [adam], "lamb": [adam], "sgd": [set()], "muon": [adam, {"momentum", "step"}]}
    for case in CASES:
        content, _ = contents[2][str(case)]
        for values in content.values():
            assert values.keys() - {"weights", "computed"} in moments[case.optimizer]
            assert "step" not in values or values["step"] == WINDOW
            rounded = values["weights"].to(torch.bfloat16) if case.precision == "bf16" else values["weights"]
            assert torch.equal(rounded, values["computed"])
        assert any(values["weights"].abs().max() > 0 for values in content.values())
    sizes = [len(values["weights"]) for values in contents[2][str(CASES[0])][0].values()]
    assert any(size % 2 for size in sizes), "all parameters divide evenly"
