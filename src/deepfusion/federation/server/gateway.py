"""The gateway: the one port that devices reach. Uploads by tus, Flower's messages by proxy, nothing else.

`python -m deepfusion.federation.server.gateway --home HOME --run RUN --host HOST --port PORT --superlink
127.0.0.1:PORT`
"""

# Annotations are evaluated here, since FastAPI reads those of nested functions.
import argparse
import base64
import binascii
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.federation import identity
from deepfusion.federation.server.home import Home
from deepfusion.federation.server.ledger import Ledger
from deepfusion.federation.server.sinks import S3Sink
from deepfusion.federation.server.uploads import Refusal, Upload, Uploads
from deepfusion.sections import FederationSection

# What devices need of Flower. Whoever reaches its Control API can give orders, so all else of it does not exist here.
FLEET_CALLS = (
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "push-object",
    "pull-object", "confirm-message-received",
)  # fmt: skip
MAX_MESSAGE_BYTES = 8 * 2**20
TUS = "1.0.0"
_REFUSALS_A_MINUTE = 20
_GRACE_SECONDS = 2


@dataclass
class Wire:
    """Bytes of a request and its answer that were not counted yet: request line or status, headers and body."""

    up: int
    down: int = 0

    def take(self) -> tuple[int, int]:
        """Both numbers, once."""
        taken = self.up, self.down
        self.up, self.down = self.up - taken[0], self.down - taken[1]
        return taken


class Counting:
    """ASGI middleware: counts all bytes of requests whose sender is proven."""

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        self.app, self.ledger = app, ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and count."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        line = (
            len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"]) + len("  HTTP/1.1\r\n")
        )
        wire = scope["state"]["wire"] = Wire(line + _size(scope["headers"]))

        async def counted_receive() -> Message:
            message = await receive()
            wire.up += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            head = len("HTTP/1.1 200 OK\r\n") + _size(message["headers"]) if "headers" in message else 0
            wire.down += head + len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            if "device" in scope["state"]:
                await run_in_threadpool(count, self.ledger, scope)


def count(ledger: Ledger, scope: Scope) -> None:
    """Note what has crossed the wire since the last time."""
    up, down = scope["state"]["wire"].take()
    if scope["path"].startswith("/v1/fleet/"):
        ledger.count(scope["state"]["device"], control_up=up, control_down=down)
    else:
        ledger.count(scope["state"]["device"], up=up, down=down)


class Doorman:
    """Knows who may enter, and notes who was refused, but not without end."""

    def __init__(self, home: Home, ledger: Ledger) -> None:
        self.home, self.ledger = home, ledger
        self._refused: dict[tuple[str, str], list[float]] = {}

    def sender(self, request: Request) -> str:
        """The device that signed a request.

        Raises:
            Refusal: unsigned, not enrolled or revoked.
        """
        try:
            key = identity.signer(dict(request.headers))
        except identity.Unsigned as error:
            raise Refusal(401, "clock" if "clocks" in str(error) else "unsigned", str(error)) from None
        request.state.key = identity.fingerprint(key)
        known = self.home.who(key)
        if known is None:
            raise Refusal(403, "not-enrolled", f"this key ({request.state.key}) is not enrolled")
        request.state.device = known.device
        if known.revoked:
            raise Refusal(403, "revoked", f"{known.device} was shut out by the operator")
        return known.device

    def check(self, device: str) -> None:
        """Look again in the middle of a request.

        Raises:
            Refusal: the device was revoked meanwhile.
        """
        known = self.home.devices.get(device)
        if known is None or known.revoked:
            raise Refusal(403, "revoked", f"{device} was shut out by the operator")

    def note(self, request: Request, refusal: Refusal) -> None:
        """Write a refusal into the audit log; of one peer and reason only the first few a minute, or a stranger fills
        the disk.
        """
        peer, now = request.client.host if request.client else None, time.monotonic()
        if len(self._refused) > 10_000:
            self._refused = {key: times for key, times in self._refused.items() if now - times[-1] < 60}
        times = self._refused.setdefault((str(peer), refusal.code), [])
        times[:] = [time for time in times if now - time < 60]
        if len(times) < _REFUSALS_A_MINUTE:
            times.append(now)
            device, key = getattr(request.state, "device", None), getattr(request.state, "key", None)
            self.ledger.audit(
                "refused", device=device, peer=peer, code=refusal.code, message=refusal.message, key=key
            )


def create_app(home: Home, run: Path, config: FederationSection, superlink: str) -> FastAPI:
    """The gateway of a run.

    Args:
        home: who is enrolled, and the authority that verifies the SuperLink.
        run: run folder; uploads go below RUN/federation.
        config: where uploads go first.
        superlink: HOST:PORT of Flower's SuperLink on this machine.

    Raises:
        InputError: the object store cannot be used.
    """
    ledger = Ledger(run)
    uploads = Uploads(run, ledger, S3Sink(config.s3, run.resolve().name) if config.sink == "s3" else None)
    doorman = Doorman(home, ledger)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=str(home.ca))
        async with httpx.AsyncClient(
            base_url=f"https://{superlink}", verify=context, timeout=60, trust_env=False
        ) as client:
            app.state.superlink = client
            yield

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Counting, ledger=ledger)

    @app.exception_handler(Refusal)
    def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        if refusal.status != 503:  # a device that has to wait did nothing wrong
            doorman.note(request, refusal)
        content = {"error": {"code": refusal.code, "message": refusal.message}, **refusal.facts}
        # The body may not have been read; what is left of it is not worth reading.
        return JSONResponse(
            content, refusal.status, {"Connection": "close", "Tus-Resumable": TUS, **refusal.headers}
        )

    @app.exception_handler(HTTPException)
    def not_here(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(
            request,
            Refusal(404, "not-here", f"{request.method} {request.url.path[:100]} does not exist here"),
        )

    @app.exception_handler(Exception)
    def defect(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed; its log says how"
        return JSONResponse({"error": {"code": "defect", "message": message}}, 500, {"Connection": "close"})

    @app.get("/v1/health")
    def health() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/v1/ca")
    def ca() -> FileResponse:
        return FileResponse(home.ca, media_type="application/x-pem-file")

    _add_fleet(app, doorman)
    _add_uploads(app, doorman, uploads, config)
    return app


def _add_fleet(app: FastAPI, doorman: Doorman) -> None:
    Sender = Annotated[str, Depends(doorman.sender)]

    async def forward(request: Request, _: Sender) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_MESSAGE_BYTES:
                raise Refusal(413, "too-large", f"messages have at most {MAX_MESSAGE_BYTES} bytes")
        try:
            client: httpx.AsyncClient = request.app.state.superlink
            answer = await client.post(
                request.url.path, content=bytes(body), headers=_of_flower(request.headers)
            )
        except httpx.TransportError:
            raise Refusal(503, "superlink-away", "the server cannot take messages at the moment") from None
        return Response(answer.content, answer.status_code, _of_flower(answer.headers))

    for call in FLEET_CALLS:
        app.post(f"/v1/fleet/{call}")(forward)


def _add_uploads(app: FastAPI, doorman: Doorman, uploads: Uploads, config: FederationSection) -> None:
    sink = {"Deepfusion-Sink": config.sink}

    Sender = Annotated[str, Depends(doorman.sender)]

    def speaks_tus(request: Request) -> None:
        if request.headers.get("tus-resumable") != TUS:
            raise Refusal(412, "tus-version", f"the request is not of tus {TUS}", {"Tus-Version": TUS})

    def ticket_of(request: Request) -> str | None:
        scheme, _, ticket = request.headers.get("authorization", "").partition(" ")
        return ticket if scheme.lower() == "bearer" and ticket else None

    def opened(request: Request, device: Sender) -> Upload:
        return uploads.open(device, ticket_of(request))

    Opened = Annotated[Upload, Depends(opened)]
    tus = [Depends(speaks_tus)]

    @app.options("/v1/uploads")
    def options() -> Response:
        return _tus(
            204,
            {"Tus-Version": TUS, "Tus-Extension": "creation", "Tus-Max-Size": str(config.max_upload_bytes)},
        )

    @app.post("/v1/uploads", dependencies=tus)
    async def create(request: Request, upload: Opened) -> Response:
        file = upload.file(_file_name(request.headers.get("upload-metadata", "")))
        if request.headers.get("upload-length") != str(file.size):
            raise Refusal(400, "length-differs", f"{file.name} has {file.size} bytes in the offer")
        offset = await uploads.create(upload, file)
        return _tus(201, {"Location": f"/v1/uploads/{file.name}", "Upload-Offset": str(offset), **sink})

    @app.head("/v1/uploads/{name}", dependencies=tus)
    async def head(name: str, upload: Opened) -> Response:
        file = upload.file(name)
        offset = await uploads.offset(upload, file)
        return _tus(
            200, {"Upload-Offset": str(offset), "Upload-Length": str(file.size), "Cache-Control": "no-store"}
        )

    @app.patch("/v1/uploads/{name}", dependencies=tus)
    async def append(name: str, request: Request, upload: Opened) -> Response:
        file = upload.file(name)
        if request.headers.get("content-type") != "application/offset+octet-stream":
            raise Refusal(415, "content-type", "the body is not application/offset+octet-stream")
        offset = _number(request.headers.get("upload-offset"), "Upload-Offset")
        length = _number(request.headers.get("content-length", "0"), "Content-Length")
        if config.sink != "local":
            raise Refusal(404, "not-here", "this server takes uploads by way of an object store")
        if offset + length > file.size:
            raise Refusal(413, "too-large", f"{file.name} has {file.size} bytes in the offer")

        def each_second() -> None:
            doorman.check(upload.device)
            count(uploads.ledger, request.scope)

        here = await uploads.append(upload, file, offset, request.receive, each_second)
        return _tus(204, {"Upload-Offset": str(here)})

    @app.post("/v1/uploads/{name}/parts")
    def parts(name: str, upload: Opened) -> dict[str, Any]:
        return uploads.parts(upload, upload.file(name))

    @app.post("/v1/receipt")
    async def receipt(request: Request, device: Sender) -> JSONResponse:
        ticket = ticket_of(request)
        answer = await run_in_threadpool(uploads.receipt, device, ticket)
        if answer is None:
            peer = request.client.host if request.client else None
            answer = await uploads.finish(await run_in_threadpool(uploads.open, device, ticket), peer)
        return JSONResponse({"state": "verifying"}, 202) if answer is None else JSONResponse(answer)


def serve(
    home: Home,
    run: Path,
    *,
    host: str,
    port: int,
    superlink: str,
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Serve the gateway until a signal ends it.

    Args:
        run: run folder with its config.yaml.
        certificate, key: PEM files; by default those that the home's own authority has issued.

    Raises:
        InputError: no config, or the object store cannot be used.
    """
    app = create_app(home, run, load_config(run / "config.yaml").federation, superlink)
    uvicorn.run(
        app, host=host, port=port, ssl_certfile=certificate or home.certificate,
        ssl_keyfile=key or home.certificate_key,
        http="h11",  # bounds headers; the other one takes as many as come
        log_level="error",  # a warning for each malformed request would let strangers fill the disk
        ws="none", access_log=False, server_header=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )  # fmt: skip


def main() -> None:
    """The command line of the process; it is started by `deepfusion server start`."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("home", "run", "certificate", "certificate-key"):
        parser.add_argument(f"--{name}", type=Path, required=name in ("home", "run"))
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--superlink", required=True, help="HOST:PORT of Flower's SuperLink on this machine")
    given = parser.parse_args()
    try:
        serve(
            Home(given.home), given.run, host=given.host, port=given.port, superlink=given.superlink,
            certificate=given.certificate, key=given.certificate_key,
        )  # fmt: skip
    except InputError as error:
        print(f"deepfusion: {error}", file=sys.stderr)
        sys.exit(2)


def _tus(status: int, headers: dict[str, str]) -> Response:
    return Response(None, status, {"Tus-Resumable": TUS, **headers})


def _file_name(metadata: str) -> str:
    """`filename` out of Upload-Metadata: comma-separated keys, each with a value in base64."""
    for pair in metadata.split(","):
        key, _, value = pair.strip().partition(" ")
        if key == "filename":
            try:
                return base64.b64decode(value, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                break
    raise Refusal(400, "unknown-file", "Upload-Metadata has no filename in base64")


def _number(text: str | None, header: str) -> int:
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Refusal(400, "bad-header", f"{header} is not a number")
    return int(text)


def _of_flower(headers: Any) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if name in ("content-type", "accept") or name.startswith("flwr-")
    }


def _size(headers: Any) -> int:
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers) + len("\r\n")


if __name__ == "__main__":
    main()
