"""Errors a user can mend: one line on stderr, exit code 2, no traceback."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
# A disk is the user's to mend: full, over quota, over a limit on file sizes, read-only.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class UserError(ValueError):
    """What is wrong, what is allowed, and how to mend it, in one line.

    Raise it for anything a user can cause (a key, a file, a mesh); use `assert` for our own
    invariants. `run_main` turns it into one line on stderr and exit code 2.
    """


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns ` did you mean 'x'?` for the closest allowed word, or '' when nothing is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" did you mean '{close[0]}'?" if close else ""


def some(names: Iterable[str]) -> str:
    """The first few names of a list that may be long: `a, b, c and 7 more`."""
    names = list(names)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Runs an absl `main(argv)`, ending with exit code 2 and one line on a `UserError`.

    A wrong command-line flag and a full or read-only disk end in the same way.
    """
    from absl import app, flags, logging

    def parsed(argv: list[str]) -> list[str]:
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_report(error))

    def guarded(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
        try:
            return main(argv)
        except UserError as error:
            return _report(error)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            file = error.filename or "a file"
            return _report(
                f"{file} cannot be written ({error.strerror}); mend that and run the same command "
                f"again, which continues from what is complete"
            )

    app.run(guarded, flags_parser=parsed)


def _report(error: Exception | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
