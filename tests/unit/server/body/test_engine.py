"""The engine tells the kernels what DeepSpeed will make of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedbert_ds.config import parse_config
from fedbert_ds.server.body import engine
from fedbert_ds.server.body.engine import BodyEngine


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("stage", [2, 3])
def test_kernels_are_chosen_for_what_deepspeed_will_make_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype, stage: int
) -> None:
    class Installed(Exception):
        """Far enough."""

    def install_kernels(body: Any, kernels: str, device: torch.device, **choices: Any) -> None:
        assert choices == {"whole_weights": stage < 3, "dtype": dtype}
        raise Installed

    monkeypatch.setattr(engine, "install_kernels", install_kernels)
    (tmp_path / "mine.json").write_text("{}")
    body = {"deepspeed": str(tmp_path / "mine.json"), "precision": precision, "zero_stage": stage}
    config = parse_config({"body": body}, "test")
    with pytest.raises(Installed):
        BodyEngine.build(torch.nn.Linear(2, 2), config.body, config.optimizer, config.kernels, torch.device("cpu"))
