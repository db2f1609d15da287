"""Secrets kept out of what is written and said: passwords in URLs, tokens, and the values of variables that hold them.

Two rules. What a run is made of (config, profile) is refused where it holds a secret: it stands in files that are
copied and shown for years. What is said of a run (lines, errors, records) has it replaced. Torch-free.
"""

import os
import re

from pipeline.errors import InputError

HIDDEN = "***"
LEAST_LENGTH = 8  # of a variable's value: a shorter one also stands where no secret is meant
# A name that ends so holds a secret; GOOGLE_APPLICATION_CREDENTIALS and such hold a path, which is none.
_SECRET_NAME = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|CREDENTIALS?|AUTH_STRING|CONNECTION_STRING|CONNECTION_URL|"
    r"(API|ACCESS|SECRET|PRIVATE|ACCOUNT)_?KEY|ACCESS_KEY_ID)$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)(?!user:password@)[^\s/:@'\"]*:[^\s/@'\"{]+(?=@)", re.IGNORECASE)
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig|token|access_token|api_key|password)=)"
    r"(?!\*\*\*)[^&\s'\"]+",
    re.IGNORECASE,
)
_IN_HEADER = re.compile(r"\b(Basic|Bearer) [A-Za-z0-9+/._~-]{8,}=*")
_TOKEN = re.compile(  # of Hugging Face, Amazon, GitHub, GitLab, Prefect, Slack
    r"\b(hf_[A-Za-z0-9]{20,}|(AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
    r"pn[ub]_[A-Za-z0-9]{20,}|xox[abp]-[\w-]{20,})"
)


def without_secrets(text: str) -> str:
    """`text` with every secret that can be recognised replaced by `***`."""
    for value in _values().values():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", HIDDEN, text)
    text = _IN_URL.sub(HIDDEN, text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_HEADER.sub(rf"\g<1> {HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret, as far as its name tells."""
    return _SECRET_NAME.search(variable) is not None


def secret_in(text: str) -> str | None:
    """What kind of secret stands in `text`, in words that do not repeat it; None where none is recognised."""
    for name, value in _values().items():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", text):
            return f"the value of the environment variable {name}"
    if _IN_URL.search(text):
        return "a URL with a password"
    if _IN_QUERY.search(text):
        return "a URL with a signature or token"
    return "a token" if _IN_HEADER.search(text) or _TOKEN.search(text) else None


def require_no_secret(where: str, text: str) -> None:
    """InputError where `text`, which is to be kept, holds a secret."""
    if found := secret_in(text):
        raise InputError(f"{where}: would hold {found}, and stays on disk; leave it to the environment of the job")


def _values() -> dict[str, str]:
    """What stands in variables of this process whose names say that it is secret, the longest first."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if not names_a_secret(name) or value.startswith(("/", "~", "./")):
            continue
        found |= {name: value}
        if name.endswith("AUTH_STRING"):
            found |= {f"{name} (its password)": value.partition(":")[2]}
    long = {name: value for name, value in found.items() if len(value) >= LEAST_LENGTH and not value.isdigit()}
    return dict(sorted(long.items(), key=lambda item: -len(item[1])))
