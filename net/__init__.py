"""The network: the wire protocol, the nodes, and the coordinator that makes a chain of them."""

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.net, not as {__name__}")
