"""The body: exact sums of equal rows, recomputation, and a dummy for every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from unit.model.samples import pack, word_table

from fedbert_ds.config import LayersCut
from fedbert_ds.model.architecture import ARCHITECTURES
from fedbert_ds.model.cut import split
from fedbert_ds.server.body.footprint import saved_bytes


def activations_for(body: Any, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(2)
    values = torch.randn(num_tokens, body.widths.activations)
    return values, torch.arange(num_tokens) if body.cut == "rows" else None


def with_dropout(model: Any, cut: Any, dtype: torch.dtype, what: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a body in training gives, and the gradients of its input and parameters, at one seed."""
    packed = pack([6, 3, 6, 1])
    _, body = split(model.train(), cut)
    body.to(dtype).recompute(what)
    values, row_index = activations_for(body, len(packed.input_ids))
    received = values.requires_grad_()
    torch.manual_seed(11)
    hidden = body(received, packed.masked, packed.cu_seqlens, row_index)
    # What happens between forward and backward draws random numbers too.
    torch.rand(100)
    hidden.square().sum().backward()
    gradients = [received.grad, *(parameter.grad for parameter in body.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return hidden.detach(), gradients


def whole_norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(each.double().square().sum() for each in tensors)) ** 0.5


@pytest.mark.parametrize("what", ["none", "elementwise", "attention", "int8", "layers"])
def test_dummy_micro_batch_gives_every_parameter_a_zero_gradient(small_model, architecture, cut, what: Any) -> None:
    _, body = split(small_model(architecture, dropout=0.1).train(), cut)
    body.recompute(what)
    values, row_index = activations_for(body, 1)
    hidden = body(values, torch.empty(0, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32), row_index)
    assert hidden.shape == (0, body.widths.hidden)
    (hidden * torch.empty_like(hidden)).sum().backward()
    for name, parameter in body.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_equal_rows_are_summed_exactly(small_model, architecture, dtype: torch.dtype) -> None:
    client, body = split(small_model(architecture), "rows")
    body.to(dtype)
    packed = pack([7, 9, 7])
    torch.manual_seed(4)
    weights = torch.randn(len(packed.masked), body.widths.hidden, dtype=dtype)

    def gradient(values: torch.Tensor, row_index: torch.Tensor) -> torch.Tensor:
        received = values.detach().requires_grad_()
        hidden = body(received, packed.masked, packed.cu_seqlens, row_index)
        assert hidden.dtype == dtype
        (hidden * weights).sum().backward()
        assert received.grad is not None
        return received.grad

    activations = client.embed(packed.input_ids, packed.lengths)
    assert activations.row_index is not None
    of_rows = gradient(activations.values, activations.row_index.long())
    activations.values.backward(of_rows)
    table = word_table(client)
    of_tokens = gradient(table[packed.input_ids], torch.arange(len(packed.input_ids)))
    expected = torch.zeros_like(table).index_add_(0, packed.input_ids, of_tokens)
    assert of_rows.dtype == torch.float32
    assert torch.equal(table.grad, expected)


@pytest.mark.parametrize("what", ["elementwise", "attention", "layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recomputation_repeats_dropout(small_model, architecture, cut, dtype: torch.dtype, what: Any) -> None:
    hidden, kept = with_dropout(small_model(architecture, dropout=0.3), cut, dtype, "none")
    again, recomputed = with_dropout(small_model(architecture, dropout=0.3), cut, dtype, what)
    assert torch.equal(again, hidden)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_in_place_of_what_gelu_takes_round_gradients_alone(small_model, architecture, cut, dtype) -> None:
    kept, exact = with_dropout(small_model(architecture, dropout=0.3), cut, dtype, "elementwise")
    hidden, rounded = with_dropout(small_model(architecture, dropout=0.3), cut, dtype, "int8")
    assert torch.equal(hidden, kept)
    apart = [a.double() - b.double() for a, b in zip(rounded, exact, strict=True)]
    # Codes are off by up to 1 / 254 of the largest of 64 values.
    assert 0.0 < whole_norm(apart) < 0.01 * whole_norm(exact)


def test_input_in_its_own_dtype_gives_what_fp32_gives(small_model, architecture, cut) -> None:
    """Hidden states and gradients; where rows are equal, their gradient's sum is not rounded."""
    packed = pack([6, 3, 6, 1])
    found = []
    for dtype in (torch.float32, None):
        _, body = split(small_model(architecture), cut)
        body.to(torch.bfloat16)
        values, row_index = activations_for(body, len(packed.input_ids))
        row_index = None if row_index is None else row_index % 3
        received = values.bfloat16().to(dtype or body.input_dtype).requires_grad_()
        hidden = body(received, packed.masked, packed.cu_seqlens, row_index)
        (gradient,) = torch.autograd.grad(hidden.float().square().sum(), received)
        found.append((hidden, gradient.float()))
    assert all(map(torch.equal, *found))


def test_recomputation_runs_each_layer_twice(small_model) -> None:
    _, body = split(small_model("bert").train(), LayersCut(layers=1))
    body.recompute("layers")
    calls: list[str] = []
    for layer in body.bert.encoder.layer[1:]:
        layer.intermediate.register_forward_hook(lambda *_: calls.append("forward"))
    values, _ = activations_for(body, 4)
    body(values, torch.tensor([1]), torch.tensor([0, 4])).sum().backward()
    assert len(calls) == 2 * 2


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_elementwise_recomputation_repeats_no_product_and_keeps_no_cheap_result(
    small_model, architecture, dropout: float
) -> None:
    products, kept = {}, {}
    for what in ("none", "elementwise", "attention", "int8", "layers"):
        _, body = split(small_model(architecture, dropout=dropout).train(), LayersCut(layers=1))
        body.recompute(what)
        values, _ = activations_for(body, 12)
        with saved_bytes(body.parameters()) as saved:
            hidden = body(values.requires_grad_(), torch.tensor([1]), torch.tensor([0, 12]))
        with Products() as counted:
            hidden.sum().backward()
        products[what], kept[what] = counted.count, saved.num_bytes
    assert 0 < products["none"] == products["elementwise"] == products["int8"] < products["layers"]
    # Scores and their use, of each of two layers; without dropout they are one operator.
    assert products["attention"] == products["none"] + (2 * 2 if dropout else 0)
    # Of the first layer its two LayerNorms' results and GELU's, four times as wide. Of the last,
    # for the one masked token, its first LayerNorm's and GELU's. A row is 16 values of fp32.
    # In ELECTRA its last LayerNorm's, too, since a head follows.
    head = 4 * 16 if architecture == "electra" else 0
    expected = 4 * 16 * (12 * (1 + 1 + 4) + 1 + 4) + head
    if architecture == "modernbert":
        # Both layers' first LayerNorms see all tokens. GELU's results are 1.5 times as wide, and so
        # are gated ones, of which none is kept if dropout makes nothing else of them.
        gated = 1.5 if dropout else 3
        expected = 4 * 16 * (12 * (1 + 1 + 1 + gated) + 1 + gated)
    assert kept["none"] - kept["elementwise"] == expected
    assert kept["layers"] < kept["attention"] < kept["elementwise"]


def test_bf16_follows_fp32(small_model, architecture, cut) -> None:
    _, body = split(small_model(architecture).eval(), cut)
    packed = pack([6, 3])
    values, row_index = activations_for(body, 9)
    exact = body(values, packed.masked, packed.cu_seqlens, row_index)
    rounded = body.to(torch.bfloat16)(values, packed.masked, packed.cu_seqlens, row_index)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


def test_masked_positions_come_back_in_the_order_asked(small_model) -> None:
    _, body = split(small_model("bert").eval(), "embeddings")
    values, _ = activations_for(body, 8)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    everything = body(values, torch.arange(8), bounds)
    found = body(values, torch.tensor([6, 0, 3]), bounds)
    # Not to the bit: on some processors a product of three rows rounds otherwise than one of eight.
    torch.testing.assert_close(found, everything[[6, 0, 3]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, everything[[0, 3, 6]], atol=1e-2)


def test_the_last_feed_forward_runs_for_masked_positions_only(small_model, architecture, cut) -> None:
    _, body = split(small_model(architecture), cut)
    rows: list[int] = []
    for layer in body.layers[1:]:
        feed_forward = layer.get_submodule(ARCHITECTURES[architecture].feed_forward[0])
        feed_forward.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[1]))
    values, row_index = activations_for(body, 9)
    body(values, torch.tensor([8, 0]), torch.tensor([0, 3, 9]), row_index)
    assert rows == [9, 2]


def test_input_that_does_not_fit_is_refused(small_model) -> None:
    _, body = split(small_model("roberta"), "rows")
    values, row_index = activations_for(body, 17)
    with pytest.raises(ValueError, match="needs row_index"):
        body(values, torch.tensor([0]), torch.tensor([0, 17]))
    with pytest.raises(ValueError, match="longer than the position table, 16"):
        body(values, torch.tensor([0]), torch.tensor([0, 17]), row_index)
    with pytest.raises(ValueError, match="end at 17 tokens"):
        body(values, torch.tensor([0]), torch.tensor([0, 16]), row_index)
