"""Entry point of `embedq-worker` and `python -m embedq_worker`.

Imports nothing heavy at the top: the supervisor runs in this process.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run a command, `start` under a supervisor."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["health"]:
        from embedq_worker.main_process import liveness  # neither click nor pydantic

        sys.exit(liveness.main(arguments[1:]))
    asks_for_help = {"-h", "--help"} & set(arguments)
    if arguments[:1] != ["start"] or asks_for_help or os.name == "nt":
        _run(arguments)  # never returns
    # Here, because this module needs signals that Windows lacks.
    from embedq_worker.main_process.supervisor import SupervisedProcess, supervise

    def run(more: list[str]) -> None:
        _run([*arguments, *more])

    if "--all" in arguments:
        workers = [SupervisedProcess(run, ("--part", part)) for part in ("npu", "cpu")]
    else:
        workers = [SupervisedProcess(run)]
    sys.exit(supervise(workers))


def _run(arguments: list[str]) -> None:
    from embedq_worker.cli.main import run  # pydantic and click are not for the supervisor

    run(arguments)


if __name__ == "__main__":
    main()
