"""A team's MLflow server whose artifacts lie in a bucket: clients send them through it and need no right to it."""

import os
import subprocess
import sys

import pytest

from flows.services.servers import answers, mlflow_refusal, start_team_mlflow_server, wait_for
from flows.services.team import load_team, mlflow_arguments, mlflow_environment
from pipeline.ports import free_port

pytestmark = [pytest.mark.postgres, pytest.mark.slow]
CLIENT = """
import mlflow, os, sys
from pathlib import Path
assert "AWS_SECRET_ACCESS_KEY" not in os.environ
mlflow.set_experiment("bucket")
with mlflow.start_run() as run:
    mlflow.log_text("whole", "a/file.txt")
    print(run.info.artifact_uri, mlflow.artifacts.load_text(f"{run.info.artifact_uri}/a/file.txt"))
"""


def test_artifacts_go_to_the_bucket_through_the_server(postgres, tmp_path, monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    bucket = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    bucket.start()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    endpoint = {"MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{bucket.get_host_and_port()[1]}"}
    secrets = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "long-enough-12"}
    for name, value in (secrets | {"VIT_PG": postgres.password}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    port = free_port()
    (tmp_path / "team.yaml").write_text(
        f"kind: team\nlisten: 127.0.0.1\nhosts: [localhost]\nmlflow: {{database: '{postgres.new_database('bucket')}', "
        f"password_variable: VIT_PG, port: {port}, workers: 1, artifacts: 's3://vit/store'}}\n"
    )
    team = load_team(str(tmp_path / "team.yaml"))
    environment = mlflow_environment(team.mlflow, tmp_path) | keys | endpoint
    server = start_team_mlflow_server(tmp_path, mlflow_arguments(team, team.mlflow, tmp_path), environment)
    try:
        s3 = boto3.client("s3", endpoint_url=endpoint["MLFLOW_S3_ENDPOINT_URL"], region_name="us-east-1",
                          aws_access_key_id="k", aws_secret_access_key="s")  # fmt: skip
        s3.create_bucket(Bucket="vit")
        url = f"http://localhost:{port}"
        wait_for("mlflow", lambda: answers(f"{url}/health"), {"mlflow": server}, tmp_path)
        assert mlflow_refusal(url) is None
        client = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        done = subprocess.run([sys.executable, "-c", CLIENT], env=client | {"MLFLOW_TRACKING_URI": url},
                              capture_output=True, text=True, timeout=200)  # fmt: skip
        assert done.returncode == 0 and "mlflow-artifacts:/" in done.stdout and "whole" in done.stdout, done.stderr
        (entry,) = s3.list_objects_v2(Bucket="vit", Prefix="store/")["Contents"]
        assert entry["Key"].endswith("/a/file.txt") and entry["Size"] == len("whole")
    finally:
        server.terminate()
        server.wait()
        bucket.stop()
