"""What secrets look like: one rule in both packages that judge by it, and a table of what it takes and leaves."""

from pathlib import Path

import pytest

from cluster import secret_forms as of_cluster
from pipeline.secret_forms import hidden, is_secret, kind_of_secret

ROOT = Path(__file__).parent.parent
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"
SHOWN = [
    ("postgresql://u:p@ss@h/db", "postgresql://***@h/db"),
    ("postgresql://u:p@h/x@y", "postgresql://***@h/x@y"),
    ("s3://AKIAX:wJalr/K7MDENG/bPx@bucket/x", "s3://***@bucket/x"),
    ("https://user:pa ss@h", "https://***@h"),
    ("psql PGPASSWORD=abc-def-1 -h db", "psql PGPASSWORD=*** -h db"),
    ("'HF_TOKEN_READ': 'abc123def'", "'HF_TOKEN_READ': '***'"),
    ('OPTS: "--password=hunter2hunter2"', 'OPTS: "--password=***"'),
    ("curl --api-key abcdef123 x", "curl --api-key *** x"),
    ("db_password=correcthorse&y=1", "db_password=***&y=1"),
    (f"cookie {JWT} is old", "cookie *** is old"),
    ("key AIza" + "b" * 35, "key ***"),
    ("sk-proj-" + "a1" * 12, "***"),
    ("authorization: bearer abcdef0123456789", "authorization: bearer ***"),
    ("https://x/y?X-Goog-Signature=abcdef&z=1", "https://x/y?X-Goog-Signature=***&z=1"),
    ("https://hooks.slack.com/services/T0/B0/abc", "***"),
]
LEFT = [
    "https://host:5000/a@b", "http://[::1]:5000/x@y", "http://localhost:5000 failed for bob@example.org",
    "http://host:port is wrong, ask bob@example.org", "models:/x@champion", "models:/digits@champion and me@x.org",
    "/data/a@b/c:d@e", "s3://bucket/a:b@c", "docker://vit:0.1@sha256:" + "ab" * 32, "hdfs://node:9000/user@REALM",
    "postgresql://u:{password}@h/db", "--set encoder.class_token=average2", "encoder.pooling=token", "PASS: 12 tests",
    "MLFLOW_TRACKING_PASSWORD=PASSWORD", "export HF_TOKEN=...", "PGPASSWORD=$PASSWORD", "HF_TOKEN: a secret must not",
    "WANDB_API_KEY: secret would stand", "--password-file=/run/secrets/x1", "VIT_TOKEN=/run/secrets/token",
    "the bearer of good news", "sk-learn-is-the-name-of-a-library", "MAX_TOKEN=1234567", "TOKENIZERS_PARALLELISM=false",
    "task-0123456789abcdefghij", "mask_token=learned1", "sort_key=position1", "git@github.com:me/x.git",
]  # fmt: skip
SECRET = [("GH_PAT", "x1y2z3"), ("TOKEN_2", "abc"), ("HF_TOKEN_READ", "abc"), ("SECRET_VALUE", "abc"),
          ("SLACK_WEBHOOK_URL", "https://x"), ("OPTS", "--password=hunter2hunter2"), ("WANDB_API_KEY", "x"),
          ("AWS_SECRET_ACCESS_KEY", "/" + "aB3+" * 9 + "xyz"), ("X", JWT)]  # fmt: skip
FREE = [("TOKENIZERS_PARALLELISM", "false"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/vit/aws"), ("HF_TOKEN_PATH", "/vit/token"), ("NCCL_IB_PKEY", "0x1"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/vit/key.json"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "true")]  # fmt: skip


def test_both_packages_judge_by_one_rule():
    first, second = ((ROOT / package / "secret_forms.py").read_text() for package in ("pipeline", "cluster"))
    assert first == second and of_cluster.names_a_secret("HF_TOKEN")


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_a_secret_in_a_text_is_found_and_nothing_of_it_is_left(text, shown):
    assert hidden(text) == shown and kind_of_secret(text) is not None
    assert hidden(shown) == shown and kind_of_secret(shown) is None


@pytest.mark.parametrize("text", LEFT)
def test_ordinary_text_stays_as_it_is(text):
    assert hidden(text) == text and kind_of_secret(text) is None


@pytest.mark.parametrize(("name", "value"), SECRET)
def test_a_variable_that_holds_a_secret_is_told_by_name_or_value(name, value):
    assert is_secret(name, value)


@pytest.mark.parametrize(("name", "value"), FREE)
def test_a_variable_that_says_where_a_secret_lies_or_switches_something_is_none(name, value):
    assert not is_secret(name, value)
