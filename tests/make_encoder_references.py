"""Writes tests/reference: tiny Hugging Face folders with random weights and the tokens PyTorch computes from them.

    python tests/make_encoder_references.py

Folders that exist stay as they are. Needs torch and transformers; the tests that read the result do not.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

REFERENCE = Path(__file__).parent / "reference"
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]  # no family's own: they must come from the file
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 40, "patch_size": 8}
TINY = SMALL | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 7}
MAE_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
               "decoder_intermediate_size": 16}


class InternViTBlock(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.ls1, self.ls2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, config.intermediate_size),
                                  "fc2": nn.Linear(config.intermediate_size, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1 * self.attn["proj"](y)
        return x + self.ls2 * self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class InternViT(nn.Module):
    """InternVisionModel, with the parameter names of OpenGVLab's remote code (modeling_intern_vit.py)."""

    def __init__(self, **options):
        super().__init__()
        config = self.config = SimpleNamespace(
            **{"model_type": "intern_vit_6b", "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True,
               "qk_normalization": False, "norm_type": "layer_norm"} | options)
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.embeddings.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.grid = config.image_size // config.patch_size
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.hidden_size))
        self.encoder.layers = nn.ModuleList(InternViTBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, images: torch.Tensor, output_hidden_states: bool) -> SimpleNamespace:
        patches = self.embeddings.patch_embedding(images)
        cls, positions = self.embeddings.position_embedding.split([1, self.grid**2], dim=1)
        positions = positions.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        positions = nn.functional.interpolate(positions, patches.shape[-2:], mode="bicubic", align_corners=False)
        x = (patches + positions).flatten(2).transpose(1, 2)
        x = torch.cat([(self.embeddings.class_embedding + cls).expand(len(x), -1, -1), x], dim=1)
        states = [x]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=states)

    def save_pretrained(self, folder: Path) -> None:
        """Writes bfloat16, as the hub has it, and rounds the parameters to it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.load_state_dict(self.bfloat16().state_dict())
        save_file(self.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        self.float()
        (folder / "config.json").write_text(json.dumps(vars(self.config), indent=2) + "\n")


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
    # As in SigLIP-so400m/14 at 384: heads 12 wide, an odd MLP, and 2 pixels of 44 that belong to no patch of 6.
    "siglip_so400m": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        **TINY | {"image_size": 44, "patch_size": 6}, intermediate_size=37, vision_use_head=False)), (44, 48, 30)),
    "dinov3_vit": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **TINY, intermediate_size=40, num_register_tokens=3)), (40, 48, 24)),
    "intern_vit": (lambda: InternViT(**TINY, intermediate_size=40), (40, 48, 24)),
}


def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Draws every parameter, so that none is hidden behind a zero or a one; outputs stay O(1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lambda" in name or ".ls" in name or (parameter.ndim == 1 and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)  # layer scale, LayerNorm
            elif "token" in name or "position" in name or "class" in name:
                parameter.copy_(0.7 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    for name in ("vision_model", "dinov2", "vit"):
        model = getattr(model, name, model)
    return model


def final_norm(tower: torch.nn.Module) -> torch.nn.Module | None:
    """Its last LayerNorm, where it has one."""
    names = ("post_layernorm", "layernorm", "norm")
    return next((getattr(tower, name) for name in names if hasattr(tower, name)), None)


def load_model(folder: Path) -> torch.nn.Module:
    """A saved vision tower; every tensor of the file must have its place, and every parameter its tensor."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "intern_vit_6b":
        model = InternViT(**config)
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return model
    options = {"mask_ratio": 0.0} if config["model_type"] == "vit_mae" else {}
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert set(info["missing_keys"]) <= {"embeddings.mask_token"}, info  # unused in inference
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


def torch_tokens(model: torch.nn.Module, images: np.ndarray, image_size: int) -> np.ndarray:
    """[B, H, W, 3] in [0, 1] -> the patch tokens [B, N, d] of the PyTorch model."""
    return torch_layers(model, images, image_size)[-1]


@torch.no_grad()
def torch_layers(model: torch.nn.Module, images: np.ndarray, image_size: int) -> list[np.ndarray]:
    """The patch tokens of all `hidden_states`, each after the last LayerNorm; the last is the model's own output."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(x, (image_size, image_size), mode="bicubic", align_corners=False)
    tower = vision_tower(model).eval()
    tokens = (image_size // tower.config.patch_size) ** 2
    output = run_tower(tower, x)
    normalize = final_norm(tower) or nn.Identity()
    states = [normalize(state) for state in output.hidden_states[:-1]] + [output.last_hidden_state]
    return [state[:, -tokens:].numpy() for state in states]


def run_tower(tower: torch.nn.Module, x: torch.Tensor) -> SimpleNamespace:
    """What the tower makes of images `[B, 3, H, H]` in [0, 1]."""
    tokens = (x.shape[-1] // tower.config.patch_size) ** 2
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    interpolates = tower.config.model_type.startswith(("siglip", "vit_mae"))
    options = {"interpolate_pos_encoding": True} if interpolates else {}
    if tower.config.model_type == "vit_mae":  # nothing masked, nothing shuffled
        options["noise"] = torch.arange(tokens).repeat(len(x), 1)
    return tower(x, output_hidden_states=True, **options)


@torch.no_grad()
def torch_cls(model: torch.nn.Module, images: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [B, H, W, 3] -> the class token [B, d] of the PyTorch model, images resized as dgm-eval does by default."""
    resized = [Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BICUBIC) for image in images]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 255
    return run_tower(vision_tower(model).eval(), x).last_hidden_state[:, 0].numpy()


def make_reference(name: str, *, images: np.ndarray, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Saves a random model of the case to `folder`; returns its tokens as {"<final_norm>_<image_size>": [B, N, d]}.

    The last LayerNorm is affine at every size, and, where there is one, plain at the larger one.
    """
    make_model, sizes = CASES[name]
    model = make_model()
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}) + "\n")
    tokens = {f"affine_{size}": torch_tokens(model, images, size) for size in sizes}
    norm = final_norm(vision_tower(model))
    if norm is None:
        return tokens
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    return tokens | {f"plain_{sizes[1]}": torch_tokens(model, images, sizes[1])}


def make_embeddings(images: np.ndarray) -> dict[str, np.ndarray]:
    """{"<case>_<image_size>": class tokens [B, d]} of the saved models that have one, at the smaller size."""
    cases = {name: sizes[-1] for name, (_, sizes) in CASES.items() if not name.startswith("siglip")}
    return {f"{name}_{size}": torch_cls(load_model(REFERENCE / name), images, size) for name, size in cases.items()}


@torch.no_grad()
def make_pair_reference(*, images: np.ndarray, token_ids: np.ndarray, folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Saves a random SigLIP with both towers to `folder`; returns its embeddings and logits of images and texts."""
    model = transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=TINY | {"intermediate_size": 40},
        text_config=TEXT | {"num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 12,
                            "projection_size": TINY["hidden_size"]}))
    randomize(model, seed=seed)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}) + "\n")
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = nn.functional.interpolate(x, (TINY["image_size"],) * 2, mode="bicubic", align_corners=False)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    output = model.eval()(input_ids=torch.from_numpy(token_ids), pixel_values=x)
    return {name: output[name].numpy() for name in ("image_embeds", "text_embeds", "logits_per_image")}


def main() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 44, 44, 3), dtype=np.uint8)
    REFERENCE.mkdir(exist_ok=True)
    np.save(REFERENCE / "images.npy", images)
    for seed, name in enumerate(CASES):
        folder = REFERENCE / name
        if folder.exists():
            continue
        tokens = make_reference(name, images=np.float32(images) / 255, folder=folder, seed=seed)
        np.savez(folder / "tokens.npz", **tokens)
        for key, value in tokens.items():
            print(f"{name:24} {key:10} {value.shape} mean {value.mean():+.2f} std {value.std():.2f}")
    if not (REFERENCE / "embeddings.npz").exists():
        np.savez(REFERENCE / "embeddings.npz", **make_embeddings(images))
    if not (folder := REFERENCE / "siglip_pair").exists():
        token_ids = np.random.default_rng(0).integers(0, 30, (5, 12))
        outputs = make_pair_reference(images=np.float32(images) / 255, token_ids=token_ids, folder=folder, seed=100)
        np.savez(folder / "embeddings.npz", token_ids=token_ids, **outputs)


if __name__ == "__main__":
    main()
