"""API keys: which requests may pass."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from yoco_u.serving.errors import error_response

_OPEN = ("/", "/health")
_OPEN_FOLDER = "/page/"


class ApiKeys:
    """Middleware that answers requests without a valid key with 401; the page and /health are open to all.

    A valid key comes as `Authorization: Bearer KEY`. Only hashes of the keys are kept, and a key is compared with each of them
    in constant time, so that the time of an answer tells nothing about them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope["path"]) and not self._knows(Headers(scope=scope)):
            response = error_response(
                401,
                "no API key, or a wrong one; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in _OPEN or path.startswith(_OPEN_FOLDER)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(found, known) for known in self._hashes]
        return any(matches) and scheme.lower() == "bearer"
