"""Passwords in the URLs of servers: moved to the variables that their clients read, before anything is recorded.

`http://user:password@host` in PREFECT_API_URL or MLFLOW_TRACKING_URI would else stand in configs, plans, logs, links
and error texts of whoever passes the URL on. Torch-free, and imports neither Prefect nor MLflow.
"""

import os
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.errors import InputError


def without_passwords_in_urls() -> None:
    """Take user and password out of both URLs in this process's environment, which its children inherit.

    InputError for a URL whose client knows no other place for them; it never repeats the URL.
    """
    if found := _split("PREFECT_API_URL"):
        url, user, password = found
        os.environ.setdefault("PREFECT_API_AUTH_STRING", f"{user}:{password}")
        os.environ["PREFECT_API_URL"] = url
    if found := _split("MLFLOW_TRACKING_URI"):
        url, user, password = found
        if url.startswith(("http://", "https://")):
            os.environ.setdefault("MLFLOW_TRACKING_USERNAME", user)
            os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", password)
        elif url.startswith("postgresql"):
            os.environ.setdefault("PGUSER", user)
            os.environ.setdefault("PGPASSWORD", password)
        else:
            raise InputError(
                "MLFLOW_TRACKING_URI: holds a password, which would stand in records; give the address of an MLflow "
                "server in front of this database"
            )
        os.environ["MLFLOW_TRACKING_URI"] = url


def _split(variable: str) -> tuple[str, str, str] | None:
    """The URL without user and password, and these; None where it has no password."""
    url = os.environ.get(variable, "")
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return None
    except ValueError:
        return None
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return bare, unquote(parts.username or ""), unquote(parts.password)


def without_secrets(url: str) -> str:
    """`url` without a user and password in it, for records and messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in url else url
