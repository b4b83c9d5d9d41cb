"""What no system trained: word frequency, the checkpoint before training, a model without any."""

from __future__ import annotations

from typing import Any

import torch

from fedbert_ds.compare import held_out
from fedbert_ds.config import RunConfig
from fedbert_ds.data.tokenizer import load_tokenizer, num_rows
from fedbert_ds.model.checkpoint import build_model, quiet_transformers
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.tokenizer_folder import save_tokenizer

WORD_FREQUENCY, BEFORE, NOT_PRETRAINED = "word frequency", "before training", "not pre-trained"
"""As the table calls them."""


def baselines(
    config: RunConfig, text: RunFolder, batches: held_out.Batches, with_model: bool, device: str = "cpu"
) -> dict[str, tuple[held_out.Losses, str | None]]:
    """Losses and checkpoint of each: word frequency has none, BEFORE is there where the run file
    continues a checkpoint, and NOT_PRETRAINED where a task asks for it (`with_model`).
    """
    found: dict[str, tuple[held_out.Losses, str | None]] = {
        WORD_FREQUENCY: (held_out.word_frequency(config, text, batches), None)
    }
    if config.model.checkpoint is not None:
        found[BEFORE] = (
            held_out.losses_of(config.model.checkpoint, batches, config.run.seed, device),
            config.model.checkpoint,
        )
    if with_model:
        name = str(_not_pretrained(config, text))
        found[NOT_PRETRAINED] = (held_out.losses_of(name, batches, config.run.seed, device), name)
    return found


def _not_pretrained(config: RunConfig, text: RunFolder) -> Any:
    """The folder of a model of the same shape with the seed's first weights, and its tokenizer."""
    folder = text.path.with_name("not-pre-trained")
    tokenizer = load_tokenizer(str(text.tokenizer))
    if config.model.checkpoint is None:
        model = build_model(config.model, num_rows(tokenizer), tokenizer.pad_token_id, config.run.seed)
    else:
        from transformers import AutoConfig, AutoModelForMaskedLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            model = AutoModelForMaskedLM.from_config(
                AutoConfig.from_pretrained(config.model.checkpoint, trust_remote_code=False)
            )
    with quiet_transformers():
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    return folder
