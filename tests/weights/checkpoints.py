"""Hugging Face checkpoints for tests: copies of the tiny one, changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from shoal.engine.checkpoint import open_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """The checkpoint's tensors as f32."""
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def rewrite(directory: Path, values: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(values, directory / "model.safetensors")


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
