"""The source of an export, in a process of its own: `python -m pipeline.exporting.original RUN_DIR THREADS`.

It answers what `alone` answers, so both are asked in the same words and measured in turn.
"""

import json
import sys
from pathlib import Path

from pipeline.exporting.alone import Forward, of_module, serve


def opened_source(plan: dict, threads: int) -> Forward:
    from pipeline.registry.locate import source_from_dict
    from pipeline.registry.weights import load_model

    return of_module(load_model(source_from_dict(plan["source"])), threads)


if __name__ == "__main__":
    run, count = sys.argv[1:]
    serve(lambda: opened_source(json.loads((Path(run) / "plan.json").read_text()), int(count)))
