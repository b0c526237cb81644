"""Every error of the server as an HTTP answer in the shape of OpenAI's API."""

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from yoco_u.config import Config, describe_problems, wrong_setting
from yoco_u.errors import UserError
from yoco_u.serving.fields import brief
from yoco_u.serving.jobs import Busy, NotServing, RequestFailed, TimeExceeded
from yoco_u.serving.requests import REQUESTS
from yoco_u.serving.responses import ErrorResponse

log = logging.getLogger("yoco_u.serving")

_INTERNAL = "internal error; the server's log says more"
_NAMES = {"json_schema": "response_format"}  # of the engine's settings in requests, where they differ
_INNER = re.compile(r"^(SamplingParams|request [\w.]+): ")  # what the engine calls what a client sent
_LONGEST = 500  # characters of a message; messages quote what clients sent, which may be long


class ApiError(Exception):
    """A refusal, with its HTTP status.

    Args:
        param: name of the request's parameter that is wrong.
        code: the reason as a word that programs can compare.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON object `{"error": ...}`, with the type that OpenAI's API gives to errors of this status.

    Args:
        param: name of the request's parameter that is wrong, or of the engine's setting.
    """
    kinds = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    short = message if len(message) <= _LONGEST else message[:_LONGEST] + "..."
    return {"error": {"message": short, "type": kind, "param": _NAMES.get(param or "", param), "code": code}}


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    # JSON in ASCII, because the message may quote lone surrogates, which UTF-8 cannot encode.
    body = json.dumps(error_body(status, message, param, code))
    return Response(body, status, dict(headers or {}), media_type="application/json")


def stream_error(error: Exception) -> str:
    """A server-sent event for an error that occurs after the answer has begun, when no status can be sent any more."""
    return f"data: {json.dumps(error_body(*_status(error)))}\n\n"


def _status(error: Exception) -> tuple[int, str, str | None, str | None]:
    """The status, the message, the parameter and the code of an error."""
    if isinstance(error, NotServing):
        return 503, str(error), None, None
    if isinstance(error, TimeExceeded):
        return 503, str(error), None, "time_exceeded"
    if isinstance(error, RequestFailed):
        return (400, str(error), error.setting, None) if error.is_refusal else (500, str(error), None, None)
    log.error("an answer failed", exc_info=error)
    return 500, _INTERNAL, None, None


def install(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> Response:
        return error_response(error.status, error.message, error.param, error.code)

    @app.exception_handler(UserError)
    async def _user(_: Request, error: UserError) -> Response:
        return error_response(400, _outer(str(error)), error.setting)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid_request(REQUESTS.get(request.url.path, Config), error)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND:
            message = f"no such path: {request.method} {request.url.path}"
        return error_response(error.status_code, message, headers=error.headers)

    @app.exception_handler(Busy)
    async def _busy(_: Request, error: Busy) -> Response:
        return error_response(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(NotServing)
    async def _not_serving(_: Request, error: NotServing) -> Response:
        # Closed, so that a client's next try may reach another server behind the same address.
        return error_response(503, str(error), headers={"Retry-After": "5", "Connection": "close"})

    @app.exception_handler(TimeExceeded)
    async def _too_long(_: Request, error: TimeExceeded) -> Response:
        return error_response(*_status(error))

    @app.exception_handler(RequestFailed)
    async def _failed(_: Request, error: RequestFailed) -> Response:
        return error_response(*_status(error))

    @app.exception_handler(Exception)
    async def _internal(_: Request, __: Exception) -> Response:
        return error_response(500, _INTERNAL)


def _outer(message: str) -> str:
    """A message of the engine in the words of requests; what it quotes stays as it is."""
    own, *quoted = re.split(r"(['\"])", _INNER.sub("", message), maxsplit=1)
    for inner, outer in _NAMES.items():
        own = re.sub(rf"\b{inner}\b", outer, own)
    return "".join([own, *quoted])


def _invalid_request(cls: type[Config], error: RequestValidationError) -> Response:
    """The answer to a body that does not fit its schema: every problem with the path of its key."""
    problems = [
        problem | {"loc": problem["loc"][1:], "input": _Brief(problem["input"])} for problem in error.errors()
    ]  # without "body"
    if problems[0]["type"] == "json_invalid":
        return error_response(
            400, f"the body is not JSON: {problems[0]['ctx']['error']} at character {error.errors()[0]['loc'][1]}"
        )
    if problems[0]["loc"] == () and problems[0]["type"] != "value_error":
        return error_response(400, "the body must be a JSON object, with Content-Type: application/json")
    return error_response(400, describe_problems(cls, problems), wrong_setting(problems))


class _Brief:
    """A value that a client sent, whose representation is short."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __repr__(self) -> str:
        return brief(self._value)


_DESCRIPTIONS: dict[int | str, str] = {
    "4XX": "The request is not possible; 400 unless another status fits.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The model could not compute an answer.",
    503: "The server is shutting down, or the request took too long.",
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description} for status, description in _DESCRIPTIONS.items()
}
"""Error answers of all routes, as the OpenAPI description lists them."""
