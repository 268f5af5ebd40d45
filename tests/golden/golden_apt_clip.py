"""CLIP's text encoder with projection, and its tokenizer, against transformers.

The vocabulary of the tokenizer is apt/clip_merges.txt.gz: the merges that CLIP uses, from the file that OpenCLIP ships
under the MIT licence (its notice is beside it). Tolerance of outputs: 1e-4; ids and masks are equal.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden_core_autoencoders import assert_same, weights
from golden_harness import topic

from jaxdiff.data.clip_tokenizer import load_tokenizer, tokenize
from jaxdiff.pretrained import clip

ATOL = 1e-4
MERGES = Path(__file__).parent / "apt/clip_merges.txt.gz"
NOTES = ("source", "hidden_note")


@topic("apt/clip_text")
def clip_text(golden):
    config = json.loads(str(golden.input("cfg")))
    config = {key: value for key, value in config.items() if key not in NOTES}
    encoder = clip.text_encoder_from_config(config, projection="sd/text_projection.weight" in golden.arrays)
    state = weights(golden)
    params = clip.import_text_encoder(state, encoder)
    assert_same(clip.export_text_encoder(params, encoder), state)
    ids = jnp.asarray(golden.input("in/ids"))
    with jax.default_matmul_precision("highest"):
        features = jax.jit(lambda p: encoder.apply({"params": p}, ids))(params)
    golden.compare("out/last_hidden", features.tokens, atol=ATOL)
    golden.compare("out/pooled", features.pooled, atol=ATOL)
    golden.compare("out/text_embeds", features.projected, atol=ATOL)
    for i, hidden in enumerate(features.hidden):
        golden.compare(f"out/hidden_{i}", hidden, atol=ATOL)


@topic("apt/clip_tokenizer")
def clip_tokenizer(golden):
    config = json.loads(str(golden.input("cfg")))
    tokenizer = load_tokenizer(MERGES)
    texts = [str(text) for text in golden.input("texts")]
    ids, mask = tokenize(tokenizer, texts, length=config["length"])
    assert (tokenizer.start, tokenizer.end) == (config["bos"], config["eos"])
    golden.compare("ids", ids)
    golden.compare("mask", mask)
    tokens = {i: token for token, i in tokenizer.ids.items()}
    golden.compare("vocab_probe_str", np.asarray([tokens[i] for i in golden.input("vocab_probe_ids").tolist()]))
