"""Distributed checkpoints: loading from any format and sharding into any other.

``torch.distributed.checkpoint.load`` copies by key: it reshards, but knows no formats. Here the
metadata of a checkpoint gives the stored format. Each process reads its own shards in that format,
and the optimizer converts them like any state dict. No process ever holds more of a state than its
own shards, except the scales of int8 rows that several processes share.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from stepforge.checkpoint.result import LoadResult
from stepforge.formats import Part
from stepforge.rule import Rule
from stepforge.state.layout import LOW_BITS, StateLayout, block_formats, state_layout
from stepforge.state.sharding import empty_part, local
from stepforge.state.values import decoded_if_cut, joined_weight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.checkpoint.storage import StorageReader


__all__ = ["load_distributed"]


def load_distributed(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    process_group: ProcessGroup | None = None,
    weights: bool = True,
    strict: bool = True,
) -> LoadResult:
    """Load a checkpoint of ``torch.distributed.checkpoint`` into model and optimizer.

    The checkpoint may be of this library or of the torch.optim twin, in any format, saved by any
    number of processes in any sharding. States are converted to the optimizer's formats; states
    that have the format already are copied bit for bit. Weights are converted with their low bits:
    a float32 weight gets all bits of one saved with ``master_weight_bits``, and a 16-bit weight
    with ``master_weight_bits`` gets all bits of a float32. All processes must call this function.
    Parameters are matched by name, whatever the param groups.

    Args:
        model: the model; plain, or sharded by FSDP2 or tensor parallel.
        optimizer: an optimizer of this library, of all or some of the model's parameters.
        checkpoint_id: the folder that was given to ``torch.distributed.checkpoint.save``. It holds
            the result of ``get_state_dict`` or ``get_optimizer_state_dict``, under any keys, with
            or without ``flatten_optimizer_state_dict``.
        storage_reader: reads the checkpoint, if it is not in a folder.
        process_group: the group of the processes that load.
        weights: False to load the optimizer alone.
        strict: False to load everything of the optimizer's state that fits.

    Returns:
        The missing, unexpected and mismatched keys of the optimizer's state, with the names of
        parameters; none if ``strict``.

    Raises:
        TypeError: the optimizer is not of this library.
        ValueError: the checkpoint has no state of an optimizer or no weights for this model, has
            them under several keys, or holds what ``load_state_dict`` refuses. Nothing has changed.

    Example:
        >>> import tempfile, warnings
        >>> from torch.distributed import checkpoint
        >>> from torch.distributed.checkpoint.state_dict import get_state_dict
        >>> from stepforge import AdamW
        >>> from stepforge.checkpoint import load_distributed
        >>> warnings.simplefilter("ignore")
        >>> model = torch.nn.Linear(64, 64)
        >>> saved = get_state_dict(model, torch.optim.AdamW(model.parameters()))
        >>> optimizer = AdamW(model.parameters(), state_format="int8")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = checkpoint.save(dict(zip(("model", "optimizer"), saved)), checkpoint_id=folder)
        ...     load_distributed(model, optimizer, folder)
        <All keys matched successfully>
        >>> sorted(optimizer.state[model.weight])
        ['exp_avg_codes', 'exp_avg_scale', 'exp_avg_sq_codes', 'exp_avg_sq_scale', 'step']
    """
    rule = getattr(optimizer, "rule", None)
    if not isinstance(rule, Rule):
        raise TypeError(
            "load_distributed is for optimizers of this library, but got "
            f"{type(optimizer).__name__}: read the checkpoint with torch.distributed.checkpoint"
        )
    if (storage_reader is None) == (checkpoint_id is None):
        raise ValueError("load_distributed takes either a checkpoint_id or a storage_reader")
    if storage_reader is None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        assert checkpoint_id is not None
        storage_reader = FileSystemReader(checkpoint_id)
    stored = storage_reader.read_metadata().state_dict_metadata
    names = _names(model, optimizer)
    saved = _Saved.of(stored, set(itertools.chain.from_iterable(names)))
    own = _OwnWeights.of(model, stored) if weights else _OwnWeights({}, "")

    members = [
        _Member(name, p, state_layout(rule, group, p), saved.entry(name), own.stored(name, stored))
        for group, in_group in zip(optimizer.param_groups, names)
        for p, name in zip(group["params"], in_group)
    ]
    request = saved.options()
    for member in members:
        request |= member.request()
    _read(request, storage_reader, process_group)

    converted: list[tuple[torch.Tensor, torch.Tensor]] = []
    state: dict[str, dict[str, Any]] = {}
    for member in members:
        state[member.name], weight = member.found(request)
        if weight is not None:
            converted.append((member.p, weight))
    state_dict = {"state": state, "param_groups": saved.groups(request)}
    loading = optimizer._examined(state_dict, strict, names)  # type: ignore[attr-defined]

    if weights:
        own.load(model, storage_reader, process_group)
    with torch.no_grad():
        for p, weight in converted:
            p.copy_(weight)
    optimizer._apply(loading, strict)  # type: ignore[attr-defined]
    result: LoadResult = loading.result
    return result


def _read(
    request: dict[str, Any], reader: StorageReader, process_group: ProcessGroup | None
) -> None:
    """Fill tensors from a checkpoint by their keys; replace objects that are no tensors."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        # A single process is no reason for a warning.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable")
        load(request, storage_reader=reader, process_group=process_group)


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Return the names of the parameters of each param group in checkpoints."""
    # Only torch knows which wrappers leave no trace in a name.
    from torch.distributed.checkpoint.state_dict import _get_fqns

    names = {p: next(iter(_get_fqns(model, name))) for name, p in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if p not in names:
                raise ValueError(
                    f"parameter {position} of param_groups[{index}], of shape {tuple(p.shape)}, "
                    "is not one of the model"
                )
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _prefixes(keys: Iterable[str], endings: Iterable[str]) -> list[str]:
    """Return the prefixes, up to a dot, of keys with one of some endings."""
    wanted = set(endings)
    found = {
        key[:at]
        for key in keys
        for at in (0, *(n + 1 for n, letter in enumerate(key) if letter == "."))
        if key[at:] in wanted
    }
    return sorted(found)


def _only(prefixes: Sequence[str], what: str, example: str) -> str:
    if len(prefixes) != 1:
        where = ", ".join(repr(x.removesuffix(".")) for x in prefixes)
        found = f"{what} under several keys: {where}" if prefixes else f"no {what}"
        raise ValueError(f"the checkpoint has {found}; it must have one, with keys as {example!r}")
    return prefixes[0]


@dataclass(frozen=True)
class _Saved:
    """The state of an optimizer in a checkpoint, according to its metadata.

    Attributes:
        stored: the metadata of each key.
        prefix: the prefix of the keys of the optimizer's state.
        keys: for each parameter, the keys of its state, each with its key in the checkpoint.
        is_flat: True if each parameter has its own copy of the options of its group.
    """

    stored: Mapping[str, Any]
    prefix: str
    keys: Mapping[str, Mapping[str, str]]
    is_flat: bool

    @classmethod
    def of(cls, stored: Mapping[str, Any], names: Iterable[str]) -> _Saved:
        endings = [f"state.{name}.step" for name in names]
        prefix = _only(_prefixes(stored, endings), "state of these parameters", endings[0])
        keys: dict[str, dict[str, str]] = {}
        for key in stored:
            if key.startswith(f"{prefix}state."):
                name, _, of_state = key.removeprefix(f"{prefix}state.").rpartition(".")
                keys.setdefault(name, {})[of_state] = key
        # Only a group has a list of parameters.
        return cls(stored, prefix, keys, f"{prefix}param_groups.0.params" not in stored)

    def entry(self, name: str) -> dict[str, tuple[str, Any]]:
        """Return, for each key of a parameter's state, the checkpoint's key and metadata."""
        return {own: (key, self.stored[key]) for own, key in self.keys.get(name, {}).items()}

    def options(self) -> dict[str, Any]:
        """Return a request for the options of the groups."""
        start = f"{self.prefix}param_groups."
        return {
            key: torch.empty(found.size, dtype=found.properties.dtype)
            if _is_tensor(found)
            else None
            for key, found in self.stored.items()
            if key.startswith(start)
        }

    def groups(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the param groups that were read; groups with equal options are one."""
        start = f"{self.prefix}param_groups."
        read: dict[str, dict[str, Any]] = {}
        for key, value in request.items():
            if key.startswith(start):
                rest = key.removeprefix(start)
                owner, _, option = rest.rpartition(".") if self.is_flat else rest.partition(".")
                read.setdefault(owner, {})[option] = value
        merged: list[dict[str, Any]] = []
        for owner, options in read.items():
            names = [owner] if self.is_flat else options.pop("params")
            for group in merged:
                if _are_same(group["options"], options):
                    group["names"] += names
                    break
            else:
                merged.append({"options": options, "names": list(names)})
        return [
            {**group["options"], "params": group["names"], "param_names": group["names"]}
            for group in merged
        ]


def _are_same(options: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {k: plain(x) for k, x in options.items()} == {k: plain(x) for k, x in others.items()}


def _is_tensor(metadata: Any) -> bool:
    return hasattr(metadata, "properties")


@dataclass(frozen=True)
class _Member:
    """A parameter of the optimizer, and its keys in a checkpoint.

    Attributes:
        name: its name in the checkpoint.
        p: the parameter.
        layout: the layout of its state.
        entry: for each key of its state, the key in the checkpoint and its metadata.
        weight: the key and metadata of the weight; None if it is not loaded.
    """

    name: str
    p: torch.Tensor
    layout: StateLayout
    entry: Mapping[str, tuple[str, Any]]
    weight: tuple[str, Any] | None

    def request(self) -> dict[str, Any]:
        """Return the tensors to fill, by the keys of the checkpoint."""
        made = {key: self._space(own, found) for own, (key, found) in self.entry.items()}
        if self.weight is not None and self._converts_weight:
            key, found = self.weight
            made[key] = empty_part(self.p, Part("", found.properties.dtype))
        # A tensor of another shape is not read: loading will refuse it.
        return {key: x for key, x in made.items() if x is None or self.p.is_meta or not x.is_meta}

    def _space(self, own: str, found: Any) -> torch.Tensor | None:
        """Return an empty tensor for a state, on the meta device if useless; None for others."""
        if not _is_tensor(found):
            return None
        dtype, shape = found.properties.dtype, tuple(found.size)
        part = Part("", dtype, of_block=own in self._scales)
        if own not in self.layout.scalars and self.p.dim() and shape == part.shape(self.p.shape):
            return empty_part(self.p, part)
        return torch.empty(shape, dtype=dtype, device="meta" if shape else "cpu")

    @property
    def _scales(self) -> set[str]:
        states = self.layout.states.values()
        scales = [(state, x.parts[1]) for state in states for x in block_formats(state)]
        return {part.key(state.key) for state, part in scales}

    @property
    def _low_bits(self) -> str | None:
        """The key of the weight's low bits; None if the weight has all bits."""
        return next((x.key for x in self.layout.tensors if x.column == "p"), None)

    @property
    def _converts_weight(self) -> bool:
        """True if either side has bits of the weight in the state, and the dtypes differ."""
        if self.weight is None or self.weight[1].properties.dtype == self.p.dtype:
            return False
        return bool(self.entry.keys() & LOW_BITS.keys()) or self._low_bits is not None

    def found(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return the state as it was read, and the weight if it must be converted."""
        entry = {
            own: request[key] if key in request else self._space(own, found)
            for own, (key, found) in self.entry.items()
        }
        entry = decoded_if_cut(self.layout, entry, self.p)
        saved_low = [entry[key] for key in LOW_BITS if key in entry]
        if self.weight is None or not self._converts_weight or any(x.is_meta for x in saved_low):
            return entry, None
        stored = request[self.weight[0]]
        joined = joined_weight(stored, entry)
        x = local(stored if joined is None else joined).float()
        entry = {key: value for key, value in entry.items() if key not in LOW_BITS}
        weight = empty_part(self.p, Part("", self.p.dtype))
        if self._low_bits is None:
            local(weight).copy_(x)
            return entry, weight
        low = empty_part(self.p, Part("low", LOW_BITS[self._low_bits]))
        self.layout.formats["p"].write({"": local(weight), "low": local(low)}, x)
        return entry | {self._low_bits: low}, weight


@dataclass(frozen=True)
class _OwnWeights:
    """The state dict of a model, and its keys in a checkpoint.

    Attributes:
        values: the model's own tensors, and other values of its state dict.
        prefix: the prefix of their keys in the checkpoint.
    """

    values: Mapping[str, Any] = field(repr=False)
    prefix: str

    @classmethod
    def of(cls, model: torch.nn.Module, stored: Mapping[str, Any]) -> _OwnWeights:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        values = get_model_state_dict(model)
        first = next(iter(values))
        prefix = _only(_prefixes(stored, [first]), "weights of this model", f"model.{first}")
        for name, x in values.items():
            found = stored.get(f"{prefix}{name}")
            if found is None:
                raise ValueError(f"the checkpoint has no {prefix}{name}, which the model has")
            if isinstance(x, torch.Tensor) and (
                not _is_tensor(found) or tuple(found.size) != tuple(x.shape)
            ):
                raise ValueError(
                    f"the checkpoint has {name} of shape {tuple(getattr(found, 'size', ()))}, but "
                    f"the model's is {tuple(x.shape)}"
                )
        return cls(values, prefix)

    def stored(self, name: str, stored: Mapping[str, Any]) -> tuple[str, Any] | None:
        """Return the checkpoint's key and metadata of a weight; None without weights."""
        key = f"{self.prefix}{name}"
        return (key, stored[key]) if self.values else None

    def load(
        self,
        model: torch.nn.Module,
        reader: StorageReader,
        process_group: ProcessGroup | None,
    ) -> None:
        """Read the weights of a model in place."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        request = {f"{self.prefix}{name}": x for name, x in self.values.items()}
        _read(request, reader, process_group)
        set_model_state_dict(model, {k.removeprefix(self.prefix): x for k, x in request.items()})
