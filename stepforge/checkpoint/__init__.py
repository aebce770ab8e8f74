"""Checkpoints: state dicts, saved and loaded, also distributed.

The format is torch.optim's, so either library continues what the other began. Loading checks
everything before it changes anything, and never aliases what it was given.
"""

from stepforge.checkpoint.check_state import unpickled
from stepforge.checkpoint.load import apply, complete_options, examine
from stepforge.checkpoint.reshard import load_distributed
from stepforge.checkpoint.result import Loading, LoadResult
from stepforge.checkpoint.save import (
    Lent,
    ParamGroup,
    full_precision_weights,
    lent,
    local_options,
    pack,
    reset_low_bits,
    to_torch,
)

__all__ = [
    "Lent",
    "LoadResult",
    "Loading",
    "ParamGroup",
    "apply",
    "complete_options",
    "examine",
    "full_precision_weights",
    "lent",
    "load_distributed",
    "local_options",
    "pack",
    "reset_low_bits",
    "to_torch",
    "unpickled",
]
