"""What the tests of the gateway and of transfers share: a real gateway process, enrolled devices, upload folders."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deepfusion.config import parse_config, save_config
from deepfusion.federation import identity
from deepfusion.federation.device.connection import Connection
from deepfusion.federation.offer import Offer, read_offer
from deepfusion.federation.server.home import Home
from deepfusion.federation.server.ledger import Ledger
from deepfusion.records import Card
from deepfusion.uploads.card import write_card

_HAND_IN = """
import json, sys
from pathlib import Path
from deepfusion.federation import identity
from deepfusion.federation.device.connection import Connection
from deepfusion.federation.offer import parse_offer
from deepfusion.federation.device.transfer import hand_in
folder, port, ca = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
key = identity.device_key(folder.with_name(folder.name + ".pem"))
offer = parse_offer(folder.with_name(folder.name + ".offer").read_text())
connection = Connection(f"127.0.0.1:{port}", key, identity.tls(ca), seconds=10)
receipt = hand_in(connection, folder, offer, sys.stdin.read())
status = Path("/proc/self/status").read_text()  # ru_maxrss would be that of the process that started this one
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"receipt": receipt, "peak": peak}))
"""


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

    def call(
        self, method: str, path: str, content: bytes = b"", ticket: str | None = None, **headers: str
    ) -> httpx.Response:
        """One signed request of tus, whatever comes back."""
        sent = {"Tus-Resumable": "1.0.0", "Authorization": f"Bearer {ticket or self.ticket}"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        return self.gateway.request(method, path, identity.sign(self.key) | sent, content)

    def create(self, name: str, length: int | None = None, **headers: str) -> httpx.Response:
        size = (
            next((file.size for file in self.offer.files if file.name == name), 1)
            if length is None
            else length
        )
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

    def process(self, port: int | None = None) -> subprocess.Popen[str]:
        """A device process that hands its upload in and prints {"receipt", "peak"}; peak resident memory in bytes."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        identity.write_secret(self.folder.with_name(f"{self.name}.pem"), key)
        self.folder.with_name(f"{self.name}.offer").write_text(self.offer.model_dump_json())
        line = [sys.executable, "-c", _HAND_IN, self.folder, port or self.gateway.port, self.gateway.home.ca]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [str(part) for part in line], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        assert process.stdin is not None
        process.stdin.write(self.ticket)
        process.stdin.close()
        process.stdin = None
        return process

    @property
    def incoming(self) -> Path:
        return self.gateway.run / "federation" / "incoming" / self.name / self.offer.digest[:16]

    @property
    def received(self) -> Path:
        return self.gateway.run / "federation" / "received" / self.name


class Gateway:
    """A gateway process with a home and a run of its own below `folder`; to be killed and started again at will."""

    def __init__(
        self, folder: Path, federation: dict[str, Any] | None = None, superlink: str | None = None
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        self.home = Home(folder / "home")
        self.home.prepare([])
        self.ledger = Ledger(self.run)
        save_config(parse_config({"federation": federation or {}}), self.run / "config.yaml")
        self.port, self.superlink = free_port(), superlink or f"127.0.0.1:{free_port()}"
        self.context = identity.tls(self.home.ca)
        self.connections: list[Connection] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Gateway:
        line = [
            sys.executable,
            "-m",
            "deepfusion.federation.server.gateway",
            "--home",
            self.home.folder,
            "--run",
            self.run,
        ]
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
        for connection in self.connections if number == signal.SIGTERM else ():
            connection.close()  # or the gateway would wait for it
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, content: Any = b""
    ) -> httpx.Response:
        with httpx.Client(verify=self.context, trust_env=False, timeout=30) as client:
            return client.request(
                method, f"https://127.0.0.1:{self.port}{path}", headers=headers or {}, content=content
            )

    def connect(self, key: ec.EllipticCurvePrivateKey, port: int | None = None, **options: Any) -> Connection:
        options = {"seconds": 5.0, "patience": 60.0} | options
        self.connections.append(Connection(f"127.0.0.1:{port or self.port}", key, self.context, **options))
        return self.connections[-1]

    def device(self, name: str, sizes: dict[str, int] | None = None) -> Device:
        return Device(
            self, name, {"model.safetensors": 300_000} if sizes is None else sizes, self.folder / "devices"
        )

    @property
    def log(self) -> str:
        return (self.folder / "gateway.log").read_text()

    @property
    def audit(self) -> list[dict[str, Any]]:
        path = self.ledger.audit_path
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Faults:
    """A TCP proxy to 127.0.0.1:`port` that breaks connections at random moments, or lets nothing through for a while.

    Args:
        resets: shortest and longest time in seconds between two moments at which all connections are reset; may be
            set later.
    """

    def __init__(self, port: int, resets: tuple[float, float] | None = None) -> None:
        self.target, self.resets, self.passed, self.count = port, resets, 0, 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = free_port()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )
        self._end = asyncio.Event()

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def swallow(self, on: bool) -> None:
        """Let nothing through, and answer nothing; or end that."""
        self._loop.call_soon_threadsafe(self._flows.clear if on else self._flows.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        while not self._end.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), random.uniform(*self.resets) if self.resets else 0.1)
            if self.resets and self._flows.is_set():  # a network that swallows everything tells nobody so
                self.count += len(self._open) // 2
                for writer in list(self._open):
                    writer.transport.abort()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._flows.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            ends.add(back)
            self._open |= ends
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        self._open -= ends
        for end in ends:
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(65536):
            await self._flows.wait()
            self.passed += len(block)
            writer.write(block)
            await writer.drain()
        writer.close()


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
