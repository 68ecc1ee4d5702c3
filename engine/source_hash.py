"""The SHA-256 of the C sources, compiled into the library and compared when the library is loaded.

An editable install never rebuilds C, so a checkout can have a library older than its sources. `setup.py`
loads this file by its path to put the hash into the library (`-DSHOAL_SOURCE_HASH`), so this module uses the
standard library only and no relative imports. The native backend compares the hashes.
"""

import hashlib
from pathlib import Path

CHECKOUT_CSRC = Path(__file__).resolve().parent.parent / "csrc"


def source_hash(csrc: Path = CHECKOUT_CSRC) -> str | None:
    """Hex digest over every C source in `csrc` (name, size and bytes, sorted by name); None if there are
    none.

    None is normal in an installed wheel: the library is part of it and cannot be out of date.
    """
    files = sorted(path for pattern in ("*.c", "*.h", "*.inc") for path in csrc.glob(pattern))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
