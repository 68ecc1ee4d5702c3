"""bench/chart.py: bars as long as the ratios, spreads where the pairs are, and well-formed XML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bench import chart

SVG = "{http://www.w3.org/2000/svg}"


def document(*medians: float) -> dict[str, Any]:
    ratios = [
        {"test": "tg128", "threads": n, "peer": "a<b", "median": m, "low": m / 2, "high": 2 * m}
        for n, m in enumerate(medians, 1)
    ]
    return {"model": "m & n", "dtype": "int8", "peer_type": "Q8_0", "ratios": ratios}


def test_bars_and_spreads_are_to_scale(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, medians in zip(files, ([2.0, 0.5], [1.0]), strict=True):
        file.write_text(json.dumps(document(*medians)))
    assert chart.main([*map(str, files), "-o", str(tmp_path / "c.svg")]) == 0
    root = ElementTree.fromstring((tmp_path / "c.svg").read_text())
    bars = root.findall(f"{SVG}rect")
    one, *spreads = root.findall(f"{SVG}line")
    left = float(bars[0].attrib["x"])
    unit = float(one.attrib["x1"]) - left
    assert [float(bar.attrib["width"]) for bar in bars] == pytest.approx([2 * unit, unit / 2, unit], abs=0.1)
    assert [bar.attrib["class"] for bar in bars] == ["bar", "bar slower", "bar"]
    ends = [(float(line.attrib["x1"]) - left, float(line.attrib["x2"]) - left) for line in spreads]
    assert ends == [pytest.approx((w * unit / 2, w * unit * 2), abs=0.1) for w in (2.0, 0.5, 1.0)]
    assert max(end for _, end in ends) + left <= float(root.attrib["width"])
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert texts[:3] == ["m & n: int8 against Q8_0", "tg128, 1 thread, shoal over a<b", "2.00"]
    assert texts[3] == "tg128, 2 threads, shoal over a<b"


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no ratio"):
        chart.chart([document()])
