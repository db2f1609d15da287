"""An HTTP proxy that stands in front of a server on loopback and answers badly on demand: real sockets, real faults."""

import http.client
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What happens to one GET: after `at` bytes of its body a `drop` or a `stall`, or a `busy` answer (503) at once."""

    kind: str
    at: int = 0


class FlakyProxy:
    """Forwards to `upstream` (a port); each GET of a `.tar` uses up the next of `faults`, or meets `always`."""

    def __init__(self, upstream: int):
        self.upstream = upstream
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.downloads: list[str] = []  # paths of all GETs of a `.tar`
        self.stall_seconds = 30.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def next_fault(self, path: str) -> Fault | None:
        if not path.partition("?")[0].endswith(".tar"):
            return None
        self.downloads.append(path.partition("?")[0])
        try:
            return self.faults.popleft()
        except IndexError:
            return self.always

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: FlakyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._forward(None)

        def do_GET(self) -> None:
            self._forward(proxy.next_fault(self.path))

        def _forward(self, fault: Fault | None) -> None:
            if fault is not None and fault.kind == "busy":
                body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                self._begin(503, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
                self.wfile.write(body)
                return
            server = http.client.HTTPConnection("127.0.0.1", proxy.upstream)
            server.request(self.command, self.path, headers=dict(self.headers))
            answer = server.getresponse()
            body = answer.read()
            self._begin(answer.status, answer.getheaders())
            server.close()
            try:
                self.wfile.write(body if fault is None else body[: fault.at])
            except (BrokenPipeError, ConnectionResetError):
                return
            if fault is not None:
                self._break(fault)

        def _begin(self, status: int, headers: list[tuple[str, str]]) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()

        def _break(self, fault: Fault) -> None:
            self.wfile.flush()
            if fault.kind == "stall":
                time.sleep(proxy.stall_seconds)
            self.close_connection = True
            self.connection.shutdown(2)  # also for the copies that forked children hold

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
