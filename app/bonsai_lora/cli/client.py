"""The client commands, which use only the HTTP API of a running service."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from bonsai_lora.cli.pull import pull
from bonsai_lora.formats.names import SET_NAME_PATTERN, is_set_name

EXIT_REFUSED = 1
"""The service returned an error."""
EXIT_USAGE = 2
"""The arguments are wrong, or a file cannot be read."""
EXIT_UNREACHABLE = 3
"""The service cannot be reached."""

EXIT_INTERRUPTED = 130
"""Interrupted by Ctrl-C."""
EXIT_CLOSED = 141
"""The reader of standard output has closed it, as `| head` does."""

_URL = "http://127.0.0.1:8000"


class CommandError(Exception):
    """An expected failure, reported in one line; `code` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def add_commands(commands: Any) -> None:
    """Add the client commands with their arguments."""
    _add(commands, "ls", list_sets, "list the sets")
    show = _add(commands, "show", show_set, "show a set and its modules")
    show.add_argument("name")
    stats = _add(commands, "stats", show_stats, "show statistics of a set or of the whole store")
    stats.add_argument("name", nargs="?")
    remove = _add(commands, "rm", remove_set, "delete a set")
    remove.add_argument("name")
    push = _add(commands, "push", push_set, "upload a PEFT adapter folder as a set")
    push.add_argument("name")
    push.add_argument(
        "folder",
        type=Path,
        help="folder with adapter_config.json and adapter_model.safetensors",
    )
    apply = _add(commands, "apply", apply_set, "apply a module's adapter to vectors given as JSON")
    apply.add_argument("name")
    apply.add_argument("module")
    apply.add_argument("file", nargs="?", help="JSON list of vectors (default, or -: stdin)")
    fetch = _add(commands, "pull", pull_model, "download a merged model, or a set as a PEFT folder")
    fetch.add_argument("model", help="BASE/SET, or adapters/SET")
    fetch.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    fetch.add_argument("--jobs", type=int, default=4, help="files to download at a time (4)")


def _add(commands: Any, name: str, run: Callable[..., Any], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default=_URL, help=f"URL of the service ({_URL})")
    where.add_argument("--uds", metavar="PATH", help="Unix socket of the service")
    parser.add_argument("--json", action="store_true", help="print the response as JSON")
    parser.set_defaults(run=_guarded(run))
    return parser


def _guarded(run: Callable[[httpx.Client, argparse.Namespace], Any]) -> Callable[..., int]:
    """Wrap a command so that it reports errors in one line and returns an exit code."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            with _connected(arguments) as client:
                response = run(client, arguments)
            if arguments.json and response is not None:
                print(json.dumps(response, indent=1))
            sys.stdout.flush()
        except BrokenPipeError:
            # Discard remaining output; otherwise Python reports an error when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - unexpected ones are raised
            where = f"unix:{arguments.uds}" if arguments.uds else arguments.url
            code, text = _describe_failure(error, where)
            print(f"bonsai-lora: {text}", file=sys.stderr)
            return code
        return 0

    return guarded


def _connected(arguments: argparse.Namespace) -> httpx.Client:
    """Return an HTTP client for the service at --url or --uds."""
    timeout = httpx.Timeout(60, read=600)
    if arguments.uds is None:
        return httpx.Client(base_url=arguments.url, timeout=timeout)
    transport = httpx.HTTPTransport(uds=arguments.uds)
    return httpx.Client(base_url="http://localhost", timeout=timeout, transport=transport)


def _describe_failure(error: BaseException, url: str) -> tuple[int, str]:
    """Return the exit code and the message for a failure; raises `error` if it is unexpected."""
    match error:
        case CommandError():
            return error.code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case KeyError() | TypeError():
            return (
                EXIT_UNREACHABLE,
                f"{url} did not respond like this service: {error!r}; check --url",
            )
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return EXIT_USAGE, f"{url!r} is not a valid URL; expected one such as {_URL}"
        case httpx.TransportError():
            return EXIT_UNREACHABLE, f"no service at {url}: {error}"
        case OSError() | ValueError():
            return EXIT_USAGE, str(error)
    raise error


def request_json(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    """Return the JSON of the response, None if it is empty; raises CommandError for an error."""
    response = client.request(method, path, **options)
    if response.is_error:
        raise CommandError(error_text(response), EXIT_REFUSED)
    return response.json() if response.content else None


def error_text(response: httpx.Response) -> str:
    """Return the service's error text and code."""
    try:
        problem = response.json()
        return f"{problem['detail']} [{problem['code']}]"
    except (ValueError, KeyError, TypeError):
        return f"the service responded with status {response.status_code}"


def list_sets(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print a line per set."""
    sets: list[Any] = []
    cursor = None
    while True:
        page = request_json(client, "GET", "/v1/sets", params={"cursor": cursor} if cursor else {})
        sets += page["sets"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
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


def show_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print a set."""
    info = request_json(client, "GET", _set_path(arguments.name))
    if not arguments.json:
        for key in (
            "name",
            "base_model_name",
            "version",
            "origin",
            "updated_at",
            "total_trainable_params",
        ):
            print(f"{key}: {info[key]}")
        fields = ("name", "d_in", "d_out", "rank", "alpha", "scaling")
        _table(
            [one.upper() for one in fields], [[one[f] for f in fields] for one in info["modules"]]
        )
    return info


def show_stats(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print the statistics of a set or of the store."""
    path = "/v1/stats" if arguments.name is None else f"{_set_path(arguments.name)}/stats"
    stats = request_json(client, "GET", path)
    if not arguments.json:
        for key, value in stats.items():
            if not isinstance(value, list):
                print(f"{key}: {value}")
        fields = ("name", "rank", "param_count", "delta_norm", "effective_rank")
        if arguments.name is not None:
            _table(
                [one.upper() for one in fields],
                [[one[f] for f in fields] for one in stats["modules"]],
            )
    return stats


def remove_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Delete a set."""
    return request_json(client, "DELETE", _set_path(arguments.name))


def push_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Upload a PEFT folder; print the new version and warnings."""
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    for file in names.values():
        if not (arguments.folder / file).is_file():
            raise CommandError(
                f"{arguments.folder} has no {file}; give a folder saved by PEFT", EXIT_USAGE
            )
    with (
        (arguments.folder / names["adapter_config"]).open("rb") as config,
        (arguments.folder / names["adapter_model"]).open("rb") as model,
    ):
        files = {"adapter_config": config, "adapter_model": model}
        report = request_json(client, "PUT", _set_path(arguments.name), files=files)
    if not arguments.json:
        print(f"{report['name']}: version {report['version']}, {report['adapter_count']} adapters")
        for text in report["warnings"]:
            print(f"warning: {text}", file=sys.stderr)
    return report


def apply_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print the outputs of a module's adapter for a JSON list of vectors."""
    is_file = arguments.file not in (None, "-")
    text = Path(arguments.file).read_text("utf-8") if is_file else sys.stdin.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CommandError(
            f"the vectors are not JSON: {error}; expected a list of lists of numbers", EXIT_USAGE
        ) from None
    path = f"{_set_path(arguments.name)}/adapters/{quote(arguments.module, safe='')}/apply"
    body = value if isinstance(value, dict) else {"inputs": value}
    # json.dumps writes NaN, which httpx's own encoder refuses; the service reports its index.
    headers = {"Content-Type": "application/json"}
    response = request_json(client, "POST", path, content=json.dumps(body), headers=headers)
    if not arguments.json:
        print(json.dumps(response["outputs"]))
    return response


def pull_model(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Download the files of BASE/SET or adapters/SET."""
    owner, slash, name = arguments.model.partition("/")
    if not slash or not is_set_name(name) or (owner != "adapters" and not is_set_name(owner)):
        raise CommandError(
            f"{arguments.model!r} does not name a model; expected BASE/SET or adapters/SET",
            EXIT_USAGE,
        )
    repo = f"{owner}/{name}"
    info = client.get(f"/api/models/{repo}")
    if info.is_error:
        raise CommandError(error_text(info), EXIT_REFUSED)
    files = request_json(client, "GET", f"/api/models/{repo}/tree/{info.json()['sha']}")
    try:
        pull(client, repo, info.json()["sha"], files, arguments.output, arguments.jobs)
    except httpx.HTTPStatusError as error:
        raise CommandError(error_text(error.response), EXIT_REFUSED) from None
    return {"folder": str(arguments.output), "commit": info.json()["sha"], "files": files}


def _set_path(name: str) -> str:
    if not is_set_name(name):
        raise CommandError(
            f"{name!r} is not a valid set name; it must match {SET_NAME_PATTERN}", EXIT_USAGE
        )
    return f"/v1/sets/{name}"


def _table(head: list[str], rows: list[list[Any]]) -> None:
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
