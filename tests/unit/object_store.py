"""An object store in memory that speaks as much of S3 as pyarrow asks for: on loopback, without checking signatures."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

HEADER = '<?xml version="1.0" encoding="UTF-8"?>'
TIME = "2026-01-01T00:00:00.000Z"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        bucket, key, _ = self._asked()
        if not key:
            return self._answer(200 if bucket == "bucket" else 404)
        content = self.server.objects.get(key)
        return self._answer(404) if content is None else self._answer(200, content)

    def do_GET(self) -> None:
        _, key, query = self._asked()
        if not key:
            return self._answer(200, self._listing(query))
        content = self.server.objects.get(key)
        if content is None:
            return self._answer(404)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, content)
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
        return self._answer(206, content[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})

    def do_PUT(self) -> None:
        _, key, query = self._asked()
        body = self._body()
        source = self.headers.get("x-amz-copy-source")
        if source:
            self.server.objects[key] = self.server.objects[unquote(source).lstrip("/").split("/", 1)[1]]
            result = f"<CopyObjectResult><LastModified>{TIME}</LastModified><ETag>x</ETag></CopyObjectResult>"
            return self._answer(200, f"{HEADER}{result}".encode())
        if "partNumber" in query:
            self.server.parts.setdefault(query["uploadId"][0], {})[int(query["partNumber"][0])] = body
        else:
            self.server.objects[key] = body
        return self._answer(200, headers={"ETag": '"x"'})

    def do_POST(self) -> None:
        _, key, query = self._asked()
        body = self._body()
        if "uploads" in query:
            name = f"upload-{len(self.server.parts)}"
            self.server.parts[name] = {}
            answer = f"<Bucket>bucket</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
            answer = f"<InitiateMultipartUploadResult>{answer}</InitiateMultipartUploadResult>"
        elif "uploadId" in query:
            parts = self.server.parts.pop(query["uploadId"][0])
            self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
            answer = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        else:
            for name in re.findall(rb"<Key>(.*?)</Key>", body):
                self.server.objects.pop(name.decode(), None)
            answer = "<DeleteResult></DeleteResult>"
        self._answer(200, f"{HEADER}{answer}".encode())

    def do_DELETE(self) -> None:
        _, key, _ = self._asked()
        self.server.objects.pop(key, None)
        self._answer(204)

    def _asked(self) -> tuple[str, str, dict[str, list[str]]]:
        address = urlsplit(self.path)
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        return bucket, key, parse_qs(address.query, keep_blank_values=True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return body
        # Signed pieces inside, each behind a line with its length.
        found = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            length = int(size.split(b";")[0], 16)
            if not length:
                break
            found, body = found + body[:length], body[length + 2 :]
        return found

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        names, folders = [], set()
        for name in sorted(self.server.objects):
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                names.append(name)
        shown = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.server.objects[name])}</Size>"
            f"<LastModified>{TIME}</LastModified><ETag>x</ETag></Contents>"
            for name in names
        )
        shown += "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        count = len(names) + len(folders)
        text = (
            f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>{shown}</ListBucketResult>"
        )
        return f"{HEADER}{text}".encode()

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}


@contextmanager
def object_store() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(what an address ends with, objects of the bucket `bucket` by key): s3://bucket/KEY + the first reaches them."""
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"?endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http&region=us-east-1", server.objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
