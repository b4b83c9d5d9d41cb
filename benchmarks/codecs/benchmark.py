"""What each codec costs in loss at equal tokens, and in bytes, beside fp32.

Real client halves and real frames in one process (`split_training`); a run that is complete already
is not repeated.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.codecs.counted import counted
from benchmarks.codecs.report import counted_table, draw, rows_of, summarize, table
from benchmarks.codecs.runs import Text, finished, settings_of
from benchmarks.codecs.settings import FURTHER, MAIN, RUN_FILE, CodecsOptions, only, overrides_of
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record


def bench_codecs(options: CodecsOptions) -> None:
    """Train what is not finished, then write record and picture and print the table; one thread, on
    the CPU.

    Raises a UserError when the settings or the text are wrong.
    """
    torch.set_num_threads(1)
    config = load_config(RUN_FILE, overrides_of(options))
    commit, text, started = source_commit(), Text(config, options.quick), time.monotonic()
    seeds, runs = range(1, (1 if options.quick else options.seeds) + 1), []
    main, further = only(MAIN, options.codecs), only(FURTHER, options.codecs)
    for setting, seed in ((setting, seed) for group in (main, further) for seed in seeds for setting in group):
        late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
        run = finished(setting, seed, config, text, options.work, begin=not late)
        runs += [] if run is None else [run]
    counts = [
        counted(source, articles, options.vocabulary, (*main, *further), quick=options.quick)
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
        settings=settings_of(config),
        text={
            "source": Path(options.data).name, "sha256": text.digest, "articles": len(text.articles),
            "tokens": text.train.num_tokens, "held_out_tokens": text.held_out.num_tokens,
            "unigram_loss": text.unigram_loss(config),
        },
        counted=texts,
    )  # fmt: skip
    drawn = options.out.with_suffix(".png")
    draw(drawn, summary)
    print(f"\n{table(summary)}\n\n{counted_table(texts)}\n\nrecord  {options.out}\npicture {drawn}", flush=True)
