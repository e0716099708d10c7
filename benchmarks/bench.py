"""Speed, end to end: the floor of this machine, a whole run against it, the same stream by rival loops. `make bench`.

    python benchmarks/bench.py             about half an hour; adds a line to docs/results/records/speed.jsonl, writes the page
    python benchmarks/bench.py --quick     under five minutes; notes nothing
    python benchmarks/bench.py --short     between the two, for a machine that is at hand for minutes; noted, with what it was
    python benchmarks/bench.py --page      the page and its plot from the lines there are, nothing measured

The last line is JSON: floor_ratio (whole run over the floor of as many images), peft_speedup (whole run of the fastest PEFT
loop over that of lamina's `finetune`, which trains the same numbers), task20_over_task1 (training step), outside_steps (share
of the run outside training steps), peak_mb, peft_peak_mb, precision, accuracy and reference_accuracy (final, of InfLoRA in
this precision and in fp32, mean over the same seeds); and, for the page, all that lies behind them. A `note` that somebody adds
to a line of the records is shown with its section.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rivals
import run as whole
import torch
from markupsafe import Markup

from lamina.report.charts import tag

ROOT = Path(__file__).resolve().parents[1]
PAGE, PLOT = ROOT / "docs" / "results" / "speed.md", ROOT / "docs" / "results" / "speed.svg"
RECORDS = ROOT / "docs" / "results" / "records" / "speed.jsonl"
CARDS = ROOT / "docs" / "results" / "records" / "shapes.jsonl"
ACCURACY = ROOT / "docs" / "results" / "records" / "accuracy.jsonl"
INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def measure(quick: bool, short: bool) -> dict[str, Any]:
    """Each part in a process of its own, one after another: what one leaves in memory must not be counted for the next."""
    run = part("run.py", ["--quick"] if quick else ["--per-class", "20"] if short else [])
    full = not (quick or short)
    compiled = part("floor.py", ["--compile", "--precision", run["precision"]], optional=True) if full else None
    found = part("rivals.py", ["--quick", "--epochs", "4"] if quick else ["--short"] if short else [])
    accuracy = {name: statistics.mean(runs["accuracy"]) for name, runs in found["runs"].items()}
    best = min(
        (name for name in rivals.PEFT_LOOPS if name in found["runs"]),
        key=lambda name: statistics.median(found["runs"][name]["seconds"]),
    )
    ours = f"lamina finetune, {found['precision']}"
    return {
        "floor_ratio": run["floor_ratio"],
        "peft_speedup": rivals.speedup(found, ours, rivals.PEFT_LOOPS)[1],
        "task20_over_task1": run["task20_over_task1"][1],
        "outside_steps": run["outside_steps"],
        "peak_mb": max(found["runs"][ours]["peak_mb"]),
        "peft_peak_mb": max(found["runs"][best]["peak_mb"]),
        "precision": run["precision"],
        "accuracy": round(accuracy[f"lamina inflora, {found['precision']}"], 4),
        "reference_accuracy": round(accuracy["lamina inflora, fp32"], 4),
        "fastest_peft": best,
        "quick": quick,
        "short": short,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "run": run,
        "compiled": compiled,
        "rivals": found,
    }


def part(file: str, arguments: list[str], optional: bool = False) -> Any:
    """What a part ends with. optional: None where it fails (it has said why), as torch.compile does without a compiler."""
    command = [sys.executable, str(Path(__file__).with_name(file)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=not optional)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted(INSTRUCTIONS & set(flags)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "lamina")},
    }


# ---------------------------------------------------------------------------------------------- the page


def page(lines: list[dict[str, Any]], cards: list[dict[str, Any]], accuracy: list[dict[str, Any]]) -> str:
    """Of the newest line in each precision and number of threads, so that nobody is misled about where a gain comes from."""
    newest = newest_of(lines)
    parts = [
        "# Speed and memory",
        "Made by `make bench`, which measures and then writes this page from the lines of `records/speed.jsonl`; do not edit. "
        "What grows with the number of tasks is on [a page of its own](growth.md).",
        summary(newest),
        "![Seconds of a whole run, by contender](speed.svg)",
        *(section(name, line) for name, line in newest.items()),
    ]
    if not any(line["precision"] == "bf16" for line in newest.values()):
        parts.append(
            "## bf16\n\nNot measured: no machine with native bf16 instructions (`avx512_bf16`, `amx_bf16`) was at hand. There, "
            "`make bench` adds the section by itself."
        )
    if accuracy:
        parts.append(accuracy_section(accuracy))
    parts += [on_a_card(line) for line in cards]
    return "\n\n".join(parts) + "\n"


def accuracy_section(lines: list[dict[str, Any]]) -> str:
    """What `accuracy.py` found, in one setting."""
    first, differences = lines[0], [line["bf16"] - line["fp32"] for line in lines]
    rows = [f"| {line['seed']} | {100 * line['fp32']:.1f} % | {100 * line['bf16']:.1f} % |" for line in lines]
    spread = statistics.stdev(line["fp32"] for line in lines)
    return "\n\n".join(
        [
            "## Accuracy in bf16",
            f"`python benchmarks/accuracy.py`: `{first['method']}` on Split CIFAR-100 in ten tasks, {first['per_class']} "
            f"images of each class, {first['epochs']} epochs, final accuracy. bf16 minus fp32, seed by seed: "
            f"{100 * statistics.mean(differences):+.1f} points in the mean ({100 * min(differences):+.1f} to "
            f"{100 * max(differences):+.1f}); the seeds themselves are {100 * spread:.1f} apart (standard deviation, fp32)."
            f"{noted(first)}",
            "\n".join(["| Seed | fp32 | bf16 |", "|---|---:|---:|", *rows]),
        ]
    )


def newest_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    def name(line: dict[str, Any]) -> str:
        threads = line["machine"]["threads"]
        return f"{line['precision']}, {threads} thread{'s' if threads > 1 else ''}"

    return {name(line): line for line in lines if not line["quick"]}


def on_a_card(line: dict[str, Any]) -> str:
    """What `shapes.py` measured on one card."""
    about = line["machine"]
    shown = any("recorded" in name for size in line["sizes"] for name in size["steps"])
    recorded = "is in the rows *recorded*." if shown else "is not in here."
    parts = [
        f"## On a card: {line['card']}",
        f"{line['date']}, `python benchmarks/shapes.py`; torch {about['torch']}, transformers {about['transformers']}, PEFT "
        f"{about['peft']}, lamina {about['lamina']}. Training steps with random weights at 224 px, rank 10 on k and v, of a "
        "batch that lies ready. The fraction of the peak counts the operations of the floor, over a bf16 matrix product of "
        f"8192 rows and columns measured in the same process ({line['peak_tflops']:.0f} TFLOP/s). What recording the step as "
        f"a CUDA graph gives, which lamina does by itself where it is faster, {recorded}{noted(line)}",
    ]
    for size in line["sizes"]:
        rows = [
            f"**{size['shape']}, batch {size['batch']}**\n",
            "| | Step, ms (quartiles) | Images/s | Fraction of the peak | Memory, MB |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, found in size["steps"].items():
            low, middle, high = found["step_ms"]
            fraction = size["operations_per_step"] / (middle / 1000) / (1e12 * line["peak_tflops"])
            rows.append(
                f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {found['images_per_second']:.0f} | {fraction:.3f} "
                f"| {found['peak_mb']} |"
            )
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def summary(newest: dict[str, dict[str, Any]]) -> str:
    rows = {
        "whole run over the floor": "floor_ratio",
        "fastest PEFT loop over lamina, whole run": "peft_speedup",
        "step in task 20 over step in task 1": "task20_over_task1",
        "share outside training steps": "outside_steps",
        "peak memory, MB": "peak_mb",
        "peak memory of that PEFT loop, MB": "peft_peak_mb",
        "final accuracy, InfLoRA": "accuracy",
        "the same in fp32": "reference_accuracy",
    }
    lines = ["| | " + " | ".join(newest) + " |", "|---|" + "---:|" * len(newest)]
    for what, key in rows.items():
        lines.append(f"| {what} | " + " | ".join(show(key, line[key]) for line in newest.values()) + " |")
    return "\n".join(lines)


def show(key: str, value: float) -> str:
    if key in ("outside_steps", "accuracy", "reference_accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if key.endswith("_mb") else f"{value:.2f}"


def section(name: str, line: dict[str, Any]) -> str:
    about, run, found = line["machine"], line["run"], line["rivals"]
    low, middle, high = run["floor_ms_per_image"]
    spread_of_tasks = ""
    if "tasks_over_floor" in run:
        spread_of_tasks = " (by task, quartiles {0:.2f} to {2:.2f})".format(*run["tasks_over_floor"])
    phases = ", ".join(f"{phase} {value:.1f} s" for phase, value in run["seconds"].items() if phase != "total")
    early, median, late = run["task20_over_task1"]
    half = ", ".join(about["bf16_instructions"]) or "none"
    ours = f"lamina finetune, {found['precision']}"
    rows = [
        "| | Whole run, s | Training step, ms | in the last task over the first | Evaluation, s "
        "| Peak memory, MB | Final accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row(name, runs) for name, runs in found["runs"].items()),
    ]
    a, b, c = rivals.speedup(found, ours, rivals.PEFT_LOOPS)
    compiled = (
        "was not measured here."
        if line["short"]
        else "could not be measured; `python benchmarks/floor.py --compile` says why."
    )
    if line["compiled"]:
        eager_ms, compiled_ms = line["compiled"]["ms_per_image"][1], line["compiled"]["compiled_ms_per_image"][1]
        compiled = (
            f"takes {compiled_ms:.2f} ms per image instead of {eager_ms:.2f} (round by round in turn), after "
            f"{line['compiled']['compile_seconds']:.0f} s of compiling. lamina does not use it."
        )
    as_one = ", its blocks computed as lamina does," if run["precision"] == "bf16" else ""
    alone = found["seeds"] == 1
    seeds = "one seed" if alone else f"medians over {found['seeds']} seeds (quartiles in brackets)"
    spread = "" if alone else f" ({a:.2f} to {c:.2f})"
    return "\n\n".join(
        [
            f"## In {name}",
            f"{line['date']}, {about['processor']}, {about['cores']} cores, {about['threads']} threads, "
            f"{about['memory_gb']} GB, {about['system']}, no GPU; bf16 instructions: {half}. Python "
            f"{about['python']}, torch {about['torch']}, transformers {about['transformers']}, PEFT {about['peft']}, lamina "
            f"{about['lamina']}.{noted(line)}",
            f"**Against the floor.** Split CIFAR-100 in ten tasks, {run['per_class']} training images of each class (of 500) "
            f"and a fifth as many test images, as in the whole; `{run['method']}` on `nano`, rank {whole.RANK} on "
            f"{' and '.join(whole.TARGETS)}, twenty epochs, batch {whole.BATCH}. Forward and input-gradient backward of the "
            f"bare frozen backbone{as_one} take {middle:.2f} ms per image (quartiles {low:.2f} to {high:.2f}, measured "
            f"within this run{other_ways(run)}). The run takes {run['seconds']['total']:.0f} s for {run['images']} training "
            f"images: **{run['floor_ratio']:.2f} times the floor**, its training steps alone "
            f"{run['training_over_floor']:.2f} times{spread_of_tasks}. "
            f"Outside the steps: {100 * run['outside_steps']:.1f} %. {phases}. The two passes for moments and all else at the "
            f"beginning and end of tasks: {100 * run['moments_share_at_most']:.1f} %. A step in task 20 takes {median:.2f} "
            f"times that in task 1 (quartiles {early:.2f} to {late:.2f}).",
            f"**`torch.compile`** on the bare backbone, of transformers' own blocks, {compiled}",
            f"**Against loops by hand.** The same stream with {found['per_class']} images of each class and {found['epochs']} "
            f"epochs; {seeds}. lamina's `finetune` trains the same numbers as PEFT and is the one "
            f"to compare: the fastest PEFT loop ({line['fastest_peft']}) takes {b:.2f} times as long{spread}"
            f"{like_for_like(found)}.",
            "\n".join(rows),
        ]
    )


def other_ways(run: dict[str, Any]) -> str:
    """What the floor is in the ways that are not the fastest."""
    ways = run.get("floor_ways_ms_per_image", {})
    fastest = next((way for way, ms in ways.items() if ms == run["floor_ms_per_image"]), None)
    others = [f"{way} {ms[1]:.2f}" for way, ms in ways.items() if way != fastest]
    return f", with a batch {fastest}; {', '.join(others)}" if others else ""


def noted(line: dict[str, Any]) -> str:
    return f" {line['note']}" if "note" in line else ""


def like_for_like(found: dict[str, Any]) -> str:
    """Where lamina takes bf16: what each precision gives by itself, so that nobody is misled about where a gain comes from."""
    if found["precision"] == "fp32":
        return ""
    both, same = (rivals.speedup(found, f"lamina finetune, {kind}", ["PEFT, fp32"])[1] for kind in ("bf16", "fp32"))
    return f". PEFT in fp32 takes {both:.2f} times as long as lamina in bf16, and {same:.2f} times as long as lamina in fp32"


def row(name: str, runs: dict[str, list[Any]]) -> str:
    steps = [statistics.median(of_task) for of_task in zip(*runs["step_ms"], strict=True)]
    growth = statistics.median(ms[-1] / ms[0] for ms in runs["step_ms"])
    return (
        f"| {name} | {statistics.median(runs['seconds']):.1f} | {statistics.median(steps):.0f} | {growth:.2f} "
        f"| {statistics.median(runs['evaluate_seconds']):.1f} | {max(runs['peak_mb']):.0f} "
        f"| {100 * statistics.mean(runs['accuracy']):.1f} % |"
    )


def plot(lines: list[dict[str, Any]]) -> Markup:
    """Bars: seconds of a whole run for every contender, a group and a scale for every section of the page."""
    left, wide, high, y = 260.0, 380.0, 24.0, 10.0
    parts = []
    for heading, line in newest_of(lines).items():
        parts.append(tag("text", f"{heading}: {line['machine']['processor']}", x=10, y=y + 14, font_weight="bold"))
        bars = {name: statistics.median(of["seconds"]) for name, of in line["rivals"]["runs"].items()}
        for name, seconds in bars.items():
            y += high
            length = wide * seconds / max(bars.values())
            fill = "#2b6cb0" if name.startswith("lamina") else "#a0aec0"
            parts += [
                tag("text", name, x=left - 8, y=y + 13, text_anchor="end"),
                tag("rect", x=left, y=y, width=length, height=high - 6, fill=fill),
                tag("text", f"{seconds:.0f} s", x=left + length + 6, y=y + 13),
            ]
        y += 1.5 * high
    height = y
    return tag(
        "svg",
        tag("title", "Seconds of a whole run"),
        tag("rect", width="100%", height="100%", fill="white"),
        tag("g", *parts, font_family="sans-serif", font_size=12),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {left + wide + 60:g} {height:g}",
        width=left + wide + 60,
    )


def read(records: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()] if records.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--page", action="store_true", help="only write the page and the plot again")
    options = parser.parse_args()
    found = None if options.page else measure(options.quick, options.short)
    if found and not found["quick"]:
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    if options.page or (found and not found["quick"]):
        lines, cards, accuracy = (read(path) for path in (RECORDS, CARDS, ACCURACY))
        PAGE.write_text(page(lines, cards, accuracy), encoding="utf-8")
        PLOT.write_text(str(plot(lines)) + "\n", encoding="utf-8")
        whole.say(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")
    if found:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
