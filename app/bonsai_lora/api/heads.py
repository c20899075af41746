"""What HTTP asks of a request head beyond its syntax, which the parser checks (RFC 9112)."""

import re

from bonsai_lora.errors import MalformedRequestError

_HOST = re.compile(rb"[A-Za-z0-9\-._~!$&'()*+,;=%:\[\]]*")
_ABSOLUTE = re.compile(rb"(?:https?)://([^/?#]+)([^#]*)", re.IGNORECASE)

HeaderLine = tuple[bytes, bytes]


def is_host(value: bytes) -> bool:
    """Return whether `value` could be that of a Host header, and of a single one."""
    return _HOST.fullmatch(value) is not None


def check_version(version: str) -> None:
    """Raise MalformedRequestError unless `version` is 1.0 or 1.1."""
    if version not in ("1.0", "1.1"):
        raise MalformedRequestError(
            f"the request is HTTP/{version}; send HTTP/1.1", got=version, expected="1.1"
        )


def resolve_target(target: bytes, lines: list[HeaderLine], version: str) -> bytes:
    """Return the path and query of a request target, after checking the host that it is for.

    A target in absolute form has the host, which replaces that of the Host header in `lines`
    (RFC 9112, section 3.2.2). Raises MalformedRequestError unless HTTP/1.1 comes with one Host
    header, and for a host that is none.
    """
    hosts = [value for name, value in lines if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise MalformedRequestError(
            f"the request has {len(hosts)} Host headers; send exactly one", got=len(hosts)
        )
    if not target.startswith((b"/", b"*")):
        found = _ABSOLUTE.fullmatch(target.partition(b"#")[0])
        hosts = [b"@" if found is None else found[1]]
        lines[:] = [line for line in lines if line[0] != b"host"] + [(b"host", hosts[0])]
        path = b"" if found is None else found[2]
        target = path if path.startswith(b"/") else b"/" + path
    if hosts and not is_host(hosts[0]):
        shown = hosts[0].decode("latin-1")[:200]
        raise MalformedRequestError(
            f"{shown!r} is not the name or address of a host; send the one that is called",
            got=shown,
        )
    return target
