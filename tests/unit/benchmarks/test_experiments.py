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


def test_at_other_rates_and_with_another_eps():
    columns = {
        "6e-3": "owners-modernbert-seed-0",
        "1.2e-2": "owners-modernbert-rate-seed-0",
        "6e-3, `eps` 1e-3": "owners-modernbert-eps-glue",
        "1.2e-2, `eps` 1e-3": "owners-modernbert-eps-rate-seed-0",
    }
    found = {head: by_system(record_of(name)["rows"]) for head, name in columns.items()}
    losses = {
        system: {head: rows[system]["held_out_loss"] for head, rows in found.items() if system in rows}
        for system in ("centralized", "parallel", "fedavg", "diloco")
    }
    cells = [[name, *(f"{of[head]:.3f}" if head in of else "" for head in columns)] for name, of in losses.items()]
    assert markdown(["system", *columns], cells, words=1) in PAGE
    once, twice, at_eps, both = columns
    centralized, parallel, fedavg = (losses[name] for name in ("centralized", "parallel", "fedavg"))
    assert centralized[once] < centralized[twice] < fedavg[twice] < fedavg[once] - 0.1
    assert f"FedAvg then is {fedavg[twice] - centralized[once]:.2f} nats behind" in TOLD
    assert f"centralized training, DiLoCo {losses['diloco'][twice] - centralized[once]:.2f}" in TOLD
    costs = (parallel[at_eps] - parallel[once], centralized[both] - centralized[twice], fedavg[twice] - fedavg[both])
    assert min(costs) > 0
    costly = "costs `parallel` {:.2f} nats and `centralized`, at 1.2e-2, {:.2f}; FedAvg gains {:.3f}"
    assert costly.format(*costs) in TOLD


def test_a_clients_adam_moves_all_words_one_way_and_a_larger_eps_does_not():
    before = by_system(record_of("owners-modernbert-words-seed-1")["rows"])
    with_eps = by_system(record_of("owners-modernbert-eps-glue")["rows"])
    with_both = by_system(record_of("owners-modernbert-eps-rate-glue")["rows"])
    words = [before[name]["word_cosine"] for name in ("centralized", "parallel", "fedavg")]
    assert "{:.2f} with `centralized`, {:.2f} with `parallel` and {:.2f} with FedAvg".format(*words) in TOLD
    assert words[0] < 0.15 and min(words[1:]) > 0.7
    mended = with_eps["parallel"]["word_cosine"], with_both["fedavg"]["word_cosine"]
    assert "they are {:.2f} with `parallel` and {:.2f} with FedAvg".format(*mended) in TOLD and max(mended) < 0.35


def test_those_models_on_glue():
    rows: dict[str, dict[str, Any]] = {}
    for name, suffix, systems in (
        ("glue", "", None),
        ("rate-glue", ", at 1.2e-2", ("fedavg",)),
        ("eps-glue", ", `eps` 1e-3", ("not pre-trained", "parallel")),
        ("eps-rate-glue", ", at 1.2e-2, `eps` 1e-3", ("fedavg",)),
    ):
        for label, (row,) in grouped(record_of(f"owners-modernbert-{name}")["rows"]).items():
            if row.get("glue") and (systems is None or row["system"] in systems):
                told = "again not pre-trained" if rows and row["system"] == "not pre-trained" else f"{label}{suffix}"
                rows[told] = row
    scores = {label: [[100 * one for one in row["glue"][task]] for task in GLUE_TASKS] for label, row in rows.items()}
    cells = [
        [label, *(with_spread(task, 1) for task in tasks), f"{fmean(map(fmean, tasks)):.1f}"]
        for label, tasks in scores.items()
    ]
    assert markdown(["system", *GLUE_TASKS, "average"], cells, words=1) in PAGE
    assert all(len(task) == 3 for tasks in scores.values() for task in tasks)
    # Each beside the model that the same machine did not pre-train.
    untrained, again = scores.pop("not pre-trained"), scores.pop("again not pre-trained")
    assert {label.partition(",")[0] for label in scores} == {
        "centralized", "synchronous", "parallel", "sequential", "fedavg", "diloco",
    }  # fmt: skip
    beside = {label: again if "`eps`" in label else untrained for label in scores}
    gains = {
        label: [fmean(a) - fmean(b) for a, b in zip(tasks, beside[label], strict=True)]
        for label, tasks in scores.items()
    }
    average = {label: fmean(each) for label, each in gains.items()}
    told = [f"{gain:.1f} ({_told(label)})" for label, gain in average.items()]
    assert f"rises by {', '.join(told[:-1])} and {told[-1]} points" in TOLD
    of_seeds = [
        fmean(task[seed] for task in tasks) - fmean(task[seed] for task in beside[label])
        for label, tasks in scores.items()
        for seed in range(3)
    ]
    assert f"with each seed, by {min(of_seeds):.1f} to {max(of_seeds):.1f} points" in TOLD and min(of_seeds) > 0
    not_better = {
        (label, task): gain
        for label, each in gains.items()
        for task, gain in zip(GLUE_TASKS, each, strict=True)
        if gain < 1e-9  # as many right answers as without
    }
    assert not_better.keys() == NOT_BETTER and f"{len(not_better)} of {4 * len(gains)} scores are not" in TOLD
    for (label, task), gain in not_better.items():
        assert f"{_told(label)} on {task} ({gain:+.1f})" in TOLD
    in_readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"gain {min(average.values()):.1f} to {max(average.values()):.1f} points on GLUE" in in_readme
    on_sts_b, on_qnli, on_sst_2, _ = zip(*gains.values(), strict=True)
    assert f"by {min(on_qnli):.1f} to {max(on_qnli):.1f} on QNLI" in TOLD and f"{max(on_sst_2):.1f} at most" in TOLD
    pairs = ("parallel, average every 10", "fedavg, average every 2, at 1.2e-2")
    (parallel, with_eps), (fedavg, fedavg_with_eps) = (
        (gains[label][0], gains[f"{label}, `eps` 1e-3"][0]) for label in pairs
    )
    assert f"`parallel` gains {with_eps:.1f} points on STS-B instead of {parallel:.1f}" in TOLD
    assert f"FedAvg at 1.2e-2 {fedavg_with_eps:.1f} instead of {fedavg:.1f}" in TOLD and max(on_sts_b) == with_eps
    centralized, synchronous = (list(map(fmean, scores[name])) for name in ("centralized", "synchronous"))
    apart = [abs(a - b) for a, b in zip(centralized, synchronous, strict=True)]
    assert f"by {min(apart):.1f} to {max(apart):.1f} points" in TOLD


NOT_BETTER = {
    ("parallel, average every 10", "RTE"),
    ("fedavg, average every 2", "STS-B"),
    ("fedavg, average every 2, at 1.2e-2", "SST-2"),
    ("parallel, average every 10, `eps` 1e-3", "SST-2"),
}


def _told(label: str) -> str:
    """A system as a sentence of the page has it."""
    system, *settings = label.split(", ")
    names = {"fedavg": "FedAvg", "diloco": "DiLoCo"}
    kept = [one.replace("`eps`", "with `eps`") for one in settings if one.startswith(("at", "`eps`"))]
    return " ".join([names.get(system, f"`{system}`"), *kept])


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
