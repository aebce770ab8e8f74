"""``telemetry`` and ``metrics()``.

Oracles: torch's operations in float64 on what was before and after a step, within the rounding of a
sum of float64; the reference backend, bit for bit; the same run without telemetry, bit for bit.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.native.source import c_source
from stepforge.backends.spec import KernelSpec
from stepforge.declare import NonNegative
from stepforge.ops import ALL, count, largest, norm, total
from tests.conformance.table import (
    BACKENDS,
    FAST,
    FORMATS,
    OPTIMIZERS,
    Gradients,
    assert_same_bits,
    forced,
    normal,
    outcome,
    parameter,
    run,
    transposed,
)

INF, NAN = float("inf"), float("nan")
NAMES = ["grad_norm", "grad_max", "nonfinite", "update_norm", "param_norm", "update_ratio", "lost"]
#: Sizes of a part of a block, of blocks, of rows that chunks of 128 fill, and of some they do not.
SHAPES = [(64, 130), (3000,), (), (0, 3), (40, 256), (1024,), (5, 7)]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradients(step: int, dtype: torch.dtype = torch.float32) -> Gradients:
    """Return gradients; one is missing in the second step."""
    found = [normal(shape, dtype, 10 * step + k) for k, shape in enumerate(SHAPES)]
    return [None if step == 1 and k == 1 else g for k, g in enumerate(found)]


def built(
    name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[stepforge.Optimizer, list[torch.nn.Parameter]]:
    """Return an optimizer of two param groups, whose parameters take turns."""
    params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
    named = [(f"p{k}", p) for k, p in enumerate(params)]
    groups = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.02}]
    return OPTIMIZERS[name].ours(groups, **options), params


def measured(
    before: list[torch.Tensor], after: list[torch.Tensor], given: Gradients
) -> dict[str, float]:
    """Return the metrics of what was stepped, but for ``lost``, by torch's operations."""
    rows = [row for row in zip(before, after, given) if row[2] is not None]
    old, new, g = (
        torch.cat([x.detach().double().flatten() for x in column])  # type: ignore[union-attr]
        for column in zip(*rows)
    )
    return {
        "grad_norm": g.norm().item(),
        "grad_max": g.abs().max().item() if g.numel() else -INF,
        "nonfinite": (~g.isfinite()).sum().item(),
        "update_norm": (new - old).norm().item(),
        "param_norm": new.norm().item(),
        "update_ratio": ((new - old).norm() / new.norm()).item(),
    }


def assert_close(got: dict[str, torch.Tensor], oracle: dict[str, float], rel: float) -> None:
    for name, value in oracle.items():
        assert got[name].shape == ()
        assert got[name].item() == pytest.approx(value, rel=rel, nan_ok=True), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in OPTIMIZERS),
        *(("NAdam", dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_metrics_are_what_torchs_operations_find(name: str, dtype: torch.dtype) -> None:
    """The difference of two weights is rounded to the arithmetic, which float64 shows."""
    rel = 1e-12 if dtype == torch.float64 else 2e-7
    optimizer, params = built(name, dtype, telemetry=True, lr=0.05)
    assert optimizer.metrics() == {"skipped": torch.tensor(0)}
    for step in range(3):
        before, given = [p.detach().clone() for p in params], gradients(step, dtype)
        run(optimizer, params, [given])
        metrics = optimizer.metrics()
        assert list(metrics) == [*NAMES, "skipped"]
        assert_close(metrics, measured(before, params, given), rel)
        of_groups = optimizer.metrics(by="group")
        for first, found in enumerate(of_groups):
            own = slice(first, None, 2)
            assert list(found) == NAMES
            assert_close(found, measured(before[own], params[own], given[own]), rel)
        of_params = optimizer.metrics(by="parameter")
        order = [*range(0, len(params), 2), *range(1, len(params), 2)]
        assert list(of_params) == [f"p{k}" for k in order if given[k] is not None]
        for k, (p, old, g) in enumerate(zip(params, before, given, strict=True)):
            if g is not None:
                assert_close(of_params[f"p{k}"], measured([old], [p], [g]), rel)


@pytest.mark.parametrize("format_", ["float32", "float64", "float16", *FORMATS])
@pytest.mark.parametrize("backend", [name for name in FAST if name != "reference"])
def test_every_backend_finds_the_same_bits(backend: str, format_: str) -> None:
    """Also of NaN, infinities, and tensors whose elements are not in one order.

    tests/backends/triton/test_metrics.py has Triton's.
    """
    dtype, options = FORMATS.get(format_, (getattr(torch, format_, torch.float32), {}))
    extremes = {"least": lambda new_p: largest(-new_p), "sum": lambda g: total(g)}
    results = []
    for each in (backend, "reference"):
        params = [parameter(normal(shape, dtype, k)) for k, shape in enumerate(SHAPES)]
        with forced(each):
            optimizer = stepforge.RAdam(params, lr=1e-3, telemetry=extremes, **options)
            for step in range(2):
                given: list[Any] = [normal(p.shape, dtype, k) for k, p in enumerate(params)]
                given[0], given[4] = transposed(given[0]), transposed(given[4])
                if step == 1:
                    given[1][1500], given[6][3, 3] = NAN, -INF
                run(optimizer, params, [given])
                found = [optimizer.metrics(), *optimizer.metrics(by="parameter").values()]
                results.append((each, found, [outcome(optimizer, p) for p in params]))
    for (_, got, stored), (_, oracle, expected) in zip(results[:2], results[2:], strict=True):
        for one, other in zip([*got, *stored], [*oracle, *expected], strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
@every_optimizer
def test_it_changes_no_bit_of_a_run(name: str, options: dict[str, Any]) -> None:
    results = []
    for telemetry in (True, False):
        optimizer, params = built(name, telemetry=telemetry, **options)
        run(optimizer, params, [gradients(step) for step in range(3)])
        results.append([outcome(optimizer, p) for p in params])
    for got, oracle in zip(*results, strict=True):
        assert_same_bits(got, oracle)


def test_without_it_the_kernel_is_the_same() -> None:
    """Byte for byte: an optimizer with metrics leaves the graphs of others alone."""
    optimizer, _ = built("AdamW")
    group = optimizer.param_groups[0]

    def source() -> str:
        graph = optimizer.rule.graph(group)
        return c_source(KernelSpec.of(graph, dict.fromkeys("pgmv", torch.float32)))

    before = source()
    metered, params = built("AdamW", telemetry=True)
    run(metered, params, [gradients(0)])
    assert source() == before
    assert optimizer.rule.with_metrics({}) is optimizer.rule


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_gradients_are_measured_before_they_are_clipped(options: dict[str, Any]) -> None:
    """By the pass that comes before the step anyway. Oracle: the metrics without it."""
    controlled, params = built("AdamW", telemetry=True, **options)
    plain, others = built("AdamW", telemetry=True)
    given = gradients(0)
    run(controlled, params, [given])
    run(plain, others, [given])
    got, oracle = controlled.metrics(), plain.metrics()
    assert list(got) == [
        *NAMES,
        *(["clip_factor"] if "max_grad_norm" in options else []),
        "skipped",
    ]
    for name in ("grad_norm", "grad_max", "nonfinite"):
        assert torch.equal(got[name], oracle[name])
    by_name = controlled.metrics(by="parameter")
    assert torch.equal(by_name["p0"]["grad_norm"], plain.metrics(by="parameter")["p0"]["grad_norm"])
    assert list(by_name["p0"]) == NAMES


@every_backend
def test_a_skipped_step_has_changed_nothing(backend: str) -> None:
    with forced(backend):
        optimizer, params = built("AdamW", telemetry=True, skip_nonfinite=True)
        run(optimizer, params, [gradients(0)])
        size = optimizer.metrics()["param_norm"].item()
        given = gradients(2)
        given[0][0, 0] = INF  # type: ignore[index]
        run(optimizer, params, [given])
        found = optimizer.metrics()
    assert {name: found[name].item() for name in ("nonfinite", "update_norm", "lost")} == {
        "nonfinite": 1,
        "update_norm": 0,
        "lost": 0,
    }
    assert found["param_norm"].item() == pytest.approx(size, rel=1e-14)
    assert found["skipped"] == 1
    assert optimizer.metrics(by="parameter")["p1"]["update_norm"] == 0


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_a_gradient_scaler_unscales_first(options: dict[str, Any]) -> None:
    """And skips, which counts. Oracle: the same step without a scaler; it scales by 2**10."""
    results = []
    for scale in (None, 2.0**10):
        optimizer, params = built("Adam", telemetry=True, fused=True, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(2):
            scaler.scale(torch.zeros(()))
            for p, g in zip(params, gradients(2 * step), strict=True):
                p.grad = g if g is None or scale is None else g * scale
            if step and scale:
                params[1].grad[7] = INF  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
            if step == 0:
                results.append(optimizer.metrics())
    assert_same_bits(*results)
    found = optimizer.metrics()
    assert (found["skipped"].item(), found["update_norm"].item()) == (1, 0)
    assert found["nonfinite"].item() == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1.0), ({"master_weight_bits": 32}, 0.0)],
    ids=["bfloat16", "with low bits"],
)
def test_updates_lost_to_rounding_are_counted(options: dict[str, Any], expected: float) -> None:
    """A step of 1e-4 is a fortieth of the distance of weights around 1. Half have no gradient."""
    p = parameter(torch.full((2048,), 1.0, dtype=torch.bfloat16))
    optimizer = stepforge.Adam([p], lr=1e-4, telemetry=True, **options)
    g = torch.ones(2048, dtype=torch.bfloat16)
    run(optimizer, [p], [[g]])
    assert optimizer.metrics()["lost"] == expected
    run(optimizer, [p], [[torch.zeros_like(g)]])
    assert optimizer.metrics()["lost"] == 0, "what has no gradient rests"
    fresh = parameter(torch.full((2048,), 1.0, dtype=torch.bfloat16))
    optimizer = stepforge.Adam([fresh], lr=1e-4, telemetry=True, **options)
    g[::2] = 0
    run(optimizer, [fresh], [[g]])
    assert optimizer.metrics()["lost"] == expected / 2


def test_a_change_far_below_the_last_place_is_one() -> None:
    """``AdamW`` multiplies weights by 1 - 1e-9, which float32 does not store."""
    p = parameter(torch.ones(100))
    optimizer = stepforge.AdamW([p], lr=1e-3, weight_decay=1e-6, telemetry=True)
    run(optimizer, [p], [[torch.full((100,), 1e-30)]])
    assert optimizer.metrics()["lost"] == 1


def test_a_metric_of_ones_own() -> None:
    """Reductions over all parameters make that of all, not the metrics of each."""
    metrics = {
        "signal": lambda p, g, new_p: norm(new_p - p) / norm(g),
        "rms": lambda size, new_p: norm(new_p) / size**0.5,
        "climbs": lambda change, g: count(change * g > 0) / size_of(g),
    }
    optimizer, params = built("NAdam", telemetry=metrics, lr=0.05)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, [gradients(0)])
    found, oracle = optimizer.metrics(), measured(before, params, gradients(0))
    assert list(found) == [*NAMES, "signal", "rms", "climbs", "skipped"]
    elements = sum(p.numel() for p in params)
    own = {
        "signal": oracle["update_norm"] / oracle["grad_norm"],
        "rms": oracle["param_norm"] / elements**0.5,
        "climbs": 0.0,
    }
    assert_close(found, own, 2e-7)
    of_one = optimizer.metrics(by="parameter")["p4"]
    assert of_one["rms"].item() == pytest.approx(params[4].double().square().mean().sqrt().item())


def size_of(g: Any) -> Any:
    return count(g == g)


@pytest.mark.parametrize(
    ("telemetry", "error", "message"),
    [
        (1, TypeError, "telemetry is 1; it must be True, False, or a dict of metrics"),
        ({"x": 1}, TypeError, "telemetry has 'x': 1; it must map names to functions"),
        ({"lost": lambda g: norm(g)}, ValueError, "'lost', which is the name of another one"),
        ({"skipped": lambda g: norm(g)}, ValueError, "'skipped', which is the name of another"),
        ({"x": lambda q: norm(q)}, TypeError, "metric x takes q; it may take p, g, new_p, change"),
        ({"x": lambda g: g}, TypeError, "metric x returned `g`; it must return one number a param"),
        ({"x": lambda g: 1.0}, TypeError, "metric x returned `1.0`; it must return one number"),
        ({"x": lambda g: norm(g, across=ALL)}, TypeError, "metric x reduces across=ALL; leave"),
        ({"x": lambda g: norm(g / norm(g))}, TypeError, "metric x reduces what follows from a red"),
        ({"x": lambda g, size: norm(g / size)}, TypeError, "metric x reduces what depends on size"),
    ],
)
def test_what_is_no_metric_is_refused(telemetry: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        built("AdamW", telemetry=telemetry)


def test_another_way_to_divide_parameters_is_refused() -> None:
    optimizer, _ = built("AdamW", telemetry=True)
    with pytest.raises(ValueError, match="by is 'name'; it must be None, 'group' or 'parameter'"):
        optimizer.metrics(by="name")  # type: ignore[call-overload]


def test_autograd_cannot_see_it() -> None:
    with pytest.raises(RuntimeError, match="`telemetry` does not support `differentiable`"):
        built("AdamW", telemetry=True, differentiable=True)


def test_sparse_gradients_are_refused() -> None:
    """Before anything changes."""
    p = parameter(torch.ones(4))
    optimizer = stepforge.Adagrad([p], telemetry=True)
    p.grad = torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)
    with pytest.raises(RuntimeError, match="`telemetry` does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4))


def test_parameters_without_names_are_numbered() -> None:
    params = [parameter(torch.ones(3)) for _ in range(3)]
    optimizer = stepforge.AdamW([{"params": params[:1]}, {"params": params[1:]}], telemetry=True)
    run(optimizer, params, [[None, torch.ones(3), torch.ones(3)]])
    assert list(optimizer.metrics(by="parameter")) == [1, 2]
    assert optimizer.metrics(by="group")[0] == {}


def test_a_step_without_gradients_is_no_step() -> None:
    """It leaves what was known."""
    optimizer, params = built("AdamW", telemetry=True, max_grad_norm=1.0)
    run(optimizer, params, [gradients(0)])
    before = optimizer.metrics()
    run(optimizer, params, [[None] * len(params)])
    assert_same_bits(optimizer.metrics(), before)


def signal(p: Any, g: Any, new_p: Any) -> Any:
    return norm(new_p - p) / norm(g)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_measure_too(copied: Any) -> None:
    optimizer, _ = built("AdamW", telemetry={"signal": signal})
    twin = copied(optimizer)
    params = [p for group in twin.param_groups for p in group["params"]]
    run(twin, params, [[torch.full_like(p, 9.0) for p in params]])
    assert twin.metrics()["signal"] > 0


def test_checkpoints_do_not_have_it() -> None:
    """Loading one of an optimizer without it keeps it on, and the other way round."""
    metered, params = built("AdamW", telemetry=True)
    plain, others = built("AdamW")
    run(metered, params, [gradients(0)])
    run(plain, others, [gradients(0)])
    for one, other in ((metered, plain), (plain, metered)):
        saved = copy.deepcopy(other.state_dict())
        assert all("telemetry" not in group for group in saved["param_groups"])
        one.load_state_dict(saved)
    run(metered, params, [gradients(2)])
    run(plain, others, [gradients(2)])
    assert "lost" in metered.metrics()
    assert plain.metrics() == {}
    for p, q in zip(params, others, strict=True):
        assert_same_bits(outcome(metered, p), outcome(plain, q))


def of_unit_length(h: Any, t: Any, p: Any, g: Any) -> Any:
    return p - h.lr * g / norm(g)


class OfUnitLength(stepforge.Optimizer, rule=of_unit_length):
    """Steps of one length, whatever the gradient's."""

    lr: NonNegative = 0.1


@every_backend
def test_rules_with_reductions_of_their_own_are_measured(backend: str) -> None:
    """Their pass comes before the step. Oracle: float64, as above."""
    params = [parameter(normal(shape, torch.float32, k)) for k, shape in enumerate(SHAPES)]
    with forced(backend):
        optimizer = OfUnitLength(params, telemetry=True)
        before = [p.detach().clone() for p in params]
        run(optimizer, params, [gradients(0)])
    assert_close(optimizer.metrics(), measured(before, params, gradients(0)), 2e-7)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            p = parameter(normal((300_001,), torch.float32, 0))
            optimizer = stepforge.AdamW([p], telemetry=True)
            run(optimizer, [p], [[normal((300_001,), torch.float32, 1)]])
            found.append(optimizer.metrics())
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*found)


def test_a_compiled_step_measures() -> None:
    """Oracle: the same step that is not compiled."""
    results = []
    for is_compiled in (True, False):
        optimizer, params = built("AdamW", telemetry=True)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for number in range(2):
            for p, g in zip(params, gradients(2 * number), strict=True):
                p.grad = g
            step()
        results.append(optimizer.metrics())
    assert_same_bits(*results)
