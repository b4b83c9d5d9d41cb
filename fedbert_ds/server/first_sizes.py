"""What is typical of clients' activations and gradients before any client has sent some."""

from __future__ import annotations

import torch

from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.server.contract import Sizes
from fedbert_kernels.encoded import Encoded

TOKENS = 64


def first_sizes(half: ClientHalf, codec: str, longest: int, seed: int) -> Sizes:
    """The sizes that `half` itself gives for random tokens, hidden states and labels.

    `codec` is that of activations; no sequence has more than `longest` tokens. Labels of a random
    word are wrong, as all are when training begins. The half and torch's random numbers stay as
    they are.
    """
    was_training = half.training
    half.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokens = min(TOKENS, longest)
            with torch.no_grad():
                words = torch.randint(half.config.vocab_size, (tokens,))
                sizes = Encoded.of(half.embed(words, [tokens]).values, codec).row_sizes
                hidden = torch.nn.functional.layer_norm(torch.randn(tokens, half.widths.hidden), [half.widths.hidden])
            labels = _random_labels(half, tokens)
            _, gradient = half.head_backward(hidden, labels, 1.0)
    finally:
        half.zero_grad(set_to_none=True)
        half.train(was_training)
    return Sizes(float(sizes.square().mean().sqrt()), float(gradient.double().square().sum(dim=1).mean().sqrt()))


def _random_labels(half: ClientHalf, count: int) -> torch.Tensor:
    """Words, or a task's labels or scores; scores are a few at most."""
    if half.task is None:
        return torch.randint(half.config.vocab_size, (count,))
    if half.task.labels:
        return torch.randint(len(half.task.labels), (count,))
    return 5.0 * torch.rand(count)
