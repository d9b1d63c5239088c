"""What a device takes from a server, and what it does not."""

from __future__ import annotations

import pytest
import yaml

from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.federation.device.join import device_config, join
from deepfusion.federation.flower.messages import Task
from deepfusion.federation.flower.server_app import task_config


def task(**values: object) -> Task:
    return Task("clinic", yaml.safe_dump(values))


def test_the_settings_of_the_server_arrive():
    sent = load_config(overrides=["device.steps=7", "seed=3", "data.max_chars=99"])
    config = device_config(Task("clinic", task_config(sent)), type=None)
    assert (config.device, config.seed, config.data.max_chars) == (sent.device, 3, 99)


@pytest.mark.parametrize("name", ["/etc", "../other", "~/models", "."])
def test_the_server_cannot_make_a_device_send_a_model_that_lies_on_it(name):
    with pytest.raises(InputError) as error:
        device_config(task(device={"types": [name]}), type=None)
    assert error.value.code == "local-type"
    assert device_config(task(device={"types": [name]}), type="tiny-gpt2").device.types == [
        name
    ]  # its owner chose another


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "{",
        "federation: {sink: s3}",
        "data: {private: /etc/passwd}\nevaluate: {}",
        "device: {stpes: 3}",
    ],
)
def test_other_settings_are_refused(text):
    with pytest.raises(InputError):
        device_config(Task("clinic", text), type=None)


@pytest.mark.parametrize("server", ["localhost", "https://localhost:9443", "a b:1", "host:port", ":9443"])
def test_a_server_is_host_and_port(tmp_path, server):
    with pytest.raises(InputError) as error:
        join(server, tmp_path, folder=tmp_path / "upload")
    assert error.value.code == "no-server"


def test_nobody_there(tmp_path):
    with pytest.raises(InputError) as error:
        join("127.0.0.1:1", tmp_path, folder=tmp_path / "upload", ca_sha256="0" * 64)
    assert error.value.code == "no-server"


def test_no_data(tmp_path):
    with pytest.raises(InputError) as error:
        join("127.0.0.1:1", tmp_path, folder=tmp_path / "upload", data=tmp_path / "missing.jsonl")
    assert error.value.code == "no-data"
