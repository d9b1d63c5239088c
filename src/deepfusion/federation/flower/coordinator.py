"""The process that runs the ServerApp: keeps the SuperLink's list of devices right, and starts a new run when one is
lost.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import httpx

from deepfusion import progress
from deepfusion.federation.flower.fleet import serve_app
from deepfusion.federation.flower.server_app import app
from deepfusion.federation.flower.superlink import SuperLink, wait_for
from deepfusion.federation.server.home import Home

ENROLMENT_SECONDS = 2.0  # how soon a device that was enrolled just now may come


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--superlink", required=True)
    arguments = parser.parse_args()
    progress.to_terminal()
    progress.attach(arguments.run)
    home = Home(arguments.home)
    link = SuperLink(home, arguments.superlink)
    wait_for(link)
    threading.Thread(target=_follow_enrolment, args=(link,), daemon=True).start()
    link.submit()
    serve_app(
        app, link.address, home.ca, home.superexec_secret.read_bytes(),
        run_config={"run": str(arguments.run), "stay": True}, idle=lambda: time.sleep(0.5),
    )  # fmt: skip


def _follow_enrolment(link: SuperLink) -> None:
    known = link.home.devices
    while True:
        time.sleep(ENROLMENT_SECONDS)
        if link.home.devices == known:
            continue
        try:
            link.register()
            known = link.home.devices
        except httpx.HTTPError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
