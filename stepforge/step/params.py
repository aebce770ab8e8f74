"""The parameters of a step: each one with a gradient, checked before anything changes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from stepforge.backends import Choice, KernelSpec, ParamSpec, choose
from stepforge.hyperparameter import is_off
from stepforge.program import Graph
from stepforge.rule import Rule
from stepforge.state.alike import differences, grouped, layout_differences
from stepforge.state.layout import StateLayout, StateTensor, is_flat, state_layout
from stepforge.state.sharding import is_plain, is_sharded, local, redistribute_gradient
from stepforge.state.values import completed

__all__ = [
    "ParamKind",
    "ParamStep",
    "WithGradient",
    "check_params",
    "enter_new_states",
    "kernel_spec",
    "params_with_gradient",
]

#: The index of a parameter in the optimizer, the parameter, its gradient, the options of its param
#: group, and its state, empty before the first step.
WithGradient: TypeAlias = tuple[int, torch.Tensor, torch.Tensor, Mapping[str, Any], dict[str, Any]]


@dataclass(eq=False, slots=True)
class ParamKind:
    """Parameters of a group whose tensors are alike: one check and one choice serve them all.

    Attributes:
        group: the options of their param group.
        kernel: the kernel that steps them.
        layout: the layout of their states.
        choice: the backend that serves them.
        has_device_scalars: True if scalars live on the device and must not be synchronized.
    """

    group: Mapping[str, Any]
    kernel: KernelSpec
    layout: StateLayout
    choice: Choice
    has_device_scalars: bool


@dataclass(slots=True)
class ParamStep:
    """One parameter, with everything a step needs of it.

    Attributes:
        index: its index among all parameters of the optimizer.
        p: the parameter.
        g: its gradient, coalesced if sparse.
        state: its entry in ``optimizer.state`` if that is complete, else a completed copy.
        kind: everything that it shares with the parameters like it.
    """

    index: int
    p: torch.Tensor
    g: torch.Tensor
    state: dict[str, Any]
    kind: ParamKind

    @property
    def group(self) -> Mapping[str, Any]:
        """The options of its param group."""
        return self.kind.group

    @property
    def kernel(self) -> KernelSpec:
        """The kernel that steps it."""
        return self.kind.kernel

    @property
    def layout(self) -> StateLayout:
        """The layout of its state."""
        return self.kind.layout

    @property
    def choice(self) -> Choice:
        """The backend that serves it."""
        return self.kind.choice

    @property
    def has_device_scalars(self) -> bool:
        """True if its scalars live on the device and must not be synchronized."""
        return self.kind.has_device_scalars


def params_with_gradient(
    groups: Iterable[Mapping[str, Any]], state: Mapping[Any, dict[str, Any]]
) -> Iterator[WithGradient]:
    """Yield the parameters that have a gradient, group by group, each once."""
    new: dict[str, Any] = {}  # one for all: nobody writes to it
    first = 0
    for group in groups:
        params = _distinct(group["params"])
        for index, (p, g) in enumerate(zip(params, map(_grad, params)), first):
            if g is not None:
                yield index, p, g, group, state.get(p, new)
        first += len(group["params"])


def check_params(
    rule: Rule, params: Iterable[WithGradient], *, sparse_problem: str | None
) -> list[ParamStep]:
    """Check the parameters of a step, and choose their backends. Changes nothing.

    Args:
        rule: the optimizer's rule.
        params: the parameters, those of a group together.
        sparse_problem: the error for a sparse gradient; None if the rule takes them.

    Raises:
        RuntimeError: a gradient is sparse and may not be, a gradient or a state has another shape
            or device than its parameter, or no backend can do what was asked for.
        ValueError: an option that was set by hand is none of its allowed values.
        TypeError: a parameter is neither real nor complex floating point.
    """
    checked: list[ParamStep] = []
    for _, members in itertools.groupby(params, key=lambda param: id(param[3])):
        of_group = list(members)
        group = of_group[0][3]
        _check_choices(rule, group)
        choices: _Choices = {}
        kinds = _alike(of_group)
        steps = [x for alike in kinds for x in _check_alike(rule, alike, choices, sparse_problem)]
        if len(kinds) > 1:
            steps.sort(key=operator.attrgetter("index"))
        checked += steps
    return checked


def _alike(params: Sequence[WithGradient]) -> list[Sequence[WithGradient]]:
    """Return the parameters of a group, those together that no check tells apart."""
    alike: list[Sequence[WithGradient]] = []
    for members in grouped(params, differences(_state_keys, params)):
        _, ps, gs, _, states = zip(*members)
        found = [differences(is_flat, ps), layout_differences(ps), layout_differences(gs)]
        if isinstance(states[0], dict):
            values = list(itertools.chain.from_iterable(map(_values, states)))
            count = len(states[0])
            found += [layout_differences(values[i::count]) for i in range(count)]
        alike += grouped(members, itertools.chain.from_iterable(found))
    return alike


_values = operator.methodcaller("values")


def _state_keys(param: WithGradient) -> Hashable:
    """Return the keys of a parameter's state; its identity if it is no dict."""
    state = param[-1]
    return tuple(state) if isinstance(state, dict) else id(state)


#: The kernels and backends of a group that were chosen already, by all that they depend on.
_Choices: TypeAlias = dict[Any, tuple[KernelSpec, Choice]]


def _check_alike(
    rule: Rule, alike: Sequence[WithGradient], choices: _Choices, sparse_problem: str | None
) -> Iterator[ParamStep]:
    """Check parameters that are alike, all by the first one, and complete their states."""
    indices, ps, gs, _, found = map(list, zip(*alike))
    _, p, g, group, _ = alike[0]
    layout = state_layout(rule, group, p)
    _check_gradient(p, g)
    _check_memory(p, "parameter", p)
    _check_state(p, layout, found[0])
    if g.is_sparse:
        gs = [_coalesced(g, group, sparse_problem, layout) for g in gs]
    if is_sharded(p) or is_sharded(g):
        gs = list(map(redistribute_gradient, ps, gs))
    if any(map(torch.Tensor._is_zerotensor, gs)):  # autograd's zeros without memory
        gs = [g.clone() if g._is_zerotensor() else g for g in gs]
    states = completed(layout, ps, group, found)
    if group["differentiable"] and any(state["step"].requires_grad for state in states):
        raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
    spec, choice = _choose(rule, layout, p, gs[0], group, states[0], choices)
    on_device = bool(group["capturable"]) or states[0]["step"].device.type != "cpu"
    kind = ParamKind(group, spec, layout, choice, on_device)
    return map(ParamStep, indices, ps, gs, states, itertools.repeat(kind))


def _choose(
    rule: Rule,
    layout: StateLayout,
    p: torch.Tensor,
    g: torch.Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    choices: _Choices,
) -> tuple[KernelSpec, Choice]:
    """Return the kernel and the backend of a parameter, and enter them into the choices."""
    dtypes = tuple(state[x.key].dtype for x in layout.tensors)
    formats = tuple(layout.formats.items())
    # A choice depends on nothing else: shapes, for one, do not matter.
    key = (p.dtype, g.dtype, p.device, g.layout, type(p), type(g), dtypes, formats)
    if key not in choices:
        _check_dtypes(p, g)
        graph = rule.graph(group)
        keys = [x.key for x in layout.tensors]
        own = {x.key: x.part.dtype for x in layout.tensors}
        # The layout decides: a state that was loaded in a longer dtype changes no choice.
        choice = choose(ParamSpec(p, g, group, kernel_spec(graph, layout, p, g, own)))
        choices[key] = kernel_spec(graph, layout, p, g, dict(zip(keys, dtypes))), choice
    return choices[key]


def kernel_spec(
    graph: Graph,
    layout: StateLayout,
    p: torch.Tensor,
    g: torch.Tensor | None,
    state_dtypes: Mapping[str, torch.dtype],
) -> KernelSpec:
    """Return the kernel that steps a parameter.

    Args:
        graph: the computation.
        layout: the layout of its state.
        p: the parameter.
        g: its gradient; None for one in the parameter's dtype.
        state_dtypes: the dtypes of its completed state, by key.
    """
    dtypes = {"p": p.dtype, "g": (p if g is None else g).dtype}
    dtypes |= {x.name: state_dtypes[x.key] for x in layout.tensors}
    return KernelSpec.of(graph, dtypes, layout.formats)


def enter_new_states(params: Iterable[ParamStep], state: MutableMapping[Any, Any]) -> None:
    """Enter new states into ``optimizer.state``."""
    for param in params:
        entry = state.get(param.p)
        if entry is None:
            state[param.p] = param.state
        elif entry is not param.state:
            for key in entry.keys() - param.state.keys():
                del entry[key]
            entry.update(param.state)
            param.state = entry


_grad = operator.attrgetter("grad")


def _distinct(params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parameters of a group, each once."""
    return params if len(set(map(id, params))) == len(params) else list(dict.fromkeys(params))


def _coalesced(
    g: torch.Tensor, group: Mapping[str, Any], sparse_problem: str | None, layout: StateLayout
) -> torch.Tensor:
    if sparse_problem:
        raise RuntimeError(sparse_problem)
    for format_ in layout.formats.values():
        raise RuntimeError(f"a format ({format_.name}) is not compatible with sparse gradients")
    if not is_off(group.get("weight_decay", 0)):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    return g.coalesce()


def _check_state(p: torch.Tensor, layout: StateLayout, state: Any) -> None:
    """Raise if no step can compute with a state, as when it was set by hand."""
    if not isinstance(state, dict):
        raise TypeError(
            f"optimizer.state of a parameter of shape {tuple(p.shape)} is {state!r}; it must be a "
            "dict: delete optimizer.state[p] to begin anew"
        )
    for key in filter(state.__contains__, layout.keys):
        found = state[key]
        if not isinstance(found, torch.Tensor):
            kind = repr(found)
        elif found.layout != torch.strided:
            kind = f"a tensor of layout {found.layout}"
        elif key in layout.scalars and (found.numel() != 1 or _kind(found.dtype) != "real"):
            kind = f"a tensor of shape {tuple(found.shape)} and {found.dtype}"
        else:
            continue
        wanted = "a tensor of one number" if key in layout.scalars else "a dense tensor"
        raise TypeError(
            f"a parameter of shape {tuple(p.shape)} has a state {key} that is {kind}; it must be "
            f"{wanted}: delete optimizer.state[p] to begin anew"
        )
    for tensor in layout.tensors:
        if tensor.key in state:
            _check_state_tensor(p, tensor, state[tensor.key])


def _check_state_tensor(p: torch.Tensor, tensor: StateTensor, found: torch.Tensor) -> None:
    """Raise if a state has another shape, device or kind of dtype than it must have."""
    key, part = tensor.key, tensor.part
    if found.shape != tensor.shape or _kind(found.dtype) != _kind(part.dtype):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} and {p.dtype} has a state {key} of shape "
            f"{tuple(found.shape)} and {found.dtype}, which must be of shape {tensor.shape} and "
            f"{part.dtype}: delete optimizer.state[p] to begin anew"
        )
    _check_memory(p, f"state {key}", found)
    if found.device != p.device:
        raise RuntimeError(
            f"a parameter on {p.device} has a state {key} on {found.device}: move it there, "
            "or delete optimizer.state[p] to begin anew"
        )
    if not (is_sharded(p) or is_sharded(found)):
        return
    if local(found).shape != part.shape(local(p).shape):
        raise RuntimeError(
            f"a parameter of which {tuple(local(p).shape)} is here has a state {key} of which "
            f"{tuple(local(found).shape)} is: shard it as the parameter is, or delete "
            "optimizer.state[p] to begin anew"
        )


def _check_memory(p: torch.Tensor, name: str, written: torch.Tensor) -> None:
    """Raise if torch would refuse to write to a tensor, before another one is written."""
    if not is_plain(written) or written.layout != torch.strided:
        return
    if torch._debug_has_internal_overlap(written) == 1:
        why_not = f"has strides {written.stride()}, by which elements share memory"
    elif written.is_inference() and not torch.is_inference_mode_enabled():
        why_not = "is an inference tensor, which only inference mode writes to"
    else:
        return
    raise RuntimeError(f"a {name} of shape {tuple(p.shape)} {why_not}: clone it")


def _kind(dtype: torch.dtype) -> str:
    """Return the kind of a dtype: numbers of different kinds do not replace each other."""
    if dtype.is_complex:
        return "complex"
    is_real = dtype.is_floating_point and dtype.itemsize > 1  # torch computes with no float8
    return "real" if is_real else str(dtype)


def _check_choices(rule: Rule, group: Mapping[str, Any]) -> None:
    """Raise if an option with a list of allowed values was set by hand to another."""
    for name, declared in rule.hyperparameters.items():
        if declared.choices is not None:
            declared.checked(group[name])


def _check_dtypes(p: torch.Tensor, g: torch.Tensor) -> None:
    if not (p.is_floating_point() or p.is_complex()):
        raise TypeError(
            f"a parameter of dtype {p.dtype} has a gradient; only floating point and complex "
            "parameters can be optimized"
        )
    if g.is_complex() != p.is_complex():
        raise TypeError(f"a parameter of dtype {p.dtype} has a gradient of {g.dtype}")


def _check_gradient(p: torch.Tensor, g: torch.Tensor) -> None:
    if g.device != p.device:
        raise RuntimeError(f"a parameter on {p.device} has a gradient on {g.device}")
    if g.shape != p.shape:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a gradient of {tuple(g.shape)}"
        )
