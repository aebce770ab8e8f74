"""Lets failures inside the shared table show the values that were compared."""

import pytest

pytest.register_assert_rewrite("tests.conformance.table")
