"""Setup and fixtures of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# A failed assertion inside a shared helper should show the values that it compared.
pytest.register_assert_rewrite("tests.conformance.table", "tests.twins")

# Tests run in several processes at once. OpenMP threads that wait for a busy core cost more time
# than they save, and no result depends on their number unless a test sets it.
torch.set_num_threads(1)
# Test kernels that the compiler builds from the source, not kernels prebuilt in the checkout. The
# folder that replaces this one below has none either.
os.environ["STEPFORGE_PREBUILT"] = ""
# Without a GPU, kernels of Triton run in its interpreter. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def find_cpp_guards() -> str:
    """Build the C++ guards if they are not in the user's cache; return which guards steps use.

    Tests with a cache of their own find them, too, as prebuilt. Else each would start a build.
    """
    from stepforge import extension
    from stepforge.backends import disk_cache

    if os.environ.get("STEPFORGE_GUARDS") == "python":
        return extension.described(extension.status())
    built = extension.build_into_cache()
    if isinstance(built, str):
        os.environ["STEPFORGE_GUARDS"] = "python"
    else:
        os.environ["STEPFORGE_PREBUILT"] = str(disk_cache.cache_folder())
    return extension.described(built)


GUARDS = find_cpp_guards()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the examples whose output names the guards in C++."""
    for item in items:
        if GUARDS != "C++" and item.name == "README.md":
            item.add_marker(pytest.mark.skip(reason=f"guards in {GUARDS}"))


def pytest_collection_finish() -> None:
    """Leave what is imported and collected out of garbage collection, which else visits it all."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    return f"guards in {GUARDS}"


@pytest.fixture(scope="module")
def single_process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep a process group of this process alone, for the tests of a module."""
    from tests.process_groups import process_group

    with process_group(tmp_path_factory.mktemp("process_group") / "store"):
        yield


@pytest.fixture(scope="module")
def mesh(single_process_group: None) -> DeviceMesh:
    """Return a device mesh of this process alone."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))
