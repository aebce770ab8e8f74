"""``torch.compile`` of a step: the plain step outside of the graph, or one operator in it.

Oracle: the same optimizer without compilation. The operator runs the same kernels, so parameters
and states are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stepforge
from tests.twins import (
    LR,
    OPTIMIZERS,
    SHAPES,
    assert_identical,
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    run,
    snapshot,
)

# Modules of torch warn that they are deprecated when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Pair:
    """An optimizer with a compiled step, and an equal one without compilation."""

    def __init__(
        self,
        cls: type,
        backend: str = "aot_eager",
        dtype: torch.dtype = torch.float32,
        shapes: Any = SHAPES,
        **options: Any,
    ) -> None:
        self.params, self.plain_params = make_params(shapes, dtype), make_params(shapes, dtype)
        self.compiled = cls(self.params, **options)
        self.plain = cls(self.plain_params, **options)
        self.step = torch.compile(self.compiled.step, backend=backend, fullgraph=True)

    def advance(self, steps: range, *, uneven: bool = False) -> None:
        """Step both optimizers, and assert that they are equal after each step."""
        for step in steps:
            give_gradients(self.params, step, uneven=uneven)
            self.step()
            run(self.plain, self.plain_params, range(step, step + 1), uneven=uneven)
            assert_identical(snapshot(self.compiled), snapshot(self.plain))


COMPILED = [(cls, "aot_eager") for cls in OPTIMIZERS] + [(stepforge.AdamW, "inductor")]


@pytest.mark.parametrize(
    ("cls", "backend"), COMPILED, ids=[f"{cls.__name__}-{backend}" for cls, backend in COMPILED]
)
def test_a_compiled_step_is_the_plain_one_and_compiles_once(cls: type, backend: str) -> None:
    pair = Pair(cls, backend, lr=LR)
    pair.advance(range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        pair.advance(range(1, 4))
        for optimizer in (pair.compiled, pair.plain):
            optimizer.param_groups[0]["lr"] = LR / 2  # as a scheduler does
        pair.advance(range(4, 7))
    assert {float(state["step"]) for state in pair.compiled.state.values()} == {7.0}


def test_the_graph_holds_the_operator_and_nothing_else() -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    params = make_params()
    optimizer = stepforge.NAdam(params)
    give_gradients(params, 0)
    torch.compile(optimizer.step, backend=keep, fullgraph=True)()
    (graph,) = graphs
    called = [node.target for node in graph.nodes if node.op.startswith("call")]
    no_grad, operator, restored = called
    assert no_grad == restored == torch._C._set_grad_enabled
    assert operator == torch.ops.stepforge.step


@pytest.mark.parametrize("overridden", [False, True])
def test_hooks_fire_once_at_each_compiled_step(overridden: bool) -> None:
    class Stepped(stepforge.AdamW):
        if overridden:

            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

    stepforge.AdamW(make_params()).step()  # the parent class's step gets its hooks first
    pair = Pair(Stepped, lr=LR)
    fired: list[str] = []
    pair.compiled.register_step_pre_hook(lambda *_: fired.append("pre"))
    pair.compiled.register_step_post_hook(lambda *_: fired.append("post"))
    for steps in range(1, 4):
        pair.advance(range(steps - 1, steps))
        assert fired == ["pre", "post"] * steps


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_every_backend_can_be_behind_the_operator(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    Pair(stepforge.RAdam, lr=LR).advance(range(2))


BFLOAT16 = torch.bfloat16
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"state_format": "int8"},
    "bfloat16": {"state_format": "bfloat16"},
    "int8 and 24 bits": {
        "state_format": "int8",
        "master_weight_bits": 24,
        "dtype": BFLOAT16,
    },
    "32 bits": {"master_weight_bits": 32, "dtype": BFLOAT16},
    "stochastic rounding": {"stochastic_rounding": True, "dtype": BFLOAT16},
}
#: The first shape is large enough for int8 states.
LARGE = ((33, 130), *SHAPES)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("cls", [stepforge.AdamW, stepforge.Adagrad])
def test_states_and_weights_may_have_formats(cls: type, options: dict[str, Any]) -> None:
    pair = Pair(cls, shapes=LARGE, lr=LR, **options)
    pair.advance(range(1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        pair.advance(range(1, 4))


@pytest.mark.parametrize("change", [{"state_format": "int8"}, {"amsgrad": True}], ids=str)
def test_options_that_need_other_states_raise(change: dict[str, Any]) -> None:
    pair = Pair(stepforge.AdamW, shapes=LARGE, lr=LR)
    pair.advance(range(1))
    give_gradients(pair.params, 1)
    pair.compiled.param_groups[0].update(change)
    before = snapshot(pair.compiled)
    with pytest.raises(RuntimeError, match=r"other states than when .*call .*reset\(\)"):
        pair.step()
    assert_unchanged(pair.compiled, before)
    torch.compiler.reset()
    pair.plain.param_groups[0].update(change)
    pair.advance(range(1, 3))


@pytest.mark.parametrize("options", [{}, {"state_format": "int8"}], ids=["plain", "int8"])
def test_the_operator_passes_opcheck(options: dict[str, Any]) -> None:
    """Oracle: torch's own check of schema, mutation and fake implementation."""
    params = make_params(LARGE)
    optimizer = stepforge.Adam(params, **options)
    give_gradients(params, 0)
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    traced = optimizer._stepper.traced
    states = [x for p in params for x in optimizer.state[p].values()]
    gradients = [p.grad for p in params]
    values = [p.detach() for p in params]
    torch.library.opcheck(
        torch.ops.stepforge.step,
        (
            values,
            gradients,
            states,
            optimizer._stepper.number,
            traced.groups,
            list(range(len(params))),
        ),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_gradients_may_come_and_go() -> None:
    Pair(stepforge.Adam, lr=LR).advance(range(6), uneven=True)


def test_a_group_added_between_compiled_steps_is_stepped() -> None:
    pair = Pair(stepforge.AdamW, lr=LR)
    pair.advance(range(2))
    for optimizer, params in ((pair.compiled, pair.params), (pair.plain, pair.plain_params)):
        more = make_params(((2, 3),))
        optimizer.add_param_group({"params": more, "lr": LR / 3})
        params += more
    pair.advance(range(2, 4))


def test_a_state_loaded_between_compiled_steps_counts() -> None:
    pair = Pair(stepforge.NAdam, lr=LR)
    pair.advance(range(2))
    saved = pair.plain.state_dict()
    pair.compiled.load_state_dict(saved)
    pair.advance(range(2, 4))


def test_compiled_and_plain_steps_may_alternate() -> None:
    pair = Pair(stepforge.NAdam, lr=LR)
    for step in range(6):
        if step % 2:
            pair.advance(range(step, step + 1))
        else:
            run(pair.compiled, pair.params, range(step, step + 1))
            run(pair.plain, pair.plain_params, range(step, step + 1))
    assert_identical(snapshot(pair.compiled), snapshot(pair.plain))


@pytest.mark.parametrize("cls", [stepforge.AdamW, stepforge.NAdam], ids=lambda cls: cls.__name__)
def test_compiled_and_plain_steps_keep_their_plans_while_they_alternate(cls: type) -> None:
    """aot_eager passes copies to the operator, at other addresses in each step; eager does not."""
    pair = Pair(cls, backend="eager", lr=LR)
    pair.advance(range(2))
    plans = []
    for step in range(2, 8):
        give_gradients(pair.params, step)
        give_gradients(pair.plain_params, step)
        (pair.compiled.step if step % 2 else pair.step)()
        pair.plain.step()
        stepper = pair.compiled._stepper
        plans.append((stepper.plans.latest, stepper.given_plans.latest))
    assert None not in plans[-1]
    assert plans[-1] == plans[-2] == plans[-3]
    assert_identical(snapshot(pair.compiled), snapshot(pair.plain))


@pytest.mark.parametrize("cls", [stepforge.AdamW, stepforge.NAdam], ids=lambda cls: cls.__name__)
def test_compiled_steps_keep_a_plan_for_each_set_of_gradients(cls: type) -> None:
    pair = Pair(cls, backend="eager", lr=LR)
    pair.advance(range(1))
    plans = []
    for step in range(8):
        for params in (pair.params, pair.plain_params):
            give_gradients(params, step)
            params[step % 2].grad = None
        pair.step()
        pair.plain.step()
        plans.append(pair.compiled._stepper.given_plans.latest)
        assert_identical(snapshot(pair.compiled), snapshot(pair.plain))
    assert None not in plans
    assert plans[-2] is not plans[-1]
    assert plans[2:4] == plans[4:6] == plans[6:8]


@pytest.mark.parametrize("cls", [stepforge.AdamW, stepforge.NAdam], ids=lambda cls: cls.__name__)
def test_the_plain_step_runs_outside_of_the_graph_unless_there_must_be_one(cls: type) -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    params, plain_params = make_params(), make_params()
    optimizer, plain = cls(params, lr=LR), cls(plain_params, lr=LR)
    step = torch.compile(optimizer.step, backend=keep)
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    plans = []
    for number in range(6):
        give_gradients(params, number)
        (optimizer.step if number == 3 else step)()
        run(plain, plain_params, range(number, number + 1))
        plans.append(optimizer._stepper.plans.latest)
        assert_identical(snapshot(optimizer), snapshot(plain))
    assert len(fired) == 6
    assert plans[0] is not None
    assert all(plan is plans[0] for plan in plans)
    assert optimizer._stepper.traced is None
    operators = [node.target for graph in graphs for node in graph.nodes]
    assert torch.ops.stepforge.step not in operators


def test_a_parameter_replaced_without_recompilation_raises() -> None:
    pair = Pair(stepforge.Adam, lr=LR)
    pair.advance(range(1))
    before = [p.detach().clone() for p in pair.params]
    pair.compiled.param_groups[0]["params"][0] = make_params()[0]
    with pytest.raises(RuntimeError, match=r"changed since the step was compiled.*reset\(\)"):
        pair.step()
    assert all(map(torch.equal, pair.params, before))


@each_optimizer
def test_a_learning_rate_may_be_a_tensor(cls: type) -> None:
    pair = Pair(cls, lr=torch.tensor(LR))
    pair.advance(range(2))
    for optimizer in (pair.compiled, pair.plain):
        optimizer.param_groups[0]["lr"].fill_(LR / 2)
    pair.advance(range(2, 4))


@each_optimizer
def test_a_differentiable_step_is_taken_outside_of_the_graph(cls: type) -> None:
    derivatives = []
    for compiling in (True, False):
        start = torch.ones(3, requires_grad=True)
        p = start.clone()
        p.grad = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        optimizer = cls([p], lr=LR, differentiable=True)
        (torch.compile(optimizer.step, backend="aot_eager") if compiling else optimizer.step)()
        derivatives.append(torch.autograd.grad(p.sum(), (start, p.grad)))
    assert_identical(derivatives[0], derivatives[1])


def test_a_sparse_gradient_is_stepped_outside_of_the_graph() -> None:
    results = []
    for compiling in (True, False):
        table = torch.nn.Embedding.from_pretrained(torch.ones(5, 2), freeze=False, sparse=True)
        optimizer = stepforge.Adagrad(table.parameters(), lr=LR)
        table(torch.tensor([1, 3])).sum().backward()
        (torch.compile(optimizer.step, backend="aot_eager") if compiling else optimizer.step)()
        results.append(table.weight.detach())
    assert torch.equal(*results)


def test_a_bad_state_format_raises_as_without_compilation() -> None:
    pair = Pair(stepforge.Adam, lr=LR)
    pair.advance(range(1))
    pair.compiled.param_groups[0]["state_format"] = "int4"
    before = snapshot(pair.compiled)
    step = torch.compile(pair.compiled.step, backend="aot_eager")
    with pytest.raises(ValueError, match=r"Invalid state_format value: 'int4'.*'int8'"):
        step()
    assert_unchanged(pair.compiled, before)


def test_a_sparse_gradient_raises_as_without_compilation() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    step = torch.compile(stepforge.Adam([p]).step, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        step()


@each_optimizer
def test_a_compiled_training_step_may_hold_the_optimizer(cls: type) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        return model, cls(model.parameters(), lr=LR)

    def training_step(
        model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor
    ) -> None:
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled, plain = make(), make()
    compiled_step = torch.compile(training_step, backend="aot_eager")
    for step in range(4):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        compiled_step(*compiled, inputs)
        training_step(*plain, inputs)
    assert_identical(snapshot(compiled[1]), snapshot(plain[1]))
