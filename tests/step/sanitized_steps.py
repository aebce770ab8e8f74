"""Steps around every change to an optimizer, with guards from a file that the caller has built.

``test_guards_sanitizer.py`` runs this file in a process with the address sanitizer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch

import stepforge
from stepforge import extension
from stepforge.step.guards import PythonGuards
from tests.step.mutations import MUTATIONS, built, params_of, set_gradients


def load(path: str) -> ModuleType:
    """Load the extension in a file."""
    loader = importlib.machinery.ExtensionFileLoader("stepforge.extension._guards", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main(path: str) -> None:
    torch.set_num_threads(1)
    module = load(path)
    extension.module = lambda: module  # type: ignore[assignment]
    for cls in (stepforge.AdamW, stepforge.NAdam):
        for mutate in MUTATIONS:
            optimizer = built(cls, "native")
            for step in range(6):
                if step == 3:
                    mutate(optimizer)
                set_gradients(optimizer, step)
                optimizer.step()
                if step == 2:
                    plan = optimizer._stepper.plans.latest
                    assert plan is not None
                    assert isinstance(plan.guards, module.Guards)
                    assert not isinstance(plan.guards, PythonGuards)
            assert all(bool(p.isfinite().all()) for p in params_of(optimizer))
    print(f"{2 * len(MUTATIONS)} changes")


if __name__ == "__main__":
    main(sys.argv[1])
