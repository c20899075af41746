"""The client whose methods are coroutines."""

import asyncio
import contextlib
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from typing import Any, Self, TypeVar

import httpx

from bonsai_lora.client import connection
from bonsai_lora.client.answers import SetSummary
from bonsai_lora.client.call import BLOCK_BYTES, Call, decoded, opened
from bonsai_lora.client.calls import jobs
from bonsai_lora.client.methods import Methods
from bonsai_lora.client.refusals import refusal_of
from bonsai_lora.client.retries import Retries

T = TypeVar("T")


class AsyncClient(Methods):
    """`Client` for asyncio: the same arguments, and the same calls as coroutines.

    >>> async with AsyncClient() as client:
    ...     delta = (await client.apply("my-adapter", "q_proj", x)).outputs

    `pull` and its like are missing, since they write files; run those of `Client` in a thread.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        uds: str | os.PathLike[str] | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | httpx.Timeout = connection.TIMEOUT,
        retries: int = connection.RETRIES,
    ) -> None:
        options = connection.options_of(url, uds, token, headers, timeout, httpx.AsyncHTTPTransport)
        self._http = httpx.AsyncClient(**options)
        self.retries = retries

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Close the connections."""
        await self.close()

    async def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a call and return its decoded answer: what every method here does.

        Raises BonsaiLoraError for a refusal, httpx.TransportError if no service answers, and
        httpx.DecodingError if something else does.
        """
        return decoded(call, await self._exchange(call, is_stream=False))

    @contextlib.asynccontextmanager
    async def stream(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """Send a call and yield its answer, whose body is read in the block. Raises as `send`."""
        answer = await self._exchange(call, is_stream=True)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _blocks(self, call: Call[bytes]) -> AsyncIterator[bytes]:
        async with self.stream(call) as answer:
            async for block in answer.aiter_raw(BLOCK_BYTES):
                yield block

    async def _exchange(self, call: Call[Any], *, is_stream: bool) -> httpx.Response:
        retries = Retries(call, self.retries)
        while True:
            try:
                with opened(call) as options:
                    if not isinstance(options.get("content"), bytes | None):
                        options["content"] = _as_async(options["content"])
                    answer = await self._http.send(self._http.build_request(**options), stream=True)
                if not (is_stream and answer.is_success):
                    await answer.aread()
            except httpx.TransportError as error:
                await asyncio.sleep(retries.after_failure(error))
                continue
            if answer.is_success:
                return answer
            await asyncio.sleep(retries.after_refusal(refusal_of(answer), answer))

    async def list_sets(
        self,
        *,
        base_model_name: str | None = None,
        prefix: str | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[SetSummary]:
        """Yield the sets by name, a page at a time.

        Only those for `base_model_name`, and whose names begin with `prefix`, if given.
        """
        cursor = None
        while True:
            page = await self.list_page(
                limit=page_size, cursor=cursor, base_model_name=base_model_name, prefix=prefix
            )
            for one in page["sets"]:
                yield one
            cursor = page["next_cursor"]
            if cursor is None:
                return

    async def wait_for(
        self, job: Mapping[str, Any] | str, on_progress: Callable[[float], object] | None = None
    ) -> dict[str, Any]:
        """Return the result of a job when it is done, what its request would have answered.

        `job` is what a `start_…` call returned, or the id of a job. What `start_compare` and
        `start_spectrum` have answered without a job is returned as it is. `on_progress` gets the
        share that is done, from 0 to 1. Raises the error of a job that failed, and
        JobInterruptedError if it was cancelled.
        """
        if isinstance(job, str):
            job = await self.get_job(job)
        wait, longest = jobs.WAIT_SECONDS
        while (result := jobs.result_of(job)) is None:
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, longest)
            job = await self.get_job(job["id"])
            if on_progress is not None:
                on_progress(job["progress"])
        return result


async def _as_async(blocks: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(blocks, AsyncIterable):
        async for block in blocks:
            yield block
    else:
        for block in blocks:
            yield block
