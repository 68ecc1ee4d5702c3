"""bench/memory.py: what a process holds at most, taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import memory

from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import CHUNK, PAGE
from shoal.engine.model_directory import Model


def test_shards_and_a_chunk_of_keys_and_values_are_counted_to_the_byte(tiny_llama: Model) -> None:
    shards = sum(path.stat().st_size for path in tiny_llama.path.glob("*.safetensors"))
    states = [state for unit in tiny_llama.program.units for state in unit.states]
    page = sum(page_bytes(state, tiny_llama.kv_dtype) for state in states)
    assert memory.known(tiny_llama) == (shards, page * CHUNK // PAGE)


@pytest.mark.slow
def test_an_answer_that_fails_is_told(tiny_llama: Model) -> None:
    with pytest.raises(RuntimeError, match=r"no tokenizer\.json"):
        memory.node_peak(tiny_llama.path, 1)


@pytest.mark.slow
def test_a_node_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the node ended"):
        memory.node_peak(tmp_path, 1)
