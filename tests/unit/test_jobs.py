"""Jobs side by side: order, errors and what happens to workers when their run dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

from deepfusion import jobs
from deepfusion.errors import InputError


def describe(number: int) -> dict[str, Any]:
    return {"number": number, "process": os.getpid(), "threads": torch.get_num_threads()}


def fail(number: int) -> int:
    if number == 1:
        raise InputError(
            "no good", where=f"job {number}", allowed="any other", fix="take another", code="bad-job"
        )
    return number


def test_one_worker_is_this_process_on_one_thread():
    torch.set_num_threads(2)
    try:
        found = jobs.run_jobs(describe, [{"number": i} for i in range(3)], 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found == [{"number": i, "process": os.getpid(), "threads": 1} for i in range(3)]


def test_workers_keep_the_order_and_pass_errors_on():
    try:
        found = jobs.run_jobs(describe, [{"number": i} for i in range(4)], 2)
        assert [row["number"] for row in found] == [0, 1, 2, 3]
        assert os.getpid() not in {row["process"] for row in found}
        assert {row["threads"] for row in found} == {1}
        with pytest.raises(
            InputError, match=r"job 1: no good; allowed: any other; fix: take another \[bad-job\]"
        ):
            jobs.run_jobs(fail, [{"number": i} for i in range(3)], 2)
        again = jobs.run_jobs(describe, [{"number": i} for i in range(2)], 2)  # a new pool after an error
        workers = [psutil.Process(row["process"]) for row in again]
    finally:
        jobs.close_pool()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL if number == 1 else 0)
    return number


def test_a_worker_that_the_system_ends_is_said_in_one_line():
    with pytest.raises(InputError, match=r"^jobs: a worker process has died.*worker-died"):
        jobs.run_jobs(die, [{"number": i} for i in range(4)], 2)
    assert jobs.run_jobs(describe, [{"number": i} for i in range(2)], 2)[1]["number"] == 1


def test_a_program_without_a_guard_is_told_so(tmp_path):
    """Its workers read it again and would start runs of their own."""
    program = tmp_path / "program.py"
    program.write_text(
        "from deepfusion import fuse, jobs, InputError\n"
        "import deepfusion.api, deepfusion.pipeline\n"
        "deepfusion.pipeline.run = lambda *_, **__: jobs.run_jobs(divmod, [{}, {}], 2)\n"
        "try:\n    fuse('models', 'run')\n"
        "except InputError as error:\n    print(error)\n"
    )
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120
    )
    assert "worker-died" in done.stdout, done.stderr
    assert 'if __name__ == "__main__":' in done.stdout
    assert "Traceback" not in done.stderr


def test_a_single_job_stays_in_this_process():
    assert jobs.run_jobs(describe, [{"number": 5}], 2)[0]["process"] == os.getpid()


def test_errors_without_workers():
    with pytest.raises(InputError, match="job 1"):
        jobs.run_jobs(fail, [{"number": 1}], 1)
    assert jobs.run_jobs(fail, [], 2) == []


@pytest.mark.slow
@pytest.mark.parametrize("ready", [True, False], ids=["at work", "still starting"])
def test_workers_end_with_a_killed_run(ready):
    """A worker that lives on would write into the folder that the next run continues."""
    code = (
        "import time\nfrom deepfusion import jobs\n"
        "if __name__ == '__main__':\n"
        "    pool = jobs._shared_pool(2)\n"
        "    futures = [pool.submit(time.sleep, 0.01 if i < 2 else 600) for i in range(6)]\n"
        f"    {'futures[0].result()' if ready else 'pass'}\n    print('go', flush=True)\n    time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "go\n"
    workers = [
        child for child in psutil.Process(run.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    assert workers
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    gone, alive = psutil.wait_procs(workers, timeout=90)
    for worker in alive:
        worker.kill()
    assert not alive
    assert len(gone) == len(workers)
