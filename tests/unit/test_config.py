"""The run file's keys: shipped files parse, a mistake is one line, the arithmetic is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import ClientsSection, OptimizerSection, RunConfig, Section, WireSection
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config, parse_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


# -- shipped files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_run_files_parse(path: Path) -> None:
    config = load_config(path)
    assert config.cut == "whole" or (config.body.deepspeed.is_file() and config.body.deepspeed.is_absolute())
    written = yaml.safe_load(path.read_text())
    for section, values in written.items():
        if isinstance(values, dict) and section != "cut":
            for key in values:
                assert key in type(getattr(config, section)).model_fields


def test_there_is_a_default_run_file() -> None:
    assert ROOT / "configs" / "default.yaml" in SHIPPED


def test_every_field_says_what_it_is() -> None:
    """Every field has a string under it. Every section refuses unknown keys."""

    def sections(kind: type[Section]) -> set[type[Section]]:
        found = {kind}
        for field in kind.model_fields.values():
            candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for one in candidates:
                if isinstance(one, type) and issubclass(one, Section):
                    found |= sections(one)
        return found

    assert len(sections(RunConfig)) >= 12
    for section in sections(RunConfig) - {RunConfig}:
        assert section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
        assert section.model_config["extra"] == "forbid" and section.model_config["frozen"]


# -- mistakes --------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    # Unknown keys: the error names the nearest one.
    ({"body": {"zero_stgae": 2}}, "body.zero_stgae is not a key; did you mean body.zero_stage?"),
    ({"optimiser": {"lr": 1}}, "optimiser is not a key; did you mean optimizer?"),
    ({"window": {"token": 4}}, "window.token is not a key; did you mean window.tokens?"),
    ({"run": {"xyz": 1}}, "run.xyz is not a key; remove it"),
    ({"server": {"tls": {"ca": "a", "certificat": "b", "key": "c"}}},
     "server.tls.certificat is not a key; did you mean server.tls.certificate?"),
    ({"server": {"tls": {"ca": "a", "certificate": "b", "key": "c", "keys": "d"}}},
     "server.tls.keys is not a key; did you mean server.tls.key?"),
    ({3: 4}, "3: keys should be strings"),
    # Values of the wrong kind.
    ({"run": 3}, "run: is a section, with a `key: value` in each line below it, not 3"),
    ({"run": {"windows": "many"}},
     "run.windows: input should be a valid integer, unable to parse string as an integer"),
    ({"window": {"tokens": 1.5}},
     "window.tokens: input should be a valid integer, got a number with a fractional part"),
    ({"server": {"tls": {"ca": "a", "key": "c"}}}, "server.tls.certificate: field required"),
    # Values out of range.
    ({"run": {"windows": 0}}, "run.windows: input should be greater than 0"),
    ({"model": {"dropout": 1.0}}, "model.dropout: input should be less than 1"),
    ({"model": {"dropout": -0.1}}, "model.dropout: input should be greater than or equal to 0"),
    ({"data": {"source": []}}, "data.source: must have at least one entry, not nothing"),
    ({"data": {"held_out": 1.0}}, "data.held_out: input should be less than 1"),
    ({"data": {"held_out": 0.0}}, "data.held_out: input should be greater than 0"),
    ({"data": {"sequence_length": 7}}, "data.sequence_length: input should be greater than or equal to 8"),
    ({"data": {"alpha": 0}}, "data.alpha: input should be greater than 0"),
    ({"optimizer": {"lr": 0}}, "optimizer.lr: input should be greater than 0"),
    ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: input should be a finite number"),
    ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: input should be a finite number"),
    ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1: field required"),
    ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1: input should be less than 1"),
    ({"body": {"zero_stage": 4}}, "body.zero_stage: input should be less than or equal to 3"),
    ({"window": {"staleness": 1}}, "window.staleness is not a key; it is federation.staleness now"),
    ({"wire": {"halves": "int8"}}, "wire.halves is not a key; it is wire.updates now"),
    ({"federation": {"staleness": 9}}, "federation.staleness: input should be less than or equal to 8"),
    ({"federation": {"staleness": -1}}, "federation.staleness: input should be greater than or equal to 0"),
    ({"server": {"port": 65536}}, "server.port: input should be less than or equal to 65535"),
    ({"server": {"port": -1}}, "server.port: input should be greater than or equal to 0"),
    ({"clients": {"silence_timeout": 0}}, "clients.silence_timeout: input should be greater than 0"),
    # Closed choices.
    (
        {"wire": {"activations": "int3"}},
        "wire.activations: input should be 'fp32', 'bf16', 'fp8_e4m3', 'fp8_e5m2', 'int8', 'int8_group' or "
        "'int4_hadamard'",
    ),
    ({"federation": {"mode": "sync"}}, "federation.mode: input should be 'synchronous', 'parallel' or 'sequential'"),
    ({"federation": {"participants": 0}},
     "federation.participants: no such choice; set all or a number of clients, at least 1"),
    ({"federation": {"participants": "some"}},
     "federation.participants: no such choice; set all or a number of clients, at least 1"),
    (
        {"federation": {"mode": "parallel", "server_optimizer": "sgd"}},
        "federation.server_optimizer: input should be 'none', 'momentum', 'adam', 'yogi' or 'nesterov'",
    ),
    ({"window": {"order": "random"}}, "window.order: input should be 'arrival' or 'fixed'"),
    # The cut.
    ({"cut": "heads"}, "cut: no such cut; set embeddings, rows, whole or {layers: K}"),
    ({"cut": 3}, "cut: no such cut; set embeddings, rows, whole or {layers: K}"),
    ({"cut": {"layer": 1}}, "cut: no such cut; set embeddings, rows, whole or {layers: K}"),
    ({"cut": {"layers": 1, "heads": 2}}, "cut: no such cut; set embeddings, rows, whole or {layers: K}"),
    ({"cut": {"layers": 0}}, "cut.layers: input should be greater than 0"),
    # Values that do not go together.
    ({"model": {"hidden_size": 100, "num_attention_heads": 3}},
     "model: num_attention_heads 3 does not divide hidden_size 100; choose a divisor"),
    ({"model": {"resize": True}}, "model: resize is for a checkpoint; name one in model.checkpoint or remove it"),
    ({"model": {"embedding_size": 64}},
     "model: embedding_size is for architecture: electra; remove it or change the architecture"),
    ({"model": {"local_attention": 64}},
     "model: local_attention is for architecture: modernbert; remove it or change the architecture"),
    ({"model": {"architecture": "modernbert", "local_attention": 1}},
     "model.local_attention: input should be greater than or equal to 2"),
    ({"model": {"global_attention_every": 2}},
     "model: global_attention_every is for architecture: modernbert; remove it or change the architecture"),
    ({"federation": {"server_optimizer": "adam"}},
     "federation: server_optimizer is for mode: parallel; remove it or change mode"),
    ({"federation": {"proximal": 0.1}}, "federation: proximal is for mode: parallel; remove it or change mode"),
    ({"federation": {"mode": "parallel", "server_lr": 0.1}},
     "federation: server_lr is for server_optimizer: momentum, adam, yogi or nesterov; remove it or change "
     "server_optimizer"),
    ({"federation": {"mode": "parallel", "server_optimizer": "adam", "server_momentum": 0.5}},
     "federation: server_momentum is for server_optimizer: momentum or nesterov; remove it or change "
     "server_optimizer"),
    ({"federation": {"mode": "parallel", "server_optimizer": "momentum", "server_tau": 0.1}},
     "federation: server_tau is for server_optimizer: adam or yogi; remove it or change server_optimizer"),
    ({"federation": {"mode": "parallel", "proximal": -0.1}},
     "federation.proximal: input should be greater than or equal to 0"),
    ({"federation": {"participants": 5}, "clients": {"expected": 4}},
     "federation.participants 5 is above clients.expected 4; lower it or say all"),
    ({"federation": {"mode": "sequential", "participants": 2}},
     "federation: participants is for mode: synchronous or parallel; remove it or change mode"),
    ({"federation": {"mode": "sequential", "average_every": 7}, "run": {"windows": 600}},
     "run.windows 600 ends in the middle of a turn of federation.average_every 7 windows; make it a multiple"),
    ({"federation": {"mode": "sequential", "staleness": 1}},
     "federation: staleness 1 would let a client begin its turn or round without the weights of the one before; "
     "set it to 0"),
    ({"federation": {"mode": "parallel", "participants": 2, "staleness": 1}},
     "federation: staleness 1 would let a client begin its turn or round without the weights of the one before; "
     "set it to 0"),
    ({"clients": {"expected": 4, "minimum": 5}}, "clients: minimum 5 is above expected 4; lower it"),
    ({"clients": {"expected": 4, "maximum": 3}}, "clients: maximum 3 is below expected 4; raise it"),
    ({"clients": {"on_loss": "panic"}}, "clients.on_loss: input should be 'continue' or 'wait'"),
    (
        {"clients": {"on_loss": "wait"}, "federation": {"staleness": 1}},
        "clients.on_loss: wait undoes a window whose client is lost, and with federation.staleness others may have "
        "gone on by then; set one of them to its default",
    ),
    ({"clients": {"expected": 2, "local": 3}}, "clients: local 3 is above expected 2; raise expected"),
    ({"data": {"sequence_length": 128}, "window": {"tokens_per_micro_batch": 127}},
     "data.sequence_length 128 does not fit window.tokens_per_micro_batch 127; raise the latter"),
    ({"data": {"sequence_length": 129}},
     "data.sequence_length 129 is longer than the position table, model.max_position_embeddings 128; lower the former"),
    ({"aggregator": {"address": "here", "secret": "s"}}, "aggregator: address here is not HOST:PORT; write both"),
    ({"aggregator": {"address": ":5", "secret": "s"}}, "aggregator: address :5 is not HOST:PORT; write both"),
    ({"aggregator": {"address": "here:70000", "secret": "s"}},
     "aggregator: address here:70000 is not HOST:PORT; write both"),
    ({"aggregator": {"adress": "here:5", "secret": "s"}},
     "aggregator.adress is not a key; did you mean aggregator.address?"),
    ({"aggregator": {"address": "here:5"}}, "aggregator.secret: field required"),
    ({"aggregator": {"address": "here:5", "secret": "s"}, "cut": "whole", "federation": {"mode": "parallel"}},
     "cut: whole leaves the server nothing but the client model, which the section aggregator gives to another party; "
     "remove the section or change the cut"),
    ({"run": {"evaluate_every": 5}},
     "run.evaluate_every needs text that clients keep out of training; set data.client_held_out, 0.05 say"),
    ({"task": {"name": "token_classification"}},
     "task: token_classification needs labels, two at least; set labels: [negative, positive], say"),
    ({"task": {"name": "sequence_regression", "labels": ["a", "b"]}},
     "task: sequence_regression has no labels; remove task.labels or change task.name"),
    ({"task": {"name": "sequence_classification", "labels": ["a", "a"]}},
     "task: labels holds one twice; name each once"),
    ({"task": {"name": "token_classification", "labels": ["a", "b"], "text": ["x", "y"]}},
     "task: token_classification does not read 2 columns; name fewer in task.text"),
    ({"task": {"label": "grade"}},
     "task: masked_lm reads plain text; remove task.text and task.label or change task.name"),
    ({"cut": "rows", "task": {"name": "sequence_regression", "text": ["x", "y"]}},
     "cut: rows does not tell the server which of two texts a token is of; set cut: embeddings"),
    ({"run": {"keep_best": True}}, "run.keep_best needs evaluations; set run.evaluate_every"),
    ({"run": {"early_stopping_patience": 2}}, "run.early_stopping_patience needs evaluations; set run.evaluate_every"),
    ({"run": {"keep_best": True, "evaluate_every": 5}, "data": {"client_held_out": 0.1},
      "aggregator": {"address": "here:5", "secret": "s"}},
     "run.keep_best writes the whole model, and the client model is with the aggregator; remove run.keep_best or the "
     "section aggregator"),
    ({"wire": {"updates": "int2_hadamard"}},
     "wire.updates int2_hadamard is for federation.mode: parallel; choose another codec"),
    ({"cut": "whole"},
     "cut: whole has clients step alone and averages their changes; set federation.mode: parallel"),
    ({"cut": "whole", "federation": {"mode": "parallel", "staleness": 1}},
     "federation.staleness is for clients that share a body; remove it or change cut: whole"),
    ({"cut": "whole", "federation": {"mode": "parallel", "average_scope": "head"}},
     "federation.average_scope is for clients that share a body; remove it or change cut: whole"),
    ({"cut": "whole", "federation": {"mode": "parallel"}, "body": {"precision": "bf16"}},
     "body.precision: cut: whole has no body; remove the key or change the cut"),
    ({"cut": "whole", "federation": {"mode": "parallel"}, "body": {"zero_stage": 2}},
     "body.zero_stage: cut: whole has no body; remove the key or change the cut"),
    ({"cut": "whole", "federation": {"mode": "parallel"}, "body": {"compile": True}},
     "body.compile: cut: whole has no body; remove the key or change the cut"),
    ({"body": {"fp8": True}}, "body: fp8 is for precision: bf16; set that, or fp8: false"),
    ({"body": {"compile": "yes"}}, "body.compile: no such choice; set auto, true or false"),
    ({"body": {"compile": 1}}, "body.compile: no such choice; set auto, true or false"),
    ({"body": {"compile": True, "activation_checkpointing": True}},
     "body: compile: true chooses itself what is computed again; remove activation_checkpointing: layers"),
    ({"body": {"compile": True, "activation_checkpointing": "int8"}},
     "body: compile: true chooses itself what is computed again; remove activation_checkpointing: int8"),
    *(({"body": {"fp8": True, "precision": "bf16", "activation_checkpointing": what}},
       "body: fp8 keeps its own inputs; set activation_checkpointing: none or layers, or fp8: false")
      for what in ("elementwise", "int8")),
    ({"cut": "whole", "federation": {"mode": "parallel"}, "kernels": "torch"},
     "kernels: cut: whole has no body; remove the key or change the cut"),
    ({"cut": "whole", "federation": {"mode": "parallel", "average_every": 7}, "run": {"windows": 10}},
     "run.windows 10 is no multiple of federation.average_every 7: the last windows would not reach the model; "
     "change either"),
    ({"cut": {"layers": 2}}, "cut.layers 2 leaves the server no layer of model.num_hidden_layers 2; lower it"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "mine.yaml")
    assert str(caught.value) == f"mine.yaml: {message}"


def test_every_key_misspelt_by_one_letter_is_recognized() -> None:
    for section, field in RunConfig.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            continue
        for key in kind.model_fields:
            wrong = key[:-1] + "q"
            if wrong in kind.model_fields:
                continue
            with pytest.raises(ConfigError, match=rf"{section}\.{wrong} is not a key") as caught:
                parse_config({section: {wrong: 1}}, "mine.yaml")
            if len(key) > 3:
                assert f"did you mean {section}." in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"architecture": "electra", "embedding_size": 64}},
        {"model": {"checkpoint": "google/some-bert", "hidden_size": 100, "num_attention_heads": 3}},
        # A checkpoint brings its own position table and layers: the server compares them later.
        {"model": {"checkpoint": "google/some-bert"}, "data": {"sequence_length": 512}, "cut": {"layers": 5}},
        {"clients": {"expected": 4, "minimum": 4, "local": 0}},
        {"clients": {"expected": 4, "maximum": 4}},
        {"clients": {"on_loss": "wait"}, "federation": {"staleness": 0}},
        {"cut": {"layers": 1}},
        {"cut": "whole", "federation": {"mode": "parallel"}, "optimizer": {"name": "muon"}},
        {"wire": {"updates": "int2_hadamard"}, "federation": {"mode": "parallel"}},
        {"server": {"port": 0}},
        {"window": {"micro_batches_in_flight": 3}, "federation": {"staleness": 2}},
        {"window": {"micro_batches_in_flight": "auto"}, "run": {"trace": True}},
        {"data": {"source": ["a.txt", "hub:wikitext:wikitext-2-raw-v1:train"]}},
    ],
)
def test_unusual_but_right(tree: dict[str, Any]) -> None:
    parse_config(tree, "mine.yaml")


@settings(max_examples=150)
@given(
    tree=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["run", "model", "cut", "layers", "tls", "server", "windows", "optimizer", "betas", "q"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_tree_is_a_configuration_or_one_line(tree: Any) -> None:
    try:
        parse_config(tree if isinstance(tree, dict) else {"run": tree}, "mine.yaml")
    except ConfigError as error:
        assert re.match(r"mine\.yaml: \S", str(error)) and "\n" not in str(error)


# -- the paper's setting ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.name for path in SHIPPED if path.name.startswith("fedbert-")])
def test_the_papers_setting_is_the_papers(name: str) -> None:
    config = load_config(ROOT / "configs" / name)
    optimizer, model = config.optimizer, config.model
    assert (optimizer.name, optimizer.betas, optimizer.eps, optimizer.lr) == ("adamw", (0.9, 0.98), 1e-6, 5e-4)
    assert (optimizer.schedule, optimizer.weight_decay, optimizer.warmup_windows) == ("polynomial", 0.01, 10_000)
    assert (config.run.windows, config.data.sequence_length, config.window.tokens) == (125_000, 512, 256 * 512)
    assert (model.num_hidden_layers, model.hidden_size, model.num_attention_heads, model.dropout) == (12, 768, 12, 0.1)
    assert model.attention_dropout is None, "that of hidden states"
    assert (config.clients.expected, config.data.source) == (10, ("hub:Salesforce/wikitext:wikitext-103-v1:train",))
    expected = {
        "fedbert-roberta-base": ("roberta", "synchronous", 1),
        "fedbert-bert-base": ("bert", "synchronous", 1),
        "fedbert-parallel-5-of-10": ("roberta", "parallel", 125_000 * 5 // 10),
        "fedbert-parallel-50-of-500": ("roberta", "parallel", 125_000 * 50 // 500),
        "fedbert-sequential": ("roberta", "sequential", 125_000 // 10),
    }
    found = (model.architecture, config.federation.mode, config.federation.average_every)
    assert found == expected[name.removesuffix(".yaml")]


@pytest.mark.parametrize("scope", ["embeddings", "head", "embeddings+head"])
@pytest.mark.parametrize("period", ["5-of-10", "50-of-500"])
def test_the_papers_scopes_and_its_other_model_are_overrides(period: str, scope: str) -> None:
    overrides = [f"federation.average_scope={scope}", "model.architecture=bert", "tokenizer.path=bert-base-uncased"]
    config = load_config(ROOT / "configs" / f"fedbert-parallel-{period}.yaml", overrides)
    assert (config.federation.average_scope, config.model.architecture) == (scope, "bert")


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_the_polynomial_schedule_is_that_of_transformers(power: float) -> None:
    """But warm-up begins one step on: transformers' first step has a learning rate of zero."""
    import torch
    from transformers import get_polynomial_decay_schedule_with_warmup

    section = OptimizerSection(lr=5e-4, schedule="polynomial", power=power, warmup_windows=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=section.lr)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 10, 125, lr_end=0.0, power=power)
    rates = []
    for _ in range(125):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [section.learning_rate(window, 125) for window in range(125)]
    assert ours[:10] == pytest.approx(rates[1:11], rel=1e-12)
    assert ours[10:] == pytest.approx(rates[10:], rel=1e-12)


# -- arithmetic ------------------------------------------------------------------------------------


def test_learning_rate_by_hand() -> None:
    linear = OptimizerSection(lr=1.0, warmup_windows=2, schedule="linear")
    assert [linear.learning_rate(window, 6) for window in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    square = OptimizerSection(lr=1.0, warmup_windows=0, schedule="polynomial", power=2.0)
    assert [square.learning_rate(window, 4) for window in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    constant = OptimizerSection(lr=1.0, warmup_windows=3, schedule="constant")
    assert [constant.learning_rate(window, 4) for window in range(6)] == [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0]


@given(
    schedule=st.sampled_from(["linear", "polynomial", "constant"]),
    warmup=st.integers(0, 30),
    windows=st.integers(1, 60),
    power=st.floats(0.1, 5.0),
)
def test_learning_rate_rises_then_falls(schedule: Any, warmup: int, windows: int, power: float) -> None:
    optimizer = OptimizerSection(lr=0.3, warmup_windows=warmup, schedule=schedule, power=power)
    rates = [optimizer.learning_rate(window, windows) for window in range(windows)]
    assert all(0 < rate <= 0.3 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if windows > warmup:
        assert max(rates) == rates[max(0, warmup - 1)] == 0.3
    assert optimizer.learning_rate(windows + 5, windows) in (0.0, 0.3) or warmup > windows


def test_no_more_clients_than_expected_unless_said() -> None:
    assert ClientsSection(expected=7, local=0).most == 7
    assert ClientsSection(expected=7, maximum=9, local=0).most == 9


def test_the_minimum_of_clients_is_everybody_unless_said() -> None:
    assert ClientsSection(expected=7, local=0).required == 7
    assert ClientsSection(expected=7, minimum=3, local=0).required == 3


def test_hidden_states_are_coded_as_activations_unless_said() -> None:
    assert WireSection(activations="int8").hidden_states == "int8"
    assert WireSection(activations="int8", hidden="bf16").hidden_states == "bf16"


@pytest.mark.parametrize(
    ("written", "expected"),
    [("auto", ("none", "elementwise"))]
    + [(word, (word, word)) for word in ("none", "elementwise", "attention", "int8", "layers")]
    + [(False, ("none", "none")), (True, ("layers", "layers"))],
)
def test_what_backward_computes_again(written: Any, expected: tuple[str, ...]) -> None:
    """On a CPU and on a GPU. Older files have true and false."""
    body = parse_config({"body": {"activation_checkpointing": written}}, "test").body
    assert tuple(map(body.recomputed, ("cpu", "cuda"))) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [("auto", True), ("none", True), *((word, False) for word in ("elementwise", "int8", "layers"))],
)
def test_a_compiler_chooses_where_the_run_file_does_not(written: str, expected: bool) -> None:
    body = parse_config({"body": {"activation_checkpointing": written}}, "test").body
    assert body.may_compile(body.recomputed("cuda")) is expected


def test_each_client_of_one_source_needs_as_many_clients_as_sources() -> None:
    tree = {"data": {"shards": "source", "source": ["a.txt", "b.txt"]}, "clients": {"expected": 2, "local": 2}}
    assert parse_config(tree, "x").data.shards == "source"
    parse_config(tree | {"clients": {"expected": 2, "local": 0}}, "x")  # remote clients bring their own text
    with pytest.raises(ConfigError, match=r"there are 3 clients for 2 sources; set clients\.local: 2"):
        parse_config(tree | {"clients": {"expected": 3, "local": 3}}, "x")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"federation": {"combine": "median", "mode": "sequential"}}, "combine is for mode: synchronous or parallel"),
        ({"federation": {"assumed_liars": 2}}, "assumed_liars is for combine: trimmed_mean or krum"),
        ({"federation": {"clipping_radius": 2.0}}, "clipping_radius is for combine: norm_clipping"),
        ({"federation": {"bound": 1.0}}, "federation.bound"),
        ({"federation": {"combine": "krum"}}, "combine krum with assumed_liars 1 needs 5 clients at a time, .* are 4"),
        (
            {
                "federation": {"combine": "trimmed_mean", "assumed_liars": 3, "participants": 6},
                "clients": {"expected": 9},
            },
            "needs 7 clients at a time, and there are 6; lower federation.assumed_liars",
        ),
        ({"window": {"largest_share": 0.5}}, "window.largest_share"),
    ],
)
def test_bounds_and_robust_rules_are_checked_together(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(tree, "test")
    assert "\n" not in str(caught.value)


def test_paths_are_a_shells(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and variables, in every key that names a file; names of the hub and others stay."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    tree = {
        "run": {"directory": "~/runs/a"},
        "model": {"checkpoint": "$SCRATCH/bert"},
        "tokenizer": {"path": "~/words"},
        "data": {"source": ["${SCRATCH}/notes", "hub:owner/name:train", "python-docs"]},
        "body": {"deepspeed": "~/zero.json"},
        "server": {"tls": {"ca": "~/ca.pem", "certificate": "$SCRATCH/me.pem", "key": "~/me.key"}},
        "aggregator": {"address": "there:1", "secret": "~/secret", "directory": "$SCRATCH/a"},
    }
    config = parse_config(tree, "test")
    assert config.server.tls is not None and config.aggregator is not None
    assert [
        str(path)
        for path in (
            config.run.directory,
            config.model.checkpoint,
            config.tokenizer.path,
            *config.data.source,
            config.body.deepspeed,
            config.server.tls.ca,
            config.server.tls.certificate,
            config.server.tls.key,
            config.aggregator.secret,
            config.aggregator.directory,
        )
    ] == [
        "/home/ada/runs/a",
        "/scratch/bert",
        "/home/ada/words",
        "/scratch/notes",
        "hub:owner/name:train",
        "python-docs",
        "/home/ada/zero.json",
        "/home/ada/ca.pem",
        "/scratch/me.pem",
        "/home/ada/me.key",
        "/home/ada/secret",
        "/scratch/a",
    ]
    assert parse_config({"model": {"checkpoint": "bert-base-uncased"}}, "test").model.checkpoint == "bert-base-uncased"


@pytest.mark.parametrize("address", ["http://there:1", "there", ":5", "there:0", "::1:29700", "2001:db8::7:5"])
def test_an_aggregator_s_address_is_host_and_port_with_brackets_around_ipv6(address: str) -> None:
    with pytest.raises(ConfigError, match=r"aggregator: address .*(HOST:PORT|\[::1\]:29700)"):
        parse_config({"aggregator": {"address": address, "secret": "s"}}, "test")
    config = parse_config({"aggregator": {"address": "[::1]:29700", "secret": "s", "host": "[::1]"}}, "test")
    assert config.aggregator is not None
    assert (config.aggregator.port, config.aggregator.host) == (29700, "::1")
