"""Measured configurations: the look-up, the files, and the search without a GPU."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

import pallas_flash as pf
from pallas_flash import dispatch
from pallas_flash.backends import hopper, reference
from pallas_flash.backends.hopper.storage import SHARED_MEMORY_LIMIT
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.tuning import autotune, table, timing

MASKS = {"none": None, "causal": pf.Causal(), "other": pf.SlidingWindow(100, 0)}


def described(key=None, q_len=4096, kv_len=4096, mask="causal", head_dim=128, dtype=jnp.bfloat16):
    """Shapes of operands: with a key's features, or the given ones."""
    value_dim, group = head_dim, 2
    if key is not None:
        q_len, kv_len, mask = 2**key.q_bucket, 2**key.kv_bucket, key.mask
        head_dim, value_dim, group = key.head_dim, key.value_dim, key.group
        assert jnp.dtype(dtype).itemsize == key.dtype_bytes
    shapes = (
        (1, q_len, 2 * group, head_dim), (1, kv_len, 2, head_dim), (1, kv_len, 2, value_dim)
    )  # fmt: skip
    mask = MASKS[mask]
    mask = None if mask is None else mask.bind(q_len, kv_len)
    return Operands(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), mask)


def spec_of(*args, **keywords):
    return AttentionSpec.of(described(*args, **keywords), 0.1)


def changed(config, **forward):
    return dataclasses.replace(config, forward=dataclasses.replace(config.forward, **forward))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A device whose file has one entry, for the forward of 4096 x 4096; its configuration."""
    config = changed(hopper.default_config(spec_of()), num_stages=1)
    entry = {
        "backend": "hopper",
        "key": dataclasses.asdict(table.Key.of(spec_of())),
        "config": {"forward": dataclasses.asdict(config.forward)},
    }
    table.write(tmp_path / "a_gpu.json", "A GPU", entry)
    monkeypatch.setattr(table, "DATA", tmp_path)
    monkeypatch.setattr(table, "_device_kind", lambda: "A GPU")
    table._entries.cache_clear()
    yield config.forward
    table._entries.cache_clear()


@pytest.mark.parametrize("length", [2900, 4096, 5700])
def test_entry_serves_lengths_near_its_own(measured, length):
    spec = spec_of(q_len=length)
    config = table.config_for(hopper.BACKEND, spec)
    assert config.forward == measured
    # Nobody has measured it.
    assert config.backward == hopper.default_config(spec).backward


@pytest.mark.parametrize(
    "features",
    [{"q_len": 1}, {"kv_len": 8192}, {"mask": "none"}, {"mask": "other"}, {"head_dim": 64}],
)
def test_another_key_gets_the_default(measured, features):
    spec = spec_of(**features)
    assert table.config_for(hopper.BACKEND, spec) == hopper.default_config(spec)


def test_lengths_beyond_the_longest_bucket_are_one_bucket():
    assert table.Key.of(spec_of(q_len=10**6)).q_bucket == table.LONGEST_BUCKET


def test_unknown_device_gets_the_default(measured, monkeypatch):
    for kind in ("Another GPU", None):
        monkeypatch.setattr(table, "_device_kind", lambda: kind)
        assert table.config_for(hopper.BACKEND, spec_of()) == hopper.default_config(spec_of())


def test_entry_that_does_not_fit_a_request_is_not_used(measured, monkeypatch):
    backend = dataclasses.replace(hopper.BACKEND, misfit=lambda spec, config: "too large")
    assert table.config_for(backend, spec_of()) == hopper.default_config(spec_of())


def test_calls_use_the_table(measured):
    spec, seen = spec_of(), []
    backend = dataclasses.replace(
        hopper.BACKEND, forward=lambda spec, config, *arrays: seen.append(config)
    )
    dispatch._call(backend, "forward", spec, None)
    assert [config.forward for config in seen] == [measured]


@pytest.mark.parametrize(
    "change, error", [({"surplus": 1}, TypeError), ({"num_stages": 0}, ValueError)]
)
def test_config_is_checked_on_reading(measured, change, error):
    path = table.DATA / "a_gpu.json"
    data = json.loads(path.read_text())
    data["entries"][0]["config"]["forward"].update(change)
    path.write_text(json.dumps(data))
    with pytest.raises(error):
        table.read(path, dispatch.BACKENDS)


def committed():
    """Device, and entry, of everything in the data files."""
    return [
        pytest.param(json.loads(path.read_text())["device"], entry, id=f"{path.stem}-{i}")
        for path in sorted(table.DATA.glob("*.json"))
        for i, entry in enumerate(table.read(path, dispatch.BACKENDS))
    ]


@pytest.mark.parametrize(("device", "entry"), committed())
def test_committed_entry_is_used_on_its_device_and_lowers_for_cuda(device, entry, monkeypatch):
    monkeypatch.setattr(table, "_device_kind", lambda: device)
    operands, backend = described(entry.key), dispatch.BACKENDS[entry.backend]
    spec = AttentionSpec.of(operands, 0.1)
    assert table.Key.of(spec) == entry.key
    config = table.config_for(backend, spec)
    assert entry.config == {name: getattr(config, name) for name in entry.config}
    lse = jax.ShapeDtypeStruct((1, spec.num_q_heads, spec.q_len), jnp.float32)
    dout = jax.ShapeDtypeStruct((*operands.q.shape[:-1], spec.value_dim), spec.dtype)
    for direction in entry.config:
        arrays = () if direction == "forward" else (lse, lse, dout)
        run = functools.partial(getattr(backend, direction), spec, config)
        jax.jit(run).trace(operands, *arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("direction", autotune.DIRECTIONS)
def test_candidates_fit_and_change_one_direction(direction, head_dim):
    spec = spec_of(head_dim=head_dim)
    default = hopper.default_config(spec)
    candidates = hopper.candidate_configs(spec, default, direction)
    assert candidates and default not in candidates
    for config in candidates:
        assert dataclasses.replace(config, **{direction: getattr(default, direction)}) == default
        assert getattr(config, direction).shared_memory_bytes(spec) <= SHARED_MEMORY_LIMIT


def test_search_goes_downhill_and_stops():
    spec = spec_of()

    def time(config, direction):
        """More stages are faster; the backward is as fast as it gets."""
        return 10.0 - config.forward.num_stages if direction == "forward" else 1.0

    config, ms = autotune.search(hopper.BACKEND, spec, time, steps=5)
    default = hopper.default_config(spec)
    assert config.forward.num_stages > default.forward.num_stages
    assert config.backward == default.backward
    assert ms["forward"] < ms["default_forward"]
    assert ms["backward"] == ms["default_backward"]


def test_entry_of_a_key_replaces_the_older_one(tmp_path):
    path = tmp_path / "data" / "a_gpu.json"
    for config in (1, 2):
        table.write(path, "A GPU", {"backend": "hopper", "key": {}, "config": config})
    table.write(path, "A GPU", {"backend": "other", "key": {}, "config": 3})
    assert [e["config"] for e in json.loads(path.read_text())["entries"]] == [2, 3]


def test_shapes_are_parsed():
    assert autotune.parse_shape("4x1024/4096x32/8x192/128") == [
        (4, 1024, 32, 192), (4, 4096, 8, 192), (4, 4096, 8, 128)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must be batch x length x heads x head_dim"):
        autotune.parse_shape("4x1024")


def test_command_writes_what_it_found(tmp_path, monkeypatch):
    """With the reference in place of the kernels, and a clock in place of the GPU's."""
    stand_in = dataclasses.replace(
        reference.BACKEND,
        config_type=hopper.Config,
        default_config=hopper.default_config,
        candidate_configs=lambda *state: hopper.candidate_configs(*state)[:1],
    )
    monkeypatch.setitem(dispatch.BACKENDS, "hopper", stand_in)
    monkeypatch.setattr(
        timing, "kernel_ms", lambda program, *arrays, iterations: (None, [1.0] * iterations)
    )
    autotune.main(["1x64x4/2x16", "--masks", "causal", "--steps", "1", "--data", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    (entry,) = table.read(path, {"hopper": hopper.BACKEND})
    default = hopper.default_config(spec_of(q_len=64, kv_len=64, head_dim=16))
    assert entry.config == {"forward": default.forward, "backward": default.backward}
    assert (entry.key.group, entry.key.mask, entry.key.q_bucket) == (2, "causal", 6)


def test_config_that_changes_results_is_found(monkeypatch):
    x = jnp.ones((1, 8, 2, 16))
    operands = Operands(x, x, x)
    spec = AttentionSpec.of(operands, 0.1)
    wrong = dataclasses.replace(
        reference.BACKEND,
        forward=lambda spec, config, operands: (operands.q * config, operands.q[..., 0].mT),
        default_config=lambda spec: 1.0,
    )
    monkeypatch.setattr(timing, "kernel_ms", lambda *arrays, iterations: (None, [1.0]))
    time = autotune.measured(wrong, spec, operands, iterations=2)
    assert time(1.0, "forward") == 1.0
    with pytest.raises(RuntimeError, match="2.0 changes the results of forward"):
        time(2.0, "forward")
