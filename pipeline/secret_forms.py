"""What secrets look like: names of variables, and forms in a text. Only the standard library.

`cluster` and `pipeline` know nothing of each other and judge by one rule: this file stands in both, letter for letter,
which a test holds them to.
"""

import re

HIDDEN = "***"
# A name that ends so holds a secret, also with a number or a word such as _READ behind; HF_TOKEN_PATH does not.
_NAME = re.compile(
    r"(PASSWORD|PASSWD|PASSPHRASE|PASS|PWD|SECRET|TOKEN|CREDENTIALS?|(^|_)AUTH|AUTH_STRING|CONNECTION_STRING|"
    r"CONNECTION_URL|WEBHOOK(_URL)?|(^|_)PAT|(^|_)KEY|(API|ACCESS|SECRET|PRIVATE|ACCOUNT)KEY|ACCESS_KEY_ID)"
    r"(_?\d+|_(READ|WRITE|RO|RW|VALUE|OLD|NEW|PROD|DEV|TEST))?$",
    re.IGNORECASE,
)
# And these hold none: folders, programs, the name of MLflow's plug-in, what is published or only sorts.
_OPEN_NAME = re.compile(
    r"^(PWD|OLDPWD|MLFLOW_TRACKING_AUTH|(.*_)?(PUBLIC|SORT|CACHE|PARTITION)_KEY|.*(ASKPASS|BYPASS|COMPASS))$",
    re.IGNORECASE,
)
_PATH = re.compile(r"(/|~/|\./|\.\./|file:/)")
_AMAZON_KEY = re.compile(r"[A-Za-z0-9/+]{40}")  # one in 64 begins as a path does
_OPEN_VALUE = re.compile(r"(true|false|yes|no|none|null|on|off)?", re.IGNORECASE)
_HEX_KEY = re.compile(r"[0-9a-fA-F]{40}")  # of Weights & Biases; a commit of git looks alike, so its name decides
_COMMIT_NAME = re.compile(r"(COMMIT|REVISION|SHA1?|HASH|DIGEST|REF)$", re.IGNORECASE)
# USER:PASSWORD@ of a URL, up to the last @ before the path; a password with / or spaces in it, where no port precedes.
_IN_URL = re.compile(
    r"(?<=://)(?!user:password@)[^\s/:@'\"\[]*:"
    r"(?:[^\s/'\"{]+(?=@(?!sha\d+:))"
    r"|(?!(?:\d{1,5}|port)(?:[/?#\s,;.)]|$))[^\s'\"{]+(?: [^\s'\"{@]+){0,2}(?=@[\w.-]))",
    re.IGNORECASE,
)
# user:password@registry/x; `image:tag@sha256:...`, `12:30@noon` and mailto are none.
_BEFORE_HOST = re.compile(
    r"(?<![\w/:@.+-])(?!user:password@|mailto:)[\w.+-]+:[^\s/:@'\"{]+(?=@(?!sha\d+:)(?:[\w-]+(?:\.[\w-]+)+|[\w-]+[:/]))",
    re.IGNORECASE,
)
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|token|access_token|api_key|"
    r"password)=)(?!\*\*\*)[^&\s'\"]+",
    re.IGNORECASE,
)
_IN_HEADER = re.compile(r"\b(Basic|Bearer|bearer(?= \S*\d)|Token(?= [0-9a-f]{20})) (?!\*\*\*)[A-Za-z0-9+/._~-]{8,}=*")
_TOKEN = re.compile(  # of Hugging Face, Amazon, GitHub, GitLab, Prefect, Slack, Google, OpenAI; JSON web tokens
    r"\b(hf_[A-Za-z0-9]{20,}|(AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|"
    r"pn[ub]_[A-Za-z0-9]{20,}|xox[abp]-[\w-]{20,}|AIza[\w-]{30,}|sk-(?=[\w-]*\d)[\w-]{20,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)|https://hooks\.slack\.com/services/\w[\w/]+"
)
# PGPASSWORD=..., "HF_TOKEN": "..."; --password=..., --api-key ...; api_key=...
_VARIABLE = re.compile(r"(?<![\w$.{-])([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*)(['\"]?(?:=|:\s?)['\"]?)([^\s'\",;&)}\]]+)")
_ARGUMENT = re.compile(
    r"(?<![\w.])((?:--?(?:[a-z]+-)*(?:password|passwd|passphrase|secret|token|api-?key|access-?key)['\"]?(?:=|,?\s+))|"
    r"(?:(?:[a-z]+_)*(?:password|passwd|passphrase|secret|api_?key|access_key|access_token|auth_token)=))"
    r"(['\"]?)(?![-$<{*])([^\s'\",;&)}\]]{6,})"
)
_PLACEHOLDER = re.compile(r"[$<{*%.].*|[A-Z_]+|.*\.\.\.|x+", re.DOTALL)
_MEANT_ALONE = ("PASSWORD", "PGPASSWORD", "PASSWD", "TOKEN", "SECRET", "APIKEY")  # other single words are words
LEAST_LENGTH = 6


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret, as far as its name tells."""
    return _NAME.search(variable) is not None and _OPEN_NAME.match(variable) is None


def is_open(value: str) -> bool:
    """Whether a value is none in spite of its variable's name: a path to where the secret lies, a switch, nothing."""
    if _PATH.match(value) and not _AMAZON_KEY.fullmatch(value):
        return True
    return _OPEN_VALUE.fullmatch(value.strip()) is not None


def is_secret(variable: str, value: str) -> bool:
    """Whether a setting of an environment variable is a secret: by its name, or by what it says."""
    looks = _HEX_KEY.fullmatch(value.strip()) is not None and _COMMIT_NAME.search(variable) is None
    return looks or (names_a_secret(variable) and not is_open(value)) or kind_of_secret(value) is not None


def kind_of_secret(text: str) -> str | None:
    """What kind of secret stands in `text`, in words that do not repeat it; None where none is recognised."""
    if _IN_URL.search(text) or _BEFORE_HOST.search(text):
        return "an address with a password"
    if _IN_QUERY.search(text):
        return "a URL with a signature or token"
    if _IN_HEADER.search(text) or _TOKEN.search(text):
        return "a token"
    return None if _without_settings(text) == text else "a password or token in words"


def hidden(text: str) -> str:
    """`text` with every secret that has a known form replaced by `***`."""
    text = _BEFORE_HOST.sub(HIDDEN, _IN_URL.sub(HIDDEN, text))
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_HEADER.sub(rf"\g<1> {HIDDEN}", text)
    return _without_settings(_TOKEN.sub(HIDDEN, text))


def _without_settings(text: str) -> str:
    """`text` without what is assigned to a variable or given to an option whose name says that it is secret."""

    def of_variable(found: re.Match[str]) -> str:
        name, between, value = found.groups()
        meant = "_" in name or name in _MEANT_ALONE
        told = "=" in between or any(letter.isdigit() for letter in value)  # `NAME: words` is a sentence
        secret = meant and told and names_a_secret(name) and _is_value(value)
        return f"{name}{between}{HIDDEN}" if secret else found[0]

    def of_argument(found: re.Match[str]) -> str:
        option, quote, value = found.groups()
        told = "=" in option or not value.replace("-", "").isalpha()  # `--token learned` is a choice
        return f"{option}{quote}{HIDDEN}" if told and _is_value(value) else found[0]

    return _ARGUMENT.sub(of_argument, _VARIABLE.sub(of_variable, text))


def _is_value(value: str) -> bool:
    """Whether what is given as a secret is one, and no number, path, switch or word that stands for one."""
    long = len(value) >= LEAST_LENGTH and not value.isdigit()
    return long and not is_open(value) and _PLACEHOLDER.fullmatch(value) is None
