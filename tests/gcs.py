"""Google Cloud Storage on this machine, for the clients that we use: no stub of theirs or ours.

It answers the calls that TensorFlow, tensorstore and google-cloud-storage make, as documented at
cloud.google.com/storage/docs/json_api. TensorFlow knows one address alone, so it comes through an
HTTPS proxy, which this server is too, under a certificate of its own.
"""

import http.server
import itertools
import json
import pathlib
import re
import socketserver
import ssl
import threading
import urllib.parse
from typing import Any

import trustme

_OBJECT = r"/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)"


class Emulator(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A server of buckets; `stop` ends it.

    Attributes:
      buckets: {bucket: {object: (generation, content)}}.
      forbidden: buckets that nobody may use.
      read_only: buckets that nobody may write to.
      calls: (method, bucket, object) of all requests so far.
    """

    daemon_threads = True

    def __init__(self, folder: pathlib.Path, *buckets: str) -> None:
        """Starts serving; the certificate goes into the folder."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.forbidden: set[str] = set()
        self.read_only: set[str] = set()
        self.calls: list[tuple[str, str, str]] = []
        self.uploads: dict[str, tuple[str, str, bytes]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()
        authority = trustme.CA()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("*.googleapis.com").configure_cert(self.tls)
        self._certificate = folder / "ca.pem"
        authority.cert_pem.write_to_path(self._certificate)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead all clients here."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "CURL_CA_BUNDLE": str(self._certificate),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "HTTPS_PROXY": url,
            "NO_PROXY": "127.0.0.1,localhost",
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
        }

    def folder(self) -> str:
        """A folder gs://BUCKET/... of the first bucket that nobody used before."""
        return f"gs://{next(iter(self.buckets))}/{next(self.numbers)}"

    def content(self, path: str) -> bytes:
        """What is at gs://BUCKET/OBJECT."""
        bucket, _, name = path.removeprefix("gs://").partition("/")
        return self.buckets[bucket][name][1]

    def has(self, path: str) -> bool:
        """Whether the object gs://BUCKET/OBJECT is there."""
        bucket, _, name = path.removeprefix("gs://").partition("/")
        return name in self.buckets[bucket]

    def remove(self, path: str) -> None:
        """Removes the object gs://BUCKET/OBJECT."""
        bucket, _, name = path.removeprefix("gs://").partition("/")
        del self.buckets[bucket][name]

    def cut(self, path: str) -> None:
        """Leaves half of the object gs://BUCKET/OBJECT."""
        bucket, _, name = path.removeprefix("gs://").partition("/")
        content = self.content(path)
        self.buckets[bucket][name] = next(self.numbers), content[: len(content) // 2]

    def stop(self) -> None:
        """Ends the server."""
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Emulator

    def do_CONNECT(self) -> None:
        """Speaks TLS from here on, as the server that the client wants to reach."""
        self.send_response(200)
        self.end_headers()
        connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        _Handler(connection, self.client_address, self.server)
        self.close_connection = True

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        body = self._body()
        for method, pattern, answer in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, url.path)):
                found = {k: urllib.parse.unquote(v) for k, v in match.groupdict().items()}
                bucket, name = found.pop("bucket"), found.pop("name", self.query.get("name", ""))
                with self.server.lock:
                    self.server.calls.append((method, bucket, name))
                    writes = method != "GET" and bucket in self.server.read_only
                    if writes or bucket in self.server.forbidden:
                        return self._send(403)
                    if bucket not in self.server.buckets:
                        return self._send(404)
                    return answer(self, bucket, name, body, **found)
        return self._send(501)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: Any = b"", **headers: Any) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _bucket(self, bucket: str, *_: Any) -> None:
        self._send(200, {"kind": "storage#bucket", "id": bucket, "name": bucket})

    def _layout(self, *_: Any) -> None:
        self._send(200, {"hierarchicalNamespace": {"enabled": False}})

    def _list(self, bucket: str, *_: Any) -> None:
        get, items, prefixes = self.query.get, [], []
        prefix, delimiter = get("prefix", ""), get("delimiter", "")
        first, last = max(get("startOffset", ""), get("pageToken", "")), get("endOffset")
        answer = {"kind": "storage#objects", "items": items, "prefixes": prefixes}
        for name in sorted(self.server.buckets[bucket]):
            if not name.startswith(prefix) or name < first or (last and name >= last):
                continue
            if len(items) + len(prefixes) >= int(get("maxResults", 1000)):
                answer["nextPageToken"] = name
                break
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if not found:
                items.append(self._metadata(bucket, name))
            elif prefix + head + delimiter not in prefixes:
                prefixes.append(prefix + head + delimiter)
        self._send(200, answer)

    def _metadata(self, bucket: str, name: str) -> dict[str, str]:
        generation, content = self.server.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "generation": str(generation),
            "size": str(len(content)),
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _get(self, bucket: str, name: str, *_: Any) -> None:
        if name not in self.server.buckets[bucket]:
            return self._send(404)
        if self.query.get("alt") != "media":
            return self._send(200, self._metadata(bucket, name))
        return self._read(bucket, name)

    def _read(self, bucket: str, name: str, *_: Any) -> None:
        if name not in self.server.buckets[bucket]:
            return self._send(404)
        generation, content = self.server.buckets[bucket][name]
        if self.query.get("ifGenerationNotMatch") == str(generation):
            return self._send(304)
        if not self._may_write(bucket, name):
            return self._send(412)
        headers = {"x_goog_generation": generation}
        if not (wanted := self.headers.get("Range")):
            return self._send(200, content, **headers)
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        if not part:
            return self._send(416)
        said = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        return self._send(206, part, Content_Range=said, **headers)

    def _may_write(self, bucket: str, name: str) -> bool:
        """Whether the object is of the generation that a condition names, 0 for none."""
        generation = self.server.buckets[bucket].get(name, (0, b""))[0]
        return self.query.get("ifGenerationMatch", str(generation)) == str(generation)

    def _store(self, bucket: str, name: str, content: bytes) -> None:
        if not self._may_write(bucket, name):
            return self._send(412)
        self.server.buckets[bucket][name] = next(self.server.numbers), content
        return self._send(200, self._metadata(bucket, name))

    def _upload(self, bucket: str, name: str, body: bytes) -> None:
        if self.query["uploadType"] == "media":
            return self._store(bucket, name, body)
        number = str(next(self.server.numbers))
        self.server.uploads[number] = bucket, name, b""
        where = f"https://www.googleapis.com/upload/storage/v1/b/{bucket}/o?upload_id={number}"
        return self._send(200, Location=where)

    def _go_on(self, bucket: str, _: str, body: bytes) -> None:
        """A part of a resumable upload; all but the last end short of the size that they tell."""
        bucket, name, before = self.server.uploads[self.query["upload_id"]]
        content = before + body
        self.server.uploads[self.query["upload_id"]] = bucket, name, content
        size = self.headers.get("Content-Range", "/*").rpartition("/")[2]
        if size not in ("*", str(len(content))):
            return self._send(308, Range=f"bytes=0-{len(content) - 1}")
        return self._store(bucket, name, content)

    def _rewrite(self, bucket: str, name: str, _: bytes, to_bucket: str, to_name: str) -> None:
        if name not in self.server.buckets[bucket]:
            return self._send(404)
        content = self.server.buckets[bucket][name][1]
        self.server.buckets[to_bucket][to_name] = next(self.server.numbers), content
        return self._send(200, {"kind": "storage#rewriteResponse", "done": True})

    def _delete(self, bucket: str, name: str, _: bytes) -> None:
        if name not in self.server.buckets[bucket]:
            return self._send(404)
        if not self._may_write(bucket, name):
            return self._send(412)
        del self.server.buckets[bucket][name]
        return self._send(204)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


_ROUTES = (
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)", _Handler._bucket),
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)/storageLayout", _Handler._layout),
    ("GET", r"/storage/v1/b/(?P<bucket>[^/]+)/o", _Handler._list),
    ("GET", "/storage/v1/b" + _OBJECT, _Handler._get),
    ("DELETE", "/storage/v1/b" + _OBJECT, _Handler._delete),
    (
        "POST",
        f"/storage/v1/b{_OBJECT}/rewriteTo/b/(?P<to_bucket>[^/]+)/o/(?P<to_name>[^/]+)",
        _Handler._rewrite,
    ),
    ("POST", r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o", _Handler._upload),
    ("PUT", r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o", _Handler._go_on),
    ("GET", r"/(?P<bucket>[^/]+)/(?P<name>.+)", _Handler._read),
)
