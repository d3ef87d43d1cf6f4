"""What the entry points share: user errors become one message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mmlrec.errors import UserError


def run(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError ends it with its message and exit code instead of a traceback.

    Under several ranks rank 0 speaks for all, and the others for themselves only when rank 0 has no part in it.
    """
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{prefix}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ImportError as error:
        from mmlrec.doctor import explain

        print(f"error: {error}\n{explain()}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
