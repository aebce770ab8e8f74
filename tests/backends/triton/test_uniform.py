"""The kernel that computes uniform values on the device and advances scalars.

Oracles: the same program on Python numbers, with powers by Python's decimal; the reference; the
instructions of the compiled kernel.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import stepforge
from stepforge.backends import triton
from stepforge.backends.batch import UniformKernel
from stepforge.backends.triton.kernel import is_interpreted, load
from stepforge.backends.triton.uniform_source import Scalar, UniformSpec, uniform_source
from stepforge.formats import param_seed, step_seed
from stepforge.ops import NUMBERS
from stepforge.program import evaluate
from stepforge.step import passes
from stepforge.step.launch import Launch
from tests.backends.graphs import graph_of, in_new_process
from tests.backends.triton.kernels import by_kernels_only
from tests.conformance.table import (
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

interpreted = pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)

EXACT = Context(prec=60, Emin=-(10**9), Emax=10**9)


@functools.cache
def exact_power(x: float, y: float) -> float:
    """Return the nearest float64; the host's own power may be the next one."""
    with localcontext(EXACT):
        return float(Decimal(x) ** Decimal(y))


def capturable(
    name: str, params: list[torch.nn.Parameter], **options: Any
) -> tuple[stepforge.Optimizer, Launch]:
    """Return an optimizer that has stepped once, and its only launch."""
    optimizer = OPTIMIZERS[name].ours(params, capturable=True, **options)
    run(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert optimizer._stepper.plans.latest is not None
    (found,) = optimizer._stepper.plans.latest.launches
    assert found.uniform_kernel is not None
    return optimizer, found


def kernel_of(found: Launch) -> UniformKernel:
    assert found.uniform_kernel is not None
    return found.uniform_kernel


@pytest.fixture
def _triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")


@interpreted
@pytest.mark.usefixtures("_triton_backend")
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_optimizer
def test_values_and_scalars_are_those_of_the_host(
    name: str, dtype: torch.dtype, default: torch.dtype
) -> None:
    """At steps from the first to the millionth, more of them than one program computes."""
    counts = [*range(20), *(2**n for n in range(5, 25)), 10**6]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        params = [parameter(normal((2,), dtype, k)) for k in range(len(counts))]
        optimizer, found = capturable(name, params, lr=torch.tensor(0.01), weight_decay=0.1)
        states = [optimizer.state[p] for p in params]
        for count, state in zip(counts, states, strict=True):
            state["step"].fill_(count)
            if name == "NAdam":
                state["mu_product"].fill_(0.9 ** (1 + count % 9))
        old = [{key: float(state[key]) for key in found.layout.scalars} for state in states]
        options = found.uniform.options(optimizer.param_groups)
        values = kernel_of(found).bind(options)
        values.advance(None)
        graph = found.kernel.graph
        letters = {letter: s.key for letter, s in optimizer.rule.states.items()}
        for row, state, known in zip(values.matrix, states, old, strict=True):
            inputs = {key: float(x) for key, x in options.items()} | {"t": known["step"] + 1}
            inputs |= {x: known[key] for x, key in letters.items() if key in known}
            operations = NUMBERS | {"pow": exact_power}
            oracle = evaluate(graph.uniform, inputs, (), operations)
            rounded = torch.tensor(list(map(float, oracle)), dtype=torch.float64)
            count = len(graph.coefficients)
            assert torch.equal(row, rounded[:count].to(dtype))
            for letter, value in zip(graph.scalars, rounded[count:]):
                assert torch.equal(state[letters[letter]], value.to(default))
            assert state["step"].dtype == default
            assert float(state["step"]) == float(torch.tensor(known["step"] + 1, dtype=default))
    finally:
        torch.set_default_dtype(before)


@interpreted
@pytest.mark.usefixtures("_triton_backend")
@pytest.mark.parametrize("count", [1, 33])
def test_seeds_are_those_of_the_host(count: int) -> None:
    params = [parameter(normal((4,), torch.bfloat16, k)) for k in range(count)]
    options = {"stochastic_rounding": True, "rounding_seed": 2**32 - 5}
    optimizer, found = capturable("Adam", params, **options)
    for step, p in enumerate(params):
        optimizer.state[p]["step"].fill_(1000 * step)
    values = kernel_of(found).bind(found.uniform.options(optimizer.param_groups))
    values.advance(None)
    assert values.step_seeds is not None
    oracle = [step_seed(param_seed(2**32 - 5, k), 1000 * k + 1) for k in range(count)]
    assert values.step_seeds.tolist() == oracle


class Count(TorchDispatchMode):
    """Counts torch's operations, but for those of Triton's interpreter.

    Attributes:
        found: the name of each operation, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, whose work in the interpreter counts as no operation."""
    from triton.runtime.interpreter import GridExecutor

    inner, found = GridExecutor.__call__, []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self.fn.__name__)
        with _disable_current_modes():
            inner(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", call)
    return found


@interpreted
@pytest.mark.usefixtures("_triton_backend")
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@every_optimizer
def test_a_kept_step_is_two_launches_and_no_operation(
    name: str, lr: Any, options: dict[str, bool], launches: list[str]
) -> None:
    params = [parameter(normal(shape, torch.float32, 1)) for shape in [(7,), (3, 5)]]
    optimizer, _ = capturable(name, params, lr=lr, **options)
    plan, groups = optimizer._stepper.plans.latest, optimizer.param_groups
    assert plan is not None
    # A dispatch mode changes what guards look at, so they look before it.
    tensors = plan.find(groups, optimizer.state)
    assert not isinstance(tensors, str)
    launches.clear()
    with Count() as counted, torch.no_grad():
        passes.run(plan.bind(tensors, groups), groups)
    assert launches == ["advance", "step"]
    assert not counted.found
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


Outcomes = list[dict[str, torch.Tensor]]


def train(backend: str, name: str, groups: int, lrs: list[Any], **options: Any) -> Outcomes:
    """Return the outcomes of steps with one learning rate each."""
    found: Outcomes = []
    params = [parameter(normal((5,), torch.float32, k)) for k in range(2 * groups)]
    split = [{"params": params[k::groups], "eps": 1e-8 * (1 + k)} for k in range(groups)]
    with forced(backend):
        optimizer = OPTIMIZERS[name].ours(split, lr=lrs[0], capturable=True, **options)
        for step, lr in enumerate(lrs):
            for group in optimizer.param_groups:
                group["lr"] = lr
            given = [normal((5,), torch.float32, 10 * step + k) for k in range(len(params))]
            if options:  # which the reference steps
                given = list(map(lazily_negated, given))
            run(optimizer, params, [given])
            for p in params:
                found.append({k: contiguous(x) for k, x in outcome(optimizer, p).items()})
    return found


LRS = {
    "numbers": [0.1, 0, 1, 1e-300, 0.3],
    "float64": [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.2)],
    "bfloat16": [torch.tensor(x, dtype=torch.bfloat16) for x in (0.1, 0.2)],
    "one-dimensional": [torch.tensor([x]) for x in (0.1, 0.2)],
    "mixed": [0.1, torch.tensor(0.2), 0.3],
}


@interpreted
@pytest.mark.parametrize("lrs", LRS)
@pytest.mark.parametrize("groups", [1, 3])
def test_options_are_read_at_each_step(lrs: str, groups: int) -> None:
    oracles = train("reference", "Adam", groups, LRS[lrs])
    for got, oracle in zip(train("triton", "Adam", groups, LRS[lrs]), oracles, strict=True):
        assert_same_bits(got, oracle)


@interpreted
def test_the_reference_takes_the_values_of_the_kernel(launches: list[str]) -> None:
    """It steps the tensors that no kernel can."""
    options = {"weight_decay": 0.1}
    oracles = train("reference", "NAdam", 1, [0.1, 0.2], **options)
    for got, oracle in zip(
        train("triton", "NAdam", 1, [0.1, 0.2], **options), oracles, strict=True
    ):
        assert_same_bits(got, oracle)
    assert launches == ["advance", "advance"]


@interpreted
@pytest.mark.usefixtures("_triton_backend")
def test_autograd_is_told_of_new_scalars() -> None:
    params = [parameter(torch.ones(3))]
    optimizer, _ = capturable("NAdam", params)
    scalars = [optimizer.state[params[0]][key] for key in ("step", "mu_product")]
    before = [x._version for x in scalars]
    with by_kernels_only():
        optimizer.step()
    assert all(x._version > version for x, version in zip(scalars, before))


@interpreted
@pytest.mark.usefixtures("_triton_backend")
def test_scalars_that_the_kernel_cannot_read_are_left_to_torch() -> None:
    """Every second element of a longer vector. Oracle: the reference."""
    results = []
    for backend in ("triton", "reference"):
        params = [parameter(torch.ones(3)) for _ in range(2)]
        with forced(backend):
            optimizer = OPTIMIZERS["Adam"].ours(params, capturable=True)
            run(optimizer, params, [[torch.ones(3)] * 2])
            steps = torch.ones(4)[::2]
            assert not triton.UniformKernel.serves({"t": steps})
            for p, step in zip(params, steps.unbind()):
                optimizer.state[p]["step"] = step
            run(optimizer, params, [[torch.ones(3)] * 2])
        results.append([outcome(optimizer, p) for p in params])
    for got, oracle in zip(*results, strict=True):
        assert_same_bits(got, oracle)


@interpreted
def test_a_capture_refuses_to_compile_before_anything_changes(
    capturing: Callable[[bool], None],
) -> None:
    params = [parameter(torch.ones(3))]
    optimizer, _ = capturable("Adam", params, betas=(0.5, 0.75), lr=1)
    before = outcome(optimizer, params[0])
    graph = graph_of("Adam")
    assert graph.uniform.inputs[0] == "lr"
    with mock.patch.object(triton.uniform._Compiled, "knows", return_value=False):
        capturing(True)
        with pytest.raises(RuntimeError, match="before the capture, step once"):
            optimizer.step()
        capturing(False)
    assert_same_bits(outcome(optimizer, params[0]), before)


# The source, and the compiled kernel.


def spec_of(name: str, arithmetic: torch.dtype, *, is_random: bool = False) -> UniformSpec:
    scalars = [Scalar("t", torch.float32)]
    scalars += [Scalar("mu_product", torch.float32, has_index=True)] if name == "NAdam" else []
    return UniformSpec(
        graph_of(name),
        arithmetic,
        tuple(scalars),
        frozenset({"lr"}),
        torch.float32,
        is_random,
    )


@every_optimizer
def test_the_source_is_readable(name: str) -> None:
    """Every input has its name as a comment, and every coefficient its formula."""
    spec = spec_of(name, torch.float32, is_random=True)
    text = uniform_source(spec)
    for symbol in spec.graph.uniform.inputs:
        assert re.search(rf"_in = .*  # {re.escape(symbol)}$", text, re.M)
    for position, node in enumerate(spec.graph.coefficients):
        comment = text.split(f"tl.store(to + {position}, ")[1].split("\n")[0].split("  # ")[1]
        assert str(node).startswith(comment.removesuffix("..."))
    assert max(map(len, text.splitlines())) <= 100
    compile(text, "advance.py", "exec")


#: The kernels with the most operations, and every dtype of coefficients.
COMPILED = [("NAdam", torch.float32), ("NAdam", torch.float64), ("RAdam", torch.float32)]


def print_instructions(folder: str) -> None:
    """Compile kernels for GPUs of NVIDIA and AMD; print their instructions."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = GPUTarget("cuda", 90, 32)
    found: dict[str, Any] = {}
    for name, arithmetic in COMPILED:
        spec = spec_of(name, arithmetic, is_random=True)
        function = load(uniform_source(spec)).advance
        number = "*fp64" if arithmetic == torch.float64 else "*fp32"
        known = {"coefficients": number, "found_inf": "*fp32", "o0_at": "*fp32"}
        known |= {"seeds": "*i64", "step_seeds": "*i64", "scalar0": "*fp32", "scalar1": "*fp32"}
        known |= {"index1": "*i64"}
        known |= {"SKIPPABLE": "constexpr", "BLOCK": "constexpr"}
        signature = {argument: known.get(argument, "i32") for argument in function.arg_names}
        place = function.arg_names.index
        constants = {(place("SKIPPABLE"),): True, (place("BLOCK"),): 32}
        source = ASTSource(function, signature, constants, {})
        options = {"num_warps": 1, "enable_fp_fusion": False}
        made = compiler.compile(source, target=nvidia, options=options)
        amd = compiler.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
        opcode = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_.:]+) ", re.M)
        found[f"{name} {arithmetic}"] = {
            "ptx": Counter(opcode.findall(made.asm["ptx"])),
            "llvm": [amd.asm["llir"].count(word) for word in ("contract", "fmuladd", "afn")],
            "amd": len(amd.asm["hsaco"]),
        }
    print(json.dumps(found))


def test_every_operation_of_compiled_kernels_is_rounded_by_itself(tmp_path: Any) -> None:
    """No fused multiply-add, no approximation, nothing flushed to zero, no call of a library."""
    printed = in_new_process(
        print_instructions,
        str(tmp_path),
        timeout_s=240,
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
        STEPFORGE_CACHE=f"{tmp_path}/kernels",
    )
    found = json.loads(printed)
    assert len(found) == len(COMPILED)
    for case in found.values():
        opcodes = case["ptx"]
        bad = [x for x in opcodes if re.search(r"\bfma|\.ftz|approx|div\.full|\bmad\.f|call", x)]
        assert not bad
        assert opcodes["div.rn.f64"]
        assert opcodes["add.rn.f64"]
        assert not any(case["llvm"])
        assert case["amd"]


def test_numbers_reach_a_kernel_unrounded() -> None:
    """As two words each: Triton would round them to float32."""
    words = triton.uniform._arguments
    for value in (0.0, -0.0, 0.1, 1e300, math.inf, 5e-324, -2.5):
        high, low = words(value)
        assert -(2**31) <= high < 2**31
        assert -(2**31) <= low < 2**31
        bits = torch.tensor(((high << 32) | (low & 0xFFFFFFFF)), dtype=torch.int64)
        assert_same_bits(
            {"x": bits.view(torch.float64)}, {"x": torch.tensor(value, dtype=torch.float64)}
        )
