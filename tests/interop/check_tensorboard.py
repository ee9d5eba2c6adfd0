"""Reads a run's TensorBoard files with TensorBoard's own reader and compares every value with metrics.jsonl.

usage: python tests/interop/check_tensorboard.py OUTPUT   (pip install tensorboard)

Each scalar must be there at each step, once, equal to the float32 nearest to the figure of metrics.jsonl.
"""
import json, math, pathlib, struct, sys
from tensorboard import version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

output = pathlib.Path(sys.argv[1])
single = lambda value: struct.unpack("f", struct.pack("f", value))[0]
expected = {}
for line in (output / "metrics.jsonl").read_text().splitlines():
    figures = json.loads(line)
    values = {}
    if "event" not in figures:
        values = {f"training/{key}": figures[key] for key in ("loss", "grad_norm", "learning_rate")}
        values["training/tokens_per_second"] = figures["tokens"] / figures["seconds"]
    else:
        values = {"validation/loss": figures["loss"], "validation/token_accuracy": figures["token_accuracy"]}
        values |= {f"validation_loss_by_hash/{hash}": one["loss"] for hash, one in figures["by_hash"].items()}
    for tag, value in values.items():
        expected.setdefault(tag, []).append((figures["step"], single(math.nan if value is None else value)))

(file,) = (output / "tensorboard").iterdir()
records = sum(1 for _ in RawEventFileLoader(str(file)).Load())
reader = EventAccumulator(str(output / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
reader.Reload()
tags = reader.Tags()
found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags["scalars"]}
if not found:  # newer readers keep scalars as tensors
    from tensorboard.util import tensor_util
    found = {tag: [(event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
                   for event in reader.Tensors(tag)] for tag in tags["tensors"]}
assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
for tag in expected:
    assert str(found[tag]) == str(expected[tag]), (tag, found[tag], expected[tag])
points = sum(map(len, expected.values()))
print(f"{file}: {records} records, {len(found)} scalars with {points} points, equal; TensorBoard {version.VERSION}")
