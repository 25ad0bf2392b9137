"""A job of class int8 asks for the one quantised model that the fleet has."""

from __future__ import annotations

import pytest

from embedq import Client
from embedq.discovery import QuantisedWatch
from embedq.errors import NotQuantised, SettingsError
from embedq.protocol.contract import Accuracy, VectorSpec
from embedq.protocol.worker import Heartbeat, ModelCard
from embedq.testing import stub_vectors

CARD = ModelCard("m", "ab" * 32, 8, 16)


def node(name: str, quantised: str = "", state: str = "healthy") -> Heartbeat:
    """Return what a node says of itself."""
    card = ModelCard("m", "ab" * 32, 8, 16, quantised=quantised)
    return Heartbeat(name, state, at=0, since=0, pid=1, card=card)


def test_nodes_with_a_copy_are_found_among_others() -> None:
    """Nodes without one do not matter: they never read the queue of int8."""
    watch = QuantisedWatch(CARD, wait_s=0)

    assert watch.look([node("a"), node("b", "copy"), node("c", "copy")]) == "copy"


def test_two_copies_never_mix() -> None:
    """Their vectors differ, so the job is refused with the names of both."""
    with pytest.raises(NotQuantised, match="copy, other"):
        QuantisedWatch(CARD, wait_s=60).look([node("a", "other"), node("b", "copy")])


def test_settled_fleet_without_a_copy_is_told_at_once() -> None:
    """Waiting would change nothing; the message says what to run."""
    with pytest.raises(NotQuantised, match="embedq-worker quantize FILE"):
        QuantisedWatch(CARD, wait_s=60).look([node("a")])


def test_node_that_starts_is_waited_for() -> None:
    """It may have a copy, and time is limited."""
    coming = [node("a"), node("b", state="starting")]

    assert QuantisedWatch(CARD, wait_s=60).look(coming) == ""
    with pytest.raises(NotQuantised):
        QuantisedWatch(CARD, wait_s=0).look(coming)


def test_copy_is_part_of_the_fingerprint() -> None:
    """Vectors of one copy are not taken for those of another."""
    spec = VectorSpec("ab" * 32, 8, 16, accuracy=Accuracy.INT8, quantised="copy")

    assert spec.fingerprint() != spec._replace(quantised="other").fingerprint()


def test_int8_job_travels_on_its_own_queue(client: Client) -> None:
    """The stub announces a copy, so its node reads that queue too."""
    vectors = client.encode(["a text"], accuracy="int8")

    assert (vectors == stub_vectors(["a text"])).all()
    assert client.spec(accuracy="int8").quantised == "stub"


def test_strict_and_int8_exclude_each_other(client: Client) -> None:
    """Only the CPU computes in int8 here."""
    with pytest.raises(SettingsError, match="strict and accuracy=int8 exclude each other"):
        client.encode(["a"], strict=True, accuracy="int8")
