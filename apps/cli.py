"""What the entry points share: user errors become one message and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from mmlrec.errors import RankError, UserError, discard_output
from mmlrec.terminal import plain, plain_output

#: What a disk, a file server or a network says that fails, and that a later start, or one elsewhere, may not meet.
_MAY_PASS = {
    errno.EIO,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
}
_FREE_SPACE = "Free space, or choose another folder."
#: What an OSError without a number says where a library of a package lacks another one, such as the driver's, or does not fit.
_NOT_LOADED = re.compile("shared object file|load this library|undefined symbol")


def run(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError ends it with its message and exit code instead of a traceback.

    Of several ranks that fail together one speaks. Garbage is collected from `all_imported()` on, if main calls it.
    """
    _end_with_agent()
    share_cores(os.environ)
    gc.disable()
    try:
        with plain_output():
            code = _exit_code(main)
    finally:
        gc.enable()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written and closed. Threads of the communication library, which Python cannot join, now and then abort a
        # process that tears itself down ("terminate called without an active exception"): a run that is done would fail.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def all_imported() -> None:
    """Collect garbage from here on, and leave what was imported out of it.

    None of that is garbage, and looking for some takes a fifth of the time that the imports of torch and torchrec take.
    """
    gc.freeze()
    gc.enable()


class Parser(argparse.ArgumentParser):
    """A command line with `key.path=value`: keys that are given like options get the right word."""

    def error(self, message: str) -> NoReturn:
        """As the base class, with how keys are written where one stands among the arguments that are no options."""
        keys = [word for word in message.split() if re.match(r"--?[A-Za-z_]\w*(\.\w+)+(=|$)|--[A-Za-z_]\w*=", word)]
        if message.startswith("unrecognized arguments") and keys:
            written = " ".join(word.lstrip("-") if "=" in word else f"{word.lstrip('-')}=VALUE" for word in keys)
            message += f". Keys of the configuration have no dashes and an equals sign: {written}"
        super().error(message)


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


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """What is no option: changes of the configuration, for `parse_intermixed_args`."""
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override configuration keys")


def check_replaced(path: Path, is_own: Callable[[Any], bool]) -> None:
    """Refuse to replace a file, unless it is empty or holds JSON of the kind that the command writes there.

    Args:
        is_own: of what the file holds.

    Raises:
        UserError: it is something else.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        known = is_own(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        known = False
    if not known:
        raise UserError(f"{path} is there, and this command has not written it: it is not replaced. Name another file.")


def _end_with_agent() -> None:
    """Have the kernel kill this rank when the torchrun that started it is killed.

    Without it a rank would train on, unseen, beside the run that takes its place. Not without an agent: there a parent, such
    as a shell, may end before the run.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() == 1 and not _is_agent(Path("/proc/1/cmdline")):
        print("error: the torchrun that started this rank has ended already.", file=sys.stderr, flush=True)
        os._exit(1)


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Have threads that wait for each other let go of their core soon, in processes that import torch in this environment.

    GNU's OpenMP, which torch uses on CPU, turns in a loop for milliseconds at the end of every operation before it sleeps.
    Where another program needs the core, threads wait like that for one that is not running, at each of thousands of
    operations: a training took ten times its processor time on a machine that was shared. A loop of this length costs no
    speed on a machine of its own. What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "10000")


def _is_agent(command: Path) -> bool:
    """Whether a command line ends with the arguments of this one: a torchrun, which is process 1 in some containers."""
    own = [argument.encode() for argument in sys.argv[1:]]
    return not own or command.read_bytes().rstrip(b"\0").split(b"\0")[-len(own) :] == own


def _exit_code(main: Callable[[], None]) -> int:
    try:
        main()
    except UserError as error:
        if not _told(error, os.environ.get("LOCAL_RANK", "0") != "0"):
            trace = "".join(traceback.format_exception(error.__cause__)) if isinstance(error, RankError) else ""
            if not _leave_to_agent(trace or str(error)) and error.__cause__:
                sys.stderr.write(trace)
            print(f"error: {error}" if error.is_error else error, file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        discard_output()
    except OSError as error:
        if error.errno is None and _NOT_LOADED.search(str(error)):
            return _wrong_installation(error)
        passes = error.errno in _MAY_PASS
        if not _told(error, False):
            remedy = "Look after the disk or the server, then run the same command again." if passes else _FREE_SPACE
            message = f"{error.filename or 'a file'}: {error.strerror or error}. {remedy}"
            _leave_to_agent(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        return 1 if passes else 2
    except ImportError as error:
        return _wrong_installation(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _wrong_installation(error: Exception) -> int:
    """Print that a package cannot be imported, and what is known of why; the exit code."""
    if not _told(error, False):
        from mmlrec.doctor import explain

        print(f"error: {error}\n{explain()}", file=sys.stderr, flush=True)
    return 3


def _told(error: Exception, before_the_ranks_met: bool) -> bool:
    """Whether another rank prints it, as `process_group` has found; the second argument where it has not seen the error."""
    told: bool | None = getattr(error, "told", None)
    return before_the_ranks_met if told is None else told


def _leave_to_agent(text: str) -> bool:
    """Write why this rank ends to where torchrun looks for it, which prints it in its summary; False without torchrun.

    The form is that of torch.distributed.elastic.multiprocessing.errors, whose import takes longer than all else here.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    text = plain(text)  # which torchrun prints as it is
    content = {"message": {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    except OSError:
        return False
    return True
