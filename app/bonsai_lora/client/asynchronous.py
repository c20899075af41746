"""The client whose methods are coroutines."""

import asyncio
import contextlib
import os
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

import httpx

from bonsai_lora.client import connection
from bonsai_lora.client.answers import Dtype, SetSummary, Weights
from bonsai_lora.client.call import BLOCK_BYTES, Call, blocks_of, decoded, described, opened
from bonsai_lora.client.calls import (
    adapters,
    applying,
    bases,
    inference,
    jobs,
    lab,
    merging,
    sets,
    stats,
)
from bonsai_lora.client.lab_answers import Job
from bonsai_lora.client.refusals import refusal_of
from bonsai_lora.client.retries import Retries

P = ParamSpec("P")
T = TypeVar("T")


def _method(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """Return the coroutine method that sends the call that `make` makes."""

    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(make(*args, **kwargs))

    return described(method, make)


class AsyncClient:
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
        options = connection.options_of(url, uds, token, headers, timeout)
        if uds is not None:
            options["transport"] = httpx.AsyncHTTPTransport(
                uds=os.fspath(uds), limits=connection.LIMITS
            )
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
        """Send a call and give its answer, whose body is read in the block. Raises as `send`."""
        answer = await self._exchange(call, is_stream=True)
        try:
            yield answer
        finally:
            await answer.aclose()

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
        """Give the sets by name, a page at a time.

        Gives only those for `base_model_name`, and whose names begin with `prefix`, if given.
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
        self, job: Job, on_progress: Callable[[float], object] | None = None
    ) -> dict[str, Any]:
        """Return the result of a job when it is done, what its request would have answered.

        `on_progress` gets the share that is done, from 0 to 1. Raises the error of a job that
        failed, and JobInterruptedError if it was cancelled.
        """
        wait, longest = jobs.WAIT_SECONDS
        while (result := jobs.result_of(job)) is None:
            await asyncio.sleep(wait)
            wait = min(1.5 * wait, longest)
            job = await self.get_job(job["id"])
            if on_progress is not None:
                on_progress(job["progress"])
        return result

    async def merge_stream(
        self,
        set_name: str,
        module: str,
        weights: BinaryIO | Iterable[bytes] | AsyncIterable[bytes],
        *,
        dtype: Dtype,
        unmerge: bool = False,
        version: int | None = None,
    ) -> AsyncIterator[bytes]:
        """Give the merged bytes of weights that come in blocks, in constant memory.

        `weights` is a file opened in binary mode, or an iterable of bytes, synchronous or not: W
        (d_out, d_in) row by row, as `dtype`. All of it is sent before the first block comes back.
        Raises as `merge`.
        """
        blocks = weights if isinstance(weights, AsyncIterable) else blocks_of(weights)
        call = merging.merge_blocks(
            set_name, module, blocks, dtype, unmerge=unmerge, version=version
        )
        async with self.stream(call) as answer:
            async for block in answer.aiter_raw(BLOCK_BYTES):
                yield block

    async def stream_merged_file(
        self,
        base: str,
        set_name: str,
        filename: str,
        *,
        start: int = 0,
        stop: int | None = None,
        scale: float = 1.0,
        sets: Weights | None = None,
        match: str | None = None,
        dtype: str | None = None,
        widen: str | None = None,
    ) -> AsyncIterator[bytes]:
        """Give a file of a merged model in blocks. Otherwise the same as `get_merged_file`."""
        call = bases.get_merged_file(
            base, set_name, filename, start=start, stop=stop, scale=scale, sets=sets, match=match,
            dtype=dtype, widen=widen,
        )  # fmt: skip
        async with self.stream(call) as answer:
            async for block in answer.aiter_raw(BLOCK_BYTES):
                yield block

    create_set = _method(sets.create_set)
    list_page = _method(sets.list_page)
    get_set = _method(sets.get_set)
    upload_set = _method(sets.upload_set)
    upload_files = _method(sets.upload_files)
    upload_tensors = _method(sets.upload_tensors)
    pull_set = _method(sets.pull_set)
    upload_gguf = _method(sets.upload_gguf)
    change_set = _method(sets.change_set)
    delete_set = _method(sets.delete_set)
    get_adapter_config = _method(sets.get_adapter_config)
    get_adapter_tensors = _method(sets.get_adapter_tensors)
    get_adapter_model = _method(sets.get_adapter_model)
    get_adapter_gguf = _method(sets.get_adapter_gguf)

    list_adapters = _method(adapters.list_adapters)
    get_adapter = _method(adapters.get_adapter)
    put_adapter = _method(adapters.put_adapter)
    put_weights = _method(adapters.put_weights)
    delete_adapter = _method(adapters.delete_adapter)

    apply = _method(applying.apply)
    apply_many = _method(applying.apply_many)
    apply_mixed = _method(applying.apply_mixed)
    merge = _method(merging.merge)

    get_set_stats = _method(stats.get_set_stats)
    get_stats = _method(stats.get_stats)
    estimate = _method(stats.estimate)
    get_health = _method(stats.get_health)
    get_readiness = _method(stats.get_readiness)
    get_metrics = _method(stats.get_metrics)

    combine = _method(lab.combine)
    preview_combine = _method(lab.preview_combine)
    compare = _method(lab.compare)
    get_spectrum = _method(lab.get_spectrum)
    get_survival = _method(lab.get_survival)
    start_combine = _method(lab.start_combine)
    start_extract = _method(lab.start_extract)
    start_survival = _method(lab.start_survival)

    list_jobs = _method(jobs.list_jobs)
    get_job = _method(jobs.get_job)
    cancel_job = _method(jobs.cancel_job)

    list_bases = _method(bases.list_bases)
    get_base = _method(bases.get_base)
    list_merged_files = _method(bases.list_merged_files)
    get_merged_file = _method(bases.get_merged_file)

    infer = _method(inference.infer)
    get_server = _method(inference.get_server)
    get_server_live = _method(inference.get_server_live)
    get_server_ready = _method(inference.get_server_ready)
    get_model = _method(inference.get_model)
    get_model_ready = _method(inference.get_model_ready)
    get_model_config = _method(inference.get_model_config)
    get_model_statistics = _method(inference.get_model_statistics)
    list_models = _method(inference.list_models)
    load_model = _method(inference.load_model)
    unload_model = _method(inference.unload_model)
    list_regions = _method(inference.list_regions)
    register_region = _method(inference.register_region)
    unregister_regions = _method(inference.unregister_regions)


async def _as_async(blocks: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(blocks, AsyncIterable):
        async for block in blocks:
            yield block
    else:
        for block in blocks:
            yield block
