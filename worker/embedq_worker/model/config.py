"""How texts become vectors besides the encoder's weights, as the files of a model say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from embedq.errors import SettingsError
from embedq_worker.errors import ModelError
from embedq_worker.model.modules import POOLING_MODES, Module, ModulesFile
from embedq_worker.model.prompts import read_prompts
from embedq_worker.model.transformer_options import check_options, read_max_length

#: Pooling of a foreign model whose ONNX graph pools by itself.
POOLED_BY_MODEL: Final = "onnx"

#: Separates the modes of a concatenated pooling.
JOIN: Final = "+"

#: Short name of a mode -> mode.
_SHORT: Final = {"last": "lasttoken", "mean_sqrt_len": "mean_sqrt_len_tokens"}


@dataclass(frozen=True, slots=True)
class ModelChoices:
    """What a user decides about a model where its files leave it open.

    Attributes:
        pooling: pooling of a model whose files name none; empty if they do.
        max_length: maximum length of a text that replaces a longer one of the files; 0 for none.
        length_cap: maximum length where max_length is 0; 0 for none.
        prompt_set: name of a set of prompts that is added; empty for none.
        file: weights file inside the folder or hub repo; empty to choose by sources.find_weights.
    """

    pooling: str = ""
    max_length: int = 0
    length_cap: int = 0
    prompt_set: str = ""
    file: str = ""


#: Everything as the files say.
NO_CHOICES: Final = ModelChoices()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How texts become vectors, besides the encoder's weights.

    Attributes:
        pooling: a mode of POOLING_MODES, or several, joined by ``+``, whose vectors are
            concatenated; ``onnx`` for a foreign model that pools by itself.
        include_prompt: whether the tokens of a prompt are pooled.
        modules: the modules behind the pooling.
        max_length: maximum number of tokens of a text, special tokens included.
        longest: maximum number of tokens that the files allow.
        prompts: name of a prompt -> prefix of each text.
        default_prompt: name of the prompt if the caller chooses none; empty for no prompt.
    """

    pooling: str
    include_prompt: bool
    modules: tuple[Module, ...]
    max_length: int
    longest: int
    prompts: Mapping[str, str]
    default_prompt: str

    @property
    def pooling_modes(self) -> tuple[str, ...]:
        """Return the modes of the pooling."""
        return tuple(self.pooling.split(JOIN))

    @property
    def normalize(self) -> bool:
        """Return whether vectors have unit length."""
        return bool(self.modules) and self.modules[-1].kind == "Normalize"

    def summary(self) -> str:
        """Return pooling, length and prompts in one line."""
        default = f" (default {self.default_prompt})" if self.default_prompt else ""
        length = f"{self.max_length:,}"
        if self.max_length < self.longest:
            length += f" of {self.longest:,}"
        behind = "".join(f", then {module.kind}" for module in self.modules)
        return (
            f"pooling {self.pooling}{behind}, at most {length} tokens, "
            f"prompts {' '.join(self.prompts) or 'none'}{default}"
        )

    def describe(self) -> dict[str, Any]:
        """Return what shapes a vector, as JSON types."""
        return {
            "pooling": self.pooling,
            "include_prompt": self.include_prompt,
            "modules": [module.describe() for module in self.modules],
            "max_length": self.max_length,
            "prompts": dict(self.prompts),
            "default_prompt": self.default_prompt,
        }


def parse_pooling(value: str) -> tuple[str, ...]:
    """Parse the pooling that a user names: modes joined by ``+``; empty for none.

    Raises:
        SettingsError: a mode is unknown.
    """
    modes = tuple(_SHORT.get(mode, mode) for mode in value.split(JOIN)) if value else ()
    if set(modes) - set(POOLING_MODES):
        raise SettingsError(
            f"EMBEDQ_POOLING is {value}; expected one of {', '.join((*POOLING_MODES, *_SHORT))}, "
            f"or several, joined by {JOIN}."
        )
    return modes


def read_model_config(
    folder: Path,
    modules: ModulesFile,
    positions: int,
    choices: ModelChoices,
    *,
    pools_itself: bool = False,
) -> ModelConfig:
    """Read the files of sentence-transformers.

    Args:
        folder: the model.
        modules: what its modules.json says.
        positions: number of tokens that the encoder has positions for; 0 for no limit.
        choices: what the user decided.
        pools_itself: the weights are an ONNX graph that returns pooled vectors, to which only the
            normalization that the files ask for is added.

    Raises:
        ModelError: a file is damaged or requires something unsupported, nothing names the pooling,
            or it is named twice with different values.
    """
    check_options(modules.encoder)
    allowed = read_max_length(modules.encoder, positions)
    if choices.max_length > allowed:
        raise ModelError(
            f"EMBEDQ_MAX_LENGTH is {choices.max_length:,}, but {folder} supports texts of "
            f"{allowed:,} tokens at most. Set a smaller value, or unset it."
        )
    prompts, default_prompt = read_prompts(folder, choices.prompt_set)
    behind = modules.behind if modules.pooling_modes else (Module("Normalize"),)
    if pools_itself:
        _check_pooled(folder, modules, choices.pooling)
        modes: tuple[str, ...] = (POOLED_BY_MODEL,)
        behind = modules.behind[-1:] if modules.behind[-1:] == (Module("Normalize"),) else ()
    else:
        modes = _choose_pooling(folder, modules, parse_pooling(choices.pooling))
    return ModelConfig(
        pooling=JOIN.join(modes),
        include_prompt=modules.include_prompt,
        modules=behind,
        max_length=choices.max_length or min(allowed, choices.length_cap or allowed),
        longest=allowed,
        prompts=prompts,
        default_prompt=default_prompt,
    )


def _check_pooled(folder: Path, modules: ModulesFile, pooling: str) -> None:
    # The graph pools; what it cannot take into account is refused.
    if pooling:
        raise ModelError(
            f"EMBEDQ_POOLING is {pooling}, but the ONNX file in {folder} has pooled vectors only. "
            "Unset EMBEDQ_POOLING."
        )
    if not modules.include_prompt:
        raise ModelError(
            f"{folder} excludes prompts from pooling, but its ONNX file has pooled vectors only. "
            "Export the model with the output last_hidden_state."
        )


def _choose_pooling(
    folder: Path, modules: ModulesFile, pooling: tuple[str, ...]
) -> tuple[str, ...]:
    declared = modules.pooling_modes
    if not declared and not pooling:
        raise ModelError(
            f"No file in {folder} says how its token vectors are pooled (there is no "
            "modules.json), and a guess may give wrong vectors. Look it up on the model's page "
            "and set EMBEDQ_POOLING=mean, cls, last or another of its modes."
        )
    if declared and pooling and declared != pooling:
        raise ModelError(
            f"EMBEDQ_POOLING is {JOIN.join(pooling)}, but the files in {folder} say "
            f"{JOIN.join(declared)}. Unset EMBEDQ_POOLING."
        )
    return declared or pooling
