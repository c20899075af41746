"""Known mistakes can be made: their text is in the code, and their tests are there."""

import re

import pytest
import run

KNOWN = run.read_known()
CODE = run.read_code(run.ROOT)


@pytest.mark.parametrize("mistake", KNOWN, ids=[one.name for one in KNOWN])
def test_a_mistake_can_be_made(mistake):
    assert run.find(mistake, CODE)
    assert mistake.new != mistake.old
    for place in mistake.tests:
        path, _, test = place.partition("::")
        text = (run.ROOT / path).read_text(encoding="utf-8")
        assert re.search(
            rf"^def {test.partition('[')[0]}\(" if test else "^def test_", text, re.MULTILINE
        )


def test_names_are_different():
    assert len({one.name for one in KNOWN}) == len(KNOWN)
