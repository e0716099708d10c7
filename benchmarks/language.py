"""A causal language model: lamina against PEFT and transformers, in training, ranking, generation and loading.

    python benchmarks/language.py                    an hour; writes docs/results/records/language-speed.json
    python benchmarks/language.py --quick            few repeats; records nothing
    python benchmarks/language.py --page docs/results/language-speed.md     from the record; nothing is measured

All contenders have the same weights (SmolLM2-135M, `make runs/smollm2`), adapted layers (q and v, rank 8), precision, batches
and threads. They take turns batch by batch within one process, so that all see the same changes in the speed of the machine;
ratios are medians over pairs of turns. Before anything is timed, losses, gradients, scores of options and generated tokens are
compared. Peak memory is that of a process per contender. Needs ../shared/data/text14. The last line is JSON.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `lamina` sets it: threads that wait sleep

import numpy as np
import torch
from bench import machine
from language_rivals import (
    TARGETS,
    TASK,
    Floor,
    Lamina,
    Peft,
    agreement,
    folded,
    generated,
    generated_by_lamina,
    long_batch,
    ranked_apart,
    ranked_by_cache,
    ranked_by_lamina,
)
from rivals import peak_memory_mb
from torch import Tensor

from lamina import backbones, data
from lamina.engine.completions import questions as as_questions
from lamina.learner import LanguageLearner
from lamina.runs.environment import checkout_commit
from lamina.speed import keeping_memory
from lamina.types import Batch, Examples, LabelledData

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXTS = ROOT / "runs" / "smollm2", ROOT.parent / "shared" / "data" / "text14"
RECORD = ROOT / "docs" / "results" / "records" / "language-speed.json"
DOMAINS, TEMPLATE = ("agnews", "boolq"), "{text}\nOptions: {options}\nAnswer:"
RANKED = {"boolq": 2, "agnews": 4, "dbpedia": 14}
"""Domains whose options are ranked, with the number of options."""
RANK, BATCH, LONGEST, WRITTEN, VOCABULARY = 8, 8, 128, 32, 49152
LONG = (4, 512, 256)
"""Sequences, tokens, and tokens of the completion in the synthetic batch."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOSSES, GRADIENTS = {"bf16": 0.015, "fp32": 1e-4}, {"bf16": 0.3, "fp32": 1e-2}
"""How far mean losses and gradients of PEFT may be, relative to lamina's."""
SCORES = {"bf16": 0.5, "fp32": 1e-3}
"""How far log-likelihoods of options may be, on average. In bf16 those of each contender, transformers included, are about 0.2
from those in fp32."""
PEFT: dict[str, dict[str, Any]] = {
    "PEFT": {},
    "PEFT, needed logits": {"logits": "needed"},
    "PEFT, needed logits, eager attention": {"logits": "needed", "attention": "eager"},
}
OURS, APART = "lamina, accelerated", "transformers, a sequence per option"
Make = Callable[[Path, torch.dtype], Any]
TRAINING: dict[str, Make] = {
    OURS: partial(Lamina, rank=RANK),
    "lamina, plain": partial(Lamina, rank=RANK, accelerated=False),
    **{name: partial(Peft, rank=RANK, **how) for name, how in PEFT.items()},
    "floor": Floor,
}
Times = dict[str, list[float]]


# ---------------------------------------------------------------------------------------------- batches


def instructions(folder: Path = MODEL, texts: Path = TEXTS, count: int = 400) -> LabelledData:
    """Returns labelled texts as instructions, of which `count` training rows of every domain used here are tokenised."""
    source = data.as_instructions(data.open_source(texts), TEMPLATE)
    of_domain = [np.flatnonzero((source.domains_n == source.domain_names.index(name)) & (source.splits_n == 0))
                 for name in dict.fromkeys((*DOMAINS, *RANKED))]  # fmt: skip
    used = np.concatenate([rows_n[:: max(1, len(rows_n) // count)][:count] for rows_n in of_domain])
    return data.load_instructions(source, folder, max_length=LONGEST, used=used)


def examples_of(labelled: LabelledData, domain: str) -> Examples:
    """Returns the tokenised training rows of a domain."""
    lengths_n = labelled.table.lengths(np.arange(len(labelled.labels_n)))
    own_n = (labelled.domains_n == labelled.domain_names.index(domain)) & (lengths_n > 0)
    rows_n = np.flatnonzero(own_n)
    return Examples(labelled.table, rows_n, labelled.labels_n[rows_n])


def by_length(examples: Examples, size: int, count: int) -> list[Any]:
    """Returns the positions of `count` batches of examples of similar lengths, evenly from the shortest to the longest."""
    order_n = np.argsort(examples.lengths(), kind="stable")
    groups = [order_n[start : start + size] for start in range(0, len(order_n) - size + 1, size)]
    wanted = np.linspace(0, len(groups) - 1, count + 2)[1:-1].round().astype(int)
    return [groups[k] for k in wanted]


def batches(
    labelled: LabelledData, each: int, domains: Sequence[str] = DOMAINS, *, questions: bool = False
) -> list[Batch]:
    """Returns `each` batches of every domain."""
    found = []
    for domain in domains:
        examples = examples_of(labelled, domain)
        make = partial(as_questions, examples) if questions else examples.batch
        found += [make(positions) for positions in by_length(examples, BATCH, each)]
    return found


def tokens_of(batch: Batch) -> int:
    """Returns the number of tokens of a batch, without padding."""
    return int(batch.inputs["attention_mask"].sum())


# ---------------------------------------------------------------------------------------------- taking turns


def turns(works: Mapping[str, Callable[[Batch], object]], given: Sequence[Batch], rounds: int) -> Times:
    """Returns the seconds of every piece of work on every batch, round after round, after a turn of each on the first batch.

    In every other round the order is reversed.
    """
    for work in works.values():
        work(given[0])
    found: Times = {name: [] for name in works}
    for number in range(rounds):
        for batch in given:
            for name in list(works) if number % 2 == 0 else reversed(list(works)):
                started = time.perf_counter()
                works[name](batch)
                found[name].append(time.perf_counter() - started)
    return found


def summary(times: Times, units: Sequence[int], baseline: str = OURS) -> dict[str, dict[str, float]]:
    """Returns by contender: units a second (in all turns together), and its time relative to that of the baseline, the median
    and quartiles over pairs of turns.

    units: tokens or examples of every batch, in the order of the turns of one round.
    """
    found = {}
    for name, seconds in times.items():
        total = sum(units) * len(seconds) / len(units)
        ratios = [own / base for own, base in zip(seconds, times[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        found[name] = {
            "per_second": round(total / sum(seconds), 2),
            "median_ms": round(1000 * statistics.median(seconds), 1),
            "relative": round(middle, 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
    return found


# ---------------------------------------------------------------------------------------------- measuring


def training(precision: str, given: Sequence[Batch], rounds: int) -> dict[str, Any]:
    """Returns what training steps take, and how well the losses agree."""
    with ExitStack() as stack:
        made = {name: make(MODEL, PRECISIONS[precision]) for name, make in TRAINING.items()}
        for one in made.values():
            stack.enter_context(closing(one))
        agreed = {name: agreement(made[OURS], made[name], given) for name in PEFT}
        for name, found in agreed.items():
            check_agreement(found, name, precision, len(given))
        plain, faster = (mean_loss(made[name], given) for name in ("lamina, plain", OURS))
        assert abs(plain - faster) <= allowed(precision, len(given)) * abs(plain), (plain, faster)
        times = turns({name: one.step for name, one in made.items()}, given, rounds)
    return {"agreement": agreed, "steps": summary(times, [tokens_of(batch) for batch in given])}


def mean_loss(contender: Any, given: Sequence[Batch]) -> float:
    with torch.no_grad():
        losses: list[float] = [contender.loss(batch).item() for batch in given]
    return statistics.mean(losses)


def allowed(precision: str, batches: int) -> float:
    """Returns how far two losses may be apart, relatively. In bf16 one batch may be twice as far as the mean of several."""
    return LOSSES[precision] * (2 if batches == 1 and precision == "bf16" else 1)


def check_agreement(found: Mapping[str, float], name: str, precision: str, batches: int) -> None:
    """Raises AssertionError where lamina and PEFT do not compute the same loss and gradients."""
    distance = abs(found["lamina"] - found["peft"]) / abs(found["lamina"])
    assert distance <= allowed(precision, batches), f"{name}, {precision}: losses differ, {found}"
    assert found["gradients"] <= GRADIENTS[precision], f"{name}, {precision}: gradients differ, {found}"


def ranking(precision: str, given: Mapping[str, Sequence[Batch]], rounds: int) -> dict[str, Any]:
    """Returns what ranking the options of the questions of every domain takes."""
    with closing(Lamina(MODEL, PRECISIONS[precision], RANK)) as ours, folded(ours):
        theirs = Peft(MODEL, PRECISIONS[precision], RANK)
        theirs.take(ours.learner)
        merged = theirs.merged()
        ways: dict[str, Callable[[Batch], Tensor]] = {
            OURS: partial(ranked_by_lamina, ours),
            APART: lambda batch: ranked_apart(merged, batch.inputs),
            "transformers, shared past_key_values": lambda batch: ranked_by_cache(merged, batch.inputs),
        }
        distances = {}
        for name, way in ways.items():
            pairs = [(way(batch), ours.learner.option_scores(batch)) for batch, *_ in given.values()]
            assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)
            distances[name] = max(float((a - b)[b.isfinite()].abs().mean()) for a, b in pairs)
            assert distances[name] <= SCORES[precision], f"{name}, {precision}: scores differ by {distances[name]}"
        steps = {
            domain: summary(turns(ways, own, rounds), [len(batch) for batch in own]) for domain, own in given.items()
        }
    return {"distances": distances, "steps": steps}


def generation(precision: str, given: Sequence[Batch], rounds: int, pad: int) -> dict[str, Any]:
    """Returns what generating 32 tokens after every prompt takes."""
    dtype = PRECISIONS[precision]
    with closing(Lamina(MODEL, dtype, RANK)) as ours, folded(ours):
        unmerged, other = (Peft(MODEL, dtype, RANK) for _ in range(2))
        unmerged.take(ours.learner)
        unmerged.model.eval()
        other.take(ours.learner)
        merged = other.merged()
        ways: dict[str, Callable[[Batch], list[list[int]]]] = {
            OURS: lambda batch: generated_by_lamina(ours, batch, WRITTEN, pad),
            "PEFT, merged": lambda batch: generated(merged, batch, WRITTEN, pad),
            "PEFT, unmerged": lambda batch: generated(unmerged.model, batch, WRITTEN, pad),
        }
        texts = {name: np.array(way(given[0])) for name, way in ways.items()}
        same = {name: round(float((ids == texts[OURS]).mean()), 3) for name, ids in texts.items()}
        assert precision != "fp32" or min(same.values()) > 0.95, f"generated tokens differ: {same}"
        times = turns(ways, given, rounds)
    return {"same_tokens": same, "steps": summary(times, [WRITTEN * len(batch) for batch in given])}


def load_lamina(precision: str) -> float:
    """Loads a learner with adapters and computes one loss: weights that are mapped into memory are read only then."""
    dtype = PRECISIONS[precision]
    learner = LanguageLearner(backbones.load(str(MODEL), dtype=dtype), TARGETS, dtype=dtype)
    learner.add_lora(TASK, RANK, "benchmark")
    return learner.loss(long_batch(1, 8, 4, VOCABULARY), TASK).item()


def load_peft(precision: str) -> float:
    return Peft(MODEL, PRECISIONS[precision], RANK, logits="needed").loss(long_batch(1, 8, 4, VOCABULARY)).item()


LOADING: dict[str, Callable[[str], float]] = {"lamina": load_lamina, "PEFT": load_peft}


def alone(what: str, name: str, precision: str) -> dict[str, float]:
    """Does a part of one contender in this process. Returns its seconds, and its peak memory in 10^6 bytes."""
    import peft
    import transformers

    assert peft
    assert transformers.AutoModelForCausalLM  # imported lazily
    before, started = peak_memory_mb(), time.perf_counter()
    if what == "loading":
        LOADING[name](precision)
        seconds = time.perf_counter() - started
    else:
        given = [long_batch(*LONG, VOCABULARY)] if what == "long" else batches(instructions(), 1)
        with closing(TRAINING[name](MODEL, PRECISIONS[precision])) as made, keeping_memory():
            started = time.perf_counter()
            for batch in given * (1 if what == "long" else 2):
                made.step(batch)
            seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "peak_mb": round(peak_memory_mb()), "imports_mb": round(before)}


def in_processes(what: str, names: Sequence[str], precision: str, threads: int, repeats: int) -> dict[str, Any]:
    """Returns the results of `alone`, medians over processes that take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            command = [sys.executable, __file__, "--alone", what, name, precision, "--threads", str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{what}, {precision}, {name}: {found[name][-1]}")
    return {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def measure(quick: bool, precision: str, threads: int) -> dict[str, Any]:
    labelled = instructions()
    each, rounds = (1, 1) if quick else (3, 5)
    short, long = batches(labelled, each), [long_batch(*LONG, VOCABULARY)]
    asked = {domain: batches(labelled, each, (domain,), questions=True) for domain in RANKED}
    pad = labelled.table.pad_id  # type: ignore[attr-defined]
    found: dict[str, Any] = {
        "machine": machine(),
        "commit": checkout_commit(),
        "quick": quick,
        "batches": [[len(batch), batch.inputs["input_ids"].shape[1], tokens_of(batch)] for batch in short],
        "completion_tokens": [int(batch.inputs["completion_mask"].sum()) for batch in short],
    }
    parts: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat()}
    with keeping_memory():
        works: dict[str, Callable[[], dict[str, Any]]] = {
            "training": partial(training, precision, short, rounds),
            "training, long completions": partial(training, precision, long, 1 if quick else 4),
            "ranking": partial(ranking, precision, asked, rounds),
            "generation": partial(generation, precision, [asked[domain][0] for domain in DOMAINS], rounds, pad),
        }
        for name, work in works.items():
            parts[name] = work()
            gc.collect()
            say(f"{precision}, {name}: {json.dumps(parts[name])}")
    compared = [name for name in TRAINING if name != "floor"]
    parts["memory"] = in_processes("short", compared, precision, threads, 1 if quick else 3)
    parts["memory, long completions"] = in_processes("long", compared, precision, threads, 1 if quick else 3)
    parts["loading"] = in_processes("loading", [*LOADING], precision, threads, 1 if quick else 5)
    return found | {"precisions": {precision: parts}}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    """Returns the page of a record."""
    about = found["machine"]
    shapes = ", ".join(f"{b} x {t}" for b, t, _ in found["batches"])
    b, t, completion = LONG
    dates = sorted({of["date"] for of in found["precisions"].values()})
    parts = [
        "# Language models: speed and memory",
        finding(found),
        "Written by `python benchmarks/language.py` from `records/language-speed.json`; do not edit. SmolLM2-135M, adapters of "
        f"rank {RANK} on q and v. PEFT: frozen base in the same precision, float32 adapters, labels outside the completion "
        "-100, AdamW, no trainer. With needed logits, scores over the vocabulary are computed before completion tokens only, "
        "as lamina does. lamina, accelerated, is lamina as it runs; plain is without its own attention, norms and fusions. "
        "The floor is a forward and a backward of the gradients of inputs, without adapters.",
        f"Batches of agnews and boolq (text14), padded to {shapes}, completions of {min(found['completion_tokens']) // BATCH} "
        f"to {-(-max(found['completion_tokens']) // BATCH)} tokens on average; and a synthetic one of {b} x {t} tokens, "
        f"{completion} of each sequence to be learnt. Contenders take turns batch by batch; relative times are medians over "
        "pairs of turns (quartiles), so they need not be the ratios of the medians. Peak memory is that of a process of its "
        "own, imports included: the median of three.",
        *(section(precision, parts) for precision, parts in found["precisions"].items()),
        f"{' and '.join(dates)}, {about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['memory_gb']} GB, "
        f"{about['system']}, no GPU; bf16 instructions: {', '.join(about['bf16_instructions']) or 'none'}. Python "
        f"{about['python']}, torch {about['torch']}, transformers {about['transformers']}, PEFT {about['peft']}, lamina "
        f"{about['lamina']} (commit {found['commit']}). `OMP_WAIT_POLICY=passive`.",
    ]
    return "\n\n".join(parts) + "\n"


def finding(found: Mapping[str, Any]) -> str:
    """Returns the page's first sentences and its first table: times relative to lamina's."""
    of = found["precisions"]

    def row(title: str, value: Callable[[Mapping[str, Any]], str]) -> str:
        return f"| {title} | " + " | ".join(value(parts) for parts in of.values()) + " |"

    def fastest(part: str, parts: Mapping[str, Any]) -> tuple[float, str]:
        steps = parts[part]["steps"]
        return min((steps[name]["relative"], name) for name in steps if name.startswith("PEFT"))

    def named(part: str, parts: Mapping[str, Any]) -> str:
        relative, name = fastest(part, parts)
        return f"{relative:.2f} ({name})"

    def ranked(domain: str, parts: Mapping[str, Any]) -> str:
        return f"{parts['ranking']['steps'][domain][APART]['relative']:.1f}"

    def memory(part: str, parts: Mapping[str, Any]) -> str:
        return f"{parts[part]['PEFT, needed logits']['peak_mb'] / parts[part][OURS]['peak_mb']:.2f}"

    def listed(values: Iterable[float]) -> str:
        return " and ".join(f"{value:.2f}" for value in values)

    rows = [
        f"| Relative to lamina (above 1: lamina is faster, or needs less memory) | {' | '.join(of)} |",
        "|---|" + "---:|" * len(of),
        row("Training, PEFT", lambda parts: f"{parts['training']['steps']['PEFT']['relative']:.2f}"),
        row("Training, fastest PEFT loop", partial(named, "training")),
        row("Long completions, fastest PEFT loop", partial(named, "training, long completions")),
        *(
            row(f"Ranking of {count} options, a sequence per option", partial(ranked, domain))
            for domain, count in RANKED.items()
        ),
        *(
            row(f"{title}, peak memory of PEFT, needed logits", partial(memory, part))
            for title, part in (("Training", "memory"), ("Long completions", "memory, long completions"))
        ),
        row(
            "Generation, merged weights",
            lambda parts: f"{parts['generation']['steps']['PEFT, merged']['relative']:.2f}",
        ),
    ]
    return (
        f"**For a training step in {' and '.join(of)}, the fastest PEFT loop takes "
        f"{listed(fastest('training', parts)[0] for parts in of.values())} times as long as lamina, and PEFT with the defaults "
        f"of transformers {listed(parts['training']['steps']['PEFT']['relative'] for parts in of.values())} times.**\n\n"
        + "\n".join(rows)
    )


def section(precision: str, parts: Mapping[str, Any]) -> str:
    rows = [f"## In {precision}"]
    ranked = {
        f"Ranking of {RANKED[domain]} options ({domain}), batch {BATCH}": of
        for domain, of in parts["ranking"]["steps"].items()
    }
    tables = {
        "Training": parts["training"]["steps"],
        "Training, long completions": parts["training, long completions"]["steps"],
        **ranked,
        f"Generation of {WRITTEN} tokens, batch {BATCH}": parts["generation"]["steps"],
    }
    for title, steps in tables.items():
        memory = parts[title.replace("Training", "memory")] if title.startswith("Training") else {}
        head = f"| {title} | {'Examples/s' if title in ranked else 'Tokens/s'} | Median, ms | Relative to lamina |"
        lines = [head + (" Peak memory, MB |" if memory else ""), "|---|---:|---:|---:|" + ("---:|" if memory else "")]
        for contender, of in steps.items():
            line = (
                f"| {contender} | {of['per_second']:.1f} | {of['median_ms']:.0f} | {of['relative']:.2f} ({of['low']:.2f} to "
                f"{of['high']:.2f}) |"
            )
            peak = memory.get(contender)
            lines.append(line + (f" {peak['peak_mb']:.0f} |" if peak else " |" if memory else ""))
        rows.append("\n".join(lines))
    lines = ["| Loading, and one loss | Seconds | Peak memory, MB |", "|---|---:|---:|"]
    lines += [f"| {name} | {of['seconds']:.2f} | {of['peak_mb']:.0f} |" for name, of in parts["loading"].items()]
    rows.append("\n".join(lines))
    agreed = parts["training"]["agreement"]["PEFT"]
    rows.append(
        f"With the same factors, the mean loss over the batches is {agreed['lamina']:.4f} in lamina and {agreed['peft']:.4f} "
        f"in PEFT; on the first batch, gradients of a factor differ by {100 * agreed['gradients']:.2g} % at most. "
        f"Log-likelihoods of options differ by "
        f"{max(parts['ranking']['distances'].values()):.2g} on average. Generated tokens are the same in "
        f"{100 * min(parts['generation']['same_tokens'].values()):.0f} % of places or more."
        + (" Differences in bf16 are rounding: in fp32 both compute the same." if precision == "bf16" else "")
    )
    return "\n\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"))
    parser.add_argument("--page", type=Path, help="write the page from the record, without measuring")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", nargs=3, metavar=("PART", "NAME", "PRECISION"), help="one part in this process")
    options = parser.parse_args()
    if options.page:
        if not RECORD.is_file():
            parser.error(f"{RECORD} does not exist. Measure first: leave --page out")
        options.page.write_text(page(json.loads(RECORD.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    torch.set_num_threads(options.threads)
    if options.alone:
        print(json.dumps(alone(*options.alone)))
        return
    for precision in options.precisions:
        found = measure(options.quick, precision, options.threads)
        if not options.quick:
            RECORD.write_text(json.dumps(with_others(found), indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found))


def with_others(found: dict[str, Any]) -> dict[str, Any]:
    """Returns a measurement with those in other precisions that were recorded on the same machine, of the same code."""
    old = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    same = all(old.get(key) == found[key] for key in ("machine", "commit"))
    return found | {"precisions": (old["precisions"] if same else {}) | found["precisions"]}


if __name__ == "__main__":
    main()
