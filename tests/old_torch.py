"""Faults of older versions of torch that leave a test without an oracle.

A mark skips such a test. Its reason names the version and the fault.
"""

import pytest
import torch


def _fixed_in(version: str, fault: str) -> pytest.MarkDecorator:
    reason = f"torch {torch.__version__}, fixed in {version}: {fault}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


adagrad_takes_later_groups = _fixed_in(
    "2.12", "torch.optim.Adagrad raises KeyError at the step after add_param_group"
)
