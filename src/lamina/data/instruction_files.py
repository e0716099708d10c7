"""Instructions in files: JSON lines, JSON and Parquet, alone or in folders, and the layouts of public benchmarks.

| layout | what it looks like |
|---|---|
| rows | files of rows; folders are domains or splits |
| TRACE | one folder for each task, with `train.json`, `test.json` and `eval.json`: lists of {prompt, answer} |
| CL_Benchmark of O-LoRA | `TASK TYPE/DATASET/` with `train.json`, `dev.json`, `test.json`: {sentence, label}; `labels.json` |
| Super-NaturalInstructions | `task123_name.json`: {Definition, Instances: [{input, output}]} |
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.data.instruction_rows import text_of
from lamina.data.instructions import Records, from_records, holds_instructions
from lamina.data.json_files import read_json, read_json_lines
from lamina.data.names import listed, refuse_likely_splits, shown, split_of, splits_in_file_names
from lamina.data.records import Columns, LeftOut, Source
from lamina.data.tables import Part, names_listed, read_parquet, read_readme, records_of
from lamina.data.tree import IMAGE_SUFFIXES, Folder, Leftovers, scan
from lamina.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
TASK_INSTRUCTIONS = {
    "BoolQA": "According to the following passage, is the question true or false? Choose one from the option.\n",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false? Choose one from the "
    "option.\n",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.\n',
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.\n",
    "TC": "What is the topic of the following paragraph? Choose one from the option.\n",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one from the "
    "option.\n",
}
"""What each type of task in CL_Benchmark is asked with: `configs/instruction_config.json` of cmnfriend/O-LoRA."""
_SUPER_NI = re.compile(r"task\d+_.*")
_OTHERS = "files that are neither JSON, JSON lines nor Parquet"


@dataclass
class Found:
    """The data files of a folder, each read at most once, and what is left out."""

    root: Path
    files: list[Path]
    left: Leftovers
    columns: Columns
    documents: dict[Path, Any] = field(default_factory=dict)
    lines: dict[Path, list[int]] = field(default_factory=dict)

    def name(self, file: Path) -> str:
        """The file below the root, with / between names."""
        return file.relative_to(self.root).as_posix()

    def document(self, file: Path) -> Any:
        """What a JSON file holds; the rows of the other types."""
        if file not in self.documents:
            kind = file.suffix.lower()
            if kind == ".json":
                self.documents[file] = read_json(file)
            elif kind == ".jsonl":
                self.documents[file], self.lines[file] = read_json_lines(file)
            else:
                table, _ = read_parquet(file, None, self.columns)
                columns = table.column_names
                fits = holds_instructions(columns, self.columns)
                part = Part(self.name(file), table, None, file.parent)
                # Columns without rows are enough to say what there is.
                self.documents[file] = records_of(part, self.columns).records if fits else [dict.fromkeys(columns)]
        return self.documents[file]

    def records(self, file: Path) -> Records:
        return Records(self.name(file), self.document(file), lines=self.lines.get(file))

    def first(self, file: Path) -> Mapping[str, Any]:
        """The first row of a file; empty where it holds none. What it lacks is taken from the next hundred rows."""
        document = self.document(file)
        rows = [row for row in document[:100] if isinstance(row, Mapping)] if isinstance(document, list) else []
        return {key: value for row in reversed(rows) for key, value in row.items()}


@dataclass(frozen=True)
class Layout:
    """How files are understood."""

    form: str
    parts: list[Records]
    columns: Columns


def open_instruction_file(file: Path, *, columns: Columns, test_fraction: float) -> Source:
    """Returns the instructions of a JSON or JSON lines file. Raises DataError if it is damaged or a row is wrong."""
    found = Found(file.parent, [file], Leftovers(), columns)
    layout = _layout(found)
    if layout is None:
        raise _no_rows(found)
    return _opened(layout, file.stem, None, found.left.found(), test_fraction)


def open_instruction_folder(root: Path, *, asked: bool, columns: Columns, test_fraction: float) -> Source | None:
    """Returns the instructions below a folder, or None where there are none.

    asked: whether the user says that the folder holds instructions. If not, a folder with images in it holds none.

    Raises DataError for damaged files and wrong rows; if asked, also where there are none.
    """
    if not asked and not _may_hold(root):
        return None
    tree, left = scan(root, SUFFIXES, _OTHERS)
    at = tree
    while not at.images and len(at.folders) == 1 and split_of(at.folders[0].name) is None:
        at = at.folders[0]
    files = [tree.at / image.path for image in tree.all_images() if Path(image.path).name != "README.json"]
    found = Found(tree.at, sorted(files), left, columns)
    _leave_out_documents(found)
    layout = _layout(found, at)
    if layout is None:
        if asked:
            raise _no_rows(found)
        return None
    domains = names_listed(read_readme(at.at / "README.json"), "domains", at.at)
    return _opened(layout, root.resolve().name, domains, found.left.found(), test_fraction)


def _opened(
    layout: Layout, name: str, domains: tuple[str, ...] | None, left_out: tuple[LeftOut, ...], test_fraction: float
) -> Source:
    return from_records(
        layout.parts,
        name=name,
        columns=layout.columns,
        domain_names=domains,
        test_fraction=test_fraction,
        form=layout.form,
        left_out=left_out,
    )


def _may_hold(root: Path) -> bool:
    """Whether there are data files and no images. In a folder of images the first file decides."""
    some = False
    for _, folders, files in os.walk(root):
        folders.sort()
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                return False
            some |= suffix in SUFFIXES
    return some or any(path.is_dir() and path.is_symlink() for path in root.iterdir())


def _leave_out_documents(found: Found) -> None:
    """Leaves out JSON files that hold an object and are no task, such as descriptions of a dataset."""
    for file in list(found.files):
        if file.suffix.lower() == ".json" and split_of(file.stem) is None and file.stem != "eval":
            document = found.document(file)
            if isinstance(document, dict) and not _is_task(document):
                found.left.add("JSON files without a list of rows", found.name(file))
                found.files.remove(file)


def _layout(found: Found, at: Folder | None = None) -> Layout | None:
    """The first layout that fits the files; None where none does. at: the folder with the files or their folders."""
    if _datasets(found):
        return _cl_benchmark(found)
    if any(_is_task(found.document(file)) for file in found.files if file.suffix.lower() == ".json"):
        return _super_ni(found)
    firsts = [first for file in found.files if (first := found.first(file))]
    trace = replace(found.columns, completion="answer")
    if any(holds_instructions(list(first), found.columns) for first in firsts):
        return _rows(found, at, "rows", found.columns)
    if any(holds_instructions(list(first), trace) for first in firsts):
        return _rows(found, at, "TRACE", trace)
    return None


def _no_rows(found: Found) -> DataError:
    where = found.root if len(found.files) != 1 else found.files[0]
    columns = dict.fromkeys(key for file in found.files for key in found.first(file))
    if len(found.files) == 1 and not columns:
        document = found.document(where)
        if not document:
            return DataError(
                f"{where} holds no rows: it is empty. Give a file with a prompt and its completion in each row"
            )
        if not isinstance(document, list):
            return DataError(
                f"{where} holds {shown(repr(document), 40)}; allowed is a list of rows. Write one object for each row"
            )
    missing = [name for name in (found.columns.prompt, found.columns.completion) if name not in columns]
    have = f"The columns found: {listed(columns, 20)}; {listed(missing)} is missing. " if len(missing) == 1 else ""
    have = have or (f"The columns found: {listed(columns, 20)}. " if columns else "")
    return DataError(
        f"{where} holds no rows with the columns {found.columns.prompt!r} and {found.columns.completion!r}, or"
        f" {found.columns.messages!r}, in JSON lines (.jsonl), JSON (.json, a list) or Parquet. {have}Say which columns they"
        " are with --set data.columns.prompt=NAME and --set data.columns.completion=NAME"
    )


def _is_task(document: Any) -> bool:
    return isinstance(document, dict) and "Definition" in document and "Instances" in document


def _list_of(found: Found, file: Path) -> Sequence[Any]:
    document = found.document(file)
    if not isinstance(document, list):
        raise DataError(
            f"{file} holds {shown(repr(document), 40)} ({type(document).__name__}); allowed is a list of rows. Correct it, or"
            " move it elsewhere"
        )
    return document


def _rows(found: Found, at: Folder | None, form: str, columns: Columns) -> Layout:
    """Files of rows. A folder is a split where its name means one, and else a domain; so is a file's name, for splits."""
    top = at.at if at is not None else found.root
    parts: list[Records] = []
    in_folder: dict[Path, list[Path]] = {}
    for file in found.files:
        if not _list_of(found, file):
            found.left.add("files without rows", found.name(file))
        in_folder.setdefault(file.parent, []).append(file)
    _refuse_mixture(top, in_folder)
    for folder, files in in_folder.items():
        steps = folder.relative_to(top).parts
        of_folders = [split for step in steps if (split := split_of(step)) is not None]
        domain = "/".join(step for step in steps if split_of(step) is None) or None
        stems = ["val" if form == "TRACE" and file.stem == "eval" else file.stem for file in files]
        refuse_likely_splits(stems, str(folder), [stem for stem in stems if split_of(stem) is not None])
        of_files = splits_in_file_names(stems) if at is not None else [None]
        for file, split in zip(files, of_files, strict=True):
            told = {*of_folders, *([split] if split is not None else [])}
            if len(told) > 1:
                raise DataError(
                    f"{file} is of two splits by the names of its folders and its own. Rename it, so that they say the same"
                )
            records = found.records(file)
            parts.append(replace(records, split=min(told) if told else None, domain=domain))
    domains = list(dict.fromkeys(part.domain for part in parts if part.domain is not None))
    refuse_likely_splits(domains, str(top))
    types = ", ".join(sorted({file.suffix.lower()[1:] for file in found.files}))
    layout = f"{form} in {len(parts)} file{'s' * (len(parts) > 1)} ({types})"
    if form == "TRACE":
        layout = f"TRACE, {len(parts)} files (the column answer is the completion, eval the split val)"
    return Layout(layout, parts, columns)


def _refuse_mixture(top: Path, in_folder: Mapping[Path, list[Path]]) -> None:
    """Raises DataError where some files lie in folders of domains and others beside those folders."""
    deep = {folder: any(split_of(step) is None for step in folder.relative_to(top).parts) for folder in in_folder}
    if len(set(deep.values())) > 1:
        inside, beside = (next(folder for folder in deep if deep[folder] is kind) for kind in (True, False))
        raise DataError(
            f"{in_folder[beside][0]} lies beside the folder {inside.name!r}, which is read as a domain: the domain of the file"
            " cannot be told. Move it into a folder of its own, or all files into one folder"
        )


def _cl_benchmark(found: Found) -> Layout:
    """CL_Benchmark of O-LoRA (github.com/cmnfriend/O-LoRA). A dataset is a domain; its labels.json lists the options.

    The prompt is that of its `src/uie_dataset_lora.py`: the instruction of the type of task, `Option: ` and the labels, the
    sentence, `Answer:`. COPA, which names its options itself, has the sentence and `Answer:` alone.
    """
    folders = _datasets(found)
    names = [folder.name for folder in folders]
    parts: list[Records] = []
    untold: set[str] = set()
    for folder in folders:
        labels = _labels(found, folder / "labels.json")
        kind = folder.resolve().parent.name
        domain = folder.name if names.count(folder.name) == 1 else f"{kind}/{folder.name}"
        if kind != "COPA" and kind not in TASK_INSTRUCTIONS:
            untold.add(kind)
        for split in ("train", "dev", "test"):
            file = folder / f"{split}.json"
            if file not in found.files:
                continue
            asked = _asked(kind, labels)
            records = [
                _converted(row, Records(found.name(file), ()).where(i), ("sentence", "label"), asked)
                for i, row in enumerate(_list_of(found, file))
            ]
            parts.append(Records(found.name(file), records, split_of(split), domain))
    _leave_others(found, [folder / f"{name}.json" for folder in folders for name in ("labels", "train", "dev", "test")])
    form = f"CL_Benchmark of O-LoRA, {len(folders)} dataset{'s' * (len(folders) > 1)}"
    if untold:
        form += f" (no instruction is known for the task type {listed(sorted(untold))})"
    return Layout(form, parts, Columns())


def _datasets(found: Found) -> list[Path]:
    """The folders of CL_Benchmark that hold a dataset: its labels, and a file of one split at least."""
    files = {*found.files}
    named = [file.parent for file in found.files if file.name == "labels.json"]
    return [folder for folder in named if files & {folder / f"{split}.json" for split in ("train", "dev", "test")}]


def _labels(found: Found, file: Path) -> list[str]:
    labels = found.document(file)
    if not isinstance(labels, list) or not labels or len(set(map(str, labels))) < len(labels):
        raise DataError(
            f"{file} holds {shown(repr(labels))}; allowed is a list of different labels. Correct it, or move it elsewhere"
        )
    return [text_of(label, "label", f"{file} row {i}") for i, label in enumerate(labels)]


def _asked(kind: str, labels: Sequence[str]) -> Callable[[str, str], dict[str, Any]]:
    """Makes a record of a sentence and its label."""
    before = "" if kind == "COPA" else f"{TASK_INSTRUCTIONS.get(kind, '')}Option: {', '.join(labels)} \n"

    def record(sentence: str, label: str) -> dict[str, Any]:
        return {"prompt": f"{before}{sentence}\nAnswer:", "completion": label, "options": list(labels)}

    return record


def _converted(
    row: Any, where: str, keys: tuple[str, str], record: Callable[[str, str], dict[str, Any]]
) -> dict[str, Any]:
    """A row of a benchmark as a record, with its other columns."""
    if not isinstance(row, Mapping):
        raise DataError(
            f"{where} is {shown(repr(row))} ({type(row).__name__}); allowed is an object with {' and '.join(keys)}. Correct it"
        )
    given = [text_of(row.get(key), key, where) for key in keys]
    return {**{key: value for key, value in row.items() if key not in keys}, **record(*given)}


def _super_ni(found: Found) -> Layout:
    """Task files of Super-NaturalInstructions. A file is a domain, and the first output of an instance its completion.

    The prompt is `Definition: ...`, `Input: ...` and `Output:`, without the examples of the file.
    """
    parts: list[Records] = []
    tasks = [file for file in found.files if file.suffix.lower() == ".json" and _is_task(found.document(file))]
    _leave_others(found, tasks)
    for file in tasks:
        task, name = found.document(file), found.name(file)
        told = task["Definition"]
        definition = told[0] if isinstance(told, list) and len(told) == 1 else told
        definition = text_of(definition, "Definition", name)
        instances = task["Instances"]
        if not isinstance(instances, list) or not instances:
            raise DataError(
                f"{name} has the Instances {shown(repr(instances))}; allowed is a list of {{input, output}}. Correct the file"
            )
        records = [
            _instance(instance, definition, f"{name} row {i}", found.left) for i, instance in enumerate(instances)
        ]
        for key in sorted(task):
            if "Examples" in key and task[key]:
                found.left.add("examples of task files", f"{name}: {key}")
        splits = {split for step in Path(name).parts[:-1] if (split := split_of(step)) is not None}
        parts.append(Records(name, records, min(splits, default=None), file.stem))
    form = f"Super-NaturalInstructions, {len(tasks)} task file{'s' * (len(tasks) > 1)} (the first output is the completion)"
    return Layout(form, parts, Columns())


def _instance(instance: Any, definition: str, where: str, left: Leftovers) -> dict[str, Any]:
    if not isinstance(instance, Mapping):
        raise DataError(f"{where} is {shown(repr(instance))}; allowed is an object with input and output. Correct it")
    outputs = instance.get("output")
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or not outputs:
        raise DataError(f"{where} has the output {shown(repr(outputs))}; allowed is a list of texts. Correct the row")
    if len(outputs) > 1:
        left.add("rows with further outputs", where)
    given = text_of(instance.get("input"), "input", where)
    return {
        "prompt": f"Definition: {definition}\n\nInput: {given}\nOutput:",
        "completion": text_of(outputs[0], "output", where),
    }


def _leave_others(found: Found, used: Iterable[Path]) -> None:
    for file in sorted({*found.files} - {*used}):
        found.left.add("files that are no part of this layout", found.name(file))
