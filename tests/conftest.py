"""Shared by all tests."""

import os

import pytest
import torch

# Failures inside the shared table are to show the values that were compared, whoever imports it.
pytest.register_assert_rewrite("tests.conformance.table")

# Tests run in several processes at once; OpenMP threads that wait for a busy core cost more than
# they bring, and nothing that is tested depends on their number unless a test sets it.
torch.set_num_threads(1)
# What is tested is what the compiler makes of the source, not what lies prebuilt in the checkout.
os.environ["STEPFORGE_PREBUILT"] = ""
# Without a GPU the kernels of Triton run in Python. Triton asks once, when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
