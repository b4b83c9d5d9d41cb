"""The console command: `eval` prints the same number each time, a mistake is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedbert_ds.certificates.authority import Authority
from fedbert_ds.cli import build_parser, main
from fedbert_ds.client import session
from fedbert_ds.client.session import ClientOptions
from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.tasks.registry import TASKS

TEXT = [Article("one", "the quick brown fox jumps over the lazy dog and runs away from it " * 8)]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    tokenizer = train_wordpiece(TEXT, 100)
    section = ModelSection(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=32)
    build_model(section, len(tokenizer), tokenizer.pad_token_id, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_shard(tmp_path / "text.jsonl", TEXT)
    return tmp_path


def test_eval_prints_loss_and_perplexity_the_same_each_time(checkpoint, capsys) -> None:
    arguments = ["eval", "--model", str(checkpoint / "model"), "--data", str(checkpoint / "text.jsonl"), "--seed", "3"]
    main(arguments)
    first = capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out == first
    result = evaluate_masked_lm(checkpoint / "model", [str(checkpoint / "text.jsonl")], seed=3)
    assert f"loss {result.loss:.4f} nats, perplexity {result.perplexity:.2f}" in first
    assert f"{result.masked_tokens:,} masked tokens" in first


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["eval", "--model", "nowhere/at-all", "--data", "text.jsonl"], "nowhere/at-all"),
        (["eval", "--model", "m", "--data", "d", "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["eval", "--model", "m", "--data", "d", "--workers", "-1"], "--workers -1: at least 1"),
        (["client", "--server", "x:1", "--data", "y", "--cut", "middle"], "--cut middle: choose"),
        (["client", "--server", "x:1", "--data", "y", "--cut", "layers:0"], "--cut layers:0: choose"),
        (["aggregator", "--config", "no.yaml"], "no.yaml: no such run file"),
        (["aggregator", "--config", "empty.yaml"], "aggregator: the run file has no such section"),
        (["merge", "--body", "b", "--client-model", "c", "--out", "o"], "b/body.safetensors: no half of a run"),
        (["client", "--server", "x:1", "--data", "y", "--task", "poetry"], "--task poetry: choose masked_lm, sequence"),
        (["client", "--server", "x:1", "--data", "y", "--label-column", "grade"], "is for labelled files; add --task"),
        (
            ["client", "--server", "x:1", "--data", "y", "--task", "token_classification", "--text-columns", "a", "b"],
            "--text-columns a b: token_classification reads fewer",
        ),
        (["client", "--server", "x:1", "--data", "y", "--held-out", "1.5"], "--held-out 1.5: a share of the text"),
        (["client", "--server", "x:1", "--data", "y", "--ca", "ca.pem"], "--ca, --certificate and --key"),
        (["client", "--server", "x:1", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["client", "--server", "x:1", "--data", "text.txt"], "x:1 is beyond this machine, and without TLS anybody"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(arguments, says, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "text.txt").write_text("the quick brown fox")
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedbert-ds: ")]
    assert exit_.value.code not in (0, None) and len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ([], 3600.0),
        (["--rejoin-timeout", "7"], 7.0),
        (["--managed"], 0.0),
        (["--managed", "--rejoin-timeout", "7"], 0.0),
    ],
    ids=str,
)
def test_a_client_joins_again_unless_a_launcher_sees_to_it(monkeypatch, words, seconds) -> None:
    given: list[ClientOptions] = []
    monkeypatch.setattr(session, "run_client", lambda options: given.append(options) or 75)
    with pytest.raises(SystemExit) as exit_:
        main(["client", "--server", "run/server.address", "--data", "y", "--id", "ada", *words])
    assert exit_.value.code == 75
    assert given[0].rejoin_timeout == seconds and given[0].server == "run/server.address"


@pytest.mark.parametrize(
    ("words", "cache"),
    [
        ([], Path("fedbert-ada/tokens")),
        (["--state", "mine"], Path("mine/tokens")),
        (["--cache", "large"], Path("large/ada/tokens")),
        (["--cache", "off"], None),
    ],
    ids=str,
)
def test_tokens_are_kept_in_a_clients_own_folder(monkeypatch, words, cache) -> None:
    given: list[ClientOptions] = []
    monkeypatch.setattr(session, "run_client", lambda options: given.append(options) or 0)
    with pytest.raises(SystemExit):
        main(["client", "--server", "x:1", "--data", "y", "--id", "ada", *words])
    assert given[0].cache == cache


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Options with hospital-a's certificate."""
    authority = Authority(tmp_path / "certs")
    authority.create("an authority", 100)
    certificate = authority.issue("hospital-a", 90)
    key = str(certificate.with_suffix(".key"))
    return ["--ca", str(tmp_path / "certs" / "ca.pem"), "--certificate", str(certificate), "--key", key]


@pytest.mark.parametrize("words", [[], ["--id", "hospital-a"]], ids=str)
def test_a_client_has_its_certificate_s_name(monkeypatch, files, words) -> None:
    given: list[ClientOptions] = []
    monkeypatch.setattr(session, "run_client", lambda options: given.append(options) or 0)
    monkeypatch.setenv("FEDBERT_CLIENT_TOKEN", "a secret")
    with pytest.raises(SystemExit):
        main(["client", "--server", "x:1", "--data", "y", *files, *words])
    assert given[0].name == "hospital-a" and given[0].state_folder == Path("fedbert-hospital-a")
    assert given[0].token == "a secret" and "a secret" not in repr(given[0])
    assert "FEDBERT_CLIENT_TOKEN" not in os.environ, "no process of its own inherits it"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--id", "hospital-b"], "--id hospital-b: the certificate is that of hospital-a; drop --id"),
        (["--server", "far.example:1"], "far.example:1: no server answers"),
    ],
)
def test_another_name_than_the_certificate_s_is_one_line(capsys, files, tmp_path, words, says) -> None:
    (tmp_path / "notes.txt").write_text("the quick brown fox")
    with pytest.raises(SystemExit):
        main(
            [
                "client",
                "--server",
                "x:1",
                "--data",
                str(tmp_path / "notes.txt"),
                "--connect-timeout",
                "0.1",
                *files,
                *words,
            ]
        )
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["two words", "x" * 65, "\x1b[2J"])
def test_a_name_that_cannot_be_is_one_line(capsys, name) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["client", "--server", "x:1", "--data", "y", "--id", name])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "a name is up to 64 letters" in line and line.isprintable()


def test_eval_of_a_fine_tuned_model_prints_its_measures(tmp_path, capsys) -> None:
    tokenizer = train_wordpiece(TEXT, 100)
    section = ModelSection(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=32)
    task = TASKS["sequence_classification"](("no", "yes"))
    build_model(section, len(tokenizer), tokenizer.pad_token_id, 0, task).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("note,grade\nthe fox,yes\na dog,no\n")
    main(["eval", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.csv"),
          "--text-columns", "note", "--label-column", "grade"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "accuracy 0.5000" in printed and "2 labels in 2 examples" in printed


def test_a_path_that_no_shell_has_seen_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an equals sign, say, or in a service's or a container's command."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("WARD", "/mnt/ward")
    command = ["client", "--server=~/server.address", "--data", "~/a.txt", "$WARD/b.csv", "hub:imdb", "--state=~/s"]
    options = build_parser().parse_args([*command, "--cache=$WARD/tokens", "--model=~/bert", "--ca=~/ca.pem"])
    assert options.data == ["/home/ada/a.txt", "/mnt/ward/b.csv", "hub:imdb"]
    assert (options.server, options.cache, options.model) == (
        "/home/ada/server.address",
        "/mnt/ward/tokens",
        "/home/ada/bert",
    )
    assert (options.state, options.ca) == (Path("/home/ada/s"), Path("/home/ada/ca.pem"))
