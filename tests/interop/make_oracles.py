"""Makes tests/fixtures/oracles/: RoPE frequencies and logits of tiny random models, from transformers.

    python tests/interop/make_oracles.py [--out tests/fixtures/oracles]

Float64 values are true float64 (see true_float64.py). Nothing here is computed by our own formulas.
"""

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama

from true_float64 import RefuseFloat32, TrueFloat64

# 3 query heads of width 16 on one key-value head; an inner width that is no multiple of 16.
TINY = dict(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=True,
)

YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32)

# name -> (config, tokens a row, the config entry without which the logits must differ)
MODELS = {
    "mistral_window": (
        lambda **other: MistralConfig(
            **TINY | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=4) | other
        ),
        20,
        dict(sliding_window=None),
    ),
    "qwen2_window": (
        lambda **other: Qwen2Config(**TINY | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1) | other),
        20,
        dict(max_window_layers=2),
    ),
    "qwen3_layer_types": (
        lambda **other: Qwen3Config(
            **TINY
            | dict(head_dim=32, intermediate_size=40, use_sliding_window=True, sliding_window=4, max_window_layers=2)
            | dict(layer_types=["sliding_attention", "full_attention"])
            | other
        ),
        20,
        dict(layer_types=["full_attention", "sliding_attention"]),
    ),
    "llama_biases": (
        lambda **other: LlamaConfig(**TINY | dict(attention_bias=True, mlp_bias=True) | other),
        20,
        dict(mlp_bias=False),
    ),
    "llama_yarn": (
        lambda **other: LlamaConfig(**TINY | dict(rope_parameters=YARN) | other),
        48,
        dict(rope_parameters=dict(rope_type="default", rope_theta=1000.0)),
    ),
    "llama_linear": (
        lambda **other: LlamaConfig(
            **TINY | dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)) | other
        ),
        20,
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
}

# Qwen2.5 with the long-context setting of its model card; the rest varies one thing each.
QWEN_YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
SHORT_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0)
# name -> (head width, max_position_embeddings, rope_parameters)
ROPES = {
    "default": (64, 8192, dict(rope_type="default", rope_theta=100000.0)),
    "default_theta_1e6": (128, 32768, dict(rope_type="default", rope_theta=1e6)),
    "linear": (128, 16384, dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "llama3_8": (128, 131072, LLAMA3 | dict(factor=8.0, original_max_position_embeddings=8192)),
    "llama3_32": (64, 131072, LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192)),
    "yarn": (128, 131072, QWEN_YARN),
    "yarn_truncate": (128, 131072, QWEN_YARN | dict(truncate=True)),
    "yarn_no_truncate": (128, 131072, QWEN_YARN | dict(truncate=False)),
    "yarn_betas": (128, 131072, QWEN_YARN | dict(beta_fast=16.0, beta_slow=2.0)),
    "yarn_attention_factor": (128, 131072, QWEN_YARN | dict(attention_factor=0.75)),
    "yarn_mscale": (64, 131072, QWEN_YARN | dict(factor=40.0, mscale=0.707, mscale_all_dim=1.0)),
    "yarn_mscale_equal": (64, 131072, QWEN_YARN | dict(factor=40.0, mscale=1.0, mscale_all_dim=1.0)),
    "yarn_mscale_alone": (64, 131072, QWEN_YARN | dict(factor=40.0, mscale=0.5)),
    "yarn_short": (32, 512, SHORT_YARN),
    "yarn_short_no_truncate": (32, 512, SHORT_YARN | dict(truncate=False)),
    # Both ends of the ramp fall on the same dimension: transformers then widens it by 0.001.
    "yarn_empty_ramp": (32, 512, SHORT_YARN | dict(original_max_position_embeddings=4)),
    # The original length is not given: it is max_position_embeddings.
    "yarn_no_original_length": (64, 4096, dict(rope_type="yarn", rope_theta=10000.0, factor=2.0)),
}


def version_4(config: dict) -> dict:
    """The same config.json as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype, no layer types."""
    old = copy.deepcopy(config)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")  # the name of the first years
    old["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if old["model_type"] != "qwen3":  # there the layer types say more than the other entries
        old.pop("layer_types", None)
    return old | dict(transformers_version="4.46.0")


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def rope_oracle(head_dim: int, max_position_embeddings: int, rope_parameters: dict) -> dict:
    """Inverse frequencies [head_dim / 2] and the factor on cosine and sine."""
    entries = dict(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_position_embeddings,
        rope_parameters=rope_parameters,
    )

    def compute():
        rotary = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(entries)))
        return rotary.inv_freq, float(rotary.attention_scaling)

    single, _ = compute()
    with TrueFloat64(), RefuseFloat32():
        double, attention_factor = compute()
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    difference = float(((single - double) / double).abs().max())
    assert difference < 4e-6, f"float32 and float64 differ by {difference}"
    config = dict(model_type="llama", **entries)
    return dict(
        config=config,
        config_v4={key: value for key, value in version_4(config).items() if key != "transformers_version"},
        inv_freq=double.tolist(),
        attention_factor=attention_factor,
        inv_freq_f32_largest_relative_error=difference,
    )


def random_model(config) -> torch.nn.Module:
    """Weights that leave no part without influence on the logits."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * values)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * values)
            elif "embed" in name:
                parameter.copy_(0.3 * values)
            else:
                parameter.copy_(1.5 * values / math.sqrt(parameter.shape[1]))
    return model.eval()


def float64_logits(config, state: dict, input_ids: torch.Tensor) -> torch.Tensor:
    with TrueFloat64():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
        model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
        with torch.no_grad(), RefuseFloat32():
            return model.eval()(input_ids=input_ids, use_cache=False).logits


def model_oracle(folder: Path, make_config, token_count: int, without: dict) -> dict:
    """Writes one model with its logits; returns the figures for oracles.json."""
    model = random_model(make_config())
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config_v4.json", version_4(config))

    input_ids = torch.randint(3, TINY["vocab_size"], (2, token_count), generator=torch.Generator().manual_seed(11))
    state = model.state_dict()
    logits = float64_logits(make_config(), state, input_ids)
    with torch.no_grad():
        single = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids).logits
    old = float64_logits(AutoConfig.for_model(**version_4(config)), state, input_ids)
    assert torch.equal(old, logits), "version 4 of the config means another model"
    changed = float((float64_logits(make_config(**without), state, input_ids) - logits).abs().max())
    assert changed > 0.1, f"{without} changes the logits by {changed} only"
    drift = float((single - logits).abs().max())
    assert drift < 1e-4, f"float32 differs from float64 by {drift}"

    save_file(dict(input_ids=input_ids.to(torch.int32), logits_f64=logits.contiguous()), folder / "expected.safetensors")
    return dict(
        logits_largest=float(logits.abs().max()),
        logits_f32_largest_error=drift,
        without=without,
        logits_change_without=changed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/fixtures/oracles"))
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)

    versions = dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    write_json(out / "rope.json", dict(versions, cases={name: rope_oracle(*case) for name, case in ROPES.items()}))
    figures = {}
    for name, case in MODELS.items():
        shutil.rmtree(out / name, ignore_errors=True)
        figures[name] = model_oracle(out / name, *case)
        print(name, figures[name])
    write_json(out / "oracles.json", dict(versions, models=figures))


if __name__ == "__main__":
    main()
