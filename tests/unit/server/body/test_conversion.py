"""Fragments of parameters: whatever layout wrote them, every other finds the same numbers.

tests/integration/test_conversion.py does the same with DeepSpeed.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import RunError
from fedbert_ds.server.body.conversion import MASTERS, Share, check_groups, fill, read_shares, whole
from fedbert_ds.server.body.layout import Table, group_tables, parameter_table, whole_table

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5).map(
    lambda shapes: {f"p{number}": shape for number, shape in enumerate(shapes)}
)
Tensors = list[torch.Tensor]


def layout(shapes: dict[str, tuple[int, ...]], stage: int, ranks: int) -> list[tuple[Table, Tensors]]:
    """Each rank's table, and tensors of the right shapes, by plain counting."""
    if stage == 0:
        return [(whole_table(shapes), [torch.empty(shape) for shape in shapes.values()])]
    if stage == 3:
        sizes = [sum(math.ceil(math.prod(shape) / ranks) for shape in shapes.values())]
        return [(parameter_table(shapes, sizes, n, ranks), [torch.empty(sizes[0])]) for n in range(ranks)]
    part = math.ceil(sum(math.prod(shape) for shape in shapes.values()) / ranks)
    mappings = []
    for rank in range(ranks):
        group, at = {}, 0
        for name, shape in shapes.items():
            first, last = max(at, rank * part), min(at + math.prod(shape), (rank + 1) * part)
            if first < last:
                group[name] = SimpleNamespace(start=first - rank * part, numel=last - first)
            at += math.prod(shape)
        mappings.append([group])
    return [(table, [torch.empty(part)]) for table in group_tables(mappings)]


@given(SHAPES, st.sampled_from([0, 1, 3]), st.integers(1, 4), st.sampled_from([0, 1, 3]), st.integers(1, 4))
def test_every_layout_to_every_layout(
    shapes: dict[str, tuple[int, ...]], before: int, saved_by: int, after: int, ranks: int
) -> None:
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    moments = {n: {"step": torch.tensor(7.0), "exp_avg": 2 * value} for n, value in enumerate(values.values())}
    original = [Share(whole_table(shapes), list(values.values()), moments)]
    saved = [fill(table, like, original, shapes) for table, like in layout(shapes, before, saved_by)]
    loaded = [fill(table, like, saved, shapes) for table, like in layout(shapes, after, ranks)]
    for name, value in values.items():
        assert torch.equal(whole(loaded, name, value.numel(), MASTERS), value.flatten())
        assert torch.equal(whole(loaded, name, value.numel(), "exp_avg"), 2 * value.flatten())
    steps = [state["step"] for share in loaded for state in share.moments.values()]
    assert all(step == 7 for step in steps)
    assert len({id(step) for step in steps}) == len(steps), "an optimizer counts in place"


def test_nothing_is_made_up_before_the_first_step() -> None:
    shapes = {"a": (2, 3)}
    saved = [Share(whole_table(shapes), [torch.ones(2, 3)], {})]
    ((table, like),) = layout(shapes, 3, 1)
    share = fill(table, like, saved, shapes)
    assert share.moments == {} and torch.equal(share.masters[0], torch.ones(6))


def test_each_parameter_keeps_the_moments_of_its_own_rule() -> None:
    """Muon has momentum where it steps matrices, and AdamW's moments elsewhere."""
    shapes = {"matrix": (2, 3), "bias": (3,)}
    rules = {0: {"step": torch.tensor(2.0), "momentum": torch.ones(2, 3)}, 1: {"step": 1, "exp_avg": torch.ones(3)}}
    saved = [Share(whole_table(shapes), [torch.zeros(2, 3), torch.zeros(3)], rules)]
    share = fill(whole_table(shapes), saved[0].masters, saved, shapes)
    assert {n: set(state) for n, state in share.moments.items()} == {n: set(state) for n, state in rules.items()}
    assert torch.equal(whole([share], "matrix", 6, "momentum"), torch.ones(6))


def test_a_part_that_is_missing_is_noticed() -> None:
    shapes = {"a": (2, 3)}
    (first, _), _ = layout(shapes, 1, 2)
    with pytest.raises(ValueError, match="a has 6 elements, the checkpoint 3"):
        whole([Share(first, [torch.zeros(3)], {})], "a", 6, MASTERS)


SAVED = {
    0: ("mp_rank_00_model_states.pt", "optimizer", None),
    1: ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_state_dict", "base_optimizer_state"),
    2: ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_state_dict", "base_optimizer_state"),
    3: ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "optimizer_state_dict", "optimizer_state_dict"),
}
"""File and keys under which DeepSpeed saves the optimizer, by stage."""


@pytest.mark.parametrize("stage", SAVED)
def test_groups_that_another_version_saved_are_not_taken_for_ours(tmp_path: Path, stage: int) -> None:
    """LAMB had one for each parameter once: DeepSpeed would load as many as there are, silently."""
    check_groups(tmp_path, stage, 2)
    file, outer, inner = SAVED[stage]
    groups = {"param_groups": [{}] * 192}
    torch.save({outer: {inner: groups} if inner else groups}, tmp_path / file)
    check_groups(tmp_path, stage, 192)
    with pytest.raises(RunError, match="saved with 192 groups of parameters, where this FedBERT-DS has 2; ") as caught:
        check_groups(tmp_path, stage, 2)
    assert "\n" not in str(caught.value)
    (tmp_path / file).write_bytes(b"torn")
    check_groups(tmp_path, stage, 2)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path: Path, stage: int) -> None:
    with pytest.raises(RunError, match=f"cannot be read as saved by 2 ranks at ZeRO stage {stage}") as caught:
        read_shares(tmp_path, {"a": (2,)}, 2, stage)
    assert "\n" not in str(caught.value)
