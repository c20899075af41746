"""The blocks of the documentation that need torch, transformers and peft."""

import pytest
from documents import Reader
from test_documents_run import BLOCKS, OF_PEERS, name_of

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

PAGES = {
    page: own
    for page, blocks in BLOCKS.items()
    if (own := [block for block in blocks if block.reason == OF_PEERS])
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.timeout(300)
def test_a_page_runs(page, tmp_path):
    with Reader(tmp_path) as reader:
        for block in PAGES[page]:
            try:
                reader.follow(block)
            except Exception as error:
                error.add_note(f"in {name_of(page)}, line {block.line}")
                raise
