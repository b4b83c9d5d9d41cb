"""Training steps of one encoder on the same window of sequences: packed, and as transformers does.

A step is forward and backward of every micro-batch and one optimizer step. Activations of tokens
are given, and the gradient of the hidden states at masked positions, so embeddings and head take no
part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedbert_ds.config import Kernels, ModelSection, OptimizerSection
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.kernels import install_kernels
from fedbert_ds.model.optimizer import build_optimizer

MASK_SHARE = 0.15
VARLEN_ATTENTION = "bench_varlen"
"""Value of `_attn_implementation` that selects `varlen_attention`."""


@dataclass(frozen=True)
class Shape:
    """An encoder to train."""

    name: str
    layers: int
    hidden_size: int
    heads: int
    longest: int = 512

    def model(self, dropout: float) -> Any:
        """A BERT with the same weights every time and few word pieces: its ends are unused."""
        section = ModelSection(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            max_position_embeddings=self.longest,
            dropout=dropout,
        )
        return build_model(section, 100, 0, 1).train()


@dataclass(frozen=True)
class Window:
    """Sequences of one optimizer step, with what goes in and what comes back."""

    lengths: tuple[int, ...]
    values: tuple[Tensor, ...]
    """[length, H] of each sequence: activations."""
    masked: tuple[Tensor, ...]
    """[m_i] int64 of each sequence: masked positions in it."""
    gradients: tuple[Tensor, ...]
    """[m_i, H] of each sequence: gradient of the hidden states there."""

    @classmethod
    def draw(cls, lengths: Sequence[int], hidden_size: int, device: torch.device, dtype: torch.dtype) -> Window:
        """Random numbers, the same every time."""
        random = torch.Generator().manual_seed(1)
        values, masked, gradients = [], [], []
        for length in lengths:
            chosen = (torch.rand(length, generator=random) < MASK_SHARE).nonzero().squeeze(1)
            values.append(torch.randn(length, hidden_size, generator=random).to(device, dtype))
            gradients.append(torch.randn(len(chosen), hidden_size, generator=random).to(device, dtype) / sum(lengths))
            masked.append(chosen.to(device))
        return cls(tuple(lengths), tuple(values), tuple(masked), tuple(gradients))

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def mask_share(self) -> float:
        """Share of the tokens that are masked."""
        return sum(map(len, self.masked)) / self.num_tokens

    @property
    def attended(self) -> float:
        """Tokens that a token attends to, on average."""
        return sum(length**2 for length in self.lengths) / self.num_tokens


@dataclass(frozen=True)
class Step:
    """A way to train the encoder on a window."""

    run: Callable[[], Any]
    module: nn.Module
    flops: float
    """Operations of matrix products that the window needs: of real tokens, forward and backward."""
    computed_tokens: int
    """Tokens that go through the encoder, padding included."""


def packed_step(
    shape: Shape, window: Window, budget: int, dropout: float, kernels: Kernels, device: torch.device
) -> Step:
    """The body: micro-batches of at most `budget` tokens, no padding."""
    _, body = split(shape.model(dropout), "embeddings")
    dtype = window.values[0].dtype
    body.to(device, dtype)
    install_kernels(body, kernels, device)
    micro_batches = [_pack(window, chosen) for chosen in divided(window.lengths, budget, padded=False)]

    def forward(values: Tensor, masked: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden: Tensor = body(values, masked, cu_seqlens)
        return hidden

    return Step(
        _trainer(body, forward, micro_batches),
        body,
        body.flops_per_token(window.mask_share, window.attended) * window.num_tokens,
        window.num_tokens,
    )


def padded_step(
    shape: Shape,
    window: Window,
    budget: int,
    dropout: float,
    device: torch.device,
    *,
    by_length: bool = False,
    compiled: bool = False,
) -> Step:
    """transformers' encoder with SDPA on batches padded to their longest, `budget` tokens at most.

    `by_length` puts sequences of like length together, as transformers' `group_by_length` does.
    """
    model = shape.model(dropout)
    encoder = model.bert.encoder.to(device, window.values[0].dtype)
    model.config._attn_implementation = "sdpa"
    order = sorted(range(len(window.lengths)), key=window.lengths.__getitem__) if by_length else None
    chosen_in_turn = divided(window.lengths, budget, padded=True, order=order)
    micro_batches = [_pad(window, chosen) for chosen in chosen_in_turn]
    # Each shape would be compiled anew, and the limit on that is soon met.
    called = torch.compile(encoder, dynamic=len(set(window.lengths)) > 1) if compiled else encoder

    def forward(values: Tensor, masked: Tensor, real: Tensor | None) -> Tensor:
        mask = None
        if real is not None:
            mask = create_bidirectional_mask(config=model.config, inputs_embeds=values, attention_mask=real)
        hidden: Tensor = called(values, attention_mask=mask).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, masked)

    return Step(
        _trainer(encoder, forward, micro_batches),
        encoder,
        _plain_flops(shape, window, dropout),
        sum(len(chosen) * max(window.lengths[index] for index in chosen) for chosen in chosen_in_turn),
    )


def varlen_step(shape: Shape, window: Window, budget: int, dropout: float, device: torch.device) -> Step:
    """transformers' encoder on packed sequences with `varlen_attention`."""
    model = shape.model(dropout)
    encoder = model.bert.encoder.to(device, window.values[0].dtype)
    model.config._attn_implementation = VARLEN_ATTENTION
    micro_batches = [_pack(window, chosen) for chosen in divided(window.lengths, budget, padded=False)]

    def forward(values: Tensor, masked: Tensor, cu_seqlens: Tensor) -> Tensor:
        longest = int(cu_seqlens.diff().max())
        hidden: Tensor = encoder(
            values.unsqueeze(0), cu_seq_lens_q=cu_seqlens.to(device, non_blocking=True), max_length_q=longest
        ).last_hidden_state
        return hidden.squeeze(0).index_select(0, masked)

    return Step(
        _trainer(encoder, forward, micro_batches), encoder, _plain_flops(shape, window, dropout), window.num_tokens
    )


def has_flash_attn() -> bool:
    """Whether the package flash-attn is installed."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """flash-attn's attention if installed, else torch's, without dropout; CUDA only."""
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    bounds, longest = cu_seq_lens_q, max_length_q
    attended: Any
    if has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        attended = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling)
    return attended.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(VARLEN_ATTENTION, varlen_attention)


class _MasterWeights:
    """AdamW as DeepSpeed steps: on fp32 copies of 16-bit weights, on fp32 weights themselves."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = dict(module.named_parameters())
        self._masters = {
            name: weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())
            for name, weight in self._weights.items()
        }
        self._optimizer = build_optimizer(self._masters.items(), OptimizerSection())

    @torch.no_grad()
    def step(self) -> None:
        """Step, and forget the gradients."""
        for name, weight in self._weights.items():
            master = self._masters[name]
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float()
        self._optimizer.step()
        copies = [(weight, self._masters[name]) for name, weight in self._weights.items()]
        copies = [(weight, master) for weight, master in copies if master is not weight]
        if copies:
            torch._foreach_copy_([weight for weight, _ in copies], [master for _, master in copies])
        for parameter in (*self._weights.values(), *self._masters.values()):
            parameter.grad = None


def _trainer(
    module: nn.Module, forward: Callable[..., Tensor], micro_batches: Sequence[tuple[Tensor, Tensor, Any, Tensor]]
) -> Callable[[], None]:
    """Steps on micro-batches: (values, masked positions, more for `forward`, result's gradient)."""
    optimizer = _MasterWeights(module)

    def run() -> None:
        for values, masked, more, gradient in micro_batches:
            # The input's gradient is part of the work: it goes back to the clients, or into the
            # embeddings.
            hidden = forward(values.detach().requires_grad_(), masked, more)
            hidden.backward(gradient)
        optimizer.step()

    return run


def divided(
    lengths: Sequence[int], budget: int, *, padded: bool, order: Sequence[int] | None = None
) -> list[list[int]]:
    """Numbers of sequences in micro-batches of `budget` tokens at most, padding included or not."""
    micro_batches: list[list[int]] = [[]]
    for index in order if order is not None else range(len(lengths)):
        chosen = [lengths[other] for other in (*micro_batches[-1], index)]
        if (len(chosen) * max(chosen) if padded else sum(chosen)) > budget and micro_batches[-1]:
            micro_batches.append([])
        micro_batches[-1].append(index)
    return micro_batches


def _pack(window: Window, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [T, H], masked positions [m], cu_seqlens [n + 1] int32 on the CPU, gradient [m, H]."""
    bounds = [0, *accumulate(window.lengths[index] for index in chosen)]
    masked = [window.masked[index] + start for index, start in zip(chosen, bounds, strict=False)]
    return (
        torch.cat([window.values[index] for index in chosen]),
        torch.cat(masked),
        torch.tensor(bounds, dtype=torch.int32),
        torch.cat([window.gradients[index] for index in chosen]),
    )


def _pad(window: Window, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Values [n, longest, H], masked positions [m] in the flat batch, real tokens, gradient."""
    values = pad_sequence([window.values[index] for index in chosen], batch_first=True)
    longest = values.shape[1]
    real = pad_sequence([torch.ones(window.lengths[index], dtype=torch.long) for index in chosen], batch_first=True)
    return (
        values,
        torch.cat([window.masked[index] + row * longest for row, index in enumerate(chosen)]),
        None if bool(real.all()) else real.to(values.device),
        torch.cat([window.gradients[index] for index in chosen]),
    )


def _plain_flops(shape: Shape, window: Window, dropout: float) -> float:
    # With all positions masked, the body leaves nothing out.
    body: Body = split(shape.model(dropout), "embeddings")[1]
    return body.flops_per_token(1.0, window.attended) * window.num_tokens
