"""Saves an adapter with PEFT, for fastlora to load.

    python save_adapter.py BASE OUT --variant plain|rslora|regex

A is PEFT's own start, B is random, so that the adapter changes every logit. r = 8, alpha = 16:
plain   q_proj and v_proj by name
rslora  the same with scale alpha/sqrt(r)
regex   `target_modules` is a regular expression: all projections of the MLP in the layers with even numbers
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

VARIANTS = {
    "plain": dict(target_modules=["q_proj", "v_proj"]),
    "rslora": dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
    "regex": dict(target_modules=r".*\.layers\.\d*[02468]\.mlp\.(gate|up|down)_proj"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="model folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **VARIANTS[arguments.variant]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
