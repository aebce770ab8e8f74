"""Checks that nobody else can change code that is loaded. Oracles: permissions that the test has
set, other users if the tests run as root, and an attacker who exchanges files.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from stepforge.backends import trust

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
as_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can give files away"
)
#: A user other than root that every Linux has, with a group of the same name.
THEIRS = 2, 2


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A folder and its parents, the outermost first."""
    deepest = tmp_path / "a" / "b" / "c"
    trust.make_folder(deepest, 0o755)
    return [tmp_path / "a", tmp_path / "a" / "b", deepest]


# Folders.


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
def test_a_parent_folder_that_others_may_write_to_is_refused(
    folders: list[Path], position: int, mode: int
) -> None:
    assert trust.untrusted_folder(folders[-1]) is None
    folders[position].chmod(mode)
    assert trust.untrusted_folder(folders[-1]) == (
        f"{folders[position]} can be written to by others, who could put code there: "
        f"chmod go-w {folders[position]}"
    )


def test_the_sticky_bit_makes_a_parent_folder_safe_but_not_the_last(
    folders: list[Path],
) -> None:
    folders[0].chmod(0o1777)
    assert trust.untrusted_folder(folders[-1]) is None
    folders[-1].chmod(0o1777)
    assert "can be written to by others" in str(trust.untrusted_folder(folders[-1]))
    assert trust.untrusted_way(folders[-1]) is None


def test_missing_folders_are_passed_over_but_not_their_parents(
    folders: list[Path],
) -> None:
    missing = folders[1] / "x" / "y"
    assert trust.untrusted_folder(missing) is None
    folders[0].chmod(0o777)
    assert str(folders[0]) in str(trust.untrusted_folder(missing))


@as_root
@pytest.mark.parametrize("position", range(3))
def test_a_parent_folder_that_belongs_to_another_is_refused(
    folders: list[Path], position: int
) -> None:
    os.chown(folders[position], *THEIRS)
    assert trust.untrusted_folder(folders[-1]) == f"{folders[position]} belongs to another user"


@as_root
def test_a_private_group_may_write_to_a_parent_folder(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a umask of 002, on systems where every user has a group of the same name."""
    monkeypatch.setattr(os, "geteuid", lambda: THEIRS[0])
    for folder in folders:
        os.chown(folder, *THEIRS)
    folders[0].chmod(0o775)
    assert trust.untrusted_folder(folders[-1]) is None
    for owner, group, mode in ((THEIRS[0], THEIRS[1] + 1, 0o775), (*THEIRS, 0o777), (0, 0, 0o775)):
        os.chown(folders[0], owner, group)
        folders[0].chmod(mode)
        assert "can be written to by others" in str(trust.untrusted_folder(folders[-1]))


def test_folders_are_made_with_the_requested_mode(tmp_path: Path, umask: int) -> None:
    for mode in (0o700, 0o755):
        outer = tmp_path / f"{mode:o}"
        trust.make_folder(outer / "b" / "c", mode)
        made = [outer, outer / "b", outer / "b" / "c"]
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [mode] * 3
    outer.chmod(0o750)
    trust.make_folder(outer, 0o755)
    assert stat.S_IMODE(outer.stat().st_mode) == 0o750, "existing folders keep their mode"


def test_a_folder_where_a_file_is_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            trust.make_folder(folder, 0o700)


# Files.


def can_be_read(path: Path) -> bool:
    try:
        with trust.open_trusted(path) as file:
            return file.read() == b"code"
    except OSError:
        return False


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"code")
    path.chmod(0o600)
    return path


def test_a_file_that_others_may_write_to_is_not_opened(file: Path) -> None:
    for mode, trusted in ((0o600, True), (0o644, True), (0o620, False), (0o602, False)):
        file.chmod(mode)
        assert can_be_read(file) == trusted, oct(mode)


@as_root
def test_a_file_that_belongs_to_another_is_not_opened(file: Path) -> None:
    os.chown(file, *THEIRS)
    assert not can_be_read(file)
    link = file.with_name("link")
    link.symlink_to(file)
    assert not can_be_read(link), "the target of a link counts"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    assert not can_be_read(tmp_path)
    assert not can_be_read(tmp_path / "missing")
    assert not can_be_read(Path("/dev/null"))


def test_the_replacement_of_an_open_file_is_not_read(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"evil")
    with trust.open_trusted(file) as opened:
        os.replace(other, file)
        assert opened.read() == b"code"


# Packages that another user installed, and containers.


def installed(folder: Path) -> tuple[ModuleType, Path]:
    """Return a copy of the module in another package, and a kernel in that package."""
    package = folder / "package"
    kernel = package / "backends" / "native" / "kernels" / "plain" / "kernel.so"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    copy = shutil.copy(trust.__file__, package / "backends" / "trust.py")
    spec = importlib.util.spec_from_file_location("trust_of_another_package", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, kernel


def is_loaded(module: ModuleType, kernel: Path) -> bool:
    try:
        with module.open_trusted(kernel):
            return module.untrusted_folder(kernel.parent) is None
    except OSError:
        return False


def test_a_kernel_in_the_package_need_not_be_safer_than_the_package(tmp_path: Path) -> None:
    """A package that was installed with the umask 002, or below a folder that many can write to."""
    module, kernel = installed(tmp_path)
    package = tmp_path / "package"
    assert is_loaded(module, kernel)
    tmp_path.chmod(0o777)
    assert is_loaded(module, kernel)
    paths = [kernel, *kernel.parents]
    inside = paths[: paths.index(package)]
    for path in inside:
        before = path.stat().st_mode
        path.chmod(before | stat.S_IWGRP)
        assert not is_loaded(module, kernel), path
        package.chmod(0o775)
        assert is_loaded(module, kernel), path
        path.chmod(before | stat.S_IWOTH)
        assert not is_loaded(module, kernel), path
        path.chmod(before)
        package.chmod(0o755)


@as_root
def test_the_owner_of_the_package_is_trusted(tmp_path: Path) -> None:
    """For example the administrator of a shared environment, who need not be root."""
    module, kernel = installed(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = Path(shutil.copy(kernel, elsewhere))
    for path in (kernel, kernel.parent, copy, elsewhere):
        os.chown(path, *THEIRS)
    assert not is_loaded(module, kernel)
    assert not is_loaded(module, copy)
    os.chown(tmp_path / "package", *THEIRS)
    module._other_owners.cache_clear()
    assert is_loaded(module, kernel)
    assert is_loaded(module, copy)


WITHOUT_ROOT = """\
import os, pathlib, runpy, sys
trust = runpy.run_path(sys.argv[1])
assert os.stat("/").st_uid not in (0, os.geteuid()), "root is mapped here"
folder = pathlib.Path(sys.argv[2])
print(trust["untrusted_folder"](folder))
folder.parent.chmod(0o777)
print(trust["untrusted_folder"](folder))
"""


def python_for(inside: list[str]) -> str:
    """Return a Python that the command can run; skip the test if there is none."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([*inside, python, "-c", ""], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            continue
        return python
    return pytest.skip("this machine has no user namespaces")


@as_root
def test_a_container_that_maps_no_root_is_served() -> None:
    """There, all of root's folders seem to belong to nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name, "cache")
        folder.mkdir(mode=0o700)
        for path in (folder, folder.parent):
            os.chown(path, *THEIRS)
        script = shutil.copy(trust.__file__, name)
        uid, gid = map(str, THEIRS)
        as_other = ["setpriv", "--reuid", uid, "--regid", gid, "--clear-groups"]
        inside = [*as_other, "unshare", "--user", "--map-root-user"]
        python = python_for(inside)
        done = subprocess.run(
            [*inside, python, "-c", WITHOUT_ROOT, script, folder],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    assert done.returncode == 0, done.stderr
    trusted, refused = done.stdout.splitlines()
    assert trusted == "None"
    assert "can be written to by others" in refused
