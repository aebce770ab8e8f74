"""The vocabulary of rules: the functions a rule may use besides ``+ - * / ** < <= > >= abs``.

Every function takes numbers, numpy arrays, tensors or symbols, and returns the same kind. So a rule
can run on tensors as it stands, or be traced into a graph.

The vocabulary is closed and small, because every operation must round alike on every backend.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from stepforge.expr import Across, Expr

#: A number, a numpy array, a torch tensor or a symbol.
Value: TypeAlias = Any

#: A uint32: a tensor or array of int64 from 0 up and below 2**32, a Python int or a symbol.
UInt32: TypeAlias = Any

__all__ = [
    "ALL",
    "NUMBERS",
    "VOCABULARY",
    "UInt32",
    "Value",
    "bitcast_f32",
    "bitcast_u32",
    "count",
    "decay",
    "ema",
    "exp",
    "f32_to_i32",
    "finite",
    "i32_to_f32",
    "largest",
    "log",
    "maximum",
    "minimum",
    "norm",
    "round_to_state_dtype",
    "sign",
    "sqrt",
    "stored",
    "to_float32",
    "total",
    "where",
]

_Implementations: TypeAlias = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def _apply(op: str, implementations: _Implementations, *operands: Value) -> Value:
    """Apply one operation to numbers, arrays, tensors or symbols.

    Args:
        op: the name of the operation in the graph, should an operand be a symbol.
        implementations: its functions of numbers, of numpy arrays and of tensors.
        operands: the operands.
    """
    on_numbers, on_arrays, on_tensors = implementations
    if any(isinstance(x, Expr) for x in operands):
        symbol = next(x for x in operands if isinstance(x, Expr))
        return symbol.trace.apply(op, *operands)
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    if tensors:
        like = _most_like_a_number(tensors)
        return on_tensors(*(_as_tensor(x, like) for x in operands))
    if any(isinstance(x, (np.ndarray, np.generic)) for x in operands):
        return on_arrays(*operands)
    return on_numbers(*operands)


def _most_like_a_number(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a tensor with the dtype for a number beside these: theirs, float or integer."""
    for of_kind in (torch.is_floating_point, lambda x: x.dtype == torch.int64):
        for tensor in filter(of_kind, tensors):
            return tensor
    return tensors[0].double()


def _as_tensor(x: Value, like: torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    # torch.full writes it by a launch; torch.tensor would copy it to a device and wait for that.
    dtype = torch.bool if isinstance(x, bool) else like.dtype
    return torch.full((), x, dtype=dtype, device=like.device)


def sqrt(x: Value) -> Value:
    """Return the square root, correctly rounded on every backend.

    Example:
        >>> sqrt(2.25)
        1.5
    """
    return _apply("sqrt", (_number_sqrt, np.sqrt, torch.sqrt), x)


def exp(x: Value) -> Value:
    """Return the exponential of a uniform value.

    Example:
        >>> exp(0.0)
        1.0
    """
    return _apply("exp", (_number_exp, _each(_number_exp), torch.exp), x)


def log(x: Value) -> Value:
    """Return the natural logarithm of a uniform value.

    Example:
        >>> log(1.0)
        0.0
    """
    return _apply("log", (_number_log, _each(_number_log), torch.log), x)


def sign(x: Value) -> Value:
    """Return -1, 0 or 1; 0 for NaN, as ``torch.sign`` does.

    Example:
        >>> sign(-3.0)
        -1.0
    """
    return _apply("sign", (_number_sign, _array_sign, torch.sign), x)


def maximum(x: Value, y: Value) -> Value:
    """Return the larger of two; NaN if either is. A zero is always +0.

    Example:
        >>> maximum(1.0, 2.0)
        2.0
    """
    return _apply("maximum", (_number_maximum, _array_maximum, _tensor_maximum), x, y)


def minimum(x: Value, y: Value) -> Value:
    """Return the smaller of two; NaN if either is. A zero is always +0.

    Example:
        >>> minimum(1.0, 2.0)
        1.0
    """
    return _apply("minimum", (_number_minimum, _array_minimum, _tensor_minimum), x, y)


def where(condition: Value, x: Value, y: Value) -> Value:
    """Return ``x`` where the condition holds, else ``y``; the other one is never looked at.

    Example:
        >>> where(2.0 > 1.0, 3.0, 4.0)
        3.0
    """
    if isinstance(condition, bool) and not isinstance(x, Expr) and not isinstance(y, Expr):
        return x if condition else y
    return _apply("where", (_number_where, np.where, _tensor_where), condition, x, y)


def finite(x: Value) -> Value:
    """Replace an infinity by the largest finite number of its sign; NaN stays.

    Example:
        >>> finite(float("inf")) < float("inf")
        True
    """
    return _apply("finite", (_number_finite, _array_finite, _tensor_finite), x)


#: Over all parameters of the optimizer that step, for the argument ``across`` of reductions.
ALL: Across = "all"


def norm(x: Value, across: Across = "parameter") -> Value:
    """Return the 2-norm of a varying value: one number.

    Squares are added up in float64, in an order that no backend and no number of threads changes.

    Args:
        x: the value.
        across: ``ALL`` for the norm over all parameters that step, instead of over one.

    Example:
        >>> norm(torch.tensor([3.0, 4.0])).item()
        5.0
    """
    return sqrt(_reduce("squares", lambda x: (x * x).sum(), x, across))


def total(x: Value, across: Across = "parameter") -> Value:
    """Return the sum of a varying value, added up as for :func:`norm`.

    Args:
        x: the value.
        across: as for :func:`norm`.

    Example:
        >>> total(torch.tensor([3.0, 4.0])).item()
        7.0
    """
    return _reduce("total", torch.sum, x, across)


def largest(x: Value, across: Across = "parameter") -> Value:
    """Return the largest number of a varying value; NaN if any is NaN, -infinity of no numbers.

    Args:
        x: the value.
        across: as for :func:`norm`; ``"block"``, for formats, for the largest uint32 of a block.

    Example:
        >>> largest(abs(torch.tensor([3.0, -4.0]))).item()
        4.0
    """
    return _reduce("largest", _tensor_largest, x, across)


def count(condition: Value, across: Across = "parameter") -> Value:
    """Return the number of elements for which a comparison holds.

    Args:
        condition: the comparison.
        across: as for :func:`norm`.

    Example:
        >>> count(torch.tensor([3.0, -4.0]) < 0).item()
        1.0
    """
    return _reduce("count", torch.sum, condition, across)


def _reduce(op: str, on_tensors: Callable[..., torch.Tensor], x: Value, across: Across) -> Value:
    """Apply a reduction to a symbol, or to the tensor of one parameter."""
    if isinstance(x, Expr):
        return x.trace.reduce(op, x, across)
    return on_tensors(torch.as_tensor(x).to(torch.float64))


def _tensor_largest(x: torch.Tensor) -> torch.Tensor:
    return x.amax() if x.numel() else x.new_full((), -math.inf)


def round_to_state_dtype(x: Value) -> Value:
    """Round a uniform value to the dtype of a scalar state: float32, as in torch.optim.

    Under ``torch.set_default_dtype(torch.float64)`` scalar states are float64, and nothing is
    rounded.

    Example:
        >>> round_to_state_dtype(0.1)
        0.10000000149011612
    """
    # "stored" is its name in the graph. Comments of generated kernels have it, so their hashes
    # depend on it.
    implementations = (_round_number, _round_array, _round_tensor)
    return _apply("stored", implementations, x)


#: The former name of :func:`round_to_state_dtype`.
stored = round_to_state_dtype


def bitcast_u32(x: Value) -> UInt32:
    """Read the bits of a float32 as a uint32.

    This and the three functions below are for formats, which choose bits. A rule may not use them.

    Example:
        >>> hex(bitcast_u32(torch.tensor(1.0)).item())
        '0x3f800000'
    """
    if isinstance(x, Expr):
        return x.trace.apply("bitcast_u32", x)
    return x.view(torch.int32).to(torch.int64) & _UINT32_MAX


def bitcast_f32(w: UInt32) -> Value:
    """Read a uint32 as the bits of a float32.

    Example:
        >>> bitcast_f32(torch.tensor(0x3F800000)).item()
        1.0
    """
    if isinstance(w, Expr):
        return w.trace.apply("bitcast_f32", w)
    return _signed(w).to(torch.int32).view(torch.float32)


def i32_to_f32(w: UInt32) -> Value:
    """Convert a uint32, read as an int32 in two's complement, to a float32.

    Example:
        >>> i32_to_f32(torch.tensor([3, 2**32 - 1])).tolist()
        [3.0, -1.0]
    """
    if isinstance(w, Expr):
        return w.trace.apply("i32_to_f32", w)
    return _signed(w).to(torch.float32)


def f32_to_i32(x: Value) -> UInt32:
    """Truncate a number below 2**31 in size to an int32, returned as the uint32 of its bits.

    Example:
        >>> f32_to_i32(torch.tensor([3.75, -1.0])).tolist()
        [3, 4294967295]
    """
    if isinstance(x, Expr):
        return x.trace.apply("f32_to_i32", x)
    return x.to(torch.int64) & _UINT32_MAX


def ema(average: Value, value: Value, beta: Value) -> Value:
    """Return one step of a moving average: ``beta * average + (1 - beta) * value``.

    Computed as the nearer end plus a fraction of the difference, so that the two weights sum to
    one whatever ``beta`` rounds to: with 0.999 and 0.001 each rounded to float32 an average of
    squares ends up 1.3e-5 too large. An average that has overflowed stays infinite.

    Args:
        average: the average so far.
        value: the value it moves towards.
        beta: the weight of the average so far, uniform, in [0, 1].

    Example:
        >>> ema(8.0, 4.0, 0.75)
        7.0
    """
    near = beta >= 0.5
    difference = value - finite(average)
    return where(near, average, value) + difference * where(near, 1 - beta, -beta)


def decay(h: Any, p: Value, g: Value) -> tuple[Value, Value]:
    """Apply weight decay in one of its two forms, chosen by ``h.decoupled_weight_decay``.

    L2 adds ``weight_decay * p`` to the gradient. Decoupled decay leaves the gradient alone and
    takes ``lr * weight_decay * p`` off the parameter together with the rule's own step, as in
    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2, line 12
    (with torch.optim's parametrization, in which ``lr`` multiplies the decay as well).

    Args:
        h: hyperparameters ``lr``, ``weight_decay``, ``decoupled_weight_decay``.
        p: the parameter.
        g: its gradient.

    Returns:
        The gradient for the rule to use, and a term to subtract from the parameter with its step.

    Example:
        >>> from types import SimpleNamespace
        >>> h = SimpleNamespace(lr=0.5, weight_decay=0.25, decoupled_weight_decay=False)
        >>> decay(h, p=8.0, g=1.0)
        (3.0, 0.0)
        >>> h.decoupled_weight_decay = True
        >>> decay(h, p=8.0, g=1.0)
        (1.0, 1.0)
    """
    if h.decoupled_weight_decay:
        return g, h.lr * h.weight_decay * p
    return g + h.weight_decay * p, 0.0


_UINT32_MAX = 2**32 - 1


def _signed(w: torch.Tensor) -> torch.Tensor:
    """Read a uint32 as an int32 in two's complement."""
    return (w ^ 2**31) - 2**31


def _wrapped(operation: Callable[..., UInt32]) -> Callable[..., UInt32]:
    return lambda *operands: operation(*operands) & _UINT32_MAX


def _number_sqrt(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan


def _number_exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _number_log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _number_sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def _number_maximum(x: float, y: float) -> float:
    return (x if x != x or x >= y else y) + 0.0


def _number_minimum(x: float, y: float) -> float:
    return (x if x != x or x <= y else y) + 0.0


def _number_where(condition: bool, x: Value, y: Value) -> Value:
    return x if condition else y


def _number_finite(x: float) -> float:
    return x if x != x else min(max(x, -sys.float_info.max), sys.float_info.max)


def _round_number(x: float) -> float:
    return x if scalar_dtype() == torch.float64 else to_float32(x)


def to_float32(x: float) -> float:
    """Return the nearest float32 of a number.

    Example:
        >>> to_float32(0.1), to_float32(-1e39)
        (0.10000000149011612, -inf)
    """
    try:
        return float(_FLOAT32.unpack(_FLOAT32.pack(x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


_FLOAT32 = struct.Struct("f")


def _array_sign(x: Value) -> Value:
    return np.where(np.isnan(x), 0.0, np.sign(x))


def _array_maximum(x: Value, y: Value) -> Value:
    return np.maximum(x, y) + 0.0


def _array_minimum(x: Value, y: Value) -> Value:
    return np.minimum(x, y) + 0.0


def _tensor_maximum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, y) + 0.0


def _tensor_minimum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.minimum(x, y) + 0.0


def _array_finite(x: Value) -> Value:
    largest = np.finfo(np.result_type(x)).max
    return np.clip(x, -largest, largest)


def _round_array(x: Value) -> Value:
    return np.asarray(x).astype(scalar_numpy_dtype()).astype(np.float64)


def _tensor_where(condition: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(condition.to(torch.bool), x, y)


def _tensor_finite(x: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(x.dtype).max
    return torch.clamp(x, -largest, largest)


def _round_tensor(x: torch.Tensor) -> torch.Tensor:
    return x.to(scalar_dtype()).to(x.dtype)


def scalar_dtype() -> torch.dtype:
    """Return the dtype of scalar states and step counts: torch.optim's choice."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def scalar_numpy_dtype() -> type[np.floating[Any]]:
    """Return :func:`scalar_dtype` as numpy's type."""
    return np.float64 if scalar_dtype() == torch.float64 else np.float32


def _each(function: Callable[..., float]) -> Callable[..., Any]:
    """Return a function of arrays that applies a function of numbers to each element.

    numpy's own vector forms of transcendental functions round differently from one instruction
    set to the next; the C library's do not. Equal operands, the usual case, are computed once.
    """
    remembered = functools.lru_cache(maxsize=256)(function)

    def on_arrays(*operands: Value) -> Any:
        columns = np.broadcast_arrays(*operands)
        shape = columns[0].shape
        if columns[0].size and all((column == column.flat[0]).all() for column in columns):
            return np.full(shape, function(*(float(column.flat[0]) for column in columns)))
        values = [remembered(*row) for row in zip(*(c.flat for c in columns), strict=True)]
        return np.array(values, dtype=np.float64).reshape(shape)

    return on_arrays


def _number_power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
    except ValueError:  # 0 to a negative power, or a root of a negative number
        return math.inf if base == 0 else math.nan


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, torch.Tensor) or isinstance(exponent, torch.Tensor):
        return base**exponent
    if isinstance(base, np.ndarray) or isinstance(exponent, np.ndarray):
        return _array_power(base, exponent)
    return _number_power(base, exponent)


_array_power = _each(_number_power)


def _divide(x: Value, y: Value) -> Value:
    if isinstance(y, float) and isinstance(x, float):
        return _number_divide(x, y)
    return x / y


def _number_divide(x: float, y: float) -> float:
    if y == 0:  # where Python raises
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return x / y


#: The function of numbers, arrays and tensors for each operation of the graph.
VOCABULARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "neg": operator.neg,
    "abs": abs,
    "pow": _power,
    "sqrt": sqrt,
    "exp": exp,
    "log": log,
    "sign": sign,
    "maximum": maximum,
    "minimum": minimum,
    "finite": finite,
    "where": where,
    "stored": round_to_state_dtype,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "ne": operator.ne,
    "u32_add": _wrapped(operator.add),
    "u32_sub": _wrapped(operator.sub),
    "u32_mul": _wrapped(operator.mul),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift_left": _wrapped(operator.lshift),
    "shift_right": operator.rshift,
    "bitcast_u32": bitcast_u32,
    "bitcast_f32": bitcast_f32,
    "i32_to_f32": i32_to_f32,
    "f32_to_i32": f32_to_i32,
}

#: The same for numbers alone, without looking at what the operands are.
NUMBERS: dict[str, Callable[..., Any]] = VOCABULARY | {
    "div": _number_divide,
    "pow": _number_power,
    "sqrt": _number_sqrt,
    "exp": _number_exp,
    "log": _number_log,
    "sign": _number_sign,
    "maximum": _number_maximum,
    "minimum": _number_minimum,
    "finite": _number_finite,
    "where": _number_where,
    "stored": _round_number,
}
