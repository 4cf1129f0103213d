"""The training itself: the state, the loop and the step. Nothing here imports the config, Hydra or rich.

`loop` is the place to start reading, then `evaluation`. `step` has the parts of a step that the five lines do not show.
`finite` and `oom` handle non-finite values and memory errors. `losses` and `metrics` keep the reported numbers exact.
"""

from trainkit.training.evaluation import evaluate
from trainkit.training.hooks import EVENTS
from trainkit.training.loop import fit
from trainkit.training.objects import Objects
from trainkit.training.progress import Progress
from trainkit.training.state import LoopSettings, Phase, State, new_state

__all__ = ["EVENTS", "LoopSettings", "Objects", "Phase", "Progress", "State", "evaluate", "fit", "new_state"]
