"""An S3 server of this process for tests: moto's, over HTTP on every address of this machine, with
faults on demand.

Other processes and hosts reach it by ``environment``. Faults are set in the process that holds it
and hold for every client. Errors have the status, code and sentence of Amazon's; as there, an
answer to HEAD has no body.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

KEY, SECRET = "AKIATESTSOFMOELAB000", "secret-of-the-tests"
REFUSALS = {
    "InvalidAccessKeyId": (
        "403 Forbidden",
        "The AWS Access Key Id you provided does not exist in our records.",
    ),
    "SignatureDoesNotMatch": (
        "403 Forbidden",
        "The request signature we calculated does not match the signature you provided. Check your "
        "key and signing method.",
    ),
    "RequestTimeTooSkewed": (
        "403 Forbidden",
        "The difference between the request time and the current time is too large.",
    ),
    "AuthorizationHeaderMalformed": (
        "400 Bad Request",
        "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'x'",
    ),
    "PermanentRedirect": (
        "301 Moved Permanently",
        "The bucket must be addressed using the specified endpoint.",
    ),
    "QuotaExceeded": ("403 Forbidden", "Quota exceeded"),
    "ExpiredToken": ("400 Bad Request", "The provided token has expired."),
    "AccessDenied": ("403 Forbidden", "Access Denied"),
    "SlowDown": ("503 Slow Down", "Please reduce your request rate."),
    "InternalError": (
        "500 Internal Server Error",
        "We encountered an internal error. Please try again.",
    ),
}
CUT_UPLOAD, CUT_DOWNLOAD = "cut upload", "cut download"
"""The connection ends in the middle of the body; of an upload nothing is kept."""
SHORT = "short download"
"""Half of the body, without the checksum: nothing says that there is more."""
BODY = 1024
"""Bytes of a body that is long enough to be cut."""

Environ = dict[str, Any]
Hits = Callable[[str, str], bool]
"""Whether a fault is for a request, by its method and path."""


@dataclass
class Fault:
    """What happens to the next ``times`` requests for which ``hits`` is true: a refusal, by its
    code in ``REFUSALS``, or a cut connection.
    """

    kind: str
    times: float
    hits: Hits
    seen: int = 0

    def take(self, environ: Environ, answer: int | None = None) -> bool:
        """Whether it happens to this request; ``answer``: bytes of the answer, once it is made."""
        method, size = environ["REQUEST_METHOD"], int(environ.get("CONTENT_LENGTH") or 0)
        fits = self.kind != CUT_UPLOAD or (method == "PUT" and size >= BODY)
        if self.kind in (CUT_DOWNLOAD, SHORT):
            fits = method == "GET" and answer is not None and answer >= BODY
        elif answer is not None:
            fits = False
        if not fits or self.seen >= self.times or not self.hits(method, environ["PATH_INFO"]):
            return False
        self.seen += 1
        return True


@dataclass
class S3Server:
    """Attributes:
    port: it listens there on every address of this machine.
    faults: tried in turn for each request.
    listed_at: listings tell what was there at this moment of ``time.monotonic``, None: now;
        objects themselves are read as they are.
    wordless: refusals have a code and no sentence, as those of Ceph.
    before_answer: called with method and path once the answer is made and before it is sent.
    sent: method, path and bytes of the body of each answer.
    """

    port: int = 0
    faults: list[Fault] = field(default_factory=list)
    listed_at: float | None = None
    wordless: bool = False
    before_answer: Callable[[str, str], object] | None = None
    sent: list[tuple[str, str, int]] = field(default_factory=list)
    _history: list[tuple[float, str, int | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server(
            "0.0.0.0", self.port, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def create(self, bucket: str) -> None:
        _moto().create_bucket(bucket, "us-east-1")

    def put(self, folder: Path, name: str, bucket: str = "bucket") -> None:
        """The files of ``folder`` as objects below ``name``."""
        for path in (path for path in folder.rglob("*") if path.is_file()):
            key = f"{name}/{path.relative_to(folder).as_posix()}"
            _moto().put_object(bucket, key, path.read_bytes())

    def objects(self, bucket: str = "bucket") -> dict[str, bytes]:
        """Content by key."""
        keys = _moto().buckets[bucket].keys
        return {name: key.value for name, key in keys.items()}

    def unfinished_uploads(self, bucket: str = "bucket") -> list[str]:
        """Keys of uploads in parts that were neither completed nor aborted."""
        return [upload.key_name for upload in _moto().buckets[bucket].multiparts.values()]

    def environment(self, address: str = "127.0.0.1") -> dict[str, str]:
        """What a client's process needs, on a host that calls this machine ``address``."""
        return {
            "AWS_ENDPOINT_URL": f"http://{address}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def fault(
        self,
        kind: str,
        times: float = float("inf"),
        hits: Hits = lambda method, path: True,
    ) -> Iterator[Fault]:
        fault = Fault(kind, times, hits)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def _answer(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            kind = next((fault.kind for fault in self.faults if fault.take(environ)), "")
        if not kind and f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            kind = "InvalidAccessKeyId"
        if kind == CUT_UPLOAD:
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]) // 2)
            self._hang_up(environ)
        if kind in REFUSALS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return self._refuse(kind, method, start)
        listing = method == "GET" and "list-type=2" in environ["QUERY_STRING"]
        if listing and self.listed_at is not None:
            return self._old_listing(environ, start, self.listed_at)
        answers: list[tuple[str, list[tuple[str, str]]]] = []

        def note(status: str, headers: list[tuple[str, str]], *rest: Any) -> None:
            answers.append((status, headers))

        body = b"".join(self._moto(environ, note))
        status, headers = answers[-1]
        if status.startswith("2"):
            self._remember(environ)
        if self.before_answer:
            self.before_answer(method, path)
        with self._lock:
            self.sent.append((method, path, len(body)))
            hit = next((one for one in self.faults if one.take(environ, len(body))), None)
        if hit and hit.kind == SHORT:
            body = body[: len(body) // 2]
            stated = ("content-length", "x-amz-checksum")
            headers = [pair for pair in headers if not pair[0].lower().startswith(stated)]
            headers.append(("Content-Length", str(len(body))))
        elif hit:
            start(status, headers)(body[: len(body) // 2])
            self._hang_up(environ)
        start(status, headers)
        return [body]

    def _remember(self, environ: Environ) -> None:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        part = "uploadId" in environ["QUERY_STRING"] and method != "POST"
        if method in ("PUT", "POST", "DELETE") and not part:
            size = None if method == "DELETE" else int(environ.get("CONTENT_LENGTH") or 0)
            self._history.append((time.monotonic(), path, size))

    @staticmethod
    def _hang_up(environ: Environ) -> NoReturn:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError

    def _refuse(self, code: str, method: str, start: Callable[..., Any]) -> list[bytes]:
        status, sentence = REFUSALS[code]
        message = f"<Message>{'' if self.wordless else sentence}</Message>"
        body = f"<Error><Code>{code}</Code>{message}</Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if method == "HEAD" else body]

    def _old_listing(
        self, environ: Environ, start: Callable[..., Any], moment: float
    ) -> list[bytes]:
        bucket = environ["PATH_INFO"].strip("/")
        prefix = unquote(parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0])
        known: dict[str, int | None] = {}
        for when, path, size in list(self._history):
            owner, _, key = path.strip("/").partition("/")
            if when <= moment and owner == bucket and key.startswith(prefix):
                known[key] = size
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><ETag>&quot;0&quot;</ETag><Size>{size}</Size></Contents>"
            for key, size in sorted(known.items())
            if size is not None and key
        )
        body = (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        ).encode()
        start("200 OK", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


def _moto() -> Any:
    """What all servers of this process hold."""
    return s3_backends["123456789012"]["aws"]


@contextmanager
def serve() -> Iterator[S3Server]:
    """A server with an empty bucket; clients that this process keeps know it afterwards no more."""
    import s3fs

    server = S3Server()
    try:
        _moto().reset()
        server.create("bucket")
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.close()
