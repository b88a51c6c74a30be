"""How commands end: mistakes of the user, told from faults of the program, and runs that were asked to stop."""

import argparse
import io
import re
import sys
from collections.abc import Callable

from tqdm import tqdm

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with code 2."""


class Stopped(Exception):
    """A run that a signal asked to stop; commands print it as one line and exit with code STOPPED."""


class Skipped(dict):
    """{what could not be used: why}. Every entry is reported on stderr as it comes."""

    def add(self, item, reason: object) -> None:
        self[item] = str(reason)
        tqdm.write(f"skipped: {reason}", file=sys.stderr)


def message_of(error: UserError) -> str:
    """One line. A DataLoader worker hands over its whole traceback as the message; what was raised there stands last."""
    return " ".join(str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].split("\n")).strip()


def reason_of(error: OSError) -> str:
    """Why a folder cannot be written into: the system says of a file in its place only that it exists."""
    return "Not a directory" if isinstance(error, FileExistsError) else error.strerror or str(error)


class Parser(argparse.ArgumentParser):
    """Tells a mistake on the command line as every other one: in one line, without the usage of all options."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")  # so that -1,1 is a value, not an option

    def error(self, message: str):
        raise UserError(message)


def print_anything() -> None:
    """Let stdout and stderr escape what their encoding lacks, such as the arrows of a table in an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests and notebooks put in others
            stream.reconfigure(errors="backslashreplace")


def run(main: Callable[..., int], argv: list[str] | None = None) -> int:
    """Exit code of `main(argv)`; a UserError becomes `error: <message>` on stderr and 2, Stopped 75, Ctrl-C 130."""
    print_anything()
    try:
        return main(argv)
    except UserError as error:
        print("error:", message_of(error), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        return 130
