"""Strict numerics and typed signatures for every test.

Rank promotion raises and dtype promotion is strict, so that [B] against [B, H, W, C] is an error and not an answer.
jaxtyping checks the annotations of the library while tests run; users do not pay for it.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the test time. Without fusion emitters it takes half the CPU time of level 0 alone (a UNet).
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"{QUICK_COMPILE} --xla_force_host_platform_device_count=4")

from jaxtyping import install_import_hook

install_import_hook("jaxdiff", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--golden-dir", default=None, help="folder of golden .npz files (default: tests/golden)")
