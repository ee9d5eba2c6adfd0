"""Compares an adapter's GGUF file, as the gguf package reads it, with the adapter's own folder.

usage: python tests/interop/check_gguf_adapter.py ADAPTER ADAPTER.gguf BASE   (pip install gguf safetensors numpy)

Names are gguf's own for the base's architecture, rows are put in llama.cpp's order by the formula of its converter, and the
scale α/r must be the adapter's. Every value must be equal to the bit.
"""
import json, math, pathlib, sys
import gguf, numpy
from safetensors.numpy import load_file

adapter, file, base = map(pathlib.Path, sys.argv[1:])
config = json.loads((adapter / "adapter_config.json").read_text())
shape = json.loads((base / "config.json").read_text())
architecture = {"mistral": "llama", "gemma3_text": "gemma3"}.get(shape["model_type"], shape["model_type"])
reader = gguf.GGUFReader(file)
field = lambda name: reader.fields[name].contents()
assert field("general.architecture") == architecture, field("general.architecture")
assert (field("general.type"), field("adapter.type")) == ("adapter", "lora")
rank = config["r"]
scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
assert abs(field("adapter.lora.alpha") / rank - scale) <= 1e-6 * scale, (field("adapter.lora.alpha"), rank, scale)

kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
names = gguf.get_tensor_name_map(kind, shape["num_hidden_layers"])
found = {tensor.name: tensor.data for tensor in reader.tensors}
expected = load_file(adapter / "adapter_model.safetensors")
assert len(found) == len(expected), (len(found), len(expected))
for name, values in expected.items():
    module, letter = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
    target = names.get_name(module + ".weight", try_suffixes=(".weight",))
    heads = {"q_proj": shape["num_attention_heads"], "k_proj": shape["num_key_value_heads"]}.get(module.rsplit(".", 1)[1])
    if architecture == "llama" and letter == "B" and heads:
        rows, columns = values.shape
        values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    ours = found[f"{target}.lora_{letter.lower()}"]
    assert ours.shape == values.shape and numpy.array_equal(ours, values), name
print(f"{file}: {len(found)} tensors for {architecture}, equal to the bit, scale {scale:g}")
