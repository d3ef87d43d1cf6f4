"""What a service has done, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Upper bounds of the histogram's buckets, in seconds.
_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counts since the start, of requests to score. Written and read by the thread of the event loop only."""

    def __init__(self) -> None:
        self._statuses: Counter[int] = Counter()
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0
        self._rows = 0

    def answered(self, status: int, seconds: float) -> None:
        """Count a request by the status of its answer.

        Args:
            seconds: from its head, received, to the head of its answer.
        """
        self._statuses[status] += 1
        self._buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def scored(self, num_rows: int) -> None:
        """Count the rows of a request that is answered with scores."""
        self._rows += num_rows

    def text(self) -> str:
        """All of it."""
        lines = _head("mmlrec_requests_total", "counter", "Requests to score, by the status of their answers.")
        lines += [f'mmlrec_requests_total{{status="{status}"}} {count}' for status, count in sorted(self._statuses.items())]
        lines += _head("mmlrec_errors_total", "counter", "Requests to score that were answered with an error, 4xx or 5xx.")
        lines.append(f"mmlrec_errors_total {sum(count for status, count in self._statuses.items() if status >= 400)}")
        lines += _head("mmlrec_rows_total", "counter", "Rows that were scored.")
        lines.append(f"mmlrec_rows_total {self._rows}")
        lines += _head("mmlrec_request_seconds", "histogram", "Seconds from the head of a request to that of its answer.")
        total = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._buckets, strict=True):
            total += count
            lines.append(f'mmlrec_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"mmlrec_request_seconds_sum {self._seconds}", f"mmlrec_request_seconds_count {total}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
