"""The client commands: a thin layer over `bonsai_lora.client`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bonsai_lora.cli.mistakes import UsageError, check_output, set_name, why_no_adapter
from bonsai_lora.cli.output import (
    EXIT_REFUSED,
    EXIT_USAGE,
    plain,
    print_rows,
    print_table,
    warn,
)
from bonsai_lora.cli.progress import ProgressLine
from bonsai_lora.client.blocking import Client
from bonsai_lora.client.call import Call, json_body, path_of
from bonsai_lora.client.connection import DEFAULT_URL, TOKEN_VARIABLE, URL_VARIABLE, url_of
from bonsai_lora.errors import BonsaiLoraError, FileNotInModelError, counted
from bonsai_lora.formats.names import is_base_name, is_set_name
from bonsai_lora.formats.text import printable
from bonsai_lora.validation import without_secrets

EXIT_UNREACHABLE = 3
"""The service cannot be reached."""

EXIT_INTERRUPTED = 130
"""Interrupted by Ctrl-C."""
EXIT_CLOSED = 141
"""The reader of standard output has closed it, as `| head` does."""

_GGUF_OPTIONS = ("dtype", "architecture", "folded", "widen")
_LITTLE_GAIN = 0.5
_SET_HELP = "name of a set"
_OWNERS = ("adapters", "bases")
"""First parts of names that are not bases."""
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*)")
"""A header field (RFC 9110 section 5.1)."""


def add_commands(commands: Any) -> None:
    """Add the client commands with their arguments."""
    listing = add_command(commands, "ls", list_sets, "list the sets")
    listing.add_argument("prefix", nargs="?", help="only sets whose names begin with this")
    listing.add_argument("--base-model-name", help="only sets for this base model")
    show = add_command(commands, "show", show_set, "show a set and its modules")
    show.add_argument("name", help=_SET_HELP)
    stats = add_command(
        commands, "stats", show_stats, "show statistics of a set or of the whole store"
    )
    stats.add_argument("name", nargs="?", help=f"{_SET_HELP} (default: the whole store)")
    remove = add_command(commands, "rm", remove_set, "delete a set")
    remove.add_argument("name", help=_SET_HELP)
    push = add_command(commands, "push", push_set, "upload a PEFT, MLX or GGUF adapter as a set")
    push.add_argument("name", help="name of the set, which is created or replaced")
    push.add_argument(
        "folder",
        type=Path,
        help="folder with adapter_config.json and adapter_model.safetensors, or as mlx_lm saves "
        "it; or a GGUF LoRA file",
    )
    push.add_argument(
        "--architecture", help="of a GGUF LoRA: read its tensor names as those of this architecture"
    )
    push.add_argument(
        "--base-model-name", help="base model, instead of the one that the adapter names"
    )
    apply = add_command(
        commands, "apply", apply_set, "apply a module's adapter to vectors given as JSON"
    )
    apply.add_argument("name", help=_SET_HELP)
    apply.add_argument("module", help="name of one of its modules, as `show` prints it")
    apply.add_argument("file", nargs="?", help="JSON list of vectors (default, or -: stdin)")
    _add_pull(commands)


def _add_pull(commands: Any) -> None:
    fetch = add_command(commands, "pull", pull_model, "download a merged model, a set, or a base")
    fetch.add_argument("model", help="BASE/SET, adapters/SET or bases/BASE")
    fetch.add_argument(
        "-o", "--output", type=Path, required=True, help="folder (or GGUF file) to write"
    )
    fetch.add_argument(
        "--gguf",
        action="store_true",
        help="a GGUF file: a GGUF LoRA of adapters/SET, or the merged model of a GGUF base",
    )
    fetch.add_argument(
        "--dtype",
        help="with --gguf: F32, F16, BF16 or Q8_0 (default: F32 for a GGUF LoRA, else F16)",
    )
    fetch.add_argument(
        "--architecture", help="with --gguf, of a set: that of the base, such as qwen3"
    )
    fetch.add_argument(
        "--folded",
        action="store_true",
        help="with --gguf, of a set: for a base with folded weights, such as Bonsai 2",
    )
    fetch.add_argument(
        "--widen",
        choices=("all",),
        help="with --gguf, of a merged model: write all other quantized tensors in the type of "
        "--dtype, too",
    )
    fetch.add_argument(
        "--parallel", type=int, default=4, help="files to download at a time (default: 4)"
    )
    fetch.add_argument("--jobs", type=int, dest="parallel", help=argparse.SUPPRESS)  # as in 0.1.0


def add_command(
    commands: Any, name: str, run: Callable[..., Any], text: str
) -> argparse.ArgumentParser:
    """Add a command that reaches the service, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"{TOKEN_VARIABLE}, if set, is sent as `Authorization: Bearer TOKEN`.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--url", help=f"URL of the service (default: {URL_VARIABLE}, or {DEFAULT_URL})"
    )
    where.add_argument("--uds", metavar="PATH", help="Unix socket of the service")
    parser.add_argument(
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="send a header with each request; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print the response as JSON")
    parser.set_defaults(run=_guarded(run))
    return parser


def _header(text: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a header, such as 'X-Team: search'")
    return match[1], match[2]


def _guarded(run: Callable[[Client, argparse.Namespace], Any]) -> Callable[..., int]:
    """Wrap a command so that it reports errors in one line and returns an exit code."""

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
            # Discard remaining output; otherwise Python reports an error when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_CLOSED
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - unexpected ones are raised
            code, text = _describe_failure(error, address)
            print(f"bonsai-lora: {printable(text)}", file=sys.stderr)
            return code
        return 0

    return guarded


def _describe_failure(error: BaseException, address: str) -> tuple[int, str]:
    """Return the exit code and the message for a failure; raises `error` if it is unexpected."""
    address = without_secrets(address)
    match error:
        case BonsaiLoraError():
            how = f"; the command reads it from {TOKEN_VARIABLE}" * (
                error.code == "unauthenticated"
            )
            return EXIT_REFUSED, f"{error.detail}{how} [{error.code}]"
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
        case KeyError() | TypeError() | httpx.DecodingError():
            return (
                EXIT_UNREACHABLE,
                f"{address} did not respond like this service: {error!r}; check --url",
            )
        case httpx.InvalidURL():
            return EXIT_USAGE, f"{address!r} is not a valid URL; expected one such as {DEFAULT_URL}"
        case httpx.TransportError():
            return EXIT_UNREACHABLE, f"no service at {address}: {_why_unreachable(error)}"
        case OSError() | ValueError():
            return EXIT_USAGE, plain(error)
    raise error


def _why_unreachable(error: httpx.TransportError) -> str:
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not use TLS; begin the URL with http://"
    return f"{text}; start one with bonsai-lora serve, or check the address"


def list_sets(client: Client, arguments: argparse.Namespace) -> Any:
    """Print a line per set."""
    found = client.list_sets(
        prefix=arguments.prefix, base_model_name=arguments.base_model_name, page_size=1000
    )
    sets = list(found)
    if not arguments.json:
        print_table(
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
    info: dict[str, Any] = {**client.get_set(set_name(arguments.name))}
    if not arguments.json:
        fields = ("name", "base_model_name", "version", "origin", "updated_at")
        for key in (*fields, "total_trainable_params"):
            print(f"{key}: {printable(str(info[key]))}")
        print_rows(("name", "d_in", "d_out", "rank", "alpha", "scaling"), info["modules"])
    return info


def show_stats(client: Client, arguments: argparse.Namespace) -> Any:
    """Print the statistics of a set or of the store."""
    name = arguments.name
    stats: dict[str, Any] = {
        **(client.get_stats() if name is None else client.get_set_stats(set_name(name)))
    }
    if not arguments.json:
        for key, value in stats.items():
            if value is not None and not isinstance(value, list):
                print(f"{key}: {printable(str(value))}")
        if name is not None:
            fields = ("name", "rank", "param_count", "delta_norm", "effective_rank")
            print_rows(fields, stats["modules"])
    return stats


def remove_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Delete a set."""
    return client.delete_set(set_name(arguments.name))


def push_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Upload a PEFT or MLX folder; print the new version and warnings."""
    name, base = set_name(arguments.name), arguments.base_model_name
    is_gguf = arguments.folder.suffix == ".gguf"
    if arguments.architecture is not None and not is_gguf:
        raise UsageError(
            "--architecture is for GGUF LoRA files, which end in .gguf; leave it out for a folder"
        )
    try:
        report = (
            client.upload_gguf(
                name, arguments.folder, architecture=arguments.architecture, base_model_name=base
            )
            if is_gguf
            else client.upload_set(name, arguments.folder, base_model_name=base)
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(why_no_adapter(arguments, Path(error.filename).name)) from None
    if not arguments.json:
        name = printable(report["name"])
        print(f"{name}: version {report['version']}, {counted(report['adapter_count'], 'adapter')}")
        for text in report["warnings"]:
            warn(text)
    return report


def apply_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Print the outputs of a module's adapter for a JSON list of vectors."""
    value = _read_vectors(arguments.file)
    body = value if isinstance(value, dict) else {"inputs": value}
    # Sent as JSON, not as an array: the service then reports a NaN by its index in the file.
    call: Call[Any] = Call(
        method="POST",
        path=path_of("v1", "sets", set_name(arguments.name), "adapters", arguments.module, "apply"),
        is_pure=True,
        **json_body(body),
    )
    answer = client.send(call)
    if not arguments.json:
        print(json.dumps(answer["outputs"]))
    return answer


def _read_vectors(file: str | None) -> Any:
    """Return the JSON value of a file, or of standard input for None and `-`."""
    try:
        return json.loads(
            sys.stdin.read() if file in (None, "-") else Path(file).read_text("utf-8")
        )
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {file}; name a JSON file, or none to read standard input"
        ) from None
    except ValueError as error:
        raise UsageError(
            f"the vectors are not JSON: {error}; expected a list of lists of numbers"
        ) from None


def pull_model(client: Client, arguments: argparse.Namespace) -> Any:
    """Download the files of BASE/SET, adapters/SET or bases/BASE."""
    owner, slash, name = arguments.model.partition("/")
    if arguments.gguf and owner == "bases":
        raise UsageError(
            "a base is not a GGUF LoRA; with --gguf, expected BASE/SET or adapters/SET"
        )
    if not slash or not is_set_name(name) or not (owner in _OWNERS or is_base_name(owner)):
        raise UsageError(
            f"{arguments.model!r} does not name a model; expected BASE/SET, adapters/SET or "
            "bases/BASE"
        )
    if not arguments.gguf and any(getattr(arguments, one) for one in _GGUF_OPTIONS):
        raise UsageError(
            "--dtype, --architecture, --folded and --widen are for GGUF files; add --gguf"
        )
    check_output(arguments)
    with ProgressLine() as line:
        pulled = (
            _pull_gguf(client, owner, name, arguments, line.update)
            if arguments.gguf
            else client.pull(
                arguments.model,
                arguments.output,
                parallel=arguments.parallel,
                on_progress=line.update,
            )
        )
    gain = pulled.get("delta_gain")
    if gain is not None and gain < _LITTLE_GAIN:
        wider = "pull it with --dtype F32" if arguments.gguf else "merge it into a wider base"
        warn(
            f"rounding left {gain:.0%} of the deltas; apply the set beside the base instead, or "
            f"{wider}"
        )
    return pulled


def _pull_gguf(
    client: Client,
    owner: str,
    name: str,
    arguments: argparse.Namespace,
    on_progress: Callable[[int, int], object],
) -> Any:
    output, dtype = arguments.output, arguments.dtype
    if owner == "adapters":
        return client.pull_gguf(
            name,
            output,
            dtype=dtype,
            architecture=arguments.architecture,
            folded=arguments.folded,
            on_progress=on_progress,
        )
    try:
        return client.pull_merged_gguf(
            owner, name, output, dtype=dtype, widen=arguments.widen, on_progress=on_progress
        )
    except FileNotInModelError:
        raise UsageError(f"base {owner!r} is not a GGUF file; leave out --gguf") from None
