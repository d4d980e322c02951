"""The library's schemes with their defaults, and emulated ones: weights rounded per row, inputs per token."""

from dllm_rl.quantization.schemes import FakeQuantize, Float8ByGPU, FunctionScheme, Rounding, Scheme
from dllm_rl.records import subclasses
from recipes.examples.few_levels import Levels

OTHERS = (FunctionScheme, Float8ByGPU, Rounding)  # of a given function; chosen by a run; to be defined
NAMED = {name: scheme() for name, scheme in subclasses(Scheme).items() if scheme not in OTHERS}
CUDA_ONLY = ("Float8Dynamic", "Int4Packed")

e4m3_emulated = FakeQuantize(weight="e4m3", activation="e4m3")
e5m2_emulated = FakeQuantize(weight="e5m2", activation="e4m3")
int8_emulated = FakeQuantize(weight="int8", activation="int8")
int4_emulated = FakeQuantize(weight="int4", activation="e4m3")
int3_emulated = Levels(largest=3, activation="e4m3")
five_level_emulated = Levels(largest=2, activation="e4m3")
nvfp4_emulated = FakeQuantize(weight="nvfp4", activation="nvfp4")
mxfp4_emulated = FakeQuantize(weight="mxfp4", activation="e4m3")
EMULATED = {name: scheme for name, scheme in vars().items() if name.endswith("_emulated")}
CPU_SCHEMES = {name: scheme for name, scheme in (NAMED | EMULATED).items() if name not in CUDA_ONLY}
