"""What the entry points share: user errors become one message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from mmlrec.errors import UserError, discard_output
from mmlrec.terminal import plain_output


def run(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError ends it with its message and exit code instead of a traceback.

    Of several ranks that fail together one speaks.
    """
    with plain_output():
        code = _exit_code(main)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written and closed. Threads of the communication library, which Python cannot join, now and then abort a
        # process that tears itself down ("terminate called without an active exception"): a run that is done would fail.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option `--import`; `mmlrec.extensions.import_modules(arguments.imports)` does what it says."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="package.module",
        help="a module with a method or strategy that is not part of mmlrec; may be repeated",
    )


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except UserError as error:
        told = os.environ.get("LOCAL_RANK", "0") != "0" if error.told is None else error.told
        if not told:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror}. Free space, or choose another folder.", file=sys.stderr)
        return 2
    except ImportError as error:
        from mmlrec.doctor import explain

        print(f"error: {error}\n{explain()}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
