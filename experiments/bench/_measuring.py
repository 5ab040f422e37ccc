"""What a run took: seconds and memory, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measured(
    device: str, run: Callable[[], Any], clock: Callable[[], float] = time.process_time
) -> tuple[float, float | None, Any]:
    """Seconds, extra MiB, and the result. By default CPU time where the CPU computes: other programs do not count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, start = torch.cuda.memory_allocated(device), time.perf_counter()
        result = run()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        return seconds, (torch.cuda.max_memory_allocated(device) - before) / 2**20, result
    before, start = _resident(reset=True), clock()
    result = run()
    seconds, peak = clock() - start, _resident("VmHWM")
    return seconds, None if before is None or peak is None else peak - before, result


def _resident(field: str = "VmRSS", *, reset: bool = False) -> float | None:
    """Resident memory of this process in MiB, now or (VmHWM) its peak since the last reset; None where not known."""
    try:
        if reset:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier runs freed must not hide what this one needs
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except (OSError, AttributeError):
        return None
    return next((int(entry.split()[1]) / 1024 for entry in status if entry.startswith(field)), None)
