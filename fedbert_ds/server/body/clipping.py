"""Clipping by the norm of the whole gradient, body and client model together, inside DeepSpeed's
step.
"""

from __future__ import annotations

import math
from typing import Any

import torch

EPSILON = 1e-6
"""Added to the norm, as torch.nn.utils.clip_grad_norm_ and DeepSpeed do."""


class WholeNormClipping:
    """Lets a DeepSpeed engine clip by `sqrt(body norm^2 + client norm^2)` in place of the body's
    norm.

    Every optimizer of DeepSpeed that holds gradients itself (ZeRO 1 to 3, and bf16 at stage 0)
    clips in `unscale_and_clip_grads`, whose last positional argument is the norm; plain fp32 at
    stage 0 clips in the engine's `clip_fp32_gradients`. Both get the larger norm here.
    """

    def __init__(self, engine: Any, max_norm: float) -> None:
        self._engine = engine
        self._max_norm = max_norm
        self._body_norm = 0.0
        self._client_norm = 0.0
        own = getattr(engine.optimizer, "unscale_and_clip_grads", None)
        if own is None:
            engine.clip_fp32_gradients = self._clip_fp32
            return

        def clip(*arguments: Any, **keywords: Any) -> Any:
            *others, body_norm = arguments
            return own(*others, self._whole(body_norm), **keywords)

        engine.optimizer.unscale_and_clip_grads = clip

    def begin(self, client_norm: float) -> None:
        """Before a step: the norm of the client model's gradient."""
        # Where the body's norm is not finite, DeepSpeed leaves the body as it is and clips nothing.
        self._body_norm, self._client_norm = 0.0, client_norm

    @property
    def scale(self) -> float:
        """The factor by which the last step shrank the gradient; 1 if its norm was small enough."""
        norm = math.hypot(self._body_norm, self._client_norm)
        return min(1.0, self._max_norm / (norm + EPSILON))

    def _whole(self, body_norm: Any) -> Any:
        self._body_norm = float(body_norm)
        norm = math.hypot(self._body_norm, self._client_norm)
        return torch.full_like(body_norm, norm) if torch.is_tensor(body_norm) else norm

    def _clip_fp32(self) -> None:
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        body_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, self._whole(body_norm))
