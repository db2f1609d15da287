"""Ports that are chosen long before a server listens on them."""

import socket

import pytest

from pipeline import ports
from pipeline.errors import FaultError
from pipeline.ports import free_port


def test_a_port_that_somebody_listens_on_is_not_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(preferred=port) not in (port, 0)
    assert free_port(preferred=port) == port


@pytest.mark.parametrize("address", ["", "127.0.0.1"])
def test_no_connection_that_goes_out_can_be_lent_the_port(address):
    lent = range(*map(int, ports.EPHEMERAL.read_text().split()))
    chosen = {free_port(address) for _ in range(50)}
    assert len(chosen) > 40 and all(port not in lent for port in chosen)


@pytest.mark.parametrize("content", ["1024\t65535\n", "words\n", None])
def test_a_machine_whose_range_begins_low_or_is_not_told_still_has_a_port(monkeypatch, tmp_path, content):
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    if content is not None:
        (tmp_path / "range").write_text(content)
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert server.getsockname()[1] > 0


def test_where_no_port_is_free_the_address_is_named():
    with pytest.raises(FaultError, match="there is no free port on 192.0.2.1"):
        free_port("192.0.2.1")  # of no interface
