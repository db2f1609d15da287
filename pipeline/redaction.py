"""Secrets kept out of what is written and said: passwords in URLs, tokens, and the values of variables that hold them.

Two rules. What a run is made of (config, profile) is refused where it holds a secret: it stands in files that are
copied and shown for years. What is said of a run (lines, errors, records) has it replaced. Torch-free.
"""

import os
import re
from html import escape, unescape

from pipeline.errors import InputError
from pipeline.secret_forms import HIDDEN, hidden, is_open, kind_of_secret, names_a_secret

LEAST_LENGTH = 8  # of a variable's value: a shorter one also stands where no secret is meant


def without_secrets(text: str) -> str:
    """`text` with every secret that can be recognised replaced by `***`."""
    for value in _values().values():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", HIDDEN, text)
    return hidden(text)


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says first, without secrets: they are looked for in all of it, before it is cut."""
    words = without_secrets(str(error)).strip()
    return (words.splitlines()[0] if words else type(error).__name__)[:most]


def without_secrets_in_page(page: str) -> str:
    """An HTML page whose texts and attributes are without secrets; its pictures, which are data, stay as they are."""

    def cleaned(found: re.Match[str]) -> str:
        part = found[0]
        if "data:image/" in part:
            return part
        if part.startswith("<"):
            return without_secrets(part)
        plain = unescape(part)
        cleaned = without_secrets(plain)
        return part if cleaned == plain else escape(cleaned)

    return re.sub(r"<[^>]*>|[^<]+", cleaned, page)


def secret_in(text: str) -> str | None:
    """What kind of secret stands in `text`, in words that do not repeat it; None where none is recognised."""
    for name, value in _values().items():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", text):
            return f"the value of the environment variable {name}"
    return kind_of_secret(text)


def require_no_secret(where: str, text: str) -> None:
    """InputError where `text`, which is to be kept, holds a secret."""
    if found := secret_in(text):
        raise InputError(f"{where}: would hold {found}, and stays on disk; leave it to the environment of the job")


def _values() -> dict[str, str]:
    """What stands in variables of this process whose names say that it is secret, the longest first."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if not names_a_secret(name) or is_open(value):
            continue
        found |= {name: value}
        if name.endswith("AUTH_STRING"):
            found |= {f"{name} (its password)": value.partition(":")[2]}
    long = {name: value for name, value in found.items() if len(value) >= LEAST_LENGTH and not value.isdigit()}
    return dict(sorted(long.items(), key=lambda item: -len(item[1])))
