"""A GPU: the CPU's bits, captured graphs, gradient scalers, and a host that waits for nothing.

Oracles: the reference on the CPU where numbers are the host's; the same optimizer stepped in
another way where they are the device's, whose powers need not be the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import stepforge
from stepforge.backends.triton.kernel import BLOCK
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
from tests.triton.kernels import by_kernels_only, on_host
from tests.twins import assert_params_close, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SHAPES = [(BLOCK + 257,), (7, 5), (), (0, 3)]
STEPS = 8  # RAdam's form changes at its sixth
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

    def train(place: str) -> list[dict[str, torch.Tensor]]:
        groups = [
            {
                "params": [
                    torch.nn.Parameter(values(shape, dtype, 10 * number + k).to(place))
                    for k, shape in enumerate(SHAPES)
                ],
                **group,
            }
            for number, group in enumerate(GROUPS[name])
        ]
        optimizer = OPTIMIZERS[name].ours(groups, **options)
        found = []
        for step in range(STEPS):
            for k, p in enumerate(params_of(optimizer)):
                g = gradient(kind, tuple(p.shape), dtype, 1000 * step + k).to(place)
                p.grad = None if k % 3 == 1 and step % 3 == 1 else g
            optimizer.step()
            found += outcomes(optimizer)
        if place == GPU:
            served = stepforge.explain(optimizer).served
            assert {x.backend for x in served} == {"triton"}, stepforge.explain(optimizer)
        return found

    with forced("reference"):
        wanted = train("cpu")
    for got, oracle in zip(train(GPU), wanted, strict=True):
        assert_same_bits(got, oracle)


def built(
    name: str, dtypes: Any = (torch.float32,), shapes: Any = SHAPES, **options: Any
) -> stepforge.Optimizer:
    """An optimizer of two groups on the GPU; the dtypes take turns."""
    params = [
        torch.nn.Parameter(values(shape, dtypes[k % len(dtypes)], k).to(GPU))
        for k, shape in enumerate(shapes)
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    return OPTIMIZERS[name].ours(groups, **options)


def fill_gradients(optimizer: stepforge.Optimizer, step: int, factor: float = 1.0) -> None:
    """New values in the same memory, as a captured graph needs."""
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


#: Chunks that are all whole, and that are not; one row; what is too small for codes; no elements.
BLOCKY = [(64, 256), (17, 257), (1, 4 * BLOCK + 4), (7, 5), (0, 300)]
every_format = pytest.mark.parametrize("format_", FORMATS)


@every_format
@every_optimizer
def test_a_gpu_stores_formats_as_a_cpu_does(name: str, format_: str) -> None:
    dtype, storage = FORMATS[format_]

    def train(place: str) -> list[dict[str, torch.Tensor]]:
        params = [
            torch.nn.Parameter(values(shape, dtype, k).to(place)) for k, shape in enumerate(BLOCKY)
        ]
        optimizer = OPTIMIZERS[name].ours(params, **storage)
        found = []
        for step in range(STEPS):
            for k, p in enumerate(params):
                p.grad = gradient("extreme", tuple(p.shape), dtype, 1000 * step + k).to(place)
            optimizer.step()
            found += outcomes(optimizer)
        if place == GPU:
            served = stepforge.explain(optimizer).served
            assert {x.backend for x in served} == {"triton"}, stepforge.explain(optimizer)
        return found

    with forced("reference"):
        wanted = train("cpu")
    for got, oracle in zip(train(GPU), wanted, strict=True):
        assert_same_bits(got, oracle)


@every_format
def test_keys_of_the_device_give_the_reference_s_bits(format_: str) -> None:
    dtype, storage = FORMATS[format_]
    optimizer, oracle = (capturable("Adam", (dtype,), BLOCKY, **storage) for _ in range(2))
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
def test_numbers_of_the_device_give_the_reference_s_bits(name: str) -> None:
    """Both take them from the same operations of the same device."""
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
def test_a_learning_rate_on_the_host_is_taken_to_the_device(name: str) -> None:
    optimizer = built(name, lr=torch.tensor([0.01]), capturable=True)
    oracle = capturable(name)
    for step in range(3):
        for each in (optimizer, oracle):
            fill_gradients(each, step)
            each.step()
    assert_equal(optimizer, oracle)


# Captured graphs.


def warmed_up(optimizer: stepforge.Optimizer, steps: int) -> None:
    """Steps on a stream of their own, as the documentation of CUDA graphs has it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(steps):
            fill_gradients(optimizer, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def as_it_is(optimizer: stepforge.Optimizer) -> None:
    pass


def loaded(optimizer: stepforge.Optimizer) -> None:
    """Its states are new, and in no plan."""
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.bfloat16)], ids=len)
@pytest.mark.parametrize("before", [as_it_is, loaded], ids=lambda f: f.__name__)
@every_optimizer
def test_replays_are_steps(name: str, before: Callable[..., None], dtypes: Any) -> None:
    """Also with another learning rate, and with steps outside of the graph between them.

    Oracle: the same steps without a graph.
    """
    optimizer, oracle = (capturable(name, dtypes=dtypes) for _ in range(2))
    for each in (optimizer, oracle):
        warmed_up(each, 3)
        before(each)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert_equal(optimizer, oracle, "after the capture")  # which has run nothing
    for step in range(3, 3 + STEPS):
        if step == 6:
            for each in (optimizer, oracle):
                set_lr(each, 0.5)
        if step == 9:  # only some have gradients, and what has is elsewhere
            for each in (optimizer, oracle):
                kept = [p.grad for p in params_of(each)]
                for k, p in enumerate(params_of(each)):
                    p.grad = torch.full_like(p, 0.5) if k % 2 else None
                each.step()
                for p, g in zip(params_of(each), kept, strict=True):
                    p.grad = g
        fill_gradients(optimizer, step)
        if step % 3:
            graph.replay()
        else:
            optimizer.step()
        fill_gradients(oracle, step)
        oracle.step()
        assert_equal(optimizer, oracle, f"step {step}")


@every_format
def test_replays_draw_new_random_bits(format_: str) -> None:
    """Oracle: the same steps without a graph."""
    dtype, storage = FORMATS[format_]
    optimizer, oracle = (capturable("NAdam", (dtype,), BLOCKY, **storage) for _ in range(2))
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


def test_a_graph_stays_right_while_memory_of_the_host_is_used_anew() -> None:
    """A copy from the host that a graph replays would bring what is there by then."""
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
    """Equal bits, as the scaler multiplies by powers of two; one step overflows and is skipped."""
    results = []
    for first in (False, True):
        optimizer = built(name, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=3)
        for step in range(STEPS):
            for p in params_of(optimizer):
                p.grad = None
            given = [
                values(tuple(p.shape), p.dtype, 1000 * step + k).to(GPU)
                for k, p in enumerate(params_of(optimizer))
            ]
            if step == 4:
                given[0][0] = torch.inf
            losses = [(p * g).sum() for p, g in zip(params_of(optimizer), given, strict=True)]
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
    """Within the rounding of parameters: powers of the device are not those of the host."""
    optimizers = [built(name, fused=fused, lr=0.01) for fused in (True, None)]
    for step in range(STEPS):
        for optimizer in optimizers:
            fill_gradients(optimizer, step)
            optimizer.step()
    assert_params_close(*map(params_of, optimizers), **tolerance(torch.float32, STEPS))


# A step waits for nothing.


@pytest.fixture
def unwaiting() -> Iterator[Callable[[str], None]]:
    """Sets what torch does when the host waits for the device."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"fused": True}], ids=["default", "capturable", "fused"]
)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("storage", [{}, {"state_format": "int8"}], ids=["plain", "int8"])
@every_optimizer
def test_no_step_waits_for_the_device(
    name: str,
    storage: dict[str, str],
    scaled: bool,
    options: dict[str, bool],
    unwaiting: Callable[[str], None],
) -> None:
    """Of several tables, by a kept plan and by a new one."""
    if scaled and not (options.get("fused") or options.get("capturable")):
        pytest.skip("step counts are the host's, which has to know whether to count")
    shapes = BLOCKY if storage else SHAPES
    optimizer = built(name, (torch.float32, torch.bfloat16), shapes, **options, **storage)
    fill_gradients(optimizer, 0)
    scale, nothing = torch.tensor(4.0, device=GPU), torch.tensor(0.0, device=GPU)
    for step in range(4):
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = scale, nothing
        if step == 3:
            optimizer._stepper.plan = None
        optimizer.step()
        unwaiting("error")  # from the second step on


# Several devices.


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["default", "capturable"])
@every_optimizer
def test_parameters_on_two_devices(name: str, options: dict[str, bool]) -> None:
    """Oracle: the same parameters on one."""
    results = []
    for places in (["cuda:0", "cuda:1"], ["cuda:0", "cuda:0"]):
        params = [
            torch.nn.Parameter(values((5,), torch.float32, k).to(place))
            for k, place in enumerate(places)
        ]
        optimizer = OPTIMIZERS[name].ours([{"params": [p]} for p in params], **options)
        for step in range(3):
            for k, p in enumerate(params):
                p.grad = values((5,), torch.float32, 10 * step + k).to(p.device)
            optimizer.step()
        results.append(optimizer)
    assert_equal(*results)
