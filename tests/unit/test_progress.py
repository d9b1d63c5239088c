"""Lines for the person who waits: printed by the command line, and records of a logger for everybody else."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deepfusion import jobs, progress
from deepfusion.errors import InputError


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A program of its own, as of a user of the library."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done


SAY = "from deepfusion import progress; progress.say('a 100 % line'); progress.warn('a warning')"


def test_a_library_is_silent_but_for_warnings() -> None:
    assert python(SAY).stderr == "a warning\n"


def test_whoever_asks_sees_each_line_once() -> None:
    code = (
        "import logging; logging.basicConfig(format='%(levelname)s %(name)s %(message)s');"
        f"logging.getLogger('deepfusion').setLevel('INFO'); {SAY}"
    )
    assert python(code).stderr == "INFO deepfusion a 100 % line\nWARNING deepfusion a warning\n"


def test_the_command_line_prints_each_line_once_as_it_is() -> None:
    code = (
        "import logging; logging.basicConfig(level='INFO'); from deepfusion.cli import terminal;"
        f"terminal.prepare(); terminal.prepare(); {SAY}"
    )
    assert python(code).stderr == "a 100 % line\na warning\n"


def test_the_log_of_a_run_is_written_whoever_listens(tmp_path: Path) -> None:
    python(
        f"from pathlib import Path; from deepfusion import progress; progress.attach(Path('.')); {SAY}",
        cwd=tmp_path,
    )
    lines = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["a 100 % line", "a warning"]


def test_lines_can_be_kept_from_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.unheard():
        progress.say("unheard")
    progress.say("heard")
    assert capsys.readouterr().err == "heard\n"


def speak(number: int) -> int:
    for line in range(20):
        progress.say(f"line {line} of job {number}: {'x' * 99 * number}")
    return number


def shout(number: int) -> None:
    progress.say(f"{number} " + "é" * 10_000)


def test_lines_of_workers_are_here_before_their_results(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert jobs.run_jobs(speak, [{"number": i} for i in range(4)], 2) == [0, 1, 2, 3]
        told = capsys.readouterr().err.splitlines()
        jobs.run_jobs(shout, [{"number": i} for i in range(2)], 2)
        long = sorted(capsys.readouterr().err.splitlines())
    finally:
        jobs.close_pool()
    for number in range(4):
        own = [line for line in told if f"of job {number}:" in line]
        assert own == [f"line {line} of job {number}: {'x' * 99 * number}" for line in range(20)]
    assert len(told) == 80
    assert [line[:3] for line in long] == ["0 é", "1 é"]
    assert {len(line.encode()) for line in long} == {progress.MOST_BYTES}  # cut


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING], ids=logging.getLevelName)
def test_workers_tell_the_program_that_started_them(level: int, tmp_path: Path) -> None:
    """Through its own logging, once, and nothing to stderr besides."""
    (tmp_path / "program.py").write_text(
        "import logging, sys\n"
        "from deepfusion import jobs, progress\n"
        "def tell(number):\n"
        "    progress.say(f'said {number}')\n"
        "    progress.warn(f'warned {number}')\n"
        "if __name__ == '__main__':\n"
        "    logging.basicConfig(stream=sys.stdout, format='%(levelname)s %(message)s')\n"
        f"    logging.getLogger('deepfusion').setLevel({level})\n"
        "    jobs.run_jobs(tell, [{'number': 1}, {'number': 2}], 2)\n"
    )
    line = [sys.executable, "program.py"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = ["INFO said 1", "INFO said 2"] if level == logging.INFO else []
    assert sorted(done.stdout.splitlines()) == [*said, "WARNING warned 1", "WARNING warned 2"]
    assert done.stderr == ""


def die(number: int) -> int:
    if number == 3:
        progress.say("goes")
        raise InputError("gone", code="bad-job")
    return number


def test_a_pool_that_ended_leaves_no_thread_and_the_next_one_speaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = threading.active_count()
    try:
        with pytest.raises(InputError, match="gone"):
            jobs.run_jobs(die, [{"number": i} for i in range(4)], 2)
        assert jobs.run_jobs(speak, [{"number": 0}, {"number": 1}], 2) == [0, 1]
    finally:
        jobs.close_pool()
    assert "line 19 of job 1" in capsys.readouterr().err
    for thread in threading.enumerate():  # those of the executor itself end by themselves
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(30)
    assert threading.active_count() <= before
