"""Makes tests/fixtures/tiny_gemma*, tiny_phi3* and tiny_llama_long: random models with ten steps of PEFT in float64, and greedy answers.

    python tests/interop/make_families.py [--out tests/fixtures] [NAME ...]

Float64 is true float64 (see true_float64.py). Samples run one by one, so that none sees another's length: LongRoPE chooses its
factors by the longest text of a batch. What the folders hold says tests/fixtures/README.md.
"""

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
)

from true_float64 import RefuseFloat32, TrueFloat64

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
)
GEMMA = TINY | dict(head_dim=16)
PHI = TINY | dict(bos_token_id=1, eos_token_id=2)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# Of 12 columns that are rotated, 6 pairs; texts of more than 12 tokens are long.
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.05, 1.1, 1.25, 1.5, 2.0],
    long_factor=[1.0, 1.5, 2.25, 4.0, 6.5, 8.0],
    partial_rotary_factor=0.75,
)

# name -> (config, targets, how it is written in version 4, an entry without which the logits must differ)
MODELS = {
    "tiny_gemma": (lambda **o: GemmaConfig(**GEMMA | o), ALL, {}, None),
    "tiny_gemma2": (
        lambda **o: Gemma2Config(
            **GEMMA
            | dict(sliding_window=5, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
            | o
        ),
        ALL,
        {},
        dict(attn_logit_softcapping=None),
    ),
    "tiny_gemma3": (
        lambda **o: Gemma3TextConfig(
            **GEMMA
            | dict(sliding_window=5, query_pre_attn_scalar=24, layer_types=["sliding_attention", "full_attention"])
            | dict(
                rope_parameters=dict(
                    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                    sliding_attention=dict(rope_type="default", rope_theta=1000.0),
                )
            )
            | o
        ),
        ALL,
        dict(sliding_window_pattern=2),
        dict(layer_types=["full_attention", "sliding_attention"]),
    ),
    "tiny_phi3": (
        lambda **o: Phi3Config(**PHI | dict(sliding_window=6, rms_norm_eps=1e-5) | o),
        FUSED,
        {},
        dict(sliding_window=None),
    ),
    "tiny_phi3_longrope": (
        lambda **o: Phi3Config(
            **PHI
            | dict(num_hidden_layers=1, tie_word_embeddings=True, rms_norm_eps=1e-5)
            | dict(original_max_position_embeddings=12, rope_parameters=copy.deepcopy(LONGROPE))
            | o
        ),
        FUSED,
        {},
        dict(original_max_position_embeddings=60),
    ),
    "tiny_llama_long": (
        lambda **o: LlamaConfig(**TINY | dict(head_dim=64, intermediate_size=136, max_position_embeddings=256) | o),
        ALL,
        {},
        None,
    ),
}
LENGTHS = [16, 12, 7]
# Where they are others: more than a tile of Hopper's attention.
LONG_LENGTHS = {"tiny_llama_long": [150, 12, 70]}
RANK, RATE, STEPS = 2, 5e-3, 10
PROMPT, NEW_TOKENS = 6, 16


def version_4(config: dict, more: dict) -> dict:
    """The same config.json as transformers 4 wrote it: no layer types, rotary settings beside the others."""
    old = copy.deepcopy(config) | more
    rope = old.pop("rope_parameters")
    old["torch_dtype"] = old.pop("dtype")
    old.pop("layer_types", None)
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope.pop("original_max_position_embeddings", None)  # beside the others already
    if rope["rope_type"] == "longrope":
        rope["type"] = rope.pop("rope_type")
    old["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    if old["model_type"].startswith("gemma"):
        old.pop("tie_word_embeddings", None)  # the default of the base class, which version 4 left out
    return old | dict(transformers_version="4.50.0")


def random_weights(config) -> dict:
    """Weights that leave no part without influence."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    is_gemma = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((0.0 if is_gemma else 1.0) + 0.2 * values)
            elif "embed" in name:
                parameter.copy_((0.1 if is_gemma else 0.3) * values)
            else:
                parameter.copy_(1.2 * values / math.sqrt(parameter.shape[1]))
    return model


def load(config, state: dict) -> torch.nn.Module:
    """In float64; to be called inside TrueFloat64."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    model.load_state_dict({name: tensor.double() for name, tensor in state.items()}, strict=False)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    return model.eval()


def batch(lengths: list) -> list:
    """(ids, labels) of each sample; the first has a prompt without loss."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, TINY["vocab_size"], (1, length), generator=generator)
        labels = ids.clone()
        labels[:, : 5 if index == 0 else 0] = -100
        samples.append((ids, labels))
    return samples


def sample_logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def mean_loss(model, samples: list) -> torch.Tensor:
    total, count = 0.0, 0
    for ids, labels in samples:
        logits = sample_logits(model, ids)[0, :-1]
        targets = labels[0, 1:]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    return total / count


def train(model, samples: list, folder: Path) -> dict:
    """Ten steps as the other golden models make them; writes the first gradients."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trainable]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = mean_loss(model, samples)
        loss.backward()
        if step == 0 and parameters[0].dtype == torch.float64:
            gradients = {name.replace(".default", ""): parameter.grad.clone() for name, parameter in trainable}
            save_file(gradients, folder / "grads_step0_brand_f64.safetensors")
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return dict(losses=losses, grad_norms=norms, loss_after_10=mean_loss(model, samples).item())


def with_adapter(model, targets: list) -> torch.nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # the same in either precision
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.3 - 0.15)
            elif "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def save_adapter(model, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= dict(base_model_name_or_path=None, target_modules=sorted(config["target_modules"]))
    path.write_text(json.dumps(config, indent=2) + "\n")


def greedy(model, prompt: torch.Tensor) -> list:
    """New tokens of generate() with its cache; the same token by token over whole texts, each clearly ahead of the next."""
    answer = model.generate(
        prompt, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, use_cache=True, eos_token_id=None
    )
    text = prompt
    for _ in range(NEW_TOKENS):
        best = sample_logits(model, text)[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "two tokens are too close"
        text = torch.cat([text, best.indices[:1][None]], dim=1)
    assert torch.equal(answer, text), f"{answer} with the cache, {text} without"
    return answer[0, prompt.shape[1] :].tolist()


def make(folder: Path, lengths: list, make_config, targets: list, old_entries: dict, without: dict | None) -> dict:
    shutil.rmtree(folder, ignore_errors=True)
    base = random_weights(make_config())
    base.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = json.loads((folder / "config.json").read_text())
    old = version_4(config, old_entries)
    (folder / "config_v4.json").write_text(json.dumps(old, indent=2) + "\n")

    samples = batch(lengths)
    single = with_adapter(base.train(), targets)
    save_adapter(single, folder / "adapter_init_brand")
    runs = dict(brand_f32=train(single, samples, folder))
    with TrueFloat64(), torch.no_grad(), RefuseFloat32():
        model = load(make_config(), state)
        logits = [sample_logits(model, ids)[0] for ids, _ in samples]
        old_model = load(AutoConfig.for_model(**version_4(config, old_entries)), state)
        same = [sample_logits(old_model, ids)[0] for ids, _ in samples]
        assert all(torch.equal(one, other) for one, other in zip(logits, same)), "version 4 means another model"
        if without:
            other = load(make_config(**without), state)
            changed = max(float((sample_logits(other, ids)[0] - z).abs().max()) for (ids, _), z in zip(samples, logits))
            assert changed > 0.02, f"{without} changes the logits by {changed} only"
    with TrueFloat64():
        with torch.no_grad():
            # The most varied of the answers to three prompts says the most.
            prompts = [ids[:, :PROMPT] for ids, _ in samples]
            prompt, answer = max(((p, greedy(model, p)) for p in prompts), key=lambda pair: len(set(pair[1])))
        double = with_adapter(load(make_config(), state), targets).double()
        with torch.no_grad(), RefuseFloat32():
            mean_loss(double, samples)
        runs["brand_f64"] = train(double.train(), samples, folder)
    final = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(double).items()}
    (folder / "adapter_final_brand").mkdir()
    save_file(final, folder / "adapter_final_brand" / "adapter_model_f64.safetensors")
    finals = get_peft_model_state_dict(single)
    drift = max(float((tensor - finals[name].double()).abs().max()) for name, tensor in final.items())
    runs["brand_final_adapter_max_abs_diff_f32_f64"] = drift

    def padded(rows: list, filler: int) -> torch.Tensor:
        wide = [torch.nn.functional.pad(row, (0, lengths[0] - row.shape[-1]), value=filler) for row in rows]
        return torch.cat(wide).to(torch.int32).contiguous()

    all_logits = [torch.nn.functional.pad(z, (0, 0, 0, lengths[0] - z.shape[0])) for z in logits]
    save_file(
        dict(
            input_ids=padded([ids for ids, _ in samples], 0),
            labels=padded([labels for _, labels in samples], -100),
            attention_mask=padded([torch.ones_like(ids) for ids, _ in samples], 0),
            logits_f64=torch.stack(all_logits),
        ),
        folder / "forward.safetensors",
    )
    golden = dict(
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        lora=dict(r=RANK, alpha=2 * RANK, target_modules=targets),
        optim=dict(lr=RATE),
        logits_abs_max=max(float(z.abs().max()) for z in logits),
        generation=dict(prompt=prompt[0].tolist(), token_ids=answer),
        runs=runs,
    )
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    return dict(first=runs["brand_f64"]["losses"][0], last=runs["brand_f64"]["loss_after_10"], drift=drift, answer=answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "fixtures")
    parser.add_argument("names", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    for name in arguments.names:
        print(name, make(arguments.out / name, LONG_LENGTHS.get(name, LENGTHS), *MODELS[name]))


if __name__ == "__main__":
    main()
