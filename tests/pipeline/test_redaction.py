"""Secrets are recognised by form and by the variables that hold them; nothing else is touched."""

import pytest

from pipeline.errors import InputError
from pipeline.redaction import require_no_secret, secret_in, without_secrets
from pipeline.secret_forms import is_secret, names_a_secret

SECRETS = {
    "WANDB_API_KEY": "w4ndb-c4n4ry-0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws/c4n4ry+0123456789",
    "HF_TOKEN": "c4n4ry.hf.0123456789",
    "PREFECT_API_AUTH_STRING": "team:c4n4ry-of-prefect",
    "PGPASSWORD": "c4n4ry$of^pg(",
}


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", SECRETS)
def test_the_value_of_a_variable_that_holds_a_secret_is_not_repeated(name):
    value = SECRETS[name]
    assert without_secrets(f"failed for '{value}', again") == "failed for '***', again"
    assert secret_in(f"key: {value}\n") == f"the value of the environment variable {name}"


def test_the_password_of_an_auth_string_is_one_by_itself():
    assert without_secrets("-u team -p c4n4ry-of-prefect") == "-u team -p ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("API request to http://bob:pa55w0rd@host:5000/api failed", "API request to http://***@host:5000/api failed"),
        ("postgresql+asyncpg://vit:p%40ss@db/prefect", "postgresql+asyncpg://***@db/prefect"),
        ("s3://bucket/x?X-Amz-Signature=abcdef&y=1", "s3://bucket/x?X-Amz-Signature=***&y=1"),
        ("Authorization: Basic dGVhbTpjNG40cnk=", "Authorization: Basic ***"),
        ("token hf_" + "a" * 34, "token ***"),
        ("AKIA" + "ABCDEFGH12345678 is unknown", "*** is unknown"),
        ("pnu_" + "b" * 36, "***"),
        ("image: bob:pa55w0rd@registry.example.org/vit:1", "image: ***@registry.example.org/vit:1"),
        ("bob:pa55w0rd@registry/x", "***@registry/x"),
        ("Authorization: Token " + "0a" * 20, "Authorization: Token ***"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text, shown):
    assert without_secrets(text) == shown and secret_in(text) is not None and secret_in(shown) is None


@pytest.mark.parametrize(
    "text",
    [
        "https://host:5000/#/experiments/1", "s3://bucket/a@b/c", "step 3  loss 1.2", "models:/digits@champion",
        "git@github.com:me/x.git", "http://user:password@host", "the Basic recipe", "12:30@noon",
        "vit:0.1@sha256:" + "ab" * 32, "registry:5000/vit:0.1@sha256:" + "ab" * 32, "mailto:bob@example.org",
        "commit " + "0a" * 20, "Token embeddings",
    ],
)  # fmt: skip
def test_what_is_none_stays_as_it_is(text):
    assert without_secrets(text) == text and secret_in(text) is None


def test_short_values_numbers_and_paths_are_no_secrets(monkeypatch):
    monkeypatch.setenv("MAX_TOKEN", "1234567890")
    monkeypatch.setenv("DB_PASSWORD", "vit")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/keys/google.json")
    text = "vit 1234567890 /etc/keys/google.json"
    assert without_secrets(text) == text


def test_names_are_told_by_their_end():
    held = ["WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD", "GITLAB_TOKEN",
            "WANDB_KEY", "MY_AUTH", "DB_PASS", "DBPASS", "MYSQL_PWD", "APIKEY"]  # fmt: skip
    free = ["TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "UCX_IB_PKEY", "PATH", "OMP_NUM_THREADS", "KEYBOARD", "PWD",
            "OLDPWD", "GIT_ASKPASS", "HTTP_BYPASS", "MLFLOW_TRACKING_AUTH", "A_PUBLIC_KEY"]  # fmt: skip
    assert [name for name in held if not names_a_secret(name)] == [name for name in free if names_a_secret(name)] == []


def test_a_value_may_give_a_variable_away():
    assert is_secret("WANDB", "0a" * 20) and is_secret("MY_AUTH", "Token x")
    assert not is_secret("GIT_COMMIT", "0a" * 20) and not is_secret("NCCL_SOCKET_IFNAME", "eth0")


def test_what_is_to_be_kept_is_refused_without_repeating_it():
    with pytest.raises(InputError, match="RUN/config.yaml: would hold the value of .* WANDB_API_KEY") as refused:
        require_no_secret("RUN/config.yaml", f"name: {SECRETS['WANDB_API_KEY']}")
    assert SECRETS["WANDB_API_KEY"] not in str(refused.value)
