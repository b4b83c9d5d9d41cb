"""What docs/experiments.md says of comparisons is what their records say."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from fedbert_ds.compare.table import grouped, owner_means, table, verdict, with_spread
from fedbert_ds.telemetry.tables import markdown

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
TOLD = " ".join(PAGE.split())
GLUE_TASKS = ("STS-B", "QNLI", "SST-2", "RTE")


def record_of(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def one_of_each_seed(name: str) -> list[dict[str, Any]]:
    """Every seed is a record of its own; the page has them together."""
    records = [record_of(f"{name}-seed-{seed}") for seed in range(3)]
    assert len({json.dumps(record["settings"], sort_keys=True) for record in records}) == 1
    rows = [row for record in records for row in record["rows"]]
    assert table(rows) in PAGE and all(line in TOLD for line in verdict(rows))
    assert all(sorted(row["seed"] for row in group) == [0, 1, 2] for group in grouped(rows).values())
    return records


def by_system(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["system"]: row for row in rows}


def test_what_joining_gives():
    rows = [row for record in one_of_each_seed("owners") for row in record["rows"]]
    systems = grouped(rows)
    means = {label: owner_means(group) for label, group in systems.items()}
    for owner, loss in means["synchronous"].items():
        assert abs(loss - means["centralized"][owner]) < 0.02
        assert loss < means["alone-share"][owner] - 0.1
        assert loss < means["word frequency"][owner] - 0.8
        assert loss < means["fedavg, average every 2"][owner] < means["diloco, average every 2, server_lr 0.1"][owner]
    bytes_per_token = {label: group[0].get("bytes_per_token") for label, group in systems.items()}
    assert 2400 < bytes_per_token["fedavg, average every 2"] < bytes_per_token["synchronous"] < 2700


def test_what_joining_gives_far_below_word_frequency():
    records = one_of_each_seed("owners-modernbert")
    apart = []
    for record in records:
        held_out = {name: row["held_out"] for name, row in by_system(record["rows"]).items()}
        for owner, loss in held_out["synchronous"].items():
            apart.append(abs(loss - held_out["centralized"][owner]))
            assert loss < held_out["word frequency"][owner] - 2.5
            assert loss < held_out["fedavg"][owner] < held_out["diloco"][owner]
            assert loss < held_out["parallel"][owner] < held_out["sequential"][owner]
            assert held_out["parallel"][owner] < held_out["fedavg"][owner]
            assert loss < held_out["alone-share"][owner]
    assert f"{max(apart):.3f} at most for one owner in one seed" in TOLD and max(apart) < 0.05
    rows = [row for record in records for row in record["rows"]]
    systems = {name: [row for row in rows if row["system"] == name] for name in by_system(rows)}
    means = {name: owner_means(group) for name, group in systems.items()}
    losses = {name: fmean(row["held_out_loss"] for row in group) for name, group in systems.items()}
    assert f"{abs(losses['synchronous'] - losses['centralized']):.4f} nats between the means" in TOLD
    gains = {owner: means["alone-share"][owner] - loss for owner, loss in means["synchronous"].items()}
    least, most = gains["gcide"], gains["handbook"]
    assert (least, most) == (min(gains.values()), max(gains.values()))
    gain = f"by {fmean(gains.values()):.2f} nats on average, from {least:.2f} (gcide, with 40 MB of its own) to "
    assert gain + f"{most:.2f} (handbook)" in TOLD
    behind = {owner: loss - means["alone"][owner] for owner, loss in means["synchronous"].items()}
    reference = -behind.pop("reference")
    assert f"by {min(behind.values()):.2f} to {max(behind.values()):.2f} nats for five owners" in TOLD
    assert f"the federation is {reference:.2f} nats below it" in TOLD
    minutes = [sum(row.get("seconds", 0.0) for row in record["rows"]) / 60 for record in records]
    assert f"{min(minutes):.0f} to {max(minutes):.0f} minutes of runs a seed" in TOLD
    costs = {name: loss - losses["synchronous"] for name, loss in losses.items()}
    assert "FedAvg is {fedavg:.2f} nats behind and DiLoCo {diloco:.2f}".format(**costs) in TOLD
    assert "`parallel` is {parallel:.2f} nats behind".format(**costs) in TOLD
    assert "`sequential` {sequential:.2f}".format(**costs) in TOLD
    sent = {name: fmean(row["bytes_per_token"] for row in systems[name]) for name in ("parallel", "sequential")}
    shares = [100 * each / fmean(row["bytes_per_token"] for row in systems["synchronous"]) for each in sent.values()]
    assert f"with {shares[0]:.0f} % of its bytes" in TOLD and f"with {shares[1]:.0f} %" in TOLD


def test_at_twice_the_rate_fedavg_is_nearer_and_centralized_training_is_not_better():
    once, twice = (by_system(record_of(f"owners-modernbert{name}-seed-0")["rows"]) for name in ("", "-rate"))
    losses = {name: (once[name]["held_out_loss"], row["held_out_loss"]) for name, row in twice.items()}
    del losses["word frequency"]
    assert losses.keys() == {"centralized", "fedavg", "diloco"}
    cells = [[name, *(f"{loss:.3f}" for loss in both)] for name, both in losses.items()]
    assert markdown(["system", "6e-3", "1.2e-2"], cells, words=1) in PAGE
    assert losses["centralized"][0] < losses["centralized"][1] < losses["fedavg"][1] < losses["fedavg"][0] - 0.1
    assert f"FedAvg then is {losses['fedavg'][1] - losses['centralized'][0]:.2f} nats behind" in TOLD
    assert f"centralized training, DiLoCo {losses['diloco'][1] - losses['centralized'][0]:.2f}" in TOLD


def test_those_models_on_glue():
    once, twice = (record_of(f"owners-modernbert{name}-glue")["rows"] for name in ("", "-rate"))
    rows = {label: group[0] for label, group in grouped(once).items() if group[0].get("glue")}
    rows |= {
        f"{label}, at 1.2e-2": group[0] for label, group in grouped(twice).items() if group[0]["system"] == "fedavg"
    }
    points = {label: [100 * fmean(row["glue"][task]) for task in GLUE_TASKS] for label, row in rows.items()}
    cells = [
        [
            label,
            *(with_spread([100 * score for score in row["glue"][task]], 1) for task in GLUE_TASKS),
            f"{fmean(points[label]):.1f}",
        ]
        for label, row in rows.items()
    ]
    assert markdown(["system", *GLUE_TASKS, "average"], cells, words=1) in PAGE
    assert all(len(row["glue"][task]) == 3 for row in rows.values() for task in GLUE_TASKS)
    untrained = points.pop("not pre-trained")
    assert {label.partition(",")[0] for label in points} == {
        "centralized", "synchronous", "parallel", "sequential", "fedavg", "diloco",
    }  # fmt: skip
    gains = {label: [a - b for a, b in zip(each, untrained, strict=True)] for label, each in points.items()}
    assert all(f"{fmean(each):.1f} (`{label.partition(',')[0]}`)" in TOLD for label, each in list(gains.items())[:4])
    average = {label: fmean(each) for label, each in gains.items()}
    fedavg, diloco, faster = (average[label] for label in list(average)[4:])
    assert f"{fedavg:.1f} (FedAvg; at 1.2e-2 {faster:.1f}) and {diloco:.1f} (DiLoCo) points" in TOLD
    assert min(average.values()) > 1.5
    not_better = {
        (label, task) for label, each in gains.items() for task, gain in zip(GLUE_TASKS, each, strict=True) if gain <= 0
    }
    assert not_better == {
        ("fedavg, average every 2", "STS-B"),
        ("fedavg, average every 2, at 1.2e-2", "SST-2"),
        ("parallel, average every 10", "RTE"),
    }
    most = [each[0] for label, each in gains.items() if not label.startswith(("fedavg", "diloco"))]
    assert f"on STS-B, by {min(most):.1f} to {max(most):.1f} in the first four" in TOLD
    in_readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"gain {min(average.values()):.1f} to {max(average.values()):.1f} points on GLUE" in in_readme
    apart = [abs(a - b) for a, b in zip(points["synchronous"], points["centralized"], strict=True)]
    assert f"by {min(apart):.1f} to {max(apart):.1f} points" in TOLD


def test_longer_training_leaves_word_frequency_far_behind_and_helps_on_two_tasks():
    record = record_of("longer-seed-0")
    assert table(record["rows"]) in PAGE and "dirty" not in record["commit"]
    frequency, untrained, centralized, synchronous = record["rows"]
    for trained in (centralized, synchronous):
        assert all(trained["held_out"][owner] < loss - 2.8 for owner, loss in frequency["held_out"].items())
    behind = synchronous["held_out_loss"] - centralized["held_out_loss"]
    assert f"ends {behind:.2f} nats behind" in TOLD
    points = {
        task: [100 * (sum(row["glue"][task]) - sum(untrained["glue"][task])) / 3 for row in (centralized, synchronous)]
        for task in ("STS-B", "QNLI", "RTE")
    }
    gains = "on STS-B, by {:.1f} (`centralized`) and {:.1f} (`synchronous`) points of 100, and "
    gains += "on QNLI, by {:.1f} and {:.1f}"
    assert gains.format(*points["STS-B"], *points["QNLI"]) in TOLD
    assert min(*points["STS-B"], *points["QNLI"]) > 0 > max(points["RTE"]) > min(points["RTE"]) > -2.7


def test_every_mode_goes_on_from_a_checkpoint():
    rows = record_of("continued-minilm")["rows"]
    assert table(rows) in PAGE
    losses = {label: owner_means(group) for label, group in grouped(rows).items()}
    before = losses.pop("before training")
    systems = {label.partition(",")[0] for label in losses} - {"word frequency"}
    assert systems == {"centralized", "synchronous", "parallel", "sequential", "fedavg", "diloco", "muloco"}
    assert all(losses[label][owner] < before[owner] for label in losses for owner in before)
    assert all(losses["synchronous"][owner] < losses["word frequency"][owner] - 0.3 for owner in before)
