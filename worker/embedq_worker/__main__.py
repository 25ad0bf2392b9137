"""`embedq-worker`, also `python -m embedq_worker`. Imports nothing heavy: see supervisor.py."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run a command; `start` runs under a supervisor."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["health"]:
        from embedq_worker.main_process.liveness import main as check  # neither click nor pydantic

        sys.exit(check(arguments[1:]))
    asks_for_help = {"-h", "--help"} & set(arguments)
    if arguments[:1] != ["start"] or asks_for_help or os.name == "nt":
        _run(arguments)  # never returns
    from embedq_worker.main_process.supervisor import (
        SupervisedProcess,
        supervise,  # wants signals that Windows lacks
    )

    def run(more: list[str]) -> None:
        _run([*arguments, *more])

    parts = ("npu", "cpu") if "--all" in arguments else ()
    sys.exit(
        supervise(
            [SupervisedProcess(run, ("--part", part)) for part in parts] or [SupervisedProcess(run)]
        )
    )


def _run(arguments: list[str]) -> None:
    from embedq_worker.cli.main import run  # pydantic, click: not in the supervisor

    run(arguments)


if __name__ == "__main__":
    main()
