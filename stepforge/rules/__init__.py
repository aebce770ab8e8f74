"""The update rules, one file per paper, and :data:`ALL` of their optimizers."""

from __future__ import annotations

from stepforge.optimizer import Optimizer
from stepforge.rules.adagrad import Adagrad
from stepforge.rules.adam import Adam, AdamW
from stepforge.rules.nadam import NAdam
from stepforge.rules.radam import RAdam

__all__ = ["ALL", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam"]

#: Every built-in optimizer, by name.
ALL: dict[str, type[Optimizer]] = {
    cls.__name__: cls for cls in (Adagrad, Adam, AdamW, NAdam, RAdam)
}
