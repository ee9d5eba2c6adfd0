"""Writes a model folder with random weights, and pre-tokenised samples for it: what a measurement of speed needs where the
real weights are not at hand, and what both programs then train on.

    python make_random_model.py qwen2.5-1.5b FOLDER --length 2048 --samples 240

Weights are normal with deviation 0.02 (never zeros: on those a GPU runs faster than on any model), norms one. FOLDER gets
config.json, model.safetensors (bfloat16) and samples.jsonl (ids uniform over the vocabulary).
"""

import argparse
import json
from pathlib import Path

SHAPES = {
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, rope_theta=100000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "llama-3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "tiny": dict(
        model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
}  # fmt: skip
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DEVIATION = 0.02


def tensor_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by name."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(shape["num_hidden_layers"]):
        for name, size in linears.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = size
            if shape["model_type"] == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"model.layers.{layer}.{name}.bias"] = size[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    if not shape["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (shape["vocab_size"], hidden)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sample")
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    import torch
    from safetensors.torch import save_file

    shape = SHAPES[arguments.shape]
    generator = torch.Generator().manual_seed(arguments.seed)
    weights = {}
    for name, size in tensor_shapes(shape).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            weights[name] = (torch.randn(size, generator=generator) * DEVIATION).to(torch.bfloat16)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.folder / "model.safetensors", metadata=dict(format="pt"))
    config = shape | dict(
        architectures=[ARCHITECTURES[shape["model_type"]]], hidden_act="silu", torch_dtype="bfloat16",
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=1))
    ids = torch.randint(0, shape["vocab_size"], (arguments.samples, arguments.length), generator=generator)
    with (arguments.folder / "samples.jsonl").open("w") as out:
        out.writelines(json.dumps(dict(input_ids=row)) + "\n" for row in ids.tolist())


if __name__ == "__main__":
    main()
