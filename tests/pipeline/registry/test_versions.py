"""An address that is no MLflow is said in a line by whoever asks it, and nothing is made there."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.command_line.lineage import explain_command, models_command
from flows.requests.registration import registration_run
from pipeline.errors import InputError
from pipeline.registry.versions import every, require_tracking_server, sqlite_file
from tests.pipeline.registration.stores import exported


class Elsewhere(BaseHTTPRequestHandler):
    """A web server that knows nothing of MLflow: at /page it answers everything with a page."""

    def do_GET(self):
        found = self.path.startswith("/page")
        self.send_response(200 if found else 403 if self.path.startswith("/door") else 404)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def elsewhere():
    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:notaport", "MLflow store http://127.0.0.1:notaport: Port could not be cast to integer"),
        ("htp://foo", "MLflow store htp://foo: htp:// is no store of MLflow's; say http(s)://HOST:PORT or sqlite:///"),
        ("localhost:5000", "localhost:// is no store of MLflow's"),
        ("127.0.0.1:5000", "the folder 127.0.0.1:5000 does not exist"),
        ("sqlite:///{tmp}/nowhere/mlflow.db", "the folder {tmp}/nowhere does not exist; make it, or correct MLFLOW_TR"),
        ("sqlite://mlflow.db", "no path; say sqlite:///PATH"),
        ("file://{tmp}/nowhere", "the folder {tmp}/nowhere does not exist"),
        ("{elsewhere}", "what answers there is no MLflow; correct MLFLOW_TRACKING_URI"),
        ("{elsewhere}/page", "what answers there is no MLflow"),
    ],
)
def test_an_address_that_is_no_mlflow_is_refused_in_a_line_by_every_command(
    tmp_path, monkeypatch, elsewhere, uri, words
):
    model, home = str(exported(tmp_path / "m")), tmp_path / "home"
    before = sorted(tmp_path.rglob("*"))
    uri, words = (text.format(tmp=tmp_path, elsewhere=elsewhere) for text in (uri, words))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for command in (
        lambda: models_command(str(home), print),
        lambda: explain_command("models:/ants/1", False, False, None, str(home), print),
        lambda: registration_run(model, "ants", home=home),
    ):
        with pytest.raises(InputError) as error:
            command()
        assert words in str(error.value) and len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_that_is_not_there_yet_has_nothing_registered_and_is_not_made_by_asking(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    assert models_command(str(tmp_path / "home"), lambda line, **_: said.append(line)) == 0
    assert "nothing is registered at sqlite" in said[0]
    with pytest.raises(InputError, match="nothing is registered there, it does not exist yet; register a run first"):
        explain_command("models:/ants/1", False, False, None, str(tmp_path / "home"), print)
    (tmp_path / "other.db").write_text("no database of sqlite")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(InputError, match="other.db cannot be read: ") as error:
        models_command(str(tmp_path), print)
    assert "\n" not in str(error.value) and (tmp_path / "other.db").read_text() == "no database of sqlite"
    assert not (tmp_path / "home").exists()


def test_a_door_is_for_mlflow_to_open(elsewhere, monkeypatch):
    require_tracking_server(f"{elsewhere}/door")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    require_tracking_server(elsewhere)  # without its key this may be another place


def test_the_file_of_a_store_and_all_pages_of_a_search():
    assert str(sqlite_file("sqlite:////a/b.db?timeout=1")) == "/a/b.db" and sqlite_file("http://a") is None
    pages = {None: ([1, 2], "next"), "next": ([3], None)}

    class Page(list):
        token = None

    def search(what, page_token):
        page = Page(pages[page_token][0])
        page.token = pages[page_token][1]
        return page

    assert every(search, "all") == [1, 2, 3]
