"""Secrets in configs, commands, the environment and errors: no file of a run contains them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.processes import Forks
from trainkit.core.redaction import REDACTED

MODULE = '''
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Linear):
    """A model with any arguments."""

    def __init__(self, **rest):
        super().__init__(4, 2)

def points(unreadable=""):
    return Points(unreadable)

class Points:
    classes = ["a", "b"]

    def __init__(self, unreadable=""):
        self.unreadable = unreadable

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 3 and self.unreadable:
            raise OSError(f"cannot fetch {self.unreadable}")
        return torch.randn(4), index % 2

class Log:
    """A hook with any arguments, which fails with all of them and those of the environment in its message."""

    def __init__(self, fails=True, **values):
        self.values, self.fails = values, fails

    def on_epoch(self, state, metrics):
        found = [os.environ[name] for name in sorted(os.environ) if name.startswith(("HF_", "VALUE"))]
        if self.fails:
            raise RuntimeError(f"refused: {self.values} {' '.join(found)}")
'''
BASE = ["model=net", "data=points", "batch_size=8", "progress=off", "epochs=1", "+hooks.h._target_=secretmodule.Log"]
KEYS = [
    "api_key",
    "apiKey",
    "API_KEY",
    "tokenizer_api_key",
    "tokenizerAccessKey",
    "tokenization_password",
    "tokenizer_token",
    "hf_token",
    "Password",
    "passwd",
    "db_passwd",
    "passphrase",
    "sshPassphrase",
    "credential",
    "credentials",
    "client_secret",
    "secretKey",
    "authorization",
    "keyword_secret",
    "keypointSecret",
    "pwd",
    "my.api_key",
]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Return a folder with a model, data and a hook that take any arguments."""
    (tmp_path / "secretmodule.py").write_text(MODULE)
    data = "train: {_target_: secretmodule.Points}\nval: null\n"
    for name, text in (("model/net", "_target_: secretmodule.Net\n"), ("data/points", data)):
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / f"{name}.yaml").write_text(text)
    return tmp_path


@dataclass
class Planting:
    """Secrets in the overrides and the environment of a run."""

    secrets: list[str]
    overrides: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)  # the overrides of a resume


def plant(number: int, draw: random.Random) -> Planting:
    """Return a planting of a kind that its number decides, with a drawn key, secret and part of the config."""
    secret = "".join(draw.choices("ghjkmnpqruvwxyz" + string.digits, k=14)) + "Zq"
    part = draw.choice(["hooks.h", "model", f"hooks.h.more{number}", f"model.more{number}"])
    key = f"{part}.n{number}.{draw.choice(KEYS)}"
    plain = f"{part}.value{number}"
    variable, other = f"VALUE{number}", f"{part}.other{number}"

    def literal(value: str, *, key: str = key, secrets: tuple[str, ...] = (secret,)) -> Planting:
        return Planting(list(secrets), [f"+{key}={value}"], again=[f"{key}={value}"])

    def reference(text: str, value: str = secret, *more: str, key: str = plain) -> Planting:
        lines = [line for line in value.splitlines() if line]
        return Planting([value, repr(value)[1:-1], *lines], [f"+{key}={text}", *more], {variable: value})

    digits = str(draw.randrange(10**8, 10**9))
    short = draw.choice("GHJKM") + "".join(draw.choices("ghjkmz", k=2))
    kinds: list[Callable[[], Planting]] = [
        lambda: literal(secret),
        lambda: literal(f"'{secret}'"),
        lambda: literal(f'"it is {secret}"'),
        lambda: literal(f"'it\\'s {secret}'"),
        lambda: literal(f"[{secret},x]"),
        lambda: literal(f"true-{secret}"),
        lambda: literal(f"null {secret}"),
        lambda: literal(f"12-{secret}"),
        lambda: literal(f"{{a: {{b: {secret}}}}}"),
        lambda: literal(f"[{{a: {secret}}}, 3]"),
        lambda: literal(digits, key=f"{part}.n{number}.password", secrets=(digits,)),
        lambda: literal(f"'https://user:{secret}@host/path'", key=plain),
        lambda: literal(f"'see postgres://u:{secret}@host:5432/db and https://host'", key=plain),
        lambda: literal(f"'https://{secret}@host/path'", key=plain),
        lambda: literal(f"'https://host/path?a=1&api_key={secret}&b=2'", key=plain),
        lambda: Planting(
            [secret],
            [f"+{key}={secret}", f"+{plain}='a copy of {secret} in a text'"],
            again=[f"{key}={secret}", f"{plain}='a copy of {secret} in a text'"],
        ),
        lambda: Planting([secret], [f"+{key}='${{oc.env:NOT_THERE,{secret}}}'"], again=[f"{key}={secret}"]),
        lambda: reference(f"'${{oc.env:{variable}}}'"),
        lambda: reference(f"'${{oc.env: {variable}}}'"),
        lambda: reference(f"'${{oc.env:\"{variable}\"}}'"),
        lambda: reference(f"'${{oc.env: {variable} }}'", key=key),
        lambda: reference(f"'${{oc.env:${{{other}}}}}'", secret, f"+{other}={variable}"),
        lambda: reference(f"'${{oc.env:NOT_THERE,${{oc.env:{variable}}}}}'"),
        lambda: reference(f"'before ${{oc.env:{variable}}} after'"),
        lambda: reference(f"'${{oc.decode:${{oc.env:{variable}}}}}'"),
        lambda: reference(f"'https://user:${{oc.env:{variable}}}@host'"),
        lambda: reference(f"'${{oc.env:{variable}}}'", digits),
        lambda: reference(f"'${{oc.env:{variable}}}'", short),
        lambda: reference(f"'${{oc.env:{variable}}}'", f"{secret}'\"\\{secret[:9]}"),
        lambda: reference(f"'${{oc.env:{variable}}}'", f"BEGIN {secret}\n{secret[::-1]}\nEND {secret[:10]}\n"),
        lambda: Planting([secret], [], {f"HF_TOKEN{number}": secret}),
    ]
    return kinds[number % len(kinds)]()


def findings(folder: Path, secrets: list[str]) -> list[tuple[str, str]]:
    """Return each file and secret where the bytes of the file contain the secret."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "state.pt", "trainkit.log"} <= {file.name for file in files}
    return [(file.name, secret) for file in files for secret in secrets if secret.encode() in file.read_bytes()]


def test_one_hundred_planted_secrets_are_in_no_file_of_the_runs(own: Path, forks: Forks) -> None:
    draw = random.Random(13)
    plantings = [plant(number, draw) for number in range(100)]
    for run in range(5):
        planted = plantings[20 * run : 20 * run + 20]
        overrides = [text for planting in planted for text in planting.overrides]
        env = {name: value for planting in planted for name, value in planting.env.items()}
        again = [text for planting in planted for text in planting.again]
        folder = f"run{run}"
        mode, code = (["-m", f"hydra.sweep.dir={folder}"], 10) if run == 0 else ([f"hydra.run.dir={folder}"], 1)
        failed = forks.start(*BASE, *overrides, *mode, cwd=own, **env)
        assert failed.wait() == code, failed.stderr
        resumed = forks.start("resume", f"{folder}/0" if run == 0 else folder, *again, cwd=own, **env)
        assert resumed.wait() == 1, resumed.stderr
        assert "hooks.h: RuntimeError: refused" in resumed.stderr
        info = json.loads(next((own / folder).rglob("run.json")).read_text())
        assert info["why"].startswith("hooks.h: RuntimeError: refused: {")
        assert not findings(own / folder, [secret for planting in planted for secret in planting.secrets])


@pytest.mark.parametrize(
    "override",
    ["+hooks.h.tokenizer=bert-base", "+hooks.h.num_tokens=12", "+hooks.h.key_encoder=resnet18", "+hooks.h.keywords=a"],
)
def test_ordinary_values_under_similar_keys_stay_readable(override: str, own: Path, forks: Forks) -> None:
    forks.run(*BASE, override, "+hooks.h.fails=false", "hydra.run.dir=run", cwd=own)
    key, _, value = override.removeprefix("+hooks.h.").partition("=")
    assert str(yaml.safe_load((own / "run/.hydra/config.yaml").read_text())["hooks"]["h"][key]) == value
    assert override in yaml.safe_load((own / "run/.hydra/overrides.yaml").read_text())
    assert override in json.loads((own / "run/run.json").read_text())["command"]


def test_references_stay_however_they_are_written_and_a_resume_reads_them_again(own: Path, forks: Forks) -> None:
    written = ["${oc.env:MINE}", "${oc.env: MINE}", "${oc.env:'MINE'}", "${oc.env:${hooks.h.name}}"]
    overrides = [f'+hooks.h.api_key{number}="{text}"' for number, text in enumerate(written)]
    argv = [*BASE, "+hooks.h.name=MINE", *overrides, "+hooks.h.fails=false", "hydra.run.dir=run"]
    forks.run(*argv, cwd=own, MINE="sEcret-of-mine")
    kept = yaml.safe_load((own / "run/.hydra/config.yaml").read_text())["hooks"]["h"]
    assert [kept[f"api_key{number}"] for number in range(4)] == written
    forks.run("resume", "run", "epochs=2", cwd=own, MINE="sEcret-of-mine")
    assert not findings(own / "run", ["sEcret"])


def test_the_command_of_a_resume_is_written_without_its_secrets(own: Path, forks: Forks) -> None:
    argv = [*BASE, "+hooks.h.password=first-love1", "+hooks.h.fails=false", "hydra.run.dir=run"]
    forks.run(*argv, cwd=own)
    forks.run("resume", "run", "hooks.h.password=true-love9", "epochs=2", cwd=own)
    command = json.loads((own / "run/run.json").read_text())["resumed"][0]["command"]
    assert command[2:] == ["run", f"hooks.h.password={REDACTED}", "epochs=2"]
    assert not findings(own / "run", ["love1", "love9"])


def test_an_unreadable_sample_is_recorded_without_the_secret_in_its_error(own: Path, forks: Forks) -> None:
    source = "+data.train.unreadable='https://host/${oc.env:PLACE}'"
    argv = [*BASE, source, "data.on_unreadable=skip", "+hooks.h.fails=false", "hydra.run.dir=run"]
    forks.run(*argv, cwd=own, PLACE="sEcret-place")
    assert f"cannot fetch https://host/{REDACTED}" in (own / "run/trainkit.log").read_text()
    assert not findings(own / "run", ["sEcret"])
