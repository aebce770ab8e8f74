"""From C source to a loaded function: the compiler, the cache, and what can go wrong with them.

A kernel is compiled at its first use and kept in a private cache, under a name that is made of the
hash of all that went into it and the hash of its content: a file that was cut short or altered does
not bear its own name and is built anew, and so is one that others may change, or that cannot be
loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from stepforge.backends import trust

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

#: IEEE results from vector code: no re-association (no -ffast-math), no contraction of a product
#: and a sum into one rounding; sqrt need not set errno, and nothing reads floating point traps.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
)
#: x86-64 levels, best first, with the features that tell a processor of that level.
LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
    "x86-64-v2": frozenset({"sse4_2", "ssse3", "popcnt"}),
}
#: Seconds that a compiler may take for a kernel; it takes a fraction of one.
COMPILE_TIMEOUT_S = 120.0
#: The age from which a folder of a build belongs to a process that was killed, if nothing holds its
#: lock: far more than any compiler is given, as not every file system has locks.
ABANDONED_S = 24 * 3600.0
#: What a build works on: a C source, its library, a source of Triton, and the lock.
_WORK_FILES = ("kernel.c", "kernel.so", "kernel.py", "lock")
#: What a file system says that has no locks; a build is then in use for as long as it is young.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
#: The mode of files in the cache, whatever the umask, and of those that many may read.
PRIVATE, PUBLIC = 0o600, 0o644


class BuildError(Exception):
    """A kernel cannot be built; the reason is one sentence."""


def on_x86() -> bool:
    """Return True if :data:`LEVELS` apply to this machine."""
    return platform.machine() in ("x86_64", "AMD64")


def instruction_sets() -> tuple[str, ...]:
    """Return the levels that this processor can run, the best first; "" is the plain one.

    The environment variable ``STEPFORGE_ISA`` leaves one of them.

    Raises:
        BuildError: it names one that this processor has not.
    """
    features = _processor_features()
    usable = [level for level, needed in LEVELS.items() if needed <= features]
    forced = os.environ.get("STEPFORGE_ISA")
    if forced is None:
        return (*usable, "")
    if forced not in (*usable, ""):
        known = ", ".join(usable) or "empty"
        raise BuildError(f"STEPFORGE_ISA is {forced!r}; on this processor it must be {known}")
    return (forced,)


def instruction_set() -> str:
    """Return the level to compile for: the best of :func:`instruction_sets`."""
    return instruction_sets()[0]


@functools.cache
def _processor_features() -> frozenset[str]:
    if not on_x86():
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: ``CC``, or ``cc``, ``gcc`` or ``clang``.

    Raises:
        BuildError: there is none.
    """
    cc = os.environ.get("CC", "")
    try:
        named = shlex.split(cc)
    except ValueError as error:
        raise BuildError(f"CC is {cc!r}, which is no command ({error})") from None
    for program, *arguments in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        path = shutil.which(program)
        if path:
            return path, *arguments
    what = f"CC names {named[0]!r}, which is not" if named else "no C compiler is"
    raise BuildError(f"{what} on the PATH: install gcc or clang")


def compiler_version(command: tuple[str, ...]) -> str:
    """Return the first line of a compiler's ``--version``.

    Raises:
        BuildError: it cannot be run.
    """
    return _version_of(command, modified_ns(command))


def modified_ns(command: tuple[str, ...]) -> int:
    """Return the time of a compiler's last change: another version may have replaced it.

    Raises:
        BuildError: it is gone.
    """
    try:
        return os.stat(command[0]).st_mtime_ns
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from None


@functools.cache
def _version_of(command: tuple[str, ...], modified_ns: int) -> str:
    lines = _run([*command, "--version"]).stdout.splitlines()
    return lines[0] if lines else " ".join(command)


def cache_folder() -> Path:
    """Return the folder of compiled kernels; made with mode 0700 if it is missing.

    ``STEPFORGE_CACHE`` if set, else ``stepforge`` in the user's cache folder.

    Raises:
        BuildError: it cannot be made, or others than its owner may write to it or replace it.
    """
    folder = _named_cache()
    try:
        # Both before and after: nothing is made where others may write.
        untrusted = trust.untrusted_way(folder)
        if untrusted is None:
            trust.make_folder(folder, 0o700)
            untrusted = trust.untrusted_way(folder)
        status = folder.stat() if untrusted is None else None
    except OSError as error:
        raise BuildError(
            f"the kernel cache {folder} cannot be made ({error.strerror}): "
            "set STEPFORGE_CACHE to a folder of yours"
        ) from None
    if status is None:
        raise BuildError(
            f"the kernel cache {folder} is not safe: {untrusted}, or set STEPFORGE_CACHE to "
            "a folder of yours"
        )
    if not trust.belongs_to_user(status):
        raise BuildError(f"the kernel cache {folder} belongs to another user")
    if trust.others_may_write(status):
        raise BuildError(
            f"the kernel cache {folder} can be written to by others, who could put code "
            f"there: chmod 700 {folder}"
        )
    return folder


def _named_cache() -> Path:
    """Return the resolved path of the cache.

    Raises:
        BuildError: the user has no home to keep it in.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which the specification has programs ignore
        base = os.path.join("~", ".cache")
    named = os.environ.get("STEPFORGE_CACHE") or os.path.join(base, "stepforge")
    path = os.path.expanduser(named)
    if path.startswith("~"):  # which is then the name of a folder, beneath the current one
        raise BuildError(
            f"the kernel cache {named} has no place, as no home folder is known: "
            "set HOME, or STEPFORGE_CACHE to a folder of yours"
        )
    return Path(os.path.realpath(path))


def load(source: str) -> ctypes.CDLL:
    """Return the library of a source, from the cache or compiled now.

    Without a compiler, one that any compiler has built of the same source will do.

    Raises:
        BuildError: it is not in the cache and cannot be built.
    """
    isa = instruction_set()
    folder = cache_folder()
    key = key_of(source, isa)
    try:
        command = compiler()
    except BuildError:
        library = opened(folder, f"{key}-*")
        if library is None:
            raise
        return library
    version = _digest("\0".join([compiler_version(command), *command]).encode())[:8]
    library = opened(folder, f"{key}-{version}")
    if library is not None:
        return library
    try:
        built = compile_into(folder, f"{key}-{version}", source, isa, command)
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        return _library(built)
    except OSError as error:
        raise BuildError(f"the compiled kernel cannot be loaded ({error})") from None


def unwritable(folder: Path, error: OSError) -> BuildError:
    """Return the error for a cache that cannot be written to."""
    return BuildError(
        f"the kernel cache {folder} cannot be written to ({error.strerror}): "
        "set STEPFORGE_CACHE to a folder of yours"
    )


def answer(ask: Callable[[], object]) -> object:
    """Return the result of a function, or the reason of its failure."""
    try:
        return ask()
    except BuildError as error:
        return str(error)


def cache_circumstances() -> tuple[object, ...]:
    """Return what is known of the cache before a build: its folder, its permissions."""
    folder = answer(cache_folder)
    return folder, isinstance(folder, Path) and os.access(folder, os.W_OK)


def key_of(source: str, isa: str) -> str:
    """Return the hash of all inputs of a kernel except the compiler."""
    return _digest("\0".join([source, *FLAGS, isa, platform.machine()]).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def intact(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files of kernels with that name (a pattern) that may be loaded.

    They hold what the rest of their name says, and nobody else may change them.
    """
    for candidate in _files(folder, name):
        with contextlib.suppress(OSError), _verified(candidate):
            yield candidate


def opened(folder: Path, name: str) -> ctypes.CDLL | None:
    """Return the first kernel of that name (a pattern) that loads; None if there is none."""
    for candidate in _files(folder, name):
        with contextlib.suppress(OSError):
            return _library(candidate)
    return None


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.so"))


@contextlib.contextmanager
def _verified(path: Path) -> Iterator[BinaryIO]:
    """Open the file of a kernel.

    Raises:
        OSError: it cannot be opened, others may change it, or its name is not that of its content.
    """
    with trust.open_trusted(path) as file:
        if path.stem.split("-")[-1] != _digest(file.read()):
            raise OSError(f"{path.name} does not hold what its name says")
        yield file


def _library(path: Path) -> ctypes.CDLL:
    """Load the file of a kernel: the same file that was checked.

    Raises:
        OSError: it is not to be loaded, cannot be, or is no kernel.
    """
    with _verified(path) as file, _place_to_load(file, path) as place:
        try:
            # Named after the file, as the place is nobody's name for it.
            library = ctypes.CDLL(str(path), handle=ctypes.CDLL(place)._handle)
        except OSError as error:
            raise OSError(str(error).replace(place, path.name)) from None
    if not hasattr(library, "stepforge_run"):
        raise OSError(f"{path.name} has no function stepforge_run")
    return library


#: Where a process finds its open files, on Linux.
_OPEN_FILES = "/proc/self/fd"
_loads = itertools.count(1)


@contextlib.contextmanager
def _place_to_load(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield a path that names exactly an open file until it has been loaded.

    It is new each time: to the loader one path is one library, even if the file is another.
    """
    number = str(file.fileno())
    if os.path.exists(f"{_OPEN_FILES}/{number}"):
        # A name of the folder that has not been used before: "/." for every 1 of a number, "/" for
        # every 0.
        spelled = f"{next(_loads):b}".replace("0", "/").replace("1", "/.")
        yield f"{_OPEN_FILES}{spelled}/{number}"
    elif os.name == "posix":
        with tempfile.TemporaryDirectory() as private:
            copy = Path(private, path.name)
            file.seek(0)
            copy.write_bytes(file.read())
            yield str(copy)
    else:  # a library in use could not be removed again, and files have no owners here
        yield str(path)


def compile_into(
    folder: Path,
    name: str,
    source: str,
    isa: str,
    command: tuple[str, ...],
    *extra: str,
    mode: int = PRIVATE,
) -> Path:
    """Compile a source into a file whose name begins with ``name``.

    Args:
        folder: where, an existing folder.
        name: what its name begins with; the hash of its content follows.
        source: in C.
        isa: the level to compile for; "" for the plain one.
        command: the compiler's.
        extra: arguments for the compiler that leave the kernel's instructions as they are.
        mode: the file's, whatever the umask.

    Raises:
        BuildError: the compiler fails.
        OSError: the folder cannot be written to.
    """
    with work_folder(folder) as work:
        c_file, so_file = work / "kernel.c", work / "kernel.so"
        c_file.write_text(source, encoding="utf-8")
        march = [f"-march={isa}"] if isa else []
        done = _run([*command, *FLAGS, *march, *extra, str(c_file), "-o", str(so_file), "-lm"])
        if done.returncode != 0 or not so_file.exists():
            said = _first_line(done.stderr.replace(str(c_file), c_file.name))
            raise BuildError(f"{command[0]} failed: {said}")
        built = folder / f"{name}-{_digest(so_file.read_bytes())}.so"
        so_file.chmod(mode)
        # Readers see the whole file or none, whoever else builds the same at the same time.
        os.replace(so_file, built)
        return built


@contextlib.contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yield a private folder for a build beside its result; removed at the end.

    Raises:
        OSError: the folder cannot be written to.
    """
    _sweep(folder)
    # No TemporaryDirectory: that would also be removed by a child of fork, at its end.
    work = Path(tempfile.mkdtemp(dir=folder, prefix="build-"))
    try:
        with _locked(work / "lock"):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, made if it is missing; released when the process ends.

    Raises:
        BlockingIOError: another holds it.
        OSError: the file cannot be made.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE)) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield


def _sweep(folder: Path) -> None:
    """Remove the folders of processes that were killed while they built."""
    for left in folder.glob("build-????????"):
        with contextlib.suppress(OSError):  # it is another's, in use, or just being swept
            old = time.time() - left.stat().st_mtime > ABANDONED_S
            if old and set(os.listdir(left)) <= set(_WORK_FILES):
                with _locked(left / "lock"):
                    shutil.rmtree(left)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be ended with it
        ) as process:
            try:
                output, errors = process.communicate(timeout=COMPILE_TIMEOUT_S)
            except BaseException:  # also Ctrl-C, which does not reach another session
                _kill(process)
                raise
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish within {COMPILE_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and its children: a compiler's driver runs the compiler as one."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # they have just ended
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _first_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0].strip() if lines else "it said nothing"


_OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel")


@functools.cache
def thread_pool() -> tuple[int, int, int] | None:
    """Return the addresses of three functions of torch's OpenMP, in a kernel's order.

    They are ``omp_get_thread_num``, ``omp_get_num_threads`` and ``GOMP_parallel``.

    None if torch has loaded no runtime that has them; kernels then run on one thread.
    """
    for library in _openmp_libraries():
        try:
            runtime = ctypes.CDLL(library)
            functions = [getattr(runtime, name) for name in _OPENMP]
        except (OSError, AttributeError):
            continue
        thread, team, parallel = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
        if thread and team and parallel:
            return thread, team, parallel
    return None


def _openmp_libraries() -> list[str]:
    """Return the OpenMP libraries in this process, torch's own first."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:  # not Linux
        folder = Path(torch.__file__).parent / "lib"
        return [str(path) for path in sorted(folder.glob("lib*omp*"))]
    paths = [line.split(maxsplit=5)[-1] for line in lines if "/" in line]
    loaded = dict.fromkeys(path for path in paths if "omp" in Path(path).name)
    return sorted(loaded, key=lambda path: "/torch/" not in path)
