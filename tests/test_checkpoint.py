import errno
import functools
import json
import os
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg import FaultError, checkpoint, disk, prng


def make_state():
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.bfloat16)},
        "opt": (np.arange(4, dtype=np.int64), np.float32(0.25), jnp.int32(7)),
        "key": jax.random.split(jax.random.key(3), 2),
        "rbg": jax.random.key(1, impl="rbg"),
        "empty": jnp.zeros((2, 0)),
        "nan": np.array([np.nan, -0.0, np.inf]),
        "flag": np.bool_(True),
        "count": 3,
    }


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert isinstance(b, jax.Array) == isinstance(a, jax.Array)
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "state"
    return path, checkpoint.save(path, make_state())


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "state")


def listed(path):
    return json.loads((path / "MANIFEST.json").read_text())["files"]


def edit_manifest(path, change):
    manifest = json.loads((path / "MANIFEST.json").read_text())
    change(manifest)
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def test_every_kind_of_leaf_comes_back_bit_for_bit(saved):
    path, sha256 = saved
    assert_same(make_state(), checkpoint.load(path, make_state(), sha256))


def test_a_template_of_shapes_is_enough(saved):
    state = make_state()
    del state["count"], state["opt"], state["flag"]
    path = saved[0].with_name("arrays_only")
    checkpoint.save(path, state)
    template = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state))
    template["nan"] = np.zeros(3)  # float64, which shapes under jax cannot have by default
    assert_same(state, checkpoint.load(path, template))


KEYS = {
    "prng.key": prng.key,
    **{impl: functools.partial(jax.random.key, impl=impl)
       for impl in ("threefry2x32", "rbg", "unsafe_rbg")},
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS)
def test_typed_keys_of_every_kind_come_back(kind, tmp_path):
    """Of any shape, from a template of arrays or of shapes alone, and they draw as before."""
    key = KEYS[kind](3)
    state = {"one": key, "row": jax.random.split(key, 3), "none": jax.random.split(key, 3)[:0],
             "square": jax.random.split(key, (2, 2))}  # fmt: skip
    sha256 = checkpoint.save(tmp_path / "keys", state)
    for template in (state, jax.eval_shape(lambda: state)):
        loaded = checkpoint.load(tmp_path / "keys", template, sha256)
        assert_same(state, loaded)
        assert jax.random.bits(loaded["one"]) == jax.random.bits(key)
    leaves = [checkpoint.to_numpy(leaf) for leaf in jax.tree.leaves(state)]
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.uint32 for leaf in leaves)
    assert_same(state, checkpoint.like(jax.eval_shape(lambda: state), leaves))


DTYPES = [
    "bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32",
    "bfloat16", "float16", "float32", "complex64", "float8_e3m4", "float8_e4m3", "float8_e4m3fn",
    "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn",
]  # fmt: skip


def test_every_dtype_that_jax_has_comes_back(tmp_path):
    state = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        for shape in ((), (3,), (2, 0), (2, 3)):
            host = np.ones(shape, dtype)
            state[f"{name}{shape}"] = jnp.asarray(host)
            state[f"{name}{shape} of NumPy"] = host
    assert {np.dtype(leaf.dtype).name for leaf in state.values()} == set(DTYPES)
    checkpoint.save(tmp_path / "all", state)
    assert_same(state, checkpoint.load(tmp_path / "all", state))


def test_the_manifest_lists_every_file_sorted_with_its_hash(saved):
    path, sha256 = saved
    files = listed(path)
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert set(files) == on_disk - {"MANIFEST.json"}
    assert list(files) == sorted(files)
    assert all(disk.sha256_of(path / name) == digest for name, digest in files.items())
    assert disk.sha256_of(path / "MANIFEST.json") == sha256
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_state_without_elements(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": np.zeros((0, 3)), "b": ()})
    assert checkpoint.load(tmp_path / "c", {"a": np.ones((0, 3)), "b": ()})["a"].shape == (0, 3)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sharded_template_gets_its_sharding_back(tmp_path, sharded):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    leaf = jax.device_put(jnp.arange(4.0), sharding) if sharded else jnp.arange(4.0)
    checkpoint.save(tmp_path / "c", leaf)
    assert checkpoint.load(tmp_path / "c", leaf).committed == sharded


# ---------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_in_any_file_is_noticed_and_named(saved, copy):
    rng = np.random.default_rng(0)
    for name in listed(copy):
        original = (copy / name).read_bytes()
        if not original:
            continue
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (copy / name).write_bytes(damaged)
        with pytest.raises(FaultError, match=f"{name} is damaged"):
            checkpoint.load(copy, make_state())
        (copy / name).write_bytes(original)
    assert_same(make_state(), checkpoint.load(copy, make_state(), saved[1]))


def test_a_truncated_or_missing_file_is_named(copy):
    name = max(listed(copy), key=lambda n: (copy / n).stat().st_size)
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-1])
    with pytest.raises(FaultError, match=f"{name} is damaged"):
        checkpoint.load(copy, make_state())
    (copy / name).unlink()
    with pytest.raises(FaultError, match=f"{name} is missing"):
        checkpoint.load(copy, make_state())


def test_the_manifest_itself_is_covered_by_the_returned_hash(saved, copy):
    edit_manifest(copy, lambda m: m.update(note="x"))
    with pytest.raises(FaultError, match=r"MANIFEST\.json is damaged"):
        checkpoint.load(copy, make_state(), saved[1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "files": [], "leaves": []}', "{"])
def test_a_broken_manifest_is_one_sentence(copy, text):
    (copy / "MANIFEST.json").write_text(text)
    with pytest.raises(FaultError, match=r"MANIFEST\.json is damaged"):
        checkpoint.load(copy, make_state())


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "arrays/../../outside", ""])
def test_a_listed_path_outside_the_checkpoint_is_refused(copy, name):
    (copy.parent / "outside").write_text("x")
    edit_manifest(copy, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(FaultError, match="a path outside the checkpoint"):
        checkpoint.load(copy, make_state())


def test_links_and_stowaways_are_refused(copy):
    name = next(iter(listed(copy)))
    (copy / "arrays" / "extra").write_text("x")
    with pytest.raises(FaultError, match="extra does not belong"):
        checkpoint.load(copy, make_state())
    (copy / "arrays" / "extra").unlink()
    (copy / name).rename(copy.parent / "moved")
    (copy / name).symlink_to(copy.parent / "moved")
    with pytest.raises(FaultError, match="is missing"):
        checkpoint.load(copy, make_state())


def test_a_pickle_in_place_of_any_file_is_never_loaded(copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for name in [*listed(copy), "MANIFEST.json"]:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(FaultError):
            checkpoint.load(copy, make_state())
        (copy / name).write_bytes(whole)
    assert not (tmp_path / "exploded").exists()


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(FaultError, match="there is no complete checkpoint"):
        checkpoint.load(tmp_path / "nothing", make_state())


# ------------------------------------------------------------------------------------ wrong shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"].update(w=jnp.ones((3, 2))), r"shape \[2, 3\] there, and \[3, 2\]"),
        (lambda s: s["params"].update(b=jnp.ones(2)), "type bfloat16 there, and float32"),
        (lambda s: s.update(rbg=jax.random.key(0)), r"type key<rbg> there, and key<fry>"),
        (lambda s: s.update(more=jnp.ones(1)), r"it has no \['more'\]"),
        (lambda s: s.pop("flag"), r"it holds \['flag'\], which is not expected"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_by_name(saved, change, message):
    template = make_state()
    change(template)
    with pytest.raises(FaultError, match=message):
        checkpoint.load(saved[0], template)


def test_a_leaf_that_is_not_an_array_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"\['name'\] of a checkpoint is a str"):
        checkpoint.save(tmp_path / "c", {"name": "ppo"})
    with pytest.raises(TypeError, match="Python objects"):
        checkpoint.save(tmp_path / "c", np.array([object()]))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------- crashes and full disks


class Crash(BaseException):
    """Simulates the end of the process: no code may catch it and continue."""


def test_a_crash_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    old, new = {"x": np.arange(3.0)}, {"x": np.arange(3.0) + 10}
    target = tmp_path / "c"
    checkpoint.save(target, old)
    real = {"sync": disk.sync, "replace": os.replace}
    seen, finished, limit = set(), False, 0
    while not finished:
        limit += 1
        calls = iter(range(limit))

        def step(name, *args, calls=calls):
            if next(calls, None) is None:
                raise Crash
            return real[name](*args)

        with monkeypatch.context() as patch:
            patch.setattr(disk, "sync", lambda path, step=step: step("sync", path))
            patch.setattr(checkpoint.os, "replace", lambda a, b, step=step: step("replace", a, b))
            try:
                checkpoint.save(target, new)
                finished = True
            except Crash:
                pass
        value = checkpoint.load(target, old)["x"][0]
        assert value in (0.0, 10.0)
        seen.add(value)
        checkpoint.save(target, old)
        assert checkpoint.load(target, old)["x"][0] == 0.0
        assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert seen == {0.0, 10.0}
    assert limit > 5


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission is denied"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_faults_of_the_disk_are_plain_sentences(tmp_path, monkeypatch, code, reason):
    target = tmp_path / "c"
    checkpoint.save(target, np.zeros(2))

    def fail(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk, "sync", fail)
    with pytest.raises(FaultError, match=f"Cannot write the checkpoint .*: {reason}"):
        checkpoint.save(target, np.ones(2))
    assert checkpoint.load(target, np.zeros(2)).tolist() == [0.0, 0.0]


def test_a_path_under_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FaultError, match="is a file, not a directory"):
        checkpoint.save(tmp_path / "file" / "c", np.ones(2))


def test_a_limit_on_file_size_stops_orbax_with_a_plain_sentence(tmp_path):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).standard_normal(1 << 16)  # half a megabyte, incompressible
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(FaultError, match="Cannot write the checkpoint"):
            checkpoint.save(tmp_path / "c", noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "c").exists()
    checkpoint.save(tmp_path / "c", noise)
    assert (checkpoint.load(tmp_path / "c", noise) == noise).all()


def test_saving_is_silent(tmp_path, capfd):
    checkpoint.save(tmp_path / "c", make_state())
    checkpoint.load(tmp_path / "c", make_state())
    assert capfd.readouterr() == ("", "")
