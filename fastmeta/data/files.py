"""Reading a file that may be gzipped, with complaints that name the file and the place."""

import gzip
import zlib
from pathlib import Path

_CHUNK = 1 << 20


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressing it where its name ends in `.gz`.

    **Raises:** `ValueError` for a damaged or truncated gzip file, with the number of bytes that
    could be decompressed.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    parts: list[bytes] = []
    try:
        with gzip.open(path) as file:
            while part := file.read(_CHUNK):
                parts.append(part)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        good = sum(map(len, parts))
        raise ValueError(
            f"{path}: damaged gzip file, after at least {good} decompressed bytes of what it "
            f"holds ({error}); {path.stat().st_size} bytes on disk. Fetch it again"
        ) from error
    return b"".join(parts)
