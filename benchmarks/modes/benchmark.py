"""Every federated mode and centralized training on the same text, run after run.

Each federated run is the real launcher with its ranks and client processes; centralized training is
a process of plain torch. All run on the CPU, and a run that is complete already is not repeated.
"""

from __future__ import annotations

from benchmarks.modes.comparison import check_same_batches, draw, final, rows, table
from benchmarks.modes.runs import finished
from benchmarks.modes.systems import NUM_RANKS, RUN_FILE, ModesOptions, run_file_overrides
from benchmarks.modes.tuning import at_rate, best_rates, tried
from benchmarks.modes.tuning import table as tuning_table
from fedbert_ds.bench.process import exit_on_sigterm
from fedbert_ds.compare.runs import check_same_text, public_settings, text_facts
from fedbert_ds.compare.systems import CENTRALIZED
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record


def bench_modes(options: ModesOptions) -> None:
    """Run what is not complete, then write record and picture and print the table.

    Raises a UserError when the settings or the text are wrong or a run fails, naming its log.
    """
    exit_on_sigterm()
    commit = source_commit()
    trials = tried(options, commit) if options.learning_rates else []
    best = best_rates(trials)
    tuned = {system: at_rate(options, best.get(system)) for system in options.systems}
    configs = {system: load_config(RUN_FILE, run_file_overrides(system, theirs)) for system, theirs in tuned.items()}
    reference = configs[CENTRALIZED].run.directory
    runs = [finished(system, config, tuned[system], commit, reference) for system, config in configs.items()]
    check_same_batches(runs)
    check_same_text([config.run.directory for config in configs.values()])
    final_rows = final(runs, CENTRALIZED.name)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows(runs),
        settings=public_settings(configs[CENTRALIZED]),
        ranks=NUM_RANKS,
        text=text_facts(reference),
        final=final_rows,
        **({"tuning": [trial.row() for trial in trials]} if trials else {}),
    )
    if trials:
        print(f"\n{tuning_table([trial.row() for trial in trials])}", flush=True)
    drawn = options.out.with_suffix(".png")
    draw(drawn, runs, CENTRALIZED.name)
    print(f"\n{table(final_rows, CENTRALIZED.name)}\n\nrecord  {options.out}\npicture {drawn}", flush=True)
