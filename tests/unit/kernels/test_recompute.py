"""Cheap results are not kept, and backward computes each once, with the same bits; of what is kept
in codes it has what they stand for.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedbert_kernels.encoded import Encoded
from fedbert_kernels.recompute import again, cheap, cheap_in_codes, consume, recomputing, watching


class Counted:
    """GELU that counts its calls and remembers whether its results live."""

    def __init__(self) -> None:
        self.calls = 0
        self.results: list[weakref.ref[Tensor]] = []

    def __call__(self, values: Tensor) -> Tensor:
        self.calls += 1
        # A view, as an operator over flattened rows returns.
        result = functional.gelu(values.flatten()).view(values.shape)
        self.results.append(weakref.ref(result))
        return result


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    values, first, second = torch.randn(5, 8), torch.randn(8, 8), torch.randn(8, 8)
    return values.requires_grad_(), first.requires_grad_(), second.requires_grad_()


def chain(gelu: Counted, values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Two products of one result, through different views, and a cheap result of a cheap result."""
    hidden = cheap(gelu, values @ first)
    other = cheap(partial(consume, torch.mul), hidden, hidden)
    product = partial(consume, torch.matmul)
    return product(hidden, second) + product(hidden.t(), other).sum() + product(other[1:3], second).sum()


def test_gradients_have_the_same_bits_and_each_result_is_computed_once_again() -> None:
    inputs = leaves()
    kept_gelu, gelu = Counted(), Counted()
    kept = torch.autograd.grad(chain(kept_gelu, *inputs).square().sum(), inputs)
    with recomputing():
        loss = chain(gelu, *inputs).square().sum()
    assert gelu.calls == 1
    again = torch.autograd.grad(loss, inputs)
    assert (kept_gelu.calls, gelu.calls) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_results_are_gone_between_forward_and_backward_and_after_it() -> None:
    inputs, gelu = leaves(), Counted()
    with recomputing():
        loss = chain(gelu, *inputs).square().sum()
    gc.disable()  # Nothing may wait for the collector of cycles.
    try:
        assert gelu.results[0]() is None
        torch.autograd.grad(loss, inputs)
        assert gelu.results[1]() is None
    finally:
        gc.enable()


def test_a_watcher_sees_what_is_kept_and_no_more() -> None:
    values, first, second = leaves()
    seen: list[Tensor] = []
    with watching(seen.append), recomputing():
        product = consume(torch.matmul, values, first)
        hidden = cheap(functional.gelu, product)
        consume(torch.matmul, hidden, second)
    pointers = {tensor.data_ptr() for tensor in seen}
    # GELU itself is not consumed, so that its input is for other hooks to see.
    assert pointers == {tensor.data_ptr() for tensor in (values, first, second)}
    assert hidden.data_ptr() not in pointers
    with recomputing():
        consume(torch.matmul, hidden, first)
    assert {tensor.data_ptr() for tensor in seen} == pointers


@pytest.mark.parametrize("is_view", [False, True])
def test_of_what_is_kept_in_codes_backward_has_what_they_stand_for(is_view: bool) -> None:
    """Both where the cheap function needs it, and where its result is computed again."""
    values, first, second = leaves()

    def product(values: Tensor, first: Tensor) -> Tensor:
        whole = consume(torch.matmul, values, first)
        return whole[:, 2:6] if is_view else whole

    def chain(into: Tensor) -> Tensor:
        return consume(torch.matmul, cheap_in_codes(into, functional.gelu, into), second[: into.shape[1]])

    exact = product(values, first)
    expected = functional.gelu(exact) @ second[: exact.shape[1]]
    seen: list[Tensor] = []
    with watching(seen.append), recomputing("int8"):
        found = chain(product(values, first))
    assert torch.equal(found, expected)

    coded = Encoded.of((values @ first).detach(), "int8").decode()
    coded = (coded[:, 2:6] if is_view else coded).requires_grad_()
    assert not torch.equal(coded, exact)
    by_hand = functional.gelu(coded) @ second[: exact.shape[1]]
    outgoing = torch.randn_like(found)
    of_coded, of_second = torch.autograd.grad(by_hand, [coded, second], outgoing)
    of_first = torch.autograd.grad(exact, first, of_coded)
    got = torch.autograd.grad(found, [first, second], outgoing)
    assert torch.equal(got[0], of_first[0]) and torch.equal(got[1], of_second)
    # The codes of the whole product are kept, once, and nothing of its values.
    assert [tuple(tensor.shape) for tensor in seen if tensor.dtype == torch.int8] == [(5, 8)]
    assert not any(torch.equal(tensor, part) for tensor in seen for part in (values @ first, exact))


def test_without_a_codec_nothing_is_coded() -> None:
    values, first, second = leaves()

    def gradients() -> tuple[Tensor, ...]:
        into = values @ first
        return torch.autograd.grad((cheap_in_codes(into, functional.gelu, into) @ second).sum(), [first, second])

    expected = gradients()
    with recomputing():
        assert all(map(torch.equal, gradients(), expected))
    with recomputing("int8"), torch.no_grad():
        into = values @ first
        assert not hasattr(cheap_in_codes(into, functional.gelu, into), "_recipe") and not hasattr(into, "_recipe")


def test_elsewhere_a_result_does_not_hold_on_to_its_arguments() -> None:
    """Outside `recomputing`, and inside where there is no graph."""
    scale = torch.ones(1, requires_grad=True)

    def twice(rows: Tensor) -> tuple[Tensor, weakref.ref[Tensor]]:
        # Autograd does not keep what a sum adds.
        argument = rows + scale
        return cheap(lambda value: value + value, argument), weakref.ref(argument)

    outside, argument = twice(torch.ones(3))
    assert outside.requires_grad and argument() is None
    with recomputing(), torch.no_grad():
        _, argument = twice(torch.ones(3))
    assert argument() is None


def test_an_error_inside_ends_it() -> None:
    values, _, second = leaves()
    with pytest.raises(ZeroDivisionError), recomputing():
        raise ZeroDivisionError
    gelu = Counted()
    consume(torch.matmul, cheap(gelu, values), second).sum().backward()
    assert gelu.calls == 1


class Attention:
    """Stands for attention: three inputs, products, random numbers; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.results: list[weakref.ref[Tensor]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.calls += 1
        result = functional.dropout(torch.softmax(query @ key.t(), -1), 0.5) @ value
        self.results.append(weakref.ref(result))
        return result


def attended(attention: Attention, values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Attention whose value needs no gradient, and a product that keeps its result."""
    result = again(attention, values @ first, values @ second, values.detach(), draws=True)
    return consume(torch.matmul, result.view(1, 5, 8)[0], second)


def test_what_is_run_again_is_run_once_more_with_the_same_random_numbers() -> None:
    inputs = leaves()
    plain, attention = Attention(), Attention()
    torch.manual_seed(3)
    kept = torch.autograd.grad(attended(plain, *inputs).square().sum(), inputs)
    torch.manual_seed(3)
    with recomputing():
        loss = attended(attention, *inputs).square().sum()
    drawn = torch.rand(3)
    found = torch.autograd.grad(loss, inputs)
    assert (plain.calls, attention.calls) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
    # What comes after a backward draws as if nothing had been run again.
    expected = torch.random.get_rng_state()
    torch.manual_seed(3)
    attended(plain, *inputs)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_a_result_that_is_run_again_is_gone_before_backward_and_after() -> None:
    inputs, attention, seen = leaves(), Attention(), list[Tensor]()
    with watching(seen.append), recomputing():
        loss = attended(attention, *inputs).square().sum()
    gc.disable()
    try:
        assert attention.results[0]() is None
        # Query, key and value; the last product's other factor.
        assert [tuple(tensor.shape) for tensor in seen] == [(5, 8)] * 3 + [(8, 8)]
        torch.autograd.grad(loss, inputs)
        assert attention.results[1]() is None
    finally:
        gc.enable()


def test_without_a_graph_nothing_is_noted() -> None:
    inputs, attention = leaves(), Attention()
    with recomputing(), torch.no_grad():
        assert not hasattr(again(attention, *(tensor @ inputs[1] for tensor in inputs)), "_recipe")
    assert attention.calls == 1
