"""Optimizers for PyTorch, each update rule written once and run in every way.

A drop-in for torch.optim's Adagrad, Adam, AdamW, NAdam and RAdam: same names, arguments, numbers
and checkpoints.

Example:
    >>> import torch, stepforge
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = stepforge.AdamW(model.parameters(), lr=1e-3)
    >>> model(torch.ones(4)).backward()
    >>> optimizer.step()
"""

from stepforge.checkpoint import LoadResult
from stepforge.explain import Explanation, explain
from stepforge.logging import MetricsLogger
from stepforge.optimizer import Optimizer
from stepforge.param_groups import param_groups
from stepforge.rules import Adagrad, Adam, AdamW, NAdam, RAdam

__version__ = "0.1.0"

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "Explanation",
    "LoadResult",
    "MetricsLogger",
    "NAdam",
    "Optimizer",
    "RAdam",
    "explain",
    "param_groups",
]
