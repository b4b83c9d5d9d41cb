"""Chooses attention for a card: our kernels, or another library's where that is measured faster.

The outcome depends on card, dtype, heads, dropout and the lengths of sequences. A way must also be
right: before it is timed, its results are compared with fp64, and with what holds under any mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedbert_kernels import attention_rivals
from fedbert_kernels.attention import attention, attention_reference
from fedbert_kernels.attention_launches import kernels_digest
from fedbert_kernels.attention_rivals import RIVALS, Attend
from fedbert_kernels.choice import OURS
from fedbert_kernels.launch import digest
from fedbert_kernels.sequences import vouch_for_bounds

CLASSES = (128, 512, 2048)
"""Tokens of the longest sequence up to which a class of lengths reaches; one more has no bound."""
TOKENS = 8192
"""Of a measurement, as a micro-batch has them."""
CHECKED = [100, 1, 37, 200]
"""Lengths on which results are checked."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest error over the largest value. fp32 products may be tf32's."""


@dataclass(frozen=True)
class AttentionCase:
    """One measurement's dtype, heads, dropout and class of lengths; a `choice.Case`."""

    dtype: torch.dtype
    heads: int
    head_size: int
    dropout: float
    """Drop probability of attention weights in training; every one but 0 costs the same."""
    longest: int
    """Tokens of the longest sequence that may come."""

    @property
    def name(self) -> str:
        """Dtype, heads, whether there is dropout, class of lengths."""
        dropout = " dropout" if self.dropout else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"attention {kind} {self.heads} x {self.head_size}{dropout} {length_class(self.longest)}"

    @property
    def default(self) -> str:
        """A tie goes to our kernels."""
        return OURS

    @property
    def off_gpu(self) -> str:
        """Our operator's CPU body."""
        return OURS

    @property
    def digest(self) -> str:
        """Of our kernels and of how the others are called."""
        return f"{kernels_digest()}-{digest(attention_rivals.__file__, __file__)}"

    def releases(self) -> dict[str, str]:
        """Ours, and the rivals that are installed and have dropout where it is needed."""
        return {OURS: ""} | {way: found for way, found in self._found().items() if isinstance(found, str)}

    def missing(self) -> dict[str, str]:
        """The other rivals."""
        return {way: str(found) for way, found in self._found().items() if not isinstance(found, str)}

    def step(self, way: str, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """A call of forward and backward over `typical_lengths`; it returns the packed gradient.

        ValueError if the way's results are wrong or do not repeat.
        """
        attend = attend_by(way)
        check_attention(attend, self.head_size, self.dtype, self.dropout, device)
        lengths = typical_lengths(self.longest)
        problem = _Problem(lengths, self.heads, self.head_size, self.dtype, device)

        def run() -> tuple[Tensor, ...]:
            return problem.run(attend, self.dropout)[1:]

        if not _repeats(run):
            raise ValueError("its gradient does not repeat")
        return run

    def _found(self) -> dict[str, str | Exception]:
        """{way: its release, or why it cannot run}."""
        found: dict[str, str | Exception] = {}
        for way, rival in RIVALS.items():
            try:
                found[way] = rival.release()
            except ModuleNotFoundError:
                found[way] = ModuleNotFoundError("not installed")
            except Exception as error:  # A package that was built for another torch fails in many ways.
                found[way] = error
            if self.dropout and not rival.has_dropout:
                found[way] = ValueError("has no dropout")
        return found


def attend_by(way: str) -> Attend:
    """The function of a way: ours, or a rival's."""
    return attention if way == OURS else RIVALS[way].attend


def is_one_operator(attend: Attend) -> bool:
    """Whether torch.compile sees it as one operator. It would break a layer's code at a package's
    function, and compile its parts for some sizes apart.
    """
    return attend is attention or attend is attention_rivals.torch_flash


def length_class(longest: int) -> str:
    """Name of the class of micro-batches whose longest sequence may have so many tokens."""
    bound = next((bound for bound in CLASSES if longest <= bound), None)
    return f"above {CLASSES[-1]}" if bound is None else f"up to {bound}"


def typical_lengths(longest: int, num_tokens: int = TOKENS) -> list[int]:
    """Lengths of about `num_tokens` tokens, as text has them that is cut in pieces of its class.

    Half of the sequences are whole pieces, the others are ends of articles, of any length. Of
    WikiText's, 97 % are whole at 128 tokens and 55 % at 2,048; of those of Python's documentation,
    74 % and 6 %.
    """
    bound = next((bound for bound in CLASSES if longest <= bound), 2 * CLASSES[-1])
    lengths: list[int] = []
    # Ends are spread evenly and mixed by a step that has no factor in common with their number.
    ends = [bound * (5 * number % 8 + 1) // 9 for number in range(8)]
    for end in itertools.cycle(ends):
        if sum(lengths) + bound + end > max(num_tokens, 2 * bound):
            return lengths
        lengths += [bound, end]
    raise AssertionError("a cycle has no end")


class _Problem:
    """Random packed inputs: qkv and dout."""

    def __init__(self, lengths: list[int], heads: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        num_tokens = sum(lengths)
        self.qkv = torch.randn(num_tokens, 3, heads, d, generator=generator).to(device, dtype).requires_grad_()
        self.dout = torch.randn(num_tokens, heads, d, generator=generator).to(device, dtype)
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        vouch_for_bounds(self.cu_seqlens, num_tokens, max(lengths))

    def run(self, attend: Attend, dropout: float) -> tuple[Tensor, Tensor]:
        """(out [T, heads, d], gradient of qkv [T, 3, heads, d])."""
        out = attend(self.qkv, self.cu_seqlens, dropout=dropout)
        (gradient,) = torch.autograd.grad(out, self.qkv, self.dout)
        return out.detach(), gradient


def check_attention(attend: Attend, head_size: int, dtype: torch.dtype, dropout: float, device: torch.device) -> None:
    """ValueError unless attention's results on short random sequences are right.

    Without dropout they are compared with fp64. With dropout the mask is unknown, but these must
    hold: the same seed gives the same bits and another one others; probabilities keep their mean;
    out is linear in v under the mask of the forward, and scores are bilinear in q and k.
    """
    problem = _Problem(CHECKED, 2, head_size, dtype, device)
    tolerance = TOLERANCES[dtype]
    leaf = problem.qkv.detach().double().requires_grad_()
    q, k, v = leaf.unbind(1)
    expected = attention_reference(q, k, v, problem.cu_seqlens)
    (gradient,) = torch.autograd.grad(expected, leaf, problem.dout.double())
    for what, found, exact in zip(("output", "gradient"), problem.run(attend, 0.0), (expected, gradient), strict=True):
        # Catches NaN, for which every comparison is false.
        if not bool((found - exact).abs().max() <= tolerance * exact.abs().max()):
            raise ValueError(f"its {what} is wrong")
    if dropout:
        _check_dropout(attend, problem, dropout, tolerance)


def _check_dropout(attend: Attend, problem: _Problem, dropout: float, tolerance: float) -> None:
    if not _repeats(lambda: problem.run(attend, dropout)):
        raise ValueError("its dropout does not follow torch's seed")
    torch.manual_seed(1)
    out, gradient = problem.run(attend, dropout)
    if torch.equal(out, problem.run(attend, dropout)[0]):
        raise ValueError("it draws the same dropout again and again")
    q, k, v = problem.qkv.detach().double().unbind(1)
    dq, dk, dv = gradient.double().unbind(1)
    # Each column of out is linear in its column of v, each head's scores are bilinear in q and k.
    by_output, by_v = (out * problem.dout).double(), dv * v
    by_q, by_k = dq * q, dk * k
    if not _equal_sums(by_output, by_v, (0,), tolerance) or not _equal_sums(by_q, by_k, (0, 2), tolerance):
        raise ValueError("its backward drops others than its forward")
    # With equal scores and v of ones, out is the share of kept weights over the keep rate.
    equal = torch.zeros_like(problem.qkv)
    equal[:, 2] = 1.0
    kept = attend(equal, problem.cu_seqlens, dropout=dropout)[:, :, 0].double()
    variance = dropout / (1.0 - dropout) * (len(problem.cu_seqlens) - 1) * kept.shape[1]
    if not bool((kept.mean() - 1.0).abs() <= 0.005 + 5 * variance**0.5 / kept.numel()):
        raise ValueError("its dropout has another rate")


def _equal_sums(one: Tensor, other: Tensor, over: tuple[int, ...], tolerance: float) -> bool:
    """Whether sums of random terms of both signs are equal but for rounding."""
    scale = (one.square().sum() + other.square().sum()).sqrt()
    return bool((one.sum(over) - other.sum(over)).norm() <= tolerance * scale)


def _repeats(run: Callable[[], tuple[Tensor, ...]]) -> bool:
    """Whether two calls after the same seed give the same bits."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(run())
    return all(map(torch.equal, *results))
