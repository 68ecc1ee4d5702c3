"""The ratios of bench/peers.py as a picture: python -m bench.chart PEERS.json [...] -o CHART.svg

A bar for each ratio's median, a line from the smallest to the largest pair, and a rule at 1, where both are
as fast. Several files stand below one another."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

_LABELS, _BARS, _VALUES = 330, 420, 70  # widths of the columns
_ROW, _BAR, _MARGIN = 24, 14, 12
_STYLE = (
    "text{font:12px sans-serif;fill:#222}.head{font-weight:bold}.bar{fill:#4878a8}.slower{fill:#c06040}"
    ".spread{stroke:#222;stroke-width:1.5}.one{stroke:#888;stroke-dasharray:3 3}"
)


def chart(documents: Sequence[dict[str, Any]]) -> str:
    """The SVG. ValueError: there is no ratio to draw."""
    ratios = [ratio for document in documents for ratio in document["ratios"]]
    if not ratios:
        raise ValueError("there is no ratio to draw")
    scale = _BARS / max(1.0, *(ratio["high"] for ratio in ratios))
    height = 2 * _MARGIN + _ROW * (len(ratios) + len(documents))
    one = _LABELS + scale
    lines = [f'<line class="one" x1="{one:.1f}" y1="{_MARGIN}" x2="{one:.1f}" y2="{height - _MARGIN}"/>']
    y = _MARGIN
    for document in documents:
        title = f"{document['model']}: {document['dtype']} against {document['peer_type']}"
        lines.append(_text(_MARGIN, y, title, "head"))
        y += _ROW
        for ratio in document["ratios"]:
            lines += _bar(ratio, y, scale)
            y += _ROW
    width = _LABELS + _BARS + _VALUES
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{_STYLE}</style>", *lines, "</svg>\n"]
    )


def _bar(ratio: dict[str, Any], y: float, scale: float) -> list[str]:
    threads = f"{ratio['threads']} thread{'s' if ratio['threads'] > 1 else ''}"
    low, high, median = (_LABELS + scale * ratio[name] for name in ("low", "high", "median"))
    kind, middle = "bar" if ratio["median"] >= 1 else "bar slower", y + _ROW / 2
    place = f'x="{_LABELS}" y="{middle - _BAR / 2}" width="{median - _LABELS:.1f}" height="{_BAR}"'
    return [
        _text(2 * _MARGIN, y, f"{ratio['test']}, {threads}, shoal over {ratio['peer']}"),
        f'<rect class="{kind}" {place}/>',
        f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
        _text(_LABELS + _BARS + _MARGIN, y, f"{ratio['median']:.2f}"),
    ]


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x}" y="{y + _ROW / 2 + 4}">{escape(words)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chart", description="Ratios of bench/peers.py as SVG."
    )
    parser.add_argument("files", nargs="+", type=Path, help="what bench/peers.py wrote with -o")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    args.output.write_text(chart(documents), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
