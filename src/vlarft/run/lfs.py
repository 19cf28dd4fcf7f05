"""Git-lfs pointers: the short texts that stand for large files in a repository that was cloned without git-lfs."""

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str | Path) -> None:
    """Raise ValueError if the file at `path` is a git-lfs pointer; the message says how to get its content."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file's content: the repository was cloned without git-lfs; run "
                "git lfs install, then git lfs pull in it"
            )
