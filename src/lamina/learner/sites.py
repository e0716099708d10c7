"""AdapterSite: where a branch can go.

Shape letters: o outputs, i inputs, r rank, e routed adapters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lamina.adapters import AdaptedLinear, Branch, Finished, LowRank, Mixture, OutputRange, Router
from lamina.backbones import Site
from lamina.rng import seed_of


@dataclass(frozen=True)
class AdapterSite:
    """One role (say, the keys) of one block. Several sites share a layer where q, k and v are fused."""

    where: Site
    layer: AdaptedLinear

    @property
    def name(self) -> str:
        return self.where.name

    @property
    def role(self) -> str:
        return self.where.role

    @property
    def block(self) -> int:
        return self.where.block

    @property
    def group(self) -> str:
        """Sites of one group read the same input."""
        return self.where.group

    @property
    def outputs(self) -> OutputRange:
        """The output units of the layer that belong to this site."""
        return OutputRange(*self.where.outputs) if self.where.outputs else OutputRange(0, self.layer.d_out)

    @property
    def device(self) -> torch.device:
        return self.layer.device

    @property
    def d_in(self) -> int:
        return self.layer.d_in

    @property
    def d_out(self) -> int:
        return self.outputs.stop - self.outputs.start

    def fresh_lora(self, rank: int, purpose: str) -> LowRank:
        """Returns an initialised LoRA branch. It depends on the purpose, the site and PyTorch's seed only."""
        return LowRank.fresh(self.d_out, self.d_in, rank, self.generator(purpose))

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a CPU generator, seeded by the purpose, the site and PyTorch's seed."""
        return torch.Generator().manual_seed(seed_of(purpose, torch.initial_seed(), self.name))

    def add(self, name: str, branch: Branch) -> None:
        self.layer.add(f"{self.role}:{name}", branch, self.outputs)

    def live(self) -> dict[str, Branch]:
        prefix = f"{self.role}:"
        return {
            n[len(prefix) :]: b for n, b in self.layer.live.items() if n.startswith(prefix) and isinstance(b, Branch)
        }

    def finished(self) -> dict[str, Finished]:
        prefix = f"{self.role}:"
        return {n[len(prefix) :]: f for n, f in self.layer.finished.items() if n.startswith(prefix)}

    def finish(self, name: str, *, fold: bool = True) -> None:
        self.layer.finish(f"{self.role}:{name}", fold=fold)

    def drop(self, name: str) -> None:
        """Remove a branch, live or finished."""
        self.layer.drop(f"{self.role}:{name}")

    def replace(self, name: str, branch: Branch) -> None:
        """Replace this live branch by another one."""
        self.drop(name)
        self.add(name, branch)

    def restore_finished(self, name: str, finished: Finished) -> None:
        """Set a finished branch. The layer must be refolded afterwards."""
        self.layer.finished[f"{self.role}:{name}"] = finished

    def mixture(self, names: Sequence[str], router: Router) -> Mixture:
        """Returns a mixture of these routed adapters. Smaller ranks are padded with zeros."""
        found = [self.finished()[name] for name in names]
        rank, dtype = max(f.down_ri.shape[0] for f in found), self.layer.weight_oi.dtype
        ups_eor = torch.stack([F.pad(f.up_or, (0, rank - f.up_or.shape[1])) for f in found])
        downs_eri = torch.stack([F.pad(f.down_ri, (0, 0, 0, rank - f.down_ri.shape[0])) for f in found])
        return Mixture(self.outputs, ups_eor.to(dtype), downs_eri.to(dtype), router)
