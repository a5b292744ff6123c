"""One file of the selection store: tensors and facts in safetensors, under a checksum.

A reader takes a file as it finds it, perhaps written by a process that was killed, on a disk that was full, or by
another program. So a file says what it is and for which digest, and a checksum over all of it tells that it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

FORMAT = 2
"""Changes with the meaning of what is stored; part of every digest, so that no file of another format is read."""
NAME = "vllm_wsi"

Kind = Literal["selection", "scores"]


def to_bytes(kind: Kind, digest: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file.

    Args:
        digest: under which it is stored.
        facts: JSON values.
    """
    plain = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    header, body = _split(plain)
    said = json.dumps({"kind": kind, "digest": digest, "format": FORMAT, "facts": facts})
    header["__metadata__"] = {NAME: said, "checksum": _checksum(header, said, body)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def from_bytes(data: bytes, kind: Kind, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a file that `to_bytes` made for this kind and digest.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError: it is another file, or a
            damaged one.
    """
    header, body = _split(data)
    metadata = header.pop("__metadata__")
    said = json.loads(metadata[NAME])
    if (found := (said["kind"], said["digest"], said["format"])) != (kind, digest, FORMAT):
        raise ValueError(f"found {found}, wanted {(kind, digest, FORMAT)}")
    if metadata["checksum"] != _checksum(header, metadata[NAME], body):
        raise ValueError("its checksum does not fit")
    return safetensors.torch.load(data), said["facts"]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _checksum(header: Mapping[str, Any], said: str, body: bytes) -> str:
    tensors = json.dumps(header, sort_keys=True)
    return hashlib.blake2b(b"\0".join((tensors.encode(), said.encode(), body)), digest_size=20).hexdigest()
