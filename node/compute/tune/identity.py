"""What a tuning job's result depends on, as one digest: the name of its checkpoint."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict

import peft
import torch
import transformers

from mesh.messages import TuneSpec

__all__ = ["spec_digest"]

# Raise it when the same task would give other bits than before: order, starting values, arithmetic.
_ARITHMETIC = 1
# They say where the records come from, not what they are.
_NOT_PART = ("holders", "data", "data_sha256", "eval_data", "eval_sha256")


def spec_digest(spec: TuneSpec, data_sha256: str, eval_sha256: str, backbone_digest: str) -> str:
    """32 hexadecimal digits. Records count by content, whether they came inline or as a file."""
    fields = {name: value for name, value in asdict(spec).items() if name not in _NOT_PART}
    if spec.nodes == 1:  # adapters and checkpoints of before there were more have the same name still
        del fields["nodes"], fields["part"]
    whole = {
        "spec": fields,
        "data": data_sha256,
        "eval": eval_sha256,
        "backbone": backbone_digest,
        "numerics": [
            _ARITHMETIC,
            platform.machine(),
            torch.__version__,
            transformers.__version__,
            peft.__version__,
        ],
    }
    canonical = json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()
