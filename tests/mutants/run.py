"""Run known mistakes: each is put into a copy of the code, where the tests named for it must fail.

    python tests/mutants/run.py            all of known.toml
    python tests/mutants/run.py WORD…      those with a word in their name

A mistake is text of the code and its replacement. The text must occur exactly once under
app/, in whatever file, so that code may move; if it does not, write the mistake again.
Exit status 1: a mistake that no test saw, or that could not be made.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KNOWN = Path(__file__).with_name("known.toml")
SECONDS = 300
"""A mistake whose tests take longer is stopped: it was seen, as an endless loop."""
FAILED, TIMED_OUT = 1, 124


@dataclass(frozen=True)
class Mutant:
    """One mistake, and the tests that must see it."""

    name: str
    why: str
    old: str
    new: str
    tests: list[str]


def read_known(path=KNOWN):
    """Return the mistakes of a file."""
    return [Mutant(**one) for one in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]]


def read_code(root):
    """Return the texts of the files under root/app by their paths from there."""
    app = root / "app"
    paths = sorted(app.rglob("*.py"))
    return {str(path.relative_to(app)): path.read_text(encoding="utf-8") for path in paths}


def find(mutant, code):
    """Return the one file of `code` that has the mistake's old text; raises LookupError."""
    found = [path for path, text in code.items() for _ in range(text.count(mutant.old))]
    if len(found) != 1:
        places = ", ".join(sorted(set(found))) or "nowhere"
        raise LookupError(f"its text occurs {len(found)} times ({places}), and must occur once")
    return found[0]


def run_tests(root, tests, seconds=None):
    """Return pytest's exit status for `tests` in a copy of the tree, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["--hypothesis-profile=mutants", *tests]
    environment = os.environ | {"PYTHONPATH": str(root / "app"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    return done.returncode, done.stdout + done.stderr


def judge(mutant, root, code):
    """Make the mistake in the copy `root`, run its tests and take it back; return a verdict."""
    name = find(mutant, code)
    path, right = root / "app" / name, code[name]
    path.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status, printed = run_tests(root, mutant.tests, SECONDS)
    finally:
        path.write_text(right, encoding="utf-8")
    verdicts = {FAILED: "killed", TIMED_OUT: "timeout", 0: "survived"}
    return verdicts.get(status, f"pytest ended with {status}:\n{printed[-2000:]}")


def copy_tree(root):
    """Copy what tests need."""
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", ".venv")
    for name in ("app", "tests", "docs", "openapi"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)


def main(words):
    """Judge the mistakes whose name has one of `words` (none: all); return the exit status."""
    known = [one for one in read_known() if not words or any(word in one.name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        status, printed = run_tests(root, sorted({test for one in known for test in one.tests}))
        if status != 0:
            print(f"the tests fail without any mistake:\n{printed[-4000:]}")
            return 1
        bad, code = 0, read_code(root)
        for one in known:
            started = time.monotonic()
            try:
                verdict = judge(one, root, code)
            except LookupError as error:
                verdict = f"CANNOT BE MADE: {error}"
            bad += verdict not in ("killed", "timeout")
            print(f"{time.monotonic() - started:5.1f} s  {verdict:8}  {one.name}", flush=True)
    print(f"{len(known) - bad} of {len(known)} known mistakes were seen")
    return 1 if bad or not known else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mistakes with one of these in their name")
    sys.exit(main(parser.parse_args().words))
