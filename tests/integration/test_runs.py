"""Whole runs compared with each other and with centralized training: resume, modes, precision,
bytes on the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from integration.cluster import CLIENTS, WINDOWS, ZERO, Centralized, run_file, run_jobs, write_text
from torch import Tensor
from transformers import AutoModelForMaskedLM

from fedbert_ds.client.state import load_state, saved_windows
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.federation.reference import Reference
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.run_file import load_config
from fedbert_ds.server.checkpoint import read_client_model
from fedbert_ds.server.checkpoint_folder import CheckpointFolder
from fedbert_ds.server.cursors import Cursor

pytestmark = pytest.mark.timeout(900)

DROPOUT = {"dropout": 0.1}
RESUMED = {
    "zero2": {"body": {"deepspeed": str(ZERO / "zero2.json")}},
    "zero3-rows-lamb": {
        "body": {"deepspeed": str(ZERO / "zero3.json")}, "cut": "rows", "optimizer": {"name": "lamb", "lr": 0.01},
    },
    "zero0-layers-parallel": {
        "body": {"deepspeed": str(ZERO / "zero0.json")}, "cut": {"layers": 1},
        "federation": {"mode": "parallel", "average_every": 2, "average_scope": "embeddings"},
    },
    "zero1-parallel-adam": {
        "body": {"deepspeed": str(ZERO / "zero1.json")},
        "federation": {"mode": "parallel", "server_optimizer": "adam", "server_lr": 0.02, "proximal": 0.1},
    },
    "zero1-bf16": {"body": {"deepspeed": str(ZERO / "zero1.json"), "precision": "bf16"}},
}  # fmt: skip
FIXED = {"order": "fixed"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Every run of this file, in the same five processes."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_text(folder)
    jobs: list[dict[str, Any]] = []

    def add(
        name: str, resume: bool = False, mutation: str | None = None, forget: bool = False, **sections: Any
    ) -> None:
        tree = run_file(folder, name, **sections)
        jobs.append({"config": tree, "resume": resume, "data": data, "mutation": mutation, "forget": forget})

    for name, sections in RESUMED.items():
        sections = {**sections, "model": DROPOUT, "window": FIXED}
        # Without compression the bytes can be searched. The resumed run has it and must not differ:
        # it is lossless.
        add(f"{name}-whole", **sections, wire={"compression": "none"})
        add(f"{name}-resumed", mutation="stopped before window 3", **sections)
        # Where all halves are alike, no client needs anything of its own to go on.
        add(f"{name}-resumed", resume=True, forget=not _has_personal_halves(name), **sections)
    add("zero2-again", model=DROPOUT, window=FIXED, **RESUMED["zero2"])
    add("zero2-arrival", model=DROPOUT, window={"order": "arrival"}, **RESUMED["zero2"])
    for stage in (0, 2, 3):
        body = {"deepspeed": str(ZERO / f"zero{stage}.json"), "activation_checkpointing": True}
        add(f"checkpointing-{stage}", model=DROPOUT, window=FIXED, body=body)
        add(f"bf16-{stage}", body={"deepspeed": str(ZERO / f"zero{stage}.json"), "precision": "bf16"})
    sgd = {"name": "sgd", "lr": 0.5}
    add("parallel-1", optimizer=sgd, federation={"mode": "parallel", "average_every": 1})
    for scope in ("embeddings", "head"):
        for parts in ("kept", "averaged"):
            federation = {"mode": "parallel", "average_every": WINDOWS, "average_scope": scope, "personal_parts": parts}
            add(f"parallel-{scope}-{parts}", federation=federation, wire={"compression": "none"})
    for codec in ("bf16", "int8"):
        add(f"wire-{codec}", wire={"activations": codec, "gradients": codec})
    mixed = {"activations": "int4_hadamard", "hidden": "fp8_e4m3", "gradients": "int8_group", "updates": "int8"}
    add("wire-mixed", cut="rows", wire=mixed)
    add("rows", cut="rows", wire={"compression": "none"})
    run_jobs(folder, jobs)
    return folder, data


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(runs, name) -> None:
    folder, _ = runs
    whole, resumed = folder / f"{name}-whole", folder / f"{name}-resumed"
    _assert_bit_identical(_weights(whole), _weights(resumed))
    assert [row["loss"] for row in _metrics(whole)] == [row["loss"] for row in _metrics(resumed)]
    (one, one_cursors), (other, other_cursors) = (_client_model(run) for run in (whole, resumed))
    _assert_bit_identical(one.weights, other.weights)
    assert one.version == other.version and one_cursors == other_cursors
    assert one_cursors.keys() == CLIENTS.keys() and all(cursor["position"] for cursor in one_cursors.values())
    assert one.optimizer.keys() == other.optimizer.keys()
    for parameter, state in one.optimizer.items():
        assert state.keys() == other.optimizer[parameter].keys()
        for key, value in state.items():
            again = other.optimizer[parameter][key]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again)), (parameter, key)
    if _has_personal_halves(name):
        for client in CLIENTS:
            mine, later = (load_state(run / "clients" / client, WINDOWS) for run in (whole, resumed))
            _assert_bit_identical(mine["half"], later["half"])
            assert str(mine["optimizer"]) == str(later["optimizer"])
    else:
        final = _weights(resumed)
        assert one.version == WINDOWS and one.optimizer.keys() == one.weights.keys()
        assert all(torch.equal(final[parameter], weights) for parameter, weights in one.weights.items())
        assert not any(saved_windows(run / "clients" / client) for run in (whole, resumed) for client in CLIENTS)


def test_a_run_with_a_server_optimizer_learns(runs) -> None:
    folder, _ = runs
    losses = [row["loss"] for row in _metrics(folder / "zero1-parallel-adam-whole")]
    assert losses[-1] < losses[0] - 0.1


def test_the_interrupted_run_was_saved_at_the_window_it_stopped_before(runs) -> None:
    folder, _ = runs
    assert CheckpointFolder(folder / "zero2-resumed" / "checkpoints").complete_windows() == {3, WINDOWS}
    assert CheckpointFolder(folder / "zero2-whole" / "checkpoints").complete_windows() == {WINDOWS}
    assert 3 in saved_windows(folder / "zero0-layers-parallel-resumed" / "clients" / "ada")
    assert 3 not in saved_windows(folder / "zero0-layers-parallel-whole" / "clients" / "ada")


def test_order_fixed_is_bit_identical_between_runs(runs) -> None:
    folder, _ = runs
    _assert_bit_identical(_weights(folder / "zero2-whole"), _weights(folder / "zero2-again"))


def test_dropout_depends_neither_on_order_nor_on_recomputation(runs) -> None:
    folder, _ = runs
    expected = _weights(folder / "zero2-whole")
    for name in ("zero2-arrival", "checkpointing-0", "checkpointing-2", "checkpointing-3"):
        assert _largest_difference(_weights(folder / name), expected) < 1e-5, name


@pytest.mark.parametrize("name", ["bf16-0", "bf16-2", "bf16-3", "wire-bf16", "wire-int8", "wire-mixed"])
def test_low_precision_follows_full_precision(runs, name) -> None:
    folder, _ = runs
    low, full = _metrics(folder / name), _metrics(folder / "rows")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(low, full, strict=True)) < 0.05
    assert _largest_difference(_weights(folder / name), _weights(folder / "rows")) > 0


def test_parallel_averaging_every_window_equals_centralized_sgd(runs) -> None:
    """With plain SGD, the average of steps by masked tokens is the step of the common gradient."""
    folder, data = runs
    tree = run_file(folder, "centralized", optimizer={"name": "sgd", "lr": 0.5})
    assert _largest_difference(_weights(folder / "parallel-1"), Centralized(tree, data).train()) < 1e-5


@pytest.mark.parametrize("parts", ["kept", "averaged"])
@pytest.mark.parametrize("scope", ["embeddings", "head"])
def test_what_is_not_averaged_stays_personal(runs, scope, parts) -> None:
    """Kept parts are not among the bytes that a client sends; averaged ones are in the model."""
    folder, _ = runs
    run = folder / f"parallel-{scope}-{parts}"
    halves = {client: load_state(run / "clients" / client, WINDOWS)["half"] for client in CLIENTS}
    sent = {client: (run / "clients" / client / "sent.bin").read_bytes() for client in CLIENTS}
    began, model = _first_weights(run), _weights(run)
    for name in halves["ada"]:
        is_personal = name.startswith("cls.") == (scope == "embeddings")
        first, *others = [half[name] for half in halves.values()]
        assert all(torch.equal(first, other) for other in others) != is_personal, name
        if is_personal:
            was_sent = [half[name].numpy().tobytes() in sent[client] for client, half in halves.items()]
            assert was_sent == [parts == "averaged"] * len(CLIENTS), name
            assert torch.equal(model[name], began[name]) == (parts == "kept"), name


def test_fewer_bytes_cross_with_a_narrower_codec_and_with_distinct_rows(runs) -> None:
    folder, _ = runs
    full, half, eighth, rows = (
        sum(row["bytes_up"] + row["bytes_down"] for row in _metrics(folder / name))
        for name in ("checkpointing-0", "wire-bf16", "wire-int8", "rows")
    )
    assert eighth < 0.5 * full and half < 0.65 * full and rows < full


@pytest.mark.parametrize("name", ["zero2-whole", "rows", "zero0-layers-parallel-whole"])
def test_neither_text_nor_token_ids_nor_labels_are_in_what_a_client_sends(runs, name) -> None:
    """Searches the bytes of every message. A unit test of the schema shows that no field could hold
    them."""
    folder, data = runs
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    for client, path in data.items():
        sent = (folder / name / "clients" / client / "sent.bin").read_bytes()
        assert len(sent) > 50_000
        for article in read_articles([path]):
            for word in article.text.split():
                # Random bytes contain short words by chance.
                assert len(word) < 6 or word.encode() not in sent
            ids = tokenizer(article.text, add_special_tokens=False)["input_ids"]
            for start in range(0, len(ids) - 8, 8):
                run = torch.tensor(ids[start : start + 8])
                for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32):
                    assert dtype is torch.uint8 or run.to(dtype).numpy().tobytes() not in sent
                assert _varints(ids[start : start + 8]) not in sent


def test_the_order_of_rows_does_not_tell_which_ids_are_larger(runs) -> None:
    """With cut: rows, distinct rows go in the order of their first token: numbers begin 0, 1, 2."""
    folder, _ = runs
    for client in CLIENTS:
        pieces = torch.load(folder / "rows" / "clients" / client / "input_gradients.pt", weights_only=True)
        for piece in pieces.values():
            index = piece["row_index"]
            first_seen = [
                int(index[position]) for position in range(len(index)) if index[position] not in index[:position]
            ]
            assert first_seen == list(range(len(first_seen)))


def _varints(values: list[int]) -> bytes:
    """Integers in protobuf's packed encoding."""
    packed = bytearray()
    for value in values:
        while value > 0x7F:
            packed.append(value & 0x7F | 0x80)
            value >>= 7
        packed.append(value)
    return bytes(packed)


def _weights(run: Path) -> dict[str, Tensor]:
    return AutoModelForMaskedLM.from_pretrained(run / "hf").state_dict()


def _first_weights(run: Path) -> dict[str, Tensor]:
    """Those that a run from scratch began with."""
    config, tokenizer = load_config(run / "config.yaml"), load_tokenizer(str(run.parent / "tokenizer"))
    assert tokenizer.pad_token_id is not None
    return build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed).state_dict()


def _has_personal_halves(name: str) -> bool:
    return RESUMED[name].get("federation", {}).get("mode") == "parallel"


def _client_model(run: Path) -> tuple[Reference, dict[str, Cursor]]:
    """The reference and the cursors in a run's last checkpoint."""
    path = CheckpointFolder(run / "checkpoints").client_model(WINDOWS)
    weights = "weights/"
    with safetensors.safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(weights)]  # noqa: SIM118 (no mapping)
        shapes = {name.removeprefix(weights): tuple(file.get_slice(name).get_shape()) for name in names}
    reference, books = read_client_model(path, shapes)
    return reference, books.cursors


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_bit_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    # The attention key's bias has a true gradient of zero: Adam amplifies rounding there.
    return max((one[name] - other[name]).abs().max().item() for name in one if not name.endswith("key.bias"))
