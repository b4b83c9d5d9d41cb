"""What DeepSpeed is told: the user's file, the keys the run file owns, and nothing left to a default that hurts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedbert_ds.config import RunConfig, load_config, parse_config
from fedbert_ds.errors import ConfigError
from fedbert_ds.server.body import engine
from fedbert_ds.server.body.engine import OURS, BodyEngine, deepspeed_settings, zero_stage

ROOT = Path(__file__).parents[4]


def config_with(tmp_path: Path, text: str, **sections: Any) -> RunConfig:
    path = tmp_path / "mine.json"
    path.write_text(text)
    return parse_config({"body": {"deepspeed": str(path)} | sections.pop("body", {}), **sections}, "test")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_name_their_stage_and_leave_our_keys_alone(stage: int) -> None:
    path = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    config = parse_config({"body": {"deepspeed": str(path)}}, "test")
    assert zero_stage(config) == stage
    assert not json.loads(path.read_text()).keys() & OURS.keys()


def test_every_shipped_run_file_has_settings() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert zero_stage(load_config(path)) in range(4)


def test_the_run_file_overrides_the_stage(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}}'
    assert zero_stage(config_with(tmp_path, text)) == 1
    config = config_with(tmp_path, text, body={"zero_stage": 3})
    assert deepspeed_settings(config)["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 5}
    assert zero_stage(config_with(tmp_path, "{}")) == 0


def test_one_step_a_window_and_clipping_are_always_said(tmp_path: Path) -> None:
    """DeepSpeed would clip at 1.0, and divide gradients by accumulation steps."""
    settings = deepspeed_settings(config_with(tmp_path, "{}", optimizer={"gradient_clipping": 0.0}))
    assert settings["gradient_clipping"] == 0.0
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["bf16"] == {"enabled": False}
    bf16 = config_with(tmp_path, '{"wall_clock_breakdown": true}', body={"precision": "bf16"})
    assert deepspeed_settings(bf16)["bf16"] == {"enabled": True}
    assert deepspeed_settings(bf16)["wall_clock_breakdown"] is True, "the rest is the user's"


@pytest.mark.parametrize("key", OURS)
def test_a_key_of_the_run_file_is_refused_there(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings(config_with(tmp_path, json.dumps({key: 1})))
    assert f"{key} belongs to the run file; remove it and set {OURS[key]} there" in str(caught.value)
    section, field = OURS[key].split(".")
    assert field in type(getattr(RunConfig(), section)).model_fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a readable JSON file"),
        ("[]", "is not a JSON object of DeepSpeed settings"),
        ("3", "is not a JSON object of DeepSpeed settings"),
        ('{"zero_optimization": 2}', r"zero_optimization\.stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 4}}', r"zero_optimization\.stage must be 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "two"}}', r"zero_optimization\.stage must be 0, 1, 2 or 3"),
    ],
)
def test_a_file_that_deepspeed_would_choke_on_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.json.* {message}|mine\.json: {message}"):
        deepspeed_settings(config_with(tmp_path, text))


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    config = config_with(tmp_path, "{}")
    config.body.deepspeed.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not a readable JSON file"):
        deepspeed_settings(config)


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
    config = config_with(tmp_path, "{}", body={"precision": precision, "zero_stage": stage})
    with pytest.raises(Installed):
        BodyEngine.build(torch.nn.Linear(2, 2), config, torch.device("cpu"))
