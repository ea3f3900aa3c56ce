"""A stand-in for the Hugging Face Hub on this machine, as far as data sets are read from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


@contextmanager
def serve(repository: str, revision: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve the files of one data set at one revision; yield the address of the server."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        def _missing(self, code: str) -> None:
            self._answer(404, b"{}", X_Error_Code=code)

        def do_GET(self) -> None:
            path = unquote(self.path).partition("?")[0]
            api, files_at = f"/api/datasets/{repository}", f"/datasets/{repository}/resolve/"
            if path.startswith(files_at):
                self._file(path.removeprefix(f"{files_at}{revision}/"))
            elif path == api or path == f"{api}/revision/{revision}":
                self._answer(200, json.dumps({"id": repository, "sha": "0" * 40}).encode())
            elif path.startswith(f"{api}/tree/{revision}"):
                folder = path.removeprefix(f"{api}/tree/{revision}").strip("/")
                self._tree(folder, "recursive=true" in self.path.lower())
            else:
                self._missing("RevisionNotFound" if path.startswith(api) else "RepoNotFound")

        def _tree(self, folder: str, deep: bool) -> None:
            start = f"{folder}/" if folder else ""
            inside = [name.removeprefix(start) for name in files if name.startswith(start)]
            if not inside:
                return self._missing("EntryNotFound")
            parents = {
                n.rpartition("/")[0] if deep else n.split("/")[0] for n in inside if "/" in n
            }
            found = [{"type": "directory", "path": start + name, "oid": "1"} for name in parents]
            found += [
                {"type": "file", "path": start + name, "size": len(files[start + name]), "oid": "1"}
                for name in inside
                if deep or "/" not in name
            ]
            self._answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def _file(self, name: str) -> None:
            if name not in files:
                return self._missing("EntryNotFound")
            data, asked = files[name], self.headers.get("range", "")
            if not asked:
                return self._answer(200, data)
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self._answer(206, part, Content_Range=place)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
