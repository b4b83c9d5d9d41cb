"""Packed attention: kernels and CPU body against fp64, masks, bounds, operators, errors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fedbert_kernels import attention as attention_module
from fedbert_kernels import attention_torch, sequences
from fedbert_kernels.attention import attention, attention_reference, dropout_mask, launch_backward, launch_forward
from fedbert_kernels.interpreter import HAVE_TRITON
from fedbert_kernels.launch import Launch
from fedbert_kernels.philox import drop_threshold, keep_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = torch.tensor([-(2**62) + 12345, 7], device=DEVICE)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed")


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def random_qkv(lengths: Sequence[int], heads: int, d: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(len(lengths) + heads + d)
    return (spread * torch.randn(sum(lengths), 3, heads, d, generator=generator)).to(DEVICE, dtype)


def kernels(
    qkv: Tensor, cu_seqlens: Tensor, dout: Tensor, dropout: float, sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    """out and dqkv of the kernels, in the interpreter where there is no GPU."""
    seed = SEED if dropout else None
    options = (cu_seqlens, seed, dropout, -1 if sliding_window is None else sliding_window, qkv.shape[-1] ** -0.5)
    # NaN where nothing is written would show.
    dqkv = torch.full_like(qkv, math.nan)
    out, lse = launch_forward(*qkv.unbind(1), *options)
    launch_backward(dout, *qkv.unbind(1), out, lse, *dqkv.unbind(1), *options)
    return out, dqkv


def operator(
    qkv: Tensor, cu_seqlens: Tensor, dout: Tensor, dropout: float, sliding_window: int | None
) -> tuple[Tensor, Tensor]:
    """out and dqkv of the public function on this device."""
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf, cu_seqlens, dropout=dropout, seed=SEED, sliding_window=sliding_window)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def reference(
    qkv: Tensor, cu_seqlens: Tensor, dout: Tensor, dropout: float, sliding_window: int | None, upcast: bool
) -> tuple[Tensor, Tensor]:
    leaf = (qkv.double() if upcast else qkv).detach().requires_grad_()
    out = attention_reference(
        *leaf.unbind(1), cu_seqlens, dropout=dropout, seed=SEED, sliding_window=sliding_window, upcast=upcast
    )
    return out.detach(), torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


def torchs_errors(qkv: Tensor, cu_seqlens: Tensor, dout: Tensor, sliding_window: int | None) -> list[Tensor]:
    """Largest error of torch's fused attention in out, dq, dk, dv, without dropout."""
    leaf = qkv.detach().requires_grad_()
    outs = [leaf[:0, 0]]
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = (tensor[None, start:end].transpose(1, 2) for tensor in leaf.unbind(1))
        position = torch.arange(end - start, device=DEVICE)
        seen = None if sliding_window is None else (position[:, None] - position).abs() <= sliding_window
        if end > start:
            outs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1))
    out = torch.cat(outs)
    dqkv = torch.autograd.grad(out, leaf, dout)[0]
    exact = reference(qkv, cu_seqlens, dout, 0.0, sliding_window, upcast=True)
    return [(out - exact[0]).abs().max(), *(dqkv - exact[1]).abs().amax((0, 2, 3))]


def assert_as_good_as_torch(body, lengths, heads, d, dtype, dropout=0.0, sliding_window=None, spread=1.0) -> None:
    """Error against fp64 at most twice torch's in the same dtype: output, gradients of q, k, v.

    Torch's is the larger of its fused attention's and the reference's, which alone has dropout.
    Over few values torch may be lucky: the cost of rounding alone is always allowed (see
    `rounding`), and below 16 tokens three times as much as above.
    """
    qkv, cu_seqlens = random_qkv(lengths, heads, d, dtype, spread), cumulative(lengths)
    dout = torch.randn(len(qkv), heads, d, generator=torch.Generator().manual_seed(1)).to(qkv)
    arguments = (qkv, cu_seqlens, dout, dropout, sliding_window)
    (out, dqkv), torchs, exact = body(*arguments), reference(*arguments, False), reference(*arguments, True)
    assert out.dtype == dqkv.dtype == dtype and out.shape == dout.shape and dqkv.shape == qkv.shape
    if len(qkv) == 0:
        return
    rows = [("out", out, torchs[0], exact[0])]
    rows += [(f"d{name}", dqkv[:, i], torchs[1][:, i], exact[1][:, i]) for i, name in enumerate("qkv")]
    fused_errors = torchs_errors(qkv, cu_seqlens, dout, sliding_window)
    allowances = rounding(qkv, dout, exact)
    for (name, ours, theirs, right), fused_error, rest in zip(rows, fused_errors, allowances, strict=True):
        # Dropout scales what is kept, and so its error.
        torchs_error = torch.maximum((theirs - right).abs().max(), fused_error / keep_rate(dropout))
        error = (ours - right).abs().max()
        times = 2 if len(qkv) >= 16 else 6
        assert error <= times * torchs_error + rest, (
            f"{name}: error {error:.2e}, torch's {torchs_error:.2e}, {rest:.2e}"
        )


def rounding(qkv: Tensor, dout: Tensor, exact: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Errors of out, dq, dk, dv that no algorithm avoids: their last place; two more for dq, dk.

    These are sums of probability * (dout · v - dout · out), where products are sums of d terms in
    fp32 and `out` has been rounded to its dtype, in every fused attention.
    """
    out, dqkv = exact
    own = [0.5 * torch.finfo(qkv.dtype).eps * values.abs().max() for values in (out, *dqkv.unbind(1))]
    q, k, v = qkv.double().unbind(1)
    products = (dout.double().transpose(0, 1) @ v.transpose(0, 1).mT).abs().max() * torch.finfo(torch.float32).eps
    through_out = (out * dout).square().sum(-1).sqrt().max() * 0.5 * torch.finfo(qkv.dtype).eps
    difference = 2 * (products + through_out) * qkv.shape[-1] ** -0.5
    return [own[0], own[1] + difference * k.abs().max(), own[2] + difference * q.abs().max(), own[3]]


# ---- against fp64 ----

grid = given(
    lengths=st.lists(st.one_of(st.integers(0, 70), st.sampled_from([1, 63, 64, 65, 128, 129])), max_size=4),
    heads=st.integers(1, 2),
    d=st.sampled_from([16, 17, 32, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    sliding_window=st.sampled_from([None, None, 0, 3, 64]),
    spread=st.sampled_from([1.0, 1.0, 4.0]),
)


@needs_triton
@settings(max_examples=12, derandomize=True)
@grid
@example([], 1, 16, torch.float32, 0.0, None, 1.0)
@example([0, 0], 2, 32, torch.float16, 0.1, 3, 1.0)
@example([1, 1, 1], 1, 64, torch.bfloat16, 0.0, None, 1.0)
@example([129, 1, 64], 1, 64, torch.bfloat16, 0.1, None, 1.0)
def test_kernels_are_as_good_as_torch(lengths, heads, d, dtype, dropout, sliding_window, spread) -> None:
    assert_as_good_as_torch(kernels, lengths, heads, d, dtype, dropout, sliding_window, spread)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 24, 64, 128])
def test_kernels_take_every_dtype_and_head_size(d: int, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(kernels, [70, 1], 1, d, dtype, dropout=0.1)


@needs_triton
def test_kernels_walk_a_long_sequence() -> None:
    assert_as_good_as_torch(kernels, [5, 300], 1, 16, torch.float16)
    assert_as_good_as_torch(kernels, [5, 300], 1, 16, torch.float16, dropout=0.2, sliding_window=100)


@settings(max_examples=25, derandomize=True)
@grid
@example([], 1, 16, torch.float32, 0.0, None, 1.0)
@example([0, 5, 0, 3, 5], 2, 32, torch.float32, 0.1, 3, 1.0)
def test_the_operator_is_as_good_as_torch(lengths, heads, d, dtype, dropout, sliding_window, spread) -> None:
    assert_as_good_as_torch(operator, lengths, heads, d, dtype, dropout, sliding_window, spread)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", [kernels, operator])
@pytest.mark.parametrize("norm", [200, 1000])
def test_scores_of_thousands_stay_finite(norm: int, body, dtype: torch.dtype) -> None:
    """One-hot attention: a token sees itself alone. out is v, dv is dout, dq and dk are 0."""
    lengths = [65, 3]
    qkv = torch.randn(sum(lengths), 3, 1, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    qkv[:, 1] = qkv[:, 0] = torch.nn.functional.normalize(qkv[:, 0], dim=-1) * norm
    dout = torch.ones_like(qkv[:, 0])
    out, dqkv = body(qkv, cumulative(lengths), dout, 0.0, None)
    torch.testing.assert_close(out, qkv[:, 2])
    # Backward computes scores anew; a score's fp32 rounding is its exponential's relative error.
    rounding = 6 * torch.finfo(torch.float32).eps * norm**2 / 64**0.5
    torch.testing.assert_close(dqkv[:, 2], dout, rtol=max(rounding, 2 * torch.finfo(dtype).eps), atol=0)
    assert dqkv.isfinite().all()


@needs_triton
def test_equal_scores_of_either_sign_average_v() -> None:
    qkv = random_qkv([100], 1, 32, torch.float32)
    for sign in (1, -1):
        qkv[:, 0], qkv[:, 1] = 1e4, sign * 1e4
        out, dqkv = kernels(qkv, cumulative([100]), torch.ones_like(qkv[:, 0]), 0.0, None)
        torch.testing.assert_close(out, qkv[:, 2].mean(0).expand_as(out))
        assert dqkv.isfinite().all()


@needs_triton
@pytest.mark.parametrize("body", [kernels, operator])
def test_the_same_input_gives_the_same_bits(body) -> None:
    arguments = (random_qkv([80, 20], 1, 32, torch.float16), cumulative([80, 20]))
    dout = torch.randn_like(arguments[0][:, 0])
    first, second = (body(*arguments, dout, 0.1, None) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# ---- dropout ----


@needs_triton
@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (64, 128), (32, 32), (64, 16)])
def test_kernel_masks_equal_the_hosts_bit_by_bit(rows: int, columns: int, monkeypatch) -> None:
    """q = 0 makes every probability 1 / length, and v = identity shows each; whatever the tiles."""
    shape = Launch(rows, columns, 4, 1)
    monkeypatch.setattr(attention_module, "launches_for", lambda *_: (shape,) * 3)
    lengths, heads = [50, 128, 7], 2
    qkv = torch.zeros(sum(lengths), 3, heads, 128, dtype=torch.float16, device=DEVICE)
    starts = [0, 50, 178]
    for start, length in zip(starts, lengths, strict=True):
        qkv[start : start + length, 2] = torch.eye(length, 128).unsqueeze(1)
    out, _ = launch_forward(*qkv.unbind(1), cumulative(lengths), SEED, 0.3, -1, 1.0)
    masks = dropout_mask(SEED, cumulative(lengths), heads, 0.3)
    for start, length, mask in zip(starts, lengths, masks, strict=True):
        assert torch.equal(out[start : start + length, :, :length].transpose(0, 1) > 0, mask)


@needs_triton
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (64, 128)])
@pytest.mark.parametrize("sliding_window", [None, 20])
def test_tiles_of_other_shapes_give_the_same(rows: int, columns: int, sliding_window: int | None, monkeypatch) -> None:
    shape = Launch(rows, columns, 4, 1)
    monkeypatch.setattr(attention_module, "launches_for", lambda *_: (shape,) * 3)
    assert_as_good_as_torch(kernels, [90, 20], 1, 32, torch.float32, dropout=0.1, sliding_window=sliding_window)


def test_dropout_scales_by_the_rate_it_keeps() -> None:
    assert drop_threshold(0.1) == 26
    assert keep_rate(0.1) == 230 / 256
    assert keep_rate(0.0) == 1.0
    assert keep_rate(0.5) == 0.5


@pytest.mark.parametrize("dropout", [1 / 256, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(dropout: float) -> None:
    (mask,) = dropout_mask(SEED, cumulative([1024]), 2, dropout)
    keep = keep_rate(dropout)
    # Five standard deviations; the rows, columns and places in a group of 32 each by themselves.
    for axes, count in (((0, 1, 2), 2 << 20), ((0, 1), 2 << 10), ((0, 2), 2 << 10)):
        shares = mask.float().mean(axes)
        assert (shares - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / count)
    places = mask.unflatten(1, (64, 2, 8)).unflatten(3 + 1, (16, 8, 4, 2)).float().mean((0, 1, 3, 4, 6))
    assert (places - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / (1 << 16))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1])


def test_masks_are_uncorrelated() -> None:
    cu_seqlens = cumulative([512, 512])
    first, second = dropout_mask(SEED, cu_seqlens, 2, 0.1)
    others = [second, first.flip(0)]
    for change in ([1, 0], [1 << 32, 0], [0, 1], [0, -1]):
        others.append(dropout_mask(SEED + torch.tensor(change, device=DEVICE), cu_seqlens, 2, 0.1)[0])
    pairs = [(first, other) for other in others] + [(first, first.mT)]
    for lag in (1, 2, 4, 7, 8, 16, 32, 64, 128):
        pairs += [(first[:, lag:], first[:, :-lag]), (first[..., lag:], first[..., :-lag])]
    # 2**18 elements or more, of two heads: five standard deviations are 0.01.
    assert max(abs(correlation(*pair)) for pair in pairs) < 0.01


def test_a_mask_follows_from_seed_offset_and_place() -> None:
    cu_seqlens = cumulative([20, 20])
    one, two = dropout_mask(SEED, cu_seqlens, 2, 0.5), dropout_mask(SEED.clone(), cu_seqlens, 2, 0.5)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1])
    assert torch.equal(one[0], dropout_mask(SEED, cumulative([20]), 2, 0.5)[0])
    # A longer sequence has the same mask where both have one.
    assert torch.equal(one[0], dropout_mask(SEED, cumulative([300]), 2, 0.5)[0][:, :20, :20])


def test_philox_gives_the_published_words(monkeypatch) -> None:
    """Known answers of the Random123 library for counter and key zero."""
    from fedbert_kernels import philox

    zero = torch.tensor(0)
    for rounds, words in (
        (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ):
        monkeypatch.setattr(philox, "ROUNDS", rounds)
        assert tuple(int(word) for word in philox.philox_reference(zero, zero, zero, zero, zero)) == words


@pytest.mark.parametrize(("position", "bits"), [(0, 20), (1, 13), (2, 24), (3, 13)])
def test_any_bit_of_the_counter_turns_half_of_the_words_bits(position: int, bits: int, monkeypatch) -> None:
    """Offset, column, stream and row; rows and columns enter last, where too few rounds show."""
    from fedbert_kernels import philox

    generator = torch.Generator().manual_seed(0)
    count = 1 << 14
    counter = [torch.randint(1 << size, (count,), generator=generator) for size in (20, 13, 24, 13)]

    def furthest_from_half() -> float:
        """In standard deviations, of each output bit for each input bit."""
        before = torch.stack(philox.philox_reference(*counter, SEED[0].cpu()))
        furthest = 0.0
        for bit in range(bits):
            turned = [word ^ (1 << bit) if place == position else word for place, word in enumerate(counter)]
            changes = torch.stack(philox.philox_reference(*turned, SEED[0].cpu())) ^ before
            shares = ((changes[..., None] >> torch.arange(32)) & 1).float().mean(1)
            furthest = max(furthest, float((shares - 0.5).abs().max()) * 2 * math.sqrt(count))
        return furthest

    assert furthest_from_half() < 5.5
    monkeypatch.setattr(philox, "ROUNDS", 5)
    assert furthest_from_half() > 20


def test_no_seed_draws_from_torchs_generator() -> None:
    qkv, cu_seqlens = random_qkv([30], 1, 16, torch.float32), cumulative([30])
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(qkv, cu_seqlens, dropout=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


# ---- sequences ----


def test_work_items_cover_every_row_longest_first() -> None:
    lengths = [5, 0, 130, 64, 65, 1]
    items = sequences.work_items(cumulative(lengths), sum(lengths), 64).tolist()
    real = [tuple(item[:3]) for item in items if item[1]]
    assert real == [
        (5, 130, 0),
        (5, 130, 64),
        (5, 130, 128),
        (199, 65, 0),
        (199, 65, 64),
        (135, 64, 0),
        (0, 5, 0),
        (264, 1, 0),
    ]
    assert [item[1] for item in items[len(real) :]] == [0] * (len(items) - len(real))


def test_what_is_known_of_bounds_follows_their_changes() -> None:
    cu_seqlens = cumulative([3, 5])
    assert sequences.work_items(cu_seqlens, 8, 64) is sequences.work_items(cu_seqlens, 8, 64)
    assert sequences.equal_lengths(cu_seqlens).groups == ((3, 1), (5, 1))
    cu_seqlens[1] = 4
    assert sequences.equal_lengths(cu_seqlens).groups == ((4, 2),)


def test_the_operator_looks_at_bounds_once(monkeypatch) -> None:
    looks = []
    read = sequences.read_bounds
    monkeypatch.setattr(sequences, "read_bounds", lambda *arguments: looks.append(read(*arguments)))
    cu_seqlens = cumulative([3, 5])
    for _ in range(2):
        qkv = random_qkv([3, 5], 1, 16, torch.float32).requires_grad_()
        attention(qkv, cu_seqlens).sum().backward()
    assert len(looks) == 1


def test_sequences_do_not_see_each_other() -> None:
    qkv = random_qkv([40, 60], 2, 32, torch.float32)
    both = attention(qkv, cumulative([40, 60]))
    alone = attention(qkv[40:], cumulative([60]))
    torch.testing.assert_close(both[40:], alone)


# ---- operators ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_separate_inputs_equal_packed_ones(dropout: float) -> None:
    lengths = [30, 9, 30]
    qkv, cu_seqlens = random_qkv(lengths, 2, 32, torch.float32), cumulative(lengths)
    dout = torch.randn_like(qkv[:, 0])
    packed = operator(qkv, cu_seqlens, dout, dropout, None)
    # Any strides: heads first in memory, and a last dimension that is not.
    layouts = (
        lambda tensor: tensor.clone(),
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
        lambda tensor: tensor.mT.contiguous().mT,
    )
    for layout in layouts:
        q, k, v = (layout(tensor).requires_grad_() for tensor in qkv.unbind(1))
        out = attention((q, k, v), cu_seqlens, dropout=dropout, seed=SEED)
        gradients = torch.autograd.grad(out, (q, k, v), layout(dout))
        torch.testing.assert_close(out, packed[0])
        torch.testing.assert_close(torch.stack(gradients, 1), packed[1])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_operators_pass_opcheck(dropout: float) -> None:
    qkv, cu_seqlens = random_qkv([5, 3], 2, 16, torch.float32), cumulative([5, 3])
    seed = SEED if dropout else None
    options = (cu_seqlens, seed, dropout, -1, 0.25)
    operators = torch.ops.fedbert_kernels
    q, k, v = (tensor.clone().requires_grad_() for tensor in qkv.unbind(1))
    torch.library.opcheck(operators.attention.default, (q, k, v, *options))
    torch.library.opcheck(operators.attention_packed.default, (qkv.clone().requires_grad_(), *options))
    out, lse = operators.attention_packed(qkv, *options)
    dout = torch.randn_like(out)
    torch.library.opcheck(operators.attention_packed_backward.default, (dout, qkv, out, lse, *options))
    tensors = (dout, *(tensor.detach() for tensor in (q, k, v)), out, lse)
    torch.library.opcheck(operators.attention_backward.default, (*tensors, *options))


def test_it_compiles_into_one_graph() -> None:
    qkv, cu_seqlens = random_qkv([5, 3], 2, 16, torch.float32), cumulative([5, 3])

    def layer(qkv: Tensor, cu_seqlens: Tensor, seed: Tensor) -> Tensor:
        return attention(qkv * 2, cu_seqlens, dropout=0.2, seed=seed, sliding_window=2).square()

    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaf = qkv.clone().requires_grad_()
        out = function(leaf, cu_seqlens, SEED)
        results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_activation_checkpointing_repeats_the_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    qkv, cu_seqlens = random_qkv([50], 1, 16, torch.float32).requires_grad_(), cumulative([50])
    gradients = []
    for run in (attention, lambda *args, **kwargs: checkpoint(attention, *args, use_reentrant=False, **kwargs)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(run(qkv, cu_seqlens, dropout=0.5).square().sum(), qkv)[0])
    assert torch.equal(*gradients)


def test_long_score_matrices_come_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(attention_torch, "CHUNK", 1000)
    assert_as_good_as_torch(operator, [40, 40, 7], 3, 16, torch.float32, dropout=0.1)


def test_it_works_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "import fedbert_kernels.patch_modules\n"
        "from fedbert_kernels.attention import attention\n"
        "from fedbert_kernels.interpreter import HAVE_TRITON\n"
        "qkv = torch.randn(5, 3, 2, 16, requires_grad=True)\n"
        "attention(qkv, torch.tensor([0, 2, 5], dtype=torch.int32), dropout=0.1).sum().backward()\n"
        "print(HAVE_TRITON, bool(qkv.grad.isfinite().all()))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["False", "True"], result.stderr


# ---- bad input ----


def call(qkv: object = None, cu_seqlens: Tensor | None = None, **options) -> Tensor:
    qkv = torch.zeros(8, 3, 2, 16, device=DEVICE) if qkv is None else qkv
    return attention(qkv, cumulative([3, 5]) if cu_seqlens is None else cu_seqlens, **options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 3, 8], "sequence 1 goes from 5 to 3"),
        ([0, 3, 7], "end at 8 tokens"),
        ([0, 3, 9], "end at 8 tokens"),
        ([1, 3, 8], "begin at 0"),
        ([0], "end at 8 tokens"),
    ],
)
def test_wrong_bounds(bounds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=DEVICE))


def test_wrong_tensors() -> None:
    token = torch.zeros(8, 2, 16, device=DEVICE)
    cases = [
        ("T, 3, heads, d", {"qkv": torch.zeros(8, 2, 2, 16, device=DEVICE)}),
        ("T, 3, heads, d", {"qkv": token}),
        ("alike", {"qkv": (token, token, token[:, :1])}),
        ("qkv or", {"qkv": (token, token)}),
        ("qkv or", {"qkv": ()}),
        ("share", {"qkv": torch.zeros(8, 3, 2, 16, dtype=torch.int32, device=DEVICE)}),
        ("one device", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32, device="meta")}),
        ("share", {"qkv": (token, token.half(), token)}),
        ("share", {"qkv": torch.zeros(8, 3, 2, 16, dtype=torch.float64, device=DEVICE)}),
        ("head size", {"qkv": torch.zeros(8, 3, 2, 8, device=DEVICE)}),
        ("head size", {"qkv": torch.zeros(8, 3, 2, 256, device=DEVICE)}),
        ("one device", {"qkv": torch.zeros(8, 3, 2, 16, device="meta")}),
        ("int32", {"cu_seqlens": torch.tensor([0, 8], device=DEVICE)}),
        ("int32", {"cu_seqlens": torch.tensor(8, dtype=torch.int32, device=DEVICE)}),
        ("int32", {"cu_seqlens": torch.tensor([], dtype=torch.int32, device=DEVICE)}),
        ("seed", {"dropout": 0.1, "seed": torch.tensor([1], device=DEVICE)}),
        ("seed", {"dropout": 0.1, "seed": torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)}),
        ("one device", {"dropout": 0.1, "seed": torch.zeros(2, dtype=torch.int64, device="meta")}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            call(**arguments)


def test_wrong_numbers() -> None:
    for message, arguments in (
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
        ("dropout", {"dropout": 1e-4}),
        ("dropout", {"dropout": math.nan}),
        ("sliding_window", {"sliding_window": -1}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": math.nan}),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
