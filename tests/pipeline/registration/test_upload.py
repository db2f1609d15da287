"""A model reaches a real MLflow server whole, whatever becomes of the connection, or there is no version of it."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from pipeline.errors import FaultError
from pipeline.rank import Stopped
from pipeline.registration import publish, upload
from pipeline.registry.locate import locate_model
from tests.pipeline.dropping_proxy import DroppingProxy
from tests.pipeline.registration.servers import tracking_server
from tests.pipeline.registration.stores import exported, registered

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with tracking_server(folder) as port:
        yield folder, port


@pytest.fixture
def proxy(server):
    made = DroppingProxy(server[1])
    yield made
    made.close()


def wide(directory, megabytes: int):
    """A model of so many megabytes."""
    width = 768
    depth = max(1, round(megabytes * MIB / (12 * width * width * 4)))
    return exported(directory, embed_dim=width, depth=depth, num_heads=12)


@pytest.mark.slow
def test_a_connection_that_drops_in_the_middle_costs_a_try_and_nothing_else(store, server, proxy, tmp_path, caplog):
    model = wide(tmp_path / "m", 54)
    size = (model / "model.safetensors").stat().st_size
    assert size > 50 * MIB
    proxy.drops = [20 * MIB, 45 * MIB]
    registered(store, model, "dropped", uri=proxy.url)
    assert proxy.dropped == 2 and proxy.sent > size + 60 * MIB  # sent thrice, twice in part
    source = locate_model("models:/dropped@champion", tracking_uri=proxy.url, home=store)
    assert source.path.startswith(str(store / "registered"))
    proxy_sent = proxy.sent
    Path(source.path, "config.json").write_text("{}")
    assert locate_model("models:/dropped/1", tracking_uri=proxy.url, home=store).path == source.path
    again = registered(store, model, "dropped", uri=proxy.url)
    assert again["version"] == 1 and "nothing was uploaded" in again["summary"]
    assert proxy.sent - proxy_sent < MIB
    assert mlflow.pyfunc.load_model("models:/dropped/1").unwrap_python_model().module.num_classes == 3


@pytest.mark.slow
def test_where_the_connection_always_drops_there_is_no_version(store, proxy, tmp_path, monkeypatch):
    model = wide(tmp_path / "m", 30)
    proxy.drops = [20 * MIB] * 1000
    monkeypatch.setattr(upload, "TRIES", 2)
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.1)
    monkeypatch.setitem(upload.SETTINGS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(FaultError, match="artifacts/hf/model.safetensors failed 2 times: .*; no version was made"):
        registered(store, model, "never", uri=proxy.url)
    client = mlflow.MlflowClient(proxy.url)
    assert not client.search_model_versions("name='never'")
    assert not [one.name for one in client.search_registered_models() if one.name == "never"]
    proxy.drops = []
    monkeypatch.setattr(upload, "TRIES", 6)
    assert registered(store, model, "never", uri=proxy.url)["promoted"]


KILLED = """
import sys
from pathlib import Path
from tests.pipeline.registration.stores import registered
registered(Path(sys.argv[1]), Path(sys.argv[2]), "killed", uri=sys.argv[3])
"""


@pytest.mark.slow
def test_a_registration_that_is_killed_while_it_uploads_leaves_no_version_and_the_next_one_is_whole(
    store, proxy, tmp_path
):
    model = wide(tmp_path / "m", 54)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store), str(model), proxy.url])
    deadline = time.monotonic() + 200
    while proxy.sent < 20 * MIB:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    client = mlflow.MlflowClient(proxy.url)
    assert not client.search_model_versions("name='killed'")
    assert registered(store, model, "killed", uri=proxy.url)["uri"] == "models:/killed/1"
    locate_model("models:/killed@champion", tracking_uri=proxy.url, home=store)


def test_a_request_to_stop_is_no_fault_that_is_tried_again():
    def stop():
        raise Stopped("stopped on request")

    with pytest.raises(Stopped):
        upload.patiently("an upload", stop)


@pytest.mark.slow
def test_a_registry_that_goes_away_meanwhile_is_a_fault(store, server, tmp_path, monkeypatch):
    model, proxy = exported(tmp_path / "m"), DroppingProxy(server[1])
    monkeypatch.setitem(upload.SETTINGS, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(publish, "_new_version", lambda *arguments: gone(proxy))
    with pytest.raises(FaultError, match="does not answer .*; what was registered by then stays, run it again"):
        registered(store, model, "gone", uri=proxy.url)


def gone(proxy: DroppingProxy):
    """The server's address is nobody's from here on."""
    proxy.close()
    proxy.drops = [0] * 1000
    return mlflow.MlflowClient(proxy.url).create_registered_model("gone")


@pytest.mark.slow
def test_bytes_that_the_store_does_not_give_back_are_sent_again(store, server, tmp_path, monkeypatch):
    """A disk of the server that turns a bit once: the size is right, the hash is not."""
    folder, port = server
    sent, turned = mlflow.MlflowClient.log_model_artifact, []

    def turn_a_bit(self, model_id, local_path, artifact_path=None):
        sent(self, model_id, local_path, artifact_path)
        if local_path.endswith("model.safetensors") and not turned:
            (stored,) = folder.glob(f"artifacts/**/{model_id}/**/model.safetensors")
            content = bytearray(stored.read_bytes())
            content[-1] ^= 1
            stored.write_bytes(content)
            turned.append(stored)

    monkeypatch.setattr(mlflow.MlflowClient, "log_model_artifact", turn_a_bit)
    registered(store, exported(tmp_path / "m"), "turned", uri=f"http://127.0.0.1:{port}")
    assert turned
    locate_model("models:/turned/1", tracking_uri=f"http://127.0.0.1:{port}", home=store)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_gigabytes_arrive_over_a_connection_that_drops(store, proxy, tmp_path, capsys):
    model = wide(tmp_path / "m", 2048)
    size = (model / "model.safetensors").stat().st_size
    assert size > 2_000_000_000
    proxy.drops = [900 * MIB]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    registered(store, model, "large", uri=proxy.url)
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capsys.disabled():
        print(f"\n{size:,} bytes: {seconds:.0f} s, peak {peak / 1e6:.2f} GB ({before / 1e6:.2f} GB before)")
    assert proxy.dropped == 1
    locate_model("models:/large/1", tracking_uri=proxy.url, home=store)
