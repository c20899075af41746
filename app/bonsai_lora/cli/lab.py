"""The commands of the laboratory: combine, compare, spectrum, survival, extract."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bonsai_lora.cli.client import add_command
from bonsai_lora.cli.mistakes import UsageError, set_name
from bonsai_lora.cli.output import print_rows, print_table, warn
from bonsai_lora.cli.pictures import curves, heat_map
from bonsai_lora.cli.progress import JobLine
from bonsai_lora.client.blocking import Client
from bonsai_lora.client.lab_answers import CombineOptions, Comparison, SetSpectrum
from bonsai_lora.errors import counted
from bonsai_lora.formats.text import printable


def add_commands(commands: Any) -> None:
    """Add the commands with their arguments."""
    combine = add_command(commands, "combine", combine_sets, "combine sets into a new one")
    combine.add_argument("name", help="name of the new set")
    combine.add_argument(
        "sets", nargs="+", metavar="SET[=WEIGHT]", help="set to add, times its weight (default: 1)"
    )
    combine.add_argument(
        "--method",
        default="exact",
        help="how to combine: exact (default), svd, slerp, tsv, iso_c, knots_ties, breadcrumbs, "
        "della, or one of PEFT's: linear, ties, ties_svd, …",
    )
    combine.add_argument("--rank", type=int, help="highest rank of the new modules")
    combine.add_argument("--energy", type=float, help="share of the squared norm to keep")
    combine.add_argument(
        "--density", type=float, help="of methods that prune: share of the entries to keep"
    )
    combine.add_argument("--sign", help="of ties methods: elect signs by total or frequency")
    combine.add_argument("--gamma", type=float, help="breadcrumbs: share of outliers to drop")
    combine.add_argument("--epsilon", type=float, help="della: half the range of probabilities")
    combine.add_argument("--seed", type=int, help="of methods that draw at random")
    combine.add_argument("--dry-run", action="store_true", help="report only, and store nothing")
    compare = add_command(commands, "compare", compare_sets, "compare sets: norms and cosines")
    compare.add_argument("sets", nargs="+", metavar="SET", help="name of a set")
    compare.add_argument("--modules", action="store_true", help="show each module too")
    _add_plot(compare, "heat map of layers and modules: cosines of two sets, interference of more")
    spectrum = add_command(commands, "spectrum", show_spectrum, "show singular values and ranks")
    spectrum.add_argument("name", help="name of a set")
    spectrum.add_argument("--module", action="append", default=[], help="only this; repeatable")
    _add_plot(spectrum, "singular values of each module")
    survival = add_command(
        commands, "survival", show_survival, "estimate what storing merged weights leaves of a set"
    )
    survival.add_argument("base", help="name of a base, into which the set would be merged")
    survival.add_argument("name", help="name of a set")
    survival.add_argument(
        "--dtype",
        default="BF16",
        help="type that is stored: BF16 (default), F16, Q8_0, Q1_0, Q2_0, TQ1_0 or TQ2_0",
    )
    survival.add_argument("--exact", action="store_true", help="store all rows, not a sample")
    extract = add_command(
        commands, "extract", extract_set, "extract a set from a fine-tuned model and its base"
    )
    extract.add_argument("name", help="name of the new set")
    extract.add_argument("base", help="base from which the model was tuned")
    extract.add_argument("tuned", help="fine-tuned model, which is among the bases too")
    extract.add_argument(
        "--rank",
        type=int,
        help="rank of the modules; with --energy, the highest (default then: 128)",
    )
    extract.add_argument(
        "--energy", type=float, help="share of the squared norm to keep; give this, --rank, or both"
    )
    extract.add_argument("--module", action="append", default=[], help="only this; repeatable")


def _add_plot(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--plot", type=_picture, metavar="FILE.svg", help=f"draw a picture: {text}")


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".svg":
        raise argparse.ArgumentTypeError(f"{text!r} must end in .svg: pictures are SVG files")
    return path


def combine_sets(client: Client, arguments: argparse.Namespace) -> Any:
    """Combine sets; print what was lost, and warnings."""
    name = set_name(arguments.name)
    weights = dict(map(_weighted, arguments.sets))
    if len(weights) < len(arguments.sets):
        raise UsageError("a set is named twice; add up its weights")
    given = {one: getattr(arguments, one) for one in CombineOptions.__annotations__}
    options = cast("CombineOptions", given)
    job = client.start_combine(
        name, weights, method=arguments.method, dry_run=arguments.dry_run, **options
    )
    answer = _result(client, job, arguments)
    report = answer if arguments.dry_run else answer["report"]
    if not arguments.json:
        print(
            f"{printable(name)}: {report['method']}, rank {report['rank']}, "
            f"energy kept {report['energy_kept']:.4%}, "
            f"relative error {report['relative_error']:.4g}"
        )
        for text in report["warnings"]:
            warn(text)
        fields = ("name", "rank", "energy_kept", "relative_error")
        print_rows(fields, report["modules"])
    return answer


def _result(client: Client, job: Mapping[str, Any], arguments: argparse.Namespace) -> Any:
    """Return the result of a job, with a progress line unless --json is given; Ctrl-C cancels it.

    What came without a job is returned as it is.
    """
    try:
        with JobLine(is_silent=arguments.json) as line:
            return client.wait_for(job, line.update)
    except KeyboardInterrupt:
        client.cancel_job(job["id"])
        raise


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    try:
        return set_name(name), float(weight) if equals else 1.0
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the weight {weight!r} is not a number; use SET=WEIGHT") from None


def compare_sets(client: Client, arguments: argparse.Namespace) -> Any:
    """Print the cosines of sets, and with --modules those of each module."""
    names = [set_name(one) for one in arguments.sets]
    found: Comparison = _result(client, client.start_compare(names), arguments)
    if arguments.plot:
        _draw_comparison(arguments.plot, names, found)
    if not arguments.json:
        _print_cosines(names, found)
        print(f"interference: {found['interference']:.4g}")
        for module in found["modules"] if arguments.modules else ():
            print(f"\n{printable(module['name'])}")
            _print_cosines(names, module)
            if module["subspace_similarity"] is not None:
                print(f"subspace similarity: {module['subspace_similarity']:.4g}")
    return found


def _draw_comparison(file: Path, names: list[str], found: Comparison) -> None:
    if len(names) == 2:
        values = {one["name"]: one["cosine"][0][1] for one in found["modules"]}
        picture = heat_map(f"cosine of {names[0]} and {names[1]}", values, -1, 1)
    else:
        values = {one["name"]: one["interference"] for one in found["modules"]}
        picture = heat_map(f"interference of {', '.join(names)}", values, 0, 1)
    file.write_text(picture, encoding="utf-8")


def _print_cosines(names: list[str], found: Any) -> None:
    rows = [
        [name, norm, *row]
        for name, norm, row in zip(names, found["norms"], found["cosine"], strict=True)
    ]
    print_table(["SET", "NORM", *names], rows)


def show_spectrum(client: Client, arguments: argparse.Namespace) -> Any:
    """Print norms and ranks of a set's modules, and their largest singular values."""
    job = client.start_spectrum(set_name(arguments.name), modules=arguments.module)
    found: SetSpectrum = _result(client, job, arguments)
    if arguments.plot:
        spectra = {one["name"]: one["singular_values"] for one in found["modules"]}
        picture = curves(f"singular values of {arguments.name}", spectra)
        arguments.plot.write_text(picture, encoding="utf-8")
    if not arguments.json:
        fields = (
            *("name", "rank", "frobenius_norm", "spectral_norm", "stable_rank", "effective_rank"),
            *("energy_rank_90", "energy_rank_99"),
        )
        print_rows(fields, found["modules"])
    return found


def show_survival(client: Client, arguments: argparse.Namespace) -> Any:
    """Print how much of a set is left in merged weights, whole and by tensor."""
    base, name, dtype = arguments.base, set_name(arguments.name), arguments.dtype.upper()
    found: dict[str, Any] = (
        _result(client, client.start_survival(base, name, dtype=dtype), arguments)
        if arguments.exact
        else {**client.get_survival(base, name, dtype=dtype)}
    )
    if not arguments.json:
        fields = ("name", "unchanged", "gain", "relative_error")
        whole = {**found, "name": "all"}
        print_rows(fields, [whole, *found["modules"]])
    return found


def extract_set(client: Client, arguments: argparse.Namespace) -> Any:
    """Extract a set; print what became of each changed tensor, and warnings."""
    name = set_name(arguments.name)
    job = client.start_extract(
        name,
        arguments.base,
        arguments.tuned,
        rank=arguments.rank,
        energy=arguments.energy,
        modules=arguments.module,
    )
    answer = _result(client, job, arguments)
    report = answer["report"]
    if not arguments.json:
        print(
            f"{printable(name)}: rank {report['rank']}, energy kept {report['energy_kept']:.4%}, "
            f"relative error {report['relative_error']:.4g}, "
            f"{counted(len(report['modules']), 'tensor')} changed, {report['same']} the same"
        )
        for text in report["warnings"]:
            warn(text)
        fields = ("name", "kind", "rank", "delta_norm", "relative_norm", "relative_error")
        rows = [{**one, "rank": one["rank"] or one["rows"] or ""} for one in report["modules"]]
        print_rows(fields, rows)
    return answer
