"""What is kept under benchmarks/results/ says where it comes from, and the page of reading says
what it says."""

import json
import re
from pathlib import Path

import pytest
from integration.chaos import ELSEWHERE, MODES, PHASES, VICTIMS
from integration.chaos import page_table as chaos_table
from integration.faults import KINDS
from integration.faults import page_table as faults_table
from integration.lies import table as lies_table

from benchmarks.codecs.report import counted_table
from benchmarks.codecs.report import table as codecs_table
from benchmarks.codecs.settings import BASELINE, Setting, all_in
from benchmarks.collectives.benchmark import table as collectives_table
from benchmarks.evaluation.benchmark import table as evaluation_table
from benchmarks.fine_tuning.benchmark import table as fine_tuning_table
from benchmarks.fp8.benchmark import table as fp8_table
from benchmarks.glue.benchmark import table as glue_table
from benchmarks.large_text.benchmark import table as large_text_table
from benchmarks.liars.benchmark import table as liars_table
from benchmarks.memory.benchmark import table as memory_table
from benchmarks.memory.runs import BASE, CASES, FACTORIZED
from benchmarks.modes.comparison import table
from benchmarks.modes.tuning import table as tuning_table
from benchmarks.optimizers.benchmark import table as optimizers_table
from benchmarks.optimizers.benchmark import windows_to_reach
from fedbert_ds.bench.body.benchmark import BASE as BERT_BASE
from fedbert_ds.bench.body.benchmark import LARGE, OURS, SENTENCES
from fedbert_ds.bench.body.benchmark import table as body_table
from fedbert_ds.bench.host.benchmark import RECOMPUTED, SELECTIVE
from fedbert_ds.bench.host.benchmark import table as host_table
from fedbert_ds.bench.memory.benchmark import MODERN, count
from fedbert_ds.bench.memory.benchmark import table as in_flight_table
from fedbert_ds.bench.pipeline.report import table as pipeline_table
from fedbert_ds.planner.validate import table as validation_table
from fedbert_ds.planner.validate import validate

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_every_record_is_complete_and_names_no_private_place(path):
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert {"command", "commit", "machine", "versions", "rows"} <= set(record)
    assert record["rows"]
    assert not re.search(r'["\s=](/(home|root|tmp|work|mnt|Users)/|[A-Z]:\\)', text)
    assert path.stem in README


@pytest.mark.parametrize("path", [path for path in RESULTS if path.name.startswith("modes-")], ids=lambda p: p.name)
def test_modes(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    final = {(row["system"], row["average_every"]): row for row in record["final"]}
    assert set(final) == {
        ("centralized", None), ("synchronous", None), ("parallel", 1), ("parallel", 5), ("parallel", 50),
    }  # fmt: skip
    assert len(record["rows"]) == len(final) * record["settings"]["run"]["windows"]
    assert table(record["final"], "centralized") in README
    assert path.with_suffix(".png").is_file()
    # What the page claims.
    assert final["synchronous", None]["largest_difference"] < 1e-6
    assert final["synchronous", None]["largest_weight_difference"] < 1e-6
    for row in final.values():
        assert row["held_out_loss"] < row["unigram_loss"] - 0.3


def whole_models(name="whole-wikitext"):
    record = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return record, {row["system"].removeprefix("whole-"): row for row in record["final"]}


@pytest.mark.parametrize("name", ["whole-wikitext", "whole-wikitext-one-rate"])
def test_whole_models_and_turns(name):
    record, final = whole_models(name)
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert list(final) == ["centralized", "synchronous", "sequential", "fedavg", "diloco", "muloco"]
    assert len(record["rows"]) == len(final) * record["settings"]["run"]["windows"]
    assert table(record["final"], "centralized") in README
    assert (BENCHMARKS / "results" / f"{name}.png").is_file()
    # What the page claims.
    assert final["synchronous"]["largest_difference"] < 2e-6
    assert final["sequential"]["largest_difference"] is None
    assert final["sequential"]["held_out_loss"] < final["centralized"]["held_out_loss"]
    assert final["diloco"]["held_out_loss"] > final["diloco"]["unigram_loss"]
    for method in ("fedavg", "muloco"):
        assert 0.07 < final[method]["held_out_difference"] < 0.08
    bytes_per_token = {method: row["bytes_per_token"] for method, row in final.items()}
    assert 15.5 < bytes_per_token["synchronous"] / bytes_per_token["fedavg"] < 16.5
    assert bytes_per_token["synchronous"] / bytes_per_token["muloco"] > 100
    assert 11.5 < bytes_per_token["fedavg"] / bytes_per_token["muloco"] < 12.5


def test_learning_rates_of_whole_models_are_the_best_of_the_trials():
    record, final = whole_models()
    assert tuning_table(record["tuning"]) in README
    for row in record["tuning"]:
        rates = {other["learning_rate"]: other["held_out_loss"] for other in record["tuning"]
                 if other["system"] == row["system"]}  # fmt: skip
        assert final[row["system"].removeprefix("whole-")]["learning_rate"] == min(rates, key=lambda rate: rates[rate])


def test_the_short_tables_of_whole_models_are_the_record():
    _, final = whole_models()
    names = {"synchronous": "synchronous", "sequential": "sequential", "fedavg": "FedAvg", "diloco": "DiLoCo"}
    page = (BENCHMARKS.parent / "docs" / "whole.md").read_text(encoding="utf-8")
    for method, name in (names | {"muloco": "MuLoCo"}).items():
        row = final[method]
        loss, both = f"{row['held_out_loss']:.3f}", f"{row['bytes_per_token']:,.0f}"
        work = f"{row['client_flops_per_token'] / 1e6:.2f} M"
        above = f"{row['held_out_difference']:+.3f}" if method != "synchronous" else "0.000"
        memory = f"{row['client_peak_memory_mb']} MB"
        assert f"| {name} | {loss} | {above} | {both} | {work} | {memory} |" in README
        assert method == "sequential" or f" | {loss} | {both} | {work} |" in page


@pytest.mark.parametrize("path", [path for path in RESULTS if path.name.startswith("staleness-")], ids=lambda p: p.name)
def test_staleness(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    final = {(row["system"], row["staleness"]): row for row in record["final"]}
    systems = {"centralized": [0], "synchronous": [0, 1, 2], "parallel": [0, 1]}
    assert set(final) == {(system, staleness) for system, values in systems.items() for staleness in values}
    assert table(record["final"], "centralized") in README
    assert path.with_suffix(".png").is_file()
    # What the page claims.
    assert final["synchronous", 0]["largest_difference"] < 1e-6
    for staleness in (1, 2):
        stale = final["synchronous", staleness]
        assert stale["largest_difference"] > 1e-4, "not the exact run under another name"
        assert abs(stale["held_out_loss"] - final["centralized", 0]["held_out_loss"]) < 0.01


@pytest.mark.parametrize("path", [path for path in RESULTS if path.name.startswith("body-")], ids=lambda p: p.name)
def test_body(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    assert body_table(record["rows"]) in README
    assert path.with_suffix(".png").is_file()
    # What the page claims.
    beside_padded = {
        (row["model"], row["lengths"]): row["beside_padded"] for row in record["rows"] if row["way"] == OURS
    }
    assert len(beside_padded) >= 3
    for (_, lengths), ratio in beside_padded.items():
        assert ratio >= (1.6 if lengths == SENTENCES else 1.0)


@pytest.mark.parametrize("path", [path for path in RESULTS if path.name.startswith("codecs-")], ids=lambda p: p.name)
def test_codecs(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    assert codecs_table(record["summary"]) in README
    assert path.with_suffix(".png").is_file()
    names = vars(BASELINE)
    summary = {Setting(**{name: row[name] for name in names}): row for row in record["summary"]}
    # What the page claims.
    assert summary[BASELINE]["held_out_loss"] < record["text"]["unigram_loss"] - 0.5
    exact, coarse = summary[all_in("int8")], summary[all_in("int4_hadamard")]
    assert exact["bytes_per_token"] <= 550 and abs(exact["cost"]) < 0.002 and exact["seeds"] >= 3
    assert coarse["bytes_per_token"] <= 300 and coarse["cost_highest"] < 0.01 and coarse["seeds"] >= 3
    assert summary[all_in("int4_hadamard", model="factorized")]["bytes_per_token"] <= 100
    # On text that repeats fewer words, too.
    assert counted_table(record["counted"]) in README
    wikitext = {
        (size["model"], size["cut"], size["activations"], size["gradients"]): size["up"] + size["down"]
        for size in record["counted"][1]["sizes"]
    }
    assert wikitext["full", "rows", "int8", "int8"] <= 550
    assert wikitext["full", "rows", "int4_hadamard", "int4_hadamard"] <= 300
    assert wikitext["factorized", "rows", "int4_hadamard", "int4_hadamard"] <= 100


def test_far_below_word_frequency_no_cost_of_8_bits_is_seen():
    record = json.loads((BENCHMARKS / "results" / "modernbert-codecs.json").read_text(encoding="utf-8"))
    assert codecs_table(record["summary"]) in README and "dirty" not in record["commit"]
    below = record["text"]["unigram_loss"] - record["summary"][0]["held_out_loss"]
    assert f"ends {below:.1f} nats below word frequency" in README and below > 2
    assert all(abs(row["cost"]) < 0.016 for row in record["rows"])
    for of_gradients, extra in (("int8", ""), ("bf16", ""), ("fp32", "kept in int8")):
        costs = [row["cost"] for row in record["rows"] if (row["gradients"], row["extra"]) == (of_gradients, extra)]
        assert len(costs) == 3 and min(costs) < 0 < max(costs)


@pytest.mark.parametrize("path", [path for path in RESULTS if path.name.startswith("pipeline-")], ids=lambda p: p.name)
def test_pipeline(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", record["commit"])
    assert pipeline_table(record["rows"]) in README
    assert path.with_suffix(".png").is_file()
    # What the page claims.
    ours = [row for row in record["rows"] if row["system"] == "ours"]
    for row in ours:
        assert row["dummy_share"] == 0.0
        if row["mode"] == "parallel" or row["staleness"]:
            assert row["utilization"] >= 0.95
        elif path.stem == "pipeline-cpu":
            assert row["utilization"] >= row["utilization_bound"] - 0.03


def test_memory_of_a_client():
    record = json.loads((BENCHMARKS / "results" / "memory-client.json").read_text(encoding="utf-8"))
    assert memory_table(record["rows"]) in README
    assert record["settings"]["vocab_size"] == 30_522 and record["settings"]["sequence_length"] == 128
    # What the page claims.
    assert len(record["rows"]) == 2 * len(CASES)
    for row in record["rows"]:
        assert row["peak_mb"] <= {BASE: 1000, FACTORIZED: 600}[row["model"]]


@pytest.mark.parametrize(
    ("name", "least", "most", "of_all"), [("wikitext", 0.265, 0.575, 42), ("debian", 0.445, 0.485, 46)]
)
def test_muon_needs_fewer_windows(name, least, most, of_all):
    record = json.loads((BENCHMARKS / "results" / f"optimizers-{name}.json").read_text(encoding="utf-8"))
    assert optimizers_table(record["rows"]) in README
    assert {(row["optimizer"], row["seed"]) for row in record["rows"]} == {
        (name, seed) for name in ("adamw", "muon") for seed in range(3)
    }
    # What the page claims.
    for row in record["trials"]:
        assert f"{row['held_out'][-1]['loss']:.3f}" in README
    shares = []
    for seed in range(3):
        runs = {row["optimizer"]: row["held_out"] for row in record["rows"] if row["seed"] == seed}
        shares.append(windows_to_reach(runs["muon"], runs["adamw"][-1]["loss"]) / record["settings"]["windows"])
    assert max(shares) < most and min(shares) > least and round(100 * sum(shares) / 3) == of_all


def test_fp8_costs_nothing_that_two_seeds_can_see():
    record = json.loads((BENCHMARKS / "results" / "fp8-wikitext.json").read_text(encoding="utf-8"))
    assert fp8_table(record["rows"]) in README
    loss = {(row["products"], row["seed"]): row["held_out_loss"] for row in record["rows"]}
    apart = [loss["fp8", seed] - loss["bf16", seed] for seed in (1, 2)]
    # What the page claims.
    assert 0.0005 < sum(apart) / 2 < 0.0015 and min(apart) < 0 < max(apart)
    assert f"{record['text']['unigram_loss']:.2f}" in README


def test_host_time():
    rows = {}
    for name in ("host-cpu", "host-cpu-hooks", "host-cpu-before"):
        record = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert host_table(record["rows"]) in README
        rows[name] = {row["way"]: row for row in record["rows"]}
    # What the page claims.
    beside = {way: row["beside_plain"] for way, row in rows["host-cpu"].items()}
    stages = [f"engine, ZeRO {stage}" for stage in range(4)]
    assert [round(beside[stage], 2) for stage in stages] == [1.24, 1.22, 1.2, 1.24]
    assert round(beside[RECOMPUTED], 2) == 1.41 and beside[SELECTIVE] > 4
    assert 0.28 < beside[RECOMPUTED] / beside[SELECTIVE] < 0.33
    two, three = (rows["host-cpu"][way]["seconds"] / rows["host-cpu-before"][way]["seconds"] for way in stages[2:])
    assert 0.595 < two < 0.615 and 0.09 < three < 0.105
    assert 1.0 < 1e3 * rows["host-cpu"][stages[1]]["seconds"] / 12 < 1.15


def test_batches_of_evaluations():
    rows = json.loads((BENCHMARKS / "results" / "evaluation-cpu.json").read_text(encoding="utf-8"))["rows"]
    assert evaluation_table(rows) in README
    # What the page claims.
    seconds = {row["way"]: row["median"] for row in rows}
    assert 0.835 < seconds["packed"] / seconds["by count"] < 0.845
    assert 0.875 < seconds["packed"] / seconds["by tokens"] < 0.885


def test_collectives():
    rows = json.loads((BENCHMARKS / "results" / "collectives.json").read_text(encoding="utf-8"))["rows"]
    assert collectives_table(rows) in README
    # What the page claims.
    assert len(rows) == 4 * 3 * 2
    for row in rows:
        assert (row["collectives_before_step"] == 0) is (row["stage"] < 3) and 1 <= row["collectives_of_step"] <= 9
        other = next(r for r in rows if (r["stage"], r["optimizer"]) == (row["stage"], row["optimizer"]))
        assert other["collectives_of_step"] == row["collectives_of_step"]
        assert other["optimizer_calls"] == row["optimizer_calls"] <= 2
        # Two micro-batches, forward and backward.
        assert row["collectives_before_step"] == (4 * row["layers"] if row["stage"] == 3 else 0)


def test_memory_in_flight():
    rows = json.loads((BENCHMARKS / "results" / "memory-in-flight.json").read_text(encoding="utf-8"))["rows"]
    assert in_flight_table(rows) in README
    # What the page claims.
    beside = {(row["model"], row["kernels"], row["checkpointing"]): row["beside_none"] for row in rows}
    assert 0.625 < beside["BERT-base", "triton", "elementwise"] < 0.63
    assert 0.615 < beside["BERT-large", "triton", "elementwise"] < 0.62
    assert round(beside["BERT-base", "triton", "attention"], 2) == 0.56
    assert round(beside["BERT-large", "triton", "attention"], 2) == 0.55
    assert round(beside["BERT-base", "triton", "int8"], 2) == 0.51
    assert round(beside["BERT-large", "triton", "int8"], 2) == 0.50
    # And nothing has been added since.
    assert [row for shape in (BERT_BASE, LARGE, MODERN) for row in count(shape, "triton")] == [
        row for row in rows if row["kernels"] == "triton"
    ]


def test_text_larger_than_memory():
    rows = json.loads((BENCHMARKS / "results" / "large-text.json").read_text(encoding="utf-8"))["rows"]
    assert large_text_table(rows) in README
    # What the page claims.
    fresh, resumed = rows
    assert (fresh["begins"], resumed["begins"]) == ("fresh", "resumed")
    assert fresh["bytes"] >= 1e10 and max(row["peak_mb"] for row in rows) < 1000
    assert f"{fresh['peak_mb']:.0f} MB with {fresh['bytes'] / 1e9:.1f} GB of text" in README
    before = json.loads((BENCHMARKS / "results" / "memory-client.json").read_text(encoding="utf-8"))["rows"]
    (little,) = (
        row
        for row in before
        if (row["model"], row["mode"], row["updates"], row["begins"]) == (BASE, "synchronous", "int8", "fresh")
    )
    assert round(fresh["peak_mb"]) == round(little["peak_mb"])
    more = fresh["phases"]["start"] - little["phases"]["start"]
    words = " ".join(README.split())
    assert f"takes {more:.0f} MB more" in words and f"{4 * fresh['sequences'] / 1e6:.0f} MB are the order" in words
    # What a new epoch takes is there in the phases that may begin one.
    assert all(row["phases"][name] + 82 < row["peak_mb"] for row in rows for name in ("reference", "plan", "embed"))


def test_killed_processes_leave_no_trace():
    record = json.loads((BENCHMARKS / "results" / "chaos.json").read_text(encoding="utf-8"))
    assert chaos_table(record["rows"]) in README
    found = {(row["mode"], row["killed"]): {row[phase] for phase in PHASES} for row in record["rows"]}
    expected = {(mode, victim) for mode in MODES if "aggregator" not in MODES[mode] for victim in VICTIMS}
    elsewhere = {mode for mode in MODES if "aggregator" in MODES[mode]}
    assert found.keys() == expected | {(mode, victim) for mode in elsewhere for victim in ("a client", ELSEWHERE)}
    for (_, victim), results in found.items():
        assert results == ({"identical", "-"} if victim == ELSEWHERE else {"identical"})


def test_the_short_table_of_links_is_the_record() -> None:
    record = json.loads((BENCHMARKS / "results" / "pipeline-cpu.json").read_text(encoding="utf-8"))
    lines = [line.strip("| ").split(" | ") for line in pipeline_table(record["rows"]).splitlines()]
    rows = {(cells[0], cells[1]): dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]}
    for link, name in (("0 ms", "none"), ("50 ms, 100 Mbit/s", "50 ms"), ("200 ms, 100 Mbit/s", "200 ms")):
        ours = [rows["ours", link][head] for head in ("tokens/s", "of centralized", "times naive", "body busy")]
        busy = [rows[system, link]["body busy"] for system in ("ours, synchronous", "naive")]
        assert f"| {' | '.join([name, *ours, *busy])} |" in README


def test_ours_is_five_times_as_fast_as_a_naive_split_trainer():
    record = json.loads((BENCHMARKS / "results" / "pipeline-cpu-small-body.json").read_text(encoding="utf-8"))
    speeds = {row["system"]: row["tokens_per_second"] for row in record["rows"] if not row["variant"]}
    assert speeds["ours"] >= 5.0 * speeds["naive"]


def test_predictions():
    record = json.loads((BENCHMARKS / "results" / "pipeline-cpu.json").read_text(encoding="utf-8"))
    checks = list(validate(record))
    assert len(checks) >= 6 and all(abs(check.error) <= 0.10 for check in checks)
    assert validation_table(checks) in README


def rows(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_nothing_was_lost_and_a_process_makes_the_body_wait_less():
    assert all(row["wrong"] == 0 for row in rows("ingress"))
    busy = {row["ingress"]: row for row in rows("ingress") if row["what"] == "busy"}
    assert busy["process"]["blocked_seconds_per_gb"] < busy["thread"]["blocked_seconds_per_gb"] / 4


def test_100_mb_take_the_wires_own_time_and_an_update_goes_on_after_a_drop():
    activations = [row for row in rows("transfers") if row["what"] == "activations"]
    assert len(activations) == 5 and all(row["bytes"] == 100_000_000 and row["ratio"] < 1.2 for row in activations)
    # Older records call it a half.
    (update,) = [row for row in rows("transfers") if row["what"] in ("update", "half")]
    assert update["bytes"] == 1_400_000_000 and update["cuts"] == 1 and update["is_whole"]
    assert update["resent_bytes"] < 0.01 * update["bytes"]


def test_256_streams_for_10_minutes():
    last = rows("streams")[-1]
    assert last["streams"] == 256 and last["seconds"] >= 600
    assert last["messages"] == last["answers"] and last["wrong"] == last["wrong_answers"] == 0
    memory = [row["rss_mb"] for row in rows("streams") if row["seconds"] > 60]
    half = len(memory) // 2
    assert abs(sum(memory[half:]) / len(memory[half:]) - sum(memory[:half]) / half) < 10


def test_glue_beside_plain_transformers_code():
    record = json.loads((BENCHMARKS / "results" / "glue-plain.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in record["rows"]} == {"SST-2", "RTE", "STS-B"}
    assert glue_table(record["rows"]) in README
    for row in record["rows"]:
        assert row["train_loss"] == pytest.approx(row["plain_train_loss"], abs=1e-7)
        assert row["largest_difference"] < 0.005


def test_plain_transformers_code_gives_the_same_on_all_of_sst_2():
    record = json.loads((BENCHMARKS / "results" / "glue-sst-2-plain.json").read_text(encoding="utf-8"))
    assert glue_table(record["rows"]) in README
    (row,) = record["rows"]
    assert (row["train_examples"], row["largest_difference"]) == (67_349, 0.0)
    assert row["train_loss"] == row["plain_train_loss"]


def test_glue_sst_2():
    record = json.loads((BENCHMARKS / "results" / "glue-sst-2.json").read_text(encoding="utf-8"))
    (row,) = record["rows"]
    assert row["train_examples"] == 67_349 and len(row["epochs"]) == 1
    assert row["dev"]["dev"]["accuracy"] > 0.88
    assert f"{100 * row['dev']['dev']['accuracy']:.1f} % on the whole dev set" in README


def test_fine_tuning_sst_2():
    record = json.loads((BENCHMARKS / "results" / "fine-tuning-sst-2.json").read_text(encoding="utf-8"))
    assert fine_tuning_table(record["rows"]) in README
    assert record["train_examples"] == 67_349
    assert [row["way"] for row in record["rows"]] == ["in one place", "split, 1 client", "synchronous, 4 clients"]
    assert all(row["measures"]["accuracy"] > 0.88 for row in record["rows"])


def test_simulated_schedules_add_up_and_none_fails_now():
    rows = json.loads((BENCHMARKS / "results" / "schedules.json").read_text(encoding="utf-8"))["rows"]
    played = 0
    for row in rows:
        assert row["first_seed"] == played + 1 and "dirty" not in row["commit"]
        played += row["schedules"]
    faults = sum(sum(row["faults"].values()) for row in rows)
    assert played >= 10**6 and not any(row["failures"] for row in rows[1:])
    told = f"Seeds 1 to {played:,} have been played, with {faults:,} faults. One failed, 74065, and is mended"
    assert rows[0]["failures"].keys() == {"74065"} and told in " ".join(README.split())
    assert f"{played:,} have been played" in (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")


def test_goodput_of_a_run_that_is_disturbed():
    record = json.loads((BENCHMARKS / "results" / "goodput.json").read_text(encoding="utf-8"))
    assert faults_table(record) in README and "dirty" not in record["commit"]
    # What the page claims.
    assert record["goodput"] >= 0.98 and f"kept {100 * record['goodput']:.1f} % in half an hour" in README
    speeds = record["tokens"] / record["seconds"], record["undisturbed_tokens"] / record["undisturbed_seconds"]
    assert speeds[0] / speeds[1] == pytest.approx(record["goodput"], abs=0.001)
    assert (record["faults"], record["processes"]) == (62, 32) == (sum(row["faults"] for row in record["rows"]), 32)
    assert f"{record['lost_masked_tokens']} were left out" in README and 1800 <= record["seconds"] < 1810


def test_two_thousand_faults_leave_no_trace_in_a_run_that_waits():
    record = json.loads((BENCHMARKS / "results" / "faults.json").read_text(encoding="utf-8"))
    assert faults_table(record) in README and "dirty" not in record["commit"]
    # What the page claims.
    assert record["is_identical"] and record["on_loss"] == "wait" and record["lost_masked_tokens"] == 0
    assert record["faults"] == 2000 == sum(row["faults"] for row in record["rows"])
    assert {row["kind"] for row in record["rows"] if row["faults"]} == set(KINDS) and record["processes"] == 6
    assert f"of its {record['windows']:,} windows are those of the undisturbed run" in " ".join(README.split())


def test_wrong_messages_change_nothing():
    record = json.loads((BENCHMARKS / "results" / "lies.json").read_text(encoding="utf-8"))
    assert lies_table(record["rows"]) in README
    # What the page claims.
    counts = {
        what: sum(row["refused"] + row["ignored"] for row in record["rows"] if row["what"] == what)
        for what in ("malformed", "a lie")
    }
    assert counts["malformed"] >= 1_000_000 and counts["a lie"] >= 100_000
    assert record["different"] == []
    before, after = record["memory_mb"]
    assert after < 1.05 * before
    assert (
        f"{before:.0f} MB after the first fifty runs, {after:.0f} MB after the last of {record['runs']:,}"
        in " ".join(README.split())
    )


def test_liars_cost_little_under_robust_rules():
    record = json.loads((BENCHMARKS / "results" / "liars.json").read_text(encoding="utf-8"))
    # What the page claims.
    windows, words = record["settings"]["windows"], " ".join(README.split())
    lost: dict[str, dict[tuple[str, int], float]] = {}
    for mode in ("whole", "synchronous"):
        assert liars_table(record["rows"], mode, "flip") in README
        rows = {(row["combine"], row["liars"]): row for row in record["rows"] if row["mode"] == mode}
        honest = rows["mean", 0]["held_out_loss"]
        assert rows["mean, no bound", 0]["held_out_loss"] == honest
        # With whole models every update of two windows, else each gradient and each update.
        times = windows // 2 if mode == "whole" else 2 * windows
        for (combine, liars), row in rows.items():
            if combine in ("mean", "mean, no bound") or not liars:
                assert row["bounded"] == (liars * times if combine == "mean" else 0)
        lost[mode] = {which: round(row["held_out_loss"] - honest, 2) for which, row in rows.items()}
    whole, split = lost["whole"], lost["synchronous"]
    told = f"one liar costs {whole['mean', 1]} nats with whole models and {split['mean', 1]} in `synchronous`"
    assert told in words and min(whole["mean", 3], split["mean", 3]) > 7
    assert f"at a cost of {whole['krum', 3]} nats, the median and the trimmed mean at {whole['median', 3]}" in words
    assert whole["median", 3] == whole["trimmed_mean", 3]
    assert f"three of ten take {whole['norm_clipping', 3]}" in words
    assert all(1 < split[rule, 3] < 1.2 for rule in ("median", "norm_clipping"))
    assert f"dear even without a liar, {split['median', 0]} nats" in words
    assert f"({record['unigram_loss']:.2f})" in README
