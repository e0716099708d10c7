"""`peft` of a language model: everything learnt as one LoRA adapter for `AutoModelForCausalLM`."""

import os
from pathlib import Path

from lamina.export.adapter import BASE, write_lora
from lamina.export.checking import by_library, need
from lamina.export.language_files import (
    base_of,
    placed,
    refuse_routed,
    refuse_unchanged,
    settings_of,
    told_rank,
    transposed,
    usage,
    write_generation,
    write_tokenizer,
)
from lamina.export.language_opened import OpenedLanguage, in_its_precision, open_language
from lamina.export.language_tokens import compare, generated, of_learner, of_plain, share
from lamina.export.updates import whole
from lamina.export.written import Exported, drafted, finished

OTHERWISE = "`--format merged` needs transformers only."


def export_language_peft(
    path: Path, target: Path, *, inputs: str | os.PathLike[str] | None = None, with_base: bool = False
) -> Exported:
    """Write one adapter of everything that a language model has learnt. Arguments and errors are those of `export_peft`."""
    need("peft", "peft", "the format peft")
    opened = open_language(path, inputs)
    refuse_routed(opened, "one adapter")
    factors = whole(opened.learner)
    refuse_unchanged(opened, factors)
    wanted = of_learner(opened)
    note_precision(opened, wanted.written)
    with drafted(target, "peft", opened) as draft:
        draft.otherwise = OTHERWISE
        place, base = base_of(opened, draft, with_base=with_base)
        ready = placed(opened.backbone, factors)
        named = BASE if with_base else place
        write_lora(draft.folder, ready, named, "CAUSAL_LM", transposed=transposed(opened.backbone, factors))
        write_tokenizer(draft)
        write_generation(draft.folder, opened)
        from peft import PeftModel

        with by_library("loading the adapter with plain peft", OTHERWISE):
            model = PeftModel.from_pretrained(base, str(draft.folder)).eval()
            model.generation_config = settings_of(draft.folder)
            found = of_plain(opened, model)
        compare(draft, f"plain peft, {type(base).__name__}", wanted, found)
        draft.notes.append(told_rank(next(iter(ready.values())).rank))
        if not with_base:
            draft.notes.append(f"The base model that it was trained on is {place}.")
        where = target / BASE if with_base else place
        loading = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n"
            f'base = AutoModelForCausalLM.from_pretrained("{where}", dtype="float32")\n'
            f'model = PeftModel.from_pretrained(base, "{target}")\n'
            f'model.generation_config = GenerationConfig.from_pretrained("{target}")'
        )
        draft.code = usage(opened, loading, str(target))
        return finished(draft)


def note_precision(opened: OpenedLanguage, written: tuple[tuple[int, ...], ...]) -> None:
    """Find out after how many prompts the model writes the same tokens in its own precision. written: those of float32."""
    learner = in_its_precision(opened)
    if learner is not None:
        opened.as_run = share(written, generated(opened, learner))
