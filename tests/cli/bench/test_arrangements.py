"""Forms of tensors and steps. Oracles: torch's own types, and plain steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from stepforge.cli import devices
from stepforge.cli.bench.arrangements import (
    CLIPPED,
    COMPILED,
    FUSED,
    MEASURED,
    PLAIN,
    SHARDED,
    Form,
)
from stepforge.cli.bench.device_settings import settings_for
from stepforge.cli.bench.implementations import (
    ACCESS,
    IMPLEMENTATIONS,
    OURS,
    PLAINLY,
    TORCH,
    Implementation,
)
from stepforge.cli.bench.measure import make_gradients, measure_implementations
from stepforge.cli.bench.workloads import Workload
from stepforge.rules import ALL

# Modules of torch warn that they are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SHAPES = [(6, 4), (4,)]
OPTIMIZERS = [i for i in IMPLEMENTATIONS if i.bound is None]


def stepped(implementation: Implementation, form: Form) -> list[torch.Tensor]:
    """Return parameters after three steps, as plain tensors."""
    gradients = make_gradients(SHAPES)
    with form.arrangement() as arrangement:
        runner: Any = implementation.start("AdamW", gradients, arrangement)
        for _ in range(3):
            runner.set_gradients(gradients)
            runner.step()
    return [p.to_local() if isinstance(p, DTensor) else p for p in runner.params]


def measured(optimizer: str, form: Form) -> set[str]:
    """Return the names of the implementations that step a form."""
    workload, settings = Workload("few", tuple(SHAPES), form=form), settings_for(devices.CPU)
    names = set(measure_implementations(optimizer, workload, settings, rounds=1))
    # The limit needs a compiler.
    return names | {i.name for i in settings.implementations_for(workload) if i.bound is not None}


# Sharded. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", OPTIMIZERS, ids=lambda i: i.name)
def test_sharded_parameters_gradients_and_states_are_dtensors(implementation):
    gradients = make_gradients(SHAPES)
    with SHARDED.arrangement() as arrangement:
        runner: Any = implementation.start("AdamW", gradients, arrangement)
        seen = []
        for _ in range(2):
            runner.set_gradients(gradients)
            seen += [p.grad for p in runner.params]
            runner.step()
        for p, gradient in zip(runner.params, gradients):
            states = [x for x in runner.optimizer.state[p].values() if x.shape == p.shape]
            assert len(states) == 2
            for tensor in (p, p.grad, *states):
                assert isinstance(tensor, DTensor)
                assert tensor.placements == (Shard(0),)
                assert tensor.device_mesh.shape == (1,)
            assert torch.equal(p.grad.to_local(), gradient)
    assert len({id(gradient) for gradient in seen}) == 2 * len(SHAPES)
    for ours, plain in zip(stepped(implementation, SHARDED), stepped(implementation, PLAIN)):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ALL)
def test_every_implementation_steps_sharded_parameters(name):
    """torch lacks one: fused Adagrad has no sharding strategy."""
    existing = {i.name for i in (*IMPLEMENTATIONS, PLAINLY) if i.exists(name)}
    lacking = {"torch fused"} if name == "Adagrad" else set()
    assert measured(name, SHARDED) - lacking == existing - lacking


def test_the_process_group_is_destroyed():
    assert not torch.distributed.is_initialized()
    for _ in range(2):
        with SHARDED.arrangement():
            assert torch.distributed.get_world_size() == 1
            assert torch.distributed.get_backend() == "gloo"
        assert not torch.distributed.is_initialized()
    with pytest.raises(KeyboardInterrupt), SHARDED.arrangement():
        raise KeyboardInterrupt
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("implementation", [ACCESS, PLAINLY], ids=lambda i: i.name)
def test_lower_bounds_and_the_plain_step_have_plain_tensors(implementation):
    gradients = make_gradients(SHAPES)
    with SHARDED.arrangement() as arrangement:
        runner: Any = implementation.start("AdamW", gradients, arrangement)
        runner.set_gradients(gradients)
        runner.step()
        assert {type(x) for p in runner.params for x in (p, p.grad)} == {torch.Tensor}


@pytest.mark.parametrize(
    ("function", "clause"),
    [
        ("is_available", "this torch has no torch.distributed"),
        ("is_gloo_available", "this torch has no gloo"),
    ],
)
def test_sharded_needs_torch_distributed_and_gloo(monkeypatch, function, clause):
    assert SHARDED.missing(devices.CPU) == ""
    monkeypatch.setattr(torch.distributed, function, lambda: False)
    assert SHARDED.missing(devices.CPU) == clause


# Compiled. ----------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the graphs that have run, by a compiler that only counts."""
    compiled: list[int] = []
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        number = len(compiled)
        compiled.append(number)

        def run(*arguments: object) -> object:
            ran.append(number)
            return graph.forward(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield ran
    torch.compiler.reset()


@pytest.mark.parametrize(("implementation", "count"), [(TORCH, 3), (OURS, 0)])
def test_every_step_runs_what_torch_compiled(implementation, count, graphs):
    """Ours leaves the graph, so that nothing is left in it."""
    compiled = stepped(implementation, COMPILED)
    assert len(graphs) == count
    plain = stepped(implementation, PLAIN)
    assert len(graphs) == count  # only compiled steps run graphs
    for ours, expected in zip(compiled, plain):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("implementation", [TORCH, OURS], ids=lambda i: i.name)
def test_the_timed_step_goes_through_the_compiler(implementation, monkeypatch):
    handed: list[Any] = []
    compile_ = torch.compile

    def counting(function: Any) -> Any:
        handed.append(function)
        return compile_(function, backend="eager")

    monkeypatch.setattr(torch, "compile", counting)
    stepped(implementation, COMPILED)
    (step,) = handed
    assert step.__name__ == "step"


def test_no_optimizer_uses_up_the_compilations_of_another(graphs):
    """Without a reset, torch runs the ninth optimizer of a class without its compiler."""
    for count in range(1, 13):
        stepped(TORCH, COMPILED)
        assert len(graphs) == 3 * count


@pytest.mark.parametrize("name", ALL)
def test_every_implementation_steps_compiled(name, graphs):
    existing = {i.name for i in (*IMPLEMENTATIONS, PLAINLY) if i.exists(name)}
    assert measured(name, COMPILED) == existing - {"torch foreach"}
    assert graphs


def test_compiled_needs_a_compiler_of_cpp(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert COMPILED.missing(devices.CPU) == (
        "torch.compile finds no C++ compiler: no-such-compiler is not on the PATH"
    )
    monkeypatch.setenv("CXX", "python3")
    assert COMPILED.missing(devices.CPU) == ""


# Fused. -------------------------------------------------------------------------------------------


def test_a_fused_step_has_its_option_and_the_plain_step_has_not():
    """Oracle: the optimizer's own param groups, and steps by default."""
    assert FUSED.missing(devices.CPU) == FUSED.missing(torch.device("cuda:0")) == ""
    with FUSED.arrangement() as arrangement:
        for implementation, fused in ((OURS, True), (PLAINLY, None)):
            runner: Any = implementation.start("NAdam", make_gradients(SHAPES), arrangement)
            assert runner.optimizer.param_groups[0]["fused"] is fused
        assert TORCH.exists("AdamW", arrangement)
        assert not TORCH.exists("NAdam", arrangement)
    for fused, plain in zip(stepped(OURS, FUSED), stepped(OURS, PLAIN)):
        assert torch.equal(fused, plain)


@pytest.mark.parametrize("form", [SHARDED, COMPILED], ids=lambda form: form.description)
def test_they_are_measured_on_a_cpu_only(form):
    assert form.missing(torch.device("cuda:0")) == "it is measured on a CPU only"
    assert PLAIN.missing(torch.device("cuda:0")) == ""


@pytest.mark.parametrize("name", ["torch", "torch fused", "stepforge"])
def test_clipped_steps_clip(name: str) -> None:
    """Oracle: a plain step after ``clip_grad_norm_``, whose norm errs by less than 1e-6."""
    implementation = next(i for i in IMPLEMENTATIONS if i.name == name)
    gradients = [torch.full((4, 3), 9.0), torch.full((5,), -2.0)]
    with CLIPPED.arrangement() as arrangement:
        runner = implementation.start("Adagrad", gradients, arrangement)
        runner.set_gradients(gradients)
        runner.step()
    params = [torch.nn.Parameter(g.clone()) for g in gradients]
    for p, g in zip(params, gradients):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    oracle = torch.optim.Adagrad(params)
    oracle.step()
    for got, p in zip(runner.params, params):
        torch.testing.assert_close(got, p.detach(), rtol=1e-6, atol=0)
    for state, p in zip(runner.optimizer.state.values(), params):
        torch.testing.assert_close(state["sum"], oracle.state[p]["sum"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", [TORCH, OURS], ids=lambda i: i.name)
def test_measured_steps_are_plain_ones(implementation: Any) -> None:
    """Oracle: a plain step of torch.optim. Those of stepforge have metrics, too."""
    gradients = [torch.full((4, 3), 3.0), torch.full((4,), 2.0)]
    with MEASURED.arrangement() as arrangement:
        runner: Any = implementation.start("Adagrad", gradients, arrangement)
        runner.set_gradients(gradients)
        runner.step()
    params = [torch.nn.Parameter(x.detach().clone()) for x in gradients]
    if implementation is OURS:
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert runner.optimizer.metrics()["grad_norm"].item() == pytest.approx(norm.item())
    for p, g in zip(params, gradients):
        p.grad = g.clone()
    torch.optim.Adagrad(params).step()
    for got, p in zip(runner.params, params):
        torch.testing.assert_close(got, p.detach())
