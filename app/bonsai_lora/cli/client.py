"""The commands that talk to a running service: a thin layer over `bonsai_lora.client`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.client.blocking import Client
from bonsai_lora.client.call import Call, decode_json, path_of
from bonsai_lora.client.connection import DEFAULT_URL, TOKEN_VARIABLE, URL_VARIABLE, url_of
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.formats.names import is_set_name

EXIT_REFUSED = 1
"""The service refused."""
EXIT_USAGE = 2
"""The arguments are wrong, or a file cannot be read."""
EXIT_UNREACHABLE = 3
"""No service answers."""

EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_CLOSED = 141
"""Standard output was closed, as by `| head`."""

_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*)")
"""A header field (RFC 9110 section 5.1)."""


class UsageError(ValueError):
    """The arguments are wrong; the message is one line."""


def add_commands(commands: Any) -> None:
    """Add every client command with its arguments."""
    _add(commands, "ls", list_sets, "list the sets")
    show = _add(commands, "show", show_set, "show a set and its modules")
    show.add_argument("name")
    stats = _add(commands, "stats", show_stats, "show statistics of a set, or of all")
    stats.add_argument("name", nargs="?")
    remove = _add(commands, "rm", remove_set, "delete a set")
    remove.add_argument("name")
    push = _add(commands, "push", push_set, "upload a PEFT adapter folder as a set")
    push.add_argument("name")
    push.add_argument(
        "folder", type=Path, help="holds adapter_config.json and adapter_model.safetensors"
    )
    apply = _add(
        commands, "apply", apply_set, "apply a module to vectors, JSON from a file or stdin"
    )
    apply.add_argument("name")
    apply.add_argument("module")
    apply.add_argument("file", nargs="?", help="a list of vectors; default, or -: stdin")
    fetch = _add(commands, "pull", pull_model, "download a merged model, or a set as a PEFT folder")
    fetch.add_argument("model", help="BASE/SET, or adapters/SET")
    fetch.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    fetch.add_argument("--jobs", type=int, default=4, help="files at a time (4)")


def _add(commands: Any, name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"{TOKEN_VARIABLE}, if set, is sent as `Authorization: Bearer TOKEN`.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"of the service (default: {URL_VARIABLE}, or {DEFAULT_URL})")
    where.add_argument("--uds", metavar="PATH", help="Unix socket of the service")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="send a header with each request; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=_guarded(run))
    return parser


def _header(text: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a header, such as 'X-Team: search'")
    return match[1], match[2]


def _guarded(run: Callable[[Client, argparse.Namespace], Any]) -> Callable[..., int]:
    """Return a command that reports errors in one line and returns an exit code."""

    def guarded(arguments: argparse.Namespace) -> int:
        address = f"unix:{arguments.uds}" if arguments.uds else url_of(arguments.url)
        try:
            headers = dict(arguments.header)
            with Client(arguments.url, uds=arguments.uds, headers=headers) as client:
                answer = run(client, arguments)
            if arguments.json and answer is not None:
                print(json.dumps(answer, indent=1))
            sys.stdout.flush()
        except BrokenPipeError:
            # The rest of the output is discarded, or Python complains when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again if unexpected
            code, text = _report(error, address)
            print(f"bonsai-lora: {text}", file=sys.stderr)
            return code
        return 0

    return guarded


def _report(error: BaseException, address: str) -> tuple[int, str]:
    """Return the exit code and the message for a failure; raise an unexpected one again."""
    match error:
        case BonsaiLoraError():
            return EXIT_REFUSED, f"{error.detail} [{error.code}]"
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case KeyError() | TypeError() | httpx.DecodingError():
            return EXIT_UNREACHABLE, f"{address} answers, but not as this service: {error!r}"
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return EXIT_USAGE, f"{address!r} is not the URL of a service, such as {DEFAULT_URL}"
        case httpx.TransportError():
            return EXIT_UNREACHABLE, f"no service at {address}: {error}"
        case OSError() | ValueError():
            return EXIT_USAGE, str(error)
    raise error


def list_sets(client: Client, arguments: argparse.Namespace) -> Any:
    """Print a line per set."""
    sets = list(client.list_sets())
    if not arguments.json:
        _table(
            ["NAME", "BASE", "VERSION", "ORIGIN", "ADAPTERS", "PARAMETERS"],
            [
                [one["name"], one["base_model_name"], one["version"], one["origin"],
                 one["adapter_count"], one["total_trainable_params"]]
                for one in sets
            ],
        )  # fmt: skip
    return sets


def show_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Print a set."""
    info: dict[str, Any] = {**client.get_set(_set_name(arguments.name))}
    if not arguments.json:
        fields = ("name", "base_model_name", "version", "origin", "updated_at")
        for key in (*fields, "total_trainable_params"):
            print(f"{key}: {info[key]}")
        _print_rows(("name", "d_in", "d_out", "rank", "alpha", "scaling"), info["modules"])
    return info


def show_stats(client: Client, arguments: argparse.Namespace) -> Any:
    """Print the statistics of a set or of all."""
    name = arguments.name
    stats: dict[str, Any] = {
        **(client.get_stats() if name is None else client.get_set_stats(_set_name(name)))
    }
    if not arguments.json:
        for key, value in stats.items():
            if not isinstance(value, list):
                print(f"{key}: {value}")
        if name is not None:
            fields = ("name", "rank", "param_count", "delta_norm", "effective_rank")
            _print_rows(fields, stats["modules"])
    return stats


def remove_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Delete a set."""
    return client.delete_set(_set_name(arguments.name))


def push_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Upload a PEFT folder; print what it became."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (arguments.folder / file).is_file():
            raise UsageError(f"{arguments.folder} has no {file}")
    report = client.upload_set(_set_name(arguments.name), arguments.folder)
    if not arguments.json:
        print(f"{report['name']}: version {report['version']}, {report['adapter_count']} adapters")
        for text in report["warnings"]:
            print(f"warning: {text}", file=sys.stderr)
    return report


def apply_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Print what a module adds to the vectors of a JSON list."""
    is_file = arguments.file not in (None, "-")
    text = Path(arguments.file).read_text("utf-8") if is_file else sys.stdin.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"the vectors are not JSON: {error}") from None
    body = value if isinstance(value, dict) else {"inputs": value}
    # Sent as JSON, not as arrays: the service then refuses NaN by its position in the file.
    call: Call[Any] = Call(
        method="POST",
        path="/v1"
        + path_of("sets", _set_name(arguments.name), "adapters", arguments.module, "apply"),
        headers={"Content-Type": "application/json"},
        content=json.dumps(body).encode(),
        decode=decode_json,
        is_pure=True,
    )
    answer = client.send(call)
    if not arguments.json:
        print(json.dumps(answer["outputs"]))
    return answer


def pull_model(client: Client, arguments: argparse.Namespace) -> Any:
    """Download the files of BASE/SET or adapters/SET."""
    owner, slash, name = arguments.model.partition("/")
    if not slash or not is_set_name(name) or (owner != "adapters" and not is_set_name(owner)):
        raise UsageError(f"{arguments.model!r} is not BASE/SET or adapters/SET")
    with ProgressLine() as line:
        return client.pull(
            arguments.model, arguments.output, jobs=arguments.jobs, on_progress=line.update
        )


def _set_name(name: str) -> str:
    if not is_set_name(name):
        raise UsageError(f"{name!r} cannot name a set")
    return name


def _print_rows(fields: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    _table([name.upper() for name in fields], [[row[name] for name in fields] for row in rows])


def _table(head: list[str], rows: list[list[Any]]) -> None:
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
