"""Packed attention equals padded attention with a mask, for every mix of lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import ModernBertConfig, ModernBertModel
from unit.kernels.bounds import DEVICE, needs_triton
from unit.model.samples import PAD, VOCABULARY, pack, padded_logits

from fedbert_ds.config import ModelSection
from fedbert_ds.model.attention import PACKED_ATTENTION, Packing, packed_attention
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_kernels.attention import attention

LENGTH_MIXES = st.lists(st.integers(min_value=1, max_value=12), min_size=1, max_size=7)


def attend_one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Reference: each sequence alone; [1, heads, T, d] in, [1, T, heads, d] out."""
    pieces = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([scaled_dot_product_attention(*piece) for piece in pieces], dim=2).transpose(1, 2)


@settings(max_examples=40)
@given(lengths=LENGTH_MIXES)
def test_each_sequence_attends_to_itself_alone(lengths: list[int]) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, sum(lengths), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, sum(lengths), 2, 4, dtype=torch.float64)
    packing = Packing.from_lengths(lengths)
    actual, _ = packed_attention(torch.nn.Module(), *inputs, None, packing=packing)
    expected = attend_one_by_one(*inputs, lengths)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    actual_gradients = torch.autograd.grad((actual * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(actual_gradients, expected_gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5, 12])
def test_a_window_is_how_far_a_token_sees(window: int) -> None:
    torch.manual_seed(0)
    lengths = [7, 1, 12, 7]
    inputs = [torch.randn(1, 2, sum(lengths), 4, dtype=torch.float64) for _ in range(3)]
    actual, _ = packed_attention(
        torch.nn.Module(), *inputs, None, packing=Packing.from_lengths(lengths), sliding_window=window
    )
    pieces = []
    for piece in zip(*(tensor.split(lengths, dim=2) for tensor in inputs), strict=True):
        position = torch.arange(piece[0].shape[2])
        seen = (position[:, None] - position).abs() < window
        pieces.append(scaled_dot_product_attention(*piece, attn_mask=seen))
    torch.testing.assert_close(actual, torch.cat(pieces, dim=2).transpose(1, 2), atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def whole_and_halves():
    def build():
        section = ModelSection(hidden_size=16, max_position_embeddings=12, dropout=0.0)
        return build_model(section, VOCABULARY, PAD, seed=1).double().eval()

    return build(), *split(build(), "embeddings")


@settings(max_examples=40)
@given(lengths=LENGTH_MIXES)
def test_packed_model_equals_padded_model_with_a_mask(whole_and_halves, lengths: list[int]) -> None:
    whole, client, body = whole_and_halves
    packed = pack(lengths)
    with torch.no_grad():
        activations = client.embed(packed.input_ids, packed.lengths)
        logits = client.logits(body(activations.values, packed.masked, packed.cu_seqlens))
        torch.testing.assert_close(logits, padded_logits(whole, packed), atol=1e-12, rtol=0)


@given(lengths=LENGTH_MIXES)
def test_packing_describes_the_lengths(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths)
    assert packing.positions.tolist() == [position for length in lengths for position in range(length)]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    assert sorted(length for length, count in packing.groups for _ in range(count)) == sorted(lengths)
    assert len({length for length, _ in packing.groups}) == len(packing.groups)
    if packing.order is not None:
        assert torch.equal(packing.order[packing.restore], torch.arange(sum(lengths)))
        in_order = [lengths[index] for index in sorted(range(len(lengths)), key=lengths.__getitem__)]
        assert packing.positions[packing.order].tolist() == [p for length in in_order for p in range(length)]


@pytest.mark.parametrize("lengths", [[4], [4, 4, 4], [1, 1, 3, 2, 2]])
def test_neighbours_of_equal_length_move_no_token(lengths: list[int]) -> None:
    assert Packing.from_lengths(lengths).order is None


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ([0, 3, 3, 7], "strictly increase"),
        ([0, 5, 4, 7], "strictly increase"),
        ([0, 4, 6], "end at 7"),
        ([1, 7], "begin at 0"),
        ([0], "begin at 0"),
    ],
)
def test_bounds_that_do_not_divide_the_tokens_are_refused(bounds: list[int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Packing.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32), num_tokens=7)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_empty_sequences_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Packing.from_lengths(lengths)


def test_dropout_drops_attention_and_keeps_its_mean() -> None:
    torch.manual_seed(0)
    query = torch.zeros(1, 4, 600, 2)
    packing = Packing.from_lengths([30] * 20)
    kept, _ = packed_attention(
        torch.nn.Module(), query, query, torch.ones_like(query), None, packing=packing, dropout=0.5
    )
    assert kept.std() > 0.1
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("triton", [False, pytest.param(True, marks=needs_triton)], ids=["torch", "triton"])
def test_modernbert_runs_packed_with_its_sliding_window(triton: bool) -> None:
    ids = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
    config = ModernBertConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        local_attention=6, initializer_range=0.3, attn_implementation="sdpa", **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ModernBertModel(config).eval().to(DEVICE)
    assert {layer.attention_type for layer in model.layers} == {"full_attention", "sliding_attention"}
    lengths = [9, 3, 12, 9, 1]
    packed = pack(lengths)
    mask = pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True).to(DEVICE)
    batch = pad_sequence(list(packed.input_ids.split(lengths)), batch_first=True, padding_value=1).to(DEVICE)
    with torch.no_grad():
        expected = model(batch, attention_mask=mask).last_hidden_state[mask.bool()]
        config._attn_implementation = PACKED_ATTENTION
        packing = Packing.from_lengths(lengths, DEVICE, attend=attention if triton else None)
        actual = model(
            packed.input_ids.unsqueeze(0).to(DEVICE),
            attention_mask={"full_attention": None, "sliding_attention": None},
            position_ids=packing.positions.unsqueeze(0),
            packing=packing,
        ).last_hidden_state.squeeze(0)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
