"""Memory that a step by Triton reads and writes, and parameters that it refuses.

Oracles: the reference on the same memory; the memory before the step; autograd's error about saved
tensors that have changed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import stepforge
from stepforge.backends import ParamSpec, triton
from stepforge.backends.triton import kernel, table
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.step.params import check_params
from tests.backends.graphs import spec_of, traced
from tests.backends.sharing import SHARING, numbered
from tests.backends.triton.kernels import by_kernels_only, moved, on_host
from tests.conformance.table import (
    LAYOUTS,
    OPTIMIZERS,
    assert_same_bits,
    contiguous,
    forced,
    lazily_negated,
    normal,
    outcome,
    parameter,
    run,
)

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def by_both(train: Callable[[], dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return the results of a training by Triton and by the reference."""
    found = []
    for backend in ("triton", "reference"):
        with forced(backend):
            found.append(train())
    return found


interpreted_only = pytest.mark.skipif(
    not is_interpreted(), reason="compiled kernels cannot read the CPU's memory"
)


@interpreted_only
@pytest.mark.parametrize("sharing", SHARING)
def test_shared_memory_is_stepped_as_the_reference_does(sharing: str) -> None:
    """One parameter after the other; all of a parameter is read before any of it is written."""
    assert_same_bits(*by_both(functools.partial(SHARING[sharing].train, 1200)))


@interpreted_only
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_gradient_that_comes_to_share_memory(turn: int) -> None:
    """The plan is kept, and takes the addresses of gradients again in every step."""

    def train() -> dict[str, torch.Tensor]:
        p, q = (parameter(normal((50,), torch.float32, k)) for k in range(2))
        optimizer = stepforge.Adam([p, q], lr=0.1)
        for step in range(3):
            gradients = [normal((50,), torch.float32, 10 * step + k) for k in range(2)]
            if step == turn:
                gradients[1] = p.detach()
            run(optimizer, [p, q], [gradients])
        return numbered([outcome(optimizer, x) for x in (p, q)])

    assert_same_bits(*by_both(train))


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_optimizer
def test_complex_parameters(name: str, layout: str, dtype: torch.dtype) -> None:
    def train() -> dict[str, torch.Tensor]:
        p = parameter(normal((5, 3), dtype, 0), layout)
        optimizer = OPTIMIZERS[name].ours([p], weight_decay=0.1)
        gradients = [normal((5, 3), dtype, 1), normal((5, 3), dtype, 2).conj()]
        run(optimizer, [p], [[g] for g in gradients])
        return outcome(optimizer, p)

    assert_same_bits(*by_both(train))


@interpreted_only
def test_a_lazily_negated_gradient_comes_and_goes() -> None:
    def train() -> dict[str, torch.Tensor]:
        p = parameter(normal((40,), torch.float32, 0))
        optimizer = stepforge.Adam([p])
        for step in range(4):
            g = normal((40,), torch.float32, 1 + step)
            run(optimizer, [p], [[lazily_negated(g) if step % 2 else g]])
        return outcome(optimizer, p)

    assert_same_bits(*by_both(train))


@every_optimizer
def test_autograd_refuses_what_was_stepped_since(name: str, device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(5, device=device))
    with forced("triton"):
        optimizer = OPTIMIZERS[name].ours([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        for _ in range(2):  # by a kept plan
            key = "sum" if name == "Adagrad" else "exp_avg_sq"
            x = torch.ones(5, device=device, requires_grad=True)
            losses = [(p * p).sum(), (x * optimizer.state[p][key]).sum()]
            before = p.grad._version
            with by_kernels_only():
                optimizer.step()
            assert p.grad._version == before
            for loss in losses:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


@pytest.mark.parametrize("freed", ["p", "gradient", "exp_avg"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_null_pointers_are_refused_and_nothing_is_written(
    steps_before: int, freed: str, device: torch.device
) -> None:
    """Also in the last of several launches: none of the others runs either."""
    if freed == "exp_avg" and not steps_before:
        pytest.skip("it does not exist yet")
    whole, broken = (
        torch.nn.Parameter(normal((50,), torch.float32, seed).to(device)) for seed in range(2)
    )
    groups = [{"params": [whole]}, {"params": [broken], "amsgrad": True}]
    optimizer = stepforge.Adam(groups)
    gradients = [normal((50,), torch.float32, 2 + seed).to(device) for seed in range(2)]
    with forced("triton"):
        run(optimizer, [whole, broken], [gradients] * steps_before)
        whole.grad, broken.grad = gradients
        before = {key: x.clone() for key, x in outcome(optimizer, whole).items()}
        tensors = outcome(optimizer, broken) | {"gradient": gradients[1]}
        tensors[freed].untyped_storage().resize_(0)  # as sharding does between uses
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    after = outcome(optimizer, whole)
    assert_same_bits({key: after[key].cpu() for key in before}, on_host(before))
    steps = {float(optimizer.state[p].get("step", 0)) for p in (whole, broken)}
    assert steps == {steps_before}


# Refusals, each in one sentence.


def assert_refused(device: str, message: str) -> None:
    """Fail unless ``fused=True`` on a device raises this message, and explain has it too."""
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.ones(3, device=device)
        optimizer = stepforge.Adam([p], fused=True)
        with pytest.raises(RuntimeError, match=f"fused=True cannot serve .*{message}") as caught:
            optimizer.step()
        assert "\n" not in str(caught.value)
        assert not optimizer.state
        optimizer.param_groups[0]["fused"] = None
        (served,) = stepforge.explain(optimizer).served
        assert message in dict(served.reasons)["triton"]


def test_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_is_installed", lambda: False)
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    assert_refused("cuda", "Triton is not installed: pip install triton")


def test_triton_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example without a compiler. The default then steps by torch operations."""
    triton._driver_problem.cache_clear()
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    from triton.runtime import driver

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(driver, "_active", Broken())
    try:
        assert_refused("cuda", "Triton does not work here: no compiler")
    finally:
        triton._driver_problem.cache_clear()


def test_interpreted_kernels_refuse_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would dereference an address of the GPU."""
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    assert_refused("cuda", "TRITON_INTERPRET")


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    why = triton._capability_problem(torch.device("cuda", 99))
    assert why == "Triton needs compute capability 7, and the device has 6.1"


@pytest.mark.parametrize("forced_name", ["triton", ""])
def test_other_devices(forced_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", forced_name)
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    why = triton.unsupported_reason(ParamSpec(p, None, {"differentiable": False}, None))  # type: ignore[arg-type]
    assert why is not None
    assert "meta" in why


@pytest.mark.parametrize("backend", ["triton", "reference", "native", "foreach"])
def test_a_state_on_another_device_is_refused(backend: str) -> None:
    """As when a model is moved after its optimizer's first step. No parameter is stepped."""
    if backend == "triton" and not is_interpreted():
        pytest.skip("kernels are compiled here")
    p, q = (parameter(normal((4,), torch.float32, k)) for k in range(2))
    optimizer = stepforge.Adam([p, q])
    with forced(backend):
        run(optimizer, [p, q], [[torch.ones(4)] * 2])
        before = contiguous(p)
        optimizer.state[q]["exp_avg"] = optimizer.state[q]["exp_avg"].to("meta")
        message = (
            "a parameter on cpu has a state exp_avg on meta: move it there, or delete "
            r"optimizer.state\[p\] to begin anew"
        )
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert torch.equal(p.detach(), before)
    assert float(optimizer.state[p]["step"]) == 1


def test_a_gradient_on_another_device_is_refused() -> None:
    """torch refuses most ways to get there, but a parameter's ``data`` can move."""
    p = parameter(torch.ones(3))
    optimizer = stepforge.Adam([p])
    param = (0, p, torch.ones(3, device="meta"), optimizer.param_groups[0], {})
    with pytest.raises(RuntimeError, match="a parameter on cpu has a gradient on meta"):
        check_params(optimizer.rule, [param], sparse_problem=None)


# Sources on disk.


def test_sources_are_named_by_their_content_and_private(cache: Path, device: torch.device) -> None:
    source = "def step():\n    return 1\n"
    module = kernel.load(source)
    (path,) = cache.iterdir()
    assert path.read_text() == source
    assert module.__file__ == str(path)
    assert cache.stat().st_mode & 0o777 == 0o700
    path.write_text("def step():\n    return 2\n")
    assert kernel.load(source).step() == 1  # the source that was passed, not that on disk
    assert path.read_text() == source
    kernel.load(source + "\n")
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("umask", [0o000, 0o077], ids=oct)
def test_sources_are_private_whatever_the_umask(cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        kernel.load("x = 1\n")
    finally:
        os.umask(before)
    (path,) = cache.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    kernel.load("x = 1\n")
    assert path.stat().st_mode & 0o777 == 0o600, "a file that others may write to is rewritten"


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    leftover = cache / "build-0a1b2c3d"
    leftover.mkdir(parents=True)
    cache.chmod(0o700)
    (leftover / "kernel.py").write_text("half a fil")
    os.utime(leftover, (1e9, 1e9))
    kernel.load("x = 1\n")
    assert not leftover.exists()


def test_a_cache_that_was_not_safe_takes_sources_once_it_is(cache: Path) -> None:
    ask = functools.partial(kernel.kernel_for, spec_of(traced(lambda p, g: p - g), torch.float32))
    cache.mkdir()
    cache.chmod(0o777)
    assert "can be written to by others" in str(ask())
    cache.chmod(0o700)
    assert isinstance(ask(), kernel.Kernel)


def test_a_cache_that_others_may_write_to_is_refused(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(kernel.disk_cache.BuildError, match="can be written to by others"):
        kernel.load("x = 1\n")


def test_moved_keeps_the_layout() -> None:
    x = normal((4, 5), torch.float32, 0)[1:, ::2].t()
    y = moved(x, torch.device("meta"))
    assert (y.shape, y.stride(), y.storage_offset()) == (x.shape, x.stride(), x.storage_offset())


@interpreted_only
@pytest.mark.parametrize("nth", range(4))
def test_running_out_of_memory_for_a_table_precedes_any_change(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches have two uploads each. Whichever fails, not one parameter is stepped."""
    parameters = [
        torch.nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.float32, torch.float64)
    ]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = stepforge.Adam(parameters)
    upload, uploads = table.uploaded, []

    def scarce(*arguments: Any) -> torch.Tensor:
        uploads.append(arguments)
        if len(uploads) == nth + 1:
            raise torch.OutOfMemoryError("no memory is left on the device")
        return upload(*arguments)

    monkeypatch.setattr(table, "uploaded", scarce)
    with forced("triton"):
        with pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            optimizer.step()
        assert all(torch.equal(p, torch.ones_like(p)) for p in parameters)
        assert not optimizer.state
        optimizer.step()  # once memory is available again
    assert {float(param_state["step"]) for param_state in optimizer.state.values()} == {1.0}
