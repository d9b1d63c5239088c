"""Flower's SuperLink as the server runs it: on loopback only, with TLS, known devices and a persistent state.

Its Control API has no users: whoever reaches the port can give orders. Devices never do; they reach the gateway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from deepfusion.federation.flower.fleet import register_devices
from deepfusion.federation.identity import public_pem
from deepfusion.federation.server.home import Home

_APP = """\
[project]
name = "deepfusion-federation"
version = "1.0.0"
description = "Names the run; devices and server run what is installed there."
license = { file = "LICENSE" }
dependencies = ["flwr==1.41.0"]

[tool.flwr.app]
publisher = "deepfusion"

[tool.flwr.app.components]
serverapp = "placeholder:app"
clientapp = "placeholder:app"
"""


class SuperLink:
    """The SuperLink of a server's home.

    Args:
        address: HOST:PORT on loopback.
    """

    def __init__(self, home: Home, address: str) -> None:
        self.home, self.address = home, address

    def command(self) -> list[str]:
        """What starts it. No secret is among the arguments, only the files that hold them."""
        host, port = self.address.split(":")
        return [
            program("flower-superlink"), "--host", host, "--port", port, "--database",
            str(self.home.folder / "superlink.db"),
            "--ssl-certfile", str(self.home.certificate), "--ssl-keyfile", str(self.home.certificate_key),
            "--ssl-ca-certfile", str(self.home.ca), "--enable-supernode-auth", "--isolation", "process",
            "--disable-runtime-dependency-installation", "--superexec-auth-secret-file",
            str(self.home.superexec_secret),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Environment of all that is Flower's: no telemetry, no look for updates, nothing in the user's own folders."""
        return {
            **os.environ,
            "FLWR_HOME": str(self.home.flower),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def register(self) -> None:
        """Make the devices that the SuperLink knows those that are enrolled.

        Raises:
            httpx.HTTPError: it does not answer.
        """
        enrolled = [device for device in self.home.devices.values() if not device.revoked]
        register_devices(
            self.address, self.home.ca, {device.device: public_pem(device.key) for device in enrolled}
        )

    def submit(self) -> None:
        """Create the run in which the ServerApp will work."""
        app = self.home.flower / "app"
        app.mkdir(parents=True, exist_ok=True)
        (app / "pyproject.toml").write_text(_APP)
        (app / "placeholder.py").write_text("app = None\n")
        (app / "README.md").write_text("DeepFusion federation\n")
        (app / "LICENSE").write_text("Apache-2.0\n")
        self._flwr("run", str(app))

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """One call of Flower's command line.

        Raises:
            FlowerError: it fails; the SuperLink may be starting.
        """
        self.home.flower.mkdir(exist_ok=True)
        (self.home.flower / "config.toml").write_text(
            f'[superlink]\ndefault = "deepfusion"\n\n[superlink.deepfusion]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.home.ca}"\n'
        )
        done = subprocess.run(
            [program("flwr"), *arguments, "--format", "json"],
            env=self.environment(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()[-500:]}
        if not answer.get("success"):
            raise FlowerError(f"flwr {arguments[0]}: {answer.get('error-message')}")
        return answer


class FlowerError(Exception):
    """Flower's command line failed."""


def program(name: str) -> str:
    """A program of the environment that this Python runs in, whatever PATH says."""
    return str(Path(sys.executable).with_name(name))


def wait_for(link: SuperLink, seconds: float = 60) -> None:
    """Register the devices as soon as the SuperLink answers."""
    until = time.monotonic() + seconds
    while True:
        try:
            return link.register()
        except httpx.HTTPError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)
