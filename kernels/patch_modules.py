"""Puts fused kernels into a Hugging Face encoder, module by module, without a copy of its layers.

It replaces the `forward` of BERT's `SelfAttention` (one product for q, k and v), `SelfOutput` and
`Output` (residual, dropout, LayerNorm) and `Intermediate` (bias, GELU). Modules of other models
that run the same code are patched too: RoBERTa, ELECTRA, MPNet and many more. Weights stay where
they are, and state dicts keep their names.

Submodules are no longer called, only read. Hooks on the `dense` or `LayerNorm` of a patched module
do not run, so its weights must be whole: ZeRO stages 0 to 2, not 3. Attention itself is not
patched; it has transformers' own interface.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedbert_kernels.choice import OURS, kept
from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.interpreter import HAVE_TRITON, INTERPRETED
from fedbert_kernels.layer_norm import LARGEST_WIDTH, residual_layer_norm
from fedbert_kernels.recompute import cheap, cheap_in_codes, consume
from fedbert_kernels.row_choice import GELU, LAYER_NORM, RowCase, operator
from fedbert_kernels.row_philox import row_drop_threshold

Kernels = Literal["auto", "triton", "torch"]
PROJECTION = "projection"


def patch_modules(
    model: nn.Module, kernels: Kernels = "auto", dtype: torch.dtype | None = None, recompute: bool = False
) -> int:
    """Let the modules of `model` run the fused kernels where one fits; returns their number.

    `torch` leaves the model as it is. `triton` needs a model on a GPU and Triton, or Triton's
    interpreter: ValueError otherwise. `auto` leaves it where Triton cannot run. A second call
    changes nothing. A model without such modules gives 0: ModernBERT has its norms first and a
    gated GELU. A model on the meta device, where nothing runs, can have `triton` anywhere.

    With `auto`, torch.compile's LayerNorm or GELU runs in place of ours where it is as fast on this
    card (`row_choice`). The first call on a card measures both, for this model's widths and dropout
    and for `dtype`, in which it will run (None: the parameters' dtype). With `recompute` ours run:
    backward can compute their results again (`recompute.recomputing`).
    """
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels is {kernels!r}; choose auto, triton or torch")
    if kernels == "torch" or (kernels == "auto" and not _can_run_triton(model)):
        return 0
    if not _can_run_triton(model):
        raise ValueError(
            "kernels: triton needs a model on a GPU and the triton package (pip install triton); "
            "kernels: auto takes torch where it cannot run"
        )
    kinds = {module: kind for module in model.modules() if (kind := _kind(module)) is not None}
    cases = {module: _row_case(kind, module, dtype) for module, kind in kinds.items() if kind != PROJECTION}
    ways = dict.fromkeys((case.name for case in cases.values()), OURS)
    if kernels == "auto" and cases and not recompute:
        ways = kept(cases.values(), next(model.parameters()).device)
    # One function for all layers, so that torch.compile knows them as the same.
    forwards = {case: partial(_AROUND[case.kernel], _compute(case, ways, recompute)) for case in cases.values()}
    for module in kinds:
        forward: Callable[..., Any] = forwards[cases[module]] if module in cases else _one_projection
        module.forward = MethodType(forward, module)
    return len(kinds)


def _compute(case: RowCase, ways: Mapping[str, str], recompute: bool) -> Callable[..., Tensor]:
    return _CHEAP[case.kernel] if recompute else operator(case.kernel, ways[case.name])


def _can_run_triton(model: nn.Module) -> bool:
    devices = {parameter.device.type for parameter in model.parameters()}
    return bool(INTERPRETED) or (HAVE_TRITON and devices == {"cuda"}) or devices == {"meta"}


def _kind(module: nn.Module) -> str | None:
    """The kind of a module that can be patched: PROJECTION, LAYER_NORM or GELU."""
    from transformers.models.bert.modeling_bert import (
        BertIntermediate,
        BertOutput,
        BertSelfAttention,
        BertSelfOutput,
    )

    if _runs_code_of(module, BertSelfAttention):
        projections = [getattr(module, name, None) for name in ("query", "key", "value")]
        fits = all(type(part) is nn.Linear and part.bias is not None for part in projections)
        # A decoder keeps keys and values of earlier calls.
        return PROJECTION if fits and not module.is_decoder else None
    dense = getattr(module, "dense", None)
    if type(dense) is not nn.Linear or dense.bias is None:
        return None
    if _runs_code_of(module, BertSelfOutput) or _runs_code_of(module, BertOutput):
        norm, dropout = getattr(module, "LayerNorm", None), getattr(module, "dropout", None)
        fits = type(norm) is nn.LayerNorm and norm.weight is not None and norm.weight.shape[0] <= LARGEST_WIDTH
        return LAYER_NORM if fits and type(dropout) is nn.Dropout else None
    if _runs_code_of(module, BertIntermediate) and _is_gelu(getattr(module, "intermediate_act_fn", None)):
        return GELU
    return None


def _row_case(kind: str, module: Any, dtype: torch.dtype | None) -> RowCase:
    dtype = module.dense.weight.dtype if dtype is None else dtype
    return RowCase(kind, dtype, module.dense.out_features, module.dropout.p if kind == LAYER_NORM else 0.0)


def _runs_code_of(module: nn.Module, model: type[nn.Module]) -> bool:
    """Whether two classes' forward have the same instructions over the same names."""
    return _instructions(type(module)) == _instructions(model)


def _instructions(module: type[nn.Module]) -> tuple[Any, ...] | None:
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return code and (code.co_code, code.co_names, code.co_varnames, code.co_consts)


def _is_gelu(activation: object) -> bool:
    """Whether an activation is GELU in its erf form."""
    from transformers.activations import GELUActivation

    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return type(activation) is GELUActivation or activation is functional.gelu


def _one_projection(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.bert.modeling_bert import eager_attention_forward

    # The joined weight is a copy of 3 x width x width entries, little beside the 4 x tokens x width
    # that the product reads and writes. It saves two readings of the input and the sum of its three
    # gradients.
    parts = (self.query, self.key, self.value)
    weight = cheap(_joined, *(part.weight for part in parts))
    bias = torch.cat([part.bias for part in parts])
    qkv = consume(functional.linear, hidden_states, weight, bias).unflatten(-1, (3, -1, self.attention_head_size))
    query, key, value = (tensor.transpose(1, 2) for tensor in qkv.unbind(-3))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    dropout = self.dropout.p if self.training else 0.0
    attended, weights = attend(
        self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, qkv=qkv, **keywords
    )
    return attended.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


def _joined(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _dense_dropout_residual_norm(
    residual_layer_norm: Callable[..., Tensor], self: Any, hidden_states: Tensor, input_tensor: Tensor
) -> Tensor:
    x = consume(functional.linear, hidden_states, self.dense.weight)
    # The dtypes differ under autocast, where the residual stream is fp32.
    dtype = torch.promote_types(x.dtype, input_tensor.dtype)
    dropout = self.dropout.p if self.dropout.training else 0.0
    norm = self.LayerNorm
    return residual_layer_norm(
        x.to(dtype), input_tensor.to(dtype), self.dense.bias, norm.weight, norm.bias, dropout, norm.eps
    )


def _dense_gelu(bias_gelu: Callable[..., Tensor], self: Any, hidden_states: Tensor) -> Tensor:
    return bias_gelu(consume(functional.linear, hidden_states, self.dense.weight), self.dense.bias)


def _cheap_layer_norm(
    x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, shift: Tensor | None, dropout: float, epsilon: float
) -> Tensor:
    # As the operator would draw it, but once: what is computed again takes the same.
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device) if row_drop_threshold(dropout) else None
    return cheap(partial(consume, residual_layer_norm), x, residual, bias, weight, shift, dropout, epsilon, seed)


def _cheap_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return cheap_in_codes(x, bias_gelu, x, bias)


_CHEAP: dict[str, Callable[..., Tensor]] = {LAYER_NORM: _cheap_layer_norm, GELU: _cheap_gelu}
"""Our operators, whose results backward can compute again."""
_AROUND: dict[str, Callable[..., Any]] = {LAYER_NORM: _dense_dropout_residual_norm, GELU: _dense_gelu}
"""A module's new forward, given the operator for its LayerNorm or GELU."""
