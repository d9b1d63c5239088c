"""A run killed at any moment continues and ends with the weights of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, overlay, run_settings, small_settings, write_config
from deepfusion.errors import InputError
from deepfusion.manifest import Manifest

pytestmark = pytest.mark.slow

WEIGHTS = ("uploads", "proxies", "bases", "moe")

# A process with everything imported that makes a child for every line it reads: a killed run starts again at once.
NURSERY = """
import os, sys
import torch
torch.set_num_threads(1)
from deepfusion import pipeline
from deepfusion.config import load_config
print("ready", flush=True)
for line in sys.stdin:
    config, out = line.split()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            pipeline.run(load_config(config), pipeline.Path(out))
            status = 0
        finally:
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture
def values(zoo, tmp_path) -> dict[str, Any]:
    """All stages, trunk and samples, dropout, LoRA, and a checkpoint after every step or so."""
    settings = small_settings(zoo, tmp_path)
    lora = settings["devices"][0] | {"method": "lora"}
    return overlay(
        settings,
        devices=[lora, *settings["devices"][1:]],
        checkpoint_seconds=0.01,
        data={"public": ["in_domain", "sampled"]},
        device={"steps": 40},
        distill={"steps": 100, "trunk_share": 0.5, "alpha": 0.1},
        merge={"router": "prototype"},
        tune={"steps": 40, "teachers": True},
    )


def log_size(run: Path) -> int:
    return (run / "log.txt").stat().st_size if (run / "log.txt").is_file() else 0


def test_killed_at_random_moments(values, nursery, tmp_path):
    """The first attempts live for a hundredth to a seventh of an undisturbed run."""
    begin = time.monotonic()
    run_settings(values, tmp_path / "undisturbed")
    undisturbed = time.monotonic() - begin
    config, run = write_config(tmp_path / "config.yaml", values), tmp_path / "disturbed"
    generator, kills, code = random.Random(0), 0, None
    while code != 0:
        nursery.stdin.write(f"{config} {run}\n")
        nursery.stdin.flush()
        child = int(nursery.stdout.readline())
        if kills < 12:
            time.sleep(generator.uniform(0.01, 0.15) * undisturbed)
            with suppress(ProcessLookupError):  # it may just have finished
                os.kill(child, signal.SIGKILL)
        code = int(nursery.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills >= 6
    assert "continues at step" in (run / "log.txt").read_text("utf-8")
    assert digests(run, *WEIGHTS) == digests(tmp_path / "undisturbed", *WEIGHTS)
    assert not list((run / ".work").iterdir())
    assert {entry.status for entry in Manifest.read(run).stages.values()} == {"done"}


def test_command_line_with_workers_killed(values, tmp_path):
    """SIGKILL for the main process alone: its workers have to end by themselves, or they would write on."""
    run_settings(values, tmp_path / "undisturbed")
    config, run = write_config(tmp_path / "config.yaml", overlay(values, jobs=2)), tmp_path / "disturbed"
    command = [sys.executable, "-m", "deepfusion.cli", "run", str(config), "--out", str(run)]
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # as in this process: a lone training takes all threads there are
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=one_thread
    )
    assert process.stderr is not None
    for line in process.stderr:  # ends when the last worker has gone
        if line.startswith("[device bank"):
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "[device] done" not in (run / "log.txt").read_text("utf-8")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert digests(run, *WEIGHTS) == digests(tmp_path / "undisturbed", *WEIGHTS)


def test_two_runs_in_one_folder(values, nursery, tmp_path):
    config, run = write_config(tmp_path / "config.yaml", values), tmp_path / "run"
    nursery.stdin.write(f"{config} {run}\n")
    nursery.stdin.flush()
    child = int(nursery.stdout.readline())
    while log_size(run) == 0:
        time.sleep(0.05)
    with pytest.raises(InputError, match="run-busy"):
        run_settings(values, run)
    os.kill(child, signal.SIGKILL)
    assert int(nursery.stdout.readline()) == -signal.SIGKILL
