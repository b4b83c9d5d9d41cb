"""Any encoder gets a classifier of the task's width, the rest as saved; what is lacking is one
line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fedbert_ds.errors import ModelError
from fedbert_ds.glue.checkpoint import check_fits, check_mnli, fingerprint, load_classifier, load_task_tokenizer
from fedbert_ds.tasks.glue_tasks import GLUE


@pytest.mark.parametrize("name", ["RTE", "MNLI", "STS-B"])
def test_the_encoder_is_the_checkpoints_and_the_classifier_the_tasks(checkpoint: str, name: str) -> None:
    task = GLUE[name]
    model = load_classifier(checkpoint, task)
    saved = AutoModelForMaskedLM.from_pretrained(checkpoint).bert.state_dict()
    loaded = model.bert.state_dict()
    assert saved and all(torch.equal(loaded[key], tensor) for key, tensor in saved.items())
    assert model.classifier.out_features == task.num_outputs
    if task.labels is None:
        assert model.config.problem_type == "regression"
    else:
        assert [model.config.id2label[number] for number in range(task.num_outputs)] == list(task.labels)


@pytest.mark.parametrize("model_type", ["roberta", "electra", "distilbert", "albert"])
def test_other_encoders(tmp_path: Path, model_type: str) -> None:
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 90,
    }
    if model_type == "distilbert":
        shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 90}
    config = AutoConfig.for_model(model_type, **shape | ({} if model_type == "distilbert" else {"embedding_size": 16}))
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), GLUE["MNLI"]).config.num_labels == 3


def test_a_classifier_of_another_width_is_replaced_and_one_of_the_same_kept(checkpoint: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load_classifier(checkpoint, GLUE["MNLI"]).save_pretrained(tmp_path)
    kept = load_classifier(str(tmp_path), GLUE["MNLI"]).classifier.weight
    assert torch.equal(kept, AutoModelForSequenceClassification.from_pretrained(tmp_path).classifier.weight)
    assert load_classifier(str(tmp_path), GLUE["RTE"]).classifier.weight.shape == (2, 16)


def copied(checkpoint: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def refused(name: str | Path) -> str:
    with pytest.raises(ModelError) as error:
        load_classifier(str(name), GLUE["RTE"])
    return str(error.value)


def test_what_is_no_whole_checkpoint_is_one_line(checkpoint: str, tmp_path: Path) -> None:
    assert "no config.json there" in refused(tmp_path)
    assert "no config.json there" in refused(tmp_path / "nowhere")
    assert "cannot be loaded as a sequence classifier" in refused("nobody/nothing-at-all")
    folder = copied(checkpoint, tmp_path)
    weights = load_file(folder / "model.safetensors")
    lacking = {key: tensor for key, tensor in weights.items() if "layer.1.attention.self.query" not in key}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    assert "weights of the encoder are missing, bert.encoder.layer.1.attention.self.query" in refused(folder)
    other = {key: tensor.repeat(2, 1).contiguous() if "word_emb" in key else tensor for key, tensor in weights.items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    assert "weights of the encoder are missing, bert.embeddings.word_embeddings" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be loaded" in refused(folder)


def test_a_checkpoint_without_a_tokenizer_is_one_line(checkpoint: str, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer.json in this folder; .* needs its tokenizer beside it"):
        load_task_tokenizer(str(folder))


def test_length_and_vocabulary_must_fit(checkpoint: str) -> None:
    model, tokenizer = load_classifier(checkpoint, GLUE["RTE"]), load_task_tokenizer(checkpoint)
    check_fits(checkpoint, model, tokenizer, 32)
    with pytest.raises(ModelError, match="sequences of 33 tokens do not fit; use --length 32 or less"):
        check_fits(checkpoint, model, tokenizer, 33)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ModelError, match="save its own there"):
        check_fits(checkpoint, model, tokenizer, 32)


def test_only_a_model_of_mnli_is_one(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no head of three labels; --from-mnli"):
        check_mnli(checkpoint)
    load_classifier(checkpoint, GLUE["RTE"]).save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match="has no head of three labels"):
        check_mnli(str(tmp_path / "two"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_mnli(str(tmp_path))
    with pytest.raises(ModelError, match="no checkpoint there"):
        check_mnli("nobody/nothing-at-all")
    load_classifier(checkpoint, GLUE["MNLI"]).save_pretrained(tmp_path / "three")
    check_mnli(str(tmp_path / "three"))


def test_the_fingerprint_is_of_contents_not_of_the_place(checkpoint: str, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    first = fingerprint(checkpoint)
    assert first == fingerprint(str(folder))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(str(folder)) != first
    assert fingerprint("bert-base-uncased") is None
