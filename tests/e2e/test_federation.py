"""A real federation on this machine: a server and devices as processes of their own, TLS, keys, kills."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM

from conftest import overlay, sentences, write_config, write_rows
from deepfusion.digests import sha256_file
from deepfusion.federation import identity
from deepfusion.federation.server.home import Home
from deepfusion.uploads.card import read_card
from network import Proxy

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PATIENCE = 240.0


class Process:
    """A `deepfusion` command in the background, in a network namespace if `host` is given; its output can be waited
    for.
    """

    def __init__(self, *arguments: object, host: str | None = None) -> None:
        line = [sys.executable, "-m", "deepfusion.cli", *map(str, arguments)]
        line = ["ip", "netns", "exec", host, *line] if host else line
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until a line matches."""
        found = wait(
            lambda: re.search(pattern, self.output) or (self.process.poll() is not None and "ended"),
            f"{pattern} in {self.output}",
        )
        assert isinstance(found, re.Match), self.output
        return found

    def kill(self) -> None:
        """As the machine would by losing power: at once, and without the process noticing."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def ends(self, code: int) -> str:
        """Wait for its end."""
        self.process.wait(PATIENCE)
        self._reader.join()
        assert self.process.returncode == code, self.output
        return self.output


def wait(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)
    return result


class Federation:
    """A server with its home, and the devices' own folders, in one temporary folder.

    Args:
        host: address of the server.
        hosts: network namespaces in which the server and devices of these names live.
    """

    def __init__(
        self,
        folder: Path,
        zoo: dict[str, Path],
        host: str = "127.0.0.1",
        hosts: dict[str, str] | None = None,
        **changes: Any,
    ) -> None:
        self.folder, self.run, self.home = folder, folder / "run", Home(folder / "server")
        self.host, self.hosts = host, hosts or {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"{host}:{self.port}"
        values = {
            "family": "qwen3_moe", "experts": 3, "precision": "fp32", "jobs": 1, "checkpoint_seconds": 0.01,
            "data": {"public": ["sampled"], "sampled_documents": 4, "max_chars": 96},
            "device": {"steps": 40, "batch_size": 4},
            "distill": {"base": str(zoo["qwen3_moe"]), "steps": 4, "batch_size": 4},
            "tune": {"steps": 2, "batch_size": 4}, "federation": {"wait_for": 4},
        }  # fmt: skip
        self.config = write_config(folder / "server.yaml", overlay(values, **changes))
        self.processes: list[Process] = []

    def serve(self, *options: object) -> Process:
        process = Process(
            "server", "start", self.config, "--out", self.run, "--home", self.home.folder, "--host", self.host,
            "--port", self.port, "--public", self.host, *options, host=self.hosts.get("server"),
        )  # fmt: skip
        self.processes.append(process)
        self.ca = process.says(r"--ca-sha256 ([0-9a-f]{64})")[1]
        return process

    def join(self, name: str, *options: object, server: str | None = None, ca: str | None = None) -> Process:
        process = Process(
            "device", "join", "--server", server or self.address, "--ca-sha256", ca or self.ca, "--home",
            self.folder / name,
            "--out", self.folder / "uploads" / name, *options, host=self.hosts.get(name),
        )  # fmt: skip
        self.processes.append(process)
        return process

    def enroll(self, name: str) -> None:
        key = identity.device_key(self.folder / name / "key.pem")
        self.home.enroll(name, identity.public_line(key.public_key()))

    def audit(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.run / "federation" / "audit.jsonl").read_text().splitlines()
        ]


@pytest.fixture
def federation(zoo, tmp_path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(**changes: Any) -> Federation:
        made.append(Federation(tmp_path, zoo, **changes))
        return made[-1]

    yield make
    for process in (process for one in made for process in one.processes):
        if process.process.poll() is None:
            process.kill()


def test_four_devices_of_three_types_and_everything_is_killed_once(federation, zoo, tmp_path):
    fed = federation()
    types = {"ward": "mini-gpt2", "clinic": "mini-gpt2", "bank": "mini-llama", "fund": "mini-bloom"}
    text = {
        name: sentences("finance" if name in ("bank", "fund") else "medicine", 40, seed)
        for seed, name in enumerate(types)
    }
    options = {
        name: ("--data", write_rows(tmp_path / f"{name}.jsonl", text[name]), "--type", zoo[kind])
        for name, kind in types.items()
    }
    for name in types:
        fed.enroll(name)
    server = fed.serve()

    stranger = fed.join("stranger", *options["ward"])
    refusal = stranger.ends(2)
    assert "[not-enrolled]" in refusal
    assert "deepfusion server enroll NAME 'ecdsa-sha2-nistp384 " in refusal
    assert "[wrong-ca]" in fed.join("ward", *options["ward"], ca="0" * 64).ends(2)

    ward = fed.join("ward", *options["ward"])
    wait(lambda: list((tmp_path / "uploads" / ".ward.work").rglob("checkpoint-*")), "a checkpoint of ward")
    ward.kill()
    assert not (tmp_path / "uploads" / "ward").exists()
    fed.join("ward", *options["ward"]).ends(0)

    with Proxy(fed.address, bytes_per_second=40_000) as slow:
        clinic = fed.join("clinic", *options["clinic"], server=slow.address)
        parts = fed.run / "federation" / "incoming" / "clinic"
        wait(
            lambda: any(path.stat().st_size > 20_000 for path in parts.rglob("*") if path.is_file()),
            "the first bytes of clinic",
        )
        clinic.kill()
        received = sum(path.stat().st_size for path in parts.rglob("*") if path.is_file())
        slow.reset()
    fed.join("clinic", *options["clinic"]).ends(0)

    bank = fed.join("bank", *options["bank"])
    bank.says("connected")
    server.kill()
    server = fed.serve()
    bank.ends(0)
    fed.join("fund", *options["fund"]).ends(0)
    output = server.ends(0)

    assert "all stages done" in output
    AutoModelForCausalLM.from_pretrained(fed.run / "moe" / "final")
    assert sorted(entry["device"] for entry in json.loads((fed.run / "registry.json").read_text())) == sorted(
        types
    )
    assert json.loads((fed.run / "rejected.json").read_text()) == {}
    moved = json.loads((fed.run / "transport.json").read_text())["devices"]
    for name in types:
        folder = fed.run / "uploads" / name
        card = read_card(folder)
        assert {
            path.name: sha256_file(path) for path in folder.iterdir() if path.name != "card.json"
        } == card.files
        weight = sum(path.stat().st_size for path in folder.iterdir())
        assert moved[name]["upload_bytes"] == weight
        assert moved[name]["up_bytes"] >= weight
    whole = moved["clinic"]["upload_bytes"]
    assert received > 0
    assert (
        moved["clinic"]["up_bytes"] < whole + received
    )  # what had arrived before the kill was not sent again
    refused = {(line["code"], line["device"]) for line in fed.audit() if line["event"] == "refused"}
    assert ("not-enrolled", None) in refused
    assert {line["device"] for line in fed.audit() if line["event"] == "accepted"} == set(types)


def test_private_text_secrets_and_late_devices(federation, zoo, tmp_path):
    """Everything a device sends is read in plain by the authority's owner: no text. No secret lies open. Who is late
    is kept.
    """
    fed = federation(experts=1, top_k=1, tune={"steps": 0}, federation={"wait_for": 1})
    private = [row["text"] for row in sentences("medicine", 40)]
    data = write_rows(tmp_path / "private.jsonl", [{"text": text} for text in private])
    for name in ("ward", "clinic"):
        fed.enroll(name)
    server = fed.serve("--stay")
    assert httpx.get(f"https://{fed.address}/v1/health", verify=False).json() == {
        "ok": True
    }  # the line says: open
    inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    inside.load_cert_chain(fed.home.certificate, fed.home.certificate_key)
    outside = ssl.create_default_context(cafile=str(fed.home.ca))
    outside.check_hostname = False
    with Proxy(fed.address, inside=inside, outside=outside) as ear:
        device = fed.join("ward", "--data", data, "--type", zoo["mini-gpt2"], server=ear.address)
        secrets = _secrets(fed)
        exposed = _command_lines(server.process.pid, device.process.pid)
        device.ends(0)
        heard = bytes(ear.heard)
    assert len(heard) > 20_000
    assert b"/v1/fleet/pull-messages" in heard
    for text in private:
        for spelled in (text.encode(), json.dumps(text).encode(), *_in_base64(text[8:40].encode())):
            assert spelled not in heard
    server.says("until you press Ctrl-C")
    assert secrets
    run_folder = b"".join(path.read_bytes() for path in fed.run.rglob("*") if path.is_file())
    logs = b"".join(path.read_bytes() for path in (fed.home.folder / "logs").iterdir())
    tickets = set(re.findall(rb"Bearer ([\w-]{20,})", heard))
    assert tickets
    for secret in secrets | tickets:
        assert secret not in run_folder + logs + exposed + server.output.encode()
    for path in (
        *fed.home.folder.glob("*.key"),
        *fed.home.folder.glob("*.secret"),
        *fed.home.folder.glob("superlink.db*"),
        tmp_path / "ward" / "key.pem",
    ):
        assert path.stat().st_mode & 0o077 == 0, path

    other = write_rows(tmp_path / "other.jsonl", sentences("medicine", 40, seed=1))
    late = fed.join("clinic", "--data", other, "--type", zoo["mini-gpt2"], "--json").ends(0)
    assert json.loads(late.splitlines()[-1])["state"] == "late"
    again = fed.join("clinic", "--data", other, "--type", zoo["mini-gpt2"], "--json").ends(0)
    assert json.loads(again.splitlines()[-1]) == json.loads(
        late.splitlines()[-1]
    )  # the receipt, not a second upload
    server.process.send_signal(signal.SIGINT)
    server.ends(0)
    assert (fed.run / "late" / "clinic" / "card.json").is_file()
    assert not list((fed.run / "uploads").glob("clinic"))
    assert _nothing_left(fed)

    fuse = Process("fuse", fed.run, write_config(tmp_path / "next.yaml", {
        "experts": 2, "jobs": 1, "precision": "fp32", "data": {"public": ["sampled"], "sampled_documents": 4,
        "max_chars": 96},
        "distill": {"base": str(zoo["qwen3_moe"]), "steps": 4, "batch_size": 4}, "tune": {"steps": 2, "batch_size": 4},
    }), "--out", tmp_path / "next")  # fmt: skip
    fuse.ends(0)
    assert {entry["device"] for entry in json.loads((tmp_path / "next" / "registry.json").read_text())} == {
        "ward",
        "clinic",
    }


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Three machines on a switch, each with an address of its own: server 10.77.0.1, clinic 10.77.0.2, bank 10.77.0.3.

    The clinic's link carries 5 Mbit/s each way and loses 2 % of all packets.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "nft"))):
        pytest.skip("needs root, iproute2 and nftables")
    names = {name: f"df-{name}" for name in ("switch", "server", "clinic", "bank")}
    for host in names.values():
        subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)
        shell(f"ip netns add {host} && ip -n {host} link set lo up")
    shell("ip -n df-switch link add hub type bridge && ip -n df-switch link set hub up")
    for number, name in enumerate(("server", "clinic", "bank"), start=1):
        shell(f"ip -n df-{name} link add eth0 type veth peer name {name} netns df-switch")
        shell(f"ip -n df-switch link set {name} master hub up && ip -n df-{name} link set eth0 up")
        shell(f"ip -n df-{name} addr add 10.77.0.{number}/24 dev eth0")
    slow = "root tbf rate 5mbit burst 16kb latency 200ms"
    shell(f"tc -n df-clinic qdisc add dev eth0 {slow} && tc -n df-switch qdisc add dev clinic {slow}")
    shell(
        "ip netns exec df-clinic nft 'add table inet loss; add chain inet loss in { type filter hook "
        "input priority 0; };"
        " add chain inet loss out { type filter hook output priority 0; };"
        " add rule inet loss in numgen random mod 100 < 2 counter drop;"
        " add rule inet loss out numgen random mod 100 < 2 counter drop'"
    )
    yield names
    for host in names.values():
        subprocess.run(["ip", "netns", "delete", host], check=True)


def test_machines_of_their_own_and_a_slow_link_that_loses_packets_and_breaks(federation, hosts, tmp_path):
    """Uploads that were made before, one over 5 Mbit/s with losses, cut off for 20 seconds in the middle."""
    fed = federation(host="10.77.0.1", hosts=hosts, experts=2, federation={"wait_for": 2})
    for name, kind in (("clinic", "tiny-gpt2"), ("bank", "tiny-llama")):
        fed.enroll(name)
        data = write_rows(tmp_path / f"{name}.jsonl", sentences("medicine", 40))
        quick = ("--set", "device.steps=1", "--set", "data.max_chars=96", "--set", "precision=fp32")
        Process(
            "device", "train", "--data", data, "--out", tmp_path / "uploads" / name, "--type", kind, *quick
        ).ends(0)
    server = fed.serve()
    clinic = fed.join("clinic", "--upload", tmp_path / "uploads" / "clinic")
    parts = fed.run / "federation" / "incoming" / "clinic"
    wait(
        lambda: any(path.stat().st_size > 200_000 for path in parts.rglob("*") if path.is_file()),
        "the first bytes of clinic",
    )
    shell("ip -n df-switch link set clinic down")
    fed.join("bank", "--upload", tmp_path / "uploads" / "bank").ends(0)
    time.sleep(20)
    assert clinic.process.poll() is None
    shell("ip -n df-switch link set clinic up")
    clinic.ends(0)
    server.ends(0)
    accepted = {line["device"]: line["peer"] for line in fed.audit() if line["event"] == "accepted"}
    assert accepted == {"clinic": "10.77.0.2", "bank": "10.77.0.3"}
    assert {entry["device"] for entry in json.loads((fed.run / "registry.json").read_text())} == {
        "clinic",
        "bank",
    }
    lost = shell("ip netns exec df-clinic nft list table inet loss")
    assert all(int(packets) > 0 for packets in re.findall(r"packets (\d+)", lost))


def shell(line: str) -> str:
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def _secrets(fed: Federation) -> set[bytes]:
    keys = [
        path.read_bytes().splitlines()[1]
        for path in (*fed.home.folder.glob("*.key"), *fed.folder.glob("*/key.pem"))
    ]
    return {*keys, fed.home.superexec_secret.read_bytes()}


def _command_lines(*processes: int) -> bytes:
    family = [
        child
        for pid in processes
        for child in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    return "\n".join(part for process in family for part in process.cmdline()).encode()


def _in_base64(content: bytes) -> list[bytes]:
    """How a piece of text looks within base64, at each of the three possible offsets, without the unstable ends."""
    return [base64.b64encode(b"\0" * offset + content)[4:-4] for offset in range(3)]


def _nothing_left(fed: Federation) -> bool:
    return not any(
        str(fed.home.folder) in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])
    )
