"""CLIP text encoders of transformers: saved there, imported, the same outputs; exported, read there, the same again."""

import jax
import numpy as np
import pytest
import torch
from exchange import assert_close, drawn, there_and_back
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CONFIG = dict(
    vocab_size=60, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=16,
)  # fmt: skip
ENCODERS = {
    "clip_l": (CLIPTextModel, dict(hidden_act="quick_gelu", bos_token_id=58, eos_token_id=59)),
    # As old configurations have it: 2 is read as the largest id.
    "open_clip": (CLIPTextModel, dict(hidden_act="gelu", bos_token_id=0, eos_token_id=2, projection_dim=24)),
    "projection": (CLIPTextModelWithProjection, dict(hidden_act="gelu", projection_dim=24, eos_token_id=59)),
    "quick_projection": (CLIPTextModelWithProjection, dict(hidden_act="quick_gelu", projection_dim=8, eos_token_id=7)),
}
TOKENS = np.random.default_rng(0).integers(8, 58, (3, 16)).astype(np.int32)
TOKENS[0, 9:], TOKENS[1, 15], TOKENS[2, 4:] = 59, 59, 59
TOKENS[:, 12] = 7, 7, 59
TOKENS[2, 11] = 7


@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoder(name, tmp_path):
    kind, settings = ENCODERS[name]
    ours, back = there_and_back("clip-text", model := drawn(kind(CLIPTextConfig(**CONFIG | settings))), tmp_path)
    found = jax.jit(ours.spec.network.apply)({"params": ours.params}, TOKENS)
    for peer in (model, back):
        with torch.inference_mode():
            theirs = peer(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
        assert_close(found.tokens, theirs.last_hidden_state)
        assert len(found.hidden) == len(theirs.hidden_states) == 4
        for one, other in zip(found.hidden, theirs.hidden_states, strict=True):
            assert_close(one, other)
        if kind is CLIPTextModel:
            assert_close(found.pooled, theirs.pooler_output)
        else:
            assert_close(found.projected, theirs.text_embeds)
