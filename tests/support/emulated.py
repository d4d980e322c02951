"""Emulated schemes that the tests name: weights rounded per row, inputs per token."""

from functools import partial

from dllm_rl.quantization.schemes import fake_quantize

e4m3_emulated = partial(fake_quantize, weight="e4m3", activation="e4m3")
e5m2_emulated = partial(fake_quantize, weight="e5m2", activation="e4m3")
int8_emulated = partial(fake_quantize, weight="int8", activation="int8")
int4_emulated = partial(fake_quantize, weight="int4", activation="e4m3")
int3_emulated = partial(fake_quantize, weight="int3", activation="e4m3")
five_level_emulated = partial(fake_quantize, weight="five_level", activation="e4m3")
ternary_emulated = partial(fake_quantize, weight="ternary", activation="e4m3")
EMULATED = {name: scheme for name, scheme in vars().items() if name.endswith("_emulated")}
