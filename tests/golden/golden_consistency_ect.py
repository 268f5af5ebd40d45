"""Golden topic of easy consistency tuning: the release's loss with its draws replayed, one case a row of settings.

The network of `golden_consistency_denoise` under EDM's preconditioning.
"""

import jax.numpy as jnp
from golden_consistency_denoise import EDM, arrays, compare_gradient, net_of, with_gradient
from golden_harness import topic

from jaxdiff import losses
from jaxdiff.methods.easy_consistency import constant_widening, easy_loss, gap, sigmoid_widening


@topic("consistency/ect")
def ect(file):
    x0, eps, normal, abc = arrays(file, "images", "eps", "rnd_normal", "abc")
    names = [str(name) for name in file.input("case_columns")]
    for i, row in enumerate(file.input("cases").tolist()):
        case = dict(zip(names, row, strict=True))
        t = jnp.exp(case["P_mean"] + case["P_std"] * normal)
        widening = sigmoid_widening(case["k"], case["b"]) if case["is_sigmoid"] else constant_widening
        width = gap(t, jnp.int32(case["stage"]), case["q"], widening)
        file.compare(f"case{i}_t", t, rtol=1e-5)
        file.compare(f"case{i}_r", t - width, rtol=1e-5, atol=1e-7)
        distance = losses.pseudo_huber(case["c"]) if case["c"] > 0 else losses.euclidean

        def loss(abc, t=t, width=width, distance=distance):
            return easy_loss(net_of(abc, EDM), x0, eps, t, width, distance)

        value, gradient = with_gradient(loss, abc)
        file.compare(f"case{i}_loss", value, rtol=2e-4)
        compare_gradient(file, f"case{i}_grad_abc", gradient)
