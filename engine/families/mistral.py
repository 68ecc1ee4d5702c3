"""Mistral: Llama's layers, in some versions with an attention window (Jiang et al., arXiv 2310.06825). Its
GGUF files have Llama's architecture name."""

from __future__ import annotations

from ..builder import Builder
from ..config import Config
from ..decoder import Decoder
from ..program import Program
from .llama import GGUF as GGUF


def program(config: Config) -> Program:
    """The program of a Mistral model."""
    builder = Builder()
    if config.values.get("sliding_window", 4096) is not None:
        builder.window(config.count("sliding_window", 4096))
    return Decoder.of(config).program(config.vocab, builder)
