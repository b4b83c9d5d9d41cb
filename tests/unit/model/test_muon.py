"""Muon against a singular value decomposition in fp64, against torch's own, step by step, and on
ranks that hold slices.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from unit.model.thread_ranks import CUTS, flat_of, partition, run_ranks, whole_of

from fedbert_ds.config import OptimizerSection
from fedbert_ds.model import muon
from fedbert_ds.model.architecture import ARCHITECTURES, layers_of
from fedbert_ds.model.muon import Muon, is_hidden_matrix, orthogonalize, orthogonalized, step_length
from fedbert_ds.model.optimizer import build_optimizer

SHAPES = {
    "bert.encoder.layer.0.dense.weight": (12, 8),
    "bert.encoder.layer.1.dense.weight": (8, 20),
    "bert.encoder.layer.0.dense.bias": (12,),
    "bert.embeddings.word_embeddings.weight": (9, 8),
    "bert.encoder.layer.0.LayerNorm.weight": (8,),
    "cls.predictions.transform.dense.weight": (8, 8),
}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def section(**changes: Any) -> OptimizerSection:
    return OptimizerSection(**({"name": "muon", "lr": 0.02, "weight_decay": 0.1} | changes))


def one(matrix: Tensor, **options: int) -> Tensor:
    """One matrix [R, C] orthogonalized by itself."""
    return orthogonalize(matrix[None], **options)[0]


def spectrum(matrix: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """`direction` in the singular vectors of `matrix`: its diagonal, and what lies beside."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = left.T @ direction.double() @ right.T
    return inside.diagonal(), inside - torch.diag(inside.diagonal())


@settings(max_examples=40, derandomize=True)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), magnitude=st.sampled_from([1e-12, 1.0, 1e6]),
       seed=st.integers(0, 2**32 - 1))  # fmt: skip
def test_singular_vectors_stay_and_singular_values_become_about_one(rows, columns, magnitude, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator).double())[0] for size in (rows, columns)
    )
    # All at least a tenth of the largest, so above a hundredth of the norm.
    values = torch.linspace(1.0, 0.1, rank, dtype=torch.float64)
    matrix = magnitude * (left * values) @ right.T
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        diagonal, beside = spectrum(matrix, one(matrix.to(dtype)))
        assert float(diagonal.min()) > 0.6 and float(diagonal.max()) < 1.2
        assert float(beside.abs().max()) < tolerance


def test_the_orthogonal_factor_of_the_svd_is_near() -> None:
    matrix = torch.randn(48, 24, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    exact = left @ right
    found = one(matrix).double()
    assert float((found - exact).norm() / exact.norm()) < 0.3
    cosine = float((found * exact).sum() / found.norm() / exact.norm())
    assert cosine > 0.97


def test_more_steps_lift_what_is_small_and_zeros_stay() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    assert float(one(matrix, steps=2)[1, 1]) < 0.1 < 0.6 < float(one(matrix, steps=8)[1, 1]) < 1.2
    assert not one(torch.zeros(3, 5)).any()


def test_bf16_s_singular_values_are_about_one_too() -> None:
    """As a GPU iterates."""
    matrix = torch.randn(48, 24, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(one(matrix.bfloat16()).double())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.25


@pytest.mark.parametrize("most", [1, 40, 1 << 25])
def test_matrices_of_any_shapes_go_together_and_come_back_in_order(monkeypatch, most: int) -> None:
    monkeypatch.setattr(muon, "MOST_ELEMENTS", most)
    generator = torch.Generator().manual_seed(3)
    matrices = [torch.randn(shape, generator=generator) for shape in ((4, 3), (3, 4), (4, 3), (5, 5), (4, 3))]
    found = orthogonalized(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, one(matrix))
    assert orthogonalized([]) == []


def test_calls_do_not_grow_with_the_number_of_matrices(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(muon, "orthogonalize", lambda matrices: calls.append(tuple(matrices.shape)) or matrices)
    orthogonalized([torch.ones(4, 3), torch.ones(3, 4)] * 5)
    assert calls == [(5, 4, 3), (5, 3, 4)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch_s_own_muon_which_rounds_to_bf16() -> None:
    mine, other = parameters(), copy.deepcopy(parameters())
    matrices = [name for name in SHAPES if is_hidden_matrix(name, mine[name])]
    optimizer = build_optimizer(list(mine.items()), section())
    expected = torch.optim.Muon(
        [other[name] for name in matrices], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        give_gradients(mine, step)
        give_gradients(other, step)
        optimizer.step()
        expected.step()
    start = parameters()
    for name in matrices:
        moved, wanted = ((named[name] - start[name]).detach() for named in (mine, other))
        assert float((moved - wanted).norm() / wanted.norm()) < 0.02, name


def test_all_other_parameters_step_as_by_adamw() -> None:
    mine, other = parameters(), copy.deepcopy(parameters())
    optimizer, adamw = (
        build_optimizer(list(p.items()), section(name=n)) for p, n in ((mine, "muon"), (other, "adamw"))
    )
    for step in range(3):
        give_gradients(mine, step)
        give_gradients(other, step)
        optimizer.step()
        adamw.step()
    for name in SHAPES:
        assert torch.equal(mine[name], other[name]) != is_hidden_matrix(name, mine[name]), name


def test_a_step_is_as_long_as_adam_s() -> None:
    for shape in ((768, 3072), (3072, 768), (64, 64)):
        direction = one(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        rms = float(direction.square().mean().sqrt()) * step_length(torch.Size(shape))
        assert 0.1 < rms < 0.25, shape


def test_decay_is_decoupled_and_a_missing_gradient_leaves_a_matrix_alone() -> None:
    name = "bert.encoder.layer.0.dense.weight"
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer([(name, weight)], section(lr=0.5, weight_decay=0.1))
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 3))
    weight.grad = torch.zeros(4, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 3), 0.95))


def test_its_state_goes_on_as_if_there_had_been_no_checkpoint() -> None:
    mine = parameters()
    optimizer = build_optimizer(list(mine.items()), section())
    for step in range(2):
        give_gradients(mine, step)
        optimizer.step()
    again = copy.deepcopy(mine)
    later = build_optimizer(list(again.items()), section())
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for named, rule in ((mine, optimizer), (again, later)):
        give_gradients(named, 2)
        rule.step()
    assert all(torch.equal(mine[name], again[name]) for name in SHAPES)


def test_what_it_cannot_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not tensors of shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("cut", CUTS)
def test_slices_on_several_ranks_step_as_whole_matrices_do(cut: str, ranks: int) -> None:
    """Each matrix is orthogonalized whole; slices by themselves would give others."""
    start = [parameter.detach() for name, parameter in parameters().items() if is_hidden_matrix(name, parameter)]
    gradients = [[torch.randn(m.shape, generator=torch.Generator().manual_seed(n)) for m in start] for n in range(3)]
    expected = [nn.Parameter(matrix.clone()) for matrix in start]
    rule = Muon([{"params": expected, "muon": True, "weight_decay": 0.1}], lr=0.02)
    for of_step in gradients:
        for matrix, gradient in zip(expected, of_step, strict=True):
            matrix.grad = gradient.clone()
        rule.step()
    shapes = [tuple(matrix.shape) for matrix in start]

    def run(rank: int) -> Tensor:
        where, length = partition(cut, shapes, rank, ranks)
        flat = nn.Parameter(flat_of(start, where, length))
        partitioned = Muon([{"params": [], "muon": True, "weight_decay": 0.1}], lr=0.02)
        # As DeepSpeed does, after the optimizer is made.
        partitioned.param_groups[0]["params"] = [flat]
        partitioned.partitions = {flat: where}
        for of_step in gradients:
            flat.grad = flat_of(of_step, where, length)
            partitioned.step()
        return flat.detach()

    where, _ = partition(cut, shapes, 0, ranks)
    for found, wanted in zip(whole_of(run_ranks(ranks, run), where), expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=1e-5)


def test_hidden_matrices_are_those_of_encoder_layers(small_model, architecture) -> None:
    model = small_model(architecture)
    base = model.get_submodule(ARCHITECTURES[architecture].base)
    layers = [parameter for parameter in layers_of(base, model.config).parameters() if parameter.dim() == 2]
    hidden = [parameter for name, parameter in model.named_parameters() if is_hidden_matrix(name, parameter)]
    assert set(map(id, hidden)) == set(map(id, layers)) and len(hidden) >= 3 * 4
