"""Scalar states in vectors. Oracle: the same numbers in tensors of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stepforge.state.elements import Elements
from stepforge.step.scalar_states import ScalarStates, ScalarVectors

KEYS = ("step", "product")
Params = list[torch.Tensor]
States = list[dict[str, Any]]


def some(count: int, dtype: torch.dtype = torch.float32) -> tuple[Params, States]:
    """Return parameters, and the state of each."""
    states = [
        {key: torch.tensor(i + 10.0 * k, dtype=dtype) for k, key in enumerate(KEYS)}
        for i in range(count)
    ]
    return [torch.ones(1) for _ in range(count)], states


def taken(vectors: ScalarVectors, params: Params, states: States, *which: int) -> ScalarStates:
    """Return the scalar states of some parameters, in vectors with room for all."""
    return vectors.scalar_states(
        [params[i] for i in which], [states[i] for i in which], KEYS, room=len(params)
    )


def addresses(states: States) -> list[int]:
    return [state[key].data_ptr() for state in states for key in KEYS]


def test_parameters_in_order_have_a_vector_and_others_have_elements_of_it() -> None:
    vectors, (params, states) = ScalarVectors(), some(6)
    whole = taken(vectors, params, states, *range(6)).tensors["step"]
    assert isinstance(whole, torch.Tensor)
    before = addresses(states)
    for which in [(0,), (5,), (2, 3, 4), tuple(range(6))]:
        part = taken(vectors, params, states, *which).tensors["step"]
        assert isinstance(part, torch.Tensor)
        assert part.data_ptr() == states[which[0]]["step"].data_ptr()
        assert part.tolist() == list(which)
    for which in [(0, 2), (1, 0), tuple(range(6))[::-1]]:
        chosen = taken(vectors, params, states, *which).tensors["step"]
        assert isinstance(chosen, Elements)
        assert chosen.read().tolist() == list(which)
    assert addresses(states) == before


def test_parameters_that_come_later_take_the_room_that_is_left() -> None:
    vectors, (params, states) = ScalarVectors(), some(5)
    taken(vectors, params, states, 3, 1)
    before = addresses([states[3], states[1]])
    late = taken(vectors, params, states, 0, 1, 4).tensors["step"]
    assert isinstance(late, Elements)
    assert late.read().tolist() == [0, 1, 4]
    assert addresses([states[3], states[1]]) == before
    bases = {id(states[i]["step"]._base) for i in (0, 1, 3, 4)}
    assert len(bases) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", [(0, 1, 2, 3), (1, 2), (0, 2, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("skipped", [None, False, True])
@pytest.mark.parametrize("same", [False, True])
def test_elements_are_read_and_written_as_tensors_are(
    which: tuple[int, ...], skipped: bool | None, same: bool, dtype: torch.dtype
) -> None:
    params, states = some(4, dtype)
    _, own = some(4, dtype)
    if same:
        for state in (*states, *own):
            state["step"].fill_(3.0)
    found = taken(ScalarVectors(), params, states, *range(4))
    vectors = ScalarVectors()
    taken(vectors, params, states, *range(4))
    found = taken(vectors, params, states, *which)
    wanted = ScalarStates({key: [own[i][key] for i in which] for key in KEYS})
    flag = None if skipped is None else torch.tensor(skipped)
    for step in range(3):
        for key in KEYS:
            assert np.array_equal(found.on_host(key), wanted.on_host(key))
            assert torch.equal(found.on_device()[key], wanted.on_device()[key])
        for scalars in (found, wanted):
            scalars.count_step(flag)
            value = 0.1 + step if same else np.arange(len(which)) / 3 + step
            scalars.store("product", value, flag)
    for state, twin in zip(states, own, strict=True):  # those of the others, too
        assert all(torch.equal(state[key], twin[key]) for key in KEYS)
    assert found.device == wanted.device


def test_tensors_that_are_no_elements_become_some() -> None:
    """Their memory was swapped, negated or given to another parameter; the number counts."""
    vectors, (params, states) = ScalarVectors(), some(4)
    taken(vectors, params, states, *range(4))
    states[0]["step"].data = torch.tensor(40.0)
    states[1]["step"] = torch._neg_view(states[1]["step"])
    states[2]["step"], states[3]["step"] = states[3]["step"], states[2]["step"]
    values = taken(vectors, params, states, *range(4)).tensors["step"]
    assert values.tolist() == [40.0, -1.0, 3.0, 2.0]  # type: ignore[union-attr]
    assert len({state["step"].data_ptr() for state in states}) == 4


def test_two_parameters_with_one_tensor_get_an_element_each() -> None:
    vectors, (params, states) = ScalarVectors(), some(3)
    taken(vectors, params, states, 0, 1)
    states[1]["step"] = states[2]["step"] = states[0]["step"]
    values = taken(vectors, params, states, 0, 2, 1)
    values.count_step(None)
    assert [float(state["step"]) for state in states] == [1.0, 1.0, 1.0]


def test_vectors_hold_the_elements_of_their_own_parameters() -> None:
    vectors, (params, states) = ScalarVectors(), some(3)
    assert not vectors.hold(params, states, KEYS)
    taken(vectors, params, states, 0, 2)
    assert vectors.hold([params[2], params[0]], [states[2], states[0]], KEYS)
    assert not vectors.hold(params, states, KEYS)
    taken(vectors, params, states, 1)
    assert vectors.hold(params, states, KEYS)
    assert not ScalarVectors().hold(params, states, KEYS)


def test_numbers_that_a_step_made_in_inference_mode_leave_it() -> None:
    """Outside of that mode nothing may write to its tensors."""
    vectors, (params, states) = ScalarVectors(), some(3)
    with torch.inference_mode():
        taken(vectors, params, states, 0)
    scalars = taken(vectors, params, states, 1, 2)
    scalars.count_step(None)
    assert [float(state["step"]) for state in states] == [0.0, 2.0, 3.0]
