"""Change the code of one folder in every small way that mutmut knows, and count what tests see.

    python tests/mutants/all.py formats          as long as it takes; go on where it stopped
    python tests/mutants/all.py formats --list   show what no test saw, and is not accepted

Works in .mutants/FOLDER, a copy of the tree whose source root is called src, as mutmut wants it.
What was judged there stays judged until its code or a test of it changes.

Not changed: functions with decorators, code outside functions (mutmut cannot), and texts of
refusals (UNTESTED below). accepted.toml lists changes that make no difference, and why.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ACCEPTED = Path(__file__).with_name("accepted.toml")

FOLDERS = {
    # Folder: what is changed, and the tests that may see it. No test starts another process.
    "core": (["core/*"], ["core", "api/test_apply.py", "api/test_combinations.py", "api/test_stats.py"]),
    "formats": (["formats/*"], ["formats"]),
    "wire": (["wire/*"], ["wire", "formats/test_safetensors.py", "api/test_hostile.py", "api/test_apply.py", "api/test_mixed.py", "api/test_bodies.py", "api/test_limits.py", "api/test_oip.py"]),
    "storage": (["storage/*"], ["storage", "formats/test_peft_tensors.py"]),
    "checkpoints": (["checkpoints/*"], ["checkpoints", "api/test_merged.py", "api/test_files.py", "api/test_combinations.py", "api/test_wide_rows.py"]),
    "service": (["service/*"], ["service", "api"]),
    "api": (["api/ranges.py", "api/conditions.py", "api/body.py"], ["api/test_ranges.py", "api/test_files.py", "api/test_conditions.py", "api/test_bodies.py", "api/test_limits.py", "api/test_merge.py"]),
}  # fmt: skip

UNTESTED = [
    r'^\s+f?"[^"]*"[,)]?$',  # a line of a text
    r"^\s+(got|got_bytes|expected|field|key|keys|limit|limit_bytes|module|modules|set|tensor)=",
    r"""\braise \w+\(f?["'].*\)$""",
    r"_log\.|\bassert\b",
]
"""Lines that are left alone: what a refusal says besides its code, logs, and assertions."""

COPIED = ("app", "tests", "docs", "openapi", "README.md", "pyproject.toml")


def stage(folder):
    """Bring .mutants/FOLDER up to date, leaving what did not change; return it."""
    work = ROOT / ".mutants" / folder
    wanted = {}
    for name in COPIED:
        source = ROOT / name
        files = (
            [source] if source.is_file() else [one for one in source.rglob("*") if one.is_file()]
        )
        for path in files:
            place = path.relative_to(ROOT)
            if "__pycache__" not in place.parts:
                wanted[Path("src", *place.parts[1:]) if place.parts[0] == "app" else place] = path
    for place, path in wanted.items():
        target = work / place
        content = path.read_bytes()
        if place == Path("pyproject.toml"):
            content += settings(folder).encode()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for top in {place.parts[0] for place in wanted} & {"src", "tests"}:
        for path in (work / top).rglob("*.py"):
            if path.relative_to(work) not in wanted:
                path.unlink()
    return work


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
            'pytest_add_cli_args = ["--hypothesis-profile=mutants", "-p", "no:cacheprovider", "-x"]',
            f"pytest_add_cli_args_test_selection = {json.dumps(paths)}",
            'process_isolation = "forkserver"',
            "use_git_change_detection = false",
            "use_setproctitle = false",
            "track_dependencies = false",
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


def report(folder, work, *, show):
    """Print the score; with `show`, also each change that no test saw."""
    found = verdicts(work)
    accepted = {(one["old"], one["new"]) for one in tomllib.loads(ACCEPTED.read_text())["accepted"]}
    counts = Counter()
    for mutant, verdict in found.items():
        kind = "killed" if verdict in ("killed", "timeout", "segfault") else verdict
        if kind in ("survived", "no tests"):
            old, new = lines_of(work, mutant)
            if (old, new) in accepted:
                kind = "accepted"
            elif show:
                print(f"{mutant} ({kind})\n  - {old}\n  + {new}")
        counts[kind] += 1
    judged = counts["killed"] + counts["survived"] + counts["no tests"]
    print(f"{folder}: {counts['killed']} of {judged} killed", end="")
    print(f" ({100 * counts['killed'] / max(judged, 1):.1f} %); ", end="")
    print(", ".join(f"{number} {kind}" for kind, number in sorted(counts.items())))


def main():
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", choices=FOLDERS)
    parser.add_argument("--list", action="store_true", help="only show what was found so far")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    chosen = parser.parse_args()
    work = ROOT / ".mutants" / chosen.folder
    if not chosen.list:
        shutil.rmtree(work / "mutants" / "tests", ignore_errors=True)
        work = stage(chosen.folder)
        mutmut(work, "run", "--max-children", str(chosen.processes))
    report(chosen.folder, work, show=chosen.list)


if __name__ == "__main__":
    main()
