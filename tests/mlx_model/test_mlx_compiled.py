"""The whole model under mx.compile, on the CPU: one trace of native ops for every token."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'hadamoe[mlx]')")
from hadamoe import mlx_host  # noqa: E402
from hadamoe.mlx_cache import make_prompt_cache  # noqa: E402
from hadamoe.mlx_static import CompiledStep  # noqa: E402

if mlx_host.bridge is None:
    pytest.skip(
        "_mlx was not built for the installed mlx (HM_MLX=1 pip install .)", allow_module_level=True
    )


@pytest.mark.parametrize("name", ["stdlib_jangtq2", "stdlib_mxfp4"])
def test_compiled_steps_give_the_same_logits(name, load, checkpoint):
    model, tokenizer = load(name)
    text = (checkpoint("stdlib_bf16") / "heldout.txt").read_text()
    tokens = mx.array(tokenizer.encode(text[:300]))[None]
    cache = make_prompt_cache(model, "hk4v3")
    model(tokens[:, :280], cache=cache)
    step = CompiledStep(model, cache, room=12)
    for i in range(280, 292):
        expected = model(tokens[:, i : i + 1], cache=cache)
        np.testing.assert_allclose(step(tokens[:, i : i + 1]), expected, rtol=1e-5, atol=1e-5)
