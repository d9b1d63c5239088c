"""Open answers of a model, scored from 0 to 100 by another one behind any OpenAI-compatible chat endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from email.utils import mktime_tz, parsedate_tz
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.learning.answers import Answer

KEY_VARIABLE = "DEEPFUSION_JUDGE_KEY"
PROMPT = files("deepfusion").joinpath("judge_prompt.txt").read_text("utf-8")

_THREADS = 4
_TRIES = 8  # of one request: with growing pauses about two minutes
_READINGS = 3  # replies of the judge that are tried to be read, for one answer
_CONNECT_SECONDS, _ANSWER_SECONDS = 15.0, 120.0
_LONGEST_PAUSE, _LONGEST_WAIT = 60.0, 300.0  # seconds: of our own choice, and on request of the endpoint
_TELL_SECONDS = 10.0
_REPLY_BYTES = 2**22
_HEADERS = {"host", "accept", "connection", "user-agent", "content-length", "content-type"}
_CACHE_HEAD = '{"key": "'


# Replies of the judge -----------------------------------------------------------------------------------------------


def parse_score(reply: str) -> int | None:
    """The score in a judge's reply; None where there is none, or more than one, or not a whole number from 0 to 100.

    A reply that is not the JSON object asked for is searched for scores. Two different ones are no score: the judge may
    have quoted the answer, and the answer may have named the score it wants.
    """
    reply = reply.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", reply, re.DOTALL)
    try:
        values = json.loads(fenced[1] if fenced else reply)
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict) and type(values.get("score")) is int:
        found = {values["score"]}
    else:
        # A number that goes on, as in 0.85, 1e2 or 80-90, is no whole number; one that is out of 10 has another scale.
        number = r"(-?\d{1,9})(?:\.0+)?(?![.,–-]?\w)(?!\s*(?:/|out of)(?!\s*100\b))"
        label = r"""(?<!\w)score["'*`\s]*[:=]["'*`\s]*"""
        whole = re.fullmatch(rf"{number}(?:\s*/\s*100|\s*%)?\.?", reply)
        named = re.findall(f"{label}{number}", reply, re.IGNORECASE)
        if len(re.findall(label, reply, re.IGNORECASE)) > len(named):
            return None  # one of them is no whole number, and may differ
        found = {int(whole[1])} if whole else {int(one) for one in named}
    score = found.pop() if len(found) == 1 else None
    return score if score is not None and 0 <= score <= 100 else None


# Scores that were paid for ------------------------------------------------------------------------------------------


class _Cache:
    """A JSONL file of scores by the SHA-256 of all that a score depends on; it only grows, a line at a time.

    Raises:
        InputError: it cannot be read or written, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.scores = path, dict[str, int]()
        try:
            with path.open("ab+") as file:
                file.seek(0)
                content = file.read()
                for line in content.decode("utf-8", "replace").split("\n"):
                    self._read(line)
                if content and not content.endswith(b"\n"):
                    file.write(b"\n")  # A kill cut the last line off; what follows must not lengthen it.
        except OSError as error:
            raise self._unusable(error) from None

    def add(self, key: str, model: str, score: int) -> None:
        """Keep a score, in one write at the end of the file; safe for several threads."""
        self.scores[key] = score
        line = json.dumps({"key": key, "model": model, "score": score}) + "\n"
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise self._unusable(error) from None

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        match row:
            case {"key": str(key), "model": str(), "score": int(score)} if 0 <= score <= 100:
                self.scores[key] = score
            case _ if row is not None or line[: len(_CACHE_HEAD)] != _CACHE_HEAD[: len(line)]:
                what = "not a cache of the judge"
                raise InputError(what, where=self.path, fix="name a new file", code="judge-cache")

    def _unusable(self, error: OSError) -> InputError:
        what = f"the cache cannot be read and written ({error.strerror})"
        return InputError(what, where=self.path, fix="name another --judge-cache", code="judge-cache")


# The endpoint -------------------------------------------------------------------------------------------------------


class _Reply(NamedTuple):
    """What the judge wrote, and the tokens that the endpoint counted; None where it does not count."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class _Stopped(Exception):
    """Another request has failed for good."""


class _Endpoint:
    """One chat endpoint, asked with patience; safe for several threads."""

    def __init__(self, url: str, host: str, model: str, key: str, seconds: float, pause: float) -> None:
        import httpx2
        from openai import OpenAI

        self.host, self.model, self.pause = host, model, pause
        self.stop = threading.Event()
        self._key = key
        self._told = -_TELL_SECONDS
        # Not every judge takes these; what it complains about is left out from then on.
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": 4096}

        def say_little(request: httpx2.Request) -> None:
            """The client tells of this machine, and of accounts elsewhere that the environment names."""
            for name in set(request.headers) - _HEADERS:
                del request.headers[name]
            # So the bytes that are counted are those that memory holds.
            request.headers["Accept-Encoding"] = "identity"
            if key:
                request.headers["Authorization"] = f"Bearer {key}"

        def read(answer: httpx2.Response) -> None:
            """All of an answer, which may neither drip for ever nor flood the memory."""
            ends, body = time.monotonic() + seconds, bytearray()
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise httpx2.DecodingError("the answer is packed, which was not asked for")
            with closing(cast("httpx2.SyncByteStream", answer.stream)) as stream:
                for chunk in stream:
                    body += chunk
                    if time.monotonic() > ends or len(body) > _REPLY_BYTES:
                        raise httpx2.ReadTimeout("the answer does not end")
            answer.stream = httpx2.ByteStream(bytes(body))

        unusable = (ValueError, ImportError, OSError, httpx2.InvalidURL)
        try:
            # Redirects are not followed: text and key go to the host that the user named.
            http = httpx2.Client(
                timeout=httpx2.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS)), follow_redirects=False,
                event_hooks={"request": [say_little], "response": [read]},
            )  # fmt: skip
        except unusable:  # what variables for proxies and authorities name
            what, where = "the proxy or the certificates that it names cannot be used", "the environment"
            allowed = "HTTPS_PROXY, SSL_CERT_FILE"
            raise InputError(what, where=where, allowed=allowed, code="judge-unreachable") from None
        # Requests are repeated here, where an endpoint may ask for minutes and a failed one ends all others.
        self.client = OpenAI(api_key=key or "none", base_url=url, max_retries=0, http_client=http)

    def ask(self, prompt: str) -> _Reply:
        """The reply to one prompt; requests that the endpoint cannot serve now are repeated with growing pauses.

        Raises:
            InputError: it refuses, or does not answer in the end.
            _Stopped: `stop` was set.
        """
        from openai import APIConnectionError, APIStatusError

        message: Any = {"role": "user", "content": prompt}  # alone: some templates know no system message
        for attempt in range(_TRIES):
            options, wait, reason = self._options, None, "it answered 200: no chat completion"
            try:
                answer = self.client.chat.completions.create(model=self.model, messages=[message], **options)
                if (reply := _read_reply(answer)) is not None:
                    return reply
            except APIConnectionError as error:
                reason = self._clean(str(error.__cause__ or error) or type(error).__name__)
            except APIStatusError as error:
                said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
                reason = self._clean(f"it answered {error.status_code}: {said}")
                unwanted = [name for name in options if name in reason]
                if error.status_code == 400 and unwanted:
                    known = self._options.items()
                    self._options = {name: value for name, value in known if name not in unwanted}
                    continue
                if error.status_code not in (408, 429) and error.status_code < 500:
                    raise self._refusal(error.status_code, reason) from None
                wait = _retry_after(error.response.headers.get("retry-after", ""))
            except (ValueError, RecursionError):
                pass  # no JSON
            if wait is not None and wait > _LONGEST_WAIT:
                raise self._unreachable(f"{reason}; it asks to wait {wait:.0f} seconds")
            if attempt < _TRIES - 1:
                self._tell(reason)
                ours = min(self.pause * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1)
                if self.stop.wait(ours if wait is None else wait):
                    raise _Stopped
        raise self._unreachable(reason)

    def _clean(self, message: str) -> str:
        """What others wrote, fit for a terminal and without the key, which endpoints like to repeat."""
        message = message.replace(self._key, "***") if self._key else message
        return " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]

    def _tell(self, reason: str) -> None:
        if time.monotonic() - self._told >= _TELL_SECONDS:
            self._told = time.monotonic()
            progress.say(f"[judge] {self.host} is tried again: {reason}")

    def _refusal(self, status: int, reason: str) -> InputError:
        if status in (401, 403):
            what, fix = f"the judge does not take the key: {reason}", f"set {KEY_VARIABLE}"
            return InputError(what, where=self.host, fix=fix, code="judge-key")
        fix = "check --judge, whose path usually ends in /v1, and --judge-model"
        return InputError(f"the judge refuses: {reason}", where=self.host, fix=fix, code="judge-refused")

    def _unreachable(self, reason: str) -> InputError:
        what = f"the judge does not answer: {reason}"
        fix = "try again later; with --judge-cache nothing is paid for twice"
        return InputError(what, where=self.host, fix=fix, code="judge-unreachable")


def _read_reply(answer: Any) -> _Reply | None:
    """None where an endpoint has sent something else; the client takes what comes."""
    try:
        text, usage = answer.choices[0].message.content, answer.usage
    except (AttributeError, LookupError, TypeError):
        return None
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    known = [count if type(count) is int and count >= 0 else None for count in counts]
    return _Reply(text if isinstance(text, str) else "", *known)


def _retry_after(value: str) -> float | None:
    """Seconds that the endpoint asks to wait; it may give a number or a date."""
    if re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]+)?\s*", value):
        return float(value)
    try:
        date = parsedate_tz(value)
        return None if date is None else max(0.0, mktime_tz(date) - time.time())
    except (ValueError, OverflowError):  # a date of no calendar
        return None


# The judge ----------------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    domain: str
    score: int | None
    cached: bool
    prompt_tokens: int | None
    completion_tokens: int | None


class Judge:
    """A language model that scores answers.

    The key of the endpoint is read from the environment variable DEEPFUSION_JUDGE_KEY; an endpoint may need none.

    Args:
        url: of the API, such as https://HOST/v1, or of its chat/completions.
        model: its name there.
        prices: per million tokens of prompts and of completions, in any currency.
        cache: JSONL file of scores; answers that stand there are not sent again.
        seconds: longest wait for an answer.
        pause: seconds before a failed request is repeated for the first time; doubled each time.

    Raises:
        InputError: no HTTP client, a bad URL, name, price or key, or an unusable cache.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prices: tuple[float, float] | None = None,
        cache: Path | None = None,
        seconds: float = _ANSWER_SECONDS,
        pause: float = 1.0,
    ) -> None:
        if find_spec("openai") is None:
            raise InputError("the judge needs openai", fix="pip install deepfusion[judge]", code="no-openai")
        if not model.strip():
            what = "the judge needs the name of a model"
            raise InputError(what, fix="give --judge-model", code="bad-input")
        self.url, self.host = _endpoint_url(url)
        self.model, self.prices, self.seconds, self.pause = model, prices, seconds, pause
        self.prompt_sha256 = hashlib.sha256(PROMPT.encode()).hexdigest()
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise InputError("the key holds characters that no key has", where=KEY_VARIABLE, code="judge-key")
        self._cache = None if cache is None else _Cache(cache)

    def warn(self, documents: int) -> None:
        """Say whose text will go where, before anything is sent."""
        clear = "" if self.url.startswith("https:") else ", unencrypted"
        texts = "question, reference and answer"
        progress.say(
            f"[judge] the text of up to {documents} documents ({texts}) will leave this machine for {self.host}{clear}"
        )

    def score(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Score answers, a few at a time.

        Returns:
            `score` (mean of 0 to 100; None without any), `scored`, `unscored` (no score in the judge's replies),
            `cached`, `model`, `prompt_sha256`; `prompt_tokens`, `completion_tokens` and `cost` of this call (None
            where the endpoint does not count or no prices were given); and `score`, `scored`, `unscored` of each
            domain in `by_domain`.

        Raises:
            InputError: the endpoint refuses, or does not answer in the end. Scores up to then are in the cache.
        """
        keys = [self._cache_key(answer) for answer in answers]
        known = {} if self._cache is None else dict(self._cache.scores)
        there = sum(key in known for key in keys)
        rest = len(answers) - there
        sent = f"{rest} are sent to {self.host}" if rest else "nothing is sent, nothing to pay"
        progress.say(f"[judge] {there} of {len(answers)} answers are in the cache; {sent}")
        endpoint = _Endpoint(self.url, self.host, self.model, self._key, self.seconds, self.pause)

        def one(answer: Answer, key: str) -> _Verdict | None:
            if key in known:
                return _Verdict(answer.domain, known[key], True, 0, 0)
            try:
                return None if endpoint.stop.is_set() else self._score(endpoint, answer, key)
            except _Stopped:
                return None
            except BaseException:
                endpoint.stop.set()  # Nothing more is paid for a result that nobody will see.
                raise

        verdicts: list[_Verdict] = []
        with endpoint.client, ThreadPoolExecutor(_THREADS) as pool:
            try:
                for verdict in pool.map(one, answers, keys):
                    verdicts += [] if verdict is None else [verdict]
                    if len(verdicts) % 50 == 0 and len(verdicts) < len(answers):
                        progress.say(f"[judge] {len(verdicts)}/{len(answers)} answers judged")
            finally:
                endpoint.stop.set()
        return self._summary(verdicts)

    def _score(self, endpoint: _Endpoint, answer: Answer, key: str) -> _Verdict:
        replies: list[_Reply] = []
        score = None
        while score is None and len(replies) < _READINGS:
            replies.append(endpoint.ask(_prompt(answer)))
            score = parse_score(replies[-1].text)
        if score is not None and self._cache is not None:
            self._cache.add(key, self.model, score)
        prompt = _sum([reply.prompt_tokens for reply in replies])
        completion = _sum([reply.completion_tokens for reply in replies])
        return _Verdict(answer.domain, score, False, prompt, completion)

    def _cache_key(self, answer: Answer) -> str:
        parts = [self.model, PROMPT, answer.question, answer.reference, answer.answer]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _summary(self, verdicts: list[_Verdict]) -> dict[str, Any]:
        prompt = _sum([verdict.prompt_tokens for verdict in verdicts])
        completion = _sum([verdict.completion_tokens for verdict in verdicts])
        cost = None
        if self.prices is not None and prompt is not None and completion is not None:
            cost = (prompt * self.prices[0] + completion * self.prices[1]) / 1e6
        total = _mean(verdicts)
        mean = "none" if total["score"] is None else f"{total['score']:.1f} of 100"
        left = f"; {total['unscored']} without a score in the judge's replies, left out of the mean"
        progress.say(f"[judge] mean of {total['scored']} scores: {mean}{left if total['unscored'] else ''}")
        return {
            **total,
            "cached": sum(verdict.cached for verdict in verdicts),
            "model": self.model,
            "prompt_sha256": self.prompt_sha256,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "cost": cost,
            "by_domain": {
                domain: _mean([verdict for verdict in verdicts if verdict.domain == domain])
                for domain in sorted({verdict.domain for verdict in verdicts})
            },
        }


def parse_prices(text: str) -> tuple[float, float]:
    """IN,OUT: prices per million tokens of prompts and of completions.

    Raises:
        InputError: not two numbers of at least 0.
    """
    number = r"\s*(\d{1,12}(?:\.\d+)?)\s*"
    found = re.fullmatch(f"{number},{number}", text, re.ASCII)
    if not found:
        what, allowed = f"{text!r} are no prices", "IN,OUT such as 0.15,0.60"
        raise InputError(what, where="--judge-prices", allowed=allowed, code="bad-value")
    return float(found[1]), float(found[2])


def _prompt(answer: Answer) -> str:
    # As a JSON text the answer cannot end the data: its quotes and line ends are escaped.
    data = {"question": answer.question, "reference": answer.reference, "answer": answer.answer}
    return PROMPT.replace("{{DATA}}", json.dumps(data, ensure_ascii=False))


def _endpoint_url(url: str) -> tuple[str, str]:
    """The URL of the API, and its host as a person knows it.

    Raises:
        InputError: not a plain URL of HTTP.
    """
    import httpx2

    try:
        parts = urlsplit(url)
        httpx2.URL(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, httpx2.InvalidURL):
        sound = False
    if not sound or "@" in parts.netloc or parts.query or parts.fragment:
        # The URL is not repeated: it may hold a password or key.
        allowed = f"https://HOST/v1, without a name, key or query; the key belongs into {KEY_VARIABLE}"
        raise InputError("not the URL of an endpoint", where="--judge", allowed=allowed, code="judge-url")
    return url.rstrip("/").removesuffix("/chat/completions"), parts.netloc


def _sum(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _mean(verdicts: list[_Verdict]) -> dict[str, Any]:
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    mean = sum(scores) / len(scores) if scores else None
    return {"score": mean, "scored": len(scores), "unscored": len(verdicts) - len(scores)}
