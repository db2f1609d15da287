"""A person whose Prefect is never the tester's own, and the API asked without Prefect's client."""

import json
import urllib.request

import pytest

PROFILES = '# mine\nactive = "team"\n\n[profiles.team]\nPREFECT_API_URL = "https://prefect.example.org/api"\n'
TEAMS = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "MLFLOW_TRACKING_URI", "VIT_HOME")


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """A person's own PREFECT_HOME, and nothing in the environment that names a team's server."""
    with pytest.MonkeyPatch.context() as environment:
        for name in TEAMS:
            environment.delenv(name, raising=False)
        directory = tmp_path_factory.mktemp("prefect-of-a-person")
        (directory / "profiles.toml").write_text(PROFILES)
        environment.setenv("PREFECT_HOME", str(directory))
        yield directory


def post(url, body):
    """The answer of a server to a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
