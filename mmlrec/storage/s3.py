"""s3fs, with a retry around every request, errors that name the address, and nothing remembered of listings.

Server, region and keys come from where botocore takes them: AWS_* variables, AWS_ENDPOINT_URL_S3, ~/.aws, the machine's role.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import time
from typing import Any

import aiohttp
import fsspec
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from mmlrec.errors import StorageError

#: How long a lost connection is tried again. Below `training.timeout`, or the other ranks give up first.
SECONDS = "MMLREC_STORAGE_SECONDS"
_DEFAULT_SECONDS = 60.0
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0

_LOST = (
    HTTPClientError,
    ConnectionError,
    IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
    OSError,
)
_BUSY = {"SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "Throttling", "TooManyRequests"}
_DOING = {
    "get_object": "reading",
    "head_object": "looking for it",
    "head_bucket": "looking for it",
    "list_objects_v2": "listing",
    "delete_object": "deleting",
    "delete_objects": "deleting",
    "copy_object": "copying",
}
_REFUSED_REMEDY = "Look at the address, and at the keys and the server that AWS_* variables or ~/.aws name"


def register() -> None:
    """Make this the file system of s3:// in this process."""
    fsspec.register_implementation("s3", RetryingS3, clobber=True)
    logging.getLogger("asyncio").addFilter(_is_not_of_a_lost_connection)


def _is_not_of_a_lost_connection(record: logging.LogRecord) -> bool:
    """False for what asyncio prints of a task of aiohttp that nobody waits for: the request itself tells that it is lost."""
    return not (record.exc_info and isinstance(record.exc_info[1], aiohttp.ClientError | ConnectionError))


class RetryingS3(S3FileSystem):
    """All requests of s3fs pass through `_call_s3`; the bodies of answers are read there, too, so that they are tried again.

    Not to be used across a fork: fsspec raises.
    """

    protocol = "s3"
    retries = 1  # of s3fs itself, which knows neither a refused connection nor most answers of a busy server

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"use_listings_cache": False, **options})

    async def _call_s3(self, method: str, *more: Any, **arguments: Any) -> Any:
        """Send a request until it is answered.

        Raises:
            FileNotFoundError: there is no such object.
            FileExistsError: there is one, and `IfNoneMatch` forbids it.
            StorageError: the store refuses, or was not reached for `MMLREC_STORAGE_SECONDS`.
        """
        patience = _patience()
        began, tries, wait = time.monotonic(), 0, _FIRST_WAIT
        while True:
            tries += 1
            try:
                answer = await super()._call_s3(method, *more, **arguments)
                if method == "get_object":
                    async with answer["Body"] as body:
                        answer["Body"] = _Body(await body.read())
                if failed := answer.get("Errors"):
                    raise StorageError(f"{self._what(method, arguments)}: {failed[0].get('Message', failed[0])}.")
                return answer
            except Exception as error:
                cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
                if not _is_lost(cause):
                    named = self._named(cause, error, method, arguments)
                    if named is error:
                        raise
                    raise named from cause
                seconds = time.monotonic() - began
                if seconds >= patience:
                    raise StorageError(
                        f"{self._what(method, arguments)}: {_text(cause)} Tried {tries} times in {seconds:.0f} s. Look whether"
                        f" the server can be reached from here, then start again; {SECONDS} sets how long it is tried.",
                        lost=True,
                    ) from cause
            await asyncio.sleep(min(wait * random.uniform(0.5, 1), patience - seconds))  # not all ranks at once
            wait = min(2 * wait, _LONGEST_WAIT)

    def _what(self, method: str, arguments: dict[str, Any]) -> str:
        """Address, what was being done, and where."""
        key = arguments.get("Key", arguments.get("Prefix", ""))
        if "Delete" in arguments:
            key = arguments["Delete"]["Objects"][0]["Key"]
        address = "/".join(part for part in (f"s3://{arguments.get('Bucket', '')}", key) if part)
        server = self._s3.meta.endpoint_url if self._s3 is not None else "the server that botocore is configured for"
        server = re.sub(r"//[^/@]*@", "//", server)
        return f"{address}: {_DOING.get(method, 'writing')} failed at {server}"

    def _named(self, cause: BaseException, error: Exception, method: str, arguments: dict[str, Any]) -> BaseException:
        code = cause.response.get("Error", {}).get("Code", "") if isinstance(cause, ClientError) else ""
        if code in ("PreconditionFailed", "412") and "IfNoneMatch" in arguments:
            return FileExistsError(f"s3://{arguments['Bucket']}/{arguments['Key']}")
        if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
            return error
        setting_up = self._s3 is None and isinstance(cause, ValueError)  # of what a variable holds
        if code or setting_up or isinstance(cause, BotoCoreError):
            return StorageError(f"{self._what(method, arguments)}: {_text(cause)} {_REFUSED_REMEDY}.")
        return error

    async def _exists(self, path: str, **options: Any) -> bool:
        """Unlike in s3fs, a store that does not answer does not say no."""
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    async def _isfile(self, path: str) -> bool:
        """As `_exists`."""
        try:
            return (await self._info(path))["type"] == "file"
        except FileNotFoundError:
            return False

    async def _mkdir(self, path: str, *options: Any, **more: Any) -> None:
        """Nothing: a folder is there while something lies below it. s3fs would make a bucket of a mistyped name."""

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As `_mkdir`."""

    # s3fs wraps its own before this class is there.
    call_s3 = sync_wrapper(_call_s3)
    exists = sync_wrapper(_exists)
    mkdir = sync_wrapper(_mkdir)
    makedirs = sync_wrapper(_makedirs)


def _patience() -> float:
    text = os.environ.get(SECONDS, str(_DEFAULT_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise StorageError(f"{SECONDS}={text}: a number of seconds is needed.") from None


def _is_lost(cause: BaseException) -> bool:
    if isinstance(cause, ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or cause.response.get("Error", {}).get("Code") in _BUSY
    if isinstance(cause, FileNotFoundError | FileExistsError | PermissionError | StorageError):
        return False
    return isinstance(cause, _LOST)


def _text(cause: BaseException) -> str:
    text = str(cause).strip() or type(cause).__name__
    return text if text.endswith(".") else f"{text}."


class _Body:
    """The body of an answer that has been read, as s3fs reads it."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    async def read(self, size: int = -1) -> bytes:
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def close(self) -> None:
        self._rest = b""
