"""Memory that a kernel reads and writes. Oracles: the reference on the same memory; the memory
before the step; autograd's error about saved tensors that have changed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import stepforge
from stepforge.backends import native
from stepforge.backends.spec import arithmetic_of
from tests.backends.graphs import (
    batch_of,
    by_reference,
    columns_of,
    graph_of,
    in_new_process,
    step_by_kernel,
    traced,
)
from tests.backends.sharing import SHARING, numbered
from tests.conformance.table import (
    GRADIENT_LAYOUTS,
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
)

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

LARGE = native.PARALLEL_MIN + 1000  # enough elements for more than one thread


def stepped(name: str, p: torch.nn.Parameter) -> stepforge.Optimizer:
    """Return an optimizer of one parameter after its first step, by a kernel."""
    p.grad = torch.ones_like(p)
    optimizer = OPTIMIZERS[name].ours([p], fused=True)
    optimizer.step()
    return optimizer


def moments(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the states with a value for every element."""
    return {k: v for k, v in optimizer.state[p].items() if v.shape == p.shape}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch and kernels inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_both(
    train: Callable[[], dict[str, torch.Tensor]], threads: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Return the results of a training by kernels, on that many threads, and by the reference."""
    with forced("native"), on_threads(threads):
        by_kernels = train()
    with forced("reference"):
        return [by_kernels, train()]


# Autograd counts the writes to a tensor, and refuses a saved tensor that has changed.


@every_optimizer
def test_autograd_refuses_a_parameter_that_was_stepped_since(name: str) -> None:
    p = parameter(torch.ones(5))
    optimizer = stepped(name, p)
    for _ in range(2):  # the second step uses the plan of the first
        loss = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_optimizer
def test_autograd_refuses_a_state_that_was_stepped_since(name: str) -> None:
    p = parameter(torch.ones(5))
    optimizer = stepped(name, p)
    for key, state in moments(optimizer, p).items():
        x = torch.ones(5, requires_grad=True)
        loss = (x * state).sum()
        optimizer.step()
        assert optimizer.state[p][key] is state
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_optimizer
def test_every_step_counts_as_a_write_to_all_it_writes_and_nothing_else(name: str) -> None:
    p, idle = parameter(torch.ones(5)), parameter(torch.ones(5))
    optimizer = stepped(name, p)
    optimizer.add_param_group({"params": [idle]})
    for _ in range(3):
        written = [p, *moments(optimizer, p).values()]
        before = [x._version for x in written]
        assert p.grad is not None
        gradient_version = p.grad._version
        optimizer.step()
        assert all(x._version > version for x, version in zip(written, before, strict=True))
        assert p.grad._version == gradient_version
    assert idle._version == 0


# Gradients, neighboring memory, odd addresses.


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_is_read_only(variant: str) -> None:
    name, options = VARIANTS[variant]
    p = parameter(normal((999,), torch.float32, 0))
    g = extreme((999,), torch.float32, 1)
    g[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    before = g.view(torch.int32).clone()
    optimizer = OPTIMIZERS[name].ours([p], fused=True, **options)
    run(optimizer, [p], [[g]] * 3)
    assert torch.equal(g.view(torch.int32), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_optimizer
def test_neither_neighbours_nor_alignment_matter(name: str, dtype: torch.dtype) -> None:
    """Every size up to three cache lines, between guard values, at every offset from a line."""
    arithmetic = arithmetic_of(dtype)
    graph = graph_of(name)
    sizes = list(range(192 // dtype.itemsize + 2))
    space = sum(sizes) + len(sizes) + 1
    memory = {
        column: extreme((space,), dtype, seed).abs()
        for seed, column in enumerate(columns_of(graph))
    }
    begins = [1 + sum(sizes[:k]) + k for k in range(len(sizes))]
    params = [
        {column: whole[begin : begin + size] for column, whole in memory.items()}
        for begin, size in zip(begins, sizes, strict=True)
    ]
    coefficients = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]] * len(params)
    wanted = {column: whole.clone() for column, whole in memory.items()}
    for result, begin, size in zip(
        by_reference(graph, params, coefficients, arithmetic), begins, sizes, strict=True
    ):
        for column, tensor in result.items():
            wanted[column][begin : begin + size] = tensor
    step_by_kernel(batch_of(graph, params, coefficients, arithmetic))
    assert_same_bits(memory, wanted)


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("others", [0, 1])
def test_a_kernel_steps_whatever_the_layout_of_the_gradient(layout: str, others: int) -> None:
    """Through buffers if needed; also if no other parameter of the step is dense."""
    graph = traced(lambda p, g: p - 0.1 * g)
    params = [
        {"p": normal((4, 3, 5), torch.float32, k), "g": normal((4, 3, 5), torch.float32, 9 + k)}
        for k in range(1 + others)
    ]
    coefficients: list[list[float]] = [[]] * len(params)
    params[0]["g"] = GRADIENT_LAYOUTS[layout](params[0]["g"])
    wanted = by_reference(graph, params, coefficients, torch.float32)
    step_by_kernel(batch_of(graph, params, coefficients, torch.float32))
    for param, oracle in zip(params, wanted, strict=True):
        assert_same_bits({"p": param["p"]}, oracle)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_an_address_that_is_no_multiple_of_the_element_size(offset: int) -> None:
    """As in a memory-mapped file; torch accepts such addresses."""

    def values(seed: int) -> torch.Tensor:
        memory = bytearray(4 * 1000 + offset)
        x = torch.frombuffer(memory, dtype=torch.float32, offset=offset)
        assert x.data_ptr() % 4
        return x.copy_(normal((1000,), torch.float32, seed))

    def train() -> dict[str, torch.Tensor]:
        p = torch.nn.Parameter(values(0))
        optimizer = stepforge.Adam([p])
        run(optimizer, [p], [[values(1)], [values(2)]])
        return outcome(optimizer, p)

    assert_same_bits(*by_both(train))


# Shared memory.


@pytest.mark.parametrize(("size", "threads"), [(1200, 1), (LARGE, 2)])
@pytest.mark.parametrize("sharing", SHARING)
def test_shared_memory_is_stepped_as_the_reference_does(
    sharing: str, size: int, threads: int
) -> None:
    """One parameter after the other; all of a parameter is read before any of it is written."""
    train = functools.partial(SHARING[sharing].train, size)
    assert_same_bits(*by_both(train, threads))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_gradient_that_is_a_state(key: str) -> None:
    def train() -> dict[str, torch.Tensor]:
        p = parameter(normal((1000,), torch.float32, 0))
        optimizer = stepforge.Adam([p], lr=0.1)
        run(optimizer, [p], [[normal((1000,), torch.float32, 1)]])
        for _ in range(3):
            run(optimizer, [p], [[optimizer.state[p][key]]])
        return outcome(optimizer, p)

    assert_same_bits(*by_both(train))


def test_states_that_share_memory() -> None:
    def train() -> dict[str, torch.Tensor]:
        parameters = [parameter(normal((1000,), torch.float32, seed)) for seed in range(2)]
        steps = [[normal((1000,), torch.float32, 10 * s + k) for k in range(2)] for s in range(3)]
        optimizer = stepforge.Adam(parameters, lr=0.1)
        run(optimizer, parameters, steps[:1])
        first, second = (optimizer.state[p] for p in parameters)
        second["exp_avg"] = first["exp_avg"]
        run(optimizer, parameters, steps[1:])
        return numbered([outcome(optimizer, p) for p in parameters])

    assert_same_bits(*by_both(train))


# Tensors without memory.


@pytest.mark.parametrize("elsewhere", ["meta", "fake"])
def test_tensors_without_memory_are_refused(elsewhere: str) -> None:
    mode = FakeTensorMode() if elsewhere == "fake" else torch.device("meta")
    with mode:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"fused=True cannot serve .*(meta devices|memory)"):
            stepforge.Adam([p], fused=True).step()
        optimizer = stepforge.Adam([p])
        assert stepforge.explain(optimizer).served[0].backend == "foreach"
        optimizer.step()


@pytest.mark.parametrize(
    ("freed", "steps_before"),
    [("p", 0), ("p", 2), ("gradient", 0), ("gradient", 2), ("exp_avg", 2)],
)
def test_null_pointers_are_refused_and_nothing_is_written(freed: str, steps_before: int) -> None:
    """Also in the last of several launches: none of the others runs either."""
    whole, broken = (parameter(normal((50,), torch.float32, seed)) for seed in range(2))
    groups = [{"params": [whole]}, {"params": [broken], "amsgrad": True}]
    optimizer = stepforge.Adam(groups, fused=True)
    gradients = [normal((50,), torch.float32, 2 + seed) for seed in range(2)]
    run(optimizer, [whole, broken], [gradients] * steps_before)
    whole.grad, broken.grad = gradients
    before = {key: contiguous(x) for key, x in outcome(optimizer, whole).items()}
    tensors = outcome(optimizer, broken) | {"gradient": gradients[1]}
    tensors[freed].untyped_storage().resize_(0)  # as sharding does between uses
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    after = outcome(optimizer, whole)
    assert_same_bits({key: after[key] for key in before}, before)
    assert {float(optimizer.state[p].get("step", 0)) for p in (whole, broken)} == {steps_before}


# Temporary memory.

MEGABYTES = 100


def peak_mb() -> float:
    """Return the peak memory of this process so far; ru_maxrss would start at its parent's."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def print_growth(layout: str) -> None:
    """Print the growth of the peak by a second step, and then by a copy of the parameter."""
    rows, columns = 2**18 // 1000 * MEGABYTES, 1000  # of 4 bytes per element
    p = torch.nn.Parameter(torch.ones(rows, columns))
    transposed = layout == "transposed"
    p.grad = torch.ones(columns, rows).t() if transposed else torch.ones(rows, columns)
    optimizer = stepforge.Adam([p], fused=True)
    optimizer.step()
    peaks = [peak_mb()]
    optimizer.step()
    peaks.append(peak_mb())
    copy = p.detach().clone()
    peaks.append(peak_mb())
    print(peaks[1] - peaks[0], peaks[2] - peaks[1])
    assert len(copy) == rows


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_a_step_needs_no_temporary_as_large_as_a_parameter(layout: str) -> None:
    """Bound: an eighth of the parameter.

    A copy afterwards must raise the peak by nearly all of its size. This proves that the measure
    works, and that nothing before, the first step included, has reached that peak.
    """
    growth, copy = map(float, in_new_process(print_growth, layout).split())
    assert copy > MEGABYTES * 7 / 8
    assert growth < MEGABYTES / 8
