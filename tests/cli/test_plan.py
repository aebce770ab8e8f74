"""``stepforge plan``: bytes and seconds of training before it begins.

Two oracles: sums by hand, from the bytes of each dtype and a scale of four bytes per 128 codes; and
the tensors of optimizers after a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import stepforge
from stepforge.cli import make_app
from stepforge.rules import ALL

README = Path(__file__).parents[2] / "README.md"
SCALE = 4 / 128


def invoke(*arguments: object) -> tuple[int, str]:
    command = ["plan", *map(str, arguments)]
    result = CliRunner().invoke(make_app(), command, catch_exceptions=False, env={"COLUMNS": "100"})
    return result.exit_code, result.output


def report_of(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    output = tmp_path / "plan.json"
    code, printed = invoke("--params", "8e9", *arguments, "--json", output)
    assert code == 0, printed
    return json.loads(output.read_text(encoding="utf-8"))


def parts_of(report: dict[str, Any]) -> tuple[float, ...]:
    each = report["planned"]["bytes_per_parameter"]
    return tuple(each[name] for name in ("weights", "gradients", "states", "scales", "low_bits"))


INT8, BITS24 = ("--state-format", "int8"), ("--master-weight-bits", "24")
AT_RANDOM = ("--stochastic-rounding",)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), (4, 4, 8, 0, 0)),
        (("--optimizer", "Adagrad"), (4, 4, 4, 0, 0)),
        (("--optimizer", "nadam"), (4, 4, 8, 0, 0)),
        (("--optimizer", "RAdam", *INT8), (4, 4, 2, 2 * SCALE, 0)),
        (("--optimizer", "Adagrad", *INT8), (4, 4, 1, SCALE, 0)),
        (INT8, (4, 4, 2, 2 * SCALE, 0)),
        ((*INT8, *BITS24), (2, 2, 2, 2 * SCALE, 1)),
        ((*INT8, *BITS24, "--dtype", "float16"), (2, 2, 2, 2 * SCALE, 1)),
        ((*INT8, *BITS24, "--gradient-dtype", "float32"), (2, 4, 2, 2 * SCALE, 1)),
        ((*INT8, *BITS24, "--option", "amsgrad=True"), (2, 2, 3, 3 * SCALE, 1)),
        (("--master-weight-bits", "32", "--state-format", "float32"), (2, 2, 8, 0, 2)),
        (("--dtype", "bfloat16"), (2, 2, 4, 0, 0)),
        (AT_RANDOM, (2, 2, 4, 0, 0)),
        ((*AT_RANDOM, *INT8), (2, 2, 2, 2 * SCALE, 0)),
        ((*AT_RANDOM, "--dtype", "float16", "--state-format", "float32"), (2, 2, 8, 0, 0)),
        (("--state-format", "bfloat16"), (4, 4, 4, 0, 0)),
        (("--dtype", "float64"), (8, 8, 16, 0, 0)),
    ],
    ids=lambda x: " ".join(x) if x and isinstance(x[0], str) else "",
)
def test_bytes_by_hand(tmp_path: Path, arguments: tuple[str, ...], parts: tuple[float, ...]):
    """A step reads all of them, and writes all but the gradients. A checkpoint has what is written.

    All are exact: sums of multiples of 1/32.
    """
    report = report_of(tmp_path, *arguments)
    assert parts_of(report) == parts
    each, (_, gradients, *_) = report["planned"]["bytes_per_parameter"], parts
    assert each["total"] == sum(parts)
    assert each["checkpoint"] == sum(parts) - gradients
    assert each["moved"] == 2 * sum(parts) - gradients


def test_devices_and_bandwidth_by_hand(tmp_path: Path):
    """A parameter takes 7.0625 bytes; a step moves 12.125."""
    arguments = (*INT8, *BITS24, "--world-size", 8, "--bandwidth", 2000)
    report = report_of(tmp_path, *arguments)
    planned, float32 = report["planned"], report["float32"]
    assert planned["bytes_per_device"]["total"] == 7.0625e9
    assert planned["checkpoint_bytes"] == 8 * 5.0625e9
    assert planned["step_seconds"] == 12.125e9 / 2e12
    assert float32["bytes_per_device"]["total"] == 16e9
    assert float32["checkpoint_bytes"] == 8 * 12e9
    assert float32["step_seconds"] == 28e9 / 2e12
    assert (report["parameters"], report["world_size"]) == (8_000_000_000, 8)
    assert (report["dtype"], report["gradient_dtype"]) == ("bfloat16", "bfloat16")


def test_what_float32_is_compared_with(tmp_path: Path):
    """The same optimizer with the same options, in torch.optim's formats."""
    report = report_of(tmp_path, "--option", "amsgrad=True", *AT_RANDOM)
    assert report["float32"]["bytes_per_parameter"]["states"] == 12
    assert report["options"] == {"amsgrad": True}
    assert (report["dtype"], report["stochastic_rounding"]) == ("bfloat16", True)


def rows(output: str) -> dict[str, list[str]]:
    known = ("weights", "gradients", "states", "scales", "low bits", "total", "a step moves")
    found = {}
    for name in known:
        for line in output.splitlines():
            if line.startswith(f"{name} "):
                found[name] = line.removeprefix(name).split("  ")
    return {name: [cell.strip() for cell in cells if cell.strip()] for name, cells in found.items()}


def test_what_is_printed():
    code, output = invoke("--params", "8e9", *INT8, *BITS24, "--world-size", 8)
    assert code == 0
    assert output.splitlines()[0] == (
        "AdamW, 8,000,000,000 parameters on 8 devices: "
        "weights bfloat16 of 24 bits, gradients bfloat16, states int8"
    )
    assert rows(output) == {
        "weights": ["2", "2 GB", "4", "4 GB", "0.50"],
        "gradients": ["2", "2 GB", "4", "4 GB", "0.50"],
        "states": ["2", "2 GB", "8", "8 GB", "0.25"],
        "scales": ["0.0625", "62.5 MB", "0", "0 B"],
        "low bits": ["1", "1 GB", "0", "0 B"],
        "total": ["7.0625", "7.06 GB", "16", "16 GB", "0.44"],
        "a step moves": ["12.125", "12.1 GB", "28", "28 GB", "0.43"],
    }
    assert "A checkpoint has 40.5 GB in all; in float32 96 GB: 0.42 of it." in output
    # 12.125 GB at the default of 3350 GB/s.
    assert "A step takes at least 3.62 ms at 3,350 GB/s; in float32 8.36 ms: 0.43 of it." in output
    assert "Not counted: activations" in output


def test_rounding_at_random_is_told_of_the_weights():
    code, output = invoke("--params", "8B", *AT_RANDOM, *INT8)
    assert code == 0
    assert output.splitlines()[0] == (
        "AdamW, 8,000,000,000 parameters on 1 device: "
        "weights bfloat16 rounded at random, gradients bfloat16, states int8"
    )


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("8B", "8,000,000,000"),
        ("8b", "8,000,000,000"),
        (" 8 b ", "8,000,000,000"),
        ("8e9", "8,000,000,000"),
        ("1.5B", "1,500,000,000"),
        ("0.5B", "500,000,000"),
        ("125M", "125,000,000"),
        ("350k", "350,000"),
        ("1.1T", "1,100,000,000,000"),
        ("7_000_000_000", "7,000,000,000"),
        ("999999999999999999", "999,999,999,999,999,999"),  # not a float
        ("1", "1"),
    ],
)
def test_numbers_of_parameters_as_people_write_them(written: str, count: str):
    """Oracle: the same numbers, written out."""
    code, output = invoke("--params", written)
    assert code == 0
    assert output.startswith(f"AdamW, {count} parameters on 1 device: ")


def test_short_times_have_a_unit():
    """A step moves 28,000 bytes at 3350 GB/s."""
    _, output = invoke("--params", "1K")
    assert "A step takes at least 8.36 ns at 3,350 GB/s" in output


def test_a_narrow_terminal_cuts_no_number():
    command = ["plan", "--params", "8B", *INT8, *BITS24]
    narrow, wide = (
        CliRunner().invoke(make_app(), command, env={"COLUMNS": columns})
        for columns in ("20", "100")
    )
    assert rows(narrow.output) == rows(wide.output)
    assert len(rows(wide.output)) == 7


def test_the_readme_shows_what_is_printed():
    _, _, shown = README.read_text(encoding="utf-8").partition("$ stepforge plan ")
    command, _, shown = shown.partition("\n")
    code, output = invoke(*command.split())
    assert code == 0
    assert [line.rstrip() for line in output.splitlines()] == shown.partition("\n```")[0].split(
        "\n"
    )


def test_parts_that_there_are_not_are_left_out():
    code, output = invoke("--params", 1000)
    assert code == 0
    assert output.startswith("AdamW, 1,000 parameters on 1 device: weights float32, ")
    assert list(rows(output)) == ["weights", "gradients", "states", "total", "a step moves"]
    assert rows(output)["total"] == ["16", "16 kB", "16", "16 kB", "1.00"]


# Against real tensors. ----------------------------------------------------------------------------


def stepped(
    name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **options: Any
) -> tuple[stepforge.Optimizer, list[torch.Tensor]]:
    params = [torch.full(shape, 0.5, dtype=dtype) for shape in shapes]
    for p in params:
        p.grad = torch.full_like(p, 0.25)
    optimizer = getattr(stepforge, name)(params, **options)
    optimizer.step()
    return optimizer, params


def state_bytes(optimizer: stepforge.Optimizer) -> int:
    """Return the bytes of everything in ``optimizer.state``, step counts included."""
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def transformer(width: int, vocabulary: int, layers: int) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters, biases and layer norms included."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    layer = [*norm, *attention, *norm, *perceptron]
    return [(vocabulary, width), (256, width), *layers * layer, *norm]


@pytest.mark.parametrize("name", ALL)
def test_matrices_take_what_is_planned(tmp_path: Path, name: str):
    """Scalar states, of 4 bytes each, are not counted."""
    optimizer, (p,) = stepped(
        name, [(256, 384)], torch.bfloat16, state_format="int8", master_weight_bits=24
    )
    scalars = 4 * sum(x.dim() == 0 for x in optimizer.state[p].values())
    weights, gradients, *of_state = parts_of(
        report_of(tmp_path, "--optimizer", name, *INT8, *BITS24)
    )
    assert p.nbytes == weights * p.numel()
    assert p.grad is not None
    assert p.grad.nbytes == gradients * p.numel()
    assert state_bytes(optimizer) - scalars == sum(of_state) * p.numel()


def test_states_of_a_model_in_8_bits():
    """At most 2.1 bytes an element: 2.0625 for matrices, 8 for the few full-precision states."""
    shapes = transformer(width=256, vocabulary=4096, layers=2)
    optimizer, params = stepped("AdamW", shapes, torch.float32, state_format="int8")
    assert state_bytes(optimizer) <= 2.1 * sum(p.numel() for p in params)


def test_a_whole_model_of_16_24_and_8_bits():
    """At most 7.1 bytes a parameter with its gradient: 7.0625 for matrices."""
    shapes = transformer(width=256, vocabulary=4096, layers=2)
    optimizer, params = stepped(
        "AdamW", shapes, torch.bfloat16, state_format="int8", master_weight_bits=24
    )
    gradients = [p.grad for p in params if p.grad is not None]
    taken = sum(x.nbytes for x in (*params, *gradients)) + state_bytes(optimizer)
    assert taken <= 7.1 * sum(p.numel() for p in params)


# Bad input. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--params", "0"), "--params: 0 is no number of parameters; it must be a whole one"),
        (("--params", "-8e9"), "--params: -8e9 is no number of parameters"),
        (("--params", "1.5"), "--params: 1.5 is no number of parameters"),
        (("--params", "nan"), "--params: nan is no number of parameters"),
        (("--params", "inf"), "--params: inf is no number of parameters"),
        *(
            (
                ("--params", text),
                f"--params: {text} is no number of parameters; it must be a whole one from 1 to "
                "10**18, as 8B, 350M or 8e9.",
            )
            for text in ("8X", "8 BB", "B", "1.2345K", "8,5B", "infB", "nanM", "8Ki", "1e19", "1E")
        ),
        (("--params", ""), "--params:  is no number of parameters"),
        (("--params", "1e400"), "--params: 1e400 is no number of parameters"),
        (("--params", "1e9999999"), "--params: 1e9999999 is no number of parameters"),
        (("--optimizer", "SGD"), "--optimizer: "),
        (("--state-format", "int4"), "--state-format: "),
        (("--dtype", "int8"), "--dtype: "),
        (("--gradient-dtype", "int8"), "--gradient-dtype: "),
        (("--master-weight-bits", "20"), "--master-weight-bits: "),
        (
            ("--master-weight-bits", "24", "--dtype", "float32"),
            "--master-weight-bits: weights in float32 have no low bits; --dtype must be bfloat16 "
            "or float16.",
        ),
        (("--world-size", "0"), "--world-size: "),
        (("--bandwidth", "0"), "--bandwidth: 0 is no speed; it must be a number above 0."),
        (("--bandwidth", "nan"), "--bandwidth: nan is no speed"),
        (("--option", "amsgrad"), "--option: amsgrad has no value; it must be as in amsgrad=True."),
        (("--option", "amsgrad=yes"), "--option: yes is no value of Python"),
        (("--option", "amsgrad=2"), "--option: Invalid amsgrad value: 2; it must be True or False"),
        (("--option", "momentum=1"), "--option: AdamW() got an unexpected keyword argument"),
        (("--option", "state_format=1"), "--option: state_format has an option of its own, --st"),
        (("--option", "lr={[]: 1}"), "--option: {[]: 1} is no value of Python"),
        (
            ("--option", "fused=True", "--option", "foreach=True"),
            "--option: fused and foreach cannot be True together.",
        ),
        (
            ("--option", "stochastic_rounding=True"),
            "--option: stochastic_rounding has an option of its own, --stochastic-rounding.",
        ),
        (
            ("--stochastic-rounding", "--dtype", "float32"),
            "--stochastic-rounding: weights in float32 are not rounded at random; --dtype must be "
            "bfloat16 or float16.",
        ),
        (
            ("--master-weight-bits", "24", "--stochastic-rounding"),
            "--stochastic-rounding: it excludes --master-weight-bits: weights that keep their low "
            "bits are not rounded at random.",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_values_get_one_sentence(arguments: tuple[str, ...], sentence: str):
    given = arguments if "--params" in arguments else ("--params", "8e9", *arguments)
    code, output = invoke(*given)
    assert code == 2
    # typer quotes the option only in its own messages.
    last = output.splitlines()[-1].replace("'", "").replace("`", "")
    assert f"Invalid value for {sentence}" in last
    assert not last.endswith("..")


def test_how_many_parameters_must_be_said():
    code, output = invoke()
    assert code == 2
    assert "--params" in output.splitlines()[-1]


def test_a_report_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "plan.json"):
        code, printed = invoke("--params", "8e9", "--json", output)
        assert code == 2
        assert "--json" in printed.splitlines()[-1]
