"""Every operation of the vocabulary is known to every backend. Oracle: ``ops.VOCABULARY``."""

import pytest

from stepforge.backends import BACKENDS
from stepforge.expr import UNIFORM_ONLY
from stepforge.ops import VOCABULARY

VARYING = sorted(VOCABULARY.keys() - UNIFORM_ONLY)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", VARYING)
def test_every_backend_has_every_operation(backend: str, op: str) -> None:
    assert op in BACKENDS[backend].OPERATIONS


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_has_operations_of_its_own(backend: str) -> None:
    assert set(BACKENDS[backend].OPERATIONS) <= set(VOCABULARY)
