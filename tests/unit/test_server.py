"""Starting a server with what cannot work; taking uploads over; what the operator sees."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path

import pytest
from gateways import free_port
from test_offer import make_upload

from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.federation.offer import read_offer
from deepfusion.federation.server.home import Home
from deepfusion.federation.server.ledger import Ledger
from deepfusion.federation.server.start import collect, device_states, start
from deepfusion.federation.server.view import View
from deepfusion.schema import Config

WAIT = load_config(overrides=["federation.wait_for=2", "experts=2"])


def refusal(config: Config, out: Path, home: Path, port: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        start(config, out, Home(home), host="127.0.0.1", port=port or free_port())
    return error.value.code


def test_something_must_say_when_it_is_enough(tmp_path):
    assert refusal(load_config(), tmp_path / "run", tmp_path / "home") == "no-end"


def test_an_expert_for_each_upload_at_most(tmp_path):
    config = load_config(overrides=["federation.wait_for=2", "experts=3"])
    assert refusal(config, tmp_path / "run", tmp_path / "home") == "fewer-devices-than-experts"


def test_a_base_too_small_for_the_suggested_types_is_said_before_any_device_trains(tmp_path):
    config = load_config(
        overrides=["federation.wait_for=2", "experts=2", "device.types=[tinyllama]", "devices=null"]
    )
    assert config.distill.base is None
    assert refusal(config, tmp_path / "run", tmp_path / "home") == "base-too-small"
    assert not (tmp_path / "run").exists()


def test_the_port_must_be_free(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert refusal(WAIT, tmp_path / "run", tmp_path / "home", other.getsockname()[1]) == "port-busy"


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("text")
    assert refusal(WAIT, tmp_path, tmp_path / "home") == "not-a-run"


def test_one_server_a_home(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare(["localhost"])
    with open(home.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refusal(WAIT, tmp_path / "run", home.folder) == "home-busy"


def test_devices_that_were_asked_to_train_by_other_settings_are_not_mixed(tmp_path):
    ledger = Ledger(tmp_path / "run")
    ledger.remember("task", "steps: 1")
    ledger.set_state("clinic", "training")
    assert refusal(WAIT, tmp_path / "run", tmp_path / "home") == "another-run"


def handed_in(run: Path, name: str) -> Ledger:
    ledger = Ledger(run)
    folder = make_upload(run / "federation" / "received" / name)
    offer = read_offer(folder)
    ledger.issue(offer)
    ledger.count(name, up=offer.size + 100, down=50, control_up=7, control_down=8)
    ledger.finish(name, {"device": name, "digest": offer.digest, "size": offer.size})
    return ledger


def test_uploads_are_taken_over_also_if_that_was_cut_short(tmp_path):
    for name in ("clinic", "bank"):
        ledger = handed_in(tmp_path, name)
    ledger.close()
    handed_in(tmp_path, "late")
    out = tmp_path / "out"
    (out / "uploads").mkdir(parents=True)
    os.rename(tmp_path / "federation" / "received" / "bank", out / "uploads" / "bank")
    assert collect(WAIT, {"run": tmp_path}, out) == {"devices": 2}
    assert sorted(path.name for path in (out / "uploads").iterdir()) == ["bank", "clinic"]
    weight = sum(path.stat().st_size for path in (out / "uploads" / "clinic").iterdir())
    moved = json.loads((out / "transport.json").read_text())
    assert moved["devices"]["clinic"] == {
        "up_bytes": weight + 100, "down_bytes": 50, "upload_bytes": weight, "control_up_bytes": 7,
        "control_down_bytes": 8,
    }  # fmt: skip
    assert moved["total_up_bytes"] == sum(device["up_bytes"] for device in moved["devices"].values())
    assert {row["device"]: row["state"] for row in device_states(tmp_path)} == {
        "bank": "done",
        "clinic": "done",
        "late": "late",
    }


def test_changes_are_told_once(tmp_path, capsys):
    ledger, home = Ledger(tmp_path / "run"), Home(tmp_path / "home")
    steps = iter([
        lambda: ledger.set_state("clinic", "training"),
        lambda: None,
        lambda: ledger.set_state("clinic", "rejected", "clinic: too large [too-large]"),
    ])  # fmt: skip

    def until() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step is None

    with View(ledger, home, pause=0.01) as view:
        view.wait(until)
    assert capsys.readouterr().err.splitlines() == [
        "[clinic] training",
        "[clinic] rejected: clinic: too large [too-large]",
    ]
