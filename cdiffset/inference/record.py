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


class OutputRecord:
    """The settings of this run, JSON values by name, beside the record that a folder has, if any.

    With `skip_existing` UserError where the folder holds files of others.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], skip_existing: bool):
        self.folder, self.settings, self.skip_existing = folder, json.loads(json.dumps(settings)), skip_existing
        self.is_written = False  # by this object, or found to be needless
        is_there, changes, self.since_ns = self.compare()
        if skip_existing and changes:
            raise UserError(
                f"{folder} holds files of other settings ({'; '.join(changes)}), which --skip-existing would keep: "
                f"choose another folder, or leave out --skip-existing to replace them"
            )
        if skip_existing and not is_there and self.has_files():
            print(f"note: {folder} has no record of how its files were made ({FILE_NAME}): they are kept as they are")

    def compare(self) -> tuple[bool, list[str], int]:
        """=> (whether the folder has a record, how its settings differ, since when files count in ns)."""
        try:
            content = json.loads((self.folder / FILE_NAME).read_text())
            before, since_ns = dict(content["settings"]), int(content["since_ns"])
        except (FileNotFoundError, NotADirectoryError):
            return False, [], 0
        except (OSError, ValueError, LookupError, TypeError) as error:
            return True, [f"{FILE_NAME} is damaged ({error})"], 0
        names = [name for name, value in self.settings.items() if name in before and before[name] != value]
        return True, [f"{name}: {shortened(before[name])} -> {shortened(self.settings[name])}" for name in names], since_ns

    def has_files(self) -> bool:
        return self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir())

    def has(self, file: Path) -> bool:
        """Whether a file is there and not older than the record."""
        try:
            return file.is_file() and file.stat().st_mtime_ns >= self.since_ns
        except OSError:  # a name that is too long
            return False

    def write(self) -> None:
        """Before any output: put the settings of this run into the folder, once. A record of the same settings stays.

        With `skip_existing` a folder that has files but no record gets none, since it could not hold for all of them.
        """
        if self.is_written:
            return
        self.is_written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        is_there, changes, _ = self.compare()  # again: another process of the same command may have written it meanwhile
        if is_there and not changes or self.skip_existing and self.has_files():
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
