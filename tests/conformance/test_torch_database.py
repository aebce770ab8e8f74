"""Values, states and errors are those of torch.optim, for every sample of its own test database.

Oracle: torch.optim's for-loop, in the same dtype. For bfloat16 and float16, in which torch.optim
rounds many times a step: the rule itself, run on float64 tensors.

Tolerances count roundings, in units of ``u``, half a unit in the last place of 1 in the dtype of
the arithmetic, relative to the largest magnitude in the computation (see `Scales`). Each count adds
the roundings of both sides, as they may err in opposite directions:

* ``g``, with L2 decay. Theirs, fused: coefficient, sum. Ours: coefficient, product, sum. 2 + 3 = 5.
* ``m``. ``g``. Theirs, a fused lerp: difference, sum. Ours: difference, coefficient, product, sum.
  5 + 2 + 4 = 11.
* ``v``. ``g`` twice. Theirs: coefficient and two products of ``(1 - beta2) * g * g``, which are
  more than those of ``beta2 * v``, and the sum. Ours: square, difference, coefficient, product,
  sum. 10 + 4 + 5 = 19.
* ``p``, relative to itself. Theirs: the sum, of two terms in NAdam; coefficient and product of a
  decoupled decay (ours are in the update). Ours: the sum. 4 + 1 = 5.
* The update, which adds its errors to ``p``. ``m``; through the root, half of ``v``. Theirs: a root
  that may be one more unit off (2), coefficient and quotient, coefficient and sum of eps, step
  size, product, quotient; 2 in the second of NAdam's terms. Ours: root, coefficient and product
  below and above it, NAdam's sum, coefficient and sum of eps, quotient, sum with a decay.
  11 + 10 + 11 + 10 = 42.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    optim_db,
)

import stepforge
from tests.conformance.table import (
    DTYPES,
    FAST,
    FLAGS,
    OPTIMIZERS,
    forced,
    normal,
    outcome,
    parameter,
    real,
    run,
)

DATABASE = {
    info.name: info
    for info in optim_db
    if info.optim_cls in {twins.theirs for twins in OPTIMIZERS.values()}
}
STEPS = 8  # RAdam's form changes at its sixth
SHAPES = [(64,), (5, 7), ()]

#: The dtypes in which torch.optim's own arithmetic is an oracle.
EXACT_DTYPES = ["float64", "float32", "complex64"]

Tensors: TypeAlias = dict[str, torch.Tensor]

#: Ways to choose a backend: the flags of a user, and forced backends that no flag asks for.
CHOICES = [*FLAGS, *(name for name in FAST if name not in ("reference", "foreach"))]
#: The choices that accept tensors as hyperparameters.
TENSOR_CHOICES = [choice for choice in CHOICES if not FLAGS.get(choice, {}).get("foreach")]


def samples(device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the optimizer and options of every sample of the database, by id."""
    return {
        f"{name}-{index}-{sample.desc.replace(' ', '_')}": (name, sample.kwargs)
        for name, info in DATABASE.items()
        for index, sample in enumerate(info.optim_inputs_func(device))
    }


SAMPLES = samples("cpu")
#: Samples for CUDA with tensors as hyperparameters, without `capturable`, which torch.optim refuses
#: on a CPU. Adagrad's only such sample is for all devices.
TENSOR_SAMPLES = {
    key: (name, {option: value for option, value in options.items() if option != "capturable"})
    for key, (name, options) in samples("cuda").items()
    if key not in SAMPLES and isinstance(options.get("lr"), torch.Tensor)
}
#: The optimizer and error input for every error input of the database, by id.
ERRORS = {
    f"{name}-{index}-{error.optimizer_error_input.desc.replace(' ', '_')}": (name, error)
    for name, info in DATABASE.items()
    for index, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
}

#: The roundings of each state, of the parameter's sum, and of the update, as counted above.
STATE_ROUNDINGS = {"exp_avg": 11, "exp_avg_sq": 20, "max_exp_avg_sq": 20, "sum": 20}
SUM_ROUNDINGS, UPDATE_ROUNDINGS = 4, 41


@dataclass
class Scales:
    """Magnitudes that roundings are relative to: the largest of all steps so far.

    Attributes:
        p: the magnitude of each element of the parameter.
        update: the largest change of any element in a step. An update that is small by
            cancellation has terms as large as those of other elements.
        states: the magnitude of each element of each state; or that of the gradient or its square,
            times its weight in the state, if it is larger.
    """

    p: torch.Tensor
    update: torch.Tensor
    states: dict[str, torch.Tensor]

    @classmethod
    def of_step(
        cls, before: Tensors, after: Tensors, g: torch.Tensor, options: Mapping[str, Any]
    ) -> Scales:
        old, new = wide(before), wide(after)
        # The terms of an L2 decay may cancel in the gradient. Their roundings do not.
        g = real(g).double().abs() + float(options["weight_decay"]) * old["p"].abs()
        beta1, beta2 = map(float, options.get("betas", (0, 0)))
        added = {
            "exp_avg": (1 - beta1) * g,
            "exp_avg_sq": (1 - beta2) * g * g,
            "max_exp_avg_sq": (1 - beta2) * g * g,
            "sum": g * g,
        }
        return cls(
            p=torch.maximum(old["p"].abs(), new["p"].abs()),
            update=(new["p"] - old["p"]).abs().max(),
            states={
                name: torch.maximum(new[name].abs(), added[name])
                for name in STATE_ROUNDINGS
                if name in new
            },
        )

    def maximum(self, other: Scales) -> Scales:
        return Scales(
            p=torch.maximum(self.p, other.p),
            update=torch.maximum(self.update, other.update),
            states={
                name: torch.maximum(scale, other.states[name])
                for name, scale in self.states.items()
            },
        )

    def tolerances(self, u: float, steps: int = 1, coarse: Coarseness | None = None) -> Tensors:
        """Return the allowed error of each result after steps whose errors add up.

        An average keeps its earlier errors, damped. Through an L2 decay (below 1) it also gets
        those of the parameter, in every step but the first, less than one more share. An update
        gets the errors of the averages, which have grown with the steps before it.

        Args:
            u: the relative error of one rounding.
            steps: the number of steps whose errors add up.
            coarse: additional relative errors of a step.
        """
        coarse = coarse or Coarseness()
        sums = steps * (SUM_ROUNDINGS * u + coarse.p)
        updates = steps * (steps + 1) / 2 * (UPDATE_ROUNDINGS * u + coarse.update)
        return {"p": sums * self.p + updates * self.update} | {
            name: (2 * steps - 1) * STATE_ROUNDINGS[name] * u * scale
            for name, scale in self.states.items()
        }


def wide(tensors: Tensors) -> Tensors:
    return {name: real(tensor).double() for name, tensor in tensors.items()}


def snapshot(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> Tensors:
    return {name: tensor.clone() for name, tensor in outcome(optimizer, p).items()}


def half_ulp(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def half_spacing(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half the distance between neighbours in a dtype, at each of these float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.smallest_normal)).exponent - 1
    return info.eps / 2 * torch.exp2(exponent.double())


@dataclass
class Coarseness:
    """Relative errors of torch.optim with tensors as hyperparameters: it computes in their dtype.

    Attributes:
        p: the error of the parameter, from the factor of a decoupled decay.
        update: the error of the update, from its step size and bias corrections.
    """

    p: float = 0.0
    update: float = 0.0

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Coarseness:
        found = cls()
        lr, (beta1, beta2) = options["lr"], options.get("betas", (0.0, 0.0))
        if isinstance(lr, torch.Tensor):
            if options.get("decoupled_weight_decay"):
                found.p = 2 * half_ulp(lr.dtype)  # `1 - lr * weight_decay`
            found.update = 2 * half_ulp(lr.dtype)  # `-lr * (1 - mu) / (1 - mu_product)`
        if isinstance(beta1, torch.Tensor):
            # Three roundings of numbers up to 1 in `1 - beta**t`, which is at least 1 - beta. The
            # second correction enters by its root.
            amplified = 1 / (1 - beta1.item()) + 0.5 / (1 - beta2.item())
            found.update += 3 * half_ulp(beta1.dtype) * amplified
        return found


def assert_twins_agree(
    name: str, options: dict[str, Any], ours: dict[str, Any], dtype: torch.dtype, *, each_step: bool
) -> None:
    """Step an optimizer and its twin side by side, and compare parameters and states.

    Args:
        name: the optimizer.
        options: the options of both.
        ours: additional options of this library's optimizer.
        dtype: the dtype of the parameters.
        each_step: True to copy torch's parameters and states to ours after each step, so that each
            step is compared by its own roundings. Otherwise those of all steps add up.
    """
    values = [normal(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    mine, theirs = ([parameter(x) for x in values] for _ in range(2))
    tested = OPTIMIZERS[name].ours(mine, **copy.deepcopy(options), **ours)
    oracle = OPTIMIZERS[name].theirs(theirs, **copy.deepcopy(options), foreach=False)
    group = oracle.param_groups[0]
    scales: dict[torch.Tensor, Scales] = {}
    for step in range(1, STEPS + 1):
        gradients = [normal(shape, dtype, 100 * step + index) for index, shape in enumerate(SHAPES)]
        before = [snapshot(oracle, p) for p in theirs]
        run(tested, mine, [gradients])
        run(oracle, theirs, [gradients])
        for p, twin, old, g in zip(mine, theirs, before, gradients, strict=True):
            got, wanted = outcome(tested, p), outcome(oracle, twin)
            assert_same_form(got, wanted)
            scale = Scales.of_step(old, wanted, g, group)
            scales[p] = scale.maximum(scales[p]) if p in scales else scale
            tolerances = scales[p].tolerances(
                half_ulp(g.real.dtype), 1 if each_step else step, Coarseness.of_options(group)
            )
            assert_within(got, wanted, tolerances, f"step {step}")
            if each_step:
                for key in tolerances:
                    got[key].copy_(wanted[key])


def assert_same_form(got: Tensors, wanted: Tensors) -> None:
    """Assert that names, shapes, dtypes and strides are equal, and scalar states bit for bit."""
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, name
        assert got[name].dtype == tensor.dtype, name
        assert got[name].stride() == tensor.stride(), name
    for name in {"step", "mu_product"} & set(wanted):
        assert torch.equal(got[name], wanted[name]), name


def assert_within(got: Tensors, wanted: Tensors, tolerances: Tensors, where: str) -> None:
    for name, tolerance in tolerances.items():
        error = (real(got[name]).double() - real(wanted[name]).double()).abs()
        worst = (error / tolerance).max().item()
        assert (error <= tolerance).all(), (
            f"{where}, {name}: off by {worst:.3g} times its tolerance"
        )


@pytest.mark.parametrize("each_step", [True, False], ids=["each-step", "all-steps"])
@pytest.mark.parametrize("dtype", [DTYPES[name] for name in EXACT_DTYPES], ids=EXACT_DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("name", "options"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_steps_as_in_torch(
    name: str, options: dict[str, Any], choice: str, dtype: torch.dtype, each_step: bool
) -> None:
    with choose_backend(choice) as ours:
        assert_twins_agree(name, options, ours, dtype, each_step=each_step)


@pytest.mark.parametrize("dtype", [DTYPES[name] for name in EXACT_DTYPES], ids=EXACT_DTYPES)
@pytest.mark.parametrize("choice", TENSOR_CHOICES)
@pytest.mark.parametrize(("name", "options"), TENSOR_SAMPLES.values(), ids=TENSOR_SAMPLES)
def test_a_sample_with_tensors_for_numbers_steps_as_in_torch(
    name: str, options: dict[str, Any], choice: str, dtype: torch.dtype
) -> None:
    with choose_backend(choice) as ours:
        assert_twins_agree(name, options, ours, dtype, each_step=True)


@contextlib.contextmanager
def choose_backend(choice: str) -> Iterator[dict[str, Any]]:
    """Choose a backend for the length of a ``with`` statement; yield the flags for it."""
    with contextlib.nullcontext() if choice in FLAGS else forced(choice):
        yield FLAGS.get(choice, {})


def exact_step(optimizer: stepforge.Optimizer, before: Tensors, g: torch.Tensor) -> Tensors:
    """Return the results of the rule itself, run on float64 tensors and Python floats."""
    group, rule = optimizer.param_groups[0], optimizer.rule
    h = SimpleNamespace(**group | {"lr": float(group["lr"])})
    old = wide(before)
    states: list[Any] = []
    for state in rule.states.values():
        value = old[state.key] if state.on(group) else None
        states.append(value.item() if state.scalar else value)
    g = -g.double() if group["maximize"] else g.double()
    results = rule.function(h, old["step"].item() + 1, old["p"], g, *states)
    keys = ["p", *(state.key for state in rule.states.values())]
    return {
        key: result
        for key, result in zip(keys, results, strict=True)
        if isinstance(result, torch.Tensor)
    }


def initial_states(optimizer: stepforge.Optimizer, p: torch.Tensor) -> Tensors:
    """Return the states before the first step."""
    states = {state.key: torch.zeros_like(p) for state in optimizer.rule.states.values()}
    return states | {"step": torch.zeros(()), "mu_product": torch.ones(())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("name", "options"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_in_low_precision_rounds_once(
    name: str, options: dict[str, Any], choice: str, dtype: torch.dtype
) -> None:
    """The tolerance is half a spacing of the dtype, plus the roundings of float32 arithmetic.

    The spacing is taken at the larger of both values, since one of them may be just above a power
    of two. Our roundings are a part of those counted above.
    """
    p = parameter(normal((64,), dtype, 0))
    with choose_backend(choice) as ours:
        optimizer = OPTIMIZERS[name].ours([p], **copy.deepcopy(options), **ours)
        for step in range(1, STEPS + 1):
            g = normal(p.shape, dtype, step)
            before = initial_states(optimizer, p) | snapshot(optimizer, p)
            exact = exact_step(optimizer, before, g)
            run(optimizer, [p], [[g]])
            got = outcome(optimizer, p)
            assert set(exact) == set(got) - {"step", "mu_product"}
            arithmetic = Scales.of_step(before, exact, g, optimizer.param_groups[0])
            tolerances = {
                key: rounding
                + half_spacing(torch.maximum(exact[key].abs(), wide(got)[key].abs()), dtype)
                for key, rounding in arithmetic.tolerances(half_ulp(torch.float32)).items()
            }
            assert_within(got, exact, tolerances, f"step {step}")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("name", "error"), ERRORS.values(), ids=ERRORS)
def test_an_error_input_fails_as_in_torch(
    name: str, error: ErrorOptimizerInput, choice: str
) -> None:
    given = error.optimizer_error_input
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with choose_backend(choice) as ours, contextlib.ExitStack() as expecting:
        if error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
            expecting.enter_context(expected(error.error_type, match=error.error_regex))
        optimizer = OPTIMIZERS[name].ours(given.params, **ours | given.kwargs)
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            expecting.enter_context(expected(error.error_type, match=error.error_regex))
            optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ],
    ids=["fused+foreach", "fused+differentiable"],
)
def test_options_that_exclude_each_other_fail_in_the_words_of_torch(
    name: str, options: dict[str, Any], words: str
) -> None:
    """The database has these as error inputs for CUDA, which cannot be made without a GPU."""
    with pytest.raises(RuntimeError, match=words):
        OPTIMIZERS[name].ours([parameter(torch.ones(2))], **options)


def test_the_database_has_all_five() -> None:
    assert set(DATABASE) == set(OPTIMIZERS)
    assert {name for name, _ in SAMPLES.values()} == set(OPTIMIZERS)
    assert {name for name, _ in TENSOR_SAMPLES.values()} == set(OPTIMIZERS) - {"Adagrad"}
    assert {name for name, _ in ERRORS.values()} == set(OPTIMIZERS)
