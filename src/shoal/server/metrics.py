"""What the server has done, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..results import Completion
from .opening import missing


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """`running`, `waiting`: slots that are taken, and requests that wait for one.
        MissingDependencyError: the package is not there."""
        try:
            import prometheus_client as library
        except ImportError:
            raise missing() from None
        self._library: Any = library
        self._registry = registry = library.CollectorRegistry()
        times = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
        self._requests = library.Counter(
            "shoal_requests", "Requests by path and status", ("path", "status"), registry=registry
        )
        self._tokens = library.Counter(
            "shoal_tokens",
            "Tokens: of prompts, of those the cached ones, of answers",
            ("kind",),
            registry=registry,
        )
        self._first = library.Histogram(
            "shoal_first_token_seconds",
            "From an answer's begin to its first token",
            buckets=times,
            registry=registry,
        )
        self._seconds = library.Histogram(
            "shoal_request_seconds", "Whole requests, with their wait", buckets=times, registry=registry
        )
        for name, what, value in (
            ("shoal_answers_running", "Answers that are computed", running),
            ("shoal_requests_waiting", "Requests that wait for a place", waiting),
        ):
            library.Gauge(name, what, registry=registry).set_function(value)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def answer(self, made: Completion) -> None:
        """Counts an answer."""
        self._tokens.labels("prompt").inc(made.usage.prompt_tokens)
        self._tokens.labels("cached").inc(made.usage.cached_tokens)
        self._tokens.labels("answer").inc(made.usage.completion_tokens)
        if made.tokens:
            self._first.observe(made.timings.first_token_s)

    def text(self) -> tuple[str, bytes]:
        """The content type, and the page that Prometheus reads."""
        return self._library.CONTENT_TYPE_LATEST, self._library.generate_latest(self._registry)
