"""Lines of JSONL files, with an error of one line for what cannot be read."""

import glob
from pathlib import Path

from dsv3_jax.errors import UserError


def read_lines(key: str, path: str) -> list[str]:
    """The lines that are not blank, of a file, of a folder's *.jsonl files or of a glob's.

    Args:
      key: the setting that holds `path`, for error messages.

    Raises:
      UserError: there is no such file, or one cannot be read.
    """
    given = Path(path).expanduser()
    pattern = given / "*.jsonl" if given.is_dir() else given
    files = sorted(glob.glob(str(pattern)))
    if not path or not files:
        raise UserError(f"{key}={path!r} names no file; give a JSONL file, a folder or a glob")
    lines = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}: {file} cannot be read ({error}); give UTF-8 text") from error
        # Not splitlines(): JSON may hold other line ends, such as U+2028, as they are.
        lines += [line for line in text.split("\n") if line.strip()]
    return lines
