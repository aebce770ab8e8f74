"""Steps by an installed stepforge without a compiler, which print their results as JSON.

``test_wheel.py`` runs this file in another environment, where the tests cannot be imported.
"""

import inspect
import itertools
import json
import sys
import warnings

import torch

import stepforge
from stepforge import extension
from stepforge.rules import ALL

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def forms(cls):
    """Yield the options of every form of an optimizer's rule."""
    known = inspect.signature(cls).parameters
    flags = [f for f in ("maximize", "amsgrad", "decoupled_weight_decay") if f in known]
    for decay, *values in itertools.product((0.0, 0.1), *len(flags) * [(False, True)]):
        yield {"weight_decay": decay} | dict(zip(flags, values))


def trained(cls, dtype, **options):
    """Return the bits of a parameter and its states after two steps, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    p, *gradients = torch.randn(3, 1000, dtype=torch.complex128, generator=generator)
    to = (lambda x: x) if dtype.is_complex else torch.real
    p = torch.nn.Parameter(to(p).to(dtype).clone())
    optimizer = cls([p], **options)
    for gradient in gradients:
        p.grad = to(gradient).to(dtype).clone()
        optimizer.step()
    tensors = [p.detach(), *optimizer.state[p].values()]
    return [t.reshape(-1).view(torch.uint8).tolist() for t in tensors], optimizer


def compare():
    """Step every form by its kernel and by the reference."""
    differing, count, served = [], 0, set()
    for (name, cls), dtype in itertools.product(ALL.items(), DTYPES):
        for options in forms(cls):
            bits, optimizer = trained(cls, dtype, fused=True, **options)
            served.add(stepforge.explain(optimizer).served[0].backend)
            wanted, _ = trained(cls, dtype, foreach=False, **options)
            count += 1
            if bits != wanted:
                differing.append([name, str(dtype), options])
    return {"compared": count, "differing": differing, "served": sorted(served)}


def without_kernel():
    """Return the error of fused=True without a kernel, and the warnings and backend by default."""
    message = ""
    try:
        trained(stepforge.Adam, torch.float32, fused=True)
    except RuntimeError as error:
        message = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, optimizer = trained(stepforge.Adam, torch.float32)
        trained(stepforge.RAdam, torch.float64)
    return {
        "error": message,
        "warnings": [str(warning.message) for warning in caught],
        "served": stepforge.explain(optimizer).served[0].backend,
    }


if __name__ == "__main__":
    results = {"compare": compare, "without_kernel": without_kernel}[sys.argv[1]]()
    found = extension.module()
    guards = found if isinstance(found, str) else found.__file__
    print(json.dumps(results | {"file": stepforge.__file__, "guards": guards}))
