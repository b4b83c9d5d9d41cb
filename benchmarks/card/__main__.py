"""Everything a GPU is needed for, in so many minutes: tests, waits, attention, body, a whole run.

Without a GPU it runs at toy size and shows that the steps work; such a record says nothing of a
card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.card.runner import Outcome, run_steps
from benchmarks.card.steps import STEPS
from fedbert_ds.bench.commands import typed
from fedbert_ds.errors import ConfigError, one_line_errors

PROGRAM = "python -m benchmarks.card"


@dataclass(frozen=True)
class CardOptions:
    """What a user gives the program."""

    out: Path
    command: str
    minutes: float = 12.0
    only: tuple[str, ...] = ()


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the record")
    parser.add_argument("--minutes", type=float, default=12.0, metavar="M", help="for all steps together (12)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], default=[], help="steps")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure."""
    options = typed(CardOptions, build_parser().parse_args(arguments), PROGRAM)
    if options.minutes <= 0:
        raise ConfigError(f"--minutes {options.minutes:g}: must be above 0")
    measure(options)


def measure(options: CardOptions) -> None:
    """Run the steps; the record is written anew after each, so that none is lost."""
    from fedbert_ds.bench.device import default_device, describe
    from fedbert_ds.telemetry.record import source_commit, write_record

    commit, device = source_commit(), describe(default_device())
    outcomes: list[Outcome] = []

    def told(outcome: Outcome) -> None:
        outcomes.append(outcome)
        write_record(
            options.out,
            command=options.command,
            commit=commit,
            device=device,
            steps=[{**asdict(each), "rows": len(each.rows)} for each in outcomes],
            rows=[{"step": each.step, **row} for each in outcomes for row in each.rows],
        )
        print(f"{outcome.step:11}{outcome.seconds:6.0f} s  {len(outcome.rows):3} rows  {outcome.ended}", flush=True)

    steps = [step for step in STEPS if not options.only or step.name in options.only]
    run_steps(steps, 60.0 * options.minutes, told)
    print(f"record     {options.out}", flush=True)
    if failed := [each.step for each in outcomes if each.ended.startswith("failed")]:
        raise SystemExit(f"card: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
