"""Rotary positions as configurations spell them, and what transformers makes of it (`make oracle` compares).

The third member says what a warning must name; None: nothing is odd."""

from __future__ import annotations

from typing import Any

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TRAINED = "original_max_position_embeddings"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "nothing": ({}, {"rope_theta": 10000.0}, None),
    "a base alone": ({"rope_theta": 5e5}, {"rope_theta": 5e5}, None),
    "an empty scaling": ({"rope_scaling": {}, "rope_theta": 5e5}, {"rope_theta": 5e5}, None),
    "rope_scaling": ({"rope_scaling": LINEAR}, {**LINEAR, "rope_theta": 10000.0}, None),
    "its older type": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {**LINEAR, "rope_theta": 10000.0},
        None,
    ),
    "no type": (
        {"rope_scaling": {"factor": 2.0}},
        {"rope_theta": 10000.0},
        "names no rope_type and is ignored",
    ),
    "no type in rope_parameters": (
        {"rope_parameters": {"factor": 2.0, "rope_theta": 5e5}},
        {"rope_theta": 5e5},
        "names no rope_type and is ignored",
    ),
    "two types": (
        {"rope_scaling": {"type": "llama3", **LINEAR}},
        {**LINEAR, "rope_theta": 10000.0},
        "has the rope_type 'linear' and the type 'llama3'",
    ),
    "rope_parameters": (
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}},
        {**LINEAR, "rope_theta": 5e5},
        None,
    ),
    "both, equal": (
        {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 5e5}},
        {**LINEAR, "rope_theta": 5e5},
        None,
    ),
    "both, other factors": (
        {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4.0}},
        {**LINEAR, "rope_theta": 10000.0},
        "rope_scaling and rope_parameters differ",
    ),
    "both, a base in the one that does not count": (
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {**LINEAR, "rope_theta": 10000.0},
        "rope_scaling and rope_parameters differ",
    ),
    "two bases": (
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5},
        "rope_theta is 10000.0 by itself and 500000 in the scaling",
    ),
    "two bases, in rope_scaling": (
        {"rope_theta": 10000.0, "rope_scaling": {**LINEAR, "rope_theta": 5e5}},
        {**LINEAR, "rope_theta": 5e5},
        "rope_theta is 10000.0 by itself and 500000 in the scaling",
    ),
    "llama3": (
        {"rope_scaling": {**LLAMA3, TRAINED: 128}, "rope_theta": 5e5},
        {**LLAMA3, TRAINED: 128, "rope_theta": 5e5},
        None,
    ),
    "llama3, no trained context": (
        {"rope_scaling": LLAMA3},
        {**LLAMA3, TRAINED: 512, "rope_theta": 10000.0},
        None,
    ),
    "llama3, two trained contexts": (
        {"rope_scaling": {**LLAMA3, TRAINED: 128}, TRAINED: 256},
        {**LLAMA3, TRAINED: 256, "rope_theta": 10000.0},
        "is 256 by itself, which is used, and 128 in the scaling",
    ),
}
