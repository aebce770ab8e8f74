"""Expression graphs: a rule recorded by running it once on symbols.

A symbol is *uniform* when it is one number for a whole tensor (a hyperparameter, the step number,
a scalar state) and *varying* when it has a value for every element (the parameter, its gradient,
a moment). Whatever depends on uniform symbols alone is uniform too, and is computed once per
tensor in float64; only the varying rest becomes the work of a kernel.

The graph is built in one **normal form**, so that every backend performs the same operations in
the same order and stores the same bits:

* a chain of uniform factors on a varying value is one factor: ``mu * m / (1 - x)`` is ``m * c``;
* division by a uniform value is multiplication by its reciprocal;
* neutral elements vanish (``x + 0``, ``x * 1``, ``x * 0``), which is how an option that is off
  leaves no trace;
* commutative operands stand in one order, and equal expressions are one node;
* nothing else is re-associated.

A *reduction* makes one number of a varying value, such as the norm of a gradient. It is uniform,
but known only after a pass over the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, get_args

Operand: TypeAlias = "Expr | float"

#: The operations that make one number of a varying value.
REDUCTIONS = frozenset({"total", "squares", "largest", "count"})

#: The range of a reduction: one parameter, or all parameters of the optimizer; for formats also a
#: block of elements that share a scale.
Across: TypeAlias = Literal["parameter", "all", "block"]


COMPARISONS = frozenset({"lt", "le", "eq", "ne"})


#: The names of arithmetic on uint32, which wraps around.
ON_UINT32 = {"add": "u32_add", "sub": "u32_sub", "mul": "u32_mul"}


#: The operations with a uint32 result. They are for formats, which choose bits; rules compute with
#: numbers.
UINT32_OPS = frozenset(
    {
        *ON_UINT32.values(),
        "and",
        "or",
        "xor",
        "shift_left",
        "shift_right",
        "bitcast_u32",
        "f32_to_i32",
    }
)


#: The operations that take a uint32 for every operand.
_UINT32_OPERANDS = UINT32_OPS - {"bitcast_u32", "f32_to_i32"} | {"bitcast_f32", "i32_to_f32"}


#: No two backends round these alike, so they may not reach a kernel.
UNIFORM_ONLY = frozenset({"exp", "log", "pow", "stored"})


class Expr:
    """A node of the graph: an input, a constant, or an operation on other nodes.

    Arithmetic and comparisons on nodes make new nodes. A node has no truth value: a rule that
    wants to choose writes ``where(condition, a, b)``.

    Attributes:
        op: ``"input"``, ``"constant"`` or the name of an operation.
        args: the operands, in order.
        value: the name of an input, the number of a constant, what a reduction is over, otherwise
            None.
        varying: True if the value differs between the elements of a tensor.
        boolean: True if the value is the outcome of a comparison.
        uint32: True if the value is a uint32.
        index: the position in the order of creation; operands come before their users.
    """

    __slots__ = ("args", "boolean", "index", "op", "trace", "uint32", "value", "varying")

    def __init__(
        self,
        trace: Trace,
        op: str,
        args: tuple[Expr, ...],
        value: str | float | None,
        varying: bool,
        uint32: bool = False,
    ) -> None:
        self.trace = trace
        self.op = op
        self.args = args
        self.value = value
        self.varying = varying
        self.boolean: bool = op in COMPARISONS or (op == "where" and args[1].boolean)
        self.uint32: bool = uint32 or op in UINT32_OPS or (op == "where" and args[1].uint32)
        self.index = len(trace)

    def __add__(self, other: Operand) -> Expr:
        return self.trace.apply("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return self.trace.apply("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return self.trace.apply("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return self.trace.apply("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return self.trace.apply("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return self.trace.apply("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return self.trace.apply("div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return self.trace.apply("div", other, self)

    def __pow__(self, other: Operand) -> Expr:
        return self.trace.apply("pow", self, other)

    def __rpow__(self, other: Operand) -> Expr:
        return self.trace.apply("pow", other, self)

    def __neg__(self) -> Expr:
        return self.trace.apply("neg", self)

    def __pos__(self) -> Expr:
        return self

    def __abs__(self) -> Expr:
        return self.trace.apply("abs", self)

    def __and__(self, other: Operand) -> Expr:
        return self.trace.apply("and", self, other)

    def __or__(self, other: Operand) -> Expr:
        return self.trace.apply("or", self, other)

    def __xor__(self, other: Operand) -> Expr:
        return self.trace.apply("xor", self, other)

    def __lshift__(self, other: Operand) -> Expr:
        return self.trace.apply("shift_left", self, other)

    def __rshift__(self, other: Operand) -> Expr:
        return self.trace.apply("shift_right", self, other)

    def __lt__(self, other: Operand) -> Expr:
        return self.trace.apply("lt", self, other)

    def __le__(self, other: Operand) -> Expr:
        return self.trace.apply("le", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return self.trace.apply("lt", other, self)

    def __ge__(self, other: Operand) -> Expr:
        return self.trace.apply("le", other, self)

    def __eq__(self, other: object) -> Expr:  # type: ignore[override]
        return self.trace.apply("eq", self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> Expr:  # type: ignore[override]
        return self.trace.apply("ne", self, other)  # type: ignore[arg-type]

    # Nodes are keys of dicts by identity; `==` is an operation of the graph.
    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"`{self}` is a symbol and has no truth value while a rule is traced: "
            "write where(condition, a, b) instead of `if`, `and`, `or` or `not`"
        )

    def __float__(self) -> NoReturn:
        raise TypeError(
            f"`{self}` is a symbol and has no number yet while a rule is traced: "
            "use the functions of stepforge.ops instead of those of math"
        )

    __int__ = __index__ = __float__

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"`{self}` is a symbol, not a tensor, and has no `{name}`: "
            "use operators and the functions of stepforge.ops"
        )

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        raise TypeError(
            f"torch's {getattr(function, '__name__', function)} cannot take a symbol: "
            "use operators and the functions of stepforge.ops"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(f"`{self}` is a symbol: it has no elements to iterate over")

    def __repr__(self) -> str:
        if self.op in ("input", "constant"):
            return str(self.value)
        over = [str(self.value)] if self.op in REDUCTIONS else []
        return f"{self.op}({', '.join([*map(repr, self.args), *over])})"


class Trace:
    """The nodes of one graph while it is being built; equal expressions are one node.

    Example:
        >>> trace = Trace()
        >>> m, c, d = trace.input("m", varying=True), trace.input("c"), trace.input("d")
        >>> c * m / d
        mul(m, div(c, d))
        >>> (c * m / d) is (m * c / d)
        True
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Expr] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def has_uint32(self) -> bool:
        """True if any node is a uint32."""
        return any(node.uint32 for node in self._nodes.values())

    def input(self, name: str, *, varying: bool = False, uint32: bool = False) -> Expr:
        """Return the symbol of that name."""
        return self._node("input", value=name, varying=varying, uint32=uint32)

    def constant(self, value: float) -> Expr:
        """Return the node of a number in the rule itself."""
        return self._node("constant", value=float(value))

    def apply(self, op: str, *operands: Operand) -> Expr:
        """Return the node of an operation on its operands, in normal form.

        Raises:
            TypeError: an operand is neither a number nor a node of this trace, is a truth value
                where a number is due (or the reverse), or varies where only a uniform may stand.
        """
        on_uint32 = op in _UINT32_OPERANDS or any(
            isinstance(x, Expr) and x.uint32 for x in operands
        )
        op = ON_UINT32.get(op, op) if on_uint32 else op
        args = [self._lift(operand, on_uint32) for operand in operands]
        _check_kinds(op, args)
        node = _NORMAL_FORM[op](self, *args) if op in _NORMAL_FORM else self._node(op, *args)
        if node.op in UNIFORM_ONLY and node.varying:
            raise TypeError(
                f"`{node}` varies: {node.op} is for uniform values only, "
                "as no two backends round it alike"
            )
        return node

    def reduce(self, op: str, operand: Expr, across: Across) -> Expr:
        """Return the node of a reduction.

        Args:
            op: one of :data:`REDUCTIONS`.
            operand: a varying value: a comparison for ``count``, else a number; a uint32 for the
                largest of a block.
            across: what it is over.

        Raises:
            TypeError: the operand is of another kind.
            ValueError: ``across`` is no range.
        """
        of_block = across == "block" and op == "largest"
        operand = self._lift(operand, on_uint32=of_block)
        due = "a uint32" if of_block else "a comparison" if op == "count" else "a number"
        if _kind(operand) != due:
            raise TypeError(f"`{operand}` stands in {op} where {due} is due")
        if not operand.varying:
            raise TypeError(f"`{operand}` is one number already: {op} takes a varying value")
        if across not in get_args(Across):
            raise ValueError(f"across={across!r}: it must be one of {get_args(Across)}")
        return self._node(op, operand, value=across, varying=of_block, uint32=of_block)

    def replaced(self, node: Expr, others: Mapping[Expr, Expr]) -> Expr:
        """Return a node with other nodes in the place of some that it depends on.

        Args:
            node: the node.
            others: for each node that is replaced, the other.
        """
        known = dict(others)

        def of(each: Expr) -> Expr:
            if each not in known:
                args = tuple(map(of, each.args))
                if all(map(operator.is_, args, each.args)):
                    known[each] = each
                elif each.op in REDUCTIONS:
                    known[each] = self.reduce(each.op, *args, across=each.value)  # type: ignore
                else:
                    known[each] = self.apply(each.op, *args)
            return known[each]

        return of(node)

    def _lift(self, operand: object, on_uint32: bool) -> Expr:
        if isinstance(operand, Expr):
            if operand.trace is not self:
                raise TypeError(f"`{operand}` belongs to another trace")
            return operand
        if on_uint32 and type(operand) is int and 0 <= operand < 2**32:
            return self._node("constant", value=operand, uint32=True)
        if isinstance(operand, (int, float)):
            return self.constant(operand)
        raise TypeError(
            f"a rule computes with symbols and numbers, not with {type(operand).__name__}: "
            "use the functions of stepforge.ops"
        )

    def _node(
        self,
        op: str,
        *args: Expr,
        value: str | float | None = None,
        varying: bool | None = None,
        uint32: bool = False,
    ) -> Expr:
        # repr tells 0.0 from -0.0, which compare equal.
        key = (op, repr(value), *(arg.index for arg in args))
        node = self._nodes.get(key)
        if node is None:
            if varying is None:
                varying = any(arg.varying for arg in args)
            node = self._nodes[key] = Expr(self, op, args, value, varying, uint32)
        return node


def _check_kinds(op: str, args: Sequence[Expr]) -> None:
    """Raise unless each operand is of the kind that the operation takes."""
    due = ["a uint32" if op in _UINT32_OPERANDS else "a number"] * len(args)
    if op in COMPARISONS and all(arg.uint32 for arg in args):
        due = ["a uint32"] * 2
    if op == "where":
        alike = _kind(args[1]) == _kind(args[2])
        due = ["a comparison", *(_kind(arg) if alike else "a number" for arg in args[1:])]
    for arg, kind in zip(args, due, strict=True):
        if _kind(arg) != kind:
            raise TypeError(f"`{arg}` stands in {op} where {kind} is due")


def _kind(node: Expr) -> str:
    return "a comparison" if node.boolean else "a uint32" if node.uint32 else "a number"


def _is(node: Expr, number: float) -> bool:
    return node.op == "constant" and node.value == number


def _scaled(node: Expr) -> bool:
    """Return True for a varying value times a uniform factor (always in this order)."""
    return node.op == "mul" and node.args[0].varying and not node.args[1].varying


def _ordered(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Order the operands of a commutative operation: varying first, then by creation."""
    return (a, b) if (not a.varying, a.index) <= (not b.varying, b.index) else (b, a)


def _add(trace: Trace, a: Expr, b: Expr) -> Expr:
    if _is(a, 0):
        return b
    if _is(b, 0):
        return a
    return trace._node("add", *_ordered(a, b))


def _sub(trace: Trace, a: Expr, b: Expr) -> Expr:
    if _is(b, 0):
        return a
    if _is(a, 0):
        return _neg(trace, b)
    return trace._node("sub", a, b)


def _neg(trace: Trace, a: Expr) -> Expr:
    if a.op == "neg":
        return a.args[0]
    if a.op == "constant":
        return trace.constant(-float(a.value))  # type: ignore[arg-type]
    if _scaled(a):
        return trace._node("mul", a.args[0], _neg(trace, a.args[1]))
    return trace._node("neg", a)


def _mul(trace: Trace, a: Expr, b: Expr) -> Expr:
    if _is(a, 0) or _is(b, 0):
        return trace.constant(0)
    if _is(a, 1):
        return b
    if _is(b, 1):
        return a
    a, b = _ordered(a, b)
    if _scaled(a) and not b.varying:
        varying, factor = a.args
        return trace._node("mul", varying, _mul(trace, factor, b))
    return trace._node("mul", a, b)


def _div(trace: Trace, a: Expr, b: Expr) -> Expr:
    if _is(b, 1):
        return a
    if _is(a, 0):
        return a
    if _scaled(a) and not b.varying:
        varying, factor = a.args
        return trace._node("mul", varying, _div(trace, factor, b))
    if a.varying and not b.varying:
        return trace._node("mul", a, _div(trace, trace.constant(1), b))
    return trace._node("div", a, b)


def _pow(trace: Trace, base: Expr, exponent: Expr) -> Expr:
    if not base.varying and not exponent.varying:
        return trace._node("pow", base, exponent)
    if exponent.op == "constant":
        power = float(exponent.value)  # type: ignore[arg-type]
        if power == 0.5:
            return trace.apply("sqrt", base)
        if power == int(power):
            return _integer_power(trace, base, int(power))
    raise TypeError(
        f"`{base}` varies and can be raised to a whole number or to 0.5 only, not to `{exponent}`"
    )


def _integer_power(trace: Trace, base: Expr, power: int) -> Expr:
    if power < 0:
        return _div(trace, trace.constant(1), _integer_power(trace, base, -power))
    if power == 0:
        return trace.constant(1)
    half = _integer_power(trace, base, power // 2)
    square = _mul(trace, half, half)
    return _mul(trace, square, base) if power % 2 else square


def _maximum(trace: Trace, a: Expr, b: Expr) -> Expr:
    return trace._node("maximum", *_ordered(a, b))


def _minimum(trace: Trace, a: Expr, b: Expr) -> Expr:
    return trace._node("minimum", *_ordered(a, b))


def _where(trace: Trace, condition: Expr, a: Expr, b: Expr) -> Expr:
    return a if a is b else trace._node("where", condition, a, b)


def _and(trace: Trace, a: Expr, b: Expr) -> Expr:
    return a if _is(b, 2**32 - 1) else trace._node("and", a, b)


_NORMAL_FORM: dict[str, Callable[..., Expr]] = {
    "add": _add,
    "sub": _sub,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _where,
    "and": _and,
}
