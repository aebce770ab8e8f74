"""The selftest: equal bits here, and every kind of fault found.

Oracles: faults in a compiler, an operation or the file of hashes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stepforge.backends import chunk
from stepforge.backends.native import compiler
from stepforge.backends.triton.kernel import is_interpreted
from stepforge.cli import devices, make_app
from stepforge.cli.selftest import command
from stepforge.cli.selftest.cases import cases
from stepforge.cli.selftest.compare import outcomes
from stepforge.rules import ALL
from tests.backends.native.faults import executable
from tests.cli.compilers import needs_compiler
from tests.cli.selftest.powers import patch_powers

#: The optimizer of tests that need not step all.
FEW = "RAdam"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(make_app(), ["selftest", *map(str, arguments)])
    return result.exit_code, result.output


def run_afresh(**environment: str) -> tuple[int, str]:
    """Run in a new process, which has no kernels loaded."""
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
    return {words[0]: words[1:] for words in lines if words and words[0] in ALL}


def verdict(output: str) -> str:
    (found,) = [x for x in output.splitlines() if x.startswith(("Equal: ", "DIFFERENT: "))]
    return found


def case_count(name: str) -> int:
    return sum(case.optimizer == name for case in cases())


# Output. ------------------------------------------------------------------------------------------


def test_all_backends_store_the_bits_that_the_package_carries() -> None:
    """The reference recomputes the hashes, so the file is up to date too."""
    needs_compiler()
    code, output = run()
    counts = {name: f"{case_count(name)} of {case_count(name)}" for name in ALL}
    assert rows(output) == {name: " ".join(3 * [n]).split() for name, n in counts.items()}
    assert verdict(output) == (
        f"Equal: in {len(cases())} cases foreach and native store the reference's bits, which are "
        "those that the package carries."
    )
    assert code == 0
    assert not list(Path().iterdir()), "a report is written only if bits differ"
    assert set(json.loads(command.HASHES.read_text())) == {case.name for case in cases()}


def test_a_report_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has the machine and every case, though nothing differs."""
    monkeypatch.setenv("STEPFORGE_BACKEND", "reference")
    code, output = run("--optimizer", FEW, "--report", "asked.json")
    assert code == 0
    assert verdict(output) == (
        f"Equal: the reference stores the bits that the package carries in {case_count(FEW)} cases."
    )
    assert output.splitlines()[-1] == "Attach asked.json to a report."
    content = report("asked.json")
    assert content["machine"]["torch"] == torch.__version__
    assert {"CPU", "compiler", "instruction set", "triton"} <= set(content["machine"])
    assert content["device"] == {"name": "cpu"}
    assert [x["case"] for x in content["results"]] == [
        case.name for case in cases() if case.optimizer == FEW
    ]
    assert all(x["agrees"] and x["expected"] == x["found"] for x in content["results"])


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make kernels unavailable for a reason that no loaded kernel hides, and return the reason."""
    monkeypatch.setenv("STEPFORGE_ISA", "x86-64-v9")
    return "STEPFORGE_ISA is 'x86-64-v9'; on this processor it must be "


def test_a_backend_without_kernels_is_named_and_does_not_count_as_tested(no_kernels: str) -> None:
    code, output = run("--optimizer", FEW)
    assert code == 0
    assert f"native was not tested: {no_kernels}" in output
    assert verdict(output).startswith(
        f"Equal: in {case_count(FEW)} cases foreach stores the reference's bits"
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
    count = -(-case_count(FEW) // 4)
    assert code == 0, output
    assert "Triton's interpreter is slow: it steps one case in 4." in output
    assert rows(output)[FEW] == f"{count} of {count} {count} of {count}".split()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu_store_the_bits_of_the_cpu() -> None:
    code, output = run("--device", "cuda")
    assert code == 0, output
    assert "triton on cuda:0" in output
    content = report()
    assert content["speed_problem"] == ""
    assert len(content["speed"]) == 8
    assert all(each["share_of_copy"] > 0 and each["gpu_ms"] > 0 for each in content["speed"])
    assert content["kernels"]


# Faults. ------------------------------------------------------------------------------------------


def test_a_compiler_that_contracts_or_fails_is_found(tmp_path: Path) -> None:
    """The compiler fails at float16, and contracts a product and a sum everywhere else."""
    needs_compiler()
    if "x86-64-v3" not in compiler.instruction_sets() and compiler.on_x86():
        pytest.skip("needs a processor with fused multiply-add")
    fails = 'for x; do case "$x" in *.c) grep -q widen_float16 "$x" && exit 1;; esac; done'
    wrong = f'exec {" ".join(compiler.compiler())} "$@" -ffp-contract=fast'
    script = executable(tmp_path / "cc", f"{fails}\n{wrong}")
    code, output = run_afresh(
        CC=str(script),
        STEPFORGE_CACHE=str(tmp_path / "cache"),
        STEPFORGE_PREBUILT="",
        STEPFORGE_GUARDS="python",
    )
    assert code == 1
    count = case_count(FEW)
    words = rows(output)[FEW]
    assert words[:6] == 2 * [str(count), "of", str(count)]
    # In 16-bit weights most differences are rounded away, and perhaps all.
    assert int(words[6]) < count / 2
    assert verdict(output) == (
        "DIFFERENT: native does not store the reference's bits in "
        f"{count - int(words[6])} of {count} cases."
    )
    assert output.splitlines()[-1] == "Attach stepforge-selftest.json to a report."
    content = report()
    assert content["machine"]["compiler"].startswith(str(script))
    unequal = [x for x in content["results"] if not x["agrees"]]
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
    """Divide with two roundings, as torch divides a number by a tensor."""

    def by_reciprocal(x: Any, y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return torch.mul(torch.reciprocal(y), x, out=out)

    monkeypatch.setitem(chunk.WRITERS, "div", by_reciprocal)
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")


@pytest.mark.usefixtures("wrong_division")
def test_a_wrong_operation_is_reported_with_its_first_elements() -> None:
    code, output = run("--optimizer", FEW, "--report", "here.json")
    assert code == 1
    assert verdict(output).startswith("DIFFERENT: foreach does not store the reference's bits in ")
    assert output.splitlines()[-1] == "Attach here.json to a report."
    results = report("here.json")["results"]
    found = next(x for x in results if not x["agrees"])
    case = next(case for case in cases() if case.name == found["case"])
    steps = {
        name: outcomes(case, name, devices.CPU)[found["step"] - 1]
        for name in ("reference", "foreach")
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
    """A missing hash is found too."""
    hashes = json.loads(command.HASHES.read_text())
    changed, missing = [case.name for case in cases() if case.optimizer == FEW][1:3]
    words = hashes[changed].split()
    hashes[changed] = " ".join([*words[:2], words[2][::-1], *words[3:]])
    del hashes[missing]
    (tmp_path / "hashes.json").write_text(json.dumps(hashes))
    monkeypatch.setattr(command, "HASHES", tmp_path / "hashes.json")
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    code, output = run("--optimizer", FEW)
    assert code == 1
    assert verdict(output) == (
        "DIFFERENT: the reference does not store those that the package carries in 2 of "
        f"{case_count(FEW)}."
    )
    unequal = {x["case"]: x for x in report()["results"] if not x["agrees"]}
    assert set(unequal) == {changed, missing}
    assert {x["against"] for x in unequal.values()} == {"the hashes of the package"}
    assert unequal[changed]["step"] == 3
    assert unequal[missing]["step"] == 1


def test_powers_that_are_one_unit_off_change_the_hashes_and_no_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every backend takes powers from the host, whose C library may round them differently."""
    needs_compiler()
    monkeypatch.setenv("STEPFORGE_BACKEND", "native")
    patch_powers(monkeypatch, lambda base, exponent: math.nextafter(base**exponent, math.inf))
    code, output = run("--optimizer", FEW)
    count = case_count(FEW)
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
    assert output.splitlines()[-1].startswith(
        "stepforge: /dev/full cannot be written to: No space left on device; name another file"
    )


# The file of hashes. ------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write hashes to a temporary file, of only some cases."""
    monkeypatch.setattr(command, "cases", lambda: cases()[::9])
    path = tmp_path / "hashes.json"
    path.write_text("{}")
    monkeypatch.setattr(command, "HASHES", path)
    return path


def test_hashes_are_written(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPFORGE_BACKEND", "foreach")
    code, output = run("--write-hashes")
    assert code == 0
    assert output.splitlines()[-1] == f"The package carries them: {few}"
    shipped = json.loads(Path(command.__file__).with_name("hashes.json").read_text())
    assert json.loads(few.read_text()) == {case.name: shipped[case.name] for case in cases()[::9]}
    assert not Path("stepforge-selftest.json").exists()


@pytest.mark.usefixtures("wrong_division")
def test_no_hashes_are_written_while_a_backend_differs(few: Path) -> None:
    code, output = run("--write-hashes")
    assert code == 1
    assert output.splitlines()[-1] == "stepforge: backends differ, so no hashes are written"
    assert few.read_text() == "{}"


# Options. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--device", "gpu"], {}, "'gpu' is no device of torch"),
        (["--device", "xpu:7"], {}, "finds no xpu:7 here"),
        (["--optimizer", "SGD"], {}, "'SGD' is not one of"),
        (["--report", "no/such.json"], {}, "there is no folder no: make it, or name another."),
        (["--write-hashes", "--optimizer", FEW], {}, "it is for all cases, on a CPU."),
        ([], {"STEPFORGE_BACKEND": "warp"}, "STEPFORGE_BACKEND is 'warp'; it must be one of"),
    ],
)
def test_bad_options_get_one_sentence(
    arguments: list[str],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, output = run(*arguments)
    assert code in (1, 2)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("meta", "", "there are no kernels for meta devices"),
        ("cuda:0", "foreach", "on cuda:0 only the bits of triton are promised"),
    ],
)
def test_a_device_where_no_bits_are_promised(
    device: str, backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find", lambda _: torch.device(device))
    monkeypatch.setattr(devices, "make_current", lambda _: None)
    monkeypatch.setenv("STEPFORGE_BACKEND", backend)
    code, output = run("--device", device)
    assert code in (1, 2)
    assert message in " ".join(output.split())
