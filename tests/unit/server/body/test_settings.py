"""What DeepSpeed is told: the user's file, the keys the run file owns, and nothing left to a
default that hurts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config, parse_config
from fedbert_ds.server.body.settings import OURS, WITHOUT_EFFECT, deepspeed_settings, zero_stage

ROOT = Path(__file__).parents[4]


def config_with(tmp_path: Path, text: str, **sections: Any) -> RunConfig:
    path = tmp_path / "mine.json"
    path.write_text(text)
    return parse_config({"body": {"deepspeed": str(path)} | sections.pop("body", {}), **sections}, "test")


def settings_of(config: RunConfig) -> dict[str, Any]:
    return deepspeed_settings(config.body, config.optimizer)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_name_their_stage_and_leave_our_keys_alone(stage: int) -> None:
    path = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    config = parse_config({"body": {"deepspeed": str(path)}}, "test")
    assert zero_stage(config.body) == stage
    assert not json.loads(path.read_text()).keys() & OURS.keys()


def test_every_shipped_run_file_has_settings() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        # At stage 3 ranks wait for each other in every forward and backward.
        assert zero_stage(load_config(path).body) < 3


def test_the_run_file_overrides_the_stage(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5}}'
    assert zero_stage(config_with(tmp_path, text).body) == 1
    config = config_with(tmp_path, text, body={"zero_stage": 3})
    # Weights are gathered by layers, not by DeepSpeed.
    ours = {"stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    assert settings_of(config)["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 5, **ours}
    assert zero_stage(config_with(tmp_path, "{}").body) == 0


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("zero_hpz_partition_size", 4, "zero_hpz_partition_size has no effect.*; remove it"),
        ("zero_quantized_weights", True, "zero_quantized_weights has no effect.*; remove it"),
        ("zero_quantized_nontrainable_weights", True, "zero_quantized_nontrainable_weights has no effect"),
        ("zero_quantized_gradients", True, "zero_quantized_gradients has no effect"),
        ("mics_shard_size", 2, "mics_shard_size has no effect"),
        (
            "offload_param",
            {"device": "nvme", "nvme_path": "/x"},
            "offload_param keeps weights on the CPU.* device: cpu",
        ),
    ],
)
def test_another_way_to_gather_weights_is_refused(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    text = json.dumps({"zero_optimization": {"stage": 3, key: value}})
    with pytest.raises(ConfigError, match=problem):
        settings_of(config_with(tmp_path, text))
    # Below stage 3 DeepSpeed gathers.
    settings_of(config_with(tmp_path, text, body={"zero_stage": 2}))
    usual = {"offload_param": {"device": "cpu"}}.get(key, WITHOUT_EFFECT.get(key))
    settings_of(config_with(tmp_path, json.dumps({"zero_optimization": {"stage": 3, key: usual}})))


def test_no_file_is_needed_for_a_stage() -> None:
    config = parse_config({"body": {"deepspeed": None, "zero_stage": 1}}, "test")
    assert settings_of(config)["zero_optimization"] == {"stage": 1}
    assert zero_stage(parse_config({"body": {"deepspeed": None}}, "test").body) == 0


def test_one_step_a_window_and_clipping_are_always_said(tmp_path: Path) -> None:
    """DeepSpeed would clip at 1.0, and divide gradients by accumulation steps."""
    settings = settings_of(config_with(tmp_path, "{}", optimizer={"gradient_clipping": 0.0}))
    assert settings["gradient_clipping"] == 0.0
    assert settings["gradient_accumulation_steps"] == 1
    assert settings["bf16"] == {"enabled": False}
    bf16 = config_with(tmp_path, '{"wall_clock_breakdown": true}', body={"precision": "bf16"})
    assert settings_of(bf16)["bf16"] == {"enabled": True}
    assert settings_of(bf16)["wall_clock_breakdown"] is True, "the rest is the user's"


@pytest.mark.parametrize("key", OURS)
def test_a_key_of_the_run_file_is_refused_there(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(config_with(tmp_path, json.dumps({key: 1})))
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
        settings_of(config_with(tmp_path, text))


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    config = config_with(tmp_path, "{}")
    config.body.deepspeed.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="is not a readable JSON file"):
        settings_of(config)


@pytest.mark.parametrize(("key", "instead"), [("compile", "auto"), ("fp8", "false")])
def test_layers_are_neither_compiled_nor_in_fp8_at_stage_3(tmp_path: Path, key: str, instead: str) -> None:
    def body(stage: int, **keys: bool) -> dict[str, Any]:
        return {"zero_stage": stage, "precision": "bf16", **keys}

    for stage in (0, 1, 2):
        settings_of(config_with(tmp_path, "{}", body=body(stage, **{key: True})))
    settings_of(config_with(tmp_path, "{}", body=body(3)))
    with pytest.raises(ConfigError, match=rf"body\.{key}: true needs weights that ZeRO .* divides; set {instead}, or"):
        settings_of(config_with(tmp_path, "{}", body=body(3, **{key: True})))
