"""Texts that start a command with the device: a systemd user unit, and a script for Termux:Boot. The commands
print them, and the user puts them where they belong."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

_PLACES = ("XDG_CONFIG_HOME", "XDG_CACHE_HOME")
_PRINT = ("--print-systemd", "--print-termux-boot")
_PAUSE = 30
"""Seconds until a command that has ended is started again: a node whose policy allows no work ends."""


def command_line(words: Sequence[str]) -> list[str]:
    """The command line of this process, by its arguments `words`, without the options that print a text."""
    return [sys.executable, "-m", "shoal", *(word for word in words if word not in _PRINT)]


def systemd_unit(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """A systemd user unit that runs `shoal` with these arguments."""
    places = "".join(
        f"Environment={_systemd(f'{name}={environ[name]}')}\n" for name in _PLACES if environ.get(name)
    )
    return f"""\
# Save as ~/.config/systemd/user/shoal.service, then:
#   systemctl --user daemon-reload
#   systemctl --user enable --now shoal
#   loginctl enable-linger             # so that it also runs while you are not logged in
# What it says: journalctl --user -u shoal -f

[Unit]
Description=shoal: one language model on the devices of this house

[Service]
ExecStart={" ".join(map(_systemd, command_line(words)))}
{places}Restart=always
RestartSec={_PAUSE}
TimeoutStopSec=45

[Install]
WantedBy=default.target
"""


def termux_script(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """A script for Termux:Boot that runs `shoal` with these arguments."""
    places = "".join(f"export {name}={shlex.quote(environ[name])}\n" for name in _PLACES if environ.get(name))
    return f"""\
#!/data/data/com.termux/files/usr/bin/sh
# Install the app Termux:Boot and open it once. Save this as ~/.termux/boot/shoal, then:
#   chmod +x ~/.termux/boot/shoal
# What it says: tail -f ~/shoal.log

termux-wake-lock
{places}while true; do
    {shlex.join(command_line(words))}
    sleep {_PAUSE}
done > "$HOME/shoal.log" 2>&1
"""


def _systemd(word: str) -> str:
    """A word of a command line as systemd reads it."""
    quoted = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{quoted}"' if quoted != word or any(c.isspace() or c in "';" for c in word) else word
