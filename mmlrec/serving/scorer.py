"""Requests to scores in one thread: those that wait while it works are scored together."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmlrec.errors import UserError
from mmlrec.serving.model import Model
from mmlrec.serving.rows import raw_table, scores_like

#: Requests that are scored together. Together they have no more bytes than one may have.
_MOST_TOGETHER = 64


class RequestError(UserError):
    """A request that is answered with an error.

    Args:
        status: of the answer, 4xx or 5xx.
        message: what is wrong, and what to do.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Scored(NamedTuple):
    """An answer: JSON text, and the number of its rows."""

    body: bytes
    num_rows: int


@dataclass
class _Waiting:
    body: bytes
    answer: Future[Scored] = field(default_factory=Future)

    def forget(self) -> None:
        """Let go of the body, which may be long."""
        self.body = b""


class Scorer:
    """JSON text `{"rows": [...]}` to `{"scores": [...]}`.

    A call of the model costs some milliseconds for a single row, most of them the same for many; so requests share them.

    Args:
        max_rows: of a request.
        max_bytes: of the requests that are scored together.
    """

    def __init__(self, model: Model, *, max_rows: int, max_bytes: int) -> None:
        self._model, self._max_rows, self._max_bytes = model, max_rows, max_bytes
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")

    def submit(self, body: bytes) -> Future[Scored]:
        """Scores of a request, as soon as they are there; who gives up waiting cancels it.

        The future's exception is a RequestError, or one that nobody foresaw.
        """
        waiting = _Waiting(body)
        waiting.answer.add_done_callback(lambda _: waiting.forget())  # one that nobody waits for stays in the row, empty
        self._waiting.append(waiting)
        self._thread.submit(self._score_waiting)
        return waiting.answer

    def _score_waiting(self) -> None:
        """Score what waits, up to the limits: nothing where an earlier call has taken it along."""
        tables: list[tuple[_Waiting, pa.Table]] = []
        size = 0
        while self._waiting and len(tables) < _MOST_TOGETHER:
            if tables and size + len(self._waiting[0].body) > self._max_bytes:
                break
            waiting = self._waiting.popleft()
            size += len(waiting.body)
            if not waiting.answer.set_running_or_notify_cancel():
                continue
            try:
                tables.append((waiting, self._table(waiting.body)))
            except Exception as error:  # given to the one who asked
                waiting.answer.set_exception(_as_request_error(error))
        alike: dict[pa.Schema, list[tuple[_Waiting, pa.Table]]] = {}
        for waiting, table in tables:
            alike.setdefault(table.schema, []).append((waiting, table))
        for group in alike.values():
            self._score(group)

    def _score(self, group: list[tuple[_Waiting, pa.Table]]) -> None:
        """Score requests whose columns have the same types; where that fails, each alone, so that its own rows are named."""
        try:
            scores = self._model.score_table(pa.concat_tables([table for _, table in group]))
        except Exception as error:  # given to the one who asked
            if len(group) == 1:
                group[0][0].answer.set_exception(_as_request_error(error))
            else:
                for alone in group:
                    self._score([alone])
            return
        start = 0
        for waiting, table in group:
            stop = start + table.num_rows
            waiting.answer.set_result(Scored(self._answer(scores[start:stop]), stop - start))
            start = stop

    def _table(self, body: bytes) -> pa.Table:
        """Raw rows of a request."""
        content = _json(body)
        rows = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise RequestError(422, 'the body must be an object with a list of rows: {"rows": [{...}, ...]}. /docs shows one.')
        if len(rows) > self._max_rows:
            raise RequestError(
                413, f"{len(rows):,} rows are more than {self._max_rows:,}, the most of a request: send several."
            )
        return raw_table(rows, self._model.columns)

    def _answer(self, scores: NDArray[np.float32]) -> bytes:
        """JSON text of scores. What is no number, such as where a task has no head for a row's scenario, is null."""
        rows: list[dict[str, Any]] = scores_like([], self._model.outputs, scores)
        if not np.isfinite(scores).all():
            rows = [{name: score if math.isfinite(score) else None for name, score in row.items()} for row in rows]
        return json.dumps({"scores": rows}, allow_nan=False).encode()


def _as_request_error(error: Exception) -> Exception:
    if isinstance(error, UserError) and not isinstance(error, RequestError):
        return RequestError(422, str(error))
    return error


def _json(body: bytes) -> Any:
    try:
        return json.loads(body, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise RequestError(400, "the body is nested too deeply.") from error
    except ValueError as error:
        raise RequestError(
            400, f'the body is no JSON: {error}. Send {{"rows": [{{...}}, ...]}}; /docs shows an example.'
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key '{twice[:80]}' twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON: write null for a missing value")
