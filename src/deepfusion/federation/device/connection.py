"""What a device speaks to the server with: signed HTTPS requests, and patience while there is no network."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.federation import identity

PATIENCE_SECONDS = 24 * 3600.0
_CONNECT_SECONDS, _ANSWER_SECONDS = 15.0, 60.0
_LONGEST_PAUSE, _TELL_SECONDS = 30.0, 60.0
_AWAY = (502, 503, 504, 507)  # 507: the operator has to make room

T = TypeVar("T")


class Refused(InputError):
    """The server does not grant a request.

    Args:
        status: of HTTP.
        code, message: of the server.
        facts: the whole answer.
    """

    def __init__(self, status: int, code: str, message: str, server: str, facts: dict[str, Any]) -> None:
        super().__init__(message, where=server, code=code)
        self.status, self.facts = status, facts

    def __reduce__(self) -> tuple:
        return Refused, (self.status, self.code, self.what, self.where, self.facts)


class Away(httpx.TransportError):
    """There is a server, but it cannot answer now."""


class Connection:
    """One connection to `server`, kept open; safe for several threads.

    Args:
        server: HOST:PORT.
        key: the device's own; every request is signed with it.
        context: what verifies the server.
        seconds: longest wait for the network to take or give anything.
        patience: seconds after which `patiently` gives up.
    """

    def __init__(
        self,
        server: str,
        key: ec.EllipticCurvePrivateKey,
        context: ssl.SSLContext,
        *,
        seconds: float = _ANSWER_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.server, self.key, self.patience = server, key, patience
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))
        self._client = httpx.Client(base_url=f"https://{server}", verify=context, timeout=timeout)

    def call(self, method: str, path: str, ticket: str | None = None, **arguments: Any) -> httpx.Response:
        """One request, once.

        Args:
            ticket: of the upload it belongs to.
            arguments: of httpx: headers, content, ...

        Raises:
            Refused: the server does not grant it.
            InputError: the server's certificate is not trusted.
            httpx.TransportError: no connection, or the server cannot answer now.
        """
        headers = identity.sign(self.key) | arguments.pop("headers", {})
        if ticket is not None:
            headers["Authorization"] = f"Bearer {ticket}"
        try:
            answer = self._client.request(method, path, headers=headers, **arguments)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise identity.unreachable(self.server, error) from None
            raise
        if answer.status_code < 400:
            return answer
        code, message, facts = _read_error(answer)
        if answer.status_code in _AWAY:
            raise Away(message)
        raise Refused(answer.status_code, code, message, self.server, facts)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Repeat an attempt until there is a network and a server again, with growing pauses.

        Raises:
            InputError: none for `patience` seconds; and what `attempt` raises otherwise.
        """
        began, told, pause = time.monotonic(), -1.0, 1.0
        while True:
            try:
                result = attempt()
            except httpx.TransportError as error:
                away = time.monotonic() - began
                if away >= self.patience:
                    raise identity.unreachable(self.server, error) from None
                if told < 0 or away - told >= _TELL_SECONDS:
                    told, reason = away, str(error) or type(error).__name__
                    lost = "cannot go on at" if isinstance(error, Away) else "no connection to"
                    progress.say(
                        f"[device] {lost} {self.server} for {progress.duration(away)}, still trying ({reason})"
                    )
                time.sleep(min(pause * random.uniform(0.5, 1), self.patience - away))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told >= 0:
                    progress.say(f"[device] goes on at {self.server}")
                return result

    def close(self) -> None:
        """Close it."""
        self._client.close()


def _read_error(answer: httpx.Response) -> tuple[str, str, dict[str, Any]]:
    """Code, message and all facts of an answer, which may be of something else that stands in between."""
    try:
        facts = answer.json()
        error = facts["error"]
        return str(error["code"]), str(error["message"])[:500], facts
    except (ValueError, KeyError, TypeError):
        return "refused", f"the server answered {answer.status_code} {answer.reason_phrase}", {}
