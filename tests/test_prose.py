"""The prose check finds a phrase wherever it is wrapped."""

import prose
import pytest

LIST = "# comment\nblue moon => closed\n(is|are) green => is red\n"


@pytest.mark.parametrize(
    "text",
    [
        "it is blue moon",
        "Blue  moon.",
        "it is blue\nmoon",
        "    # it is blue\n    # moon",
        "def test_a_client_is_blue_moon_late():",
        '"it is blue "\n    "moon"',
        '"it is blue "\n    f"moon {n}"',
        "the *blue* `moon`",
    ],
)
def test_a_phrase_is_found(text):
    ((line, there, better),) = prose.findings("\n" + text, prose.read_words(LIST))
    assert line == 2
    assert there.lower().startswith("blue")
    assert better == "closed"


@pytest.mark.parametrize(
    "text",
    ["unblue moon", "blue moons", "blue, moon", 'x = "blue"""\nMoon = 1', "a green"],
)
def test_other_words_are_not(text):
    assert list(prose.findings(text, prose.read_words(LIST))) == []


def test_the_list_and_the_places_are_used():
    words = prose.read_words(prose.WORDS.read_text())
    assert len(words) > 30
    assert all(better.strip() for _, better in words)
    for place in prose.PLACES:
        assert list(prose.ROOT.glob(place)), place
