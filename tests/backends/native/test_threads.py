"""The number of threads changes no result. Oracle: the reference, which uses one. No tolerance: a
rule computes each element independently, so any thread may do it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

import stepforge
from stepforge.backends import native
from stepforge.backends.native import Kernel, kernel_for, openmp
from tests.backends.graphs import (
    INSTRUCTION_SETS,
    Columns,
    by_kernel,
    by_reference,
    c_of,
    graph_of,
    in_new_process,
    spec_of,
    traced,
)
from tests.conformance.table import OPTIMIZERS, assert_same_bits, forced, normal, outcome, parameter

ENOUGH = native.PARALLEL_MIN  # elements for more than one thread
GRAIN = 64

#: Sizes of parameters that one call steps.
SPLITS = {
    "one-big": [3 * ENOUGH + 17],
    "too-few-for-threads": [ENOUGH - 1],
    "just-enough": [ENOUGH],
    "one-more": [ENOUGH + 1],
    "just-enough-in-two": [ENOUGH // 2 - 1, ENOUGH // 2 + 1],
    "around-the-grain": [GRAIN - 1, GRAIN, GRAIN + 1] * (ENOUGH // 3 // GRAIN + 3),
    "many-small": [*range(370)],
    "a-big-one-last": [1] * 100 + [ENOUGH],
    "empties-between": [0, 0, ENOUGH // 2, 0, 0, 0, ENOUGH // 2 + 5, 0, 0],
    # 66000 elements are shares of 16512 for four threads, and of 33024 for two.
    "shares-end-with-parameters": [16512, 16512, 0, 16512, 16464],
}

pytestmark = pytest.mark.skipif(
    openmp.thread_pool() is None, reason="torch has loaded no OpenMP runtime that kernels can share"
)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def inputs(split: str) -> tuple[list[Columns], list[list[float]]]:
    """Return parameters of those sizes with gradients and moments, and coefficients for each."""
    sizes = SPLITS[split]
    whole = {name: normal((sum(sizes),), torch.float32, seed) for seed, name in enumerate("pgmv")}
    whole["v"] = whole["v"].abs()
    parts = [whole[name].split(sizes) for name in whole]
    params = [dict(zip(whole, tensors, strict=True)) for tensors in zip(*parts, strict=True)]
    coefficients = [
        [
            bool((index + k) % 2) if node.boolean else 0.1 * (k + 1) / (index + 1)
            for k, node in enumerate(graph_of("RAdam").coefficients)
        ]
        for index in range(len(params))
    ]
    return params, coefficients


def joined(params: Sequence[Columns]) -> Columns:
    """Concatenate the columns of all parameters."""
    return {name: torch.cat([param[name] for param in params]) for name in params[0]}


@functools.cache
def wanted(split: str) -> Columns:
    return joined(by_reference(graph_of("RAdam"), *inputs(split), torch.float32))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=INSTRUCTION_SETS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("split", SPLITS)
def test_any_number_of_threads_on_any_instruction_set(
    split: str, threads: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_ISA", isa)
    torch.set_num_threads(threads)
    assert_same_bits(
        joined(by_kernel(graph_of("RAdam"), *inputs(split), torch.float32)), wanted(split)
    )


def test_the_splits_are_what_they_are_called() -> None:
    too_few = [name for name, sizes in SPLITS.items() if sum(sizes) < ENOUGH]
    assert too_few == ["too-few-for-threads"]
    assert f"#define GRAIN {GRAIN} " in c_of(graph_of("RAdam"), torch.float32)


# Optimizers.


def trained(
    name: str, before_step: Callable[[int], None] = lambda step: None
) -> dict[str, torch.Tensor]:
    """Return a parameter large enough for threads, with its states, after some steps."""
    p = parameter(normal((ENOUGH + 999,), torch.float32, 0))
    optimizer = OPTIMIZERS[name].ours([p], lr=0.1)
    for step in range(6):
        before_step(step)
        p.grad = normal(tuple(p.shape), torch.float32, step + 1)
        optimizer.step()
    return outcome(optimizer, p)


def oracle(name: str) -> dict[str, torch.Tensor]:
    with forced("reference"):
        return trained(name)


def test_the_number_of_threads_changes_between_steps() -> None:
    threads = [1, 2, 4, 1, 3, 2]
    with forced("native"):
        got = trained("NAdam", lambda step: torch.set_num_threads(threads[step]))
    assert_same_bits(got, oracle("NAdam"))


def test_optimizers_that_step_in_threads_of_python() -> None:
    """Two of one class and one of another, which start each step at the same moment."""
    names = ["Adam", "Adam", "RAdam"]
    barrier = threading.Barrier(len(names), timeout=30)
    found: dict[int, dict[str, torch.Tensor]] = {}

    def wait(step: int) -> None:
        torch.set_num_threads(2)  # torch has this setting per Python thread
        barrier.wait()

    def work(index: int) -> None:
        found[index] = trained(names[index], wait)

    with forced("native"):
        run_at_once([functools.partial(work, index) for index in range(len(names))])
    assert sorted(found) == [0, 1, 2]
    for index, name in enumerate(names):
        assert_same_bits(found[index], oracle(name), f"optimizer {index}:")


def run_at_once(functions: Sequence[Callable[[], None]]) -> None:
    workers = [threading.Thread(target=function) for function in functions]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)


def test_threads_that_ask_for_a_kernel_at_once_get_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path / "cache"))
    graph = traced(lambda p, g: p - 0.125 * g)
    found: list[Kernel | str] = []
    barrier = threading.Barrier(4, timeout=30)

    def ask() -> None:
        barrier.wait()
        found.append(kernel_for(spec_of(graph, torch.float32)))

    run_at_once([ask] * 4)
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
    assert isinstance(found[0], Kernel)


# Tests that need a process of their own.


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def share_torch_s_threads() -> None:
    torch.set_num_threads(1)
    params, coefficients = inputs("one-big")
    before = threads_of_process()
    torch.set_num_threads(3)
    by_kernel(graph_of("RAdam"), params, coefficients, torch.float32)
    assert threads_of_process() == before + 2, "the kernel did not run on three threads"
    torch.ones(10 * ENOUGH).mul_(2)
    assert threads_of_process() == before + 2, "torch and kernels do not share their threads"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_kernels_and_torch_share_their_threads() -> None:
    in_new_process(share_torch_s_threads)


def step_with_fewer_threads_than_asked_for() -> None:
    torch.set_num_threads(4)
    got = joined(by_kernel(graph_of("RAdam"), *inputs("one-big"), torch.float32))
    torch.set_num_threads(1)
    assert_same_bits(got, wanted("one-big"))


def test_openmp_may_give_fewer_threads_than_were_asked_for() -> None:
    """All shares of the work must still be done. OMP_DYNAMIC does the same on a busy machine."""
    in_new_process(step_with_fewer_threads_than_asked_for, OMP_THREAD_LIMIT="3")


def step_in_children(folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(2)
    p = parameter(normal((2 * ENOUGH,), torch.float32, 0))
    p.grad = normal((2 * ENOUGH,), torch.float32, 1)
    optimizer = stepforge.Adam([p], lr=0.1, fused=True)
    optimizer.step()
    before = p.detach().clone()

    def step_and_write(path: str) -> None:
        signal.alarm(30)  # ends a child that hangs
        optimizer.step()
        Path(path).write_bytes(p.detach().numpy().tobytes())

    process = multiprocessing.get_context("fork").Process(
        target=step_and_write, args=("by-multiprocessing",)
    )
    process.start()
    process.join()
    child = os.fork()
    if child == 0:
        step_and_write("by-fork")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert process.exitcode == 0
    assert torch.equal(p, before)
    optimizer.step()  # the parent still has its threads
    for path in ("by-multiprocessing", "by-fork"):
        assert Path(path).read_bytes() == p.detach().numpy().tobytes(), path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_process_that_has_threads(tmp_path: Path) -> None:
    in_new_process(step_in_children, str(tmp_path))
