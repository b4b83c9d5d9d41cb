"""A checkpoint made ready for a task: encoder, tokenizer, a classifier of the task's width."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from fedbert_ds.data.tokenizer import load_tokenizer, local_folder, num_rows
from fedbert_ds.errors import DataError, ModelError
from fedbert_ds.model.architecture import position_limit
from fedbert_ds.tasks.glue_tasks import GLUE, GlueTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "vocab.txt")


def load_classifier(name: str, task: GlueTask) -> PreTrainedModel:
    """A sequence classifier in fp32 around any encoder of transformers; what it lacks is new.

    New weights come from torch's global generator, as in plain transformers code. `name` is a
    folder, read without any network, or a hub name. ModelError, one line, when it is no checkpoint,
    has no classifier in this version of transformers, or lacks weights of the encoder.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from fedbert_ds.model.checkpoint import quiet_transformers

    folder = _folder_with_config(name)
    where: dict[str, Any] = {"local_files_only": folder is not None, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder or name, **task.task.config_fields, **where)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder or name,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a classifier of another task
                **where,
            )
    except Exception as error:  # hub, network, JSON and safetensors errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name}: cannot be loaded as a sequence classifier ({reason}); name another checkpoint"
        ) from error
    encoder = f"{model.base_model_prefix}."
    wrong = [key for key in report["missing_keys"] if key.startswith(encoder) and ".pooler." not in key]
    wrong += [entry[0] for entry in report["mismatched_keys"] if entry[0].startswith(encoder)]
    if wrong:
        raise ModelError(
            f"{name}: weights of the encoder are missing, {min(wrong)} first; "
            "name a masked LM, an encoder or a classifier, saved whole"
        )
    return model


def load_task_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer; ModelError, one line, where there is none."""
    try:
        return load_tokenizer(name)
    except DataError as error:
        raise ModelError(f"{error}; a checkpoint to fine-tune needs its tokenizer beside it") from error


def check_fits(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    """ModelError, one line, when tokens or `length` lie outside the model's tables."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    needed = num_rows(tokenizer)
    if needed > rows:
        raise ModelError(f"{name}: the tokenizer has {needed} tokens, the model {rows}; save its own there")
    limit = min(tokenizer.model_max_length, position_limit(model))
    if length > limit:
        raise ModelError(f"{name}: sequences of {length} tokens do not fit; use --length {limit} or less")


def check_mnli(name: str) -> None:
    """ModelError, one line, unless the checkpoint was saved with MNLI's classifier."""
    from transformers import AutoConfig

    folder = _folder_with_config(name)
    try:
        config = AutoConfig.from_pretrained(
            folder or name, local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:  # hub, network and JSON errors share no base
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: no checkpoint there ({reason}); --from-mnli takes one fine-tuned on MNLI") from error
    classifies = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    if not classifies or config.num_labels != GLUE["MNLI"].num_outputs:
        raise ModelError(f"{name}: has no head of three labels; --from-mnli takes a checkpoint fine-tuned on MNLI")


def fingerprint(name: str) -> str | None:
    """16 hexadecimal digits over a folder's weights and tokenizer; None for a hub name."""
    folder = local_folder(name)
    if folder is None:
        return None
    content = hashlib.sha256()
    for path in sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}):
        content.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()[:16]


def _folder_with_config(name: str) -> str | None:
    folder = local_folder(name)
    if folder is not None and not (folder / "config.json").is_file():
        raise ModelError(f"{name}: no config.json there; name a folder written by save_pretrained, or a hub name")
    return None if folder is None else str(folder)
