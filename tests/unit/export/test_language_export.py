"""Exports of causal language models: every family and method, reloaded by plain peft and transformers; or refused by name."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.unit.backbones.languages import LANGUAGES
from tests.unit.export.language_worlds import base, instructions, run_of

from lamina import runs
from lamina.errors import BackboneError, DataError, MethodError, ModelError
from lamina.export import Exported, export_merged, export_onnx, export_peft, export_tasks, import_adapter
from lamina.export.checking import script_tensors
from lamina.export.language_files import VLLM_RANKS, told_rank
from lamina.export.language_opened import MOST_PROMPTS, open_language
from lamina.export.language_tokens import Computed, compare, of_learner
from lamina.export.written import Draft
from lamina.files import read_checked, write_checked
from lamina.methods import METHODS
from lamina.methods.color import nearest_task
from lamina.methods.lamina import Lamina
from lamina.model import Model
from lamina.model.kept import PROBES
from lamina.types import Batch

ALL = ["q", "k", "v", "out", "up", "down"]
ROUTED = ("color", "lamina")
PER_TOKEN = ("moram",)
"""Methods whose update no format holds."""
METHODS_HERE = [name for name, method in METHODS.items() if method.trains and not method.refuses_language]
QUICK = ("llama",)
SAMPLING = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.5, "eos_token_id": [1, 9], "bos_token_id": 3}
"""Settings of generation beside a base, none of which lamina follows."""
BF16 = torch.bfloat16


def slow_but(names: tuple[Any, ...], values: Any) -> list[Any]:
    return [value if value in names else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a Llama, which tests leave as it is."""
    return run_of(tmp_path_factory.mktemp("finished"))


def exact(done: Exported) -> None:
    for one in done.differences:
        assert one.agreement == 1, one
        assert one.largest < 1e-4 * max(one.spread, 0.1), one


@pytest.mark.parametrize("name", slow_but(QUICK, LANGUAGES))
def test_every_family_with_all_roles(name: str, tmp_path: Path):
    targets = [*ALL, "gate"] if "gate" in LANGUAGES[name].roles else ALL
    run = run_of(tmp_path, name, backbone__targets=targets)
    exact(export_peft(run, tmp_path / "peft"))
    exact(export_merged(run, tmp_path / "merged"))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["task_type"] == "CAUSAL_LM"
    assert config["modules_to_save"] is None
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"]  # servers read one rank for all layers
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / p) for p in ("base", "merged"))
    same = {key for key, value in before.state_dict().items() if torch.equal(value, after.state_dict()[key])}
    changed = before.state_dict().keys() - same
    assert len(changed) >= 2 * len(config["target_modules"]) / 3
    assert all(key.removesuffix(".weight") in config["target_modules"] for key in changed)


@pytest.mark.parametrize("name", slow_but(QUICK, LANGUAGES))
def test_every_family_stored_in_bf16(name: str, tmp_path: Path):
    run = run_of(tmp_path, name, dtype=BF16, precision="bf16")
    exact(export_peft(run, tmp_path / "peft"))
    done = export_merged(run, tmp_path / "merged")
    exact(done)
    assert any("rounded to bfloat16" in note for note in done.notes)
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {BF16}
    tied = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / p) for p in ("base", "merged")]
    first, second = (m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in tied)
    assert first == second
    assert tied[1].dtype == BF16


@pytest.mark.parametrize("method", slow_but(("finetune", "lamina", "moram"), METHODS_HERE))
def test_every_method(method: str, tmp_path: Path):
    run = run_of(tmp_path, method=method)
    if method in ROUTED + PER_TOKEN:
        instead = "No format does" if method in PER_TOKEN else "--format peft-tasks"
        for export in (export_peft, export_merged, *([export_tasks] if method in PER_TOKEN else [])):
            with pytest.raises(MethodError, match=rf"{method!r} selects or weights adapters for each.*{instead}"):
                export(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    exact(export_peft(run, tmp_path / "peft", with_base=True))
    exact(export_merged(run, tmp_path / "merged"))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert json.loads((tmp_path / "merged" / "export.json").read_text())["tasks"] == ["reviews", "towns"]


def routed(method: Any, learner: Any, batch: Batch) -> torch.Tensor:
    """Returns the position (b,) of the task of every prompt."""
    if isinstance(method, Lamina):
        return method.scores(learner, batch).argmax(1)
    centroids = [method.memory[f"centroids/{task}"] for task in learner.head.tasks]
    return nearest_task(method.directions(learner, batch)[1], centroids, method.config.distance)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("llama", "color", {}),
        ("llama", "lamina", {}),
        pytest.param("gpt2", "color", {"method.identify": "first expert"}, marks=pytest.mark.slow),
        pytest.param("gpt_neox", "color", {"method.distance": "l1"}, marks=pytest.mark.slow),
        pytest.param("gpt2", "olora", {}, marks=pytest.mark.slow),
        pytest.param("gpt_neox", "inflora", {"data.form": "chat"}, marks=pytest.mark.slow),
        pytest.param("qwen3", "sora", {}, marks=pytest.mark.slow),
    ],
)
def test_an_adapter_per_task(name: str, method: str, settings: dict[str, Any], tmp_path: Path):
    """Of prompts that are routed to both tasks, where there is a router."""
    run = run_of(tmp_path, name, method, **settings)
    done = export_tasks(run, tmp_path / "out")
    exact(done)
    assert len(done.differences) == (3 if method in ROUTED else 4)
    assert ("`model.base_model.set_adapter(['001', '002'])`" in " ".join(done.notes)) == (method not in ROUTED)
    assert len((tmp_path / "out" / "load.py").read_text().splitlines()) <= 80
    assert (tmp_path / "out" / "router.safetensors").exists() == (method in ROUTED)
    if method in ROUTED:  # prompts of both tasks are compared, and are routed to both
        opened = open_language(run)
        chosen = [routed(opened.method, opened.learner, batch) for batch in opened.asked]
        assert set(torch.cat(chosen).tolist()) == {0, 1}


@pytest.mark.slow
def test_the_script_completes_texts_and_may_be_moved(tmp_path: Path):
    import subprocess

    run = run_of(tmp_path, method="olora", data__form="chat")
    export_tasks(run, tmp_path / "out", with_base=True)
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "hidden")
    command = [sys.executable, str(tmp_path / "moved" / "load.py"), "What is the capital of France?"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert said.stdout.strip()
    (tmp_path / "hidden").rename(tmp_path / "base")
    assert len(script_tensors(tmp_path / "moved", open_language(run).asked)) == 2 * len(open_language(run).asked)


@pytest.mark.parametrize("form", ["plain", pytest.param("chat", marks=pytest.mark.slow)])
def test_the_printed_code_writes_what_lamina_writes(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever the base's own settings of generation are."""
    run = run_of(tmp_path, data__form=form)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(SAMPLING))
    exports = {"peft": export_peft(run, tmp_path / "peft"), "merged": export_merged(run, tmp_path / "merged")}
    for done in exports.values():
        exact(done)
    opened = open_language(run)
    table: Any = opened.examples[0].table
    assert opened.stops == (1, 9), "those of the data and of the base"
    first = int(opened.examples[0].rows_n[0])
    row = table.source.read(first)
    prompt_bt = torch.from_numpy(table.prompts.row(first).astype("int64"))[None]
    batch = Batch(
        inputs={"input_ids": prompt_bt, "attention_mask": torch.ones_like(prompt_bt)}, labels_b=torch.zeros(1).long()
    )
    with opened.learner.folded():
        mine = opened.learner.generate(batch, 64, opened.stops, opened.pad)[0]
    for name, done in exports.items():
        capsys.readouterr()
        scope: dict[str, Any] = {}
        with warnings.catch_warnings(action="ignore"):  # of peft
            exec(done.code.replace('"a prompt"', repr(row.prompt)), scope)
            punished = scope["model"].generate(input_ids=prompt_bt, max_new_tokens=64, repetition_penalty=1.5)
        assert capsys.readouterr().out == opened.decode(mine) + "\n"
        assert punished[0, prompt_bt.shape[1] :].tolist()[: len(mine)] != mine  # so the settings matter
        assert (tmp_path / name / "chat_template.jinja").is_file()
        settings = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings == {
            "bos_token_id": 3,
            "do_sample": False,
            "eos_token_id": list(opened.stops),
            "pad_token_id": 0,
        }


def test_prompts_are_those_given_or_of_the_data_or_sentences(finished: Path, tmp_path: Path):
    run = finished
    assert export_merged(run, tmp_path / "a").differences[0].inputs == "8 prompts of 2 tasks"
    (tmp_path / "lines.txt").write_text("Where is it?\n\nAnd when?\n")
    done = export_merged(run, tmp_path / "b", inputs=tmp_path / "lines.txt")
    assert done.differences[0].inputs.startswith("2 prompts from")
    (tmp_path / "latin.txt").write_bytes("Où est-il ?".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt cannot be read as UTF-8 text .*a prompt per line"):
        export_merged(run, tmp_path / "c", inputs=tmp_path / "latin.txt")
    data = (finished.parent / "data").rename(tmp_path / "away")
    try:
        assert "since its data is not at hand" in export_merged(run, tmp_path / "c").differences[0].inputs
    finally:
        data.rename(finished.parent / "data")


@pytest.mark.parametrize("export", slow_but((export_peft,), [export_peft, export_merged, export_tasks]))
def test_a_model_is_compared_on_its_probes(export: Any, tmp_path: Path):
    made, files = base("llama", tmp_path / "base"), instructions(tmp_path / "data")
    settings = {"threads": 1, "precision": "fp32", "data.max_length": 64, "training.lr": 0.02, "probes.per_class": 3}
    model = Model.create(tmp_path / "m", backbone=str(made), method="olora", settings=settings)
    for name in ("reviews", "towns"):
        model.learn(files / f"{name}.jsonl", name=name, force=True)
    done = export(tmp_path / "m", tmp_path / "out")
    exact(done)
    probes = [model.store.kept(card.folder, PROBES) for card in model.cards]
    count = sum(len(one["labels_n"]) for one in probes if one is not None)
    assert 2 <= count <= MOST_PROMPTS
    assert done.differences[0].inputs == f"{count} probes of 2 tasks"
    read = [one.prompt for one in open_language(tmp_path / "m").read]
    assert {prompt.partition(" ")[0] for prompt in read} == {"reviews", "towns"}
    assert len(read) == count
    assert json.loads((tmp_path / "out" / "export.json").read_text())["model_version"] == 2
    with pytest.raises(ModelError, match=r"imported into a classifier only.*merge_and_unload"):
        import_adapter(tmp_path / "m", tmp_path / "out", name="more", classes=["a"])


def test_what_cannot_be_exported(tmp_path: Path):
    run = run_of(tmp_path)
    with pytest.raises(ModelError, match=r"onnx is not written for a language model .*--format merged"):
        export_onnx(run, tmp_path / "out")
    with pytest.raises(MethodError, match=r"'finetune' as configured does not keep an adapter per task"):
        export_tasks(run, tmp_path / "out")
    base("llama", tmp_path / "other", attention_bias=True).rename(tmp_path / "elsewhere")
    (tmp_path / "base").rename(tmp_path / "old")
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    with pytest.raises(ModelError, match=r"are not those of .* their hash is"):
        export_peft(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BackboneError, match=r"base"):
        export_peft(run, tmp_path / "out")


@pytest.mark.parametrize("export", [export_peft, export_merged])
def test_an_update_of_another_size_is_not_written(
    export: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from lamina.export import adapter, language_merged

    def scaled(save: Any) -> Any:
        def saving(tensors: dict[str, torch.Tensor], *more: Any) -> None:
            changed = {name for name in tensors if "lora_B" in name or "q_proj.weight" in name}
            save({name: 0.97 * value if name in changed else value for name, value in tensors.items()}, *more)

        return saving

    for module in (adapter, language_merged):
        monkeypatch.setattr(module, "save_file", scaled(module.save_file))
    with pytest.raises(ModelError, match=r"A score of 'token \d+' differs.*nothing was written"):
        export(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_generated_tokens_are_refused_where_the_model_is_clear(finished: Path, tmp_path: Path):
    opened = open_language(finished)
    draft = Draft(tmp_path / "out", tmp_path, "peft", opened)
    mine = of_learner(opened)
    compare(draft, "it", mine, mine)
    assert draft.differences[0].agreement == 1
    other = tuple((*tokens[:-1], 7) for tokens in mine.written)
    with pytest.raises(ModelError, match=r"same generated tokens for .*After prompt 1 it writes .* and the model"):
        compare(draft, "it", mine, Computed(mine.logits_nv, other))
    assert len(draft.differences) == 1


def test_a_run_of_a_classifier_is_sent_to_lamina_create(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    record = read_checked(finished / "results.json")
    record["backbone"]["kind"] = "image"
    write_checked(tmp_path / "run" / "results.json", record)
    with pytest.raises(ModelError, match=r"is a run of a classifier.*lamina create MODEL --from-run"):
        export_peft(tmp_path / "run", tmp_path / "out")


def test_servers_are_told_the_rank():
    assert "--max-lora-rank 16 or more; it takes 8, 16, 32" in told_rank(9)
    assert "at most 512" in told_rank(513)
    assert told_rank(VLLM_RANKS[-1]).count("--max-lora-rank 512 or more")


@pytest.mark.parametrize("name", slow_but(("llama",), ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]))
def test_names_and_shapes_are_those_that_llama_cpp_converts(name: str, tmp_path: Path):
    """`convert_lora_to_gguf.py` maps the name of a weight, and needs factors that fit it, of one rank that alpha fits."""
    gguf = pytest.importorskip("gguf")
    arches = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3_text": "GEMMA3"}
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arches[name]), 2)
    export_peft(run_of(tmp_path, name, backbone__targets=[*ALL, "gate"]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    assert len(tensors) == 2 * len(config["target_modules"])
    for key in tensors:
        place = key.removeprefix("base_model.model.").replace(".lora_A.weight", "").replace(".lora_B.weight", "")
        assert key.startswith("base_model.model.model.layers.")
        found = names.get_name(f"{place}.weight", try_suffixes=(".weight",))
        assert found is not None
        assert found.startswith("blk.")
        up, down = (tensors[f"base_model.model.{place}.lora_{part}.weight"] for part in "BA")
        assert (len(up), down.shape[1]) == weights[f"{place}.weight"].shape
        assert up.shape[1] == len(down) == config["r"] == config["lora_alpha"]


def test_names_are_those_that_vllm_reads(tmp_path: Path):
    """It takes a list of modules, one rank and alpha, and none of the other settings."""
    export_peft(run_of(tmp_path, backbone__targets=[*ALL, "gate"]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    known = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert isinstance(config["target_modules"], list)
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == known
    assert not any(config[key] for key in ("modules_to_save", "use_dora", "use_rslora", "rank_pattern"))
    assert config["bias"] == "none"


def test_files_that_lack_the_name_of_the_body(tmp_path: Path):
    """As GPT-2's on the hub: `h.0.attn.c_attn.weight`, without `transformer.` in front."""
    made = base("gpt2", tmp_path / "base")
    file = made / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    settings = {"backbone.name": str(made), "data.source": str(instructions(tmp_path / "data")), "method": "finetune"}
    settings |= {"data.max_length": 64, "threads": 1, "precision": "fp32", "training.lr": 0.02}
    runs.create(runs.load_config(None, list(settings.items())), tmp_path / "run")
    exact(export_merged(tmp_path / "run", tmp_path / "out"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
