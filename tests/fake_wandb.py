"""As much of a W&B server as its client needs: it keeps the runs that it is sent.

It can refuse keys, answer late, go away, or fall silent. What it knows of W&B's protocol was read
off the client: GraphQL for runs and artifacts, and the file stream, which sends lines of history
with the number of the first one.
"""

import http.server
import json
import threading
import time

PROJECT = {"id": "UA==", "name": "project", "entity": {"id": "RQ==", "name": "entity"}}
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
        "project": PROJECT | {"internalId": "UA=="},
        "latestArtifact": {"id": "QXJ0", "versionIndex": 0},
    },
}
ANSWERS = {
    "query Viewer ": {"viewer": VIEWER},
    "mutation CreateArtifact ": {"createArtifact": {"artifact": ARTIFACT}},
    "mutation UseArtifact ": {"useArtifact": {"artifact": ARTIFACT}},
    "query ArtifactByID ": {"artifact": ARTIFACT},
}


class Run:
    """What the server holds of a run.

    Attributes:
        lines: of its history, by number.
        repeated: numbers of lines that were sent more than once.
        config, summary: as sent last.
        exit_code: None while it is not over.
    """

    def __init__(self, name):
        self.name, self.lines, self.repeated = name, {}, []
        self.config, self.summary, self.exit_code = {}, {}, None

    @property
    def history(self):
        """The lines in order, without W&B's own keys but `_step`."""
        lines = [self.lines[number] for number in sorted(self.lines)]
        return [{k: v for k, v in x.items() if k[0] != "_" or k == "_step"} for x in lines]

    @property
    def epochs(self):
        """The epochs whose metrics are there, in order."""
        return [line["epoch"] for line in self.history if "train_loss" in line]

    def update(self, variables):
        """Takes what a client says of the run."""
        self.config |= json.loads(variables.get("config") or "{}")
        self.summary |= json.loads(variables.get("summaryMetrics") or "{}")

    def stream(self, request):
        """Takes a piece of its file stream."""
        files = request.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            if number in self.lines:
                self.repeated.append(number)
            self.lines[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary |= json.loads(line)
        if request.get("complete"):
            self.exit_code = request.get("exitcode")

    def bucket(self):
        """The run in GraphQL's words."""
        last = [json.dumps(self.lines[max(self.lines)])] if self.lines else []
        return {
            "id": "QQ==",
            "name": self.name,
            "displayName": self.name,
            "description": "",
            "config": json.dumps(self.config),
            "wandbConfig": json.dumps({"t": 1}) if self.config else None,
            "summaryMetrics": json.dumps(self.summary),
            "historyTail": json.dumps(last),
            "eventsTail": "[]",
            "historyLineCount": len(self.lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "tags": [],
            "notes": None,
            "project": PROJECT,
        }


class Server:
    """Listens on `url` within a `with` block.

    Args:
        delay: seconds after which the first request is answered; later ones are at once.
        refuses: whether no key is good.

    Attributes:
        asked: a line for each request that it answered.
        runs: a `Run` by its id.
    """

    def __init__(self, delay=0.0, refuses=False):
        self.asked, self.runs, self.refuses = [], {}, refuses
        self._silent, self._over, self._lock = (
            threading.Event(),
            threading.Event(),
            threading.Lock(),
        )
        self._open_at, self._delay = None, delay
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._server = _HTTPServer(("127.0.0.1", 0), handler)
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
        self._wait_until_open()
        if self._silent.is_set():
            self._over.wait()
            return None
        query, variables = request.get("query", "").strip(), request.get("variables") or {}
        with self._lock:
            self.asked.append(query or path)
            if "file_stream" in path:
                self._run(path.split("/")[-2]).stream(request)
                return {}
            if query.startswith("mutation UpsertBucket "):
                known = variables["name"] in self.runs
                run = self._run(variables["name"])
                run.update(variables)
                return {"data": {"upsertBucket": {"bucket": run.bucket(), "inserted": not known}}}
            if query.startswith("query RunResumeStatus "):
                run = self.runs.get(variables["name"])
                return {"data": {"model": PROJECT | {"bucket": run and run.bucket()}}}
        for name, data in ANSWERS.items():
            if query.startswith(name):
                return {"data": data}
        return {"data": None, "errors": [{"message": "this is not a whole server"}]}

    def _run(self, name):
        return self.runs.setdefault(name, Run(name))

    def _wait_until_open(self):
        with self._lock:
            if self._open_at is None:
                self._open_at = time.monotonic() + self._delay
        self._over.wait(max(0.0, self._open_at - time.monotonic()))


class _HTTPServer(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Says nothing of clients that were killed."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            request = json.loads(body)
        except ValueError:
            request = {}
        refused = self.server_state.refuses
        answer = (
            {"error": "invalid key"} if refused else self.server_state.answer(self.path, request)
        )
        if answer is None:
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(401 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass
