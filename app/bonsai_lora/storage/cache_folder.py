"""The folder of copies of a bucket, as the supervisor sees it, which must not use the bucket."""

from pathlib import Path

KEPT = "kept"
"""Folder of the names of sets whose copies are kept."""

_OWNER = "bucket-url"


def claim(root: Path, url: str) -> None:
    """Make `root` the cache of the bucket at `url`.

    Raises ValueError if it is that of a different bucket, or a store, which must keep its files.
    """
    owner = root / _OWNER
    if owner.is_file():
        found = owner.read_text(encoding="utf-8").strip()
        if found != url:
            raise ValueError(
                f"the cache {root} is of the store {found}; choose a different folder with --cache"
            )
        return
    if (root / "sets").exists():
        raise ValueError(
            f"the cache {root} is the folder of a store; choose a different one with --cache"
        )
    root.mkdir(parents=True, exist_ok=True)
    owner.write_text(f"{url}\n", encoding="utf-8")


def release_all(root: Path) -> None:
    """Let all copies in the cache `root` make room again, as a service that starts keeps none."""
    for path in (root / KEPT).glob("*"):
        path.unlink(missing_ok=True)
