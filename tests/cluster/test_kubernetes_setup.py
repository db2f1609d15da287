"""What a team sets up once: manifests of namespace, volume, rights and worker, and the image that pods run."""

import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml

from cluster.job import CancelError
from cluster.kubernetes import launcher as module
from cluster.profile import PROFILES
from pipeline.ports import free_port
from tests.cluster.kubernetes import Cluster
from tests.cluster.test_kubernetes import NAME, cluster, launcher_in, request_  # noqa: F401 (fixtures)
from tests.cluster.test_kubernetes_manifest import VERSIONS

ROOT = Path(__file__).parents[2]
MANIFESTS, DOCKERFILE = ROOT / "cluster" / "manifests", ROOT / "cluster" / "Dockerfile"
VERBS = {"POST": "create", "GET": "get", "DELETE": "delete"}


def documents() -> list[dict]:
    files = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]
    assert {*files, "kustomization.yaml"} == {path.name for path in MANIFESTS.iterdir()}
    return [document for file in files for document in yaml.safe_load_all((MANIFESTS / file).read_text())]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_of_two_versions_find_nothing(version):
    for document in documents():
        kubernetes_validate.validate(document, version, strict=True)


def test_what_is_set_up_is_what_the_shipped_profile_names():
    profile = yaml.safe_load((PROFILES / "kubernetes.yaml").read_text())
    of_kind = {document["kind"]: document for document in documents()}
    assert of_kind["Namespace"]["metadata"]["name"] == profile["namespace"]
    claim, (volume,) = of_kind["PersistentVolumeClaim"], profile["volumes"]
    assert claim["metadata"]["name"] == volume["claim"] and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pod = of_kind["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (mount,), (mounted,) = container["volumeMounts"], pod["volumes"]
    assert mount["mountPath"] == volume["path"]
    assert mounted["persistentVolumeClaim"]["claimName"] == volume["claim"]
    name, _, tag = profile["image"].partition(":")
    (image,) = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["images"]
    assert (container["image"], image["name"], image["newTag"]) == (name, name, tag)
    for document in documents():
        assert document["metadata"].get("namespace", "vit") == "vit"


def test_the_worker_runs_what_the_deployments_name_as_nobody_special():
    (deployment,) = [document for document in documents() if document["kind"] == "Deployment"]
    worker = deployment["spec"]["template"]["spec"]
    (container,) = worker["containers"]
    # Not the pool of a team's own worker: a run of the cluster must not start on its machine.
    assert "exec prefect worker start --pool kubernetes --type process" in container["command"][2]
    assert "pool: kubernetes" in (ROOT / "README.md").read_text()
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY" in [one["name"] for one in container["env"]]
    assert worker["securityContext"]["runAsNonRoot"] and worker["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not any(one.get("value") for one in container["env"] if "AUTH" in one["name"] or "PASSWORD" in one["name"])


def worker_with(**given: str) -> tuple[list[str], list[str], dict[str, str]]:
    """Command, probe and environment of the worker's container, with these variables of its Secret."""
    (deployment,) = [document for document in documents() if document["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    own = {one["name"]: one["value"] for one in container["env"] if one["name"] not in ("HOME", "VIT_HOME")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return container["command"], container["livenessProbe"]["exec"]["command"], kept | own | path | given


def test_without_servers_the_worker_waits_where_one_works_by_exec_and_ends_when_it_is_asked():
    command, probe, environment = worker_with()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert "vit works by kubectl exec" in process.stdout.readline()
    assert subprocess.run(probe, env=environment).returncode == 0 and process.poll() is None
    time.sleep(0.3)
    process.terminate()
    assert process.wait(10) == 0


def test_with_servers_it_is_prefects_worker_and_the_probe_asks_it(tmp_path):
    command, probe, environment = worker_with(
        PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api", PREFECT_HOME=str(tmp_path), HOME=str(tmp_path)
    )
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while "worker" not in (words := psutil.Process(process.pid).cmdline()):
            assert time.monotonic() < deadline and process.poll() is None, words
            time.sleep(0.05)
        assert words[-8:] == "start --pool kubernetes --type process --name kubernetes --with-healthcheck".split()
        assert subprocess.run(probe, env=environment, stderr=subprocess.DEVNULL).returncode != 0  # it is not up
    finally:
        process.kill()
        process.wait()


def test_the_rights_are_those_that_are_used_and_no_others(cluster: Cluster, request_, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "FORCE_SECONDS", 0.3)
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    cluster.make_pod(0)
    launcher.state(job), launcher.explain(job), launcher.log(job, 0)
    with pytest.raises(CancelError):
        launcher.cancel(job, 0.0)
    cluster.objects.clear()
    stranger = {"metadata": {"name": NAME, "uid": "1", "ownerReferences": [{"uid": "2"}]}}
    cluster.objects["services", NAME] = stranger  # of a job that is about to be gone
    launcher.submit(request_)
    assert cluster.objects["services", NAME] is not stranger
    (request_.directory / "submit" / "kubernetes.json").unlink()
    launcher.find(request_.directory)
    used: dict[str, set[str]] = {}
    for method, path in cluster.asked:
        resource, _, name = re.fullmatch(r".*/namespaces/vit/(\w+)(/([^/]+))?(?:/log)?", path).groups()
        resource += "/log" if path.endswith("/log") else ""
        used.setdefault(resource, set()).add("list" if method == "GET" and name is None else VERBS[method])
    (role,) = [document for document in documents() if document["kind"] == "Role"]
    granted = {rule["resources"][0]: set(rule["verbs"]) for rule in role["rules"]}
    assert granted.pop("jobsets") == granted["jobs"]
    assert used == granted


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_image_has_every_package_no_caches_and_no_root():
    text = DOCKERFILE.read_text()
    lines = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("ARG BASE=") and {line for line in lines if line.startswith("FROM")} == {
        "FROM ${BASE} AS environment", "FROM ${BASE}",
    }  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert f"COPY {package} {package}" in lines
    assert all(
        "--no-cache" in line for line in lines if line.startswith("RUN") and ("pip" in line or "uv sync" in line)
    )
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"] and lines.index(users[0]) > lines.index("FROM ${BASE}")
    assert "HEALTHCHECK NONE" in lines and not re.search(r"tini|dumb-init|ENTRYPOINT", text)
    extras = set(re.findall(r"--extra (\w+)", text))
    assert "kubernetes" in extras <= set(project["project"]["optional-dependencies"])
    kept = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().split()
    sources = {
        source for line in lines if line.startswith("COPY ") and "--from" not in line for source in line.split()[1:-1]
    }
    assert {name.removeprefix("!") for name in kept if name.startswith("!")} == sources
