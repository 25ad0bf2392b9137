"""Heartbeats: who is alive, and who serves the model that was asked for."""

from __future__ import annotations

import time
from dataclasses import asdict, replace

import msgpack
import pytest
from redis import Redis

from embedq.errors import MalformedMessage, NoNode
from embedq.protocol.worker import Heartbeat, ModelCard
from embedq.store.fleet import NODES_KEY, beat, fetch_alive, find_card, leave

CARD = ModelCard("org/model@abc123", "ab" * 32, 384, 256)
NODE = Heartbeat("node", "healthy", at=time.time(), since=time.time(), pid=1, card=CARD)


def test_heartbeat_survives_the_wire_and_newer_fields() -> None:
    """A heartbeat comes back, also from a version that knows more."""
    newer = msgpack.packb({**msgpack.unpackb(NODE.to_message()), "mood": "good"})

    assert Heartbeat.from_message(NODE.to_message()) == NODE
    assert Heartbeat.from_message(newer) == NODE
    assert Heartbeat.from_message(replace(NODE, card=None).to_message()).card is None


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x01", msgpack.packb({"node": "x"})])
def test_garbage_is_no_heartbeat(raw: bytes) -> None:
    """What cannot be read is refused by its size."""
    with pytest.raises(MalformedMessage):
        Heartbeat.from_message(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"node": 5},
        {"state": ["healthy"]},
        {"device": b"cpu"},
        {"since": "yesterday"},
        {"since": float("nan")},
        {"at": float("inf")},
        {"totals": [1]},
        {"totals": {"batches": "many"}},
        {"card": {**asdict(CARD), "label": 5}},
        {"card": {**asdict(CARD), "dim": 10**12}},
        {"card": {**asdict(CARD), "dim": -1}},
        {"card": {**asdict(CARD), "prompts": {"query": 5}}},
    ],
    ids=repr,
)
def test_heartbeat_with_a_field_of_another_type_is_none(change: dict[str, object]) -> None:
    """Whoever shows, sorts or counts heartbeats need not ask what is in them."""
    with pytest.raises(MalformedMessage):
        Heartbeat.from_message(msgpack.packb({**asdict(NODE), **change}))


def test_words_of_a_node_move_no_cursor_and_end_no_line() -> None:
    """What a node says of itself is shown on terminals and in logs, whoever wrote it."""
    words = "\x1b]0;owned\x07 one\r\nfake=line" + "x" * 9_999

    reason = Heartbeat.from_message(replace(NODE, reason=words).to_message()).reason

    assert reason.startswith(" ]0;owned  one fake=line")
    assert len(reason) <= 2_000


def test_card_of_a_newer_node_is_read() -> None:
    """A newer node whose card knows more is alive for an older producer."""
    newer = msgpack.packb({**asdict(NODE), "card": {**asdict(CARD), "mood": "good"}})

    assert Heartbeat.from_message(newer) == NODE


def test_name_that_is_no_text_hides_no_node(results: Redis) -> None:
    """Anything may stand in the set of names."""
    results.zadd(NODES_KEY, {b"\xff\xfe": time.time()})
    beat(results, NODE)

    assert [heartbeat.node for heartbeat in fetch_alive(results)] == ["node"]


def test_alive_is_who_beat_lately(results: Redis) -> None:
    """Nodes are listed by name while their heartbeat lasts; it fades by itself."""
    for name in ("b", "a", "c"):
        beat(results, replace(NODE, node=name))
    leave(results, "c")

    alive = fetch_alive(results)

    assert [heartbeat.node for heartbeat in alive] == ["a", "b"]
    assert 0 < results.ttl("embedq:node:a") <= 15


def test_faded_and_unreadable_nodes_are_left_out(results: Redis) -> None:
    """A node whose heartbeat ran out, or is of another version, hides no other."""
    for name in ("faded", "strange", "good"):
        beat(results, replace(NODE, node=name))
    results.delete("embedq:node:faded")
    results.set("embedq:node:strange", b"\xc1")

    assert [heartbeat.node for heartbeat in fetch_alive(results)] == ["good"]


def test_silent_nodes_are_forgotten(results: Redis) -> None:
    """A name that was silent for a day leaves the list with the next heartbeat of any node."""
    results.zadd(NODES_KEY, {"old": time.time() - 100_000})

    beat(results, NODE)

    assert results.zrange(NODES_KEY, 0, -1) == [b"node"]


@pytest.mark.parametrize("asked", ["org/model", "org/model@abc123", "ab" * 6, "ab" * 32])
def test_model_is_found_by_label_or_identity(asked: str) -> None:
    """A label with or without revision, or twelve characters of the identity, name a model."""
    assert find_card([replace(NODE, card=None), NODE], asked) == CARD


@pytest.mark.parametrize("asked", ["org", "model", "abab", "org/model@other", ""])
def test_other_names_find_nothing(asked: str) -> None:
    """Half a name is no name."""
    assert find_card([NODE], asked) is None


def test_two_versions_of_a_model_are_not_chosen_between() -> None:
    """Nodes that serve one label under two identities are an error that names both."""
    other = replace(NODE, node="other", card=replace(CARD, identity="cd" * 32))

    with pytest.raises(NoNode, match=r"abababababab, cdcdcdcdcdcd.*EMBEDQ_MODEL=<identity>"):
        find_card([NODE, other], "org/model")
