"""Compares a folder that `fastlora merge` wrote with what PEFT merges of the same base and adapter in float64.

    python check_merged.py BASE ADAPTER MERGED

Fails (exit 1)
- where the tensors of the folder are not those of PEFT's merged model;
- where an element is further from PEFT's than rounding allows: that of the folder's type, and that of a float32 sum of rank + 2
  terms, of the size of the largest in the row;
- where a logit of the merged folder, computed in float64, is off from that of base and adapter by more than twice as much as that
  of PEFT's merge rounded to the folder's type: what rounding alone does to a model (to SmolLM2 in float16, on ids that no text has,
  2.8 % of the largest logit; on a sentence 0.05 %).
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from true_float64 import TrueFloat64

UNITS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("merged", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    ids = torch.arange(3, 35)[None]
    with TrueFloat64(), torch.no_grad():
        def base() -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float64, attn_implementation="eager")

        pair = PeftModel.from_pretrained(base(), arguments.adapter, autocast_adapter_dtype=False).to(torch.float64).eval()
        expected_logits = pair(input_ids=ids, use_cache=False).logits
        merged = pair.merge_and_unload()
        theirs = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
        ours = AutoModelForCausalLM.from_pretrained(arguments.merged, dtype=torch.float64, attn_implementation="eager")
        logits = ours(input_ids=ids, use_cache=False).logits
        base_logits = base()(input_ids=ids, use_cache=False).logits

    stored = {}
    for shard in sorted(arguments.merged.glob("model*.safetensors")):
        stored |= load_file(shard)
    # A tied head is in PEFT's state, and not in the file.
    missing = [name for name in theirs.keys() - stored.keys() if name != "lm_head.weight"]
    if missing or stored.keys() - theirs.keys():
        sys.exit(f"not the same tensors: {sorted(missing)} {sorted(stored.keys() - theirs.keys())}")
    rounded = {name: tensor.to(stored[name].dtype).double() if name in stored else tensor for name, tensor in theirs.items()}
    with TrueFloat64(), torch.no_grad():
        merged.load_state_dict(rounded)
        if "lm_head.weight" not in stored:
            merged.tie_weights()
        rounded_logits = merged(input_ids=ids, use_cache=False).logits
    adapter = load_file(arguments.adapter / "adapter_model.safetensors")
    rank = max(tensor.shape[0] for name, tensor in adapter.items() if name.endswith(".lora_A.weight"))
    worst, dtypes = (0.0, ""), set()
    for name, tensor in stored.items():
        error = (tensor.double() - theirs[name]).abs()
        size = theirs[name].abs().amax(-1, keepdim=True)
        allowed = (UNITS[tensor.dtype] + (rank + 2) * 2.0**-24) * size
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        share = float((error / allowed.clamp_min(1e-300)).max())
        worst = max(worst, (share, name))
    moved = float((expected_logits - base_logits).abs().max())
    off = float((logits - expected_logits).abs().max())
    largest = float(expected_logits.abs().max())
    print(f"{len(stored)} tensors, {', '.join(sorted(dtypes))}: the furthest from PEFT's merge is at {worst[0]:.2f} of the rounding ({worst[1]})")
    rounding = float((rounded_logits - expected_logits).abs().max())
    print(f"logits up to {largest:.1f}, moved by the adapter by up to {moved:.3f}: off by {off:.2e}, PEFT's rounded by {rounding:.2e}")
    if worst[0] > 1.0:
        sys.exit("an element is off by more than rounding")
    if moved < 1e-3 or off > 2 * rounding:
        sys.exit("the logits differ, or the adapter does nothing")


if __name__ == "__main__":
    main()
