"""Encoding keeps every token, batches follow seeds and a cursor, masking is transformers'."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbert_ds.data import masking
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import Batch, BatchStream, EncodedText, Masker, check_known, encode
from fedbert_ds.errors import DataError
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARED_FIXTURES = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stream(text: EncodedText, tokenizer: PreTrainedTokenizerFast, **changes: object) -> BatchStream:
    options = {"mask_probability": 0.15, "whole_word": False, "seed": 1, "client": 0} | changes
    return BatchStream(text, tokenizer, **options)  # type: ignore[arg-type]


def unmasked(batch: Batch) -> list[int]:
    ids = batch.input_ids.clone()
    ids[batch.masked_positions] = batch.labels
    return ids.tolist()


def equal(one: Batch, other: Batch) -> bool:
    return one.lengths == other.lengths and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "masked_positions", "labels")
    )


# ---- encode ----


@SHARED_FIXTURES
@given(
    texts=st.lists(st.text(alphabet="ab fed, .\u00ef\u6f22\n", max_size=80), min_size=1, max_size=6),
    sequence_length=st.integers(3, 40),
)
def test_every_token_is_in_one_sequence_in_order(
    any_tokenizer: PreTrainedTokenizerFast, texts: list[str], sequence_length: int
) -> None:
    expected = [
        any_tokenizer(text, add_special_tokens=False, truncation=False, padding=False).input_ids for text in texts
    ]
    articles = [Article("", text) for text in texts]
    if not any(expected):
        with pytest.raises(DataError, match="no token in it"):
            encode(articles, any_tokenizer, sequence_length)
        return
    text = encode(articles, any_tokenizer, sequence_length)
    assert (
        text.tokens.dtype == torch.int32 and text.offsets.dtype == torch.int64 and text.word_starts.dtype == torch.bool
    )
    assert len(text.tokens) == len(text.word_starts) == text.num_tokens == int(text.offsets[-1])
    sequences = [text.tokens[begin:end].tolist() for begin, end in zip(text.offsets, text.offsets[1:], strict=False)]
    assert len(sequences) == text.num_sequences
    for sequence in sequences:
        assert 3 <= len(sequence) <= sequence_length
        assert (sequence[0], sequence[-1]) == (any_tokenizer.cls_token_id, any_tokenizer.sep_token_id)
    assert [token for sequence in sequences for token in sequence[1:-1]] == [token for ids in expected for token in ids]
    # An article of n tokens makes ceil(n / room) sequences: none shared, none short but the last.
    assert text.num_sequences == sum(-(-len(ids) // (sequence_length - 2)) for ids in expected)
    counts = text.token_counts(len(any_tokenizer)).tolist()
    assert Counter(token for ids in expected for token in ids) == {
        token: count for token, count in enumerate(counts) if count
    }


def test_words_are_runs_of_continuation_pieces(wordpiece: PreTrainedTokenizerFast, articles: list[Article]) -> None:
    text = encode(articles, wordpiece, 10_000)
    pieces = wordpiece.convert_ids_to_tokens(text.tokens.tolist())
    assert [not piece.startswith("##") for piece in pieces] == text.word_starts.tolist()


def test_encoding_leaves_the_tokenizer_as_it_was(published: PreTrainedTokenizerFast) -> None:
    before = published.backend_tokenizer.to_str()
    text = encode([Article("", "word " * 1000)], published, 512)
    assert text.num_tokens == 1000 + 2 * 2
    assert published.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("sequence_length", [-1, 0, 2])
def test_sequence_length_without_room(wordpiece: PreTrainedTokenizerFast, sequence_length: int) -> None:
    with pytest.raises(DataError, match="has no room for text; use 3 or more"):
        encode([Article("", "text")], wordpiece, sequence_length)


def test_tokenizers_that_cannot_serve() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    text = [Article("", "a")]
    with pytest.raises(DataError, match=r"no \[CLS\] or \[SEP\] token"):
        encode(text, PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=None, eos_token=None), 8)
    maskless = PreTrainedTokenizerFast(tokenizer_object=bare, cls_token="[CLS]", sep_token="[SEP]")
    with pytest.raises(DataError, match="has no mask token"):
        stream(encode(text, maskless, 8), maskless)


# ---- batches ----


@SHARED_FIXTURES
@given(
    sequence_length=st.integers(3, 50),
    max_tokens=st.integers(1, 400),
    whole_word=st.booleans(),
    mask_probability=st.floats(0.01, 0.99),
    seed=st.integers(-(2**70), 2**70),
)
def test_batch_invariants(
    articles: list[Article],
    any_tokenizer: PreTrainedTokenizerFast,
    sequence_length: int,
    max_tokens: int,
    whole_word: bool,
    mask_probability: float,
    seed: int,
) -> None:
    text = encode(articles[:4], any_tokenizer, sequence_length)
    batches = stream(text, any_tokenizer, mask_probability=mask_probability, whole_word=whole_word, seed=seed)
    remaining = Counter[tuple[int, ...]]()
    known = Counter(
        tuple(text.tokens[begin:end].tolist()) for begin, end in zip(text.offsets, text.offsets[1:], strict=False)
    )
    for window in range(4):
        batch = batches.next_batch(window, max_tokens)
        assert batch.input_ids.dtype == batch.masked_positions.dtype == batch.labels.dtype == torch.int64
        assert sum(batch.lengths) == len(batch.input_ids)
        assert len(batch.lengths) == 1 or len(batch.input_ids) <= max_tokens
        assert batch.masked_positions.shape == batch.labels.shape
        assert (batch.masked_positions.diff() > 0).all()
        if len(batch.masked_positions):
            assert batch.masked_positions[0] >= 0 and batch.masked_positions[-1] < len(batch.input_ids)
        assert not set(batch.labels.tolist()) & set(any_tokenizer.all_special_ids)
        assert batch.input_ids.min() >= 0 and batch.input_ids.max() < len(any_tokenizer)
        original = unmasked(batch)
        for length in batch.lengths:
            remaining[tuple(original[:length])] += 1
            original = original[length:]
    assert set(remaining) <= set(known)
    if batches.state_dict()["epoch"] == 0:
        assert remaining <= known


def test_an_epoch_gives_every_sequence_once_and_the_next_another_order(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast
) -> None:
    text = encode(articles, wordpiece, 30)
    batches = stream(text, wordpiece)
    orders = []
    for epoch in range(2):
        order = []
        for window in range(text.num_sequences):
            order.append(tuple(unmasked(batches.next_batch(window, 1))))
        orders.append(order)
        assert batches.state_dict() == {"epoch": epoch + 1, "position": 0, "sequences": text.num_sequences}
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_batches_are_filled(articles: list[Article], wordpiece: PreTrainedTokenizerFast) -> None:
    batches = stream(encode(articles, wordpiece, 32), wordpiece)
    fill = [len(batches.next_batch(window, 1024).input_ids) for window in range(50)]
    assert min(fill) > 1024 - 32


def test_text_shorter_than_a_batch_is_repeated_and_masked_anew(wordpiece: PreTrainedTokenizerFast) -> None:
    text = encode([Article("", "federated models")], wordpiece, 64)
    batch = stream(text, wordpiece, mask_probability=0.5).next_batch(0, 10 * text.num_tokens)
    assert batch.lengths == [text.num_tokens] * 10
    rows = batch.input_ids.view(10, -1)
    assert unmasked(batch) == text.tokens.tolist() * 10 and len({tuple(row) for row in rows.tolist()}) > 1


@pytest.mark.parametrize("whole_word", [False, True])
def test_resuming_from_the_cursor_is_bit_identical(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast, whole_word: bool
) -> None:
    text = encode(articles, wordpiece, 24)
    whole = stream(text, wordpiece, whole_word=whole_word)
    batches = [whole.next_batch(window, 3000) for window in range(12)]
    assert whole.state_dict()["epoch"] >= 1
    for stop in range(12):
        first = stream(text, wordpiece, whole_word=whole_word)
        for window in range(stop):
            first.next_batch(window, 3000)
        resumed = stream(text, wordpiece, whole_word=whole_word)
        resumed.load_state_dict(first.state_dict())
        assert all(equal(resumed.next_batch(window, 3000), batches[window]) for window in range(stop, 12))
        assert resumed.state_dict() == whole.state_dict()


def test_seed_client_and_window_each_matter(articles: list[Article], wordpiece: PreTrainedTokenizerFast) -> None:
    text = encode(articles, wordpiece, 24)
    batch = stream(text, wordpiece).next_batch(5, 500)
    assert equal(batch, stream(text, wordpiece).next_batch(5, 500))
    others = [
        stream(text, wordpiece, seed=2).next_batch(5, 500),
        stream(text, wordpiece, client=1).next_batch(5, 500),
        stream(text, wordpiece, client="clinic").next_batch(5, 500),
    ]
    assert all(unmasked(other) != unmasked(batch) for other in others)
    other_window = stream(text, wordpiece).next_batch(6, 500)
    assert unmasked(other_window) == unmasked(batch) and not equal(other_window, batch)


def test_a_cursor_of_more_text_is_refused(articles: list[Article], wordpiece: PreTrainedTokenizerFast) -> None:
    whole, less = encode(articles, wordpiece, 24), encode(articles[:-1], wordpiece, 24)
    state = stream(whole, wordpiece).state_dict()
    message = f"^the shard has {less.num_sequences} sequences, but had {whole.num_sequences} before in this run; go on"
    with pytest.raises(DataError, match=message):
        stream(less, wordpiece).load_state_dict(state)


def test_no_cursor_is_the_beginning(articles: list[Article], wordpiece: PreTrainedTokenizerFast) -> None:
    text = encode(articles, wordpiece, 24)
    batches = stream(text, wordpiece)
    first = batches.next_batch(0, 500)
    while batches.state_dict()["epoch"] == 0:
        batches.next_batch(1, 3000)
    batches.load_state_dict(None)
    assert batches.state_dict() == {"epoch": 0, "position": 0, "sequences": text.num_sequences}
    assert equal(batches.next_batch(0, 500), first)


@pytest.mark.parametrize("drawn", [0, 3])
def test_text_added_behind_the_old_one_joins_in_the_next_epoch(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast, drawn: int
) -> None:
    """Until then batches are those of the old text, bit for bit; then every sequence comes once."""
    old, new = encode(articles[:-1], wordpiece, 24), encode(articles, wordpiece, 24)
    assert new.tokens[: old.num_tokens].tolist() == old.tokens.tolist() and new.num_sequences > old.num_sequences
    before = stream(old, wordpiece)
    for window in range(drawn):
        before.next_batch(window, 1)
    grown = stream(new, wordpiece)
    grown.load_state_dict(before.state_dict())
    for window in range(drawn, old.num_sequences):
        assert grown.state_dict()["sequences"] == old.num_sequences
        assert equal(grown.next_batch(window, 1), before.next_batch(window, 1))
        # A window of the old epoch can be undone, too.
        again = stream(new, wordpiece)
        again.load_state_dict(grown.state_dict())
        assert again.state_dict() == grown.state_dict()
    assert grown.state_dict() == {"epoch": 1, "position": 0, "sequences": new.num_sequences}
    epoch = [tuple(unmasked(grown.next_batch(window, 1))) for window in range(new.num_sequences)]
    bounds = zip(new.offsets, new.offsets[1:], strict=False)
    assert Counter(epoch) == Counter(tuple(new.tokens[begin:end].tolist()) for begin, end in bounds)
    fresh = stream(new, wordpiece)
    fresh.load_state_dict({"epoch": 1, "position": 0, "sequences": new.num_sequences})
    assert [tuple(unmasked(fresh.next_batch(window, 1))) for window in range(new.num_sequences)] == epoch


def test_masks_are_these_on_every_machine() -> None:
    # Resuming elsewhere, or after an update of numpy, must not change the data silently.
    assert generator("mask", 1, 0, 7).integers(1000, size=6).tolist() == [975, 805, 756, 696, 699, 609]
    assert generator("mask", 1, 0, 7).random(3).round(6).tolist() == [0.805505, 0.696083, 0.609005]
    assert generator("shuffle", 1, 0, 0).permutation(8).tolist() == [2, 6, 4, 5, 1, 0, 7, 3]


# ---- the distribution of masks ----


def assert_fits(observed: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's chi-square of counts against expected counts, at five standard deviations."""
    degrees = observed.size - 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < degrees + 5 * np.sqrt(2 * degrees), (statistic, observed, expected)


def masked_by_us(
    text: EncodedText, tokenizer: PreTrainedTokenizerFast, p: float, whole_word: bool, rounds: int
) -> list:
    masker = Masker(tokenizer, mask_probability=p, whole_word=whole_word)
    tokens, word_starts = text.tokens.numpy(), text.word_starts.numpy()
    results = []
    for number in range(rounds):
        input_ids, positions, labels = masker.mask(tokens, word_starts, generator("test", number))
        all_labels = np.full_like(input_ids, -100)
        all_labels[positions] = labels
        results.append((input_ids, all_labels))
    return results


def masked_by_transformers(text: EncodedText, tokenizer: PreTrainedTokenizerFast, p: float, rounds: int) -> list:
    from transformers import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=p, seed=0)
    results = []
    for _ in range(rounds):
        batch = collator([text.tokens.tolist()])
        results.append((batch["input_ids"][0].numpy(), batch["labels"][0].numpy()))
    return results


def fates(results: list, mask_id: int) -> np.ndarray:
    """Tokens not chosen, chosen and turned to [MASK], to another token, left as they are: [4]."""
    counts = np.zeros(4)
    for input_ids, labels in results:
        chosen = labels != -100
        hidden, kept = chosen & (input_ids == mask_id), chosen & (input_ids == labels)
        counts += [(~chosen).sum(), hidden.sum(), (chosen & ~hidden & ~kept).sum(), kept.sum()]
    return counts


@pytest.mark.parametrize("p", [0.15, 0.4])
def test_selection_and_80_10_10_are_transformers(
    articles: list[Article], any_tokenizer: PreTrainedTokenizerFast, p: float
) -> None:
    text = encode(articles, any_tokenizer, 64)
    rounds, mask_id, size = 8, any_tokenizer.mask_token_id, len(any_tokenizer)
    special = np.isin(text.tokens.numpy(), any_tokenizer.all_special_ids)
    eligible, ineligible = rounds * int((~special).sum()), rounds * int(special.sum())
    # A random token is [MASK] or the original itself once in `size` draws each.
    chosen_fates = np.array([0.8 + 0.1 / size, 0.1 * (1 - 2 / size), 0.1 + 0.1 / size])
    expected = np.concatenate([[eligible * (1 - p)], eligible * p * chosen_fates])
    for results in (
        masked_by_us(text, any_tokenizer, p, False, rounds),
        masked_by_transformers(text, any_tokenizer, p, rounds),
    ):
        observed = fates(results, mask_id)
        observed[0] -= ineligible
        assert_fits(observed, expected)
        for input_ids, labels in results:
            assert (labels[special] == -100).all() and (input_ids[special] == text.tokens.numpy()[special]).all()


def test_every_position_is_as_likely(wordpiece: PreTrainedTokenizerFast) -> None:
    text = encode([Article("", "federated models " * 15)], wordpiece, 64)
    rounds = 4000
    for whole_word in (False, True):
        counts = sum(
            (labels != -100).astype(float) for _, labels in masked_by_us(text, wordpiece, 0.3, whole_word, rounds)
        )
        special = np.isin(text.tokens.numpy(), wordpiece.all_special_ids)
        deviation = (counts[~special] - 0.3 * rounds) / np.sqrt(rounds * 0.3 * 0.7)
        assert np.abs(deviation).max() < 5
        assert (counts[special] == 0).all()


def test_random_tokens_are_uniform_over_the_whole_vocabulary(wordpiece: PreTrainedTokenizerFast) -> None:
    # One token only, so that what replaced it can be counted without regard to what it was.
    original = wordpiece.convert_tokens_to_ids("s")
    length = 20_000
    text = EncodedText(
        tokens=torch.full((length,), original, dtype=torch.int32),
        offsets=torch.tensor([0, length]),
        word_starts=torch.ones(length, dtype=torch.bool),
    )
    others = np.setdiff1d(np.arange(len(wordpiece)), [original, wordpiece.mask_token_id])
    for results in (
        masked_by_us(text, wordpiece, 0.9, False, 10),
        masked_by_transformers(text, wordpiece, 0.9, 10),
    ):
        counts = sum(np.bincount(input_ids, minlength=len(wordpiece)) for input_ids, _ in results)[others]
        assert_fits(counts, np.full(len(others), counts.sum() / len(others)))
        assert abs(counts.sum() / (10 * length * 0.9) - 0.1 * len(others) / len(wordpiece)) < 0.004


@SHARED_FIXTURES
@given(seed=st.integers(0, 10_000), p=st.floats(0.05, 0.9))
def test_whole_words_are_never_split(
    articles: list[Article], any_tokenizer: PreTrainedTokenizerFast, seed: int, p: float
) -> None:
    text = encode(articles[:6], any_tokenizer, 32)
    masker = Masker(any_tokenizer, mask_probability=p, whole_word=True)
    _, positions, _ = masker.mask(text.tokens.numpy(), text.word_starts.numpy(), generator(seed))
    chosen = np.zeros(text.num_tokens, dtype=bool)
    chosen[positions] = True
    words = np.cumsum(text.word_starts.numpy()) - 1
    sizes, chosen_sizes = np.bincount(words), np.bincount(words, weights=chosen)
    assert set(np.unique(chosen_sizes / sizes)) <= {0.0, 1.0}


def test_whole_words_are_chosen_as_often_as_transformers_chooses_them(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast
) -> None:
    from transformers import DataCollatorForLanguageModeling

    # Without punctuation, which the two cut differently: transformers joins "don't", BERT's pieces
    # do not.
    plain = [Article("", article.text.partition(".")[0]) for article in articles]
    text = encode(plain, wordpiece, 10_000)
    words = np.cumsum(text.word_starts.numpy()) - 1
    sizes = np.bincount(words)
    counted = (sizes > 1) | ~np.isin(text.tokens.numpy()[text.word_starts.numpy()], wordpiece.all_special_ids)
    rounds, p = 10, 0.2
    ours = sum(
        np.bincount(words, weights=labels != -100) / sizes
        for _, labels in masked_by_us(text, wordpiece, p, True, rounds)
    )[counted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collator = DataCollatorForLanguageModeling(wordpiece, mlm_probability=p, whole_word_mask=True, seed=0)
    encoded = [
        wordpiece(article.text, return_offsets_mapping=True, return_special_tokens_mask=True) for article in plain
    ]
    theirs_chosen, theirs_words = 0.0, 0
    for _ in range(rounds):
        for example in encoded:
            labels = collator([dict(example)])["labels"][0].numpy()
            starts = np.array(
                [not piece.startswith("##") for piece in wordpiece.convert_ids_to_tokens(example["input_ids"])]
            )
            index = np.cumsum(starts) - 1
            share = np.bincount(index, weights=labels != -100) / np.bincount(index)
            assert set(np.unique(share)) <= {0.0, 1.0}
            theirs_chosen += share.sum()
            theirs_words += len(share) - 2
    assert theirs_words == rounds * len(ours)
    deviation = np.sqrt(theirs_words * p * (1 - p))
    assert abs(ours.sum() - theirs_words * p) < 5 * deviation
    assert abs(theirs_chosen - theirs_words * p) < 5 * deviation


def test_whole_words_keep_80_10_10_for_each_token(articles: list[Article], wordpiece: PreTrainedTokenizerFast) -> None:
    observed = fates(masked_by_us(encode(articles, wordpiece, 64), wordpiece, 0.3, True, 6), wordpiece.mask_token_id)[
        1:
    ]
    size = len(wordpiece)
    expected = np.array([0.8 + 0.1 / size, 0.1 * (1 - 2 / size), 0.1 + 0.1 / size]) * observed.sum()
    assert_fits(observed, expected)


def test_a_tokenizer_that_misses_much_of_the_text_is_told(
    wordpiece: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(text: str) -> str:
        check_known(encode([Article("a", text)], wordpiece, 16), wordpiece)
        return capsys.readouterr().out

    told = check("model " * 20 + "ж " * 5)
    assert told.startswith("warning ") and "% of the text's tokens are [UNK]" in told
    assert not check("model " * 1000 + "ж")
    with pytest.raises(DataError, match=r"knows no word of this text, all of it is \[UNK\]; name another"):
        check("ж " * 5)


def test_long_articles_are_tokenized_in_parts_as_whole_ones_are(
    articles: list[Article], any_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in the making takes a hundred times its memory; an article may be a book."""
    long = [Article("a", " ".join(article.text for article in articles[:12])), articles[0]]
    whole = encode(long, any_tokenizer, 24)
    monkeypatch.setattr(masking.parts_of, "__defaults__", (150,))
    assert len(list(masking.parts_of(long[0].text))) > 20
    parts = encode(long, any_tokenizer, 24)
    for ours, theirs in zip(parts.arrays(), whole.arrays(), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("text", ["ab" * 50, "a b" * 40, "äö üß " * 30, "", "a", "word " * 10 + "x" * 90])
def test_parts_are_the_text_and_none_is_too_long(text: str) -> None:
    parts = list(masking.parts_of(text, 20))
    assert "".join(part for part, _ in parts) == text
    assert all(len(part) <= 20 for part, _ in parts)
    assert [is_last for _, is_last in parts] == [False] * (len(parts) - 1) + [True]
