"""Text that the server deals: shards, held-out articles and tokenizer in the run's folder, and read
back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import train_wordpiece, vocabulary_hash
from fedbert_ds.errors import ConfigError, DataError
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.checkpoint_folder import Layout
from fedbert_ds.server.local_clients import client_name
from fedbert_ds.server.prepare import is_prepared, prepare_text, prepared_text
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.tasks.rows import read_rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "articles.jsonl"
    words = ["ward", "patient", "dose", "fever", "nurse", "chart"]
    write_shard(path, [Article(f"note {n}", " ".join(words[n % 3 :] * (n + 1))) for n in range(20)])
    return path


def config_of(source: Path, **sections: object) -> RunConfig:
    tree: dict[str, object] = {
        "data": {"source": [str(source)], "held_out": 0.2},
        "tokenizer": {"vocab_size": 70},
        "clients": {"expected": 3, "local": 3},
    }
    return parse_config({**tree, **sections}, "test")


def test_every_article_is_dealt_to_one_client_or_held_out(tmp_path: Path, source: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    assert not is_prepared(folder)
    tokenizer, facts = prepare_text(config_of(source), folder)
    assert is_prepared(folder)
    dealt = [[a.title for a in read_articles([str(folder.shard(client_name(n)))])] for n in range(3)]
    held_out = [article.title for article in read_articles([str(folder.held_out)])]
    titles = sorted([title for shard in dealt for title in shard] + held_out)
    assert titles == sorted(f"note {n}" for n in range(20)) and len(held_out) == 4
    assert facts is not None and facts.articles == 20 and facts.held_out == 4
    assert facts.shard_articles == tuple(len(shard) for shard in dealt)
    again, read = prepared_text(folder)
    assert vocabulary_hash(again) == vocabulary_hash(tokenizer) and read == facts


def test_the_same_seed_deals_the_same(tmp_path: Path, source: Path) -> None:
    def held_out(name: str, seed: int) -> bytes:
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir()
        prepare_text(config_of(source, run={"seed": seed}), folder)
        return folder.held_out.read_bytes()

    assert held_out("one", 1) == held_out("two", 1) != held_out("three", 2)


def save_renumbered(folder: Path, source: Path, change: str) -> None:
    """A tokenizer of the source: as it is, with two words' numbers swapped, or with one more."""
    tokenizer = train_wordpiece(list(read_articles([str(source)])), 70)
    tokenizer.save_pretrained(folder)
    if change == "added":
        tokenizer.add_tokens(["a-word-of-its-own"])
        tokenizer.save_pretrained(folder)
    if change == "swapped":
        path = folder / "tokenizer.json"
        tree = json.loads(path.read_text())
        words = tree["model"]["vocab"]
        words["ward"], words["dose"] = words["dose"], words["ward"]
        path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "warns"), [("none", False), ("added", False), ("swapped", True), ("no tokenizer there", False)]
)
def test_a_tokenizer_with_other_numbers_than_the_checkpoint_s_is_warned_of(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], change: str, warns: bool
) -> None:
    """Of equal size it fits, and every word is another one's row."""
    if change == "no tokenizer there":
        (tmp_path / "checkpoint").mkdir()
    else:
        save_renumbered(tmp_path / "checkpoint", source, "none")
    save_renumbered(tmp_path / "named", source, change)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    paths = {"tokenizer": {"path": str(tmp_path / "named")}, "model": {"checkpoint": str(tmp_path / "checkpoint")}}
    prepare_text(config_of(source, **paths), folder)
    out = capsys.readouterr().out
    assert bool(re.search(r"named has 2 of \d+ tokens of model\.checkpoint", out)) is warns
    assert ("drop tokenizer.path to take the checkpoint's own" in out) is warns


@pytest.mark.parametrize("local", [0, 3])
def test_a_tokenizer_of_shorter_texts_is_told_before_the_run(tmp_path: Path, source: Path, local: int) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    tokenizer, _ = prepare_text(config_of(source), folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path / "short")

    def config(length: int) -> RunConfig:
        return config_of(
            source,
            tokenizer={"path": str(tmp_path / "short")},
            data={"source": [str(source)], "held_out": 0.2, "sequence_length": length},
            clients={"expected": 3, "local": local},
        )

    with pytest.raises(ConfigError, match=r"data\.sequence_length 65 is longer than .*short takes; lower it to 64"):
        prepare_text(config(65), folder)
    prepare_text(config(64), folder)


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize(
    ("lacks", "reason"), [("mask_token", "has no mask token"), ("cls_token", r"has no \[CLS\] or \[SEP\] token")]
)
def test_a_tokenizer_that_makes_no_sequences_is_told_before_the_run(
    tmp_path: Path, source: Path, local: int, lacks: str, reason: str
) -> None:
    tokenizer = train_wordpiece([Article("", "ward patient dose fever")], 70)
    setattr(tokenizer, lacks, None)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map
    ).save_pretrained(tmp_path / "named")
    (tmp_path / "run").mkdir()
    config = config_of(source, tokenizer={"path": str(tmp_path / "named")}, clients={"expected": 3, "local": local})
    with pytest.raises(DataError, match=reason):
        prepare_text(config, RunFolder(tmp_path / "run"))


def test_without_local_clients_a_tokenizer_must_be_named(tmp_path: Path, source: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    remote = {"expected": 3, "local": 0}
    with pytest.raises(ConfigError, match=r"tokenizer\.path: name a tokenizer"):
        prepare_text(config_of(source, clients=remote), folder)
    first = RunFolder(tmp_path / "first")
    first.path.mkdir()
    trained, _ = prepare_text(config_of(source), first)
    named = {"path": str(first.tokenizer)}
    tokenizer, facts = prepare_text(config_of(source, clients=remote, tokenizer=named), folder)
    assert facts is None and vocabulary_hash(tokenizer) == vocabulary_hash(trained)
    assert is_prepared(folder) and prepared_text(folder)[1] is None


def test_a_preparation_that_was_cut_short_does_not_count(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_text(config_of(source), folder)
    assert folder.held_out.exists() and not is_prepared(folder)
    _, facts = prepare_text(config_of(source), folder)
    assert prepared_text(folder)[1] == facts


def test_a_run_of_an_earlier_version_that_has_saved_is_prepared(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.draft.of(3).mkdir(parents=True)
    folder.checkpoints.mark_complete(3, Layout(1, 0))
    assert is_prepared(folder)


def test_a_shard_too_small_to_hold_text_out_is_refused_at_once(tmp_path: Path, source: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    data = {"source": [str(source)], "held_out": 0.2, "client_held_out": 0.1, "max_articles": 6, "shards": "equal"}
    with pytest.raises(DataError, match=r"data\.client_held_out: a local client has 1 article, which cannot"):
        prepare_text(config_of(source, data=data), folder)
    prepare_text(config_of(source, data=data | {"client_held_out": 0.0}), folder)


def test_labelled_examples_are_dealt_in_the_tasks_own_columns(tmp_path: Path) -> None:
    source = tmp_path / "notes.tsv"
    source.write_text("note\tgrade\n" + "".join(f"fever {n}\t{'low' if n % 3 else 'high'}\n" for n in range(20)))
    task = {"name": "sequence_classification", "labels": ["low", "high"], "text": ["note"], "label": "grade"}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    _, facts = prepare_text(config_of(source, task=task), folder)
    assert facts is not None and facts.articles == 20 and facts.held_out == 4
    assert "20 examples, 16 for 3 clients" in facts.sentence and prepared_text(folder)[1] == facts
    paths = [folder.held_out, *(folder.shard(client_name(n)) for n in range(3))]
    rows = [row for path in paths for _, row in read_rows([str(path)])]
    assert sorted((row["text"], row["label"]) for row in rows) == sorted(
        (f"fever {n}", 0 if n % 3 else 1) for n in range(20)
    )


def test_an_example_that_is_none_is_told_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "notes.jsonl"
    source.write_text('{"text": "fever", "label": "low"}\n{"text": "dose", "label": "medium"}\n')
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    task = {"name": "sequence_classification", "labels": ["low", "high"]}
    with pytest.raises(DataError, match=r"notes.jsonl: line 2: label 'medium' is none of the task's; use low, high"):
        prepare_text(config_of(source, task=task), folder)
    assert not list(folder.path.iterdir())


def test_each_client_has_the_articles_of_one_source(tmp_path: Path) -> None:
    sources = [tmp_path / f"{name}.jsonl" for name in ("ward", "lab")]
    for count, path in zip((12, 5), sources, strict=True):
        write_shard(path, [Article(f"{path.stem} {n}", f"{path.stem} note {n} " * 9) for n in range(count)])
    data = {"source": [str(path) for path in sources], "shards": "source", "held_out": 0.2, "max_articles": 10}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    two = {"data": data, "clients": {"expected": 2, "local": 2}}
    _, facts = prepare_text(config_of(sources[0], **two), folder)
    dealt = [[a.title for a in read_articles([str(folder.shard(client_name(n)))])] for n in range(2)]
    held_out = [article.title for article in read_articles([str(folder.held_out)])]
    for path, titles, kept, count in zip(sources, dealt, (8, 4), (10, 5), strict=True):
        own = [title for title in held_out if title.startswith(path.stem)]
        assert len(titles) == kept and titles == sorted(titles, key=lambda title: int(title.split()[1]))
        assert sorted(titles + own) == sorted(f"{path.stem} {n}" for n in range(count))
    assert facts is not None and facts.articles == 15 and facts.shard_articles == (8, 4) and facts.held_out == 3


def test_a_source_too_small_for_its_client_is_named(tmp_path: Path, source: Path) -> None:
    lone = tmp_path / "lone.jsonl"
    write_shard(lone, [Article("only", "one note")])
    data = {"source": [str(source), str(lone)], "shards": "source"}
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(DataError, match=r"lone\.jsonl: 1 article cannot be both trained on and held out"):
        prepare_text(config_of(source, data=data, clients={"expected": 2, "local": 2}), folder)
