"""JSON files that guard themselves: beside its body such a file holds the body's crc32.

A file is intact only if it is exactly the text that its body renders to, so that no flipped bit,
not even in white space, goes unseen.
"""

import json
import zlib
from typing import Any


def seal(body: Any) -> bytes:
    """The file of a JSON-safe body; NaN and infinities are refused."""
    crc = zlib.crc32(json.dumps(body, sort_keys=True, allow_nan=False).encode())
    whole = {"body": body, "crc32": f"{crc:08x}"}
    return (json.dumps(whole, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()


def unseal(content: bytes) -> Any:
    """The body of a file.

    Raises:
      ValueError: it is not what `seal` made.
    """
    try:
        body = json.loads(content)["body"]
        intact = seal(body) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("its contents do not match its checksum")
    return body
