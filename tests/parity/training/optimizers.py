"""Are optimizers, learning rates, losses and random numbers those of Python's MLX, bit for bit, on the CPU?

    python tests/parity/training/optimizers.py [--only TEXT] [--seed N]

Works with the example `optimizers` of the crate mlx-cluster-lm. Ends with `N passed, N failed`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path.insert(1, str(root / "tests" / "harness"))

from mlx_lm.tuner.losses import js_div_loss, kl_div_loss
from mlx_lm.tuner.utils import build_schedule

from report import Report

STEPS = 12
# Factors wide, tall and square, an expert stack, a convolution, a bias, a scalar.
SHAPES = {
    "a.lora_a": (24, 8), "a.lora_b": (8, 40), "b.square": (16, 16), "c.stack": (3, 10, 7), "c.filter": (6, 3, 2, 4), "d.bias": (33,),
    "d.scalar": (),
}
# A cosine may differ in the last place, which is as much of the first rate, whatever is left of it.
RATE_TOLERANCE = 2**-23
# The MLX that Rust builds on: with it everything is equal. 0.32.4 sums 16-bit numbers on the CPU in another way, which matters to optimizers
# that take means and norms: then the difference is compared with the way that a parameter has gone, both as root mean squares.
OUR_MLX = "0.32.2"
SUMMING, SUM_TOLERANCE = (optim.Adafactor, optim.Muon), 0.15
DTYPES = {"f32": mx.float32, "bf16": mx.bfloat16}

ADAM = {"betas": [0.8, 0.97], "eps": 1e-6, "bias_correction": False}
SGD = {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False}
MUON = {"momentum": 0.9, "weight_decay": 0.03, "nesterov": True, "ns_steps": 5}
ADAFACTOR = {
    "eps": [1e-30, 1e-3], "clip_threshold": 1.0, "decay_rate": -0.8, "beta_1": None, "weight_decay": 0.0, "scale_parameter": True,
    "relative_step": True, "warmup_init": False,
}
OPTIMIZERS = {
    "adam": (optim.Adam, ADAM),
    "adam, corrected": (optim.Adam, {**ADAM, "betas": [0.9, 0.999], "eps": 1e-8, "bias_correction": True}),
    "adamw": (optim.AdamW, {**ADAM, "weight_decay": 0.3}),
    "adamw, corrected": (optim.AdamW, {**ADAM, "weight_decay": 0.01, "bias_correction": True}),
    "sgd": (optim.SGD, SGD),
    "sgd, decay": (optim.SGD, {**SGD, "weight_decay": 0.2}),
    "sgd, damped momentum": (optim.SGD, {**SGD, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd, nesterov": (optim.SGD, {**SGD, "momentum": 0.9, "nesterov": True}),
    "adafactor": (optim.Adafactor, ADAFACTOR),
    "adafactor, warm": (optim.Adafactor, {**ADAFACTOR, "warmup_init": True, "beta_1": 0.9, "weight_decay": 0.05}),
    "adafactor, rate": (optim.Adafactor, {**ADAFACTOR, "relative_step": False, "clip_threshold": 0.3, "decay_rate": -0.6}),
    "adafactor, plain rate": (optim.Adafactor, {**ADAFACTOR, "relative_step": False, "scale_parameter": False, "beta_1": 0.7}),
    "muon": (optim.Muon, MUON),
    "muon, plain": (optim.Muon, {**MUON, "nesterov": False, "weight_decay": 0.0, "ns_steps": 3}),
}
# As mlx-lm's `lr_schedule` has them, beside ours.
SCHEDULES = {
    "constant": (0.05, {"constant": {"rate": 0.05}}, None),
    "cosine": (("cosine_decay", [0.05, 9, 1e-3]), {"cosine": {"init": 0.05, "steps": 9, "end": 1e-3}}, None),
    "warm cosine": (("cosine_decay", [0.05, 6, 1e-3]), {"cosine": {"init": 0.05, "steps": 6, "end": 1e-3}}, {"init": 1e-4, "steps": 4}),
    "warm exponential": (("exponential_decay", [0.03, 0.9]), {"exponential": {"init": 0.03, "rate": 0.9}}, {"init": 0.0, "steps": 3}),
    "step": (("step_decay", [0.03, 0.7, 4]), {"step": {"init": 0.03, "rate": 0.7, "size": 4}}, None),
    "warm linear": (("linear_schedule", [0.07, 0.002, 7]), {"linear": {"init": 0.07, "end": 0.002, "steps": 7}}, {"init": 1e-3, "steps": 2}),
}


class Rust:
    """The example, and a folder for what goes to it and comes back."""

    def __init__(self, folder: Path):
        binary = os.environ.get("MLX_CLUSTER_OPTIMIZERS", root / "target" / "debug" / "examples" / "optimizers")
        self.folder = folder
        self.process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def file(self, name: str, arrays: dict[str, mx.array]) -> str:
        path = self.folder / f"{name}.safetensors"
        mx.save_safetensors(str(path), arrays)
        return str(path)

    def ask(self, kind: str, request: dict) -> tuple[dict, dict[str, mx.array]]:
        outputs = self.folder / "outputs.safetensors"
        outputs.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps({kind: {**request, "outputs": str(outputs)}}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the example ended with {self.process.wait()}")
        return json.loads(line), mx.load(str(outputs))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ulps(ours: mx.array, theirs: mx.array) -> int:
    """By how many representable numbers the farthest pair differs."""

    def ordered(x: mx.array) -> mx.array:
        bits = x.view(mx.int32).astype(mx.int64) if x.dtype == mx.float32 else x.view(mx.int16).astype(mx.int64)
        top = 1 << (31 if x.dtype == mx.float32 else 15)
        return mx.where(bits < 0, -top - bits, bits)

    return mx.abs(ordered(ours.flatten()) - ordered(theirs.flatten())).max().item()


def unequal(ours: dict[str, mx.array], theirs: dict[str, mx.array]) -> str | None:
    if set(ours) != set(theirs):
        return f"other names: {sorted(set(ours) ^ set(theirs))}"
    for name, wanted in theirs.items():
        got = ours[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{name}: {got.dtype} {got.shape} is not {wanted.dtype} {wanted.shape}"
        if not mx.isfinite(wanted).all().item():
            return f"{name} is not finite: the check says nothing"
        if apart := ulps(got, wanted):
            return f"{name} is off by up to {apart} ulp"
    return None


def far(ours: dict[str, mx.array], theirs: dict[str, mx.array], before: dict[str, mx.array]) -> str | None:
    """As `unequal`, where sums of 16-bit numbers went in."""
    if set(ours) != set(theirs) or any(ours[name].dtype != theirs[name].dtype for name in theirs):
        return "other names or types"

    def size(x: mx.array) -> float:
        return mx.sqrt(mx.mean(mx.square(x))).item()

    for name, wanted in theirs.items():
        wanted, got = wanted.astype(mx.float32), ours[name].astype(mx.float32)
        way = wanted - before[name].astype(mx.float32) if name in before else wanted
        rounded = 2**-9 * size(wanted) if name in before else 0.0
        if not size(got - wanted) <= SUM_TOLERANCE * size(way) + rounded:
            return f"{name} is off by {size(got - wanted):.2g} after a way of {size(way):.2g}"
    return None


def numbers(seed: int, dtype: mx.Dtype, scale: float) -> dict[str, mx.array]:
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    return {name: (scale * mx.random.normal(shape, key=key)).astype(dtype) for key, (name, shape) in zip(keys, SHAPES.items())}


def python_schedule(schedule: str):
    reference, _, warmup = SCHEDULES[schedule]
    if isinstance(reference, float):
        return reference
    config = {"name": reference[0], "arguments": reference[1]}
    return build_schedule({**config, "warmup": warmup["steps"], "warmup_init": warmup["init"]} if warmup else config)


def rust_schedule(schedule: str) -> dict:
    _, decay, warmup = SCHEDULES[schedule]
    return {"warmup": warmup, "decay": decay}


def name_of(kind: type) -> str:
    return kind.__name__.lower()


def check_optimizer(rust: Rust, name: str, schedule: str, dtype: mx.Dtype, seed: int) -> str | None:
    kind, options = OPTIMIZERS[name]
    before = parameters = numbers(seed, dtype, 0.5)
    gradients = [numbers(seed + 1 + step, dtype, 0.1) for step in range(STEPS)]
    named = {f"{step}.{parameter}": array for step, arrays in enumerate(gradients) for parameter, array in arrays.items()}
    request = {
        "optimizer": {name_of(kind): options}, "schedule": rust_schedule(schedule), "steps": STEPS,
        "parameters": rust.file("parameters", parameters), "gradients": rust.file("gradients", named),
    }
    answer, ours = rust.ask("optimizer", request)
    # The same rates for both, so that the update is compared by itself: see `check_rates`.
    rates = answer["learning_rates"][1:]
    optimizer = kind(learning_rate=rates[0], **options)
    optimizer.init(parameters)
    # As mlx-lm's trainer does: compiled matrices lie otherwise, and that is the order of sums.
    update = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    for rate, gradient in zip(rates, gradients, strict=True):
        optimizer.learning_rate = rate
        parameters = update(gradient, parameters)
        mx.eval(parameters, optimizer.state)
    remembers = kind is not optim.SGD or options["momentum"] > 0
    state = {f"{parameter}.{key}": array for parameter in SHAPES for key, array in optimizer.state[parameter].items() if remembers}
    theirs = {**parameters, **state}
    if dtype == mx.float32 or kind not in SUMMING or mx.__version__ == OUR_MLX:
        return unequal(ours, theirs)
    return far(ours, theirs, before)


def check_rates(rust: Rust, schedule: str) -> str | None:
    nothing = rust.file("nothing", {})
    request = {"optimizer": {"sgd": SGD}, "schedule": rust_schedule(schedule), "steps": STEPS, "parameters": nothing, "gradients": nothing}
    answer, _ = rust.ask("optimizer", request)
    optimizer = optim.SGD(learning_rate=python_schedule(schedule))
    wanted = [optimizer.learning_rate.item()]
    for _ in range(STEPS):
        optimizer.apply_gradients({}, {})
        wanted.append(optimizer.learning_rate.item())
    apart = max(abs(ours - theirs) for ours, theirs in zip(answer["learning_rates"], wanted, strict=True))
    return None if apart <= RATE_TOLERANCE * max(wanted) else f"off by {apart:.2g}: {answer['learning_rates']} {wanted}"


def check_cross_entropy(rust: Rust, dtype: mx.Dtype, seed: int) -> str | None:
    """The same operations, so the same bits."""
    keys = mx.random.split(mx.random.key(seed), 3)
    logits = (3 * mx.random.normal((37, 501), key=keys[0])).astype(dtype)
    targets = mx.random.randint(0, 501, (37,), key=keys[1]).astype(mx.uint32)
    cotangents = mx.random.uniform(shape=(37,), key=keys[2]).astype(dtype)
    inputs = rust.file("inputs", {"logits": logits, "targets": targets, "cotangents": cotangents})
    _, ours = rust.ask("loss", {"loss": "cross_entropy", "temperature": 1.0, "inputs": inputs})
    losses, gradients = mx.vjp(lambda logits: nn.losses.cross_entropy(logits, targets), [logits], [cotangents])
    return unequal(ours, {"losses": losses[0], "gradients": gradients[0]})


def check_divergence(rust: Rust, loss: str, reference, temperature: float, dtype: mx.Dtype, seed: int) -> str | None:
    """mlx-lm's Metal kernels compute in f32 and round at the end. The last bits are free: sums are in another order there too."""
    keys = mx.random.split(mx.random.key(seed), 3)
    student, teacher = ((3 * mx.random.normal((37, 501), key=key)).astype(dtype) for key in keys[:2])
    cotangents = mx.random.uniform(shape=(37,), key=keys[2]).astype(dtype)
    inputs = rust.file("inputs", {"logits": student, "targets": teacher, "cotangents": cotangents})
    _, ours = rust.ask("loss", {"loss": loss, "temperature": temperature, "inputs": inputs})
    softened = [x.astype(mx.float32) * (1 / temperature) for x in (student, teacher)]
    losses, gradients = mx.vjp(lambda q: reference(q, softened[1]), [softened[0]], [cotangents.astype(mx.float32)])
    for name, wanted in {"losses": losses[0], "gradients": gradients[0] * (1 / temperature)}.items():
        if ours[name].dtype != dtype:
            return f"{name} in {ours[name].dtype}"
        # Log-probabilities down to -20 are rounded in f32 before they cancel.
        bound = (1e-6 if dtype == mx.float32 else 2**-8) * mx.abs(wanted) + 1e-6
        apart = mx.abs(ours[name].astype(mx.float32) - wanted)
        if not mx.all(apart <= bound).item():
            return f"{name} are off by up to {apart.max().item():.2g}"
    return None


def check_random(rust: Rust, seed: int, name: str) -> str | None:
    start = hashlib.sha256(b"uniform" + seed.to_bytes(8, "little") + name.encode()).digest()[:8]
    wanted = mx.random.uniform(-0.25, 0.25, (31, 17), key=mx.random.key(int.from_bytes(start, "big")))
    _, ours = rust.ask("random", {"seed": seed, "name": name, "shape": [31, 17], "low": -0.25, "high": 0.25})
    return unequal(ours, {"drawn": wanted})


def checks(rust: Rust, seed: int):
    for schedule in SCHEDULES:
        yield f"learning rate, {schedule}", partial(check_rates, rust, schedule)
    for dtype_name, dtype in DTYPES.items():
        for number, name in enumerate(OPTIMIZERS):
            schedule = list(SCHEDULES)[number % len(SCHEDULES)]
            yield f"{name}, {schedule}, {dtype_name}", partial(check_optimizer, rust, name, schedule, dtype, seed + 100 * number)
        yield f"cross entropy, {dtype_name}", partial(check_cross_entropy, rust, dtype, seed)
        for loss, reference in (("kl_divergence", kl_div_loss), ("js_divergence", js_div_loss)):
            for temperature in (1.0, 3.0):
                title = f"{loss}, temperature {temperature}, {dtype_name}"
                yield title, partial(check_divergence, rust, loss, reference, temperature, dtype, seed)
    yield "uniform numbers", partial(check_random, rust, seed, "layers.3.mlp.down_proj.lora_a")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a check's name")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="optimizers-") as scratch:
        rust = Rust(Path(scratch))
        for name, check in checks(rust, args.seed):
            if args.only in name:
                report.check(name, check)
        rust.close()
    report.close()


if __name__ == "__main__":
    main()
