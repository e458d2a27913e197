"""Is a fused model what mlx-lm makes of base and adapter? LoRA, DoRA and whole parameters, dense, quantised and as published.

    python tests/parity/training/fuse.py [--only TEXT] [--every] [--seed N]

mlx-lm reads what `mlx-cluster fuse` writes, and its logits are compared with those of base and adapter side by side; of quantised bases, the
tensors are compared with those of mlx-lm's own fusing. `--every` takes every row of the table of architectures too. Ends with `N passed, N failed`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path[0] = str(Path(__file__).parent.parent)
sys.path.insert(1, str(root / "tests" / "harness"))

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import dequantize_model, load_model

import models
from architectures import rows
from architectures.fabricate import build as build_row
from architectures.row import Row
from models import AFFINE4, Case, config
from report import Report

RANK, SCALE = 4, 2.0
PROMPT = [5, 17, 99, 200, 31, 8, 8, 64, 250, 3, 77, 140]
# Of the largest logit: f32 sums in another order.
TOLERANCE = 2e-5
# The same of numbers with 8 bits of mantissa, each of which may be rounded the other way.
BF16_TOLERANCE = 5e-2
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


@dataclass
class Fuse:
    name: str
    base: Case | Row
    kind: str = "lora"
    # Paths inside a layer or from the root; None: all that a layer has.
    keys: list[str] | None = None
    num_layers: int = 2
    quantization: dict | None = None
    published: bool = False
    dequantize: bool = False
    bf16: bool = False
    # A part of the error that it ends with.
    refused: str | None = None


LLAMA = config("llama", num_hidden_layers=3)
TIED = config("llama", num_hidden_layers=3, tie_word_embeddings=True, attention_bias=True)
MOE = config("qwen3_moe", num_hidden_layers=2, **models.MOE)
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def table(title: str) -> Row:
    return next(row for row in rows() if row.title == title)


def cases() -> list[Fuse]:
    llama, tied = Case("llama", LLAMA), Case("tied", TIED)
    affine, mxfp4 = Case("llama", LLAMA, AFFINE4), Case("llama", LLAMA, MXFP4)
    apart, quantised_apart = Case("moe", MOE, experts_apart=True), Case("mixtral", models.FAMILIES["mixtral"], AFFINE4, experts_apart=True)
    mixed = Case("llama", LLAMA, AFFINE4, {"model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 8}, "lm_head": False})
    gemma, hybrid = table("gemma"), table("qwen3_next")
    return [
        Fuse("llama, lora", llama),
        Fuse("llama, lora of some linears of all layers", llama, keys=ATTENTION, num_layers=-1),
        Fuse("llama, dora", llama, "dora"),
        Fuse("llama, whole parameters", llama, "full"),
        Fuse("llama with biases, tied, lora with the embedding", tied, keys=[*ATTENTION, "model.embed_tokens"]),
        Fuse("llama with biases, tied, dora with the embedding", tied, "dora", keys=[*ATTENTION, "model.embed_tokens"]),
        Fuse("llama bf16, lora", llama, bf16=True),
        Fuse("llama bf16, dora", llama, "dora", bf16=True),
        Fuse("llama affine4, lora with the embedding", affine, keys=[*ATTENTION, "mlp.down_proj", "model.embed_tokens", "lm_head"]),
        Fuse("llama affine4, dora", affine, "dora"),
        Fuse("llama affine4, whole parameters", affine, "full"),
        Fuse("llama affine4, lora, as floats", affine, dequantize=True),
        Fuse("llama affine4, dora, as floats", affine, "dora", dequantize=True),
        Fuse("llama with schemes of single layers, lora", mixed, keys=["mlp.down_proj", "lm_head"]),
        Fuse("llama with schemes of single layers, lora, as floats", mixed, keys=["mlp.down_proj"], dequantize=True),
        Fuse("llama mxfp4, lora", mxfp4),
        Fuse("llama mxfp4, lora, as floats", mxfp4, dequantize=True),
        Fuse("qwen3_moe, lora", Case("moe", MOE)),
        Fuse("qwen3_moe, experts apart, lora", apart),
        Fuse("qwen3_moe, experts apart, whole parameters", apart, "full"),
        Fuse("mixtral affine4, experts apart, lora", quantised_apart),
        Fuse("mixtral affine4, experts apart, lora, as floats", quantised_apart, dequantize=True),
        Fuse("gemma, lora", gemma),
        Fuse("gemma, whole parameters", gemma, "full"),
        Fuse("qwen3_next as published, lora", hybrid, published=True),
        Fuse("qwen3_next as published, whole parameters", hybrid, "full", published=True),
        Fuse("gpt_oss with mxfp4 blocks as published, lora", table("gpt_oss mxfp4"), published=True),
        Fuse("minimax_m2 with fp8 blocks as published, lora", table("minimax_m2 fp8"), published=True, refused="add --dequantize"),
        Fuse("minimax_m2 with fp8 blocks as published, lora, as floats", table("minimax_m2 fp8"), published=True, dequantize=True),
    ]


def every() -> list[Fuse]:
    """Each architecture under mlx's names and, where mlx-lm reads them, the published ones."""
    found = []
    for row in rows():
        # mlx-lm itself cannot wrap all linears of that one.
        kinds = ("full",) if row.model_type == "gemma3n" else ("lora", "full")
        if "lora" in kinds:
            found.append(Fuse(f"{row.title}, lora", row))
            if row.quantizes:
                found += [Fuse(f"{row.title} affine4, lora{', as floats' * floats}", row, quantization=AFFINE4, dequantize=floats) for floats in (False, True)]
        if row.published and row.mlx_lm_loads:
            # Layouts that can be read and not be written.
            floats = "fp8" in row.name or "int4" in row.name
            found += [Fuse(f"{row.title} as published, {kind}{', as floats' * floats}", row, kind, published=True, dequantize=floats) for kind in kinds]
    return found


def build(case: Fuse, folder: Path, seed: int) -> Path:
    match case.base:
        case Row():
            build_row(case.base, folder, seed, case.quantization, case.published)
        case base:
            models.build(base, folder, seed)
    if case.bf16:
        for path in folder.glob("*.safetensors"):
            weights = {name: value.astype(mx.bfloat16) for name, value in mx.load(str(path)).items()}
            mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    return folder


def adapter(case: Fuse, model: nn.Module, folder: Path, seed: int) -> None:
    """A random adapter of mlx-lm's own shapes and names."""
    mx.random.seed(seed + 1)
    folder.mkdir()
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0, **({"keys": case.keys} if case.keys else {})}
    settings = {"fine_tune_type": case.kind, "num_layers": case.num_layers, "lora_parameters": parameters, "model": "random/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if case.kind == "full":
        model.freeze()
        for layer in model.layers[-max(case.num_layers, 0) :]:
            layer.unfreeze()
        trained = dict(tree_flatten(model.trainable_parameters()))
        # Quantised words cannot be trained.
        trained = {name: value for name, value in trained.items() if mx.issubdtype(value.dtype, mx.floating)}
        weights = {name: (value * (1 + 0.1 * mx.random.normal(value.shape))).astype(value.dtype) for name, value in trained.items()}
    else:
        parameters = {**parameters, "keys": set(case.keys)} if case.keys else parameters
        linear_to_lora_layers(model, case.num_layers, parameters, use_dora=case.kind == "dora")
        leaves = {name: value for name, value in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}
        weights = {name: moved(name, value) for name, value in leaves.items()}
    if not weights:
        raise ValueError("an adapter of nothing")
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


def moved(name: str, value: mx.array) -> mx.array:
    if name.endswith(".m"):
        return value * (1 + 0.1 * mx.random.normal(value.shape))
    return value if name.endswith("lora_a") else 0.1 * mx.random.normal(value.shape)


def fuse(case: Fuse, base: Path, adapters: Path, target: Path) -> str | None:
    """None, or the error. A plan reads the result as strictly as an engine does, but for the numbers."""
    fused = run("fuse", "--model", base, "--adapter-path", adapters, "--save-path", target, *["--dequantize"] * case.dequantize)
    return fused or run("plan", "--model", target, "--memory", "8GB")


def run(*args) -> str | None:
    binary = os.environ.get("MLX_CLUSTER_BIN", str(root / "target" / "debug" / "mlx-cluster"))
    done = subprocess.run([binary, *args], capture_output=True, text=True, timeout=120)
    return done.stderr.strip()[-400:] if done.returncode else None


def fused_by_mlx_lm(base: Path, adapters: Path, dequantize: bool) -> nn.Module:
    """The lines of `mlx_lm.fuse.main` between loading and saving."""
    model = load_adapters(load_model(base)[0], adapters)
    fused = [(name, module.fuse(dequantize=dequantize)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    return dequantize_model(model) if dequantize else model


def logits(model: nn.Module) -> mx.array:
    return model(mx.array([PROMPT]), cache=make_prompt_cache(model))[0].astype(mx.float32)


def check(case: Fuse, seed: int) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        base, adapters, target = (Path(scratch) / name for name in ("base", "adapters", "fused"))
        build(case, base, seed)
        model, base_config = load_model(base)
        before = logits(model)
        adapter(case, model, adapters, seed)
        error = fuse(case, base, adapters, target)
        if case.refused:
            return None if error and case.refused in error and not target.exists() else f"not refused: {error}"
        if error:
            return error
        both = logits(load_adapters(load_model(base)[0], adapters))
        ours, config = load_model(target)
        if case.dequantize == ("quantization" in config) and "quantization" in base_config:
            return f"quantization: {config.get('quantization')}"
        theirs = fused_by_mlx_lm(base, adapters, case.dequantize)
        changed = mx.abs(both - before).max().item() / mx.abs(both).max().item()
        if changed < 1e-3:
            return f"the adapter changes logits by {changed:.1e} alone"
        quantised = "quantization" in base_config or "quantization_config" in base_config
        if quantised and not case.dequantize:
            return same_tensors(ours, theirs)
        tolerance = BF16_TOLERANCE if case.bf16 or mx.bfloat16 in {value.dtype for _, value in tree_flatten(ours.parameters())} else TOLERANCE
        # Numbers that were quantised are rounded on their way to floats, and a router may pick another expert for that.
        apart = None if quantised else close("base and adapter", logits(ours), both, tolerance)
        return apart or close("mlx-lm's fusing", logits(ours), logits(theirs), tolerance)


def close(what: str, ours: mx.array, theirs: mx.array, tolerance: float) -> str | None:
    apart = mx.abs(ours - theirs).max().item() / mx.abs(theirs).max().item()
    return None if apart < tolerance else f"{apart:.1e} from {what}"


def same_tensors(ours: nn.Module, theirs: nn.Module) -> str | None:
    ours, theirs = dict(tree_flatten(ours.parameters())), dict(tree_flatten(theirs.parameters()))
    if ours.keys() != theirs.keys():
        return f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    different = [name for name, value in ours.items() if value.dtype != theirs[name].dtype or not mx.array_equal(value, theirs[name])]
    return f"{len(different)} tensors differ, the first is {different[0]}" if different else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    report = Report()
    for case in [*cases(), *(every() if args.every else [])]:
        if args.only in case.name:
            report.check(case.name, check, case, args.seed)
    report.close()


if __name__ == "__main__":
    main()
