"""Change the code of one folder in every small way that mutmut knows, and count what tests detect.

    python tests/mutants/all.py formats                as long as it takes; go on where it stopped
    python tests/mutants/all.py formats --sample 150   the same 150 mutants each time
    python tests/mutants/all.py formats --sample 150 --seed 2   150 chosen otherwise
    python tests/mutants/all.py formats --again        judge what no test detected once more
    python tests/mutants/all.py formats --list         show what no test detected, and is not accepted

Works in .mutants/FOLDER, a copy of the tree whose source root is called src, as mutmut wants it.
What was detected there stays detected until its code changes; what was not is judged again after any
change. A larger sample contains the smaller.

Not changed: functions with decorators, code outside functions (mutmut cannot), and texts of
refusals (UNTESTED below). accepted.toml lists changes that make no difference, and why.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ACCEPTED = Path(__file__).with_name("accepted.toml")
HOOKS = Path(__file__).with_name("hooks.py")

FOLDERS = {
    # Folder: what is changed, and the tests that may detect it.
    "core": (["core/*"], ["core", "api/test_experts.py", "api/test_apply.py", "api/test_combinations.py", "api/test_stats.py", "api/test_adapters.py", "api/test_sets.py", "api/test_lab.py", "service/test_survival.py", "service/test_extract.py", "formats/test_peft_export.py", "storage/test_records.py"]),
    "formats": (["formats/*"], ["formats", "api/test_combinations.py", "api/test_experts.py", "api/test_variants.py", "api/test_hostile.py", "api/test_lab.py", "service/test_extract.py"]),
    "wire": (["wire/*"], ["wire", "formats/test_safetensors.py", "api/test_oip.py", "api/test_hostile.py", "api/test_apply.py", "api/test_mixed.py", "api/test_bodies.py", "api/test_limits.py", "api/test_shared_memory.py", "client/test_calls.py", "client/test_refusals.py"]),
    "storage": (["storage/*"], ["storage", "formats/test_peft_tensors.py", "api/test_sets.py", "api/test_newer_format.py", "api/test_shared_memory.py", "api/test_oip.py", "api/test_operations.py", "api/test_bucket.py", "api/test_jobs.py", "api/test_versions.py", "api/test_keys.py", "api/test_key_limits.py", "api/test_hub_list.py", "api/test_hub_push.py", "api/test_lfs.py", "service/test_sets_folder.py"]),
    "checkpoints": (["checkpoints/*"], ["checkpoints", "formats/test_gguf_lora.py", "service/test_lab_memory.py", "service/test_extract.py", "service/test_survival.py", "api/test_gguf_bases.py", "api/test_gguf_sets.py", "api/test_merged.py", "api/test_files.py", "api/test_combinations.py", "api/test_wide_rows.py", "api/test_experts.py", "api/test_variants.py"]),
    "service": (["service/*"], ["service", *(f"api/test_{one}.py" for one in ("adapters", "apply", "bucket", "combinations", "experts", "files", "gguf_bases", "gguf_sets", "hub_list", "hub_push", "jobs", "key_limits", "keys", "lab", "lfs", "limits", "merge", "merged", "mixed", "newer_format", "oip", "oip_experts", "operations", "sets", "shared_memory", "sources", "sources_s3", "stats", "variants", "versions", "wide_rows"))]),
    "sources": (["sources/*"], ["api/test_sources.py", "api/test_sources_s3.py"]),
    "api": ([f"api/{one}.py" for one in ("ranges", "conditions", "body", "json_response", "routes/lfs")], [f"api/test_{one}.py" for one in ("ranges", "files", "conditions", "bodies", "limits", "merge", "lfs", "sets", "hub_push")]),
}  # fmt: skip

ELSEWHERE = [
    "tests/core/test_backend.py::test_one_backend_for_a_process",
    "tests/core/test_backend.py::test_without_llvmlite_the_definition_computes",
    "tests/core/test_isolation.py",
    "tests/api/test_keys.py::test_every_way_of_the_store_passes_the_view",
]
"""Tests that are left out: in the processes that they start, mutmut changes nothing; and it adds
methods to the classes of which the last one compares all methods."""

UNTESTED = [
    r'^\s+f?"[^"]*"[,)]?$',  # a line of a text
    r"^\s+(got|got_bytes|expected|field|key|keys|limit|limit_bytes|module|modules|set|tensor|tensors)=",
    r"""\braise \w+\(f?["'].*\)$""",
    r"_log\.|\bassert\b",
]
"""Lines that are left alone: what a refusal says besides its code, logs, and assertions."""

DETECTED = ["killed", "timeout", "segfault"]
UNDETECTED = ["survived", "no tests"]
OPTIONS = ["--hypothesis-profile=mutants", "-p", "no:cacheprovider", "--timeout=30"]
COPIED = ("app", "tests", "docs", "openapi", "README.md", "pyproject.toml")


def wanted_files():
    """Return the files of the copy: place in it -> path."""
    wanted = {}
    for name in COPIED:
        source = ROOT / name
        for path in [source] if source.is_file() else source.rglob("*"):
            parts = path.relative_to(ROOT).parts
            if path.is_file() and "__pycache__" not in parts:
                wanted[Path("src" if parts[0] == "app" else parts[0], *parts[1:])] = path
    return wanted


def stage(folder):
    """Bring .mutants/FOLDER up to date, leaving what did not change; return whether anything did."""
    work = ROOT / ".mutants" / folder
    wanted = wanted_files()
    added = {
        Path("pyproject.toml"): settings(folder),
        Path("tests/conftest.py"): HOOKS.read_text().replace("FOLDER", folder),
    }
    is_changed = False
    for place, path in wanted.items():
        target = work / place
        content = path.read_bytes() + added.get(place, "").encode()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            is_changed = True
    for path in [*(work / "src").rglob("*.py"), *(work / "tests").rglob("*.py")]:
        if path.relative_to(work) not in wanted:
            path.unlink()
            is_changed = True
    return is_changed


def settings(folder):
    """Return mutmut's part of pyproject.toml."""
    changed, tests = FOLDERS[folder]
    paths = [f"tests/{one}" for one in tests if (ROOT / "tests" / one).exists()]
    return "\n".join(
        [
            "",
            "[tool.mutmut]",
            'source_paths = ["src"]',
            f"only_mutate = {json.dumps([f'src/bonsai_lora/{one}' for one in changed])}",
            f"do_not_mutate_patterns = {json.dumps(UNTESTED)}",
            'also_copy = ["docs", "openapi", "README.md", "src"]',
            f"pytest_add_cli_args = {json.dumps([*OPTIONS, *(f'--deselect={one}' for one in ELSEWHERE)])}",
            f"pytest_add_cli_args_test_selection = {json.dumps(paths)}",
            'process_isolation = "forkserver"',
            "use_git_change_detection = false",
            "use_setproctitle = false",
            "debug = true",
            "track_dependencies = false",
            "timeout_constant = 30",
            "timeout_multiplier = 4",
            "",
        ]
    )


def mutmut(work, *arguments, **options):
    """Run mutmut in the staged tree."""
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=work, env=environment, **options)


def verdicts(work):
    """Return mutant -> verdict, of all that were judged."""
    printed = mutmut(work, "results", "--all", "true", capture_output=True, text=True).stdout
    pairs = (line.strip().rpartition(": ") for line in printed.splitlines() if ": " in line)
    return {name: verdict for name, _, verdict in pairs}


def lines_of(work, mutant):
    """Return what a mutant takes out and what it puts in, without indentation."""
    shown = mutmut(work, "show", mutant, capture_output=True, text=True).stdout
    out, new = [], []
    for line in shown.splitlines():
        if line.startswith("-") and not line.startswith("---"):
            out.append(line[1:].strip())
        elif line.startswith("+") and not line.startswith("+++"):
            new.append(line[1:].strip())
    return "\n".join(out), "\n".join(new)


def sample(mutants, size, seed):
    """Return `size` of `mutants`, from each file its share, by the hash of `seed` and the name."""
    files = defaultdict(list)
    for mutant in mutants:
        files[mutant.rpartition(".")[0]].append(mutant)
    places = {}
    for names in files.values():
        names.sort(key=lambda name: hashlib.sha256(f"{seed}{name}".encode()).digest())
        places |= {name: (rank + 0.5) / len(names) for rank, name in enumerate(names)}
    return sorted(mutants, key=lambda name: (places[name], name))[:size]


def interval(killed, judged):
    """Return the 95 % interval of Wilson, 1927, of the share that `killed` of `judged` estimates."""
    z, share = 1.96, killed / judged
    middle = share + z * z / (2 * judged)
    spread = z * math.sqrt((share * (1 - share) + z * z / (4 * judged)) / judged)
    return (middle - spread) / (1 + z * z / judged), (middle + spread) / (1 + z * z / judged)


def judge(folder, work, size, seed, processes, *, again):
    """Judge the mutants of a sample (all if `size` is None) that no test has detected yet.

    Those that were judged before, only after a change, or `again`.
    """
    shutil.rmtree(work / "mutants" / "tests", ignore_errors=True)
    is_changed = stage(folder)
    if is_changed:  # else mutmut asks only tests that reached the code as it was
        (work / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    # No mutant has this name: mutmut makes the mutants, learns which tests reach them, and stops.
    made = mutmut(work, "run", "none", capture_output=True, text=True)
    if "nothing matches" not in made.stderr:
        sys.exit(made.stdout + made.stderr)
    found = verdicts(work)
    open_ = ["not checked", *UNDETECTED * (again or is_changed)]
    names = [one for one in sample(found, size, seed) if found[one] in open_]
    if not names:
        return
    log = work / "run.log"
    print(f"judging {len(names)} mutants; {log} grows", flush=True)
    with log.open("w") as file:
        done = mutmut(work, "run", f"--max-children={processes}", *names, stdout=file, stderr=file)
    if done.returncode != 0:
        sys.exit(log.read_text()[-4000:])


def report(folder, work, size, seed, *, show):
    """Print the score; with `show`, also each change that no test detected."""
    found = verdicts(work)
    chosen = sample(found, size, seed)
    accepted = {
        (one["old"], one["new"]): f"bonsai_lora.{one.get('module', '')}"
        for one in tomllib.loads(ACCEPTED.read_text())["accepted"]
    }
    counts = Counter()
    for mutant in chosen:
        kind = found[mutant]
        if kind in UNDETECTED:
            old, new = lines_of(work, mutant)
            if mutant.startswith(accepted.get((old, new), "\n")):
                kind = "accepted"
            elif show:
                print(f"{mutant} ({kind})\n  - {old}\n  + {new}")
        counts[kind] += 1
    killed = sum(counts[one] for one in DETECTED)
    judged = killed + sum(counts[one] for one in UNDETECTED)
    print(f"{folder}: {killed} of {judged} killed", end="")
    if judged:
        low, high = interval(killed, judged)
        print(f" ({killed / judged:.1%}", end="")
        print(f"; 95 % interval {low:.1%} to {high:.1%})" if judged < len(found) else ")", end="")
    print(f"; {len(chosen)} sampled of {len(found)}: ", end="")
    print(", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())))


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", choices=FOLDERS)
    parser.add_argument("--sample", type=int, help="judge this many, chosen by hash")
    parser.add_argument("--seed", default="", help="choose others for the sample")
    parser.add_argument("--again", action="store_true", help="also what no test detected before")
    parser.add_argument("--list", action="store_true", help="only show what was found so far")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    work = ROOT / ".mutants" / chosen.folder
    if not chosen.list:
        judge(chosen.folder, work, chosen.sample, chosen.seed, chosen.processes, again=chosen.again)
    report(chosen.folder, work, chosen.sample, chosen.seed, show=chosen.list)


if __name__ == "__main__":
    main()
