"""Wire codecs on the device: kernel and reference bit for bit, oracles, rounding, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.kernels.bounds import DEVICE, DTYPES, bodies_of, needs_triton, on_device  # noqa: F401

from fedbert_kernels import quantize as module
from fedbert_kernels.quantize import CODECS, dequantize, quantize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

SEED = torch.tensor([0x123456789ABCDEF, 42], device=DEVICE)
WORST = {
    "int8": 0.5 / 127, "int8_group": 0.504 / 127, "fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int4_hadamard": 0.504 / 7,
    "int2_hadamard": 1.0,
}  # fmt: skip
"""A value's largest error, in units of its scale's largest value (of the rotated group's)."""


body = bodies_of(module)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@needs_triton
@settings(max_examples=40, derandomize=True)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    num_rows=st.integers(1, 4),
    width=st.one_of(st.sampled_from([1, 63, 64, 65, 128, 513]), st.integers(1, 300)),
    dtype=st.sampled_from(DTYPES),
    stochastic=st.booleans(),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    data=st.data(),
)
def test_kernel_and_reference_agree_bit_for_bit(codec, num_rows, width, dtype, stochastic, magnitude, data) -> None:
    rows = data.draw(st.one_of(st.none(), st.lists(st.integers(0, num_rows - 1), max_size=4)))
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    generator = torch.Generator(DEVICE).manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    x = (torch.randn(num_rows, width, generator=generator) * magnitude).to(dtype)
    form, seed = CODECS[codec], SEED if stochastic else None
    payload, scales = module.launch_quantize(x, form, rows, seed)
    expected_payload, expected_scales = module.quantize_reference(x, form, rows, seed)
    assert payload.dtype == expected_payload.dtype
    assert _bits(payload).equal(_bits(expected_payload))
    assert scales.equal(expected_scales)
    back = None if not len(payload) else torch.arange(len(payload)).flip(0).repeat(2)
    assert module.launch_dequantize(payload, scales, form, width, dtype, back).equal(
        module.dequantize_reference(payload, scales, form, width, dtype, back)
    )


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_value_returns_within_its_codec_s_step(body, codec: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 200)
    values = dequantize(*quantize(x, codec), codec, 200)
    if CODECS[codec].rotated:
        x, values = (
            module.rotate_reference(torch.nn.functional.pad(part, (0, 56)).view(16, 4, 64)) / 8 for part in (x, values)
        )
        largest = x.abs().amax(2, keepdim=True)
    elif CODECS[codec].grouped:
        x, values = (torch.nn.functional.pad(part, (0, 56)).view(16, 4, 64) for part in (x, values))
        largest = x.abs().amax(2, keepdim=True)
    else:
        largest = x.abs().amax(1, keepdim=True)
    # A rotated group's padding comes back as noise, which dequantize cuts off; so one more step.
    slack = 2.0 if CODECS[codec].rotated else 1.001
    assert ((x - values).abs() <= slack * WORST[codec] * largest).all()


def test_int8_is_what_the_wire_s_own_codec_makes(body) -> None:
    """One fp32 scale a row, largest magnitude / 127; values over it, rounded to nearest even."""
    torch.manual_seed(1)
    x = torch.randn(9, 100)
    x[3] = 0.0
    payload, scales = quantize(x, "int8")
    expected = x.abs().amax(1, keepdim=True) / 127.0
    assert scales.equal(expected)
    assert payload.equal((x / expected.where(expected > 0, 1.0)).round().clamp(-127, 127).to(torch.int8))


@needs_triton
@pytest.mark.parametrize(("codec", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_every_fp8_code_is_made_and_read_as_torch_does(codec: str, dtype: torch.dtype) -> None:
    """The values of all finite codes quantize to themselves; halfway points round to even."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[torch.isfinite(codes.float())]
    between = codes.float().sort().values
    between = (between[1:] + between[:-1]) / 2
    largest = torch.tensor([CODECS[codec].largest])
    for values in (codes.float(), between):
        # With its largest value in it, a row's scale is 1.
        payload, scales = module.launch_quantize(torch.cat((values, largest))[None], CODECS[codec], None, None)
        assert scales.item() == 1.0
        expected = torch.cat((values, largest)).to(dtype)
        assert payload[0].float().equal(expected.float())
    read = module.launch_dequantize(codes[None], torch.ones(1, 1), CODECS[codec], len(codes), torch.float32, None)
    assert read[0].equal(codes.float())


def test_the_rotation_is_hadamard_s_and_its_own_inverse() -> None:
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.arange(128.0).view(2, 64)
    assert module.rotate_reference(x).equal(x @ matrix)
    assert (module.rotate_reference(module.rotate_reference(x)) / 64).equal(x)


def test_the_rotation_spreads_an_outlier(body) -> None:
    """One value a hundred times the others: plain 4 bits would send the others as zero."""
    torch.manual_seed(2)
    x = torch.randn(1, 64)
    x[0, 5] = 100.0
    values = dequantize(*quantize(x, "int4_hadamard"), "int4_hadamard", 64)
    plain = (x / (100 / 7)).round() * (100 / 7)
    assert (values - x).norm() < 0.8 * (plain - x).norm() or (values[0, :5].abs() > 0).any()


@settings(max_examples=100, derandomize=True)
@given(
    tail=st.sampled_from([0.0, 1.0, 4.0]),
    kept=st.integers(1, 64),
    bias=st.floats(-100.0, 100.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_two_bits_err_by_less_than_the_values_whatever_these_are(
    tail: float, kept: int, bias: float, seed: int
) -> None:
    """What error feedback needs of a codec (Karimireddy et al. 2019, "a compressor")."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(8, 64, generator=generator, device="cpu")
    x = x.sign() * x.abs().exp() ** tail * (torch.arange(64, device="cpu") < kept) + bias
    values = module.dequantize_reference(
        *module.quantize_reference(x, CODECS["int2_hadamard"], None, None),
        CODECS["int2_hadamard"], 64, torch.float32, None,
    )  # fmt: skip
    squares, errors = x.square().sum(1), (values - x).square().sum(1)
    # 55 squares of the mean rotated magnitude, a little less as the scale is rounded upwards.
    saved = 54.0 * (module.rotate_reference(x) / 8).abs().mean(1).square()
    assert (errors <= squares * (1 + 1e-5) - saved).all()


def test_two_bits_of_normal_values_err_as_little_as_any_even_steps_can(body) -> None:
    """Max 1960: a mean square error of 0.1188 variances, the best of any four even steps."""
    torch.manual_seed(9)
    x = torch.randn(512, 768)
    error = (dequantize(*quantize(x, "int2_hadamard"), "int2_hadamard", 768) - x).square().mean()
    assert abs(float(error) / 0.1188 - 1) < 0.03


def test_the_four_codes_of_two_bits_lie_four_to_a_byte(body) -> None:
    """A group whose rotation is known: codes 0 to 3 in the order of columns, lowest bits first."""
    rotated = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(16)
    # Their mean magnitude is 1: a step of 1.25, so that +-0.5 and +-1.5 keep their codes.
    payload, scales = quantize((module.rotate_reference(rotated) / 8)[None], "int2_hadamard")
    assert payload.shape == (1, 16) and payload.eq(0b11_10_01_00).all()
    assert scales.tolist() == [[1.25]]
    assert quantize(torch.randn(3, 100), "int2_hadamard")[0].shape == (3, 2 * 16)


def test_rows_are_gathered_on_the_way_in_and_out(body) -> None:
    torch.manual_seed(3)
    x, rows = torch.randn(6, 70), torch.tensor([4, 0, 4])
    for codec in CODECS:
        gathered, scales = quantize(x, codec, rows)
        whole, whole_scales = quantize(x, codec)
        assert _bits(gathered).equal(_bits(whole)[rows])
        assert scales.equal(whole_scales[rows])
        assert dequantize(whole, whole_scales, codec, 70, rows=rows).equal(dequantize(gathered, scales, codec, 70))


def test_no_rows_give_no_payload(body) -> None:
    for codec in CODECS:
        payload, scales = quantize(torch.randn(3, 70), codec, torch.empty(0, dtype=torch.int64))
        assert len(payload) == len(scales) == 0
        assert dequantize(payload, scales, codec, 70).shape == (0, 70)
        assert quantize(torch.empty(0, 70), codec)[0].shape[0] == 0


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_stochastic_rounding_is_unbiased(codec: str) -> None:
    torch.manual_seed(4)
    x = torch.randn(1, 256)
    payload, scales = module.quantize_reference(x.expand(4000, -1), CODECS[codec], None, SEED)
    values = module.dequantize_reference(payload, scales, CODECS[codec], 256, torch.float32, None).double()
    deviation = values.std(0) / 4000**0.5
    # 16 random bits: up to 2**-16 of a step of bias.
    step = float(x.abs().max()) * WORST[codec] * 2
    assert ((values.mean(0) - x[0]).abs() <= 5 * deviation + step / 2**15).all()
    nearest = module.dequantize_reference(
        *module.quantize_reference(x, CODECS[codec], None, None), CODECS[codec], 256, torch.float32, None
    )
    assert (values.mean(0) - x[0]).abs().mean() < 0.2 * (nearest - x).abs().mean()


def test_a_seed_decides_the_rounding(body) -> None:
    x = torch.randn(3, 70)
    first, again = (quantize(x, "int8", seed=SEED)[0] for _ in range(2))
    assert first.equal(again)
    assert not first.equal(quantize(x, "int8", seed=SEED + torch.tensor([0, 1]))[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(body, value: float) -> None:
    x = torch.randn(2, 70)
    x[1, 66] = value
    for codec in CODECS:
        payload, scales = quantize(x, codec)
        values = dequantize(payload, scales, codec, 70)
        assert torch.isfinite(values[0]).all()
        assert not torch.isfinite(values[1]).all()
        assert not torch.isfinite(scales[1].float()).all()


@needs_triton
def test_a_row_that_is_not_there_is_refused_where_looking_is_free(monkeypatch) -> None:
    x, rows = torch.randn(3, 70), torch.tensor([0, 3])
    payload, scales = module.launch_quantize(x, CODECS["int4_hadamard"], rows, None)
    assert scales[1].isnan().all()
    for wrong in (torch.tensor([0, -1]), torch.tensor([2])):
        values = module.launch_dequantize(payload, scales, CODECS["int4_hadamard"], 70, torch.float32, wrong)
        assert values[-1].isnan().all()
    monkeypatch.setattr(module, "runs_triton", lambda _: False)
    with pytest.raises(ValueError, match="not between 0 and 2"):
        quantize(x, "int8", rows)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        dequantize(payload, scales, "int4_hadamard", 70, rows=torch.tensor([2]))


def test_the_operators_obey_the_rules_of_torch_library(body) -> None:
    x, rows = torch.randn(3, 70), torch.tensor([2, 0])
    for codec in ("int8", "int4_hadamard", "int2_hadamard"):
        torch.library.opcheck(torch.ops.fedbert_kernels.quantize.default, (x, codec, rows, SEED))
        payload, scales = quantize(x, codec)
        arguments = (payload, scales, codec, 70, torch.bfloat16, rows)
        torch.library.opcheck(torch.ops.fedbert_kernels.dequantize.default, arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codec": "int3"}, "choose one of int8, int8_group"),
        ({"x": torch.zeros(70)}, r"must be \[R, N\]"),
        ({"x": torch.zeros(2, 8193)}, "from 1 to 8192"),
        ({"x": torch.zeros(2, 0)}, "from 1 to 8192"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "fp32, fp16 or bf16"),
        ({"rows": torch.zeros(2)}, "one-dimensional int64"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows on meta"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed must be"),
        ({"seed": torch.zeros(2)}, "one-dimensional int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64, device="meta")}, "seed on meta"),
    ],
)
def test_bad_input_of_quantize_is_refused(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 70, device="cpu"), "codec": "int8"}
    with pytest.raises(ValueError, match=message):
        quantize(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"codec": "int8_group"}, "scales must be"),
        ({"codec": "fp8_e4m3"}, "payload must be"),
        ({"width": 71}, "payload must be"),
        ({"width": 0}, "from 1 to 8192"),
        ({"dtype": torch.float64}, "fp32, fp16 or bf16"),
        ({"scales": torch.zeros(3, 1)}, "scales must be"),
        ({"scales": torch.zeros(2, 1, device="meta")}, "scales on meta"),
        ({"payload": torch.zeros((), dtype=torch.int8)}, "payload must be"),
        ({"payload": torch.zeros(2, 70)}, "payload must be"),
        ({"scales": torch.zeros(2, 1, dtype=torch.bfloat16)}, "scales must be"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "one-dimensional int64"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows on meta"),
    ],
)
def test_bad_input_of_dequantize_is_refused(changed: dict[str, Any], message: str) -> None:
    with torch.device("cpu"):
        arguments: dict[str, Any] = {"payload": torch.zeros(2, 70, dtype=torch.int8), "scales": torch.zeros(2, 1)}
    arguments |= {"codec": "int8", "width": 70}
    with pytest.raises(ValueError, match=message):
        dequantize(**arguments | changed)
