"""A server of S3 in a few lines, which can misbehave; `tests/cluster` has a real one.

It has what `storage.bucket` asks of one for small objects: conditional writes and deletes, and lists.
"""

import contextlib
import hashlib
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "key",
    "AWS_REGION": "us-east-1",
}
BUCKET = "/sets/"


@contextlib.contextmanager
def serving_s3(**faults):
    """Run a server on a free port; yield it. `faults` are attributes of `S3`."""
    server = S3(**faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class S3(ThreadingHTTPServer):
    """The bucket `sets`, its objects by key."""

    def __init__(self, *, ignores_conditions=False, deletes="always", status=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ignores_conditions = ignores_conditions
        """Whether a DELETE goes ahead whatever its If-Match says."""
        self.deletes = deletes
        """Whether a DELETE deletes: always, never (it is refused), or only in what it says."""
        self.status = status
        """What every request is answered with; None for what it asks for."""
        self.objects = {}
        self.asked = []
        """Method and path of each request."""

    def variables(self):
        """What a client needs in its environment."""
        return VARIABLES | {"AWS_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Print nothing."""

    def _answer(self):
        url = urlsplit(self.path)
        self.key, self.query = url.path.removeprefix(BUCKET), parse_qs(url.query, True)
        self.sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, url.path))
        if self.server.status is not None:
            self._send(self.server.status)
        else:
            getattr(self, f"_{self.command.lower()}")()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815 - of http.server

    def _send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _present(self):
        return self.server.objects.get(self.key)

    def _get(self):
        if "list-type" in self.query:
            self._list()
        elif self._present is None:
            self._send(404)
        elif self.headers.get("If-None-Match") == _etag(self._present):
            self._send(304)
        else:
            headers = {"ETag": _etag(self._present), "Last_Modified": formatdate(usegmt=True)}
            self._send(200, self._present, **headers)

    _head = _get

    def _put(self):
        expected, present = self.headers.get("If-Match"), self._present
        if self.headers.get("If-None-Match") == "*" and present is not None:
            self._send(412)
        elif expected is not None and (present is None or expected != _etag(present)):
            self._send(412 if present is not None else 404)
        else:
            self.server.objects[self.key] = self.sent
            self._send(200, ETag=_etag(self.sent))

    def _delete(self):
        present = self._present
        is_met = present is not None and self.headers.get("If-Match") in (None, _etag(present))
        if self.server.deletes == "never":
            self._send(403)
        elif not is_met and not self.server.ignores_conditions:
            self._send(412)
        else:
            if self.server.deletes == "always":
                self.server.objects.pop(self.key, None)
            self._send(204)

    def _post(self):
        """Delete several objects."""
        keys = re.findall("<Key>([^<]*)</Key>", self.sent.decode())
        for key in keys:
            self.server.objects.pop(key, None)
        found = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        text = f"<DeleteResult>{found}</DeleteResult>"
        self._send(200, text.encode(), Content_Type="application/xml")

    def _list(self):
        prefix, after = (self.query.get(one, [""])[0] for one in ("prefix", "start-after"))
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><ETag>{escape(_etag(body))}</ETag><Size>{len(body)}"
            "</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, body in sorted(self.server.objects.items())
            if key.startswith(prefix) and key > after
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        self._send(200, text.encode(), Content_Type="application/xml")


def _etag(body):
    return f'"{hashlib.md5(body).hexdigest()}"'
