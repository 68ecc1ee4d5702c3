"""The house of this device: its own key and certificate, and the list of the devices that belong together.

They are kept in `$XDG_CONFIG_HOME/shoal` or `~/.config/shoal`, and only this user may read them: `device.pem`
has the private key and the self-signed certificate, which are made once, `house.json` the devices, and
`head.json` the addresses at which the head waits for them (`shoal up`), and on the head `up.json` its model.
The head of a house changes the list (`shoal invite`, `shoal devices`); the others have it and the addresses
from the head.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import stat
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .engine import strict
from .engine.errors import MissingDependencyError, OperatingSystemError, ShoalError
from .engine.os_errors import translated
from .net.errors import UntrustedError, printable
from .net.messages import CONTROL_LIMIT, MOST_ADDRESSES, MOST_DEVICES, Address, PairedDevice

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

    from .net.tls import Trust

_LIST_LIMIT = CONTROL_LIMIT - 4096
"""The most bytes of a list, which other devices get in one message with a few things more."""
IDENTITY, HOUSE, HEAD, UP, LOCK = "device.pem", "house.json", "head.json", "up.json", "house.lock"
PORT = 7077
"""Where `shoal up` listens unless it is told otherwise."""
_INSTALL = (
    "pairing needs the cryptography package: pip install cryptography, or in Termux `pkg install "
    "python-cryptography`"
)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The contents of house.json."""

    version: Annotated[int, strict.Between(1, 1)]
    devices: Annotated[tuple[PairedDevice, ...], strict.AtMost(MOST_DEVICES)]


@dataclass(frozen=True, slots=True)
class _Head:
    """The contents of head.json."""

    version: Annotated[int, strict.Between(1, 1)]
    addresses: Annotated[tuple[Address, ...], strict.AtMost(MOST_ADDRESSES)]


@dataclass(frozen=True, slots=True)
class _Up:
    """The contents of up.json."""

    version: Annotated[int, strict.Between(1, 1)]
    model: Annotated[str, strict.Printable(1, 4096)]


def directory() -> Path:
    """The directory of this user's configuration. OperatingSystemError: there is no home directory."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "shoal"
    except RuntimeError:
        raise OperatingSystemError(
            "this user has no home directory to keep keys in: set XDG_CONFIG_HOME to a directory for them"
        ) from None


def load() -> tuple[PairedDevice, ...] | None:
    """The devices of this device's house; None: it has none. ShoalError: the file is damaged."""
    path = directory() / HOUSE
    try:
        _check_private(path)
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return strict.decode(_Listing, body).devices
    except ValueError as error:
        raise ShoalError(f"{path} is damaged ({error}): delete it, and pair this device again") from error


def trust() -> Trust | None:
    """What a process of this device knows of its house; None: this device has none, and connects without TLS.
    ShoalError: files are missing or damaged, or others may read them."""
    seen = _stamp()
    devices = load()
    if devices is None:
        return None
    from .net.tls import Trust

    path = directory() / IDENTITY
    _check_private(path, missing="pair this device again")

    def look() -> Sequence[PairedDevice] | None:
        nonlocal seen
        if _stamp() == seen:
            return None
        seen = _stamp()
        return load()

    try:
        made = Trust(path, devices, keep=_keep, look=look)
    except (ValueError, OSError) as error:
        raise ShoalError(
            f"{path} and {HOUSE} beside it cannot be used ({error}): delete them, and pair this device again"
        ) from error
    return made


def _keep(devices: Sequence[PairedDevice], addresses: Sequence[Address]) -> None:
    """Keeps a list that a process has heard from the head, and where that is, unless this device has left
    that house since."""
    with locked():
        try:
            now = load()
        except ShoalError:  # this list replaces one that is damaged
            now = tuple(devices)
        if now is not None and _heads(now) & _heads(devices):
            save(devices)
            if addresses:
                _save_head(addresses)


def _heads(devices: Sequence[PairedDevice]) -> set[str]:
    return {device.certificate for device in devices if device.role == "head"}


def _stamp() -> tuple[int, int] | None:
    """Changes whenever the list is replaced by another."""
    try:
        found = (directory() / HOUSE).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def save(devices: Sequence[PairedDevice]) -> None:
    """Replaces the list of devices. The caller holds the lock."""
    _write(directory() / HOUSE, strict.encode(_Listing(1, tuple(devices))))


@contextmanager
def locked() -> Iterator[None]:
    """A lock for changing the list."""
    path = directory()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path / LOCK, "w", opener=partial(os.open, mode=0o600)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def own_certificate() -> bytes:
    """The certificate of this device in DER, which is made with its key if there is none.
    MissingDependencyError: that needs a package. ShoalError: others may read the key."""
    from .net.tls import certificate_in

    path = directory() / IDENTITY
    with locked():
        if not path.exists():
            _write(path, _made())
        _check_private(path)
        return certificate_in(path)


def open_or_create(name: str | None) -> tuple[PairedDevice, ...]:
    """The devices of the house whose head is this device, which is begun if there is none.
    UntrustedError: this device is not the head of its house."""
    own = b64encode(own_certificate()).decode()
    with locked():
        devices = load()
        if devices is None:
            devices = (PairedDevice(device_name(name), "head", own),)
            save(devices)
    check_head(devices, own)
    return devices


def check_head(devices: Sequence[PairedDevice], own: str) -> None:
    """UntrustedError: the device with the certificate `own` is not the head."""
    if any(device.certificate == own and device.role == "head" for device in devices):
        return
    heads = ", ".join(device.name for device in devices if device.role == "head")
    raise UntrustedError(f"this device is not the head of its house: run this on {heads}")


def change(edit: Callable[[tuple[PairedDevice, ...]], Sequence[PairedDevice]]) -> tuple[PairedDevice, ...]:
    """Changes the list on the head; returns it. ShoalError: there is none, this is not the head, or the disk
    does not take it."""
    own = b64encode(own_certificate()).decode()
    with locked():
        devices = load()
        if devices is None:
            raise ShoalError("this device has no house: `shoal invite` begins one")
        check_head(devices, own)
        changed = tuple(edit(devices))
        if len(strict.encode(_Listing(1, changed))) > _LIST_LIMIT:
            raise ShoalError(
                "the list of the house would be longer than a message may be: revoke a device, or give some "
                "shorter names, with fewer letters that are not ASCII"
            )
        try:
            save(changed)
        except OSError as error:  # the list is as it was, and whoever asked for the change hears why
            raise translated(error, directory() / HOUSE, "cannot be written") or error from error
        return changed


def added(devices: tuple[PairedDevice, ...], new: PairedDevice) -> tuple[PairedDevice, ...]:
    """The list with a device that has paired: under a name of its own, or instead of its older entry.
    ShoalError: the house is full, or the device could pass for another."""
    from .net.tls import check_devices

    others = tuple(device for device in devices if device.certificate != new.certificate)
    if len(others) < len(devices):
        old = next(device for device in devices if device.certificate == new.certificate)
        if old.role == "head":
            raise ShoalError("this device is the head of the house already")
    if len(others) >= MOST_DEVICES:
        raise ShoalError(f"the house has {MOST_DEVICES} devices, the most: revoke one with `shoal devices`")
    names, name, count = {device.name for device in others}, new.name, 2
    while name in names:
        name, count = f"{new.name[:58]}-{count}", count + 1
    result = (*others, replace(new, name=name))
    try:
        check_devices(result)
    except ValueError as error:
        raise ShoalError(f"the device cannot be added: {error}") from error
    return result


def check_device(device: PairedDevice) -> None:
    """Checks a device that wants to join. ValueError: its certificate is not one that shoal makes."""
    check_certificate(b64decode(device.certificate, validate=True))


def _save_head(addresses: Sequence[Address]) -> None:
    _write(directory() / HEAD, strict.encode(_Head(1, tuple(addresses))))


def save_joined(devices: Sequence[PairedDevice], addresses: Sequence[Address] = ()) -> None:
    """Keeps the list of a house that this device has joined, and where its head is, instead of older ones."""
    with locked():
        save(devices)
        _save_head(addresses)


def head_addresses() -> tuple[Address, ...]:
    """Where the head of this device's house waits for its devices, as far as that is known. On the head:
    where `shoal up` listened last. ShoalError: the file is damaged."""
    path = directory() / HEAD
    try:
        _check_private(path)
        body = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        return strict.decode(_Head, body).addresses
    except ValueError as error:
        raise ShoalError(f"{path} is damaged ({error}): delete it, and join the house again") from error


def keep_head(addresses: Sequence[Address]) -> None:
    """Keeps where the head is, unless this device has left the house, or knows it already."""
    with locked():
        if load() is not None and addresses and tuple(addresses) != head_addresses():
            _save_head(addresses)


def head_port() -> int:
    """On the head: the port on which `shoal up` listens, or did the last time."""
    return next((address.port for address in head_addresses()), PORT)


def check_free() -> None:
    """UntrustedError: this device is the head of other devices, so it cannot join another house."""
    devices = load()
    if devices is not None and len(devices) > 1:
        own = b64encode(own_certificate()).decode()
        if any(device.certificate == own and device.role == "head" for device in devices):
            raise UntrustedError(
                "this device is the head of a house with other devices: revoke them with `shoal devices "
                "revoke` first, then join"
            )


def leave() -> None:
    """Forgets the house. The key stays."""
    with locked():
        for name in (HOUSE, HEAD):
            (directory() / name).unlink(missing_ok=True)


def last_model() -> str | None:
    """The model directory of the last `shoal up`, if there was one. ShoalError: the file is damaged."""
    path = directory() / UP
    try:
        return strict.decode(_Up, path.read_bytes()).model
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ShoalError(f"{path} is damaged ({error}): name a MODEL, which replaces it") from error


def keep_model(path: str) -> None:
    """Keeps what `last_model` returns."""
    with locked():
        _write(directory() / UP, strict.encode(_Up(1, path)))


def device_name(asked: str | None) -> str:
    """A name for this device."""
    return printable(asked or platform.node(), 64) or "device"


def _check_private(path: Path, *, missing: str = "") -> None:
    """ShoalError: other users may read the file. FileNotFoundError, or ShoalError with the remedy `missing`:
    there is none."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if missing:
            raise ShoalError(f"{path} is missing: {missing}") from None
        raise
    if stat.S_IMODE(mode) & 0o077:
        raise ShoalError(f"other users may read or change {path}: run `chmod 600 {path}`")


def _write(path: Path, data: bytes) -> None:
    """Writes a file atomically that only this user may read."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with suppress(FileNotFoundError):
        part.unlink()
    try:
        with open(part, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _made() -> bytes:
    """A new private key and its self-signed certificate, in PEM. MissingDependencyError."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError as error:
        raise MissingDependencyError(f"{_INSTALL} ({error})") from error
    import datetime

    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(key.public_key())
    # It never ends, since the clocks of devices differ; a device is trusted as long as it is in the list.
    start, end = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31)  # noqa: DTZ001
    use = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), start, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(use, critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return secret + certificate.public_bytes(serialization.Encoding.PEM)


def _subject(key: PublicKeyTypes) -> x509.Name:
    """The subject of a device's certificate: the hash of its public key. OpenSSL finds anchors by subject, so
    each must have its own, which no other device can take."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    called = f"shoal {hashlib.sha256(encoded).hexdigest()[:32]}"
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, called)])


def check_certificate(der: bytes) -> None:
    """Checks the certificate of a device that pairs. ValueError: it is not one that shoal makes."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        with warnings.catch_warnings(action="error"):  # what is allowed yet, but not for long
            certificate = x509.load_der_x509_certificate(der)
            key, subject, issuer = certificate.public_key(), certificate.subject, certificate.issuer
    except (UnsupportedAlgorithm, UserWarning, x509.InvalidVersion, TypeError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("its key is not of the curve P-256")
    if not subject == issuer == _subject(key):
        raise ValueError("its subject is not the hash of its key")
    try:
        certificate.verify_directly_issued_by(certificate)
    except (InvalidSignature, UnsupportedAlgorithm, TypeError):
        raise ValueError("it is not signed with its own key") from None
