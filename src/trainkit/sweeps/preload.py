"""What the server of job processes imports once. The jobs are forks of the server, so they start in milliseconds.

Nothing here may use a GPU: a fork could not use one after that.
"""

from __future__ import annotations

import trainkit.models
import trainkit.sweeps.job  # noqa: F401
