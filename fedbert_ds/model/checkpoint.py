"""Hugging Face models in and out: new or from a checkpoint, as JSON, and as a merged folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)
from transformers.utils import logging as transformers_logging

from fedbert_ds.config import ModelSection
from fedbert_ds.errors import ModelError, RunError, writes
from fedbert_ds.model.architecture import ARCHITECTURES, architecture, feed_forward_width, longest_sequence
from fedbert_ds.model.cut import merge
from fedbert_ds.model.heads import auto_class_of
from fedbert_ds.tasks.registry import task_of
from fedbert_ds.tasks.task import Task
from fedbert_ds.tokenizer_folder import save_tokenizer

logger = logging.getLogger(__name__)

_SHAPE_FIELDS = (
    *("type_vocab_size", "hidden_act", "activation", "layer_norm_eps"),
    # ModernBERT's
    *("hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias"),
    *("classifier_activation", "local_attention", "layer_types", "rope_parameters"),
)
"""Fields that not every architecture has and that decide what is computed."""


def build_model(
    section: ModelSection, vocab_size: int, pad_token_id: int | None, seed: int, task: Task | None = None
) -> PreTrainedModel:
    """A masked LM, or an encoder with a task's head, in fp32, new or from `section.checkpoint`;
    `seed` alone decides new weights.

    A checkpoint brings its own shape, vocabulary size and padding id; one with another head gets a
    new one, and one with fewer words than `vocab_size` new rows if `section.resize` says so.
    ModelError, one line, if the checkpoint is not found, has another architecture, lacks weights of
    the encoder, or has fewer words without `section.resize`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if section.checkpoint is not None:
            return _from_checkpoint(section.checkpoint, section, vocab_size, task)
        hf_config = config_of(section, vocab_size, pad_token_id)
        _set_head(hf_config, task)
        model: PreTrainedModel = auto_class_of(task).from_config(hf_config, dtype=torch.float32)
        model.config.architectures = [type(model).__name__]
        return model


def shape_hash(hf_config: Any) -> str:
    """16 hexadecimal digits, equal exactly if two sides mean the same network."""
    shape = {
        "architecture": hf_config.model_type,
        "hidden_size": hf_config.hidden_size,
        "embedding_size": getattr(hf_config, "embedding_size", hf_config.hidden_size),
        "intermediate_size": feed_forward_width(hf_config),
        "num_hidden_layers": hf_config.num_hidden_layers,
        "num_attention_heads": hf_config.num_attention_heads,
        "vocab_size": hf_config.vocab_size,
        "longest_sequence": longest_sequence(hf_config),
        "pad_token_id": hf_config.pad_token_id,
        "tied": hf_config.tie_word_embeddings,
        **_head_shape(hf_config),
        **{field: getattr(hf_config, field) for field in _SHAPE_FIELDS if hasattr(hf_config, field)},
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def _head_shape(hf_config: Any) -> dict[str, Any]:
    task = task_of(hf_config)
    return {} if task is None else {"task": task.name, "labels": task.labels}


def config_to_json(hf_config: Any) -> str:
    """A transformers config as JSON, without the path it was read from; see `config_from_json`."""
    fields = hf_config.to_dict()
    fields.pop("_name_or_path", None)
    return json.dumps(fields, sort_keys=True)


def config_from_json(text: str) -> Any:
    """The config that `config_to_json` wrote; ModelError if it is none or not supported."""
    try:
        fields = json.loads(text)
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            "the model's description is not the JSON of a transformers config; install the same fedbert-ds on both"
        ) from error
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"architecture {model_type} is unknown to this version of transformers; install the server's version"
        )
    try:
        hf_config = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # transformers raises its own kinds for a field of the wrong type
        raise ModelError(
            f"the model's description cannot be read ({' '.join(str(error).split())}); install the same versions on "
            "both sides"
        ) from error
    check_architecture(hf_config)
    return hf_config


def save_merged(
    folder: Path, hf_config: Any, client_state: Mapping[str, Tensor], body_state: Mapping[str, Tensor], tokenizer: Any
) -> None:
    """Write the merged model and its tokenizer as an ordinary Hugging Face folder.

    It is written beside `folder` and renamed: a reader finds the old folder or the new one, whole,
    or none between two renames. ModelError if the halves do not fit (see `merge`), RunError for a
    file in its place and where the disk takes no more.
    """
    model = merge(hf_config, client_state, body_state)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file and no folder; name another, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("writing", "old"))
    shutil.rmtree(writing, ignore_errors=True)
    with quiet_transformers(), writes(folder):
        model.save_pretrained(writing)
        save_tokenizer(tokenizer, writing)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    writing.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def config_of(section: ModelSection, vocab_size: int, pad_token_id: int | None) -> Any:
    """The config of a new model; ModelError for an impossible shape."""
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "initializer_range": section.initializer_range,
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.num_hidden_layers,
        "num_attention_heads": section.num_attention_heads,
        "intermediate_size": section.intermediate_size or 4 * section.hidden_size,
        "max_position_embeddings": section.max_position_embeddings,
        **_dropouts(section, section.architecture),
    }
    if section.architecture == "electra":
        hf_config: Any = ElectraConfig(**fields, embedding_size=section.embedding_size or section.hidden_size)
    elif section.architecture == "roberta":
        if pad_token_id is None:
            raise ModelError(
                "architecture roberta counts positions from the padding's id, and this tokenizer has no padding; name "
                "another in tokenizer.path or set model.architecture: bert"
            )
        # The published models' values, which are not transformers' defaults.
        fields |= {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
        fields["max_position_embeddings"] += pad_token_id + 1
        hf_config = RobertaConfig(**fields)
    elif section.architecture == "distilbert":
        hf_config = DistilBertConfig(hidden_dim=fields.pop("intermediate_size"), **fields)
    elif section.architecture == "modernbert":
        # Gated: the published models' 1.5 x hidden_size. Ids of a tokenizer that is not this one's
        # would be wrong, and no layer reads them.
        fields["intermediate_size"] = section.intermediate_size or 3 * section.hidden_size // 2
        fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
        fields |= {
            "local_attention": section.local_attention,
            "global_attn_every_n_layers": section.global_attention_every,
            # The published models', too: nothing has taught the first token to sum up its sequence.
            "classifier_pooling": "mean",
        }
        hf_config = ModernBertConfig(**fields)
    else:
        hf_config = BertConfig(**fields)
    check_architecture(hf_config)
    return hf_config


def check_architecture(hf_config: Any) -> None:
    """ModelError, one line, for a config whose model our layers do not compute."""
    architecture(hf_config)
    if hf_config.hidden_size % hf_config.num_attention_heads:
        raise ModelError(
            f"num_attention_heads {hf_config.num_attention_heads} does not divide hidden_size {hf_config.hidden_size}; "
            "choose a divisor"
        )
    if getattr(hf_config, "is_decoder", False) or getattr(hf_config, "add_cross_attention", False):
        raise ModelError("the model is a decoder (is_decoder or add_cross_attention); use a masked-LM encoder")
    if getattr(hf_config, "position_embedding_type", "absolute") != "absolute":
        raise ModelError(
            f"position_embedding_type {hf_config.position_embedding_type} is not supported; only absolute is"
        )
    for kind, rope in (getattr(hf_config, "rope_parameters", None) or {}).items():
        if rope["rope_type"] in ("dynamic", "longrope"):
            raise ModelError(
                f"rope_type {rope['rope_type']} of {kind} turns with the longest sequence that was seen, so results "
                "would depend on packing; use a model with another"
            )


def _dropouts(section: ModelSection, model_type: str) -> dict[str, float]:
    """A section's drop probabilities as fields of such a model's config."""
    parts = ARCHITECTURES[model_type]
    attention = section.dropout if section.attention_dropout is None else section.attention_dropout
    return {**dict.fromkeys(parts.dropouts, section.dropout), parts.attention_dropout: attention}


def _set_head(hf_config: Any, task: Task | None) -> None:
    if task is None:
        return
    hf_config.update(task.config_fields)
    if hasattr(hf_config, "classifier_pooling"):
        # Only one position of a sequence comes back from the body.
        hf_config.classifier_pooling = "cls"


def _from_checkpoint(checkpoint: str, section: ModelSection, vocab_size: int, task: Task | None) -> PreTrainedModel:
    try:
        # Code that comes with a model is never run, and nobody is asked whether it should be.
        hf_config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"model.checkpoint {checkpoint}: no such folder or hub model, or no config.json in it that this version of "
            f"transformers reads by itself ({reason}); name another"
        ) from error
    # The head that it was saved with does not decide which it gets.
    hf_config.architectures = None
    check_architecture(hf_config)
    if vocab_size > hf_config.vocab_size and not section.resize:
        raise ModelError(
            f"model.checkpoint {checkpoint} has {hf_config.vocab_size} words, the tokenizer {vocab_size}; use the "
            "checkpoint's own tokenizer (tokenizer.path), or set model.resize: true for words added to it"
        )
    hf_config.update(_dropouts(section, hf_config.model_type))
    _set_head(hf_config, task)
    try:
        with quiet_transformers():
            model, loading = auto_class_of(task).from_pretrained(
                checkpoint,
                config=hf_config,
                dtype=torch.float32,
                output_loading_info=True,
                # A classifier of another task is as good as none.
                ignore_mismatched_sizes=task is not None,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.checkpoint {checkpoint}: its weights cannot be loaded ({error}); fetch them again, with git lfs if "
            "they came by git"
        ) from error
    model.config.architectures = [type(model).__name__]
    parts = architecture(model.config)
    missing = sorted(loading["missing_keys"]) + sorted(entry[0] for entry in loading["mismatched_keys"])
    new = [name for name in missing if any(name.startswith(f"{head}.") for head in parts.heads)]
    if lost := [name for name in missing if name.startswith(f"{parts.base}.") and name not in new]:
        raise ModelError(
            f"model.checkpoint {checkpoint} lacks {lost[0]} and {len(lost) - 1} more weights of the encoder; "
            "save it again, or name another"
        )
    if missing:
        head = "masked-LM head" if task is None else f"head for {task.name}"
        logger.warning("model.checkpoint %s has no %s; a new one is trained", checkpoint, head)
    if vocab_size > model.config.vocab_size:
        _grow(model, vocab_size)
    return model


def _grow(model: PreTrainedModel, vocab_size: int) -> None:
    """Add rows to word table and decoder, as the mean of those that are there (Hewitt 2021,
    "Initializing new word embeddings for pretrained language models").
    """
    rows = model.config.vocab_size
    with quiet_transformers():
        model.resize_token_embeddings(vocab_size)
    decoder: Any = model.get_output_embeddings()
    if decoder is None or decoder.bias is None:
        return
    # transformers gives a decoder that is the table biases of zero.
    with torch.no_grad():
        decoder.bias[rows:] = decoder.bias[:rows].mean()
    # And of RoBERTa's it leaves the other name behind where the decoder has a table of its own.
    head: Any = model.get_submodule(architecture(model.config).decoder.rpartition(".")[0])
    if hasattr(head, "bias"):
        head.bias = decoder.bias


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside this block transformers prints no loading reports and no progress bars.

    What matters of them our own lines say.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
