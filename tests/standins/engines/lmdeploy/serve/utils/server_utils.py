"""The doorman of LMDeploy's server, with the list that it looks into at each request."""

import hashlib
from typing import Any


class AuthenticationMiddleware:
    """As in LMDeploy: hashes of the keys, made when it is."""

    def __init__(self, app: Any, tokens: list[str]) -> None:
        """Keep the hashes."""
        self.app = app
        self.api_tokens = [hashlib.sha256(token.encode("utf-8")).digest() for token in tokens]
