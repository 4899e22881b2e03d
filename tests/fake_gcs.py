"""A bucket in memory behind the part of Cloud Storage's JSON API that gcsfs and tensorstore speak.

`with FakeGCS() as bucket:` serves it on localhost and points both libraries there, in this process
and in those that it starts. `bucket.objects` is what is in it; `bucket.answer = 403, "why"` makes
every answer that one. There is no bucket "nowhere".
"""

import base64
import http.server
import json
import os
import re
import threading
import urllib.parse
from email import message_from_bytes

BUCKET = "my-bucket"
ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
NO_METADATA = "NO_GCE_CHECK"  # else credentials are sought on the network, for minutes
OBJECT = re.compile(rf"/(?:download/)?storage/v1/b/{BUCKET}/o/(.+)")


class FakeGCS:
    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.answer: tuple[int, str] | None = None
        self.lock = threading.Lock()
        self.uploads: dict[str, bytes] = {}  # begun, by name
        handler = type("Handler", (Handler,), {"gcs": self})
        self._server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        self._server.handle_error = lambda *_: None  # a client that was killed
        self.address = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        os.environ |= dict.fromkeys(ADDRESSES, self.address) | {NO_METADATA: "true"}
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        for name in (*ADDRESSES, NO_METADATA):
            del os.environ[name]

    def put(self, name, content):
        self.objects[name] = content
        self.generations[name] = self.generations.get(name, 1000) + 1

    def describe(self, name):
        import google_crc32c

        content = self.objects[name]
        checksum = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        return {"kind": "storage#object", "bucket": BUCKET, "name": name, "crc32c": checksum,
                "size": str(len(content)), "generation": str(self.generations[name]),
                "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}


class Handler(http.server.BaseHTTPRequestHandler):
    gcs: FakeGCS
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and content in one packet; else each answer takes 40 ms

    def log_message(self, *_):
        pass

    def do(self):
        parts = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(parts.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.gcs.lock:
            if self.gcs.answer:
                status, message = self.gcs.answer
                self.reply(status, {"error": {"code": status, "message": message}})
            elif "/b/nowhere/" in parts.path:
                self.missing()
            elif f"/b/{BUCKET}/o" not in parts.path:  # for more than the right to objects gives
                self.reply(403, {"error": {"code": 403, "message": "no right to buckets"}})
            elif found := OBJECT.fullmatch(parts.path):
                self.of_object(urllib.parse.unquote(found[1]))
            elif self.command == "GET":
                self.list()
            else:
                self.upload()

    do_GET = do_POST = do_PUT = do_DELETE = do

    def reply(self, status, content, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def missing(self):
        self.reply(404, {"error": {"code": 404, "message": "Not Found"}})

    def of_object(self, name):
        if name not in self.gcs.objects:
            self.missing()
        elif self.command == "DELETE":
            del self.gcs.objects[name]
            self.reply(204, b"")
        elif self.query.get("alt") != "media":
            self.reply(200, self.gcs.describe(name))
        elif self.query.get("ifGenerationNotMatch") == str(self.gcs.generations[name]):
            self.reply(304, b"")
        else:
            content = self.gcs.objects[name]
            headers = {"x_goog_generation": str(self.gcs.generations[name])}
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, end = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
                headers["Content_Range"] = f"bytes {begin}-{end}/{len(content)}"
                self.reply(206, content[begin:end + 1], **headers)
            else:
                self.reply(200, content, **headers)

    def list(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.gcs.objects):
            if name.startswith(prefix):
                head, found, _ = name[len(prefix):].partition(delimiter or "\0")
                if found:
                    prefixes.add(prefix + head + delimiter)
                else:
                    items.append(self.gcs.describe(name))
        self.reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self):
        kind, name = self.query["uploadType"], self.query.get("name")
        if kind == "multipart":
            message = message_from_bytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + self.body)
            about, content = message.get_payload()
            name, self.body = json.loads(about.get_payload())["name"], content.get_payload(
                decode=True)
        elif kind == "resumable" and "upload_id" not in self.query:
            self.gcs.uploads[name] = b""
            where = urllib.parse.urlencode(self.query | {"upload_id": name})
            return self.reply(200, {}, Location=f"{self.gcs.address}/upload/storage/v1/b/{BUCKET}/o"
                              f"?{where}")
        elif kind == "resumable":
            self.gcs.uploads[name] += self.body
            if self.headers["Content-Range"].endswith("/*"):
                last = len(self.gcs.uploads[name]) - 1
                return self.reply(308, b"", Range=f"bytes=0-{last}")
            self.body = self.gcs.uploads.pop(name)
        wanted = self.query.get("ifGenerationMatch")
        now = self.gcs.generations.get(name, 0) if name in self.gcs.objects else 0
        if wanted is not None and int(wanted) != now:
            return self.reply(412, {"error": {"code": 412, "message": "Precondition Failed"}})
        self.gcs.put(name, self.body)
        self.reply(200, self.gcs.describe(name))
