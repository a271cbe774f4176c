"""Remove old backups, and the copies of blobs that only they need."""

import shutil
from pathlib import Path

from ops.backup.backup_folder import BLOBS, PARTIAL, Backup, complete_backups, copies_in, only_user


def prune(folder: Path, *, keep: int) -> tuple[int, int]:
    """Keep the newest `keep` complete backups. Return the number of removed backups, and of removed copies of blobs.

    Raises:
        BackupError: a kept backup cannot be read, or another command works in the folder. Nothing is removed then.
    """
    with only_user(folder):
        return _prune(folder, complete_backups(folder), keep)


def _prune(folder: Path, backups: list[Backup], keep: int) -> tuple[int, int]:
    kept = backups[-keep:]
    needed = {entry.key for backup in kept if backup.manifest().copied for entry in backup.entries()}
    old = [backup.path for backup in backups[:-keep]]
    old += [path for path in folder.iterdir() if path.name.endswith(PARTIAL)]
    for path in old:
        shutil.rmtree(path)
    if not (folder / BLOBS).is_dir():
        return len(old), 0
    copies = copies_in(folder)
    unneeded = [info.key for info in copies.list("") if info.key not in needed]
    for key in unneeded:
        copies.delete(key)
    return len(old), len(unneeded)
