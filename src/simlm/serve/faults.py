"""Refusals of the server, each with a status, a type and a code, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Any


class Fault(Exception):  # noqa: N818 - it is an answer, and most often the client's error
    """An answer that is not 2xx. type and code are for programs, the message is for people.

    param: the field of the request that is at fault. retry_seconds: sent as Retry-After.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, retry_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_seconds = retry_seconds

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"type": fault_type(self.status), "message": self.message, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, and what 401 has to say."""
        headers = {} if self.retry_seconds is None else {"retry-after": str(max(1, round(self.retry_seconds)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def fault_type(status: int) -> str:
    """OpenAI's type for a status, as far as it has one."""
    known = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "method_not_allowed_error",
        408: "timeout_error",
        409: "conflict_error",
        413: "request_too_large_error",
        415: "unsupported_media_type_error",
        429: "rate_limit_error",
        503: "unavailable_error",
        504: "timeout_error",
    }
    return known.get(status, "server_error" if status >= 500 else "invalid_request_error")


__all__ = ["Fault", "fault_type"]
