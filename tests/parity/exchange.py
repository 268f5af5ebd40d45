"""Networks of PyTorch and ours: random parameters, the way through the command line and back, equal outputs."""

import numpy as np
import torch

from jaxdiff.cli import main
from jaxdiff.pretrained import folders


def run(*words):
    """Runs a command line that must succeed."""
    assert main([str(word) for word in words]) == 0


def imported(kind, saved, folder, *options):
    """What `jaxdiff import` makes of saved weights."""
    run("import", kind, saved, folder, *options)
    return folders.load(folder)


def there_and_back(kind, model, folder):
    """A model saved in its own format and imported, and what its own class reads after an export.

    Every tensor must have come back bit for bit.
    """
    model.save_pretrained(folder / "theirs")
    ours = imported(kind, folder / "theirs", folder / "ours")
    run("export", kind, folder / "ours", folder / "back")
    back = type(model).from_pretrained(folder / "back", local_files_only=True).eval()
    assert_same_state(back.state_dict(), model.state_dict())
    return ours, back


def assert_same_state(found, state):
    assert sorted(found) == sorted(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].numpy(), tensor.numpy(), err_msg=name)


def drawn(model):
    """A model with random parameters, none of them zero or one, with which outputs keep their size.

    Kernels have deviation 1 / sqrt(inputs), tables 1, biases 0.1, and scales are about 1.
    """
    generator = torch.Generator().manual_seed(0)
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim < 2:
                parameter.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
            elif id(parameter) not in tables:
                parameter.div_(parameter[0].numel() ** 0.5)
    return model.eval()


def first(array):
    """Channels last to PyTorch's channels first."""
    return torch.from_numpy(np.moveaxis(np.asarray(array, np.float32), -1, 1).copy())


def assert_close(ours, theirs):
    """Equal to 1e-4, where values are of the order of one. PyTorch's images have channels first."""
    theirs = theirs.detach().float().numpy()
    theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim == 4 else theirs
    assert 0.05 < theirs.std() < 20
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-4)
