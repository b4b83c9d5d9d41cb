"""`bench kernels --tune`: find what is fastest on this card, and keep it for all later runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch


def tune_launches(
    mixes: dict[str, list[int]],
    heads_and_sizes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time attention's launch shapes on this card; later runs take the fastest. A row a kernel."""
    from fedbert_kernels.attention_launches import shape_class
    from fedbert_kernels.attention_tuning import tune

    found: list[dict[str, Any]] = []
    seen = set()
    for heads, head_size in heads_and_sizes:
        for case, lengths in mixes.items():
            for dropout in (0.0, 0.1):
                # Mixes of about the same average share launches: those of the first.
                shape = shape_class(dtype, head_size, dropout > 0.0, False, sum(lengths), len(lengths))
                if shape in seen:
                    continue
                seen.add(shape)
                print(f"tuning attention, {shape}, on {case}", flush=True)
                for name, (launch, share) in tune(lengths, heads, head_size, dtype, dropout, device).items():
                    found.append({"shape": name, "tuned_on": case, **asdict(launch), "time_over_default": share})
    return found


def choose_ways(
    kernels: tuple[str, ...],
    heads_and_sizes: tuple[tuple[int, int], ...],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time attention, LayerNorm and GELU beside their rivals; later runs on this card take the
    fastest. A row a case.
    """
    from fedbert_kernels.attention_choice import CLASSES, AttentionCase
    from fedbert_kernels.choice import Case, measure_again
    from fedbert_kernels.row_choice import GELU, LAYER_NORM, RowCase

    cases: dict[str, list[Case]] = {
        "attention": [
            AttentionCase(dtype, heads, head_size, dropout, longest)
            for heads, head_size in heads_and_sizes
            for longest in CLASSES
            for dropout in (0.0, 0.1)
        ],
        LAYER_NORM: [RowCase(LAYER_NORM, dtype, width, dropout) for width in widths for dropout in (0.0, 0.1)],
        GELU: [RowCase(GELU, dtype, 4 * width) for width in widths],
    }
    outcomes = measure_again([case for kernel in kernels for case in cases.get(kernel, [])], device)
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome.chosen} runs on this card from now on")
    return [
        {"case": name, "chosen": outcome.chosen, "milliseconds": outcome.milliseconds, "left_out": outcome.left_out}
        for name, outcome in outcomes.items()
    ]
