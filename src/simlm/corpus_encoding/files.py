"""Files on a disk or in an object store, through one interface (pyarrow's)."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs

from simlm.errors import DataError


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address or path, and the path in it.

    s3://, gs://, hdfs://, abfs:// and file:// are addresses, anything else is a path. Raises DataError for an address that is none, or has
    a password in it, which would be kept in the output.
    """
    if "://" not in address:
        return fs.LocalFileSystem(), str(Path(address).expanduser().resolve())
    if urlsplit(address).password:
        raise DataError(
            f"{address.split('://', 1)[0]}://...: an address with a password; give credentials as the store's own tools take them"
        )
    try:
        found, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{address}: not an address that can be read ({error}); s3://, gs://, hdfs://, file:// or a path was expected"
        ) from None
    return found, path
