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
    r"(PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|SECRET|TOKEN|CREDENTIALS?|(^|_)AUTH|AUTH_STRING|CONNECTION_STRING|"
    r"CONNECTION_URL|(^|_)KEY|(API|ACCESS|SECRET|PRIVATE|ACCOUNT)KEY|ACCESS_KEY_ID)$",
    re.IGNORECASE,
)
# And these hold none: folders, programs, the name of MLflow's plug-in, what is published or only sorts.
_OPEN_NAME = re.compile(
    r"^(PWD|OLDPWD|MLFLOW_TRACKING_AUTH|(.*_)?(PUBLIC|SORT|CACHE|PARTITION)_KEY|.*(ASKPASS|BYPASS|COMPASS))$",
    re.IGNORECASE,
)
_HEX_KEY = re.compile(r"[0-9a-fA-F]{40}")  # of Weights & Biases; a commit of git looks alike, so its name decides
_COMMIT_NAME = re.compile(r"(COMMIT|REVISION|SHA1?|HASH|DIGEST|REF)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)(?!user:password@)[^\s/:@'\"]*:[^\s/@'\"{]+(?=@)", re.IGNORECASE)
# user:password@registry/x; `image:tag@sha256:...`, `12:30@noon` and mailto are none.
_BEFORE_HOST = re.compile(
    r"(?<![\w/:@.+-])(?!user:password@|mailto:)[\w.+-]+:[^\s/:@'\"{]+(?=@(?!sha\d+:)(?:[\w-]+(?:\.[\w-]+)+|[\w-]+[:/]))",
    re.IGNORECASE,
)
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|sig|token|access_token|api_key|password)=)"
    r"(?!\*\*\*)[^&\s'\"]+",
    re.IGNORECASE,
)
_IN_HEADER = re.compile(r"\b(Basic|Bearer|Token(?= [0-9a-f]{20})) [A-Za-z0-9+/._~-]{8,}=*")
_TOKEN = re.compile(  # of Hugging Face, Amazon, GitHub, GitLab, Prefect, Slack
    r"\b(hf_[A-Za-z0-9]{20,}|(AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
    r"pn[ub]_[A-Za-z0-9]{20,}|xox[abp]-[\w-]{20,})"
)


def without_secrets(text: str) -> str:
    """`text` with every secret that can be recognised replaced by `***`."""
    for value in _values().values():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", HIDDEN, text)
    text = _BEFORE_HOST.sub(HIDDEN, _IN_URL.sub(HIDDEN, text))
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_HEADER.sub(rf"\g<1> {HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret, as far as its name tells."""
    return _SECRET_NAME.search(variable) is not None and _OPEN_NAME.match(variable) is None


def is_secret(variable: str, value: str) -> bool:
    """Whether a setting of an environment variable is a secret, by its name or as a key of 40 hex digits."""
    looks = _HEX_KEY.fullmatch(value.strip()) is not None and _COMMIT_NAME.search(variable) is None
    return looks or names_a_secret(variable)


def secret_in(text: str) -> str | None:
    """What kind of secret stands in `text`, in words that do not repeat it; None where none is recognised."""
    for name, value in _values().items():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", text):
            return f"the value of the environment variable {name}"
    if _IN_URL.search(text) or _BEFORE_HOST.search(text):
        return "an address with a password"
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
