"""What must be equal wherever a run's processes are: code and packages; and which of several differ. Torch-free."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "numpy", "simplejpeg")


def environment_parts() -> dict[str, str]:
    """Code, Python and packages of this process, by name; `none` for a package that is missing."""
    return {"code": code_digest(), "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def code_digest() -> str:
    """Of the source that this process runs."""
    root = Path(__file__).parents[1]
    sources = sorted(path for package in ("models", "pipeline") for path in (root / package).rglob("*.py"))
    return digest(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sources))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def differences(shown: Mapping[int, Mapping[str, str]]) -> dict[int, str]:
    """In words, where each differs that does: from most, or from number 0 where there is no most."""
    texts = {number: json.dumps(parts, sort_keys=True) for number, parts in shown.items()}
    common, count = Counter(texts.values()).most_common(1)[0]
    expected = json.loads(common if count > len(shown) // 2 else texts[min(texts)])
    found = {}
    for number, parts in sorted(shown.items()):
        names = sorted(name for name in expected | dict(parts) if parts.get(name) != expected.get(name))
        if names:
            found[number] = ", ".join(f"{n} ({parts.get(n, 'none')}, not {expected.get(n, 'none')})" for n in names)
    return found
