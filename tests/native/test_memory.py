"""What a kernel does to memory, and does not. Oracles: the reference on the same memory; what was
there before; autograd's own complaint of what it can no longer use.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses import FakeTensorMode

import stepforge
from stepforge.backends import native
from stepforge.backends.native.source import columns_of
from tests.conformance.table import (
    OPTIMIZERS,
    VARIANTS,
    Gradients,
    assert_same_bits,
    bits,
    contiguous,
    extreme,
    forced,
    normal,
    outcome,
    parameter,
    run,
    transposed,
)
from tests.native.graphs import by_reference, graph_of, in_new_process, kernel_of, launch

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

LARGE = native.SERIAL + 1000  # stepped by more than one thread, if there are


def stepped(name: str, p: torch.nn.Parameter) -> stepforge.Optimizer:
    """An optimizer of one parameter that has made its first step by a kernel."""
    p.grad = torch.ones_like(p)
    optimizer = OPTIMIZERS[name].ours([p], fused=True)
    optimizer.step()
    return optimizer


def moments(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The states that have a value for every element."""
    return {k: v for k, v in optimizer.state[p].items() if v.shape == p.shape}


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
    launch(kernel_of(graph, rows[0], arithmetic), rows, numbers)
    assert_same_bits(memory, wanted)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_addresses_that_are_no_multiple_of_an_element(offset: int) -> None:
    """As in a file that is read without copying; torch takes them."""

    def values(seed: int) -> torch.Tensor:
        memory = bytearray(4 * 1000 + offset)
        x = torch.frombuffer(memory, dtype=torch.float32, offset=offset)
        assert x.data_ptr() % 4
        return x.copy_(normal((1000,), torch.float32, seed))

    found = []
    for backend in ("native", "reference"):
        p = torch.nn.Parameter(values(0))
        with forced(backend):
            optimizer = stepforge.Adam([p])
            run(optimizer, [p], [[values(1)], [values(2)]])
        found.append(outcome(optimizer, p))
    assert_same_bits(*found)


# Memory that is shared.


@dataclass(frozen=True)
class Shared:
    """Parameters and gradients in one memory."""

    memory: torch.Tensor
    parameters: Sequence[torch.nn.Parameter]
    gradients: Gradients


def of_views(*parts: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int], Shared]:
    """Parameters, then their gradients, each a view of one memory."""

    def build(size: int) -> Shared:
        memory = normal((size + 200,), torch.float32, 0)
        views = [part(memory) for part in parts]
        half = len(views) // 2
        return Shared(memory, [*map(torch.nn.Parameter, views[:half])], views[half:])

    return build


def of_parameters(*parts: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int], Shared]:
    """Parameters that are views of one memory, with gradients of their own."""

    def build(size: int) -> Shared:
        memory = normal((size + 200,), torch.float32, 0)
        parameters = [torch.nn.Parameter(part(memory)) for part in parts]
        gradients = [normal(tuple(p.shape), torch.float32, 1 + k) for k, p in enumerate(parameters)]
        return Shared(memory, parameters, gradients)

    return build


def from_(begin: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """All but 200 elements, from a position on."""
    return lambda memory: memory[begin : len(memory) - 200 + begin]


def half(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda memory: memory[: len(memory) // 2 * 2].view(2, -1)[number]


def every_other(memory: torch.Tensor) -> torch.Tensor:
    return memory[::2]


def turned(memory: torch.Tensor) -> torch.Tensor:
    return memory[: len(memory) // 10 * 10].view(10, -1).t()


def straight(memory: torch.Tensor) -> torch.Tensor:
    return memory[: len(memory) // 10 * 10].view(-1, 10)


SHARING: dict[str, Callable[[int], Shared]] = {
    "a gradient that is the parameter": of_views(from_(0), from_(0)),
    **{
        f"a gradient {abs(shift)} {'before' if shift < 0 else 'after'} the parameter": of_views(
            from_(100), from_(100 + shift)
        )
        for shift in (-64, -16, -3, -1, 1, 3, 16, 64)
    },
    "gradients that are each other's parameter": of_views(half(0), half(1), half(1), half(0)),
    "one gradient for two parameters": of_views(half(0), half(0), half(1), half(1)),
    "two parameters that are one": of_parameters(from_(0), from_(0)),
    "two parameters that overlap": of_parameters(from_(0), from_(77)),
    "two parameters that overlap the other way": of_parameters(from_(77), from_(0)),
    "a parameter in another": of_parameters(from_(0), lambda memory: memory[500:517]),
    "a parameter around another": of_parameters(lambda memory: memory[500:517], from_(0)),
    "a parameter with gaps over one without": of_parameters(every_other, from_(0)),
    "a parameter without gaps over one with": of_parameters(from_(0), every_other),
    "two parameters with gaps": of_parameters(every_other, every_other),
    "a gradient that is the parameter turned": of_views(straight, lambda m: turned(m).view(-1, 10))
    if False
    else of_views(
        lambda m: m[:900].view(30, 30),
        lambda m: m[:900].view(30, 30).t(),
    ),
    "parameters side by side": of_parameters(half(0), half(1)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize("sharing", SHARING)
def test_shared_memory_is_stepped_as_the_reference_does(
    sharing: str, size: int, threads: int
) -> None:
    """One parameter after the other, each element read before any of its parameter is written."""
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for backend in ("native", "reference"):
            shared = SHARING[sharing](size)
            with forced(backend):
                optimizer = stepforge.Adam(shared.parameters, lr=0.1, weight_decay=0.1)
                run(optimizer, shared.parameters, [shared.gradients] * 3)
            ends = {"memory": shared.memory}
            for number, p in enumerate(shared.parameters):
                ends |= {f"{number} {key}": x for key, x in outcome(optimizer, p).items()}
            found.append(ends)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*found)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_a_gradient_that_is_a_state(key: str) -> None:
    found = []
    for backend in ("native", "reference"):
        p = parameter(normal((1000,), torch.float32, 0))
        with forced(backend):
            optimizer = stepforge.Adam([p], lr=0.1)
            run(optimizer, [p], [[normal((1000,), torch.float32, 1)]])
            for _ in range(3):
                run(optimizer, [p], [[optimizer.state[p][key]]])
        found.append(outcome(optimizer, p))
    assert_same_bits(*found)


def test_states_that_share_memory() -> None:
    """As from a checkpoint in which they did."""
    found = []
    for backend in ("native", "reference"):
        parameters = [parameter(normal((1000,), torch.float32, seed)) for seed in range(2)]
        steps = [[normal((1000,), torch.float32, 10 * s + k) for k in range(2)] for s in range(3)]
        with forced(backend):
            optimizer = stepforge.Adam(parameters, lr=0.1)
            run(optimizer, parameters, steps[:1])
            first, second = (optimizer.state[p] for p in parameters)
            second["exp_avg"] = first["exp_avg"]
            run(optimizer, parameters, steps[1:])
        found.append(
            {
                f"{k} {n}": x
                for k, p in enumerate(parameters)
                for n, x in outcome(optimizer, p).items()
            }
        )
    assert_same_bits(*found)


# Memory that is not there.


@pytest.mark.parametrize("elsewhere", ["meta", "fake"])
def test_tensors_without_memory_are_refused(elsewhere: str) -> None:
    mode = FakeTensorMode() if elsewhere == "fake" else torch.device("meta")
    with mode:
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="fused=True cannot serve .*(CPU|memory)"):
            stepforge.Adam([p], fused=True).step()
        optimizer = stepforge.Adam([p])
        assert stepforge.explain(optimizer).served[0].backend == "foreach"
        optimizer.step()


def freed(x: torch.Tensor) -> None:
    """Takes a tensor's memory away, as sharding does with parameters between their uses."""
    x.untyped_storage().resize_(0)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("what", ["the parameter", "the gradient", "a state"])
def test_null_pointers_are_refused_and_nothing_is_written(what: str, steps_before: int) -> None:
    """Also in the last of several launches: the ones before it do not run either."""
    if what == "a state" and not steps_before:
        pytest.skip("there are no states yet")
    whole, broken = (parameter(normal((50,), torch.float32, seed)) for seed in range(2))
    groups = [{"params": [whole]}, {"params": [broken], "amsgrad": True}]
    optimizer = stepforge.Adam(groups, fused=True)
    gradients = [normal((50,), torch.float32, 2 + seed) for seed in range(2)]
    run(optimizer, [whole, broken], [gradients] * steps_before)
    whole.grad, broken.grad = gradients
    before = {key: contiguous(x) for key, x in outcome(optimizer, whole).items()}
    freed(
        {"the parameter": broken, "the gradient": gradients[1]}.get(what, broken)
        if what != "a state"
        else optimizer.state[broken]["exp_avg"]
    )
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    assert_same_bits(outcome(optimizer, whole), before)
    assert float(optimizer.state.get(broken, {}).get("step", 0)) == steps_before


# Memory that is taken for a while.

MEGABYTES = 200


def peak_mb() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_growth(layout: str) -> None:
    """Prints what the second step takes beyond all there is before it, and what a copy takes."""
    shape = (MEGABYTES // 4 * 100, 2500 * 4)  # 4 bytes an element
    shape = (MEGABYTES * 25, 10_000)
    p = torch.nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape) if layout == "dense" else torch.ones(shape[::-1]).t()
    optimizer = stepforge.Adam([p], fused=True)
    optimizer.step()
    before = peak_mb()
    optimizer.step()
    after = peak_mb()
    copy = p.detach().clone()
    print(after - before, peak_mb() - after, len(copy))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("layout", ["dense", "turned"])
def test_a_step_takes_no_memory_like_a_parameter_s(layout: str) -> None:
    """Bound: an eighth of the parameter; that a copy is seen shows that the measure measures."""
    growth, copy, _ = map(float, in_new_process(print_growth, layout).split())
    assert copy > MEGABYTES * 0.8
    assert growth < MEGABYTES / 8
