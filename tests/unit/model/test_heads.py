"""A classifier that is cut is the classifier of transformers: scores, loss and every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.model.samples import PAD, VOCABULARY, small_section

from fedbert_ds.config import LayersCut, ModelSection
from fedbert_ds.data.labelled import LabelledSequences
from fedbert_ds.data.masking import Batch, EncodedText
from fedbert_ds.errors import ModelError
from fedbert_ds.model.architecture import architecture as parts_of
from fedbert_ds.model.checkpoint import build_model, config_from_json, config_to_json, save_merged, shape_hash
from fedbert_ds.model.cut import body_skeleton, client_skeleton, merge, split, undivided
from fedbert_ds.model.heads import auto_class
from fedbert_ds.tasks.registry import TASKS
from fedbert_ds.tasks.task import Task

LENGTHS = [5, 1, 7, 5, 2, 1]
LABELS = ("O", "B-X", "I-X")


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param](LABELS)


def model_of(architecture: str, task: Task | None) -> Any:
    # Far from zero: a wrong head shows.
    return build_model(small_section(architecture, initializer_range=0.2), VOCABULARY, PAD, seed=3, task=task)


def batch_of(task: Task, pairs: bool) -> Batch:
    generator = torch.Generator().manual_seed(5)
    total, offsets = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0)
    ids = torch.randint(3, 12, (total,), generator=generator)
    positions = offsets[:-1] if task.reads_first_token else torch.arange(0, total, 3)
    if task.labels:
        labels = torch.randint(len(task.labels), (len(positions),), generator=generator)
    else:
        labels = torch.randn(len(positions), generator=generator)
    kinds = torch.randint(2, (total,), generator=generator) if pairs else None
    text = EncodedText(ids.int(), offsets, torch.ones(total, dtype=torch.bool))
    return LabelledSequences(text, positions, labels, kinds).batch(range(len(LENGTHS)))


def loss_of_transformers(model: Any, task: Task, batch: Batch) -> torch.Tensor:
    """By the model's own forward and its own loss, on a padded batch."""

    def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values.split(batch.lengths)), True, fill)

    inputs = {
        "input_ids": padded(batch.input_ids, PAD),
        "attention_mask": padded(torch.ones_like(batch.input_ids), 0),
    }
    if batch.token_types is not None:
        inputs["token_type_ids"] = padded(batch.token_types, 0)
    labels = batch.labels
    if not task.reads_first_token:
        everywhere = torch.full_like(batch.input_ids, -100)
        everywhere[batch.masked_positions] = batch.labels
        labels = padded(everywhere, -100)
    elif not task.labels:
        labels = labels.double()
    return model(**inputs, labels=labels).loss


def through_the_cut(client: Any, body: Any, batch: Batch) -> float:
    """Mean loss across the cut; leaves gradients."""
    activations = client.embed(batch.input_ids, batch.lengths, batch.token_types)
    received = activations.values.detach().requires_grad_()
    row_index = None if activations.row_index is None else activations.row_index.long()
    bounds = torch.tensor([0, *batch.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    hidden = body(received, batch.masked_positions, bounds, row_index)
    assert (activations.values.shape[1], hidden.shape[1]) == client.widths == body.widths
    loss, gradient = client.head_backward(hidden.detach(), batch.labels, 1 / len(batch.labels))
    (hidden * gradient).sum().backward()
    activations.values.backward(received.grad)
    assert client.head_loss(hidden, batch.labels) == pytest.approx(loss, rel=1e-12)
    return loss / len(batch.labels)


def test_a_cut_classifier_steps_like_the_whole_one(architecture: str, cut: Any, task: Task) -> None:
    pairs = architecture in ("bert", "electra") and cut != "rows" and task.reads_first_token
    model, batch = model_of(architecture, task).double(), batch_of(task, pairs)
    expected = loss_of_transformers(model, task, batch)
    expected.backward()
    client, body = split(model_of(architecture, task).double(), cut)
    assert through_the_cut(client, body, batch) == pytest.approx(float(expected), rel=1e-9)
    halves = {name: parameter.grad for half in (client, body) for name, parameter in half.named_parameters()}
    assert halves.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(halves[name], parameter.grad, atol=1e-10, rtol=1e-8, msg=name)
    assert any(halves[name].abs().max() > 1e-3 for name in halves if "classifier" in name)
    scopes = {name: client.parameter_scope(name) for name, _ in client.named_parameters()}
    of_the_head = {name for name in scopes if any(part in name for part in ("classifier", "pooler", "head."))}
    assert {name for name, scope in scopes.items() if scope == "head"} == of_the_head


def test_the_whole_classifier_at_a_client_is_the_model(architecture: str, task: Task) -> None:
    pairs = architecture in ("bert", "electra") and task.reads_first_token
    model, batch = model_of(architecture, task).double(), batch_of(task, pairs)
    expected = loss_of_transformers(model, task, batch)
    client = undivided(model_of(architecture, task).double())
    inputs = batch.input_ids, batch.lengths, batch.masked_positions
    loss = client.whole_backward(*inputs, batch.labels, 1.0, batch.token_types)
    assert loss / len(batch.labels) == pytest.approx(float(expected), rel=1e-9)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in client.named_parameters()}
    for name, parameter in model.named_parameters():
        # A scale of 1 is the gradient of the sum, transformers' loss is the mean.
        summed = parameter.grad * len(batch.labels)
        # ModernBERT's angles are fp32.
        torch.testing.assert_close(gradients[name], summed, atol=1e-7, rtol=1e-7, msg=name)


def test_counts_are_the_tasks_of_the_heads_scores(architecture: str, task: Task) -> None:
    client, batch = undivided(model_of(architecture, task)), batch_of(task, False)
    hidden = client.whole_hidden(batch.input_ids, batch.lengths, batch.masked_positions)
    bounds = torch.searchsorted(batch.masked_positions, torch.tensor([0, *LENGTHS]).cumsum(0)).tolist()
    counts = client.head_counts(hidden, batch.labels, bounds)
    assert counts == task.counts(client.logits(hidden).detach(), batch.labels, bounds)
    assert len(counts) == client.num_counts == task.num_counts
    masked_lm = undivided(model_of(architecture, None))
    assert masked_lm.num_counts == 0 and masked_lm.task is None


def test_pairs_are_told_apart() -> None:
    task = TASKS["sequence_classification"](LABELS)
    batch = batch_of(task, True)
    losses = []
    for kinds in (batch.token_types, None):
        client = undivided(model_of("bert", task))
        losses.append(
            client.whole_backward(batch.input_ids, batch.lengths, batch.masked_positions, batch.labels, 1.0, kinds)
        )
    assert losses[0] != losses[1]


def test_halves_of_a_classifier_merge_to_the_bit(architecture: str, cut: Any, task: Task, tmp_path: Path) -> None:
    model = model_of(architecture, task)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = config_from_json(config_to_json(model.config))
    client, body = split(model, cut)
    for skeleton, half in ((client_skeleton(config, cut), client), (body_skeleton(config, cut), body)):
        skeleton.load_state_dict(half.state_dict())
    merged = merge(config, client.state_dict(), body.state_dict())
    assert type(merged) is type(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            pass

    save_merged(tmp_path / "hf", config, client.state_dict(), body.state_dict(), Tokenizer())
    loaded, report = auto_class(config).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_masked_lms_checkpoint_gets_a_new_head_and_keeps_its_encoder(
    architecture: str, task: Task, tmp_path: Path, caplog: Any
) -> None:
    masked_lm = model_of(architecture, None)
    masked_lm.save_pretrained(tmp_path / "lm")
    section = ModelSection(checkpoint=str(tmp_path / "lm"))
    model, again = (build_model(section, VOCABULARY, PAD, seed=3, task=task) for _ in range(2))
    assert "has no head for " + task.name in caplog.text
    before = masked_lm.base_model.state_dict()
    kept = {name: tensor for name, tensor in model.base_model.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    # And back: pre-training goes on from a classifier with a new masked-LM head.
    model.save_pretrained(tmp_path / "classifier")
    back = build_model(ModelSection(checkpoint=str(tmp_path / "classifier")), VOCABULARY, PAD, seed=3)
    assert type(back) is type(masked_lm) and parts_of(back.config).heads == parts_of(masked_lm.config).heads


def test_a_classifier_of_the_same_labels_goes_on_and_of_others_begins_anew(tmp_path: Path, caplog: Any) -> None:
    two, three = (TASKS["sequence_classification"](LABELS[:n]) for n in (2, 3))
    model = model_of("bert", three)
    model.save_pretrained(tmp_path / "three")
    section = ModelSection(checkpoint=str(tmp_path / "three"))
    goes_on = build_model(section, VOCABULARY, PAD, seed=9, task=three)
    assert torch.equal(goes_on.classifier.weight, model.classifier.weight) and not caplog.text
    other = build_model(section, VOCABULARY, PAD, seed=9, task=two)
    assert other.classifier.weight.shape == (2, 16) and "a new one is trained" in caplog.text
    assert torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_a_classifier_reads_words_added_to_its_tokenizer(architecture: str, task: Task, tmp_path: Path) -> None:
    model_of(architecture, None).save_pretrained(tmp_path)
    section = ModelSection(checkpoint=str(tmp_path), resize=True)
    client, body = split(build_model(section, VOCABULARY + 2, PAD, seed=3, task=task), "embeddings")
    client.embed(torch.tensor([VOCABULARY + 1, 3]), [2])
    assert merge(client.config, client.state_dict(), body.state_dict()).config.vocab_size == VOCABULARY + 2


def test_a_checkpoint_without_its_encoder_is_refused(tmp_path: Path) -> None:
    model = model_of("bert", None)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.1." not in name}
    model.save_pretrained(tmp_path / "lm", state_dict=state)
    with pytest.raises(ModelError, match=r"lacks bert.encoder.layer.1"):
        build_model(
            ModelSection(checkpoint=str(tmp_path / "lm")), VOCABULARY, PAD, 3, TASKS["token_classification"](LABELS)
        )


def test_networks_of_other_heads_have_other_shapes() -> None:
    shapes = {shape_hash(model_of("bert", None).config)}
    for name in TASKS:
        for labels in (LABELS[:2], LABELS):
            shapes.add(shape_hash(model_of("bert", TASKS[name](labels)).config))
    assert len(shapes) == 1 + 2 + 1 + 2


def test_a_checkpoint_that_pools_over_a_sequence_reads_the_first_token_from_now_on(tmp_path: Path) -> None:
    task = TASKS["sequence_classification"](LABELS)
    pooling = model_of("modernbert", task)
    pooling.config.classifier_pooling = "mean"
    pooling.save_pretrained(tmp_path / "mean")
    section = ModelSection(checkpoint=str(tmp_path / "mean"))
    for wanted in (task, TASKS["token_classification"](LABELS), None):
        model = build_model(section, VOCABULARY, PAD, seed=3, task=wanted)
        assert wanted is None or model.config.classifier_pooling == "cls"
        split(model, "embeddings")


def test_pooling_over_a_sequence_is_refused() -> None:
    config = model_of("modernbert", TASKS["sequence_classification"](LABELS)).config
    assert config.classifier_pooling == "cls"
    config.classifier_pooling = "mean"
    with pytest.raises(ModelError, match="classifier_pooling mean reads every token"):
        parts_of(config)


def test_the_pooler_costs_a_client_its_labelled_positions_only() -> None:
    task = TASKS["sequence_classification"](LABELS)
    client, _ = split(model_of("bert", task), LayersCut(layers=1))
    layer = 12 * 16 * 16
    assert client.flops_per_token(0.5) == 6 * (layer + 0.5 * (16 * 16 + 16 * 3))
