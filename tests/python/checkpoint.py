# SPDX-License-Identifier: Apache-2.0
# labels: checkpoint python
"""Checkpoints across the border, both ways, with the real PyTorch. [issue-7.1] [issue-7.6]

What Python's torch.save wrote is read in C++, written again there, and read by torch.load(weights_only=True), with and
without mmap: nothing may have changed. Training goes on in C++ where Python left it and comes out where Python does.
"""

import os
import subprocess
import sys
import tempfile
import warnings

import torch
from torch import nn

TOOL = os.path.join(os.environ["FABRIC_BIN"], "checkpoint_tool")


def tool(*arguments, fails=False):
    done = subprocess.run([TOOL, *arguments], capture_output=True, text=True, timeout=100)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def compare(x, y, key="", strides=True):
    """Equal, bit for bit and kind for kind."""
    if isinstance(x, torch.Tensor):
        assert isinstance(y, torch.Tensor) and x.dtype == y.dtype and x.shape == y.shape, (key, x, y)
        assert not strides or x.stride() == y.stride(), key
        assert torch.equal(bits(x), bits(y)), key
    elif isinstance(x, dict):
        assert list(x) == list(y), (key, list(x), list(y))
        for k in x:
            compare(x[k], y[k], f"{key}.{k}", strides)
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y) and isinstance(y, list) == isinstance(x, list), key
        for i, (a, b) in enumerate(zip(x, y)):
            compare(a, b, f"{key}.{i}", strides)
    elif isinstance(x, (torch.dtype, torch.device)):
        assert str(x) == y, key
    else:
        assert type(x) is type(y) and (x == y or x != x), (key, x, y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)  # the norm would leave it nothing but rounding
        self.norm = nn.BatchNorm1d(8)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.rest(self.norm(self.first(x)))


def everything():
    """One of each that a checkpoint may hold."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    model(torch.randn(16, 6)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    shared = torch.arange(12.0)
    floats = torch.randn(7)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "epoch": 3, "large": 2**62, "negative": -(2**40), "lr": 0.5, "inf": float("inf"), "nan": float("nan"),
        "name": "xé€😀", "empty text": "", "none": None, "yes": True, "list": [1, 2.0, None, [True, []]],
        "tuple": (1, "a", ()), "shape": torch.Size([2, 3]), "dict": {}, "numbers": {0: "zero", -1: "minus"},
        "first half": shared[:6], "second half": shared[6:], "transposed": torch.arange(6).view(2, 3).t(),
        "strided": torch.arange(24).view(4, 6)[::2, 1::2], "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(1.5), "no elements": torch.zeros(0, 3), "parameter": nn.Parameter(torch.ones(2)),
        "random": torch.get_rng_state(), "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "dtype": torch.float16, "device": torch.device("cpu"), "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
                  torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        state[str(dtype)] = floats.abs().to(dtype)
    return state


def round_trips(folder):
    given, back = os.path.join(folder, "given.pt"), os.path.join(folder, "back.pt")
    state = everything()
    for protocol in (2, 3, 4, 5):
        torch.save(state, given, pickle_protocol=protocol)
        tool("copy", given, back)
        for mmap in (False, True):
            read = torch.load(back, weights_only=True, mmap=mmap)
            compare(state, read)
            halves = read["first half"], read["second half"]
            assert halves[0].untyped_storage().data_ptr() == halves[1].untyped_storage().data_ptr(), "no longer shared"
    Net().load_state_dict(read["model"])
    torch.save(state["model"], given)  # a bare OrderedDict
    tool("copy", given, back)
    compare(state["model"], torch.load(back, weights_only=True))
    assert os.path.getsize(back) < 1.5 * os.path.getsize(given)


def refusals(folder):
    given, back = os.path.join(folder, "bad.pt"), os.path.join(folder, "never.pt")
    torch.save(Net(), given)
    assert "__main__.Net" in tool("copy", given, back, fails=True)
    torch.save({"f": os.system}, given)
    assert "posix.system" in tool("copy", given, back, fails=True)
    torch.save({"x": torch.ones(1)}, given, _use_new_zipfile_serialization=False)
    assert "before 1.6" in tool("copy", given, back, fails=True)
    torch.save({"s": torch.eye(2).to_sparse()}, given)
    assert "_rebuild_sparse_tensor" in tool("copy", given, back, fails=True)
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), given)
    assert "torch.jit.save" in tool("copy", given, back, fails=True)
    assert not os.path.exists(back)


def train(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


OPTIMIZERS = {
    "AdamW": [{"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.99)}, {"lr": 0.02, "weight_decay": 0.3}],
    "Adam": [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "eps": 1e-6}],
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.01, "momentum": 0.5, "centered": True, "alpha": 0.9}],
    "Adagrad": [{"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01}],
}


def resumed_training(folder):
    given, back = os.path.join(folder, "given.pt"), os.path.join(folder, "back.pt")
    for name, cases in OPTIMIZERS.items():
        for options in cases:
            torch.manual_seed(3)
            model = Net().double()
            optimizer = getattr(torch.optim, name)(model.parameters(), **options)
            x, y = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
            train(model, optimizer, x, y, 2)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "x": x, "y": y, "step": 2}
            torch.save(state, given)
            tool("resume", name, given, back)
            train(model, optimizer, x, y, 3)
            read = torch.load(back, weights_only=True)
            assert read["step"] == 5 and set(read) == set(state)
            ours, theirs = Net().double(), model.state_dict()
            ours.load_state_dict(read["model"])  # strict
            for key, value in theirs.items():
                torch.testing.assert_close(read["model"][key], value, rtol=1e-10, atol=1e-12, msg=f"{name} {key}")
            again = getattr(torch.optim, name)(ours.parameters(), lr=0.7)
            again.load_state_dict(read["optimizer"])
            expected, got = optimizer.state_dict(), again.state_dict()
            groups = [set(d) - {"foreach", "fused"} for d in (expected["param_groups"][0], got["param_groups"][0])]
            assert groups[0] == groups[1], (name, groups)
            for key in groups[0]:
                assert expected["param_groups"][0][key] == got["param_groups"][0][key], (name, key)
            for number, kept in expected["state"].items():
                for key, value in kept.items():
                    if value is not None:
                        torch.testing.assert_close(got["state"][number][key], value, rtol=1e-10, atol=1e-12)
            train(model, optimizer, x, y, 1)
            train(ours, again, x, y, 1)
            for a, b in zip(model.parameters(), ours.parameters()):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def large_form(folder):
    path = os.path.join(folder, "wide.pt")
    tool("zip64", path)
    for mmap in (False, True):
        compare({"x": torch.arange(5)}, torch.load(path, weights_only=True, mmap=mmap))


def safetensors(folder):
    """Against the safetensors package, where it is installed; else the round trip through C++ alone."""
    given, flat, back = (os.path.join(folder, name) for name in ("given.pt", "flat.safetensors", "back.pt"))
    state = everything()
    for unknown in ("complex", "device", "dtype"):
        del state[unknown]
    torch.save(state, given)
    tool("copy", given, flat)
    tool("copy", flat, back)
    compare(state, torch.load(back, weights_only=True), strides=False)
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        print("safetensors: the package is not installed, only the way through C++ was compared")
        return
    read = load_file(flat)
    for key, value in state["model"].items():
        compare(value, read[f"model.{key}"], key, strides=False)
    compare(state["optimizer"]["state"][0]["exp_avg"], read["optimizer.state.0.exp_avg"])
    theirs = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16(), "d": torch.zeros(0, 2)}
    save_file(theirs, flat, metadata={"format": "pt"})
    tool("copy", flat, back)
    read = torch.load(back, weights_only=True)
    for key, value in theirs.items():
        compare(value, read[key], key)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part in (round_trips, refusals, resumed_training, large_form, safetensors):
            part(folder)
            print(f"{part.__name__}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
