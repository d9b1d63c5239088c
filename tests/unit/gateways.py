"""What the tests of the gateway and of transfers share: a real gateway process, enrolled devices, upload folders."""

from __future__ import annotations

import base64
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from deepfusion.card import Card, write_card
from deepfusion.config import parse_config, save_config
from deepfusion.federation import identity
from deepfusion.federation.connection import Connection
from deepfusion.federation.home import Home
from deepfusion.federation.ledger import Ledger
from deepfusion.federation.offer import Offer, read_offer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Device:
    """An enrolled device with an upload folder and a ticket for it."""

    def __init__(self, gateway: Gateway, name: str, sizes: dict[str, int], folder: Path) -> None:
        self.gateway, self.name = gateway, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        gateway.home.enroll(name, identity.public_line(self.key.public_key()))
        self.folder = make_upload(folder / name, name, sizes)
        self.offer = read_offer(self.folder)
        self.ticket = gateway.ledger.issue(self.offer)
        self.connection = gateway.connect(self.key)

    def call(self, method: str, path: str, content: bytes = b"", ticket: str | None = None, **headers: str) -> httpx.Response:
        """One signed request of tus, whatever comes back."""
        sent = {"Tus-Resumable": "1.0.0", "Authorization": f"Bearer {ticket or self.ticket}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request(method, path, identity.sign(self.key) | sent, content)

    def create(self, name: str, length: int | None = None, **headers: str) -> httpx.Response:
        size = next((file.size for file in self.offer.files if file.name == name), 1) if length is None else length
        metadata = f"filename {base64.b64encode(name.encode()).decode()}"
        return self.call("POST", "/v1/uploads", Upload_Length=str(size), Upload_Metadata=metadata, **headers)

    def patch(self, name: str, offset: int, content: Any, **headers: str) -> httpx.Response:
        sent = {"Content_Type": "application/offset+octet-stream", "Upload_Offset": str(offset)} | headers
        return self.call("PATCH", f"/v1/uploads/{name}", content, **sent)

    def send_all(self) -> None:
        for file in self.offer.files:
            assert self.create(file.name).status_code == 201
            if file.size:
                assert self.patch(file.name, 0, (self.folder / file.name).read_bytes()).status_code == 204

    def receipt(self) -> httpx.Response:
        return self.call("POST", "/v1/receipt")

    @property
    def incoming(self) -> Path:
        return self.gateway.run / "federation" / "incoming" / self.name / self.offer.digest[:16]

    @property
    def received(self) -> Path:
        return self.gateway.run / "federation" / "received" / self.name


class Gateway:
    """A gateway process with a home and a run of its own below `folder`; to be killed and started again at will."""

    def __init__(self, folder: Path, federation: dict[str, Any] | None = None, superlink: str | None = None) -> None:
        self.folder, self.run = folder, folder / "run"
        self.home = Home(folder / "home")
        self.home.prepare([])
        self.ledger = Ledger(self.run)
        save_config(parse_config({"federation": federation or {}}), self.run / "config.yaml")
        self.port, self.superlink = free_port(), superlink or f"127.0.0.1:{free_port()}"
        self.context = identity.tls(self.home.ca)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Gateway:
        line = [sys.executable, "-m", "deepfusion.federation.gateway", "--home", self.home.folder, "--run", self.run]
        line += ["--host", "127.0.0.1", "--port", self.port, "--superlink", self.superlink]
        with open(self.folder / "gateway.log", "ab") as log:
            self.process = subprocess.Popen([str(part) for part in line], stdout=log, stderr=log)
        for _ in range(600):
            try:
                if self.request("GET", "/v1/health").json() == {"ok": True}:
                    return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.log
                time.sleep(0.05)
        raise AssertionError(self.log)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def request(self, method: str, path: str, headers: dict[str, str] | None = None, content: Any = b"") -> httpx.Response:
        # No connection is kept, or the gateway would wait for it at its end.
        with httpx.Client(verify=self.context, trust_env=False, timeout=30) as client:
            return client.request(method, f"https://127.0.0.1:{self.port}{path}", headers=headers or {}, content=content)

    def connect(self, key: ec.EllipticCurvePrivateKey, port: int | None = None, **options: Any) -> Connection:
        options = {"seconds": 5.0, "patience": 60.0} | options
        return Connection(f"127.0.0.1:{port or self.port}", key, self.context, **options)

    def device(self, name: str, sizes: dict[str, int] | None = None) -> Device:
        return Device(self, name, {"model.safetensors": 300_000} if sizes is None else sizes, self.folder / "devices")

    @property
    def log(self) -> str:
        return (self.folder / "gateway.log").read_text()

    @property
    def audit(self) -> list[dict[str, Any]]:
        path = self.ledger.audit_path
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_upload(folder: Path, device: str, sizes: dict[str, int]) -> Path:
    """An upload folder whose files hold random bytes of the given sizes, with a card."""
    folder.mkdir(parents=True)
    generator = random.Random(device)
    for name, size in sizes.items():
        (folder / name).write_bytes(generator.randbytes(size))
    write_card(folder, make_card(device))
    return folder


def make_card(device: str) -> Card:
    return Card(
        device=device, type="gpt2", model_class="GPT2LMHeadModel", signature="0" * 64, base="gpt2", base_digest="",
        method="full", embedding=[1.0, 0.0], encoder="hashing", tokens=1, documents=1, loss_before=2.0, loss_after=1.0,
        steps=1, seed=0, deepfusion_version="0",
    )  # fmt: skip


def offer_of(card: Card, files: list[dict[str, Any]]) -> Offer:
    """An offer of files that need not exist."""
    return Offer.model_validate({"card": card, "files": files})
