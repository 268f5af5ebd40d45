"""Classifiers of noisy images: logits and the gradient that guides, against guided-diffusion's EncoderUNetModel.

Tolerance: 1e-4 on the outputs, as for the other networks of these files; gradients of log p are of order 1, too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_networks import ATOL, nchw, nhwc, weights
from golden_harness import topic

from jaxdiff import guidance
from jaxdiff.pretrained import openai


def classifier(golden):
    config = golden.meta["config"]
    order = {"new_attention_order": config.get("use_new_attention_order", False)}
    network = openai.classifier_from_config(config)
    state = weights(golden)
    assert sum(tensor.size for tensor in state.values()) == golden.meta["params"]
    params = jax.tree.map(jnp.asarray, openai.import_classifier(state, network, **order))
    restored = openai.export_classifier(params, network, **order)
    assert restored.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(restored[name], tensor, err_msg=name)

    x, t = nhwc(golden.input("x")), jnp.asarray(golden.input("t"))
    labels = jnp.asarray(golden.input("y").astype(np.int32))

    def logits(x_t, t) -> Any:
        return network.apply({"params": params}, x_t, t, {})

    @jax.jit
    def outputs(x, t):
        return logits(x, t), guidance.class_gradient(logits, labels)(x, t)

    with jax.default_matmul_precision("highest"):
        out, gradient = outputs(x, t)
    golden.compare("logits", out, atol=ATOL)
    golden.compare("grad_logp_x", nchw(gradient), atol=ATOL)


for name in ("classifier_attention", "classifier_adaptive"):
    topic(f"core/{name}")(classifier)
