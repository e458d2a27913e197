"""Published number formats: fp8 with scales, packed int4, mxfp4 blocks; and weights that they hold exactly, so that nothing is lost."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from .publishing import Layout
from .row import Weights

# Sides of a block of an fp8 matrix that share a scale, and the largest e4m3 number.
BLOCK, LARGEST_FP8 = 128, 448.0


def blocks(weight: mx.array) -> mx.array:
    """`[rows, BLOCK, columns, BLOCK]`, filled up with zeros."""
    rows, columns = (-side % BLOCK for side in weight.shape)
    padded = mx.pad(weight, ((0, rows), (0, columns)))
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def whole(parts: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The matrix of these blocks, without what filled them up."""
    return parts.reshape(parts.shape[0] * BLOCK, -1)[: shape[0], : shape[1]]


def block_scales(weight: mx.array) -> mx.array:
    """Powers of two, so that code times scale is exact in bf16."""
    largest = mx.abs(blocks(weight)).max(axis=(1, 3))
    return mx.power(2.0, mx.ceil(mx.log2(largest / LARGEST_FP8)))


def fp8_codes(weight: mx.array, scales: mx.array) -> mx.array:
    return whole(mx.to_fp8(blocks(weight) / scales[:, None, :, None]), weight.shape)


def fp8_rounded(weight: mx.array) -> mx.array:
    """The nearest matrix that fp8 blocks hold exactly."""
    scales = block_scales(weight)
    codes = blocks(mx.from_fp8(fp8_codes(weight, scales), dtype=mx.float32))
    return whole(codes * scales[:, None, :, None], weight.shape)


def fp8_blocks(chosen: Callable[[str], bool]) -> Layout:
    """The chosen matrices as e4m3 codes and `weight_scale_inv`, one number a block."""

    def store(weights: Weights, _: dict) -> Weights:
        out = dict(weights)
        for name in filter(chosen, weights):
            scales = block_scales(weights[name])
            out |= {name: fp8_codes(weights[name], scales), f"{name}_scale_inv": scales}
        return out

    return store


def declare_fp8(folder: Path) -> None:
    """Gives fp8 codes their type in the files, where mlx knows only bytes: it reads that type, but cannot write it."""
    headers = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        headers[file] = (json.loads(data[8:end]), data[end:])
    names = {name for header, _ in headers.values() for name in header}
    for file, (header, data) in headers.items():
        codes = {name for name in header if f"{name}_scale_inv" in names and header[name]["dtype"] == "U8"}
        for name in codes:
            header[name]["dtype"] = "F8_E4M3"
        if codes:
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def each_matrix(change: Callable[[mx.array], mx.array], weight: mx.array) -> mx.array:
    """The change of a matrix, or of each of a stack of them."""
    return change(weight) if weight.ndim == 2 else mx.stack([change(matrix) for matrix in weight])


def int4_rounded(weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of mlx's affine 4 bits in groups of 32, where code 8 is always zero."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    scales = (mx.abs(groups).max(axis=-1) / 7).astype(mx.bfloat16)
    codes = mx.clip(mx.round(groups / scales[..., None].astype(mx.float32)) + 8, 0, 15).astype(mx.uint32)
    words = (codes.reshape(*weight.shape[:-1], -1, 8) << (4 * mx.arange(8, dtype=mx.uint32))).sum(axis=-1).astype(mx.uint32)
    return words, scales, -8 * scales


def int4_experts(weights: Weights) -> Weights:
    """The experts in 4 bits without a zero point, so that a packed checkpoint holds them exactly."""
    out = {}
    for name, value in weights.items():
        if ".switch_mlp." in name:
            out |= dict(zip((name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")), int4_rounded(value)))
        else:
            out[name] = value
    return out


def int4_packed(weights: Weights, _: dict) -> Weights:
    """`weight_packed`, `weight_scale` and `weight_shape`, as compressed-tensors packs what is quantised."""
    out = {}
    for name, value in weights.items():
        base, _, kind = name.rpartition(".")
        if f"{base}.scales" not in weights:
            out[name] = value
        elif kind == "weight":
            out |= {f"{name}_packed": value.view(mx.int32), f"{name}_shape": mx.array([value.shape[0], value.shape[1] * 8], dtype=mx.int32)}
        elif kind == "scales":
            out[f"{base}.weight_scale"] = value
    return out


def mxfp4_experts(marker: str) -> Callable[[Weights], Weights]:
    """The experts' matrices in mxfp4, as mlx holds it."""

    def quantize(weights: Weights) -> Weights:
        out = {}
        for name, value in weights.items():
            if marker in name and name.endswith(".weight"):
                out[name], out[name.replace(".weight", ".scales")] = mx.quantize(value, 32, 4, mode="mxfp4")
            else:
                out[name] = value
        return out

    return quantize
