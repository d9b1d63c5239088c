"""The federation's apps in one process: what they make is what the local pipeline makes."""

from __future__ import annotations

import json

import pytest

from conftest import digests, overlay, run_settings, small_settings, write_config
from deepfusion.errors import InputError
from deepfusion.federation.flower import embedded


def test_the_uploads_and_the_model_are_those_of_the_local_pipeline(zoo, tmp_path):
    settings = small_settings(zoo, tmp_path)
    run_settings(settings, tmp_path / "local")
    run_settings(settings, tmp_path / "embedded", instead=[embedded.source()])
    assert digests(tmp_path / "local", "uploads", "proxies", "bases", "moe") == digests(
        tmp_path / "embedded", "uploads", "proxies", "bases", "moe"
    )
    assert json.loads((tmp_path / "embedded" / "transport.json").read_text()) == json.loads(
        (tmp_path / "local" / "transport.json").read_text()
    )


def test_the_number_of_workers_changes_nothing(zoo, tmp_path):
    settings = small_settings(zoo, tmp_path)
    run_settings(settings, tmp_path / "one", instead=[embedded.source()], last="device")
    run_settings(overlay(settings, jobs=2), tmp_path / "two", instead=[embedded.source()], last="device")
    assert digests(tmp_path / "one", "uploads") == digests(tmp_path / "two", "uploads")


def test_a_device_that_cannot_train_stops_the_simulation(zoo, tmp_path):
    settings = small_settings(zoo, tmp_path)
    settings["devices"][1]["memory"] = "1MB"
    with pytest.raises(InputError, match="clinic") as error:
        run_settings(settings, tmp_path / "run", instead=[embedded.source()])
    assert error.value.code == "too-little-memory"


def test_the_command(zoo, tmp_path, invoke):
    config = write_config(tmp_path / "config.yaml", small_settings(zoo, tmp_path))
    done = invoke("server", "start", config, "--out", tmp_path / "run", "--embedded", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["evaluation"]["moe"]["log_perplexity"] > 0
