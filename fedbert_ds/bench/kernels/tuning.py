"""`bench kernels --tune`: find what is fastest on this card, and keep it for all later runs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from fedbert_ds.bench.kernels.problem import OURS
from fedbert_ds.bench.kernels.rows import COMPILED


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


def choose_rows(
    kernels: tuple[str, ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Time ours and torch.compile's LayerNorm and GELU; later runs on this card take the faster."""
    from fedbert_kernels.row_choice import GELU, LAYER_NORM, RowCase, is_ours_faster, measure_again

    cases = [RowCase(LAYER_NORM, dtype, width, dropout) for width in widths for dropout in (0.0, 0.1)]
    cases += [RowCase(GELU, dtype, 4 * width) for width in widths]
    times = measure_again([case for case in cases if case.kernel in kernels], device)
    for name, pair in times.items():
        print(f"{name}: {'our kernel' if is_ours_faster(pair) else 'torch.compile'} runs on this card from now on")
    return [
        # JSON has no infinity, the time of one that does not run.
        {"case": name, "kept": is_ours_faster(pair)}
        | {who: time if math.isfinite(time) else None for who, time in zip((OURS, COMPILED), pair, strict=True)}
        for name, pair in times.items()
    ]
