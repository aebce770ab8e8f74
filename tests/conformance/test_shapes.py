"""Shapes and memory layouts change no bit of a result, and no byte around it.

Oracle: the reference on contiguous parameters of the same values, one at a time. No tolerance: a
rule computes each element by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from tests.conformance.table import (
    FAST,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    OPTIMIZERS,
    Gradients,
    alone,
    assert_same_bits,
    contiguous,
    forced,
    normal,
    outcome,
    parameter,
    run,
)

SHAPES = {
    "without-dimensions": (),
    "one-element": (1,),
    "empty": (0,),
    "empty-inside": (3, 0, 2),
    "vector": (17,),
    "matrix": (5, 7),
    "one-column": (6, 1),
    "four-dimensions": (2, 3, 4, 5),
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "complex64": torch.complex64,
}
STEPS = 2
#: Options with every kind of access: an L2 decay reads the parameter, amsgrad a third state.
OPTIONS = {name: {"lr": 0.1, "weight_decay": 0.1} for name in OPTIMIZERS}
OPTIONS["Adam"] |= {"amsgrad": True}

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", FAST)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def whole_memory(x: torch.Tensor) -> torch.Tensor:
    """Return all of the memory that a tensor is a view of."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return torch.as_strided(x.detach(), (count,), (1,), 0)


def is_own_element(x: torch.Tensor) -> torch.Tensor:
    """Return a mask of a tensor's own elements in its whole memory."""
    offsets = torch.arange(len(whole_memory(x)))
    own = torch.as_strided(offsets, x.shape, x.stride(), x.storage_offset())
    return torch.isin(offsets, own)


def assert_as_if_alone(
    name: str,
    backend: str,
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[Gradients],
) -> None:
    """Step parameters together, and compare them with the reference.

    Parameters and states must have the bits that the reference gives to each parameter alone and
    contiguous. The memory around them and the gradients must be unchanged. States must have the
    strides of ``torch.empty_like`` of the parameter.
    """
    cls, options = OPTIMIZERS[name].ours, OPTIONS[name]
    values = [contiguous(p) for p in parameters]
    memories = [whole_memory(p).clone() for p in parameters]
    gradients = [g for step_gradients in steps for g in step_gradients if g is not None]
    versions = [g._version for g in gradients]
    originals = [contiguous(g) for g in gradients]
    with forced(backend):
        optimizer = cls(parameters, **options)
        run(optimizer, parameters, steps)
    for index, (p, initial, memory) in enumerate(zip(parameters, values, memories, strict=True)):
        got = outcome(optimizer, p)
        wanted = alone(cls, options, initial, [gradients[index] for gradients in steps])
        assert_same_bits(got, wanted, f"parameter {index} of {tuple(p.shape)}:")
        around = ~is_own_element(p)
        assert torch.equal(whole_memory(p)[around], memory[around])
        for key in set(got) - {"step", "mu_product"}:
            assert got[key].stride() == torch.empty_like(p).stride() or key == "p", key
    assert [g._version for g in gradients] == versions
    for g, original in zip(gradients, originals, strict=True):
        assert torch.equal(g, original)


@every_backend
@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@every_optimizer
def test_every_shape_in_every_layout(
    name: str, layout: str, dtype: torch.dtype, backend: str
) -> None:
    """Each shape occurs once for every layout that its gradient may have."""
    cases = list(itertools.product(SHAPES.values(), GRADIENT_LAYOUTS.values()))
    parameters = [
        parameter(normal(shape, dtype, seed), layout) for seed, (shape, _) in enumerate(cases)
    ]
    steps = [
        [
            gradient_layout(normal(shape, dtype, 100 * step + index))
            for index, (shape, gradient_layout) in enumerate(cases)
        ]
        for step in range(STEPS)
    ]
    assert_as_if_alone(name, backend, parameters, steps)


def test_the_layouts_are_what_they_are_called() -> None:
    x = normal((2, 3, 4, 5), torch.float32, 0)
    for layout in (*LAYOUTS.values(), GRADIENT_LAYOUTS["lazily_negated"]):
        assert torch.equal(layout(x), x)
    assert LAYOUTS["unaligned"](x).data_ptr() % 64 == 4
    assert not is_own_element(LAYOUTS["with_gaps"](x)).all()
    assert LAYOUTS["transposed"](x).stride() == (1, 2, 6, 24)
    assert LAYOUTS["channels_last"](x).is_contiguous(memory_format=torch.channels_last)
    assert GRADIENT_LAYOUTS["expanded"](x).stride() == (0, 0, 0, 0)
    assert GRADIENT_LAYOUTS["repeated_rows"](x).stride()[-1] == 0
    assert GRADIENT_LAYOUTS["lazily_negated"](x).is_neg()
    assert GRADIENT_LAYOUTS["lazily_negated"](x.to(torch.complex64)).is_conj()


@every_backend
@every_optimizer
def test_gradients_missing_in_some_steps(name: str, backend: str) -> None:
    parameters = [parameter(normal((5, 7), torch.float32, seed)) for seed in range(4)]
    steps = [
        [
            None if (step + index) % (index + 1) else normal((5, 7), torch.float32, 100 + step)
            for index in range(4)
        ]
        for step in range(8)
    ]
    assert_as_if_alone(name, backend, parameters, steps)


@every_backend
@every_optimizer
def test_a_parameter_that_never_has_a_gradient_stays_as_it_is(name: str, backend: str) -> None:
    idle, busy = (parameter(torch.ones(3)) for _ in range(2))
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours([idle, busy])
        run(optimizer, [idle, busy], [[None, torch.ones(3)]] * 2)
    assert torch.equal(idle, torch.ones(3))
    assert idle._version == 0
    assert optimizer.state.get(idle, {}).get("step", torch.zeros(())) == 0
    assert optimizer.state[busy]["step"] == 2


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@every_optimizer
def test_bfloat16_gradients_on_float32_parameters(name: str, layout: str, backend: str) -> None:
    """torch.optim raises. Oracle: the same gradients in float32, which represents them exactly."""
    cls, options = OPTIMIZERS[name].ours, OPTIONS[name]
    values = normal((5, 7), torch.float32, 0)
    gradients = [normal((5, 7), torch.bfloat16, step + 1) for step in range(STEPS)]
    p = parameter(values, layout)
    p.grad_dtype = None
    with forced(backend):
        optimizer = cls([p], **options)
        run(optimizer, [p], [[LAYOUTS[layout](g)] for g in gradients])
    assert p.grad is not None
    assert p.grad.dtype == torch.bfloat16
    assert_same_bits(
        outcome(optimizer, p), alone(cls, options, values, [g.float() for g in gradients])
    )


@every_backend
@every_optimizer
def test_three_thousand_parameters_are_as_one(name: str, backend: str) -> None:
    """Oracle: one parameter with all their elements."""
    cls, options = OPTIMIZERS[name].ours, OPTIONS[name]
    values = normal((3000, 3), torch.float32, 0)
    gradients = [normal((3000, 3), torch.float32, step + 1) for step in range(2)]
    parameters = [parameter(row) for row in values]
    with forced(backend):
        optimizer = cls(parameters, **options)
        run(optimizer, parameters, [list(g) for g in gradients])
    wanted = alone(cls, options, values, gradients)
    outcomes = [outcome(optimizer, p) for p in parameters]
    for key in set(wanted) - {"step", "mu_product"}:
        together = torch.stack([found[key] for found in outcomes])
        assert_same_bits({key: together}, {key: wanted[key]})
    for key in {"step", "mu_product"} & set(wanted):
        assert {found[key].item() for found in outcomes} == {wanted[key].item()}


@every_backend
@every_optimizer
def test_groups_without_parameters_and_steps_without_gradients(name: str, backend: str) -> None:
    p = parameter(torch.ones(3))
    groups = [{"params": []}, {"params": [p]}, {"params": []}]
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours(groups, **OPTIONS[name])
        run(optimizer, [p], [[None], [torch.ones(3)], [None]])
    wanted = alone(OPTIMIZERS[name].ours, OPTIONS[name], torch.ones(3), [torch.ones(3)])
    assert_same_bits(outcome(optimizer, p), wanted)


@every_backend
@every_optimizer
def test_dtypes_mixed_in_one_group(name: str, backend: str) -> None:
    parameters = [
        parameter(normal((5, 7), dtype, seed), layout)
        for seed, dtype in enumerate([*DTYPES.values(), torch.float64, torch.float16])
        for layout in LAYOUTS
    ]
    steps = [
        [normal(p.shape, p.dtype, 100 * step + index) for index, p in enumerate(parameters)]
        for step in range(STEPS)
    ]
    assert_as_if_alone(name, backend, parameters, steps)
