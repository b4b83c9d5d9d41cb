"""A client's replica of the client half: its weights, its optimizer, its updates.

The strategy decides what is exchanged; the arithmetic of it is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.half_optimizer import HalfOptimizer
from fedbert_ds.federation.proximal import add_proximal_gradient
from fedbert_ds.federation.reference import ReferenceAssembler
from fedbert_ds.federation.shared_weights import SharedWeights
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import LARGEST_SUM
from fedbert_ds.wire.messages import ClientSettings


class Replica:
    """Steps the client half after each window and applies combined updates.

    Gradients accumulate in the half's parameters. `folder` is for temporary files. Raises WireError
    for an update that does not fit.
    """

    def __init__(self, half: ClientHalf, settings: ClientSettings, folder: Path | None = None) -> None:
        self._half = half
        self._staleness = settings.federation.staleness
        self._is_compressed = settings.wire.is_compressed
        self._strategy = strategy_of(settings.federation, settings.wire, half.cut)
        self._optimizer = HalfOptimizer(
            dict(half.named_parameters()),
            settings.optimizer,
            settings.windows,
            clips=not self._strategy.clips_together,
        )
        self._exchanged = {
            name: tuple(parameter.shape)
            for name, parameter in half.named_parameters()
            if self._strategy.takes_part(half.parameter_scope(name))
        }
        self._shared: SharedWeights | None = None
        if self._strategy.sends_changes:
            codec = self._strategy.update_codec
            self._shared = SharedWeights(self._exchanged, codec, compressed=self._is_compressed, folder=folder)
        self._proximal = settings.federation.proximal
        self._common: dict[str, Tensor] = {}
        """With a proximal term: the last weights that all clients had in common."""
        self._sent: dict[int, dict[str, Tensor]] = {}
        """With staleness: the weights of each window's update, until their average is back."""
        self._assembler: UpdateAssembler | None = None
        """Of the update that is arriving."""
        self._handed_over = frozenset(
            name for name, _ in half.named_parameters() if self._strategy.is_handed_over(half.parameter_scope(name))
        )
        self._shapes = {name: tuple(p.shape) for name, p in half.named_parameters()}
        self._reference = ReferenceAssembler(self._shapes)
        self._masked_seen = self._tokens_seen = 0

    def receive_reference(self, chunk: pb.ReferenceChunk) -> bool:
        """Take a chunk of the reference, which the half begins as; True for the last one."""
        reference = self._reference.add(chunk)
        if reference is None:
            return False
        self._take_over(reference.weights.items(), {})
        if not self._strategy.halves_are_personal:
            # Otherwise it is the server optimizer's.
            self._optimizer.load_state(reference.optimizer)
        if self._shared is not None:
            self._shared.begin(reference.weights)
        return True

    def forget_windows(self) -> None:
        """Drop the gradients and updates of windows that are under way."""
        self._optimizer.zero_grad()
        self._assembler = None
        self._reference = ReferenceAssembler(self._shapes)
        self._sent.clear()

    def receive(self, chunk: pb.UpdateChunk) -> bool:
        """Take a chunk of a window's combined update; True once the update is applied."""
        combined = self._joined(chunk)
        if combined is None:
            return False
        match self._strategy.exchange_after(chunk.window):
            case "gradients":
                self._optimizer.step_with(combined, chunk.window)
            case "weights":
                average = combined.items() if self._shared is None else self._shared.apply(combined)
                self._take_over(average, self._sent.pop(chunk.window, {}))
            case "nothing":
                raise WireError(f"the server sent an update of window {chunk.window}, after which none is exchanged")
        return True

    def finish_window(self, window: int, tokens: int, masked: int, all_masked: int) -> Iterable[pb.UpdateChunk]:
        """Use the gradients of a window, now complete; returns the chunks to send, if any.

        `masked` counts this client's masked tokens in the gradients; `all_masked` is M, all
        clients' masked tokens, the divisor of the losses. The half steps, unless gradients are
        exchanged.
        """
        self._masked_seen += masked
        self._tokens_seen += tokens
        exchange = self._strategy.exchange_after(window)
        if exchange == "gradients":
            return self._chunks(window, self._take_gradients(), self._strategy.update_codec)
        # FedAvg: each client follows the mean loss over its own tokens, not over all clients'.
        own_share = all_masked / max(1, masked)
        for parameter in self._half.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(own_share)
        add_proximal_gradient(dict(self._half.named_parameters()), self._common, self._proximal)
        self._optimizer.step(window)
        return self._exchanged_weights(window) if exchange == "weights" else ()

    def handed_over(self, window: int) -> Iterator[pb.UpdateChunk]:
        """The weights for the run's result before `window`, exact, but for what is this client's
        alone. WireError where the result needs none of them.
        """
        if not self._handed_over:
            raise WireError("the server asked for this client's half, which the run's result does not need")
        weights = {name: p for name, p in self._half.named_parameters() if name in self._handed_over}
        return self._chunks(window, weights, "fp32")

    def flops_per_token(self) -> float:
        """Floating-point operations of the half per token, forward and backward.

        The share of masked tokens is the one seen so far.
        """
        return self._half.flops_per_token(self._masked_seen / max(1, self._tokens_seen))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "half": self._half.state_dict(),
            "optimizer": self._optimizer.state(),
            "masked_seen": self._masked_seen,
            "tokens_seen": self._tokens_seen,
            "shared": self._shared.state_dict() if self._shared is not None else None,
            "common": self._common,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        for name, parameter in self._half.named_parameters():
            tensor = state["half"].get(name)
            if tensor is None or tensor.shape != parameter.shape:
                raise RunError(f"the saved state does not fit the model: {name!r} differs; give another --state folder")
            # Not copied: the state is in memory as a whole, and no other holds it.
            parameter.data = tensor.to(parameter.device)
        self._optimizer.load_state(state["optimizer"])
        self._masked_seen, self._tokens_seen = state["masked_seen"], state["tokens_seen"]
        if self._shared is not None:
            self._shared.load_state_dict(state["shared"])
        if self._proximal:
            self._common = dict(state["common"])

    def load_personal_parts(self, state: Mapping[str, Any]) -> None:
        """Take from an older `state_dict` what the reference does not hold: the parts that are
        not exchanged, and the optimizer's moments.
        """
        half = self._half.state_dict()
        half |= {name: tensor for name, tensor in state["half"].items() if name not in self._exchanged}
        self._half.load_state_dict(half)
        self._optimizer.load_state(state["optimizer"])

    def _joined(self, chunk: pb.UpdateChunk) -> Mapping[str, Tensor] | None:
        """The tensors of an update, after its last chunk."""
        if self._assembler is None:
            # A sum over clients, each of whom may send the largest value that a rank takes.
            codec = self._strategy.update_codec
            self._assembler = UpdateAssembler(self._exchanged, "the server's update", codec, LARGEST_SUM)
        update = self._assembler.add(chunk)
        if update is None:
            return None
        self._assembler = None
        return update

    def _chunks(self, window: int, tensors: Mapping[str, Tensor], codec: str) -> Iterator[pb.UpdateChunk]:
        return update_chunks(window, tensors.items(), codec, compressed=self._is_compressed)

    def _exchanged_weights(self, window: int) -> Iterable[pb.UpdateChunk]:
        weights = {name: p.detach() for name, p in self._half.named_parameters() if name in self._exchanged}
        if self._staleness:
            self._sent[window] = {name: tensor.clone() for name, tensor in weights.items()}
        if self._shared is not None:
            return self._shared.changes(window, weights)
        return self._chunks(window, weights, self._strategy.update_codec)

    def _take_gradients(self) -> dict[str, Tensor]:
        """Take the gradients out of the half.

        With staleness the next window's gradients accumulate before the sum of these is back.
        """
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self._half.named_parameters()
        }
        self._optimizer.zero_grad()
        return gradients

    @torch.no_grad()
    def _take_over(self, weights: Iterable[tuple[str, Tensor]], sent: Mapping[str, Tensor]) -> None:
        """Set weights that clients have in common; the steps since `sent` was sent stay."""
        parameters = dict(self._half.named_parameters())
        for name, tensor in weights:
            parameter = parameters[name]
            if name in sent:
                parameter.add_(tensor.to(parameter.device) - sent[name])
            else:
                parameter.copy_(tensor)
            if self._proximal and name in self._exchanged:
                self._common[name] = tensor
