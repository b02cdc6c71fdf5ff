"""Writes tests/reference: tiny Hugging Face folders with random weights and the tokens PyTorch computes from them.

    python tests/make_encoder_references.py

Needs torch and transformers; the tests that read the result do not.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

REFERENCE = Path(__file__).parent / "reference"
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # no family's own: they must come from the file
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 40, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 7}
MAE_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
               "decoder_intermediate_size": 16}

# name -> what is saved (with the towers and heads that real checkpoints carry along), and sides to run it at:
# the native one, a larger and a smaller one.
CASES = {
    "siglip_vision": (lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**SMALL, intermediate_size=48)), (40, 56, 24)),
    "siglip": (lambda: transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=SMALL | {"intermediate_size": 64}, text_config=TEXT)), (40, 48, 32)),
    "dinov2": (lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SMALL | {"patch_size": 7, "image_size": 35}, mlp_ratio=2)), (35, 49, 21)),
    "dinov2_with_registers": (lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_register_tokens=3)), (40, 56, 24)),
    "vit_mae": (lambda: transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**SMALL, intermediate_size=48, mask_ratio=0.0, **MAE_DECODER)), (40, 56, 24)),
}


def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Draws every parameter, so that none is hidden behind a zero or a one; outputs stay O(1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lambda" in name or (parameter.ndim == 1 and name.endswith("weight")):  # layer scale, LayerNorm
                parameter.copy_(1 + 0.3 * noise)
            elif "token" in name or "position" in name:
                parameter.copy_(0.7 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    for name in ("vision_model", "dinov2", "vit"):
        model = getattr(model, name, model)
    return model


@torch.no_grad()
def torch_tokens(model: torch.nn.Module, images: np.ndarray, image_size: int) -> np.ndarray:
    """[B, H, W, 3] in [0, 1] -> the patch tokens [B, N, d] of the PyTorch model."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (image_size, image_size), mode="bicubic", align_corners=False)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tower = vision_tower(model).eval()
    tokens = (image_size // tower.config.patch_size) ** 2
    options = {} if tower.config.model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
    if tower.config.model_type == "vit_mae":  # nothing masked, nothing shuffled
        options["noise"] = torch.arange(tokens).repeat(len(x), 1)
    return tower(x, **options).last_hidden_state[:, -tokens:].numpy()


def make_reference(name: str, *, images: np.ndarray, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Saves a random model of the case to `folder`; returns its tokens as {"<final_norm>_<image_size>": [B, N, d]}.

    The last LayerNorm is affine at every size, and plain at the larger one.
    """
    make_model, sizes = CASES[name]
    model = make_model()
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}) + "\n")
    tokens = {f"affine_{size}": torch_tokens(model, images, size) for size in sizes}
    tower = vision_tower(model)
    norm = tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.layernorm
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    return tokens | {f"plain_{sizes[1]}": torch_tokens(model, images, sizes[1])}


def main() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 44, 44, 3), dtype=np.uint8)
    REFERENCE.mkdir(exist_ok=True)
    np.save(REFERENCE / "images.npy", images)
    for seed, name in enumerate(CASES):
        folder = REFERENCE / name
        tokens = make_reference(name, images=np.float32(images) / 255, folder=folder, seed=seed)
        np.savez(folder / "tokens.npz", **tokens)
        for key, value in tokens.items():
            print(f"{name:24} {key:10} {value.shape} mean {value.mean():+.2f} std {value.std():.2f}")


if __name__ == "__main__":
    main()
