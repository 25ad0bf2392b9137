"""The faults, one function each; every function tells what it hit, or None if it found nothing."""

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

#: Seconds for which a Redis is full.
FULL_S: Final = 2.0
#: Seconds for which a killed Redis is away.
AWAY_S: Final = (0.1, 1.5)
#: Seconds for which a worker stands still before it is killed, so that Redis pops into its socket.
STANDING_S: Final = (0.3, 1.5)


@dataclass(frozen=True, slots=True)
class World:
    """What a fault may hit."""

    fleet: Fleet
    producers: list[Producer]
    watch: Watch
    rng: random.Random


def kill_child(world: World) -> bool:
    """Kill -9 the child of a worker; its parent lives."""
    worker = world.fleet.serving(world.rng)
    if worker is None:
        return False
    world.watch.dies(worker.name, "child")
    with suppress(ProcessLookupError):
        os.kill(worker.child_pid() or 2**22, signal.SIGKILL)
    return True


def kill_worker(world: World) -> bool:
    """Kill -9 a worker: the parent alone, which must take its child along, or both at once."""
    worker = world.fleet.serving(world.rng)
    if worker is None:
        return False
    world.watch.dies(worker.name, "worker")
    worker.signal(signal.SIGKILL, whole=world.rng.random() < 0.5)
    return True


def terminate_worker(world: World) -> bool:
    """SIGTERM a worker; it finishes what it has in hand."""
    worker = world.fleet.serving(world.rng)
    if worker is None:
        return False
    worker.signal(signal.SIGTERM)
    return True


def swallow_message(world: World) -> bool:
    """Stop a worker so that Redis pops a message into its socket, then kill it: nobody has it."""
    worker = world.fleet.serving(world.rng)
    if worker is None:
        return False
    worker.signal(signal.SIGSTOP)
    world.fleet.agenda.after(world.rng.uniform(*STANDING_S), lambda: _kill_stopped(world, worker))
    return True


def _kill_stopped(world: World, worker: Worker) -> None:
    world.watch.dies(worker.name, "worker")
    worker.signal(signal.SIGKILL, whole=True)


def kill_broker(world: World) -> bool:
    """Kill -9 the Redis of the queues and start it again."""
    return _kill_redis(world, world.fleet.broker)


def kill_results(world: World) -> bool:
    """Kill -9 the Redis of the results and start it again."""
    return _kill_redis(world, world.fleet.results)


def _kill_redis(world: World, server: RedisServer) -> bool:
    if not server.is_up():
        return False
    server.kill()
    world.watch.redis_dies()
    world.fleet.agenda.after(world.rng.uniform(*AWAY_S), server.start)
    return True


def kill_clients(world: World) -> bool:
    """CLIENT KILL every connection of one Redis."""
    server = world.rng.choice(world.fleet.servers)
    with suppress(RedisError):
        for kind in ("normal", "pubsub"):
            server.client.client_kill_filter(_type=kind, skipme=True)
        return True
    return False


def lose_message(world: World) -> bool:
    """RPOP a queued message: nobody has it."""
    with suppress(RedisError):
        return any(world.fleet.broker.client.rpop(str(queue)) for queue in Queue)
    return False


def fill_broker(world: World) -> bool:
    """Let the Redis of the queues be out of memory for a while."""
    return _fill(world, world.fleet.broker)


def fill_results(world: World) -> bool:
    """Let the Redis of the results be out of memory for a while."""
    return _fill(world, world.fleet.results)


def _fill(world: World, server: RedisServer) -> bool:
    if not server.fill():
        return False
    world.fleet.agenda.after(FULL_S, server.empty)
    return True


def flush_results(world: World) -> bool:
    """FLUSHALL the results."""
    with suppress(RedisError):
        return bool(world.fleet.results.client.flushall())
    return False


def kill_producer(world: World) -> bool:
    """Kill -9 a producer; the same command goes on a little later."""
    return world.rng.choice(world.producers).kill()


#: Fault -> how often it comes, relative to the others.
WEIGHTS: Final[dict[Callable[[World], bool], float]] = {
    kill_child: 8,
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


def inject(world: World) -> str | None:
    """Inject one fault, and return its name if it hit something."""
    [fault] = world.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return fault.__name__ if fault(world) else None
