"""The `verify` command: read set files and compare their tensors with what was written."""

import argparse
from functools import partial
from pathlib import Path

from bonsai_lora.cli.output import EXIT_REFUSED, failed
from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.cli.store import add_store, not_a_store, store_of
from bonsai_lora.errors import BonsaiLoraError, SetNotFoundError
from bonsai_lora.settings import is_bucket
from bonsai_lora.storage.store import SetStore
from bonsai_lora.storage.verify import OnPiece


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Read set files and compare the SHA-256 of their tensors with what was written. A file "
        "that differs is moved to the folder `bad` of the store, which a running service may use. "
        "The blobs of a bucket are downloaded, and left where they are. "
        "The exit code is 1 if a set is bad or missing, and 2 if there is no store."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="sets (default: all)")
    parser.add_argument(
        "--rebuild",
        action="store_true",
        help="make the index of the sets again from the files, and verify nothing",
    )
    add_store(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify the named sets, or all; print a line for each, and return the exit code."""
    place = store_of(arguments)
    if is_bucket(place):
        return _run_bucket(place, arguments)
    folder = Path(place)
    if not (folder / "sets").is_dir():
        return not_a_store(folder)
    store = SetStore(folder)
    if arguments.rebuild:
        store.listing.rebuild()
        print(f"{len(store.records()):,} sets")
        return 0
    names = arguments.names or store.list_names()
    sizes = {name: _size_of(folder, name) for name in names}
    with ProgressLine() as progress:
        read = partial(progress.advance, sum(sizes.values()))
        results = {name: _verify(store, name, read) for name in names}
    width = max(map(len, names), default=0)
    for name, (_, text) in results.items():
        print(f"{name:<{width}}  {sizes[name]:>14,} B  {text}")
    return 0 if all(is_sound for is_sound, _ in results.values()) else EXIT_REFUSED


def _run_bucket(place: str, arguments: argparse.Namespace) -> int:
    from bonsai_lora.cli.bucket import verify_bucket  # noqa: PLC0415 - optional

    if arguments.rebuild:
        return failed("the index of a bucket is made by bonsai-lora gc; leave out --rebuild")
    return verify_bucket(place, arguments.names)


def _verify(store: SetStore, name: str, on_piece: OnPiece) -> tuple[bool, str]:
    """Return whether a set is sound, and the result as text."""
    try:
        record = store.verify(name, on_piece)
        store.read(name)  # checks the tensors of a file without a digest
    except SetNotFoundError:
        reason = store.bad_files().get(name)
        return False, "missing" if reason is None else f"bad: {reason}"
    except BonsaiLoraError as error:  # written by a newer release, or too many open files
        return False, f"not verified: {error.detail}"
    return True, "ok" if record.digest is not None else "ok, but written without a digest"


def _size_of(folder: Path, name: str) -> int:
    try:
        return (folder / "sets" / f"{name}.safetensors").stat().st_size
    except OSError:
        return 0
