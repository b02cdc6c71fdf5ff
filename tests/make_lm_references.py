"""Writes tests/reference/qwen3*: tiny folders of Qwen3ForCausalLM with random weights, and PyTorch's logits.

    python -m tests.make_lm_references

Folders that exist stay as they are. Needs torch and transformers; the tests that read the result do not.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.make_encoder_references import REFERENCE, randomize

# Heads are not width / heads wide, and share keys.
TINY = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64}
# name -> options and the size of a file
CASES = {"qwen3": ({"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
                   "1MB"),
         "qwen3_tied": ({"tie_word_embeddings": True, "rms_norm_eps": 0.01}, "20KB")}


def make_reference(name: str, *, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Saves a random model of the case to `folder`; returns tokens [2, 11] and their logits [2, 11, vocabulary]."""
    options, shard_size = CASES[name]
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, **options))
    randomize(model, seed=seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokens = np.random.default_rng(seed).integers(0, TINY["vocab_size"], (2, 11))
    return {"tokens": tokens, "logits": torch_logits(folder, tokens)}


@torch.no_grad()
def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits of a saved model, every tensor of which must have its place, and every parameter its tensor."""
    model, info = transformers.Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def main() -> None:
    for seed, name in enumerate(CASES):
        if not (folder := REFERENCE / name).exists():
            np.savez(folder / "logits.npz", **make_reference(name, folder=folder, seed=seed))


if __name__ == "__main__":
    main()
