"""Mistakes of the user, told from faults of the program."""

import argparse
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake the user can mend; commands print it as one line and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake on the command line as every other one: in one line, without the usage of all options."""

    def error(self, message: str):
        raise UserError(message)


def run(main: Callable[..., int], argv: list[str] | None = None) -> int:
    """Exit code of `main(argv)`; a UserError becomes `error: <message>` on stderr and 2, Ctrl-C becomes 130."""
    try:
        return main(argv)
    except UserError as error:
        # A DataLoader worker hands over its whole traceback as the message; what was raised there stands last.
        message = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
        print("error:", " ".join(message.split("\n")).strip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
