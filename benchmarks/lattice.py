"""Make the cells of a grid that differ only in `consolidation`: every method is trained once per seed and stream, and all its
consolidations are replayed from that (chains.py). They become ordinary finished cells, from which `lamina compare` makes the
table.

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

import chains
import torch

from lamina import runs
from lamina.compare import Study
from lamina.compare.cells import Place
from lamina.config import ConsolidationConfig, RunConfig

Cells = list[tuple[str, RunConfig, Path]]
"""Name, settings and folder."""


def chain_of(config: RunConfig) -> RunConfig:
    """Returns the run that trains what this one consolidates. Its own predictions are not used, so there are few."""
    own = config.consolidation
    kept = own if own.init == "merged" else ConsolidationConfig(init=own.init)
    few = config.evaluation.model_copy(update={"per_class": 1})
    return config.model_copy(update={"consolidation": kept, "evaluation": few})


def groups(study: Study, only: str) -> dict[Path, tuple[RunConfig, Cells]]:
    """Returns every chain by the folder it lies in, and its cells that are not done."""
    found: dict[Path, tuple[RunConfig, Cells]] = {}
    for row in study.grid.rows:
        for cell in study.table_cells(row):
            config, place = runs.with_whole_paths(cell.config), study.place(cell)
            if place.state == "done" or only not in cell.name:
                continue
            chain = chain_of(config)
            folder = study.store.folder / "chains" / study.store.place(chain).folder.name
            place.folder.mkdir(parents=True, exist_ok=True)
            place.begin(config, study.store.identity(config))
            found.setdefault(folder, (chain, []))[1].append((cell.name, config, place.folder))
    return found


def work(folder: Path, chain: RunConfig, cells: Cells) -> str:
    torch.set_num_threads(1)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    chains.create(chain, folder)
    by_weights: dict[str, Cells] = defaultdict(list)
    for cell in cells:
        by_weights[cell[1].consolidation.merging].append(cell)
    for same in by_weights.values():
        memo: chains.Memo = {}
        for name, config, place in same:
            shutil.rmtree(Place(place).run, ignore_errors=True)
            record = chains.replay(folder, config, Place(place).run, memo)
            print(f"{name}: final accuracy {record.metrics.final_accuracy:.1%}", flush=True)
    return f"{folder.name}: {len(cells)} cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="only cells whose name holds this")
    parser.add_argument("--records", type=Path, help="as of `lamina compare`")
    parser.add_argument("--keep-code", action="store_true", help="as of `lamina compare`")
    options = parser.parse_args()
    todo = groups(Study(options.grid, records=options.records, keep_code=options.keep_code), options.only or "")
    print(f"{len(todo)} chains, {sum(len(cells) for _, cells in todo.values())} cells to make", flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(work, folder, *rest) for folder, rest in todo.items()]):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
