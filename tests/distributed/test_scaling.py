"""What `check` estimates for several devices is what their ranks exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.helpers import Case, train_cases
from tests.processes import Forks
from trainkit.config.repair import compose_and_repair
from trainkit.diagnostics.check.run import check

COUNT = """
import json
import torch.distributed as dist
from pathlib import Path

class Count:
    def on_start(self, state):
        self.sizes, self.all_reduce = [], dist.all_reduce
        def counted(tensor, *args, **named):
            self.sizes.append(tensor.nbytes)
            return self.all_reduce(tensor, *args, **named)
        dist.all_reduce = counted

    def on_end(self, state):
        dist.all_reduce = self.all_reduce
        name = f"sent-{state.objects.ranks.rank}.json"
        (Path.cwd() / name).write_text(json.dumps({"steps": state.step, "sizes": self.sizes}))
"""
CONFIG = ["model=mlp", "limit_batches=4", "epochs=2", "+param_groups.fixed={name: 'fc1.*', freeze: true}"]
SMALL = 100  # bytes of a sum that is no gradient, such as that of a loss


def test_the_estimated_bytes_are_those_that_two_ranks_send(forks: Forks, here: Path) -> None:
    (here / "counting.py").write_text(COUNT)
    outcome = train_cases(forks, 2, {"a": Case([*CONFIG, "+hooks.count._target_=counting.Count"])}, here)["a"]
    assert outcome.codes == [0, 0], outcome.errors
    report = check(compose_and_repair(CONFIG), 0.1)
    assert report.scaling is not None
    estimated = report.scaling.estimates[1]
    assert estimated.devices == 2
    for rank in range(2):
        counted = json.loads((here / f"sent-{rank}.json").read_text())
        gradients = sum(size for size in counted["sizes"] if size >= SMALL)
        # Over a ring, each of two ranks sends 2 (2 - 1) / 2 of the bytes of an all-reduce: all of them.
        assert gradients / counted["steps"] == estimated.sent
        assert sum(counted["sizes"]) / counted["steps"] == pytest.approx(estimated.sent, rel=0.01)
