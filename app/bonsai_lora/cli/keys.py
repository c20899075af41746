"""The commands that make, list and remove keys: they change the keys file, not a service."""

import argparse
import contextlib
import fcntl
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bonsai_lora.api.keys_file import (
    KeyEntry,
    KeysDocument,
    KeysFileError,
    LimitsEntry,
    QuotaEntry,
    read_keys,
)
from bonsai_lora.cli.output import failed, plain, print_table
from bonsai_lora.service.keys import SCOPES, digest_of, new_token
from bonsai_lora.settings import SettingsError, read_settings
from bonsai_lora.validation import expectation

_SPAN = re.compile(r"(\d{1,6})([dh])")
_HOURS = {"d": 24, "h": 1}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the commands below `keys`."""
    parser.description = "Make, list and remove the keys of a service."
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = _add(commands, "new", add_key, "make a key, print it once, and add it to the file")
    new.add_argument("--name", default="", help="what the key is for")
    new.add_argument(
        "--scope",
        action="append",
        choices=SCOPES,
        required=True,
        dest="scopes",
        help="what the key may do: read; apply (and merge); write (create, change, delete sets); "
        "pull (upload by reference); admin (metrics, and every name); repeatable",
    )
    new.add_argument(
        "--prefix",
        action="append",
        dest="prefixes",
        help="start of the names that it may use, ending in '.', '-' or '_'; repeatable (default: "
        "every name)",
    )
    new.add_argument("--expires", type=_time, help="when it expires: 90d, 12h, or a date")
    new.add_argument("--requests-per-second", type=float, help="most requests per second")
    new.add_argument("--rows-per-second", type=float, help="most rows applied per second")
    new.add_argument("--sets", type=int, help="most sets under its prefixes")
    new.add_argument("--bytes", type=int, help="most bytes of them, as float32")
    _add(commands, "ls", list_keys, "list the keys")
    remove = _add(commands, "rm", remove_key, "remove a key; running services notice at once")
    remove.add_argument("id", help="as `bonsai-lora keys ls` shows it")


def _add(commands: Any, name: str, action: Callable[..., int], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    parser.add_argument(
        "--keys-file", type=Path, help="the file (default: that of BONSAI_LORA_KEYS_FILE)"
    )
    parser.set_defaults(run=lambda arguments: _run(action, arguments))
    return parser


def _run(action: Callable[[Path, argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    try:
        return action(_path_of(arguments), arguments)
    except (KeysFileError, SettingsError, ValidationError, OSError) as error:
        return failed(_mistake(error) if isinstance(error, ValidationError) else plain(error))


def _mistake(error: ValidationError) -> str:
    """Return what is wrong with an argument."""
    first = error.errors()[0]
    text = expectation(first)
    if first["type"] == "value_error":  # names the value itself
        return text
    return f"--{str(first['loc'][0]).replace('_', '-')} is {first['input']!r}; {text}"


def _path_of(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.keys_file or read_settings().keys_file
    if path is None:
        raise KeysFileError("no keys file is named; add --keys-file FILE")
    return path.resolve()


def add_key(path: Path, arguments: argparse.Namespace) -> int:
    """Add a key to the file, which is made if there is none, and print it."""
    number, token = new_token()
    entry = KeyEntry(
        id=number,
        sha256=digest_of(token.encode()).hex(),
        name=arguments.name,
        scopes=list(dict.fromkeys(arguments.scopes)),
        prefixes=arguments.prefixes or [""],
        expires_at=arguments.expires,
        limits=LimitsEntry(
            rows_per_second=arguments.rows_per_second,
            requests_per_second=arguments.requests_per_second,
        ),
        quota=QuotaEntry(sets=arguments.sets, bytes=arguments.bytes),
    )
    with _locked(path.parent):
        known = read_keys(path).keys if path.exists() else []
        _write(path, KeysDocument(keys=[*known, entry]))
    print(token)
    print(f"added the key {number} to {path}; it is not shown again", file=sys.stderr)
    return 0


def list_keys(path: Path, _arguments: argparse.Namespace) -> int:
    """Print the keys without their secrets."""
    now = datetime.now(UTC)
    rows = []
    for one in read_keys(path).keys:
        expires = "never" if one.expires_at is None else one.expires_at.strftime("%Y-%m-%d %H:%M")
        expired = " (expired)" if one.expires_at is not None and one.expires_at <= now else ""
        prefixes = " ".join(prefix or "*" for prefix in one.prefixes)
        rows.append([one.id, one.name, " ".join(one.scopes), prefixes, expires + expired])
    print_table(["ID", "NAME", "SCOPES", "PREFIXES", "EXPIRES"], rows)
    return 0


def remove_key(path: Path, arguments: argparse.Namespace) -> int:
    """Remove a key from the file."""
    with _locked(path.parent):
        known = read_keys(path).keys
        kept = [one for one in known if one.id != arguments.id]
        if len(kept) == len(known):
            raise KeysFileError(
                f"{path} has no key {arguments.id!r}; bonsai-lora keys ls lists them"
            )
        _write(path, KeysDocument(keys=kept))
    return 0


def _write(path: Path, document: KeysDocument) -> None:
    """Replace the file atomically and durably, readable by its owner alone."""
    content = json.dumps(document.model_dump(mode="json", exclude_none=True), indent=2)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{content}\n")
            file.flush()
            os.fsync(file)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, so that no change is lost between two commands; make the change durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _time(text: str) -> datetime:
    """Return the time that `text` names: so many days or hours from now, or a date in UTC."""
    span = _SPAN.fullmatch(text)
    if span is not None:
        return datetime.now(UTC).replace(microsecond=0) + timedelta(
            hours=int(span[1]) * _HOURS[span[2]]
        )
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time; expected such as 90d, 12h or 2027-01-31"
        ) from None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    if time < datetime.now(UTC):
        raise argparse.ArgumentTypeError(f"{text!r} is in the past; name a later time")
    return time
