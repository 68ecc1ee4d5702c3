"""index.json: what is written is read back, and everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.errors import ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.index import FileEntry, Index, UnitEntry, parse_index

FILES = {
    name: FileEntry(10, 64 * "a")
    for name in ("config.json", "common.safetensors", "unit-000.safetensors", "unit-001.safetensors")
}
INDEX = Index(
    dtype="int8",
    family="some",
    source="hf:a/b@main",
    license=None,
    files=FILES,
    common=("common.safetensors",),
    units=(
        UnitEntry("embed", ("unit-000.safetensors",)),
        UnitEntry("head", ("unit-001.safetensors", "unit-000.safetensors")),
    ),
)


def changed(**changes: Any) -> bytes:
    values = json.loads(INDEX.to_json())
    values.update(changes)
    return json.dumps(values).encode()


def test_what_is_written_is_read_back() -> None:
    int4 = replace(INDEX, dtype="int4", head_dtype="int8", has_min=True)
    for index in (INDEX, int4, replace(int4, head_dtype=None), replace(int4, has_min=False)):
        assert parse_index(index.to_json(), "index.json") == index
    assert (int4.types, int4.weights) == (("q4_min", "q8"), "int4 with minima, head int8")
    assert (INDEX.types, INDEX.weights) == (("q8", "q8"), "int8")


GOOD_FILE = {"size": 1, "sha256": 64 * "0"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"format": "shoal-model", "format": "shoal-model"}', "duplicate key"),
        (b"[]", "does not describe a shoal model"),
        (changed(format="other"), "does not describe a shoal model"),
        (changed(surprise=1), "has the unknown key 'surprise'"),
        (
            json.dumps({k: v for k, v in json.loads(INDEX.to_json()).items() if k != "units"}).encode(),
            "lacks 'units'",
        ),
        (changed(dtype="int3"), "unknown types 'int3'"),
        (changed(dtype=["int8"]), "has a value of 'dtype' that is not a string"),
        (changed(kv_dtype="f8"), "unknown types"),
        (changed(group_size=64), "weights that this version cannot read"),
        (changed(has_min=0), "weights that this version cannot read"),
        (changed(has_min=True), "weights that this version cannot read"),
        (changed(head_dtype="int8"), "weights that this version cannot read"),
        (changed(dtype="int4", head_dtype="int4"), "weights that this version cannot read"),
        (changed(dtype="int4", head_dtype=None), "weights that this version cannot read"),
        (changed(dtype="int4", has_min=1), "weights that this version cannot read"),
        (changed(cut_dtype="f16"), "weights that this version cannot read"),
        (changed(family=1), "has a value of 'family' that is not a string"),
        (changed(license=1), "neither a string nor null"),
        (changed(files=[]), "has a value of 'files' that is not an object"),
        (changed(files={"../x": GOOD_FILE}), "'../x', which is not a plain file name"),
        (changed(files={"/etc/passwd": GOOD_FILE}), "not a plain file name"),
        (changed(files={"a\\b": GOOD_FILE}), "not a plain file name"),
        (changed(files={"..": GOOD_FILE}), "not a plain file name"),
        (changed(files={"": GOOD_FILE}), "not a plain file name"),
        (changed(files={"a\n": GOOD_FILE}), "not a plain file name"),
        (changed(files={"index.json": GOOD_FILE}), "not a plain file name"),
        (changed(files={"a": {"size": 1}}), "an entry for a without exactly 'size' and 'sha256'"),
        (changed(files={"a": {**GOOD_FILE, "size": -1}}), "an invalid size for a, -1"),
        (changed(files={"a": {**GOOD_FILE, "size": True}}), "an invalid size for a, True"),
        (changed(files={"a": {**GOOD_FILE, "sha256": 64 * "A"}}), "an invalid sha256 for a"),
        (changed(common=["nothing"]), "'nothing', which is missing from its 'files'"),
        (changed(common=[]), "lacks a list of file names"),
        (changed(units={}), "has a value of 'units' that is not a list"),
        (changed(units=[{"name": "embed"}]), "a unit without exactly 'name' and 'files'"),
        (changed(units=[{"name": 1, "files": ["config.json"]}]), "a unit without exactly 'name' and 'files'"),
        (changed(units=[{"name": "embed", "files": "config.json"}]), "lacks a list of file names"),
        (changed(units=[{"name": "embed", "files": [["config.json"]]}]), "lacks a list of file names"),
    ],
)
def test_a_bad_index_is_refused_and_the_remedy_named(data: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as error:
        parse_index(data, "m/index.json")
    assert str(error.value).startswith("m/index.json")
    assert "pull or convert the model again" in str(error.value)


@pytest.mark.parametrize("key", ["format_version", "layout_version", "numerics_version"])
@pytest.mark.parametrize("version", [2, "1", True, None])
def test_another_version_is_no_damage(key: str, version: object) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"{key} is {version!r}, and this version of shoal reads 1"
    ):
        parse_index(changed(**{key: version}), "index.json")


def test_version_2_of_the_arithmetic_is_that_of_int8_keys_alone() -> None:
    assert parse_index(changed(kv_dtype="int8", numerics_version=2), "index.json").kv_dtype == "int8"
    with pytest.raises(
        UnsupportedModelError, match="numerics_version is 1, and this version of shoal reads 2: remove"
    ):
        parse_index(changed(kv_dtype="int8"), "index.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@pytest.mark.slow
@given(st.sampled_from(sorted(Index.__dataclass_fields__)), JSON)
def test_any_value_anywhere_is_read_or_refused(key: str, value: Any) -> None:
    try:
        index = parse_index(changed(**{key: value}), "index.json")
    except ShoalError:
        return
    assert json.loads(index.to_json())[key] == value
