"""The tracer. Oracles: normal forms written by hand, and the same expression on float64 tensors."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepforge
from stepforge.expr import Expr, Trace
from stepforge.ops import (
    ALL,
    VOCABULARY,
    count,
    exp,
    finite,
    largest,
    maximum,
    minimum,
    norm,
    sign,
    sqrt,
    total,
    where,
)
from stepforge.program import Graph, Program, evaluate


@pytest.fixture
def trace() -> Trace:
    return Trace()


@pytest.fixture
def symbols(trace: Trace) -> dict[str, Expr]:
    """Uniform a, b, c and varying x, y, z."""
    uniform = {name: trace.input(name) for name in "abc"}
    return uniform | {name: trace.input(name, varying=True) for name in "xyz"}


NORMAL_FORM = {
    # an expression: its normal form
    "a * x": "mul(x, a)",
    "x * a * b": "mul(x, mul(a, b))",
    "b * (a * x)": "mul(x, mul(a, b))",
    "a * x / b": "mul(x, div(a, b))",
    "x / a": "mul(x, div(1.0, a))",
    "x / a / b": "mul(x, div(div(1.0, a), b))",
    "a / x": "div(a, x)",
    "x / y": "div(x, y)",
    "a + x": "add(x, a)",
    "y + x": "add(x, y)",
    "y * x": "mul(x, y)",
    "a - x": "sub(a, x)",
    "x + 0": "x",
    "0 + x": "x",
    "x - 0": "x",
    "0 - x": "neg(x)",
    "x * 1": "x",
    "x / 1": "x",
    "x * 0": "0.0",
    "a * 0 * x + y": "y",
    "1 - a * 0": "1.0",
    "0 / x": "0.0",
    "-(-x)": "x",
    "-(a * x)": "mul(x, neg(a))",
    "x ** 1": "x",
    "x ** 0": "1.0",
    "x ** 2": "mul(x, x)",
    "x ** 3": "mul(x, mul(x, x))",
    "x ** -2": "div(1.0, mul(x, x))",
    "x ** 0.5": "sqrt(x)",
    "a ** b": "pow(a, b)",
    "x > a": "lt(a, x)",
    "x >= a": "le(a, x)",
    "maximum(a, x)": "maximum(x, a)",
    "where(x > a, y, y)": "y",
    # not re-associated
    "(x + a) + b": "add(add(x, a), b)",
    "(x * a) * y": "mul(y, mul(x, a))",
    "(x + y) + z": "add(z, add(x, y))",
}


@pytest.mark.parametrize("written", NORMAL_FORM)
def test_normal_form(written: str, symbols: dict[str, Expr]) -> None:
    assert (
        repr(eval(written, {"maximum": maximum, "where": where}, symbols)) == NORMAL_FORM[written]
    )


def test_equal_expressions_are_one_node(symbols: dict[str, Expr]) -> None:
    a, x, y = symbols["a"], symbols["x"], symbols["y"]
    assert (a * x + y) is (y + x * a)
    assert sqrt(x * x) is sqrt(x**2)
    assert (x * 0.5) is not (x * -0.5)
    assert (x + 0.5) is not (x - 0.5)


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: 1 if x > 0 else 2,
        lambda x: x and 1,
        lambda x: not x,
        lambda x: max(x, 0.0),
        lambda x: x == 0 or x,
    ],
    ids=["if", "and", "not", "max", "or"],
)
def test_a_symbol_has_no_truth_value(
    choose: Callable[[Any], Any], symbols: dict[str, Expr]
) -> None:
    for symbol in (symbols["a"], symbols["x"]):
        with pytest.raises(TypeError, match=r"write where\(condition, a, b\) instead of `if`"):
            choose(symbol)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda s: math.sqrt(s["x"]), "use the functions of stepforge.ops"),
        (lambda s: list(s["x"]), "no elements to iterate over"),
        (lambda s: exp(s["x"]), "exp is for uniform values only"),
        (lambda s: s["x"] ** s["a"], "whole number or to 0.5 only"),
        (lambda s: 2 ** s["x"], "whole number or to 0.5 only"),
        (lambda s: torch.sqrt(s["x"]), "torch's sqrt cannot take a symbol: use operators"),
        (lambda s: s["x"] + "1", "symbols and numbers, not with str"),
        (lambda s: s["x"] * torch.ones(2), "symbols and numbers, not with Tensor"),
        (lambda s: (s["x"] > 0) + 1, "stands in add where a number is due"),
        (lambda s: where(s["x"], 1.0, 2.0), "stands in where where a comparison is due"),
        (lambda s: s["x"] + Trace().input("x"), "belongs to another trace"),
    ],
)
def test_misuse_is_explained(
    misuse: Callable[[dict[str, Expr]], Any], message: str, symbols: dict[str, Expr]
) -> None:
    with pytest.raises(TypeError, match=message):
        misuse(symbols)


def test_expressions_of_uniform_values_alone_are_hoisted(symbols: dict[str, Expr]) -> None:
    a, b, x, y = (symbols[name] for name in "abxy")
    graph = Graph.of({"p": x - a * y / (1 - b**2), "s": a + b})
    assert list(map(repr, graph.coefficients)) == ["div(a, sub(1.0, pow(b, 2.0)))"]
    assert graph.scalars == ("s",)
    assert [i.op for i in graph.varying.instructions] == ["mul", "sub"]
    assert all(i.op not in ("pow", "div") for i in graph.varying.instructions)


def test_unused_expressions_are_left_out(symbols: dict[str, Expr]) -> None:
    a, x, y = symbols["a"], symbols["x"], symbols["y"]
    sqrt(y + a)
    graph = Graph.of({"p": x * a, "y": y})
    assert graph.results == ("p",)  # y does not change
    assert graph.varying.inputs == ("x",)
    assert [i.op for i in graph.varying.instructions] == ["mul"]


def test_a_register_is_released_after_its_last_reader_only(symbols: dict[str, Expr]) -> None:
    x, y = symbols["x"], symbols["y"]
    square = x * x
    program = Program.of([square + y, sqrt(square)])
    for position, instruction in enumerate(program.instructions):
        for register in instruction.last:
            assert register not in program.outputs
            later = program.instructions[position + 1 :]
            assert all(register not in other.args for other in later)
    released = [register for i in program.instructions for register in i.last]
    assert sorted(released) == [0, 1, 2]  # x, y and the square, each once; results never


# Random expressions, of symbols and of tensors alike.
UNARY = [lambda x: -x, abs, lambda x: sqrt(abs(x)), lambda x: x**2, sign, finite]
BINARY = [
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x / (1 + y * y),
    maximum,
    minimum,
    lambda x, y: where(x < y, x, y * 0.5),
]


@st.composite
def expressions(draw: st.DrawFn) -> Callable[[dict[str, Any]], Any]:
    """Draw a function of a, b (uniform) and x, y (varying): a random sequence of operations."""
    program = draw(
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(UNARY), st.integers(0, 20)),
                st.tuples(st.sampled_from(BINARY), st.integers(0, 20), st.integers(0, 20)),
            ),
            min_size=1,
            max_size=12,
        )
    )

    def compute(values: dict[str, Any]) -> Any:
        known = [*values.values(), 0.5, 3.0]
        for function, *operands in program:
            known.append(function(*(known[operand % len(known)] for operand in operands)))
        return known[-1] + values["x"] * 0.25

    return compute


@given(expressions(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_graph_computes_what_the_expression_does(
    compute: Callable[[dict[str, Any]], Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {"a": 0.7, "b": -1.3}
    values |= {n: torch.randn(5, generator=generator, dtype=torch.float64) for n in "xy"}
    trace = Trace()
    symbols = {n: trace.input(n, varying=isinstance(v, torch.Tensor)) for n, v in values.items()}
    graph = Graph.of({"r": compute(symbols)})
    coefficients = evaluate(graph.uniform, values, (), VOCABULARY)
    (result,) = evaluate(graph.varying, values, coefficients, VOCABULARY)
    # Folding factors changes a rounding or two per operation, and a difference of nearly equal
    # terms amplifies them. So results are compared relative to the largest one, which squares can
    # make huge. Results beyond 1e100 say nothing about the graph and are passed over.
    expected = compute(values)
    scale = expected.abs().clamp(min=1.0)
    if torch.isfinite(expected).all() and scale.max() < 1e100:
        assert ((result - expected).abs() <= 1e-9 * scale.max()).all()


OPTIMIZERS = [
    (stepforge.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    (stepforge.Adam, {}),
    (stepforge.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (stepforge.AdamW, {}),
    (stepforge.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (stepforge.RAdam, {"weight_decay": 0.1}),
]


@pytest.mark.parametrize("t", [1, 5, 6, 1000])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", None))
def test_the_interpreted_graph_agrees_with_the_rule_on_tensors(
    cls: Any, options: dict[str, Any], t: int
) -> None:
    torch.manual_seed(t)
    group = cls([torch.zeros(1)], **options).param_groups[0]
    rule = cls.rule
    letters = [s for s, state in rule.states.items() if state.on(group)]
    values: dict[str, Any] = {"t": float(t), **dict(rule.option_items(group))}
    values |= {n: torch.rand(7, dtype=torch.float64) for n in ("p", "g", *letters)}
    values |= {s: 0.5 for s in letters if rule.states[s].scalar}
    graph = rule.graph(group)
    uniform = evaluate(graph.uniform, values, (), VOCABULARY)
    count = len(graph.coefficients)
    results = evaluate(graph.varying, values, uniform[:count], VOCABULARY)
    found = dict(zip((*graph.results, *graph.scalars), (*results, *uniform[count:])))

    class Options:
        """The hyperparameters, as attributes for the rule."""

    for name, value in group.items():
        setattr(Options, name, value)
    states = [values.get(s) for s in rule.states]
    expected = rule.function(Options, t, values["p"], values["g"], *states)
    for letter, value in zip(("p", *rule.states), expected, strict=True):
        if letter in found:
            # A dozen float64 operations on values of order one, some in another order.
            torch.testing.assert_close(
                torch.as_tensor(found[letter]), torch.as_tensor(value), rtol=1e-13, atol=1e-14
            )


def test_a_rule_is_traced_once_for_each_choice_of_flags() -> None:
    rule = stepforge.Adam.rule
    group = stepforge.Adam([torch.zeros(1)], weight_decay=0.1).param_groups[0]
    graph = rule.graph(group)
    assert rule.graph({**group, "lr": 0.5, "betas": (0.1, 0.2), "weight_decay": 0.3}) is graph
    assert rule.graph({**group, "foreach": True, "capturable": True}) is graph
    assert rule.graph({**group, "amsgrad": True}) is not graph
    assert rule.graph({**group, "maximize": True}) is not graph
    assert rule.graph({**group, "weight_decay": 0}) is not graph


def test_weight_decay_costs_nothing_when_it_is_off() -> None:
    rule = stepforge.AdamW.rule
    on = stepforge.AdamW([torch.zeros(1)]).param_groups[0]
    with_decay, without = rule.graph(on), rule.graph({**on, "weight_decay": 0.0})
    assert len(with_decay.varying.instructions) == len(without.varying.instructions) + 2
    assert "weight_decay" not in without.uniform.inputs


def test_the_kernel_of_nadam_has_one_division_and_one_root() -> None:
    group = stepforge.NAdam([torch.zeros(1)]).param_groups[0]
    ops = [i.op for i in stepforge.NAdam.rule.graph(group).varying.instructions]
    assert ops.count("div") == 1
    assert ops.count("sqrt") == 1


# Reductions.


def test_a_reduction_is_uniform_and_known_after_a_pass() -> None:
    """The ratio of LAMB: two norms in one pass, and a coefficient that follows from them."""
    trace = Trace()
    p, g = (trace.input(name, varying=True) for name in "pg")
    update = g + trace.input("weight_decay") * p
    graph = Graph.of({"p": p - trace.input("lr") * (norm(p) / norm(update)) * update})
    (first,) = graph.before
    assert [node.op for node in first.reductions] == ["squares", "squares"]
    assert not first.results
    assert first.coefficients == graph.coefficients[:1]
    assert graph.uniform.given == first.reductions
    values = {"p": 3.0, "g": 1.0, "weight_decay": 0.5, "lr": 0.1}
    coefficients = evaluate(graph.uniform, values, [9.0, 6.25], VOCABULARY)
    (result,) = evaluate(graph.varying, values, coefficients, VOCABULARY)
    assert result == pytest.approx(3 - 0.1 * (3 / 2.5) * 2.5)


def test_a_reduction_of_what_follows_from_another_takes_a_second_pass() -> None:
    trace = Trace()
    p, g = (trace.input(name, varying=True) for name in "pg")
    centred = g - total(g) / count(g != p)
    graph = Graph.of({"p": p / largest(centred, across=ALL)})
    assert [[node.op for node in each.reductions] for each in graph.before] == [
        ["total", "count"],
        ["largest"],
    ]
    first, second = graph.before
    assert second.before == (first,)
    assert second.uniform.given == first.reductions
    assert graph.uniform.given == (*first.reductions, *second.reductions)


def test_reductions_of_what_no_result_needs_take_no_pass() -> None:
    trace = Trace()
    p = trace.input("p", varying=True)
    total(p)
    assert Graph.of({"p": p + 1}).before == ()


def test_equal_reductions_are_one_and_ranges_differ() -> None:
    trace = Trace()
    g = trace.input("g", varying=True)
    assert norm(g) is norm(g)
    assert norm(g) is not norm(g, across=ALL)
    assert str(norm(g, across=ALL)) == "sqrt(squares(g, all))"


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda x, c: total(x > 1), "stands in total where a number is due"),
        (lambda x, c: count(x), "stands in count where a comparison is due"),
        (lambda x, c: norm(c), "`c` is one number already: squares takes a varying value"),
        (lambda x, c: norm(norm(x)), "is one number already"),
    ],
)
def test_a_reduction_of_the_wrong_kind_is_refused(reduce: Any, message: str) -> None:
    trace = Trace()
    with pytest.raises(TypeError, match=re.escape(message)):
        reduce(trace.input("x", varying=True), trace.input("c"))


def test_a_reduction_over_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="across='group': it must be one of"):
        norm(Trace().input("x", varying=True), across="group")  # type: ignore[arg-type]
