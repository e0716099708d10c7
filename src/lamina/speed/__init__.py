"""Everything that makes a run faster. All of it can be left out; results stay the same to rounding.

`accelerate` puts it around a learner from outside: nothing in `adapters`, `learner` or `engine` imports it.
"""

from lamina.speed.around import Accelerated, accelerate
from lamina.speed.memory import keeping_memory, return_large_blocks
from lamina.speed.shard_backbone import held, shard

__all__ = ["Accelerated", "accelerate", "held", "keeping_memory", "return_large_blocks", "shard"]
