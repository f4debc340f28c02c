# SPDX-License-Identifier: Apache-2.0
# labels: checkpoint python sharding
# ranks: 4
"""torch.distributed.checkpoint across the border, both ways, with the real PyTorch. [issue-8.7]

What Python's dcp.save wrote, of a model in one process and of one under FSDP2 in two, trains on in C++ under other
strategies on other numbers of ranks; what C++ saved is read by dcp.load into what get_state_dict gives, goes on
training in Python, and becomes the same one file by dcp_to_torch_save and by C++.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, state_dict as dcp_state
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

warnings.simplefilter("ignore")
TOOL = os.path.join(os.environ["FABRIC_BIN"], "dcp_tool")
FLAT = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)


def tool(*arguments, fails=False):
    done = subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=100)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen.add_(1)
        return self.rest(self.norm(self.first(x)))


def make():
    torch.manual_seed(3)
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, optimizer, torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)


def train(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def state_of(model, optimizer, x, y, step, flat=False):
    options = FLAT if flat else dcp_state.StateDictOptions()
    return {"model": dcp_state.get_model_state_dict(model),
            "optimizer": dcp_state.get_optimizer_state_dict(model, optimizer, options=options),
            "x": x, "y": y, "step": step}


def load_into(model, optimizer, folder, **options):
    state = state_of(model, optimizer, torch.zeros(8, 6, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64), 0)
    dcp.load(state, checkpoint_id=folder, **options)
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_training(model, optimizer, expected_model, expected_optimizer):
    for (key, a), b in zip(model.state_dict().items(), expected_model.state_dict().values()):
        torch.testing.assert_close(whole(a), b, rtol=1e-10, atol=1e-12, msg=key)
    for a, b in zip(optimizer.state_dict()["state"].values(), expected_optimizer.state_dict()["state"].values()):
        assert set(a) == set(b)
        for key in a:
            torch.testing.assert_close(whole(a[key]), b[key], rtol=1e-10, atol=1e-12, msg=key)
    groups = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, expected_optimizer)]
    assert {k: v for k, v in groups[0].items() if k != "fused"} == {k: v for k, v in groups[1].items() if k != "fused"}


def goes_on_in_cpp(folder):
    """From Python's folders in each layout, to C++ and back."""
    given, back = os.path.join(folder, "given"), os.path.join(folder, "back")
    strategies = {"names": (("ddp", 2), ("zero1", 2), ("zero3", 4)), "flat": (("zero3", 2),), "numbers": (("one", 1),)}
    for layout, runs in strategies.items():
        for strategy, ranks in runs:
            model, optimizer, x, y = make()
            train(model, optimizer, x, y, 2)
            state = state_of(model, optimizer, x, y, 2, flat=layout == "flat")
            if layout == "numbers":
                state["optimizer"] = optimizer.state_dict()
            dcp.save(state, checkpoint_id=given, no_dist=True)
            tool("train", strategy, ranks, given, back)
            train(model, optimizer, x, y, 3)
            ours, our_optimizer, _, _ = make()
            read = load_into(ours, our_optimizer, back, no_dist=True)
            assert read["step"] == 5 and torch.equal(read["x"], x)
            same_training(ours, our_optimizer, model, optimizer)
            train(model, optimizer, x, y, 1)
            train(ours, our_optimizer, x, y, 1)
            same_training(ours, our_optimizer, model, optimizer)
            print(f"  {layout}, {strategy} on {ranks}: ok")


def fsdp2(rank, ranks, rendezvous, folder):
    """One of the processes in which a model is under FSDP2, before and after it is trained on in C++."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (ranks,))
    rows = slice(8 // ranks * rank, 8 // ranks * (rank + 1))

    def sharded():
        model, _, x, y = make()
        fully_shard(model.rest, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), x, y

    model, optimizer, x, y = sharded()
    train(model, optimizer, x[rows], y[rows], 2)
    dcp.save(state_of(model, optimizer, x, y, 2), checkpoint_id=os.path.join(folder, "fsdp"))
    expected, expected_optimizer, _, _ = make()
    train(expected, expected_optimizer, x, y, 6)
    for strategy, on in (("one", 1), ("zero3", 4)):
        back = os.path.join(folder, f"back-{strategy}")
        dist.barrier()
        if rank == 0:
            tool("train", strategy, on, os.path.join(folder, "fsdp"), back)
        dist.barrier()
        model, optimizer, _, _ = sharded()
        assert load_into(model, optimizer, back)["step"] == 5
        train(model, optimizer, x[rows], y[rows], 1)
        same_training(model, optimizer, expected, expected_optimizer)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # past the end of PyTorch's threads, at which a process sometimes aborts


def goes_on_from_fsdp2(folder):
    """FSDP2 on 2 -> C++ on 1 and on 4 -> FSDP2 on 2."""
    torch.multiprocessing.spawn(fsdp2, (2, tempfile.mktemp(dir=folder), folder), nprocs=2)


def compare(x, y, key=""):
    """Equal, bit for bit and kind for kind."""
    if isinstance(x, torch.Tensor):
        assert isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.shape == y.shape, (key, x, y)
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (x, y)] if x.numel() else [x, y]
        assert torch.equal(*bits), key
    elif isinstance(x, dict):
        assert list(x) == list(y), (key, list(x), list(y))
        for k in x:
            compare(x[k], y[k], f"{key}.{k}")
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y) and isinstance(y, list) == isinstance(x, list), key
        for i, (a, b) in enumerate(zip(x, y)):
            compare(a, b, f"{key}.{i}")
    else:
        assert type(x) is type(y) and (x == y or x != x), (key, x, y)


def everything():
    model, optimizer, x, y = make()
    train(model, optimizer, x, y, 1)
    shared = torch.arange(12.0)
    state = {**state_of(model, optimizer, x, y, 1), "large": torch.arange(600_000.0).view(300, 2000), "nan": float("nan"),
             "none": None, "text": "xé€😀", "list": [1, 2.0, [True]], "tuple": (1, "a"), "nested": {"a": {"b": 1}},
             "tensors": [torch.ones(2), {"c": torch.zeros(3)}, 5], "first half": shared[:6],
             "transposed": torch.arange(6).view(2, 3).t(), "strided": torch.arange(24).view(4, 6)[::2, 1::2],
             "expanded": torch.ones(1).expand(5), "scalar": torch.tensor(1.5), "no elements": torch.zeros(0, 3),
             "parameter": nn.Parameter(torch.ones(2)), "complex": torch.randn(2, dtype=torch.complex64),
             "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint16,
                  torch.bool):
        state[str(dtype).replace(".", " ")] = torch.randn(7).abs().to(dtype)
    return state


def one_file(folder):
    """A folder becomes one file by dcp_to_torch_save and by C++; a part of it is loaded by its key."""
    theirs, ours = os.path.join(folder, "theirs"), os.path.join(folder, "ours")
    a, b = os.path.join(folder, "a.pt"), os.path.join(folder, "b.pt")
    state = everything()
    for threads in (1, 3):  # one file for each thread
        dcp.save(state, storage_writer=FileSystemWriter(theirs, thread_count=threads), no_dist=True)
        dcp_to_torch_save(theirs, a)
        tool("consolidate", theirs, b)
        expected = torch.load(a)
        compare(expected, torch.load(b, weights_only=True))
    compare(state["large"], expected["large"])
    tool("copy", a, ours)
    dcp_to_torch_save(ours, b)
    compare(expected, torch.load(b, weights_only=True))
    compare(expected["model"], _load_state_dict_from_keys({"model"}, checkpoint_id=ours)["model"])
    tool("copy", a, ours)  # over the one that is there
    dcp_to_torch_save(os.path.join(folder, "fsdp"), a)
    tool("consolidate", os.path.join(folder, "fsdp"), b)
    compare(torch.load(a), torch.load(b, weights_only=True))
    # Python writes over a folder of ours.
    dcp.save({"x": torch.ones(3)}, checkpoint_id=ours, no_dist=True)
    tool("consolidate", ours, b)
    compare({"x": torch.ones(3)}, torch.load(b, weights_only=True))


class Trap:
    sprung = ""

    def __reduce__(self):
        return os.system, (f"touch {self.sprung}",)


def refusals(folder):
    given, never = os.path.join(folder, "bad"), os.path.join(folder, "never.pt")
    Trap.sprung = os.path.join(folder, "sprung")
    dcp.save({"net": Net()}, checkpoint_id=given, no_dist=True)  # Stateful: its state_dict is saved
    tool("consolidate", given, never)
    os.remove(never)
    dcp.save({"trap": Trap()}, checkpoint_id=given, no_dist=True)
    assert "posix.system" in tool("consolidate", given, never, fails=True)
    dcp.save({"x": torch.ones(1)}, checkpoint_id=given, no_dist=True)
    metadata = dcp.FileSystemReader(given).read_metadata()
    for trap, name in ((Trap(), "posix.system"), (slice(1), "builtins.slice"), (Net, "Net")):
        metadata.planner_data = {"x": trap}
        with open(os.path.join(given, ".metadata"), "wb") as file:
            pickle.dump(metadata, file)
        assert name in tool("consolidate", given, never, fails=True), name
    dcp.save({"x": torch.ones(1)}, no_dist=True,
             storage_writer=FileSystemWriter(given, serialization_format=SerializationFormat.SAFETENSORS))
    assert "SAFETENSORS" in tool("consolidate", given, never, fails=True)
    assert "No such file" in tool("consolidate", os.path.join(folder, "nothing"), never, fails=True)
    assert not os.path.exists(Trap.sprung) and not os.path.exists(never)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in (goes_on_in_cpp, goes_on_from_fsdp2, one_file, refusals):
            part(folder)
            print(f"{part.__name__}: ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
