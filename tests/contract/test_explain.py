"""``stepforge.explain``, and the choice between backends that it reports.

The oracle is the documented rule: ``foreach=True`` asks for the foreach path, either flag False
(and the other not True) for the reference, both unset for the fastest that serves, and
``STEPFORGE_BACKEND`` overrides all of them. That a step runs what is explained is seen by watching
the backends run.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import stepforge
from stepforge import backends

from .twins import assert_unchanged, each_optimizer, frozen, make_params, run, twin_of

SETTINGS = list(itertools.product([None, False, True], [None, False]))
every_setting = pytest.mark.parametrize(("foreach", "fused"), SETTINGS, ids=str)


@pytest.fixture(autouse=True)
def _no_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that run, in turn."""
    record: list[str] = []

    def watched(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            record.append(name)
            return inner(*args, **kwargs)

        return wrapper

    for name, backend in backends.BACKENDS.items():
        monkeypatch.setattr(backend, "run", watched(name, backend.run))
    return record


def chosen(optimizer: stepforge.Optimizer) -> list[str]:
    return [served.backend for served in stepforge.explain(optimizer).served]


def sparse_gradient(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).detach().to_sparse()


@every_setting
@each_optimizer
def test_the_flags_choose_the_backend(
    cls: type, foreach: bool | None, fused: bool | None, ran: list[str]
) -> None:
    params = make_params()
    optimizer = cls(params, foreach=foreach, fused=fused)
    (backend,) = chosen(optimizer)
    if foreach:
        assert backend == "foreach"
    elif foreach is None and fused is None:
        assert backend != "reference"
    else:
        assert backend == "reference"
    run(optimizer, params, range(1))
    assert set(ran) == {backend}


@pytest.mark.parametrize("forced", ["reference", "foreach"])
@every_setting
def test_the_environment_overrides_the_flags(
    foreach: bool | None,
    fused: bool | None,
    forced: str,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = make_params()
    optimizer = stepforge.Adam(params, foreach=foreach, fused=fused)
    monkeypatch.setenv("STEPFORGE_BACKEND", forced)
    assert chosen(optimizer) == [forced]
    run(optimizer, params, range(1))
    assert set(ran) == {forced}


def test_an_empty_environment_variable_forces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = stepforge.Adam(make_params(), foreach=False)
    monkeypatch.setenv("STEPFORGE_BACKEND", "")
    assert chosen(optimizer) == ["reference"]


def test_an_unknown_backend_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = stepforge.Adam(make_params())
    monkeypatch.setenv("STEPFORGE_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"'abacus'.*foreach.*reference"):
        stepforge.explain(optimizer)


def test_what_is_forced_and_cannot_serve_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = make_params([(3, 2)])
    p.grad = sparse_gradient(p)
    optimizer = stepforge.Adagrad([p])
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    message = r"STEPFORGE_BACKEND=foreach .*\(3, 2\).*float32.*cpu.*sparse"
    with pytest.raises(RuntimeError, match=message):
        stepforge.explain(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_fused_without_a_kernel_is_an_error_that_says_why() -> None:
    (p,) = make_params([(3, 2)])
    optimizer = stepforge.Adagrad([p], fused=True)
    p.grad = sparse_gradient(p)
    message = r"fused=True .*\(3, 2\).*float32 on cpu: .*sparse"
    with pytest.raises(RuntimeError, match=message):
        stepforge.explain(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_fused_runs_a_generated_kernel(ran: list[str]) -> None:
    params = make_params()
    optimizer = stepforge.Adam(params, fused=True)
    (backend,) = chosen(optimizer)
    assert backend in backends.FUSED.values()
    run(optimizer, params, range(1))
    assert set(ran) == {backend}


@each_optimizer
def test_a_differentiable_step_is_the_references(cls: type) -> None:
    optimizer = cls(make_params(), differentiable=True)
    (served,) = stepforge.explain(optimizer).served
    assert served.backend == "reference"
    assert "autograd" in dict(served.reasons)["foreach"]


@pytest.mark.parametrize("foreach", [None, True])
def test_parameters_of_one_group_may_be_served_apart(foreach: bool | None, ran: list[str]) -> None:
    dense, sparse, idle = make_params([(4, 2), (3,), (5,)])
    dense.grad, sparse.grad = torch.ones_like(dense).detach(), sparse_gradient(sparse)
    optimizer = stepforge.Adagrad([dense, sparse, idle], foreach=foreach)
    by_backend = {served.backend: served for served in stepforge.explain(optimizer).served}
    reference = by_backend.pop("reference")
    (ordinary,) = by_backend.values()
    assert (reference.tensors, reference.elements) == (1, 3)
    assert "sparse" in dict(reference.reasons)["foreach"]
    assert (ordinary.tensors, ordinary.elements) == (2, 13)
    optimizer.step()
    assert set(ran) == {"reference", ordinary.backend}


def test_every_faster_backend_has_its_reason() -> None:
    names = [backends.FUSED["cpu"], "foreach", "reference"]
    for options in ({}, {"differentiable": True}):
        for served in stepforge.explain(stepforge.Adam(make_params(), **options)).served:
            faster = names[: names.index(served.backend)]
            assert [name for name, _ in served.reasons] == faster
            assert all(why for _, why in served.reasons)


def test_the_answer_counts_group_by_group() -> None:
    first, second = make_params([(3, 4), (5,)]), make_params([(1000, 2)], dtype=torch.float64)
    optimizer = stepforge.RAdam(
        [{"params": first, "foreach": True}, {"params": second, "foreach": False}]
    )
    explanation = stepforge.explain(optimizer)
    assert explanation.optimizer == "RAdam"
    assert [
        (s.group, s.backend, s.tensors, s.elements, s.dtypes, s.devices) for s in explanation.served
    ] == [
        (0, "foreach", 2, 17, ("float32",), ("cpu",)),
        (1, "reference", 1, 2000, ("float64",), ("cpu",)),
    ]
    title, *lines = str(explanation).splitlines()
    assert title == "RAdam"
    assert "group 0: foreach (2 parameters, 17 elements, float32 on cpu)" in lines
    assert "group 1: reference (1 parameter, 2,000 elements, float64 on cpu)" in lines


def test_the_text_says_why_nothing_faster_runs() -> None:
    text = str(stepforge.explain(stepforge.Adam(make_params(), differentiable=True)))
    assert "\n  not foreach: autograd" in text


@each_optimizer
def test_explaining_changes_nothing(cls: type) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, range(2))
    before = frozen(optimizer)
    stepforge.explain(optimizer)
    assert_unchanged(optimizer, before)


@each_optimizer
def test_optimizers_of_torch_are_refused_by_name(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"stepforge optimizer, but got {cls.__name__}"):
        stepforge.explain(twin_of(cls)(make_params()))
