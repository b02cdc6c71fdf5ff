"""The same model in plain `torch.nn`, as one would write it in PyTorch 2: what `bench --against=torch` runs.

Images are `[B, 3, H, W]` float32. Attention is `scaled_dot_product_attention` on one fused qkv layer, the quantizer is
SimVQ as published (arXiv 2411.02038), the optimizer the fused AdamW. bfloat16 is autocast; the quantizer stays float32,
as ours does. What is compiled is a block, once for all that have its shape, and the quantizer: PyTorch's "regional
compilation", which is ready in a fraction of the time of a whole model. A generator is Qwen3 in `transformers`, sampled
by its `generate`. Weights are random.

A program of its own, `python pytorch.py JSON`, that imports nothing of ours: JAX must not count as PyTorch's memory.
The JSON holds `case`, `batch`, `threads`, `device`, `dtype`, `compile`, and of a tokenizer `image_size`, `patch_size`,
`codes`, `code_dim`, `search_dim`, `encoder`, `decoder` (the fields of a TransformerSpec each), `cls_token` and
`optimizer` (the arguments of `TrainStep`); of a generator `lm` (the fields of an LMSpec), and the tokens before an
image and of an image, `prefix` and `tokens`.
"""

import copy
import json
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.optim.swa_utils import get_ema_multi_avg_fn  # pyright: ignore[reportMissingImports]


class Attention(nn.Module):
    def __init__(self, spec: SimpleNamespace):
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, spec: SimpleNamespace):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        activation = nn.GELU(approximate="tanh" if spec.activation == "gelu_tanh" else "none")
        self.mlp = nn.Sequential(nn.Linear(spec.width, spec.mlp_dim), activation,
                                 nn.Linear(spec.mlp_dim, spec.width))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Sequential):
    def __init__(self, spec: SimpleNamespace):
        super().__init__(*(Block(spec) for _ in range(spec.depth)), nn.LayerNorm(spec.width, eps=spec.norm_eps))


class Encoder(nn.Module):
    def __init__(self, spec: SimpleNamespace, *, grid: int, patch_size: int):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, spec.width, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(grid**2, spec.width))
        self.transformer = Transformer(spec)

    def forward(self, images):
        x = self.patch_embedding((images - 0.5) / 0.5).flatten(2).transpose(1, 2)
        return self.transformer(x + self.position_embedding)


class SimVQ(nn.Module):
    codebook: torch.Tensor

    def __init__(self, *, width: int, size: int, dim: int):
        super().__init__()
        self.register_buffer("codebook", dim**-0.5 * torch.randn(size, dim))
        self.projection = nn.Linear(dim, dim)
        self.into, self.out = (nn.Identity(), nn.Identity()) if dim == width else \
            (nn.Linear(width, dim), nn.Linear(dim, width))

    def forward(self, z):
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(self.into(z.float()))

    def _quantize(self, z):
        codes = self.projection(self.codebook)
        with torch.no_grad():
            flat = z.reshape(-1, z.shape[-1])
            distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
            indices = distances.argmin(1).view(z.shape[:-1])
        q = F.embedding(indices, codes)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return self.out(z + (q - z).detach()), indices, loss

    def lookup(self, indices):
        return self.out(self.projection(F.embedding(indices, self.codebook)))


class Decoder(nn.Module):
    def __init__(self, spec: SimpleNamespace, *, latent_width: int, grid: int, patch_size: int, cls_token: bool):
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, spec.width)) if cls_token else None
        self.embedding = nn.Linear(latent_width, spec.width)
        self.register_buffer("positions", torch.randn(grid**2, spec.width))
        self.transformer = Transformer(spec)
        self.pixels = nn.Linear(spec.width, patch_size**2 * 3)

    def forward(self, z):
        x = self.embedding(z) + self.positions
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = self.pixels(self.transformer(x)[:, 0 if self.cls is None else 1:])
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)), self.patch_size) * 0.5 + 0.5


class Model(nn.Module):
    def __init__(self, encoder: SimpleNamespace, decoder: SimpleNamespace, *, grid: int, patch_size: int, codes: int,
                 code_dim: int, cls_token: bool):
        super().__init__()
        self.encoder = Encoder(encoder, grid=grid, patch_size=patch_size)
        self.quantizer = SimVQ(width=encoder.width, size=codes, dim=code_dim)
        self.decoder = Decoder(decoder, latent_width=encoder.width, grid=grid, patch_size=patch_size,
                               cls_token=cls_token)

    @torch.inference_mode()
    def encode_to_indices(self, images):
        return self.quantizer(self.encoder(images))[1]

    @torch.inference_mode()
    def decode_from_indices(self, indices):
        return self.decoder(self.quantizer.lookup(indices)).clamp(0, 1)


class TrainStep:
    """Pixel loss and the quantizer's, clipped gradient, AdamW, EMA of the weights.

    In stage 1 the encoder is frozen; in stage 2 it learns, and a copy of it as it began is its teacher.
    """

    def __init__(self, model: Model, *, stage: int, lr: float, b1: float, b2: float, weight_decay: float,
                 clip_norm: float, ema_decay: float):
        self.model, self.clip_norm = model, clip_norm
        self.teacher = copy.deepcopy(model.encoder).requires_grad_(False) if stage == 2 else None
        model.encoder.requires_grad_(stage == 2)
        self.learned = [p for p in model.parameters() if p.requires_grad]
        matrices, rest = [p for p in self.learned if p.ndim > 1], [p for p in self.learned if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(b1, b2), fused=True)
        self.ema = [p.detach().clone() for p in self.learned] if ema_decay else []
        self.average: Any = get_ema_multi_avg_fn(ema_decay)

    def __call__(self, images):
        images = images.float() / 255
        with torch.set_grad_enabled(self.teacher is not None):
            features = self.model.encoder(images)
        z_q, _, vq_loss = self.model.quantizer(features)
        loss = F.mse_loss(self.model.decoder(z_q).float(), images) + vq_loss
        if self.teacher is not None:
            with torch.no_grad():
                targets = self.teacher(images)
            loss = loss + F.mse_loss(features.float(), targets.float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.learned, self.clip_norm)
        self.optimizer.step()
        if self.ema:
            self.average(self.ema, self.learned, None)
        return loss.item()


@torch.no_grad()
def ema_vq_search(z, codes, counts, sums, *, decay: float = 0.99, eps: float = 1e-5):
    """The usual EMA VQ: distances, argmin, one-hot, lookup and statistics by matmul (van den Oord et al. 2017)."""
    distances = z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T
    indices = distances.argmin(1)
    one_hot = F.one_hot(indices, len(codes)).type(z.dtype)
    z_q = one_hot @ codes
    counts.mul_(decay).add_(one_hot.sum(0), alpha=1 - decay)
    sums.mul_(decay).add_(one_hot.T @ z, alpha=1 - decay)
    total = counts.sum()
    codes.copy_(sums / ((counts + eps) / (total + len(codes) * eps) * total).unsqueeze(1))
    return z_q, indices


def _case(job: SimpleNamespace):
    """A function that does the job once."""
    if "lm" in vars(job):
        return _generate(job, SimpleNamespace(**job.lm))
    grid = job.image_size // job.patch_size
    if job.case == "search":
        z, codes = torch.randn(job.batch * grid**2, job.search_dim), torch.randn(job.codes, job.search_dim)
        counts, sums = torch.ones(job.codes), codes.clone()
        search: Any = torch.compile(ema_vq_search) if job.compile else ema_vq_search
        return lambda: search(z, codes, counts, sums)
    encoder, decoder = SimpleNamespace(**job.encoder), SimpleNamespace(**job.decoder)
    model = Model(encoder, decoder, grid=grid, patch_size=job.patch_size, codes=job.codes, code_dim=job.code_dim,
                  cls_token=job.cls_token)
    if job.compile:
        for module in model.modules():
            if isinstance(module, Block | SimVQ):
                module.compile()
    if job.case == "encode":
        images = torch.rand(job.batch, 3, job.image_size, job.image_size)
        return lambda: model.encode_to_indices(images)
    if job.case == "decode":
        indices = torch.randint(0, job.codes, (job.batch, grid**2))
        return lambda: model.decode_from_indices(indices)
    step = TrainStep(model, stage=int(job.case.removeprefix("train_stage")), **job.optimizer)
    images = torch.randint(0, 256, (job.batch, 3, job.image_size, job.image_size), dtype=torch.uint8, device="cpu")
    return lambda: step(images.to(job.device))


def _generate(job: SimpleNamespace, spec: SimpleNamespace):
    from transformers import Qwen3Config, Qwen3ForCausalLM  # pyright: ignore[reportMissingImports]

    model: Any = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=spec.vocabulary, hidden_size=spec.width, num_hidden_layers=spec.depth,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, head_dim=spec.head_dim,
        intermediate_size=spec.mlp_dim, rms_norm_eps=spec.norm_eps, tie_word_embeddings=spec.tied,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        max_position_embeddings=spec.max_positions)).eval()
    tokens = torch.randint(0, spec.vocabulary, (job.batch, job.prefix))
    return lambda: model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                                  max_new_tokens=job.tokens)


def main() -> None:
    """The protocol of `bench.serve`: how many images a run has; a line in, its seconds out; then peak memory."""
    job = SimpleNamespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.set_default_device(job.device)
    on_gpu = job.device == "cuda"
    case = _case(job)

    def run():
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bfloat16" and job.case != "search"):
            case()
        if on_gpu:
            torch.cuda.synchronize()

    run()
    print(job.batch, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(torch.cuda.max_memory_allocated() if on_gpu else own, flush=True)


if __name__ == "__main__":
    main()
