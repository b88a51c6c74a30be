"""How the files of an output folder were made: a small JSON file in it, so that --skip-existing keeps no others.

The file says which settings, and since when. Files that are older were made by an earlier run with others, and do not count as
there: neither what that run has left of other inputs, nor what a run that was to replace it did not come to.
"""

import json
import os
from pathlib import Path
from typing import Any

from cdiffset.errors import UserError

FILE_NAME = ".settings.json"


class Record:
    """The record of one folder as it is there, and the settings of now: a mapping of names to JSON values."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.is_written = False  # by this object, or found to be needless
        self.since_ns = 0  # files last changed earlier do not count
        self.is_there, self.changed = (folder / FILE_NAME).exists(), []
        if self.is_there:
            try:
                kept = json.loads((folder / FILE_NAME).read_text())
                before, self.since_ns = dict(kept["settings"]), int(kept["since_ns"])
            except (OSError, ValueError, LookupError, TypeError) as error:
                self.changed = [f"{FILE_NAME} is damaged ({error})"]
                return
            names = [name for name in self.settings if name in before]  # an earlier version may not have had all of them
            changed = [name for name in names if before[name] != self.settings[name]]
            self.changed = [f"{name}: {shortened(before[name])} -> {shortened(self.settings[name])}" for name in changed]

    def require_same(self) -> None:
        """For --skip-existing: refuse a folder of other settings; a note where it does not say."""
        if self.changed:
            raise UserError(
                f"{self.folder} holds files of other settings ({'; '.join(self.changed)}), which --skip-existing would keep: "
                f"choose another folder, or leave out --skip-existing to replace them"
            )
        if not self.is_there and self.has_files():
            print(f"note: {self.folder} has no record of how its files were made ({FILE_NAME}): they are kept as they are")

    def has_files(self) -> bool:
        return self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir())

    def has(self, file: Path) -> bool:
        """Whether a file is there and not older than the record."""
        try:
            return file.is_file() and file.stat().st_mtime_ns >= self.since_ns
        except OSError:  # a name that is too long
            return False

    def write(self, skip_existing: bool) -> None:
        """Before any output: have the folder say the settings of now, once. A record of the same settings stays.

        With `skip_existing` a folder that has files but no record gets none, since it could not hold for all of them.
        """
        if self.is_written:
            return
        self.is_written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        present = Record(self.folder, self.settings)  # another process of the same command may have written it meanwhile
        if present.is_there and not present.changed or skip_existing and present.has_files():
            return
        temporary = self.folder / f"{FILE_NAME}.{os.getpid()}"
        try:
            temporary.touch()
            since_ns = temporary.stat().st_mtime_ns  # by the clock that stamps the outputs
            temporary.write_text(json.dumps({"settings": self.settings, "since_ns": since_ns}, indent=2) + "\n")
            os.replace(temporary, self.folder / FILE_NAME)
        finally:
            temporary.unlink(missing_ok=True)


def shortened(value: Any) -> str:
    written = str(value)
    return written if len(written) <= 40 else f"{written[:12]}…"
