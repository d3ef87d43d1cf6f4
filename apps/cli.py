"""What the entry points share: user errors become one message and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

from mmlrec.errors import UserError

#: What gloo and NCCL say when the process on the other side of a collective is gone.
_LOST_PEER = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|Timed out waiting|remote process exited|NCCL")


def run(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError ends it with its message and exit code instead of a traceback.

    With several ranks each says its own; a rank that only lost its peers says so, and leaves the reason to them.
    """
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    try:
        main()
    except UserError as error:
        print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not _LOST_PEER.search(str(error)):
            raise
        print(f"{prefix}: another rank ended or cannot be reached; its own message tells why.", file=sys.stderr, flush=True)
        sys.exit(1)
    except ImportError as error:
        from mmlrec.doctor import explain

        print(f"error: {error}\n{explain()}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
