"""Loads an adapter with PEFT and compares its logits with ours.

    python check_adapter.py BASE ADAPTER LOGITS.safetensors

LOGITS holds `input_ids` (i32 [rows, tokens], no padding), our `logits` (f32 [rows, tokens, vocabulary]) and `losses`
(f32 [rows, tokens - 1]) for them, as `cargo run --release --example logits` writes it. Fails (exit 1)
- on any warning, whether by the module `warnings` or in the log of transformers or PEFT;
- where a tensor of the adapter file is not in the loaded model, or differs from it;
- where the adapter changes nothing;
- where our logits or losses are further from true float64 than 4 times what PEFT's own float32 logits are.
Without LOGITS it makes the first three checks.
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from true_float64 import RefuseFloat32, TrueFloat64

ALLOWED_TIMES_PEFT_ERROR = 4.0


class RaiseOnWarning(logging.Handler):
    """Turns a warning in a log into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            raise RuntimeError(f"warning from {record.name}: {record.getMessage()}")


def load(base: Path, adapter: Path, dtype: torch.dtype) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    return model.to(dtype).eval()


def float64_logits(base: Path, adapter: Path, input_ids: torch.Tensor) -> torch.Tensor:
    with TrueFloat64():
        model = load(base, adapter, torch.float64)
        with torch.no_grad(), RefuseFloat32():
            return model(input_ids=input_ids, use_cache=False).logits


def next_token_losses(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [rows, tokens - 1] of each next token."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")


def largest(error: torch.Tensor) -> str:
    """The largest element and where it stands."""
    place = [int(axis) for axis in torch.unravel_index(error.argmax(), error.shape)]
    return f"{float(error.max()):.3e} at {place}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="model folder")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("logits", type=Path, nargs="?")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("error")
    # PEFT's own call of a transformers name that is going away: nothing to do with the adapter.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name in (None, "transformers", "peft"):
        logging.getLogger(name).addHandler(RaiseOnWarning())

    model = load(arguments.base, arguments.adapter, torch.float32)
    stored = load_file(arguments.adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    if stored.keys() != loaded.keys():
        sys.exit(f"not the same tensors in the file and in PEFT's model: {sorted(stored.keys() ^ loaded.keys())}")
    for name, tensor in stored.items():
        if not torch.equal(tensor.float(), loaded[name]):
            sys.exit(f"{name} is not what PEFT loaded")

    tensors = load_file(arguments.logits) if arguments.logits else dict(input_ids=torch.arange(3, 35)[None])
    input_ids = tensors["input_ids"].long()
    with torch.no_grad():
        theirs = model(input_ids=input_ids, use_cache=False).logits
        with model.disable_adapter():
            base = model(input_ids=input_ids, use_cache=False).logits
    effect = float((theirs - base).abs().max())
    if effect < 1e-3:
        sys.exit(f"the adapter changes no logit by more than {effect}: there is nothing to compare")
    print(f"loaded without a warning: {len(stored)} tensors; the adapter moves the logits by up to {effect:.3f}")
    if not arguments.logits:
        return

    exact = float64_logits(arguments.base, arguments.adapter, input_ids)
    peft_error = (theirs.double() - exact).abs()
    logits_error = (tensors["logits"].double() - exact).abs()
    losses_error = (tensors["losses"].double() - next_token_losses(exact, input_ids)).abs()
    print(f"against float64, logits up to {float(exact.abs().max()):.1f}:")
    print(f"  PEFT's float32 logits: {largest(peft_error)}")
    print(f"  our logits (decoding): {largest(logits_error)}")
    print(f"  our losses (batch):    {largest(losses_error)}")
    allowed = ALLOWED_TIMES_PEFT_ERROR * float(peft_error.max())
    if not (float(logits_error.max()) <= allowed and float(losses_error.max()) <= allowed):  # also where ours is NaN
        sys.exit(f"ours differ by more than {allowed:.3e}")


if __name__ == "__main__":
    main()
