"""A TCP proxy in front of a server on loopback that cuts connections on demand: real sockets."""

import contextlib
import socket
import threading

CHUNK = 1 << 16


class DroppingProxy:
    """Forwards to `upstream` (a port). Each entry of `drops` cuts one connection after so many bytes to the server."""

    def __init__(self, upstream: int):
        self.upstream, self.drops, self.dropped = upstream, list[int](), 0
        self.sent = 0  # bytes to the server, in all
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """From here on the address is nobody's."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, and would keep it open
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream))
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while content := source.recv(CHUNK):
                passed += len(content)
                if to_server and self._is_cut(len(content), passed):
                    break
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()  # else what is still sent here would be taken, and not answered

    def _is_cut(self, size: int, passed: int) -> bool:
        with self._lock:
            self.sent += size
            if not self.drops or passed < self.drops[0]:
                return False
            self.drops.pop(0)
            self.dropped += 1
            return True
