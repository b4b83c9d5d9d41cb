"""`fedbert-ds bench codecs`: what each codec costs in loss at equal tokens, and in bytes, beside fp32.

Real halves and real frames in one process (`split`); a run that is complete already is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.codecs.settings import BASELINE, FURTHER, MAIN, Setting
from fedbert_ds.config import Cut, RunConfig, load_config
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.progress import duration
from fedbert_ds.telemetry.record import SOURCE, source_commit, write_record

if TYPE_CHECKING:
    from benchmarks.codecs.counted import Sizes
    from fedbert_ds.data.corpus import Article
    from fedbert_ds.data.masking import Batch

RUN_FILE = SOURCE / "configs" / "default.yaml"
TRAINED = (
    "run.windows=300",
    "optimizer.warmup_windows=30",
)
"""Over the default run file: long enough to leave the plateau of word frequencies well behind."""
QUICK = ("run.windows=4", "tokenizer.vocab_size=500", "window.tokens=1024", "optimizer.warmup_windows=2")
QUICK_ARTICLES = 60
TEXT_SEED = 1
"""Which articles are held out, the same for all seeds."""


@dataclass(frozen=True)
class CodecsOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record; its picture lies beside it as .png."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Source of the articles; see data.source of the run file."""
    work: Path = Path("runs/bench-codecs")
    """Keeps the finished runs."""
    seeds: int = 3
    minutes: float | None = None
    """No run is begun after so many minutes; the record holds what is finished."""
    vocabulary: str | None = None
    """Tokenizer of the texts whose bytes are counted, as tokenizer.path; None learns as many word pieces as BERT's."""
    count: tuple[str, ...] = ()
    """Further texts whose bytes are counted, as `data`."""
    quick: bool = False
    overrides: tuple[str, ...] = ()
    """`section.key=value`, for every run alike."""


class Text:
    """Articles held out and to train on, as sequences, and the word pieces learned from the latter."""

    def __init__(self, config: RunConfig, quick: bool) -> None:
        from fedbert_ds.data.corpus import read_articles
        from fedbert_ds.data.masking import encode
        from fedbert_ds.data.shards import hold_out
        from fedbert_ds.data.tokenizer import train_wordpiece

        limit = QUICK_ARTICLES if quick else config.data.max_articles
        self.articles: list[Article] = list(read_articles(config.data.source, max_articles=limit))
        self.articles_trained_on, held_out = hold_out(self.articles, config.data.held_out, TEXT_SEED)
        self.tokenizer = train_wordpiece(self.articles_trained_on, config.tokenizer.vocab_size)
        length = config.data.sequence_length
        self.train = encode(self.articles_trained_on, self.tokenizer, length)
        self.held_out = encode(held_out, self.tokenizer, length)

    def held_out_batches(self, config: RunConfig) -> list[Batch]:
        """The same masked tokens for every run."""
        from fedbert_ds.bench.text import batches_of

        batches = batches_of(config, self.held_out, self.tokenizer, "held out", TEXT_SEED)
        count = max(1, self.held_out.num_tokens // config.window.tokens)
        return [batches.next_batch(number, config.window.tokens) for number in range(count)]

    def unigram_loss(self, config: RunConfig) -> float:
        """Held-out loss of word frequency alone, nats."""
        import torch

        from fedbert_ds.evaluation.masked_lm import unigram_loss

        labels = torch.cat([batch.labels for batch in self.held_out_batches(config)])
        return unigram_loss(self.train.token_counts(len(self.tokenizer)), labels)

    @property
    def digest(self) -> str:
        """Of everything that is trained on or held out."""
        digest = hashlib.sha256(self.train.tokens.numpy().tobytes())
        digest.update(self.held_out.tokens.numpy().tobytes())
        return digest.hexdigest()[:16]


def bench_codecs(options: CodecsOptions) -> None:
    """Train what is not finished, then write record and picture and print the table; one thread, on the CPU.

    Raises a UserError when the settings or the text are wrong.
    """
    import torch

    from benchmarks.codecs.counted import counted, counted_table
    from fedbert_ds.data.corpus import read_articles

    if not RUN_FILE.is_file():
        raise RunError(
            "bench codecs reads configs/default.yaml: it needs the source tree, installed with pip install -e"
        )
    torch.set_num_threads(1)
    config = load_config(RUN_FILE, overrides_of(options))
    commit, text, started = source_commit(), Text(config, options.quick), time.monotonic()
    seeds, runs = range(1, (1 if options.quick else options.seeds) + 1), []
    for setting, seed in ((setting, seed) for group in (MAIN, FURTHER) for seed in seeds for setting in group):
        late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        run = _finished(setting, seed, config, text, options.work, begin=not late)
        runs += [] if run is None else [run]
    counts = [
        counted(source, articles, options.vocabulary, (*MAIN, *FURTHER), quick=options.quick)
        for source, articles in (
            (options.data, text.articles_trained_on),
            *((source, list(read_articles([source]))) for source in options.count),
        )
    ]
    rows = rows_of(runs)
    summary = summarize(rows, counts[0].sizes)
    texts = [count.record(summary) for count in counts]
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        summary=summary,
        settings=_settings(config),
        text={
            "source": Path(options.data).name, "sha256": text.digest, "articles": len(text.articles),
            "tokens": text.train.num_tokens, "held_out_tokens": text.held_out.num_tokens,
            "unigram_loss": text.unigram_loss(config),
        },
        counted=texts,
    )  # fmt: skip
    picture = options.out.with_suffix(".png")
    draw(picture, summary)
    print(f"\n{table(summary)}\n\n{counted_table(texts)}\n\nrecord  {options.out}\npicture {picture}", flush=True)


def overrides_of(options: CodecsOptions) -> tuple[str, ...]:
    """The run file's overrides; the user's come last but for the text."""
    quick = QUICK if options.quick else ()
    return (*TRAINED, *quick, *options.overrides, f"data.source={json.dumps([options.data])}")


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per run; `cost` is its held-out loss over that of fp32 with the same model and seed, less 1."""
    losses = {(run["setting"], run["seed"]): run["held_out_loss"] for run in runs}
    rows = []
    for run in runs:
        setting = Setting(**json.loads(run["setting"]))
        # A factorized model in fp32 is held against the full one.
        plain = setting.codecs == ("fp32",)
        baseline = BASELINE if plain else Setting(model=setting.model)
        loss = losses.get((_key(baseline), run["seed"]))
        rows.append(
            {
                **asdict(setting),
                "seed": run["seed"],
                "tokens": run["tokens"],
                "held_out_loss": run["held_out_loss"],
                "training_loss": run["training_loss"],
                "cost": None if loss is None else run["held_out_loss"] / loss - 1.0,
                "bytes_per_token_up": run["bytes_up"] / run["tokens"],
                "bytes_per_token_down": run["bytes_down"] / run["tokens"],
                "seconds": round(run["seconds"], 1),
            }
        )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], sizes: Mapping[Setting, Sizes]) -> list[dict[str, Any]]:
    """One row per setting that has a run: bytes as counted at width 768, cost in the mean and its range over seeds."""
    summary = []
    for setting, size in sizes.items():
        mine = [row for row in rows if all(row[name] == value for name, value in asdict(setting).items())]
        costs = [row["cost"] for row in mine if row["cost"] is not None]
        if not costs:
            continue
        summary.append(
            {
                **asdict(setting),
                "seeds": len(costs),
                "held_out_loss": statistics.mean(row["held_out_loss"] for row in mine),
                "cost": statistics.mean(costs),
                "cost_lowest": min(costs),
                "cost_highest": max(costs),
                "bytes_per_token_up": size.up,
                "bytes_per_token_down": size.down,
                "bytes_per_token": size.up + size.down,
                "bytes_per_token_not_compressed": size.not_compressed,
            }
        )
    return summary


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| model | cut | activations | hidden states | gradients | | bytes per token up | down | both "
        "| not compressed | loss cost | range over seeds | seeds |",
        "| --- | --- | --- | --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in summary:
        lines.append(
            f"| {row['model']} | {row['cut']} | {row['activations']} | {row['hidden']} | {row['gradients']} "
            f"| {row['extra']} | {row['bytes_per_token_up']:,.0f} | {row['bytes_per_token_down']:,.0f} "
            f"| {row['bytes_per_token']:,.0f} | {row['bytes_per_token_not_compressed']:,.0f} "
            f"| {100 * row['cost']:+.2f} % | {100 * row['cost_lowest']:+.2f} to {100 * row['cost_highest']:+.2f} "
            f"| {row['seeds']} |"
        )
    return "\n".join(lines)


def draw(path: Path, summary: Sequence[Mapping[str, Any]]) -> None:
    """Loss cost against bytes per token, a point per setting with its range over seeds."""
    # The figure is built without pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in summary:
        cost, low, high = (100 * row[name] for name in ("cost", "cost_lowest", "cost_highest"))
        color = _COLORS[row["model"], row["cut"]]
        bars = [[cost - low], [high - cost]]
        axes.errorbar([row["bytes_per_token"]], [cost], bars, fmt="o", color=color, capsize=2, linewidth=1.0)
        fields = {name: row[name] for name in asdict(BASELINE)}
        setting = Setting(**fields)
        label = " / ".join(setting.codecs).replace("_hadamard", "") + (f"\n{setting.extra}" if setting.extra else "")
        axes.annotate(label, (row["bytes_per_token"], cost), (5, 4), textcoords="offset points", fontsize=7)
    for (model, cut), color in _COLORS.items():
        axes.plot([], [], "o", color=color, label=f"{model} model, cut: {cut}")
    axes.axhline(0.0, color="#6b6b6b", linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("bytes per token, both ways, at width 768 and 16k tokens a message")
    axes.set_ylabel("held-out loss above fp32, %")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


_COLORS = {
    ("full", "rows"): "#1f4e8c",
    ("full", "embeddings"): "#c98a1b",
    ("factorized", "rows"): "#4c7a34",
}


def _finished(
    setting: Setting, seed: int, config: RunConfig, text: Text, work: Path, *, begin: bool
) -> dict[str, Any] | None:
    """The run: read if it is complete with these very settings, else made, or None when none is to begin."""
    slug = "-".join(
        [setting.model, setting.cut, *setting.codecs, setting.extra.replace(" ", "_") or "plain", f"{seed}"]
    )
    path, fingerprint = work / f"{slug}.json", _fingerprint(config, text)
    if path.is_file():
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["fingerprint"] == fingerprint:
            return run
    if not begin:
        return None
    run = {"setting": _key(setting), "seed": seed, "fingerprint": fingerprint, **train(setting, seed, config, text)}
    work.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(run), encoding="utf-8")
    os.replace(scratch, path)
    print(
        f"{setting.label}, seed {seed}: held-out loss {run['held_out_loss']:.4f}, {duration(run['seconds'])}",
        flush=True,
    )
    return run


def train(setting: Setting, seed: int, config: RunConfig, text: Text) -> dict[str, Any]:
    """Train one setting from scratch: losses, tokens and bytes."""
    from benchmarks.codecs.split_training import RowFeedback, SplitTrainer
    from fedbert_ds.bench.text import batches_of
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_kernels.quantize import GROUP

    started, windows = time.monotonic(), config.run.windows
    section = config.model
    if setting.model == "factorized":
        # A quarter of the width, but no less than the columns that share a scale: padded groups would look too exact.
        size = min(section.hidden_size, max(GROUP, section.hidden_size // 4))
        section = section.model_copy(update={"architecture": "electra", "embedding_size": size})
    model: Any = build_model(section, len(text.tokenizer), text.tokenizer.pad_token_id, seed)
    if setting.extra == "unit projection":
        weight = model.electra.embeddings_project.weight
        weight.data *= 1.0 / (section.initializer_range * weight.shape[1] ** 0.5)
    cut: Cut = setting.cut
    half, body = split(model, cut)
    trainer = SplitTrainer(
        half,
        body,
        setting.wire,
        config.optimizer,
        windows,
        seed,
        stochastic=setting.extra == "stochastic",
        centred=setting.extra == "centred",
        halves="int8" if setting.extra == "int8 halves" else "fp32",
        feedback=RowFeedback(len(text.tokenizer), half.widths.activations) if setting.extra == "row feedback" else None,
    )
    batches = batches_of(config, text.train, text.tokenizer, "bench", seed)
    crossed = [
        trainer.train_window(window, batches.next_batch(window, config.window.tokens)) for window in range(windows)
    ]
    last = crossed[-max(1, windows // 20) :]
    return {
        "held_out_loss": trainer.loss(text.held_out_batches(config)),
        "training_loss": sum(one.loss_sum for one in last) / sum(one.masked for one in last),
        "tokens": sum(one.tokens for one in crossed),
        "bytes_up": sum(one.bytes_up for one in crossed),
        "bytes_down": sum(one.bytes_down for one in crossed),
        "seconds": time.monotonic() - started,
    }


def _key(setting: Setting) -> str:
    return json.dumps(asdict(setting))


def _settings(config: RunConfig) -> dict[str, Any]:
    """What of the run file the runs follow, with no path of this machine in it."""
    tree = json.loads(config.model_dump_json(include={"model", "tokenizer", "optimizer"}))
    data = config.data
    return tree | {
        "windows": config.run.windows,
        "tokens": config.window.tokens,
        "sequence_length": data.sequence_length,
        "mask_probability": data.mask_probability,
        "whole_word": data.whole_word,
        "held_out": data.held_out,
    }


def _fingerprint(config: RunConfig, text: Text) -> str:
    return hashlib.sha256(json.dumps([_settings(config), text.digest]).encode()).hexdigest()
