"""Step a chunk of parameters on a CPU by torch's operations, in memory that stays in the cache.

New memory costs more than an operation: the system clears it, page by page. So a result is written
over a tensor that nothing reads again: an intermediate value, or a parameter or state that gets a
new value anyway. Small parameters are joined, as an operation on a tensor takes a microsecond
whatever its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from stepforge.backends.batch import Batch
from stepforge.backends.exact import choose, correct_sqrt
from stepforge.ops import VOCABULARY
from stepforge.program import Instruction, Program
from stepforge.state.sharding import is_plain

__all__ = ["ELEMENTS", "Scratch", "run", "takes"]

#: Elements of a chunk. With 2**16 to 2**19 small parameters measure the same; large ones take 1.3,
#: 1.1, 1.0 and 1.0 of the time.
ELEMENTS = 2**18

# torch's functions have no annotations.
_flatten: Callable[[list[torch.Tensor]], torch.Tensor] = _flatten_dense_tensors
_unflatten: Callable[[torch.Tensor, list[torch.Tensor]], Sequence[torch.Tensor]] = (
    _unflatten_dense_tensors
)


class Scratch:
    """Memory for intermediate values, which a chunk leaves to the next.

    Attributes:
        like: a tensor of the shape and dtype of the values.
    """

    def __init__(self) -> None:
        self.like = torch.empty(0, device="cpu")
        self._tensors: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []

    def reset(self, like: torch.Tensor) -> None:
        """Prepare for values like a tensor; those of before are lost."""
        if like.shape != self.like.shape or like.dtype != self.like.dtype:
            # Memory that numpy has seen cannot grow.
            large = [x for x in self._tensors if x.untyped_storage().nbytes() >= like.nbytes]
            self._tensors = [x.resize_(like.shape) for x in large if x.dtype == like.dtype]
        self.like = like
        self._free = self._tensors.copy()

    def take(self) -> torch.Tensor:
        """Return a tensor to write to."""
        if not self._free:
            self._free = [torch.empty(self.like.shape, dtype=self.like.dtype, device="cpu")]
            self._tensors += self._free
        return self._free.pop()

    def give(self, tensor: torch.Tensor) -> None:
        """Receive a tensor that nothing reads again."""
        self._free.append(tensor)


def takes(batch: Batch) -> bool:
    """Return True for plain tensors on a CPU, and coefficients that are numbers."""
    tensors = itertools.chain.from_iterable(batch.columns.values())
    numbers = not any(isinstance(c, (torch.Tensor, list)) for c in batch.coefficients)
    return batch.device.type == "cpu" and numbers and all(map(is_plain, tensors))


def run(batch: Batch, scratch: Scratch, *, in_place: bool) -> None:
    """Step the parameters of a chunk.

    Args:
        batch: the parameters; all plain tensors, with the same coefficients.
        scratch: memory for intermediate values.
        in_place: write intermediate values to parameters and states, too. No two may overlap.
    """
    program, names = batch.spec.graph.varying, batch.spec.graph.results
    columns = {name: batch.read_all(name) for name in program.inputs}
    is_joined = len(batch) > 1
    if is_joined:
        inputs = {name: _flatten(column) for name, column in columns.items()}
        overwrite = set(inputs)
    else:
        inputs = {name: x for name, (x,) in columns.items()}
        stored = {name for name in names if _is_stored(inputs.get(name), name, batch)}
        # numpy does not write to a lazy negation.
        overwrite = {name for name in stored if in_place and not inputs[name].is_neg()}
    scratch.reset(next(iter(inputs.values())))
    results = _evaluate(program, inputs, overwrite, batch.coefficients, scratch)
    # Storing one result must not change another.
    results = [
        result.clone() if any(result is inputs[n] for n in inputs if n != name) else result
        for name, result in zip(names, results)
    ]
    for name, result in zip(names, results):
        if is_joined:
            batch.store_all(name, list(_unflatten(result, batch.columns["p"])))
        elif not _is_stored(result, name, batch):
            batch.store(name, 0, result)


def _is_stored(x: torch.Tensor | None, name: str, batch: Batch) -> bool:
    """Return True if a tensor is the only one of a column itself."""
    return name in batch.columns and x is batch.columns[name][0]


def _evaluate(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    overwrite: Collection[str],
    coefficients: Sequence[Any],
    scratch: Scratch,
) -> list[torch.Tensor]:
    """Return the results of a program. Each may be an input.

    Args:
        program: the program.
        inputs: its inputs, of one shape and dtype.
        overwrite: the names of the inputs that may be overwritten.
        coefficients: the numbers that it is given.
        scratch: memory for intermediate values.
    """
    registers = program.registers(inputs, coefficients)
    # The registers whose tensor may be overwritten, and is in no other register.
    owned = {register for register, name in enumerate(program.inputs) if name in overwrite}
    for instruction in program.instructions:
        op, out = instruction.op, instruction.out
        args = [registers[register] for register in instruction.args]
        if op in WRITERS:
            ending = [registers[register] for register in instruction.last if register in owned]
            registers[out] = WRITERS[op](*args, out=ending[0] if ending else scratch.take())
            owned.add(out)
        elif op == "where":
            condition, x, y = args
            registers[out] = choose(condition, x, y, scratch.like, scratch.like.dtype)
            _pass_on(owned, instruction, registers)
        else:
            registers[out] = VOCABULARY[op](*args)
        for register in instruction.last:
            if register in owned and registers[register] is not registers[out]:
                scratch.give(registers[register])
            registers[register] = None
    return [registers[register] for register in program.outputs]


def _pass_on(owned: set[int], choice: Instruction, registers: Sequence[Any]) -> None:
    """Pass the tensor that was chosen on to the register of the choice, or share it with that."""
    for source in choice.args[1:]:
        if source in owned and registers[source] is registers[choice.out]:
            owned.remove(source)
            if source in choice.last:
                owned.add(choice.out)


def _as_tensor(x: Any, like: torch.Tensor) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=like.dtype, device="cpu")


def _of_two(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function whose first operand may be a number, too."""

    def write(x: Any, y: Any, out: torch.Tensor) -> torch.Tensor:
        return function(_as_tensor(x, out), y, out=out)

    return write


def _with_positive_zeros(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return +0 for any zero: torch's choice between 0 and -0 depends on the length."""

    def write(x: Any, y: Any, out: torch.Tensor) -> torch.Tensor:
        return function(_as_tensor(x, out), _as_tensor(y, out), out=out).add_(0.0)

    return write


def _finite(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(x.dtype).max
    return torch.clamp(x, -largest, largest, out=out)


#: The operations that write their result to a given tensor, which may be an operand.
WRITERS: dict[str, Callable[..., torch.Tensor]] = {
    "add": _of_two(torch.add),
    "sub": _of_two(torch.sub),
    "mul": _of_two(torch.mul),
    "div": _of_two(torch.div),
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": correct_sqrt,
    "sign": torch.sign,
    "maximum": _with_positive_zeros(torch.maximum),
    "minimum": _with_positive_zeros(torch.minimum),
    "finite": _finite,
}
