"""Metrics of a training run, written every few steps: JSON lines, TensorBoard, or a callable.

:class:`MetricsLogger` reads ``optimizer.metrics()``, which ``telemetry=True`` fills. ``stepforge
report`` draws the JSON lines and says in words what looks wrong in them.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import numbers
import operator
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, TypeAlias, cast

import torch
from torch import Tensor

from stepforge.backends.batch import is_capturing

__all__ = ["MetricsLogger", "tensorboard"]


class _ScalarWriter(Protocol):
    """A SummaryWriter, of torch.utils.tensorboard or of another library."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...

    def flush(self) -> object: ...


#: A receiver of names and values of a step, and the step.
_Callback: TypeAlias = Callable[[dict[str, float], int], object]
_Destination: TypeAlias = str | os.PathLike[str] | TextIO | _ScalarWriter | _Callback
_By: TypeAlias = Literal["group", "parameter"]

#: The keys of a line that are no values of the user.
_RESERVED = frozenset({"step", "time", "lr", "groups", "parameters", "stochastic_rounding"})

#: The significant digits of fractions that are read from tensors: those of float32, in which most
#: of them were computed. Counts have all digits.
_DIGITS = 7


class MetricsLogger:
    """Writer of an optimizer's metrics: one line adds it to any training loop.

    After every n-th ``optimizer.step()`` it writes ``optimizer.metrics()`` and the learning rate of
    each group. It hangs on the optimizer by hooks, so it works wherever the optimizer does: in a
    loop of your own, under Lightning and under Hugging Face's Trainer. Between those steps it reads
    no tensor. A line needs one transfer per device and dtype.

    The optimizer keeps the logger alive. The file is complete after each line, and closed with
    :meth:`close`, at the end of a ``with`` block, or with the optimizer.

    Each JSON line is an object with ``"step"``, ``"time"`` (seconds since 1970), ``"lr"`` (a list
    with a number per group), the metrics and your own values. ``"groups"`` is a list of objects,
    and ``"parameters"`` an object of objects, by name. A number that is not finite is ``null``,
    since JSON has no NaN; a missing key means that nothing was measured. ``"stochastic_rounding"``
    is ``true`` if a group uses it.

    A path is opened to append, so that a resumed run continues its file. The first step follows the
    step counts in the optimizer's state, so numbers go on after a checkpoint; then each call of
    ``step()`` counts, skipped ones too. Set ``step`` to number them otherwise.

    With several processes, make a logger in each, as they put sharded values together. Only the one
    of rank 0 opens files and writes.

    An ``OSError`` while writing, as on a full disk, must not end the training: the logger warns and
    stops. Other errors are raised, after the step. A CUDA graph replays no hooks, so call the
    logger yourself there.

    Args:
        optimizer: an optimizer that was made with ``telemetry``.
        to: where to write: a path or an open text file for JSON lines; a SummaryWriter (see
            :func:`tensorboard`); or a callable that takes a dict of names and floats, and the step,
            such as ``wandb.log``, ``mlflow.log_metrics`` or ``log_metrics`` of a Lightning logger.
            A list or tuple names several.
        every: write steps that are a multiple of this.
        by: ``"parameter"`` to write the metrics of each parameter too, ``"group"`` those of each
            group; or both, or ``()`` for the totals alone. Without ``telemetry`` only ``()`` is
            possible: what is known of clipping and skipping is written.
        hook: False to write only when the logger is called.

    Attributes:
        step: the number of the last step; None before the first one after construction or loading.

    Raises:
        TypeError: something is of the wrong kind.
        ValueError: ``every`` is not at least 1; ``by`` is unknown, or is not ``()`` for an
            optimizer without ``telemetry``; or a metric has a name that every line has.
        OSError: the file cannot be opened.

    Example:
        >>> from stepforge import AdamW
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamW(model.named_parameters(), telemetry=True)
        >>> file = io.StringIO()  # or a path
        >>> log = MetricsLogger(optimizer, to=file, every=10)
        >>> for inputs in torch.ones(20, 8, 2):
        ...     optimizer.zero_grad()
        ...     loss = model(inputs).square().mean()
        ...     loss.backward()
        ...     log.note(loss=loss)
        ...     optimizer.step()
        >>> last = json.loads(file.getvalue().splitlines()[-1])
        >>> last["step"], last["loss"] > 0, list(last["parameters"])
        (20, True, ['weight', 'bias'])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        to: _Destination | Sequence[_Destination],
        *,
        every: int = 1,
        by: _By | Iterable[_By] = ("parameter",),
        hook: bool = True,
    ) -> None:
        if not callable(getattr(optimizer, "metrics", None)):
            raise TypeError(
                f"MetricsLogger needs an optimizer with metrics(), as those of stepforge have; "
                f"{type(optimizer).__name__} has none"
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, but got {every!r}")
        self._by = (by,) if isinstance(by, str) else tuple(by)
        for name in self._by:
            if name not in ("group", "parameter"):
                raise ValueError(f"by takes 'group' and 'parameter', but got {name!r}")
        _check_telemetry(optimizer, self._by)
        self._optimizer = optimizer
        self._every = every
        self._noted: dict[str, float | Tensor] = {}
        self.step: int | None = None
        chosen = list(to) if isinstance(to, (list, tuple)) else [to]
        self._sinks = _sinks(cast(list[_Destination], chosen)) if _is_rank_0() else []
        self._hooks = self._hook_into(optimizer) if hook else []
        # Not bound to self, which must be free to die. It also runs at the interpreter's exit.
        self._finalizer = weakref.finalize(self, _close, self._sinks, self._hooks)

    def _hook_into(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        return [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        ]

    def note(self, **values: float | Tensor) -> None:
        """Keep values for the line of the next step, such as the loss.

        Call it before ``optimizer.step()``, in every step: tensors are read only for lines that are
        written. The last value of each name counts. A closure's loss is noted by itself.

        Args:
            values: numbers or tensors of one element.

        Raises:
            TypeError: a value is neither.
            ValueError: a name is one that every line has, such as ``lr``.
        """
        self._noted |= {name: _checked(name, value) for name, value in values.items()}

    def __call__(self, step: int, **values: float | Tensor) -> None:
        """Write a line now if the step is due, for a logger that was made with ``hook=False``.

        Call it after ``optimizer.step()``. Errors are raised, ``OSError`` included.

        Args:
            step: the number of the step.
            values: numbers or tensors of one element, as for :meth:`note`.

        Raises:
            RuntimeError: the logger writes by itself, and would write the step twice.
        """
        if self._hooks:
            raise RuntimeError(
                "this MetricsLogger writes after optimizer.step() by itself: hand values to "
                "note(...) before the step, or make it with hook=False"
            )
        self.note(**values)
        self.step = int(step)
        if self.step % self._every == 0:
            self._write()
        self._noted.clear()

    def close(self) -> None:
        """Take the hooks off the optimizer, and close the file if the logger opened it.

        SummaryWriters and files that were given stay open, and are flushed.
        """
        self._finalizer()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Wrap the closure, if there is one, so that its loss is noted."""
        _call_outside_graph(self._find_step)
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._noting(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._noting(kwargs["closure"])}
        return None

    def _noting(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def noting_closure() -> Any:
            loss = closure()
            if _is_number(loss):  # trainers return whatever they like
                self.note(loss=loss)
            return loss

        return noting_closure

    def _find_step(self) -> None:
        # Before the step: after it, a step that was skipped looks like the one before it.
        if self.step is None and not is_capturing():
            self.step = _steps_of(self._optimizer)

    def _after_step(self, _: torch.optim.Optimizer, __: object, ___: object) -> None:
        _call_outside_graph(self._count)

    def _count(self) -> None:
        if is_capturing():
            return
        self.step = (self.step or 0) + 1
        if self.step % self._every == 0:
            try:
                self._write()
            except OSError as error:
                self.close()
                warnings.warn(
                    f"MetricsLogger stops at step {self.step}, and training goes on: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._noted.clear()

    def _after_loading(self, _: torch.optim.Optimizer) -> None:
        self.step = None

    def _write(self) -> None:
        optimizer = self._optimizer
        metrics = cast(Any, optimizer).metrics
        groups = optimizer.param_groups
        line: dict[str, Any] = {
            "step": self.step,
            "time": round(time.time(), 3),
            "lr": [group["lr"] for group in groups if "lr" in group],
            **metrics(),
            **self._noted,
        }
        if any(group.get("stochastic_rounding") for group in groups):
            line["stochastic_rounding"] = True
        if "group" in self._by:
            line["groups"] = [dict(values) for values in metrics(by="group")]
        if "parameter" in self._by:
            line["parameters"] = _by_name(metrics(by="parameter"), groups)
        tensors = list(_tensors(line))
        if self._sinks:
            _replace_by_numbers(tensors)
            for sink in self._sinks:
                sink.write(line)


def tensorboard(folder: str | os.PathLike[str] | None = None) -> Any:
    """Return a SummaryWriter for TensorBoard, to hand to :class:`MetricsLogger`.

    As in ``MetricsLogger(optimizer, to=tensorboard("runs/first"), every=10)``.

    Args:
        folder: the folder of the run; ``runs/`` and the time if None.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise  # it is installed, but broken
        raise ModuleNotFoundError(
            "stepforge.logging.tensorboard needs tensorboard: pip install tensorboard"
        ) from None
    make: Callable[..., Any] = SummaryWriter
    return make(None if folder is None else os.fspath(folder))


def _check_telemetry(optimizer: torch.optim.Optimizer, by: Sequence[_By]) -> None:
    """Raise if an optimizer of this library does not measure what is asked for."""
    control = getattr(optimizer, "_control", None)
    if control is None:
        return
    if by and not control.metrics:
        raise ValueError(
            f"MetricsLogger writes metrics by {' and '.join(by)}, which {type(optimizer).__name__} "
            "computes only with telemetry=True; by=() writes what is known without"
        )
    for name in control.metrics:
        _check_name(name)


# Values.


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )


def _checked(name: str, value: float | Tensor) -> float | Tensor:
    """Return a value of the user without its graph, which must not outlive the step."""
    _check_name(name)
    if not _is_number(value):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a number or a tensor of one element, but got {got}")
    if isinstance(value, Tensor):
        return value.detach()
    return operator.index(value) if hasattr(value, "__index__") else float(value)


def _check_name(name: str) -> None:
    if name in _RESERVED:
        raise ValueError(f"{name!r} is written by the logger: choose another name")


def _steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Return the steps of the parameter that was stepped most often; 0 if none counts its steps.

    It is asked once, as reading a step count on a device waits.
    """
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _call_outside_graph(function: Callable[[], None]) -> None:
    """Call a function so that a compiler, if one is at work, leaves it out of its graph."""
    if torch.compiler.is_compiling():
        torch.compiler.disable(function)()  # type: ignore[no-untyped-call]
    else:
        function()


def _by_name(
    metrics: Mapping[str | int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each parameter, with its learning rate if groups have several.

    Parameters without names have numbers, which go on from group to group.
    """
    named = {str(name): dict(values) for name, values in metrics.items()}
    rates = [group.get("lr") for group in groups]
    if any(rate is not rates[0] and rate != rates[0] for rate in rates):
        numbered = itertools.count()
        for group in groups:
            numbers_ = [next(numbered) for _ in group["params"]]
            for name in group.get("param_names", numbers_):
                if str(name) in named:
                    named[str(name)]["lr"] = group.get("lr")
    return named


_Place: TypeAlias = "tuple[dict[str, Any] | list[Any], Any]"


def _tensors(line: dict[str, Any]) -> Iterator[tuple[_Place, Tensor]]:
    """Yield the tensors in a line, each with its container and key. Shards are put together."""
    pending: list[dict[str, Any] | list[Any]] = [line]
    while pending:
        container = pending.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, (dict, list)):
                pending.append(value)
            elif isinstance(value, Tensor):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                yield (container, key), whole.detach()


def _replace_by_numbers(tensors: Iterable[tuple[_Place, Tensor]]) -> None:
    """Put numbers in the places of tensors. Each device and dtype takes one transfer."""
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[_Place, Tensor]]] = {}
    for place, tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append((place, tensor))
    for found in alike.values():
        values = torch.stack([tensor.reshape(()) for _, tensor in found]).tolist()
        for ((container, key), _), value in zip(found, values):
            container[key] = _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float:
    is_count = value.is_integer() and abs(value) < 2**53
    return value if is_count else float(f"{value:.{_DIGITS}g}")


# Destinations.


class _Sink(Protocol):
    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class _JsonLines:
    """A text file of JSON lines.

    Attributes:
        file: the file.
        is_own: True if it was opened here.
    """

    file: TextIO
    is_own: bool

    def write(self, line: dict[str, Any]) -> None:
        text = json.dumps(_without_nonfinite(line), allow_nan=False, separators=(",", ":"))
        self.file.write(text + "\n")
        self.file.flush()  # a run that is killed leaves whole lines

    def close(self) -> None:
        if self.is_own:
            self.file.close()
        elif not self.file.closed:
            self.file.flush()


@dataclass
class _Scalars:
    """A SummaryWriter."""

    writer: _ScalarWriter

    def write(self, line: dict[str, Any]) -> None:
        for name, value in _flat(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.flush()


@dataclass
class _Calls:
    """A callable."""

    callback: _Callback

    def write(self, line: dict[str, Any]) -> None:
        self.callback(_flat(line), line["step"])

    def close(self) -> None:
        pass


def _sinks(chosen: Iterable[_Destination]) -> list[_Sink]:
    """Return writers to destinations. If one is refused, files that were opened are closed."""
    sinks: list[_Sink] = []
    try:
        for destination in chosen:
            sinks.append(_sink(destination))
    except BaseException:
        _close(sinks, [])
        raise
    return sinks


def _sink(destination: Any) -> _Sink:
    if isinstance(destination, (str, os.PathLike)):
        return _JsonLines(_opened(Path(destination)), is_own=True)
    if callable(getattr(destination, "add_scalar", None)):
        return _Scalars(destination)
    if callable(getattr(destination, "write", None)):
        if isinstance(destination, (io.RawIOBase, io.BufferedIOBase)):
            raise TypeError("the file of a MetricsLogger must be open for text, not for bytes")
        return _JsonLines(destination, is_own=False)
    if callable(destination):
        return _Calls(destination)
    raise TypeError(
        "a MetricsLogger writes to a path, an open text file, a SummaryWriter or a callable, but "
        f"got {destination!r}"
    )


def _opened(path: Path) -> TextIO:
    """Open a file to append. A line that a killed run has left without its end is ended."""
    is_torn = False
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            is_torn = file.read() != b"\n"
    opened = path.open("a", encoding="utf-8")
    if is_torn:
        opened.write("\n")
    return opened


def _close(sinks: list[_Sink], hooks: list[Any]) -> None:
    """Close all of them, whatever one raises, and empty the lists, so nothing is written later."""
    while hooks:
        hooks.pop().remove()
    while sinks:
        try:
            sinks.pop().close()
        except OSError as error:
            warnings.warn(f"MetricsLogger could not close its file: {error}", stacklevel=3)


def _is_rank_0() -> bool:
    """Return True if this process is alone, or the first of several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # torchrun sets it before there is a process group


def _without_nonfinite(value: Any) -> Any:
    """Return a copy with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by name. A metric's name comes first, as TensorBoard groups so.

    Example:
        >>> _flat({"step": 3, "time": 0.5, "lr": [0.1], "parameters": {"w": {"lost": 0.2}}})
        {'lr': 0.1, 'lost/w': 0.2}
    """
    flat: dict[str, float] = {}
    rates = line["lr"]
    for index, rate in enumerate(rates):
        flat["lr" if len(rates) == 1 else f"lr/group_{index}"] = float(rate)
    for name, value in line.items():
        if name not in _RESERVED:
            flat[name] = float(value)
    for index, metrics in enumerate(line.get("groups", ())):
        for name, value in metrics.items():
            flat[f"{name}/group_{index}"] = float(value)
    for parameter, metrics in line.get("parameters", {}).items():
        for name, value in metrics.items():
            flat[f"{name}/{parameter}"] = float(value)
    return flat
