"""Plain-text tables with columns of minimal width and right-aligned numbers."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without frames. A column of numbers (or empty cells) is right-aligned."""
    right = [all(not row[i] or row[i][0].isdigit() for row in rows) for i in range(len(header))]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(columns([header, ["-" * width for width in widths], *rows], right))


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Lines with two spaces between columns; those marked in `right` are right-aligned (default: none)."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    to_right = right or [False] * len(widths)

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(cells, widths, to_right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(cells) for cells in rows]
