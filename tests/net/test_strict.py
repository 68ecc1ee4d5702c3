"""Lists in control bodies: decoded strictly, item by item."""

import json
import re

import pytest

from shoal.net.messages import Device, RowRate
from shoal.net.strict import decode, encode

RATES = (RowRate(1, 1e9), RowRate(8, 8e9))
GOOD = Device(10**9, 10**7, 256, 4, "native (avx2)", True, 1e10, 2e11, 1e-4, row_rates=RATES)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (3, "row_rates = 3 is not a list"),
        ([{"rows": 0, "macs_per_s": 1.0}], "row_rates[0].rows = 0"),
        ([{"rows": 1, "macs_per_s": 1.0}, 5], "row_rates[1] is not an object"),
        ([{"rows": 1, "macs_per_s": 1.0}] * 65, "has 65 items, more than 64"),
    ],
)
def test_lists_are_checked_item_by_item(rates: object, words: str) -> None:
    body = {**json.loads(encode(GOOD)), "row_rates": rates}
    with pytest.raises(ValueError, match=re.escape(words)):
        decode(Device, json.dumps(body).encode())
    assert decode(Device, encode(GOOD)) == GOOD
