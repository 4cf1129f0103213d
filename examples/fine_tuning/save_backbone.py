"""Save the backbone of a trained classifier: `python save_backbone.py RUN FILE`."""

from __future__ import annotations

import sys

import torch

import trainkit


def save_backbone(run: str, file: str) -> None:
    """Write the best weights of the backbone of a run to a .pt file.

    Args:
        run: directory of the run.
        file: path of the .pt file.
    """
    model = trainkit.load(run)
    torch.save(model.get_submodule("backbone").state_dict(), file)


if __name__ == "__main__":
    save_backbone(*sys.argv[1:])
