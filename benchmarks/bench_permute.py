"""permute and unpermute beside the reference."""

import pytest
import torch
from harness.peers import MODULES

import moe_ext


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("T,H,E,K", [(4096, 512, 64, 4)])
def test_permute_unpermute(take_turns, name, T, H, E, K):
    tokens = torch.randn(T, H)
    weights, ids, _ = moe_ext.topk_router(torch.randn(T, E), K)

    def there_and_back(module):
        rows, row_map, _ = module.permute(tokens, ids, E)
        return module.unpermute(rows, row_map, weights)

    calls = {n: (lambda m=module: there_and_back(m)) for n, module in MODULES.items()}
    take_turns(calls, name, bytes_moved=4 * T * H * (1 + K + K + 1))
