"""A bucket on this machine: what of Google Cloud Storage's JSON API its three clients ask for.

gcsfs (behind epath), google-cloud-storage and TensorStore (both behind Orbax) talk to it over HTTP
as they would to storage.googleapis.com. Objects lie in memory. `python server.py BUCKET …` serves
until it is killed and prints its address.
"""

import base64
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
import time
import urllib.parse

import google_crc32c

Bucket = dict[str, tuple[bytes, int]]  # {name of an object: (content, generation)}


class Server(http.server.ThreadingHTTPServer):
    """Serves `buckets`, {name: Bucket}, at `address`."""

    daemon_threads = True

    def __init__(self, *names: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.buckets: dict[str, Bucket] = {name: {} for name in names}
        self.sessions: dict[str, tuple[str, str, dict, bytearray]] = {}
        self.lock, self.numbers = threading.Lock(), itertools.count(int(time.time() * 1e6))
        self.fail = None  # (method, path, body) -> status to answer with instead, or None

    def handle_error(self, request, client_address):
        """A client that has heard enough hangs up."""

    def environment(self) -> dict[str, str]:
        """The variables that lead all clients here."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "GOOGLE_CLOUD_PROJECT": "pretended",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


class Failed(Exception):
    """Becomes the answer's status."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def handle_any(self) -> None:
        body = self._body()
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query))
        try:
            if self.server.fail and (status := self.server.fail(self.command, self.path, body)):
                raise Failed(status)
            if parts.path.startswith("/batch/"):
                return self._batch(body)
            answer = self._route(self.command, parts.path, query, body, self.headers)
        except Failed as e:
            status = e.args[0]
            answer = (status, {}, json.dumps({"error": {"code": status, "message": f"{status}"}}))
        self._answer(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict, body: bytes | str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, method: str, path: str, query: dict, body: bytes, headers) -> tuple:
        if found := re.fullmatch(r"(/upload)?(?:/resumable)?/storage/v1/b/([^/]+)/o", path):
            if found[1]:
                return self._upload(method, found[2], query, body, headers)
            return self._list(self._bucket(found[2]), query)
        if found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path):
            return self._object(method, found[1], found[2], query, headers)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)(/storageLayout)?", path):
            self._bucket(found[1])
            return 200, {}, json.dumps({"kind": "storage#bucket", "name": found[1], "id": found[1]})
        raise Failed(404)

    def _bucket(self, name: str) -> Bucket:
        if name not in self.server.buckets:
            raise Failed(404)
        return self.server.buckets[name]

    def _list(self, bucket: Bucket, query: dict) -> tuple:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        with self.server.lock:
            names = sorted(bucket)
        for name in names:
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                if not (query.get("includeTrailingDelimiter") == "true" and rest.endswith("/")):
                    continue
            items.append(name)
        first = int(query.get("pageToken", 0))
        count = int(query.get("maxResults", 1000))
        page = [self._facts(bucket, name) for name in items[first : first + count]]
        answer = {"kind": "storage#objects", "items": [one for one in page if one]}
        if not first:
            answer["prefixes"] = sorted(prefixes)
        if first + count < len(items):
            answer["nextPageToken"] = str(first + count)
        return 200, {}, json.dumps(answer)

    def _facts(self, bucket: Bucket, name: str) -> dict | None:
        if name not in bucket:
            return None
        data, generation = bucket[name]
        owner = next(n for n, own in self.server.buckets.items() if own is bucket)
        crc = google_crc32c.value(data).to_bytes(4, "big")
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(generation / 1e6))
        stamp += f".{generation // 1000 % 1000:03d}Z"
        return {
            "kind": "storage#object",
            "id": f"{owner}/{name}/{generation}",
            "name": name,
            "bucket": owner,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "crc32c": base64.b64encode(crc).decode(),
            "timeCreated": stamp,
            "updated": stamp,
            "mediaLink": f"{self.server.address}/download/storage/v1/b/{owner}/o/"
            f"{urllib.parse.quote(name, safe='')}?alt=media",
        }

    def _object(self, method: str, owner: str, path: str, query: dict, headers) -> tuple:
        bucket = self._bucket(owner)
        if found := re.fullmatch(r"([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", path):
            name, target = urllib.parse.unquote(found[1]), urllib.parse.unquote(found[3])
            if name not in bucket:
                raise Failed(404)
            facts = self._put(self._bucket(found[2]), target, bucket[name][0], query)
            if "rewriteTo" in path:
                facts = {"done": True, "resource": facts, "objectSize": facts["size"],
                         "totalBytesRewritten": facts["size"]}  # fmt: skip
            return 200, {}, json.dumps(facts)
        if found := re.fullmatch(r"([^/]+)/moveTo/o/([^/]+)", path):
            name, target = urllib.parse.unquote(found[1]), urllib.parse.unquote(found[2])
            if name not in bucket:
                raise Failed(404)
            facts = self._put(bucket, target, bucket[name][0], query)
            del bucket[name]
            return 200, {}, json.dumps(facts)
        name = urllib.parse.unquote(path)
        if name not in bucket:
            raise Failed(404)
        data, generation = bucket[name]
        if method == "DELETE":
            if query.get("ifGenerationMatch") not in (None, str(generation)):
                raise Failed(412)
            bucket.pop(name, None)
            return 204, {}, ""
        if query.get("alt") != "media":
            return 200, {}, json.dumps(self._facts(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, ""
        if query.get("ifGenerationMatch") not in (None, str(generation)):
            raise Failed(412)
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range") or "")
        known = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        if not found:
            return 200, known, data
        first = int(found[1]) if found[1] else max(0, len(data) - int(found[2]))
        last = min(int(found[2]) if found[1] and found[2] else len(data) - 1, len(data) - 1)
        if first >= len(data):
            raise Failed(416)
        known["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, known, data[first : last + 1]

    def _put(self, bucket: Bucket, name: str, data: bytes, query: dict) -> dict:
        with self.server.lock:
            present = bucket.get(name, (b"", 0))[1]
            if query.get("ifGenerationMatch") not in (None, str(present)):
                raise Failed(412)
            bucket[name] = (bytes(data), next(self.server.numbers))
        return self._facts(bucket, name)

    def _upload(self, method: str, owner: str, query: dict, body: bytes, headers) -> tuple:
        bucket, kind = self._bucket(owner), query.get("uploadType")
        if kind == "media":
            return 200, {}, json.dumps(self._put(bucket, query["name"], body, query))
        if kind == "multipart":
            meta, data = multipart(body, headers["Content-Type"])
            name = query.get("name") or json.loads(meta)["name"]
            return 200, {}, json.dumps(self._put(bucket, name, data, query))
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            session = str(next(self.server.numbers))
            self.server.sessions[session] = (owner, name, query, bytearray())
            place = f"{self.server.address}/upload/storage/v1/b/{owner}/o"
            return 200, {"Location": f"{place}?uploadType=resumable&upload_id={session}"}, ""
        owner, name, query, sent = self.server.sessions[query["upload_id"]]
        sent += body
        found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+|\*)", headers.get("Content-Range") or "")
        if found and (found[1] == "*" or int(found[1]) > len(sent)):
            return 308, {"Range": f"bytes=0-{len(sent) - 1}"} if sent else {}, ""
        return 200, {}, json.dumps(self._put(bucket, name, sent, query))

    def _batch(self, body: bytes) -> None:
        """Deletions, several in one request."""
        border = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        answers = []
        for request in re.findall(rb"(DELETE|POST) (\S+) HTTP", body):
            method, url = (word.decode() for word in request)
            path, _, query = url.partition("?")
            try:
                answer = self._route(method, path, dict(urllib.parse.parse_qsl(query)), b"", {})
            except Failed as e:
                answer = (e.args[0], {}, "")
            answers.append(f"HTTP/1.1 {answer[0]} x\r\nContent-Type: application/json\r\n\r\n")
        text = "".join(
            f"--{border}\r\nContent-Type: application/http\r\n\r\n{a}\r\n" for a in answers
        )
        known = {"Content-Type": f"multipart/mixed; boundary={border}"}
        self._answer(200, known, f"{text}--{border}--\r\n")


def multipart(body: bytes, kind: str) -> tuple[bytes, bytes]:
    """The two parts of a multipart/related upload."""
    border = re.search(r"boundary=['\"]?([^'\";]+)", kind)[1].encode()
    parts = body.split(b"--" + border)[1:3]
    meta, data = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
    return meta, re.sub(rb"\r?\n$", b"", data, count=1)


if __name__ == "__main__":
    serving = Server(*sys.argv[1:])
    print(serving.address, flush=True)
    serving.serve_forever()
