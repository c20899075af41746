"""Everything that README.md and docs/ show runs, in the order in which a reader meets it."""

import os
import re
from pathlib import Path

import pytest
from documents import RUN, Block, Reader, blocks, same

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: blocks(page.read_text()) for page in PAGES}
SHOWN = {"json", "text", "yaml", "toml", "http", "mermaid"}
MOST_NOT_RUN = 7
"""Blocks that carry a reason why they are not run."""
OF_PEERS = "needs torch; make test-peers runs it"
"""The reason of blocks that tests/peers runs."""

# Names of shared memory are the machine's: another test run must not meet ours.
REWRITES = [('"/vectors"', f'"/bonsai-test-{os.getpid()}"')]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [page for page, found in BLOCKS.items() if any(b.language in RUN for b in found)],
    ids=name_of,
)
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
def test_a_page_runs(page, tmp_path):
    with Reader(tmp_path, REWRITES) as reader:
        for block in BLOCKS[page]:
            if block.language in RUN and block.reason is None:
                try:
                    reader.follow(block)
                except Exception as error:
                    error.add_note(f"in {name_of(page)}, line {block.line}")
                    raise
    if reader.lacks_node:
        pytest.skip(
            f"{reader.lacks_node} TypeScript blocks: no Node.js 22.18 or newer, the rest ran"
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language(page):
    for block in BLOCKS[page]:
        assert block.language in SHOWN | set(RUN), f"{name_of(page)}:{block.line}"
    # What the pattern does not see would not run: other fences, and indented blocks.
    assert page.read_text().count("```") == 2 * len(BLOCKS[page])
    assert not re.search(r"\n\n {4}\S", page.read_text())


def test_few_blocks_are_not_run():
    found = [block for page in PAGES for block in BLOCKS[page]]
    assert len([block for block in found if block.language in RUN]) >= 50
    not_run = [block for block in found if block.reason not in (None, OF_PEERS)]
    assert len(not_run) <= MOST_NOT_RUN


def test_blocks_are_read_with_their_lines_and_reasons():
    page = "# A\n\n```sh\nls\n```\n\n<!-- not run: needs Docker -->\n\n```sh\ndocker\n```\n\n```\n```\n"
    assert blocks(page) == [
        Block(3, "sh", "ls\n", None),
        Block(9, "sh", "docker\n", "needs Docker"),
        Block(13, "", "", None),
    ]


@pytest.mark.parametrize(
    ("expected", "actual", "is_same"),
    [
        ('{"a":[1.5,2]}', '{"a":[1.500004,2]}', True),
        ('{"a":[1.5,2]}', '{"a":[1.501,2]}', False),
        ('{"a":[1.5,2]}', '{"a":[1.5,3]}', False),
        ("0.0", "0.00000001", True),
        ("a … z", "a b\nc z", True),
        ("a … z", "a b c", False),
        ("   1.5  2.5", " 1.5   2.5\n", True),
        ("at 2026-01-02T03:04:05Z", "at 2027-11-12T13:14:15.5Z", True),
        ('"request_id":"a1"', '"request_id":"b2"', True),
        ("a.b", "axb", False),
        ("a", "ab", False),
    ],
)
def test_outputs_are_compared(expected, actual, is_same):
    assert same(expected, actual) is is_same


PAGE = """
```python
x = 2.5
```
```sh
echo there > file
```
```console
$ export GREETING="there  it is" && mkdir -p folder && cd folder
$ echo "$GREETING" && cd ..
there it is
$ cat \\
  file
there
$ curl -s localhost:8000/healthz
{"status":"alive"}
$ bonsai-lora ls --json
[]
```
```sh
make run
```
```sh
bonsai-lora serve \\
    --max-rank 3  # in another terminal
```
```console
$ curl -s localhost:8000/v1/sets -H 'Content-Type: application/json' -d '{"name": "a", "config": {"rank": 4}}'
…"code":"rank_too_large"…
```
```python
from pathlib import Path

print(x + len(Path("file").read_text()))  # 8.5
```
```typescript
const answer = await fetch("http://localhost:8000/healthz");
const body: { status: string } = await answer.json();
console.log(body.status); // alive
```
"""


@pytest.mark.filterwarnings("default")
def test_a_reader_follows_a_page(tmp_path):
    with Reader(tmp_path) as reader:
        for block in blocks(PAGE):
            reader.follow(block)


@pytest.mark.filterwarnings("default")
def test_a_reader_notices_wrong_outputs(tmp_path):
    wrong = [
        ("console", "$ echo a\nb\n"),
        ("console", "$ false\n"),
        ("sh", "false\ntrue\n"),
        ("python", "print(1)  # 2\n"),
    ]
    with Reader(tmp_path) as reader:
        for language, text in wrong:
            with pytest.raises(AssertionError):
                reader.follow(Block(1, language, text, None))
        with pytest.raises(NameError):
            reader.follow(Block(1, "python", "undefined\n", None))
