"""The settings; no other module reads the environment."""

import os
import re
import sys
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bonsai_lora.validation import expectation, shown

_MIB, _GIB = 1 << 20, 1 << 30
_NO_BUDGET = 1 << 53
_PORT = 8000
_BUCKETS = ("s3://", "gs://", "az://")
_NOT_CALLED = "default_factory_not_called"
"""Pydantic's error for a default that could not be computed because another setting is invalid."""
UNGUARDED = (
    "everyone who can connect could read, replace and delete every set; name a file of keys "
    "(--keys-file, BONSAI_LORA_KEYS_FILE), or allow it (--no-auth, BONSAI_LORA_NO_AUTH=true)"
)
"""Why a service without keys does not start."""
_ORIGIN = re.compile(r"https?://[^/?#\s*]+")

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")


def _machine_memory_bytes() -> int:
    """Return the physical memory in bytes, or the container's limit if that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def _memory_budget_bytes(fields: dict[str, Any]) -> int:
    return _NO_BUDGET if is_bucket(fields.get("store", "")) else _machine_memory_bytes()


def _work_memory_bytes(fields: dict[str, Any]) -> int:
    workers: int = fields.get("workers", 1)
    return max(1, _machine_memory_bytes() // 2 // workers)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # missing on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    """Return whether `host` is reachable from this machine only."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def is_bucket(store: str) -> bool:
    """Return whether a store is the URL of a bucket, and not a folder."""
    return store.startswith(_BUCKETS)


def _split(value: Any) -> Any:
    """Return the parts of a list given as text, separated by commas or spaces."""
    return re.split(r"[,\s]+", value.strip(", \t")) if isinstance(value, str) and value else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Settings from BONSAI_LORA_* variables; each field is also a flag of `bonsai-lora serve`."""

    model_config = SettingsConfigDict(
        env_prefix="BONSAI_LORA_", env_ignore_empty=True, extra="ignore"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port to listen on; 0 picks a free one (default: 8000, or none with --uds)",
    )
    uds: Path | None = Field(
        None,
        description="Unix socket to listen on, accessible to its owner and group (mode 0660); no "
        "TCP port is opened then, unless --port is given",
    )
    store: str = Field(
        "./bonsai-lora-data",
        min_length=1,
        description="folder of the sets; 'memory:' for a temporary one, deleted on exit; or a "
        "bucket, such as s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
    )
    cache: str = Field(
        "./bonsai-lora-cache",
        min_length=1,
        description="folder for copies of the sets of a bucket, on this machine's disk",
    )
    cache_bytes: int = Field(
        16 * _GIB,
        ge=1,
        description="most disk space for copies of sets; the least recently used ones are removed",
    )
    stale_seconds: float = Field(
        5.0,
        ge=0,
        description="how long a set of a bucket is served before it is compared with the bucket "
        "again; changes made through other machines are seen within this time",
    )
    stale_if_error_seconds: float = Field(
        3600.0,
        ge=0,
        description="how long copies are served while the bucket does not answer",
    )
    preload: Names = Field(
        (),
        description="names of sets to load before the service is ready; copies of a bucket's sets "
        "are kept then, whatever else is used",
    )
    bases: str | None = Field(
        None,
        description="folder of base models: each GGUF file in it is one, and each subfolder of "
        "safetensors files or with one GGUF file",
    )
    sets: Path | None = Field(
        None,
        description="folder of adapters to import at the start: each PEFT or MLX subfolder, and "
        "each GGUF LoRA, is a set with its name",
    )
    sources: Path | None = Field(
        None,
        description="JSON file of the origins that sets may be pulled from by reference",
    )
    workers: int = Field(
        1, ge=1, le=256, description="worker processes; all see changes to the store immediately"
    )
    shared_memory: bool = Field(
        False,
        description="let local clients of /v2 pass tensors in shared memory; requires a loopback "
        "address or a Unix socket",
    )
    root_path: str = Field(
        "",
        description="path prefix, such as /lora, that a proxy in front removes; it is put into "
        "Location headers and the OpenAPI document",
    )
    tls_cert: Path | None = Field(
        None, description="certificate chain in PEM format, to serve HTTPS; requires --tls-key"
    )
    tls_key: Path | None = Field(
        None, validate_default=True, description="private key of the certificate, in PEM format"
    )
    keys_file: Path | None = Field(
        None,
        description="JSON file of the keys that callers need, written by bonsai-lora keys; it is "
        "read again when it changes",
    )
    no_auth: bool = Field(
        False,
        description="serve everyone who can connect, without keys; needed on addresses that other "
        "machines can reach",
    )
    allowed_hosts: Names = Field(
        (),
        description="host names to answer to without keys, besides localhost and IP addresses; * "
        "for any",
    )
    cors_origins: Names = Field(
        (), description="origins whose web pages may use the service, such as https://example.com"
    )
    trusted_proxies: Names = Field(
        (), description="addresses or networks of proxies whose X-Forwarded headers are true"
    )
    memory_budget_bytes: int = Field(
        default_factory=_memory_budget_bytes,
        ge=0,
        description="largest total size of all sets as float32 (default: the machine's memory; "
        "none for a bucket)",
    )
    max_body_bytes: int = Field(
        64 * _MIB, ge=1, description="longest binary body, which is held in memory"
    )
    max_json_bytes: int = Field(
        16 * _MIB, ge=1, description="longest JSON body; send large tensors as safetensors instead"
    )
    max_upload_bytes: int = Field(
        8 * _GIB, ge=1, description="longest adapter upload, which is written to disk as it arrives"
    )
    max_header_bytes: int = Field(
        16 * _MIB, ge=2, description="longest safetensors header in a request"
    )
    max_answer_bytes: int = Field(
        256 * _MIB, ge=1, description="most bytes of float32 outputs in one response"
    )
    max_spill_bytes: int = Field(
        16 * _GIB,
        ge=0,
        description="most disk space per worker for uploads in progress, and for streamed merges "
        "whose clients do not read yet; and in the store for uploads that wait for their commits",
    )
    work_memory_bytes: int = Field(
        default_factory=_work_memory_bytes,
        ge=1,
        description="most memory per worker for bodies, responses and new matrices at a time; "
        "requests that would need more get 503, or 507 if they never fit (default: half of "
        "the machine's memory, shared by the workers)",
    )
    max_rows: int = Field(65536, ge=1, description="most rows in a batch")
    max_rank: int = Field(1024, ge=1, description="highest rank of an adapter")
    max_modules: int = Field(32768, ge=1, description="most modules of a set")
    max_concurrency: int = Field(
        64,
        ge=1,
        description="most short requests (applies) and most long ones (uploads, merges, new sets, "
        "downloads) in progress per worker; more get 503 with Retry-After",
    )
    max_jobs: int = Field(
        16, ge=1, description="most jobs that run or wait per worker; more get 503"
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="auto: compute with compiled kernels if they can run, otherwise in NumPy; off: "
        "always in NumPy; the last bits of applies may differ",
    )
    fast_lane: Literal["auto", "off"] = Field(
        "auto", description="off: serve every request through FastAPI; responses are the same"
    )
    threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        description="threads per worker for large requests (default: the number of cores)",
    )
    stall_seconds: float = Field(
        60.0,
        gt=0,
        description="stall timeout: a client that sends or reads less than 1 KiB per second "
        "over this time is disconnected",
    )
    shutdown_seconds: int = Field(
        30, ge=0, description="how long to wait for requests in flight after SIGTERM"
    )
    drain_seconds: float = Field(
        0.0,
        ge=0,
        description="how long to go on serving after SIGTERM while /readyz answers 503, so that a "
        "balancer sends nothing more",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="lowest level to log; debug logs every request, info those that change "
        "something, fail, or take over a second",
    )
    log_format: Literal["console", "json"] = Field("console", description="format of log lines")

    @field_validator("shared_memory")
    @classmethod
    def _check_loopback(cls, value: bool, info: ValidationInfo) -> bool:  # noqa: FBT001
        """Refuse shared memory for listeners that other machines can reach."""
        host = info.data.get("host", "")
        has_port = info.data.get("uds") is None or info.data.get("port") is not None
        if value and has_port and not is_loopback(host):
            raise ValueError(
                f"the host {host!r} is not a loopback address, which shared memory requires; "
                "listen on 127.0.0.1 or a Unix socket"
            )
        return value

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, value: str) -> str:
        """Refuse what cannot be put before a path."""
        value = value.rstrip("/")
        if value and not _ROOT_PATH.fullmatch(value):
            raise ValueError("expected the beginning of a path, such as /lora")
        return value

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str) -> str:
        """Refuse an address that is no bucket's, or that nothing here can connect to."""
        if is_bucket(value):
            if not urlsplit(value).netloc:
                raise ValueError("it names no bucket; add it, as in s3://bucket/prefix")
            if find_spec("obstore") is None:
                raise ValueError("it needs obstore, which is not installed; pip install obstore")
        elif _SCHEME.match(value) and value != "memory:":
            raise ValueError(
                "expected a folder, or a bucket that starts with "
                f"{', '.join(_BUCKETS[:-1])} or {_BUCKETS[-1]}"
            )
        return value

    @field_validator("tls_key")
    @classmethod
    def _check_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        """Require both files of TLS or neither, and a port: a Unix socket needs none."""
        if (value is None) != (info.data.get("tls_cert") is None):
            raise ValueError("a certificate and its key belong together; give both or neither")
        if value is not None and info.data.get("uds") is not None:
            raise ValueError("TLS is for a port; leave it out with a Unix socket")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what is no origin, above all the wildcard: any page could then write."""
        for one in value:
            if not _ORIGIN.fullmatch(one):
                raise ValueError(
                    f"{one!r} is not an origin; expected a scheme and a host, such as "
                    "https://example.com"
                )
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what is neither an address nor a network."""
        for one in value:
            try:
                ip_network(one)
            except ValueError:
                raise ValueError(
                    f"{one!r} is neither an address nor a network; expected such as 10.0.0.0/8"
                ) from None
        return value

    def is_reachable(self) -> bool:
        """Return whether other machines can connect to what `serve` listens on."""
        return self.tcp_port() is not None and not is_loopback(self.host)

    def tcp_port(self) -> int | None:
        """Return the port to listen on; None to listen on the Unix socket only."""
        return _PORT if self.port is None and self.uds is None else self.port

    @property
    def is_bucket(self) -> bool:
        """Whether the store is a bucket."""
        return is_bucket(self.store)

    def store_folder(self) -> Path | None:
        """Return the store's folder, or None for a temporary one."""
        return None if self.store == "memory:" else Path(self.store)


class SettingsError(ValueError):
    """Settings are invalid; the message has a line for each."""


def read_settings(**given: Any) -> Settings:
    """Return the settings, of which those given override the environment; raises SettingsError."""
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [_mistake(one) for one in error.errors() if one["type"] != _NOT_CALLED]
        raise SettingsError("\n".join(lines)) from None


def _mistake(error: Any) -> str:
    name = str(error["loc"][0])
    flag, variable = f"--{name.replace('_', '-')}", f"BONSAI_LORA_{name.upper()}"
    value = "missing" if error["input"] is None else shown(error["input"])
    return f"{flag} ({variable}) is {value}; {expectation(error)}"
