"""The order of a build: everything that it needs, so that a process without torch can do it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepforge.backends import cache, disk_cache
from stepforge.backends.disk_cache import PRIVATE, BuildError
from stepforge.backends.native import build

__all__ = ["SOURCE_NAME", "Order"]

#: The name of the source's file.
SOURCE_NAME = "guards.cpp"

#: The flag in the messages of compilers that do not know it, in any quotes.
_UNKNOWN_STANDARD = re.compile(r"[^\s\w]-std=[\w+]+[^\s\w]")

#: Seconds that a compiler may take: it takes ten, and far more if it may only run where nothing
#: else does.
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Order:
    """A build of the extension.

    Attributes:
        folder: the folder of its result, by its path.
        name: the start of the file's name; the hash of its content follows.
        source: the text of the source.
        command: the command of the compiler, with its flags.
        libraries: its arguments for linking.
        mode: the mode of the file.
    """

    folder: str
    name: str
    source: str
    command: Sequence[str]
    libraries: Sequence[str]
    mode: int = PRIVATE

    def to_bytes(self) -> bytes:
        """Return the order for another process: one line."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_bytes(cls, sent: bytes) -> Order:
        """Return the order that another process has sent."""
        return cls(**json.loads(sent))

    @property
    def lock(self) -> Path:
        """The file whose lock is held by the one build in a folder."""
        return Path(self.folder, "lock")

    def run(self) -> Path:
        """Build the extension, and return its file. A failure is written down for others.

        Raises:
            BuildError: the compiler fails.
            OSError: the folder cannot be written to.
        """
        began = time.monotonic()
        try:
            path = self.compile()
        except (BuildError, OSError) as error:
            with contextlib.suppress(OSError):  # the folder cannot be written to
                self.note_failure(str(error), cache.stands_s(time.monotonic() - began))
            raise
        self._failure.unlink(missing_ok=True)
        return path

    def compile(self) -> Path:
        """Compile the extension, and return its file.

        Raises:
            BuildError: the compiler fails.
            OSError: the folder cannot be written to.
        """
        try:
            return build.compile_library(
                Path(self.folder),
                self.name,
                self.source,
                SOURCE_NAME,
                self.command,
                self.libraries,
                mode=self.mode,
                timeout_s=_TIMEOUT_S,
            )
        except BuildError as error:
            if _UNKNOWN_STANDARD.search(str(error)):
                raise BuildError(f"{error}: name a newer compiler with CXX") from None
            raise

    # A failure is written beside the result, for other processes and for those that start later. --

    @property
    def _failure(self) -> Path:
        return Path(self.folder, f"{self.name}.failed")

    def note_failure(self, reason: str, stands_s: float) -> None:
        """Write a failure down.

        Raises:
            OSError: the folder cannot be written to.
        """
        # A new file: others may be reading the old one.
        with disk_cache.work_folder(self._failure.parent) as work:
            written = work / "failed"
            written.write_text(f"{stands_s}\n{reason}", encoding="utf-8")
            written.replace(self._failure)

    def failure(self) -> str | None:
        """Return why the last build failed; None if it did not, or if it is time for another."""
        try:
            age = time.time() - self._failure.stat().st_mtime
            stands, reason = self._failure.read_text(encoding="utf-8").split("\n", 1)
            return reason if 0 <= age < float(stands) else None
        except (OSError, ValueError):  # there is none, or it is none of ours
            return None
