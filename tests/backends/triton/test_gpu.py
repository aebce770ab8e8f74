"""Steps on a GPU: the CPU's bits, captured graphs, gradient scalers, and no synchronization.

Oracles: the reference on the CPU if scalars are on the host; the same optimizer stepped in another
way if they are on the device, where pow need not round as on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.triton.kernel import BLOCK
from tests.backends.triton.kernels import by_kernels_only, on_host
from tests.conformance.table import (
    DTYPES,
    FORMATS,
    OPTIMIZERS,
    VARIANTS,
    assert_same_bits,
    forced,
    outcome,
)
from tests.conformance.test_backends_agree import GROUPS, gradient
from tests.twins import assert_params_close, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = [(BLOCK + 257,), (7, 5), (), (0, 3)]
STEPS = 8  # RAdam changes its form at the sixth
GPU = "cuda"


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return gradient("normal", shape, dtype, seed)


def params_of(optimizer: stepforge.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def outcomes(optimizer: stepforge.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [on_host(outcome(optimizer, p)) for p in params_of(optimizer)]


def assert_equal(one: stepforge.Optimizer, other: stepforge.Optimizer, where: str = "") -> None:
    for index, pair in enumerate(zip(outcomes(one), outcomes(other), strict=True)):
        assert_same_bits(*pair, f"{where} parameter {index}:")


# The same bits as on a CPU.


@pytest.mark.parametrize("kind", ["normal", "extreme"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gpu_stores_the_bits_of_a_cpu(variant: str, dtype: torch.dtype, kind: str) -> None:
    name, options = VARIANTS[variant]

    def train(device: str) -> list[dict[str, torch.Tensor]]:
        groups = [
            {
                "params": [
                    torch.nn.Parameter(values(shape, dtype, 10 * index + k).to(device))
                    for k, shape in enumerate(SHAPES)
                ],
                **group,
            }
            for index, group in enumerate(GROUPS[name])
        ]
        optimizer = OPTIMIZERS[name].ours(groups, **options)
        found = []
        for step in range(STEPS):
            for k, p in enumerate(params_of(optimizer)):
                g = gradient(kind, tuple(p.shape), dtype, 1000 * step + k).to(device)
                p.grad = None if k % 3 == 1 and step % 3 == 1 else g
            optimizer.step()
            found += outcomes(optimizer)
        assert_served_by_triton(optimizer, device)
        return found

    assert_gpu_agrees_with_reference(train)


def assert_served_by_triton(optimizer: stepforge.Optimizer, device: str) -> None:
    """Fail if another backend steps parameters on the GPU."""
    if device == GPU:
        explanation = stepforge.explain(optimizer)
        assert {x.backend for x in explanation.served} == {"triton"}, explanation


def assert_gpu_agrees_with_reference(
    train: Callable[[str], list[dict[str, torch.Tensor]]],
) -> None:
    """Compare a training on the GPU with the same training by the reference on the CPU."""
    with forced("reference"):
        wanted = train("cpu")
    for got, oracle in zip(train(GPU), wanted, strict=True):
        assert_same_bits(got, oracle)


def built(
    name: str, dtypes: Any = (torch.float32,), shapes: Any = SHAPES, **options: Any
) -> stepforge.Optimizer:
    """Return an optimizer of two groups on the GPU, with alternating dtypes."""
    params = [
        torch.nn.Parameter(values(shape, dtypes[k % len(dtypes)], k).to(GPU))
        for k, shape in enumerate(shapes)
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    return OPTIMIZERS[name].ours(groups, **options)


def fill_gradients(optimizer: stepforge.Optimizer, step: int, factor: float = 1.0) -> None:
    """Write new gradients into the same memory, as a captured graph needs."""
    for k, p in enumerate(params_of(optimizer)):
        g = (values(tuple(p.shape), p.dtype, 1000 * step + k) * factor).to(GPU)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def capturable(
    name: str, dtypes: Any = (torch.float32,), shapes: Any = SHAPES, **options: Any
) -> stepforge.Optimizer:
    lr = torch.tensor(0.01, device=GPU)
    return built(name, dtypes, shapes, lr=lr, capturable=True, **options)


#: Whole chunks only; partial chunks; a single row; too small for int8; no elements.
FORMAT_SHAPES = [(64, 256), (17, 257), (1, 4 * BLOCK + 4), (7, 5), (0, 300)]
every_format = pytest.mark.parametrize("format_", FORMATS)


@every_format
@every_optimizer
def test_a_gpu_stores_formats_as_a_cpu_does(name: str, format_: str) -> None:
    dtype, options = FORMATS[format_]

    def train(device: str) -> list[dict[str, torch.Tensor]]:
        params = [
            torch.nn.Parameter(values(shape, dtype, k).to(device))
            for k, shape in enumerate(FORMAT_SHAPES)
        ]
        optimizer = OPTIMIZERS[name].ours(params, **options)
        found = []
        for step in range(STEPS):
            for k, p in enumerate(params):
                p.grad = gradient("extreme", tuple(p.shape), dtype, 1000 * step + k).to(device)
            optimizer.step()
            found += outcomes(optimizer)
        assert_served_by_triton(optimizer, device)
        return found

    assert_gpu_agrees_with_reference(train)


@every_format
@every_optimizer
def test_a_gpu_finds_the_metrics_of_a_cpu(name: str, format_: str) -> None:
    """Also of NaN and infinities, clipped and with a step that is skipped."""
    dtype, options = FORMATS[format_]

    def train(device: str) -> list[dict[str, torch.Tensor]]:
        params = [
            torch.nn.Parameter(values(shape, dtype, k).to(device))
            for k, shape in enumerate(FORMAT_SHAPES)
        ]
        measured = OPTIMIZERS[name].ours(params, telemetry=True, **options)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        control = {"max_grad_norm": 1.0, "skip_nonfinite": True}
        controlled = OPTIMIZERS[name].ours(others, telemetry=True, **control, **options)
        found = []
        for step, kind in enumerate(("normal", "normal", "extreme")):
            for optimizer in (measured, controlled):
                for k, p in enumerate(params_of(optimizer)):
                    g = gradient(kind, tuple(p.shape), dtype, 1000 * step + k)
                    p.grad = g.to(device)
                optimizer.step()
                found += map(on_host, [optimizer.metrics(), *optimizer.metrics("group")])
                found += map(on_host, optimizer.metrics("parameter").values())
        assert_served_by_triton(measured, device)
        return found

    assert_gpu_agrees_with_reference(train)


@every_format
def test_seeds_on_the_device_give_the_reference_s_bits(format_: str) -> None:
    dtype, storage = FORMATS[format_]
    optimizer, oracle = (capturable("Adam", (dtype,), FORMAT_SHAPES, **storage) for _ in range(2))
    for step in range(3):
        fill_gradients(optimizer, step)
        with by_kernels_only():
            optimizer.step()
        fill_gradients(oracle, step)
        with forced("reference"):
            oracle.step()
        assert_equal(optimizer, oracle, f"step {step}")


def set_lr(optimizer: stepforge.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


@every_optimizer
def test_device_scalars_give_the_reference_s_bits(name: str) -> None:
    """Both compute coefficients by the same operations on the same device."""
    dtypes = (torch.float32, torch.bfloat16)
    optimizer, oracle = (capturable(name, dtypes=dtypes) for _ in range(2))
    for step in range(STEPS):
        fill_gradients(optimizer, step)
        with by_kernels_only():
            optimizer.step()
        fill_gradients(oracle, step)
        with forced("reference"):
            oracle.step()
        assert_equal(optimizer, oracle, f"step {step}")


@every_optimizer
def test_a_learning_rate_on_the_host_is_copied_to_the_device(name: str) -> None:
    optimizer = built(name, lr=torch.tensor([0.01]), capturable=True)
    oracle = capturable(name)
    for step in range(3):
        for each in (optimizer, oracle):
            fill_gradients(each, step)
            each.step()
    assert_equal(optimizer, oracle)


# Captured graphs.


def warmed_up(optimizer: stepforge.Optimizer, steps: int) -> None:
    """Step on a side stream, as the documentation of CUDA graphs asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(steps):
            fill_gradients(optimizer, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def unchanged(optimizer: stepforge.Optimizer) -> None:
    pass


def loaded(optimizer: stepforge.Optimizer) -> None:
    """Replace all states, so that no plan has them."""
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=len)
@pytest.mark.parametrize("before", [unchanged, loaded], ids=lambda f: f.__name__)
@every_optimizer
def test_replays_are_steps(name: str, before: Callable[..., None], dtypes: Any) -> None:
    """Also after a change of the learning rate, and with steps outside the graph in between.

    Oracle: the same steps without a graph.
    """
    optimizer, oracle = (capturable(name, dtypes=dtypes) for _ in range(2))
    for each in (optimizer, oracle):
        warmed_up(each, 3)
        before(each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert_equal(optimizer, oracle, "after the capture")  # a capture runs nothing
    for step in range(3, 3 + STEPS):
        if step == 6:
            for each in (optimizer, oracle):
                set_lr(each, 0.5)
        if step == 9:  # only some parameters have gradients, at other addresses
            for each in (optimizer, oracle):
                gradients = [p.grad for p in params_of(each)]
                for k, p in enumerate(params_of(each)):
                    p.grad = torch.full_like(p, 0.5) if k % 2 else None
                each.step()
                for p, g in zip(params_of(each), gradients, strict=True):
                    p.grad = g
        fill_gradients(optimizer, step)
        if step % 3:
            graph.replay()
        else:
            optimizer.step()
        fill_gradients(oracle, step)
        oracle.step()
        assert_equal(optimizer, oracle, f"step {step}")


@pytest.mark.parametrize("control", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=len)
@every_optimizer
def test_replays_are_measured(name: str, control: dict[str, Any]) -> None:
    """Oracle: the same steps without a graph."""
    optimizer, oracle = (capturable(name, telemetry=True, **control) for _ in range(2))
    for each in (optimizer, oracle):
        warmed_up(each, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 6):
        fill_gradients(optimizer, step)
        graph.replay()
        fill_gradients(oracle, step)
        oracle.step()
        assert_same_bits(on_host(optimizer.metrics()), on_host(oracle.metrics()), f"step {step}")


@every_format
def test_replays_draw_new_random_bits(format_: str) -> None:
    """Oracle: the same steps without a graph."""
    dtype, storage = FORMATS[format_]
    optimizer, oracle = (capturable("NAdam", (dtype,), FORMAT_SHAPES, **storage) for _ in range(2))
    for each in (optimizer, oracle):
        warmed_up(each, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 6):
        fill_gradients(optimizer, step)
        graph.replay()
        fill_gradients(oracle, step)
        oracle.step()
        assert_equal(optimizer, oracle, f"step {step}")


def test_a_graph_stays_right_when_host_memory_is_reused() -> None:
    """A replayed copy from host memory would read its new content."""
    optimizer, oracle = (capturable("NAdam") for _ in range(2))
    for each in (optimizer, oracle):
        warmed_up(each, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    litter = [torch.full((2**k,), 7.0).pin_memory().to(GPU) for k in range(16)]
    for step in range(2, 5):
        fill_gradients(optimizer, step)
        graph.replay()
        fill_gradients(oracle, step)
        oracle.step()
    assert_equal(optimizer, oracle)
    assert len(litter) == 16


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_without_capturable_is_refused() -> None:
    optimizer = built("Adam")
    warmed_up(optimizer, 2)
    before = outcomes(optimizer)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(graph):
        optimizer.step()
    for got, oracle in zip(outcomes(optimizer), before, strict=True):
        assert_same_bits(got, oracle)


# Gradient scalers.


@every_optimizer
def test_unscaling_in_the_step_is_as_exact_as_before_it(name: str) -> None:
    """Equal bits, because the scaler multiplies by powers of two. One step overflows."""
    results = []
    for first in (False, True):
        optimizer = built(name, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=3)
        for step in range(STEPS):
            for p in params_of(optimizer):
                p.grad = None
            params = params_of(optimizer)
            gradients = [
                values(tuple(p.shape), p.dtype, 1000 * step + k).to(GPU)
                for k, p in enumerate(params)
            ]
            if step == 4:
                gradients[0][0] = torch.inf
            losses = [(p * g).sum() for p, g in zip(params, gradients, strict=True)]
            scaler.scale(sum(losses, torch.zeros((), device=GPU))).backward()
            if first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert {float(optimizer.state[p]["step"]) for p in params_of(optimizer)} == {STEPS - 1.0}
        results.append(optimizer)
    assert_equal(*results)


@every_optimizer
def test_a_fused_step_is_near_the_default_one(name: str) -> None:
    """Within the rounding of parameters, because pow rounds differently on device and host."""
    optimizers = [built(name, fused=fused, lr=0.01) for fused in (True, None)]
    for step in range(STEPS):
        for optimizer in optimizers:
            fill_gradients(optimizer, step)
            optimizer.step()
    assert_params_close(*map(params_of, optimizers), **tolerance(torch.float32, STEPS))


# No step synchronizes.


@pytest.fixture
def set_sync_debug_mode() -> Iterator[Callable[[str], None]]:
    """A function that sets torch's reaction to synchronization."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capturable": True},
        {"fused": True},
        {"capturable": True, "telemetry": True},
        {"capturable": True, "telemetry": True, "max_grad_norm": 1.0, "skip_nonfinite": True},
    ],
    ids=["default", "capturable", "fused", "measured", "controlled"],
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("storage", [{}, {"state_format": "int8"}], ids=["plain", "int8"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@every_optimizer
def test_no_step_synchronizes_the_device(
    name: str,
    storage: dict[str, str],
    scaled: bool,
    options: dict[str, Any],
    set_sync_debug_mode: Callable[[str], None],
) -> None:
    """With several tables, by a kept plan and by a new one."""
    if scaled and not (options.get("fused") or options.get("capturable")):
        pytest.skip("step counts on the host need to know if a step was skipped")
    shapes = FORMAT_SHAPES if storage else SHAPES
    optimizer = built(name, (torch.float32, torch.bfloat16), shapes, **options, **storage)
    fill_gradients(optimizer, 0)
    scale, zero = torch.tensor(4.0, device=GPU), torch.tensor(0.0, device=GPU)
    for step in range(4):
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = scale, zero
        if step == 3:
            optimizer._stepper.plans.clear()
        optimizer.step()
        set_sync_debug_mode("error")  # from the second step on
        optimizer.metrics()
        optimizer.metrics(by="parameter")


# Several devices.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["default", "capturable"])
@every_optimizer
def test_parameters_on_two_devices(name: str, options: dict[str, bool]) -> None:
    """Oracle: the same parameters on one."""
    results = []
    for devices in (["cuda:0", "cuda:1"], ["cuda:0", "cuda:0"]):
        params = [
            torch.nn.Parameter(values((5,), torch.float32, k).to(device))
            for k, device in enumerate(devices)
        ]
        optimizer = OPTIMIZERS[name].ours([{"params": [p]} for p in params], **options)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = values((5,), torch.float32, 10 * step + k).to(p.device)
            optimizer.step()
        results.append(optimizer)
    assert_equal(*results)
