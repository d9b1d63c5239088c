"""The server's home: what outlives a run and must not lie in its folder. Secrets, certificates, and who is enrolled."""

from __future__ import annotations

import datetime
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.folders import local_path, locked, place
from deepfusion.names import check_device_id

DEFAULT = Path("~/.deepfusion/server")
_LOCK = ".devices.lock"


@dataclass(frozen=True)
class Enrolled:
    """A device that may take part, or might once.

    Attributes:
        device: its name, given by the operator; uploads must be called so.
        key: its public key as a line of OpenSSH.
        revoked: it may not take part any more.
    """

    device: str
    key: str
    revoked: bool = False


class Home:
    """A folder of mode 0700: ca.pem, ca.key, server.pem, server.key, devices.json, the state of Flower's SuperLink."""

    def __init__(self, folder: Path) -> None:
        self.folder = local_path(folder).resolve()
        self._version: tuple[int, int] | None = None
        self._known: dict[str, Enrolled] = {}

    def prepare(self, hosts: list[str]) -> None:
        """Make what is missing: the folder, the authority, a certificate for `hosts`, the secret of the control
        plane.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(self.folder, 0o700)
        if not self.superexec_secret.exists():  # the first: it shows that the folder is ours
            identity.write_secret(self.superexec_secret, secrets.token_hex(32).encode())
        identity.make_authority(self.folder)
        identity.issue_certificate(self.folder, hosts)

    def check(self) -> None:
        """Check that the folder is a server's home, or may become one.

        Raises:
            InputError: it cannot be written (`bad-out`), or other things lie there (`not-ours`).
        """
        if (self.superexec_secret.is_file() or (self.folder / _LOCK).is_file()) and self.folder.is_dir():
            return
        place(self.folder)
        if odd := next(iter(sorted(self.folder.iterdir() if self.folder.is_dir() else [])), None):
            what = f"the folder holds {odd.name} and is no server's home"
            raise InputError(what, where=self.folder, fix="choose another --home", code="not-ours")

    @property
    def ca(self) -> Path:
        """The certificate of the private authority; public."""
        return self.folder / "ca.pem"

    @property
    def certificate(self) -> Path:
        """The server's own certificate; public."""
        return self.folder / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """Secret."""
        return self.folder / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """Secret that keeps other programs of this machine from taking over the ServerApp."""
        return self.folder / "superexec.secret"

    @property
    def flower(self) -> Path:
        """FLWR_HOME of everything of Flower that the server starts."""
        return self.folder / "flower"

    @property
    def devices(self) -> dict[str, Enrolled]:
        """All that were ever enrolled, by name; read again when the file has changed."""
        path = self.folder / "devices.json"
        try:
            found = path.stat()
        except OSError:
            return {}
        # Every change is a new file, which tells two changes in one tick of the file system's clock apart.
        version = found.st_mtime_ns, found.st_ino
        if version != self._version:
            rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
            self._known = {row["device"]: Enrolled(row["device"], row["key"], row["revoked"]) for row in rows}
            self._version = version
        return self._known

    def who(self, key: ec.EllipticCurvePublicKey) -> Enrolled | None:
        """The device that a public key belongs to; revoked ones too."""
        line = identity.public_line(key)
        return next((device for device in self.devices.values() if device.key == line), None)

    def enroll(self, device: str, key_line: str) -> None:
        """Let a device take part.

        Raises:
            InputError: not a public key, not a name, or one of both is enrolled already; and all of `check`.
        """
        check_device_id(device)
        key = identity.parse_public_line(key_line)
        line = identity.public_line(key)
        with self._changing() as known:
            if device in known and not known[device].revoked and known[device].key != line:
                fix = f"deepfusion server revoke {device}, or another name"
                raise InputError(
                    "this name is enrolled with another key", where=device, fix=fix, code="already-enrolled"
                )
            other = self.who(key)
            if other and not other.revoked and other.device != device:
                raise InputError(
                    f"this key is enrolled as {other.device}", where=device, code="already-enrolled"
                )
            if other and other.revoked:
                fix = "the device makes a new key with another --home"
                raise InputError("this key was revoked", where=device, fix=fix, code="revoked")
            known[device] = Enrolled(device, line)

    def revoke(self, device: str) -> None:
        """Shut a device out; what it handed in before stays.

        Raises:
            InputError: no such device.
        """
        with self._changing() as known:
            if device not in known:
                allowed = ", ".join(sorted(known)) or "none yet"
                raise InputError("no such device", where=device, allowed=allowed, code="not-enrolled")
            known[device] = Enrolled(device, known[device].key, revoked=True)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Enrolled]]:
        """A copy of all devices, written back at the end: one process at a time, or one would undo what another did."""
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self.folder / _LOCK):
            known = dict(self.devices)
            yield known
            rows = [vars(device) for device in known.values()]
            identity.write_secret(self.folder / "devices.json", json.dumps(rows, indent=1).encode())


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
