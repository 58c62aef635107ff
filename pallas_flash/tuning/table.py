"""The measured configuration for a request, or the backend's default: a look-up, no search.

An entry serves the requests with its key, whose lengths are within a factor of about 1.4 of its
own. It changes speed, never results.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import typing
from typing import Any

import jax

from pallas_flash.backends.backend import Backend
from pallas_flash.masks import Causal
from pallas_flash.spec import AttentionSpec

DATA = pathlib.Path(__file__).parent / "data"
# Beyond it a kernel is in its steady state: one bucket for all longer sequences.
LONGEST_BUCKET = 14


@dataclasses.dataclass(frozen=True)
class Key:
    """What of a spec a configuration depends on.

    Fields:
      mask: "none", "causal" or "other".
      q_bucket, kv_bucket: rounded base-2 logarithms of the lengths, at most `LONGEST_BUCKET`.
    """

    head_dim: int
    value_dim: int
    dtype_bytes: int
    group: int
    mask: str
    q_bucket: int
    kv_bucket: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> "Key":
        kind = "none" if spec.mask is None else "causal" if type(spec.mask) is Causal else "other"
        buckets = (
            min(round(math.log2(length)), LONGEST_BUCKET) for length in (spec.q_len, spec.kv_len)
        )
        itemsize = spec.dtype.itemsize
        return cls(spec.head_dim, spec.value_dim, itemsize, spec.group, kind, *buckets)


class Entry(typing.NamedTuple):
    """A line of a data file. config: the parts of a backend's configuration that were measured."""

    backend: str
    key: Key
    config: dict[str, Any]


def device_name(device_kind: str) -> str:
    """A device's name in files and folders: "NVIDIA H100" -> "nvidia_h100"."""
    return "_".join(re.findall("[a-z0-9]+", device_kind.lower()))


def from_json(cls: type, fields: dict[str, Any]) -> Any:
    """A dataclass, and those within it, from the dictionary that ``dataclasses.asdict`` gives.

    Raises:
      TypeError, ValueError: if a field is unknown, missing or outside its range.
    """
    types = typing.get_type_hints(cls)
    return cls(
        **{
            name: from_json(types[name], x) if dataclasses.is_dataclass(types.get(name)) else x
            for name, x in fields.items()
        }
    )


def _parts(config_type: type, parts: dict[str, Any]) -> dict[str, Any]:
    types = typing.get_type_hints(config_type)
    return {name: from_json(types[name], part) for name, part in parts.items()}


def read(path: pathlib.Path, backends: dict[str, Backend]) -> list[Entry]:
    """The entries of a data file that are for one of these backends."""
    return [
        Entry(
            backend=entry["backend"],
            key=from_json(Key, entry["key"]),
            config=_parts(backends[entry["backend"]].config_type, entry["config"]),
        )
        for entry in json.loads(path.read_text())["entries"]
        if entry["backend"] in backends
    ]


def write(path: pathlib.Path, device: str, entry: dict[str, Any]) -> None:
    """Puts an entry into a data file, in place of one with its backend and key."""
    entries = json.loads(path.read_text())["entries"] if path.exists() else []
    same = [(e["backend"], e["key"]) == (entry["backend"], entry["key"]) for e in entries]
    entries = [e for e, old in zip(entries, same, strict=True) if not old]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "entries": [*entries, entry]}, indent=1) + "\n")


def measured(entries: list[Entry], key: Key) -> dict[str, Any]:
    """The measured parts of a configuration for requests with this key; none if there are none."""
    return next((entry.config for entry in entries if entry.key == key), {})


def config_for(backend: Backend, spec: AttentionSpec) -> Any:
    """The measured configuration for `spec` on this machine's GPU, or the backend's default."""
    default = backend.default_config(spec)
    parts = measured(_entries(backend, _device_kind()), Key.of(spec))
    config = dataclasses.replace(default, **parts) if parts else default
    # The request may have arrays that were not measured, which it has to fit as well.
    return default if parts and backend.misfit(spec, config) is not None else config


def _device_kind() -> str | None:
    if jax.default_backend() != "gpu":
        return None
    return jax.local_devices(backend="gpu")[0].device_kind


@functools.cache
def _entries(backend: Backend, device_kind: str | None) -> list[Entry]:
    path = DATA / f"{device_name(device_kind or '')}.json"
    return read(path, {backend.name: backend}) if path.exists() else []
