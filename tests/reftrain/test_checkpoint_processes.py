"""Checkpoints of jobs of two processes: what one saved two load and back, and what happens on one rank is known to all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from reftrain.checkpoint import CheckpointStore
from tests.reftrain.test_checkpoint import assert_same, state_of, trained

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import os, sys, errno, torch, torch.distributed as dist
from pathlib import Path
from tests.reftrain.test_checkpoint import trained, state_of, assert_same
from torch.distributed.fsdp import fully_shard
from planner.errors import InputError
from reftrain.checkpoint import CheckpointStore
import reftrain.checkpoint_files as files

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(9)
model = trained(5, 0)[0]
for part in model:
    fully_shard(part)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
full = lambda state: {k: {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in part.items()} for k, part in
                      {"model": state["model"], **{n: v for n, v in state["optimizer"]["state"].items()}}.items()}

one = CheckpointStore(folder / "one")          # one process saved it, two load it
state = state_of(model, optimizer)
assert one.load(one.newest(), state) == {"who": "single"}
expected = state_of(*trained(3))
loaded = full(state)
assert_same(loaded["model"], expected["model"])
assert_same({k: v for k, v in loaded.items() if k != "model"}, expected["optimizer"]["state"])
assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3 * 4

two = CheckpointStore(folder / "two")          # two processes save, in both ways
two.save(1, state, {"rank": rank})
two.save(2, state, {"rank": rank}, block=False)
for tensor in state["model"].values():
    tensor.to_local().fill_(-7)
two.wait()

real, fail = files.os.write, rank == 1         # the disk of one rank fills: both must hear of it
def write(handle, data):
    if fail:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(handle, data)
files.os.write = write
for block in (True, False):
    try:
        two.save(3, state, {}, block=block)
        two.wait()
    except InputError as error:
        assert "No space left on device" in str(error) and "bytes are needed" in str(error), error
    else:
        raise SystemExit("a full disk went unnoticed")
files.os.write = real
assert two.newest() == folder / "two" / "step-00000002"
again = state_of(model, optimizer)
assert two.load(two.newest(), again) == {"rank": rank}
assert_same(full(again)["model"], expected["model"])
if rank == 1:                                   # damage seen by one rank's share of the hashing is known to all
    path = next((folder / "two" / "step-00000002").glob("rank-00001*"))
    data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
dist.barrier()
assert two.newest() == folder / "two" / "step-00000001"
assert [Path(p.where).name for p in two.problems] == ["rank-00001.safetensors"]
dist.barrier()
if rank == 1:
    data[-1] ^= 1; path.write_bytes(data)
same = CheckpointStore(folder / "same")        # what all ranks hold alike is written once
whole = {"weight": torch.arange(1000.0), "rate": 0.1}
same.save(1, whole, {})
assert sum(p.stat().st_size for p in same.newest().glob("*.safetensors")) < 1.1 * 4000
copy = {"weight": torch.zeros(1000), "rate": 0.0}
same.load(same.newest(), copy)
assert_same(copy, whole)
dist.barrier()
dist.destroy_process_group()
print("done", rank)
"""


def run_two(script, *arguments):
    """Runs a script in two processes as torchrun would; returns their outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    base |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    processes = [
        subprocess.Popen(command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    return outputs


def test_one_to_two_processes_and_back(tmp_path):
    CheckpointStore(tmp_path / "one").save(1, state_of(*trained(3)), {"who": "single"})
    run_two(WORKER, tmp_path)
    store = CheckpointStore(tmp_path / "two")
    assert sorted(os.listdir(store.folder)) == [".lock", "step-00000001", "step-00000002"]
    for step in (1, 2):
        state = state_of(*trained(0))
        assert store.load(store.folder / f"step-{step:08d}", state) == {"rank": 0}
        assert_same(state, state_of(*trained(3)))
    assert store.newest().name == "step-00000002"
