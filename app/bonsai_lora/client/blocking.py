"""The client whose methods block until the answer is there."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

import httpx

from bonsai_lora.client import connection
from bonsai_lora.client.answers import Dtype, Pulled, PulledFile, SetSummary, Weights
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
from bonsai_lora.client.download import OnProgress, download
from bonsai_lora.client.lab_answers import Job
from bonsai_lora.client.refusals import refusal_of
from bonsai_lora.client.retries import Retries
from bonsai_lora.errors import BonsaiLoraError

P = ParamSpec("P")
T = TypeVar("T")


def _method(make: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """Return the method that sends the call that `make` makes."""

    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(*args, **kwargs))

    return described(method, make)


class Client:
    """A client of the service, with connection pooling.

    >>> with Client() as client:
    ...     delta = client.apply("my-adapter", "q_proj", x).outputs

    Parameters
    ----------
    url
        Address of the service; by default BONSAI_LORA_URL, else http://127.0.0.1:8000.
    uds
        Path of the service's Unix socket, instead of `url`.
    token
        Sent as `Authorization: Bearer TOKEN`; by default BONSAI_LORA_TOKEN.
    headers
        Sent with every request.
    timeout
        In seconds, or an `httpx.Timeout`; by default 60 to connect and to send, 600 to wait for an
        answer.
    retries
        Most further attempts of a call. A call is repeated if the connection was refused; if it
        changes nothing and the connection broke; or if the service was too busy to begin and says
        with `Retry-After` when to come back. No write can happen twice.

    Methods raise the errors of `bonsai_lora.errors` for refusals, by their `code`, and
    `httpx.TransportError` if the service cannot be reached. A client may be shared by threads.
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
            options["transport"] = httpx.HTTPTransport(uds=os.fspath(uds), limits=connection.LIMITS)
        self._http = httpx.Client(**options)
        self.retries = retries

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a call and return its decoded answer: what every method here does.

        Raises BonsaiLoraError for a refusal, httpx.TransportError if no service answers, and
        httpx.DecodingError if something else does.
        """
        return decoded(call, self._exchange(call, is_stream=False))

    @contextlib.contextmanager
    def stream(self, call: Call[Any]) -> Iterator[httpx.Response]:
        """Send a call and give its answer, whose body is read in the block. Raises as `send`."""
        answer = self._exchange(call, is_stream=True)
        try:
            yield answer
        finally:
            answer.close()

    def _exchange(self, call: Call[Any], *, is_stream: bool) -> httpx.Response:
        retries = Retries(call, self.retries)
        while True:
            try:
                with opened(call) as options:
                    answer = self._http.send(self._http.build_request(**options), stream=True)
                if not (is_stream and answer.is_success):
                    answer.read()
            except httpx.TransportError as error:
                time.sleep(retries.after_failure(error))
                continue
            if answer.is_success:
                return answer
            time.sleep(retries.after_refusal(refusal_of(answer), answer))

    def list_sets(
        self,
        *,
        base_model_name: str | None = None,
        prefix: str | None = None,
        page_size: int | None = None,
    ) -> Iterator[SetSummary]:
        """Give the sets by name, a page at a time.

        Gives only those for `base_model_name`, and whose names begin with `prefix`, if given.
        """
        cursor = None
        while True:
            page = self.list_page(
                limit=page_size, cursor=cursor, base_model_name=base_model_name, prefix=prefix
            )
            yield from page["sets"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def wait_for(
        self, job: Job, on_progress: Callable[[float], object] | None = None
    ) -> dict[str, Any]:
        """Return the result of a job when it is done, what its request would have answered.

        `on_progress` gets the share that is done, from 0 to 1. Raises the error of a job that
        failed, and JobInterruptedError if it was cancelled.
        """
        wait, longest = jobs.WAIT_SECONDS
        while (result := jobs.result_of(job)) is None:
            time.sleep(wait)
            wait = min(1.5 * wait, longest)
            job = self.get_job(job["id"])
            if on_progress is not None:
                on_progress(job["progress"])
        return result

    def merge_stream(
        self,
        set_name: str,
        module: str,
        weights: BinaryIO | Iterable[bytes],
        *,
        dtype: Dtype,
        unmerge: bool = False,
        version: int | None = None,
    ) -> Iterator[bytes]:
        """Give the merged bytes of weights that come in blocks, in constant memory.

        `weights` is a file opened in binary mode or an iterable of bytes: W (d_out, d_in) row by
        row, as `dtype`. All of it is sent before the first block comes back. Raises as `merge`.
        """
        blocks = blocks_of(weights)
        call = merging.merge_blocks(
            set_name, module, blocks, dtype, unmerge=unmerge, version=version
        )
        with self.stream(call) as answer:
            yield from answer.iter_raw(BLOCK_BYTES)

    def stream_merged_file(
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
    ) -> Iterator[bytes]:
        """Give a file of a merged model in blocks. Otherwise the same as `get_merged_file`."""
        call = bases.get_merged_file(
            base, set_name, filename, start=start, stop=stop, scale=scale, sets=sets, match=match,
            dtype=dtype, widen=widen,
        )  # fmt: skip
        with self.stream(call) as answer:
            yield from answer.iter_raw(BLOCK_BYTES)

    def pull(
        self,
        model: str,
        folder: str | os.PathLike[str],
        *,
        jobs: int = 4,
        on_progress: OnProgress | None = None,
    ) -> Pulled:
        """Download the merged model BASE/SET, the set adapters/SET, or the base bases/BASE.

        `jobs` files at a time. Files that are already there are kept, and partial ones are
        resumed, unless the model has changed since. `on_progress` gets the bytes that are there
        and the total. Raises ValueError if a file has a different size or ETag than announced.
        """
        commit: str = self.send(bases.get_repository(model))["sha"]
        files = self.send(bases.list_repository(model, commit))

        def rest_of(path: str, start: int, tag: str) -> Call[bytes]:
            return bases.resolve(model, commit, path, start=start, tag=tag)

        download(self, rest_of, files, Path(folder), jobs, on_progress)
        gain = self._gain_of(rest_of, files)
        return {"folder": os.fspath(folder), "commit": commit, "files": files, "delta_gain": gain}

    def _gain_of(
        self, rest_of: Callable[[str, int, str], Call[bytes]], files: list[PulledFile]
    ) -> float | None:
        """Return what a file's head says of the deltas that are left; None if it cannot be read.

        The service may learn it only while the files are downloaded.
        """
        if not files:
            return None
        largest = max(files, key=lambda one: one["size"])
        last = rest_of(largest["path"], largest["size"] - 1, largest["oid"])
        with (
            contextlib.suppress(httpx.TransportError, BonsaiLoraError),
            self.stream(last) as answer,
        ):
            found = answer.headers.get("bonsai-delta-gain")
            return None if found is None else float(found)
        return None

    def pull_gguf(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        architecture: str | None = None,
        folded: bool = False,
        version: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> PulledFile:
        """Download a set as a GGUF LoRA file. Otherwise the same as `get_adapter_gguf` and `pull`.

        The size and ETag are read first, and a partial file with that ETag is resumed.
        """

        def rest_of(start: int, tag: str | None) -> Call[bytes]:
            return sets.get_adapter_gguf(
                name, dtype=dtype, architecture=architecture, folded=folded, version=version,
                start=start, tag=tag,
            )  # fmt: skip

        return self._pull_file(rest_of, Path(file), on_progress)

    def pull_merged_gguf(
        self,
        base: str,
        set_name: str,
        file: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        widen: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> PulledFile:
        """Download the merged model of a GGUF base as a GGUF file. Otherwise as `pull_gguf`.

        Changed tensors have the type `dtype` (F16); with `widen="all"`, so have all others that
        are quantized.
        """

        def rest_of(start: int, tag: str | None) -> Call[bytes]:
            return bases.get_merged_file(
                base, set_name, f"{base}.gguf", start=start, dtype=dtype, widen=widen, tag=tag
            )

        return self._pull_file(rest_of, Path(file), on_progress)

    def _pull_file(
        self,
        rest_of: Callable[[int, str | None], Call[bytes]],
        target: Path,
        on_progress: OnProgress | None,
    ) -> PulledFile:
        with self.stream(rest_of(0, None)) as answer:  # only its head is read
            size, tag = int(answer.headers["content-length"]), answer.headers["etag"].strip('"')
        found: PulledFile = {"path": target.name, "size": size, "oid": tag}
        parts = target.parent
        download(self, lambda _, *rest: rest_of(*rest), [found], parts, 1, on_progress)
        return found

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
