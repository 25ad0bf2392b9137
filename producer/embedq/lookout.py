"""The lookout of a client: which nodes live, on which devices, and what model they serve."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from redis import Redis
from redis.exceptions import RedisError

from embedq.card import ModelCard
from embedq.errors import NoNode
from embedq.fleet import fetch_alive, find_card
from embedq.patience import WAYS_OUT, OnWait, patiently
from embedq.quantised import QuantisedWatch
from embedq.settings import ProducerSettings, mask_password

T = TypeVar("T")

#: Seconds between two looks at the fleet while no node is there.
LOOK_EVERY_S = 0.1
#: Seconds between two counts of the living nodes.
NODES_EVERY_S = 3.0


class Lookout:
    """Looks at the fleet from the producer's side, and waits for a first node."""

    def __init__(
        self,
        settings: ProducerSettings,
        *,
        redis: Redis,
        broker: Redis,
        on_wait: OnWait,
        on_idle: Callable[[], None],
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            settings: of the client.
            redis: of the results, where nodes tell that they live.
            broker: of the queues.
            on_wait, on_idle: as in Client.
        """
        self._settings = settings
        self._redis = redis
        self._broker = broker
        self._on_wait = on_wait
        self._on_idle = on_idle
        self._card: ModelCard | None = None
        self._devices: Counter[str] = Counter()
        self._counted = -NODES_EVERY_S

    def card(self) -> ModelCard:
        """Return the card of the model that the fleet serves, waiting for Redis and a first node.

        Raises:
            QueueUnavailable: Redis could not be reached for `node_wait_s`, or refuses us.
            NoNode: no node announced the model within `node_wait_s`.
        """
        if self._card is None:
            self._card = self._find_card(time.monotonic() + self._settings.node_wait_s)
        return self._card

    def quantised(self, card: ModelCard) -> str:
        """Return the quantised model that the fleet serves, waiting for a first node with one.

        Raises:
            NotQuantised: no node has a quantised model, or they have several.
            QueueUnavailable: Redis cannot be reached.
        """
        watch = QuantisedWatch(card, self._settings.node_wait_s)
        while True:
            name = watch.look(
                patiently(
                    lambda: fetch_alive(self._redis),
                    patience_s=0,
                    on_wait=self._on_wait,
                    where=mask_password(self._settings.results_url),
                )
            )
            if name:
                return name
            self._on_idle()
            time.sleep(LOOK_EVERY_S)

    def count_living(self) -> Counter[str]:
        """Count the living nodes by device; asks Redis every few seconds at most."""
        if time.monotonic() - self._counted > NODES_EVERY_S:
            self._counted = time.monotonic()
            with suppress(RedisError):  # the last count serves as well
                self._devices = Counter(h.device for h in fetch_alive(self._redis) if h.device)
        return self._devices

    def engine(self) -> dict[str, str]:
        """Return device, engine and precision of the first node by name that serves the model."""
        identity = self.card().identity
        for heartbeat in fetch_alive(self._redis):
            if heartbeat.card and heartbeat.card.identity == identity:
                return {key: getattr(heartbeat, key) for key in ("device", "engine", "precision")}
        return {}

    def _find_card(self, deadline: float) -> ModelCard:
        settings = self._settings
        # First the broker: what is there already decides nothing without it.
        self._reach(self._broker.ping, settings.broker_url, deadline)
        told = False
        while True:
            alive = self._reach(lambda: fetch_alive(self._redis), settings.results_url, deadline)
            card = find_card(alive, settings.model)
            if card is not None:
                return card
            if time.monotonic() >= deadline:
                serving = sorted({h.card.label for h in alive if h.card})
                raise NoNode(
                    f"No node announced the model {settings.model} within "
                    f"{settings.node_wait_s:.0f} s; {len(alive)} alive, serving "
                    f"{', '.join(serving) or 'nothing'}. Start one: embedq-worker start"
                )
            if not told and deadline - time.monotonic() < settings.node_wait_s - 3:
                self._on_wait(f"No node serves {settings.model} yet; waiting for one.")
                told = True
            time.sleep(LOOK_EVERY_S)

    def _reach(self, action: Callable[[], T], url: str, deadline: float) -> T:
        """Ask a Redis something before there is a job, waiting for it as for a first node."""

        def ask() -> T:
            self._on_idle()
            return action()

        wait_s = self._settings.node_wait_s
        return patiently(
            ask,
            patience_s=max(0.0, deadline - time.monotonic()),
            on_wait=self._on_wait,
            where=mask_password(url),
            advice=f" {WAYS_OUT}. EMBEDQ_NODE_WAIT_S ends this after {wait_s:.0f} s, Ctrl-C now.",
        )
