"""Uploads over TLS on loopback: speed and memory of a large one, then many through a network that fails.

`python benchmarks/transfer.py --uploads 20 > benchmarks/transfer.md`

Gateway and devices are processes of their own, as in a real federation. The network between them is a TCP proxy
that resets all connections at random moments; besides, in the middle of each upload the gateway is killed and
started again, and later the proxy lets nothing through for a minute. An upload counts as arrived when the receipt is
there and the SHA-256 of every file is that of the offer."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
from gateways import Device, Faults, Gateway

from deepfusion.digests import sha256_file
from deepfusion.federation.offer import read_offer
from deepfusion.uploads.card import read_card, write_card

WEIGHTS = "model.safetensors"


class Peaks:
    """Peak resident memory of processes, looked at every 50 ms."""

    def __init__(self, **processes: subprocess.Popen) -> None:
        self.bytes = dict.fromkeys(processes, 0)
        self._processes = {name: psutil.Process(process.pid) for name, process in processes.items()}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            for name, process in self._processes.items():
                try:
                    self.bytes[name] = max(self.bytes[name], process.memory_info().rss)
                except psutil.Error:
                    continue  # it has ended


@dataclass
class Outcome:
    """One upload through the failing network."""

    seconds: float
    resets: int
    sent_bytes: int
    accepted: bool
    right: bool


def main() -> None:
    """Run both parts and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uploads", type=int, default=20, help="through the failing network")
    parser.add_argument("--megabytes", type=int, default=200, help="of each of them")
    parser.add_argument("--outage-seconds", type=float, default=60, help="in each of them")
    parser.add_argument("--large-megabytes", type=int, default=2200, help="of the one without failures")
    given = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        gateway = Gateway(Path(folder)).start()
        try:
            report_large(gateway, given.large_megabytes * 10**6)
            outcomes = [
                faulty(gateway, f"d{i:02d}", given.megabytes * 10**6, given.outage_seconds)
                for i in range(given.uploads)
            ]
            report_faults(outcomes, given.outage_seconds)
        finally:
            gateway.end()


def report_large(gateway: Gateway, size: int) -> None:
    """One large upload without failures."""
    device = prepare(gateway, "large", size)
    assert gateway.process is not None
    begin = time.perf_counter()
    process = device.process()
    with Peaks(gateway=gateway.process, device=process) as peaks:
        out, errors = process.communicate()
    seconds = time.perf_counter() - begin
    assert process.returncode == 0, errors
    right = arrived_right(device)
    row = gateway.ledger.devices()["large"]
    memory = psutil.virtual_memory().total / 2**30
    print("# Transfer: speed, memory, and a network that fails\n")
    print(
        f"{os.cpu_count()} cores, {memory:.0f} GiB; gateway, device and proxy share them. TLS on loopback.\n"
    )
    print("## One large upload\n\n| | |\n|---|---|")
    print(f"| bytes | {device.offer.size:,} |")
    print(f"| seconds, from the start of the device's process to its end with the receipt | {seconds:.1f} |")
    print(f"| MB/s, SHA-256 on the server included | {device.offer.size / seconds / 1e6:.0f} |")
    print(f"| peak memory of the gateway | {peaks.bytes['gateway'] / 2**20:.0f} MiB |")
    print(f"| peak memory of the device | {peaks.bytes['device'] / 2**20:.0f} MiB |")
    print(f"| bytes at the wire beyond the files | {row.up - device.offer.size:,} up, {row.down:,} down |")
    print(
        "| every SHA-256 right | "
        f"{'yes' if right and json.loads(out)['receipt']['digest'] == device.offer.digest else 'NO'} |\n"
    )
    clear(device)


def faulty(gateway: Gateway, name: str, size: int, outage_seconds: float) -> Outcome:
    """One upload through resets every 0.2 to 1 s; the gateway is killed in its first half, nothing gets through in
    its second.
    """
    device = prepare(gateway, name, size)
    begin = time.perf_counter()
    with Faults(gateway.port, resets=(0.2, 1.0)) as faults:
        process = device.process(faults.port)
        wait_for(device, random.uniform(0.1, 0.4) * size)
        gateway.end(signal.SIGKILL)
        time.sleep(2)
        gateway.start()
        wait_for(device, random.uniform(0.5, 0.8) * size)
        faults.swallow(True)
        time.sleep(outage_seconds)
        faults.swallow(False)
        _, errors = process.communicate()
    seconds = time.perf_counter() - begin
    accepted = process.returncode == 0
    if not accepted:
        print(errors, file=sys.stderr)
    right = accepted and arrived_right(device)
    clear(device)
    print(f"{name}: {seconds:.1f} s, {'right' if right else 'NOT RIGHT'}", file=sys.stderr)
    return Outcome(seconds, faults.count, faults.passed, accepted, right)


def wait_for(device: Device, size: float) -> None:
    """Until so many bytes of the weights are here."""
    part = device.incoming / WEIGHTS
    while not part.exists() or part.stat().st_size < size:
        time.sleep(0.01)


def report_faults(outcomes: list[Outcome], outage_seconds: float) -> None:
    """The table of the failing network."""
    right = sum(outcome.right for outcome in outcomes)
    wrong = sum(outcome.accepted and not outcome.right for outcome in outcomes)
    times, sent = (
        [outcome.seconds for outcome in outcomes],
        [outcome.sent_bytes / 1e6 for outcome in outcomes],
    )
    print("## A network that fails\n")
    print(
        "In each upload all connections are reset every 0.2 to 1 s, the gateway is killed (SIGKILL) "
        "and started again after 2 s,"
    )
    print(f"and nothing gets through for {outage_seconds:.0f} s.\n")
    print(
        f"**{right} of {len(outcomes)} uploads arrived with every SHA-256 right; {wrong} accepted that were not.**\n"
    )
    print("| | median | largest |\n|---|---|---|")
    print(f"| seconds | {median(times):.1f} | {max(times):.1f} |")
    print(
        f"| connections reset | {median(o.resets for o in outcomes):.0f} | {max(o.resets for o in outcomes)} |"
    )
    print(f"| MB through the proxy | {median(sent):.0f} | {max(sent):.0f} |")
    print("\nMade by `python benchmarks/transfer.py --uploads 20 > benchmarks/transfer.md`.")


def prepare(gateway: Gateway, name: str, size: int) -> Device:
    """A device whose weights are so many random bytes."""
    device = gateway.device(name, {WEIGHTS: 1})
    with open(device.folder / WEIGHTS, "wb") as file:
        for begin in range(0, size, 2**20):
            file.write(os.urandom(min(2**20, size - begin)))
    write_card(device.folder, read_card(device.folder))
    device.offer = read_offer(device.folder)
    device.ticket = gateway.ledger.issue(device.offer)
    return device


def arrived_right(device: Device) -> bool:
    """Whether what the gateway accepted is what was offered."""
    offered = {file.name: file.sha256 for file in device.offer.files}
    return {path.name: sha256_file(path) for path in device.received.iterdir()} == offered


def clear(device: Device) -> None:
    """Give the disk back."""
    shutil.rmtree(device.folder)
    shutil.rmtree(device.received, ignore_errors=True)
    shutil.rmtree(device.incoming, ignore_errors=True)


if __name__ == "__main__":
    main()
