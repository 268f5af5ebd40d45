"""The checkpoint that `benchmarks.import_sd` writes has the published names; its tables show what was measured."""

import numpy as np

from benchmarks import import_sd
from jaxdiff.pretrained import families


def test_the_checkpoint_is_that_of_stable_diffusion():
    tensors = import_sd.checkpoint()
    assert len(tensors) == 1131
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * 1_066_235_307 + 8 * 77
    assert families.guess({name: a.shape for name, a in tensors.items()}) == "Stable Diffusion 1, single file"
    scales = {
        "model.diffusion_model.time_embed.0.weight": 320**-0.5,
        "first_stage_model.decoder.norm_out.weight": 0.01,
    }
    for name, scale in scales.items():
        drawn = np.asarray(tensors[name])
        np.testing.assert_array_equal(drawn, np.asarray(tensors[name]))
        assert abs(drawn.std() / scale - 1) < 0.2


def test_tables_from_made_up_figures():
    found = {"wall": 10.0, "cpu": 9.0, "peak": 5.0, "own": 1.0, "disk": 4.0}
    imports, calls = import_sd.tables({"bfloat16": found, "use": found | {"times": {"decode": (2.5, 2.0)}}}, 4.0)
    assert imports.rows == [["bfloat16", "10.0", "9.00", "5.00", "1.00", "4.00", "1.25"]]
    assert calls.rows == [["decode", "2.50", "2.00"]] and "Peak memory 5.00 GB" in calls.note
    assert import_sd.tables({}, 4.0)[0].rows == []
