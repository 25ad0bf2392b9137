"""Find the model, the workers and the queue for a call.

A strict job takes vectors from an NPU or none: it waits while one may come, then gives up.

Which quantised model a job of class int8 asks for: the one that the fleet serves.

What a call asks for: settings, the card and its options make a specification, that a queue.

The lookout of a client: which nodes live, on which devices, and what model they serve.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from redis import Redis
from redis.exceptions import RedisError

from embedq.errors import NoNode, NotQuantised, SettingsError, StrictUnavailable, nearest
from embedq.protocol.contract import Accuracy, Device, Dtype, OnLong, Queue, VectorSpec
from embedq.protocol.worker import Heartbeat, ModelCard
from embedq.settings import ProducerSettings, mask_password
from embedq.store.connection import WAYS_OUT, OnWait, patiently
from embedq.store.fleet import fetch_alive, find_card

#: States of an NPU's node that serve, or may serve soon.
_COMING = ("healthy", "starting", "probing")


def may_serve_strict(node: Heartbeat) -> bool:
    """Tell whether a node computes on an NPU, or is on the way to it."""
    if node.home != Device.NPU:
        # A node that has just begun does not know its device yet.
        return not node.home and node.state == "starting"
    return node.may_return or (node.state in _COMING and node.device != Device.CPU)


class StrictWatch:
    """Gives a job up once no NPU has been there, or on its way, for long enough."""

    def __init__(self, fetch: Callable[[], Sequence[Heartbeat]], wait_s: float) -> None:
        """Watch the fleet for one job.

        Args:
            fetch: returns the living nodes.
            wait_s: how long to go without an NPU.
        """
        self._fetch = fetch
        self._wait_s = wait_s
        self._seen: float | None = None

    def look(self) -> None:
        """Look once.

        Raises:
            StrictUnavailable: there was no NPU for too long; the message says what there was.
        """
        now = time.monotonic()
        try:
            alive = self._fetch()
        except RedisError:  # whoever waits for vectors waits for Redis too, and says so
            self._seen = None
            return
        if self._seen is None or any(map(may_serve_strict, alive)):
            self._seen = now
        elif now - self._seen >= self._wait_s:
            raise StrictUnavailable(
                f"No node with an NPU was there for {self._wait_s:.0f} s (EMBEDQ_NODE_WAIT_S). "
                f"{_why(alive)} Start one with --device npu, or run the job without strict."
            )


def _why(alive: Sequence[Heartbeat]) -> str:
    lost = [node for node in alive if node.home == Device.NPU]
    if lost:
        return " ".join(f"Node {node.node} is {node.state}: {node.reason}" for node in lost)
    return f"{len(alive)} alive, none with an NPU." if alive else "No node is alive."


class QuantisedWatch:
    """Looks for nodes with a quantised model, and gives up after a while."""

    def __init__(self, card: ModelCard, wait_s: float) -> None:
        """Begin to wait.

        Args:
            card: of the model.
            wait_s: how long to wait while a node may still come.
        """
        self._card = card
        self._wait_s = wait_s
        self._deadline = time.monotonic() + wait_s

    def look(self, alive: Sequence[Heartbeat]) -> str:
        """Return the name of the quantised model, or nothing as long as there is hope.

        Raises:
            NotQuantised: every living node has settled and none has one, or they have several.
        """
        cards = [node.card for node in alive if node.card]
        names = {c.quantised for c in cards if c.identity == self._card.identity and c.quantised}
        if len(names) > 1:
            raise NotQuantised(
                f"The nodes have different quantised models of {self._card.label}: "
                f"{', '.join(sorted(names))}. Their vectors must not mix: quantise once, copy the "
                "cache to every node, and start them again."
            )
        if names:
            return names.pop()
        coming = not alive or any(node.state == "starting" for node in alive)
        if coming and time.monotonic() < self._deadline:
            return ""
        raise NotQuantised(
            f"No node has a quantised model of {self._card.label} ({len(alive)} alive). Run on a "
            "node with a CPU: embedq-worker quantize FILE, and start it again; or ask for "
            "accuracy standard."
        )


E = TypeVar("E", OnLong, Accuracy)


def build_spec(
    settings: ProducerSettings,
    card: ModelCard,
    *,
    prompt_name: str | None,
    prompt: str | None,
    on_long: OnLong | str | None,
    accuracy: Accuracy | str | None,
    quantised: Callable[[ModelCard], str],
) -> VectorSpec:
    """Say what will shape the vectors of a call with these options.

    Args:
        settings: stand in for options that are None.
        card: of the model.
        prompt_name, prompt, on_long, accuracy: as in Client.encode.
        quantised: finds the name of the quantised model; called for class int8 alone.

    Raises:
        SettingsError: an unknown prompt name, policy or accuracy class.
    """
    chosen = _choose(Accuracy, "accuracy", accuracy, settings.accuracy)
    if settings.dtype is Dtype.FLOAT16 and not card.normalized:
        raise SettingsError(
            f"dtype=float16: vectors of {card.label} are not of unit length, so they may be "
            "too long for it. Use float32."
        )
    return VectorSpec(
        model=card.identity,
        dim=card.dim,
        max_length=card.max_length,
        prompt=_prompt(card, prompt_name, prompt),
        on_long=_choose(OnLong, "on_long", on_long, settings.on_long),
        accuracy=chosen,
        dtype=settings.dtype,
        quantised=quantised(card) if chosen is Accuracy.INT8 else "",
    )


def choose_queue(spec: VectorSpec, *, strict: bool) -> Queue:
    """Return the queue of a job.

    Raises:
        SettingsError: strict and exact or int8, which no device can be at once.
    """
    # Only the CPU computes in fp32 and, here, in int8: such a job never visits the NPU queue. The
    # queue of int8 is read by nodes with a quantised model alone, so no batch meets another.
    if spec.accuracy is Accuracy.STANDARD:
        return Queue.NPU_STRICT if strict else Queue.NPU
    if strict:
        raise SettingsError(
            f"strict and accuracy={spec.accuracy} exclude each other: only the CPU computes so, "
            "and a strict job takes vectors from an NPU alone. Drop one of the two."
        )
    return Queue.CPU if spec.accuracy is Accuracy.EXACT else Queue.CPU_INT8


def _prompt(card: ModelCard, name: str | None, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if name is None:
        return card.prompts.get(card.default_prompt, "") if card.default_prompt else ""
    if name not in card.prompts:
        known = ", ".join(sorted(card.prompts)) or "none"
        raise SettingsError(
            f"prompt_name: {card.label} has no prompt {name}; it has {known}."
            f"{nearest(name, list(card.prompts))}"
        )
    return card.prompts[name]


def _choose(kind: type[E], name: str, given: str | None, default: E) -> E:
    if given is None:
        return default
    try:
        return kind(given)
    except ValueError:
        choices = [str(choice) for choice in kind]
        raise SettingsError(
            f"{name}: expected {' or '.join(choices)}, got {given}.{nearest(given, choices)}"
        ) from None


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
