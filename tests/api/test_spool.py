import tempfile
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonsai_lora.api import spool
from bonsai_lora.errors import MalformedBodyError, StalledError
from bonsai_lora.service.budget import Budget


@given(
    st.lists(st.integers(1, 3000), max_size=40),
    st.integers(3000, 9000),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60)
def test_blocks_keep_their_order(sizes, disk, lazy, data):
    blocks = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    naps = data.draw(st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes)))
    memory, spool.MEMORY_BYTES = spool.MEMORY_BYTES, 4000

    async def run():
        queue = spool.Spool(Budget(disk), 5.0, Path(tempfile.gettempdir()))
        got = bytearray()

        async def produce():
            for block, nap in zip(blocks, naps, strict=True):
                await queue.put(block)
                for _ in range(nap):
                    await anyio.lowlevel.checkpoint()
            queue.end()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce)
            if lazy:
                await anyio.sleep(0.002)
            async for block in queue.blocks():
                got += block
        queue.close()
        return bytes(got)

    try:
        assert anyio.run(run) == b"".join(blocks)
    finally:
        spool.MEMORY_BYTES = memory


def test_a_full_spool_stalls_and_an_error_comes_last():
    async def stall():
        queue = spool.Spool(Budget(0), 0.05, Path())
        for _ in range(1000):
            await queue.put(bytes(1 << 20))

    with pytest.raises(StalledError, match="no more room"):
        anyio.run(stall)

    async def fail():
        queue = spool.Spool(Budget(0), 1, Path())
        await queue.put(b"x")
        queue.end(MalformedBodyError("y"))
        return [block async for block in queue.blocks()]

    with pytest.raises(MalformedBodyError):
        anyio.run(fail)
