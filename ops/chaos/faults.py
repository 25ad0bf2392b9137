"""Inject faults into a chaos run, one function per kind; each returns whether it hit a target."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ops.chaos.fleet import Fleet, Worker
from ops.chaos.producers import Producer
from ops.chaos.servers import RedisServer
from ops.chaos.watch import Watch
from redis.exceptions import RedisError

from embedq.protocol.contract import Queue

#: Seconds for which a Redis refuses writes.
FULL_S: Final = 2.0
#: Minimum and maximum seconds before a killed Redis is restarted.
DOWN_S: Final = (0.1, 1.5)
#: Minimum and maximum seconds for which a worker is stopped before it is killed.
STOPPED_S: Final = (0.3, 1.5)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a fault may be injected into."""

    fleet: Fleet
    producers: list[Producer]
    watch: Watch
    rng: random.Random


def kill_pool_process(targets: Targets) -> bool:
    """Send SIGKILL to the pool process of a worker."""
    worker = targets.fleet.serving(targets.rng)
    if worker is None:
        return False
    targets.watch.note_kill(worker.name, "pool process")
    with suppress(ProcessLookupError):
        os.kill(worker.pool_pid() or 2**22, signal.SIGKILL)
    return True


def kill_worker(targets: Targets) -> bool:
    """Send SIGKILL to the main process of a worker alone, or to the whole worker."""
    worker = targets.fleet.serving(targets.rng)
    if worker is None:
        return False
    targets.watch.note_kill(worker.name, "worker")
    worker.signal(signal.SIGKILL, whole=targets.rng.random() < 0.5)
    return True


def terminate_worker(targets: Targets) -> bool:
    """Send SIGTERM to a worker, which finishes its batch."""
    worker = targets.fleet.serving(targets.rng)
    if worker is None:
        return False
    worker.signal(signal.SIGTERM)
    return True


def swallow_message(targets: Targets) -> bool:
    """Stop a worker while Redis pops a message into its socket, then kill it."""
    worker = targets.fleet.serving(targets.rng)
    if worker is None:
        return False
    worker.signal(signal.SIGSTOP)
    targets.fleet.schedule.after(
        targets.rng.uniform(*STOPPED_S), lambda: _kill_stopped(targets, worker)
    )
    return True


def _kill_stopped(targets: Targets, worker: Worker) -> None:
    targets.watch.note_kill(worker.name, "worker")
    worker.signal(signal.SIGKILL, whole=True)


def kill_broker(targets: Targets) -> bool:
    """Send SIGKILL to the broker and restart it."""
    return _kill_redis(targets, targets.fleet.broker)


def kill_results(targets: Targets) -> bool:
    """Send SIGKILL to the results Redis and restart it."""
    return _kill_redis(targets, targets.fleet.results)


def _kill_redis(targets: Targets, server: RedisServer) -> bool:
    if not server.is_up():
        return False
    server.kill()
    targets.watch.note_redis_kill()
    targets.fleet.schedule.after(targets.rng.uniform(*DOWN_S), server.start)
    return True


def kill_clients(targets: Targets) -> bool:
    """Close every connection of one Redis with CLIENT KILL."""
    server = targets.rng.choice(targets.fleet.servers)
    with suppress(RedisError):
        for kind in ("normal", "pubsub"):
            server.client.client_kill_filter(_type=kind, skipme=True)
        return True
    return False


def lose_message(targets: Targets) -> bool:
    """Lose a queued message."""
    with suppress(RedisError):
        return any(targets.fleet.broker.client.rpop(str(queue)) for queue in Queue)
    return False


def fill_broker(targets: Targets) -> bool:
    """Let the broker be out of memory for a while."""
    return _fill(targets, targets.fleet.broker)


def fill_results(targets: Targets) -> bool:
    """Let the results Redis be out of memory for a while."""
    return _fill(targets, targets.fleet.results)


def _fill(targets: Targets, server: RedisServer) -> bool:
    if not server.fill():
        return False
    targets.fleet.schedule.after(FULL_S, server.empty)
    return True


def flush_results(targets: Targets) -> bool:
    """Delete every key of the results Redis."""
    with suppress(RedisError):
        return bool(targets.fleet.results.client.flushall())
    return False


def kill_producer(targets: Targets) -> bool:
    """Send SIGKILL to a producer; the same command is started again later."""
    return targets.rng.choice(targets.producers).kill()


#: Fault -> relative frequency.
WEIGHTS: Final[dict[Callable[[Targets], bool], float]] = {
    kill_pool_process: 8,
    kill_worker: 2.5,
    terminate_worker: 1.5,
    swallow_message: 1.5,
    kill_broker: 1,
    kill_results: 1,
    kill_clients: 3,
    lose_message: 1.5,
    fill_broker: 0.5,
    fill_results: 0.5,
    flush_results: 0.15,
    kill_producer: 1,
}


def inject(targets: Targets) -> str | None:
    """Inject one random fault, and return its name if it hit a target."""
    [fault] = targets.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return fault.__name__ if fault(targets) else None
