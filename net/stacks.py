"""Where the threads of this process are, for the log of a node whose stage does not return."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

_DEEPEST = 8
"""Calls of a thread that are listed, from the innermost."""


def thread_lines() -> list[str]:
    """A line for each thread but the calling one: its name, and its calls, the innermost first."""
    frames = sys._current_frames()
    return [
        f"thread {thread.name} is in "
        + ", called by ".join(
            f"{call.name} ({Path(call.filename).name}:{call.lineno})"
            for call in reversed(traceback.extract_stack(frames[thread.ident])[-_DEEPEST:])
        )
        for thread in threading.enumerate()
        if thread.ident in frames and thread is not threading.current_thread()
    ]
