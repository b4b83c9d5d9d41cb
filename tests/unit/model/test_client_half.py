"""The head in chunks equals the head at once; embeddings refuse what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from unit.model.samples import VOCABULARY, pack, padded_logits, word_table

from fedbert_ds.config import LayersCut
from fedbert_ds.model.architecture import ARCHITECTURES
from fedbert_ds.model.cut import split, undivided


def head_input(client: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    dtype = next(client.parameters()).dtype
    return torch.randn(count, client.widths.hidden, dtype=dtype), torch.randint(0, VOCABULARY, (count,))


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_head_in_chunks_is_plain_cross_entropy(small_model, architecture, chunk_size: int) -> None:
    client, _ = split(small_model(architecture).double(), "embeddings")
    hidden, labels = head_input(client, 11)
    leaf = hidden.clone().requires_grad_()
    plain = functional.cross_entropy(client.logits(leaf), labels, reduction="sum")
    (plain * 0.25).backward()
    expected = {name: parameter.grad for name, parameter in client.named_parameters()}
    client.zero_grad()
    loss, gradient = client.head_backward(hidden, labels, 0.25, chunk_size=chunk_size)
    assert loss == pytest.approx(plain.item(), rel=1e-12)
    assert client.head_loss(hidden, labels, chunk_size=chunk_size) == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, atol=1e-12, rtol=0)
    for name, parameter in client.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_decoder_and_loss_as_one_operator_are_the_same(small_model, architecture, count: int) -> None:
    client, _ = split(small_model(architecture), "embeddings")
    hidden, labels = head_input(client, count)
    results = []
    for fused in (False, True):
        client.zero_grad()
        loss, gradient = client.head_backward(hidden, labels, 0.25, fused=fused)
        gradients = {name: p.grad for name, p in client.named_parameters() if p.grad is not None and p.grad.any()}
        results.append((torch.tensor(loss), gradient, gradients))
    torch.testing.assert_close(results[1], results[0])
    # The decoder decodes again.
    assert client.logits(hidden).shape == (count, VOCABULARY)


def test_a_cpu_takes_chunks_and_a_gpu_the_operator(small_model, monkeypatch) -> None:
    from fedbert_kernels import linear_cross_entropy as operators

    client, _ = split(small_model("bert"), "embeddings")
    calls: list[int] = []
    monkeypatch.setattr(operators, "linear_cross_entropy", lambda hidden, *_: calls.append(len(hidden)) or hidden.sum())
    hidden, labels = head_input(client, 4)
    client.head_backward(hidden, labels, 1.0)
    assert calls == []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    client.head_backward(hidden, labels, 1.0)
    assert calls == [4]


def test_head_gradients_accumulate(small_model) -> None:
    client, _ = split(small_model("bert").double(), "embeddings")
    hidden, labels = head_input(client, 10)
    client.head_backward(hidden, labels, 0.5)
    at_once = [p.grad.clone() for p in client.parameters() if p.grad is not None]
    client.zero_grad()
    client.head_backward(hidden[:4], labels[:4], 0.5)
    client.head_backward(hidden[4:], labels[4:], 0.5)
    in_two = [p.grad for p in client.parameters() if p.grad is not None]
    torch.testing.assert_close(in_two, at_once, atol=1e-12, rtol=0)


class LargestResult(TorchDispatchMode):
    """The most entries any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_scores_of_all_positions_never_exist_at_once(small_model, architecture) -> None:
    client, _ = split(small_model(architecture), "embeddings")
    hidden, labels = head_input(client, 300)
    with LargestResult() as largest:
        client.head_backward(hidden, labels, 1.0, chunk_size=20)
    width = client.widths.hidden
    assert largest.entries == max(20 * VOCABULARY, VOCABULARY * width, 300 * width)
    assert largest.entries < 300 * VOCABULARY


def test_no_masked_position_is_no_loss(small_model, architecture) -> None:
    client, _ = split(small_model(architecture), "embeddings")
    hidden, labels = head_input(client, 0)
    loss, gradient = client.head_backward(hidden, labels, 1.0)
    assert (loss, gradient.shape) == (0.0, (0, client.widths.hidden))
    assert client.head_loss(hidden, labels) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in client.parameters())


def test_hidden_states_of_another_dtype_are_taken(small_model) -> None:
    client, _ = split(small_model("bert"), "embeddings")
    hidden, labels = head_input(client, 6)
    loss, gradient = client.head_backward(hidden.bfloat16(), labels, 1.0)
    assert gradient.dtype == torch.float32
    assert loss == client.head_loss(hidden.bfloat16(), labels)


def test_rows_sends_each_distinct_row_once(small_model, architecture) -> None:
    client, _ = split(small_model(architecture), "rows")
    packed = pack([5, 9])
    activations = client.embed(packed.input_ids, packed.lengths)
    assert activations.row_index is not None
    assert activations.row_index.dtype == torch.int32
    assert len(activations.values) == len(packed.input_ids.unique()) < len(packed.input_ids)
    table = word_table(client)
    assert torch.equal(activations.values[activations.row_index.long()], table[packed.input_ids])


def test_rows_are_numbered_as_they_appear(small_model, architecture) -> None:
    """Sorted, they would tell which of two words has the larger id, and ids go by frequency."""
    client, _ = split(small_model(architecture), "rows")
    input_ids = torch.tensor([17, 4, 17, 9, 4, 21, 2])
    activations = client.embed(input_ids, [4, 3])
    assert activations.row_index is not None and activations.row_index.tolist() == [0, 1, 0, 2, 1, 3, 4]
    table = word_table(client)
    assert torch.equal(activations.values, table[[17, 4, 9, 21, 2]])


def test_embeddings_refuse_what_does_not_fit(small_model, architecture, cut) -> None:
    client, _ = split(small_model(architecture), cut)
    with pytest.raises(ValueError, match="lengths sum to 4, but there are 5 tokens"):
        client.embed(torch.full((5,), 7), [3, 1])
    client.embed(torch.full((16,), 7), [16])
    with pytest.raises(ValueError, match="longer than the position table, 16"):
        client.embed(torch.full((17,), 7), [17])


def test_scopes_divide_the_half(small_model) -> None:
    client, _ = split(small_model("bert"), LayersCut(layers=1))
    scopes = {name: client.parameter_scope(name) for name, _ in client.named_parameters()}
    assert {scope for name, scope in scopes.items() if name.startswith("bert.")} == {"embeddings"}
    assert {scope for name, scope in scopes.items() if name.startswith("cls.")} == {"head"}
    assert client.parameter_scope("cls.predictions.decoder.weight") == "embeddings"


def test_every_weight_is_in_the_scope_of_its_part(small_model, architecture) -> None:
    client, _ = split(small_model(architecture), LayersCut(layers=1))
    base = f"{ARCHITECTURES[architecture].base}."
    for name, _ in client.named_parameters():
        assert client.parameter_scope(name) == ("embeddings" if name.startswith(base) else "head"), name
    heads = [name for name, _ in client.named_parameters() if not name.startswith(base)]
    assert heads, "the decoder's bias at least"
    assert all(client.parameter_scope(alias) == "embeddings" for alias in tied_tables(client))


def tied_tables(client: Any) -> list[str]:
    """Names under which the word table is the decoder's weight."""
    decoder = ARCHITECTURES[client.config.model_type].decoder
    assert client.get_parameter(f"{decoder}.weight") is word_table(client)
    return [f"{decoder}.weight"]


def test_operations_are_counted_from_matrices(small_model) -> None:
    client, body = split(small_model("electra"), "embeddings")
    # The head is the 8 x 61 table. The body projects 8 -> 16 and has 3 layers of 12 x 16 x 16;
    # where masked, the last layer's 8 x 16 x 16 of feed-forward and 16 -> 8.
    assert client.flops_per_token(0.5) == 6 * 0.5 * 8 * VOCABULARY
    layers = 3 * (12 * 16 * 16 + 2 * 16 * 10) - 8 * 16 * 16
    assert body.flops_per_token(0.5, sequence_length=10) == 6 * (8 * 16 + layers + 0.5 * (8 * 16 * 16 + 16 * 8))


@pytest.mark.parametrize("lengths", [[5, 3, 7, 3], [1, 2]])
def test_the_whole_model_at_a_client_is_the_model(small_model, architecture, lengths: list[int]) -> None:
    """Loss and every gradient, against transformers' own forward over a padded batch."""
    model, packed = small_model(architecture).double(), pack(lengths)
    loss = functional.cross_entropy(padded_logits(model, packed), packed.labels, reduction="sum")
    (loss * 0.25).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    client = undivided(small_model(architecture).double())
    assert client.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    found = client.whole_backward(packed.input_ids, packed.lengths, packed.masked, packed.labels, 0.25)
    assert found == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in client.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-9, rtol=0, msg=name)


def test_the_whole_model_takes_a_piece_without_masked_tokens(small_model, architecture) -> None:
    client, packed = undivided(small_model(architecture)), pack([4])
    nothing = torch.empty(0, dtype=torch.int64)
    assert client.whole_backward(packed.input_ids, packed.lengths, nothing, nothing, 1.0) == 0.0
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in client.parameters())


def test_operations_of_the_whole_model_are_those_of_its_halves(small_model, architecture) -> None:
    half, body = split(small_model(architecture), "embeddings")
    # With sequences of one token no layer has a window to speak of.
    scores = 6.0 * 2 * 3 * 16 * 1
    expected = half.flops_per_token(0.15) + body.flops_per_token(0.15, sequence_length=1) - scores
    assert undivided(small_model(architecture)).flops_per_token(0.15) == pytest.approx(expected)
