"""Speed, end to end: the floor of this machine, a whole run of lamina, and hand-written loops on the same stream. `make bench`.

    python benchmarks/bench.py             about half an hour; adds a line to docs/results/records/speed.jsonl, writes the page
    python benchmarks/bench.py --quick     under five minutes; records nothing
    python benchmarks/bench.py --short     between the two, for a machine that is available for minutes only; recorded as short
    LARGE=1 python benchmarks/bench.py     the same with adapters of rank 32 on all six linear layers of a block
    python benchmarks/bench.py --page      writes the page and its plot from the records, without measuring

The last line is JSON: floor_ratio (whole run, relative to the floor of as many images), peft_speedup (whole run of the fastest
PEFT loop, relative to lamina's `finetune`, which trains the same parameters), task20_over_task1 (training step), outside_steps
(share of the run outside training steps), peak_mb, peft_peak_mb, precision, accuracy and reference_accuracy (final, of InfLoRA
in this precision and in fp32, mean over the same seeds), and the measurements behind them. A `note` added to a line of the
records by hand is shown in its section.
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
GPUS = ROOT / "docs" / "results" / "records" / "shapes.jsonl"
ACCURACY = ROOT / "docs" / "results" / "records" / "accuracy.jsonl"
TWO_RUNS = ROOT / "docs" / "results" / "records" / "two_runs.json"
INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


def measure(quick: bool, short: bool) -> dict[str, Any]:
    """Returns all measurements. Each part is a process of its own, so that its peak memory is its own."""
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
        "regime": whole.REGIME,
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
    """Returns the last line of a part. optional: None if it fails, as torch.compile does without a compiler."""
    command = [sys.executable, str(Path(__file__).with_name(file)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=not optional)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": sorted(INSTRUCTIONS & set(flags)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "lamina")},
    }


# ---------------------------------------------------------------------------------------------- the page


def page(lines: list[dict[str, Any]], gpus: list[dict[str, Any]], accuracy: list[dict[str, Any]]) -> str:
    """Returns the page of the newest line in each precision and number of threads."""
    newest = newest_of(lines)
    parts = [
        "# Speed and memory",
        finding(newest),
        summary(newest),
        "Written by `make bench` from `records/speed.jsonl`; do not edit. The cost by the number of tasks is on "
        "[a page of its own](growth.md). The floor is the time of a frozen backbone that learns nothing: "
        "a forward, and a backward of the gradients of inputs.",
        "![Seconds of a whole run, by contender](speed.svg)",
        *(section(name, line) for name, line in newest.items()),
    ]
    if not any(line["precision"] == "bf16" for line in newest.values()):
        parts.append(
            "## bf16\n\nNot measured: no machine with native bf16 instructions (`avx512_bf16`, `amx_bf16`) was available. "
            "On such a machine `make bench` adds this section."
        )
    if accuracy:
        parts.append(accuracy_section(accuracy))
    if TWO_RUNS.is_file():
        parts.append(two_runs_section(json.loads(TWO_RUNS.read_text(encoding="utf-8"))))
    parts += [on_a_gpu(line) for line in gpus]
    return "\n\n".join(parts) + "\n"


def accuracy_section(lines: list[dict[str, Any]]) -> str:
    """Returns the section of `accuracy.py`."""
    first, differences = lines[0], [line["bf16"] - line["fp32"] for line in lines]
    rows = [f"| {line['seed']} | {100 * line['fp32']:.1f} % | {100 * line['bf16']:.1f} % |" for line in lines]
    spread = statistics.stdev(line["fp32"] for line in lines)
    return "\n\n".join(
        [
            "## Accuracy in bf16",
            f"bf16 minus fp32 is {100 * statistics.mean(differences):+.1f} points on average ({100 * min(differences):+.1f} to "
            f"{100 * max(differences):+.1f}); the standard deviation over the seeds is {100 * spread:.1f} points (fp32)."
            f"{noted(first)}",
            "\n".join(["| Seed | fp32 | bf16 |", "|---|---:|---:|", *rows]),
            f"Final accuracy of `{first['method']}` on Split CIFAR-100 in ten tasks, {first['per_class']} images per class, "
            f"{first['epochs']} epochs (`python benchmarks/accuracy.py`).",
        ]
    )


def two_runs_section(found: dict[str, Any]) -> str:
    """Returns the section of `two_runs.py`."""

    def shown(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return (
            f"{statistics.median(known):.0f}"
            if len(known) == len(values)
            else f"not finished in {found['limit_s']:.0f} s"
        )

    rows = [
        f"| {row['precision']} | {row['policy']} | {shown(row['alone_ms'])} | {shown(row['two_runs_ms'])} |"
        for row in found["rows"]
    ]
    about = found["machine"]
    return "\n\n".join(
        [
            "## Two runs on one machine",
            f"Milliseconds per training step of `finetune` on digits, batch 32; medians. Each run has as many threads as the "
            f"machine has cores: {about['cores']} ({about['cpu']}). With the command's default, "
            "`OMP_WAIT_POLICY=passive`, waiting threads sleep; with OpenMP's own default they spin first, "
            "and keep the other run from its cores "
            "(`python benchmarks/two_runs.py`).",
            "\n".join(["| | waiting threads | one run alone | two runs side by side |", "|---|---|---:|---:|", *rows]),
        ]
    )


def newest_of(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    def name(line: dict[str, Any]) -> str:
        threads = line["machine"]["threads"]
        large = "" if regime_of(line) == next(iter(whole.REGIMES)) else f", {regime_of(line)}"
        return f"{line['precision']}, {threads} thread{'s' if threads > 1 else ''}{large}"

    return {name(line): line for line in lines if not line["quick"]}


def regime_of(line: dict[str, Any]) -> str:
    """Returns rank and roles of the adapters. Older lines do not say them."""
    return str(line.get("regime", next(iter(whole.REGIMES))))


def on_a_gpu(line: dict[str, Any]) -> str:
    """Returns the section of what `shapes.py` measured on one GPU."""
    about = line["machine"]
    shown = any("CUDA graph" in name for size in line["sizes"] for name in size["steps"])
    graphs = "has a row of its own here" if shown else "was not measured here"
    parts = [
        f"## On a GPU: {line['gpu']}",
        "Training steps with random weights at 224 px, rank 10 on k and v, with a batch that is ready. A run uses a CUDA graph "
        f"if that is faster; it {graphs}. The fraction of the peak counts the operations of the floor only, relative to a bf16 "
        f"matrix product of 8192 rows and columns in the same process ({line['peak_tflops']:.0f} TFLOP/s).{noted(line)}",
        f"{line['date']}, `python benchmarks/shapes.py`; torch {about['torch']}, transformers {about['transformers']}, PEFT "
        f"{about['peft']}, lamina {about['lamina']}.",
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


def finding(newest: dict[str, dict[str, Any]]) -> str:
    """Returns the page's first sentence."""
    ratios, speedups = ([line[key] for line in newest.values()] for key in ("floor_ratio", "peft_speedup"))
    return (
        f"**A whole run takes {min(ratios):.2f} to {max(ratios):.2f} times the floor of its machine, and the fastest PEFT loop "
        f"takes {min(speedups):.2f} to {max(speedups):.2f} times as long as lamina.**"
    )


def summary(newest: dict[str, dict[str, Any]]) -> str:
    rows = {
        "Whole run, relative to the floor": "floor_ratio",
        "Whole run of the fastest PEFT loop, relative to lamina": "peft_speedup",
        "Training step in task 20, relative to task 1": "task20_over_task1",
        "Time outside training steps": "outside_steps",
        "Peak memory, MB": "peak_mb",
        "Peak memory of that PEFT loop, MB": "peft_peak_mb",
        "Final accuracy, InfLoRA": "accuracy",
        "The same in fp32": "reference_accuracy",
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
    fastest = min(way for way, ms in run["floor_ways_ms_per_image"].items() if ms == run["floor_ms_per_image"])
    early, median, late = run["task20_over_task1"]
    ours = f"lamina finetune, {found['precision']}"
    a, b, c = rivals.speedup(found, ours, rivals.PEFT_LOOPS)
    alone = found["seeds"] == 1
    seeds = "one seed" if alone else f"medians over {found['seeds']} seeds"
    spread = "" if alone else f" (quartiles {a:.2f} to {c:.2f})"
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    return "\n\n".join(
        [
            f"## In {name}",
            f"**Loops by hand.** Split CIFAR-100 in ten tasks, {found['per_class']} images per class, {found['epochs']} "
            f"epochs, {regime_of(line)}; {seeds}. lamina's `finetune` trains the same parameters as PEFT. The fastest PEFT "
            f"loop ({line['fastest_peft']}) takes {b:.2f} times as long{spread}{like_for_like(found)}.",
            "\n".join(
                [
                    "| | Whole run, s | Training step, ms | Last task relative to the first | Evaluation, s "
                    "| Peak memory, MB | Final accuracy |",
                    "|---|---:|---:|---:|---:|---:|---:|",
                    *(row(name, runs) for name, runs in found["runs"].items()),
                ]
            ),
            f"**The floor.** `{run['method']}` on the same stream with {run['per_class']} of 500 training images per class and "
            f"a fifth as many test images, twenty epochs, batch {whole.BATCH}, {regime_of(line)} of "
            f"`nano`. The floor is that of a {fastest} batch, measured within the run.",
            floor_table(run),
            f"A step in task 20 takes {median:.2f} times as long as in task 1 (quartiles {early:.2f} to {late:.2f}). "
            f"`torch.compile` on the bare backbone, with transformers' own blocks, {compiled(line)}",
            f"{line['date']}, {about['cpu']}, {about['cores']} cores, {threads}, {about['memory_gb']} GB, {about['system']}, "
            f"no GPU; bf16 instructions: {', '.join(about['bf16_instructions']) or 'none'}. Python {about['python']}, torch "
            f"{about['torch']}, transformers {about['transformers']}, PEFT {about['peft']}, lamina {about['lamina']}."
            f"{noted(line)}",
        ]
    )


def floor_table(run: dict[str, Any]) -> str:
    """Returns the table of a whole run: the floor, ratios to it, and seconds by phase."""
    rows = {
        f"Floor, {way} batch, ms per image (quartiles)": spread_of(ms)
        for way, ms in run["floor_ways_ms_per_image"].items()
    }
    rows |= {
        "Training images": f"{run['images']}",
        "Whole run, relative to the floor": f"{run['floor_ratio']:.2f}",
    }
    if "regime_ratio" in run:
        rows["Gradients of the adapted weights, ms per image (quartiles)"] = spread_of(run["products_ms_per_image"])
        rows["Whole run, relative to the floor with these gradients"] = f"{run['regime_ratio']:.2f}"
    rows |= {
        "Training steps, relative to the floor (quartiles over the tasks)": f"{run['training_over_floor']:.2f} "
        + "({0:.2f} to {2:.2f})".format(*run["tasks_over_floor"]),
        "Time outside training steps": f"{100 * run['outside_steps']:.1f} %",
        "Beginning and end of tasks, including the passes for moments": f"{100 * run['begin_and_end_share']:.1f} %",
        "Seconds by phase": ", ".join(f"{phase} {value:.1f}" for phase, value in run["seconds"].items()),
    }
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())])


def spread_of(quartiles: list[float]) -> str:
    return "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles)


def compiled(line: dict[str, Any]) -> str:
    """Returns the end of a sentence about torch.compile."""
    if not line["compiled"]:
        failed = "could not be measured; `python benchmarks/floor.py --compile` says why."
        return "was not measured." if line["short"] else failed
    before, after = line["compiled"]["ms_per_image"][1], line["compiled"]["compiled_ms_per_image"][1]
    return (
        f"takes {after:.2f} ms per image instead of {before:.2f} (alternating rounds), after "
        f"{line['compiled']['compile_seconds']:.0f} s of compiling. lamina does not use it."
    )


def noted(line: dict[str, Any]) -> str:
    return f" {line['note']}" if "note" in line else ""


def like_for_like(found: dict[str, Any]) -> str:
    """Returns the comparison of equal precisions, where lamina chooses bf16: it shows where a gain comes from."""
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
    """Returns bars: seconds of a whole run of every contender, with a group and a scale for every section of the page."""
    left, wide, high, y = 260.0, 380.0, 24.0, 10.0
    parts = []
    for heading, line in newest_of(lines).items():
        parts.append(tag("text", f"{heading}: {line['machine']['cpu']}", x=10, y=y + 14, font_weight="bold"))
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
    parser.add_argument(
        "--page", action="store_true", help="write the page and the plot from the records, without measuring"
    )
    options = parser.parse_args()
    found = None if options.page else measure(options.quick, options.short)
    if found and not found["quick"]:
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    if options.page or (found and not found["quick"]):
        lines, gpus, accuracy = (read(path) for path in (RECORDS, GPUS, ACCURACY))
        PAGE.write_text(page(lines, gpus, accuracy), encoding="utf-8")
        PLOT.write_text(str(plot(lines)) + "\n", encoding="utf-8")
        whole.say(f"wrote {PAGE.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")
    if found:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
