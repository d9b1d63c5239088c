"""`deepfusion server`: a federation of devices on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.markup import escape
from rich.table import Table

from deepfusion.cli.shared import Json, Overrides, need_flower, print_json, print_outcome
from deepfusion.config import load_config
from deepfusion.errors import InputError

server_app = typer.Typer(help="A federation of devices on other machines.", no_args_is_help=True)
ServerHome = Annotated[Path, typer.Option(help="folder of the server's keys and enrolled devices")]


@server_app.command("start")
def server_start(
    config: Annotated[
        Path | None, typer.Argument(help="YAML config; default: fusion without public text")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="run folder; started again with the same, the run goes on")
    ] = Path("runs/federation"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the one port that devices must reach")] = 9443,
    public: Annotated[
        list[str] | None, typer.Option(help="name or address of this machine for devices (repeatable)")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM chain of a public authority; default: a private one")
    ] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="its private key, mode 0600")] = None,
    home: ServerHome = Path("~/.deepfusion/server"),
    stay: Annotated[bool, typer.Option(help="stay after the model is made and keep late uploads")] = False,
    embedded: Annotated[
        bool, typer.Option(help="simulate the devices of the config in this process, without a network")
    ] = False,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """Wait for devices, take their uploads, and make the model when enough are in."""
    need_flower()
    from deepfusion.config import CONFIGS

    if embedded:
        if public or certificate or certificate_key or stay:
            what = "--public, --certificate, --certificate-key and --stay are for a server that devices reach"
            raise InputError(what, fix="leave them out, or --embedded", code="bad-usage")
        from deepfusion import pipeline
        from deepfusion.federation.flower.embedded import source

        pipeline.run(load_config(config, set or []), out, instead=[source()])
    else:
        from deepfusion.federation.server.home import Home
        from deepfusion.federation.server.start import start

        start(
            load_config(config or CONFIGS / "fuse.yaml", set or []), out, Home(home), host=host, port=port,
            public=public,
            certificate=certificate, certificate_key=certificate_key, stay=stay,
        )  # fmt: skip
    print_outcome(out, json_)


@server_app.command("enroll")
def server_enroll(
    device: Annotated[str, typer.Argument(help="name of the device in this federation")],
    key: Annotated[str, typer.Argument(help="the line of its public key, which device join prints")],
    home: ServerHome = Path("~/.deepfusion/server"),
) -> None:
    """Let a device take part; a running server notices at once."""
    need_flower()
    from deepfusion.federation.server.home import Home

    Home(home).enroll(device, key)
    print(f"{device} may join")


@server_app.command("revoke")
def server_revoke(
    device: Annotated[str, typer.Argument(help="name of the device in this federation")],
    home: ServerHome = Path("~/.deepfusion/server"),
) -> None:
    """Shut a device out, at once, also in the middle of an upload."""
    need_flower()
    from deepfusion.federation.server.home import Home

    Home(home).revoke(device)
    print(f"{device} may not join any more")


@server_app.command("devices")
def server_devices(home: ServerHome = Path("~/.deepfusion/server"), json_: Json = False) -> None:
    """List who is enrolled and who was revoked."""
    need_flower()
    from deepfusion.federation.identity import fingerprint, parse_public_line
    from deepfusion.federation.server.home import Home

    devices = Home(home).devices.values()
    rows = [
        {"device": d.device, "key": fingerprint(parse_public_line(d.key)), "revoked": d.revoked}
        for d in devices
    ]
    if json_:
        return print_json({"devices": rows})
    table = Table("device", "key", "")
    for row in rows:
        table.add_row(escape(str(row["device"])), str(row["key"]), "revoked" if row["revoked"] else "")
    rich.print(table)
