"""As much of a W&B server as a client needs to be online; it can go away, or fall silent."""

import http.server
import json
import threading

BUCKET = {
    "id": "QQ==",
    "name": "run",
    "displayName": "run",
    "description": "",
    "config": "{}",
    "summaryMetrics": "{}",
    "historyTail": "[]",
    "eventsTail": "[]",
    "historyLineCount": 0,
    "project": {"id": "UA==", "name": "project", "entity": {"id": "RQ==", "name": "entity"}},
}
VIEWER = {"id": "Vg==", "entity": "entity", "username": "user", "flags": "{}"}
ARTIFACT = {  # as if it were there already: nothing is uploaded
    "__typename": "Artifact",
    "id": "QXJ0",
    "state": "COMMITTED",
    "digest": "0" * 32,
    "commitHash": "0",
    "versionIndex": 0,
    "historyStep": None,
    "size": 0,
    "fileCount": 1,
    "createdAt": "2026-01-01T00:00:00Z",
    "updatedAt": None,
    "description": None,
    "metadata": "{}",
    "ttlDurationSeconds": -1,
    "ttlIsInherited": False,
    "tags": [],
    "aliases": [],
    "artifactType": {"name": "dataset"},
    "artifactSequence": {
        "__typename": "ArtifactSequence",
        "id": "U2Vx",
        "name": "data",
        "project": BUCKET["project"] | {"internalId": "UA=="},
        "latestArtifact": {"id": "QXJ0", "versionIndex": 0},
    },
}
ANSWERS = {
    "mutation UpsertBucket ": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "query Viewer ": {"viewer": VIEWER},
    "query RunResumeStatus ": {"model": BUCKET["project"] | {"bucket": None}},  # a new run
    "mutation CreateArtifact ": {"createArtifact": {"artifact": ARTIFACT}},
    "mutation UseArtifact ": {"useArtifact": {"artifact": ARTIFACT}},
    "query ArtifactByID ": {"artifact": ARTIFACT},
}


class Server:
    """Listens on `url` within a `with` block.

    Attributes:
        asked: a line for each request that it answered.
    """

    def __init__(self):
        self.asked, self._silent, self._over = [], threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self.go_away()

    def fall_silent(self):
        """Takes requests from now on and answers none."""
        self._silent.set()

    def go_away(self):
        """Refuses connections from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._silent.set()  # also for connections that are open

    def answer(self, path, request):
        """What the server says; None: nothing."""
        if self._silent.is_set():
            self._over.wait()
            return None
        query = request.get("query", "").strip()
        self.asked.append(query or path)
        if "file_stream" in path:
            return {}
        for name, data in ANSWERS.items():
            if query.startswith(name):
                return {"data": data}
        return {"data": None, "errors": [{"message": "this is not a whole server"}]}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            request = json.loads(body)
        except ValueError:
            request = {}
        answer = self.server_state.answer(self.path, request)
        if answer is None:
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass
