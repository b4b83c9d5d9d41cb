"""A system's finished run: what it left, beside centralized training's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.modes.comparison import Run
from benchmarks.modes.systems import ModesOptions, command_of, run_file_overrides
from fedbert_ds.compare import runs
from fedbert_ds.compare.systems import System
from fedbert_ds.config import RunConfig
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import read_metrics


def finished(system: System, config: RunConfig, options: ModesOptions, commit: str | None, reference: Path) -> Run:
    """The run: read if complete with these settings, else made. `reference` is complete."""
    folder = config.run.directory
    command = command_of(system, run_file_overrides(system, options))
    job = runs.Job(system.label, config, command, resumes=system.is_federated)
    result = runs.finished(job, commit, lambda: _measured(folder, config), replaces=True)
    return Run(
        system=system,
        windows=read_metrics(RunFolder(folder).metrics),
        held_out_loss=result["held_out_loss"],
        unigram_loss=result["unigram_loss"],
        seconds=result["seconds"],
        commit=result["commit"],
        weight_difference=_weight_difference(RunFolder(folder).model, RunFolder(reference).model),
        client=runs.client_costs(sorted(RunFolder(folder).clients.glob("*/log.txt"))),
    )


def evaluate(folder: Path, config: RunConfig) -> tuple[float, float]:
    """Losses on the held-out articles: (final model, word frequency alone), same targets."""
    import torch

    from fedbert_ds.data.corpus import read_articles
    from fedbert_ds.data.masking import encode
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    torch.set_num_threads(1)
    length, model = config.data.sequence_length, RunFolder(folder).model
    tokenizer = load_tokenizer(str(model))
    shards = [str(path) for path in sorted(RunFolder(folder).clients.glob("*/shard.jsonl"))]
    result = evaluate_masked_lm(
        model,
        [str(RunFolder(folder).held_out)],
        seed=config.run.seed,
        mask_probability=config.data.mask_probability,
        sequence_length=length,
        train_counts=encode(read_articles(shards), tokenizer, length).token_counts(len(tokenizer)),
        device="cpu",
    )
    assert result.unigram_loss is not None
    return result.loss, result.unigram_loss


def _measured(folder: Path, config: RunConfig) -> dict[str, float]:
    held_out_loss, unigram_loss = evaluate(folder, config)
    return {"held_out_loss": held_out_loss, "unigram_loss": unigram_loss}


def _weight_difference(folder: Path, reference: Path) -> float:
    """Largest difference of a weight, key biases apart: their true gradient is zero, so Adam steps
    on noise."""
    from safetensors.torch import load_file

    mine, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    names = [name for name in theirs if not name.endswith("key.bias")]
    return max((mine[name] - theirs[name]).abs().max().item() for name in names)
