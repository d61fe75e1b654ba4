"""Turns a GGUF file or a hub model into the directory ``node.compute.backbone`` loads. Done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mesh.errors import ConfigError, UnreachableError
from node.compute.models import Progress, Source

__all__ = ["convert"]


def convert(source: Source, gguf: Path | None, into: Path, progress: Progress) -> None:
    """Write weights (one safetensors file), config, tokenizer and chat template of ``source`` to ``into``.

    A GGUF's weights are stored as float32, its quantization undone; a hub model keeps its own type.

    Raises:
        ConfigError: ``transformers`` cannot read this model.
        UnreachableError: The hub does not answer.
    """
    transformers_logging.disable_progress_bar()
    progress(f"converting {source.display}", 0.0)
    try:
        model, tokenizer = _from_gguf(gguf) if gguf is not None else _from_hub(source.name)
    except OSError as error:  # what transformers raises for an absent hub as well as for an absent model
        if gguf is None:
            raise UnreachableError(
                f"could not get {source.name!r} from the hub ({_first_line(error)}). Check the name and "
                "the network, or give --model a directory or .gguf file that is on this machine"
            ) from error
        raise ConfigError(f"{gguf.name} is not readable: {_first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"transformers cannot read {source.display}: {_first_line(error)}") from error
    progress(f"converting {source.display}", 0.7)
    model.save_pretrained(into, max_shard_size="100GB")  # one file: mapped and checked as one
    tokenizer.save_pretrained(into)
    progress(f"converting {source.display}", 1.0)


def _from_gguf(gguf: Path) -> tuple[Any, Any]:
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # A model read from GGUF refuses to be saved, because its config says it is quantized. Its weights
    # are plain by now: the same weights in a model built from the plain config may be saved.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    return plain, tokenizer


def _from_hub(name: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
