"""What the federation layer itself costs: `python benchmarks/federation.py > benchmarks/federation.md`

First 128 simulated devices in one process, with uploads that are ready, so that nothing is trained. Then a real
server with its processes over TLS on loopback, and 8 real devices one after the other, each handing in such an
upload.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from deepfusion.config import load_config
from deepfusion.federation import identity
from deepfusion.federation.server.home import Home
from deepfusion.records import Card
from deepfusion.sections import DeviceSpec
from deepfusion.uploads.card import write_card

SIMULATED, REAL = 128, 8
UPLOAD_BYTES = 2**20


def main() -> None:
    """Measure and print the report."""
    with tempfile.TemporaryDirectory() as folder:
        simulated = _child("embedded", Path(folder))
        real = _real(Path(folder))
    print("# The federation layer alone\n")
    print(f"`python benchmarks/federation.py`; {os.cpu_count()} cores, Python {platform.python_version()}.")
    print(f"Nothing is trained, uploads of {UPLOAD_BYTES / 2**20:.0f} MiB are ready.\n")
    print("| 128 simulated devices, embedded | |\n|---|---|")
    print(f"| seconds, all of it | {simulated['seconds']:.2f} |")
    print(f"| messages, both ways | {simulated['messages']} |")
    print(f"| memory after the imports (with the model framework) | {simulated['before'] / 2**20:.0f} MiB |")
    print(f"| peak memory | {simulated['peak'] / 2**20:.0f} MiB |\n")
    print(f"| a real server, {REAL} devices over TLS | peak resident memory |\n|---|---|")
    for name, peak in real["peaks"].items():
        print(f"| {name} | {peak / 2**20:.0f} MiB |")
    print(
        f"\nA device took {min(real['seconds']):.1f} to {max(real['seconds']):.1f} s from the start "
        "of its process to its receipt."
    )
    print(f"Bytes at the wire are {real['overhead']:.2f} % more than the uploads weigh.")
    print(f"Messages of the control plane took {real['control']:,} bytes a device.")


def upload(folder: Path, device: str, seed: int) -> Path:
    """A folder that looks like an upload, as far as moving it goes."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(seed.to_bytes(8, "little") * (UPLOAD_BYTES // 8))
    (folder / "config.json").write_text("{}")
    card = Card(
        device=device, type="tiny-gpt2", model_class="GPT2LMHeadModel", signature="5" * 64, base="tiny-gpt2",
        base_digest="b" * 64,
        method="full", embedding=[0.6, 0.8], encoder="hashing", tokens=100, documents=10, loss_before=5.0,
        loss_after=4.0, steps=3,
        seed=0, deepfusion_version="0",
    )  # fmt: skip
    write_card(folder, card)
    return folder


def embedded(folder: Path) -> dict[str, float]:
    """128 simulated devices; runs in a process of its own."""
    from deepfusion.federation.flower.embedded import SimulatedDevice, collect
    from deepfusion.federation.server.ledger import Ledger
    from deepfusion.stages import device as stage

    config = load_config(overrides=["jobs=1"])
    run = folder / "embedded"
    devices = []
    for number in range(SIMULATED):
        name = f"device-{number:03d}"
        spec = DeviceSpec(id=name, type="tiny-gpt2", method=None, data=None, memory=None)
        devices.append(
            SimulatedDevice(run, upload(run / "uploads" / name, name, number), config, spec, [], [])
        )
    assert stage.train_device
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    collect(config, devices, run)
    seconds = time.perf_counter() - began
    done = sum(row.state == "done" for row in Ledger(run).devices().values())
    assert done == SIMULATED
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "messages": 4 * SIMULATED, "before": before, "peak": peak}


def _child(name: str, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, name, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _real(folder: Path) -> dict:
    home, run, port = Home(folder / "server"), folder / "run", 19443
    names = [f"device-{number}" for number in range(REAL)]
    for number, name in enumerate(names):
        upload(folder / "uploads" / name, name, number)
        home.enroll(name, identity.public_line(identity.device_key(folder / name / "key.pem").public_key()))
    # One upload more than come is waited for: the pipeline is not what is measured.
    server = subprocess.Popen(
        [sys.executable, "-m", "deepfusion.cli", "server", "start", "--out", str(run), "--home", str(home.folder),
         "--host", "127.0.0.1", "--port", str(port), "--public", "127.0.0.1", "--set",
         f"federation.wait_for={REAL + 1}"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stderr is not None
    line = next(line for line in server.stderr if "--ca-sha256" in line)
    threading.Thread(target=server.stderr.read, daemon=True).start()
    digest = re.search(r"--ca-sha256 (\w+)", line)
    assert digest is not None
    peaks: dict[str, int] = {}
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(os.getpid(), peaks, over))
    watch.start()
    seconds = []
    for name in names:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "deepfusion.cli", "device", "join", "--server", f"127.0.0.1:{port}",
            "--ca-sha256", digest[1],
             "--home", str(folder / name), "--upload", str(folder / "uploads" / name)],
            check=True, capture_output=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    from deepfusion.federation.server.ledger import Ledger

    rows = Ledger(run).devices().values()
    over.set()
    watch.join()
    server.terminate()
    server.wait()
    return {
        "peaks": peaks, "seconds": seconds, "overhead": 100 * (sum(r.up for r in rows) / sum(r.size for r in rows) - 1),
        "control": round(sum(r.control_up + r.control_down for r in rows) / len(rows)),
    }  # fmt: skip


def _watch(pid: int, peaks: dict[str, int], over: threading.Event) -> None:
    names = {
        "flower-superlink": "SuperLink",
        "federation.gateway": "gateway",
        "federation.coordinator": "coordinator",
        "server start": "deepfusion server start, while it waits",
        "device join": "deepfusion device join --upload",
    }
    while not over.wait(0.05):
        for process in psutil.Process(pid).children(recursive=True):
            try:
                line, resident = " ".join(process.cmdline()), process.memory_info().rss
            except psutil.Error:
                continue  # it has ended
            name = next((known for part, known in names.items() if part in line), None)
            if name is not None:
                peaks[name] = max(peaks.get(name, 0), resident)


if __name__ == "__main__":
    if sys.argv[1:2] == ["embedded"]:
        print(json.dumps(embedded(Path(sys.argv[2]))))
    else:
        main()
