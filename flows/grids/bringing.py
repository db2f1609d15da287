"""Several runs to their ends: one after the other on this machine, as an array on a cluster. One that fails does not
keep the others back."""

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.job import SubmitError
from flows.control.jobs import Conclusion
from flows.control.submission import launcher_of, request_of, runs_here
from pipeline.errors import EXIT_INPUT, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory

Report = Callable[[str], None]
Bring = Callable[[RunDirectory, Report], Conclusion]


def bring_each(runs: Sequence[RunDirectory], report: Report, bring: Bring) -> list[Conclusion]:
    """Where the runs go, all of them go. `bring` controls one; a stop is one for all that are left."""
    if runs and not runs_here(runs[0]):
        return _as_array(runs, report, bring)
    return in_turn(runs, report, bring)


def in_turn(runs: Sequence[RunDirectory], report: Report, bring: Bring) -> list[Conclusion]:
    ends = []
    for run in runs:
        ends.append(bring_one(run, report, bring))
        if ends[-1].code == EXIT_STOPPED:  # somebody wants it all to stop
            break
    return ends


def _as_array(runs: Sequence[RunDirectory], report: Report, bring: Bring) -> list[Conclusion]:
    try:
        jobs = launcher_of(runs[0]).submit_array([request_of(run) for run in runs])
    except SubmitError as error:
        raise InputError(f"{runs[0].path.parent}: not submitted: {error}") from None
    report(f"submitted: {len(jobs)} runs as {', '.join(dict.fromkeys(job.id.partition('_')[0] for job in jobs))}")
    context = contextvars.copy_context
    with ThreadPoolExecutor(len(runs)) as pool:
        return [end.result() for end in [pool.submit(context().run, bring_one, run, report, bring) for run in runs]]


def bring_one(run: RunDirectory, report: Report, bring: Bring) -> Conclusion:
    def told(line: str) -> None:
        report(line if run.path.name in line else f"{run.path.name}: {line}")

    try:
        conclusion = bring(run, told)
    except InputError as error:
        conclusion = Conclusion(EXIT_INPUT, "; ".join(error.problems), run, {})
    report(conclusion.message)
    return conclusion
