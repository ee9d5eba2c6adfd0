"""LoRA training on PyTorch's side of a GPU comparison: PEFT or Unsloth on samples of one length.

    python train_gpu.py peft-eager MODEL samples.jsonl --batch-size 8 --metrics FILE

peft-eager      transformers + PEFT, scaled_dot_product_attention pinned to flash attention
peft-compiled   and every decoder block through torch.compile, as its users do: a whole model takes minutes
unsloth         Unsloth's patched model, 16-bit, without gradient checkpointing; in an environment of its own

The base is in bfloat16, adapters and moments in float32, products under autocast: what transformers' Trainer does with
`bf16=True`. `--metrics` gets one JSON line a step with the names that fastlora uses; a step ends when the device is done
with it. `--device cpu` is for trying the script without a GPU: flash attention is then left out, and figures mean nothing.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

VARIANTS = ["peft-eager", "peft-compiled", "unsloth"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="JSON lines of `input_ids`, all of one length")
    parser.add_argument("--steps", type=int, default=30, help="all of them, the first included")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="on every linear; alpha is twice the rank")
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--metrics", type=Path, required=True)
    return parser.parse_args()


def load_peft(arguments: argparse.Namespace, dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0.0,
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    # PEFT makes the adapters of a half-precision base float32.
    model = get_peft_model(base.to(arguments.device), config)
    if arguments.variant == "peft-compiled":
        for block in model.base_model.model.model.layers:
            block.compile()
    return model.train()


def load_unsloth(arguments: argparse.Namespace, dtype, length: int):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(arguments.model), max_seq_length=length, dtype=dtype, load_in_4bit=False, use_gradient_checkpointing=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing=False,
        random_state=0,
    )
    return model.train()


def main() -> None:
    arguments = parse_arguments()
    if arguments.variant == "unsloth":
        import unsloth  # noqa: F401 before transformers, which it patches

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    on_gpu = arguments.device == "cuda"
    dtype = dict(bf16=torch.bfloat16, f16=torch.float16)[arguments.dtype]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    rows = torch.tensor([json.loads(line)["input_ids"] for line in arguments.data.read_text().splitlines() if line.strip()])
    # Labels are shifted inside the model, as in fastlora; no attention mask, so that attention takes its causal path.
    batches = [ids.to(arguments.device) for ids in rows.split(arguments.batch_size) if len(ids) == arguments.batch_size]
    if arguments.variant == "unsloth":
        model = load_unsloth(arguments, dtype, rows.shape[1])
    else:
        model = load_peft(arguments, dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01, fused=on_gpu)
    scaler = torch.amp.GradScaler(arguments.device, enabled=arguments.dtype == "f16")
    pinned = on_gpu and arguments.variant != "unsloth"
    attention = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if pinned else contextlib.nullcontext()

    with arguments.metrics.open("w") as metrics, attention:
        for step in range(1, arguments.steps + 1):
            ids = batches[(step - 1) % len(batches)]
            start = time.perf_counter()
            with torch.autocast(arguments.device, dtype=dtype):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            loss = float(loss.detach())  # waits for the forward; the step's end is still to come
            if on_gpu:
                torch.cuda.synchronize()
            line = dict(step=step, loss=loss, tokens=ids.numel(), seconds=time.perf_counter() - start)
            print(json.dumps(line), file=metrics, flush=True)


if __name__ == "__main__":
    main()
