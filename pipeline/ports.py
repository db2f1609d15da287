"""Ports that stay free until their server listens, which may be many seconds later. Torch-free.

The kernel lends ports of its ephemeral range to any connection that goes out, also one that a probe just found free. So
ports come from below that range, at random: two programs that look at the same moment hardly meet.
"""

import random
import socket
from contextlib import suppress
from pathlib import Path

from pipeline.errors import FaultError

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LEAST_PORT = 15000  # above most services that are known by number
TRIES = 100


def free_port(address: str = "127.0.0.1", preferred: int = 0) -> int:
    """`preferred` where nobody listens on it, else a port that nobody listens on; `address` "" asks for all interfaces.

    FaultError where there is none.
    """
    below = range(LEAST_PORT, _first_ephemeral())
    chosen = random.Random()  # of the system's entropy: a seed of the run must not make two runs choose alike
    some = chosen.sample(below, min(TRIES, len(below)))
    for port in [*filter(None, [preferred]), *some, 0]:
        with socket.socket() as probe:
            # A port that was closed a moment ago counts as free, as it does for the servers.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind((address, port))
                return probe.getsockname()[1]
    raise FaultError(f"there is no free port on {address or 'this machine'}")


def _first_ephemeral() -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(EPHEMERAL.read_text().split()[0])
    return 32768  # the kernel's default
