"""The self-test: equal bits here, and every kind of fault found.

Oracles: faults that are put into a compiler, an operation or a file of hashes; for powers, Python's
decimal module.
"""

from __future__ import annotations

import decimal
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stepforge import ops
from stepforge.backends import foreach
from stepforge.backends.native import build
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.cli import device as devices
from stepforge.cli import make_app, selftest
from stepforge.cli.measure import OPTIMIZERS
from stepforge.cli.selftest.cases import FACTORS, GROUPS, LARGE, STEPS, Case, cases, values
from stepforge.cli.selftest.compare import bits, outcomes
from tests.backends.native.faults import executable
from tests.backends.triton.kernels import by_kernels_only

CPU = torch.device("cpu")
#: The optimizers of which a test steps the cases if it need not step all.
FEW = "RAdam"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEPFORGE_BACKEND", raising=False)
    monkeypatch.chdir(tmp_path)


def needs_compiler() -> None:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def run(*arguments: object) -> tuple[int, str]:
    command = ["selftest", *map(str, arguments)]
    result = CliRunner().invoke(make_app(), command)
    return result.exit_code, result.output


def run_afresh(**environment: str) -> tuple[int, str]:
    """In a process of its own, which has no kernels loaded."""
    program = "from stepforge.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "selftest", "--optimizer", FEW],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def report(path: str = "stepforge-selftest.json") -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(path).read_text())
    return loaded


def rows(output: str) -> dict[str, list[str]]:
    lines = (line.split() for line in output.splitlines())
    return {words[0]: words[1:] for words in lines if words and words[0] in OPTIMIZERS}


def verdict(output: str) -> str:
    (found,) = [x for x in output.splitlines() if x.startswith(("Equal: ", "DIFFERENT: "))]
    return found


def number_of(name: str) -> int:
    return sum(case.optimizer == name for case in cases())


# What it says here.


def test_all_backends_store_the_bits_that_the_package_carries() -> None:
    """Made anew by the reference, so the file is not out of date either."""
    needs_compiler()
    code, output = run()
    counts = {name: f"{number_of(name)} of {number_of(name)}" for name in OPTIMIZERS}
    assert rows(output) == {name: " ".join(3 * [n]).split() for name, n in counts.items()}
    assert verdict(output) == (
        f"Equal: in {len(cases())} cases foreach and native store the reference's bits, which are "
        "those that the package carries."
    )
    assert code == 0
    assert not list(Path().iterdir()), "a file is for what differs"
    assert set(json.loads(selftest.HASHES.read_text())) == {case.name for case in cases()}


def test_a_report_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the machine and every case, though nothing differs."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "reference")
    code, output = run("--optimizer", FEW, "--report", "asked.json")
    assert code == 0
    assert verdict(output) == (
        f"Equal: the reference stores the bits that the package carries in {number_of(FEW)} cases."
    )
    assert output.splitlines()[-1] == "Attach asked.json to a report."
    told = report("asked.json")
    assert told["machine"]["torch"] == torch.__version__
    assert {"CPU", "compiler", "instruction set", "triton"} <= set(told["machine"])
    assert told["device"] == {"name": "cpu"}
    assert [x["case"] for x in told["results"]] == [
        case.name for case in cases() if case.optimizer == FEW
    ]
    assert all(x["agrees"] and x["expected"] == x["found"] for x in told["results"])


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Why no kernel can be had: a reason under which no process remembers another's kernels."""
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v9")
    return "STEPFORGE_ISA is 'x86-64-v9'; on this processor it must be "


def test_a_backend_without_kernels_is_named_and_does_not_count_as_tested(no_kernels: str) -> None:
    code, output = run("--optimizer", FEW)
    assert code == 0
    assert f"native was not tested: {no_kernels}" in output
    assert verdict(output).startswith(
        f"Equal: in {number_of(FEW)} cases foreach stores the reference's bits"
    )


def test_a_backend_that_is_asked_for_and_can_test_nothing(
    no_kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "native")
    code, output = run("--optimizer", FEW)
    assert code == 1
    assert output.startswith(f"stepforge: nothing can be tested on cpu: native: {no_kernels}")


@pytest.mark.skipif(not is_interpreted(), reason="kernels are compiled here, for the GPU")
def test_kernels_of_triton_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("STEPFORGE_BACKEND", "triton")
    code, output = run("--optimizer", FEW)
    count = -(-number_of(FEW) // 4)
    assert code == 0, output
    assert "Triton's interpreter is slow: it steps one case in 4." in output
    assert rows(output)[FEW] == f"{count} of {count} {count} of {count}".split()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu_store_the_bits_of_the_cpu() -> None:
    code, output = run("--device", "cuda")
    assert code == 0, output
    assert "triton on cuda:0" in output


# Faults.


def test_a_compiler_that_contracts_or_fails_is_found(tmp_path: Path) -> None:
    """It fails at float16, and rounds a product and a sum once everywhere else."""
    needs_compiler()
    if "x86-64-v3" not in build.instruction_sets() and build.on_x86():
        pytest.skip("needs a processor that multiplies and adds in one rounding")
    fails = 'for x; do case "$x" in *.c) grep -q widen_float16 "$x" && exit 1;; esac; done'
    wrong = f'exec {" ".join(build.compiler())} "$@" -ffp-contract=fast'
    script = executable(tmp_path / "cc", f"{fails}\n{wrong}")
    code, output = run_afresh(
        CC=str(script), STEPFORGE_CACHE=str(tmp_path / "cache"), STEPFORGE_PREBUILT=""
    )
    assert code == 1
    count = number_of(FEW)
    words = rows(output)[FEW]
    assert words[:6] == 2 * [str(count), "of", str(count)]
    # Where weights of 16 bits are stored, most steps are rounded away, and perhaps all.
    assert int(words[6]) < count / 2
    assert verdict(output) == (
        "DIFFERENT: native does not store the reference's bits in "
        f"{count - int(words[6])} of {count} cases."
    )
    assert output.splitlines()[-1] == "Attach stepforge-selftest.json to a report."
    told = report()
    assert told["machine"]["compiler"].startswith(str(script))
    unequal = [x for x in told["results"] if not x["agrees"]]
    assert {x["backend"] for x in unequal} == {"native"}
    assert len(unequal) == count - int(words[6])
    failed = [x for x in unequal if "error" in x]
    assert {x["case"] for x in failed} == {
        case.name for case in cases() if case.optimizer == FEW and case.dtype == torch.float16
    }
    assert all(f"{script} failed" in x["error"] and x["found"] == [] for x in failed)
    contracted = [x for x in unequal if "error" not in x]
    assert any("float32" in x["case"] for x in contracted)
    for x in contracted:
        step = x["step"] - 1
        assert x["expected"][:step] == x["found"][:step]
        assert x["expected"][step] != x["found"][step]
        first = x["differing"][0]["first"][0]
        assert first["expected"] != first["found"]


@pytest.fixture
def wrong_division(monkeypatch: pytest.MonkeyPatch) -> None:
    """Division in two roundings, as torch has it for a number by a tensor."""

    def by_reciprocal(x: Any, y: Any) -> Any:
        return torch._foreach_mul(torch._foreach_reciprocal(y), x)

    monkeypatch.setitem(foreach.OPERATIONS, "div", by_reciprocal)
    monkeypatch.delitem(foreach.IN_PLACE, "div")
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")


@pytest.mark.usefixtures("wrong_division")
def test_a_wrong_operation_is_told_of_by_its_first_elements() -> None:
    code, output = run("--optimizer", FEW, "--report", "here.json")
    assert code == 1
    assert verdict(output).startswith("DIFFERENT: foreach does not store the reference's bits in ")
    assert output.splitlines()[-1] == "Attach here.json to a report."
    told = report("here.json")["results"]
    found = next(x for x in told if not x["agrees"])
    case = next(case for case in cases() if case.name == found["case"])
    steps = {
        name: outcomes(case, name, CPU)[found["step"] - 1] for name in ("reference", "foreach")
    }
    for tensor in found["differing"]:
        wanted, got = (steps[name][tensor["tensor"]] for name in ("reference", "foreach"))
        assert tensor["differing"] == int((wanted != got).sum())
        assert tensor["elements"] == wanted.size
        for element in tensor["first"]:
            index, mask = tuple(element["index"]), (1 << 8 * wanted.itemsize) - 1
            assert int(element["expected"], 16) == int(wanted[index]) & mask
            assert int(element["found"], 16) == int(got[index]) & mask


def test_a_changed_hash_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is missing."""
    carried = json.loads(selftest.HASHES.read_text())
    changed, missing = [case.name for case in cases() if case.optimizer == FEW][1:3]
    words = carried[changed].split()
    carried[changed] = " ".join([*words[:2], words[2][::-1], *words[3:]])
    del carried[missing]
    (tmp_path / "hashes.json").write_text(json.dumps(carried))
    monkeypatch.setattr(selftest, "HASHES", tmp_path / "hashes.json")
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    code, output = run("--optimizer", FEW)
    assert code == 1
    assert verdict(output) == (
        "DIFFERENT: the reference does not store those that the package carries in 2 of "
        f"{number_of(FEW)}."
    )
    unequal = {x["case"]: x for x in report()["results"] if not x["agrees"]}
    assert set(unequal) == {changed, missing}
    assert {x["against"] for x in unequal.values()} == {"the hashes of the package"}
    assert unequal[changed]["step"] == 3
    assert unequal[missing]["step"] == 1


def test_powers_that_are_one_unit_off_change_the_hashes_and_no_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a C library that rounds them in another way: all backends take them from the host."""
    needs_compiler()
    monkeypatch.setenv("STEPFORGE_BACKEND", "native")
    patch_powers(monkeypatch, lambda base, exponent: math.nextafter(base**exponent, math.inf))
    code, output = run("--optimizer", FEW)
    count = number_of(FEW)
    assert code == 1
    assert rows(output)[FEW][3:] == [str(count), "of", str(count)]
    assert verdict(output).startswith(
        "DIFFERENT: the reference does not store those that the package carries in "
    )


@pytest.mark.usefixtures("wrong_division")
def test_a_report_that_cannot_be_written() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    code, output = run("--optimizer", FEW, "--report", "/dev/full")
    assert code == 1
    assert output.splitlines()[-1].startswith("stepforge: /dev/full cannot be written (No space")


# The file of hashes.


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of hashes to be written, and only some cases."""
    monkeypatch.setattr(selftest, "cases", lambda: cases()[::9])
    path = tmp_path / "hashes.json"
    path.write_text("{}")
    monkeypatch.setattr(selftest, "HASHES", path)
    return path


def test_hashes_are_written(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    code, output = run("--write-hashes")
    assert code == 0
    assert output.splitlines()[-1] == f"The package carries them: {few}"
    shipped = json.loads(Path(selftest.__file__).with_name("hashes.json").read_text())
    assert json.loads(few.read_text()) == {case.name: shipped[case.name] for case in cases()[::9]}
    assert not Path("stepforge-selftest.json").exists()


@pytest.mark.usefixtures("wrong_division")
def test_no_hashes_are_written_while_a_backend_differs(few: Path) -> None:
    code, output = run("--write-hashes")
    assert code == 1
    assert output.splitlines()[-1] == "stepforge: backends differ, so no hashes are written"
    assert few.read_text() == "{}"


# What is asked for.


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--device", "gpu"], {}, "'gpu' is no device of torch"),
        (["--device", "xpu:7"], {}, "finds no xpu:7 here"),
        (["--optimizer", "SGD"], {}, "'SGD' is not one of"),
        (["--report", "no/such.json"], {}, "no is no folder."),
        (["--write-hashes", "--optimizer", FEW], {}, "it is for all cases, on a CPU."),
        ([], {"STEPFORGE_BACKEND": "warp"}, "STEPFORGE_BACKEND is 'warp'; it must be one of"),
    ],
)
def test_bad_options_get_one_sentence(
    arguments: list[str],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, output = run(*arguments)
    assert code in (1, 2)
    assert said in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("device", "asked", "said"),
    [
        ("meta", "", "there are no kernels for meta devices"),
        ("cuda:0", "foreach", "on cuda:0 only the bits of triton are promised"),
    ],
)
def test_a_device_where_no_bits_are_promised(
    device: str, asked: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find", lambda _: torch.device(device))
    monkeypatch.setattr(devices, "use", lambda _: None)
    monkeypatch.setenv("STEPFORGE_BACKEND", asked)
    code, output = run("--device", device)
    assert code in (1, 2)
    assert said in " ".join(output.split())


# The cases.


def possible(a: str, x: Any, b: str, y: Any) -> bool:
    """Whether two choices can meet: written anew here, from the constructors and the formats."""
    both = {a: x, b: y}
    short = (None, torch.bfloat16, torch.float16)
    if both.get("weights") and both.get("dtype") not in short:
        return False
    if both.get("dtype") == torch.complex64 and both.get("gradient"):
        return False
    if both.get("gradient") and both.get("gradient") == both.get("dtype"):
        return False
    if both.get("amsgrad"):
        return both.get("optimizer") in (None, "Adam", "AdamW")
    if both.get("decoupled_weight_decay"):
        return both.get("optimizer") in (None, "Adam", "NAdam", "RAdam")
    return True


def chosen(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    weights = options.get("master_weight_bits") or (
        "at random" if options.get("stochastic_rounding") else None
    )
    return {
        "optimizer": case.optimizer,
        "dtype": case.dtype,
        "gradient": None if case.gradient == case.dtype else case.gradient,
        "weights": weights,
        **{
            name: options.get(name, FACTORS[name][0])
            for name in FACTORS
            if name not in ("optimizer", "dtype", "gradient", "weights")
        },
    }


def test_every_two_choices_that_fit_meet_in_some_case() -> None:
    met = {
        frozenset(pair)
        for case in cases()
        for pair in itertools.combinations(chosen(case).items(), 2)
    }
    wanted = {
        frozenset([(a, x), (b, y)])
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for x, y in itertools.product(xs, ys)
        if possible(a, x, b, y)
    }
    assert met == wanted
    assert len({case.name for case in cases()}) == len(cases())


def test_every_optimizer_steps_every_dtype_as_it_is_made() -> None:
    plain = {
        (case.optimizer, case.dtype)
        for case in cases()
        if not case.options and case.gradient == case.dtype
    }
    assert plain == set(itertools.product(OPTIMIZERS, FACTORS["dtype"]))


def test_every_layout_is_stepped() -> None:
    members = [member for _, of_group in (*GROUPS, LARGE) for member in of_group]
    params = [member.parameter(0, torch.float32, CPU) for member in members]
    gradients = [member.gradient(0, torch.float32, CPU) for member in members]
    shapes = {tuple(p.shape) for p in params}
    assert () in shapes
    assert any(0 in shape for shape in shapes)
    assert any(not p.is_contiguous() and p.t().is_contiguous() for p in params if p.dim() == 2)
    assert any(p.data_ptr() % 16 for p in params if p.numel())
    for tensors in (params, gradients):
        assert any(x.stride()[-1:] == (2,) for x in tensors), "gaps"
    assert any(0 in g.stride() for g in gradients if g.numel()), "expanded"
    assert any(g.stride() != p.stride() for p, g in zip(params, gradients))
    coded = [p for p in params if p.dim() == 2 and p.numel() >= 4096]
    assert {p.is_contiguous() for p in coded} == {True, False}
    assert params[-1].numel() >= 2**16, "what several threads share"


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_kernels_leave_no_case_to_the_reference(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits would be right, and would say nothing of a kernel."""
    if backend == "native":
        needs_compiler()
    elif not is_interpreted():
        pytest.skip("kernels are compiled here, for the GPU")
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    few = cases()[:: 4 if backend == "native" else 19]
    with by_kernels_only():
        assert all(len(outcomes(case, backend, CPU)) == STEPS for case in few)


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
def test_inputs_reach_the_corners_they_are_meant_for(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    wide = torch.cat([values((4369,), dtype, seed, wide=True) for seed in range(9)])
    wide = torch.view_as_real(wide).flatten() if dtype.is_complex else wide
    sizes = wide.abs().double()
    assert wide.isnan().any()
    assert (wide == torch.inf).any()
    assert (wide == -torch.inf).any()
    assert (wide == 0).any()
    assert (torch.signbit(wide) & (wide == 0)).any()
    assert ((sizes > 0) & (sizes < info.smallest_normal)).any()
    assert sizes[sizes > 0].min() == info.smallest_normal * info.eps
    assert (sizes == info.max).any()
    assert wide.isfinite().double().mean() > 0.99
    narrow = values((4369,), dtype, 1, wide=False)
    narrow = torch.view_as_real(narrow).flatten() if dtype.is_complex else narrow
    assert narrow.abs().min() >= 2.0**-12
    assert narrow.abs().max() < 2.0**4
    assert 0.4 < (narrow > 0).double().mean() < 0.6
    assert len(narrow.unique()) > 0.6 * min(len(narrow), 2 * 16 / info.eps)


def test_bits_of_nans_are_alike_and_those_of_zeros_are_not() -> None:
    patterns = torch.tensor([0x7FC00000, 0x7F800001, -0x400000, -1], dtype=torch.int32)
    assert patterns.view(torch.float32).isnan().all()
    assert len(set(bits(patterns.view(torch.float32)).tolist())) == 1
    assert len(set(bits(torch.tensor([0.0, -0.0, torch.inf, 1.0])).tolist())) == 4
    assert bits(torch.tensor([3.0, 4.0])[1:]).tolist() == [0x40800000]
    assert bits(torch.tensor([1 + 2j])).tolist() == [[0x3F800000, 0x40000000]]


# Powers.


def patch_powers(monkeypatch: pytest.MonkeyPatch, power: Callable[[float, float], float]) -> None:
    """Has uniform values take powers from a function."""
    monkeypatch.setattr(ops, "_number_power", power)
    monkeypatch.setattr(ops, "_array_power", ops._each(power))


def test_powers_are_far_from_where_c_libraries_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """They alone come from a C library. Glibc's and musl's err by 0.54 units at most.

    So all that err by less than 0.55 units round as decimal does, if the exact value is more than
    0.05 from the middle of two numbers.
    """
    powers: dict[tuple[float, float], float] = {}
    original = ops._number_power

    def recorded(base: float, exponent: float) -> float:
        powers[float(base), float(exponent)] = original(base, exponent)
        return powers[float(base), float(exponent)]

    patch_powers(monkeypatch, recorded)
    for name in OPTIMIZERS:  # no dtype and no other option has to do with them
        outcomes(next(case for case in cases() if case.optimizer == name), "reference", CPU)
    assert {base for base, _ in powers} == {0.0, 0.25, 0.375, 0.9, 0.96, 0.999}
    assert {exponent for base, exponent in powers if base == 0.999} >= set(range(1, STEPS + 1))
    with decimal.localcontext(prec=60):
        for (base, exponent), found in powers.items():
            if base == 0:
                assert found == 0
                continue
            exact = decimal.Decimal(base) ** decimal.Decimal(exponent)
            off = abs(exact - decimal.Decimal(found)) / decimal.Decimal(math.ulp(found))
            assert off < decimal.Decimal("0.45"), (base, exponent)
