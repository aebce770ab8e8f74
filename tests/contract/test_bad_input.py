"""Bad input: the type of the error, its message, and that nothing has changed.

Oracle: the documented contract. That is ValueError for a value out of its range, TypeError for a
wrong type, torch.optim's message where it has one, and deep copies of parameters, gradients, state
and groups, taken before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import stepforge
from tests.twins import (
    OPTIMIZERS,
    assert_identical,
    assert_unchanged,
    each_optimizer,
    give_gradients,
    make_params,
    run,
    snapshot,
    twin_of,
)

NAN = float("nan")
#: The options that take a number >= 0.
NUMBERS = {
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "Adam": ("lr", "eps", "weight_decay"),
    "AdamW": ("lr", "eps", "weight_decay"),
    "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "eps", "weight_decay"),
}
#: The boolean options of a single optimizer.
FLAGS = {
    "Adagrad": (),
    "Adam": ("amsgrad", "decoupled_weight_decay"),
    "AdamW": ("amsgrad",),
    "NAdam": ("decoupled_weight_decay",),
    "RAdam": ("decoupled_weight_decay",),
}
TORCHS_MESSAGES = {"lr": "Invalid learning rate", "eps": "Invalid epsilon value"}


class Bad(NamedTuple):
    """Options that must be refused: the type of the error, and parts of its message."""

    options: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]


def _bad_numbers(name: str) -> dict[str, Bad]:
    label = TORCHS_MESSAGES.get(name, f"Invalid {name} value")
    wrong_type = (f"{name} must be a number >= 0",)
    return {
        f"{name}=nan": Bad({name: NAN}, ValueError, (f"{label}: nan", ">= 0")),
        f"{name}=-1": Bad({name: -1.0}, ValueError, (f"{label}: -1.0", ">= 0")),
        f"{name}=-inf": Bad({name: float("-inf")}, ValueError, (f"{label}: -inf", ">= 0")),
        f"{name}=text": Bad({name: "0.1"}, TypeError, (*wrong_type, "'0.1'")),
        f"{name}=None": Bad({name: None}, TypeError, (*wrong_type, "None")),
        f"{name}=list": Bad({name: [0.1]}, TypeError, (*wrong_type, "[0.1]")),
        f"{name}=complex": Bad({name: 1j}, TypeError, (*wrong_type, "1j")),
        f"{name}=True": Bad({name: True}, TypeError, (*wrong_type, "True")),
    }


def _bad_flag(name: str, *, optional: bool = False) -> dict[str, Bad]:
    allowed = "True, False or None" if optional else "True or False"
    values = ["yes", 2, NAN, *([] if optional else [None])]
    return {
        f"{name}={value}": Bad({name: value}, TypeError, (name, repr(value), allowed))
        for value in values
    }


BAD_BETAS = {
    "beta1=1": Bad({"betas": (1.0, 0.9)}, ValueError, ("beta parameter at index 0: 1.0", "< 1")),
    "beta2=1": Bad({"betas": (0.9, 1.0)}, ValueError, ("beta parameter at index 1: 1.0", "< 1")),
    "beta1=-0.5": Bad({"betas": (-0.5, 0.9)}, ValueError, ("index 0: -0.5", ">= 0")),
    "beta2=nan": Bad({"betas": (0.9, NAN)}, ValueError, ("index 1: nan", ">= 0 and < 1")),
    "beta2=inf": Bad({"betas": (0.9, float("inf"))}, ValueError, ("index 1: inf", "< 1")),
    "one beta": Bad({"betas": (0.9,)}, ValueError, ("betas must have 2 components", "(0.9,)")),
    "three betas": Bad({"betas": (0.1, 0.2, 0.3)}, ValueError, ("2 components", "(0.1, 0.2, 0.3)")),
    "no betas": Bad({"betas": ()}, ValueError, ("2 components", "()")),
    "betas=0.9": Bad({"betas": 0.9}, TypeError, ("betas must be a tuple of 2 numbers", "0.9")),
    "betas=None": Bad({"betas": None}, TypeError, ("betas must be a tuple of 2", "None")),
    "betas=text": Bad({"betas": "ab"}, TypeError, ("betas must be a tuple of 2", "'ab'")),
    "beta2=text": Bad({"betas": (0.9, "x")}, TypeError, ("betas[1] must be a number", "'x'")),
    "beta1=None": Bad({"betas": (None, 0.9)}, TypeError, ("betas[0] must be a number", "None")),
    "betas=tensor": Bad({"betas": torch.ones(2)}, TypeError, ("betas must be a tuple of 2",)),
}
HALF = torch.tensor(0.5)
BAD_TENSORS = {
    "lr=2 elements": Bad({"lr": torch.ones(2)}, ValueError, ("lr must be 1-element", "2")),
    "lr=0 elements": Bad({"lr": torch.ones(0)}, ValueError, ("lr must be 1-element", "0")),
    "lr=nan tensor": Bad({"lr": torch.tensor(NAN)}, ValueError, ("learning rate: nan", ">= 0")),
    "lr=-1 tensor": Bad({"lr": torch.tensor(-1.0)}, ValueError, ("learning rate: -1.0", ">= 0")),
    "lr=complex tensor": Bad({"lr": torch.tensor(1j)}, TypeError, ("lr must be a number >= 0",)),
    "eps=tensor": Bad({"eps": HALF}, TypeError, ("eps must be a number >= 0", "tensor")),
}
TENSOR_BETAS = {
    "one tensor beta": Bad(
        {"betas": (HALF, 0.9)}, ValueError, ("betas must be either both floats or both Tensors",)
    ),
    "tensor beta of 2 elements": Bad(
        {"betas": (HALF, torch.ones(2))}, ValueError, ("Tensor betas[1] must be 1-element", "2")
    ),
    "tensor beta=1": Bad({"betas": (torch.tensor(1.0), HALF)}, ValueError, ("index 0: 1.0", "< 1")),
    "tensor lr, foreach": Bad(
        {"lr": HALF, "foreach": True},
        ValueError,
        ("lr as a Tensor is not supported for capturable=False and foreach=True",),
    ),
    "tensor betas, foreach": Bad(
        {"betas": (HALF, HALF), "foreach": True},
        ValueError,
        ("betas[0] as a Tensor is not supported for capturable=False and foreach=True",),
    ),
}
NO_TENSOR_BETAS = {
    "betas=tensors": Bad(
        {"betas": (HALF, HALF)}, TypeError, ("betas[0] must be a number >= 0 and < 1", "tensor")
    )
}
EXCLUSIONS = {
    "fused, differentiable": Bad(
        {"fused": True, "differentiable": True},
        RuntimeError,
        ("`fused` does not support `differentiable`",),
    ),
    "fused, foreach": Bad(
        {"fused": True, "foreach": True},
        RuntimeError,
        ("`fused` and `foreach` cannot be `True` together.",),
    ),
}
STATE_FORMATS = ("None, 'float32', 'bfloat16', 'int8'",)
WEIGHT_BITS = ("None, 24, 32",)
SEEDS = ("rounding_seed must be a whole number >= 0 and < 4294967296",)
BAD_FORMATS = {
    **{
        f"state_format={value!r}": Bad(
            {"state_format": value},
            ValueError,
            (f"Invalid state_format value: {value!r}", *STATE_FORMATS),
        )
        for value in ("int4", "INT8", "", 8, torch.int8)
    },
    **{
        f"master_weight_bits={value!r}": Bad(
            {"master_weight_bits": value},
            ValueError,
            (f"Invalid master_weight_bits value: {value!r}", *WEIGHT_BITS),
        )
        for value in (16, 0, 24.0, "24", True)
    },
    **{
        f"rounding_seed={value}": Bad(
            {"rounding_seed": value},
            ValueError,
            (f"Invalid rounding_seed value: {value}", ">= 0 and < 4294967296"),
        )
        for value in (-1, 2**32)
    },
    **{
        f"rounding_seed={value!r}": Bad({"rounding_seed": value}, TypeError, (*SEEDS, repr(value)))
        for value in (1.5, 2.0, NAN)
    },
    "rounding_seed=text": Bad({"rounding_seed": "1"}, TypeError, ("rounding_seed must be", "'1'")),
    "rounding_seed=None": Bad({"rounding_seed": None}, TypeError, ("rounding_seed must be",)),
    "rounding_seed=tensor": Bad(
        {"rounding_seed": torch.tensor(1)}, TypeError, ("rounding_seed must be", "tensor")
    ),
}
FORMAT_EXCLUSIONS = {
    **{
        f"{name}, differentiable": Bad(
            {name: value, "differentiable": True},
            RuntimeError,
            (f"`{name}` does not support `differentiable`",),
        )
        for name, value in (
            ("state_format", "int8"),
            ("state_format", "bfloat16"),
            ("master_weight_bits", 24),
            ("stochastic_rounding", True),
        )
    },
    "master_weight_bits, stochastic_rounding": Bad(
        {"master_weight_bits": 32, "stochastic_rounding": True},
        ValueError,
        ("`master_weight_bits` and `stochastic_rounding` exclude each other",),
    ),
}


def _bad_options(cls: type) -> dict[str, Bad]:
    name = cls.__name__
    found = dict(BAD_TENSORS | EXCLUSIONS | BAD_FORMATS | FORMAT_EXCLUSIONS)
    for number in NUMBERS[name]:
        found |= _bad_numbers(number)
    for flag in ("maximize", "capturable", "differentiable", "stochastic_rounding", *FLAGS[name]):
        found |= _bad_flag(flag)
    for flag in ("foreach", "fused"):
        found |= _bad_flag(flag, optional=True)
    if name != "Adagrad":
        found |= BAD_BETAS | (NO_TENSOR_BETAS if name in ("NAdam", "RAdam") else TENSOR_BETAS)
    return found


BAD_OPTIONS = [
    pytest.param(cls, bad, id=f"{cls.__name__}-{name}")
    for cls in OPTIMIZERS
    for name, bad in _bad_options(cls).items()
]
every_bad_option = pytest.mark.parametrize(("cls", "bad"), BAD_OPTIONS)


def test_every_hyperparameter_has_bad_values() -> None:
    for cls in OPTIMIZERS:
        defaults = cls(make_params()).defaults
        tried = {name for bad in _bad_options(cls).values() for name in bad.options}
        fixed = {"decoupled_weight_decay"} if cls is stepforge.AdamW else set()
        assert tried == set(defaults) - fixed


def assert_refused(call: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)


@every_bad_option
def test_the_constructor_refuses_a_bad_option(cls: type, bad: Bad) -> None:
    params = make_params()
    assert_refused(lambda: cls(params, **bad.options), bad.error, bad.words)
    assert_identical([p.detach() for p in params], [p.detach() for p in make_params()])


@every_bad_option
def test_a_group_with_a_bad_option_is_refused(cls: type, bad: Bad) -> None:
    params = make_params()
    group = {"params": params[1:], **bad.options}
    groups = [{"params": params[:1]}, group]
    assert_refused(lambda: cls(groups), bad.error, bad.words)
    assert list(group) == ["params", *bad.options]
    assert all(group[name] is value for name, value in bad.options.items())


@every_bad_option
def test_adding_a_group_with_a_bad_option_changes_nothing(cls: type, bad: Bad) -> None:
    params = make_params()
    optimizer = cls(params[:2])
    run(optimizer, params[:2], range(2))
    before = snapshot(optimizer)
    group = {"params": params[2:], **bad.options}
    assert_refused(lambda: optimizer.add_param_group(group), bad.error, bad.words)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("option", "value"), [("master_weight_bits", 24), ("stochastic_rounding", True)]
)
def test_weights_of_8_bits_are_refused_more_bits(option: str, value: Any) -> None:
    """Unlike float32 weights they lack bits, but no format gives them any."""
    params = make_params(dtype=torch.bfloat16)
    params.append(torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)))
    words = (f"{option}={value} is for bfloat16 and float16 parameters", "torch.float8_e4m3fn")
    assert_refused(lambda: stepforge.Adam(params, **{option: value}), ValueError, words)
    params[-1].requires_grad_(False)
    stepforge.Adam(params, **{option: value})


# NAdam and RAdam of torch.optim have no fused path.
FUSED_IN_TORCH = (stepforge.Adagrad, stepforge.Adam, stepforge.AdamW)


@pytest.mark.parametrize("bad", EXCLUSIONS.values(), ids=EXCLUSIONS)
@pytest.mark.parametrize("cls", FUSED_IN_TORCH, ids=lambda cls: cls.__name__)
def test_options_that_exclude_each_other_are_refused_in_torchs_words(cls: type, bad: Bad) -> None:
    with pytest.raises(RuntimeError) as theirs:
        twin_of(cls)(make_params(), **bad.options)
    with pytest.raises(RuntimeError) as ours:
        cls(make_params(), **bad.options)
    assert str(ours.value) == str(theirs.value)


# Parameters


def _leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


UNORDERED = ("ordered collections", "use a list instead")
NOT_TENSORS = ("only optimize Tensors", "one of the params is")
BAD_PARAMS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "a bare tensor": (_leaf, TypeError, ("iterable of Tensors or dicts", "torch.FloatTensor")),
    "an empty list": (list, ValueError, ("empty parameter list",)),
    "an empty generator": (lambda: iter(()), ValueError, ("empty parameter list",)),
    "a number": (lambda: 3, TypeError, ("int",)),
    "None": (lambda: None, TypeError, ("NoneType",)),
    "a list of numbers": (lambda: [_leaf(), 1.0], TypeError, (*NOT_TENSORS, "float")),
    "a list of lists": (lambda: [[_leaf()]], TypeError, (*NOT_TENSORS, "list")),
    "a list of texts": (lambda: ["weight"], TypeError, (*NOT_TENSORS, "str")),
    "a dict that is not in a list": (
        lambda: {"params": [_leaf()]},
        TypeError,
        (*NOT_TENSORS, "str"),
    ),
    "None in a group": (lambda: [{"params": [_leaf(), None]}], TypeError, NOT_TENSORS),
    "a name with no tensor": (lambda: [("weight", 3)], TypeError, (*NOT_TENSORS, "int")),
    "a group without params": (lambda: [{"lr": 0.5}], ValueError, ("needs 'params'", "['lr']")),
    "a tensor among groups": (
        lambda: [{"params": [_leaf()]}, _leaf()],
        TypeError,
        ("param_group must be a dict", "Tensor"),
    ),
    "a non-leaf": (lambda: [_leaf(), _leaf() * 2], ValueError, ("can't optimize a non-leaf",)),
    "a set": (lambda: {_leaf()}, TypeError, UNORDERED),
    "a set of names and tensors": (lambda: {("w", _leaf())}, TypeError, UNORDERED),
    "a frozenset": (lambda: frozenset([_leaf()]), TypeError, UNORDERED),
    "an empty set": (set, TypeError, UNORDERED),
    "a set in a group": (lambda: [{"params": {_leaf()}}], TypeError, UNORDERED),
    "a frozenset in a group": (
        lambda: [{"params": frozenset([_leaf()])}],
        TypeError,
        UNORDERED,
    ),
    "in two groups": (
        lambda: [{"params": [leaf := _leaf()]}, {"params": [leaf]}],
        ValueError,
        ("more than one parameter group",),
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD_PARAMS.values(), ids=BAD_PARAMS)
@each_optimizer
def test_the_constructor_refuses_bad_parameters(
    cls: type, make: Callable[[], Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    assert_refused(lambda: cls(make()), error, words)


@each_optimizer
def test_a_bare_set_is_refused_in_the_words_that_torch_has_for_one_in_a_group(cls: type) -> None:
    with pytest.raises(TypeError) as theirs:
        twin_of(cls)([{"params": {_leaf()}}])
    with pytest.raises(TypeError) as ours:
        cls({_leaf()})
    assert str(ours.value) == str(theirs.value)


BAD_GROUPS: dict[str, tuple[Callable[..., Any], type[Exception], tuple[str, ...]]] = {
    "a tensor": (lambda own: _leaf(), TypeError, ("param_group must be a dict", "Tensor")),
    "a list": (lambda own: [_leaf()], TypeError, ("param_group must be a dict", "list")),
    "no params": (lambda own: {"lr": 0.5}, ValueError, ("needs 'params'", "['lr']")),
    "a number": (lambda own: {"params": [_leaf(), 3]}, TypeError, (*NOT_TENSORS, "int")),
    "a non-leaf": (lambda own: {"params": _leaf() * 2}, ValueError, ("non-leaf",)),
    "a set": (lambda own: {"params": {_leaf()}}, TypeError, UNORDERED),
    "a frozenset": (lambda own: {"params": frozenset([_leaf()])}, TypeError, UNORDERED),
    "a parameter twice": (
        lambda own: {"params": [_leaf(), own[0]]},
        ValueError,
        ("more than one parameter group",),
    ),
    "names": (lambda own: {"params": [("w", _leaf())]}, ValueError, ("with/without names",)),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD_GROUPS.values(), ids=BAD_GROUPS)
@each_optimizer
def test_adding_bad_parameters_changes_nothing(
    cls: type, make: Callable[..., Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    assert_refused(lambda: optimizer.add_param_group(make(params)), error, words)
    assert_unchanged(optimizer, before)


# Steps: the bad parameter is the last of several. A step that checked one parameter at a time
# would have changed the others.


class BadStep(NamedTuple):
    """A fault of the last parameter: its values, its gradient, and the error that they cause."""

    last: Callable[[], torch.Tensor]
    gradient: Callable[[torch.Tensor], torch.Tensor]
    error: type[Exception]
    words: tuple[str, ...]
    options: dict[str, Any]


def _integers(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: torch.ones(3, dtype=dtype)


def _sparse(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).detach().to_sparse()


def _bad_steps(cls: type) -> dict[str, BadStep]:
    found = {
        str(dtype): BadStep(
            _integers(dtype), torch.ones_like, TypeError, (str(dtype), "floating point"), {}
        )
        for dtype in (torch.int64, torch.uint8, torch.bool)
    }
    advice = {"Adam": "SparseAdam", "AdamW": "SparseAdam"}.get(cls.__name__, "Adagrad")
    refusal = ("does not support sparse gradients", advice)
    options: dict[str, Any] = {}
    if cls is stepforge.Adagrad:
        refusal = ("weight_decay option is not compatible with sparse gradients",)
        options = {"weight_decay": 0.5}
    found["sparse"] = BadStep(_leaf, _sparse, RuntimeError, refusal, options)
    if cls is stepforge.Adagrad:
        for name, words in (("int8", "int8"), ("bfloat16", "rounded at random")):
            found[f"sparse, {name}"] = BadStep(
                lambda: torch.ones(64, 64, requires_grad=True),
                _sparse,
                RuntimeError,
                (f"a format ({words}) is not compatible with sparse gradients",),
                {"state_format": name},
            )
    return found


BAD_STEPS = [
    pytest.param(cls, bad, id=f"{cls.__name__}-{name}")
    for cls in OPTIMIZERS
    for name, bad in _bad_steps(cls).items()
]


@pytest.mark.parametrize("foreach", [None, False], ids=["fastest", "reference"])
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@pytest.mark.parametrize(("cls", "bad"), BAD_STEPS)
def test_a_step_with_one_bad_parameter_changes_none(
    cls: type, bad: BadStep, steps: int, grouped: bool, foreach: bool | None
) -> None:
    params, last = make_params(), bad.last()
    groups = [{"params": params}, {"params": [last]}] if grouped else [*params, last]
    optimizer = cls(groups, foreach=foreach, **bad.options)
    run(optimizer, params, range(steps))
    give_gradients(params, steps)
    last.grad = bad.gradient(last)
    before = snapshot(optimizer)
    assert_refused(optimizer.step, bad.error, bad.words)
    assert_unchanged(optimizer, before)
    last.grad = None
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == steps + 1


@each_optimizer
def test_a_backend_that_does_not_exist_changes_nothing(
    cls: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params()
    optimizer = cls(params)
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    monkeypatch.setenv("STEPFORGE_BACKEND", "abacus")
    assert_refused(optimizer.step, ValueError, ("STEPFORGE_BACKEND", "'abacus'", "reference"))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_a_forced_backend_that_cannot_serve_the_last_parameter_changes_nothing(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, last = make_params(), _leaf()
    optimizer = stepforge.Adagrad([*params, last])
    run(optimizer, params, range(steps))
    last.grad = _sparse(last)
    give_gradients(params, steps)
    before = snapshot(optimizer)
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    assert_refused(optimizer.step, RuntimeError, ("STEPFORGE_BACKEND=foreach", "(2,)", "sparse"))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("foreach", [None, True, False], ids=["fastest", "foreach", "reference"])
@pytest.mark.parametrize("size", [4, 2**17], ids=["small", "large"])
@each_optimizer
def test_a_state_that_no_longer_fits_its_parameter_changes_nothing(
    cls: type, size: int, foreach: bool | None
) -> None:
    # This happens if a user resizes a layer. A kernel must not write past the end of the state.
    params = make_params([(size,), (5,)])
    optimizer = cls(params, foreach=foreach)
    run(optimizer, params, range(2))
    params[1].grad = None
    params[1].data = torch.ones(7)
    give_gradients(params, 2)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match=r"5|7"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("foreach", [None, True, False], ids=["fastest", "foreach", "reference"])
@pytest.mark.parametrize(
    "value", ["fast", "0.3", None, torch.ones(2)], ids=["text", "number in text", "None", "two"]
)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
@each_optimizer
def test_an_option_set_by_hand_to_a_bad_value_changes_nothing(
    cls: type, steps: int, value: Any, foreach: bool | None
) -> None:
    params = make_params()
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], foreach=foreach)
    run(optimizer, params, range(steps))
    give_gradients(params, steps)
    optimizer.param_groups[1]["lr"] = value
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", "0.3", "lr must be a number >= 0, but got '0.3'"),
        ("lr", [0.3], "lr must be a number >= 0, but got [0.3]"),
        ("eps", None, "eps must be a number >= 0, but got None"),
        ("weight_decay", "0", "weight_decay must be a number >= 0, but got '0'"),
        ("betas", None, "betas must be a tuple of 2 numbers >= 0 and < 1, but got None"),
        ("betas", (0.9,), "betas must have 2 components, but got (0.9,)"),
        ("betas", (0.9, "0.1"), "betas[1] must be a number >= 0 and < 1, but got '0.1'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_a_hyperparameter_set_by_hand_to_no_number_raises_the_constructors_error(
    steps: int, name: str, value: Any, words: str, capturable: bool
) -> None:
    params = make_params()
    optimizer = stepforge.NAdam(
        [{"params": params[:2]}, {"params": params[2:]}], capturable=capturable
    )
    run(optimizer, params, range(steps))
    give_gradients(params, steps)
    optimizer.param_groups[1][name] = value
    before = snapshot(optimizer)
    error = ValueError if "components" in words else TypeError
    assert_refused(optimizer.step, error, (words,))
    assert_unchanged(optimizer, before)


def _inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(2, 3)


#: Bad values of a state of a parameter of shape (2, 3): the key, the value, and parts of the error.
BAD_STATES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "None": ("exp_avg", None, ("exp_avg that is None", "must be a dense tensor")),
    "list": ("exp_avg", [1.0], ("exp_avg that is [1.0]", "must be a dense tensor")),
    "float": ("exp_avg_sq", 0.5, ("exp_avg_sq that is 0.5", "must be a dense tensor")),
    "sparse": ("exp_avg", torch.ones(2, 3).to_sparse(), ("layout torch.sparse_coo", "dense")),
    "shape": ("exp_avg", torch.ones(2), ("exp_avg of shape (2,)", "must be of shape (2, 3)")),
    "boolean": ("exp_avg", torch.ones(2, 3) > 0, ("torch.bool", "torch.float32")),
    "one boolean": ("exp_avg", torch.tensor(True), ("shape () and torch.bool", "(2, 3)")),
    "integers": ("exp_avg", torch.ones(2, 3).long(), ("torch.int64", "torch.float32")),
    "float8": ("exp_avg", torch.ones(2, 3).to(torch.float8_e5m2), ("torch.float8_e5m2",)),
    "complex": ("exp_avg", torch.ones(2, 3) * 1j, ("torch.complex64", "torch.float32")),
    "expanded": (
        "exp_avg",
        torch.ones(1, 1).expand(2, 3),
        ("exp_avg of shape (2, 3)", "strides (0, 0)", "share memory"),
    ),
    "inference": ("exp_avg", _inference_tensor(), ("inference tensor", "clone it")),
    "meta": ("exp_avg", torch.ones(2, 3, device="meta"), ("on meta", "on cpu")),
    "step None": ("step", None, ("step that is None", "must be a tensor of one number")),
    "step float": ("step", 3.0, ("step that is 3.0", "must be a tensor of one number")),
    "step boolean": ("step", torch.tensor(True), ("torch.bool", "a tensor of one number")),
    "step float8": (
        "step",
        torch.tensor(1.0).to(torch.float8_e4m3fn),
        ("torch.float8_e4m3fn", "a tensor of one number"),
    ),
    "two steps": ("step", torch.ones(2), ("shape (2,)", "a tensor of one number")),
    "scalar list": ("mu_product", [1.0], ("mu_product that is [1.0]", "a tensor of one number")),
}


@pytest.mark.parametrize("foreach", [None, True, False], ids=["fastest", "foreach", "reference"])
@pytest.mark.parametrize(("key", "value", "words"), BAD_STATES.values(), ids=BAD_STATES)
@pytest.mark.parametrize("steps", [1, 3], ids=["once", "kept"])
def test_a_state_set_by_hand_to_a_bad_value_is_refused(
    steps: int, key: str, value: Any, words: tuple[str, ...], foreach: bool | None
) -> None:
    params = make_params([(4,), (2, 3)])
    optimizer = stepforge.NAdam([{"params": params[:1]}, {"params": params[1:]}], foreach=foreach)
    run(optimizer, params, range(steps))
    give_gradients(params, steps)
    optimizer.state[params[1]][key] = value
    others = [params[0], params[1], *optimizer.state[params[0]].values()]
    before = [x.detach().clone() for x in others]
    dense = isinstance(value, torch.Tensor) and not value.is_sparse and key == "exp_avg"
    assert_refused(optimizer.step, RuntimeError if dense else TypeError, words)
    assert all(torch.equal(x, y) for x, y in zip(others, before))


@pytest.mark.parametrize("param_state", [None, [], 3.0], ids=str)
def test_a_parameters_state_that_is_no_dict_is_refused(param_state: Any) -> None:
    params = make_params()
    optimizer = stepforge.AdamW(params)
    run(optimizer, params, range(2))
    give_gradients(params, 2)
    before = params[0].detach().clone()
    optimizer.state[params[-1]] = param_state
    shape = tuple(params[-1].shape)
    words = (f"optimizer.state of a parameter of shape {shape} is {param_state!r}",)
    assert_refused(optimizer.step, TypeError, (*words, "must be a dict"))
    assert torch.equal(params[0], before)


def test_a_parameter_whose_elements_share_memory_is_refused_before_any_is_stepped() -> None:
    params = make_params([(4,), (2, 3)])
    optimizer = stepforge.AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    give_gradients(params, 0)
    params[-1].data = params[-1].data.flatten()[:1].sum().expand(params[-1].shape)
    before = snapshot(optimizer)
    assert_refused(optimizer.step, RuntimeError, ("strides", "share memory", "clone it"))
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("foreach", [None, True, False], ids=["fastest", "foreach", "reference"])
@pytest.mark.parametrize(
    ("name", "value"), [("state_format", "int4"), ("master_weight_bits", 16)], ids=lambda x: str(x)
)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_a_format_set_by_hand_to_a_bad_value_changes_nothing(
    steps: int, name: str, value: Any, foreach: bool | None
) -> None:
    params = make_params(dtype=torch.bfloat16)
    optimizer = stepforge.NAdam([{"params": params[:2]}, {"params": params[2:]}], foreach=foreach)
    run(optimizer, params, range(steps))
    give_gradients(params, steps)
    optimizer.param_groups[1][name] = value
    before = snapshot(optimizer)
    words = (f"Invalid {name} value: {value!r}", "it must be one of None")
    assert_refused(optimizer.step, ValueError, words)
    assert_unchanged(optimizer, before)
    optimizer.param_groups[1][name] = None
    optimizer.step()


def _without_scale(param_state: dict[str, Any]) -> None:
    del param_state["exp_avg_sq_scale"]


def _of_another_shape(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_scale"] = torch.ones(64, 2)


def _of_another_dtype(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_scale"] = param_state["exp_avg_sq_scale"].int()


def _codes_cut_short(param_state: dict[str, Any]) -> None:
    param_state["exp_avg_sq_codes"] = param_state["exp_avg_sq_codes"][:32]


BAD_CODES = {
    "no scales": (_without_scale, "exp_avg_sq has codes without scales"),
    "scales of another shape": (_of_another_shape, r"of shape \(64, 2\).*must be.*\(64, 1\)"),
    "scales of another dtype": (_of_another_dtype, r"scales? of .*torch.int32.*torch.float32"),
    "codes of another shape": (_codes_cut_short, r"\(32, 64\)"),
}


@pytest.mark.parametrize("then", ["int8", "bfloat16", None])
@pytest.mark.parametrize(("spoil", "words"), BAD_CODES.values(), ids=BAD_CODES)
def test_codes_damaged_by_hand_change_nothing(
    spoil: Callable[[dict[str, Any]], None], words: str, then: str | None
) -> None:
    params = make_params([(3,), (64, 64)])
    optimizer = stepforge.Adam(params, state_format="int8")
    run(optimizer, params, range(2))
    spoil(optimizer.state[params[1]])
    optimizer.param_groups[0]["state_format"] = then
    give_gradients(params, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.state[params[1]].clear()
    optimizer.step()
