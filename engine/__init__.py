"""One device's share of the work: programs, weights, kernels, and the stage that runs them."""

if not __name__.startswith("shoal."):
    raise ImportError(f"import this package as shoal.engine, not as {__name__}")
