"""What a call asks for: settings, the card and its options make a specification, that a queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from embedq.card import ModelCard
from embedq.contract import Accuracy, Dtype, OnLong, Queue, VectorSpec
from embedq.errors import SettingsError
from embedq.hints import nearest
from embedq.settings import ProducerSettings

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
