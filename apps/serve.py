"""Scores over HTTP, from an exported model.

python -m apps.serve --model MODEL
"""

from __future__ import annotations

import argparse

from apps.cli import run
from mmlrec.errors import UserError
from mmlrec.paths import local_path


def parse() -> argparse.Namespace:
    """Command line of this entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.serve",
        description="Answer POST /score with the scores of raw rows; GET /health, /metrics (Prometheus), /docs. Ends cleanly at"
        " SIGTERM: what was asked is answered.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m apps.serve --model model --port 8080",
    )
    parser.add_argument("--model", type=local_path, required=True, help="folder that apps.export has written")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="0: a free one, which is printed (default: %(default)s)")
    parser.add_argument("--threads", type=_count, help="cores that one call of the network may use (default: all)")
    parser.add_argument("--max-rows", type=_count, default=10_000, help="of a request (default: %(default)s)")
    parser.add_argument("--max-bytes", type=_count, default=16 << 20, help="of a request (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=10.0,
        help="seconds for a request to arrive, for it to be scored, and for its answer to be taken (default: %(default)g)",
    )
    return parser.parse_args()


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return seconds


def main() -> None:
    """Load, score the example of the card, listen, serve."""
    arguments = parse()
    try:
        from mmlrec.serving.server import listen, serve
        from mmlrec.serving.service import Limits, Service
    except ImportError as error:
        raise UserError(f"serving needs packages that are not installed ({error}): pip install 'mmlrec[serve]'") from error
    from mmlrec.serving.model import load

    model = load(arguments.model, threads=arguments.threads)
    model.score([model.example()])
    service = Service(model, Limits(arguments.max_rows, arguments.max_bytes, arguments.timeout))
    with listen(arguments.host, arguments.port) as listening:
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"ready: http://{host}:{port}/docs shows how to score rows", flush=True)
        serve(service, listening, arguments.timeout)


if __name__ == "__main__":
    run(main)
