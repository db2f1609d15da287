"""A Kubernetes API server for tests: HTTP as the real one speaks it, over a table of objects that the test drives.

kmock's emulator was tried: it answered 500 where a deleted object is asked for, and knows neither dry runs nor
preconditions nor deletion in the foreground, which is what the launcher leans on. Nothing here validates objects.
"""

import json
import socket
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

KINDS = {"jobs": "Job", "jobsets": "JobSet", "services": "Service", "pods": "Pod"}
TOKEN = "a-token-of-the-test"


class Cluster:
    """Objects by (plural, name); `strikes` answer before the server does."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict] = {}
        self.logs: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuses: Callable[[str, str], tuple[int, str, str] | None] = lambda method, path: None
        self.drops: Callable[[str, str], bool] = lambda method, path: False  # the answer is lost on the way
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def start(self) -> "Cluster":
        """On the port of before, where it was up already."""
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def respond(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                cluster.asked.append((self.command, url.path))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, answer = _refusal(401, "Unauthorized", "Unauthorized")
                elif (refused := cluster.refuses(self.command, url.path)) is not None:
                    status, answer = _refusal(*refused)
                else:
                    status, answer = cluster.answer(self.command, url.path, query, body)
                if cluster.drops(self.command, url.path):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = respond

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Away: connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def kubeconfig(self, path: Path, token: str = TOKEN) -> Path:
        server = {"server": f"http://127.0.0.1:{self._port}"}
        path.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "c", "cluster": server}], "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        }))  # fmt: skip
        return path

    def answer(self, method: str, path: str, query: dict, body: dict) -> tuple[int, dict | str]:
        _, _, rest = path.partition("/namespaces/vit/")
        plural, _, name = rest.partition("/")
        name, _, more = name.partition("/")
        if plural not in KINDS:
            return _refusal(404, "the server could not find the requested resource", "NotFound")
        if method == "POST":
            return self._create(plural, body, query)
        if not name:
            return 200, {"kind": "List", "items": self._chosen(plural, query.get("labelSelector", ""))}
        if (found := self.objects.get((plural, name))) is None:
            return _refusal(404, f'{plural} "{name}" not found', "NotFound")
        if more == "log":
            return 200, self.logs.get(name, "")
        return self._delete(plural, name, body) if method == "DELETE" else (200, found)

    def _create(self, plural: str, body: dict, query: dict) -> tuple[int, dict]:
        name = body["metadata"]["name"]
        if (plural, name) in self.objects:
            return _refusal(409, f'{plural} "{name}" already exists', "AlreadyExists")
        made = json.loads(json.dumps(body))
        made["metadata"]["uid"], made["status"] = str(uuid.uuid4()), {}
        if "dryRun" not in query:
            self.objects[plural, name] = made
        return 201, made

    def _delete(self, plural: str, name: str, options: dict) -> tuple[int, dict]:
        found = self.objects[plural, name]
        wanted = (options.get("preconditions") or {}).get("uid")
        if wanted not in (None, found["metadata"]["uid"]):
            return _refusal(409, "the UID in the precondition does not match", "Conflict")
        if options.get("propagationPolicy") == "Foreground" and self.pods():
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        else:
            self._remove(plural, name)
        return 200, {"kind": "Status", "status": "Success"}

    def _remove(self, plural: str, name: str) -> None:
        gone = self.objects.pop((plural, name))
        for key, other in list(self.objects.items()):  # the garbage collector
            owners = [owner["uid"] for owner in other["metadata"].get("ownerReferences", [])]
            if gone["metadata"]["uid"] in owners:
                self.objects.pop(key, None)

    def _chosen(self, plural: str, selector: str) -> list[dict]:
        wanted = dict(part.split("=") for part in selector.split(",") if part)
        every = [found for (of, _), found in self.objects.items() if of == plural]
        return [one for one in every if wanted.items() <= one["metadata"].get("labels", {}).items()]

    # What the test does in the controllers' place.

    def job(self, plural: str = "jobs") -> dict:
        (found,) = [found for (of, _), found in self.objects.items() if of == plural]
        return found

    def pods(self) -> list[dict]:
        return [found for (of, _), found in self.objects.items() if of == "pods"]

    def make_pod(self, index: int, phase: str = "Running", uid: str = "", **status: object) -> dict:
        """As the Job's controller does, and the kubelet after it."""
        job = self.job()
        template = job["spec"]["template"]
        name = f"{job['metadata']['name']}-{index}-{uid or uuid.uuid4().hex[:5]}"
        self.objects["pods", name] = pod = {
            "metadata": {"name": name, "uid": str(uuid.uuid4()), "labels": template["metadata"]["labels"],
                         "creationTimestamp": f"2026-01-01T00:00:{len(self.objects):02d}Z"},
            "spec": {"nodeName": f"gpu-{index}"} if phase == "Running" else {},
            "status": {"phase": phase, **status},
        }  # fmt: skip
        job["status"]["ready"] = sum(pod["status"]["phase"] == "Running" for pod in self.pods())
        return pod

    def end_pod(self, pod: dict, code: int, last: str = "", reason: str = "Error") -> None:
        ended = {"exitCode": code, "reason": reason, "message": last}
        pod["status"] = {
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"state": {"terminated": ended}}],
        }
        self.job()["status"]["ready"] = sum(pod["status"]["phase"] == "Running" for pod in self.pods())

    def end_job(self, kind: str, reason: str = "", message: str = "", plural: str = "jobs") -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.job(plural)["status"] |= {"conditions": [condition], "ready": 0}

    def pods_are_gone(self) -> None:
        """The kubelets have ended them; what waited for that goes too."""
        for pod in self.pods():
            del self.objects["pods", pod["metadata"]["name"]]
        for (plural, name), found in list(self.objects.items()):
            if found["metadata"].get("deletionTimestamp"):
                self._remove(plural, name)


def _refusal(code: int, message: str, reason: str) -> tuple[int, dict]:
    return code, {"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason}
