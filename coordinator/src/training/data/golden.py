"""Writes golden.json: what NumPy and mlx-lm's own data code make of small data sets. Needs mlx-lm and the model of demo/."""

import json
import pathlib
import tempfile
import types

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import load
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parents[3] / "demo" / "model"


def permutations():
    cases = []
    for seed in [0, 1, 42, 2**31, 2**32 - 1]:
        np.random.seed(seed)
        draws = []
        for length in [1, 2, 10, 1000, 3, 10, 2, 70000, 7]:
            drawn = np.random.permutation(length)
            draws.append({"len": length, "first": drawn[:10].tolist(),
                          "weighed_sum": int((np.arange(1, length + 1) * drawn).sum())})
        cases.append({"seed": seed, "draws": draws})
    return cases


class Plain:
    """A data set that is there already: tuples of (tokens, offset), and rows with so many fields."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, idx):
        return {"index": idx, **{str(i): 0 for i in range(self.examples[idx]["fields"] - 1)}}

    def process(self, row):
        example = self.examples[row["index"]]
        return list(range(1 + row["index"], 1 + row["index"] + example["len"])), example["offset"]


def mask(batch, lengths):
    """Inputs, targets and mask, by the first lines of default_loss."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    steps = mx.arange(1, targets.shape[1] + 1)
    return inputs, targets, mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])


def counted(batch, lengths):
    """[position, input, target] of all that counts, row by row."""
    inputs, targets, chosen = (x.tolist() for x in mask(batch, lengths))
    return [[[at, i, t] for at, (i, t, c) in enumerate(zip(*row)) if c] for row in zip(inputs, targets, chosen)]


def summary(batch, lengths):
    rows = counted(batch, lengths)
    return [[row[0], row[-1], len(row)] if row else [] for row in rows]


def rows():
    cases = []
    rng = np.random.default_rng(5)
    shapes = [(n, o) for n in [1, 2, 31, 32, 33, 63, 64, 65, 100] for o in [0, 1, 2, 30, 64, 200]]
    for limit in [2, 32, 33, 64, 65, 1000]:
        examples = [{"len": n, "offset": o, "fields": 1} for n, o in shapes]
        rng.shuffle(examples)
        np.random.seed(limit)
        batches = [summary(*batch) for batch in iterate_batches(CacheDataset(Plain(examples)), 5, limit)]
        cases.append({"limit": limit, "batch_size": 5, "seed": limit, "examples": examples, "batches": batches})
    return cases


def examples(count, seed):
    rng = np.random.default_rng(seed)
    return [{"len": int(rng.integers(2, 40)), "offset": int(rng.integers(0, 5)), "fields": int(rng.integers(1, 4))} for _ in range(count)]




def runs():
    """Which examples `train` asks for, iteration by iteration, with evaluations between and a test after."""
    cases = []
    for seed, n_train, n_valid, batch_size, iters, every, val_batches in [
        (0, 22, 9, 4, 17, 5, 1), (1, 10, 12, 2, 12, 3, -1), (7, 9, 4, 4, 5, 2, 25), (2**32 - 1, 40, 30, 3, 30, 7, 4), (3, 5, 0, 2, 6, 2, 25),
        (4, 6, 8, 2, 8, 2, 0),
    ]:
        sets = {"train": examples(n_train, seed), "valid": examples(n_valid, 100 + seed % 1000), "test": examples(11, 200)}
        datasets = {name: CacheDataset(Plain(rows)) for name, rows in sets.items()}
        log = []

        def watched(dataset, batch_size, max_seq_length, loop=False, comm_group=None):
            kind = next(name for name, known in datasets.items() if known is dataset)
            for batch, lengths in iterate_batches(dataset, batch_size, max_seq_length, loop=loop):
                # The first token of example i is i + 1.
                log.append([kind, [int(first) - 1 for first in batch[:, 0].tolist()]])
                yield batch, lengths

        def loss(model, batch, lengths):
            return (model.weight * batch.astype(mx.float32).sum()).sum() * 0, lengths.sum()

        import mlx.nn as nn
        import mlx.optimizers as optim
        model = nn.Linear(1, 1, bias=False)
        np.random.seed(seed)
        args = TrainingArgs(batch_size=batch_size, iters=iters, val_batches=val_batches, steps_per_eval=every, steps_per_report=1000,
                            steps_per_save=1000, max_seq_length=64, adapter_file=tempfile.mkdtemp() + "/a.safetensors")
        train(model, optim.SGD(learning_rate=0), datasets["train"], datasets["valid"], args, loss=loss, iterate_batches=watched)
        trainer.evaluate(model, datasets["test"], batch_size, 2, 64, loss=loss, iterate_batches=watched)
        cases.append({"seed": seed, "batch_size": batch_size, "iters": iters, "steps_per_eval": every, "val_batches": val_batches,
                      **{name: [e["fields"] for e in rows] for name, rows in sets.items()}, "log": log})
    return cases


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}]
ROWS = {
    "text": [{"text": "Hello, wörld!\n"}, {"text": "a", "x": 1}, {"text": "ends<|im_end|>"}, {"text": "<think> 12 + 30</think>"}],
    "chat": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 30?"},
                      {"role": "assistant", "content": "42"}, {"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "43"}]},
        {"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "ok"}], "tools": TOOLS},
        {"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "Bye"}], "tools": None},
    ],
    "completions": [{"prompt": "What is 12 + 30?", "completion": "42"}, {"prompt": "é", "completion": "", "tools": TOOLS}],
    "renamed": [{"q": "What is 12 + 30?", "a": "42", "prompt": "no"}],
}


def tokenized():
    tokenizer = load(MODEL)
    cases = []
    for name, rows in ROWS.items():
        for mask_prompt in [False] if name == "text" else [False, True]:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder)
                (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                args = types.SimpleNamespace(data=folder, train=True, test=False, mask_prompt=mask_prompt)
                if name == "renamed":
                    args.prompt_feature, args.completion_feature = "q", "a"
                dataset = CacheDataset(load_dataset(args, tokenizer)[0])
            examples = [{"tokens": dataset[i][0], "offset": dataset[i][1], "order": dataset.itemlen(i)} for i in range(len(dataset))]
            cases.append({"name": name, "mask_prompt": mask_prompt, "rows": rows, "examples": examples})
    return cases


if __name__ == "__main__":
    golden = {"permutations": permutations(), "rows": rows(), "runs": runs(), "tokenized": tokenized()}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in golden.items())
    HERE.joinpath("golden.json").write_text("{\n" + text + "\n}\n")
