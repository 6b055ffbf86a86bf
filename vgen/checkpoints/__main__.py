"""`python -m vgen.checkpoints`."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path

from vgen.checkpoints import names, resolve
from vgen.errors import UsageError, VgenError
from vgen.integrity import describe_files


def _main(arguments: list[str]) -> int:
    """Print the `files:` block of a name's or folder's files: `python -m vgen.checkpoints hash NAME_OR_FOLDER`."""
    if len(arguments) != 2 or arguments[0] != "hash":
        print("usage: python -m vgen.checkpoints hash NAME_OR_FOLDER", file=sys.stderr)
        return UsageError.exit_code
    try:
        folder = resolve(arguments[1]).folder if arguments[1] in names() else Path(arguments[1])
        if folder is None or not folder.is_dir():
            raise UsageError(f"There is no folder {folder or arguments[1]}.")
        found = describe_files(folder)
    except VgenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("    files:")
    for file in found:
        values = ", ".join(f"{field.name}: {json.dumps(getattr(file, field.name))}" for field in fields(file))
        print(f"      - {{{values}}}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
