"""The Kubernetes API, asked and read as plain JSON over HTTPS.

The official package reads the kubeconfig (tokens and their renewal, certificates, log-in helpers, a pod's own account);
requests speaks to the server. Its generated methods are left out: they refuse what servers accept, take longer to
import than a question takes, and change their signatures between releases; what is asked here is a handful of paths.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ANSWER_SECONDS = (5.0, 20.0)  # to connect, and to answer
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
INSTALL = "the package kubernetes is missing here; install it: uv sync --extra kubernetes, or pip install kubernetes"


class NoAnswer(Exception):
    """The API server did not answer, or not now; nothing is known."""


class NoCluster(NoAnswer):
    """There is nothing to ask: no kubeconfig, or no package to read it."""


class Refused(Exception):
    """The API server said no; the message is its own, in one line. `status` is HTTP's."""

    def __init__(self, status: int, message: str, reason: str = ""):
        super().__init__(message)
        self.status, self.reason = status, reason


class Client:
    """One API server, as a context of the kubeconfig names it. NoCluster where there is none."""

    def __init__(self, context: str | None = None):
        configuration = _configuration(context)
        import requests

        self.host = configuration.host.rstrip("/")
        self._configuration, self._session = configuration, requests.Session()
        self._failures = requests.RequestException
        self._session.trust_env = False  # a .netrc must not replace the token
        self._session.verify = (configuration.ssl_ca_cert or True) if configuration.verify_ssl else False
        if configuration.cert_file:
            self._session.cert = (configuration.cert_file, configuration.key_file)
        proxy, exceptions = configuration.proxy, getattr(configuration, "no_proxy", None)
        if proxy and not requests.utils.should_bypass_proxies(self.host, no_proxy=exceptions):
            self._session.proxies = {"http": proxy, "https": proxy}

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        """The object that a path answers with. NoAnswer, or Refused."""
        answer = self._answer(method, path, body, query)
        try:
            return answer.json()
        except ValueError:
            raise NoAnswer(f"{self.host}: answered no JSON; is it a Kubernetes API server?") from None

    def text(self, path: str, **query: Any) -> bytes:
        """What a path answers with that has no JSON: a log."""
        return self._answer("GET", path, None, query).content

    def _answer(self, method: str, path: str, body: Any, query: Mapping[str, Any]) -> Any:
        try:
            headers = {"Accept": "application/json, */*"} | self._authorization()
            answer = self._session.request(
                method, self.host + path, params=query, json=body, headers=headers, timeout=ANSWER_SECONDS
            )
        except self._failures as error:
            raise NoAnswer(f"{self.host} does not answer: {_innermost(error)}") from None
        if answer.status_code >= 500 or answer.status_code == 429:
            raise NoAnswer(f"{self.host} answered {answer.status_code}: {_message(answer)[0]}")
        if answer.status_code >= 400:
            message, reason = _message(answer)
            if answer.status_code == 401:
                message = f"{self.host} does not know you (401): log in again, or choose profile.context"
            raise Refused(answer.status_code, message, reason)
        return answer

    def _authorization(self) -> dict[str, str]:
        """Asked for each time: a token may have to be renewed."""
        try:
            found = self._configuration.auth_settings().get("BearerToken", {}).get("value")
        except Exception as error:  # whatever a log-in helper raises
            raise NoAnswer(f"no token for {self.host}: {_innermost(error)}") from None
        return {"Authorization": found} if found else {}


def _configuration(context: str | None) -> Any:
    named = os.environ.get("KUBECONFIG")
    files = named or str(Path.home() / ".kube" / "config")
    has_file = any(Path(name).is_file() for name in files.split(os.pathsep))
    if not has_file and not (SERVICE_ACCOUNT.is_file() and context is None):
        raise NoCluster(f"there is no kubeconfig ({files}); copy your cluster's there, or set KUBECONFIG")
    try:
        from kubernetes import config
        from kubernetes.client import Configuration
    except ImportError:
        raise NoCluster(INSTALL) from None
    configuration = Configuration()
    try:
        if has_file:
            config.load_kube_config(files, context=context, client_configuration=configuration)
        else:
            config.load_incluster_config(client_configuration=configuration)
    except Exception as error:  # the file's own faults, and those of a log-in helper that it names
        raise NoCluster(f"{files if has_file else SERVICE_ACCOUNT}: {_innermost(error)}") from None
    return configuration


def _message(answer: Any) -> tuple[str, str]:
    """The server's message, in one line, and its reason."""
    try:
        status = answer.json()
        return " ".join(str(status["message"]).split()), str(status.get("reason", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        words = " ".join(answer.text.split())[:200]
        return words or answer.reason, ""


def _innermost(error: BaseException) -> str:
    """The first cause, which names what is wrong, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(str(error).split())[:200] or type(error).__name__
