"""The owner of the client model: the reference, and the rule that moves it after each combined
update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import Parameter

from fedbert_ds.config import OptimizerSection
from fedbert_ds.errors import RunError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.half_optimizer import HalfOptimizer
from fedbert_ds.federation.reference import Reference
from fedbert_ds.federation.server_optimizer import Rule, ServerOptimizer
from fedbert_ds.federation.strategy import Strategy
from fedbert_ds.wire.codecs import LARGEST_SUM

OWED = "owed"
"""Key of what an answer was rounded by, in a reference's optimizer state."""


class Aggregator:
    """Holds the reference client model on the CPU, equal on every rank; steps it in a thread of its
    own.

    `initial` are the weights of the whole client half; they are copied. `version` counts windows:
    the reference holds every combined update of the windows before it. Summed gradients step it by
    the run file's optimizer; a mean of weights or changes moves it to that mean, or, with a `rule`,
    by a server optimizer's step. Where the strategy keeps rounding, what a codec took from an
    answer is added to the next one (error feedback; Karimireddy et al. 2019), so that the reference
    follows the sum of the exact answers.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        strategy: Strategy,
        optimizer: OptimizerSection,
        num_windows: int,
        rule: Rule | None = None,
    ) -> None:
        self._weights = {
            name: Parameter(tensor.detach().to("cpu", torch.float32, copy=True)) for name, tensor in initial.items()
        }
        self._strategy = strategy
        self._optimizer = HalfOptimizer(self._weights, optimizer, num_windows, clips=not strategy.clips_together)
        self._server_optimizer = None if rule is None else ServerOptimizer(rule)
        self._owed: dict[str, Tensor] = {}
        """Where rounding is kept: what the last answer was rounded by."""
        self._version = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aggregator")
        self._last: Future[None] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the client model's tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self._weights.items()}

    def answer(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        """What clients get for the mean of their weights or changes, fp32 by name.

        Each call must follow the `apply` of the answer before.
        """
        if self._strategy.sends_changes:
            steps = mean if self._server_optimizer is None else self._server_optimizer.steps(mean)
            return self._with_owed(steps)
        if self._server_optimizer is None:
            return mean
        common = self._settled_weights()
        steps = self._server_optimizer.steps({name: tensor - common[name] for name, tensor in mean.items()})
        return {name: common[name] + step for name, step in steps.items()}

    def unchanged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What clients get for a window whose update nobody delivered, fp32 by name.

        It leaves the common weights where they are, and takes clients back to them where weights
        are exchanged. As `answer`, it must follow the `apply` before.
        """
        weights = self._settled_weights()
        if self._strategy.sends_changes:
            return self._with_owed({name: torch.zeros_like(weights[name]) for name in names})
        return {name: weights[name].clone() for name in names}

    def common(self) -> dict[str, Tensor]:
        """What clients' averaged updates are changes of: the weights before them, or nothing where
        updates are changes already. As `answer`, it must follow the `apply` before.
        """
        return {} if self._strategy.sends_changes else self._settled_weights()

    def apply(self, window: int, combined: Mapping[str, Tensor]) -> None:
        """Move the reference by what the updates of `window` were combined to, fp32 by name, in the
        thread.

        Nobody may change `combined` any more. A move that failed fails all later ones: this call
        raises its error, or a later call does.
        """
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = self._thread.submit(self._move, self._last, window, combined)

    def reference(self) -> Reference:
        """The reference after every update so far; its tensors move with later updates."""
        weights = self._settled_weights()
        state = self._mover.state()
        for name, tensor in self._owed.items():
            state.setdefault(name, {})[OWED] = tensor
        return Reference(self._version, weights, state)

    def load(self, reference: Reference) -> None:
        """Go on from a checkpoint's reference."""
        self._settled_weights()
        self._take_over(reference.weights)
        state = {name: dict(values) for name, values in reference.optimizer.items()}
        owed = {name: values.pop(OWED) for name, values in state.items() if OWED in values}
        self._owed = {name: torch.as_tensor(tensor) for name, tensor in owed.items()}
        self._mover.load_state({name: values for name, values in state.items() if values})
        self._version = reference.version

    def close(self) -> None:
        """Accept no more updates; the thread ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _mover(self) -> HalfOptimizer | ServerOptimizer:
        return self._optimizer if self._server_optimizer is None else self._server_optimizer

    def _with_owed(self, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._strategy.keeps_rounding:
            return steps
        self._settled_weights()
        return {name: step + self._owed[name] if name in self._owed else step for name, step in steps.items()}

    def _settled_weights(self) -> dict[str, Tensor]:
        """The reference's tensors after every move so far."""
        if self._last is not None:
            self._last.result()
        return {name: parameter.detach() for name, parameter in self._weights.items()}

    # -- in the thread -----------------------------------------------------------------------------

    def _move(self, before: Future[None] | None, window: int, combined: Mapping[str, Tensor]) -> None:
        if before is not None:
            before.result()
        received = self._as_received(window, combined)
        match self._strategy.exchange_after(window):
            case "gradients":
                self._optimizer.step_with(received, window)
            case "weights" if self._strategy.sends_changes:
                if self._strategy.keeps_rounding:
                    self._owed = {name: exact - received[name] for name, exact in combined.items()}
                self._take_over({name: self._weights[name].detach() + change for name, change in received.items()})
            case "weights":
                self._take_over(received)
            case "nothing":
                raise RunError(
                    f"an update of window {window}, after which none is exchanged; install one version on all sides"
                )
        self._version = window + 1

    def _as_received(self, window: int, combined: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The update as clients decode it: a codec rounds."""
        codec = self._strategy.update_codec
        if codec == "fp32":
            return combined
        shapes = {name: tuple(tensor.shape) for name, tensor in combined.items()}
        client = UpdateAssembler(shapes, "the update", codec, LARGEST_SUM)
        for chunk in update_chunks(window, combined.items(), codec):
            received = client.add(chunk)
        assert received is not None
        return received

    @torch.no_grad()
    def _take_over(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            self._weights[name].copy_(tensor)
