"""Which quantised model a job of class int8 asks for: the one that the fleet serves."""

from __future__ import annotations

import time
from collections.abc import Sequence

from embedq.card import ModelCard
from embedq.errors import NotQuantised
from embedq.fleet import Heartbeat


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
