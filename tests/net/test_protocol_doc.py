"""docs/protocol.md says what the code does."""

from pathlib import Path

from shoal.net.liveness import Timing
from shoal.net.message_table import MESSAGES
from shoal.net.messages import PROTOCOL
from shoal.net.packed import MAX_ROWS
from shoal.net.wire import HEADER, MAGIC

DOC = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def test_the_table_of_messages_is_that_of_the_code() -> None:
    rows = [
        [str(entry.code), entry.kind.__name__, str(entry.limit)]
        + [", ".join(sorted(side)) for side in (entry.down, entry.up)]
        for entry in MESSAGES
    ]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOC.splitlines() if "|" in line]
    assert [cells for cells in table if len(cells) == 5 and cells[0].isdigit()] == rows


def test_the_numbers_are_those_of_the_code() -> None:
    timing = Timing()
    assert f"Version {PROTOCOL}." in DOC
    assert f"`{MAGIC.decode()}`" in DOC and f"A header of {HEADER.size} bytes" in DOC
    assert f"At most {MAX_ROWS} rows" in DOC
    assert timing.heartbeat == 1 and "every second" in DOC
    assert timing.overdue == 10 and "Ten seconds of silence" in DOC
    assert timing.handshake == 10 and "Greeting takes 10 s at most" in DOC
