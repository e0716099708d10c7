"""Make the cells of a grid that differ only in `consolidation`: every chain is trained once, and all its consolidations are
replayed from it. They become ordinary finished cells, of which `lamina compare` makes the table.

    python benchmarks/lattice.py benchmarks/grids/lattice.yaml --jobs 2
    lamina compare benchmarks/grids/lattice.yaml

Stop it anywhere and give the command again.
"""

import argparse
import os
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from lamina import runs
from lamina.compare import Study
from lamina.compare.cells import Place
from lamina.config import ConsolidationConfig, RunConfig
from lamina.engine.consolidate import Memo

Cells = list[tuple[str, RunConfig, Path]]
"""Name, settings and folder."""


def chain_of(config: RunConfig) -> RunConfig:
    """The run that trains what this one consolidates. Its own answers are no cell's, so there are few."""
    own = config.consolidation
    kept = own if own.init == "merged" else ConsolidationConfig(init=own.init)
    few = config.evaluation.model_copy(update={"per_class": 1})
    return config.model_copy(update={"consolidation": kept, "keep_chain": True, "evaluation": few})


def groups(study: Study) -> dict[Path, tuple[RunConfig, Cells]]:
    """Every chain by the folder it lies in, and its cells that are not done."""
    found: dict[Path, tuple[RunConfig, Cells]] = {}
    for row in study.grid.rows:
        for cell in study.table_cells(row):
            config, place = runs.with_whole_paths(cell.config), study.place(cell)
            if place.state == "done":
                continue
            chain = chain_of(config)
            folder = study.store.folder / "chains" / study.store.place(chain).folder.name
            place.folder.mkdir(parents=True, exist_ok=True)
            place.begin(config, study.store.identity(config))
            found.setdefault(folder, (chain, []))[1].append((cell.name, config, place.folder))
    return found


def work(folder: Path, chain: RunConfig, cells: Cells) -> str:
    torch.set_num_threads(1)
    if (folder / "config.json").exists():
        runs.resume(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        runs.create(chain, folder)
    by_weights: dict[str, Cells] = defaultdict(list)
    for name, config, place in cells:
        own = config.consolidation
        by_weights[f"{own.merge} {own.gamma} {own.floor}"].append((name, config, place))
    for same in by_weights.values():
        memo: Memo = {}
        for name, config, place in same:
            shutil.rmtree(Place(place).run, ignore_errors=True)
            record = runs.replay(folder, config, Place(place).run, memo)
            print(f"{name}: final accuracy {record['metrics']['final_accuracy']:.1%}", flush=True)
    return f"{folder.name}: {len(cells)} cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="only cells whose name holds this")
    parser.add_argument("--records", type=Path, help="as of `lamina compare`")
    parser.add_argument("--keep-code", action="store_true", help="as of `lamina compare`")
    options = parser.parse_args()
    todo = groups(Study(options.grid, records=options.records, keep_code=options.keep_code))
    if options.only:
        todo = {
            f: (chain, kept)
            for f, (chain, cells) in todo.items()
            if (kept := [c for c in cells if options.only in c[0]])
        }
    print(f"{len(todo)} chains, {sum(len(cells) for _, cells in todo.values())} cells to make", flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(work, folder, *rest) for folder, rest in todo.items()]):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
