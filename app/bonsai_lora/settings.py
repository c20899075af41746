"""Every setting, and the only reader of the environment."""

import os
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_MIB, _GIB = 1 << 20, 1 << 30
_PORT = 8000


def _machine_memory_bytes() -> int:
    """Return the physical memory in bytes, or the container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a listener on `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Settings(BaseSettings):
    """Read from BONSAI_LORA_* variables; each field is also a flag of `bonsai-lora serve`."""

    model_config = SettingsConfigDict(env_prefix="BONSAI_LORA_", extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port to listen on; 0 takes a free one (default: 8000, or none with --uds)",
    )
    uds: Path | None = Field(
        None,
        description="Unix socket to listen on, for its owner and group (mode 0660); a port is "
        "then served only if it is given too",
    )
    store: str = Field(
        "./bonsai-lora-data",
        description="folder of the sets; 'memory:' is a temporary one that goes with the process",
    )
    bases: str | None = Field(
        None, description="folder of base checkpoints, each a folder of safetensors files"
    )
    workers: int = Field(
        1, ge=1, le=256, description="processes that serve; they share the store and agree at once"
    )
    shared_memory: bool = Field(
        False,
        description="true: local clients of /v2 may pass tensors through shared memory; only on "
        "a loopback address or a Unix socket",
    )
    memory_budget_bytes: int = Field(
        default_factory=_machine_memory_bytes,
        ge=0,
        description="most that all sets may hold, as float32 (default: the machine's memory)",
    )
    max_body_bytes: int = Field(
        64 * _MIB, ge=1, description="longest binary body that is held in memory"
    )
    max_json_bytes: int = Field(
        16 * _MIB, ge=1, description="longest JSON body; numbers in bulk go faster as safetensors"
    )
    max_upload_bytes: int = Field(
        8 * _GIB, ge=1, description="longest uploaded adapter; it goes to the disk as it arrives"
    )
    max_header_bytes: int = Field(
        16 * _MIB, ge=2, description="longest safetensors header in a request"
    )
    max_answer_bytes: int = Field(
        256 * _MIB, ge=1, description="most float32 bytes that one apply may answer"
    )
    max_spill_bytes: int = Field(
        4 * _GIB,
        ge=0,
        description="most disk for one streamed merge whose client sends all before it reads",
    )
    max_rows: int = Field(65536, ge=1, description="most rows of one batch")
    max_rank: int = Field(1024, ge=1, description="highest rank of an adapter")
    max_concurrency: int = Field(
        64, ge=1, description="requests with bodies in progress; more get 503 with Retry-After"
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="auto: compute by machine code where it can be made, else in NumPy; off: in "
        "NumPy, with the same answers",
    )
    fast_lane: Literal["auto", "off"] = Field(
        "auto", description="off: every request goes through FastAPI, with the same answers"
    )
    threads: int = Field(
        default_factory=usable_cores,
        ge=1,
        description="worker threads for large pieces of work (default: the number of cores)",
    )
    stall_seconds: float = Field(
        60.0, gt=0, description="a client that sends or takes nothing for so long is broken off"
    )
    shutdown_seconds: int = Field(
        30, ge=0, description="how long SIGTERM waits for requests in progress"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="debug logs every request; info those that change something, fail, or take "
        "over a second",
    )
    log_format: Literal["console", "json"] = Field("console", description="form of the log lines")

    @field_validator("shared_memory")
    @classmethod
    def _check_loopback(cls, value: bool, info: ValidationInfo) -> bool:  # noqa: FBT001
        """Memory of this machine is for callers on this machine."""
        host = info.data.get("host", "")
        has_port = info.data.get("uds") is None or info.data.get("port") is not None
        if value and has_port and not is_loopback(host):
            raise ValueError(f"shared memory needs a loopback address, but the host is {host!r}")
        return value

    def tcp_port(self) -> int | None:
        """Return the port to listen on; None where only the Unix socket is served."""
        return _PORT if self.port is None and self.uds is None else self.port

    def store_folder(self) -> Path | None:
        """Return the store's folder, or None for a temporary one."""
        return None if self.store == "memory:" else Path(self.store)
