"""What the experts of a training run do, step by step: load, drops, entropy, losses, speed.

    with moe_ext.monitor.Monitor(model, "monitor.jsonl") as monitor:
        for batch in batches:
            train_step(batch)
            monitor.step()
    monitor.draw("monitor.png")

or, without a line in the loop, `Monitor(model, "monitor.jsonl", optimizer=optimizer)`. It watches
`moe_ext.MoE` layers and, after `import moe_ext.integrations.transformers`, the experts of Hugging
Face models that run on moe_ext. Layers that nobody watches do none of this. The figures come out of
the layers' own forwards; on a GPU they are read later than they are written, so that nothing waits
for the device.
"""

from moe_ext.monitor.flops import active_flops_per_token, measure_ceiling
from moe_ext.monitor.guard import CollapseGuard
from moe_ext.monitor.monitor import Monitor
from moe_ext.monitor.watch import WATCHERS, Watched

__all__ = [
    "WATCHERS",
    "CollapseGuard",
    "Monitor",
    "Watched",
    "active_flops_per_token",
    "measure_ceiling",
]
