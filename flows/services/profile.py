"""The Prefect profile `vit`: makes `prefect ...` talk to the local stack in every shell, and goes away with it.

The person's profiles.toml is edited as text and compared with what it should mean before it is replaced: comments and
other profiles stay as they are, and importing Prefect (seconds) is not needed. A file that cannot be edited so is
refused, never rewritten.
"""

import json
import os
import re
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import InputError

NAME = "vit"
URL = "PREFECT_API_URL"


def profiles_path() -> Path:
    """The file in which Prefect keeps this person's profiles."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    return Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser().resolve()


def remember_profile() -> dict:
    """What `restore_profile` will need. InputError where the profile `vit` is the person's own, not of `vit up`."""
    path = profiles_path()
    before = profiles(_text(path))
    settings = before.get("profiles", {}).get(NAME, {})
    if settings.keys() - {URL}:
        raise InputError(
            f"{path}: the profile `{NAME}` holds settings of yours; hint: rename it, `vit up` needs the name"
        )
    return {"path": str(path), "active": before.get("active"), "url": settings.get(URL)}


def activate_profile(previous: dict, api_url: str) -> None:
    """Make the profile `vit` for `api_url` the active one."""
    path = Path(previous["path"])
    _write(path, with_profile(_text(path), {URL: api_url}, active=NAME))


def restore_profile(previous: dict, api_url: str, is_alive: Callable[[str], bool]) -> None:
    """Put back what was active before, unless `vit` now belongs to another stack or the person chose another profile.

    An earlier `vit` (of a stack in another home) comes back only if its server still answers.
    """
    path = Path(previous["path"])
    text = _text(path)
    now = profiles(text)
    if now.get("profiles", {}).get(NAME, {}).get(URL) != api_url:
        return
    earlier = {URL: previous["url"]} if previous["url"] and is_alive(previous["url"]) else None
    active = previous["active"] if now.get("active") == NAME else now.get("active")
    if active == NAME and earlier is None:
        active = None
    changed = with_profile(text, earlier, active)
    if changed.strip():
        _write(path, changed)
    else:
        path.unlink()


def profiles(text: str) -> dict:
    """The content of a profiles.toml; InputError where it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{profiles_path()}: not valid TOML: {error}") from error


def with_profile(text: str, settings: dict | None, active: str | None) -> str:
    """The text of a profiles.toml with `settings` as the profile `vit` (None: without it) and `active` active."""
    wanted = profiles(text)
    table = wanted.setdefault("profiles", {})
    table.pop(NAME, None)
    wanted.pop("active", None)

    head, *tables = re.split(r"(?m)^(?=[ \t]*\[)", text)
    line = "" if active is None else f"active = {json.dumps(active)}\n"
    head, found = re.subn(r"(?m)^[ \t]*active[ \t]*=.*\n?", lambda _: line, head, count=1)
    if line and not found:
        head = line + (head or "\n")
    tables = [each for each in tables if not re.match(rf"""[ \t]*\[[ \t]*profiles\.["']?{NAME}["']?[ \t]*\]""", each)]
    if active is not None:
        wanted["active"] = active
    if settings is not None:
        table[NAME] = settings
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
        tables = [_ended(each) for each in tables] + [f"[profiles.{NAME}]\n", *lines]
    changed = _ended(head) + "".join(tables) if head.strip() else "".join(tables)

    meant = profiles(changed)
    meant.setdefault("profiles", {})
    if meant != wanted:
        raise InputError(
            f"{profiles_path()}: the profile `{NAME}` cannot be set here without rewriting the file; "
            f"hint: set PREFECT_API_URL in the shell and run again"
        )
    return changed


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _write(path: Path, text: str) -> None:
    """Replace the file in one step, readable by its owner alone as Prefect makes it (it may hold API keys)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".profiles-", delete=False) as partial:
        partial.write(text)
    if path.exists():
        os.chmod(partial.name, path.stat().st_mode & 0o777)
    os.replace(partial.name, path)
