"""The last instruction of a process, in a file that outlives it.

One record of fixed size, written through a memory map: whatever ends the process, the
kernel keeps the last one. It costs about a microsecond, and nothing where ``rhino
launch`` did not start the process.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rhino_jax.runtime.job import this_job

_RECORD = struct.Struct("<dQ240s")
_TEXT_BYTES = 240


@dataclass(frozen=True)
class Instruction:
    """What a process began last, and when (seconds since the epoch)."""

    what: str
    call: int
    """The number of the call of a step; 0 for anything else."""
    began: float

    def __str__(self) -> str:
        return f"call {self.call} of {self.what}" if self.call else self.what


class Status:
    """The status file of this process."""

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_RECORD.size)
            self._map = mmap.mmap(file.fileno(), _RECORD.size)
        self._text: tuple[str, bytes] = ("", b"")

    def began(self, what: str, call: int = 0) -> None:
        """Say that ``what`` begins now."""
        if self._text[0] != what:
            self._text = what, what.encode()[:_TEXT_BYTES]
        _RECORD.pack_into(self._map, 0, time.time(), call, self._text[1])


def read_status(path: Path) -> Instruction | None:
    """What a process wrote last; None where it wrote nothing."""
    try:
        began, call, text = _RECORD.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    what = text.rstrip(b"\0").decode(errors="replace")
    return Instruction(what, call, began) if what else None


@cache
def this_status() -> Status | None:
    """The status file of this process; None where ``rhino launch`` did not start it."""
    job = this_job()
    return None if job is None else Status(job.status_path)


def began(what: str) -> None:
    """Say, where somebody asked for it, that ``what`` begins now."""
    status = this_status()
    if status is not None:
        status.began(what)
