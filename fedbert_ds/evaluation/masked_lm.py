"""Masked-LM loss of a checkpoint on held-out text, beside what word frequency alone would reach."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.long_steps import telling
from fedbert_ds.data.masking import Batch, EncodedText, Masker, encode
from fedbert_ds.data.tokenizer import load_tokenizer, local_folder, num_rows
from fedbert_ds.errors import DataError, ModelError
from fedbert_ds.evaluation.batches import LIKE, MaskedText, packed_batches, padded_batches
from fedbert_ds.evaluation.workers import SumOf, in_processes
from fedbert_ds.model.architecture import position_limit
from fedbert_ds.model.checkpoint import check_architecture
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import undivided

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LONGEST_SEQUENCE = 512


@dataclass(frozen=True)
class MaskedLMResult:
    """What a masked-LM checkpoint makes of a text."""

    loss: float
    """Mean cross-entropy of the masked tokens, in nats."""
    perplexity: float
    """exp(loss)."""
    unigram_loss: float | None
    """Loss by the training text's token frequencies alone; None without train_counts."""
    masked_tokens: int
    """Tokens predicted."""
    sequences: int
    """Sequences read."""


def evaluate_masked_lm(
    model_name_or_folder: str | Path,
    articles_or_paths: Sequence[Article] | Sequence[str] | str | Path,
    *,
    seed: int = 0,
    mask_probability: float = 0.15,
    sequence_length: int | None = None,
    batch_size: int = 32,
    max_sequences: int | None = None,
    train_counts: Tensor | None = None,
    device: str | None = None,
    workers: int = 1,
    shows_progress: bool = False,
) -> MaskedLMResult:
    """Evaluate any Hugging Face masked-LM checkpoint that has a fast tokenizer.

    `articles_or_paths` are articles, or sources as in `data.source`. `sequence_length` None takes
    the model's limit, at most 512. `max_sequences` reads that many, spread evenly over the text.
    `train_counts` [V] counts the training text's tokens. `device` None takes a GPU when there is
    one. With several `workers`, each a process, `cuda` deals them to all GPUs. `batch_size` counts
    sequences of the longest length; shorter ones make larger batches. On the CPU our own layers
    compute an architecture that they know, without any padding; else sequences of like lengths are
    padded. `shows_progress` on a terminal; in a log it stays quiet. The masks follow from `seed`
    and the text alone, so the same checkpoint gives the same number each time, and neither
    `batch_size` nor `workers` changes more than rounding.

    Warns when the checkpoint holds an encoder only, for its head is then newly initialized. Raises
    ModelError when it is no masked-LM checkpoint, has no tokenizer, or does not fit its tokenizer
    or `sequence_length`, and DataError when the text cannot be read or is too short to mask a
    token.
    """
    name = str(model_name_or_folder)
    model: Any = load_masked_lm(name, seed)
    try:
        tokenizer = load_tokenizer(name)
    except DataError as error:
        raise ModelError(f"{error}; a checkpoint to evaluate needs its tokenizer beside it") from error
    rows, needed = len(model.get_input_embeddings().weight), num_rows(tokenizer)
    if needed > rows:
        raise ModelError(f"{name}: the tokenizer has {needed} tokens, the model {rows}; save its own there")
    limit = min(position_limit(model), tokenizer.model_max_length)
    if sequence_length is not None and sequence_length > limit:
        raise ModelError(f"{name}: sequences of {sequence_length} tokens do not fit; use at most {limit}")
    devices = usable_devices(device, workers)
    articles = telling(_articles(articles_or_paths), "tokenizing", lambda article: len(article.text))
    text = encode(articles, tokenizer, sequence_length or min(limit, LONGEST_SEQUENCE))
    masked = MaskedText.of(text, Masker(tokenizer, mask_probability=mask_probability), seed)
    sequences = masked.chosen(max_sequences)
    padding = None if is_packed(model.config, devices[0]) else _padding(tokenizer)
    if padding is None:
        batches = packed_batches(sequences, text.lengths, batch_size)
    else:
        batches = padded_batches(sequences, text.lengths, batch_size, likeness(model))
    if workers > 1:
        del model  # every process has its own
        sums = in_processes(_loaded, (name, seed, masked, padding), batches, devices)
    else:
        sums = map(_sum_of(model.to(devices[0]).eval(), masked, padding), batches)
    return _result(tqdm(sums, "batches", len(batches), disable=None if shows_progress else True), masked, sequences,
                   train_counts)  # fmt: skip


def likeness(model: PreTrainedModel) -> float:
    """How alike in length the sequences of a batch must be, as `padded_batches` has it. FNet cannot
    leave padding out: it mixes all that it is given.
    """
    return LIKE if "attention_mask" in inspect.signature(model.forward).parameters else 1.0


def masked_lm_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: EncodedText,
    *,
    seed: int = 0,
    mask_probability: float = 0.15,
    batch_size: int = 32,
    max_sequences: int | None = None,
    train_counts: Tensor | None = None,
) -> MaskedLMResult:
    """As `evaluate_masked_lm`, for a model in memory, on its device, as transformers computes it;
    its training mode is restored.

    Raises DataError when the text is too short to mask a token.
    """
    masked = MaskedText.of(text, Masker(tokenizer, mask_probability=mask_probability), seed)
    sequences = masked.chosen(max_sequences)
    was_training = model.training
    sum_of = _PaddedSum(model.eval(), masked, _padding(tokenizer))
    sums = [sum_of(batch) for batch in padded_batches(sequences, text.lengths, batch_size, likeness(model))]
    model.train(was_training)
    return _result(sums, masked, sequences, train_counts)


def summed_loss(model: PreTrainedModel, batch: Batch, batch_size: int = 32) -> float:
    """Sum of the cross-entropies of a packed batch's masked tokens, nats; the model's training mode
    is restored.
    """
    targets = torch.full_like(batch.input_ids, -1)
    targets[batch.masked_positions] = batch.labels
    masked = MaskedText(batch.input_ids, targets, torch.tensor([0, *accumulate(batch.lengths)]))
    was_training = model.training
    sum_of = _PaddedSum(model.eval(), masked, model.config.pad_token_id or 0)
    batches = padded_batches(masked.chosen(None), masked.offsets.diff(), batch_size, likeness(model))
    sums = [sum_of(numbers) for numbers in batches]
    model.train(was_training)
    return math.fsum(sums)


def is_packed(hf_config: Any, device: str) -> bool:
    """Whether `evaluate_masked_lm` computes such a model by our own layers, without padding."""
    if torch.device(device).type != "cpu":
        return False  # where it is not measured
    try:
        check_architecture(hf_config)
    except ModelError:
        return False
    return True


class PackedSum:
    """Sums the cross-entropies of a batch, given by the numbers of its sequences."""

    def __init__(self, half: ClientHalf, masked: MaskedText) -> None:
        self._half, self._masked = half, masked

    @torch.inference_mode()
    def __call__(self, batch: Sequence[int]) -> float:
        part = self._masked.packed(batch)
        if not len(part.labels):
            return 0.0
        hidden = self._half.whole_hidden(part.input_ids, part.lengths, part.masked_positions)
        return self._half.head_loss(hidden, part.labels)


class _PaddedSum:
    """As `PackedSum`, of any model of transformers."""

    def __init__(self, model: PreTrainedModel, masked: MaskedText, padding: int) -> None:
        self._model, self._masked, self._padding = model, masked, padding

    def __call__(self, batch: Sequence[int]) -> float:
        input_ids, attention_mask, targets = self._masked.padded(batch, self._padding)
        if not (targets >= 0).any():
            return 0.0
        return _summed_cross_entropy(self._model, input_ids, attention_mask, targets)


def _sum_of(model: PreTrainedModel, masked: MaskedText, padding: int | None) -> SumOf:
    """By our own layers if there is no `padding`."""
    return PackedSum(undivided(model), masked) if padding is None else _PaddedSum(model, masked, padding)


def _loaded(name: str, seed: int, masked: MaskedText, padding: int | None, device: str) -> SumOf:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the process that started this one has told them
        model: Any = load_masked_lm(name, seed)
    return _sum_of(model.to(device).eval(), masked, padding)


def _result(
    sums: Iterable[float], masked: MaskedText, sequences: Tensor, train_counts: Tensor | None
) -> MaskedLMResult:
    """The result from the sum of each batch."""
    chosen = torch.zeros(len(masked.offsets) - 1, dtype=torch.bool)
    chosen[sequences] = True
    targets = masked.targets[chosen.repeat_interleave(masked.offsets.diff())]
    labels = targets[targets >= 0]
    if not len(labels):
        raise DataError("the text to evaluate on is too short: no token of it was masked; give more text")
    loss = math.fsum(sums) / len(labels)
    return MaskedLMResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        unigram_loss=None if train_counts is None else unigram_loss(train_counts, labels),
        masked_tokens=len(labels),
        sequences=len(sequences),
    )


def _padding(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def usable_devices(device: str | None, workers: int) -> list[str]:
    """The device of each worker; ModelError for one that cannot compute here."""
    if workers < 1:
        raise ModelError(f"{workers} workers compute nothing; use 1 or more")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"device {name}: cannot be used here ({reason}); try cpu") from error
    if name == "cuda":
        return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]
    return [name] * workers


def unigram_loss(train_token_counts: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy, nats, of labels [m] under add-one-smoothed train_token_counts [V]."""
    smoothed = train_token_counts.double() + 1.0
    return float(smoothed.sum().log() - smoothed[labels].log().mean())


def scores_at(model: Any, input_ids: Tensor, attention_mask: Tensor, chosen: Tensor) -> Tensor:
    """Scores [m, V] of any masked LM at the m positions where `chosen` [B, L] bool is true."""

    def keep_chosen(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][chosen].unsqueeze(0)
        return output

    # Every masked LM of transformers hands its encoder's last hidden state to its head, whatever
    # the two are called.
    hook = model.base_model.register_forward_hook(keep_chosen)
    try:
        scores: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits[0]
    finally:
        hook.remove()
    return scores


@torch.inference_mode()
def _summed_cross_entropy(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> float:
    """Sum over the targets [B, L] that are not -1; the head sees their hidden states only."""
    input_ids, attention_mask, targets = (tensor.to(model.device) for tensor in (input_ids, attention_mask, targets))
    scores = scores_at(model, input_ids, attention_mask, targets >= 0)
    labels = targets[targets >= 0]
    return float(torch.nn.functional.cross_entropy(scores.float(), labels, reduction="none").double().sum())


def _articles(articles_or_paths: Sequence[Article] | Sequence[str] | str | Path) -> Iterator[Article]:
    if isinstance(articles_or_paths, (str, Path)):
        articles_or_paths = [str(articles_or_paths)]
    for item in articles_or_paths:
        if isinstance(item, Article):
            yield item
        else:
            yield from read_articles([str(item)])


def load_masked_lm(name: str, seed: int) -> PreTrainedModel:
    """A checkpoint in fp32 on the CPU, from a folder or the hub; `seed` decides a missing head.

    Warns for a missing head; ModelError where it is no masked LM or lacks weights of the encoder.
    """
    from transformers import AutoModelForMaskedLM

    from fedbert_ds.model.checkpoint import quiet_transformers

    folder = local_folder(name)
    if folder is not None and not (folder / "config.json").is_file():
        raise ModelError(f"{name}: no config.json there; name a folder written by save_pretrained, or a hub name")
    try:
        # Seeded, so that even a head that has to be initialized gives the same number each time.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, report = AutoModelForMaskedLM.from_pretrained(
                str(folder or name),
                local_files_only=folder is not None,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
    # Hub, network, JSON and safetensors errors share no base; all mean the name or its files.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{name}: cannot be loaded as a masked-LM checkpoint ({reason}); name another") from error
    missing = sorted(report["missing_keys"])
    encoder = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if encoder:
        raise ModelError(f"{name}: weights of the encoder are missing, {encoder[0]} first; save the checkpoint again")
    if missing:
        warnings.warn(
            f"{name}: the checkpoint has no masked-LM head ({missing[0]} ...); it is newly initialized, "
            "so the loss says nothing about the encoder",
            stacklevel=3,
        )
    return model
