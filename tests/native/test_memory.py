"""What a kernel does to memory, and does not. Oracles: the reference on the same memory; what was
there before; autograd's own complaint of what it can no longer use.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import stepforge
from stepforge.backends import native
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
from tests.native.graphs import (
    batch_of,
    by_reference,
    columns_of,
    graph_of,
    in_new_process,
    step_by_kernel,
    traced,
)

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

LARGE = native.PARALLEL_MIN + 1000  # stepped by more than one thread, if there are


def stepped(name: str, p: torch.nn.Parameter) -> stepforge.Optimizer:
    """An optimizer of one parameter that has made its first step by a kernel."""
    p.grad = torch.ones_like(p)
    optimizer = OPTIMIZERS[name].ours([p], fused=True)
    optimizer.step()
    return optimizer


def moments(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The states that have a value for every element."""
    return {k: v for k, v in optimizer.state[p].items() if v.shape == p.shape}


def named(outcomes: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The outcomes of several parameters as one, names with their numbers."""
    return {f"{k} {name}": x for k, found in enumerate(outcomes) for name, x in found.items()}


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Gives torch, and with it kernels, that many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_both(
    train: Callable[[], dict[str, torch.Tensor]], threads: int = 1
) -> list[dict[str, torch.Tensor]]:
    """What becomes of the same training by kernels on so many threads, and by the reference."""
    with forced("native"), on_threads(threads):
        by_kernels = train()
    with forced("reference"):
        return [by_kernels, train()]


# Autograd counts the writes to a tensor, and refuses to use one it has saved that has changed.


@every_optimizer
def test_autograd_refuses_a_parameter_that_was_stepped_since(name: str) -> None:
    p = parameter(torch.ones(5))
    optimizer = stepped(name, p)
    for _ in range(2):  # the second step goes by the plan of the first
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
        of_the_gradient = p.grad._version
        optimizer.step()
        assert all(x._version > version for x, version in zip(written, before, strict=True))
        assert p.grad._version == of_the_gradient
    assert idle._version == 0


# Gradients, neighbours, odd addresses.


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


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_optimizer
def test_neither_neighbours_nor_alignment_matter(name: str, stored: torch.dtype) -> None:
    """Rows of every length up to three cache lines, between guards, at every offset from a line."""
    arithmetic = torch.float64 if stored == torch.float64 else torch.float32
    graph = graph_of(name)
    sizes = list(range(192 // stored.itemsize + 2))
    space = sum(sizes) + len(sizes) + 1
    memory = {
        column: extreme((space,), stored, seed).abs()
        for seed, column in enumerate(columns_of(graph))
    }
    begins = [1 + sum(sizes[:k]) + k for k in range(len(sizes))]
    rows = [
        {column: whole[begin : begin + size] for column, whole in memory.items()}
        for begin, size in zip(begins, sizes, strict=True)
    ]
    numbers = [[1.0 if n.boolean else 0.3 for n in graph.coefficients]] * len(rows)
    wanted = {column: whole.clone() for column, whole in memory.items()}
    for result, begin, size in zip(
        by_reference(graph, rows, numbers, arithmetic), begins, sizes, strict=True
    ):
        for column, tensor in result.items():
            wanted[column][begin : begin + size] = tensor
    step_by_kernel(batch_of(graph, rows, numbers, arithmetic))
    assert_same_bits(memory, wanted)


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("others", [0, 1])
def test_a_kernel_steps_whatever_the_layout_of_the_gradient(layout: str, others: int) -> None:
    """Through buffers if it must; also when no other parameter of the step is dense."""
    graph = traced(lambda p, g: p - 0.1 * g)
    rows = [
        {"p": normal((4, 3, 5), torch.float32, k), "g": normal((4, 3, 5), torch.float32, 9 + k)}
        for k in range(1 + others)
    ]
    given: list[list[float]] = [[]] * len(rows)
    rows[0]["g"] = GRADIENT_LAYOUTS[layout](rows[0]["g"])
    wanted = by_reference(graph, rows, given, torch.float32)
    step_by_kernel(batch_of(graph, rows, given, torch.float32))
    for row, oracle in zip(rows, wanted, strict=True):
        assert_same_bits({"p": row["p"]}, oracle)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_no_multiple_of_an_element(offset: int) -> None:
    """As in a file that is read without copying; torch takes them."""

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


# Memory that is shared.


View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sharing:
    """Parameters that are views of one memory, and their gradients: views of it, or their own."""

    parameters: Sequence[View]
    gradients: Sequence[View] | None = None

    def rows(
        self, memory: torch.Tensor
    ) -> tuple[list[torch.nn.Parameter], list[torch.Tensor | None]]:
        parameters = [torch.nn.Parameter(view(memory)) for view in self.parameters]
        if self.gradients is not None:
            return parameters, [view(memory) for view in self.gradients]
        return parameters, [normal(p.shape, p.dtype, 1 + k) for k, p in enumerate(parameters)]


def from_(begin: int) -> View:
    """All but 200 elements, from a position on."""
    return lambda memory: memory[begin : len(memory) - 200 + begin]


def half(number: int) -> View:
    return lambda memory: memory.view(2, -1)[number]


def few(memory: torch.Tensor) -> torch.Tensor:
    return memory[500:517]


def every_other(memory: torch.Tensor) -> torch.Tensor:
    return memory[::2]


def square(memory: torch.Tensor) -> torch.Tensor:
    return memory[:900].view(30, 30)


def turned_square(memory: torch.Tensor) -> torch.Tensor:
    return square(memory).t()


SHARING = {
    "a gradient that is the parameter": Sharing([from_(0)], [from_(0)]),
    **{
        f"a gradient {shift} elements after the parameter": Sharing(
            [from_(100)], [from_(100 + shift)]
        )
        for shift in (-64, -16, -3, -1, 1, 3, 16, 64)
    },
    "a gradient that is the parameter turned": Sharing([square], [turned_square]),
    "gradients that are each other's parameter": Sharing([half(0), half(1)], [half(1), half(0)]),
    "one gradient for two parameters": Sharing([half(0), half(0)], [half(1), half(1)]),
    "parameters side by side": Sharing([half(0), half(1)]),
    "two parameters that are one": Sharing([from_(0), from_(0)]),
    "two parameters that overlap": Sharing([from_(0), from_(77)]),
    "two parameters that overlap the other way": Sharing([from_(77), from_(0)]),
    "a parameter in another": Sharing([from_(0), few]),
    "a parameter around another": Sharing([few, from_(0)]),
    "a parameter with gaps over one without": Sharing([every_other, from_(0)]),
    "a parameter without gaps over one with": Sharing([from_(0), every_other]),
    "two parameters with gaps": Sharing([every_other, every_other]),
    "a square and the same turned": Sharing([square, turned_square]),
}


@pytest.mark.parametrize(("size", "threads"), [(1200, 1), (LARGE, 2)])
@pytest.mark.parametrize("sharing", SHARING)
def test_shared_memory_is_stepped_as_the_reference_does(
    sharing: str, size: int, threads: int
) -> None:
    """One parameter after the other, each element read before any of its parameter is written."""

    def train() -> dict[str, torch.Tensor]:
        memory = normal((size,), torch.float32, 0)
        parameters, gradients = SHARING[sharing].rows(memory)
        optimizer = stepforge.Adam(parameters, lr=0.1, weight_decay=0.1)
        run(optimizer, parameters, [gradients] * 3)
        return {"memory": memory} | named([outcome(optimizer, p) for p in parameters])

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
        return named([outcome(optimizer, p) for p in parameters])

    assert_same_bits(*by_both(train))


# Memory that is not there.


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


def freed(x: torch.Tensor) -> None:
    """Takes a tensor's memory away, as sharding does with parameters between their uses."""
    x.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    ("what", "steps_before"),
    [("p", 0), ("p", 2), ("gradient", 0), ("gradient", 2), ("exp_avg", 2)],
)
def test_null_pointers_are_refused_and_nothing_is_written(what: str, steps_before: int) -> None:
    """Also in the last of several launches: the ones before it do not run either."""
    whole, broken = (parameter(normal((50,), torch.float32, seed)) for seed in range(2))
    groups = [{"params": [whole]}, {"params": [broken], "amsgrad": True}]
    optimizer = stepforge.Adam(groups, fused=True)
    gradients = [normal((50,), torch.float32, 2 + seed) for seed in range(2)]
    run(optimizer, [whole, broken], [gradients] * steps_before)
    whole.grad, broken.grad = gradients
    before = {key: contiguous(x) for key, x in outcome(optimizer, whole).items()}
    tensors = outcome(optimizer, broken) | {"gradient": gradients[1]}
    tensors[what].untyped_storage().resize_(0)  # as sharding does between uses
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    after = outcome(optimizer, whole)
    assert_same_bits({key: after[key] for key in before}, before)
    assert {float(optimizer.state[p].get("step", 0)) for p in (whole, broken)} == {steps_before}


# Memory that is taken for a while.

MEGABYTES = 100


def peak_mb() -> float:
    """The most memory that this process has had so far; ru_maxrss begins with its parent's."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def print_growth(layout: str) -> None:
    """Prints what the second step takes beyond all there is before it, and what a copy takes."""
    rows, columns = 2**18 // 1000 * MEGABYTES, 1000  # of 4 bytes each
    p = torch.nn.Parameter(torch.ones(rows, columns))
    p.grad = torch.ones(columns, rows).t() if layout == "turned" else torch.ones(rows, columns)
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
@pytest.mark.parametrize("layout", ["dense", "turned"])
def test_a_step_takes_no_memory_like_a_parameter_s(layout: str) -> None:
    """Bound: an eighth of the parameter.

    A copy afterwards must raise the peak by all of its size, or nearly: the measure measures, and
    nothing, the first step included, had stood that high before.
    """
    growth, copy = map(float, in_new_process(print_growth, layout).split())
    assert copy > MEGABYTES * 7 / 8
    assert growth < MEGABYTES / 8
