"""Locks of files. Oracle: whether another descriptor gets the lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepforge.backends import disk_cache

pytestmark = pytest.mark.skipif(disk_cache.fcntl is None, reason="this system has no file locks")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with disk_cache.locked(path), pytest.raises(BlockingIOError), disk_cache.locked(path):
        pass
    with disk_cache.locked(path):
        pass


def test_a_forked_child_does_not_hold_the_lock_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    (child_reads, parent_writes), (parent_reads, child_writes) = os.pipe(), os.pipe()
    with disk_cache.locked(path):
        child = os.fork()
        if child == 0:
            os.write(child_writes, b"1")
            os.read(child_reads, 1)  # until the parent has looked
            os._exit(0)
        os.read(parent_reads, 1)
    with disk_cache.locked(path):
        os.write(parent_writes, b"1")
    assert os.waitpid(child, 0)[1] == 0
    for descriptor in (child_reads, parent_writes, parent_reads, child_writes):
        os.close(descriptor)


def test_a_child_that_inherits_the_descriptor_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", "input()"]
    with disk_cache.locked(path) as lock:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(BlockingIOError), disk_cache.locked(path):
        pass
    child.communicate(b"\n")
    with disk_cache.locked(path):
        pass
