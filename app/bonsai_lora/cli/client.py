"""The commands that talk to a running service, over the HTTP contract and nothing else."""

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
from bonsai_lora.formats.names import is_set_name

EXIT_REFUSED = 1
"""The service refused."""
EXIT_USAGE = 2
"""The command's words are wrong, or a file cannot be read."""
EXIT_UNREACHABLE = 3
"""No service answers."""

EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_CLOSED = 141
"""Nobody reads what is printed any more, as behind `| head`."""

_URL = "http://127.0.0.1:8000"


class CommandError(Exception):
    """A failure that is told in one line; `code` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


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
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default=_URL, help=f"of the service ({_URL})")
    where.add_argument("--uds", metavar="PATH", help="Unix socket of the service")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=_guarded(run))
    return parser


def _guarded(run: Callable[[httpx.Client, argparse.Namespace], Any]) -> Callable[..., int]:
    """Return a command that tells errors in one line and returns an exit code."""

    def guarded(arguments: argparse.Namespace) -> int:
        try:
            with _connected(arguments) as client:
                answer = run(client, arguments)
            if arguments.json and answer is not None:
                print(json.dumps(answer, indent=1))
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still to be printed goes nowhere, or Python complains at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - raised again if not known
            where = f"unix:{arguments.uds}" if arguments.uds else arguments.url
            code, text = _told(error, where)
            print(f"bonsai-lora: {text}", file=sys.stderr)
            return code
        return 0

    return guarded


def _connected(arguments: argparse.Namespace) -> httpx.Client:
    """Return a client of the service at --url or --uds."""
    timeout = httpx.Timeout(60, read=600)
    if arguments.uds is None:
        return httpx.Client(base_url=arguments.url, timeout=timeout)
    transport = httpx.HTTPTransport(uds=arguments.uds)
    return httpx.Client(base_url="http://localhost", timeout=timeout, transport=transport)


def _told(error: BaseException, url: str) -> tuple[int, str]:
    """Return the exit code and the words for a failure; raises what is none that is expected."""
    match error:
        case CommandError():
            return error.code, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case KeyError() | TypeError():
            return EXIT_UNREACHABLE, f"{url} answers, but not as this service: {error!r}"
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return EXIT_USAGE, f"{url!r} is no URL of a service, such as {_URL}"
        case httpx.TransportError():
            return EXIT_UNREACHABLE, f"no service at {url}: {error}"
        case OSError() | ValueError():
            return EXIT_USAGE, str(error)
    raise error


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    """Return the JSON of an answer, None of an empty one; a refusal is told as it was worded."""
    answer = client.request(method, path, **options)
    if answer.is_error:
        raise CommandError(refusal(answer), EXIT_REFUSED)
    return answer.json() if answer.content else None


def refusal(answer: httpx.Response) -> str:
    """Return what the service said of a request that it refused."""
    try:
        problem = answer.json()
        return f"{problem['detail']} [{problem['code']}]"
    except (ValueError, KeyError, TypeError):
        return f"the service answered {answer.status_code}"


def list_sets(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print a line per set."""
    sets: list[Any] = []
    cursor = None
    while True:
        page = ask(client, "GET", "/v1/sets", params={"cursor": cursor} if cursor else {})
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
    info = ask(client, "GET", _set_path(arguments.name))
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
    """Print the statistics of a set or of all."""
    path = "/v1/stats" if arguments.name is None else f"{_set_path(arguments.name)}/stats"
    stats = ask(client, "GET", path)
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
    return ask(client, "DELETE", _set_path(arguments.name))


def push_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Upload a PEFT folder; print what it became."""
    names = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
    for file in names.values():
        if not (arguments.folder / file).is_file():
            raise CommandError(f"{arguments.folder} has no {file}", EXIT_USAGE)
    with (
        (arguments.folder / names["adapter_config"]).open("rb") as config,
        (arguments.folder / names["adapter_model"]).open("rb") as model,
    ):
        files = {"adapter_config": config, "adapter_model": model}
        report = ask(client, "PUT", _set_path(arguments.name), files=files)
    if not arguments.json:
        print(f"{report['name']}: version {report['version']}, {report['adapter_count']} adapters")
        for text in report["warnings"]:
            print(f"warning: {text}", file=sys.stderr)
    return report


def apply_set(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Print what a module adds to the vectors of a JSON list."""
    is_file = arguments.file not in (None, "-")
    text = Path(arguments.file).read_text("utf-8") if is_file else sys.stdin.read()
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CommandError(f"the vectors are not JSON: {error}", 2) from None
    path = f"{_set_path(arguments.name)}/adapters/{quote(arguments.module, safe='')}/apply"
    body = value if isinstance(value, dict) else {"inputs": value}
    # As text that says NaN where the file does, which the service refuses by place.
    headers = {"Content-Type": "application/json"}
    answer = ask(client, "POST", path, content=json.dumps(body), headers=headers)
    if not arguments.json:
        print(json.dumps(answer["outputs"]))
    return answer


def pull_model(client: httpx.Client, arguments: argparse.Namespace) -> Any:
    """Download the files of BASE/SET or adapters/SET."""
    owner, slash, name = arguments.model.partition("/")
    if not slash or not is_set_name(name) or (owner != "adapters" and not is_set_name(owner)):
        raise CommandError(f"{arguments.model!r} is not BASE/SET or adapters/SET", EXIT_USAGE)
    repo = f"{owner}/{name}"
    info = client.get(f"/api/models/{repo}")
    if info.is_error:
        raise CommandError(refusal(info), EXIT_REFUSED)
    files = ask(client, "GET", f"/api/models/{repo}/tree/{info.json()['sha']}")
    try:
        pull(client, repo, info.json()["sha"], files, arguments.output, arguments.jobs)
    except httpx.HTTPStatusError as error:
        raise CommandError(refusal(error.response), EXIT_REFUSED) from None
    return {"folder": str(arguments.output), "commit": info.json()["sha"], "files": files}


def _set_path(name: str) -> str:
    if not is_set_name(name):
        raise CommandError(f"{name!r} cannot name a set", EXIT_USAGE)
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
