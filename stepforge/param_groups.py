"""Param groups of a model: parameters chosen by their names and by the classes of their modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from stepforge.hyperparameter import Hyperparameter, Interval

__all__ = ["param_groups"]

_Entry: TypeAlias = str | type[torch.nn.Module]
# Keys are entries: type checkers would refuse a dict of strings alone as a mapping of both kinds.
_Scale: TypeAlias = Mapping[Any, float] | Callable[[str], float]

#: Words with a meaning of their own. They are never misspelt, so a model may have nothing for them.
_BIAS, _NORM = "bias", "norm"
#: The names under which wrappers hold the module that they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_NORM_CLASS = re.compile(r"Norm(\d+d)?$")
_LETTER = r"[^\W\d_]"


def param_groups(
    model: torch.nn.Module,
    *,
    weight_decay: float,
    no_decay: Iterable[str | type[torch.nn.Module]] = ("bias", "norm"),
    lr: float | None = None,
    lr_scale: _Scale | None = None,
) -> list[dict[str, Any]]:
    """Return the param groups of a model, for any optimizer of this library or of torch.optim.

    Every parameter is in one group, under its name, so checkpoints have the names and are loaded
    by them. A parameter that modules share counts once, under its first name, and an entry matches
    it by any of its names. Frozen parameters are in groups too, as in ``model.parameters()``: no
    step changes them, and they train once they are unfrozen.

    An entry of ``no_decay`` or ``lr_scale`` matches parameters by:

    - ``"bias"``: their own name, with the word ``bias``: ``fc.bias``, ``attn.in_proj_bias``.
    - ``"norm"``: the layer that holds them directly, which is a normalization layer if the name of
      its class or of a base class ends in ``Norm``, ``Norm1d``, ``Norm2d`` or ``Norm3d``, or if its
      own name or theirs has the word ``norm``.
    - any other string: their full name, which has the string as whole words. ``*`` stands for any
      characters. Words end at dots, underscores and digits: ``head`` matches ``lm_head.weight`` and
      not ``multihead.weight``; ``layers.1`` does not match ``layers.10.weight``.
    - a class of modules: any module of the class that holds them, directly or in a submodule.

    Args:
        model: the model. Wrappers leave no trace in names: those of ``torch.compile``,
            DistributedDataParallel, DataParallel, FSDP1 and activation checkpoints.
        weight_decay: the weight decay of all parameters but those of ``no_decay``, from 0 up.
        no_decay: the entries of parameters without weight decay.
        lr: the learning rate, from 0 up. By default groups have none, and take the optimizer's.
        lr_scale: factors of ``lr``, from 0 up: a mapping from entries, of which the first one that
            matches counts, and 1 for all other parameters; or a function that returns the factor
            of a name.

    Returns:
        Groups with ``"name"``, ``"params"`` (pairs of name and parameter), ``"weight_decay"`` and,
        if ``lr`` is given, ``"lr"``. None is empty. The one with the largest factor comes first,
        and of two with the same factor the one that decays.

    Raises:
        ValueError: a number is out of its range; an entry matches no parameter, or in ``lr_scale``
            none that earlier entries leave; ``lr_scale`` is given without ``lr``; the model has
            flat vectors of FSDP1, which hide names.
        TypeError: something is of the wrong kind.

    Example:
        >>> from stepforge import AdamW
        >>> model = torch.nn.TransformerEncoderLayer(8, nhead=2)
        >>> groups = param_groups(model, weight_decay=0.1, lr=1e-3, lr_scale={"self_attn": 0.5})
        >>> for group in AdamW(groups).param_groups:
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        decay 0.001 0.1 2
        no_decay 0.001 0.0 6
        decay_lr*0.5 0.0005 0.1 2
        no_decay_lr*0.5 0.0005 0.0 2
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    weight_decay = _number("weight_decay", weight_decay)
    if lr is not None:
        lr = _number("lr", lr)
    elif lr_scale is not None:
        raise ValueError("lr_scale needs lr, the learning rate that it scales, but lr is None")
    entries = _checked_entries("no_decay", no_decay)

    params = _places(model)
    undecayed = {p for entry in entries for p in _matched("no_decay", entry, params)}
    factors = {} if lr_scale is None else _factors(lr_scale, params)

    members: dict[tuple[float, bool], list[tuple[str, torch.Tensor]]] = {}
    for p, places in params.items():
        kind = (factors.get(p, 1.0), p not in undecayed)
        members.setdefault(kind, []).append((places[0].name, p))
    return [
        {
            "name": ("decay" if decays else "no_decay")
            + ("" if factor == 1 else f"_lr*{factor:.12g}"),
            "params": members[factor, decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        | ({} if lr is None else {"lr": lr * factor})
        for factor, decays in sorted(members, reverse=True)
    ]


@dataclass(frozen=True)
class _Place:
    """One name of a parameter, and the modules around it.

    Attributes:
        name: the name in the model without wrappers.
        modules: the modules that hold it, from the model to its own.
    """

    name: str
    modules: Sequence[torch.nn.Module]

    def matches(self, entry: _Entry) -> bool:
        """Return True if an entry of the user matches the parameter here."""
        if isinstance(entry, type):
            return any(isinstance(module, entry) for module in self.modules)
        if entry == _BIAS:
            return _has_words(entry, self._last(1))
        if entry == _NORM:
            classes = type(self.modules[-1]).__mro__
            is_norm = any(_NORM_CLASS.search(cls.__name__) for cls in classes)
            return is_norm or _has_words(entry, self._last(2))
        return _has_words(entry, self.name)

    def _last(self, count: int) -> str:
        return ".".join(self.name.split(".")[-count:])


_Places: TypeAlias = Mapping[torch.Tensor, Sequence[_Place]]


def _places(model: torch.nn.Module) -> _Places:
    """Return all places of each parameter, in the order of ``model.named_parameters()``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[torch.Tensor, list[_Place]] = {}
    for path, module in modules.items():
        for own_name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if own_name == "_flat_param":
                raise ValueError(
                    "FullyShardedDataParallel hides the names of parameters in its flat vectors: "
                    "give it use_orig_params=True, or use fully_shard"
                )
            keys = path.split(".") if path else []
            around = [modules[".".join(keys[:depth])] for depth in range(len(keys) + 1)]
            names = [key for key, parent in zip(keys, around) if not _is_wrapped(key, parent)]
            found.setdefault(p, []).append(_Place(".".join([*names, own_name]), around))
    return found


def _is_wrapped(key: str, parent: torch.nn.Module) -> bool:
    """Return True if a child is the module that its parent wraps."""
    data_parallel = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    return key in _WRAPPED or (key == "module" and isinstance(parent, data_parallel))


def _has_words(pattern: str, name: str) -> bool:
    """Return True if a pattern stands in a name as whole words or numbers."""
    inner = ".*".join(map(re.escape, pattern.split("*")))
    return re.search(f"(?<!{_alike(pattern[0])}){inner}(?!{_alike(pattern[-1])})", name) is not None


def _alike(character: str) -> str:
    """Return the expression for the characters that continue a word or a number."""
    return _LETTER if character.isalpha() else r"\d" if character.isdecimal() else r"[^\s\S]"


def _matched(option: str, entry: _Entry, params: _Places) -> list[torch.Tensor]:
    """Return the parameters that an entry matches.

    Raises:
        ValueError: there are none, so the entry may be misspelt.
    """
    found = [p for p, places in params.items() if any(place.matches(entry) for place in places)]
    if found or entry in (_BIAS, _NORM):
        return found
    if isinstance(entry, str):
        must = "a string must stand in a name as whole words, in which * stands for any characters"
    else:
        must = "a module of that class must hold some"
    raise ValueError(f"{option} has the entry {_shown(entry)}, which matches no parameter: {must}")


def _factors(lr_scale: _Scale, params: _Places) -> dict[torch.Tensor, float]:
    """Return the factors of the learning rate; parameters that are left out have 1."""
    if not isinstance(lr_scale, Mapping):
        if not callable(lr_scale) or isinstance(lr_scale, type):
            raise TypeError(
                "lr_scale must be a mapping from strings and classes of modules to factors, or a "
                f"function that returns the factor of a name, but got {lr_scale!r}"
            )
        names = {p: places[0].name for p, places in params.items()}
        return {p: _number(f"lr_scale({name!r})", lr_scale(name)) for p, name in names.items()}
    factors: dict[torch.Tensor, float] = {}
    for entry in _checked_entries("lr_scale", lr_scale):
        factor = _number(f"lr_scale[{_shown(entry)}]", lr_scale[entry])
        matched = _matched("lr_scale", entry, params)
        left = [p for p in matched if p not in factors]
        if matched and not left:
            raise ValueError(
                f"lr_scale has the entry {_shown(entry)} after entries that match all of its "
                "parameters, and the first that matches counts: put it before them"
            )
        factors |= dict.fromkeys(left, factor)
    return factors


def _checked_entries(option: str, entries: object) -> list[_Entry]:
    allowed = "strings, which match names of parameters, and classes of modules"
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise TypeError(f"{option} must be a tuple of {allowed}, but got {entries!r}")
    checked: list[_Entry] = []
    for entry in entries:
        is_class = isinstance(entry, type) and issubclass(entry, torch.nn.Module)
        if not (is_class or isinstance(entry, str)):
            raise TypeError(f"{option} has the entry {entry!r}; its entries must be {allowed}")
        if entry == "":
            raise ValueError(f"{option} has the entry '', which would match every name")
        checked.append(entry)
    return checked


def _number(name: str, value: object) -> float:
    """Return a number from 0 up as a plain float, which a safe ``torch.load`` accepts."""
    return float(Hyperparameter(name, None, float, Interval()).checked(value))


def _shown(entry: _Entry) -> str:
    return repr(entry) if isinstance(entry, str) else entry.__name__
