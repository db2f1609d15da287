"""How torch.compile takes a training: graphs, breaks and recompilations over ten steps, at every ZeRO stage.

Ours beside DeepSpeed's own `engine.compile` and accelerate's `dynamo_backend`, on the same modules: supervised, masked
autoencoder, and supervised with drop path. The goals are one graph per part, no break, no graph made after the second
step, and the losses of the same training uncompiled. Graphs are counted before kernels are made, so this machine can.
One rank by default; about 5 minutes on two cores:

    uv run python -m tests.benchmarks.compile_clean
"""

import re
from queue import Empty
from typing import Any

from tests.benchmarks.compiled_steps import CASES, Counted, parts, train
from tests.benchmarks.report import Goal, main, table, verdict
from tests.ranks import run_on_ranks

CONTESTANTS = {"ours": (0, 1, 2, 3), "DeepSpeed": (1, 2, 3), "accelerate": (0, 1, 2, 3)}  # at these stages
LIMIT_SECONDS = 180  # of one training; DeepSpeed's own way at stage 3 may take longer
PACKAGES = ("torch", "deepspeed", "accelerate", "timm")
Cell = tuple[str, str, int]  # contestant, case, stage


def compile_clean(steps: int = 10, ranks: int = 1) -> tuple[str, dict[str, Any]]:
    """The table and the verdict."""
    cells = [(name, case, stage) for case in CASES for name, stages in CONTESTANTS.items() for stage in stages]
    counted, missing = measure(cells, steps, ranks)
    difference = max(loss_difference(counted, cell, steps, ranks) for cell in counted if cell[0] == "ours")
    goals = our_goals(counted) | {"loss, compiled against eager": Goal(difference, 1e-6, at_least=False)}
    effort = graphs_and_breaks(counted)
    best = min((name for name in effort if name != "ours"), key=effort.get)
    text = compile_table(counted, missing) + "\n".join(goal.line(name) for name, goal in goals.items())
    result = verdict(
        "compile_clean", goals, ratio=round(effort["ours"] / effort[best], 3), best_peer=best, goal=1.0,
        graphs_and_breaks=effort, missing=missing,
    )  # fmt: skip
    return text, result


def measure(cells: list[Cell], steps: int, ranks: int) -> tuple[dict[Cell, Counted], dict[str, str]]:
    """What every cell counted, and why the others did not run."""
    counted, missing = {}, {}
    for cell in cells:
        try:
            counted[cell] = run_on_ranks(train, ranks, *cell, True, steps, timeout_seconds=LIMIT_SECONDS)[0]
        except AssertionError as error:
            missing["{}, {}, stage {}".format(*cell)] = reason_of(str(error))
        except Empty:
            missing["{}, {}, stage {}".format(*cell)] = f"took more than {LIMIT_SECONDS} seconds"
    return counted, missing


def loss_difference(counted: dict[Cell, Counted], cell: Cell, steps: int, ranks: int) -> float:
    eager = run_on_ranks(train, ranks, *cell, False, steps)[0]
    return max(abs(one - other) for one, other in zip(counted[cell].losses, eager.losses, strict=True))


def our_goals(counted: dict[Cell, Counted]) -> dict[str, Goal]:
    ours = {cell: count for cell, count in counted.items() if cell[0] == "ours"}
    measured = len(ours) / (len(CASES) * len(CONTESTANTS["ours"]))
    graphs = max(count.graphs / parts(*cell[1:]) for cell, count in ours.items())
    fewest = min(count.graphs / parts(*cell[1:]) for cell, count in ours.items())
    return {
        "cases and stages that ran": Goal(measured, 1),
        "graphs per part, most": Goal(graphs, 1, at_least=False),
        "graphs per part, fewest": Goal(fewest, 1),
        "breaks": Goal(max(count.breaks for count in ours.values()), 0, at_least=False),
        "graphs after step 2": Goal(max(count.recompiles for count in ours.values()), 0, at_least=False),
    }


def reason_of(report: str) -> str:
    """The line of a traceback that names the exception; torch's compiler adds advice below it."""
    named = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Unsupported|Interrupt)\b.*", report, re.MULTILINE)
    return (named or report.strip().splitlines())[-1][:200]


def graphs_and_breaks(counted: dict[Cell, Counted]) -> dict[str, int]:
    """Of each contestant, over the cases and stages that all of them ran."""
    ran = [{cell[1:] for cell in counted if cell[0] == name} for name in CONTESTANTS]
    common = set.intersection(*ran)
    return {
        name: sum(
            count.graphs + count.breaks for cell, count in counted.items() if cell[0] == name and cell[1:] in common
        )
        for name in CONTESTANTS
    }


def compile_table(counted: dict[Cell, Counted], missing: dict[str, str]) -> str:
    rows = [
        [f"{case}, stage {stage}", name, str(parts(case, stage)), str(count.graphs), str(count.breaks),
         str(count.recompiles)]
        for (name, case, stage), count in counted.items()
    ]  # fmt: skip
    columns = ["training", "engine", "parts", "graphs", "breaks", "graphs after step 2"]
    reasons = [f"{name}: not measured: {reason}" for name, reason in missing.items()]
    return table("Graphs of torch.compile", columns, rows) + "".join(f"{line}\n" for line in [*reasons, ""] if reasons)


if __name__ == "__main__":
    main(compile_clean, "compile_clean", PACKAGES)
