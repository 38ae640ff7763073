"""Errors as OpenAI's clients know them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_log = logging.getLogger("moetor.server")
_STATUS_TEXT = {404: "there is no such path", 405: "this path does not take that method"}


class ApiError(HTTPException):
    """A refusal, or a failure, with all that its answer needs.

    Args:
        status: of HTTP.
        message: for the person who wrote the request.
        param: the field that is to blame.
        code: for programs.
        headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an answer with an error."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, param=param, code=code)


def add_handlers(app: FastAPI) -> None:
    """Every error of `app` gets that body."""

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            body = error.body()
        else:
            text = _STATUS_TEXT.get(error.status_code, str(error.detail))
            body = error_body(error.status_code, text)
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        param, message = _first_problem(error.errors())
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        _log.error("a request failed: %s", type(error).__name__, exc_info=error)
        text = f"the server failed: {type(error).__name__}; its log has more"
        return JSONResponse(error_body(500, text), 500)


def _first_problem(problems: Sequence[Any]) -> tuple[str | None, str]:
    """The field and the sentence for the first problem that pydantic found."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"][1:]]
    # A union's problems name the alternative that was tried; the field itself comes first.
    param = place[0] if place else None
    if problem["type"] == "json_invalid":
        return None, "the body is not valid JSON"
    if problem["type"] == "extra_forbidden":
        # vLLM's earlier names, which its current release refuses as well.
        advice = "use structured_outputs" if place[0].startswith("guided_") else "leave it out"
        return param, f"{'.'.join(place)} is not a field that this server knows; {advice}"
    if problem["type"] == "missing":
        return param, f"{'.'.join(place) or 'the body'} is missing"
    if param is None:
        return None, "the body must be a JSON object, sent with Content-Type: application/json"
    given = repr(problem.get("input"))
    shown = given if len(given) <= 80 else given[:77] + "..."
    return param, f"{'.'.join(place)} {shown}: {problem['msg']}"
