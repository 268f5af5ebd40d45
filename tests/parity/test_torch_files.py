"""What torch saves, in every way it can, is what is read without it."""

import argparse
import collections
import pathlib
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from jaxdiff.pretrained import files

DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
).split()


class Net(torch.nn.Module):
    """Parameters, buffers of both kinds, shared layers and plain attributes."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left", torch.ones(2), persistent=False)
        self.sizes, self.scale, self.tied = [1, 2], 3.0, self.layers[0]

    def forward(self, x):
        return self.tied(x) * self.scale


@pytest.fixture
def net(monkeypatch):
    """A module of a class that cannot be imported when it is read: only its name reaches the file."""
    module = types.ModuleType("gone")
    monkeypatch.setitem(sys.modules, "gone", module)
    monkeypatch.setattr(Net, "__module__", "gone")
    module.Net = Net
    return Net()


def assert_same(found, state, prefix=""):
    assert sorted(found) == sorted(prefix + name for name in state)
    for name, tensor in state.items():
        array = found[prefix + name]
        assert (array.shape, array.dtype.name) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")), name
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert array.tobytes() == raw.tobytes(), name


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(new, name, tmp_path):
    dtype = getattr(torch, name)
    whole = torch.arange(24.0).reshape(2, 3, 4).to(dtype)
    state = {"whole": whole, "turned": whole.permute(2, 0, 1), "part": whole[:, 1:, ::2], "scalar": whole[0, 0, 1]}
    state |= {"empty": torch.zeros(0, 3, dtype=dtype), "repeated": whole[0, 0, :1].expand(5)}
    torch.save(state, tmp_path / "f", _use_new_zipfile_serialization=new)
    assert_same(files.read(tmp_path / "f"), state)


@pytest.mark.parametrize("new", [True, False])
def test_whole_modules(new, net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(net, tmp_path / "f", _use_new_zipfile_serialization=new)
    assert_same(files.read(tmp_path / "f"), net.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles(protocol, net, tmp_path):
    (tmp_path / "f").write_bytes(pickle.dumps({"ema": net, "step": 3}, protocol=protocol))
    assert_same(files.read(tmp_path / "f"), net.state_dict(), "ema.")


def test_torchscript(tmp_path):
    net = Net()
    torch.jit.save(torch.jit.script(net), tmp_path / "f")
    assert_same(files.read(tmp_path / "f"), {**net.state_dict(), "left": net.left})


def test_training_checkpoints(net, tmp_path):
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = net.state_dict()
    lightning = {
        "state_dict": state,
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {Net: {"best": torch.tensor(1.0), "score": np.float64(3)}},
        "hyper_parameters": argparse.Namespace(path=pathlib.PurePosixPath("x"), counts=collections.Counter("aab")),
        "loops": {"sizes": torch.Size([2]), "device": torch.device("cpu"), "dtype": torch.float32, "set": {1, 2}},
        "rng": torch.get_rng_state(),
    }
    torch.save(lightning, tmp_path / "f")
    assert_same(files.read(tmp_path / "f"), state)
    torch.save(
        {"model": state, "opt": optimizer.state_dict(), "columns": np.asfortranarray(np.eye(2, 3))}, tmp_path / "g"
    )
    found = files.read(tmp_path / "g")
    assert_same({name: array for name, array in found.items() if name.startswith("model.")}, state, "model.")
    np.testing.assert_array_equal(found["columns"], np.eye(2, 3))
    np.testing.assert_array_equal(found["opt.state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"].numpy())


def test_parameters_with_attributes(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.note = "kept by torch"
    torch.save({"a": parameter}, tmp_path / "f")
    assert_same(files.read(tmp_path / "f"), {"a": parameter})
