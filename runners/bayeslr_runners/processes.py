"""Names of machine and process by which another process can tell whether one still runs."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def machine_name() -> str:
    """Host name, boot and process-id namespace: within one, process ids can be compared."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot; ``dead`` if there is none."""
    try:
        # Field 22; the command in field 2 may hold blanks and brackets (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return "dead"
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "dead"
        except PermissionError:
            return "alive"
        return "alive"
    return "dead" if fields[0] in ("Z", "X") else fields[19]
