"""Refuse phrases that docs/words.txt lists: `python tests/prose.py` prints each with its place."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORDS = ROOT / "docs" / "words.txt"
PLACES = [
    *("*.md", "Makefile", "Dockerfile", "*.yml", "pyproject.toml"),
    *("app/**/*.py", "app/**/page/*.js", "app/**/page/*.html"),
    *("tests/**/*.py", "benchmarks/*.py", "benchmarks/*.md", "docs/**/*.md"),
    "openapi/examples/*.json",
]

# What may stand for a space: wrapped lines, comment signs, names, quotes of strings in a row.
SPACE = r"""(?:(?!\"{3})[\s_#"'*`]|\bf(?=["']))+"""


def read_words(text):
    """Return [(pattern, replacement)] of a word list."""
    lines = (line.strip() for line in text.splitlines())
    pairs = [line.split(" => ") for line in lines if line and not line.startswith("#")]
    return [(compiled(phrase), better) for phrase, better in pairs]


def compiled(phrase):
    """Return the pattern of a phrase, in which a space is any gap between words."""
    # Names have words between underscores, where \b sees no boundary.
    return re.compile(rf"(?<![^\W_]){phrase.replace(' ', SPACE)}(?![^\W_])", re.IGNORECASE)


def findings(text, words):
    """Yield (line number, what is there, what to write) in the order of the list."""
    for pattern, better in words:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield line, " ".join(match[0].split()), better


def main():
    """Print every finding; return whether there is one."""
    words = read_words(WORDS.read_text())
    found = [
        f"{path.relative_to(ROOT)}:{line}: {there!r}; write: {better}"
        for path in sorted({path for place in PLACES for path in ROOT.glob(place)})
        for line, there, better in sorted(findings(path.read_text(), words))
    ]
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
