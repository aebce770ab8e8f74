"""Formats: every backend gives the reference's bits, and a step errs by its rounding only.

Oracles: the reference backend, bit for bit; and torch.optim in float64, from the decoded values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import stepforge
from stepforge.state.layout import StateLayout, state_layout
from tests.conformance.table import (
    BACKENDS,
    FAST,
    FORMATS,
    OPTIMIZERS,
    VARIANTS,
    assert_same_bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    parameter,
    run,
    transposed,
)

INF, NAN = float("inf"), float("nan")

#: Rows longer than a block, shorter than a block, and of whole blocks; one row; and shapes without
#: int8 states: an empty one, a vector, a scalar. The others have 4,096 elements or more.
SHAPES = [(17, 257), (41, 100), (4, 3, 384), (1, 4100), (0, 300), (1100,), ()]


def steps_of(name: str) -> range:
    """Return the steps to compare. RAdam's form changes at its sixth."""
    return range(7 if name == "RAdam" else 5)


def gradient(
    distribution: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """Return a gradient. In an extreme one some blocks meet an infinity or NaN in turn."""
    if distribution == "normal":
        return normal(shape, dtype, seed)
    values = extreme(shape, dtype, seed)
    if values.numel() > 1000:
        values.view(-1)[seed % 900] = (INF, -INF, NAN)[seed // 1000 % 3]
    return values


@functools.lru_cache(maxsize=4)  # every other backend is compared with the same reference
def outcomes(
    backend: str, variant: str, format_: str, distribution: str
) -> list[dict[str, torch.Tensor]]:
    """Return every parameter with its states after every other step."""
    name, options = VARIANTS[variant]
    dtype, format_options = FORMATS[format_]
    values = normal if distribution == "normal" else extreme
    parameters = [parameter(values(s, dtype, i)) for i, s in enumerate(SHAPES)]
    found = []
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours(parameters, **options, **format_options)
        for step in steps_of(name):
            gradients = [
                None
                if step % 3 == i
                else gradient(distribution, tuple(p.shape), dtype, 1000 * step + i)
                for i, p in enumerate(parameters)
            ]
            run(optimizer, parameters, [gradients])
            if step % 2 == 0:
                found += [
                    {key: contiguous(x) for key, x in outcome(optimizer, p).items()}
                    for p in parameters
                ]
    return found


#: The format with the most tensors per parameter. Every variant of a rule runs in it; the plain
#: variant runs in every format.
FULLEST = "bfloat16, 24 bits, int8 states"
CASES = [
    (distribution, variant, format_, backend)
    for distribution, variant, format_ in itertools.product(
        ["normal", "extreme"], VARIANTS, FORMATS
    )
    if variant.endswith("-plain") or format_ == FULLEST
    for backend in BACKENDS
    if backend != "reference"
    if backend in FAST or (distribution == "extreme" and variant.endswith("-plain"))
]


@pytest.mark.parametrize(("distribution", "variant", "format_", "backend"), CASES)
def test_a_backend_stores_the_bits_of_the_reference(
    distribution: str, variant: str, format_: str, backend: str
) -> None:
    found = outcomes(backend, variant, format_, distribution)
    wanted = outcomes("reference", variant, format_, distribution)
    for index, (got, oracle) in enumerate(zip(found, wanted, strict=True)):
        where = f"observation {index // len(SHAPES)}, shape {SHAPES[index % len(SHAPES)]}:"
        assert_same_bits(got, oracle, where)


def test_the_inputs_above_reach_the_corners_they_are_meant_for() -> None:
    results = [
        result
        for distribution in ("normal", "extreme")
        for result in outcomes("reference", "Adam-plain", "float32, int8 states", distribution)
    ]
    tensors = [(key, x.flatten()) for result in results for key, x in result.items()]
    scales = torch.cat([x for key, x in tensors if key.endswith("_scale")])
    codes = torch.cat([x for _, x in tensors if x.dtype == torch.uint8])
    assert scales.isnan().any()
    assert scales[scales > 0].min() == 2.0**-95
    assert set(codes.tolist()) == set(range(256))
    in_full = [x for x in results if "exp_avg" in x and x["exp_avg"].dtype == torch.float32]
    assert {tuple(x["p"].shape) for x in in_full} == {(0, 300), (1100,), ()}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("format_", [FULLEST, "bfloat16 at random, int8 states"])
def test_layouts_change_nothing(format_: str, backend: str) -> None:
    """Blocks and random bits depend on the flat index of an element, not on its address."""
    dtype, format_options = FORMATS[format_]
    results = []
    for layout in ("contiguous", "transposed", "with_gaps"):
        p = parameter(normal((40, 300), dtype, 1), layout)
        with forced(backend):
            optimizer = stepforge.AdamW([p], **format_options)
            for step in range(3):
                run(optimizer, [p], [[transposed(normal((40, 300), dtype, 2 + step))]])
        results.append({key: contiguous(x) for key, x in outcome(optimizer, p).items()})
    for result in results[1:]:
        assert_same_bits(result, results[0])


def decoded(
    layout: StateLayout, column: str, p: torch.Tensor, param_state: Mapping[str, Any]
) -> torch.Tensor:
    """Return the values of a state, or of the parameter for ``p``."""
    format_ = layout.formats.get(column)
    keys = {tensor.part.name: tensor.key for tensor in layout.tensors if tensor.column == column}
    if format_ is None:
        return (p.detach() if column == "p" else param_state[keys[""]]).double()
    parts = {part.name: param_state[keys[part.name]] for part in format_.parts if part.name in keys}
    return format_.read({"": p.detach(), **parts} if column == "p" else parts).double()


def rounding(
    layout: StateLayout,
    column: str,
    x: torch.Tensor,
    param_state: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the largest error of a format's own rounding of these values.

    A code has three bits of fraction: rounded to nearest it errs by at most a sixteenth, rounded at
    random by an eighth. Values below the smallest code, 1.125 / 2**15 or 1.125 / 2**31 of the
    scale, err by as much as that code.
    """
    format_ = layout.formats.get(column)
    relative = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    if format_ is not None and format_.in_blocks:
        key = layout.states[column].key
        scale = param_state[f"{key}_scale"].double().repeat_interleave(128, 1)
        scale = scale[:, : x[0].numel()].reshape(x.shape)
        octaves, step = (31, 1 / 8) if layout.states[column].unsigned else (15, 1 / 16)
        return torch.maximum(x.abs() * step, scale * 1.125 * 2.0**-octaves)
    if column == "p" and param_state.keys() & {"low_bits_8", "low_bits_16"}:
        bits = 2.0**-16 if "low_bits_8" in param_state else 2.0**-24
        return x.abs() * bits
    stored = dtype if column == "p" else layout.dtypes[column]
    at_random = 2 if format_ is not None else 1
    smallest = 2.0**-24 if stored == torch.float16 else 0.0  # a subnormal's last bit
    return at_random * (x.abs() * relative.get(stored, 0.0) + smallest)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.endswith("-plain")])
def test_a_step_is_one_in_float64_but_for_the_rounding_of_its_results(
    variant: str, format_: str
) -> None:
    """The tolerance adds the error of float32 arithmetic to that rounding.

    A parameter moves by at most about 0.1 here. A dozen operations compute that, each with an error
    of 2**-24 of numbers of that size or less: 2**-20 of the larger of the parameter and the step.
    States are sums of two terms: 2**-20 of the larger term.
    """
    name, options = VARIANTS[variant]
    dtype, format_options = FORMATS[format_]
    p = parameter(normal((24, 300), dtype, 1))
    optimizer = OPTIMIZERS[name].ours([p], lr=0.05, **options, **format_options)
    for step in steps_of(name):
        layout = state_layout(optimizer.rule, optimizer.param_groups[0], p)
        param_state = optimizer.state.get(p, {})
        twin_p = torch.nn.Parameter(
            decoded(layout, "p", p, param_state) if param_state else p.detach().double()
        )
        twin = OPTIMIZERS[name].theirs([twin_p], lr=0.05, **options)
        if param_state:
            start = {key: x.clone() for key, x in param_state.items() if not x.dim()}
            for letter, state in layout.states.items():
                if not state.scalar:
                    start[state.key] = decoded(layout, letter, p, param_state)
            packed = twin.state_dict() | {"state": {0: start}}
            twin.load_state_dict(packed)
        p.grad = normal((24, 300), dtype, 100 + step)
        twin_p.grad = p.grad.double()
        optimizer.step()
        twin.step()
        param_state = optimizer.state[p]
        for column in dict.fromkeys(["p", *(tensor.column for tensor in layout.tensors)]):
            exact = (
                twin_p if column == "p" else twin.state[twin_p][layout.states[column].key]
            ).detach()
            allowed = rounding(layout, column, exact, param_state, dtype)
            error = (decoded(layout, column, p, param_state) - exact).abs()
            arithmetic = 2.0**-20 * torch.maximum(exact.abs(), p.grad.abs().double() ** 2 + 0.1)
            over = error - (allowed + arithmetic)
            assert (over <= 0).all(), (column, step, float(over.max()))
