"""Whether a process that told us of itself still runs, as seen from another on the same machine.

A process is named by its number, the time it began (numbers are used again), and where numbers mean
the same: the boot of the machine, and the namespace of process numbers in it (containers have their
own). Where that cannot be read, on other systems than Linux, nobody is ever said to have ended.
Leaves out processes on other machines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class ProcessIdentity(NamedTuple):
    """Of a process; plain values, to be sent to others."""

    place: str
    """Where its number means this process; empty: nowhere."""
    number: int
    began: int
    """Clock ticks from the boot on."""


def own_identity() -> ProcessIdentity:
    """Of this process."""
    began = _began(os.getpid())
    boot, namespace = _PROC / "sys/kernel/random/boot_id", _PROC / "self/ns/pid"
    if began is None or not boot.is_file():
        return ProcessIdentity("", os.getpid(), 0)
    place = f"{boot.read_text().strip()} {os.readlink(namespace)}"
    return ProcessIdentity(place, os.getpid(), began)


def has_ended(other: ProcessIdentity, own: ProcessIdentity) -> bool:
    """Whether `other` is known to run no more: it is of this machine, and gone, or a zombie."""
    if not own.place or other.place != own.place:
        return False
    return _began(other.number) != other.began


def _began(number: int) -> int | None:
    """When the process of that number began; None without one that runs."""
    try:
        status = (_PROC / str(number) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    # After the name, in brackets, which may hold anything: the state, and 18 fields on the start.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
