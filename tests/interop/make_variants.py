"""Makes tests/fixtures/variants/: adapters that PEFT saves with ranks, scales and layers of their own, and what they compute.

    python tests/interop/make_variants.py [--out tests/fixtures/variants]

The base is tests/fixtures/tiny_qwen3. Each folder holds the adapter (PEFT's start for A, B random, so that every module
moves the logits) and `expected.safetensors` with `input_ids` and `logits_f64`, true float64. `loraplus.json` has the losses
of ten steps from tiny_qwen3/adapter_init_brand with the optimizer that PEFT makes for LoRA+.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from true_float64 import RefuseFloat32, TrueFloat64

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
BASE = FIXTURES / "tiny_qwen3"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS = {
    # Names, ends of names, expressions; more than one that matches. In the alphabet's order: PEFT sorts keys when it saves, so
    # that it does not load what it saved where another order counted.
    "patterns": dict(
        target_modules=ALL,
        rank_pattern={r".*\.0\.mlp\..*": 2, "gate_proj|up_proj": 3, "model.layers.1.self_attn.v_proj": 1, "v_proj": 6},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, "mlp.down_proj": 16, "self_attn.[qk]_proj": 2.5},
    ),
    "patterns_rslora": dict(
        target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 9, "k_proj": 1}, alpha_pattern={"k_proj": 3}
    ),
    # A module that is named in full is a target in any layer.
    "layers": dict(
        target_modules=["q_proj", "up_proj", "model.layers.0.mlp.down_proj"],
        layers_to_transform=[1],
        rank_pattern={"up_proj": 2},
    ),
}
# PEFT's defaults but for the decay, which is to be seen.
LORA_PLUS = dict(lr=5e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)
STEPS = 10


def save_adapter(folder: Path, variant: dict) -> None:
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    # The folder of whoever ran this says nothing.
    config = json.loads(path.read_text())
    config |= dict(base_model_name_or_path="tiny_qwen3", target_modules=sorted(config["target_modules"]))  # PEFT: a set
    path.write_text(json.dumps(config, indent=2) + "\n")


def load(adapter: Path, trainable: bool) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False, is_trainable=trainable)
    return model.to(torch.float64)


def logits(adapter: Path, input_ids: torch.Tensor) -> torch.Tensor:
    with TrueFloat64():
        model = load(adapter, False).eval()
        with torch.no_grad(), RefuseFloat32():
            return model(input_ids=input_ids, use_cache=False).logits


def lora_plus() -> dict:
    batch = load_file(BASE / "forward.safetensors")
    ids, mask, labels = (batch[name].long() for name in ("input_ids", "attention_mask", "labels"))
    losses = []

    def mean_loss(model: PeftModel) -> torch.Tensor:
        # Not transformers' own, which is computed in float32.
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    with TrueFloat64():
        model = load(BASE / "adapter_init_brand", True)
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **LORA_PLUS)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = mean_loss(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            losses.append(loss.item())
        losses.append(mean_loss(model).item())
    return dict(LORA_PLUS, max_grad_norm=1.0, losses_f64=losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURES / "variants")
    out = parser.parse_args().out
    transformers.utils.logging.disable_progress_bar()
    input_ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(11))
    plain = None
    for name, variant in VARIANTS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        save_adapter(folder, variant)
        exact = logits(folder, input_ids)
        # Without the variant's keys the same tensors fit nowhere, or mean something else.
        assert plain is None or not torch.allclose(exact, plain, atol=1e-2)
        plain = exact
        save_file(dict(input_ids=input_ids.to(torch.int32), logits_f64=exact.contiguous()), folder / "expected.safetensors")
        print(name, float(exact.abs().max()))
    text = json.dumps(dict(torch=torch.__version__.split("+")[0], **lora_plus()), indent=2)
    (out / "loraplus.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
