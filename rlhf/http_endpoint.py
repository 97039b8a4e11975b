"""Asking an HTTP endpoint: JSON in, JSON out, with bounded retries, and errors that name the URL.

Remote scorers and judges use it. The client is that of the standard library: one request carries a
batch and takes far longer than opening its connection, so that a library with a pool of connections
would be one dependency more for nothing. Redirects are refused: they would carry the key to another
host. Left out: streaming.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rlhf.config import EndpointConfig, InputError, keep_secret, show
from rlhf.console import warn

PASSING = (408, 425, 429, 500, 502, 503, 504)  # what may be over in a moment
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two tries; each wait is twice the last
MOST_BYTES = 64 * 2**20
HTML = re.compile(rb"\s*<(!doctype|html|head|body|!--)", re.I)


class Passing(Exception):
    """A failure that may be over in a moment; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def ask(
    url: str,
    body: Any,
    endpoint: EndpointConfig,
    field: str,
    retried: Callable[[], None] = lambda: None,
    is_json: bool = True,
) -> Any:
    """Send a JSON body to a URL and return the JSON that comes back.

    Args:
        body: None asks with GET.
        field: configuration key that holds the URL, for messages.
        retried: called before each further try.
        is_json: False: the answer is any text, which is returned.

    Raises:
        InputError: what the endpoint said, after `endpoint.retries` more tries where that may help.
    """
    where = f"{field}={url}"
    wait = FIRST_WAIT
    for num_tried in range(1, endpoint.retries + 2):
        try:
            answer = _ask_once(url, body, endpoint, where)
            return _as_json(answer, where) if is_json else answer.decode(errors="replace")
        except Passing as failure:
            if num_tried > endpoint.retries:
                tries = f"{num_tried} tries" if num_tried > 1 else "one try"
                raise InputError(f"{where} {failure} (after {tries})") from failure
            if num_tried == 1:
                warn(f"{where} {failure}; trying again, at most {endpoint.retries} times")
            time.sleep(min(wait if failure.wait is None else failure.wait, LONGEST_WAIT))
            wait *= 2
            retried()
    raise AssertionError


class Completion(NamedTuple):
    """The answer of a chat model."""

    text: str
    is_whole: bool  # False: cut at max_tokens
    tokens_in: int
    tokens_out: int


def chat_url(base: str) -> str:
    """Where an OpenAI-compatible endpoint completes chats."""
    base = base.rstrip("/")
    return base if base.endswith("/completions") else f"{base}/chat/completions"


def complete_chat(url: str, body: Any, endpoint: EndpointConfig, field: str) -> Completion:
    """Ask for a chat completion; arguments and errors are those of `ask`."""
    answer = ask(url, body, endpoint, field)
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text = _text_of(choice["message"]["content"])
        tokens = [int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")]
        return Completion(text, choice.get("finish_reason") != "length", *tokens)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{field}={url} answered {show(answer)}; expected a chat completion"
        ) from error


def _text_of(content: Any) -> str:
    """The text of a message: null has none, and parts are joined."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError(content)
    return content or ""


def _ask_once(url: str, body: Any, endpoint: EndpointConfig, where: str) -> bytes:
    data = None if body is None else json.dumps(body, default=str).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    key = api_key(endpoint)
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(url, data, headers)
        with _opener(url).open(request, timeout=endpoint.timeout) as response:
            answer = _read(response, endpoint.timeout)
    except urllib.error.HTTPError as error:
        raise _refusal(error, endpoint, where) from error
    except TimeoutError as error:
        raise Passing(f"did not answer within {endpoint.timeout:g} seconds") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Passing(f"did not answer within {endpoint.timeout:g} seconds") from error
        raise Passing(f"cannot be reached ({reason or type(reason).__name__})") from error
    if HTML.match(answer):
        raise InputError(f"{where} answered with {said(answer)}, not JSON; is the URL right?")
    return answer


def _as_json(answer: bytes, where: str) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise Passing(f"answered with what is not JSON ({error}): {said(answer)}") from error


def _read(response: Any, seconds: float) -> bytes:
    """Read a body; one that comes drop by drop has no more time than one that comes late."""
    end, parts, size = time.monotonic() + seconds, [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > end:
            raise TimeoutError
        if size > MOST_BYTES:
            raise HTTPException(f"more than {MOST_BYTES:,} bytes")
    return b"".join(parts)


def _refusal(error: Any, endpoint: EndpointConfig, where: str) -> Exception:
    """What an answer with an error status means."""
    try:
        reason = f"answered {error.code} {error.reason}: {said(_read(error, endpoint.timeout))}"
    except (OSError, HTTPException):
        reason = f"answered {error.code} {error.reason}"
    if error.code in PASSING:
        after = str(error.headers.get("Retry-After", ""))  # seconds; a date is not read
        return Passing(reason, float(after) if re.fullmatch("[0-9]+", after) else None)
    fix = ""
    if error.code in (401, 403):
        name = endpoint.key_env
        fix = f"; is ${name} the right key?" if name else "; name the variable of the key: key_env="
    if 300 <= error.code < 400:
        fix = f"; give the URL that it names: {error.headers.get('Location')}"
    return InputError(f"{where} {reason}{fix}")


def said(answer: bytes) -> str:
    """What an endpoint said, in one line: the message of its JSON, the title of its HTML, or the
    text."""
    text = answer.decode(errors="replace")
    if HTML.match(answer):
        title = re.search("<title[^>]*>(.*?)</title>", text, re.I | re.S)
        return f"an HTML page ({' '.join(title[1].split())[:100]!r})" if title else "an HTML page"
    try:
        found = json.loads(text)
        for name in ("error", "detail", "message"):
            found = found.get(name, found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else text
    except (ValueError, RecursionError):
        pass
    return repr(" ".join(text.split())[:200]) if text.strip() else "nothing"


def api_key(endpoint: EndpointConfig) -> str | None:
    """The key of the endpoint, from its environment variable; it is never written or printed."""
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        name = endpoint.key_env
        raise InputError(f"key_env={name}: no such environment variable; export {name}=<key>")
    keep_secret(endpoint.key_env)
    return key


def check_endpoint(url: str, endpoint: EndpointConfig, field: str) -> None:
    """Check, before a model loads, that a URL is one, that its key is there, and that something
    listens there."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError as error:
        raise InputError(f"{field}={url} is not a URL ({error})") from error
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{field}={url} is not a URL, such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise InputError(f"{field} holds a password; put it into a variable: key_env=<its name>")
    api_key(endpoint)
    if urllib.request.getproxies() and not _is_here(host):
        return  # the proxy reaches it, or says that it cannot
    try:
        socket.create_connection((host, port), timeout=min(endpoint.timeout, 10.0)).close()
    except OSError as error:
        raise InputError(f"{field}={url} cannot be reached ({error.strerror or error})") from error


def _is_here(host: str | None) -> bool:
    return host in ("localhost", "::1") or str(host).startswith("127.")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """What opens a URL: without redirects, and without a proxy where the server is here."""
    here = [urllib.request.ProxyHandler({})] if _is_here(urlsplit(url).hostname) else []
    return urllib.request.build_opener(_NoRedirect, *here)
