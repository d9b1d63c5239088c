"""The command line, a file for each group of commands: parse, call, print. Exit codes: 0 done, 2 bad input, 1 a
defect.
"""

from __future__ import annotations

import os
import sys

# Nobody asked for telemetry or for a look at a hub while a run works from local folders.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # threads that spin while they wait halve the speed of a shared machine


def main() -> None:
    """Entry point; turns bad input into one line and exit code 2."""
    from deepfusion.cli import terminal
    from deepfusion.cli.app import app

    terminal.prepare()
    sys.exit(terminal.run(lambda: app(prog_name="deepfusion", standalone_mode=False)))
