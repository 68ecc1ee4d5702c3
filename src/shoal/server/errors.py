"""What the server answers when it cannot do what was asked, in the words and codes of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..engine.errors import (
    ContextError,
    MissingDependencyError,
    NoPlanError,
    OperatingSystemError,
    ShoalError,
    UnsupportedModelError,
)
from ..grammars import GrammarError
from ..net.errors import NetError
from .http import BodyError
from .limiter import Busy


class ApiError(Exception):
    """A response with an error. `param`: the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind, self.headers = kind, headers

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def unavailable(message: str) -> ApiError:
    """The response where the devices cannot answer at the moment."""
    wait = (("Retry-After", "5"),)
    return ApiError(503, message, code="unavailable", kind="server_error", headers=wait)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why nothing can be answered: the phase of the head ("lost": it does not tell), and the reason for
    people, such as how many MB are missing."""

    phase: str
    reason: str

    @property
    def error(self) -> ApiError:
        """The response to who has asked."""
        return unavailable(f"the devices are not ready: {self.reason}")


def api_error(error: Exception) -> ApiError:
    """The response for an exception. One that is no ShoalError is a mistake of this program, of which the
    client learns no more than that."""
    match error:
        case ApiError():
            return error
        case Busy():
            wait = (("Retry-After", str(error.seconds)),)
            return ApiError(
                429, str(error), code="rate_limit_exceeded", kind="rate_limit_error", headers=wait
            )
        case ContextError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case UnsupportedModelError():
            return ApiError(400, str(error))
        case NetError() | NoPlanError() | OperatingSystemError():
            return unavailable(str(error))
        case MemoryError():
            return unavailable("the server has no memory for this: ask for less, or later")
        case MissingDependencyError():
            return ApiError(501, str(error), kind="server_error")
        case ShoalError():
            return ApiError(500, str(error), kind="server_error")
        case BodyError() | GrammarError():
            return ApiError(400, str(error))
        case TimeoutError():
            return ApiError(408, "the request body took too long to arrive")
    return ApiError(500, "the server has made a mistake; its log says which", kind="server_error")
