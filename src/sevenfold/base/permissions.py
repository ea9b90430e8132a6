"""Whose a run's folder is, and who may write in it: seen before anything is done there."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from sevenfold.base.errors import UsageError

log = logging.getLogger(__name__)

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_own(folder: Path) -> None:
    """Refuse a run folder that is somebody else's or cannot be written; warn of open doors.

    What lies in a run is believed if its own manifests agree, so whoever may write there decides
    what comes out. The superuser, who in a container often works in a folder of the host's user,
    is only warned.

    Errors:
        UsageError: the folder has another owner, or it or a folder in it cannot be written.
    """
    found = folder.stat()
    if found.st_uid != os.geteuid():
        problem = f"{folder}: belongs to user {found.st_uid}, not to you ({os.geteuid()})"
        if os.geteuid() != 0:
            raise UsageError(f"{problem}; choose another folder with --run, or have it given over")
        log.warning("%s, who can change what comes out of this run", problem)
    elif found.st_mode & OTHERS_WRITE:
        log.warning(
            "%s: others may write in it (mode %03o), so they can change what comes out; "
            "chmod go-w keeps them out",
            folder,
            stat.S_IMODE(found.st_mode),
        )
    # Two levels are where the steps write: data/packed, sft/model.
    for place in (folder, *folder.glob("*/"), *folder.glob("*/*/")):
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise UsageError(
                f"{place}: cannot be written; give yourself the right to, or choose another "
                "folder with --run"
            )
