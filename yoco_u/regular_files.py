"""Reading files whole, unless they are pipes, sockets or devices, whose reader waits for ever or never comes to an end."""

import os
import stat
from pathlib import Path

from yoco_u.errors import UserError

SPECIAL = "pipe, socket or device"
"""What a path is that is neither a file nor a folder, in words."""


def read_regular(path: Path) -> bytes:
    """The bytes of a file. Every small file of a run, a dataset or a model, and of a user's texts, is read by this function.

    Raises:
        UserError: if there is a pipe, a socket or a device.
        OSError: if it cannot be read.
    """
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Check that a path is no pipe, socket or device.

    Raises:
        UserError: if it is one.
        OSError: if nothing is there, or it cannot be looked at.
    """
    kind = path.stat().st_mode
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise UserError(f"{path}: is a {SPECIAL}, expected a regular file; move it elsewhere, or name a file")


def check_regular_files(place: Path) -> None:
    """Check that a path, and if it is a folder what is in it, is no pipe, socket or device, before a library reads it.

    Links that lead nowhere, and a path at which nothing is, are no business of this.

    Raises:
        UserError: if one is; it names the first.
        OSError: if the folder cannot be listed.
    """
    for path in (place, *(sorted(place.iterdir()) if os.path.isdir(place) else ())):
        if os.path.exists(path):  # false, unlike a Path's, of a name that no file can have
            check_regular(path)
