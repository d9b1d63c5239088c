"""The server of a federation: starts what it needs, shows who is how far, and runs the pipeline once enough uploads
are in.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from deepfusion import progress
from deepfusion.config import save_config
from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.flower.server_app import seconds, task_config
from deepfusion.federation.flower.superlink import SuperLink
from deepfusion.federation.server.home import Home
from deepfusion.federation.server.ledger import Ledger, Row
from deepfusion.federation.server.view import View
from deepfusion.folders import LOCK, claim_run, locked
from deepfusion.inputs import local_inputs
from deepfusion.records import Traffic, Transport
from deepfusion.schema import Config


def start(
    config: Config, out: Path, home: Home, *, host: str = "0.0.0.0", port: int = 9443, public: list[str] | None = None,
    certificate: Path | None = None, certificate_key: Path | None = None, stay: bool = False,
) -> None:  # fmt: skip
    """Serve a federation until its model is made; started again it goes on where it was.

    Args:
        out: the run folder; the same as of a local run at the end.
        public: names or addresses under which devices reach this machine; the first stands in the line for them.
        certificate, certificate_key: a certificate of a public authority; default: one of the home's own authority.
        stay: go on after the model is made, to keep what late devices hand in.

    Raises:
        InputError: the port is taken, the run folder belongs to other settings, too few uploads came, and all of
            `pipeline.run`.
    """
    out = claim_run(out, local_inputs(config))
    if certificate is not None and home.folder in certificate.resolve().parents:
        what = "the certificate must not lie in the server's home, which has one of its own"
        raise InputError(what, where=certificate, fix="move it elsewhere", code="input-in-out")
    names = public or [socket.gethostname()]
    if config.federation.wait_for is None and config.federation.deadline is None:
        fix = "--set federation.wait_for=8, or --set federation.deadline=12h, or both"
        raise InputError(
            "nothing says when enough devices are in", where="federation", fix=fix, code="no-end"
        )
    if (config.federation.wait_for or config.experts) < config.experts:
        what = f"federation.wait_for={config.federation.wait_for} uploads are fewer than experts={config.experts}"
        raise InputError(
            what,
            where="federation.wait_for",
            fix=f"--set experts={config.federation.wait_for}",
            code="fewer-devices-than-experts",
        )
    _check_base(config)
    _check_port(host, port)
    home.prepare([*names, *([host] if host not in ("0.0.0.0", "::") else [])])
    ledger = _open_run(config, out)
    progress.attach(out)
    line = f"deepfusion device join --server {names[0]}:{port}"
    if certificate is None:
        line += f" --ca-sha256 {identity.certificate_digest(home.ca.read_bytes())}"
    fix = "stop it, or use another --home"
    busy = InputError("another server works with this home", where=home.folder, fix=fix, code="home-busy")
    alone = locked(home.folder / LOCK, busy)
    with (
        alone,
        _services(home, out, host, port, certificate, certificate_key) as services,
        View(ledger, home) as view,
    ):
        view.wait(
            lambda: services.healthy() and _listens(host, port)
        )  # a device that follows the line at once finds it open
        progress.say(f"[server] on a device: {line} --data private.jsonl")
        if config.distill.base is None:
            progress.say(
                "[server] the base is the tiny one of the family: for real models name one, --set distill.base=NAME"
            )
        view.wait(lambda: services.healthy() and ledger.closed)
        _make_model(config, out, ledger)
        if stay:
            progress.say("[server] the model is made; late uploads are kept until you press Ctrl-C")
            with suppress(KeyboardInterrupt):
                view.wait(lambda: not services.healthy())
    _keep_late(out, ledger)


def _check_base(config: Config) -> None:
    """Refuses a base too small for types that the operator suggests; a process of its own loads the model framework
    for that.
    """
    if config.distill.base is None and "types" in config.device.model_fields_set:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            pool.submit(_compare_base, config).result()


def _compare_base(config: Config) -> None:
    from deepfusion.families import bases

    bases.with_base(config, bases.teachers_of_config(config))


def _make_model(config: Config, out: Path, ledger: Ledger) -> None:
    from deepfusion import pipeline

    done = [row for row in ledger.devices().values() if row.state == "done"]
    if len(done) < config.experts:
        fix = "--set experts=N, or wait longer: --set federation.deadline=LATER"
        what = f"{len(done)} uploads came, fewer than experts={config.experts}"
        raise InputError(what, where=out, fix=fix, code="too-few-uploads")
    progress.say(f"[server] {len(done)} uploads are in, the run begins; whoever comes now is late")
    source = pipeline.Stage("device", collect, {}, pipeline.STAGES[0].outputs, ())
    pipeline.run(config, out, instead=[source])


def collect(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """The stage that takes what devices have handed in: writes `out`/uploads, and bytes at the wire to
    transport.json.
    """
    ledger = Ledger(inputs["run"])
    rows = [row for row in ledger.devices().values() if row.state == "done"]
    (out / "uploads").mkdir(exist_ok=True)
    for row in rows:
        received = inputs["run"] / "federation" / "received" / row.device
        if received.is_dir():  # else it was moved before this stage was killed
            os.replace(received, out / "uploads" / row.device)
    Transport.of({row.device: _moved(row) for row in rows}).write(out / "transport.json")
    return {"devices": len(rows)}


def _moved(row: Row) -> Traffic:
    """Bytes at the wire: upload requests with what was sent again, and apart from them the messages of the control
    plane.
    """
    return Traffic(
        up_bytes=row.up, down_bytes=row.down, upload_bytes=row.size,
        control_up_bytes=row.control_up, control_down_bytes=row.control_down,
    )  # fmt: skip


def device_states(run: Path) -> list[dict[str, Any]]:
    """What `deepfusion status --json` tells of the devices of a federated run; empty for a local one."""
    if not (run / "federation" / "ledger.sqlite").is_file():
        return []
    return [
        {
            "device": row.device,
            "state": row.state,
            "detail": row.detail,
            "received_bytes": row.received,
            "upload_bytes": row.size,
        }
        for row in Ledger(run).devices().values()
    ]


def _open_run(config: Config, out: Path) -> Ledger:
    """The ledger of a run folder, new or of this very federation."""
    if (out / "manifest.json").is_file() and not (out / "federation").is_dir():
        raise InputError(
            "a run without a federation", where=out, fix="choose another --out", code="not-a-run"
        )
    ledger = Ledger(out)
    if not ledger.devices():
        ledger.forget("task")
    ledger.remember("task", task_config(config))
    if ledger.recall("task") != task_config(config):
        what = "the run folder belongs to other settings: its devices were asked to train by them"
        raise InputError(what, where=out, fix="choose another --out", code="another-run")
    if ledger.closed and not (out / "uploads").is_dir() and not (out / ".work").is_dir():
        _reopen(config, ledger)
    save_config(config, out / "config.yaml")
    return ledger


def _reopen(config: Config, ledger: Ledger) -> None:
    """The deadline had passed with too few uploads: a later one, or a smaller number of experts, lets the run go on."""
    began = float(ledger.recall("began") or 0)
    done = sum(row.state == "done" for row in ledger.devices().values())
    if (
        done < config.experts
        and config.federation.deadline
        and time.time() < began + seconds(config.federation.deadline)
    ):
        ledger.forget("closed")


def _keep_late(out: Path, ledger: Ledger) -> None:
    for row in ledger.devices().values():
        received = out / "federation" / "received" / row.device
        if row.state == "late" and received.is_dir():
            (out / "late").mkdir(exist_ok=True)
            shutil.move(received, out / "late" / row.device)
            progress.say(
                f"[{row.device}] came late: kept in {out / 'late' / row.device} for the next deepfusion fuse {out}"
            )


class _Services:
    """The processes of the server, started again whenever one ends."""

    def __init__(self, commands: dict[str, list[str]], environment: dict[str, str], logs: Path) -> None:
        self.commands, self.environment, self.logs = commands, environment, logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failures: dict[str, list[float]] = {name: [] for name in commands}
        self._ending = threading.Event()
        self._watch = threading.Thread(target=self._keep_running, daemon=True)
        self._broken: str | None = None

    def __enter__(self) -> _Services:
        self.logs.mkdir(exist_ok=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._watch.join()
        for process in reversed(self.running.values()):
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def healthy(self) -> bool:
        """True.

        Raises:
            InputError: a process cannot be kept running.
        """
        if self._broken is not None:
            log = self.logs / f"{self._broken}.log"
            raise InputError(
                f"the {self._broken} does not stay up",
                where=log,
                fix="the end of this file says why",
                code="service-down",
            )
        return True

    def _keep_running(self) -> None:
        # One thread starts them all and lives until the end, for a leash ends with the thread that holds it.
        while not self._ending.wait(0.5):
            for name, command in self.commands.items():
                process = self.running.get(name)
                if process is not None and process.poll() is None:
                    continue
                now = time.monotonic()
                if process is not None:
                    self.failures[name] = [*(t for t in self.failures[name] if now - t < 60), now]
                    progress.say(f"[server] the {name} ended with {process.returncode}; it is started again")
                    if len(self.failures[name]) > 5:
                        self._broken = name
                        return
                with open(self.logs / f"{name}.log", "ab") as log:
                    leashed = [sys.executable, "-m", "deepfusion.federation.server.leash", *command]
                    self.running[name] = subprocess.Popen(
                        leashed,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=self.environment,
                        umask=0o077,
                    )


@contextmanager
def _services(
    home: Home, out: Path, host: str, port: int, certificate: Path | None, key: Path | None
) -> Iterator[_Services]:
    link = SuperLink(home, f"127.0.0.1:{_free_port()}")
    common = ["--home", str(home.folder), "--run", str(out.resolve()), "--superlink", link.address]
    gateway = [
        sys.executable,
        "-m",
        "deepfusion.federation.server.gateway",
        *common,
        "--host",
        host,
        "--port",
        str(port),
    ]
    if certificate is not None:
        gateway += ["--certificate", str(certificate), "--certificate-key", str(key)]
    commands = {
        "superlink": link.command(),
        "gateway": gateway,
        "coordinator": [sys.executable, "-m", "deepfusion.federation.flower.coordinator", *common],
    }
    with _Services(commands, link.environment(), home.folder / "logs") as services:
        yield services


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = "choose another --port"
            raise InputError(
                f"cannot listen there ({error.strerror})", where=f"{host}:{port}", fix=fix, code="port-busy"
            ) from None


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
