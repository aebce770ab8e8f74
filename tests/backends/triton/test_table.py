"""Tables of parameters: blocks find their parameters, and unchanged arrays are not uploaded again.

Oracles: the reference; a count of uploads; the array before the upload.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stepforge
from stepforge.backends import triton
from stepforge.backends.aliasing import Spans, addresses
from stepforge.backends.triton.kernel import BLOCK, Kernel
from stepforge.backends.triton.source import KernelArgs
from stepforge.backends.triton.table import Mirror, Table, written
from stepforge.backends.triton.variant import Variant
from tests.backends.graphs import Columns, batch_of, by_reference, spec_of, traced
from tests.backends.triton.kernels import by_kernel, by_kernels_only, tables, uploads
from tests.conformance.table import OPTIMIZERS, assert_same_bits, contiguous, forced, normal

AROUND = [BLOCK - 1, BLOCK, BLOCK + 1]


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [0, 0, 0],
        [1],
        AROUND,
        [0, *AROUND, 0, 0, 3, 0],
        [3 * BLOCK, 0, 1, 2 * BLOCK + 1],
        [1] * 300,
        [size % 7 for size in range(100)],
    ],
    ids=lambda sizes: f"{len(sizes)} parameters of {sum(sizes)}",
)
def test_blocks_find_their_parameters(sizes: list[int], device: torch.device) -> None:
    """Each parameter has a coefficient of its own."""
    graph = traced(lambda p, g, c: p - c * g, "c")
    params: list[Columns] = [
        {"p": normal((size,), torch.float32, k), "g": normal((size,), torch.float32, k + 1000)}
        for k, size in enumerate(sizes)
    ]
    coefficients = [[k + 0.5] for k in range(len(sizes))]
    found = by_kernel(graph, params, coefficients, torch.float32, device)
    wanted = by_reference(graph, params, coefficients, torch.float32)
    for got, oracle in zip(found, wanted, strict=True):
        assert_same_bits(got, oracle)


def test_owners_are_the_parameters_of_blocks(device: torch.device) -> None:
    """Oracle: each parameter's index, repeated once per block."""
    sizes = [0, 5, 0, 0, BLOCK + 1, BLOCK, 0]
    params: list[Columns] = [
        {name: torch.zeros(size, device=device) for name in "pg"} for size in sizes
    ]
    batch = batch_of(traced(lambda p, g: p - g), params, [[]] * len(sizes), torch.float32)
    table = Table(batch, range(len(sizes)), dense=True)
    owners = table._owners_of(table.rows.show(table._records))
    blocks = [-(-size // BLOCK) for size in sizes]
    assert owners.dtype == torch.int32
    assert owners.tolist() == np.repeat(np.arange(len(sizes)), blocks).tolist()


def test_a_parameter_of_more_than_2_31_elements(device: torch.device) -> None:
    """Its record starts more than 2**31 elements before the blocks of the launch. These are its
    last blocks, and no memory exists for the ones before.
    """
    graph = traced(lambda p, g: p - g)
    kernel = Kernel(spec_of(graph, torch.float32), Variant())
    assert kernel.args.elements == ("p", "g")
    skipped = (2**31 + 2**20) // BLOCK
    p, g = (normal((BLOCK + 3,), torch.float32, k).to(device) for k in range(2))
    wanted = p - g
    record = np.zeros((1, kernel.args.width), np.int64)
    record[0, KernelArgs.first] = -skipped
    record[0, KernelArgs.size] = skipped * BLOCK + len(p)
    record[0, kernel.args.address("p")] = p.data_ptr() - 4 * skipped * BLOCK
    kernel.launch(
        2,
        torch.zeros(2, dtype=torch.int32, device=device),
        torch.from_numpy(record).to(device),
        torch.tensor([g.data_ptr() - 4 * skipped * BLOCK], device=device),
        torch.zeros(1, 0, device=device),
        None,
        {"p": 4, "g": 4},
    )
    assert torch.equal(p, wanted)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(-40, 3, dtype=np.int64) * 2**40,
        np.array([[2**63 - 1, -(2**63)], [-1, 0], [1, 2**31]]),
        np.linspace(-1, 1, 33, dtype=np.float32).reshape(3, 11),
        np.array([np.nan, np.inf, -0.0, 5e-324, 1e308]),
        np.zeros((2, 0), np.float32),
        np.arange(128, dtype=np.float32),
    ],
    ids=lambda array: f"{array.dtype}-{'x'.join(map(str, array.shape))}",
)
def test_written_arrays_arrive_unchanged(array: np.ndarray, device: torch.device) -> None:
    got = written(array, device)
    assert got.device.type == device.type
    assert got.cpu().numpy().dtype == array.dtype
    assert got.cpu().numpy().shape == array.shape
    assert got.cpu().numpy().tobytes() == array.tobytes()


def test_a_mirror_uploads_an_array_again_only_if_it_differs(device: torch.device) -> None:
    mirror, array = Mirror(device), np.arange(6.0)
    shown = mirror.show(array)
    assert mirror.show(array.copy()) is shown
    assert mirror.uploads == 1
    array[0] = 7
    assert mirror.show(array).tolist() == array.tolist()
    assert shown[0] == 0  # a running step may still read it
    assert mirror.show(array.astype(np.float32)).dtype == torch.float32
    assert mirror.show(array.reshape(2, 3)).shape == (2, 3)
    assert mirror.uploads == 4


def test_a_mirror_compares_every_bit(device: torch.device) -> None:
    """A zero that changes its sign is uploaded again, a NaN that stays is not."""
    mirror = Mirror(device)
    for zero in (0.0, -0.0, 0.0):
        shown = mirror.show(np.array([zero, np.nan]))
        assert mirror.show(np.array([zero, np.nan])) is shown
        assert shown.signbit().tolist()[0] == (str(zero) == "-0.0")
    assert mirror.uploads == 3


def test_addresses_have_all_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Intel's GPUs the highest bit is set. Oracle: the address modulo 2**64."""
    address = 0xFF00_FFFF_FFFE_0000
    params: list[Columns] = [{name: torch.zeros(3) for name in "pg"}]
    batch = batch_of(traced(lambda p, g: p - g), params, [[]], torch.float32)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: address)
    table = Table(batch, [0], dense=True)
    record = table._records[0, table.kernel.args.address("p")]
    assert int(record) % 2**64 == address
    spans = Spans(batch.columns["g"])
    assert (int(spans.begins[0]), int(spans.ends[0])) == (address, address + 12)


def trained(device: torch.device, **options: object) -> tuple[stepforge.Optimizer, list]:
    params = [
        torch.nn.Parameter(normal((size,), torch.float32, size).to(device)) for size in (5, 0, 9)
    ]
    optimizer = stepforge.Adam(params, **options)  # type: ignore[arg-type]
    set_gradients(params, 0)
    optimizer.step()
    return optimizer, params


def in_two_groups(
    device: torch.device, name: str
) -> tuple[stepforge.Optimizer, list[torch.nn.Parameter]]:
    """Return an optimizer whose parameters have different coefficients, and the parameters."""
    params = [torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2)]
    set_gradients(params, 0)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2))]
    return OPTIMIZERS[name].ours(groups), params


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """Set new gradients at other addresses than the old ones, which still exist."""
    old = [p.grad for p in params]
    for p in params:
        p.grad = normal(p.shape, p.dtype, seed + p.numel()).to(p.device)
    del old


def test_only_what_differs_is_uploaded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    optimizer, params = trained(device)
    first = uploads(optimizer)
    assert first == {"rows": 1, "gradients": 1, "coefficients": 0, "members": 0}
    (table,) = tables(optimizer)
    for step in range(1, 3):
        set_gradients(params, step)
        with by_kernels_only():
            optimizer.step()
        assert tables(optimizer) == [table]
        assert uploads(optimizer) == first | {"gradients": 1 + step}
    optimizer.step()  # the same gradients
    assert uploads(optimizer) == first | {"gradients": 3}


def test_coefficients_are_uploaded_where_parameters_differ(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    optimizer, _ = in_two_groups(device, "Adam")
    for step in range(1, 4):
        optimizer.step()
        found = uploads(optimizer)
        assert found == {"rows": 1, "gradients": 1, "coefficients": step, "members": 0}


def test_coefficients_of_the_device_are_not_uploaded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    optimizer, _ = trained(device, capturable=True)
    for _ in range(3):
        optimizer.step()
    assert uploads(optimizer) == {"rows": 1, "gradients": 1, "coefficients": 0, "members": 0}


def test_coefficients_that_do_not_change_stay(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    optimizer, _ = in_two_groups(device, "Adagrad")
    for _ in range(3):
        optimizer.step()
    assert uploads(optimizer) == {"rows": 1, "gradients": 1, "coefficients": 1, "members": 0}


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_of_several_tables_have_their_own_coefficients(
    name: str, capturable: bool, device: torch.device
) -> None:
    """One param group of mixed dtypes, layouts and step counts. Oracle: the reference."""
    shapes = [(3,), (4, 5), (2, 2), (6,), (5, 4)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]

    def trained(backend: str, device: torch.device) -> list[dict[str, torch.Tensor]]:
        params = [
            torch.nn.Parameter(normal(shape, dtype, k).to(device))
            for k, (shape, dtype) in enumerate(zip(shapes, dtypes))
        ]
        with forced(backend):
            optimizer = OPTIMIZERS[name].ours(params, capturable=capturable)
            for step in range(4):
                for k, p in enumerate(params):
                    g = normal(p.shape, p.dtype, 10 * step + k).to(device)
                    p.grad = None if step == 0 and k % 2 else g.t().contiguous().t() if k else g
                optimizer.step()
            if backend == "triton":
                assert len(tables(optimizer)) == 3
                # The two tables of the float32 launch; the bfloat16 launch has one table.
                assert uploads(optimizer)["members"] == (2 if capturable else 0)
        return [
            {"p": contiguous(p).cpu()}
            | {key: contiguous(x).cpu() for key, x in optimizer.state[p].items()}
            for p in params
        ]

    # pow on a GPU need not round like pow on a CPU.
    other = device if capturable else torch.device("cpu")
    for got, oracle in zip(trained("triton", device), trained("reference", other), strict=True):
        assert_same_bits(got, oracle)


def test_a_table_steps_its_members_only(device: torch.device) -> None:
    graph = traced(lambda p, g, c: p - c * g, "c")
    params: list[Columns] = [
        {"p": torch.ones(3, device=device), "g": torch.ones(3, device=device)} for _ in range(4)
    ]
    batch = batch_of(graph, params, [[0.25], [0.5], [1.0], [2.0]], torch.float32)
    table = Table(batch, [3, 1], dense=True)
    table.bind_gradients(addresses([param["g"] for param in params]))
    table.run(batch)
    assert [param["p"][0].item() for param in params] == [1, 0.5, 1, -1]
    assert isinstance(triton.prepare(batch), triton.Tables)
