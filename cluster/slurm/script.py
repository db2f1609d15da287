"""The batch script of a job: a pure function of the request and the profile, compared with golden files.

The script runs on the first node: it sets the environment up, starts one supervisor per node, decides the job's exit
code and submits the job again where that code asks for it. It leaves SIGTERM alone, so that preemption, scancel and the
time limit end it before it submits anything.
"""

import math
import re
import shlex
from pathlib import Path

from cluster.job import JobRequest
from cluster.slurm.profile import Image, SlurmProfile, Wheelhouse
from cluster.slurm.submission import SCRIPT, job_comment, job_name

LITERAL = "# shellcheck disable=SC2016 # what stands in single quotes is meant literally"
PASSED_INTO_IMAGES = (
    "VIT_START", "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_RESTART_COUNT",
    "SLURM_JOB_NODELIST", "SLURMD_NODENAME", "OMP_NUM_THREADS",
)  # fmt: skip

_AWAIT_JOB_FILE = """\
mine="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"
job="$mine${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
exec >>"submit/slurm-$job.out" 2>&1
# job.json names this job a moment after sbatch answered; go on where no submitter is left to write it
for _ in $(seq 60); do
  named="$(sed -n 's/.*"id": "\\([0-9]*\\)[_"].*/\\1/p' job.json 2>/dev/null)"
  if [ "${named:-0}" -ge "$mine" ]; then break; fi
  sleep 0.5
done
# SLURM requeued this job after it had been submitted again
if [ "${named:-0}" -gt "$mine" ]; then echo "job $job gives way to the newer job $named"; exit 0; fi"""

_FIND_MODULE = """\
if ! command -v module >/dev/null 2>&1; then
  for file in "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash" "${MODULESHOME:-/usr/share/modules}/init/bash"; do
    # shellcheck disable=SC1090
    if [ -r "$file" ]; then . "$file"; break; fi
  done
fi"""


def sbatch_script(request: JobRequest, profile: SlurmProfile, python: str) -> str:
    """The text of RUN/submit/job.sbatch. `python` is the submitter's interpreter, which submits again."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in directives(request, profile)), "", LITERAL]
    lines += [f"cd -- {_quoted(request.directory)} || exit 76"]
    if profile.umask:
        lines.append(f"umask {profile.umask}")
    lines += [_AWAIT_JOB_FILE, *_environment(request, profile), *_steps(request, profile)]
    # an image has no sbatch, so there the submitter's own interpreter must do
    again = "python" if profile.venv or profile.wheelhouse else python
    resubmit = (again, "-m", "cluster.resubmit", str(request.directory))
    lines += ["# 75 and 76 ask to be run again", f'{shlex.join(resubmit)} "$code"', 'exit "$code"']
    return "\n".join(lines) + "\n"


def directives(request: JobRequest, profile: SlurmProfile) -> list[str]:
    """The options of sbatch, each as it stands after #SBATCH."""
    # "USR1", not "B:USR1": it goes to the steps, where the supervisors are; the batch shell would not pass it on.
    options = {
        "job-name": job_name(request.key),
        "comment": _directive_value(job_comment(request.directory)),
        "chdir": _directive_value(str(request.directory)),
        # SLURM would expand these in the whole path, the run directory too; the script writes there in any case
        "output": "/dev/null" if re.search(r"[%\\]", str(request.directory)) else "submit/slurm-%j.out",
        "open-mode": "append",
        "requeue": True,
        "export": "NONE",  # nothing of the submitter's shell, and no secret in it, enters SLURM's records
        "nodes": profile.nodes,
        # With it SLURM takes the least of a range, whatever is free: tasks enough for that are all it looks for.
        "ntasks-per-node": None if "-" in str(profile.nodes) else 1,
        "gpus-per-node": profile.accelerators_per_node or None,
        "cpus-per-task": profile.cpus_per_task,
        "exclusive": profile.cpus_per_task is None,
        "mem": profile.memory or ("0" if profile.cpus_per_task is None else None),
        "time": profile.time,
        "signal": f"USR1@{math.ceil(request.stop_lead_seconds)}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "reservation": profile.reservation,
        "gres": profile.gres,
        "exclude": profile.exclude,
        "dependency": profile.dependency,
    }
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    own = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    return [*own, *profile.directives]


def array_script(name: str, comment: str, requests: list[JobRequest], profile: SlurmProfile, limit: int | None) -> str:
    """One script for many runs: each task runs the script that lies in its own run directory."""
    shared = [
        option
        for option in directives(requests[0], profile)
        if not option.startswith(("--job-name=", "--comment=", "--output=", "--dependency=singleton"))
    ]
    tasks = f"0-{len(requests) - 1}" + (f"%{limit}" if limit else "")
    own = [f"--job-name={name}", f"--comment={_directive_value(comment)}", f"--array={tasks}"]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in (*own, "--output=/dev/null", *shared)), "", LITERAL]
    lines += ['case "$SLURM_ARRAY_TASK_ID" in']
    lines += [f"  {task}) run={_quoted(request.directory)} ;;" for task, request in enumerate(requests)]
    lines += ["  *) exit 2 ;;", "esac"]
    lines += [f'exec bash "$run/submit/{SCRIPT}"']
    return "\n".join(lines) + "\n"


def _environment(request: JobRequest, profile: SlurmProfile) -> list[str]:
    # where the site gives a job no login environment, bash knows these but does not pass them on
    lines = ['if [ -z "${HOME:-}" ]; then HOME=~; fi', "export HOME PATH"]
    if profile.modules:
        lines += [_FIND_MODULE, *(f"module load {name} || exit 2" for name in profile.modules)]
    for name, value in sorted((profile.env | request.environment).items()):
        lines.append(f"export {name}={_quoted(value)}")
    if profile.threads:
        lines.append(f"export OMP_NUM_THREADS={profile.threads}")
    lines += ['export VIT_START="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"', "unset SLURM_EXPORT_ENV"]
    if profile.venv:
        lines += [
            f"export VIRTUAL_ENV={_quoted(profile.venv)}",
            'if [ ! -x "$VIRTUAL_ENV/bin/python" ]; then',
            '  echo "$(hostname): there is no $VIRTUAL_ENV/bin/python"; exit 2',  # not whatever else is called python
            "fi",
            'export PATH="$VIRTUAL_ENV/bin:$PATH"',
        ]
    lines += _on_nodes(request, profile)
    if profile.wheelhouse:
        lines += _from_wheels(profile.wheelhouse)
    return lines


def _on_nodes(request: JobRequest, profile: SlurmProfile) -> list[str]:
    """A shell function that starts a command once on each node."""
    options = [
        '--nodes="$SLURM_JOB_NUM_NODES"', '--ntasks="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1",
        "--kill-on-bad-exit=1", f"--cpu-bind={profile.cpu_bind}",
    ]  # fmt: skip
    if profile.cpus_per_task:
        options.append(f"--cpus-per-task={profile.cpus_per_task}")  # srun does not take sbatch's
    if profile.image and profile.image.kind == "pyxis":
        options += _pyxis(profile.image, request)
    return [
        "# SIGUSR1 asks for a checkpoint; it is ignored until the command listens",
        "on_nodes() {",
        f"  srun {' '.join(options)} \\",
        """    bash -c 'trap "" USR1; exec "$@"' node "$@\"""",
        "}",
    ]


def _steps(request: JobRequest, profile: SlurmProfile) -> list[str]:
    """Preflight, supervisors, verdict: what decides the exit code."""
    lines = ["code=0"]
    if request.preflight_command and profile.preflight:
        lines.append(f"on_nodes {_command(request.preflight_command, request, profile)} || code=$?")
    main = f"on_nodes {_command(request.command, request, profile)} || code=$?"
    lines.append(f'if [ "$code" -eq 0 ]; then {main}; fi' if len(lines) > 1 else main)
    if request.verdict_command:
        verdict = _command(request.verdict_command, request, profile)
        if profile.image and profile.image.kind == "pyxis":
            verdict = f"srun --nodes=1 --ntasks=1 {' '.join(_pyxis(profile.image, request))} {verdict}"
        lines += ["# the nodes' verdicts decide", "code=0", f"{verdict} || code=$?"]
    return lines


def _command(command: tuple[str, ...], request: JobRequest, profile: SlurmProfile) -> str:
    """A command as words of the shell, with the interpreter and inside the image that the profile names."""
    words, image = list(command), profile.image
    elsewhere = profile.venv or profile.wheelhouse or image
    if elsewhere and Path(words[0]).name.startswith("python"):  # the submitter's interpreter
        words[0] = image.python if image else "python"
    if image and image.kind == "apptainer":
        accelerators = ["--nv"] if profile.accelerators_per_node or profile.gres else []
        binds = [f"--bind={mount}" for mount in _mounts(image, request)]
        words = ["apptainer", "exec", *accelerators, *binds, f"--pwd={request.directory}", image.path, *words]
    elif image and image.kind == "enroot":
        mounts = [f"--mount={mount}" for mount in _mounts(image, request)]
        names = [*PASSED_INTO_IMAGES, *sorted(profile.env | request.environment)]
        words = ["enroot", "start", *mounts, *(f"--env={name}" for name in names), image.path, *words]
    return shlex.join(words)


def _pyxis(image: Image, request: JobRequest) -> list[str]:
    return [
        f"--container-image={_quoted(image.path)}",
        f"--container-mounts={_quoted(','.join(_mounts(image, request)))}",
        f"--container-workdir={_quoted(request.directory)}",
    ]


def _mounts(image: Image, request: JobRequest) -> list[str]:
    return [mount if ":" in mount else f"{mount}:{mount}" for mount in (str(request.directory), *image.mounts)]


def _from_wheels(wheelhouse: Wheelhouse) -> list[str]:
    """An environment per user and content of the folder, made once per node and kept."""
    make = (
        'set -e; umask 022; mkdir -p -m 700 "$1"; [ -O "$1" ]; exec 9>"$1/lock"; flock 9; '
        'if [ -e "$1/complete" ]; then exit 0; fi; '
        '"$2" -m venv --clear "$1/venv"; '
        '"$1/venv/bin/python" -m pip install --quiet --no-index --find-links "$3" "$4"; touch "$1/complete"'
    )
    words = " ".join(_quoted(word) for word in (wheelhouse.python, wheelhouse.path, wheelhouse.requirement))
    return [
        f"wheels=\"$(stat -c '%n %s %Y' {_quoted(wheelhouse.path)}/*.whl | cksum | cut -d' ' -f1)\"",
        f'environment={_quoted(wheelhouse.directory)}/vit-"$(id -u)-$wheels"',
        f"on_nodes bash -c '{make}' wheels \"$environment\" {words} || exit 76",
        'export PATH="$environment/venv/bin:$PATH"',
    ]


def _quoted(value: object) -> str:
    return shlex.quote(str(value))


def _directive_value(value: str) -> str:
    """A value for an #SBATCH line: sbatch reads quotes as a shell does, but takes a backslash away even within them."""
    return shlex.quote(value.replace("\\", "\\\\"))
