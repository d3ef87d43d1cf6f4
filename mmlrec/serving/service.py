"""The HTTP service: what it answers, within which limits."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

import mmlrec
from mmlrec.serving.metrics import CONTENT_TYPE, Metrics
from mmlrec.serving.model import Model
from mmlrec.serving.scorer import RequestError, Scorer

_LOG = logging.getLogger(__name__)
_SCORE = "/score"
#: Requests to score that are read, wait or are scored at a time; others are told to come again.
_MOST_AT_ONCE = 256
#: What their bodies may fill together, in bodies of the longest kind: 256 of these would be gigabytes.
_LONGEST_AT_ONCE = 16
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        rows, bytes: of a request to score.
        seconds: for its head to arrive, for its body to arrive, for its scores to be there, and for the answer to be taken.
    """

    rows: int = 10_000
    bytes: int = 16 << 20
    seconds: float = 10.0


class Service:
    """An ASGI application around a model. All of it runs in the thread of the event loop, but scoring.

    Attributes:
        ending: set to True when the service is to end: requests that come from then on are refused, and connections closed
            behind their answers.
    """

    def __init__(self, model: Model, limits: Limits) -> None:
        self.ending = False
        self._model, self._limits = model, limits
        self._scorer = Scorer(model, max_rows=limits.rows, max_bytes=limits.bytes)
        self._metrics = Metrics()
        self._held: dict[Request, int] = {}  # requests to score that are worked on -> bytes that their bodies may fill
        self._app = self._routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: refuse it when the service is ending, and count what it is answered with."""
        begun = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["path"] == _SCORE:
                    self._metrics.answered(message["status"], time.perf_counter() - begun)
                if self.ending:
                    message = {**message, "headers": [*message["headers"], _CLOSE]}
            await send(message)

        if self.ending and scope["path"] == _SCORE:
            refusal = _error(503, "the service is ending: send the request to another one.")
            await refusal(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)

    def _routes(self) -> FastAPI:
        card = self._model.card
        app = FastAPI(
            title=f"Scores of {card.get('name', 'a model')}",
            description="Raw rows in, scores out. Each row holds the columns of the raw data; a missing value is null.",
            version=mmlrec.__version__,
            redirect_slashes=False,  # which sends clients to whatever host their request names
        )
        app.add_api_route(_SCORE, self._score, methods=["POST"], response_class=Response, openapi_extra=self._openapi())
        app.add_api_route("/health", self._health, methods=["GET"], response_class=Response)
        app.add_api_route("/metrics", self._metrics_text, methods=["GET"], response_class=Response)
        app.add_exception_handler(HTTPException, _http_error)
        # Into the finished document: FastAPI leaves nulls out, and a row without one of its columns is an error.
        example = {"rows": [self._model.example()]}
        app.openapi()["paths"][_SCORE]["post"]["requestBody"]["content"]["application/json"]["example"] = example
        return app

    async def _score(self, request: Request) -> Response:
        """Score rows: `{"rows": [{"column": value, ...}, ...]}` gives `{"scores": [{"score.task": 0.5, ...}, ...]}`."""
        if len(self._held) >= _MOST_AT_ONCE:
            return _error(503, f"{_MOST_AT_ONCE} requests are worked on already: try again.")
        self._held[request] = 0
        try:
            scored = await self._scored(await self._body(request))
        except RequestError as error:
            return _error(error.status, str(error))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; counted under nginx's number for this
        except Exception:
            _LOG.exception("a request could not be scored")
            return _error(500, "the rows could not be scored; the log of the service says why.")
        finally:
            del self._held[request]
        self._metrics.scored(scored.num_rows)
        return Response(scored.body, media_type="application/json")

    async def _body(self, request: Request) -> bytes:
        """The body of a request; one for which there is no room, or a longer one than is allowed, is not read."""
        too_long = RequestError(
            413, f"the body is longer than {self._limits.bytes:,} bytes, the most of a request: send several."
        )
        length = int(request.headers.get("content-length", 0))
        if length > self._limits.bytes:
            raise too_long
        self._hold(request, length)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._limits.bytes:
                        raise too_long
                    self._hold(request, len(body))
        except TimeoutError:
            raise RequestError(
                408, f"the body did not arrive within {self._limits.seconds:g} seconds: send it faster."
            ) from None
        return bytes(body)

    def _hold(self, request: Request, num_bytes: int) -> None:
        """Count the bytes that a body fills, or is going to; fewer than before change nothing."""
        more, room = num_bytes - self._held[request], _LONGEST_AT_ONCE * self._limits.bytes
        if more > 0 and sum(self._held.values()) + more > room:
            raise RequestError(503, f"requests that are worked on fill the {room:,} bytes that they may: try again.")
        self._held[request] += max(more, 0)

    async def _scored(self, body: bytes) -> Any:
        """Its scores, when it is their turn in time; what has begun goes on unseen."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._scorer.submit(body)), self._limits.seconds)
        except TimeoutError:
            raise RequestError(
                503, f"not scored within {self._limits.seconds:g} seconds: try again, with fewer rows, or start more services."
            ) from None

    async def _health(self) -> Response:
        """Whether requests are taken: status 200 with what the model is, else 503."""
        card = self._model.card
        about = {key: card.get(key) for key in ("name", "method", "digest")} | {"outputs": self._model.outputs}
        state = {"status": "ending" if self.ending else "ready"}
        return Response(json.dumps(state | about), 503 if self.ending else 200, media_type="application/json")

    async def _metrics_text(self) -> Response:
        """Counts since the start, for Prometheus."""
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    def _openapi(self) -> dict[str, Any]:
        columns = {
            name: {
                "description": f"for {' and '.join(column.uses)}; {column.type}, or text that stands for it; null is missing"
            }
            for name, column in self._model.columns.items()
        }
        row = {"type": "object", "properties": columns, "required": list(columns)}
        score = {
            "type": "object",
            "properties": {f"score.{name}": {"type": ["number", "null"]} for name in self._model.outputs},
        }
        error = {"type": "object", "properties": {"error": {"type": "string"}}}
        words = {
            400: "no JSON",
            408: "the body came too slowly",
            413: "too many rows or bytes",
            422: "a column is missing, a value is of the wrong kind, or a scenario is not known",
            503: "too much to do, or the service is ending: try again",
        }
        return {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _list_of("rows", row)}},
            },
            "responses": {
                "200": {"description": "a row for each row", "content": _json_content(_list_of("scores", score))},
                **{str(status): {"description": text, "content": _json_content(error)} for status, text in words.items()},
            },
        }


def _list_of(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": item}}}


def _json_content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _error(status: int, message: str) -> Response:
    """An answer that says what is wrong. One to a body that was not read to its end closes the connection."""
    headers = {"retry-after": "1"} if status == 503 else {}
    if status in (408, 413):
        headers["connection"] = "close"
    return Response(json.dumps({"error": message}), status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """What the routes do not know: 404 and 405."""
    assert isinstance(error, HTTPException)
    known = "POST /score, GET /health, GET /metrics, GET /docs"
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}. There are {known}.")
