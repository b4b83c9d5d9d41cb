"""The model of a run, equal on all ranks: prepared by the first, built by each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds.config import RunConfig
from fedbert_ds.data.tokenizer import num_rows, tokenizer_from_bytes, tokenizer_to_bytes
from fedbert_ds.errors import ConfigError
from fedbert_ds.model.architecture import longest_sequence
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split, undivided
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.no_body import NoBody
from fedbert_ds.server.body.peak import Peak, peak_of, together
from fedbert_ds.server.prepare import TextFacts, is_prepared, prepare_text, prepared_text
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.server.run_reporter import RunReporter
from fedbert_ds.tasks.registry import task_of_section
from fedbert_ds.wire import address_file


@dataclass(frozen=True)
class Prepared:
    """Rank 0's preparations, which every rank needs before it builds its body."""

    tokenizer: bytes
    facts: TextFacts | None
    run: str
    """The run's id."""


@dataclass(frozen=True)
class RunModel:
    """The model that the ranks agree on, but for the client half."""

    prepared: Prepared
    tokenizer: Any
    config: Any
    """transformers' configuration."""
    engine: BodyEngine
    reporter: RunReporter


def build_model_of_run(
    config: RunConfig, resume: bool, ranks: RankGroup, folder: RunFolder
) -> tuple[RunModel, ClientHalf]:
    """Prepare the run, build the body and a client half."""
    prepared = ranks.broadcast(_prepare(config, folder, resume) if ranks.rank == 0 else None, Prepared)
    tokenizer = tokenizer_from_bytes(prepared.tokenizer)
    model_config, half, body = _halves(config, tokenizer)
    reporter = RunReporter(config, ranks.world_size, prepared.facts, half, body)
    engine = _engine(config, body)
    if body is not None:
        reporter.peak = together(ranks.gather(peak_of(_device(), _dtype(config)), Peak))
    return RunModel(prepared, tokenizer, model_config, engine, reporter), half


def _prepare(config: RunConfig, folder: RunFolder, resume: bool) -> Prepared:
    folder.write_config(config)
    # Left by a run that was killed, or that is extended now.
    address_file.hide(folder.address)
    if resume and is_prepared(folder):
        tokenizer, facts = prepared_text(folder)
    else:
        try:
            tokenizer, facts = prepare_text(config, folder)
        except BaseException:
            if not resume:
                folder.remove()
            raise
    return Prepared(tokenizer_to_bytes(tokenizer), facts, folder.identify())


def _halves(config: RunConfig, tokenizer: Any) -> tuple[Any, ClientHalf, Body | None]:
    """(transformers config, client half, body if there is one), built from the run's seed; equal on
    all ranks.
    """
    task = task_of_section(config.task)
    model = build_model(config.model, num_rows(tokenizer), tokenizer.pad_token_id, config.run.seed, task)
    if config.data.sequence_length > longest_sequence(model.config):
        raise ConfigError(
            f"data.sequence_length {config.data.sequence_length} is longer than the model's position table, "
            f"{longest_sequence(model.config)}; lower it"
        )
    if config.cut == "whole":
        return model.config, undivided(model), None
    return model.config, *split(model, config.cut)


def _engine(config: RunConfig, body: Body | None) -> BodyEngine:
    if body is None:
        return NoBody()
    device = _device()
    longest = config.data.sequence_length
    return BodyEngine.build(body.to(device), config.body, config.optimizer, config.kernels, device, longest)


def _dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.body.precision == "bf16" else torch.float32


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")
