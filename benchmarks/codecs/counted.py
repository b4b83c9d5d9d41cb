"""Bytes per token of each codec: whole encoded messages of real text, at BERT-base's width, with
what a model makes.

Compression makes bytes depend on the values, so these are a model's: of one layer, freshly drawn,
after one forward and backward pass. A trained model's values have heavier tails and compress a
little more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.codecs.settings import Setting
from benchmarks.codecs.split_training import activations_message, control, cu_seqlens_of, manifest
from fedbert_ds.config import ModelSection, WireSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import Batch, BatchStream, encode
from fedbert_ds.data.tokenizer import load_tokenizer, train_wordpiece
from fedbert_ds.model.body import Body
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.wire import codecs
from fedbert_ds.wire import fedbert_pb2 as pb

TOKENS, LENGTH, VOCABULARY = 16_384, 128, 30_522
"""Of a message, of its sequences, and how many word pieces: as BERT-base has them."""
WIDTH, EMBEDDING = 768, 128
QUICK_TOKENS = 1_024
SEED = 1
"""Of the shuffle, the masks and the model."""


@dataclass(frozen=True)
class Sizes:
    """Bytes per token."""

    up: float
    down: float
    not_compressed: float
    """Both ways."""


@dataclass(frozen=True)
class Crossing:
    """Tensors of one window's message each way and back, fp32."""

    values: Tensor
    """[rows, width], or [tokens, width]."""
    row_index: Tensor | None
    hidden: Tensor
    """[masked, width]."""
    hidden_gradient: Tensor
    input_gradient: Tensor


@dataclass(frozen=True)
class Counted:
    """One text, shuffled, as one message."""

    source: str
    vocabulary: str
    batch: Batch
    sizes: Mapping[Setting, Sizes]

    def record(self, summary: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What was counted, and the sizes of settings that are in the summary."""
        names = ("model", "cut", "activations", "hidden", "gradients")
        wanted = {tuple(row[name] for name in names) for row in summary}
        sizes = {tuple(asdict(setting)[name] for name in names): size for setting, size in self.sizes.items()}
        return {
            "source": self.source, "vocabulary": self.vocabulary, "width": WIDTH, "embedding": EMBEDDING,
            "tokens": len(self.batch.input_ids), "masked": len(self.batch.labels),
            "distinct": len(self.batch.input_ids.unique()),
            "sizes": [
                {**dict(zip(names, setting, strict=True)), **asdict(size)}
                for setting, size in sizes.items() if setting in wanted
            ],
        }  # fmt: skip


def counted(
    source: str, articles: Sequence[Article], vocabulary: str | None, settings: Sequence[Setting], *, quick: bool
) -> Counted:
    """Bytes of these settings for one message of the articles; `vocabulary` None learns word pieces
    from them."""
    tokenizer = load_tokenizer(vocabulary) if vocabulary else train_wordpiece(articles, VOCABULARY)
    text = encode(articles, tokenizer, LENGTH)
    stream = BatchStream(text, tokenizer, mask_probability=0.15, whole_word=False, seed=SEED, client="count")
    batch = stream.next_batch(0, QUICK_TOKENS if quick else TOKENS)
    crossings: dict[tuple[str, str], Crossing] = {}
    sizes = {}
    for setting in settings:
        model, cut = setting.model, setting.cut
        if (model, cut) not in crossings:
            section = _section(is_factorized=model == "factorized")
            half, body = split(build_model(section, len(tokenizer), tokenizer.pad_token_id, SEED), cut)
            crossings[model, cut] = crossing(half, body, batch)
        both = {
            compression: message_bytes(
                batch, crossings[model, cut], setting.wire.model_copy(update={"compression": compression})
            )
            for compression in ("zstd", "none")
        }
        up, down = (size / len(batch.input_ids) for size in both["zstd"])
        sizes[setting] = Sizes(up, down, sum(both["none"]) / len(batch.input_ids))
    named = Path(vocabulary).name if vocabulary else "learned from the text"
    return Counted(Path(source).name, named, batch, sizes)


def crossing(half: ClientHalf, body: Body, batch: Batch) -> Crossing:
    """What one window of this batch puts on the wire when nothing rounds it."""
    activations = half.embed(batch.input_ids, batch.lengths)
    row_index = activations.row_index
    values = activations.values.detach().requires_grad_()
    index = None if row_index is None else row_index.long()
    hidden = body(values, batch.masked_positions, cu_seqlens_of(batch.lengths), index)
    _, gradient = half.head_backward(hidden.detach(), batch.labels, 1.0 / max(1, len(batch.labels)))
    hidden.backward(gradient)
    assert values.grad is not None
    return Crossing(values.detach(), row_index, hidden.detach(), gradient, values.grad)


def message_bytes(batch: Batch, it: Crossing, wire: WireSection) -> tuple[int, int]:
    """Bytes up and down of one window of this batch in one message, encoded in full, control
    messages included."""

    def frame(tensor: Tensor, codec: str) -> pb.TensorFrame:
        return codecs.encode(tensor, codec, compressed=wire.is_compressed)

    window = 1000
    values = frame(it.values, wire.activations)
    gradient = pb.Gradient(window=window, hidden=frame(it.hidden_gradient, wire.gradients), loss_sum=1.0)
    up = [
        manifest(window, batch),
        activations_message(window, batch, values, it.row_index, len(it.values)),
        pb.ClientMessage(gradient=gradient),
    ]
    hidden = pb.Hidden(window=window, values=frame(it.hidden, wire.hidden_states), masked_tokens=len(batch.labels))
    back = pb.InputGradient(window=window, values=frame(it.input_gradient, wire.gradients))
    down = [pb.ServerMessage(hidden=hidden), pb.ServerMessage(input_gradient=back), *control(window, batch)]
    return sum(message.ByteSize() for message in up), sum(message.ByteSize() for message in down)


def _section(*, is_factorized: bool) -> ModelSection:
    shape: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 12, "dropout": 0.0}
    if is_factorized:
        shape |= {"architecture": "electra", "embedding_size": EMBEDDING}
    return ModelSection(max_position_embeddings=LENGTH, **shape)
