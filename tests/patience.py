"""How long tests wait."""

LIMIT = 600.0
"""Seconds after which something hangs. It claims nothing about speed: a busy machine of two slow cores must
not reach it."""
