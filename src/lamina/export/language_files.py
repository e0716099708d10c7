"""What exports of a language model share: its base, its tokenizer, its settings of generation, and its updates.

Shape letters: o outputs, i inputs of a linear layer, r rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lamina.backbones import Backbone, copy_files
from lamina.backbones.files import copy_tokenizer, locate
from lamina.data.instruction_table import Renderer
from lamina.data.records import Row
from lamina.errors import MethodError, ModelError
from lamina.export.adapter import BASE
from lamina.export.checking import by_library, silently
from lamina.export.language_opened import OpenedLanguage
from lamina.export.opened import SENTENCES
from lamina.export.updates import Factors, state_of
from lamina.export.written import Draft, told, write_json
from lamina.methods.color import CoLoR
from lamina.methods.lamina import Lamina

GENERATION = "generation_config.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""


def refuse_routed(opened: OpenedLanguage, what: str) -> None:
    """Raises MethodError for a method whose update depends on the input."""
    parts = [part for site in opened.learner.sites.values() for part in site.finished().values()]
    if any(not part.folded for part in parts):
        instead = (
            "No format does. Use the run with lamina, or train a method with one update, such as finetune or olora."
        )
        if isinstance(opened.method, CoLoR | Lamina):
            instead = "`--format peft-tasks` writes an adapter per task and the router."
        raise MethodError(
            f"method {opened.method.name!r} selects or weights adapters for each prompt, so no single update says what it "
            f"does, and {what} cannot hold it. {instead}"
        )


def refuse_unchanged(opened: OpenedLanguage, factors: Mapping[str, Factors]) -> None:
    """Raises MethodError where nothing was learnt."""
    if not factors:
        raise MethodError(
            f"method {opened.method.name!r} has changed no weight of the language model, so there is nothing to write. The "
            f"base is {opened.saved.base}."
        )


def placed(backbone: Backbone, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Returns updates as plain transformers holds the layers: by their paths there, outputs in its order, all of one rank.

    Missing ranks are filled with zeros. Servers read one rank and one alpha for all layers.
    """
    rank = max((one.rank for one in factors.values()), default=0)
    found = {}
    for path, (up_or, down_ri) in factors.items():
        layer, more = backbone.stored_layer(path), rank - len(down_ri)
        up_or = layer.rows_to_stored(up_or)
        found[layer.path] = Factors(F.pad(up_or, (0, more)).contiguous(), F.pad(down_ri, (0, 0, 0, more)).contiguous())
    return found


def transposed(backbone: Backbone, factors: Mapping[str, Factors]) -> bool:
    """Returns whether plain transformers holds these layers as (in, out)."""
    return any(backbone.stored_layer(path).transposed for path in factors)


def base_of(opened: OpenedLanguage, draft: Draft[OpenedLanguage], *, with_base: bool) -> tuple[str, Any]:
    """Returns where plain transformers finds the base, and what it loads from there in float32. Raises ModelError where these
    are other weights than lamina's."""
    name = opened.saved.backbone
    if with_base:
        copy_files(name, draft.folder / BASE)
        place = str(draft.folder / BASE)
    else:
        where = locate(name)
        place = name if where.hub_name is not None else str(where.folder.absolute())
        if where.file is not None and where.file.name != "model.safetensors":
            raise ModelError(
                f"transformers does not load the base from the file {name}. Give --with-base to write the base beside the "
                f"adapter."
            )
    model = plain_model(place)
    theirs = model.state_dict()
    for key, value in opened.backbone.transformers_state(state_of(opened.learner, folded=False)).items():
        found = theirs.get(key)
        if found is None or found.shape != value.shape or not torch.equal(found, value):
            raise ModelError(
                f"transformers loads other weights from {name} than lamina: {key} differs. Its config.json may describe "
                f"another model than its weights; correct it, or install the transformers that it was saved with."
            )
    return place, model


def plain_model(place: str) -> Any:
    """Returns what plain transformers loads from a place, in float32."""
    import transformers

    try:
        with silently():
            return transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    except Exception as error:
        raise ModelError(
            f"transformers does not load {place} ({told(error)}), so nothing was written. Another version of transformers may "
            f"help."
        ) from error


def write_tokenizer(draft: Draft[OpenedLanguage]) -> None:
    """Write tokenizer and chat template. Raises ModelError where they make other tokens of a prompt than lamina does."""
    from transformers import AutoTokenizer

    opened = draft.opened
    folder = opened.backbone.tokenizer
    assert folder is not None
    copy_tokenizer(folder, draft.folder)
    mine = opened.renderer
    with by_library("loading the written tokenizer with transformers", "Other versions of transformers may help."):
        theirs = Renderer(AutoTokenizer.from_pretrained(draft.folder), draft.folder, mine.form)
        rendered = [mine.render(Row(text, "."), text) for text in SENTENCES]
        same = rendered == [theirs.render(Row(text, "."), text) for text in SENTENCES]
        texts = [one.prompt for one in rendered] + [one.prompt for one in opened.read]
        wrong = next((text for text in texts if mine.ids([text]) != theirs.ids([text])), None)
    if not same or wrong is not None:
        raise ModelError(
            f"the written tokenizer makes other tokens of {wrong or SENTENCES[0]!r} than lamina does, so nothing was written. "
            f"Install the transformers that the tokenizer was saved with."
        )


def write_generation(folder: Path, opened: OpenedLanguage) -> None:
    """Write the settings that lamina generates with: greedily, without penalties, to a token that ends a completion. Of the
    base's settings only the tokens that begin and end a text are taken over."""
    module: Any = opened.backbone.module
    begin = module.generation_config.bos_token_id
    settings = {} if begin is None else {"bos_token_id": begin}
    settings |= {"do_sample": False, "eos_token_id": list(opened.stops), "pad_token_id": opened.pad}
    write_json(folder / GENERATION, settings)


def settings_of(folder: Path | str) -> Any:
    """Returns the settings of generation as transformers reads them from a folder."""
    from transformers import GenerationConfig

    with by_library("loading the written generation_config.json", "Other versions of transformers may help."):
        return GenerationConfig.from_pretrained(str(folder))


def usage(opened: OpenedLanguage, loading: str, tokenizer: str) -> str:
    """Returns lines that load a model and let it complete a prompt. loading: the lines that make `model`, with the settings of
    generation that were written."""
    asked = 'tokens = tokenizer("a prompt", return_tensors="pt")'
    if opened.saved.config.data.form == "chat":
        asked = (
            'messages = [{"role": "user", "content": "a prompt"}]\n'
            "tokens = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    return (
        f'{loading}\ntokenizer = AutoTokenizer.from_pretrained("{tokenizer}")\n{asked}\n'
        "found = model.generate(**tokens, max_new_tokens=64)\n"
        'print(tokenizer.decode(found[0, tokens["input_ids"].shape[1]:], skip_special_tokens=True))'
    )


def told_rank(rank: int, where: str = "in every layer") -> str:
    """Returns what a server must know about the rank. where: the layers that have it."""
    allowed = next((most for most in VLLM_RANKS if rank <= most), None)
    if allowed is None:
        return f"The rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}: serve the checkpoint of `--format merged` there."
    listed = ", ".join(map(str, VLLM_RANKS))
    return f"The rank is {rank} {where}. For vLLM give --max-lora-rank {allowed} or more; it takes {listed}."
