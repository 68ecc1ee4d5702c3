"""This device's own node: a child process of `shoal up`, which is started again when it ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence

import trio

from .processes import end, end_with_parent

_RESTART_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""How long to wait before the node of this device is started again, after it has ended once, twice …"""
_LASTING_SECONDS = 60.0
"""A node that has run for so long did not fail at its start."""
_LINE = 1000


class OwnNode:
    """The node that a command runs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = -1
        """The pipe with what the process prints, until somebody reads it."""

    def begin(self) -> None:
        """Starts the process. The kernel ends it with the thread that calls this, at the latest."""
        read, write = os.pipe()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C on the terminal is for this process, which then ends the child
                preexec_fn=end_with_parent,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._lines = read

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            end([self._process])
            self._process = None
        if self._lines >= 0:
            os.close(self._lines)
            self._lines = -1

    async def keep(self, say: Callable[[str], None]) -> None:
        """Passes on what the process prints, and starts it again whenever it has ended."""
        tries, begun = 0, trio.current_time()
        while True:
            if self._process is None:
                begun = trio.current_time()
                self.begin()  # in this thread, not in one of trio's, which may end before
            code = await self._ended(say)
            tries = 0 if trio.current_time() - begun > _LASTING_SECONDS else tries
            pause = _RESTART_SECONDS[min(tries, len(_RESTART_SECONDS) - 1)]
            say(f"the node of this device has ended with code {code}: it is started again in {pause:g} s")
            tries += 1
            await trio.sleep(pause)

    async def _ended(self, say: Callable[[str], None]) -> int:
        """The exit code of the process. It ends with this task."""
        process, lines = self._process, self._lines
        assert process is not None
        self._lines = -1
        try:
            async with trio.lowlevel.FdStream(lines) as stream:
                await _pass_on(stream, lambda line: say(f"own node: {line}"))
            return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.end)


async def _pass_on(stream: trio.abc.ReceiveStream, say: Callable[[str], None]) -> None:
    """Calls `say` with each line until the stream ends; of a line that is too long with its beginning."""
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            say(line.decode("utf-8", "replace")[:_LINE])
        rest = rest[:_LINE]
    if rest:
        say(rest.decode("utf-8", "replace"))
