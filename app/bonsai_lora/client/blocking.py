"""The client whose methods block until the answer is there."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from bonsai_lora.client import connection
from bonsai_lora.client.answers import Pulled, PulledFile, PulledMerged, SetSummary
from bonsai_lora.client.call import BLOCK_BYTES, Call, decoded, opened
from bonsai_lora.client.calls import bases, jobs, sets
from bonsai_lora.client.download import OnProgress, download
from bonsai_lora.client.methods import Methods
from bonsai_lora.client.refusals import refusal_of
from bonsai_lora.client.retries import Retries
from bonsai_lora.errors import BonsaiLoraError

T = TypeVar("T")


class Client(Methods):
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
        options = connection.options_of(url, uds, token, headers, timeout, httpx.HTTPTransport)
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
        """Send a call and yield its answer, whose body is read in the block. Raises as `send`."""
        answer = self._exchange(call, is_stream=True)
        try:
            yield answer
        finally:
            answer.close()

    def _blocks(self, call: Call[bytes]) -> Iterator[bytes]:
        with self.stream(call) as answer:
            yield from answer.iter_raw(BLOCK_BYTES)

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
        """Yield the sets by name, a page at a time.

        Only those for `base_model_name`, and whose names begin with `prefix`, if given.
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
        self, job: Mapping[str, Any] | str, on_progress: Callable[[float], object] | None = None
    ) -> dict[str, Any]:
        """Return the result of a job when it is done, what its request would have answered.

        `job` is what a `start_…` call returned, or the id of a job. What `start_compare` and
        `start_spectrum` have answered without a job is returned as it is. `on_progress` gets the
        share that is done, from 0 to 1. Raises the error of a job that failed, and
        JobInterruptedError if it was cancelled.
        """
        if isinstance(job, str):
            job = self.get_job(job)
        wait, longest = jobs.WAIT_SECONDS
        while (result := jobs.result_of(job)) is None:
            time.sleep(wait)
            wait = min(1.5 * wait, longest)
            job = self.get_job(job["id"])
            if on_progress is not None:
                on_progress(job["progress"])
        return result

    def pull(
        self,
        model: str,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        on_progress: OnProgress | None = None,
    ) -> Pulled:
        """Download the merged model BASE/SET, the set adapters/SET, or the base bases/BASE.

        `parallel` files at a time. Files that are already there are kept, and partial ones are
        resumed, unless the model has changed since. `on_progress` gets the bytes that are there
        and the total. Raises ValueError if a file has a different size or ETag than announced.
        """
        commit: str = self.send(bases.get_repository(model))["sha"]
        files = self.send(bases.list_repository(model, commit))

        def rest_of(path: str, start: int, tag: str) -> Call[bytes]:
            return bases.resolve(model, commit, path, start=start, tag=tag)

        download(self, rest_of, files, Path(folder), parallel, on_progress)
        gain = None
        if files:
            one = max(files, key=lambda one: one["size"])
            gain = self._gain_of(rest_of(one["path"], one["size"] - 1, one["oid"]))
        return {"folder": os.fspath(folder), "commit": commit, "files": files, "delta_gain": gain}

    def _gain_of(self, last: Call[bytes]) -> float | None:
        """Return what the head of a file's last byte says of the deltas that are left.

        None if it says nothing, or cannot be read. The service may learn it only while the file is
        downloaded.
        """
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
    ) -> PulledMerged:
        """Download the merged model of a GGUF base as a GGUF file. Otherwise as `pull_gguf`.

        Changed tensors have the type `dtype` (F16); with `widen="all"`, so have all others that
        are quantized.
        """

        def rest_of(start: int, tag: str | None) -> Call[bytes]:
            return bases.get_merged_file(
                base, set_name, f"{base}.gguf", start=start, dtype=dtype, widen=widen, tag=tag
            )

        pulled = self._pull_file(rest_of, Path(file), on_progress)
        gain = self._gain_of(rest_of(pulled["size"] - 1, pulled["oid"]))
        return {**pulled, "delta_gain": gain}

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
