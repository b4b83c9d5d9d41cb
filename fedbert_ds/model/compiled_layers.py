"""Encoder layers under torch.compile, each as a whole and for any number of tokens."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedbert_ds.errors import ConfigError
from fedbert_ds.model.architecture import architecture, longest_sequence
from fedbert_ds.model.attention import Packing
from fedbert_ds.model.body import Body
from fedbert_kernels.recompute import recomputing

Compile = Literal["auto"] | bool
AS_IS, COMPILED = "as it is", "torch.compile"


def check_compile(choice: Compile, kernels: str, device: torch.device) -> None:
    """ConfigError if layers are to be compiled where nothing can compile them."""
    if choice is not True:
        return
    if device.type == "cuda":
        from fedbert_kernels.interpreter import HAVE_TRITON

        if kernels == "torch" or not HAVE_TRITON:
            raise ConfigError("body.compile: true needs the triton package and kernels: auto or triton; or set auto")
    elif not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError("body.compile: true needs a C++ compiler on a CPU; install g++, or set auto")


def install_compile(body: Body, choice: Compile, dtype: torch.dtype, longest: int | None = None) -> bool:
    """Let the body's layers run compiled if the run file says so, or, with `auto`, if it is
    measured faster on this GPU. Returns whether they do.

    Comes after `install_kernels`. `dtype` is that in which the body will run, `longest` the tokens
    of the longest sequence (None: as many as the position table has). The first forward and
    backward compile, which takes a minute.

    ConfigError if `true` is asked for and attention is not one operator, since a compiler would
    then compile some packings anew.
    """
    if choice is False or len(body.layers) < 2:
        return False
    if choice == "auto" and architecture(body.config).kind != "bert":
        return False  # BERT's layers are what is timed; ModernBERT's are of several kinds
    device = next(body.parameters()).device
    if body.attend is None and choice is True and device.type != "cuda":
        from fedbert_kernels.attention import HEAD_SIZES, attention

        if body.config.hidden_size // body.config.num_attention_heads in HEAD_SIZES:
            body.attend = attention
    if body.attend is None:
        if choice is True:
            raise ConfigError("body.compile: true needs heads of 16 to 128; set auto, or change the model")
        return False
    from fedbert_kernels.attention_choice import is_one_operator

    if not is_one_operator(body.attend):
        if choice is True:
            raise ConfigError(
                f"body.compile: true needs attention as one operator, and {body.attend.__name__} is not, which is the "
                "fastest on this card; set kernels: triton, or body.compile: auto"
            )
        return False
    if choice == "auto":
        from fedbert_kernels.choice import kept

        case = LayerCase(
            body.layers[0], body.attend, dtype, longest or longest_sequence(body.config), body.recomputes_elementwise
        )
        if kept([case], device)[case.name] == AS_IS:
            return False
    compile_layers(body)
    return True


def compile_layers(body: Body, backend: str = "inductor") -> None:
    """Compile every layer but the last at its first call; all share one compiled code.

    The last goes on with masked positions alone after its attention, by a hook, which code that is
    shared with other layers would leave out.
    """
    for layer in body.layers[:-1]:
        layer.compile(dynamic=True, backend=backend)


def num_compiled() -> int:
    """Graphs that torch.compile has made in this process so far."""
    # Reading the count must not import the compiler.
    utils: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


@dataclass(frozen=True)
class LayerCase:
    """A layer as it is beside the same one compiled; a `fedbert_kernels.choice.Case`."""

    layer: Any
    """A transformers encoder layer, with its kernels installed."""
    attend: Callable[..., Tensor]
    dtype: torch.dtype
    longest: int
    is_recomputed: bool = False
    """Whether the layer as it is computes LayerNorm and GELU again; a compiler chooses itself."""

    @property
    def name(self) -> str:
        """What decides its time: widths, products, kernels, dtype, dropout, class of lengths."""
        from fedbert_kernels.attention_choice import length_class

        config, products = self.layer.attention.self.config, type(self.layer.output.dense).__name__
        dropout = " dropout" if config.hidden_dropout_prob or config.attention_probs_dropout_prob else ""
        widths = f"{config.hidden_size}-{config.intermediate_size} x {config.num_attention_heads}"
        kernels = f"{products} {self.attend.__name__}{' fused' if 'forward' in vars(self.layer.output) else ''}"
        kernels += " again" if self.is_recomputed else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"layer {kind} {widths} {kernels}{dropout} {length_class(self.longest)}"

    @property
    def default(self) -> str:
        """A tie stays as it is."""
        return AS_IS

    @property
    def off_gpu(self) -> str:
        """As it is."""
        return AS_IS

    @property
    def digest(self) -> str:
        """Of this file and of the kernels in a layer."""
        from fedbert_kernels import attention_choice, gelu, layer_norm, patch_modules
        from fedbert_kernels.attention_launches import kernels_digest
        from fedbert_kernels.launch import digest

        files = (attention_choice, gelu, layer_norm, patch_modules)
        return f"{kernels_digest()}-{digest(__file__, *(str(file.__file__) for file in files))}"

    def releases(self) -> dict[str, str]:
        """Both ways, of no package but torch, Triton and transformers."""
        import transformers

        return dict.fromkeys((AS_IS, COMPILED), transformers.__version__)

    def missing(self) -> dict[str, str]:
        """None."""
        return {}

    def step(self, way: str, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """A call of forward and backward over typical lengths; it returns all gradients.

        ValueError if a compiled layer's are not those of the layer as it is.
        """
        from fedbert_kernels.attention_choice import TOLERANCES, typical_lengths

        layer = copy.deepcopy(self.layer).to(device, self.dtype)
        layer.gradient_checkpointing = False
        lengths = typical_lengths(self.longest)
        width = layer.attention.self.config.hidden_size
        hidden = torch.randn(1, sum(lengths), width, device=device, dtype=self.dtype, requires_grad=True)
        dy = torch.randn_like(hidden)
        packing = Packing.from_lengths(lengths, device, attend=self.attend)
        inputs = [hidden, *layer.parameters()]

        def run() -> tuple[Tensor, ...]:
            with recomputing() if self.is_recomputed else nullcontext():
                result = layer(hidden, packing=packing)
            return torch.autograd.grad(result, inputs, dy)

        if way == COMPILED:
            layer.eval()  # without dropout, whose random numbers are others
            expected = run()
            layer.compile(dynamic=True)
            for found, exact in zip(run(), expected, strict=True):
                if not bool((found - exact).abs().max() <= TOLERANCES[self.dtype] * exact.abs().max()):
                    raise ValueError("its gradient is wrong")
        layer.train()
        return run
