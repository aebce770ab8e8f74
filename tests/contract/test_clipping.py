"""``max_grad_norm`` and ``skip_nonfinite``.

Oracles: ``math.fsum``, which rounds a sum once; a plain step of gradients that were multiplied by
the factor before, bit for bit; ``torch.nn.utils.clip_grad_norm_``, within the rounding of its norm
in float32; the reference backend, bit for bit.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import stepforge
from stepforge.backends.native.source import c_source
from stepforge.cli.kernels import c_sources
from stepforge.ops import to_float32
from stepforge.step.control import Control
from tests.conformance.table import (
    BACKENDS,
    FORMATS,
    OPTIMIZERS,
    Gradients,
    assert_same_bits,
    contiguous,
    forced,
    lazily_negated,
    normal,
    outcome,
    parameter,
    run,
    transposed,
)

INF, NAN = float("inf"), float("nan")
SHAPES = [(5, 7), (3000,), (), (0, 3), (1024,)]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradients(step: int, dtype: torch.dtype = torch.float32, size: float = 3.0) -> Gradients:
    """Return gradients; one is missing in the second step."""
    found = [normal(shape, dtype, 10 * step + k) * size for k, shape in enumerate(SHAPES)]
    return [None if step == 1 and k == 1 else g for k, g in enumerate(found)]


def built(
    name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[stepforge.Optimizer, list[torch.nn.Parameter]]:
    """Return an optimizer of two param groups, whose parameters take turns."""
    params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}]
    return OPTIMIZERS[name].ours(groups, **options), params


def exact_norm(given: Gradients) -> float:
    """Return the 2-norm, whose sum is rounded once."""
    numbers = [x for g in given if g is not None for x in g.double().flatten().tolist()]
    return math.sqrt(math.fsum(x * x for x in numbers))


def exact_factor(given: Gradients, max_norm: float) -> float:
    return min(1.0, max_norm / (exact_norm(given) + 1e-6))


def scaled(given: Gradients, factor: float) -> Gradients:
    return [None if g is None else g * factor for g in given]


def assert_alike(
    one: stepforge.Optimizer, other: stepforge.Optimizer, step: int | None = None
) -> None:
    pairs = zip(one.param_groups, other.param_groups, strict=True)
    for own, others in pairs:
        for p, q in zip(own["params"], others["params"], strict=True):
            assert_same_bits(outcome(one, p), outcome(other, q), f"step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_backend
@every_optimizer
def test_a_clipped_step_is_a_plain_step_of_smaller_gradients(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    """The third step is below the norm and is not clipped."""
    with forced(backend):
        clipped, params = built(name, dtype, max_grad_norm=1.5)
        plain, others = built(name, dtype)
        for step in range(3):
            given = gradients(step, dtype, size=1e-3 if step == 2 else 3.0)
            before = [None if g is None else g.clone() for g in given]
            factor = exact_factor(given, 1.5)
            assert (factor == 1) == (step == 2)
            rounded = factor if dtype == torch.float64 else to_float32(factor)
            run(clipped, params, [given])
            metrics = clipped.metrics()
            assert metrics["grad_norm"].item() == pytest.approx(exact_norm(given), rel=1e-15)
            assert metrics["clip_factor"].item() == pytest.approx(factor, rel=1e-15)
            # In float64 the last bit of a sum in another order than the oracle's reaches a weight.
            exact = metrics["clip_factor"].item() if dtype == torch.float64 else rounded
            run(plain, others, [scaled(given, exact)])
            assert_alike(clipped, plain, step)
            for g, was in zip(given, before):
                assert g is was or torch.equal(g, was)


@every_optimizer
def test_a_clipped_run_is_torchs(name: str) -> None:
    """Its norm is rounded to float32 at each tensor: by less than 1e-6 of it."""
    clipped, params = built(name, max_grad_norm=1.0)
    plain, others = built(name)
    for step in range(6):
        run(clipped, params, [gradients(step)])
        for p, g in zip(others, gradients(step), strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(others, 1.0)
        plain.step()
        torch.testing.assert_close(clipped.metrics()["grad_norm"].float(), norm, rtol=1e-6, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def strided(given: Gradients) -> Gradients:
    """Return gradients of several layouts: one transposed, one a lazy negation."""
    found = [None if g is None else transposed(g) if g.dim() == 2 else g for g in given]
    return [g if k != 4 or g is None else lazily_negated(g) for k, g in enumerate(found)]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("format_", ["float32", *FORMATS])
def test_every_backend_stores_the_same_bits(format_: str, backend: str) -> None:
    dtype, options = FORMATS.get(format_, (torch.float32, {}))
    results = []
    for each in (backend, "reference"):
        params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate([(41, 100), (7,)])]
        with forced(each):
            optimizer = stepforge.AdamW(params, max_grad_norm=0.5, skip_nonfinite=True, **options)
            for step in range(3):
                given = [normal(p.shape, dtype, 10 * step + k) for k, p in enumerate(params)]
                if step == 1:
                    given[1][3] = NAN
                run(optimizer, params, [[transposed(given[0]), given[1]]])
        results.append([outcome(optimizer, p) for p in params])
        assert optimizer.metrics()["skipped"].item() == 1
    for got, oracle in zip(*results, strict=True):
        assert_same_bits(got, oracle)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_other_dtypes_are_clipped(dtype: torch.dtype) -> None:
    """Complex numbers count by their absolute value. Oracle: a norm of float64."""
    optimizer, params = built("Adam", dtype, max_grad_norm=1.0)
    given = [g if g is None else strided([g])[0] for g in gradients(0, dtype)]
    run(optimizer, params, [given])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    oracle = math.sqrt(sum(g.to(wide).abs().square().sum().item() for g in given if g is not None))
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(oracle, rel=1e-6)


def test_sparse_gradients_are_clipped() -> None:
    """Values of one index count once, added. Oracle: the same gradients, dense."""
    results = []
    for is_sparse in (True, False):
        params = [parameter(torch.ones(6)), parameter(torch.ones(3))]
        optimizer = stepforge.Adagrad(params, lr=0.5, max_grad_norm=1.0)
        sparse = torch.sparse_coo_tensor([[1, 4, 1]], [3.0, 4.0, 2.0], (6,), check_invariants=True)
        given = [sparse if is_sparse else sparse.to_dense(), torch.tensor([1.0, -2.0, 0.5])]
        run(optimizer, params, [given])
        results.append([optimizer.metrics()["grad_norm"], *(p.detach() for p in params)])
    for got, oracle in zip(*results, strict=True):
        assert torch.equal(got, oracle)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before, norms = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            p = parameter(normal((300_001,), torch.float32, 0))
            optimizer = stepforge.AdamW([p], max_grad_norm=1.0)
            run(optimizer, [p], [[normal((300_001,), torch.float32, 1)]])
            norms.append(optimizer.metrics()["grad_norm"].item())
    finally:
        torch.set_num_threads(before)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_unscales_before_gradients_are_clipped(fused: bool) -> None:
    """Oracle: the same step without a scaler; a power of two scales without rounding."""
    results = []
    for scale in (None, 2.0**16):
        optimizer, params = built("AdamW", max_grad_norm=1.0, skip_nonfinite=True, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(2):
            scaler.scale(torch.zeros(()))
            given = gradients(2 * step)
            if step == 1:
                given[0][2, 3] = INF  # type: ignore[index]
            for p, g in zip(params, given, strict=True):
                p.grad = None if g is None else g * (scale or 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append(([outcome(optimizer, p) for p in params], optimizer.metrics()))
    (oracle, _), (got, metrics) = results
    for one, other in zip(got, oracle, strict=True):
        assert_same_bits(one, other)
    assert all(state["step"] == 1 for state in got if "step" in state)
    # Unfused, the scaler does not call the step that it skips.
    assert metrics["skipped"].item() == fused
    assert metrics["grad_norm"].isfinite()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@every_backend
@every_optimizer
def test_a_step_that_is_not_finite_changes_nothing(name: str, backend: str, value: float) -> None:
    with forced(backend):
        optimizer, params = built(name, skip_nonfinite=True)
        run(optimizer, params, [gradients(0)])
        before = [{key: x.clone() for key, x in outcome(optimizer, p).items()} for p in params]
        given = gradients(2)
        given[1][2999] = value  # type: ignore[index]
        run(optimizer, params, [given])
        for p, was in zip(params, before, strict=True):
            assert_same_bits(outcome(optimizer, p), was)
        assert optimizer.metrics()["skipped"].item() == 1
        run(optimizer, params, [gradients(3)])
        assert optimizer.metrics()["skipped"].item() == 1
        assert not torch.equal(params[0], before[0]["p"])


def test_large_numbers_are_finite() -> None:
    """Their squares are not, in float64."""
    optimizer, params = built("AdamW", torch.float64, skip_nonfinite=True)
    run(optimizer, params, [gradients(0, torch.float64, size=1e300)])
    assert optimizer.metrics()["skipped"].item() == 0
    assert optimizer.state[params[0]]["step"] == 1


def test_without_skipping_a_norm_that_is_no_number_reaches_every_weight() -> None:
    """As after ``clip_grad_norm_``."""
    optimizer, params = built("AdamW", max_grad_norm=1.0)
    given = gradients(0)
    given[0][0, 0] = NAN  # type: ignore[index]
    run(optimizer, params, [given])
    assert all(p.isnan().all() for p in params)


def test_a_count_on_a_device_is_one_tensor() -> None:
    """A replayed graph adds to it, so it must stay where it is."""
    control = Control(skip_nonfinite=True)
    control.count_skipped()
    counts = []
    for found in (0.0, 2.0):
        control._count(torch.tensor(found))
        counts.append((control.skipped, int(control.skipped)))
    assert [count for _, count in counts] == [1, 2]
    assert counts[0][0] is counts[1][0]
    assert control.known([], None)["skipped"] is not control.skipped


@pytest.mark.parametrize("value", [2, np.float32(0.5), 1.0])
def test_any_kind_of_number_is_a_norm(value: Any) -> None:
    optimizer, params = built("AdamW", max_grad_norm=value)
    run(optimizer, params, [gradients(0)])
    assert optimizer.metrics()["clip_factor"] < 1


def test_a_step_without_gradients_is_no_step() -> None:
    optimizer, params = built("AdamW", max_grad_norm=1.0)
    run(optimizer, params, [[None] * len(params)])
    assert not optimizer.metrics()
    assert not optimizer.state


@pytest.mark.parametrize("value", [0, -1.0, INF, NAN])
def test_a_norm_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid max_grad_norm: {value}; it must be above 0"):
        built("AdamW", max_grad_norm=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'; it must be a number above 0, or None"),
        ({"max_grad_norm": True}, "max_grad_norm is True"),
        ({"skip_nonfinite": 1}, "skip_nonfinite is 1; it must be True or False"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        built("AdamW", **options)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_autograd_cannot_see_it(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        built("AdamW", differentiable=True, **options)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_clip_too(copied: Any) -> None:
    optimizer, _ = built("AdamW", max_grad_norm=1.0)
    twin = copied(optimizer)
    params = [p for group in twin.param_groups for p in group["params"]]
    run(twin, params, [[torch.full_like(p, 9.0) for p in params]])
    assert twin.metrics()["clip_factor"] < 1


def test_checkpoints_have_the_options_of_groups_only() -> None:
    """Loading one of before, or of torch.optim, keeps what the constructor said."""
    optimizer, params = built("AdamW", max_grad_norm=1.0, skip_nonfinite=True)
    run(optimizer, params, [gradients(0)])
    saved = optimizer.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    for group in (*saved["param_groups"], *optimizer.param_groups, optimizer.defaults):
        assert not {"max_grad_norm", "skip_nonfinite"} & group.keys()
    plain, _ = built("AdamW")
    optimizer.load_state_dict(plain.state_dict())
    run(optimizer, params, [gradients(0, size=9.0)])
    assert optimizer.metrics()["clip_factor"] < 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "with_gaps"])
def test_layouts_have_the_norm_of_their_order_in_memory(layout: str) -> None:
    """Or of the flat index where a kernel copies them first. Oracle: the reference."""
    norms = []
    for backend in ("native", "reference"):
        p = parameter(normal((70, 30), torch.float32, 0), layout)
        with forced(backend):
            optimizer = stepforge.AdamW([p], max_grad_norm=1.0)
            p.grad = torch.empty_like(p).copy_(normal((70, 30), torch.float32, 1))
            optimizer.step()
        norms.append(optimizer.metrics()["grad_norm"].item())
    assert norms[0] == norms[1]


def test_a_compiled_step_clips() -> None:
    """Both outside of the graph, and as one operator within. Oracle: the plain step."""
    results = []
    for fullgraph in (None, False, True):
        optimizer, params = built("AdamW", max_grad_norm=1.0)
        step = optimizer.step
        if fullgraph is not None:
            torch.compiler.reset()
            step = torch.compile(optimizer.step, fullgraph=fullgraph, backend="eager")
        for k in range(2):
            for p, g in zip(params, gradients(2 * k), strict=True):
                p.grad = g
            step()
        results.append(
            [{k: contiguous(x) for k, x in outcome(optimizer, p).items()} for p in params]
        )
    for got in results[1:]:
        for one, oracle in zip(got, results[0], strict=True):
            assert_same_bits(one, oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 1.0},
        {"skip_nonfinite": True},
        {"max_grad_norm": 1.0, "skip_nonfinite": True},
    ],
    ids=str,
)
def test_kernels_of_passes_can_be_prebuilt(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Sources that a step takes are among those that `stepforge prebuild` writes."""
    optimizer, params = built("AdamW", dtype, **options)
    run(optimizer, params, [gradients(0, dtype)])
    assert optimizer._stepper.plans.latest is not None
    (found,) = optimizer._stepper.plans.latest.launches
    ((_, kept),) = found.passes.items()
    assert c_source(kept.spec) in c_sources()
