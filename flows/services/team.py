"""A team's servers: what `vit up --profile team` or `--profile FILE.yaml` reads, and the secrets that it names.

A profile says where servers listen, under which names they are reached and where they keep what they know. No secret
stands in it: passwords come from environment variables, and go to the one program that needs them.
"""

import importlib.util
import os
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cluster.profile import profile_names
from pipeline.config.recipe import read_yaml, validate
from pipeline.errors import InputError

PROFILES = Path(__file__).parent / "profiles"
LOCAL = "local"
AUTH_STRING = "PREFECT_API_AUTH_STRING"
TRACKING_USER = "MLFLOW_TRACKING_USERNAME"
TRACKING_PASSWORD = "MLFLOW_TRACKING_PASSWORD"
ANSWER_SECONDS = 10  # in which a database says who it is
LEAST_PASSWORD = 12  # characters; MLflow's own rule for its users
HOST_NAME = r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$"


def _database(url: str) -> str:
    try:
        parts = urlsplit(url)
        fault = parts.scheme != "postgresql" or not parts.hostname or not parts.path.strip("/") or parts.port == 0
    except ValueError:
        fault, parts = True, urlsplit("")
    if parts.password is not None or "@" in parts.path:
        raise ValueError("holds a password; take it out, and name by password_variable where it stands")
    if fault:
        raise ValueError("is no database; say postgresql://USER@HOST/NAME, without a password")
    return url


def _artifacts(place: str) -> str:
    if "://" in place and ("@" in place or not re.match(r"(s3|gs)://[^/]", place)):
        raise ValueError("is no store; say a folder that is shared, or s3://BUCKET/PATH without credentials")
    if "://" not in place and not os.path.isabs(os.path.expanduser(place)):
        raise ValueError("is not an absolute path; clients and servers stand in different folders")
    return place


def _profile_of_runs(profile: str) -> str:
    if profile.endswith((".yaml", ".yml")):
        if not profile.startswith("/"):  # it is read where the worker runs, whose folders are not these
            raise ValueError("is not an absolute path; flows run in folders of their own")
    elif profile not in profile_names():
        raise ValueError(f"is no profile of runs; say {', '.join(profile_names())}, or the absolute path of a .yaml")
    return profile


Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Database = Annotated[str, AfterValidator(_database)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class PrefectServer(_Part):
    """A Prefect server on this machine."""

    database: Database
    """PostgreSQL, without the password: postgresql://USER@HOST[:PORT]/NAME."""
    password_variable: Variable | None = None
    """Environment variable that holds the database's password. None: it asks for none, or ~/.pgpass has it."""
    port: Port = 4200
    """Where it listens. Clients are told of it, so another one is not taken where it is not free."""


class MlflowServer(_Part):
    """An MLflow server on this machine, and its users."""

    database: Database
    """PostgreSQL, without the password: for runs, registry, and the users of the server."""
    password_variable: Variable | None = None
    """Environment variable that holds the database's password. None: it asks for none, or ~/.pgpass has it."""
    port: Port = 5000
    """Where it listens."""
    artifacts: Annotated[str, AfterValidator(_artifacts)] | None = None
    """A folder or s3://BUCKET/PATH, read and written by the server alone: clients need no right to it. None:
    `artifacts` in the home."""
    workers: Annotated[int, Field(strict=True, ge=1)] = 2
    """Processes that answer; each takes some 300 MB."""
    permission: Literal["READ", "EDIT", "MANAGE"] = "EDIT"
    """What every user may do with what others made. With READ nobody adds to an experiment of another."""


class TeamProfile(_Part):
    """Servers that several people use, and the worker of one cluster."""

    kind: Literal["team"]
    """`team`."""
    pool: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "local"
    """Prefect's work pool of this worker: one for each cluster."""
    deployment_suffix: Annotated[str, Field(pattern=r"^[\w.-]*$")] = ""
    """Put after the name of each deployment, so that a second cluster has its own: `-west` makes pretrain/vit-l16-west.
    Empty: plain names."""
    profile: Annotated[str, AfterValidator(_profile_of_runs)] | None = None
    """Where runs of this pool's deployments train where none is named: slurm, kubernetes, or the absolute path, on the
    worker's machine, of a profile of yours, which also names the image. None: on the worker's own machine."""
    listen: str = "0.0.0.0"
    """Address on which the servers listen; 127.0.0.1 behind a proxy that adds TLS."""
    hosts: tuple[Annotated[str, Field(pattern=HOST_NAME)], ...] = ()
    """Names under which clients reach this machine, the first in every address that is printed; `*.svc.cluster.local`
    is any name that ends so. Requests to other names are refused by MLflow. Empty: this machine's own name."""
    prefect: PrefectServer | None = None
    """None: it runs elsewhere, and PREFECT_API_URL names it."""
    mlflow: MlflowServer | None = None
    """None: it runs elsewhere, and MLFLOW_TRACKING_URI names it."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.hosts or tuple(dict.fromkeys((socket.gethostname(), socket.getfqdn())))

    @property
    def host(self) -> str:
        """The name that stands in addresses."""
        return next((name for name in self.names if "*" not in name), socket.gethostname())

    def secret_variables(self) -> set[str]:
        """Variables that only a server may see."""
        return {part.password_variable for part in (self.prefect, self.mlflow) if part and part.password_variable}


def load_team(profile: str) -> TeamProfile | None:
    """The team profile of this name or path; None for `local`. InputError where it is none, or a secret is missing."""
    if profile == LOCAL:
        return None
    path = Path(profile).expanduser() if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in PROFILES.glob("*.yaml")))
        raise InputError(f"--profile {profile}: no servers of this name; say local, {names}, or a path to a .yaml file")
    raw = read_yaml(path)
    if raw.get("kind") != "team":
        raise InputError(
            f"{path}: kind: `{raw.get('kind')}` says where a run goes, and `vit up` starts servers; say `kind: team`"
        )
    team = validate(TeamProfile, raw, path.name)
    if problems := _missing(team, path.name):
        raise InputError(*problems)
    return team


def _missing(team: TeamProfile, source: str) -> list[str]:
    """What the environment lacks, a line each; nothing that a server elsewhere needs is asked for."""
    here = {
        "prefect": None if os.environ.get("PREFECT_API_URL") else team.prefect,
        "mlflow": None if os.environ.get("MLFLOW_TRACKING_URI") else team.mlflow,
    }
    urls = {"prefect": "PREFECT_API_URL", "mlflow": "MLFLOW_TRACKING_URI"}
    lines = [
        f"{source}: {part}: not given, and {urls[part]} is not set: export {urls[part]}=URL of the team's server, or "
        f"say in {part}: which database one here is to use"
        for part, server in here.items()
        if server is None and not os.environ.get(urls[part])
    ]
    needs = {
        f"{part}.password_variable": server.password_variable
        for part, server in here.items()
        if server is not None and server.password_variable
    }
    if here["prefect"] is not None:
        needs["prefect"] = AUTH_STRING
    if here["mlflow"] is not None:
        needs |= {
            "mlflow (the user who may everything)": TRACKING_USER,
            "mlflow (that user's password)": TRACKING_PASSWORD,
        }
    lines += [
        f"{source}: {where}: the environment variable {name} is not set; export {name}=..."
        for where, name in needs.items()
        if not os.environ.get(name)
    ]
    return lines + _unusable(here["prefect"], here["mlflow"], source)


def _unusable(prefect: PrefectServer | None, mlflow: MlflowServer | None, source: str) -> list[str]:
    """What is there and will not do, for servers that are to be started here."""
    lines = []
    auth, password = os.environ.get(AUTH_STRING), os.environ.get(TRACKING_PASSWORD)
    if prefect is not None and auth and not all(auth.partition(":")):
        lines.append(f"{source}: prefect: {AUTH_STRING} is not of the form user:password")
    if mlflow is None:
        if prefect is not None and importlib.util.find_spec("psycopg") is None:
            lines.append(f"{source}: prefect: needs psycopg, not installed: uv sync --extra server")
        return lines
    if password and len(password) < LEAST_PASSWORD:
        lines.append(
            f"{source}: mlflow: {TRACKING_PASSWORD} is shorter than {LEAST_PASSWORD} characters, MLflow's least"
        )
    s3 = ["boto3"] if (mlflow.artifacts or "").startswith("s3://") else []
    missing = [name for name in ["psycopg", "flask_wtf", *s3] if importlib.util.find_spec(name) is None]
    return lines + [f"{source}: mlflow: needs {name}, not installed: uv sync --extra server" for name in missing]


def require_database(part: str, server: PrefectServer | MlflowServer) -> None:
    """InputError where the database that a server is to use does not answer, or does not know its user or password,
    or where MLflow's administrator stands in it with another password.

    The servers themselves would say so too, after a minute and in the words of their drivers.
    """
    import psycopg

    password = database_environment(server).get("PGPASSWORD")
    try:
        with psycopg.connect(server.database, password=password, connect_timeout=ANSWER_SECONDS) as connection:
            if isinstance(server, MlflowServer):
                _require_administrator(connection)
    except psycopg.Error as error:
        first = str(error).strip().splitlines()[0]
        reason = re.sub(r"^(connection failed: )?(connection to server .*? failed: )?(FATAL: +)?", "", first)
        hint = _where_to_look(part, server, reason)
        raise InputError(f"{part}.database {server.database}: {reason}; {hint}") from None


def _require_administrator(connection: Any) -> None:
    """MLflow makes its administrator once and never gives them another password: what is exported may be too late."""
    from psycopg.errors import InsufficientPrivilege, UndefinedColumn, UndefinedTable
    from werkzeug.security import check_password_hash

    user = os.environ[TRACKING_USER]
    try:
        row = connection.execute("SELECT password_hash FROM users WHERE username = %s", [user]).fetchone()
    except (UndefinedTable, UndefinedColumn, InsufficientPrivilege):  # a first start, or another MLflow's tables
        return
    if row is not None and not check_password_hash(row[0], os.environ[TRACKING_PASSWORD]):
        raise InputError(
            f"mlflow: {TRACKING_PASSWORD} is not the password of {user}: the administrator was made at the first start "
            f"on this database, with the password of then; export that one, or another {TRACKING_USER} to make a "
            "second administrator"
        )


def _where_to_look(part: str, server: PrefectServer | MlflowServer, reason: str) -> str:
    if "password" in reason or "authentication" in reason:
        if server.password_variable is None:
            return f"no {part}.password_variable is given, so the password is that of ~/.pgpass"
        return f"the password is that of the environment variable {server.password_variable} ({part}.password_variable)"
    if "does not exist" in reason:
        return f"make it: createdb {urlsplit(server.database).path.strip('/')}"
    return "is PostgreSQL running there, and does it listen for this machine?"


def database_environment(server: PrefectServer | MlflowServer) -> dict[str, str]:
    """The password as both drivers read it: never in a URL, so neither in a command line nor in a log."""
    if server.password_variable is None:
        return {}
    return {"PGPASSWORD": os.environ[server.password_variable]}


def driven(database: str, driver: str) -> str:
    """The database's URL for SQLAlchemy."""
    return database.replace("postgresql://", f"postgresql+{driver}://", 1)


def prefect_settings(team: TeamProfile, server: PrefectServer) -> Mapping[str, str]:
    """What makes a Prefect server a team's: its database, who may ask it, where its page asks."""
    origins = [f"http://{name}:{server.port}" for name in (*team.names, "localhost") if "*" not in name]
    return database_environment(server) | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": driven(server.database, "asyncpg"),
        "PREFECT_SERVER_API_HOST": team.listen,
        "PREFECT_SERVER_API_AUTH_STRING": os.environ[AUTH_STRING],
        "PREFECT_SERVER_UI_API_URL": f"http://{team.host}:{server.port}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
    }


def mlflow_arguments(team: TeamProfile, server: MlflowServer, home: Path) -> list[str]:
    """What makes an MLflow server a team's: its database, its store, who may ask it and under which names."""
    hosts = [pattern for name in (*team.names, "localhost", "127.0.0.1") for pattern in (name, f"{name}:*")]
    origins = [f"http://{name}:{server.port}" for name in team.names]
    return [
        "--host", team.listen, "--port", str(server.port), "--workers", str(server.workers),
        "--backend-store-uri", driven(server.database, "psycopg"),
        # Every client goes through the server, which alone has a right to the store.
        "--artifacts-destination", _store(server, home),
        "--app-name", "basic-auth", "--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins),
    ]  # fmt: skip


def mlflow_environment(server: MlflowServer, home: Path) -> dict[str, str]:
    """What only the MLflow server may see: its database's password, and that of its administrator."""
    return database_environment(server) | {
        "MLFLOW_AUTH_CONFIG_PATH": str(write_mlflow_users(server, home)),
        "MLFLOW_AUTH_ADMIN_USERNAME": os.environ[TRACKING_USER],
        "MLFLOW_AUTH_ADMIN_PASSWORD": os.environ[TRACKING_PASSWORD],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),  # of one server's life: it signs forms alone
    }


def _store(server: MlflowServer, home: Path) -> str:
    if server.artifacts is None:
        return (home / "artifacts").as_uri()
    return server.artifacts if "://" in server.artifacts else Path(server.artifacts).expanduser().as_uri()


def write_mlflow_users(server: MlflowServer, home: Path) -> Path:
    """The file in which MLflow reads where it keeps its users; beside its own tables, and without a password."""
    path = home / "mlflow-auth.ini"
    path.write_text(
        "[mlflow]\n"
        f"default_permission = {server.permission}\n"
        f"database_uri = {driven(server.database, 'psycopg').replace('%', '%%')}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return path
