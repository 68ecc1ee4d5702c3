"""Devices together: the wire, the nodes, and the decisions about who holds what."""

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.net, not as {__name__}")
