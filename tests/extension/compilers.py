"""C++ compilers that log their calls, and take a ready-made extension for their result."""

from __future__ import annotations

import os
import shlex
import sysconfig
import time
from pathlib import Path

from stepforge.backends.native import compiler
from tests.backends.native.faults import executable

#: An extension that needs Python's headers alone, so that it compiles in a fraction of a second.
READY_MADE = """\
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_guards", NULL, -1};
PyMODINIT_FUNC PyInit__guards(void)
{
    INIT;
    if (PyErr_Occurred()) return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddStringConstant(module, "made_by", MADE_BY) != 0) return NULL;
    return module;
}
"""


def ready_made(folder: Path, made_by: str = "a test", init: str = "") -> Path:
    """Return a library with a module ``_guards`` that says who made it; ``init`` runs first."""
    source, library = folder / "ready.c", folder / "ready.so"
    source.write_text(READY_MADE.replace("INIT;", f"{init};").replace("MADE_BY", f'"{made_by}"'))
    include = sysconfig.get_path("include")
    command = [*compiler.compiler(), "-shared", "-fPIC", f"-I{include}"]
    done = compiler.run([*command, str(source), "-o", str(library)])
    assert done.returncode == 0, done.stderr
    return library


def copying(folder: Path, library: Path, first: str = "") -> Path:
    """Return the script of a compiler that logs its calls and copies a library.

    Args:
        folder: its folder; it has a line of the file ``log`` for each call.
        library: its result.
        first: what it does before that.
    """
    script = f"""\
echo called >> {shlex.quote(str(folder / "log"))}
{first}
while [ "$1" != -o ]; do shift; done
cp {shlex.quote(str(library))} "$2"
"""
    return executable(folder / "copying-c++", script)


def calls(folder: Path) -> int:
    """Return the number of calls of a compiler."""
    log = folder / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_until_unlocked(lock: Path) -> None:
    """Wait until no process holds a lock, as when a build has ended."""
    import fcntl

    with lock.open() as file:
        for _ in range(6000):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)
    raise AssertionError("a build does not end")


def children() -> list[int]:
    """Return the ids of the children of this process, zombies included."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(status.parent.name))
    return found
