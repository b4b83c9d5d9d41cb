"""The body under DeepSpeed: forwards and backwards in any order, one step a window."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from fedbert_ds.config import BodySection, Kernels, OptimizerSection
from fedbert_ds.errors import ConfigError
from fedbert_ds.model.body import Body
from fedbert_ds.model.compiled_layers import install_compile, num_compiled
from fedbert_ds.model.fp8 import install_fp8
from fedbert_ds.model.kernels import install_kernels
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.server.body.clipping import WholeNormClipping
from fedbert_ds.server.body.conversion import check_groups, read_shares, take_over
from fedbert_ds.server.body.device_work import Device, DeviceWork
from fedbert_ds.server.body.distributed import be_patient
from fedbert_ds.server.body.footprint import memory_budget, saved_bytes
from fedbert_ds.server.body.layout import Shapes, partitions_of
from fedbert_ds.server.body.pace import Load
from fedbert_ds.server.body.packed_input import BodyInput, unused_input
from fedbert_ds.server.body.passes import Passes
from fedbert_ds.server.body.settings import deepspeed_settings, zero_stage
from fedbert_ds.server.body.whole_step import step_by_fp32_gradients
from fedbert_ds.server.queue.in_flight import MOST_IN_FLIGHT
from fedbert_kernels.encoded import Encoded


class BodyEngine:
    """Forward, backward and step of the body on this rank. Holds the micro-batches in flight: a
    forward keeps its graph until its gradient is back.
    """

    lost_gradient = False
    """At the last step this rank's gradient was not finite and was left out: one client's numbers
    would else be everybody's. Where a norm is beyond fp32, it is that of all ranks."""

    def __init__(
        self,
        engine: Any,
        stage: int,
        world_size: int,
        device: torch.device,
        max_norm: float = 0.0,
        shapes: Shapes | None = None,
    ) -> None:
        self._engine = engine
        self._stage = stage
        self._shapes = shapes or {}
        self.num_parameters = sum(map(prod, self._shapes.values()))
        """Entries of the body's parameters, over all ranks."""
        self._world_size = world_size
        self._device = Device(device)
        self._masters = _masters(engine, stage)
        self._inputs: dict[int, BodyInput] = {}
        """Of micro-batches in flight."""
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        """Activations and hidden states."""
        self._blanked: dict[int, Tensor] = {}
        """At stage 3, of micro-batches in flight: whether each row of activations counts."""
        self._repeats: deque[tuple[BodyInput, Tensor]] = deque()
        """At stage 3, inputs and hidden gradients that `step` computes with again."""
        self._tokens: dict[int, int] = {}
        self._bytes_in_flight = 0
        self._num_compiled = num_compiled()
        self._clipping = WholeNormClipping(engine, max_norm) if max_norm else None
        self._passes = Passes(engine, stage, self._masters, self._device)
        self._memory_budget = memory_budget(device)

    @classmethod
    def build(
        cls,
        body: Body,
        section: BodySection,
        optimizer_section: OptimizerSection,
        kernels: Kernels,
        device: torch.device,
        longest: int | None = None,
    ) -> BodyEngine:
        """Wrap a body in DeepSpeed. torch.distributed must be initialized.

        Every rank passes the same weights. No sequence will have more than `longest` tokens (None:
        than the position table holds). Raises ConfigError as `deepspeed_settings`.
        """
        stage = zero_stage(section)
        optimizer = build_optimizer(
            [(name, p) for name, p in body.named_parameters() if p.requires_grad],
            optimizer_section,
            partitioned=stage > 0,
            # At stage 0 in bf16 DeepSpeed would flatten what apex steps.
            plain=stage == 0 and section.precision == "bf16",
        )
        names = {parameter: name for name, parameter in body.named_parameters()}
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shapes = {names[parameter]: tuple(parameter.shape) for parameter in ordered}
        dtype = torch.bfloat16 if section.precision == "bf16" else torch.float32
        if section.fp8:
            install_fp8(body, device)
        body.recompute(section.recomputed(device.type))
        install_kernels(body, kernels, device, dtype=dtype, longest=longest)
        is_compiled = False
        if stage < 3 and section.may_compile(body.recomputed):
            is_compiled = install_compile(body, section.compile, dtype, longest)
        body.train()
        settings = deepspeed_settings(section, optimizer_section)
        engine, *_ = deepspeed.initialize(model=body, optimizer=optimizer, config=settings)
        be_patient()
        world_size = torch.distributed.get_world_size()
        if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
            step_by_fp32_gradients(engine.optimizer)
        if stage > 0 and hasattr(optimizer, "partitions"):
            optimizer.partitions = partitions_of(engine.optimizer, stage, shapes, device)
        built = cls(engine, stage, world_size, device, optimizer_section.gradient_clipping, shapes)
        if is_compiled:
            built.warm_up(body.widths.activations, body.cut == "rows")
        return built

    @property
    def zero_stage(self) -> int:
        """0 to 3."""
        return self._stage

    @property
    def lockstep_forwards(self) -> bool:
        """Whether forwards and backwards hold collectives: all ranks must run the same in order."""
        return self._stage == 3

    def forward(self, micro_batch: int, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        """Hidden states [masked, width], in a codec; the micro-batch is in flight until its
        backward.
        """
        load = Load("forward", body_input.tokens)
        self._tokens[micro_batch] = body_input.tokens
        return self._device.start(partial(self._forward, micro_batch, body_input.to(self._device)), load, codec)

    def evaluate(self, body_input: BodyInput, codec: str = "fp32") -> DeviceWork:
        """Hidden states as `forward`'s, without dropout; nothing is in flight after it."""
        there, body = body_input.to(self._device), self._engine.module

        @torch.no_grad()
        def compute() -> Tensor:
            body.eval()
            try:
                return self._passes.forward(there, there.values(body.input_dtype)).detach()
            finally:
                body.train()

        return self._device.start(compute, Load("evaluation", body_input.tokens), codec)

    def backward(self, micro_batch: int, hidden_gradient: Sequence[Encoded], codec: str = "fp32") -> DeviceWork:
        """d(loss)/d(activations) in a codec, in the shape of the forward's activations.

        `hidden_gradient` [masked, width], in parts, is d(loss)/d(hidden) for the whole window's
        loss. Parameter gradients accumulate until `step`.
        """
        gradient = Encoded.join(hidden_gradient, self._device.upload)
        load = Load("backward", self._tokens.pop(micro_batch))
        return self._device.start(partial(self._backward, micro_batch, gradient), load, codec)

    def _forward(self, micro_batch: int, body_input: BodyInput) -> Tensor:
        activations = body_input.values(self._engine.module.input_dtype)
        self._inputs[micro_batch] = body_input
        activations.requires_grad_(True)
        if self._bytes_in_flight or not len(body_input.masked_positions):
            hidden = self._passes.forward(body_input, activations)
        else:
            with saved_bytes(self._engine.module.parameters()) as saved:
                hidden = self._passes.forward(body_input, activations)
            self._bytes_in_flight = saved.num_bytes
        self._graphs[micro_batch] = activations, hidden
        return hidden.detach()

    def _backward(self, micro_batch: int, encoded_gradient: Encoded) -> Tensor:
        hidden_gradient = encoded_gradient.decode()
        body_input = self._inputs.pop(micro_batch)
        activations, hidden = self._graphs.pop(micro_batch)
        counts = self._blanked.pop(micro_batch, None)
        if counts is None:
            return self._passes.backward(hidden, hidden_gradient, activations)
        self._repeats.append((body_input, hidden_gradient))
        gradient = self._passes.backward(hidden, hidden_gradient, activations, adds_up=False)
        return _where(counts, gradient)

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        """Step the optimizer once, with this learning rate; all ranks together.

        `client_norm` is the norm of the client model's gradient, where that is clipped with the
        body's. Returns the factor by which clipping shrank the gradient, 1 without.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._repeat_blanked()
        self.lost_gradient = not self._passes.gradient.is_finite
        if self.lost_gradient:
            self._passes.gradient.drop()
        self._passes.gradient.give()
        self._engine.set_gradient_accumulation_boundary(True)
        if self._clipping is not None:
            self._clipping.begin(client_norm)
        self._engine.step()
        self.lost_gradient |= self._stage > 0 and self._engine.optimizer.overflow
        self._passes.gradient.drop()
        self._passes.renew()
        return 1.0 if self._clipping is None else self._clipping.scale

    def blank(self, micro_batch: int, rows: Sequence[slice]) -> None:
        """Put zeros in place of these rows of activations, as if they had been sent, before the
        backward of a micro-batch in flight.
        """
        body_input = self._inputs[micro_batch]
        (activations,) = body_input.activations
        counts = torch.ones(len(activations), device=activations.payload.device, dtype=torch.bool)
        for span in rows:
            counts[span] = False
        blanked = replace(body_input, activations=[activations.map(partial(_where, counts))])
        if self.lockstep_forwards:
            # A forward now would wait for the other ranks. What is sent back of other rows is right
            # as it is: rows meet in the gradients of weights alone.
            self._inputs[micro_batch], self._blanked[micro_batch] = blanked, counts
        else:
            del self._graphs[micro_batch]
            self._forward(micro_batch, blanked)

    def _repeat_blanked(self) -> None:
        """At stage 3 add up the gradients of weights that `blank` has kept out of the sum; all
        ranks together.
        """
        if not self.lockstep_forwards:
            return
        times = torch.tensor(len(self._repeats), device=self._device.device)
        torch.distributed.all_reduce(times, torch.distributed.ReduceOp.MAX)
        for _ in range(int(times)):
            if self._repeats:
                self._passes.both(*self._repeats.popleft())
            else:
                width, with_rows = self._engine.module.widths.activations, self._engine.module.cut == "rows"
                self._passes.both(self.dummy_input(width, with_rows, 0).to(self._device))

    def drop_gradients(self) -> None:
        """Forget what the backwards since the last `step` have accumulated."""
        self._repeats.clear()
        self._passes.gradient.drop()

    def dummy_input(self, width: int, with_rows: bool, seed: int) -> BodyInput:
        """A sequence of unused tokens, so that a rank without work still runs the collectives."""
        # A compiled layer takes any number of tokens but one, which would be compiled apart.
        return unused_input((2,), 0, width, with_rows, seed)

    def warm_up(self, width: int, with_rows: bool) -> None:
        """Compile what is compiled at the first forward and backward, at ZeRO stages 0 to 2.

        Activations have `width` columns; `with_rows` is for cut: rows. Leaves no gradient.
        """
        # Sizes that differ from each other: a compiler takes equal ones for the same. With tokens
        # that 16 divides, fp8 products need no padding, so these are compiled apart.
        for lengths in ((6, 5), (9, 4, 3)):
            self._passes.both(unused_input(lengths, 5, width, with_rows, seed=0).to(self._device))
        self._passes.gradient.drop()
        self._num_compiled = num_compiled()

    def take_recompiles(self) -> int:
        """Graphs that torch.compile has made in this process since the last call or the warm-up."""
        before, self._num_compiled = self._num_compiled, num_compiled()
        return self._num_compiled - before

    def full_state(self) -> dict[str, Tensor]:
        """Whole fp32 weights by Hugging Face name, on the CPU. All ranks call it: it gathers
        partitions."""
        state = {}
        for name, parameter in self._engine.module.named_parameters():
            whole = self._masters[parameter] if self._stage == 0 else safe_get_full_fp32_param(parameter)
            state[name] = whole.detach().to(device="cpu", dtype=torch.float32).clone()
        return state

    def save(self, folder: Path, window: int) -> None:
        """Write a DeepSpeed checkpoint of the state before `window`. All ranks call it."""
        with self._passes.weights_lent():
            self._engine.save_checkpoint(str(folder), tag=f"window-{window}", save_latest=False)

    def load(self, folder: Path, window: int, ranks: int, stage: int) -> None:
        """Read a checkpoint that `save` wrote with so many ranks at this ZeRO stage; this engine
        may have others. All ranks call it.

        Raises ConfigError if there is none, RunError if another layout's cannot be read, or another
        version saved it.
        """
        check_groups(folder / f"window-{window}", stage, len(self._engine.optimizer.param_groups))
        with self._passes.weights_lent():
            if (ranks, stage) != (self._world_size, self._stage):
                saved = read_shares(folder / f"window-{window}", self._shapes, ranks, stage)
                take_over(self._engine, self._stage, self._shapes, saved)
            elif self._engine.load_checkpoint(str(folder), tag=f"window-{window}")[0] is None:
                raise ConfigError(f"{folder}: no checkpoint of window {window}; restore the run's folder")
        self._passes.renew()

    def affordable_in_flight(self) -> int:
        """Micro-batches in flight that memory holds, by the size of the first.

        `MOST_IN_FLIGHT` before the first.
        """
        return max(1, self._memory_budget // self._bytes_in_flight) if self._bytes_in_flight else MOST_IN_FLIGHT


def _where(counts: Tensor, values: Tensor) -> Tensor:
    """Rows that count, and zeros for others."""
    # A product would keep what is not finite.
    return torch.where(counts[:, None], values.float(), 0.0).to(values.dtype)


def _masters(engine: Any, stage: int) -> dict[Tensor, Tensor]:
    """At stage 0, each parameter's fp32 weights: itself, or under bf16 DeepSpeed's copy."""
    masters: dict[Tensor, Tensor] = {parameter: parameter for parameter in engine.module.parameters()}
    if stage == 0 and hasattr(engine.optimizer, "fp32_groups"):
        optimizer = engine.optimizer
        for low_group, full_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters.update(zip(low_group, full_group, strict=True))
    return masters
