"""Options of formats: their effect on mixed dtypes, and warnings where they have none.

Oracle: the same parameters in groups of their own, with each option only where it has an effect.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import stepforge
from stepforge.state.layout import LOW_BITS
from tests.twins import (
    LR,
    assert_identical,
    copy_params,
    each_optimizer,
    make_params,
    save_and_load,
    snapshot,
)

Params = list[torch.nn.Parameter]
BFLOAT16 = torch.bfloat16

#: Dtypes as trainers mix them: most weights in bfloat16, norms and adapters in longer dtypes.
MIXED = (BFLOAT16, torch.float32, torch.float64, torch.complex64, torch.float16)
#: Options that have an effect on 16-bit weights only.
FOR_16_BITS: dict[str, dict[str, Any]] = {
    "24 bits": {"master_weight_bits": 24},
    "32 bits": {"master_weight_bits": 32},
    "stochastic": {"stochastic_rounding": True},
}


def mixed_params() -> Params:
    return [p for dtype in MIXED for p in make_params([(40, 3)], dtype)]


def give_gradients_of_own_dtype(params: Params, step: int) -> None:
    """Set gradients that depend on the step, the parameter's position and its dtype only."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("options", FOR_16_BITS.values(), ids=FOR_16_BITS)
@each_optimizer
def test_weights_that_have_the_bits_already_are_stepped_as_they_are(
    cls: type, options: dict[str, Any]
) -> None:
    """Oracle: a group for each parameter, and the option only where it has an effect."""
    together, apart = mixed_params(), mixed_params()
    optimizer = cls(together, lr=LR, **options)
    groups = [{"params": [p], **(options if p.dtype.itemsize == 2 else {})} for p in apart]
    expected = cls(groups, lr=LR)
    for step in range(3):
        for params, stepped in ((together, optimizer), (apart, expected)):
            give_gradients_of_own_dtype(params, step)
            stepped.step()
    assert_identical(snapshot(optimizer)["params"], snapshot(expected)["params"])
    states = [
        [dict(stepped.state[p]) for p in params]
        for params, stepped in ((together, optimizer), (apart, expected))
    ]
    assert_identical(*states)
    with_low_bits = [bool(LOW_BITS.keys() & param_state.keys()) for param_state in states[0]]
    assert with_low_bits == [
        p.dtype.itemsize == 2 and "master_weight_bits" in options for p in together
    ]
    own = copy_params(together)
    resumed = cls(own, lr=LR, **options)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    assert_identical([dict(resumed.state[p]) for p in own], states[0])


def warnings_of(params: Any, **options: Any) -> list[str]:
    """Return the warnings of a constructor, which must point to the line that called it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stepforge.Adam(params, **options)
    assert all(x.category is UserWarning and x.filename == __file__ for x in caught)
    return [str(x.message) for x in caught]


def test_an_option_that_no_parameter_can_use_is_warned_of_once() -> None:
    small, large = make_params([(5,), (7, 3)]), make_params([(64, 128)])
    for option, value, exception in (
        ("master_weight_bits", 24, "not 24 bits for 2 parameters, 26 elements: float32 has them"),
        ("stochastic_rounding", True, "not rounded at random for 2 parameters, 26 elements: flo"),
        ("state_format", "int8", "not int8 for 2 parameters, 26 elements: fewer than 4,096 elem"),
    ):
        groups = [{"params": [p]} for p in small]
        (message,) = warnings_of(groups, **{option: value})
        assert message.startswith(f"{option}={value!r} has no effect: {exception}")
    # One parameter that can use it is enough, in any group. Groups without the option do not count.
    assert not warnings_of([*small, *large], state_format="int8")
    mixed = [{"params": small}, {"params": make_params([(2,)], BFLOAT16)}]
    assert not warnings_of(mixed, master_weight_bits=24)
    (message,) = warnings_of([{"params": small, "state_format": "int8"}, {"params": large}])
    assert message.startswith("state_format='int8' has no effect: not int8 for 2 parameters")


def test_parameters_of_lazy_modules_may_yet_use_an_option() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules")
        params = list(torch.nn.LazyLinear(5).parameters())
    assert not warnings_of(params, state_format="int8")


def test_complex_states_keep_their_dtype_and_say_so() -> None:
    params = make_params([(4,)], torch.complex64)
    (message,) = warnings_of(params, state_format="bfloat16")
    assert "not bfloat16 for 1 parameter, 4 elements: states of complex64" in message
    assert not warnings_of(params, state_format="float32")
