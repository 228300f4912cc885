# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""A small client of Open WebUI's HTTP API (0.12): sign in, list models, ask. Standard library only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

# Bytes of an error answer that a message quotes.
QUOTED_BYTES = 300


class WebuiError(Exception):
    """What went wrong, in words for a person, with the way out."""


class WebuiClient:
    """Talk to one Open WebUI as one user.

    ``url`` is its base, ``timeout_seconds`` bounds each request. Proxies of the environment are not used: the interface
    is asked on the host that it runs on.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        """Only keep the values; nothing is sent yet."""
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._token = ""
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _request(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the decoded JSON; raise WebuiError where no HTTP answer comes or it is no JSON."""
        headers = {"Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310  the scheme is checked by the module
        try:
            with self._opener.open(request, timeout=self.timeout_seconds) as answer:
                status, text = int(answer.status), answer.read()
        except urllib.error.HTTPError as refusal:
            status, text = refusal.code, refusal.read()
        except OSError as failure:
            reason = getattr(failure, "reason", failure)
            raise WebuiError(f"Open WebUI does not answer at {self.url}{path}: {reason}") from None
        try:
            return status, json.loads(text)
        except ValueError:
            shown = text[:QUOTED_BYTES].decode(errors="replace")
            raise WebuiError(f"{self.url}{path} answered {status} with what is no JSON: {shown!r}") from None

    def sign_in(self, email: str, password: str) -> dict[str, Any]:
        """Sign in and return the account (``id``, ``email``, ``name``, ``role``); later requests carry the token."""
        self._token = ""
        status, answer = self._request("/api/v1/auths/signin", {"email": email, "password": password})
        if status != 200 or not isinstance(answer, dict) or not answer.get("token"):
            raise WebuiError(f"Open WebUI refused to sign {email} in ({status}): {detail(answer)}")
        self._token = str(answer["token"])
        return {key: answer.get(key) for key in ("id", "email", "name", "role")}

    def change_account(self, account: str, fields: dict[str, str]) -> None:
        """Set ``email``, ``name`` or ``password`` of the account with this id; an admin may."""
        status, answer = self._request(f"/api/v1/users/{account}/update", fields)
        if status != 200 or not isinstance(answer, dict):
            raise WebuiError(f"Open WebUI did not change {', '.join(sorted(fields))} ({status}): {detail(answer)}")

    def models(self) -> list[str]:
        """Return the names of the models that this user sees."""
        status, answer = self._request("/api/models")
        if status != 200 or not isinstance(answer, dict):
            raise WebuiError(f"Open WebUI did not list its models ({status}): {detail(answer)}")
        return [str(model["id"]) for model in answer.get("data", [])]

    def ask(self, model: str, question: str, max_tokens: int) -> str:
        """Return the model's answer to one question."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": False,
        }
        status, answer = self._request("/api/chat/completions", body)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if status != 200 or content is None:
            raise WebuiError(f"Open WebUI gave no answer of {model} ({status}): {detail(answer)}")
        return str(content).strip()


def detail(answer: Any) -> str:
    """Return the reason that an error answer gives."""
    if isinstance(answer, dict):
        for key in ("detail", "error", "message"):
            if answer.get(key):
                return detail(answer[key])
    return str(answer)[:QUOTED_BYTES]
