"""The server of a page that is watched: the page, and what changed since the browser last asked.

It answers GET alone, and two paths below a prefix, which is a random token where it listens on
another address than loopback. Nothing in a request becomes a path of a file. A request whose Host
names neither an address nor this server is refused: a page of another site that lets its own name
point here (DNS rebinding) cannot read the answers. No header lets another origin read them either.
"""

import gzip
import hmac
import ipaddress
import secrets
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import parse_qsl, urlsplit

from moe_lab.errors import RunError, expected
from moe_lab.watch.board import Board, View
from moe_lab.watch.page import live_page
from moe_lab.watch.place import Place

LOOPBACK = "127.0.0.1"
PORT = 8642
TOKEN_BYTES = 24
REQUEST_SECONDS = 30.0
"""Of a request until it is whole, at most."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer; the page has a policy of its own in place of that one."""


class WatchServer(ThreadingHTTPServer):
    """Serves the board of a place until ``shutdown``; ``url`` is what a reader opens.

    Raises ``RunError`` for an address that cannot be listened on, and for a place without runs.
    """

    daemon_threads = True

    def __init__(self, place: Place, host: str = LOOPBACK, port: int = PORT) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.host = host
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            got = f"{host} port {port} ({why})"
            hint = "--port 0, which takes a free one"
            raise RunError(expected("an address to listen on", got, hint), field="port") from error
        self.token = "" if _is_loopback(host) else secrets.token_urlsafe(TOKEN_BYTES)
        page, self.policy = live_page(place.name)  # first: it takes memory for a moment
        self.page = gzip.compress(page, 6)
        self.board = Board(place)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the name server for this machine's name

    @property
    def url(self) -> str:
        port = self.server_address[1]
        name = self.host
        if name in ("", "0.0.0.0", "::"):
            name = socket.gethostname()
        shown = f"[{name}]" if ":" in name else name
        return f"http://{shown}:{port}/" + (f"{self.token}/" if self.token else "")

    def knows(self, host: str) -> bool:
        """Whether a request with this Host header was meant for this server."""
        name = urlsplit(f"//{host}").hostname or ""
        own = {self.host.lower(), socket.gethostname().lower()} if self.token else set()
        return name in {"localhost", *own} or _is_address(name)

    def handle_error(self, request: object, client_address: object) -> None:
        """Report what failed on standard error, unless the browser went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = REQUEST_SECONDS
    server_version, sys_version = "moe-lab", ""

    def do_GET(self) -> None:
        try:
            if not self.server.knows(self.headers.get("Host", "")):
                return self._refuse(421, "this address is not the one that moe-lab watch serves")
            parts = urlsplit(self.path)
            path = parts.path.removeprefix("/")
            if token := self.server.token:
                given, _, path = path.partition("/")
                if not hmac.compare_digest(given.encode(), token.encode()):
                    return self._refuse(404, "open the address that moe-lab watch printed")
                if parts.path == f"/{token}":  # the page asks below its own address
                    return self._send(308, b"", "text/plain", {"Location": f"/{token}/"})
            query = dict(parse_qsl(parts.query, max_num_fields=12))
        except ValueError:
            return self._refuse(400, "not a request of this page")
        if path == "":
            headers = {"Content-Security-Policy": self.server.policy, "Content-Encoding": "gzip"}
            return self._send(200, self.server.page, "text/html", headers)
        if path != "changes":
            return self._refuse(404, "there is nothing here")
        board = self.server.board
        board.refresh()
        body = board.changes(query.get("mark", ""), query.get("seen", ""), View.of(query))
        self._send(200, body.encode(errors="replace"), "application/json")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One plain line in place of a page that repeats the request."""
        self._refuse(code, "moe-lab watch answers GET only" if code == 501 else "not a request")

    def _refuse(self, code: int, line: str) -> None:
        self._send(code, f"{line}\n".encode(), "text/plain")

    def _send(
        self, code: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        fixed = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in (HEADERS | fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: an address may hold the token."""


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
