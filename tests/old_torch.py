"""Faults of older versions of torch, for which a test has no oracle there.

A test that cannot hold skips by one of these marks, whose reason names the version and the fault.
"""

import pytest
import torch


def _repaired_in(version: str, fault: str) -> pytest.MarkDecorator:
    reason = f"torch {torch.__version__}, repaired in {version}: {fault}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


adagrad_takes_later_groups = _repaired_in(
    "2.12", "torch.optim.Adagrad raises KeyError at the step after add_param_group"
)
