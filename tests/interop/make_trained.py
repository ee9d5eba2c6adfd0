"""Makes tests/fixtures/trained/: what transformers + PEFT train in float64 with what goes beyond plain LoRA.

    python tests/interop/make_trained.py [--out tests/fixtures/trained] [NAME ...]

A folder each, on one of the tiny models and its batch (`forward.safetensors`): the start as PEFT saves it (`adapter_init`; what
PEFT would leave at the base's values or at zero is moved by a little, so that nothing passes unread), the gradients of the
first step and the adapter after ten, both true float64, and `golden.json`: losses before each step, norms before clipping,
the loss after ten steps, how far the final adapters of float32 and float64 are apart, the losses with the optimizer that PEFT
makes for LoRA+, and how far the logits of the merged model are from those of the adapter. AdamW, decay 0.01, clip 1.0, no
dropout.
"""

import argparse
import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from true_float64 import TrueFloat64

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
STEPS, RATE = 10, 5e-3
LORA_PLUS = dict(lr=5e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8)

RUNS = {
    "whole": (
        "tiny_qwen3",
        dict(
            target_modules=["q_proj", "v_proj", "down_proj"],
            modules_to_save=["lm_head", "model.norm", "input_layernorm", "post_attention_layernorm"],
        ),
    ),
    # A norm below the lowest adapter, and one inside its block.
    "whole_below": (
        "tiny_llama3rope",
        dict(
            target_modules=["o_proj"],
            layers_to_transform=[1],
            modules_to_save=["layers.0.post_attention_layernorm", "layers.1.input_layernorm"],
        ),
    ),
    # Norms behind attention and MLP too, whose weights are stored as their distance from 1.
    "whole_gemma2": (
        "tiny_gemma2",
        dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1], modules_to_save=["layernorm", "model.norm"]),
    ),
    "dora": ("tiny_qwen3", dict(target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], use_dora=True)),
    # Biases, other scales, and weights that are trained whole.
    "dora_whole": (
        "tiny_qwen2",
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
            use_dora=True,
            use_rslora=True,
            rank_pattern={"v_proj": 9},
            alpha_pattern={"gate_proj": 3},
            modules_to_save=["norm"],
        ),
    ),
    # From the singular values that PEFT finds; saved as the plain adapter that PEFT makes of it.
    "pissa": (
        "tiny_qwen2",
        dict(
            target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            init_lora_weights="pissa",
            rank_pattern={"v_proj": 3},
            alpha_pattern={"o_proj": 6},
        ),
    ),
}


def base_model(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=dtype, attn_implementation="eager")


def save_start(folder: Path, base: str, config: dict) -> None:
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(23)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **config)
    model = get_peft_model(base_model(base, torch.float32), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.02 if "lora_B" in name else 0.01)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    # The folder of whoever ran this says nothing.
    saved = json.loads(path.read_text())
    saved |= dict(base_model_name_or_path=base, target_modules=sorted(saved["target_modules"]))  # PEFT: a set
    path.write_text(json.dumps(saved, indent=2) + "\n")


def load(base: str, adapter: Path, dtype: torch.dtype) -> PeftModel:
    model = PeftModel.from_pretrained(base_model(base, dtype), adapter, autocast_adapter_dtype=False, is_trainable=True)
    return model.to(dtype).train()


def in_precision(dtype: torch.dtype):
    return TrueFloat64() if dtype == torch.float64 else nullcontext()


class Batch:
    def __init__(self, base: str):
        batch = load_file(FIXTURES / base / "forward.safetensors")
        self.ids, self.mask, self.labels = (batch[name].long() for name in ("input_ids", "attention_mask", "labels"))

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        return model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).logits

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        # Not transformers' own, which is computed in float32.
        found = self.logits(model)[:, :-1]
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), self.labels[:, 1:].flatten(), ignore_index=-100)


def trainable(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def saved_name(name: str) -> str:
    return name.replace("modules_to_save.default.", "").replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def train(model: PeftModel, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        if step == 0:
            gradients = {saved_name(name): parameter.grad.clone().contiguous() for name, parameter in trainable(model)}
        norms.append(float(torch.nn.utils.clip_grad_norm_([parameter for _, parameter in trainable(model)], 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return dict(losses=losses, grad_norms=norms, loss_after_10=batch.loss(model).item()), gradients


def merged_difference(base: str, adapter: Path, batch: Batch) -> float:
    """Largest difference of a logit between the adapter and what PEFT merges of it, in float64."""
    with TrueFloat64(), torch.no_grad():
        before = batch.logits(load(base, adapter, torch.float64).eval())
        after = batch.logits(load(base, adapter, torch.float64).eval().merge_and_unload())
    return float((before - after)[batch.mask.bool()].abs().max())


def run_pissa(folder: Path, base: str, config: dict) -> None:
    """`factors.safetensors`: A and B at the start; `adapter_final_f64.safetensors`: what PEFT converts the last to."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    batch, finals = Batch(base), {}
    golden = dict(base=base, lr=RATE, torch=torch.__version__.split("+")[0])
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
            with in_precision(dtype):
                torch.manual_seed(5)
                lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **config)
                # The base's residual is float32 in both.
                model = get_peft_model(base_model(base, torch.float32), lora, autocast_adapter_dtype=False)
                start = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(f"{scratch}/start")
                model = model.to(dtype).train()
                parameters = [parameter for _, parameter in trainable(model)]
                optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, foreach=False, fused=False)
                golden[name], gradients = train(model, batch, optimizer)
                model.peft_config["default"].init_lora_weights = "pissa"
                model.save_pretrained(f"{scratch}/{name}", path_initial_model_for_weight_conversion=f"{scratch}/start")
                finals[name] = load_file(f"{scratch}/{name}/adapter_model.safetensors")
        saved = json.loads(Path(f"{scratch}/f64/adapter_config.json").read_text())
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
    golden["saved_config"] = {key: saved[key] for key in keys}
    save_file({key: tensor.contiguous() for key, tensor in start.items()}, folder / "factors.safetensors")
    save_file(gradients, folder / "grads_step0_f64.safetensors")
    save_file({key: tensor.double().contiguous() for key, tensor in finals["f64"].items()}, folder / "adapter_final_f64.safetensors")
    golden["final_max_abs_diff_f32_f64"] = max(
        float((finals["f32"][name].double() - tensor.double()).abs().max()) for name, tensor in finals["f64"].items()
    )
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    shown = [f"{loss:.6f}" for loss in golden["f64"]["losses"]]
    print(folder.name, *shown, "drift", golden["final_max_abs_diff_f32_f64"])


def run(folder: Path, base: str, config: dict) -> None:
    if "init_lora_weights" in config:
        return run_pissa(folder, base, config)
    shutil.rmtree(folder, ignore_errors=True)
    start = folder / "adapter_init"
    save_start(start, base, config)
    batch, finals = Batch(base), {}
    golden = dict(base=base, lr=RATE, torch=torch.__version__.split("+")[0])
    for name, dtype in (("f32", torch.float32), ("f64", torch.float64)):
        with in_precision(dtype):
            model = load(base, start, dtype)
            parameters = [parameter for _, parameter in trainable(model)]
            assert all(parameter.dtype == dtype for parameter in parameters)
            optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01, foreach=False, fused=False)
            golden[name], gradients = train(model, batch, optimizer)
            finals[name] = get_peft_model_state_dict(model)
    assert gradients.keys() == finals["f64"].keys(), gradients.keys() ^ finals["f64"].keys()
    save_file(gradients, folder / "grads_step0_f64.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in finals["f64"].items()}, folder / "adapter_final_f64.safetensors")
    golden["final_max_abs_diff_f32_f64"] = max(
        float((finals["f32"][name].double() - tensor).abs().max()) for name, tensor in finals["f64"].items()
    )
    with TrueFloat64():
        model = load(base, start, torch.float64)
        golden["loraplus"] = dict(LORA_PLUS, losses_f64=[])
        result, _ = train(model, batch, create_loraplus_optimizer(model, torch.optim.AdamW, **LORA_PLUS))
        golden["loraplus"]["losses_f64"] = [*result["losses"], result["loss_after_10"]]
    golden["merged_max_abs_diff"] = merged_difference(base, start, batch)
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    shown = [f"{loss:.6f}" for loss in golden["f64"]["losses"]]
    print(folder.name, *shown, "drift", golden["final_max_abs_diff_f32_f64"], "merged", golden["merged_max_abs_diff"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIXTURES / "trained")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all without one")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for name in arguments.names or RUNS:
        run(arguments.out / name, *RUNS[name])


if __name__ == "__main__":
    main()
