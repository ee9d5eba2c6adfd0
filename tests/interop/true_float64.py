"""Makes transformers compute in float64 throughout.

It asks for float32 inside norms, rotary tables and softmax whatever the model's dtype is. Its modules are therefore shown
a `torch` in which `float32` means `float64`, `x.float()` gives float64, and every tensor that an operation then returns is checked to be no float32.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_rope_utils
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

PATCHED_MODULES = [
    modeling_rope_utils,
    modeling_gemma,
    modeling_gemma2,
    modeling_gemma3,
    modeling_llama,
    modeling_mistral,
    modeling_phi3,
    modeling_qwen2,
    modeling_qwen3,
]


class Float64Torch:
    """Stands for the module `torch`, except that float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class RefuseFloat32(TorchDispatchMode):
    """Fails on the first operation that returns a float32 tensor, but for position numbers, which it holds exactly."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                whole_numbers = torch.equal(tensor, tensor.round())
                assert whole_numbers, f"{function} returned float32"
        return result


class TrueFloat64:
    """While entered, the patched modules of transformers compute in float64."""

    def __enter__(self):
        self.to_float = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double
        for module in PATCHED_MODULES:
            module.torch = Float64Torch()

    def __exit__(self, *_):
        torch.Tensor.float = self.to_float
        for module in PATCHED_MODULES:
            module.torch = torch
