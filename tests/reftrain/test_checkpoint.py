"""What a checkpoint promises while nothing dies: exact state, damage found and named, no pickle run.

Faults: test_checkpoint_faults; several processes: test_checkpoint_processes.
"""

import json
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from planner.errors import InputError
from reftrain.checkpoint import CheckpointStore
from reftrain.checkpoint_files import MANIFEST, FileRecord, Manifest, decode, encode, read_manifest, write_file

FILES = ("rank-00000.safetensors", "layout.json", "extra.json", MANIFEST)


def trained(seed, num_steps=2):
    """A small model of two dtypes and odd sizes, and its AdamW with state; one thread, so that other processes compute the same bits."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(33, 7), nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 3).to(torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (seed + 1), betas=(0.9, 0.9 + seed / 100))
    for _ in range(num_steps):
        model[3](model[:3](torch.randint(33, (5,))).to(torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model, optimizer):
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def leaves(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{path}/{i}").items()}
    return {path: value}


def assert_same(left, right):
    """Equal to the bit, dtypes and plain values included."""
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key
            assert type(value) is type(right[key]), key


@pytest.fixture
def two(tmp_path):
    """A store with checkpoints 1 and 2."""
    store = CheckpointStore(tmp_path / "run")
    for step in (1, 2):
        store.save(step, state_of(*trained(step)), {"step": step})
    return store


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ------------------------------------------------------------------- round trip


@pytest.mark.parametrize("block", [True, False])
def test_model_and_optimizer_come_back_to_the_bit(tmp_path, block):
    saved = trained(0)
    before = state_of(*saved)
    extra = {"position": 2**60 + 1, "rng": torch.get_rng_state().numpy().tobytes().hex(), "losses": (1.5, float("inf"), 1 / 3)}
    store = CheckpointStore(tmp_path)
    store.save(7, before, extra, block=block)
    store.wait()
    fresh = trained(1)
    state = state_of(*fresh)
    reader = CheckpointStore(tmp_path)
    newest = reader.newest()
    assert newest == tmp_path / "step-00000007"
    assert reader.load(newest, state) == extra
    set_state_dict(*fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_same(state_of(*fresh), before)
    assert reader.problems == []


def test_a_background_save_holds_the_moment_it_was_called(tmp_path):
    store = CheckpointStore(tmp_path)
    live = {"weight": torch.zeros(1000)}
    for step in range(1, 6):
        live["weight"].fill_(step)
        store.save(step, live, {}, block=False)  # each waits for the one before
        live["weight"].fill_(-1)  # the trainer goes on at once
    store.wait()
    for step in (3, 4, 5):
        state = {"weight": torch.zeros(1000)}
        store.load(tmp_path / f"step-{step:08d}", state)
        assert torch.equal(state["weight"], torch.full((1000,), float(step)))


def test_background_and_blocking_saves_write_the_same_bytes(tmp_path):
    for name, block in (("a", True), ("b", False)):
        store = CheckpointStore(tmp_path / name)
        store.save(1, state_of(*trained(0)), {"x": 1}, block=block)
        store.wait()
    for name in FILES:
        assert (tmp_path / "a/step-00000001" / name).read_bytes() == (tmp_path / "b/step-00000001" / name).read_bytes()


def test_any_tool_reads_the_tensors(two):
    tensors = load_file(two.newest() / FILES[0])
    assert torch.equal(tensors["model.0.weight"], trained(2)[0][0].weight)


def test_odd_tensors_survive(tmp_path):
    generator = torch.Generator().manual_seed(0)
    odd = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(6, 4, generator=generator).t()[::2],
        "bool": torch.tensor([True]),  # one byte: what comes after it must be aligned all the same
        "nan": torch.tensor([float("nan"), float("-inf")]),
        "int": torch.tensor([[2**62, -(2**63)]]),
        "fp8": torch.randn(5, generator=generator).to(torch.float8_e4m3fn),
        "names": {"a": None, "b": [1, (2.5, "x")], "c": {"d": (True,)}},
    }
    store = CheckpointStore(tmp_path)
    store.save(1, odd, {})
    data = (store.newest() / FILES[0]).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert all(entry["data_offsets"][0] % odd[name].element_size() == 0 for name, entry in header.items())  # mapped files need aligned elements
    state = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else {"a": 0, "b": 0, "c": {"d": 0}} for k, v in odd.items()}
    store.load(store.newest(), state)
    assert state["names"] == odd["names"]
    for name in odd.keys() - {"names"}:
        assert odd[name].contiguous().reshape(-1).view(torch.uint8).tolist() == state[name].contiguous().reshape(-1).view(torch.uint8).tolist(), name


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", torch.float32, ({1: 2},)])
def test_what_json_cannot_hold_is_refused_when_saved(tmp_path, value):
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        encode([value])
    with pytest.raises(RuntimeError, match="a checkpoint cannot hold"):
        CheckpointStore(tmp_path).save(1, {"x": [value]}, {})
    assert CheckpointStore(tmp_path).newest() is None


def test_the_run_must_ask_for_what_was_saved(two):
    newest = two.newest()
    for wrong in (
        {"model": {"other": torch.zeros(1)}},
        {"model": {"0.weight": torch.zeros(33, 8)}},
        {"model": {"0.weight": torch.zeros(33, 7).half()}},
    ):
        with pytest.raises(InputError, match=r"must hold what the run asks for .*(other|0\.weight)"):
            two.load(newest, wrong)
    part = {"model": {"0.weight": torch.zeros(33, 7)}}
    two.load(newest, part)
    assert torch.equal(part["model"]["0.weight"], trained(2)[0][0].weight)


# ------------------------------------------------------------- which ones stay


def test_keep_and_order(tmp_path):
    with pytest.raises(InputError, match="keep"):
        CheckpointStore(tmp_path, keep=0)
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 8):
        store.save(step, {"x": torch.ones(3) * step}, {})
        assert sorted(os.listdir(tmp_path)) == [".lock"] + [f"step-{s:08d}" for s in range(max(1, step - 1), step + 1)]
    with pytest.raises(InputError, match="newest checkpoint of the folder, 7"):
        CheckpointStore(tmp_path).save(5, {"x": torch.ones(3)}, {})
    store.load(tmp_path / "step-00000006", {"x": torch.ones(3)})  # rolled back: 7 is a future that did not happen
    store.save(6, {"x": torch.full((3,), 66.0)}, {})
    assert store.newest().name == "step-00000006"
    state = {"x": torch.ones(3)}
    store.load(store.newest(), state)
    assert state["x"].tolist() == [66.0] * 3
    store.save(7, state, {})
    assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000006", "step-00000007"]


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path).newest() is None
    assert CheckpointStore(tmp_path / "absent").newest() is None
    with pytest.raises(InputError, match=r"manifest\.json"):
        CheckpointStore(tmp_path).load(tmp_path, {})


# ---------------------------------------------------------------------- damage


@pytest.mark.parametrize("num_flips", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_bit_flips_are_found_named_and_passed_over(two, num_flips):
    newest, previous = two.folder / "step-00000002", two.folder / "step-00000001"
    draw = random.Random(num_flips)
    for _ in range(num_flips):
        path = newest / draw.choice(FILES)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        two.problems.clear()
        assert two.newest() == previous, (path.name, bit)
        assert {p.where.split(":")[0] for p in two.problems} == {str(path)}, (path.name, bit)
        flip(path, bit)
    two.problems.clear()
    assert two.newest() == newest
    assert two.problems == []


@pytest.mark.parametrize("name", FILES)
def test_cut_missing_grown_and_swapped_files_are_found(two, name):
    path, previous = two.newest() / name, two.folder / "step-00000001"
    whole = path.read_bytes()
    draw = random.Random(2)
    for length in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))]:
        path.write_bytes(whole[:length])
        assert two.newest() == previous, length
    for other in (whole + b"\0", whole + b"\n", b"\xef\xbb\xbf" + whole, b" " + whole):
        path.write_bytes(other)
        assert two.newest() == previous, other[:4]
    path.unlink()
    assert two.newest() == previous
    path.symlink_to(previous / name)
    assert two.newest() == previous
    path.unlink()
    path.mkdir()
    assert two.newest() == previous
    assert all(p.value == str(path) or p.where.startswith(str(path)) for p in two.problems)
    with pytest.raises(InputError, match=name):
        two.load(path.parent, {})


def test_files_that_the_manifest_does_not_name_are_never_read(two):
    os.mkfifo(two.newest() / "rank-00001.safetensors")  # reading it would hang
    (two.newest() / ".metadata").write_bytes(b"\x80\x04junk")
    state = state_of(*trained(0))
    two.load(two.newest(), state)
    assert_same(state, state_of(*trained(2)))


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def forge(folder, name, data):
    """Replaces a file and writes a manifest that agrees, as one who knows the format can."""
    (folder / name).unlink(missing_ok=True)
    record = write_file(folder / name, [data])
    manifest = read_manifest(folder)
    files = (*(f for f in manifest.files if f.name != name), FileRecord(record.name, record.num_bytes, record.sha256))
    (folder / MANIFEST).write_bytes(Manifest(manifest.step, manifest.world_size, files).to_bytes())


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "layout.json", "extra.json"])
def test_a_pickle_with_a_forged_manifest_is_not_run(two, tmp_path, name):
    marker = tmp_path / "owned"
    for protocol in range(6):
        data = pickle.dumps(Attack(marker), protocol=protocol)
        forge(two.newest(), name, data)
        with pytest.raises(InputError):
            two.load(two.folder / "step-00000002", state_of(*trained(0)))
    torch.save({"x": Attack(marker)}, tmp_path / "zip")
    forge(two.folder / "step-00000002", name, (tmp_path / "zip").read_bytes())
    with pytest.raises(InputError):
        two.load(two.folder / "step-00000002", state_of(*trained(0)))
    assert not marker.exists()
    os.system(f"touch {marker}")
    assert marker.exists()  # the attack would have worked


def test_forged_layouts_end_in_an_input_error(two):
    folder = two.newest()
    layout = json.loads((folder / "layout.json").read_bytes())
    draw = random.Random(3)
    junk = [None, -1, 2**70, "x", "../../etc/passwd", [], {}, {"tuple": 1}, [[0], [1], "rank-00009.safetensors"], True, 0.5]
    num_refused = 0
    for _ in range(150):
        forged = json.loads(json.dumps(layout))
        place, path = forged, []
        while isinstance(place, (dict, list)) and place and (not path or draw.random() < 0.9):
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            path.append((place, key))
            place = place[key]
        path[-1][0][path[-1][1]] = draw.choice(junk)
        forge(folder, "layout.json", json.dumps(forged).encode())
        try:
            two.load(folder, state_of(*trained(0)))
        except InputError:
            num_refused += 1
    assert num_refused > 50  # the rest changed values, which a manifest of the forger's own does vouch for


def test_a_layout_points_only_to_files_that_the_manifest_vouches_for(two):
    folder = two.newest()
    (folder / "rank-00001.safetensors").write_bytes((folder / FILES[0]).read_bytes())
    forge(folder, "layout.json", (folder / "layout.json").read_bytes().replace(b"rank-00000", b"rank-00001"))
    with pytest.raises(InputError, match=r"rank-00001.safetensors is not in the manifest"):
        two.load(folder, state_of(*trained(0)))


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a/b.json", ".metadata", "manifest.json", "x.pt", "", "layout.json\n"])
def test_manifests_name_only_files_of_their_folder(two, name):
    folder = two.newest()
    (folder / MANIFEST).write_bytes(Manifest(2, 1, (*read_manifest(folder).files, FileRecord(name, 0, "0" * 64))).to_bytes())
    with pytest.raises(InputError, match="checksum"):
        read_manifest(folder)


@pytest.mark.parametrize("bad", [{"tuple": 1}, {"tuple": [], "x": 1}, {"float": "1.5"}, {}, {"dict": []}, [{"os.system": "x"}]])
def test_decode_takes_only_what_encode_gives(bad):
    with pytest.raises(ValueError, match="no value"):
        decode(bad)
