"""The error tree: every class has an exit code of its own, and none that means something else."""

import shoal
import shoal.engine.errors
import shoal.net.errors
from shoal.engine.errors import ShoalError

# Done, wrong usage, some lines have errors, interrupted, the reader of our output went away.
TAKEN = {0, 2, 19, 130, 141}


def test_exit_codes_tell_errors_apart() -> None:
    public = [getattr(shoal, name) for name in shoal.__all__ if name.endswith("Error")]
    codes = {kind: kind.exit_code for kind in public}
    assert all(issubclass(kind, ShoalError) and "exit_code" in vars(kind) for kind in public)
    assert len(set(codes.values())) == len(public)
    assert TAKEN.isdisjoint(codes.values())
    assert all(1 <= code < 128 for code in codes.values())


def test_every_error_is_public() -> None:
    defined = {
        name
        for module in (shoal.engine.errors, shoal.net.errors)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, ShoalError)
    }
    assert defined == {name for name in shoal.__all__ if name.endswith("Error")}
