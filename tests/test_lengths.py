"""What is too long is named; what is just short enough is not."""

import pytest
from lengths import MOST_IN_FILE, MOST_IN_FUNCTION, too_long


@pytest.mark.parametrize("more", [0, 1])
def test_a_file(tmp_path, more):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n" * (MOST_IN_FILE + more))
    assert len(list(too_long(path))) == more


@pytest.mark.parametrize("more", [0, 1])
def test_a_function(tmp_path, more):
    path = tmp_path / "a.py"
    body = "        pass\n" * (MOST_IN_FUNCTION - 1 + more)
    path.write_text(f"class A:\n    async def late(self):\n{body}\n")
    assert [message.split()[1] for message in too_long(path)] == ["late"] * more
