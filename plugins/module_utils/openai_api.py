# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Questions to a server that speaks OpenAI's HTTP interface, with nothing but the standard library."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


def first_key(text: str) -> str:
    """Return the key that clients are to send: the first line of a key file; others are valid while keys change."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


class ApiFault(Exception):
    """The server did not answer as it should; the text says what it did, and never holds the key."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: its status and its body as text."""

    status: int
    text: str

    def content(self) -> Any:
        """Return the body as data."""
        try:
            return json.loads(self.text)
        except ValueError as error:
            message = f"not JSON: {self.text[:200]}"
            raise ApiFault(message) from error


class OpenAI:
    """A server at ``url``, which is its base, without /v1."""

    def __init__(self, url: str, key: str = "", timeout_seconds: float = 60.0) -> None:
        """Keep the address; nothing is asked yet."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            message = f"'{url}' is no URL: it begins with http:// or https://"
            raise ApiFault(message)
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._key, self._timeout = key, timeout_seconds
        self.url = url

    def request(self, path: str, body: dict[str, Any] | None = None, *, key: str | None = None) -> Answer:
        """Return the answer to a GET, or to a POST when there is a body; ``key`` replaces the server's own."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        key = self._key if key is None else key
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", self._prefix + path, data, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read().decode(errors="replace"))
        except (OSError, http.client.HTTPException) as error:
            message = f"{self.url}{path}: {error or type(error).__name__}"
            raise ApiFault(message) from error
        finally:
            connection.close()

    def wanted(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        """Return an answer whose status is 200."""
        answer = self.request(path, body)
        if answer.status != http.client.OK:
            message = f"{self.url}{path}: HTTP {answer.status} instead of 200: {answer.text[:300]}"
            raise ApiFault(message)
        return answer

    def models(self) -> list[str]:
        """Return the names of the models."""
        content = self.wanted("/v1/models").content()
        try:
            return [str(model["id"]) for model in content["data"]]
        except (KeyError, TypeError) as error:
            message = f"{self.url}/v1/models: no list of models"
            raise ApiFault(message) from error

    def chat(self, model: str, question: str, max_tokens: int, image: str = "") -> tuple[str, int, float]:
        """Return the answer to a question, how many tokens it has, and the seconds that it took.

        ``image`` is the URL of an image that the question is about.
        """
        began = time.monotonic()
        seen = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image}}]
        messages = [{"role": "user", "content": seen if image else question}]
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        content = self.wanted("/v1/chat/completions", body).content()
        try:
            message = content["choices"][0]["message"]
            text = str(message.get("content") or message.get("reasoning_content") or "")
            tokens = int((content.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            fault = f"{self.url}/v1/chat/completions: no completion: {str(content)[:300]}"
            raise ApiFault(fault) from error
        return text.strip(), tokens, time.monotonic() - began


@dataclass(frozen=True)
class Probe:
    """What a probe found: the models, the answer, its tokens and seconds."""

    models: list[str]
    answer: str
    tokens: int
    seconds: float


def probe(
    server: OpenAI, model: str, question: str, max_tokens: int, *, guarded: bool, tells_health: bool = True
) -> Probe:
    """Prove that a server serves a model: health, name, a completion, and no way in without the key."""
    if tells_health:
        server.wanted("/health")
    names = server.models()
    if model not in names:
        message = f"{server.url}/v1/models has no {model!r}, only {', '.join(names) or 'nothing'}"
        raise ApiFault(message)
    if guarded:
        for key, called in (("", "without a key"), ("wrong", "with a wrong key")):
            status = server.request("/v1/models", key=key).status
            if status != http.client.UNAUTHORIZED:
                message = f"{server.url}/v1/models answers {status} {called} instead of 401: the key is not enforced"
                raise ApiFault(message)
    answer, tokens, seconds = server.chat(model, question, max_tokens)
    if not answer:
        message = f"{server.url}: {model} answered {question!r} with nothing"
        raise ApiFault(message)
    return Probe(names, answer, tokens, seconds)
