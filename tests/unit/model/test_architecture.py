"""The supported masked LMs: their parts, the widths at the cut, the positions they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM
from unit.model.samples import FROM_SCRATCH

from fedbert_ds.config import LayersCut
from fedbert_ds.errors import ModelError
from fedbert_ds.model.architecture import (
    ARCHITECTURES,
    REFUSED,
    architecture,
    feed_forward_width,
    layers_of,
    linear_parameters,
    longest_sequence,
    position_offset,
    widths,
    words_of,
)

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32,
    "max_position_embeddings": 24, "pad_token_id": 1,
}  # fmt: skip


def config_of(model_type: str) -> Any:
    more = {"electra": {"embedding_size": 8}, "distilbert": {"hidden_dim": 32}}.get(model_type, {})
    return AutoConfig.for_model(model_type, **SMALL, **more)


@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_every_part_is_where_it_is_said_to_be(model_type: str) -> None:
    config = config_of(model_type)
    parts = architecture(config)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    base = model.get_submodule(parts.base)
    assert base is model.base_model and base.embeddings is not None
    assert words_of(base, config) is model.get_input_embeddings() and len(layers_of(base, config)) == 1
    assert model.get_submodule(parts.decoder).out_features == SMALL["vocab_size"]
    assert model.get_output_embeddings() is model.get_submodule(parts.decoder)
    assert parts.decoder.startswith(parts.heads[-1])
    assert all(hasattr(config, field) for field in (*parts.dropouts, parts.attention_dropout))
    assert feed_forward_width(config) == 32
    # Whatever the model has is the base's or the head's; what the base has, embeddings or encoder.
    named = {parts.base, *parts.heads, *([parts.body_head] if parts.body_head else [])}
    # DistilBERT's loss, which has no weights and is not called, may be in either half.
    assert {name for name, _ in model.named_children()} - {"mlm_loss_fct"} == named
    assert {name for name, _ in base.named_children()} <= {"embeddings", *parts.encoder}
    assert (parts.body_head is not None) == (model_type == "electra")
    if parts.body_head:
        assert model.get_submodule(parts.body_head) is not None


@pytest.mark.parametrize(
    ("model_type", "cut", "expected"),
    [
        ("bert", "embeddings", (16, 16)),
        ("bert", LayersCut(layers=1), (16, 16)),
        ("electra", "embeddings", (8, 8)),
        ("electra", "rows", (8, 8)),
        ("electra", LayersCut(layers=1), (16, 8)),
    ],
)
def test_a_factorized_model_sends_its_narrow_embeddings(model_type: str, cut: Any, expected: tuple[int, int]) -> None:
    assert tuple(widths(config_of(model_type), cut)) == expected


def test_roberta_leaves_the_first_positions_unused() -> None:
    offsets = {name: position_offset(config_of(name)) for name in FROM_SCRATCH}
    assert offsets == dict.fromkeys(FROM_SCRATCH, 0) | {"roberta": 2}
    assert {name: longest_sequence(config_of(name)) for name in FROM_SCRATCH} == {
        name: 24 - offset for name, offset in offsets.items()
    }


def test_another_architecture_is_one_line() -> None:
    with pytest.raises(
        ModelError, match="architecture gpt2 is not supported; use one of bert, roberta, camembert, xlm-roberta"
    ):
        architecture(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize("model_type", REFUSED)
def test_encoders_that_cannot_be_computed_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ModelError, match=f"architecture {model_type} is not supported \\(its .*; use one of ") as told:
        architecture(AutoConfig.for_model(model_type))
    assert REFUSED[model_type] in str(told.value) and "\n" not in str(told.value)


def test_the_page_lists_the_encoders_that_are_taken_and_refused() -> None:
    page = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = page.partition("## Encoders")[2].partition("\n## ")[0]
    encoders, refused = section.partition("These are refused")[::2]
    listed = [line.split("|")[1].replace("`", "").strip() for line in encoders.splitlines() if line.startswith("| `")]
    assert sorted(name for name in listed if name != "model_type") == sorted(ARCHITECTURES)
    reasons = [line.split("|")[1:3] for line in refused.splitlines() if line.startswith("| `")][1:]
    told = {name.strip(" `"): reason.strip() for names, reason in reasons for name in names.split(",")}
    assert told == REFUSED


def test_tables_are_not_counted_as_products() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(100, 4), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    assert linear_parameters(module) == 12 + 6
