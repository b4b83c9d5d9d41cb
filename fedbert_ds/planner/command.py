"""`fedbert-ds plan`: one plan, a sweep, or predictions beside a record."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fedbert_ds.errors import ConfigError
from fedbert_ds.planner.derive import Machines
from fedbert_ds.planner.plan import as_row, draw, report, sweep
from fedbert_ds.planner.scenario import Spread
from fedbert_ds.planner.validate import table, validate
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import command_line, source_commit, write_record


def run_plan(options: argparse.Namespace) -> None:
    """Print the plan, sweep or predictions, and write the record if `--out` is given.

    Raises ConfigError for options that do not fit together.
    """
    rows: list[dict[str, Any]] = []
    if options.validate is not None:
        try:
            record = json.loads(options.validate.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--validate {options.validate}: not a record of bench pipeline ({error}); give what its --out wrote"
            ) from error
        checks = list(validate(record))
        print(table(checks))
        rows = [
            dict(check.row)
            | {
                "predicted_tokens_per_second": check.tokens_per_second,
                "predicted_utilization": check.utilization,
                "error": check.error,
            }
            for check in checks
        ]
    else:
        if options.config is None:
            raise ConfigError(
                "plan needs --config FILE, a run file such as configs/bert-base.yaml, or --validate; add one"
            )
        if not options.tokens > 0:
            raise ConfigError(f"--tokens {options.tokens}: give a number above 0")
        config, machines = load_config(options.config, options.overrides), machines_of(options)
        if options.sweep:
            if options.out is None:
                raise ConfigError("--sweep needs --out FILE.json; add it")
            share = max(1, config.window.tokens // machines.clients)
            for prediction in sweep(config, machines, options.tokens, share):
                rows.append(as_row(prediction))
                print(
                    f"{prediction.gpus:3} GPUs  {prediction.clients:6,} clients  "
                    f"{prediction.tokens_per_second:12,.0f} tokens/s  body busy {100 * prediction.busy_share:5.1f} %  "
                    f"{prediction.bottleneck:8}  {prediction.days:8.1f} days  cost {prediction.cost:12,.0f}  "
                    f"coordinator {prediction.coordinator_seconds:.3f} s a window",
                    flush=True,
                )
            draw(options.out.with_suffix(".png"), rows)
        else:
            plan, words = report(config, machines, options.tokens)
            print(words)
            rows = [as_row(plan)]
    if options.out is not None:
        write_record(options.out, command=command_line(), commit=source_commit(), rows=rows)
        print(f"record  {options.out}")


def machines_of(options: argparse.Namespace) -> Machines:
    """The machines in the options; ConfigError for numbers out of range."""
    for name in ("gpus", "clients", "tflops", "client_gflops", "mbit", "efficiency", "gpu_memory", "cores"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a number above 0")
    if options.rtt < 0 or options.spread < 0 or options.host_ms < 0:
        raise ConfigError("--rtt, --spread and --host-ms cannot be below 0; give numbers from 0 on")
    rate = options.mbit * 1e6 / 8
    return Machines(
        gpus=options.gpus,
        gpu_flops=options.tflops * 1e12,
        efficiency=options.efficiency,
        gpu_memory=options.gpu_memory * 1e9,
        launch_per_layer=options.host_ms / 1e3,
        codec_cores=options.cores,
        price=options.price,
        clients=options.clients,
        client_flops=options.client_gflops * 1e9,
        rtt=options.rtt / 1e3,
        up=rate,
        down=rate,
        spread=Spread(options.spread, options.spread),
    )
