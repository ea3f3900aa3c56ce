"""A machine's metadata: asked only where there is a TPU, and never for long."""

import http.server
import threading

import pytest

from glide_jax.devices import tpu_metadata


@pytest.fixture
def server(monkeypatch):
    """A server of metadata that knows one attribute, and notes what was asked."""

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            known = self.path.endswith("/attributes/agent-worker-number")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(b"3" if known else b"none")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as found:
        threading.Thread(target=found.serve_forever).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{found.server_port}")
        # It is not asked through a proxy.
        monkeypatch.setenv("http_proxy", "http://localhost:1")
        yield asked
        found.shutdown()


def test_an_attribute_is_asked(server, capsys):
    assert tpu_metadata.ask("agent-worker-number") == "3"
    assert tpu_metadata.ask("tpu-env") is None
    path = "/computeMetadata/v1/instance/attributes/agent-worker-number"
    assert server[0] == (path, "Google")
    assert capsys.readouterr().err == ""


def test_a_server_that_is_not_there_is_one_note(monkeypatch, capsys):
    monkeypatch.setenv("GCE_METADATA_IP", "localhost:1")
    assert tpu_metadata.ask("worker-network-endpoints") is None
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and notes[0].startswith("note: this TPU's metadata do not answer")


@pytest.mark.parametrize(
    ("vendor", "library", "asks"),
    [("0x1ae0", "/libtpu.so", True), ("0x10de", "/libtpu.so", False), ("0x1ae0", None, False)],
)
def test_only_a_machine_with_a_tpu_is_asked(tmp_path, monkeypatch, vendor, library, asks):
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(tpu_metadata, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    if library:
        monkeypatch.setenv("TPU_LIBRARY_PATH", library)
    found = tpu_metadata.tpu_metadata(tmp_path)
    assert found is (tpu_metadata.ask if asks else None)
