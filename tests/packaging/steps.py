"""Run by ``test_wheel.py`` with a Python that has an installed stepforge, and no compiler.

Prints as JSON what it found. It imports nothing of the tests, which are not there.
"""

import inspect
import itertools
import json
import sys
import warnings

import torch

import stepforge

OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "NAdam", "RAdam")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def forms(optimizer):
    """The options of every form of its rule."""
    known = inspect.signature(optimizer).parameters
    flags = [f for f in ("maximize", "amsgrad", "decoupled_weight_decay") if f in known]
    for decay, *values in itertools.product((0.0, 0.1), *len(flags) * [(False, True)]):
        yield {"weight_decay": decay} | dict(zip(flags, values))


def trained(optimizer, dtype, **options):
    """The bits of a parameter and its states after two steps."""
    generator = torch.Generator().manual_seed(0)
    p, *gradients = torch.randn(3, 1000, dtype=torch.complex128, generator=generator)
    to = (lambda x: x) if dtype.is_complex else torch.real
    p = torch.nn.Parameter(to(p).to(dtype).clone())
    stepper = optimizer([p], **options)
    for gradient in gradients:
        p.grad = to(gradient).to(dtype).clone()
        stepper.step()
    tensors = [p.detach(), *stepper.state[p].values()]
    return [t.reshape(-1).view(torch.uint8).tolist() for t in tensors], stepper


def compare():
    """Steps every form by its kernel and by the reference."""
    differing, count, served = [], 0, set()
    for name, dtype in itertools.product(OPTIMIZERS, DTYPES):
        optimizer = getattr(stepforge, name)
        for options in forms(optimizer):
            bits, stepper = trained(optimizer, dtype, fused=True, **options)
            served.add(stepforge.explain(stepper).served[0].backend)
            wanted, _ = trained(optimizer, dtype, foreach=False, **options)
            count += 1
            if bits != wanted:
                differing.append([name, str(dtype), options])
    return {"compared": count, "differing": differing, "served": sorted(served)}


def refused():
    """What is said where there is no kernel, and what serves."""
    said = ""
    try:
        trained(stepforge.Adam, torch.float32, fused=True)
    except RuntimeError as error:
        said = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, stepper = trained(stepforge.Adam, torch.float32)
        trained(stepforge.RAdam, torch.float64)
    return {
        "refused": said,
        "warnings": [str(warning.message) for warning in caught],
        "served": stepforge.explain(stepper).served[0].backend,
    }


if __name__ == "__main__":
    found = {"compare": compare, "refused": refused}[sys.argv[1]]()
    print(json.dumps(found | {"file": stepforge.__file__}))
