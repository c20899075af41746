"""Every call of the contract as a method of both clients."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from bonsai_lora.client.call import Call
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

if TYPE_CHECKING:
    from bonsai_lora.client.asynchronous import AsyncClient
    from bonsai_lora.client.blocking import Client

P = ParamSpec("P")
T = TypeVar("T")


class Method(Generic[P, T]):
    """The method that sends the call that `make` makes; of `AsyncClient`, it is awaited.

    It has the name, docstring and parameters of `make`.
    """

    def __init__(self, make: Callable[P, Call[T]]) -> None:
        self._method = _method("send", make)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(
        self, client: "AsyncClient", owner: type
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, client: Any, owner: type) -> Any:
        return self._method.__get__(client, owner)


class Stream(Generic[P]):
    """As `Method`, but it yields the body of the answer in blocks."""

    def __init__(self, make: Callable[P, Call[bytes]]) -> None:
        self._method = _method("_blocks", make)

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: "Client", owner: type) -> Callable[P, Iterator[bytes]]: ...
    @overload
    def __get__(self, client: "AsyncClient", owner: type) -> Callable[P, AsyncIterator[bytes]]: ...

    def __get__(self, client: Any, owner: type) -> Any:
        return self._method.__get__(client, owner)


def _method(sender: str, make: Callable[..., Call[Any]]) -> Any:
    """Return a method that gives the call of `make` to the client's method `sender`."""

    @functools.wraps(make)
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, sender)(make(*args, **kwargs))

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [own, *inspect.signature(make).parameters.values()]
    method.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return method


class Methods:
    """The calls; a subclass has `send` and `_blocks`."""

    create_set = Method(sets.create_set)
    list_page = Method(sets.list_page)
    get_set = Method(sets.get_set)
    upload_set = Method(sets.upload_set)
    upload_files = Method(sets.upload_files)
    upload_tensors = Method(sets.upload_tensors)
    pull_set = Method(sets.pull_set)
    upload_gguf = Method(sets.upload_gguf)
    change_set = Method(sets.change_set)
    delete_set = Method(sets.delete_set)
    get_adapter_config = Method(sets.get_adapter_config)
    get_adapter_tensors = Method(sets.get_adapter_tensors)
    get_adapter_model = Method(sets.get_adapter_model)
    get_adapter_gguf = Method(sets.get_adapter_gguf)

    list_adapters = Method(adapters.list_adapters)
    get_adapter = Method(adapters.get_adapter)
    put_adapter = Method(adapters.put_adapter)
    put_weights = Method(adapters.put_weights)
    delete_adapter = Method(adapters.delete_adapter)

    apply = Method(applying.apply)
    apply_many = Method(applying.apply_many)
    apply_mixed = Method(applying.apply_mixed)
    merge = Method(merging.merge)
    merge_stream = Stream(merging.merge_stream)

    get_set_stats = Method(stats.get_set_stats)
    get_stats = Method(stats.get_stats)
    estimate = Method(stats.estimate)
    get_health = Method(stats.get_health)
    get_readiness = Method(stats.get_readiness)
    get_metrics = Method(stats.get_metrics)

    combine = Method(lab.combine)
    preview_combine = Method(lab.preview_combine)
    compare = Method(lab.compare)
    get_spectrum = Method(lab.get_spectrum)
    get_survival = Method(lab.get_survival)
    start_combine = Method(lab.start_combine)
    start_compare = Method(lab.start_compare)
    start_spectrum = Method(lab.start_spectrum)
    start_extract = Method(lab.start_extract)
    start_survival = Method(lab.start_survival)

    list_jobs = Method(jobs.list_jobs)
    get_job = Method(jobs.get_job)
    cancel_job = Method(jobs.cancel_job)

    list_bases = Method(bases.list_bases)
    get_base = Method(bases.get_base)
    list_merged_files = Method(bases.list_merged_files)
    get_merged_file = Method(bases.get_merged_file)
    stream_merged_file = Stream(bases.stream_merged_file)

    infer = Method(inference.infer)
    get_server = Method(inference.get_server)
    get_server_live = Method(inference.get_server_live)
    get_server_ready = Method(inference.get_server_ready)
    get_model = Method(inference.get_model)
    get_model_ready = Method(inference.get_model_ready)
    get_model_config = Method(inference.get_model_config)
    get_model_statistics = Method(inference.get_model_statistics)
    list_models = Method(inference.list_models)
    load_model = Method(inference.load_model)
    unload_model = Method(inference.unload_model)
    list_regions = Method(inference.list_regions)
    register_region = Method(inference.register_region)
    unregister_regions = Method(inference.unregister_regions)
